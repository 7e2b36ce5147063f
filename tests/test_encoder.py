"""All that the wrapper makes of an official observation, computed a second time in plain loops, slow and obvious.

Board, features, slots, groups, masks, orders, the placement of factories, rewards and metrics. Nothing but names is
taken from the wrapper: the numbers of the game come from the engine's EnvConfig, the rules from the comments beside
FEATURES and BOARD_CHANNELS, from the docstring of LuxEncoder and from the table of rewards. Every action has a set of
objections, in words; it is allowed if there are none. So each rule can be seen to decide alone.

Of several ice cells, ore cells or factories that are equally near, an entity may be shown the way to any. A robot
that loses its factory joins the nearest, and of two equally near ones the one that was placed first.
"""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from helpers import after_every_step, entities, in_process, masked_random, scripted
from luxai_s2 import LuxAI_S2
from luxai_s2.config import EnvConfig
from test_masks import riches

import lux_wrapper as lux

GAME = EnvConfig()
# In the order of the engine's directions 1 to 4.
MOVES = {"move_up": (0, -1), "move_right": (1, 0), "move_down": (0, 1), "move_left": (-1, 0)}
OTHER = {"player_0": "player_1", "player_1": "player_0"}
CHANNEL = {name: channel for channel, name in enumerate(lux.BOARD_CHANNELS)}
WATER_RESERVE = 200  # steps

# ------------------------------------------------------------------------------------------------------
# What is seen, and what has to be remembered
# ------------------------------------------------------------------------------------------------------


def plain(x):
    """An official observation with lists for arrays and with Python's own numbers."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x


def distance(here, there):
    """Steps from cell to cell."""
    return abs(there[0] - here[0]) + abs(there[1] - here[1])


def nearest(here, places):
    """Those of the places, a dict key -> cell, that are fewest steps away: a list of keys, in the order of the dict."""
    steps = {key: distance(here, place) for key, place in places.items()}
    return [key for key in steps if steps[key] == min(steps.values())]


class Memory:
    """What no single observation of a match says: who has which slot, who built whom, what has just withered.

    Factories have slots in the order in which they were placed. A robot gets the lowest slot that was empty in
    the observation before. It belongs to the factory in whose centre it appears, and when that one is gone to the
    nearest.
    """

    def __init__(self, first, max_factories, max_robots):
        self.max_robots, self.robot_slots = max_robots, range(max_factories, max_factories + max_robots)
        self.slot = {player: {id: n for n, id in enumerate(first["factories"][player])} for player in lux.PLAYERS}
        self.home = {player: {} for player in lux.PLAYERS}  # of robots alive: id of their factory
        self.owner = {f["strain_id"]: player for player in lux.PLAYERS for f in first["factories"][player].values()}
        self.obs, self.strains_before = first, None

    def see(self, obs):
        """The next observation, or the first one once more."""
        self.strains_before, self.obs = self.obs["board"]["lichen_strains"], obs
        for player in lux.PLAYERS:
            slot, home, robots = self.slot[player], self.home[player], obs["units"][player]
            places = {id: factory["pos"] for id, factory in obs["factories"][player].items()}
            free = [number for number in self.robot_slots if number not in slot.values()]
            for id in home.keys() - robots.keys():
                del home[id], slot[id]
            for id, robot in robots.items():
                if id not in slot:
                    slot[id] = free.pop(0)
                if home.get(id) not in places:
                    home[id] = nearest(robot["pos"], places)[0]


class Side:
    """The newest observation as one player sees it."""

    def __init__(self, memory, player):
        obs, self.memory, self.player, self.opponent = memory.obs, memory, player, OTHER[player]
        self.time, self.size = obs["real_env_steps"], len(obs["board"]["rubble"])
        self.factories, self.robots = obs["factories"][player], obs["units"][player]
        self.their_factories, self.their_robots = obs["factories"][self.opponent], obs["units"][self.opponent]
        self.slot, self.home = memory.slot[player], memory.home[player]
        board = obs["board"]
        self.rubble, self.lichen, self.strains = board["rubble"], board["lichen"], board["lichen_strains"]
        self.ice, self.ore = (self.marked(board[name]) for name in ("ice", "ore"))
        self.area, self.their_area = self.cells_of(self.factories), self.cells_of(self.their_factories)
        self.standing = {tuple(robot["pos"]) for robot in self.robots.values()}
        self.centres = {tuple(factory["pos"]) for factory in self.factories.values()}

    @staticmethod
    def marked(board):
        return {(x, y) for x, row in enumerate(board) for y, mark in enumerate(row) if mark}

    @staticmethod
    def cells_of(factories):
        """(x, y) -> id of the factory that covers this cell, of 3 x 3 cells each."""
        beside = (-1, 0, 1)
        return {(f["pos"][0] + i, f["pos"][1] + j): id for id, f in factories.items() for i in beside for j in beside}

    def is_inside(self, cell):
        return 0 <= cell[0] < self.size and 0 <= cell[1] < self.size

    def owner_of_lichen(self, x, y):
        """The player whose lichen grows here, or None."""
        return self.memory.owner[self.strains[x][y]] if self.lichen[x][y] else None

    def robots_of(self, factory_id, kind):
        """How many robots of this kind belong to the factory."""
        return sum(self.home[id] == factory_id and robot["unit_type"] == kind for id, robot in self.robots.items())


# ------------------------------------------------------------------------------------------------------
# The board
# ------------------------------------------------------------------------------------------------------


def stands_here(kind, robots):
    """Set of the cells where one of these robots stands that are of this kind."""
    return {tuple(robot["pos"]) for robot in robots.values() if robot["unit_type"] == kind}


def channels(side):
    """name -> function (x, y) -> what this channel shows there, 0 to 100."""
    own_light, own_heavy = (stands_here(kind, side.robots) for kind in ("LIGHT", "HEAVY"))
    their_light, their_heavy = (stands_here(kind, side.their_robots) for kind in ("LIGHT", "HEAVY"))
    return {
        "inside": lambda x, y: 100,
        "ice": lambda x, y: 100 * ((x, y) in side.ice),
        "ore": lambda x, y: 100 * ((x, y) in side.ore),
        "rubble": lambda x, y: side.rubble[x][y],
        "own_lichen": lambda x, y: side.lichen[x][y] * (side.owner_of_lichen(x, y) == side.player),
        "opponent_lichen": lambda x, y: side.lichen[x][y] * (side.owner_of_lichen(x, y) == side.opponent),
        "own_factory": lambda x, y: 100 * ((x, y) in side.area),
        "opponent_factory": lambda x, y: 100 * ((x, y) in side.their_area),
        "own_light": lambda x, y: 100 * ((x, y) in own_light),
        "own_heavy": lambda x, y: 100 * ((x, y) in own_heavy),
        "opponent_light": lambda x, y: 100 * ((x, y) in their_light),
        "opponent_heavy": lambda x, y: 100 * ((x, y) in their_heavy),
    }


# ------------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------------


def log(amount):
    return math.log(1 + amount) / 5


def thousands(amount):
    """At most 3."""
    return min(amount / 1000, 3)


def way(name, here, there):
    """Steps right and down, and in all, in cells / 8, at most 1 (and at least -1)."""
    dx, dy = there[0] - here[0], there[1] - here[1]
    steps = {"dx": dx, "dy": dy, "distance": abs(dx) + abs(dy)}
    return {f"{name}_{what}": max(-1, min(1, number / 8)) for what, number in steps.items()}


def ways(name, here, places):
    """The ways to all of the nearest places; where there is none, it is far and in no direction."""
    if not places:
        return [{f"{name}_dx": 0, f"{name}_dy": 0, f"{name}_distance": 1}]
    return [way(name, here, place) for place in nearest(here, {place: place for place in places})]


def home_features(here, factory):
    """The way to a factory, its water and its power."""
    stock = {"home_water": log(factory["cargo"]["water"]), "home_power": thousands(factory["power"])}
    return way("home", here, factory["pos"]) | stock


def common_features(side):
    """How many factories are alive, in fives, and the clock: 30 steps of day and 20 of night, 1000 in all."""
    in_cycle = side.time % GAME.CYCLE_LENGTH
    return {
        "own_factories": len(side.factories) / 5,
        "opponent_factories": len(side.their_factories) / 5,
        "is_day": in_cycle < GAME.DAY_LENGTH,
        "time_in_cycle": in_cycle / GAME.CYCLE_LENGTH,
        "time": side.time / GAME.max_episode_length,
    }


def factory_features(side, id):
    """Kind, stocks in thousands (water and metal by their logarithm), robots that belong to it, who stands in it.

    Its home is itself; there is neither ice nor ore nor rubble below it.
    """
    factory = side.factories[id]
    cargo = factory["cargo"]
    return {
        "is_factory": 1,
        "power": thousands(factory["power"]),
        "ice": thousands(cargo["ice"]),
        "ore": thousands(cargo["ore"]),
        "water": log(cargo["water"]),
        "metal": log(cargo["metal"]),
        "group_lights": side.robots_of(id, "LIGHT") / 10,
        "group_heavies": side.robots_of(id, "HEAVY") / 5,
        "centre_taken": tuple(factory["pos"]) in side.standing,
        **home_features(factory["pos"], factory),
        **common_features(side),
    }


def under_way(robot):
    """The action that its queue goes on with. Of those that are ordered only moves and digs outlast a step."""
    if not robot["action_queue"]:
        return "stay"
    kind, direction, *_ = robot["action_queue"][0]
    assert kind in (0, 3)
    return "dig" if kind == 3 else list(MOVES)[direction - 1]


def robot_features(side, id, home):
    """Kind, stocks as shares of what it can hold, the factory `home`, the ground below, and the order under way."""
    robot = side.robots[id]
    here, config = tuple(robot["pos"]), GAME.ROBOTS[robot["unit_type"]]
    return {
        "is_light": robot["unit_type"] == "LIGHT",
        "is_heavy": robot["unit_type"] == "HEAVY",
        "power": robot["power"] / config.BATTERY_CAPACITY,
        "ice": robot["cargo"]["ice"] / config.CARGO_SPACE,
        "ore": robot["cargo"]["ore"] / config.CARGO_SPACE,
        "on_ice": here in side.ice,
        "on_ore": here in side.ore,
        "rubble_here": side.rubble[here[0]][here[1]] / 100,
        **{f"order_{name}": under_way(robot) == f"move_{name}" for name in ("up", "right", "down", "left")},
        "order_dig": under_way(robot) == "dig",
        **home_features(here, side.factories[home]),
        **common_features(side),
    }


# ------------------------------------------------------------------------------------------------------
# Masks: what speaks against an action. Objections that begin with a number are rules of the safe masks.
# ------------------------------------------------------------------------------------------------------


def water_cost(side, strain):
    """Upper bound on the water that watering costs: 1 for each 10 cells, or part of them, where lichen may grow.

    These are the 12 cells at the factory's edge, the cells of its strain, and the neighbours of those of them from
    where it spreads. The engine counts late: a cell that the strain held in the observation before still counts,
    and lichen of two less than the 20 that it takes to spread.
    """
    before, cells = side.memory.strains_before, set()
    for x in range(side.size):
        for y in range(side.size):
            if side.strains[x][y] == strain or before[x][y] == strain:
                cells.add((x, y))
                if side.lichen[x][y] >= GAME.MIN_LICHEN_TO_SPREAD - 2:
                    cells |= {cell for dx, dy in MOVES.values() if side.is_inside(cell := (x + dx, y + dy))}
    return math.ceil((12 + len(cells)) / GAME.LICHEN_WATERING_COST_FACTOR)


def lacks_for(factory, kind):
    """Set of what the factory has too little of, "metal" or "power", to build a robot of this kind."""
    config = GAME.ROBOTS[kind]
    has = {"metal": factory["cargo"]["metal"] - config.METAL_COST, "power": factory["power"] - config.POWER_COST}
    return {name for name, left in has.items() if left < 0}


def needs_first_heavy(side, id):
    """Whether a factory has no heavy robot and can build one."""
    return not side.robots_of(id, "HEAVY") and not lacks_for(side.factories[id], "HEAVY")


def spares_metal(side, id):
    """Whether a factory has the metal for a light robot beside that of its first heavy one, where it can build that."""
    costs = [GAME.ROBOTS[kind].METAL_COST for kind in ("LIGHT", "HEAVY")]
    return not needs_first_heavy(side, id) or side.factories[id]["cargo"]["metal"] >= sum(costs)


def slots_for(side, id, safe_masks):
    """Kinds of robot for which a factory finds a slot, even if each factory before it builds what it can.

    With the safe masks the slots for first heavy robots are set aside, one for each factory that can build its first
    one now; of these factories too the earlier ones come first.
    """
    free = side.memory.max_robots - len(side.robots)
    first = [other for other in side.factories if safe_masks and needs_first_heavy(side, other)]
    used = 0
    for other in side.factories:
        if other == id:
            break
        light = not lacks_for(side.factories[other], "LIGHT") and (not safe_masks or spares_metal(side, other))
        used += light or (other not in first and not lacks_for(side.factories[other], "HEAVY"))
    spare = len(first) + used < free
    own_turn = first.index(id) < free if id in first else spare
    return {kind for kind, may in (("LIGHT", spare), ("HEAVY", own_turn)) if may}


def slots_used(side, id, safe_masks):
    """Kinds of robot that a factory can pay for, may spare the metal for, and has a slot for."""
    kinds = {kind for kind in slots_for(side, id, safe_masks) if not lacks_for(side.factories[id], kind)}
    return kinds - ({"LIGHT"} if safe_masks and not spares_metal(side, id) else set())


def factory_objections(side, id, safe_masks):
    """Action -> what speaks against it, of a factory."""
    factory, objections = side.factories[id], {action: set() for action in lux.FACTORY_ACTIONS}
    water = factory["cargo"]["water"]
    for kind in ("LIGHT", "HEAVY"):
        against = objections[f"build_{kind.lower()}"]
        against |= lacks_for(factory, kind)
        if kind not in slots_for(side, id, safe_masks):
            # 3. Into the last slots, which other factories, or this one, need for their first heavy robots.
            against.add("3: last slots" if kind in slots_for(side, id, False) else "slots")
        elif kind not in slots_for(side, id, True):
            against.add("3: last slots")
        # 3. Building while an own robot stands where the new one would appear.
        if tuple(factory["pos"]) in side.standing:
            against.add("3: the centre is taken")
    # 3. A light robot from the metal that the first heavy one needs.
    if not spares_metal(side, id):
        objections["build_light"].add("3: metal of the first heavy")

    cost = water_cost(side, factory["strain_id"])
    if water < cost:
        objections["water_lichen"].add("water")
    # 7. The water left must last for 200 steps, or to the end.
    if water - cost < min(WATER_RESERVE, GAME.max_episode_length - side.time):
        objections["water_lichen"].add("7: water would not last")
    return objections


def steps_to_edge(cell, factory):
    """Steps from a cell to the nearest cell of the factory."""
    return sum(max(abs(factory["pos"][axis] - cell[axis]) - 1, 0) for axis in (0, 1))


def way_home_cost(config, steps):
    """Power for the way to a factory were there no rubble, with an order for each of two lines, and for one there."""
    lines = min(steps, 2)  # it may be one line, but that is not looked at
    return steps * config.MOVE_COST + (lines + 1) * config.ACTION_QUEUE_POWER_COST


def nothing_to_dig(side, robot):
    """Rule 4: why a dig here gains nothing, or None. A dig meets rubble first, then lichen, then ice and ore."""
    x, y = robot["pos"]
    space = GAME.ROBOTS[robot["unit_type"]].CARGO_SPACE
    if side.rubble[x][y]:
        return None if (x, y) in side.ice | side.ore else "4: rubble on bare ground"
    if side.lichen[x][y]:
        return "4: own lichen" if side.owner_of_lichen(x, y) == side.player else None
    if (x, y) in side.ice:
        return None if robot["cargo"]["ice"] < space else "4: cargo full of ice"
    if (x, y) in side.ore:
        return None if robot["cargo"]["ore"] < space else "4: cargo full of ore"
    return "4: bare ground"


def power_left(side, robot, action):
    """Power after the action; what is under way goes on free, anything else costs an order."""
    config = GAME.ROBOTS[robot["unit_type"]]
    left = robot["power"]
    if action != under_way(robot):
        left -= config.ACTION_QUEUE_POWER_COST
    if action == "dig":
        left -= config.DIG_COST
    if action in MOVES:
        x, y = robot["pos"][0] + MOVES[action][0], robot["pos"][1] + MOVES[action][1]
        if side.is_inside((x, y)):
            left -= math.floor(config.MOVE_COST + config.RUBBLE_MOVEMENT_COST * side.rubble[x][y])
    return left


def robot_objections(side, id, home):
    """Action -> what speaks against it, of a robot whose nearest factory is `home`."""
    robot, objections = side.robots[id], {action: set() for action in lux.ROBOT_ACTIONS}
    here, config, factory = tuple(robot["pos"]), GAME.ROBOTS[robot["unit_type"]], side.factories[home]
    order, steps = config.ACTION_QUEUE_POWER_COST, steps_to_edge(here, factory)
    left = {action: power_left(side, robot, action) for action in lux.ROBOT_ACTIONS}
    for action in lux.ROBOT_ACTIONS:
        if left[action] < 0:
            objections[action].add("power")

    around = {action: (here[0] + dx, here[1] + dy) for action, (dx, dy) in MOVES.items()}
    for action, there in around.items():
        if not side.is_inside(there):
            objections[action].add("edge")
            continue
        if there in side.their_area:
            objections[action].add("opponent's factory")
        if there in side.standing:
            objections[action].add("1: own robot")
        if there in side.centres:
            objections[action].add("2: centre of a factory")
        steps_then = steps_to_edge(there, factory)
        if steps_then >= steps and left[action] < way_home_cost(config, steps_then):
            objections[action].add("5: stepping away")

    if here in side.area or here in side.their_area:
        objections["dig"].add("on a factory")
    if reason := nothing_to_dig(side, robot):
        objections["dig"].add(reason)
    if left["dig"] < way_home_cost(config, steps):
        objections["dig"].add("5: digging")

    if not any(cell in side.area for cell in (here, *around.values())):
        objections["deliver"].add("no factory")
    if robot["cargo"]["ice"] == robot["cargo"]["ore"] == 0:
        objections["deliver"].add("no cargo")

    if here not in side.area:
        objections["pick_up_power"].add("no factory")
    else:
        gain = min(config.BATTERY_CAPACITY - left["pick_up_power"], side.factories[side.area[here]]["power"])
        if gain <= 0:
            objections["pick_up_power"].add("no power there")
        if gain < 10 * order:  # 6. picking up less than ten times what the order costs
            objections["pick_up_power"].add("6: little power")
    return objections


def without_rules(objections):
    """Those that hold without the safe masks."""
    return {action: {what for what in against if not what[0].isdigit()} for action, against in objections.items()}


def allowed(objections, safe_masks):
    """Set of the actions allowed. Something always is: who can do nothing else stays."""
    objections = objections if safe_masks else without_rules(objections)
    return {action for action, against in objections.items() if not against} or {"stay"}


# ------------------------------------------------------------------------------------------------------
# Orders
# ------------------------------------------------------------------------------------------------------


def steps_ordered(robot, cost):
    """The most that can be paid for, with one order now and one left to pay after; 1 at least."""
    order, steps = GAME.ROBOTS[robot["unit_type"]].ACTION_QUEUE_POWER_COST, 1
    while order + (steps + 1) * cost + order <= robot["power"]:
        steps += 1
    return steps


def queues(side, robot, action):
    """The queues that may be ordered so that the robot does this, each a list of orders.

    An order is: type (0 move, 1 transfer, 2 pick up, 3 dig), direction, resource (0 ice, 1 ore, 4 power), amount,
    repeat, n. Moves are counted as if all were over rubble of 100.
    """
    config, (x, y), cargo = GAME.ROBOTS[robot["unit_type"]], robot["pos"], robot["cargo"]
    if action == "stay":
        return [[]]
    if action == "dig":
        return [[[3, 0, 0, 0, 0, steps_ordered(robot, config.DIG_COST)]]]
    if action in MOVES:
        worst = math.floor(config.MOVE_COST + config.RUBBLE_MOVEMENT_COST * GAME.MAX_RUBBLE)
        return [[[0, 1 + list(MOVES).index(action), 0, 0, 0, steps_ordered(robot, worst)]]]
    if action == "pick_up_power":  # all that it can hold when the order is paid for
        return [[[2, 0, 4, config.BATTERY_CAPACITY - (robot["power"] - config.ACTION_QUEUE_POWER_COST), 0, 1]]]
    # All of what it has more of, to the factory that it stands on, or else to one beside it.
    around = [(x, y), *((x + dx, y + dy) for dx, dy in MOVES.values())]
    directions = [direction for direction, cell in enumerate(around) if cell in side.area]
    more = max(cargo["ice"], cargo["ore"])
    resources = [number for number, name in enumerate(("ice", "ore")) if cargo[name] == more]
    directions = [0] if 0 in directions else directions
    return [[[1, direction, resource, more, 0, 1]] for direction in directions for resource in resources]


def giving_way(side, actions):
    """Actions of robots where only the first, in the order of the observation, steps onto a cell; and who waits."""
    goals, waiting = set(), []
    for id, robot in side.robots.items():
        if actions[id] in MOVES:
            dx, dy = MOVES[actions[id]]
            goal = robot["pos"][0] + dx, robot["pos"][1] + dy
            if goal in goals:
                waiting.append(id)
            goals.add(goal)
    return {id: "stay" if id in waiting else action for id, action in actions.items()}, waiting


def orders(side, row, safe_masks):
    """For the actions of a team [E], the orders that may be given: id -> list of them. And who gives way."""
    robots = {id: lux.ROBOT_ACTIONS[row[side.slot[id]]] for id in side.robots}
    robots, waiting = giving_way(side, robots) if safe_masks else (robots, [])
    result = {id: queues(side, side.robots[id], do) for id, do in robots.items() if do != under_way(side.robots[id])}
    for id in side.factories:
        action = lux.FACTORY_ACTIONS[row[side.slot[id]]]
        if action != "nothing":
            result[id] = [{"build_light": 0, "build_heavy": 1, "water_lichen": 2}[action]]
    return result, waiting


def compare_orders(side, sent, row, safe_masks, count):
    """What the encoder sent, against the actions chosen; the robots that gave way are counted."""
    expected, waiting = orders(side, row, safe_masks)
    assert sent.keys() == expected.keys(), (side.player, side.time)
    for id, order in sent.items():
        assert np.asarray(order).tolist() in expected[id], (side.player, side.time, id, order, expected[id])
        if id in side.robots:
            assert order.shape[1:] == (6,)
            robot = side.robots[id]
            count["stopped"] += len(order) == 0
            for kind, direction, _, _, _, n in order.tolist():
                config = GAME.ROBOTS[robot["unit_type"]]
                cost = config.DIG_COST if kind == 3 else config.MOVE_COST
                assert n == 1 or 2 * config.ACTION_QUEUE_POWER_COST + n * cost <= robot["power"]
                count[f"order {kind}, {'many' if n > 1 else 'one'}"] += 1
                count["delivered to the side"] += kind == 1 and direction > 0
    count["went on"] += sum(under_way(robot) != "stay" and id not in sent for id, robot in side.robots.items())
    count["gave way"] += len(waiting)


# ------------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------------


def wrong_columns(row, wanted):
    """(column, value, expected) where a row of features is other than the dict `wanted` says."""
    values = {name: row[lux.COLUMN[name]] for name in wanted}
    return [(name, values[name], wanted[name]) for name in wanted if abs(values[name] - wanted[name]) > 1e-5]


def wrong_features(row, wanted, places):
    """The same of a whole row. Columns not wanted are 0; of each list in `places` one dict must be right."""
    named = wanted.keys() | {name for ways_there in places for name in ways_there[0]}
    wrong = wrong_columns(row, wanted | {name: 0 for name in lux.FEATURES if name not in named})
    for ways_there in places:
        tried = [wrong_columns(row, way_there) for way_there in ways_there]
        wrong += [] if [] in tried else tried[0]
    return wrong


def wrong_actions(mask, actions, may):
    """(action, value, expected) where a mask differs from the set of names allowed; there may be no more actions."""
    names = [*actions, *[None] * (lux.NUM_ACTIONS - len(actions))]
    return [(name, value, name in may) for name, value in zip(names, mask) if value != (name in may)]


def compare_entities(side, seen, group_by, safe_masks, count):
    """Kind, position, group, features and mask of all slots of a team. Returns all objections, id -> action -> set."""
    id_of_slot, objections = {side.slot[id]: id for id in (*side.factories, *side.robots)}, {}
    for slot in range(len(seen["kind"])):
        row, mask = seen["features"][slot].tolist(), seen["action_mask"][slot].tolist()
        if slot not in id_of_slot:
            assert not any(row) and not any(mask) and not seen["kind"][slot] and not seen["position"][slot].any()
            continue
        id = id_of_slot[slot]
        is_factory = id in side.factories
        entity = side.factories[id] if is_factory else side.robots[id]
        kind = lux.FACTORY if is_factory else {"LIGHT": lux.LIGHT, "HEAVY": lux.HEAVY}[entity["unit_type"]]
        assert seen["kind"][slot] == kind and seen["position"][slot].tolist() == entity["pos"]
        head = id if is_factory else side.home[id]
        assert seen["group"][slot] == (side.slot[head] if group_by == "cluster" else slot)

        places = [ways(name, entity["pos"], getattr(side, name)) for name in ("ice", "ore")]
        count["equally near ice"] += len(places[0]) > 1
        if is_factory:
            objections[id] = factory_objections(side, id, safe_masks)
            wrong = wrong_features(row, factory_features(side, id), places)
            wrong += wrong_actions(mask, lux.FACTORY_ACTIONS, allowed(objections[id], safe_masks))
        else:
            homes = nearest(entity["pos"], {key: factory["pos"] for key, factory in side.factories.items()})
            count["equally near factories"] += len(homes) > 1
            tried = {}  # what is wrong, by the factory that is taken for the nearest
            for home in homes:
                objections[id] = robot_objections(side, id, home)
                tried[home] = wrong_features(row, robot_features(side, id, home), places)
                tried[home] += wrong_actions(mask, lux.ROBOT_ACTIONS, allowed(objections[id], safe_masks))
                if not tried[home]:
                    break
            wrong = list(tried.values())[0] if all(tried.values()) else []
        assert not wrong, (side.player, side.time, id, "column or action, value, expected:", wrong)
    return objections


def compare(side, seen, group_by="entity", safe_masks=True, count=None):
    """All arrays of a team against the second computation. Returns the objections, id -> action -> set."""
    assert seen["board"].shape == (side.size, side.size, len(CHANNEL))
    for name, value in channels(side).items():
        expected = [[value(x, y) for y in range(side.size)] for x in range(side.size)]
        assert np.array_equal(seen["board"][..., CHANNEL[name]], expected), (side.player, side.time, name)
    return compare_entities(side, seen, group_by, safe_masks, Counter() if count is None else count)


# ------------------------------------------------------------------------------------------------------
# Situations made by hand: one objection decides
# ------------------------------------------------------------------------------------------------------

SIZE = 24


def robot(x, y, kind="LIGHT", power=100, ice=0, ore=0, queue=()):
    cargo = {"ice": ice, "ore": ore, "water": 0, "metal": 0}
    return {
        "unit_type": kind,
        "pos": np.array([x, y]),
        "power": power,
        "cargo": cargo,
        "action_queue": [np.array(order) for order in queue],
    }


def heavy(x, y, power=1000, **rest):
    return robot(x, y, "HEAVY", power, **rest)


def factory(x, y, power=1000, ice=0, ore=0, water=500, metal=500):
    return {"pos": np.array([x, y]), "power": power, "cargo": {"ice": ice, "ore": ore, "water": water, "metal": metal}}


def official(robots=(), factories=None, theirs=(), time=100, rubble=(), ice=(), ore=(), lichen=(), max_robots=5):
    """An official observation of a flat board; `max_robots` is not part of it.

    Args:
        robots, factories: those of player 0; without factories, one with its centre in (10, 10).
        theirs: robots of player 1, whose factory has its centre in (19, 19).
        ice, ore: cells.
        rubble: cell -> amount.
        lichen: cell -> (amount, strain). Strains are numbered as factories are, that of player 1 is the last.
    """
    factories = [factory(10, 10)] if factories is None else factories
    board = {name: np.zeros((SIZE, SIZE), int) for name in ("rubble", "ice", "ore", "lichen", "lichen_strains")}
    board["lichen_strains"] -= 1
    for name, cells in (("ice", ice), ("ore", ore)):
        for cell in cells:
            board[name][cell] = 1
    for cell, amount in dict(rubble).items():
        board["rubble"][cell] = amount
    for cell, amount_and_strain in dict(lichen).items():
        board["lichen"][cell], board["lichen_strains"][cell] = amount_and_strain
    strains = iter(range(99))
    teams = [
        {f"factory_{(n := next(strains))}": f | {"strain_id": n} for f in fs} for fs in (factories, [factory(19, 19)])
    ]
    ids = iter(range(10, 99))
    units = [{f"unit_{next(ids)}": unit for unit in team} for team in (robots, theirs)]
    return {
        "units": dict(zip(lux.PLAYERS, units)),
        "factories": dict(zip(lux.PLAYERS, teams)),
        "board": board,
        "real_env_steps": time,
    }


class Watched:
    """An encoder that gets observations made by hand, and the second computation beside it."""

    def __init__(self, first, max_robots, safe_masks, group_by="cluster"):
        without_robots = first | {"units": {player: {} for player in lux.PLAYERS}}
        self.encoder = lux.LuxEncoder(SIZE, 3, max_robots, group_by, safe_masks)
        self.memory, self.options = Memory(plain(without_robots), 3, max_robots), (group_by, safe_masks)
        self.out = self.encoder.arrays()
        self.encoder.reset(without_robots)
        self.see(first)

    def see(self, obs):
        """Encode and compare; objections of player 0's entities, id -> action -> set."""
        self.encoder.encode(obs, self.out)
        self.memory.see(plain(obs))
        self.sides = [Side(self.memory, player) for player in lux.PLAYERS]
        views = [{key: array[team] for key, array in self.out.items()} for team in range(2)]
        self.objections, _ = (compare(side, view, *self.options) for side, view in zip(self.sides, views))
        return self.objections

    def may(self, id, action):
        """What the encoder says."""
        actions = lux.ROBOT_ACTIONS if id in self.sides[0].robots else lux.FACTORY_ACTIONS
        return bool(self.out["action_mask"][0, self.memory.slot["player_0"][id], actions.index(action)])


def case(objection, action, who, instead=None, changed=(), **situation):
    """Arguments of a test: (objection, action, situation in which it alone forbids the action, one without it).

    Args:
        who: the robot or the factory that acts.
        instead: the one that acts in the other situation, if it is not the same.
        changed, situation: arguments of `official` and `max_robots`; "robots" or "factories" are others than `who`.
            What is not changed is the same in both.
    """
    kind, changed = "robots" if action in lux.ROBOT_ACTIONS else "factories", dict(changed)
    others = situation.pop(kind, [])
    forbidding = situation | {kind: [who, *others]}
    return objection, action, forbidding, forbidding | changed | {kind: [instead or who, *changed.get(kind, others)]}


def at_home(**stocks):
    """The factory that is there if nothing else is said."""
    return factory(10, 10, **stocks)


def strain(number, cells, amount=10):
    return {cell: (amount, number) for cell in cells}


LEFT, DIGGING = [[0, 4, 0, 0, 0, 5]], [[3, 0, 0, 0, 0, 5]]  # queues
ROW = [(x, 2) for x in range(2, 20)]  # cells far from any factory
FIVE = strain(0, [(2, 20), (4, 20), (6, 20), (8, 20), (10, 20)])  # cells that do not spread
HOLE = {"ice": [(14, 10)]}  # where a robot at (14, 10) digs

CASES = [
    # An order costs 1 (heavy: 10), a move 1 (20) and 0.05 (1) for each unit of rubble, rounded down; a dig 5 (60).
    case("power", "move_left", robot(14, 10, power=1), robot(14, 10, power=2)),
    case("power", "move_left", heavy(14, 10, power=29), heavy(14, 10, power=30)),
    case("power", "move_left", robot(14, 10, power=1), robot(14, 10, power=1, queue=LEFT)),  # goes on free
    case("power", "move_left", robot(14, 10, power=0, queue=LEFT), robot(14, 10, power=1, queue=LEFT)),
    case("power", "move_left", robot(14, 10, power=2), rubble={(13, 10): 20}, changed={"rubble": {(13, 10): 19}}),
    case("power", "move_left", heavy(14, 10, power=30), rubble={(13, 10): 1}, changed={"rubble": {(14, 10): 1}}),
    case("power", "move_right", robot(6, 10, power=2), rubble={(7, 10): 20}, changed={"rubble": {(5, 10): 20}}),
    case("power", "move_up", robot(10, 14, power=2), rubble={(10, 13): 20}, changed={"rubble": {(10, 15): 20}}),
    case("power", "move_down", robot(10, 6, power=2), rubble={(10, 7): 20}, changed={"rubble": {(10, 5): 20}}),
    case("power", "dig", robot(14, 10, power=5), robot(14, 10, power=6)),
    case("power", "dig", heavy(14, 10, power=69), heavy(14, 10, power=70)),
    case("power", "dig", robot(14, 10, power=5), robot(14, 10, power=5, queue=DIGGING)),
    case("power", "deliver", robot(12, 10, power=0, ice=1), robot(12, 10, power=1, ice=1)),
    case("power", "deliver", heavy(12, 10, power=9, ore=1), heavy(12, 10, power=10, ore=1)),
    case("power", "pick_up_power", robot(11, 10, power=0), robot(11, 10, power=1)),
    case("power", "pick_up_power", heavy(11, 10, power=9), heavy(11, 10, power=10)),
    case("edge", "move_left", robot(0, 5), robot(1, 5)),
    case("edge", "move_right", robot(23, 5), robot(22, 5)),
    case("edge", "move_up", robot(5, 0), robot(5, 1)),
    case("edge", "move_down", robot(5, 23), robot(5, 22)),
    case("opponent's factory", "move_right", robot(17, 20), robot(16, 20)),
    case("opponent's factory", "move_left", robot(21, 20), robot(22, 20)),
    case("opponent's factory", "move_down", robot(18, 17), robot(17, 17)),
    case("opponent's factory", "move_up", robot(20, 21), robot(21, 21)),
    case("on a factory", "dig", robot(11, 10), robot(12, 10)),
    case("no cargo", "deliver", robot(12, 10), robot(12, 10, ice=1)),
    case("no cargo", "deliver", robot(10, 10), robot(10, 10, ore=1)),
    case("no factory", "deliver", robot(13, 10, ice=1), robot(12, 10, ice=1)),
    case("no factory", "deliver", robot(7, 10, ice=1), robot(8, 10, ice=1)),
    case("no factory", "deliver", robot(10, 13, ice=1), robot(10, 12, ice=1)),
    case("no factory", "deliver", robot(10, 7, ice=1), robot(10, 8, ice=1)),
    case("no factory", "deliver", robot(12, 12, ice=1), robot(12, 11, ice=1)),
    case("no factory", "deliver", robot(17, 19, ice=1), robot(10, 8, ice=1)),  # beside the opponent's
    case("no factory", "pick_up_power", robot(12, 10), robot(11, 10)),
    case(
        "no power there",
        "pick_up_power",
        robot(11, 10),
        factories=[at_home(power=0)],
        changed={"factories": [at_home(power=1)]},
    ),
    case("metal", "build_light", at_home(metal=9), at_home(metal=10)),
    case("metal", "build_heavy", at_home(metal=99), at_home(metal=100)),
    case("power", "build_light", at_home(power=49), at_home(power=50)),
    case("power", "build_heavy", at_home(power=499), at_home(power=500)),
    case("slots", "build_light", at_home(), robots=[heavy(5, 5)], max_robots=1, changed={"max_robots": 2}),
    case("slots", "build_heavy", at_home(), robots=[robot(5, 5)], max_robots=1, changed={"robots": []}),
    case("water", "water_lichen", at_home(water=1), at_home(water=2)),
    # 1. Who stands on the cell that is stepped onto.
    case("1: own robot", "move_left", robot(14, 9), robots=[robot(13, 9)], changed={"robots": [robot(13, 10)]}),
    case("1: own robot", "move_right", robot(14, 9), robots=[heavy(15, 9)], changed={"robots": [heavy(15, 8)]}),
    case("1: own robot", "move_down", heavy(14, 9), robots=[robot(14, 10)], changed={"robots": [robot(14, 11)]}),
    case("1: own robot", "move_up", heavy(14, 9), robots=[heavy(14, 8)], changed={"robots": [heavy(14, 10)]}),
    case(
        "1: own robot", "move_up", robot(14, 9), robots=[robot(14, 8)], changed={"robots": [], "theirs": [robot(14, 8)]}
    ),
    # 2. The centre of an own factory, and cells beside it.
    case("2: centre of a factory", "move_left", robot(11, 10), robot(11, 11)),
    case("2: centre of a factory", "move_right", robot(9, 10), robot(8, 10)),
    case("2: centre of a factory", "move_down", heavy(10, 9), heavy(10, 8)),
    case("2: centre of a factory", "move_up", heavy(10, 11), heavy(9, 11)),
    # 3. Building: a robot in the way; metal for the first heavy one; slots for the others' first heavy ones.
    case(
        "3: the centre is taken", "build_light", at_home(), robots=[robot(10, 10)], changed={"robots": [robot(10, 11)]}
    ),
    case(
        "3: the centre is taken", "build_heavy", at_home(), robots=[heavy(10, 10)], changed={"robots": [heavy(11, 10)]}
    ),
    case("3: metal of the first heavy", "build_light", at_home(metal=109), at_home(metal=110)),
    case("3: metal of the first heavy", "build_light", at_home(metal=100), at_home(metal=99)),
    case("3: metal of the first heavy", "build_light", at_home(metal=109), at_home(metal=109, power=499)),
    case(
        "3: metal of the first heavy",
        "build_light",
        at_home(metal=100),
        robots=[robot(5, 5)],
        changed={"robots": [heavy(5, 5)]},
    ),
    *(
        case(
            "3: last slots",
            "build_light",
            at_home(),
            robots=[heavy(8, 5)],
            factories=[factory(2, 20, metal=100, power=500)],
            max_robots=2,
            changed=changed,
        )
        for changed in (
            {"factories": [factory(2, 20, metal=99, power=500)]},
            {"factories": [factory(2, 20, metal=100, power=499)]},
            {"max_robots": 3},
            {"robots": [heavy(8, 5), heavy(2, 17)], "max_robots": 3},  # the other has a heavy one too
        )
    ),
    case("3: last slots", "build_light", at_home(), max_robots=1, changed={"max_robots": 2}),  # its own first heavy one
    # 4. Digging: what there is to gain.
    case("4: bare ground", "dig", robot(14, 10), changed=HOLE),
    case("4: bare ground", "dig", heavy(14, 10), ice=[(14, 11)], changed={"ore": [(14, 10)]}),
    case("4: own lichen", "dig", robot(14, 10), lichen={(14, 10): (5, 0)}, changed={"lichen": {(14, 10): (5, 1)}}),
    case("4: rubble on bare ground", "dig", robot(14, 10), rubble={(14, 10): 1}, changed=HOLE),
    case("4: rubble on bare ground", "dig", heavy(14, 10), rubble={(14, 10): 99}, changed={"ore": [(14, 10)]}),
    case("4: cargo full of ice", "dig", robot(14, 10, ice=100), robot(14, 10, ice=99, ore=100), **HOLE),
    case("4: cargo full of ice", "dig", heavy(14, 10, ice=1000), heavy(14, 10, ice=999), **HOLE),
    case("4: cargo full of ice", "dig", heavy(14, 10, ice=1000), changed={"rubble": {(14, 10): 1}}, **HOLE),
    case("4: cargo full of ore", "dig", robot(14, 10, ore=100), robot(14, 10, ore=99, ice=100), ore=[(14, 10)]),
    case("4: cargo full of ore", "dig", heavy(14, 10, ore=1000), heavy(14, 10, ore=999), ore=[(14, 10)]),
    # 5. Digging: what it costs, then the steps to the factory's edge, then orders for one line or two, and one there.
    *(
        case("5: digging", "dig", unit(*here, power=power - 1), unit(*here, power=power), ice=[here])
        for unit, here, power in (
            (robot, (14, 10), 6 + 3 + 2 + 1),  # 3 steps in one line count as two lines
            (robot, (14, 13), 6 + 5 + 2 + 1),
            (robot, (12, 10), 6 + 1 + 1 + 1),
            (heavy, (14, 10), 70 + 3 * 20 + 20 + 10),
            (heavy, (9, 8), 70 + 1 * 20 + 10 + 10),
        )
    ),
    case("5: digging", "dig", robot(14, 10, power=11), robot(14, 10, power=11, queue=DIGGING), **HOLE),
    # 5. Stepping away: the order and the move, and the same way home from there. A step aside leads away too.
    *(
        case("5: stepping away", action, unit(*here, power=power - 1), unit(*here, power=power), rubble=rubble)
        for action, unit, here, power, rubble in (
            ("move_right", robot, (14, 10), 2 + 4 + 2 + 1, {}),
            ("move_left", robot, (7, 10), 2 + 3 + 2 + 1, {}),
            ("move_up", robot, (10, 7), 2 + 3 + 2 + 1, {}),
            ("move_down", robot, (10, 13), 2 + 3 + 2 + 1, {}),
            ("move_right", robot, (11, 11), 2 + 1 + 1 + 1, {}),  # down from the factory
            ("move_up", robot, (11, 11), 2 + 0 + 0 + 1, {}),  # on the factory
            ("move_up", robot, (14, 10), 2 + 3 + 2 + 1, {}),  # along its edge, as far away as before
            ("move_right", heavy, (12, 14), 30 + 5 * 20 + 20 + 10, {}),
            ("move_right", heavy, (12, 14), 30 + 7 + 5 * 20 + 20 + 10, {(13, 14): 7, (12, 13): 9}),  # none on the way
        )
    ),
    case("5: stepping away", "move_right", robot(14, 10, power=2), robot(6, 10, power=2)),
    # 6. Picking up less than 10 (heavy: 100), for lack of room, with the order's 1 (10) paid, or for lack of power.
    case("6: little power", "pick_up_power", robot(11, 9, power=142), robot(11, 9, power=141)),
    case("6: little power", "pick_up_power", heavy(9, 9, power=2911), heavy(9, 9, power=2910)),
    *(
        case(
            "6: little power",
            "pick_up_power",
            unit,
            factories=[at_home(power=least - 1)],
            changed={"factories": [at_home(power=least)]},
        )
        for unit, least in ((robot(9, 11), 10), (heavy(9, 11), 100))
    ),
    # 7. Watering: 2 water for the 12 cells at the edge and up to 8 more.
    *(
        case("7: water would not last", "water_lichen", at_home(water=least - 1), at_home(water=least), time=time)
        for time, least in ((0, 202), (800, 202), (801, 201), (900, 102), (999, 3))
    ),
    *(
        case("7: water would not last", "water_lichen", at_home(water=202), lichen=lichen, changed={"lichen": less})
        for lichen, less in (
            (strain(0, ROW[:9]), strain(0, ROW[:8])),
            (strain(0, ROW[:9]), strain(0, ROW[:8]) | strain(1, ROW[8:])),  # the opponent's
            (FIVE | {(14, 20): (18, 0)}, FIVE | {(14, 20): (17, 0)}),
            (FIVE | {(14, 20): (18, 0)}, FIVE | {(14, 20): (18, 1)}),
            # Nothing grows beyond the corners of the board.
            *((FIVE | {(12, 2): (50, 0)}, FIVE | {(x, y): (50, 0)}) for x in (0, SIZE - 1) for y in (0, SIZE - 1)),
        )
    ),
]


@pytest.mark.parametrize(
    "objection, action, forbidding, allowing", CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_one_objection_decides(objection, action, forbidding, allowing):
    """With the one objection the action is masked; in the other situation there is none, and it is allowed.

    What a rule of the safe masks forbids is allowed without them.
    """
    is_rule, id = objection[0].isdigit(), "unit_10" if action in lux.ROBOT_ACTIONS else "factory_0"
    for situation, against in ((forbidding, {objection}), (allowing, set())):
        for safe_masks in (True, False):
            options = {"max_robots": 5} | situation
            watched = Watched(official(**options), options["max_robots"], safe_masks)
            objections = watched.objections[id] if is_rule else without_rules(watched.objections[id])
            assert objections[action] == against
            if safe_masks == is_rule:
                assert watched.may(id, action) == (not against)
            elif is_rule:
                assert watched.may(id, action)


def test_withered_lichen_counts_for_one_step():
    """Watering costs 3 with 9 cells of lichen, and with these just withered, but only 2 one step later."""
    factories = [factory(10, 10, water=202)]
    grown, withered = official(factories=factories, lichen=strain(0, ROW[:9])), official(factories=factories)
    watched = Watched(grown, 5, safe_masks=True)
    for obs, may in ((grown, False), (withered, False), (withered, True), (grown, False)):
        watched.see(obs)
        assert watched.may("factory_0", "water_lichen") == may


def test_nothing_of_the_last_match_is_left():
    """One encoder, a second match with other ice, ore, factories, lichen and robots: all is that of the new match."""
    first = official(
        [robot(5, 5), heavy(6, 6)], ice=[(5, 5)], ore=[(7, 7)], lichen=strain(0, ROW[:9]), rubble={(1, 1): 9}
    )
    second = official([], [factory(3, 20), factory(20, 3)], time=0, ice=[(8, 9)])
    watched = Watched(first, 5, safe_masks=True)
    watched.memory = Memory(plain(second), 3, 5)
    watched.encoder.reset(second)
    watched.see(second)
    watched.see(second | {"units": official([heavy(3, 20), robot(20, 3)])["units"]})
    assert watched.memory.slot["player_0"]["unit_10"] == 3


@pytest.mark.parametrize("safe_masks", [True, False])
def test_giving_way(safe_masks):
    """Of own robots that step onto one cell the first goes; opponents and robots of other matches do not matter."""
    robots = [robot(14, 5), robot(15, 6), robot(13, 6, queue=[[0, 2, 0, 0, 0, 3]]), robot(14, 7), robot(5, 5)]
    obs = official(robots, theirs=[robot(14, 5), robot(13, 5)])
    encoder = lux.LuxEncoder(SIZE, 3, 5, safe_masks=safe_masks, num_matches=2)
    out = encoder.arrays()
    for match in range(2):
        encoder.reset(obs | {"units": {player: {} for player in lux.PLAYERS}}, match)
    encoder.encode_rows([lux.read_observation(obs)] * 2, out)
    actions = np.zeros(out["kind"].shape, np.int64)
    down, left, right, up = (lux.ROBOT_ACTIONS.index(f"move_{name}") for name in ("down", "left", "right", "up"))
    actions[:, 3:] = down, left, right, up, left  # the first four all step onto (14, 6)
    actions[1::2, 3:] = down, 0, 0, 0, 0
    actions[1::2, 4] = right
    for team, sent in enumerate(encoder.orders(actions)):
        rows = {id: order.tolist() for id, order in sent.items()}
        if team % 2:
            assert {id: rows[id][0][:2] for id in rows} == {"unit_15": [0, 3], "unit_16": [0, 2]}
        elif safe_masks:  # the second waits, the third stops, the fourth waits
            assert {id: row and row[0][:2] for id, row in rows.items()} == {
                "unit_10": [0, 3],
                "unit_12": [],
                "unit_14": [0, 4],
            }
        else:
            assert {id: row[0][:2] for id, row in rows.items()} == {
                "unit_10": [0, 3],
                "unit_11": [0, 4],
                "unit_13": [0, 1],
                "unit_14": [0, 4],
            }
    assert encoder.right_of_way.tolist() == ([3, 0, 3, 0] if safe_masks else [0] * 4)


# ------------------------------------------------------------------------------------------------------
# Placement
# ------------------------------------------------------------------------------------------------------


def gaussian_sum(board, x, y, sigma):
    """Sum of the values of all cells, each times exp(-d^2 / 2 sigma^2), d its distance from (x, y)."""
    total = 0
    for i, row in enumerate(board):
        for j, value in enumerate(row):
            if value:
                total += value * math.exp(-((i - x) ** 2 + (j - y) ** 2) / (2 * sigma**2))
    return total


def score(obs, x, y):
    """How good a cell is as the centre of a factory; -inf where the game forbids it."""
    board = obs["board"]
    if not board["valid_spawns_mask"][x][y]:
        return -math.inf
    width, height = len(board["ice"]), len(board["ice"][0])
    centres = [factory["pos"] for player in lux.PLAYERS for factory in obs["factories"][player].values()]
    factories = [[[i, j] in centres for j in range(height)] for i in range(width)]
    free = [
        [not (board["rubble"][i][j] or board["ice"][i][j] or board["ore"][i][j]) for j in range(height)]
        for i in range(width)
    ]
    total = 4.0 * min(gaussian_sum(board["ice"], x, y, 1.2), 0.6)
    total += 0.5 * min(gaussian_sum(board["ice"], x, y, 4.0), 3.0)
    total += 0.1 * min(gaussian_sum(board["ore"], x, y, 4.0), 3.0)
    total += 0.004 * gaussian_sum(free, x, y, 3.0)
    total -= 0.0004 * gaussian_sum(board["rubble"], x, y, 2.0)
    total -= 0.6 * gaussian_sum(factories, x, y, 6.0)
    # Steps from the edge of the factory's 3 x 3 cells to the ice, at most 6.
    ways = [
        max(abs(i - x) - 1, 0) + max(abs(j - y) - 1, 0)
        for i in range(width)
        for j in range(height)
        if board["ice"][i][j]
    ]
    return total - min([*ways, 6])


def test_gaussian_filter():
    """On a board that is not square, and with values of both signs."""
    rng = np.random.default_rng(0)
    board = rng.normal(size=(7, 12))
    for sigma in (0.5, 1.2, 4.0):
        expected = [[gaussian_sum(board.tolist(), x, y, sigma) for y in range(12)] for x in range(7)]
        np.testing.assert_allclose(lux.gaussian_filter(board, sigma), expected, rtol=1e-9)


def test_placement_score():
    """On a made-up board with a little ice and much ore, and on one the other way round."""
    rng = np.random.default_rng(1)
    for ice, ore in ((0.02, 0.2), (0.1, 0.02)):
        shape = (15, 12)
        board = {
            "ice": rng.random(shape) < ice,
            "ore": rng.random(shape) < ore,
            "valid_spawns_mask": rng.random(shape) < 0.9,
        }
        board["rubble"] = rng.integers(1, 101, shape) * (rng.random(shape) < 0.6)
        factories = [{"factory_0": {"pos": np.array([3, 9])}}, {"factory_1": {"pos": np.array([11, 4])}}]
        obs = {"board": board, "factories": dict(zip(lux.PLAYERS, factories))}
        seen = plain(obs)
        expected = [[score(seen, x, y) for y in range(shape[1])] for x in range(shape[0])]
        np.testing.assert_allclose(lux.placement_score(obs), expected, rtol=1e-9)
        far = [[gaussian_sum(seen["board"]["rubble"], x, y, 4.0) for y in range(shape[1])] for x in range(shape[0])]
        for_lichen = lux.placement_score(obs, grow_lichen=True)
        np.testing.assert_allclose(for_lichen, np.array(expected) - 0.0004 * np.array(far), rtol=1e-9)
        assert np.isneginf(expected).any()


@pytest.mark.parametrize("bids", [(0, 0), (0, 4)])
def test_early_phase_action(bids):
    """Bids of 0, then each player at its turn: the best cell, water and metal shared out, nothing out of turn.

    Whoever bids more (by this test, not by the wrapper) places first, and has less to share out.
    """
    engine = LuxAI_S2(map_size=24, MIN_FACTORIES=2, MAX_FACTORIES=2, verbose=0)
    obs, placed = engine.reset(seed=3)[0]["player_0"], []
    for player in lux.PLAYERS:
        assert lux.early_phase_action(obs, player).items() >= {"bid": 0}.items()
    actions = {player: lux.early_phase_action(obs, player) | {"bid": bid} for player, bid in zip(lux.PLAYERS, bids)}
    assert len({action["faction"] for action in actions.values()}) == 2
    obs = engine.step(actions)[0]["player_0"]
    assert obs["teams"]["player_0"]["place_first"] == (bids == (0, 0))
    while obs["real_env_steps"] < 0:
        first = obs["teams"]["player_0"]["place_first"] == (engine.env_steps % 2 == 1)
        turn, seen = lux.PLAYERS[0 if first else 1], plain(obs)
        actions = {player: lux.early_phase_action(obs, player) for player in lux.PLAYERS}
        team, action = obs["teams"][turn], actions[turn]
        assert actions[OTHER[turn]] == {} and action.keys() == {"spawn", "water", "metal"}
        assert all(action[name] == team[name] // team["factories_to_place"] for name in ("water", "metal"))

        def in_other_case(**changes):
            return lux.early_phase_action(obs | {"teams": {turn: team | changes}}, turn)

        assert in_other_case(factories_to_place=0) == {}
        assert in_other_case(water=301, metal=250, factories_to_place=3).items() >= {"water": 100, "metal": 83}.items()
        best = max(score(seen, x, y) for x in range(24) for y in range(24))
        assert score(seen, *action["spawn"].tolist()) == pytest.approx(best)
        placed.append((turn, action["water"]))
        obs = engine.step(actions)[0]["player_0"]
    assert [len(obs["factories"][player]) for player in lux.PLAYERS] == [2, 2]
    water = {player: 150 - bid // 2 for player, bid in zip(lux.PLAYERS, bids)}
    assert placed == 2 * sorted(water.items(), reverse=bids != (0, 0))
    for player in lux.PLAYERS:
        assert obs["teams"][player]["water"] == obs["teams"][player]["metal"] == 0


# ------------------------------------------------------------------------------------------------------
# Rewards and metrics
# ------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "ice_dug": 0.004,
    "ore_dug": 0.0004,
    "ice_delivered": 0.004,
    "ore_delivered": 0.0008,
    "rubble_cleared": 0.0,
    "robot_lost": -0.05,
    "water_made": 0.004,
    "metal_made": 0.004,
    "lichen_grown": 0.0001,
    "survived": 0.001,
    "factory_lost": -0.2,
}


def test_weights():
    assert lux.REWARDS == WEIGHTS


def robot_achievements(side, id, action, lost):
    """Term -> amount for a robot that does this, and (factory, resource, amount) of what it delivers or None.

    Digging without rubble or lichen fills the hold, as far as there is space. A robot that is lost in this step has
    dug and delivers all the same.
    """
    robot = side.robots[id]
    (x, y), cargo, config = robot["pos"], robot["cargo"], GAME.ROBOTS[robot["unit_type"]]
    achieved, delivered = Counter(), None
    if action == "dig" and not side.rubble[x][y] and not side.lichen[x][y]:
        for resource, cells in (("ice", side.ice), ("ore", side.ore)):
            if (x, y) in cells:
                achieved[f"{resource}_dug"] = min(config.DIG_RESOURCE_GAIN, config.CARGO_SPACE - cargo[resource])
    if action == "deliver":
        resource = "ore" if cargo["ore"] > cargo["ice"] else "ice"
        achieved[f"{resource}_delivered"] = cargo[resource]
        around = [(x, y), *((x + dx, y + dy) for dx, dy in MOVES.values())]
        (factory,) = {side.area[cell] for cell in around if cell in side.area}
        delivered = factory, resource, cargo[resource]
    if lost:
        achieved["robot_lost"] = {"LIGHT": 0.1, "HEAVY": 1}[robot["unit_type"]]
    return achieved, delivered


def lichen_of(board, strain):
    """Sum of the lichen of a factory."""
    rows = zip(board["lichen"], board["lichen_strains"])
    return sum(lichen for row, owners in rows for lichen, owner in zip(row, owners) if owner == strain)


def factory_achievements(side, id, arrived, after):
    """Term -> amount for a factory to which this has been delivered: refined, grown, and whether it is still there."""
    factory, achieved = side.factories[id], Counter()
    ice, ore = (factory["cargo"][name] + arrived[id, name] for name in ("ice", "ore"))
    achieved["water_made"] = min(ice, GAME.FACTORY_PROCESSING_RATE_WATER) // GAME.ICE_WATER_RATIO
    achieved["metal_made"] = min(ore, GAME.FACTORY_PROCESSING_RATE_METAL) // GAME.ORE_METAL_RATIO
    strain = factory["strain_id"]
    achieved["lichen_grown"] = lichen_of(after["board"], strain) - lichen_of(side.memory.obs["board"], strain)
    achieved["survived" if id in after["factories"][side.player] else "factory_lost"] = 1
    return achieved


class Account:
    """What a team has achieved in a match, from its observations and actions alone."""

    def __init__(self, side):
        self.player, self.placed = side.player, len(side.factories)
        self.total, self.built, self.events = Counter(), Counter(), Counter()
        self.steps_alive = self.lost = self.collisions = self.earned = 0

    def book(self, side, row, after, safe_masks):
        """Add a step with the actions `row` [E] that led to the observation `after`; slot -> reward."""
        alive = after["units"][self.player]
        actions = {id: lux.ROBOT_ACTIONS[row[side.slot[id]]] for id in side.robots}
        actions = giving_way(side, actions)[0] if safe_masks else actions
        achieved, arrived, ends = {}, Counter(), []  # ends: where each robot ends the step, and whether it is alive
        for id, action in actions.items():
            achieved[id], delivered = robot_achievements(side, id, action, id not in alive)
            if delivered:
                factory, resource, amount = delivered
                self.events["delivered to the same"] += (factory, resource) in arrived
                self.events["delivered elsewhere"] += factory != side.home[id]
                arrived[factory, resource] += amount
            (x, y), (dx, dy) = side.robots[id]["pos"], MOVES.get(action, (0, 0))
            ends.append(((x + dx, y + dy), id in alive))
        for id, factory in side.factories.items():
            achieved[id] = factory_achievements(side, id, arrived, after)
            action = lux.FACTORY_ACTIONS[row[side.slot[id]]]
            if action.startswith("build"):
                self.built[action] += 1
                there = [new for new, robot in alive.items() if robot["pos"] == factory["pos"]]
                ends.append((tuple(factory["pos"]), not side.robots.keys() >= set(there)))
        cells = Counter(cell for cell, _ in ends)
        for cell, survived in ends:
            self.lost += not survived
            self.collisions += not survived and cells[cell] > 1
        self.steps_alive += len(after["factories"][self.player])
        rewards = {}
        for id, terms in achieved.items():
            self.total.update(terms)
            rewards[side.slot[id]] = sum(WEIGHTS[term] * amount for term, amount in terms.items())
        self.earned += sum(rewards.values())
        return rewards

    def metrics(self, memory, after):
        """Those of the whole match, which has ended with the observation `after`."""
        own = [strain for strain, player in memory.owner.items() if player == self.player]
        return {
            "r": self.earned,
            "ice_transferred": self.total["ice_delivered"],
            "ice_per_factory": self.total["ice_delivered"] / self.placed,
            "factories_alive": self.steps_alive / GAME.max_episode_length,
            "factories_alive_share": self.steps_alive / GAME.max_episode_length / self.placed,
            "factories_placed": self.placed,
            "water": self.total["water_made"],
            "ore": self.total["ore_delivered"],
            "metal": self.total["metal_made"],
            "lichen": sum(lichen_of(after["board"], strain) for strain in own),
            "lights_built": self.built["build_light"],
            "heavies_built": self.built["build_heavy"],
            "robots_lost": self.lost,
            "own_collisions": self.collisions,
        }


def jump(engine, step):
    """Go on with another step of the match."""
    engine.state.env_steps += step - engine.state.real_env_steps
    engine.env_steps = engine.state.env_steps


def plenty(engine, thirst):
    """A function that lets a match begin late, with much metal and power and free ground.

    The second factory of each team will die of thirst, with `thirst` all of player 1 die.
    """

    def change(state):
        if state.real_env_steps:
            return
        board, (_, factories) = state.board, entities(state)
        second = [list(state.factories[player].values())[1] for player in lux.PLAYERS]
        for factory in factories:
            x, y = factory.pos.pos
            board.rubble[max(x - 4, 0) : x + 5, max(y - 4, 0) : y + 5] = 0
            factory.cargo.metal, factory.power, factory.cargo.water = 250, 5000, 400
            if factory in second or (thirst and factory.team_id == 1):
                factory.cargo.water = 40
        jump(engine, 860)

    return change


def let_die(factories):
    """They are gone after the next step."""
    for factory in factories:
        factory.cargo.water = factory.cargo.ice = 0


def test_a_match_is_followed_by_the_next_map():
    """Held-out maps: match i of N plays seed + i, then seed + i + N, and after the last one comes map 0."""
    env, matches = in_process(2, held_out=True)
    obs, _ = env.reset(seed=lux.HELD_OUT_SEEDS - 1)
    for seeds in ([lux.HELD_OUT_SEEDS - 1, 0], [1, 2], [3, 4]):
        assert [match.seed for match in matches] == seeds
        ice = [plain(match.engine.state.get_obs())["board"]["ice"] for match in matches]
        for match in matches:
            let_die(entities(match.engine.state)[1])
        _, _, terminated, *_ = env.step(np.zeros(obs["kind"].shape, np.int64))
        assert terminated.all()
        assert ice != [plain(match.engine.state.get_obs())["board"]["ice"] for match in matches]
    env.close()


@pytest.mark.parametrize("safe_masks, resources", [(True, ("ice", "ore")), (False, ("ore", "ice"))])
def test_rewards(safe_masks, resources):
    """Three matches: every entity's reward at every step, and all metrics at the end of each match."""
    options = dict(min_factories=3, max_factories=4, max_robots=12, safe_masks=safe_masks)
    env, matches = in_process(3, **options)
    rng, seen = np.random.default_rng(5), [Counter(), Counter()]
    for index, match in enumerate(matches):
        after_every_step(match, plenty(match.engine, thirst=index == 1))

    def begin(match):
        first = plain(match.engine.state.get_obs())
        memory = Memory(first, options["max_factories"], options["max_robots"])
        memory.see(first)
        return memory, [Account(Side(memory, player)) for player in lux.PLAYERS]

    obs, _ = env.reset(seed=8)
    books = [begin(match) for match in matches]
    for _ in range(170):
        states = [match.engine.state for match in matches]
        by_script = rng.random(obs["kind"].shape) < 0.8
        actions = np.where(by_script, scripted(obs, resources), masked_random(rng, obs["action_mask"]))
        obs, rewards, terminated, _, infos = env.step(actions)
        for index, (memory, accounts) in enumerate(books):
            after = plain(states[index].get_obs())
            for team, (player, account) in enumerate(zip(lux.PLAYERS, accounts)):
                expected = np.zeros(rewards.shape[-1])
                of_slot = account.book(Side(memory, player), actions[index, team].tolist(), after, safe_masks)
                expected[list(of_slot)] = list(of_slot.values())
                np.testing.assert_allclose(rewards[index, team], expected, rtol=1e-5, atol=1e-7)
                if terminated[index]:
                    metrics = account.metrics(memory, after)
                    assert metrics.keys() | {"right_of_way", "blocked_builds"} == set(lux.TEAM_METRICS)
                    for name, value in metrics.items():
                        assert infos["episode"][name][index, team] == pytest.approx(value, rel=1e-4), name
                    seen[team].update(account.total | account.events | metrics)
            if terminated[index]:
                assert infos["episode"]["l"][index] == after["real_env_steps"]
                seen[0]["ended by time" if after["real_env_steps"] == GAME.max_episode_length else "lost"] += 1
                books[index] = begin(matches[index])
            else:
                memory.see(after)
    env.close()
    both = ["survived", "lichen", "lichen_grown", "lights_built", "heavies_built"]
    both += [] if safe_masks else ["robot_lost", "robots_lost", "own_collisions"]
    of_ice = ["ice_dug", "ice_delivered", "water_made", "delivered elsewhere", "delivered to the same"]
    of_ore = ["ore_dug", "ore_delivered", "metal_made", "factory_lost"]
    for count, resource in zip(seen, resources):
        for name in both + (of_ice if resource == "ice" else of_ore):
            assert count[name] > 0, (resource, name, count)
    assert seen[0]["ended by time"] and seen[0]["lost"]


# ------------------------------------------------------------------------------------------------------
# Whole matches
# ------------------------------------------------------------------------------------------------------


def teleport(state, rng):
    """Put some robots where something can happen: on ice or ore, with a full hold, at the edge, at their factories."""
    board, (robots, factories) = state.board, entities(state)
    size = board.width
    resources = np.argwhere(board.ice | board.ore)
    edges = [cell for n in range(size) for cell in ((0, n), (n, 0), (size - 1, n), (n, size - 1))]
    beside = [f.pos.pos + (dx, dy) for f in factories for dx in range(-2, 3) for dy in range(-2, 3)]
    for unit in robots:
        places = (resources, resources, edges, beside)[rng.integers(4)]
        x, y = cell = places[rng.integers(len(places))]
        if rng.random() > 0.2 or not (0 <= x < size and 0 <= y < size):
            continue
        at = board.factory_occupancy_map[x, y]
        taken = any(tuple(other.pos.pos) == (x, y) for other in robots)
        if taken or (at != -1 and f"factory_{at}" not in state.factories[unit.team.agent]):
            continue
        board.units_map[board.pos_hash(unit.pos)].remove(unit)
        unit.pos.pos = np.array(cell)
        board.units_map[board.pos_hash(unit.pos)].append(unit)
        if rng.random() < 0.5:
            board.rubble[x, y] = 0
            unit.cargo.ice = unit.cargo.ore = unit.cargo_space - int(rng.integers(2))
            unit.power = unit.battery_capacity


def sow_under_robots(state, rng):
    """Lichen of either team where robots stand."""
    board, (robots, factories) = state.board, entities(state)
    for unit in robots:
        x, y = unit.pos.pos
        free = not (board.rubble[x, y] or board.ice[x, y] or board.ore[x, y] or board.lichen[x, y])
        if rng.random() < 0.1 and free and board.factory_occupancy_map[x, y] == -1:
            board.lichen[x, y], board.lichen_strains[x, y] = rng.integers(1, 40), rng.choice(factories).num_id


def fate(engine, index, rng):
    """What befalls the match with this index: a function that changes the engine's state after each step.

    In matches 0 and 1 everything is possible. Match 2 is played as it is, and starts in the evening. In all of them
    a factory of each team dies of thirst after 25 steps. Match 1 is lost after 40. Match 0 goes on with a later day
    after 40 steps and with the last 20 after 60. The matches that follow are played in the same way.
    """
    age, rich = -1, riches(rng)
    steps = {0: {40: 745, 60: 980}, 1: {}, 2: {1: 26, 55: 76}}[index]

    def change(state):
        nonlocal age
        age = 0 if state.real_env_steps == 0 else age + 1
        if index < 2:
            rich(state)
            teleport(state, rng)
            sow_under_robots(state, rng)
        if age == 25:
            let_die(factory for player in lux.PLAYERS for factory in [*state.factories[player].values()][1:2])
        if index == 1 and age == 40:
            let_die(state.factories["player_1"].values())
        if age in steps:
            jump(engine, steps[age])

    return change


def record(match, sent):
    """Add to the list `sent` what the engine is sent after placement, at each step."""
    step = match.engine.step

    def recorded_step(actions):
        if match.engine.state.real_env_steps >= 0:
            sent.append(actions)
        return step(actions)

    match.engine.step = recorded_step


class Played:
    """A match, one of several in an encoder, and beside it the second computation.

    It counts into `count`, and collects in `values` what was seen in each column, by player.
    """

    def __init__(self, match, index, seed, options):
        self.match, self.index, self.options, self.sent = match, index, options, []
        after_every_step(match, fate(match.engine, index, np.random.default_rng([seed, index])))
        record(match, self.sent)
        self.count, self.values = Counter(), defaultdict(set)

    def observation(self):
        return plain(self.match.engine.state.get_obs())

    def begin(self):
        """A match has begun, and is at its first observation."""
        self.memory = Memory(self.observation(), self.options["max_factories"], self.options["max_robots"])
        self.memory.see(self.observation())
        self.counted = {"right_of_way": [0, 0], "blocked_builds": [0, 0]}  # metrics of this match

    def compare_orders(self, actions):
        """What the engine has just been sent, for actions [P, E]; the newest observation is still that before."""
        for team, player in enumerate(lux.PLAYERS):
            side, count = Side(self.memory, player), Counter()
            sent, row = self.sent[-1][player], actions[team].tolist()
            compare_orders(side, sent, row, self.options["safe_masks"], count)
            self.counted["right_of_way"][team] += count["gave way"]
            self.counted["blocked_builds"][team] += sum(
                not lacks_for(factory, "LIGHT") and not slots_used(side, id, self.options["safe_masks"])
                for id, factory in side.factories.items()
            )
            self.count += count

    def go_on(self, terminated, episode):
        """See the observation after a step, which is that of another match if this one is over."""
        last = self.memory.obs["real_env_steps"] == GAME.max_episode_length - 1
        if terminated:
            for name, numbers in self.counted.items():
                assert episode[name][self.index].tolist() == numbers
                self.count[name] += sum(numbers)
            self.count["ended by time" if last else "lost"] += 1
            self.begin()
        else:
            assert not last
            before = {player: dict(home) for player, home in self.memory.home.items()}
            self.memory.see(self.observation())
            for player, home in self.memory.home.items():
                self.count["robot died"] += len(before[player].keys() - home.keys())
                self.count["joined another"] += sum(
                    before[player].get(id, factory) != factory for id, factory in home.items()
                )

    def compare(self, seen):
        """Arrays [P, ...] of the newest observation."""
        for team, player in enumerate(lux.PLAYERS):
            side, view = Side(self.memory, player), {key: array[team] for key, array in seen.items()}
            objections = compare(side, view, self.options["group_by"], self.options["safe_masks"], self.count)
            for of_action in objections.values():
                for action, against in of_action.items():
                    self.count[player, "allowed", action] += not against
                    for objection in against:
                        is_rule = objection[0].isdigit()
                        alone = {objection} == (against if is_rule else without_rules(of_action)[action])
                        self.count[player, "decides", objection] += alone and (
                            self.options["safe_masks"] or not is_rule
                        )
            for column, name in enumerate(lux.FEATURES):
                self.values[player, name] |= set(view["features"][:, column].round(4).tolist())
            for name, channel in CHANNEL.items():
                self.count[player, "channel", name] += int(view["board"][..., channel].any())
            for factory in self.match.engine.state.factories[player].values():
                assert water_cost(side, factory.num_id) >= factory.water_cost(GAME)
                self.count["lichen to water"] += factory.water_cost(GAME) > 2
            size = len(self.memory.home[player])
            self.count["few robots" if size < 4 else "many robots" if size > 14 else "some robots"] += 1


STAGES = {
    "crowds": dict(map_size=48, min_factories=3, max_factories=5, max_robots=30, group_by="cluster", safe_masks=True),
    "few slots": dict(map_size=48, min_factories=4, max_factories=5, max_robots=6, group_by="entity", safe_masks=True),
    "large": dict(map_size=64, min_factories=4, max_factories=10, max_robots=20, group_by="entity", safe_masks=False),
    "collisions": dict(
        map_size=48, min_factories=3, max_factories=4, max_robots=16, group_by="cluster", safe_masks=False
    ),
}


@pytest.fixture(scope="module")
def found():
    """Of each stage that was played: what was counted, and the values of each column."""
    return {}


@pytest.mark.parametrize("stage", STAGES)
def test_matches(found, stage):
    """Three matches in one encoder: the orders of every step, and all arrays of a match after every third."""
    options, rng, seed = STAGES[stage], np.random.default_rng(3), 1
    env, matches = in_process(3, **options)
    played = [Played(match, index, seed, options) for index, match in enumerate(matches)]
    obs, _ = env.reset(seed=seed)
    for match in played:
        match.begin()
    weights = np.ones(lux.NUM_ACTIONS)
    weights[[lux.WATER, lux.DIG]] = 3, 2
    for step in range(150):
        actions = masked_random(rng, obs["action_mask"], weights)
        actions[obs["kind"] == lux.NOBODY] = rng.integers(1, lux.NUM_ACTIONS)  # nobody heeds them
        obs, _, terminated, _, infos = env.step(actions)
        for index, match in enumerate(played):
            match.compare_orders(actions[index])
            match.go_on(terminated[index], infos.get("episode"))
            if (step + index) % 3 == 0 or terminated[index]:
                match.compare({key: array[index] for key, array in obs.items()})
    env.close()
    values = defaultdict(set)
    for match in played:
        for key, numbers in match.values.items():
            values[key] |= numbers
    found[stage] = sum((match.count for match in played), Counter()), values


def test_everything_was_met(found):
    """In the matches above everything that there is was met by both players, and in many values where it has many."""
    count = sum((count for count, _ in found.values()), Counter())
    objections = {objection for objection, *_ in CASES}
    assert objections == {key[2] for key in count if key[1] == "decides"}  # each one has been tried by hand
    for player in lux.PLAYERS:
        for what, names in (
            ("decides", objections),
            ("allowed", [*lux.ROBOT_ACTIONS, *lux.FACTORY_ACTIONS]),
            ("channel", lux.BOARD_CHANNELS),
        ):
            for name in names:
                assert count[player, what, name] >= 3, (player, what, name)
        for column in lux.FEATURES:
            seen = set().union(*(values[player, column] for _, values in found.values()))
            two = column.startswith(("is_", "on_", "order_", "centre_"))
            assert len(seen) == 2 if two else len(seen) >= 4, (player, column, seen)
    names = ["few robots", "some robots", "many robots", "robot died", "joined another", "lichen to water"]
    names += ["equally near ice", "equally near factories", "ended by time", "lost", "right_of_way", "blocked_builds"]
    names += ["order 0, one", "order 0, many", "order 1, one", "order 2, one", "order 3, one", "order 3, many"]
    names += ["went on", "stopped", "delivered to the side"]
    for name in names:
        assert count[name] >= 3, name
