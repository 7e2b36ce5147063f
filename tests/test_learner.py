"""The learner of both scripts worked out a second time, slowly and plainly, and compared.

The first part is a toy game. The second is the whole method in loops over steps, teams and
entities, in the order in which things happen: reward, value, advantage, loss, gradient, Adam. It
shares only the network with the scripts, and it draws nothing: it reads the actions off the game,
and the minibatches off the observations that the network receives. The third part trains with a
script's own `train`, and compares everything up to the parameters after each minibatch.

All is in double precision, so the comparison is as exact on any processor, and a training takes
the same course there. What trajsep_ppo.py shares in an arm of the study comes from its patch.

A *row* is (step, team) and a *cell* is (step, team, group); steps count from the start of the
training. Only cells in which an entity lives exist here, so no empty one can be counted.
"""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from in_double import double_precision
from torch.nn.utils import parameters_to_vector, vector_to_parameters

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmark"))

import ablation  # noqa: E402  (after the path to it)

import global_ppo  # noqa: E402
import trajsep_ppo  # noqa: E402
from hybrid_model import HybridNet  # noqa: E402


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

    Entities are born and die, slots are used again, sometimes a whole team is gone. Matches end
    with the last step of a rollout, or within it, or not at all, by termination or truncation, and
    some slots are taken on both sides of the end. Robots change their cluster while they live.
    Rewards have both signs and follow a feature, so that there are values to learn. Empty slots
    are full of garbage. Observations and rewards are mostly written into the same arrays, so
    they must be copied, and sometimes into new ones, so they must be read each time.

    Every observation carries its step and its team in the first cell of the board. `diary` has for
    each step the observation, and the actions and rewards [B, E] and ends of matches [B] after it.

    Args:
        num_envs: N, at most 3.
        group_by: "entity" or "cluster", as in the wrapper.
        births: chance of an empty slot to be filled.
        reward_scale: about the size of a reward.
    """

    metadata = {"name": "toy"}

    def __init__(self, num_envs, group_by, births=0.4, reward_scale=1.0):
        self.num_envs, self.group_by = num_envs, group_by
        self.births, self.reward_scale = births, reward_scale
        shape = (num_envs, PLAYERS, SLOTS)
        self.obs = {
            "board": np.zeros((num_envs, PLAYERS, SIZE, SIZE, 2), np.uint8),
            "features": np.zeros((*shape, 3)),
            "position": np.zeros((*shape, 2), np.int64),
            "kind": np.zeros(shape, np.int64),
            "group": np.zeros(shape, np.int64),
            "action_mask": np.zeros((*shape, ACTIONS), bool),
        }
        self.rewards = np.zeros(shape)
        self.ends = np.zeros((2, num_envs), bool)  # terminated, truncated
        spaces = {key: gym.spaces.Box(-np.inf, np.inf, x.shape[1:]) for key, x in self.obs.items()}
        self.single_observation_space = gym.spaces.Dict(spaces)
        self.single_action_space = gym.spaces.MultiDiscrete(np.full(shape[1:], ACTIONS))

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.time = 0
        self.diary = []
        self.live = self.rng.random(self.rewards.shape) < 2 * self.births
        self.live[-1, -1, 0] = True
        return self._observe(), {}

    def _observe(self):
        if self.time % 4 == 3:
            self.obs = {key: x.copy() for key, x in self.obs.items()}
        rng, live, obs = self.rng, self.live, self.obs
        shape = live.shape
        obs["board"][:] = rng.integers(0, 101, obs["board"].shape)
        obs["board"][..., 0, 0, 0] = self.time
        obs["board"][..., 0, 0, 1] = np.arange(self.num_envs * PLAYERS).reshape(-1, PLAYERS)
        features = rng.normal(size=(*shape, 3))
        garbage = rng.choice(GARBAGE, features.shape)
        obs["features"][:] = np.where(live[..., None], features, garbage)
        obs["position"][:] = np.where(live[..., None], rng.integers(0, SIZE, (*shape, 2)), 10**9)
        obs["kind"][:] = np.where(live, KINDS, 0)
        slots = np.arange(SLOTS)
        cluster = np.where(KINDS == 1, slots, rng.integers(0, 2, shape))
        group = slots if self.group_by == "entity" else cluster
        obs["group"][:] = np.where(live, group, rng.integers(0, SLOTS, shape))
        obs["action_mask"][:] = rng.random((*shape, ACTIONS)) < 0.6
        obs["action_mask"][..., 1] |= ~obs["action_mask"].any(-1)  # some have only one choice
        seen = {key: of_teams(x) for key, x in obs.items()}
        self.diary.append(SimpleNamespace(obs=seen, actions=None))
        return obs

    def step(self, actions):
        rng = self.rng
        shape = self.live.shape
        mask = self.obs["action_mask"]
        allowed = np.take_along_axis(mask, actions[..., None], -1)[..., 0]
        assert allowed[self.live].all(), "a masked action was taken"
        self.time += 1
        earned = 0.2 + self.obs["features"][..., 0] + 0.5 * rng.normal(size=shape)
        garbage = rng.choice(GARBAGE, shape)
        self.rewards[:] = np.where(self.live, self.reward_scale * earned, garbage)
        ended = self.time % np.array(MATCH_LENGTHS[: self.num_envs]) == 0
        matches = np.arange(self.num_envs)
        self.ends[:] = ended
        self.ends[matches % 2, matches] = False  # every match ends in one way
        now = self.diary[-1]
        now.actions = of_teams(actions)
        now.rewards = of_teams(self.rewards)
        now.ended = np.repeat(ended, PLAYERS)

        self.live = rng.random(shape) < np.where(self.live, 0.85, self.births)
        self.live[ended] = (rng.random(shape) < 2 * self.births)[ended]
        if self.time % 3 == 0:
            self.live[self.time % self.num_envs, self.time % PLAYERS] = False  # a whole team
        self.live[-1, -1, 0] = True  # at any time there is an entity
        return self._observe(), self.rewards, *self.ends, {}

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
    first_moments = [torch.zeros_like(x) for x in parameters]
    second_moments = [torch.zeros_like(x) for x in parameters]
    adam_steps = 0

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
            old_logprob.update(says.logprob)
            probabilities.update(says.probabilities)
        cells = [cell for cell in value if cell[0] < end]
        yield update, "probabilities", probabilities
        yield update, "value", value

        # Reward: a group earns what its members earn, where positive rewards count more at first.
        # It gets a share of it, and for the rest the mean over the team's groups in this step.
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
        yield update, "reward", reward

        # Advantage: how much more than its value a cell turned out to be worth. It is the sum of
        # the errors reward + gamma * next value - value, in its step and in each later one of the
        # same life, each weighted gamma * lambda times the one before. A life ends with its group
        # or its match, and nothing has value after that. The end of a rollout only cuts it off:
        # the next value is the next observation's. With shared ends a slot continues without its
        # group, with the value 0 or the team's, up to the end of the match.
        advantage, returns = {}, {}

        def worth(t, b, g):
            """Value of a cell, and of one in which nothing lives."""
            of_empty = team_value[t, b] if "global-critic" in method.patches else 0
            return value.get((t, b, g), of_empty)

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
            score = returns if "top-1-return" in method.patches else advantage
            if "top-1-abs" in method.patches:
                score = {cell: abs(x) for cell, x in advantage.items()}
            for t, b in {cell[:2] for cell in cells}:
                groups = members(method.separate, diary[t].obs, b)
                robots = [(t, b, g) for g, slots in groups.items() if not any(KINDS[slots] == 1)]
                learned -= set(sorted(robots, key=score.get, reverse=True)[args.top_samples :])
        cells = sorted(learned)

        clipfracs = []
        for epoch in range(args.update_epochs):
            yield update, "epoch", epoch
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
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                norm = sum((x**2).sum().item() for x in gradients) ** 0.5
                gradients = [x * min(1, args.max_grad_norm / (norm + 1e-6)) for x in gradients]

                # Adam: a step along the running mean of the gradient, divided by the root of its
                # running mean square. Both begin at 0, and are divided by the weight so far.
                adam_steps += 1
                for x, gradient, m, v in zip(parameters, gradients, first_moments, second_moments):
                    m.copy_(0.9 * m + (1 - 0.9) * gradient)
                    v.copy_(0.999 * v + (1 - 0.999) * gradient**2)
                    m_hat = m / (1 - 0.9**adam_steps)
                    v_hat = v / (1 - 0.999**adam_steps)
                    x.data -= learning_rate * m_hat / (v_hat**0.5 + 1e-5)
                facts = SimpleNamespace(cells=n, signs_clipped=signs_clipped)
                facts.gradient_clipped = norm > args.max_grad_norm
                yield update, "facts", facts
                yield update, "parameters", vector_of(agent)
            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        # Log: losses of the last minibatch, and the share of the returns' variance explained.
        error = [returns[cell] - value[cell] for cell in cells]
        log = {
            "charts/learning_rate": learning_rate,
            "charts/ent_coef": ent_coef,
            "losses/policy_loss": policy_loss.item(),
            "losses/value_loss": value_loss.item(),
            "losses/entropy": entropy.item(),
            "losses/approx_kl": approx_kl.item(),
            "losses/grad_norm": norm,
            "losses/clipfrac": sum(clipfracs) / len(clipfracs),
            "losses/explained_variance": 1 - np.var(error) / np.var([returns[cell] for cell in cells]),
        }
        yield update, "log", log


# -- What the scripts do -------------------------------------------------------------------


def watch_training(monkeypatch, script, args, run_dir, toy):
    """Train with the script's own `train` on the toy game; returns what was seen on the way.

    parameters: all in one vector, at the start and after each step of Adam
    minibatches: rows of each
    sampled: probabilities and actions of each step
    gae: arguments and result of compute_gae
    logged: by name and step
    most_robots: of a team in the network's input, at a step of a minibatch
    """
    seen = SimpleNamespace(parameters=[], minibatches=[], sampled=[], gae=[], logged={})
    seen.most_robots = 0

    def make_envs(args, num_envs, **_):
        seen.env = ToyVecEnv(num_envs, getattr(args, "group_by", "entity"), **toy)
        return seen.env

    def forward(net, obs, forward=HybridNet.forward):
        if torch.is_grad_enabled():
            seen.most_robots = max(seen.most_robots, (obs["kind"] > 1).sum(-1).max().item())
            seen.minibatches.append([tuple(row) for row in obs["board"][:, 0, 0].tolist()])
            seen.parameters.append(vector_of(net))
        return forward(net, obs)

    def sample(probs, sample=script.sample):
        actions = sample(probs)
        seen.sampled.append((probs.numpy().copy(), actions.numpy().copy()))
        return actions

    def compute_gae(rewards, values, active, *rest, compute_gae=script.compute_gae):
        advantages = compute_gae(rewards, values, active, *rest)
        seen.gae.append([x.numpy().copy() for x in (rewards, values, active, advantages)])
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
    for i in range(0, len(minibatches), M):
        epoch = minibatches[i : i + M]
        update = min(t for t, _ in epoch[0]) // T
        updates[update].append(epoch)
        name = f"update {update + 1}, epoch {len(updates[update])}"
        rows_of_update = [(update * T + t, b) for t in range(T) for b in range(B)]
        assert sorted(sum(epoch, [])) == rows_of_update, name
        for rows in epoch:
            steps_of = [sorted(t for t, b in rows if b == team) for team in range(B)]
            assert all(len(steps) == T // M for steps in steps_of), name
            alike = all(steps == steps_of[0] for steps in steps_of)
            assert M == 1 or not alike, f"{name}: all teams shuffled alike"
    epochs = sum(updates, [])
    shuffles = {tuple(frozenset(rows) for rows in epoch) for epoch in epochs}
    assert M == 1 or len(shuffles) == len(epochs), "the minibatches of two epochs are the same"
    return updates


def train_and_compare(monkeypatch, script, patches, args, run_dir, toy):
    """Train with the script and slowly, and compare; returns facts of all minibatches, and epochs.

    Steps of Adam are compared one by one. Each starts where the script's did, so that rounding
    does not pile up.
    """
    seen = watch_training(monkeypatch, script, args, run_dir, toy)
    T = args.num_steps
    diary = seen.env.diary
    minibatches = arranged(args, seen.minibatches)
    if "top-1" in patches and args.group_by == "entity":
        assert seen.most_robots == args.top_samples, "the network sees robots not learned from"
    agent = HybridNet(seen.env.single_observation_space, ACTIONS)
    vector_to_parameters(seen.parameters[0].clone(), agent.parameters())
    facts = []
    epochs = [0] * len(minibatches)
    method = SimpleNamespace(separate=script is not global_ppo, patches=patches)

    for update, name, slow in learn(args, method, agent, diary, minibatches):
        start, end = update * T, update * T + T
        here = f"{name} of update {update + 1}"
        if name == "probabilities":
            fast = {(t, b, e): seen.sampled[t][0][b, e] for t, b, e in slow if t < end}
            compare(f"{here} at (step, team, slot)", {key: slow[key] for key in fast}, fast)
            for t in range(start, end):
                assert (diary[t].actions == seen.sampled[t][1]).all(), f"other actions in step {t}"
        elif name in ("value", "reward", "advantage"):
            rewards, values, active, advantages = seen.gae[update]
            array = {"value": values, "reward": rewards, "advantage": advantages}[name]
            if name == "value":
                exist = {(start + t, b, g) for t, b, g in np.argwhere(active).tolist()}
                if "shared-dones" in patches:
                    assert len(exist) == active.size, "no slot ends before its match"
                else:
                    assert exist == slow.keys(), f"other cells exist in update {update + 1}"
            fast = {(t, b, g): array[t - start, b, g] for t, b, g in slow}
            compare(f"{here} at (step, team, group)", slow, fast)
        elif name == "epoch":
            assert slow < len(minibatches[update]), f"update {update + 1} ends too early"
            epochs[update] += 1
        elif name == "facts":
            facts.append(slow)
        elif name == "parameters":
            before, after = seen.parameters[len(facts) - 1 : len(facts) + 1]
            off = (after - slow).norm()
            length = (slow - before).norm()
            here += f", minibatch {len(facts)} of all: off by {off} in a step of length {length}"
            assert off <= 1e-9 * length, here
            vector_to_parameters(after.clone(), agent.parameters())
        elif name == "log":
            assert epochs[update] == len(minibatches[update]), f"update {update + 1} ends too late"
            compare(here, slow, {key: seen.logged[key, end * args.num_envs] for key in slow})
    return facts, epochs


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
    "team, target_kl": "--target-kl 0.1",
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
    path = ablation.programs(patches, tmp_path / "programs") / "trajsep_ppo.py"
    spec = importlib.util.spec_from_file_location("patched", path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "patched", script)
    spec.loader.exec_module(script)
    args = arguments(script, ARMS[patches])
    train_and_compare(monkeypatch, script, patches, args, tmp_path / "run", {})


def test_all_happens_in_the_toy_game():
    """What the comparison relies on does happen within three rollouts."""
    env = ToyVecEnv(3, "cluster")
    env.reset(seed=1)
    for _ in range(24):
        env.step(env.obs["action_mask"].argmax(-1))
    live = np.array([now.obs["kind"] for now in env.diary]) > 0
    group = np.array([now.obs["group"] for now in env.diary])
    mask = np.array([now.obs["action_mask"] for now in env.diary])
    rewards = np.array([now.rewards for now in env.diary[:-1]])
    ended = np.array([now.ended for now in env.diary[:-1]])
    before, after, over = live[:-1], live[1:], ended[..., None]
    assert (~before & after & ~over).any(), "births"
    assert (before & ~after & ~over).any(), "deaths"
    assert (before & after & over).any(), "a slot that is taken on both sides of a match's end"
    changed = group[1:] != group[:-1]
    assert (before & after & ~over & changed).any(), "a robot that changes its cluster"
    assert all(last.any() and not last.all() for last in ended[7::8]), "matches end with rollouts"
    assert ended[:7].any(), "a match ends within a rollout"
    assert not live.any(-1).all(), "a whole team is gone"
    assert (rewards[before] > 0).any() and (rewards[before] < 0).any()
    assert np.isnan(rewards[~before]).any()
    assert (mask[live].sum(-1) == 1).any(), "an entity without a choice"


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_sample_draws_from_the_probabilities(script):
    """Actions are as frequent as they are probable, and independent of one another."""
    torch.manual_seed(0)
    first = [0.5, 0.3, 0.2, 0.0]
    third = [0.25, 0.25, 0.25, 0.25]
    probs = torch.tensor([first, [0.0, 0.0, 1.0, 0.0], third, [0.01, 0.0, 0.9, 0.09]])
    n = 40000
    actions = script.sample(probs.expand(n, 4, 4))
    assert actions.shape == (n, 4)
    assert (script.sample(probs.expand(n, 4, 4)) != actions).any()

    def check(drawn, probs):
        frequency = torch.bincount(drawn, minlength=len(probs)) / n
        deviation = (probs * (1 - probs) / n).sqrt()
        assert ((frequency - probs).abs() <= 5 * deviation).all(), (frequency, probs)

    for entity in range(4):
        check(actions[:, entity], probs[entity])
    first_team = actions[:, 0]
    check(4 * first_team + actions[:, 2], probs[0].outer(probs[2]).flatten())  # two entities
    check(4 * first_team + first_team.roll(1), probs[0].outer(probs[0]).flatten())  # two teams
