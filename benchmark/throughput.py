"""Where the time of a training goes, and how it scales with cores, processes and entities.

    python benchmark/throughput.py

It takes about 15 minutes and needs a machine on which nothing else runs. The report is printed and
kept, with its numbers, in runs/throughput, or in --out. Speeds compare within one machine at one time, so
ratios come from runs in turns (those of `entities` from one run of each size). A part can be run
alone, which keeps the results of the others:

    python benchmark/throughput.py --parts wrapper entities
    python benchmark/throughput.py --parts torchrun --steps 1024 --repeats 1    # in small, to try it

    part        what it measures
    training    a training with the default flags: speed, where the time goes, peak memory
    wrapper     LuxVecEnv against the bare engine: the same matches, the same orders, one core
    torchrun    two processes with a thread each against one
    entities    time and memory of an update by live entities per player
    bot         a turn of the bot in submission/ by the number of its robots, one thread
    gpu         trainings on the GPU against the same on the CPU cores of its machine; only if it is named
"""

import itertools
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
from ablation import commit
from luxai_runner.utils import to_json
from luxai_s2 import LuxAI_S2
from luxai_s2.unit import UnitType
from plot import ROOT, Refused, named_or, start, table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lux_wrapper as lux
import trajsep_ppo

sys.path += [str(ROOT / "tests"), str(ROOT / "submission")]

import main as bot  # noqa: E402
from helpers import scripted  # noqa: E402

ROLLOUT = 16 * 32  # environment steps of an update with the default flags

# -- Tools ---------------------------------------------------------------------------------


class Stopwatches:
    """Seconds spent in functions of this process, by name."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def watch(self, owner, function, name):
        """Let owner.function add its time to `name`, or to what name() says."""
        original = getattr(owner, function)

        def timed(*args, **kwargs):
            key = name() if callable(name) else name
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[key] += time.perf_counter() - start

        setattr(owner, function, timed)


def in_a_process(function, *args):
    """What function(*args) returns in a process of its own, and the peak of its memory in MB; ends if it fails."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_send, args=(there, function, args))
    process.start()
    there.close()  # so that `recv` ends when the process does
    peak = [0.0]
    done = threading.Event()

    def sample():
        while not done.wait(0.5):
            peak[0] = max(peak[0], memory_of(process.pid))

    threading.Thread(target=sample, daemon=True).start()
    try:
        result = here.recv()
    except EOFError:
        raise ChildProcessError(f"{function.__name__} failed, see above") from None
    finally:
        done.set()
        process.join()
    return result, peak[0]


def _send(pipe, function, args):
    pipe.send(function(*args))


def memory_of(pid):
    """Memory of a process and its children in MB; what they share counts once."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        (size,) = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    except (OSError, ValueError):  # it has ended
        return 0.0
    return size / 1024 + sum(map(memory_of, children))


def train(folder, *flags, processes=1, threads=None):
    """Run trajsep_ppo.py as its users do; environment steps/s of its training, as it logs them itself."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, ROOT / "trajsep_ppo.py", "--eval-episodes", "1", *flags]
    result = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-3000:])
    run_dir = max(Path(folder, "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    return EventAccumulator(str(run_dir)).Reload().Scalars("charts/SPS")[-1].value


def spread(values, digits=0):
    """Median (least to most)."""
    median, least, most = (f"{x:,.{digits}f}" for x in (np.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})"


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.machine()
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return f"{model}, {os.cpu_count()} cores, {versions}"


# -- Training ------------------------------------------------------------------------------

PHASES = {
    "waiting": "waiting for the matches",
    "inference": "inference",
    "forward": "learning: forward",
    "backward": "learning: backward",
    "optimizer": "learning: optimizer",
}


def profiled_training(folder, steps):
    """Train with the default flags, but so many environment steps, and stopwatches."""
    watches = Stopwatches()
    watches.watch(lux.LuxVecEnv, "step", "waiting")
    network = trajsep_ppo.HybridNet
    watches.watch(network, "forward", lambda: "forward" if torch.is_grad_enabled() else "inference")
    watches.watch(torch.Tensor, "backward", "backward")
    watches.watch(torch.optim.Adam, "step", "optimizer")
    args = trajsep_ppo.Args(total_timesteps=steps)
    start = time.perf_counter()
    trajsep_ppo.train(args, folder, torch.device("cpu"))
    return {
        "seconds": time.perf_counter() - start,
        "steps": args.total_timesteps,
        "threads": torch.get_num_threads(),
        "workers": min(args.num_envs, os.cpu_count()),
        "stopwatches": dict(watches.seconds),
    }


def training(steps):
    with tempfile.TemporaryDirectory() as folder:
        result, peak = in_a_process(profiled_training, folder, steps)
    return result | {"peak_memory_mb": peak}


def report_training(result):
    seconds = result["seconds"]
    parts = {name: result["stopwatches"][key] for key, name in PHASES.items()}
    parts["the rest (sampling, storage, losses, advantages)"] = seconds - sum(parts.values())
    rows = [(name, f"{part:.1f}", f"{part / seconds:.0%}") for name, part in parts.items()]
    return (
        f"A training with the default flags: {result['steps']:,} environment steps in {seconds:.0f} s, "
        f"**{result['steps'] / seconds:.0f} environment steps/s** ({result['workers']} workers, "
        f"{result['threads']} threads). Peak memory of all processes: "
        f"**{result['peak_memory_mb'] / 1024:.2f} GB**. The time of the process that learns:\n\n"
        + table(("part", "seconds", "share"), rows)
    )


# -- Wrapper -------------------------------------------------------------------------------


def recorded_matches(env, seed, steps=200):
    """Map seeds, actions, and orders of each match of scripted play; None if a match ended."""
    obs, _ = env.reset(seed=seed)
    seeds = [match.seed for match in env.matches]
    orders = [[] for _ in env.matches]
    originals = [match.engine.step for match in env.matches]

    def record(step, of_match, given):
        of_match.append(given)
        return step(given)

    for match, step, of_match in zip(env.matches, originals, orders):
        match.engine.step = partial(record, step, of_match)
    actions, over = [], False
    while len(actions) < steps and not over:
        actions.append(scripted(obs))
        obs, _, terminated, _, _ = env.step(actions[-1])
        over = terminated.any()
    for match, step in zip(env.matches, originals):
        match.engine.step = step
    return None if over else (seeds, actions, orders)


def bare_engine(seed):
    """An engine as the wrapper sets it up, after placement."""
    options = {"MIN_FACTORIES": 2, "MAX_FACTORIES": 5, "verbose": 0, "validate_action_space": False}
    engine = LuxAI_S2(map_size=48, **options)
    obs = engine.reset(seed=seed)[0]["player_0"]
    while obs["real_env_steps"] < 0:
        orders = {player: lux.early_phase_action(obs, player) for player in lux.PLAYERS}
        obs = engine.step(orders)[0]["player_0"]
    return engine


def wrapper(repeats):
    torch.set_num_threads(1)
    env = lux.LuxVecEnv(4, num_workers=0, max_robots=20)
    recordings = ((seed, recorded_matches(env, seed)) for seed in range(1, 100))
    seed, (seeds, actions, orders) = next(recording for recording in recordings if recording[1])
    steps = len(actions) * len(seeds)
    speeds = defaultdict(list)
    for _ in range(repeats):
        env.reset(seed=seed)
        start = time.perf_counter()
        for action in actions:
            env.step(action)
        speeds["wrapper"].append(steps / (time.perf_counter() - start))
        engines = [bare_engine(seed) for seed in seeds]
        start = time.perf_counter()
        for engine, of_match in zip(engines, orders):
            for order in of_match:
                engine.step(order)
        speeds["bare engine"].append(steps / (time.perf_counter() - start))
        for engine, match in zip(engines, env.matches):  # they played the same
            assert (engine.state.board.rubble == match.engine.state.board.rubble).all()
            assert engine.state.units["player_0"].keys() == match.engine.state.units["player_0"].keys()
    robots = [len(units) for engine in engines for units in engine.state.units.values()]
    result = {"robots_per_team_at_the_end": float(np.mean(robots)), "matches": len(seeds)}
    return dict(speeds) | result


def report_wrapper(result):
    ratios = np.divide(result["wrapper"], result["bare engine"])
    return (
        f"{result['matches']} matches, the first 200 steps of each, "
        f"{result['robots_per_team_at_the_end']:.0f} robots per team at their end, one core: "
        f"bare engine {spread(result['bare engine'])} steps/s, wrapper with observations, masks, "
        f"orders and rewards {spread(result['wrapper'])} steps/s, **{spread(ratios, 2)}x**."
    )


# -- Processes -----------------------------------------------------------------------------


def torchrun(repeats, steps):
    speeds = defaultdict(list)
    alone = ("--num-workers", 0)
    some, twice = ("--total-timesteps", steps), ("--num-envs", 32, "--total-timesteps", 2 * steps)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            speeds["one process, one thread"].append(train(folder, *alone, *some, threads=1))
            two = partial(train, folder, *alone, processes=2, threads=1)
            speeds["two processes, a thread each"].append(two(*some))
            speeds["two processes, twice the matches"].append(two(*twice))
            speeds["no torchrun, default flags"].append(train(folder, *some))
    return dict(speeds) | {"steps": steps}


def report_torchrun(result):
    base = result["one process, one thread"]
    runs = {name: speeds for name, speeds in result.items() if isinstance(speeds, list)}
    rows = [(name, spread(x), spread(np.divide(x, base), 2)) for name, x in runs.items()]
    head = ("processes", "environment steps/s", "ratio")
    return f"The first {result['steps']:,} steps of a training.\n\n" + table(head, rows)


# -- Entities ------------------------------------------------------------------------------


class CrowdVecEnv:
    """Made-up observations of the wrapper's shapes with `live` entities per player, and no game."""

    metadata = {"name": "crowd"}

    def __init__(self, num_envs, live):
        env = lux.LuxVecEnv(1, num_workers=0, max_robots=max(live - 5, 1))
        self.num_envs = num_envs
        self.single_observation_space = env.single_observation_space
        self.single_action_space = env.single_action_space
        spaces = self.single_observation_space.items()
        obs = {key: np.zeros((num_envs, *space.shape), space.dtype) for key, space in spaces}
        rng, shape = np.random.default_rng(0), obs["kind"].shape
        obs["board"][:] = rng.integers(0, 101, obs["board"].shape)
        obs["features"][:] = rng.normal(size=obs["features"].shape)
        obs["position"][:] = rng.integers(0, 48, obs["position"].shape)
        obs["kind"][..., :live] = rng.integers(lux.FACTORY, lux.ROBOT + 1, (*shape[:2], live))
        obs["group"][:] = np.arange(shape[-1])
        obs["action_mask"][:] = True
        self.obs = obs
        self.rewards = rng.normal(size=shape).astype(np.float32)
        self.never = np.zeros(num_envs, bool)

    def reset(self, *, seed=None, options=None):
        return self.obs, {}

    def step(self, actions):
        return self.obs, self.rewards, self.never, self.never, {}

    def close(self):
        pass


def crowd_update(live):
    """Seconds and memory of an update (4 matches x 8 steps and learning) on a made-up crowd."""
    torch.set_num_threads(1)
    trajsep_ppo.make_envs = lambda args, num_envs, **_: CrowdVecEnv(num_envs, live)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    args = trajsep_ppo.Args(num_envs=4, num_steps=8, num_minibatches=2, total_timesteps=5 * 32)
    marks, gae = [], trajsep_ppo.compute_gae

    def mark(*gae_args):
        marks.append(time.perf_counter())
        return gae(*gae_args)

    trajsep_ppo.compute_gae = mark
    with tempfile.TemporaryDirectory() as folder:
        trajsep_ppo.train(args, folder, torch.device("cpu"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return {"seconds": float(np.median(np.diff(marks))), "memory_mb": memory / 1024}


def entities(counts=(10, 30, 100, 300, 1000)):
    return {"network": {live: in_a_process(crowd_update, live)[0] for live in counts}}


def report_entities(result):
    rows, cost = [], {}
    for live, update in result["network"].items():
        cost[live] = update["seconds"] / (int(live) * 4 * 2 * 8)
        row = [f"{int(live):,}", f"{update['seconds']:.2f}", f"{cost[live] * 1e6:.0f}"]
        rows.append([*row, f"{update['memory_mb']:.0f}"])
    head = ["live entities per player", "an update, s", "per entity and step, µs", "memory, MB"]
    return (
        f"Cost per entity at 1,000 against 100: **{cost['1000'] / cost['100']:.2f}x** for network and "
        f"learner (made-up observations).\n\n{table(head, rows)}"
    )


def bot_turns(robots, turns):
    """Seconds of each turn of the bot with so many robots, from the runner's JSON to its answer.

    One in three is heavy. Before each turn those that were lost are replaced, on free cells anywhere.
    """
    player = bot.Player()
    player.options = replace(player.options, max_robots=robots)
    match = lux.LuxMatch(lux.LuxOptions(), lux.weights_of())
    match.reset(seed=1)
    engine, rng, seconds = match.engine, np.random.default_rng(0), []
    refill(engine, robots, rng)
    message = engine.state.get_obs()  # whole, later what has changed
    for _ in range(turns):
        line = json.dumps({"player": "player_0", "obs": to_json(message)})
        start = time.perf_counter()
        orders = player.answer(line)
        seconds.append(time.perf_counter() - start)
        seen = engine.state.get_obs()
        orders = {unit_id: np.array(order) if isinstance(order, list) else order for unit_id, order in orders.items()}
        engine.step({"player_0": orders, "player_1": {}})
        refill(engine, robots, rng)
        message = engine.state.get_change_obs(seen)
    return seconds


def refill(engine, robots, rng):
    """Give the first player so many robots, and all factories water, so that the match goes on."""
    state = engine.state
    own = state.units["player_0"]
    free = state.board.factory_occupancy_map == -1
    for unit in [*own.values(), *state.units["player_1"].values()]:
        free[unit.pos.x, unit.pos.y] = False
    for cell in rng.permutation(np.argwhere(free))[: max(robots - len(own), 0)]:
        kind = UnitType.HEAVY if rng.random() < 1 / 3 else UnitType.LIGHT
        unit = engine.add_unit(state.teams["player_0"], kind, cell)
        unit.power = unit.battery_capacity
    for factories in state.factories.values():
        for factory in factories.values():
            factory.cargo.water = 1000


def bots(turns, counts=(10, 50, 100, 200)):
    return {"turns": {robots: in_a_process(bot_turns, robots, turns)[0] for robots in counts}}


def report_bot(result):
    rows = []
    for robots, seconds in result["turns"].items():
        late = np.percentile(seconds, [50, 99, 100]) * 1000
        rows.append([robots, f"{len(seconds):,}", *(f"{x:.0f}" for x in late)])
    return table(["own robots", "turns", "median, ms", "99% take at most, ms", "longest, ms"], rows)


# -- A GPU ---------------------------------------------------------------------------------

LARGE_STAGE = "--env-kwargs map_size 64 min_factories 4 max_factories 10 max_robots 100"
# What is trained -> environment steps, as a share of those of the default flags, and flags
SIZES = {
    "16 matches, default flags": (1, ""),
    "256 matches": (4, "--num-envs 256"),
    "16 matches, 64 x 64, up to 100 robots a team": (0.5, LARGE_STAGE),
}
DEVICES = {"GPU": "--cuda", "CPU": "--no-cuda"}


def gpu(repeats, steps):
    if not torch.cuda.is_available():
        raise Refused("there is no GPU that PyTorch can use")
    speeds = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for _, size, device in itertools.product(range(repeats), SIZES, DEVICES):
            share, flags = SIZES[size]
            some = f"--total-timesteps {int(share * steps)} --eval-episodes 0"
            speed = train(folder, *f"{flags} {DEVICES[device]} {some}".split())
            print(f"{size}, {device}: {speed:.0f} steps/s", flush=True)
            speeds[f"{size}, {device}"].append(speed)
    return dict(speeds) | {"steps": steps, "gpu": torch.cuda.get_device_name()}


def report_gpu(result):
    rows = []
    for size, (share, _) in SIZES.items():
        on_gpu, on_cpu = (result[f"{size}, {device}"] for device in DEVICES)
        ratio = spread(np.divide(on_gpu, on_cpu), 2)
        rows.append((size, f"{int(share * result['steps']):,}", spread(on_gpu), spread(on_cpu), ratio))
    head = ("training", "first steps", "GPU, steps/s", "CPU, steps/s", "ratio")
    return f"{result['gpu']}, a worker for each core.\n\n{table(head, rows)}"


REPORTS = {
    "training": report_training,
    "wrapper": report_wrapper,
    "torchrun": report_torchrun,
    "entities": report_entities,
    "bot": report_bot,
    "gpu": report_gpu,
}
Part = Literal["training", "wrapper", "torchrun", "entities", "bot", "gpu"]


def main(
    parts: tuple[Part, ...] = ("training", "wrapper", "torchrun", "entities", "bot"),
    steps: Optional[int] = None,
    repeats: Optional[int] = None,
    out: Optional[Path] = None,
):
    """Measure, print and keep.

    Args:
        parts: what to measure.
        steps: environment steps of a training, instead of 102,400 in `training`, 8,192 in `torchrun`
            and 16,384 in `gpu`.
        repeats: turns that are measured, instead of 5 in `wrapper` and 3 in `torchrun` and `gpu`.
        out: folder of the report and of each part's numbers, instead of runs/throughput.
    """
    if steps is not None and (steps < ROLLOUT or steps % ROLLOUT):
        raise Refused(f"--steps must be a multiple of {ROLLOUT}, the steps of a rollout")
    if repeats is not None and repeats < 1:
        raise Refused("--repeats must be at least 1")
    out = named_or("runs/throughput", out, [f"{part}.json" for part in parts])
    measures = {
        "training": partial(training, steps or 102400),
        "wrapper": partial(wrapper, repeats or 5),
        "torchrun": partial(torchrun, repeats or 3, steps or 8192),
        "entities": entities,
        "bot": partial(bots, 40 * repeats if repeats else 400),
        "gpu": partial(gpu, repeats or 3, steps or 16384),
    }
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        print(f"measuring {part}", flush=True)
        result = measures[part]() | {"machine": machine(), "commit": commit()}
        (out / f"{part}.json").write_text(json.dumps(result, indent=1))
        print(f"written to {out / part}.json", flush=True)
    sections = ["# Throughput"]
    for part, report in REPORTS.items():
        if (out / f"{part}.json").exists():
            result = json.loads((out / f"{part}.json").read_text())
            where = f"{result['machine']}; commit {result['commit']}."
            sections.append(f"## {part}\n\n{report(result)}\n\n{where}")
    (out / "report.md").write_text("\n\n".join(sections) + "\n")
    print(*sections, f"written to {out / 'report.md'}", sep="\n\n")


if __name__ == "__main__":
    start(main)
