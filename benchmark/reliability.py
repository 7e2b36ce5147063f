"""Does it hold: a million steps against the engine's own validator, memory over time, kills, saving, faults.

    python benchmark/reliability.py                              # everything, some hours
    python benchmark/reliability.py --parts soak-engine          # goes on where it was cut off
    python benchmark/reliability.py --parts kill --kills 3 --script global_ppo

Each part prints its result and keeps it in benchmark/reliability/, as JSON and as a line in report.md. The exit
code is 1 if a part missed its goal.

    part            what it measures                                                      goal
    soak-engine     random legal actions on both stages, with the engine's validator      nothing refused or unequal
    soak-training   memory of all processes of a long training                            less than 3% growth
    kill            trainings killed (SIGKILL) at random moments, and resumed             bit-identical parameters
    saving          share of a training that goes into checkpoints                        less than 1%
    faults          the tests in which something breaks, and trainings that are broken    all pass, nothing is left,
                    from outside                                                          each ends within 10 s
"""

import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmark")]

import luxai_s2.env  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from helpers import in_process, judged, masked_random, weak_robots  # noqa: E402
from test_scripts import children_of  # noqa: E402
from test_wrapper import Watch  # noqa: E402
from throughput import Stopwatches, machine, memory_of  # noqa: E402

import lux_wrapper as lux  # noqa: E402
import trajsep_ppo  # noqa: E402

STAGES = {
    "48": {"map_size": 48, "min_factories": 2, "max_factories": 5, "max_robots": 20},
    "64": {"map_size": 64, "min_factories": 4, "max_factories": 10, "max_robots": 40},
}
FAULTS = {  # fault -> the test in which it happens
    "a worker is killed": "test_scripts.py::test_a_worker_dies_in_training",
    "a worker is killed within a step": "test_wrapper.py::test_a_killed_worker_is_an_error_not_a_hang",
    "an exception in the engine": "test_wrapper.py::test_an_engine_exception_names_match_and_seed",
    "a worker hangs": "test_resume.py::test_a_worker_that_hangs",
    "the disk is full": "test_resume.py::test_nothing_can_be_saved[fill_the_disk]",
    "the run's folder vanishes": "test_resume.py::test_nothing_can_be_saved[remove_the_folder]",
    "NaN in the loss": "test_resume.py::test_numbers_that_are_not_finite",
    "NaN in a gradient": "test_resume.py::test_a_gradient_that_is_not_finite",
    "SIGTERM while saving": "test_resume.py::test_sigterm_while_saving",
    "the program is killed": "test_wrapper.py::test_no_orphans_when_the_program_is_killed",
}
# fault -> what brings it about in a training, (program, its workers, its folder)
ATTACKS = {
    "a worker is killed": lambda program, workers, run_dir: os.kill(workers[0], signal.SIGKILL),
    "a worker hangs": lambda program, workers, run_dir: os.kill(workers[0], signal.SIGSTOP),
    "the disk is full": lambda program, workers, run_dir: resource.prlimit(
        program, resource.RLIMIT_FSIZE, (9999, 9999)
    ),
    "the run's folder vanishes": lambda program, workers, run_dir: shutil.rmtree(run_dir),
}


class Referee(Watch):
    """Watches one match: the wrapper's counters against the engine's, and every order that the engine refuses."""

    now = None  # the referee of the match being stepped

    def __init__(self, env, match, count):
        super().__init__(env, match)
        self.count = count
        self.engine.log_error = lambda *message: self.count.update(malformed=1)

    def watch_step(self, orders, rewards):
        Referee.now, state = self, self.engine.state
        self.weak = weak_robots(state)
        self.count["orders"] += sum(map(len, orders))
        metrics = super().watch_step(orders, rewards)
        if metrics is not None:
            self.count["matches"] += 1
            over = metrics["l"] >= lux.GAME_LENGTH or not all(state.factories[player] for player in lux.PLAYERS)
            self.count["ended by the engine"] += not over  # as it does with a player whose orders are malformed
            for team, player in enumerate(lux.PLAYERS):
                stats = state.stats[player]
                made, destroyed = stats["generation"], stats["destroyed"]
                theirs = (stats["transfer"]["ice"], stats["transfer"]["ore"], made["water"], made["metal"])
                theirs += (*made["built"].values(), destroyed["LIGHT"] + destroyed["HEAVY"])
                names = ("ice_transferred", "ore", "water", "metal", "lights_built", "heavies_built", "robots_lost")
                self.count["unequal counters"] += sum(int(metrics[key][team]) != x for key, x in zip(names, theirs))
        return metrics

    @staticmethod
    def validate(env_cfg, state, actions_by_type, verbose=1, original=luxai_s2.env.validate_actions):
        accepted, me = original(env_cfg, state, actions_by_type, verbose), Referee.now
        for entity, _, passed in judged(accepted, actions_by_type):
            if not passed:
                me.count["stranded" if entity.unit_id in me.weak else "rejected"] += 1
        return accepted


def soak_engine(options, keep):
    """Play random legal actions on both stages; goes on from what was kept, with other matches."""
    result = keep.read()
    if result.get("wanted") != options.steps or result.get("seed") != options.seed or result.get("passed") is not None:
        result = {"wanted": options.steps, "seed": options.seed, "stages": {}}
    luxai_s2.env.validate_actions = Referee.validate
    for number, (stage, settings) in enumerate(STAGES.items()):
        part = result["stages"].setdefault(stage, {"steps": 0, "count": {}, "memory": []})
        count, done = Counter(part["count"]), part["steps"]
        part["memory"].append([])  # of this process
        env, matches = in_process(4, engine_options={"validate_action_space": True}, **settings)
        _ = [Referee(env, match, count) for match in matches]
        rng, weights = np.random.default_rng([options.seed, number, done]), np.ones(lux.NUM_ACTIONS)
        weights[[lux.DIG, lux.DELIVER]] = 5
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        wanted = options.steps // len(STAGES)
        interval = min(50_000, max(wanted // 10, 1))
        while done < wanted:
            try:
                obs, *_ = env.step(masked_random(rng, obs["action_mask"], weights))
            except lux.LuxError as error:  # with what the referee says of unequal counters during a match
                count["crashes"] += 1
                print(f"stage {stage} after {done:,} steps: {error}", flush=True)
                for match in matches:
                    match.engine.state.stats = {}  # those of a match cut short are not compared
                obs, _ = env.reset(seed=int(rng.integers(2**31)))
            done += env.num_envs
            if done // interval > (done - env.num_envs) // interval or done >= wanted:
                part |= {"steps": done, "count": dict(count)}
                gc.collect()
                part["memory"][-1].append([done, round(memory_of(os.getpid()), 1), sys.getallocatedblocks()])
                keep.write(result)
                print(
                    f"{time.strftime('%H:%M:%S')} stage {stage}: {done:,} of {wanted:,} steps, {part['count']}",
                    flush=True,
                )
        env.close()
    bad = ("crashes", "rejected", "malformed", "ended by the engine", "unequal counters")
    samples = [memory for part in result["stages"].values() for memory in part["memory"] if len(memory) > 1]
    grown = [max((memory[-1][of] / memory[0][of] - 1 for memory in samples), default=0.0) for of in (1, 2)]
    result["growth"], result["growth of Python's objects"] = grown
    total = sum((Counter(part["count"]) for part in result["stages"].values()), Counter())
    steps = sum(part["steps"] for part in result["stages"].values())
    result["passed"] = not any(total[name] for name in bad) and result["growth"] < 0.03
    found = ", ".join(f"{name} {total[name]:,}" for name in ("orders", "matches", "stranded", *bad))
    memory = f"memory {grown[0]:+.1%} and Python's own blocks of it {grown[1]:+.1%} after the first tenth"
    return result, f"{steps:,} steps: {found}; {memory}"


def command(options, *flags):
    return [sys.executable, str(ROOT / f"{options.script}.py"), "--eval-episodes", "1", *map(str, flags)]


def last_step(steps, num_envs):
    """The step at which a training ends: that of its last whole rollout."""
    rollout = num_envs * trajsep_ppo.Args.num_steps
    return steps // rollout * rollout


def checkpoints(folder):
    return [path for run in Path(folder).glob("runs/*") for path in trajsep_ppo.checkpoints(run)]


def wait_for_checkpoint(folder, child, step):
    while child.poll() is None and not any(int(path.stem.split("_")[1]) >= step for path in checkpoints(folder)):
        time.sleep(0.02)
    return time.time()


def quiet(folder):
    return {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": open(Path(folder, "log"), "a")}


def soak_training(options, keep):
    """Memory of a training and its workers, from its first update to its last checkpoint."""
    samples, start, result = [], time.time(), {"wanted": options.steps, "script": options.script}
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(command(options, "--total-timesteps", options.steps), **quiet(folder))
        last = last_step(options.steps, trajsep_ppo.Args.num_envs)
        while child.poll() is None and not any(path.stem.endswith(f"_{last}") for path in checkpoints(folder)):
            samples.append([round(time.time() - start, 1), round(memory_of(child.pid), 1)])
            keep.write(result | {"samples": samples})
            time.sleep(min(2, 0.2 + len(samples) / 100))
        code = child.wait()
    tenth = max(len(samples) // 10, 1)
    before, after = (
        np.median([memory for _, memory in part]) for part in (samples[tenth : 2 * tenth], samples[-tenth:])
    )
    result |= {"samples": samples, "code": code, "growth": after / before - 1, "peak": max(x for _, x in samples)}
    result["passed"] = code == 0 and result["growth"] < 0.03
    line = f"{last:,} steps: {before:.0f} MB after the first tenth, {after:.0f} MB in the last, {result['growth']:+.1%}"
    return result, f"{line}; peak {result['peak']:.0f} MB, exit code {code}"


def kill(options, keep):
    """Kill trainings at random moments after their first checkpoint, resume them, compare how they end."""
    flags = ("--total-timesteps", options.steps, "--num-envs", 8, "--save-every", 4, "--num-workers", 2)
    rng, result = np.random.default_rng(options.seed), {"script": options.script, "seed": options.seed, "kills": []}

    def train(folder, *flags):
        return subprocess.Popen(command(options, *flags), **quiet(folder))

    def parameters(folder):
        return torch.load(checkpoints(folder)[-1], weights_only=True)["model"]

    with tempfile.TemporaryDirectory() as folder:
        child = train(folder, *flags)
        start = wait_for_checkpoint(folder, child, 1)
        seconds = wait_for_checkpoint(folder, child, last_step(options.steps, 8)) - start
        if child.wait():
            sys.exit(f"reliability.py: error: the training failed: {Path(folder, 'log').read_text()[-300:]}")
        expected = parameters(folder)
    while len(result["kills"]) < options.kills:
        with tempfile.TemporaryDirectory() as folder:
            child = train(folder, *flags)
            wait_for_checkpoint(folder, child, 1)
            time.sleep(rng.uniform(0, seconds))
            if child.poll() is not None:  # it was faster this time
                continue
            child.kill()
            child.wait()
            path = checkpoints(folder)[-1]
            code = train(folder, "--resume", path.parent).wait()
            got = parameters(folder)
            same = code == 0 and all(torch.equal(expected[key], got[key]) for key in expected)
        result["kills"].append({"from": int(path.stem.split("_")[1]), "code": code, "identical": same})
        print(f"kill {len(result['kills'])}: {result['kills'][-1]}", flush=True)
        keep.write(result)
    good = sum(x["identical"] for x in result["kills"])
    result["passed"] = good == options.kills
    return result, f"{options.script}: {good} of {options.kills} ended with bit-identical parameters"


def saving(options, keep):
    """Seconds inside of what makes and writes checkpoints, against the whole training."""
    watches = Stopwatches("state", "write")
    watches.watch(lux.LuxVecEnv, "state", "state")
    watches.watch(torch, "save", "write")
    watches.watch(trajsep_ppo, "write_atomically", "write")
    args = trajsep_ppo.Args(total_timesteps=options.steps)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trajsep_ppo.train(args, folder, torch.device("cpu"))
        seconds = time.perf_counter() - start
    updates = args.total_timesteps // (args.num_envs * args.num_steps)
    saves = -(-updates // args.save_every)
    one = sum(watches.read().values()) / saves
    share = one / (seconds / updates * args.save_every)
    result = {"seconds": seconds, "updates": updates, "saves": saves, "inside": watches.read(), "share": share}
    result["passed"] = share < 0.01
    return result, f"{share:.2%} at one checkpoint in {args.save_every} updates; {one * 1e3:.0f} ms each, {saves} made"


def attacked(options, attack):
    """Break a training that saves after every update: seconds until it has ended, what it said, how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(command(options, "--num-workers", 2, "--save-every", 1), **quiet(folder))
        wait_for_checkpoint(folder, child, 1)
        run_dir = checkpoints(folder)[-1].parent
        workers = children_of(child.pid)
        before = time.time()
        attack(child.pid, workers, run_dir)
        code = child.wait()
        seconds = time.time() - before
        said = re.findall("error: .*", Path(folder, "log").read_text())
        orphans = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        if run_dir.exists():
            trajsep_ppo.load_checkpoint(run_dir)  # ends this program if none is whole
    passed = code == 1 and len(said) == 1 and len(workers) == 2 and not orphans and seconds < 10
    return {"seconds": round(seconds, 1), "code": code, "said": said, "orphans": len(orphans), "passed": passed}


def faults(options, keep):
    """Run the tests of each fault, and break trainings; /dev/shm must hold afterwards what it held before."""
    shared, outcomes = Path("/dev/shm"), {}
    before = set(shared.glob("*"))
    for fault, tests in FAULTS.items():
        run = [sys.executable, "-m", "pytest", "-q", f"tests/{tests}"]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        said = (done.stdout.strip().splitlines() or ["nothing"])[-1]
        outcomes[fault] = {"tests": tests, "passed": done.returncode == 0, "said": re.sub(r" in .*s.*", "", said)}
        print(f"{fault}: {outcomes[fault]['said']} ({tests})", flush=True)
        keep.write({"faults": outcomes})
    broken = {fault: attacked(options, attack) for fault, attack in ATTACKS.items()}
    left = sorted(map(str, set(shared.glob("*")) - before))
    good = sum(outcome["passed"] for outcome in outcomes.values())
    result = {"faults": outcomes, "trainings": broken, "left": left}
    result["passed"] = good == len(FAULTS) and all(x["passed"] for x in broken.values()) and not left
    rows = "".join(f"\n  - {fault}: {x['said']} (`{x['tests']}`)" for fault, x in outcomes.items())
    rows += "".join(f"\n  - {fault}, {x['seconds']} s later: {' '.join(x['said'])}" for fault, x in broken.items())
    ended = f"{sum(x['passed'] for x in broken.values())} of {len(ATTACKS)} trainings end so within 10 s"
    return (
        result,
        f"{good} of {len(FAULTS)} faults end as they should, {ended}, {len(left)} files left in /dev/shm{rows}",
    )


class Keep:
    """The file of a part's result, written anew at every step on the way."""

    def __init__(self, path):
        self.path = path

    def read(self):
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, result):
        text = json.dumps(result, indent=1, default=np.generic.item)
        trajsep_ppo.write_atomically(self.path, text.encode())


PARTS = {"soak-engine": (soak_engine, 1_000_000), "soak-training": (soak_training, 200_000), "kill": (kill, 4096)}
PARTS |= {"saving": (saving, 102_400), "faults": (faults, 0)}


def main(
    parts: tuple[Literal["soak-engine", "soak-training", "kill", "saving", "faults"], ...] = tuple(PARTS),
    steps: Optional[int] = None,
    kills: int = 20,
    seed: int = 1,
    script: Literal["trajsep_ppo", "global_ppo"] = "trajsep_ppo",
    out: Path = ROOT / "benchmark" / "reliability",
):
    """Measure, print and keep in the folder `out`.

    Args:
        steps: environment steps of a part, instead of its own number.
        kills: trainings that are killed.
        seed: of random actions and of the moments of kills.
        script: which one is trained in soak-training and kill.
    """
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in parts:
        measure, number = PARTS[part]
        name = part if script == "trajsep_ppo" else f"{part}-{script}"
        keep = Keep(out / f"{name}.json")
        result, line = measure(SimpleNamespace(steps=steps or number, kills=kills, seed=seed, script=script), keep)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        keep.write(result | {"line": line, "machine": machine(), "commit": commit.stdout.strip()})
        print(f"{name}: {'passed' if result['passed'] else 'FAILED'}: {line}", flush=True)
        failed += [] if result["passed"] else [name]
    lines = []
    for path in sorted(out.glob("*.json")):
        result = Keep(path).read()
        if "line" in result:  # finished
            verdict = "passed" if result["passed"] else "**failed**"
            lines.append(
                f"- {path.stem}: {verdict}. {result['line']}\n  ({result['machine']}; commit {result['commit']})"
            )
    (out / "report.md").write_text("# Reliability\n\n" + "\n".join(lines) + "\n")
    if failed:
        sys.exit(f"reliability.py: error: missed the goal: {', '.join(failed)}")


if __name__ == "__main__":
    tyro.cli(main)
