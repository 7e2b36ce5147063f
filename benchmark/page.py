"""A match of Lux AI Season 2 as plain data, and as a page that needs no network; `credit.html` draws the data."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from plot import ROOT

import lux_wrapper as lux

TEMPLATE = ROOT / "benchmark" / "credit.html"
LICHEN_SHADE = 20  # units of lichen in a shade of its colour
STOCK = ("power", "ice", "ore", "water", "metal")


def snapshot(state):
    """The Snapshot of an engine's state, with maps of its own."""
    seen = lux.read_engine(state)
    maps = {key: getattr(seen, key).astype(np.int16) for key in ("rubble", "lichen", "strains")}
    return seen._replace(**maps)


def board_of(snapshots, ground, names, seed, notes=()):
    """What the page draws of a match, as plain data.

    `ground` is the engine's board, `names` are the teams', `notes` (step, team, text) for the time line. In the
    result, `rubble` and `lichen` are changes, for each step [cell, value, cell, value, ...]; the value of lichen
    is 1 + 6 * team + shade. `units` have lists that begin when they are born.
    """
    first_shade = np.zeros(1000, int)  # by strain; the last one is for strain -1, no lichen
    for team, factories in enumerate(snapshots[0].factories):
        first_shade[[factory.strain for factory in factories.values()]] = 1 + 6 * team
    size = len(snapshots[0].rubble)
    before = {"rubble": np.zeros((size, size), int), "lichen": np.zeros((size, size), int)}
    changes = {"rubble": [], "lichen": []}
    score, units, counts = [], {}, Counter()
    for step, seen in enumerate(snapshots):
        first, shade = first_shade[seen.strains], -(-seen.lichen // LICHEN_SHADE)
        now = {"rubble": seen.rubble, "lichen": np.where(first * shade > 0, first + shade, 0)}
        for key, x in now.items():
            cells = np.flatnonzero(x != before[key])
            changes[key].append(np.stack([cells, x.flat[cells]], 1).ravel().tolist())
        before = now
        score.append([int(seen.lichen[first == 1 + 6 * team].sum()) for team in (0, 1)])
        for team in (0, 1):
            for unit_id, unit in (seen.factories[team] | seen.robots[team]).items():
                if unit_id not in units:
                    units[unit_id] = newborn(unit, seen.factories[team], units, counts, team) | {"born": step}
                told = units[unit_id]
                told["cell"].append(int(unit.x) * size + int(unit.y))
                for key in [key for key in STOCK if key in told]:
                    told[key].append(int(getattr(unit, key)))
    about = {"names": names, "seed": seed, "size": size, "score": score, "units": units, "notes": notes}
    about |= {"ice": np.flatnonzero(ground.ice).tolist(), "ore": np.flatnonzero(ground.ore).tolist()}
    return about | changes | {"actions": [lux.FACTORY_ACTIONS, lux.ROBOT_ACTIONS]}


def newborn(unit, factories, units, counts, team):
    """What the page has of a unit that was not there before; robots were built by the nearest factory."""
    kind = ("light", "heavy")[unit.heavy] if hasattr(unit, "heavy") else "factory"
    counts[team, kind] += 1
    name, builder = f"{kind} {counts[team, kind]}", None
    if kind != "factory" and factories:
        builder = min(factories, key=lambda id: abs(factories[id].x - unit.x) + abs(factories[id].y - unit.y))
        name += f", built by {units[builder]['name']}"
    told = {"name": name, "kind": kind, "team": team, "builder": builder, "cell": []}
    return told | {key: [] for key in STOCK if hasattr(unit, key)}


def write_page(path, matches):
    """Write the page of matches, dicts with a title, a board and, with rows, a credit."""
    data = json.dumps(matches, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("[/* matches */]", data)
    Path(path).write_text(page, encoding="utf-8")
