"""Draw the factory placement of one map: the board, the score of every cell, the chosen cells.

python benchmark/placement.py --seed 7        # writes runs/placement.png
"""

from pathlib import Path
from typing import Optional

import numpy as np
from luxai_s2 import LuxAI_S2
from plot import named_or, plt, start

from lux_wrapper import PLAYERS, early_phase_action, placement_score


def main(seed: int = 7, out: Optional[Path] = None):
    """Play the placement phase of one season-2 map (48 x 48) and draw it.

    Args:
        seed: map seed.
        out: the picture to write, instead of runs/placement.png.
    """
    path = named_or("runs/placement.png", out, [""])
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = LuxAI_S2(map_size=48, MIN_FACTORIES=2, MAX_FACTORIES=5, verbose=0)
    obs = engine.reset(seed=seed)[0]["player_0"]
    board = {key: obs["board"][key].copy() for key in ("rubble", "ice", "ore")}
    score = placement_score(obs)
    while obs["real_env_steps"] < 0:
        actions = {player: early_phase_action(obs, player) for player in PLAYERS}
        obs = engine.step(actions)[0]["player_0"]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    left.imshow(board["rubble"].T, cmap="Greys", vmin=0, vmax=160)
    for name, colour in (("ice", "deepskyblue"), ("ore", "peru")):
        left.scatter(*np.nonzero(board[name]), c=colour, marker="s", s=22, label=name)
    left.set_title("the map: rubble (grey), ice, ore")
    picture = right.imshow(np.where(np.isfinite(score), score, np.nan).T, cmap="viridis")
    figure.colorbar(picture, ax=right, shrink=0.8, label="score of the first factory")
    right.set_title("the score (white: not allowed)")
    for axes in (left, right):
        axes.set(xticks=[], yticks=[])
        for player, colour in zip(PLAYERS, ("crimson", "darkorange")):
            label = f"factories of {player}"
            for factory in obs["factories"][player].values():
                corner = factory["pos"] - 1.5
                square = plt.Rectangle(corner, 3, 3, fill=False, ec=colour, lw=2, label=label)
                axes.add_patch(square)
                label = None  # once in the legend
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=90)
    print(f"written to {path}")


if __name__ == "__main__":
    start(main)
