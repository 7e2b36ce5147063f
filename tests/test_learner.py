"""The learner of both scripts worked out a second time, slowly and plainly, and compared with what they do.

The first part is a toy game. The second is the whole method in loops over steps, teams and entities, in the order
in which things happen: reward, value, advantage, loss, gradient, Adam. It shares no code with the scripts but the
network, and it draws nothing: the actions are those that the game was given, and who is in which minibatch can be
read off the observations that the network was given. The third part trains with a script's own `train`, and compares
everything on the way up to the parameters after every update.

A *row* is (step, team) and a *cell* is (step, team, group), where steps count from the start of the training. Only
cells in which somebody lives exist here, so nothing can count an empty one.
"""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from in_double import double_precision
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import global_ppo
import trajsep_ppo
from hybrid_model import HybridNet


@pytest.fixture(autouse=True)
def in_double():
    with double_precision():
        yield


# ------------------------------------------------------------------------------------------------------
# A toy game
# ------------------------------------------------------------------------------------------------------

PLAYERS, SLOTS, ACTIONS, SIZE = 2, 5, 4, 8
KINDS = np.array([1, 1, 2, 3, 2])  # two factories, three robots
MATCH_LENGTHS = (8, 5, 1000)  # with rollouts of 8 steps the first match always ends with the last of them
GARBAGE = np.array([np.nan, 1e9, -1e9])


class ToyVecEnv:
    """Matches in which nobody can achieve anything, but all happens that a learner has to cope with.

    Entities are born and die, a slot serves one after another, sometimes a whole team is gone. Matches end with the
    last step of a rollout, or within it, or not at all, some by termination and some by truncation, and some slots are
    taken on both sides of the end. Robots change their cluster while they live. Rewards have both signs and follow
    a feature, so that there are values to learn. Empty slots are full of garbage. Observations and rewards are mostly
    written into the same arrays, so that nobody may keep them, and sometimes into new ones, so that nobody may wait.

    Every observation carries its step and its team in the first cell of the board. `diary` has for every step the
    observation, and the actions and rewards [B, E] and ends of matches [B] that followed.

    Args:
        num_envs: N, at most 3.
        group_by: "entity" or "cluster", as in the wrapper.
        births: chance of an empty slot to be filled.
        reward_scale: about the size of a reward.
    """

    metadata = {"name": "toy"}

    def __init__(self, num_envs, group_by, births=0.4, reward_scale=1.0):
        self.num_envs, self.group_by, self.births, self.reward_scale = num_envs, group_by, births, reward_scale
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
        self.rng, self.time, self.diary = np.random.default_rng(seed), 0, []
        self.live = self.rng.random(self.rewards.shape) < 2 * self.births
        self.live[-1, -1, 0] = True
        return self._observe(), {}

    def _observe(self):
        if self.time % 4 == 3:
            self.obs = {key: x.copy() for key, x in self.obs.items()}
        rng, live, obs, shape = self.rng, self.live, self.obs, self.rewards.shape
        obs["board"][:] = rng.integers(0, 101, obs["board"].shape)
        obs["board"][..., 0, 0, 0] = self.time
        obs["board"][..., 0, 0, 1] = np.arange(self.num_envs * PLAYERS).reshape(-1, PLAYERS)
        features, garbage = rng.normal(size=(*shape, 3)), rng.choice(GARBAGE, (*shape, 3))
        obs["features"][:] = np.where(live[..., None], features, garbage)
        obs["position"][:] = np.where(live[..., None], rng.integers(0, SIZE, (*shape, 2)), 10**9)
        obs["kind"][:] = np.where(live, KINDS, 0)
        slots = np.arange(SLOTS)
        cluster = np.where(KINDS == 1, slots, rng.integers(0, 2, shape))
        group = slots if self.group_by == "entity" else cluster
        obs["group"][:] = np.where(live, group, rng.integers(0, SLOTS, shape))
        obs["action_mask"][:] = rng.random((*shape, ACTIONS)) < 0.6
        obs["action_mask"][..., 1] |= ~obs["action_mask"].any(-1)  # somebody without any choice
        self.diary.append(SimpleNamespace(obs={key: self._of_teams(x) for key, x in obs.items()}, actions=None))
        return obs

    @staticmethod
    def _of_teams(x):
        """A copy of x [N, P, ...] as [B, ...]."""
        return x.reshape(-1, *x.shape[2:]).copy()

    def step(self, actions):
        rng, shape, now = self.rng, self.rewards.shape, self.diary[-1]
        allowed = np.take_along_axis(self.obs["action_mask"], actions[..., None], -1)[..., 0]
        assert allowed[self.live].all(), "a masked action was taken"
        self.time += 1
        earned = self.reward_scale * (0.2 + self.obs["features"][..., 0] + 0.5 * rng.normal(size=shape))
        self.rewards[:] = np.where(self.live, earned, rng.choice(GARBAGE, shape))
        ended = self.time % np.array(MATCH_LENGTHS[: self.num_envs]) == 0
        self.ends[:] = ended
        self.ends[np.arange(self.num_envs) % 2, np.arange(self.num_envs)] = False  # every match ends in one way
        now.actions, now.rewards = self._of_teams(actions), self._of_teams(self.rewards)
        now.ended = np.repeat(ended, PLAYERS)

        self.live = rng.random(shape) < np.where(self.live, 0.85, self.births)
        self.live[ended] = (rng.random(shape) < 2 * self.births)[ended]
        if self.time % 3 == 0:
            self.live[self.time % self.num_envs, self.time % PLAYERS] = False  # a team is wiped out
        self.live[-1, -1, 0] = True  # somebody is there at any time
        return self._observe(), self.rewards, *self.ends, {}

    def close(self):
        pass


# ------------------------------------------------------------------------------------------------------
# The slow learner
# ------------------------------------------------------------------------------------------------------


def members(separate, obs, team):
    """Who shares a trajectory in a team at one step: {group: slots of its living members}."""
    groups = {}
    for slot in range(SLOTS):
        if obs["kind"][team, slot] > 0:
            groups.setdefault(int(obs["group"][team, slot]) if separate else 0, []).append(slot)
    return groups


def shared(args):
    """What all groups of a team share, of critic, ratio, entropy and dones."""
    return getattr(args, "shared", ())


def outputs(args, separate, agent, diary, rows, learned=None):
    """What the network says of some rows: probabilities by (step, team, slot), and the rest by cell.

    It sees no entity of a cell that is not among those `learned` from, if these are given. A group has the product of
    its members' probabilities, so the sum of their logarithms, and the sum of their entropies. Its value is the mean of
    its members' values, or that of the team.
    """
    obs = {key: torch.as_tensor(np.stack([diary[t].obs[key][b] for t, b in rows])) for key in diary[0].obs}
    for i, (t, b) in enumerate(rows):
        for g, slots in members(separate, diary[t].obs, b).items():
            if learned is not None and (t, b, g) not in learned:
                obs["kind"][i, slots] = 0
    logits, values, team_values = agent(obs)
    says = SimpleNamespace(probabilities={}, logprob={}, entropy={}, value={}, team_value=team_values)
    for i, (t, b) in enumerate(rows):
        for g, slots in members(separate, diary[t].obs, b).items():
            if learned is not None and (t, b, g) not in learned:
                continue
            own = sum(values[i, e] for e in slots) / len(slots)
            says.value[t, b, g] = own if separate and "critic" not in shared(args) else team_values[i]
            says.logprob[t, b, g] = says.entropy[t, b, g] = 0
            for e in slots:
                allowed = np.flatnonzero(diary[t].obs["action_mask"][b, e]).tolist()
                logprobs = logits[i, e, allowed].log_softmax(-1)
                says.probabilities[t, b, e] = np.zeros(ACTIONS)
                says.probabilities[t, b, e][allowed] = logprobs.detach().exp()
                says.entropy[t, b, g] -= (logprobs.exp() * logprobs).sum()
                if diary[t].actions is not None:
                    says.logprob[t, b, g] += logprobs[allowed.index(diary[t].actions[b, e])]
    return says


def learn(args, separate, agent, diary, minibatches):
    """Train `agent` as a script with these arguments should, and yield (update, name, quantity) for all on the way.

    `minibatches[update][epoch]` is a list of minibatches, each a list of rows; `separate` is trajectory separation.
    """
    T, B = args.num_steps, args.num_envs * PLAYERS
    num_updates = args.total_timesteps // (args.num_envs * T)
    parameters = list(agent.parameters())
    first_moments, second_moments = ([torch.zeros_like(x) for x in parameters] for _ in range(2))
    adam_steps = 0

    for update in range(num_updates):
        # Schedules: what is annealed falls by the same amount in every update, and would reach its end after the last.
        left = 1 - update / num_updates
        learning_rate = args.learning_rate * (left if args.anneal_lr else 1)
        ent_coef = args.ent_coef * (left if args.anneal_ent else 1)
        positive_weight = 1 + (args.positive_reward_weight - 1) * left

        # Rollout: T steps, and the observation after them, whose values stand for all that comes later.
        start, end = update * T, update * T + T
        probabilities, value, old_logprob, team_worth = {}, {}, {}, {}
        for t in range(start, end + 1):
            with torch.no_grad():
                says = outputs(args, separate, agent, diary, [(t, b) for b in range(B)])
            value.update({cell: x.item() for cell, x in says.value.items()})
            team_worth.update({(t, b): x.item() for b, x in enumerate(says.team_value)})
            old_logprob.update(says.logprob)
            probabilities.update(says.probabilities)
        cells = [cell for cell in value if cell[0] < end]
        yield update, "probabilities", probabilities
        yield update, "value", value

        # Reward: a group earns what its members earn, where what is positive counts more at first. It gets a share of
        # its own earnings, and for the rest the mean over the groups that its team has in this step.
        reward = {}
        for t in range(start, end):
            for b in range(B):
                earned = {}
                for g, slots in members(separate, diary[t].obs, b).items():
                    paid = diary[t].rewards[b, slots].tolist()
                    earned[g] = sum(positive_weight * x if x > 0 else x for x in paid)
                for g in earned:
                    share = args.agent_reward_weight if separate else 1
                    reward[t, b, g] = share * earned[g] + (1 - share) * sum(earned.values()) / len(earned)
        yield update, "reward", reward

        # Advantage: how much more than its value a cell turned out to be worth. That is the sum of the errors
        # reward + gamma * next value - value in its own step and in every later one of the same life, each weighted
        # gamma * lambda times the one before. A life ends when its group has gone or its match is over, and after that
        # nothing has value. The end of the rollout only cuts it off: the next value is that of the observation after.
        # Where the team shares its ends, a slot goes on when its group has gone, with nothing or the team's value, up
        # to the end of the match.
        advantage, returns = {}, {}

        def worth(t, b, g):
            """Value of a cell, and of one in which nobody lives."""
            of_nobody = team_worth[t, b] if "critic" in shared(args) else 0
            return value.get((t, b, g), of_nobody)

        for t, b, g in cells:
            advantage[t, b, g], weight, s, goes_on = 0, 1, t, True
            while goes_on and s < end:
                goes_on = ((s + 1, b, g) in value or "dones" in shared(args)) and not diary[s].ended[b]
                next_value = worth(s + 1, b, g) if goes_on else 0
                error = reward.get((s, b, g), 0) + args.gamma * next_value - worth(s, b, g)
                advantage[t, b, g] += weight * error
                weight, s = weight * args.gamma * args.gae_lambda, s + 1
            returns[t, b, g] = advantage[t, b, g] + value[t, b, g]
        yield update, "advantage", advantage
        # Top samples: of each team's groups without a factory only the first few by their score are learned from.
        learned = set(cells)
        if getattr(args, "top_samples", 0):
            score = {"advantage": advantage, "return": returns}.get(args.top_by)
            score = score or {cell: abs(x) for cell, x in advantage.items()}
            for t, b in {cell[:2] for cell in cells}:
                groups = members(separate, diary[t].obs, b)
                robots = [(t, b, g) for g, slots in groups.items() if not any(KINDS[slots] == 1)]
                learned -= set(sorted(robots, key=score.get, reverse=True)[args.top_samples :])
        cells = sorted(learned)

        clipfracs = []
        for epoch in range(args.update_epochs):
            yield update, "epoch", epoch
            for rows in minibatches[update][epoch]:
                says = outputs(args, separate, agent, diary, rows, learned)
                n = len(says.value)
                mean = sum(advantage[cell] for cell in says.value) / n
                variance = sum((advantage[cell] - mean) ** 2 for cell in says.value) / n

                # Loss: means over the cells of the minibatch, every cell with a ratio and an advantage of its own.
                policy_loss = value_loss = entropy = approx_kl = clipfrac = torch.zeros(())
                signs_clipped = set()
                of_team = {row: [cell for cell in says.value if cell[:2] == row] for row in rows}
                for cell in says.value:
                    adv = advantage[cell]
                    if args.norm_adv:
                        adv = (adv - mean) / (variance**0.5 + 1e-8)
                    # Where the team shares its ratio or its entropy, every group has what all of them have together.
                    joint = {
                        name: of_team[cell[:2]] if name in shared(args) else [cell] for name in ("ratio", "entropy")
                    }
                    log_ratio = sum(says.logprob[other] - old_logprob[other] for other in joint["ratio"])
                    ratio = log_ratio.exp()
                    clipped_ratio = min(max(ratio.item(), 1 - args.clip_coef), 1 + args.clip_coef)
                    gain = ratio * adv
                    if clipped_ratio * adv < gain:  # no credit, and no gradient, for going further than the clip
                        gain = clipped_ratio * adv
                        signs_clipped.add(np.sign(adv))
                    policy_loss = policy_loss - gain / n
                    value_loss = value_loss + 0.5 * (says.value[cell] - returns[cell]) ** 2 / n
                    entropy = entropy + sum(says.entropy[other] for other in joint["entropy"]) / n
                    approx_kl = approx_kl + (ratio - 1 - log_ratio).detach() / n
                    clipfrac = clipfrac + (abs(ratio.item() - 1) > args.clip_coef) / n
                clipfracs.append(clipfrac.item())
                loss = policy_loss - ent_coef * entropy + args.vf_coef * value_loss

                # Gradient: that of all parameters together is scaled down to the norm max_grad_norm where it is larger.
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                norm = sum((x**2).sum().item() for x in gradients) ** 0.5
                gradients = [x * min(1, args.max_grad_norm / (norm + 1e-6)) for x in gradients]

                # Adam: a step along the running mean of the gradient, in units of the root of its running mean square.
                # Both begin at 0, and are divided by the weight of what they have seen since.
                adam_steps += 1
                for x, gradient, m, v in zip(parameters, gradients, first_moments, second_moments):
                    m.copy_(0.9 * m + (1 - 0.9) * gradient)
                    v.copy_(0.999 * v + (1 - 0.999) * gradient**2)
                    m_hat, v_hat = m / (1 - 0.9**adam_steps), v / (1 - 0.999**adam_steps)
                    x.data -= learning_rate * m_hat / (v_hat**0.5 + 1e-5)
                facts = {"cells": n, "signs_clipped": signs_clipped, "gradient_clipped": norm > args.max_grad_norm}
                yield update, "facts", facts
                yield update, "parameters", vector_of(agent)
            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        # Log: the losses of the last minibatch, and how much of the returns' variance the values explained.
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


# ------------------------------------------------------------------------------------------------------
# What the scripts do
# ------------------------------------------------------------------------------------------------------


def watch_training(monkeypatch, script, args, run_dir, toy):
    """Train with the script's own `train` on the toy game; returns what was seen on the way.

    parameters: all in one vector, at the start and after every step of Adam; minibatches: rows of each; sampled: the
    probabilities and actions of every step; gae: what compute_gae was given and has returned; logged: by name and step;
    most_robots: of a team that the network was given at a step of a minibatch.
    """
    seen = SimpleNamespace(parameters=[], minibatches=[], sampled=[], gae=[], logged={}, most_robots=0)

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

    def add_scalar(writer, name, x, step, *_, **__):
        seen.logged[name, step] = np.float64(x)

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
    """Minibatches in the order in which the network saw them, as [update][epoch][minibatch] of rows.

    In every epoch each row must come once, and each team equally often in every minibatch, with steps of its own.
    """
    T, B, M = args.num_steps, args.num_envs * PLAYERS, args.num_minibatches
    updates = [[] for _ in range(args.total_timesteps // (args.num_envs * T))]
    for i in range(0, len(minibatches), M):
        epoch = minibatches[i : i + M]
        update = min(t for t, _ in epoch[0]) // T
        updates[update].append(epoch)
        name = f"update {update + 1}, epoch {len(updates[update])}"
        assert sorted(sum(epoch, [])) == [(update * T + t, b) for t in range(T) for b in range(B)], name
        for rows in epoch:
            steps_of = [sorted(t for t, b in rows if b == team) for team in range(B)]
            assert all(len(steps) == T // M for steps in steps_of), name
            assert M == 1 or any(steps != steps_of[0] for steps in steps_of), f"{name}: all teams shuffled alike"
    shuffles = {tuple(frozenset(rows) for rows in epoch) for epochs in updates for epoch in epochs}
    assert M == 1 or len(shuffles) == sum(map(len, updates)), "the minibatches of two epochs are the same"
    return updates


def train_and_compare(monkeypatch, script, args, run_dir, toy):
    """Train with the script and slowly, and compare everything; returns the facts of all minibatches, and the epochs.

    Steps of Adam are compared one by one. Each starts where the script's did, so that rounding does not pile up.
    """
    seen = watch_training(monkeypatch, script, args, run_dir, toy)
    T, diary, minibatches = args.num_steps, seen.env.diary, arranged(args, seen.minibatches)
    if getattr(args, "top_samples", 0) and args.group_by == "entity":
        assert seen.most_robots == args.top_samples, "the network sees those who are not learned from"
    agent = HybridNet(seen.env.single_observation_space, ACTIONS)
    vector_to_parameters(seen.parameters[0].clone(), agent.parameters())
    facts, epochs = [], [0] * len(minibatches)

    for update, name, slow in learn(args, script is trajsep_ppo, agent, diary, minibatches):
        start, end = update * T, update * T + T
        here = f"{name} of update {update + 1}"
        if name == "probabilities":
            fast = {(t, b, e): seen.sampled[t][0][b, e] for t, b, e in slow if t < end}
            compare(f"{here} at (step, team, slot)", {key: slow[key] for key in fast}, fast)
            for t in range(start, end):
                assert (diary[t].actions == seen.sampled[t][1]).all(), f"actions of step {t} are others than drawn"
        elif name in ("value", "reward", "advantage"):
            rewards, values, active, advantages = seen.gae[update]
            array = {"value": values, "reward": rewards, "advantage": advantages}[name]
            if name == "value":
                exist = {(start + t, b, g) for t, b, g in np.argwhere(active).tolist()}
                if "dones" in shared(args):
                    assert len(exist) == active.size, "no slot ends before its match"
                else:
                    assert exist == slow.keys(), f"other cells (step, team, group) exist in update {update + 1}"
            compare(f"{here} at (step, team, group)", slow, {(t, b, g): array[t - start, b, g] for t, b, g in slow})
        elif name == "epoch":
            assert slow < len(minibatches[update]), f"update {update + 1} ends too early, after {slow} epochs"
            epochs[update] += 1
        elif name == "facts":
            facts.append(slow)
        elif name == "parameters":
            before, after = seen.parameters[len(facts) - 1], seen.parameters[len(facts)]
            off, length = (after - slow).norm().item(), (slow - before).norm().item()
            here += f", after its minibatch {len(facts) - args.num_minibatches * sum(epochs[:update])}"
            assert off <= 1e-9 * length, f"{here}: off by {off} in a step of length {length}"
            vector_to_parameters(after.clone(), agent.parameters())
        elif name == "log":
            assert epochs[update] == len(minibatches[update]), f"update {update + 1} ends too late"
            at = end * args.num_envs
            compare(here, slow, {key: seen.logged[key, at] for key in slow})
    return facts, epochs


def compare(name, slow, fast):
    """Two dicts of numbers or arrays, which differ by rounding alone."""
    for key, x in slow.items():
        assert (abs(fast[key] - x) <= 1e-10 * (1 + abs(x))).all(), f"{name}, {key}: {fast[key]} instead of {x}"


# ------------------------------------------------------------------------------------------------------
# The tests
# ------------------------------------------------------------------------------------------------------

# With this learning rate ratios soon leave what is not clipped. Of every switch there is a case on either side.
BASE = {
    **{"seed": 1, "cuda": False, "num_envs": 3, "num_steps": 8, "total_timesteps": 3 * 3 * 8},
    **{"num_minibatches": 4, "update_epochs": 3, "learning_rate": 1e-2, "clip_coef": 0.1, "max_grad_norm": 1.5},
    **{"gamma": 0.9, "gae_lambda": 0.6, "ent_coef": 0.2, "vf_coef": 0.8, "positive_reward_weight": 1.3},
}
CLUSTER = {"group_by": "cluster"}
ANY_GRADIENT, SAME_LR, SAME_ENT = {"max_grad_norm": 1000.0}, {"anneal_lr": False}, {"anneal_ent": False}
CASES = {  # script, options, options of the toy game
    "entity": (trajsep_ppo, {"agent_reward_weight": 0.8}, {}),
    "own reward": (trajsep_ppo, {"agent_reward_weight": 1.0, "norm_adv": False} | ANY_GRADIENT, {}),
    "mean reward": (trajsep_ppo, {"agent_reward_weight": 0.0} | SAME_LR, {}),
    "cluster": (trajsep_ppo, {"agent_reward_weight": 0.8} | CLUSTER, {}),
    "shared critic": (trajsep_ppo, {"shared": ("critic",)} | CLUSTER | ANY_GRADIENT, {}),
    "shared ratio": (trajsep_ppo, {"shared": ("ratio",), "num_minibatches": 2} | SAME_ENT, {}),
    "shared entropy": (trajsep_ppo, {"shared": ("entropy",)}, {}),
    "shared dones": (trajsep_ppo, {"shared": ("dones",)}, {}),
    "shared dones and critic": (trajsep_ppo, {"shared": ("dones", "critic")}, {}),
    "all shared": (trajsep_ppo, {"shared": ("critic", "ratio", "entropy", "dones")} | CLUSTER, {}),
    "top advantage": (trajsep_ppo, {"top_samples": 1, "top_by": "advantage"}, {}),
    "top abs-advantage": (trajsep_ppo, {"top_samples": 1, "top_by": "abs-advantage"}, {}),
    "top 2 return": (trajsep_ppo, {"top_samples": 2, "top_by": "return"}, {}),
    "top of clusters": (trajsep_ppo, {"top_samples": 1} | CLUSTER, {}),
    "target_kl": (trajsep_ppo, {"target_kl": 0.015}, {}),
    "one minibatch": (trajsep_ppo, {"num_minibatches": 1, "learning_rate": 3e-2} | ANY_GRADIENT, {}),
    "small rewards": (trajsep_ppo, {"positive_reward_weight": 1.0, "max_grad_norm": 0.5}, {"reward_scale": 1e-4}),
    "hardly anybody": (trajsep_ppo, {"num_minibatches": 8}, {"births": 0.01}),
    "team": (global_ppo, {"max_grad_norm": 10.0}, {}),
    "team, small rewards": (global_ppo, {"positive_reward_weight": 1.0} | SAME_LR, {"reward_scale": 1e-4}),
    "team, not normalized": (global_ppo, {"norm_adv": False} | ANY_GRADIENT | SAME_ENT, {}),
    "team, target_kl": (global_ppo, {"target_kl": 0.1}, {}),
    "team, hardly anybody": (global_ppo, {"num_minibatches": 8}, {"births": 0.01}),
}


def with_small_values(net, obs, forward=HybridNet.forward):
    logits, value, team_value = forward(net, obs)
    return logits, value / 1000, team_value / 1000


@pytest.mark.parametrize("case", CASES)
def test_learner(monkeypatch, tmp_path, case):
    """Every quantity of a training is what the slow learner finds, and what the case is there for has happened."""
    script, options, toy = CASES[case]
    args = script.Args(**BASE | options)
    if "reward_scale" in toy:  # advantages so small that the epsilon of their normalization counts
        monkeypatch.setattr(HybridNet, "forward", with_small_values)
    facts, epochs = train_and_compare(monkeypatch, script, args, tmp_path, toy)

    assert set.union(*(fact["signs_clipped"] for fact in facts)) == {1, -1}, "ratios are clipped for both signs"
    gradient_clipped, cells = ({fact[name] for fact in facts} for name in ("gradient_clipped", "cells"))
    assert (True in gradient_clipped) == (args.max_grad_norm < 100), "gradients are clipped somewhere, or nowhere"
    if case in ("entity", "team"):
        assert False in gradient_clipped, "some gradients are not clipped"
    if args.target_kl is not None:
        assert min(epochs) < args.update_epochs == max(epochs), f"some updates end early and others do not: {epochs}"
    if "births" in toy:
        assert 1 in cells, "in some minibatch there is nobody else, and the advantages have no variance"


def test_all_happens_in_the_toy_game():
    """What the comparison relies on does happen within three rollouts."""
    env = ToyVecEnv(3, "cluster")
    env.reset(seed=BASE["seed"])
    for _ in range(24):
        env.step(env.obs["action_mask"].argmax(-1))
    live, group, mask = (np.array([now.obs[key] for now in env.diary]) for key in ("kind", "group", "action_mask"))
    live = live > 0
    rewards, ended = (np.array([getattr(now, name) for now in env.diary[:-1]]) for name in ("rewards", "ended"))
    before, after, over = live[:-1], live[1:], ended[..., None]
    assert (~before & after & ~over).any() and (before & ~after & ~over).any(), "births and deaths"
    assert (before & after & over).any(), "a slot that is taken on both sides of the end of a match"
    assert (before & after & ~over & (group[1:] != group[:-1])).any(), "a robot that changes its cluster"
    assert all(last.any() and not last.all() for last in ended[7::8]), "rollouts end with some matches"
    assert ended[:7].any() and not live.any(-1).all(), "the end of a match within a rollout, and of a team"
    assert (rewards[before] > 0).any() and (rewards[before] < 0).any() and np.isnan(rewards[~before]).any()
    assert (mask[live].sum(-1) == 1).any(), "somebody without a choice"


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_sample_draws_from_the_probabilities(script):
    """Actions are as frequent as they are probable, never those of probability 0, and independent of one another."""
    torch.manual_seed(0)
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 1.0, 0.0], [0.25] * 4, [0.01, 0.0, 0.9, 0.09]])
    n = 40000
    actions = script.sample(probs.expand(n, 4, 4))
    assert actions.shape == (n, 4) and (script.sample(probs.expand(n, 4, 4)) != actions).any()

    def check(drawn, probs):
        frequency = torch.bincount(drawn, minlength=len(probs)) / n
        assert ((frequency - probs).abs() <= 5 * (probs * (1 - probs) / n).sqrt()).all(), (frequency, probs)

    for entity in range(4):
        check(actions[:, entity], probs[entity])
    check(4 * actions[:, 0] + actions[:, 2], probs[0].outer(probs[2]).flatten())  # two entities of a team
    check(4 * actions[:, 0] + actions[:, 0].roll(1), probs[0].outer(probs[0]).flatten())  # two teams


class EverybodyLives(ToyVecEnv):
    """The toy game without births and deaths: every slot is taken at any time."""

    def _observe(self):
        self.live[:] = True
        return super()._observe()


def test_everything_shared_is_the_baseline(monkeypatch, tmp_path):
    """trajsep_ppo.py with everything shared trains as global_ppo.py does, where teams have the same number of groups.

    Its reward is the mean over a team's groups, not the sum, so here it is multiplied by their number. And its losses
    are means over cells, so teams with more groups count more; here all have as many.
    """
    shared = ("critic", "ratio", "entropy", "dones")
    monkeypatch.setattr("test_learner.ToyVecEnv", EverybodyLives)
    separate, team = (
        watch_training(monkeypatch, script, script.Args(**BASE | options), tmp_path / name, {"reward_scale": scale})
        for name, script, options, scale in (
            ("separate", trajsep_ppo, {"shared": shared, "agent_reward_weight": 0.0}, SLOTS * 0.1),
            ("team", global_ppo, {}, 0.1),
        )
    )
    for (_, actions), (_, others) in zip(separate.sampled, team.sampled):
        assert (actions == others).all()
    assert separate.minibatches == team.minibatches and separate.logged.keys() == team.logged.keys()
    for key, x in separate.logged.items():
        if key[0] != "charts/SPS":
            assert x == pytest.approx(team.logged[key], rel=1e-9, abs=1e-10), key
    torch.testing.assert_close(separate.parameters[-1], team.parameters[-1], rtol=1e-9, atol=1e-9)
    assert (separate.parameters[-1] - separate.parameters[0]).norm() > 1
