"""The changes that users make (a reward, a channel, a feature, an action), as the docstring of lux_wrapper.py says."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import in_process, masked_random

import lux_wrapper as lux

SOURCE = Path(lux.__file__)

# (after this line, these lines): as the docstring of lux_wrapper.py says
REWARD = [
    ('    "ore_dug": 0.0004,', '    "kept_alive": 0.25,  # robot: a step that ends with the robot alive'),
    ('            pay("ore_dug", who, dug[1])', '            pay("kept_alive", who, ~lost)'),
]
STATIC_CHANNEL = [
    ('    "opponent_heavy",', '    "edge",  # the outermost cells'),
    (
        '        board[..., CHANNEL["ore"]] = self.ore[match] * 100',
        '        board[:, [0, -1], :, CHANNEL["edge"]] = board[:, :, [0, -1], CHANNEL["edge"]] = 100',
    ),
]
CHANNEL_OF_A_STEP = [
    ('    "rubble",', '    "own_weak",  # robots of the team without power for an order'),
    (
        '        maps, robots = out["board"], self.everyone',
        '        weak = robots.power < ORDER_COST[robots.heavy]\n        maps[..., CHANNEL["own_weak"]] = 0\n'
        '        maps[robots.team, robots.x, robots.y, CHANNEL["own_weak"]] = weak * 100',
    ),
]
FEATURE = [
    ('    *("water", "metal"),', '    "load",  # robots: share of all that they can hold of both'),
    (
        '        features[:, COLUMN["rubble_here"]] = rubble[here] / 100',
        '        features[:, COLUMN["load"]] = (ice + ore) / (2 * cargo)',
    ),
]
FEATURE_OF_THE_MAP = [
    ('    *("is_factory", "is_light", "is_heavy"),', '    "from_edge",  # cells to the nearest edge'),
    (
        '        self.strains[match] = obs["board"]["lichen_strains"]',
        "        from_low = np.indices(ice.shape).min(0)\n"
        '        self.ground[teams, ..., COLUMN["from_edge"]] = np.minimum(from_low, from_low[::-1, ::-1])',
    ),
]
ACTION = [
    (
        "DIG, DELIVER, PICK_UP = map(ROBOT_ACTIONS.index",
        'ROBOT_ACTIONS += ("self_destruct",)\nSELF_DESTRUCT = ROBOT_ACTIONS.index("self_destruct")',
    ),
    (
        "        left[DIG] -= DIG_COST[heavy]",
        "        left[SELF_DESTRUCT] -= np.array([10, 100])[heavy]",
    ),
    (
        "        can_do[DELIVER] &= own_factory.any(0) & (ice + ore > 0)",
        "        can_do[SELF_DESTRUCT] &= own_factory[here] == 0",
    ),
    (
        "            (action == PICK_UP, (2, 0, 4, to_full, 0, 1)),",
        "            (action == SELF_DESTRUCT, (4, 0, 0, 0, 0, 1)),",
    ),
]


def changed(folder, edits):
    """A copy of lux_wrapper.py with lines added, imported from `folder`."""
    lines = SOURCE.read_text().splitlines()
    for start, added in edits:
        (place,) = [number for number, line in enumerate(lines) if line.startswith(start)]
        lines[place + 1 : place + 1] = added.splitlines()
    path = folder / "changed_wrapper.py"
    path.write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location("changed_wrapper", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def side_by_side(mine, steps, weights=1.0, **options):
    """Play the same in an environment of the changed module and in one of the original; all that both return.

    Yields (observations, actions, rewards, next observations), each a pair (changed, original), and the changed match.
    Checks on the way that nothing else is different, by name.
    """
    other, _ = in_process(1, **options)
    env = mine.LuxVecEnv(1, num_workers=0, **{"max_robots": 20} | options)
    obs, (expected, _) = env.reset(seed=41)[0], other.reset(seed=41)
    rng = np.random.default_rng(41)
    for _ in range(steps):
        assert env.observation_space.contains(obs)
        for names, numbers, key in (
            (lux.CHANNEL, mine.CHANNEL, "board"),
            ({name: lux.COLUMN[name] for name in lux.FEATURES}, mine.COLUMN, "features"),
            ({name: place for place, name in enumerate(lux.ROBOT_ACTIONS)}, None, "action_mask"),
        ):
            for name, place in names.items():
                here = numbers[name] if numbers else mine.ROBOT_ACTIONS.index(name)
                assert (obs[key][..., here] == expected[key][..., place]).all(), (key, name)
        for key in ("position", "kind", "group"):
            assert (obs[key] == expected[key]).all()
        before = [{key: array.copy() for key, array in seen.items()} for seen in (obs, expected)]
        actions = masked_random(rng, expected["action_mask"], weights)
        obs, rewards, terminated, *_ = env.step(actions)
        expected, expected_rewards, *_ = other.step(actions)
        if terminated[0]:
            break
        yield before, actions, (rewards, expected_rewards), (obs, expected), env.matches.matches[0]
    env.close()
    other.close()


def test_a_reward_term(tmp_path):
    """It is paid with its weight to whom it belongs, and the others with theirs, although it stands among them."""
    mine, paid = changed(tmp_path, REWARD), 0
    assert list(mine.TERM)[2] == "kept_alive"
    for (obs, _), _, (rewards, expected), (after, _), match in side_by_side(mine, 100):
        robots = obs["kind"] >= lux.LIGHT
        alive = robots & (after["kind"] >= lux.LIGHT)
        np.testing.assert_allclose(rewards - expected, 0.25 * alive, atol=1e-6)
        paid += alive.sum()
    assert paid > 200 and match.totals[:, mine.TERM["kept_alive"]].sum() == paid


def test_channels(tmp_path):
    """One that is last and stays the same for a match, and one in the middle that changes at every step."""
    mine, edge = changed(tmp_path, STATIC_CHANNEL + CHANNEL_OF_A_STEP), np.zeros((48, 48))
    edge[[0, -1]] = edge[:, [0, -1]] = 100
    weak = 0
    for _, _, _, (obs, _), match in side_by_side(mine, 100, safe_masks=False):
        assert (obs["board"][..., mine.CHANNEL["edge"]] == edge).all() and mine.CHANNEL["edge"] == 13
        expected = np.zeros((2, 48, 48))
        for team, player in enumerate(lux.PLAYERS):
            for unit in match.engine.state.units[player].values():
                if unit.power < lux.ORDER_COST[int(unit.is_heavy())]:
                    expected[team, unit.pos.x, unit.pos.y] = 100
        assert (obs["board"][0, ..., mine.CHANNEL["own_weak"]] == expected).all()
        weak += expected.any()
    assert weak > 20


def test_features(tmp_path):
    """One of robots and one of the map's cells, both in the middle."""
    mine, loads = changed(tmp_path, FEATURE + FEATURE_OF_THE_MAP), 0
    weights = np.ones(lux.NUM_ACTIONS)
    weights[lux.DIG] = 5
    for _, _, _, (obs, _), match in side_by_side(mine, 100, weights):
        row = obs["features"]
        load, position = row[..., mine.COLUMN["load"]], obs["position"]
        ice, ore = row[..., mine.COLUMN["ice"]], row[..., mine.COLUMN["ore"]]
        robots = obs["kind"] >= lux.LIGHT
        np.testing.assert_allclose(load, np.where(robots, (ice + ore) / 2, 0), rtol=1e-5)
        from_edge = np.minimum(position, 47 - position).min(-1) * (obs["kind"] > 0)
        assert (row[..., mine.COLUMN["from_edge"]] == from_edge).all() and from_edge.any()
        loads += (load > 0).sum()
    assert loads > 50


def test_an_action(tmp_path):
    """Robots that destroy themselves: allowed away from factories and with the power for it, and done at once."""
    mine, allowed = changed(tmp_path, ACTION), 0
    number = mine.SELF_DESTRUCT
    assert mine.NUM_ACTIONS == number + 1 == lux.NUM_ACTIONS + 1
    for _, _, _, (obs, _), match in side_by_side(mine, 60):
        mask = obs["action_mask"][0, ..., number]
        encoder = match.encoder
        for team, player in enumerate(lux.PLAYERS):
            for unit_id, unit in match.engine.state.units[player].items():
                at_home = encoder.factory_map[team, unit.pos.x + 1, unit.pos.y + 1] > 0
                expected = not at_home and unit.power >= (110 if unit.is_heavy() else 11)
                assert mask[team, encoder.robot_slot[team][unit_id]] == expected
        assert not mask[:, : encoder.max_factories].any()
        allowed += mask.sum()
    assert allowed > 100

    env = mine.LuxVecEnv(1, num_workers=0, max_robots=20)
    (match,), (obs, _) = env.matches.matches, env.reset(seed=41)
    assert (env.single_action_space.nvec[:, 5:] == number + 1).all() and (
        env.single_action_space.nvec[:, :5] == 4
    ).all()
    rng, done = np.random.default_rng(0), 0
    for _ in range(60):
        actions = masked_random(rng, obs["action_mask"][..., :number])
        leave = obs["action_mask"][..., number] & (rng.random(actions.shape) < 0.1)
        lost = match.lost.copy()
        obs, rewards, terminated, *_ = env.step(np.where(leave, number, actions))
        assert not terminated[0] and not obs["kind"][leave].any() and (rewards[leave] < 0).all()
        assert (match.lost - lost >= leave[0].sum(-1)).all()
        done += leave.sum()
    assert done > 10


def test_reward_weights():
    """An argument changes weights by name; the others stay, amounts are the same, and a wrong name is refused."""
    changes = {"survived": 0.5, "ice_dug": -1}
    weights = np.ones(lux.NUM_ACTIONS)
    weights[lux.DIG] = 5
    env, (match,) = in_process(1, reward_weights=changes)
    usual, (other,) = in_process(1)
    (obs, _), _ = env.reset(seed=42), usual.reset(seed=42)
    rng = np.random.default_rng(42)
    for _ in range(120):
        actions = masked_random(rng, obs["action_mask"], weights)
        before = match.totals.copy()
        obs, rewards, *_ = env.step(actions)
        usual.step(actions)
        gained = match.totals - before
        np.testing.assert_allclose(rewards.sum(-1)[0], gained @ list((lux.REWARDS | changes).values()), atol=1e-4)
    assert (match.totals == other.totals).all() and (match.totals[:, lux.TERM["ice_dug"]] > 0).any()
    assert lux.REWARDS["survived"] == 0.001
    with pytest.raises(ValueError, match="no reward term ice_digged, ore_digged; there are ice_dug, .*, factory_lost$"):
        in_process(1, reward_weights={"ore_digged": 1, "ice_dug": 1, "ice_digged": 1})


def test_reward_weights_in_workers():
    """They arrive there too."""
    env = lux.LuxVecEnv(2, num_workers=2, reward_weights={"survived": 7})
    obs, _ = env.reset(seed=43)
    factories = obs["kind"] == lux.FACTORY
    _, rewards, *_ = env.step(np.zeros(obs["kind"].shape, np.int64))
    env.close()
    assert (rewards == 7 * factories).all()


def test_the_example_in_the_docstring():
    """It runs as it stands there."""
    (example,) = re.findall(r"(?m)^    import numpy(?:\n|    .*\n)*.*\n(?:\n|    .*\n)*", lux.__doc__)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(re.sub("(?m)^    ", "", example), {})
    assert re.match(r"a match ended after (\d+ )*\d+ steps\n", said.getvalue().replace("  ", " "))


def test_the_docstring_names_what_there_is():
    """The methods that it tells people to change are there."""
    names = set(re.findall(r"\b_[a-z_]+", lux.__doc__.split("**To change it.**")[1]))
    assert len(names) == 6
    assert all(hasattr(lux.LuxEncoder, name) or hasattr(lux.LuxMatch, name) for name in names), names
