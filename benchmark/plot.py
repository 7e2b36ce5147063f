"""Draw and tabulate the matches that benchmark/ablation.py evaluated.

    python benchmark/plot.py

It reads ablation.csv in --results and writes ablation.png (both scripts, and the components) and ablation.md beside it.
Any part of the data will do: arms that are missing are left out, and so are trainings whose last checkpoint is not
evaluated yet. benchmark/study.py sets the arms of the study beside those of the authors.
"""

import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "study"
PANELS = {
    "episode_length": "episode length (steps)",
    "ice_transferred": "ice transferred (per team)",
    "factories_alive": "factories alive (per team)",
}
METRICS = (*PANELS, "ice_per_factory", "factories_alive_share", "starting_factories")
# arm -> (label, colour of Okabe and Ito's colour-blind safe palette, line style)
ARMS = {
    "default": ("separate, own share 0.8 (default)", "#0072B2", "-"),
    "separate": ("all separate, own share 1", "#009E73", "-"),
    "share-75": ("separate, own share 0.75", "#56B4E9", "--"),
    "share-50": ("separate, own share 0.5", "#E69F00", "-."),
    "global-reward": ("separate, global reward (own share 0)", "#CC79A7", ":"),
    "global-critic": ("separate, global critic", "#56B4E9", "--"),
    "global": ("global trajectory", "#D55E00", "-"),
    "global-critic-reward": ("separate, global critic and reward", "black", "--"),
    "cluster": ("separate, by cluster", "black", "-."),
    "no-positive-weight": ("separate, no early positive weight", "black", ":"),
    "global-long-rollouts": ("global trajectory, rollouts of 64 steps", "#D55E00", "--"),
    "global-small-value-loss": ("global trajectory, weight of the value loss 0.01", "#D55E00", ":"),
    "shared-ratio": ("separate, global ratio", "#CC79A7", "--"),
    "shared-entropy": ("separate, global entropy", "#009E73", "--"),
    "shared-dones": ("separate, global dones", "#009E73", ":"),
    "robots": ("separate factories, global robots", "#E69F00", "-"),
    "factories": ("global factories, separate robots", "#E69F00", "--"),
    "kinds": ("global factories, global robots", "#E69F00", ":"),
    "clip-50": ("separate, clip 0.5", "#0072B2", "--"),
    "clip-100": ("separate, clip 1", "#0072B2", ":"),
    "global-clip-50": ("global trajectory, clip 0.5", "#D55E00", "-."),
    "global-clip-100": ("global trajectory, clip 1", "#CC79A7", "-."),
    "mod-2": ("robots in 2 groups", "#56B4E9", ":"),
    "mod-4": ("robots in 4 groups", "#56B4E9", "-."),
    "quadrants": ("robots by map quadrant", "#CC79A7", "-"),
    "nearest-factory": ("robots by nearest factory", "black", "-"),
    "nearest-heavy": ("robots by nearest heavy", "#56B4E9", "-"),
    "top-1": ("top 1 robot by advantage", "#009E73", "-."),
    "top-2": ("top 2 robots by advantage", "#0072B2", "-."),
    "top-4": ("top 4 robots by advantage", "#E69F00", (0, (1, 1))),
    "top-1-abs": ("top 1 robot by absolute advantage", "#56B4E9", (0, (1, 1))),
    "top-1-return": ("top 1 robot by return", "#CC79A7", (0, (1, 1))),
    "random-1": ("1 random robot", "#D55E00", (0, (1, 1))),
    "random-2": ("2 random robots", "#009E73", (0, (1, 1))),
    "random-4": ("4 random robots", "#0072B2", (0, (1, 1))),
    "lichen": ("separate, lichen rewarded", "black", (0, (1, 1))),
    "no-safe-masks": ("separate, without the safe masks", "black", (0, (5, 5))),
    "random-placement": ("separate, factories placed at random", "#CC79A7", (0, (5, 5))),
    "large-heads": ("separate, heads that begin with gain 1", "#D55E00", (0, (5, 5))),
}
DRAWN = ("default", "separate", "global-critic", "global-reward", "global-critic-reward", "global")


def load(path):
    """(arm, policy) -> seed -> global step -> metric -> an array over matches, each the mean of its two players."""
    rows_of = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            key = row["arm"], row["policy"], int(row["seed"]), int(row["global_step"])
            rows_of.setdefault(key, []).append(row)
    last = max((step for *_, step in rows_of), default=0)
    data = {}
    for (arm, policy, seed, step), rows in sorted(rows_of.items()):
        if (arm, "sampled", seed, last) in rows_of:
            rows.sort(key=lambda row: (int(row["match_seed"]), row["player"]))
            metrics = {key: np.array([float(row[key]) for row in rows]).reshape(-1, 2).mean(1) for key in METRICS}
            metrics["full_length"] = metrics["episode_length"] >= 1000
            kept = np.array([float(row["factories_alive_share"]) for row in rows])
            metrics["loses_factory"] = (kept < 1).reshape(-1, 2).mean(1)  # share of its two teams
            metrics["train_seconds"] = np.array([float(rows[0]["train_seconds"])])
            data.setdefault((arm, policy), {}).setdefault(seed, {})[step] = metrics
    return data, last


def common(*arms):
    """Steps at which all seeds of all these arms (each seed -> step -> metrics) were evaluated, sorted."""
    return sorted(set.intersection(*(set(run) for runs in arms for run in runs.values())))


def curves(runs, metric, steps=None):
    """Steps [T], by default those at which all seeds were evaluated, and the means over matches [seeds, T]."""
    steps = common(runs) if steps is None else steps
    return np.array(steps), np.array([[run[step][metric].mean() for step in steps] for run in runs.values()])


def first(steps, values, level):
    """The first evaluated step at which the level is reached; infinity where it never is."""
    return next((int(step) for step, value in zip(steps, values) if value >= level - 1e-9), np.inf)


def crossing(steps, values, level):
    """The step at which the level is reached first, linear between evaluated steps."""
    index = next((index for index, value in enumerate(values) if value >= level), None)
    if not index:  # never, or already at the first evaluation
        return np.inf if index is None else float(steps[0])
    part = (level - values[index - 1]) / (values[index] - values[index - 1])
    return float(steps[index - 1] + part * (steps[index] - steps[index - 1]))


# ------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------


def draw(data, arms, last, path):
    """Three panels against environment steps."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for axis, (metric, title) in zip(axes, PANELS.items()):
        for arm in arms:
            runs, (label, colour, style) = data[arm, "sampled"], ARMS[arm]
            width, order = (2.4, 3) if arm in ("default", "global") else (1.6, 2)
            steps, values = curves(runs, metric)
            seeds = f"{label}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
            axis.plot(steps / 1000, values.mean(0), ls=style, color=colour, lw=width, zorder=order, label=seeds)
            axis.fill_between(steps / 1000, values.min(0), values.max(0), color=colour, alpha=0.13, lw=0)
        axis.set_title(title, fontsize=13)
        axis.set(xlabel="thousand environment steps", xlim=(0, last / 1000))
        axis.set_ylim(0, 1030 if metric == "episode_length" else None)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,g}"))
    handles = axes[0].get_legend_handles_labels()
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10.5)
    figure.suptitle("Held-out matches, sampled actions: mean over seeds and their range", fontsize=12, color="0.3")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------


def table(head, rows):
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def step_text(value):
    return f"{round(value):,}" if np.isfinite(value) else "never"


def over_seeds(means, digits=0):
    """Standard deviation of the seeds' means (that of a sample), "-" for one seed."""
    return f"{np.std(means, ddof=1):,.{digits}f}" if len(means) > 1 else "-"


def spread(runs, last, metric, digits=0):
    """`mean (std over all matches; std over the seeds' means)` at the last step."""
    matches = [run[last][metric] for run in runs.values()]
    mean, std = (f"{number:,.{digits}f}" for number in (np.mean(matches), np.std(matches)))
    return f"{mean} ({std}; {over_seeds(np.mean(matches, 1), digits)})"


def reached(runs, metric, level, find, steps=None):
    """`step at which the mean over seeds reaches the level (the range of that step over seeds)`."""
    steps, values = curves(runs, metric, steps)
    each = [find(steps, value, level) for value in values]
    seeds = f" ({step_text(min(each))} to {step_text(max(each))})" if min(each) < max(each) else ""
    return step_text(find(steps, values.mean(0), level)) + seeds


def summary(data, last):
    """An arm in a row, standard deviations over seeds."""
    arms, rows = [arm for arm in ARMS if (arm, "sampled") in data], []
    steps = common(*(data[arm, "sampled"] for arm in arms))
    for arm in arms:
        runs = data[arm, "sampled"]
        row = [ARMS[arm][0], str(len(runs))]
        for metric in ("episode_length", "ice_transferred", "ice_per_factory"):
            means = [run[last][metric].mean() for run in runs.values()]
            row.append(f"{np.mean(means):,.0f}" + (len(means) > 1) * f" ± {over_seeds(means)}")
        _, values = curves(runs, "full_length", steps)
        row.append(" / ".join(step_text(first(steps, values.mean(0), share)) for share in (0.1, 0.95)))
        rows.append(row)
    head = ["arm", "seeds", "episode length", "ice per team", "per starting factory"]
    return table([*head, "10% / 95% of matches full-length by step"], rows)


def markdown(data, last):
    """All tables."""
    arms = [arm for arm in ARMS if (arm, "sampled") in data]
    steps = common(*(data[arm, "sampled"] for arm in arms))
    final, speed, greedy = [], [], []
    for arm in arms:
        runs, label = data[arm, "sampled"], ARMS[arm][0]
        cells = [spread(runs, last, metric) for metric in ("episode_length", "ice_transferred", "ice_per_factory")]
        cells += [spread(runs, last, metric, 2) for metric in ("factories_alive", "factories_alive_share")]
        final.append([label, str(len(runs)), *cells])
        seconds = [run[last]["train_seconds"][0] for run in runs.values()]
        cells = [reached(runs, "full_length", share, first, steps) for share in (0.1, 0.95)]
        cells += [reached(runs, "episode_length", 500, crossing), reached(runs, "ice_per_factory", 10000, crossing)]
        cells.append(f"{np.mean(seconds):,.0f} ({min(seconds):,.0f} to {max(seconds):,.0f})")
        speed.append([label, str(len(runs)), *cells])
        likeliest = {seed: run for seed, run in data.get((arm, "greedy"), {}).items() if last in run}
        if likeliest:
            cells = [spread(likeliest, last, metric) for metric in ("episode_length", "ice_transferred")]
            cells += [spread(likeliest, last, "ice_per_factory"), spread(likeliest, last, "factories_alive_share", 2)]
            greedy.append([label, str(len(likeliest)), *cells])
    head = ["arm", "seeds", "episode length", "ice transferred", "ice per starting factory"]
    lines = [
        f"# Ablation: held-out matches after {last:,} environment steps of training\n",
        "## All arms\n",
        "Mean over seeds ± standard deviation of the seeds' means; sampled actions.\n",
        summary(data, last) + "\n",
        "## Final policy, sampled actions\n",
        "Mean (standard deviation over all matches of all seeds; standard deviation over the seeds' means). "
        "Ice and factories are per team, the mean of the two teams of a match.\n",
        table([*head, "factories alive", "share of factories alive"], final),
        "\n## Speed of learning\n",
        "Environment steps: where the mean over seeds got there first (least to most of the seeds, where they differ). "
        "For full-length matches it is the first checkpoint with that share of those evaluated in every arm, "
        f"{', '.join(f'{step:,}' for step in steps)}. For the mean length and the ice it is linear between the "
        "checkpoints evaluated in that arm, which are more in the two main arms; a level that the first of them has "
        "may have been reached earlier. Training seconds are the mean (least "
        "to most) over seeds, one thread each, with other trainings and evaluations beside them.\n",
        table(
            ["arm", "seeds", "10% full-length by", "95% full-length by", "mean length 500"]
            + ["10,000 ice per starting factory", "training seconds"],
            speed,
        ),
    ]
    if greedy:
        lines += ["\n## Final policy, likeliest actions\n", "Brackets as in the second table.\n"]
        lines.append(table([*head, "share of factories alive"], greedy))
    return "\n".join(lines) + "\n"


def main(results: Path = RESULTS):
    """Draw and tabulate.

    Args:
        results: folder of ablation.csv, where the figure and the tables go too.
    """
    if not (results / "ablation.csv").exists():
        sys.exit(f"plot.py: error: there is no {results / 'ablation.csv'}; benchmark/ablation.py makes it")
    data, last = load(results / "ablation.csv")
    if not data:
        sys.exit(f"plot.py: error: there are no matches in {results / 'ablation.csv'}")
    if arms := [arm for arm in DRAWN if (arm, "sampled") in data]:
        draw(data, arms, last, results / "ablation.png")
    text = markdown(data, last)
    (results / "ablation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
