"""The changes that users make, as the docstring of lux_wrapper.py says."""

import contextlib
import importlib.util
import inspect
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import entities, in_process, masked_random

import lux_wrapper as lux

# Beginning of a line -> lines to add after it
REWARD = {
    '    "ore_dug": 0.0004,': '    "kept_alive": 0.25,  # robot: a step survived',
    "        for unit_id, act in acts.robots.items():": (
        '            pay(act, "kept_alive", unit_id in state.units[PLAYERS[act.player]])'
    ),
}
CHANNELS = {
    '    "opponent_heavy",': '    "edge",  # the outermost cells',
    '        self.terrain[match, ..., CHANNEL["inside"]] = 100': """
        edge = self.terrain[match, ..., CHANNEL["edge"]]
        edge[[0, -1]] = edge[:, [0, -1]] = 100""",
    '    "rubble",': '    "own_weak",  # robots that cannot pay for an order',
    "        robots = scene.all_robots": """
        where = robots.match, robots.player, robots.x, robots.y
        board[(*where, CHANNEL["own_weak"])] = 100 * (robots.power < ORDER_COST[robots.heavy])""",
}
FEATURES = {
    '    *("water", "metal"),': '    "load",  # robots: share of the cargo space',
    '            "rubble_here": around.rubble[STAY] / 100,': (
        '            "load": (robots.ice + robots.ore) / (2 * CARGO[robots.heavy]),'
    ),
    '    *("is_factory", "is_light", "is_heavy"),': '    "from_edge",  # cells to the nearest edge',
    '        self.strains_before[match] = board["lichen_strains"]': """
        from_low = np.indices(board["ice"].shape).min(0)
        from_edge = np.minimum(from_low, from_low[::-1, ::-1])
        self.cell_features[match, ..., COLUMN["from_edge"]] = from_edge""",
}
ACTION = {
    "DIG, DELIVER, PICK_UP = map(ROBOT_ACTIONS.index": """
ROBOT_ACTIONS += ("self_destruct",)
SELF_DESTRUCT = ROBOT_ACTIONS.index("self_destruct")""",
    "    left[DIG] -= DIG_COST": "    left[SELF_DESTRUCT] -= np.array([10, 100])[robots.heavy]",
    "    legal[DIG] &=": "    legal[SELF_DESTRUCT] &= ~in_factory",
    "        order = ENGINE_PICKUP": """
    elif action == SELF_DESTRUCT:
        order = 4, 0, 0, 0, 0, 1""",
}

MUCH_DIGGING = np.where(np.arange(lux.NUM_ACTIONS) == lux.DIG, 5, 1)  # weights of actions


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A copy of lux_wrapper.py with these lines added."""
    lines = Path(lux.__file__).read_text().splitlines()
    for start, added in (REWARD | CHANNELS | FEATURES | ACTION).items():
        (place,) = [number for number, line in enumerate(lines) if line.startswith(start)]
        lines[place + 1 : place + 1] = added.splitlines()
    path = tmp_path_factory.mktemp("changed") / "changed_wrapper.py"
    path.write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location("changed_wrapper", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_changes(mine):
    """A match beside one of the original: what was added, and nothing else."""
    other, _ = in_process(1)
    env = mine.LuxVecEnv(1, num_workers=0, max_robots=20)
    obs, _ = env.reset(seed=41)
    expected, _ = other.reset(seed=41)
    state = env.matches[0].engine.state
    edge = np.ones((48, 48))
    edge[1:-1, 1:-1] = 0
    shared = {  # the places of what the original has
        "board": [mine.CHANNEL[name] for name in lux.CHANNEL],
        "features": [mine.COLUMN[name] for name in lux.FEATURES],
        "action_mask": [mine.ROBOT_ACTIONS.index(name) for name in lux.ROBOT_ACTIONS],
    }
    rng = np.random.default_rng(41)
    paid, seen, infos = np.zeros(2), Counter(), {}
    while not infos:
        assert env.observation_space.contains(obs)
        for key, array in expected.items():
            same = obs[key][..., shared[key]] if key in shared else obs[key]
            assert (same == array).all(), key
        channels = {name: obs["board"][0, ..., mine.CHANNEL[name]] for name in mine.CHANNEL}
        columns = {name: obs["features"][0, ..., mine.COLUMN[name]] for name in mine.FEATURES}
        position = obs["position"][0]
        robots = obs["kind"][0] == lux.ROBOT
        orders = np.full((2, 48, 48), np.nan)  # how many the robot here can pay
        for unit in entities(state)[0]:
            cost = lux.ORDER_COST[int(unit.is_heavy())]
            orders[unit.team_id, unit.pos.x, unit.pos.y] = unit.power / cost
        # Channels
        assert (channels["edge"] == 100 * edge).all()
        assert (channels["own_weak"] == 100 * (orders < 1)).all()
        # Features
        load = np.where(robots, (columns["ice"] + columns["ore"]) / 2, 0)
        np.testing.assert_allclose(columns["load"], load, rtol=1e-5)
        from_edge = np.minimum(position, 47 - position).min(-1)
        assert (columns["from_edge"] == from_edge * (obs["kind"][0] > 0)).all()
        # An action
        may = (orders >= 11) & (state.board.factory_occupancy_map < 0)
        may = may[[[0], [1]], position[..., 0], position[..., 1]] & robots
        assert (obs["action_mask"][0, ..., mine.SELF_DESTRUCT] == may).all()
        seen.update(weak=int((orders < 1).sum()), load=int((load > 0).sum()), may=int(may.sum()))

        actions = masked_random(rng, expected["action_mask"], MUCH_DIGGING)
        obs, rewards, *_, infos = env.step(actions)
        expected, expected_rewards, *_ = other.step(actions)
        if not infos:  # a reward
            alive = robots & (obs["kind"][0] == lux.ROBOT)
            np.testing.assert_allclose((rewards - expected_rewards)[0], 0.25 * alive, atol=1e-6)
            paid += alive.sum(-1)
    logged = infos["episode"]["kept_alive"][0]
    assert (paid > 50).all() and (paid <= logged).all() and (logged <= paid + 20).all()
    assert min(seen[what] for what in ("weak", "load", "may")) > 20
    env.close()
    other.close()


def test_an_action_that_was_added(mine):
    """Robots that destroy themselves do so at once, and are charged and counted."""
    env = mine.LuxVecEnv(1, num_workers=0, max_robots=20)
    obs, _ = env.reset(seed=41)
    number = mine.SELF_DESTRUCT
    assert mine.NUM_ACTIONS == number + 1 == lux.NUM_ACTIONS + 1
    assert (env.single_action_space.nvec == [4] * 5 + [number + 1] * 20).all()
    (match,) = env.matches
    rng, done = np.random.default_rng(0), 0
    for _ in range(60):
        actions = masked_random(rng, obs["action_mask"][..., :number])
        leave = obs["action_mask"][..., number] & (rng.random(actions.shape) < 0.1)
        lost = match.counts["robots_lost"].copy()
        obs, rewards, terminated, *_ = env.step(np.where(leave, number, actions))
        assert not terminated[0] and not obs["kind"][leave].any()
        assert (rewards[leave] < 0).all()
        assert (match.counts["robots_lost"] - lost >= leave[0].sum(-1)).all()
        done += leave.sum()
    assert done > 10


def test_reward_weights():
    """An argument changes weights by name; a wrong name is refused."""
    changes = {"survived": 0.5, "ice_dug": -1}
    weights = list((lux.REWARDS | changes).values())
    env, (match,) = in_process(1, reward_weights=changes)
    usual, (other,) = in_process(1)
    obs, _ = env.reset(seed=42)
    usual.reset(seed=42)
    rng = np.random.default_rng(42)
    for _ in range(120):
        actions = masked_random(rng, obs["action_mask"], MUCH_DIGGING)
        before = match.totals.copy()
        obs, rewards, *_ = env.step(actions)
        usual.step(actions)
        gained = (match.totals - before) @ weights
        np.testing.assert_allclose(rewards[0].sum(-1), gained, atol=1e-4)
    np.testing.assert_allclose(match.counts["r"], match.totals @ weights, rtol=1e-4)
    assert (match.totals == other.totals).all()
    assert match.totals[:, lux.REWARD_INDEX["ice_dug"]].any()
    assert lux.REWARDS["survived"] == 0.001
    refusal = "^there is no reward term ice_digged; there are ice_dug, .*, factory_lost$"
    with pytest.raises(ValueError, match=refusal):
        in_process(1, reward_weights={"ice_dug": 1, "ice_digged": 1})


def test_the_example_in_the_docstring():
    """It runs as it stands there."""
    (example,) = re.findall(r"(?m)^    import numpy(?:\n|    .*\n)*.*\n(?:\n|    .*\n)*", lux.__doc__)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(re.sub("(?m)^    ", "", example), {})
    assert re.match(r"a match ended after (\d+ )*\d+ steps\n", said.getvalue().replace("  ", " "))


def test_the_docstring_names_what_there_is():
    """Whatever it tells people to change is there."""
    words = set(re.findall(r"\w*_\w+", lux.__doc__.split("**To change it.**")[1]))
    places = (lux, lux.LuxEncoder, lux.LuxMatch)
    there_is = set().union(lux.REWARDS, inspect.signature(lux.LuxVecEnv).parameters, *map(dir, places))
    assert len(words) > 10 and not words - there_is
