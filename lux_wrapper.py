"""The Lux AI Season 2 game (luxai-s2) as a vector environment with one reward per entity.

**The game.** Two teams share a map with ice, ore and rubble. Factories drink a unit of water a step and are lost
without it; they refine ice to water and ore to metal, and build robots from metal and power. Robots, light or heavy,
dig ice and ore and bring them home; what they do costs power, which comes from the sun and from factories. A match
ends after 1000 steps, or when a team has lost its last factory. The caller plays both teams; bidding and the placement
of factories are played for them (`early_phase_action`).

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

Axis letters: N matches, P = 2 players, B = N * P teams, E entity slots, A actions, C channels, F features, H and W
the board (x and y of the engine, in this order).

**Observation**, a dict of arrays; every player sees the match from its own side:

    key          shape               dtype    meaning
    board        [N, P, H, W, C]     uint8    channels named in BOARD_CHANNELS, 0 to 100 (percent)
    features     [N, P, E, F]        float32  columns named in FEATURES, about -1 to 1
    position     [N, P, E, 2]        int64    cell of the entity (0, 0 where there is none)
    kind         [N, P, E]           int64    NOBODY = 0, FACTORY = 1, LIGHT = 2, HEAVY = 3
    group        [N, P, E]           int64    index in 0..E-1 of the trajectory the entity belongs to
    action_mask  [N, P, E, A]        bool     True where the action may be taken

An entity keeps its slot from birth to death: factories own the first `max_factories` slots, robots the
rest. A slot that a robot left by dying is shown empty (kind 0) at least once before it is used again, so a
learner that compares two successive `kind` arrays of a match sees every birth and every death. The end of a
match ends all that was in it: the next observation is that of another one.

**Actions** [N, P, E]: an index into ROBOT_ACTIONS or FACTORY_ACTIONS; those of empty slots are ignored. A robot
that delivers hands all of its ice or ore, of which it has more, to the factory that it stands on or beside.

**Rewards** [N, P, E]: what the entity itself achieved in this step, the sum of the terms in REWARDS, each times its
weight. Both ends of a match are terminations (the game is over, nothing is cut short), so nothing is ever truncated.
`step` then returns the first observation of the next match (Gymnasium's SAME_STEP autoreset) and the finished
match's metrics in `infos["episode"]`.

**To change it.** All places in arrays go by name (CHANNEL, COLUMN, TERM), so the order of names is free, but for the
first five of ROBOT_ACTIONS.

    the weight of a reward  LuxVecEnv(..., reward_weights={"ice_dug": 0.01})
    a reward term           a line in REWARDS, and a line in LuxMatch._achievements that pays it
    a board channel         its name in BOARD_CHANNELS, and where it is drawn in LuxEncoder: _draw_map if it stays the
                            same for a whole match, _draw_step if it changes
    a feature               its name in FEATURES, and where it is written: LuxEncoder._encode_factories for factories,
                            _encode_robots for robots; or `reset`, into `ground`, if it is one of the map's cells
    an action of robots     its name in ROBOT_ACTIONS, when it is possible and what it costs in
                            LuxEncoder._encode_robots, and its order in _queues

**Without the vector environment** this file needs nothing but NumPy: a bot of the official runner can take it along,
for `LuxEncoder` (official observation -> arrays and masks, actions -> official orders) and `early_phase_action`.
"""

import atexit
import contextlib
import functools
import gc
import os
import signal
import sys
import traceback
from collections import Counter, namedtuple
from itertools import chain

import numpy as np

try:
    import gymnasium as gym
except ModuleNotFoundError:
    gym = None  # only LuxVecEnv needs it

PLAYERS = ("player_0", "player_1")
NOBODY, FACTORY, LIGHT, HEAVY = range(4)

# The engine's directions, as steps in x and y: none, up, right, down, left. The actions that move are numbered like
# them, so these five stay the first ones of ROBOT_ACTIONS, in this order.
DX, DY = np.array([0, 0, 1, 0, -1]), np.array([0, -1, 0, 1, 0])
STAY, UP, RIGHT, DOWN, LEFT = range(5)
MOVES = slice(UP, LEFT + 1)
ROBOT_ACTIONS = ("stay", "move_up", "move_right", "move_down", "move_left", "dig", "deliver", "pick_up_power")
DIG, DELIVER, PICK_UP = map(ROBOT_ACTIONS.index, ("dig", "deliver", "pick_up_power"))
FACTORY_ACTIONS = ("nothing", "build_light", "build_heavy", "water_lichen")
NOTHING, BUILD_LIGHT, BUILD_HEAVY, WATER = range(len(FACTORY_ACTIONS))
NUM_ACTIONS = max(len(ROBOT_ACTIONS), len(FACTORY_ACTIONS))

BOARD_CHANNELS = (
    "inside",  # 100 on the board, so that padding beyond its edge can be told from empty ground
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
    *("power", "ice", "ore"),  # robots: share of what they can hold; factories: thousands, at most 3
    *("water", "metal"),  # factories: log(1 + amount) / 5
    *("ice_dx", "ice_dy", "ice_distance"),  # to the nearest ice cell, in cells / 8, clipped to 1
    *("ore_dx", "ore_dy", "ore_distance"),
    *("home_dx", "home_dy", "home_distance"),  # to the nearest factory of the team
    *("home_water", "home_power"),  # of that factory, log(1 + amount) / 5 and thousands, at most 3
    *("on_ice", "on_ore", "rubble_here"),
    *("order_up", "order_right", "order_down", "order_left", "order_dig"),  # the order under way: goes on free
    *("group_lights", "group_heavies"),  # factories: robots built here and alive, in tens and fives
    "centre_taken",  # factories: an own robot stands where robots appear
    *("own_factories", "opponent_factories"),  # alive, in fives
    *("is_day", "time_in_cycle", "time"),  # 0 to 1
)
LICHEN_FEATURES = (  # these follow where lichen is grown (grow_lichen)
    *("clear_dx", "clear_dy", "clear_distance"),  # to rubble worth clearing: that which would be gone first
    "worth_clearing",  # the rubble here is
    *("lichen_cells", "room_cells"),  # factories: of their strain, and bare ground that it can spread to, in fifties
)
# What is paid, the weights; a robot's terms are paid to it, a factory's to that factory.
REWARDS = {
    "ice_dug": 0.004,  # robot: a unit of ice taken from the ground into the cargo
    "ore_dug": 0.0004,  # robot: a unit of ore taken from the ground into the cargo
    "ice_delivered": 0.004,  # robot: a unit of ice that reached a factory of the team
    "ore_delivered": 0.0008,  # robot: a unit of ore that reached a factory of the team
    "rubble_cleared": 0.0,  # robot: a unit of rubble dug away that was worth clearing
    "robot_lost": -0.05,  # robot: being destroyed (times 0.1 for a light robot)
    "water_made": 0.004,  # factory: a unit of water refined from ice (4 ice)
    "metal_made": 0.004,  # factory: a unit of metal refined from ore (5 ore)
    "lichen_grown": 0.0001,  # factory: a unit of lichen more (less: minus) on its own strain
    "survived": 0.001,  # factory: a step that ends with the factory alive
    "factory_lost": -0.2,  # factory: running out of water
}
# The weights that differ from these in `LuxVecEnv(reward=)`.
REWARD_PRESETS = {
    "ice": {},
    "lichen": {
        "lichen_grown": 0.01,
        "rubble_cleared": 0.02,
        "ore_dug": 0.004,
        "ore_delivered": 0.004,
        "metal_made": 0.01,
    },
}


def weights_of(reward="ice", changes=None):
    """The weight of each reward term: those of a preset, but for the changes, a dict of weights by term.

    Raises:
        ValueError: if there is no such preset.
        ValueError: if there is no such term.
    """
    if reward not in REWARD_PRESETS:
        raise ValueError(f"reward must be one of {', '.join(REWARD_PRESETS)}; got {reward}")
    weights = REWARDS | REWARD_PRESETS[reward] | (changes or {})
    if unknown := ", ".join(sorted(weights.keys() - REWARDS.keys())):
        raise ValueError(f"there is no reward term {unknown}; there are {', '.join(REWARDS)}")
    return weights


# Their places in the arrays, by name.
CHANNEL = {name: place for place, name in enumerate(BOARD_CHANNELS)}
COLUMN = {name: place for place, name in enumerate(FEATURES + LICHEN_FEATURES)}
TERM = {name: place for place, name in enumerate(REWARDS)}


def columns(*names):
    """The columns of several features, to index the last axis of a features array with."""
    return [COLUMN[name] for name in names]


# Game constants (luxai_s2.config.EnvConfig, the same in every match). Index 0 light, 1 heavy.
GAME_LENGTH, CYCLE, DAY = 1000, 50, 30
METAL_COST, POWER_COST = np.array([10, 100]), np.array([50, 500])
CARGO, BATTERY = np.array([100, 1000]), np.array([150, 3000])
MOVE_COST, RUBBLE_COST = np.array([1, 20]), np.array([0.05, 1.0])
DIG_COST, ORDER_COST = np.array([5, 60]), np.array([1, 10])
DIG_RUBBLE = np.array([2, 20])
MOVE_COST_ONTO = np.floor(MOVE_COST[:, None] + RUBBLE_COST[:, None] * np.arange(101)).astype(int)  # [kind, rubble]
WORST_MOVE = MOVE_COST_ONTO[:, 100]
ICE_PER_WATER, ORE_PER_METAL, GROWTH_PER_WATER, LICHEN_TO_SPREAD = 4, 5, 10, 20
WATER_RESERVE = 200  # steps that a factory must be able to live on after watering lichen
LICHEN_REACH = 8  # steps over bare ground from own factories and lichen to the rubble that is worth clearing

# ------------------------------------------------------------------------------------------------------
# Official observations to arrays, actions to official orders
# ------------------------------------------------------------------------------------------------------

# What LuxEncoder reads of an observation. `factories` and `robots` hold a dict for each player, unit_id -> Factory or
# Robot, rows of integers; `under_way` is the action that its order under way carries out (STAY where there is none).
Snapshot = namedtuple("Snapshot", "time rubble lichen lichen_strains factories robots")
Factory = namedtuple("Factory", "x y power ice ore water metal strain")
Robot = namedtuple("Robot", "heavy x y power ice ore under_way")
# Many of them, each field an array: in LuxEncoder.factories [B, max_factories] by slot, in LuxEncoder.robots [R] (and
# `everyone`, with those that have no slot).
Robots = namedtuple("Robots", ("team", "slot", *Robot._fields))

FACTORY_ORDERS = {BUILD_LIGHT: 0, BUILD_HEAVY: 1, WATER: 2}  # the engine's numbers
ORDERS_UNDER_WAY = {"order_up": UP, "order_right": RIGHT, "order_down": DOWN, "order_left": LEFT, "order_dig": DIG}
ROBOT_CHANNELS = np.array(  # [own or opponent, heavy]
    [[CHANNEL[f"{side}_light"], CHANNEL[f"{side}_heavy"]] for side in ("own", "opponent")]
)


def read_observation(obs):
    """The Snapshot of an official observation of a step after placement."""
    factories, robots = ({}, {}), ({}, {})
    for player, name in enumerate(PLAYERS):
        for unit_id, factory in obs["factories"][name].items():
            cargo = factory["cargo"]
            stock = factory["power"], cargo["ice"], cargo["ore"], cargo["water"], cargo["metal"]
            factories[player][unit_id] = Factory(*map(int, factory["pos"]), *stock, factory["strain_id"])
        for unit_id, unit in obs["units"][name].items():
            cargo, queue, under_way = unit["cargo"], unit["action_queue"], STAY
            if len(queue):
                order, direction = queue[0][:2]
                under_way = DIG if order == 3 else int(direction) if order == 0 else STAY  # others end within a step
            stock = unit["power"], cargo["ice"], cargo["ore"]
            robots[player][unit_id] = Robot(unit["unit_type"] == "HEAVY", *map(int, unit["pos"]), *stock, under_way)
    board = obs["board"]
    return Snapshot(obs["real_env_steps"], board["rubble"], board["lichen"], board["lichen_strains"], factories, robots)


class LuxEncoder:
    """Both players' views of a match: slots, features and masks in, official orders out.

    It reads nothing but official observations (the board's lists made arrays), so that it serves in the official
    runner too. Call `reset` with the first observation after placement, then `encode` with that and every later
    observation in turn, and `orders` after any of them. `reset` with a later one works too: robots get new slots then.

    A team may have more robots than slots, as teams of other programs do. All are drawn on the boards, and no own robot
    steps onto them; but those without a slot have no features and get no orders, until a slot is free.

    Several matches that are played side by side cost much less in one encoder than in several: `reset` each and
    give their snapshots to `encode_rows`. Teams are numbered 2 * match + player, which makes team ^ 1 the opponent;
    R stands for the robots of all teams, team by team.

    Args:
        map_size: side of the board in cells.
        max_factories, max_robots: slots per team. No robot is built by a team that has `max_robots`.
        group_by: who shares a trajectory.
            entity             nobody: each has its own
            cluster            a factory and the robots that it built; when it is lost they join the nearest
            robots             all robots of the team; here and in what follows each factory has its own
            mod-N              robots whose slots are equal modulo N, for instance mod-4
            quadrants          robots in the same quarter of the map
            nearest-factory    robots to which the same factory is nearest
            nearest-heavy      a heavy robot and the light ones to which it is nearest
            factories          all factories of the team; each robot has its own
            kinds              all factories; and all robots
            Where robots change their group while they live, its advantage at a step is that of what the group earns
            from then on, whoever belongs to it later.
        safe_masks: also mask orders that are legal and plainly ruinous:
            1. stepping onto a cell where an own robot stands (both would be destroyed),
            2. stepping onto the centre of an own factory (robots appear there),
            3. building while an own robot stands there, building a light robot from the metal that the factory's first
               heavy one needs, and building into the last slots while others can build their first heavy one,
            4. digging where nothing is gained: bare ground, own lichen, rubble that covers neither ice nor ore (but
               with grow_lichen light robots may clear what is worth it), ice and ore with full cargo,
            5. digging, or stepping away from home, with less power left than the way back to the nearest own
               factory, were there no rubble on it, and an order there cost (a robot without power stands where it
               is until the sun shines),
            6. picking up less power than ten times what the order itself costs,
            7. watering lichen if the water left would not last WATER_RESERVE steps, or to the end; with grow_lichen,
               nor for watering as much at every second step to the end,
            8. with grow_lichen, ending a step where a robot of the opponent could destroy this one, unless it can
               wherever it goes.
            And where two own robots are told to step onto one cell, the first goes and the others wait.
        grow_lichen: also show the LICHEN_FEATURES, and change rules 4, 7 and 8 for matches that lichen decides. Rubble
            is worth clearing where lichen of the team could grow next: beside own factories, own lichen, and bare
            ground that leads there.
        num_matches: how many matches.

    Raises:
        LuxError: if there is no such group_by, or it has more groups of robots than there are robot slots.
    """

    def __init__(
        self,
        map_size=48,
        max_factories=5,
        max_robots=6,
        group_by="entity",
        safe_masks=True,
        grow_lichen=False,
        num_matches=1,
    ):
        rules = "entity cluster robots quadrants nearest-factory nearest-heavy factories kinds".split()
        rules += [f"mod-{n}" for n in range(1, max_robots + 1)]
        if group_by not in rules:
            raise ValueError(f"group_by must be one of {', '.join(rules)}; got {group_by}")
        if max_robots < (least := {"quadrants": 4, "nearest-factory": max_factories}.get(group_by, 0)):
            raise ValueError(f"group_by {group_by} needs at least {least} robot slots, got {max_robots}")
        self.map_size, self.max_factories, self.max_robots = map_size, max_factories, max_robots
        self.num_entities = max_factories + max_robots
        self.group_by, self.safe_masks, self.grow_lichen = group_by, safe_masks, grow_lichen
        self.num_features = len(FEATURES) + grow_lichen * len(LICHEN_FEATURES)
        self.side = map_size + 2  # of maps with a border of 1 cell
        self.beside = DX[:, None] * self.side + DY[:, None]  # from a cell to itself and its neighbours, in such maps

        N, B, E, S, side = num_matches, 2 * num_matches, self.num_entities, map_size, self.side
        self.teams, self.opponent = np.arange(B)[:, None], np.arange(B) ^ 1
        self.new = np.zeros(N, bool)  # matches of which no observation has been seen
        self.ice, self.ore = np.zeros((2, N, S, S), bool)
        self.rubble = np.zeros((N, side, side), np.int64)
        self.strains = np.zeros((N, S, S), np.int16)  # those of the step before, until they are read
        self.player_of_strain = np.zeros((N, 2 * max_factories + 1), np.int8)  # the last serves strain -1, no lichen
        self.lichen_drawn = np.zeros(N, bool)
        self.lichen_counted = [None] * N  # the lichen that these are right for:
        self.water_costs = np.zeros((N, 2 * max_factories + 1), np.int64)
        # The features that depend on nothing but the cell and the factories alive; the others are 0.
        self.ground = np.zeros((B, S, S, self.num_features), np.float32)
        self.factories_drawn = np.zeros((B, max_factories), bool)  # those that the next five show:
        self.factory_map = np.zeros((B, side, side), np.int64)  # slot + 1, with a border of 1 cell
        self.centre_map, self.closed = np.zeros((2, B, side, side), bool)  # closed: where a team may not go
        self.nearest = np.zeros((B, S, S), np.int64)  # slot of the team's nearest factory
        self.steps_home = np.zeros((5, B, S, S), np.int64)  # from a cell and its neighbours to that factory's edge
        self.robots_drawn = []  # where on the boards, as indices
        self.factory_slot, self.robot_slot = ([{} for _ in range(B)] for _ in range(2))  # unit_id -> slot
        self.home = np.zeros((B, E), np.int64)  # slot of the factory an entity belongs to
        self.blocked_builds = np.zeros(B, np.int64)  # factory steps in which only the slots forbade to build
        self.right_of_way = np.zeros(B, np.int64)  # moves held back because an own robot had the same goal

    def arrays(self):
        """A dict of zeroed arrays [B, ...] with the keys, shapes and types of the table at the top."""
        B, E, S = len(self.teams), self.num_entities, self.map_size
        return {
            "board": np.zeros((B, S, S, len(BOARD_CHANNELS)), np.uint8),
            "features": np.zeros((B, E, self.num_features), np.float32),
            "position": np.zeros((B, E, 2), np.int64),
            "kind": np.zeros((B, E), np.int64),
            "group": np.zeros((B, E), np.int64),
            "action_mask": np.zeros((B, E, NUM_ACTIONS), bool),
        }

    def reset(self, obs, match=0):
        """Forget the last match; `obs` is the first observation after placement."""
        teams = slice(2 * match, 2 * match + 2)
        self.ice[match], self.ore[match] = ice, ore = obs["board"]["ice"] > 0, obs["board"]["ore"] > 0
        self.ground[teams, ..., columns("ice_dx", "ice_dy", "ice_distance")] = _way_to_nearest(ice)
        self.ground[teams, ..., columns("ore_dx", "ore_dy", "ore_distance")] = _way_to_nearest(ore)
        self.ground[teams, ..., COLUMN["on_ice"]], self.ground[teams, ..., COLUMN["on_ore"]] = ice, ore
        self.strains[match] = obs["board"]["lichen_strains"]
        self.player_of_strain[match] = -1
        self.new[match], self.lichen_counted[match] = True, None
        self.home[teams] = np.arange(self.num_entities)
        self.blocked_builds[teams] = self.right_of_way[teams] = 0
        for player, name in enumerate(PLAYERS):
            team = 2 * match + player
            self.factory_slot[team] = {unit_id: slot for slot, unit_id in enumerate(obs["factories"][name])}
            self.robot_slot[team] = {}
            for factory in obs["factories"][name].values():
                self.player_of_strain[match, factory["strain_id"]] = player

    def encode(self, obs, out):
        """Write the match as both players see it into `out`.

        Args:
            obs: official observation of a step after placement.
            out: arrays as from `arrays()`, the same ones at every step of a match (only what changes
                is written again).
        """
        self.encode_rows([read_observation(obs)], out)

    def encode_rows(self, matches, out):
        """As `encode`, of a list with what `read_observation` or `read_engine` returns for each match."""
        seen = Snapshot(*zip(*matches))
        self.time = np.array(seen.time)
        self.lichen = np.stack(seen.lichen).astype(np.uint8)  # small types make the operations below faster
        self.strains_before, self.strains = self.strains, np.stack(seen.lichen_strains).astype(np.int16)
        self._read_factories([rows for players in seen.factories for rows in players])
        self._read_robots([rows for players in seen.robots for rows in players])

        for match in np.flatnonzero(self.new).tolist():
            self._draw_map(match, out)
        changed = (self.factories_drawn != self.alive).any(1)
        for match in np.flatnonzero(self.new | changed[::2] | changed[1::2]).tolist():
            self._draw_factories(match, out)
        self.new[:] = False
        self._draw_step(np.stack(seen.rubble), out)
        if self.grow_lichen:
            self._draw_lichen_ground(out["board"])

        for key in ("features", "position", "kind", "action_mask"):
            out[key][:] = 0
        self._encode_factories(out)
        self._encode_robots(out)
        self._encode_match(out)
        self._assign_groups(out["group"])

    def orders(self, actions):
        """Official orders for the observation encoded last.

        A robot that goes on doing what it did gets no order, since every new one costs power. Moves and
        digs are ordered for as many steps as the robot can pay and still afford another order after, so
        that going on is free and changing its mind is always possible.

        Args:
            actions: int array [B, E].

        Returns:
            list of B dicts unit_id -> official action; of one match, for player_0 and player_1. A factory's is an int,
            a robot's queue an int array [0 or 1, 6]; JSON takes its `tolist()`.
        """
        orders, factory_ids = [{} for _ in self.teams], [list(slots) for slots in self.factory_slot]
        of_factories = actions[:, : self.max_factories]
        # The engine refuses what is masked out and cannot be done. It would build robots for which there is no slot.
        busy = (of_factories == WATER) | ((of_factories == BUILD_LIGHT) & self.slot_for_light)
        busy = self.alive & (busy | ((of_factories == BUILD_HEAVY) & self.slot_for_heavy))
        for team, slot in np.argwhere(busy).tolist():
            orders[team][factory_ids[team][slot]] = FACTORY_ORDERS[int(actions[team, slot])]
        action = actions[self.robots.team, self.robots.slot]
        if self.safe_masks:
            action = self._give_way(action)
        queues, team, length = self._queues(action), self.robots.team.tolist(), np.where(action == STAY, 0, 1).tolist()
        unit_ids = [unit_id for slots in self.robot_slot for unit_id in slots]  # in the order of self.robots
        for row in np.flatnonzero(action != self.robots.under_way).tolist():
            orders[team[row]][unit_ids[row]] = queues[row : row + length[row]]
        return orders

    # -- Reading -----------------------------------------------------------------------------------------

    def _read_factories(self, teams):
        """Read the rows of all teams into `alive` and `factories`, arrays by slot, 0 where none is alive."""
        table = []
        for team, rows in enumerate(teams):
            table += [(team, self.factory_slot[team][unit_id], *row) for unit_id, row in rows.items()]
        table = np.fromiter(chain.from_iterable(table), np.int64).reshape(-1, 2 + len(Factory._fields))
        team, slot = table[:, :2].T
        self.alive = np.zeros((len(teams), self.max_factories), bool)
        self.alive[team, slot] = True
        by_slot = np.zeros((len(Factory._fields), *self.alive.shape), np.int64)
        by_slot[:, team, slot] = table[:, 2:].T
        self.factories = Factory(*by_slot)

    def _read_robots(self, teams):
        """Read the rows of all teams into `everyone`, team by team and in the observations' order; slots for new ones.

        Slots stay with their robots. A new robot gets the first slot that was empty in the last observation, so one
        whose robot has died since stays empty for now; and it belongs to the factory in whose centre it appears.
        Those for whom there is no slot (-1) wait for one; `robots` are all others.
        """
        table = []
        for team, rows in enumerate(teams):
            slots = self.robot_slot[team]
            if rows.keys() != slots.keys():
                empty = sorted(set(range(self.max_factories, self.num_entities)) - set(slots.values()))
                born = dict(zip((unit_id for unit_id in rows if unit_id not in slots), empty))
                for unit_id, slot in born.items():
                    self.home[team, slot] = self._nearest_factory(team, rows[unit_id].x, rows[unit_id].y)
                slots = slots | born
                self.robot_slot[team] = slots = {unit_id: slots[unit_id] for unit_id in rows if unit_id in slots}
            table += [(team, slots.get(unit_id, -1), *row) for unit_id, row in rows.items()]
        table = np.fromiter(chain.from_iterable(table), np.int64).reshape(-1, len(Robots._fields)).T
        self.everyone = Robots(*table)
        self.robots = Robots(*table[:, self.everyone.slot >= 0])
        self.robot_map = np.zeros((len(teams), self.side, self.side), bool)
        self.robot_map[self.everyone.team, self.everyone.x + 1, self.everyone.y + 1] = True

    def _nearest_factory(self, team, x, y):
        """Slot of the factory of a team that is nearest to a cell."""
        distance = np.abs(self.factories.x[team] - x) + np.abs(self.factories.y[team] - y)
        return np.where(self.alive[team], distance, 10**6).argmin()

    def _assign_groups(self, group):
        """Write the group of every slot [B, E]; groups of robots are numbered from max_factories on."""
        robots, rule, first = self.robots, self.group_by, self.max_factories
        group[:] = self.home if rule == "cluster" else np.arange(self.num_entities)
        if rule in ("factories", "kinds"):
            group[:, :first] = 0
        if rule in ("robots", "kinds"):
            group[:, first:] = first
        elif rule.startswith("mod-"):
            group[:, first:] = first + np.arange(self.max_robots) % int(rule[4:])
        elif rule == "quadrants":
            right, low = robots.x >= self.map_size / 2, robots.y >= self.map_size / 2
            group[robots.team, robots.slot] = first + 2 * right + low
        elif rule == "nearest-factory":
            group[robots.team, robots.slot] = first + self.nearest[robots.team, robots.x, robots.y]
        elif rule == "nearest-heavy" and robots.heavy.any():
            heavies = np.flatnonzero(robots.heavy)
            distance = np.abs(robots.x[:, None] - robots.x[heavies]) + np.abs(robots.y[:, None] - robots.y[heavies])
            distance[robots.team[:, None] != robots.team[heavies]] = 10**6
            nearest, found = heavies[distance.argmin(1)], distance.min(1) < 10**6
            group[robots.team[found], robots.slot[found]] = robots.slot[nearest[found]]

    # -- Drawing -----------------------------------------------------------------------------------------

    def _draw_map(self, match, out):
        """The channels that stay the same for a whole match."""
        board = out["board"][2 * match : 2 * match + 2]
        board[:] = 0
        board[..., CHANNEL["inside"]] = 100
        board[..., CHANNEL["ice"]] = self.ice[match] * 100
        board[..., CHANNEL["ore"]] = self.ore[match] * 100

    def _draw_factories(self, match, out):
        """Draw a match's factories alive and the ways to them; robots of one that is gone join the nearest."""
        teams, robots = slice(2 * match, 2 * match + 2), self.robots
        alive, own, closed = self.alive[teams], self.factory_map[teams], self.closed[teams]
        own[:], self.centre_map[teams] = 0, False
        for player, slot in np.argwhere(alive).tolist():
            team = 2 * match + player
            x, y = self.factories.x[team, slot], self.factories.y[team, slot]
            own[player, x : x + 3, y : y + 3] = slot + 1
            self.centre_map[team, x + 1, y + 1] = True
        closed[:] = own[::-1] > 0  # the opponent's factories, and the border
        closed[:, [0, -1]] = closed[:, :, [0, -1]] = True
        drawn, board = own[:, 1:-1, 1:-1] > 0, out["board"][teams]
        board[..., CHANNEL["own_factory"]] = drawn * 100
        board[..., CHANNEL["opponent_factory"]] = drawn[::-1] * 100
        self.factories_drawn[teams] = alive
        homeless = (robots.team // 2 == match) & ~self.alive[robots.team, self.home[robots.team, robots.slot]]
        for row in np.flatnonzero(homeless):
            team = robots.team[row]
            self.home[team, robots.slot[row]] = self._nearest_factory(team, robots.x[row], robots.y[row])

        cells = np.stack(np.meshgrid(np.arange(self.map_size), np.arange(self.map_size), indexing="ij"), -1)
        centres = np.stack([self.factories.x[teams], self.factories.y[teams]], -1)
        to_factory = centres[:, :, None, None] - cells
        distance = np.where(alive[..., None, None], np.abs(to_factory).sum(-1), 10**6)
        self.nearest[teams] = nearest = distance.argmin(1)
        way = np.take_along_axis(to_factory, nearest[:, None, ..., None], 1)
        self.ground[teams, ..., columns("home_dx", "home_dy")] = np.clip(way[:, 0] / 8, -1, 1)
        self.ground[teams, ..., COLUMN["home_distance"]] = np.clip(distance.min(1) / 8, 0, 1)
        gap = np.abs(way - np.stack([DX, DY], -1)[:, None, None]) - 1
        self.steps_home[:, teams] = np.maximum(gap, 0).sum(-1).swapaxes(0, 1)

    def _draw_step(self, rubble, out):
        """The channels that change at every step: rubble, lichen and robots."""
        maps, robots = out["board"], self.everyone
        self.rubble[:, 1:-1, 1:-1] = rubble
        maps[..., CHANNEL["rubble"]] = rubble.astype(np.uint8).repeat(2, 0)
        growing = self.lichen.any((1, 2))
        for match in np.flatnonzero(growing | self.lichen_drawn).tolist():
            owner = self.player_of_strain[match].take(self.strains[match])
            for player in range(2):
                team, lichen = 2 * match + player, self.lichen[match] * (owner == player)
                maps[team, ..., CHANNEL["own_lichen"]] = lichen
                maps[team ^ 1, ..., CHANNEL["opponent_lichen"]] = lichen
        self.lichen_drawn = growing
        for drawn in self.robots_drawn:
            maps[drawn] = 0
        own, opponent = ROBOT_CHANNELS[:, robots.heavy]
        self.robots_drawn = [(robots.team, robots.x, robots.y, own), (robots.team ^ 1, robots.x, robots.y, opponent)]
        for drawn in self.robots_drawn:
            maps[drawn] = 100

    def _draw_lichen_ground(self, maps):
        """`room` and `to_clear` [B, side, side]: where lichen of a team can grow, and could next, but for rubble.

        From the own factories and lichen on, LICHEN_REACH times, every neighbour that is bare is room too.
        """
        soil, rubble = np.zeros((2, *self.factory_map.shape), bool)
        soil[:, 1:-1, 1:-1] = ~(self.ice | self.ore).repeat(2, 0) & (maps[..., CHANNEL["opponent_lichen"]] == 0)
        soil &= (self.factory_map == 0) & (self.factory_map[self.opponent] == 0)
        rubble[:] = (self.rubble > 0).repeat(2, 0)
        bare, self.own_lichen = soil & ~rubble, np.zeros_like(soil)
        self.own_lichen[:, 1:-1, 1:-1] = maps[..., CHANNEL["own_lichen"]] > 0
        room = (self.factory_map > 0) | self.own_lichen
        for _ in range(LICHEN_REACH):
            room |= _and_beside(room) & bare
        self.room, self.to_clear = room & (self.factory_map == 0), _and_beside(room) & soil & rubble

    # -- Features and masks ------------------------------------------------------------------------------

    def _encode_factories(self, out):
        """Features and masks of the factories; arrays [B, max_factories]."""
        factories, robots, alive = self.factories, self.robots, self.alive
        B, width = alive.shape
        features = out["features"][:, :width]
        out["kind"][:, :width] = np.where(alive, FACTORY, NOBODY)
        out["position"][:, :width] = np.stack([factories.x, factories.y], -1)
        features[:] = self.ground[self.teams, factories.x, factories.y]
        features[..., COLUMN["is_factory"]] = 1
        for name in ("power", "ice", "ore"):
            features[..., COLUMN[name]] = np.minimum(getattr(factories, name) / 1000, 3)
        for name in ("water", "metal"):
            features[..., COLUMN[name]] = _log(getattr(factories, name))
        features[..., COLUMN["home_water"]] = features[..., COLUMN["water"]]
        features[..., COLUMN["home_power"]] = features[..., COLUMN["power"]]
        built = np.zeros((2, B, self.num_entities), np.int64)  # robots alive, by kind
        np.add.at(built, (robots.heavy, robots.team, self.home[robots.team, robots.slot]), 1)
        lights, heavies = built[..., :width]
        features[..., COLUMN["group_lights"]] = lights / 10
        features[..., COLUMN["group_heavies"]] = heavies / 5
        taken = self.robot_map[self.teams, factories.x + 1, factories.y + 1]
        features[..., COLUMN["centre_taken"]] = taken
        if self.grow_lichen:
            self._encode_lichen(features)

        can_light, can_heavy = (
            alive & (factories.metal >= METAL_COST[heavy]) & (factories.power >= POWER_COST[heavy]) for heavy in (0, 1)
        )
        free = (self.max_robots - np.bincount(self.everyone.team, minlength=B))[:, None]
        first = (heavies == 0) & can_heavy & self.safe_masks  # yet to build their first heavy robot: those come first
        can_light &= ~first | (factories.metal >= METAL_COST.sum())
        # Enough slots even if every factory before it builds; those for first heavy robots are nobody else's.
        spare_slot = first.sum(1, keepdims=True) + (can_light | (can_heavy & ~first)).cumsum(1) <= free
        self.slot_for_light, self.slot_for_heavy = spare_slot, np.where(first, first.cumsum(1) <= free, spare_slot)
        may_light, may_heavy = can_light & self.slot_for_light, can_heavy & self.slot_for_heavy
        self.blocked_builds += ((can_light | can_heavy) & ~may_light & ~may_heavy).sum(1)
        if self.safe_masks:
            may_light, may_heavy = may_light & ~taken, may_heavy & ~taken
        cost = self._water_costs()[self.teams // 2, factories.strain]
        left = (GAME_LENGTH - self.time).repeat(2)[:, None]
        reserve = np.minimum(WATER_RESERVE, left) if self.safe_masks else 0
        if self.safe_masks and self.grow_lichen:
            reserve = reserve + (left - 1) * cost // 2
        mask = out["action_mask"][:, :width]
        mask[..., NOTHING] = alive
        mask[..., BUILD_LIGHT], mask[..., BUILD_HEAVY] = may_light, may_heavy
        mask[..., WATER] = alive & (factories.water > reserve) & (factories.water - cost >= reserve)

    def _encode_lichen(self, features):
        """The LICHEN_FEATURES of the factories."""
        width = features.shape[1]
        for name, cells in (("lichen_cells", self.own_lichen), ("room_cells", self.room)):
            team, x, y = np.nonzero(cells[:, 1:-1, 1:-1])
            number = np.bincount(team * width + self.nearest[team, x, y], minlength=len(features) * width)
            features[..., COLUMN[name]] = number.reshape(-1, width) / 50

    def _ways_to_clear(self, team, x, y):
        """Way [R, 3] from robots to the rubble worth clearing that a light one would have cleared first: dx, dy and
        distance in cells / 8, at most 1. Rubble under another own robot is left to that."""
        way = np.tile(np.float32([0, 0, 1]), (len(team), 1))
        teams, *cells = np.nonzero(self.to_clear[:, 1:-1, 1:-1])
        digs = self.rubble[teams // 2, cells[0] + 1, cells[1] + 1] / DIG_RUBBLE[0]
        occupied = self.robot_map[teams, cells[0] + 1, cells[1] + 1] * 10**6
        first, last = (np.searchsorted(teams, np.arange(len(self.teams)), side) for side in ("left", "right"))
        for of in np.flatnonzero(np.bincount(team, minlength=len(first)) * (last > first)):
            mine, there = np.flatnonzero(team == of), slice(first[of], last[of])
            dx, dy = (to[there] - at[mine, None] for to, at in zip(cells, (x, y)))
            steps = np.abs(dx) + np.abs(dy)
            time = steps + digs[there] + np.where(steps > 0, occupied[there], 0)
            best = np.arange(len(mine)), time.argmin(1)
            free = time[best] < 10**6
            way[mine[free]] = np.clip(np.stack([dx[best], dy[best], steps[best]], -1) / 8, -1, 1)[free]
        return way

    def _threats(self, team, heavy, power, cells, at_home):
        """Whether a robot of the opponent could destroy the robots after each of their actions, bool [A, R].

        A heavy robot destroys a light one. Of two of a kind the one that moves wins, or if both do the more power.

        Args:
            team, heavy, power [R]: of the robots.
            cells [5, R]: numbers of their own cell and those beside, in maps [B, side, side].
            at_home: where these are of an own factory, which no robot of the opponent enters.
        """
        others = self.everyone
        powers = np.full((2, len(self.teams), self.side, self.side), -1)  # of opponents, light and heavy
        powers[others.heavy, others.team ^ 1, others.x + 1, others.y + 1] = others.power
        near = cells[:, None] + self.beside[1:]  # [5, 4, R]
        lights, heavies = (kind.take(near, mode="clip").max(1) for kind in powers)
        same = np.where(heavy, heavies, lights)
        wins = same >= np.where(np.arange(5)[:, None] == STAY, 0, power)
        crushed = (heavy == 0) & ((heavies >= 0) | (powers[1].take(cells) >= 0))
        threat = (wins | crushed) & ~at_home
        return threat[[STAY, UP, RIGHT, DOWN, LEFT, *[STAY] * (len(ROBOT_ACTIONS) - 5)]]

    def _water_costs(self):
        """By match and strain, upper bounds on the water that watering costs its factory: 1 for 10 cells to grow on.

        Lichen grows on the 12 cells at the factory's edge, on cells of its strain, and on neighbours of those that
        hold LICHEN_TO_SPREAD. All of them are counted, although rubble or lichen of others may be in the way of some.
        And as the engine asks for what it counted in the step before, lichen that has withered since counts too: a
        cell is of a strain if it is now or was then, and spreads with up to 2 less.
        """
        for match, maps in enumerate(zip(self.strains, self.strains_before, self.lichen >= LICHEN_TO_SPREAD - 2)):
            seen = [cells.tobytes() for cells in maps]
            if seen == self.lichen_counted[match]:  # mostly lichen grows or shrinks where it is, and the costs stay
                continue
            now, before, enough = maps
            strains = np.flatnonzero(self.player_of_strain[match] >= 0).astype(np.int16)[:, None, None]
            cells = (now == strains) | (before == strains)  # [strain, H, W]
            spreading = cells & enough
            cells[:, 1:] |= spreading[:, :-1]
            cells[:, :-1] |= spreading[:, 1:]
            cells[:, :, 1:] |= spreading[:, :, :-1]
            cells[:, :, :-1] |= spreading[:, :, 1:]
            number = 12 + np.array([np.count_nonzero(of_strain) for of_strain in cells])
            self.water_costs[match, strains.ravel()] = -(-number // GROWTH_PER_WATER)
            self.lichen_counted[match] = seen
        return self.water_costs

    def _encode_robots(self, out):
        """Features and masks of the robots.

        Arrays have robots last: [R], [A, R] by action, and [5, R] by direction, of the own cell and those beside.
        """
        robots = self.robots
        team, slot, heavy, x, y = robots.team, robots.slot, robots.heavy, robots.x, robots.y
        power, ice, ore, under_way = robots.power, robots.ice, robots.ore, robots.under_way
        row, match, battery, cargo = np.arange(len(team)), team // 2, BATTERY[heavy], CARGO[heavy]
        here = STAY  # the direction of a robot's own cell
        cells = (x + 1) * self.side + y + 1 + self.beside
        cells_of_team = cells + team * self.side**2
        own_factory, closed = self.factory_map.take(cells_of_team), self.closed.take(cells_of_team)
        rubble, nearest = self.rubble.take(cells + match * self.side**2), self.nearest[team, x, y]

        features = self.ground[team, x, y]
        features[:, COLUMN["is_light"]], features[:, COLUMN["is_heavy"]] = heavy == 0, heavy
        for name, share in (("power", power / battery), ("ice", ice / cargo), ("ore", ore / cargo)):
            features[:, COLUMN[name]] = share
        for name in ("home_water", "home_power"):
            features[:, COLUMN[name]] = out["features"][team, nearest, COLUMN[name]]
        features[:, COLUMN["rubble_here"]] = rubble[here] / 100
        for name, action in ORDERS_UNDER_WAY.items():
            features[:, COLUMN[name]] = under_way == action

        if self.grow_lichen:
            features[:, columns("clear_dx", "clear_dy", "clear_distance")] = self._ways_to_clear(team, x, y)
            self.can_grow = self.to_clear[team, x + 1, y + 1]
            features[:, COLUMN["worth_clearing"]] = self.can_grow

        # What every action leaves of the power. An order that is under way goes on free; any other is paid for first.
        order_cost = ORDER_COST[heavy]
        left = power - order_cost * (np.arange(len(ROBOT_ACTIONS))[:, None] != under_way)
        left[MOVES] -= MOVE_COST_ONTO[heavy, rubble[MOVES]]
        left[DIG] -= DIG_COST[heavy]
        can_do = left >= 0
        can_do[MOVES] &= ~closed[MOVES]
        can_do[DIG] &= (own_factory[here] == 0) & ~closed[here]
        can_do[DELIVER] &= own_factory.any(0) & (ice + ore > 0)
        gain = np.minimum(battery - left[PICK_UP], self.factories.power[team, nearest])
        can_do[PICK_UP] &= (own_factory[here] > 0) & (gain > 0)
        if self.safe_masks:
            can_do[MOVES] &= ~(self.robot_map | self.centre_map).take(cells_of_team[MOVES])
            on_ice, on_ore, lichen = self.ice[match, x, y], self.ore[match, x, y], self.lichen[match, x, y] > 0
            own_lichen = (self.player_of_strain[match, self.strains[match, x, y]] == team % 2) & lichen
            to_mine = ~own_lichen & ((on_ice & (ice < cargo)) | (on_ore & (ore < cargo)))
            to_clear = ((rubble[here] > 0) & (on_ice | on_ore)) | (lichen & ~own_lichen)
            if self.grow_lichen:
                to_clear |= self.can_grow & (heavy == 0)
            can_do[DIG] &= to_mine | to_clear
            can_do[PICK_UP] &= gain >= 10 * order_cost
            steps_home = self.steps_home[:, team, x, y]
            way_home = steps_home * MOVE_COST[heavy] + (np.minimum(steps_home, 2) + 1) * order_cost
            can_do[MOVES] &= (left[MOVES] >= way_home[MOVES]) | (steps_home[MOVES] < steps_home[here])
            can_do[DIG] &= left[DIG] >= way_home[here]
            if self.grow_lichen:
                safe = can_do & ~self._threats(team, heavy, power, cells_of_team, own_factory > 0)
                can_do = np.where(safe.any(0), safe, can_do)
        can_do[STAY] |= ~can_do.any(0)

        out["features"][team, slot] = features
        out["position"][team, slot] = np.stack([x, y], -1)
        out["kind"][team, slot] = np.where(heavy, HEAVY, LIGHT)
        out["action_mask"][team, slot, : len(ROBOT_ACTIONS)] = can_do.T
        self.deliver_direction = (own_factory > 0).argmax(0)
        self.deliver_to = own_factory[self.deliver_direction, row] - 1  # slot of that factory

    def _encode_match(self, out):
        """The features that are the same for everybody; and none where there is nobody."""
        alive, time = self.alive.sum(1), self.time.repeat(2)
        for name, value in (
            ("own_factories", alive / 5),
            ("opponent_factories", alive[self.opponent] / 5),
            ("is_day", time % CYCLE < DAY),
            ("time_in_cycle", time % CYCLE / CYCLE),
            ("time", time / GAME_LENGTH),
        ):
            out["features"][..., COLUMN[name]] = value[:, None]
        out["features"][out["kind"] == NOBODY] = 0

    # -- Orders ------------------------------------------------------------------------------------------

    def _give_way(self, action):
        """Actions of the robots [R] in which those who would step onto one cell together, but for the first, stay.

        Every move's goal is made a number, which no other cell of any team has. Nearly always all of them differ.
        Else the robots are gone through in the order of `robots`, that of their birth, and the first one gets the cell.
        """
        robots = self.robots
        moves = np.flatnonzero((action >= UP) & (action <= LEFT))
        cells = (robots.team[moves] * self.side + robots.x[moves]) * self.side + robots.y[moves]
        goals, taken = (cells + self.beside[action[moves], 0]).tolist(), set()
        if len(set(goals)) < len(goals):
            action = action.copy()
            for row, goal in zip(moves.tolist(), goals):
                if goal in taken:
                    action[row] = STAY
                    self.right_of_way[robots.team[row]] += 1
                taken.add(goal)
        return action

    def _queues(self, action):
        """Official orders [R, 6] that make robots do their actions [R]; those of robots that stay mean nothing.

        An order is: type (0 move, 1 transfer, 2 pick up, 3 dig, 4 self-destruct, 5 recharge), direction, resource
        (0 ice, 1 ore, 2 water, 3 metal, 4 power), amount, repeat, how many times.
        """
        robots, order_cost = self.robots, ORDER_COST[self.robots.heavy]
        spare = robots.power - 2 * order_cost  # for this order and one after it
        moves, digs = (np.maximum(spare // cost[robots.heavy], 1) for cost in (WORST_MOVE, DIG_COST))
        most, more_ore = np.maximum(robots.ice, robots.ore), robots.ore > robots.ice
        to_full = np.minimum(BATTERY[robots.heavy] - robots.power + order_cost, BATTERY[robots.heavy])
        queues = np.zeros((len(action), 6), np.int64)
        for chosen, order in (
            (action <= LEFT, (0, action, 0, 0, 0, moves)),
            (action == DIG, (3, 0, 0, 0, 0, digs)),
            (action == DELIVER, (1, self.deliver_direction, more_ore, most, 0, 1)),
            (action == PICK_UP, (2, 0, 4, to_full, 0, 1)),
        ):
            for column, value in enumerate(order):
                queues[chosen, column] = value if np.ndim(value) == 0 else value[chosen]
        return queues


def _way_to_nearest(cells):
    """Signed way from every cell to the nearest marked one by walking distance.

    Args:
        cells: [H, W], non-zero where marked.

    Returns:
        [H, W, 3] float32: dx, dy and distance in cells / 8, clipped to -1 and 1; (0, 0, 1) on a board
        without marked cells.
    """
    way = np.zeros((*cells.shape, 3), np.float32)
    marked = np.argwhere(cells)
    if len(marked) == 0:
        way[..., 2] = 1
        return way
    here = np.stack(np.meshgrid(*map(np.arange, cells.shape), indexing="ij"), -1).reshape(-1, 2)
    deltas = marked[None] - here[:, None]
    nearest = np.abs(deltas).sum(-1).argmin(1)
    way[..., :2] = deltas[np.arange(len(here)), nearest].reshape(*cells.shape, 2)
    way[..., 2] = np.abs(way[..., :2]).sum(-1)
    return np.clip(way / 8, -1, 1)


def _and_beside(cells):
    """Marked cells and their neighbours [..., H, W]; on the border nothing is marked."""
    more = cells.copy()
    more[..., 1:-1, 1:-1] |= cells[..., 2:, 1:-1] | cells[..., :-2, 1:-1] | cells[..., 1:-1, 2:] | cells[..., 1:-1, :-2]
    return more


def _log(amount):
    return np.log1p(amount) / 5


# ------------------------------------------------------------------------------------------------------
# Bidding and factory placement
# ------------------------------------------------------------------------------------------------------


def early_phase_action(obs, player, grow_lichen=False):
    """The order of `player` while factories are placed: a bid of 0, then its factories one by one.

    Args:
        obs: official observation with `real_env_steps` below 0.
        player: "player_0" or "player_1".
        grow_lichen: see `placement_score`.

    Returns:
        An official action; {} where it is the other player's turn.
    """
    turn = obs["real_env_steps"] + 2 * obs["board"]["factories_per_team"] + 1
    if turn == 0:
        return {"bid": 0, "faction": "AlphaStrike" if player == "player_0" else "MotherMars"}
    team = obs["teams"][player]
    if team["place_first"] != (turn % 2 == 1) or team["factories_to_place"] == 0:
        return {}
    score = placement_score(obs, grow_lichen)
    spawn = np.array(np.unravel_index(np.argmax(score), score.shape))
    share = team["factories_to_place"]  # water and metal are shared out evenly
    return {"spawn": spawn, "water": team["water"] // share, "metal": team["metal"] // share}


def placement_score(obs, grow_lichen=False):
    """How good each cell is as the centre of the next factory, from Gaussian filters over the board.

    Ice counts most, and most of all ice at the factory's edge, which a robot can mine without walking
    between loads; then ore nearby, and free ground where lichen can grow. The way from the edge to the nearest ice,
    rubble in the way and factories that would share the ice count against.

    Args:
        obs: an official observation of the placement phase.
        grow_lichen: whether rubble farther off, which would have to be cleared for lichen, counts against too.

    Returns:
        [H, W] float; -inf where the game forbids a factory.
    """
    board = obs["board"]
    factories = np.zeros(board["ice"].shape)
    for player in PLAYERS:
        for factory in obs["factories"][player].values():
            factories[tuple(factory["pos"])] = 1
    gap = np.abs(np.indices(factories.shape)[..., None] - np.argwhere(board["ice"]).T[:, None, None]) - 1
    way_to_ice = np.maximum(gap, 0).sum(0).min(-1, initial=6)
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


# ------------------------------------------------------------------------------------------------------
# A match of the engine
# ------------------------------------------------------------------------------------------------------

TEAM_METRICS = (
    *("r", "ice_transferred", "factories_alive", "ice_per_factory", "factories_alive_share", "factories_placed"),
    *("water", "ore", "metal", "lichen", "lights_built", "heavies_built", "robots_lost"),
    *("own_collisions", "right_of_way", "blocked_builds"),
)


class LuxMatch:
    """One match of the real engine, with rewards and metrics.

    Args:
        next_seed: function without arguments that returns the seed of the next match's map.
        encoder, index: a LuxEncoder, and the number of this match in it.
        min_factories: fewest factories per team.
        engine_options: more settings for the engine.
        reward_weights: a weight for each term in REWARDS.
    """

    def __init__(self, next_seed, encoder, index=0, min_factories=2, engine_options=None, reward_weights=REWARDS):
        self.next_seed, self.seed = next_seed, None
        self.encoder, self.index, self.teams = encoder, index, slice(2 * index, 2 * index + 2)
        self.weights = np.array([reward_weights[term] for term in TERM])
        self.engine = _engine_class()(
            map_size=self.encoder.map_size,
            MIN_FACTORIES=min_factories,
            MAX_FACTORIES=self.encoder.max_factories,
            verbose=0,
            **{"validate_action_space": False, **(engine_options or {})},
        )

    def reset(self, seed=None):
        """Start the next match, or the one of a map's seed, and play its bidding and placement phase."""
        self.seed = self.next_seed() if seed is None else seed
        obs = self.engine.reset(seed=self.seed)[0]["player_0"]
        while obs["real_env_steps"] < 0:
            actions = {player: early_phase_action(obs, player, self.encoder.grow_lichen) for player in PLAYERS}
            obs = self.engine.step(actions)[0]["player_0"]
        self.placed = np.array([len(obs["factories"][player]) for player in PLAYERS])
        self.totals = np.zeros((2, len(TERM)))
        self.built, self.lost = np.zeros((2, 2)), np.zeros(2)
        self.own_collisions, self.factory_steps, self.returns = np.zeros(2), np.zeros(2), np.zeros(2)
        self.lichen = np.zeros(obs["global_id"] + 1)
        self.encoder.reset(obs, self.index)

    def step(self, orders, rewards):
        """Play one step.

        Args:
            orders: of both players, as the encoder gives them.
            rewards: float32 array [P, E], written.

        Returns:
            None, or if the match is over a dict of its metrics: "l" (episode_length) a number, those named in
            TEAM_METRICS arrays [P].
        """
        state = self.engine.state
        before = self._snapshot()
        _, _, terminations, _, _ = self.engine.step(dict(zip(PLAYERS, orders)))
        amounts = self._achievements(before)
        np.matmul(amounts, self.weights, out=rewards, casting="same_kind")
        self.totals += amounts.sum(1)
        self.returns += rewards.sum(1)
        self.factory_steps += [len(state.factories[player]) for player in PLAYERS]
        return self._metrics(state) if terminations["player_0"] else None

    def render(self):
        """A picture by the engine's own renderer, [400, 400, 3] uint8."""
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draws in memory, needs no screen
        return self.engine.render()

    def _snapshot(self):
        """Robots and factories before the step, as engine objects, in the order of the encoder's tables."""
        state = self.engine.state
        self.engine.births.clear()
        robots = [unit for player in PLAYERS for unit in state.units[player].values()]
        factories = [factory for player in PLAYERS for factory in state.factories[player].values()]
        return robots, factories

    def _achievements(self, before):
        """Amount of each reward term for each entity in the step just played, float [P, E, len(TERM)]."""
        robots, factories = before
        state, encoder, board, teams = self.engine.state, self.encoder, self.engine.state.board, self.teams
        amounts = np.zeros((2, encoder.num_entities, len(TERM)))
        arrived = np.zeros((2, encoder.num_entities, 2), np.int64)  # ice and ore that each factory was brought

        def pay(term, who, amount):
            amounts[(*who, TERM[term])] = amount

        if robots:
            rows = slice(*np.searchsorted(encoder.robots.team, (teams.start, teams.stop)))
            team, slot, heavy, *cargo = (
                getattr(encoder.robots, name)[rows] for name in ("team", "slot", "heavy", "ice", "ore")
            )
            who = team - teams.start, slot
            # Digging is all that fills a cargo, delivering to an own factory all that empties it.
            got = _cargo(robots) - cargo
            dug, brought = np.maximum(got, 0), np.maximum(-got, 0)
            np.add.at(arrived, (who[0], encoder.deliver_to[rows]), brought.T)
            lost = np.array([unit.unit_id not in state.units[PLAYERS[unit.team_id]] for unit in robots])
            pay("ice_dug", who, dug[0])
            pay("ore_dug", who, dug[1])
            pay("ice_delivered", who, brought[0])
            pay("ore_delivered", who, brought[1])
            pay("robot_lost", who, lost * np.where(heavy, 1.0, 0.1))
            if encoder.grow_lichen:
                x, y = encoder.robots.x[rows], encoder.robots.y[rows]
                cleared = encoder.rubble[self.index, x + 1, y + 1] - board.rubble[x, y]
                pay("rubble_cleared", who, np.maximum(cleared, 0) * encoder.can_grow[rows])
        who = np.nonzero(encoder.alive[teams])
        ice, ore, strain = (getattr(encoder.factories, name)[teams][who] for name in ("ice", "ore", "strain"))
        refined = arrived[who].T + (ice, ore) - _cargo(factories)
        lichen = np.bincount(board.lichen_strains.ravel() + 1, board.lichen.ravel(), len(self.lichen) + 1)[1:]
        survived = np.array([f.unit_id in state.factories[PLAYERS[f.team_id]] for f in factories], bool)
        pay("water_made", who, refined[0] // ICE_PER_WATER)
        pay("metal_made", who, refined[1] // ORE_PER_METAL)
        pay("lichen_grown", who, (lichen - self.lichen)[strain])
        pay("survived", who, survived)
        pay("factory_lost", who, ~survived)
        self.lichen = lichen
        self._count_robots(robots)
        return amounts

    def _count_robots(self, robots):
        """Count births, losses, and losses on a cell where another own robot ended the step too."""
        births = self.engine.births
        everyone = robots + births
        dead = [unit for unit in everyone if unit.unit_id not in self.engine.state.units[PLAYERS[unit.team_id]]]
        for unit in births:
            self.built[unit.team_id, int(unit.is_heavy())] += 1
        cells = Counter((unit.team_id, unit.pos.x, unit.pos.y) for unit in everyone if dead)
        for unit in dead:
            self.lost[unit.team_id] += 1
            self.own_collisions[unit.team_id] += cells[unit.team_id, unit.pos.x, unit.pos.y] > 1

    def _metrics(self, state):
        """Metrics of the match that has just ended; everything is per team, the length is per match."""
        total = dict(zip(TERM, self.totals.T))
        owner = self.encoder.player_of_strain[self.index, state.board.lichen_strains]
        return {
            "l": state.real_env_steps,
            "r": self.returns,
            "ice_transferred": total["ice_delivered"],
            "factories_alive": self.factory_steps / GAME_LENGTH,
            "ice_per_factory": total["ice_delivered"] / self.placed,
            "factories_alive_share": self.factory_steps / GAME_LENGTH / self.placed,
            "factories_placed": self.placed,
            "water": total["water_made"],
            "ore": total["ore_delivered"],
            "metal": total["metal_made"],
            "lichen": np.array([state.board.lichen[owner == team].sum() for team in range(2)]),
            "lights_built": self.built[:, 0],
            "heavies_built": self.built[:, 1],
            "robots_lost": self.lost,
            "own_collisions": self.own_collisions,
            "right_of_way": self.encoder.right_of_way[self.teams].copy(),
            "blocked_builds": self.encoder.blocked_builds[self.teams].copy(),
        }


def write_gif(path, frames):
    """Write pictures [H, W, 3] uint8 as an animation."""
    from PIL import Image

    first, *others = [Image.fromarray(frame).quantize(64) for frame in frames]
    first.save(path, "GIF", save_all=True, append_images=others, duration=50, loop=0)


@functools.cache
def _engine_class():
    """The engine's class, with a list `births` of the robots built.

    Where luxai_s2_fast is installed, it does some slow parts of the engine faster; what is played is the same. Both are
    slow to import, and only processes that play need them.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # luxai_s2 imports pygame, which prints a banner
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


def read_engine(state):
    """What `read_observation(state.get_obs())` returns, without making that observation."""
    factories, robots = ({}, {}), ({}, {})
    for player, name in enumerate(PLAYERS):
        for unit_id, factory in state.factories[name].items():
            pos, power, cargo = factory.pos, factory.power, factory.cargo
            row = Factory(pos.x, pos.y, power, cargo.ice, cargo.ore, cargo.water, cargo.metal, factory.num_id)
            factories[player][unit_id] = row
        for unit_id, unit in state.units[name].items():
            pos, cargo, under_way = unit.pos, unit.cargo, STAY
            if unit.action_queue:
                order = unit.action_queue[0]
                under_way = DIG if order.act_type == "dig" else order.move_dir if order.act_type == "move" else STAY
            row = Robot(unit.is_heavy(), pos.x, pos.y, unit.power, cargo.ice, cargo.ore, under_way)
            robots[player][unit_id] = row
    board = state.board
    return Snapshot(state.real_env_steps, board.rubble, board.lichen, board.lichen_strains, factories, robots)


def _cargo(entities):
    """Ice and ore of engine objects, [2, len(entities)]."""
    return np.array([[entity.cargo.ice for entity in entities], [entity.cargo.ore for entity in entities]], np.int64)


# ------------------------------------------------------------------------------------------------------
# Many matches
# ------------------------------------------------------------------------------------------------------

OBSERVATION_KEYS = ("board", "features", "position", "kind", "group", "action_mask")

# Map seeds below this are held out for evaluation, those of training matches are above it.
HELD_OUT_SEEDS = 1_000_000

# Seconds that a worker may take for one step of one match, or to start, before it counts as hung; and how many
# matches' observations it makes in a second at the very least, since it says nothing while it makes them all.
WORKER_TIMEOUT, START_TIMEOUT, ENCODED_PER_SECOND = 8, 60, 100


class LuxError(ChildProcessError):
    """An option cannot work, the engine raised an exception, or a worker process died; the message says which."""


def default_workers():
    """A worker for each core that this process may use, where torchrun started several for its share of them; none
    for a single core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return cores if cores > 1 else 0


class LuxVecEnv(gym.vector.VectorEnv if gym else object):
    """N matches of Lux AI Season 2, two players each, both played by the caller.

    It follows Gymnasium's vector conventions, except that rewards are per entity: [N, P, E] float32.
    Terminations and truncations are per match, [N] bool. See the top of the file for the observations.

    Args:
        num_envs: N.
        num_workers: processes that share the matches; 0 plays them in this process, None takes the
            default_workers(). The number changes nothing in what is played.
        map_size, min_factories, max_factories: the stage; 48, 2 and 5 are season 2, 64, 4 and 10 NeurIPS.
        max_robots: robot slots per team.
        group_by, safe_masks: see LuxEncoder.
        reward: which of the REWARD_PRESETS is paid.
        reward_weights: dict of weights that differ from those, by term.
        held_out: play the maps kept for evaluation: match i starts with map `seed + i`.
        first_match: what the first match is counted as, for the seeds: where several processes each play a part
            of the matches, together they play what one would.
        render_mode: None or "rgb_array" (with num_workers 0).
        video: path of a GIF into which every fourth step of the first match is drawn, written when that match ends.
        engine_options: more settings for the engine, such as {"validate_action_space": True}.

    Raises:
        ValueError: if there is no such reward term.
        LuxError: if there is no such group_by or reward; from all methods that play, if the engine fails, a worker
            process dies, or one takes more than WORKER_TIMEOUT seconds for a step of one match.
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
        map_size=48,
        min_factories=2,
        max_factories=5,
        max_robots=6,
        group_by="entity",
        safe_masks=True,
        held_out=False,
        first_match=0,
        render_mode=None,
        engine_options=None,
        reward="ice",
        reward_weights=None,
        video=None,
    ):
        if gym is None:
            raise ModuleNotFoundError("LuxVecEnv needs Gymnasium: pip install gymnasium")
        import multiprocessing

        self.num_envs, self.render_mode = num_envs, render_mode
        reward_weights = weights_of(reward, reward_weights)
        encoder_options = {
            "map_size": map_size,
            "max_factories": max_factories,
            "max_robots": max_robots,
            "group_by": group_by,
            "safe_masks": safe_masks,
            "grow_lichen": reward_weights["rubble_cleared"] != 0,
        }
        blank = LuxEncoder(**encoder_options).arrays()
        entities = blank["kind"].shape
        high = {"board": 100, "features": np.inf, "position": map_size - 1, "kind": HEAVY, "group": entities[1] - 1}
        self.single_observation_space = gym.spaces.Dict(
            {
                key: gym.spaces.MultiBinary(array.shape)
                if array.dtype == bool
                else gym.spaces.Box(-high[key] if key == "features" else 0, high[key], array.shape, array.dtype)
                for key, array in blank.items()
            }
        )
        num_actions = np.full(entities, len(ROBOT_ACTIONS))
        num_actions[:, :max_factories] = len(FACTORY_ACTIONS)
        self.single_action_space = gym.spaces.MultiDiscrete(num_actions)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        # One block of memory per array, shared with the workers: nothing is pickled at a step.
        shapes = {key: ((num_envs, *array.shape), array.dtype) for key, array in blank.items()}
        shapes |= {
            "actions": ((num_envs, *entities), np.dtype(np.int64)),
            "rewards": ((num_envs, *entities), np.dtype(np.float32)),
            "terminated": ((num_envs,), np.dtype(bool)),
            "map_seed": ((num_envs,), np.dtype(np.int64)),
            "heartbeat": ((num_envs,), np.dtype(np.int64)),  # counts up when a match was stepped or begun
        }
        # Workers never touch torch or CUDA, so forking is safe where it is fast; elsewhere they are spawned.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        memory = {
            key: (context.RawArray("b", int(np.prod(shape)) * dtype.itemsize), shape, dtype)
            for key, (shape, dtype) in shapes.items()
        }
        self.arrays = {key: _view(*array) for key, array in memory.items()}
        self.workers, self.pipes, self.matches = [], [], None
        options = {
            "min_factories": min_factories,
            "held_out": held_out,
            "num_envs": num_envs,
            "first_match": first_match,
            "engine_options": engine_options,
            "reward_weights": reward_weights,
            "video": video,
            **encoder_options,
        }
        num_workers = min(num_envs, default_workers() if num_workers is None else num_workers)
        if num_workers == 0:
            self.matches = _Matches(0, self.arrays, options)
        else:
            atexit.register(self.close_extras)  # workers heed no signal
        bounds = np.linspace(0, num_envs, num_workers + 1).astype(int).tolist()
        self.shares = list(zip(bounds[:-1], bounds[1:]))
        for first, end in self.shares:
            here, there = context.Pipe()
            part = {key: (*array, slice(first, end)) for key, array in memory.items()}
            inherited = [*self.pipes, here] if context.get_start_method() == "fork" else []
            worker = context.Process(target=_work, args=(there, inherited, first, part, options), daemon=True)
            worker.start()
            there.close()
            self.workers.append(worker)
            self.pipes.append(here)

    def reset(self, *, seed=None, options=None):
        """Start a new match everywhere. Match i plays the same maps for the same seed whatever N is.

        Returns:
            Observations and an empty infos dict. The arrays are written again by the next `step`: copy
            what has to last.
        """
        seed = int(np.random.SeedSequence().entropy % 2**31) if seed is None else seed
        self._call("reset", seed)
        return self._observations(), {}

    def step(self, actions):
        """Play one step of every match.

        Args:
            actions: [N, P, E] ints.

        Returns:
            observations, rewards [N, P, E], terminations [N], truncations [N], infos. The first two are
            written again by the next step. Where matches ended, `infos["episode"]` holds "l" [N] and the
            TEAM_METRICS [N, P], and `infos["_episode"]` [N] says which of them ended.

        Raises:
            ValueError: if there is no such action for an entity; nothing is played then.
        """
        live, number = self.arrays["kind"] > NOBODY, self.single_action_space.nvec
        actions = np.broadcast_to(actions, live.shape)
        if (wrong := live & ((actions < 0) | (actions >= number))).any():
            where = tuple(np.argwhere(wrong)[0].tolist())
            name = "match {}, player_{}, slot {}".format(*where)
            raise ValueError(f"{name}: there is no action {actions[where]}, only 0 to {number[where[1:]] - 1}")
        self.arrays["actions"][:] = np.where(live, actions, 0)
        finished = self._call("step", None)
        infos = {}
        if finished:
            indices = [index for index, _ in finished]
            infos["_episode"] = np.zeros(self.num_envs, bool)
            infos["_episode"][indices] = True
            infos["episode"] = {"l": np.zeros(self.num_envs, np.int64)}
            infos["episode"] |= {key: np.zeros((self.num_envs, len(PLAYERS))) for key in TEAM_METRICS}
            for index, metrics in finished:
                for key, value in metrics.items():
                    infos["episode"][key][index] = value
        terminated = self.arrays["terminated"].copy()
        return self._observations(), self.arrays["rewards"], terminated, np.zeros_like(terminated), infos

    def state(self):
        """All that the matches are made of: a list with a dict for each match, to be given to `load_state`.

        Returns:
            list of N dicts: "seed" that of `reset`; "played" matches in this place so far, with the one under way;
            "actions" int8 [t, P, E] given since that one began. Lists of several processes (see `first_match`) can
            be joined, and shared out again over any number of processes.
        """
        return self._call("state", None)

    def load_state(self, state):
        """Play the matches up to where they were at `state()`; what follows is bit for bit what followed there.

        Args:
            state: the list, from an environment with the same options; the number of workers may differ.

        Returns:
            Observations as of then, and an empty infos dict, as `reset` does.

        Raises:
            ValueError: if it cannot be the state of such an environment.
        """
        number = self.single_action_space.nvec

        def fits(match):
            given, seed, played = match["actions"], match["seed"], match["played"]
            return (
                (given.dtype == np.int8 and given.shape[1:] == number.shape and len(given) < GAME_LENGTH)
                and ((0 <= given) & (given < number)).all()
                and (np.size(seed) == np.size(played) == 1 and seed >= 0 and played >= 1)
            )

        if len(state) != self.num_envs or not all(map(fits, state)):
            raise ValueError("the state of the matches is that of another environment")
        self._call("load_state", state)
        return self._observations(), {}

    def render(self):
        """Pictures of the matches by the engine's own renderer, a tuple of N arrays [400, 400, 3] uint8."""
        if self.render_mode != "rgb_array" or self.matches is None:
            raise ValueError('rendering needs LuxVecEnv(..., num_workers=0, render_mode="rgb_array")')
        return tuple(match.render() for match in self.matches.matches)

    def _observations(self):
        return {key: self.arrays[key] for key in OBSERVATION_KEYS}

    def _call(self, command, argument):
        """Let every worker obey; the lists that they return, joined in the order of the matches."""
        if self.matches is not None:
            return getattr(self.matches, command)(argument)
        from multiprocessing import connection

        results = []
        try:
            for pipe, (first, end) in zip(self.pipes, self.shares):
                pipe.send((command, argument))
            for pipe, worker, (first, end) in zip(self.pipes, self.workers, self.shares):
                beats, waited = self.arrays["heartbeat"][first:end], 0
                before = beats.sum()
                # Wakes up when the worker answers and also when it dies. Short waits, as time passes in Ctrl-Z too.
                while not connection.wait([pipe, worker.sentinel], 1):
                    waited = waited + 1 if beats.sum() == before else 0
                    before = beats.sum()
                    patience = WORKER_TIMEOUT if before else START_TIMEOUT
                    if waited >= patience + (end - first) // ENCODED_PER_SECOND:
                        worker.kill()  # it would not end otherwise
                        raise TimeoutError
                if not pipe.poll():
                    raise EOFError
                done, result = pipe.recv()
                if not done:
                    raise LuxError(result)
                results += result
        except (EOFError, ConnectionError, TimeoutError) as error:
            seeds = ", ".join(map(str, self.arrays["map_seed"][first:end][:3]))
            seeds += f" and {end - first - 3} more" if end - first > 3 else ""
            what = f"did nothing for {waited} s" if isinstance(error, TimeoutError) else "died"
            raise LuxError(f"the worker process of matches {first} to {end - 1} (map seeds {seeds}) {what}") from None
        return results

    def close_extras(self, **kwargs):
        """End the worker processes."""
        atexit.unregister(self.close_extras)
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for worker in self.workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
                worker.join()
        self.workers, self.pipes = [], []


class _Matches:
    """Matches `first` to `first + len(out)`, stepped one after the other in this process."""

    def __init__(self, first, arrays, options):
        self.first, self.arrays = first, arrays
        self.held_out, self.num_envs = options.pop("held_out"), options.pop("num_envs")
        self.number = options.pop("first_match") + first  # what the first match here is counted as, for the seeds
        of_match = {key: options.pop(key) for key in ("min_factories", "engine_options", "reward_weights")}
        video = options.pop("video")
        self.video, self.frames = video if first == 0 else None, []
        num_matches = len(arrays["terminated"])
        # With its seed, the actions given since a match began are all of its state.
        self.given = np.zeros((num_matches, GAME_LENGTH, *arrays["actions"].shape[1:]), np.int8)
        self.encoder = LuxEncoder(num_matches=num_matches, **options)
        self.out = {key: arrays[key].reshape(-1, *arrays[key].shape[2:]) for key in OBSERVATION_KEYS}  # by team
        self.matches = [
            LuxMatch(functools.partial(self._next_seed, index), self.encoder, index, **of_match)
            for index in range(num_matches)
        ]

    def _held_out_seed(self, index):
        return (self.seed + self.number + index + (self.played[index] - 1) * self.num_envs) % HELD_OUT_SEEDS

    def _training_seed(self, index):
        return int(self.rngs[index].integers(HELD_OUT_SEEDS, 2**31))

    def _next_seed(self, index):
        self.played[index] += 1
        return self._held_out_seed(index) if self.held_out else self._training_seed(index)

    def _seed(self, seed):
        self.seed, self.played = seed, [0] * len(self.matches)
        self.rngs = [np.random.default_rng([seed, self.number + index]) for index in range(len(self.matches))]

    def reset(self, seed):
        self._seed(seed)
        return self._each(lambda index, match: match.reset())

    def state(self, _):
        """For each match the seed of `reset`, how many have been played in its place, and its actions so far."""
        ages = [match.engine.state.real_env_steps for match in self.matches]
        return [
            {"seed": self.seed, "played": played, "actions": given[:age].copy()}
            for played, given, age in zip(self.played, self.given, ages)
        ]

    def load_state(self, states):
        """Play all matches up to where they were.

        The encoder takes one observation of every match at a time, and what it remembers (slots, the lichen of the step
        before, counters) is right only if each came once. So all matches must arrive at the same time, and those that
        are younger wait at their start instead: the steps left are counted down, and a match begins when they are as
        many as it has actions. What the encoder has made of it while it waited is forgotten then.
        """
        states = states[self.first : self.first + len(self.matches)]
        self._seed(int(states[0]["seed"]))
        seeds = [[match.next_seed() for _ in range(state["played"])][-1] for match, state in zip(self.matches, states)]
        for given, state in zip(self.given, states):
            given[: len(state["actions"])] = state["actions"]
        ages = np.array([len(state["actions"]) for state in states])
        rewards = np.zeros_like(self.arrays["rewards"][0])
        self._each(lambda index, match: match.reset(seeds[index]))
        for left in range(ages.max(), 0, -1):
            actions = self.given[np.arange(len(ages)), np.maximum(ages - left, 0)]
            orders = self.encoder.orders(actions.reshape(-1, actions.shape[-1]))

            def play(index, match):
                if ages[index] >= left:
                    match.step(orders[match.teams], rewards)
                elif ages[index] == left - 1:  # it begins with the next step
                    self.encoder.reset(match.engine.state.get_obs(), index)

            self._each(play)
        return []

    def step(self, _):
        actions = self.arrays["actions"]
        orders = self.encoder.orders(actions.reshape(-1, actions.shape[-1]))

        def play(index, match):
            time = match.engine.state.real_env_steps
            self.given[index, time] = actions[index]
            if index == 0 and self.video and time % 4 == 0:
                self.frames.append(match.render())
            metrics = match.step(orders[match.teams], self.arrays["rewards"][index])
            self.arrays["terminated"][index] = metrics is not None
            if metrics is not None:
                if index == 0 and self.video:
                    write_gif(self.video, self.frames)
                    self.video = None  # the matches that come after it are not drawn
                match.reset()
            return metrics

        return self._each(play)

    def _each(self, play):
        """Play, then encode; list of (match index, what `play` returned) for those where that was something."""
        results = []
        for index, match in enumerate(self.matches):
            try:
                result = play(index, match)
            except Exception as error:
                name = f"match {self.first + index} (map seed {match.seed})"
                raise LuxError(f"{name} failed in the engine: {type(error).__name__}: {error}") from error
            self.arrays["map_seed"][index] = match.seed
            self.arrays["heartbeat"][index] += 1
            if result is not None:
                results.append((self.first + index, result))
        self.encoder.encode_rows([read_engine(match.engine.state) for match in self.matches], self.out)
        return results


def _work(pipe, inherited, first, arrays, options):
    """A worker process: obey (name of a method, argument) until it gets None or the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all; when to end is the parent's affair
        signal.signal(number, signal.SIG_IGN)
    for other in inherited:  # while a copy of the parent's end is open here, its death would go unnoticed
        other.close()
    arrays = {key: _view(*array) for key, array in arrays.items()}
    matches = _Matches(first, arrays, options)
    gc.collect()
    gc.freeze()  # what is there now stays: collecting garbage need not look at it again and again
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            message = pipe.recv()
            if message is None:
                break
            command, argument = message
            try:
                answer = True, getattr(matches, command)(argument)
            except LuxError as error:
                answer = False, str(error)
            except Exception as error:
                traceback.print_exc()
                name = f"the worker process of matches {first} to {first + len(matches.matches) - 1}"
                answer = False, f"{name} failed: {type(error).__name__}: {error}"
            pipe.send(answer)


def _view(memory, shape, dtype, part=slice(None)):
    return np.frombuffer(memory, dtype).reshape(shape)[part]
