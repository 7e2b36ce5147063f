"""Does an environment keep the contract that the scripts rely on? Every clause that it breaks, named in a sentence.

    python examples/check_env.py my_env:MyVecEnv
    python examples/check_env.py lux_wrapper:LuxVecEnv --steps 1000

or in a test of your own:

    assert check_env(lambda num_envs: MyVecEnv(num_envs, size=8)) == []

It plays random actions that the masks allow, so it finds what comes up in such play; the command tells how many births,
deaths and ends of matches there were. N matches, P players (teams), E entity slots, A actions.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections import Counter

import gymnasium as gym
import numpy as np

# Axes of each array of an observation after [N, P], and its type
ARRAYS = {
    "board": ("HWC", np.uint8),
    "features": ("EF", np.float32),
    "position": ("E2", np.int64),
    "kind": ("E", np.int64),
    "group": ("E", np.int64),
    "action_mask": ("EA", np.bool_),
}
SAME = 50  # steps that are played again


def equal(x, y):
    """Where two arrays hold the same numbers; NaN is the same as NaN."""
    return (x == y) | ((x != x) & (y != y))


class Broken(Exception):
    """The arrays do not fit together, so nothing more can be checked."""


class Checker:
    """Plays an environment. `problems` maps each broken clause to where it was first, `seen` counts what came up."""

    def __init__(self, make_env, num_envs=3, entity_ids=None):
        self.make_env, self.num_envs, self.entity_ids = make_env, num_envs, entity_ids
        self.problems, self.seen, self.time = {}, Counter(), 0

    def expect(self, fine, clause, vital=False):
        """Note the clause as broken unless all of `fine`, a bool or an array [N, ...], [N, P, ...] or [N, P, E]."""
        fine = np.asarray(fine)
        if not fine.all():
            first = np.argwhere(~fine)[0] if fine.ndim else ()
            place = [f"{axis} {index}" for axis, index in zip(("match", "team", "slot"), first)]
            self.problems.setdefault(clause, ", ".join([*place, f"step {self.time}"]))
            if vital:
                raise Broken

    def check(self, steps):
        """Everything: the spaces, a long play, and short ones again, which must be the same."""
        env, rng = self.make_env(self.num_envs), np.random.default_rng(0)
        self.check_spaces(env)
        start = self.reset(env)
        played = self.play(env, start, steps, rng)
        self.replay(env, self.reset(env), start, played, "the same seed and actions must give the same matches")
        if not self.problems:
            clause = "actions of empty slots must not matter"
            self.replay(env, self.reset(env), start, played, clause, change_empty=True)
        if hasattr(env, "state"):
            obs = self.play(env, self.reset(env), SAME, rng)[-1][1]
            state = env.state()
            fits = isinstance(state, list) and len(state) == self.num_envs
            self.expect(fits, "state must return a list with a dict of numbers and arrays for each match", vital=True)
            state = [{key: np.array(x) for key, x in match.items()} for match in state]  # as a checkpoint keeps it
            played = self.play(env, obs, SAME, rng)
            env.close()
            env = self.make_env(self.num_envs)
            resumed, _ = env.load_state(state)
            clause = "after load_state the matches must go on as they did after state"
            self.replay(env, self.check_observation(resumed), obs, played, clause)
        env.close()

    def check_spaces(self, env):
        """Expect the two spaces of a match to fit together; notes the sizes of the axes."""
        self.expect(env.num_envs == self.num_envs, "num_envs must be the number of matches asked for", vital=True)
        self.expect(isinstance(env.metadata.get("name"), str), 'metadata["name"] must be the name of the game')
        space, actions = env.single_observation_space, env.single_action_space
        fits = isinstance(space, gym.spaces.Dict) and set(ARRAYS) <= set(space)
        self.expect(fits, f"single_observation_space must be a Dict with {', '.join(ARRAYS)}", vital=True)
        fits = isinstance(actions, gym.spaces.MultiDiscrete) and actions.nvec.ndim == 2
        self.expect(fits, "single_action_space must be a MultiDiscrete of shape [P, E]", vital=True)
        P, E = actions.nvec.shape
        self.space, self.sizes = space, {"E": E, "A": int(actions.nvec.max()), "2": 2}
        for key, (axes, _) in ARRAYS.items():
            shape = space[key].shape
            fits = shape[:1] == (P,) and len(shape) == 1 + len(axes)
            fits = fits and all(self.sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape[1:]))
            self.expect(fits, f"the space of {key} must have the shape [P, {', '.join(axes)}]", vital=True)

    def reset(self, env):
        """Start new matches, always the same; a copy of the first observation."""
        self.time, self.lengths = 0, np.zeros(self.num_envs, int)
        obs = self.check_observation(env.reset(seed=1)[0])
        self.returns = np.zeros(obs["kind"].shape[:2])
        return obs

    def check_observation(self, obs):
        """Expect an observation to be as it must be; returns a copy of its arrays."""
        missing = ", ".join(key for key in ARRAYS if key not in obs)
        self.expect(not missing, f"an observation must be a dict with {', '.join(ARRAYS)}", vital=True)
        for key, (_, dtype) in ARRAYS.items():
            fits = np.shape(obs[key]) == (self.num_envs, *self.space[key].shape)
            self.expect(fits, f"{key} must have the shape of its space with N in front", vital=True)
            self.expect(obs[key].dtype == dtype, f"{key} must be of type {np.dtype(dtype)}", vital=True)
        obs = {key: np.array(obs[key]) for key in ARRAYS}
        live, group, (x, y) = obs["kind"] > 0, obs["group"], np.moveaxis(obs["position"], -1, 0)
        inside = (0 <= x) & (x < self.sizes["H"]) & (0 <= y) & (y < self.sizes["W"])
        self.expect(obs["kind"] >= 0, "kind must be 0 in an empty slot and above 0 in others")
        self.expect(obs["board"] <= 100, "board must be in percent, 0 to 100")
        self.expect(inside | ~live, "position of an entity must be a cell of the board, 0 to H - 1 and 0 to W - 1")
        self.expect((0 <= group) & (group < self.sizes["E"]), "group must be in 0 to E - 1, in empty slots too")
        self.expect(obs["action_mask"].any(-1) | ~live, "an entity must have an action that is not masked")
        self.expect(np.isfinite(obs["features"]).all(-1) | ~live, "features of an entity must be finite")
        for key, box in self.space.items():
            if key in ARRAYS and isinstance(box, gym.spaces.Box):
                outside = (obs[key] < box.low) | (obs[key] > box.high)
                outside = outside if key == "board" else outside.reshape(*live.shape, -1).any(-1) & live
                self.expect(~outside, f"{key} must stay within the bounds of its space")
        return obs

    def play(self, env, obs, steps, rng):
        """Play on at random; the first SAME steps as (actions, next observation, rewards, which matches ended)."""
        played = []
        for _ in range(steps):
            allowed = obs["action_mask"] | (obs["kind"] == 0)[..., None]  # any action in empty slots
            actions = (rng.random(allowed.shape) * allowed).argmax(-1)
            obs, rewards, over = self.step(env, obs, actions)
            played += [(actions, obs, rewards, over)] if len(played) < SAME else []
        return played

    def step(self, env, obs, actions):
        """One step, and all that can be said of it; copies of the next observation and the rewards, and who ended."""
        before = None if self.entity_ids is None else np.array(self.entity_ids(env))
        next_obs, rewards, terminated, truncated, infos = env.step(actions)
        self.time += 1
        self.seen["steps"] += 1
        live, rewards = obs["kind"] > 0, np.array(rewards)
        self.expect(rewards.shape == live.shape, "rewards must have the shape [N, P, E]", vital=True)
        self.expect(rewards.dtype.kind == "f", "rewards must be floating-point numbers")
        self.expect(np.isfinite(rewards) | ~live, "the reward of an entity must be finite")
        self.expect((rewards == 0) | live, "a slot that was empty before the step must have the reward 0")
        for name, x in (("terminated", terminated), ("truncated", truncated)):
            fits = np.shape(x) == (self.num_envs,) and np.asarray(x).dtype == bool
            self.expect(fits, f"{name} must be an array of N bools, one for each match", vital=True)
        over = np.array(terminated | truncated)
        next_obs = self.check_observation(next_obs)
        self.check_infos(infos, over, np.where(live, rewards, 0).sum(-1))
        next_live, goes_on = next_obs["kind"] > 0, ~over[:, None, None]
        stays = live & next_live & goes_on
        clause = "a slot must be seen empty before another entity takes it, here its {} changed"
        self.expect((next_obs["kind"] == obs["kind"]) | ~stays, clause.format("kind"))
        if before is not None:
            self.expect((before == self.entity_ids(env)) | ~stays, clause.format("entity"))
        self.seen["births"] += int((next_live & ~live & goes_on).sum())
        self.seen["deaths"] += int((live & ~next_live & goes_on).sum())
        return next_obs, rewards, over

    def check_infos(self, infos, over, paid):
        """Expect `infos` to say which matches ended, and of those what was counted here."""
        self.lengths, self.returns = self.lengths + 1, self.returns + paid
        told = np.broadcast_to(infos.get("_episode", False), over.shape)
        self.expect(told == over, 'infos["_episode"] must be true for the matches that have just ended, and no others')
        if over.any():
            episode, N = {key: np.asarray(x, float) for key, x in infos.get("episode", {}).items()}, self.num_envs
            fits = {"l", "r"} <= set(episode) and all(x.shape[:1] == (N,) for x in episode.values())
            self.expect(fits, 'infos["episode"] must hold "l", "r" and other metrics as arrays [N, ...]', vital=True)
            for key, x in episode.items():
                clause = f'infos["episode"]["{key}"] must be finite where a match has ended'
                self.expect(np.isfinite(x.reshape(N, -1)).all(1) | ~over, clause)
            clause = "must be the steps that were played; at an end the next match's first observation is returned"
            self.expect((episode["l"] == self.lengths) | ~over, f'infos["episode"]["l"] {clause}, in the same step')
            fits = episode["r"].shape == paid.shape and np.isclose(episode["r"], self.returns, 1e-3, 1e-3)
            clause = 'infos["episode"]["r"] must be the sum of the rewards of each team, [N, P]'
            self.expect(fits | ~over[:, None], clause)
            self.seen["ends of matches"] += int(over.sum())
            self.lengths[over], self.returns[over] = 0, 0

    def replay(self, env, obs, start, played, clause, change_empty=False):
        """Expect the same to follow from the same actions, except in empty slots."""
        self.time = 0
        self.expect_alike(obs, start, clause)
        for actions, expected, rewards, over in played:
            live = obs["kind"] > 0
            if change_empty:
                actions = np.where(live, actions, (actions + 1) % self.sizes["A"])
            obs, paid, terminated, truncated, _ = env.step(actions)
            self.time += 1
            self.expect(equal(paid, rewards) | ~live, clause)
            self.expect((terminated | truncated) == over, clause)
            obs = {key: np.array(obs[key]) for key in ARRAYS}
            self.expect_alike(obs, expected, clause)

    def expect_alike(self, obs, expected, clause):
        live = expected["kind"] > 0
        for key in ARRAYS:
            same = equal(obs[key], expected[key])
            self.expect(same if key in ("board", "kind") else same.reshape(*live.shape, -1).all(-1) | ~live, clause)


def check_env(make_env, steps=200, num_envs=3, entity_ids=None):
    """Play an environment at random and compare it with the contract.

    Args:
        make_env: a function from the number of matches to an environment.
        steps: how many are played in every match; long enough for some matches to end.
        num_envs: N.
        entity_ids: a function from the environment to an array [N, P, E] that says who is in which slot. Without it
            an entity that takes another's slot at once is found only where their kinds differ.

    Returns:
        A list of sentences, one for each clause that is broken; [] if none is.
    """
    checker = Checker(make_env, num_envs, entity_ids)
    with contextlib.suppress(Broken):
        checker.check(steps)
    return [f"{clause} ({where})" for clause, where in checker.problems.items()]


def main():
    """The command line: a sentence for each broken clause, and what came up; exit code 1 if any is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("environment", help="module:Class, called with the number of matches")
    parser.add_argument("--steps", type=int, default=200, help="steps of each match (default: 200)")
    parser.add_argument("--num-envs", type=int, default=3, help="matches (default: 3)")
    args = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    module, _, name = args.environment.partition(":")
    checker = Checker(getattr(importlib.import_module(module), name), args.num_envs)
    with contextlib.suppress(Broken):
        checker.check(args.steps)
    for clause, where in checker.problems.items():
        print(f"{clause} ({where})")
    counts = ", ".join(f"{checker.seen[key]} {key}" for key in ("births", "deaths", "ends of matches"))
    print(
        f"{len(checker.problems)} clauses broken; {counts} in {checker.seen['steps']} steps of {args.num_envs} matches"
    )
    sys.exit(bool(checker.problems))


if __name__ == "__main__":
    main()
