"""Does it hold: a million steps against the engine's own validator, memory over time, kills.

    python benchmark/reliability.py                              # everything, some hours
    python benchmark/reliability.py --parts kill --kills 3 --script global_ppo

Each part prints its result and keeps it in runs/reliability, or in --out, as JSON and as a line in
report.md. The exit code is 1 if a part missed its goal. What breaks a training is in the tests.

    part            what it measures                                      goal
    soak-engine     random legal actions on both stages                   the engine refuses nothing
    soak-training   memory of all processes of a long training            less than 3% growth
    kill            trainings killed at random moments, and resumed       bit-identical parameters
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

import luxai_s2.env
import numpy as np
import torch
from plot import ROOT, Refused, named_or, start
from throughput import commit, machine, memory_of

import lux_wrapper as lux
import trajsep_ppo

sys.path.append(str(ROOT / "tests"))

from helpers import masked_random, watched_validator, weak_robots  # noqa: E402

STAGES = {
    "48": {"map_size": 48, "min_factories": 2, "max_factories": 5, "max_robots": 20},
    "64": {"map_size": 64, "min_factories": 4, "max_factories": 10, "max_robots": 40},
}
BAD = ("rejected", "malformed", "ended by the engine", "unequal counters")


class Referee:
    """Watches a match: orders that the engine refuses, and the engine's counters at the end."""

    now = None  # the referee of the match being stepped

    def __init__(self, engine, count):
        self.engine, self.count, self.play = engine, count, engine.step
        engine.env_cfg.validate_action_space = engine.collect_stats = True
        engine.log_error = lambda *message: count.update(malformed=1)
        engine.step = self.step

    def step(self, orders):
        Referee.now, state = self, self.engine.state
        self.weak = weak_robots(state)  # they cannot stop what they can no longer pay for
        if state.real_env_steps >= 0:  # not while factories are placed
            self.count["orders"] += sum(map(len, orders.values()))
            self.state = state
        return self.play(orders)

    def see(self, entity, order, accepted):
        if not accepted:
            self.count["stranded" if entity.unit_id in self.weak else "rejected"] += 1

    def compare(self, metrics):
        """At the end of a match: its metrics ("l", and arrays [P]) and the engine's counters."""
        over = metrics["l"] >= lux.GAME_LENGTH or not all(self.state.factories.values())
        self.count.update({"matches": 1, "ended by the engine": int(not over)})
        for team, player in enumerate(lux.PLAYERS):
            stats = self.state.stats[player]
            made, destroyed = stats["generation"], stats["destroyed"]
            engines = {
                "ice_transferred": stats["transfer"]["ice"],
                "ore": stats["transfer"]["ore"],
                "water": made["water"],
                "metal": made["metal"],
                "lights_built": made["built"]["LIGHT"],
                "heavies_built": made["built"]["HEAVY"],
                "robots_lost": destroyed["LIGHT"] + destroyed["HEAVY"],
            }
            for name, number in engines.items():
                self.count["unequal counters"] += int(metrics[name][team]) != number


def soak_stage(settings, steps, seed):
    """Play random legal actions: what is counted, and (step, memory in MB, Python's blocks)."""
    count, memory = Counter(), []
    env = lux.LuxVecEnv(4, num_workers=0, **settings)
    env.reset(seed=seed)  # makes the engines
    referees = [Referee(match.engine, count) for match in env.matches]
    obs, _ = env.reset(seed=seed)
    rng, weights = np.random.default_rng(seed), np.ones(lux.NUM_ACTIONS)
    weights[[lux.DIG, lux.DELIVER]] = 5
    for step in range(0, steps, env.num_envs):
        obs, _, _, _, infos = env.step(masked_random(rng, obs["action_mask"], weights))
        for match in np.flatnonzero(infos.get("_episode", ())):
            referees[match].compare({key: x[match] for key, x in infos["episode"].items()})
        if step % max(steps // 10, 1) < env.num_envs:
            gc.collect()
            memory.append((step, round(memory_of(os.getpid()), 1), sys.getallocatedblocks()))
            print(f"{step:,} of {steps:,} steps, {dict(count)}", flush=True)
    return {"steps": steps, "count": dict(count), "memory": memory}


def soak_engine(options, keep):
    """Play random legal actions on both stages."""
    luxai_s2.env.validate_actions = watched_validator(lambda *order: Referee.now.see(*order))
    steps = options.steps // len(STAGES)
    stages = {name: soak_stage(stage, steps, options.seed) for name, stage in STAGES.items()}
    # After the first tenth; the very first sample is taken before anything was played.
    growth = max(stage["memory"][-1][1] / stage["memory"][1][1] - 1 for stage in stages.values())
    total = sum((Counter(stage["count"]) for stage in stages.values()), Counter())
    passed = not any(total[name] for name in BAD) and (options.short or growth < 0.03)
    names = ("orders", "matches", "stranded", *BAD)
    found = ", ".join(f"{name} {total[name]:,}" for name in names)
    result = {"stages": stages, "growth": growth, "passed": passed}
    return result, f"{options.steps:,} steps: {found}; memory {growth:+.1%} after the first tenth{options.note}"


def command(options, *flags):
    script = ROOT / f"{options.script}.py"
    return [sys.executable, script, "--eval-episodes", "0", *map(str, flags)]


def checkpoints(folder):
    return [path for run in Path(folder).glob("runs/*") for path in trajsep_ppo.checkpoints(run)]


def step_of(path):
    return int(path.stem.split("_")[1])


def wait_for_checkpoint(folder, child, step):
    """Wait until a training has saved at this step or later, or has ended; the time then."""
    while child.poll() is None and not any(step_of(path) >= step for path in checkpoints(folder)):
        time.sleep(0.02)
    return time.time()


def quiet(folder):
    return {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": open(Path(folder, "log"), "a")}


def soak_training(options, keep):
    """Memory of a training and its workers, from its first update to its last checkpoint."""
    samples, start = [], time.time()
    with tempfile.TemporaryDirectory() as folder:
        steps = ("--total-timesteps", options.steps)
        child = subprocess.Popen(command(options, *steps), **quiet(folder))
        while child.poll() is None and options.steps not in map(step_of, checkpoints(folder)):
            samples.append((round(time.time() - start, 1), round(memory_of(child.pid), 1)))
            time.sleep(min(2, 0.2 + len(samples) / 100))
        code = child.wait()
    sizes = [size for _, size in samples]
    tenth = max(len(sizes) // 10, 1)
    before, after = np.median(sizes[tenth : 2 * tenth]), np.median(sizes[-tenth:])
    growth = after / before - 1
    result = {"samples": samples, "growth": growth, "passed": code == 0 and (options.short or growth < 0.03)}
    line = f"{options.steps:,} steps: {before:.0f} MB after the first tenth, {after:.0f} MB in the last"
    return result, f"{line}, {growth:+.1%}{options.note}; peak {max(sizes):.0f} MB, exit code {code}"


def kill(options, keep):
    """Kill trainings at random moments after their first checkpoint, resume them, compare."""
    flags = ("--total-timesteps", options.steps, "--num-envs", 8, "--save-every", 4)
    rng, kills = np.random.default_rng(options.seed), []

    def train(folder, *flags):
        return subprocess.Popen(command(options, *flags), **quiet(folder))

    def parameters(folder):
        return torch.load(checkpoints(folder)[-1], weights_only=True)["model"]

    with tempfile.TemporaryDirectory() as folder:
        child = train(folder, *flags)
        start = wait_for_checkpoint(folder, child, 1)
        seconds = wait_for_checkpoint(folder, child, options.steps) - start
        if code := child.wait():
            said = Path(folder, "log").read_text()[-300:]
            sys.exit(f"reliability.py: error: the training ended with {code}: {said}")
        expected = parameters(folder)
    while len(kills) < options.kills:
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
        kills.append({"from": step_of(path), "code": code, "identical": same})
        print(f"kill {len(kills)}: {kills[-1]}", flush=True)
        keep({"kills": kills})
    good = sum(one["identical"] for one in kills)
    line = f"{options.script}: {good} of {options.kills} ended with bit-identical parameters"
    return {"kills": kills, "passed": good == options.kills}, line


PARTS = {  # part -> its function, its environment steps, and the fewest that it can have
    "soak-engine": (soak_engine, 1_000_000, 80),
    "soak-training": (soak_training, 204_800, 512),
    "kill": (kill, 4096, 2048),  # two checkpoints
}
SCRIPTS = ("trajsep_ppo", "global_ppo")


def file_of(part, script):
    """Name of the file of a part, without its suffix."""
    return part if script == "trajsep_ppo" else f"{part}-{script}"


def main(
    parts: tuple[Literal["soak-engine", "soak-training", "kill"], ...] = tuple(PARTS),
    steps: Optional[int] = None,
    kills: int = 20,
    seed: int = 1,
    script: Literal["trajsep_ppo", "global_ppo"] = "trajsep_ppo",
    out: Optional[Path] = None,
):
    """Measure, print and keep in a folder.

    Args:
        steps: environment steps of a part, whole rollouts, instead of its own number; with fewer than
            that the growth of memory is measured while programs still start, and is no goal.
        kills: trainings that are killed.
        seed: of random actions and of the moments of kills.
        script: which one is trained in soak-training and kill.
        out: the folder, instead of runs/reliability.
    """
    for part in parts if steps is not None else ():
        _, _, least = PARTS[part]
        if steps < least:
            raise Refused(f"--steps must be at least {least} for {part}")
    if kills < 1:
        raise Refused("--kills must be at least 1")
    files = {part: f"{file_of(part, script)}.json" for part in parts}
    out = named_or("runs/reliability", out, files.values())
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in parts:
        measure, number, _ = PARTS[part]
        path = out / files[part]
        print(f"measuring {path.stem}", flush=True)

        def keep(result):
            path.write_text(json.dumps(result, indent=1, default=np.generic.item))

        options = SimpleNamespace(steps=steps or number, kills=kills, seed=seed, script=script)
        options.short = options.steps < number
        options.note = " (no goal in a short run)" if options.short else ""
        result, line = measure(options, keep)
        keep(result | {"line": line, "machine": machine(), "commit": commit()})
        print(f"{path.stem}: {'passed' if result['passed'] else 'FAILED'}: {line}", flush=True)
        failed += [] if result["passed"] else [path.stem]
    lines = ["# Reliability\n"]
    for name in sorted({file_of(part, script) for part in PARTS for script in SCRIPTS}):
        path = out / f"{name}.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        if "line" in result:  # finished
            verdict = "passed" if result["passed"] else "**failed**"
            lines.append(f"- {name}: {verdict}. {result['line']}")
            lines.append(f"  ({result['machine']}; commit {result['commit']})")
    (out / "report.md").write_text("\n".join(lines) + "\n")
    print(f"written to {out}: {', '.join([*files.values(), 'report.md'])}")
    if failed:
        sys.exit(f"reliability.py: error: missed the goal: {', '.join(failed)}")


if __name__ == "__main__":
    start(main)
