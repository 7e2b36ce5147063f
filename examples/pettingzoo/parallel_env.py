"""Any PettingZoo ParallelEnv with discrete actions as a vector environment with one reward per entity: see games.py."""

import gymnasium as gym
import numpy as np


class ParallelVecEnv(gym.vector.VectorEnv):
    """N matches of a game, played in this process. Every agent has a slot of its own, and may come and go.

    Features are the flattened observation, divided by its bounds where they are beyond 1, and one-hots of kind and
    slot. An action mask may be in the observation, beside "observation", or in the infos.

    Args:
        make: a function from the options (and render_mode) to a game; a ValueError says if that does not fit.
        team, kind: functions of an agent's name; by default all agents are of one.
        board, position: functions of a game ([H, W, C] uint8, percent), and of game and agent (x, y); or neither.
        before_reset: called with a game, for what its seed leaves open.
        num_workers: ignored; the rest is as in LuxVecEnv, a "cluster" being the agents of one kind in a team.
    """

    # fmt: off
    def __init__(
        self, num_envs, make, team=None, kind=None, board=None, position=None, before_reset=None, num_workers=None,
        held_out=False, first_match=0, group_by="entity", **options,
    ):  # fmt: on
        if group_by not in ("entity", "cluster"):
            raise ValueError(f"group_by must be entity or cluster, got {group_by}")
        try:
            self.games = [make(**options) for _ in range(num_envs)]
        except Exception as error:  # a game may raise anything
            raise ValueError(f"make fails with the options {options}: {type(error).__name__}: {error}") from error
        self.num_envs, self.first_match = num_envs, first_match
        self.seeds = (0, 2**20) if held_out else (2**20, 2**31)
        self.board, self.position, self.before_reset = board, position, before_reset or (lambda game: None)
        game, agents = self.games[0], getattr(self.games[0], "possible_agents", None)
        if not agents or hasattr(game, "agent_iter") or len(set(map(id, self.games))) < num_envs:
            raise ValueError(f"make must return a new ParallelEnv at every call, with possible_agents, not {game}")
        teams, kinds, self.kinds, self.actions, self.spaces = {}, {}, {}, {}, {}
        for agent in agents:
            teams.setdefault(team(agent) if team else 0, []).append(agent)
            self.kinds[agent] = kinds.setdefault(kind(agent) if kind else 0, len(kinds) + 1)
            actions, seen = game.action_space(agent), game.observation_space(agent)
            masked = isinstance(seen, gym.spaces.Dict) and set(seen) == {"observation", "action_mask"}
            seen = seen["observation"] if masked else seen
            flat = gym.spaces.flatten_space(seen)
            nameless = None in teams or None in kinds
            if nameless or not isinstance(actions, gym.spaces.Discrete) or not isinstance(flat, gym.spaces.Box):
                raise ValueError(f"{agent} needs Discrete actions, observations of a fixed size, a team and a kind")
            bound = np.maximum(abs(flat.low.astype(float)), abs(flat.high.astype(float)))
            scale = np.where((bound > 1) & (bound < 1e6), bound, 1)
            self.spaces[agent], self.actions[agent] = (seen, masked, scale), actions
        self.slots = {agent: (p, e) for p, names in enumerate(teams.values()) for e, agent in enumerate(names)}
        game.reset(seed=0)
        P, E, K = len(teams), max(map(len, teams.values())), len(kinds)
        F = max(len(scale) for _, _, scale in self.spaces.values())
        (p, e), k = np.array([*self.slots.values()]).T, np.array([self.kinds[agent] for agent in self.slots])
        labels = np.hstack([np.eye(K)[k - 1][:, K == 1 :], np.eye(E)[e][:, E == 1 :]])  # one alone needs none
        A = max(actions.n for actions in self.actions.values())
        boxes = {
            "features": (-np.inf, np.inf, (P, E, F + labels.shape[1]), np.float32),
            "kind": (0, K, (P, E), np.int64),
            "group": (0, E - 1, (P, E), np.int64),
            "action_mask": (0, 1, (P, E, A), np.bool_),
        }
        if board or position:
            view = np.asarray(board and position and board(game))
            if view.ndim != 3 or view.dtype != np.uint8:
                raise ValueError("board must return [H, W, C] of uint8; board needs position, and position board")
            boxes["board"] = 0, 100, (P, *view.shape), np.uint8
            boxes["position"] = 0, max(view.shape[:2]) - 1, (P, E, 2), np.int64
        self.single_observation_space = gym.spaces.Dict({key: gym.spaces.Box(*box) for key, box in boxes.items()})
        self.single_action_space = gym.spaces.MultiDiscrete(np.full((P, E), A))
        self.obs = {key: np.zeros((num_envs, *x.shape), x.dtype) for key, x in self.single_observation_space.items()}
        self.obs["features"][:, p, e, F:] = labels
        together = (p[:, None] == p) & (k[:, None] == k if group_by == "cluster" else e[:, None] == e)
        self.obs["group"][:, p, e] = e[together.argmax(1)]  # named after its first member
        name, mode = str(game.metadata.get("name", "game")), gym.vector.AutoresetMode.SAME_STEP
        drawn = {"rgb_array"}.intersection(game.metadata.get("render_modes", ()))
        self.metadata = {"name": name, "autoreset_mode": mode, "render_modes": [*drawn]}

    def reset(self, *, seed=None, options=None):
        """Begin a match everywhere; match i is the same for the same seed, whatever N is."""
        self.seed = int(np.random.SeedSequence().entropy % 2**31) if seed is None else seed
        self.played, self.lengths = np.zeros((2, self.num_envs), np.int64)
        self.returns = np.zeros(self.obs["kind"].shape[:2])
        self._begin(range(self.num_envs))
        return self.obs, {}

    def step(self, actions):
        """Play actions [N, P, E]; returns observations, rewards [N, P, E], terminated and truncated [N], infos."""
        rewards = np.zeros(actions.shape, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for i, game in enumerate(self.games):
            live = {agent: slot for agent, slot in self.slots.items() if self.obs["kind"][i][slot]}
            chosen = {agent: int(actions[i][slot] + self.actions[agent].start) for agent, slot in live.items()}
            obs, paid, terminations, truncations, infos = game.step(chosen)
            for agent, slot in self.slots.items():
                reward = paid.get(agent, 0)
                rewards[i][slot] = reward if np.ndim(reward) == 0 else np.nan
                if not np.isfinite(rewards[i][slot]):
                    raise RuntimeError(f"{agent} got the reward {reward}: the game must pay a finite number")
            self.returns[i] += (rewards[i] * (self.obs["kind"][i] > 0)).sum(-1)
            dead = {agent for agent in live if terminations.get(agent)}
            cut = {agent for agent in live if truncations.get(agent)} - dead
            stay = [agent for agent in game.agents if agent not in dead | cut]
            if stay and (back := (dead | cut).intersection(game.agents)):
                raise RuntimeError(f"{back.pop()} ended and is there again: it must be away for a step in between")
            truncated[i], terminated[i] = not stay and bool(cut), not stay and not cut
            self._observe(i, stay or cut.intersection(obs), obs, infos)  # those cut short have a last observation
        self.lengths, infos = self.lengths + 1, {}
        if (over := terminated | truncated).any():
            infos = {"episode": {"l": self.lengths.copy(), "r": self.returns.copy()}, "_episode": over}
            infos |= {"final_obs": {key: x.copy() for key, x in self.obs.items()}, "_final_obs": over}
            self._begin(np.flatnonzero(over))
        return self.obs, rewards, terminated, truncated, infos

    def render(self):
        return tuple(game.render() for game in self.games)

    def close_extras(self, **kwargs):
        for game in self.games:
            game.close()

    def _begin(self, matches):
        for i in matches:
            self.played[i] += 1
            self.lengths[i], self.returns[i] = 0, 0
            rng = np.random.default_rng([self.seed, self.first_match + i, self.played[i]])
            self.before_reset(self.games[i])
            obs, infos = self.games[i].reset(seed=int(rng.integers(*self.seeds)))
            self._observe(i, self.games[i].agents, obs, infos)

    def _observe(self, i, agents, obs, infos):
        """Write what these agents of match i see; the slots of all others are empty."""
        game, arrays = self.games[i], {key: x[i] for key, x in self.obs.items()}
        arrays["kind"][:] = 0
        for agent in agents:
            try:
                slot, n, (space, masked, scale) = self.slots[agent], self.actions[agent].n, self.spaces[agent]
                seen = obs[agent]
                mask = seen["action_mask"] if masked else infos.get(agent, {}).get("action_mask", np.ones(n))
                flat = gym.spaces.flatten(space, seen["observation"] if masked else seen).reshape(scale.shape) / scale
                if not np.isfinite(flat).all() or not np.any(mask):
                    raise ValueError("a number that is not finite, or all actions are masked")
                arrays["features"][slot][: len(flat)] = flat
                arrays["action_mask"][slot][:n] = np.reshape(mask, n)
                arrays["kind"][slot] = self.kinds[agent]
                if self.board:
                    arrays["position"][slot] = self.position(game, agent)
            except Exception as error:  # a game may show anything
                raise RuntimeError(f"{agent} does not fit the agents and spaces of the game: {error!r}") from error
        if self.board:
            arrays["board"][:] = self.board(game)
