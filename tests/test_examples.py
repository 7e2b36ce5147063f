"""The environments of examples/ in use: in a folder with a script and the network, as their docstrings say."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_env import ToyVecEnv

ROOT = Path(__file__).resolve().parent.parent
no_magent2 = pytest.mark.skipif(
    importlib.util.find_spec("magent2") is None, reason="needs magent2: pip install -r examples/battle/requirements.txt"
)


def copy(folder, script, example):
    """Put three files into a folder; returns the flags of the command in the example's docstring."""
    text = (ROOT / "examples" / example).read_text()
    (folder / Path(example).name).write_text(text)
    for name in ("hybrid_model.py", f"{script}.py"):
        (folder / name).write_text((ROOT / name).read_text())
    (flags,) = re.findall(r"^    python trajsep_ppo.py (.*)$", text, re.M)
    return flags.split()


def run(folder, script, *flags):
    """Run a script there, as a person would; what it printed."""
    environment = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{script}.py", *flags]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_toy():
    """The colour of the cell where a worker stands is in its features and is its right button; workers come and go."""
    env, rng = ToyVecEnv(3, slots=5), np.random.default_rng(0)
    obs, _ = env.reset(seed=1)
    came = went = 0
    for _ in range(30):
        live = obs["kind"] > 0
        match, team, slot = np.nonzero(live)
        x, y = obs["position"][live].T
        colour = np.round(obs["board"][match, team, x, y, 0] / 100 * 3).astype(int)
        assert (obs["features"][live].argmax(-1) == colour).all() and (obs["features"].sum(-1) == 1).all()
        actions = rng.integers(0, 4, live.shape)
        next_obs, rewards, over, *_ = env.step(actions)
        assert rewards[live] == pytest.approx((actions[live] == colour) / 5) and not rewards[~live].any()
        came += (~live & (next_obs["kind"] > 0))[~over].sum()
        went += (live & (next_obs["kind"] == 0))[~over].sum()
        obs = next_obs
    assert came > 50 and went > 50


@pytest.mark.parametrize("script", ["trajsep_ppo", "global_ppo"])
@pytest.mark.parametrize(
    "example, metrics",
    [
        ("toy/toy_env.py", "l r"),
        pytest.param("battle/battle_env.py", "l r kills survivors won", marks=no_magent2),
    ],
)
def test_used_as_its_docstring_says(tmp_path, script, example, metrics):
    """Both scripts train on it, are resumed, and evaluate what came out, with nothing else in the folder."""
    flags = copy(tmp_path, script, example)
    run(tmp_path, script, *flags, *"--total-timesteps 256 --num-envs 4 --num-steps 32 --eval-episodes 3".split())
    (folder,) = (tmp_path / "runs").iterdir()
    run(tmp_path, script, "--resume", f"runs/{folder.name}", "--total-timesteps", "512")
    assert (folder / "checkpoint_512.pt").exists()
    said = run(tmp_path, script, "--evaluate", f"runs/{folder.name}", "--eval-episodes", "2")
    assert "2 held-out matches" in said
    evaluation = json.loads((folder / "evaluation.json").read_text())["matches"]
    assert evaluation.keys() == {*metrics.split()} and all(len(x) == 2 for x in evaluation.values())
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("losses/policy_loss")] == [128, 256, 384, 512]
