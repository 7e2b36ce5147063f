"""What the wrapper makes of the game, computed a second time in plain loops, slow and obvious.

Board, features, slots, groups, masks, orders, factory placement, rewards and metrics. Only names are
taken from the wrapper: the numbers of the game come from the engine's EnvConfig, the rules from the
comments beside FEATURES and BOARD_CHANNELS, the docstring of LuxEncoder and the table of rewards. Every
action has a set of objections, in words; it is allowed if there are none. So the tests can count how
often each rule decides alone.

Of cells that are equally near the first one counts, by x, then by y; of factories the one placed first.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from helpers import after_every_step, entities, in_process, masked_random, scripted
from luxai_s2 import LuxAI_S2
from luxai_s2.config import EnvConfig

import lux_wrapper as lux

GAME = EnvConfig()
# In the order of the engine's directions 1 to 4
MOVES = {"move_up": (0, -1), "move_right": (1, 0), "move_down": (0, 1), "move_left": (-1, 0)}
OTHER = {"player_0": "player_1", "player_1": "player_0"}

# ------------------------------------------------------------------------------------------------
# What is seen, and what has to be remembered
# ------------------------------------------------------------------------------------------------


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
    """Key of the first of the nearest places, a dict key -> cell."""
    return min(places, key=lambda key: distance(here, places[key]))


def beside(cell):
    """Move -> the cell where it leads."""
    return {move: (cell[0] + dx, cell[1] + dy) for move, (dx, dy) in MOVES.items()}


class Memory:
    """What no single observation of a match says: slots, who built whom, what has just withered.

    Factories have slots in the order in which they were placed. A robot gets the lowest slot that was
    empty in the observation before. It belongs to the factory in whose centre it appears, and when
    that one is lost to the nearest one.
    """

    def __init__(self, first, options):
        self.robot_slots = range(options.max_factories, options.num_entities)
        self.max_robots = options.max_robots
        self.slot, self.home = {}, {}  # by unit_id; home: of robots
        self.owner = {}  # of strains
        for player in lux.PLAYERS:
            for slot, (id, factory) in enumerate(first["factories"][player].items()):
                self.slot[id] = slot
                self.owner[factory["strain_id"]] = player
        self.obs = first | {"units": {player: {} for player in lux.PLAYERS}}
        self.see(first)

    def see(self, obs):
        """The next observation, or the first one again."""
        self.strains_before = self.obs["board"]["lichen_strains"]
        for player in lux.PLAYERS:
            centres = {id: factory["pos"] for id, factory in obs["factories"][player].items()}
            taken = {self.slot[id] for id in self.obs["units"][player]}
            free = (slot for slot in self.robot_slots if slot not in taken)
            for id, robot in obs["units"][player].items():
                if id not in self.slot:
                    self.slot[id] = next(free)
                if self.home.get(id) not in centres:
                    self.home[id] = nearest(robot["pos"], centres)
        self.obs = obs


class Side:
    """The newest observation as one player sees it."""

    def __init__(self, memory, player):
        self.memory, self.player = memory, player
        self.slot, self.home = memory.slot, memory.home
        obs, other = memory.obs, OTHER[player]
        self.time = obs["real_env_steps"]
        self.robots, self.their_robots = obs["units"][player], obs["units"][other]
        self.factories, self.their_factories = obs["factories"][player], obs["factories"][other]
        self.area = footprint(self.factories)
        self.their_area = footprint(self.their_factories)
        self.centres = {tuple(factory["pos"]) for factory in self.factories.values()}
        self.standing = {tuple(robot["pos"]) for robot in self.robots.values()}
        board = obs["board"]
        self.size = len(board["rubble"])
        self.ice, self.ore = marked(board["ice"]), marked(board["ore"])
        self.rubble = board["rubble"]
        self.lichen, self.strains = board["lichen"], board["lichen_strains"]

    def is_inside(self, cell):
        return 0 <= cell[0] < self.size and 0 <= cell[1] < self.size

    def lichen_of(self, player):
        """Cells where lichen of a player grows."""
        return [(x, y) for x, y in marked(self.lichen) if self.memory.owner[self.strains[x][y]] == player]

    def robots_of(self, factory_id, kind):
        """How many robots of this kind belong to the factory."""
        return sum(self.home[id] == factory_id and r["unit_type"] == kind for id, r in self.robots.items())


def marked(board):
    """Cells that are not 0, in the order of x, then y."""
    return [(x, y) for x, row in enumerate(board) for y, mark in enumerate(row) if mark]


def footprint(factories):
    """Cell -> id of the factory that covers it, of 3 x 3 cells each."""
    area = {}
    for id, factory in factories.items():
        x, y = factory["pos"]
        area |= {(x + i, y + j): id for i in (-1, 0, 1) for j in (-1, 0, 1)}
    return area


# ------------------------------------------------------------------------------------------------
# Board and features
# ------------------------------------------------------------------------------------------------


def channels(side):
    """name -> what this channel shows [H, W], 0 to 100."""

    def draw(cells, values=None):
        board = np.zeros((side.size, side.size), int)
        for x, y in cells:
            board[x, y] = 100 if values is None else values[x][y]
        return board

    def kind_of(kind, robots):
        return [robot["pos"] for robot in robots.values() if robot["unit_type"] == kind]

    return {
        "inside": np.full((side.size, side.size), 100),
        "ice": draw(side.ice),
        "ore": draw(side.ore),
        "rubble": side.rubble,
        "own_lichen": draw(side.lichen_of(side.player), side.lichen),
        "opponent_lichen": draw(side.lichen_of(OTHER[side.player]), side.lichen),
        "own_factory": draw(side.area),
        "opponent_factory": draw(side.their_area),
        "own_light": draw(kind_of("LIGHT", side.robots)),
        "own_heavy": draw(kind_of("HEAVY", side.robots)),
        "opponent_light": draw(kind_of("LIGHT", side.their_robots)),
        "opponent_heavy": draw(kind_of("HEAVY", side.their_robots)),
    }


def log(amount):
    return math.log(1 + amount) / 5


def thousands(amount):
    return min(amount / 1000, 3)


def way(name, here, cells):
    """Steps right, down, and in all to the nearest cell, in cells / 8, at most 1 (and at least -1).

    Where there is no cell, it is far and in no direction.
    """
    if not cells:
        return {f"{name}_distance": 1}
    x, y = min(cells, key=lambda cell: distance(here, cell))
    steps = {"dx": x - here[0], "dy": y - here[1], "distance": distance(here, (x, y))}
    return {f"{name}_{what}": max(-1, min(1, number / 8)) for what, number in steps.items()}


def common_features(side, here, home):
    """Ways to ice, to ore, and to the factory `home`, factories alive in fives, and the clock.

    A day has 30 steps, a night 20, a match 1000.
    """
    in_cycle = side.time % GAME.CYCLE_LENGTH
    return {
        **way("ice", here, side.ice),
        **way("ore", here, side.ore),
        **way("home", here, [home["pos"]]),
        "home_water": log(home["cargo"]["water"]),
        "home_power": thousands(home["power"]),
        "own_factories": len(side.factories) / 5,
        "opponent_factories": len(side.their_factories) / 5,
        "is_day": in_cycle < GAME.DAY_LENGTH,
        "time_in_cycle": in_cycle / GAME.CYCLE_LENGTH,
        "time": side.time / GAME.max_episode_length,
    }


def factory_features(side, id):
    """Name -> value, where it is not 0. The home of a factory is itself."""
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
        **common_features(side, factory["pos"], factory),
    }


def config_of(robot):
    """The engine's numbers for robots of this kind."""
    return GAME.ROBOTS[robot["unit_type"]]


def current_action(robot):
    """The action that its queue continues. Only moves and digs are ordered for more than a step."""
    if not robot["action_queue"]:
        return "stay"
    kind, direction, *_ = robot["action_queue"][0]
    assert kind in (0, 3)
    return "dig" if kind == 3 else list(MOVES)[direction - 1]


def nearest_home(side, robot):
    """The factory of the team that is nearest to a robot."""
    return side.factories[nearest(robot["pos"], {id: f["pos"] for id, f in side.factories.items()})]


def robot_features(side, id):
    """Name -> value, where it is not 0; stocks are shares of what the robot can hold."""
    robot = side.robots[id]
    x, y = here = tuple(robot["pos"])
    config, current = config_of(robot), current_action(robot)
    return {
        "is_light": robot["unit_type"] == "LIGHT",
        "is_heavy": robot["unit_type"] == "HEAVY",
        "power": robot["power"] / config.BATTERY_CAPACITY,
        "ice": robot["cargo"]["ice"] / config.CARGO_SPACE,
        "ore": robot["cargo"]["ore"] / config.CARGO_SPACE,
        "on_ice": here in side.ice,
        "on_ore": here in side.ore,
        "rubble_here": side.rubble[x][y] / 100,
        "order_up": current == "move_up",
        "order_right": current == "move_right",
        "order_down": current == "move_down",
        "order_left": current == "move_left",
        "order_dig": current == "dig",
        **common_features(side, here, nearest_home(side, robot)),
    }


# ------------------------------------------------------------------------------------------------
# Masks and orders. Objections with a number are rules of the safe masks.
# ------------------------------------------------------------------------------------------------


def water_cost(side, strain):
    """Upper bound on the water that watering costs: 1 for each 10 cells, or part of them.

    Cells are the 12 at the factory's edge, those of its strain, and the neighbours of those from
    which it spreads. The engine counts late: a cell that the strain held in the observation before
    still counts, and so does lichen of two less than the 20 that it takes to spread.
    """
    cells = set()
    for x in range(side.size):
        for y in range(side.size):
            if strain in (side.strains[x][y], side.memory.strains_before[x][y]):
                cells.add((x, y))
                if side.lichen[x][y] >= GAME.MIN_LICHEN_TO_SPREAD - 2:
                    cells |= set(filter(side.is_inside, beside((x, y)).values()))
    return math.ceil((12 + len(cells)) / GAME.LICHEN_WATERING_COST_FACTOR)


def lacks_for(factory, kind):
    """What the factory has too little of, "metal" or "power", to build a robot of this kind."""
    config = GAME.ROBOTS[kind]
    metal = {"metal"} if factory["cargo"]["metal"] < config.METAL_COST else set()
    return metal | ({"power"} if factory["power"] < config.POWER_COST else set())


def needs_first_heavy(side, id):
    """Whether a factory has no heavy robot and can build one."""
    return not side.robots_of(id, "HEAVY") and not lacks_for(side.factories[id], "HEAVY")


def payable(side, id, safe_masks):
    """Kinds of robot that a factory can pay for.

    With safe masks only the heavy one, if that would be its first.
    """
    kinds = {kind for kind in ("LIGHT", "HEAVY") if not lacks_for(side.factories[id], kind)}
    return {"HEAVY"} if safe_masks and needs_first_heavy(side, id) else kinds


def slots_for(side, safe_masks):
    """id -> kinds of robot that a factory finds a slot for, if all before it build what they can.

    Safe masks set slots aside for all factories that can build their first heavy robot; if there are
    too few, the earlier factories have them.
    """
    free = side.memory.max_robots - len(side.robots)
    first = [id for id in side.factories if safe_masks and needs_first_heavy(side, id)]
    used, kinds = len(first), {}
    for id in side.factories:
        kinds[id] = {"LIGHT", "HEAVY"} if used < free else set()
        uses = payable(side, id, safe_masks)
        if id in first:
            kinds[id] = kinds[id] - {"HEAVY"} | ({"HEAVY"} if first.index(id) < free else set())
            uses = uses - {"HEAVY"}
        used += len(uses) > 0
    return kinds


def factory_objections(side, id, safe_masks):
    """Action -> what speaks against it, of a factory."""
    factory, objections = side.factories[id], {action: set() for action in lux.FACTORY_ACTIONS}
    for kind in ("LIGHT", "HEAVY"):
        against = objections[f"build_{kind.lower()}"]
        against |= lacks_for(factory, kind)
        if kind not in slots_for(side, safe_masks)[id]:
            against.add("3: last slots" if kind in slots_for(side, False)[id] else "slots")
        elif kind not in slots_for(side, True)[id]:
            against.add("3: last slots")
        if tuple(factory["pos"]) in side.standing:
            against.add("3: the centre is taken")
    if needs_first_heavy(side, id):
        objections["build_light"].add("8: the first heavy")
        if not objections["build_heavy"]:
            objections["nothing"].add("8: the first heavy")
            objections["water_lichen"].add("8: the first heavy")

    water, cost = factory["cargo"]["water"], water_cost(side, factory["strain_id"])
    if water < cost:
        objections["water_lichen"].add("water")
    if water - cost < min(200, GAME.max_episode_length - side.time):
        objections["water_lichen"].add("7: water would not last")
    return objections


def steps_to_edge(cell, factory):
    """Steps from a cell to the nearest cell of the factory."""
    return sum(max(abs(factory["pos"][axis] - cell[axis]) - 1, 0) for axis in (0, 1))


def way_home_cost(config, steps):
    """Power for a way without rubble, with an order for each of two lines, and for an order there."""
    lines = min(steps, 2)  # it may be one line, but the rule does not look at that
    return steps * config.MOVE_COST + (lines + 1) * config.ACTION_QUEUE_POWER_COST


def nothing_to_dig(side, robot):
    """Rule 4: why a dig gains nothing, or None. It meets rubble first, then lichen, then ice and ore."""
    x, y = here = tuple(robot["pos"])
    if side.rubble[x][y]:
        return None if here in side.ice + side.ore else "4: rubble on bare ground"
    if side.lichen[x][y]:
        return "4: own lichen" if here in side.lichen_of(side.player) else None
    for name, cells in (("ice", side.ice), ("ore", side.ore)):
        if here in cells:
            full = robot["cargo"][name] == config_of(robot).CARGO_SPACE
            return f"4: cargo full of {name}" if full else None
    return "4: bare ground"


def power_left(side, robot, action):
    """Power after the action; to continue is free, anything else costs an order."""
    config, left = config_of(robot), robot["power"]
    if action != current_action(robot):
        left -= config.ACTION_QUEUE_POWER_COST
    if action == "dig":
        left -= config.DIG_COST
    if action in MOVES:
        x, y = beside(robot["pos"])[action]
        rubble = side.rubble[x][y] if side.is_inside((x, y)) else 0
        left -= math.floor(config.MOVE_COST + config.RUBBLE_MOVEMENT_COST * rubble)
    return left


def robot_objections(side, id):
    """Action -> what speaks against it, of a robot."""
    robot, objections = side.robots[id], {action: set() for action in lux.ROBOT_ACTIONS}
    config, factory = config_of(robot), nearest_home(side, robot)
    here, around = tuple(robot["pos"]), beside(robot["pos"])
    left = {action: power_left(side, robot, action) for action in lux.ROBOT_ACTIONS}
    for action in lux.ROBOT_ACTIONS:
        if left[action] < 0:
            objections[action].add("power")

    steps = steps_to_edge(here, factory)
    for action, there in around.items():
        against = objections[action]
        if not side.is_inside(there):
            against.add("edge")
            continue
        if there in side.their_area:
            against.add("opponent's factory")
        if there in side.standing:
            against.add("1: own robot")
        if there in side.centres:
            against.add("2: centre of a factory")
        steps_then = steps_to_edge(there, factory)
        if steps_then >= steps and left[action] < way_home_cost(config, steps_then):
            against.add("5: stepping away")

    if here in side.area:
        objections["dig"].add("on a factory")
    if reason := nothing_to_dig(side, robot):
        objections["dig"].add(reason)
    if left["dig"] < way_home_cost(config, steps):
        objections["dig"].add("5: digging")

    if not side.area.keys() & {here, *around.values()}:
        objections["deliver"].add("no factory")
    if robot["cargo"]["ice"] == robot["cargo"]["ore"] == 0:
        objections["deliver"].add("no cargo")

    if here not in side.area:
        objections["pick_up_power"].add("no factory")
    else:
        gain = min(config.BATTERY_CAPACITY - left["pick_up_power"], factory["power"])
        if gain <= 0:
            objections["pick_up_power"].add("no power there")
        if gain < 10 * config.ACTION_QUEUE_POWER_COST:
            objections["pick_up_power"].add("6: little power")
    return objections


def without_rules(objections):
    """Those that hold without the safe masks."""
    return {action: {x for x in against if not x[0].isdigit()} for action, against in objections.items()}


def allowed(objections, safe_masks):
    """Set of the actions allowed. Something always is: who can do nothing else stays."""
    objections = objections if safe_masks else without_rules(objections)
    return {action for action, against in objections.items() if not against} or {"stay"}


def delivery(side, robot):
    """Direction, factory and resource of what a robot delivers; its own cell comes first."""
    cells = [tuple(robot["pos"]), *beside(robot["pos"]).values()]
    direction = next(number for number, cell in enumerate(cells) if cell in side.area)
    resource = "ore" if robot["cargo"]["ore"] > robot["cargo"]["ice"] else "ice"
    return direction, side.area[cells[direction]], resource


def queue(side, robot, action):
    """The orders that make the robot do this.

    An order is: type (0 move, 1 transfer, 2 pick up, 3 dig), direction, resource (0 ice, 1 ore, 4
    power), amount, repeat, times. Moves and digs are ordered as often as the power lasts, with one
    order now and one after; moves are counted as if all were over rubble of 100.
    """
    config = config_of(robot)
    order_cost = config.ACTION_QUEUE_POWER_COST
    spare = robot["power"] - 2 * order_cost
    if action == "stay":
        return []
    if action == "dig":
        return [[3, 0, 0, 0, 0, max(spare // config.DIG_COST, 1)]]
    if action in MOVES:
        worst = math.floor(config.MOVE_COST + config.RUBBLE_MOVEMENT_COST * GAME.MAX_RUBBLE)
        return [[0, 1 + list(MOVES).index(action), 0, 0, 0, max(spare // worst, 1)]]
    if action == "pick_up_power":  # all that it can hold once the order is paid for
        return [[2, 0, 4, config.BATTERY_CAPACITY - (robot["power"] - order_cost), 0, 1]]
    direction, _, resource = delivery(side, robot)
    return [[1, direction, ["ice", "ore"].index(resource), robot["cargo"][resource], 0, 1]]


def robot_actions(side, row, safe_masks):
    """id -> action of the robots, for actions [E], and who gives way to the first on a cell."""
    actions = {id: lux.ROBOT_ACTIONS[row[side.slot[id]]] for id in side.robots}
    goals, waiting = set(), []
    for id, robot in side.robots.items():
        if safe_masks and actions[id] in MOVES:
            goal = beside(robot["pos"])[actions[id]]
            if goal in goals:
                waiting.append(id)
            goals.add(goal)
    return actions | dict.fromkeys(waiting, "stay"), waiting


def factory_actions(side, row):
    """id -> action of the factories."""
    return {id: lux.FACTORY_ACTIONS[row[side.slot[id]]] for id in side.factories}


def compare_orders(side, sent, row, safe_masks, count):
    """What the encoder sent, against the actions chosen, [E]."""
    robots, _ = robot_actions(side, row, safe_masks)
    numbers = {"build_light": 0, "build_heavy": 1, "water_lichen": 2}
    wanted = {id: numbers[do] for id, do in factory_actions(side, row).items() if do != "nothing"}
    for id, robot in side.robots.items():
        current = current_action(robot)
        if robots[id] == current:
            count["continued"] += current != "stay"
            continue
        wanted[id] = queue(side, robot, robots[id])
        count["stopped"] += wanted[id] == []
        for kind, direction, *_, times in wanted[id]:
            count[f"order {kind}, {'many' if times > 1 else 'one'}"] += 1
            count["delivered to the side"] += kind == 1 and direction > 0
    assert {id: np.asarray(order).tolist() for id, order in sent.items()} == wanted
    assert all(sent[id].shape[1:] == (6,) for id in side.robots.keys() & sent.keys())


def compare(side, seen, options):
    """Objections of all entities of a team, id -> action -> set, after all its arrays were compared."""
    for name, board in channels(side).items():
        drawn = seen["board"][..., lux.CHANNEL[name]]
        assert np.array_equal(drawn, board), (side.player, side.time, name)
    live = [side.slot[id] for id in (*side.factories, *side.robots)]
    for name in ("features", "position", "kind", "action_mask"):
        assert not np.delete(seen[name], live, 0).any()

    objections = {}
    for id, entity in (side.factories | side.robots).items():
        slot, where = side.slot[id], (side.player, side.time, id)
        if id in side.factories:
            kind, actions, head = lux.FACTORY, lux.FACTORY_ACTIONS, id
            objections[id] = factory_objections(side, id, options.safe_masks)
            wanted = factory_features(side, id)
        else:
            kind, actions, head = lux.ROBOT, lux.ROBOT_ACTIONS, side.home[id]
            objections[id] = robot_objections(side, id)
            wanted = robot_features(side, id)
        assert seen["kind"][slot] == kind
        assert seen["position"][slot].tolist() == entity["pos"]
        assert seen["group"][slot] == (side.slot[head] if options.group_by == "cluster" else slot)
        for name, value in zip(lux.FEATURES, seen["features"][slot].tolist(), strict=True):
            assert abs(value - wanted.get(name, 0)) < 1e-5, (where, name)
        may = [name in allowed(objections[id], options.safe_masks) for name in actions]
        may += [False] * (lux.NUM_ACTIONS - len(actions))
        assert seen["action_mask"][slot].tolist() == may, (where, actions)
    return objections


# ------------------------------------------------------------------------------------------------
# Situations made up, and placement
# ------------------------------------------------------------------------------------------------

SIZE = 24
LAWS = ("power", "edge", "opponent's factory", "on a factory", "no factory", "no cargo")
LAWS += ("no power there", "metal", "slots", "water")
RULES = ("1: own robot", "2: centre of a factory", "3: the centre is taken", "3: last slots")
RULES += ("4: bare ground", "4: own lichen", "4: rubble on bare ground")
RULES += ("4: cargo full of ice", "4: cargo full of ore", "5: digging", "5: stepping away")
RULES += ("6: little power", "7: water would not last", "8: the first heavy")


def robot(x, y, kind="LIGHT", power=100, ice=0, ore=0, queue=()):
    return {
        "unit_type": kind,
        "pos": np.array([x, y]),
        "power": power,
        "cargo": {"ice": ice, "ore": ore, "water": 0, "metal": 0},
        "action_queue": [np.array(order) for order in queue],
    }


def heavy(x, y, power=1000, **rest):
    return robot(x, y, "HEAVY", power, **rest)


def factory(x, y, power=1000, ice=0, ore=0, water=500, metal=500):
    cargo = {"ice": ice, "ore": ore, "water": water, "metal": metal}
    return {"pos": np.array([x, y]), "power": power, "cargo": cargo}


def official(robots=(), factories=None, theirs=(), time=100, rubble=(), ice=(), ore=(), lichen=()):
    """An official observation of a flat board.

    Args:
        robots, factories: those of player 0; without factories, one with its centre in (10, 10).
        theirs: robots of player 1, whose factory has its centre in (19, 19).
        ice, ore: cells; rubble: cell -> amount.
        lichen: cell -> (amount, strain). Strains are numbered as factories are, player 1 has the last.
    """
    maps = ("rubble", "ice", "ore", "lichen", "lichen_strains")
    board = {name: np.zeros((SIZE, SIZE), int) for name in maps}
    board["lichen_strains"] -= 1
    for name, cells in (("ice", ice), ("ore", ore)):
        for cell in cells:
            board[name][cell] = 1
    for cell, amount in dict(rubble).items():
        board["rubble"][cell] = amount
    for cell, (amount, strain) in dict(lichen).items():
        board["lichen"][cell] = amount
        board["lichen_strains"][cell] = strain

    own = [factory(10, 10)] if factories is None else factories
    numbers, strains = itertools.count(10), itertools.count()
    units = [{f"unit_{n}": unit for unit, n in zip(team, numbers)} for team in (robots, theirs)]
    homes = [
        {f"factory_{n}": home | {"strain_id": n} for home, n in zip(team, strains)} for team in (own, [factory(19, 19)])
    ]
    return {
        "units": dict(zip(lux.PLAYERS, units)),
        "factories": dict(zip(lux.PLAYERS, homes)),
        "board": board,
        "real_env_steps": time,
    }


def strain(number, cells, amount=10):
    return {cell: (amount, number) for cell in cells}


def made_up(rng, factories, ice, ore, robots):
    """A random observation: crowds near factories, and amounts around what things cost."""
    centres = [tuple(factory["pos"]) for factory in factories] + [(19, 19)]
    covered = footprint({cell: {"pos": cell} for cell in centres})
    cells = list(map(tuple, rng.permutation(list(np.ndindex(SIZE, SIZE))).tolist()))
    near = [cell for cell in cells if min(distance(cell, centre) for centre in centres) < 5]
    units, lights = [], rng.choice([0.5, 1])
    for cell in dict.fromkeys([*near[:7], *cells[: rng.integers(4)]]):
        kind, space, step = (robot, 100, 1) if rng.random() < lights else (heavy, 1000, 10)
        power = step * rng.integers(32) if rng.random() < 0.8 else step * rng.integers(135, 151)
        cargo = rng.choice([0, 0, 1, space - 1, space], 2).tolist()
        queues = [], [], [[0, 1 + rng.integers(4), 0, 0, 0, 5]], [[3, 0, 0, 0, 0, 5]]
        power = max(0, int(power + rng.integers(-1, 2)))
        units.append(kind(*cell, power=power, ice=cargo[0], ore=cargo[1], queue=queues[rng.integers(4)]))
    for home in factories:
        home["cargo"]["metal"] = int(rng.choice([9, 10, 99, 100, 110, 110, 110, 110]))
        home["cargo"]["water"] = int(rng.choice([0, 0, 100, 200]) + rng.integers(12))
        home["power"] = int(rng.choice([0, 1, 9, 10, 49, 50, 99, 100, 499, *[500] * 9]))
    free = [cell for cell in cells if cell not in covered]
    soil = [cell for cell in free if cell not in ice + ore]
    grown = soil[: rng.integers(60)]
    lichen = {cell: (rng.choice([1, 17, 18, 20, 90]), rng.integers(len(centres))) for cell in grown}
    rubble = {cell: rng.choice([1, 10, 19, 20, 100]) for cell in free[::2] if cell not in lichen}
    time = int(rng.choice([0, 29, 30, 800, 801, 900, 999]))
    own, theirs = units[:robots], units[robots:][:6]
    return official(own, factories, theirs, time, rubble, ice, ore, lichen)


@pytest.mark.parametrize("safe_masks", [True, False])
def test_made_up_situations(safe_masks):
    """Matches of two observations, all in one encoder; every objection decides alone."""
    rng = np.random.default_rng(0)
    options = lux.LuxOptions(SIZE, 2, 3, max_robots=6, safe_masks=safe_masks, group_by="cluster")
    encoder = lux.LuxEncoder(options)
    count = Counter()
    for _ in range(200):
        factories = [factory(5, 6), factory(12, 17)][: rng.integers(1, 3)]
        covered = footprint(dict(enumerate([*factories, factory(19, 19)])))
        cells = [tuple(cell) for cell in rng.integers(0, SIZE, (200, 2)).tolist()]
        cells = [cell for cell in dict.fromkeys(cells) if cell not in covered]
        half = rng.integers(2) * len(cells) // 2
        stays = factories, cells[:half], cells[half:], rng.integers(2, 7)
        first = made_up(rng, *stays)
        encoder.reset(first)
        memory = Memory(plain(first), options)
        for obs in (first, made_up(rng, *stays)):
            seen, _ = encoder.encode([lux.read_observation(obs)])
            memory.see(plain(obs))
            for team, player in enumerate(lux.PLAYERS):
                arrays = {key: x[0, team] for key, x in seen.items()}
                for objections in compare(Side(memory, player), arrays, options).values():
                    objections = objections if safe_masks else without_rules(objections)
                    count.update(map(frozenset, objections.values()))
    objections = RULES if safe_masks else LAWS
    assert {name: count[name] for name in objections if count[frozenset([name])] < 3} == {}


def test_giving_way():
    """Of own robots that step onto one cell the first goes, whoever else steps there.

    Robots of the opponent and of the other match do not count.
    """
    stopping = robot(13, 6, queue=[[0, 2, 0, 0, 0, 3]])
    robots = [robot(14, 5), robot(15, 6), stopping, robot(14, 7), robot(5, 5)]
    obs = official(robots, theirs=[robot(14, 5), robot(13, 5)])
    options = lux.LuxOptions(map_size=SIZE, max_factories=3, max_robots=5)
    encoder = lux.LuxEncoder(options, num_matches=2)
    for match in range(2):
        encoder.reset(obs, match)
    seen, view = encoder.encode([lux.read_observation(obs)] * 2)
    actions = np.zeros(seen["kind"].shape, np.int64)
    # The first four of player 0 all step onto (14, 6), and so does the first of player 1.
    actions[:, 0, 3:] = lux.DOWN, lux.LEFT, lux.RIGHT, lux.UP, lux.LEFT
    actions[:, 1, 3:5] = lux.DOWN, lux.RIGHT
    for sent, acts in zip(*encoder.orders(view, actions)):
        own, theirs = ({id: order[:, :2].tolist() for id, order in team.items()} for team in sent)
        # The second waits, the third stops, the fourth waits.
        assert own == {"unit_10": [[0, 3]], "unit_12": [], "unit_14": [[0, 4]]}
        assert theirs == {"unit_15": [[0, 3]], "unit_16": [[0, 2]]}
        assert list(acts.yielded_moves) == [3, 0]


def gaussian_sum(board, x, y, sigma):
    """Sum over all cells of value times exp(-d^2 / 2 sigma^2), d the distance from (x, y)."""
    i, j = np.indices(board.shape)
    return (board * np.exp(-((i - x) ** 2 + (j - y) ** 2) / (2 * sigma**2))).sum()


def score(obs, x, y):
    """How good a cell is as the centre of a factory; -inf where the game forbids it."""
    board = obs["board"]
    if not board["valid_spawns_mask"][x][y]:
        return -math.inf
    ice, ore, rubble = board["ice"], board["ore"], board["rubble"]
    factories = np.zeros(ice.shape)
    for player in lux.PLAYERS:
        for factory in obs["factories"][player].values():
            factories[tuple(factory["pos"])] = 1
    total = 4.0 * min(gaussian_sum(ice, x, y, 1.2), 0.6)
    total += 0.5 * min(gaussian_sum(ice, x, y, 4.0), 3.0)
    total += 0.1 * min(gaussian_sum(ore, x, y, 4.0), 3.0)
    total += 0.004 * gaussian_sum((rubble == 0) & (ice == 0) & (ore == 0), x, y, 3.0)
    total -= 0.0004 * gaussian_sum(rubble, x, y, 2.0)
    total -= 0.6 * gaussian_sum(factories, x, y, 6.0)
    # Steps from the edge of the factory to the nearest ice, at most 6
    steps = [steps_to_edge(cell, {"pos": (x, y)}) for cell in marked(ice)]
    return total - min([*steps, 6])


def test_placement_score():
    """On a made-up board with a little ice and much ore, and on one the other way round."""
    rng = np.random.default_rng(1)
    shape = (15, 12)
    for ice, ore in ((0.02, 0.2), (0.1, 0.02)):
        board = {
            "ice": rng.random(shape) < ice,
            "ore": rng.random(shape) < ore,
            "valid_spawns_mask": rng.random(shape) < 0.9,
            "rubble": rng.integers(1, 101, shape) * (rng.random(shape) < 0.6),
        }
        teams = {"factory_0": {"pos": np.array([3, 9])}}, {"factory_1": {"pos": np.array([11, 4])}}
        obs = {"board": board, "factories": dict(zip(lux.PLAYERS, teams))}
        expected, far = np.zeros(shape), np.zeros(shape)
        for x, y in np.ndindex(shape):
            expected[x, y] = score(obs, x, y)
            far[x, y] = gaussian_sum(board["rubble"], x, y, 4.0)
        assert np.isneginf(expected).any()
        np.testing.assert_allclose(lux.placement_score(obs), expected, rtol=1e-9)
        for_lichen = lux.placement_score(obs, grow_lichen=True)
        np.testing.assert_allclose(for_lichen, expected - 0.0004 * far, rtol=1e-9)


def test_early_phase_action():
    """Bids of 0, then each player in turn: the best cell, an equal share of water and metal.

    Player 1 bids 4 (in this test), so it places first, and has less to share out.
    """
    engine = LuxAI_S2(map_size=24, MIN_FACTORIES=2, MAX_FACTORIES=2, verbose=0)
    obs = engine.reset(seed=3)[0]["player_0"]
    bids = {player: lux.early_phase_action(obs, player) for player in lux.PLAYERS}
    assert [bid["bid"] for bid in bids.values()] == [0, 0]
    assert len({bid["faction"] for bid in bids.values()}) == 2
    obs = engine.step(bids | {"player_1": bids["player_1"] | {"bid": 4}})[0]["player_0"]
    for turn, share in (("player_1", 148), ("player_0", 150)) * 2:
        action = lux.early_phase_action(obs, turn)
        assert action.keys() == {"spawn", "water", "metal"}
        assert action["water"] == action["metal"] == share
        best = max(score(obs, x, y) for x, y in np.ndindex(24, 24))
        assert score(obs, *action["spawn"]) == pytest.approx(best)
        assert lux.early_phase_action(obs, OTHER[turn]) == {}
        three_left = obs["teams"][turn] | {"factories_to_place": 3, "water": 301, "metal": 250}
        uneven = lux.early_phase_action(obs | {"teams": {turn: three_left}}, turn)
        assert (uneven["water"], uneven["metal"]) == (100, 83)
        none_left = three_left | {"factories_to_place": 0}
        assert lux.early_phase_action(obs | {"teams": {turn: none_left}}, turn) == {}
        obs = engine.step({turn: action, OTHER[turn]: {}})[0]["player_0"]
    assert obs["real_env_steps"] == 0
    for player in lux.PLAYERS:
        assert len(obs["factories"][player]) == 2
        assert obs["teams"][player]["water"] == obs["teams"][player]["metal"] == 0


# ------------------------------------------------------------------------------------------------
# Rewards and metrics
# ------------------------------------------------------------------------------------------------

WEIGHTS = {"ice_dug": 0.004, "ore_dug": 0.0004, "ice_delivered": 0.004, "ore_delivered": 0.0008}
WEIGHTS |= {
    "rubble_cleared": 0.0,
    "lichen_destroyed": 0.0,
    "robot_lost": -0.05,
    "water_made": 0.004,
    "metal_made": 0.004,
}
WEIGHTS |= {"lichen_grown": 0.0001, "survived": 0.001, "factory_lost": -0.2}
# Metrics that are not named as the term that they add up
METRIC = {"ice_delivered": "ice_transferred", "ore_delivered": "ore"}
METRIC |= {"water_made": "water", "metal_made": "metal"}


def robot_achievements(side, robot, action, is_lost):
    """Term -> amount for a robot that does this; one that is lost has acted all the same.

    Digging without rubble or lichen fills the cargo, as far as there is space.
    """
    x, y = robot["pos"]
    achieved, config = Counter(), config_of(robot)
    if action == "dig" and not side.rubble[x][y] and not side.lichen[x][y]:
        for resource, cells in (("ice", side.ice), ("ore", side.ore)):
            if (x, y) in cells:
                space = config.CARGO_SPACE - robot["cargo"][resource]
                achieved[f"{resource}_dug"] = min(config.DIG_RESOURCE_GAIN, space)
    if action == "deliver":
        _, _, resource = delivery(side, robot)
        achieved[f"{resource}_delivered"] = robot["cargo"][resource]
    if is_lost:
        achieved["robot_lost"] = {"LIGHT": 0.1, "HEAVY": 1}[robot["unit_type"]]
    return achieved


def amount_of_lichen(board, strain):
    """Sum of the lichen of a factory."""
    rows = zip(board["lichen"], board["lichen_strains"])
    return sum(amount for row, strains in rows for amount, own in zip(row, strains) if own == strain)


def factory_achievements(side, id, arrived, after):
    """Term -> amount for a factory: refined, grown, and whether it is still there.

    `arrived` holds what has been delivered, by (id, resource).
    """
    factory, achieved = side.factories[id], Counter()
    ice = factory["cargo"]["ice"] + arrived[id, "ice"]
    ore = factory["cargo"]["ore"] + arrived[id, "ore"]
    achieved["water_made"] = min(ice, GAME.FACTORY_PROCESSING_RATE_WATER) // GAME.ICE_WATER_RATIO
    achieved["metal_made"] = min(ore, GAME.FACTORY_PROCESSING_RATE_METAL) // GAME.ORE_METAL_RATIO
    before = amount_of_lichen(side.memory.obs["board"], factory["strain_id"])
    achieved["lichen_grown"] = amount_of_lichen(after["board"], factory["strain_id"]) - before
    achieved["survived" if id in after["factories"][side.player] else "factory_lost"] = 1
    return achieved


class Account:
    """What a team has achieved in a match; `count` is a Counter of what happened."""

    def __init__(self, side, options, count):
        self.player, self.options, self.count = side.player, options, count
        self.placed = len(side.factories)
        self.total = Counter()  # by the names of metrics

    def book(self, side, row, after):
        """Rewards [E] of a step with actions `row` [E] that led to the observation `after`."""
        actions, waiting = robot_actions(side, row, self.options.safe_masks)
        alive = after["units"][self.player]
        achieved, arrived, ends = {}, Counter(), []  # ends: where each robot ends, and whether alive
        for id, action in actions.items():
            robot = side.robots[id]
            achieved[id] = robot_achievements(side, robot, action, id not in alive)
            if action == "deliver":
                _, factory_id, resource = delivery(side, robot)
                self.count["delivered to the same"] += (factory_id, resource) in arrived
                self.count["delivered elsewhere"] += factory_id != side.home[id]
                arrived[factory_id, resource] += robot["cargo"][resource]
            end = beside(robot["pos"]).get(action, tuple(robot["pos"]))
            ends.append((end, id in alive))
        born = [robot["pos"] for id, robot in alive.items() if id not in side.robots]
        for id, action in factory_actions(side, row).items():
            achieved[id] = factory_achievements(side, id, arrived, after)
            if action.startswith("build"):
                self.total["lights_built" if action == "build_light" else "heavies_built"] += 1
                centre = side.factories[id]["pos"]
                ends.append((tuple(centre), centre in born))
        robots_on = Counter(cell for cell, _ in ends)
        lost = [cell for cell, survived in ends if not survived]
        self.total["robots_lost"] += len(lost)
        self.total["own_collisions"] += sum(robots_on[cell] > 1 for cell in lost)
        self.total["right_of_way"] += len(waiting)
        slots = slots_for(side, self.options.safe_masks)
        for id in side.factories:
            kinds = payable(side, id, self.options.safe_masks)
            self.total["blocked_builds"] += kinds != set() and not kinds & slots[id]
        rewards = np.zeros(self.options.num_entities)
        for id, terms in achieved.items():
            for term, amount in terms.items():
                self.total[METRIC.get(term, term)] += amount
                self.count[self.player, term] += amount != 0
                rewards[side.slot[id]] += WEIGHTS[term] * amount
        self.total["r"] += rewards.sum()
        return rewards

    def metrics(self, memory, after):
        """Those of the whole match, which has ended with the observation `after`."""
        strains = [strain for strain, player in memory.owner.items() if player == self.player]
        alive = self.total["survived"] / GAME.max_episode_length
        return (
            dict.fromkeys(lux.TEAM_METRICS, 0)
            | self.total
            | {
                "ice_per_factory": self.total["ice_transferred"] / self.placed,
                "factories_alive": alive,
                "factories_alive_share": alive / self.placed,
                "factories_placed": self.placed,
                "lichen": sum(amount_of_lichen(after["board"], strain) for strain in strains),
            }
        )


# ------------------------------------------------------------------------------------------------
# Whole matches
# ------------------------------------------------------------------------------------------------


def plenty(engine, thirst):
    """A function that lets a match begin late, with much metal and power and free ground.

    The second factory of each team will die of thirst, with `thirst` all of player 1.
    """

    def change(state):
        if state.real_env_steps:
            return
        second = [list(state.factories[player].values())[1] for player in lux.PLAYERS]
        for factory in entities(state)[1]:
            x, y = factory.pos.pos
            state.board.rubble[max(x - 4, 0) : x + 5, max(y - 4, 0) : y + 5] = 0
            dies = factory in second or (thirst and factory.team_id == 1)
            factory.cargo.water = 40 if dies else 400
            factory.cargo.metal, factory.power = 250, 5000
        state.env_steps += 860
        engine.env_steps = state.env_steps

    return change


class Played:
    """One of several matches in an encoder, and beside it the second computation; it counts into `count`."""

    def __init__(self, match, options, thirst):
        self.match, self.options, self.count = match, options, Counter()
        after_every_step(match, plenty(match.engine, thirst))
        self.match_step, match.step = match.step, self.recorded_step

    def recorded_step(self, orders, acts):
        self.sent = [dict(of_team) for of_team in orders]  # the engine changes these
        return self.match_step(orders, acts)

    def begin(self):
        """A match has begun, and is at its first observation."""
        self.state = self.match.engine.state  # the next match has another
        self.memory = Memory(plain(self.state.get_obs()), self.options)
        self.accounts = [Account(side, self.options, self.count) for side in self.sides()]

    def sides(self):
        return [Side(self.memory, player) for player in lux.PLAYERS]

    def step(self, actions, rewards, terminated, episode):
        """Judge a step with actions and rewards [P, E]; `episode` has the match's metrics if it ended."""
        after = plain(self.state.get_obs())
        for team, (side, account) in enumerate(zip(self.sides(), self.accounts)):
            row = actions[team].tolist()
            compare_orders(side, self.sent[team], row, self.options.safe_masks, self.count)
            np.testing.assert_allclose(rewards[team], account.book(side, row, after), rtol=1e-5, atol=1e-7)
            if terminated:
                metrics = account.metrics(self.memory, after)
                assert metrics.keys() == set(lux.TEAM_METRICS)
                for name, value in metrics.items():
                    assert episode[name][team] == pytest.approx(value, rel=1e-4), name
                    self.count["metric", name] += value > 0
        is_last = after["real_env_steps"] == GAME.max_episode_length
        if terminated:
            assert episode["l"] == after["real_env_steps"]
            self.count["ended by time" if is_last else "ended by thirst"] += 1
            self.begin()
        else:
            assert not is_last
            before = dict(self.memory.home)
            self.memory.see(after)
            self.count["joined another"] += sum(before[id] != self.memory.home[id] for id in before)


STAGES = {
    "crowds": dict(min_factories=3, max_robots=30, group_by="cluster"),
    "few slots": dict(min_factories=4, max_robots=6),
    "large": dict(map_size=64, min_factories=4, max_factories=10, max_robots=20, safe_masks=False),
    "collisions": dict(min_factories=3, max_robots=16, group_by="cluster", safe_masks=False),
}
found = {}  # what was counted, by stage


@pytest.mark.parametrize("stage", STAGES)
def test_matches(stage):
    """Three matches in one encoder: orders and rewards of every step, arrays after every third."""
    options, rng = lux.LuxOptions(**STAGES[stage]), np.random.default_rng(3)
    env, matches = in_process(3, **STAGES[stage])
    played = [Played(match, options, thirst=index == 1) for index, match in enumerate(matches)]
    obs, _ = env.reset(seed=1)
    for match in played:
        match.begin()
    for step in range(150):
        resources = ("ice", "ore") if step % 60 < 30 else ("ore", "ice")
        by_script = rng.random(obs["kind"].shape) < 0.8
        actions = np.where(by_script, scripted(obs, resources), masked_random(rng, obs["action_mask"]))
        actions[obs["kind"] == lux.NOBODY] = rng.integers(1, lux.NUM_ACTIONS)  # ignored
        obs, rewards, terminated, _, infos = env.step(actions)
        for index, match in enumerate(played):
            episode = {name: x[index] for name, x in infos.get("episode", {}).items()}
            match.step(actions[index], rewards[index], terminated[index], episode)
            if (step + index) % 3 == 0 or terminated[index]:
                for team, side in enumerate(match.sides()):
                    compare(side, {key: x[index, team] for key, x in obs.items()}, options)
    env.close()
    found[stage] = sum((match.count for match in played), Counter())


def test_everything_was_met():
    """The matches above met everything, what is paid for both players."""
    if len(found) < len(STAGES):
        pytest.skip("needs all of the matches above")
    count = sum(found.values(), Counter())
    for_lichen = ("rubble_cleared", "lichen_destroyed")  # paid with the reward "lichen" only
    names = [("metric", name) for name in lux.TEAM_METRICS if name not in for_lichen]
    paid = [term for term in WEIGHTS if term not in for_lichen]
    names += [(player, term) for player in lux.PLAYERS for term in paid]
    names += ["delivered to the same", "delivered elsewhere"]
    names += ["joined another", "ended by time", "ended by thirst"]
    names += ["order 0, one", "order 0, many", "order 1, one", "order 2, one", "order 3, one"]
    names += ["order 3, many", "continued", "stopped", "delivered to the side"]
    assert {name: count[name] for name in names if count[name] < 3} == {}
