"""Train arms on the battle, three seeds each, and measure them against fixed opponents while they learn.

    pip install -r requirements.txt -r examples/battle/requirements.txt
    python examples/battle/compare.py
    python examples/battle/compare.py --arms separate ippo mappo global --map-size 24 --seeds 5 --out runs/small

They learn by self-play. Their checkpoints then fight two opponents that never learn: one that takes random actions
that are not masked (`random`), and one that the arm `separate` trained before, with another seed and fewer steps
(`frozen`). The army with more soldiers at the end has won; a draw counts half.

Started again, it continues; only trainings that were not finished begin again. All of it again: with other folders.

    written to --out
    battle.csv      a row for every battle: arm, seed, step, seconds trained, opponent, won, kills, survivors, length
    battle.png      share won and kills against environment steps, mean of the seeds and (thin) each of them
    battle.md       share won against the frozen army after each arm's last step

Checkpoints and logs lie in --work.
"""

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "benchmark")]

from ablation import keep, programs, runs_of  # noqa: E402
from other_games import ARMS  # noqa: E402
from plot import plt, read_csv, table, write, write_csv  # noqa: E402

import trajsep_ppo  # noqa: E402
from hybrid_model import HybridNet  # noqa: E402
from trajsep_ppo import Refused, checkpoints, evaluate  # noqa: E402

FROZEN = ("separate", 1000)  # arm and seed of the opponent
FINE, COARSE = 1024, 8192  # environment steps between two checkpoints that fight, up to COARSE and beyond it
# With the default gamma of 0.99 armies learn to wait for the enemy: who comes first is hit first.
FLAGS = f"--gamma 0.9 --num-envs 16 --num-steps 32 --save-every {FINE // (16 * 32)} --num-workers 0 --eval-episodes 0"
COLUMNS = ("arm", "seed", "global_step", "train_seconds", "opponent", "won", "kills", "survivors", "length")


@dataclass
class Args:
    out: Path = ROOT / "runs" / "battle"
    """folder of the results"""
    work: Path = ROOT / "runs" / "battle"
    """folder of the trainings"""
    arms: tuple[str, ...] = ("separate", "global")
    """which of ARMS in benchmark/other_games.py"""
    seeds: int = 3
    """trainings of each arm"""
    jobs: int = 2
    """trainings at a time, with one thread each"""
    steps: int = 16384
    """environment steps of a training"""
    frozen_steps: int = 8192
    """environment steps of the training of the frozen opponent"""
    battles: int = 10
    """battles of a checkpoint against each opponent"""
    map_size: int = 45
    """side of the board; 45 has 81 soldiers in each army, 24 has 16"""


def steps_of(path):
    """Environment steps after which a checkpoint was written."""
    return int(path.stem.split("_")[1])


def is_done(args, arm, seed, steps):
    """Whether a training has been run; and its folder and its command.

    Raises:
        Refused: if one with other flags has been run there.
    """
    folder = args.work / f"{arm}_{seed}"
    _, script, *_ = ARMS[arm]
    command = f"{script} --seed {seed} --total-timesteps {steps} {FLAGS}"
    command += f" --env-id battle_env:BattleVecEnv --env-kwargs map_size {args.map_size}"
    done = (folder / "done").exists()
    if done and (folder / "done").read_text() != command:
        raise Refused(f"{folder} holds a training with other flags; name another --work and --out")
    return done, folder, command


def train(args, arm, seed, steps):
    """Run a training unless it has been run; returns a folder with all its checkpoints."""
    done, folder, command = is_done(args, arm, seed, steps)
    if done:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in [path for place in (folder, *runs_of(folder)) for path in checkpoints(place)]:
        path.unlink()  # of a training that was cut off
    shutil.copy(HERE / "battle_env.py", folder)  # --env-id is looked for in the current folder
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    print(f"{time.strftime('%H:%M:%S')} {arm} seed {seed}: training, see {folder / 'log'}", flush=True)
    words = command.split()
    _, _, patches, *_ = ARMS[arm]
    program = programs(patches, folder / "programs") / words[0]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, program, *words[1:]], cwd=folder, stdout=log, stderr=log, env=environment
        )
        running = True
        while running:
            running = process.poll() is None
            keep(folder)
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}; see {folder / 'log'}")
    (folder / "done").write_text(command)
    return folder


def random_policy(seed=0):
    """A player that takes random unmasked actions: observations [N, E, ...] to actions [N, E]."""
    rng = np.random.default_rng(seed)
    return lambda obs: (rng.random(obs["action_mask"].shape) * obs["action_mask"]).argmax(-1)


def load(path):
    """The network of a checkpoint."""
    from battle_env import BattleVecEnv  # here: --help works without magent2

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    envs = BattleVecEnv(1, map_size=checkpoint["args"]["env_kwargs"]["map_size"])
    agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max()))
    agent.load_state_dict(checkpoint["model"])
    return agent


def trained_policy(agent, seed):
    """A player that samples from the policy of a network."""
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def act(obs):
        probs = agent({key: torch.as_tensor(x) for key, x in obs.items()})[0].softmax(-1)
        return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1).numpy()

    return act


def fight(agent, opponent, battles, map_size):
    """Let a network fight each battle once, half of them from either side; a dict of arrays [battles]."""
    from battle_env import BattleVecEnv

    envs = BattleVecEnv(battles, map_size=map_size, held_out=True, opponent=opponent)
    metrics = evaluate(agent, envs, envs.max_steps, "cpu")
    return {key: np.ravel(x).astype(float) for key, x in metrics.items()}


def measure(args, arm, seed):
    """Train, then fight both opponents with every checkpoint; a row for each battle."""
    torch.set_num_threads(1)
    trajsep_ppo.tqdm = partial(tqdm, disable=True)  # bars of several processes would mix
    folder = train(args, arm, seed, args.steps)
    *_, path = checkpoints(args.work / "{}_{}".format(*FROZEN))
    frozen = load(path)
    rows = []
    wanted = [path for path in checkpoints(folder) if steps_of(path) <= COARSE or steps_of(path) % COARSE == 0]
    for path in wanted:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        about = {"arm": arm, "seed": seed, "global_step": steps_of(path)}
        about["train_seconds"] = round(checkpoint["train_seconds"])
        for opponent in ("random", "frozen"):
            other = random_policy() if opponent == "random" else trained_policy(frozen, seed=1)
            results = fight(load(path), other, args.battles, args.map_size)
            for values in zip(*(results[key].tolist() for key in ("won", "kills", "survivors", "l"))):
                rows.append({**about, "opponent": opponent, **dict(zip(COLUMNS[5:], values))})
    return rows


def draw(rows, path, soldiers, frozen_steps):
    """Share won and kills against environment steps, a column for each opponent.

    Args:
        rows: of battle.csv.
        path: the picture to write.
        soldiers: how many an army has.
        frozen_steps: environment steps of the training of the frozen opponent.
    """
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(7.6, 5.6), sharex=True, sharey="row", layout="constrained")
    titles = {
        "random": "against an army of random actions",
        "frozen": f"against an army of trajsep_ppo.py,\nfrozen at {frozen_steps:,} steps",
    }
    for column, (opponent, title) in enumerate(titles.items()):
        for row, (key, label) in enumerate((("won", "share of battles won"), ("kills", "enemies killed"))):
            for arm, (name, _, _, colour, style) in ARMS.items():
                curves = {}
                for x in rows:
                    if (x["arm"], x["opponent"]) == (arm, opponent):
                        curve = curves.setdefault(x["seed"], {})
                        curve.setdefault(int(x["global_step"]), []).append(float(x[key]))
                lines = [[(step, np.mean(y)) for step, y in sorted(curve.items())] for curve in curves.values()]
                for line in lines:
                    axes[row, column].plot(*zip(*line), color=colour, alpha=0.3, linewidth=0.8)
                if lines:
                    look = {"color": colour, "linestyle": style, "linewidth": 2.8 if style == "-" else 2}
                    look["zorder"] = 3 if style == ":" else 2  # dots hide least
                    axes[row, column].plot(*np.mean(lines, 0).T, label=name, **look)
            axes[row, column].set_ylabel(label if column == 0 else None)
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].axhline(soldiers, color="grey", linestyle=":", label=f"all {soldiers} soldiers")
        axes[1, column].set_xlabel("environment steps (log scale)")
    axes[1, 0].set_xscale("log", base=2)
    axes[1, 0].xaxis.set_major_formatter("{x:,.0f}")
    handles, _ = axes[1, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="grey", linewidth=0.8, label="thin: a seed, thick: their mean"))
    figure.suptitle(f"{soldiers} soldiers against {soldiers}", fontsize=11)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def last_shares(rows):
    """Arm -> share of battles won against the frozen army by its last checkpoints [seeds]."""
    last = max(int(x["global_step"]) for x in rows)
    seeds = {}
    for x in rows:
        if (x["opponent"], int(x["global_step"])) == ("frozen", last):
            seeds.setdefault(x["arm"], {}).setdefault(x["seed"], []).append(float(x["won"]))
    return {arm: np.array([np.mean(won) for won in of_arm.values()]) for arm, of_arm in seeds.items()}


def shares_won(rows):
    """In Markdown, the share won against the frozen army by the last checkpoints: mean (lowest to highest seed)."""
    last = max(int(x["global_step"]) for x in rows)
    shares, cells = last_shares(rows), {}
    for arm, (name, *_) in ARMS.items():
        if arm in shares:
            cells[name] = "{:.0%} ({:.0%} to {:.0%})".format(shares[arm].mean(), shares[arm].min(), shares[arm].max())
    return table(["steps", *cells], [[f"{last:,}", *cells.values()]]) + "\n"


def main(args):
    """Train, fight, and write the table and the picture after each training.

    Raises:
        Refused: if magent2 is missing, or trainings with other flags are there.
    """
    if not importlib.util.find_spec("magent2"):
        raise Refused("the battle needs magent2: pip install -r examples/battle/requirements.txt")
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        raise Refused(f"there is no arm {unknown[0]}; there are {', '.join(ARMS)}")
    if min(args.seeds, args.jobs) < 1:
        raise Refused("--seeds and --jobs must be at least 1")
    args.work, results = args.work.resolve(), args.out / "battle.csv"
    rows = read_csv(results) if results.exists() else []
    measured = {(x["arm"], int(x["seed"])) for x in rows}
    runs = [(name, seed) for seed, name in itertools.product(range(1, args.seeds + 1), args.arms)]
    missing = [run for run in runs if run not in measured]
    for run in runs:
        is_done(args, *run, args.steps)  # before anything is written
    frozen, folder, _ = is_done(args, *FROZEN, args.frozen_steps)
    if not missing:
        print(f"all of it is in {results} already; another --out and --work make it again")
        return
    if rows and not frozen:
        raise Refused(
            f"{results} has battles against an army that is not in {folder}; name its --work, or another --out"
        )
    from battle_env import BattleVecEnv  # here: nothing else needs magent2

    try:
        soldiers = BattleVecEnv(1, map_size=args.map_size).size
    except ValueError as error:
        raise Refused(f"--map-size {args.map_size}: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    train(args, *FROZEN, args.frozen_steps)
    with ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(measure, args, *run) for run in missing]
        for number, job in enumerate(as_completed(jobs), start=len(runs) - len(missing) + 1):
            rows = sorted(rows + job.result(), key=lambda x: (x["arm"], int(x["seed"]), int(x["global_step"])))
            write_csv(results, COLUMNS, rows)
            draw(rows, args.out / "battle.png", soldiers, args.frozen_steps)
            write(args.out / "battle.md", shares_won(rows))
            print(f"{number} of {len(runs)} trainings have fought, see {results} and battle.png", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (Refused, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # a training has failed
        sys.exit(f"compare.py: error: {error}")
