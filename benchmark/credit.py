"""One page that plays a match and shows what each entity, and what the team, is told.

    python benchmark/credit.py runs/<run>
    python benchmark/credit.py submission/model.pt --map 6001 --team 1 --out bot.html
    python benchmark/credit.py early.pt middle.pt late.pt    # checkpoints side by side

A run's policy plays both sides of a match on a held-out map. The page needs no network: on its left is the
board, on its right a row for each trajectory of a team, with rewards, values and advantages by the functions
of the script that trained it. A switch shows the advantage that one trajectory of the whole team would give.
`match.py --replays` writes the same page, without rows, of a match of two bots.

Axis letters as in the scripts: T steps, B = 2 teams, G groups.
"""

import argparse
import os
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from torch.distributions import Categorical
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from page import board_of, snapshot, write_page  # noqa: E402

import global_ppo  # noqa: E402
import lux_wrapper as lux  # noqa: E402
import trajsep_ppo  # noqa: E402
from hybrid_model import HybridNet  # noqa: E402
from trajsep_ppo import Refused, checkpoints, group_sum, group_value, share_reward  # noqa: E402

FIRST_MAP = 6000  # from here on no map was used to choose anything
UNIT = 1e-5  # rewards, values and advantages are whole multiples of it on the page


def load(source):
    """Script, arguments, agent and step (None: unknown) of a run or checkpoint; Refused if there is none."""
    *_, path = checkpoints(source) or [Path(source)]
    if not path.is_file():
        raise Refused(f"there is no checkpoint at {source}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        script = trajsep_ppo if "agent_reward_weight" in content["args"] else global_ppo
        args, weights = script.Args(**content["args"]), content["model"]
        assert not ZipFile(path).testzip()
    except Exception:  # a damaged file can raise anything
        raise Refused(f"{path} is damaged, or not a checkpoint of trajsep_ppo.py or global_ppo.py")
    envs = script.make_envs(args, 1, num_workers=0)
    if not isinstance(envs, lux.LuxVecEnv):
        raise Refused(f"{path} plays {args.env_id}, and this page draws Lux AI only")
    agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max()))
    try:
        agent.load_state_dict(weights)
    except RuntimeError:
        raise Refused(f"{path} does not fit the network of this version")
    return script, args, agent, content.get("global_step")


@torch.no_grad()
def play(script, args, agent, step, seed, steps, greedy=False):
    """Play a match on a held-out map, as `train` collects a rollout.

    Args:
        step: of the checkpoint, for the weight of positive rewards; None: the end of the training.

    Returns:
        A dict: "own" and "team", each a dict of rewards and advantages [T, B, G], values and active
        [T + 1, B, G]; `earned` [T, B, G], the own rewards before they are shared; dones [T, B]; `who` acts,
        for each step a list of (unit_id, team, group, action); `board`; and whether groups are a `cluster`.
    """
    envs = script.make_envs(args, 1, num_workers=0, held_out=True)
    obs, _ = envs.reset(seed=seed)
    [match], encoder = envs.matches, envs.games.envs[0].encoder
    ground, snapshots, play_step = match.engine.state.board, [snapshot(match.engine.state)], match.step

    def watched(orders, acts):  # after its last step the engine shows another match
        result = play_step(orders, acts)
        snapshots.append(snapshot(match.engine.state))
        return result

    match.step = watched
    separate = script is trajsep_ppo
    rollout_steps = args.num_envs * args.num_steps
    elapsed = 1 if step is None else step // rollout_steps / (args.total_timesteps // rollout_steps)
    positive_weight = args.positive_reward_weight + (1 - args.positive_reward_weight) * elapsed
    own, whole = ({"rewards": [], "values": [], "active": []} for _ in range(2))
    earned, dones, who = [], [], []
    torch.manual_seed(seed)
    for now in tqdm(range(steps + 1), desc=f"map {seed}", unit="step", leave=False):
        obs = script.to_tensors({key: x.copy() for key, x in obs.items()}, "cpu")
        logits, value, team_value = agent(obs)
        active = group_sum(torch.ones_like(value), obs) > 0
        own["active"].append(active)
        own["values"].append(group_value(value, team_value, obs))
        whole["active"].append(active.any(-1, keepdim=True))
        # Separate trajectories have no value of the team: the sum of theirs stands for it
        summed, learned = own["values"][-1].sum(-1, keepdim=True), global_ppo.group_value(value, team_value, obs)
        whole["values"].append(summed if separate else learned)
        if now == steps or dones and dones[-1].any():
            break
        policy = Categorical(logits=logits, validate_args=False)
        action = logits.argmax(-1) if greedy else script.sample(policy.probs)
        who.append([])
        for team in (0, 1):
            for unit_id, slot in (encoder.factory_slots[0][team] | encoder.robot_slots[0][team]).items():
                if obs["kind"][team, slot] > 0:
                    who[-1].append((unit_id, team, int(obs["group"][team, slot]), int(action[team, slot])))
        next_obs, reward, terminated, truncated, _ = envs.step(action[None].numpy())
        reward = torch.as_tensor(reward).flatten(0, 1)
        reward = torch.where(reward > 0, reward * positive_weight, reward)
        earned.append(group_sum(reward, obs))
        own["rewards"].append(share_reward(earned[-1], active, args.agent_reward_weight if separate else 1))
        whole["rewards"].append(global_ppo.group_sum(reward, obs))
        dones.append(torch.as_tensor(terminated | truncated).repeat_interleave(2))
        obs = next_obs
    envs.close()
    rollout = {"earned": torch.stack(earned), "dones": torch.stack(dones), "who": who}
    for of, rows in (("own", own), ("team", whole)):
        x = rollout[of] = {key: torch.stack(row) for key, row in rows.items()}
        given = x["rewards"], x["values"], x["active"], rollout["dones"]
        x["advantages"] = script.compute_gae(*given, args.gamma, args.gae_lambda)
    board = board_of(snapshots, ground, ["team 0", "team 1"], seed)
    return rollout | {"board": board, "cluster": envs.options.group_by == "cluster"}


def credit_of(script, args, rollout, team):
    """What the page says of the trajectories of a team, as plain data.

    A row has lists that begin when it is `born`; values have one more entry where the match goes on.
    """
    keys = ("rewards", "values", "advantages")
    T, units = len(rollout["earned"]), rollout["board"]["units"]
    last = T if rollout["dones"][-1].any() else T + 1
    active = rollout["own"]["active"][:last, team].numpy()
    lives = []
    for group in range(active.shape[-1]):
        edges = np.flatnonzero(np.diff(np.pad(active[:, group].astype(int), 1)))
        for born, end in edges.reshape(-1, 2).tolist():
            if born < T:  # else it has not acted yet
                leader = next(unit_id for unit_id, *place, _ in rollout["who"][born] if place == [team, group])
                builder = units[leader]["builder"] or leader
                lives.append((list(units).index(builder), born, end, group, leader))
    rows, row_of = [], {}  # row_of: (group, step) -> index
    for _, born, end, group, leader in sorted(lives):  # a factory, then the robots that it built
        row_of |= {(group, step): len(rows) for step in range(born, end)}
        name = units[leader]["name"] + " and its robots" * rollout["cluster"]
        row = {"name": name, "leader": leader, "born": born}
        row["earned"] = in_units(rollout["earned"][born:end, team, group])
        for key in keys if script is trajsep_ppo else ():
            row[key] = in_units(rollout["own"][key][born:end, team, group])
        rows.append(row)
    for unit in units.values():
        unit |= {"chosen": "", "rows": []}  # rows: [step, index from then on, step, ...]
    for step, seen in enumerate(rollout["who"]):
        for unit_id, of_team, group, action in seen:
            unit = units[unit_id]
            unit["chosen"] += str(action)
            if of_team == team and unit["rows"][-1:] != [index := row_of[group, step]]:
                unit["rows"] += [step, index]
    whole = {key: in_units(rollout["team"][key][:last, team, 0]) for key in keys}
    return {"team": team, "rows": rows, "whole": whole, **compare(script, args, rollout, team)}


def in_units(x):
    return (x.double() / UNIT).round().long().tolist()


def compare(script, args, rollout, team):
    """How the team's advantage compares with those of its entities, over all active cells of a match."""
    moments, explained, advantages = {}, {}, {}
    for of in ("own", "team"):
        x, values = rollout[of]["advantages"], rollout[of]["values"][:-1]
        active = rollout[of]["active"][:-1]
        _, mean, variance = script.all_moments(x, active)
        _, _, of_returns = script.all_moments(x + values, active)
        moments[of] = [mean.item(), variance.sqrt().item()]
        explained[of] = (1 - variance / of_returns).item() if of_returns > 0 else None
        advantages[of] = {"before": x[:, team], "after": ((x - mean) / (variance.sqrt() + 1e-8))[:, team]}
    active, wrong = rollout["own"]["active"][:-1, team], {}
    for when in ("before", "after"):
        opposite = advantages["own"][when] * advantages["team"][when] < 0
        wrong[when] = script.masked_mean(opposite.float(), active).item()
    pairs = torch.stack([x["before"].expand_as(active)[active] for x in advantages.values()])
    correlation = torch.corrcoef(pairs)[0, 1].item() if (pairs.std(1) > 0).all() else None
    separate = script is trajsep_ppo
    return {
        "separate": separate,
        "cells": int(active.sum()),
        "alive": active.sum().item() / len(active),
        "wrong": wrong if separate else None,
        "used": "after" if args.norm_adv else "before",
        "correlation": correlation if separate else None,
        "explained": explained["own" if separate else "team"],
        "moments": moments,
        "weight": args.agent_reward_weight if separate else 1,
        "unit": UNIT,
    }


def sentence(credit):
    """The numbers of the page, in words."""
    if not credit["separate"]:
        return "a baseline, one trajectory for the team: no entity has an advantage of its own to compare with"
    wrong, correlation = credit["wrong"], credit["correlation"]
    return (
        f"the team's advantage has the wrong sign in {wrong[credit['used']]:.1%} of {credit['cells']:,} "
        f"entity-steps, {credit['alive']:.1f} alive (before normalization {wrong['before']:.1%}, after it "
        f"{wrong['after']:.1%}; correlation {'undefined' if correlation is None else f'{correlation:.2f}'})"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="+", help="a run's folder or checkpoint; several are shown side by side")
    parser.add_argument("--map", type=int, default=FIRST_MAP, help="seed of a held-out map")
    parser.add_argument("--steps", type=int, default=1000, help="length of the match, at most")
    parser.add_argument("--team", type=int, default=0, choices=(0, 1), help="whose trajectories are shown")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest actions, not sampled ones")
    parser.add_argument("--out", help="the page, instead of runs/credit.html or the next free name")
    args = parser.parse_args()
    try:
        if not 0 <= args.map < lux.HELD_OUT_SEEDS or args.steps < 1:
            raise Refused(f"--map must be between 0 and {lux.HELD_OUT_SEEDS - 1:,}, and --steps at least 1")
        runs = [load(source) for source in args.run]
        out, number = Path(args.out or "runs/credit.html"), 1
        if args.out is None:
            out.parent.mkdir(exist_ok=True)
        while args.out is None and out.exists():
            number += 1
            out = Path(f"runs/credit-{number}.html")
        if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
            raise Refused(f"{out} cannot be written; is its folder there?")
        matches = []
        for source, (script, flags, agent, step) in zip(args.run, runs):
            rollout = play(script, flags, agent, step, args.map, args.steps, args.greedy)
            title = source + ("" if step is None else f", step {step:,}") + ", likeliest actions" * args.greedy
            credit = credit_of(script, flags, rollout, args.team)
            matches.append({"title": title, "board": rollout["board"], "credit": credit})
            print(f"{title}: {sentence(credit)}")
        write_page(out, matches)
    except (Refused, global_ppo.Refused, OSError) as error:
        print(f"credit.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ncredit.py: interrupted; nothing is written", file=sys.stderr)
        sys.exit(130)
    print(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
