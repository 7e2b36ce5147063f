"""The contract checker of examples/: it names what an environment breaks, and is silent where nothing is broken."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from check_env import check_env
from toy_env import COLOURS, LENGTH, SIZE, ToyVecEnv

import lux_wrapper as lux

ROOT = Path(__file__).resolve().parent.parent


def shown(change):
    """A toy whose observations go through `change(env, obs)` first."""

    class Changed(ToyVecEnv):
        def _observe(self):
            obs = super()._observe()
            change(self, obs)
            return obs

    return Changed


def stepped(change):
    """A toy whose steps are `change(env, live, obs, rewards, terminated, truncated, infos)`; None leaves as it is."""

    class Changed(ToyVecEnv):
        def step(self, actions):
            live, result = self.live, super().step(actions)
            return change(self, live, *result) or result

    return Changed


def built(change):
    """A toy that `change(env)` has changed after it was built."""

    class Changed(ToyVecEnv):
        def __init__(self, num_envs):
            super().__init__(num_envs)
            change(self)

    return Changed


def put(key, where, value):
    """A change of an observation: `value` in array `key` where `where(env, obs)` says."""
    return shown(lambda env, obs: obs[key].__setitem__(where(env, obs), value))


def a_live_one(env, obs):
    return tuple(np.argwhere(env.live)[0])


def an_empty_one(env, obs):
    return tuple(np.argwhere(~env.live)[0])


def drop(mapping, key):
    return {k: x for k, x in mapping.items() if k != key}


def with_episode(**changes):
    """A toy whose infos of finished matches are changed by functions of (env, array)."""

    def change(env, live, obs, rewards, terminated, truncated, infos):
        if infos:
            infos["episode"] |= {key: do(env, infos["episode"][key]) for key, do in changes.items()}

    return stepped(change)


class Impatient(ToyVecEnv):
    """A slot whose worker has left is another's at once, as the identities tell."""

    def reset(self, **options):
        self.ids = np.zeros(self.shape, int)
        return super().reset(**options)

    def step(self, actions):
        live, result = self.live, super().step(actions)
        left = live & ~self.live & ~result[2][:, None, None]
        self.live = self.live | left
        self.ids = self.ids + left
        result[0]["kind"][:] = self.live
        return result


class Late(ToyVecEnv):
    """The last observation of a match is shown, and the next match begins a step later (NEXT_STEP autoreset)."""

    def reset(self, **options):
        self.ended = False
        self.obs, infos = super().reset(**options)
        return self.obs, infos

    def step(self, actions):
        rewards, false = np.zeros(self.shape, np.float32), np.zeros(self.num_envs, bool)
        if self.ended:
            self.ended = False
            return self.obs, rewards, false, false, {}
        self.obs, *others = super().step(actions)
        self.ended = bool(others[1].any())
        return self.obs, *others


class Kept(ToyVecEnv):
    """The toy with state() and load_state(): all of a match, and from then on other random numbers."""

    def _observe(self):
        self.obs = super()._observe()
        return self.obs

    def state(self):
        number = int(self.rng.integers(2**31))
        self.rng = np.random.default_rng(number)
        parts = {"time": self.time, "returns": self.returns, "live": self.live, "colour": self.colour, **self.obs}
        return [{"number": number, **{key: x[i] for key, x in parts.items()}} for i in range(self.num_envs)]

    def load_state(self, state):
        together = {key: np.stack([match[key] for match in state]) for key in state[0]}
        self.rng = np.random.default_rng(together.pop("number")[0])
        for key in ("time", "returns", "live", "colour"):
            setattr(self, key, together.pop(key))
        return together, {}


class Sparing(ToyVecEnv):
    """The toy in the same arrays at every step."""

    def _observe(self):
        seen = super()._observe()
        self.obs = getattr(self, "obs", seen)
        for key, x in self.obs.items():
            x[:] = seen[key]
        return self.obs


class Forgetful(Kept):
    def load_state(self, state):
        return super().load_state([{**match, "colour": (match["colour"] + 1) % COLOURS} for match in state])


class Unsorted(Kept):
    def state(self):
        return dict(enumerate(super().state()))


class Seedless(ToyVecEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset()


class Restless(ToyVecEnv):
    """Says at will, whatever the seed, that a match has ended, and goes on as if it had not."""

    def reset(self, **options):
        self.dice, self.since, self.sums = np.random.default_rng(), np.zeros(self.num_envs), np.zeros(self.shape[:2])
        return super().reset(**options)

    def step(self, actions):
        obs, rewards, *_ = super().step(actions)
        self.since, self.sums, over = self.since + 1, self.sums + rewards.sum(-1), self.dice.random(self.num_envs) < 0.2
        infos = {"_episode": over, "episode": {"l": self.since.copy(), "r": self.sums.copy()}}
        self.since[over], self.sums[over] = 0, 0
        return obs, rewards, over, np.zeros_like(over), infos


class Nosy(ToyVecEnv):
    """What is asked of nobody decides what comes next."""

    def step(self, actions):
        self.rng = np.random.default_rng([self.rng.integers(2**31), int(actions[~self.live].sum())])
        return super().step(actions)


def spaces(**changed):
    """A toy with other spaces."""

    def change(env):
        env.single_observation_space = gym.spaces.Dict({**env.single_observation_space, **changed})

    return built(change)


def noise(obs):
    """A board that no seed decides."""
    return np.random.default_rng().integers(0, 100, obs["board"].shape, np.uint8)


class Misty(ToyVecEnv):
    """The first board of all is another one whenever it is looked at."""

    def reset(self, **options):
        obs, infos = super().reset(**options)
        return {**obs, "board": noise(obs)}, infos


def next_kind(env, obs):
    obs["kind"][:] = env.live * (1 + env.time[:, None, None] % 2)


BROKEN = [
    ("num_envs must be the number", built(lambda env: setattr(env, "num_envs", env.num_envs + 1))),
    ("single_observation_space must be a Dict", built(lambda env: setattr(env, "single_observation_space", None))),
    (
        "single_action_space must be",
        built(lambda env: setattr(env, "single_action_space", gym.spaces.Discrete(COLOURS))),
    ),
    ("the space of board", spaces(board=gym.spaces.Box(0, 100, (2, SIZE, SIZE), np.uint8))),
    ("the space of features", spaces(features=gym.spaces.Box(0, 1, (2, 15, COLOURS), np.float32))),
    ("the space of position", spaces(position=gym.spaces.Box(0, 7, (2, 16, 3), np.int64))),
    ("the space of kind", spaces(kind=gym.spaces.Box(0, 1, (1, 16), np.int64))),
    ("the space of action_mask", spaces(action_mask=gym.spaces.MultiBinary((2, 16, COLOURS + 1)))),
    ("an observation must be a dict", shown(lambda env, obs: obs.pop("group"))),
    ("board must have the shape", shown(lambda env, obs: obs.update(board=obs["board"][0]))),
    ("kind must be of type int64", shown(lambda env, obs: obs.update(kind=obs["kind"].astype(np.int32)))),
    ("board must be of type uint8", shown(lambda env, obs: obs.update(board=obs["board"].astype(np.float32)))),
    (
        "action_mask must be of type bool",
        shown(lambda env, obs: obs.update(action_mask=obs["action_mask"].astype(int))),
    ),
    ("kind must be 0 in an empty slot", put("kind", an_empty_one, -1)),
    ("board must be in percent", put("board", lambda env, obs: (1, 0, 2, 3), 255)),
    ("position of an entity", put("position", a_live_one, [0, SIZE])),
    ("position of an entity", put("position", a_live_one, [SIZE, 0])),
    ("position of an entity", put("position", a_live_one, [0, -1])),
    ("position of an entity", put("position", a_live_one, [-1, 0])),
    ("group must be in 0 to E - 1", put("group", an_empty_one, 16)),
    ("an entity must have an action", put("action_mask", a_live_one, False)),
    ("features of an entity must be finite", put("features", a_live_one, np.nan)),
    ("features must stay within the bounds", put("features", a_live_one, 2)),
    ("kind must stay within the bounds", put("kind", a_live_one, 2)),
    ("rewards must have the shape", stepped(lambda env, live, obs, rewards, *rest: (obs, rewards.sum(-1), *rest))),
    ("rewards must be floating", stepped(lambda env, live, obs, rewards, *rest: (obs, rewards.astype(int), *rest))),
    (
        "the reward of an entity must be",
        stepped(lambda env, live, obs, rewards, *rest: (obs, np.where(live & (rewards == 0), np.nan, rewards), *rest)),
    ),
    (
        "a slot that was empty before",
        stepped(
            lambda env, live, obs, rewards, *rest: (obs, np.where(env.live & ~live, np.float32(1), rewards), *rest)
        ),
    ),
    (
        "terminated must be",
        stepped(lambda env, live, obs, rewards, over, *rest: (obs, rewards, np.stack([over, over], -1), *rest)),
    ),
    (
        "truncated must be",
        stepped(lambda env, live, obs, rewards, over, cut, infos: (obs, rewards, over, cut.astype(int), infos)),
    ),
    ("a slot must be seen empty before another entity takes it, here its kind", shown(next_kind)),
    ('metadata["name"]', built(lambda env: setattr(env, "metadata", {}))),
    (
        'infos["_episode"] must be true',
        stepped(lambda env, live, obs, rewards, over, cut, infos: (obs, rewards, over, cut, drop(infos, "_episode"))),
    ),
    (
        'infos["episode"] must hold "l", "r"',
        stepped(lambda env, live, obs, rewards, over, cut, infos: (obs, rewards, over, cut, drop(infos, "episode"))),
    ),
    ('infos["episode"]["l"] must be the steps', Late),
    ('infos["episode"]["r"] must be the sum', with_episode(r=lambda env, r: r / 2)),
    ('infos["episode"]["r"] must be finite', with_episode(r=lambda env, r: r * np.nan)),
    ("the same seed and actions", Seedless),
    ("actions of empty slots must not matter", Nosy),
    ("state must return a list", Unsorted),
    ("after load_state", Forgetful),
    ("the same seed and actions", Misty),
    ("the same seed and actions", shown(lambda env, obs: env.time[0] == 1 and obs.update(board=noise(obs)))),
    ("the same seed and actions", Restless),
]


@pytest.mark.parametrize("clause, make_env", BROKEN)
def test_names_what_is_broken(clause, make_env):
    """An environment that breaks one clause gets one sentence, or few, and the first is about it."""
    sentences = check_env(make_env, steps=3 * LENGTH)
    assert sentences and any(sentence.startswith(clause) for sentence in sentences)
    assert len(sentences) <= 2


@pytest.mark.parametrize("make_env", [ToyVecEnv, Kept, Sparing, lambda num_envs: ToyVecEnv(num_envs, slots=1)])
def test_silent_about_the_toy(make_env):
    assert check_env(make_env, num_envs=4) == []


def test_says_where():
    """A sentence ends with the first place and time: here the third step, in which the first match is shown wrong."""
    wrong = shown(lambda env, obs: obs["board"].__setitem__((0, 1), 101 * (env.time[0] == 3)))
    assert check_env(wrong)[0] == "board must be in percent, 0 to 100 (match 0, team 1, slot 0, step 3)"


def test_knows_entities_by_their_ids():
    """A slot that another entity takes at once looks like one that lives on, but for what identifies them."""
    assert check_env(Impatient) == []
    (sentence,) = check_env(Impatient, entity_ids=lambda env: env.ids)
    assert sentence.startswith("a slot must be seen empty before another entity takes it, here its entity changed")


def robots(env):
    """Who is in which slot of Lux: a number for every unit and factory of the engine."""
    ids = np.full(env.arrays["kind"].shape, -1)
    for index, match in enumerate(env.matches.matches):
        state = match.engine.state
        for team, player in enumerate(lux.PLAYERS):
            for owned in (state.units[player], state.factories[player]):
                for entity in owned.values():
                    where = (env.arrays["position"][index, team] == entity.pos.pos).all(-1)
                    kind = 1 if owned is state.factories[player] else 2 + entity.is_heavy()
                    slot = np.flatnonzero(where & (env.arrays["kind"][index, team] == kind))
                    ids[index, team, slot] = int(entity.unit_id.split("_")[1])
    return ids


@pytest.mark.parametrize("group_by", ["entity", "cluster"])
def test_silent_about_lux(group_by):
    """The game itself, with births, deaths, ends of matches and entities known by the engine's ids."""
    options = {"num_workers": 0, "max_robots": 4, "group_by": group_by}
    assert check_env(lambda num_envs: lux.LuxVecEnv(num_envs, **options), 250, num_envs=2, entity_ids=robots) == []


def test_command(tmp_path):
    """It says in a line what came up, and ends with 1 and the sentences if a clause is broken."""
    (tmp_path / "mine.py").write_text(
        "from toy_env import ToyVecEnv\n\n\nclass Mine(ToyVecEnv):\n"
        "    def _observe(self):\n        return {**super()._observe(), 'group': super()._observe()['group'] + 1}\n"
    )
    (tmp_path / "toy_env.py").write_text((ROOT / "examples" / "toy" / "toy_env.py").read_text())
    command = [sys.executable, str(ROOT / "examples" / "check_env.py")]
    result = subprocess.run([*command, "toy_env:ToyVecEnv"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("0 clauses broken; ")
    assert "60 ends of matches in 200 steps of 3 matches" in result.stdout
    result = subprocess.run([*command, "mine:Mine", "--steps", "20"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout.startswith("group must be in 0 to E - 1")
