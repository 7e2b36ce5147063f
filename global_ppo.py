"""Global PPO on Lux AI Season 2, the baseline of trajsep_ppo.py: one trajectory per team.

    python global_ppo.py

`--resume runs/<run>` continues a run, `--evaluate runs/<run>` plays it on held-out maps. For two processes
write `OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2` in place of `python`.

One shared encoder reads the map. The team has one reward (the sum over its entities), one value, advantage,
ratio (the product over its entities) and entropy (the sum); in trajsep_ppo.py each group has its own.
The two scripts are the same program: (*) marks every difference.
Axis letters: T steps, N matches, P players, B = N * P teams, E entity slots, G groups, A actions.

Source: Takács, Magyar, Gulyás, "Scalable Distributed Reinforcement Learning in Multi-Agent Environments"
(2024). The layout and the names of flags and metrics follow CleanRL's ppo.py.
"""

import io
import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from textwrap import shorten
from zipfile import ZipFile

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hybrid_model import HybridNet

# torchrun's processes share every rollout and minibatch
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE, LOCAL_WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


@dataclass
class Args:
    # The run
    exp_name: str = Path(__file__).stem  # first part of the run's name
    seed: int = 1
    cuda: bool = True  # use a GPU if there is one
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    capture_video: bool = False  # draw a match on the first held-out map into video.gif
    evaluate: str | None = None  # evaluate this run or checkpoint instead of training
    resume: str | None = None  # continue this run or checkpoint
    eval_episodes: int = 20  # matches of the final evaluation, on held-out maps
    eval_steps: int = 10000  # steps after which the evaluation leaves out matches that have not ended
    save_every: int = 20  # updates between two checkpoints

    # The environment
    env_id: str = "lux_wrapper:LuxVecEnv"  # module:class
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # options: name value ...
    num_workers: int | None = None  # processes that play the matches; default: one per core

    # The algorithm
    total_timesteps: int = 102400  # environment steps, summed over the matches
    learning_rate: float = 1e-3  # learning rate at the start
    num_envs: int = 16  # matches played in parallel, by all processes together
    num_steps: int = 32  # steps of each match in a rollout
    anneal_lr: bool = True  # anneal the learning rate linearly to 0
    anneal_ent: bool = True  # anneal the entropy coefficient linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 8  # minibatches of a rollout; each has steps of every match
    update_epochs: int = 2  # passes over a rollout
    norm_adv: bool = True  # normalize the advantages of each minibatch
    clip_coef: float = 0.2  # clipping coefficient of the surrogate objective
    ent_coef: float = 0.003  # entropy coefficient at the start
    vf_coef: float = 0.1  # coefficient of the value loss
    max_grad_norm: float = 2.0  # largest norm of the gradient
    target_kl: float | None = None  # KL divergence that ends the passes over a rollout
    positive_reward_weight: float = 1.1  # weight of positive rewards, annealed linearly to 1


def make_envs(args, num_envs, **options):
    """The vector environment of --env-id; the rest of this file only sees its arrays."""
    module, _, name = args.env_id.partition(":")
    try:
        make = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refused(f"--env-id {args.env_id} is not module:class: {error}")
    try:
        envs = make(num_envs, **options, **args.env_kwargs)
    except (ImportError, TypeError, ValueError) as error:
        raise Refused(f"--env-id {args.env_id}: {error}")
    if args.capture_video and "rgb_array" not in envs.metadata.get("render_modes", ()):
        raise Refused(f"--capture-video: {args.env_id} draws no matches")
    return envs


def to_tensors(obs, device):
    """Observation arrays [N, P, ...] as tensors [B, ...]; on a CPU they share memory."""
    arrays = {key: np.ascontiguousarray(array) for key, array in obs.items()}
    return {key: torch.as_tensor(array, device=device).flatten(0, 1) for key, array in arrays.items()}


def group_sum(x, obs):
    """(*) Sum over the entities of each team: [..., E] per entity to [..., G] per group, with G = 1."""
    return torch.where(obs["kind"] > 0, x, 0).sum(-1, keepdim=True)


def group_value(value, team_value, obs):
    """(*) Value of each group [..., G]: the team's."""
    return team_value[..., None]


def get_policy_and_value(agent, obs):
    """The policy of the entities, the value of each group [..., G], and whether the group has a member."""
    logits, value, team_value = agent(obs)
    active = group_sum(torch.ones_like(value), obs) > 0
    return Categorical(logits=logits, validate_args=False), group_value(value, team_value, obs), active


def compute_gae(rewards, values, active, dones, gamma, gae_lambda):
    """Advantages [T, B, G] of trajectories that begin and end at any step; 0 where inactive.

    rewards [T, B, G] belong to actions, values and active [T + 1, B, G] to observations, dones [T, B] to matches.
    A group has ended if it is inactive in the next observation or if its match is done.
    """
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        continues = active[t + 1] & active[t] & ~dones[t, :, None]
        delta = rewards[t] + gamma * torch.where(continues, values[t + 1], 0) - values[t]
        last = delta + gamma * gae_lambda * torch.where(continues, last, 0)
        last = torch.where(active[t], last, 0)
        advantages[t] = last
    return advantages


def masked_mean(x, mask, count=None):
    """Mean of x where mask, even if the rest is NaN; or this process's share, given the count of all."""
    count = mask.sum() if count is None else count
    return torch.where(mask, x, 0).sum() / count.clamp(min=1)


def train(args, run_dir, device, checkpoint=None):
    """Train, from a checkpoint if there is one, and return the agent; logs and checkpoints go to run_dir."""
    global_step = checkpoint["global_step"] if checkpoint else 0
    rollout_steps = args.num_envs * args.num_steps
    num_updates = args.total_timesteps // rollout_steps
    updates = range(math.ceil(global_step / rollout_steps) + 1, num_updates + 1)
    torch.manual_seed(args.seed + global_step)
    torch.backends.cudnn.deterministic = True
    num_envs = args.num_envs // WORLD_SIZE  # of this process
    envs = make_envs(args, num_envs, num_workers=args.num_workers, first_match=RANK * num_envs)
    num_actions = int(envs.single_action_space.nvec.max())
    agent = HybridNet(envs.single_observation_space, num_actions).to(device)
    for parameter in agent.parameters():  # as in the first process: machines round differently
        all_sum(parameter.data.mul_(RANK == 0))
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    if not checkpoint:
        next_obs, _ = envs.reset(seed=args.seed)
    else:
        share = len(checkpoint["matches"]) // WORLD_SIZE
        own = checkpoint["matches"][RANK * share : (RANK + 1) * share]
        own = [{key: x.numpy() for key, x in match.items()} for match in own]
        try:
            agent.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            next_obs, _ = envs.load_state(own) if own else envs.reset(seed=args.seed + global_step)
        except (RuntimeError, ValueError) as error:
            raise Refused(f"the checkpoint does not fit the flags: {shorten(str(error), 120)}")
        torch.set_rng_state(checkpoint["torch_rng"])
    if RANK == 0:
        if args.track:
            name = Path(run_dir).name
            wandb = import_module("wandb")
            wandb.init(id=name, name=name, resume="allow", config=vars(args), sync_tensorboard=True)
        writer = SummaryWriter(run_dir, purge_step=global_step + 1)
        table = "\n".join(f"|{key}|{value}|" for key, value in vars(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        size = sum(parameter.numel() for parameter in agent.parameters())
        print(f"{size:,} parameters on {device}, from step {global_step}, writing to {run_dir}")
        if not updates:
            print("--total-timesteps leaves no whole rollout to play: nothing is trained")

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
    start_time = time.time() - (checkpoint["train_seconds"] if checkpoint else 0)
    progress = tqdm(total=num_updates * rollout_steps, initial=global_step, unit="step", disable=RANK > 0)
    signals = []  # received by this process
    stopped = []  # received by any process, known to all
    handlers = {x: signal(x, lambda number, _: signals.append(number)) for x in (SIGINT, SIGTERM)}

    for update in updates:
        if stopped:
            break
        elapsed = (update - 1) / num_updates
        lr = (1 - elapsed) * args.learning_rate if args.anneal_lr else args.learning_rate
        optimizer.param_groups[0]["lr"] = lr
        ent_coef = (1 - elapsed) * args.ent_coef if args.anneal_ent else args.ent_coef
        positive_weight = args.positive_reward_weight + (1 - args.positive_reward_weight) * elapsed
        episodes = []

        # COLLECT a rollout
        for step in range(args.num_steps):
            global_step += args.num_envs
            for key, x in next_obs.items():
                obs[key][step] = x
            step_obs = {key: x[step] for key, x in obs.items()}  # the environment reuses its arrays
            with torch.no_grad():
                policy, values[step], active[step] = get_policy_and_value(agent, step_obs)
            action = sample(policy.probs)
            actions[step] = action
            logprobs[step] = group_sum(policy.log_prob(action), step_obs)

            env_actions = action.view(num_envs, -1, E).cpu().numpy()  # waits for the device
            env_obs, reward, terminated, truncated, infos = envs.step(env_actions)
            reward = torch.as_tensor(reward, device=device).flatten(0, 1)
            reward = torch.where(reward > 0, reward * positive_weight, reward)
            # Rewards belong to the entities that acted: to the observation before the step.
            reward = group_sum(reward, step_obs)
            rewards[step] = reward  # (*)
            # What the last observation before a time limit promises is part of the last reward.
            limit = np.flatnonzero(np.repeat(truncated & ~terminated, B // num_envs))
            if limit.size and "final_obs" in infos:
                final = {key: x[limit] for key, x in to_tensors(infos["final_obs"], device).items()}
                with torch.no_grad():
                    _, value, lives = get_policy_and_value(agent, final)
                rewards[step, limit] += args.gamma * torch.where(lives, value, 0)
            dones[step] = torch.as_tensor(np.repeat(terminated | truncated, B // num_envs))
            next_obs = to_tensors(env_obs, device)
            for match in np.flatnonzero(infos.get("_episode", ())):
                episode = {key: float(np.mean(x[match])) for key, x in infos["episode"].items()}
                episodes.append((global_step, episode))

        # ADVANTAGES
        with torch.no_grad():
            _, values[-1], active[-1] = get_policy_and_value(agent, next_obs)
            advantages = compute_gae(rewards, values, active, dones, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]

        # UPDATE; the batch has a row for each step and team
        batch = obs | {"action": actions, "logprob": logprobs, "active": active[:-1]}
        batch |= {"value": values[:-1], "advantage": advantages, "return": returns}
        batch = {key: x.flatten(0, 1) for key, x in batch.items()}
        clipfracs = []
        for _ in range(args.update_epochs):
            # Each team's steps are shuffled separately: minibatches have as many of every team.
            order = torch.rand((args.num_steps, WORLD_SIZE, B), device=device).argsort(0)[:, RANK]
            for rows in (order * B + torch.arange(B, device=device)).chunk(args.num_minibatches):
                mb = {key: x.index_select(0, rows.flatten()) for key, x in batch.items()}
                mb_active = mb["active"]
                mb_advantage = mb["advantage"]
                count, mean, variance = all_moments(mb_advantage, mb_active)
                policy, newvalue, _ = get_policy_and_value(agent, mb)
                newlogprob = group_sum(policy.log_prob(mb["action"]), mb)
                entropy = group_sum(policy.entropy(), mb)
                logratio = torch.where(mb_active, newlogprob - mb["logprob"], 0)
                ratio = logratio.exp()
                approx_kl = masked_mean((ratio - 1) - logratio, mb_active, count)
                clipfrac = masked_mean(((ratio - 1).abs() > args.clip_coef).float(), mb_active, count)

                if args.norm_adv:
                    mb_advantage = (mb_advantage - mean) / (variance.sqrt() + 1e-8)
                # Policy loss: the group axis stays up to the mean over active cells
                pg_loss1 = -mb_advantage * ratio
                pg_loss2 = -mb_advantage * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = masked_mean(torch.max(pg_loss1, pg_loss2), mb_active, count)
                v_loss = 0.5 * masked_mean((newvalue - mb["return"]) ** 2, mb_active, count)
                entropy_loss = masked_mean(entropy, mb_active, count)
                loss = pg_loss - ent_coef * entropy_loss + v_loss * args.vf_coef

                optimizer.zero_grad()
                loss.backward()
                metrics = torch.stack([pg_loss, v_loss, entropy_loss, approx_kl, clipfrac]).detach()
                if WORLD_SIZE > 1:  # one message sums the metrics and gradients of all processes
                    parts = [metrics, *[p.grad for p in agent.parameters() if p.grad is not None]]
                    message = all_sum(torch.cat([part.flatten() for part in parts]))
                    torch.nn.utils.vector_to_parameters(message, parts)
                norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                metrics = torch.cat([metrics, norm[None]]).tolist()  # waits for the device
                if not np.isfinite(metrics).all():
                    raise FloatingPointError(f"loss or gradient is not a finite number in update {update}")
                losses = dict(zip(LOSSES, metrics))
                clipfracs.append(losses["clipfrac"])
                optimizer.step()
            if args.target_kl is not None and losses["approx_kl"] > args.target_kl:
                break

        # LOG AND SAVE
        _, _, residual = all_moments(batch["return"] - batch["value"], batch["active"])
        _, _, variance = all_moments(batch["return"], batch["active"])
        losses["explained_variance"] = 1 - (residual / variance).item()
        losses["clipfrac"] = np.mean(clipfracs)
        episodes = gather(episodes)
        stopped = gather(signals)
        saving = update % args.save_every == 0 or update == num_updates or stopped
        matches = gather(envs.state()) if saving and hasattr(envs, "state") else []
        if RANK > 0:
            continue
        for episode_step, episode in episodes:
            for key, x in episode.items():
                name = {"l": "charts/episodic_length", "r": "charts/episodic_return"}.get(key)
                writer.add_scalar(name or f"{envs.metadata['name']}/{key}", x, episode_step)
        writer.add_scalar("charts/learning_rate", lr, global_step)
        writer.add_scalar("charts/ent_coef", ent_coef, global_step)
        writer.add_scalar("charts/SPS", int(global_step / (time.time() - start_time)), global_step)
        for name, x in losses.items():
            writer.add_scalar(f"losses/{name}", x, global_step)
        progress.update(rollout_steps)
        if episodes:  # the first metrics say most
            means = {key: np.mean([x[key] for _, x in episodes]) for key in [*episode][:4]}
            progress.set_postfix({key: f"{mean:.1f}" for key, mean in means.items()})
        if saving:
            writer.flush()  # a run that continues from here finds all that was logged
            content = {
                "args": asdict(args),
                "model": agent.state_dict(),
                "optimizer": optimizer.state_dict(),
                "global_step": global_step,
                "train_seconds": time.time() - start_time,
                "torch_rng": torch.get_rng_state(),
                "matches": [{k: torch.as_tensor(x) for k, x in match.items()} for match in matches],
            }
            torch.save(content, buffer := io.BytesIO())
            unfinished = Path(run_dir, "checkpoint.tmp")
            unfinished.write_bytes(buffer.getbuffer())  # a full disk costs no earlier checkpoint
            unfinished.replace(Path(run_dir, f"checkpoint_{global_step}.pt"))
            for path in checkpoints(run_dir)[:-2]:
                path.unlink()

    progress.close()
    envs.close()
    if RANK == 0:
        writer.close()
    for number, handler in handlers.items():
        signal(number, handler)
    if stopped := gather(signals):  # all processes wait here for the last checkpoint
        if RANK == 0:
            print(f"stopped at step {global_step}; continue: python {sys.argv[0]} --resume {run_dir}")
        sys.exit(128 + stopped[0])
    return agent


@torch.no_grad()
def evaluate(agent, envs, steps, device, greedy=False, first_map=7000, frames=None):
    """Play each match once, for at most these steps: metric -> its values, of the matches that ended.

    Values are numbers or arrays [P]. Actions are sampled, or `greedy`: the likeliest ones.
    The first match has the seed `first_map`; flags were chosen with matches of smaller ones.
    `frames` is a list for pictures of the first match.
    """
    generator = torch.Generator(device).manual_seed(0)
    finished = {}
    obs, _ = envs.reset(seed=first_map)
    what = "greedy" if greedy else "sampled" if frames is None else "video"
    progress = tqdm(total=len(obs["kind"]), desc=f"evaluation, {what}", unit="match", leave=False)
    for step in range(steps):
        if frames is not None and step % 4 == 0:
            frames.append(Image.fromarray(envs.render()[0]))
        logits = agent(to_tensors(obs, device))[0].flatten(0, -2)
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        action = logits.argmax(-1) if greedy else sampled
        obs, _, _, _, infos = envs.step(action.view(obs["kind"].shape).cpu().numpy())
        for match in np.flatnonzero(infos.get("_episode", ())):
            episode = {key: np.copy(x[match]) for key, x in infos["episode"].items()}
            finished.setdefault(match, episode)  # another match may follow
        progress.update(len(finished) - progress.n)
        progress.set_postfix(step=step + 1)
        if len(finished) == progress.total:
            break
    progress.close()
    episodes = [finished[match] for match in sorted(finished)]
    return {key: [episode[key] for episode in episodes] for key in episodes[0]} if episodes else {}


def sample(probs):
    """This is Categorical.sample(); every process draws the noise of all, so that they act as one."""
    noise = torch.empty((WORLD_SIZE, *probs.shape), device=probs.device).exponential_()
    return (probs / noise[RANK]).argmax(-1)


def all_moments(x, mask):
    """This is the number of cells where mask, and the mean and variance of x there, of all processes."""
    x = torch.where(mask, x, 0).double()  # precise enough for the variance to be a difference
    count, total, squares = all_sum(torch.stack([mask.sum(), x.sum(), (x**2).sum()]))
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean**2).clamp(min=0)
    return count.float(), mean.float(), variance.float()


def all_sum(x):
    """Sum of a tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def gather(rows):
    """The lists of all processes, joined."""
    lists = [rows] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(lists, rows)
    return sum(lists, [])


# --------------- Nothing below is about the method ---------------


def checkpoints(run_dir):
    """Paths of the checkpoints of a run, the newest last."""
    paths = {path.stem[11:]: path for path in Path(run_dir).glob("checkpoint_*.pt")}
    return [paths[step] for step in sorted(filter(str.isdecimal, paths), key=int)]


class Refused(Exception):
    """What a person asked for cannot work, and why, in one sentence."""


def check_args(args):
    """Raise Refused if flags cannot work."""
    for low, high, names in (
        (1, 10**9, "num_envs num_steps num_minibatches update_epochs save_every eval_steps"),
        (1e-9, 10**9, "learning_rate max_grad_norm clip_coef positive_reward_weight"),
        (0, 10**9, "ent_coef vf_coef target_kl num_workers eval_episodes"),
        (0, 1, "gamma gae_lambda"),  # (*)
        (0, 2**32 - 1, "seed"),
        (args.num_envs * args.num_steps, 10**9, "total_timesteps"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                flag = name.replace("_", "-")
                raise Refused(f"--{flag} must be between {low} and {high}, got {value}")
    if args.num_envs % WORLD_SIZE:
        raise Refused(f"--num-envs {args.num_envs} does not divide by the {WORLD_SIZE} processes")
    if args.num_steps % args.num_minibatches:
        raise Refused(f"--num-steps {args.num_steps} does not divide by --num-minibatches {args.num_minibatches}")
    if args.track and RANK == 0:
        try:
            import_module("wandb").login()
        except Exception as error:  # not installed, a folder of that name, or no key
            raise Refused(f"--track needs `pip install wandb` and `wandb login`: {error}")


if __name__ == "__main__":
    signal(SIGTERM, lambda number, _: sys.exit(128 + number))  # closes the environments
    sys.path.insert(0, os.getcwd())  # --env-id is looked for here first, then beside this script
    args = tyro.cli(Args, console_outputs=RANK == 0)
    run_dir = Path("runs")  # until the run has a name
    checkpoint = None
    try:
        if source := args.evaluate or args.resume:
            *earlier, path = checkpoints(source) or [Path(source)]
            if not path.is_file():
                raise Refused(f"there is no checkpoint at {source}")
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                saved = Args(**checkpoint["args"])
                assert asdict(saved) == checkpoint["args"] and not ZipFile(path).testzip()
            except Exception:  # a damaged file can raise anything
                hint = f"; the one before it is {earlier[-1]}" if earlier else ""
                raise Refused(f"{path} is damaged, or not a checkpoint of this script{hint}")
            args = tyro.cli(Args, default=replace(saved, env_kwargs={}))  # flags override the run's
            args.env_kwargs = saved.env_kwargs | args.env_kwargs
        run_dir = Path("runs", f"{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}")
        if args.evaluate:
            run_dir = Path("runs", f"evaluate__{run_dir.name}")
        elif args.resume:
            if "global_step" not in checkpoint:
                raise Refused(f"{path} holds only weights and flags: --evaluate plays it, --resume cannot continue it")
            if args.total_timesteps < (reached := checkpoint["global_step"]):
                raise Refused(f"{path} is at step {reached}: --total-timesteps must not be less")
            if path in checkpoints(path.parent)[-1:]:  # else a new run begins
                run_dir = path.parent
            args.resume = None
        check_args(args)
        cuda = args.cuda and torch.cuda.device_count() >= LOCAL_WORLD_SIZE  # a GPU for each process, or none
        device = torch.device(f"cuda:{LOCAL_RANK}" if cuda else "cpu")
        if WORLD_SIZE > 1:
            try:
                dist.init_process_group(timeout=timedelta(minutes=2))  # gloo, or NCCL on GPUs
            except (RuntimeError, ValueError) as error:
                raise ConnectionError(f"no processes at MASTER_ADDR and MASTER_PORT: {error}")
        if args.evaluate:
            envs = make_envs(args, 1, num_workers=0)
            agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max()))
            try:
                agent.to(device).load_state_dict(checkpoint["model"])
            except RuntimeError as error:
                raise Refused(f"{path} does not fit the flags: {shorten(str(error), 120)}")
        else:
            agent = train(args, run_dir, device, checkpoint)
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        if RANK > 0:
            os._exit(0)  # in Python's usual end torch's threads sometimes abort
        if args.eval_episodes:
            evaluation, rows = {}, defaultdict(dict)
            for how in ("sampled", "greedy"):
                envs = make_envs(args, args.eval_episodes, num_workers=args.num_workers, held_out=True)
                metrics = evaluate(agent, envs, args.eval_steps, device, greedy=how == "greedy")
                envs.close()
                matches = {key: [float(np.mean(x)) for x in values] for key, values in metrics.items()}
                evaluation[how] = {"summary": {}, "matches": matches}
                for key, x in matches.items():
                    summary = {"mean": np.mean(x), "std": np.std(x), "min": min(x), "max": max(x)}
                    evaluation[how]["summary"][key] = summary
                    rows[key][how] = "{mean:,.2f} ± {std:,.2f}".format(**summary)
                if unfinished := args.eval_episodes - len(matches.get("l", ())):
                    print(f"left out: {unfinished} matches had not ended after {args.eval_steps} steps")
            head = f"{'sampled: mean ± std':>28}{'greedy: mean ± std':>26}"
            print(f"\n{args.eval_episodes:5} held-out matches{head}")
            for key, cells in rows.items():
                print(f"{key:24}{cells.get('sampled', '-'):>26}{cells.get('greedy', '-'):>26}")
            run_dir.mkdir(parents=True, exist_ok=True)
            Path(run_dir, "evaluation.json").write_text(json.dumps(evaluation, indent=1))
            print(f"\nwritten to {run_dir}/evaluation.json")
        if args.capture_video:
            envs = make_envs(args, 1, num_workers=0, held_out=True, render_mode="rgb_array")
            frames = []
            evaluate(agent, envs, args.eval_steps, device, frames=frames)
            envs.close()
            film = {"save_all": True, "append_images": frames[1:], "duration": 50, "loop": 0}
            run_dir.mkdir(parents=True, exist_ok=True)
            frames[0].save(run_dir / "video.gif", **film)
            print(f"written to {run_dir}/video.gif")
    except (Exception, KeyboardInterrupt) as error:
        if "gloo" in str(error):  # the library that connects the processes
            error = ConnectionError("another process of this training has died")
        code = {Refused: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        if code == 1 and not isinstance(error, (OSError, FloatingPointError, MemoryError)):
            sys.excepthook(type(error), error, error.__traceback__)
        what = str(error) or "interrupted"
        if code != 2 and (kept := checkpoints(run_dir)):
            what += f"; the last checkpoint is {kept[-1]}"
        if RANK > 0 and code == 2:
            time.sleep(30)  # the first process says why, then torchrun ends this one
        else:
            print(f"\n{Path(__file__).name}: error: {what}", file=sys.stderr)
        sys.exit(code)
