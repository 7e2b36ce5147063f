"""A bot: a trained network plays one side of a match, for the official runner (JSON lines) or for Kaggle (`agent_fn`).

It sees the game through the training's own LuxEncoder, and needs only NumPy, PyTorch and what `pack.py` puts beside
it: model.pt, lux_wrapper.py and hybrid_model.py.

It never dies in mid-match. A turn that it cannot read costs the orders of that turn and a line on stderr; with a model
that it cannot use it says so, places its factories and gives no orders.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for one board, several threads are slower
HERE = Path(sys._getframe().f_code.co_filename).resolve().parent  # Kaggle sets no __file__
sys.path[:0] = [str(HERE), str(HERE.parent)]  # all is here in a packed bot, one folder up in the repository

import numpy as np  # noqa: E402
import torch  # noqa: E402

from hybrid_model import HybridNet  # noqa: E402
from lux_wrapper import (  # noqa: E402
    NUM_ACTIONS,
    PLAYERS,
    ROBOT,
    LuxEncoder,
    LuxOptions,
    checked_options,
    early_phase_action,
    read_observation,
)

SAMPLE = True  # draw actions from the policy; False: always take the likeliest one
SEED = 0  # of the draws: the same match is played the same way again

MAPS = ("rubble", "ice", "ore", "lichen", "lichen_strains", "valid_spawns_mask")
NO_BID = {"faction": "AlphaStrike", "bid": 0}


def load_model(path):
    """The network of a model.pt or checkpoint, and the LuxOptions that it was trained with.

    Raises:
        Exception: of any kind, if the file is damaged or holds something else.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    args, weights = content["args"], content["model"]
    options = checked_options(**args["env_kwargs"] | {"group_by": "entity"})  # only learning needs groups
    space = LuxEncoder(options).empty_obs()  # has the shapes; Gymnasium's own may not be there
    space["kind"] = SimpleNamespace(high=np.array(ROBOT))
    network = HybridNet(space, NUM_ACTIONS)
    network.load_state_dict(weights)
    if not all(x.isfinite().all() for x in weights.values()):
        raise ValueError("some parameters are no finite numbers")
    return network, options


def say(message, error):
    """One line on stderr."""
    print(" ".join(f"{message} ({type(error).__name__}: {error})".split())[:300], file=sys.stderr, flush=True)


class Player:
    """One side of one match: turns in, orders out.

    Args:
        model: path of the model.pt.
    """

    def __init__(self, model=HERE / "model.pt"):
        torch.set_num_threads(1)
        self.turn, self.maps, self.encoder = 0, {}, None
        self.generator = torch.Generator().manual_seed(SEED)
        try:
            self.network, self.options = load_model(model)
        except Exception as error:
            self.network, self.options = None, LuxOptions()
            say(f"{model} cannot be used, so there will be no orders", error)

    def answer(self, message):
        """Orders for the next turn, made of ints, lists and dicts; never raises.

        Args:
            message: the runner's JSON, or a dict of the same, with "player" and "obs".
        """
        orders = {} if self.turn else NO_BID  # no bid at all would lose the match
        try:
            message = message if isinstance(message, dict) else json.loads(message)
            obs = self.read(message["obs"])
            orders = self.orders(obs, message["player"])
        except Exception as error:
            self.encoder = None  # it may have seen half of a turn: the next turn begins a new one
            say(f"turn {self.turn}: no orders", error)
        self.turn += 1
        return {name: order.tolist() if isinstance(order, np.ndarray) else order for name, order in orders.items()}

    def read(self, obs):
        """The whole observation of a turn. The first one comes whole, then maps come as cells that have changed."""
        board, maps = obs["board"], {}
        for name in MAPS:
            if isinstance(changes := board.get(name, {}), dict):
                maps[name] = self.maps[name].copy()
                for cell, value in changes.items():
                    x, y = cell.split(",")
                    maps[name][int(x), int(y)] = value
            else:
                maps[name] = np.array(changes)
        self.maps = maps  # all of them at once: a turn that cannot be read changes none
        return {**obs, "board": {**board, **maps}}

    def orders(self, obs, player):
        """Official orders of one player, as LuxEncoder and `early_phase_action` give them."""
        if obs["real_env_steps"] < 0:
            return early_phase_action(obs, player, self.options.grow_lichen)
        if self.network is None:
            return {}
        if self.encoder is None:
            board = obs["board"]
            stage = {"map_size": len(board["rubble"]), "max_factories": board["factories_per_team"]}
            self.encoder = LuxEncoder(replace(self.options, **stage))
            self.encoder.reset(obs)
        arrays, view = self.encoder.encode([read_observation(obs)])
        own = PLAYERS.index(player)
        actions = np.zeros_like(arrays["kind"])
        actions[0, own] = self.choose({key: torch.from_numpy(x[0, [own]]) for key, x in arrays.items()})
        orders, _ = self.encoder.orders(view, actions)
        return orders[0][own]

    @torch.no_grad()
    def choose(self, own):
        """Actions [E] for the arrays [1, ...] of one's own side."""
        logits = self.network(own)[0][0]
        if SAMPLE:
            return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0].numpy()
        return logits.argmax(-1).numpy()


def main():
    player = Player()
    for line in sys.stdin.buffer:
        print(json.dumps(player.answer(line)), flush=True)


players = {}


def agent_fn(observation, configuration):
    """Kaggle's entry, the last function of this file: the observation's `obs` is JSON."""
    if observation.step == 0:
        players[observation.player] = Player()
    return players[observation.player].answer({"player": observation.player, "obs": json.loads(observation.obs)})


if __name__ == "__main__":
    main()
