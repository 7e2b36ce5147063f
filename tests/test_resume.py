"""Runs that are stopped, killed and resumed, or that meet a fault: they come out the same, or say what is wrong."""

import contextlib
import dataclasses
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import masked_random, parameters_at_start, scripted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_learning import train_on_toy
from test_scripts import refused, run

import global_ppo
import lux_wrapper as lux
import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"trajsep_ppo": trajsep_ppo, "global_ppo": global_ppo}
LAST = 512  # 8 updates of 2 matches x 32 steps; both matches end once, after 151 steps
TINY = ("--num-envs", "2", "--num-steps", "32", "--num-minibatches", "2", "--eval-episodes", "1", "--save-every", "1")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and torchrun are tested on Linux")


@pytest.fixture
def start(tmp_path):
    """Function (*arguments of Python) -> a process in tmp_path, in a group of its own that ends with the test."""
    processes = []

    def start(*arguments):
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def script(name, *flags, last=LAST):
    return ROOT / f"{name}.py", *TINY, "--total-timesteps", last, *flags


def wait_for_checkpoint(process, run_dir, step=64):
    """Wait until a run has written the checkpoint of `step` or a later one; the run's folder."""
    deadline = time.time() + 120
    while True:
        for path in run_dir.glob("runs/*/checkpoint_*.pt"):
            if int(path.stem.split("_")[1]) >= step:
                return path.parent
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)


def finish(process, code=0, timeout=120):
    """Wait for the end; what it printed."""
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == code, errors
    assert "Traceback" not in errors and "Warning" not in errors
    return output, errors


def step_of(run_dir):
    """The step of a run's newest checkpoint."""
    return int(trajsep_ppo.checkpoints(run_dir)[-1].stem.split("_")[1])


def results(run_dir):
    """Everything a run leaves that must not depend on whether it was stopped, as plain values and tensors."""
    checkpoint = torch.load(trajsep_ppo.checkpoints(run_dir)[-1], weights_only=True)
    events = EventAccumulator(str(run_dir)).Reload()
    logged = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "charts/SPS"  # that is time
    }
    speeds = [event.step for event in events.Scalars("charts/SPS")]
    assert events.Tags()["tensors"] == ["hyperparameters/text_summary"]
    files = sorted(path.name for path in run_dir.iterdir() if "tfevents" not in path.name)
    del checkpoint["train_seconds"], checkpoint["args"]["num_workers"]
    return files, logged, speeds, (run_dir / "evaluation.json").read_text(), checkpoint


def assert_same(one, other, where="run"):
    """Equal to the last bit, whatever is nested in what."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{where}/{index}")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Function name -> results of a run that was never stopped."""
    done = {}

    def train(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            command = [sys.executable, *map(str, script(name, "--num-workers", 0))]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
            done[name] = results(next(folder.glob("runs/*")))
            assert len(done[name][1]["charts/episodic_length"]) == 2
        return done[name]

    return train


# ------------------------------------------------------------------------------------------------------
# Going on
# ------------------------------------------------------------------------------------------------------


def stop(process, run_dir, how):
    """Stop a run at a random moment and check what it says."""
    time.sleep(random.uniform(0, 0.15))
    if how == signal.SIGKILL:
        process.kill()
        process.communicate()
        return
    os.killpg(process.pid, how)  # all processes get it, as from a terminal
    output, _ = finish(process, 128 + how)
    step, line = step_of(run_dir), output.strip().splitlines()[-1]
    assert line == f"stopped at step {step}; go on with: python {process.args[1]} --resume runs/{run_dir.name}"


@pytest.mark.parametrize(
    "name, stops",
    [("trajsep_ppo", (signal.SIGKILL, signal.SIGINT)), ("global_ppo", (signal.SIGTERM, signal.SIGKILL))],
)
def test_stopped_at_random_moments(name, stops, undisturbed, start, tmp_path):
    """Killed, interrupted, terminated: all that is there in the end is as if nothing had happened.

    The number of workers changes from one time to the next.
    """
    process, reached = start(*script(name, "--num-workers", 2)), 0
    for workers, how in enumerate(stops):
        run_dir = wait_for_checkpoint(process, tmp_path, reached + 64)
        stop(process, run_dir, how)
        reached = step_of(run_dir)
        process = start(ROOT / f"{name}.py", "--resume", f"runs/{run_dir.name}", "--num-workers", workers)
    output, _ = finish(process)
    assert f"writing to runs/{run_dir.name}, from step {reached} of {LAST} on" in output
    assert_same(results(run_dir), undisturbed(name))


def test_the_second_interrupt_ends_at_once():
    """The first is only noted, so that the update is finished; whoever presses Ctrl-C again does not wait for it."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        trajsep_ppo.catch_signals(caught := [])
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM, signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        trajsep_ppo.catch_signals(caught := [])
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def test_two_processes(start, tmp_path):
    """Under torchrun, SIGTERM to its agent stops both after the same update, and both go on from the same one."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    expected = start(*launch, *script("trajsep_ppo", "--exp-name", "expected", "--num-workers", 0, last=192))
    process = start(*launch, *script("trajsep_ppo", "--exp-name", "stopped", "--num-workers", 0, last=192))
    while not list(tmp_path.glob("runs/stopped*/checkpoint_*.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    (run_dir,) = tmp_path.glob("runs/stopped*")
    assert process.returncode != 0 and output.count("stopped at step") == 1
    again = start(*launch, ROOT / "trajsep_ppo.py", "--resume", run_dir)
    finish(again)
    finish(expected)
    got, want = results(run_dir), results(next(tmp_path.glob("runs/expected*")))
    for _, _, _, _, checkpoint in (got, want):
        del checkpoint["args"]
    assert_same(got, want)


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_an_environment_without_state(script, monkeypatch, tmp_path):
    """Training goes on with parameters, optimizer and counters; matches that cannot be saved are started anew."""
    agent = train_on_toy(monkeypatch, script, tmp_path / "run", seed=1, total_timesteps=240, save_every=1)
    path, checkpoint, _ = script.load_checkpoint(tmp_path / "run")
    assert checkpoint["matches"] is None and checkpoint["global_step"] == 240
    args = script.Args(**(checkpoint["args"] | {"total_timesteps": 320}))
    longer = script.train(args, str(tmp_path / "run"), torch.device("cpu"), checkpoint)
    _, checkpoint, _ = script.load_checkpoint(tmp_path / "run")
    assert checkpoint["global_step"] == 320
    assert any(not torch.equal(a, b) for a, b in zip(agent.parameters(), longer.parameters()))


# ------------------------------------------------------------------------------------------------------
# Matches
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_robots": 20}, {"group_by": "cluster", "safe_masks": False, "max_robots": 6}])
def test_matches_go_on_bit_for_bit(options):
    """Matches of different ages, rebuilt by other numbers of workers: what follows is what followed in the first."""
    rng = np.random.default_rng(5)

    def actions(obs):
        chosen = scripted(obs) if "group_by" not in options else masked_random(rng, obs["action_mask"])
        chosen[1] = 0  # idle: it is over after some 150 steps
        return chosen

    def copies(arrays):
        return {key: array.copy() for key, array in arrays.items()}

    env = lux.LuxVecEnv(3, num_workers=2, **options)
    obs, _ = env.reset(seed=31)
    for _ in range(160):
        obs, *_ = env.step(actions(obs))
    state, seen = env.state(), [copies(obs)]
    assert len({len(match["actions"]) for match in state}) > 1 and state[1]["played"] == 2
    assert all(match["actions"].dtype == np.int8 for match in state)
    played = []
    for _ in range(40):
        played.append(actions(obs))
        obs, *rest = env.step(played[-1])
        seen.append([copies(obs), *[x if isinstance(x, dict) else x.copy() for x in rest]])
    env.close()

    for shares in (((0, 3, 0),), ((0, 1, 1), (1, 2, 2))):  # all in one environment, and as of two processes
        envs = [lux.LuxVecEnv(n, num_workers=workers, first_match=first, **options) for first, n, workers in shares]
        got = [env.load_state(state[first : first + n])[0] for env, (first, n, _) in zip(envs, shares)]
        for (first, n, _), env, obs in zip(shares, envs, got):
            for key, array in seen[0].items():
                assert (obs[key] == array[first : first + n]).all(), key
            for step, (expected, rewards, terminated, truncated, infos) in zip(played, seen[1:]):
                part = slice(first, first + n)
                obs, got_rewards, got_terminated, _, got_infos = env.step(step[part])
                assert all((obs[key] == array[part]).all() for key, array in expected.items())
                assert (got_rewards == rewards[part]).all() and (got_terminated == terminated[part]).all()
                for key, x in got_infos.get("episode", {}).items():
                    ended = got_infos["_episode"]
                    assert (x[ended] == infos["episode"][key][part][ended]).all(), key
            env.close()


def test_held_out_matches_go_on():
    """The maps that come next are those that would have come."""
    env = lux.LuxVecEnv(2, num_workers=0, held_out=True)
    obs, _ = env.reset(seed=3)
    for _ in range(155):
        obs, *_ = env.step(np.zeros_like(obs["kind"]))
    other = lux.LuxVecEnv(2, num_workers=0, held_out=True)
    other.load_state(env.state())
    for one, two in zip(env.matches.matches, other.matches.matches):
        assert one.seed == two.seed and one.next_seed() == two.next_seed()


# ------------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------------


def small_run(folder, steps=(64, 128), **changes):
    """A run folder with checkpoints of the right form."""
    folder.mkdir()
    for step in steps:
        checkpoint = {"args": dataclasses.asdict(trajsep_ppo.Args(seed=7)), "model": parameters_at_start()}
        checkpoint |= {"optimizer": {}, "global_step": step, "train_seconds": 1.0, "matches": []}
        checkpoint["torch_rng"] = torch.zeros(0)
        torch.save(checkpoint | changes, folder / f"checkpoint_{step}.pt")
    return folder


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--resume nowhere", "nowhere"),
        ("--resume empty", "no checkpoint in empty"),
        ("--resume run --learning-rate 0.1", "--learning-rate"),
        ("--resume run --seed 1", "--seed cannot be changed with --resume; this run has 7"),  # a default is a flag too
        ("--resume run --evaluate run", "--evaluate"),
        ("--resume run --num-workers -1", "num-workers"),
    ],
)
def test_bad_resume(flags, named, monkeypatch, capfd, tmp_path):
    small_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert named in refused("trajsep_ppo", flags.split(), monkeypatch, capfd, tmp_path)


def test_a_run_of_the_other_script(monkeypatch, capfd, tmp_path):
    small_run(tmp_path / "run")
    assert "another script" in refused("global_ppo", ["--resume", "run"], monkeypatch, capfd, tmp_path)


@pytest.mark.parametrize("odd", [{"top_samples": -1}, {"gamma": 2.0}, {"seed": None}])
def test_arguments_of_a_checkpoint_are_held_to_what_they_may_be(odd, tmp_path):
    run_dir = small_run(tmp_path / "run", args=dataclasses.asdict(trajsep_ppo.Args(**odd)))
    with pytest.raises(trajsep_ppo.Refused):
        trajsep_ppo.load_checkpoint(run_dir)


def test_a_checkpoint_with_an_option_that_the_environment_does_not_know(tmp_path):
    run_dir = small_run(tmp_path / "run", args=dataclasses.asdict(trajsep_ppo.Args(group_by="banana")))
    process = run("trajsep_ppo", tmp_path, "--evaluate", str(run_dir))
    assert process.returncode == 1 and "group_by must be one of" in process.stderr and "Traceback" not in process.stderr


def test_a_checkpoint_does_not_say_what_to_do(tmp_path):
    """One whose arguments carry --evaluate or --resume is resumed all the same."""
    args = dataclasses.asdict(trajsep_ppo.Args(evaluate="elsewhere", resume="elsewhere"))
    _, _, args = trajsep_ppo.load_checkpoint(small_run(tmp_path / "run", args=args))
    assert args.evaluate is None and args.resume is None


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, empty])
def test_the_one_before_a_damaged_checkpoint(damage, capsys, tmp_path):
    """The newest whole one is used, and one line says so for each that is not; with none left it is an error."""
    run_dir = small_run(tmp_path / "run", steps=(64, 128, 1024))
    damage(run_dir / "checkpoint_1024.pt")
    path, checkpoint, args = trajsep_ppo.load_checkpoint(run_dir)
    assert path.name == "checkpoint_128.pt" and checkpoint["global_step"] == 128 and args.seed == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint_1024.pt is damaged" in line
    for step in (64, 128):
        damage(run_dir / f"checkpoint_{step}.pt")
    with pytest.raises(trajsep_ppo.Refused):
        trajsep_ppo.load_checkpoint(run_dir)


# ------------------------------------------------------------------------------------------------------
# Faults
# ------------------------------------------------------------------------------------------------------


def fill_the_disk(process, run_dir):
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond this


def remove_the_folder(process, run_dir):
    shutil.rmtree(run_dir)


@pytest.mark.parametrize("fault", [fill_the_disk, remove_the_folder])
def test_nothing_can_be_saved(fault, start, tmp_path):
    """One sentence, an exit code, no process left, and what was saved before is whole.

    TensorBoard's own thread may have more to say before it.
    """
    process = start(*script("trajsep_ppo", "--num-workers", 2, last=10**6))
    run_dir = wait_for_checkpoint(process, tmp_path)
    fault(process, run_dir)
    _, errors = process.communicate(timeout=30)
    (sentence,) = re.findall("error: .*", errors)
    assert process.returncode == 1
    assert str(run_dir.relative_to(tmp_path)) in sentence
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    if fault is fill_the_disk:
        assert not list(run_dir.glob("*.tmp"))
        trajsep_ppo.load_checkpoint(run_dir)


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite(script, number, monkeypatch, tmp_path):
    """The update is named, and the checkpoint of the update before it is the last one."""
    compute_gae, calls = script.compute_gae, []

    def spoiled(*args):
        calls.append(args)
        return compute_gae(*args) * (number if len(calls) == 3 else 1)

    monkeypatch.setattr(script, "compute_gae", spoiled)
    with pytest.raises(FloatingPointError, match="in update 3"):
        train_on_toy(monkeypatch, script, tmp_path / "run", seed=1, total_timesteps=800, save_every=1)
    _, checkpoint, _ = script.load_checkpoint(tmp_path / "run")
    assert checkpoint["global_step"] == 160 and all(x.isfinite().all() for x in checkpoint["model"].values())


def test_a_gradient_that_is_not_finite(monkeypatch, tmp_path):
    """One that only shows when the loss is differentiated changes no parameter: it is seen before the step."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def spoiled(parameters, norm):
        parameters = list(parameters)
        calls.append(norm)
        if len(calls) == 3:
            parameters[0].grad.view(-1)[0] = np.nan
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    options = {"num_minibatches": 1, "update_epochs": 1, "save_every": 1, "total_timesteps": 800}
    with pytest.raises(FloatingPointError, match="in update 3"):
        train_on_toy(monkeypatch, trajsep_ppo, tmp_path / "run", seed=1, **options)
    assert trajsep_ppo.load_checkpoint(tmp_path / "run")[1]["global_step"] == 160


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_sigterm_while_saving(script, monkeypatch, tmp_path):
    """The checkpoint is written to its end, and so is that of the next update, after which the run stops."""
    replace, calls = Path.replace, []

    def interrupted(path, target):
        calls.append(path)
        if len(calls) == 2:  # the file is written, but not yet where it belongs
            signal.raise_signal(signal.SIGTERM)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(SystemExit) as end:
        train_on_toy(monkeypatch, script, tmp_path / "run", seed=1, total_timesteps=800, save_every=1)
    assert end.value.code == 128 + signal.SIGTERM and len(calls) == 3
    assert not list((tmp_path / "run").glob("*.tmp"))
    saved = script.checkpoints(tmp_path / "run")
    assert [script.load_checkpoint(path)[1]["global_step"] for path in saved] == [160, 240]


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_sigterm_while_saving_the_last_time(script, monkeypatch, tmp_path):
    """The run is stopped although no update comes after it, so that no evaluation begins."""
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *paths: signal.raise_signal(signal.SIGTERM) or replace(*paths))
    with pytest.raises(SystemExit) as end:
        train_on_toy(monkeypatch, script, tmp_path / "run", seed=1, total_timesteps=80)
    assert end.value.code == 128 + signal.SIGTERM
    (path,) = script.checkpoints(tmp_path / "run")
    assert script.load_checkpoint(path)[1]["global_step"] == 80


@pytest.mark.parametrize("command", ["reset", "step", "load_state"])
def test_a_worker_that_hangs(command, monkeypatch):
    """A worker that does not answer is an error that names its matches, and is ended."""
    monkeypatch.setattr(lux, "WORKER_TIMEOUT", 1)
    env = lux.LuxVecEnv(2, num_workers=2)
    workers = list(env.workers)
    obs, _ = env.reset(seed=1)
    step = {"actions": np.zeros_like(obs["kind"])}
    arguments = {"reset": {"seed": 2}, "step": step, "load_state": {"state": env.state()}}[command]
    os.kill(workers[1].pid, signal.SIGSTOP)
    before = time.time()
    with pytest.raises(lux.LuxError, match=r"matches 1 to 1 .* did nothing for 1 s"):
        getattr(env, command)(**arguments)
    env.close()
    assert time.time() - before < 5 and not any(worker.is_alive() for worker in workers)


def test_a_worker_that_is_slow(monkeypatch):
    """One that gets on, match by match, has not hung, be its whole answer as late as it likes."""
    monkeypatch.setattr(lux, "WORKER_TIMEOUT", 2)
    reset = lux.LuxMatch.reset
    monkeypatch.setattr(lux.LuxMatch, "reset", lambda *arguments: time.sleep(1) or reset(*arguments))
    env = lux.LuxVecEnv(5, num_workers=1)
    before = time.time()
    env.reset(seed=1)
    env.close()
    assert time.time() - before > 5


def test_a_worker_that_does_not_start(monkeypatch):
    monkeypatch.setattr(lux, "START_TIMEOUT", 2)
    env = lux.LuxVecEnv(2, num_workers=2)
    os.kill(env.workers[0].pid, signal.SIGSTOP)
    with pytest.raises(lux.LuxError, match=r"matches 0 to 0 .* did nothing for 2 s"):
        env.reset(seed=1)
    env.close()
