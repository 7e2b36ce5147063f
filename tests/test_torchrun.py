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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("trajsep_ppo", "global_ppo")
# Small steps: every one multiplies what rounding has left of the difference between one process and two.
TINY = ("--num-envs", "2", "--num-steps", "32", "--num-minibatches", "2", "--learning-rate", "1e-4")
TINY += ("--eval-episodes", "1", "--num-workers", "0")
LAUNCH = (sys.executable, "-m", "torch.distributed.run")
TAGS = ("losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/approx_kl", "losses/explained_variance")
EPISODES = ("charts/episodic_length", "charts/episodic_return", "lux/ice_transferred")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun's gloo and /proc are tested on Linux")


def start(*command, cwd, **environment):
    """A process with one thread, its output piped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], cwd=cwd, env=environment, **pipes)


def finish(*processes, timeout=180):
    """Exit codes and standard errors of processes; if one hangs all are aborted, and print where their threads are."""
    deadline, errors, hung = time.time() + timeout, [], False
    try:
        for process in processes:
            try:
                errors.append(process.communicate(timeout=max(deadline - time.time(), 1))[1])
            except subprocess.TimeoutExpired:
                hung = True
                running = [other for other in processes if other.poll() is None]
                for pid in [pid for other in running for pid in (*ranks_of(other), other.pid)]:
                    os.kill(pid, signal.SIGABRT)
                errors.append(process.communicate(timeout=20)[1])
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


def results(cwd):
    """Parameters and logged values of the only run in a folder."""
    (run_dir,) = (cwd / "runs").iterdir()
    (path,) = run_dir.glob("checkpoint_*")
    assert sorted(path.name for path in run_dir.iterdir() if "tfevents" not in path.name) == [
        *("args.json", path.name, "evaluation.json")
    ]
    checkpoint = torch.load(path, weights_only=True)
    events = EventAccumulator(str(run_dir)).Reload()
    logged = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in (*TAGS, *EPISODES)}
    return checkpoint["model"], logged, (run_dir / "evaluation.json").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Function name -> the folder of a training in one process."""
    done = {}

    def train(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            codes, errors = finish(start(sys.executable, *script(name), cwd=done[name]))
            assert codes == [0], errors
        return done[name]

    return train


def apart(parameters, expected):
    """Squared distance of the parameters over that which training has moved them."""
    start = parameters_at_start()
    distance, moved = (
        sum((a[key] - b[key]).square().sum() for key in start) for a, b in ((parameters, expected), (expected, start))
    )
    assert moved > 0
    return distance / moved


def assert_same(cwd, other):
    """Parameters and metrics agree but for rounding: sums of parts are rounded otherwise than sums of the whole."""
    (parameters, logged, _), (expected, expected_log, _) = results(cwd), results(other)
    assert apart(parameters, expected) < 1e-6
    for tag in EPISODES:
        assert sorted(logged[tag]) == sorted(expected_log[tag]) and len(logged[tag]) == 2
    for tag in TAGS:
        assert [step for step, _ in logged[tag]] == [64, 128, 192, 256, 320, 384]
        values, expected_values = ([value for _, value in log[tag]] for log in (logged, expected_log))
        assert values == pytest.approx(expected_values, rel=1e-2, abs=1e-4), tag


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_train_what_one_does(name, alone, tmp_path):
    """The same matches, actions, minibatches, advantages and gradients; one run folder, no noise on the way."""
    codes, errors = finish(start(*LAUNCH, "--standalone", "--nproc-per-node", 2, *script(name), cwd=tmp_path))
    assert codes == [0], errors
    assert "Traceback" not in errors[0] and "Warning" not in errors[0]
    assert errors[0].count("384/384") >= 1, "one process shows the progress"
    assert_same(tmp_path, alone(name))


def test_two_machines(alone, tmp_path):
    """Two agents of torchrun, as on two machines, meet over the network."""
    meet = (
        "--nnodes",
        2,
        "--nproc-per-node",
        1,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{free_port()}",
    )
    agents = [start(*LAUNCH, *meet, "--rdzv-id", "test", *script("trajsep_ppo"), cwd=tmp_path) for _ in range(2)]
    codes, errors = finish(*agents)
    assert codes == [0, 0], errors
    assert_same(tmp_path, alone("trajsep_ppo"))


def test_early_stopping_is_decided_together(tmp_path):
    """With a target KL that is sometimes reached the processes still take the same updates, so none waits for ever."""
    flags = ("--target-kl", "0.00001", "--update-epochs", "4")
    codes, errors = finish(
        start(*LAUNCH, "--standalone", "--nproc-per-node", 2, *script("trajsep_ppo", *flags), cwd=tmp_path)
    )
    assert codes == [0], errors


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_world_that_does_not_divide(name, tmp_path):
    """Two matches for three processes: one sentence, nothing written, no success."""
    codes, errors = finish(
        start(*LAUNCH, "--standalone", "--nproc-per-node", 3, *script(name), cwd=tmp_path), timeout=60
    )
    assert codes[0] != 0 and not (tmp_path / "runs").exists()
    assert errors[0].count("error: --num-envs 2 does not divide by the 3 processes") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_process_dies(name, tmp_path):
    """The other one says so in one line within seconds, with an exit code, and the last checkpoint is whole."""
    port = free_port()
    flags = script(name, "--save-every", 1, steps=100_000)
    processes = [start(sys.executable, *flags, cwd=tmp_path, **by_hand(rank, port)) for rank in range(2)]
    try:
        deadline = time.time() + 120
        while not list(tmp_path.glob("runs/*/checkpoint_*.pt")):
            assert all(process.poll() is None for process in processes) and time.time() < deadline
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGKILL)
        codes, errors = finish(*processes, timeout=20)
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
    flags = script("trajsep_ppo", "--save-every", 1, steps=100_000)
    agent = start(*LAUNCH, "--standalone", "--nproc-per-node", 2, *flags, cwd=tmp_path)
    try:
        deadline = time.time() + 120
        while not list(tmp_path.glob("runs/*/checkpoint_*.pt")):
            assert agent.poll() is None and time.time() < deadline
            time.sleep(0.1)
        ranks = ranks_of(agent)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        codes, _ = finish(agent, timeout=30)
    finally:
        agent.kill()
    assert codes[0] != 0
    deadline = time.time() + 10
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_port_in_use(tmp_path):
    """The process that should listen says what is wrong and writes nothing."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        codes, errors = finish(
            start(sys.executable, *script("trajsep_ppo"), cwd=tmp_path, **by_hand(0, port)), timeout=60
        )
    assert codes == [1] and not (tmp_path / "runs").exists()
    assert len(errors[0].strip().splitlines()) == 1 and "MASTER_PORT" in errors[0] and str(port) in errors[0]


def test_nobody_to_meet(tmp_path):
    """Without an address: one sentence."""
    environment = by_hand(0, free_port())
    del environment["MASTER_ADDR"]
    codes, errors = finish(start(sys.executable, *script("trajsep_ppo"), cwd=tmp_path, **environment), timeout=60)
    assert codes == [1] and len(errors[0].strip().splitlines()) == 1 and "MASTER_ADDR" in errors[0]
