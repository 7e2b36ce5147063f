"""PettingZoo games, a few lines each. To train, in a folder with this file, `parallel_env.py` and the script:

    python trajsep_ppo.py --env-id games:KazVecEnv --positive-reward-weight 1

examples/README.md has more.
"""

from functools import partial
from importlib import import_module

import numpy as np
from parallel_env import ParallelVecEnv


def game(module):
    """A function from the options to a game; imported then, so that each needs only its own packages."""
    return lambda **options: import_module(module).parallel_env(**options)


def name_of(agent):
    """knight_0 is a knight."""
    return agent.rpartition("_")[0]


def begin_kaz(env):
    """The steps until the next zombie would go on counting from the match before."""
    env.unwrapped.zombie_spawn_interval.reset()


# Two archers and two knights against zombies; the dead stay dead.
kaz = game("pettingzoo.butterfly.knights_archers_zombies_v11")
KazVecEnv = partial(ParallelVecEnv, make=kaz, kind=name_of, before_reset=begin_kaz)

# Three agents spread over three landmarks.
SpreadVecEnv = partial(ParallelVecEnv, make=game("mpe2.simple_spread_v3"))

# Three adversaries chase an agent: two teams of unequal size, and unequal observations.
TagVecEnv = partial(ParallelVecEnv, make=game("mpe2.simple_tag_v3"), team=name_of, kind=name_of)


# Eight pursuers surround 30 evaders on a board of 16 x 16 cells.
def pursuit(**options):
    env = game("pettingzoo.sisl.pursuit_v5")(**options)
    core = env.unwrapped.env
    core.evader_controller.act = lambda state: core.np_random.integers(5)  # reset does not seed the evaders' moves
    return env


def pursuit_board(env):
    """Walls, and how many pursuers and evaders are in a cell: 20 of a hundred each, up to five."""
    return np.uint8(np.clip(np.moveaxis(env.unwrapped.env.model_state[:3], 0, -1) * [100, 20, 20], 0, 100))


def pursuit_position(env, agent):
    return env.unwrapped.env.pursuer_layer.get_position(int(agent.rpartition("_")[2]))


PursuitVecEnv = partial(ParallelVecEnv, make=pursuit, board=pursuit_board, position=pursuit_position)
