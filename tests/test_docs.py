"""The README and the pages in docs/ say what is: hunks, names, commands, links, tables and worked examples."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import global_ppo
import hybrid_model
import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "docs")]

import compare  # noqa: E402
import diff  # noqa: E402
import figures  # noqa: E402
import plot  # noqa: E402
import study  # noqa: E402

README = (ROOT / "README.md").read_text()
PATHS = [ROOT / folder / "README.md" for folder in (".", "benchmark", "submission")]
PATHS += sorted((ROOT / "docs").glob("*.md"))
PAGES = {path: path.read_text() for path in PATHS}
SCRIPTS = {"trajsep_ppo.py": trajsep_ppo, "global_ppo.py": global_ppo}
LIKE = ("global-critic-reward", "global-reward")  # as in MAPPO, and in IPPO


def blocks(text, language):
    """Contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_hunks():
    """docs/diff.md is what docs/diff.py makes of today's scripts; the README shows some of its lines, in order."""
    assert PAGES[diff.PAGE] == diff.page(), "run python docs/diff.py --out docs/diff.md"
    changed = [line for lines in diff.hunks() for line in lines]
    assert 20 < len(changed) <= 36
    in_order = iter(changed)
    shown = "".join(blocks(README, "diff")).splitlines()
    assert len(shown) > 5 and all(line in in_order for line in shown)


def test_every_difference_is_marked():
    """Each hunk in which the scripts differ has a (*), on both sides where both have lines."""
    for lines in diff.hunks():
        for sign in {line[0] for line in lines}:
            assert any("(*)" in line for line in lines if line[0] == sign), lines


def test_reading_map():
    """What the map names is in the script."""
    source = (ROOT / "trajsep_ppo.py").read_text()
    table = README.split("## Reading map")[1].split("\n\n")[1]
    names = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:]))
    phases = re.findall(r"\b(COLLECT|ADVANTAGES|UPDATE|LOG AND SAVE)\b", table)
    assert len(names) == 9 and len(phases) == 4
    for name in names:
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), name
    for phase in phases:
        assert f"        # {phase}" in source


def anchors(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links():
    """Files and headings that are linked are there."""
    for path, text in PAGES.items():
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if "://" not in target:
                page = path.parent / target if target else path
                assert page.exists(), (path.name, target)
                assert not anchor or anchor in anchors(page.read_text()), (path.name, target, anchor)


def test_named_tests():
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for path, text in PAGES.items():
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in sources, (path.name, name)


def commands():
    """(page, command) of all lines of the shell blocks, without environment and comment."""
    for path, text in PAGES.items():
        for line in "".join(blocks(text, "bash")).splitlines():
            for part in line.split("#")[0].split("&&"):
                if part.strip():
                    yield path.name, part.strip().replace(".venv/bin/", "")


@pytest.mark.parametrize("page, command", sorted(set(commands())))
def test_commands(page, command):
    """Every command of the pages names a program that is there, and flags that it has."""
    words = shlex.split(command.replace("runs/<run>", "runs/run").replace("<first machine>", "host"))
    program, *rest = words[words[0].startswith("OMP_NUM_THREADS=") :]
    if program == "torchrun":
        (start,) = [index for index, word in enumerate(rest) if word.endswith("_ppo.py")]
        program, rest = "python", rest[start:]
    if program == "pip":
        assert rest[1].startswith("torch<") or (ROOT / rest[rest.index("-r") + 1]).is_file()
    elif program == "python" and rest[0] in SCRIPTS:
        flags = [word for word in rest[1:] if word != "--help"]
        args = tyro.cli(SCRIPTS[rest[0]].Args, args=flags)
        changed = [key for key, x in vars(args).items() if x != getattr(SCRIPTS[rest[0]].Args(), key)]
        given = {word[2:].replace("-", "_") for word in flags if word.startswith("--")}
        assert given - {"resume", "evaluate"} <= {*changed}, "a flag that is the default"
        named = {*changed} & {"exp_name", "evaluate", "resume"}
        assert not changed or named, "--exp-name tells the run from others"
    elif program == "python" and rest[0] == "-m":
        assert rest[1] == "pytest" and (ROOT / rest[-1]).exists()
    elif program == "python":
        source = (ROOT / rest[0]).read_text()
        if Path(rest[0]).stem == "compare":  # the README says how long its defaults take
            assert tyro.cli(compare.Args, args=rest[1:]) == compare.Args() or page != "README.md"
        for flag in [word.split("=")[0] for word in rest[1:] if word.startswith("--")]:
            assert re.search(rf"\b{flag[2:].replace('-', '[-_]')}\b", source), flag
    elif program == "git" and rest[0] == "diff":
        assert rest[:2] == ["diff", "--no-index"] and all((ROOT / name).exists() for name in rest[2:])
    else:
        known = ("python3", "tensorboard", "kaggle competitions", "git clone")
        assert command.startswith(known), command


def numbers(first_cell):
    """Cells of a row of a table of the README as numbers, NaN for "-"."""
    (row,) = re.findall(rf"^\| {re.escape(first_cell)} \| (.*?) \|$", README, re.MULTILINE)
    return [float("nan") if cell == "-" else float(cell) for cell in row.split(" | ")]


def test_worked_examples():
    """The global rewards are those that the baseline makes of the rows; the mean over the active cells is 0.77."""
    tables = re.findall(r"^\| group (\d) \| (.*?) \|$", README, re.MULTILINE)
    values = [[float("nan") if cell == "-" else float(cell) for cell in row.split(" | ")] for _, row in tables]
    rewards, losses = torch.tensor(values[:4]).T, torch.tensor(values[4:]).T
    summed = global_ppo.group_sum(rewards, {"kind": (~rewards.isnan()).long()})
    torch.testing.assert_close(summed[:, 0], torch.tensor(numbers("**global**")))
    mean = trajsep_ppo.masked_mean(losses, ~losses.isnan()).item()
    assert f"**{mean:.2f}**" in README and losses.isnan().sum() == 3
    assert f"6.94 / 12 = {losses.nan_to_num(0).mean().item():.2f}" in README


def test_network_picture(monkeypatch, tmp_path):
    """It has each tensor of the network's table and all that enters; it and the page mean the same by B."""
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    figures.draw_network(tmp_path / "network.png")
    monkeypatch.undo()
    words = " ".join(text.get_text() for text in drawn[0].axes[0].texts).split()
    text = " ".join(words)
    table = re.findall(r"^    (\w+) +\[", hybrid_model.__doc__, re.MULTILINE)
    assert len(table) == 9 and {*table} <= {*(word.strip(",") for word in words)}
    assert "features, action mask, kind [M, F + A + K]" in text and "mean over the live entities" in text
    assert all("one for every team and step" in page for page in (text, README, hybrid_model.__doc__))
    plot.plt.close(drawn[0])


def test_result():
    """The README's results are what the matches say."""
    data, last = plot.load(figures.RESULTS / "ablation.csv")
    larger = plot.load(figures.NEURIPS / "ablation.csv")
    strong, battles = plot.read_csv(figures.REAL_GAME / "strong.csv"), plot.read_csv(figures.BATTLES)
    assert figures.why(data, last, larger, strong, battles) in README and figures.results(data, last) in README
    assert study.claims(study.runs_by_arm(data), last) in README


def test_why():
    """So is what the first screen says of small teams: final ice and steps with the default flags."""
    data, last = plot.load(figures.RESULTS / "ablation.csv")
    runs = study.runs_by_arm(data)
    arms = [runs[arm] for arm in ("default", "global-reward", "global-critic-reward", "global")]
    own, *others = (plot.values_of(one, "ice_transferred", [last]).mean() for one in arms)
    lower = [1 - ice / own for ice in others]
    assert f"end only {min(lower):.0%} to {max(lower):.0%} lower" in " ".join(README.split())
    own, *steps = (np.median(plot.steps_to(one, "ice_per_factory", 10000, plot.common(*arms))) for one in arms)
    assert own < 0.25 * min(steps) and "need four times as many steps or more" in " ".join(README.split())
    larger, end = plot.load(figures.NEURIPS / "ablation.csv")
    seeds = {arm: figures.of_seeds(larger[arm, "sampled"], end, "ice_transferred").round(-3) for arm, _ in larger}
    both = [*seeds["global-reward"], *seeds["global-critic-reward"]]
    text = " ".join(README.split())
    assert f"{min(both):,.0f} to {max(both):,.0f} ice as in IPPO and MAPPO" in text
    assert "{:,.0f} to {:,.0f} with this method".format(min(seeds["default"]), max(seeds["default"])) in text


def seeds_of(rows, arm, *columns, policy="sampled"):
    """Means of each seed of an arm, over rows of ablation.csv, of the sum of these columns."""
    of_seed = {}
    for row in rows:
        if (row["arm"], row["policy"]) == (arm, policy):
            of_seed.setdefault(row["seed"], []).append(sum(float(row[column]) for column in columns))
    return [np.mean(values) for values in of_seed.values()]


def test_larger_map():
    """So is what docs/results.md says of the teams on the NeurIPS stage, and what the README says of the baseline's."""
    rows = plot.read_csv(figures.NEURIPS / "ablation.csv")
    clipped = study.shares(plot.read_csv(figures.NEURIPS / "runs.csv"), "clipfrac")

    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    built = [seeds_of(rows, arm, "lights_built", "heavies_built") for arm in ("default", "global")]
    assert [round(min(built[0])), round(max(built[0]))] == [7, 14] and "with seven to 14 robots per team" in text
    lost = 1 - np.mean(seeds_of(rows, "global", "factories_alive_share"))
    assert f"loses {lost:.0%} of its factories" in " ".join(README.split())
    assert f"loses {lost:.0%} of its factories and half of the {np.mean(built[1]):.0f} robots that it builds" in text
    assert np.mean(seeds_of(rows, "global", "robots_lost")) == pytest.approx(np.mean(built[1]) / 2, rel=0.1)
    larger, end = plot.load(figures.NEURIPS / "ablation.csv")
    ice = {arm: plot.values_of(larger[arm, "sampled"], "ice_transferred", [end])[0] for arm, _ in larger}
    for arm, words in (
        ("global-reward", "more than IPPO's arm (95% interval: {:,.0f} to {:,.0f})"),
        ("global-critic-reward", "more than MAPPO's ({:,.0f} to {:,.0f})"),
        ("global", "more than the baseline, the last row ({:,.0f} to {:,.0f})"),
    ):
        mean, low, high, _ = study.difference(ice["default"], ice[arm])
        assert f"{mean:,.0f} " in text and words.format(low, high) in text
    for arm, name in (("global-reward", "IPPO they end"), ("global-critic-reward", "MAPPO")):
        seeds = ice[arm].mean(1)
        assert f"as in {name} with {min(seeds):,.0f} to {max(seeds):,.0f}" in text
    assert f"{clipped['global']} of its ratios are clipped, and {clipped['default']} of the method's" in text
    small = "global-small-value-loss"
    mean, low, high, _ = study.difference(ice[small], ice["global"])
    assert f"which is {mean:,.0f} more ({-low:,.0f} less to {high:,.0f} more)" in text
    assert f"ends with {plot.final(larger[small, 'sampled'], end, 'ice_transferred')}, which" in text
    assert f"the method has {ice['default'].mean() / ice[small].mean():.1f} times that" in text


def test_one_robot():
    """So is what the README says of learning from one robot a step."""
    data, last = plot.load(figures.RESULTS / "ablation.csv")
    ice = {
        arm: figures.of_seeds(data[arm, "sampled"], last, "ice_transferred")
        for arm in ("separate", "top-1", "random-1")
    }
    assert "two of five seeds learn next to nothing" in README and sorted(ice["top-1"] < 5000) == [0, 0, 0, 1, 1]
    recovered = f"{ice['random-1'].mean() / ice['separate'].mean():.0%}"
    assert f"a robot drawn at random recovers {recovered}" in " ".join(README.split())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_end(path):
    """An empty line follows each table: without it the next paragraph becomes a row."""
    assert not re.search(r"^\|.*\|\n[^|\n]", PAGES[path], re.MULTILINE)


def test_factories_that_die():
    """So is what docs/results.md says of teams that keep all their factories, and of the others."""
    rows = plot.read_csv(figures.RESULTS / "ablation.csv")
    ended = {"arm": "default", "policy": "sampled", "global_step": "102400"}
    teams = [
        {key: float(x) for key, x in row.items() if key not in ended} for row in rows if ended.items() <= row.items()
    ]
    lost = [team for team in teams if team["factories_alive"] < team["starting_factories"]]
    kept = [team for team in teams if team["factories_alive"] == team["starting_factories"]]

    def mean(teams, key):
        return np.mean([team[key] for team in teams])

    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    said = f"Of {len(teams)} teams of the method, {len(kept)} kept all their factories and brought home"
    assert f"{said} {mean(kept, 'ice_per_factory'):,.0f} ice per factory" in text
    assert f"The other {len(lost)} had {mean(lost, 'ice_per_factory'):,.0f};" in text
    more = [[f"{mean(side, key):.1f}" for side in (lost, kept)] for key in ("starting_factories", "robots_lost")]
    assert "with more factories ({} against {}) and lost more robots ({} against {})".format(*more[0], *more[1]) in text


def test_components():
    """The README's table of components is what the matches say, and it has all its arms."""
    made = study.components(*plot.load(figures.RESULTS / "ablation.csv"))
    assert len(made.splitlines()) == 2 + len(study.SHARED)
    assert made in README


def self_play(run, metric):
    """Mean of a metric in an evaluation with sampled actions."""
    evaluation = json.loads((ROOT / "benchmark" / run / "evaluation.json").read_text())
    return evaluation["sampled"]["summary"][metric]["mean"]


def test_lichen():
    """So are the lichen of the bot in self-play, and that of a training by default."""
    for run in ("lichen_run/steps_1638400", "default_run/avx512"):
        assert f"{self_play(run, 'lichen'):,.0f}" in README
    assert f"digs away {self_play('lichen_run/steps_1638400', 'lichen_destroyed'):,.0f} units of the other's" in README


def test_first_output():
    """So are the ice of the first command's team, and the share of advantages that have the wrong sign."""
    text = (ROOT / "benchmark" / "default_run" / "both_ways" / "evaluation.json").read_text()
    summaries = [evaluation["summary"]["ice_transferred"] for evaluation in json.loads(text).values()]
    cells = ["{mean:,.2f} ± {std:,.2f}".format(**summary) for summary in summaries]
    assert len(cells) == 2 and all(cell in README for cell in cells)
    text = (ROOT / "benchmark" / "default_run" / "avx512" / "evaluation.json").read_text()
    other = [evaluation["summary"]["ice_transferred"]["mean"] for evaluation in json.loads(text).values()]
    assert "{:,.2f} and {:,.2f} on one with AVX-512".format(*other) in " ".join(README.split())
    with open(ROOT / "benchmark" / "wrong_sign.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for policy in {row["policy"] for row in rows}:
        own = [row for row in rows if row["policy"] == policy]
        wrong = [float(row["wrong_sign_percent"]) for row in own]
        steps = [int(row["entity_steps"]) for row in own]
        assert f"in {np.average(wrong, weights=steps):.0f}%" in README.lower()


def test_faults():
    """So are the curves of each fault, and those of a healthy run beside them."""
    scalars = plot.read_csv(ROOT / "benchmark" / "healthy_run" / "faults.csv")
    faults = {row["run"] for row in scalars} - {"healthy"}
    text = README.split("**When it does not learn,**")[1]
    rows = re.findall(r"^\| ([^|]+) \| `(\w+/\w+)` \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    assert faults == {fault for fault, *_ in rows}
    for fault, tag, *bands in rows:
        for run, band in zip(("healthy", fault), bands):
            own = [row for row in scalars if (row["run"], row["tag"]) == (run, tag)]
            values = [float(row["value"]) for row in own if 8192 <= int(row["global_step"]) <= 16384]
            low, high = np.quantile(values, [0.05, 0.95])
            said = f"{low:,.0f} (one match)" if len(values) == 1 else f"{low:,.2f} to {high:,.2f}"
            assert band == said, (run, tag)


def test_ippo_and_mappo():
    """So is the difference between the two rows."""
    data, last = plot.load(figures.RESULTS / "ablation.csv")
    ice = [plot.values_of(data[arm, "sampled"], "ice_transferred", [last])[0] for arm in LIKE]
    mean, low, high, _ = plot.difference(*ice)
    said = f"has {-mean:,.0f} ice less than IPPO's (95% interval: {-low:,.0f} less to {high:,.0f} more)"
    assert said in " ".join(README.split()) and low < 0 < high


def test_first_screen():
    """Commands and output fit GitHub's width, and the CPU build of PyTorch stands before the line that brings CUDA."""
    lines = "".join(blocks(README, "bash") + blocks(README, "text")[:1]).splitlines()
    assert max(map(len, lines)) <= 97
    assert README.index("download.pytorch.org/whl/cpu") < README.index("install -r requirements.txt")


def test_trials_of_growth():
    """So is the table of what was tried to make the bot grow: means over maps and players."""
    economy, page = ROOT / "benchmark" / "economy", (ROOT / "submission" / "README.md").read_text()
    rows = [row for row in plot.read_csv(economy / "economy.csv") if int(row["map"]) < 5006]
    rows = [row | {"variant": "bot"} for row in rows] + plot.read_csv(economy / "trials.csv")
    named = {row["variant"]: f"(`{row['variant']}`" for row in rows} | {"bot": "| the bot, trained for longer |"}

    def means(variant, step, *keys):
        of_step = [row for row in rows if row["variant"] == variant and row["step"] == str(step)]
        return [np.mean([float(row[key]) for row in of_step]) for key in keys]

    lines = page[page.index("## What was tried to make it grow") : page.index("## Growth wins games")].splitlines()
    ended = {(row["variant"], row["step"]) for row in rows}
    found = 0
    for variant, name in named.items():
        for line in lines:
            if line.startswith("|") and name in line:
                robots = [means(variant, step, "lights", "heavies") for step in (500, 999)]
                cells = [", ".join(f"{lights:.0f} and {heavies:.1f}" for lights, heavies in robots)]
                cells += [f"{x:,.0f}" for x in means(variant, 999, "ore_dug", "ice_dug", "power", "lichen")]
                assert line.endswith(f" | {' | '.join(cells)} |"), variant
                found += 1
    assert found == sum(line.startswith("|") for line in lines) - 2
    text = " ".join(" ".join(lines).split())
    assert f"has the others and {len(named) - found} more variants" in text
    ice = {variant: means(variant, 999, "ice_dug")[0] for variant in named if (variant, "999") in ended}
    lichen = {variant: means(variant, 999, "lichen")[0] for variant in ice}
    again = [lichen[f"short_again_{n}"] for n in (1, 2)]
    assert "had {:,.0f} and {:,.0f} lichen".format(*sorted(again)) in text
    assert 1.15 < ice["lights_wait_300"] / ice["short"] < 1.25 and "with a fifth more ice" in text
    assert 0.75 < ice["ice_needed_7"] / ice["short"] < 0.8 and "with nearly a quarter less, about as much" in text
    assert 0.95 < lichen["ice_needed_7"] / lichen["short"] < 1
    patch = ice["short"], ice["power_patch"], lichen["power_patch"]
    assert (
        "from {:,.0f} to {:,.0f} ice (`power_patch`), but its lichen stays where it was ({:,.0f})".format(*patch)
        in text
    )
    for lights in ("lights_mine_early", "power_patch_lights"):
        assert re.search(rf"{means(lights, 500, 'lights')[0]:.0f} .{{,40}}with {lichen[lights]:,.0f}", text), lights
    said = [(means(variant, 999, "heavies")[0], ice[variant]) for variant in ("patch_kept_800", "short")]
    assert "{:.1f} dig {:,.0f} ice, the usual {:.1f} dig {:,.0f}.".format(*said[0], *said[1]) in text
    assert f"({ice['patch_kept_free_ice']:,.0f}, `patch_kept_free_ice`)" in text
    assert means("ore_cleared_heavies", 999, "heavies")[0] > 1.8 * means("short", 999, "heavies")[0]
    assert f"({lichen['ice_carried']:,.0f} lichen against {lichen['ice_not_carried']:,.0f}; `ice_carried`" in text
    alike = [lichen[variant] for variant in lichen if not variant.startswith("apart")]
    assert max(alike) < 1.02 * max(again)
    runs = [f"lichen_run/{run}_{seed}" for seed in (1, 2) for run in ("apart_seed", "seed")]
    said = "{:,.0f} lichen instead of {:,.0f}, and with `--seed 2` with {:,.0f} instead of {:,.0f}."
    assert said.format(*(self_play(run, "lichen") for run in runs)) in text
    apart, against_andrii, short = won("apart", "apart"), won("andrii_apart", "apart"), won("andrii_short", "short")
    assert f"it won {apart} games against the short training (`apart.csv`)" in text
    said = f"and {against_andrii} against andrii0yerko's bot (`andrii_apart.csv`; the short training {short})"
    assert said in text


def test_growth_wins_games():
    """So is the table of the changes that were judged by games."""
    text = (ROOT / "submission" / "README.md").read_text()
    lines = [line for line in text[text.index("## Growth wins games") :].splitlines() if line.startswith("| ")]
    bots = {row["bot"] for game in games("growth") for row in game}
    variants = {bot for bot in bots if not bot.startswith("short__")} - {"submission", "longer"}
    assert len(lines) == 1 + len(variants)
    for variant in variants:
        own, others = rows_of("growth", variant)
        numbers = [mean_of(rows, key) for key in ("lichen", "robots") for rows in (own, others)]
        (line,) = (line for line in lines if f"(`{variant}`)" in line)
        assert line.endswith(f" | {won('growth', variant)} | {' | '.join(numbers)} |"), variant
    text = " ".join(text.split())
    runs = [self_play(f"lichen_run/{run}", "lichen") for run in ("ore_patch_seed_1", "seed_1")]
    assert "seed, {:,.0f} instead of {:,.0f} (".format(*runs) in text
    own, others = rows_of("growth", "longer")
    assert {row["bot"] for row in others} == {"submission"} and f"wins {won('growth', 'longer')} games" in text
    numbers = [mean_of(rows, key) for rows in (own, others) for key in ("lichen", "robots")]
    assert "It has {} lichen and {} robots at the end, the bot has {} and {} (".format(*numbers) in text
    own, others = rows_of("growth", "ore_patch")
    robots = [mean_of(rows, "robots") for rows in (own, others)]
    times = sum(int(row["lichen"]) for row in own) / sum(int(row["lichen"]) for row in others)
    assert "ends with {} robots, its opponent with {}, and with {:.1f} times".format(*robots, times) in text


def games(name):
    """The games of a file in benchmark/matches: pairs of the two players' rows."""
    rows = plot.read_csv(ROOT / "benchmark" / "matches" / f"{name}.csv")
    return list(zip(rows[::2], rows[1::2]))


def rows_of(name, bot="submission"):
    """The rows of a bot in such a file, and those of its opponents."""
    pairs = [game if game[0]["bot"] == bot else game[::-1] for game in games(name)]
    return zip(*[(own, other) for own, other in pairs if own["bot"] == bot])


def won(name, bot="submission"):
    """How many of its games a bot has won, as in "46 of 50"."""
    results = [row["result"] for row in next(rows_of(name, bot))]
    return f"{results.count('win')} of {len(results)}"


def mean_of(rows, key):
    """Of some rows' values, as a page shows it."""
    return f"{np.mean([float(row[key]) for row in rows]):,.0f}"


def test_matches():
    """So is the table of the bot's matches."""
    made = figures.matches(ROOT / "benchmark" / "matches")
    assert len(made.splitlines()) == 2 + len(figures.OPPONENTS)
    assert made in README
    robots = [[int(row["robots"]) for row in rows] for rows in rows_of("bart")]
    ours, theirs = (f"{min(n)} to {max(n)}" for n in robots)
    assert f"the 15th ends with {theirs} robots, this bot with {ours} and" in " ".join(README.split())
    page = " ".join((ROOT / "submission" / "README.md").read_text().split())
    for sentence in (
        f"Against andrii0yerko's bot it wins {won('andrii')} games (",
        f"Against jeffdshen's it wins {won('jeffdshen')} games (",
        f"it wins {won('neurips_python')} games against the Python kit and {won('neurips_rl')} against the RL kit",
        f"with an exception of its own in all {len(games('neurips_andrii'))} games",
        f"wins {won('andrii_short', 'short')} games against andrii0yerko's bot",
        f"and {won('jeffdshen_short', 'short')} against jeffdshen's (`andrii_short.csv`",
    ):
        assert sentence in page
    neurips = ["neurips_python", "neurips_rl", "neurips_andrii"]
    rows = [row for name in [*figures.OPPONENTS, *neurips] for row in next(rows_of(name))]
    there = sum(len(games(name)) for name in neurips)
    said = f"In all {len(rows)} games ({len(rows) - there} in that table, {there} on the stage of NeurIPS) none of its"
    assert said in page
    assert all(row["refused"] == "0" and row["factories"] != "0" for row in rows)


def test_real_game():
    """So are the table of the arms that were trained for lichen, and what the pages say of their games and seeds."""
    data, last = plot.load(figures.REAL_GAME / "ablation.csv")
    tables = [plot.read_csv(figures.REAL_GAME / f"{name}.csv") for name in ("strong", "duels")]
    text = (ROOT / "docs" / "results.md").read_text()
    assert figures.real_game(data, last, *tables) in text
    text, (strong, duels) = " ".join(text.split()), map(figures.games_of, tables)
    arms = [sum(strong[arm].values(), []) for arm in ("default", *figures.RELATIVES)]
    own, *others = (f"{figures.wins(games)} of {len(games)}" for games in arms)
    fewest, most = (end(int(won.split()[0]) for won in others) for end in (min, max))
    pairs = [game for arm in figures.RELATIVES for seed in duels[arm].values() for game in seed]
    assert (
        f"wins {own} games against that bot, the other arms {fewest} to {most}; and it wins all {len(pairs)} against"
        in text
    )
    assert [method["result"] for _, method in pairs] == ["win"] * len(pairs)
    assert f"of the other columns this method wins all of its {len(pairs)} ([details]" in " ".join(README.split())
    small = data["global-small-value-loss", "sampled"]
    assert f"ends self-play with {plot.final(small, last, 'lichen')} lichen" in text
    assert f"[wins {own} matches](#the-real-game) against the" in text and f"the baseline {others[-1][0]}." in text
    assert f"win [{own}](../docs/results.md#the-real-game)" in (ROOT / "submission" / "README.md").read_text()
    lichen = {arm: plot.values_of(data[arm, "sampled"], "lichen", [last])[0] for arm in ("default", *figures.RELATIVES)}
    assert f"{lichen['default'].mean() / lichen['global'].mean():.1f} times the baseline's lichen" in text
    for arm, words in (
        ("global", "map by map {:,.0f} more (95% interval: {:,.0f} to {:,.0f})"),
        ("global-reward", "{:,.0f} more than IPPO's arm ({:,.0f} to {:,.0f})"),
        ("global-critic-reward", "{:,.0f} more than MAPPO's ({:,.0f} to {:,.0f})"),
    ):
        assert words.format(*study.difference(lichen["default"], lichen[arm])[:3]) in text
    shares = [figures.of_seeds(data[arm, "sampled"], last, "factories_alive_share").mean() for arm in lichen]
    method, least, *_, most = shares[0], *sorted(1 - share for share in shares[1:])
    assert f"lose {least:.0%} to {most:.0%} of their factories in self-play, the method {1 - method:.0%}." in text
    greedy = figures.of_seeds(data["default", "greedy"], last, "lichen")[0]
    assert f"ends self-play with {greedy:,.0f} lichen instead of {lichen['default'][0].mean():,.0f}" in text
    rows = plot.read_csv(figures.REAL_GAME / "ablation.csv")
    greedy, sampled = (seeds_of(rows, "default", "lights_built", policy=policy)[0] for policy in ("greedy", "sampled"))
    assert f"builds {['no', 'one', 'two', 'three'][round(greedy)]} light robots instead of {sampled:.0f} with" in text
    assert seeds_of(rows, "global-reward", "lights_built")[0] < 0.1 and lichen["global-reward"][0].mean() < 0.1
    clipped = study.shares(plot.read_csv(figures.REAL_GAME / "runs.csv"), "clipfrac")
    assert "{global} of the baseline's ratios are clipped, and {default} of the method's.".format(**clipped) in text


def test_longer_training():
    """So are the games of longer trainings against the short one, and what their self-play shows."""
    page = " ".join((ROOT / "submission" / "README.md").read_text().split())
    table = {"204,800": "step_204800", "409,600": "step_409600", "819,200": "step_819200", "1,638,400": "submission"}
    for steps, bot in table.items():
        own, short = rows_of("training", bot)
        cells = won("training", bot), mean_of(own, "lichen"), mean_of(short, "lichen")
        assert f"| {steps} steps | {' | '.join(cells)} |" in page
    assert f"in {won('training')} matches:" in " ".join(README.split())
    runs = [f"lichen_run/{run}" for run in ("seed_1", "steps_409600", "steps_1638400")]
    lichen, destroyed = ([self_play(run, key) for run in runs] for key in ("lichen", "lichen_destroyed"))
    assert "end with {:,.0f}, {:,.0f} and {:,.0f} lichen, and dig away".format(*lichen) in page
    assert "dig away {:,.0f}, {:,.0f} and {:,.0f} units".format(*destroyed) in page


def test_greedy():
    """So are the bot's games with greedy actions against sampled ones."""
    rows = plot.read_csv(ROOT / "benchmark" / "greedy" / "games.csv")
    greedy, sampled = ([row for row in rows if row["bot"] == bot] for bot in ("greedy", "submission"))
    wins = [row["result"] for row in greedy].count("win")
    results = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert f"it wins {wins} of {len(greedy)} games against itself with sampled ones" in results
    assert f"with {mean_of(greedy, 'lichen')} lichen against {mean_of(sampled, 'lichen')}" in results
