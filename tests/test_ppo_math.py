"""The arithmetic of both scripts on numbers worked out by hand, and GAE against a slow loop."""

import pytest
import torch

import global_ppo
import trajsep_ppo
from trajsep_ppo import compute_gae, group_value, share_reward

SCRIPTS = (trajsep_ppo, global_ppo)
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
# The poster prints 5.3 in the fifth column; its own numbers give 0.8 + 1.3 + 2.1 = 4.2.
GLOBAL_REWARDS = torch.tensor([4.2, 3.1, 5.6, 14.3, 4.2, 2.8, 6.1, 15.2])


def observation(active, group=None):
    """The part of an observation that says who is there, and the group of each entity."""
    group = torch.arange(active.shape[-1]) if group is None else torch.as_tensor(group)
    return {"kind": active.long() * 2, "group": group.expand(active.shape)}


# -- Worked example 1: rewards -----------------------------------------------------------


def test_sum_over_the_group():
    """The team's sum in the global script; each entity apart, and 0 in empty slots, in the other."""
    obs = observation(~REWARDS.isnan())
    torch.testing.assert_close(global_ppo.group_sum(REWARDS, obs), GLOBAL_REWARDS[:, None])
    torch.testing.assert_close(trajsep_ppo.group_sum(REWARDS, obs), REWARDS.nan_to_num(0))


def test_share_of_own_reward():
    """w * own + (1 - w) * team mean, over those present; a team without any has no rewards."""
    active = ~REWARDS.isnan()
    torch.testing.assert_close(share_reward(REWARDS, active, 1.0), REWARDS.nan_to_num(0))
    mean = GLOBAL_REWARDS / torch.tensor([3, 4, 3, 2, 3, 3, 3, 2])
    torch.testing.assert_close(share_reward(REWARDS, active, 0.0), mean[:, None] * active)
    # First column: the mean of 1.2, 1.3 and 1.7 is 1.4, and 0.8 * 1.2 + 0.2 * 1.4 = 1.24.
    shared = torch.tensor([1.24, 0.0, 1.32, 1.64])
    torch.testing.assert_close(share_reward(REWARDS, active, 0.8)[0], shared)
    nobody = torch.zeros_like(active)
    assert (share_reward(torch.full_like(REWARDS, NAN), nobody, 0.5) == 0).all()


# -- Worked example 2: the policy loss of a minibatch ------------------------------------

RATIO_TIMES_ADVANTAGE = torch.tensor(
    [
        [0.67, _, 1.50],
        [_, -1.33, 2.50],
        [-4.00, 5.60, 3.00],
        [-5.00, _, 4.00],
    ]
)


@pytest.mark.parametrize("garbage", [0.0, 1e9, NAN, float("inf")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_loss_is_averaged_over_active_cells(script, garbage):
    """6.94 / 9 = 0.77 whatever stands in the inactive cells; over all 12 cells it would be 0.58."""
    active = ~RATIO_TIMES_ADVANTAGE.isnan()
    x = RATIO_TIMES_ADVANTAGE.nan_to_num(garbage).requires_grad_()
    mean = script.masked_mean(x, active)
    assert mean.item() == pytest.approx(6.94 / 9, abs=1e-6)
    mean.backward()
    torch.testing.assert_close(x.grad, active / 9)
    nothing = torch.zeros_like(active)
    assert script.masked_mean(x, nothing) == 0, "0 / 0"


# -- Groups ------------------------------------------------------------------------------

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
    """The value of a cluster is the mean over its members, who share its gradient."""
    value = torch.tensor([1.0, 10.0, 2.0, 20.0, NAN, 30.0], requires_grad=True)
    assert group_value(value, None, observation(PRESENT)).tolist() == [1, 10, 2, 20, 0, 30]
    values = group_value(value, None, CLUSTER)
    assert values.tolist() == [1.5, 20, 0, 0, 0, 0]
    values[1].backward()
    torch.testing.assert_close(value.grad, torch.tensor([0, 1, 0, 1, 0, 1]) / 3)
    teams = global_ppo.group_value(value.expand(2, 6), torch.tensor([7.0, 8.0]), CLUSTER)
    assert teams.tolist() == [[7], [8]]


def test_joint_ratio_is_the_product():
    """One ratio per team is the product over its entities; separated, each entity keeps its own."""
    old = torch.tensor([[0.5, 0.2, 0.9]])
    new = torch.tensor([[0.25, 0.6, 0.1]])
    obs = observation(torch.tensor([[True, True, False]]))
    for script, expected in ((global_ppo, [[0.5 * 3]]), (trajsep_ppo, [[0.5, 3.0, 1.0]])):
        logratio = script.group_sum(new.log(), obs) - script.group_sum(old.log(), obs)
        torch.testing.assert_close(logratio.exp(), torch.tensor(expected))


# -- Generalized advantage estimation ----------------------------------------------------


def slow_gae(rewards, values, active, dones, gamma, gae_lambda):
    """The advantage of each cell: the sum of the errors from there to the end of its life."""
    advantages = torch.zeros_like(rewards)
    for t, b, g in active[:-1].nonzero().tolist():
        weight = 1.0
        for s in range(t, len(rewards)):
            continues = active[s + 1, b, g] and not dones[s, b]
            after = values[s + 1, b, g] if continues else 0.0
            error = rewards[s, b, g] + gamma * after - values[s, b, g]
            advantages[t, b, g] += weight * error
            weight *= gamma * gae_lambda
            if not continues:
                break
    return advantages


# Of one group: rewards, values, whether it is active, whether the match is done, advantages
BY_HAND = [
    # The errors are 1 + 0.5 * 4 - 3 = 0 and 2 + 0.5 * 8 - 4 = 2; the first advantage 0 + 0.25 * 2
    ([1, 2], [3, 4, 8], [1, 1, 1], [0, 0], [0.5, 2]),
    # The slot is empty after the second step, whose error is 2 - 4
    ([1, 2], [3, 4, 8], [1, 1, 0], [0, 0], [-0.5, -2]),
    ([1, 2], [3, 4, NAN], [1, 1, 0], [0, 0], [-0.5, -2]),
    # It is empty in between, and has another owner then
    ([1, NAN, 2], [3, NAN, 4, 8], [1, 0, 1, 1], [0, 0, 0], [-2, 0, 2]),
    # The match is done, and the next one begins in the same slot
    ([1, 2], [3, 4, 8], [1, 1, 1], [0, 1], [-0.5, -2]),
    ([1, 2], [3, 4, 8], [1, 1, 1], [1, 0], [-2, 2]),
    # The last step of a rollout: the group lives on, its match is done, it dies, it is born
    ([1], [2, 6], [1, 1], [0], [2]),
    ([1], [2, 6], [1, 1], [1], [-1]),
    ([1], [2, 6], [1, 0], [0], [-1]),
    ([1], [2, 6], [0, 1], [0], [0]),
]


@pytest.mark.parametrize("rewards, values, active, dones, expected", BY_HAND)
def test_gae_by_hand(rewards, values, active, dones, expected):
    """With gamma = lambda = 0.5."""
    rewards, values = (torch.tensor(x).float().view(-1, 1, 1) for x in (rewards, values))
    active, dones = (torch.tensor(x).bool().view(-1, 1) for x in (active, dones))
    advantages = compute_gae(rewards, values, active[..., None], dones, 0.5, 0.5)
    assert advantages.flatten().tolist() == expected


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "gamma, gae_lambda",
    [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9), (1.0, 0.0)],
)
def test_gae_against_the_slow_loop(script, gamma, gae_lambda):
    """Random births, deaths and match ends, with NaN and 1e9 in empty slots."""
    generator = torch.Generator().manual_seed(0)
    T, B, G = 24, 3, 5

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    rewards = random(T, B, G) - 0.3
    values = 2 * random(T + 1, B, G) - 1
    dones = random(T, B) < 0.1
    active = random(T + 1, B, G) < 0.75
    dones[-1, :2] = torch.tensor([True, False])  # a match ends with the last step, one continues
    active[-2:, :2, :3] = True
    active[:, 2, 4] = False  # a group that is never there
    expected = slow_gae(rewards, values, active, dones, gamma, gae_lambda)
    assert (expected[-1, :2, :3] != 0).all()
    for garbage in (NAN, 1e9, -float("inf")):
        dirty_rewards = torch.where(active[:-1], rewards, garbage)
        dirty_values = torch.where(active, values, garbage)
        got = script.compute_gae(dirty_rewards, dirty_values, active, dones, gamma, gae_lambda)
        torch.testing.assert_close(got, expected)
        assert (got[~active[:-1]] == 0).all()
