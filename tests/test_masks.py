"""Masks against the engine's own validator: what a mask allows, the engine accepts and carries out.

Random masked matches are played with the engine's validation on and a referee between wrapper and engine: it
sees every order that the engine is about to carry out and what its validator makes of it. Every action chosen
must be carried out in the very step in which it was chosen, be it a new order or one that goes on. Two
exceptions are counted: robots that wait because an own robot has the right of way, and stranded robots, whose
power (after a collision, or drained here on purpose) does not suffice to change their order.
"""

from collections import Counter

import luxai_s2.env
import numpy as np
import pytest
from helpers import after_every_step, entities, in_process, judged, masked_random, weak_robots

import lux_wrapper as lux

REQUIRED_ACTIONS = 100_000
DIRECTIONS = {"move_up": 1, "move_right": 2, "move_down": 3, "move_left": 4}
ORDER_TYPE = {"dig": "dig", "deliver": "transfer", "pick_up_power": "pickup", "build_light": "factory_build"}
ORDER_TYPE |= {"build_heavy": "factory_build", "water_lichen": "factory_water"}
IDLE = ("stay", "nothing")
SIDES = ((0, -1), (1, 0), (0, 1), (-1, 0))


class Referee:
    """Compares the actions chosen with the orders that the engine accepts; counts into `count`."""

    def __init__(self, monkeypatch, env, match):
        self.env, self.match, self.count = env, match, Counter()
        validate = luxai_s2.env.validate_actions

        def watched(env_cfg, state, actions_by_type, verbose=1):
            accepted = validate(env_cfg, state, actions_by_type, verbose)
            for entity, order, passed in judged(accepted, actions_by_type):
                target = self.accepted if passed else self.rejected
                assert entity.unit_id not in target
                target[entity.unit_id] = order
            return accepted

        monkeypatch.setattr(luxai_s2.env, "validate_actions", watched)
        for level in ("log_error", "log_warning", "log_info"):
            monkeypatch.setattr(match.engine, level, lambda *message: self.messages.append(" ".join(message)))

    def step(self, obs, actions):
        """Play one step and judge it; what `env.step` returned."""
        encoder, state = self.match.encoder, self.match.engine.state
        slots = [robots | factories for robots, factories in zip(encoder.robot_slot, encoder.factory_slot)]
        robots = {unit.unit_id: unit for unit in entities(state)[0]}
        weak = weak_robots(state)
        waited = int(encoder.right_of_way.sum())
        self.accepted, self.rejected, self.messages = {}, {}, []
        collisions = int(self.match.own_collisions.sum())
        result = self.env.step(actions)
        if not result[2][0]:
            self.count["own_collisions"] += int(self.match.own_collisions.sum()) - collisions
            alive = {unit.unit_id for unit in entities(state)[0]}
            self.count["lost"] += len(robots.keys() - alive)

        stranded, held_back, chosen = set(), 0, set()
        for team, player in enumerate(lux.PLAYERS):
            for unit_id, slot in slots[team].items():
                if obs["kind"][0, team, slot] == lux.NOBODY:
                    continue
                table = lux.ROBOT_ACTIONS if unit_id in robots else lux.FACTORY_ACTIONS
                action = table[actions[0, team, slot]]
                assert obs["action_mask"][0, team, slot, actions[0, team, slot]]
                accepted, rejected = self.accepted.get(unit_id), self.rejected.get(unit_id)
                self.count[action] += 1
                self.count["actions"] += action not in IDLE
                where = f"{unit_id} of {player} at step {encoder.time}, {action}"
                if unit_id in weak and action in IDLE:
                    # It cannot pay for any order, not even to stop what it can no longer pay for either.
                    if rejected is not None or any(f" {unit_id} " in message for message in self.messages):
                        stranded.add(unit_id)
                else:
                    assert rejected is None, f"rejected: {where} -> {rejected}"
                if action in IDLE:
                    assert accepted is None, f"not idle: {where} -> {accepted}"
                elif accepted is None and action in DIRECTIONS:
                    held_back += 1
                else:
                    assert accepted is not None, f"nothing done: {where}"
                    assert accepted.act_type == ORDER_TYPE.get(action, "move"), f"{where} -> {accepted}"
                    if action in DIRECTIONS:
                        assert accepted.move_dir == DIRECTIONS[action], f"{where} -> {accepted}"
                    chosen.add(unit_id)
        assert self.accepted.keys() | self.rejected.keys() <= chosen | stranded
        if not result[2][0]:  # a new match begins with a new count
            assert held_back == encoder.right_of_way.sum() - waited
        for message in self.messages:
            if "Tried to update action queue" in message:
                assert any(f" {unit_id} " in message for unit_id in stranded), message
            else:  # nothing else may be refused: no malformed order, no lack of water, metal or power
                assert "collided" in message or "crashed" in message or "lost all factories" in message, message
        self.count["steps"] += 1
        self.count["held_back"] += held_back
        self.count["stranded"] += len(stranded)
        return result


def riches(rng):
    """A function that changes the engine's state so that everything becomes possible, and often just so.

    Factories live for ever; water, metal and power are now plenty, now around what an order costs. So is
    the power of robots, some of which find ice or ore in their hold. Lichen that is about to wither, or to
    spread, is sown now and then.
    """

    def sow(state):
        board = state.board
        free = (board.rubble == 0) & (board.ice == 0) & (board.ore == 0) & (board.factory_occupancy_map == -1)
        for factory in entities(state)[1]:
            x, y = factory.pos.pos
            near = np.zeros_like(free)
            near[max(x - 4, 0) : x + 5, max(y - 4, 0) : y + 5] = True
            sown = free & near & (rng.random(free.shape) < 0.9) & np.isin(board.lichen_strains, (-1, factory.num_id))
            sown &= board.lichen < 18  # never less of what is spreading
            board.lichen[sown] = rng.choice([1, 2, 20, 21])
            board.lichen_strains[sown] = factory.num_id

    def change(state):
        if state.real_env_steps % 8 == 0:
            sow(state)
        robots, factories = entities(state)
        for factory in factories:
            watering = factory.water_cost(state.env_cfg) + int(rng.choice([0, lux.WATER_RESERVE]))
            factory.cargo.water = int(rng.choice([1, max(watering - 1, 0), watering, watering + 1, 1500]))
            factory.cargo.ice = 8  # 2 water, so that watering with the last drop does not kill
            factory.cargo.metal = int(rng.choice([0, 9, 10, 99, 100, 110, 500]))
            factory.power = int(rng.choice([0, 1, 49, 50, 499, 500, 3000]))
        for unit in robots:
            heavy = int(unit.is_heavy())
            if rng.random() < 0.3:
                full = lux.BATTERY[heavy]
                edge = rng.choice([0, lux.ORDER_COST[heavy], lux.DIG_COST[heavy], lux.MOVE_COST_ONTO[heavy, 100], full])
                unit.power = int(np.clip(edge + rng.integers(-2, 13) * (1 + 9 * heavy), 0, full))
            if rng.random() < 0.05:
                unit.cargo.ice, unit.cargo.ore = (int(rng.choice([0, 1, lux.CARGO[heavy]])) for _ in range(2))

    return change


def play(monkeypatch, seed, steps, rich, **options):
    """Random masked play with a referee; its counts."""
    env, (match,) = in_process(1, engine_options={"validate_action_space": True}, **options)
    rng = np.random.default_rng(seed)
    if rich:
        after_every_step(match, riches(rng))
    obs, _ = env.reset(seed=seed)
    assert match.engine.env_cfg.validate_action_space
    referee = Referee(monkeypatch, env, match)
    weights = np.ones(lux.NUM_ACTIONS)
    weights[lux.WATER] = 3  # also "move down" for robots
    for _ in range(steps):
        before = {key: obs[key].copy() for key in ("kind", "action_mask")}
        time = match.encoder.time
        obs, _, terminated, _, infos = referee.step(before, masked_random(rng, before["action_mask"], weights))
        if terminated[0] and not rich:  # of thirst, as random play always ends, and not by a forbidden order
            assert infos["episode"]["l"][0] == time + 1 < lux.GAME_LENGTH
            assert (infos["episode"]["factories_alive"] > 0).all()
            break
        assert not terminated[0]
    env.close()
    return referee.count


@pytest.mark.parametrize("lichen", [1, 2, 19, 20, 21])
def test_watering_needs_what_the_engine_will_ask(lichen):
    """One unit of water less than the engine's validator asks for, and the mask forbids, also as lichen withers.

    The engine asks for what it counted in the step before: lichen of 1 that is gone since, and the cells that
    lichen of 20, now 19, was about to spread to.
    """
    env, (match,) = in_process(1, safe_masks=False)
    asked = []

    def change(state):
        board = state.board
        if state.real_env_steps == 0:
            board.rubble[:] = 0  # room to spread
            free = (board.ice == 0) & (board.ore == 0) & (board.factory_occupancy_map == -1)
            for factory in entities(state)[1]:
                x, y = factory.pos.pos
                near = np.zeros_like(free)
                near[max(x - 6, 0) : x + 7, max(y - 6, 0) : y + 7] = True
                sown = free & near & (board.lichen_strains == -1)
                board.lichen[sown], board.lichen_strains[sown] = lichen, factory.num_id
        for factory in entities(state)[1]:
            cost = factory.water_cost(state.env_cfg)
            factory.cargo.water, factory.cargo.ice = max(cost - 1, 0), 8
            asked.append(cost)

    after_every_step(match, change)
    for seed in range(4):
        obs, _ = env.reset(seed=seed)
        for _ in range(4):
            assert not obs["action_mask"][..., : match.encoder.max_factories, lux.WATER].any()
            obs, *_ = env.step(np.zeros(obs["kind"].shape, np.int64))
    assert max(asked) >= 5
    env.close()


def test_cells_to_water():
    """Watering takes a unit of water for every 10 cells: 12 at the edge, the lichen, and where that may spread to."""
    env, (match,) = in_process(1, safe_masks=False)
    env.reset(seed=6)
    obs, rng = match.engine.state.get_obs(), np.random.default_rng(6)
    encoder, board = lux.LuxEncoder(safe_masks=False), obs["board"]
    encoder.reset(obs)
    out, spreads = encoder.arrays(), 0
    free = match.engine.state.board.factory_occupancy_map == -1
    factories = [factory for player in lux.PLAYERS for factory in obs["factories"][player].values()]
    strains, before = [factory["strain_id"] for factory in factories], np.full(free.shape, -1)
    for _ in range(40):
        grows = free & (rng.random(free.shape) < rng.choice([0.002, 0.01, 0.05]))
        grows[0, :2] = grows[-1, -2:] = True  # at the board's edge too
        board["lichen"] = grows * rng.choice([1, 17, 18, 20, 90], free.shape)
        board["lichen_strains"] = now = np.where(grows, rng.choice(strains, free.shape), -1)
        for less in (0, 1):
            for factory in factories:
                own = np.argwhere((now == factory["strain_id"]) | (before == factory["strain_id"])).tolist()
                own = set(map(tuple, own))
                goals = {(x + dx, y + dy) for x, y in own if board["lichen"][x, y] >= 18 for dx, dy in SIDES}
                goals = {(x, y) for x, y in goals if 0 <= x < 48 and 0 <= y < 48}
                spreads += len(goals - own)
                factory["cargo"]["water"] = -(-(12 + len(own | goals)) // 10) - less
            encoder.encode(obs, out)
            assert (out["action_mask"][out["kind"] == lux.FACTORY, lux.WATER] == (less == 0)).all()
            before = now  # what was there in the observation before counts too
    assert spreads > 1000
    env.close()


@pytest.fixture(scope="module")
def counts():
    return {True: Counter(), False: Counter()}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("safe_masks", [True, False])
def test_the_engine_accepts_every_order_of_poor_teams(monkeypatch, counts, safe_masks, seed):
    """The game as it is, until random play has died of thirst."""
    count = play(monkeypatch, seed, 400, rich=False, safe_masks=safe_masks)
    assert count["actions"] > 500 and count["stranded"] <= 0.01 * count["actions"]
    counts[safe_masks] += count


@pytest.mark.parametrize("seed, map_size", [(3, 48), (6, 48), (5, 32)])
@pytest.mark.parametrize("safe_masks", [True, False])
def test_the_engine_accepts_every_order_of_rich_teams(monkeypatch, counts, safe_masks, seed, map_size):
    """Crowds of robots, lichen to water, and stocks around every threshold."""
    options = {"safe_masks": safe_masks, "map_size": map_size, "max_robots": 40, "min_factories": 3}
    counts[safe_masks] += play(monkeypatch, seed, 600, rich=True, **options)


def test_enough_was_tried(counts):
    """Over 100,000 actions of every kind were carried out (by the tests above), with both sets of masks."""
    for safe_masks, count in counts.items():
        print(safe_masks, dict(count))
        for action in (*lux.ROBOT_ACTIONS, *lux.FACTORY_ACTIONS):
            assert count[action] > 100, (safe_masks, action)
        assert count["actions"] > 0.4 * REQUIRED_ACTIONS
        assert count["stranded"] < 0.1 * count["actions"]
    assert counts[True]["actions"] + counts[False]["actions"] > REQUIRED_ACTIONS
    assert counts[True]["own_collisions"] == 0 < counts[False]["own_collisions"]
