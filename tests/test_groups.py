"""Who shares a trajectory under each rule of grouping, and what the lichen preset allows and pays, by hand."""

import numpy as np
import pytest
from helpers import in_process
from test_encoder import factory, heavy, nearest, official, robot, strain

import lux_wrapper as lux

SIZE, FACTORIES, ROBOTS = 24, 3, 9  # as in official()
RULES = ("entity", "cluster", "robots", "mod-1", "mod-2", "mod-4", "quadrants", "nearest-factory", "nearest-heavy")
RULES += ("factories", "kinds")


def groups(rule, factories, robots, home):
    """The group of each slot that is taken, as {slot: group}; factories and robots are dicts slot -> (cell, heavy)."""
    group = {slot: slot for slot in (*factories, *robots)}
    if rule in ("factories", "kinds"):
        group |= {slot: 0 for slot in factories}
    centres = {slot: cell for slot, (cell, _) in factories.items()}
    heavies = {slot: cell for slot, (cell, is_heavy) in robots.items() if is_heavy}
    for slot, ((x, y), _) in robots.items():
        if rule == "cluster":
            group[slot] = home[slot]
        elif rule in ("robots", "kinds"):
            group[slot] = FACTORIES
        elif rule.startswith("mod"):
            group[slot] = FACTORIES + (slot - FACTORIES) % int(rule[-1])
        elif rule == "quadrants":
            group[slot] = (
                FACTORIES + {(False, False): 0, (False, True): 1, (True, False): 2, (True, True): 3}[x > 11, y > 11]
            )
        elif rule == "nearest-factory":
            group[slot] = FACTORIES + nearest((x, y), centres)[0]
        elif rule == "nearest-heavy" and heavies:
            group[slot] = nearest((x, y), heavies)[0]
    return group


def cells_apart(rng, number, places):
    """Random cells, to none of which two of the places, dicts key -> cell, are equally near."""
    cells = []
    while len(cells) < number:
        cell = tuple(rng.integers(0, SIZE, 2).tolist())
        if cell not in cells and all(len(nearest(cell, place)) == 1 for place in places):
            cells.append(cell)
    return cells


@pytest.mark.parametrize("with_heavies", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_groups(rule, with_heavies):
    """Robots of both teams walk about: at every step each is in the group that the rule says."""
    rng = np.random.default_rng(3)
    own, theirs = [(3, 4), (18, 6), (9, 17)], [(19, 19)]
    factories = [factory(x, y, metal=0) for x, y in own]
    encoder = lux.LuxEncoder(SIZE, FACTORIES, ROBOTS, rule, safe_masks=False)
    out = encoder.arrays()
    encoder.reset(official(factories=factories))
    encoder.encode(official(factories=factories), out)
    changed, homes = False, []
    for step in range(6):
        spots = [cells_apart(rng, 2, [dict(enumerate(own))]), cells_apart(rng, 2, [dict(enumerate(theirs))])]
        heavies = [dict(enumerate(cells)) if with_heavies else {0: (0, 0)} for cells in spots]
        teams = []
        for team, centres in enumerate((own, theirs)):
            cells = cells_apart(rng, 5, [dict(enumerate(centres)), heavies[team]])
            kinds = [heavy, robot, heavy, robot, robot, robot, robot] if with_heavies else [robot] * 7
            order = [spots[team][0], cells[0], spots[team][1], *cells[1:]]
            teams.append([kind(x, y) for kind, (x, y) in zip(kinds, order)])
        before = out["group"].copy()
        encoder.encode(official(teams[0], factories, theirs=teams[1]), out)
        for team, (centres, units) in enumerate(zip((own, theirs), teams)):
            robots = {
                FACTORIES + n: (tuple(unit["pos"].tolist()), unit["unit_type"] == "HEAVY")
                for n, unit in enumerate(units)
            }
            if step == 0:  # the one in whose neighbourhood it is first seen
                home = {slot: nearest(cell, dict(enumerate(centres)))[0] for slot, (cell, _) in robots.items()}
                homes.append(home)
            expected = groups(rule, {n: (cell, False) for n, cell in enumerate(centres)}, robots, homes[team])
            seen = out["group"][team]
            assert {slot: seen[slot] for slot in expected} == expected
            assert ((0 <= seen) & (seen < FACTORIES + ROBOTS)).all()
            changed |= step > 0 and (before[team] != seen).any()
    moving = rule in ("quadrants", "nearest-factory") or (rule == "nearest-heavy" and with_heavies)
    assert changed == moving, "robots change their group where the rule goes by place, and nowhere else"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"group_by": "teams"}, "group_by must be one of entity"),
        ({"group_by": "mod-N"}, "group_by must be one of entity"),
        ({"group_by": "mod-7"}, "group_by must be one of entity"),
        ({"group_by": "quadrants", "max_robots": 3}, "quadrants needs at least 4 robot slots, got 3"),
        ({"group_by": "nearest-factory", "max_robots": 4}, "needs at least 5 robot slots, got 4"),
        ({"reward": "ore"}, "reward must be one of ice, lichen; got ore"),
    ],
)
def test_options_that_cannot_work(options, words):
    with pytest.raises(lux.LuxError, match=words):
        lux.LuxVecEnv(1, num_workers=0, **options)


# A factory stands on 9 to 11 in both axes, so its edge is 8 and 12; strain 0 is its own, strain 1 the opponent's.
PLACES = {  # cell of the robot, what else there is, whether rubble there is worth clearing with clear_rubble
    "beside a factory": ((12, 10), {}, True),
    "beside its other side": ((10, 8), {}, True),
    "at its corner": ((12, 12), {}, False),
    "two steps off": ((13, 10), {}, False),
    "beside the opponent's factory": ((19, 17), {}, False),
    "beside own lichen": ((15, 5), {"lichen": strain(0, [(15, 6)])}, True),
    "beside own lichen, to the left": ((15, 5), {"lichen": strain(0, [(14, 5)])}, True),
    "beside the opponent's lichen": ((15, 5), {"lichen": strain(1, [(15, 6)])}, False),
    "at the map's edge": ((0, 0), {"lichen": strain(0, [(0, 1)])}, True),
    "far from all": ((15, 5), {}, False),
}


@pytest.mark.parametrize("clear_rubble", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_rubble_to_clear(place, clear_rubble):
    """Rubble may be dug where own lichen could grow next, if it is paid."""
    (x, y), there, worth = PLACES[place]
    obs = official([robot(x, y)], rubble={(x, y): 5}, **there)
    encoder = lux.LuxEncoder(SIZE, FACTORIES, ROBOTS, clear_rubble=clear_rubble)
    out = encoder.arrays()
    encoder.reset(obs)
    encoder.encode(obs, out)
    assert out["action_mask"][0, FACTORIES, lux.DIG] == (worth and clear_rubble)
    if clear_rubble:
        assert encoder.can_grow[0] == worth
        on_ice = official([robot(x, y)], rubble={(x, y): 5}, ice=[(x, y)], **there)
        encoder.reset(on_ice)
        encoder.encode(on_ice, out)
        assert out["action_mask"][0, FACTORIES, lux.DIG] and not encoder.can_grow[0]


@pytest.mark.parametrize("reward, paid", [("lichen", 0.004), ("ice", 0.0)])
def test_reward_of_cleared_rubble(reward, paid):
    """A light robot clears 2 a dig beside its factory, and what is left in the end; elsewhere nothing is paid."""
    env, (match,) = in_process(1, reward=reward, safe_masks=False, max_robots=6)
    obs, _ = env.reset(seed=5)
    actions = np.zeros(obs["kind"].shape, np.int64)
    actions[0, 0, 0] = lux.BUILD_LIGHT
    obs, *_ = env.step(actions)
    (unit,) = match.engine.state.units["player_0"].values()
    slot, board = match.encoder.max_factories, match.engine.state.board
    centre = next(iter(match.engine.state.factories["player_0"].values())).pos
    for cell, worth in (((2, 0), True), ((3, 0), False)):
        unit.pos.pos = np.array([centre.x + cell[0], centre.y + cell[1]])
        board.rubble[unit.pos.x, unit.pos.y] = 3
        board.ice[unit.pos.x, unit.pos.y] = board.ore[unit.pos.x, unit.pos.y] = 0
        match.encoder.ice[:], match.encoder.ore[:] = board.ice, board.ore
        actions[:] = 0
        obs, *_ = env.step(actions)  # the robot is seen where it is now
        for amount in (2, 1):
            actions[0, 0, slot] = lux.DIG
            obs, rewards, *_ = env.step(actions)
            assert rewards[0, 0, slot] == pytest.approx(paid * amount * worth)
    env.close()


def test_presets():
    assert lux.REWARD_PRESETS == {"ice": {}, "lichen": {"lichen_grown": 0.002, "rubble_cleared": 0.004}}
