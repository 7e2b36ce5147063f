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
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: an arm's own programs come first

from trajsep_ppo import Refused  # noqa: E402

RESULTS = ROOT / "benchmark" / "study"
KEYS = ("arm", "seed", "global_step", "train_seconds", "policy", "match_seed", "player")
METRICS = ("episode_length", "ice_transferred", "factories_alive")
METRICS += ("ice_per_factory", "factories_alive_share", "starting_factories", "lichen")
MOST = {"episode_length": 1000, "factories_alive_share": 1}
# arm -> (label, colour of Okabe and Ito's palette, which the colour-blind can read, line style)
ARMS = {
    "default": ("separate, own share 0.8 (default)", "#0072B2", "-"),
    "separate": ("all separate, own share 1", "#009E73", "-"),
    "share-75": ("separate, own share 0.75", "#56B4E9", "--"),
    "share-50": ("separate, own share 0.5", "#E69F00", "-."),
    "global-reward": ("separate, global reward (own share 0)", "#CC79A7", "-."),
    "global-critic": ("separate, global critic", "#56B4E9", "--"),
    "global": ("global trajectory", "#D55E00", "-"),
    "global-critic-reward": ("separate, global critic and reward", "black", "--"),
    "cluster": ("separate, by cluster", "black", "-."),
    "shared-ratio": ("separate, global ratio", "#E69F00", "-."),
    "shared-entropy": ("separate, global entropy", "#0072B2", "--"),
    "shared-dones": ("separate, global dones", "tab:gray", ":"),
    "robots": ("separate factories, global robots", "#E69F00", "-"),
    "factories": ("global factories, separate robots", "#CC79A7", "--"),
    "kinds": ("global factories, global robots", "#56B4E9", ":"),
    "mod-2": ("robots in 2 groups", "#56B4E9", ":"),
    "mod-4": ("robots in 4 groups", "#0072B2", "-."),
    "quadrants": ("robots by map quadrant", "#CC79A7", "-"),
    "nearest-factory": ("robots by nearest factory", "black", "-"),
    "nearest-heavy": ("robots by nearest heavy", "#56B4E9", "-"),
    "top-1": ("top 1 robot by advantage", "black", "-."),
    "top-2": ("top 2 robots by advantage", "#0072B2", "-."),
    "top-1-abs": ("top 1 robot by absolute advantage", "#56B4E9", (0, (1, 1))),
    "top-1-return": ("top 1 robot by return", "#CC79A7", (0, (1, 1))),
    "random-1": ("1 random robot", "#D55E00", (0, (3, 1, 1, 1))),
    "top-1-raw": ("top 1 robot, advantages not normalized", "tab:gray", (0, (5, 5))),
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
    "authors-reward": ("separate, their regime, global reward", "#CC79A7", (0, (3, 1, 1, 1))),
    "authors-critic-reward": ("separate, their regime, global critic and reward", "black", (0, (3, 1, 1, 1))),
    "authors-top-1": ("top 1 robot by advantage, their regime", "#009E73", (0, (3, 1, 1, 1))),
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
    metrics["match_seed"] = np.array([int(row["match_seed"]) for row in rows[::2]])
    metrics["full_length"] = metrics["episode_length"] >= 1000
    metrics["loses_factory"] = (players["factories_alive_share"] < 1).mean(1)  # share of its two teams
    metrics["train_seconds"] = np.array([float(rows[0]["train_seconds"])])
    return metrics


def common(*arms):
    """Steps at which all seeds of all these arms (each seed -> step -> metrics) were evaluated, sorted."""
    return sorted(set.intersection(*(set(run) for runs in arms for run in runs.values())))


def values_of(runs, metric, steps):
    """Values of a metric at some steps, [T, seeds, matches]."""
    return np.array([[run[step][metric] for run in runs.values()] for step in steps], float)


# -- Statistics ----------------------------------------------------------------------------


def mean_squares(values):
    """Of values [seeds, maps]: between seeds, between maps, and of the rest, each with its degrees of freedom."""
    seeds, maps = values.shape
    of_seed, of_map = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    parts = [of_seed - values.mean(), of_map - values.mean(), values - of_seed - of_map + values.mean()]
    freedom = [seeds - 1, maps - 1, (seeds - 1) * (maps - 1)]
    sums = [np.square(np.broadcast_to(part, values.shape)).sum() for part in parts]
    return [(total / max(free, 1), free) for total, free in zip(sums, freedom)]


def deviation(added, removed):
    """Standard deviation of a mean, and its degrees of freedom by Satterthwaite.

    Its variance is a sum of estimates less others that are in two of them; each is (variance, degrees
    of freedom). It is not taken to be less than the largest that was added.
    """
    variance = max(sum(x for x, _ in added) - sum(x for x, _ in removed), *(x for x, _ in added))
    spread = sum(x**2 / max(free, 1) for x, free in added + removed)
    return np.sqrt(variance), variance**2 / spread if spread else 1


def estimate(values):
    """Mean of values [seeds, maps], and its 95% interval, for other seeds and other maps: mean, low, high.

    All seeds play the same maps, so the variance of the mean is that of a crossed layout with both
    random; one seed says nothing of others, and its interval is of maps alone.
    """
    of_seeds, of_maps, rest = [(x / values.size, free) for x, free in mean_squares(values)]
    half, freedom = deviation([of_seeds, of_maps], [rest])
    half *= stats.t.ppf(0.975, freedom)
    return values.mean(), values.mean() - half, values.mean() + half


def difference(one, other):
    """Mean of one arm less that of another, its 95% interval, and p: mean, low, high, p.

    Both [seeds, maps], on the same maps; as `estimate`, where maps count by their difference.
    """
    seeds, _, rest = zip(*([(x / arm.size, free) for x, free in mean_squares(arm)] for arm in (one, other)))
    by_map = one.mean(0) - other.mean(0)
    of_maps = (by_map.var(ddof=1) / len(by_map), len(by_map) - 1)
    error, freedom = deviation([*seeds, of_maps], [*rest])
    half = error * stats.t.ppf(0.975, freedom)
    p = 2 * stats.t.sf(abs(by_map.mean()) / error, freedom) if error else float(by_map.mean() == 0)
    return by_map.mean(), by_map.mean() - half, by_map.mean() + half, p


def holm(p_values):
    """Holm's correction: p of each comparison, as if all of them were to be right together."""
    corrected, least = np.empty(len(p_values)), 0
    for rank, index in enumerate(np.argsort(p_values)):
        least = max(least, min(p_values[index] * (len(p_values) - rank), 1))
        corrected[index] = least
    return corrected.tolist()


def lasting(steps, values, level):
    """The step from which on values are at a level, linear between evaluations; infinity if the last is below."""
    below = [index for index, value in enumerate(values) if value < level - 1e-9]  # 0.95 may be 0.9499...
    if not below:
        return float(steps[0])
    if below[-1] == len(values) - 1:
        return np.inf
    index = below[-1] + 1
    part = (level - values[index - 1]) / (values[index] - values[index - 1])
    return float(steps[index - 1] + part * (steps[index] - steps[index - 1]))


def steps_to(runs, metric, level, steps):
    """For each seed the step from which on the mean of its matches is at a level."""
    return [lasting(steps, curve, level) for curve in values_of(runs, metric, steps).mean(2).T]


# -- Tables --------------------------------------------------------------------------------


def table(head, rows):
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def step_text(value):
    return f"{round(value):,}" if np.isfinite(value) else "never"


def final(runs, last, metric, digits=0):
    """Mean at the last step, and its interval, as far as there can be such values."""
    mean, *ends = estimate(values_of(runs, metric, [last])[0])
    low, high = np.clip(ends, 0, MOST.get(metric, np.inf))
    return f"{mean:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def reached(runs, metric, level, steps):
    """Median of the seeds' steps to a level (lowest to highest); those of the first evaluation with a sign."""
    seeds = steps_to(runs, metric, level, steps)
    texts = []
    for step in (np.median(seeds), min(seeds), max(seeds)):
        texts.append(("≤ " if step <= steps[0] else "") + step_text(step))
    return "{} ({} to {})".format(*texts) if texts[1] != texts[2] else texts[0]


def final_row(runs, last, label):
    cells = [final(runs, last, metric) for metric in ("episode_length", "ice_transferred", "ice_per_factory")]
    return [label, str(len(runs)), *cells, final(runs, last, "factories_alive_share", 2)]


def speed_row(runs, last, label, steps):
    levels = [("full_length", 0.1), ("full_length", 0.95), ("episode_length", 500), ("ice_per_factory", 10000)]
    cells = [reached(runs, metric, level, steps) for metric, level in levels]
    seconds = [run[last]["train_seconds"][0] for run in runs.values()]
    return [label, str(len(runs)), *cells, f"{np.mean(seconds):,.0f} ({min(seconds):,.0f} to {max(seconds):,.0f})"]


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
    ends = [final_row(runs, last, label_of(arm)) for arm, runs in sampled.items()]
    speed = [speed_row(runs, last, label_of(arm), steps) for arm, runs in sampled.items()]
    likeliest = []
    for arm in sampled:
        runs = {seed: run for seed, run in data.get((arm, "greedy"), {}).items() if last in run}
        likeliest += [final_row(runs, last, label_of(arm))] if runs else []
    head = ["arm", "seeds", "episode length", "ice transferred", "ice per starting factory"]
    head += ["share of factories alive"]
    speed_head = ["arm", "seeds", "10% full-length by", "95% full-length by", "mean length 500 by"]
    speed_head += ["10,000 ice per starting factory by", "training seconds"]
    text = f"""# Ablation: held-out matches after {last:,} environment steps of training

## Final policy, sampled actions

Means, and 95% intervals for other seeds and other maps. Ice and factories are per team.

{table(head, ends)}

## Speed of learning

Environment steps from which on a seed's held-out matches were there, linear between its evaluations:
the median of the seeds (lowest to highest). Evaluated in every arm: {", ".join(map(step_text, steps))}.
Seconds are means (least to most), one thread each, beside other trainings and evaluations.

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


def draw(lines, path, columns=3, marks=None, size=None):
    """Length and ice against environment steps, which are on a logarithmic scale: most is learned early.

    Args:
        lines: label -> colour, line style, steps [T], and metric -> mean, low and high, each [T].
        marks: label -> colour, and metric -> a value that somebody else reports at the last step.
        size: of the picture, in inches.
    """
    size = size or (9, 3.1 + 0.2 * -(-len(lines) // columns))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    first, last = (end(end(steps) for _, _, steps, _ in lines.values()) for end in (min, max))
    for axis, (metric, title) in zip(axes, PANELS.items()):
        highest = 0
        for label, (colour, style, steps, values) in lines.items():
            mean, low, high = values[metric]
            x = np.array(steps) / 1000
            axis.plot(x, mean, ls=style, color=colour, lw=1.6, marker="o", ms=3, label=label, clip_on=False)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            highest = max(highest, *mean)
        for label, (colour, values) in (marks or {}).items():
            highest = max(highest, values[metric])
            axis.plot(
                last / 1000, values[metric], "D", ms=7, mfc="white", mew=1.8, color=colour, label=label, clip_on=False
            )
            place = {"textcoords": "offset points", "va": "center", "color": colour, "fontsize": 9}
            axis.annotate(f"{values[metric]:,}", (last / 1000, values[metric]), (8, 0), **place)
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log", base=2)
        ticks = [step for step in (2, 4, 8, 16, 32, 64) if 0.9 * first <= 1000 * step < 0.8 * last] + [last / 1000]
        axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axis.set(xlabel="thousand environment steps", ylim=(0, 1.2 * highest))
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
        steps, values = common(runs), {}
        for metric in PANELS:
            seeds = values_of(runs, metric, steps).mean(2)
            values[metric] = seeds.mean(1), seeds.min(1), seeds.max(1)
        label = label_of(arm) + (f" ({folder})" if times[arm] > 1 else "")
        lines[label] = (*style, steps, values)
    return lines


def main(results: tuple[Path, ...] = (RESULTS,), out: Optional[Path] = None):
    """Tabulate and draw; lines are means over the seeds, bands their range.

    Args:
        results: folders with an ablation.csv each.
        out: folder of ablation.md and ablation.png, instead of runs/plot.
    """
    if not results:
        raise Refused("--results needs at least one folder")
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
