"""Tools that several tests share: observations made up, play, and taps into the engine."""

import hashlib
import json

import gymnasium as gym
import luxai_s2.env
import numpy as np
import torch

import lux_wrapper as lux
from hybrid_model import HybridNet

# ------------------------------------------------------------------------------
# Observations made up
# ------------------------------------------------------------------------------


def made_up_observation(boards=3, size=20, factories=2, robots=4, seed=0):
    """A random observation as tensors [boards, ...], with about half of the slots alive."""
    generator = np.random.default_rng(seed)
    options = lux.LuxOptions(map_size=size, max_factories=factories, max_robots=robots)
    blank = {key: array[0] for key, array in lux.LuxEncoder(options).empty_obs().items()}
    obs = {key: np.zeros((boards, *array.shape[1:]), array.dtype) for key, array in blank.items()}
    kind = obs["kind"]
    kind[:, :factories] = lux.FACTORY
    kind[:, factories:] = lux.ROBOT
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


def space_of(obs, kinds=3):
    """The space of one of the boards of an observation of tensors."""
    shapes = {key: x.shape[1:] for key, x in obs.items()}
    spaces = {key: gym.spaces.Box(-np.inf, np.inf, shape) for key, shape in shapes.items()}
    spaces["kind"] = gym.spaces.Box(0, kinds, shapes["kind"], np.int64)
    return gym.spaces.Dict(spaces)


def parameters_at_start(seed=1):
    """What a training with this seed and the default flags starts with."""
    torch.manual_seed(seed)
    space = space_of(made_up_observation(1, 48, 5, 6), kinds=lux.ROBOT)
    return HybridNet(space, lux.NUM_ACTIONS).state_dict()


# ------------------------------------------------------------------------------
# Play
# ------------------------------------------------------------------------------


def masked_random(rng, mask, weights=1.0):
    """Random allowed actions [...] for masks [..., A]; `weights` [A] make some likelier."""
    return np.where(mask, rng.random(mask.shape) ** (1 / np.asarray(weights)), -1).argmax(-1)


def scripted(obs, resources=("ice", "ice")):
    """Actions [N, P, E] of simple and sound play, from features and masks alone.

    Factories build heavy robots and water when they may. Robots fetch power when low, dig their
    player's resource until they carry a few loads, and bring it home.
    """
    kind, mask, column = obs["kind"], obs["action_mask"], lux.COLUMN
    actions = np.zeros(kind.shape, np.int64)
    for index in map(tuple, np.argwhere(kind > 0)):
        row = obs["features"][index].astype(float)
        heavy = row[column["is_heavy"]] > 0
        if kind[index] == lux.FACTORY:
            wishes = [lux.BUILD_HEAVY, lux.WATER]
        else:
            loaded = row[column["ice"]] + row[column["ore"]] >= (0.08 if heavy else 0.2)
            weak = row[column["power"]] < (0.1 if heavy else 0.3)
            resource = resources[index[1]]
            place = "home" if loaded or weak else resource
            dx = row[column[f"{place}_dx"]]
            dy = row[column[f"{place}_dy"]]
            dig = [lux.DIG] if row[column[f"on_{resource}"]] else []
            wishes = [lux.DELIVER] if loaded else [lux.PICK_UP] if weak else dig
            ways = [
                (abs(dx), lux.RIGHT if dx > 0 else lux.LEFT),
                (abs(dy), lux.DOWN if dy > 0 else lux.UP),
            ]
            wishes += [way for length, way in sorted(ways, reverse=True) if length > 0]
        wishes += np.flatnonzero(mask[index]).tolist()[:1]
        actions[index] = next(action for action in wishes if mask[index][action])
    return actions


def in_process(num_envs, max_robots=20, **options):
    """A vector environment in this process, and its LuxMatch objects."""
    env = lux.LuxVecEnv(num_envs, num_workers=0, max_robots=max_robots, **options)
    env.reset(seed=0)  # makes the matches
    return env, env.matches


def after_every_step(match, change):
    """Let `change(state)` alter the engine's state after placement and after every step."""
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
    """All robots and all factories, two lists of engine objects."""
    robots, factories = [], []
    for player in lux.PLAYERS:
        robots += state.units[player].values()
        factories += state.factories[player].values()
    return robots, factories


def weak_robots(state):
    """Ids of the robots that cannot pay for an order, not even to stop."""
    robots, _ = entities(state)
    cost = {robot.unit_id: lux.ORDER_COST[int(robot.is_heavy())] for robot in robots}
    return {robot.unit_id for robot in robots if robot.power < cost[robot.unit_id]}


def watched_validator(see):
    """The engine's validate_actions, which also calls `see(entity, order, accepted)` for each order."""
    validate = luxai_s2.env.validate_actions

    def watched(env_cfg, state, actions_by_type, verbose=1):
        accepted = validate(env_cfg, state, actions_by_type, verbose)
        for kind, orders in actions_by_type.items():
            passed = {entity.unit_id for entity, _ in accepted[kind]}
            for entity, order in orders:
                see(entity, order, entity.unit_id in passed)
        return accepted

    return watched


def to_json(obs):
    """What the official runner sends: text."""
    return json.dumps(obs, default=lambda x: x.tolist())


def hash_of(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
