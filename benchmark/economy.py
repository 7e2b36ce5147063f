"""What a team has over a match: robots, stocks and lichen of runs in self-play on held-out maps.

    python benchmark/economy.py submission/model.pt               # in runs/economy
    python benchmark/economy.py runs/<run> runs/<other> --maps 8

It writes economy.csv, a row for each run, map, player and STEPS, and economy.png, the means per team.
"""

from pathlib import Path
from typing import Optional

import numpy as np
import torch
import tyro
from credit import load
from plot import COLOURS, Refused, named_or, plt, start, write_csv
from torch.distributions import Categorical
from tqdm import tqdm

from lux_wrapper import GAME_LENGTH, PLAYERS, REWARD_INDEX

FIRST_MAP = 5000
STEPS = (*range(0, GAME_LENGTH, 25), GAME_LENGTH - 1)
PANELS = {  # column -> what it is, per team
    "lights": "light robots",
    "heavies": "heavy robots",
    "metal": "metal at factories",
    "power": "power at factories",
    "water": "water at factories",
    "lichen_cells": "cells with lichen",
    "lichen": "lichen",
    "ice_dug": "ice dug",
    "ore_dug": "ore dug",
}
COLUMNS = ("run", "map", "player", "step", "factories", *PANELS)


def stock(match, player):
    """What a team of a LuxMatch has now, or has dug so far: column -> amount."""
    state, name = match.engine.state, PLAYERS[player]
    robots, factories = state.units[name].values(), state.factories[name].values()
    own = np.isin(state.board.lichen_strains, list(state.teams[name].factory_strains))
    return {
        "factories": len(factories),
        "lights": sum(not robot.is_heavy() for robot in robots),
        "heavies": sum(robot.is_heavy() for robot in robots),
        "metal": sum(factory.cargo.metal for factory in factories),
        "power": sum(factory.power for factory in factories),
        "water": sum(factory.cargo.water for factory in factories),
        "lichen_cells": own.sum(),
        "lichen": state.board.lichen[own].sum(),
        **{term: int(match.totals[player, REWARD_INDEX[term]]) for term in ("ice_dug", "ore_dug")},
    }


@torch.no_grad()
def play(source, maps, first_map):
    """The rows of a run or checkpoint: both sides of a match on each map, actions sampled."""
    script, args, agent, _ = load(source)
    envs = script.make_envs(args, maps, num_workers=0, held_out=True)
    obs, _ = envs.reset(seed=first_map)
    torch.manual_seed(0)
    rows, ended = [], np.zeros(maps, bool)
    for step in tqdm(range(GAME_LENGTH), desc=source, unit="step", leave=False):
        for index in np.flatnonzero(~ended) if step in STEPS else ():
            for player in range(len(PLAYERS)):
                row = {"run": source, "map": first_map + index, "player": player, "step": step}
                rows.append(row | stock(envs.matches[index], player))
        logits, *_ = agent(script.to_tensors(obs, "cpu"))
        action = Categorical(logits=logits).sample()
        obs, _, terminated, _, _ = envs.step(action.view(maps, len(PLAYERS), -1).numpy())
        ended |= terminated
        if ended.all():
            break
    envs.close()
    return rows


def draw(rows, path):
    """A panel for each column of PANELS: means per team of each run against the steps of a match."""
    figure, axes = plt.subplots(3, 3, figsize=(9, 6.5), layout="constrained")
    runs = dict.fromkeys(row["run"] for row in rows)
    for axis, (column, title) in zip(axes.flat, PANELS.items()):
        for run, colour in zip(runs, COLOURS):
            of_run = [row for row in rows if row["run"] == run]
            steps = sorted({row["step"] for row in of_run})
            means = [np.mean([row[column] for row in of_run if row["step"] == step]) for step in steps]
            axis.plot(steps, means, color=colour, label=run)
        axis.set_title(title, fontsize=10)
        axis.set(xlim=(0, GAME_LENGTH), ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step of the match")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(
    runs: tyro.conf.Positional[tuple[str, ...]], maps: int = 4, first_map: int = FIRST_MAP, out: Optional[Path] = None
):
    """Play the matches, tabulate and draw.

    Args:
        runs: folders of runs, or checkpoints.
        maps: number of matches of each.
        first_map: seed of the first one's map.
        out: folder of economy.csv and economy.png, instead of runs/economy.
    """
    if not runs or maps < 1 or first_map < 0:
        raise Refused("name at least one run; --maps must be at least 1, and --first-map at least 0")
    out = named_or("runs/economy", out, ("economy.csv", "economy.png"))
    rows = [row for source in runs for row in play(source, maps, first_map)]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "economy.csv", COLUMNS, rows)
    draw(rows, out / "economy.png")
    print(f"written to {out}: economy.csv, economy.png")


if __name__ == "__main__":
    start(main)
