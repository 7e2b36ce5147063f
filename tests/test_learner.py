"""The learner of both scripts worked out a second time, slowly and plainly, and compared.

First comes a toy game. Then comes the whole method in loops over steps, teams and entities, in the
order in which things happen: reward, value, advantage, loss, gradient. It shares only the network
with the scripts, and draws nothing: it reads actions off the game, and minibatches off the boards
that the network receives. At last a script's own `train` is compared with it, up to the parameters
after each minibatch. All is in double precision, so this is as exact on any processor.

A *row* is (step, team) and a *cell* is (step, team, group); steps count from the start of the
training. Only cells in which an entity lives exist here, so no empty one can be counted.
"""

import importlib
import sys
from types import SimpleNamespace

import ablation
import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from helpers import space_of
from in_double import double_precision
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import global_ppo
import trajsep_ppo
from hybrid_model import HybridNet


@pytest.fixture(autouse=True)
def in_double():
    with double_precision():
        yield


# -- A toy game ----------------------------------------------------------------------------

PLAYERS, SLOTS, ACTIONS, SIZE = 2, 5, 4, 8
KINDS = np.array([1, 1, 2, 3, 2])  # two factories, three robots
MATCH_LENGTHS = (8, 5, 1000)  # the first match always ends with a rollout of 8 steps
GARBAGE = np.array([np.nan, 1e9, -1e9])


class ToyVecEnv:
    """Matches in which nothing can be achieved, but everything happens that a learner must handle.

    Entities are born and die, slots are used again, at times a whole team is gone. Matches end with
    a rollout, or within it, or not at all, by termination or truncation, and some slots are taken
    on both sides of the end. Robots change their cluster. Rewards have both signs and follow a
    feature, so there are values to learn. Empty slots are full of garbage. Most observations are
    written into the arrays of the one before, so they must be copied.

    Every observation carries its step and its team in the first cell of the board. `diary` has for
    each step the observation, and after it the actions and rewards [B, E], which matches ended or
    were truncated [B], and the last observations of the latter.
    """

    metadata = {"name": "toy"}

    def __init__(self, num_envs, group_by, births=0.4, reward_scale=1.0):
        self.num_envs = num_envs
        self.group_by = group_by
        self.births = births  # chance of an empty slot to be filled
        self.reward_scale = reward_scale
        self.shape = num_envs, PLAYERS, SLOTS
        self.rewards = np.zeros(self.shape)
        obs, _ = self.reset()
        self.single_observation_space = space_of(obs)
        self.single_action_space = gym.spaces.MultiDiscrete(np.full((PLAYERS, SLOTS), ACTIONS))

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.time = 0
        self.diary = []
        self.live = self.rng.random(self.shape) < 2 * self.births
        return self._observe(), {}

    def _arrays(self, live_slots):
        """A new observation in which these slots are alive."""
        rng = self.rng
        live = live_slots[..., None]
        board = rng.integers(0, 101, (*self.shape[:2], SIZE, SIZE, 2)).astype(np.uint8)
        board[..., 0, 0, 0] = self.time
        board[..., 0, 0, 1] = np.arange(self.num_envs * PLAYERS).reshape(-1, PLAYERS)
        features = rng.normal(size=(*self.shape, 3))
        garbage = rng.choice(GARBAGE, features.shape)
        position = rng.integers(0, SIZE, (*self.shape, 2))
        group = np.arange(SLOTS)
        if self.group_by == "cluster":
            group = np.where(KINDS == 1, group, rng.integers(0, 2, self.shape))
        mask = rng.random((*self.shape, ACTIONS)) < 0.6
        mask[..., 1] |= ~mask.any(-1)  # some have only one choice
        return {
            "board": board,
            "features": np.where(live, features, garbage),
            "position": np.where(live, position, 10**9),
            "kind": np.where(live_slots, KINDS, 0),
            "group": np.where(live_slots, group, rng.integers(0, SLOTS, self.shape)),
            "action_mask": mask,
        }

    def _observe(self):
        self.live[-1, -1, 0] = True  # at any time there is an entity
        obs = self._arrays(self.live)
        if self.time % 3 == 0:
            self.obs = obs
        for key, x in obs.items():
            self.obs[key][:] = x
        seen = {key: of_teams(x) for key, x in obs.items()}
        self.diary.append(SimpleNamespace(obs=seen, actions=None))
        return self.obs

    def step(self, actions):
        rng = self.rng
        allowed = np.take_along_axis(self.obs["action_mask"], actions[..., None], -1)[..., 0]
        assert allowed[self.live].all(), "a masked action was taken"
        self.time += 1
        earned = 0.2 + self.obs["features"][..., 0] + 0.5 * rng.normal(size=self.shape)
        garbage = rng.choice(GARBAGE, self.shape)
        self.rewards[:] = np.where(self.live, self.reward_scale * earned, garbage)
        ended = self.time % np.array(MATCH_LENGTHS) == 0
        by_time = np.arange(self.num_envs) % 2 == 0
        now = self.diary[-1]
        now.actions = of_teams(actions)
        now.rewards = of_teams(self.rewards)
        now.ended = np.repeat(ended, PLAYERS)
        now.truncated = np.repeat(ended & by_time, PLAYERS)

        self.live = rng.random(self.shape) < np.where(self.live, 0.85, self.births)
        final_live = self.live.copy()
        final_live[0, 1] = False  # a team that is gone when its match is cut off
        final = self._arrays(final_live)
        now.obs_at_limit = {key: of_teams(x) for key, x in final.items()}
        for x in final.values():
            x[~(ended & by_time)] = 99  # nothing there means anything
        infos = {"final_obs": final} if ended.any() else {}
        self.live[ended] = (rng.random(self.shape) < 2 * self.births)[ended]
        if self.time % 3 == 0:
            self.live[self.time % self.num_envs, self.time % PLAYERS] = False  # a whole team
        return self._observe(), self.rewards, ended & ~by_time, ended & by_time, infos

    def close(self):
        pass


def of_teams(x):
    """A copy of x [N, P, ...] as [B, ...]."""
    return x.reshape(-1, *x.shape[2:]).copy()


# -- The slow learner ----------------------------------------------------------------------


def members(separate, obs, team):
    """Who shares a trajectory in a team at one step: {group: slots of its living members}."""
    groups = {}
    for slot in range(SLOTS):
        if obs["kind"][team, slot] > 0:
            group = int(obs["group"][team, slot]) if separate else 0
            groups.setdefault(group, []).append(slot)
    return groups


def outputs(method, agent, diary, rows, learned=None):
    """The network's outputs for some rows: probabilities by (step, team, slot), the rest by cell.

    If the cells `learned` are given, it sees only their entities. A group has the product of its
    members' probabilities, so the sum of their logarithms, and the sum of their entropies. Its
    value is the mean of its members' values, or the team's.
    """
    obs = {}
    for key in diary[0].obs:
        obs[key] = torch.as_tensor(np.stack([diary[t].obs[key][b] for t, b in rows]))
    cells = {}
    for i, (t, b) in enumerate(rows):
        for g, slots in members(method.separate, diary[t].obs, b).items():
            if learned is None or (t, b, g) in learned:
                cells[t, b, g] = i, slots
            else:
                obs["kind"][i, slots] = 0
    logits, values, team_values = agent(obs)
    says = SimpleNamespace(probabilities={}, logprob={}, entropy={}, value={})
    says.team_value = team_values
    for (t, b, g), (i, slots) in cells.items():
        of_team = not method.separate or "global-critic" in method.patches
        own_value = sum(values[i, e] for e in slots) / len(slots)
        says.value[t, b, g] = team_values[i] if of_team else own_value
        says.logprob[t, b, g] = 0
        says.entropy[t, b, g] = 0
        for e in slots:
            allowed = np.flatnonzero(diary[t].obs["action_mask"][b, e]).tolist()
            logprobs = logits[i, e, allowed].log_softmax(-1)
            says.probabilities[t, b, e] = np.zeros(ACTIONS)
            says.probabilities[t, b, e][allowed] = logprobs.detach().exp()
            says.entropy[t, b, g] -= (logprobs.exp() * logprobs).sum()
            if diary[t].actions is not None:
                says.logprob[t, b, g] += logprobs[allowed.index(diary[t].actions[b, e])]
    return says


def learn(args, method, agent, diary, minibatches):
    """Train `agent` as a script should, and yield (update, name, quantity) for all on the way.

    `minibatches[update][epoch]` is a list of minibatches, each a list of rows. `method` says
    whether trajectories are `separate`, and which `patches` of the study apply.
    """
    T, B = args.num_steps, args.num_envs * PLAYERS
    num_updates = args.total_timesteps // (args.num_envs * T)
    parameters = list(agent.parameters())
    adam = torch.optim.Adam(parameters, eps=1e-5)

    for update in range(num_updates):
        # Schedules fall by the same amount in each update, and would end after the last.
        remaining = 1 - update / num_updates
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        ent_coef = args.ent_coef * (remaining if args.anneal_ent else 1)
        positive_weight = 1 + (args.positive_reward_weight - 1) * remaining

        # Rollout: T steps, and one more observation, whose values stand for all that comes later.
        start, end = update * T, update * T + T
        probabilities, value, old_logprob, team_value = {}, {}, {}, {}
        for t in range(start, end + 1):
            with torch.no_grad():
                says = outputs(method, agent, diary, [(t, b) for b in range(B)])
            value.update({cell: x.item() for cell, x in says.value.items()})
            team_value.update({(t, b): x.item() for b, x in enumerate(says.team_value)})
            if t < end:
                old_logprob.update(says.logprob)
                probabilities.update(says.probabilities)
        cells = [cell for cell in value if cell[0] < end]
        yield update, "probabilities", probabilities
        yield update, "value", value

        # Reward: a group earns what its members earn, where positive rewards count more at first.
        # It gets a share of it, and for the rest the mean over the team's groups in this step. Where
        # its match was truncated and it would have lived on, the value of that counts as reward.
        reward = {}
        for t in range(start, end):
            for b in range(B):
                earned = {}
                for g, slots in members(method.separate, diary[t].obs, b).items():
                    paid = diary[t].rewards[b, slots].tolist()
                    earned[g] = sum(positive_weight * x if x > 0 else x for x in paid)
                for g in earned:
                    share = args.agent_reward_weight if method.separate else 1
                    mean = sum(earned.values()) / len(earned)
                    reward[t, b, g] = share * earned[g] + (1 - share) * mean
        at_limit = [SimpleNamespace(obs=now.obs_at_limit, actions=None) for now in diary[:end]]
        rows = [(t, b) for t in range(start, end) for b in range(B) if diary[t].truncated[b]]
        if rows:
            with torch.no_grad():
                promised = outputs(method, agent, at_limit, rows).value
            for cell, x in promised.items():
                if cell in reward or "shared-dones" in method.patches:
                    reward[cell] = reward.get(cell, 0) + args.gamma * x.item()
        yield update, "reward", reward

        # Advantage: how much more than its value a cell turned out to be worth. It is the sum of
        # the errors reward + gamma * next value - value, in its step and in each later one of the
        # same life, each weighted gamma * lambda times the one before. A life ends with its group
        # or its match, and nothing has value after that. The end of a rollout only cuts it off:
        # the next value is the next observation's. With shared ends a slot continues without its
        # group, with the value 0 or the team's, up to the end of the match.
        of_empty = team_value if "global-critic" in method.patches else {}

        def worth(t, b, g):
            return value.get((t, b, g), of_empty.get((t, b), 0))

        advantage, returns = {}, {}
        for t, b, g in cells:
            advantage[t, b, g], weight, s, continues = 0, 1, t, True
            while continues and s < end:
                lives = (s + 1, b, g) in value or "shared-dones" in method.patches
                continues = lives and not diary[s].ended[b]
                next_value = worth(s + 1, b, g) if continues else 0
                error = reward.get((s, b, g), 0) + args.gamma * next_value - worth(s, b, g)
                advantage[t, b, g] += weight * error
                weight *= args.gamma * args.gae_lambda
                s += 1
            returns[t, b, g] = advantage[t, b, g] + value[t, b, g]
        yield update, "advantage", advantage

        # Top samples: of the team's groups without a factory only the best are learned from.
        learned = set(cells)
        if "top-1" in method.patches:
            scores = {
                "top-1-return": returns,
                "top-1-abs": {cell: abs(x) for cell, x in advantage.items()},
            }
            score = scores.get(method.patches[-1], advantage)
            for t, b in {cell[:2] for cell in cells}:
                groups = members(method.separate, diary[t].obs, b)
                robots = [(t, b, g) for g, slots in groups.items() if not any(KINDS[slots] == 1)]
                learned -= set(sorted(robots, key=score.get, reverse=True)[args.top_samples :])
        cells = sorted(learned)

        clipfracs = []
        for epoch in range(args.update_epochs):
            for rows in minibatches[update][epoch]:
                says = outputs(method, agent, diary, rows, learned)
                n = len(says.value)
                mean = sum(advantage[cell] for cell in says.value) / n
                variance = sum((advantage[cell] - mean) ** 2 for cell in says.value) / n

                # Loss: means over the cells of the minibatch, each with its ratio and advantage.
                policy_loss = value_loss = entropy = approx_kl = clipfrac = torch.zeros(())
                signs_clipped = set()
                for cell in says.value:
                    adv = advantage[cell]
                    if args.norm_adv:
                        adv = (adv - mean) / (variance**0.5 + 1e-8)
                    # A shared ratio or entropy is the whole team's.
                    team = [other for other in says.value if other[:2] == cell[:2]]
                    ratio_of = team if "shared-ratio" in method.patches else [cell]
                    entropy_of = team if "shared-entropy" in method.patches else [cell]
                    log_ratio = sum(says.logprob[other] - old_logprob[other] for other in ratio_of)
                    ratio = log_ratio.exp()
                    clipped_ratio = min(max(ratio.item(), 1 - args.clip_coef), 1 + args.clip_coef)
                    gain = ratio * adv
                    if clipped_ratio * adv < gain:  # no credit, so no gradient, beyond the clip
                        gain = clipped_ratio * adv
                        signs_clipped.add(np.sign(adv))
                    policy_loss = policy_loss - gain / n
                    value_loss = value_loss + 0.5 * (says.value[cell] - returns[cell]) ** 2 / n
                    entropy = entropy + sum(says.entropy[other] for other in entropy_of) / n
                    approx_kl = approx_kl + (ratio - 1 - log_ratio).detach() / n
                    clipfrac = clipfrac + (abs(ratio.item() - 1) > args.clip_coef) / n
                clipfracs.append(clipfrac.item())
                loss = policy_loss - ent_coef * entropy + args.vf_coef * value_loss

                # Gradient: all parameters' together is scaled down to max_grad_norm if larger.
                adam.zero_grad()
                loss.backward()
                gradients = [x.grad for x in parameters if x.grad is not None]
                norm = sum((x**2).sum().item() for x in gradients) ** 0.5
                for x in gradients:
                    x *= min(1, args.max_grad_norm / (norm + 1e-6))
                adam.param_groups[0]["lr"] = learning_rate
                adam.step()
                facts = SimpleNamespace(cells=n, signs_clipped=signs_clipped)
                facts.gradient_clipped = norm > args.max_grad_norm
                facts.parameters = vector_of(agent)
                yield update, "minibatch", facts
            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        # Log: losses of the last minibatch, and the share of the returns' variance explained.
        unexplained = np.var([returns[cell] - value[cell] for cell in cells])
        variance = np.var([returns[cell] for cell in cells])
        log = {
            "epochs": epoch + 1,
            "charts/learning_rate": learning_rate,
            "charts/ent_coef": ent_coef,
            "losses/policy_loss": policy_loss.item(),
            "losses/value_loss": value_loss.item(),
            "losses/entropy": entropy.item(),
            "losses/approx_kl": approx_kl.item(),
            "losses/grad_norm": norm,
            "losses/clipfrac": sum(clipfracs) / len(clipfracs),
            "losses/explained_variance": 1 - unexplained / variance,
        }
        yield update, "log", log


# -- What the scripts do -------------------------------------------------------------------


def watch_training(monkeypatch, script, args, run_dir, toy):
    """Train with the script's own `train` on the toy game; returns what was seen on the way.

    parameters: all in one vector, at the start and after each step of Adam
    minibatches: rows of each
    sampled: (probabilities, actions) of each step
    rollouts: arrays [T, B, ...] of each update, by name
    logged: by name and step
    robots: most of them in any row of a minibatch
    """
    seen = SimpleNamespace(parameters=[], minibatches=[], sampled=[], rollouts=[], robots=[], logged={})

    def make_envs(args, num_envs, **_):
        seen.env = ToyVecEnv(num_envs, getattr(args, "group_by", "entity"), **toy)
        return seen.env

    def forward(net, obs, forward=HybridNet.forward):
        if torch.is_grad_enabled():
            seen.robots.append((obs["kind"] > 1).sum(-1).max().item())
            seen.minibatches.append([tuple(row) for row in obs["board"][:, 0, 0].tolist()])
            seen.parameters.append(vector_of(net))
        return forward(net, obs)

    def sample(probs, sample=script.sample):
        actions = sample(probs)
        seen.sampled.append((probs.numpy().copy(), actions.numpy().copy()))
        return actions

    def compute_gae(rewards, values, active, *rest, compute_gae=script.compute_gae):
        advantages = compute_gae(rewards, values, active, *rest)
        arrays = {"reward": rewards, "value": values, "active": active, "advantage": advantages}
        rollout = {name: x.numpy().copy() for name, x in arrays.items()}
        rollout["probabilities"], rollout["actions"] = map(np.array, zip(*seen.sampled))
        seen.sampled.clear()
        seen.rollouts.append(rollout)
        return advantages

    def add_scalar(writer, name, x, step):
        seen.logged[name, step] = x

    with monkeypatch.context() as patch:
        patch.setattr(script, "make_envs", make_envs)
        patch.setattr(HybridNet, "forward", forward)
        patch.setattr(script, "sample", sample)
        patch.setattr(script, "compute_gae", compute_gae)
        patch.setattr(script.SummaryWriter, "add_scalar", add_scalar)
        agent = script.train(args, str(run_dir), torch.device("cpu"))
    seen.parameters.append(vector_of(agent))
    return seen


def vector_of(net):
    return parameters_to_vector(net.parameters()).detach().clone()


def arranged(args, minibatches):
    """Minibatches in the order in which the network saw them, as [update][epoch][minibatch].

    In each epoch each row must come once, and each minibatch must have as many steps of every
    team, shuffled team by team.
    """
    T, B, M = args.num_steps, args.num_envs * PLAYERS, args.num_minibatches
    updates = [[] for _ in range(args.total_timesteps // (args.num_envs * T))]
    epochs = [minibatches[i : i + M] for i in range(0, len(minibatches), M)]
    for epoch in epochs:
        update = min(t for t, _ in epoch[0]) // T
        updates[update].append(epoch)
        here = f"update {update + 1}, epoch {len(updates[update])}"
        all_rows = [(update * T + t, b) for t in range(T) for b in range(B)]
        assert sorted(sum(epoch, [])) == all_rows, here
        for rows in epoch:
            steps_of = [sorted(t for t, b in rows if b == team) for team in range(B)]
            assert {len(steps) for steps in steps_of} == {T // M}, here
            alike = all(steps == steps_of[0] for steps in steps_of)
            assert M == 1 or not alike, f"{here}: all teams shuffled alike"
    shuffles = {tuple(map(frozenset, epoch)) for epoch in epochs}
    assert M == 1 or len(shuffles) == len(epochs), "the minibatches of two epochs are the same"
    return updates


def train_and_compare(monkeypatch, script, patches, args, run_dir, toy):
    """Train with the script and slowly, and compare; returns facts of all minibatches, and epochs.

    Steps of Adam are compared one by one. Each starts where the script's did, so that rounding
    does not pile up.
    """
    seen = watch_training(monkeypatch, script, args, run_dir, toy)
    T = args.num_steps
    minibatches = arranged(args, seen.minibatches)
    if "top-1" in patches and args.group_by == "entity":
        assert max(seen.robots) == args.top_samples, "the network sees robots not learned from"
    agent = HybridNet(seen.env.single_observation_space, ACTIONS)
    vector_to_parameters(seen.parameters[0].clone(), agent.parameters())
    diary = seen.env.diary
    played = np.array([now.actions for now in diary[:-1]])
    sampled = np.concatenate([rollout["actions"] for rollout in seen.rollouts])
    assert (played == sampled).all(), "other actions than sampled"
    facts = []
    method = SimpleNamespace(separate=script is not global_ppo, patches=patches)

    for update, name, slow in learn(args, method, agent, diary, minibatches):
        start, end = update * T, update * T + T
        here = f"{name} of update {update + 1}"
        rollout = seen.rollouts[update]
        if name in rollout:
            fast = {(t, b, x): rollout[name][t - start, b, x] for t, b, x in slow}
            compare(f"{here} at (step, team, slot or group)", slow, fast)
        if name == "value":
            exist = {(start + t, b, g) for t, b, g in np.argwhere(rollout["active"]).tolist()}
            every_slot = "shared-dones" in patches  # no slot ends before its match
            assert rollout["active"].all() if every_slot else exist == slow.keys(), here
        elif name == "minibatch":
            facts.append(slow)
            before, after = seen.parameters[len(facts) - 1 : len(facts) + 1]
            off = (after - slow.parameters).norm()
            length = (slow.parameters - before).norm()
            here += f", {len(facts)} of all: off by {off} in a step of length {length}"
            assert off <= 1e-9 * length, here
            vector_to_parameters(after.clone(), agent.parameters())
        elif name == "log":
            fast = {key: seen.logged.get((key, end * args.num_envs)) for key in slow}
            compare(here, slow, fast | {"epochs": len(minibatches[update])})
    return facts, [len(epochs) for epochs in minibatches]


def compare(name, slow, fast):
    """Two dicts of numbers or arrays, equal up to rounding."""
    for key, x in slow.items():
        close = np.abs(fast[key] - x) <= 1e-10 * (1 + abs(x))
        assert np.all(close), f"{name}, {key}: {fast[key]} instead of {x}"


# -- The tests -----------------------------------------------------------------------------

# Ratios soon leave the clip. Each switch is on in some case and off in others.
BASE = """
    --no-cuda --num-envs 3 --num-steps 8 --total-timesteps 72 --num-minibatches 4 --update-epochs 3
    --learning-rate 0.01 --clip-coef 0.1 --max-grad-norm 1.5 --gamma 0.9 --gae-lambda 0.6
    --ent-coef 0.2 --vf-coef 0.8 --positive-reward-weight 1.3
"""
ANY_GRADIENT = "--max-grad-norm 1000"
CASES = {
    "own reward": f"--agent-reward-weight 1 --no-norm-adv {ANY_GRADIENT}",
    "mean reward": "--agent-reward-weight 0 --no-anneal-lr",
    "entity": "--agent-reward-weight 0.8",
    "cluster": "--agent-reward-weight 0.8 --group-by cluster",
    "target_kl": "--target-kl 0.015",
    "one minibatch": f"--num-minibatches 1 --learning-rate 0.03 {ANY_GRADIENT}",
    "small rewards": "--max-grad-norm 0.5 --positive-reward-weight 1",
    "few entities": "--num-minibatches 8",
    "team": "--max-grad-norm 10",
    "team, small rewards": "--positive-reward-weight 1 --no-anneal-lr",
    "team, not normalized": f"--no-norm-adv --no-anneal-ent {ANY_GRADIENT}",
    "team, target_kl": "--target-kl 0.2",
    "team, few entities": "--num-minibatches 8",
}
ARMS = {  # flags by patches
    ("global-critic",): f"--group-by cluster {ANY_GRADIENT}",
    ("shared-ratio",): "--num-minibatches 2 --no-anneal-ent",
    ("shared-entropy",): "",
    ("shared-dones",): "",
    ("shared-dones", "global-critic"): "",
    ("global-critic", "shared-ratio", "shared-entropy", "shared-dones"): "--group-by cluster",
    ("top-1",): "--group-by cluster",
    ("top-1", "top-1-abs"): "",
    ("top-1", "top-1-return"): "--top-samples 2",
}


def arguments(script, flags):
    return tyro.cli(script.Args, args=f"{BASE} {flags}".split())


def with_small_values(net, obs, forward=HybridNet.forward):
    logits, value, team_value = forward(net, obs)
    return logits, value / 1000, team_value / 1000


@pytest.mark.parametrize("case", CASES)
def test_learner(monkeypatch, tmp_path, case):
    """All of a training is what the slow learner finds, and what the case is for has happened."""
    script = global_ppo if case.startswith("team") else trajsep_ppo
    args = arguments(script, CASES[case])
    toy = {}
    if "small rewards" in case:  # so small that the epsilon of the normalization counts
        toy["reward_scale"] = 1e-4
        monkeypatch.setattr(HybridNet, "forward", with_small_values)
    if "few entities" in case:
        toy["births"] = 0.01
    facts, epochs = train_and_compare(monkeypatch, script, (), args, tmp_path, toy)

    signs_clipped = set.union(*(fact.signs_clipped for fact in facts))
    assert signs_clipped == {1, -1}, "ratios are clipped for advantages of both signs"
    gradient_clipped = {fact.gradient_clipped for fact in facts}
    assert (True in gradient_clipped) == (args.max_grad_norm < 100)
    if case in ("entity", "team"):
        assert gradient_clipped == {True, False}
    if args.target_kl is not None:
        assert min(epochs) < args.update_epochs == max(epochs), "some updates end early, not all"
    if "births" in toy:
        assert any(fact.cells == 1 for fact in facts), "advantages without variance"


@pytest.mark.parametrize("patches", ARMS)
def test_arms(monkeypatch, tmp_path, patches):
    """The patches of the study do what the slow learner does in their place."""
    monkeypatch.syspath_prepend(ablation.programs(patches, tmp_path / "programs"))
    monkeypatch.delitem(sys.modules, "trajsep_ppo")
    script = importlib.import_module("trajsep_ppo")
    args = arguments(script, ARMS[patches])
    train_and_compare(monkeypatch, script, patches, args, tmp_path / "run", {})


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_sample_draws_from_the_probabilities(script):
    """Actions are as frequent as they are probable, and independent of one another."""
    torch.manual_seed(0)
    first = torch.tensor([0.5, 0.3, 0.2, 0.0])
    second = torch.tensor([0.25, 0.25, 0.25, 0.25])
    third = torch.tensor([0.01, 0.0, 0.9, 0.09])
    n = 40000
    probs = torch.stack([first, second, third]).expand(n, 3, 4)
    actions = script.sample(probs)
    assert actions.shape == (n, 3)
    assert (script.sample(probs) != actions).any()
    one, two, three = actions.unbind(-1)
    for drawn, expected in (
        (one, first),
        (two, second),
        (three, third),
        (4 * one + two, first.outer(second)),  # two entities
        (4 * one + one.roll(1), first.outer(first)),  # two teams
    ):
        expected = expected.flatten()
        frequency = torch.bincount(drawn, minlength=len(expected)) / n
        deviation = (expected * (1 - expected) / n).sqrt()
        assert ((frequency - expected).abs() <= 5 * deviation).all(), (frequency, expected)
