"""One page that plays a match and shows the advantage of each entity, and of the team.

    python benchmark/credit.py submission/model.pt --map 6001 --out bot.html
    python benchmark/credit.py early.pt middle.pt late.pt    # checkpoints side by side

A run's policy plays both sides of a match on a held-out map. The page has the board, and a row for each
trajectory of a team, with rewards, values and advantages by the functions of the script that trained it. A
switch shows the advantage that one trajectory of the whole team would give.

Axis letters as in the scripts: T steps, B = 2 teams, G groups.
"""

import argparse
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from page import board_of, snapshot, write_page
from plot import check_writable
from torch.distributions import Categorical
from tqdm import tqdm

import global_ppo
import lux_wrapper as lux
import trajsep_ppo
from hybrid_model import HybridNet
from trajsep_ppo import Refused, checkpoints, group_sum, group_value, share_reward

FIRST_MAP = 6000  # from here on no map was used to choose anything
KEYS = ("rewards", "values", "advantages")
UNIT = 1e-5  # they are whole multiples of it on the page


def load(source):
    """Script, arguments, agent and step (None: unknown) of a run or checkpoint; Refused if there is none."""
    *_, path = checkpoints(source) or [Path(source)]
    if not path.is_file():
        raise Refused(f"there is no checkpoint at {source}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        script = trajsep_ppo if "agent_reward_weight" in content["args"] else global_ppo
        args = script.Args(**content["args"])
        envs = script.make_envs(args, 1, num_workers=0)
        agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max()))
        agent.load_state_dict(content["model"])
        assert not ZipFile(path).testzip()
    except (Refused, global_ppo.Refused):  # its environment cannot be made
        raise
    except Exception:  # a damaged file can raise anything
        raise Refused(f"{path} is damaged, or not a checkpoint of today's trajsep_ppo.py or global_ppo.py")
    if not isinstance(envs, lux.LuxVecEnv):
        raise Refused(f"{path} plays {args.env_id}, and this page draws Lux AI only")
    return script, args, agent, content.get("global_step")


@torch.no_grad()
def play(script, args, agent, step, seed, steps, greedy=False):
    """Play a match on a held-out map, as `train` collects a rollout; `step`: of the checkpoint.

    Returns:
        A dict: "own" and "team", each a dict of rewards and advantages [T, B, G], values and active
        [T + 1, B, G]; `earned` [T, B, G], the own rewards before they are shared; dones [T, B]; `who` acts,
        for each step a list of (unit_id, team, group, action); and the `board`.
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
    return rollout | {"board": board_of(snapshots, ground, ["team 0", "team 1"], seed)}


def credit_of(script, args, rollout, team):
    """What the page says of the trajectories of a team, as plain data.

    A row has lists that begin when it is `born`; values have one more entry where the match goes on.
    """
    T, units = len(rollout["earned"]), rollout["board"]["units"]
    last = T if rollout["dones"][-1].any() else T + 1
    active = np.pad(rollout["own"]["active"][:last, team].numpy().astype(int), ((1, 1), (0, 0)))
    lives = []
    for born, group in np.argwhere(np.diff(active[: T + 1], axis=0) > 0).tolist():
        end = born + int(active[born + 1 :, group].argmin())
        leader = next(unit_id for unit_id, *place, _ in rollout["who"][born] if place == [team, group])
        order = list(units).index(units[leader]["builder"] or leader)
        lives.append((order, born, end, group, leader))
    rows, row_of = [], {}  # row_of: (group, step) -> index
    for _, born, end, group, leader in sorted(lives):  # a factory, then the robots that it built
        row_of |= {(group, step): len(rows) for step in range(born, end)}
        mine = {"earned": rollout["earned"], **(rollout["own"] if script is trajsep_ppo else {})}
        row = {key: in_units(mine[key][born:end, team, group]) for key in ("earned", *KEYS) if key in mine}
        rows.append({"name": units[leader]["name"], "leader": leader, "born": born, **row})
    for unit in units.values():
        unit |= {"chosen": "", "rows": []}  # rows: [step, index from then on, step, ...]
    for step, seen in enumerate(rollout["who"]):
        for unit_id, of_team, group, action in seen:
            unit = units[unit_id]
            unit["chosen"] += str(action)
            if of_team == team and unit["rows"][-1:] != [index := row_of[group, step]]:
                unit["rows"] += [step, index]
    whole = {key: in_units(rollout["team"][key][:last, team, 0]) for key in KEYS}
    return {"team": team, "rows": rows, "whole": whole, "unit": UNIT, **compare(script, args, rollout, team)}


def in_units(x):
    return (x.double() / UNIT).round().long().tolist()


def compare(script, args, rollout, team):
    """How the team's advantage compares with those of its entities, over all active cells of a match."""
    moments, told = {}, {"before": {}, "after": {}}  # told: before and after normalization
    for of in ("own", "team"):
        x = rollout[of]["advantages"]
        _, mean, variance = script.all_moments(x, rollout[of]["active"][:-1])
        moments[of] = [mean.item(), variance.sqrt().item()]
        told["before"][of] = x[:, team]
        told["after"][of] = ((x - mean) / (variance.sqrt() + 1e-8))[:, team]
    active, separate = rollout["own"]["active"][:-1, team], script is trajsep_ppo
    opposite = {when: (x["own"] * x["team"] < 0).float() for when, x in told.items()}
    pairs = torch.stack([x.expand_as(active)[active] for x in told["before"].values()])
    return {
        "separate": separate,
        "cells": int(active.sum()),
        "alive": active.sum().item() / len(active),
        "wrong": {when: script.masked_mean(x, active).item() for when, x in opposite.items()},
        "used": "after" if args.norm_adv else "before",
        "correlation": torch.corrcoef(pairs)[0, 1].nan_to_num().item(),  # a constant has none
        "moments": moments,
        "weight": args.agent_reward_weight if separate else 1,
    }


def sentence(credit):
    """The numbers of the page, in words."""
    if not credit["separate"]:
        return "a baseline, one trajectory for the team: no entity has an advantage of its own to compare with"
    wrong = credit["wrong"]
    return (
        f"the team's advantage has the wrong sign in {wrong[credit['used']]:.1%} of {credit['cells']:,} entity-steps "
        f"(before normalization {wrong['before']:.1%}; {credit['alive']:.1f} alive; "
        f"correlation {credit['correlation']:.2f})"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="+", help="a run's folder or checkpoint; several are shown side by side")
    parser.add_argument("--map", type=int, default=FIRST_MAP, help="seed of a held-out map")
    parser.add_argument("--steps", type=int, default=1000, help="length of the match, at most")
    parser.add_argument("--team", type=int, default=0, choices=(0, 1), help="whose trajectories are shown")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest actions, not sampled ones")
    parser.add_argument("--out", help="the page, instead of a new one in runs/")
    args = parser.parse_args()
    out = Path(args.out or f"runs/credit__{time.time_ns() // 10**6}.html")
    try:
        if not 0 <= args.map < lux.HELD_OUT_SEEDS or args.steps < 1:
            raise Refused(f"--map must be between 0 and {lux.HELD_OUT_SEEDS - 1:,}, and --steps at least 1")
        if args.out:
            check_writable(out)
        matches = []
        for source, (script, flags, agent, step) in [(source, load(source)) for source in args.run]:
            rollout = play(script, flags, agent, step, args.map, args.steps, args.greedy)
            title = source + ("" if step is None else f", step {step:,}") + ", likeliest actions" * args.greedy
            credit = credit_of(script, flags, rollout, args.team)
            matches.append({"title": title, "board": rollout["board"], "credit": credit})
            print(f"{title}: {sentence(credit)}")
        out.parent.mkdir(exist_ok=True)
        write_page(out, matches)
    except (Refused, global_ppo.Refused, OSError) as error:
        print(f"credit.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
