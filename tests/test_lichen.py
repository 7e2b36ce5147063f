"""Growing lichen, by hand: rubble worth clearing, features, water, danger, and rewards."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import in_process
from test_encoder import SIZE, WEIGHTS, beside, distance, factory, footprint, heavy, nearest, official, robot, strain

import lux_wrapper as lux

FACTORIES = 3
WAY = ("clear_dx", "clear_dy", "clear_distance")
RAID = ("raid_dx", "raid_dy", "raid_distance")
OPTIONS = lux.LuxOptions(map_size=SIZE, max_factories=FACTORIES, max_robots=9, reward="lichen")


def encode(obs, **options):
    """Arrays [P, ...] and the Soil of the first observation of a match."""
    encoder = lux.LuxEncoder(replace(OPTIONS, **options))
    encoder.reset(obs)
    arrays, (scene, _) = encoder.encode([lux.read_observation(obs)])
    return {key: x[0] for key, x in arrays.items()}, scene.soil


def named(features):
    """Columns of a row of features by name."""
    return dict(zip(lux.COLUMN, features))


def cells_of(board):
    return {tuple(cell) for cell in np.argwhere(board).tolist()}


def ground(obs, player):
    """Cells of a player: room for lichen, rubble that it could grow on next, and lichen."""
    board = obs["board"]
    areas, lichen = [], []
    for name in lux.PLAYERS:
        homes = obs["factories"][name]
        own = np.isin(board["lichen_strains"], [home["strain_id"] for home in homes.values()])
        areas.append(footprint(homes).keys())
        lichen.append(cells_of(own & (board["lichen"] > 0)))
    soil = cells_of((board["ice"] == 0) & (board["ore"] == 0))
    soil -= areas[0] | areas[1] | lichen[1 - player]
    rubble = cells_of(board["rubble"])
    room = areas[player] | lichen[player]

    def next_to_room(cells):
        return {cell for cell in cells if room & set(beside(cell).values())}

    for _ in range(8):
        room = room | next_to_room(soil - rubble)
    return room - areas[player], next_to_room(soil & rubble), lichen[player]


@pytest.mark.parametrize("seed", range(6))
def test_ground(seed):
    """Random boards, two thirds rubble: room, rubble worth clearing, lichen worth raiding, ways to both."""
    rng = np.random.default_rng(seed)
    own = [factory(5, 6), factory(12, 17)]
    covered = footprint({0: own[1]})
    free = [(x, y) for x in range(17) for y in range(SIZE) if not (2 < x < 9 and 2 < y < 9)]
    free = [free[at] for at in rng.permutation(len(free)) if free[at] not in covered]
    lichen = strain(0, free[-12:-8]) | strain(2, free[-8:-6]) | strain(2, free[-6:-4], 90) | strain(1, free[-4:])
    robots = [heavy(*free[0]), robot(*free[1]), robot(*free[2]), heavy(*free[-20])]
    robots += [robot(*free[-19]), robot(*free[-18]), heavy(*free[-17])]
    robots += [heavy(*free[4]), heavy(*free[-29])]  # on ice and on ore
    theirs = [robot(*free[3]), robot(*free[-5])]
    time = 699 + seed  # lichen is worth raiding from step 700 on
    rubble = {cell: int(rng.integers(1, 100)) for cell in free[: 2 * len(free) // 3]}
    ice, ore = free[4:9], free[-30:-26]
    obs = official(robots, own, theirs, rubble=rubble, ice=ice, ore=ore, lichen=lichen, time=time)
    arrays, soil = encode(obs)
    for player, name in enumerate(lux.PLAYERS):
        room, worth, grown = ground(obs, player)
        assert len(worth) > 8
        assert cells_of(soil.room[0, player]) == room
        assert cells_of(soil.to_clear[0, player]) == worth
        prey = ground(obs, 1 - player)[2] if seed else set()
        assert cells_of(soil.to_raid[0, player]) == prey and (seed == 0 or prey)
        units = obs["units"][name].values()
        taken = {tuple(unit["pos"]) for unit in units}
        for slot, unit in enumerate(units, FACTORIES):
            here = tuple(unit["pos"])
            row = named(arrays["features"][player, slot])
            assert row["worth_clearing"] == (here in worth) and row["worth_raiding"] == (here in prey)
            assert row["lichen_cells"] == row["room_cells"] == 0
            digs = here in ice + ore or (here in worth and unit["unit_type"] == "LIGHT")
            assert arrays["action_mask"][player, slot, lux.DIG] == digs or here in lichen
            for names, cells, steps in ((WAY, worth, obs["board"]["rubble"] / 2), (RAID, prey, np.zeros((SIZE, SIZE)))):
                done = {c: distance(here, c) + steps[c] for c in sorted(cells)}
                goal = min(done.keys() - taken | ({here} & cells), key=lambda c: (done[c], c), default=None)
                way = np.array([goal[0] - here[0], goal[1] - here[1], distance(here, goal)]) if goal else [0, 0, 8]
                assert [row[name] for name in names] == np.clip(np.divide(way, 8), -1, 1).tolist()
        centres = {home["strain_id"]: home["pos"] for home in obs["factories"][name].values()}
        for slot, strain_id in enumerate(centres):
            row = named(arrays["features"][player, slot])
            for column, cells in (("room_cells", room), ("lichen_cells", grown)):
                number = sum(nearest(cell, centres) == strain_id for cell in cells)
                assert row[column] == np.float32(number / 50)


def test_nothing_to_clear():
    """Rubble under another robot is left to it, even if there is no other."""
    for rubble in ({}, {(13, 10): 2}):
        arrays, _ = encode(official([robot(13, 10), robot(14, 10)], rubble=rubble))
        row = named(arrays["features"][0, FACTORIES + 1])
        assert [row[name] for name in WAY] == [0, 0, 1]


def test_the_end():
    """From step 900 on no rubble is worth clearing."""
    for time in (899, 900):
        obs = official([robot(13, 10)], rubble={(13, 10): 2}, time=time)
        arrays, soil = encode(obs)
        assert named(arrays["features"][0, FACTORIES])["worth_clearing"] == soil.to_clear.any() == (time < 900)
        assert ("dig" in allowed_actions(obs)) == (time < 900)


def test_water_is_saved():
    """Watering costs 2 and keeps as much for half of the steps left, beside the reserve."""
    for time, least in ((400, 200 + 599), (900, 100 + 99), (998, 2 + 1), (999, 1)):
        for water, may in ((least + 1, False), (least + 2, True)):
            arrays, _ = encode(official([], [factory(10, 10, water=water, metal=0)], time=time))
            assert arrays["action_mask"][0, 0, lux.WATER] == may


# A factory stands on 9 to 11 on both axes, so its edge is 8 and 12. Strain 1 is the opponent's.
@pytest.mark.parametrize("reward, paid", [("lichen", 0.02), ("ice", 0.0)])
def test_reward_of_cleared_rubble(reward, paid):
    """Rubble cleared beside the own factory is paid by the unit; elsewhere nothing is."""
    env, (match,) = in_process(1, reward=reward, safe_masks=False)
    slot, encoder = env.options.max_factories, env.games.envs[0].encoder
    idle, build, dig = np.zeros((3, 1, 2, env.options.num_entities), int)
    build[0, 0, 0] = lux.BUILD_LIGHT
    dig[0, 0, slot] = lux.DIG
    env.step(build)
    state = match.engine.state
    (unit,) = state.units["player_0"].values()
    home = next(iter(state.factories["player_0"].values())).pos
    far = [0 if at > 24 else 47 for at in (home.x, home.y)]
    for (x, y), worth in (([home.x + 2, home.y], True), (far, False)):
        unit.pos.pos = np.array([x, y])
        state.board.rubble[x, y] = 3
        for cells in (state.board.ice, state.board.ore, encoder.ice[0], encoder.ore[0]):
            cells[x, y] = 0
        env.step(idle)  # the robot is seen where it is now
        for amount in (2, 1):
            _, rewards, *_ = env.step(dig)
            assert rewards[0, 0, slot] == pytest.approx(paid * amount * worth)


@pytest.mark.parametrize("reward, paid", [("lichen", 0.01), ("ice", 0.0)])
@pytest.mark.parametrize("kind, digs", [("light", (10, 10)), ("heavy", (90, 0))])
def test_reward_of_destroyed_lichen(reward, paid, kind, digs):
    """The opponent's lichen that is dug away is paid by the unit from step 700 on; own lichen and decay are not."""
    env, (match,) = in_process(1, reward=reward, safe_masks=False)
    slot = env.options.max_factories
    idle, build, dig = np.zeros((3, 1, 2, env.options.num_entities), int)
    build[0, 0, 0] = lux.BUILD_LIGHT if kind == "light" else lux.BUILD_HEAVY
    dig[0, 0, slot] = lux.DIG
    env.step(build)
    state = match.engine.state
    (unit,) = state.units["player_0"].values()
    unit.power = 1000
    x, y = unit.pos.pos = np.array([0, 0])
    strains = [state.teams[player].factory_strains[0] for player in lux.PLAYERS]
    for time, strain_id, worth in ((500, strains[1], False), (700, strains[0], False), (700, strains[1], True)):
        state.env_steps += time - state.real_env_steps
        state.board.rubble[x, y], state.board.ice[x, y], state.board.ore[x, y] = 0, 0, 0
        state.board.lichen[x, y], state.board.lichen_strains[x, y] = 92, strain_id
        for _ in range(2):  # in the first step it is not yet seen; it decays to 90
            _, rewards, *_ = env.step(idle)
            assert rewards[0, 0, slot] == 0
        for amount in digs:
            _, rewards, *_ = env.step(dig)
            lost = amount + (kind == "light")  # with the unit that decays in the same step
            assert rewards[0, 0, slot] == pytest.approx(paid * lost * worth)


def test_threats():
    """Crowds of both teams: no robot with a choice does what it could be destroyed for."""
    rng = np.random.default_rng(0)
    block = [(x, y) for x in (8, 9, 12, 13, 14) for y in range(5, 10)]
    home = footprint({0: factory(10, 10)})  # of player 0; that of player 1 is far away
    in_danger = 0
    for _ in range(25):
        cells = [block[index] for index in rng.permutation(len(block))[:12]]
        kinds = [(heavy, 10) if rng.random() < 0.5 else (robot, 1) for _ in cells]
        powers = [scale * int(rng.integers(80, 90)) for _, scale in kinds]
        units = [kind(*cell, power=power) for (kind, _), cell, power in zip(kinds, cells, powers)]
        obs = official(units[:6], theirs=units[6:], ice=cells)
        masks = [encode(obs, reward=reward)[0]["action_mask"] for reward in ("lichen", "ice")]
        for index, cell in enumerate(cells):
            player, slot = index // 6, FACTORIES + index % 6
            allowed, free = (mask[player, slot] for mask in masks)
            safe = free.copy()
            for action in np.flatnonzero(free):
                goal = beside(cell).get(lux.ROBOT_ACTIONS[action], cell)
                for other in range(6, 12) if player == 0 else range(6):
                    steps = distance(goal, cells[other])
                    if steps > 1 or (player == 0 and goal in home):
                        continue
                    if kinds[index] != kinds[other]:
                        safe[action] &= kinds[other][0] is robot
                    elif steps == 1:  # the one that moves wins, or of two the stronger
                        safe[action] &= goal != cell and powers[other] < powers[index]
            in_danger += (safe != free).any()
            assert (allowed == (safe if safe.any() else free)).all(), index
    assert in_danger > 50


def allowed_actions(obs, **options):
    """Names of the actions that the first robot of player 0 may take."""
    mask = encode(obs, **options)[0]["action_mask"][0, FACTORIES]
    return {lux.ROBOT_ACTIONS[action] for action in np.flatnonzero(mask)}


def test_in_danger_everywhere():
    """A robot that is in danger whatever it does may do anything."""
    heavies = [heavy(*cell) for cell in ((5, 4), (5, 6), (3, 5), (7, 5))]
    sides = ["move_right", "move_left", "move_down"]
    everything = ["stay", "move_up", *sides, "dig"]
    for number, expected in enumerate((sides, sides[:2], sides[:1], everything), 1):
        obs = official([robot(5, 5)], theirs=heavies[:number], ice=[(5, 5)])
        assert allowed_actions(obs) == set(expected)


@pytest.mark.parametrize("reward, kept", [("lichen", 20), ("ice", 0)])
@pytest.mark.parametrize("kind, dig, step, order", [(robot, 5, 1, 1), (heavy, 60, 20, 10)])
def test_light_robots_keep_power(reward, kept, kind, dig, step, order):
    """4 cells from home: what a dig or a step away leaves must pay 4 or 5 steps and 3 orders, and 20 to run away."""
    kept *= kind is robot
    for action, cost in (("dig", dig + 4 * step), ("move_left", step + 5 * step)):
        least = order + cost + 3 * order + kept
        for power, may in ((least - 1, False), (least, True)):
            allowed = allowed_actions(official([kind(5, 10, power=power)], ice=[(5, 10)]), reward=reward)
            assert (action in allowed) == may and "move_right" in allowed


@pytest.mark.parametrize("kind, lichen, ice", [(robot, 45, 10), (heavy, 900, 100)])
def test_least_power_picked_up(kind, lichen, ice):
    """30% of the battery, or with the reward "ice" ten times what the order costs."""
    for reward, least in (("lichen", lichen), ("ice", ice)):
        for power in (least - 1, least):
            obs = official([kind(10, 10, power=20)], [factory(10, 10, power=power)])
            assert ("pick_up_power" in allowed_actions(obs, reward=reward)) == (power == least)


def test_running_away_needs_no_reserve():
    """With 8 units of power it may not leave home, unless it would be destroyed where it is."""
    obs = official([robot(5, 10, power=8)], ice=[(5, 10)])
    assert allowed_actions(obs) == {"stay", "move_right"}
    obs = official([robot(5, 10, power=8)], theirs=[heavy(6, 10)], ice=[(5, 10)])
    assert allowed_actions(obs) == {"move_up", "move_down", "move_left"}
    obs = official([robot(5, 10, power=8), robot(4, 10), robot(5, 9)], theirs=[heavy(6, 10)])
    assert allowed_actions(obs) == {"move_down"}  # not onto own robots


@pytest.mark.parametrize("reward, goes", [("lichen", "unit_11"), ("ice", "unit_10")])
def test_who_is_in_danger_moves_first(reward, goes):
    """Both step onto (5, 6); a heavy robot of the opponent can reach only the one that was born later."""
    obs = official([robot(4, 6), robot(5, 5)], theirs=[heavy(5, 4)])
    encoder = lux.LuxEncoder(replace(OPTIONS, reward=reward))
    encoder.reset(obs)
    arrays, view = encoder.encode([lux.read_observation(obs)])
    actions = np.zeros(arrays["kind"].shape, np.int64)
    actions[0, 0, FACTORIES : FACTORIES + 2] = lux.RIGHT, lux.DOWN
    ((orders, _),), (acts,) = encoder.orders(view, actions)
    assert orders.keys() == {goes} and list(acts.yielded_moves) == [1, 0]


def test_weights():
    """Of the default, and of the preset, which can be changed."""
    lichen = lux.weights_of("lichen", {"ore_dug": 1})
    assert lux.weights_of() == lux.REWARDS == WEIGHTS and lichen.keys() == WEIGHTS.keys()
    assert lichen["ore_dug"] == 1 and lichen["lichen_grown"] == 0.01


def test_placement():
    """The first factory stands on the best score, which counts lichen only if it is paid."""
    places = set()
    for reward in ("ice", "lichen"):
        env, (match,) = in_process(1, reward=reward)
        env.reset(seed=3)
        home, *_ = match.engine.state.factories["player_0"].values()
        obs = match.engine.reset(seed=match.seed)[0]["player_0"]
        score = lux.placement_score(obs, grow_lichen=reward == "lichen")
        assert tuple(home.pos.pos) == np.unravel_index(score.argmax(), score.shape)
        places.add(tuple(home.pos.pos))
    assert len(places) == 2
