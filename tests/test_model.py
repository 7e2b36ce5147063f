"""The hybrid network: its size, its shapes, and that only live entities count, each at its own place."""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from helpers import made_up_observation, space_of

import hybrid_model
import lux_wrapper
from hybrid_model import HybridNet

PARAMETER_LIMIT = 203_000
NUM_ACTIONS = lux_wrapper.NUM_ACTIONS


@pytest.fixture
def obs():
    return made_up_observation()


@pytest.fixture
def net(obs):
    """A network with larger heads than at the start, so that what it reads shows in what it says."""
    torch.manual_seed(0)
    net = HybridNet(space_of(obs), NUM_ACTIONS)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def test_size_on_the_real_game():
    """At most 203,000 parameters, whatever the number of slots and the size of the board."""
    for size, factories, robots in ((48, 5, 20), (64, 10, 100)):
        real = made_up_observation(1, size, factories, robots)
        net = HybridNet(space_of(real), NUM_ACTIONS)
        assert 10_000 < sum(parameter.numel() for parameter in net.parameters()) <= PARAMETER_LIMIT


@pytest.mark.parametrize("size", [48, 64, 30, 25])
def test_shapes(size):
    """Any board size, also one that the network's stride does not divide."""
    obs = made_up_observation(boards=2, size=size, factories=3, robots=5)
    obs["position"][:, 0] = size - 1  # the last cell of the board
    logits, value, team_value = HybridNet(space_of(obs), NUM_ACTIONS)(obs)
    assert logits.shape == (2, 8, NUM_ACTIONS) and value.shape == (2, 8) and team_value.shape == (2,)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in (logits, value, team_value))


def test_masked_actions_have_no_probability(net, obs):
    """A masked action has a logit of about -1e9, so exactly no probability; an allowed one has some."""
    logits = net(obs)[0]
    live, mask = obs["kind"] > 0, obs["action_mask"]
    masked = live[..., None] & ~mask
    assert masked.any() and (logits[masked] < -0.9e9).all()
    assert (logits[live[..., None] & mask].abs() < 1e3).all()
    probability = logits.softmax(-1)
    assert (probability[masked] == 0).all() and (probability[live[..., None] & mask] > 0).all()


def test_empty_slots_say_nothing(net, obs):
    """Where nobody is, logits and values are exactly 0; a board without anybody is no problem either."""
    obs["kind"][0] = 0
    logits, value, team_value = net(obs)
    empty = obs["kind"] == 0
    assert empty[1:].any() and (logits[empty] == 0).all() and (value[empty] == 0).all()
    assert (value[~empty] != 0).all() and team_value.isfinite().all()


def test_garbage_in_empty_slots_changes_nothing(net, obs):
    """Neither outputs nor gradients depend on what stands in the features, places and masks of empty slots."""

    def run(obs):
        net.zero_grad()
        logits, value, team_value = net(obs)
        (logits.clamp(min=-10).square().sum() + value.square().sum() + team_value.square().sum()).backward()
        return [logits.detach(), value.detach(), team_value.detach(), *(x.grad.clone() for x in net.parameters())]

    clean = run(obs)
    empty = obs["kind"] == 0
    obs["features"][empty] = float("nan")
    obs["position"][empty] = 7
    obs["group"][empty] = 0
    obs["action_mask"][empty] = ~obs["action_mask"][empty]
    for before, after in zip(clean, run(obs)):
        assert torch.equal(before, after)


def test_every_parameter_learns(net, obs):
    """Policy, value and team value together reach every parameter (a head that is never trained is a bug)."""
    logits, value, team_value = net(obs)
    (logits.clamp(min=-10).square().sum() + value.square().sum() + team_value.square().sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


@pytest.mark.parametrize("factories", [True, False])
def test_factories_and_robots_both_learn(net, obs, factories):
    """The logits of factories alone, and of robots alone, move the network."""
    chosen = (obs["kind"] == lux_wrapper.FACTORY) if factories else (obs["kind"] > lux_wrapper.FACTORY)
    logits = net(obs)[0]
    logits[chosen][obs["action_mask"][chosen]].square().sum().backward()
    assert net.actor.weight.grad.abs().max() > 1e-3 and net.stem.weight.grad.abs().max() > 1e-6


def test_reads_its_own_place(net, obs):
    """Moving one entity changes its own logits and value, and no one else's; so does what lies around it."""
    slot = obs["kind"][0].nonzero()[1].item()
    obs["position"][0, slot] = torch.tensor([3, 3])
    logits, value, _ = net(obs)
    obs["position"][0, slot] = torch.tensor([12, 9])
    moved_logits, moved_value, _ = net(obs)
    changed = (logits != moved_logits).any(-1)
    assert changed.nonzero().tolist() == [[0, slot]]
    assert (value != moved_value).nonzero().tolist() == [[0, slot]]

    obs["board"][0, 12, 9] = 100 - obs["board"][0, 12, 9]
    assert (net(obs)[0][0, slot] - moved_logits[0, slot])[obs["action_mask"][0, slot]].abs().min() > 1e-4


def test_x_and_y_are_not_swapped(net, obs):
    """`position` is (x, y) and the board [x, y]: what changes at and around it matters more than at its mirror."""
    slot = obs["kind"][0].nonzero()[1].item()
    distance = torch.arange(20)

    def effect(position, centre, low, high):
        """How far the logits of an entity move if all cells change that are so far from a centre."""
        obs["position"][0, slot] = torch.tensor(position)
        dx, dy = (distance - centre[0]).abs()[:, None], (distance - centre[1]).abs()[None]
        changed = (torch.maximum(dx, dy) >= low) & (torch.maximum(dx, dy) <= high)
        board = torch.where(changed[..., None], 100 - obs["board"], obs["board"])
        difference = net(obs)[0] - net({**obs, "board": board})[0]
        return difference[0, slot][obs["action_mask"][0, slot]].abs().sum().item()

    places = [(3, 16), (15, 3), (4, 12), (16, 6), (5, 15), (13, 4)]
    for low, high in ((0, 0), (3, 3)):  # its own cell; and a ring that the patch of input cells does not reach
        here = sum(effect(place, place, low, high) for place in places)
        assert here > 1.2 * sum(effect(place, place[::-1], low, high) for place in places)


def test_boards_do_not_mix(net, obs):
    """What happens on one board changes nothing on the others."""
    before = net(obs)
    obs["board"][1] = 100 - obs["board"][1]
    obs["features"][1] += (obs["kind"][1] > 0)[:, None] * 1.0
    after = net(obs)
    for x, y in zip(before, after):
        torch.testing.assert_close(x[[0, 2]], y[[0, 2]], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(x[1], y[1], atol=1e-3)


def test_order_of_slots_does_not_matter(net, obs):
    """Permuting the slots permutes logits and values and leaves the team's value alone."""
    order = torch.randperm(obs["kind"].shape[1], generator=torch.Generator().manual_seed(1))
    logits, value, team_value = net(obs)
    permuted = {key: x if key == "board" else x[:, order] for key, x in obs.items()}
    new_logits, new_value, new_team_value = net(permuted)
    torch.testing.assert_close(new_logits, logits[:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_value, value[:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_team_value, team_value, atol=1e-5, rtol=1e-5)


def test_factories_and_robots_have_their_own_heads(net, obs):
    """The same numbers mean other actions to a factory than to a robot."""
    slot = obs["kind"][0].nonzero()[1].item()
    obs["kind"][0, slot] = lux_wrapper.FACTORY
    factory = net(obs)[0][0, slot][obs["action_mask"][0, slot]]
    obs["kind"][0, slot] = lux_wrapper.LIGHT
    robot = net(obs)[0][0, slot][obs["action_mask"][0, slot]]
    assert not torch.allclose(factory, robot, atol=1e-3)


def test_cost_follows_live_entities(net, obs):
    """No layer ever sees more rows than there are live entities (or boards), however many slots are empty."""
    rows = []
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))

    def rows_of(obs):
        rows.clear()
        net(obs)
        return sorted(rows)

    live, boards = int((obs["kind"] > 0).sum()), len(obs["kind"])
    few = rows_of(obs)
    assert max(few) == live > boards
    padded = {k: x if k == "board" else torch.cat([x] + [torch.zeros_like(x)] * 9, 1) for k, x in obs.items()}
    assert rows_of(padded) == few
    logits, value, team_value = net(obs)
    padded_logits, padded_value, padded_team_value = net(padded)
    assert torch.equal(padded_logits[:, : logits.shape[1]], logits) and not padded_logits[:, logits.shape[1] :].any()
    assert torch.equal(padded_value[:, : value.shape[1]], value) and torch.equal(padded_team_value, team_value)


def test_knows_no_game():
    """The network imports neither the wrapper nor the engine: sizes come from the spaces."""
    tree = ast.parse(Path(hybrid_model.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert "torch" in imported and not imported & {"lux_wrapper", "luxai_s2", "trajsep_ppo", "global_ppo"}
