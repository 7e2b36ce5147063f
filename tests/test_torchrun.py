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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("trajsep_ppo", "global_ppo")
TINY = (
    *("--num-envs", "2", "--num-steps", "32", "--num-minibatches", "2"),
    *("--eval-episodes", "1", "--num-workers", "0"),
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
TWO_PROCESSES = (*TORCHRUN, "--standalone", "--nproc-per-node", 2)
IN_DOUBLE = ROOT / "tests" / "in_double.py"
LOSSES = (
    *("policy_loss", "value_loss", "entropy", "approx_kl"),
    *("clipfrac", "grad_norm", "explained_variance"),
)
EPISODES = ("charts/episodic_length", "charts/episodic_return", "lux/ice_transferred")
TARGET_KL = 1e-3  # is reached in some updates and not in others
HANG = 600  # seconds that nothing here takes, on any machine under any load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs gloo and /proc")


def start(*command, cwd, **environment):
    """A process with its output piped."""
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], cwd=cwd, env=environment, **pipes)


def finish(*processes):
    """Exit codes and standard errors of processes.

    If one hangs all are aborted, and print where their threads are.
    """
    deadline = time.time() + HANG
    errors = []
    hung = False
    try:
        for process in processes:
            try:
                left = max(deadline - time.time(), 1)
                errors.append(process.communicate(timeout=left)[1])
            except subprocess.TimeoutExpired:
                hung = True
                running = [other for other in processes if other.poll() is None]
                ranks = [rank for other in running for rank in ranks_of(other)]
                for pid in (*ranks, *(other.pid for other in running)):
                    os.kill(pid, signal.SIGABRT)
                errors.append(process.communicate(timeout=HANG)[1])
    finally:
        for process in processes:
            process.kill()
    assert not hung, "\n".join(errors)
    return [process.returncode for process in processes], errors


def ranks_of(agent):
    """Ids of the running processes that an agent of torchrun has started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the agent itself has ended
        return [int(pid) for pid in children.read_text().split()]
    return []


def wait_until(condition, *processes):
    """Wait until `condition()` is true; none of the processes may end before."""
    deadline = time.time() + HANG
    while not condition():
        assert all(process.poll() is None for process in processes)
        assert time.time() < deadline
        time.sleep(0.1)


def script(name, *flags, steps=384):
    return (ROOT / f"{name}.py", *TINY, "--total-timesteps", steps, *flags)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_hand(rank, port):
    """The environment variables that torchrun sets for one of two processes."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


# -- What is trained -----------------------------------------------------------------------


def results(cwd):
    """Parameters, and (step, value) of all that was logged by tag, of the only run in a folder."""
    (run_dir,) = (cwd / "runs").iterdir()
    (checkpoint,) = run_dir.glob("checkpoint_*")
    (events,) = run_dir.glob("*tfevents*")
    assert {*run_dir.iterdir()} == {checkpoint, events, run_dir / "evaluation.json"}
    log = EventAccumulator(str(run_dir)).Reload()
    tags = log.Tags()["scalars"]
    logged = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}
    return torch.load(checkpoint, weights_only=True)["model"], logged


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Function (script, *flags) -> the results of one process, in double precision."""
    done = {}

    def train(*command):
        if command not in done:
            cwd = tmp_path_factory.mktemp("alone")
            codes, errors = finish(start(sys.executable, IN_DOUBLE, *script(*command), cwd=cwd))
            assert codes == [0], errors
            done[command] = results(cwd)
        return done[command]

    return train


def assert_same(cwd, expected, expected_log):
    """Parameters and metrics agree up to rounding: 1e-14, where training moves them by about 1."""
    parameters, logged = results(cwd)
    squares = [(parameters[key] - expected[key]).square().sum() for key in expected]
    assert sum(squares).sqrt() < 1e-11
    for tag in EPISODES:
        assert sorted(logged[tag]) == sorted(expected_log[tag])
        assert len(logged[tag]) == 2
    for name in LOSSES:
        values = dict(logged[f"losses/{name}"])
        assert [*values] == [64, 128, 192, 256, 320, 384]
        expected_values = dict(expected_log[f"losses/{name}"])  # in float32
        assert values == pytest.approx(expected_values, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_train_what_one_does(name, alone, tmp_path):
    """The same matches, actions, minibatches, advantages and gradients."""
    command = (*TWO_PROCESSES, IN_DOUBLE, *script(name))
    codes, errors = finish(start(*command, cwd=tmp_path, LAST_PLACE="1"))
    assert codes == [0], errors
    assert_same(tmp_path, *alone(name))


def test_two_machines(alone, tmp_path):
    """Two agents of torchrun, as on two machines, meet over the network."""
    machines = ("--nnodes", 2, "--nproc-per-node", 1)
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    launch = (*TORCHRUN, *machines, *meet, "--rdzv-id", "test")
    command = (*launch, IN_DOUBLE, *script("trajsep_ppo"))
    agents = [start(*command, cwd=tmp_path, LAST_PLACE="1") for _ in range(2)]
    codes, errors = finish(*agents)
    assert codes == [0, 0], errors
    assert_same(tmp_path, *alone("trajsep_ppo"))


def test_early_stopping_is_decided_together(alone, tmp_path):
    """Both processes take the updates that one takes, and neither waits for ever."""
    command = ("trajsep_ppo", "--target-kl", str(TARGET_KL), "--update-epochs", "4")
    expected, expected_log = alone(*command)
    reached = [value > TARGET_KL for _, value in expected_log["losses/approx_kl"]]
    assert any(reached) and not all(reached)
    launch = (*TWO_PROCESSES, IN_DOUBLE, *script(*command))
    codes, errors = finish(start(*launch, cwd=tmp_path, LAST_PLACE="1"))
    assert codes == [0], errors
    assert_same(tmp_path, expected, expected_log)


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_line(name, tmp_path):
    """The README's command: one run folder, one progress bar, no warnings, finite parameters."""
    codes, errors = finish(start(*TWO_PROCESSES, *script(name, steps=128), cwd=tmp_path))
    assert codes == [0], errors
    assert "Traceback" not in errors[0]
    assert "Warning" not in errors[0]
    assert errors[0].count(" 0/128 ") == 1
    parameters, logged = results(tmp_path)
    for x in parameters.values():
        assert x.dtype == torch.float32 and x.isfinite().all()
    assert [*dict(logged["losses/value_loss"])] == [64, 128]


# -- What fails ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_world_that_does_not_divide(name, tmp_path):
    """Two matches for three processes: one sentence, nothing written, no success."""
    launch = (*TORCHRUN, "--standalone", "--nproc-per-node", 3)
    codes, errors = finish(start(*launch, *script(name), cwd=tmp_path))
    assert codes[0] != 0
    assert not (tmp_path / "runs").exists()
    assert errors[0].count("error: --num-envs 2 does not divide by the 3 processes") == 1


def checkpoints(folder):
    return list(folder.glob("runs/*/checkpoint_*.pt"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_process_dies(name, tmp_path):
    """The other one says so in one line with an exit code, and the last checkpoint is whole."""
    port = free_port()
    command = (sys.executable, *script(name, "--save-every", 1, steps=100_000))
    processes = [start(*command, cwd=tmp_path, **by_hand(rank, port)) for rank in range(2)]
    try:
        wait_until(lambda: checkpoints(tmp_path), *processes)
        processes[1].send_signal(signal.SIGKILL)
        codes, errors = finish(*processes)
    finally:
        for process in processes:
            process.kill()
    assert codes[0] == 1
    assert "Traceback" not in errors[0]
    (sentence,) = re.findall("error: .*", errors[0])  # among the progress bar's lines
    died = "error: another process of this training has died"
    assert sentence.startswith(f"{died}; the last checkpoint is runs/")
    (run_dir,) = tmp_path.glob("runs/*")
    newest = trajsep_ppo.checkpoints(run_dir)[-1]
    assert torch.load(newest, weights_only=True)["global_step"] >= 64


def test_a_process_dies_under_torchrun(tmp_path):
    """torchrun ends the other processes, and itself with an exit code."""
    command = script("trajsep_ppo", "--save-every", 1, steps=100_000)
    agent = start(*TWO_PROCESSES, *command, cwd=tmp_path)
    try:
        wait_until(lambda: checkpoints(tmp_path), agent)
        ranks = ranks_of(agent)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        codes, _ = finish(agent)
    finally:
        agent.kill()
    assert codes[0] != 0
    wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))


def fails_with_one_line(cwd, environment):
    """Start one of two processes, which fails before it writes anything; the line it prints."""
    command = (sys.executable, *script("trajsep_ppo"))
    codes, errors = finish(start(*command, cwd=cwd, **environment))
    assert codes == [1]
    assert not (cwd / "runs").exists()
    (line,) = errors[0].strip().splitlines()
    return line


def test_a_port_in_use(tmp_path):
    """The process that should listen says which port."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails_with_one_line(tmp_path, by_hand(0, port))
    assert "MASTER_PORT" in line and str(port) in line


def test_no_address(tmp_path):
    """Without an address: one sentence."""
    environment = by_hand(0, free_port())
    del environment["MASTER_ADDR"]
    assert "MASTER_ADDR" in fails_with_one_line(tmp_path, environment)
