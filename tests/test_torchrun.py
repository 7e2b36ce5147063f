"""The scripts under torchrun: any number of processes trains what one would, and fails as one."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import parameters_at_start
from in_double import double_precision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
IN_DOUBLE = ROOT / "tests" / "in_double.py"
SCRIPTS = ("trajsep_ppo", "global_ppo")
TINY = ("--num-envs", "2", "--num-steps", "32", "--num-minibatches", "2", "--eval-episodes", "1", "--num-workers", "0")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
TWO_PROCESSES = (*TORCHRUN, "--standalone", "--nproc-per-node", 2)
LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm", "explained_variance")
EPISODES = ("charts/episodic_length", "charts/episodic_return", "lux/ice_transferred")
HANG = 600  # seconds that nothing here takes, on any machine under any load
TARGET_KL = 1e-3  # is reached in some updates and not in others

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun's gloo and /proc are tested on Linux")


def start(*command, cwd, **environment):
    """A process with its output piped."""
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], cwd=cwd, env=environment, **pipes)


def finish(*processes):
    """Exit codes and standard errors of processes; if one hangs all are aborted, and print where their threads are."""
    deadline, errors, hung = time.time() + HANG, [], False
    try:
        for process in processes:
            try:
                errors.append(process.communicate(timeout=max(deadline - time.time(), 1))[1])
            except subprocess.TimeoutExpired:
                hung = True
                running = [other for other in processes if other.poll() is None]
                for pid in [pid for other in running for pid in (*ranks_of(other), other.pid)]:
                    os.kill(pid, signal.SIGABRT)
                errors.append(process.communicate(timeout=HANG)[1])
    finally:
        for process in processes:
            process.kill()
    assert not hung, "\n".join(errors)
    return [process.returncode for process in processes], errors


def ranks_of(agent):
    """Ids of the processes that an agent of torchrun has started and that have not ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the agent itself has ended
        return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
    return []


def wait_until(condition, *processes):
    """Until `condition()` is true; none of the processes may end before."""
    deadline = time.time() + HANG
    while not condition():
        assert all(process.poll() is None for process in processes) and time.time() < deadline
        time.sleep(0.1)


def script(name, *flags, steps=384):
    return (ROOT / f"{name}.py", *TINY, "--total-timesteps", steps, *flags)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_hand(rank, port, world_size=2):
    """The environment variables that torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {key: str(x) for key, x in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


# ------------------------------------------------------------------------------------------------------
# What is trained
# ------------------------------------------------------------------------------------------------------


def results(cwd):
    """Parameters, and logged values by tag as (step, value), of the only run in a folder."""
    (run_dir,) = (cwd / "runs").iterdir()
    (checkpoint,) = run_dir.glob("checkpoint_*")
    others = {path.name for path in run_dir.iterdir() if "tfevents" not in path.name}
    assert others == {"args.json", checkpoint.name, "evaluation.json"}
    events = EventAccumulator(str(run_dir)).Reload()
    tags = events.Tags()["scalars"]
    logged = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return torch.load(checkpoint, weights_only=True)["model"], logged


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Function of a script's name and flags -> the results of a training in one process, in double precision."""
    done = {}

    def train(*command):
        if command not in done:
            cwd = tmp_path_factory.mktemp("alone")
            codes, errors = finish(start(sys.executable, IN_DOUBLE, *script(*command), cwd=cwd))
            assert codes == [0], errors
            done[command] = results(cwd)
        return done[command]

    return train


def distance(parameters, others):
    return sum((parameters[key] - others[key]).square().sum() for key in others).sqrt()


def assert_same(cwd, expected, expected_log):
    """Parameters and metrics agree, except for rounding: about 1e-14 of the way that training has moved them."""
    parameters, logged = results(cwd)
    with double_precision():
        at_start = parameters_at_start()
    assert distance(parameters, expected) < 1e-10 * distance(expected, at_start)
    for tag in EPISODES:
        assert sorted(logged[tag]) == sorted(expected_log[tag]) and len(logged[tag]) == 2
    for name in LOSSES:
        values, expected_values = (dict(log[f"losses/{name}"]) for log in (logged, expected_log))
        assert [*values] == [64, 128, 192, 256, 320, 384]
        assert values == pytest.approx(expected_values, rel=1e-6, abs=1e-9), name  # logged with seven digits


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_train_what_one_does(name, alone, tmp_path):
    """The same matches, actions, minibatches, advantages and gradients."""
    codes, errors = finish(start(*TWO_PROCESSES, IN_DOUBLE, *script(name), cwd=tmp_path, LAST_PLACE="1"))
    assert codes == [0], errors
    assert_same(tmp_path, *alone(name))


def test_two_machines(alone, tmp_path):
    """Two agents of torchrun, as on two machines, meet over the network."""
    meet = {"nnodes": 2, "nproc-per-node": 1, "rdzv-backend": "c10d", "rdzv-endpoint": f"127.0.0.1:{free_port()}"}
    command = (*TORCHRUN, *(f"--{key}={x}" for key, x in meet.items()), "--rdzv-id=test")
    agents = [start(*command, IN_DOUBLE, *script("trajsep_ppo"), cwd=tmp_path, LAST_PLACE="1") for _ in range(2)]
    codes, errors = finish(*agents)
    assert codes == [0, 0], errors
    assert_same(tmp_path, *alone("trajsep_ppo"))


def test_early_stopping_is_decided_together(alone, tmp_path):
    """With a target KL that is sometimes reached the processes take the updates that one takes; none waits for ever."""
    command = ("trajsep_ppo", "--target-kl", str(TARGET_KL), "--update-epochs", "4")
    expected, expected_log = alone(*command)
    reached = [value > TARGET_KL for _, value in expected_log["losses/approx_kl"]]
    assert any(reached) and not all(reached)
    codes, errors = finish(start(*TWO_PROCESSES, IN_DOUBLE, *script(*command), cwd=tmp_path, LAST_PLACE="1"))
    assert codes == [0], errors
    assert_same(tmp_path, expected, expected_log)


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_line(name, tmp_path):
    """The command of the README: one run folder, one progress bar, no noise on the way, finite parameters."""
    codes, errors = finish(start(*TWO_PROCESSES, *script(name, steps=128), cwd=tmp_path))
    assert codes == [0], errors
    assert "Traceback" not in errors[0] and "Warning" not in errors[0]
    assert errors[0].count(" 0/128 ") == 1, "one process shows the progress"
    parameters, logged = results(tmp_path)
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in parameters.values())
    assert [step for step, _ in logged["losses/value_loss"]] == [64, 128]


# ------------------------------------------------------------------------------------------------------
# What fails
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_world_that_does_not_divide(name, tmp_path):
    """Two matches for three processes: one sentence, nothing written, no success."""
    codes, errors = finish(start(*TORCHRUN, "--standalone", "--nproc-per-node", 3, *script(name), cwd=tmp_path))
    assert codes[0] != 0 and not (tmp_path / "runs").exists()
    assert errors[0].count("error: --num-envs 2 does not divide by the 3 processes") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_process_dies(name, tmp_path):
    """The other one says so in one line, with an exit code, and the last checkpoint is whole."""
    port = free_port()
    flags = script(name, "--save-every", 1, steps=100_000)
    processes = [start(sys.executable, *flags, cwd=tmp_path, **by_hand(rank, port)) for rank in range(2)]
    try:
        wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint_*.pt")), *processes)
        processes[1].send_signal(signal.SIGKILL)
        codes, errors = finish(*processes)
    finally:
        for process in processes:
            process.kill()
    assert codes[0] == 1 and "Traceback" not in errors[0]
    (sentence,) = re.findall("error: .*", errors[0])  # among the progress bar's lines
    assert sentence.startswith("error: another process of this training has died; the last checkpoint is runs/")
    (run_dir,) = tmp_path.glob("runs/*")
    assert torch.load(trajsep_ppo.checkpoints(run_dir)[-1], weights_only=True)["global_step"] >= 64


def test_a_process_dies_under_torchrun(tmp_path):
    """torchrun ends the other processes, and itself with an exit code."""
    agent = start(*TWO_PROCESSES, *script("trajsep_ppo", "--save-every", 1, steps=100_000), cwd=tmp_path)
    try:
        wait_until(lambda: list(tmp_path.glob("runs/*/checkpoint_*.pt")), agent)
        ranks = ranks_of(agent)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        codes, _ = finish(agent)
    finally:
        agent.kill()
    assert codes[0] != 0
    wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))


def test_a_port_in_use(tmp_path):
    """The process that should listen says what is wrong and writes nothing."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        codes, errors = finish(start(sys.executable, *script("trajsep_ppo"), cwd=tmp_path, **by_hand(0, port)))
    assert codes == [1] and not (tmp_path / "runs").exists()
    assert len(errors[0].strip().splitlines()) == 1 and "MASTER_PORT" in errors[0] and str(port) in errors[0]


def test_nobody_to_meet(tmp_path):
    """Without an address: one sentence."""
    environment = by_hand(0, free_port())
    del environment["MASTER_ADDR"]
    codes, errors = finish(start(sys.executable, *script("trajsep_ppo"), cwd=tmp_path, **environment))
    assert codes == [1] and len(errors[0].strip().splitlines()) == 1 and "MASTER_ADDR" in errors[0]
