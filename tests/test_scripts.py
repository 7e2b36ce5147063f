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

import global_ppo
import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("trajsep_ppo", "global_ppo")
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
    """A tiny training: arguments, TensorBoard events, checkpoint and evaluation are all there and fit together."""
    process, run_dir = trained(script)
    assert re.fullmatch(rf"{script}__1__\d+", run_dir.name)
    assert not list(run_dir.glob("*.tmp"))
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr

    arguments = json.loads((run_dir / "args.json").read_text())
    assert arguments["total_timesteps"] == STEPS and arguments["num_envs"] == 2 and arguments["seed"] == 1

    (path,) = run_dir.glob("checkpoint_*")
    assert path.name == f"checkpoint_{STEPS}.pt"
    checkpoint = torch.load(path, weights_only=True)
    assert {"model", "optimizer", "args", "global_step"} <= checkpoint.keys()
    assert any("rng" in key for key in checkpoint)
    assert checkpoint["global_step"] == STEPS and json.loads(json.dumps(checkpoint["args"])) == arguments
    assert checkpoint["optimizer"]["state"]
    assert all(x.isfinite().all() for x in checkpoint["model"].values())

    (count,) = re.findall(r"([\d,]+) parameters", process.stdout)
    count = int(count.replace(",", ""))
    assert count == sum(x.numel() for x in checkpoint["model"].values()) <= 203_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard(trained, script):
    """CleanRL's names, one value per update against environment steps, all finite, the learning rate falling to 0."""
    _, run_dir = trained(script)
    events = EventAccumulator(str(run_dir)).Reload()
    assert TAGS <= set(events.Tags()["scalars"])
    module = {"trajsep_ppo": trajsep_ppo, "global_ppo": global_ppo}[script]
    rates = events.Scalars("charts/learning_rate")
    assert [event.step for event in rates] == [64, 128, 192, 256, 320, 384]
    shares = [event.value / module.Args.learning_rate for event in rates]
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
    """--evaluate CHECKPOINT gives the numbers of the evaluation after training, with another number of workers."""
    _, run_dir = trained("trajsep_ppo")
    copy = tmp_path / "elsewhere" / "some.pt"
    copy.parent.mkdir()
    copy.write_bytes(trajsep_ppo.checkpoints(run_dir)[-1].read_bytes())
    process = run("trajsep_ppo", tmp_path, "--evaluate", copy, "--eval-episodes", 1, "--num-workers", 0)
    assert process.returncode == 0, process.stderr
    assert (copy.parent / "evaluation.json").read_text() == (run_dir / "evaluation.json").read_text()
    assert sorted(os.listdir(copy.parent)) == ["evaluation.json", "some.pt"]
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_video(trained):
    """--capture-video leaves an animated picture of one match beside the checkpoint, and is no part of the run."""
    from PIL import Image

    _, run_dir = trained("trajsep_ppo", "--capture-video", "--num-workers", "0", steps=128)
    (path,) = run_dir.glob("video.*")
    with Image.open(path) as video:
        assert video.n_frames > 10 and min(video.size) >= 200


# ------------------------------------------------------------------------------------------------------
# Repeating a run
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_parameters(trained, script):
    """Twice the same seed: bit-identical parameters and evaluation, in one process or in several."""
    _, first = trained(script)
    _, again = trained(script, "--num-workers", "0" if script == "trajsep_ppo" else "2")
    assert same(parameters_of(first), parameters_of(again))
    assert (first / "evaluation.json").read_text() == (again / "evaluation.json").read_text()


def test_what_changes_the_parameters(trained):
    """Another seed and each of the ablations train something else than the same steps without them."""
    _, run_dir = trained("trajsep_ppo", "--capture-video", "--num-workers", "0", steps=128)
    plain = parameters_of(run_dir)
    assert plain.keys() == parameters_at_start().keys() and not same(plain, parameters_at_start())
    variants = (
        ("--seed", "2"),
        ("--group-by", "cluster"),
        ("--shared", "critic", "ratio", "entropy", "dones", "--agent-reward-weight", "0"),
        ("--top-samples", "1", "--top-by", "random"),
    )
    for flags in variants:
        _, run_dir = trained("trajsep_ppo", "--num-workers", "0", *flags, steps=128)
        assert not same(plain, parameters_of(run_dir)), flags


# ------------------------------------------------------------------------------------------------------
# Siblings
# ------------------------------------------------------------------------------------------------------


def test_shared_flags_have_equal_defaults():
    """All flags of the baseline are in the separated script with the same default and help; five are its own."""
    ours = {field.name: field for field in dataclasses.fields(trajsep_ppo.Args)}
    theirs = {field.name: field for field in dataclasses.fields(global_ppo.Args)}
    assert ours.keys() - theirs.keys() == {"agent_reward_weight", "group_by", "shared", "top_samples", "top_by"}
    assert theirs.keys() <= ours.keys()
    assert (ours.pop("exp_name").default, theirs.pop("exp_name").default) == SCRIPTS
    for name, field in theirs.items():
        assert (field.default, field.type) == (ours[name].default, ours[name].type), name


def changes():
    """The lines of each script, and the pairs of ranges in which they differ."""
    lines = [(ROOT / f"{script}.py").read_text().splitlines() for script in SCRIPTS]
    blocks = difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()
    return lines, [(slice(a, b), slice(c, d)) for tag, a, b, c, d in blocks if tag != "equal"]


def test_the_diff_is_small():
    """`git diff --no-index --numstat` of the two scripts: at most 60 lines, added and deleted ones together."""
    command = ["git", "diff", "--no-index", "--numstat", "trajsep_ppo.py", "global_ppo.py"]
    try:
        added, deleted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()[:2]
    except FileNotFoundError:  # no git
        (ours, theirs), blocks = changes()
        deleted, added = (sum(len(lines[block[i]]) for block in blocks) for i, lines in enumerate((ours, theirs)))
    assert 0 < int(added) + int(deleted) <= 60


def test_every_difference_is_marked():
    """Each place where the scripts differ carries the marker (*), or follows one within its section."""
    (ours, theirs), blocks = changes()
    docstring_end = ours.index('"""', 1)
    for ours_block, theirs_block in blocks:
        if ours_block.stop > docstring_end:
            marked = ours[max(ours_block.start - 20, 0) : ours_block.stop] + theirs[theirs_block]
            assert any("(*)" in line for line in marked), ours[ours_block]


# ------------------------------------------------------------------------------------------------------
# Bad input and failures
# ------------------------------------------------------------------------------------------------------

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
    ("--max-robots 0", "max-robots"),
    ("--map-size 0", "map-size"),
    ("--min-factories 4 --max-factories 3", "factories"),
    ("--learning-rate 0", "learning-rate"),
    ("--gamma 1.5", "gamma"),
    ("--gae-lambda nan", "gae-lambda"),
    ("--clip-coef -0.2", "clip-coef"),
    ("--positive-reward-weight 0", "positive-reward-weight"),
    ("--seed -1", "seed"),
    ("--evaluate nowhere/some.pt", "nowhere/some.pt"),
    *([] if torch.cuda.is_available() else [("--cuda", "--cuda needs a GPU")]),
]
BAD_TRAJSEP_FLAGS = [
    ("--agent-reward-weight 1.01", "agent-reward-weight"),
    ("--agent-reward-weight -0.1", "agent-reward-weight"),
    ("--agent-reward-weight nan", "agent-reward-weight"),
    ("--top-samples -1", "top-samples"),
    ("--top-samples 2 --shared ratio critic", "--top-samples needs a critic for each group"),
]
# What tyro refuses, in a box of its own
ODD_FLAGS = [
    ("trajsep_ppo", "--total-timesteps many", "many"),
    ("global_ppo", "--no-such-flag 3", "no-such-flag"),
    ("global_ppo", "--agent-reward-weight 1", "agent-reward-weight"),
    ("trajsep_ppo", "--shared reward", "reward"),
    ("trajsep_ppo", "--top-samples 1 --top-by none", "none"),
]


def refused(script, flags, monkeypatch, capfd, cwd, lines=1):
    """Run a script in this process with flags that it must refuse; what it says.

    It must end with code 2 and so many lines (0: any number) on standard error, and leave the folder as it was.
    """
    before = {path: path.is_dir() or path.read_bytes() for path in cwd.rglob("*")}
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    output = capfd.readouterr()
    assert end.value.code == 2
    assert {path: path.is_dir() or path.read_bytes() for path in cwd.rglob("*")} == before, "something was written"
    assert "Traceback" not in output.err
    assert lines in (0, len(output.err.strip().splitlines())), output.err
    return output.err


@pytest.mark.parametrize(
    "script, flags, named",
    [(script, *bad) for script in SCRIPTS for bad in BAD_FLAGS] + [("trajsep_ppo", *bad) for bad in BAD_TRAJSEP_FLAGS],
)
def test_bad_flags(script, flags, named, monkeypatch, capfd, tmp_path):
    """One sentence that names the flag or its value, exit code 2, nothing written."""
    assert named in refused(script, flags.split(), monkeypatch, capfd, tmp_path)


@pytest.mark.parametrize("script, flags, named", ODD_FLAGS)
def test_odd_flags(script, flags, named, monkeypatch, capfd, tmp_path):
    """What tyro itself refuses: its box names the flag or its value, exit code 2, nothing written."""
    assert named in refused(script, flags.split(), monkeypatch, capfd, tmp_path, lines=0)


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("trajsep_ppo", "--group-by nobody", "group_by must be one of entity"),
        ("trajsep_ppo", "--group-by quadrants --max-robots 3", "quadrants needs at least 4 robot slots"),
        ("global_ppo", "--reward gold", "reward must be one of ice, lichen"),
    ],
)
def test_what_the_environment_refuses(script, flags, words, tmp_path):
    """One sentence of its own."""
    process = run(script, tmp_path, *flags.split())
    assert process.returncode == 1 and words in process.stderr and "Traceback" not in process.stderr


def test_bad_flag_in_a_process_of_its_own(tmp_path):
    """The same, seen from a shell: no warning or banner joins the sentence."""
    process = run("trajsep_ppo", tmp_path, "--agent-reward-weight", "1.5")
    assert process.returncode == 2 and process.stdout == ""
    assert "agent-reward-weight" in process.stderr and len(process.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_unwritable_folder(script, monkeypatch, capfd, tmp_path):
    """A file named `runs` stands where the folder should be made."""
    (tmp_path / "runs").write_text("in the way")
    assert "runs" in refused(script, [], monkeypatch, capfd, tmp_path)


def small_checkpoint(path, **changes):
    """A checkpoint of the right form, as training writes it, but for `changes`."""
    checkpoint = {"args": dataclasses.asdict(trajsep_ppo.Args()), "model": parameters_at_start(), "global_step": 1}
    torch.save(checkpoint | changes, path)


def random_bytes(path):
    path.write_bytes(bytes(range(256)) * 40)


def empty_file(path):
    path.write_bytes(b"")


def folder(path):
    path.mkdir()


def truncated(path):
    small_checkpoint(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def list_of_tensors(path):
    torch.save([torch.zeros(3)], path)


def bare_state_dict(path):
    torch.save(parameters_at_start(), path)


def code_in_a_pickle(path):
    torch.save({"model": pytest.approx, "args": {}}, path)  # weights_only refuses what is not data


def other_network(path):
    small_checkpoint(path, model={"layer.weight": torch.zeros(2, 2)})


def no_network(path):
    small_checkpoint(path, model=5)


def no_arguments(path):
    small_checkpoint(path, args=None)


def foreign_arguments(path):
    small_checkpoint(path, args={"map_size": "large", "num_envs": None})


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "damage",
    [
        *(random_bytes, empty_file, folder, truncated, list_of_tensors, bare_state_dict, code_in_a_pickle),
        *(other_network, no_network, no_arguments, foreign_arguments),
    ],
)
def test_damaged_and_foreign_checkpoints(script, damage, monkeypatch, capfd, tmp_path):
    """Whatever the file holds: one sentence that names it, exit code 2, nothing written."""
    damage(tmp_path / "some.pt")
    assert "some.pt" in refused(script, ["--evaluate", "some.pt"], monkeypatch, capfd, tmp_path)


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
    """One line that names the matches and the last checkpoint, which is whole; no process is left, nothing hangs."""
    flags = [*TINY, "--total-timesteps", 100_000, "--num-workers", 2, "--save-every", 1]
    command = [sys.executable, str(ROOT / "trajsep_ppo.py"), *map(str, flags)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 120
        while not list(tmp_path.glob("runs/*/checkpoint_*.pt")):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.1)
        workers = children_of(process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors
    (sentence,) = re.findall("error: .*", errors)  # among the progress bar's lines
    (run_dir,) = tmp_path.glob("runs/*")
    checkpoint = trajsep_ppo.checkpoints(run_dir)[-1]
    assert "match" in sentence and str(checkpoint.relative_to(tmp_path)) in sentence
    assert torch.load(checkpoint, weights_only=True)["global_step"] >= 64
    deadline = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
