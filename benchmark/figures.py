"""Draw the README's pictures, and print its tables and four of docs/results.md.

    python benchmark/figures.py                            # result.png and network.png in runs/figures
    python benchmark/figures.py --out docs                 # those of the README

The results are from benchmark/study, on maps that were never looked at while flags were chosen.
Intervals are for other seeds and other maps (`plot.estimate`).
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Optional

import matplotlib
import numpy as np
import plot
from PIL import Image, ImageSequence
from plot import ROOT, plt
from study import IN_THEIR_REGIME, PUBLISHED, SHARED, claims, components, factor, lines_of, runs_by_arm

sys.path.append(str(ROOT / "examples" / "battle"))

from compare import last_shares  # noqa: E402

RESULTS = ROOT / "benchmark" / "study"
NEURIPS = ROOT / "benchmark" / "neurips"
REAL_GAME = ROOT / "benchmark" / "real_game"
BATTLES = ROOT / "benchmark" / "battle_81" / "battle.csv"

SCRIPTS = {  # arm -> script, colour, line style: where the lines meet, both are seen
    "default": ("trajsep_ppo.py", "#0072B2", "-"),
    "global": ("global_ppo.py", "#D55E00", "--"),
}
RELATIVES = ("global-reward", "global-critic-reward", "global")  # as in IPPO, as in MAPPO, one trajectory
PAPER = ("the paper, a trajectory for each", "the paper, one for the team")


def results(data, last):
    """The rows of the README's table: final means and steps, with their intervals."""
    rows = []
    steps = plot.common(*(data[arm, "sampled"] for arm in SCRIPTS))
    for arm, (script, *_) in SCRIPTS.items():
        runs = data[arm, "sampled"]
        cells = [plot.final(runs, last, metric) for metric in ("episode_length", "ice_transferred")]
        cells.append(plot.final(data[arm, "greedy"], last, "ice_transferred"))
        cells.append(plot.final(runs, last, "ice_per_factory"))
        rows.append([f"`{script}`", *cells, plot.reached(runs, "full_length", 0.95, steps)])
    ice, _, length, *_, full = PUBLISHED["separate"]
    rows.append(["the authors, all separate", f"{length:,}", f"{ice:,}", "-", "-", f"{full:,}"])
    head = ["", "episode length", "ice per team", "with greedy actions", "ice per starting factory"]
    return plot.table([*head, "95% of matches full-length by step"], rows)


def of_seeds(runs, last, metric):
    """Mean over the matches at the last step, of each seed."""
    return plot.values_of(runs, metric, [last])[0].mean(1)


def greedy_over_sampled(data, arm, last):
    """Final ice per starting factory with greedy actions over that with sampled ones, of each seed."""
    greedy, sampled = (of_seeds(data[arm, policy], last, "ice_per_factory") for policy in ("greedy", "sampled"))
    return greedy / sampled


def spread(seeds, text="{:,.0f}"):
    """Mean of the seeds (lowest to highest), as text."""
    return "{} ({} to {})".format(*map(text.format, (seeds.mean(), seeds.min(), seeds.max())))


def comparison(data, last):
    """The first table of docs/results.md: the two scripts (lowest to highest seed), and their ratio."""
    both = [data[arm, "sampled"] for arm in SCRIPTS]
    steps, rows = plot.common(*both), []
    for what, metric, level in (
        ("steps to a mean length of 500", "episode_length", 500),
        ("steps to 95% full-length matches", "full_length", 0.95),
        ("steps to 10,000 ice per starting factory", "ice_per_factory", 10000),
    ):
        method, baseline = (np.median(plot.steps_to(runs, metric, level, steps)) for runs in both)
        ratio = f"{baseline / method:#.2g}" if np.isfinite(method) else "-"
        rows.append([what, *(plot.reached(runs, metric, level, steps) for runs in both), ratio])
    for what, policy, metric, text in (
        ("final ice per starting factory", "sampled", "ice_per_factory", "{:,.0f}"),
        ("the same with greedy actions", "greedy", "ice_per_factory", "{:,.0f}"),
        ("teams that lose a factory", "sampled", "loses_factory", "{:.1%}"),
    ):
        both = [of_seeds(data[arm, policy], last, metric) for arm in SCRIPTS]
        method, baseline = (seeds.mean() for seeds in both)
        ratio = f"{baseline / method:#.2g}" if method else "-"
        rows.append([what, *(spread(seeds, text) for seeds in both), ratio])
    both = [greedy_over_sampled(data, arm, last) for arm in SCRIPTS]
    rows.append(
        [
            "ice per starting factory, greedy over sampled, of each seed",
            *(f"{x.min():.1%} to {x.max():.1%}" for x in both),
            "-",
        ]
    )
    scripts = [f"`{script}`" for script, *_ in SCRIPTS.values()]
    return plot.table(["", *scripts, "baseline over method"], rows)


def larger_teams(data, last):
    """The table of the NeurIPS stage in docs/results.md: final means of the arms, with their intervals."""
    rows = []
    for arm in ("default", *RELATIVES):
        if (arm, "sampled") in data:
            both = [data[arm, policy] for policy in ("sampled", "greedy")]
            ice = [plot.final(runs, last, "ice_transferred") for runs in both]
            ratio = factor(data["default", "sampled"], both[0], last)
            rest = [plot.final(both[0], last, "ice_per_factory"), plot.final(both[0], last, "factories_alive_share", 2)]
            rows.append([SHARED[arm], str(len(both[0])), ice[0], ratio, ice[1], *rest])
    head = ["what the team shares", "seeds", "ice per team", "the method over it", "with greedy actions"]
    return plot.table([*head, "ice per starting factory", "share of its factories that survive"], rows)


def waiting(data, last):
    """The table of docs/results.md of the rule against waiting: both scripts with it and without."""
    rows = []
    for script, *arms in (("trajsep_ppo.py", "default", "may-wait"), ("global_ppo.py", "global", "global-may-wait")):
        for arm, name in zip(arms, (f"`{script}`", "the same, factories may wait")):
            both = [of_seeds(data[arm, policy], last, "ice_per_factory") for policy in ("sampled", "greedy")]
            lowest = f"{greedy_over_sampled(data, arm, last).min():.0%}"
            full = f"{of_seeds(data[arm, 'greedy'], last, 'full_length').mean():.0%}"
            rows.append([name, str(len(both[0])), *map(spread, both), lowest, full])
    head = ["", "seeds", "sampled actions", "greedy actions", "lowest ratio of a seed, greedy to sampled"]
    return plot.table([*head, "full-length matches, greedy"], rows)


def games_of(rows):
    """Arm -> seed -> games of match.py, whose bots are called <arm>__<seed>: pairs of own and opponent's row."""
    games = defaultdict(lambda: defaultdict(list))
    for pair in zip(rows[::2], rows[1::2]):
        for own, other in (pair, pair[::-1]):
            arm, named, seed = own["bot"].partition("__")
            if named:
                games[arm][seed].append((own, other))
    return games


def wins(games):
    """How many of the games the own bot has won."""
    return sum(own["result"] == "win" for own, _ in games)


def real_game(data, last, strong, duels):
    """The table of the real game in docs/results.md: self-play, and games against a strong bot and the method.

    Args:
        data, last: what plot.load returns of benchmark/real_game.
        strong, duels: rows of match.py, as games_of takes them.
    """
    rows, strong, duels = [], games_of(strong), games_of(duels)
    for arm in ("default", *RELATIVES):
        runs = data[arm, "sampled"]
        cells = [plot.final(runs, last, "lichen"), plot.final(runs, last, "factories_alive_share", 2)]
        seeds = [strong[arm][seed] for seed in sorted(strong[arm])]
        games, against_method = sum(seeds, []), sum(duels[arm].values(), [])
        cells.append(f"{wins(games)} of {len(games)} ({', '.join(str(wins(seed)) for seed in seeds)})")
        cells += [f"{np.mean([float(row['lichen']) for row in side]):,.0f}" for side in zip(*games)]
        cells.append("-" if arm == "default" else f"{wins(against_method)} of {len(against_method)}")
        rows.append([SHARED[arm], *cells])
    head = ["what the team shares", "lichen in self-play", "share of its factories that survive"]
    head += ["won against the 76th (of each seed)", "own lichen there", "the 76th's", "won against the method"]
    return plot.table(head, rows)


def why(data, last, larger, strong, battles):
    """The README's first table: what the method reaches beside its relatives, means over seeds and matches.

    Args:
        data, last: what plot.load returns of the study.
        larger: the same, as a pair, of the NeurIPS stage.
        strong: rows of match.py, as real_game takes them.
        battles: rows of compare.py's battle.csv.
    """
    arms, separate = ("default", *RELATIVES), ("separate", *RELATIVES)
    rows = [["ice: the authors' numbers", *(f"{PUBLISHED[arm][0]:,}" for arm in separate)]]
    for what, (found, end), columns in (
        ("ice: their flags, up to 20 robots", (data, last), [IN_THEIR_REGIME[arm] for arm in separate]),
        ("ice: default flags, up to 6 robots", (data, last), arms),
        ("ice: larger map, up to 40 robots", larger, arms),
    ):
        means = [of_seeds(found[arm, "sampled"], end, "ice_transferred").mean() for arm in columns]
        rows.append([what, *(f"{mean:,.0f}" for mean in means)])
    games = games_of(strong)
    of_arms = [np.mean([wins(seed) / len(seed) for seed in games[arm].values()]) for arm in arms]
    rows.append(["matches won against the 76th of 646 bots", *(f"{share:.0%}" for share in of_arms)])
    won = last_shares(battles)
    of_arms = [f"{won[arm].mean():.0%}" for arm in ("separate", "ippo", "mappo", "global")]
    rows.append(["battles won, armies of 81", *of_arms])
    return plot.table(["", "this method", "as in IPPO", "as in MAPPO", "one trajectory"], rows)


def draw_result(data, path):
    """Episode length and ice against environment steps, and the authors' final values."""
    lines = {}
    for arm, (script, *look) in SCRIPTS.items():
        runs = data[arm, "sampled"]
        lines[f"{script}, {len(runs)} seeds"] = *look, *lines_of(runs, plot.common(runs))
    marks = {}
    for arm, name, (_, colour, _) in zip(("separate", "global"), PAPER, SCRIPTS.values()):
        ice, _, length, *_ = PUBLISHED[arm]
        marks[name] = colour, {"episode_length": length, "ice_transferred": ice}
    plot.draw(lines, path, columns=2, marks=marks, size=(6.6, 3.9))


def draw_network(path):
    """The tensors of the hybrid network: what runs once for a board, and what once for an entity."""
    figure, axis = plt.subplots(figsize=(9.4, 4.3), layout="constrained")
    axis.set(xlim=(0, 100), ylim=(0, 46))
    axis.axis("off")

    def box(x, y, width, height, text, colour):
        style = {"boxstyle": "round,pad=0.2,rounding_size=0.8", "fc": colour, "ec": "0.35", "lw": 1}
        axis.add_patch(matplotlib.patches.FancyBboxPatch((x, y), width, height, **style))
        centre = {"ha": "center", "va": "center", "fontsize": 9, "linespacing": 1.5}
        axis.text(x + width / 2, y + height / 2, text, **centre)

    def arrow(start, end, bend="arc3"):
        style = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 0, "shrinkB": 0, "connectionstyle": bend}
        axis.annotate("", end, start, arrowprops=style)

    def note(x, y, text):
        axis.text(x, y, text, fontsize=8.5, color="0.3", linespacing=1.4)

    shared, own = "#DCE9F5", "#FBE7D3"
    box(1, 34, 15, 7, "board\n[B, H, W, C]", "white")
    box(25, 34, 21, 7, "map  [B, 32, h, w]\ntiles, residual block", shared)
    box(54, 34, 21, 7, "whole  [B, 64]\nmean and max of the map", shared)
    box(83, 34, 16, 7, "team_value\n[B]", shared)
    box(25, 19, 21, 7, "place  [M, 32]\nthe map at its cell", own)
    box(25, 10, 21, 7, "patch  [M, 96]\n5 x 5 cells around it", own)
    box(25, 1, 21, 7, "features, action mask, kind\n[M, F + A + K]", "white")
    box(54, 10, 21, 7, "hidden  [M, 128]\ntwo layers", own)
    box(83, 15, 16, 7, "value\n[M]  to  [B, E]", own)
    box(83, 4, 16, 8.5, "logits, a head\nfor each kind\n[M, A]  to  [B, E, A]", own)
    for start, end in ((16.5, 24.5), (46.5, 53.5), (75.5, 82.5)):
        arrow((start, 37.5), (end, 37.5))
    arrow((8.5, 33.5), (24.5, 13.5), "angle,angleA=90,angleB=0,rad=0")
    arrow((35.5, 33.5), (35.5, 26.5))
    arrow((64.5, 33.5), (64.5, 17.5))
    for start, end in ((22.5, 15.5), (13.5, 13.5), (4.5, 11.5)):
        arrow((46.5, start), (53.5, end))
    for end in (18.5, 8.5):
        arrow((75.5, 13.5), (82.5, end))
    arrow((73, 17.5), (87, 33.5))
    note(36.5, 29.5, "read where the\nentities are")
    note(84.5, 25.5, "mean over the\nlive entities")
    bold = {"fontsize": 10, "weight": "bold"}
    axis.text(1, 43.5, "once for each board: B, one for every team and step", color="#2b5d8c", **bold)
    axis.text(1, 2, "once for each\nlive entity: M", color="#a8601a", **bold)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def shorten(film, path):
    """Every third picture of a GIF, in 96 colours that all of them share; the last one stays for a while."""
    pictures = [picture.convert("RGB") for picture in ImageSequence.Iterator(Image.open(film))]
    pictures = [*pictures[::3], pictures[-1]]
    some = pictures[:: max(len(pictures) // 5, 1)]
    palette = Image.fromarray(np.concatenate(some)).quantize(96, dither=Image.Dither.NONE)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    milliseconds = [120] * len(others) + [2500]
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=True)


OPPONENTS = {  # file of benchmark/matches/ -> what it is called
    "idle": "`idle`, which places its factories and then does nothing",
    "python": "official Python kit",
    "rl": "official RL kit, its trained model",
    "andrii": "[{0}](https://github.com/{0}), 76th of 646".format("andrii0yerko/lux-ai-s2-2023"),
    "jeffdshen": "[{0}](https://github.com/{0}), 40th".format("jeffdshen/lux-s2"),
    "bart": "[{0}](https://github.com/{0}), 15th".format("BartvonMeijenfeldt/LuxAISeason2Bot"),
}


def matches(folder):
    """The rows of the README's table of matches: the bot of submission/ against each opponent."""
    head = ["opponent", "games", "won, drawn, lost", "lichen", "its lichen"]
    head += ["ice", "its ice", "orders refused"]
    rows = []
    for name, opponent in OPPONENTS.items():
        both = plot.read_csv(folder / f"{name}.csv")
        ours = [row for row in both if row["bot"] == "submission"]
        theirs = [row for row in both if row["bot"] != "submission"]
        means = []
        for key in ("lichen", "ice"):
            means += [f"{np.mean([float(row[key]) for row in side]):,.0f}" for side in (ours, theirs)]
        count = [sum(row["result"] == result for row in ours) for result in ("win", "draw", "loss")]
        refused = sum(int(row["refused"]) for row in ours)
        rows.append([opponent, str(len(ours)), ", ".join(map(str, count)), *means, str(refused)])
    return plot.table(head, rows)


def main(out: Optional[Path] = None, film: Optional[Path] = None):
    """Draw everything, and print the tables.

    Args:
        out: folder of the pictures, instead of runs/figures.
        film: a video.gif of `--capture-video`, to make match.gif of.
    """
    files = ["result.png", "network.png"] + ["match.gif"] * bool(film)
    out = plot.named_or("runs/figures", out, files)
    data, last = plot.load(RESULTS / "ablation.csv")
    out.mkdir(parents=True, exist_ok=True)
    draw_result(data, out / "result.png")
    draw_network(out / "network.png")
    if film:
        shorten(film, out / "match.gif")
    larger = plot.load(NEURIPS / "ablation.csv")
    strong, duels, battles = map(plot.read_csv, (REAL_GAME / "strong.csv", REAL_GAME / "duels.csv", BATTLES))
    of_readme = why(data, last, larger, strong, battles), results(data, last)
    of_readme += claims(runs_by_arm(data), last), components(data, last), matches(ROOT / "benchmark" / "matches")
    of_results = comparison(data, last), larger_teams(*larger), waiting(data, last)
    of_results += (real_game(*plot.load(REAL_GAME / "ablation.csv"), strong, duels),)
    print(*of_readme, *of_results, sep="\n")
    print(f"written to {out}: {', '.join(files)}")


if __name__ == "__main__":
    plot.start(main)
