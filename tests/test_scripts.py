"""The two scripts as a user starts them: what they write, and how they refuse or fail."""

import dataclasses
import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from helpers import parameters_at_start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_env import ToyVecEnv

import global_ppo
import lux_wrapper
import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"trajsep_ppo": trajsep_ppo, "global_ppo": global_ppo}
SCRIPTS = tuple(MODULES)
both = pytest.mark.parametrize("script", SCRIPTS)
STEPS = 384  # 6 rollouts of 2 matches x 32 steps; long enough that matches end
LAST = f"checkpoint_{STEPS}.pt"
TINY = "--no-cuda --num-envs 2 --num-minibatches 2 --eval-episodes 1"
TAGS = {
    *("charts/learning_rate", "charts/SPS", "charts/episodic_return", "charts/episodic_length"),
    *("losses/value_loss", "losses/policy_loss", "losses/entropy", "losses/approx_kl"),
    *("losses/clipfrac", "losses/explained_variance"),
    *("lux/ice_transferred", "lux/factories_alive"),
}


def run(script, cwd, *flags):
    """Start a script in a folder and wait for it; the finished process with its output as text."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Function (script, *flags) -> (standard output, run folder); each training is run once."""

    @functools.cache
    def train(script, *flags):
        cwd = tmp_path_factory.mktemp(script)
        process = run(script, cwd, "--total-timesteps", STEPS, *TINY.split(), *flags)
        assert process.returncode == 0, process.stderr
        assert "Traceback" not in process.stderr and "Warning" not in process.stderr
        assert os.listdir(cwd) == ["runs"]
        (run_dir,) = (cwd / "runs").iterdir()
        return process.stdout, run_dir

    return train


def parameters_of(run_dir):
    return torch.load(run_dir / LAST, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- What a run leaves -------------------------------------------------------------------


@both
def test_smoke(trained, script):
    """A tiny training leaves TensorBoard events, a checkpoint and an evaluation, and nothing else."""
    output, run_dir = trained(script)
    assert re.fullmatch(rf"{script}__1__\d{{13}}", run_dir.name), "two runs may begin in one second"
    assert f"parameters on cpu, from step 0, writing to runs/{run_dir.name}" in output
    files = sorted(path.name for path in run_dir.iterdir() if "tfevents" not in path.name)
    assert files == [LAST, "evaluation.json"]
    checkpoint = torch.load(run_dir / LAST, weights_only=True)
    flags = {"cuda": False, "num_envs": 2, "num_minibatches": 2, "eval_episodes": 1}
    args = MODULES[script].Args(total_timesteps=STEPS, **flags)
    assert checkpoint["args"] == dataclasses.asdict(args)
    assert checkpoint["global_step"] == STEPS and checkpoint["optimizer"]["state"]
    assert sum(x.numel() for x in checkpoint["model"].values()) <= 203_000
    at_start = parameters_at_start()
    assert checkpoint["model"].keys() == at_start.keys()
    assert not same(checkpoint["model"], at_start)


@both
def test_tensorboard(trained, script):
    """CleanRL's names, a value per update against environment steps, the learning rate falling."""
    _, run_dir = trained(script)
    events = EventAccumulator(str(run_dir)).Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in TAGS}
    assert all(abs(x) < 1e9 for tag in TAGS for x in values[tag])
    steps = [event.step for event in events.Scalars("charts/learning_rate")]
    assert steps == [64, 128, 192, 256, 320, 384]
    shares = [x / MODULES[script].Args.learning_rate for x in values["charts/learning_rate"]]
    assert shares == pytest.approx([6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rel=1e-5)
    assert min(values["losses/entropy"]) > 0.1
    assert all(100 < x <= 1000 for x in values["charts/episodic_length"])


def test_evaluation_file(trained):
    """For both ways of acting: for each metric a number per match, and their summary, as printed."""
    output, run_dir = trained("trajsep_ppo")
    path = run_dir / "evaluation.json"
    assert f"written to runs/{run_dir.name}/evaluation.json" in output
    _, table = output.split(" 1 held-out matches ")
    both_ways = json.loads(path.read_text())
    for evaluation in both_ways.values():
        for name in ("ice_transferred", "ice_per_factory", "factories_alive", "l"):
            (value,) = evaluation["matches"][name]
            summary = {"mean": value, "std": 0, "min": value, "max": value}
            assert evaluation["summary"][name] == summary
    means = [evaluation["summary"]["l"]["mean"] for evaluation in both_ways.values()]
    assert re.search("^l" + "".join(f" +{mean:,.2f} ± 0.00" for mean in means), table, re.MULTILINE)


@both
def test_same_seed_same_parameters(trained, script):
    """Twice the same seed: bit-identical parameters and evaluation, in one process or in several."""
    workers = 0 if script == "trajsep_ppo" else 2
    _, first = trained(script)
    _, again = trained(script, "--num-workers", workers)
    assert same(parameters_of(first), parameters_of(again))
    assert (first / "evaluation.json").read_text() == (again / "evaluation.json").read_text()


# -- Siblings ----------------------------------------------------------------------------


def test_shared_flags_have_equal_defaults():
    """All flags of the baseline are in the separated script with the same default and type."""
    args = [dataclasses.fields(MODULES[script].Args) for script in SCRIPTS]
    ours, theirs = ({x.name: repr(x) for x in fields} for fields in args)
    del ours["exp_name"], theirs["exp_name"]
    assert ours.keys() - theirs.keys() == {"agent_reward_weight", "group_by"}
    assert theirs.items() <= ours.items()


@both
def test_no_word_of_a_game(script):
    """Whoever trains on another game finds only the default of --env-id of this one."""
    _, *code = (ROOT / f"{script}.py").read_text().splitlines()
    (line,) = [line for line in code if "lux" in line.lower()]
    assert line == '    env_id: str = "lux_wrapper:LuxVecEnv"  # module:class'


# -- What is refused ---------------------------------------------------------------------

TOY = "--env-id toy_env:ToyVecEnv --env-kwargs"
# Flags with a number out of range; the sentence names the flag
BAD_NUMBERS = (
    "num-envs 0, num-steps -5, total-timesteps 0, num-minibatches 0, update-epochs 0, "
    "save-every 0, eval-episodes -1, eval-steps 0, num-workers -1, learning-rate 0, max-grad-norm 0, "
    "ent-coef -1, vf-coef -1, target-kl -1, gamma 1.5, gae-lambda nan, clip-coef -0.2, "
    "positive-reward-weight 0, seed -1, seed 4294967296, "
    "agent-reward-weight 1.01, agent-reward-weight -0.1, agent-reward-weight nan"
).split(", ")
# Other flags, and what the sentence says
BAD_FLAGS = [
    ("--total-timesteps 10", "--total-timesteps must be between 512"),  # less than one rollout
    ("--num-minibatches 7", "--num-steps 32 does not divide by --num-minibatches 7"),
    ("--env-id nowhere:Env", "--env-id nowhere:Env is not module:class: No module named 'nowhere'"),
    ("--env-id toy_env:Env", "--env-id toy_env:Env is not module:class: module 'toy_env' has no attribute 'Env'"),
    ("--env-id toy_env", "--env-id toy_env"),
    ("--env-id :Env", "--env-id :Env"),
    (f"{TOY} size 8", "unexpected keyword argument 'size'"),
    (f"{TOY} num_envs 8", "num_envs"),
    ("--env-kwargs reward gold", "reward must be ice or lichen, got gold"),
    ("--evaluate nowhere/some.pt", "there is no checkpoint at nowhere/some.pt"),
    ("--resume empty", "there is no checkpoint at empty"),
    ("--resume run --total-timesteps 63", "checkpoint_64.pt is at step 64: --total-timesteps"),
    ("--resume weights.pt", "weights.pt holds only weights and flags: --evaluate plays it"),
    ("--track", "--track needs `pip install wandb` and `wandb login`: module 'wandb' has no attribute"),
    ("--resume run --num-workers -1", "--num-workers"),
    ("--resume run --env-kwargs slots 6", "the checkpoint does not fit the flags: Error"),
    ("--env-id toy_env:ToyVecEnv --capture-video", "--capture-video: toy_env:ToyVecEnv draws no matches"),
    ("--evaluate run --env-kwargs slots 6", "run/checkpoint_64.pt does not fit the flags: Error"),
    ("--evaluate run --env-id lux_wrapper:LuxVecEnv --env-kwargs slots 6", "slots"),
]
# What tyro refuses, in a box; it names the flag or its value
ODD_FLAGS = [
    ("trajsep_ppo", "--total-timesteps many", "many"),
    ("global_ppo", "--no-such-flag 3", "no-such-flag"),
    ("global_ppo", "--agent-reward-weight 1", "agent-reward-weight"),
    ("trajsep_ppo", "--env-kwargs max_robots", "--env-kwargs"),
]


@pytest.fixture
def end_of(monkeypatch, capfd, tmp_path):
    """Function (script, flags) -> exit code and standard error of a run in this process."""
    monkeypatch.chdir(tmp_path)

    def end_of(script, flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
        monkeypatch.setattr(sys, "path", [*sys.path])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        return end.value.code, capfd.readouterr().err

    return end_of


@pytest.fixture
def refused(end_of, monkeypatch, tmp_path):
    """Function (script, flags it must refuse) -> lines that it says. Nothing may be written."""
    begins = MagicMock(side_effect=AssertionError("a training begins"))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", begins)

    def contents():
        return {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}

    def refused(script, flags):
        before = contents()
        code, said = end_of(script, flags)
        assert code == 2 and "Traceback" not in said, said
        assert contents() == before, "something was written"
        return said.strip().splitlines()

    return refused


def toy_run(script, folder, **changes):
    """A checkpoint of the toy game, with what is read before it is refused."""
    sizes = {"num_envs": 2, "total_timesteps": 64, "eval_episodes": 0}
    args = MODULES[script].Args(env_id="toy_env:ToyVecEnv", env_kwargs={"slots": 5}, **sizes)
    net = trajsep_ppo.HybridNet(ToyVecEnv(1, slots=5).single_observation_space, 4)
    content = {
        "args": dataclasses.asdict(args),
        "model": net.state_dict(),
        "global_step": 64,
        "train_seconds": 1.0,
        "matches": [],
    }
    folder.mkdir(exist_ok=True)
    torch.save(content | changes, folder / "checkpoint_64.pt")
    return folder / "checkpoint_64.pt"


def bad_flags():
    """(script, flags, what the sentence says)."""
    for script in SCRIPTS:
        for number in BAD_NUMBERS:
            flag, _ = number.split()
            if hasattr(MODULES[script].Args, flag.replace("-", "_")):
                yield script, f"--{number}", f"--{flag} must be between"
        for flags, says in BAD_FLAGS:
            yield script, flags, says
    yield "trajsep_ppo", "--group-by none", "group_by must be entity or cluster"
    yield "trajsep_ppo", "--env-id toy_env:ToyVecEnv --group-by cluster", "group_by must be entity, got cluster"


@pytest.mark.parametrize("script, flags, says", bad_flags())
def test_bad_flags(script, flags, says, refused, tmp_path):
    """One sentence that names the flag or its value, exit code 2, nothing written."""
    if "run" in flags:
        other = {"model": {"weight": torch.zeros(2, 2)}} if "slots" in flags else {}
        toy_run(script, tmp_path / "run", **other)
    if "weights" in flags:
        content = torch.load(toy_run(script, tmp_path / "run"))
        torch.save({key: content[key] for key in ("args", "model")}, tmp_path / "weights.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "wandb").mkdir()  # as W&B makes it; Python takes it for a package
    (sentence,) = refused(script, flags)
    assert says in sentence


@both
def test_without_the_game(script, refused, monkeypatch):
    """Said before worker processes die of it."""
    monkeypatch.setattr(lux_wrapper, "find_spec", lambda name: None)
    (sentence,) = refused(script, "")
    assert "LuxVecEnv needs the game: pip install -r requirements.txt" in sentence


@pytest.mark.parametrize("script, flags, named", ODD_FLAGS)
def test_odd_flags(script, flags, named, refused):
    assert named in " ".join(refused(script, flags))


def test_bad_flag_in_a_process_of_its_own(tmp_path):
    """The same, seen from a shell: no warning or banner joins the sentence."""
    process = run("trajsep_ppo", tmp_path, "--agent-reward-weight", "1.5")
    assert process.returncode == 2 and process.stdout == ""
    (sentence,) = process.stderr.strip().splitlines()
    assert "agent-reward-weight" in sentence


@both
def test_track_without_a_key(script, refused, monkeypatch):
    wandb = MagicMock(login=MagicMock(side_effect=ValueError("no API key")))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (sentence,) = refused(script, "--track")
    assert "`wandb login`: no API key" in sentence


DAMAGES = {
    "a bit is flipped": lambda x: x[:10_000] + bytes([x[10_000] ^ 1]) + x[10_001:],
    "cut in half": lambda x: x[: len(x) // 2],
    "empty": lambda x: b"",
    "of another kind": lambda x: bytes(range(256)) * 40,
}


@both
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(script, damage, refused, tmp_path):
    """The sentence names the file and the one before it, which is there to continue from."""
    path = toy_run(script, tmp_path / "run")
    newest = path.with_name("checkpoint_1024.pt")
    newest.write_bytes(DAMAGES[damage](path.read_bytes()))
    path.with_name("checkpoint_best.pt").write_bytes(b"not written by the script")
    for flag in ("--resume", "--evaluate"):
        (sentence,) = refused(script, f"{flag} run")
        assert "run/checkpoint_1024.pt is damaged" in sentence
        assert "the one before it is run/checkpoint_64.pt" in sentence
        (sentence,) = refused(script, f"{flag} {newest}")
        assert "checkpoint_1024.pt is damaged" in sentence and "before" not in sentence


FLAGS = dataclasses.asdict(trajsep_ppo.Args())
FOREIGN = {
    "a list": [torch.zeros(3)],
    "parameters only": parameters_at_start(),
    "code": {"args": {}, "model": pytest.approx},  # weights_only refuses what is not data
    "no arguments": {"args": None, "model": {}},
    "a flag that is gone": {"args": FLAGS | {"map_size": 48}, "model": {}},
    "a flag that is missing": {"args": {"seed": 1}, "model": {}},
}


@both
@pytest.mark.parametrize("what", [*FOREIGN, "the sibling's"])
def test_foreign_checkpoints(script, what, refused, tmp_path):
    """Whatever the file holds: one sentence that names it, exit code 2, nothing written."""
    (sibling,) = {*SCRIPTS} - {script}
    path = toy_run(sibling, tmp_path).rename(tmp_path / "some.pt")
    if what in FOREIGN:
        torch.save(FOREIGN[what], path)
    for flag in ("--evaluate", "--resume"):
        (sentence,) = refused(script, f"{flag} some.pt")
        assert "some.pt" in sentence


# -- What fails on the way -----------------------------------------------------------------


class Failing(ToyVecEnv):
    """The toy game, which fails in the third update."""

    steps = 0

    def step(self, actions):
        self.steps += 1
        if self.steps == 70:
            raise self.error("it broke")
        return super().step(actions)


@both
@pytest.mark.parametrize("error", [TimeoutError, MemoryError, ValueError, KeyError])
def test_an_environment_that_fails(script, error, end_of, monkeypatch, tmp_path):
    """One sentence that names the last checkpoint, exit code 1; a traceback if it is unexpected."""
    monkeypatch.setattr(Failing, "error", error, raising=False)
    flags = "--env-id test_scripts:Failing --save-every 1 --total-timesteps 640"
    code, said = end_of(script, f"{TINY} {flags}")
    assert code == 1
    (sentence,) = re.findall(rf"^{script}\.py: error: (.*)$", said, re.MULTILINE)
    assert "it broke" in sentence
    (run_dir,) = Path("runs").iterdir()
    assert sentence.endswith(f"; the last checkpoint is {run_dir}/checkpoint_128.pt")
    assert ("Traceback" in said) == (error in (ValueError, KeyError))


class Unmade(ToyVecEnv):
    """The toy game with a mistake of its author."""

    def __init__(self, *args, **options):
        self.there_is_none


@both
def test_an_environment_with_a_mistake(script, end_of, tmp_path):
    """It is not taken for a wrong --env-id: its line is shown."""
    code, said = end_of(script, "--env-id test_scripts:Unmade")
    assert code == 1 and "self.there_is_none" in said and "module:class" not in said


class Endless(ToyVecEnv):
    """The toy game, of which only the first match ends."""

    def step(self, actions):
        *result, infos = super().step(actions)
        ended = infos.get("_episode")
        return *result, infos and infos | {"_episode": ended & (np.arange(self.num_envs) < 1)}


@both
def test_matches_that_do_not_end(script, monkeypatch, capsys, tmp_path):
    """The evaluation leaves them out and says so; if none ends, its tables are empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    flags = f"--env-id test_scripts:Endless --total-timesteps 64 {TINY} --eval-episodes 3 --eval-steps"
    for steps, number in ((30, 2), (9, 3)):
        monkeypatch.setattr(sys, "argv", [script, *flags.split(), str(steps)])
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        output = capsys.readouterr().out
        assert output.count(f"left out: {number} matches had not ended after {steps} steps") == 2
    *_, last = sorted(tmp_path.glob("runs/*/evaluation.json"))
    assert json.loads(last.read_text())["greedy"]["matches"] == {}


def test_unwritable_folder(end_of, tmp_path):
    """A file named `runs` stands where the folder should be made."""
    (tmp_path / "runs").write_text("in the way")
    code, said = end_of("trajsep_ppo", "--env-id toy_env:ToyVecEnv")
    assert code == 1 and "Traceback" not in said
    assert "error: " in said and "runs" in said
    assert os.listdir(tmp_path) == ["runs"]
