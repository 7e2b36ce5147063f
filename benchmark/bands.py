"""The bands of the README's table of metrics: quantiles of what healthy trainings logged, and one that does not learn.

    python benchmark/bands.py                               # of healthy_run/scalars.csv
    python benchmark/bands.py runs/<a> runs/<b> runs/<c>    # read these runs into it first

The runs are those of `trajsep_ppo.py` with `--seed 11`, with `--seed 12`, and with `--learning-rate 0.03
--total-timesteps 16384`, in this order. Bands are from the 5% to the 95% quantile over the healthy ones; of the last
from step 8,192 on.
"""

import csv
import sys
from pathlib import Path

import numpy as np

CSV = Path(__file__).resolve().parent / "healthy_run" / "scalars.csv"
RUNS = ("seed 11", "seed 12", "learning rate 0.03")
STEPS = {"up to 4,096 steps": (0, 4096), "8,192 to 20,000": (8192, 20000), "last third": (68267, 102400)}


def read(folders):
    """Write all scalars that the runs have logged to CSV, a row for each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open(CSV, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", "tag", "global_step", "value"))
        for name, folder in zip(RUNS, folders, strict=True):
            events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
            for tag in sorted(events.Tags()["scalars"]):
                writer.writerows((name, tag, x.step, f"{x.value:.5g}") for x in events.Scalars(tag))


def main(folders):
    if folders:
        read(folders)
    with open(CSV, newline="") as file:
        rows = [(row["run"], row["tag"], int(row["global_step"]), float(row["value"])) for row in csv.DictReader(file)]
    windows = [(name, RUNS[:2], *steps) for name, steps in STEPS.items()] + [("not learning", RUNS[2:], 8192, np.inf)]
    print("| metric | " + " | ".join(name for name, *_ in windows) + " |\n|" + "---|" * (len(windows) + 1))
    for tag in sorted({tag for _, tag, *_ in rows}):
        cells = []
        for _, runs, first, last in windows:
            values = [value for run, name, step, value in rows if run in runs and name == tag and first <= step <= last]
            cells.append("{:.3g} to {:.3g}".format(*np.quantile(values, [0.05, 0.95])) if values else "-")
        print(f"| `{tag}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
