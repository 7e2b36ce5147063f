"""The comparison on other games: what it trains, averages and writes, on the toy."""

import csv
import json

import armies
import compare
import numpy as np
import other_games
import plot
import pytest
from plot import ROOT, read_csv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trajsep_ppo import SummaryWriter


def test_two_arms_of_a_game(tmp_path, monkeypatch, capsys):
    """Every number of the tables can be found again in the runs; the second start trains nothing."""
    monkeypatch.setattr(other_games, "GAMES", {"toy": ("the toy", "toy", "toy_env:ToyVecEnv", 512)})
    monkeypatch.setattr(other_games, "PARTS", 4)
    arms = ("global", "mappo")
    other_games.main(("toy",), arms, (1, 2), tmp_path, steps=4096, parallel=2)
    with open(tmp_path / "games.csv") as file:
        random, *rows = csv.DictReader(file)
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for seed in "12" for arm in arms]
    assert 1.5 < float(random["sampled"]) < 1.9  # about 32 / 3 workers, 10 steps, 1 / 16 for one button of four
    cells = {"random": [float(random["sampled"])]}
    with open(tmp_path / "curves.csv") as file:
        curves = list(csv.DictReader(file))
    for row in rows:
        (run,) = tmp_path.glob(f"toy__{row['arm']}__{row['seed']}/runs/*")
        for how, matches in json.loads((run / "evaluation.json").read_text()).items():
            assert float(row[how]) == pytest.approx(np.mean(matches["matches"]["r"]), rel=1e-4)
        cells.setdefault(row["arm"], []).append(float(row["sampled"]))
        events = EventAccumulator(str(run)).Reload().Scalars("charts/episodic_return")
        drawn = {
            int(x["step"]): float(x["return"]) for x in curves if (x["arm"], x["seed"]) == (row["arm"], row["seed"])
        }
        assert list(drawn) == [1024, 2048, 3072, 4096]
        for step, value in drawn.items():
            part = [event.value for event in events if step - 1024 < event.step <= step]
            assert value == pytest.approx(np.mean(part), rel=1e-4)
    (line,) = [line for line in (tmp_path / "games.md").read_text().splitlines() if line.startswith("| the toy")]
    steps, *shown = [cell.strip() for cell in line.split("|")[2:-1]]
    assert steps == "4,096"
    assert shown[2] == "" and shown[0] == f"{cells['random'][0]:.3g}"  # without the arm ippo
    assert shown[5] == f"{np.mean([float(row['train_seconds']) for row in rows]) / 60:.1f}"
    for cell, arm in zip((shown[3], shown[4]), ("mappo", "global")):
        half = 12.7062 * abs(cells[arm][0] - cells[arm][1]) / 2  # Student's t, one degree of freedom
        assert cell == f"{np.mean(cells[arm]):.3g} ± {half:.2g}"
    assert (tmp_path / "games.png").stat().st_size > 10_000

    capsys.readouterr()
    before = (tmp_path / "games.csv").read_text()
    other_games.main(("toy",), arms, (1, 2), tmp_path, steps=4096)
    assert "training" not in capsys.readouterr().out.replace("trainings are", "")
    with pytest.raises(other_games.Refused, match="toy__global__1 holds a training with other flags"):
        other_games.main(("toy",), arms, (1, 2), tmp_path)
    assert (tmp_path / "games.csv").read_text() == before


def test_no_match_has_ended(tmp_path):
    """In a training so short that none has, there is no curve."""
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("charts/SPS", 1, 512)
    assert other_games.curve(tmp_path, 1024) == []


def test_what_is_refused(tmp_path):
    """A game that is not there."""
    with pytest.raises(other_games.Refused, match="^there is no chess; there are rware, lbf, kaz, toy$"):
        other_games.main(("chess",), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_in_the_pages():
    """The tables of the pages are those that the kept rows make."""
    page = (ROOT / "examples" / "README.md").read_text()
    results = ROOT / "benchmark"
    assert other_games.mean_returns(read_csv(results / "other_games" / "games.csv")) in page
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert " ".join(armies.shares_won(read_csv(results / "armies" / "armies.csv")).split()) in page


def test_more_soldiers():
    """What the pages say of the battles with the frozen army."""
    pages = (ROOT / "docs" / "results.md", ROOT / "examples" / "README.md")
    page, examples = (" ".join(page.read_text().split()) for page in pages)
    folders = {size: ROOT / "benchmark" / f"battle_{size}" for size in (16, 81, 289)}
    others = ("ippo", "mappo", "global")
    said, shares = {}, {}
    for size, folder in folders.items():
        soldiers, won, factors = armies.against_frozen(folder)
        assert soldiers == size and {*won} == {"separate", *others} and won["separate"].mean() == 1
        assert {len(x) for x in (*won.values(), *factors.values())} == {3 if size == 289 else 5}
        medians = sorted(float(np.median(factors[arm])) for arm in others)
        said[size] = f"{medians[0]:.1f} to {medians[-1]:.1f} times"
        shares[size] = [float(won[arm].mean()) for arm in others]
    assert f"need {said[16]} the method's steps with 16 soldiers, and {said[81]} with 81" in page
    ippo, mappo, one = shares[16]
    assert shares[81] == shares[289] == [0, 0, 0]
    assert f"as in IPPO, win {ippo:.0%} of these battles, and with 81 or 289 none" in page
    assert f"the arm as in IPPO {ippo:.0%}, as in MAPPO {mappo:.0%} and one trajectory {one:.0%}; with 81" in examples

    rows = read_csv(folders[289] / "battle.csv")
    battles = {}
    for row in rows:
        key = row["opponent"], row["arm"], int(row["global_step"]), row["seed"]
        battles.setdefault(key, []).append(float(row["kills"]))
    kills = {key: np.mean(x) for key, x in battles.items()}
    ends = {arm: [kills["frozen", arm, 16384, seed] for seed in "123"] for arm in ("separate", *others)}
    assert ends.pop("separate") == [289, 289, 289]
    of_others = sorted(sum(ends.values(), []))
    assert f"the others kill {of_others[0]:.0f} to {of_others[-1]:.0f} when training ends" in page
    assert sum(x < 289 / 2 for x in of_others) == 5 and "five of their nine seeds less than half" in page
    random = [mean for key, mean in kills.items() if key[:2] == ("random", "global")]
    assert max(random) < 0.75 * 289 and "with 289 it never gets there" in page


def test_looks_of_the_arms(monkeypatch, tmp_path):
    """In both pictures an arm has its colour of the study, and a line style of its own; the rest is named."""
    figures, results = [], ROOT / "benchmark"
    monkeypatch.setattr(plot.plt, "close", figures.append)
    games, curves = (read_csv(results / "other_games" / f"{name}.csv") for name in ("games", "curves"))
    other_games.draw(games, curves, tmp_path / "games.png")
    compare.draw(read_csv(results / "battle_16" / "battle.csv"), tmp_path / "battle.png", 16, 8192)
    monkeypatch.undo()
    for figure in figures:
        (legend,) = figure.legends
        lines = {line.get_label(): line for line in legend.legend_handles}
        looks = [(lines[name].get_color(), lines[name].get_linestyle()) for name, *_ in other_games.ARMS.values()]
        colours, styles = zip(*looks)
        study = ("default", "global-reward", "global-critic-reward", "global")
        assert [*colours] == [plot.ARMS[arm][1] for arm in study] and len({*styles}) == 4
        plot.plt.close(figure)
    panels = figures[0].axes
    assert panels[0].get_gridspec().get_geometry() == (2, 2)
    for panel, game in zip(panels, other_games.GAMES):  # means and random play are lines, seeds a band
        assert (len(panel.lines), len(panel.collections)) == (5, 4)
        own = [float(row["return"]) for row in curves if (row["game"], row["arm"]) == (game, "separate")]
        heights = panel.collections[0].get_paths()[0].vertices[:, 1]
        assert (min(heights), max(heights)) == (min(own), max(own))
    assert {"thin: a seed, thick: their mean", "all 16 soldiers"} < {*lines}  # of the battle
    assert "frozen at 8,192 steps" in figure.axes[1].get_title()
