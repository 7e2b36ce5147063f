"""The bands of the README's table of metrics: quantiles of what healthy trainings and a sick one logged.

    python benchmark/bands.py                                           # of healthy_run/scalars.csv
    python benchmark/bands.py runs/<a> runs/<b> runs/<c>                # of these runs
    python benchmark/bands.py runs/<a> runs/<b> runs/<c> --out FILE     # and keep their scalars

The runs are `trajsep_ppo.py` with `--seed 11`, with `--seed 12`, and with `--learning-rate 0.03
--total-timesteps 16384`, in this order. Bands are 5% to 95% quantiles over the first two, and over the
last one from step 8,192 on.
"""

from collections import defaultdict
from pathlib import Path
from typing import Optional

import numpy as np
import tyro
from plot import ROOT, Refused, read_csv, start, table, write_csv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CSV = ROOT / "benchmark" / "healthy_run" / "scalars.csv"
COLUMNS = ("run", "tag", "global_step", "value")
RUNS = ("seed 11", "seed 12", "learning rate 0.03")
BANDS = {  # column -> its runs, and its first and last step
    "up to 4,096 steps": (RUNS[:2], 0, 4096),
    "8,192 to 20,000": (RUNS[:2], 8192, 20000),
    "last third": (RUNS[:2], 68267, 102400),
    "not learning": (RUNS[2:], 8192, np.inf),
}


def read(runs):
    """All scalars that the runs have logged: rows of run, tag, global_step, value.

    Raises:
        Refused: if these are not three folders of runs.
    """
    if len(runs) != len(RUNS):
        raise Refused(f"name three runs: {', '.join(RUNS)}, in this order; got {len(runs)}")
    for folder in runs:
        if not any(folder.glob("events.out.tfevents.*")):
            raise Refused(f"there is no run in {folder}: it has no TensorBoard events")
    rows = []
    for name, folder in zip(RUNS, runs):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in sorted(events.Tags()["scalars"]):
            values = [(name, tag, x.step, f"{x.value:.5g}") for x in events.Scalars(tag)]
            rows += [dict(zip(COLUMNS, value)) for value in values]
    return rows


def main(runs: tyro.conf.Positional[tuple[Path, ...]] = (), out: Optional[Path] = None):
    """Print the bands.

    Args:
        runs: three runs to take instead of the kept scalars.
        out: a CSV file to write the scalars of these runs to.
    """
    scalars = read(runs) if runs or out else read_csv(CSV)
    values = defaultdict(list)  # (run, tag) -> (step, value)
    for row in scalars:
        values[row["run"], row["tag"]].append((int(row["global_step"]), float(row["value"])))
    rows = []
    for tag in sorted({tag for _, tag in values}):
        cells = [f"`{tag}`"]
        for of_runs, first, last in BANDS.values():
            pairs = [pair for run in of_runs for pair in values[run, tag]]
            inside = [value for step, value in pairs if first <= step <= last]
            band = np.quantile(inside, [0.05, 0.95]) if inside else ()
            cells.append(" to ".join(f"{bound:.3g}" for bound in band) or "-")
        rows.append(cells)
    print(table(["metric", *BANDS], rows))
    if out:
        write_csv(out, COLUMNS, scalars)
        print(f"written to {out}")


if __name__ == "__main__":
    start(main)
