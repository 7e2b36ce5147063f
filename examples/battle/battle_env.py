"""MAgent2's battle, two armies of 81 soldiers, as a vector environment with one reward per entity.

To train on it, `pip install magent2`, and in a folder with this file, `trajsep_ppo.py` and `hybrid_model.py`:

    python trajsep_ppo.py --env-id battle_env:BattleVecEnv --env-kwargs map_size 24

The contract of environments and the axis letters are at the top of `lux_wrapper.py`.
Both armies are players: red is the first and starts on the left, blue is the second.
"""

import gymnasium as gym
import numpy as np
from magent2.environments import battle_v4

# What the game's actions do, in its order: go to one of 13 cells (the middle one is to stay), or hit one of 8.
MOVES = [(dx, dy) for dy in range(-2, 3) for dx in range(-2, 3) if abs(dx) + abs(dy) <= 2]
HITS = [(dx, dy) for dy in range(-1, 2) for dx in range(-1, 2) if (dx, dy) != (0, 0)]
TARGETS, IS_HIT = np.array(MOVES + HITS), np.arange(21) >= 13
WALL, RED, BLUE = 0, 1, 3  # channels of the game's state; the next one has the army's health
FEATURES = ("health", "enemy_dx", "enemy_dy", "enemy_distance", "is_red", "own_army", "enemy_army", "time")
SQUAD = 9  # soldiers of a group with group_by="cluster": at first the soldiers of one column
# By default the game pays 5 for a kill and 0.1 for each of the four hits before it; here a hit is worth more.
KILL, REWARDS = 5, {"attack_opponent_reward": 1.0}


class BattleVecEnv(gym.vector.VectorEnv):
    """N battles of P = 2 players; with an opponent, of P = 1.

    Args:
        num_envs: N.
        map_size: side of the board, at least 12; 45 has E = 81 soldiers in each army, 24 has 16.
        safe_masks: mask hits at cells without an enemy, which cost a little, and steps into walls.
        group_by: "entity" or "cluster".
        held_out, first_match: as in LuxVecEnv. The board is always the same; the seed decides who moves first.
        num_workers: ignored, all battles are fought in this process.
        render_mode: None or "rgb_array".
        max_steps: a battle is cut short (truncated) after these.
        opponent: a function of what one army of every match observes, a dict of arrays [N, E, ...], that gives its
            actions [N, E]. The caller then is red in the even matches and blue in the odd ones.

    Raises:
        ValueError: if the board is too small.
    """

    metadata = {
        "name": "battle",
        "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP,
        "render_modes": ["rgb_array"],
    }

    def __init__(
        self,
        num_envs,
        map_size=45,
        safe_masks=True,
        max_steps=300,
        opponent=None,
        group_by="entity",
        held_out=False,
        first_match=0,
        num_workers=None,
        render_mode=None,
    ):
        if group_by not in ("entity", "cluster"):
            raise ValueError(f"group_by must be entity or cluster, got {group_by}")
        if map_size < 12:
            raise ValueError(f"a battle needs a board of 12 x 12 cells or more, got {map_size} x {map_size}")
        self.num_envs = num_envs
        self.safe_masks = safe_masks
        self.held_out = held_out
        self.first_match = first_match
        self.max_steps = max_steps
        self.opponent = opponent
        options = {"map_size": map_size, "max_cycles": max_steps, "render_mode": render_mode, **REWARDS}
        self.games = [battle_v4.parallel_env(**options) for _ in range(num_envs)]
        self.matches = np.arange(num_envs)
        self.side = self.matches % 2
        self.size = self.games[0].team_sizes[0]
        shape = (num_envs, 2, self.size)
        squads = np.arange(self.size) // (SQUAD if group_by == "cluster" else 1)
        self.obs = {
            "board": np.zeros((num_envs, 2, map_size, map_size, 5), np.uint8),
            "features": np.zeros((*shape, len(FEATURES)), np.float32),
            "position": np.zeros((*shape, 2), np.int64),
            "kind": np.zeros(shape, np.int64),
            "group": np.broadcast_to(squads, shape).copy(),
            "action_mask": np.zeros((*shape, len(TARGETS)), bool),
        }
        high = {"board": 100, "position": map_size - 1, "group": self.size - 1}
        spaces = {key: (self._own(x)[0], high.get(key, 1)) for key, x in self.obs.items()}
        self.single_observation_space = gym.spaces.Dict(
            {k: gym.spaces.Box(-1 if k == "features" else 0, top, x.shape, x.dtype) for k, (x, top) in spaces.items()}
        )
        self.single_action_space = gym.spaces.MultiDiscrete(np.full(spaces["kind"][0].shape, len(TARGETS)))

    def reset(self, *, seed=None, options=None):
        """Begin a battle everywhere; match i is the same for the same seed, whatever N is."""
        seed = np.random.SeedSequence().entropy % 2**31 if seed is None else seed
        self.rngs = [np.random.default_rng([self.held_out, seed, self.first_match + i]) for i in self.matches]
        self.returns = np.zeros((self.num_envs, 2))
        for i in self.matches:
            self._begin(i)
        return {key: self._own(x) for key, x in self.obs.items()}, {}

    def step(self, actions):
        """Play actions [N, P, E]; returns observations, rewards [N, P, E], terminated and truncated [N], infos."""
        if self.opponent is not None:
            mine, actions, other = actions, np.empty(self.obs["kind"].shape, np.int64), (self.matches, 1 - self.side)
            actions[self.matches, self.side] = mine[:, 0]
            actions[other] = self.opponent({key: x[other] for key, x in self.obs.items()})
        rewards = np.zeros(actions.shape, np.float32)
        left, length = np.zeros((self.num_envs, 2), np.int64), np.zeros(self.num_envs, np.int64)
        for i, game in enumerate(self.games):
            live = self.obs["kind"][i] > 0  # in the order of `agents`, which names the living
            paid = game.step(dict(zip(game.agents, actions[i][live].tolist())))[1]
            rewards[i][live] = np.array([*paid.values()]) / KILL
            left[i], length[i] = [game.env.get_num(army) for army in game.handles], game.frames
        self.returns += rewards.sum(-1)
        terminated = (left == 0).any(1)
        truncated = (length >= self.max_steps) & ~terminated
        infos = {}
        if (over := terminated | truncated).any():
            enemies = left[:, ::-1]
            episode = {"r": self.returns.copy(), "kills": self.size - enemies, "survivors": left}
            episode["won"] = (1 + np.sign(left - enemies)) / 2  # 0.5 is a draw
            infos = {"_episode": over, "episode": {"l": length} | {key: self._own(x) for key, x in episode.items()}}
        for i in np.flatnonzero(~terminated):
            self._encode(i)
        if over.any():
            final = {key: self._own(x).copy() for key, x in self.obs.items()}
            infos |= {"final_obs": final, "_final_obs": truncated}
            for i in np.flatnonzero(over):
                self._begin(i)
        return {key: self._own(x) for key, x in self.obs.items()}, self._own(rewards), terminated, truncated, infos

    def render(self):
        """Pictures of the battles, a tuple of N arrays [height, width, 3] uint8."""
        return tuple(game.render() for game in self.games)

    def _own(self, x):
        """The caller's part of an array [N, 2, ...]: all, or against an opponent one army of each match."""
        return x if self.opponent is None else x[self.matches, self.side, None]

    def _begin(self, i):
        self.games[i].reset(seed=int(self.rngs[i].integers(2**31)))
        self.games[i].team_sizes = [self.size] * 2  # magent2 0.3.4 leaves 0: at first blue would do what red is told to
        self.returns[i] = 0
        self._encode(i)

    def _encode(self, i):
        """Write what both armies of match i see."""
        game, obs = self.games[i], {key: x[i] for key, x in self.obs.items()}
        state, places = game.state(), [game.env.get_pos(army) for army in game.handles]
        obs["kind"][:] = 0
        for p, (own, enemy) in enumerate(((RED, BLUE), (BLUE, RED))):
            slots, (x, y) = game.env.get_agent_id(game.handles[p]) - p * self.size, places[p].T
            ways = places[1 - p] - places[p][:, None]
            dx, dy = ways[np.arange(len(slots)), np.abs(ways).sum(-1).argmin(1)].T / 8
            shared = (p == 0, len(places[p]) / self.size, len(places[1 - p]) / self.size, game.frames / self.max_steps)
            own_features = [state[x, y, own + 1], dx, dy, abs(dx) + abs(dy)]
            obs["board"][p] = np.round(100 * state[..., [WALL, own, own + 1, enemy, enemy + 1]])
            obs["features"][p, slots, :4] = np.stack(own_features, -1).clip(-1, 1)
            obs["features"][p, slots, 4:] = shared
            obs["position"][p, slots], obs["kind"][p, slots] = places[p], 1
            # There are walls all around, so a target lies one cell beyond the board at most.
            free, hostile = np.pad(state[..., WALL] == 0, 1), np.pad(state[..., enemy] > 0, 1)
            x, y = (places[p][:, None] + TARGETS + 1).transpose(2, 0, 1)
            obs["action_mask"][p, slots] = np.where(IS_HIT, hostile[x, y], free[x, y]) | (not self.safe_masks)
