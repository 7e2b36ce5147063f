"""The faster engine (compat/luxai_s2_fast) against the original: whole matches, then each part."""

import copy
import json
import pickle
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import luxai_s2_fast as fast
import numpy as np
import pytest
from helpers import entities, hash_of, in_process, masked_random, scripted
from luxai_s2 import LuxAI_S2
from luxai_s2.factory import Factory
from luxai_s2.map.position import Position

import lux_wrapper as lux

NOTHING = {player: {} for player in lux.PLAYERS}


def to_json(obs):
    return json.dumps(obs, default=lambda x: x.tolist())


def place_factories(engines, seed):
    """Start a match in each engine and place the factories, some of them at the edge of the map."""
    rng = np.random.default_rng(seed)
    obs = [engine.reset(seed=seed)[0]["player_0"] for engine in engines][0]
    while obs["real_env_steps"] < 0:
        orders = {player: lux.early_phase_action(obs, player) for player in lux.PLAYERS}
        for order in orders.values():
            if "spawn" in order and rng.random() < 0.5:
                cells = np.argwhere(obs["board"]["valid_spawns_mask"])
                to_edge = np.minimum(cells, len(obs["board"]["rubble"]) - 1 - cells).min(1)
                order["spawn"] = cells[to_edge.argmin()]
        obs = [engine.step(copy.deepcopy(orders))[0]["player_0"] for engine in engines][0]


# ------------------------------------------------------------------------------------------------------
# Whole matches
# ------------------------------------------------------------------------------------------------------


def random_orders(state, rng):
    """Orders of all kinds that the rules know, for both players; many of them are impossible."""
    orders = {player: {} for player in lux.PLAYERS}
    for player, own_orders in orders.items():
        for unit_id in state.factories[player]:
            own_orders[unit_id] = int(rng.choice(3, p=[0.1, 0.1, 0.8]))
        for unit_id in state.units[player]:
            if rng.random() < 0.4:
                kind = rng.choice(6, p=[0.6, 0.1, 0.1, 0.17, 0.01, 0.02])
                direction, resource, repeat = rng.integers(5, size=3)
                action = [kind, direction, resource, rng.integers(1, 50), repeat, rng.integers(1, 4)]
                own_orders[unit_id] = np.array([action] * int(rng.integers(1, 3)))
    return orders


def make_rich(state, rng):
    """Give everybody enough for any order, and sow lichen that is about to die or to spread."""
    board = state.board
    robots, factories = entities(state)
    for unit in robots:
        unit.power = int(rng.integers(unit.battery_capacity // 4, unit.battery_capacity))
    for factory in factories:
        factory.power, factory.cargo.metal = 1000, 200
        factory.cargo.ice = 8  # becomes 2 water, so that watering with the last drop does not kill
        watering = factory.water_cost(state.env_cfg)
        factory.cargo.water = int(rng.choice([max(watering - 1, 0), watering, 500]))
        x, y = np.maximum(factory.pos.pos - 4, 0)
        near = np.s_[x : x + 9, y : y + 9]
        free = (board.rubble[near] == 0) & (board.ice[near] == 0) & (board.ore[near] == 0)
        free &= (board.factory_occupancy_map[near] == -1) & (board.lichen[near] == 0)
        sown = free & (rng.random(free.shape) < 0.02)
        board.lichen[near][sown] = rng.choice([1, 2, 20, 21])
        board.lichen_strains[near][sown] = factory.num_id


@pytest.mark.parametrize("map_size, validate", [(48, False), (32, True)])
def test_the_engine_plays_as_the_original(map_size, validate):
    """Both engines get the same orders and are in the same state after every step, lichen included."""
    options = {"MIN_FACTORIES": 4, "validate_action_space": validate, "collect_stats": True, "verbose": 0}
    engines = [engine_class(map_size=map_size, **options) for engine_class in (fast.LuxAI_S2, LuxAI_S2)]
    place_factories(engines, seed=23)
    seen = Counter()

    def look(state):
        robots, factories = entities(state)
        lichen = [[sorted(f.grow_lichen_positions), sorted(f.connected_lichen_positions)] for f in factories]
        seen.update(robots=len(robots), connected=sum(len(connected) for _, connected in lichen))
        assert to_json(lux.read_engine(state)) == to_json(lux.read_observation(state.get_obs()))
        return to_json([state.get_obs(), state.stats, lichen])

    for step in range(120):
        orders = random_orders(engines[0].state, np.random.default_rng(step))
        for engine in engines:
            make_rich(engine.state, np.random.default_rng(step))
        (_, *result), (_, *expected) = [engine.step(copy.deepcopy(orders)) for engine in engines]
        assert result == expected
        assert look(engines[0].state) == look(engines[1].state), step
        robots, factories = entities(engines[0].state)
        assert all(type(entity.pos) is fast.Cell for entity in robots + factories)
        if step % 40 == 20:
            for engine in engines:
                engine.destroy_factory(entities(engine.state)[1][0])
    assert seen["robots"] > 2000 and seen["connected"] > 2000, seen
    assert {type(factory) for factory in factories} == {fast.LichenFactory}


def whole_matches(policy, steps, **options):
    """Hashes of what each step of two matches returns, the number of matches that ended, and an engine."""
    env, matches = in_process(2, **options)
    obs, _ = env.reset(seed=25)
    digest, ended = [], 0
    for _ in range(steps):
        obs, rewards, terminated, truncated, infos = env.step(policy(obs))
        metrics = [array for _, array in sorted(infos.get("episode", {}).items())]
        digest.append(hash_of(*obs.values(), rewards, terminated, truncated, *metrics))
        ended += terminated.sum()
    env.close()
    return digest, ended, matches[0].engine


@pytest.mark.parametrize("policy, options", [("random", {"safe_masks": False}), ("scripted", {"map_size": 32})])
def test_the_wrapper_without_the_package(policy, options, monkeypatch):
    """Where luxai_s2_fast is not installed the original engine plays: same observations, rewards and metrics."""

    def play():
        rng = np.random.default_rng(25)
        policies = {"random": lambda obs: masked_random(rng, obs["action_mask"]), "scripted": scripted}
        return whole_matches(policies[policy], 250, **options)

    with_it, ended, engine = play()
    assert isinstance(engine, fast.LuxAI_S2)
    assert ended >= 2 or policy == "scripted"
    monkeypatch.setitem(sys.modules, "luxai_s2_fast", None)  # importing it fails now
    lux._engine_class.cache_clear()
    try:
        without, _, engine = play()
    finally:
        lux._engine_class.cache_clear()
    assert not isinstance(engine, fast.LuxAI_S2)
    assert without == with_it


# ------------------------------------------------------------------------------------------------------
# The parts
# ------------------------------------------------------------------------------------------------------


def test_no_observations_are_made():
    """After placement `step` returns None for them; `get_obs` still makes one, also after an error."""
    engine = fast.LuxAI_S2(map_size=48, MIN_FACTORIES=2, MAX_FACTORIES=2, verbose=0)
    place_factories([engine], seed=3)  # reads observations
    observations, rewards, *_ = engine.step(NOTHING)
    assert observations == {"player_0": None, "player_1": None}
    assert rewards.keys() == observations.keys()
    assert engine.state.get_obs()["real_env_steps"] == 1
    with pytest.raises(ValueError):
        engine.step({})
    assert engine.state.get_obs()["real_env_steps"] == 1


def test_a_factory_that_cannot_be_placed():
    engine = fast.LuxAI_S2(map_size=48, verbose=0)
    place_factories([engine], seed=3)
    factory = entities(engine.state)[1][0]
    assert engine.add_factory(factory.team, factory.pos.pos) is None


def test_cells_are_positions():
    """The same coordinates, text, array and sums as the engine's positions."""
    for x, y, dx, dy in np.random.default_rng(1).integers(-3, 64, (20, 4)):
        step = np.array([dx, dy])
        cell = fast.Cell(int(x), int(y))
        position = Position(np.array([x, y]))
        moved = fast.Cell(0, 0)
        moved.pos = position.pos
        copies = [copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))]
        pairs = [(cell + step, position + step), (cell - step, position - step)]
        for one, other in pairs + [(same, position) for same in (cell, moved, *copies)]:
            assert (one.x, one.y) == (other.x, other.y) and str(one) == str(other)
            assert one.pos.dtype == other.pos.dtype and one.pos.tolist() == other.pos.tolist()
        for one in (cell + step, moved):
            assert type(one) is fast.Cell and type(one.x) is type(one.y) is int


def grow_randomly(engine, rng):
    """Scatter obstacles over the map, and lichen of all factories that touches the lichen of others."""
    state = engine.state
    board = state.board
    free = board.factory_occupancy_map == -1
    board.rubble[:] = 10 * (free & (rng.random(free.shape) < rng.choice([0, 0.1, 0.4])))
    board.ice[:] = free & (rng.random(free.shape) < 0.03)
    board.ore[:] = free & (rng.random(free.shape) < 0.03)
    board.lichen[:] = 0
    board.lichen_strains[:] = -1
    cells = np.argwhere(free)
    for factory in entities(state)[1]:
        distance = np.abs(cells - factory.pos.pos).sum(1)
        near = cells[(distance < rng.integers(2, 12)) & (rng.random(len(cells)) < 0.8)]
        board.lichen[tuple(near.T)] = rng.choice([1, 19, 20, 21, 100], len(near))
        board.lichen_strains[tuple(near.T)] = factory.num_id


@pytest.mark.parametrize("map_size", [32, 48])
def test_the_search_for_lichen(map_size):
    """After any change it finds the cells that the original finds, and no change means no new search."""
    engine = fast.LuxAI_S2(map_size=map_size, MIN_FACTORIES=4, MAX_FACTORIES=4, verbose=0)
    place_factories([engine], seed=4)
    board = engine.state.board
    factories = entities(engine.state)[1]
    assert any(min(factory.pos.pos) == 1 for factory in factories)  # at the edge
    assert any(min(factory.pos.pos) > 2 for factory in factories)
    rng = np.random.default_rng(5)
    sizes = Counter()

    def found_by(factory):
        return factory.grow_lichen_positions, factory.connected_lichen_positions

    def search():
        engine._handle_recharge_actions(defaultdict(list))
        for factory in factories:
            factory.cache_water_info(board, engine.env_cfg)

    def search_and_compare():
        search()
        for factory in factories:
            original = Factory(SimpleNamespace(team_id=0), factory.unit_id, factory.num_id)
            original.pos = Position(factory.pos.pos)
            original.cache_water_info(board, engine.env_cfg)
            assert found_by(factory) == found_by(original)
            sizes.update(grow=len(found_by(original)[0]), connected=len(found_by(original)[1]))

    for number in range(20):
        grow_randomly(engine, rng)
        search_and_compare()
        before = [found_by(factory) for factory in factories]
        search()
        assert all(now[0] is then[0] for now, then in zip(map(found_by, factories), before))
        for name, values in {
            "lichen": [19, 20],
            "lichen_strains": [-1, *(factory.num_id for factory in factories)],
            "rubble": [0, 10],
            "ice": [0, 1],
            "ore": [0, 1],
        }.items():
            near = rng.choice(factories).pos.pos + rng.integers(-4, 5, 2)
            x, y = np.clip(near, 0, map_size - 1)
            if board.factory_occupancy_map[x, y] == -1:
                getattr(board, name)[x, y] = rng.choice(values)
                search_and_compare()
        if number % 5 == 4:
            engine.destroy_factory(factories.pop())
            search_and_compare()
    assert sizes["grow"] > 5000 and sizes["connected"] > 3000, sizes
