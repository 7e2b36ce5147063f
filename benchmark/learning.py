"""Train both scripts on several seeds and make the README's table and figure.

    python benchmark/learning.py --parallel 2

Every run leaves its arguments, its held-out evaluation and its training curve in
benchmark/learning/<arm>__<seed>/. Runs that are there already are not made again, so the command goes on
where it was stopped; with everything there it makes the table and the figure only.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    "trajsep": ["trajsep_ppo.py", "--agent-reward-weight", "0.8"],
    "global": ["global_ppo.py"],
}
CURVES = {
    "l": "charts/episodic_length",
    "ice_transferred": "lux/ice_transferred",
    "ice_per_factory": "lux/ice_per_factory",
}


def run(arm, seed, out, flags, parallel):
    """Train one seed of one arm and keep its results."""
    target = out / f"{arm}__{seed}"
    if (target / "evaluation.json").exists():
        return
    command = [sys.executable, str(ROOT / ARMS[arm][0]), *ARMS[arm][1:], "--seed", str(seed), *flags]
    environment = dict(os.environ)
    if parallel > 1:  # a process and a core each
        command += ["--num-workers", "0"]
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        with open(Path(folder) / "log", "w") as log:
            code = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log).returncode
        if code:
            print((Path(folder) / "log").read_text()[-2000:])
            sys.exit(f"{arm} seed {seed} failed with exit code {code}")
        (run_dir,) = (Path(folder) / "runs").iterdir()
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(run_dir / "args.json", target)
        with open(target / "curve.csv", "w", newline="") as file:
            events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
            events.Reload()
            rows = zip(*(events.Scalars(tag) for tag in CURVES.values()), strict=True)
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", *CURVES])
            writer.writerows([row[0].step, *(round(point.value, 2) for point in row)] for row in rows)
        evaluation = json.loads((run_dir / "evaluation.json").read_text())
        evaluation["command"] = " ".join(
            [*ARMS[arm], "--seed", str(seed), *flags, *command[len(ARMS[arm]) + 3 + len(flags) :]]
        )
        evaluation["wall_seconds"] = round(time.time() - start)
        (target / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    print(f"{arm} seed {seed}: {evaluation['wall_seconds']} s", flush=True)


def curve(folder, key, window=20):
    """Steps and the mean of `key` over the last `window` matches of the training that ended by then."""
    steps, means, last = [], [], deque(maxlen=window)
    with open(folder / "curve.csv") as file:
        for row in csv.DictReader(file):
            last.append(float(row[key]))
            steps.append(int(row["step"]))
            means.append(np.mean(last))
    return np.array(steps), np.array(means)


def steps_to(folder, length=500):
    """The first environment step at which the last 20 training matches had this mean length, or None."""
    steps, means = curve(folder, "l")
    reached = np.flatnonzero(means >= length)
    return int(steps[reached[0]]) if len(reached) else None


def main(
    seeds: tuple[int, ...] = (1, 2, 3),
    arms: tuple[str, ...] = tuple(ARMS),
    out: Path = ROOT / "benchmark" / "learning",
    parallel: int = 1,
    flags: tuple[str, ...] = (),
):
    """Run, tabulate, draw.

    Args:
        seeds: seeds of the trainings.
        arms: which of the arms.
        out: where the results go.
        parallel: trainings at a time, each on one core.
        flags: more flags for every training.
    """
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(lambda job: run(job[1], job[0], out, flags, parallel), [(s, a) for s in seeds for a in arms]))

    lines = [
        "| arm | episode length | ice transferred | ice per factory | factories alive, share | steps to length 500 |",
        "|---|---|---|---|---|---|",
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for arm, colour in zip(arms, ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")):
        folders = [out / f"{arm}__{seed}" for seed in seeds]
        summaries = [json.loads((folder / "evaluation.json").read_text())["summary"] for folder in folders]
        cells = []
        for key, digits in (("l", 0), ("ice_transferred", 0), ("ice_per_factory", 0), ("factories_alive_share", 2)):
            x = [summary[key]["mean"] for summary in summaries]
            cells.append(
                f"{np.mean(x):,.{digits}f} ({np.std(x):,.{digits}f}): " + ", ".join(f"{v:,.{digits}f}" for v in x)
            )
        reached = [steps_to(folder) for folder in folders]
        cells.append(", ".join("never" if steps is None else f"{steps:,}" for steps in reached))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        for axis, key in zip(axes, ("l", "ice_per_factory"), strict=True):
            for folder in folders:
                axis.plot(*curve(folder, key), color=colour, alpha=0.8, label=arm if folder == folders[0] else None)
    for axis, title in zip(axes, ("episode length", "ice per starting factory"), strict=True):
        axis.set(title=f"{title}, last 20 training matches", xlabel="environment steps", ylim=(0, None))
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.savefig(out / "learning.png", dpi=90)
    table = "\n".join(lines)
    (out / "table.md").write_text(
        f"Seeds {', '.join(map(str, seeds))}: mean (standard deviation over seeds): each seed.\n\n{table}\n"
    )
    print(table)


if __name__ == "__main__":
    tyro.cli(main)
