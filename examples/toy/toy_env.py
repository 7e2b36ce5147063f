"""The smallest environment that the scripts train on: workers press the button of the colour that they stand on.

To train on it, copy this file, `trajsep_ppo.py` and `hybrid_model.py` into a folder and put

    from toy_env import ToyError as LuxError, ToyVecEnv as LuxVecEnv

in place of the line that imports `lux_wrapper`.
"""

import gymnasium as gym
import numpy as np

SIZE, COLOURS, LENGTH = 8, 4, 10


class ToyError(RuntimeError):
    """What the scripts expect of a game that fails; this one never does."""


class ToyVecEnv(gym.vector.VectorEnv):
    """N matches of P = 2 teams with E = slots places for workers, who come and go. The right button earns 1 / E."""

    metadata = {"name": "toy", "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs, slots=16, **other):  # other: options of LuxVecEnv, which mean nothing here
        self.num_envs, self.shape = num_envs, (num_envs, 2, slots)
        spaces = {
            "board": gym.spaces.Box(0, 100, (2, SIZE, SIZE, 1), np.uint8),
            "features": gym.spaces.Box(0, 1, (2, slots, COLOURS), np.float32),
            "position": gym.spaces.Box(0, SIZE - 1, (2, slots, 2), np.int64),
            "kind": gym.spaces.Box(0, 1, (2, slots), np.int64),
            "group": gym.spaces.Box(0, slots - 1, (2, slots), np.int64),
            "action_mask": gym.spaces.MultiBinary((2, slots, COLOURS)),
        }
        self.single_observation_space = gym.spaces.Dict(spaces)
        self.single_action_space = gym.spaces.MultiDiscrete(np.full((2, slots), COLOURS))

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.time, self.returns = np.zeros(self.num_envs, np.int64), np.zeros(self.shape[:2])
        self.live = self.rng.random(self.shape) < 2 / 3
        return self._observe(), {}

    def step(self, actions):
        rewards = np.float32(self.live & (actions == self.colour)) / self.shape[2]  # of those who were there to act
        self.time, self.returns = self.time + 1, self.returns + rewards.sum(-1)
        over, infos = self.time == LENGTH, {}
        if over.any():
            infos = {"_episode": over, "episode": {"l": self.time.copy(), "r": self.returns.copy()}}
            self.time[over], self.returns[over] = 0, 0
        # A slot whose worker leaves is seen empty at least once. What is seen after the last step is the next match.
        chance = self.rng.random(self.shape)
        self.live = np.where(self.live, chance > 1 / 8, chance < 1 / 4)
        self.live[over] = chance[over] < 2 / 3
        return self._observe(), rewards, over, np.zeros_like(over), infos

    def _observe(self):
        colours = self.rng.integers(0, COLOURS, (*self.shape[:2], SIZE, SIZE))
        x, y = self.rng.integers(0, SIZE, (2, *self.shape))
        match, team, slot = np.indices(self.shape)
        self.colour = colours[match, team, x, y]
        return {
            "board": np.uint8(100 * colours / (COLOURS - 1))[..., None],  # percent
            "features": np.eye(COLOURS, dtype=np.float32)[self.colour],
            "position": np.stack([x, y], -1),
            "kind": self.live.astype(np.int64),  # 0 where there is nobody
            "group": slot,  # everybody has a trajectory
            "action_mask": np.ones((*self.shape, COLOURS), bool),
        }
