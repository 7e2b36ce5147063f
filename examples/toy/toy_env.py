"""The smallest environment that the scripts train on: workers press the button of the colour that they stand on.

To train on it, in a folder with this file, `trajsep_ppo.py` and `hybrid_model.py`:

    python trajsep_ppo.py --env-id toy_env:ToyVecEnv --env-kwargs slots 8

check_env.py tells whether an environment keeps the contract.
"""

import gymnasium as gym
import numpy as np

SIZE, COLOURS, LENGTH = 8, 4, 10


class ToyVecEnv(gym.vector.VectorEnv):
    """N matches of P = 2 teams of up to E = slots workers, who come and go. The right button earns 1 / E.

    The scripts pass num_workers, held_out, first_match and group_by to every environment. Evaluation (held_out) and
    the other processes of torchrun (first_match) play other matches; the rest is nothing to a toy. A match lasts LENGTH
    steps by the rules, so it is terminated; a mere time limit would truncate it, and needs infos["final_obs"].
    """

    metadata = {"name": "toy", "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs,
        slots=16,
        num_workers=None,
        held_out=False,
        first_match=0,
        group_by="entity",
    ):
        if group_by != "entity":
            raise ValueError(f"each worker is its own group: group_by must be entity, got {group_by}")
        self.num_envs, self.shape = num_envs, (num_envs, 2, slots)
        self.place = [held_out, first_match]
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
        self.rng = np.random.default_rng(seed if seed is None else [*self.place, seed])
        self.time, self.returns = np.zeros(self.num_envs, np.int64), np.zeros(self.shape[:2])
        self.live = self.rng.random(self.shape) < 2 / 3
        return self._observe(), {}

    def step(self, actions):
        rewards = np.float32(self.live & (actions == self.colour)) / self.shape[2]  # of the workers that acted
        self.time, self.returns = self.time + 1, self.returns + rewards.sum(-1)
        over, infos = self.time == LENGTH, {}
        if over.any():
            infos = {"_episode": over, "episode": {"l": self.time.copy(), "r": self.returns.copy()}}
            self.time[over], self.returns[over] = 0, 0
        # A slot is seen empty at least once after its worker leaves. After the last step comes the next match.
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
            "kind": self.live.astype(np.int64),  # 0 in empty slots
            "group": slot,  # a trajectory for each worker
            "action_mask": np.ones((*self.shape, COLOURS), bool),
        }
