"""The wrapper against the real engine: slots, rewards, groups, placement, matches, workers."""

import contextlib
import copy
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from helpers import after_every_step, entities, hash_of, in_process, masked_random, scripted
from luxai_s2.actions import (
    DigAction,
    MoveAction,
    PickupAction,
    RechargeAction,
    SelfDestructAction,
    TransferAction,
    move_deltas,
)
from luxai_s2.config import EnvConfig
from luxai_s2.unit import UnitType

import lux_wrapper as lux


@contextlib.contextmanager
def time_limit(seconds):
    """Fail instead of hanging."""

    def too_long(signum, frame):
        raise TimeoutError(f"not done in {seconds} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def play(env, obs, policy, steps):
    """Play `steps` steps; yields (observations before, actions, what `step` returned)."""
    for _ in range(steps):
        before = {key: array.copy() for key, array in obs.items()}
        actions = policy(before)
        result = env.step(actions)
        yield before, actions, result
        obs = result[0]


def random_policy(seed=0, weights=1.0):
    rng = np.random.default_rng(seed)
    return lambda obs: masked_random(rng, obs["action_mask"], weights)


def idle(obs):
    return np.zeros(obs["kind"].shape, np.int64)


# ------------------------------------------------------------------------------------------------------
# Gymnasium's conventions
# ------------------------------------------------------------------------------------------------------


def test_spaces_describe_what_comes_back():
    """Observations of `reset` and `step` lie in the spaces; rewards are [N, P, E], ends [N]."""
    env, _ = in_process(2)
    assert isinstance(env, gym.vector.VectorEnv) and env.num_envs == 2
    obs, infos = env.reset(seed=1)
    assert infos == {} and env.observation_space.contains(obs)
    for step, (_, actions, result) in enumerate(play(env, obs, random_policy(), 40)):
        obs, rewards, terminated, truncated, infos = result
        assert env.action_space.contains(actions)
        if step % 10 == 9:
            assert env.observation_space.contains(obs)
            for match in range(2):
                assert env.single_observation_space.contains({key: array[match] for key, array in obs.items()})
        assert rewards.shape == obs["kind"].shape and rewards.dtype == np.float32
        assert terminated.shape == truncated.shape == (2,) and terminated.dtype == truncated.dtype == bool
        assert infos == {}
    assert (obs["kind"] >= lux.LIGHT).any()
    assert env.action_space.sample().shape == obs["kind"].shape
    env.close()


def test_the_action_space():
    """It says how many actions each slot has; no action drawn from it is a malformed order, which would end a match."""
    env, _ = in_process(2, max_robots=6, engine_options={"validate_action_space": True})
    number = env.single_action_space.nvec
    assert number.shape == (2, 11) and (number[:, :5] == 4).all() and (number[:, 5:] == 8).all()
    env.action_space.seed(0)
    env.reset(seed=1)
    for _ in range(70):
        actions = env.action_space.sample()
        assert (actions >= 0).all() and (actions < number).all()
        _, _, terminated, *_ = env.step(actions)
        assert not terminated.any()
    env.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_actions_that_there_are_not(num_workers):
    """One sentence says which, and nothing has been played; those of empty slots are ignored, whatever they are."""
    env = lux.LuxVecEnv(2, num_workers=num_workers, held_out=True)
    obs, _ = env.reset(seed=1)
    slot = int(np.flatnonzero(obs["kind"][1, 1] == lux.FACTORY)[-1])
    for action in (4, 7, -1, 10**6):
        actions = idle(obs)
        actions[1, 1, slot] = action
        with pytest.raises(
            ValueError, match=f"^match 1, player_1, slot {slot}: there is no action {action}, only 0 to 3$"
        ):
            env.step(actions)
    with pytest.raises(ValueError):
        env.step(idle(obs)[:, :, :-1])
    assert all(len(match["actions"]) == 0 for match in env.state())

    actions, empty = idle(obs), obs["kind"] == lux.NOBODY
    actions[..., 0] = lux.BUILD_LIGHT
    actions[empty] = np.resize([-(10**9), 7, 8, 300, -1], empty.sum())
    obs, *_ = env.step(actions)
    built = obs["kind"] == lux.LIGHT
    assert (built.sum(-1) == 1).all()
    actions = idle(obs)
    for action in (8, -1):
        actions[0, 0, built[0, 0]] = action
        with pytest.raises(ValueError, match=f"^match 0, player_0, slot 5: there is no action {action}, only 0 to 7$"):
            env.step(actions)
    state = env.state()
    assert not np.concatenate([match["actions"] for match in state])[:, empty[0]].any()
    seen = {key: array.copy() for key, array in obs.items()}
    obs, _ = env.load_state(state)
    assert all((obs[key] == array).all() for key, array in seen.items())
    for place, action in ((0, 4), (5, 8), (5, -1)):
        wrong = copy.deepcopy(state)
        wrong[1]["actions"][0, 0, place] = action
        with pytest.raises(ValueError, match="of another environment"):
            env.load_state(wrong)
    env.close()


def test_features_are_small_and_finite():
    """Inputs of a network: finite, of order 1, and exactly 0 in empty slots."""
    env, _ = in_process(2)
    obs, _ = env.reset(seed=2)
    for before, _, _ in play(env, obs, random_policy(), 120):
        assert np.isfinite(before["features"]).all() and np.abs(before["features"]).max() <= 4
        empty = before["kind"] == lux.NOBODY
        assert not before["features"][empty].any() and not before["action_mask"][empty].any()
        assert not before["position"][empty].any()
        assert before["action_mask"].any(-1)[~empty].all()
    env.close()


def test_both_players_see_their_own_side():
    """The board of the second player is that of the first with own and opponent's channels swapped."""
    env, (match,) = in_process(1, safe_masks=False)
    obs, _ = env.reset(seed=3)
    for _, _, (obs, *_) in play(env, obs, random_policy(), 60):
        pass
    mine, theirs = np.moveaxis(obs["board"][0], -1, 1)
    for what in ("factory", "lichen", "light", "heavy"):
        for a, b in (("own", "opponent"), ("opponent", "own")):
            assert (mine[lux.CHANNEL[f"{a}_{what}"]] == theirs[lux.CHANNEL[f"{b}_{what}"]]).all()
    board, state = match.engine.state.board, match.engine.state
    for view in (mine, theirs):
        assert (view[lux.CHANNEL["ice"]] == 100 * board.ice).all() and (
            view[lux.CHANNEL["ore"]] == 100 * board.ore
        ).all()
        assert (view[lux.CHANNEL["rubble"]] == board.rubble).all()
        assert (view[lux.CHANNEL["own_lichen"]] + view[lux.CHANNEL["opponent_lichen"]] == board.lichen).all()
    for team, player in enumerate(lux.PLAYERS):
        owned = [factory.num_id for factory in state.factories[player].values()]
        area = np.isin(board.factory_occupancy_map, owned)
        assert (obs["board"][0, team, ..., lux.CHANNEL["own_factory"]] == 100 * area).all()
        robots = np.zeros_like(board.rubble)
        for unit in state.units[player].values():
            robots[unit.pos.x, unit.pos.y] = 100
        own = obs["board"][0, team][..., [lux.CHANNEL["own_light"], lux.CHANNEL["own_heavy"]]].sum(-1)
        assert robots.any() and (own == robots).all()
    assert board.lichen.any()
    env.close()


def test_compass():
    """The way to the nearest ice, ore and factory, recomputed for every entity the slow way."""
    env, (match,) = in_process(1)
    obs, _ = env.reset(seed=4)
    checked = Counter()
    for before, _, _ in play(env, obs, random_policy(), 60):
        board = match.encoder
        for team, slot in np.argwhere(before["kind"][0] > lux.NOBODY):
            here = before["position"][0, team, slot]
            row = before["features"][0, team, slot]
            kind = before["kind"][0, team]
            for name, places in (
                ("ice", np.argwhere(board.ice[0])),
                ("ore", np.argwhere(board.ore[0])),
                ("home", before["position"][0, team][kind == lux.FACTORY]),
            ):
                distance = np.abs(places - here).sum(1)
                dx, dy, length = (row[lux.COLUMN[f"{name}_{what}"]] * 8 for what in ("dx", "dy", "distance"))
                assert length == pytest.approx(min(distance.min(), 8), abs=1e-4)
                if distance.min() <= 8:  # beyond that they are cut
                    goal = here + np.round([dx, dy]).astype(int)
                    assert (places[distance == distance.min()] == goal).all(1).any()
                    checked[kind[slot] == lux.FACTORY] += 1
    assert checked[False] > 500 and checked[True] > 500
    env.close()


def test_the_games_numbers():
    """The constants are those of the engine's own configuration."""
    rules = EnvConfig()
    kinds = [rules.ROBOTS["LIGHT"], rules.ROBOTS["HEAVY"]]
    assert (lux.GAME_LENGTH, lux.CYCLE, lux.DAY) == (rules.max_episode_length, rules.CYCLE_LENGTH, rules.DAY_LENGTH)
    assert (lux.ICE_PER_WATER, lux.ORE_PER_METAL) == (rules.ICE_WATER_RATIO, rules.ORE_METAL_RATIO)
    assert lux.GROWTH_PER_WATER == rules.LICHEN_WATERING_COST_FACTOR
    assert lux.LICHEN_TO_SPREAD == rules.MIN_LICHEN_TO_SPREAD
    for ours, theirs in (
        *(("METAL_COST", "METAL_COST"), ("POWER_COST", "POWER_COST"), ("CARGO", "CARGO_SPACE")),
        *(("BATTERY", "BATTERY_CAPACITY"), ("MOVE_COST", "MOVE_COST"), ("RUBBLE_COST", "RUBBLE_MOVEMENT_COST")),
        *(("DIG_COST", "DIG_COST"), ("ORDER_COST", "ACTION_QUEUE_POWER_COST")),
    ):
        assert getattr(lux, ours).tolist() == [getattr(kind, theirs) for kind in kinds], ours
    assert [(lux.DX[way], lux.DY[way]) for way in range(5)] == list(map(tuple, move_deltas))


def test_render():
    """Pictures by the engine's renderer, without a screen."""
    env, _ = in_process(1, render_mode="rgb_array")
    env.reset(seed=1)
    (picture,) = env.render()
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 5
    env.close()


# ------------------------------------------------------------------------------------------------------
# Slots
# ------------------------------------------------------------------------------------------------------


def keep_alive(state):
    """Stocks that let a team live, build and walk for ever."""
    robots, factories = entities(state)
    for factory in factories:
        factory.cargo.water, factory.cargo.metal, factory.power = 500, 500, 2000
    for unit in robots:
        unit.power = max(unit.power, 30)


def test_slots_over_a_full_match():
    """1000 steps with hundreds of births and deaths: who has a slot keeps it, and nobody inherits it unseen.

    The match ends by time: terminated, not truncated, and followed by the first observation of the next.
    """
    env, (match,) = in_process(1, max_factories=2, max_robots=6, safe_masks=False)
    obs, _ = env.reset(seed=5)
    rng = np.random.default_rng(5)

    def accidents(state):
        keep_alive(state)
        for unit in entities(state)[0]:
            if rng.random() < 0.02:
                state.board.units_map[state.board.pos_hash(unit.pos)].remove(unit)
                match.engine.destroy_unit(unit)

    after_every_step(match, accidents)
    encoder, state = match.encoder, match.engine.state
    owner = [{}, {}]  # slot -> unit_id as last seen
    births = deaths = reused = 0
    used = [set(), set()]
    for step, (before, _, (after, _, terminated, truncated, infos)) in enumerate(
        play(env, obs, random_policy(5), lux.GAME_LENGTH), start=1
    ):
        assert not truncated.any()
        if step == lux.GAME_LENGTH:
            break
        assert not terminated.any() and infos == {}
        for team, player in enumerate(lux.PLAYERS):
            units, slots = state.units[player], encoder.robot_slot[team]
            assert slots.keys() == units.keys() and len(set(slots.values())) == len(slots) <= 6
            now = {slot: unit_id for unit_id, slot in slots.items()}
            for slot, unit_id in now.items():
                assert encoder.max_factories <= slot < encoder.num_entities
                unit = units[unit_id]
                assert after["kind"][0, team, slot] == (lux.HEAVY if unit.is_heavy() else lux.LIGHT)
                assert tuple(after["position"][0, team, slot]) == tuple(unit.pos.pos)
                if owner[team].get(slot) != unit_id:  # born: the slot was empty, and seen empty
                    assert slot not in owner[team] and before["kind"][0, team, slot] == lux.NOBODY
                    births += 1
                    reused += slot in used[team]
            gone = owner[team].keys() - now.keys()
            deaths += len(gone)
            assert not after["kind"][0, team, list(gone)].any()
            assert {int(s) for s in np.flatnonzero(after["kind"][0, team] >= lux.LIGHT)} == now.keys()
            assert all(now[slot] == owner[team][slot] for slot in now.keys() & owner[team].keys())
            for unit_id, factory in state.factories[player].items():
                slot = encoder.factory_slot[team][unit_id]
                assert after["kind"][0, team, slot] == lux.FACTORY and slot < encoder.max_factories
                assert tuple(after["position"][0, team, slot]) == tuple(factory.pos.pos)
            owner[team] = now
            used[team] |= now.keys()
    assert births > 50 and deaths > 50 and reused > 40

    assert terminated.tolist() == [True] and truncated.tolist() == [False]
    episode = infos["episode"]
    assert infos["_episode"].tolist() == [True] and episode["l"].tolist() == [lux.GAME_LENGTH]
    assert (episode["factories_alive"] == episode["factories_placed"]).all()
    assert (episode["factories_alive_share"] == 1).all()
    assert match.engine.state is not state and match.engine.state.real_env_steps == 0
    assert (after["kind"] <= lux.FACTORY).all() and not after["features"][..., lux.COLUMN["time"]].any()
    env.close()


def test_full_slots_forbid_building():
    """With every slot taken nothing may be built, there are never more robots than slots, and it is counted."""
    env, (match,) = in_process(1, max_robots=3, min_factories=3)
    env.reset(seed=6)
    after_every_step(match, keep_alive)
    obs, _ = env.reset(seed=6)  # now the first observation is rich too, and all factories may build at once
    weights = np.ones(lux.NUM_ACTIONS)
    weights[[lux.BUILD_LIGHT, lux.BUILD_HEAVY]] = 20  # the numbers of moves for robots, which leave the centre
    full = 0
    for before, _, _ in play(env, obs, random_policy(6, weights), 100):
        robots = (before["kind"][0] >= lux.LIGHT).sum(-1)
        assert (robots <= 3).all()
        builds = before["action_mask"][0, :, : match.encoder.max_factories, lux.BUILD_LIGHT : lux.BUILD_HEAVY + 1]
        assert not builds[robots == 3].any()
        assert (builds.any(-1).sum(-1) <= 3 - robots).all()
        full += robots == 3
    assert (full > 20).all()
    # All factories are rich, so each of them was held back in each of those steps.
    assert (match.encoder.blocked_builds >= full * match.placed).all()
    env.close()


def test_slots_are_kept_for_first_heavies():
    """With as many slots as factories, and all of them rich, light robots wait until each has built a heavy one."""
    env, (match,) = in_process(1, max_robots=3, min_factories=3, max_factories=3)
    after_every_step(match, keep_alive)
    env.reset(seed=6)
    obs, _ = env.reset(seed=6)
    weights = np.ones(lux.NUM_ACTIONS)
    weights[lux.BUILD_LIGHT] = 20
    for before, _, _ in play(env, obs, random_policy(6, weights), 60):
        lights = (before["kind"][0] == lux.LIGHT).sum(-1)
        assert (lights == 0).all()
    assert ((before["kind"][0] == lux.HEAVY).sum(-1) == 3).all()
    env.close()


# ------------------------------------------------------------------------------------------------------
# Groups
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_by", ["entity", "cluster"])
def test_groups(group_by):
    """Entities stand alone; or robots belong to the factory that built them, and to the nearest after its end."""
    env, (match,) = in_process(1, group_by=group_by, min_factories=4, max_robots=12)
    obs, _ = env.reset(seed=8)
    assert match.placed.min() >= 3
    after_every_step(match, keep_alive)
    state, encoder = match.engine.state, match.encoder
    home = {}  # unit_id -> slot of its factory, by the test's own reckoning
    moved = 0
    for step, (_, _, (obs, *_)) in enumerate(play(env, obs, random_policy(8), 80)):
        if group_by == "entity":
            assert (obs["group"] == np.arange(encoder.num_entities)).all()
            continue
        if step in (40, 60):  # one factory of each team dies of thirst
            for player in lux.PLAYERS:
                next(iter(state.factories[player].values())).cargo.water = 0
        for team, player in enumerate(lux.PLAYERS):
            standing = {encoder.factory_slot[team][key]: f.pos.pos for key, f in state.factories[player].items()}
            for slot in standing:
                assert obs["group"][0, team, slot] == slot
            for unit_id, unit in state.units[player].items():
                if unit_id not in home:
                    (home[unit_id],) = [slot for slot, pos in standing.items() if (pos == unit.pos.pos).all()]
                group = int(obs["group"][0, team, encoder.robot_slot[team][unit_id]])
                if home[unit_id] in standing:
                    assert group == home[unit_id]
                else:
                    distance = {slot: np.abs(pos - unit.pos.pos).sum() for slot, pos in standing.items()}
                    assert distance[group] == min(distance.values())
                    home[unit_id], moved = group, moved + 1
    assert group_by == "entity" or moved >= 2
    env.close()


# ------------------------------------------------------------------------------------------------------
# Rewards
# ------------------------------------------------------------------------------------------------------


class Watch:
    """Compares the totals of a match with the engine's own counters, every 20 steps and at its end."""

    def __init__(self, env, match):
        self.match, self.engine, self.ended = match, match.engine, {}
        self.kind = env.matches.out["kind"][match.teams]
        self.engine.collect_stats = True
        self.achievements, self.reset, self.step = match._achievements, match.reset, match.step
        match._achievements, match.reset, match.step = self.watch_achievements, self.watch_reset, self.watch_step

    def watch_reset(self):
        if self.engine.state.stats:  # a match has just ended
            self.check()
            self.ended = dict(zip(lux.TERM, self.match.totals.sum(0)))
        self.dug, self.lichen, self.lichen_of = {"LIGHT": np.zeros(2), "HEAVY": np.zeros(2)}, np.zeros(2), {}
        self.reset()

    def watch_achievements(self, before):
        amounts, board = self.achievements(before), self.engine.state.board
        for unit in before[0]:
            team, slots = unit.team_id, self.match.encoder.robot_slot[self.match.teams]
            slot = slots[team][unit.unit_id]
            self.dug[unit.unit_type.name][team] += amounts[team, slot, lux.TERM["ice_dug"]]
        for factory in before[1]:
            now = int(board.lichen[board.lichen_strains == factory.num_id].sum())
            self.lichen[factory.team_id] += now - self.lichen_of.get(factory, 0)
            self.lichen_of[factory] = now
        return amounts

    def watch_step(self, orders, rewards):
        before, present = self.match.totals.copy(), self.kind > 0
        metrics = self.step(orders, rewards)
        assert not rewards[~present].any()
        if metrics is None:
            gained = (self.match.totals - before) @ list(lux.REWARDS.values())
            np.testing.assert_allclose(rewards.sum(-1), gained, atol=1e-5)
            if self.engine.state.real_env_steps % 20 == 0:
                self.check()
        return metrics

    def check(self):
        total = dict(zip(lux.TERM, self.match.totals.T))
        for team, player in enumerate(lux.PLAYERS):
            stats = self.engine.state.stats[player]
            generation = stats["generation"]
            for kind, dug in self.dug.items():
                assert dug[team] == generation["ice"][kind]
            assert total["ice_dug"][team] == sum(generation["ice"].values())
            assert total["ore_dug"][team] == sum(generation["ore"].values())
            assert total["ice_delivered"][team] == stats["transfer"]["ice"]
            assert total["ore_delivered"][team] == stats["transfer"]["ore"]
            assert total["water_made"][team] == generation["water"]
            assert total["metal_made"][team] == generation["metal"]
            assert total["factory_lost"][team] == stats["destroyed"]["FACTORY"]
            assert total["lichen_grown"][team] == self.lichen[team]
        returns = self.match.totals @ list(lux.REWARDS.values())
        np.testing.assert_allclose(self.match.returns, returns, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "policy, safe_masks, must_happen",
    [
        ("random", True, ("ice_dug", "ore_dug", "ice_delivered", "robot_lost", "factory_lost")),
        ("random", False, ("ice_dug", "ice_delivered", "robot_lost", "factory_lost")),
        ("scripted", True, ("ice_dug", "ore_dug", "ice_delivered", "ore_delivered", "water_made", "metal_made")),
        ("scripted", False, ("ice_delivered", "water_made", "lichen_grown", "factory_lost")),
    ],
)
def test_rewards_sum_to_the_engines_counters(policy, safe_masks, must_happen):
    """Every term, per team, over whole matches, against `state.stats` of the engine."""
    env, matches = in_process(3, safe_masks=safe_masks)
    watches = [Watch(env, match) for match in matches]
    obs, _ = env.reset(seed=10)
    weights = np.ones(lux.NUM_ACTIONS)
    weights[[lux.DIG, lux.DELIVER]] = 5
    scripted_ice_and_ore = partial(scripted, resources=("ice", "ore"))  # the second player dies of thirst
    policy = {"random": random_policy(9, weights), "scripted": scripted_ice_and_ore}[policy]
    ended = np.zeros(3, bool)
    for _, _, (_, _, terminated, _, infos) in play(env, obs, policy, 400):
        ended |= terminated
        if ended.all():
            break
    assert ended.all()
    for name in must_happen:
        assert any(watch.ended[name] != 0 for watch in watches), name
    env.close()


def place_robot(match, team, pos, kind=UnitType.HEAVY, **cargo):
    """A robot out of nowhere; it is seen from the next observation on."""
    engine = match.engine
    unit = engine.add_unit(engine.state.teams[lux.PLAYERS[team]], kind, np.array(pos))
    for name, amount in cargo.items():
        setattr(unit.cargo, name, amount)
    return unit


def ice_at_a_factory(match, team=0):
    """A factory of a team and an ice cell beside it (it is made where there is none)."""
    state = match.engine.state
    factory = next(iter(state.factories[lux.PLAYERS[team]].values()))
    x, y = factory.pos.pos
    x += 2 if x + 2 < state.board.rubble.shape[0] else -2
    state.board.rubble[x, y], state.board.ice[x, y], state.board.ore[x, y] = 0, 1, 0
    return factory, (int(x), int(y))


@pytest.fixture
def mine():
    """A match with a heavy robot of player 0 on ice beside a factory: env, match, factory, robot, its slot."""
    env, (match,) = in_process(1)
    env.reset(seed=10)
    factory, cell = ice_at_a_factory(match)
    unit = place_robot(match, 0, cell)
    match.encoder.reset(match.engine.state.get_obs())
    match.encoder.encode(match.engine.state.get_obs(), env.matches.out)
    yield env, match, factory, unit, match.encoder.robot_slot[0][unit.unit_id]
    env.close()


def act(env, slot, action):
    """Let player 0's robot do something and everybody else nothing; rewards [P, E] of the step."""
    actions = np.zeros(env.arrays["kind"].shape, np.int64)
    actions[0, 0, slot] = action
    return env.step(actions)[1][0].copy()


def test_rewards_by_hand(mine):
    """Two digs of 20 ice and one delivery of 40, each paid to the one who did it, and 10 water to the factory."""
    env, match, factory, unit, slot = mine
    at = match.encoder.factory_slot[0][factory.unit_id]
    others = np.ones((2, match.encoder.num_entities), bool)
    others[0, [slot, at]] = False
    survived = np.where(env.arrays["kind"][0] == lux.FACTORY, lux.REWARDS["survived"], 0)
    for dug in (20, 40):
        rewards = act(env, slot, lux.DIG)
        assert unit.cargo.ice == dug
        assert rewards[0, slot] == pytest.approx(20 * lux.REWARDS["ice_dug"])
        np.testing.assert_allclose(rewards[0, at], lux.REWARDS["survived"], rtol=1e-5)
        np.testing.assert_allclose(rewards[others], survived[others], rtol=1e-5)
    water = factory.cargo.water
    rewards = act(env, slot, lux.DELIVER)
    assert unit.cargo.ice == 0 and factory.cargo.water == water + 10 - 1
    assert rewards[0, slot] == pytest.approx(40 * lux.REWARDS["ice_delivered"])
    assert rewards[0, at] == pytest.approx(10 * lux.REWARDS["water_made"] + lux.REWARDS["survived"])
    np.testing.assert_allclose(rewards[others], survived[others], rtol=1e-5)


def test_going_on_costs_no_power(mine):
    """A robot that keeps digging is ordered once: 10 power for the order, 60 for each dig, 10 back by day."""
    env, match, _, unit, slot = mine
    orders, step = [], match.engine.step
    match.engine.step = lambda actions: (orders.append(actions["player_0"]), step(actions))[1]
    unit.power = 1000
    match.encoder.encode(match.engine.state.get_obs(), env.matches.out)
    for digs in range(1, 11):
        act(env, slot, lux.DIG)
        assert unit.power == 1000 - 10 - 60 * digs + 10 * digs
    assert [unit.unit_id in order for order in orders] == [True] + [False] * 9
    act(env, slot, 0)  # stopping is an order again
    assert list(orders[-1]) == [unit.unit_id] and len(orders[-1][unit.unit_id]) == 0
    act(env, slot, 0)  # staying is not
    assert orders[-1] == {}


def test_a_digger_keeps_the_power_for_its_way_home(mine):
    """It needs 10 + 60 for order and dig, and must keep 10 + 20 to step onto its factory and 10 for an order there."""
    env, match, factory, unit, slot = mine
    mask = env.arrays["action_mask"][0, 0, slot]
    for power in (109, 110, 500):
        unit.power = power
        match.encoder.encode(match.engine.state.get_obs(), env.matches.out)
        assert mask[lux.DIG] == (power >= 110)
    while mask[lux.DIG]:
        act(env, slot, lux.DIG)
    assert unit.power < 110
    act(env, slot, 4 if unit.pos.x > factory.pos.x else 2)
    assert abs(unit.pos.x - factory.pos.x) == 1 and mask[lux.PICK_UP]


def test_dropping_pays_nothing(mine):
    """Ice pays only in a factory: `deliver` elsewhere is masked, and pays nothing if it is sent all the same."""
    env, match, factory, unit, slot = mine
    assert not env.arrays["action_mask"][0, 0, slot, lux.DELIVER]  # nothing to deliver yet
    act(env, slot, lux.DIG)
    assert env.arrays["action_mask"][0, 0, slot, lux.DELIVER]
    state = match.engine.state
    theirs = next(iter(state.factories["player_1"].values()))
    far = next(
        cell
        for cell in np.argwhere(state.board.factory_occupancy_map == -1)
        if min(np.abs(cell - f.pos.pos).max() for f in entities(state)[1]) > 4
    )
    beside_theirs = theirs.pos.pos + ([2, 0] if theirs.pos.x + 2 < 48 else [-2, 0])
    for cell in (far, beside_theirs):
        state.board.units_map[state.board.pos_hash(unit.pos)].remove(unit)
        unit.pos.pos = np.array(cell)
        state.board.units_map[state.board.pos_hash(unit.pos)].append(unit)
        match.encoder.encode(state.get_obs(), env.matches.out)
        assert not env.arrays["action_mask"][0, 0, slot, lux.DELIVER]
        rewards = act(env, slot, lux.DELIVER)
        assert rewards[0, slot] == 0
        factories = env.matches.out["kind"] == lux.FACTORY
        np.testing.assert_allclose(rewards, np.where(factories, lux.REWARDS["survived"], 0), rtol=1e-5)
    for term in ("ice_delivered", "ore_delivered", "water_made"):
        assert match.totals[:, lux.TERM[term]].sum() == 0


def test_a_lost_robot_is_charged_to_itself():
    """Two own robots on one cell (possible without the safe masks): both are lost, both pay, both are counted."""
    env, (match,) = in_process(1, safe_masks=False)
    env.reset(seed=11)
    free = np.argwhere((match.engine.state.board.rubble == 0) & (match.engine.state.board.factory_occupancy_map == -1))
    x, y = next((x, y) for x, y in free.tolist() if 2 < x < 45 and [x + 2, y] in free.tolist())
    left, right = (place_robot(match, 0, (x + dx, y), UnitType.LIGHT) for dx in (0, 2))
    match.encoder.encode(match.engine.state.get_obs(), env.matches.out)
    slots = [match.encoder.robot_slot[0][unit.unit_id] for unit in (left, right)]
    actions = np.zeros(env.arrays["kind"].shape, np.int64)
    actions[0, 0, slots] = lux.ROBOT_ACTIONS.index("move_right"), lux.ROBOT_ACTIONS.index("move_left")
    obs, rewards, *_ = env.step(actions)
    assert not match.engine.state.units["player_0"] and not obs["kind"][0, 0, slots].any()
    np.testing.assert_allclose(rewards[0, 0, slots], 0.1 * lux.REWARDS["robot_lost"], rtol=1e-5)
    assert match.lost.tolist() == [2, 0] and match.own_collisions.tolist() == [2, 0]
    env.close()


def test_a_robot_built_onto_another_is_counted():
    """Without the safe masks a factory may build where a robot stands; the engine destroys both at once."""
    env, (match,) = in_process(1, safe_masks=False)
    match.engine.collect_stats = True
    env.reset(seed=12)
    actions = np.zeros(env.arrays["kind"].shape, np.int64)
    actions[0, 0, 0] = lux.BUILD_LIGHT
    env.step(actions)
    env.step(actions)
    stats = match.engine.state.stats["player_0"]
    assert not match.engine.state.units["player_0"]
    assert match.built[0].tolist() == [stats["generation"]["built"]["LIGHT"], 0] == [2, 0]
    assert match.lost[0] == stats["destroyed"]["LIGHT"] == 2
    assert match.own_collisions[0] >= 1
    env.close()


def test_metrics_of_a_match():
    """What `infos` says at the end of a match is what the engine counted."""
    env, (match,) = in_process(1)
    match.engine.collect_stats = True
    obs, _ = env.reset(seed=13)
    state, board = match.engine.state, match.engine.state.board
    alive = np.zeros(2)
    for before, _, (_, _, terminated, _, infos) in play(env, obs, random_policy(13), 400):
        alive += [len(state.factories[player]) for player in lux.PLAYERS]
        if terminated[0]:
            break
    episode = infos["episode"]
    assert set(episode) == {"l", *lux.TEAM_METRICS} and infos["_episode"].tolist() == [True]
    assert episode["l"].tolist() == [state.real_env_steps] and 100 < state.real_env_steps < 1000
    wanted = ("ice_transferred", "ice_per_factory", "factories_alive", "water", "ore", "metal", "lichen")
    for name in (*wanted, "r", "lights_built", "heavies_built", "robots_lost", "own_collisions", "blocked_builds"):
        assert episode[name].shape == (1, 2), name
    placed = [len(state.teams[player].factory_strains) for player in lux.PLAYERS]
    assert episode["factories_placed"][0].tolist() == placed
    np.testing.assert_allclose(episode["factories_alive"][0], alive / 1000)  # nothing after its end
    np.testing.assert_allclose(episode["factories_alive_share"][0], alive / 1000 / placed)
    for team, player in enumerate(lux.PLAYERS):
        stats = state.stats[player]
        assert episode["ice_transferred"][0, team] == stats["transfer"]["ice"]
        assert episode["ice_per_factory"][0, team] == pytest.approx(stats["transfer"]["ice"] / placed[team])
        assert episode["water"][0, team] == stats["generation"]["water"]
        assert episode["ore"][0, team] == stats["transfer"]["ore"]
        assert episode["metal"][0, team] == stats["generation"]["metal"]
        assert episode["lights_built"][0, team] == stats["generation"]["built"]["LIGHT"] > 0
        assert episode["heavies_built"][0, team] == stats["generation"]["built"]["HEAVY"]
        assert episode["robots_lost"][0, team] == stats["destroyed"]["LIGHT"] + stats["destroyed"]["HEAVY"]
        lichen = board.lichen[np.isin(board.lichen_strains, state.teams[player].factory_strains)].sum()
        assert episode["lichen"][0, team] == lichen
    env.close()


# ------------------------------------------------------------------------------------------------------
# The encoder alone, as in the official runner
# ------------------------------------------------------------------------------------------------------


def to_json(obs):
    """What the official runner sends: text."""
    return json.dumps(obs, default=lambda x: x.tolist())


def from_json(text):
    """What the official starter kit makes of it: dicts, numbers, and arrays for lists."""

    def arrays(x):
        if isinstance(x, dict):
            return {key: arrays(value) for key, value in x.items()}
        return np.array(x) if isinstance(x, list) else x

    return arrays(json.loads(text))


@pytest.mark.parametrize("group_by", ["entity", "cluster"])
def test_encoder_needs_only_the_observation(group_by):
    """A second encoder that gets every observation as JSON writes the same arrays and gives the same orders."""
    env, (match,) = in_process(1, group_by=group_by)
    observations, sent, step = [], [], match.engine.step

    def recorded_step(actions):
        sent.append(actions)
        result = step(actions)
        observations.append(to_json(match.engine.state.get_obs()))
        return result

    match.engine.step = recorded_step
    obs, _ = env.reset(seed=14)
    alone = lux.LuxEncoder(max_robots=20, group_by=group_by)
    out = alone.arrays()
    first = from_json(observations[-1])
    alone.reset(first)
    alone.encode(first, out)
    for before, actions, _ in play(env, obs, random_policy(14), 60):
        for key, array in out.items():
            assert (array == before[key][0]).all(), key
        for player, orders in zip(lux.PLAYERS, alone.orders(actions[0])):
            assert orders.keys() == sent[-1][player].keys()
            assert all(np.array_equal(order, sent[-1][player][unit_id]) for unit_id, order in orders.items())
        alone.encode(from_json(observations[-1]), out)
    assert (out["kind"] >= lux.LIGHT).sum() > 3
    env.close()


def test_orders_under_way(mine):
    """Moves and digs are known as the actions that they carry out; of other orders none is one that goes on."""
    env, match, _, unit, slot = mine
    state, row = match.engine.state, env.arrays["features"][0, 0, slot]
    for queue, action, name in (
        ([], lux.STAY, None),
        ([MoveAction(1, n=3), DigAction()], lux.UP, "order_up"),
        ([MoveAction(2, n=3)], lux.RIGHT, "order_right"),
        ([MoveAction(3)], lux.DOWN, "order_down"),
        ([MoveAction(4, n=9)], lux.LEFT, "order_left"),
        ([DigAction(n=3), MoveAction(2)], lux.DIG, "order_dig"),
        ([MoveAction(0, n=2)], lux.STAY, None),
        ([TransferAction(1, 0, 5, n=3)], lux.STAY, None),
        ([PickupAction(4, 9, n=3)], lux.STAY, None),
        ([RechargeAction(99)], lux.STAY, None),
        ([SelfDestructAction()], lux.STAY, None),
    ):
        unit.action_queue = queue
        for snapshot in (lux.read_observation(state.get_obs()), lux.read_engine(state)):
            assert snapshot.robots[0][unit.unit_id].under_way == action
        match.encoder.encode(state.get_obs(), env.matches.out)
        assert [key for key, column in lux.COLUMN.items() if "order" in key and row[column]] == [name] * bool(name)


def test_arrays_that_were_used_before():
    """The first observation of a match leaves nothing of what was in the arrays."""
    env, (match,) = in_process(1, max_robots=6)
    env.reset(seed=26)
    encoder = lux.LuxEncoder()
    clean, used = encoder.arrays(), encoder.arrays()
    for out in (clean, used):
        encoder.reset(match.engine.state.get_obs())
        for array in used.values():
            array[:] = 1
        encoder.encode(match.engine.state.get_obs(), out)
    assert all((used[key] == array).all() for key, array in clean.items())
    env.close()


BOT = """
import json, sys
for name in ("gymnasium", "multiprocessing", "luxai_s2", "luxai_s2_fast", "pettingzoo", "torch"):
    sys.modules[name] = None  # importing it fails
import numpy as np
import lux_wrapper as lux

def arrays(x):
    if isinstance(x, dict):
        return {key: arrays(value) for key, value in x.items()}
    return np.array(x) if isinstance(x, list) else x

game = json.load(open("game.json"), object_hook=None)
placing, observations, actions = arrays(game["placing"]), game["observations"], game["actions"]
encoder = lux.LuxEncoder(max_robots=20)
out, sent = encoder.arrays(), []
encoder.reset(arrays(observations[0]))
for number, (obs, chosen) in enumerate(zip(observations, actions)):
    encoder.encode(arrays(obs), out)
    np.savez(f"{number}.npz", **out)
    sent.append(encoder.orders(np.array(chosen)))
placed = [lux.early_phase_action(placing, player) for player in lux.PLAYERS]
json.dump([placed, sent], open("orders.json", "w"), default=lambda x: x.tolist())
try:
    lux.LuxVecEnv(1)
except ModuleNotFoundError as error:
    print(error)
"""


def test_a_bot_needs_numpy_alone(tmp_path):
    """The file beside a bot, no Gymnasium, multiprocessing or engine: observations in, orders out, as in training."""
    env, (match,) = in_process(1)
    game, seen, sent, step = {"actions": []}, [], [], match.engine.step
    placed = [lux.early_phase_action(match.engine.reset(seed=14)[0]["player_0"], player) for player in lux.PLAYERS]
    game["placing"] = match.engine.state.get_obs()

    def recorded_step(actions):
        sent.append([actions[player] for player in lux.PLAYERS])
        result = step(actions)
        if match.engine.state.real_env_steps >= 0:
            game.setdefault("observations", []).append(json.loads(to_json(match.engine.state.get_obs())))
        return result

    match.engine.step = recorded_step
    obs, _ = env.reset(seed=14)
    sent.clear()
    for before, actions, _ in play(env, obs, random_policy(14), 40):
        seen.append(before)
        game["actions"].append(actions[0])
    env.close()
    (tmp_path / "game.json").write_text(to_json(game))
    shutil.copy(lux.__file__, tmp_path)
    bot = subprocess.run([sys.executable, "-c", BOT], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert bot.returncode == 0 and bot.stdout == "LuxVecEnv needs Gymnasium: pip install gymnasium\n", bot.stderr
    for number, before in enumerate(seen):
        with np.load(tmp_path / f"{number}.npz") as out:
            assert out.keys() == before.keys()
            assert all((out[key] == array[0]).all() and out[key].dtype == array.dtype for key, array in before.items())
    assert (seen[-1]["kind"] >= lux.LIGHT).sum() > 3
    assert json.loads((tmp_path / "orders.json").read_text()) == json.loads(to_json([placed, sent]))


# ------------------------------------------------------------------------------------------------------
# Placement
# ------------------------------------------------------------------------------------------------------


def test_factories_stand_near_ice():
    """Every factory is placed where the engine allows it, and most stand within one step of ice."""
    env, (match,) = in_process(1)
    engine, near, placed = match.engine, 0, 0
    warnings = []
    engine.log_warning = lambda *message: warnings.append(message)
    for seed in range(15):
        match.next_seed = lambda: seed
        match.reset()
        state = engine.state
        ice = np.argwhere(state.board.ice)
        for player in lux.PLAYERS:
            factories = state.factories[player].values()
            assert len(factories) == state.board.factories_per_team and 2 <= len(factories) <= 5
            for factory in factories:
                assert (factory.cargo.water, factory.cargo.metal) == (150, 150)  # shared out evenly
                steps = np.maximum(np.abs(ice - factory.pos.pos) - 1, 0).sum(1)  # from its nearest cell
                near += steps.min() <= 1
                placed += 1
    assert not warnings
    assert near / placed > 0.6
    env.close()


def test_every_factory_is_placed_on_a_valid_cell():
    """The cell chosen is one of the observation's valid spawns; the score forbids all others."""
    env, (match,) = in_process(1)
    obs = match.engine.reset(seed=15)[0]["player_0"]
    placed = 0
    while obs["real_env_steps"] < 0:
        orders = {player: lux.early_phase_action(obs, player) for player in lux.PLAYERS}
        spawns = [order["spawn"] for order in orders.values() if "spawn" in order]
        assert len(spawns) <= 1
        for spawn in spawns:
            assert obs["board"]["valid_spawns_mask"][tuple(spawn)]
            score = lux.placement_score(obs)
            assert np.isneginf(score[~obs["board"]["valid_spawns_mask"]]).all()
            assert np.isfinite(score[obs["board"]["valid_spawns_mask"]]).all()
            placed += 1
        obs = match.engine.step(orders)[0]["player_0"]
    assert placed == 2 * obs["board"]["factories_per_team"]
    env.close()


def test_neurips_stage():
    """64 x 64 cells and 4 to 10 factories work too."""
    env, (match,) = in_process(1, map_size=64, min_factories=4, max_factories=10)
    obs, _ = env.reset(seed=16)
    assert obs["board"].shape[-3:-1] == (64, 64) and 4 <= match.placed[0] <= 10
    for _, _, (obs, *_) in play(env, obs, random_policy(16), 20):
        pass
    assert env.observation_space.contains(obs)
    env.close()


# ------------------------------------------------------------------------------------------------------
# Many matches: seeds, determinism, workers that fail
# ------------------------------------------------------------------------------------------------------


def rollout_hash(num_workers, steps=160, seed=17):
    """Hash of everything that 3 matches return under random actions; long enough that matches end."""
    env = lux.LuxVecEnv(3, num_workers=num_workers, max_robots=20)
    digest, ends = [], 0
    with contextlib.closing(env), time_limit(120):
        obs, _ = env.reset(seed=seed)
        for before, _, (_, rewards, terminated, truncated, infos) in play(env, obs, random_policy(seed), steps):
            ends += terminated.sum()
            metrics = [array for _, array in sorted(infos.get("episode", {}).items())]
            digest.append(hash_of(*before.values(), rewards, terminated, truncated, *metrics))
    assert ends > 0
    return digest


def test_same_seed_same_rollout():
    """In this process, in one worker and in two (which share 3 matches unevenly): bit by bit the same."""
    alone = rollout_hash(0)
    assert alone == rollout_hash(1)
    assert alone == rollout_hash(2)
    assert alone[0] != rollout_hash(0, steps=155, seed=18)[0]


def test_maps_do_not_depend_on_the_number_of_matches():
    """Match i plays the same maps, one after the other, for the same seed, whatever N is."""

    def maps(num_envs):
        env, matches = in_process(num_envs)
        env.reset(seed=19)
        seeds = [[match.seed] for match in matches]
        for _ in range(3):
            for match, played in zip(matches, seeds):
                match.reset()
                played.append(match.seed)
        env.close()
        return seeds

    three = maps(3)
    assert maps(1) == three[:1] and maps(2) == three[:2]
    assert len({seed for played in three for seed in played}) == 12


@pytest.mark.parametrize("options", [{}, {"group_by": "cluster", "safe_masks": False, "max_robots": 6}])
def test_matches_side_by_side_are_matches_alone(options):
    """Three matches in one encoder, one of which starts anew, and each in an environment of its own: all the same."""
    env, _ = in_process(3, **options)
    alone = [in_process(1, first_match=index, **options)[0] for index in range(3)]
    obs, _ = env.reset(seed=24)
    own = [one.reset(seed=24)[0] for one in alone]
    policy, ended = random_policy(24), np.zeros(3, bool)
    for step in range(170):
        for key, array in obs.items():
            assert all((array[index] == one[key][0]).all() for index, one in enumerate(own)), key
        actions = policy(obs)
        obs, rewards, terminated, _, infos = env.step(actions)
        for index, one in enumerate(alone):
            own[index], reward, over, _, info = one.step(actions[index : index + 1])
            assert (reward[0] == rewards[index]).all() and over[0] == terminated[index]
            if over[0]:
                assert all((x[0] == infos["episode"][key][index]).all() for key, x in info["episode"].items())
        ended |= terminated
        if step == 60:  # its teams have no water left
            for factory in (
                entities(env.matches.matches[1].engine.state)[1] + entities(alone[1].matches.matches[0].engine.state)[1]
            ):
                factory.cargo.water = 0
    assert ended.all()
    for one in (env, *alone):
        one.close()


def test_younger_matches_wait_unseen():
    """What the encoder counts in a match that waits for an older one to be played again is not that match's."""
    options = {"max_robots": 1, "min_factories": 3}
    env, _ = in_process(2, **options)
    obs, _ = env.reset(seed=27)
    for _ in range(158):
        actions = scripted(obs)
        actions[1] = 0  # it is over after some 150 steps
        obs, *_ = env.step(actions)
    ages = [len(match["actions"]) for match in env.state()]
    assert ages[0] == 158 and 0 < ages[1] < 10
    other, _ = in_process(2, **options)
    other.load_state(env.state())
    counted = env.matches.encoder.blocked_builds
    assert (counted[2:] > 0).all() and (other.matches.encoder.blocked_builds == counted).all()
    env.close()
    other.close()


def test_reset_with_a_seed_starts_over():
    """`reset(seed)` is the start of the same run, however often and after whatever came before."""
    env, _ = in_process(2)
    first = hash_of(*env.reset(seed=20)[0].values())
    for _ in play(env, env.reset(seed=21)[0], random_policy(), 5):
        pass
    assert hash_of(*env.reset(seed=20)[0].values()) == first != hash_of(*env.reset(seed=21)[0].values())
    assert hash_of(*env.reset()[0].values()) != hash_of(*env.reset()[0].values())
    env.close()


def test_held_out_maps_are_never_trained_on():
    """Evaluation plays map `seed + i` in match i, training maps come from elsewhere."""
    training, matches = in_process(4)
    training.reset(seed=0)
    trained = {match.next_seed() for match in matches for _ in range(500)} | {match.seed for match in matches}
    held_out, matches = in_process(4, held_out=True)
    held_out.reset(seed=0)
    assert [match.seed for match in matches] == [0, 1, 2, 3]
    evaluated = [match.next_seed() for _ in range(500) for match in matches]
    assert len(set(evaluated)) == 2000 and not set(evaluated) & trained
    assert max(evaluated) < lux.HELD_OUT_SEEDS <= min(trained)
    training.close()
    held_out.close()


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_killed_worker_is_an_error_not_a_hang(when, capfd):
    """A worker that is killed between or within steps raises LuxError at once and leaves no process behind.

    The error is all that is said: the other workers end without a traceback of their own.
    """
    env = lux.LuxVecEnv(2, num_workers=2)
    workers = list(env.workers)
    with time_limit(60):
        obs, _ = env.reset(seed=22)
        for _ in play(env, obs, random_policy(), 3):
            pass

        def kill():
            os.kill(workers[1].pid, signal.SIGKILL)

        if when == "before":
            kill()
            workers[1].join()
        else:
            os.kill(workers[1].pid, signal.SIGSTOP)  # it will not answer
            threading.Timer(0.5, kill).start()
        start = time.time()
        with pytest.raises(lux.LuxError, match="matches 1 to 1 .* died"):
            env.step(idle(obs))
        assert time.time() - start < 10
        env.close()
    assert capfd.readouterr().err == ""
    assert not any(worker.is_alive() for worker in workers)
    assert not {worker.pid for worker in workers} & {child.pid for child in multiprocessing.active_children()}


def test_a_workers_exception_is_named(monkeypatch, capfd):
    """What fails outside of the engine too, with its place on stderr."""

    def fail(self, actions):
        raise KeyError("unit_7")

    monkeypatch.setattr(lux.LuxEncoder, "orders", fail)  # processes that are forked from here have it
    env = lux.LuxVecEnv(2, num_workers=2)
    obs, _ = env.reset(seed=22)
    with pytest.raises(lux.LuxError, match="the worker process of matches 0 to 0 failed: KeyError: 'unit_7'"):
        env.step(idle(obs))
    env.close()
    assert 'raise KeyError("unit_7")' in capfd.readouterr().err


def test_no_orphans_when_the_program_is_killed(tmp_path):
    """Workers end by themselves when the process that owns them is gone without a word."""
    program = (
        "import lux_wrapper, time\n"
        "env = lux_wrapper.LuxVecEnv(2, num_workers=2)\n"
        "env.reset(seed=0)\n"
        "print(*[worker.pid for worker in env.workers], flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lux.__file__).parent)}
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    with time_limit(120):
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        owner.kill()
        owner.wait()
        deadline = time.time() + 20
        while time.time() < deadline and any(map(is_running, pids)):
            time.sleep(0.1)
    assert not any(map(is_running, pids))


def is_running(pid):
    """Whether a process runs; one that has ended and waits to be collected by init does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_engine_exception_names_match_and_seed(monkeypatch, num_workers):
    """Whatever the engine raises arrives as LuxError with the match, the seed of its map and the cause."""
    original = lux.LuxMatch.step

    def broken(match, orders, rewards):
        if lux.WATER - 1 in orders[0].values():
            raise IndexError("boom")
        return original(match, orders, rewards)

    monkeypatch.setattr(lux.LuxMatch, "step", broken)  # workers are forked, so they get it too
    env = lux.LuxVecEnv(3, num_workers=num_workers, held_out=True)
    workers = list(env.workers)
    with contextlib.closing(env), time_limit(60):
        obs, _ = env.reset(seed=500)
        actions = idle(obs)
        env.step(actions)
        actions[2, 0, 0] = lux.WATER
        with pytest.raises(lux.LuxError) as error:
            env.step(actions)
    message = str(error.value)
    assert "match 2" in message and "502" in message and "IndexError" in message and "boom" in message
    assert "\n" not in message
    assert not any(worker.is_alive() for worker in workers)


# ------------------------------------------------------------------------------------------------------
# Workers: how many, and how long they may take
# ------------------------------------------------------------------------------------------------------


def test_as_many_workers_as_cores_that_may_be_used(monkeypatch):
    """Those of the machine may be more, and are what counts only where the system does not tell.

    The processes of torchrun on one machine share them; where that leaves one core, it plays by itself.
    """
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {pid, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert lux.default_workers() == 3
    for num_envs, workers in ((4, 3), (2, 2)):
        env = lux.LuxVecEnv(num_envs)
        assert len(env.workers) == workers
        env.close()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert lux.default_workers() == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert lux.default_workers() == 0
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert lux.default_workers() == 2


def test_observations_of_many_matches_take_their_time(monkeypatch):
    """A worker says nothing while it makes the observations of all its matches: the more, the longer it may take."""
    encode = lux.LuxEncoder.encode_rows
    monkeypatch.setattr(lux, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr(lux, "ENCODED_PER_SECOND", 1)
    monkeypatch.setattr(lux.LuxEncoder, "encode_rows", lambda *arguments: time.sleep(3) or encode(*arguments))
    env = lux.LuxVecEnv(4, num_workers=1)
    before = time.time()
    with contextlib.closing(env), time_limit(60):
        env.reset(seed=1)
        env.step(idle(env.arrays))
    assert time.time() - before > 6


def test_a_few_seeds_are_named(monkeypatch):
    """Of the matches of a worker that hangs, and how many more there are."""
    monkeypatch.setattr(lux, "WORKER_TIMEOUT", 1)
    env = lux.LuxVecEnv(6, num_workers=1, held_out=True)
    with contextlib.closing(env), time_limit(60):
        obs, _ = env.reset(seed=700)
        os.kill(env.workers[0].pid, signal.SIGSTOP)
        with pytest.raises(
            lux.LuxError, match=r"matches 0 to 5 \(map seeds 700, 701, 702 and 3 more\) did nothing for 1 s"
        ):
            env.step(idle(obs))
