"""Tools that several tests share: observations made up, masked random play, a scripted team, engine taps."""

import hashlib

import gymnasium as gym
import numpy as np
import torch

import lux_wrapper as lux
import trajsep_ppo
from hybrid_model import HybridNet

# ------------------------------------------------------------------------------------------------------
# Observations made up
# ------------------------------------------------------------------------------------------------------


def made_up_observation(boards=3, size=20, factories=2, robots=4, seed=0):
    """A random observation with the wrapper's keys and types, as tensors [boards, ...]; about half the slots live."""
    generator = np.random.default_rng(seed)
    options = lux.LuxOptions(map_size=size, max_factories=factories, max_robots=robots)
    blank = {key: array[0] for key, array in lux.LuxEncoder(options).empty_obs().items()}
    obs = {key: np.zeros((boards, *array.shape[1:]), array.dtype) for key, array in blank.items()}
    kind = obs["kind"]
    kind[:, :factories] = lux.FACTORY
    kind[:, factories:] = generator.integers(lux.LIGHT, lux.HEAVY + 1, kind[:, factories:].shape)
    kind[generator.random(kind.shape) < 0.4] = lux.NOBODY
    kind[:, 0] = lux.FACTORY
    live = kind > 0
    obs["board"][:] = generator.integers(0, 101, obs["board"].shape)
    obs["features"][:] = generator.normal(size=obs["features"].shape) * live[..., None]
    obs["position"][:] = generator.integers(0, size, obs["position"].shape) * live[..., None]
    obs["group"][:] = np.arange(kind.shape[1])
    obs["action_mask"][:] = (generator.random(obs["action_mask"].shape) < 0.6) & live[..., None]
    obs["action_mask"][..., 0] |= live
    return {key: torch.from_numpy(array) for key, array in obs.items()}


def space_of(obs):
    """The space of one of the boards of an observation of tensors."""
    arrays = {key: x[0].numpy() for key, x in obs.items()}
    return gym.spaces.Dict({key: gym.spaces.Box(-np.inf, np.inf, x.shape, np.float32) for key, x in arrays.items()})


def parameters_at_start(seed=1):
    """What a training with this seed and the default flags starts with."""
    torch.manual_seed(seed)
    space = space_of(made_up_observation(1, 48, 5, 6))
    return HybridNet(space, lux.NUM_ACTIONS).state_dict()


# ------------------------------------------------------------------------------------------------------
# Play
# ------------------------------------------------------------------------------------------------------


def masked_random(rng, mask, weights=1.0):
    """A random allowed action for everybody [...] from masks [..., A]; `weights` [A] makes some likelier."""
    return np.where(mask, rng.random(mask.shape) ** (1 / np.asarray(weights)), -1).argmax(-1)


def scripted(obs, resources=("ice", "ice")):
    """Actions [N, P, E] of simple and sound play, from features and masks alone.

    Factories build heavy robots and water when they may. Robots fetch power when low, dig their player's
    resource until they carry a few loads, bring it home, and walk towards the one or the other.
    """
    kind, mask, column = obs["kind"], obs["action_mask"], lux.COLUMN
    actions = np.zeros(kind.shape, np.int64)
    for index in map(tuple, np.argwhere(kind > 0)):
        row, heavy = obs["features"][index].astype(float), kind[index] == lux.HEAVY
        if kind[index] == lux.FACTORY:
            wishes = [lux.BUILD_HEAVY, lux.WATER]
        else:
            loaded = row[column["ice"]] + row[column["ore"]] >= (0.08 if heavy else 0.2)
            weak = row[column["power"]] < (0.1 if heavy else 0.3)
            resource = resources[index[1]]
            place = "home" if loaded or weak else resource
            dx, dy = row[column[f"{place}_dx"]], row[column[f"{place}_dy"]]
            dig = [lux.DIG] if row[column[f"on_{resource}"]] else []
            wishes = [lux.DELIVER] if loaded else [lux.PICK_UP] if weak else dig
            ways = [(abs(dx), 2 if dx > 0 else 4), (abs(dy), 3 if dy > 0 else 1)]  # right, left, down, up
            wishes += [way for length, way in sorted(ways, reverse=True) if length > 0]
        wishes += np.flatnonzero(mask[index]).tolist()[:1]
        actions[index] = next(action for action in wishes if mask[index][action])
    return actions


def in_process(num_envs, max_robots=20, **options):
    """A vector environment in this process and its LuxMatch objects, whose engines tests may look into."""
    env = lux.LuxVecEnv(num_envs, num_workers=0, max_robots=max_robots, **options)
    env.reset(seed=0)  # makes the matches
    return env, env.matches


def after_every_step(match, change):
    """Let `change(state)` alter the engine's state after placement and after every step, unseen by the wrapper."""
    step = match.engine.step

    def changed_step(actions):
        obs, *rest = step(actions)
        state = match.engine.state
        if state.real_env_steps >= 0:
            change(state)
            obs = dict.fromkeys(obs, state.get_obs())
        return obs, *rest

    match.engine.step = changed_step


def entities(state):
    """All robots and all factories of both players, two lists of engine objects."""
    robots = [unit for player in lux.PLAYERS for unit in state.units[player].values()]
    return robots, [factory for player in lux.PLAYERS for factory in state.factories[player].values()]


def weak_robots(state):
    """Ids of the robots that cannot pay for an order, and so cannot stop what they can no longer pay for either."""
    return {unit.unit_id for unit in entities(state)[0] if unit.power < lux.ORDER_COST[int(unit.is_heavy())]}


def judged(accepted, actions_by_type):
    """(entity, order, whether it was accepted) for what went into the engine's validate_actions and came out of it."""
    for kind, orders in actions_by_type.items():
        passed = {entity.unit_id for entity, _ in accepted[kind]}
        for entity, order in orders:
            yield entity, order, entity.unit_id in passed


def hash_of(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
