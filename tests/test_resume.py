"""Runs that are stopped, killed and resumed, or that meet a fault: they come out the same, or say why not."""

import contextlib
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
from helpers import masked_random, scripted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_learning import train_on_toy
from toy_env import ToyVecEnv

import global_ppo
import lux_wrapper as lux
import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
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
# Continuing
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
    assert line == f"stopped at step {step}; continue: python {process.args[1]} --resume runs/{run_dir.name}"


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
    assert f"from step {reached}, writing to runs/{run_dir.name}" in output
    assert_same(results(run_dir), undisturbed(name))


def test_two_processes(start, tmp_path):
    """Under torchrun, SIGTERM to its agent stops both after the same update, and both continue from it."""
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


def load(run_dir):
    """The newest checkpoint of a run."""
    return torch.load(trajsep_ppo.checkpoints(run_dir)[-1], weights_only=True)


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_an_environment_without_state(script, monkeypatch, tmp_path):
    """Training continues with parameters, optimizer and counters, on new matches."""
    train_on_toy(monkeypatch, script, tmp_path / "run", seed=1, total_timesteps=240, save_every=1)
    checkpoint = load(tmp_path / "run")
    assert checkpoint["matches"] == [] and checkpoint["global_step"] == 240
    args = script.Args(**(checkpoint["args"] | {"total_timesteps": 320}))
    script.train(args, str(tmp_path / "run"), torch.device("cpu"), checkpoint)
    longer = load(tmp_path / "run")
    assert longer["global_step"] == 320
    assert any(not torch.equal(longer["model"][key], x) for key, x in checkpoint["model"].items())


class Stateful(ToyVecEnv):
    """The toy with states of matches: here only numbers, which tell who got them back."""

    loaded = []

    def state(self):
        return [{"number": np.array(match)} for match in range(self.num_envs)]

    def load_state(self, state):
        if len(state) != self.num_envs:
            raise ValueError("another number of matches")
        self.loaded.append([int(match["number"]) for match in state])
        return self.reset(seed=0)


TOY = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "save_every": 1, "num_workers": 0}


@pytest.fixture
def toy(monkeypatch):
    """A training of two updates on Stateful: function (script, folder, checkpoint, flags) -> its last checkpoint."""
    monkeypatch.setattr(Stateful, "loaded", [])

    def train(script, folder, checkpoint=None, **flags):
        monkeypatch.setattr(script, "make_envs", lambda args, num_envs, **_: Stateful(num_envs, slots=5))
        args = script.Args(**(TOY | {"total_timesteps": 128} | flags))
        script.train(args, str(folder), torch.device("cpu"), checkpoint)
        return load(folder)

    return train


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
@pytest.mark.parametrize("part", ["model", "optimizer", "torch_rng", "matches", "global_step", "train_seconds"])
def test_each_part_of_a_checkpoint_counts(script, part, toy, tmp_path):
    """Whoever drops one of them does not train the same: numbers, matches, steps or seconds would tell."""
    start = toy(script, tmp_path / "first") | {"train_seconds": 1000.0}
    flags = {"total_timesteps": 192, "anneal_lr": False, "anneal_ent": False}
    whole = toy(script, tmp_path / "whole", start, **flags)
    assert whole["global_step"] == 192 and Stateful.loaded == [[0, 1, 2, 3]]
    assert 1000 < whole["train_seconds"] < 1500
    events = EventAccumulator(str(tmp_path / "whole")).Reload()
    assert [event.value for event in events.Scalars("charts/SPS")] == [0], "192 steps in 1,000 seconds"
    other = toy(script, tmp_path / "other")
    changed = {
        "model": {key: x + 0.01 for key, x in start["model"].items()},
        "optimizer": start["optimizer"] | {"state": {}},
        "torch_rng": torch.Generator().manual_seed(5).get_state(),
        "matches": start["matches"][::-1],
        "global_step": 64,
        "train_seconds": 0.0,
    }
    got = toy(script, tmp_path / "got", start | {part: changed[part]}, **flags)
    if part in ("model", "optimizer", "torch_rng"):
        assert any(not torch.equal(x, whole["model"][key]) for key, x in got["model"].items())
    elif part == "matches":
        assert Stateful.loaded == [[0, 1, 2, 3], [3, 2, 1, 0]]
    elif part == "global_step":
        events = EventAccumulator(str(tmp_path / "got")).Reload()
        assert [event.step for event in events.Scalars("losses/value_loss")] == [128, 192]
    else:
        assert got["train_seconds"] < 500
    assert other["global_step"] == 128


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
@pytest.mark.parametrize("flags", [{"num_envs": 2}, {"num_envs": 8}])
def test_matches_that_do_not_fit(script, flags, toy, tmp_path):
    """Another number of matches than the saved ones is refused before anything is written."""
    start = toy(script, tmp_path / "first")
    with pytest.raises(script.Refused, match="do not fit"):
        toy(script, tmp_path / "second", start, total_timesteps=512, **flags)
    assert not (tmp_path / "second").exists()


# ------------------------------------------------------------------------------------------------------
# Matches
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_robots": 20}, {"group_by": "cluster", "safe_masks": False, "max_robots": 6}])
def test_matches_continue_bit_for_bit(options):
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


def test_held_out_matches_continue():
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
        assert all(torch.load(path, weights_only=True)["model"] for path in trajsep_ppo.checkpoints(run_dir))


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
    checkpoint = load(tmp_path / "run")
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
    assert load(tmp_path / "run")["global_step"] == 160


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
    assert [torch.load(path, weights_only=True)["global_step"] for path in saved] == [160, 240]


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_sigterm_while_saving_the_last_time(script, monkeypatch, tmp_path):
    """The run is stopped although no update comes after it, so that no evaluation begins."""
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *paths: signal.raise_signal(signal.SIGTERM) or replace(*paths))
    with pytest.raises(SystemExit) as end:
        train_on_toy(monkeypatch, script, tmp_path / "run", seed=1, total_timesteps=80)
    assert end.value.code == 128 + signal.SIGTERM
    (path,) = script.checkpoints(tmp_path / "run")
    assert torch.load(path, weights_only=True)["global_step"] == 80
