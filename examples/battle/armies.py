"""Let armies that compare.py trained fight each other, and draw how the method's lead grows with the army.

    python examples/battle/compare.py --arms separate global --seeds 5 --map-size 24 --out runs/b16 --work runs/b16
    python examples/battle/armies.py --works runs/b16 runs/b81

Each army is the last checkpoint of its training. An army fights those of the other arms that have its seed.

    written to --out
    armies.csv    a row for every battle: soldiers, arm, opponent's arm, seed, won, kills, survivors, length
    armies.md     for each size of armies, the share that the row's arm won against the column's; a draw counts half
    armies.png    against the army that compare.py has frozen, for each size: battles won, and environment steps until
                  half of it is killed, as a multiple of the method's
"""

import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare import ROOT, fight, last_shares, load, trained_policy  # noqa: E402
from other_games import ARMS  # noqa: E402
from plot import named_or, plt, read_csv, steps_to, table, write, write_csv  # noqa: E402

import trajsep_ppo  # noqa: E402
from trajsep_ppo import Refused, checkpoints  # noqa: E402

COLUMNS = ("soldiers", "arm", "opponent", "seed", "won", "kills", "survivors", "length")
METHOD = "separate"
SHARE_KILLED = 0.5


@dataclass
class Args:
    works: tuple[Path, ...] = (ROOT / "runs" / "battle",)
    """folders of compare.py's trainings (its --work), one for each size of armies, with its battle.csv"""
    out: Path | None = None
    """folder of the results, instead of runs/armies"""
    battles: int = 10
    """battles of two armies"""
    jobs: int = 2
    """pairs of armies at a time, with one thread each"""


def armies_in(work):
    """(arm, seed) -> its last checkpoint, of the trainings in a folder that have ended."""
    armies = {}
    for path in sorted(work.glob("*_*/done")):
        arm, _, seed = path.parent.name.rpartition("_")
        if arm in ARMS and int(seed) < 1000:  # 1000 is the frozen opponent
            *_, armies[arm, int(seed)] = checkpoints(path.parent)
    return armies


def meet(arms, seed, paths, battles):
    """Let two armies fight each other; a row for each battle and army."""
    from battle_env import BattleVecEnv  # here: --help works without magent2

    torch.set_num_threads(1)
    trajsep_ppo.tqdm = partial(tqdm, disable=True)  # bars of several processes would mix
    map_size = torch.load(paths[0], weights_only=True)["args"]["env_kwargs"]["map_size"]
    agent, other = map(load, paths)
    results = fight(agent, trained_policy(other, seed), battles, map_size)
    soldiers = BattleVecEnv(1, map_size=map_size).size
    rows = []
    for won, kills, survivors, length in zip(*(results[key] for key in ("won", "kills", "survivors", "l"))):
        ours = [soldiers, *arms, seed, won, kills, survivors, length]
        theirs = [soldiers, *arms[::-1], seed, 1 - won, soldiers - survivors, soldiers - kills, length]
        rows += [dict(zip(COLUMNS, ours)), dict(zip(COLUMNS, theirs))]
    return rows


def shares_won(rows):
    """In Markdown, for each size: the share that the row's arm won against the column's."""
    won = {}
    for row in rows:
        won.setdefault((int(row["soldiers"]), row["arm"], row["opponent"]), []).append(float(row["won"]))
    parts = []
    for soldiers in sorted({key[0] for key in won}):
        arms = [arm for arm in ARMS if any(key[:2] == (soldiers, arm) for key in won)]
        lines = []
        for arm in arms:
            cells = [won.get((soldiers, arm, other), []) for other in arms]
            lines.append([ARMS[arm][0], *(f"{np.mean(cell):.0%} of {len(cell)}" if cell else "" for cell in cells)])
        parts.append(table([f"{soldiers} soldiers", *(ARMS[arm][0] for arm in arms)], lines))
    return "\n\n".join(parts) + "\n"


def against_frozen(work):
    """What each seed of an arm reaches against the frozen army of compare.py.

    Args:
        work: folder with compare.py's battle.csv.

    Returns:
        The number of soldiers of an army (the most that anybody killed); arm -> share of battles won [seeds] by the
        last checkpoints; and arm -> factor [seeds]: environment steps to kill SHARE_KILLED of the frozen army, over
        the median of the method's.
    """
    rows = read_csv(work / "battle.csv")
    soldiers = max(float(row["kills"]) for row in rows)
    runs = {}
    for row in rows:
        if row["opponent"] == "frozen":
            run = runs.setdefault(row["arm"], {}).setdefault(row["seed"], {})
            run.setdefault(int(row["global_step"]), {"kills": []})["kills"].append(float(row["kills"]))
    steps = {}
    for arm, seeds in runs.items():
        common = sorted(set.intersection(*map(set, seeds.values())))
        steps[arm] = np.array(steps_to(seeds, "kills", SHARE_KILLED * soldiers, common))
    factors = {arm: values / np.median(steps[METHOD]) for arm, values in steps.items()}
    return int(soldiers), last_shares(rows), factors


def draw(works, path):
    """What against_frozen finds for each size of armies: the seeds, and (large) their mean or median."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
    found = sorted((against_frozen(work) for work in works), key=lambda x: x[0])
    handles = []
    for number, (arm, (name, _, _, colour, _)) in enumerate(ARMS.items()):
        if any(arm in shares for _, shares, _ in found):
            handles.append(plt.Line2D([], [], color=colour, marker="o", ms=8, linestyle="", label=name))
        for axis, column, middle in ((axes[0], 1, np.mean), (axes[1], 2, np.median)):
            for size, results in enumerate(found):
                if arm not in results[column]:
                    continue
                x, values = size + 0.16 * (number - 1.5), results[column][arm]
                axis.plot([x] * len(values), values, "o", color=colour, alpha=0.35, ms=4)
                axis.plot(x, middle(values), "o", color=colour, ms=8)
                if never := np.isinf(values).sum():  # one below the other, as they are too wide to stand side by side
                    look = {"transform": axis.get_xaxis_transform(), "ha": "center", "fontsize": 8, "color": colour}
                    axis.text(x, 0.98 - 0.05 * number, f"{never} never", **look)
    for axis in axes:
        axis.set_xticks(range(len(found)), [f"armies of {results[0]}" for results in found])
        axis.set_xlim(-0.5, len(found) - 0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("share of battles won against the frozen army\n(large: mean of the seeds)", fontsize=10)
    axes[0].set_ylim(-0.05, 1.05)
    axes[1].set_title(
        "steps to kill half of the frozen army, as a multiple\nof separate's (large: median)", fontsize=10
    )
    factors_shown = (0.5, 1, 2, 4, 8)
    axes[1].set_yscale("log")
    axes[1].set_yticks(factors_shown, [f"{factor:g}" for factor in factors_shown])
    axes[1].set_yticks([], minor=True)
    axes[1].set_ylim(factors_shown[0], factors_shown[-1])
    handles.append(plt.Line2D([], [], color="grey", marker="o", ms=4, alpha=0.5, linestyle="", label="small: a seed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    """Fight, and write the tables and the picture.

    Raises:
        Refused: if a folder holds no trained armies, or results are there already.
    """
    out = named_or(ROOT / "runs" / "armies", args.out, ("armies.csv", "armies.md", "armies.png"))
    jobs = []
    for work in args.works:
        armies = armies_in(work)
        if not armies or not (work / "battle.csv").exists():
            raise Refused(f"{work} has no armies and no battle.csv of compare.py")
        for (arm, seed), (other, other_seed) in itertools.combinations(armies, 2):
            if arm != other and seed == other_seed:
                jobs.append(((arm, other), seed, (armies[arm, seed], armies[other, seed]), args.battles))
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = list(itertools.chain(*pool.map(meet, *zip(*jobs))))
    write_csv(out / "armies.csv", COLUMNS, rows)
    write(out / "armies.md", shares_won(rows))
    draw(args.works, out / "armies.png")
    print((out / "armies.md").read_text(), f"written to {out}: armies.csv, armies.md and armies.png", sep="\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (Refused, OSError) as error:
        print(f"armies.py: error: {error}", file=sys.stderr)
        sys.exit(2)
