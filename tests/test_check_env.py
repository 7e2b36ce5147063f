"""The contract checker of examples/: it names what an environment breaks, and nothing else."""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_env
from check_env import ARRAYS, Checker, check_env
from helpers import entities
from toy_env import COLOURS, LENGTH, SIZE, ToyVecEnv

import lux_wrapper as lux

ROOT = Path(__file__).resolve().parent.parent
RESULT = ("obs", "rewards", "terminated", "truncated", "infos")


class Toy(ToyVecEnv):
    """The toy that counts its steps, and remembers what it showed and who lived before."""

    steps = 0

    def _observe(self):
        self.obs = super()._observe()
        return self.obs

    def step(self, actions):
        self.steps += 1
        self.before = self.live
        return super().step(actions)


def changed(method, change, base=Toy):
    """A toy whose method returns `change(env, result)` of its usual result."""

    def call(env, *args, **options):
        return change(env, getattr(base, method)(env, *args, **options))

    return type("Changed", (base,), {method: call})


def built(**attributes):
    """A toy with other attributes."""
    return changed("__init__", lambda env, _: env.__dict__.update(attributes))


def space(**other):
    """A toy with another space of one array; bounds do not matter."""
    spaces = dict(Toy(1).single_observation_space)
    spaces |= {key: gym.spaces.Box(0, 1, shape) for key, shape in other.items()}
    return built(single_observation_space=gym.spaces.Dict(spaces))


def shown(key, change):
    """A toy whose array `key` is `change(env, x)` in every observation."""
    return changed("_observe", lambda env, obs: obs | {key: change(env, obs[key])})


def stepped(name, change, base=Toy):
    """A toy in which `change(env, x)` replaces one part of what a step returns."""

    def replaced(env, parts):
        parts = dict(zip(RESULT, parts))
        parts[name] = change(env, parts[name])
        return tuple(parts.values())

    return changed("step", replaced, base)


def put(key, live, value):
    """A toy that shows `value` in the first slot that is live, or empty."""

    def written(env, x):
        x[tuple(np.argwhere(env.live == live)[0])] = value
        return x

    return shown(key, written)


def listed(x):
    return x.tolist()


def without_close():
    """An environment that has what the toy has, except for close."""
    hidden = Toy(3)
    return type("Shy", (), {**vars(hidden), "metadata": Toy.metadata, "reset": hidden.reset, "step": hidden.step})()


class NoSeed(Toy):
    def reset(self):
        return super().reset(seed=1)


def episode(key, change):
    """A toy that changes a metric of finished matches."""

    def written(env, infos):
        if infos:
            infos["episode"][key] = change(infos["episode"][key])
        return infos

    return stepped("infos", written)


def without(key):
    return lambda env, mapping: {k: x for k, x in mapping.items() if k != key}


def noise(x):
    """A board that no seed decides."""
    return np.random.default_rng().integers(0, 100, x.shape, np.uint8)


# Its matches end by a time limit, and it does not show their last observation
Unfinished = changed("step", lambda env, x: (*x[:2], x[3], x[2], x[4]))


class Truncated(Unfinished):
    """The same with one, which is not that of the next match."""

    def step(self, actions):
        *others, infos = super().step(actions)
        last = {key: x[:, ::-1].copy() for key, x in self.obs.items()}
        return *others, infos and infos | {"final_obs": last}


class Alike(Toy):
    """All its matches are the first one."""

    def _observe(self):
        self.live[:] = self.live[:1]
        obs = super()._observe()
        self.colour[:] = self.colour[:1]
        return {key: np.repeat(x[:1], self.num_envs, 0) for key, x in obs.items()}


class Fixed(Toy):
    """Every seed begins the same matches."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=1)


class SecondKind(Toy):
    """Its kinds do not begin with 1."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.single_observation_space.spaces["kind"] = gym.spaces.Box(0, 2, (2, 16), np.int64)

    def _observe(self):
        obs = super()._observe()
        return obs | {"kind": 2 * obs["kind"]}


class Squads(Toy):
    """Groups of four, numbered from 14 on, where the scripts ask for them."""

    def __init__(self, *args, group_by="entity", **options):
        super().__init__(*args, **options)
        self.group_by = group_by

    def _observe(self):
        obs = super()._observe()
        return obs | {"group": obs["group"] // 4 + 14} if self.group_by == "squad" else obs


def drawn(picture):
    """A toy that says it has pictures, and returns this one."""

    class Drawn(Toy):
        metadata = Toy.metadata | {"render_modes": ["rgb_array"]}

        def __init__(self, *args, render_mode=None, **options):
            super().__init__(*args, **options)

        def render(self):
            return picture

    return Drawn


class Impatient(Toy):
    """A slot whose worker has left is another's at once, as the identities tell."""

    def reset(self, **options):
        self.ids = np.zeros(self.shape, int)
        return super().reset(**options)

    def step(self, actions):
        result = super().step(actions)
        left = self.before & ~self.live & ~result[2][:, None, None]
        self.live |= left
        self.ids += left
        result[0]["kind"][:] = self.live
        return result


class Identified(Impatient):
    def entity_ids(self):
        return self.ids


class Immortal(Impatient):
    """Nobody leaves, and the identities show it."""

    def entity_ids(self):
        return 0 * self.ids


class Kept(Toy):
    """The toy with state() and load_state()."""

    def state(self):
        everything = np.frombuffer(pickle.dumps(vars(self)), np.uint8)
        return [{"everything": everything}] * self.num_envs

    def load_state(self, state):
        vars(self).update(pickle.loads(state[0]["everything"]))
        return self.obs, {}


def lacking(*gone):
    """A toy without these arrays."""

    class Lacking(Toy):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            spaces = self.single_observation_space.items()
            self.single_observation_space = gym.spaces.Dict({k: x for k, x in spaces if k not in gone})

        def _observe(self):
            return {key: x for key, x in super()._observe().items() if key not in gone}

    return Lacking


NO_BOARD = lacking("board", "position")


def forget(env, result):
    env.colour = (env.colour + 1) % COLOURS
    return result


class Nosy(Toy):
    """The actions of empty slots decide what comes next."""

    def step(self, actions):
        number = int(actions[~self.live].sum())
        self.rng = np.random.default_rng([self.rng.integers(2**31), number])
        return super().step(actions)


class Worn(Toy):
    """Its third match begins in another way."""

    matches = 0

    def reset(self, **options):
        self.matches += 1
        obs, infos = super().reset(**options)
        return obs | {"board": obs["board"] // np.uint8(1 + (self.matches == 3))}, infos


BROKEN = [
    ("single_observation_space must have both board and position, or neither", lacking("board")),
    ("the call with (3, num_workers=0, group_by='entity', first_match=0)", lambda num_envs: Toy(num_envs)),
    ("the call with", partial(Toy, sise=8)),
    (
        "the call with (3, num_workers=0, first_match=0) and",
        lambda num_envs, *, group_by, **options: Toy(num_envs, group_by=group_by, **options),
    ),
    ("there must be a method close", lambda num_envs, **_: without_close()),
    ("reset must return a tuple of two", changed("reset", lambda env, x: x[0])),
    ("reset(seed=1) must not fail, and raised TypeError: NoSeed.reset() got an unexpected", NoSeed),
    ("reset(seed=1) must not fail, and raised KeyError", changed("reset", lambda env, x: {}["there"])),
    ("step(actions) must not fail, and raised ZeroDivisionError", changed("step", lambda env, x: 1 // 0)),
    ("step(actions) must not fail, and raised SystemExit: 3 (", changed("step", lambda env, x: sys.exit(3))),
    ("close() must not fail, and raised FileNotFoundError", changed("close", lambda env, x: open("/no/such/file"))),
    ("step must return a tuple of five", changed("step", lambda env, x: x[:4])),
    ("step must return a tuple of five", changed("step", lambda env, x: None)),
    ("num_envs must be the number", changed("__init__", lambda env, _: env.__dict__.pop("num_envs") and None)),
    (
        "single_observation_space must be",
        changed("__init__", lambda env, _: vars(env).pop("single_observation_space") and None),
    ),
    ("an observation must be a dict", changed("_observe", lambda env, obs: list(obs.values()))),
    ("board must be a NumPy array, not a list", shown("board", lambda env, x: listed(x))),
    ("kind must be a NumPy array, not a Tensor", shown("kind", lambda env, x: torch.from_numpy(x))),
    ("extra must be a NumPy array, not a str", changed("_observe", lambda env, obs: obs | {"extra": "text"})),
    ("rewards must be a NumPy array, not a list", stepped("rewards", lambda env, x: listed(x))),
    ("rewards must be a NumPy array, not a float", stepped("rewards", lambda env, x: 1.0)),
    ("terminated must be a NumPy array, not a list", stepped("terminated", lambda env, x: listed(x))),
    ("truncated must be a NumPy array, not a bool", stepped("truncated", lambda env, x: False)),
    ("truncated must be an array of N bools", stepped("truncated", lambda env, x: x[:1])),
    ("infos must be a dict, not a NoneType", stepped("infos", lambda env, x: None)),
    ("infos must be a dict, not a list", stepped("infos", lambda env, x: [{}] * 3)),
    ('infos["_episode"] must be true', stepped("infos", lambda env, x: x | {"_episode": [True]})),
    ('infos["episode"] must hold "l", "r"', stepped("infos", lambda env, x: x and x | {"episode": [1, 2, 3]})),
    ('infos["episode"] must hold "l", "r"', episode("l", lambda length: "ten")),
    ('infos["episode"] must hold "l", "r"', episode("l", lambda length: 10)),
    ('infos["episode"]["l"] must be the steps', episode("l", lambda length: length[:, None])),
    (
        'infos["final_obs"] must be a dict',
        stepped("infos", lambda env, x: x and x | {"final_obs": env.obs["board"]}, Truncated),
    ),
    (
        "group must be in 0 to E - 1",
        stepped("infos", lambda env, x: x and x | {"final_obs": env.obs | {"group": env.obs["group"] + 9}}, Truncated),
    ),
    ("num_envs must be the number", built(num_envs=7)),
    ("single_observation_space must be a Dict", built(single_observation_space=None)),
    ("single_action_space must be", built(single_action_space=gym.spaces.Discrete(COLOURS))),
    ('metadata["name"]', built(metadata={})),
    ("the space of board", space(board=(2, SIZE, SIZE))),
    ("the space of features", space(features=(2, 15, COLOURS))),
    ("the space of position", space(position=(2, 16, 3))),
    ("the space of kind", space(kind=(1, 16))),
    ("the space of action_mask", space(action_mask=(2, 16, COLOURS + 1))),
    ("an observation must be a dict", changed("_observe", without("group"))),
    ("board must have the shape", shown("board", lambda env, x: x[0])),
    ("kind must be of type int64", shown("kind", lambda env, x: x.astype(np.int32))),
    ("board must be of type uint8", shown("board", lambda env, x: x.astype(np.float32))),
    ("action_mask must be of type bool", shown("action_mask", lambda env, x: x.astype(int))),
    ("kind must be 0 in an empty slot", put("kind", False, -1)),
    ("board must be in percent", shown("board", lambda env, x: x + 101)),
    ("position of an entity", put("position", True, [0, SIZE])),
    ("position of an entity", put("position", True, [SIZE, 0])),
    ("position of an entity", put("position", True, [0, -1])),
    ("position of an entity", put("position", True, [-1, 0])),
    ("group must be in 0 to E - 1", put("group", False, 16)),
    ("an entity must have an action", put("action_mask", True, False)),
    ("features of an entity must be finite", put("features", True, np.nan)),
    ("features must stay within the bounds", put("features", True, 2)),
    ("kind must stay within the bounds", put("kind", True, 2)),
    (
        "a slot must be seen empty before another entity takes it, here its kind",
        shown("kind", lambda env, x: x * (1 + env.time[:, None, None] % 2)),
    ),
    ("rewards must have the shape", stepped("rewards", lambda env, x: x.sum(-1))),
    ("rewards must be floating", stepped("rewards", lambda env, x: x.astype(int))),
    (
        "the reward of an entity must be",
        stepped("rewards", lambda env, x: np.where(env.before & (x == 0), np.nan, x)),
    ),
    ("terminated must be", stepped("terminated", lambda env, x: np.stack([x, x], -1))),
    ("truncated must be", stepped("truncated", lambda env, x: x.astype(int))),
    ('infos["_episode"] must be true', stepped("infos", without("_episode"))),
    ('infos["episode"] must hold "l", "r"', stepped("infos", without("episode"))),
    ('infos["episode"]["l"] must be the steps', episode("l", lambda length: length - 1)),
    ('infos["episode"]["r"] must be the sum', episode("r", lambda r: r / 2)),
    ('infos["episode"]["r"] must be finite', episode("r", lambda r: r * np.nan)),
    (
        "the same seed",
        changed("reset", lambda env, x: (x[0] | {"board": noise(x[0]["board"])}, {})),
    ),
    ("the same seed", shown("board", lambda env, x: noise(x) if env.time[0] == 1 else x)),
    ("the same seed", stepped("truncated", lambda env, x: x | (env.steps > 3 * LENGTH))),
    ("the same seed and actions must give the same matches, in an environment that has played too", Worn),
    ("actions of empty slots must not matter", Nosy),
    ("state must return a list", changed("state", lambda env, x: dict(enumerate(x)), Kept)),
    ("state must hold numbers", changed("state", lambda env, x: [{"rng": env.rng.bit_generator.state}] * 3, Kept)),
    ("state must hold numbers", changed("state", lambda env, x: [{"number": 2**100}] * 3, Kept)),
    ("after load_state", changed("load_state", forget, Kept)),
    ("a slot must be seen empty before another entity takes it, here its entity", Identified),
    ("entity_ids must return an array [N, P, E]", changed("entity_ids", lambda env, x: x[0], Identified)),
    ("render must return N pictures", drawn(np.zeros((8, 9, 3), np.uint8))),
    ("render must return N pictures", drawn([np.zeros((8, 9), np.uint8)] * 3)),
    ("render must return N pictures", drawn([np.zeros((8, 9, 3))] * 3)),
    ("render must return N pictures", drawn([np.zeros((1, 8, 9, 3), np.uint8)] * 3)),
    ("render must return N pictures", drawn([np.zeros((8, 9, 3), np.uint8)] * 2)),
]


@pytest.mark.parametrize("clause, make_env", BROKEN)
def test_names_what_is_broken(clause, make_env):
    """An environment that breaks one clause gets one sentence, or few, and one is about it."""
    sentences = check_env(make_env, steps=3 * LENGTH)
    assert any(sentence.startswith(clause) for sentence in sentences), sentences
    assert len(sentences) <= 2


SILENT = [
    Toy,
    Kept,
    Truncated,
    Squads,
    Immortal,
    partial(ToyVecEnv, slots=1),
    NO_BOARD,
    drawn([np.zeros((8, 9, 3), np.uint8)] * 4),
]


@pytest.mark.parametrize("make_env", SILENT)
def test_silent_about_the_toy(make_env):
    checker = Checker(make_env, num_envs=4)
    checker.check(200)
    assert checker.problems == {} and checker.warnings == []


JUNK = [
    None,
    True,
    1,
    "text",
    [],
    {},
    (),
    object(),
    np.float32(1),
    np.array("a"),
    np.array([None] * 3),
    np.zeros((3, 1)),
]
ATTRIBUTES = "metadata num_envs single_observation_space single_action_space step state"
PLACES = {"reset": lambda junk: changed("reset", lambda env, x: (junk, {}))}
PLACES |= {key: partial(lambda key, junk: shown(key, lambda env, x: junk), key) for key in ARRAYS}
PLACES |= {name: partial(lambda name, junk: stepped(name, lambda env, x: junk), name) for name in RESULT}
PLACES |= {
    f"infos {key}": partial(lambda key, junk: stepped("infos", lambda env, x: x | {key: junk}, Unfinished), key)
    for key in ("_episode", "episode", "final_obs")
}
PLACES |= {f"episode {key}": partial(lambda key, junk: episode(key, lambda x: junk), key) for key in "lr"}
PLACES |= {f"env.{name}": partial(lambda name, junk: built(**{name: junk}), name) for name in ATTRIBUTES.split()}


@pytest.mark.parametrize("place", PLACES)
def test_junk_anywhere_is_no_traceback(place):
    """Whatever stands in the place of an array, a dict or a method, it is a broken clause in a sentence."""
    for junk in JUNK:
        assert check_env(PLACES[place](junk), steps=LENGTH), junk


def test_an_exception_has_its_line():
    """It is the last one in a person's own file, not in a library, and of the cause if there is one."""
    call = "np.concatenate([])"
    line = next(i for i, x in enumerate(Path(__file__).read_text().splitlines(), 1) if f"return {call}" in x)

    class Fails(Toy):
        def step(self, actions):
            return np.concatenate([])

    class Blames(Fails):
        def step(self, actions):
            try:
                return super().step(actions)
            except ValueError as error:
                raise ValueError(str(error)) from error

    raised = "ValueError: need at least one array to concatenate"
    sentence = f"step(actions) must not fail, and raised {raised} (test_check_env.py, line {line}) (step 1)"
    assert check_env(Fails) == check_env(Blames) == [sentence]


def test_what_is_not_deterministic_is_named_as_that():
    """Clauses that need the same play twice are not judged then, and neither are the seeds."""

    class Dice(Kept):
        def reset(self, *, seed=None, options=None):
            return super().reset()

    checker = Checker(Dice)
    checker.check(3 * LENGTH)
    (clause,) = checker.problems
    assert clause == "the same seed and actions must give the same matches: it is not deterministic"
    assert checker.warnings == []


def same(option):
    """A toy to which an option makes no difference."""
    return lambda num_envs, **options: Toy(num_envs, **{key: x for key, x in options.items() if key != option})


def few_actions():
    return gym.spaces.MultiDiscrete(np.where(np.arange(32).reshape(2, 16) == 3, 2, COLOURS))


@pytest.mark.parametrize(
    "sentence, make_env",
    [
        ("no match ended in 30 steps", changed("reset", lambda env, x: env.time.fill(-1000) or x)),
        ("features [2] are beyond 10 in size", shown("features", lambda env, x: x * np.float32([1, 1, 11, 1]))),
        (
            "features [0, 3] are always the same (2 in all)",
            shown("features", lambda env, x: x * np.float32([0, 1, 1, 0])),
        ),
        ("board never exceeds 1", shown("board", lambda env, x: x // 100)),
        ("first_match had no effect", same("first_match")),
        ("held_out had no effect", same("held_out")),
        ("the seed of reset had no effect", Fixed),
        ("the 3 matches were the same", Alike),
        ("--capture-video cannot draw: render() raised TypeError", drawn(None)),
        ("entities were born, but none died", Impatient),
        ("no entity of kind [1] was ever seen", SecondKind),
        ('matches were truncated without infos["final_obs"]', Unfinished),
        (
            'infos["final_obs"] is the first observation of the next match',
            stepped("infos", lambda env, x: x and x | {"final_obs": env.obs}, Unfinished),
        ),
        ("rewards were paid in slots that were empty", stepped("rewards", lambda env, x: x + (env.live & ~env.before))),
        (
            "rewards are up to 12.5 in size",
            stepped(
                "infos",
                lambda env, x: x and x | {"episode": x["episode"] | {"r": 200 * x["episode"]["r"]}},
                stepped("rewards", lambda env, x: 200 * x),
            ),
        ),
        ("some entities have fewer actions", built(single_action_space=few_actions())),
        ("no entity was ever alive", shown("kind", lambda env, x: env.live.fill(False) or x * 0)),
    ],
)
def test_warns(sentence, make_env):
    """A warning is no broken clause."""
    if "features" in sentence:  # the toy's space would be too narrow
        wide = gym.spaces.Box(-np.inf, np.inf, (2, 16, COLOURS), np.float32)
        make_env = changed(
            "__init__", lambda env, _: env.single_observation_space.spaces.update(features=wide), make_env
        )
    checker = Checker(make_env)
    checker.check(3 * LENGTH)
    assert checker.problems == {}
    assert any(warning.startswith(sentence) for warning in checker.warnings), checker.warnings
    assert len(checker.warnings) == 1 or "ever alive" in sentence, checker.warnings


def test_says_where():
    """A sentence ends with the first place and time."""
    third = np.arange(2)[:, None, None, None] == 1
    wrong = shown("board", lambda env, x: x + np.uint8(101 * (third & (env.time[0] == 3))))
    place = "(match 0, team 1, slot 0, step 3)"
    assert check_env(wrong)[0] == f"board must be in percent, 0 to 100 {place}"


def test_groups_of_its_own():
    """Those of another --group-by are checked when it is given."""
    assert check_env(Squads) == []
    assert check_env(Squads, group_by="squad")[0].startswith("group must be in 0 to E - 1")


class Lux(lux.LuxVecEnv):
    """The game, with a number for every entity of the engine in `ids`."""

    def _observations(self, obs):
        obs = super()._observations(obs)
        self.ids = np.full(self.kind.shape, -1)
        for index, match in enumerate(self.matches):
            for entity in sum(entities(match.engine.state), []):
                where = index, entity.team_id
                name, number = entity.unit_id.split("_")
                same = (self.kind[where] == lux.FACTORY) == (name == "factory")
                same &= (obs["position"][where] == entity.pos.pos).all(-1)
                self.ids[where][same] = number
        return obs

    def entity_ids(self):
        return self.ids


@pytest.mark.parametrize("group_by", ["entity", "cluster"])
def test_silent_about_lux(group_by):
    """Births, deaths, ends of matches and entities known by the engine's ids are all in order."""

    assert check_env(partial(Lux, max_robots=4), 250, num_envs=2, group_by=group_by) == []


def test_lengths_are_those_of_matches_that_ended(monkeypatch):
    monkeypatch.setattr(toy_env, "LENGTH", np.array([10, 12, 14]))
    checker = Checker(ToyVecEnv)
    checker.check(30)
    assert not checker.problems and checker.ended == {10, 12, 14}


def test_command(tmp_path):
    """It says in a line what came up, and ends with 1 and the sentences if a clause is broken."""

    def run(*args):
        command = [sys.executable, ROOT / "examples" / "check_env.py", *map(str, args)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert "Traceback" not in result.stderr
        return result.returncode, result.stdout + result.stderr

    toy = (ROOT / "examples/toy/toy_env.py").read_text()
    (tmp_path / "toy.py").write_text(toy)
    (tmp_path / "mine.py").write_text(toy.replace('"group": slot', '"group": slot + 1'))
    code, said = run("toy:ToyVecEnv")
    assert code == 0 and said.startswith("0 clauses broken; ")
    assert "60 ends of matches (0 truncated, all after 10 steps) in 200 steps of 3 matches" in said
    code, said = run("mine:ToyVecEnv", "--steps", "20")
    assert code == 1 and said.startswith("group must be in 0 to E - 1")
    code, said = run(ROOT / "examples/toy/toy_env.py:ToyVecEnv", "--steps", "5", "--env-kwargs", "slots", "4")
    assert code == 0 and said.startswith("warning: no match ended in 5 steps")
    code, said = run("toy:ToyVecEnv", "--group-by", "entity", "--env-kwargs", "group_by", "squad")
    assert code == 1 and "multiple values for keyword argument 'group_by'" in said
    code, said = run("toy:ToyVecEnv", "--env-kwargs", "sluts", "4")
    assert code == 1 and "unexpected keyword argument 'sluts'" in said
    (tmp_path / "typo.py").write_text("import gymnasium\n)")
    (tmp_path / "script.py").write_text("raise SystemExit(0)")
    code, said = run("toy:ToyVecEnv", "--steps", "0")
    assert code == 2 and said == "check_env.py: error: --steps and --num-envs must be at least 1\n"
    for wrong, why in (
        ("toy", "toy is no environment: name it my_env:MyVecEnv"),
        ("nowhere:ToyVecEnv", "nowhere cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("no/where.py:ToyVecEnv", "no/where.py cannot be imported: FileNotFoundError"),
        ("typo:ToyVecEnv", "typo cannot be imported: SyntaxError: unmatched ')' (typo.py, line 2)"),
        ("script:ToyVecEnv", "script cannot be imported: SystemExit: 0 (script.py, line 1)"),
        ("toy:VecToyEnv", "toy has no class or function VecToyEnv"),
        ("toy:SIZE", "toy has no class or function SIZE"),
    ):
        code, said = run(wrong)
        assert code == 2 and said.startswith(f"check_env.py: error: {why}") and said.count("\n") == 1
