"""Growing lichen: rubble worth clearing, its features, when water may be spent, and what is paid, by hand."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import in_process
from test_encoder import SIZE, beside, distance, factory, footprint, heavy, nearest, official, robot, strain

import lux_wrapper as lux

FACTORIES = 3
OPTIONS = lux.LuxOptions(map_size=SIZE, max_factories=FACTORIES, max_robots=9, reward="lichen")


def encode(obs, options=OPTIONS):
    """Arrays [P, ...] and the Scene of the first observation of a match."""
    encoder = lux.LuxEncoder(options)
    encoder.reset(obs)
    arrays, (scene, _) = encoder.encode([lux.read_observation(obs)])
    return {key: x[0] for key, x in arrays.items()}, scene


def named(features):
    """Columns of a row of features by name."""
    return dict(zip(lux.COLUMN, features))


def cells_of(board):
    return {tuple(cell) for cell in np.argwhere(board).tolist()}


def ground(obs, player):
    """Cells where lichen of a player can grow, where it could grow next except for rubble, and where it grows."""
    board = obs["board"]
    areas, lichen = [], []
    for name in lux.PLAYERS:
        factories = obs["factories"][name]
        strains = [home["strain_id"] for home in factories.values()]
        areas.append(footprint(factories).keys())
        lichen.append(cells_of((board["lichen"] > 0) & np.isin(board["lichen_strains"], strains)))
    soil = cells_of((board["ice"] == 0) & (board["ore"] == 0)) - areas[0] - areas[1] - lichen[1 - player]
    bare = {cell for cell in soil if board["rubble"][cell] == 0}
    room = areas[player] | lichen[player]
    for _ in range(8):
        room = room | {cell for cell in bare if room & set(beside(cell).values())}
    worth = {cell for cell in soil - bare if room & set(beside(cell).values())}
    return room - areas[player], worth, lichen[player]


@pytest.mark.parametrize("seed", range(6))
def test_ground(seed):
    """Random boards, two thirds rubble: room, rubble worth clearing, and the way of every robot to it."""
    rng = np.random.default_rng(seed)
    own = [factory(5, 6), factory(12, 17)]
    covered = footprint({0: {"pos": (12, 17)}})
    free = [(x, y) for x in range(17) for y in range(SIZE) if not (2 < x < 9 and 2 < y < 9)]
    free = [free[index] for index in rng.permutation(len(free)) if free[index] not in covered]
    rubble = {cell: int(rng.integers(1, 100)) for cell in free[: 2 * len(free) // 3]}
    lichen = strain(0, free[-12:-8]) | strain(2, free[-8:-4]) | strain(1, free[-4:])
    cells = free[:3] + free[-20:-16]
    robots = [(heavy if index % 3 == 0 else robot)(*cell) for index, cell in enumerate(cells)]
    theirs = [robot(*free[3]), robot(*free[-5])]
    obs = official(robots, own, theirs, rubble=rubble, ice=free[4:9], ore=free[-30:-26], lichen=lichen)
    arrays, scene = encode(obs)
    for player, name in enumerate(lux.PLAYERS):
        room, worth, grown = ground(obs, player)
        assert len(worth) > 8
        assert cells_of(scene.soil.room[0, player]) == room
        assert cells_of(scene.soil.to_clear[0, player]) == worth
        units = obs["units"][name].values()
        taken = {tuple(unit["pos"]) for unit in units}
        for slot, unit in enumerate(units, FACTORIES):
            x, y = here = tuple(unit["pos"])
            row = named(arrays["features"][player, slot])
            assert row["worth_clearing"] == (here in worth)
            assert row["lichen_cells"] == row["room_cells"] == 0
            goals = sorted(cell for cell in worth if cell == here or cell not in taken)
            goal = min(goals, key=lambda cell: distance(here, cell) + obs["board"]["rubble"][cell] / 2)
            way = np.clip(np.array([goal[0] - x, goal[1] - y, distance(here, goal)]) / 8, -1, 1)
            assert [row[f"clear_{of}"] for of in ("dx", "dy", "distance")] == way.tolist()
            if here in worth:
                digs = arrays["action_mask"][player, slot, lux.DIG]
                assert digs == (unit["unit_type"] == "LIGHT")
        centres = {home["strain_id"]: home["pos"] for home in obs["factories"][name].values()}
        for slot, strain_id in enumerate(centres):
            row = named(arrays["features"][player, slot])
            for column, cells in (("room_cells", room), ("lichen_cells", grown)):
                number = sum(nearest(cell, centres) == strain_id for cell in cells)
                assert row[column] == np.float32(number / 50)


def test_nothing_to_clear():
    """On bare ground there is no way to go; without the reward there are no features of lichen."""
    obs = official([robot(15, 5)])
    arrays, _ = encode(obs)
    row = named(arrays["features"][0, FACTORIES])
    assert [row[name] for name in lux.LICHEN_FEATURES] == [0, 0, 1, 0, 0, 0]
    assert arrays["features"].shape[-1] == len(lux.FEATURES) + len(lux.LICHEN_FEATURES)
    arrays, _ = encode(obs, replace(OPTIONS, reward="ice"))
    assert arrays["features"].shape[-1] == len(lux.FEATURES)


@pytest.mark.parametrize("time, cells, least", [(400, 0, 200 + 599), (900, 8, 100 + 99), (998, 8, 2 + 1), (999, 0, 1)])
def test_water_is_saved(time, cells, least):
    """Watering costs 2, and needs as much for half of the steps left, beside the reserve."""
    lichen = strain(0, [(x, 2) for x in range(cells)])
    for water, may in ((least + 1, False), (least + 2, True)):
        obs = official([], [factory(10, 10, water=water)], time=time, lichen=lichen)
        arrays, _ = encode(obs)
        assert arrays["action_mask"][0, 0, lux.WATER] == may


# A factory stands on 9 to 11 on both axes, so its edge is 8 and 12. Strain 1 is the opponent's.
PLACES = {  # cell of the robot, lichen, whether rubble there is worth clearing
    "beside a factory": ((12, 10), {}, True),
    "nine steps off, over bare ground": ((20, 10), {}, True),
    "ten steps off": ((21, 10), {}, False),
    "beside own lichen far away": ((2, 21), strain(0, [(2, 22)]), True),
    "beside the opponent's lichen": ((2, 21), strain(1, [(2, 22)]), False),
    "at the map's edge": ((0, 23), strain(0, [(1, 23)]), True),
}


@pytest.mark.parametrize("reward", ["lichen", "ice"])
@pytest.mark.parametrize("place", PLACES)
def test_rubble_to_clear(place, reward):
    """Rubble may be dug where own lichen could grow next, if that is paid, and over ice anyway."""
    cell, lichen, worth = PLACES[place]
    for ice in ([], [cell]):
        obs = official([robot(*cell)], rubble={cell: 5}, lichen=lichen, ice=ice)
        arrays, _ = encode(obs, replace(OPTIONS, reward=reward))
        is_worth = worth and reward == "lichen" and not ice
        assert arrays["action_mask"][0, FACTORIES, lux.DIG] == (is_worth or ice == [cell])
        if reward == "lichen":
            assert named(arrays["features"][0, FACTORIES])["worth_clearing"] == is_worth


@pytest.mark.parametrize("reward, paid", [("lichen", 0.02), ("ice", 0.0)])
def test_reward_of_cleared_rubble(reward, paid):
    """A light robot clears 2 a dig beside its factory, then what is left; elsewhere nothing is paid."""
    env, (match,) = in_process(1, reward=reward, safe_masks=False, max_robots=6)
    obs, _ = env.reset(seed=5)
    idle = np.zeros(obs["kind"].shape, np.int64)
    build, dig = idle.copy(), idle.copy()
    slot = env.options.max_factories
    build[0, 0, 0], dig[0, 0, slot] = lux.BUILD_LIGHT, lux.DIG
    env.step(build)
    state, encoder = match.engine.state, env.games.envs[0].encoder
    (unit,) = state.units["player_0"].values()
    centre = next(iter(state.factories["player_0"].values())).pos
    far = [0 if at > env.options.map_size / 2 else env.options.map_size - 1 for at in (centre.x, centre.y)]
    for (x, y), worth in (([centre.x + 2, centre.y], True), (far, False)):
        unit.pos.pos = np.array([x, y])
        state.board.rubble[x, y] = 3
        state.board.ice[x, y] = state.board.ore[x, y] = 0
        encoder.ice[0, x, y] = encoder.ore[0, x, y] = False
        env.step(idle)  # the robot is seen where it is now
        for amount in (2, 1):
            _, rewards, *_ = env.step(dig)
            assert rewards[0, 0, slot] == pytest.approx(paid * amount * worth)
    env.close()


def beaten(own, moves, other, comes):
    """Whether a robot (heavy, power) is destroyed by one of the opponent where both end up."""
    if own[0] != other[0]:
        return other[0]
    return comes and (not moves or other[1] >= own[1])


@pytest.mark.parametrize("seed", range(20))
def test_threats(seed):
    """Crowds of both teams: no robot does what an opponent could destroy it for, if it has a choice."""
    rng = np.random.default_rng(seed)
    block = [(x, y) for x in (8, 9, 12, 13, 14, 15) for y in range(3, 11)]
    cells = [block[index] for index in rng.permutation(len(block))[:12]]
    kinds = [(bool(rng.integers(2)), int(rng.integers(80, 90))) for _ in cells]
    kinds = [(big, 10 * power if big else power) for big, power in kinds]
    units = [(heavy if big else robot)(*cell, power=power) for cell, (big, power) in zip(cells, kinds)]
    obs = official(units[:6], theirs=units[6:], ice=cells)
    masks = [encode(obs, replace(OPTIONS, reward=reward))[0]["action_mask"] for reward in ("lichen", "ice")]
    home = footprint({0: {"pos": (10, 10)}}), footprint({0: {"pos": (19, 19)}})
    found = 0
    for index, cell in enumerate(cells):
        player, slot = index // 6, FACTORIES + index % 6
        allowed, free = (mask[player, slot] for mask in masks)
        safe = free.copy()
        for action in np.flatnonzero(free):
            goal = beside(cell).get(lux.ROBOT_ACTIONS[action], cell)
            for other in range(6, 12) if player == 0 else range(6):
                steps = distance(goal, cells[other])
                if steps <= 1 and goal not in home[player]:
                    safe[action] &= not beaten(kinds[index], goal != cell, kinds[other], comes=steps == 1)
        found += (safe != free).any()
        assert (allowed == (safe if safe.any() else free)).all(), (index, allowed, free, safe)
    assert found > 0


@pytest.mark.parametrize("elsewhere, way", [({(12, 14): 40}, (-2, 4, 6)), ({}, (0, 0, 8))])
def test_rubble_under_another_robot(elsewhere, way):
    """It is left to that one, even if nothing else is there to clear."""
    obs = official([robot(13, 10), robot(14, 10)], rubble={(13, 10): 2} | elsewhere)
    features = encode(obs)[0]["features"][0, FACTORIES : FACTORIES + 2]
    found = features[:, lux.columns("clear_dx", "clear_dy", "clear_distance")] * 8
    assert found.tolist() == [[0, 0, 0], list(way)]


def test_in_danger_everywhere():
    """A robot that an opponent could destroy whatever it does may do all that it could without them."""
    heavies = [heavy(*cell) for cell in ((5, 4), (5, 6), (3, 5), (7, 5))]
    everything = {"stay", "move_up", "move_right", "move_down", "move_left", "dig"}
    safe = [{"move_down", "move_left", "move_right"}, {"move_left", "move_right"}, {"move_right"}, everything]
    for number, expected in enumerate(safe, 1):
        obs = official([robot(5, 5)], theirs=heavies[:number], ice=[(5, 5)])
        mask = encode(obs)[0]["action_mask"][0, FACTORIES]
        assert {name for name, may in zip(lux.ROBOT_ACTIONS, mask) if may} == expected


def test_placement():
    """Factories stand where lichen counts in the placement only in a match that is paid for lichen."""
    places = []
    for reward in ("ice", "lichen"):
        env, (match,) = in_process(1, reward=reward)
        env.reset(seed=3)
        factories = match.engine.state.factories
        own = [tuple(home.pos.pos) for name in lux.PLAYERS for home in factories[name].values()]
        obs = match.engine.reset(seed=match.seed)[0]["player_0"]
        while obs["real_env_steps"] < 0:
            is_lichen = reward == "lichen"
            orders = {name: lux.early_phase_action(obs, name, is_lichen) for name in lux.PLAYERS}
            obs = match.engine.step(orders)[0]["player_0"]
        again = [tuple(home["pos"]) for name in lux.PLAYERS for home in obs["factories"][name].values()]
        assert own == again
        places.append(own)
        env.close()
    assert places[0] != places[1]


def test_presets():
    """All of a preset's terms are there, and it can be changed."""
    assert lux.weights_of() == lux.REWARDS
    lichen = lux.weights_of("lichen")
    assert lichen.keys() == lux.REWARDS.keys()
    assert lichen["lichen_grown"] == 0.01 and lichen["ice_dug"] == 0.004
    assert lux.weights_of("lichen", {"ice_dug": 1})["ice_dug"] == 1
