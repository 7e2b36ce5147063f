"""The environments of examples/ in use: in a folder with a script and the network, as their docstrings say."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_env import ToyVecEnv

ROOT = Path(__file__).resolve().parent.parent
HOW = "needs magent2: pip install -r examples/battle/requirements.txt"
no_magent2 = pytest.mark.skipif(importlib.util.find_spec("magent2") is None, reason=HOW)


def run(folder, script, *flags):
    """Run a script there, as a person would; what it printed."""
    environment = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, f"{script}.py", *flags]
    pipes = {"capture_output": True, "text": True, "timeout": 600}
    result = subprocess.run(command, cwd=folder, env=environment, **pipes)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_toy():
    """A worker sees the colour of its cell, which is its right button; workers come and go."""
    env = ToyVecEnv(3, slots=5)
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=1)
    came = went = 0
    for _ in range(30):
        live = obs["kind"] > 0
        match, team, slot = np.nonzero(live)
        x, y = obs["position"][live].T
        colour = np.round(obs["board"][match, team, x, y, 0] / 100 * 3).astype(int)
        assert (obs["features"][live] == np.eye(4)[colour]).all()
        actions = rng.integers(0, 4, live.shape)
        next_obs, rewards, over, *_ = env.step(actions)
        assert rewards[live] == pytest.approx((actions[live] == colour) / 5)
        assert not rewards[~live].any()
        came += (~live & (next_obs["kind"] > 0))[~over].sum()
        went += (live & (next_obs["kind"] == 0))[~over].sum()
        obs = next_obs
    assert came > 50 and went > 50


@pytest.mark.parametrize(
    "example, script, metrics",
    [
        ("toy/toy_env.py", "trajsep_ppo", "l r"),
        ("toy/toy_env.py", "global_ppo", "l r"),
        pytest.param("battle/battle_env.py", "trajsep_ppo", "l r kills survivors won", marks=no_magent2),
        ("pettingzoo/games.py", "trajsep_ppo", "l r"),
        ("pettingzoo/games.py", "global_ppo", "l r"),
        ("gymnasium/tuple_games.py", "trajsep_ppo", "l r"),
    ],
)
def test_used_as_its_docstring_says(tmp_path, example, script, metrics):
    """The scripts train on it, are resumed, and evaluate, with nothing else in the folder."""
    adapters = ("examples/pettingzoo/parallel_env.py", "examples/gymnasium/tuple_env.py")
    for path in (f"examples/{example}", *adapters, "hybrid_model.py", f"{script}.py"):
        shutil.copy(ROOT / path, tmp_path)
    if "pettingzoo" in example:
        pytest.importorskip("pettingzoo.butterfly.knights_archers_zombies_v11", exc_type=ImportError)
    elif "gymnasium" in example:
        pytest.importorskip("rware")
        pytest.importorskip("lbforaging")
    text = (ROOT / "examples" / example).read_text()
    for number, flags in enumerate(re.findall(r"^    python trajsep_ppo.py (.*)$", text, re.M)):
        shutil.copytree(tmp_path, tmp_path / f"copy {number}", ignore=shutil.ignore_patterns("copy*"))
        use(tmp_path / f"copy {number}", script, flags, metrics)


def use(tmp_path, script, flags, metrics):
    """Train with these flags, resume, evaluate, and look at what was written."""
    flags += " --total-timesteps 256 --num-envs 4 --num-steps 32 --eval-episodes 0"
    run(tmp_path, script, *flags.split())
    (folder,) = (tmp_path / "runs").iterdir()
    run(tmp_path, script, "--resume", f"runs/{folder.name}", "--total-timesteps", "512")
    said = run(tmp_path, script, "--evaluate", f"runs/{folder.name}", "--eval-episodes", "2")
    assert "2 held-out matches" in said
    (path,) = tmp_path.glob("runs/evaluate__*/evaluation.json")
    for evaluation in json.loads(path.read_text()).values():
        assert evaluation["matches"].keys() == {*metrics.split()}
        assert all(len(x) == 2 for x in evaluation["matches"].values())
    events = EventAccumulator(str(folder)).Reload().Scalars("losses/policy_loss")
    assert [event.step for event in events] == [128, 256, 384, 512]
