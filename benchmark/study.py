"""Make docs/study.md: every arm of the authors' study, theirs beside ours, and their orders.

    python benchmark/study.py               # in runs/study_page
    python benchmark/study.py --out docs    # the page itself

It reads ablation.csv and runs.csv in --results (benchmark/ablation.py makes them), fills in
study_page.md, and writes study.md and a picture for each of its tables, study/<table>.png, to
--out. Any part of the data will do: arms without data are named. The README's tables of claims and
components are printed, of this data.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import plot
from ablation import ARMS, LOSSES, PATCH_FOLDER, PATCHES
from plot import ROOT, Refused, common, difference, estimate, final, holm, plt, reached, step_text, table, values_of

PAGE = ROOT / "benchmark" / "study_page.md"
# What the authors report after 102,400 steps (3_results.tex of their thesis): final ice per team and
# its standard deviation over teams, final length and its standard deviation over matches, the steps by
# which 10% and 95% of the matches were full-length. None: not given.
NEVER = np.inf
PUBLISHED = {
    "separate": (44472, 12065, 1000, 0, 28672, 49152),
    "factories": (43528, 11327, 1000, 0, 28672, 49152),
    "robots": (3573, 3753, 485, 315, 98304, NEVER),
    "kinds": (6162, 4413, 742, 290, 81920, NEVER),
    "global": (3066, 2996, 466, 302, 102400, NEVER),
    "mod-2": (14388, 7019, 967, 99, 57344, NEVER),
    "mod-4": (29459, 8150, 1000, 0, 36864, 77824),
    "quadrants": (22385, 8733, 1000, 0, 53248, 98304),
    "nearest-factory": (27009, 8420, 1000, 0, 45056, 94208),
    "nearest-heavy": (35224, 10946, 1000, 0, 36864, 73728),
    "top-1": (38072, 13071, 1000, 0, 32768, 57344),
    "top-2": (40053, None, 1000, 0, 24576, 61440),
    "top-1-abs": (33926, 9324, 1000, 0, 32768, 57344),
    "top-1-return": (23156, 10369, 968, 138, 40960, NEVER),
    "random-1": (2550, None, 420, None, 77824, NEVER),
    "global-reward": (9614, 8094, 763, 300, 53248, NEVER),
    "global-critic": (30687, 9844, 994, 34, 40960, 69632),
    "global-critic-reward": (2643, 3353, 380, 244, 73728, NEVER),
    "shared-dones": (47201, 11018, 1000, 0, 28672, 49152),
    "shared-ratio": (3673, 4372, 506, 345, 98304, NEVER),
    "shared-entropy": (41970, 10305, 1000, 0, 28672, 53248),
    "share-75": (33985, 9059, 1000, 0, 28672, 57344),
    "share-50": (24244, 11238, 992, 47, 45056, 94208),
    "lichen": (32199, 10670, 992, 45, 40960, 102400),
    "large-heads": (145, None, 159, None, None, NEVER),
    "no-safe-masks": (0, 0, 151, 0, None, None),
    "random-placement": (316, 1055, 195, 137, None, None),
}
# What the authors call an arm where that is not what we call it.
NAMES = {
    "robots": "separate factories, global units",
    "factories": "global factories, separate units",
    "kinds": "global factories, global units",
    "global": "single global trajectory",
    "global-critic-reward": "global advantage",
    "shared-ratio": "global probabilities",
    "no-safe-masks": "no invalid-action masks",
    "large-heads": "no scaling of the first weights",
}
# The README's table: arm -> what the whole team has in common.
SHARED = {
    "default": "20% of the reward",
    "separate": "nothing",
    "global-critic": "value",
    "shared-ratio": "probability ratio",
    "global-reward": "reward (as in IPPO)",
    "global-critic-reward": "reward and value (as in MAPPO)",
    "global": "reward, value, ratio, entropy, dones",
}


# Arm of ours -> the same in the authors' regime
IN_THEIR_REGIME = {
    "separate": "authors",
    "top-1": "authors-top-1",
    "global-reward": "authors-reward",
    "global-critic-reward": "authors-critic-reward",
    "global": "global-authors",
}
# What the authors' newest abstract (ICCCI 2026) claims: what, how much, and of which two arms
CLAIMS = (
    ("throughput over the global trajectory", "14x", "separate", "global"),
    ("gain over IPPO", "+240%", "separate", "global-reward"),
    ("gain over MAPPO", "+1,282%", "separate", "global-critic-reward"),
    ("throughput without own rewards", "-78%", "global-reward", "separate"),
    ("learning from one robot a step, that with the highest advantage, recovers", "86%", "top-1", "separate"),
)
# Rungs from the authors' regime to ours: the method and the baseline on each.
LADDER = {
    "the authors' regime": ("authors", "global-authors"),
    "their regime, matches of 256 steps": ("authors-cut", "global-authors-cut"),
    "their regime, a clipped value loss": ("authors-clipped-values", "global-authors-clipped-values"),
    "their regime, with safe masks": ("authors-masks", "global-authors-masks"),
    "and six robots": ("authors-six", "global-authors-six"),
    "six, and 32 steps, 2 epochs": ("six-fresh", "global-six-fresh"),
    "six, and annealing": ("six-annealed", "global-six-annealed"),
    "six, and a learning rate of 0.001": ("six-fast", "global-six-fast"),
    "six, and a smaller value loss": ("six-small-value-loss", "global-six-small-value-loss"),
    "our flags": ("separate", "global"),
}


class Section(NamedTuple):
    """A table of the page."""

    name: str  # of its picture, and of its place in study_page.md
    arms: str
    stands_for: dict = {}  # arm of ours -> the authors' arm beside it, where their names differ
    pairs: tuple = ()  # (arm, arm) to compare instead of neighbours in the authors' order


SECTIONS = (
    Section("trajectories", "separate default factories kinds robots cluster global"),
    Section("groups", "robots mod-2 mod-4 separate"),
    Section("rules", "separate nearest-heavy nearest-factory quadrants robots"),
    Section(
        "samples",
        "separate top-2 top-1 top-1-raw top-1-robots top-1-abs top-1-return random-1",
    ),
    Section(
        "components",
        "separate shared-dones shared-entropy global-critic global-reward shared-ratio global-critic-reward",
    ),
    Section("share", "separate default share-75 share-50 global-reward"),
    Section("lichen", "default lichen", stands_for={"default": "separate"}),
    Section(
        "ablation",
        "default random-placement large-heads no-safe-masks",
        stands_for={"default": "separate"},
    ),
    Section(
        "regime",
        " ".join(IN_THEIR_REGIME.values()),
        stands_for={ours: arm for arm, ours in IN_THEIR_REGIME.items()},
    ),
    Section("ladder", " ".join(" ".join(pair) for pair in LADDER.values()), pairs=tuple(LADDER.values())),
)


WORDS = ("holds", "does not hold", "undecided")


class Verdict(NamedTuple):
    """What is said of a pair of arms: the difference of their ice, its 95% interval, and p."""

    mean: float
    low: float
    high: float
    p: float
    corrected: float  # p for the number of all pairs

    @property
    def word(self):
        return WORDS[2] if self.corrected >= 0.05 else WORDS[0 if self.mean > 0 else 1]

    def __str__(self):
        return f"{signed(self.mean, self.low, self.high)}, p {self.p:.2g}: *{self.word}*"


def signed(mean, low, high):
    """A difference and its interval, as text."""
    return f"{mean:+,.0f} ({low:+,.0f} to {high:+,.0f})"


def runs_by_arm(data):
    """Arm -> seed -> step -> metrics, of sampled actions."""
    return {arm: runs for (arm, policy), runs in data.items() if policy == "sampled"}


def pairs_of(section, runs):
    """Pairs of arms that have data: neighbours by the authors' final ice, or the section's own."""
    if section.pairs:
        return [pair for pair in section.pairs if set(pair) <= set(runs)]
    rows = {arm: published(section, arm) for arm in section.arms.split() if arm in runs}
    ice = {arm: row[0] for arm, row in rows.items() if row}
    arms = sorted(ice, key=lambda arm: -ice[arm])
    return [(one, other) for one, other in zip(arms, arms[1:]) if ice[one] > ice[other]]


def same_maps(runs, arms):
    """Raise Refused if not all evaluations of these arms played the same maps: they are compared map by map."""
    maps = {tuple(metrics["match_seed"]) for arm in arms for run in runs[arm].values() for metrics in run.values()}
    if len(maps) > 1:
        raise Refused(f"{names(arms)} were evaluated on different maps; evaluate them on the same")


def verdicts_of(runs, last):
    """Pair of arms -> its Verdict by final ice and by pace, of all pairs of the page."""
    pairs = list(dict.fromkeys(pair for section in SECTIONS for pair in pairs_of(section, runs)))
    columns = []
    for is_pace in (False, True):
        found = []
        for pair in pairs:
            same_maps(runs, pair)
            steps = common(*(runs[arm] for arm in pair)) if is_pace else [last]
            found.append(difference(*(values_of(runs[arm], "ice_transferred", steps).mean(0) for arm in pair)))
        corrected = holm([p for *_, p in found])
        columns.append([Verdict(*row, p) for row, p in zip(found, corrected)])
    return dict(zip(pairs, zip(*columns)))


def published(section, arm):
    """The authors' row beside an arm, or None."""
    return PUBLISHED.get(section.stands_for.get(arm, arm))


def counted(verdicts):
    """How often each word is there, and how often it would be without the correction."""
    said = [verdict.word for verdict in verdicts]
    alone = [verdict._replace(corrected=verdict.p).word for verdict in verdicts]
    return ", ".join(f"{word} {said.count(word)} ({alone.count(word)})" for word in WORDS)


def how(arm, root):
    """The command of an arm and its patches, linked from a page whose path to the project is `root`."""
    links = [f"[{name}.patch]({root}benchmark/arms/{name}.patch)" for name in PATCHES.get(arm, ())]
    return " + ".join([f"`{ARMS[arm]}`", *links])


def label(arm):
    """What an arm is and how it is run; "theirs" is what the authors call it."""
    theirs = f'; theirs: "{NAMES[arm]}"' if arm in NAMES else ""
    return f"**{arm}**: {plot.ARMS[arm][0]}{theirs}; {how(arm, '../')}"


def changes(arms):
    """The lines that the patches of these arms change, in a block, or nothing."""
    lines = []
    for name in dict.fromkeys(name for arm in arms for name in PATCHES.get(arm, ())):
        patch = (PATCH_FOLDER / f"{name}.patch").read_text().splitlines()
        files = [line.removeprefix("+++ b/") for line in patch if line.startswith("+++ ")]
        lines.append(f"# {name}, in {' and '.join(files)}")
        lines += [line for line in patch if re.match(r"[+-](?![+-]{2} )", line)]
    block = "\n".join(["```diff", *lines, "```"])
    return [f"What the patches change:\n\n{block}"] if lines else []


def theirs(value, deviation=None):
    """A number of the authors, or a step, as text."""
    if value is None:
        return "-"
    return step_text(value) + (f" ({deviation:,})" if deviation is not None else "")


def results(runs, last, section, arms, steps):
    """The table of a section."""
    rows = []
    for arm in arms:
        ice, ice_std, *_, most = published(section, arm) or (None,) * 6
        row = [label(arm), str(len(runs[arm])), theirs(ice, ice_std), final(runs[arm], last, "ice_transferred")]
        row += [final(runs[arm], last, "ice_per_factory")]
        rows.append([*row, theirs(most), reached(runs[arm], "full_length", 0.95, steps)])
    head = ["arm", "seeds", "final ice per team, theirs", "ours", "per starting factory, ours"]
    return table([*head, "95% full-length by step, theirs", "ours"], rows)


def factor(one, other, last):
    """How many times the final ice of another arm the first one has, as text; both seed -> step -> metrics."""
    ice, other_ice = (values_of(runs, "ice_transferred", [last]).mean() for runs in (one, other))
    return f"{ice / other_ice:.1f}"


def rungs(runs, last, trainings):
    """The table of the ladder: of each rung the final ice of method and baseline, and the ratios that were clipped."""
    clipped, rows = shares(trainings, "clipfrac"), []
    for name, pair in LADDER.items():
        if set(pair) <= set(runs):
            seeds = ", ".join(dict.fromkeys(str(len(runs[arm])) for arm in pair))
            ice = [final(runs[arm], last, "ice_transferred") for arm in pair]
            row = [f"**{name}**: {how(pair[0], '../')}", seeds, *ice, factor(*(runs[arm] for arm in pair), last)]
            rows.append([*row, *(clipped[arm] for arm in pair)])
    head = ["rung, and how the method is run", "seeds", "final ice per team: method", "baseline", "factor"]
    return table([*head, "ratios clipped: method", "baseline"], rows)


def orders(section, verdicts):
    """The table of a section's pairs."""
    rows = []
    for (one, other), both in verdicts.items():
        row = [f"**{one}** above **{other}**"]
        if not section.pairs:
            row.append(f"{published(section, one)[0] - published(section, other)[0]:+,}")
        rows.append([*row, *map(str, both)])
    first = ["the authors' ranking", "final ice, theirs"]
    if section.pairs:
        first = ["the method above the baseline"]
    return table([*first, "final ice, ours", "pace, ours"], rows)


def lines_of(runs, steps):
    """These steps, and metric -> mean, low and high [T] of an arm, as `plot.draw` takes them."""
    values = {}
    for metric in plot.PANELS:
        mean, *ends = np.transpose([estimate(x) for x in values_of(runs, metric, steps)])
        values[metric] = mean, *np.clip(ends, 0, plot.MOST.get(metric, np.inf))
    return steps, values


def draw_section(runs, arms, steps, path):
    """Length and ice of some arms against environment steps, with their intervals."""
    plot.draw({arm: (*plot.ARMS[arm][1:], *lines_of(runs[arm], steps)) for arm in arms}, path)


def draw_ladder(runs, last, trainings, path):
    """On each rung, of method and baseline: final ice, steps to 10,000 ice per factory, clipped ratios, divergence."""
    logged = defaultdict(list)
    for row in trainings:
        for key in ("clipfrac", "approx_kl"):
            logged[row["arm"], key].append(float(row.get(key) or np.nan))
    rungs = {name: pair for name, pair in LADDER.items() if set(pair) <= set(runs)}
    figure, axes = plt.subplots(1, 4, figsize=(11, 1.4 + 0.4 * len(rungs)), sharey=True, layout="constrained")
    for offset, name, colour in ((-0.18, "method", "#0072B2"), (0.18, "baseline", "#D55E00")):
        for row, pair in enumerate(rungs.values()):
            arm = pair[offset > 0]
            label = name if row == 0 else None
            look = {"fmt": "o", "color": colour, "capsize": 2}
            mean, low, high = estimate(values_of(runs[arm], "ice_transferred", [last])[0])
            ends = [[mean - max(low, 0)], [high - mean]]
            axes[0].errorbar(mean / 1000, row + offset, xerr=np.divide(ends, 1000), label=label, **look)
            steps = np.minimum(plot.steps_to(runs[arm], "ice_per_factory", 10000, common(runs[arm])), 1.08 * last)
            seeds = (steps / 1000, np.multiply(logged[arm, "clipfrac"], 100), logged[arm, "approx_kl"])
            for axis, values in zip(axes[1:], seeds):
                apart = np.linspace(-0.06, 0.06, len(values))  # so that equal ones are seen
                axis.plot(values, row + offset + apart, "o", ms=4, color=colour, alpha=0.7)
                if np.isnan(values).all():
                    axis.text(0, row + offset, " not logged", color=colour, va="center", fontsize=8)
    axes[0].set(yticks=range(len(rungs)), yticklabels=rungs, xlabel="thousand ice per team\nin the end", xlim=(0, None))
    axes[0].set_ylim(len(rungs) - 0.5, -0.5)
    axes[1].axvline(last / 1000, color="0.7", lw=0.8)
    axes[1].set(
        xlim=(0, 1.14 * last / 1000),
        xlabel="thousand steps to 10,000 ice\nper factory (right of line: never)",
    )
    axes[2].set(xlim=(0, None), xlabel="ratios clipped, %")
    axes[3].set(xlim=(0, None), xlabel="KL divergence of an update")
    for axis in axes:
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def block(runs, last, section, verdicts, trainings):
    """What is shown of a section; `verdicts` as of `verdicts_of`, those of its pairs, `trainings` as of `page`."""
    all_arms = section.arms.split()
    arms = [arm for arm in all_arms if arm in runs]
    if not arms:
        return "Not run yet."
    steps = common(*(runs[arm] for arm in arms))
    final_ice, pace = (counted(column) for column in zip(*verdicts.values())) if verdicts else ("", "")
    parts = [f"By final ice: {final_ice}. By pace: {pace}."] * bool(verdicts)
    is_ladder = section.name == "ladder"
    parts.append(rungs(runs, last, trainings) if is_ladder else results(runs, last, section, arms, steps))
    parts.append(f"Evaluations that all of these have: {', '.join(map(step_text, steps))} steps.")
    parts += changes(arms)
    shown = "Of each rung final ice, steps to 10,000 ice per factory, ratios clipped and KL divergence"
    shown = shown if is_ladder else "Episode length and ice against environment steps"
    parts.append(f"![{shown}](study/{section.name}.png)")
    parts += [orders(section, verdicts)] * bool(verdicts)
    if missing := [arm for arm in all_arms if arm not in arms]:
        parts.append(f"Not run yet: {names(missing)}.")
    return "\n\n".join(parts)


def components(data, last):
    """The README's table: what happens where the team shares a part, or everything."""
    runs = runs_by_arm(data)
    arms, rows = [arm for arm in SHARED if arm in runs], []
    steps = common(*(runs[arm] for arm in arms))
    ice = {arm: values_of(runs[arm], "ice_transferred", [last])[0] for arm in arms}
    for arm in arms:
        compared = arm != "separate" and "separate" in arms
        behind = signed(*difference(ice[arm], ice["separate"])[:3]) if compared else "-"
        cells = [final(runs[arm], last, "ice_transferred"), behind, reached(runs[arm], "ice_per_factory", 10000, steps)]
        published_ice, *_ = PUBLISHED.get(arm, (None,))
        rows.append([how(arm, ""), SHARED[arm], *cells, theirs(published_ice)])
    head = ["", "what the team shares", "final ice per team", "against sharing nothing, map by map"]
    return table([*head, "10,000 ice per starting factory by step", "final ice, the authors"], rows)


def claims(runs, last):
    """The README's table of the newest abstract's claims: ratios of final ice, in their regime and with ours."""
    rows = []
    for what, theirs_said, *pair in CLAIMS:
        row = [what, theirs_said]
        for arms in ([IN_THEIR_REGIME[arm] for arm in pair], pair):
            if not set(arms) <= set(runs):
                row.append("not run yet")
                continue
            one, other = (values_of(runs[arm], "ice_transferred", [last])[0].mean(1) for arm in arms)
            ratios = [one.mean() / other.mean(), one.min() / other.max(), one.max() / other.min()]
            row.append("{} ({} to {})".format(*(as_claimed(ratio, theirs_said) for ratio in ratios)))
        rows.append(row)
    return table(["the abstract", "theirs", "ours, in their regime", "ours, with the default flags"], rows)


def as_claimed(ratio, example):
    """A ratio in the form of the example: 14x, 86% of it, or a change of +240%."""
    if example.endswith("x"):
        return f"{ratio:.2g}x"
    return f"{ratio - 1:+,.0%}" if example[0] in "+-" else f"{ratio:.0%}"


def names(arms):
    return ", ".join(f"`{arm}`" for arm in arms)


def shares(trainings, key):
    """What runs.csv has under this name: for each arm the mean over its seeds, as text."""
    values = defaultdict(list)
    for row in trainings:
        if row.get(key):
            values[row["arm"]].append(float(row[key]))
    texts = {arm: f"{np.mean(seeds):.0%}" for arm, seeds in values.items()}
    return defaultdict(lambda: "-", texts)


def page(data, last, trainings):
    """The text of docs/study.md; `trainings` are the rows of runs.csv."""
    runs = runs_by_arm(data)
    verdicts = verdicts_of(runs, last)
    blocks, orders_of_theirs = {}, {}
    for section in SECTIONS:
        own = {pair: verdicts[pair] for pair in pairs_of(section, runs)}
        blocks[section.name] = block(runs, last, section, own, trainings)
        orders_of_theirs |= {} if section.pairs else own
    final_ice, pace = zip(*orders_of_theirs.values()) if orders_of_theirs else ((), ())
    seeds = {int(row["seed"]) for row in trainings}
    any_run = next(iter(next(iter(runs.values())).values()))
    facts = {
        "pairs": len(orders_of_theirs),
        "all_pairs": len(verdicts),
        "final": counted(final_ice),
        "pace": counted(pace),
        "arms": len(set(runs) & set(ARMS)),
        "all_arms": len(ARMS),
        "trainings": len(trainings),
        "first_seed": min(seeds),
        "last_seed": max(seeds),
        "hours": f"{sum(float(row['train_seconds']) for row in trainings) / 3600:.1f}",
        "commits": names(sorted({row["commit"] for row in trainings})),
        "last": f"{last:,}",
        "maps": len(any_run[last]["episode_length"]),
        "first_map": " or ".join(
            sorted({str(run[last]["match_seed"][0]) for arm in runs.values() for run in arm.values()})
        ),
    }
    ice = {arm: values_of(runs[arm], "ice_transferred", [last]).mean() for arm in runs}
    both = [pair for pair in LADDER.values() if set(pair) <= set(runs)]
    factors = {one: factor(runs[one], runs[other], last) for one, other in both}
    facts["factors"] = defaultdict(lambda: "-", factors)
    facts["ice"] = defaultdict(lambda: "-", {arm: f"{mean:,.0f}" for arm, mean in ice.items()})
    losses = {key: shares(trainings, key) for key in LOSSES}
    return PAGE.read_text().format_map(blocks | facts | losses)


def main(results: Path = ROOT / "benchmark" / "study", out: Optional[Path] = None):
    """Make the page.

    Args:
        results: folder of ablation.csv and runs.csv.
        out: folder of study.md and of study/, the pictures, instead of runs/study_page.
    """
    out = plot.named_or("runs/study_page", out, ("study.md", "study"))
    data, last = plot.load(results / "ablation.csv")
    if not (results / "runs.csv").exists():
        raise Refused(f"there is no {results / 'runs.csv'}; ablation.py makes it")
    runs = runs_by_arm(data)
    if not set(runs) & set(ARMS):
        raise Refused(f"{results} has no arm of the study, only {names(runs)}; plot.py draws these")
    text = page(data, last, plot.read_csv(results / "runs.csv"))
    (out / "study").mkdir(parents=True, exist_ok=True)
    (out / "study.md").write_text(text)
    for section in SECTIONS:
        if arms := [arm for arm in section.arms.split() if arm in runs]:
            path = out / "study" / f"{section.name}.png"
            if section.name == "ladder":
                draw_ladder(runs, last, plot.read_csv(results / "runs.csv"), path)
            else:
                draw_section(runs, arms, common(*(runs[arm] for arm in arms)), path)
    print(claims(runs, last), components(data, last), sep="\n")
    print(f"written to {out / 'study.md'} and {out / 'study'}")


if __name__ == "__main__":
    plot.start(main)
