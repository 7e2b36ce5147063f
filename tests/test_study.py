"""The page of the authors' study: numbers and verdicts of made-up matches; it is what the data says."""

import csv
import re
from pathlib import Path

import ablation
import numpy as np
import plot
import pytest
import study
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmark" / "study"


def made_up(folder, arms):
    """The two tables: {arm: {seed: {step: (full-length matches of 10, ices by parity)}}}.

    Even matches have 2 factories a team and odd ones 4; players have 100 ice more and less.
    """
    rows = []
    runs = ["arm,seed,steps,train_seconds,clipfrac,explained_variance,commit"]
    for arm, seeds in arms.items():
        for seed, steps in seeds.items():
            runs.append(f"{arm},{seed},8192,600,0.{seed},0.5,abc{seed}")
            for step, (full, ice) in steps.items():
                for match, player in np.ndindex(10, 2):
                    row = {"arm": arm, "seed": seed, "global_step": step, "policy": "sampled"}
                    row |= {"match_seed": match, "player": player, "train_seconds": 1}
                    row["starting_factories"] = 2 + match % 2 * 2
                    row["episode_length"] = 1000 if match < full else 500
                    row["ice_transferred"] = ice[match % 2] + 200 * player - 100
                    row["ice_per_factory"] = row["ice_transferred"] / row["starting_factories"]
                    rows.append(row)
    (folder / "runs.csv").write_text("\n".join(runs))
    with open(folder / "ablation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ablation.COLUMNS, restval=0)
        writer.writeheader()
        writer.writerows(rows)
    return plot.load(folder / "ablation.csv")


def both(steps):
    """Two equal seeds."""
    return {11: steps, 12: steps}


ARMS = {
    "separate": both({2048: (5, (1000, 1000)), 4096: (4, (1000, 1000)), 8192: (10, (4000, 16000))}),
    "factories": both({2048: (0, (4000, 4000)), 4096: (0, (1000, 1000)), 8192: (10, (2000, 8000))}),
    "kinds": both({4096: (0, (1000, 1000)), 8192: (5, (7000, 7000))}),
    "robots": {
        11: {4096: (0, (1000, 1000)), 8192: (0, (5000, 5000))},
        12: {4096: (0, (1000, 1000)), 8192: (0, (9000, 9000))},
    },
    "global": both({4096: (0, (20000, 20000)), 8192: (0, (1000, 1000))}),
    "cut off": {11: {4096: (0, (1, 1))}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The page of the made-up arms."""
    folder = tmp_path_factory.mktemp("study")
    made_up(folder, ARMS)
    study.main(folder, folder / "out")
    said = (folder / "out" / "study.md").read_text()
    pictures = {path.stem for path in (folder / "out" / "study").glob("*.png")}
    assert {section.name for section in study.SECTIONS} - pictures == {"lichen", "ablation", "regime"}
    shown = set(re.findall(r"study/(\w+).png", said))
    assert shown == pictures
    return said


def of_section(text, title):
    """Text of a section, and its rows: first cell -> the others."""
    text = text.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| **")]
    return text, {first.split(":")[0].replace("*", ""): others for first, *others in rows}


def test_numbers(text):
    """Equal seeds: intervals are those of ten maps, 2.262 (Student's t) standard errors wide."""
    _, rows = of_section(text, "Trajectories")
    # Half of the maps have 4,000 and half 16,000: a standard error of 2,000; 2,000 and 4,000 a factory.
    ours = ["10,000 (5,476 to 14,524)", "3,000 (2,246 to 3,754)", "49,152", "7,851"]
    assert rows["separate"] == ["2", "44,472 (12,065)", *ours]
    # From none to all of the matches
    ours = ["5,000 (2,738 to 7,262)", "1,500 (1,123 to 1,877)", "49,152", "7,987"]
    assert rows["factories"] == ["2", "43,528 (11,327)", *ours]
    # Two seeds, 5,000 and 9,000: a standard error of 2,000 and one degree of freedom, so t is 12.7
    assert rows["robots"][2] == "7,000 (0 to 32,412)"
    assert rows["robots"][-2:] == rows["kinds"][-2:] == ["never", "never"]


def test_verdicts(text):
    said, rows = of_section(text, "Trajectories")
    # The difference is 2,000 on half of the maps and 8,000 on the others, at 4,096 steps nothing.
    better = "+5,000 (+2,738 to +7,262), p 0.00074: *holds*"
    both = [better, "+667 (-87 to +1,421), p 0.077: *undecided*"]
    assert rows["separate above factories"] == ["+944", *both]
    # p is above 0.025: undecided only because there are six pairs
    worse = ["-2,000 (-4,262 to +262), p 0.077: *undecided*", "-1,000 (-2,131 to +131), p 0.077: *undecided*"]
    assert rows["factories above kinds"] == ["+37,366", *worse]
    assert rows["kinds above robots"][1].startswith("+0 (") and rows["kinds above robots"][1].endswith("*undecided*")
    assert "By final ice: holds 1 (1), does not hold 0 (0), undecided 3 (3)." in said
    # Four pairs of this table, and separate above robots, which is in two others
    assert "5 pairs.\nBy final ice: holds 1 (1), does not hold 0 (0), undecided 4 (4)." in text


def test_what_is_missing(text):
    said, rows = of_section(text, "Trajectories")
    assert "Not run yet: `default`, `cluster`." in said and "cut off" not in text
    assert "Evaluations that all of these have: 4,096, 8,192 steps." in said
    said, rows = of_section(text, "Number of groups of robots")
    assert set(rows) == {"robots", "separate", "separate above robots"}
    said, rows = of_section(text, "Lichen")
    assert "Not run yet." in said and not rows
    assert f"5 of {len(ablation.ARMS)} arms, 11 trainings with seeds 11 to 12," in text
    assert "1.8 hours with one thread each, programs of commit `abc11`, `abc12`." in text


def test_patches(text):
    """The lines of the patches of a table's arms, and no others."""
    said, _ = of_section(text, "Number of groups of robots")
    (shown,) = re.findall("```diff\n(.*?)```", said, re.DOTALL)
    patch = (ablation.PATCH_FOLDER / "robots.patch").read_text().splitlines()
    changed = [line for line in patch if line.startswith("+") and not line.startswith("+++")]
    assert len(changed) == 2 and shown.splitlines() == ["# robots, in lux_wrapper.py", *changed]
    assert study.changes(["separate", "global"]) == []
    assert study.changes(["global-critic"])[0].count("\n-") == 2


def test_losses(tmp_path, monkeypatch):
    """What the page says of losses are means over seeds; an arm without trainings has none."""
    monkeypatch.setattr(study, "PAGE", tmp_path / "page.md")
    study.PAGE.write_text("{clipfrac[default]} {explained_variance[lichen]} {clipfrac[global]}")
    default = ARMS["separate"] | {17: ARMS["separate"][11]}
    made_up(tmp_path, {"default": default, "lichen": ARMS["separate"]})
    study.main(tmp_path, tmp_path)
    assert (tmp_path / "study.md").read_text() == "13% 50% -"  # 0.11, 0.12 and 0.17


def test_one_sentence_for_what_is_wrong(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(study.Refused, match="there is no .*ablation.csv; ablation.py makes it"):
        study.main(tmp_path, out)
    with pytest.raises(study.Refused, match="no training is evaluated to its end in .*ablation.csv"):
        made_up(tmp_path, {})
    made_up(tmp_path, {"mine": ARMS["separate"]})
    with pytest.raises(study.Refused, match="no arm of the study, only `mine`"):
        study.main(tmp_path, out)
    (tmp_path / "runs.csv").unlink()
    with pytest.raises(study.Refused, match="there is no .*runs.csv"):
        study.main(tmp_path, out)
    assert not out.exists()


def test_pairs_and_verdicts():
    arms = ("default", "lichen", "no-safe-masks", "large-heads", "authors", "global-authors")
    sections = {section.name: section for section in study.SECTIONS}
    assert study.pairs_of(sections["lichen"], arms) == [("default", "lichen")]
    pairs = [("default", "large-heads"), ("large-heads", "no-safe-masks")]
    assert study.pairs_of(sections["ablation"], arms) == pairs
    assert study.pairs_of(sections["share"], arms) == []
    assert study.pairs_of(sections["ladder"], arms) == [("authors", "global-authors")]
    words = [study.Verdict(mean, 0, 0, 0.01, p).word for mean, p in ((2, 0.04), (-2, 0.04), (2, 0.06))]
    assert words == ["holds", "does not hold", "undecided"]
    verdicts = [study.Verdict(1, 0, 2, 0.01, 0.2), study.Verdict(1, 0, 2, 0.001, 0.02)]
    assert study.counted(verdicts) == "holds 1 (2), does not hold 0 (0), undecided 1 (0)"


def test_verdicts_are_corrected_together(tmp_path):
    """By all pairs of the page; a pair in two tables counts once."""
    data, last = made_up(tmp_path, ARMS)
    found = study.verdicts_of(study.runs_by_arm(data), last)
    assert len(found) == 5 + 1  # and the last rung of the ladder
    for column in zip(*found.values()):
        assert [x.corrected for x in column] == plot.holm([x.p for x in column])


def test_other_maps_are_refused(tmp_path):
    """A pair is compared map by map, so both must have played the same."""
    data, last = made_up(tmp_path, ARMS)
    runs = study.runs_by_arm(data)
    for run in runs["global"].values():
        run[last]["match_seed"] = run[last]["match_seed"] + 1
    with pytest.raises(study.Refused, match="`global` were evaluated on different maps"):
        study.verdicts_of(runs, last)


def test_components(tmp_path):
    """60,000 ice for 3 factories in the end and nothing before, so 10,000 each is half of the way."""
    rich = both({4096: (0, (0, 0)), 8192: (10, (40000, 80000))})
    arms = {"separate": rich, "default": rich, "global-critic-reward": ARMS["kinds"]}
    headline, *rows = study.components(*made_up(tmp_path, arms)).splitlines()[2:]
    assert headline.startswith("| `trajsep_ppo.py") and headline.endswith(" 6,144 | - |")
    assert len(rows) == 2 and rows[0].endswith(" 44,472 |")
    assert "| nothing | 60,000 (44,919 to 75,081) | - | 6,144 |" in rows[0]
    assert "| reward and value (as in MAPPO) | 7,000 (7,000 to 7,000) |" in rows[1]
    assert rows[1].endswith("| -53,000 (-68,081 to -37,919) | never | 2,643 |")
    assert "| 60,000 (44,919 to 75,081) | +0 (+0 to +0) | 6,144 |" in headline


def test_every_arm_has_its_place():
    arms = {arm for section in study.SECTIONS for arm in section.arms.split()}
    assert arms == set(ablation.ARMS) - {"may-wait", "global-may-wait"}  # in docs/results.md
    assert set(study.PUBLISHED) < arms and set(study.NAMES) < set(study.PUBLISHED)
    assert set(study.SHARED) < set(ablation.ARMS)
    for section in study.SECTIONS:
        assert {arm for pair in section.pairs for arm in pair} <= set(section.arms.split())
        colours = [plot.ARMS[arm][1] for arm in section.arms.split()]
        assert section.name == "ladder" or len(set(colours)) == len(colours)  # of the lines of a picture


def crossed(rng, seeds, maps, of_seed, of_map, rest):
    """Values [seeds, maps] of random seeds and maps, and the part of the maps."""
    maps = rng.normal(0, of_map, (1, maps)) if np.isscalar(maps) else maps
    return rng.normal(0, of_seed, (seeds, 1)) + maps + rng.normal(0, rest, (seeds, maps.size))


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("spreads", [(900, 18000, 2600), (2800, 13400, 6800), (6800, 12600, 8100)])
def test_intervals_hold_the_true_value(seeds, spreads):
    """As often as they say, of one arm and of a difference, for spreads like those of the study."""
    rng, draws, means, differences = np.random.default_rng(seeds), 2000, 0, 0
    of_seed, of_map, rest = spreads
    for _ in range(draws):
        maps = rng.normal(0, of_map, (1, 20))
        one = crossed(rng, seeds, maps, of_seed, None, rest)
        other = crossed(rng, 3, maps + rng.normal(0, rest / 2, (1, 20)), 2 * of_seed, None, rest)
        _, low, high = plot.estimate(one)
        means += low <= 0 <= high
        _, low, high, p = plot.difference(one, other)
        differences += low <= 0 <= high
        assert (p > 0.05) == (low <= 0 <= high)
    assert 0.93 < means / draws < 0.97 and 0.93 < differences / draws < 0.98


def test_maps_that_do_not_matter():
    """Where each seed has the same on all maps, it is Welch's test, and the t interval of the seeds."""
    rng = np.random.default_rng(1)
    one, other = (np.tile(rng.normal(size=(number, 1)), 4) for number in (5, 3))
    welch = stats.ttest_ind(one[:, 0], other[:, 0], equal_var=False)
    mean, low, high, p = plot.difference(one, other)
    wanted = welch.confidence_interval()
    assert (low, high, p) == pytest.approx((wanted.low, wanted.high, welch.pvalue))
    assert mean == pytest.approx(one.mean() - other.mean())
    half = stats.t.ppf(0.975, 4) * one[:, 0].std(ddof=1) / np.sqrt(5)
    assert plot.estimate(one) == pytest.approx((one.mean(), one.mean() - half, one.mean() + half))
    ones = np.ones((2, 3))
    assert plot.estimate(ones) == (1, 1, 1)
    assert plot.difference(ones, ones) == (0, 0, 0, 1) and plot.difference(2 * ones, ones) == (1, 1, 1, 0)
    alone = rng.normal(size=(1, 6))  # one seed: the t interval of its maps
    half = stats.t.ppf(0.975, 5) * alone.std(ddof=1) / np.sqrt(6)
    assert plot.estimate(alone)[1:] == pytest.approx((alone.mean() - half, alone.mean() + half))


def test_intervals_by_hand():
    """Mean squares 16 between seeds, 9 between maps, and 4: a variance of (16 + 9 - 4) / 4."""
    values = np.array([[1.0, 2], [3, 8]])
    half = stats.t.ppf(0.975, 21**2 / (16**2 + 9**2 + 4**2)) * np.sqrt(5.25)
    assert plot.estimate(values) == pytest.approx((3.5, 3.5 - half, 3.5 + half))
    assert plot.difference(values, np.zeros((2, 2)))[:3] == pytest.approx((3.5, 3.5 - half, 3.5 + half))


def test_holm():
    assert plot.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert plot.holm([0.6, 0.7]) == [1, 1] and plot.holm([]) == []


def test_lasting():
    """A level counts from where the curve does not leave it any more."""
    steps = [10, 20, 30, 40]
    assert plot.lasting(steps, [0, 4, 8, 8], 5) == 22.5
    assert plot.lasting(steps, [0, 9, 3, 5], 5) == 40 and plot.lasting(steps, [5, 6, 7, 8], 5) == 10
    assert plot.lasting(steps, [9, 9, 9, 4], 5) == np.inf
    assert plot.lasting(steps, [0.9, 0.95 - 1e-12, 1, 1], 0.95) == pytest.approx(20)


def test_the_page_shows_what_the_data_says():
    """docs/study.md is what study.py makes of the matches that are kept."""
    made = study.page(*plot.load(KEPT / "ablation.csv"), plot.read_csv(KEPT / "runs.csv"))
    assert made == (ROOT / "docs" / "study.md").read_text()


def test_claims(tmp_path):
    """Ratios of means, and of the seeds that are farthest apart, in the form of the claim."""

    def seeds(*ices):
        return {seed: {8192: (10, (ice, ice))} for seed, ice in enumerate(ices)}

    arms = {"separate": seeds(6000, 10000), "global": seeds(400, 600), "top-1": seeds(2000, 4000)}
    arms |= {"authors": seeds(9000), "global-authors": seeds(1000), "global-reward": seeds(4000, 4000)}
    data, last = made_up(tmp_path, arms)
    rows = [line.strip("| ").split(" | ")[2:] for line in study.claims(study.runs_by_arm(data), last).splitlines()[2:]]
    assert rows[0] == ["9x (9x to 9x)", "16x (10x to 25x)"]
    assert rows[1] == ["not run yet", "+100% (+50% to +150%)"]
    assert rows[2] == ["not run yet", "not run yet"]
    assert rows[3] == ["not run yet", "-50% (-60% to -33%)"]
    assert rows[4] == ["not run yet", "38% (20% to 67%)"]
    assert study.PUBLISHED["separate"][0] / study.PUBLISHED["global"][0] > 14


def test_bands_lie_within_what_can_be(tmp_path):
    """However far two seeds are apart: no match is longer than 1,000 steps, and no ice is negative."""
    arms = {"separate": {11: {8192: (10, (9000, 9000))}, 12: {8192: (0, (1000, 1000))}}}
    data, last = made_up(tmp_path, arms)
    _, values = study.lines_of(study.runs_by_arm(data)["separate"], [last])
    mean, low, high = np.ravel(values["episode_length"])
    assert (mean, low, high) == (750, 0, 1000)
    mean, low, high = np.ravel(values["ice_transferred"])
    assert mean == 5000 and low == 0 and high > 9000


def test_ladder_table(tmp_path):
    """A row for each rung that both scripts have: the ratio of their ice, and what was clipped."""
    arms = {"authors": ARMS["separate"], "global-authors": ARMS["global"], "authors-six": ARMS["separate"]}
    data, last = made_up(tmp_path, arms)
    trainings = plot.read_csv(tmp_path / "runs.csv")
    row, *others = study.rungs(study.runs_by_arm(data), last, trainings).splitlines()[2:]
    cells = [*map(str.strip, row.strip("|").split("|"))]
    assert not others and cells[0].startswith("**the authors' regime**: `trajsep_ppo.py ")
    assert [cells[1], *cells[4:]] == ["2", "10.0", "12%", "12%"]
    assert [cell.split(" ")[0] for cell in cells[2:4]] == ["10,000", "1,000"]


def test_ladder_picture(tmp_path, monkeypatch):
    """Of each rung with both arms: final ice, steps, and what was clipped; never lies beyond the end."""
    arms = {"authors": both({4096: (0, (0, 0)), 8192: (10, (40000, 80000))}), "authors-six": ARMS["separate"]}
    arms |= {"global-authors": ARMS["kinds"], "separate": ARMS["separate"], "global": ARMS["global"]}
    data, last = made_up(tmp_path, arms)
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    trainings = plot.read_csv(tmp_path / "runs.csv")
    study.draw_ladder(study.runs_by_arm(data), last, trainings, tmp_path / "ladder.png")
    ice, steps, clipped, divergence = drawn[0].axes
    assert [text.get_text() for text in ice.get_yticklabels()] == ["the authors' regime", "our flags"]
    (method, baseline), *_ = [[line for line in ice.lines if line.get_marker() == "o"][::2]]
    assert method.get_xydata().tolist() == [[60, -0.18]] and baseline.get_xydata().tolist() == [[7, 0.18]]
    points = [line.get_xydata() for line in steps.lines if line.get_marker() == "o"]
    assert points[0] == pytest.approx(np.array([[6.144, -0.24], [6.144, -0.12]]))
    assert points[2][:, 0] == pytest.approx([1.08 * 8.192] * 2)
    assert clipped.lines[0].get_xdata() == pytest.approx([11, 12])
    assert [text.get_text() for text in clipped.texts] == [] and len(divergence.texts) == 4


def test_one_generation():
    """The trainings of a folder are of one commit, without changes of its programs, and all played the same maps.

    Those for lichen are newer; all others, which stand in one table, are of the same commit.
    """
    commits, maps = {}, set()
    for path in KEPT.parent.glob("*/runs.csv"):
        rows = plot.read_csv(path)
        (commits[path.parent.name],) = {row["commit"] for row in rows}
        maps |= {row["maps"] for row in rows}
    assert not any(commit.endswith("-dirty") for commit in commits.values())
    assert maps == {f"{ablation.FIRST_MAP} to 7019"} and commits.pop("real_game") and len({*commits.values()}) == 1
