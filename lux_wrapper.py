"""The Lux AI Season 2 game (luxai-s2) as a vector environment with one reward per entity.

This is the only file that knows Lux. It has three parts, each usable without the next:

    early_phase_action   bidding and factory placement from an official observation
    LuxEncoder           official observation -> arrays and masks, actions -> official orders
    LuxVecEnv            N matches of two players each, stepped together (Gymnasium's vector conventions)

Axis letters: N matches, P = 2 players, E entity slots, A actions, C channels, F features, H and W the
board (x and y of the engine, in this order).

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

**Rewards** [N, P, E]: what the entity itself achieved in this step, the sum of these terms:

    term             paid to   for                                                   weight (REWARDS)
    ice_dug          robot     a unit of ice taken from the ground into the cargo    0.004
    ore_dug          robot     a unit of ore taken from the ground into the cargo    0.0004
    ice_delivered    robot     a unit of ice that reached a factory of the team      0.004
    ore_delivered    robot     a unit of ore that reached a factory of the team      0.0008
    robot_lost       robot     being destroyed (times 0.1 for a light robot)         -0.05
    water_made       factory   a unit of water refined from ice (4 ice)              0.004
    metal_made       factory   a unit of metal refined from ore (5 ore)              0.004
    lichen_grown     factory   a unit of lichen more (less: minus) on its own strain 0.0001
    survived         factory   a step that ends with the factory alive               0.001
    factory_lost     factory   running out of water                                  -0.2

A match ends after 1000 steps or when a player has lost its last factory; both are terminations (the game
is over, nothing is cut short), so nothing is ever truncated. `step` then returns the first observation of
the next match (Gymnasium's SAME_STEP autoreset) and the finished match's metrics in `infos["episode"]`.
"""

import atexit
import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import sys
from collections import Counter
from multiprocessing import connection

import gymnasium as gym
import numpy as np

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # luxai_s2 imports pygame, which prints a banner

PLAYERS = ("player_0", "player_1")
NOBODY, FACTORY, LIGHT, HEAVY = range(4)

# The engine's directions: 0 here, 1 up (y - 1), 2 right (x + 1), 3 down (y + 1), 4 left (x - 1).
DX, DY = np.array([0, 0, 1, 0, -1]), np.array([0, -1, 0, 1, 0])
ROBOT_ACTIONS = ("stay", "move_up", "move_right", "move_down", "move_left", "dig", "deliver", "pick_up_power")
STAY, DIG, DELIVER, PICK_UP = 0, 5, 6, 7
FACTORY_ACTIONS = ("nothing", "build_light", "build_heavy", "water_lichen")
NOTHING, BUILD_LIGHT, BUILD_HEAVY, WATER = range(4)
NUM_ACTIONS = len(ROBOT_ACTIONS)

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
COLUMN = {name: column for column, name in enumerate(FEATURES)}
GROUND = FEATURES[COLUMN["ice_dx"] : COLUMN["on_ore"] + 1]  # what LuxEncoder looks up by cell, in one piece

REWARDS = {
    "ice_dug": 0.004,
    "ore_dug": 0.0004,
    "ice_delivered": 0.004,
    "ore_delivered": 0.0008,
    "robot_lost": -0.05,
    "water_made": 0.004,
    "metal_made": 0.004,
    "lichen_grown": 0.0001,
    "survived": 0.001,
    "factory_lost": -0.2,
}

# Game constants (luxai_s2.config.EnvConfig, the same in every match). Index 0 light, 1 heavy.
GAME_LENGTH, CYCLE, DAY = 1000, 50, 30
METAL_COST, POWER_COST = np.array([10, 100]), np.array([50, 500])
CARGO, BATTERY = np.array([100, 1000]), np.array([150, 3000])
HOLDS = np.stack([BATTERY, CARGO, CARGO], 1)  # of power, ice and ore
MOVE_COST, RUBBLE_COST = np.array([1, 20]), np.array([0.05, 1.0])
DIG_COST, ORDER_COST = np.array([5, 60]), np.array([1, 10])
MOVE_COST_ONTO = np.floor(MOVE_COST[:, None] + RUBBLE_COST[:, None] * np.arange(101)).astype(int)  # [kind, rubble]
WORST_MOVE = MOVE_COST_ONTO[:, 100]
ICE_PER_WATER, ORE_PER_METAL, GROWTH_PER_WATER = 4, 5, 10
WATER_RESERVE = 200  # steps that a factory must be able to live on after watering lichen

# Map seeds below this are held out for evaluation, those of training matches are above it.
HELD_OUT_SEEDS = 1_000_000

# Seconds that a worker may take for one step of one match, or to start, before it counts as hung.
WORKER_TIMEOUT, START_TIMEOUT = 8, 60

# ------------------------------------------------------------------------------------------------------
# Bidding and factory placement
# ------------------------------------------------------------------------------------------------------


def gaussian_filter(board, sigma):
    """Sum of `board` [H, W] weighted by exp(-distance^2 / (2 sigma^2)) around every cell, [H, W] float."""
    kernels = []
    for size in board.shape:
        cells = np.arange(size)
        kernels.append(np.exp(-((cells[:, None] - cells) ** 2) / (2 * sigma**2)))
    return kernels[0] @ board @ kernels[1]


def placement_score(obs):
    """How good each cell is as the centre of the next factory, from Gaussian filters over the board.

    Ice counts most, and most of all ice at the factory's edge, which a robot can mine without walking
    between loads; then ore nearby, and free ground where lichen can grow. Rubble in the way and factories
    that would share the ice count against.

    Args:
        obs: an official observation of the placement phase.

    Returns:
        [H, W] float; -inf where the game forbids a factory.
    """
    board = obs["board"]
    factories = np.zeros(board["ice"].shape)
    for player in PLAYERS:
        for factory in obs["factories"][player].values():
            factories[tuple(factory["pos"])] = 1
    free = (board["rubble"] == 0) & (board["ice"] == 0) & (board["ore"] == 0)
    score = (
        4.0 * np.minimum(gaussian_filter(board["ice"], 1.2), 0.6)
        + 0.5 * np.minimum(gaussian_filter(board["ice"], 4.0), 3.0)
        + 0.1 * np.minimum(gaussian_filter(board["ore"], 4.0), 3.0)
        + 0.004 * gaussian_filter(free, 3.0)
        - 0.0004 * gaussian_filter(board["rubble"], 2.0)
        - 0.3 * gaussian_filter(factories, 4.0)
    )
    return np.where(board["valid_spawns_mask"], score, -np.inf)


def early_phase_action(obs, player):
    """The order of `player` while factories are placed: a bid of 0, then its factories one by one.

    Args:
        obs: official observation with `real_env_steps` below 0.
        player: "player_0" or "player_1".

    Returns:
        An official action; {} where it is the other player's turn.
    """
    turn = obs["real_env_steps"] + 2 * obs["board"]["factories_per_team"] + 1
    if turn == 0:
        return {"bid": 0, "faction": "AlphaStrike" if player == "player_0" else "MotherMars"}
    team = obs["teams"][player]
    if team["place_first"] != (turn % 2 == 1) or team["factories_to_place"] == 0:
        return {}
    score = placement_score(obs)
    spawn = np.array(np.unravel_index(np.argmax(score), score.shape))
    share = team["factories_to_place"]  # water and metal are shared out evenly
    return {"spawn": spawn, "water": team["water"] // share, "metal": team["metal"] // share}


# ------------------------------------------------------------------------------------------------------
# Official observations to arrays, actions to official orders
# ------------------------------------------------------------------------------------------------------


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


# Maps of truth values as integers, a bit for each cell: one operation on such a number costs less than a
# tenth of one on an array. A column of zeros follows each row, where shifts past the edge end up.


def as_bits(maps):
    """A list of integers from a sequence of square bool arrays."""
    size = len(maps[0])
    cells = np.zeros((len(maps), size, size + 1), bool)
    for row, cells_of_map in zip(cells, maps):
        row[:, :-1] = cells_of_map
    packed = np.packbits(cells.reshape(len(maps), -1), 1, "little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def neighbours(bits, size):
    """The cells beside those of `bits`; beyond the board's edge too, so let the map of what can be follow."""
    return bits << 1 | bits >> 1 | bits << size + 1 | bits >> size + 1


def cells_of(bits, size):
    """Set of the (x, y) in `bits`."""
    cells = np.frombuffer(bits.to_bytes(size * (size + 1) // 8 + 1, "little"), np.uint8)
    x, y = np.divmod(np.flatnonzero(np.unpackbits(cells, bitorder="little")), size + 1)
    return frozenset(zip(x.tolist(), y.tolist()))


def _log(amount):
    return np.log1p(amount) / 5


def read_observation(obs):
    """What LuxEncoder needs of an official observation.

    Returns:
        time, rubble, lichen, lichen_strains, and per team two dicts of rows of integers, unit_id ->
        (x, y, power, ice, ore, water, metal, strain) of the factories and unit_id ->
        (heavy, x, y, power, ice, ore, action of the order under way) of the robots.
    """
    factories, robots = [{}, {}], [{}, {}]
    for team, player in enumerate(PLAYERS):
        for unit_id, factory in obs["factories"][player].items():
            cargo = factory["cargo"]
            stock = factory["power"], cargo["ice"], cargo["ore"], cargo["water"], cargo["metal"]
            factories[team][unit_id] = *factory["pos"].tolist(), *stock, factory["strain_id"]
        for unit_id, unit in obs["units"][player].items():
            cargo, queue, under_way = unit["cargo"], unit["action_queue"], STAY
            if len(queue):
                under_way = DIG if queue[0][0] == 3 else int(queue[0][1])  # only digs and moves outlast a step
            stock = unit["power"], cargo["ice"], cargo["ore"]
            robots[team][unit_id] = unit["unit_type"] == "HEAVY", *unit["pos"].tolist(), *stock, under_way
    board = obs["board"]
    return obs["real_env_steps"], board["rubble"], board["lichen"], board["lichen_strains"], factories, robots


class LuxEncoder:
    """Both players' views of a match: slots, features and masks in, official orders out.

    It reads nothing but official observations (lists made arrays), so that it serves in the official runner too.
    Call `reset` with the first observation after placement, then `encode` with that and every later observation
    in turn, and `orders` after any of them.

    Several matches that are played side by side cost much less in one encoder than in several: `reset` each and
    give their rows to `encode_rows`. Teams are numbered 2 * match + player, which makes team ^ 1 the opponent;
    below, T stands for their number.

    Args:
        map_size: side of the board in cells.
        max_factories, max_robots: slots per team.
        group_by: "entity", a trajectory for each; or "cluster", a trajectory for each factory with the
            robots it built (when it dies they join the nearest factory).
        safe_masks: also mask orders that are legal and plainly ruinous:
            1. stepping onto a cell where an own robot stands (both would be destroyed),
            2. stepping onto the centre of an own factory (robots appear there),
            3. building while an own robot stands there, and building a light robot from the metal that the
               factory's first heavy one needs, or into the last slots while other factories have yet to build theirs,
            4. digging where nothing is gained: bare ground, own lichen, rubble that covers neither ice nor ore,
               ice and ore with full cargo,
            5. digging, or stepping away from home, with less power left than the way back to the nearest own
               factory, were there no rubble on it, and an order there cost (a robot without power stands where it
               is until the sun shines),
            6. picking up less power than ten times what the order itself costs,
            7. watering lichen if the water left would not last WATER_RESERVE steps, or to the end.
            And where two own robots are told to step onto one cell, the first goes and the others wait.
        num_matches: how many matches.
    """

    def __init__(self, map_size=48, max_factories=5, max_robots=20, group_by="entity", safe_masks=True, num_matches=1):
        self.map_size, self.max_factories, self.max_robots = map_size, max_factories, max_robots
        self.num_entities = max_factories + max_robots
        self.by_cluster, self.safe_masks = group_by == "cluster", safe_masks
        (self.all_cells,) = as_bits(np.ones((1, map_size, map_size), bool))
        self.side = map_size + 2  # of maps with a border of 1 cell
        self.beside = DX[:, None] * self.side + DY[:, None]  # from a cell to itself and its neighbours, in such maps

        M, T, E, side = num_matches, 2 * num_matches, self.num_entities, self.side
        self.teams, self.opponent = np.arange(T)[:, None], np.arange(T) ^ 1
        self.ice, self.ore = np.zeros((2, M, map_size, map_size), bool)
        # For each team and cell the features that depend on nothing but the cell and the factories alive.
        self.ground = np.zeros((T, map_size, map_size, len(GROUND)), np.float32)
        self.rubble = np.zeros((M, side, side), np.int64)
        self.strains = np.zeros((M, map_size, map_size), np.int16)  # those of the step before, until they are read
        self.player_of_strain = np.zeros((M, 2 * max_factories + 1), np.int8)  # the last serves strain -1, no lichen
        self.lichen_seen = np.zeros(M, bool)  # so the board's channels are not empty
        self.lichen_counted = [None] * M  # the lichen that these are right for:
        self.water_costs = np.zeros((M, 2 * max_factories + 1), np.int64)
        self.new = np.zeros(M, bool)  # matches of which no observation has been seen
        self.drawn = np.zeros((T, max_factories), bool)  # the factories that these show:
        self.factory_map = np.zeros((T, side, side), np.int64)  # slot + 1, with a border of 1 cell
        self.centre_map, self.closed = np.zeros((2, T, side, side), bool)  # closed: where a team may not go
        self.nearest = np.zeros((T, map_size, map_size), np.int64)  # slot of the team's nearest factory
        self.steps_home = np.zeros((5, T, map_size, map_size), np.int64)  # from a cell and its neighbours to its edge
        self.factory_slot, self.robot_slot = ([{} for _ in range(T)] for _ in range(2))  # unit_id -> slot
        self.home = np.zeros((T, E), np.int64)  # slot of the factory an entity belongs to
        self.blocked_builds = np.zeros(T, np.int64)  # factory steps in which only the slots forbade to build
        self.right_of_way = np.zeros(T, np.int64)  # moves held back because an own robot had the same goal

    def arrays(self):
        """A dict of zeroed arrays [T, ...] with the keys, shapes and types of the table at the top."""
        T, E, S = len(self.teams), self.num_entities, self.map_size
        return {
            "board": np.zeros((T, S, S, len(BOARD_CHANNELS)), np.uint8),
            "features": np.zeros((T, E, len(FEATURES)), np.float32),
            "position": np.zeros((T, E, 2), np.int64),
            "kind": np.zeros((T, E), np.int64),
            "group": np.zeros((T, E), np.int64),
            "action_mask": np.zeros((T, E, NUM_ACTIONS), bool),
        }

    def reset(self, obs, match=0):
        """Forget the last match; `obs` is the first observation after placement, before any robot."""
        teams = slice(2 * match, 2 * match + 2)
        self.ice[match], self.ore[match] = ice, ore = obs["board"]["ice"] > 0, obs["board"]["ore"] > 0
        self.ground[teams, ..., :3], self.ground[teams, ..., 3:6] = _way_to_nearest(ice), _way_to_nearest(ore)
        self.ground[teams, ..., -2], self.ground[teams, ..., -1] = ice, ore
        self.strains[match] = obs["board"]["lichen_strains"]
        self.player_of_strain[match] = -1
        self.lichen_seen[match], self.lichen_counted[match], self.new[match] = True, None, True
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
        """As `encode`, of a list of what `read_observation` returns, or `read_engine`, which is the same."""
        times, rubble, lichen, strains, factories, robots = zip(*matches)
        self.time = np.array(times)
        self.lichen = np.stack(lichen).astype(np.uint8)  # small types make the operations below faster
        self.strains_before, self.strains = self.strains, np.stack(strains).astype(np.int16)
        self._read_factories([team for match in factories for team in match])
        self._read_robots([team for match in robots for team in match])
        changed = (self.drawn != self.alive).any(1)
        for match in np.flatnonzero(self.new | changed[::2] | changed[1::2]).tolist():
            self._draw_factories(match, out)
        self._draw_board(np.stack(rubble), out)
        for key in ("features", "position", "kind", "action_mask"):
            out[key][:] = 0
        self._encode_factories(out)
        if len(self.robots):
            self._encode_robots(out)
        # The last five columns are the same for everybody.
        alive, time = self.alive.sum(1) / 5, self.time.repeat(2)
        clock = time % CYCLE
        match = np.stack([alive, alive[self.opponent], clock < DAY, clock / CYCLE, time / GAME_LENGTH], -1)
        out["features"][..., COLUMN["own_factories"] :] = match[:, None]
        out["features"][out["kind"] == NOBODY] = 0
        out["group"][:] = self.home if self.by_cluster else np.arange(self.num_entities)

    def _read_factories(self, factories):
        """Cells, stocks and strains of the factories by slot."""
        self.alive = np.zeros((len(self.teams), self.max_factories), bool)
        table = np.zeros((len(self.teams), self.max_factories, 8), np.int64)
        for team, rows in enumerate(factories):
            slots = [self.factory_slot[team][unit_id] for unit_id in rows]
            self.alive[team, slots] = True
            table[team, slots] = np.array(list(rows.values())).reshape(-1, 8)  # a team that has lost may have none
        self.factory_pos, self.stock = table[..., :2], table[..., 2:7]  # power, ice, ore, water, metal
        self.strain_of = table[..., 7]

    def _read_robots(self, robots):
        """Table of the robots [R, 9]: team, slot, heavy, x, y, power, ice, ore, action of the order under way."""
        table = []
        for team, rows in enumerate(robots):
            slots = self.robot_slot[team]
            if rows.keys() != slots.keys():
                # A slot seen occupied in the last observation stays empty in this one.
                free = iter(sorted(set(range(self.max_factories, self.num_entities)) - set(slots.values())))
                self.robot_slot[team] = slots = {
                    unit_id: slots[unit_id] if unit_id in slots else self._birth(team, row[1:3], next(free))
                    for unit_id, row in rows.items()
                }
            table += [(team, slots[unit_id], *row) for unit_id, row in rows.items()]
        self.robots = np.array(table, np.int64).reshape(-1, 9)

    def _birth(self, team, pos, slot):
        """Give `slot` to a new robot, which belongs to the factory in whose centre it appears."""
        distance = np.abs(self.factory_pos[team] - pos).sum(-1)
        self.home[team, slot] = np.where(self.alive[team], distance, 10**6).argmin()
        return slot

    def _draw_factories(self, match, out):
        """Draw a match's factories alive and the ways to them; robots of one that is gone join the nearest."""
        size, teams = self.map_size, slice(2 * match, 2 * match + 2)
        alive, board, own = self.alive[teams], out["board"][teams], self.factory_map[teams]
        own[:], self.centre_map[teams] = 0, False
        for player, slot in np.argwhere(alive):
            x, y = self.factory_pos[2 * match + player, slot]
            own[player, x : x + 3, y : y + 3] = slot + 1
            self.centre_map[2 * match + player, x + 1, y + 1] = True
        closed = self.closed[teams]
        closed[:] = own[::-1] > 0  # the opponent's factories, and the border
        closed[:, [0, -1]] = closed[:, :, [0, -1]] = True
        for team, slot, _, x, y, *_ in self.robots[self.robots[:, 0] // 2 == match]:
            if not self.alive[team, self.home[team, slot]]:
                self._birth(team, (x, y), slot)
        drawn = own[:, 1:-1, 1:-1] > 0
        board[..., BOARD_CHANNELS.index("own_factory")] = drawn * 100
        board[..., BOARD_CHANNELS.index("opponent_factory")] = drawn[::-1] * 100
        if self.new[match]:
            board[..., BOARD_CHANNELS.index("inside")] = 100
            board[..., BOARD_CHANNELS.index("ice")] = self.ice[match] * 100
            board[..., BOARD_CHANNELS.index("ore")] = self.ore[match] * 100
        self.drawn[teams], self.new[match] = alive, False

        cells = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1)
        to_factory = self.factory_pos[teams, :, None, None] - cells
        distance = np.where(alive[..., None, None], np.abs(to_factory).sum(-1), 10**6)
        self.nearest[teams] = nearest = distance.argmin(1)
        way = np.take_along_axis(to_factory, nearest[:, None, ..., None], 1)
        home = GROUND.index("home_dx")
        self.ground[teams, ..., home : home + 2] = np.clip(way[:, 0] / 8, -1, 1)
        self.ground[teams, ..., home + 2] = np.clip(distance.min(1) / 8, 0, 1)
        gap = np.abs(way - np.stack([DX, DY], -1)[:, None, None]) - 1
        self.steps_home[:, teams] = np.maximum(gap, 0).sum(-1).swapaxes(0, 1)

    def _draw_board(self, rubble, out):
        """The channels that change at every step: rubble, lichen and robots."""
        maps = out["board"]
        self.rubble[:, 1:-1, 1:-1] = rubble
        maps[..., BOARD_CHANNELS.index("rubble")] = rubble.astype(np.uint8).repeat(2, 0)
        seen = self.lichen.any((1, 2))
        for match in np.flatnonzero(seen | self.lichen_seen).tolist():
            owner = self.player_of_strain[match].take(self.strains[match])
            for player in range(2):
                team, lichen = 2 * match + player, self.lichen[match] * (owner == player)
                maps[team, ..., BOARD_CHANNELS.index("own_lichen")] = lichen
                maps[team ^ 1, ..., BOARD_CHANNELS.index("opponent_lichen")] = lichen
        self.lichen_seen = seen
        team, _, heavy, x, y = self.robots.T[:5]
        own, opponent = BOARD_CHANNELS.index("own_light"), BOARD_CHANNELS.index("opponent_light")
        maps[..., own:] = 0
        maps[team, x, y, own + heavy] = 100
        maps[team ^ 1, x, y, opponent + heavy] = 100

    def _encode_factories(self, out):
        """Features and masks of the factories."""
        alive, pos, width, teams = self.alive, self.factory_pos, self.max_factories, self.teams
        x, y = pos[..., 0], pos[..., 1]
        features = out["features"][:, :width]
        out["kind"][:, :width] = np.where(alive, FACTORY, NOBODY)
        out["position"][:, :width] = pos
        features[..., COLUMN["is_factory"]] = 1
        features[..., COLUMN["power"] : COLUMN["ore"] + 1] = np.minimum(self.stock[..., :3] / 1000, 3)
        features[..., COLUMN["water"] : COLUMN["metal"] + 1] = _log(self.stock[..., 3:])
        features[..., COLUMN["ice_dx"] : COLUMN["ore_distance"] + 1] = self.ground[teams, x, y, :6]
        features[..., COLUMN["home_water"]] = features[..., COLUMN["water"]]
        features[..., COLUMN["home_power"]] = features[..., COLUMN["power"]]
        team, slot, heavy, robot_x, robot_y = self.robots.T[:5]
        group = (team * self.num_entities + self.home[team, slot]) * 2 + heavy
        built = np.bincount(group, minlength=len(teams) * self.num_entities * 2)
        built = built.reshape(len(teams), -1, 2)[:, :width]
        features[..., COLUMN["group_lights"] : COLUMN["group_heavies"] + 1] = built / (10, 5)
        self.robot_map = np.zeros((len(teams), self.side, self.side), bool)
        self.robot_map[team, robot_x + 1, robot_y + 1] = True
        taken = self.robot_map[teams, x + 1, y + 1]
        features[..., COLUMN["centre_taken"]] = taken

        mask, has_heavy = out["action_mask"][:, :width], built[..., 1] > 0
        can_build = (self.stock[..., 4:] >= METAL_COST) & (self.stock[..., :1] >= POWER_COST)
        free = self.max_robots - np.bincount(team, minlength=len(teams))
        has_slot = alive.cumsum(1) <= free[:, None]  # enough slots even if every factory before it builds
        self.blocked_builds += (can_build.any(-1) & alive & ~has_slot).sum(1)
        may_build = alive & has_slot
        if self.safe_masks:
            may_build &= ~taken
            can_build[..., 0] &= has_heavy | (self.stock[..., 4] >= METAL_COST.sum())
            waiting = (~has_heavy & alive & can_build[..., 1]).sum(1)
            can_build[..., 0] &= alive.cumsum(1) <= (free - waiting)[:, None]
        mask[..., NOTHING] = alive
        mask[..., BUILD_LIGHT : BUILD_HEAVY + 1] = can_build & may_build[..., None]
        reserve = np.minimum(WATER_RESERVE, GAME_LENGTH - self.time).repeat(2)[:, None] if self.safe_masks else 0
        water, cost = self.stock[..., 3], self._water_costs()[teams // 2, self.strain_of]
        mask[..., WATER] = alive & (water > reserve) & (water - cost >= reserve)

    def _water_costs(self):
        """By match and strain, upper bounds on the water that watering costs its factory.

        Lichen grows on the 12 cells at the factory's edge, on cells of its strain and on neighbours of
        those that hold 20. The engine counts them one step late, so what has just withered counts too.
        """
        for match, maps in enumerate(zip(self.strains, self.strains_before, self.lichen >= 18)):
            seen = [cells.tobytes() for cells in maps]
            if seen != self.lichen_counted[match]:  # mostly lichen grows or shrinks where it is, and the costs stay
                self.lichen_counted[match], cells = seen, np.full(self.water_costs.shape[1], 12)
                strains = np.flatnonzero(self.player_of_strain[match] >= 0).tolist()
                own = [(maps[0] == strain) | (maps[1] == strain) for strain in strains]
                spreading, *own = as_bits([maps[2], *own])
                for strain, bits in zip(strains, own):
                    spread = neighbours(bits & spreading, self.map_size) & self.all_cells
                    cells[strain] += (bits | spread).bit_count()
                self.water_costs[match] = -(-cells // GROWTH_PER_WATER)
        return self.water_costs

    def _encode_robots(self, out):
        """Features and masks of the robots; arrays of the masks have robots last: [R], [A, R], and [5, R] for
        a robot's own cell and the four beside it."""
        team, slot, heavy, x, y, power, ice, ore, under_way = self.robots.T
        row, match, battery, cargo = np.arange(len(team)), team // 2, BATTERY[heavy], CARGO[heavy]
        cells = (x + 1) * self.side + y + 1 + self.beside
        cells_of_team = cells + team * self.side**2
        own_factory, closed = self.factory_map.take(cells_of_team), self.closed.take(cells_of_team)
        rubble, nearest = self.rubble.take(cells + match * self.side**2), self.nearest[team, x, y]

        features = np.zeros((len(team), len(FEATURES)), np.float32)
        features[row, COLUMN["is_light"] + heavy] = 1
        features[:, COLUMN["power"] : COLUMN["ore"] + 1] = self.robots[:, 5:8] / HOLDS[heavy]
        features[:, COLUMN["ice_dx"] : COLUMN["on_ore"] + 1] = self.ground[team, x, y]
        home = slice(COLUMN["home_water"], COLUMN["home_power"] + 1)
        features[:, home] = out["features"][team, nearest, home]
        features[:, COLUMN["rubble_here"]] = rubble[0] / 100
        going = under_way > STAY
        features[row[going], COLUMN["order_up"] - 1 + under_way[going]] = 1

        # An order that is under way goes on free; any other has to be paid for first.
        order_cost = ORDER_COST[heavy]
        left = power - order_cost * (np.arange(NUM_ACTIONS)[:, None] != under_way)
        left[1:5] -= MOVE_COST_ONTO[heavy, rubble[1:]]
        left[DIG] -= DIG_COST[heavy]
        can_do = left >= 0
        can_do[1:5] &= ~closed[1:]
        can_do[DIG] &= (own_factory[0] == 0) & ~closed[0]
        can_do[DELIVER] &= own_factory.any(0) & (ice + ore > 0)
        gain = np.minimum(battery - left[PICK_UP], self.stock[team, nearest, 0])
        can_do[PICK_UP] &= (own_factory[0] > 0) & (gain > 0)
        if self.safe_masks:
            can_do[1:5] &= ~(self.robot_map | self.centre_map).take(cells_of_team[1:])
            on_ice, on_ore, lichen = self.ice[match, x, y], self.ore[match, x, y], self.lichen[match, x, y] > 0
            own_lichen = (self.player_of_strain[match, self.strains[match, x, y]] == team % 2) & lichen
            to_mine = ~own_lichen & ((on_ice & (ice < cargo)) | (on_ore & (ore < cargo)))
            to_clear = ((rubble[0] > 0) & (on_ice | on_ore)) | (lichen & ~own_lichen)
            can_do[DIG] &= to_mine | to_clear
            can_do[PICK_UP] &= gain >= 10 * order_cost
            steps_home = self.steps_home[:, team, x, y]
            way_home = steps_home * MOVE_COST[heavy] + (np.minimum(steps_home, 2) + 1) * order_cost
            can_do[1:5] &= (left[1:5] >= way_home[1:]) | (steps_home[1:] < steps_home[0])
            can_do[DIG] &= left[DIG] >= way_home[0]
        can_do[STAY] |= ~can_do.any(0)

        out["features"][team, slot] = features
        out["position"][team, slot] = self.robots[:, 3:5]
        out["kind"][team, slot] = LIGHT + heavy
        out["action_mask"][team, slot] = can_do.T
        self.deliver_direction = (own_factory > 0).argmax(0)
        self.deliver_to = own_factory[self.deliver_direction, row] - 1  # slot of that factory

    def orders(self, actions):
        """Official orders for the observation encoded last.

        A robot that goes on doing what it did gets no order, since every new one costs power. Moves and
        digs are ordered for as many steps as the robot can pay and still afford another order after, so
        that going on is free and changing its mind is always possible.

        Args:
            actions: int array [T, E].

        Returns:
            list of T dicts unit_id -> official action; of one match, for player_0 and player_1.
        """
        orders, factory_ids = [{} for _ in self.teams], [list(slots) for slots in self.factory_slot]
        busy = self.alive & (actions[:, : self.max_factories] != NOTHING)
        for team, slot in np.argwhere(busy).tolist():
            orders[team][factory_ids[team][slot]] = int(actions[team, slot]) - 1  # 0 light, 1 heavy, 2 water
        action = actions[self.robots[:, 0], self.robots[:, 1]]
        if self.safe_masks:
            action = self._give_way(action)
        unit_ids = [unit_id for slots in self.robot_slot for unit_id in slots]  # in the order of self.robots
        for row in np.flatnonzero(action != self.robots[:, 8]).tolist():
            orders[self.robots[row, 0]][unit_ids[row]] = self._queue(row, int(action[row]))
        return orders

    def _queue(self, row, action):
        """The queue with the order that makes the robot in this row of the table do `action`."""
        _, _, heavy, _, _, power, ice, ore, _ = self.robots[row].tolist()
        if action == STAY:
            return np.zeros((0, 6), np.int64)  # no order
        if action == DELIVER:
            order = 1, self.deliver_direction[row], ore > ice, max(ice, ore), 0, 1
        elif action == PICK_UP:
            order = 2, 0, 4, BATTERY[heavy] - power + ORDER_COST[heavy], 0, 1
        else:
            cost = DIG_COST[heavy] if action == DIG else WORST_MOVE[heavy]
            affordable = max((power - 2 * ORDER_COST[heavy]) // cost, 1)
            order = 3 if action == DIG else 0, 0 if action == DIG else action, 0, 0, 0, affordable
        return np.array([order], np.int64)  # type, direction, resource, amount, repeat, n

    def _give_way(self, action):
        """Where own robots are told to step onto one cell, let the first go and the others wait."""
        team, _, _, x, y = self.robots.T[:5]
        moves = np.flatnonzero((STAY < action) & (action < DIG))
        cells = ((team * self.side + x) * self.side + y)[moves] + self.beside[action[moves], 0]
        goals, taken = cells.tolist(), set()
        if len(set(goals)) < len(goals):
            action = action.copy()
            for row, goal in zip(moves.tolist(), goals):
                if goal in taken:
                    action[row] = STAY
                    self.right_of_way[team[row]] += 1
                taken.add(goal)
        return action


# ------------------------------------------------------------------------------------------------------
# Matches, and many of them
# ------------------------------------------------------------------------------------------------------

OBSERVATION_KEYS = ("board", "features", "position", "kind", "group", "action_mask")
TERMS, WEIGHTS = tuple(REWARDS), np.array(list(REWARDS.values()))
ICE_DUG, ORE_DUG, ICE_DELIVERED, ORE_DELIVERED, ROBOT_LOST = range(5)
WATER_MADE, METAL_MADE, LICHEN_GROWN, SURVIVED, FACTORY_LOST = range(5, 10)
TEAM_METRICS = (
    *("r", "ice_transferred", "ice_per_factory", "factories_alive", "factories_alive_share", "factories_placed"),
    *("water", "ore", "metal", "lichen", "lights_built", "heavies_built", "robots_lost"),
    *("own_collisions", "right_of_way", "blocked_builds"),
)


class LuxError(RuntimeError):
    """The engine raised an exception or a worker process died; the message names the match and its seed."""


@functools.cache
def _engine_class():
    """The engine's class, some small parts of which are done faster here and never differently.

    The rules stay the engine's own: what is replaced are positions (Cell), the search for a factory's lichen
    (LichenFactory), the question which lichen is whose (Strains), and the observations, which nobody reads
    here (Engine.step). It is made in a function because luxai_s2 is slow to import, and only processes that
    play need it.
    """
    from luxai_s2 import LuxAI_S2
    from luxai_s2.factory import Factory
    from luxai_s2.map.position import Position

    class Cell(Position):
        """A position as two Python ints, which are added, compared and printed faster than an array."""

        __slots__ = ("x", "y")

        @property
        def pos(self):
            return np.array([self.x, self.y])

        @pos.setter
        def pos(self, pos):
            self.x, self.y = map(int, pos)

        def __add__(self, other):
            dx, dy = (other.pos if isinstance(other, Position) else other).tolist()
            return Cell((self.x + dx, self.y + dy))

    class LichenFactory(Factory):
        """A factory that finds the cells of its lichen with a few operations on whole boards.

        The cells found do not depend on the order of the search, and it reads nothing but these four: where
        lichen may grow, where enough grows to spread, where factories stand, and whose lichen is where.
        """

        found = None  # cells to grow on and connected cells of the last search

        def cache_water_info(self, board, env_cfg):
            """As the original: a search from the 12 cells at the factory's edge, but a whole ring at a time."""
            if board.ground is None:  # asked at another time
                board.searched = self.found = None
                return super().cache_water_info(board, env_cfg)
            if board.ground == ():  # nothing that matters has changed since the last search
                return
            free, lichen, spreading, occupied, strains = board.ground
            size, own = board.width, strains[self.num_id]
            area = (7 | 7 << size + 1 | 7 << 2 * size + 2) << (self.pos.x - 1) * (size + 1) + self.pos.y - 1
            ring = found = neighbours(area, size) & ~area & free
            while ring:  # on to free ground from where enough grows, and from cell to cell of the own strain
                ring = neighbours(ring & spreading, size) & ~lichen | neighbours(ring & own, size) & own
                ring &= free & ~found
                found |= ring
            # Nothing new grows beside lichen of another strain or beside another factory.
            beside_others = neighbours(lichen & ~own | occupied & ~area, size)
            found = found & (~beside_others | own), found & own
            if found != self.found:  # mostly they are the same for many steps
                self.grow_lichen_positions, self.connected_lichen_positions = (cells_of(x, size) for x in found)
                self.found = found

    class Strains(list):
        """A team's strains. The engine asks np.isin at every step which lichen is theirs; a table answers faster."""

        def __array_function__(self, function, types, args, kwargs):
            if function is not np.isin or args[1] is not self:
                return function(*(list(arg) if arg is self else arg for arg in args), **kwargs)
            table = np.zeros(max(args[0].max(), *self, 0) + 2, bool)  # its last entry serves strain -1, no lichen
            table[list(self)] = True
            return table.take(args[0])

    class Engine(LuxAI_S2):
        """The engine with these robots and factories; `births` lists the robots built."""

        births = ()

        def step(self, actions):
            """As the original, but with None for the observations, unless factories are still being placed."""
            if self.state.real_env_steps >= 0:
                self.state.get_obs = lambda: None  # hides the method
            try:
                return super().step(actions)
            finally:
                self.state.__dict__.pop("get_obs", None)

        def reset(self, *args, **kwargs):
            result = super().reset(*args, **kwargs)
            self.births, self.state.board.ground, self.state.board.searched = [], None, None
            return result

        def add_unit(self, *args, **kwargs):
            unit = super().add_unit(*args, **kwargs)
            unit.pos = Cell(unit.pos.pos)
            self.births.append(unit)
            return unit

        def add_factory(self, team, pos):
            team.factory_strains = Strains(team.factory_strains)
            factory = super().add_factory(team, pos)
            if factory is not None:
                factory.__class__, factory.pos = LichenFactory, Cell(factory.pos.pos)
            return factory

        def _handle_recharge_actions(self, actions_by_type):
            """Right after this the engine lets every factory look for its lichen, and then come the waterings."""
            super()._handle_recharge_actions(actions_by_type)
            board, strains = self.state.board, self.state.board.lichen_strains.astype(np.int16)
            occupied = board.factory_occupancy_map != -1
            free = (board.rubble == 0) & ~occupied & (board.ice == 0) & (board.ore == 0)
            spreading = board.lichen >= self.env_cfg.MIN_LICHEN_TO_SPREAD
            searched, board.ground = [cells.tobytes() for cells in (free, spreading, occupied, strains)], ()
            if searched != board.searched:
                ids = [factory.num_id for player in PLAYERS for factory in self.state.factories[player].values()]
                bits = as_bits([free, strains != -1, spreading, occupied, *(strains == num_id for num_id in ids)])
                board.searched, board.ground = searched, (*bits[:4], dict(zip(ids, bits[4:])))

        def _handle_factory_water_actions(self, actions_by_type):
            self.state.board.ground = None
            super()._handle_factory_water_actions(actions_by_type)

    return Engine


def read_engine(state):
    """What `read_observation(state.get_obs())` returns, without making that observation."""
    factories, robots = [{}, {}], [{}, {}]
    for team, player in enumerate(PLAYERS):
        for unit_id, factory in state.factories[player].items():
            pos, cargo = factory.pos, factory.cargo
            stock = factory.power, cargo.ice, cargo.ore, cargo.water, cargo.metal
            factories[team][unit_id] = pos.x, pos.y, *stock, factory.num_id
        for unit_id, unit in state.units[player].items():
            pos, cargo, under_way = unit.pos, unit.cargo, STAY
            if unit.action_queue:
                order = unit.action_queue[0]
                under_way = DIG if order.act_type == "dig" else int(order.state_dict()[1])
            robots[team][unit_id] = unit.is_heavy(), pos.x, pos.y, unit.power, cargo.ice, cargo.ore, under_way
    board = state.board
    return state.real_env_steps, board.rubble, board.lichen, board.lichen_strains, factories, robots


def _cargo(entities):
    """Ice and ore of engine objects, [len(entities), 2]."""
    return np.array([(entity.cargo.ice, entity.cargo.ore) for entity in entities], np.int64).reshape(-1, 2)


class LuxMatch:
    """One match of the real engine, with rewards and metrics.

    Args:
        next_seed: function without arguments that returns the seed of the next match's map.
        encoder, index: a LuxEncoder, and the number of this match in it.
        min_factories: fewest factories per team.
    """

    def __init__(self, next_seed, encoder, index=0, min_factories=2, engine_options=None):
        self.next_seed, self.seed = next_seed, None
        self.encoder, self.index, self.teams = encoder, index, slice(2 * index, 2 * index + 2)
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
            actions = {player: early_phase_action(obs, player) for player in PLAYERS}
            obs = self.engine.step(actions)[0]["player_0"]
        self.placed = np.array([len(obs["factories"][player]) for player in PLAYERS])
        self.totals = np.zeros((2, len(TERMS)))
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
        np.matmul(amounts, WEIGHTS, out=rewards, casting="same_kind")
        self.totals += amounts.sum(1)
        self.returns += rewards.sum(1)
        self.factory_steps += [len(state.factories[player]) for player in PLAYERS]
        return self._metrics(state) if terminations["player_0"] else None

    def _snapshot(self):
        """Robots and factories before the step, as engine objects, in the order of the encoder's tables."""
        state = self.engine.state
        self.engine.births.clear()
        robots = [unit for player in PLAYERS for unit in state.units[player].values()]
        factories = [factory for player in PLAYERS for factory in state.factories[player].values()]
        return robots, factories

    def _achievements(self, before):
        """Amount of each reward term for each entity in the step just played, float [P, E, len(TERMS)]."""
        robots, factories = before
        state, encoder, board, teams = self.engine.state, self.encoder, self.engine.state.board, self.teams
        amounts = np.zeros((2, encoder.num_entities, len(TERMS)))
        arrived = np.zeros((2, encoder.num_entities, 2), np.int64)  # ice and ore brought to each factory
        if robots:
            rows = slice(*np.searchsorted(encoder.robots[:, 0], (teams.start, teams.stop)))
            table = encoder.robots[rows]
            team, slot, heavy = table[:, 0] - teams.start, table[:, 1], table[:, 2]
            got = _cargo(robots) - table[:, 6:8]
            brought = np.maximum(-got, 0)
            # Digging is all that fills a cargo, delivering to an own factory all that empties it.
            amounts[team, slot, ICE_DUG : ORE_DUG + 1] = np.maximum(got, 0)
            amounts[team, slot, ICE_DELIVERED : ORE_DELIVERED + 1] = brought
            np.add.at(arrived, (team, encoder.deliver_to[rows]), brought)
            lost = np.array([unit.unit_id not in state.units[PLAYERS[unit.team_id]] for unit in robots])
            amounts[team, slot, ROBOT_LOST] = lost * np.where(heavy, 1.0, 0.1)
        team, slot = np.nonzero(encoder.alive[teams])
        refined = arrived[team, slot] + encoder.stock[teams][team, slot, 1:3] - _cargo(factories)
        amounts[team, slot, WATER_MADE : METAL_MADE + 1] = refined // (ICE_PER_WATER, ORE_PER_METAL)
        lichen = np.bincount(board.lichen_strains.ravel() + 1, board.lichen.ravel(), len(self.lichen) + 1)[1:]
        amounts[team, slot, LICHEN_GROWN] = (lichen - self.lichen)[encoder.strain_of[teams][team, slot]]
        self.lichen = lichen
        survived = [factory.unit_id in state.factories[PLAYERS[factory.team_id]] for factory in factories]
        amounts[team, slot, np.where(survived, SURVIVED, FACTORY_LOST)] = 1
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
        total = dict(zip(TERMS, self.totals.T))
        owner = self.encoder.player_of_strain[self.index, state.board.lichen_strains]
        return {
            "l": state.real_env_steps,
            "r": self.returns,
            "ice_transferred": total["ice_delivered"],
            "ice_per_factory": total["ice_delivered"] / self.placed,
            "factories_alive": self.factory_steps / GAME_LENGTH,
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


class _Matches:
    """Matches `first` to `first + len(out)`, stepped one after the other in this process."""

    def __init__(self, first, arrays, options):
        self.first, self.arrays = first, arrays
        self.held_out, self.num_envs = options.pop("held_out"), options.pop("num_envs")
        self.number = options.pop("first_match") + first  # what the first match here is counted as, for the seeds
        of_match = {key: options.pop(key) for key in ("min_factories", "engine_options")}
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
        """Play all matches up to where they were. Each begins when the steps left are as many as it has actions."""
        states = states[self.first : self.first + len(self.matches)]
        self._seed(int(states[0]["seed"]))
        seeds = [[match.next_seed() for _ in range(state["played"])][-1] for match, state in zip(self.matches, states)]
        for given, state in zip(self.given, states):
            given[: len(state["actions"])] = state["actions"]
        ages = np.array([len(state["actions"]) for state in states])
        rewards = np.zeros_like(self.arrays["rewards"][0])
        for left in range(ages.max(), -1, -1):

            def play(index, match):
                if ages[index] > left:
                    match.step(orders[match.teams], rewards)
                elif left in (ages[index], ages.max()):  # the encoder needs those that have not begun yet too
                    match.reset(seeds[index])

            if left < ages.max():
                actions = self.given[np.arange(len(ages)), np.maximum(ages - left - 1, 0)]
                orders = self.encoder.orders(actions.reshape(-1, actions.shape[-1]))
            self._each(play)
        return []

    def step(self, _):
        actions = self.arrays["actions"]
        orders = self.encoder.orders(actions.reshape(-1, actions.shape[-1]))

        def play(index, match):
            self.given[index, match.engine.state.real_env_steps] = actions[index]
            metrics = match.step(orders[match.teams], self.arrays["rewards"][index])
            self.arrays["terminated"][index] = metrics is not None
            if metrics is not None:
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
                pipe.send((True, getattr(matches, command)(argument)))
            except LuxError as error:
                pipe.send((False, str(error)))


def _view(memory, shape, dtype, part=slice(None)):
    return np.frombuffer(memory, dtype).reshape(shape)[part]


class LuxVecEnv(gym.vector.VectorEnv):
    """N matches of Lux AI Season 2, two players each, both played by the caller.

    It follows Gymnasium's vector conventions, except that rewards are per entity: [N, P, E] float32.
    Terminations and truncations are per match, [N] bool. See the top of the file for the observations.

    Args:
        num_envs: N.
        num_workers: processes that share the matches; 0 plays them in this process, None takes one process
            per core. The number changes nothing in what is played.
        map_size, min_factories, max_factories: the stage; 48, 2 and 5 are season 2, 64, 4 and 10 NeurIPS.
        max_robots: robot slots per team.
        group_by, safe_masks: see LuxEncoder.
        held_out: play the maps kept for evaluation: match i starts with map `seed + i`.
        first_match: what the first match is counted as, for the seeds: where several processes each play a part
            of the matches, together they play what one would.
        render_mode: None or "rgb_array" (with num_workers 0).
        engine_options: more settings for the engine, such as {"validate_action_space": True}.

    Raises:
        LuxError: from all methods that play, if the engine fails, a worker process dies, or one takes more than
            WORKER_TIMEOUT seconds for a step of one match.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"]}

    def __init__(
        self,
        num_envs,
        num_workers=None,
        map_size=48,
        min_factories=2,
        max_factories=5,
        max_robots=20,
        group_by="entity",
        safe_masks=True,
        held_out=False,
        first_match=0,
        render_mode=None,
        engine_options=None,
    ):
        self.num_envs, self.render_mode = num_envs, render_mode
        encoder_options = {
            "map_size": map_size,
            "max_factories": max_factories,
            "max_robots": max_robots,
            "group_by": group_by,
            "safe_masks": safe_masks,
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
        self.single_action_space = gym.spaces.MultiDiscrete(np.full(entities, NUM_ACTIONS))
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
            **encoder_options,
        }
        num_workers = min(num_envs, (os.cpu_count() or 1) if num_workers is None else num_workers)
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
        """
        self.arrays["actions"][:] = actions
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
        shape = self.arrays["actions"].shape[1:]
        fitting = [
            given.dtype == np.int8
            and (given.shape[1:] == shape and len(given) < GAME_LENGTH)
            and ((0 <= given) & (given < NUM_ACTIONS)).all()
            and (np.size(seed) == np.size(played) == 1 and seed >= 0 and played >= 1)
            for given, seed, played in ((match["actions"], match["seed"], match["played"]) for match in state)
        ]
        if len(fitting) != self.num_envs or not all(fitting):
            raise ValueError("the state of the matches is that of another environment")
        self._call("load_state", state)
        return self._observations(), {}

    def render(self):
        """Pictures of the matches by the engine's own renderer, a tuple of N arrays [400, 400, 3] uint8."""
        if self.render_mode != "rgb_array" or self.matches is None:
            raise ValueError('rendering needs LuxVecEnv(..., num_workers=0, render_mode="rgb_array")')
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draws in memory, needs no screen
        return tuple(match.engine.render() for match in self.matches.matches)

    def _observations(self):
        return {key: self.arrays[key] for key in OBSERVATION_KEYS}

    def _call(self, command, argument):
        """Let every worker obey; the lists that they return, joined in the order of the matches."""
        if self.matches is not None:
            return getattr(self.matches, command)(argument)
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
                    if waited >= (WORKER_TIMEOUT if before else START_TIMEOUT):
                        worker.kill()  # it would not end otherwise
                        raise TimeoutError
                if not pipe.poll():
                    raise EOFError
                done, result = pipe.recv()
                if not done:
                    raise LuxError(result)
                results += result
        except (EOFError, ConnectionError, TimeoutError) as error:
            seeds = ", ".join(map(str, self.arrays["map_seed"][first:end]))
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
