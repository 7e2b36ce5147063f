"""Make docs/study.md: every arm of the authors' study on this code, theirs beside ours, and whether their orders hold.

    python benchmark/study.py

It reads ablation.csv and runs.csv in --results (benchmark/ablation.py makes them) and writes study.md and a picture for
each of its tables, study/<table>.png, to --out. Any part of the data will do: arms that have none yet are named. The
README's table of components is printed.
"""

import csv
import functools
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

from ablation import ARMS, EDITS, FIRST_MAP, LOSSES  # noqa: E402
from figures import SAMPLES, interval, resampled  # noqa: E402
from plot import ARMS as STYLES  # noqa: E402
from plot import common, crossing, curves, load, plt, step_text, table  # noqa: E402

from trajsep_ppo import Args  # noqa: E402

# What the authors report after 102,400 steps (3_results.tex of their thesis): final ice per team and its standard
# deviation over teams, final length and its standard deviation over matches, the steps by which 10% and 95% of the
# matches were full-length. None: not given.
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
# What the page says first, where all arms have data.
ANSWER = """
In words: robots with trajectories of their own learn faster than those that share one, and the fewer share it the
faster (the first three tables). The differences are smaller than the authors', and in the end many are within the
intervals. Two of their findings we do not see: to learn from the robots of the highest advantage alone does harm
here, and to share the reward costs more than to share the ratio.
"""
# Why a table came out as it did, at most two sentences each, under the name of the section; shown where all its arms
# have data. {clipfrac[arm]} is what runs.csv has of an arm, its mean over seeds.
WHY = {
    "trajectories": """
        Robots need trajectories of their own; factories, which earn an eighth of what robots earn for the same
        ice, can share one. The ratio of a group is the product of its members', so the more share it the more
        of the ratios are clipped ({clipfrac[separate]} over a whole training with `separate`,
        {clipfrac[robots]} with `robots`, {clipfrac[kinds]} with `kinds`, {clipfrac[global]} with `global`), and
        its advantage tells each member what all have done.
    """,
    "groups": """
        The fewer share an advantage, the more of it is a robot's own, and the faster it learns. In the end
        little of that is left: our teams have at most six robots, so that a group of `mod-2` has three, while
        those of the authors are larger.
    """,
    "rules": """
        Robots near the same heavy robot are the few that work beside it, those of a quadrant or of a factory
        are more. The finer the groups the faster all learn, and in the end most of these are close to each
        other.
    """,
    "samples": """
        Who learns from the highest advantages alone learns what went well and never what went badly: `top-1`, `top-2`
        and `top-4` fall behind after a good start, the highest *absolute* advantage, which is of both signs, does not.
        Robots drawn at random are a fair sample, only a smaller one, and so are slower.
    """,
    "components": """
        By pace the reward matters most and the ratio next: where all are paid the team's mean nothing says who earned
        it, and a joint ratio is clipped in {clipfrac[shared-ratio]} of the cases where a member's own is in
        {clipfrac[separate]}. One value for the whole team explains {explained_variance[global-critic]} of the
        variance of the members' returns, one for each {explained_variance[separate]}; entropy and dones may be shared.
    """,
    "share": """
        As long as half of the reward is the own, the advantage tells who earned it, and what is the team's is
        the same for all. At 0 nothing tells it.
    """,
    "lichen": """
        Our preset changes what is seen and masked too: water is saved for the end, and light robots clear
        rubble. Ice is dug as before, by the heavy ones.
    """,
    "ablation": """
        Placement decides most: a factory placed at random may be far from ice. The second layer of masks holds what we
        know of the game, so without it learning begins later and ends lower; heads that begin with gain 1 are slow
        for some seeds and end nearly as well, and the early weight on positive rewards is not needed.
    """,
    "baseline": """
        A wide clip helps the baseline to its first long matches, as its ratio is a product over the team
        ({clipfrac[global]} of them are clipped at 0.2), and makes what follows unsteady. Neither that, nor
        longer rollouts, nor a smaller value loss brings it near the method.
    """,
}
REFERENCES = ("separate", "default")  # what arms are compared with: a table of nothing else is left out
SHARED = {  # arm -> what the whole team has in common, in the README's table
    "separate": "nothing",
    "global-critic": "value",
    "shared-ratio": "probability ratio",
    "global-reward": "reward (as in IPPO)",
    "global-critic-reward": "reward and value (as in MAPPO)",
    "global": "reward, value, ratio, entropy, dones",
}


class Section(NamedTuple):
    """A table of the page."""

    name: str  # of its picture
    title: str
    arms: str
    text: str
    stands_for: dict = {}  # arm of ours -> that of the authors beside it, where it is not that of the same name
    pairs: tuple = ()  # (arm, arm) to compare instead of neighbours in the authors' order


SECTIONS = (
    Section(
        "trajectories",
        "Trajectories",
        "separate default factories kinds robots cluster global",
        "Who needs a trajectory of its own? `default` (80% of the own reward) and `cluster` (a factory with its "
        "robots, 80% too) have no counterpart.",
    ),
    Section(
        "groups",
        "Number of groups of robots",
        "robots mod-2 mod-4 separate",
        "How many trajectories do robots need? From one for all of them to one for each; every factory has its own.",
    ),
    Section(
        "rules",
        "Grouping rules",
        "separate nearest-heavy nearest-factory quadrants robots",
        "Which robots can share a trajectory? Those nearest to the same heavy robot or factory, in the same quadrant "
        "of the map, or all.",
    ),
    Section(
        "samples",
        "Fewer samples of robots",
        "separate top-4 top-2 top-1 top-1-abs top-1-return random-4 random-2 random-1",
        "From how many robots must one learn at a step, and from which? From those of highest advantage, absolute "
        "advantage or return, or from random ones.",
    ),
    Section(
        "components",
        "Components",
        "separate shared-dones shared-entropy global-critic global-reward shared-ratio global-critic-reward",
        "Which part of a trajectory must be separate? In each arm one is the team's, in the last one two. "
        "`global-reward` assigns credit as IPPO does: the team's reward for all, values and ratios of their own. "
        "`global-critic-reward` does as MAPPO: the team's reward, a central critic, ratios of their own.",
    ),
    Section(
        "share",
        "Own share of the reward",
        "separate default share-75 share-50 global-reward",
        "How much of a member's reward should be its own, and how much the team's mean? 100%, 80% (no counterpart), "
        "75%, 50% and 0%.",
    ),
    Section(
        "lichen",
        "Lichen",
        "default lichen",
        "What does it cost to reward lichen too? Ours differs from `default`, theirs from their separate arm, which "
        "stands beside `default` here. In all other arms of theirs watering is masked.",
        {"default": "separate"},
    ),
    Section(
        "ablation",
        "Ablation",
        "default no-positive-weight random-placement large-heads no-safe-masks",
        "What else is needed? Ours differ from `default`, theirs from their separate arm, which stands beside "
        "`default` here. Two rows are not the same thing: theirs without masks has none at all, ours keeps those of "
        "the game's rules; and their scaling is of the network's first weights, ours of the heads' only. "
        "`no-positive-weight` has no counterpart.",
        {"default": "separate"},
    ),
    Section(
        "baseline",
        "Flags of the baseline's own",
        "default clip-50 clip-100 global global-clip-50 global-clip-100 global-small-value-loss global-long-rollouts",
        "Is the global trajectory behind only because flags were chosen for the method? The same clip for both, and "
        "flags that may suit the baseline better. This table is ours, the authors have none.",
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
        self.runs = {arm: runs for (arm, policy), runs in data.items() if policy == "sampled"}  # arm -> seed -> step
        self.samples = functools.cache(self._samples)

    def _samples(self, arm, metric, steps):
        return resampled(self.runs[arm], metric, steps)

    def steps(self, arms):
        """Steps at which all these arms were evaluated; the last one is the end of the training."""
        return tuple(common(*(self.runs[arm] for arm in arms)))

    def mean(self, arm, metric):
        """At the end of the training."""
        return curves(self.runs[arm], metric, [self.last])[1].mean()

    def ice(self, arm, steps):
        """Final ice per team, and its interval."""
        low, high = interval(self.samples(arm, "ice_transferred", steps)[:, -1])
        return f"{self.mean(arm, 'ice_transferred'):,.0f} ({low:,.0f} to {high:,.0f})"

    def per_factory(self, arm):
        """Final ice per starting factory, a ratio of sums over all teams."""
        return self.mean(arm, "ice_transferred") / self.mean(arm, "starting_factories")

    def reached(self, arm, metric, level, steps, over=None):
        """Step at which a metric, or its ratio to the metric `over`, has a level, and the interval of that step."""
        mean, samples = curves(self.runs[arm], metric, steps)[1].mean(0), self.samples(arm, metric, steps)
        if over:
            mean = mean / curves(self.runs[arm], over, steps)[1].mean(0)
            samples = samples / self.samples(arm, over, steps)
        found = [crossing(steps, values, level - 1e-9) for values in (mean, *samples)]  # 0.95 may be 0.9499...
        said = [
            ("≤ " if step <= steps[0] else "") + step_text(step) for step in (found[0], *interval(np.array(found[1:])))
        ]
        return "{} ({} to {})".format(*said) if said[1] != said[2] else said[0]

    def difference(self, one, other, steps):
        """Mean ice over these steps, one arm less the other, and the interval of that: mean, low, high.

        Maps are drawn for both arms and all seeds together, as they are the same for all, seeds for each arm.
        """
        rng, means, samples = np.random.default_rng(0), [], []
        for arm in (one, other):
            runs = self.runs[arm].values()
            ice = np.array([[run[step]["ice_transferred"] for step in steps] for run in runs]).mean(1)  # [seed, match]
            if not samples:
                maps = rng.integers(ice.shape[1], size=(SAMPLES, ice.shape[1]))
            drawn = ice[rng.integers(len(ice), size=(SAMPLES, len(ice)))].mean(1)  # [sample, match]
            means.append(ice.mean())
            samples.append(np.take_along_axis(drawn, maps, 1).mean(1))
        return means[0] - means[1], *interval(samples[0] - samples[1])

    def order(self, section):
        """Pairs (arm, arm) that have data: neighbours in the authors' order by final ice, or the section's own."""
        if section.pairs:
            return [pair for pair in section.pairs if set(pair) <= set(self.runs)]
        ice = {
            arm: published(section, arm)[0]
            for arm in section.arms.split()
            if arm in self.runs and published(section, arm)
        }
        arms = sorted(ice, key=lambda arm: -ice[arm])
        return [(one, other) for one, other in zip(arms, arms[1:]) if ice[one] > ice[other]]


def published(section, arm):
    """The authors' row beside an arm, or None."""
    return PUBLISHED.get(section.stands_for.get(arm, arm))


def verdict(low, high):
    return "holds" if low > 0 else "does not hold" if high < 0 else "within the intervals"


def counted(verdicts):
    """How often each verdict is there, in words."""
    return ", ".join(f"{said} {verdicts.count(said)}" for said in ("holds", "does not hold", "within the intervals"))


def label(arm):
    """What an arm is and how it is run; "theirs" is what the authors call it."""
    edit = f", `{EDITS[arm][0]}` edited" if arm in EDITS else ""
    theirs = f'; theirs: "{NAMES[arm]}"' if arm in NAMES else ""
    return f"**{arm}**: {STYLES[arm][0]}{theirs}; `{ARMS[arm]}`{edit}"


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
        row = [label(arm), str(len(study.runs[arm])), theirs(ice, ice_std), study.ice(arm, steps)]
        row += [f"{study.per_factory(arm):,.0f}", theirs(length, length_std)]
        row += [f"{study.mean(arm, 'episode_length'):,.0f}"]
        row += [theirs(tenth), study.reached(arm, "full_length", 0.1, steps)]
        rows.append([*row, theirs(most), study.reached(arm, "full_length", 0.95, steps)])
    head = ["arm", "seeds", "final ice per team, theirs", "ours", "per starting factory, ours", "final length, theirs"]
    head += ["ours", "10% full-length by step, theirs", "ours", "95% full-length by step, theirs", "ours"]
    return table(head, rows)


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
    first = ["the method above the baseline"] if section.pairs else ["the authors' order", "final ice, theirs"]
    return table([*first, "final ice, ours", "pace, ours"], rows), verdicts


def draw(study, arms, steps, path):
    """Length and ice of some arms against environment steps, with their intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.1 + 0.2 * -(-len(arms) // 3)), layout="constrained")
    panels = {"episode_length": "episode length (steps)", "ice_transferred": "ice transferred (per team)"}
    for axis, (metric, title) in zip(axes, panels.items()):
        for arm in arms:
            _, colour, style = STYLES[arm]
            low, high = interval(study.samples(arm, metric, steps))
            x = np.array(steps) / 1000
            axis.plot(x, curves(study.runs[arm], metric, steps)[1].mean(0), ls=style, color=colour, lw=1.6, label=arm)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="thousand environment steps", xlim=(0, study.last / 1000), ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,g}"))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def sections(study):
    """Sections that have data, each with its arms that have and the steps at which all of these were evaluated."""
    for section in SECTIONS:
        arms = [arm for arm in section.arms.split() if arm in study.runs]
        if set(arms) - set(REFERENCES):
            yield section, arms, study.steps(arms)


def components(data, last):
    """The README's table: what happens where the team shares a part, or everything."""
    study = Study(data, last)
    arms = [arm for arm in SHARED if arm in study.runs]
    steps, rows = study.steps(arms) if arms else (), []
    for arm in arms:
        speed = study.reached(arm, "ice_transferred", 10000, steps, over="starting_factories")
        rows.append([f"`{ARMS[arm]}`", SHARED[arm], study.ice(arm, steps), speed, theirs(PUBLISHED[arm][0])])
    head = ["", "what the team shares", "final ice per team", "10,000 ice per starting factory by step"]
    return table([*head, "final ice, the authors"], rows)


def wrapped(text):
    """Paragraphs and items of lists in lines of at most 120 characters."""
    parts = re.split(r"(\n\n|\n(?=- ))", text)
    for index in range(0, len(parts), 2):
        words, indent = " ".join(parts[index].split()), "  " if parts[index].startswith("- ") else ""
        parts[index] = textwrap.fill(
            words, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return "".join(parts)


def names(arms):
    return ", ".join(f"`{arm}`" for arm in arms)


def shares(trainings, key):
    """What runs.csv has under this name, for each arm the mean over its seeds, as text."""
    values = {}
    for row in trainings:
        values.setdefault(row["arm"], []).append(float(row[key]))
    return {arm: f"{np.mean(seeds):.0%}" for arm, seeds in values.items()}


def page(data, last, trainings):
    """The text of docs/study.md; `trainings` are the rows of runs.csv."""
    study, parts, verdicts = Study(data, last), [], ([], [])
    losses = {key: shares(trainings, key) for key in LOSSES}
    left_out = {section.title: section.arms.split() for section in SECTIONS}
    for section, arms, steps in sections(study):
        missing = [arm for arm in left_out.pop(section.title) if arm not in arms]
        compared, (final, pace) = orders(study, section)
        parts += [f"## {section.title}", wrapped(section.text)]
        if final:
            parts.append(f"By final ice: {counted(final)}. By pace: {counted(pace)}.")
        parts.append(results(study, section, arms, steps))
        parts.append(wrapped(f"Evaluations that all of these have: {', '.join(f'{step:,}' for step in steps)} steps."))
        parts.append(f"![Episode length and ice against environment steps](study/{section.name}.png)")
        parts += [compared] * bool(final)
        parts.append(wrapped(f"Not run yet: {names(missing)}." if missing else WHY[section.name].format_map(losses)))
        if not section.pairs:
            verdicts[0].extend(final)
            verdicts[1].extend(pace)
    if left_out:
        rest = {title: [arm for arm in arms if arm not in study.runs] for title, arms in left_out.items()}
        rest = "\n".join(f"- {title}: {names(arms)}" for title, arms in rest.items())
        parts += ["## Tables not run yet", wrapped(rest)]
    return "\n\n".join([introduction(study, verdicts, trainings), *parts]) + "\n"


def introduction(study, verdicts, trainings):
    """What the page asks, the answer in numbers, what differs, and how to read it."""
    args, run = Args(), next(iter(next(iter(study.runs.values())).values()))
    maps = len(run[study.last]["episode_length"])
    seeds = sorted({int(row["seed"]) for row in trainings})
    hours = sum(float(row["train_seconds"]) for row in trainings) / 3600
    commits = names(sorted({row["commit"] for row in trainings}))
    final, pace = map(counted, verdicts)
    answer = f". By final ice: {final}. By pace: {pace}." * bool(verdicts[0]) or "."
    whole = set(ARMS) <= set(study.runs)
    answer += f"\n\n{ANSWER.strip()}" * whole
    so_far = "" if whole else " so far"
    text = f"""# The authors' study, on this code

**Question.** The authors' thesis compares ways to assign credit to the members of a team, from a trajectory for each to
one for all. Do their orders hold on this code, where one switch is changed at a time?

**Answer.** Compared are neighbours in the tables of the authors, {len(verdicts[0])} pairs{so_far}{answer}

**Evidence.** {len(set(study.runs) & set(ARMS))} of {len(ARMS)} arms{so_far}. `python benchmark/ablation.py` trains and
evaluates them, `python benchmark/study.py` makes this page. Every match is in
[`benchmark/study/ablation.csv`](../benchmark/study), and command, commit and time of every training in `runs.csv`
beside it: {len(trainings)} trainings with seeds {seeds[0]} to {seeds[-1]}, {hours:.1f} hours with one thread each, at
the commits {commits}.

## What differs from the authors' runs

- Network, masks and reward are our own. So the authors' numbers are a mark, and only orders are compared.
- Ours: the season-2 stage ({args.map_size}x{args.map_size}), {study.last:,} environment steps of training, {maps} maps
  from {FIRST_MAP} on that no flag was chosen on, actions sampled from the policy. Theirs: 102,400 steps, 12 maps.
- An update of ours has {args.num_envs * args.num_steps:,} steps of {args.num_envs} matches, {args.num_minibatches}
  minibatches and {args.update_epochs} epochs; theirs 4,096 steps of 16 matches, 8 minibatches and 10 epochs.
- A team of ours has at most {args.max_robots} robots at a time. So their 8 and 16 groups or samples have no
  counterpart.
- Their brackets are standard deviations over matches (or teams), ours 95% bootstrap intervals over seeds and matches.

## How to read it

- **Full-length** matches last 1,000 steps: both teams still have a factory. The step by which 10% or 95% of ours do is
  linear between the evaluations that all arms of a table have; ≤ means that they did at the first of these. Theirs is
  the first of their evaluations with that share, one every 4,096 steps.
- **Per starting factory** is the ice of all teams over the factories of all teams.
- **Final ice** and **pace** compare two arms: ice per team at the end, and its mean over all evaluations that both arms
  have. Most of these are early.
- **A pair** names first the arm that is above the other for the authors. It *holds* if the 95% interval of our
  difference is above 0, it *does not hold* if that is below 0, else it is *within the intervals*. The maps are the same
  for both arms and are drawn together, so the arms' own intervals may overlap where a pair holds.
- **Below each table** stands how we read it, with two metrics of the trainings, means over all of their updates: the
  share of ratios that were clipped, and the share of the variance of the returns that the values explained.
- Three seeds are few, so intervals are rather too narrow, and those of an arm with one seed are over matches alone. Of
  forty pairs without a difference one would hold by chance, and one would not hold."""
    return wrapped(text)


def main(results: Path = ROOT / "benchmark" / "study", out: Path = ROOT / "docs"):
    """Make the page.

    Args:
        results: folder of ablation.csv and runs.csv.
        out: folder of study.md and of study/, the pictures.
    """
    if missing := [name for name in ("ablation.csv", "runs.csv") if not (results / name).exists()]:
        sys.exit(f"study.py: error: there is no {results / missing[0]}; benchmark/ablation.py makes it")
    data, last = load(results / "ablation.csv")
    if not data:
        sys.exit(f"study.py: error: no training in {results / 'ablation.csv'} is evaluated to its end")
    with open(results / "runs.csv", newline="") as file:
        trainings = list(csv.DictReader(file))
    (out / "study").mkdir(parents=True, exist_ok=True)
    (out / "study.md").write_text(page(data, last, trainings))
    study = Study(data, last)
    for section, arms, steps in sections(study):
        draw(study, arms, steps, out / "study" / f"{section.name}.png")
    print(components(data, last))


if __name__ == "__main__":
    tyro.cli(main)
