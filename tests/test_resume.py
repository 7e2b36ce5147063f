"""Runs that are stopped and resumed, or meet a fault: they come out the same, or say why not."""

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import numpy as np
import pytest
import torch
from helpers import hash_of, masked_random, scripted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_learning import train_on_toy
from toy_env import ToyVecEnv

import global_ppo
import lux_wrapper as lux
import trajsep_ppo

HANG = 600  # seconds that nothing here takes, on any machine under any load
# It does not end by itself; schedules would depend on where it ends
ENDLESS = (
    "--no-cuda --num-envs 2 --num-minibatches 2 --eval-episodes 1 --save-every 1 "
    "--no-anneal-lr --no-anneal-ent --positive-reward-weight 1 --total-timesteps 1000000"
).split()

both = pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and torchrun")


@pytest.fixture
def start(tmp_path):
    """Function (*arguments of Python) -> a process in tmp_path; its group ends with the test."""
    processes = []

    def start(*arguments):
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        shown = {key: x for key, x in os.environ.items() if key != "TQDM_DISABLE"}  # tests read the bars
        process = subprocess.Popen(command, cwd=tmp_path, env=shown, start_new_session=True, **pipes)
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, SIGKILL)
        process.communicate()


def wait_for_checkpoint(process, cwd, step=64):
    """Wait until a run has written the checkpoint of `step` or a later one; the run's folder."""
    deadline = time.time() + HANG
    while True:
        for path in cwd.glob("runs/*/checkpoint_*.pt"):
            if int(path.stem[11:]) >= step:
                return path.parent
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)


def finish(process, code=0):
    """Wait for the end; what was printed."""
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == code, errors
    assert "Traceback" not in errors and "Warning" not in errors
    return output


def load(run_dir):
    """The newest checkpoint of a run."""
    return torch.load(trajsep_ppo.checkpoints(run_dir)[-1], weights_only=True)


def scalars(run_dir):
    """What was logged: tag -> a list of (step, value)."""
    events = EventAccumulator(str(run_dir)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def plain(x):
    """Nested values, with a hash in place of each tensor."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list):
        return [plain(value) for value in x]
    return hash_of(x.numpy()) if isinstance(x, torch.Tensor) else x


def results(run_dir):
    """Everything a run leaves that must not depend on whether it was stopped."""
    checkpoint = load(run_dir)
    del checkpoint["train_seconds"], checkpoint["args"]["num_workers"]
    logged = scalars(run_dir)
    logged["charts/SPS"] = [step for step, _ in logged["charts/SPS"]]
    assert logged["charts/episodic_length"], "no match has ended"
    files = sorted(path.name for path in run_dir.iterdir() if "tfevents" not in path.name)
    evaluation = (run_dir / "evaluation.json").read_text()
    return {"files": files, "evaluation": evaluation} | logged | plain(checkpoint)


def assert_as_undisturbed(run_dir, process):
    """The process, which trains without being stopped, leaves what the run has left."""
    finish(process)
    (other,) = {*run_dir.parent.iterdir()} - {run_dir}
    assert results(run_dir) == results(other)


# -- Continuing --------------------------------------------------------------------------


def stop(process, run_dir, how):
    """Stop a run at a random moment and check what it says; the step it has reached."""
    time.sleep(random.uniform(0, 0.15))
    if how == SIGKILL:
        process.kill()
        process.communicate()
        return load(run_dir)["global_step"]
    os.killpg(process.pid, how)  # all processes get it, as from a terminal
    output = finish(process, 128 + how)
    step = load(run_dir)["global_step"]
    again = f"python {process.args[1]} --resume runs/{run_dir.name}"
    assert output.endswith(f"stopped at step {step}; continue: {again}\n")
    return step


@pytest.mark.parametrize(
    "script, first, second",
    [(trajsep_ppo, SIGKILL, SIGINT), (global_ppo, SIGTERM, SIGKILL)],
)
def test_stopped_at_random_moments(script, first, second, start, tmp_path):
    """Killed, interrupted, terminated: all that is there in the end is as if it had not been.

    The number of workers changes from one time to the next.
    """
    process = start(script.__file__, *ENDLESS, "--num-workers", 2)
    run_dir = wait_for_checkpoint(process, tmp_path)
    reached = stop(process, run_dir, first)
    resume = (script.__file__, "--resume", f"runs/{run_dir.name}")
    process = start(*resume, "--num-workers", 0)
    wait_for_checkpoint(process, tmp_path, reached + 64)
    reached = stop(process, run_dir, second)
    last = ("--total-timesteps", max(reached + 64, 384))
    output = finish(start(*resume, "--num-workers", 1, *last))
    assert f"from step {reached}, writing to runs/{run_dir.name}" in output
    assert_as_undisturbed(run_dir, start(script.__file__, *ENDLESS, "--num-workers", 0, *last))


@pytest.mark.parametrize(
    "script, number, phase, episodes",
    [(trajsep_ppo, SIGTERM, "sampled", 20), (global_ppo, SIGINT, "video", 1)],
)
def test_stopped_in_the_evaluation(script, number, phase, episodes, start, tmp_path):
    """It ends there too, with the signal's code and not at its own end; workers say nothing."""
    flags = "--no-cuda --num-envs 2 --num-minibatches 2 --total-timesteps 64 --capture-video".split()
    process = start(script.__file__, *flags, "--num-workers", 2, "--eval-episodes", episodes)
    seen = ""
    while not re.search(rf"{phase}.*step=\d", seen):
        seen += process.stderr.read(1) or pytest.fail(seen)
    process.send_signal(number)
    finish(process, 128 + number)
    assert load(*tmp_path.glob("runs/*")) and not [*tmp_path.glob("runs/*/video.gif")]


def test_two_processes(start, tmp_path):
    """Under torchrun, SIGTERM to its agent stops both after the same update; both continue."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = (*torchrun, trajsep_ppo.__file__)
    flags = (*ENDLESS, "--num-workers", 0)
    process = start(*command, *flags)
    run_dir = wait_for_checkpoint(process, tmp_path)
    process.send_signal(SIGTERM)
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode != 0 and output.count("stopped at step") == 1
    last = ("--total-timesteps", max(load(run_dir)["global_step"] + 64, 384))
    finish(start(*command, "--resume", run_dir, *last))
    assert_as_undisturbed(run_dir, start(*command, *flags, *last))


@both
def test_an_environment_without_state(script, monkeypatch, tmp_path):
    """Training continues with parameters, optimizer and counters, on new matches.

    After it, signals do what they did before.
    """
    handlers = [signal.getsignal(number) for number in (SIGINT, SIGTERM)]
    train_on_toy(monkeypatch, script, tmp_path, total_timesteps=240)
    assert [signal.getsignal(number) for number in (SIGINT, SIGTERM)] == handlers
    checkpoint = load(tmp_path)
    assert checkpoint["matches"] == [] and checkpoint["global_step"] == 240
    args = script.Args(**(checkpoint["args"] | {"total_timesteps": 320}))
    script.train(args, str(tmp_path), torch.device("cpu"), checkpoint)
    longer = load(tmp_path)
    assert longer["global_step"] == 320
    assert plain(longer["model"]) != plain(checkpoint["model"])


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


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Function (script, checkpoint, **flags) -> folder of a training on Stateful, last checkpoint."""
    monkeypatch.setattr(Stateful, "loaded", [])
    sizes = {"num_envs": 4, "num_steps": 16, "total_timesteps": 128, "anneal_lr": False}

    def train(script, checkpoint=None, **flags):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        monkeypatch.setattr(script, "make_envs", lambda args, num_envs, **_: Stateful(num_envs, 5))
        args = script.Args(**(sizes | flags))
        script.train(args, str(folder), torch.device("cpu"), checkpoint)
        return folder, load(folder)

    return train


@both
def test_each_part_of_a_checkpoint_counts(script, toy):
    """Whoever drops one of them does not train the same: something would tell."""
    _, start = toy(script)
    start["train_seconds"] = 1e9

    def resumed(**changes):
        return toy(script, deepcopy(start) | changes, total_timesteps=192)

    folder, whole = resumed()
    assert whole["global_step"] == 192 and Stateful.loaded == [[0, 1, 2, 3]]
    assert whole["train_seconds"] > 1e9
    assert scalars(folder)["charts/SPS"] == [(192, 0)]

    learned = {
        "model": {key: x + 0.01 for key, x in start["model"].items()},
        "optimizer": start["optimizer"] | {"state": {}},
        "torch_rng": torch.Generator().manual_seed(5).get_state(),
    }
    for part, other in learned.items():
        _, got = resumed(**{part: other})
        assert plain(got["model"]) != plain(whole["model"]), part
    _, again = resumed(matches=start["matches"][::-1])
    assert Stateful.loaded[-1] == [3, 2, 1, 0]
    assert plain(again["model"]) == plain(whole["model"]), "a toy match does not depend on it"
    folder, _ = resumed(global_step=64)
    assert [step for step, _ in scalars(folder)["losses/value_loss"]] == [128, 192]


@both
@pytest.mark.parametrize("num_envs", [2, 8])
def test_matches_that_do_not_fit(script, num_envs, toy, tmp_path):
    """Another number of matches than was saved is refused before anything is written."""
    _, start = toy(script)
    with pytest.raises(script.Refused, match="does not fit"):
        toy(script, start, total_timesteps=512, num_envs=num_envs)
    assert len([*tmp_path.iterdir()]) == 1


# -- Matches -----------------------------------------------------------------------------


@pytest.mark.parametrize("group_by, max_robots", [("entity", 20), ("cluster", 6)])
def test_matches_continue_bit_for_bit(group_by, max_robots):
    """Three matches of different ages, rebuilt by other workers, and as of two processes."""
    options = {"group_by": group_by, "max_robots": max_robots, "safe_masks": group_by == "entity"}
    rng = np.random.default_rng(5)
    env = lux.LuxVecEnv(3, num_workers=2, **options)
    obs, _ = env.reset(seed=31)
    steps = []
    for step in range(200):
        if step == 160:
            first_obs, state = deepcopy(obs), env.state()
        actions = masked_random(rng, obs["action_mask"])
        if group_by == "entity":
            actions = scripted(obs)
        actions[1] = 0  # idle: it is over after some 150 steps
        steps.append((actions, deepcopy(env.step(actions))))
        obs = steps[-1][1][0]
    env.close()
    assert len({len(match["actions"]) for match in state}) > 1 and state[1]["played"] == 2
    assert all(match["actions"].dtype == np.int8 for match in state)

    for first, number, workers in ((0, 3, 0), (0, 1, 1), (1, 2, 2)):
        part = slice(first, first + number)
        env = lux.LuxVecEnv(number, num_workers=workers, first_match=first, **options)
        obs, _ = env.load_state(state[part])
        assert all((obs[key] == array[part]).all() for key, array in first_obs.items())
        for actions, (expected, rewards, terminated, _, infos) in steps[160:]:
            obs, got_rewards, got_terminated, _, got_infos = env.step(actions[part])
            assert all((obs[key] == array[part]).all() for key, array in expected.items())
            assert (got_rewards == rewards[part]).all()
            assert (got_terminated == terminated[part]).all()
            for key, x in got_infos.get("episode", {}).items():
                ended = got_infos["_episode"]
                assert (x[ended] == infos["episode"][key][part][ended]).all(), key
        env.close()


# -- Faults ------------------------------------------------------------------------------


def fill_the_disk(process, run_dir):
    limit = 100_000  # bytes, of any file
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))


def remove_the_folder(process, run_dir):
    run_dir.rename(run_dir.parent.parent / "removed")


def kill_a_worker(process, run_dir):
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), SIGKILL)


@pytest.mark.parametrize(
    "fault, says",
    [(fill_the_disk, ""), (remove_the_folder, ""), (kill_a_worker, "of match")],
)
def test_a_fault_in_training(fault, says, start, tmp_path):
    """One sentence that names the last checkpoint, an exit code; what is saved is whole."""
    process = start(trajsep_ppo.__file__, *ENDLESS, "--num-workers", 2)
    run_dir = wait_for_checkpoint(process, tmp_path)
    fault(process, run_dir)
    _, errors = process.communicate(timeout=HANG)  # ends with the last of its workers
    assert process.returncode == 1
    (sentence,) = re.findall("error: .*", errors)  # among the progress bar's lines
    assert says in sentence and f"runs/{run_dir.name}" in sentence
    assert fault is not kill_a_worker or "Traceback" not in errors
    checkpoints = trajsep_ppo.checkpoints(run_dir)
    if checkpoints:
        assert sentence.endswith(f"the last checkpoint is runs/{run_dir.name}/{checkpoints[-1].name}")
    for path in tmp_path.rglob("checkpoint_*.pt"):
        assert torch.load(path, weights_only=True)["model"]


@both
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite(script, number, monkeypatch, tmp_path):
    """The update is named, and the checkpoint of the update before it is the last one."""
    compute_gae = script.compute_gae
    factors = iter([1, 1, number])
    monkeypatch.setattr(script, "compute_gae", lambda *args: compute_gae(*args) * next(factors))
    with pytest.raises(FloatingPointError, match="in update 3"):
        train_on_toy(monkeypatch, script, tmp_path, total_timesteps=800, save_every=1)
    checkpoint = load(tmp_path)
    assert checkpoint["global_step"] == 160
    assert all(x.isfinite().all() for x in checkpoint["model"].values())


def test_a_gradient_that_is_not_finite(monkeypatch, tmp_path):
    """One that only shows when the loss is differentiated is seen before the optimizer's step."""
    clip = torch.nn.utils.clip_grad_norm_
    factors = iter([1, 1, np.nan])

    def spoiled(parameters, norm):
        parameters = list(parameters)
        parameters[0].grad *= next(factors)
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    options = {"num_minibatches": 1, "update_epochs": 1, "save_every": 1, "total_timesteps": 800}
    with pytest.raises(FloatingPointError, match="in update 3"):
        train_on_toy(monkeypatch, trajsep_ppo, tmp_path, **options)
    assert load(tmp_path)["global_step"] == 160


@both
@pytest.mark.parametrize("total, at, expected", [(800, 160, [160, 240]), (80, 80, [80])])
def test_sigterm_while_saving(script, total, at, expected, monkeypatch, tmp_path):
    """The checkpoint is written to its end; the run stops after the next update, or its last."""
    replace = Path.replace

    def interrupted(path, target):
        if target.stem == f"checkpoint_{at}":  # it is written, but not yet where it belongs
            signal.raise_signal(SIGTERM)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(SystemExit) as end:
        train_on_toy(monkeypatch, script, tmp_path, total_timesteps=total, save_every=1)
    assert end.value.code == 128 + SIGTERM
    assert not list(tmp_path.glob("*.tmp"))
    saved = [torch.load(path, weights_only=True) for path in script.checkpoints(tmp_path)]
    assert [checkpoint["global_step"] for checkpoint in saved] == expected
