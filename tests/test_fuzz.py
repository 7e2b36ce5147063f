"""Made-up input of every kind: it is refused with one sentence and exit code 2, or it works; nothing in between.

The examples are the same ones in every run. FUZZ_EXAMPLES=5000 tries other and more ones.
"""

import contextlib
import copy
import dataclasses
import io
import os
import runpy
import shutil
import sys
import typing
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import luxai_s2.env
import numpy as np
import pytest
import torch
from helpers import entities, in_process, judged, masked_random, weak_robots
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from luxai_s2.unit import UnitType

import global_ppo
import lux_wrapper as lux
import trajsep_ppo

LONGER = int(os.environ.get("FUZZ_EXAMPLES", 0))
FLAG_EXAMPLES = LONGER or 400
TRAINING_EXAMPLES = LONGER // 50 or 5
DAMAGE_EXAMPLES = LONGER or 120
CONTENT_EXAMPLES = LONGER // 5 or 100
OBSERVATION_EXAMPLES = LONGER // 5 or 60
REQUIRED_MALFORMED = 300

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [trajsep_ppo, global_ppo]
COUNT = Counter()  # what was tried, by kind


def examples(number):
    """Settings of a test with so many examples."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    options = {"deadline": None, "database": None, "derandomize": not LONGER, "suppress_health_check": checks}
    options["phases"] = [Phase.generate, Phase.shrink] if LONGER else [Phase.generate]
    return settings(max_examples=number, **options)


class Accepted(BaseException):
    """Raised where a program has read all that it was given and begins to work."""


def accept(*_, **__):
    raise Accepted


def outcome(function):
    """True if the function comes to an end or to `accept`; False if it refuses as it should."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Using a non-tuple sequence")  # a tensor where torch expects a dict
            warnings.filterwarnings("ignore", "The field `.*` is annotated with")  # a wrong type that does no harm
            function()
    except Accepted:
        return True
    except SystemExit as end:
        lines = said.getvalue().strip().splitlines()
        box = "full helptext" in said.getvalue()  # that of tyro
        assert end.code == 2 and (box or len(lines) == 1 and "error: " in lines[0]), (end.code, said.getvalue())
        return False
    return True


# ------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------

ODD = (
    "-1",
    "0",
    "-0.0",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 30,
    "9" * 5000,
    "many",
    "",
    " ",
    "None",
    "--",
    "0x10",
)
SIZES = ("1", "2", "4", "7", "16", "48", "64", "1000", "1000000", "1000000000000")


def values(kind):
    """Strategy: what may stand after a flag of this type, or nothing."""
    likely = {int: st.sampled_from(SIZES), float: st.sampled_from(("0", "0.5", "0.9", "1", "1e-3", "2"))}
    options = [st.sampled_from(ODD), st.text(st.characters(exclude_characters="\0"), max_size=6), st.none()]
    chosen = next((likely[part] for part in (kind, *typing.get_args(kind)) if part in (int, float)), None)
    if typing.get_origin(kind) is typing.Literal:
        chosen = st.sampled_from(typing.get_args(kind))
    return st.one_of(*([chosen] * 6 if chosen is not None else []), *options)


def flags(script):
    """Strategy: lists of arguments as from a command line."""
    pairs = [st.tuples(st.sampled_from(["--no-such-flag", "-x", "--seed=", "word"]), st.none())]
    for field in dataclasses.fields(script.Args):
        name = field.name.replace("_", "-")
        if field.type is bool:
            pairs.append(st.tuples(st.sampled_from([f"--{name}", f"--no-{name}"]), st.none()))
        else:
            pairs.append(st.tuples(st.just(f"--{name}"), values(field.type)))
    command = st.lists(st.one_of(*pairs), min_size=1, max_size=4)
    return command.map(lambda chosen: [str(part) for pair in chosen for part in pair if part is not None])


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags(script, monkeypatch, tmp_path):
    """Any command line is refused, or describes a training that makes sense."""
    monkeypatch.chdir(tmp_path)

    @examples(FLAG_EXAMPLES // 2)
    @given(flags(script))
    def check(command):
        def start():
            runpy.run_path(str(ROOT / f"{script.__name__}.py"), run_name="__main__")

        with mock.patch.object(sys, "argv", ["script.py", *command]):
            accepted = outcome(start)
        COUNT["flags accepted" if accepted else "flags refused"] += 1
        assert accepted or not list(tmp_path.iterdir())
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)

    monkeypatch.setattr(lux, "LuxVecEnv", accept)
    check()


@st.composite
def small_trainings(draw):
    """Strategy: flags of trainings of one or two updates, at the edges of what is allowed."""
    minibatches, fewest = draw(st.sampled_from([1, 2])), draw(st.integers(1, 10))
    options = {
        "num_envs": draw(st.integers(1, 2)),
        "num_steps": minibatches * draw(st.integers(1, 2)),
        "num_minibatches": minibatches,
        "map_size": draw(st.integers(24, 64)),
        "min_factories": fewest,
        "max_factories": draw(st.integers(fewest, 10)),
        "max_robots": draw(st.sampled_from([1, 2, 40])),
        "update_epochs": draw(st.integers(1, 2)),
        "seed": draw(st.sampled_from([0, 2**32 - 1])),
        "num_workers": 0,
    }
    for name in ("safe_masks", "norm_adv", "anneal_lr", "anneal_ent"):
        options[name] = draw(st.booleans())
    for name in ("gamma", "gae_lambda", "ent_coef", "vf_coef", "target_kl"):
        options[name] = draw(st.sampled_from([0.0, 1.0]))
    for name in ("learning_rate", "clip_coef", "max_grad_norm", "positive_reward_weight"):
        options[name] = draw(st.sampled_from([1e-8, 1.0]))
    own = {
        "agent_reward_weight": draw(st.sampled_from([0.0, 1.0])),
        "group_by": draw(st.sampled_from(["entity", "cluster", "mod-1", "kinds", "nearest-heavy"])),
        "shared": tuple(draw(st.sets(st.sampled_from(["critic", "ratio", "entropy", "dones"])))),
        "top_by": draw(st.sampled_from(["advantage", "abs-advantage", "return", "random"])),
    }
    own["top_samples"] = 0 if "critic" in own["shared"] else draw(st.integers(0, 3))
    options["total_timesteps"] = options["num_envs"] * options["num_steps"] * draw(st.integers(1, 2))
    return options, own


@pytest.mark.parametrize("script", SCRIPTS)
def test_small_trainings(script, tmp_path):
    """What is allowed works, up to a checkpoint of finite numbers."""

    @examples(TRAINING_EXAMPLES)
    @given(small_trainings())
    def check(drawn):
        options, own = drawn
        args = script.Args(**options, **(own if script is trajsep_ppo else {}))
        with mock.patch.object(sys, "argv", ["script.py"]):
            script.check_args(args)
        run_dir = tmp_path / f"run{COUNT['trainings']}"
        run_dir.mkdir()
        assert outcome(lambda: script.train(args, str(run_dir), torch.device("cpu")))
        _, checkpoint, _ = script.load_checkpoint(run_dir)
        assert checkpoint["global_step"] == args.total_timesteps
        COUNT["trainings"] += 1

    check()


# ------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Function script -> path of the checkpoint of a real run of two updates of 4 steps."""
    paths = {}

    def train(script):
        if script not in paths:
            folder = tmp_path_factory.mktemp(script.__name__)
            sizes = {"num_envs": 1, "num_steps": 4, "num_minibatches": 2, "total_timesteps": 8, "max_robots": 3}
            args = script.Args(**sizes, num_workers=0, save_every=1)
            assert outcome(lambda: script.train(args, str(folder), torch.device("cpu")))
            paths[script] = folder / "checkpoint_8.pt"
        return paths[script]

    return train


damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("flip"), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=3)),
    st.tuples(st.just("end"), st.lists(st.tuples(st.floats(0.98, 1), st.integers(0, 7)), min_size=1, max_size=3)),
    st.tuples(st.just("foreign"), st.binary(max_size=300)),
    st.tuples(st.just("zeros"), st.floats(0, 1, exclude_max=True)),
)


def damaged(content, damage):
    """The bytes of a file after the damage."""
    how, what = damage
    content = bytearray(content)
    if how == "cut":
        del content[int(what * len(content)) :]
    elif how == "foreign":
        return what
    elif how == "zeros":  # as of a block that never reached the disk
        start = int(what * len(content))
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    else:
        for place, bit in what:
            content[int(place * (len(content) - 1))] ^= 1 << bit
    return bytes(content)


def same(one, other):
    """Whether two checkpoints are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_damaged_files(trained, tmp_path):
    """A damaged file is refused, or not an important bit of it was hit; the one before it is used if there is one."""
    whole = trained(trajsep_ppo).read_bytes()
    content = torch.load(trained(trajsep_ppo), weights_only=True)
    (tmp_path / "checkpoint_4.pt").write_bytes(whole)
    (tmp_path / "checkpoint_best.pt").write_bytes(b"a file of somebody else")
    newest = tmp_path / "checkpoint_8.pt"

    @examples(DAMAGE_EXAMPLES)
    @given(damages)
    def check(damage):
        newest.write_bytes(damaged(whole, damage))
        files = {path: path.read_bytes() for path in tmp_path.iterdir()}
        loaded = []
        with mock.patch.object(sys, "argv", ["script.py"]):
            try:
                loaded.append(trajsep_ppo.load_checkpoint(newest))
            except trajsep_ppo.Refused as refusal:
                assert "\n" not in str(refusal)
            if loaded:
                assert same(loaded[0][1], content)
                COUNT["damage without effect"] += 1
            else:
                COUNT["damaged files refused"] += 1
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    path, checkpoint, _ = trajsep_ppo.load_checkpoint(tmp_path)
                assert path.name == "checkpoint_4.pt" and same(checkpoint, content)
                assert len(said.getvalue().strip().splitlines()) == 1
        assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}

    check()


def places(content, path=()):
    """Paths of all that is in a checkpoint, nested or not."""
    items = content.items() if isinstance(content, dict) else enumerate(content if isinstance(content, list) else ())
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


CHANGES = {
    "dropped": None,
    "nothing": lambda x: None,
    "text": lambda x: "text",
    "wrong size": lambda x: torch.cat([x, x], -1) if isinstance(x, torch.Tensor) and x.ndim else torch.zeros(3, 2),
    "wrong type": lambda x: x.to(torch.complex64) if isinstance(x, torch.Tensor) else torch.ones(2, dtype=torch.bool),
    "not finite": lambda x: (
        torch.full_like(x, np.nan) if isinstance(x, torch.Tensor) and x.is_floating_point() else np.nan
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_content(script, trained, monkeypatch, tmp_path):
    """A whole file with something wrong in it, to --resume and to --evaluate: refused, with nothing written."""
    whole = torch.load(trained(script), weights_only=True)
    kinds = {}
    for path in places(whole):  # as many from each part of a checkpoint
        kinds.setdefault(path[0], []).append(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", accept)  # made when all has been read
    reset = lux.LuxVecEnv.reset
    os.mkdir("run")

    def start():
        runpy.run_path(str(ROOT / f"{script.__name__}.py"), run_name="__main__")

    @examples(CONTENT_EXAMPLES // 2)
    @given(
        st.sampled_from(sorted(kinds)).flatmap(lambda part: st.sampled_from(kinds[part])),
        st.sampled_from(list(CHANGES)),
    )
    def check(path, change):
        if path[0] == "args" and change in ("wrong size", "wrong type"):
            return  # a tensor among the arguments is nothing that damage or another program would leave there
        content = copy.deepcopy(whole)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        if change == "dropped":
            del inner[path[-1]]
        else:
            inner[path[-1]] = CHANGES[change](inner[path[-1]])
        torch.save(content, "run/checkpoint_8.pt")
        before = Path("run/checkpoint_8.pt").read_bytes()
        for flag in ("--resume", "--evaluate"):
            monkeypatch.setattr(lux.LuxVecEnv, "reset", reset if flag == "--resume" else accept)
            with mock.patch.object(sys, "argv", ["script.py", flag, "run", "--num-workers", "0"]):
                COUNT[f"{flag} accepted" if outcome(start) else f"{flag} refused"] += 1
            assert os.listdir() == ["run"] and os.listdir("run") == ["checkpoint_8.pt"]
        assert Path("run/checkpoint_8.pt").read_bytes() == before

    torch.save(whole, "run/checkpoint_8.pt")
    with mock.patch.object(sys, "argv", ["script.py", "--resume", "run", "--num-workers", "0"]):
        assert outcome(start)  # nothing is wrong with the one that was not changed
    check()
    shutil.rmtree("run")


# ------------------------------------------------------------------------------------------------------
# Observations
# ------------------------------------------------------------------------------------------------------

SITUATIONS = ("no power", "debt", "full", "thirst", "riches", "lichen", "rubble", "bare", "edges", "last step", "night")


def bring_about(engine, rng, situations, robots, dead):
    """Change the engine's state: `robots` per team, the factories in `dead` gone, and the situations."""
    state = engine.state
    size, board = state.board.width, state.board
    for team, index in dead:
        player = lux.PLAYERS[team]
        for factory in list(state.factories[player].values())[: None if index is None else index]:
            engine.destroy_factory(factory)
    taken = board.factory_occupancy_map != -1
    cells = rng.permutation(np.argwhere(~taken))
    if "edges" in situations:
        cells = cells[np.argsort(~((cells == 0) | (cells == size - 1)).any(1), kind="stable")]
    cells = iter(cells)
    for player in lux.PLAYERS:
        for _ in range(robots):
            engine.add_unit(state.teams[player], rng.choice([UnitType.LIGHT, UnitType.HEAVY]), next(cells))
    units, factories = entities(state)
    for unit in units:
        heavy = int(unit.is_heavy())
        unit.power = int(rng.integers(0, lux.BATTERY[heavy] + 1))
        if "no power" in situations:
            unit.power = 0
        if "debt" in situations:
            unit.power = -int(rng.integers(1, 2 * lux.BATTERY[heavy]))
        if "full" in situations:
            unit.cargo.ice = unit.cargo.ore = unit.cargo.water = unit.cargo.metal = int(lux.CARGO[heavy])
    for factory in factories:
        if "thirst" in situations:
            factory.cargo.water = 0
        if "riches" in situations:
            factory.cargo.water = factory.cargo.metal = factory.cargo.ice = factory.power = 10**6
    strains = [factory.num_id for factory in factories]
    if "lichen" in situations and strains:
        board.rubble[:] = 0
        board.lichen[:] = np.where(taken, 0, rng.integers(1, 101, taken.shape))
        board.lichen_strains[:] = np.where(taken, -1, rng.choice(strains, taken.shape))
    elif "rubble" in situations:
        board.rubble[:] = np.where(taken, 0, 100)
    if "bare" in situations:
        board.rubble[:] = 0
    step = 999 if "last step" in situations else 45 if "night" in situations else None
    if step is not None:
        state.env_steps += step - state.real_env_steps
        engine.env_steps = state.env_steps


@examples(OBSERVATION_EXAMPLES)
@given(
    seed=st.integers(0, 2**31),
    situations=st.lists(st.sampled_from(SITUATIONS), unique=True, max_size=4),
    robots=st.sampled_from([0, 1, 12, 40]),
    dead=st.lists(st.tuples(st.integers(0, 1), st.sampled_from([1, None])), max_size=2, unique_by=lambda x: x[0]),
    map_size=st.sampled_from([24, 48, 64]),
    safe_masks=st.booleans(),
    group_by=st.sampled_from(["entity", "cluster"]),
)
def test_observations(seed, situations, robots, dead, map_size, safe_masks, group_by):
    """From any observation: arrays within their spaces, something to do for everybody, orders that are accepted."""
    rng, max_robots = np.random.default_rng(seed), max(robots, 1)
    options = {"map_size": map_size, "max_robots": max_robots, "safe_masks": safe_masks, "group_by": group_by}
    env, (match,) = in_process(1, engine_options={"validate_action_space": True}, **options)
    match.next_seed = lambda: seed % 8
    match.reset()
    engine, encoder = match.engine, lux.LuxEncoder(**options)
    out, rejected, validate = encoder.arrays(), [], luxai_s2.env.validate_actions
    encoder.reset(engine.state.get_obs())
    encoder.encode(engine.state.get_obs(), out)
    bring_about(engine, rng, situations, robots, dead)

    def watched(env_cfg, state, actions_by_type, verbose=1):
        accepted = validate(env_cfg, state, actions_by_type, verbose)
        rejected.extend(entity.unit_id for entity, _, passed in judged(accepted, actions_by_type) if not passed)
        return accepted

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(engine.state.get_obs(), out)
        assert env.single_observation_space.contains(out) and np.isfinite(out["features"]).all()
        teams = [{key: array[team] for key, array in out.items()} for team in range(2)]
        for team, (player, seen) in enumerate(zip(lux.PLAYERS, teams)):
            assert (seen["action_mask"].any(-1) == (seen["kind"] > 0)).all()
            state = engine.state
            assert (seen["kind"] > 0).sum() == len(state.units[player]) + len(state.factories[player])
        orders = encoder.orders(masked_random(rng, out["action_mask"]))
    for player, order in zip(lux.PLAYERS, orders):
        assert engine.action_space(player).contains(order)[0]
    weak = weak_robots(engine.state)
    with mock.patch.object(luxai_s2.env, "validate_actions", watched):
        engine.step(dict(zip(lux.PLAYERS, orders)))
    assert not set(rejected) - weak, rejected
    COUNT["observations"] += 1
    env.close()


def test_enough_was_tried():
    """At least 300 malformed inputs were refused by the tests above, of each kind many."""
    print(dict(COUNT))
    refused = {kind: number for kind, number in COUNT.items() if "refused" in kind}
    assert len(refused) == 4 and min(refused.values()) > 10, COUNT
    assert sum(refused.values()) >= REQUIRED_MALFORMED, COUNT
    assert COUNT["flags accepted"] > 20 and COUNT["observations"] >= OBSERVATION_EXAMPLES
