"""Gymnasium games whose observations, actions and rewards are tuples over agents, for ParallelVecEnv.

A game is a line, beside this file, `parallel_env.py` (of examples/pettingzoo), `trajsep_ppo.py` and `hybrid_model.py`:

    RwareVecEnv = partial(ParallelVecEnv, make=as_parallel(lambda: gymnasium.make("rware:rware-tiny-4ag-easy-v2")))
"""

import gymnasium as gym
import numpy as np


def as_parallel(make):
    """A function from the options to a game that ParallelVecEnv takes."""
    return lambda **options: TupleEnv(make(**options))


class TupleEnv:
    """What ParallelVecEnv needs of a ParallelEnv; its agents are agent_0, agent_1 ..., and end together."""

    def __init__(self, game):
        spaces = game.observation_space, game.action_space
        if not all(isinstance(space, gym.spaces.Tuple) for space in spaces):
            raise ValueError(f"the spaces must be a Tuple with a part for each agent, not {spaces[0]} and {spaces[1]}")
        self.game, self.render, self.close = game, game.render, game.close
        self.possible_agents = [f"agent_{i}" for i in range(len(game.action_space))]
        name = game.spec.id.split("/")[-1] if game.spec else type(game).__name__
        self.metadata = {**game.metadata, "name": name}

    def observation_space(self, agent):
        return self.game.observation_space[self.possible_agents.index(agent)]

    def action_space(self, agent):
        return self.game.action_space[self.possible_agents.index(agent)]

    def reset(self, seed=None):
        obs, _ = self.game.reset(seed=seed)
        self.agents = self.possible_agents
        return dict(zip(self.agents, obs)), {}

    def step(self, actions):
        obs, rewards, terminated, truncated, _ = self.game.step(tuple(actions[agent] for agent in self.agents))
        parts = [dict(zip(self.possible_agents, part)) for part in (obs, rewards)]
        ends = [bool(np.all(flags)) for flags in (terminated, truncated)]  # some games have a flag for each agent
        self.agents = [] if any(ends) else self.agents
        return *parts, *[dict.fromkeys(self.possible_agents, end) for end in ends], {}
