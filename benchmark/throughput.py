"""Where the time of a training goes, and how it scales with cores, processes and entities.

    python benchmark/throughput.py

It takes about 15 minutes and wants a machine on which nothing else runs. The report is printed and kept, with
its raw numbers, in benchmark/throughput/. Speeds of one machine at one time compare with each other only, so
ratios come from runs that alternate, but for those of `entities`, which come from one run of each size. Parts can
be run alone, which keeps the others' results:

    python benchmark/throughput.py --parts wrapper entities
    python benchmark/throughput.py --parts before --against <commit>    # the training of an older commit, alternating

    part        what it measures
    training    a whole training with the default flags: speed, where the time goes, peak memory of all processes
    wrapper     LuxVecEnv against the bare engine: the same matches, the same orders, one core
    torchrun    two processes with a thread each against one
    entities    cost and memory from 10 to 1,000 live entities per player: the network's update, and the wrapper
    before      the training of an older commit against this one
"""

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Literal, Optional

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).resolve().parent / "throughput"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from helpers import scripted as scripted_team  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import lux_wrapper as lux  # noqa: E402
import trajsep_ppo  # noqa: E402

PARTS = ("training", "wrapper", "torchrun", "entities")


# ------------------------------------------------------------------------------------------------------
# Tools
# ------------------------------------------------------------------------------------------------------


class Stopwatches:
    """Seconds by name, added up over this process and those forked from it."""

    def __init__(self, *names):
        self.seconds = {name: multiprocessing.Value("d", 0.0) for name in names}

    def watch(self, owner, function, name):
        """Replace owner.function by one that also adds its time to `name`, or to what name() says."""
        original = getattr(owner, function)

        def timed(*args, **kwargs):
            watch = self.seconds[name() if callable(name) else name]
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                with watch.get_lock():
                    watch.value += time.perf_counter() - start

        setattr(owner, function, timed)

    def read(self):
        return {name: watch.value for name, watch in self.seconds.items()}


def in_a_process(function, *args):
    """What function(*args) returns in a fresh process, and the peak memory in MB of it and all its children."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_send, args=(there, function, args))
    process.start()
    peak, done = [0.0], threading.Event()

    def sample():
        while not done.wait(0.5):
            peak[0] = max(peak[0], memory_of(process.pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    result = here.recv()
    done.set()
    process.join()
    return result, peak[0]


def _send(pipe, function, args):
    pipe.send(function(*args))


def memory_of(pid):
    """Memory in MB of a process and its children; what they share counts once (Linux: proportional set size)."""
    total = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1]) / 1024
    except (OSError, StopIteration):
        children = []
    return total + sum(memory_of(child) for child in children)


def train(folder, *flags, processes=1, script=ROOT / "trajsep_ppo.py"):
    """Run a script as its users do; environment steps/s of its training, as it logs them itself."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={processes}"]
    episodes = "1" if script.parent != ROOT else "0"  # older scripts evaluate at least one match
    command = [*launcher, str(script), "--eval-episodes", episodes, *map(str, flags)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-3000:])
    run_dir = max(Path(folder, "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    return EventAccumulator(str(run_dir)).Reload().Scalars("charts/SPS")[-1].value


def spread(values, digits=0):
    return f"{np.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def table(header, rows):
    return "\n".join(
        ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)] + [f"| {' | '.join(r)} |" for r in rows]
    )


# ------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------


def profiled_training(folder):
    """A training with the default flags and stopwatches; {"seconds": ..., "stopwatches": ..., ...}."""
    watches = Stopwatches(
        *("step", "engine", "placement", "encode", "orders", "new match"),
        *("waiting", "inference", "forward", "backward", "optimizer"),
    )
    # These run in the workers; `step` holds the others.
    match = lux.LuxMatch.__init__

    def init(self, *args, **kwargs):
        match(self, *args, **kwargs)
        watches.watch(self.engine, "step", lambda: "placement" if self.engine.state.real_env_steps < 0 else "engine")

    lux.LuxMatch.__init__ = init
    watches.watch(lux._Matches, "step", "step")
    watches.watch(lux.LuxMatch, "reset", "new match")
    watches.watch(lux.LuxEncoder, "encode_rows", "encode")
    watches.watch(lux.LuxEncoder, "orders", "orders")
    # And these in the process that learns.
    watches.watch(lux.LuxVecEnv, "step", "waiting")
    watches.watch(trajsep_ppo.HybridNet, "forward", lambda: "forward" if torch.is_grad_enabled() else "inference")
    watches.watch(torch.Tensor, "backward", "backward")
    watches.watch(torch.optim.Adam, "step", "optimizer")
    start = time.perf_counter()
    args = trajsep_ppo.Args()
    trajsep_ppo.train(args, folder, torch.device("cpu"))
    seconds = time.perf_counter() - start
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    return {
        "seconds": seconds,
        "steps": args.total_timesteps,
        "steps_per_second": args.total_timesteps / seconds,
        "threads": torch.get_num_threads(),
        "workers": min(args.num_envs, os.cpu_count()) if args.num_workers is None else args.num_workers,
        "sps_curve": [(event.step, event.value) for event in events.Scalars("charts/SPS")],
        "stopwatches": watches.read(),
    }


def training():
    with tempfile.TemporaryDirectory() as folder:
        result, peak = in_a_process(profiled_training, folder)
    return result | {"peak_memory_mb": peak}


def report_training(result):
    watches, seconds, workers = result["stopwatches"], result["seconds"], max(result["workers"], 1)
    busy = {
        "the engine's steps": watches["engine"],
        "observations and masks": watches["encode"],
        "orders": watches["orders"],
        "new maps and placement": watches["new match"],
    }
    busy["rewards and metrics"] = watches["step"] - sum(busy.values())
    rows = [(f"a worker: {name}", value / workers) for name, value in busy.items()]
    rows.append(
        ("a worker: idle, while the network works or another worker is slower", seconds - sum(busy.values()) / workers)
    )
    main = {
        name: watches[key]
        for name, key in (
            ("waiting for the matches", "waiting"),
            ("inference", "inference"),
            ("learning: forward", "forward"),
            ("learning: backward", "backward"),
            ("learning: optimizer", "optimizer"),
        )
    }
    rows += [(f"main process: {name}", value) for name, value in main.items()]
    rows.append(("main process: the rest (sampling, storage, losses, advantages)", seconds - sum(main.values())))
    lines = table(("where the time goes", "seconds", "share"), [(n, f"{v:.1f}", f"{v / seconds:.0%}") for n, v in rows])
    return (
        f"A whole training with the default flags: {result['steps']:,} environment steps in {seconds:.0f} s, "
        f"**{result['steps_per_second']:.0f} environment steps/s** with learning ({result['workers']} workers, "
        f"{result['threads']} threads). Peak memory of all processes: **{result['peak_memory_mb'] / 1024:.2f} GB**."
        f"\n\n{lines}"
    )


# ------------------------------------------------------------------------------------------------------
# Wrapper
# ------------------------------------------------------------------------------------------------------


def recorded_matches(seed, num_envs=4, steps=200):
    """Map seeds, actions and orders (lists over steps) of scripted matches; None if one of them ended."""
    env = lux.LuxVecEnv(num_envs, num_workers=0, max_robots=20)
    obs, _ = env.reset(seed=seed)
    matches = env.matches.matches
    seeds, actions, orders = [match.seed for match in matches], [], [[] for _ in matches]
    original = env.matches.encoder.orders

    def record_orders(actions):
        of_teams = original(actions)
        for match, record in zip(matches, orders):
            record.append(of_teams[match.teams])
        return of_teams

    env.matches.encoder.orders = record_orders
    rng = np.random.default_rng(0)
    alive = np.ones(num_envs, bool)
    while len(actions) < steps:
        actions.append(scripted(obs, rng))
        obs, _, terminated, _, _ = env.step(actions[-1])
        alive &= ~terminated
    return (seeds, actions, orders) if alive.all() else None


def scripted(obs, rng):
    """Actions [N, P, E] of sound play: tests/helpers.py's scripted team, which here builds light robots too."""
    actions = scripted_team(obs)
    build = (obs["kind"] == lux.FACTORY) & obs["action_mask"][..., lux.BUILD_LIGHT] & (rng.random(actions.shape) < 0.2)
    return np.where(build & (actions != lux.BUILD_HEAVY), lux.BUILD_LIGHT, actions)


def bare_engine(seed):
    """An engine as the wrapper sets it up, but untouched, after placement."""
    from luxai_s2 import LuxAI_S2

    engine = LuxAI_S2(map_size=48, MIN_FACTORIES=2, MAX_FACTORIES=5, verbose=0, validate_action_space=False)
    obs = engine.reset(seed=seed)[0]["player_0"]
    while obs["real_env_steps"] < 0:
        obs = engine.step({player: lux.early_phase_action(obs, player) for player in lux.PLAYERS})[0]["player_0"]
    return engine


def wrapper(repeats=5):
    torch.set_num_threads(1)
    recordings = ((seed, recorded_matches(seed)) for seed in range(1, 100))
    seed, (seeds, actions, orders) = next(recording for recording in recordings if recording[1])
    steps = len(actions) * len(seeds)
    env = lux.LuxVecEnv(len(seeds), num_workers=0, max_robots=20)
    speeds = defaultdict(list)
    for _ in range(repeats):
        env.reset(seed=seed)
        start = time.perf_counter()
        for action in actions:
            env.step(action)
        speeds["wrapper"].append(steps / (time.perf_counter() - start))
        engines = [bare_engine(seed) for seed in seeds]
        start = time.perf_counter()
        for engine, record in zip(engines, orders):
            for order in record:
                engine.step(dict(zip(lux.PLAYERS, order)))
        speeds["bare engine"].append(steps / (time.perf_counter() - start))
        for engine, match in zip(engines, env.matches.matches):  # they played the same
            assert (engine.state.board.rubble == match.engine.state.board.rubble).all()
            assert engine.state.units["player_0"].keys() == match.engine.state.units["player_0"].keys()
    robots = [len(units) for engine in engines for units in engine.state.units.values()]
    return dict(speeds) | {"robots_per_team_at_the_end": float(np.mean(robots)), "matches": len(seeds)}


def report_wrapper(result):
    ratios = np.divide(result["wrapper"], result["bare engine"])
    return (
        f"{result['matches']} matches, the first 200 steps of each, {result['robots_per_team_at_the_end']:.0f} robots "
        f"per team at their end, one core: bare engine {spread(result['bare engine'])} steps/s, wrapper with "
        f"observations, masks, orders and rewards {spread(result['wrapper'])} steps/s, **{spread(ratios, 2)}x**."
    )


# ------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------


def torchrun(repeats=3, steps=8192):
    one = {"OMP_NUM_THREADS": "1"}
    speeds = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--total-timesteps", steps)
        for _ in range(repeats):
            os.environ.update(one)
            speeds["one process, one thread"].append(train(folder, "--num-workers", 0, *flags))
            speeds["two processes, a thread each"].append(train(folder, "--num-workers", 0, *flags, processes=2))
            twice = ("--num-workers", 0, "--num-envs", 32, "--total-timesteps", 2 * steps)
            speeds["two processes, twice the matches"].append(train(folder, *twice, processes=2))
            for key in one:
                del os.environ[key]
            speeds["no torchrun, default flags"].append(train(folder, *flags))
    return dict(speeds)


def report_torchrun(result):
    base = result["one process, one thread"]
    runs = {name: speeds for name, speeds in result.items() if isinstance(speeds, list)}
    rows = [(name, spread(speeds), spread(np.divide(speeds, base), 2)) for name, speeds in runs.items()]
    return "The first 8,192 steps of a training.\n\n" + table(("processes", "environment steps/s", "ratio"), rows)


def before(against, repeats=3, steps=4096):
    speeds = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), against], cwd=ROOT, check=True, capture_output=True
        )
        try:
            for _ in range(repeats):
                speeds["before"].append(train(folder, "--total-timesteps", steps, script=tree / "trajsep_ppo.py"))
                speeds["now"].append(train(folder, "--total-timesteps", steps))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return dict(speeds) | {"against": against}


def report_before(result):
    ratios = np.divide(result["now"], result["before"])
    return (
        f"The first 4,096 steps of a training with the default flags of the time: at commit {result['against']} "
        f"{spread(result['before'])} environment steps/s, now {spread(result['now'])}, **{spread(ratios, 2)}x**."
    )


# ------------------------------------------------------------------------------------------------------
# Entities
# ------------------------------------------------------------------------------------------------------


class CrowdVecEnv:
    """Made-up observations of the wrapper's shapes with a number of live entities per player, and no game."""

    metadata = {"name": "crowd"}

    def __init__(self, num_envs, live):
        blank = lux.LuxEncoder(48, 5, max(live - 5, 1)).arrays()
        rng, shape = np.random.default_rng(0), (num_envs, *blank["kind"].shape)
        self.obs = {key: np.zeros((num_envs, *array.shape), array.dtype) for key, array in blank.items()}
        self.obs["board"][:] = rng.integers(0, 101, self.obs["board"].shape)
        self.obs["features"][:] = rng.normal(size=self.obs["features"].shape)
        self.obs["position"][:] = rng.integers(0, 48, self.obs["position"].shape)
        self.obs["kind"][..., :live] = rng.integers(1, 4, (*shape[:2], live))
        self.obs["group"][:] = np.arange(shape[-1])
        self.obs["action_mask"][:] = True
        self.rewards = rng.normal(size=shape).astype(np.float32)
        self.single_observation_space = lux.LuxVecEnv(1, 0, max_robots=max(live - 5, 1)).single_observation_space
        self.single_action_space = lux.gym.spaces.MultiDiscrete(np.full(shape[1:], lux.NUM_ACTIONS))
        self.never = np.zeros(num_envs, bool)

    def reset(self, *, seed=None, options=None):
        return self.obs, {}

    def step(self, actions):
        return self.obs, self.rewards, self.never, self.never, {}

    def close(self):
        pass


def crowd_update(live):
    """Seconds of one update (rollout of 4 matches x 8 steps and learning) of the real script on a made-up crowd."""
    import resource

    torch.set_num_threads(1)
    trajsep_ppo.make_envs = lambda args, num_envs, **_: CrowdVecEnv(num_envs, live)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    args = trajsep_ppo.Args(num_envs=4, num_steps=8, num_minibatches=2, total_timesteps=5 * 32)
    marks, gae = [], trajsep_ppo.compute_gae

    def mark(*gae_args):
        marks.append(time.perf_counter())
        return gae(*gae_args)

    trajsep_ppo.compute_gae = mark
    with tempfile.TemporaryDirectory() as folder:
        trajsep_ppo.train(args, folder, torch.device("cpu"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": float(np.median(np.diff(marks))), "memory_mb": (peak - before) / 1024}


def crowd_match(live, steps=40):
    """Seconds per step of a match with so many live entities per player, and those of them that are the engine's."""
    from luxai_s2.unit import UnitType

    env = lux.LuxVecEnv(1, num_workers=0, map_size=64, max_robots=live)
    obs, _ = env.reset(seed=1)
    (match,), rng = env.matches.matches, np.random.default_rng(0)
    state = match.engine.state
    halves = np.array_split(np.argwhere(state.board.factory_occupancy_map == -1), 2)  # each player on its own side
    for player, cells in zip(lux.PLAYERS, halves):
        factories = len(state.factories[player])
        for cell in rng.permutation(cells)[: live - factories]:
            match.engine.add_unit(state.teams[player], UnitType.LIGHT, cell).power = 150
    env.matches.encoder.encode_rows([lux.read_engine(state)], env.matches.out)
    watches = Stopwatches("engine")
    watches.watch(match.engine, "step", "engine")
    seconds = []
    for _ in range(steps):
        action = np.where(obs["action_mask"], rng.random(obs["action_mask"].shape), -1).argmax(-1)
        entities = (obs["kind"] > 0).sum() / 2
        start = time.perf_counter()
        obs, _, terminated, _, _ = env.step(action)
        seconds.append(time.perf_counter() - start)
        assert not terminated.any()
    return {
        "seconds": float(np.median(seconds[2:])),
        "engine": watches.read()["engine"] / steps,
        "live": float(entities),
    }


def entities(counts=(10, 30, 100, 300, 1000)):
    network = {live: in_a_process(crowd_update, live)[0] for live in counts}
    matches = {live: in_a_process(crowd_match, live)[0] for live in counts}
    return {"network": network, "wrapper": matches}


def report_entities(result):
    rows = []
    for live, network in result["network"].items():
        match, live = result["wrapper"][live], int(live)
        per_entity = network["seconds"] / (live * 4 * 2 * 8) * 1e6
        own = (match["seconds"] - match["engine"]) / (2 * match["live"]) * 1e6
        rows.append(
            (f"{live:,}", f"{network['seconds']:.2f}", f"{per_entity:.0f}", f"{network['memory_mb']:.0f}")
            + (f"{match['live']:.0f}", f"{match['seconds'] * 1e3:.1f}", f"{own:.0f}")
        )
    header = (
        *("live entities per player", "an update, s", "per entity and step, µs", "memory, MB"),
        *("live in the match", "a step of a match, ms", "wrapper's own part per entity, µs"),
    )
    network = {int(live): x["seconds"] / int(live) for live, x in result["network"].items()}
    own = {int(live): (x["seconds"] - x["engine"]) / x["live"] for live, x in result["wrapper"].items()}
    return (
        f"Cost per entity at 1,000 against 100: **{network[1000] / network[100]:.2f}x** for the network and the "
        f"learner (made-up observations), **{own[1000] / own[100]:.2f}x** for the wrapper (matches of the engine, "
        f"whose own part is taken off).\n\n{table(header, rows)}"
    )


def machine():
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, PyTorch {torch.__version__}"


def main(
    parts: tuple[Literal["training", "wrapper", "torchrun", "entities", "before"], ...] = PARTS,
    against: Optional[str] = None,
):
    """Measure, print and keep.

    Args:
        parts: what to measure.
        against: the commit that the part `before` compares with.
    """
    OUT.mkdir(exist_ok=True)
    if "before" in parts and against is None:
        sys.exit("throughput.py: error: the part `before` needs --against <commit>")
    measure = {"training": training, "wrapper": wrapper, "torchrun": torchrun, "entities": entities}
    measure["before"] = partial(before, against)
    reports = {"training": report_training, "wrapper": report_wrapper, "torchrun": report_torchrun}
    reports |= {"entities": report_entities, "before": report_before}
    for part in parts:
        result = measure[part]()
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        result |= {"machine": machine(), "commit": commit.stdout.strip()}
        (OUT / f"{part}.json").write_text(json.dumps(result, indent=1))
        print(f"\n## {part}\n\n{reports[part](json.loads(json.dumps(result)))}", flush=True)
    sections = []
    for part, report in reports.items():
        if (OUT / f"{part}.json").exists():
            result = json.loads((OUT / f"{part}.json").read_text())
            sections.append(f"## {part}\n\n{report(result)}\n\n{result['machine']}; commit {result['commit']}.")
    (OUT / "report.md").write_text("# Throughput\n\n" + "\n\n".join(sections) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
