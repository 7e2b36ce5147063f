"""PettingZoo's games, and Gymnasium's with tuples, as environments: what a game does, and what the arrays show."""

import importlib
import re
import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from check_env import Checker
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence, Tuple

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES / "pettingzoo"), str(EXAMPLES / "gymnasium")]

from parallel_env import ParallelVecEnv  # noqa: E402
from tuple_env import as_parallel  # noqa: E402


class Arena:
    """A made-up game: ann and bob, one more in turn, and a time limit. `rules` replace what it has or gives."""

    possible_agents = ["ann", "bob", "cat"]
    metadata = {"name": "arena"}
    limit = 9
    observation_spaces = {
        "ann": Dict(place=Box(np.float32([-4, -0.5]), np.float32([8, 0.5])), mood=Discrete(3)),
        "bob": Box(0, 200, (4,), np.int64),
        "cat": Dict(observation=Box(-np.inf, np.inf, (1,)), action_mask=Box(0, 1, (2,), np.int8)),
    }
    action_spaces = {"ann": Discrete(3), "bob": Discrete(4, start=-1), "cat": Discrete(2)}

    def __init__(self, **rules):
        vars(self).update(rules)

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None):
        self.rng, self.time, self.agents, self.seeds = np.random.default_rng(seed), 0, ["ann", "bob"], seed
        return self.observe()

    def observe(self):
        """bob may not take his second action; cat, who comes at time 3, sees the time and takes turns."""
        self.shown = {"ann": {"place": np.float32([self.time - 4, 0.25]), "mood": self.time % 3}}
        self.shown |= {"bob": self.rng.integers(0, 201, 4)}
        self.shown |= {"cat": {"observation": np.float32([self.time]), "action_mask": np.arange(2) == self.time % 2}}
        return self.shown, {"bob": {"action_mask": [1, 0, 1, 1]}}

    def step(self, actions):
        assert sorted(actions) == sorted(self.agents) and all(x in self.action_spaces[a] for a, x in actions.items())
        self.actions, self.time = actions, self.time + 1
        paid = {"bob": 7.0} | {agent: 10.0 * action for agent, action in actions.items()}
        ended = {agent: False for agent in actions} | ({"bob": True} if self.time == 5 else {})
        cut = {agent: self.time == self.limit for agent in actions}
        coming = ["cat"] if self.time == 3 else ["bob"] if self.time == 7 else []
        self.agents = [x for x in actions if not (ended[x] or cut[x])] + coming * (self.time < self.limit)
        obs, infos = self.observe()
        return obs, paid, ended, cut, infos


def arena(num_envs=1, **options):
    """The environment, after reset."""
    env = ParallelVecEnv(num_envs, Arena, **options)
    return env, env.reset(seed=1)[0]


def first_allowed(obs):
    return obs["action_mask"].argmax(-1)


def test_slots_come_and_go():
    """Everyone has a slot by name; births, deaths and returns are seen, and the time limit is a truncation."""
    env, obs = arena(team=lambda agent: agent == "cat", kind=lambda agent: agent[0])
    assert env.single_action_space.shape == (2, 2) and env.metadata["name"] == "arena"
    seen, returns = [], np.zeros((1, 2))
    for time in range(1, 10):
        live = obs["kind"] > 0
        seen.append(obs["kind"][0].ravel().tolist())
        actions = first_allowed(obs)
        actions[0, 0, 1] = 2
        obs, rewards, terminated, truncated, infos = env.step(actions)
        game = env.games[0]
        expected = {"ann": 0, "bob": 1, "cat": (time - 1) % 2}
        assert time == 9 or game.actions == {x: expected[x] for x in game.actions}
        ann, bob, cat, nobody = rewards.ravel()
        assert (ann, bob, nobody) == (0, 10 if live[0, 0, 1] else 7, 0), (
            "7 is paid when bob is dead, and does not count"
        )
        assert cat == (10 * ((time - 1) % 2) if live[0, 1, 0] else 0)
        returns += np.where(live, rewards, 0).sum(-1)
        assert not terminated and bool(truncated) == (time == 9) == ("final_obs" in infos)
    assert seen == [[1, 2, 0, 0]] * 3 + [[1, 2, 3, 0]] * 2 + [[1, 0, 3, 0]] * 2 + [[1, 2, 3, 0]] * 2
    assert infos["_episode"] == infos["_final_obs"] == [True]
    assert infos["episode"]["l"] == [9] and (infos["episode"]["r"] == returns).all() and returns.all()
    final = infos["final_obs"]
    assert (final["kind"][0].ravel() == [1, 2, 3, 0]).all() and final["features"][0, 1, 0, 0] == 9
    assert (obs["kind"][0].ravel() == [1, 2, 0, 0]).all() and obs["features"][0, 0, 0, 0] == -0.5, "the next match"


def test_features_and_masks():
    """Flattened, divided by bounds beyond 1, padded with zeros, and with one-hots of kind and slot."""
    env, obs = arena(kind=lambda agent: agent == "ann")
    for _ in range(3):
        actions = first_allowed(obs)
        obs, *_ = env.step(actions)
    ann, bob, cat = obs["features"][0, 0]
    place, mood = [-1 / 8, 0.25], [1, 0, 0]
    assert ann.tolist() == [*place, *mood, 1, 0, 1, 0, 0]
    assert bob.tolist() == pytest.approx([*env.games[0].shown["bob"] / 200, 0, 0, 1, 0, 1, 0])
    assert cat.tolist() == [3, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    masks = [[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 0]]
    assert obs["action_mask"][0, 0].tolist() == masks and obs["action_mask"].dtype == bool


def test_clusters():
    """Of one kind, in each team."""
    options = {"team": lambda agent: agent == "cat", "kind": lambda agent: agent != "bob"}
    assert arena(group_by="cluster", **options)[1]["group"][0].tolist() == [[0, 1], [0, 0]]
    assert arena(group_by="cluster")[1]["group"][0].tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match="group_by must be entity or cluster, got clusters"):
        arena(group_by="clusters")
    assert arena()[1]["group"][0].tolist() == [[0, 1, 2]]


def test_ends_are_told_apart():
    """All dead: terminated. Some cut short at the end: truncated, and only they have a last observation."""
    last = {"ann": False, "bob": True}, {"ann": True, "bob": False}

    class Short(Arena):
        def step(self, actions):
            self.agents = [] if self.dead else self.agents  # some games leave them there
            return self.observe()[0], {}, dict.fromkeys(actions, True) if self.dead else last[0], last[1], {}

    for dead in (True, False):
        env = ParallelVecEnv(1, Short, dead=dead)
        obs, _ = env.reset(seed=1)
        obs, _, terminated, truncated, infos = env.step(first_allowed(obs))
        assert terminated == [dead] and truncated == [not dead]
        assert infos["final_obs"]["kind"][0, 0].tolist() == [int(not dead), 0, 0]


def test_seeds():
    """Match i has a seed of `seed`, first_match + i and how many were played; held-out ones are others."""

    def seeds(num_envs, seed=1, **options):
        env, found = ParallelVecEnv(num_envs, partial(Arena, limit=2), **options), []
        obs, _ = env.reset(seed=seed)
        for _ in range(4):
            found.append([game.seeds for game in env.games])
            for _ in range(2):
                obs, _, _, _, infos = env.step(first_allowed(obs))
            assert (infos["episode"]["l"] == 2).all() and (infos["episode"]["r"] == -20).all()
        return np.array(found).T

    all_seeds = seeds(4)
    assert len(np.unique(all_seeds)) == 16 and all_seeds.min() >= 2**20
    assert (seeds(4) == all_seeds).all() and (seeds(2, first_match=2) == all_seeds[2:]).all()
    assert not np.isin(seeds(4, seed=2), all_seeds).any()
    assert seeds(4, held_out=True).max() < 2**20 and len(np.unique(seeds(4, held_out=True))) == 16


def test_board_and_position():
    """Every team sees the board; before_reset comes before each match, and render_mode goes to the game."""
    begun, closed = [], []
    env, obs = arena(
        board=lambda game: np.full((3, 2, 1), 10 * game.time, np.uint8),
        position=lambda game, agent: (game.possible_agents.index(agent), game.time % 2),
        before_reset=begun.append,
        team=str,
        close=lambda: closed.extend(env.games),
        render_mode="rgb_array",
    )
    obs, *_ = env.step(first_allowed(obs))
    assert obs["board"].shape == (1, 3, 3, 2, 1) and (obs["board"] == 10).all()
    assert obs["position"][0, :2, 0].tolist() == [[0, 1], [1, 1]]
    env.close()
    assert begun == env.games == closed and env.games[0].render_mode == "rgb_array"


def spaces(**changed):
    return {"observation_spaces": Arena.observation_spaces | changed}


@pytest.mark.parametrize(
    "why, make, options",
    [
        ("make fails with the options {'hard': True}: KeyError", lambda hard: {}["map"], {"hard": True}),
        ("a new ParallelEnv at every call", partial(Arena, agent_iter=None), {}),
        ("a new ParallelEnv at every call", (lambda game: lambda: game)(Arena()), {}),
        ("with possible_agents", partial(Arena, possible_agents=None), {}),
        ("with possible_agents", lambda: gym.make("CartPole-v1"), {}),
        ("bob needs Discrete", partial(Arena, action_spaces=Arena.action_spaces | {"bob": Box(0, 1, (2,))}), {}),
        ("bob needs Discrete", partial(Arena, action_spaces=Arena.action_spaces | {"bob": MultiDiscrete([2])}), {}),
        ("ann needs Discrete actions, obs", partial(Arena, **spaces(ann=Sequence(Discrete(2)))), {}),
        ("cat needs Discrete actions, observations of a fixed size, a team", Arena, {"team": {"ann": 1, "bob": 2}.get}),
        ("bob needs Discrete actions, observations of a fixed size, a team", Arena, {"kind": {"ann": 1}.get}),
        ("board needs position", Arena, {"position": lambda game, agent: (0, 0)}),
        ("board needs position", Arena, {"board": lambda game: np.zeros((3, 3, 1), np.uint8)}),
        ("[H, W, C] of uint8", Arena, {"board": lambda game: np.zeros((3, 3, 1)), "position": str}),
        ("the spaces must be a Tuple", as_parallel(lambda: gym.make("CartPole-v1")), {}),
    ],
)
def test_games_that_do_not_fit(why, make, options):
    """One sentence, in time for the script to refuse."""
    with pytest.raises(ValueError) as caught:
        ParallelVecEnv(2, make, **options)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def stepping(change):
    """A game whose step is `change(game, parts)` of the usual observations, rewards, ended, cut and infos."""

    class Changed(Arena):
        def step(self, actions):
            return change(self, super().step(actions))

    return Changed


def put(part, agent, value):
    def change(game, parts):
        parts[part][agent] = value
        return parts

    return stepping(change)


def come(agent):
    return stepping(lambda game, parts: game.agents.append(agent) or parts)


MISFIT = "{} does not fit the agents and spaces of the game: "


@pytest.mark.parametrize(
    "why, make",
    [
        (MISFIT.format("ann") + "ValueError('a number that", put(0, "ann", {"place": [np.nan, 0], "mood": 0})),
        (MISFIT.format("ann") + "KeyError('mood')", put(0, "ann", {"place": [0, 0]})),
        (MISFIT.format("ann") + "IndexError", put(0, "ann", {"place": [0, 0], "mood": 3})),
        (MISFIT.format("ann"), put(0, "ann", None)),
        (MISFIT.format("ann"), stepping(lambda game, x: (*x[:4], None))),
        (MISFIT.format("bob") + "ValueError('cannot reshape array of size 3", put(0, "bob", [1, 2, 3])),
        (MISFIT.format("bob") + "ValueError('cannot reshape array of size 1", put(0, "bob", 7)),
        (MISFIT.format("bob"), put(0, "bob", [[1, 2], [3]])),
        (MISFIT.format("bob"), put(4, "bob", {"action_mask": [0] * 4})),
        (MISFIT.format("bob"), put(4, "bob", {"action_mask": [1] * 5})),
        (MISFIT.format("dog") + "KeyError('dog')", come("dog")),
        ("bob got the reward nan", put(1, "bob", np.nan)),
        ("bob got the reward [1 2]", put(1, "bob", np.array([1, 2]))),
        (
            "ann ended and is there again: it must be away",
            stepping(lambda game, x: x[2].update(ann=True) or game.agents.append("ann") or x),
        ),
    ],
)
def test_faults_in_play(why, make):
    """One sentence that names the agent."""
    env = ParallelVecEnv(2, make)
    obs, _ = env.reset(seed=1)
    with pytest.raises(RuntimeError) as caught:
        env.step(first_allowed(obs))
    assert str(caught.value).startswith(why) and "\n" not in str(caught.value)


class Duel(gym.Env):
    """A Gymnasium game of two, with tuples; it ends when both are told to stop, or by Gymnasium's time limit."""

    observation_space = Tuple([Box(0, 4, (2,)), Box(0, 1, (1,))])
    action_space = Tuple([Discrete(2), Discrete(3)])

    def reset(self, seed=None, options=None):
        return (np.float32([4, 2]), np.float32([1])), {}

    def step(self, actions):
        return self.reset()[0], [1, *actions][:2], [action == 1 for action in actions], False, {}


def test_tuples():
    """Parts of a tuple are agents, who end together."""
    make = as_parallel(lambda: gym.wrappers.TimeLimit(Duel(), 2))
    env = ParallelVecEnv(1, make)
    obs, _ = env.reset(seed=1)
    assert obs["features"][0, 0].tolist() == [[1, 0.5, 1, 0], [1, 0, 0, 1]]
    ends = [env.step(np.array([[actions]]))[1:4] for actions in ([1, 2], [0, 1], [0, 0], [1, 1])]
    assert [x[0][0, 0].tolist() for x in ends] == [[1, 1], [1, 0], [1, 0], [1, 1]]
    assert [(bool(x[1]), bool(x[2])) for x in ends] == [(False, False), (False, True), (False, False), (True, False)]
    game = make()
    game.reset()
    game.step({"agent_0": 1, "agent_1": 1})
    assert game.agents == []


def test_page():
    """The games of examples/README.md can be made from there, and what the page links to is there."""
    page = (EXAMPLES / "README.md").read_text()
    pytest.importorskip("pettingzoo.butterfly.knights_archers_zombies_v11", exc_type=ImportError)
    exec("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names := {})
    assert names["MyVecEnv"](2).reset(seed=1)[0]["kind"].tolist() == [[[1] * 4]] * 2
    assert names["scaled"]().possible_agents
    game = names["Scaled"](Arena())
    game.env.reset()
    assert game.step({"ann": 2, "bob": -1})[1] == {"ann": 2.0, "bob": -1.0}
    for target in re.findall(r"\]\(([^)#]+)", page):
        assert "://" in target or (EXAMPLES / target).exists(), target


GAMES = [  # module, name, its package, steps
    ("games", "KazVecEnv", "pettingzoo.butterfly.knights_archers_zombies_v11", 250),
    ("games", "PursuitVecEnv", "pettingzoo.sisl.pursuit_v5", 60),
    ("games", "SpreadVecEnv", "mpe2", 60),
    ("games", "TagVecEnv", "mpe2", 60),
    ("tuple_games", "RwareVecEnv", "rware", 60),
    ("tuple_games", "LbfVecEnv", "lbforaging", 60),
]


def test_foraging_is_cut_short():
    """Its time limit is a truncation, whose last observation is given; it ends by the rules when all is eaten."""
    pytest.importorskip("lbforaging", reason="needs examples/gymnasium/requirements.txt")
    env = importlib.import_module("tuple_games").LbfVecEnv(2)
    env.reset(seed=1)
    for step in range(50):
        _, _, terminated, truncated, infos = env.step(np.zeros((2, 1, 3), np.int64))
        assert not terminated.any() and truncated.tolist() == [step == 49] * 2
    assert infos["final_obs"]["kind"].all()
    for game in env.games:
        game.game.unwrapped.field[:] = 0
    _, _, terminated, truncated, _ = env.step(np.zeros((2, 1, 3), np.int64))
    assert terminated.all() and not truncated.any()


@pytest.mark.parametrize("module, name, package, steps", GAMES)
def test_games_keep_the_contract(module, name, package, steps):
    """All clauses in each of the games, and the seeds have an effect."""
    pytest.importorskip(package, reason=f"needs {package}: see requirements.txt in examples/", exc_type=ImportError)
    options = {"max_cycles": 40} if name == "PursuitVecEnv" else {}
    checker = Checker(partial(getattr(importlib.import_module(module), name), **options))
    checker.check(steps)
    assert checker.problems == {}
    expected = "features", "no match ended", "--capture-video cannot draw"  # the last without a screen
    assert all(warning.startswith(expected) for warning in checker.warnings)
