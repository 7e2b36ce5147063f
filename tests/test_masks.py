"""Masks against the engine's own validator: what a mask allows, the engine carries out.

Random masked matches are played with the engine's validation on. A referee between wrapper and engine
sees every order that the engine is about to carry out, and what the validator makes of it. Every
action chosen must be carried out in that very step, as a new order or as one that continues. Two
exceptions are counted: robots that yield to an own robot, and stranded robots, which cannot pay for
an order (after a collision, or drained here on purpose).
"""

from collections import Counter

import luxai_s2.env
import numpy as np
import pytest
from helpers import after_every_step, entities, in_process, masked_random, watched_validator, weak_robots

import lux_wrapper as lux

DIRECTIONS = {"move_up": 1, "move_right": 2, "move_down": 3, "move_left": 4}
ORDER_TYPE = {"dig": "dig", "deliver": "transfer", "pick_up_power": "pickup"}
ORDER_TYPE |= {"build_light": "factory_build", "build_heavy": "factory_build"}
ORDER_TYPE |= {"water_lichen": "factory_water"} | dict.fromkeys(DIRECTIONS, "move")
IDLE = ("stay", "nothing")


class Referee:
    """Compares the actions chosen with the orders that the engine accepts; counts into `count`."""

    def __init__(self, monkeypatch, env, match):
        self.env, self.match, self.count = env, match, Counter()
        monkeypatch.setattr(luxai_s2.env, "validate_actions", watched_validator(self.see))
        for level in ("log_error", "log_warning", "log_info"):
            monkeypatch.setattr(match.engine, level, lambda *words: self.messages.append(" ".join(words)))

    def see(self, entity, order, passed):
        """What the validator makes of an order."""
        target = self.accepted if passed else self.rejected
        assert entity.unit_id not in target
        target[entity.unit_id] = order

    def step(self, obs, actions):
        """Play one step and judge it; what `env.step` returned."""
        state, match, encoder = self.match.engine.state, self.match, self.env.games.envs[0].encoder
        slots = [a | b for a, b in zip(encoder.robot_slots[0], encoder.factory_slots[0])]
        weak = weak_robots(state)
        before = {name: count.sum() for name, count in match.counts.items()}
        self.accepted, self.rejected, self.messages = {}, {}, []
        self.held_back, self.chosen, self.stranded = 0, set(), set()
        result = self.env.step(actions)
        for team in range(2):
            for unit_id, slot in slots[team].items():
                if obs["kind"][0, team, slot] != lux.NOBODY:
                    assert obs["action_mask"][0, team, slot, actions[0, team, slot]]
                    is_robot = obs["kind"][0, team, slot] != lux.FACTORY
                    names = lux.ROBOT_ACTIONS if is_robot else lux.FACTORY_ACTIONS
                    self.judge(unit_id, names[actions[0, team, slot]], unit_id in weak)
        assert self.accepted.keys() | self.rejected.keys() <= self.chosen | self.stranded
        if not result[2][0]:  # a new match begins with new counts
            gained = {name: count.sum() - before[name] for name, count in match.counts.items()}
            self.count["own_collisions"] += gained["own_collisions"]
            assert self.held_back == gained["right_of_way"]
        for message in self.messages:
            if "Tried to update action queue" in message:
                assert any(f" {unit_id} " in message for unit_id in self.stranded), message
            else:  # no malformed order, no lack of water, metal or power
                known = ("collided", "crashed", "lost all factories")
                assert any(words in message for words in known), message
        self.count["stranded"] += len(self.stranded)
        return result

    def judge(self, unit_id, action, is_weak):
        """What became of an action."""
        self.count[action] += 1
        self.count["actions"] += action not in IDLE
        accepted, rejected = self.accepted.get(unit_id), self.rejected.get(unit_id)
        where = f"{unit_id}, {action}: {accepted}, {rejected}"
        if is_weak and action in IDLE:
            # It cannot pay for any order, not even to stop what it can no longer pay for either.
            if rejected is not None or any(f" {unit_id} " in message for message in self.messages):
                self.stranded.add(unit_id)
        else:
            assert rejected is None, where
        if action in IDLE:
            assert accepted is None, where
        elif accepted is None and action in DIRECTIONS:
            self.held_back += 1
        else:
            assert accepted is not None and accepted.act_type == ORDER_TYPE[action], where
            assert action not in DIRECTIONS or accepted.move_dir == DIRECTIONS[action], where
            self.chosen.add(unit_id)


def riches(rng):
    """A function that changes the engine's state so that everything becomes possible, often just so.

    Factories live for ever; their water, metal and power are now plenty, now around what an order
    costs. So is the power of robots, some of which find ice or ore in their cargo. Lichen that is
    about to wither, or to spread, is sown now and then.
    """

    def sow(board, factories):
        free = (board.rubble == 0) & (board.ice == 0) & (board.ore == 0)
        free &= board.factory_occupancy_map == -1
        for factory in factories:
            x, y = factory.pos.pos
            near = np.zeros_like(free)
            near[max(x - 4, 0) : x + 5, max(y - 4, 0) : y + 5] = True
            own = np.isin(board.lichen_strains, (-1, factory.num_id))
            sown = free & near & own & (rng.random(free.shape) < 0.9)
            sown &= board.lichen < 18  # never less of what is spreading
            board.lichen[sown] = rng.choice([1, 2, 20, 21])
            board.lichen_strains[sown] = factory.num_id

    def change(state):
        robots, factories = entities(state)
        if state.real_env_steps % 8 == 0:
            sow(state.board, factories)
        for factory in factories:
            watering = factory.water_cost(state.env_cfg) + int(rng.choice([0, lux.WATER_RESERVE]))
            water = rng.choice([1, max(watering - 1, 0), watering, watering + 1, 1500])
            factory.cargo.water = int(water)
            factory.cargo.ice = 8  # 2 water, so that watering with the last drop does not kill
            factory.cargo.metal = int(rng.choice([0, 9, 10, 99, 100, 110, 500]))
            factory.power = int(rng.choice([0, 1, 49, 50, 499, 500, 3000]))
        for unit in robots:
            heavy = int(unit.is_heavy())
            full = lux.BATTERY[heavy]
            if rng.random() < 0.3:
                costs = lux.ORDER_COST[heavy], lux.DIG_COST[heavy], lux.MOVE_COST_ONTO[heavy, 100]
                power = rng.choice([0, *costs, full]) + rng.integers(-2, 13) * (1 + 9 * heavy)
                unit.power = int(np.clip(power, 0, full))
            if rng.random() < 0.05:
                unit.cargo.ice, unit.cargo.ore = rng.choice([0, 1, lux.CARGO[heavy]], 2).tolist()

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
        time = match.time
        actions = masked_random(rng, before["action_mask"], weights)
        obs, _, terminated, _, infos = referee.step(before, actions)
        if terminated[0] and not rich:  # of thirst, as random play always ends
            assert infos["episode"]["l"][0] == time + 1 < lux.GAME_LENGTH
            assert (infos["episode"]["factories_alive"] > 0).all()
            break
        assert not terminated[0]
    env.close()
    return referee.count


counts = {True: Counter(), False: Counter()}  # of the tests below, by safe_masks


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("safe_masks", [True, False])
def test_orders_of_poor_teams(monkeypatch, safe_masks, seed):
    """The game as it is, until random play has died of thirst."""
    count = play(monkeypatch, seed, 400, rich=False, safe_masks=safe_masks)
    assert count["actions"] > 500 and count["stranded"] <= 0.01 * count["actions"]
    counts[safe_masks] += count


@pytest.mark.parametrize("seed, map_size", [(3, 48), (6, 48), (5, 32)])
@pytest.mark.parametrize("safe_masks", [True, False])
def test_orders_of_rich_teams(monkeypatch, safe_masks, seed, map_size):
    """Crowds of robots, lichen to water, and stocks around every threshold."""
    options = {"map_size": map_size, "max_robots": 40, "min_factories": 3}
    counts[safe_masks] += play(monkeypatch, seed, 600, True, safe_masks=safe_masks, **options)


def test_enough_was_tried():
    """The tests above carried out over 100,000 actions of every kind, with both sets of masks."""
    for safe_masks, count in counts.items():
        for action in (*lux.ROBOT_ACTIONS, *lux.FACTORY_ACTIONS):
            assert count[action] > 100, (safe_masks, action)
        assert count["actions"] > 40_000
        assert count["stranded"] < 0.1 * count["actions"]
    assert counts[True]["actions"] + counts[False]["actions"] > 100_000
    assert counts[True]["own_collisions"] == 0 < counts[False]["own_collisions"]
