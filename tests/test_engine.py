"""The faster engine (compat/luxai_s2_fast) against the original: whole matches, then its parts."""

import copy
import sys
from collections import Counter
from pathlib import Path

import luxai_s2_fast as fast
import numpy as np
import pytest
from helpers import entities, hash_of, in_process, masked_random, scripted, to_json
from luxai_s2 import LuxAI_S2
from luxai_s2.map.position import Position

import lux_wrapper as lux


def test_the_installed_package_is_the_one_in_compat():
    """The other tests test what is installed, which may be an old copy."""
    compat = Path(__file__).resolve().parent.parent / "compat"
    ours = compat / "luxai_s2_fast" / "luxai_s2_fast" / "__init__.py"
    assert Path(fast.__file__).read_bytes() == ours.read_bytes()


def place_factories(*engines, seed):
    """Start the same match in each engine and place its factories, some at the edge of the map."""
    rng = np.random.default_rng(seed)
    obs = [engine.reset(seed=seed)[0]["player_0"] for engine in engines][0]
    while obs["real_env_steps"] < 0:
        orders = {player: lux.early_phase_action(obs, player) for player in lux.PLAYERS}
        cells = np.argwhere(obs["board"]["valid_spawns_mask"])
        to_edge = np.minimum(cells, engines[0].state.board.width - 1 - cells).min(1)
        for order in orders.values():
            if "spawn" in order and rng.random() < 0.5:
                order["spawn"] = cells[to_edge.argmin()]
        obs = [engine.step(copy.deepcopy(orders))[0]["player_0"] for engine in engines][0]


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
                amount, times = rng.integers(1, [50, 4])
                action = [kind, direction, resource, amount, repeat, times]
                own_orders[unit_id] = np.array([action] * int(rng.integers(1, 3)))
    return orders


def make_rich(state, rng):
    """Give everybody enough for most orders, watering with the last drop of water included."""
    robots, factories = entities(state)
    for unit in robots:
        unit.power = int(rng.integers(unit.battery_capacity // 4, unit.battery_capacity))
    for factory in factories:
        factory.power = 1000
        factory.cargo.metal = 200
        factory.cargo.ice = 8  # becomes 2 water, so that the factory survives this step
        watering = factory.water_cost(state.env_cfg)
        factory.cargo.water = int(rng.choice([max(watering - 1, 0), watering, 500]))


def change_ground(state, rng):
    """Change a cell near each factory, and every eighth step the whole map.

    Obstacles are scattered then, and lichen of all factories that touches the lichen of others.
    """
    board = state.board
    free = board.factory_occupancy_map == -1
    factories = entities(state)[1]
    strains = [factory.num_id for factory in factories]
    if state.real_env_steps % 8 == 0:
        board.rubble[:] = free & (rng.random(free.shape) < rng.choice([0, 0.1, 0.4]))
        board.ice[:] = free & (rng.random(free.shape) < 0.03)
        board.ore[:] = free & (rng.random(free.shape) < 0.03)
        board.lichen[:] = 0
        board.lichen_strains[:] = -1
        cells = np.argwhere(free)
        for factory in factories:
            distance = np.abs(cells - factory.pos.pos).sum(1)
            near = (distance < rng.integers(2, 9)) & (rng.random(len(cells)) < 0.8)
            x, y = cells[near].T
            board.lichen[x, y] = rng.choice([1, 20, 21, 22, 60, 100], len(x))
            board.lichen_strains[x, y] = factory.num_id
    values = dict.fromkeys(["rubble", "ice", "ore"], [0, 1])
    values |= {"lichen": [20, 21], "lichen_strains": [-1, *strains]}
    for factory in factories:
        name = rng.choice(list(values))
        x, y = np.clip(factory.pos.pos + rng.integers(-4, 5, 2), 0, board.width - 1)
        if free[x, y]:
            getattr(board, name)[x, y] = rng.choice(values[name])


@pytest.mark.parametrize("map_size, validate", [(48, False), (32, True)])
def test_the_engine_plays_as_the_original(map_size, validate):
    """With the same orders, both engines are in the same state after every step."""
    options = {"map_size": map_size, "validate_action_space": validate, "collect_stats": True}
    options |= {"MIN_FACTORIES": 4, "verbose": 0}
    engines = [fast.LuxAI_S2(**options), LuxAI_S2(**options)]
    place_factories(*engines, seed=23)
    factories = entities(engines[0].state)[1]
    assert {min(factory.pos.pos) == 1 for factory in factories} == {True, False}  # some at the edge
    seen = Counter()

    def look(state):
        lichen = [
            [sorted(factory.grow_lichen_positions), sorted(factory.connected_lichen_positions)]
            for factory in entities(state)[1]
        ]
        assert to_json(lux.read_engine(state)) == to_json(lux.read_observation(state.get_obs()))
        return to_json([state.get_obs(), state.stats, lichen])

    for step in range(100):
        orders = random_orders(engines[0].state, np.random.default_rng(step))
        found_before = [factory.grow_lichen_positions for factory in factories]
        for engine in engines:
            make_rich(engine.state, np.random.default_rng(step))
            change_ground(engine.state, np.random.default_rng(step))
        (_, *result), (_, *expected) = [engine.step(copy.deepcopy(orders)) for engine in engines]
        assert result == expected
        assert look(engines[0].state) == look(engines[1].state), step
        kept = sum(f.grow_lichen_positions is found for f, found in zip(factories, found_before))
        if step % 40 == 20:
            for engine in engines:
                engine.destroy_factory(entities(engine.state)[1][0])
        robots, factories = entities(engines[0].state)
        assert all(type(entity.pos) is fast.Cell for entity in robots + factories)
        connected = sum(len(factory.connected_lichen_positions) for factory in factories)
        seen.update(robots=len(robots), connected=connected, kept=kept)
    assert min(seen["robots"], seen["connected"]) > 2000 and seen["kept"] > 100, seen


def test_the_wrapper_without_the_package(monkeypatch):
    """Without it the original engine plays: same observations, rewards and metrics."""

    def play():
        """Hashes of what every step of two matches returns, and an engine."""
        rng = np.random.default_rng(25)
        env, matches = in_process(2, safe_masks=False)
        obs, _ = env.reset(seed=25)
        digest, ended = [], 0
        for step in range(250):
            actions = masked_random(rng, obs["action_mask"])
            if step % 50 < 10:
                actions = scripted(obs)
            obs, rewards, terminated, truncated, infos = env.step(actions)
            metrics = [array for _, array in sorted(infos.get("episode", {}).items())]
            digest.append(hash_of(*obs.values(), rewards, terminated, truncated, *metrics))
            ended += terminated.sum()
        env.close()
        assert ended >= 2
        return digest, matches[0].engine

    with_it, engine = play()
    assert isinstance(engine, fast.LuxAI_S2)
    monkeypatch.setitem(sys.modules, "luxai_s2_fast", None)  # importing it fails now
    lux._engine_class.cache_clear()
    try:
        without, engine = play()
    finally:
        lux._engine_class.cache_clear()
    assert not isinstance(engine, fast.LuxAI_S2)
    assert without == with_it


def test_no_observations_are_made():
    """After placement `step` returns None for them; `get_obs` makes one, even after an error."""
    engine = fast.LuxAI_S2(map_size=48, MIN_FACTORIES=2, MAX_FACTORIES=2, verbose=0)
    place_factories(engine, seed=3)  # reads observations
    observations, rewards, *_ = engine.step({player: {} for player in lux.PLAYERS})
    assert observations == {"player_0": None, "player_1": None}
    assert rewards.keys() == observations.keys()
    assert engine.state.get_obs()["real_env_steps"] == 1
    with pytest.raises(ValueError):
        engine.step({})
    assert engine.state.get_obs()["real_env_steps"] == 1


def test_factories_do_not_overlap():
    engine = fast.LuxAI_S2(map_size=48, verbose=0)
    place_factories(engine, seed=3)
    factory = entities(engine.state)[1][0]
    assert engine.add_factory(factory.team, factory.pos.pos) is None


def test_cells_are_positions():
    """The same coordinates, text, array and sums as the engine's positions, but Python ints."""
    for x, y, dx, dy in np.random.default_rng(1).integers(-3, 64, (20, 4)):
        step = np.array([dx, dy])
        position = Position(np.array([x, y]))
        cell = fast.Cell(0, 0)
        cell.pos = position.pos
        sums = [(cell + step, position + step), (cell - step, position - step)]
        for one, other in [(cell, position), *sums]:
            assert (one.x, one.y, str(one)) == (other.x, other.y, str(other))
            assert one.pos.dtype == other.pos.dtype
            assert one.pos.tolist() == other.pos.tolist()
        for one in (cell, cell + step):
            assert (type(one), type(one.x), type(one.y)) == (fast.Cell, int, int)
