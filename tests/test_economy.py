"""What a team has over a match, counted a second time from the official observation."""

import economy
import numpy as np
import plot
import pytest
from test_credit import untrained

import lux_wrapper as lux


def counted(match, player):
    """The same amounts from what the engine tells a bot."""
    obs, name = match.engine.state.get_obs(), lux.PLAYERS[player]
    units, factories = obs["units"][name].values(), obs["factories"][name].values()
    strains = obs["teams"][name]["factory_strains"]
    owned = [cell for cell, strain in np.ndenumerate(obs["board"]["lichen_strains"]) if strain in strains]
    return {
        "factories": len(factories),
        "lights": [unit["unit_type"] for unit in units].count("LIGHT"),
        "heavies": [unit["unit_type"] for unit in units].count("HEAVY"),
        **{key: sum(factory["cargo"][key] for factory in factories) for key in ("metal", "water")},
        "power": sum(factory["power"] for factory in factories),
        "lichen_cells": len(owned),
        "lichen": sum(int(obs["board"]["lichen"][cell]) for cell in owned),
    }


def test_rows(tmp_path, monkeypatch):
    """Both teams of every match that still runs have a row at each of STEPS, and it is what the engine tells a bot."""
    model = untrained(tmp_path / "model.pt", env_kwargs={"safe_masks": False, "max_robots": 24})
    seen, stock = [], economy.stock

    def watched(match, player):
        seen.append({"map": match.seed, "player": player} | counted(match, player))
        return stock(match, player)

    monkeypatch.setattr(economy, "STEPS", (0, 40, 130, 200))
    monkeypatch.setattr(economy, "stock", watched)
    rows = economy.play(str(model), 2, 5000)
    assert len(rows) == len(seen) and {row["step"] for row in rows[:12]} >= {0, 40, 130}
    for row, again in zip(rows, seen):
        assert again == {key: row[key] for key in again}
    of_40 = [row for row in rows if row["step"] == 40]
    assert any(row["lights"] for row in of_40) and any(row["heavies"] for row in of_40)
    assert len({row["metal"] for row in rows}) > 2 and sum(row["lichen"] for row in rows) > 0


def test_ends_with_each_match(tmp_path, monkeypatch):
    """The match that follows in its place is no part of it; what was dug is the sum of what was paid."""
    model = untrained(tmp_path / "model.pt")
    lengths, paid, step = {}, {}, lux.LuxMatch.step

    def watched(match, *args):
        seed, (rewards, metrics) = match.seed, step(match, *args)
        paid.setdefault(seed, []).append(match.totals[:, lux.REWARD_INDEX["ice_dug"]].copy())
        if metrics:
            lengths.setdefault(seed, metrics["l"])
        return rewards, metrics

    monkeypatch.setattr(economy, "STEPS", range(0, lux.GAME_LENGTH, 2))
    monkeypatch.setattr(lux.LuxMatch, "step", watched)
    rows = economy.play(str(model), 2, 5000)
    for seed in (5000, 5001):
        steps = [row["step"] for row in rows if row["map"] == seed and row["player"] == 0]
        assert steps == [step for step in economy.STEPS if step < lengths[seed]]
        for row in rows:
            if row["map"] == seed and row["step"]:
                assert row["ice_dug"] == paid[seed][row["step"] - 1][row["player"]]
    assert len(set(lengths.values())) == 2 and any(row["ice_dug"] for row in rows)


def test_files(tmp_path, monkeypatch):
    """The table is the rows, the picture has the means per team, and nothing is overwritten."""
    monkeypatch.chdir(tmp_path)
    made = {
        "one": [(0, 4, 0), (0, 6, 1), (25, 10, 0), (25, 30, 1)],
        "other": [(0, 2, 0), (0, 2, 1)],
    }  # run -> step, lights, player
    empty = dict.fromkeys(economy.COLUMNS, 1)
    monkeypatch.setattr(
        economy,
        "play",
        lambda run, *_: [empty | {"run": run, "step": s, "lights": n, "player": p} for s, n, p in made[run]],
    )
    figures = []
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda figure, path, **_: figures.append(figure) or path.touch())
    economy.main(("one", "other"))
    rows = plot.read_csv(tmp_path / "runs" / "economy" / "economy.csv")
    assert [row["lights"] for row in rows] == ["4", "6", "10", "30", "2", "2"]
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == list(economy.PANELS.values())
    lines = {line.get_label(): np.column_stack(line.get_data()).tolist() for line in axes[0].lines}
    assert lines == {"one": [[0, 5], [25, 20]], "other": [[0, 2]]}
    with pytest.raises(plot.Refused, match="economy.csv is there already"):
        economy.main(("one",))
