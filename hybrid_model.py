"""The hybrid network: one shared encoder over the board, one small actor and critic for every entity.

The *monolithic* half runs once over the board of a team, however many entities there are. In the
*distributed* half every live entity reads the encoder's features of its own place, a patch of the raw board
around it and a summary of the whole, and gets its own action logits and value. Only live entities are
computed, so the cost follows their number and not the number of slots.

B boards (one for every team and step), E entity slots, M live entities of all boards together, C board
channels, F entity features, K kinds of entities, A actions, H x W cells, h x w = H/8 x W/8 (rounded up) map positions:

    tensor            shape               from
    board             [B, H, W, C]        the observation, uint8 percent
    map               [B, 32, h, w]       a linear layer on tiles of 8 x 8 cells, then a residual block
    whole             [B, 64]             mean and maximum of the map over its cells
    patch             [M, 25 * C] -> 96   the 5 x 5 cells around each entity (input, so it needs no gradient)
    place             [M, 32]             the map at the entity's own position
    hidden            [M, 128]            two layers on patch, place, whole, features, action mask and kind
    logits            [B, E, A]           linear on hidden, a head for each kind
    value             [B, E]              two layers on hidden: the expected return of the entity
    team_value        [B]                 two layers on whole and the mean of hidden: the team's return

It knows nothing of any game: sizes come from the spaces, and any board size works. Tiles of boards of up to
16 x 16 cells have 2 x 2 cells. A game without a board leaves it out of the observation, and its positions too: then
there is no map, whole, patch or place.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

PATCH = 5


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
        observation_space: of one match, a Dict whose "features" are [..., E, F] and "board", if there is one,
            [..., H, W, C]. K is the highest "kind" (0 means an empty slot).
        num_actions: A.
    """

    def __init__(self, observation_space, num_actions, channels=32, width=128):
        super().__init__()
        num_features = observation_space["features"].shape[-1]
        self.num_actions, self.num_kinds = num_actions, int(observation_space["kind"].high.max())
        self.has_board = "board" in observation_space.keys()
        of_place = of_whole = 0  # sizes of what is read off the board
        if self.has_board:
            *_, H, W, board_channels = observation_space["board"].shape
            self.tile = 8 if max(H, W) > 16 else 2
            of_place, of_whole = 96 + channels, 2 * channels
            self.stem = layer_init(nn.Linear(board_channels * self.tile**2, channels))
            self.block = ResidualBlock(channels)
            self.patch = layer_init(nn.Linear(board_channels * PATCH**2, 96))
        self.near = layer_init(nn.Linear(of_place + num_features + num_actions + self.num_kinds, width))
        if self.has_board:
            self.far = layer_init(nn.Linear(of_whole, width))
        self.trunk = nn.Sequential(nn.ReLU(), layer_init(nn.Linear(width, width)), nn.LayerNorm(width), nn.ReLU())
        # All heads begin near zero: values that mean nothing yet would drown the first rewards in the advantages.
        self.actor = layer_init(nn.Linear(width, self.num_kinds * num_actions), std=0.01)
        self.critic = nn.Sequential(layer_init(nn.Linear(width, 64)), nn.ReLU(), layer_init(nn.Linear(64, 1), std=0.01))
        self.team_critic = nn.Sequential(
            layer_init(nn.Linear(width + of_whole, 64)), nn.ReLU(), layer_init(nn.Linear(64, 1), std=0.01)
        )

    def forward(self, obs):
        """Logits and values for B boards.

        Args:
            obs: dict of tensors as in the table above: features [B, E, F], kind [B, E] (0 in an empty slot)
                and action_mask [B, E, A]; of a game with a board, board [B, H, W, C] and position [B, E, 2].

        Returns:
            logits [B, E, A], about -1e9 where an action is masked and 0 in empty slots; value [B, E], 0 in
            empty slots; team_value [B].
        """
        kind = obs["kind"]
        B, E = kind.shape
        live = kind.flatten().nonzero().squeeze(1)  # the M live entities, as row * E + slot
        row = live // E
        features = obs["features"].flatten(0, 1).index_select(0, live)
        action_mask = obs["action_mask"].flatten(0, 1).index_select(0, live).bool()
        kind_index = kind.flatten().index_select(0, live) - 1
        own = torch.cat([features, action_mask, F.one_hot(kind_index, self.num_kinds)], -1)
        if self.has_board:
            x, y = obs["position"].flatten(0, 1).index_select(0, live).unbind(-1)
            whole, place, patch = self._look(obs["board"], row, x, y)
            near = self.near(torch.cat([patch, place, own], -1)) + self.far(whole).index_select(0, row)
        else:
            whole, near = features.new_zeros(B, 0), self.near(own)
        hidden = self.trunk(near)

        heads = self.actor(hidden).view(-1, self.num_kinds, self.num_actions)
        live_logits = heads[torch.arange(len(live), device=live.device), kind_index].masked_fill(~action_mask, -1e9)
        logits = live_logits.new_zeros(B * E, self.num_actions).index_copy(0, live, live_logits)
        value = live_logits.new_zeros(B * E).index_copy(0, live, self.critic(hidden).squeeze(-1))

        count = (kind > 0).sum(-1, keepdim=True).clamp(min=1)
        mean = hidden.new_zeros(B, hidden.shape[1]).index_add(0, row, hidden) / count
        team_value = self.team_critic(torch.cat([mean, whole], -1)).squeeze(-1)
        return logits.view(B, E, -1), value.view(B, E), team_value

    def _look(self, board, row, x, y):
        """What M entities, in these rows and cells, see of the boards: whole, place and patch, as above."""
        map = self._map(board)
        B, _, h, w = map.shape
        whole = torch.cat([map.mean((2, 3)), F.max_pool2d(map, (h, w)).flatten(1)], -1)
        # One flattened gather: reading map[row, :, x, y] would allocate a map-sized gradient per read.
        cells = map.permute(0, 2, 3, 1).reshape(B * h * w, -1)
        place = cells.index_select(0, (row * h + x // self.tile) * w + y // self.tile)
        patch = F.relu(F.linear(self._patches(board, row, x, y), self.patch.weight / 100, self.patch.bias))
        return whole, place, patch

    def _map(self, board):
        """The encoder: [B, channels, h, w], in channels_last layout."""
        tile = self.tile
        beyond = (0, 0, 0, -board.shape[2] % tile, 0, -board.shape[1] % tile)
        board = F.pad(board, beyond) if any(beyond) else board
        B, H, W, C = board.shape
        h, w = H // tile, W // tile
        # Tiles are put together as bytes: a quarter of the memory that floats would move.
        tiles = board.view(B, h, tile, w, tile * C).transpose(2, 3).reshape(B, h, w, -1).float()
        # The board is in percent; dividing the weights is cheaper than dividing every cell.
        map = F.relu(F.linear(tiles, self.stem.weight / 100, self.stem.bias))
        return self.block(map.permute(0, 3, 1, 2))

    def _patches(self, board, row, x, y):
        """The PATCH x PATCH cells around each entity, 0 beyond the edge: [M, PATCH^2 * C]."""
        B, H, W, C = board.shape
        offset = torch.arange(PATCH, device=board.device) - PATCH // 2
        x, y = (x[:, None] + offset)[:, :, None], (y[:, None] + offset)[:, None]
        inside = (x >= 0) & (x < H) & (y >= 0) & (y < W)
        cell = torch.where(inside, (row[:, None, None] * H + x) * W + y, B * H * W)
        cells = torch.cat([board.view(-1, C), board.new_zeros(1, C)])  # the last one is that beyond the edge
        return cells.index_select(0, cell.flatten()).view(len(row), PATCH**2 * C).float()
