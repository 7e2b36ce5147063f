"""Tabulate and draw what benchmark/ablation.py evaluated; what the other programs share to start, read and draw.

    python benchmark/plot.py --results runs/study
    python benchmark/plot.py --results runs/study runs/gamma --out runs/both

It reads ablation.csv in each folder of --results, and writes the tables, ablation.md, and one picture
of all arms, ablation.png. Any part of the data will do: missing arms are left out, and trainings
whose last checkpoint is not evaluated yet.
"""

import csv
import io
import itertools
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Optional

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: an arm's own programs come first

from trajsep_ppo import Refused  # noqa: E402

SAMPLES = 2000  # of a bootstrap
RESULTS = ROOT / "benchmark" / "study"
KEYS = ("arm", "seed", "global_step", "train_seconds", "policy", "match_seed", "player")
METRICS = ("episode_length", "ice_transferred", "factories_alive")
METRICS += ("ice_per_factory", "factories_alive_share", "starting_factories")
# arm -> (label, colour of Okabe and Ito's palette, which the colour-blind can read, line style)
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
    "top-1-raw": ("top 1 robot, advantages not normalized", "#009E73", (0, (5, 5))),
    "top-1-robots": ("top 1 robot, advantages normalized by kind", "#E69F00", (0, (5, 5))),
    "authors": ("separate, the authors' regime", "#0072B2", (0, (3, 1))),
    "global-authors": ("global, the authors' regime", "#D55E00", (0, (3, 1))),
    "authors-masks": ("separate, their regime and safe masks", "#56B4E9", (0, (3, 1))),
    "global-authors-masks": ("global, their regime and safe masks", "#E69F00", (0, (3, 1))),
    "authors-six": ("separate, their flags, safe masks, six robots", "#009E73", (0, (3, 1))),
    "global-authors-six": ("global, their flags, safe masks, six robots", "#CC79A7", (0, (3, 1))),
    "six-fresh": ("separate, and 32 steps, 2 epochs", "#0072B2", (0, (2, 1))),
    "global-six-fresh": ("global, and 32 steps, 2 epochs", "#D55E00", (0, (2, 1))),
    "six-annealed": ("separate, and annealing", "#56B4E9", (0, (2, 1))),
    "global-six-annealed": ("global, and annealing", "#E69F00", (0, (2, 1))),
    "six-fast": ("separate, and learning rate 0.001", "#009E73", (0, (2, 1))),
    "global-six-fast": ("global, and learning rate 0.001", "#CC79A7", (0, (2, 1))),
    "six-small-value-loss": ("separate, and a smaller value loss", "black", (0, (2, 1))),
    "global-six-small-value-loss": ("global, and a smaller value loss", "tab:gray", (0, (2, 1))),
    "authors-cut": ("separate, their regime, training matches of 256 steps", "#0072B2", (0, (4, 2))),
    "global-authors-cut": ("global, their regime, training matches of 256 steps", "#D55E00", (0, (4, 2))),
    "authors-clipped-values": ("separate, their regime, value loss clipped", "#56B4E9", (0, (4, 2))),
    "global-authors-clipped-values": ("global, their regime, value loss clipped", "#E69F00", (0, (4, 2))),
    "lichen": ("separate, lichen rewarded", "black", (0, (1, 1))),
    "no-safe-masks": ("separate, without the safe masks", "black", (0, (5, 5))),
    "may-wait": ("separate, factories may wait", "tab:pink", (0, (5, 5))),
    "global-may-wait": ("global, factories may wait", "tab:gray", (0, (5, 5))),
    "random-placement": ("separate, factories placed at random", "#CC79A7", (0, (5, 5))),
    "large-heads": ("separate, heads that begin with gain 1", "#D55E00", (0, (5, 5))),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
PANELS = {"episode_length": "episode length (steps)", "ice_transferred": "ice transferred (per team)"}


def start(main):
    """Run a program with its command line; what is refused is one sentence, and the exit code 2."""
    try:
        tyro.cli(main)
    except (Refused, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def named_or(default, out, files):
    """The folder `out`, which a person has named, or `default` if it has none of these files yet.

    Raises:
        Refused: if it has one.
    """
    for path in [Path(default, file) for file in files] if out is None else []:
        if path.exists():
            raise Refused(f"{path} is there already; `--out {default}` writes it again")
    return out or Path(default)


def check_writable(path):
    """Before much time is spent, and without touching a file that is there.

    Raises:
        Refused: if no file can be written at this path.
    """
    path = Path(path)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Refused(f"{path} cannot be written; is its folder there?")


def write(path, text):
    """Write a file so that it is whole at any time."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_csv(path, columns, rows):
    """Write a table of dicts, whole at any time."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def read_csv(path):
    """The rows of a table, a list of dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def load(path):
    """Read ablation.csv, and say which trainings are not evaluated to the end.

    Returns:
        (arm, policy) -> seed -> global step -> metric -> an array over matches, each the mean of its
        two players; and the last step.

    Raises:
        Refused: if it is not there, or has no matches.
    """
    if not Path(path).exists():
        raise Refused(f"there is no {path}; ablation.py makes it")
    rows_of, rows = {}, read_csv(path)
    if rows and (missing := set(KEYS + METRICS) - set(rows[0])):
        raise Refused(f"{path} is no table of ablation.py, it has no {', '.join(sorted(missing))}")
    for row in rows:
        key = row["arm"], row["policy"], int(row["seed"]), int(row["global_step"])
        rows_of.setdefault(key, []).append(row)
    last = max((step for *_, step in rows_of), default=0)
    data, left_out = {}, set()
    for (arm, policy, seed, step), rows in sorted(rows_of.items()):
        if (arm, "sampled", seed, last) in rows_of:
            data.setdefault((arm, policy), {}).setdefault(seed, {})[step] = metrics_of(rows)
        else:
            left_out.add(f"{arm} seed {seed}")
    if left_out:
        who = ", ".join(sorted(left_out))
        print(f"{path}: not evaluated at {last:,} steps and left out: {who}", file=sys.stderr)
    if not data:
        raise Refused(f"no training is evaluated to its end in {path}")
    return data, last


def metrics_of(rows):
    """Metric -> an array over the matches of an evaluation."""
    rows = sorted(rows, key=lambda row: (int(row["match_seed"]), row["player"]))
    players = {key: np.array([float(row[key]) for row in rows]).reshape(-1, 2) for key in METRICS}
    metrics = {key: x.mean(1) for key, x in players.items()}
    metrics["full_length"] = metrics["episode_length"] >= 1000
    metrics["loses_factory"] = (players["factories_alive_share"] < 1).mean(1)  # share of its two teams
    metrics["train_seconds"] = np.array([float(rows[0]["train_seconds"])])
    return metrics


def common(*arms):
    """Steps at which all seeds of all these arms (each seed -> step -> metrics) were evaluated, sorted."""
    return sorted(set.intersection(*(set(run) for runs in arms for run in runs.values())))


def curves(runs, metric, steps=None):
    """Steps [T], by default those at which all seeds were evaluated, and means over matches [seeds, T]."""
    steps = common(runs) if steps is None else steps
    means = [[run[step][metric].mean() for step in steps] for run in runs.values()]
    return np.array(steps), np.array(means)


def first(steps, values, level):
    """The first evaluated step at which the level is reached; infinity where it never is."""
    reached = (int(step) for step, value in zip(steps, values) if value >= level - 1e-9)
    return next(reached, np.inf)


def crossing(steps, values, level):
    """The step at which the level is reached first, linear between evaluated steps."""
    index = next((index for index, value in enumerate(values) if value >= level), None)
    if index is None:
        return np.inf
    if index == 0:
        return float(steps[0])
    part = (level - values[index - 1]) / (values[index] - values[index - 1])
    return float(steps[index - 1] + part * (steps[index] - steps[index - 1]))


def resampled(runs, metric, steps):
    """Means [SAMPLES, T] of a metric: seeds drawn with replacement, and matches of each seed."""
    values = [[run[step][metric] for step in steps] for run in runs.values()]
    values = np.array(values, float)  # [seed, T, match]
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(values), size=(SAMPLES, len(values)))
    matches = rng.integers(values.shape[2], size=(SAMPLES, len(values), values.shape[2]))
    places = np.arange(SAMPLES)[:, None, None], seeds[..., None], matches
    drawn = np.ravel_multi_index(places, matches.shape).ravel()
    times = np.bincount(drawn, minlength=matches.size).reshape(SAMPLES, -1)  # each match is drawn
    return times @ values.swapaxes(1, 2).reshape(times.shape[1], -1) / times.shape[1]


def interval(samples):
    """The 95% interval of bootstrap samples, infinity allowed."""
    return np.quantile(samples, [0.025, 0.975], axis=0, method="nearest")


# -- Tables --------------------------------------------------------------------------------


def table(head, rows):
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def step_text(value):
    return f"{round(value):,}" if np.isfinite(value) else "never"


def spread(runs, last, metric, digits=0):
    """`mean (standard deviation over all matches; over the seeds' means)` at the last step."""
    matches = [run[last][metric] for run in runs.values()]
    means = np.mean(matches, 1)
    mean, std = (f"{number:,.{digits}f}" for number in (np.mean(matches), np.std(matches)))
    over_seeds = f"{np.std(means, ddof=1):,.{digits}f}" if len(means) > 1 else "-"
    return f"{mean} ({std}; {over_seeds})"


def reached(runs, metric, level, find, steps=None):
    """`step at which the mean over seeds reaches the level (its range over seeds)`."""
    steps, values = curves(runs, metric, steps)
    each = [find(steps, value, level) for value in values]
    seeds = f" ({step_text(min(each))} to {step_text(max(each))})" if min(each) < max(each) else ""
    return step_text(find(steps, values.mean(0), level)) + seeds


def final_row(runs, last, label):
    whole = ("episode_length", "ice_transferred", "ice_per_factory")
    cells = [spread(runs, last, metric) for metric in whole]
    cells += [spread(runs, last, f"factories_alive{end}", 2) for end in ("", "_share")]
    return [label, str(len(runs)), *cells]


def speed_row(runs, last, label, steps):
    cells = [reached(runs, "full_length", share, first, steps) for share in (0.1, 0.95)]
    cells.append(reached(runs, "episode_length", 500, crossing))
    cells.append(reached(runs, "ice_per_factory", 10000, crossing))
    seconds = [run[last]["train_seconds"][0] for run in runs.values()]
    cells.append(f"{np.mean(seconds):,.0f} ({min(seconds):,.0f} to {max(seconds):,.0f})")
    return [label, str(len(runs)), *cells]


def arms_of(data):
    """The arms with data: those of the study in its order, then a person's own."""
    arms = {arm for arm, policy in data if policy == "sampled"}
    return [arm for arm in ARMS if arm in arms] + sorted(arms - set(ARMS))


def label_of(arm):
    return ARMS[arm][0] if arm in ARMS else arm


def markdown(data, last):
    """All tables."""
    sampled = {arm: data[arm, "sampled"] for arm in arms_of(data)}
    steps = common(*sampled.values())
    final = [final_row(runs, last, label_of(arm)) for arm, runs in sampled.items()]
    speed = [speed_row(runs, last, label_of(arm), steps) for arm, runs in sampled.items()]
    likeliest = []
    for arm in sampled:
        runs = {seed: run for seed, run in data.get((arm, "greedy"), {}).items() if last in run}
        likeliest += [final_row(runs, last, label_of(arm))] if runs else []
    head = ["arm", "seeds", "episode length", "ice transferred", "ice per starting factory"]
    head += ["factories alive", "share of factories alive"]
    speed_head = ["arm", "seeds", "10% full-length by", "95% full-length by", "mean length 500"]
    speed_head += ["10,000 ice per starting factory", "training seconds"]
    text = f"""# Ablation: held-out matches after {last:,} environment steps of training

## Final policy, sampled actions

Mean (standard deviation over all matches of all seeds; standard deviation over the seeds' means).
Ice and factories are per team, the mean of the two teams of a match.

{table(head, final)}

## Speed of learning

Environment steps at which the mean over seeds got there first (least to most of the seeds, where they
differ). For full-length matches it is the first checkpoint with that share, of those evaluated in
every arm: {", ".join(f"{step:,}" for step in steps)}. The mean length and the ice are linear between the
checkpoints evaluated in that arm. Seconds are means (least to most), one thread each, beside other
trainings and evaluations.

{table(speed_head, speed)}
"""
    if likeliest:
        text += f"\n## Final policy, most likely actions\n\n{table(head, likeliest)}\n"
    return text


# -- Picture -------------------------------------------------------------------------------


def styles(arms):
    """(colour, line style) of each of these arms: its own, or one that none before it has."""
    lines = itertools.chain(["-", "--", ":", "-."], ((0, (dash, 2)) for dash in itertools.count(6)))
    new = ((colour, line) for line in lines for colour in COLOURS)
    chosen = []
    for arm in arms:
        style = ARMS[arm][1:] if arm in ARMS else None
        while style is None or style in chosen:
            style = next(new)
        chosen.append(style)
    return chosen


def draw(lines, path, columns=3, marks=None):
    """Length and ice against environment steps.

    Args:
        lines: label -> colour, line style, steps [T], and metric -> mean, low and high, each [T].
        marks: metric -> the authors' final value.
    """
    size = (9, 3.1 + 0.2 * -(-len(lines) // columns))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    last = max(max(steps) for _, _, steps, _ in lines.values())
    for axis, (metric, title) in zip(axes, PANELS.items()):
        for label, (colour, style, steps, values) in lines.items():
            mean, low, high = values[metric]
            x = np.array(steps) / 1000
            axis.plot(x, mean, ls=style, color=colour, lw=1.6, label=label)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            if len(x) == 1:  # a line has no length
                axis.plot(x, mean, "o", color=colour, clip_on=False)
        if marks:
            mark = {"ms": 7, "mfc": "white", "mew": 1.8, "color": "0.3", "clip_on": False, "zorder": 4}
            axis.plot(last / 1000, marks[metric], "D", **mark, label="the authors' final value")
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="thousand environment steps", xlim=(0, last / 1000), ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,g}"))
    legend = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9}
    figure.legend(*axes[0].get_legend_handles_labels(), **legend)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def lines_of(loaded):
    """What `draw` takes, of all arms of some folders: folder -> what `load` returns."""
    found = [(folder, arm) for folder, (data, _) in loaded.items() for arm in arms_of(data)]
    times = Counter(arm for _, arm in found)
    lines = {}
    for (folder, arm), style in zip(found, styles([arm for _, arm in found])):
        runs = loaded[folder][0][arm, "sampled"]
        values = {}
        for metric in PANELS:
            steps, seeds = curves(runs, metric)
            values[metric] = seeds.mean(0), seeds.min(0), seeds.max(0)
        label = label_of(arm) + (f" ({folder})" if times[arm] > 1 else "")
        lines[label] = (*style, steps, values)
    return lines


def main(results: tuple[Path, ...] = (RESULTS,), out: Optional[Path] = None):
    """Tabulate and draw; lines are means over the seeds, bands their range.

    Args:
        results: folders with an ablation.csv each.
        out: folder of ablation.md and ablation.png, instead of runs/plot.
    """
    out = named_or("runs/plot", out, ("ablation.md", "ablation.png"))
    loaded = {folder: load(folder / "ablation.csv") for folder in results}
    parts = []
    for folder, (data, last) in loaded.items():
        parts += [f"Of `{folder}`:\n"] * (len(loaded) > 1) + [markdown(data, last)]
    text, lines = "\n".join(parts), lines_of(loaded)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.md").write_text(text)
    draw(lines, out / "ablation.png", columns=2)
    print(text, f"written to {out / 'ablation.md'} and {out / 'ablation.png'}", sep="\n")


if __name__ == "__main__":
    start(main)
