"""The arithmetic of both scripts on numbers worked out by hand, and GAE against a slow and obvious loop."""

import numpy as np
import pytest
import torch

import global_ppo
import trajsep_ppo
from trajsep_ppo import compute_gae, group_value, share_reward

NAN = float("nan")
_ = NAN  # inactive, in the tables below

# Worked example 1: rewards of 4 groups (rows) over 2 episodes of 4 steps (columns).
REWARDS = torch.tensor(
    [
        [1.2, 1.1, 1.5, _, 0.8, 0.9, 1.8, 7.1],
        [_, 0.0, 3.3, 6.8, 1.3, 1.2, _, _],
        [1.3, 0.8, 0.8, 7.5, _, _, 2.4, 8.1],
        [1.7, 1.2, _, _, 2.1, 0.7, 1.9, _],
    ]
).T  # [8 steps, 4 groups]
# The poster prints 5.3 in the fifth column; its own numbers give 0.8 + 1.3 + 2.1 = 4.2. The others are its.
GLOBAL_REWARDS = torch.tensor([4.2, 3.1, 5.6, 14.3, 4.2, 2.8, 6.1, 15.2])


def observation(active, group=None):
    """The part of an observation that says who is there and which group each entity belongs to."""
    slots = torch.arange(active.shape[-1]).expand(active.shape)
    return {"kind": active.long() * 2, "group": slots if group is None else torch.as_tensor(group).expand(active.shape)}


# ------------------------------------------------------------------------------------------------------
# Worked example 1: rewards
# ------------------------------------------------------------------------------------------------------


def test_global_reward_is_the_sum_over_the_team():
    """The global script turns the four rows into the global row."""
    summed = global_ppo.group_sum(REWARDS, observation(~REWARDS.isnan()))
    assert summed.shape == (8, 1)
    torch.testing.assert_close(summed[:, 0], GLOBAL_REWARDS)


def test_separate_rewards_stay_apart():
    """With one group for each entity the separated script changes nothing, and leaves 0 in empty slots."""
    summed = trajsep_ppo.group_sum(REWARDS, observation(~REWARDS.isnan()))
    torch.testing.assert_close(summed, REWARDS.nan_to_num(0))


def test_share_of_own_reward():
    """w * own + (1 - w) * team mean: own rewards for w = 1, the mean over those present for w = 0."""
    active = ~REWARDS.isnan()
    torch.testing.assert_close(share_reward(REWARDS, active, 1.0), REWARDS.nan_to_num(0))
    mean = GLOBAL_REWARDS / torch.tensor([3, 4, 3, 2, 3, 3, 3, 2])
    torch.testing.assert_close(share_reward(REWARDS, active, 0.0), mean[:, None] * active)
    # First column: the mean of 1.2, 1.3 and 1.7 is 1.4, so 0.8 * 1.2 + 0.2 * 1.4 = 1.24 and so on.
    torch.testing.assert_close(share_reward(REWARDS, active, 0.8)[0], torch.tensor([1.24, 0.0, 1.32, 1.64]))


def test_share_of_an_empty_team():
    """A team without an active group has no rewards, and no 0 / 0."""
    empty = torch.zeros(2, 4, dtype=torch.bool)
    assert (share_reward(torch.full((2, 4), NAN), empty, 0.5) == 0).all()


# ------------------------------------------------------------------------------------------------------
# Worked example 2: the policy loss of a minibatch
# ------------------------------------------------------------------------------------------------------

RATIO_TIMES_ADVANTAGE = torch.tensor(
    [
        [0.67, _, 1.50],
        [_, -1.33, 2.50],
        [-4.00, 5.60, 3.00],
        [-5.00, _, 4.00],
    ]
)


@pytest.mark.parametrize("garbage", [0.0, 1e9, NAN, float("inf")])
@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_loss_is_averaged_over_active_cells(script, garbage):
    """6.94 / 9 = 0.77 whatever stands in the inactive cells; over all 12 cells it would be 0.58."""
    active = ~RATIO_TIMES_ADVANTAGE.isnan()
    assert active.sum() == 9
    x = RATIO_TIMES_ADVANTAGE.nan_to_num(garbage).requires_grad_()
    mean = script.masked_mean(x, active)
    assert mean.item() == pytest.approx(6.94 / 9, abs=1e-6) and round(mean.item(), 2) == 0.77
    mean.backward()
    torch.testing.assert_close(x.grad, active / 9)


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
def test_mean_of_nothing(script):
    """A minibatch without an active cell has the mean 0, not 0 / 0."""
    assert script.masked_mean(torch.full((3, 4), NAN), torch.zeros(3, 4, dtype=torch.bool)) == 0


# ------------------------------------------------------------------------------------------------------
# Groups
# ------------------------------------------------------------------------------------------------------

# Slots 0 and 1 are factories, 2 to 5 robots; the robot of slot 4 is not there. Clusters 0 and 1.
PRESENT = torch.tensor([True, True, True, True, False, True])
CLUSTER = observation(PRESENT, [0, 1, 0, 1, 1, 1])


def test_sum_over_clusters():
    """A cluster has the sum over a factory and its robots, in the slot of the factory."""
    x = torch.tensor([1.0, 10.0, 2.0, 20.0, NAN, 30.0])
    assert trajsep_ppo.group_sum(x, CLUSTER).tolist() == [3, 60, 0, 0, 0, 0]
    assert global_ppo.group_sum(x, CLUSTER).tolist() == [63]
    batch = {key: y.expand(5, 3, 6) for key, y in CLUSTER.items()}
    assert trajsep_ppo.group_sum(x.expand(5, 3, 6), batch)[4, 2].tolist() == [3, 60, 0, 0, 0, 0]


def test_value_of_groups():
    """The value of a cluster is the mean over its members, that of a team its own."""
    value = torch.tensor([1.0, 10.0, 2.0, 20.0, NAN, 30.0])
    assert group_value(value, None, CLUSTER).tolist() == [1.5, 20, 0, 0, 0, 0]
    assert group_value(value, None, observation(PRESENT)).tolist() == [1, 10, 2, 20, 0, 30]
    teams = global_ppo.group_value(value.expand(2, 6), torch.tensor([7.0, 8.0]), CLUSTER)
    assert teams.tolist() == [[7], [8]]


def test_gradient_stays_within_the_group():
    """The gradient of a cluster's value reaches its members and no other slot."""
    value = torch.tensor([1.0, 10.0, 2.0, 20.0, 0.0, 30.0], requires_grad=True)
    group_value(value, None, CLUSTER)[1].backward()
    torch.testing.assert_close(value.grad, torch.tensor([0, 1, 0, 1, 0, 1]) / 3)


def test_joint_ratio_is_the_product():
    """One ratio per team is the product over its entities; separated, each entity keeps its own."""
    old, new = torch.log(torch.tensor([[0.5, 0.2, 0.9]])), torch.log(torch.tensor([[0.25, 0.6, 0.1]]))
    obs = observation(torch.tensor([[True, True, False]]))

    def ratio(script):
        return (script.group_sum(new, obs) - script.group_sum(old, obs)).exp()

    torch.testing.assert_close(ratio(global_ppo), torch.tensor([[1.5]]))  # 0.5 * 3
    torch.testing.assert_close(ratio(trajsep_ppo), torch.tensor([[0.5, 3.0, 1.0]]))


# ------------------------------------------------------------------------------------------------------
# Generalized advantage estimation
# ------------------------------------------------------------------------------------------------------


def slow_gae(rewards, values, active, dones, gamma, gae_lambda):
    """Advantages by cutting every group's history into lives and summing over each life by itself."""
    T, B, G = rewards.shape
    advantages = np.zeros((T, B, G))
    for b in range(B):
        for g in range(G):
            t = 0
            while t < T:
                if not active[t, b, g]:
                    t += 1
                    continue
                end = t  # the last step of this life within the rollout
                while end + 1 < T and active[end + 1, b, g] and not dones[end, b]:
                    end += 1
                life = range(t, end + 1)
                continues = end == T - 1 and active[T, b, g] and not dones[T - 1, b]
                after = values[T, b, g].item() if continues else 0.0
                value = [values[s, b, g].item() for s in life] + [after]
                reward = [rewards[s, b, g].item() for s in life]
                deltas = [r + gamma * v1 - v0 for r, v0, v1 in zip(reward, value, value[1:])]
                for i, s in enumerate(life):
                    advantages[s, b, g] = sum((gamma * gae_lambda) ** k * d for k, d in enumerate(deltas[i:]))
                t = end + 1
    return torch.tensor(advantages, dtype=torch.float32)


def gae_of_one(rewards, values, active, dones, gamma=0.5, gae_lambda=0.5):
    """Advantages of a single group, lists in and list out; `values` and `active` are one longer."""
    shaped = [torch.tensor(x).view(-1, 1, 1) for x in (rewards, values, active)]
    return compute_gae(*shaped, torch.tensor(dones).view(-1, 1), gamma, gae_lambda).flatten().tolist()


def test_gae_by_hand():
    """Two steps and a value after them, with gamma = lambda = 0.5."""
    # delta1 = 2 + 0.5 * 8 - 4 = 2; delta0 = 1 + 0.5 * 4 - 3 = 0; advantage0 = 0 + 0.25 * 2 = 0.5
    assert gae_of_one([1.0, 2.0], [3.0, 4.0, 8.0], [True] * 3, [False, False]) == [0.5, 2.0]


def test_death_does_not_bootstrap():
    """After the second step the slot is empty, so the 8 (or NaN) in it counts for nothing."""
    for empty in (8.0, 1e9, NAN):  # delta1 = 2 - 4 = -2; advantage0 = 0 + 0.25 * -2 = -0.5
        assert gae_of_one([1.0, 2.0], [3.0, 4.0, empty], [True, True, False], [False, False]) == [-0.5, -2.0]
        dead_between = gae_of_one([1.0, empty, 2.0], [3.0, empty, 4.0, 8.0], [True, False, True, True], [False] * 3)
        assert dead_between == [-2.0, 0.0, 2.0]  # 1 - 3, empty, and the next owner of the slot


def test_match_end_does_not_bootstrap():
    """The next match begins in the same slot; its value must not reach back into this match."""
    assert gae_of_one([1.0, 2.0], [3.0, 4.0, 8.0], [True] * 3, [False, True]) == [-0.5, -2.0]
    # delta0 = 1 - 3 = -2 for the match that ended; the new match's step is untouched.
    assert gae_of_one([1.0, 2.0], [3.0, 4.0, 8.0], [True] * 3, [True, False]) == [-2.0, 2.0]


def test_last_step():
    """The last step of a rollout bootstraps where the group lives on, and is final where it does not."""
    assert gae_of_one([1.0], [2.0, 6.0], [True, True], [False]) == [2.0]  # 1 + 0.5 * 6 - 2
    assert gae_of_one([1.0], [2.0, 6.0], [True, True], [True]) == [-1.0]
    assert gae_of_one([1.0], [2.0, 6.0], [True, False], [False]) == [-1.0]
    assert gae_of_one([1.0], [2.0, 6.0], [False, True], [False]) == [0.0]  # born after it


@pytest.mark.parametrize("script", [trajsep_ppo, global_ppo])
@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9), (1.0, 0.0)])
def test_gae_against_the_slow_loop(script, gamma, gae_lambda):
    """Random births, deaths and match ends, with NaN and 1e9 in empty slots."""
    generator = torch.Generator().manual_seed(0)
    T, B, G = 24, 3, 5

    def random(*shape):
        return torch.rand(shape, generator=generator)

    rewards, values = random(T, B, G) - 0.3, 2 * random(T + 1, B, G) - 1
    dones = random(T, B) < 0.1
    active = random(T + 1, B, G) < 0.75
    dones[-1, 0], active[-2:, 0] = True, True  # a match that ends with the last step
    dones[-1, 1], active[-2:, 1, :3] = False, True  # and one that continues
    active[:, 2, 4] = False  # a group that is never there
    assert dones[:-1].any() and (active[1:] & ~active[:-1]).any() and (active[:-1] & ~active[1:]).any()

    expected = slow_gae(rewards, values, active, dones, gamma, gae_lambda)
    assert (expected[~active[:-1]] == 0).all() and (expected[-1, 0] != 0).all()
    for garbage in (NAN, 1e9, -float("inf")):
        dirty_rewards = torch.where(active[:-1], rewards, garbage)
        dirty_values = torch.where(active, values, garbage)
        advantages = script.compute_gae(dirty_rewards, dirty_values, active, dones, gamma, gae_lambda)
        torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-5)
        assert (advantages[~active[:-1]] == 0).all()
