"""The two scripts as a user starts them: what they write, that they can be repeated, and how they refuse."""

import dataclasses
import difflib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import parameters_at_start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_env import ToyVecEnv

import global_ppo
import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"trajsep_ppo": trajsep_ppo, "global_ppo": global_ppo}
SCRIPTS = tuple(MODULES)
STEPS = 384  # 6 rollouts of 2 matches x 32 steps; long enough that matches end
TINY = ("--num-envs", "2", "--num-steps", "32", "--num-minibatches", "2", "--eval-episodes", "1")
TAGS = {
    *("charts/learning_rate", "charts/SPS", "charts/episodic_return", "charts/episodic_length"),
    *("losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"),
    *("losses/explained_variance", "lux/ice_transferred", "lux/factories_alive"),
}


def run(script, cwd, *flags):
    """Start a script in a folder and wait for it; the finished process with its output as text."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Function (script, flags) -> (process, run folder); what is asked for twice is run once."""
    done = {}

    def train(script, *flags, steps=STEPS):
        key = (script, steps, *flags)
        if key not in done:
            cwd = tmp_path_factory.mktemp(script)
            process = run(script, cwd, "--total-timesteps", steps, *TINY, *flags)
            assert process.returncode == 0, process.stderr
            assert os.listdir(cwd) == ["runs"] and len(os.listdir(cwd / "runs")) == 1
            done[key] = process, next((cwd / "runs").iterdir())
        return done[key]

    return train


def parameters_of(run_dir):
    return torch.load(trajsep_ppo.checkpoints(run_dir)[-1], weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------------
# What a run leaves
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(trained, script):
    """A tiny training leaves TensorBoard events, a checkpoint and an evaluation, and nothing else."""
    process, run_dir = trained(script)
    assert re.fullmatch(rf"{script}__1__\d{{13}}", run_dir.name), "two runs may begin in one second"
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr
    assert f"training on cpu from step 0, writing to runs/{run_dir.name}" in process.stdout
    files = sorted(path.name for path in run_dir.iterdir() if "tfevents" not in path.name)
    assert files == [f"checkpoint_{STEPS}.pt", "evaluation.json"]
    checkpoint = torch.load(run_dir / files[0], weights_only=True)
    flags = {"total_timesteps": STEPS, "num_envs": 2, "num_steps": 32, "num_minibatches": 2, "eval_episodes": 1}
    assert checkpoint["args"] == dataclasses.asdict(MODULES[script].Args(**flags))
    assert checkpoint["global_step"] == STEPS and checkpoint["optimizer"]["state"]
    assert sum(x.numel() for x in checkpoint["model"].values()) <= 203_000
    assert checkpoint["model"].keys() == parameters_at_start().keys()
    assert not same(checkpoint["model"], parameters_at_start())


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard(trained, script):
    """CleanRL's names, one value per update against environment steps, the learning rate falling to 0."""
    _, run_dir = trained(script)
    events = EventAccumulator(str(run_dir)).Reload()
    assert TAGS <= set(events.Tags()["scalars"])
    rates = events.Scalars("charts/learning_rate")
    assert [event.step for event in rates] == [64, 128, 192, 256, 320, 384]
    shares = [event.value / MODULES[script].Args.learning_rate for event in rates]
    assert shares == pytest.approx([6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rel=1e-5)
    for tag in TAGS:
        assert all(abs(event.value) < 1e9 for event in events.Scalars(tag)), tag
    assert all(event.value > 0.1 for event in events.Scalars("losses/entropy"))
    assert all(100 < event.value <= 1000 for event in events.Scalars("charts/episodic_length"))


def test_evaluation_file(trained):
    """evaluation.json: for each metric one number per match and their summary, as printed in the table."""
    process, run_dir = trained("trajsep_ppo")
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    for name in ("ice_transferred", "ice_per_factory", "factories_alive", "l"):
        (value,) = evaluation["matches"][name]
        assert evaluation["summary"][name] == {"mean": value, "std": 0, "min": value, "max": value}
    length = evaluation["summary"]["l"]["mean"]
    assert 100 < length <= 1000
    assert re.search(rf"^episode_length +{length:.1f} ", process.stdout, re.MULTILINE)


def test_evaluate_again(trained, tmp_path):
    """--evaluate CHECKPOINT gives the numbers of the evaluation after training, with other workers."""
    _, run_dir = trained("trajsep_ppo")
    copy = tmp_path / "elsewhere" / "some.pt"
    copy.parent.mkdir()
    copy.write_bytes(trajsep_ppo.checkpoints(run_dir)[-1].read_bytes())
    process = run("trajsep_ppo", tmp_path, "--evaluate", copy, "--eval-episodes", 1, "--num-workers", 0)
    assert process.returncode == 0, process.stderr
    assert (copy.parent / "evaluation.json").read_text() == (run_dir / "evaluation.json").read_text()
    assert sorted(os.listdir(copy.parent)) == ["evaluation.json", "some.pt"]
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_video(trained, tmp_path):
    """--capture-video leaves an animated picture of one match beside the checkpoint."""
    from PIL import Image

    _, run_dir = trained("trajsep_ppo", "--capture-video", "--num-workers", "0", steps=128)
    with Image.open(run_dir / "video.gif") as video:
        assert video.n_frames > 10 and min(video.size) >= 200


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_parameters(trained, script):
    """Twice the same seed: bit-identical parameters and evaluation, in one process or in several."""
    _, first = trained(script)
    _, again = trained(script, "--num-workers", "0" if script == "trajsep_ppo" else "2")
    assert same(parameters_of(first), parameters_of(again))
    assert (first / "evaluation.json").read_text() == (again / "evaluation.json").read_text()


# ------------------------------------------------------------------------------------------------------
# Siblings
# ------------------------------------------------------------------------------------------------------


def test_shared_flags_have_equal_defaults():
    """All flags of the baseline are in the separated script with the same default and type."""
    ours, theirs = ({x.name: x for x in dataclasses.fields(MODULES[script].Args)} for script in SCRIPTS)
    assert ours.keys() - theirs.keys() == {"agent_reward_weight", "group_by"} and theirs.keys() <= ours.keys()
    assert (ours.pop("exp_name").default, theirs.pop("exp_name").default) == SCRIPTS
    for name, field in theirs.items():
        other = ours[name]
        assert (field.default, field.default_factory, field.type) == (other.default, other.default_factory, other.type)


def changes():
    """The lines of each script, and the pairs of ranges in which they differ."""
    lines = [(ROOT / f"{script}.py").read_text().splitlines() for script in SCRIPTS]
    blocks = difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()
    return lines, [(slice(a, b), slice(c, d)) for tag, a, b, c, d in blocks if tag != "equal"]


def test_the_diff_is_small():
    """At most 36 lines, added and deleted ones together."""
    (ours, theirs), blocks = changes()
    assert 0 < sum(len(ours[a]) + len(theirs[b]) for a, b in blocks) <= 36


def test_every_difference_is_marked():
    """Each place where the scripts differ carries the marker (*), except in the docstring at the top."""
    (ours, theirs), blocks = changes()
    for ours_block, theirs_block in blocks:
        if ours_block.stop > ours.index('"""', 1):
            assert "(*)" in "".join(ours[ours_block] + theirs[theirs_block]), ours[ours_block]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_word_of_a_game(script):
    """Whoever trains on another game finds only the default of --env-id of this one."""
    docstring, _, code = (ROOT / f"{script}.py").read_text().partition("\n")
    assert re.findall(r".*lux.*", code, re.IGNORECASE) == ['    env_id: str = "lux_wrapper:LuxVecEnv"  # module:class']


# ------------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------------

TOY = "--env-id toy_env:ToyVecEnv --env-kwargs"
# Flags, and what the sentence names
BAD_FLAGS = [
    ("--num-envs 0", "num-envs"),
    ("--num-steps -5", "num-steps"),
    ("--total-timesteps 0", "total-timesteps"),
    ("--total-timesteps 10", "total-timesteps"),  # less than one rollout
    ("--num-minibatches 0", "num-minibatches"),
    ("--num-minibatches 7", "minibatches"),  # does not divide the rollout
    ("--update-epochs 0", "update-epochs"),
    ("--eval-episodes -1", "eval-episodes"),
    ("--save-every 0", "save-every"),
    ("--num-workers -1", "num-workers"),
    ("--learning-rate 0", "learning-rate"),
    ("--gamma 1.5", "gamma"),
    ("--gae-lambda nan", "gae-lambda"),
    ("--clip-coef -0.2", "clip-coef"),
    ("--positive-reward-weight 0", "positive-reward-weight"),
    ("--seed -1", "seed"),
    ("--env-id nowhere:Env", "--env-id nowhere:Env: No module named 'nowhere'"),
    ("--env-id toy_env:Env", "--env-id toy_env:Env: module 'toy_env' has no attribute 'Env'"),
    ("--env-id toy_env", "--env-id toy_env"),
    ("--env-id :Env", "--env-id :Env"),
    (f"{TOY} size 8", "unexpected keyword argument 'size'"),
    (f"{TOY} num_envs 8", "num_envs"),
    ("--env-kwargs reward gold", "reward must be one of ice, lichen"),
    ("--evaluate nowhere/some.pt", "nowhere/some.pt"),
    ("--resume nowhere", "nowhere"),
    ("--resume empty", "empty"),
    ("--resume run --num-workers -1", "num-workers"),
    ("--resume run --env-kwargs slots 6", "do not fit"),
    ("--evaluate run --env-id lux_wrapper:LuxVecEnv --env-kwargs slots 6", "slots"),
]
BAD_TRAJSEP_FLAGS = [
    ("--agent-reward-weight 1.01", "agent-reward-weight"),
    ("--agent-reward-weight -0.1", "agent-reward-weight"),
    ("--agent-reward-weight nan", "agent-reward-weight"),
    ("--group-by none", "group_by must be one of entity"),
]
# What tyro refuses, in a box of its own
ODD_FLAGS = [
    ("trajsep_ppo", "--total-timesteps many", "many"),
    ("global_ppo", "--no-such-flag 3", "no-such-flag"),
    ("global_ppo", "--agent-reward-weight 1", "agent-reward-weight"),
    ("trajsep_ppo", "--max-robots 4", "max-robots"),
    ("trajsep_ppo", "--env-kwargs max_robots", "--env-kwargs"),
]


def refused(script, flags, monkeypatch, capfd, cwd, lines=1):
    """Run a script in this process with flags that it must refuse; what it says.

    It must end with code 2 and so many lines (0: any number) on standard error, and leave the folder as it was.
    """
    before = {path: path.is_dir() or path.read_bytes() for path in cwd.rglob("*")}
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    monkeypatch.setattr(sys, "path", [*sys.path])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    output = capfd.readouterr()
    assert end.value.code == 2, output.err
    assert {path: path.is_dir() or path.read_bytes() for path in cwd.rglob("*")} == before, "something was written"
    assert "Traceback" not in output.err
    assert lines in (0, len(output.err.strip().splitlines())), output.err
    return output.err


def toy_run(script, folder, **changes):
    """A run folder with a checkpoint of the toy game, as training writes it except for `changes`."""
    sizes = {"num_envs": 2, "total_timesteps": 64, "eval_episodes": 0}
    args = MODULES[script].Args(env_id="toy_env:ToyVecEnv", env_kwargs={"slots": 5}, **sizes)
    net = trajsep_ppo.HybridNet(ToyVecEnv(1, slots=5).single_observation_space, 4)
    content = {"args": dataclasses.asdict(args), "model": net.state_dict(), "global_step": 64, "matches": []}
    content |= {"optimizer": torch.optim.Adam(net.parameters()).state_dict(), "train_seconds": 1.0}
    content["torch_rng"] = torch.get_rng_state()
    folder.mkdir(exist_ok=True)
    torch.save(content | changes, folder / "checkpoint_64.pt")
    return folder / "checkpoint_64.pt"


@pytest.mark.parametrize(
    "script, flags, named",
    [(script, *bad) for script in SCRIPTS for bad in BAD_FLAGS] + [("trajsep_ppo", *bad) for bad in BAD_TRAJSEP_FLAGS],
)
def test_bad_flags(script, flags, named, monkeypatch, capfd, tmp_path):
    """One sentence that names the flag or its value, exit code 2, nothing written."""
    if "run" in flags:
        other_size = {"weight": torch.zeros(2, 2)}
        toy_run(script, tmp_path / "run", **({"model": other_size} if "slots" in flags else {}))
    (tmp_path / "empty").mkdir()
    assert named in refused(script, flags.split(), monkeypatch, capfd, tmp_path)


@pytest.mark.parametrize("script, flags, named", ODD_FLAGS)
def test_odd_flags(script, flags, named, monkeypatch, capfd, tmp_path):
    """What tyro itself refuses: its box names the flag or its value, exit code 2, nothing written."""
    assert named in refused(script, flags.split(), monkeypatch, capfd, tmp_path, lines=0)


def test_bad_flag_in_a_process_of_its_own(tmp_path):
    """The same, seen from a shell: no warning or banner joins the sentence."""
    process = run("trajsep_ppo", tmp_path, "--agent-reward-weight", "1.5")
    assert process.returncode == 2 and process.stdout == ""
    assert "agent-reward-weight" in process.stderr and len(process.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def cut_in_half(content):
    return content[: len(content) // 2]


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, lambda _: b"", lambda _: bytes(range(256)) * 40])
@pytest.mark.parametrize("script", SCRIPTS)
def test_damaged_checkpoints(script, damage, monkeypatch, capfd, tmp_path):
    """The sentence names the file and the one before it, which is there to continue from."""
    path = toy_run(script, tmp_path / "run")
    newest = path.with_name("checkpoint_1024.pt")
    newest.write_bytes(damage(path.read_bytes()))
    (path.with_name("checkpoint_best.pt")).write_bytes(b"not written by the script")
    for flag in ("--resume", "--evaluate"):
        said = refused(script, [flag, "run"], monkeypatch, capfd, tmp_path)
        assert "run/checkpoint_1024.pt is damaged" in said and "the one before it is run/checkpoint_64.pt" in said
        said = refused(script, [flag, str(newest)], monkeypatch, capfd, tmp_path)
        assert "checkpoint_1024.pt is damaged" in said and "before" not in said


FOREIGN = {
    "a list": [torch.zeros(3)],
    "parameters only": parameters_at_start(),
    "code": {"args": {}, "model": pytest.approx},  # weights_only refuses what is not data
    "no arguments": {"args": None, "model": {}},
    "a flag that is gone": {"args": dataclasses.asdict(trajsep_ppo.Args()) | {"map_size": 48}, "model": {}},
    "a flag that is missing": {"args": {"seed": 1}, "model": {}},
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("what", [*FOREIGN, "the sibling's"])
def test_foreign_checkpoints(script, what, monkeypatch, capfd, tmp_path):
    """Whatever the file holds: one sentence that names it, exit code 2, nothing written."""
    path = tmp_path / "some.pt"
    (sibling,) = {*SCRIPTS} - {script}
    torch.save(FOREIGN[what], path) if what in FOREIGN else toy_run(sibling, tmp_path).rename(path)
    for flag in ("--evaluate", "--resume"):
        assert "some.pt" in refused(script, [flag, "some.pt"], monkeypatch, capfd, tmp_path)


# ------------------------------------------------------------------------------------------------------
# What fails on the way
# ------------------------------------------------------------------------------------------------------

FAILING = """
from toy_env import ToyVecEnv


class Failing(ToyVecEnv):
    def step(self, actions):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 70:
            raise {}("it broke")
        return super().step(actions)
"""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("error", ["OSError", "TimeoutError", "MemoryError", "ValueError", "KeyError"])
def test_an_environment_that_fails(script, error, monkeypatch, capfd, tmp_path):
    """One sentence that names the last checkpoint, exit code 1; before it the traceback of an unexpected error."""
    (tmp_path / "failing.py").write_text(FAILING.format(error))
    (tmp_path / "toy_env.py").write_text((ROOT / "examples" / "toy" / "toy_env.py").read_text())
    flags = ("--env-id", "failing:Failing", *TINY, "--save-every", "1", "--total-timesteps", "640")
    process = run(script, tmp_path, *flags)
    (run_dir,) = tmp_path.glob("runs/*")
    assert process.returncode == 1
    (sentence,) = re.findall(rf"^{script}\.py: error: (.*)$", process.stderr, re.MULTILINE)
    assert "it broke" in sentence
    assert sentence.endswith(f"; the last checkpoint is {run_dir.relative_to(tmp_path)}/checkpoint_128.pt")
    assert ("Traceback" in process.stderr) == (error in ("ValueError", "KeyError"))


def test_unwritable_folder(tmp_path):
    """A file named `runs` stands where the folder should be made."""
    (tmp_path / "runs").write_text("in the way")
    process = run("trajsep_ppo", tmp_path, "--num-workers", 0)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "error:" in process.stderr and "runs" in process.stderr and os.listdir(tmp_path) == ["runs"]


def children_of(pid):
    """Process ids of the running children of a process."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state not in "ZX":
            children.append(int(stat.parent.name))
    return children


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the workers")
def test_a_worker_dies_in_training(tmp_path):
    """One line that names the matches and the last checkpoint, which is whole; no process is left."""
    flags = [*TINY, "--total-timesteps", 100_000, "--num-workers", 2, "--save-every", 1]
    command = [sys.executable, str(ROOT / "trajsep_ppo.py"), *map(str, flags)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 120
        while not list(tmp_path.glob("runs/*/checkpoint_*.pt")):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.1)
        workers = children_of(process.pid)
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in errors
    (sentence,) = re.findall("error: .*", errors)  # among the progress bar's lines
    (run_dir,) = tmp_path.glob("runs/*")
    checkpoint = trajsep_ppo.checkpoints(run_dir)[-1]
    assert "match" in sentence and str(checkpoint.relative_to(tmp_path)) in sentence
    assert torch.load(checkpoint, weights_only=True)["global_step"] >= 64
    deadline = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
