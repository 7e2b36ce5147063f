"""The bot sees and does what the training's wrapper does, never dies in mid-match, and plays packed."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from helpers import in_process, parameters_at_start
from in_double import double_precision
from PIL import Image

import global_ppo
import lux_wrapper as lux
import trajsep_ppo
from hybrid_model import HybridNet

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "submission"), str(ROOT / "benchmark")]

import main as bot  # noqa: E402
import match as matches  # noqa: E402
import pack as packing  # noqa: E402
from luxai_runner.utils import to_json  # noqa: E402
from luxai_s2.unit import UnitType  # noqa: E402

MODEL = ROOT / "submission" / "model.pt"
LIGHT, HEAVY = UnitType.LIGHT, UnitType.HEAVY


class Game:
    """A match of the official engine with the official runner's messages."""

    def __init__(self, seed=7, **options):
        stage = {"map_size": 24, "MIN_FACTORIES": 2, "MAX_FACTORIES": 2}
        self.engine = matches.Engine(**stage | options)
        self.engine.reset(seed=seed)
        self.seen = self.engine.state.get_compressed_obs()
        self.message, self.done = to_json(self.seen), False
        self.seats = [Namespace(refused=0), Namespace(refused=0)]  # orders that the engine refused

    def line(self, player="player_0"):
        return json.dumps({"obs": self.message, "player": player, "step": self.engine.env_steps})

    def turn(self, players):
        """The players' answers; the engine plays them, as they come from JSON."""
        orders = [player.answer(self.line(name)) for name, player in zip(lux.PLAYERS, players)]
        given = {}
        for player, order in zip(lux.PLAYERS, json.loads(json.dumps(orders))):
            queues = {name: np.array(x) for name, x in order.items() if isinstance(x, list)}
            given[player] = order | queues
        with matches.counted(self.seats):
            _, _, terminations, _, _ = self.engine.step(given)
        self.done = terminations["player_0"]
        self.message = to_json(self.engine.state.get_change_obs(self.seen))
        self.seen = self.engine.state.get_obs()
        assert self.engine.complaints == [] and [seat.refused for seat in self.seats] == [0, 0]
        return orders

    def place(self, *players):
        """Play bidding and placement."""
        while self.engine.state.real_env_steps < 0:
            self.turn(players)

    def add(self, player, kind, pos):
        """A full robot of a player on a cell."""
        unit = self.engine.add_unit(self.engine.state.teams[player], kind, np.array(pos))
        unit.power = unit.battery_capacity
        return unit


class Idle(bot.Player):
    """Places factories, and then does nothing."""

    def __init__(self):
        super().__init__(MODEL)
        self.network = None


class Seeing(bot.Player):
    """A bot that keeps its arrays as `own`."""

    def choose(self, own):
        self.own = {key: x[0].numpy() for key, x in own.items()}
        return super().choose(own)


# In double precision a board alone and one among others give the same actions.
@double_precision()
def test_parity(monkeypatch):
    """Over a whole match, from both sides, the bot sees and does what the training's network does."""
    monkeypatch.setattr(bot, "SAMPLE", False)
    network, options = bot.load_model(MODEL)
    stage = {"map_size": 48, "min_factories": 3, "max_factories": 3}
    env, (match,) = in_process(1, **dataclasses.asdict(options) | stage)
    obs, _ = env.reset(seed=5)
    game = Game(match.seed, map_size=48, MIN_FACTORIES=3, MAX_FACTORIES=3)
    players = Seeing(), Seeing()
    game.place(*players)
    games = env.games.envs[0]
    steps, robots = 0, 0
    while not game.done:
        orders = game.turn(players)
        with torch.no_grad():
            both = {key: torch.from_numpy(array[0]) for key, array in obs.items()}
            actions = network(both)[0].argmax(-1).numpy()[None]
        (expected,), _ = games.encoder.orders(games.view, actions)
        for row, player in enumerate(players):
            for key, array in player.own.items():
                np.testing.assert_array_equal(array, obs[key][0, row], f"{key} at step {steps}")
            assert orders[row] == {name: np.array(x).tolist() for name, x in expected[row].items()}
        robots = max(robots, (obs["kind"] > lux.FACTORY).sum())
        obs, _, terminated, _, _ = env.step(actions)
        steps += 1
        assert terminated[0] == game.done
    assert steps > 150 and robots > 4


@double_precision()
def test_same_match_again(monkeypatch):
    """Actions are drawn from the policy, with the same numbers in every match of a seed."""
    orders = []
    for seed in (0, 0, 1):
        monkeypatch.setattr(bot, "SEED", seed)
        game, players = Game(), (bot.Player(), Idle())
        game.place(*players)
        orders.append([game.turn(players) for _ in range(30)])
    assert orders[0] == orders[1] != orders[2]


# ------------------------------ Robots beyond the slots ------------------------------


def test_lost_and_built_at_the_limit():
    """A robot without a slot is drawn and not stepped onto; it gets a slot that was seen empty."""
    game = Game()
    encoder = lux.LuxEncoder(lux.LuxOptions(map_size=24, max_factories=2, max_robots=2))
    game.place(Idle(), Idle())
    state = game.engine.state
    encoder.reset(state.get_obs())

    def encode(*robots):
        obs, view = encoder.encode([lux.read_observation(state.get_obs())])
        _, builds = view
        assert not (builds.slot_for_light | builds.slot_for_heavy)[0, 0].any()
        assert obs["kind"][0, 0].tolist() == [lux.FACTORY, lux.FACTORY, *robots]
        return {key: x[0] for key, x in obs.items()}, view

    x, y = next(iter(state.factories["player_0"].values())).pos.pos.tolist()
    first, second = (game.add("player_0", LIGHT, (x + dx, y)) for dx in (1, -1))
    encode(lux.ROBOT, lux.ROBOT)

    game.engine.destroy_unit(first)
    third = game.add("player_0", HEAVY, (x, y + 1))
    second.pos.pos = np.array([x + 1, y + 1])  # beside the third
    obs, view = encode(lux.NOBODY, lux.ROBOT)
    for board, side in zip(obs["board"], ("own", "opponent")):
        assert board[x, y + 1, lux.CHANNEL[f"{side}_heavy"]] == 100
    mask = obs["action_mask"][0, 3]
    assert not mask[lux.LEFT] and mask[lux.UP : lux.LEFT].any()
    orders, acts = encoder.orders(view, np.full((1, 2, 4), lux.RIGHT))
    assert orders[0][0].keys() == acts[0].robots.keys() == {second.unit_id}

    obs, _ = encode(lux.ROBOT, lux.ROBOT)
    assert encoder.robot_slots[0][0] == {second.unit_id: 3, third.unit_id: 2}
    assert obs["position"][0, 2].tolist() == [x, y + 1]


def test_many_robots():
    """Hundreds of the opponent's robots are all on the bot's board, and its own have slots."""
    game, players = Game(map_size=48), (Seeing(), Idle())
    game.place(*players)
    state, acted = game.engine.state, 0
    free = np.argwhere(state.board.factory_occupancy_map == -1)
    for number, cell in enumerate(np.random.default_rng(0).permutation(free)[:300]):
        game.add("player_1", (LIGHT, HEAVY)[number % 2], cell)
    game.message = to_json(state.get_obs())
    for _ in range(20):
        ours, theirs = (len(state.units[player]) for player in lux.PLAYERS)
        orders, _ = game.turn(players)
        own = players[0].own
        drawn = own["board"][..., [lux.CHANNEL["opponent_light"], lux.CHANNEL["opponent_heavy"]]]
        assert (drawn > 0).sum() == theirs > 200
        assert (own["kind"] > lux.FACTORY).sum() == ours
        acted += any("unit" in name for name in orders)
    assert acted > 5 and ours > 0


# ------------------------------ What cannot be read ------------------------------


def broken(line, path, value):
    """The message with another value at a path."""
    message = place = json.loads(line)
    *path, last = path.split("/")
    for key in path:
        place = place[key]
    place[last] = value
    return json.dumps(message)


OUTSIDE = {"unit_id": "unit_99", "team_id": 0, "power": 50, "unit_type": "LIGHT", "pos": [24, 3]}
OUTSIDE |= {"action_queue": [], "cargo": {"ice": 0, "ore": 0, "water": 0, "metal": 0}}
UNREADABLE = [b"{'obs':", b"\xff\xfe\n", "[1, 2]", '{"step": 3}']
BROKEN = [
    ("obs/board/factories_per_team", 1),  # first: a new encoder cannot be used either
    ("obs/units", None),
    ("player", "player_7"),
    ("obs/units/player_0/unit_99", OUTSIDE),
    ("obs/board/rubble/99,99", 5),
]


def test_malformed_turns(capfd):
    """A turn that cannot be read costs its orders and a line on stderr; later turns are played.

    Unknown fields are ignored; a team without factories and robots gets no orders.
    """
    game, players = Game(), (bot.Player(), Idle())
    game.place(*players)
    for damage in BROKEN + UNREADABLE:
        for _ in range(2):
            line = broken(game.line(), *damage) if damage in BROKEN else damage
            assert players[0].answer(line) == {}, damage
            assert capfd.readouterr().err.count("\n") == 1, damage
        orders = [game.turn(players)[0] for _ in range(6)]
        assert any(orders) and capfd.readouterr().err == "", damage
    news = broken(game.line(), "obs/board/weather", {"1,1": "rain"})
    players[0].answer(broken(news, "obs/news", [1, [2]]))
    no_factories = broken(game.line(), "obs/factories/player_0", {})
    assert players[0].answer(broken(no_factories, "obs/units/player_0", {})) == {}
    assert capfd.readouterr().err == ""


def test_half_a_turn(capfd):
    """The maps of a turn are taken whole, or not at all."""
    game, player = Game(), bot.Player()
    game.place(player, Idle())
    before = {name: x.copy() for name, x in player.maps.items()}
    line = broken(game.line(), "obs/board/ice", {"0,0": 7, "1,1": 7})
    assert player.answer(broken(line, "obs/board/rubble", {"0,0": 7, "99,99": 7})) == {}
    assert "no orders" in capfd.readouterr().err
    assert all(np.array_equal(player.maps[name], x) for name, x in before.items())


def test_malformed_first_turn(capfd):
    """Without the first turn there is no map; but a bid is made, or the match would be lost."""
    player, game = bot.Player(), Game()
    assert player.answer("?") == {"faction": "AlphaStrike", "bid": 0}
    game.place(Idle(), Idle())
    assert player.answer(game.line()) == {}
    assert capfd.readouterr().err.count("\n") == 2


def test_the_script_plays_the_bot():
    """`trajsep_ppo.py --evaluate submission/model.pt`: the file has every flag of the script."""
    args = torch.load(MODEL, weights_only=True)["args"]
    assert dataclasses.asdict(trajsep_ppo.Args(**args)) == args


def test_arguments_of_a_model(tmp_path):
    """The encoder's options are those of the training, but for the groups, which only learning needs."""
    game = {"max_robots": 9, "reward": "lichen", "safe_masks": False}
    for args in (
        trajsep_ppo.Args(env_kwargs=game, group_by="cluster"),
        trajsep_ppo.Args(env_kwargs=game, group_by="a patch's own"),
        global_ppo.Args(env_kwargs=game),
    ):
        run = make_run(tmp_path / f"{len(os.listdir(tmp_path))}", args)
        _, options = bot.load_model(run / "checkpoint_512.pt")
        assert options == lux.LuxOptions(**game)


NOT_FINITE = {"critic.2.bias": torch.tensor([np.nan])}
USELESS = {  # content of a model -> what is in the file
    "missing": lambda content: None,
    "no model": lambda content: b"no model",
    "truncated": lambda content: MODEL.read_bytes()[:100_000],
    "other content": lambda content: {"weights": torch.zeros(3)},
    "other network": lambda content: content | {"model": {}},
    "other option": lambda content: content | {"args": {"env_kwargs": {"weather": 1}}},
    "not finite": lambda content: content | {"model": content["model"] | NOT_FINITE},
}


@pytest.mark.parametrize("name", USELESS)
def test_useless_model(name, tmp_path, capfd):
    """A sentence on stderr; then factories are placed, and there are no orders."""
    path = tmp_path / "model.pt"
    content = USELESS[name](torch.load(MODEL, weights_only=True))
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    player, game = bot.Player(path), Game()
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "model.pt cannot be used, so there will be no orders" in err
    game.place(player, Idle())
    assert len(game.engine.state.factories["player_0"]) == 2
    assert player.answer(game.line()) == {} and capfd.readouterr().err == ""


# ------------------------------ The archive ------------------------------

BLOCKED = ["luxai_s2", "luxai_runner", "luxai_s2_fast", "gymnasium", "pettingzoo", "tyro"]
BLOCKED += ["tensorboard", "tqdm", "matplotlib", "scipy", "pygame"]


def make_run(folder, script_args=None, **change):
    """A run's folder with a checkpoint of an untrained network."""
    folder.mkdir()
    args = dataclasses.asdict(script_args or trajsep_ppo.Args())
    space, _ = lux.single_spaces(lux.LuxOptions(**args["env_kwargs"]))
    parameters = HybridNet(space, lux.NUM_ACTIONS).state_dict()
    torch.save({"args": args, "model": parameters, **change}, folder / "checkpoint_512.pt")
    return folder


def run_pack(monkeypatch, run, out, *options):
    monkeypatch.setattr(sys, "argv", ["pack.py", str(run), "--out", str(out), *options])
    monkeypatch.setattr(packing, "KAGGLE", (600, 600))  # this machine may be slower
    packing.main()


def test_archive(tmp_path, monkeypatch):
    """It is small, and plays both sides from an empty folder with only NumPy and PyTorch."""
    blocked = tmp_path / "blocked"  # Kaggle or another machine may not have these modules
    blocked.mkdir()
    code = f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n"
    (blocked / "sitecustomize.py").write_text(code)
    (blocked / "main.py").write_text("import gymnasium")
    monkeypatch.setenv("PYTHONPATH", str(blocked))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    rows = matches.play((matches.main_file(blocked), "idle"), seed=3)
    assert "import of gymnasium" in rows[0]["stderr"]

    archive, folder = tmp_path / "submission.tar.gz", tmp_path / "bot"
    run_pack(monkeypatch, make_run(tmp_path / "run", step=9), archive, "--steps", "15")
    assert archive.stat().st_size < 2**20
    shutil.unpack_archive(archive, folder, "gztar")
    files = {"hybrid_model.py", "lux_wrapper.py", "main.py", "model.pt"}
    assert set(os.listdir(folder)) == files
    assert torch.load(folder / "model.pt", weights_only=True).keys() == {"args", "model"}
    bots = []
    for name in ("submission.tar.gz", "run/checkpoint_512.pt"):  # match.py plays these as they are, and the run
        (tmp_path / name[-2:]).mkdir()
        bots.append(matches.main_file(tmp_path / name, tmp_path / name[-2:]))
        assert set(os.listdir(tmp_path / name[-2:])) == files
    for row in matches.play(bots, seed=3, steps=25, limits=(600, 600)):
        assert row["error"] + row["stderr"] == "" and row["refused"] == 0
        assert row["length"] == 25 and row["robots"] > 0


EDITED = {  # arguments that a person has edited
    "no arguments": None,
    "a list": [1, 2],
    "no options": {"env_kwargs": None},
    "a number": {"env_kwargs": {"max_robots": "9"}},
    "too many": {"env_kwargs": {"max_robots": 10**9}},
    "unknown": {"env_kwargs": {"weather": 1}},
}


def test_pack_refuses(tmp_path, monkeypatch, capsys):
    """What cannot play, in one sentence, and makes no archive."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "copies")
    (tmp_path / "copies" / "checkpoint_512.pt").rename(tmp_path / "copies" / "checkpoint_512 copy.pt")
    (make_run(tmp_path / "damaged") / "checkpoint_512.pt").write_bytes(MODEL.read_bytes()[:100_000])
    make_run(tmp_path / "good")
    make_run(tmp_path / "other", model=parameters_at_start() | {"a": torch.zeros(9)})
    for name, args in EDITED.items():
        make_run(tmp_path / name, args=args)
    monkeypatch.setattr(packing, "LARGEST", 1000)
    for name, sentence in (
        ("nowhere", "there is no nowhere"),
        ("empty", "there is no checkpoint in empty"),
        ("copies", "there is no checkpoint in copies"),
        ("damaged", "holds no network for this game"),
        ("other", "holds no network for this game"),
        *((name, "holds no network for this game") for name in EDITED),
        ("good", "bytes, more than 1,000"),
        ("good --steps 0", "--steps must be at least 1"),
        ("good --out nowhere/x.tar.gz", "nowhere/x.tar.gz cannot be written"),
    ):
        run, *options = name.split(" --")
        options = [word for option in options for word in f"--{option}".split()]
        monkeypatch.setattr(sys, "argv", ["pack.py", run, *options])
        with pytest.raises(SystemExit) as stop:
            packing.main()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and sentence in said and said.count("\n") == 1
        assert not (tmp_path / "submission.tar.gz").exists()
    (tmp_path / "submission.tar.gz").touch()
    monkeypatch.setattr(sys, "argv", ["pack.py", "nowhere"])
    with pytest.raises(SystemExit):
        packing.main()
    assert "submission.tar.gz is there already; `--out submission.tar.gz` replaces it" in capsys.readouterr().err

    (tmp_path / "empty" / "main.py").write_text("for line in open(0): print('{}')")
    archive = shutil.make_archive(tmp_path / "x", "gztar", tmp_path / "empty")
    with pytest.raises(packing.Refused, match="does not play as player_0"):
        packing.prove(archive)


@double_precision()
def test_kaggle():
    """Kaggle runs the text of main.py without __file__, and calls the last function in it."""
    path, names = ROOT / "submission" / "main.py", {}
    exec(compile(path.read_text(), path, "exec"), names)
    agent = [value for value in names.values() if callable(value)][-1]
    game, players = Game(), (bot.Player(), Idle())
    for step in range(20):
        seen = Namespace(step=step, player="player_0", obs=json.dumps(game.message))
        answer = agent(seen, {"env_cfg": {}})
        assert answer == game.turn(players)[0]


# ------------------------------ Matches ------------------------------


def test_matches(tmp_path):
    """The program: a map a game, sides that alternate, rows, replays and the result; a run plays as it is."""
    shutil.copy(MODEL, make_run(tmp_path / "run") / "checkpoint_1024.pt")
    (tmp_path / "run" / "checkpoint_2048 copy.pt").touch()
    command = [sys.executable, matches.__file__, "--a", "run", "--b", "idle"]
    command += "--games 2 --parallel 2 --seed 4 --steps 20 --map-size 32 --max-factories 2".split()
    command += "--overage 6000 --out games.csv --replays replays".split()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    with open(tmp_path / "games.csv") as file:
        rows = list(csv.DictReader(file))
    bots = [f"{row['game']} {row['player']} {row['seed']} {row['bot']}" for row in rows]
    assert bots[:2] == ["0 player_0 4 run", "0 player_1 4 idle"]
    assert bots[2:] == ["1 player_0 5 idle", "1 player_1 5 run"]
    assert "font" not in done.stderr
    assert "replays written to replays: " in done.stdout
    for row in rows:
        idle = row["bot"] == "idle"
        assert row["error"] == "" and row["length"] == "20"
        assert (int(row["robots"]) == 0) == (float(row["turn_max"]) == 0) == idle
    ours, theirs = done.stdout.split("\nidle: ")
    assert " 0.0 robots" in theirs and " 0.0 robots" not in ours
    replay = json.loads((tmp_path / "replays" / "1.json").read_text())
    assert len(replay["observations"]) == len(replay["actions"]) + 1 == 20 + 5 + 1
    assert replay["observations"][0] == Game(5, map_size=32).message
    boards = [obs["board"] for obs in replay["observations"]]
    assert "ice" in boards[0] and "ice" not in boards[1]
    page = (tmp_path / "replays" / "1.html").read_text()
    [shown] = json.loads(page.split("const matches = ")[1].split(";\n")[0])
    assert "http" not in page and shown["board"]["names"] == ["idle", "run"] and "credit" not in shown
    assert len(shown["board"]["score"]) == 20 + 1
    with Image.open(tmp_path / "replays" / "1.gif") as film:
        assert 3 < film.n_frames <= 7  # every fourth step; those alike are one
        assert film.size == (400, 400 + lux.CAPTION_HEIGHT)


BID = """'{"faction": "%s", "bid": 0}'"""
SLOW_CRASH = """import os, sys, time
os.close(1)
time.sleep(2)
sys.stderr.write("one\\ntwo\\n")
sys.exit(3)
"""
LONG_ANSWERS = f"""import sys
for line in open(0):
    print({BID % "AlphaStrike"} + " " * 300_000, flush=True)"""
LONG_LINES = f"""import sys
for line in open(0):
    print("x" * 300_000, "the end", file=sys.stderr, flush=True)
    print({BID % "AlphaStrike"}, flush=True)"""
FAILING = {  # program, reason of its loss
    "late": ("import time\nfor line in open(0): time.sleep(60)", "was late: "),
    "no JSON": ("for line in open(0): print('?', flush=True)", "its answer is no JSON object: ?"),
    "no text": ("import os\nfor line in open(0): os.write(1, b'\\xff\\n')", "its answer is no JSON object: "),
    "ragged orders": ("for line in open(0): print('{\"a\": [[1, 2], [3]]}', flush=True)", "these are no orders: {'a'"),
    "too long": (LONG_ANSWERS, "its answer has more than 1,000 bytes"),
    "no factory, long answers": (LONG_ANSWERS, "turn 8: it has placed no factory"),
    "no factory, long lines": (LONG_LINES, "turn 8: it has placed no factory"),
    "wrong orders": (f"for line in open(0): print({BID % 'X'}, flush=True)", "invalid faction name X"),
    "crashed": (SLOW_CRASH, "ended with exit code 3"),
}


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("player", [0, 1])
def test_bots_that_fail(name, player, tmp_path, monkeypatch):
    """They lose, whichever side they play, with the reason."""
    text, reason = FAILING[name]
    if name == "too long":
        monkeypatch.setattr(matches, "LONGEST", 1000)
    (tmp_path / "main.py").write_text(text)
    files = [matches.main_file(tmp_path), "idle"][:: -1 if player else 1]
    limits = (0.2, 0.2) if name == "late" else (600, 600)  # they count the start of Python too
    rows = matches.play(files, seed=1, limits=limits)
    assert rows[player]["result"] == "loss" and rows[1 - player]["result"] == "win"
    assert reason in rows[player]["error"] and rows[1 - player]["error"] == ""
    if name == "no factory, long lines":
        assert rows[player]["stderr"].endswith("x the end")
    if name == "crashed":
        assert rows[player]["stderr"].splitlines()[-2:] == ["one", "two"]
        first = f"   failed in the game on map 1 as player_{player}, turn 0: ended with exit code 3"
        assert [*matches.summary([rows[player]], "it")][-3:] == [first, "      one", "      two"]


def test_both_fail(tmp_path):
    """No bot wins, and each gets its own reason."""
    files = tmp_path / "X.py", tmp_path / "Y.py"
    for file in files:
        file.write_text(f"for line in open(0): print({BID % file.stem}, flush=True)")
    stage = {"min_factories": 3, "max_factories": 3, "replay": tmp_path / "replay"}
    rows = matches.play([str(file) for file in files], seed=1, limits=(600, 600), **stage)
    assert (tmp_path / "replay.gif").exists()
    assert [row["result"] for row in rows] == ["draw", "draw"]
    assert [row["error"].split()[-1] for row in rows] == ["X", "Y"]
    page = (tmp_path / "replay.html").read_text()
    [shown] = json.loads(page.split("const matches = ")[1].split(";\n")[0])
    assert shown["board"]["notes"] == [[0, player, row["error"]] for player, row in enumerate(rows)]


def test_refused_orders_are_counted():
    """Of whose robot or factory it was."""
    game = Game()
    game.place(Idle(), Idle())
    (name,) = [*game.engine.state.factories["player_1"]][:1]
    with matches.counted(game.seats):
        for metal in (0, 1000):
            game.engine.state.factories["player_1"][name].cargo.metal = metal
            game.engine.step({"player_0": {}, "player_1": {name: 1}})
    assert [seat.refused for seat in game.seats] == [0, 1]


def test_who_wins():
    """The team with more lichen."""
    engine = Game().engine
    teams = [Namespace(factory_strains=[strain]) for strain in range(2)]
    engine.state.teams = dict(zip(lux.PLAYERS, teams))
    engine.state.board.lichen_strains[:2, 0] = 0, 1
    seats = [matches.Seat("idle", player, 9, 600) for player in lux.PLAYERS]
    for lichen, results in (([5, 3], ["win", "loss"]), ([4, 4], ["draw", "draw"])):
        engine.state.board.lichen[:2, 0] = lichen
        told = dict(zip(lux.PLAYERS, lichen)), dict(zip(lux.PLAYERS, "ab"))
        rows = [matches._row(engine, seat, 0, *told) for seat in seats]
        assert [row["result"] for row in rows] == results
        assert [row["lichen"] for row in rows] == lichen


def test_wilson():
    """As in Brown, Cai and DasGupta's formula, computed by hand for 15 of 20."""
    np.testing.assert_allclose(matches.wilson(0.75, 20), (0.5313, 0.8881), atol=1e-4)
    assert matches.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_nothing_is_played_in_vain(tmp_path, monkeypatch, capsys):
    """What cannot work is said before the first game, also that a bot cannot be started; no file is lost."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    os.mkdir("bot")
    for file in ("text.txt", "bot/main.out", "games.csv", "damaged.tar.gz", "damaged.pt"):
        Path(file).write_text("no program")
    for options, sentence in (
        (["idle", "--out", "nowhere/games.csv"], "nowhere/games.csv cannot be written"),
        (["idle", "--games", "0"], "--games, --parallel and --steps must be at least 1"),
        (["idle", "--seed", "-1"], "--seed must be between 0 and 4294967286, got -1"),
        (["idle", "--seed", "4294967290"], "--seed must be between"),
        (["idle", "--min-factories", "6"], "--min-factories must be at least 1, and at most --max-factories"),
        (["idle", "--min-factories", "0"], "--min-factories"),
        (["idle", "--turn-seconds", "nan"], "--turn-seconds and --overage must be at least 0"),
        (["idle", "--overage", "-1"], "--overage"),
        (["bot", "--out", "games.csv"], "Permission denied"),
        (["damaged.tar.gz"], "damaged.tar.gz is no archive"),
        (["damaged.pt"], "holds no network for this game"),
        (["nowhere"], "nowhere"),
        (["empty"], "empty"),
        (["text.txt"], "text.txt"),
    ):
        monkeypatch.setattr(sys, "argv", ["match.py", "--a", "idle", "--games", "9", "--b", *options])
        with pytest.raises(SystemExit) as stop:
            matches.main()
        captured = capsys.readouterr()
        assert stop.value.code == 2 and sentence in captured.err and captured.out == ""
    monkeypatch.setattr(matches, "tqdm", MagicMock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", "match.py --a idle --b idle --steps 1 --games 1 --out games.csv".split())
    with pytest.raises(SystemExit, match="130"):
        matches.main()
    assert "interrupted; no results are written" in capsys.readouterr().err
    assert Path("games.csv").read_text() == "no program"


def test_main_files(tmp_path):
    """Of all languages that the official runner starts."""
    for name in ("Main.java", "main.js", "main.out"):
        folder = tmp_path / name[-2:]
        folder.mkdir()
        (folder / name).touch()
        assert matches.main_file(folder).endswith(name)
        (folder / "main.py").touch()
        assert matches.main_file(folder).endswith("main.py")
