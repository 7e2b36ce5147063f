"""Draw the factory placement of one map: the board, the score of every cell, the factories in their order.

python benchmark/placement.py --seed 7        # writes runs/placement.png
"""

from pathlib import Path
from typing import Optional

import numpy as np
from luxai_s2 import LuxAI_S2
from matplotlib.patheffects import withStroke
from plot import Refused, named_or, plt, start

from lux_wrapper import PLAYERS, early_phase_action, placement_score

COLOURS = dict(zip(PLAYERS, ("crimson", "black")))


def main(seed: int = 7, out: Optional[Path] = None):
    """Play the placement phase of one season-2 map (48 x 48) and draw it.

    Args:
        seed: map seed.
        out: the picture to write, instead of runs/placement.png.
    """
    if not 0 <= seed < 2**32:
        raise Refused(f"--seed must be between 0 and {2**32 - 1}, got {seed}")
    path = named_or("runs/placement.png", out, [""])
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = LuxAI_S2(map_size=48, MIN_FACTORIES=2, MAX_FACTORIES=5, verbose=0)
    obs = engine.reset(seed=seed)[0]["player_0"]
    board = {key: obs["board"][key].copy() for key in ("rubble", "ice", "ore")}
    score = placement_score(obs)
    placed = {}  # factory -> its player and cell, in the order of placement
    while obs["real_env_steps"] < 0:
        actions = {player: early_phase_action(obs, player) for player in PLAYERS}
        obs = engine.step(actions)[0]["player_0"]
        for player in PLAYERS:
            for name, factory in obs["factories"][player].items():
                placed.setdefault(name, (player, factory["pos"]))

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    left.imshow(board["rubble"].T, cmap="Greys", vmin=0, vmax=160)
    for name, colour in (("ice", "deepskyblue"), ("ore", "peru")):
        left.scatter(*np.nonzero(board[name]), c=colour, marker="s", s=14, label=name)
    left.set_title("the map: rubble (the darker, the more), ice, ore", fontsize=10)
    picture = right.imshow(np.where(np.isfinite(score), score, np.nan).T, cmap="viridis")
    right.set_facecolor("0.75")
    figure.colorbar(picture, ax=right, shrink=0.75, label="score")
    right.set_title("the score before the first placement (grey: not allowed)", fontsize=10)
    edge = [withStroke(linewidth=4, foreground="white")]
    for axes in (left, right):
        axes.set(xticks=[], yticks=[])
        for number, (player, cell) in enumerate(placed.values(), start=1):
            look = {"color": COLOURS[player], "path_effects": edge, "clip_on": False}
            axes.add_patch(plt.Rectangle(cell - 1.5, 3, 3, fill=False, lw=2, **look))
            axes.text(*cell, number, ha="center", va="center_baseline", weight="bold", fontsize=9, **look)
    handles, _ = left.get_legend_handles_labels()
    for player, colour in COLOURS.items():
        handles.append(plt.Rectangle((0, 0), 1, 1, fill=False, ec=colour, lw=2, label=f"factories of {player}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    print(f"written to {path}")


if __name__ == "__main__":
    start(main)
