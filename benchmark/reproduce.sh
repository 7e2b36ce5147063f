#!/usr/bin/env bash
# Make all that benchmark/ and docs/ show once more, in a folder of its own: about ten hours on two cores.
#
#     bash benchmark/reproduce.sh [FOLDER]
#
# The same command continues it, except the measurements of speed and reliability, which start again; nothing else should
# run beside those. The study, 121 trainings and their evaluations, takes about four hours. Not made here are matches
# against bots that must be fetched first (see benchmark/README.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-runs/reproduced}"
mkdir -p "$out"

python benchmark/ablation.py --out "$out/study"
python benchmark/plot.py --results "$out/study" --out "$out/study"
python benchmark/study.py --results "$out/study" --out "$out/docs"
neurips="--env-kwargs map_size 64 min_factories 4 max_factories 10 max_robots 40"
python benchmark/ablation.py --arms default --schedule 102400 --flags="$neurips" --seeds 11 12 13 --out "$out/neurips"
python benchmark/plot.py --results "$out/neurips" --out "$out/neurips"

python benchmark/throughput.py --out "$out/throughput"
python benchmark/reliability.py --out "$out/reliability"
python benchmark/placement.py --out "$out/placement.png"
if python -c "import rware, lbforaging, pettingzoo" 2> "$out/games.log"; then
    python benchmark/other_games.py --out "$out/games"
else
    echo "no other games: pip install -r examples/gymnasium/requirements.txt -r examples/pettingzoo/requirements.txt"
fi
if python -c "import magent2" 2> "$out/magent2.log"; then
    python examples/battle/compare.py --out "$out/battle" --work "$out/work/battle"
else
    echo "no magent2: pip install -r examples/battle/requirements.txt, and start this again for the battle"
fi
