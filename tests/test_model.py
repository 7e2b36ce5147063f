"""The hybrid network against a slow forward of one entity at a time, what each output teaches, and how it begins."""

import ast
import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import made_up_observation, space_of
from in_double import double_precision

import hybrid_model
import lux_wrapper
from hybrid_model import HybridNet

PARAMETER_LIMIT = 203_000
CHANNELS, FEATURES, SLOTS, ACTIONS = 3, 4, 9, 6
ROBOT, FACTORY = 1, 2  # not the kinds of the game: the number of the factories is the network's argument
LIVE = (6, 0, 1, SLOTS)  # entities on each board: nobody, one, some, no slot free


@pytest.fixture(autouse=True)
def in_double():
    with double_precision():
        yield


def observation(H, W, seed=0):
    """Random boards of H x W with LIVE entities, in corners, on edges and elsewhere; garbage in the empty slots."""
    rng = np.random.default_rng(seed)
    shape = len(LIVE), SLOTS
    edges = [(0, 0), (H - 1, W - 1), (0, W - 1), (H - 1, 0), (H // 2, 0), (0, W // 2), (H - 1, W // 2), (H // 2, W - 1)]
    kind = np.zeros(shape, np.int64)
    position = np.full((*shape, 2), -(10**6))
    for b, live in enumerate(LIVE):
        slots = rng.permutation(SLOTS)[:live]
        kind[b, slots] = rng.permutation(np.arange(live) % 3 + 1)  # robots of the kinds 1 and 3
        places = edges if live < SLOTS else [*edges, rng.integers(0, (H, W))]
        position[b, slots] = rng.permutation(places)[:live]
    live = kind > 0
    action_mask = rng.random((*shape, ACTIONS)) < 0.6
    action_mask[..., 0] |= live
    first, second = map(tuple, np.argwhere(live)[:2])
    action_mask[first], action_mask[second] = True, np.arange(ACTIONS) == 2
    arrays = {
        "board": rng.integers(0, 101, (len(LIVE), H, W, CHANNELS)).astype(np.uint8),
        "features": np.where(live[..., None], rng.normal(size=(*shape, FEATURES)), np.nan),
        "position": position,
        "kind": kind,
        "group": np.zeros(shape, np.int64),
        "action_mask": action_mask,
    }
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def network(obs):
    """A network with larger heads and biases than at the start, so that what it reads shows in what it says."""
    torch.manual_seed(0)
    spaces = {key: gym.spaces.Box(-np.inf, np.inf, x.shape[1:]) for key, x in obs.items()}
    net = HybridNet(gym.spaces.Dict(spaces), ACTIONS, factory_kind=FACTORY)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


# ------------------------------------------------------------------------------------------------------
# The slow forward: float64, one board, one entity, one cell at a time
# ------------------------------------------------------------------------------------------------------


def relu(x):
    return np.maximum(x, 0)


def linear(p, name, x):
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def convolution(p, name, x):
    """3 x 3 on [h, w, channels], with zeros beyond the edge."""
    y = np.zeros(x.shape)
    for i, j in np.ndindex(x.shape[:2]):
        y[i, j] = p[f"{name}.bias"]
        for di, dj in np.ndindex(3, 3):
            a, b = i + di - 1, j + dj - 1
            if 0 <= a < x.shape[0] and 0 <= b < x.shape[1]:
                y[i, j] += p[f"{name}.weight"][:, :, di, dj] @ x[a, b]
    return y


def slow_map(p, board):
    """The encoder: [H, W, C] percent to [h, w, channels]."""
    H, W, C = board.shape
    h, w = math.ceil(H / 8), math.ceil(W / 8)
    padded = np.zeros((8 * h, 8 * w, C))
    padded[:H, :W] = board / 100
    x = np.zeros((h, w, len(p["stem.bias"])))
    for i, j in np.ndindex(h, w):
        x[i, j] = relu(linear(p, "stem", padded[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].ravel()))
    y = convolution(p, "block.conv2", relu(convolution(p, "block.conv1", x)))
    squeezed = relu(linear(p, "block.squeeze", y.mean((0, 1))))
    weight = 1 / (1 + np.exp(-linear(p, "block.excite", squeezed)))
    return relu(x + y * weight)


def slow_hidden(p, board, map, whole, x, y, features, action_mask):
    """What is common to actor and critic of the entity at (x, y)."""
    patch = np.zeros((5, 5, board.shape[-1]))
    for i, j in np.ndindex(5, 5):
        a, b = x + i - 2, y + j - 2
        if 0 <= a < board.shape[0] and 0 <= b < board.shape[1]:
            patch[i, j] = board[a, b] / 100
    patch = relu(linear(p, "patch", patch.ravel()))
    near = linear(p, "near", np.concatenate([patch, map[x // 8, y // 8], features, action_mask]))
    z = linear(p, "trunk.1", relu(near + linear(p, "far", whole)))
    z = (z - z.mean()) / np.sqrt(z.var() + 1e-5)
    return relu(z * p["trunk.2.weight"] + p["trunk.2.bias"])


def two_layers(p, name, x):
    return linear(p, f"{name}.2", relu(linear(p, f"{name}.0", x)))[0]


def slow_forward(p, obs):
    """(logits, value) of all entities and the team's value, for parameters name -> float64 array."""
    obs = {key: x.numpy() for key, x in obs.items()}
    logits, value = np.zeros(obs["action_mask"].shape), np.zeros(obs["kind"].shape)
    team_value = np.zeros(len(obs["kind"]))
    for b, board in enumerate(obs["board"]):
        map = slow_map(p, board)
        whole = np.concatenate([map.mean((0, 1)), map.max((0, 1))])
        mean, entities = np.zeros(len(p["far.bias"])), np.flatnonzero(obs["kind"][b])
        for e in entities:
            own = [obs[key][b, e] for key in ("features", "action_mask")]
            hidden = slow_hidden(p, board, map, whole, *obs["position"][b, e], *own)
            both = linear(p, "actor", hidden)
            head = both[ACTIONS:] if obs["kind"][b, e] == FACTORY else both[:ACTIONS]
            logits[b, e] = np.where(obs["action_mask"][b, e], head, -1e9)
            value[b, e] = two_layers(p, "critic", hidden)
            mean += hidden / len(entities)
        team_value[b] = two_layers(p, "team_critic", np.concatenate([mean, whole]))
    return logits, value, team_value


def parameters_of(net):
    return {name: x.detach().numpy() for name, x in net.named_parameters()}


@pytest.mark.parametrize("H, W", [(16, 24), (24, 8), (20, 13), (9, 31), (8, 8), (5, 3), (48, 48)])
def test_entity_by_entity(H, W):
    """All outputs, for boards of any size: masked logits are -1e9 (exactly no probability), empty slots 0."""
    obs = observation(H, W)
    net = network(obs)
    outputs = net(obs)
    for output, slow in zip(outputs, slow_forward(parameters_of(net), obs)):
        torch.testing.assert_close(output, torch.from_numpy(slow), atol=1e-12, rtol=1e-12)
    logits, value, _ = outputs
    live = obs["kind"] > 0
    assert logits[live][obs["action_mask"][live]].abs().min() > 1e-4 and value[live].abs().min() > 1e-4
    assert (logits[live][~obs["action_mask"][live]] == -1e9).all()
    assert (logits[~live] == 0).all() and (value[~live] == 0).all()


def test_nobody_on_any_board():
    """Zeros for all slots, and still a value of every team."""
    obs = observation(16, 24)
    obs["kind"][:] = 0
    net = network(obs)
    logits, value, team_value = net(obs)
    assert (logits == 0).all() and (value == 0).all()
    torch.testing.assert_close(team_value, torch.from_numpy(slow_forward(parameters_of(net), obs)[2]))


# ------------------------------------------------------------------------------------------------------
# Gradients
# ------------------------------------------------------------------------------------------------------

MONOLITHIC = ("stem", "block.conv1", "block.conv2", "block.squeeze", "block.excite")
SHARED = (*MONOLITHIC, "patch", "near", "far", "trunk.1", "trunk.2")
# Output -> the layers that learn from it; no other does. The halves of the actor are the heads of the two kinds.
LEARNS = {
    "policy of robots": (*SHARED, "actor of robots"),
    "policy of factories": (*SHARED, "actor of factories"),
    "value": (*SHARED, "critic.0", "critic.2"),
    "team_value": (*SHARED, "team_critic.0", "team_critic.2"),
    "team_value of nobody": (*MONOLITHIC, "team_critic.0", "team_critic.2"),
}


def parts_of(gradients):
    """Layer -> (name of a parameter, rows of it), both heads of the actor on their own."""
    for name in gradients:
        layer = name.rpartition(".")[0]
        if layer == "actor":
            yield "actor of robots", name, slice(ACTIONS)
            yield "actor of factories", name, slice(ACTIONS, None)
        else:
            yield layer, name, slice(None)


def weighted_sums(obs, logits, value, team_value):
    """For each of LEARNS a number that mixes all that it says of all entities, of tensors or arrays."""
    rng = np.random.default_rng(1)
    kind, allowed = obs["kind"].numpy(), obs["action_mask"].numpy()
    factories = (allowed & (kind == FACTORY)[..., None]) * rng.normal(size=allowed.shape)
    robots = (allowed & ((kind > 0) & (kind != FACTORY))[..., None]) * rng.normal(size=allowed.shape)
    of_value, of_team = (kind > 0) * rng.normal(size=kind.shape), rng.normal(size=len(kind))
    nobody = (kind == 0).all(1)
    weights = (robots, logits), (factories, logits), (of_value, value), (of_team * ~nobody, team_value)
    weights = [*weights, (of_team * nobody, team_value)]
    if isinstance(value, torch.Tensor):
        weights = [(torch.from_numpy(weight), output) for weight, output in weights]
    return {name: (weight * output).sum() for name, (weight, output) in zip(LEARNS, weights)}


def test_what_each_output_teaches():
    """Each output has the gradient that differences of the slow forward say, and none beyond its layers."""
    obs = observation(20, 13)
    net = network(obs)
    p, gradients = parameters_of(net), {}
    for output, x in weighted_sums(obs, *net(obs)).items():
        given = torch.autograd.grad(x, list(net.parameters()), retain_graph=True, allow_unused=True)
        gradients[output] = {name: 0 * p[name] if g is None else g.numpy() for name, g in zip(p, given)}

    rng, step = np.random.default_rng(2), 1e-6
    for layer, name, rows in parts_of(p):
        direction = np.zeros_like(p[name])
        direction[rows] = rng.normal(size=direction[rows].shape)
        after = weighted_sums(obs, *slow_forward(p | {name: p[name] + step * direction}, obs))
        before = weighted_sums(obs, *slow_forward(p | {name: p[name] - step * direction}, obs))
        for output, of in gradients.items():
            gradient, where = of[name][rows], f"{output}: {name} ({layer})"
            expected = (after[output] - before[output]) / (2 * step)
            size = float(np.linalg.norm(gradient))
            assert (gradient * direction[rows]).sum() == pytest.approx(expected, rel=1e-6, abs=1e-6 * size), where
            assert size > 1e-3 if layer in LEARNS[output] else size == 0, where


def test_every_parameter_is_in_the_table():
    layers = {layer for layer, _, _ in parts_of(dict(network(observation(8, 8)).named_parameters()))}
    assert layers == {layer for layers in LEARNS.values() for layer in layers}


def test_gradient_reaches_its_own_place():
    """What an entity is blamed for moves the map at its own cell, and beyond that only what all entities share."""
    obs = observation(20, 13)
    net, maps = network(obs), []
    net.block.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        net.far.weight.zero_()  # the way from the whole map to all entities
    logits, value, _ = net(obs)
    for b, e in obs["kind"].nonzero().tolist():
        x, y = (obs["position"][b, e] // 8).tolist()
        for output in (logits[b, e][obs["action_mask"][b, e]].sum(), value[b, e]):
            (gradient,) = torch.autograd.grad(output, maps, retain_graph=True)
            assert gradient.abs().sum(1).nonzero().tolist() == [[b, x, y]]


# ------------------------------------------------------------------------------------------------------
# Size, start, cost
# ------------------------------------------------------------------------------------------------------


def test_size_on_the_real_game():
    """At most 203,000 parameters, whatever the number of slots and the size of the board."""
    for size, factories, robots in ((48, 5, 20), (64, 10, 100)):
        real = made_up_observation(1, size, factories, robots)
        net = HybridNet(space_of(real), lux_wrapper.NUM_ACTIONS)
        assert 10_000 < sum(parameter.numel() for parameter in net.parameters()) <= PARAMETER_LIMIT


def test_start():
    """Orthogonal weights of gain sqrt(2), 0.01 in the last layer of each head, zero biases, and a LayerNorm of 1."""
    torch.manual_seed(0)
    obs = made_up_observation()
    net = HybridNet(space_of(obs), lux_wrapper.NUM_ACTIONS)
    layers = {name: layer for name, layer in net.named_modules() if hasattr(layer, "bias")}
    assert sum(x.numel() for layer in layers.values() for x in layer.parameters()) == sum(
        x.numel() for x in net.parameters()
    )
    for name, layer in layers.items():
        assert (layer.bias == 0).all(), name
        if isinstance(layer, nn.LayerNorm):
            assert name == "trunk.2" and (layer.weight == 1).all()
            continue
        weight = layer.weight.detach().flatten(1)
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        gain = 0.01 if name in ("actor", "critic.2", "team_critic.2") else math.sqrt(2)
        torch.testing.assert_close(weight @ weight.T / gain**2, torch.eye(len(weight)), atol=1e-12, rtol=0, msg=name)
    logits, value, team_value = net(obs)
    assert logits[logits > -1e8].abs().max() < 0.1 and max(value.abs().max(), team_value.abs().max()) < 0.1


def test_default_kind_of_factories():
    """Without the argument, the second head serves what the game calls a factory."""
    obs = made_up_observation()
    net = HybridNet(space_of(obs), lux_wrapper.NUM_ACTIONS)
    with torch.no_grad():
        net.actor.bias[lux_wrapper.NUM_ACTIONS :] = 5
    factories = net(obs)[0].amax(-1) > 4
    assert torch.equal(factories, obs["kind"] == lux_wrapper.FACTORY)


def test_cost_follows_live_entities():
    """No layer ever sees more rows than there are live entities (or boards), however many slots are empty."""
    obs, rows = observation(20, 13), []
    net = network(obs)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))

    def run(obs):
        rows.clear()
        return net(obs), sorted(rows)

    (logits, value, team_value), few = run(obs)
    assert max(few) == sum(LIVE) > len(LIVE)
    padded = {k: x if k == "board" else torch.cat([x] + [torch.zeros_like(x)] * 9, 1) for k, x in obs.items()}
    (padded_logits, padded_value, padded_team_value), as_few = run(padded)
    assert as_few == few
    for output, padded_output in ((logits, padded_logits), (value, padded_value)):
        torch.testing.assert_close(padded_output[:, :SLOTS], output)
        assert not padded_output[:, SLOTS:].any()
    torch.testing.assert_close(padded_team_value, team_value)


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
