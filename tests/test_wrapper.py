"""The wrapper against the real engine: spaces, refusals, matches side by side and resumed, workers.

test_encoder.py computes what it observes, allows, orders and pays a second time.
"""

import copy
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock

import gymnasium as gym
import numpy as np
import pytest
from helpers import entities, in_process, masked_random, scripted, to_json
from luxai_s2 import actions as engine_orders
from luxai_s2.config import EnvConfig
from luxai_s2.unit import UnitType

import lux_wrapper as lux


@pytest.fixture(autouse=True)
def time_limit():
    """Fail instead of hanging."""

    def too_long(*_):
        raise AssertionError("hangs")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(900)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def copies(arrays):
    return {key: array.copy() for key, array in arrays.items()}


def play(env, obs, policy, steps):
    """Play `steps` steps; yields (observations before, actions, what `step` returned)."""
    for _ in range(steps):
        before = copies(obs)
        actions = policy(before)
        result = env.step(actions)
        yield before, actions, result
        obs = result[0]


def random_policy(seed=0):
    rng = np.random.default_rng(seed)
    return lambda obs: masked_random(rng, obs["action_mask"])


def idle(obs):
    return np.zeros(obs["kind"].shape, np.int64)


def look(env):
    """What the environment observes of engine states that the test has changed."""
    games = env.games.envs[0]
    snapshots = [lux.read_engine(match.engine.state) for match in env.matches]
    obs, games.view = games.encoder.encode(snapshots)
    env.kind = obs["kind"]
    return obs


def encoder_of(env):
    return env.games.envs[0].encoder


# ------------------------------------------------------------------------------------------------
# Gymnasium's conventions
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"map_size": 64, "min_factories": 4, "max_factories": 10}])
def test_spaces(options):
    """Observations lie in the spaces, rewards are [N, P, E], ends [N]; no action is a malformed order.

    Features are fit for a network: finite, of order 1, and exactly 0 in empty slots.
    """
    strict = {"validate_action_space": True, "verbose": 0}  # a malformed order would end the match
    env, matches = in_process(2, engine_options=strict, **options)
    assert isinstance(env, gym.vector.VectorEnv) and env.num_envs == 2
    number = [len(lux.FACTORY_ACTIONS)] * options.get("max_factories", 5) + [8] * 20
    assert env.single_action_space.nvec.tolist() == [number, number]
    env.action_space.seed(0)
    env.reset(seed=1)
    for _ in range(70):
        actions = env.action_space.sample()
        assert (actions >= 0).all() and (actions < number).all()
        _, _, terminated, *_ = env.step(actions)
        assert not terminated.any()

    obs, infos = env.reset(seed=2)
    assert infos == {} and env.observation_space.contains(obs)
    assert obs["board"].shape[2:4] == (options.get("map_size", 48),) * 2
    assert matches[0].placed.min() >= options.get("min_factories", 2)
    for step, (before, actions, result) in enumerate(play(env, obs, random_policy(), 120)):
        obs, rewards, terminated, truncated, infos = result
        assert env.action_space.contains(actions)
        if step % 30 == 29:
            assert env.observation_space.contains(obs)
            one = {key: array[1] for key, array in obs.items()}
            assert env.single_observation_space.contains(one)
        assert rewards.shape == obs["kind"].shape and rewards.dtype == np.float32
        for ends in (terminated, truncated):
            assert ends.shape == (2,) and ends.dtype == bool and not ends.any()
        assert infos == {}
        assert np.isfinite(before["features"]).all() and np.abs(before["features"]).max() <= 4
        empty = before["kind"] == lux.NOBODY
        for array in (before["features"], before["position"], before["action_mask"], rewards):
            assert not array[empty].any()
        assert before["action_mask"].any(-1)[~empty].all()
    assert (obs["kind"] == lux.ROBOT).any()
    env.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_actions_that_are_refused(num_workers):
    """One sentence names the first, and nothing is played; those of empty slots are ignored."""
    env = lux.LuxVecEnv(2, num_workers=num_workers, held_out=True)
    for early in (env.state, lambda: env.step(np.zeros((2, 2, 11), int))):
        with pytest.raises(gym.error.ResetNeeded, match="^call reset first: no match has begun$"):
            early()
    obs, _ = env.reset(seed=1)
    actions = idle(obs)
    for wrong in (actions + 2.7, actions * np.nan, actions[0], actions > 0, actions[..., :-1]):
        named = re.escape(f"actions must be integers [2, 2, 11], got {wrong.dtype} {list(wrong.shape)}")
        with pytest.raises(ValueError, match=f"^{named}$"):
            env.step(wrong)
    factories = obs["kind"][1, 1] == lux.FACTORY
    slot = int(np.flatnonzero(factories)[-1])
    for action in (4, 7, -1, 10**6):
        actions = idle(obs)
        actions[1, 1, slot] = action
        named = f"match 1, player_1, slot {slot}: there is no action {action}, only 0 to 3"
        with pytest.raises(ValueError, match=f"^{named}$"):
            env.step(actions)
    assert all(len(match["actions"]) == 0 for match in env.state())

    actions = idle(obs)
    actions[..., 0] = lux.BUILD_LIGHT
    empty = obs["kind"] == lux.NOBODY
    actions[empty] = np.resize([-(10**9), 7, 8, 300, -1], empty.sum())
    obs, *_ = env.step(actions)
    built = obs["kind"] == lux.ROBOT
    assert (built.sum(-1) == 1).all()
    for action in (8, -1):
        actions = idle(obs)
        actions[0, 0, built[0, 0]] = action
        named = f"match 0, player_0, slot 5: there is no action {action}, only 0 to 7"
        with pytest.raises(ValueError, match=f"^{named}$"):
            env.step(actions)

    state = env.state()
    log = np.concatenate([match["actions"] for match in state])
    assert not log[:, empty[0]].any()
    seen = copies(obs)
    obs, _ = env.load_state(state)
    assert all((obs[key] == array).all() for key, array in seen.items())
    wrong = copy.deepcopy(state)
    for slot, action in ((0, 4), (5, 8), (5, -1)):
        wrong[1]["actions"][:] = 0
        wrong[1]["actions"][0, 0, slot] = action
        with pytest.raises(ValueError, match="of matches of another"):
            env.load_state(wrong)
    env.close()


@pytest.mark.parametrize(
    "options, refusal",
    [
        ({"robots": 5}, "there is no option robots; there are map_size, .*, group_by"),
        ({"map_size": 23}, "map_size must be 24 to 64, got 23"),
        ({"max_robots": True}, "max_robots must be 1 to 1000, got True"),
        ({"max_factories": 11}, "max_factories must be 1 to 10, got 11"),
        ({"min_factories": 6}, "min_factories must be at most max_factories, 5; got 6"),
        ({"safe_masks": 1}, "safe_masks must be True or False, got 1"),
        ({"reward": "ore"}, "reward must be ice or lichen, got ore"),
        ({"group_by": "mod-2"}, "group_by must be entity or cluster, got mod-2"),
        ({"num_envs": 0}, "num_envs must be an integer from 1 on, got 0"),
        ({"num_workers": -1}, "num_workers must be an integer from 0 on, got -1"),
        ({"first_match": 0.5}, "first_match must be an integer from 0 on, got 0.5"),
        ({"render_mode": "human"}, 'render_mode must be None or "rgb_array", got human'),
        ({"engine_options": {"CYCLE_LENGTH": 20}}, "engine_options may hold .*, not CYCLE_LENGTH"),
        ({"engine_options": {"max_episode_length": 1001}}, "max_episode_length must be at most 1000"),
        ({"reward_weights": {"gold": 1}}, "there is no reward term gold; .*"),
        ({"reward_weights": {"survived": np.nan}}, "the weight of survived must be a finite number, got nan"),
    ],
)
def test_options_that_are_refused(options, refusal):
    with pytest.raises(ValueError, match=f"^{refusal}$"):
        lux.LuxVecEnv(**{"num_envs": 1, "num_workers": 0} | options)


def in_a_daemon(pipe):
    try:
        env = lux.LuxVecEnv(2)
        pipe.send(type(env.games).__name__)
        lux.LuxVecEnv(2, num_workers=2)
    except ValueError as error:
        pipe.send(str(error))


def test_in_a_daemonic_process():
    """As in a multiprocessing.Pool: it plays in process, and refuses workers."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=in_a_daemon, args=(theirs,), daemon=True)
    process.start()
    assert ours.recv() == "SyncVectorEnv"
    assert ours.recv() == "a daemonic process cannot have workers: use num_workers=0"
    process.join()


def test_the_games_numbers():
    """The constants are those of the engine's own configuration."""
    rules = EnvConfig()
    kinds = [rules.ROBOTS["LIGHT"], rules.ROBOTS["HEAVY"]]
    for ours, theirs in {
        "GAME_LENGTH": "max_episode_length",
        "CYCLE": "CYCLE_LENGTH",
        "DAY": "DAY_LENGTH",
        "ICE_PER_WATER": "ICE_WATER_RATIO",
        "ORE_PER_METAL": "ORE_METAL_RATIO",
        "GROWTH_PER_WATER": "LICHEN_WATERING_COST_FACTOR",
        "LICHEN_TO_SPREAD": "MIN_LICHEN_TO_SPREAD",
    }.items():
        assert getattr(lux, ours) == getattr(rules, theirs), ours
    for ours, theirs in {
        "METAL_COST": "METAL_COST",
        "POWER_COST": "POWER_COST",
        "CARGO": "CARGO_SPACE",
        "BATTERY": "BATTERY_CAPACITY",
        "MOVE_COST": "MOVE_COST",
        "RUBBLE_COST": "RUBBLE_MOVEMENT_COST",
        "DIG_COST": "DIG_COST",
        "DIG_RUBBLE": "DIG_RUBBLE_REMOVED",
        "ORDER_COST": "ACTION_QUEUE_POWER_COST",
    }.items():
        assert getattr(lux, ours).tolist() == [getattr(kind, theirs) for kind in kinds], ours
    assert np.stack([lux.DX, lux.DY], 1).tolist() == engine_orders.move_deltas.tolist()


@pytest.mark.filterwarnings("error")
def test_render():
    """The engine's picture, without a screen, above a caption that follows step, ice and factories alone."""
    env, _ = in_process(1, render_mode="rgb_array")
    [match], width = env.matches, 400
    state = match.engine.state

    def changed(change):
        """Rows and columns of the caption in which a change shows."""
        (before,) = env.render()
        change()
        (after,) = env.render()
        assert after.dtype == np.uint8 and after.shape == (width + lux.CAPTION_HEIGHT, width, 3)
        rows, columns, _ = np.nonzero(before[width:] != after[width:])
        return rows, columns

    def bring(player, term):
        match.totals[player, lux.REWARD_INDEX[term]] += 7

    (picture,) = env.render()
    board, caption = (part.reshape(-1, 3).astype(int) for part in (picture[:width], picture[width:]))
    for colour in (*lux.PLAYER_COLOURS, *map(lux.GROUND_COLOURS.get, ("ice", "ore", "ground"))):
        assert (abs(board - colour).max(1) <= 3).sum() > 20 and (caption == colour).all(1).sum() > 100
    for change in (lambda: bring(0, "ice_dug"), lambda: state.board.rubble.fill(50)):
        assert not len(changed(change)[0])
    rows, columns = changed(lambda: setattr(state, "env_steps", state.env_steps + 5))
    assert rows.max() < 20 and columns.min() > 300
    for player, side in enumerate(lux.PLAYERS):
        for change in (lambda: bring(player, "ice_delivered"), lambda: state.factories[side].popitem()):
            rows, columns = changed(change)
            assert player * 20 <= rows.min() <= rows.max() < (player + 1) * 20 and columns.max() < 300
    for player, x, is_heavy in ((0, 10, False), (1, 20, True)):  # a circle, and a square with its corners
        kind = UnitType.HEAVY if is_heavy else UnitType.LIGHT
        match.engine.add_unit(state.teams[lux.PLAYERS[player]], kind, np.array([x, 7]))
        (picture,) = env.render()
        cell = width / lux.LuxOptions().map_size
        left, top = round(x * cell), round(7 * cell)
        assert picture[top + 4, left + 4].tolist() == [*lux.PLAYER_COLOURS[player]]
        assert (picture[top, left] == 255).all() == is_heavy and (picture[top + 4, left] == 255).all()
    env.close()
    env, _ = in_process(1)
    with pytest.raises(ValueError, match='^rendering needs .*render_mode="rgb_array"'):
        env.render()
    env.close()


# ------------------------------------------------------------------------------------------------
# Robots out of nowhere
# ------------------------------------------------------------------------------------------------


def ice_beside(state, team, dy=0):
    """A cell beside the first factory of a team that is made ice, and the way from there to it."""
    factory = next(iter(state.factories[lux.PLAYERS[team]].values()))
    x, y = factory.pos.pos
    right = x + 2 < state.board.width
    cell = int(x + 2 if right else x - 2), int(y + dy)
    state.board.rubble[cell] = 0
    state.board.ice[cell] = 1
    state.board.ore[cell] = 0
    return cell, lux.LEFT if right else lux.RIGHT


def place_robot(match, team, cell):
    """A heavy robot out of nowhere; it is seen from the next observation on."""
    owner = match.engine.state.teams[lux.PLAYERS[team]]
    return match.engine.add_unit(owner, UnitType.HEAVY, np.array(cell))


def test_a_robot_without_a_slot_shifts_no_reward():
    """It digs, delivers and destroys itself by orders of its own; others are paid as without it."""
    env, (match,) = in_process(1, max_robots=1)
    env.reset(seed=10)
    state = match.engine.state
    for team in range(2):
        cell, home = ice_beside(state, team)
        place_robot(match, team, cell)
        if team == 0:
            cell, _ = ice_beside(state, team, dy=1)
            extra = place_robot(match, team, cell)
            extra.action_queue = [
                engine_orders.DigAction(n=3),
                engine_orders.TransferAction(home, 0, 60),
                engine_orders.SelfDestructAction(),
            ]
    encoder_of(env).reset(state.get_obs())
    obs = look(env)
    robots = obs["kind"] == lux.ROBOT
    assert robots.sum((0, 2)).tolist() == [1, 1] and len(state.units["player_0"]) == 2
    paid = lux.REWARDS["survived"] * (obs["kind"] == lux.FACTORY)
    paid += 20 * lux.REWARDS["ice_dug"] * robots
    cargo = []
    for _ in range(5):
        for unit in entities(state)[0]:
            unit.power = 3000
        _, rewards, *_ = env.step(np.where(robots, lux.DIG, 0))
        np.testing.assert_allclose(rewards, paid, rtol=1e-5)
        cargo.append(extra.cargo.ice)
    assert cargo == [20, 40, 60, 0, 0] and match.counts["robots_lost"].tolist() == [1, 0]
    assert not match.totals[:, lux.REWARD_INDEX["robot_lost"]].any()
    env.close()


def test_dropping_pays_nothing():
    """Only an own factory pays for ice: `deliver` elsewhere is masked, and pays nothing if sent anyway."""
    env, (match,) = in_process(1)
    env.reset(seed=10)
    (x, y), home = ice_beside(match.engine.state, 0)
    beside_theirs, _ = ice_beside(match.engine.state, 1)
    for cell in ((x - lux.DX[home], y), beside_theirs):
        place_robot(match, 0, cell).cargo.ice = 20
    obs = look(env)
    robots = obs["kind"] == lux.ROBOT
    assert robots.sum() == 2 and not obs["action_mask"][robots, lux.DELIVER].any()
    survived = lux.REWARDS["survived"] * (obs["kind"] == lux.FACTORY)
    _, rewards, *_ = env.step(np.where(robots, lux.DELIVER, 0))
    np.testing.assert_allclose(rewards, survived, rtol=1e-5)
    env.close()


# ------------------------------------------------------------------------------------------------
# The encoder alone, as in the official runner
# ------------------------------------------------------------------------------------------------


def test_current_orders():
    """Moves and digs are known as the actions that they carry out; other orders end within a step."""
    env, (match,) = in_process(1)
    state = match.engine.state
    unit = place_robot(match, 0, (9, 9))
    dig, move = engine_orders.DigAction, engine_orders.MoveAction
    for queue, action in (
        ([], lux.STAY),
        ([move(1, n=3), dig()], lux.UP),
        ([move(2, n=3)], lux.RIGHT),
        ([move(3)], lux.DOWN),
        ([move(4, n=9)], lux.LEFT),
        ([dig(n=3), move(2)], lux.DIG),
        ([move(0, n=2)], lux.STAY),
        ([engine_orders.TransferAction(1, 0, 5, n=3)], lux.STAY),
        ([engine_orders.PickupAction(4, 9, n=3)], lux.STAY),
        ([engine_orders.RechargeAction(99)], lux.STAY),
        ([engine_orders.SelfDestructAction()], lux.STAY),
    ):
        unit.action_queue = queue
        for snapshot in (lux.read_observation(state.get_obs()), lux.read_engine(state)):
            assert snapshot.robots[0][unit.unit_id].current_action == action
    env.close()


BOT = """
import json, sys
for name in ("gymnasium", "luxai_s2", "luxai_s2_fast", "pettingzoo", "torch"):
    sys.modules[name] = None  # importing it fails
import numpy as np
import lux_wrapper as lux

def arrays(x):  # what the official starter kit makes of the text
    if isinstance(x, dict):
        return {key: arrays(value) for key, value in x.items()}
    return np.array(x) if isinstance(x, list) else x

game = json.load(open("game.json"))
encoder = lux.LuxEncoder(lux.LuxOptions(max_robots=20, group_by="cluster"))
encoder.reset(arrays(game["observations"][0]))
sent = []
for number, (obs, actions) in enumerate(zip(game["observations"], game["actions"])):
    seen, view = encoder.encode([lux.read_observation(arrays(obs))])
    np.savez(f"{number}.npz", **seen)
    orders, acts = encoder.orders(view, np.array([actions]))
    sent.append(orders[0])
placed = [lux.early_phase_action(arrays(game["placing"]), player) for player in lux.PLAYERS]
json.dump([placed, sent], open("orders.json", "w"), default=lambda x: x.tolist())
try:
    lux.LuxVecEnv(1)
except ModuleNotFoundError as error:
    print(error)
"""


def test_a_bot_needs_numpy_alone(tmp_path):
    """The file beside a bot, which reads JSON: the arrays and orders of training, without Gymnasium or engine."""
    env, (match,) = in_process(1, group_by="cluster")
    engine, step, sent = match.engine, match.engine.step, []
    game = {"actions": [], "observations": []}
    engine.reset(seed=14)
    game["placing"] = engine.state.get_obs()
    placed = [lux.early_phase_action(game["placing"], player) for player in lux.PLAYERS]

    def recorded_step(actions):
        result = step(actions)
        if engine.state.real_env_steps >= 0:
            game["observations"].append(json.loads(to_json(engine.state.get_obs())))
        if engine.state.real_env_steps > 0:
            sent.append([actions[player] for player in lux.PLAYERS])
        return result

    engine.step = recorded_step
    obs, _ = env.reset(seed=14)
    seen = []
    for before, actions, _ in play(env, obs, random_policy(14), 60):
        seen.append(before)
        game["actions"].append(actions[0])
    env.close()
    assert (seen[-1]["kind"] == lux.ROBOT).sum() > 3 and any(orders[0] for orders in sent)
    (tmp_path / "game.json").write_text(to_json(game))
    shutil.copy(lux.__file__, tmp_path)
    command = [sys.executable, "-c", BOT]
    bot = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert bot.returncode == 0, bot.stderr
    assert bot.stdout == "LuxVecEnv needs Gymnasium: pip install gymnasium\n"
    for number, before in enumerate(seen):
        with np.load(tmp_path / f"{number}.npz") as out:
            assert out.keys() == before.keys()
            for key, array in before.items():
                assert (out[key] == array).all() and out[key].dtype == array.dtype, key
    written = json.loads((tmp_path / "orders.json").read_text())
    assert written == json.loads(to_json([placed, sent]))


# ------------------------------------------------------------------------------------------------
# Many matches
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_workers, options",
    [
        (0, {"reward_weights": {"ice_dug": -1}}),
        (2, {"reward_weights": {"survived": 7}, "group_by": "cluster", "safe_masks": False}),
    ],
)
def test_matches_side_by_side_are_matches_alone(num_workers, options):
    """Four matches together, one of which begins again before the others, and each alone: all the same."""
    together = lux.LuxVecEnv(4, num_workers=num_workers, **{"max_robots": 20} | options)
    alone = [in_process(1, first_match=index, **options)[0] for index in range(4)]
    policy, ended = random_policy(24), np.zeros(4, int)
    obs, _ = together.reset(seed=24)
    own = [one.reset(seed=24)[0] for one in alone]
    for _ in range(180):
        for key, array in obs.items():
            assert all((array[index] == one[key][0]).all() for index, one in enumerate(own)), key
        actions = policy(obs)
        actions[1] = 0  # its teams have no water after some 150 steps
        obs, rewards, terminated, truncated, infos = together.step(actions)
        for index, one in enumerate(alone):
            own[index], reward, over, _, info = one.step(actions[[index]])
            assert (reward[0] == rewards[index]).all()
            assert over[0] == terminated[index] and not truncated[index]
            for key, x in info.get("episode", {}).items():
                assert (x[0] == infos["episode"][key][index]).all(), key
        ended += terminated
    assert (ended == 1).all()
    for env in (together, *alone):
        env.close()


def test_a_younger_match_waits_for_an_older_one():
    """Played again side by side, each match counts only what happened in it."""
    options = {"max_robots": 1, "min_factories": 3}
    env, matches = in_process(2, **options)
    obs, _ = env.reset(seed=27)
    is_next = False
    for _ in range(158):
        actions = scripted(obs)
        actions[1] *= is_next  # idle, the first one is over after some 150 steps
        obs, _, terminated, *_ = env.step(actions)
        is_next |= terminated[1]
    ages = [len(match["actions"]) for match in env.state()]
    assert ages[0] == 158 and 0 < ages[1] < 10
    other, resumed = in_process(2, **options)
    seen, _ = other.load_state(env.state())
    assert all((seen[key] == array).all() for key, array in obs.items())
    for one, two in zip(matches, resumed):
        assert one.counts["blocked_builds"].all() and one.seed == two.seed and one.time == two.time
        assert (one.totals == two.totals).all()
        for name, count in one.counts.items():
            assert (count == two.counts[name]).all(), name
    env.close()
    other.close()


def maps_played(num_envs, seed, **options):
    """Seeds of the first three maps of each match."""
    env, matches = in_process(num_envs, **options)
    for _ in range(num_envs):  # whatever came before
        env.reset(seed=5)
    obs, _ = env.reset(seed=seed)
    seeds = []
    for _ in range(3):
        seeds.append([match.seed for match in matches])
        for match in matches:
            for factory in entities(match.engine.state)[1]:
                factory.cargo.water = 0  # the match ends
        env.step(idle(obs))
    env.close()
    return np.transpose(seeds).tolist()


def test_maps(monkeypatch):
    """Match i plays the same maps for the same seed, whatever N is; held-out maps are not trained on."""
    monkeypatch.setattr(lux, "HELD_OUT_SEEDS", 2**30)
    trained = maps_played(3, 19)
    assert maps_played(1, 19) == trained[:1] and maps_played(2, 19) == trained[:2]
    assert maps_played(1, 19, first_match=2) == trained[2:]
    assert maps_played(1, None) != maps_played(1, None)
    assert np.size(np.unique(trained)) == 9 and np.min(trained) >= 2**30
    assert maps_played(3, 0, held_out=True) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert maps_played(2, 2**30 - 3, held_out=True) == [[2**30 - 3, 2**30 - 1, 1], [2**30 - 2, 0, 2]]


# ------------------------------------------------------------------------------------------------
# Workers
# ------------------------------------------------------------------------------------------------


def two_workers():
    """An environment, its observation and its processes."""
    env = lux.LuxVecEnv(4, num_workers=2, held_out=True)
    obs, _ = env.reset(seed=500)
    return env, obs, env.games.processes


def assert_ended(env, obs, why):
    """All workers have ended, and the environment refuses to continue and says why."""
    assert not any(process.is_alive() for process in getattr(env.games, "processes", ()))
    for call in (env.reset, env.state, lambda: env.step(idle(obs))):
        with pytest.raises(gym.error.ClosedEnvironmentError, match=f"^make a new environment: {why}$"):
            call()
    env.close()


@pytest.mark.parametrize("fault", ["killed", "killed within a step", "suspended"])
def test_a_worker_that_fails_is_an_error_not_a_hang(fault, monkeypatch, capfd):
    """It ends all workers, and the error is all that is said. They ignore signals that are sent to all."""
    env, obs, processes = two_workers()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(processes[0].pid, number)
    for _ in play(env, obs, random_policy(), 3):
        pass
    error, what = ChildProcessError, "died"
    if fault == "killed":
        processes[0].kill()
        processes[0].join()
    else:
        os.kill(processes[0].pid, signal.SIGSTOP)  # it will not answer
    if fault == "killed within a step":
        threading.Timer(0.5, processes[0].kill).start()
    if fault == "suspended":
        monkeypatch.setattr(lux, "WORKER_TIMEOUT", 0)
        error, what = TimeoutError, "did nothing for 2 s"
    why = f"the worker process of matches 0 to 1 {what}"
    with pytest.raises(error, match=f"^{why}$"):
        env.step(idle(obs))
    assert_ended(env, obs, why)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("command, steps", [("reset", 1), ("step", 1), ("state", 1), ("load_state", 4)])
def test_how_long_a_worker_may_take(command, steps, monkeypatch):
    """A minute, and a second more for each step of each of its matches."""
    env, obs, _ = two_workers()
    for _ in range(3):
        env.step(idle(obs))
    arguments = {"step": [idle(obs)], "load_state": [env.state()]}.get(command, [])
    monkeypatch.setattr(env.games.parent_pipes[1], "poll", lambda seconds: False)  # takes no time
    named = f"the worker process of matches 2 to 3 did nothing for {60 + 2 * steps} s"
    with pytest.raises(TimeoutError, match=f"^{named}$"):
        getattr(env, command)(*arguments)
    assert_ended(env, obs, named)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's, with the traceback
@pytest.mark.parametrize("num_workers, error", [(0, RuntimeError), (2, ChildProcessError)])
def test_an_exception_in_a_match_is_named(num_workers, error, monkeypatch):
    """Whatever the engine raises arrives with the match, the seed of its map and the cause."""
    step = lux.LuxMatch.step

    def broken(match, orders, acts):
        if lux.FACTORY_ORDERS[lux.WATER] in orders[0].values():
            raise IndexError("boom")
        return step(match, orders, acts)

    monkeypatch.setattr(lux.LuxMatch, "step", broken)  # workers are forked, so they get it too
    env = lux.LuxVecEnv(4, num_workers=num_workers, held_out=True)
    obs, _ = env.reset(seed=500)
    actions = idle(obs)
    env.step(actions)
    actions[2, 0, 0] = lux.WATER
    why = r"match 2 \(map seed 502\) failed: IndexError: boom"
    with pytest.raises(error, match=f"^{why}$"):
        env.step(actions)
    assert_ended(env, obs, why)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_interrupted(num_workers, monkeypatch):
    """Matches that Ctrl-C stopped in the middle of a step do not continue, as in a notebook they might."""
    env = lux.LuxVecEnv(4, num_workers=num_workers)
    obs, _ = env.reset(seed=1)
    with monkeypatch.context() as patch:
        target = (env, "_wait") if num_workers else (env.matches[1], "step")
        patch.setattr(*target, MagicMock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            env.step(idle(obs))
    assert_ended(env, obs, "step was interrupted")


@pytest.mark.filterwarnings("ignore:.*Worker:UserWarning", "ignore:.*main process:UserWarning")
def test_an_exception_beside_the_matches_is_shown(monkeypatch):
    """With its place in the worker."""

    def fail(self, view, actions):
        raise KeyError("unit_7")

    monkeypatch.setattr(lux.LuxEncoder, "orders", fail)
    env, obs, _ = two_workers()
    with pytest.warns(UserWarning, match=r'raise KeyError\("unit_7"\)'):
        with pytest.raises((KeyError, ChildProcessError), match="unit_7"):
            env.step(idle(obs))
    env.close()


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(lux.__file__).parent)}
BEGUN = """
import tempfile
folder = tempfile.TemporaryDirectory()  # Python ends this and other finalizers after what multiprocessing waits for
import lux_wrapper, time
env = lux_wrapper.LuxVecEnv(2, num_workers=2)
env.reset(seed=0)
"""
DROPPED = f"""{BEGUN}
workers = env.games.processes
del env
print(*(worker.exitcode for worker in workers))
env = lux_wrapper.LuxVecEnv(2, num_workers=2)  # until Python ends
"""
PLAYING = f"""{BEGUN}
print("playing", flush=True)
time.sleep(3600)
"""


def test_an_environment_that_is_only_dropped():
    """Its workers end too, without a word."""
    command = [sys.executable, "-c", DROPPED]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"-{signal.SIGKILL} -{signal.SIGKILL}\n", "")


def test_no_orphans_when_the_program_is_killed():
    """Workers end by themselves when the process that owns them is gone."""
    command = [sys.executable, "-c", PLAYING]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert owner.stdout.readline() == "playing\n"
    owner.kill()
    owner.wait()
    assert owner.stdout.read() == ""  # waits until the workers, which hold the other end too, are gone
    owner.stdout.close()


def test_the_number_of_workers(monkeypatch):
    """As many as cores that may be used, which the processes of torchrun share; a divisor of N."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {pid, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert lux.default_workers() == 3
    for num_envs, number in ((6, 3), (4, 2), (2, 2)):
        env = lux.LuxVecEnv(num_envs)
        assert len(env.games.processes) == number
        env.close()
    monkeypatch.delattr(os, "sched_getaffinity")  # the machine's cores count where there is no other
    assert lux.default_workers() == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert lux.default_workers() == 0
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert lux.default_workers() == 2
