"""Growing lichen: the ground worth clearing, its features, when water may be spent, and what is paid, by hand."""

import numpy as np
import pytest
from helpers import in_process
from test_encoder import factory, heavy, official, robot, strain

import lux_wrapper as lux

SIZE, FACTORIES, ROBOTS = 24, 3, 9  # as in official()


def neighbours(cell):
    x, y = cell
    return {(i, j) for i, j in ((x, y - 1), (x + 1, y), (x, y + 1), (x - 1, y)) if 0 <= i < SIZE and 0 <= j < SIZE}


def footprint(factory):
    x, y = factory["pos"]
    return {(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def ground(obs, player):
    """Cells on which lichen of a player can grow, and those on which it could next, but for rubble: two sets."""
    board, strains = obs["board"], [{f["strain_id"] for f in obs["factories"][name].values()} for name in lux.PLAYERS]
    built = [set().union(*map(footprint, obs["factories"][name].values())) for name in lux.PLAYERS]
    lichen = [
        {tuple(cell) for cell in np.argwhere((board["lichen"] > 0) & np.isin(board["lichen_strains"], list(of)))}
        for of in strains
    ]
    cells = {(x, y) for x in range(SIZE) for y in range(SIZE)}
    soil = {cell for cell in cells if not (board["ice"][cell] or board["ore"][cell])}
    soil -= built[0] | built[1] | lichen[1 - player]
    bare = {cell for cell in soil if board["rubble"][cell] == 0}
    room = built[player] | lichen[player]
    for _ in range(8):
        room = room | {cell for cell in bare if neighbours(cell) & room}
    return room - built[player], {cell for cell in soil - bare if neighbours(cell) & room}, lichen[player]


@pytest.mark.parametrize("seed", range(6))
def test_ground(seed):
    """Random boards, of which two thirds are rubble: room, rubble worth clearing, and the way of every robot to it."""
    rng = np.random.default_rng(seed)
    free = [(x, y) for x in range(SIZE) for y in range(SIZE) if not (2 < x < 9 and 2 < y < 9) and x < 17]
    free = [free[index] for index in rng.permutation(len(free))]
    amounts = {cell: int(rng.integers(1, 100)) for cell in free[: 2 * len(free) // 3]}
    lichen = strain(0, free[-12:-8]) | strain(2, free[-8:-4]) | strain(1, free[-4:])
    robots = [(heavy if index % 3 == 0 else robot)(*cell) for index, cell in enumerate(free[:3] + free[-20:-16])]
    there = [robot(*free[3]), robot(*free[-5])]
    own = [factory(5, 6), factory(12, 17)]
    for x, y in footprint(own[1]):
        amounts.pop((x, y), None)
        lichen.pop((x, y), None)
    obs = official(robots, own, there, rubble=amounts, ice=free[4:9], ore=free[-30:-26], lichen=lichen)
    encoder = lux.LuxEncoder(SIZE, FACTORIES, ROBOTS, grow_lichen=True)
    out = encoder.arrays()
    encoder.reset(obs)
    encoder.encode(obs, out)
    centres = [tuple(f["pos"]) for f in own]
    for player in range(2):
        room, worth, lichen = ground(obs, player)
        assert len(worth) > 8
        assert {tuple(cell - 1) for cell in np.argwhere(encoder.room[player])} == room
        assert {tuple(cell - 1) for cell in np.argwhere(encoder.to_clear[player])} == worth
        units = list(obs["units"][lux.PLAYERS[player]].values())
        taken = {tuple(unit["pos"]) for unit in units}
        for slot, unit in enumerate(units, FACTORIES):
            x, y = cell = tuple(unit["pos"])
            row = dict(zip(lux.COLUMN, out["features"][player, slot]))
            assert row["worth_clearing"] == (cell in worth)
            steps = {c: abs(c[0] - x) + abs(c[1] - y) for c in worth if c == cell or c not in taken}
            time = {c: n + obs["board"]["rubble"][c] / 2 for c, n in steps.items()}
            soonest = [c for c in time if time[c] == min(time.values())]
            way = tuple(row[f"clear_{name}"] for name in ("dx", "dy", "distance"))
            assert way in [tuple(np.clip(np.array([c[0] - x, c[1] - y, steps[c]]) / 8, -1, 1)) for c in soonest]
            digs = out["action_mask"][player, slot, lux.DIG]
            if cell in worth:
                assert digs == (unit["unit_type"] == "LIGHT")
            assert row["lichen_cells"] == row["room_cells"] == 0
        if player == 0:
            of = [min(range(2), key=lambda n: (np.abs(np.subtract(centres[n], c)).sum(), n)) for c in sorted(room)]
            for slot in range(2):
                row = dict(zip(lux.COLUMN, out["features"][0, slot]))
                assert row["room_cells"] == np.float32(of.count(slot) / 50)
                grown = [n for n, c in zip(of, sorted(room)) if c in lichen]
                assert row["lichen_cells"] == np.float32(grown.count(slot) / 50)


def test_nothing_to_clear():
    """On bare ground there is no way to go; and no feature of lichen is there unless it is grown."""
    obs = official([robot(15, 5)])
    encoder = lux.LuxEncoder(SIZE, FACTORIES, ROBOTS, grow_lichen=True)
    out = encoder.arrays()
    encoder.reset(obs)
    encoder.encode(obs, out)
    row = dict(zip(lux.COLUMN, out["features"][0, FACTORIES]))
    assert [row[name] for name in lux.LICHEN_FEATURES] == [0, 0, 1, 0, 0, 0]
    assert lux.LuxEncoder(SIZE).arrays()["features"].shape[-1] == len(lux.FEATURES)
    assert out["features"].shape[-1] == len(lux.FEATURES) + len(lux.LICHEN_FEATURES)


@pytest.mark.parametrize("time, cells, least", [(400, 0, 200 + 599), (900, 8, 100 + 99), (998, 8, 2 + 1), (999, 0, 1)])
def test_water_is_saved(time, cells, least):
    """Watering needs water for half of the steps left at what it costs now, beside the reserve."""
    lichen = strain(0, [(x, 2) for x in range(cells)])
    may = []
    for water in (least + 1, least + 2):
        obs = official([], [factory(10, 10, water=water)], time=time, lichen=lichen)
        encoder = lux.LuxEncoder(SIZE, FACTORIES, ROBOTS, grow_lichen=True)
        out = encoder.arrays()
        encoder.reset(obs)
        encoder.encode(obs, out)
        assert encoder.water_costs[0, 0] == 2
        may.append(out["action_mask"][0, 0, lux.WATER])
    assert may == [False, True]


# A factory stands on 9 to 11 in both axes, so its edge is 8 and 12; strain 0 is its own, strain 1 the opponent's.
PLACES = {  # cell of the robot, what else there is, whether rubble there is worth clearing
    "beside a factory": ((12, 10), {}, True),
    "nine steps off, over bare ground": ((20, 10), {}, True),
    "ten steps off": ((21, 10), {}, False),
    "beside own lichen far away": ((2, 21), {"lichen": strain(0, [(2, 22)])}, True),
    "beside the opponent's lichen": ((2, 21), {"lichen": strain(1, [(2, 22)])}, False),
    "at the map's edge": ((0, 23), {"lichen": strain(0, [(1, 23)])}, True),
}


@pytest.mark.parametrize("grow_lichen", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_rubble_to_clear(place, grow_lichen):
    """Rubble may be dug where own lichen could grow next, if it is paid."""
    (x, y), there, worth = PLACES[place]
    obs = official([robot(x, y)], rubble={(x, y): 5}, **there)
    encoder = lux.LuxEncoder(SIZE, FACTORIES, ROBOTS, grow_lichen=grow_lichen)
    out = encoder.arrays()
    encoder.reset(obs)
    encoder.encode(obs, out)
    assert out["action_mask"][0, FACTORIES, lux.DIG] == (worth and grow_lichen)
    if grow_lichen:
        assert encoder.can_grow[0] == worth
        on_ice = official([robot(x, y)], rubble={(x, y): 5}, ice=[(x, y)], **there)
        encoder.reset(on_ice)
        encoder.encode(on_ice, out)
        assert out["action_mask"][0, FACTORIES, lux.DIG] and not encoder.can_grow[0]


@pytest.mark.parametrize("reward, paid", [("lichen", 0.02), ("ice", 0.0)])
def test_reward_of_cleared_rubble(reward, paid):
    """A light robot clears 2 a dig beside its factory, and what is left in the end; elsewhere nothing is paid."""
    env, (match,) = in_process(1, reward=reward, safe_masks=False, max_robots=6)
    obs, _ = env.reset(seed=5)
    actions = np.zeros(obs["kind"].shape, np.int64)
    actions[0, 0, 0] = lux.BUILD_LIGHT
    obs, *_ = env.step(actions)
    (unit,) = match.engine.state.units["player_0"].values()
    slot, board = match.encoder.max_factories, match.engine.state.board
    centre = next(iter(match.engine.state.factories["player_0"].values())).pos
    far = [0 if at > match.encoder.map_size / 2 else match.encoder.map_size - 1 for at in (centre.x, centre.y)]
    for cell, worth in (([centre.x + 2, centre.y], True), (far, False)):
        unit.pos.pos = np.array(cell)
        board.rubble[unit.pos.x, unit.pos.y] = 3
        board.ice[unit.pos.x, unit.pos.y] = board.ore[unit.pos.x, unit.pos.y] = 0
        match.encoder.ice[:], match.encoder.ore[:] = board.ice, board.ore
        actions[:] = 0
        obs, *_ = env.step(actions)  # the robot is seen where it is now
        for amount in (2, 1):
            actions[0, 0, slot] = lux.DIG
            obs, rewards, *_ = env.step(actions)
            assert rewards[0, 0, slot] == pytest.approx(paid * amount * worth)
    env.close()


def beaten(own, moves, other, comes):
    """Whether a robot (heavy, power) is destroyed by one of the opponent where both end up."""
    if own[0] != other[0]:
        return other[0]
    return comes and (not moves or other[1] >= own[1])


@pytest.mark.parametrize("seed", range(20))
def test_threats(seed):
    """Crowds of both teams: no robot does what an opponent could destroy it for, unless it can do nothing else."""
    rng = np.random.default_rng(seed)
    cells = [(8 + index // 8, 3 + index % 8) for index in rng.permutation(64) if not (1 < index // 8 < 4)][:12]
    kinds = [(bool(rng.integers(2)), int(rng.integers(80, 90))) for _ in cells]
    units = [
        robot(*cell, "HEAVY" if big else "LIGHT", 10 * power if big else power)
        for cell, (big, power) in zip(cells, kinds)
    ]
    kinds = [(big, 10 * power if big else power) for big, power in kinds]
    masks = []
    for grow_lichen in (True, False):
        encoder = lux.LuxEncoder(SIZE, FACTORIES, ROBOTS, grow_lichen=grow_lichen)
        obs, out = official(units[:6], theirs=units[6:], ice=cells), encoder.arrays()
        encoder.reset(obs)
        encoder.encode(obs, out)
        masks.append(out["action_mask"])
    home = footprint(factory(10, 10)), footprint(factory(19, 19))
    found = 0
    for index, (x, y) in enumerate(cells):
        player, slot = index // 6, FACTORIES + index % 6
        others = range(6, 12) if player == 0 else range(6)
        allowed, free = (mask[player, slot] for mask in masks)
        safe = free.copy()
        for action in np.flatnonzero(free):
            moves = lux.UP <= action <= lux.LEFT
            goal = (x + lux.DX[action], y + lux.DY[action]) if moves else (x, y)
            for other in others:
                distance = abs(goal[0] - cells[other][0]) + abs(goal[1] - cells[other][1])
                if distance <= 1 and goal not in home[player]:
                    safe[action] &= not beaten(kinds[index], moves, kinds[other], comes=distance == 1)
        found += (safe != free).any()
        assert (allowed == (safe if safe.any() else free)).all(), (index, allowed, free, safe)
    assert found > 0


def test_rubble_under_another_robot():
    """It is left to that one, even if nothing else is there to clear."""
    for other, way in (({(12, 14): 40}, (-2, 4, 6)), ({}, None)):
        obs = official([robot(13, 10), robot(14, 10)], rubble={(13, 10): 2} | other)
        encoder = lux.LuxEncoder(SIZE, FACTORIES, ROBOTS, grow_lichen=True)
        out = encoder.arrays()
        encoder.reset(obs)
        encoder.encode(obs, out)
        found = out["features"][0, FACTORIES : FACTORIES + 2, lux.columns("clear_dx", "clear_dy", "clear_distance")].T
        assert found.tolist() == [[0, 0, 0], [0, 0, 1] if way is None else [steps / 8 for steps in way]]


def test_in_danger_everywhere():
    """A robot that an opponent could destroy whatever it does may do all that it could without them."""
    heavies = [heavy(*cell) for cell in ((5, 4), (5, 6), (3, 5), (7, 5))]
    for last in range(4):
        obs = official([robot(5, 5)], theirs=heavies[: last + 1], ice=[(5, 5)])
        encoder = lux.LuxEncoder(SIZE, FACTORIES, ROBOTS, grow_lichen=True)
        out = encoder.arrays()
        encoder.reset(obs)
        encoder.encode(obs, out)
        may = {name for name, may in zip(lux.ROBOT_ACTIONS, out["action_mask"][0, FACTORIES]) if may}
        everything = {"stay", "move_up", "move_right", "move_down", "move_left", "dig"}
        safe = [{"move_down", "move_left", "move_right"}, {"move_left", "move_right"}, {"move_right"}, everything]
        assert may == safe[last]


def test_placement():
    """Factories of a match that is paid for lichen stand where lichen counts in the placement, and others do not."""
    places = {}
    for reward in ("ice", "lichen"):
        env, (match,) = in_process(1, reward=reward, map_size=48)
        env.reset(seed=3)
        own = [[tuple(f.pos.pos) for f in match.engine.state.factories[name].values()] for name in lux.PLAYERS]
        obs = match.engine.reset(seed=match.seed)[0]["player_0"]
        while obs["real_env_steps"] < 0:
            orders = {name: lux.early_phase_action(obs, name, grow_lichen=reward == "lichen") for name in lux.PLAYERS}
            obs = match.engine.step(orders)[0]["player_0"]
        again = [[tuple(f["pos"]) for f in obs["factories"][name].values()] for name in lux.PLAYERS]
        assert own == again
        places[reward] = own
        env.close()
    assert places["ice"] != places["lichen"]


def test_presets():
    """All of a preset's terms are there, and it can be changed."""
    assert lux.weights_of() == lux.REWARDS
    lichen = lux.weights_of("lichen")
    assert lichen.keys() == lux.REWARDS.keys() and lichen["lichen_grown"] == 0.01 and lichen["ice_dug"] == 0.004
    assert lux.weights_of("lichen", {"ice_dug": 1})["ice_dug"] == 1
