"""Made-up input of every kind: it is refused with one sentence and exit code 2, or it works.

The examples are the same ones in every run. FUZZ_EXAMPLES=5000 tries others, and more of them.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import os
import runpy
import sys
import tempfile
import typing
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import luxai_s2.env
import numpy as np
import pytest
import torch
from helpers import entities, masked_random, watched_validator, weak_robots
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from luxai_s2.unit import UnitType

import global_ppo
import lux_wrapper as lux
import trajsep_ppo

LONGER = int(os.environ.get("FUZZ_EXAMPLES", 0))
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [trajsep_ppo, global_ppo]
COUNT = Counter()  # what was tried, by kind
SAID = []  # what programs said that refused


def examples(number):
    """Settings of a test with so many examples."""
    return settings(
        max_examples=number * LONGER // 400 or number,
        deadline=None,
        database=None,
        derandomize=not LONGER,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if LONGER else [Phase.generate],
    )


class Accepted(BaseException):
    """Raised where a program has read all that it was given and begins to work."""


def accept(*_, **__):
    raise Accepted


def outcome(function, codes=(2,)):
    """Whether the function ends or reaches `accept`; else it must refuse, with one of the codes.

    Code 2 comes with a single sentence, others may come with a traceback before it.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Using a non-tuple")  # text where torch expects a dict
            warnings.filterwarnings("ignore", "The field `.*` is annot")  # a type that does no harm
            function()
    except Accepted:
        pass
    except SystemExit as end:
        SAID.append(said.getvalue())
        *before, last = SAID[-1].strip().splitlines()
        box = "full helptext" in SAID[-1]  # tyro's
        sentence = "error: " in last and not (end.code == 2 and before)
        assert end.code in codes and (box or sentence), SAID[-1]
        return False
    return True


def start(script, *command, codes=(2,)):
    """The `outcome` of a command line."""
    path = ROOT / f"{script.__name__}.py"
    with mock.patch.object(sys, "argv", [path.name, *command]):
        return outcome(lambda: runpy.run_path(str(path), run_name="__main__"), codes)


# ---------- Flags ----------

ODD = ["-1", "0", "-0.0", "1.5", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5000]
ODD += ["many", "", " ", "None", "--", "0x10"]
SIZES = ["1", "2", "4", "7", "16", "48", "64", "1000", "1000000", "1000000000000"]
NUMBERS = {int: SIZES, float: ["0", "0.5", "0.9", "1", "1e-3", "2"]}
CHOICES = ["entity", "cluster", "ice", "lichen", "True", "False", "lux_wrapper:LuxVecEnv"]
text = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=6)


def words(likely):
    """Strategy: mostly one of the likely words."""
    return st.one_of(*[st.sampled_from(likely)] * 6, st.sampled_from(ODD), text)


def values(kind):
    """Strategy: lists of what may stand after a flag of this type."""
    if typing.get_origin(kind) is dict:
        pair = st.tuples(words(list(lux.ALLOWED_OPTIONS)), words(SIZES + CHOICES))
        return st.lists(pair, max_size=2).map(lambda pairs: sum(pairs, ()))
    numbers = [NUMBERS[part] for part in (kind, *typing.get_args(kind)) if part in NUMBERS]
    return st.lists(words(numbers[0] if numbers else CHOICES), max_size=1)


def flags(script):
    """Strategy: lists of arguments as from a command line."""
    options = [st.tuples(st.sampled_from(["--no-such-flag", "-x", "--seed=", "word"]))]
    for field in dataclasses.fields(script.Args):
        name = field.name.replace("_", "-")
        if field.type is bool:
            options.append(st.tuples(st.sampled_from([f"--{name}", f"--no-{name}"])))
        else:
            options.append(values(field.type).map(lambda after, name=name: (f"--{name}", *after)))
    return st.lists(st.one_of(*options), min_size=1, max_size=4).map(lambda parts: sum(parts, ()))


def checked_env(num_envs, num_workers=0, held_out=False, first_match=0, render_mode=None, **options):
    """In place of LuxVecEnv: its checks, and no processes."""
    lux.checked_options(**options)
    accept()


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags(script, monkeypatch, tmp_path):
    """Any command line is refused, or describes a training that makes sense."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lux, "LuxVecEnv", checked_env)

    @examples(200)
    @given(flags(script))
    def check(command):
        COUNT["flags accepted" if start(script, *command) else "flags refused"] += 1
        assert not list(tmp_path.iterdir())

    check()


def one_of_each(**choices):
    """Strategy: dicts with one choice for each name."""
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})


TRAININGS = {
    "num_envs": [1, 2],
    "num_steps": [2, 4],
    "num_minibatches": [1, 2],
    "update_epochs": [1, 2],
    "seed": [0, 2**32 - 1],
    **dict.fromkeys(["norm_adv", "anneal_lr", "anneal_ent"], [False, True]),
    **dict.fromkeys(["gamma", "gae_lambda", "ent_coef", "vf_coef", "target_kl"], [0.0, 1.0]),
    **dict.fromkeys(["learning_rate", "clip_coef", "max_grad_norm"], [1e-8, 1.0]),
    "positive_reward_weight": [1e-8, 1.0],
}
GAMES = {
    "map_size": [24, 31, 48, 64],
    "min_factories": range(1, 6),
    "max_factories": range(5, 11),
    "max_robots": [1, 2, 40],
    "safe_masks": [False, True],
    "reward": ["ice", "lichen"],
}
GROUP_BY = ["entity", "cluster"]


def train(script, **options):
    """Content of the last checkpoint of a training in this process."""
    args = script.Args(num_workers=0, **options)
    with mock.patch.object(sys, "argv", ["script.py"]):
        script.check_args(args)
    with tempfile.TemporaryDirectory() as folder:
        assert outcome(lambda: script.train(args, Path(folder), torch.device("cpu")))
        path = script.checkpoints(folder)[-1]
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_small_trainings(script, tmp_path):
    """What is allowed works, at the edges too, up to a checkpoint of finite numbers."""
    own = {"agent_reward_weight": [0.0, 1.0], "group_by": GROUP_BY} if script is trajsep_ppo else {}

    @examples(5)
    @given(one_of_each(**TRAININGS, **own), one_of_each(**GAMES), st.integers(1, 2))
    def check(options, game, updates):
        steps = options["num_envs"] * options["num_steps"] * updates
        checkpoint = train(script, **options, total_timesteps=steps, env_kwargs=game)
        assert checkpoint["global_step"] == steps
        assert all(x.isfinite().all() for x in checkpoint["model"].values())

    check()


# ---------- Checkpoints ----------


@functools.cache
def trained(script):
    """Content of the checkpoint of a real run of two updates of 4 steps."""
    sizes = {"num_envs": 1, "num_steps": 4, "num_minibatches": 2, "total_timesteps": 8}
    return train(script, **sizes, env_kwargs={"max_robots": 3}, save_every=1)


places_in_a_file = st.floats(0, 1, exclude_max=True) | st.floats(0.98, 1, exclude_max=True)
damages = st.tuples(st.sampled_from(["cut", "bit", "zeros"]), places_in_a_file)
damages |= st.tuples(st.just("foreign"), st.binary(max_size=300))


def damaged(content, damage):
    """The bytes of a file after the damage."""
    how, what = damage
    if how == "foreign":
        return what
    place = int(what * len(content))
    head, tail = content[:place], content[place:]
    if how == "bit":
        return head + bytes([tail[0] ^ 1 << place % 8]) + tail[1:]
    if how == "zeros":  # as of a block that never reached the disk
        return head + bytes(len(tail[:4096])) + tail[4096:]
    return head


def same(one, other):
    """Whether two checkpoints are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_damaged_files(monkeypatch, tmp_path):
    """A damaged file is refused, and the one before it is named; or no important bit of it was hit."""
    content, run_dir = trained(trajsep_ppo), tmp_path / "run"
    run_dir.mkdir()
    newest = run_dir / "checkpoint_8.pt"
    torch.save(content, newest)
    whole = newest.read_bytes()
    (run_dir / "checkpoint_4.pt").write_bytes(whole)
    (run_dir / "checkpoint_best.pt").write_bytes(b"a file of somebody else")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lux, "LuxVecEnv", accept)

    @examples(120)
    @given(damages)
    def check(damage):
        newest.write_bytes(damaged(whole, damage))
        files = {path: path.read_bytes() for path in run_dir.iterdir()}
        if start(trajsep_ppo, "--resume", "run"):
            assert same(torch.load(newest, weights_only=True), content)
            COUNT["damage without effect"] += 1
        else:
            assert "checkpoint_4.pt" in SAID[-1]
            COUNT["damaged files refused"] += 1
        assert files == {path: path.read_bytes() for path in run_dir.iterdir()}

    check()


def places(content, path=()):
    """Paths of all that is in a checkpoint, nested or not."""
    for key in range(len(content)) if isinstance(content, list) else content:
        yield (*path, key)
        if isinstance(content[key], (dict, list)):
            yield from places(content[key], (*path, key))


WRONG = {
    "nothing": None,
    "text": "text",
    "wrong size": torch.zeros(3, 2),
    "wrong type": torch.ones(2, dtype=torch.bool),
    "not finite": np.nan,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_content(script, monkeypatch, tmp_path):
    """A whole file with something wrong in it, to --resume and to --evaluate: nothing is written.

    A network that does not fit is refused in one sentence; no damage leaves the rest like this.
    """
    whole = trained(script)
    parts = {}
    for path in places(whole):  # as many from each part of a checkpoint
        parts.setdefault(path[0], []).append(path)
    file = tmp_path / "run" / "checkpoint_8.pt"
    file.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    # Made when all has been read
    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", accept)
    reset = {"--resume": lux.LuxVecEnv.reset, "--evaluate": accept}

    @examples(50)
    @given(st.one_of(*map(st.sampled_from, parts.values())), st.sampled_from(["dropped", *WRONG]))
    def check(path, change):
        content = copy.deepcopy(whole)
        *outer, last = path
        inner = functools.reduce(lambda part, key: part[key], outer, content)
        if change == "dropped":
            del inner[last]
        else:
            inner[last] = WRONG[change]
        torch.save(content, file)
        before = file.read_bytes()
        codes = (2,) if outer and path[0] == "model" else (1, 2)
        for flag in ("--resume", "--evaluate"):
            monkeypatch.setattr(lux.LuxVecEnv, "reset", reset[flag])
            accepted = start(script, flag, "run", "--num-workers", "0", codes=codes)
            COUNT[f"{flag} accepted" if accepted else f"{flag} refused"] += 1
            assert os.listdir() == ["run"] and os.listdir("run") == [file.name]
        assert file.read_bytes() == before

    torch.save(whole, file)
    assert start(script, "--resume", "run", "--num-workers", "0")  # unchanged, nothing is wrong with it
    check()


# ---------- Observations ----------

TIMES = {"night": 45, "last step": 999}
SITUATIONS = ["no power", "full", "thirst", "riches", "lichen", "rubble", "bare", "edges", *TIMES]


def fill(entity, amount):
    """Give a robot or factory this much of everything."""
    for name in ("ice", "ore", "water", "metal"):
        setattr(entity.cargo, name, amount)


def bring_about(engine, rng, situations, robots, dead):
    """Change the engine's state: `robots` per team, `dead` factories by team (None: all), situations."""
    state, board = engine.state, engine.state.board
    for team, number in dead.items():
        for factory in list(state.factories[lux.PLAYERS[team]].values())[:number]:
            engine.destroy_factory(factory)
    taken = board.factory_occupancy_map != -1
    cells = rng.permutation(np.argwhere(~taken))
    if "edges" in situations:
        inside = ((cells > 0) & (cells < board.width - 1)).all(1)
        cells = cells[np.argsort(inside, kind="stable")]
    for number in range(2 * robots):
        team = state.teams[lux.PLAYERS[number % 2]]
        engine.add_unit(team, rng.choice([UnitType.LIGHT, UnitType.HEAVY]), cells[number])
    units, factories = entities(state)
    for unit in units:
        kind = int(unit.is_heavy())
        low, high = (-1, 0) if "no power" in situations else (0, 1)
        unit.power = int(rng.integers(low * lux.BATTERY[kind], high * lux.BATTERY[kind] + 1))
        if "full" in situations:
            fill(unit, int(lux.CARGO[kind]))
    for factory in factories:
        if "riches" in situations:
            factory.power = 10**6
            fill(factory, 10**6)
        if "thirst" in situations:
            factory.cargo.water = 0
    if "rubble" in situations:
        board.rubble[:] = np.where(taken, 0, 100)
    if "bare" in situations:
        board.rubble[:] = 0
    if "lichen" in situations and factories:
        strains = [factory.num_id for factory in factories]
        board.rubble[:] = 0
        board.lichen[:] = np.where(taken, 0, rng.integers(1, 101, taken.shape))
        board.lichen_strains[:] = np.where(taken, -1, rng.choice(strains, taken.shape))
    for situation in [name for name in situations if name in TIMES]:
        state.env_steps += TIMES[situation] - state.real_env_steps
        engine.env_steps = state.env_steps


@examples(60)
@given(
    game=one_of_each(**GAMES | {"max_robots": [1, 12, 40], "group_by": GROUP_BY}),
    seed=st.integers(0, 2**31),
    situations=st.lists(st.sampled_from(SITUATIONS), unique=True, max_size=4),
    share=st.sampled_from([0, 1]),
    dead=st.dictionaries(st.integers(0, 1), st.sampled_from([1, None])),
)
def test_observations(game, seed, situations, share, dead):
    """From any observation: arrays within their spaces, an action for each, orders that are accepted."""
    options = lux.checked_options(**game)
    match = lux.LuxMatch(options, lux.REWARDS, {"validate_action_space": True})
    encoder, engine = lux.LuxEncoder(options), match.engine
    first = match.reset(seed % 8)
    encoder.reset(first)
    encoder.encode([lux.read_observation(first)])
    rng = np.random.default_rng(seed)
    bring_about(engine, rng, situations, share * options.max_robots, dead)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        obs, view = encoder.encode([lux.read_observation(engine.state.get_obs())])
        (orders,), _ = encoder.orders(view, masked_random(rng, obs["action_mask"]))
    seen = {key: array[0] for key, array in obs.items()}
    assert lux.single_spaces(options)[0].contains(seen)
    assert np.isfinite(seen["features"]).all()
    assert (seen["action_mask"].any(-1) == (seen["kind"] > 0)).all()
    for kind, player, order in zip(seen["kind"], lux.PLAYERS, orders):
        state = engine.state
        assert (kind > 0).sum() == len(state.units[player]) + len(state.factories[player])
        assert engine.action_space(player).contains(order)[0]

    weak = weak_robots(engine.state)

    def see(entity, order, passed):
        assert passed or entity.unit_id in weak, order

    with mock.patch.object(luxai_s2.env, "validate_actions", watched_validator(see)):
        engine.step(dict(zip(lux.PLAYERS, orders)))
    COUNT["observations"] += 1


def test_enough_was_tried():
    """At least 300 malformed inputs were refused by the tests above, of each kind many."""
    refused = {kind: number for kind, number in COUNT.items() if "refused" in kind}
    assert len(refused) == 4 and min(refused.values()) > 10, COUNT
    assert sum(refused.values()) >= 300 and COUNT["flags accepted"] > 20, COUNT
    assert COUNT["observations"] >= 60
