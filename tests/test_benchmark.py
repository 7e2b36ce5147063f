"""The ablation: the order of its queue, that it goes on where it was stopped, and the numbers of its tables.

And the planted bugs: that each can be planted, and that what is said of them is so.
"""

import ast
import csv
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import ablation  # noqa: E402
import figures  # noqa: E402
import mutants  # noqa: E402
import plot  # noqa: E402

import trajsep_ppo  # noqa: E402
from hybrid_model import HybridNet  # noqa: E402
from lux_wrapper import LuxVecEnv  # noqa: E402

SMALL = "--map-size 24 --min-factories 1 --max-factories 2 --max-robots 2 "
TINY = SMALL + "--total-timesteps 256 --num-envs 2 --num-steps 32 --num-minibatches 2 --save-every 1"


def test_every_prefix_of_the_queue_is_a_result():
    jobs = ablation.queue(ablation.ARMS)
    assert jobs[:4] == [("default", 11), ("global", 11), ("default", 12), ("global", 12)]
    assert jobs[10:12] == [("separate", 11), ("global-reward", 11)]
    assert len(jobs) == len(set(jobs)) == 2 * 5 + 37 * 3
    others = [seed for arm, seed in jobs[10:]]
    assert others == sorted(others)  # a seed of all arms before the next one
    assert ablation.queue(["cluster", "global"], (7,)) == [("global", 7), ("cluster", 7)]
    assert set(plot.ARMS) == set(ablation.ARMS)
    commands = [(ablation.ARMS[arm], ablation.EDITS.get(arm)) for arm in ablation.ARMS]
    assert len(set(commands)) == len(commands)  # nothing is run twice


def test_schedules():
    assert ablation.FINE[:2] == (2048, 4096) and ablation.FINE[11:13] == (24576, 28672)
    for schedule in (ablation.FINE, ablation.COARSE):
        assert {24576, 49152} <= set(schedule) and list(schedule) == sorted(set(schedule))
        assert all(step % 2048 == 0 and step < 102400 for step in schedule)  # a checkpoint is saved every 2,048


def test_play_is_that_of_the_script_and_can_be_repeated():
    """Matches that have ended stand still, which must not change the others."""
    args = trajsep_ppo.Args(map_size=24, min_factories=1, max_factories=2, max_robots=2, eval_episodes=4, num_workers=0)
    envs = LuxVecEnv(4, num_workers=0, map_size=24, min_factories=1, max_factories=2, max_robots=2, held_out=True)
    torch.manual_seed(1)
    agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max()))
    for x in agent.actor.parameters():
        x.data *= 100  # far from uniform, so that no rounding decides
    seeds, metrics = ablation.play(agent, envs, greedy=False)
    expected = trajsep_ppo.evaluate(agent, args, torch.device("cpu"))
    assert seeds == [0, 1, 2, 3]
    assert [match["l"] for match in metrics] == expected["l"]
    assert [match["lights_built"].mean() for match in metrics] == expected["lights_built"]
    greedy = ablation.play(agent, envs, greedy=True)[1]
    assert ablation.play(agent, envs, greedy=True, first_map=1000)[0] == [1000, 1001, 1002, 1003]
    again = ablation.play(agent, envs, greedy=False)[1]
    for one, other in zip(metrics, again):
        assert all(np.array_equal(one[key], other[key]) for key in one)
    assert any(one["r"].tolist() != other["r"].tolist() for one, other in zip(metrics, greedy))


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_interrupted_and_resumed(tmp_path, capfd):
    options = {"out": tmp_path / "out", "work": tmp_path / "work", "matches": 2, "schedule": (64, 100, 192)}
    command = [sys.executable, ROOT / "benchmark/ablation.py", "--arms", "global", "--seeds", "3", f"--flags={TINY}"]
    for key, value in options.items():
        command += [f"--{key}", *map(str, value if key == "schedule" else [value])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "sampled at 64 steps" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "interrupted" in process.stderr.read()
    process.stderr.close()
    rows = rows_of(options["out"] / "ablation.csv")
    assert len(rows) % 4 == 0 and 4 <= len(rows) < 20  # 2 matches x 2 players an evaluation
    run = rows_of(options["out"] / "runs.csv")
    assert [run[0][key] for key in ("arm", "seed", "steps")] == ["global", "3", "256"]
    assert 0 <= float(run[0]["clipfrac"]) <= 1 >= float(run[0]["explained_variance"])

    options |= {"arms": ("global",), "seeds": (3,), "parallel": 1, "flags": TINY}
    ablation.main(**options, minutes=0)
    assert rows_of(options["out"] / "ablation.csv") == rows and "0 of 1" in capfd.readouterr().out
    ablation.main(**options)
    text = (options["out"] / "ablation.csv").read_text()
    assert "training" not in capfd.readouterr().out  # the training is not made again
    rows = rows_of(options["out"] / "ablation.csv")
    # 100 is not a checkpoint's step, 128 is the next one.
    steps = [64, 64, 64, 64, *[128] * 4, *[192] * 4, *[256] * 8]
    assert [int(row["global_step"]) for row in rows] == steps
    assert [row["policy"] for row in rows] == ["sampled"] * 12 + ["greedy"] * 4 + ["sampled"] * 4
    teams = [(row["match_seed"], row["player"]) for row in rows[:4]]
    assert teams == [("2000", "0"), ("2000", "1"), ("2001", "0"), ("2001", "1")]
    assert all(row[key] for row in rows for key in ablation.COLUMNS)
    assert len(list(options["work"].glob("*/checkpoint_*.pt"))) == 1

    ablation.main(**options)
    assert "1 of 1 runs are complete" in capfd.readouterr().out
    assert (options["out"] / "ablation.csv").read_text() == text
    with pytest.raises(SystemExit, match="by another command"):
        ablation.main(**options | {"flags": SMALL})
    for other in ({"matches": 3}, {"first_map": 2}):
        with pytest.raises(SystemExit, match="holds evaluations on 2 maps from map 2000 on"):
            ablation.main(**options | other)


def test_one_sentence_for_what_is_wrong(tmp_path, capfd):
    with pytest.raises(SystemExit, match="no arm everything; there are default, global"):
        ablation.main(arms=("everything",))
    with pytest.raises(SystemExit, match="there is no .*ablation.csv; benchmark/ablation.py makes it"):
        plot.main(tmp_path)
    options = {"out": tmp_path / "out", "work": tmp_path / "work", "arms": ("cluster",), "seeds": (1,)}
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        ablation.main(**options, flags="--gamma 2")
    assert "--gamma must be between 0 and 1" in capfd.readouterr().out  # the end of the script's log


def test_lost_checkpoints(tmp_path, capfd, monkeypatch):
    """A training whose checkpoints were removed before they were kept is not evaluated at others instead."""
    keep = ablation.keep
    monkeypatch.setattr(ablation, "SAVE_EVERY", 1)
    monkeypatch.setattr(ablation, "keep", lambda folder: any(folder.glob("runs/*/*_256.pt")) and keep(folder))
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        ablation.main(arms=("global",), seeds=(1,), out=tmp_path / "out", work=tmp_path / "work", flags=TINY)
    assert "2 checkpoints were removed before they were kept" in capfd.readouterr().out
    assert not (tmp_path / "out" / "runs.csv").exists()


def made_up(folder, lengths):
    """ablation.csv with 10 matches an evaluation: {arm: {seed: {step: lengths of the matches}}}."""
    with open(folder / "ablation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ablation.COLUMNS, restval=0)
        writer.writeheader()
        for arm, seeds in lengths.items():
            for seed, steps in seeds.items():
                for step, matches in steps.items():
                    start = {"arm": arm, "seed": seed, "global_step": step, "train_seconds": step / 100}
                    for index, length in enumerate(matches):
                        for player in range(2):  # players have 1000 ice more and less than the mean
                            row = {"match_seed": index, "player": player, "starting_factories": 4}
                            ice = 10 * length + (1000 if player else -1000) + 100 * seed
                            row |= {"episode_length": length, "ice_transferred": ice, "ice_per_factory": ice / 4}
                            row |= {"factories_alive": length / 250, "factories_alive_share": length / 1000}
                            for policy in ("sampled", "greedy") if step == 4096 else ("sampled",):
                                writer.writerow(start | row | {"policy": policy})


def test_tables_and_figures_of_known_numbers(tmp_path, capfd):
    full = [1000] * 10
    default = {
        1: {1024: [200] * 10, 2048: [1000] + [400] * 9, 4096: full},
        2: {1024: [200] * 10, 2048: [600] * 10, 4096: full},
    }
    slow = {1: {1024: [200] * 10, 2048: [200] * 10, 4096: [200, 600] * 5}}
    cut_off = {1: {1024: full}}  # its last checkpoint is not evaluated yet
    made_up(tmp_path, {"default": default, "global": slow, "separate": slow, "cluster": cut_off})
    plot.main(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"ablation.png"}
    cells, section = {}, ""  # (section, first cell) -> the other cells
    for line in (tmp_path / "ablation.md").read_text().splitlines():
        section = line if line.startswith("## ") else section
        if line.startswith("| "):
            first, *others = line.strip("| ").split(" | ")
            cells[section, first] = others
    name, final, speed = plot.ARMS["default"][0], "## Final policy, sampled actions", "## Speed of learning"
    # 10,000 ice + 100 or 200 by seed, a quarter of that per factory
    row = "2 | 1,000 (0; 0) | 10,150 (50; 71) | 2,538 (12; 18) | 4.00 (0.00; 0.00) | 1.00 (0.00; 0.00)"
    assert " | ".join(cells[final, name]) == row
    assert " | ".join(cells[final, "global trajectory"][:3]) == "1 | 400 (200; -) | 4,100 (2,000; -)"
    # Full-length: seed 1 has 10% at 2048, which is 5% of both; both have all at 4096. Length 500: from 200 at 1024 to
    # 460, 600 and in the mean 530 at 2048; seed 1 gets there between 2048 and 4096.
    row = "2 | 4,096 (2,048 to 4,096) | 4,096 | 1,955 (1,792 to 2,200) | never | 41 (41 to 41)"
    assert " | ".join(cells[speed, name]) == row
    assert cells[speed, "global trajectory"][1:5] == ["never"] * 4
    assert cells["## Final policy, likeliest actions", name][1] == "1,000 (0; 0)"
    row = "2 | 1,000 ± 0 | 10,150 ± 71 | 2,538 ± 18 | 4,096 / 4,096"
    assert " | ".join(cells["## All arms", name]) == row
    assert cells["## All arms", "global trajectory"] == ["1", "400", "4,100", "1,025", "never / never"]
    assert "by cluster" not in capfd.readouterr().out


def test_comparison_of_known_numbers(tmp_path):
    """Steps are means over seeds of where each gets there; shares are of teams."""
    full = [1000] * 10
    default = {1: {1024: [200] * 10, 2048: full, 4096: full}, 2: {1024: [200] * 10, 2048: [200] * 10, 4096: full}}
    slow = {1: {1024: [400] * 10, 2048: [400] * 10, 4096: [400] * 9 + [1900]}}  # a mean of 550
    made_up(tmp_path, {"default": default, "global": slow})
    rows = [
        line.strip("| ").split(" | ") for line in figures.comparison(*plot.load(tmp_path / "ablation.csv")).splitlines()
    ]
    table = {first: others for first, *others in rows[2:]}
    # 3/8 of the way from 200 to 1,000, within 1,024 and within 2,048 steps; two thirds of that from 400 to 550.
    row = ["2,112 (1,408 to 2,816)", "3,413 (3,413 to 3,413)", "1.6"]
    assert table["steps to a mean length of 500"] == row
    assert table["steps to 95% full-length matches"][:2] == ["2,995 (1,997 to 3,994)", "never (never to never)"]
    assert table["steps to 10,000 ice per starting factory"][0] == "never (never to never)"
    # A quarter of 10,100, 10,200 and 5,600 ice.
    row = ["2,538 (2,525 to 2,550)", "1,400 (1,400 to 1,400)", "0.55"]
    assert table["final ice per starting factory, mean of each team's"] == row
    assert table["the same, mean ice over mean factories"] == row
    assert table["teams that lose a factory"][:2] == ["0% (0% to 0%)", "90% (90% to 90%)"]


def test_complete(tmp_path):
    """The main arms are played with the likeliest actions too, last; the others are not."""
    results = ablation.Results(tmp_path)
    for arm, policies in (("global", ["sampled", "greedy"]), ("separate", ["sampled"])):
        assert [*ablation.in_the_end(arm)] == policies and not results.complete(arm, 1)
        results.add_run({"arm": arm, "seed": 1, "steps": 256})
        for step, policy in ((128, "sampled"), *((256, policy) for policy in policies)):
            assert not results.complete(arm, 1)
            results.add_evaluation(arm, 1, step, 1.0, policy, [])
        assert results.complete(arm, 1) and not results.complete(arm, 2)


def test_the_page_of_results_shows_what_the_data_says():
    """Its first table is what figures.py makes of the matches that are kept."""
    made = figures.comparison(*plot.load(plot.RESULTS / "ablation.csv"))
    assert made in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize(
    "folder, row",
    [
        ("results", "6 robots (default) | 5"),
        ("robots_8", "8 robots | 3"),
        ("robots_12", "12 robots | 3"),
        ("neurips_stage", "40 robots | 3"),
    ],
)
def test_the_page_of_results_shows_how_the_difference_grows(folder, row):
    """Its table of both main arms with more and more entities."""
    data, last = plot.load(plot.RESULTS.parent / folder / "ablation.csv")
    both = [data[arm, "sampled"] for arm in ablation.MAIN]
    steps = plot.common(*(runs for (_, policy), runs in data.items() if policy == "sampled"))
    to_500, full, ice = [], [], []
    for runs in both:
        where, length = plot.curves(runs, "episode_length")
        to_500.append(plot.crossing(where, length.mean(0), 500))
        full.append(plot.first(steps, plot.curves(runs, "full_length", steps)[1].mean(0), 0.95))
        means = [run[last]["ice_transferred"].mean() for run in runs.values()]
        ice.append(f"{np.mean(means):,.0f} ± {plot.over_seeds(means)}")
    cells = [*map(plot.step_text, to_500), f"{to_500[1] / to_500[0]:.1f}x", *map(plot.step_text, full), *ice]
    assert " | ".join([row, *cells]) in (ROOT / "docs" / "results.md").read_text()


def test_every_bug_can_be_planted():
    """Its old text is in its file exactly once, the new one is Python, and its name is its own."""
    tree = mutants.read_tree()
    assert len({(file, what) for file, _, _, what in mutants.MUTANTS}) == len(mutants.MUTANTS)
    for file, old, new, what in mutants.MUTANTS:
        assert file in mutants.TESTS, file
        assert old != new and ast.parse(mutants.planted(tree, file, old, new)[Path(file)]), what


PROGRAM = """
def count(numbers):
    total = 0
    while numbers:
        numbers = numbers[1:]
        total += 1
    return total
"""
TEST = """
from program import count

def test_nothing():
    assert count([]) == 0

def test_two():
    assert count([5, 6]) == 2
"""


@pytest.fixture
def planting(monkeypatch, tmp_path):
    """Function (bugs, tests) that plants them in a small program of its own, and function () -> rows of the table."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "TESTS", {"program.py": ("test_program.py",)})

    def plant(bugs, test=TEST, **options):
        (tmp_path / "tests" / "test_program.py").write_text(test)
        monkeypatch.setattr(mutants, "MUTANTS", [("program.py", *bug) for bug in bugs])
        mutants.main(("program.py",), tmp_path / "out" / "table.csv", **options)

    return plant, lambda: rows_of(tmp_path / "out" / "table.csv")


def test_planted_bugs(planting, capfd):
    plant, rows = planting
    bugs = [
        ("total = 0", "total = 1", "counts from 1"),
        ("+= 1", "+= 2", "counts double"),
        ("numbers[1:]", "numbers[1:] + [3]", "never ends"),
        ("def count(", "def counts(", "has another name"),
    ]
    plant(bugs, limit=8)
    name = "tests/test_program.py"
    found = [
        ("yes", f"{name}::test_nothing"),
        ("yes", f"{name}::test_two"),
        ("hangs", f"{name}::test_two"),
        ("yes", name),
    ]
    table = rows()
    assert [row["what"] for row in table] == [what for _, _, what in bugs]
    assert [(row["caught"], row["test"]) for row in table] == found
    assert 8 < float(table[2]["seconds"]) < 60 and len({row["code"] for row in table}) == 4
    assert "program.py: 4 of 4 caught, 1 of them because a test hangs" in capfd.readouterr().out

    # Only what is new is run, until the tests change.
    with pytest.raises(SystemExit, match="1 of 5 bugs not caught"):
        plant([("total += 1", "total += 1 if total < 9 else 2", "counts far"), *bugs], limit=8)
    output = capfd.readouterr().out
    assert "1 of 1 program.py: counts far: NOT CAUGHT" in output and "4 of 5 caught" in output
    assert "    not caught: counts far" in output and rows()[1:] == table
    with pytest.raises(SystemExit, match="2 of 2 bugs not caught"):
        plant(bugs[:2], TEST.split("def")[0] + "def test_none():\n    pass\n")
    assert [row["caught"] for row in rows()] == ["no", "no"]


def test_bugs_that_cannot_be_planted(planting):
    plant, _ = planting
    bug = ("+= 1", "+= 2", "counts double")
    with pytest.raises(SystemExit, match="without a bug, a test of program.py fails: tests/test_program.py::test_two"):
        plant([bug], TEST.replace("== 2", "== 3"))
    with pytest.raises(SystemExit, match="3 times in program.py, but must be there once: 'total'"):
        plant([bug, ("total", "sum", "another name")])
    for options, said in (({"parallel": 0}, "--parallel must be"), ({"limit": 0}, "--limit above 0")):
        with pytest.raises(SystemExit, match=said):
            plant([bug], **options)
    with pytest.raises(SystemExit, match="no bugs for plot.py; there are for program.py"):
        mutants.main(("plot.py",))
