"""The faster parts of the engine (compat/luxai_s2_fast) against the original ones, each alone and in whole matches."""

import copy
import pickle
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import luxai_s2_fast as fast
import numpy as np
import pytest
from helpers import after_every_step, entities, hash_of, in_process, scripted
from luxai_s2 import LuxAI_S2
from luxai_s2.factory import Factory
from luxai_s2.map.position import Position
from test_masks import riches
from test_wrapper import play, random_policy, to_json

import lux_wrapper as lux

# ------------------------------------------------------------------------------------------------------
# Whole matches
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_size, validate", [(48, False), (32, True)])
def test_the_engine_plays_as_the_original(map_size, validate):
    """The original engine gets the same orders, and is in the same state after every step, lichen included."""
    options = {"validate_action_space": validate, "collect_stats": True}
    env, (match,) = in_process(1, map_size=map_size, max_robots=30, safe_masks=False, engine_options=options)
    assert isinstance(match.engine, fast.LuxAI_S2)
    original = LuxAI_S2(map_size=map_size, MIN_FACTORIES=2, MAX_FACTORIES=5, verbose=0, **options)
    assert not isinstance(original, fast.LuxAI_S2)
    after_every_step(match, riches(np.random.default_rng(0)))
    change, reset, step = riches(np.random.default_rng(0)), match.engine.reset, match.engine.step
    seen = Counter()

    def look(engine):
        robots, factories = entities(engine.state)
        lichen = [[sorted(f.grow_lichen_positions), sorted(f.connected_lichen_positions)] for f in factories]
        seen.update(robots=len(robots), connected=sum(len(c) for _, c in lichen))
        assert to_json(lux.read_engine(engine.state)) == to_json(lux.read_observation(engine.state.get_obs()))
        return to_json([engine.state.get_obs(), engine.state.stats, lichen])

    def reset_both(seed):
        original.reset(seed=seed)
        return reset(seed=seed)

    def step_both(actions):
        _, rewards, *ends, _ = original.step(copy.deepcopy(actions))
        if original.state.real_env_steps >= 0:
            change(original.state)
        result = step(actions)
        assert list(result[1:4]) == [rewards, *ends] and look(match.engine) == look(original)
        assert all(type(entity.pos) is fast.Cell for entity in sum(entities(match.engine.state), []))
        return result

    match.engine.reset, match.engine.step = reset_both, step_both
    obs, _ = env.reset(seed=23)
    assert all(type(team.factory_strains) is fast.Strains for team in match.engine.state.teams.values())
    weights = np.ones(lux.NUM_ACTIONS)
    weights[lux.WATER] = 4
    for _ in play(env, obs, random_policy(23, weights), 120):
        pass
    assert seen["robots"] > 2000 and seen["connected"] > 2000, seen
    env.close()


def whole_matches(policy, steps, **options):
    """Hashes of all that each step of two matches returns."""
    env, matches = in_process(2, **options)
    obs, _ = env.reset(seed=25)
    digest, ended = [], 0
    for before, _, (_, rewards, terminated, truncated, infos) in play(env, obs, policy, steps):
        metrics = [array for _, array in sorted(infos.get("episode", {}).items())]
        digest.append(hash_of(*before.values(), rewards, terminated, truncated, *metrics))
        ended += terminated.sum()
    env.close()
    return digest, ended, isinstance(matches[0].engine, fast.LuxAI_S2)


@pytest.mark.parametrize(
    "policy, options",
    [("random", {"safe_masks": False}), ("scripted", {"group_by": "cluster", "max_robots": 6, "map_size": 32})],
)
def test_the_wrapper_without_the_package(policy, options, monkeypatch):
    """Where luxai_s2_fast is not installed the engine itself plays: same observations, rewards and metrics."""
    make = {"random": lambda: random_policy(25), "scripted": lambda: scripted}[policy]
    with_it, ended, is_fast = whole_matches(make(), 250, **options)
    assert is_fast and (ended >= 2 or policy == "scripted")
    monkeypatch.setitem(sys.modules, "luxai_s2_fast", None)  # importing it fails now
    lux._engine_class.cache_clear()
    try:
        without, _, is_fast = whole_matches(make(), 250, **options)
    finally:
        lux._engine_class.cache_clear()
    assert not is_fast and without == with_it


def test_no_observations_are_made():
    """None in their place after placement, real ones before; whoever asks gets one, also after an error."""
    engine = fast.LuxAI_S2(map_size=48, MIN_FACTORIES=2, MAX_FACTORIES=2, verbose=0)
    obs = engine.reset(seed=3)[0]["player_0"]
    while obs["real_env_steps"] < 0:
        obs = engine.step({player: lux.early_phase_action(obs, player) for player in lux.PLAYERS})[0]["player_0"]
    nothing = {player: {} for player in lux.PLAYERS}
    observations, rewards, *_ = engine.step(nothing)
    assert observations == {"player_0": None, "player_1": None} and rewards.keys() == observations.keys()
    assert engine.state.get_obs()["real_env_steps"] == 1
    with pytest.raises(ValueError):
        engine.step({})
    assert engine.state.get_obs()["real_env_steps"] == 1


# ------------------------------------------------------------------------------------------------------
# Positions
# ------------------------------------------------------------------------------------------------------


def test_cells_are_positions():
    """What the engine, and its renderer, ask of a position: the same numbers, names and sums."""
    rng = np.random.default_rng(1)
    for x, y, dx, dy in rng.integers(-3, 64, (50, 4)):
        here, there = np.array([x, y]), np.array([dx, dy])
        cell, position = fast.Cell(here), Position(here.copy())
        for one, other in (
            (cell, position),
            (cell + there, position + there),
            (cell + (dx, dy), position + (dx, dy)),
            (cell + fast.Cell(there), position + Position(there)),
            (cell + Position(there), position + Position(there)),
            (cell - there, position - there),
            (cell - fast.Cell(there), position - Position(there)),
        ):
            assert (one.x, one.y) == (other.x, other.y) and str(one) == str(other)
            assert one.pos.dtype == other.pos.dtype and one.pos.tolist() == other.pos.tolist()
        assert type(cell + there) is fast.Cell and type(cell.x) is type((cell + there).y) is int
        cell.pos = position.pos = there
        assert cell.pos.tolist() == position.pos.tolist() == [dx, dy]
        for again in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            assert (again.x, again.y) == (dx, dy)


# ------------------------------------------------------------------------------------------------------
# Whose lichen it is
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strains", [[], [0], [0, 2, 5], [7, 3, 3, 12]])
def test_isin_of_strains(strains):
    """np.isin gives what it gives with any list, whatever is asked for, in whatever way."""
    ours, rng = fast.Strains(strains), np.random.default_rng(2)
    boards = [
        rng.integers(-1, 9, (48, 48)),
        rng.integers(-1, 30, (48, 48)),
        rng.integers(-50, 50, (3, 4, 5)),
        np.array([np.iinfo(np.int64).max, np.iinfo(np.int64).min, -1, 0]),
        np.full((2, 2), -1),
        np.zeros((0, 3), np.int64),
        np.array(3),
        rng.integers(0, 9, 20).astype(np.int16),
        rng.integers(0, 9, 20).astype(np.uint8),
        rng.integers(0, 9, 20) / 2,
        np.ma.masked_less(rng.integers(0, 9, 20), 3),
        [1, 2, 3],
        7,
    ]
    for board in boards:
        for options in ({}, {"invert": True}, {"kind": "sort"}, {"assume_unique": True}, {"invert": False}):
            expected, got = np.isin(board, strains, **options), np.isin(board, ours, **options)
            assert type(got) is type(expected) and got.dtype == bool and np.array_equal(got, expected), (board, options)
        assert np.array_equal(np.isin(element=board, test_elements=ours), np.isin(board, strains))
        assert np.array_equal(np.isin(board, test_elements=ours), np.isin(board, strains))
        assert np.array_equal(np.isin(board, ours, False, True), np.isin(board, strains, False, True))
        assert np.array_equal(np.isin(ours, board), np.isin(strains, board))
    assert np.array_equal(np.isin(ours, ours), np.isin(strains, strains))


def test_strains_are_a_list():
    """Every other function of NumPy, and JSON, take them for what they are."""
    strains = fast.Strains([4, 1])
    strains += [6]
    assert type(strains) is fast.Strains and strains == [4, 1, 6] and to_json(strains) == "[4, 1, 6]"
    assert np.concatenate([strains, [2]]).tolist() == [4, 1, 6, 2]
    assert np.max(strains) == 6 and np.unique(strains).tolist() == [1, 4, 6] and np.array(strains).shape == (3,)
    assert np.isin(np.array([1, 2, 6]), strains).tolist() == [True, False, True]  # with the one that has been added


# ------------------------------------------------------------------------------------------------------
# Lichen
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 24, 48, 64])
def test_bitboards(size):
    """There and back; and neighbours are those of the board's cells, none around the edge."""
    maps = np.random.default_rng(size).random((4, size, size)) < [[[0.02]], [[0.5]], [[1]], [[0]]]
    maps[3, [0, -1, 0, -1], [0, 0, -1, -1]] = True  # the corners
    board, *_ = fast.bitboards(np.ones((1, size, size), bool))
    for cells, bits in zip(maps, fast.bitboards(maps)):
        assert fast.cells_of(bits, size) == set(map(tuple, np.argwhere(cells).tolist()))
        around = np.pad(cells, 1)
        beside = around[:-2, 1:-1] | around[2:, 1:-1] | around[1:-1, :-2] | around[1:-1, 2:]
        found = fast.cells_of(fast.neighbours(bits, size) & board, size)
        assert found == set(map(tuple, np.argwhere(beside).tolist()))


def made_up_lichen(engine, rng):
    """Change the board of an engine: obstacles, and lichen of all factories around them that touches others'."""
    state, size = engine.state, engine.state.board.width
    board, factories = state.board, entities(state)[1]
    free = board.factory_occupancy_map == -1
    board.rubble[:] = np.where(free & (rng.random((size, size)) < rng.choice([0, 0.1, 0.4])), 10, 0)
    board.ice[:] = free & (rng.random((size, size)) < 0.03)
    board.ore[:] = free & (rng.random((size, size)) < 0.03)
    board.lichen[:], board.lichen_strains[:] = 0, -1
    for factory in factories:
        cells = np.argwhere(free)
        distance = np.abs(cells - factory.pos.pos).sum(1)
        cells = cells[(distance < rng.integers(2, 12)) & (rng.random(len(cells)) < 0.8)]
        board.lichen[tuple(cells.T)] = rng.choice([1, 19, 20, 21, 100], len(cells))
        board.lichen_strains[tuple(cells.T)] = factory.num_id


def found_by(factory):
    return factory.grow_lichen_positions, factory.connected_lichen_positions


@pytest.mark.parametrize("map_size", [32, 48])
def test_the_search_for_lichen(map_size):
    """On boards made up the cells found are those of the original search, also at the edges and beside others'."""
    engine = fast.LuxAI_S2(map_size=map_size, MIN_FACTORIES=4, MAX_FACTORIES=4, verbose=0)
    obs, rng, sizes = engine.reset(seed=4)[0]["player_0"], np.random.default_rng(5), Counter()
    while obs["real_env_steps"] < 0:
        orders = {player: lux.early_phase_action(obs, player) for player in lux.PLAYERS}
        for order in orders.values():
            if "spawn" in order and rng.random() < 0.5:  # somewhere near the edge
                cells = np.argwhere(obs["board"]["valid_spawns_mask"])
                order["spawn"] = cells[np.minimum(cells, map_size - 1 - cells).min(1).argmin()]
        obs = engine.step(orders)[0]["player_0"]
    factories = entities(engine.state)[1]
    assert len(factories) == 8 and all(type(factory) is fast.LichenFactory for factory in factories)
    edges = [min(factory.pos.x, factory.pos.y) == 1 for factory in factories]
    assert any(edges) and not all(edges)
    orders = defaultdict(list)

    def search():
        engine._handle_recharge_actions(orders)
        for factory in factories:
            factory.cache_water_info(engine.state.board, engine.env_cfg)
        engine._handle_factory_water_actions(orders)

    def compare():
        for factory in factories:
            original = Factory(SimpleNamespace(team_id=0), factory.unit_id, factory.num_id)
            original.pos = Position(factory.pos.pos)
            original.cache_water_info(engine.state.board, engine.env_cfg)
            assert found_by(factory) == found_by(original)
            sizes.update(grow=len(found_by(original)[0]), connected=len(found_by(original)[1]))

    board = engine.state.board
    for number in range(40):
        made_up_lichen(engine, rng)
        search()
        compare()
        before = [found_by(factory) for factory in factories]
        search()  # nothing has changed, so nothing is made anew
        assert all(now[0] is then[0] for now, then in zip(map(found_by, factories), before))
        x, y = rng.permutation(np.argwhere(board.factory_occupancy_map == -1))[0]
        changes = {"lichen": 20, "lichen_strains": factories[number % 3].num_id, "rubble": 10, "ice": 1, "ore": 1}
        what = list(changes)[number % 5]
        old = getattr(board, what)[x, y]
        getattr(board, what)[x, y] = changes[what]
        if number % 2:  # asked in between, as nobody does, it searches as the original
            for factory in factories:
                factory.cache_water_info(board, engine.env_cfg)
            compare()
            getattr(board, what)[x, y] = old
        search()
        compare()
        if number % 10 == 5:
            engine.destroy_factory(factories.pop())
            search()
            compare()
    assert sizes["grow"] > 5000 and sizes["connected"] > 3000, sizes
    assert board.ground is None
