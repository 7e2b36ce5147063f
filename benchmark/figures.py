"""Draw the README's pictures, print its tables of results and matches and the first of docs/results.md.

    python benchmark/figures.py                            # result.png and network.png in runs/figures
    python benchmark/figures.py --out docs                 # those of the README

The result is from benchmark/study: both scripts, on maps that were never looked at while flags were
chosen. Intervals are 95% bootstrap intervals over seeds, and over the matches of each.
"""

import csv
import sys
from pathlib import Path
from typing import Optional

import matplotlib
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import plot  # noqa: E402
from plot import plt  # noqa: E402

SAMPLES = 2000
SCRIPTS = {"default": ("trajsep_ppo.py", "#0072B2"), "global": ("global_ppo.py", "#D55E00")}
AUTHORS = {"length": "1,000", "ice": "44,472", "full": "49,152"}  # all separate, at 102,400 steps


def resampled(runs, metric, steps, seed=0):
    """Means [SAMPLES, T] of a metric: seeds drawn with replacement, and matches of each seed."""
    values = [[run[step][metric] for step in steps] for run in runs.values()]
    values = np.array(values, float)  # [seed, T, match]
    rng = np.random.default_rng(seed)
    seeds = rng.integers(len(values), size=(SAMPLES, len(values)))
    matches = rng.integers(values.shape[2], size=(SAMPLES, len(values), values.shape[2]))
    places = np.arange(SAMPLES)[:, None, None], seeds[..., None], matches
    drawn = np.ravel_multi_index(places, matches.shape).ravel()
    times = np.bincount(drawn, minlength=matches.size).reshape(SAMPLES, -1)  # each match is drawn
    return times @ values.swapaxes(1, 2).reshape(times.shape[1], -1) / times.shape[1]


def interval(samples):
    """The 95% interval of bootstrap samples, infinity allowed."""
    return np.quantile(samples, [0.025, 0.975], axis=0, method="nearest")


def row(runs, last, steps):
    """Final length and ice, per team and per factory, and steps to 95% full-length, with intervals."""
    cells = []
    for metric in ("episode_length", "ice_transferred", "ice_per_factory"):
        mean = np.mean([run[last][metric].mean() for run in runs.values()])
        low, high = interval(resampled(runs, metric, [last])[:, 0])
        cells.append(f"{mean:,.0f} ({low:,.0f} to {high:,.0f})")
    share = plot.curves(runs, "full_length", steps)[1].mean(0)
    found = [plot.crossing(steps, sample, 0.95) for sample in resampled(runs, "full_length", steps)]
    low, high = map(plot.step_text, interval(np.array(found)))
    return [*cells, f"{plot.step_text(plot.crossing(steps, share, 0.95))} ({low} to {high})"]


def results(data, last):
    """The rows of the README's table."""
    arms = {arm: data[arm, "sampled"] for arm in SCRIPTS}
    steps = plot.common(*arms.values())
    head = ["", "episode length", "ice per team", "ice per starting factory"]
    head.append("95% of matches full-length by step")
    rows = [[f"`{SCRIPTS[arm][0]}`", *row(runs, last, steps)] for arm, runs in arms.items()]
    rows.append(["the authors, all separate", AUTHORS["length"], AUTHORS["ice"], "-", AUTHORS["full"]])
    return plot.table(head, rows)


def comparison(data, last):
    """The first table of docs/results.md: means over seeds (lowest to highest), and their ratio."""

    def reached(runs, metric, level):
        """The step at which each seed has a level."""
        steps, seeds = plot.curves(runs, metric)
        return [plot.crossing(steps, values, level) for values in seeds]

    def final(runs, metric):
        """What each seed has in the end."""
        return plot.curves(runs, metric, [last])[1][:, 0]

    def ice(runs):
        return final(runs, "ice_transferred") / final(runs, "starting_factories")

    number, share, step_text = "{:,.0f}".format, "{:.0%}".format, plot.step_text
    measures = {
        "steps to a mean length of 500": (step_text, lambda runs: reached(runs, "episode_length", 500)),
        "steps to 95% full-length matches": (step_text, lambda runs: reached(runs, "full_length", 0.95)),
        "steps to 10,000 ice per starting factory": (step_text, lambda runs: reached(runs, "ice_per_factory", 10000)),
        "final ice per starting factory, mean of each team's": (number, lambda runs: final(runs, "ice_per_factory")),
        "the same, mean ice over mean factories": (number, ice),
        "teams that lose a factory": (share, lambda runs: final(runs, "loses_factory")),
    }
    rows = []
    for what, (text, measure) in measures.items():
        seeds = [measure(data[arm, "sampled"]) for arm in SCRIPTS]
        said = [f"{text(np.mean(x))} ({text(min(x))} to {text(max(x))})" for x in seeds]
        method, baseline = map(np.mean, seeds)
        rows.append([what, *said, f"{baseline / method:#.2g}" if 0 < method < np.inf else "-"])
    scripts = [f"`{script}`" for script, _ in SCRIPTS.values()]
    return plot.table(["", *scripts, "baseline over method"], rows)


def draw_result(data, last, path):
    """Episode length and ice against environment steps."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.7), layout="constrained")
    panels = {  # metric -> title, and the authors' final value
        "episode_length": ("episode length (steps)", 1000),
        "ice_transferred": ("ice transferred (per team)", 44472),
    }
    mark = {"marker": "D", "ms": 7, "mfc": "white", "mew": 1.8, "color": "0.3", "ls": "none"}
    for axis, (metric, (title, final)) in zip(axes, panels.items()):
        for arm, (script, colour) in SCRIPTS.items():
            steps, values = plot.curves(data[arm, "sampled"], metric)
            low, high = interval(resampled(data[arm, "sampled"], metric, steps))
            label = f"{script}, {len(values)} seeds"
            axis.plot(steps / 1000, values.mean(0), color=colour, lw=2, label=label)
            axis.fill_between(steps / 1000, low, high, color=colour, alpha=0.15, lw=0)
        label = "the authors' final value"
        axis.plot(last / 1000, final, **mark, clip_on=False, zorder=4, label=label)
        axis.set_title(title, fontsize=11)
        axis.set(xlabel="thousand environment steps", xlim=(0, last / 1000), ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,g}"))
    axes[1].legend(loc="lower right", frameon=False, fontsize=9.5)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_network(path):
    """The tensors of the hybrid network: what runs once for a board, and what once for an entity."""
    figure, axis = plt.subplots(figsize=(10, 3.3), layout="constrained")
    axis.set(xlim=(0, 100), ylim=(0, 34))
    axis.axis("off")

    def box(x, y, width, height, text, colour):
        style = {"boxstyle": "round,pad=0.2,rounding_size=0.8", "fc": colour, "ec": "0.35", "lw": 1}
        axis.add_patch(matplotlib.patches.FancyBboxPatch((x, y), width, height, **style))
        centre = {"ha": "center", "va": "center", "fontsize": 8.6, "linespacing": 1.5}
        axis.text(x + width / 2, y + height / 2, text, **centre)

    def arrow(start, end):
        style = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", end, start, arrowprops=style)

    shared, own = "#DCE9F5", "#FBE7D3"
    box(1, 20, 13, 8, "board\n[B, H, W, C]", "white")
    box(22, 20, 17, 8, "map  [B, 32, h, w]\ntiles of 8 x 8, residual block", shared)
    box(47, 20, 17, 8, "whole  [B, 64]\nmean and max of the map", shared)
    box(22, 5, 17, 8, "place  [M, 32]\n+ the map at its cell", own)
    box(1, 5, 13, 8, "patch  [M, 96]\n5 x 5 cells around it", own)
    box(47, 5, 17, 8, "hidden  [M, 128]\n+ features, mask, kind", own)
    box(75, 15, 23, 6, "team_value  [B]", shared)
    box(75, 8, 23, 5.2, "value  [M]  to  [B, E]", own)
    box(75, 0.3, 23, 6, "logits  [M, A]  to  [B, E, A]\na head for each kind", own)
    for y in (24, 9):
        arrow((14.5, y), (21.5, y))
        arrow((39.5, y), (46.5, y))
    for x in (7.5, 30.5, 55.5):
        arrow((x, 19.5), (x, 13.5))
    for start, end in ((23, 19), (11, 17), (9.5, 10.5), (7.5, 4)):
        arrow((64.5, start), (74.5, end))
    axis.text(31.5, 16.2, "gather at the M live entities", fontsize=7.8, color="0.3")
    bold = {"fontsize": 9.5, "weight": "bold"}
    axis.text(1, 31, "once for each board (monolithic)", color="#2b5d8c", **bold)
    axis.text(1, 1, "once for each live entity (distributed)", color="#a8601a", **bold)
    figure.savefig(path, dpi=120)
    plt.close(figure)


OPPONENTS = {  # file of benchmark/matches/ -> what it is called
    "idle": "`idle`, which places its factories and then does nothing",
    "python": "official Python kit",
    "rl": "official RL kit, its trained model",
    "andrii": "[{0}](https://github.com/{0}), 76th of 646".format("andrii0yerko/lux-ai-s2-2023"),
    "bart": "[{0}](https://github.com/{0}), 15th".format("BartvonMeijenfeldt/LuxAISeason2Bot"),
}


def matches(folder):
    """The rows of the README's table of matches: the bot of submission/ against each opponent."""
    head = ["opponent", "games", "won, drawn, lost", "lichen", "its lichen"]
    head += ["ice", "its ice", "orders refused"]
    rows = []
    for name, opponent in OPPONENTS.items():
        with open(folder / f"{name}.csv", newline="") as file:
            both = list(csv.DictReader(file))
        ours = [row for row in both if row["bot"] == "submission"]
        theirs = [row for row in both if row["bot"] != "submission"]
        means = []
        for key in ("lichen", "ice"):
            means += [f"{np.mean([float(row[key]) for row in side]):,.0f}" for side in (ours, theirs)]
        count = [sum(row["result"] == result for row in ours) for result in ("win", "draw", "loss")]
        refused = sum(int(row["refused"]) for row in ours)
        rows.append([opponent, str(len(ours)), ", ".join(map(str, count)), *means, str(refused)])
    return plot.table(head, rows)


def main(out: Optional[Path] = None):
    """Draw everything, and print the tables.

    Args:
        out: folder of the pictures, instead of runs/figures.
    """
    files = ["result.png", "network.png"]
    out = plot.named_or("runs/figures", out, files)
    data, last = plot.load(ROOT / "benchmark" / "study" / "ablation.csv")
    out.mkdir(parents=True, exist_ok=True)
    draw_result(data, last, out / "result.png")
    draw_network(out / "network.png")
    print(results(data, last), comparison(data, last), sep="\n")
    print(matches(ROOT / "benchmark" / "matches"))
    print(f"written to {out}: {', '.join(files)}")


if __name__ == "__main__":
    plot.start(main)
