"""The ablation: its queue, that it continues where it was stopped, the numbers of its tables."""

import csv
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import ablation
import bands
import compare
import economy
import figures
import luxai_s2.env
import numpy as np
import other_games
import placement
import plot
import pytest
import reliability
import search
import study
import throughput
import torch
import tyro
from PIL import Image, ImageSequence

import global_ppo
import trajsep_ppo
from hybrid_model import HybridNet

ROOT = Path(__file__).resolve().parent.parent
STAGE = {"map_size": 24, "min_factories": 1, "max_factories": 2, "max_robots": 2}
SMALL = "--env-kwargs " + " ".join(f"{key} {x}" for key, x in STAGE.items())
TINY = f"{SMALL} --total-timesteps 256 --num-envs 2 --num-steps 32 --num-minibatches 2 --save-every 1"


def test_every_prefix_of_the_queue_is_a_result():
    jobs = ablation.queue(ablation.ARMS)
    assert jobs[:4] == [("default", 11), ("global", 11), ("default", 12), ("global", 12)]
    assert jobs[20:22] == [("separate", 11), ("global-reward", 11)]
    assert len(jobs) == len(set(jobs)) == 2 * 10 + 10 * 5 + (len(ablation.ARMS) - 12) * 3
    others = [seed for arm, seed in jobs[20:]]
    assert others == sorted(others)  # a seed of all arms before the next one
    assert ablation.queue(["cluster", "global"], (7,)) == [("global", 7), ("cluster", 7)]
    assert set(plot.ARMS) == set(ablation.ARMS)


def test_schedule():
    """One checkpoint is saved every 2,048 steps, and after every update where that has more."""
    schedules = {ablation.schedule_of(arm) for arm in ablation.ARMS}
    assert schedules == {ablation.FINE, ablation.LATE, ablation.COARSE}
    assert ablation.schedule_of("global-six-fresh") == ablation.schedule_of("authors") == ablation.LATE
    for schedule in schedules:
        assert list(schedule) == sorted(set(schedule))
        assert all(step % 2048 == 0 and step < 102400 for step in schedule)
    # So arms of a table have steps in common
    assert set(ablation.LATE) < set(ablation.COARSE) < set(ablation.FINE)
    work = ablation.Work(ablation.ARMS, ROOT, None, 2, 0, "")
    arms = {"default": 4, "authors": 1, "global-six-fresh": 4}
    for arm, updates in arms.items():
        assert f" --save-every {updates} " in f"{work.task(arm, 11)['command']} "


def test_evaluation_can_be_repeated(tmp_path, monkeypatch):
    """The rows of a checkpoint: of its script, the maps asked for, and the same each time."""
    monkeypatch.chdir(tmp_path)
    args = trajsep_ppo.Args(env_kwargs=STAGE)
    envs = trajsep_ppo.make_envs(args, 4, num_workers=0, held_out=True)
    torch.manual_seed(1)
    agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max()))
    for x in agent.actor.parameters():
        x.data *= 30  # far from uniform, so that no rounding decides
    content = {"args": asdict(args), "model": agent.state_dict(), "train_seconds": 1}
    torch.save(content, "checkpoint_64.pt")

    def rows(policy, first_map=7000):
        ablation.evaluate("trajsep_ppo", [(64, policy)], 4, first_map)
        return json.loads(Path(f"evaluation_64_{policy}.json").read_text())

    sampled, greedy = rows("sampled"), rows("greedy")
    expected = trajsep_ppo.evaluate(agent, envs, 1000, "cpu")
    assert [row["episode_length"] for row in sampled[::2]] == expected["l"]
    returns = [float(row["episodic_return"]) for row in sampled]
    assert returns == pytest.approx(np.ravel(expected["r"]), rel=1e-6)
    assert sampled == rows("sampled")
    assert [row["episodic_return"] for row in greedy] != [row["episodic_return"] for row in sampled]
    others = rows("greedy", 7002)[:4]  # of the last two maps
    assert [row | {"policy": "greedy"} for row in others] == greedy[4:]


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


COPIES = ("checkpoint_64 copy.pt", "checkpoint_64_best.pt", "checkpoint_x.pt")


def test_interrupted_and_resumed(tmp_path, capfd):
    """What is done is kept; a person's copies in the folders are neither read nor removed."""
    out, folder = tmp_path / "out", tmp_path / "out" / "global__3"
    folder.mkdir(parents=True)
    for name in COPIES:
        (folder / name).touch()
    blocked = folder / "evaluation_192_sampled.json.tmp"
    os.mkfifo(blocked)  # so the third evaluation does not end
    command = [sys.executable, ROOT / "benchmark/ablation.py", "--arms", "global", "--seeds", "3"]
    command += [f"--flags={TINY}", "--out", out, "--matches", "2", "--schedule", "64", "100", "192"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "evaluation_128_sampled.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=600)[1] and process.returncode == 130
    blocked.unlink()
    rows = rows_of(out / "ablation.csv")
    assert len(rows) == 8  # 2 matches x 2 players an evaluation
    (run,) = rows_of(out / "runs.csv")
    assert (run["arm"], run["seed"], run["steps"]) == ("global", "3", "256")
    assert run["maps"] == "7000 to 7001"
    assert 0 <= float(run["clipfrac"]) <= 1 >= float(run["explained_variance"])
    (run_dir,) = folder.glob("runs/*")
    shutil.copy(folder / "evaluation_64_sampled.json", folder / "evaluation_64_sampled copy.json")
    shutil.copy(run_dir / "checkpoint_256.pt", run_dir / "checkpoint_256 copy.pt")
    shutil.copytree(folder, f"{folder} copy")

    options = {"arms": ("global",), "seeds": (3,), "out": out, "flags": TINY}
    options |= {"matches": 2, "schedule": (64, 100, 192)}
    capfd.readouterr()
    ablation.main(**options)
    said = capfd.readouterr().out
    assert "training" not in said and "already" not in said  # the training is not made again
    again, text = rows_of(out / "ablation.csv"), (out / "ablation.csv").read_text()
    assert again[:8] == rows
    # 100 is not a checkpoint's step, 128 is the next one.
    steps = [64, 64, 64, 64, *[128] * 4, *[192] * 4, *[256] * 8]
    assert [int(row["global_step"]) for row in again] == steps
    assert [row["policy"] for row in again] == ["sampled"] * 12 + ["greedy"] * 4 + ["sampled"] * 4
    teams = [(row["match_seed"], row["player"]) for row in again[:4]]
    assert teams == [("7000", "0"), ("7000", "1"), ("7001", "0"), ("7001", "1")]
    assert all(row[key] for row in again for key in ablation.COLUMNS)
    kept = {path.name for path in folder.glob("checkpoint_*.pt")}
    assert kept == {"checkpoint_256.pt", *COPIES}

    ablation.main(**options)
    said = capfd.readouterr().out
    assert "1 of 1 runs are complete" in said and "already; with another --out it is made again" in said
    assert (out / "ablation.csv").read_text() == text
    others = {"flags": (SMALL, "command"), "matches": (3, "maps"), "first_map": (2, "maps")}
    for name, (value, what) in others.items():
        with pytest.raises(SystemExit, match="1 of 1 runs failed"):
            ablation.main(**options | {name: value})
        assert f"holds a training with other {what}" in capfd.readouterr().out
    assert (out / "ablation.csv").read_text() == text

    shutil.rmtree(folder)  # the tables alone are continued too
    ablation.main(**options)
    assert "1 of 1 runs are complete" in capfd.readouterr().out and (out / "ablation.csv").read_text() == text
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        ablation.main(**options | {"matches": 3})
    assert "runs.csv holds a training with other maps" in capfd.readouterr().out
    assert not folder.exists() and (out / "ablation.csv").read_text() == text
    (out / "ablation.csv").write_text("".join(line for line in text.splitlines(True) if "greedy" not in line))
    ablation.main(**options)  # what was not evaluated to its end is made again
    assert (out / "ablation.csv").read_text().count("greedy") == 4 and folder.exists()


def test_commit(tmp_path, monkeypatch):
    """It is the last one that changed a program, whatever came after."""

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(ablation, "ROOT", tmp_path)
    git("init", "-q")
    (tmp_path / "docs").mkdir()
    for name in ("trajsep_ppo.py", "docs/page.py", "README.md"):
        (tmp_path / name).touch()
        git("add", ".")
        git("commit", "-q", "-m", name)
    assert ablation.commit() == git("rev-parse", "--short", "HEAD~2")
    (tmp_path / "docs" / "page.py").write_text("x")
    assert ablation.commit() == git("rev-parse", "--short", "HEAD~2")
    (tmp_path / "trajsep_ppo.py").write_text("x")
    assert ablation.commit() == git("rev-parse", "--short", "HEAD~2") + "-dirty"


def test_a_patched_arm_and_ones_own(tmp_path):
    """The patched program is trained and evaluated, also inside of a repository; so is a person's command."""
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", repository], check=True)
    out = repository / "runs" / "out"
    note = out / "top-1-abs__1" / "programs" / "notes.txt"
    note.parent.mkdir(parents=True)
    note.touch()
    flags = ["--arm", "no-norm=trajsep_ppo.py --no-norm-adv", "--arm", "x=global_ppo.py"]
    flags += ["--arms", "top-1-abs", "--seeds", "1", "--matches", "1", "--schedule", "256"]
    command = [sys.executable, ablation.__file__, *flags, f"--flags={TINY}", "--out", out]
    subprocess.run(command, check=True)
    own, run, _ = rows_of(out / "runs.csv")
    assert own["arm"] == "no-norm" and own["patches"] == ""
    args = torch.load(out / "no-norm__1" / "checkpoint_256.pt", weights_only=True)["args"]
    assert args["norm_adv"] is False
    assert run["patches"] == "top-1 top-1-abs" and run["command"].startswith(ablation.SEPARATE)
    args = torch.load(out / "top-1-abs__1" / "checkpoint_256.pt", weights_only=True)["args"]
    assert note.exists() and args["top_samples"] == 1 and len(rows_of(out / "ablation.csv")) == 12


def test_one_sentence_for_what_is_wrong(tmp_path, capfd, monkeypatch):
    own = "no-norm=trajsep_ppo.py"
    for options, sentence in (
        ({"arms": ("everything",)}, "no arm everything; there are default, global"),
        ({"arms": ("lichen",), "flags": SMALL}, "lichen has --env-kwargs of its own"),
        ({"flags": "--exp-name 'a"}, "is no command: No closing quotation"),
        ({"arm": ("trajsep_ppo.py --gamma 1",)}, "a name and a command are needed"),
        ({"arm": ("a/b=trajsep_ppo.py",)}, "a name and a command are needed"),
        ({"arm": ("default=trajsep_ppo.py",)}, "there is an arm default already"),
        ({"arm": (own, own)}, "there is an arm no-norm already"),
        ({"arm": ("mine=my_ppo.py",)}, "there is no program my_ppo.py beside"),
    ):
        with pytest.raises(trajsep_ppo.Refused, match=sentence):
            ablation.main(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        ablation.main(arms=("cluster",), seeds=(1,), out=tmp_path / "out", flags="--gamma 2")
    assert "--gamma must be between 0 and 1" in capfd.readouterr().out  # the end of the log
    (tmp_path / "ablation.csv").write_text("a,b\n1,2\n")
    with pytest.raises(trajsep_ppo.Refused, match="is no table of ablation.py, it has no arm, "):
        plot.main((tmp_path,), tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        plot.start(plot.main)
    said = capfd.readouterr().err
    assert stop.value.code == 2 and "ablation.csv; ablation.py makes it" in said and said.count("\n") == 1


def test_nothing_is_overwritten_that_was_not_named(tmp_path, monkeypatch):
    """Neither what earlier calls wrote, nor what the repository holds."""
    monkeypatch.chdir(tmp_path)
    committed = [path for name in ("benchmark", "docs") for path in (ROOT / name).rglob("*.*")]
    before = [path.stat().st_mtime_ns for path in committed]
    for program, name in (
        (plot, "plot/ablation.md"),
        (plot, "plot/ablation.png"),
        (study, "study_page/study.md"),
        (figures, "figures/network.png"),
        (placement, "placement.png"),
        (throughput, "throughput/entities.json"),
        (reliability, "reliability/kill.json"),
    ):
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with pytest.raises(trajsep_ppo.Refused, match=f"runs/{name} is there already; `--out runs/"):
            program.main()
        assert path.read_bytes() == b""
        path.unlink()
    for options in ({"runs": (Path("a"),)}, {"runs": (Path("a"),) * 3}, {"out": Path("a")}):
        with pytest.raises(trajsep_ppo.Refused, match="three runs|no run in a"):
            bands.main(**options)
    for program in ("bands", "placement"):
        command = [sys.executable, ROOT / "benchmark" / f"{program}.py", "--help"]
        subprocess.run(command, check=True, capture_output=True)
    for program in (ROOT / "benchmark" / "bands.py", ROOT / "docs" / "diff.py"):
        done = subprocess.run([sys.executable, program, "--mistyped"], capture_output=True)
        assert done.returncode == 2
    assert [path.stat().st_mtime_ns for path in committed] == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_numbers_that_cannot_work(tmp_path, monkeypatch):
    """They are refused before anything is written or trained."""
    monkeypatch.chdir(tmp_path)
    for program, options, sentence in (
        (search, {"number": 0}, "--number must be at least 1"),
        (search, {"steps": 0}, "--steps a multiple of 1024"),
        (search, {"steps": 1536}, "--steps a multiple of 1024"),
        (placement, {"seed": -1}, "--seed must be between 0 and 4294967295, got -1"),
        (plot, {"results": ()}, "--results needs at least one folder"),
        (economy, {"runs": ()}, "name at least one run"),
        (economy, {"runs": ("a",), "maps": 0}, "--maps must be at least 1"),
        (economy, {"runs": ("a",), "first_map": -1}, "--first-map at least 0"),
        (reliability, {"kills": 0}, "--kills must be at least 1"),
        (other_games, {"parallel": 0}, "--parallel must be at least 1"),
    ):
        with pytest.raises(trajsep_ppo.Refused, match=sentence):
            program.main(**options, out=tmp_path / "out")
    monkeypatch.setattr(other_games, "GAMES", {"chess": ("Chess", "board", "no_such_module:Chess", 1024)})
    with pytest.raises(
        trajsep_ppo.Refused, match="chess needs pip install -r examples/board/requirements.txt .No module"
    ):
        other_games.main(("chess",), out=tmp_path / "games")


def test_placement(tmp_path, monkeypatch):
    """Factories have their order and are whole at the edge of the map; what is not allowed is not white."""
    figures = []
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    placement.main(out=tmp_path / "placement.png")
    for axes in figures[0].axes[:2]:
        numbers, squares = axes.texts, axes.patches
        assert [number.get_text() for number in numbers] == [str(1 + index) for index in range(len(squares))]
        assert len(squares) >= 4 and len({square.get_edgecolor() for square in squares[:2]}) == 2  # in turn
        assert not any(x.get_clip_on() for x in [*numbers, *squares])
    assert figures[0].axes[1].get_facecolor() == (0.75, 0.75, 0.75, 1) and "grey: not allowed" in axes.get_title()
    plot.plt.close("all")


def test_bands_of_ones_own_runs(tmp_path, capsys):
    """They are read, and kept only where it is said."""
    for number, name in enumerate("abc"):
        with trajsep_ppo.SummaryWriter(tmp_path / name) as writer:
            writer.add_scalar("charts/SPS", number, 10000)
    runs = tuple(tmp_path / name for name in "abc")
    bands.main(runs, tmp_path / "scalars.csv")
    row = "| `charts/SPS` | - | 0.05 to 0.95 | - | 2 to 2 |"
    assert row in capsys.readouterr().out
    assert [row["value"] for row in rows_of(tmp_path / "scalars.csv")] == ["0", "1", "2"]


def test_a_report_of_what_was_measured(tmp_path):
    """A person's copies in the folder are no measurements."""
    shutil.copy(ROOT / "benchmark" / "reliability" / "kill.json", tmp_path / "kill.json")
    shutil.copy(tmp_path / "kill.json", tmp_path / "kill copy.json")
    for program, steps, sentence in (
        (reliability, 8, "must be at least 80 for soak-engine"),
        (reliability, 1024, "must be at least 2048 for kill"),  # else the first checkpoint is the last
        (throughput, 100, "must be a multiple of 512"),
    ):
        with pytest.raises(trajsep_ppo.Refused, match=f"--steps {sentence}"):
            program.main(steps=steps, out=tmp_path)
    reliability.main(parts=(), out=tmp_path)
    assert (tmp_path / "report.md").read_text().count("20 of 20") == 1
    speeds = {"one process, one thread": [100], "two processes, a thread each": [150]}
    assert "The first 1,024 steps" in throughput.report_torchrun(speeds | {"steps": 1024})


def test_entities():
    """An update on a crowd of all kinds takes time and memory."""
    (update,) = throughput.entities((10,))["network"].values()
    assert update["seconds"] > 0 and update["memory_mb"] >= 0
    with pytest.raises(ChildProcessError, match="crowd_update failed"):  # and nobody waits for it
        throughput.in_a_process(throughput.crowd_update, "many")


def test_turns_of_the_bot(monkeypatch):
    """It is timed in a match that goes on, with as many robots as named, of both kinds, and it orders them all."""
    seen, ordered, engines = [], set(), []
    answer, refill = throughput.bot.Player.answer, throughput.refill

    def spy(player, line):
        orders = answer(player, line)
        board = engines[-1].state.board
        for name in ("rubble", "lichen"):  # it is told of every change
            np.testing.assert_array_equal(player.maps[name], getattr(board, name))
        units = json.loads(line)["obs"]["units"]["player_0"]
        seen.append([unit["unit_type"] for unit in units.values()])
        ordered.update(orders.keys() & units.keys())
        return orders

    monkeypatch.setattr(throughput.bot.Player, "answer", spy)
    monkeypatch.setattr(throughput, "refill", lambda engine, *args: engines.append(engine) or refill(engine, *args))
    seconds = throughput.bot_turns(40, 200)
    assert len(seconds) == len(seen) == 200 and min(seconds) > 0
    assert {len(kinds) for kinds in seen} == {40} and set(seen[0]) == {"LIGHT", "HEAVY"}
    assert len(ordered) >= 40
    measured = {"turns": {"200": [0.001] * 98 + [0.1, 0.3]}}
    assert "| 200 | 100 | 1 | 102 | 300 |" in throughput.report_bot(measured)


def test_memory_is_a_goal_of_long_runs(tmp_path, monkeypatch, capsys):
    """While a program still starts, its memory grows."""
    monkeypatch.setattr(luxai_s2.env, "validate_actions", luxai_s2.env.validate_actions)  # puts it back
    monkeypatch.setattr(reliability, "memory_of", lambda pid, sizes=itertools.count(100): next(sizes))
    reliability.main(parts=("soak-engine",), steps=80, out=tmp_path)
    assert "passed: 80 steps: orders" in (said := capsys.readouterr().out) and "(no goal in a short run)" in said
    monkeypatch.setitem(reliability.PARTS, "soak-engine", (reliability.soak_engine, 80, 80))
    with pytest.raises(SystemExit, match="missed the goal: soak-engine"):
        reliability.main(parts=("soak-engine",), out=tmp_path)


def test_a_reproduction_can_be_tried(tmp_path, monkeypatch):
    """In small it runs the same programs, each with flags that it takes; a missed goal costs none of them."""
    fake = tmp_path / "bin" / "python"  # notes its command; reliability.py misses its goal
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf \'%s\\0\' "$@" END >> "$LOG"\ncase $1 in *reliability.py) exit 1; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")

    def reproduce(*words):
        monkeypatch.setenv("LOG", str(log := tmp_path / "_".join(["log", *words])))
        command = ["bash", ROOT / "benchmark" / "reproduce.sh", *words, tmp_path / "my results"]
        done = subprocess.run(command, capture_output=True, text=True)
        calls = [call.strip("\0").split("\0") for call in log.read_text().split("END\0")[:-1]]
        return done, [call for call in calls if call[0] != "-c"]

    (done, full), (_, small) = reproduce(), reproduce("--try")
    assert [program for program, *_ in small] == [program for program, *_ in full]
    for program, *flags in full + small:
        module = importlib.import_module(Path(program).stem)
        main = (
            module.Args if hasattr(module, "Args") else wraps(module.main)(lambda **options: SimpleNamespace(**options))
        )
        options = tyro.cli(main, args=flags)
        assert "my results" in str(options.out) and set(getattr(options, "arms", ())) <= {*ablation.ARMS, *compare.ARMS}
    programs = {path.name for path in (ROOT / "benchmark").glob("*.py")}
    assert done.returncode == 1 and done.stdout.count("\n$ python ") == len(full)
    assert done.stdout.count("\ntook ") == len(full) - 1 and "seconds in all" in done.stdout
    made_by_hand = {"bands.py", "credit.py", "economy.py", "figures.py", "match.py", "page.py"}
    assert {Path(program).name for program, *_ in full} == programs - made_by_hand | {"compare.py", "armies.py"}


def test_battle(tmp_path, monkeypatch, capsys):
    """Without magent2 a sentence; what is there already is said; copies are neither read nor removed."""
    args = compare.Args(out=tmp_path / "out", work=tmp_path / "work")
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(trajsep_ppo.Refused, match="pip install -r examples/battle/requirements.txt"):
        compare.main(args)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: True)
    args.out = ROOT / "benchmark" / "battle_81"
    compare.main(args)
    assert "already; another --out and --work make it again" in capsys.readouterr().out

    def popen(command, cwd, **_):
        for name in ("a__1__2", "a__1__2 copy"):
            (cwd / "runs" / name).mkdir(parents=True)
        for name in ("a__1__2/checkpoint_512.pt", "a__1__2/checkpoint_512 copy.pt", "a__1__2 copy/checkpoint_1024.pt"):
            (cwd / "runs" / name).touch()
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(compare.subprocess, "Popen", popen)
    folder = args.work / "global_1"
    folder.mkdir(parents=True)
    for name in COPIES:
        (folder / name).touch()
    assert compare.train(args, "global", 1, 512) == folder
    assert {path.name for path in folder.glob("*.pt")} == {"checkpoint_512.pt", *COPIES}
    with pytest.raises(trajsep_ppo.Refused, match="holds a training with other flags"):
        compare.train(args, "global", 1, 1024)


def test_lost_checkpoints(tmp_path, capfd, monkeypatch):
    """A training is not evaluated if checkpoints were removed before they were kept."""
    keep = ablation.keep

    def keep_late(folder):
        if any(folder.glob("runs/*/*_256.pt")):
            keep(folder)

    monkeypatch.setattr(ablation, "SAVE_EVERY", 1)
    monkeypatch.setattr(ablation, "keep", keep_late)
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        ablation.main(arms=("global",), seeds=(1,), out=tmp_path, flags=TINY)
    assert "2 checkpoints were removed before they were kept" in capfd.readouterr().out
    assert rows_of(tmp_path / "runs.csv") == []


def made_up(folder, lengths):
    """ablation.csv with 10 matches an evaluation: {arm: {seed: {step: lengths of the matches}}}."""
    with open(folder / "ablation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ablation.COLUMNS, restval=0)
        writer.writeheader()
        for arm, seeds in lengths.items():
            for seed, steps in seeds.items():
                for step, matches in steps.items():
                    start = {"arm": arm, "seed": seed, "global_step": step}
                    start["train_seconds"] = step / 100
                    for index, length in enumerate(matches):
                        for player in range(2):  # players have 1000 ice more and less than the mean
                            row = {"match_seed": index, "player": player, "starting_factories": 4}
                            ice = 10 * length + (1000 if player else -1000) + 100 * seed
                            row |= {"ice_transferred": ice, "ice_per_factory": ice / 4}
                            row |= {"episode_length": length, "factories_alive": length / 250}
                            row["factories_alive_share"] = length / 1000
                            writer.writerow(start | row | {"policy": "sampled"})
                            if step == 4096:
                                row["ice_transferred"] += 400
                                row["ice_per_factory"] += 100
                                writer.writerow(start | row | {"policy": "greedy"})


def test_tables_of_known_numbers(tmp_path, capfd):
    full = [1000] * 10
    default = {
        1: {1024: [200] * 10, 2048: [1000] + [400] * 9, 4096: full},
        2: {1024: [200] * 10, 2048: [600] * 10, 4096: full},
    }
    slow = {1: {1024: [200] * 10, 2048: [200] * 10, 4096: [200, 600] * 5}}
    cut_off = {1: {1024: full}}  # its last checkpoint is not evaluated yet
    made_up(tmp_path, {"default": default, "global": slow, "separate": slow, "cluster": cut_off})
    plot.main((tmp_path,), tmp_path)
    cells, section = {}, ""  # (section, first cell) -> the other cells
    for line in (tmp_path / "ablation.md").read_text().splitlines():
        section = line if line.startswith("## ") else section
        if line.startswith("| "):
            first, *others = line.strip("| ").split(" | ")
            cells[section, first] = others
    name = plot.ARMS["default"][0]
    final, speed = "## Final policy, sampled actions", "## Speed of learning"
    # 10,000 ice + 100 or 200 by seed, a quarter of that per factory; 12.7 standard errors of 50 ice
    row = ["2", "1,000 (1,000 to 1,000)", "10,150 (9,515 to 10,785)", "2,538 (2,379 to 2,696)"]
    assert cells[final, name] == [*row, "1.00 (1.00 to 1.00)"]
    row = "1 | 400 (249 to 551) | 4,100 (2,592 to 5,608)"  # of ten maps, 2.26 standard errors
    assert " | ".join(cells[final, "global trajectory"][:3]) == row
    # Full-length: seed 1 has 10% at 2048, seed 2 none; both have all at 4096. Length 500: from 200 at
    # 1024 to 460 and 600 at 2048, and to 1,000 at 4096.
    row = ["2", "2,150 (2,048 to 2,253)", "3,988 (3,982 to 3,994)", "1,996 (1,792 to 2,200)"]
    assert cells[speed, name] == [*row, "never", "41 (41 to 41)"]
    assert cells[speed, "global trajectory"][1:5] == ["never"] * 4
    assert cells["## Final policy, most likely actions", name][1] == "1,000 (1,000 to 1,000)"
    captured = capfd.readouterr()
    assert "by cluster" not in captured.out and "left out: cluster seed 1\n" in captured.err


def test_one_picture_of_several_folders(tmp_path, monkeypatch, capsys):
    """Each arm has a label and a look of its own, and an arm with one checkpoint is a point."""
    curve, point = {1: {1024: [200] * 10, 2048: [1000] * 10}}, {1: {2048: [500] * 10}}
    for name, arms in (("a", {"default": curve, "mine": point, "top-2": curve}), ("b", {"default": curve})):
        (tmp_path / name).mkdir()
        made_up(tmp_path / name, arms)
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    plot.main((tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    assert "| mine | 1 | 500 (500 to 500) |" in capsys.readouterr().out
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 10_000
    (figure,) = drawn
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    default, other = plot.ARMS["default"][0], plot.ARMS["top-2"][0]
    assert labels == [f"{default} ({tmp_path / 'a'})", other, "mine", f"{default} ({tmp_path / 'b'})"]
    lines = figure.axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 4
    assert {line.get_marker() for line in lines} == {"o"} and lines[2].get_xydata().tolist() == [[2.048, 500]]
    assert len(set(map(str, plot.styles([f"arm {number}" for number in range(99)])))) == 99


def test_the_authors_stand_beside_the_lines(tmp_path, monkeypatch):
    """Both of their values, named, at the last step; of our lines none hides another."""
    short = {1: {1024: [200] * 10, 4096: [1000] * 10}}
    made_up(tmp_path, {"default": short, "global": short})
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    figures.draw_result(plot.load(tmp_path / "ablation.csv")[0], tmp_path / "result.png")
    for axis, values in zip(drawn[0].axes, ([1000, 466], [44472, 3066])):
        marks = [line for line in axis.lines if line.get_marker() == "D"]
        lines = [line for line in axis.lines if line not in marks]
        assert [mark.get_xydata().tolist() for mark in marks] == [[[4.096, value]] for value in values]
        assert [mark.get_color() for mark in marks] == [line.get_color() for line in lines]
        assert [text.get_text() for text in axis.texts] == [f"{value:,}" for value in values]
        assert axis.get_ylim()[1] > max(values)
        assert len({line.get_linestyle() for line in lines}) == len(lines) == 2


def test_a_film_is_shortened(tmp_path):
    """Every third picture, the last one for longer, in colours that are the same in all."""
    pictures = [Image.new("RGB", (8, 8), (10 * number, 100, 200)) for number in range(8)]
    pictures[0].save(tmp_path / "long.gif", save_all=True, append_images=pictures[1:], duration=50)
    figures.shorten(tmp_path / "long.gif", tmp_path / "short.gif")
    with Image.open(tmp_path / "short.gif") as film:
        shown = [(one.convert("RGB").getpixel((4, 4)), one.info["duration"]) for one in ImageSequence.Iterator(film)]
    assert shown == [((10 * number, 100, 200), 120 if number < 7 else 2500) for number in (0, 3, 6, 7)]


def test_comparison_of_known_numbers(tmp_path):
    """Steps are medians over seeds of where each gets there; shares are of teams."""
    full = [1000] * 10
    short = [200] * 10
    default = {1: {1024: short, 2048: full, 4096: full}, 2: {1024: short, 2048: short, 4096: full}}
    slow = {1: {1024: [400] * 10, 2048: [400] * 10, 4096: [400] * 9 + [1900]}}  # a mean of 550
    made_up(tmp_path, {"default": default, "global": slow})
    made = figures.comparison(*plot.load(tmp_path / "ablation.csv")).splitlines()
    rows = [line.strip("| ").split(" | ") for line in made[2:]]
    table = {first: others for first, *others in rows}
    # 3/8 of the way from 200 to 1,000, within 1,024 and within 2,048 steps; two thirds of the way
    # from 400 to 550.
    row = ["2,112 (1,408 to 2,816)", "3,413", "1.6"]
    assert table["steps to a mean length of 500"] == row
    full_length = table["steps to 95% full-length matches"]
    assert full_length[:2] == ["2,995 (1,997 to 3,994)", "never"]
    assert table["steps to 10,000 ice per starting factory"] == ["never", "never", "-"]
    # A quarter of 10,100, 10,200 and 5,600 ice.
    row = ["2,538 (2,525 to 2,550)", "1,400 (1,400 to 1,400)", "0.55"]
    assert table["final ice per starting factory"] == row
    row = ["2,638 (2,625 to 2,650)", "1,500 (1,500 to 1,500)", "0.57"]
    assert table["the same with greedy actions"] == row
    of_each = table["ice per starting factory, greedy over sampled, of each seed"]
    assert of_each == ["103.9% to 104.0%", "107.1% to 107.1%", "-"]
    assert table["teams that lose a factory"] == ["0.0% (0.0% to 0.0%)", "90.0% (90.0% to 90.0%)", "-"]
    method = figures.results(*plot.load(tmp_path / "ablation.csv")).splitlines()[2]
    means = [cell.split(" (")[0] for cell in method.strip("| ").split(" | ")]
    assert means == ["`trajsep_ppo.py`", "1,000", "10,150", "10,550", "2,538", "2,995"]
    rows = figures.larger_teams(*plot.load(tmp_path / "ablation.csv")).splitlines()[2:]
    rows = [[cell.split(" (")[0] for cell in row.strip("| ").split(" | ")] for row in rows]
    assert rows[0] == ["20% of the reward", "2", "10,150", "1.0", "10,550", "2,538", "1.00"]
    assert rows[1] == ["reward, value, ratio, entropy, dones", "1", "5,600", "1.8", "6,000", "1,400", "0.55"]
    assert len(rows) == 2  # the arms that were run


def match_rows(opponent, **games):
    """Rows of match.py: bot -> results of its games; own lichen 2,000, 3,000, ..., the opponent's 100."""
    rows = []
    for bot, results in games.items():
        for game, result in enumerate(results):
            own = {"bot": bot, "result": result, "lichen": str(2000 + 1000 * game)}
            other = {"bot": opponent, "result": {"win": "loss", "loss": "win"}.get(result, result), "lichen": "100"}
            rows += [other, own] if game % 2 else [own, other]
    return rows


def test_real_game(tmp_path):
    """Each arm's games from either side, with the wins of each seed; against the method, those that the arm wins."""
    lengths = dict(zip(("default", *figures.RELATIVES), (1000, 800, 600, 500)))
    made_up(tmp_path, {arm: {seed: {4096: [length] * 10} for seed in (1, 2)} for arm, length in lengths.items()})
    rows = plot.read_csv(path := tmp_path / "ablation.csv")
    for row in rows:  # 500 less for the second seed, and as much more for the second player as the first has less
        row["lichen"] = 5 * int(row["episode_length"]) - 500 * (row["seed"] == "2") + 300 * (2 * int(row["player"]) - 1)
    plot.write_csv(path, ablation.COLUMNS, rows)
    results = {"default": "win win", "global-reward": "win draw", "global-critic-reward": "win loss", "global": "loss"}
    games = {f"{arm}__{seed}": text.split() for arm, text in results.items() for seed in (12, 11)}
    games["global__12"] = ["loss", "loss", "win"]
    strong = match_rows("strong", **games)
    duels = [match_rows("default__11", **{f"{arm}__11": games[f"{arm}__12"]}) for arm in figures.RELATIVES]
    table = figures.real_game(*plot.load(path), strong, sum(duels, [])).splitlines()
    cells = [[cell.split(" (")[0] for cell in row.strip("| ").split(" | ")] for row in table[2:]]
    assert [row[1:3] for row in cells] == [["4,750", "1.00"], ["3,750", "0.80"], ["2,750", "0.60"], ["2,250", "0.50"]]
    assert [row.strip("| ").split(" | ")[3:] for row in table[2:]] == [
        ["4 of 4 (2, 2)", "2,500", "100", "-"],
        ["2 of 4 (1, 1)", "2,500", "100", "1 of 2"],
        ["2 of 4 (1, 1)", "2,500", "100", "1 of 2"],
        ["1 of 4 (0, 1)", "2,750", "100", "1 of 3"],
    ]


def test_why(tmp_path):
    """Means of the seeds on each map, of each arm in its column; battles count at the last step, against one enemy."""
    relatives = ("global-reward", "global-critic-reward", "global")
    lengths = dict(zip(("default", *relatives), (1000, 800, 600, 500)))
    lengths |= {study.IN_THEIR_REGIME[arm]: 400 - i for i, arm in enumerate(("separate", *relatives))}
    arms = {arm: {seed: {4096: [length] * 10} for seed in (1, 2)} for arm, length in lengths.items()}
    made_up(tmp_path, arms)
    data, last = plot.load(tmp_path / "ablation.csv")
    made_up(tmp_path, {arm: {1: {2048: [length] * 10}} for arm, length in zip(lengths, (900, 700, 300, 200))})
    columns = ("arm", "opponent", "global_step", "won", "seed")
    battles = [
        dict(zip(columns, row)) for row in itertools.product(("separate", "ippo"), ("frozen",), (1, 2), (0.5,), (1,))
    ]
    battles += [dict(zip(columns, row)) for row in (("mappo", "frozen", 2, 1, 1), ("global", "frozen", 2, 0, 1))]
    battles += [dict(zip(columns, row)) for row in (("separate", "frozen", 2, 1, 1), ("ippo", "random", 2, 0, 1))]
    larger, names = plot.load(tmp_path / "ablation.csv"), ("default__1", "default__2", *(f"{x}__1" for x in relatives))
    won = (["win"] * 3, ["loss"], ["win", "draw"], ["loss", "loss", "loss", "win"], ["loss"])
    strong = match_rows("strong", **dict(zip(names, won)))
    rows = figures.why(data, last, larger, strong, battles).splitlines()
    cells = [row.removesuffix(" |").split(" | ")[-4:] for row in rows]
    assert cells[0] == ["this method", "as in IPPO", "as in MAPPO", "one trajectory"] and len(rows) == 8
    assert cells[2] == ["44,472", "9,614", "2,643", "3,066"]
    assert cells[3] == ["4,150", "4,140", "4,130", "4,120"]
    assert cells[4] == ["10,150", "8,150", "6,150", "5,150"]
    assert cells[5] == ["9,100", "7,100", "3,100", "2,100"]
    assert cells[6] == ["50%", "50%", "25%", "0%"]  # of seeds, however many games each has
    assert cells[7] == ["75%", "50%", "100%", "0%"]


def test_waiting_by_hand(tmp_path):
    """The seeds' ice for each of four factories, and the seed that keeps least of it with greedy actions."""
    full = {4096: [1000] * 10}
    arms = {arm: {1: full} for arm in ("default", "global", "global-may-wait")}
    arms["may-wait"] = {1: full, 2: {4096: [1000] * 9 + [200]}}
    made_up(tmp_path, arms)
    rows = plot.read_csv(path := tmp_path / "ablation.csv")
    for row in rows:
        if (row["arm"], row["seed"], row["policy"]) == ("may-wait", "2", "greedy"):
            row["ice_per_factory"] = 1175  # half of what it is with sampled actions
    plot.write_csv(path, ablation.COLUMNS, rows)
    rows = figures.waiting(*plot.load(path)).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["1", "2", "1", "1"]
    assert rows[0].endswith("| 2,525 (2,525 to 2,525) | 2,625 (2,625 to 2,625) | 104% | 100% |")
    assert rows[1].endswith("| 2 | 2,438 (2,350 to 2,525) | 1,900 (1,175 to 2,625) | 50% | 95% |")
    assert rows[1].startswith("| the same, factories may wait |") and rows[2].startswith("| `global_ppo.py`")


def test_the_page_of_results_shows_what_the_data_says():
    """Its three tables of ice are what figures.py makes of the matches that are kept."""
    text, (data, last) = (ROOT / "docs" / "results.md").read_text(), plot.load(figures.RESULTS / "ablation.csv")
    assert figures.comparison(data, last) in text and figures.waiting(data, last) in text
    assert figures.larger_teams(*plot.load(figures.NEURIPS / "ablation.csv")) in text


def test_the_page_of_results_shows_the_search():
    """Its tables are those of the kept matches; at each setting the method has more, and so have its best in full."""
    text, commands = (ROOT / "docs" / "results.md").read_text(), search.all_commands()
    folder = ROOT / "benchmark" / "search"
    tried, winners = search.report(folder, commands).strip().split("\n\n")
    assert tried in text and winners in text
    method, baseline = (search.found(folder / "search", script) for script in search.SCRIPTS)
    ratios = [method[f"method-{i}"] / baseline[f"baseline-{i}"] for i in range(search.SETTINGS)]
    assert f"the method has more ice, {min(ratios):.1f} to {max(ratios):.0f} times the baseline's" in text
    in_full = search.final_ice(folder / "winners")
    best = [max(in_full[name].mean() for name in [*ice][: search.BEST]) for ice in (method, baseline)]
    assert "the method ends with {:,.0f} ice and the baseline with {:,.0f}: {:.1f} times".format(
        *best, best[0] / best[1]
    ) in " ".join(text.split())


def test_search(tmp_path, monkeypatch):
    """The same settings for both scripts; the best of each, by the ice of the search, train in full."""
    made = search.settings()
    assert len(set(made)) == len(made) == search.SETTINGS
    for words in made:
        args = tyro.cli(global_ppo.Args, args=words.split())
        assert args.num_steps // args.num_minibatches == 4  # 64 steps of 16 matches
    assert tyro.cli(trajsep_ppo.Args, args=made[0].split()) == trajsep_ppo.Args()
    ice = {"method-0": 1, "method-1": 5, "baseline-0": 9, "baseline-1": 3, "method-2": 4}
    asked = []

    def ablate(arm, out, **options):
        asked.append((arm, options))
        out.mkdir(parents=True)
        made_up(out, {name.split("=")[0]: {1: {4096: [ice[name.split("=")[0]] * 100] * 10}} for name in arm})

    monkeypatch.setattr(ablation, "main", ablate)
    monkeypatch.setattr(search, "BEST", 1)
    search.main(tmp_path, number=2, seeds=(11,))
    (tried, first), (trained, second) = asked
    assert [name.split("=")[0] for name in tried] == ["method-0", "method-1", "baseline-0", "baseline-1"]
    assert trained == (tried[1], tried[2])
    assert (first["seeds"], first["first_map"], second["seeds"]) == ((1,), 0, (11,)) and "first_map" not in second
    head, _, method, baseline, _, _, _, *rows = (tmp_path / "search.md").read_text().splitlines()
    assert method == "| `trajsep_ppo.py` | 5,100 | 3,100 | 1,100 | 1,100 (place 2 of 2) |"
    assert baseline == "| `global_ppo.py` | 9,100 | 6,100 | 3,100 | 9,100 (place 1 of 2) |"
    assert rows[0].startswith(f"| `{tried[1].split('=', 1)[1]}` | 5,100 | 5,100 (") and len(rows) == 2
    assert rows[1].startswith(f"| `{tried[2].split('=', 1)[1]}` | 9,100 | 9,100 (")
