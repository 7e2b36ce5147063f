"""The hybrid network: one shared encoder over the board, one small actor and critic for every entity.

The *monolithic* half runs once over the board of a team, however many entities there are. In the
*distributed* half every live entity reads the encoder's features of its own place, a patch of the raw board
around it and a summary of the whole, and gets its own action logits and value. Only live entities are
computed, so the cost follows their number and not the number of slots.

B boards (one for every team and step), E entity slots, M live entities of all boards together, C board
channels, F entity features, A actions, H x W cells, h x w = H/4 x W/4 (rounded up) map positions:

    tensor            shape               from
    board             [B, C, H, W]        the observation, uint8 percent
    map               [B, 32, h, w]       4 x 4 convolution of stride 4, then a residual block
    whole             [B, 64]             mean and maximum of the map over its cells
    patch             [M, C * 25] -> 96   the 5 x 5 cells around each entity (input, so it needs no gradient)
    place             [M, 32]             the map at the entity's own position
    hidden            [M, 128]            two layers on patch, place, whole, features and action mask
    logits            [B, E, A]           linear on hidden, one head for robots and one for factories
    value             [B, E]              two layers on hidden: the expected return of the entity itself
    team_value        [B]                 two layers on whole and the mean of hidden: that of the team

It knows nothing of any game: sizes come from the spaces, and any board size works.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

STRIDE, PATCH = 4, 5


def layer_init(layer, std=np.sqrt(2)):
    """Orthogonal weights of gain `std` and zero biases, in place."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions whose result is weighted per channel (squeeze-and-excitation), plus the input."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = layer_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.conv2 = layer_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.squeeze = layer_init(nn.Linear(channels, channels // 2))
        self.excite = layer_init(nn.Linear(channels // 2, channels))

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))
        weight = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        return F.relu(x + y * weight[..., None, None])


class HybridNet(nn.Module):
    """Actor and critic for all entities of a team.

    Args:
        observation_space: of one match, a Dict whose "board" is [..., C, H, W] and "features" [..., E, F].
        num_actions: A.
        factory_kind: the value of "kind" that the second actor head serves (0 means an empty slot).
    """

    def __init__(self, observation_space, num_actions, factory_kind=1, channels=32, width=128):
        super().__init__()
        board_channels = observation_space["board"].shape[-3]
        num_features = observation_space["features"].shape[-1]
        self.num_actions, self.factory_kind = num_actions, factory_kind
        self.stem = layer_init(nn.Conv2d(board_channels, channels, STRIDE, stride=STRIDE))
        self.block = ResidualBlock(channels)
        self.patch = layer_init(nn.Linear(board_channels * PATCH**2, 96))
        self.trunk = nn.Sequential(
            layer_init(nn.Linear(96 + 3 * channels + num_features + num_actions, width)),
            nn.ReLU(),
            layer_init(nn.Linear(width, width)),
            nn.LayerNorm(width),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(width, 2 * num_actions), std=0.01)
        self.critic = nn.Sequential(layer_init(nn.Linear(width, 64)), nn.ReLU(), layer_init(nn.Linear(64, 1), std=1.0))
        self.team_critic = nn.Sequential(
            layer_init(nn.Linear(width + 2 * channels, 64)), nn.ReLU(), layer_init(nn.Linear(64, 1), std=1.0)
        )

    def forward(self, obs):
        """Logits and values for B boards.

        Args:
            obs: dict of tensors as in the table above: board [B, C, H, W], features [B, E, F],
                position [B, E, 2], kind [B, E] (0 where there is nobody) and action_mask [B, E, A].

        Returns:
            logits [B, E, A], about -1e9 where an action is masked and 0 in empty slots; value [B, E], 0 in
            empty slots; team_value [B].
        """
        board, kind = obs["board"], obs["kind"]
        B, _, H, W = board.shape
        row, slot = kind.nonzero(as_tuple=True)  # the M live entities
        x, y = obs["position"][row, slot].unbind(-1)

        padded = F.pad(board, (0, -W % STRIDE, 0, -H % STRIDE)).float().contiguous(memory_format=torch.channels_last)
        # The board is in percent; dividing the weights is cheaper than dividing every cell.
        features = self.block(F.relu(F.conv2d(padded, self.stem.weight / 100, self.stem.bias, STRIDE)))
        whole = torch.cat([features.mean((2, 3)), features.amax((2, 3))], -1)
        h, w = features.shape[2:]
        # One flattened gather: reading [row, :, x, y] would allocate a map-sized gradient per read.
        cells = features.permute(0, 2, 3, 1).reshape(B * h * w, -1)
        place = cells.index_select(0, (row * h + x // STRIDE) * w + y // STRIDE)

        hidden = torch.cat(
            [
                F.relu(F.linear(self._patches(board, row, x, y), self.patch.weight / 100, self.patch.bias)),
                place,
                whole.index_select(0, row),
                obs["features"][row, slot],
                obs["action_mask"][row, slot].float(),
            ],
            -1,
        )
        hidden = self.trunk(hidden)

        is_factory = (kind[row, slot] == self.factory_kind)[:, None]
        robot_logits, factory_logits = self.actor(hidden).split(self.num_actions, -1)
        live_logits = torch.where(is_factory, factory_logits, robot_logits)
        live_logits = live_logits.masked_fill(~obs["action_mask"][row, slot].bool(), -1e9)
        index = row * kind.shape[1] + slot
        logits = live_logits.new_zeros(kind.numel(), self.num_actions).index_copy(0, index, live_logits)
        value = live_logits.new_zeros(kind.numel()).index_copy(0, index, self.critic(hidden).squeeze(-1))

        count = (kind > 0).sum(-1, keepdim=True).clamp(min=1)
        mean = hidden.new_zeros(B, hidden.shape[1]).index_add(0, row, hidden) / count
        team_value = self.team_critic(torch.cat([mean, whole], -1)).squeeze(-1)
        return logits.view(*kind.shape, -1), value.view(kind.shape), team_value

    def _patches(self, board, row, x, y):
        """The PATCH x PATCH cells of all channels around each entity, 0 beyond the edge: [M, C * PATCH^2]."""
        B, C, H, W = board.shape
        half = PATCH // 2
        padded = F.pad(board, (half, half, half, half)).flatten()
        height, width = H + 2 * half, W + 2 * half
        offset = torch.arange(PATCH, device=board.device)
        inner = (offset[:, None] * width + offset).flatten()
        inner = (torch.arange(C, device=board.device)[:, None] * (height * width) + inner).flatten()
        corner = row * (C * height * width) + x * width + y
        return padded[corner[:, None] + inner].float()
