"""Draw the published figure and make the published table from the matches that benchmark/ablation.py evaluated.

    python benchmark/plot.py

It reads ablation.csv and runs.csv in --results and writes ablation.png (the five arms of the published table and our
default), sweep.png (the share of the own reward) and ablation.md beside them. Any part of the data will do: arms that
are missing are left out, and so are trainings whose last checkpoint has not been evaluated yet. What the authors report
and the goals are those of the season-2 stage; --no-published leaves them out.
"""

import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
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
    "global-advantage": ("separate, global advantage", "#E69F00", "-."),
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
FIGURES = {
    "ablation.png": ("default", "separate", "global-critic", "global-reward", "global-critic-reward", "global"),
    "sweep.png": ("separate", "default", "share-75", "share-50", "global-reward"),
}
# What the authors report at 102,400 steps: final mean and, in brackets in the tables, the standard deviation over
# matches; the steps by which 10% and 95% of the matches were full-length. Factories alive are read off their curves.
PUBLISHED = {
    "global": {"ice_transferred": (3066, 2996), "episode_length": (466, 302), 0.1: "102,400", 0.95: "never"},
    "global-reward": {"ice_transferred": (9614, 8094), "episode_length": (763, 300), 0.1: "53,248", 0.95: "never"},
    "global-critic": {"ice_transferred": (30687, 9844), "episode_length": (994, 34), 0.1: "40,960", 0.95: "69,632"},
    # They call this one "global advantage". Our arm of that name, with critics of its own, has no counterpart there.
    "global-critic-reward": {
        "ice_transferred": (2643, 3353),
        "episode_length": (380, 244),
        0.1: "73,728",
        0.95: "never",
    },
    "separate": {"ice_transferred": (44472, 12065), "episode_length": (1000, 0), 0.1: "28,672", 0.95: "49,152"},
    "share-75": {"ice_transferred": (33985, 9059), "episode_length": (1000, 0), 0.1: "28,672", 0.95: "57,344"},
    "share-50": {"ice_transferred": (24244, 11238), "episode_length": (992, 47), 0.1: "45,056", 0.95: "94,208"},
}
for arm, alive in {"separate": 3.75, "share-75": 3.5, "share-50": 3.0, "global-reward": 1.9}.items():
    PUBLISHED[arm]["factories_alive"] = (alive, None)


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


def draw(data, arms, last, path, authors):
    """Three panels against environment steps, and below them against training time; diamonds for the authors'."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
    for arm in arms:
        runs, (label, colour, style) = data[arm, "sampled"], ARMS[arm]
        width, order = (2.4, 3) if arm in ("default", "global") else (1.6, 2)
        for column, metric in enumerate(PANELS):
            steps, values = curves(runs, metric)
            minutes = curves(runs, "train_seconds")[1].mean(0) / 60
            for axis, x in zip(axes[:, column], (steps / 1000, minutes)):
                seeds = f"{label}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
                axis.plot(x, values.mean(0), style, color=colour, lw=width, zorder=order, label=seeds)
                axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.13, lw=0)
            if metric in authors.get(arm, {}):
                mark = {"marker": "D", "ms": 7, "mfc": "white", "mew": 1.8, "color": colour, "ls": "none"}
                axes[0, column].plot(last / 1000, authors[arm][metric][0], **mark, clip_on=False, zorder=4)
    for column, title in enumerate(PANELS.values()):
        axes[0, column].set_title(title, fontsize=13)
        axes[0, column].set(xlabel="thousand environment steps", xlim=(0, last / 1000))
        axes[1, column].set(xlabel="minutes of training, mean over seeds", xlim=(0, None))
    for axis in axes.flat:
        axis.set_ylim(0, 1030 if axis.get_subplotspec().colspan.start == 0 else None)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,g}"))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if authors:
        handles.append(matplotlib.lines.Line2D([], [], ls="none", marker="D", ms=7, mfc="white", mew=1.8, color="0.3"))
        labels.append("final value of the authors, same arm")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10.5)
    figure.suptitle("Held-out matches, sampled actions: mean over seeds and their range", fontsize=12, color="0.3")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------


def table(head, rows, authors=True):
    """In Markdown; without the authors' columns those beside them, headed "ours", get their names."""
    if not authors:
        kept = [column for column, name in enumerate(head) if not name.endswith(", authors")]
        names = [before if name == "ours" else name for before, name in zip(["", *head], head)]
        head, *rows = ([row[column] for column in kept] for row in (names, *rows))
        head = [name.removesuffix(", authors").removesuffix(", ours") for name in head]
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


def published(authors, arm, key):
    """What the authors report, as text."""
    value = authors.get(arm, {}).get(key, "-")
    if isinstance(value, tuple):
        mean, std = (None if x is None else f"{x:,}" for x in value)
        value = f"{mean} ({std})" if std else f"about {mean}"
    return value


def goals(data, last, parameters):
    """The goals, and what the default arm reached."""
    runs = data["default", "sampled"]
    (steps, full), (_, length) = curves(runs, "full_length"), curves(runs, "episode_length")
    ice = np.mean([run[last]["ice_per_factory"].mean() for run in runs.values()])
    to_500 = crossing(steps, length.mean(0), 500)
    rows = [
        [f"{share:.0%} of matches full-length by step", f"{goal:,}", step_text(step), step <= goal]
        for share, goal in ((0.1, 8192), (0.95, 16384))
        for step in [first(steps, full.mean(0), share)]
    ]
    final = [run[last]["episode_length"] for run in runs.values()]
    each = ", ".join(f"{x.mean():,.0f} ({x.std():,.0f})" for x in final)
    rows.append(["final episode length (std over matches), every seed", "1,000 (0)", each, np.min(final) >= 1000])
    rows.append(["final ice per starting factory", "15,000", f"{ice:,.0f}", ice >= 15000])
    if ("global", "sampled") in data:
        global_steps, global_length = curves(data["global", "sampled"], "episode_length")
        slow = crossing(global_steps, global_length.mean(0), 500)
        ratio = min(slow, last) / to_500
        text = f"{'' if np.isfinite(slow) else 'more than '}{ratio:.1f}x" if np.isfinite(to_500) else "never at 500"
        rows.append(["steps to mean length 500, global over separate", "3x", text, ratio >= 3])
    if parameters:
        rows.append(["parameters", "at most 203,000", f"{parameters:,}", parameters <= 203000])
    head = ["goal", "wanted", "reached", ""]
    return table(head, [[*row[:3], "met" if row[3] else "missed"] for row in rows])


def summary(data, last, authors=PUBLISHED):
    """The README's table, the authors' and ours side by side: an arm in a row, standard deviations over seeds."""
    arms, rows = [arm for arm in ARMS if (arm, "sampled") in data], []
    steps = common(*(data[arm, "sampled"] for arm in arms))
    for arm in arms:
        runs = data[arm, "sampled"]
        means = {key: np.array([run[last][key].mean() for run in runs.values()]) for key in METRICS}
        row = [ARMS[arm][0], str(len(runs))]
        ours = {key: f"{mean.mean():,.0f}" + (len(mean) > 1) * f" ± {over_seeds(mean)}" for key, mean in means.items()}
        for key in ("episode_length", "ice_transferred"):
            row += [published(authors, arm, key).split(" (")[0], ours[key]]
        row.append(ours["ice_per_factory"])
        _, values = curves(runs, "full_length", steps)
        row.append(f"{published(authors, arm, 0.1)} / {published(authors, arm, 0.95)}")
        row.append(" / ".join(step_text(first(steps, values.mean(0), share)) for share in (0.1, 0.95)))
        rows.append(row)
    head = ["arm", "seeds", "episode length, authors", "ours", "ice per team, authors", "ours"]
    head += ["per starting factory, ours", "10% / 95% of matches full-length by step, authors", "ours"]
    return table(head, rows, authors)


def markdown(data, last, parameters, authors):
    """All tables; without what the authors report there are no goals either."""
    arms = [arm for arm in ARMS if (arm, "sampled") in data]
    steps = common(*(data[arm, "sampled"] for arm in arms))
    final, speed, greedy = [], [], []
    for arm in arms:
        runs, label = data[arm, "sampled"], ARMS[arm][0]
        row = [label, str(len(runs))]
        for metric in ("episode_length", "ice_transferred"):
            row += [published(authors, arm, metric), spread(runs, last, metric)]
        row += [spread(runs, last, "ice_per_factory"), published(authors, arm, "factories_alive")]
        row += [spread(runs, last, "factories_alive", 2), spread(runs, last, "factories_alive_share", 2)]
        final.append(row)
        row = [label, str(len(runs))]
        for share in (0.1, 0.95):
            row += [published(authors, arm, share), reached(runs, "full_length", share, first, steps)]
        seconds = [run[last]["train_seconds"][0] for run in runs.values()]
        time = f"{np.mean(seconds):,.0f} ({min(seconds):,.0f} to {max(seconds):,.0f})"
        row.append(reached(runs, "episode_length", 500, crossing))
        speed.append([*row, reached(runs, "ice_per_factory", 10000, crossing), time])
        likeliest = {seed: run for seed, run in data.get((arm, "greedy"), {}).items() if last in run}
        if likeliest:
            cells = [spread(likeliest, last, metric) for metric in ("episode_length", "ice_transferred")]
            cells += [spread(likeliest, last, "ice_per_factory"), spread(likeliest, last, "factories_alive_share", 2)]
            greedy.append([label, str(len(likeliest)), *cells])
    lines = [f"# Ablation: held-out matches after {last:,} environment steps of training\n"]
    their_spread = "The authors': mean (standard deviation over matches). " if authors else ""
    their_steps = "The authors evaluated every 4,096 steps. " if authors else ""
    if "default" in arms and authors:
        lines += ["## Goals, and what the default arm reached\n", goals(data, last, parameters) + "\n"]
    lines += [
        "## The published table and ours\n" if authors else "## All arms\n",
        "Mean over seeds ± standard deviation of the seeds' means; sampled actions.\n",
        summary(data, last, authors) + "\n",
        "## Final policy, sampled actions\n",
        "Ours: mean (standard deviation over all matches of all seeds; standard deviation over the seeds' means). "
        f"{their_spread}Ice and factories are per team, the mean of the two teams of a match.\n",
        table(
            ["arm", "seeds", "episode length, authors", "ours", "ice transferred, authors", "ours"]
            + ["ice per starting factory, ours", "factories alive, authors", "ours", "share of factories alive, ours"],
            final,
            authors,
        ),
        "\n## Speed of learning\n",
        "Environment steps: where the mean over seeds got there first (least to most of the seeds, where they differ). "
        "For full-length matches it is the first checkpoint with that share of those evaluated in every arm, "
        f"{', '.join(f'{step:,}' for step in steps)}. For the mean length and the ice it is linear between the "
        "checkpoints evaluated in that arm, which are more in the two main arms; a level that the first of them has "
        f"may have been reached earlier. {their_steps}Training seconds are the mean (least "
        "to most) over seeds, one thread each, with other trainings and evaluations beside them.\n",
        table(
            ["arm", "seeds", "10% full-length by, authors", "ours", "95% full-length by, authors", "ours"]
            + ["mean length 500, ours", "10,000 ice per starting factory, ours", "training seconds, ours"],
            speed,
            authors,
        ),
    ]
    if greedy:
        head = ["arm", "seeds", "episode length", "ice transferred", "ice per starting factory"]
        lines += ["\n## Final policy, likeliest actions\n", "Brackets as in the first table.\n"]
        lines.append(table([*head, "share of factories alive"], greedy))
    return "\n".join(lines) + "\n"


def main(results: Path = RESULTS, published: bool = True):
    """Draw and tabulate.

    Args:
        results: folder of ablation.csv, where the figures and the tables go too.
        published: if toggled, with what the authors report, and the goals.
    """
    if not (results / "ablation.csv").exists():
        sys.exit(f"plot.py: error: there is no {results / 'ablation.csv'}; benchmark/ablation.py makes it")
    data, last = load(results / "ablation.csv")
    if not data:
        sys.exit(f"plot.py: error: there are no matches in {results / 'ablation.csv'}")
    parameters, authors = None, PUBLISHED if published else {}
    if (results / "runs.csv").exists():
        with open(results / "runs.csv", newline="") as file:
            parameters = max((int(row["parameters"]) for row in csv.DictReader(file)), default=None)
    for name, arms in FIGURES.items():
        arms = [arm for arm in arms if (arm, "sampled") in data]
        if arms and (name != "sweep.png" or len(arms) > 1):
            draw(data, arms, last, results / name, authors)
    text = markdown(data, last, parameters, authors)
    (results / "ablation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
