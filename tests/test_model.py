"""The hybrid network against a slow forward of one entity at a time, its gradients, its start.

All is in double precision, so the comparison is as exact on any processor.
"""

import math
import re
from pathlib import Path

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
KINDS = (1, 2, 3)
LIVE = (6, 0, 1, SLOTS)  # entities on each board: some, none, one, no slot free


@pytest.fixture(autouse=True)
def in_double():
    with double_precision():
        yield


def observation(H, W):
    """Random boards with LIVE entities, in corners, on edges and elsewhere; garbage in empty slots."""
    rng = np.random.default_rng(0)
    shape = len(LIVE), SLOTS
    corners = [(0, 0), (H - 1, W - 1), (0, W - 1), (H - 1, 0)]
    sides = [(H // 2, 0), (0, W // 2), (H - 1, W // 2), (H // 2, W - 1)]
    places = [*corners, *sides, rng.integers(0, (H, W))]
    kind = np.zeros(shape, np.int64)
    position = np.full((*shape, 2), -(10**6))
    for b, live in enumerate(LIVE):
        slots = rng.permutation(SLOTS)[:live]
        kind[b, slots] = rng.permutation(np.arange(live) % 3 + 1)
        position[b, slots] = rng.permutation(places[: max(live, 8)])[:live]
    live = kind > 0
    features = np.where(live[..., None], rng.normal(size=(*shape, FEATURES)), np.nan)
    action_mask = rng.random((*shape, ACTIONS)) < 0.6
    action_mask[..., 0] |= live
    first, second = map(tuple, np.argwhere(live)[:2])
    action_mask[first] = True
    action_mask[second] = np.arange(ACTIONS) == 2
    arrays = {
        "board": rng.integers(0, 101, (len(LIVE), H, W, CHANNELS)).astype(np.uint8),
        "features": features,
        "position": position,
        "kind": kind,
        "group": np.zeros(shape, np.int64),
        "action_mask": action_mask,
    }
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def network(obs):
    """A network with larger heads and biases than at the start, so that all it reads matters."""
    torch.manual_seed(0)
    net = HybridNet(space_of(obs), ACTIONS)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


# -- The slow forward: one board, one entity, one cell at a time ---------------------------


def relu(x):
    return np.maximum(x, 0)


def linear(p, name, x):
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def two_layers(p, name, x):
    return linear(p, f"{name}.2", relu(linear(p, f"{name}.0", x)))[0]


def window(x, i, j, size):
    """The size x size cells of x [H, W, C] around (i, j), 0 beyond the edge."""
    beyond = (size // 2, size // 2)
    padded = np.pad(x, (beyond, beyond, (0, 0)))
    return padded[i : i + size, j : j + size]


def convolution(p, name, x):
    """3 x 3 on [h, w, channels], with zeros beyond the edge."""
    y = np.zeros(x.shape)
    for i, j in np.ndindex(x.shape[:2]):
        weighted = p[f"{name}.weight"] * window(x, i, j, 3).transpose(2, 0, 1)
        y[i, j] = p[f"{name}.bias"] + weighted.sum((1, 2, 3))
    return y


def side_of_tile(board):
    """Cells: tiles of small boards are smaller."""
    return 8 if len(board) > 16 or len(board[0]) > 16 else 2


def slow_map(p, board):
    """The encoder: [H, W, C] percent to [h, w, channels]."""
    (H, W, _), side = board.shape, side_of_tile(board)
    padded = np.pad(board / 100, ((0, -H % side), (0, -W % side), (0, 0)))
    h, w = padded.shape[0] // side, padded.shape[1] // side
    x = np.zeros((h, w, len(p["stem.bias"])))
    for i, j in np.ndindex(h, w):
        tile = padded[side * i : side * i + side, side * j : side * j + side]
        x[i, j] = relu(linear(p, "stem", tile.ravel()))
    y = convolution(p, "block.conv2", relu(convolution(p, "block.conv1", x)))
    squeezed = relu(linear(p, "block.squeeze", y.mean((0, 1))))
    weight = 1 / (1 + np.exp(-linear(p, "block.excite", squeezed)))
    return relu(x + y * weight)


def slow_hidden(p, board, map, whole, x, y, features, action_mask, kind):
    """What actor and critic share of the entity at (x, y); or without a board, None."""
    own = [features, action_mask, np.array(KINDS) == kind]
    if board is None:
        z = linear(p, "near", np.concatenate(own))
    else:
        patch = relu(linear(p, "patch", window(board / 100, x, y, 5).ravel()))
        place = map[x // side_of_tile(board), y // side_of_tile(board)]
        z = linear(p, "near", np.concatenate([patch, place, *own]))
        z = z + linear(p, "far", whole)
    z = linear(p, "trunk.1", relu(z))
    z = (z - z.mean()) / np.sqrt(z.var() + 1e-5)
    return relu(z * p["trunk.2.weight"] + p["trunk.2.bias"])


def slow_forward(p, obs):
    """(logits, value) of all entities and the team's value, for parameters name -> array."""
    obs = {key: x.numpy() for key, x in obs.items()}
    logits = np.zeros(obs["action_mask"].shape)
    value = np.zeros(obs["kind"].shape)
    team_value = np.zeros(len(obs["kind"]))
    for b, board in enumerate(obs.get("board", [None] * len(LIVE))):
        map, whole = None, []
        if board is not None:
            map = slow_map(p, board)
            whole = np.concatenate([map.mean((0, 1)), map.max((0, 1))])
        mean = np.zeros(len(p["near.bias"]))
        entities = np.flatnonzero(obs["kind"][b])
        for e in entities:
            x, y = obs["position"][b, e] if "position" in obs else (None, None)
            mask = obs["action_mask"][b, e]
            kind = obs["kind"][b, e]
            hidden = slow_hidden(p, board, map, whole, x, y, obs["features"][b, e], mask, kind)
            head = np.split(linear(p, "actor", hidden), len(KINDS))[kind - 1]
            logits[b, e] = np.where(mask, head, -1e9)
            value[b, e] = two_layers(p, "critic", hidden)
            mean += hidden / len(entities)
        team_value[b] = two_layers(p, "team_critic", np.concatenate([mean, whole]))
    return logits, value, team_value


def parameters_of(net):
    return {name: x.detach().numpy() for name, x in net.named_parameters()}


def compare(net, obs):
    """All outputs, up to rounding; exactly -1e9 where masked, exactly 0 in empty slots."""
    outputs = net(obs)
    for output, slow in zip(outputs, slow_forward(parameters_of(net), obs)):
        torch.testing.assert_close(output, torch.from_numpy(slow), atol=1e-12, rtol=1e-12)
    logits, value, _ = outputs
    live, mask = obs["kind"] > 0, obs["action_mask"]
    assert (logits[live][~mask[live]] == -1e9).all()
    assert (logits[~live] == 0).all() and (value[~live] == 0).all()
    return logits[live][mask[live]], value[live]


@pytest.mark.parametrize("H, W", [(16, 24), (24, 8), (20, 13), (9, 31), (8, 8), (5, 3), (48, 48)])
def test_entity_by_entity(H, W):
    """Boards of any size, and without any entity."""
    obs = observation(H, W)
    net = network(obs)
    for x in compare(net, obs):
        assert x.abs().min() > 1e-4, "a number that every network gives"
    obs["kind"][:] = 0
    compare(net, obs)


def test_without_a_board():
    """Neither a board nor positions are asked for, and no layer is there for them."""
    obs = observation(8, 8)
    del obs["board"], obs["position"]
    net = network(obs)
    for x in compare(net, obs):
        assert x.abs().min() > 1e-4
    layers = {name.partition(".")[0] for name, _ in net.named_parameters()}
    assert layers == {"near", "trunk", "actor", "critic", "team_critic"}


# -- Gradients -----------------------------------------------------------------------------

MONOLITHIC = ("stem", "block.conv1", "block.conv2", "block.squeeze", "block.excite")
SHARED = (*MONOLITHIC, "patch", "near", "far", "trunk.1", "trunk.2")
# Output -> the layers that learn from it; no other does. Each kind has its part of the actor.
LEARNS = {
    **{f"policy of kind {kind}": (*SHARED, f"actor of kind {kind}") for kind in KINDS},
    "value": (*SHARED, "critic.0", "critic.2"),
    "team_value": (*SHARED, "team_critic.0", "team_critic.2"),
    "team_value without entities": (*MONOLITHIC, "team_critic.0", "team_critic.2"),
}


def parts_of(parameters):
    """(layer, name of a parameter, rows of it) for all, the parts of the actor separately."""
    for name in parameters:
        layer = name.rpartition(".")[0]
        if layer == "actor":
            for kind in KINDS:
                yield f"actor of kind {kind}", name, slice(ACTIONS * (kind - 1), ACTIONS * kind)
        else:
            yield layer, name, slice(None)


def weighted_sums(obs, logits, value, team_value):
    """For each of LEARNS a random combination of its numbers for all entities or teams."""
    torch.manual_seed(1)
    kind = obs["kind"]
    of_action, of_entity, of_team = map(torch.randn_like, (logits, value, team_value))
    empty = (kind == 0).all(1)
    sums = (
        *((logits * of_action)[obs["action_mask"] & (kind == k)[..., None]].sum() for k in KINDS),
        (value * of_entity)[kind > 0].sum(),
        (team_value * of_team)[~empty].sum(),
        (team_value * of_team)[empty].sum(),
    )
    return dict(zip(LEARNS, sums))


def test_what_each_output_teaches():
    """Each output has the gradient of the slow forward, by differences, and no other."""
    obs = observation(20, 13)
    net = network(obs)
    p = parameters_of(net)
    gradients = {}
    for output, x in weighted_sums(obs, *net(obs)).items():
        found = torch.autograd.grad(x, list(net.parameters()), retain_graph=True, allow_unused=True)
        gradients[output] = {name: 0 * p[name] if g is None else g.numpy() for name, g in zip(p, found)}

    rng, step = np.random.default_rng(2), 1e-6
    for layer, name, rows in parts_of(p):
        direction = np.zeros_like(p[name])
        direction[rows] = rng.normal(size=direction[rows].shape)
        moved = [p | {name: p[name] + sign * step * direction} for sign in (1, -1)]
        after, before = (weighted_sums(obs, *map(torch.from_numpy, slow_forward(x, obs))) for x in moved)
        for output, gradient in gradients.items():
            where = f"{output}: {name} ({layer})"
            gradient = gradient[name][rows]
            size = float(np.linalg.norm(gradient))
            expected = (after[output] - before[output]).item() / (2 * step)
            found = (gradient * direction[rows]).sum()
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6 * size), where
            assert size > 1e-3 if layer in LEARNS[output] else size == 0, where
    assert {layer for layer, *_ in parts_of(p)} == set().union(*LEARNS.values())


# -- Size, start, cost ---------------------------------------------------------------------


def real_network(*size):
    """An observation of the game, and the network for it as a training starts with it."""
    torch.manual_seed(0)
    obs = made_up_observation(3, *size)
    return obs, HybridNet(space_of(obs, kinds=lux_wrapper.ROBOT), lux_wrapper.NUM_ACTIONS)


@pytest.mark.parametrize("size", [(48, 5, 20), (64, 10, 100)])
def test_size_on_the_real_game(size):
    """Not too many parameters, whatever the number of slots and the size of the board."""
    _, net = real_network(*size)
    assert 10_000 < sum(parameter.numel() for parameter in net.parameters()) <= PARAMETER_LIMIT


def test_start():
    """Orthogonal weights of gain sqrt(2), 0.01 in the last layers, zero biases, LayerNorm of 1."""
    obs, net = real_network()
    layers = {name: layer for name, layer in net.named_modules() if hasattr(layer, "bias")}
    sizes = [x.numel() for layer in layers.values() for x in layer.parameters()]
    assert sum(sizes) == sum(x.numel() for x in net.parameters())
    for name, layer in layers.items():
        assert (layer.bias == 0).all(), name
        if isinstance(layer, nn.LayerNorm):
            assert name == "trunk.2" and (layer.weight == 1).all()
            continue
        weight = layer.weight.detach().flatten(1)
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        gain = 0.01 if name in ("actor", "critic.2", "team_critic.2") else math.sqrt(2)
        product = weight @ weight.T / gain**2
        torch.testing.assert_close(product, torch.eye(len(weight)), atol=1e-12, rtol=0, msg=name)
    logits, value, team_value = net(obs)
    assert logits[logits > -1e8].abs().max() < 0.1
    assert max(value.abs().max(), team_value.abs().max()) < 0.1


def test_cost_follows_live_entities():
    """No layer sees more rows than live entities (or boards), however many slots are empty."""
    obs = observation(20, 13)
    net = network(obs)
    rows = []
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, _: rows.append(len(inputs[0])))
    few_outputs = net(obs)
    few = rows.copy()
    assert max(few) == sum(LIVE) > len(LIVE)

    rows.clear()
    padded = {key: torch.cat([x] + 9 * [torch.zeros_like(x)], 1) for key, x in obs.items()}
    more = net(padded | {"board": obs["board"]})
    assert rows == few
    for x, y in zip(few_outputs, more):
        torch.testing.assert_close(y[:, :SLOTS] if y.ndim > 1 else y, x)
        assert y.ndim == 1 or not y[:, SLOTS:].any()


def test_knows_no_game():
    """The network imports neither the wrapper nor the engine: sizes come from the spaces."""
    imports = re.findall(r"^\s*(?:import|from) (\w+)", Path(hybrid_model.__file__).read_text(), re.M)
    assert {*imports} == {"numpy", "torch"}
