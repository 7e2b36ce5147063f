"""The page of the authors' study: numbers and verdicts of made-up matches; it is what the data says."""

import csv
import re
from pathlib import Path

import ablation
import numpy as np
import plot
import pytest
import study

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
    assert {section.name for section in study.SECTIONS} - pictures == {"lichen", "ablation"}
    shown = set(re.findall(r"study/(\w+).png", said))
    assert shown == pictures
    return said


def of_section(text, title):
    """Text of a section, and its rows: first cell -> the others."""
    text = text.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| **")]
    return text, {first.split(":")[0].replace("*", ""): others for first, *others in rows}


def test_numbers(text):
    """Half of the drawn matches have the larger ice, and 6 to 14 of 20 in 95% of the samples."""
    _, rows = of_section(text, "Trajectories")
    # 10,000 ice for 3 factories; the mean of the ratios would be 3,000. On the steps that all arms
    # have, 40% are full-length at 4,096 and all at 8,192; of 20 drawn matches 4 to 12 at the first.
    ours = ["10,000 (7,600 to 12,400)", "3,333", "1,000 (0)", "1,000"]
    ours += ["28,672", "≤ 4,096", "49,152", "7,851 (7,680 to 7,936)"]
    assert rows["separate"] == ["2", "44,472 (12,065)", *ours]
    # From none to all of the matches: a tenth of the way, and no spread.
    ours = ["5,000 (3,800 to 6,200)", "1,667", "1,000 (0)", "1,000"]
    ours += ["28,672", "4,506", "49,152", "7,987"]
    assert rows["factories"] == ["2", "43,528 (11,327)", *ours]
    # One seed in four samples is drawn twice.
    assert rows["robots"][2] == "7,000 (5,000 to 9,000)"
    assert rows["robots"][-4:] == ["98,304", "never", "never", "never"]
    assert rows["kinds"][5] == "750" and rows["kinds"][-1] == "never"


def test_verdicts(text):
    said, rows = of_section(text, "Trajectories")
    # Maps are drawn for both: the difference is 2,000 on half of them and 8,000 on the others.
    # At 2,048 steps it is -3,000, at 4,096 nothing.
    better = "+5,000 (+3,200 to +6,800): *holds*"
    assert rows["separate above factories"] == ["+944", better, "+667 (+67 to +1,267): *holds*"]
    worse = [f"{x}: *does not hold*" for x in ("-2,000 (-3,800 to -200)", "-1,000 (-1,900 to -100)")]
    assert rows["factories above kinds"] == ["+37,366", *worse]
    equal = [f"+0 (-{x} to +{x}): *within the intervals*" for x in ("2,000", "1,000")]
    assert rows["kinds above robots"] == ["+2,589", *equal]
    final, pace = "+6,000 (+4,000 to +8,000): *holds*", "-6,500 (-7,500 to -5,500): *does not hold*"
    assert rows["robots above global"] == ["+507", final, pace]
    assert "By final ice: holds 2, does not hold 1, within the intervals 1." in said
    assert "By pace: holds 1, does not hold 2, within the intervals 1." in said
    # Four pairs of this table, and separate above robots in two others, by 3,000 where seeds differ
    # by 4,000.
    assert "6 pairs.\nBy final ice: holds 2, does not hold 1, within the intervals 3." in text


def test_what_is_missing(text):
    said, rows = of_section(text, "Trajectories")
    assert "Not run yet: `default`, `cluster`." in said and "cut off" not in text
    assert "Evaluations that all of these have: 4,096, 8,192 steps." in said
    said, rows = of_section(text, "Number of groups of robots")
    assert set(rows) == {"robots", "separate", "separate above robots"}
    said, rows = of_section(text, "Flags of the baseline's own")
    assert set(rows) == {"global"} and "holds" not in said  # a pair has two arms
    said, rows = of_section(text, "Lichen")
    assert "Not run yet." in said and not rows
    assert f"5 of {len(ablation.ARMS)} arms, 11 trainings with seeds 11 to 12," in text
    assert "1.8 hours with one thread each, at the commits `abc11`, `abc12`." in text


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
    arms = ("default", "lichen", "no-safe-masks", "large-heads")
    made = study.Study({(arm, "sampled"): {} for arm in arms}, 0)
    sections = {section.name: section for section in study.SECTIONS}
    assert made.order(sections["lichen"]) == [("default", "lichen")]
    pairs = [("default", "large-heads"), ("large-heads", "no-safe-masks")]
    assert made.order(sections["ablation"]) == pairs
    assert made.order(sections["baseline"]) == [] == made.order(sections["share"])
    verdicts = [study.verdict(*x) for x in ((1, 2), (-2, -1), (-1, 1))]
    assert verdicts == ["holds", "does not hold", "within the intervals"]
    assert study.verdict(0, 0) == study.verdict(0, 1) == "within the intervals"


def test_components(tmp_path):
    """60,000 ice for 3 factories in the end and nothing before, so 10,000 each is half of the way."""
    rich = both({4096: (0, (0, 0)), 8192: (10, (30000, 90000))})
    data, last = made_up(tmp_path, {"separate": rich, "global-critic-reward": ARMS["kinds"]})
    rows = study.components(data, last).splitlines()[2:]
    assert len(rows) == 2 and rows[0].endswith(" 44,472 |")
    assert "| nothing | 60,000 (48,000 to 72,000) | 6,144 (" in rows[0]
    assert rows[1].endswith("| reward and value (as in MAPPO) | 7,000 (7,000 to 7,000) | never | 2,643 |")


def test_every_arm_has_its_place():
    arms = {arm for section in study.SECTIONS for arm in section.arms.split()}
    assert arms == set(ablation.ARMS) - {"may-wait", "global-may-wait"}  # in docs/results.md
    assert set(study.PUBLISHED) < arms and set(study.NAMES) < set(study.PUBLISHED)
    assert set(study.SHARED) < set(study.PUBLISHED)
    for section in study.SECTIONS:
        assert {arm for pair in section.pairs for arm in pair} <= set(section.arms.split())


def test_bootstrap_draws_matches_within_seeds():
    """The samples are means over drawn seeds, and over the matches drawn for each of them."""
    rng = np.random.default_rng(1)
    runs = {seed: {step: {"x": rng.normal(size=5)} for step in (1, 2)} for seed in range(3)}
    made, rng = study.resampled(runs, "x", (1, 2)), np.random.default_rng(0)
    values = np.array([[run[step]["x"] for step in (1, 2)] for run in runs.values()])
    seeds = rng.integers(3, size=(study.SAMPLES, 3))
    matches = rng.integers(5, size=(study.SAMPLES, 3, 5))
    for sample, drawn, at in zip(made, seeds, matches):
        expected = np.mean([values[seed][:, place].mean(1) for seed, place in zip(drawn, at)], 0)
        np.testing.assert_allclose(sample, expected)


def test_the_page_shows_what_the_data_says():
    """docs/study.md is what study.py makes of the matches that are kept."""
    made = study.page(*plot.load(KEPT / "ablation.csv"), plot.read_csv(KEPT / "runs.csv"))
    assert made == (ROOT / "docs" / "study.md").read_text()
