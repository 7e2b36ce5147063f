"""Trajectory-separated PPO on Lux AI Season 2: every entity, or cluster of entities, has its own trajectory.

    python trajsep_ppo.py --agent-reward-weight 0.8

`--resume runs/<run>` goes on with a run, `--evaluate runs/<run>` plays it on held-out maps. To share the work among
two processes, write `torchrun --standalone --nproc-per-node 2` in place of `python`.

One shared encoder reads the map. Every group (a robot, a factory, or a factory with its robots) has its own
reward, value, advantage, probability ratio and entropy, from its birth to its death; in global_ppo.py the team has.
The two are the same program, and every place in which they differ is marked with (*).
Read `Args`, the functions of the method, and `train`: collect, advantages, update. The rest runs it.
Axis letters: T steps, N matches, P players, B = N * P teams, E entity slots, G groups, A actions.

Source: Takács, Magyar, Gulyás, "Scalable Distributed Reinforcement Learning in Multi-Agent Environments"
(2024). The layout and the names of flags and metrics follow CleanRL's ppo.py.
"""

import io
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Literal  # (*)
from zipfile import ZipFile

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hybrid_model import HybridNet
from lux_wrapper import LuxError, LuxVecEnv

# The processes of torchrun share every rollout and every minibatch
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


@dataclass
class Args:
    # The run
    exp_name: str = Path(__file__).stem  # first part of the run's name
    seed: int = 1
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    capture_video: bool = False  # draw one evaluation match into video.gif
    evaluate: str | None = None  # evaluate this run or checkpoint instead of training
    resume: str | None = None  # go on with this run or checkpoint
    eval_episodes: int = 20  # matches of the evaluation at the end, on held-out maps
    save_every: int = 20  # updates between two checkpoints

    # The game
    num_workers: int | None = None  # processes that play the matches; default: one per core
    map_size: int = 48  # side of the board in cells (season 2: 48, NeurIPS stage: 64)
    min_factories: int = 2  # fewest factories per team (season 2: 2, NeurIPS stage: 4)
    max_factories: int = 5  # most factories per team (season 2: 5, NeurIPS stage: 10)
    max_robots: int = 6  # robot slots per team; nothing is built while they are full
    safe_masks: bool = True  # also mask orders that are legal but plainly ruinous
    reward: str = "ice"  # what is paid: ice, or lichen too (REWARD_PRESETS of lux_wrapper.py)

    # The algorithm
    total_timesteps: int = 102400  # environment steps, added up over the matches
    learning_rate: float = 1e-3  # learning rate at the start
    num_envs: int = 16  # matches played at a time, by all processes together
    num_steps: int = 32  # steps of each match in a rollout
    anneal_lr: bool = True  # the learning rate falls linearly to 0
    anneal_ent: bool = True  # the entropy coefficient falls linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 8  # minibatches of a rollout; each has steps of every match
    update_epochs: int = 2  # passes over a rollout
    norm_adv: bool = True  # normalize the advantages of each minibatch
    clip_coef: float = 0.2  # clipping coefficient of the surrogate objective
    ent_coef: float = 0.003  # coefficient of the entropy, at the start
    vf_coef: float = 0.1  # coefficient of the value loss
    max_grad_norm: float = 2.0  # largest norm of the gradient
    target_kl: float | None = None  # KL divergence that ends the passes over a rollout
    positive_reward_weight: float = 1.1  # weight of positive rewards, falls linearly to 1

    # (*) Trajectories
    agent_reward_weight: float = 0.8  # w * own reward + (1 - w) * mean of the team's groups
    group_by: str = "entity"  # who shares a trajectory: entity, cluster (a factory and its robots), ... see LuxEncoder
    shared: tuple[Literal["critic", "ratio", "entropy", "dones"], ...] = ()  # what the whole team shares after all
    top_samples: int = 0  # robots of a team that are learned from at a step; 0: all
    top_by: Literal["advantage", "abs-advantage", "return", "random"] = "advantage"  # those that have most of it


# ------------------------------ The method ------------------------------


def make_envs(args, num_envs, **options):
    """The vector environment; all that the rest of this file knows of the game is its arrays."""
    return LuxVecEnv(
        num_envs,
        map_size=args.map_size,
        min_factories=args.min_factories,
        max_factories=args.max_factories,
        max_robots=args.max_robots,
        safe_masks=args.safe_masks,
        reward=args.reward,
        group_by=args.group_by,  # (*)
        **options,
    )


def to_tensors(obs, device):
    """Observation arrays [N, P, ...] as tensors [B, ...]; on a CPU they share memory with the arrays."""
    return {key: torch.as_tensor(array, device=device).flatten(0, 1) for key, array in obs.items()}


# (*) Entities to groups: the entity axis stays
def group_sum(x, obs):
    """Sum over the members of each group: [..., E] per entity to [..., G] per group, with G = E."""
    x = torch.where(obs["kind"] > 0, x, 0)
    return torch.zeros_like(x).scatter_add(-1, obs["group"], x)


def group_value(value, team_value, obs, args):
    """Value of each group [..., G]: the mean of its members' values, or the team's (--shared critic)."""
    if "critic" in args.shared:
        return team_value[..., None].expand(value.shape)
    return group_sum(value, obs) / group_sum(torch.ones_like(value), obs).clamp(min=1)


def share_reward(reward, active, weight):
    """weight * own + (1 - weight) * mean over the team's active groups; 0 where inactive. All [..., G]."""
    mean = torch.where(active, reward, 0).sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(active, weight * reward + (1 - weight) * mean, 0)


def compute_gae(rewards, values, active, dones, gamma, gae_lambda):
    """Generalized advantage estimation for trajectories that begin and end at any step: [T, B, G], 0 where inactive.

    rewards [T, B, G] are of the actions, values and active [T + 1, B, G] of the observations, the last one included.
    A group that is inactive in the next observation has ended, as has every group of a match that is done [T, B].
    """
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        goes_on = active[t + 1] & active[t] & ~dones[t, :, None]
        delta = rewards[t] + gamma * torch.where(goes_on, values[t + 1], 0) - values[t]
        last = torch.where(active[t], delta + gamma * gae_lambda * torch.where(goes_on, last, 0), 0)
        advantages[t] = last
    return advantages


def masked_mean(x, mask, count=None):
    """Mean of x where mask, even if the rest is NaN; with the `count` of all processes, its part of their mean."""
    count = mask.sum() if count is None else count
    return torch.where(mask, x, 0).sum() / count.clamp(min=1)


def all_moments(x, mask):
    """Number of cells where mask, and mean and variance of x there, over all processes."""
    x = torch.where(mask, x, 0).double()  # precise enough for the variance to be a difference
    count, total, squares = together(torch.stack([mask.sum(), x.sum(), (x**2).sum()]))
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean**2).clamp(min=0)
    return count.float(), mean.float(), variance.float()


def sample(probs):
    """An action for every entity; each process draws noise for all processes, so that several act as one would."""
    noise = torch.empty((WORLD_SIZE, *probs.shape), device=probs.device).exponential_()
    return (probs / noise[RANK]).argmax(-1)


def keep_top(obs, active, scores, number):
    """(*) What is learned from, as `kind` and `active`: of each team's groups without kind 1 those of highest score."""
    robots = active & (group_sum((obs["kind"] == 1).float(), obs) == 0)
    best = torch.where(robots, scores, -torch.inf).topk(min(number, scores.shape[-1])).indices
    active = active & (~robots).scatter(-1, best, True)
    return torch.where(active.gather(-1, obs["group"]), obs["kind"], 0), active


def train(args, run_dir, device, checkpoint=None):
    """Train, from a checkpoint on if there is one, and return the agent; logs and checkpoints go to run_dir."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    num_envs = args.num_envs // WORLD_SIZE  # those of this process
    envs = make_envs(args, num_envs, num_workers=args.num_workers, first_match=RANK * num_envs)
    agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max())).to(device)
    for parameter in agent.parameters():  # the first process's: machines round differently
        together(parameter.data.mul_(RANK == 0))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    next_obs, global_step, seconds = restore(checkpoint, args, agent, optimizer, envs)
    writer = start_log(args, run_dir, agent, device, global_step) if RANK == 0 else None

    # Rollout storage. Masks are data: stored with the observation, replayed in the update.
    next_obs = to_tensors(next_obs, device)
    B, E = next_obs["kind"].shape
    G = group_sum(next_obs["kind"].float(), next_obs).shape[-1]
    obs = {key: x.new_zeros((args.num_steps, *x.shape)) for key, x in next_obs.items()}
    actions = torch.zeros((args.num_steps, B, E), dtype=torch.long, device=device)
    logprobs = torch.zeros((args.num_steps, B, G), device=device)
    rewards = torch.zeros((args.num_steps, B, G), device=device)
    dones = torch.zeros((args.num_steps, B), dtype=torch.bool, device=device)
    values = torch.zeros((args.num_steps + 1, B, G), device=device)
    active = torch.zeros((args.num_steps + 1, B, G), dtype=torch.bool, device=device)
    rollout_steps = args.num_envs * args.num_steps
    num_updates = args.total_timesteps // rollout_steps
    start_time = time.time() - seconds
    progress = tqdm(total=num_updates * rollout_steps, initial=global_step, unit="step", disable=RANK > 0)
    game = envs.metadata["name"]
    signals, stopped = [], []  # here; known to all processes
    catch_signals(signals)

    for update in range(global_step // rollout_steps + 1, num_updates + 1):
        if stopped:
            break
        elapsed = (update - 1) / num_updates
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - elapsed) * args.learning_rate
        ent_coef = (1 - elapsed) * args.ent_coef if args.anneal_ent else args.ent_coef
        positive_weight = args.positive_reward_weight + (1 - args.positive_reward_weight) * elapsed
        episodes = []

        # COLLECT a rollout
        for step in range(args.num_steps):
            global_step += args.num_envs
            for key, x in next_obs.items():
                obs[key][step] = x
            step_obs = {key: x[step] for key, x in obs.items()}  # a copy: the environment reuses its arrays
            with torch.no_grad():
                logits, value, team_value = agent(step_obs)
            policy = Categorical(logits=logits, validate_args=False)
            action = sample(policy.probs)
            actions[step] = action
            logprobs[step] = group_sum(policy.log_prob(action), step_obs)
            values[step] = group_value(value, team_value, step_obs, args)
            active[step] = group_sum(torch.ones_like(value), step_obs) > 0

            env_actions = action.view(num_envs, -1, E).cpu().numpy()  # waits for the device
            env_obs, reward, terminated, truncated, infos = envs.step(env_actions)
            reward = torch.as_tensor(reward, device=device).flatten(0, 1)
            reward = torch.where(reward > 0, reward * positive_weight, reward)
            # The rewards belong to the entities that acted, so to the observation before the step.
            rewards[step] = share_reward(group_sum(reward, step_obs), active[step], args.agent_reward_weight)  # (*)
            dones[step] = torch.as_tensor(terminated | truncated, device=device).repeat_interleave(B // num_envs)
            next_obs = to_tensors(env_obs, device)
            for match in np.flatnonzero(infos.get("_episode", ())):
                episodes.append((global_step, {key: float(np.mean(x[match])) for key, x in infos["episode"].items()}))

        # ADVANTAGES
        with torch.no_grad():
            _, value, team_value = agent(next_obs)
            values[-1] = group_value(value, team_value, next_obs, args)
            active[-1] = group_sum(torch.ones_like(value), next_obs) > 0
            alive = torch.ones_like(active) if "dones" in args.shared else active  # (*)
            advantages = compute_gae(rewards, values, alive, dones, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]
            if args.top_samples:  # (*)
                scores = {"advantage": advantages, "abs-advantage": advantages.abs(), "return": returns}
                scores["random"] = torch.rand((WORLD_SIZE, *returns.shape), device=device)[RANK]
                obs["kind"], active[:-1] = keep_top(obs, active[:-1], scores[args.top_by], args.top_samples)

        # UPDATE; the batch has a row for each step and team
        batch = obs | {"action": actions, "logprob": logprobs, "active": active[:-1]}
        batch |= {"value": values[:-1], "advantage": advantages, "return": returns}
        batch = {key: x.flatten(0, 1) for key, x in batch.items()}
        clipfracs = []
        for _ in range(args.update_epochs):
            # Every team's steps are shuffled on their own: each minibatch has as many of each team and process.
            order = torch.rand((args.num_steps, WORLD_SIZE, B), device=device).argsort(0)[:, RANK]
            for rows in (order * B + torch.arange(B, device=device)).chunk(args.num_minibatches):
                mb = {key: x.index_select(0, rows.flatten()) for key, x in batch.items()}
                mb_active, mb_advantage = mb["active"], mb["advantage"]
                count, mean, variance = all_moments(mb_advantage, mb_active)
                logits, value, team_value = agent(mb)
                policy = Categorical(logits=logits, validate_args=False)
                newlogprob = group_sum(policy.log_prob(mb["action"]), mb)
                entropy = group_sum(policy.entropy(), mb)
                newvalue = group_value(value, team_value, mb, args)
                logratio = torch.where(mb_active, newlogprob - mb["logprob"], 0)
                if "ratio" in args.shared:  # (*)
                    logratio = logratio.sum(-1, keepdim=True).expand_as(logratio)
                if "entropy" in args.shared:  # (*)
                    entropy = entropy.sum(-1, keepdim=True).expand_as(entropy)
                ratio = logratio.exp()
                approx_kl = masked_mean((ratio - 1) - logratio, mb_active, count)  # joschu.net/blog/kl-approx.html
                clipfrac = masked_mean(((ratio - 1).abs() > args.clip_coef).float(), mb_active, count)

                if args.norm_adv:
                    mb_advantage = (mb_advantage - mean) / (variance.sqrt() + 1e-8)
                # Policy loss: the group axis stays up to the mean over active cells
                pg_loss1 = -mb_advantage * ratio
                pg_loss2 = -mb_advantage * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = masked_mean(torch.max(pg_loss1, pg_loss2), mb_active, count)
                v_loss = 0.5 * masked_mean((newvalue - mb["return"]) ** 2, mb_active, count)
                entropy_loss = masked_mean(entropy, mb_active, count)
                loss = pg_loss - ent_coef * entropy_loss + v_loss * args.vf_coef

                optimizer.zero_grad()
                loss.backward()
                metrics = torch.stack([pg_loss, v_loss, entropy_loss, approx_kl, clipfrac]).detach()
                if WORLD_SIZE > 1:  # one message adds up the metrics and gradients of all processes
                    grads = [p.grad for p in agent.parameters() if p.grad is not None]
                    sums = together(torch.cat([metrics, *[grad.flatten() for grad in grads]]))
                    metrics, *parts = sums.split([len(metrics), *[grad.numel() for grad in grads]])
                    for grad, part in zip(grads, parts):
                        grad.copy_(part.view_as(grad))
                norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                losses = dict(zip(LOSSES, torch.cat([metrics, norm[None]]).tolist()))  # waits for the device
                if not np.isfinite([*losses.values()]).all():
                    raise FloatingPointError(f"the loss or its gradient is not a finite number in update {update}")
                clipfracs.append(losses["clipfrac"])
                optimizer.step()
            if args.target_kl is not None and losses["approx_kl"] > args.target_kl:
                break

        # LOG AND SAVE
        errors = batch["return"] - batch["value"]
        residual, total = (all_moments(x, batch["active"])[2] for x in (errors, batch["return"]))
        losses |= {"clipfrac": np.mean(clipfracs), "explained_variance": 1 - (residual / total).item()}
        episodes, stopped = (sum(lists, []) for lists in zip(*together((episodes, signals))))
        saving = update % args.save_every == 0 or update == num_updates or stopped
        matches = sum(together(envs.state()), []) if saving and hasattr(envs, "state") else None
        if RANK > 0:
            continue
        for episode_step, episode in episodes:
            for key, x in episode.items():
                name = {"l": "charts/episodic_length", "r": "charts/episodic_return"}.get(key, f"{game}/{key}")
                writer.add_scalar(name, x, episode_step)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/ent_coef", ent_coef, global_step)
        writer.add_scalar("charts/SPS", int(global_step / (time.time() - start_time)), global_step)
        for name, x in losses.items():
            writer.add_scalar(f"losses/{name}", x, global_step)
        progress.update(rollout_steps)
        if episodes:  # of their metrics the first ones say most
            progress.set_postfix({key: f"{np.mean([x[key] for _, x in episodes]):.1f}" for key in [*episode][:4]})
        if saving:
            writer.flush()  # a run that goes on from here finds all that was logged
            content = {
                "args": asdict(args),
                "model": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "global_step": global_step,
                "train_seconds": time.time() - start_time,
                "torch_rng": torch.get_rng_state(),
                "matches": matches and [{k: torch.as_tensor(x) for k, x in match.items()} for match in matches],
            }
            torch.save(content, file := io.BytesIO())
            write_atomically(f"{run_dir}/checkpoint_{global_step}.pt", file.getbuffer())
            for earlier in checkpoints(run_dir)[:-2]:
                earlier.unlink()

    progress.close()
    envs.close()
    if RANK == 0:
        writer.close()
    # Signals that came since count too; and all processes wait here until the last checkpoint is written.
    if stopped := sum(together(signals), []):
        if RANK == 0:
            print(f"stopped at step {global_step}; go on with: python {sys.argv[0]} --resume {run_dir}")
        sys.exit(128 + stopped[0])
    return agent


@torch.no_grad()
def evaluate(agent, args, device, video=None):
    """Play held-out matches, each once, with sampled actions: dict metric -> a number for each (mean of the teams)."""
    envs = make_envs(args, args.eval_episodes, num_workers=args.num_workers, held_out=True, video=video)
    generator = torch.Generator(device).manual_seed(0)
    finished = [None] * args.eval_episodes
    obs, _ = envs.reset(seed=0)
    while None in finished:
        logits, _, _ = agent(to_tensors(obs, device))
        action = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=generator)
        obs, _, _, _, infos = envs.step(action.view(obs["kind"].shape).cpu().numpy())
        for match in np.flatnonzero(infos.get("_episode", ())):
            episode = {key: float(np.mean(x[match])) for key, x in infos["episode"].items()}
            finished[match] = finished[match] or episode  # a second match begins where one has ended
    envs.close()
    return {key: [episode[key] for episode in finished] for key in finished[0]}


# --------------- Nothing below is about the method ---------------


class Refused(Exception):
    """What a person asked for cannot work, and why, in one sentence."""


def check_args(args):
    """Raise Refused if arguments of the command line or of a checkpoint cannot work."""
    for low, high, names in (
        (1, 10**9, "total_timesteps num_envs num_steps num_minibatches update_epochs save_every max_robots"),
        (1e-9, 10**9, "learning_rate max_grad_norm clip_coef positive_reward_weight"),
        (0, 10**9, "ent_coef vf_coef target_kl num_workers eval_episodes"),
        (0, 1, "gamma gae_lambda"),
        (0, 10**9, "top_samples"),  # (*)
        (0, 1, "agent_reward_weight"),  # (*)
        (0, 2**32 - 1, "seed"),
        (24, 64, "map_size"),
        (1, 10, "min_factories"),
        (args.min_factories, 10, "max_factories"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if not (value is getattr(Args, name) is None or low <= value <= high):
                raise Refused(f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}")
    for wrong, message in (
        (args.num_envs % WORLD_SIZE, f"--num-envs {args.num_envs} does not divide by the {WORLD_SIZE} processes"),
        (args.num_steps % args.num_minibatches, f"--num-steps {args.num_steps} does not divide by --num-minibatches"),
        (args.total_timesteps < args.num_envs * args.num_steps, "--total-timesteps is less than one rollout"),
        ("--cuda" in sys.argv and not torch.cuda.is_available(), "--cuda needs a GPU and a PyTorch with CUDA"),
        (args.track and not find_spec("wandb"), "--track needs Weights and Biases: pip install wandb"),
        (args.top_samples and "critic" in args.shared, "--top-samples needs a critic for each group"),  # (*)
    ):
        if wrong:
            raise Refused(message)


def together(x):
    """Over all processes of torchrun: the sum of a tensor, in place; of anything else a list of what each one has."""
    everyones = [x] * WORLD_SIZE
    try:
        if WORLD_SIZE > 1 and isinstance(x, torch.Tensor):
            dist.all_reduce(x)
        elif WORLD_SIZE > 1:
            dist.all_gather_object(everyones, x)
    except RuntimeError:
        raise ConnectionError("another process of this training has died")
    return x if isinstance(x, torch.Tensor) else everyones


def catch_signals(caught):
    """Only note SIGINT and SIGTERM from now on, in the list `caught`; after the first one SIGINT ends at once."""

    def note(number, _):
        caught.append(number)
        if WORLD_SIZE == 1:  # torchrun passes on what the terminal has sent to all already
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)


def start_log(args, run_dir, agent, device, global_step):
    """A writer of TensorBoard events, which --track sends to W&B too; those after `global_step` are dropped."""
    if args.track:
        import wandb

        name = os.path.basename(run_dir)
        wandb.init(id=name, name=name, resume="allow", config=vars(args), sync_tensorboard=True, save_code=True)
    print(f"{sum(p.numel() for p in agent.parameters()):,} parameters, on {device}, writing to {run_dir}", end=", ")
    print(f"from step {global_step} of {args.total_timesteps} on")
    writer = SummaryWriter(run_dir, purge_step=global_step + 1)
    table = "\n".join(f"|{key}|{value}|" for key, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    return writer


def write_atomically(path, content):
    """Write bytes to another file and rename it: a full disk or a kill never costs what was there before."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}); what was there before is kept")


def checkpoints(run_dir):
    """Paths of the checkpoints of a run, the newest last."""
    return sorted(Path(run_dir).glob("checkpoint_[0-9]*.pt"), key=lambda path: int(path.stem.split("_")[1]))


def load_checkpoint(path):
    """Path, content (tensors and plain values only) and Args of a checkpoint, or of a run's newest intact one."""
    paths, message = checkpoints(path) if os.path.isdir(path) else [Path(path)], f"there is no checkpoint in {path}"
    for path in reversed(paths):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            intact = ZipFile(path).testzip() is None  # torch.load checks no sums
            if not (intact and all(x.isfinite().all() for x in checkpoint["model"].values())):
                raise ValueError("wrong checksum or parameters")
            args = Args(**{name: x for name, x in checkpoint["args"].items() if hasattr(Args, name)})
            args.resume = args.evaluate = None
            check_args(args)
            return path, checkpoint, args
        except Exception as error:  # a damaged file can raise anything
            message = f"{path} is damaged or no checkpoint of this script ({shorten(repr(error), 120)})"
            if path != paths[0] and RANK == 0:
                print(f"{message}; the one before it is used", file=sys.stderr)
    raise Refused(message)


def restore(checkpoint, args, agent, optimizer, envs):
    """Put back what a checkpoint holds, if there is one; the observation, step and seconds to go on from."""
    if checkpoint is None:
        return envs.reset(seed=args.seed)[0], 0, 0
    try:
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["torch_rng"])
        global_step = int(checkpoint["global_step"])
        torch.cuda.manual_seed_all(args.seed + global_step)  # only a CPU goes on to the last bit
        matches = [{key: x.numpy() for key, x in match.items()} for match in checkpoint["matches"] or ()]
        mine = matches[RANK * envs.num_envs : (RANK + 1) * envs.num_envs]  # none if the environment has no state()
        next_obs, _ = envs.load_state(mine) if mine else envs.reset(seed=args.seed + global_step)
        return next_obs, global_step, float(checkpoint["train_seconds"])
    except Exception as error:
        message = f"the checkpoint does not fit its arguments ({shorten(repr(error), 120)})"
        raise error if isinstance(error, LuxError) else Refused(message)


if __name__ == "__main__":
    args, checkpoint, run_dir = tyro.cli(Args, console_outputs=RANK == 0), None, None
    try:
        if flag := "resume" if args.resume else "evaluate" if args.evaluate else None:
            path, checkpoint, trained = load_checkpoint(getattr(args, flag))
            if flag == "resume" and checkpoint["args"].keys() != asdict(args).keys():
                raise Refused(f"{path} was made by another script or version")
            args = tyro.cli(Args, default=trained)
            may_change = "cuda num_workers track capture_video eval_episodes save_every total_timesteps".split()
            for name, kept in asdict(trained).items():
                if getattr(args, name) != kept and name not in (flag, *may_change):
                    raise Refused(f"--{name.replace('_', '-')} cannot be changed with --{flag}; this run has {kept}")
            args.resume = None
            if flag == "evaluate" or path in checkpoints(path.parent)[-1:]:  # an older one begins a new run
                run_dir = path.parent
        check_args(args)
        device = torch.device("cuda", LOCAL_RANK) if args.cuda and torch.cuda.is_available() else torch.device("cpu")
        if WORLD_SIZE > 1 and not args.evaluate:
            try:
                dist.init_process_group(timeout=timedelta(minutes=2))  # gloo for CPUs, NCCL for GPUs
            except (RuntimeError, ValueError) as error:
                why = "cannot meet the other processes: are MASTER_ADDR and MASTER_PORT right?"
                raise ConnectionError(f"{why} ({shorten(str(error), 120)})")
        if RANK == 0 and run_dir is None:
            while (run_dir := Path("runs", f"{args.exp_name}__{args.seed}__{int(time.time())}")).exists():
                time.sleep(0.1)  # another run began in this second
            try:
                run_dir.mkdir(parents=True)
                (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=1))
            except OSError as error:
                raise Refused(f"cannot write to {run_dir.absolute()} ({error.strerror})")
        if args.evaluate:
            envs = make_envs(args, 1, num_workers=0)
            agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max())).to(device)
            try:
                agent.load_state_dict(checkpoint["model"])
            except RuntimeError as error:
                raise Refused(f"{path} holds another network ({shorten(repr(error), 120)})")
        else:
            agent = train(args, run_dir, device, checkpoint)
            if WORLD_SIZE > 1:
                dist.destroy_process_group()
                if RANK > 0:
                    os._exit(0)  # in Python's usual end torch's threads sometimes abort
        if RANK == 0 and args.eval_episodes:
            metrics = evaluate(agent, args, device, f"{run_dir}/video.gif" if args.capture_video else None)
            summary = {key: dict(mean=np.mean(x), std=np.std(x), min=min(x), max=max(x)) for key, x in metrics.items()}
            print(f"\nevaluation on {args.eval_episodes} held-out matches: mean, std, min, max")
            for key, row in summary.items():
                name = {"l": "episode_length", "r": "episodic_return"}.get(key, key)
                print(f"{name:24}" + "".join(f"{number:10.1f}" for number in row.values()))
            text = json.dumps({"summary": summary, "matches": metrics}, indent=1)
            write_atomically(f"{run_dir}/evaluation.json", text.encode())
    except (Refused, LuxError, OSError, FloatingPointError, MemoryError, KeyboardInterrupt) as error:
        code = {Refused: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        saved = checkpoints(run_dir) if code == 1 and run_dir else []
        kept = f"; the last checkpoint is {saved[-1]}" if saved else ""
        if RANK == 0 or code == 1:  # of a wrong flag one process tells
            print(f"\n{Path(__file__).name}: error: {str(error) or 'interrupted'}{kept}", file=sys.stderr)
        sys.exit(code)
