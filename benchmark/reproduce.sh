#!/usr/bin/env bash
# Make all that benchmark/ and docs/ show anew, in a folder of its own: about ten hours on two cores.
#
#     bash benchmark/reproduce.sh [FOLDER]
#
# It goes on where it was stopped, but for the measurements of speed and reliability, which begin anew; nothing else
# should run beside those. Ten hours are an estimate, of which the study, 121 trainings and their evaluations, takes four.
# What each folder is for is said in benchmark/README.md, and there too how the few numbers come about that are not made
# here: what was tuned, and matches against bots that must be fetched first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-runs/reproduced}"
mkdir -p "$out"

study() {  # study FOLDER FLAGS...: train, evaluate, figures and tables
    python benchmark/ablation.py --out "$out/$1" --work "$out/work/$1" "${@:2}"
    python benchmark/plot.py --results "$out/$1"
}
early="2048 4096 6144 8192 10240 12288 14336 16384 20480 24576 32768 49152"
tuned="--first-map 0 --arms default global"  # on the maps on which flags were chosen

study study
python benchmark/study.py --results "$out/study" --out "$out/docs"
study no_safe_masks $tuned --seeds 1 2 3 --flags=--no-safe-masks --schedule $early
neurips="--map-size 64 --min-factories 4 --max-factories 10 --max-robots 40"
study neurips_stage $tuned global-small-value-loss --seeds 1 2 3 --schedule $early --flags="$neurips"
study neurips_clean --arms default --seeds 11 12 13 --schedule 102400 --flags="$neurips"
study robots_8 $tuned --seeds 1 2 3 --flags="--max-robots 8" --schedule 2048 4096 6144 8192 10240 12288 14336 16384 24576 49152
study robots_12 $tuned --seeds 4 5 6 --flags="--max-robots 12" --schedule $early

python benchmark/throughput.py  # writes to benchmark/throughput/
python benchmark/reliability.py --out "$out/reliability"
python benchmark/placement.py --path "$out/placement.png"
if python -c "import magent2" 2> "$out/magent2.log"; then
    python examples/battle/compare.py --seeds 3 --steps 16384 --out "$out/battle" --work "$out/work/battle"
else
    echo "no magent2: pip install -r examples/battle/requirements.txt, and start this again for the battle"
fi
