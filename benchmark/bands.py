"""The bands of the README's table of metrics: quantiles of what healthy trainings and a sick one logged.

    python benchmark/bands.py                               # of healthy_run/scalars.csv
    python benchmark/bands.py runs/<a> runs/<b> runs/<c>    # read these runs into it first

The runs are `trajsep_ppo.py` with `--seed 11`, with `--seed 12`, and with `--learning-rate 0.03
--total-timesteps 16384`, in this order. Bands are 5% to 95% quantiles over the first two, and over the
last one from step 8,192 on.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from plot import table

CSV = Path(__file__).resolve().parent / "healthy_run" / "scalars.csv"
RUNS = ("seed 11", "seed 12", "learning rate 0.03")
BANDS = {  # column -> its runs, and its first and last step
    "up to 4,096 steps": (RUNS[:2], 0, 4096),
    "8,192 to 20,000": (RUNS[:2], 8192, 20000),
    "last third": (RUNS[:2], 68267, 102400),
    "not learning": (RUNS[2:], 8192, np.inf),
}


def read(folders):
    """Write all scalars that the runs have logged to CSV, a row for each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open(CSV, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", "tag", "global_step", "value"))
        for name, folder in zip(RUNS, folders, strict=True):
            events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
            for tag in sorted(events.Tags()["scalars"]):
                scalars = events.Scalars(tag)
                writer.writerows((name, tag, x.step, f"{x.value:.5g}") for x in scalars)


def main(folders):
    if folders:
        read(folders)
    values = defaultdict(list)  # (run, tag) -> (step, value)
    with open(CSV, newline="") as file:
        for row in csv.DictReader(file):
            pair = int(row["global_step"]), float(row["value"])
            values[row["run"], row["tag"]].append(pair)
    rows = []
    for tag in sorted({tag for _, tag in values}):
        cells = [f"`{tag}`"]
        for runs, first, last in BANDS.values():
            all_runs = [pair for run in runs for pair in values[run, tag]]
            inside = [value for step, value in all_runs if first <= step <= last]
            band = np.quantile(inside, [0.05, 0.95]) if inside else ()
            cells.append(" to ".join(f"{bound:.3g}" for bound in band) or "-")
        rows.append(cells)
    print(table(["metric", *BANDS], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
