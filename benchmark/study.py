"""Make docs/study.md: every arm of the authors' study, theirs beside ours, and their orders.

    python benchmark/study.py               # in runs/study_page
    python benchmark/study.py --out docs    # the page itself

It reads ablation.csv and runs.csv in --results (benchmark/ablation.py makes them), fills in
study_page.md, and writes study.md and a picture for each of its tables, study/<table>.png, to
--out. Any part of the data will do: arms without data are named. The README's table of components
is printed.
"""

import functools
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import plot
from ablation import ARMS, FIRST_MAP, LOSSES, PATCH_FOLDER, PATCHES
from plot import ROOT, SAMPLES, Refused, crossing, curves, interval, resampled, step_text, table

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
    "top-4": (43246, None, 1000, 0, 28672, 49152),
    "top-1-abs": (33926, 9324, 1000, 0, 32768, 57344),
    "top-1-return": (23156, 10369, 968, 138, 40960, NEVER),
    "random-1": (2550, None, 420, None, 77824, NEVER),
    "random-2": (4284, None, 513, None, 77824, NEVER),
    "random-4": (17927, None, 951, None, 45056, NEVER),
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
    "separate": "nothing",
    "global-critic": "value",
    "shared-ratio": "probability ratio",
    "global-reward": "reward (as in IPPO)",
    "global-critic-reward": "reward and value (as in MAPPO)",
    "global": "reward, value, ratio, entropy, dones",
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
    Section("samples", "separate top-4 top-2 top-1 top-1-abs top-1-return random-4 random-2 random-1"),
    Section(
        "components",
        "separate shared-dones shared-entropy global-critic global-reward shared-ratio global-critic-reward",
    ),
    Section("share", "separate default share-75 share-50 global-reward"),
    Section("lichen", "default lichen", stands_for={"default": "separate"}),
    Section(
        "ablation",
        "default no-positive-weight random-placement large-heads no-safe-masks",
        stands_for={"default": "separate"},
    ),
    Section(
        "baseline",
        "default clip-50 clip-100 global global-clip-50 global-clip-100 global-small-value-loss global-long-rollouts",
        pairs=(
            ("default", "global"),
            ("clip-50", "global-clip-50"),
            ("clip-100", "global-clip-100"),
            ("default", "global-small-value-loss"),
            ("default", "global-long-rollouts"),
        ),
    ),
)


class Study:
    """What is said of arms: means over all matches of all seeds, and their intervals."""

    def __init__(self, data, last):
        self.last = last
        self.runs = {arm: runs for (arm, policy), runs in data.items() if policy == "sampled"}
        self.samples = functools.cache(self._samples)

    def _samples(self, arm, metric, steps):
        return resampled(self.runs[arm], metric, steps)

    def steps(self, arms):
        """Steps at which all these arms were evaluated; the last one is the end of the training."""
        return tuple(plot.common(*(self.runs[arm] for arm in arms)))

    def mean(self, arm, metric):
        """At the end of the training."""
        return curves(self.runs[arm], metric, [self.last])[1].mean()

    def final(self, arm, metric, steps):
        """A metric at the end, the last of these steps, and its interval."""
        low, high = interval(self.samples(arm, metric, steps)[:, -1])
        return f"{self.mean(arm, metric):,.0f} ({low:,.0f} to {high:,.0f})"

    def per_factory(self, arm):
        """Final ice per starting factory, a ratio of sums over all teams."""
        return self.mean(arm, "ice_transferred") / self.mean(arm, "starting_factories")

    def reached(self, arm, metric, level, steps, over=None):
        """Step at which a metric, or its ratio to the metric `over`, has a level, and its interval."""

        def values(key):
            mean = curves(self.runs[arm], key, steps)[1].mean(0)
            return np.vstack([mean, self.samples(arm, key, steps)])

        series = values(metric) / values(over) if over else values(metric)
        found = np.array([crossing(steps, x, level - 1e-9) for x in series])  # 0.95 may be 0.9499...
        said = []
        for step in (found[0], *interval(found[1:])):
            said.append(("≤ " if step <= steps[0] else "") + step_text(step))
        return "{} ({} to {})".format(*said) if said[1] != said[2] else said[0]

    def difference(self, one, other, steps):
        """Mean ice over these steps, one arm less the other, and its interval: mean, low, high.

        Maps are the same for all, so they are drawn for both arms and all seeds together; seeds are
        drawn for each arm.
        """
        rng, maps = np.random.default_rng(0), None
        means, samples = [], []
        for arm in (one, other):
            runs = self.runs[arm].values()
            ice = np.array([[run[step]["ice_transferred"] for step in steps] for run in runs])
            ice = ice.mean(1)  # [seed, match]
            if maps is None:
                maps = rng.integers(ice.shape[1], size=(SAMPLES, ice.shape[1]))
            drawn = ice[rng.integers(len(ice), size=(SAMPLES, len(ice)))].mean(1)  # [sample, match]
            means.append(ice.mean())
            samples.append(np.take_along_axis(drawn, maps, 1).mean(1))
        return means[0] - means[1], *interval(samples[0] - samples[1])

    def lines(self, arm, steps):
        """These steps, and metric -> mean, low and high [T] of an arm, as `plot.draw` takes them."""
        values = {}
        for metric in plot.PANELS:
            mean = curves(self.runs[arm], metric, steps)[1].mean(0)
            values[metric] = mean, *interval(self.samples(arm, metric, steps))
        return steps, values

    def order(self, section):
        """Pairs of arms that have data: neighbours by the authors' final ice, or the section's own."""
        if section.pairs:
            return [pair for pair in section.pairs if set(pair) <= set(self.runs)]
        rows = {arm: published(section, arm) for arm in section.arms.split() if arm in self.runs}
        ice = {arm: row[0] for arm, row in rows.items() if row}
        arms = sorted(ice, key=lambda arm: -ice[arm])
        return [(one, other) for one, other in zip(arms, arms[1:]) if ice[one] > ice[other]]


def published(section, arm):
    """The authors' row beside an arm, or None."""
    return PUBLISHED.get(section.stands_for.get(arm, arm))


def verdict(low, high):
    return "holds" if low > 0 else "does not hold" if high < 0 else "within the intervals"


def counted(verdicts):
    """How often each verdict is there, in words."""
    words = ("holds", "does not hold", "within the intervals")
    return ", ".join(f"{said} {verdicts.count(said)}" for said in words)


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


def results(study, section, arms, steps):
    """The table of a section."""
    rows = []
    for arm in arms:
        ice, ice_std, length, length_std, tenth, most = published(section, arm) or (None,) * 6
        row = [label(arm), str(len(study.runs[arm])), theirs(ice, ice_std)]
        row += [study.final(arm, "ice_transferred", steps)]
        row += [f"{study.per_factory(arm):,.0f}", theirs(length, length_std)]
        row += [f"{study.mean(arm, 'episode_length'):,.0f}"]
        row += [theirs(tenth), study.reached(arm, "full_length", 0.1, steps)]
        rows.append([*row, theirs(most), study.reached(arm, "full_length", 0.95, steps)])
    head = ["arm", "seeds", "final ice per team, theirs", "ours", "per starting factory, ours"]
    head += ["final length, theirs", "ours", "10% full-length by step, theirs", "ours"]
    return table([*head, "95% full-length by step, theirs", "ours"], rows)


def orders(study, section):
    """The table of a section's pairs, and the verdicts by final ice and by pace."""
    rows, verdicts = [], ([], [])
    for one, other in study.order(section):
        row = [f"**{one}** above **{other}**"]
        if not section.pairs:
            row.append(f"{published(section, one)[0] - published(section, other)[0]:+,}")
        for said, steps in zip(verdicts, ([study.last], study.steps((one, other)))):
            mean, low, high = study.difference(one, other, steps)
            said.append(verdict(low, high))
            row.append(f"{mean:+,.0f} ({low:+,.0f} to {high:+,.0f}): *{said[-1]}*")
        rows.append(row)
    first = ["the authors' order", "final ice, theirs"]
    if section.pairs:
        first = ["the method above the baseline"]
    return table([*first, "final ice, ours", "pace, ours"], rows), verdicts


def draw_section(study, arms, steps, path):
    """Length and ice of some arms against environment steps, with their intervals."""
    plot.draw({arm: (*plot.ARMS[arm][1:], *study.lines(arm, steps)) for arm in arms}, path)


def block(study, section):
    """What is shown of a section, and its verdicts by final ice and by pace."""
    all_arms = section.arms.split()
    arms = [arm for arm in all_arms if arm in study.runs]
    if not arms:
        return "Not run yet.", ([], [])
    steps = study.steps(arms)
    pairs, verdicts = orders(study, section)
    final, pace = map(counted, verdicts)
    parts = [f"By final ice: {final}. By pace: {pace}."] * bool(verdicts[0])
    parts.append(results(study, section, arms, steps))
    parts.append(f"Evaluations that all of these have: {', '.join(map(step_text, steps))} steps.")
    parts += changes(arms)
    parts.append(f"![Episode length and ice against environment steps](study/{section.name}.png)")
    parts += [pairs] * bool(verdicts[0])
    if missing := [arm for arm in all_arms if arm not in arms]:
        parts.append(f"Not run yet: {names(missing)}.")
    return "\n\n".join(parts), verdicts


def components(data, last):
    """The README's table: what happens where the team shares a part, or everything."""
    study = Study(data, last)
    arms = [arm for arm in SHARED if arm in study.runs]
    steps, rows = study.steps(arms) if arms else (), []
    for arm in arms:
        speed = study.reached(arm, "ice_transferred", 10000, steps, over="starting_factories")
        ice = [study.final(arm, "ice_transferred", steps), speed, theirs(PUBLISHED[arm][0])]
        rows.append([how(arm, ""), SHARED[arm], *ice])
    head = ["", "what the team shares", "final ice per team", "10,000 ice per starting factory by step"]
    return table([*head, "final ice, the authors"], rows)


def names(arms):
    return ", ".join(f"`{arm}`" for arm in arms)


def shares(trainings, key):
    """What runs.csv has under this name: for each arm the mean over its seeds, as text."""
    values = defaultdict(list)
    for row in trainings:
        values[row["arm"]].append(float(row[key]))
    texts = {arm: f"{np.mean(seeds):.0%}" for arm, seeds in values.items()}
    return defaultdict(lambda: "-", texts)


def page(data, last, trainings):
    """The text of docs/study.md; `trainings` are the rows of runs.csv."""
    study = Study(data, last)
    blocks, final, pace = {}, [], []
    for section in SECTIONS:
        blocks[section.name], verdicts = block(study, section)
        if not section.pairs:
            final += verdicts[0]
            pace += verdicts[1]
    seeds = {int(row["seed"]) for row in trainings}
    any_run = next(iter(next(iter(study.runs.values())).values()))
    facts = {
        "pairs": len(final),
        "final": counted(final),
        "pace": counted(pace),
        "arms": len(set(study.runs) & set(ARMS)),
        "all_arms": len(ARMS),
        "trainings": len(trainings),
        "first_seed": min(seeds),
        "last_seed": max(seeds),
        "hours": f"{sum(float(row['train_seconds']) for row in trainings) / 3600:.1f}",
        "commits": names(sorted({row["commit"] for row in trainings})),
        "last": f"{last:,}",
        "maps": len(any_run[last]["episode_length"]),
        "first_map": FIRST_MAP,
    }
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
    study = Study(data, last)
    if not set(study.runs) & set(ARMS):
        raise Refused(f"{results} has no arm of the study, only {names(study.runs)}; plot.py draws these")
    text = page(data, last, plot.read_csv(results / "runs.csv"))
    (out / "study").mkdir(parents=True, exist_ok=True)
    (out / "study.md").write_text(text)
    for section in SECTIONS:
        if arms := [arm for arm in section.arms.split() if arm in study.runs]:
            draw_section(study, arms, study.steps(arms), out / "study" / f"{section.name}.png")
    print(components(data, last))
    print(f"written to {out / 'study.md'} and {out / 'study'}")


if __name__ == "__main__":
    plot.start(main)
