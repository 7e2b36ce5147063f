"""Gymnasium games. To train, in a folder with this file, `tuple_env.py`, `parallel_env.py` and the script:

    python trajsep_ppo.py --env-id tuple_games:RwareVecEnv --positive-reward-weight 1
    python trajsep_ppo.py --env-id tuple_games:LbfVecEnv --positive-reward-weight 1

examples/README.md has more.
"""

import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
from tuple_env import as_parallel

sys.path.append(str(Path(__file__).resolve().parent.parent / "pettingzoo"))  # or parallel_env.py is beside this file

from parallel_env import ParallelVecEnv  # noqa: E402

# Four robots bring shelves to a goal. The time limit is Gymnasium's: the game's own would be a termination.
rware = partial(
    gym.make, "rware:rware-tiny-4ag-easy-v2", max_steps=None, max_episode_steps=500, disable_env_checker=True
)
RwareVecEnv = partial(ParallelVecEnv, make=as_parallel(rware))

# Three players of different levels pick up food together. Here too the time limit is Gymnasium's.
lbf = partial(gym.make, "lbforaging:Foraging-8x8-3p-3f-v3", max_episode_steps=50, disable_env_checker=True)


def begin_lbf(env):
    """The game's own time limit is never reached, and players are not kept from cells of the match before."""
    env.game.unwrapped._max_episode_steps = 10**9
    for player in env.game.unwrapped.players:
        player.position = None


LbfVecEnv = partial(ParallelVecEnv, make=as_parallel(lbf), before_reset=begin_lbf)
