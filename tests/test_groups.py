"""Who shares a trajectory under each rule of grouping, by hand."""

import numpy as np
import pytest
from test_encoder import factory, heavy, nearest, official, robot

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
