"""Training on a toy game with the wrapper's interface: credit per entity, and nothing from empty slots."""

import numpy as np
import pytest
import torch
from in_double import double_precision
from toy_env import COLOURS, LENGTH, SIZE, ToyVecEnv

import global_ppo
import trajsep_ppo

PLAYERS = 2


@pytest.fixture(autouse=True)
def in_double():
    with double_precision():
        yield


class HardToy(ToyVecEnv):
    """The toy of examples/, made as hard for a script as the contract allows.

    The first worker of a team is of another kind. Empty slots are full of garbage, their rewards NaN. Arrays are
    written again at every step, as the wrapper does, and matches do not end together.

    Args:
        num_envs, slots: N and, without padding, E.
        padding: slots more in which nobody ever is.
        clusters: how many groups share the slots; as many as slots by default.
        penalty: what a wrong button costs, in shares of what the right one earns.
        diary: a list that gets (kind, rewards, terminated) of every step.
    """

    def __init__(self, num_envs, slots=16, padding=0, clusters=None, penalty=0.0, diary=None):
        super().__init__(num_envs, slots + padding)
        self.penalty, self.diary = penalty, [] if diary is None else diary
        spaces = {key: (num_envs, *space.shape) for key, space in self.single_observation_space.items()}
        self.obs = {
            "board": np.zeros(spaces["board"], np.uint8),
            "features": np.full(spaces["features"], np.nan),
            "position": np.full(spaces["position"], SIZE - 1),
            "kind": np.zeros(spaces["kind"], np.int64),
            "group": np.broadcast_to(np.arange(slots + padding) % (clusters or slots + padding), self.shape).copy(),
            "action_mask": np.ones(spaces["action_mask"], bool),
        }
        self.rewards = np.full(self.shape, np.nan)
        self.shape = (num_envs, PLAYERS, slots)  # of those in which the toy is played

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = np.arange(self.num_envs) % LENGTH
        return self.obs, {}

    def step(self, actions):
        live, actions = self.live, actions[..., : self.shape[2]]
        wrong, kind = live & (actions != self.colour), self.obs["kind"].copy()
        _, rewards, *others = super().step(actions)
        paid = np.where(live, rewards - self.penalty * wrong / self.shape[2], np.nan)
        self.rewards[..., : self.shape[2]] = paid
        self.diary.append((kind, self.rewards.copy(), others[0].copy()))
        return self.obs, self.rewards, *others

    def _observe(self):
        seen = super()._observe()
        self.obs["board"][:] = seen["board"]
        own = (slice(None), slice(None), slice(self.shape[2]))
        self.obs["features"][own] = np.where(self.live[..., None], seen["features"], np.nan)
        self.obs["position"][own] = seen["position"]
        self.obs["kind"][own] = self.live * np.where(np.arange(self.shape[2]) == 0, 1, 2)
        return self.obs


def train_on_toy(monkeypatch, script, run_dir, toy=None, **options):
    """The agent that a script's own `train` makes of the toy game. All that matters is set here, not by defaults."""
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs, **_: HardToy(num_envs, **(toy or {})))
    settings = {
        **{"cuda": False, "num_envs": 4, "num_steps": 20, "num_minibatches": 4, "update_epochs": 4},
        **{"learning_rate": 2e-3, "anneal_lr": True, "gamma": 0.9, "gae_lambda": 0.95, "clip_coef": 0.2},
        **{"ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5, "norm_adv": True, "target_kl": None},
        **{"positive_reward_weight": 1.0},
    }
    if script is trajsep_ppo:
        settings["agent_reward_weight"] = 0.8
    run_dir.mkdir(parents=True)
    return script.train(script.Args(**(settings | options)), str(run_dir), torch.device("cpu"))


def accuracy(agent):
    """Mean probability of the right button over the live entities of fresh observations."""
    env = HardToy(50)
    obs, _ = env.reset(seed=12345)
    tensors = {key: torch.as_tensor(x).flatten(0, 1) for key, x in obs.items()}
    with torch.no_grad():
        probability = agent(tensors)[0].softmax(-1).view(50, PLAYERS, 16, COLOURS).numpy()
    right = np.take_along_axis(probability, env.colour[..., None], -1)[..., 0]
    return right[env.live].mean()


def test_separate_trajectories_learn_faster(monkeypatch, tmp_path):
    """With the same budget of 1,200 steps each entity has learned its own choice, while the team's sum has not told."""
    for seed in (1, 2, 3):
        reached = {}
        for script in (trajsep_ppo, global_ppo):
            run_dir = tmp_path / f"{script.__name__}_{seed}"
            agent = train_on_toy(monkeypatch, script, run_dir, seed=seed, total_timesteps=1200)
            reached[script] = accuracy(agent)
        print(seed, {script.__name__: round(float(share), 3) for script, share in reached.items()})
        assert reached[trajsep_ppo] > 0.8, "separated trajectories must have learned (chance is 0.25)"
        assert reached[trajsep_ppo] > reached[global_ppo] + 0.15


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_the_rollout_is_what_was_played(monkeypatch, tmp_path, script, weight):
    """Who was there, what they got and which matches ended reach the advantages at the right team and step.

    Positive rewards count more at first: here 1.5 times in the first of three updates, then 4/3 and 7/6 times.
    """
    seen, diary, compute_gae = [], [], script.compute_gae

    def spy(rewards, values, active, dones, *args):
        seen.append([x.clone() for x in (rewards, active, dones)])
        return compute_gae(rewards, values, active, dones, *args)

    monkeypatch.setattr(script, "compute_gae", spy)
    options = {"agent_reward_weight": 1.0} if script is trajsep_ppo else {}
    toy = {"slots": 5, "penalty": 0.5, "diary": diary}
    options |= {"total_timesteps": 3 * 4 * 20, "positive_reward_weight": weight}
    train_on_toy(monkeypatch, script, tmp_path / "run", toy, seed=1, **options)

    assert len(seen) == 3 and len(diary) == 60
    kinds = torch.as_tensor(np.array([kind for kind, _, _ in diary])).flatten(1, 2)
    paid = torch.as_tensor(np.array([rewards for _, rewards, _ in diary])).flatten(1, 2)
    ended = torch.as_tensor(np.array([terminated for _, _, terminated in diary]))
    assert (paid > 0).any() and (paid < 0).any() and ended.any() and not ended.all(1).any()
    for update, (rewards, active, dones) in enumerate(seen):
        steps = slice(20 * update, 20 * update + 20)
        factor = 1 + (weight - 1) * (1 - update / 3)
        expected = torch.where(kinds[steps] > 0, torch.where(paid[steps] > 0, factor * paid[steps], paid[steps]), 0)
        present = kinds[20 * update : 20 * update + 21] > 0
        if script is global_ppo:
            expected, present = expected.sum(-1, keepdim=True), present.any(-1, keepdim=True)
        torch.testing.assert_close(rewards, expected)
        assert torch.equal(active[: len(present)], present) and len(active) == 21
        assert torch.equal(dones, torch.stack([ended[steps]] * PLAYERS, -1).flatten(1))


def slotwise_sample(seed):
    """The scripts' `sample`, but with the same random numbers for a slot however many slots there are."""
    generator = torch.Generator().manual_seed(seed)

    def sample(probs):
        *batch, slots, choices = probs.shape
        noise = torch.empty(*batch, 64, choices).exponential_(generator=generator)
        return (probs / noise[..., :slots, :]).argmax(-1)

    return sample


@pytest.mark.parametrize(
    "script, clusters, options",
    [
        (trajsep_ppo, None, {}),
        (trajsep_ppo, 3, {}),
        (trajsep_ppo, None, {"shared": ("critic", "ratio", "entropy", "dones")}),
        (global_ppo, None, {}),
    ],
)
def test_empty_slots_count_for_nothing(monkeypatch, tmp_path, script, clusters, options):
    """Six more slots, always empty and full of NaN, leave the trained parameters as they are.

    Any mean, normalisation, entropy, ratio or value loss that took empty slots in would show here.
    """
    parameters = []
    for padding in (0, 6):
        monkeypatch.setattr(script, "sample", slotwise_sample(seed=0))
        toy = {"slots": 6, "padding": padding, "clusters": clusters}
        agent = train_on_toy(monkeypatch, script, tmp_path / str(padding), toy, seed=1, total_timesteps=240, **options)
        parameters.append(torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]))
    assert parameters[0].isfinite().all()
    torch.testing.assert_close(*parameters, atol=1e-10, rtol=1e-10)
