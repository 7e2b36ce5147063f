"""The Lux AI Season 2 game (luxai-s2) as a vector environment with one reward per entity.

**The game.** Two teams share a map with ice, ore and rubble. Factories drink one unit of water
per step and are lost without it; they refine ice to water and ore to metal, and build robots from
metal and power. Robots, light or heavy, dig ice and ore and bring them home; most of what they do
costs power, which comes from the sun and from factories. A match ends after 1000 steps, or when a
team has lost its last factory. The caller plays both teams; the wrapper plays the bidding and
places the factories (`early_phase_action`).

    import numpy as np
    from lux_wrapper import LuxVecEnv

    env = LuxVecEnv(num_envs=4, num_workers=0)  # four matches, played in this process
    obs, _ = env.reset(seed=1)
    for _ in range(200):
        allowed = obs["action_mask"]
        actions = np.where(allowed, np.random.random(allowed.shape), -1).argmax(-1)
        obs, rewards, terminated, truncated, infos = env.step(actions)
        if "episode" in infos:
            print("a match ended after", *infos["episode"]["l"][infos["_episode"]], "steps")

Axis letters: N matches, P = 2 players, E entity slots, R robots of all teams, A actions, C channels,
F features, H and W the board (x and y of the engine, in this order).

**Observation**, a dict of arrays; every player sees the match from its own side:

    key          shape               dtype    meaning
    board        [N, P, H, W, C]     uint8    channels named in BOARD_CHANNELS, 0 to 100 (percent)
    features     [N, P, E, F]        float32  columns named in FEATURES, about -1 to 1
    position     [N, P, E, 2]        int64    cell of the entity (0, 0 in an empty slot)
    kind         [N, P, E]           int64    NOBODY = 0, FACTORY = 1, ROBOT = 2
    group        [N, P, E]           int64    index in 0..E-1 of the trajectory the entity belongs to
    action_mask  [N, P, E, A]        bool     True where the action may be taken

An entity keeps its slot from birth to death: factories own the first `max_factories` slots, robots
the rest. The slot of a dead robot is seen empty (kind 0) at least once before another robot takes
it, so a learner that compares two successive `kind` arrays of a match sees every birth and death.
The end of a match ends every trajectory in it: the next observation shows another match.

**Actions** [N, P, E]: an index into ROBOT_ACTIONS or FACTORY_ACTIONS, ignored for empty slots. A
robot that delivers hands all of its ice or all of its ore, whichever it carries more of, to the
factory that it stands on or beside.

**Rewards** [N, P, E]: what the entity itself achieved in this step, the weighted sum of the terms
in REWARDS. Both ends of a match are terminations (the game is over), so nothing is ever
truncated. When a match ends, `step` returns the first observation of the next one (Gymnasium's
SAME_STEP autoreset) and the metrics of the finished one in `infos["episode"]`.

**To change it.** Arrays are indexed by name (CHANNEL, COLUMN, REWARD_INDEX), so names may stand in
any order, except that moves come first in ROBOT_ACTIONS.

    the weight of a reward  LuxVecEnv(..., reward_weights={"ice_dug": 0.01})
    a reward term           a line in REWARDS, and a line in LuxMatch._achievements that pays it
    a board channel         its name in BOARD_CHANNELS, and a line in LuxEncoder.reset if it stays the
                            same for a whole match, otherwise in LuxEncoder._draw_board
    a feature               its name in FEATURES, and a line in LuxEncoder._observe_factories or
                            _observe_robots; or in `reset`, if it belongs to a cell of the map
    an action of robots     its name in ROBOT_ACTIONS, a line each in power_left and legal_actions,
                            and its order in robot_queue

**Without the vector environment** this file needs only NumPy: a bot for the official runner can
use `LuxEncoder` (official observations to arrays and masks, actions to official orders) and
`early_phase_action`.
"""

import atexit
import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import warnings
import weakref
from collections import Counter, namedtuple
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import connection

import numpy as np

try:
    import gymnasium as gym
except ModuleNotFoundError:
    gym = None  # only LuxVecEnv needs it

# ---------- Names ----------

PLAYERS = ("player_0", "player_1")
NOBODY, FACTORY, ROBOT = range(3)  # entities of a kind have the same actions

# The engine's directions: none, up, right, down, left. Actions that move have the same numbers.
STAY, UP, RIGHT, DOWN, LEFT = range(5)
DX = np.array([0, 0, 1, 0, -1])
DY = np.array([0, -1, 0, 1, 0])
MOVES = slice(UP, LEFT + 1)
ROBOT_ACTIONS = (
    *("stay", "move_up", "move_right", "move_down", "move_left"),
    *("dig", "deliver", "pick_up_power"),
)
DIG, DELIVER, PICK_UP = map(ROBOT_ACTIONS.index, ("dig", "deliver", "pick_up_power"))
FACTORY_ACTIONS = ("nothing", "build_light", "build_heavy", "water_lichen")
NOTHING, BUILD_LIGHT, BUILD_HEAVY, WATER = range(len(FACTORY_ACTIONS))
NUM_ACTIONS = max(len(ROBOT_ACTIONS), len(FACTORY_ACTIONS))

BOARD_CHANNELS = (
    "inside",  # 100 on the board, so that padding beyond its edge differs from empty ground
    "ice",
    "ore",
    "rubble",
    "own_lichen",
    "opponent_lichen",
    "own_factory",  # the 3 x 3 cells of a factory
    "opponent_factory",
    "own_light",
    "own_heavy",
    "opponent_light",
    "opponent_heavy",
)
FEATURES = (
    *("is_factory", "is_light", "is_heavy"),
    *("power", "ice", "ore"),  # robots: share of capacity; factories: thousands, at most 3
    *("water", "metal"),  # factories: log(1 + amount) / 5
    *("ice_dx", "ice_dy", "ice_distance"),  # to the nearest ice cell, in cells / 8, at most 1
    *("ore_dx", "ore_dy", "ore_distance"),
    *("home_dx", "home_dy", "home_distance"),  # to the nearest factory of the team
    *("home_water", "home_power"),  # of that factory: log(1 + amount) / 5, and thousands, at most 3
    *("on_ice", "on_ore", "rubble_here"),
    *("order_up", "order_right", "order_down", "order_left", "order_dig"),  # current order: free
    *("group_lights", "group_heavies"),  # factories: robots alive that they built, in tens and fives
    "centre_taken",  # factories: an own robot stands where robots appear
    *("own_factories", "opponent_factories"),  # alive, in fives
    *("is_day", "time_in_cycle", "time"),  # 0 to 1
)
LICHEN_FEATURES = (  # these follow with the reward "lichen"
    *("clear_dx", "clear_dy", "clear_distance"),  # to the rubble that is cleared soonest
    "worth_clearing",  # the rubble here is
    *("raid_dx", "raid_dy", "raid_distance"),  # to the nearest lichen of the opponent
    "worth_raiding",  # the lichen here is the opponent's
    *("lichen_cells", "room_cells"),  # factories: own lichen, and ground it can spread to, in fifties
)
# Weights of what is paid. A robot's terms are paid to the robot, a factory's to the factory.
REWARDS = {
    "ice_dug": 0.004,  # robot: a unit of ice moved from the ground into the cargo
    "ore_dug": 0.0004,  # robot: a unit of ore moved from the ground into the cargo
    "ice_delivered": 0.004,  # robot: a unit of ice that reached a factory of the team
    "ore_delivered": 0.0008,  # robot: a unit of ore that reached a factory of the team
    "rubble_cleared": 0.0,  # robot: a unit of rubble worth clearing (reward "lichen" only)
    "lichen_destroyed": 0.0,  # robot: a unit of the opponent's lichen dug away (reward "lichen" only)
    "robot_lost": -0.05,  # robot: being destroyed (times 0.1 for a light robot)
    "water_made": 0.004,  # factory: a unit of water refined from ice (4 ice)
    "metal_made": 0.004,  # factory: a unit of metal refined from ore (5 ore)
    "lichen_grown": 0.0001,  # factory: change of the lichen of its strain, in units
    "survived": 0.001,  # factory: a step that ends with the factory alive
    "factory_lost": -0.2,  # factory: running out of water
}
# The weights in which LuxOptions.reward differs from these
REWARD_PRESETS = {
    "ice": {},
    "lichen": {
        "lichen_grown": 0.01,
        "rubble_cleared": 0.02,
        "lichen_destroyed": 0.01,
        "ore_dug": 0.004,
        "ore_delivered": 0.004,
        "metal_made": 0.01,
    },
}
# Metrics of a finished match, per team: first the ones to look at, then every other reward term
TEAM_METRICS = (
    *("r", "ice_transferred", "factories_alive", "ice_per_factory", "factories_alive_share"),
    *("factories_placed", "water", "ore", "metal", "lichen", "lights_built", "heavies_built"),
    *("robots_lost", "own_collisions", "right_of_way", "blocked_builds"),
)
TERM_METRICS = {
    "ice_delivered": "ice_transferred",
    "water_made": "water",
    "ore_delivered": "ore",
    "metal_made": "metal",
}
TEAM_METRICS += tuple(term for term in REWARDS if term not in TERM_METRICS)

CHANNEL = {name: index for index, name in enumerate(BOARD_CHANNELS)}
COLUMN = {name: index for index, name in enumerate(FEATURES + LICHEN_FEATURES)}
REWARD_INDEX = {name: index for index, name in enumerate(REWARDS)}


def columns(*names):
    """Columns of several features, to index the last axis of a features array with."""
    return [COLUMN[name] for name in names]


# ---------- Options ----------


@dataclass(frozen=True)
class LuxOptions:
    """Options of the game; with the scripts `--env-kwargs max_robots 24 reward lichen`."""

    map_size: int = 48  # side of the board in cells (season 2: 48, NeurIPS stage: 64)
    min_factories: int = 2  # fewest factories per team (season 2: 2, NeurIPS stage: 4)
    max_factories: int = 5  # most factories per team (season 2: 5, NeurIPS stage: 10)
    max_robots: int = 6  # robot slots per team; nothing is built while they are full
    safe_masks: bool = True  # also mask actions that are legal but clearly harmful (LuxEncoder)
    reward: str = "ice"  # what is paid: ice, or lichen too (REWARD_PRESETS)
    group_by: str = "entity"  # who shares a trajectory: entity, or cluster (a factory, its robots)

    @property
    def num_entities(self):
        """E: slots of a team."""
        return self.max_factories + self.max_robots

    @property
    def grow_lichen(self):
        """Whether features, masks and factory placement are those for growing lichen."""
        return self.reward == "lichen"


ALLOWED_OPTIONS = {
    "map_size": range(24, 65),
    "min_factories": range(1, 11),
    "max_factories": range(1, 11),
    "max_robots": range(1, 1001),
    "safe_masks": (True, False),
    "reward": tuple(REWARD_PRESETS),
    "group_by": ("entity", "cluster"),
}


def checked_options(**given):
    """LuxOptions of these names and values; a ValueError says what is not allowed."""
    for name, value in given.items():
        if name not in ALLOWED_OPTIONS:
            raise ValueError(f"there is no option {name}; there are {', '.join(ALLOWED_OPTIONS)}")
        allowed = ALLOWED_OPTIONS[name]
        if value not in allowed or type(value) is not type(allowed[0]):
            is_range = isinstance(allowed, range)
            choices = f"{allowed[0]} to {allowed[-1]}" if is_range else " or ".join(map(str, allowed))
            raise ValueError(f"{name} must be {choices}, got {value}")
    options = LuxOptions(**given)
    if options.min_factories > options.max_factories:
        raise ValueError(
            f"min_factories must be at most max_factories, {options.max_factories}; got {options.min_factories}"
        )
    return options


def weights_of(preset="ice", changes=None):
    """Weight of each reward term: those of a preset, except for `changes`, a dict by term.

    A ValueError says what is no term or no number.
    """
    weights = REWARDS | REWARD_PRESETS[preset] | (changes or {})
    if unknown := ", ".join(weights.keys() - REWARDS.keys()):
        raise ValueError(f"there is no reward term {unknown}; there are {', '.join(REWARDS)}")
    for term, weight in weights.items():
        if not isinstance(weight, (int, float)) or not np.isfinite(weight):
            raise ValueError(f"the weight of {term} must be a finite number, got {weight}")
    return weights


# Settings of the engine that the wrapper follows; it relies on the season's values of all others
ENGINE_OPTIONS = ("validate_action_space", "max_episode_length", "verbose")


def checked_numbers(num_envs, num_workers, first_match, render_mode, engine_options):
    """Raise a ValueError if LuxVecEnv cannot serve these arguments of its own."""
    for name, value, least in (
        ("num_envs", num_envs, 1),
        ("num_workers", num_workers or 0, 0),
        ("first_match", first_match, 0),
        ("max_episode_length", engine_options.get("max_episode_length", GAME_LENGTH), 1),
    ):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer from {least} on, got {value}")
    if engine_options.get("max_episode_length", 0) > GAME_LENGTH:
        raise ValueError(f"max_episode_length must be at most {GAME_LENGTH}")
    if unknown := ", ".join(engine_options.keys() - set(ENGINE_OPTIONS)):
        raise ValueError(f"engine_options may hold {', '.join(ENGINE_OPTIONS)}, not {unknown}")
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f'render_mode must be None or "rgb_array", got {render_mode}')
    if num_workers and multiprocessing.current_process().daemon:
        raise ValueError("a daemonic process cannot have workers: use num_workers=0")


# ---------- Numbers of the game (luxai_s2.config.EnvConfig, the same in every match); index 0 light, 1 heavy ----------

GAME_LENGTH = 1000  # steps
CYCLE = 50
DAY = 30
METAL_COST = np.array([10, 100])
POWER_COST = np.array([50, 500])
CARGO = np.array([100, 1000])
BATTERY = np.array([150, 3000])
MOVE_COST = np.array([1, 20])
RUBBLE_COST = np.array([0.05, 1.0])  # more for a move, by unit of rubble
DIG_COST = np.array([5, 60])
DIG_RUBBLE = np.array([2, 20])  # units of rubble that a dig removes
ORDER_COST = np.array([1, 10])  # power for a new order
MOVE_COST_ONTO = np.floor(MOVE_COST[:, None] + RUBBLE_COST[:, None] * np.arange(101)).astype(int)
ICE_PER_WATER = 4
ORE_PER_METAL = 5
GROWTH_PER_WATER = 10  # cells of lichen that a unit of water keeps
LICHEN_TO_SPREAD = 20  # units from which a cell spreads to its neighbours

# Rules of this wrapper
WATER_RESERVE = 200  # steps that a factory must be able to live on after watering lichen
FLIGHT_POWER = np.array([20, 0])  # that light robots keep to run away from opponents
PICK_UP_SHARE = 0.3  # of its battery that a robot picks up at least, so that it walks less
LICHEN_REACH = 8  # steps over bare ground from own factories and lichen to rubble worth clearing
CLEAR_UNTIL = 900  # step from which no rubble is worth clearing: lichen needs time to grow
RAID_FROM = 700  # step from which the opponent's lichen is worth destroying: before, it would grow again
FAR = 10**6  # more than any distance or time
AREA = np.mgrid[-1:2, -1:2].reshape(2, 9, 1)  # steps in x and y from a factory's centre to its cells

# ---------- Reading ----------

# What the encoder reads of an observation. `factories` and `robots` hold a dict for each player,
# unit_id -> Factory or Robot; the rest are numbers and maps [H, W].
Snapshot = namedtuple("Snapshot", "time rubble lichen strains factories robots")
Factory = namedtuple("Factory", "x y power ice ore water metal strain")
Robot = namedtuple("Robot", "heavy x y power ice ore current_action")  # STAY: no move and no dig
# The same as arrays: factories [N, P, max_factories] by slot, robots [R] match by match
Factories = namedtuple("Factories", ("alive", *Factory._fields))
Robots = namedtuple("Robots", ("match", "player", "slot", *Robot._fields))

ENGINE_MOVE, ENGINE_TRANSFER, ENGINE_PICKUP, ENGINE_DIG = range(4)  # types of official orders


def read_observation(obs):
    """The Snapshot of an official observation of a step after placement."""
    factories = ({}, {})
    robots = ({}, {})
    for player, name in enumerate(PLAYERS):
        for unit_id, factory in obs["factories"][name].items():
            cell = map(int, factory["pos"])
            cargo = factory["cargo"]
            stock = factory["power"], cargo["ice"], cargo["ore"], cargo["water"], cargo["metal"]
            factories[player][unit_id] = Factory(*cell, *stock, factory["strain_id"])
        for unit_id, unit in obs["units"][name].items():
            heavy = int(unit["unit_type"] == "HEAVY")
            cell = map(int, unit["pos"])
            stock = unit["power"], unit["cargo"]["ice"], unit["cargo"]["ore"]
            queue = unit["action_queue"]
            order, direction = queue[0][:2] if len(queue) else (None, STAY)
            action = {ENGINE_DIG: DIG, ENGINE_MOVE: int(direction)}.get(order, STAY)
            robots[player][unit_id] = Robot(heavy, *cell, *stock, action)
    board = obs["board"]
    maps = board["rubble"], board["lichen"], board["lichen_strains"]
    return Snapshot(obs["real_env_steps"], *maps, factories, robots)


def read_engine(state):
    """What `read_observation(state.get_obs())` returns, without making that observation."""
    factories = ({}, {})
    robots = ({}, {})
    for player, name in enumerate(PLAYERS):
        for unit_id, factory in state.factories[name].items():
            cargo = factory.cargo
            stock = factory.power, cargo.ice, cargo.ore, cargo.water, cargo.metal
            cell = factory.pos.x, factory.pos.y
            factories[player][unit_id] = Factory(*cell, *stock, factory.num_id)
        for unit_id, unit in state.units[name].items():
            cell = unit.pos.x, unit.pos.y
            stock = unit.power, unit.cargo.ice, unit.cargo.ore
            queue = unit.action_queue
            order = queue[0].act_type if queue else None
            action = DIG if order == "dig" else queue[0].move_dir if order == "move" else STAY
            robots[player][unit_id] = Robot(int(unit.is_heavy()), *cell, *stock, action)
    board = state.board
    maps = board.rubble, board.lichen, board.lichen_strains
    return Snapshot(state.real_env_steps, *maps, factories, robots)


# ---------- The encoder: observations to arrays, actions to official orders ----------

# One observation of every match: `time` [N], maps [N, H, W], `own_lichen` (match, player, x and y
# of the cells where teams' lichen grows), and entities. `all_robots` includes robots without a
# slot; `robots` do not, nor does `seen`, a list of their (unit_id, Robot).
Scene = namedtuple(
    "Scene",
    (
        *("snapshots", "time", "rubble", "lichen", "strains", "own_lichen", "factories"),
        *("all_robots", "robots", "seen", "maps", "around", "soil", "threat"),
    ),
)

# Where things stand: maps [N, P, H + 2, W + 2] with a border of one cell, so that the neighbours
# of any cell can be read. `factory` is the slot of the own factory that covers a cell, or -1;
# `centre` and `robot` say whether an own one is there.
BorderedMaps = namedtuple("BorderedMaps", "factory centre robot")

# What is around each robot, arrays [5, R] by direction, the own cell first: the cells as indices
# in BorderedMaps, what these have there, rubble, and steps to the edge of the nearest factory.
# Arrays [R]: slot of that factory, and units on the own cell of rubble worth clearing and of
# lichen worth raiding.
Around = namedtuple("Around", "x y factory impassable rubble steps_home nearest worth_clearing worth_raiding")

# Factories that can pay for a robot, that have a slot for it, and whose first heavy robot this
# would be (with safe masks): bool [N, P, max_factories]
Builds = namedtuple("Builds", "can_light can_heavy slot_for_light slot_for_heavy first_heavy")

# What the entities of a match do in a step, which LuxMatch needs to work out their rewards: dicts
# unit_id -> RobotAct or FactoryAct, with the Robot or Factory `before` the step; and counts [P].
Acts = namedtuple("Acts", "robots factories yielded_moves blocked_builds")
RobotAct = namedtuple("RobotAct", "player slot before delivery_slot worth_clearing raided")
FactoryAct = namedtuple("FactoryAct", "player slot before")


class LuxEncoder:
    """Both players' views of N matches: slots, features and masks in, official orders out.

    It reads only what official observations hold, so a bot for the official runner can use it.
    Call `reset` with the first observation of a match after placement, then `encode` with this
    one and every later one in turn, and `orders` with what `encode` returned. `reset` also works
    with a later observation; robots get new slots then. Many matches in one encoder cost much
    less than an encoder for each.

    A team may have more robots than slots, as teams of other programs do. The boards show all of
    them, and no own robot steps onto them; but robots without a slot have no features and get no
    orders until a slot is free.

    `group_by` says who shares a trajectory. "entity": each has its own. "cluster": a factory with
    the robots that it built; when it is lost, they join the nearest one.

    `safe_masks` also mask what is legal but clearly harmful:
        1. stepping onto a cell where an own robot stands (both would be destroyed),
        2. stepping onto the centre of an own factory (robots appear there),
        3. building while an own robot stands there, and building into the last slots while other
           factories can build their first heavy robot,
        4. digging where nothing is gained: bare ground, own lichen, rubble that covers neither ice nor
           ore, ice and ore with full cargo,
        5. digging, or stepping away from home, with less power left than the way back to the nearest
           own factory and an order there cost on ground without rubble (a robot without power
           stands still until the sun shines),
        6. picking up less power than ten times what the order itself costs,
        7. watering lichen if the water left would not last WATER_RESERVE steps, or to the end,
        8. anything else while a factory can build its first heavy robot. A policy that waits there
           half of the time hardly loses by it, but its likeliest action would wait for ever.
    Of two own robots that would step onto one cell, the first moves and the other waits. With the
    reward "lichen", light robots may also clear rubble that is worth it (4), light robots keep
    FLIGHT_POWER (5), robots pick up at least PICK_UP_SHARE of their battery (6), the water for
    watering as much at every second step to the end is kept too (7), and no robot may
        9. end a step where an opponent's robot could destroy it, unless it can wherever it goes. To
           get away it may break rules 4 to 6, and it moves first.

    Args:
        options: LuxOptions.
        num_matches: N.
    """

    def __init__(self, options=LuxOptions(), num_matches=1):
        self.options = options
        self.num_matches = num_matches
        self.num_features = len(FEATURES) + options.grow_lichen * len(LICHEN_FEATURES)
        # To index arrays [N, P, ...] with [N, P, K]
        self.match, self.player = np.ogrid[:num_matches, :2, :1][:2]
        # The same for a whole match
        maps = (num_matches, options.map_size, options.map_size)
        self.ice = np.zeros(maps, bool)
        self.ore = np.zeros(maps, bool)
        self.terrain = np.zeros((*maps, len(BOARD_CHANNELS)), np.uint8)
        self.cell_features = np.zeros((*maps, self.num_features), np.float32)
        # Player of each strain; the last entry is for strain -1, no lichen
        self.strain_owner = np.full((num_matches, 2 * options.max_factories + 1), -1)
        # Memory: slots by unit_id, the factory slot that an entity belongs to, strains just seen
        self.factory_slots = [({}, {}) for _ in range(num_matches)]
        self.robot_slots = [({}, {}) for _ in range(num_matches)]
        self.home = np.zeros((num_matches, 2, options.num_entities), np.int64)
        self.strains_before = np.zeros(maps, np.int16)

    def reset(self, obs, match=0):
        """Begin a match; `obs` is the official observation after placement."""
        board = obs["board"]
        self.ice[match] = board["ice"] > 0
        self.ore[match] = board["ore"] > 0
        self.terrain[match, ..., CHANNEL["inside"]] = 100
        for name, cells in (("ice", self.ice[match]), ("ore", self.ore[match])):
            self.terrain[match, ..., CHANNEL[name]] = 100 * cells
            way = columns(f"{name}_dx", f"{name}_dy", f"{name}_distance")
            self.cell_features[match][..., way] = ways_to_nearest(cells)
            self.cell_features[match, ..., COLUMN[f"on_{name}"]] = cells
        self.strains_before[match] = board["lichen_strains"]
        self.strain_owner[match] = -1
        self.home[match] = np.arange(self.options.num_entities)
        self.robot_slots[match] = ({}, {})
        self.factory_slots[match] = ({}, {})
        for player, name in enumerate(PLAYERS):
            for slot, (unit_id, factory) in enumerate(obs["factories"][name].items()):
                self.factory_slots[match][player][unit_id] = slot
                self.strain_owner[match, factory["strain_id"]] = player

    def empty_obs(self):
        """An observation of empty slots: zeroed arrays as in the table at the top of the file."""
        size = self.options.map_size
        slots = (self.num_matches, 2, self.options.num_entities)
        return {
            "board": np.zeros((*slots[:2], size, size, len(BOARD_CHANNELS)), np.uint8),
            "features": np.zeros((*slots, self.num_features), np.float32),
            "position": np.zeros((*slots, 2), np.int64),
            "kind": np.zeros(slots, np.int64),
            "group": np.zeros(slots, np.int64),
            "action_mask": np.zeros((*slots, NUM_ACTIONS), bool),
        }

    def encode(self, snapshots):
        """Both players' observation of every match.

        Args:
            snapshots: a list of N, each from `read_observation` or `read_engine`.

        Returns:
            obs: dict of new arrays, see the table at the top of the file.
            view: what `orders` needs to know of it, a Scene and Builds.
        """
        scene = self._read(snapshots)
        lights, heavies = self._count_built(scene.robots)
        builds = self._plan_builds(scene, heavies)
        obs = self.empty_obs()
        self._draw_board(obs["board"], scene)
        self._observe_factories(obs, scene, lights, heavies)
        self._observe_robots(obs, scene)
        self._observe_match(obs, scene)
        self._mask_factories(obs["action_mask"], scene, builds)
        self._mask_robots(obs["action_mask"], scene)
        obs["group"][:] = np.arange(self.options.num_entities)
        if self.options.group_by == "cluster":
            obs["group"][:] = self.home
        self.strains_before = scene.strains
        return obs, (scene, builds)

    # ---------- Reading ----------

    def _read(self, snapshots):
        """The Scene that these snapshots show; gives slots to new robots."""
        seen = Snapshot(*zip(*snapshots))
        time = np.array(seen.time)
        rubble = np.array(seen.rubble, np.int16)  # small types make maps faster
        lichen = np.array(seen.lichen, np.int16)
        strains = np.array(seen.strains, np.int16)
        match, x, y = marked_cells(strains >= 0)
        owner = self.strain_owner[match, strains[match, x, y]]
        own_lichen = tuple(axis[owner >= 0] for axis in (match, owner, x, y))
        factories = self._read_factories(seen.factories)
        all_robots, all_seen = self._read_robots(seen.robots, factories)
        has_slot = all_robots.slot >= 0
        robots = Robots(*(field[has_slot] for field in all_robots))
        self._join_nearest_factory(robots, factories)
        maps = bordered_maps(factories, all_robots, self.options.map_size)
        soil = None
        if self.options.grow_lichen:
            soil = lichen_soil(time, own_lichen, self.ice | self.ore, rubble, maps.factory)
        around = self._look_around(robots, factories, rubble, lichen, maps, soil)
        threat = threatened(robots, all_robots, around, maps.robot.shape) if self.options.grow_lichen else None
        return Scene(
            *(snapshots, time, rubble, lichen, strains, own_lichen, factories),
            *(all_robots, robots, list(itertools.compress(all_seen, has_slot)), maps, around, soil, threat),
        )

    def _read_factories(self, matches):
        """Factories by slot; `matches` holds for each match and player a dict unit_id -> Factory."""
        table = []
        for match, players in enumerate(matches):
            for player, rows in enumerate(players):
                slots = self.factory_slots[match][player]
                table += [(match, player, slots[unit_id], True, *row) for unit_id, row in rows.items()]
        table = np.array(table, np.int64).reshape(-1, 4 + len(Factory._fields))
        match, player, slot, *fields = table.T
        by_slot = np.zeros((len(fields), len(matches), 2, self.options.max_factories), np.int64)
        by_slot[:, match, player, slot] = fields
        return Factories(by_slot[0] > 0, *by_slot[1:])

    def _read_robots(self, matches, factories):
        """All robots, and a list of (unit_id, Robot); by match and player, in the order seen.

        Robots keep their slots. A new robot gets the first slot that was empty in the last
        observation, so the slot of a robot that has just died stays empty for now. Robots that
        find no slot have -1 and wait for one.
        """
        table = []
        seen = []
        for match, players in enumerate(matches):
            for player, rows in enumerate(players):
                self._update_slots(match, player, rows, factories)
                slots = self.robot_slots[match][player]
                for unit_id, row in rows.items():
                    table.append((match, player, slots.get(unit_id, -1), *row))
                    seen.append((unit_id, row))
        table = np.array(table, np.int64).reshape(-1, len(Robots._fields))
        return Robots(*table.T), seen

    def _update_slots(self, match, player, rows, factories):
        """Forget dead robots, and give slots and the factory that built them to new ones."""
        slots = self.robot_slots[match][player]
        if rows.keys() == slots.keys():
            return
        every_slot = range(self.options.max_factories, self.options.num_entities)
        empty = sorted(set(every_slot) - set(slots.values()))
        born = [unit_id for unit_id in rows if unit_id not in slots]
        for unit_id, slot in zip(born, empty):
            slots[unit_id] = slot
            cell = rows[unit_id].x, rows[unit_id].y
            self.home[match, player, slot] = nearest_factory(factories, match, player, *cell)
        for unit_id in slots.keys() - rows.keys():
            del slots[unit_id]

    def _join_nearest_factory(self, robots, factories):
        """Robots whose factory is lost belong to the nearest one from now on."""
        home = self.home[robots.match, robots.player, robots.slot]
        homeless = ~factories.alive[robots.match, robots.player, home]
        if homeless.any():
            match, player, slot, _, x, y, *_ = (field[homeless] for field in robots)
            self.home[match, player, slot] = nearest_factory(factories, match, player, x, y)

    def _look_around(self, robots, factories, rubble, lichen, maps, soil):
        """What is Around the robots."""
        x = robots.x + 1 + DX[:, None]  # in bordered maps
        y = robots.y + 1 + DY[:, None]
        factory = maps.factory[robots.match, robots.player, x, y]
        size = self.options.map_size
        impassable = (x < 1) | (x > size) | (y < 1) | (y > size)
        impassable |= maps.factory[robots.match, 1 - robots.player, x, y] >= 0
        rubble_there = bordered(rubble)[robots.match, x, y]
        nearest = nearest_factory(factories, robots.match, robots.player, robots.x, robots.y)
        home = robots.match, robots.player, nearest
        steps_home = np.maximum(np.abs(factories.x[home] - robots.x - DX[:, None]) - 1, 0)
        steps_home += np.maximum(np.abs(factories.y[home] - robots.y - DY[:, None]) - 1, 0)
        worth_clearing = worth_raiding = np.zeros_like(robots.x)
        if soil is not None:
            here = robots.match, robots.player, robots.x, robots.y
            worth_clearing = rubble_there[STAY] * soil.to_clear[here]
            worth_raiding = lichen[robots.match, robots.x, robots.y] * soil.to_raid[here]
        worth = worth_clearing, worth_raiding
        return Around(x, y, factory, impassable, rubble_there, steps_home, nearest, *worth)

    # ---------- Observing ----------

    def _draw_board(self, board, scene):
        """Write the channels of the boards [N, P, H, W, C]."""
        board[:] = self.terrain[:, None]
        board[..., CHANNEL["rubble"]] = scene.rubble[:, None]
        match, player, x, y = scene.own_lichen
        draw(board, "lichen", match, player, x, y, scene.lichen[match, x, y])
        draw(board, "factory", *marked_cells(scene.maps.factory[..., 1:-1, 1:-1] >= 0))
        robots = scene.all_robots
        for kind, name in enumerate(("light", "heavy")):
            rows = robots.heavy == kind
            draw(board, name, robots.match[rows], robots.player[rows], robots.x[rows], robots.y[rows])

    def _count_built(self, robots):
        """Light and heavy robots alive that each factory built, two arrays [N, P, max_factories]."""
        count = np.zeros((2, *self.home.shape), np.int64)
        home = self.home[robots.match, robots.player, robots.slot]
        np.add.at(count, (robots.heavy, robots.match, robots.player, home), 1)
        return count[..., : self.options.max_factories]

    def _observe_factories(self, obs, scene, lights, heavies):
        """Write kind, position and features of the factories."""
        factories = scene.factories
        slots = slice(self.options.max_factories)
        obs["kind"][:, :, slots] = np.where(factories.alive, FACTORY, NOBODY)
        obs["position"][:, :, slots] = np.stack([factories.x, factories.y], -1)
        features = obs["features"][:, :, slots]
        features[:] = self.cell_features[self.match, factories.x, factories.y]
        for name, value in {
            "is_factory": 1,
            "power": np.minimum(factories.power / 1000, 3),
            "ice": np.minimum(factories.ice / 1000, 3),
            "ore": np.minimum(factories.ore / 1000, 3),
            "water": log_amount(factories.water),
            "metal": log_amount(factories.metal),
            "home_water": log_amount(factories.water),
            "home_power": np.minimum(factories.power / 1000, 3),
            "group_lights": lights / 10,
            "group_heavies": heavies / 5,
            "centre_taken": self._centre_taken(scene),
        }.items():
            features[..., COLUMN[name]] = value
        if scene.soil is not None:
            features[..., COLUMN["lichen_cells"]] = count_nearest(scene.soil.lichen, factories) / 50
            features[..., COLUMN["room_cells"]] = count_nearest(scene.soil.room, factories) / 50

    def _observe_robots(self, obs, scene):
        """Write kind, position and features of the robots."""
        robots = scene.robots
        around = scene.around
        who = robots.match, robots.player, robots.slot
        home = robots.match, robots.player, around.nearest
        obs["kind"][who] = ROBOT
        obs["position"][who] = np.stack([robots.x, robots.y], -1)
        home_dx = scene.factories.x[home] - robots.x
        home_dy = scene.factories.y[home] - robots.y
        features = self.cell_features[robots.match, robots.x, robots.y]
        for name, value in {
            "is_light": robots.heavy == 0,
            "is_heavy": robots.heavy,
            "power": robots.power / BATTERY[robots.heavy],
            "ice": robots.ice / CARGO[robots.heavy],
            "ore": robots.ore / CARGO[robots.heavy],
            "home_dx": np.clip(home_dx / 8, -1, 1),
            "home_dy": np.clip(home_dy / 8, -1, 1),
            "home_distance": np.clip((np.abs(home_dx) + np.abs(home_dy)) / 8, 0, 1),
            "home_water": log_amount(scene.factories.water[home]),
            "home_power": np.minimum(scene.factories.power[home] / 1000, 3),
            "rubble_here": around.rubble[STAY] / 100,
            "order_up": robots.current_action == UP,
            "order_right": robots.current_action == RIGHT,
            "order_down": robots.current_action == DOWN,
            "order_left": robots.current_action == LEFT,
            "order_dig": robots.current_action == DIG,
        }.items():
            features[:, COLUMN[name]] = value
        if scene.soil is not None:
            for name, cells, digs in (
                ("clear", scene.soil.to_clear, scene.rubble / DIG_RUBBLE[0]),  # by a light robot
                ("raid", scene.soil.to_raid, np.zeros(scene.rubble.shape)),
            ):
                way = columns(f"{name}_dx", f"{name}_dy", f"{name}_distance")
                features[:, way] = ways_to_dig(robots, cells, digs, scene.maps.robot)
            features[:, COLUMN["worth_clearing"]] = around.worth_clearing > 0
            features[:, COLUMN["worth_raiding"]] = around.worth_raiding > 0
        obs["features"][who] = features

    def _observe_match(self, obs, scene):
        """Write the features that all entities of a team share."""
        alive = scene.factories.alive.sum(-1)
        time = scene.time[:, None]
        for name, value in {
            "own_factories": alive / 5,
            "opponent_factories": alive[:, ::-1] / 5,
            "is_day": time % CYCLE < DAY,
            "time_in_cycle": time % CYCLE / CYCLE,
            "time": time / GAME_LENGTH,
        }.items():
            obs["features"][..., COLUMN[name]] = value[..., None]
        obs["features"][obs["kind"] == NOBODY] = 0

    # ---------- Masks ----------

    def _plan_builds(self, scene, heavies):
        """Which factories can pay for a robot, and which of them have a slot for it.

        A factory has a slot if enough are free even when every factory before it builds what it
        can. With safe masks, slots are set aside for factories that can build their first heavy
        robot.
        """
        factories = scene.factories

        def can_pay(heavy):
            enough = (factories.metal >= METAL_COST[heavy]) & (factories.power >= POWER_COST[heavy])
            return factories.alive & enough

        can_heavy = can_pay(1)
        first_heavy = can_heavy & (heavies == 0) & self.options.safe_masks
        can_light = can_pay(0) & ~first_heavy
        free = np.full((self.num_matches, 2, 1), self.options.max_robots)
        np.subtract.at(free, (scene.all_robots.match, scene.all_robots.player, 0), 1)
        set_aside = first_heavy.sum(-1, keepdims=True)
        takes_a_slot = can_light | (can_heavy & ~first_heavy)
        has_slot = set_aside + takes_a_slot.cumsum(-1) <= free
        has_slot_set_aside = first_heavy.cumsum(-1) <= free
        slot_for_heavy = np.where(first_heavy, has_slot_set_aside, has_slot)
        return Builds(can_light, can_heavy, has_slot, slot_for_heavy, first_heavy)

    def _centre_taken(self, scene):
        """Whether a robot of the team stands where a factory's robots appear, [N, P, max_factories]."""
        x = scene.factories.x + 1
        return scene.maps.robot[self.match, self.player, x, scene.factories.y + 1]

    def _mask_factories(self, action_mask, scene, builds):
        """Write the action masks of the factories."""
        factories = scene.factories
        mask = action_mask[:, :, : self.options.max_factories]
        mask[..., NOTHING] = factories.alive
        mask[..., BUILD_LIGHT] = builds.can_light & builds.slot_for_light
        mask[..., BUILD_HEAVY] = builds.can_heavy & builds.slot_for_heavy
        num_strains = self.strain_owner.shape[1]
        costs = water_costs(scene.strains, self.strains_before, scene.lichen, num_strains)
        cost = costs[self.match, factories.strain]
        reserve = 0
        if self.options.safe_masks:
            mask[self._centre_taken(scene), BUILD_LIGHT : BUILD_HEAVY + 1] = False
            steps_left = GAME_LENGTH - scene.time[:, None, None]
            reserve = np.minimum(WATER_RESERVE, steps_left)
            if self.options.grow_lichen:
                reserve = reserve + (steps_left - 1) * cost // 2
        water = factories.water
        mask[..., WATER] = factories.alive & (water > reserve) & (water - cost >= reserve)
        must_build = builds.first_heavy & mask[..., BUILD_HEAVY]
        mask[must_build] = np.arange(NUM_ACTIONS) == BUILD_HEAVY

    def _mask_robots(self, action_mask, scene):
        """Write the action masks of the robots."""
        robots = scene.robots
        around = scene.around
        left = power_left(robots, around)
        home_power = scene.factories.power[robots.match, robots.player, around.nearest]
        gain = np.minimum(BATTERY[robots.heavy] - left[PICK_UP], home_power)
        allowed = legal_actions(robots, around, left, gain)
        if self.options.safe_masks:
            apart = allowed & self._moves_apart(scene)
            allowed = apart & self._useful_actions(scene, left, gain)
            if scene.threat is not None:
                safe, flight = allowed & ~scene.threat, apart & ~scene.threat
                allowed = np.select([safe.any(0), flight.any(0)], [safe, flight], allowed)
        allowed[STAY] |= ~allowed.any(0)
        who = robots.match, robots.player, robots.slot
        action_mask[..., : len(ROBOT_ACTIONS)][who] = allowed.T

    def _moves_apart(self, scene):
        """Rules 1 and 2 of the safe masks for the robots, bool [A, R]."""
        robots = scene.robots
        apart = np.ones((len(ROBOT_ACTIONS), len(robots.x)), bool)
        cells = robots.match, robots.player, scene.around.x[MOVES], scene.around.y[MOVES]
        apart[MOVES] = ~(scene.maps.robot[cells] | scene.maps.centre[cells])
        return apart

    def _useful_actions(self, scene, left, gain):
        """Rules 4 to 6 of the safe masks for the robots, bool [A, R].

        `left` [A, R] is the power that each action leaves, `gain` [R] what picking up gives.
        """
        robots = scene.robots
        around = scene.around
        useful = np.ones(left.shape, bool)
        here = robots.match, robots.x, robots.y
        cargo = CARGO[robots.heavy]
        on_ice = self.ice[here]
        on_ore = self.ore[here]
        owner = self.strain_owner[robots.match, scene.strains[here]]
        others_lichen = (scene.lichen[here] > 0) & (owner != robots.player)
        mines = (on_ice & (robots.ice < cargo)) | (on_ore & (robots.ore < cargo))
        clears = (around.rubble[STAY] > 0) & (on_ice | on_ore) | others_lichen
        clears |= (around.worth_clearing > 0) & (robots.heavy == 0)
        useful[DIG] = mines | clears

        order_cost = ORDER_COST[robots.heavy]
        share = PICK_UP_SHARE * BATTERY[robots.heavy]
        useful[PICK_UP] = gain >= (share if self.options.grow_lichen else 10 * order_cost)
        steps = around.steps_home
        way_home = steps * MOVE_COST[robots.heavy] + (np.minimum(steps, 2) + 1) * order_cost
        if self.options.grow_lichen:
            way_home += FLIGHT_POWER[robots.heavy]
        nearer = steps[MOVES] < steps[STAY]
        useful[MOVES] &= (left[MOVES] >= way_home[MOVES]) | nearer
        useful[DIG] &= left[DIG] >= way_home[STAY]
        return useful

    # ---------- Orders ----------

    def orders(self, view, actions):
        """Official orders for an observation.

        A robot that continues what it does gets no order, since every new one costs power. Moves
        and digs are ordered for as many steps as the robot can pay and still afford another order
        after, so continuing is free and a change of mind is always possible.

        Args:
            view: what `encode` returned with the observation.
            actions: int array [N, P, E]; ignored for empty slots.

        Returns:
            orders: for each match and player a dict unit_id -> official action: for a factory an int,
                for a robot its queue, an int array [0 or 1, 6].
            acts: for each match its Acts.
        """
        scene, builds = view
        robots = scene.robots
        around = scene.around
        chosen = actions[robots.match, robots.player, robots.slot]
        yielded = np.zeros((len(scene.time), 2), np.int64)
        if self.options.safe_masks:
            in_danger = np.zeros(len(chosen), bool) if scene.threat is None else scene.threat[STAY]
            chosen = yield_moves(robots, chosen, in_danger, yielded)
        orders = [({}, {}) for _ in scene.time]
        self._order_factories(orders, scene, builds, actions)
        delivery = (around.factory >= 0).argmax(0)  # direction
        for row in np.flatnonzero(chosen != robots.current_action).tolist():
            unit_id, robot = scene.seen[row]
            order = robot_queue(robot, chosen[row], delivery[row])
            orders[robots.match[row]][robots.player[row]][unit_id] = order
        delivery_slot = around.factory[delivery, np.arange(len(delivery))]
        raided = around.worth_raiding * (chosen == DIG)
        return orders, self._acts(scene, builds, delivery_slot, raided, yielded)

    def _order_factories(self, orders, scene, builds, actions):
        """Write the orders of the factories."""
        actions = actions[:, :, : self.options.max_factories]
        # The engine refuses what a factory cannot pay for, but knows nothing of slots
        ordered = (actions == WATER) | (actions == BUILD_LIGHT) & builds.slot_for_light
        ordered |= (actions == BUILD_HEAVY) & builds.slot_for_heavy
        for match, player, slot in np.argwhere(scene.factories.alive & ordered).tolist():
            unit_id = list(self.factory_slots[match][player])[slot]
            orders[match][player][unit_id] = FACTORY_ORDERS[int(actions[match, player, slot])]

    def _acts(self, scene, builds, delivery_slot, raided, yielded):
        """The Acts of each match.

        Arrays [R]: `delivery_slot` of the factory to which a robot would deliver, and `raided`, units of
        lichen where it raids.
        """
        may_light = builds.can_light & builds.slot_for_light
        may_heavy = builds.can_heavy & builds.slot_for_heavy
        blocked = (builds.can_light | builds.can_heavy) & ~may_light & ~may_heavy
        acts = [Acts({}, {}, *counts) for counts in zip(yielded, blocked.sum(-1))]
        rows = (*scene.robots[:3], delivery_slot, scene.around.worth_clearing, raided)
        for (unit_id, robot), *row in zip(scene.seen, *(field.tolist() for field in rows)):
            match, player, slot, *rest = row
            acts[match].robots[unit_id] = RobotAct(player, slot, robot, *rest)
        for match, snapshot in enumerate(scene.snapshots):
            for player, factories in enumerate(snapshot.factories):
                for unit_id, factory in factories.items():
                    slot = self.factory_slots[match][player][unit_id]
                    acts[match].factories[unit_id] = FactoryAct(player, slot, factory)
        return acts


def ways_to_nearest(cells):
    """Way [H, W, 3] from every cell to the nearest marked one of `cells` [H, W], by walking distance.

    A way is dx, dy and distance in cells / 8, clipped to -1 and 1; (0, 0, 1) if no cell is marked.
    """
    ways = np.zeros((*cells.shape, 3), np.float32)
    marked = np.argwhere(cells)
    if len(marked) == 0:
        ways[..., 2] = 1
        return ways
    here = np.argwhere(np.ones_like(cells))
    deltas = marked[None] - here[:, None]
    nearest = np.abs(deltas).sum(-1).argmin(1)
    ways[..., :2] = deltas[np.arange(len(here)), nearest].reshape(*cells.shape, 2)
    ways[..., 2] = np.abs(ways[..., :2]).sum(-1)
    return np.clip(ways / 8, -1, 1)


def marked_cells(maps):
    """Indices of the marked cells of bool maps, as np.nonzero, which is slow on maps with few of them."""
    return np.unravel_index(np.flatnonzero(maps), maps.shape)


def nearest_factory(factories, match, player, x, y):
    """Slot of the team's factory that is nearest to a cell, the first of equally near ones.

    The last four arguments are numbers, or arrays [K] for K cells.
    """
    dx = factories.x[match, player] - np.asarray(x)[..., None]
    dy = factories.y[match, player] - np.asarray(y)[..., None]
    distance = np.abs(dx) + np.abs(dy)
    return np.where(factories.alive[match, player], distance, FAR).argmin(-1)


def bordered(maps):
    """Maps [..., H, W] with a border of one cell of zeros, [..., H + 2, W + 2]."""
    *axes, height, width = maps.shape
    wide = np.zeros((*axes, height + 2, width + 2), maps.dtype)
    wide[..., 1:-1, 1:-1] = maps
    return wide


def bordered_maps(factories, all_robots, size):
    """The BorderedMaps of these factories and robots on boards of this size."""
    shape = (*factories.alive.shape[:2], size + 2, size + 2)
    match, player, slot = np.nonzero(factories.alive)
    x = factories.x[match, player, slot] + 1
    y = factories.y[match, player, slot] + 1
    factory = np.full(shape, -1, np.int8)
    factory[match, player, x + AREA[0], y + AREA[1]] = slot
    centre = np.zeros(shape, bool)
    centre[match, player, x, y] = True
    robot = np.zeros(shape, bool)
    robot[all_robots.match, all_robots.player, all_robots.x + 1, all_robots.y + 1] = True
    return BorderedMaps(factory, centre, robot)


def draw(board, name, match, player, x, y, value=100):
    """Draw entities of players into the boards of both, as their own and as the opponent's."""
    board[match, player, x, y, CHANNEL[f"own_{name}"]] = value
    board[match, 1 - player, x, y, CHANNEL[f"opponent_{name}"]] = value


def log_amount(amount):
    """An amount as a feature."""
    return np.log1p(amount) / 5


def power_left(robots, around):
    """Power [A, R] that each action leaves; continuing the current order is free, others cost power."""
    needs_order = np.arange(len(ROBOT_ACTIONS))[:, None] != robots.current_action
    left = robots.power - ORDER_COST[robots.heavy] * needs_order
    left[MOVES] -= MOVE_COST_ONTO[robots.heavy, around.rubble[MOVES]]
    left[DIG] -= DIG_COST[robots.heavy]
    return left


def legal_actions(robots, around, left, gain):
    """What the game lets robots do, bool [A, R]; `left` [A, R] and `gain` [R] as in _useful_actions."""
    legal = left >= 0
    in_factory = around.factory[STAY] >= 0
    legal[MOVES] &= ~around.impassable[MOVES]
    legal[DIG] &= ~in_factory
    legal[DELIVER] &= (around.factory >= 0).any(0) & (robots.ice + robots.ore > 0)
    legal[PICK_UP] &= in_factory & (gain > 0)
    return legal


def water_costs(strains, strains_before, lichen, num_strains):
    """Upper bounds [N, num_strains] on the water that watering costs the factory of each strain.

    A unit of water is good for 10 cells: the 12 at the factory's edge, cells of its strain, and
    neighbours of cells from which it spreads. All are counted here, although some may be under
    rubble or another strain. And as the engine asks for what it counted one step before, a cell
    counts if it was of the strain then (`strains_before` [N, H, W]), and spreads with up to 2
    units less.
    """
    N, H, W = strains.shape
    counted = np.zeros((N, num_strains, H + 2, W + 2), bool)
    lost = (strains_before >= 0) & (strains_before != strains)
    for marked, strain_of in ((strains >= 0, strains), (lost, strains_before)):
        match, x, y = marked_cells(marked)
        strain = strain_of[match, x, y]
        counted[match, strain, x + 1, y + 1] = True
        spreads = lichen[match, x, y] >= LICHEN_TO_SPREAD - 2
        match, strain, x, y = (axis[spreads] for axis in (match, strain, x, y))
        for dx, dy in zip(DX[MOVES], DY[MOVES]):
            counted[match, strain, x + 1 + dx, y + 1 + dy] = True
    counted[..., [0, -1], :] = False  # beyond the edge
    counted[..., :, [0, -1]] = False
    of_map = np.flatnonzero(counted) // ((H + 2) * (W + 2))
    number = 12 + np.bincount(of_map, minlength=N * num_strains).reshape(N, num_strains)
    return -(-number // GROWTH_PER_WATER)  # rounded up


def yield_moves(robots, actions, in_danger, yielded):
    """Actions [R] in which only the first of several robots moves onto a cell, and the others stay.

    Those `in_danger` (bool [R]) where they are come first, then those born first. The others are
    counted in `yielded` [N, P].
    """
    actions = actions.copy()
    goals = set()
    moving = np.flatnonzero((actions >= UP) & (actions <= LEFT))
    for row in sorted(moving.tolist(), key=lambda row: not in_danger[row]):
        team = robots.match[row], robots.player[row]
        goal = robots.x[row] + DX[actions[row]], robots.y[row] + DY[actions[row]]
        if (team, goal) in goals:
            actions[row] = STAY
            yielded[team] += 1
        goals.add((team, goal))
    return actions


FACTORY_ORDERS = {BUILD_LIGHT: 0, BUILD_HEAVY: 1, WATER: 2}  # the engine's numbers
ENGINE_ICE, ENGINE_ORE, ENGINE_WATER, ENGINE_METAL, ENGINE_POWER = range(5)


def robot_queue(robot, action, delivery_direction):
    """Official orders that make a Robot do an action: an int array [0 or 1, 6].

    An order is type, direction, resource, amount, repeat, number of times.
    """
    spare = robot.power - 2 * ORDER_COST[robot.heavy]  # for this order and one after it
    if action == STAY:
        return np.zeros((0, 6), np.int64)
    if action <= LEFT:
        times = max(spare // MOVE_COST_ONTO[robot.heavy, 100], 1)
        order = ENGINE_MOVE, action, 0, 0, 0, times
    elif action == DIG:
        order = ENGINE_DIG, 0, 0, 0, 0, max(spare // DIG_COST[robot.heavy], 1)
    elif action == DELIVER:
        resource = ENGINE_ORE if robot.ore > robot.ice else ENGINE_ICE
        order = ENGINE_TRANSFER, delivery_direction, resource, max(robot.ice, robot.ore), 0, 1
    elif action == PICK_UP:
        battery = BATTERY[robot.heavy]
        to_full = min(battery - robot.power + ORDER_COST[robot.heavy], battery)
        order = ENGINE_PICKUP, 0, ENGINE_POWER, to_full, 0, 1
    return np.array([order], np.int64)


# ---------- Lichen: what the reward "lichen" adds to the encoder ----------

# Bool maps [N, P, H, W]: own `lichen`, `room` where it grows or can spread to, `to_clear` where
# only rubble keeps it from spreading next (until CLEAR_UNTIL), and `to_raid` where the opponent's
# grows (from RAID_FROM on)
Soil = namedtuple("Soil", "lichen room to_clear to_raid")


def lichen_soil(time, own_lichen, resources, rubble, bordered_factory):
    """The Soil of both players, LICHEN_REACH steps over bare ground from own factories and lichen.

    `time` [N], `own_lichen` as in Scene, `resources` bool [N, H, W] (ice and ore), `rubble` units
    [N, H, W], `bordered_factory` as in BorderedMaps.
    """
    time = time[:, None, None, None]
    covered = bordered_factory[..., 1:-1, 1:-1] >= 0
    own = np.zeros_like(covered)
    own[own_lichen] = True
    fertile = ~resources[:, None] & ~covered & ~covered[:, ::-1] & ~own[:, ::-1]
    under_rubble = rubble[:, None] > 0
    reached = covered | own
    for _ in range(LICHEN_REACH):
        reached |= dilate(reached) & fertile & ~under_rubble
    to_clear = dilate(reached) & fertile & under_rubble & (time < CLEAR_UNTIL)
    return Soil(own, reached & ~covered, to_clear, own[:, ::-1] & (time >= RAID_FROM))


def dilate(cells):
    """Marked cells and their neighbours, bool [..., H, W]."""
    wide = bordered(cells)
    rows = wide[..., 2:, 1:-1] | wide[..., :-2, 1:-1]
    return cells | rows | wide[..., 1:-1, 2:] | wide[..., 1:-1, :-2]


def count_nearest(cells, factories):
    """Number of marked cells nearest to each factory of the team: [N, P, H, W] to [N, P, max_factories]."""
    match, player, x, y = marked_cells(cells)
    count = np.zeros(factories.alive.shape, np.int64)
    np.add.at(count, (match, player, nearest_factory(factories, match, player, x, y)), 1)
    return count


def ways_to_dig(robots, cells, digs, bordered_robot):
    """Way [R, 3] from robots to the marked cell of their team where they would be done soonest.

    `cells` is bool [N, P, H, W], `digs` [N, H, W] the steps that it takes there. A way is dx, dy and
    distance in cells / 8, at most 1; (0, 0, 1) where no cell is marked. A cell under another own
    robot is left to that robot.
    """
    ways = np.tile(np.float32([0, 0, 1]), (len(robots.x), 1))
    for match, player in np.ndindex(cells.shape[:2]):
        x, y = np.nonzero(cells[match, player])
        if len(x) == 0:
            continue
        rows = np.flatnonzero((robots.match == match) & (robots.player == player))
        dx = x - robots.x[rows, None]
        dy = y - robots.y[rows, None]
        steps = np.abs(dx) + np.abs(dy)
        occupied = bordered_robot[match, player, x + 1, y + 1] & (steps > 0)
        time = steps + digs[match, x, y] + np.where(occupied, FAR, 0)
        soonest = np.arange(len(rows)), time.argmin(1)
        way = np.stack([dx[soonest], dy[soonest], steps[soonest]], -1)
        free = time[soonest] < FAR
        ways[rows[free]] = np.clip(way / 8, -1, 1)[free]
    return ways


def threatened(robots, all_robots, around, bordered_shape):
    """Whether an opponent's robot could destroy the robots after each of their actions, bool [A, R].

    A heavy robot destroys a light one. Of two robots of a kind, the one that moves wins, or if
    both move the one with more power. No robot enters a factory of the other team.
    """
    powers = np.full((2, *bordered_shape), -1)  # of the opponent's light and heavy robots
    opponent = 1 - all_robots.player
    cells = all_robots.match, opponent, all_robots.x + 1, all_robots.y + 1
    powers[(all_robots.heavy, *cells)] = all_robots.power
    last = bordered_shape[-1] - 1
    x = np.clip(around.x[:, None] + DX[MOVES, None], 0, last)  # [5, 4, R]: beside those cells
    y = np.clip(around.y[:, None] + DY[MOVES, None], 0, last)
    lights, heavies = powers[:, robots.match, robots.player, x, y].max(2)
    strongest_of_kind = np.where(robots.heavy, heavies, lights)
    own_power = np.where(np.arange(5)[:, None] == STAY, 0, robots.power)
    loses = strongest_of_kind >= own_power
    heavy_there = powers[1, robots.match, robots.player, around.x, around.y] >= 0
    crushed = (robots.heavy == 0) & ((heavies >= 0) | heavy_there)
    threat = (loses | crushed) & (around.factory < 0)
    stays = [STAY] * (len(ROBOT_ACTIONS) - 5)
    return threat[[STAY, UP, RIGHT, DOWN, LEFT, *stays]]


# ---------- Bidding and factory placement ----------


def early_phase_action(obs, player, grow_lichen=False):
    """The action of `player` while factories are placed: a bid of 0, then its factories one by one.

    Args:
        obs: official observation with `real_env_steps` below 0.
        player: "player_0" or "player_1".
        grow_lichen: see `placement_score`.

    Returns:
        An official action; {} when it is the other player's turn.
    """
    turn = obs["real_env_steps"] + 2 * obs["board"]["factories_per_team"] + 1
    if turn == 0:
        return {"bid": 0, "faction": "AlphaStrike" if player == "player_0" else "MotherMars"}
    team = obs["teams"][player]
    if team["place_first"] != (turn % 2 == 1) or team["factories_to_place"] == 0:
        return {}
    score = placement_score(obs, grow_lichen)
    spawn = np.array(np.unravel_index(np.argmax(score), score.shape))
    share = team["factories_to_place"]  # every factory gets the same water and metal
    return {"spawn": spawn, "water": team["water"] // share, "metal": team["metal"] // share}


def placement_score(obs, grow_lichen=False):
    """How good each cell is as the centre of the next factory, from Gaussian filters over the board.

    Ice counts most, above all ice at the factory's edge, which a robot can mine without walking
    between loads; then ore nearby, and free ground where lichen can grow. The way from the edge
    to the nearest ice, rubble and other factories, which would share the ice, count against a
    cell.

    Args:
        obs: official observation of the placement phase.
        grow_lichen: whether rubble farther off, which would have to be cleared, counts against it too.

    Returns:
        [H, W] float; -inf where the game forbids a factory.
    """
    board = obs["board"]
    factories = np.zeros(board["ice"].shape)
    for player in PLAYERS:
        for factory in obs["factories"][player].values():
            factories[tuple(factory["pos"])] = 1
    cells = np.indices(factories.shape)[..., None]
    ice_cells = np.argwhere(board["ice"]).T[:, None, None]
    steps = np.maximum(np.abs(cells - ice_cells) - 1, 0).sum(0)
    way_to_ice = steps.min(-1, initial=6)
    free = (board["rubble"] == 0) & (board["ice"] == 0) & (board["ore"] == 0)
    score = (
        4.0 * np.minimum(gaussian_filter(board["ice"], 1.2), 0.6)
        + 0.5 * np.minimum(gaussian_filter(board["ice"], 4.0), 3.0)
        + 0.1 * np.minimum(gaussian_filter(board["ore"], 4.0), 3.0)
        + 0.004 * gaussian_filter(free, 3.0)
        - 0.0004 * gaussian_filter(board["rubble"], 2.0)
        - 0.6 * gaussian_filter(factories, 6.0)
        - 1.0 * way_to_ice
        - 0.0004 * grow_lichen * gaussian_filter(board["rubble"], 4.0)
    )
    return np.where(board["valid_spawns_mask"], score, -np.inf)


def gaussian_filter(board, sigma):
    """Sum of `board` [H, W] weighted by exp(-distance^2 / (2 sigma^2)) around every cell, [H, W] float."""
    kernels = []
    for size in board.shape:
        cells = np.arange(size)
        kernels.append(np.exp(-((cells[:, None] - cells) ** 2) / (2 * sigma**2)))
    return kernels[0] @ board @ kernels[1]


# ---------- One match: the engine, rewards and metrics ----------

CAPTION_HEIGHT = 84
PLAYER_COLOURS = (224, 65, 40), (0, 112, 81)  # these, and those of the ground, are the engine's
GROUND_COLOURS = {"ice": (44, 158, 211), "ore": (218, 167, 48), "ground": (210, 102, 65), "rubble": (96, 32, 9)}


def captioned(picture, state, ice):
    """The engine's picture with robots that can be told apart, and a caption below it.

    Args:
        picture: of the engine, uint8 [height, width, 3].
        state: the engine's, which the picture shows.
        ice: units that each player brought home.

    Returns:
        uint8 [height + CAPTION_HEIGHT, width, 3].
    """
    from PIL import Image, ImageDraw  # a bot for the official runner may be without it

    height, width, _ = picture.shape
    canvas = Image.new("RGB", (width, height + CAPTION_HEIGHT), "white")
    canvas.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(canvas)

    def light(x, y, size, colour):
        draw.ellipse((x, y, x + size, y + size), fill=colour, outline="white")

    def heavy(x, y, size, colour):
        draw.rectangle((x - 1, y - 1, x + size + 1, y + size + 1), fill=colour, outline="white", width=2)

    def factory(x, y, size, colour):
        draw.rectangle((x, y, x + size, y + size), fill=colour)

    cell = height / len(state.board.rubble)
    for player, colour in zip(PLAYERS, PLAYER_COLOURS):
        for unit in state.units[player].values():
            shape = heavy if unit.is_heavy() else light
            shape(round(unit.pos.x * cell), round(unit.pos.y * cell), round(cell) - 1, colour)

    def write(x, row, text, shape=None, colour=None):
        """Text in a row of the caption, behind a shape where there is one."""
        y = height + 5 + 20 * row
        if shape:
            shape(x, y, 11, colour)
        draw.text((x + 16 * bool(shape), y + 6), text, fill="black", font_size=12, anchor="lm")

    write(318, 0, f"step {max(state.real_env_steps, 0)}")
    for row, (player, colour) in enumerate(zip(PLAYERS, PLAYER_COLOURS)):
        score = f"{ice[row]:,.0f} ice brought home, {len(state.factories[player])} factories alive"
        write(6, row, score, factory, colour)
    for x, (name, colour) in zip((6, 80, 154, 248), GROUND_COLOURS.items()):
        write(x, 2, name, factory, colour)
    write(318, 2, "pale: lichen")
    for x, name, shape in ((6, "factory", factory), (154, "light robot", light), (248, "heavy robot", heavy)):
        write(x, 3, name, shape, "dimgrey")
    return np.asarray(canvas)


class LuxMatch:
    """Matches of the real engine, one after the other, with rewards and metrics.

    Args:
        options: LuxOptions.
        weights: weight of each reward term, from `weights_of`.
        engine_options: more settings for the engine.
    """

    def __init__(self, options, weights, engine_options=None):
        self.options = options
        self.weights = np.array([weights[term] for term in REWARDS])
        self.seed = None
        self.engine = _engine_class()(
            map_size=options.map_size,
            MIN_FACTORIES=options.min_factories,
            MAX_FACTORIES=options.max_factories,
            **{"validate_action_space": False, "verbose": 0} | (engine_options or {}),
        )

    @property
    def time(self):
        """Steps played so far."""
        return self.engine.state.real_env_steps

    def reset(self, seed):
        """Start a match on the map of a seed; the official observation after its placement."""
        self.seed = seed
        obs = self.engine.reset(seed=seed)[0]["player_0"]
        while obs["real_env_steps"] < 0:
            lichen = self.options.grow_lichen
            actions = {player: early_phase_action(obs, player, lichen) for player in PLAYERS}
            obs = self.engine.step(actions)[0]["player_0"]
        self.placed = np.array([len(obs["factories"][player]) for player in PLAYERS])
        self.totals = np.zeros((2, len(REWARDS)))
        self.counts = {name: np.zeros(2) for name in TEAM_METRICS}  # of what is no reward term
        self.lichen = np.zeros(obs["global_id"] + 1)  # by strain
        return obs

    def step(self, orders, acts):
        """Play one step.

        Args:
            orders, acts: of this match, from `LuxEncoder.orders`.

        Returns:
            rewards: float32 [P, E].
            metrics: None, or if the match is over a dict: "l", its length, and arrays [P] by the names
                in TEAM_METRICS.
        """
        state = self.engine.state
        # Engine objects; they outlive the destruction of what they stand for
        robots = state.units["player_0"] | state.units["player_1"]
        factories = state.factories["player_0"] | state.factories["player_1"]
        self.engine.births.clear()
        _, _, terminations, _, _ = self.engine.step(dict(zip(PLAYERS, orders)))
        amounts = self._achievements(acts, robots, factories)
        rewards = (amounts @ self.weights).astype(np.float32)
        self.totals += amounts.sum(1)
        self.counts["r"] += rewards.sum(1)
        self.counts["factories_alive"] += [len(state.factories[player]) for player in PLAYERS]
        self.counts["right_of_way"] += acts.yielded_moves
        self.counts["blocked_builds"] += acts.blocked_builds
        self._count_robots(list(robots.values()))
        return rewards, self._metrics() if terminations["player_0"] else None

    def render(self):
        """A picture by the engine's own renderer, and below it what it means: see `captioned`."""
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draws in memory, needs no screen
        os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")  # else Ctrl-C does nothing from here on
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the font that the engine asks for may be missing
            picture = self.engine.render()
        return captioned(picture, self.engine.state, self.totals[:, REWARD_INDEX["ice_delivered"]])

    def _achievements(self, acts, robots, factories):
        """Amount of each reward term for each entity in the step just played, [P, E, len(REWARDS)].

        `robots` and `factories` are dicts unit_id -> engine object, as it is after the step.
        """
        state = self.engine.state
        amounts = np.zeros((2, self.options.num_entities, len(REWARDS)))
        arrived = Counter()  # units of a resource that each factory was brought

        def pay(act, term, amount):
            amounts[act.player, act.slot, REWARD_INDEX[term]] = amount

        for unit_id, act in acts.robots.items():
            for resource in ("ice", "ore"):
                # Only digging fills a cargo, and only delivering to an own factory empties it
                gained = getattr(robots[unit_id].cargo, resource) - getattr(act.before, resource)
                if gained > 0:
                    pay(act, f"{resource}_dug", gained)
                elif gained < 0:
                    pay(act, f"{resource}_delivered", -gained)
                    arrived[act.player, act.delivery_slot, resource] -= gained
            if act.worth_clearing:
                left = state.board.rubble[act.before.x, act.before.y]
                pay(act, "rubble_cleared", max(act.worth_clearing - left, 0))
            if act.raided:
                left = state.board.lichen[act.before.x, act.before.y]
                pay(act, "lichen_destroyed", max(act.raided - left, 0))
            if unit_id not in state.units[PLAYERS[act.player]]:
                pay(act, "robot_lost", 1 if act.before.heavy else 0.1)

        strains = state.board.lichen_strains.ravel() + 1  # 0: no lichen
        lichen = np.bincount(strains, state.board.lichen.ravel(), len(self.lichen) + 1)[1:]
        for unit_id, act in acts.factories.items():
            cargo = factories[unit_id].cargo
            strain = act.before.strain
            refined_ice = act.before.ice + arrived[act.player, act.slot, "ice"] - cargo.ice
            refined_ore = act.before.ore + arrived[act.player, act.slot, "ore"] - cargo.ore
            survived = unit_id in state.factories[PLAYERS[act.player]]
            pay(act, "water_made", refined_ice // ICE_PER_WATER)
            pay(act, "metal_made", refined_ore // ORE_PER_METAL)
            pay(act, "lichen_grown", lichen[strain] - self.lichen[strain])
            pay(act, "survived", survived)
            pay(act, "factory_lost", not survived)
        self.lichen = lichen
        return amounts

    def _count_robots(self, robots):
        """Count births, losses, and losses on a cell where another own robot ended the step too.

        `robots` are the engine's, alive before the step.
        """
        alive = self.engine.state.units
        births = self.engine.births
        dead = [unit for unit in robots + births if unit.unit_id not in alive[PLAYERS[unit.team_id]]]
        for unit in births:
            name = "heavies_built" if unit.is_heavy() else "lights_built"
            self.counts[name][unit.team_id] += 1
        crowd = Counter((unit.team_id, unit.pos.x, unit.pos.y) for unit in robots + births if dead)
        for unit in dead:
            is_crowded = crowd[unit.team_id, unit.pos.x, unit.pos.y] > 1
            self.counts["robots_lost"][unit.team_id] += 1
            self.counts["own_collisions"][unit.team_id] += is_crowded

    def _metrics(self):
        """Metrics of the match that has just ended; arrays [P], except its length."""
        totals = {TERM_METRICS.get(term, term): total for term, total in zip(REWARDS, self.totals.T)}
        factories_alive = self.counts["factories_alive"] / GAME_LENGTH
        strains = [self.engine.state.teams[player].factory_strains for player in PLAYERS]
        derived = {
            "l": self.time,
            "factories_alive": factories_alive,
            "ice_per_factory": totals["ice_transferred"] / self.placed,
            "factories_alive_share": factories_alive / self.placed,
            "factories_placed": self.placed,
            "lichen": np.array([self.lichen[list(of_team)].sum() for of_team in strains]),
        }
        return self.counts | totals | derived


@functools.cache
def _engine_class():
    """The engine's class, with a list `births` of the robots built.

    Where luxai_s2_fast is installed, it does some slow parts of the engine faster; what is played
    is the same. Both are slow to import, and only processes that play need them.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame would print a banner
    try:
        from luxai_s2_fast import LuxAI_S2
    except ModuleNotFoundError:
        from luxai_s2 import LuxAI_S2

    class Engine(LuxAI_S2):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.births = []

        def add_unit(self, *args, **kwargs):
            unit = super().add_unit(*args, **kwargs)
            self.births.append(unit)
            return unit

    return Engine


# ---------- Many matches ----------

# Map seeds below this are held out for evaluation; training matches have seeds from here on
HELD_OUT_SEEDS = 1_000_000

# A worker process counts as hung after so many seconds, and one more for each step of each match
WORKER_TIMEOUT = 60


def default_workers():
    """A worker for each core that this process may use, or 0 for a single core.

    The processes of torchrun share the cores of their machine. A daemonic process cannot have workers.
    """
    if multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return cores if cores > 1 else 0


def single_spaces(options):
    """Spaces of the observation and of the actions of one match."""
    obs = LuxEncoder(options).empty_obs()
    E = options.num_entities
    bounds = {
        "board": (0, 100),
        "features": (-np.inf, np.inf),
        "position": (0, options.map_size - 1),
        "kind": (NOBODY, ROBOT),
        "group": (0, E - 1),
    }
    spaces = {key: gym.spaces.Box(low, high, obs[key].shape[1:], obs[key].dtype) for key, (low, high) in bounds.items()}
    spaces["action_mask"] = gym.spaces.MultiBinary(obs["action_mask"].shape[1:])
    num_actions = np.full((2, E), len(ROBOT_ACTIONS))
    num_actions[:, : options.max_factories] = len(FACTORY_ACTIONS)
    return gym.spaces.Dict(spaces), gym.spaces.MultiDiscrete(num_actions)


def map_seed(num_envs, first_match, held_out, seed, index, played):
    """Seed of the map of a match, when `played` matches have begun in its place since `reset(seed)`."""
    if held_out:
        return (seed + first_match + index + (played - 1) * num_envs) % HELD_OUT_SEEDS
    rng = np.random.default_rng([seed, first_match + index])
    return int(rng.integers(HELD_OUT_SEEDS, 2**31, played)[-1])


class LuxMatches(gym.Env if gym else object):
    """The matches that one process plays, as one Gymnasium environment.

    It observes what LuxVecEnv observes of these matches. Its infos hold "rewards" [n, P, E] and
    "finished", a list of (index, metrics) of the matches that ended.

    `indices` is the range of the numbers that the matches have in LuxVecEnv, `seed_of` a function
    (seed of `reset`, index, matches begun there) -> map seed, `new_match` one that makes a
    LuxMatch.
    """

    def __init__(self, indices, options, seed_of, new_match):
        self.indices = indices
        self.seed_of = seed_of
        self.new_match = new_match
        self.matches = []  # made by `start`: the engine is slow to import
        self.encoder = LuxEncoder(options, len(indices))
        # With its map seed, the actions since a match began are all of its state
        self.action_log = np.zeros((len(indices), GAME_LENGTH, 2, options.num_entities), np.int8)
        spaces = (gym.vector.utils.batch_space(space, len(indices)) for space in single_spaces(options))
        self.observation_space, self.action_space = spaces

    def start(self):
        """Make the engines, if there are none yet."""
        self.matches = self.matches or [self.new_match() for _ in self.indices]

    def reset(self, *, seed=None, options=None):
        """Start new matches, or with `options={"state": ...}` resume those of LuxVecEnv.state()."""
        self.start()
        new = {"seed": seed, "played": 1, "actions": self.action_log[0, :0]}
        states = [options["state"][index] if options else new for index in self.indices]
        return self._play_to(states), {}

    def step(self, actions):
        """Play a step of every match."""
        orders, acts = self.encoder.orders(self.view, actions)
        rewards = np.zeros(actions.shape, np.float32)
        finished = []
        for row, match in enumerate(self.matches):
            self.action_log[row, match.time] = actions[row]
            with self._naming(row):
                rewards[row], metrics = match.step(orders[row], acts[row])
            if metrics is not None:
                finished.append((self.indices[row], metrics))
                self.played[row] += 1
                self._begin(row)
        return self._observe(), 0.0, False, False, {"rewards": rewards, "finished": finished}

    def state(self):
        """See LuxVecEnv.state."""
        return [
            {"seed": self.seed, "played": played, "actions": log[: match.time].copy()}
            for played, log, match in zip(self.played, self.action_log, self.matches)
        ]

    def _begin(self, row):
        """Begin the match whose turn it is."""
        with self._naming(row):
            seed = self.seed_of(self.seed, self.indices[row], self.played[row])
            self.encoder.reset(self.matches[row].reset(seed), row)

    def _observe(self):
        snapshots = [read_engine(match.engine.state) for match in self.matches]
        obs, self.view = self.encoder.encode(snapshots)
        return obs

    def _play_to(self, states):
        """Begin all matches, play them up to these states, and return the observation there.

        The encoder takes one observation of every match at a time. So all matches must arrive in
        the same step, and younger ones stand at their start until it is time to play.
        """
        self.seed = int(states[0]["seed"])
        self.played = [int(state["played"]) for state in states]
        ages = [len(state["actions"]) for state in states]
        begins = [max(ages) - age for age in ages]
        for row, age in enumerate(ages):
            self.action_log[row, :age] = states[row]["actions"]
            self._begin(row)
        obs = self._observe()
        for step in range(max(ages)):
            played = [max(step - begin, 0) for begin in begins]
            actions = self.action_log[np.arange(len(ages)), played]
            orders, acts = self.encoder.orders(self.view, actions)
            for row, match in enumerate(self.matches):
                if step >= begins[row]:
                    match.step(orders[row], acts[row])
            obs = self._observe()
        return obs

    @contextlib.contextmanager
    def _naming(self, row):
        """Inside, an exception names the match and its map."""
        try:
            yield
        except Exception as error:
            name = f"match {self.indices[row]} (map seed {self.matches[row].seed})"
            raise RuntimeError(f"{name} failed: {type(error).__name__}: {error}") from error


def _make_matches(parent, *args):
    """LuxMatches, in the parent process (its id) or in a worker."""
    matches = LuxMatches(*args)
    if os.getpid() != parent:
        # Signals are sent to all; from the start on the parent decides when to end
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        matches.start()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gc.collect()
        gc.freeze()  # what is there now stays, so garbage collection need not look at it
    return matches


def end_workers(games):
    """End the worker processes of an AsyncVectorEnv; they hold nothing that has to be saved."""
    for process in games.processes:
        process.kill()
        process.join()
    for pipe in filter(None, games.parent_pipes):
        pipe.close()
    games.closed = True


class LuxVecEnv(gym.vector.VectorEnv if gym else object):
    """N matches of Lux AI Season 2, two players each, both played by the caller.

    It follows Gymnasium's vector conventions, except that rewards are per entity: [N, P, E]
    float32. Terminations and truncations are per match, [N] bool. Observations: see the top of
    the file.

    Args:
        num_envs: N.
        num_workers: processes that share the matches, reduced to a divisor of N; 0 plays them in this
            process, None takes `default_workers()`. The number does not change what is played.
        held_out: play the maps kept for evaluation: match i starts with map `seed + i`.
        first_match: number of the first match, for the seeds: several processes that each play a part
            of the matches together play what one would.
        render_mode: None or "rgb_array" (with num_workers 0).
        reward_weights: dict of weights that differ from the reward's preset, by term.
        engine_options: more settings for the engine, a dict of ENGINE_OPTIONS.
        options: see LuxOptions.

    Raises:
        ValueError: if there is no such option or reward term, or a value is not allowed.
        ChildProcessError, TimeoutError: from methods that play, if a worker process fails or hangs.
            Without workers, a match that fails raises a RuntimeError.
        gymnasium.error.ClosedEnvironmentError: from then on, and after an interruption: matches that
            were left in the middle of a step cannot continue.
        gymnasium.error.ResetNeeded: from `step` and `state` before `reset` or `load_state`.
    """

    metadata = {
        "name": "lux",
        "autoreset_mode": gym and gym.vector.AutoresetMode.SAME_STEP,
        "render_modes": ["rgb_array"],
    }

    def __init__(
        self,
        num_envs,
        num_workers=None,
        held_out=False,
        first_match=0,
        render_mode=None,
        reward_weights=None,
        engine_options=None,
        **options,
    ):
        if gym is None:
            raise ModuleNotFoundError("LuxVecEnv needs Gymnasium: pip install gymnasium")
        if not find_spec("luxai_s2"):  # here, as workers could only die of it
            raise ModuleNotFoundError("LuxVecEnv needs the game: pip install -r requirements.txt")
        checked_numbers(num_envs, num_workers, first_match, render_mode, engine_options or {})
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.kind = None  # until `reset`
        self.why_closed = "it was closed"
        self.options = checked_options(**options)
        weights = weights_of(self.options.reward, reward_weights)
        self.single_observation_space, self.single_action_space = single_spaces(self.options)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        num_workers = default_workers() if num_workers is None else num_workers
        shares = max(n for n in range(1, max(num_workers, 1) + 1) if num_envs % n == 0)
        self.size = num_envs // shares  # matches of a worker
        seed_of = functools.partial(map_seed, num_envs, first_match, held_out)
        new_match = functools.partial(LuxMatch, self.options, weights, engine_options)
        make_matches = [
            functools.partial(
                *(_make_matches, os.getpid(), range(first, first + self.size)),
                *(self.options, seed_of, new_match),
            )
            for first in range(0, num_envs, self.size)
        ]
        # Arrays are not copied: like the workers, they belong to this environment until the next step
        if num_workers == 0:
            self.games = gym.vector.SyncVectorEnv(make_matches, copy=False)
        else:
            # Workers never touch torch or CUDA, so forking is safe where it is fast
            context = "fork" if sys.platform == "linux" else "spawn"
            others = multiprocessing.active_children()
            try:
                self.games = gym.vector.AsyncVectorEnv(make_matches, copy=False, context=context)
            except BaseException:  # Ctrl-C while they start
                for process in set(multiprocessing.active_children()) - set(others):
                    process.kill()
                raise
            self.end_workers = weakref.finalize(self, end_workers, self.games)  # also if it is only dropped
            atexit.register(self.end_workers)  # before multiprocessing waits for them

    def reset(self, *, seed=None, options=None):
        """Start new matches. Match i plays the same maps for the same seed, whatever N is.

        Returns:
            Observations and an empty infos dict. The arrays are overwritten by the next `step`.
        """
        seed = int(np.random.SeedSequence().entropy % 2**31) if seed is None else seed
        obs, _ = self._call("reset", seed=[seed] * self.games.num_envs)
        return self._observations(obs), {}

    def step(self, actions):
        """Play one step of every match.

        Args:
            actions: ints [N, P, E].

        Returns:
            observations, rewards [N, P, E], terminations [N], truncations [N], infos.
            Observations are overwritten by the next step. Where matches ended, `infos["episode"]`
            holds "l" [N] and the TEAM_METRICS [N, P], and `infos["_episode"]` [N] says which of
            them ended.

        Raises:
            ValueError: if an entity has no such action; nothing is played then.
        """
        self._require_reset()
        live = self.kind > NOBODY
        number = self.single_action_space.nvec
        actions = np.asarray(actions)
        if actions.shape != live.shape or actions.dtype.kind not in "iu":
            shape = list(actions.shape)
            raise ValueError(f"actions must be integers {list(live.shape)}, got {actions.dtype} {shape}")
        wrong = live & ((actions < 0) | (actions >= number))
        if wrong.any():
            match, player, slot = np.argwhere(wrong)[0].tolist()
            raise ValueError(
                f"match {match}, player_{player}, slot {slot}: there is no action "
                f"{actions[match, player, slot]}, only 0 to {number[player, slot] - 1}"
            )
        actions = np.where(live, actions, 0)
        obs, _, _, _, infos = self._call("step", actions.reshape(-1, self.size, *number.shape))
        rewards = infos["rewards"].reshape(actions.shape)
        episodes = self._episodes(sum(infos["finished"], []))
        terminated = episodes.get("_episode", np.zeros(self.num_envs, bool))
        return self._observations(obs), rewards, terminated, np.zeros_like(terminated), episodes

    def state(self):
        """All that the matches are made of, to be given to `load_state`.

        Returns:
            A list of N dicts: "seed" of `reset`; "played", matches begun in this place so far; and
            "actions" int8 [t, P, E] since the last one began. Lists of several processes (see
            `first_match`) can be joined, and divided again among any number of processes.
        """
        self._require_reset()
        return sum(self._call("call", "state"), [])

    def load_state(self, state):
        """Play the matches up to where they were at `state()`; from there they continue bit for bit.

        Args:
            state: the list, from an environment with the same options; the number of workers may differ.

        Returns:
            The observations there, and an empty infos dict, as `reset` does.

        Raises:
            ValueError: if it cannot be the state of such an environment.
        """
        number = self.single_action_space.nvec
        logs = [match["actions"] for match in state]
        if len(logs) != self.num_envs or not all(
            log.shape[1:] == number.shape and ((0 <= log) & (log < number)).all() for log in logs
        ):
            raise ValueError("the state is of matches of another environment")
        steps = max(map(len, logs)) + 1
        obs, _ = self._call("reset", options={"state": state}, steps=steps)
        return self._observations(obs), {}

    def render(self):
        """Pictures of the matches, a tuple of N arrays [484, 400, 3] uint8.

        The first 400 rows are the engine's own picture of the board; the others have the step, the ice
        and factories of both players, and a key of the colours.
        """
        if self.render_mode != "rgb_array" or not isinstance(self.games, gym.vector.SyncVectorEnv):
            raise ValueError('rendering needs LuxVecEnv(..., num_workers=0, render_mode="rgb_array")')
        return tuple(match.render() for match in self.matches)

    @property
    def matches(self):
        """The LuxMatch objects of an environment without workers."""
        return self.games.envs[0].matches

    def close_extras(self, **kwargs):
        if isinstance(self.games, gym.vector.AsyncVectorEnv):
            self.end_workers()

    def _observations(self, obs):
        """Arrays [workers, matches of each, ...] of `games` as the caller sees them, [N, ...]."""
        obs = {key: array.reshape(-1, *array.shape[2:]) for key, array in obs.items()}
        obs["action_mask"] = obs["action_mask"].view(bool)
        self.kind = obs["kind"]
        return obs

    def _episodes(self, finished):
        """Gymnasium's infos for a list of (index, metrics) of the matches that ended."""
        if not finished:
            return {}
        ended = np.zeros(self.num_envs, bool)
        episode = {"l": np.zeros(self.num_envs, np.int64)}
        episode |= {key: np.zeros((self.num_envs, len(PLAYERS))) for key in TEAM_METRICS}
        for index, metrics in finished:
            ended[index] = True
            for key, value in metrics.items():
                episode[key][index] = value
        return {"episode": episode, "_episode": ended}

    def _require_reset(self):
        if self.kind is None:
            raise gym.error.ResetNeeded("call reset first: no match has begun")

    # ---------- Workers ----------

    def _call(self, method, *args, steps=1, **kwargs):
        """What a method of `games` returns. After a failure or an interruption the environment is closed."""
        if self.closed:
            raise gym.error.ClosedEnvironmentError(f"make a new environment: {self.why_closed}")
        try:
            if isinstance(self.games, gym.vector.SyncVectorEnv):
                return getattr(self.games, method)(*args, **kwargs)
            return self._call_workers(steps, method, *args, **kwargs)
        except BaseException as error:
            self.why_closed = str(error) or f"{method} was interrupted"
            self.close()
            raise

    def _call_workers(self, steps, method, *args, **kwargs):
        """The same with workers; if one fails, an error of one sentence."""
        try:
            getattr(self.games, f"{method}_async")(*args, **kwargs)
            self._wait(steps)
            return getattr(self.games, f"{method}_wait")()
        except (EOFError, ConnectionError):
            sentinels = [process.sentinel for process in self.games.processes]
            ended = connection.wait(sentinels, 5)
            dead = [self._name(worker) for worker, sentinel in enumerate(sentinels) if sentinel in ended]
            failure = ChildProcessError(f"{' and '.join(dead)} died")
        except TimeoutError as error:
            failure = error
        except RuntimeError as error:  # of a match
            failure = ChildProcessError(str(error))
        except Exception as error:
            failure = ChildProcessError(f"a worker process failed: {type(error).__name__}: {error}")
        raise failure from None

    def _wait(self, steps):
        """Wait until all workers have answered or died; raise a TimeoutError if one hangs."""
        patience = WORKER_TIMEOUT + self.size * steps
        for worker, pipe in enumerate(self.games.parent_pipes):
            waited = 0
            while not pipe.poll(1):  # seconds; a suspended process does not count them
                waited += 1
                if waited >= patience:
                    raise TimeoutError(f"{self._name(worker)} did nothing for {waited} s")

    def _name(self, worker):
        first = worker * self.size
        return f"the worker process of matches {first} to {first + self.size - 1}"
