"""The page of credit: its numbers; wrong input; and what a reader does with it."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import credit
import numpy as np
import page
import pytest
import torch

import global_ppo
import lux_wrapper as lux
import trajsep_ppo
from hybrid_model import HybridNet

ROOT = Path(credit.__file__).parent.parent
MODEL = ROOT / "submission" / "model.pt"


def untrained(path, script=trajsep_ppo, **flags):
    """A checkpoint of a training that has just begun."""
    args = script.Args(**flags)
    envs = script.make_envs(args, 1, num_workers=0)
    torch.manual_seed(1)
    agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max()))
    torch.save({"args": asdict(args), "model": agent.state_dict(), "global_step": 0}, path)
    return path


def matches_in(path):
    """The data of a page."""
    return json.loads(path.read_text().split("const matches = ")[1].split(";\n")[0])


def page_of(folder, *sources, options=""):
    """Run the program; the page that it writes."""
    out = folder / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["credit.py", *map(str, sources), "--out", str(out), *options.split()])
        credit.main()
    return out


# ------------------------------ Numbers ------------------------------


@pytest.mark.parametrize(
    ("flags", "steps", "team"),
    [({}, 170, 0), ({"group_by": "cluster"}, 60, 1), ({"norm_adv": False}, 60, 0), (None, 40, 1)],
)
def test_numbers(flags, steps, team, tmp_path):
    """The team's advantage, the share of wrong signs and the correlation; None: the bot of the repository."""
    source = MODEL if flags is None else untrained(tmp_path / "run.pt", **flags)
    script, args, agent, step = credit.load(source)
    rollout = credit.play(script, args, agent, step, credit.FIRST_MAP, steps)
    told = json.loads(json.dumps(credit.credit_of(script, args, rollout, team)))
    dones, active = rollout["dones"], rollout["own"]["active"].numpy()
    T, B, G = rollout["earned"].shape
    assert dones[-1].all() == (T < steps)
    sums = [x.sum(-1, keepdim=True) for x in (rollout["earned"], rollout["own"]["values"])]
    of_team = torch.ones(T + 1, B, 1, dtype=bool), dones, args.gamma, args.gae_lambda
    whole = trajsep_ppo.compute_gae(*sums, *of_team)[..., 0].double().numpy()
    own = rollout["own"]["advantages"].double().numpy()
    cells = [(t, g) for t in range(T) for g in range(G) if active[t, team, g]]
    every = [own[t, b, g] for t in range(T) for b in range(B) for g in range(G) if active[t, b, g]]
    scaled, scaled_whole = (own - np.mean(every)) / np.std(every), (whole - whole.mean()) / whole.std()
    before = np.mean([own[t, team, g] * whole[t, team] < 0 for t, g in cells])
    after = np.mean([scaled[t, team, g] * scaled_whole[t, team] < 0 for t, g in cells])
    assert told["cells"] == len(cells) and told["used"] == ("after" if args.norm_adv else "before")
    assert told["wrong"] == pytest.approx({"before": before, "after": after}, abs=3 / len(cells))
    pairs = np.array([(own[t, team, g], whole[t, team]) for t, g in cells])
    assert told["correlation"] == pytest.approx(np.corrcoef(pairs.T)[0, 1], abs=1e-3)
    assert told["whole"]["advantages"] == pytest.approx((whole[:, team] / credit.UNIT).tolist(), abs=20)
    shown = [x for row in told["rows"] for x in row["advantages"]]
    assert sorted(shown) == pytest.approx(sorted(own[t, team, g] / credit.UNIT for t, g in cells), abs=20)
    assert 0 < after < 1 and len(set(shown)) > T / 2 and len(told["rows"]) > 1


def test_rows_belong_to_units():
    """Each unit of the team is in a row as long as it lives; what it chose and earned, the game did and paid."""
    script, args, agent, step = credit.load(MODEL)
    rollout = credit.play(script, args, agent, step, credit.FIRST_MAP, 60)
    told = credit.credit_of(script, args, rollout, 0)
    units, seen = rollout["board"]["units"], set()
    names = {row["name"] for row in told["rows"]}
    assert any("heavy 1, built by factory" in name for name in names) and len(names) == len(told["rows"])
    for index, row in enumerate(told["rows"]):
        unit = units[row["leader"]]
        assert unit["rows"] == [row["born"], index] and unit["born"] == row["born"] and unit["name"] == row["name"]
        assert len(unit["chosen"]) == len(row["earned"]) <= len(unit["cell"])
        if unit["kind"] == "factory":
            continue
        for now, gained in enumerate(np.diff(np.add(unit["ice"], unit["ore"]))):
            chosen = lux.ROBOT_ACTIONS[int(unit["chosen"][now])]
            if gained:
                assert chosen == ("dig" if gained > 0 else "deliver") and row["earned"][now] > 0
                seen.add(chosen)
            if unit["cell"][now + 1] != unit["cell"][now]:
                assert chosen.startswith("move")
                seen.add(chosen)
    assert {"dig", "deliver"} < seen and len(seen) > 4


@pytest.mark.parametrize(("script", "flags"), [(trajsep_ppo, {"agent_reward_weight": 0.7}), (global_ppo, {})])
def test_same_as_in_training(script, flags, tmp_path, monkeypatch):
    """`train` computes the same rewards, values and advantages on the same rollout."""
    short = {"num_envs": 1, "num_steps": 48, "num_minibatches": 1, "total_timesteps": 48, "seed": credit.FIRST_MAP}
    loaded, args, agent, step = credit.load(untrained(tmp_path / "run.pt", script, **short, **flags))
    seen = []
    compute_gae, make_envs = script.compute_gae, script.make_envs
    monkeypatch.setattr(script, "compute_gae", lambda *x: seen.append((x, compute_gae(*x))) or seen[-1][1])
    rollout = credit.play(loaded, args, agent, step, credit.FIRST_MAP, 48)
    here = seen[0 if script is trajsep_ppo else 1]
    seen.clear()
    held_out = lambda *x, num_workers, **options: make_envs(*x, num_workers=0, held_out=True, **options)  # noqa: E731
    monkeypatch.setattr(script, "make_envs", held_out)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    checkpoint = {"global_step": 0, "train_seconds": 0, "matches": [], "model": agent.state_dict()}
    checkpoint |= {"optimizer": optimizer.state_dict(), "torch_rng": torch.manual_seed(args.seed).get_state()}
    script.train(args, tmp_path / "run", torch.device("cpu"), checkpoint)
    [(given, advantages)] = seen
    for x, y in zip((*given[:4], advantages), (*here[0][:4], here[1])):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert advantages.count_nonzero() > 48 and rollout["earned"].count_nonzero() > 0


def test_example(tmp_path):
    """docs/credit.html is a page as they are written today, and the table of docs/lesson.md is what it shows."""
    [match] = matches_in(ROOT / "docs" / "credit.html")
    page.write_page(tmp_path / "page.html", [match])
    same = (tmp_path / "page.html").read_bytes() == (ROOT / "docs" / "credit.html").read_bytes()
    assert same, "it has an older template: write_page(path, matches_in(path))"
    told = match["credit"]
    (heavy,) = [row for row in told["rows"] if row["name"].startswith("heavy 4,")]
    lesson = (ROOT / "docs" / "lesson.md").read_text()
    for name, row, at in (("heavy 4", heavy, 59 - heavy["born"]), ("the team", told["whole"], 59)):
        columns = ("rewards", at), ("values", at), ("values", at + 1), ("advantages", at + 1)
        cells = [f"{row[key][step] * credit.UNIT:.3f}" for key, step in columns]
        assert f"| {name} | {' | '.join(cells)} |" in lesson
        assert f"= **{row['advantages'][at] * credit.UNIT:.2f}**" in lesson


# ------------------------------ Input ------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("empty", "there is no checkpoint at empty"),
        ("nothing", "there is no checkpoint at nothing"),
        ("text.pt", "text.pt is damaged, or not a checkpoint of today's trajsep_ppo.py"),
        ("other.pt", "other.pt plays toy_env:ToyVecEnv, and this page draws Lux AI only"),
        ("gone.pt", "--env-id gone:Game is not module:class: No module named 'gone'"),
        ("run.pt --map 1000000", "--map must be between 0 and 999,999"),
        ("run.pt --steps 0", "--steps at least 1"),
        ("run.pt --out nowhere/page.html", "nowhere/page.html cannot be written; is its folder there?"),
    ],
)
def test_refuses(arguments, reason, tmp_path, monkeypatch, capsys):
    """One sentence and exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.pt").write_text("no checkpoint")
    untrained("run.pt")
    content = torch.load(untrained("other.pt", env_id="toy_env:ToyVecEnv"))
    content["args"]["env_id"] = "gone:Game"
    torch.save(content, "gone.pt")
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["credit.py", *arguments.split()])
    with pytest.raises(SystemExit) as exit:
        credit.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("credit.py: error: ")
    assert reason in error and error.count("\n") == 1
    assert [path for path in sorted(Path().rglob("*")) if path.name != "runs"] == before


def test_overwrites_nothing(tmp_path, monkeypatch):
    """A page that was not named is a new one; one that was named is replaced."""
    monkeypatch.chdir(tmp_path)
    untrained("run.pt")
    monkeypatch.setattr(sys, "argv", ["credit.py", "run.pt", "--steps", "2"])
    credit.main()
    credit.main()
    one, other = Path("runs").iterdir()
    page_of(tmp_path, "run.pt", options=f"--steps 2 --out {one}")
    Path("page.html").write_text("mine")
    page_of(tmp_path, "run.pt", options="--steps 2")
    assert Path("page.html").read_text() == one.read_text() == other.read_text()


# ------------------------------ The page in a browser ------------------------------


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    programs = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{option}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # no network
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = programs[0]
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield Reader(driver)
    driver.quit()


class Reader:
    """Somebody who has only the page."""

    def __init__(self, driver):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        self.actions = lambda: ActionChains(driver)
        self.wait = WebDriverWait(driver, 60).until

    def open(self, path):
        self.driver.get(path.as_uri())
        assert self.errors() == [] and self.js("performance.getEntriesByType('resource').length") == 0

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def js(self, expression):
        return self.driver.execute_script(f"return {expression}")

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def point(self, selector, x, y, click=False):
        """Move the mouse to a place in an element, in pixels from its corner."""
        left, top = self.js(f"(({{x, y}}) => [x, y])($('{selector[1:]}').getBoundingClientRect())")
        builder = self.actions().w3c_actions
        builder.pointer_action.move_to_location(round(left + x), round(top + y))
        if click:
            builder.pointer_action.click()
        builder.perform()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A page of the bot of the repository, and of a baseline."""
    folder = tmp_path_factory.mktemp("two")
    return page_of(folder, MODEL, untrained(folder / "baseline.pt", global_ppo), options="--steps 60")


def test_slider_and_keys(browser, two):
    browser.open(two)
    [match, _] = matches_in(two)
    slider = browser.find("#slider").size
    browser.point("#slider", slider["width"] // 2, slider["height"] // 2, click=True)
    step = browser.js("page.step")
    assert 25 < step < 35 and browser.find("#step").text == f"step {step} of 60"
    factories = [unit for unit in match["board"]["units"].values() if unit["kind"] == "factory"]
    waters = [f"{factory['name'].split()[1]}: {factory['water'][step]}" for factory in factories]
    assert all(water in browser.find("#score").text for water in waters) and len(waters) > 2
    from selenium.webdriver.common.keys import Keys

    browser.actions().send_keys(Keys.ARROW_RIGHT * 2).key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT).perform()
    browser.actions().key_up(Keys.SHIFT).perform()
    assert browser.js("page.step") == step - 8
    browser.find("#play").click()
    browser.wait(lambda _: browser.js("page.step") > step)
    browser.actions().send_keys(" ").perform()
    assert not browser.js("page.playing") and browser.find("#play").text == "play"
    rubble = np.zeros(48 * 48, int)
    browser.driver.execute_script("show({step: 59}); show({step: 40})")
    for changes in match["board"]["rubble"][:41]:
        rubble[changes[::2]] = changes[1::2]
    assert browser.js("[...mapsAt(shown().board, page.step)[0]]") == rubble.tolist()
    assert browser.errors() == []


def drawn(browser):
    """What the rows say at the present step: the colour of each, and all words beside them."""
    return browser.driver.execute_script("""
        const prototype = CanvasRenderingContext2D.prototype, {fillText} = prototype, words = [];
        const width = $("rows").clientWidth - NAMES - NUMBERS, w = width / shown().steps;
        prototype.fillText = (text, x, y) => words.push([`${text}`, x, y]);
        drawRows($("rows"), shown(), page.step, page.window, page.row, $("rows").clientWidth, true);
        prototype.fillText = fillText;
        const brush = $("rows").getContext("2d"), x = NAMES + (page.step + 0.5) * w;
        const colourOf = (_, i) => [...brush.getImageData(x, topOf(shown(), i + 1) + 6, 1, 1).data];
        const beside = (_, i) => words.filter(([, , y]) => y > topOf(shown(), i + 1) && y < topOf(shown(), i + 2));
        return shown().credit.rows.map((row, i) => [colourOf(row, i), beside(row, i).map(([word]) => word)])""")


def test_opening(browser):
    """It opens at the reward whose earner the team's advantage blames most, normalized or not."""
    path = ROOT / "docs" / "credit.html"
    browser.open(path)
    told, harm = matches_in(path)[0]["credit"], {}
    mean, std = np.array([told["moments"]["own"], told["moments"]["team"]]).T
    for index, row in enumerate(told["rows"]):
        for at, (earned, own) in enumerate(zip(row["earned"], row["advantages"]), row["born"]):
            raw = told["whole"]["advantages"][at]
            own, team = (np.array([own, raw]) * credit.UNIT - mean) / std
            if own > 0 > max(team, raw):
                harm[index, at] = earned * (own - team)
    assert (browser.js("page.row"), browser.js("page.step")) == max(harm, key=harm.get)
    assert browser.find("#told strong").text == told["rows"][browser.js("page.row")]["name"]


def test_switch(browser, two):
    """Separate: each row has its own advantage; team: all have the team's, and wrong signs are marked."""
    browser.open(two)
    [match, _] = matches_in(two)
    told, unit, places = match["credit"], credit.UNIT, {}
    mean, std = np.array([told["moments"]["own"], told["moments"]["team"]]).T
    team = (np.array(told["whole"]["advantages"]) * unit - mean[1]) / std[1]
    for row in told["rows"]:
        for at, (earned, own) in enumerate(zip(row["earned"], row["advantages"]), row["born"]):
            own = (own * unit - mean[0]) / std[0]
            places.setdefault(at, []).append((row["name"], earned * unit, own, own * team[at] < 0))
    assert "an advantage for each" in browser.find("#lead").text
    step = max(range(20, 40), key=lambda at: len({wrong for *_, wrong in places[at]}))
    browser.driver.execute_script(f"show({{step: {step}}})")
    for mode in ("separate", "team"):
        browser.find(f"[data-mode={mode}]").click()
        assert browser.js("page.mode") == mode and "on" in browser.find(f"[data-mode={mode}]").get_attribute("class")
        shown = [(colour, words) for colour, words in drawn(browser) if words[1:]]
        for (name, earned, own, wrong), (_, words) in zip(places[step], shown, strict=True):
            numbers = [float(word.replace("\u2212", "-")) for word in words[1:3]]
            assert numbers == pytest.approx([earned, team[step] if mode == "team" else own], abs=0.0051)
            assert words[0] == name and words[3:] == (["wrong"] if mode == "team" and wrong else [])
        colours = {tuple(colour) for colour, _ in shown}
        assert len(colours) == 1 if mode == "team" else len(colours) > 3
    assert f"wrong sign in {told['wrong']['after']:.1%}" in browser.find("#lead").text
    assert browser.errors() == []


def test_kept_picture(browser, two):
    """After each change the rows look as if drawn anew; a move of the slider alone draws no step of theirs again."""
    browser.open(two)
    look = """const rows = $("rows"), anew = document.createElement("canvas"); drawRows(anew, shown(),
        page.step, page.window, page.row, rows.clientWidth, true); return rows.toDataURL() === anew.toDataURL()"""
    for change in ("step: 9", "mode: 'team'", "window: 40", "step: 35", "which: 1", "which: 0", "window: 200"):
        assert browser.driver.execute_script(f"show({{{change}}}); {look}"), change
    assert browser.driver.execute_script(f"$('scroll').style.width = '600px'; show(); {look}")
    browser.driver.execute_script("drawSteps = null; show({step: 50, row: 0})")


def test_hover(browser, two):
    """A row marks its entity on the board, and the reverse; a click keeps the mark."""
    browser.open(two)
    browser.driver.execute_script("show({step: 40})")
    names = browser.js("shown().credit.rows.map(row => row.name)")
    for row in (1, 4):
        browser.point("#rows", 60, browser.js(f"topOf(shown(), {row + 1}) + 8"))
        assert browser.js("page.row") == row and browser.js("page.units.map(unit => unit.name)") == [names[row]]
        assert browser.find("#told strong").text == names[row]
    unit = browser.js("shown().units.find(unit => unit.kind !== 'factory' && unit.team === 0)")
    name, cell = unit["name"], unit["cell"][0]  # just born, on its factory
    browser.driver.execute_script(f"show({{step: {unit['born']}}})")
    x, y = ((place + 0.5) * 500 / 48 for place in divmod(cell, 48))
    browser.point("#board", int(x), int(y), click=True)
    assert browser.js("page.pinned") and browser.js("page.units.map(unit => unit.name)") == [name]
    assert names[browser.js("page.row")] == name and browser.find("#told strong").text == name
    browser.point("#rows", 60, browser.js("topOf(shown(), 1) + 8"))
    assert names[browser.js("page.row")] == name
    assert browser.errors() == []


def test_views(browser, two):
    """Both checkpoints side by side, and each by itself; the baseline says what it is."""
    browser.open(two)
    browser.find("[data-screen=side]").click()
    assert browser.find("#side").is_displayed() and not browser.find("#match").is_displayed()
    text = browser.find("#side").text
    assert "wrong sign" in text and "baseline" in text and str(MODEL) in text
    browser.find("[data-which='1']").click()
    assert browser.js("page.which") == 1 and browser.find("#match").is_displayed()
    assert "one trajectory for the whole team" in browser.find("#numbers").text
    assert browser.find("[data-mode=separate]").get_attribute("disabled")
    browser.point("#rows", 60, browser.js("topOf(shown(), 1) + 8"))
    assert "the team's" in browser.find("#told").text and "its own trajectory" not in browser.find("#told").text
    assert browser.errors() == []


def test_other_matches(browser, tmp_path):
    """A match that ends early, teams without robots, many lives, and a replay whose names are code."""
    source = untrained(tmp_path / "run.pt")
    script, args, agent, step = credit.load(source)
    with torch.no_grad():
        agent.actor.bias[:] = 0
        agent.actor.bias[-8:] = torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 0])  # factories do nothing
    rollout = credit.play(script, args, agent, step, credit.FIRST_MAP, 1000)
    told = credit.credit_of(script, args, rollout, 0)
    assert 100 < len(rollout["earned"]) < 200 and all("factory" in row["name"] for row in told["rows"])
    name = "</script><img src=x onerror=alert(1)>"
    board = rollout["board"] | {"names": [name, "B"], "notes": [(5, 0, name)]}
    for matches in ([{"title": "a", "board": rollout["board"], "credit": told}], [{"title": name, "board": board}]):
        page.write_page(tmp_path / "page.html", matches)
        browser.open(tmp_path / "page.html")
        browser.driver.execute_script("show({step: 5000, row: 0})")
        assert browser.js("page.step") == len(rollout["earned"])
    board_at = "const words = []; CanvasRenderingContext2D.prototype.fillText = word => words.push(word);"
    board_at += "show({step: arguments[0]}); return words"
    last = len(rollout["earned"]) - 1
    assert "\u2715" in browser.driver.execute_script(board_at, last), "factories are lost"
    assert "\u2715" not in browser.driver.execute_script(board_at, last // 2)
    assert name in browser.find("#score").text and name in browser.find("#notes").text
    assert not browser.find("#credit").is_displayed()
    browser.find("[data-step='5']").click()
    assert browser.js("page.step") == 5 and browser.errors() == []
