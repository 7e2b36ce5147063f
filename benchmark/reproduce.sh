#!/usr/bin/env bash
# Make the studies, the measurements and the battles of benchmark/ and docs/ once more, in a folder of its own.
#
#     bash benchmark/reproduce.sh [FOLDER]          # in runs/reproduced
#     bash benchmark/reproduce.sh --try [FOLDER]    # in runs/tried: every step, but small, in half an hour
#
# The same command continues it, except the measurements of speed and reliability, which start again;
# nothing else should run beside those. A try shows that every step works; its numbers mean nothing.
#
# The study has 196 trainings, the search 66, the NeurIPS stage 25, the real game 15, the other games 80, the battles
# 60. All of it in one go was not timed. On one core of an AMD EPYC the trainings of the study took 17.3 hours, the
# search with its evaluations 1.9, the NeurIPS stage 3, the real game 1.5, the battles 0.8 and with 289 soldiers
# about 3 more (estimated from 12 of these 20 on a busy machine): expect a day on two cores. Not made here are matches
# on the official engine, most of which need bots that must be fetched first, and what shows a single training or match
# (the pages of credit, the bands of a healthy run): benchmark/README.md has their commands.
set -euo pipefail

size=full
out=runs/reproduced
if [ "${1:-}" = --try ]; then
    size=small
    out=runs/tried
    shift
fi
if [ $# -gt 1 ] || [[ "${1:-}" = -* ]]; then
    echo "usage: bash benchmark/reproduce.sh [--try] [FOLDER]" >&2
    exit 2
fi
out="${1:-$out}"

# What each step is given beside its defaults
tiny=""
study=""
neurips="--seeds 11 12 13 14 15"
real_game="--seeds 11 12 13"
search=""
throughput=""
reliability=""
games=""
battle="--seeds 5"
if [ $size = small ]; then
    tiny="--total-timesteps 1024 --num-steps 32 --save-every 1"
    study="--seeds 11 --matches 2 --schedule 512 --arms default global separate mod-2 top-1 shared-ratio"
    study+=" global-critic-reward authors global-authors lichen"
    neurips="--seeds 11 --matches 2"
    real_game="--seeds 11 --matches 2"
    search="--number 2 --seeds 11 --steps 1024"
    throughput="--steps 512 --repeats 1"
    reliability="--steps 2048 --kills 1"
    games="--seeds 11 --steps 1024 --arms separate mappo"
    battle="--seeds 1 --steps 1024 --frozen-steps 1024 --battles 2"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$out"
has_games=yes
has_battle=yes
if ! python -c "import rware, lbforaging, mpe2" 2> "$out/games.log"; then
    has_games=no
    echo "no other games: pip install -r examples/gymnasium/requirements.txt -r examples/pettingzoo/requirements.txt"
fi
if ! python -c "import magent2" 2> "$out/magent2.log"; then
    has_battle=no
    echo "no battle: pip install -r examples/battle/requirements.txt"
fi
trap 'echo "$SECONDS seconds in all; what was made lies in $out"' EXIT

# Run a command; print it before, and the seconds that it took behind.
step() {
    local start=$SECONDS
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
    echo "took $((SECONDS - start)) seconds"
}

step python benchmark/ablation.py --out "$out/study" $study --flags="$tiny"
step python benchmark/plot.py --results "$out/study" --out "$out/study"
step python benchmark/study.py --results "$out/study" --out "$out/docs"
step python benchmark/search.py --out "$out/search" $search --flags="$tiny"
stage="--env-kwargs map_size 64 min_factories 4 max_factories 10 max_robots 40"
arms="default global-reward global-critic-reward global"
own="global-small-value-loss=global_ppo.py --vf-coef 0.01"
step python benchmark/ablation.py --arms $arms --arm "$own" $neurips --schedule 102400 --flags="$stage $tiny" \
    --out "$out/neurips"
step python benchmark/plot.py --results "$out/neurips" --out "$out/neurips"
stage="--env-kwargs reward lichen max_robots 24"
step python benchmark/ablation.py --arms $arms --arm "$own" $real_game --schedule 102400 --flags="$stage $tiny" \
    --out "$out/real_game"
if [ $has_games = yes ]; then
    step python benchmark/other_games.py --out "$out/games" $games
fi
if [ $has_battle = yes ]; then
    arms="separate ippo mappo global"
    for map_size in 24 45 85; do  # armies of 16, 81 and 289 soldiers
        step python examples/battle/compare.py --arms $arms --map-size $map_size $battle \
            --out "$out/battle_$map_size" --work "$out/battle_$map_size"
    done
    step python examples/battle/armies.py --works "$out"/battle_{24,45,85} --out "$out/armies"
fi
step python benchmark/placement.py --out "$out/placement.png"
step python benchmark/throughput.py --out "$out/throughput" $throughput
step python benchmark/reliability.py --out "$out/reliability" $reliability  # last: it fails if it misses a goal
