"""The install stand-in for pygame brings pygame-ce, owns nothing of it, and the engine draws with it."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

import lux_wrapper as lux

ROOT = Path(__file__).resolve().parent.parent


def test_installed_package_is_this_repositorys():
    """The package called pygame is the one in compat/, and has no file that pygame-ce has too."""
    ours = (ROOT / "compat" / "pygame" / "pyproject.toml").read_text()
    assert metadata.version("pygame") == re.search('^version = "(.*)"', ours, re.M)[1]
    owned = {str(path) for path in metadata.files("pygame")}
    assert owned and not owned & {str(path) for path in metadata.files("pygame-ce")}


def test_requirements_are_content():
    """luxai-s2 asks for pygame, the stand-in for pygame-ce, and both are there."""
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert not [line for line in check.stdout.splitlines() if "luxai-s2" in line or "pygame" in line]
    assert any(re.match(r"pygame\b", requirement) for requirement in metadata.requires("luxai-s2"))


def test_engine_draws_with_pygame_ce():
    """A match is drawn anew after a step; the real pygame, uninstalled too late, would have taken files along."""
    import pygame

    assert getattr(pygame, "IS_CE", False), "mend it with: pip install --force-reinstall --no-deps pygame-ce"
    env = lux.LuxVecEnv(1, num_workers=0, max_robots=6, render_mode="rgb_array")
    obs, _ = env.reset(seed=1)
    (before,) = env.render()
    for _ in range(20):
        obs, *_ = env.step(obs["action_mask"].shape[-1] - 1 - obs["action_mask"][..., ::-1].argmax(-1))
    (after,) = env.render()
    env.close()
    assert len(np.unique(after.reshape(-1, 3), axis=0)) > 50 and (before != after).any(-1).mean() > 0.001
