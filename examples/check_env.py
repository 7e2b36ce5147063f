"""Does an environment keep the contract that the scripts rely on? Every clause that it breaks, named in a sentence.

    python examples/check_env.py my_env:MyVecEnv
    python examples/check_env.py path/to/my_env.py:MyVecEnv --steps 1000 --env-kwargs size 8 hard True

or in a test of your own:

    assert check_env(MyVecEnv) == []
    assert check_env(partial(MyVecEnv, size=8)) == []

It makes environments as the scripts do and plays random actions that the masks allow, so it finds what comes up in
such play; the command tells how many births, deaths and ends of matches there were. (What ends by a mere time limit
must be truncated.) Its warnings are about what breaks no clause, and hurts learning.

What it cannot see is who is in a slot: an entity that takes another's at once is found only where their kinds differ.
So an environment may have a method `entity_ids()` for it, which returns an array [N, P, E] of numbers that never come
twice in a match. N matches, P players (teams), E entity slots, A actions.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import tyro

# Axes of each array of an observation after [N, P], and its type
BOARD = {"board": ("HWC", np.uint8), "position": ("E2", np.int64)}  # a game may have neither
ARRAYS = {
    "features": ("EF", np.float32),
    "kind": ("E", np.int64),
    "group": ("E", np.int64),
    "action_mask": ("EA", np.bool_),
}
SAME = 50  # steps that are played again


def equal(x, y):
    """Where two arrays hold the same numbers; NaN is the same as NaN."""
    return (x == y) | ((x != x) & (y != y))


def agreement(obs, expected):
    """Where two observations are the same, an array for each key; what is in empty slots does not matter."""
    live = expected["kind"] > 0
    for key in expected:
        same = equal(obs[key], expected[key])
        yield same if key in ("board", "kind") else same.reshape(*live.shape, -1).all(-1) | ~live


def raised(error):
    """The type and message of an exception, and the last line of a person's own code that it came from."""
    cause = error.__cause__ or error
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if frame.filename != __file__]
    installed = "site-packages", sysconfig.get_path("stdlib"), "<"
    own = [frame for frame in frames if not any(path in frame.filename for path in installed)]
    places = [f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in own or frames]
    return f"{type(error).__name__}: {' '.join(str(error).split())}{''.join(places[-1:])}"


class Broken(Exception):
    """The arrays do not fit together, so nothing more can be checked."""


class Checker:
    """Makes environments and plays them.

    `problems` maps each broken clause to where it was first, `warnings` lists what hurts learning, `seen` counts what
    came up.
    """

    def __init__(self, make_env, num_envs=3, group_by="entity"):
        self.make_env, self.num_envs, self.group_by = make_env, num_envs, group_by
        self.problems, self.warnings, self.seen, self.time = {}, [], Counter(), 0
        self.kinds = set()
        self.ended = set()  # after how many steps matches did

    def expect(self, fine, clause, vital=False):
        """Note the clause as broken unless all of `fine`, a bool or an array [N, ...], [N, P, ...] or [N, P, E]."""
        fine = np.asarray(fine)
        if not fine.all():
            first = np.argwhere(~fine)[0] if fine.ndim else ()
            place = [f"{axis} {index}" for axis, index in zip(("match", "team", "slot"), first)]
            self.problems.setdefault(clause, ", ".join([*place, f"step {self.time}"]))
            if vital:
                raise Broken

    def warn(self, wrong, sentence):
        if wrong:
            self.warnings.append(sentence)

    @contextlib.contextmanager
    def doing(self, what):
        """Inside, an exception means that a clause is broken: that `what` does not fail."""
        try:
            yield
        except Broken:
            raise
        except (Exception, SystemExit) as error:  # an environment may raise anything, or end the program
            self.expect(False, f"{what} must not fail, and raised {raised(error)}", vital=True)

    def check(self, steps):
        """Everything; notes problems and warnings."""
        with contextlib.suppress(Broken), self.doing("what the environment returns"):
            self.check_all(steps)

    def check_all(self, steps):
        """The spaces, a long play, and short ones, which must be the same or not, as the seeds say."""
        env, rng = self.make(first_match=0), np.random.default_rng(0)
        self.check_spaces(env)
        self.identified = hasattr(env, "entity_ids")
        self.close(self.make(first_match=0, group_by=None))  # as global_ppo.py does
        start = self.reset(env)
        played = self.play(env, start, steps, rng)
        self.look_back()
        control, clause = self.make(first_match=0), "the same seed and actions must give the same matches"
        self.replay(control, self.reset(control), start, played, f"{clause}: it is not deterministic")
        self.close(control)
        if not any(problem.startswith(clause) for problem in self.problems):
            clause = f"{clause}, in an environment that has played too"
            self.replay(env, self.reset(env), start, played, clause)
            obs = self.reset(env)
            self.expect_alike(obs, start, clause)
            if clause not in self.problems:
                clause = "actions of empty slots must not matter"
                self.replay(env, obs, start, played, clause, change_empty=True)
            self.check_seeds(steps)
            if hasattr(env, "state"):
                self.check_state(env, rng)
        self.close(env)
        if "rgb_array" in env.metadata.get("render_modes", ()):
            self.check_render()

    def make(self, **options):
        """An environment as the scripts make one: for training with first_match, for evaluation with held_out."""
        options = {"num_workers": 0, "group_by": self.group_by, **options}
        options = {key: x for key, x in options.items() if x is not None}
        words = ", ".join(f"{key}={value!r}" for key, value in options.items())
        with self.doing(f"the call with ({self.num_envs}, {words}) and the options of --env-kwargs"):
            return self.make_env(self.num_envs, **options)

    def close(self, env):
        with self.doing("close()"):
            env.close()

    def check_spaces(self, env):
        """Expect what the scripts use to be there, and the two spaces of a match to fit together."""
        for name in ("reset", "step", "close"):
            self.expect(callable(getattr(env, name, None)), f"there must be a method {name}", vital=True)
        fits = getattr(env, "num_envs", None) == self.num_envs
        self.expect(fits, "num_envs must be the number of matches asked for", vital=True)
        metadata = getattr(env, "metadata", None)
        fits = isinstance(metadata, dict) and isinstance(metadata.get("name"), str)
        self.expect(fits, 'metadata["name"] must be the name of the game')
        space, actions = (getattr(env, f"single_{name}_space", None) for name in ("observation", "action"))
        fits = isinstance(space, gym.spaces.Dict) and set(ARRAYS) <= set(space)
        self.expect(fits, f"single_observation_space must be a Dict with {', '.join(ARRAYS)}", vital=True)
        fits = len(set(BOARD) & set(space)) != 1
        self.expect(fits, "single_observation_space must have both board and position, or neither", vital=True)
        self.arrays = ARRAYS | (BOARD if "board" in space.keys() else {})
        fits = isinstance(actions, gym.spaces.MultiDiscrete) and actions.nvec.ndim == 2
        self.expect(fits, "single_action_space must be a MultiDiscrete of shape [P, E]", vital=True)
        P, E = actions.nvec.shape
        self.space, self.sizes = space, {"E": E, "A": int(actions.nvec.max()), "2": 2}
        for key, (axes, _) in self.arrays.items():
            shape = space[key].shape or ()
            fits = shape[:1] == (P,) and len(shape) == 1 + len(axes)
            fits = fits and all(self.sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape[1:]))
            self.expect(fits, f"the space of {key} must have the shape [P, {', '.join(axes)}]", vital=True)
        self.possible = np.arange(self.sizes["A"]) < actions.nvec[..., None]
        self.low, self.high = (np.full(self.sizes["F"], x * np.inf, np.float32) for x in (1, -1))

    def reset(self, env, seed=1):
        """Start new matches, those of a seed; a copy of the first observation."""
        self.time, self.lengths = 0, np.zeros(self.num_envs, int)
        with self.doing(f"reset(seed={seed})"):
            result = env.reset(seed=seed)
        fits = isinstance(result, tuple) and len(result) == 2
        self.expect(fits, "reset must return a tuple of two, observation and infos", vital=True)
        obs = self.check_observation(result[0])
        self.returns = np.zeros(obs["kind"].shape[:2])
        return obs

    def expect_array(self, x, name):
        self.expect(isinstance(x, np.ndarray), f"{name} must be a NumPy array, not a {type(x).__name__}", vital=True)

    def check_observation(self, obs):
        """Expect an observation to be as it must be; returns a copy of its arrays."""
        fits = isinstance(obs, dict) and set(self.arrays) <= set(obs)
        self.expect(fits, f"an observation must be a dict with {', '.join(self.arrays)}", vital=True)
        for key, x in obs.items():
            self.expect_array(x, key)
        for key, (_, dtype) in self.arrays.items():
            fits = obs[key].shape == (self.num_envs, *self.space[key].shape)
            self.expect(fits, f"{key} must have the shape of its space with N in front", vital=True)
            self.expect(obs[key].dtype == dtype, f"{key} must be of type {np.dtype(dtype)}", vital=True)
        obs = {key: np.array(obs[key]) for key in self.arrays}
        live, group = obs["kind"] > 0, obs["group"]
        self.kinds |= set(obs["kind"][live].tolist())
        self.expect(obs["kind"] >= 0, "kind must be 0 in an empty slot and above 0 in others")
        if "board" in obs:
            x, y = np.moveaxis(obs["position"], -1, 0)
            inside = (0 <= x) & (x < self.sizes["H"]) & (0 <= y) & (y < self.sizes["W"])
            self.expect(obs["board"] <= 100, "board must be in percent, 0 to 100")
            self.expect(inside | ~live, "position of an entity must be a cell of the board, 0 to H - 1 and 0 to W - 1")
            self.seen["board"] = max(self.seen["board"], int(obs["board"].max()))
        self.expect((0 <= group) & (group < self.sizes["E"]), "group must be in 0 to E - 1, in empty slots too")
        self.expect(obs["action_mask"].any(-1) | ~live, "an entity must have an action that is not masked")
        self.expect(np.isfinite(obs["features"]).all(-1) | ~live, "features of an entity must be finite")
        for key, box in self.space.items():
            if key in obs and isinstance(box, gym.spaces.Box):
                outside = (obs[key] < box.low) | (obs[key] > box.high)
                outside = outside if key == "board" else outside.reshape(*live.shape, -1).any(-1) & live
                self.expect(~outside, f"{key} must stay within the bounds of its space")
        self.seen["entities"] += int(live.sum())
        self.seen["impossible"] += int((obs["action_mask"] & ~self.possible & live[..., None]).sum())
        self.low = obs["features"][live].min(0, initial=np.inf).clip(max=self.low)
        self.high = obs["features"][live].max(0, initial=-np.inf).clip(min=self.high)
        return obs

    def choose(self, obs, rng):
        """Random actions that are allowed, and any in empty slots."""
        allowed = obs["action_mask"] & self.possible | (obs["kind"] == 0)[..., None]
        return (rng.random(allowed.shape) * allowed).argmax(-1)

    def play(self, env, obs, steps, rng):
        """Play on at random; the first SAME steps as (actions, next observation, rewards, which matches ended)."""
        played = []
        for _ in range(steps):
            actions = self.choose(obs, rng)
            obs, rewards, over = self.step(env, obs, actions)
            played += [(actions, obs, rewards, over)] if len(played) < SAME else []
        return played

    def call_step(self, env, actions):
        self.time += 1
        with self.doing("step(actions)"):
            result = env.step(actions)
        fits = isinstance(result, tuple) and len(result) == 5
        clause = "step must return a tuple of five, observation, rewards, terminated, truncated and infos"
        self.expect(fits, clause, vital=True)
        return result

    def step(self, env, obs, actions):
        """One step, and all that can be said of it; copies of the next observation and the rewards, and who ended."""
        before = self.who(env)
        next_obs, rewards, terminated, truncated, infos = self.call_step(env, actions)
        self.seen["steps"] += 1
        live = obs["kind"] > 0
        self.expect_array(rewards, "rewards")
        self.expect(rewards.shape == live.shape, "rewards must have the shape [N, P, E]", vital=True)
        self.expect(rewards.dtype.kind == "f", "rewards must be floating-point numbers", vital=True)
        self.expect(np.isfinite(rewards) | ~live, "the reward of an entity must be finite")
        rewards = np.array(rewards)
        self.seen["reward"] = max(self.seen["reward"], np.abs(rewards[live]).max(initial=0))
        self.seen["lost rewards"] += int(((rewards != 0) & ~live).sum())
        for name, x in (("terminated", terminated), ("truncated", truncated)):
            self.expect_array(x, name)
            fits = x.shape == (self.num_envs,) and x.dtype == bool
            self.expect(fits, f"{name} must be an array of N bools, one for each match", vital=True)
        over = np.array(terminated | truncated)
        next_obs = self.check_observation(next_obs)
        self.expect(isinstance(infos, dict), f"infos must be a dict, not a {type(infos).__name__}", vital=True)
        self.check_episodes(infos, over, np.where(live, rewards, 0).sum(-1))
        if (limit := truncated & ~terminated).any():
            self.seen["truncations"] += int(limit.sum())
            if "final_obs" in infos:
                self.check_final(infos["final_obs"], next_obs, limit)
        next_live, goes_on = next_obs["kind"] > 0, ~over[:, None, None]
        stays = live & next_live & goes_on
        clause = "a slot must be seen empty before another entity takes it, here its {} changed"
        self.expect((next_obs["kind"] == obs["kind"]) | ~stays, clause.format("kind"))
        self.expect((before == self.who(env)) | ~stays, clause.format("entity"))
        self.seen["births"] += int((next_live & ~live & goes_on).sum())
        self.seen["deaths"] += int((live & ~next_live & goes_on).sum())
        return next_obs, rewards, over

    def who(self, env):
        """Who is in each slot [N, P, E], by `entity_ids`, or 0 where the environment cannot tell."""
        if not hasattr(env, "entity_ids"):
            return 0
        with self.doing("entity_ids()"):
            ids = np.array(env.entity_ids())
        P, E = self.possible.shape[:2]
        self.expect(ids.shape == (self.num_envs, P, E), "entity_ids must return an array [N, P, E]", vital=True)
        return ids

    def check_episodes(self, infos, over, paid):
        """Expect `infos` to say which matches ended, and of those what was counted here."""
        self.lengths, self.returns = self.lengths + 1, self.returns + paid
        told = np.asarray(infos.get("_episode", np.zeros_like(over)))
        clause = 'infos["_episode"] must be true for the matches that have just ended, and no others'
        self.expect(told.shape == over.shape, f"{clause}: N bools", vital=True)
        self.expect(told == over, clause)
        if over.any():
            N, episode = self.num_envs, infos.get("episode")
            with contextlib.suppress(AttributeError, TypeError, ValueError):  # what is no dict of numbers stays
                episode = {key: np.asarray(x, float) for key, x in episode.items()}
            fits = isinstance(episode, dict) and {"l", "r"} <= set(episode)
            fits = fits and all(np.shape(x)[:1] == (N,) for x in episode.values())
            self.expect(fits, 'infos["episode"] must hold "l", "r" and other metrics as arrays [N, ...]', vital=True)
            for key, x in episode.items():
                clause = f'infos["episode"]["{key}"] must be finite where a match has ended'
                self.expect(np.isfinite(x.reshape(N, -1)).all(1) | ~over, clause)
            clause = "must be the steps that were played; at an end the next match's first observation is returned"
            fits = episode["l"].shape == over.shape and (episode["l"] == self.lengths)
            self.expect(fits | ~over, f'infos["episode"]["l"] {clause}, in the same step')
            fits = episode["r"].shape == paid.shape and np.isclose(episode["r"], self.returns, 1e-3, 1e-3)
            clause = 'infos["episode"]["r"] must be the sum of the rewards of each team, [N, P]'
            self.expect(fits | ~over[:, None], clause)
            self.seen["ends of matches"] += int(over.sum())
            self.ended |= set(self.lengths[over].tolist())
            self.lengths[over], self.returns[over] = 0, 0

    def check_final(self, final, next_obs, limit):
        """Expect the last observations of the matches that were truncated, `limit` [N], to be observations too."""
        fits = isinstance(final, dict) and all(np.shape(final.get(key)) == x.shape for key, x in next_obs.items())
        self.expect(fits, 'infos["final_obs"] must be a dict of arrays as in an observation', vital=True)
        last = {key: x.astype(final[key].dtype) for key, x in next_obs.items()}
        for key, x in last.items():
            x[limit] = final[key][limit]
        same = [alike.reshape(self.num_envs, -1).all(1) for alike in agreement(last, next_obs)]
        self.seen["last observations"] += int(limit.sum())
        self.seen["last observations of the next match"] += int((np.all(same, 0) & limit).sum())
        self.check_observation(last)

    def look_back(self):
        """Warn of what a whole play has shown."""
        steps, size = self.seen["steps"], np.maximum(np.abs(self.low), np.abs(self.high))
        self.warn(not self.seen["entities"], "no entity was ever alive: there is nobody who could learn")
        wrong = (
            f"no match ended in {steps} steps: where none ever does, the evaluation after a training does not either"
        )
        self.warn(not self.seen["ends of matches"], f"{wrong} (--steps plays longer)")
        wrong = (
            "entities were born, but none died. If some did, their slots were reused at once, and their trajectories"
        )
        silent = self.seen["births"] and not self.seen["deaths"] and not self.identified
        self.warn(silent, f"{wrong} run on; a method entity_ids() shows this here (see the top of check_env.py)")
        missing = sorted(set(range(1, max(self.kinds, default=0))) - self.kinds)
        self.warn(missing, f"no entity of kind {missing} was ever seen, though kinds are counted from 1 without gaps")
        wrong = 'matches were truncated without infos["final_obs"]: the learner takes their ends for deaths'
        self.warn(self.seen["truncations"] > self.seen["last observations"], wrong)
        wrong = 'infos["final_obs"] is the first observation of the next match, not the last one of the truncated match'
        last = self.seen["last observations"]
        self.warn(last and self.seen["last observations of the next match"] == last, wrong)
        large = np.flatnonzero(np.isfinite(size) & (size > 10)).tolist()
        wrong = f"features {large[:8]} are beyond 10 in size: they drown the others, and learning is slow; scale them"
        self.warn(large, f"{wrong} to about -1 to 1")
        constant = np.flatnonzero(self.low == self.high).tolist()
        self.warn(constant, f"features {constant[:8]} are always the same ({len(constant)} in all): they tell nothing")
        wrong = "board never exceeds 1: it is in percent, so the network sees hardly anything of it; 100 is full"
        self.warn("board" in self.arrays and self.seen["board"] <= 1, wrong)
        largest = self.seen["reward"]
        wrong = f"rewards are up to {largest:.3g} in size: the value loss drowns the policy gradient; scale them"
        self.warn(largest > 10, f"{wrong} to about 0.01 to 0.1 per step")
        wrong = "rewards were paid in slots that were empty before the step: they are dropped, so what an entity earns"
        self.warn(self.seen["lost rewards"], f"{wrong} after its death teaches nobody; pay it when it dies")
        wrong = "some entities have fewer actions than others by single_action_space, and their action_mask allows more"
        self.warn(self.seen["impossible"], f"{wrong}: they will choose actions that they do not have")

    def check_seeds(self, steps):
        """Warn if what chooses other matches does not."""
        for name, options, seed, wrong in (
            (
                *("first_match", {"first_match": self.num_envs}, 1),
                "all processes of torchrun play the same matches, so more of them learn nothing more",
            ),
            (
                *("held_out", {"held_out": True}, 1),
                'evaluation plays matches of the training, so that what it calls "held-out" is not',
            ),
            ("the seed of reset", {"first_match": 0}, 2, "every run plays the same matches"),
        ):
            envs, rng = [self.make(first_match=0), self.make(**options)], np.random.default_rng(0)
            obs, other = self.reset(envs[0]), self.reset(envs[1], seed)
            for _ in range(steps):
                if not all(same.all() for same in agreement(obs, other)):
                    break
                actions = self.choose(obs, rng)
                obs, other = (self.call_step(env, actions.copy())[0] for env in envs)
            else:
                self.warn(True, f"{name} had no effect in {steps} steps: {wrong}")
            for env in envs:
                self.close(env)
        env, rng = self.make(first_match=0), np.random.default_rng(0)
        obs = self.reset(env)
        for _ in range(steps):
            first = {key: np.repeat(x[:1], self.num_envs, 0) for key, x in obs.items()}
            if not all(same.all() for same in agreement(obs, first)):
                break
            obs = self.call_step(env, np.repeat(self.choose(obs, rng)[:1], self.num_envs, 0))[0]
        else:
            wrong = f"the {self.num_envs} matches were the same in {steps} steps of the same actions"
            self.warn(self.num_envs > 1, f"{wrong}: more of them learn nothing more, and evaluation is of one match")
        self.close(env)

    def check_state(self, env, rng):
        """Expect matches to go on after load_state as they did after state."""
        obs = self.play(env, self.reset(env), SAME, rng)[-1][1]
        with self.doing("state()"):
            state = env.state()
        fits = isinstance(state, list) and len(state) == self.num_envs
        self.expect(fits, "state must return a list with a dict of numbers and arrays for each match", vital=True)
        types = {np.asarray(x).dtype.kind for match in state for x in match.values()}
        clause = (
            "state must hold numbers of at most 64 bits, and arrays of such numbers: a checkpoint keeps nothing else"
        )
        self.expect(types <= set("biuf"), clause, vital=True)
        state = [{key: np.array(x) for key, x in match.items()} for match in state]  # as a checkpoint keeps it
        played = self.play(env, obs, SAME, rng)
        other = self.make(first_match=0)
        with self.doing("load_state(state)"):
            resumed, _ = other.load_state(state)
        clause = "after load_state the matches must go on as they did after state"
        self.replay(other, self.check_observation(resumed), obs, played, clause)
        self.close(other)

    def check_render(self):
        """Expect pictures of an environment that says it has them, as --capture-video does."""
        env = self.make(held_out=True, render_mode="rgb_array")
        self.reset(env)
        try:
            pictures = [np.asarray(picture) for picture in env.render()]
        except Exception as error:  # some games draw only where there is a screen
            self.warn(True, f"--capture-video cannot draw: render() raised {raised(error)}")
        else:
            fits = [x.ndim == 3 and x.shape[-1] == 3 and x.dtype == np.uint8 for x in pictures]
            clause = "render must return N pictures, arrays [height, width, 3] of type uint8"
            self.expect(len(fits) == self.num_envs and all(fits), clause)
        self.close(env)

    def replay(self, env, obs, start, played, clause, change_empty=False):
        """Expect the same to follow from the same actions, except in empty slots."""
        self.time = 0
        self.expect_alike(obs, start, clause)
        for actions, expected, rewards, over in played:
            live = obs["kind"] > 0
            if change_empty:
                actions = np.where(live, actions, (actions + 1) % self.sizes["A"])
            obs, paid, terminated, truncated, _ = self.call_step(env, actions)
            self.expect(equal(paid, rewards) | ~live, clause)
            self.expect((terminated | truncated) == over, clause)
            obs = {key: np.array(obs[key]) for key in expected}
            self.expect_alike(obs, expected, clause)
            if clause in self.problems:  # from here on its actions may be none
                return

    def expect_alike(self, obs, expected, clause):
        for same in agreement(obs, expected):
            self.expect(same, clause)


def check_env(make_env, steps=200, num_envs=3, group_by="entity"):
    """Play an environment at random and compare it with the contract.

    Args:
        make_env: the environment's class, or a function that makes one of the same arguments: the number of matches,
            num_workers, first_match, held_out and group_by.
        steps: how many are played in every match; long enough for some matches to end.
        num_envs: N.
        group_by: what the environment is given, a value of --group-by.

    Returns:
        A list of sentences, one for each clause that is broken; [] if none is. Checker has the warnings too.
    """
    checker = Checker(make_env, num_envs, group_by)
    checker.check(steps)
    return [f"{clause} ({where})" for clause, where in checker.problems.items()]


class Refused(Exception):
    """What a person asked for cannot be checked, and why, in one sentence."""


def load(environment):
    """What is named module:Class or path/to/module.py:Class; the current folder comes first, then the repository."""
    module, colon, name = environment.rpartition(":")
    if not colon:
        raise Refused(f"{environment} is no environment: name it my_env:MyVecEnv or path/to/my_env.py:MyVecEnv")
    path = Path(module)
    sys.path[:0] = [str(path.resolve().parent)] if path.suffix == ".py" else [os.getcwd()]
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            found = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        else:
            found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module may raise anything, or end the program
        raise Refused(f"{module} cannot be imported: {raised(error)}")
    if not callable(getattr(found, name, None)):
        raise Refused(f"{module} has no class or function {name}")
    return getattr(found, name)


@dataclass
class Args:
    environment: Annotated[str, tyro.conf.Positional]  # module:Class, or path/to/module.py:Class
    steps: int = 200  # steps of each match
    num_envs: int = 3  # matches
    group_by: str = "entity"  # who shares a trajectory, as in trajsep_ppo.py
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # options: name value ...


def main():
    """The command line: a sentence for each broken clause, and what came up; exit code 1 if any is broken."""
    args = tyro.cli(Args, description=__doc__.partition("\n")[0])
    try:
        if min(args.steps, args.num_envs) < 1:
            raise Refused("--steps and --num-envs must be at least 1")
        make_env = load(args.environment)
    except Refused as error:
        print(f"check_env.py: error: {error}", file=sys.stderr)
        sys.exit(2)

    def make(num_envs, **options):
        return make_env(num_envs, **options, **args.env_kwargs)

    checker = Checker(make, args.num_envs, args.group_by)
    checker.check(args.steps)
    for clause, where in checker.problems.items():
        print(f"{clause} ({where})")
    for sentence in checker.warnings:
        print(f"warning: {sentence}")
    counts = ", ".join(f"{checker.seen[key]} {key}" for key in ("births", "deaths", "ends of matches"))
    same = f", all after {min(checker.ended)} steps" if len(checker.ended) == 1 else ""
    counts += f" ({checker.seen['truncations']} truncated{same})"
    print(
        f"{len(checker.problems)} clauses broken; {counts} in {checker.seen['steps']} steps of {args.num_envs} matches"
    )
    sys.exit(bool(checker.problems))


if __name__ == "__main__":
    main()
