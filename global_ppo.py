"""Global PPO on Lux AI Season 2, the baseline of trajsep_ppo.py: one trajectory per team.

    python global_ppo.py
    torchrun --standalone --nproc-per-node 2 global_ppo.py
    python global_ppo.py --resume runs/<run>
    python global_ppo.py --evaluate runs/<run>

One shared encoder looks at the map; the team has one reward (the sum over its entities), one value, one
advantage, one joint probability ratio (the product over its entities) and one entropy (their sum). The
sibling trajsep_ppo.py is the same program with one trajectory per entity or cluster: every place in which
the two differ is about trajectories being separate, and is marked with (*).

Axis letters: T steps, N matches, P players, B = N * P teams, E entity slots, G groups, A actions.

Source: Takács, Magyar, Gulyás, "Scalable Distributed Reinforcement Learning in Multi-Agent Environments"
(2024). The layout and the names of flags and metrics follow CleanRL's ppo.py.
"""

import contextlib
import importlib.util
import io
import json
import os
import random
import re
import signal
import sys
import threading
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Optional  # (*)

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hybrid_model import HybridNet
from lux_wrapper import LuxError, LuxVecEnv

# This process among those of torchrun, which share every rollout and every minibatch; alone without torchrun
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))

# What --resume and --evaluate let change: what is learned does not depend on it, but for the step at which to end
MAY_CHANGE = (
    *("cuda", "num_workers", "track", "wandb_project_name", "wandb_entity", "capture_video"),
    *("eval_episodes", "save_every", "keep_checkpoints", "total_timesteps"),
)


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`; on a CPU the same seed always gives the same run"""
    cuda: bool = True
    """if toggled, cuda is used where there is one"""
    track: bool = False
    """if toggled, this experiment is tracked with Weights and Biases (pip install wandb)"""
    wandb_project_name: str = "trajsep-ppo"
    """the project's name in Weights and Biases"""
    wandb_entity: Optional[str] = None
    """the entity (team) of the project in Weights and Biases"""
    capture_video: bool = False
    """if toggled, one evaluation match is drawn by the engine's renderer into video.gif in the run's folder"""
    evaluate: Optional[str] = None
    """a run, or one of its checkpoints, to evaluate instead of training, with its flags"""
    resume: Optional[str] = None
    """a run, or one of its checkpoints, to go on with as if it had never stopped, with its flags"""
    eval_episodes: int = 20
    """matches of the evaluation at the end, on maps never trained on"""
    save_every: int = 20
    """updates between two checkpoints"""
    keep_checkpoints: int = 2
    """how many checkpoints are kept, the newest ones"""

    # The game
    num_workers: Optional[int] = None
    """workers that play the matches; 0 plays them in this process, the default is one per core (shared by torchrun)"""
    map_size: int = 48
    """side of the board in cells (season 2: 48, NeurIPS stage: 64)"""
    min_factories: int = 2
    """fewest factories per team (season 2: 2, NeurIPS stage: 4)"""
    max_factories: int = 5
    """most factories per team (season 2: 5, NeurIPS stage: 10)"""
    max_robots: int = 6
    """robot slots per team; nothing is built while they are full"""
    safe_masks: bool = True
    """if toggled, orders that are legal but plainly ruinous are masked too"""

    # The algorithm
    total_timesteps: int = 102400
    """environment steps of the training (one step of one match, in which both players act)"""
    learning_rate: float = 1e-3
    """the learning rate of the optimizer"""
    num_envs: int = 16
    """matches played at a time, by all processes of torchrun together"""
    num_steps: int = 32
    """steps of every match in a rollout"""
    anneal_lr: bool = True
    """if toggled, the learning rate falls linearly to 0"""
    anneal_ent: bool = True
    """if toggled, the coefficient of the entropy falls linearly to 0"""
    gamma: float = 0.99
    """the discount factor gamma"""
    gae_lambda: float = 0.95
    """the lambda of generalized advantage estimation"""
    num_minibatches: int = 8
    """minibatches of a rollout; each has num_steps / num_minibatches steps of every match"""
    update_epochs: int = 2
    """passes over a rollout"""
    norm_adv: bool = True
    """if toggled, advantages are normalized in every minibatch"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    clip_vloss: bool = False
    """if toggled, the value loss is clipped too"""
    ent_coef: float = 0.003
    """coefficient of the entropy, at the start"""
    vf_coef: float = 0.1
    """coefficient of the value loss"""
    max_grad_norm: float = 2.0
    """the largest norm of the gradient"""
    target_kl: Optional[float] = None
    """the KL divergence at which the passes over a rollout end early"""
    positive_reward_weight: float = 1.1
    """weight of positive rewards at the start, falls linearly to 1 over the training; 1 is off"""


def fail(message, code=2):
    """End the program with one sentence for the person who started it, below the progress bar if there may be one."""
    if RANK == 0 or code == 1:  # a wrong flag is wrong in every process of torchrun, and one of them says so
        print("\n" * (code == 1) + os.path.basename(__file__) + ": error:", *message.split(), file=sys.stderr)
    sys.exit(code)


def reason(error):
    """What an exception says, short enough to stand within a sentence."""
    return f"{type(error).__name__}: {error}"[:120]


def parse_args(default=Args()):
    """The arguments of the command line; what tyro says of wrong ones in a box becomes one sentence."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return tyro.cli(Args, default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    message = re.split("[─-]{9,}", said.getvalue())[1]  # what stands between the box's first two rules
    fail(re.sub("[╮│]", "", message))


def check_args(args):
    """Refuse what cannot work before anything is written."""
    for low, high, names in (
        (1, 10**9, "total_timesteps num_envs num_steps num_minibatches update_epochs"),
        (1, 10**9, "eval_episodes save_every keep_checkpoints max_robots"),
        (1e-9, 10**9, "learning_rate max_grad_norm clip_coef positive_reward_weight"),
        (0, 10**9, "ent_coef vf_coef target_kl num_workers"),
        (0, 1, "gamma gae_lambda"),  # (*)
        (0, 2**32 - 1, "seed"),
        (24, 64, "map_size"),
        (1, 10, "min_factories"),
        (args.min_factories, 10, "max_factories"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                fail(f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}")
    if "--cuda" in sys.argv and not torch.cuda.is_available():
        fail("--cuda needs a GPU and a PyTorch with CUDA, and there is none here; without the flag the CPU is used")
    if args.num_envs % WORLD_SIZE:
        fail(f"--num-envs {args.num_envs} does not divide by the {WORLD_SIZE} processes of torchrun")
    if args.num_steps % args.num_minibatches:
        fail(f"--num-steps {args.num_steps} does not divide by --num-minibatches {args.num_minibatches}")
    if args.total_timesteps < args.num_envs * args.num_steps:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout, {args.num_envs} x {args.num_steps}")


def make_envs(args, num_envs, **options):
    """The vector environment; all that the rest of this file knows of the game is its arrays."""
    game = ("num_workers", "map_size", "min_factories", "max_factories", "max_robots", "safe_masks")
    return LuxVecEnv(num_envs, **{name: getattr(args, name) for name in game} | options)  # (*)


def to_tensors(obs, device):
    """Observation arrays [N, P, ...] as tensors [B, ...]; on a CPU they share memory with the arrays."""
    return {key: torch.as_tensor(array, device=device).flatten(0, 1) for key, array in obs.items()}


# (*) Entities to groups: the entity axis is reduced
def group_sum(x, obs):
    """Sum over the entities of each team: [..., E] per entity to [..., G] per group, with G = 1."""
    return torch.where(obs["kind"] > 0, x, 0).sum(-1, keepdim=True)


def group_value(value, team_value, obs, args):
    """Value of each group [..., G]: the team's."""
    return team_value[..., None]


def masked_mean(x, mask, count=None):
    """Mean of x where mask, even if the rest is NaN; with the `count` of all processes, its part of their mean."""
    count = mask.sum() if count is None else count
    return torch.where(mask, x, 0).sum() / count.clamp(min=1)


def together(exchange, x, *arguments):
    """The tensor or list x after an exchange with the other processes of torchrun, x itself where there are none."""
    if WORLD_SIZE > 1:
        try:
            exchange(x, *arguments)
        except RuntimeError:
            fail("another process of this training has died", 1)
    return x


def all_moments(x, mask):
    """Number of cells where mask, and mean and variance of x there, over all processes of torchrun."""
    x = torch.where(mask, x, 0).double()  # precise enough for the variance to be a difference
    count, total, squares = together(dist.all_reduce, torch.stack([mask.sum(), x.sum(), (x**2).sum()]))
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean**2).clamp(min=0)
    return count.float(), mean.float(), variance.float()


def gather(item):
    """A list of what each process of torchrun has there, the same in all of them."""
    return together(dist.all_gather_object, [item] * WORLD_SIZE, item)


def set_up(args):
    """The device of this process; where torchrun started several, each has a GPU of its own, and they meet here."""
    device = torch.device("cpu")
    if args.cuda and torch.cuda.is_available():
        if LOCAL_WORLD_SIZE > (gpus := torch.cuda.device_count()):
            fail(f"torchrun started {LOCAL_WORLD_SIZE} processes for {gpus} GPUs; --no-cuda does without them")
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1 and args.evaluate is None:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=2))
        except (RuntimeError, ValueError) as error:
            fail(f"cannot meet the other processes: is MASTER_ADDR right and MASTER_PORT free? ({reason(error)})", 1)
    return device


def sample(probs):
    """An action for every entity; every process draws for all processes, so that one draws the same as several."""
    noise = torch.empty((WORLD_SIZE, *probs.shape), device=probs.device).exponential_()
    return (probs / noise[RANK]).argmax(-1)


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


@torch.no_grad()
def play(agent, envs, device):
    """Play held-out matches with the agent's policy, for ever; yields the infos of every step."""
    generator = torch.Generator(device).manual_seed(0)
    obs, _ = envs.reset(seed=0)
    while True:
        logits, _, _ = agent(to_tensors(obs, device))
        action = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=generator)
        obs, _, _, _, infos = envs.step(action.view(obs["kind"].shape).cpu().numpy())
        yield infos


def evaluate(agent, args, device):
    """Play `args.eval_episodes` held-out matches, each once: dict metric -> a number for each (mean of the teams)."""
    envs = make_envs(args, args.eval_episodes, held_out=True)
    metrics, playing, steps = {}, np.ones(args.eval_episodes, bool), play(agent, envs, device)
    with tqdm(total=args.eval_episodes, desc="evaluating", unit="match", leave=False) as progress:
        while playing.any():
            infos = next(steps)
            for match in np.flatnonzero(infos.get("_episode", False) & playing):
                for key, value in infos["episode"].items():
                    metrics.setdefault(key, [None] * args.eval_episodes)[match] = float(np.mean(value[match]))
                playing[match] = False
                progress.update()
    envs.close()
    return metrics


def record_video(agent, args, device, path):
    """Play the first held-out match and draw every fourth step of it into an animated GIF."""
    envs = make_envs(args, 1, num_workers=0, held_out=True, render_mode="rgb_array")
    frames = []
    for step, infos in enumerate(play(agent, envs, device)):
        if infos:
            break
        if step % 4 == 0:
            frames.append(Image.fromarray(envs.render()[0]).quantize(64))
    envs.close()
    video = {"save_all": True, "append_images": frames[1:], "duration": 50, "loop": 0}
    write_atomically(path, lambda file: frames[0].save(file, "GIF", **video))


def report(metrics, path):
    """Print the evaluation as a table and write it to `path` as JSON."""
    summary = {key: {"mean": np.mean(x), "std": np.std(x), "min": min(x), "max": max(x)} for key, x in metrics.items()}
    print(f"\nevaluation on {len(metrics['l'])} held-out matches\n{'':24}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}")
    for key, row in summary.items():
        name = {"l": "episode_length", "r": "episodic_return"}.get(key, key)
        print(f"{name:24}" + "".join(f"{number:10.1f}" for number in row.values()))
    text = json.dumps({"summary": summary, "matches": metrics}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path, write):
    """Write a file under another name and rename it, so that a full disk never costs what was there before."""
    temporary, content = f"{path}.tmp", io.BytesIO()
    write(content)  # in memory, as torch.save says little of a disk that is full
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        fail(f"cannot write {path} ({reason(error)}); what was there before is kept", 1)


def checkpoints(run_dir):
    """Paths of the checkpoints of a run, the newest last."""
    paths = [path for path in Path(run_dir).glob("checkpoint_*.pt") if path.stem.split("_", 1)[1].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem.split("_")[1]))


def load_checkpoint(path):
    """Path, content (tensors and plain values only) and Args of a checkpoint, or of a run's newest that is whole."""
    paths, message = checkpoints(path) if os.path.isdir(path) else [path], f"there is no checkpoint in {path}"
    for path in reversed(paths):
        try:
            whole = zipfile.ZipFile(path).testzip() is None  # torch.load checks no sums
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            trained = Args(**{name: x for name, x in checkpoint["args"].items() if hasattr(Args, name)})
            check_args(trained)
            kinds = {x.name: x.type if x.default is None else type(x.default) for x in fields(Args)}
            fitting = all(isinstance(getattr(trained, name), kind) for name, kind in kinds.items())
            if not (whole and fitting and all(x.isfinite().all() for x in checkpoint["model"].values())):
                raise ValueError("wrong sums, wrong arguments, or numbers that are not finite")
            return path, checkpoint, trained
        except Exception as error:
            message = f"{path} is damaged or no checkpoint of this script ({reason(error)})"
            if path != paths[0] and RANK == 0:
                print(f"{message}; the one before it is used", file=sys.stderr)
    fail(message)


def load_run(args):
    """What --resume or --evaluate goes on with: the arguments, checkpoint and folder of a run."""
    flag = "evaluate" if args.resume is None else "resume"
    path, checkpoint, trained = load_checkpoint(getattr(args, flag))
    if flag == "resume" and checkpoint["args"].keys() != asdict(args).keys():
        fail(f"{path} was made by another script or version, which can go on with it")
    args = parse_args(trained)
    for name, kept in asdict(trained).items():
        if getattr(args, name) != kept and name not in (flag, *MAY_CHANGE):
            fail(f"--{name.replace('_', '-')} cannot be changed with --{flag}; this run has {kept}")
    args.resume = None
    return args, checkpoint, os.path.dirname(path) or "."


def catch_signals(caught):
    """From now on SIGINT and SIGTERM are only noted in the list `caught`; after the first one, SIGINT ends at once."""

    def note(number, _):
        caught.append(number)
        if WORLD_SIZE == 1:  # torchrun passes on what the terminal has sent to all already
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


def restore(checkpoint, agent, optimizer, envs, device):
    """Put everything back; returns the first observation, and the update, step, seconds and last matches so far."""
    agent.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
    for x, state in optimizer.state.items():  # Adam itself would not notice
        if {key: y.shape for key, y in state.items()} != {"step": (), "exp_avg": x.shape, "exp_avg_sq": x.shape}:
            raise ValueError("its optimizer is that of another network")
    update, matches, global_step = int(checkpoint["update"]), checkpoint["matches"], int(checkpoint["global_step"])
    if global_step != update * checkpoint["args"]["num_envs"] * checkpoint["args"]["num_steps"]:
        raise ValueError("its steps and updates do not agree")
    if any(match["played"] > global_step for match in matches or ()):
        raise ValueError("it counts more matches than steps")
    if matches is None:  # from an environment without state(): they are lost when a run stops
        next_obs, _ = envs.reset(seed=checkpoint["args"]["seed"] + update)
    else:
        mine = matches[RANK * envs.num_envs : (RANK + 1) * envs.num_envs]
        next_obs, _ = envs.load_state([{key: x.numpy() for key, x in match.items()} for match in mine])
    random.setstate(checkpoint["python_rng"])
    np.random.set_state(checkpoint["numpy_rng"])
    torch.set_rng_state(checkpoint["torch_rng"])
    if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
        torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)
    finished = [{key: float(x) for key, x in match.items()} for match in checkpoint["finished"]]
    return next_obs, update, global_step, int(checkpoint["train_seconds"]), finished


def train(args, run_dir, device, checkpoint=None):
    """The whole training, or what is left of it: rollout, advantages, update, log; returns the trained agent."""
    if args.track and RANK == 0:
        import wandb

        name = os.path.basename(run_dir)
        options = {"id": name, "name": name, "resume": "allow", "sync_tensorboard": True, "save_code": True}
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, config=vars(args), **options)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic

    num_envs = args.num_envs // WORLD_SIZE  # those of this process
    cores = (os.cpu_count() or 1) // LOCAL_WORLD_SIZE
    num_workers = args.num_workers if args.num_workers is not None else cores if cores > 1 else 0
    envs = make_envs(args, num_envs, num_workers=num_workers, first_match=RANK * num_envs)
    agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max())).to(device)
    for parameter in agent.parameters():  # the same seed gives the same ones, but for rounding on another machine
        together(dist.broadcast, parameter.data, 0)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    if checkpoint:
        try:
            next_obs, last_update, global_step, seconds, finished = restore(checkpoint, agent, optimizer, envs, device)
        except Exception as error:
            code = 1 if isinstance(error, LuxError) else 2
            fail(f"the checkpoint in {run_dir} does not fit its own arguments ({reason(error)})", code)
    else:
        next_obs, _ = envs.reset(seed=args.seed)
        last_update, global_step, seconds, finished = 0, 0, 0, []
    if RANK == 0:
        how = f", from step {global_step} of {args.total_timesteps} on" if checkpoint else ""
        print(f"{sum(p.numel() for p in agent.parameters()):,} parameters, on {device}, writing to {run_dir}{how}")
        threading.excepthook = lambda _: None  # what fails in TensorBoard's thread is raised in this one too
        writer = SummaryWriter(run_dir, purge_step=global_step + 1 if checkpoint else None)  # the rest comes again
        if not checkpoint:
            table = "\n".join(f"|{key}|{value}|" for key, value in vars(args).items())
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    # Rollout storage. Masks are data: stored with the observation, replayed in the update.
    next_obs = to_tensors(next_obs, device)
    B = len(next_obs["kind"])
    obs = {key: x.new_zeros((args.num_steps, *x.shape)) for key, x in next_obs.items()}
    actions = torch.zeros((args.num_steps, *next_obs["kind"].shape), dtype=torch.long, device=device)
    dones = torch.zeros((args.num_steps, B), dtype=torch.bool, device=device)
    G = group_sum(next_obs["kind"].float(), next_obs).shape[-1]
    logprobs = torch.zeros((args.num_steps, B, G), device=device)
    rewards = torch.zeros((args.num_steps, B, G), device=device)
    values = torch.zeros((args.num_steps + 1, B, G), device=device)
    active = torch.zeros((args.num_steps + 1, B, G), dtype=torch.bool, device=device)

    rollout_steps = args.num_envs * args.num_steps
    num_updates = args.total_timesteps // rollout_steps
    start_time = time.time() - seconds
    looks = {"unit": "step", "smoothing": 0.1, "dynamic_ncols": True, "disable": RANK > 0}
    progress = tqdm(total=num_updates * rollout_steps, initial=global_step, **looks)
    signals, stopped = [], []  # those that came here, and those that all processes know of
    catch_signals(signals)

    for update in range(last_update + 1, num_updates + 1):
        if stopped:
            break
        done_share = (update - 1) / num_updates
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - done_share) * args.learning_rate
        ent_coef = (1 - done_share) * args.ent_coef if args.anneal_ent else args.ent_coef
        positive_weight = args.positive_reward_weight + (1 - args.positive_reward_weight) * done_share
        episodes = []

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

            env_actions = action.view(num_envs, -1, action.shape[-1]).cpu().numpy()  # waits for the device
            env_obs, reward, terminated, truncated, infos = envs.step(env_actions)
            reward = torch.as_tensor(reward, device=device).flatten(0, 1)
            reward = torch.where(reward > 0, reward * positive_weight, reward)
            # The rewards belong to the entities that acted, so to the observation before the step.
            rewards[step] = group_sum(reward, step_obs)  # (*)
            dones[step] = torch.as_tensor(terminated | truncated, device=device).repeat_interleave(B // num_envs)
            next_obs = to_tensors(env_obs, device)

            for match in np.flatnonzero(infos.get("_episode", ())):
                episodes.append((global_step, {key: float(np.mean(x[match])) for key, x in infos["episode"].items()}))

        with torch.no_grad():
            _, value, team_value = agent(next_obs)
            values[-1] = group_value(value, team_value, next_obs, args)
            active[-1] = group_sum(torch.ones_like(value), next_obs) > 0
            advantages = compute_gae(rewards, values, active, dones, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]

        # The batch: one row per team and step
        b_obs = {key: x.flatten(0, 1) for key, x in obs.items()}
        b_actions, b_logprobs, b_active = actions.flatten(0, 1), logprobs.flatten(0, 1), active[:-1].flatten(0, 1)
        b_advantages, b_returns, b_values = advantages.flatten(0, 1), returns.flatten(0, 1), values[:-1].flatten(0, 1)

        clipfracs = []
        for _ in range(args.update_epochs):
            # Every team's steps are shuffled on their own: as many of each, so of each process, in every minibatch.
            order = torch.rand((args.num_steps, WORLD_SIZE, B), device=device).argsort(0)[:, RANK]
            for mb in (order * B + torch.arange(B, device=device)).chunk(args.num_minibatches):
                mb = mb.flatten()
                mb_obs = {key: x.index_select(0, mb) for key, x in b_obs.items()}
                mb_active, mb_advantages = b_active[mb], b_advantages[mb]
                count, mean, variance = all_moments(mb_advantages, mb_active)
                logits, value, team_value = agent(mb_obs)
                policy = Categorical(logits=logits, validate_args=False)
                newlogprob = group_sum(policy.log_prob(b_actions[mb]), mb_obs)
                newvalue = group_value(value, team_value, mb_obs, args)
                logratio = torch.where(mb_active, newlogprob - b_logprobs[mb], 0)
                ratio = logratio.exp()

                with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
                    approx_kl = masked_mean((ratio - 1) - logratio, mb_active, count)
                    clipfrac = masked_mean(((ratio - 1).abs() > args.clip_coef).float(), mb_active, count)

                if args.norm_adv:
                    mb_advantages = (mb_advantages - mean) / (variance.sqrt() + 1e-8)

                # Policy loss: the group axis stays up to the mean over active cells
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = masked_mean(torch.max(pg_loss1, pg_loss2), mb_active, count)

                # Value loss
                v_loss = (newvalue - b_returns[mb]) ** 2
                if args.clip_vloss:
                    clipped = b_values[mb] + torch.clamp(newvalue - b_values[mb], -args.clip_coef, args.clip_coef)
                    v_loss = torch.max(v_loss, (clipped - b_returns[mb]) ** 2)
                v_loss = 0.5 * masked_mean(v_loss, mb_active, count)

                entropy_loss = masked_mean(group_sum(policy.entropy(), mb_obs), mb_active, count)
                loss = pg_loss - ent_coef * entropy_loss + v_loss * args.vf_coef

                optimizer.zero_grad()
                loss.backward()
                metrics = torch.stack([pg_loss, v_loss, entropy_loss, approx_kl, clipfrac]).detach()
                if WORLD_SIZE > 1:  # add up what the processes have: one message for all gradients and metrics
                    grads = [p.grad for p in agent.parameters() if p.grad is not None]
                    sums = together(dist.all_reduce, torch.cat([metrics, *[grad.flatten() for grad in grads]]))
                    metrics, *parts = sums.split([len(metrics), *[grad.numel() for grad in grads]])
                    for grad, part in zip(grads, parts):
                        grad.copy_(part.view_as(grad))
                norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                *metrics, norm = torch.cat([metrics, norm[None]]).tolist()  # waits for the device
                if not np.isfinite([*metrics, norm]).all():
                    raise FloatingPointError(f"the loss or its gradient is not a finite number in update {update}")
                pg_loss, v_loss, entropy_loss, approx_kl, clipfrac = metrics
                clipfracs.append(clipfrac)
                optimizer.step()

            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        return_variance, error_variance = (all_moments(x, b_active)[2] for x in (b_returns, b_returns - b_values))
        explained_var = 1 - error_variance / return_variance
        episodes, stopped = (sum(lists, []) for lists in zip(*gather([episodes, signals])))
        saving = update % args.save_every == 0 or update == num_updates or stopped
        matches = sum(gather(envs.state()), []) if saving and hasattr(envs, "state") else None
        if RANK > 0:  # the rest of the update is writing
            continue

        for episode_step, episode in sorted(episodes, key=lambda episode: episode[0]):
            finished = [*finished[-19:], episode]  # the metrics of the last 20 matches
            for key, x in episode.items():
                name = {"l": "charts/episodic_length", "r": "charts/episodic_return"}.get(key, f"lux/{key}")
                writer.add_scalar(name, x, episode_step)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        losses = {"value_loss": v_loss, "policy_loss": pg_loss, "entropy": entropy_loss, "approx_kl": approx_kl}
        losses |= {"clipfrac": np.mean(clipfracs), "explained_variance": explained_var.item()}
        for name, x in losses.items():
            writer.add_scalar(f"losses/{name}", x, global_step)
        writer.add_scalar("charts/SPS", int(global_step / (time.time() - start_time)), global_step)
        progress.update(rollout_steps)
        if finished:
            shown = {"return": "r", "length": "l", "ice": "ice_transferred", "factories": "factories_alive"}
            means = {name: np.mean([match.get(key, np.nan) for match in finished]) for name, key in shown.items()}
            progress.set_postfix({name: f"{mean:.1f}" for name, mean in means.items()})

        if saving:
            if not all(x.isfinite().all() for x in agent.parameters()):
                raise FloatingPointError(f"a parameter is not a finite number after update {update}")
            checkpoint = {"args": asdict(args), "model": agent.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint |= {"update": update, "global_step": global_step, "train_seconds": time.time() - start_time}
            checkpoint |= {"finished": finished, "python_rng": random.getstate(), "torch_rng": torch.get_rng_state()}
            checkpoint["numpy_rng"] = tuple(np.asarray(x).tolist() for x in np.random.get_state())
            checkpoint["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            checkpoint["matches"] = matches and [{k: torch.as_tensor(x) for k, x in match.items()} for match in matches]
            writer.flush()  # a run that goes on from here finds all that was logged
            path = f"{run_dir}/checkpoint_{global_step}.pt"
            write_atomically(path, lambda file: torch.save(checkpoint, file))
            paths = checkpoints(run_dir)  # those of later steps are from before the run went on from an older one
            so_far = paths[: paths.index(Path(path)) + 1]
            for other in {*paths} - {*so_far[-args.keep_checkpoints :]}:
                other.unlink()

    progress.close()
    envs.close()
    if RANK == 0:
        writer.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Also those that came since; torchrun ends all processes when one ends: wait until the checkpoint is written.
    if stopped := sum(gather(signals), []):
        if RANK == 0:
            print(f"stopped at step {global_step}; go on with: python {sys.argv[0]} --resume {run_dir}")
        sys.exit(128 + stopped[0])
    return agent


if __name__ == "__main__":
    args, checkpoint, run_dir = parse_args(), None, None
    if (args.resume, args.evaluate) != (None, None):
        args, checkpoint, run_dir = load_run(args)
    check_args(args)
    if args.track and args.evaluate is None and importlib.util.find_spec("wandb") is None:
        fail("--track needs Weights and Biases: pip install wandb")
    device = set_up(args)
    if RANK == 0 and not checkpoint:
        run_dir = f"runs/{args.exp_name}__{args.seed}__{int(time.time())}"
        try:
            os.makedirs(run_dir)
            Path(run_dir, "args.json").write_text(json.dumps(asdict(args), indent=1))
        except (OSError, ValueError) as error:
            fail(f"cannot write to {os.path.abspath(run_dir)} ({reason(error)}); start it in a folder of your own")
    try:
        if args.evaluate is None:
            agent = train(args, run_dir, device, checkpoint)
            if WORLD_SIZE > 1:
                dist.destroy_process_group()
                if RANK > 0:
                    os._exit(0)  # nothing is left to do, and in the usual end threads of torch sometimes abort
        else:
            envs = make_envs(args, 1, num_workers=0)
            agent = HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max())).to(device)
            try:
                agent.load_state_dict(checkpoint["model"])
            except Exception as error:
                fail(f"{args.evaluate} holds another network than this version's ({reason(error)})")
        if RANK == 0:  # one process evaluates
            report(evaluate(agent, args, device), f"{run_dir}/evaluation.json")
            if args.capture_video:
                record_video(agent, args, device, f"{run_dir}/video.gif")
            print(f"written to {run_dir}")
    except (RuntimeError, FloatingPointError, MemoryError, OSError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, LuxError) and "memory" not in str(error):
            raise  # a mistake in the code; where memory is short torch raises RuntimeError too
        kept = f"; the last checkpoint is {checkpoints(run_dir)[-1]}" if run_dir and checkpoints(run_dir) else ""
        fail(f"{error}{kept}", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
