"""Train every arm of the ablation on several seeds and evaluate the checkpoints of every training.

    python benchmark/ablation.py
    python benchmark/ablation.py --arms default global --seeds 1 2
    python benchmark/ablation.py --arm "no-norm=trajsep_ppo.py --no-norm-adv" --seeds 1 2 --out runs/no-norm
    python benchmark/plot.py --results runs/study runs/no-norm

An arm is a command, and patches from benchmark/arms/ for a copy of the programs (see PATCHES).
A person's own has a name and a command, whose program lies beside trajsep_ppo.py.

The two main arms, `default` and `global`, come first, then the others, each seed by seed, so the
tables are useful whenever it is stopped. The same command continues it: finished trainings and
evaluations are kept, also where only the two tables are left of them; a training that was cut off
starts again.

Trainings run side by side, each with one thread, and are evaluated after they have ended. Every
evaluation plays the same held-out maps once each, with actions sampled from the policy; the last
checkpoints also play with their most likely actions.

    written to --out
    ablation.csv    a row for every player of every evaluated match; lengths are in steps
    runs.csv        a row for every training: how it was made, its seconds, steps and parameters,
                    and the means of LOSSES over all of its updates
    <arm>__<seed>/  a training's log, its run, its last checkpoint and its evaluations
"""

import contextlib
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import tyro
from plot import ROOT, Refused, read_csv, start, write, write_csv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trajsep_ppo import checkpoints

PATCH_FOLDER = ROOT / "benchmark" / "arms"

# The authors' arms pay each member its own reward (weight 1) and differ in one thing from
# `separate`. The others differ in one thing from `default`, or from `global`, to see whether the
# default flags are unfair to it. In order of work: what tells most comes first.
SEPARATE = "trajsep_ppo.py --agent-reward-weight 1"
# The authors' flags, and their teams: many robots, and masks that hold only the game's rules
AUTHORS = (
    "--num-steps 256 --update-epochs 10 --learning-rate 2e-4 --no-anneal-lr --ent-coef 0.001 --no-anneal-ent "
    "--vf-coef 0.5 --max-grad-norm 0.5"
)
CROWD = "--env-kwargs max_robots 20"
ARMS = {
    "default": "trajsep_ppo.py --agent-reward-weight 0.8",
    "global": "global_ppo.py",
    # Components
    "separate": SEPARATE,
    "global-reward": "trajsep_ppo.py --agent-reward-weight 0",
    "global-critic": SEPARATE,
    "global-critic-reward": "trajsep_ppo.py --agent-reward-weight 0",  # their "global advantage"
    "shared-ratio": SEPARATE,
    "shared-entropy": SEPARATE,
    "shared-dones": SEPARATE,
    # Trajectories
    "robots": SEPARATE,
    "factories": SEPARATE,
    "kinds": SEPARATE,
    "cluster": "trajsep_ppo.py --group-by cluster",
    # The own share of the reward
    "share-75": "trajsep_ppo.py --agent-reward-weight 0.75",
    "share-50": "trajsep_ppo.py --agent-reward-weight 0.5",
    # Groups of robots, by number and by rule
    "mod-2": SEPARATE,
    "mod-4": SEPARATE,
    "quadrants": SEPARATE,
    "nearest-factory": SEPARATE,
    "nearest-heavy": SEPARATE,
    # Fewer samples of robots
    "top-1": SEPARATE,
    "top-2": f"{SEPARATE} --top-samples 2",
    "top-1-abs": SEPARATE,
    "top-1-return": SEPARATE,
    "random-1": SEPARATE,
    "top-1-raw": f"{SEPARATE} --no-norm-adv",  # advantages as they are, not normalized
    "top-1-robots": SEPARATE,  # normalized over the robots that are learned from, without factories
    # From the authors' regime to the default flags: all of it, with safe masks, with six robots too,
    # and then one more change each. The last rungs are `separate` and `global`.
    "authors": f"{SEPARATE} {AUTHORS} {CROWD} safe_masks False",
    "global-authors": f"global_ppo.py {AUTHORS} {CROWD} safe_masks False",
    "authors-masks": f"{SEPARATE} {AUTHORS} {CROWD}",
    "global-authors-masks": f"global_ppo.py {AUTHORS} {CROWD}",
    "authors-six": f"{SEPARATE} {AUTHORS}",
    "global-authors-six": f"global_ppo.py {AUTHORS}",
    "six-fresh": f"{SEPARATE} {AUTHORS} --num-steps 32 --update-epochs 2",
    "global-six-fresh": f"global_ppo.py {AUTHORS} --num-steps 32 --update-epochs 2",
    "six-annealed": f"{SEPARATE} {AUTHORS} --anneal-lr --ent-coef 0.003 --anneal-ent",
    "global-six-annealed": f"global_ppo.py {AUTHORS} --anneal-lr --ent-coef 0.003 --anneal-ent",
    "six-fast": f"{SEPARATE} {AUTHORS} --learning-rate 1e-3",
    "global-six-fast": f"global_ppo.py {AUTHORS} --learning-rate 1e-3",
    "six-small-value-loss": f"{SEPARATE} {AUTHORS} --vf-coef 0.1 --max-grad-norm 2",
    "global-six-small-value-loss": f"global_ppo.py {AUTHORS} --vf-coef 0.1 --max-grad-norm 2",
    # What else the authors claim, in their regime
    "authors-reward": f"trajsep_ppo.py --agent-reward-weight 0 {AUTHORS} {CROWD} safe_masks False",
    "authors-critic-reward": f"trajsep_ppo.py --agent-reward-weight 0 {AUTHORS} {CROWD} safe_masks False",
    "authors-top-1": f"{SEPARATE} {AUTHORS} {CROWD} safe_masks False",
    # Of the authors' regime too: matches of 256 steps in training, and a value loss that is clipped
    "authors-cut": f"{SEPARATE} {AUTHORS} {CROWD} safe_masks False",
    "global-authors-cut": f"global_ppo.py {AUTHORS} {CROWD} safe_masks False",
    "authors-clipped-values": f"{SEPARATE} {AUTHORS} {CROWD} safe_masks False",
    "global-authors-clipped-values": f"global_ppo.py {AUTHORS} {CROWD} safe_masks False",
    # The rest
    "lichen": "trajsep_ppo.py --env-kwargs reward lichen",
    "no-safe-masks": "trajsep_ppo.py --env-kwargs safe_masks False",
    "may-wait": "trajsep_ppo.py",
    "global-may-wait": "global_ppo.py",
    "random-placement": "trajsep_ppo.py",
    "large-heads": "trajsep_ppo.py",
}
# An arm has the patch of its name; patches of several arms, one after the other:
PATCHES = {path.stem: (path.stem,) for path in PATCH_FOLDER.glob("*.patch")} | {
    "global-critic-reward": ("global-critic",),
    "global-may-wait": ("may-wait",),
    "top-2": ("top-1",),  # it adds the flag --top-samples
    "top-1-abs": ("top-1", "top-1-abs"),
    "top-1-return": ("top-1", "top-1-return"),
    "top-1-raw": ("top-1",),
    "top-1-robots": ("top-1", "top-1-robots"),
    "authors-critic-reward": ("global-critic",),
    "authors-top-1": ("top-1",),
    "global-authors-cut": ("authors-cut",),
    "global-authors-clipped-values": ("authors-clipped-values",),
    "random-1": ("top-1", "random-1"),
}
MAIN = ("default", "global")
CLAIMED = (  # arms of which something is claimed
    *MAIN,
    *("separate", "global-reward", "global-critic", "global-critic-reward", "shared-ratio", "top-1"),
    *("authors", "global-authors", "may-wait", "global-may-wait"),
)
# Flags were chosen with seeds 1 to 10, rules with seeds 11 to 20 too, all on maps below 7000.
FIRST_SEED, FIRST_MAP = 11, 7000
SEEDS = {arm: 10 if arm in MAIN else 5 if arm in CLAIMED else 3 for arm in ARMS}
# Environment steps after which the main arms, those of the authors' regime and the rungs below it, and
# the others are evaluated, at the next checkpoint; and always the last. An evaluation takes half a
# minute, once matches are long.
FINE = (
    *(2048, 4096, 6144, 8192, 10240, 12288, 16384, 20480, 24576),
    *(32768, 40960, 49152, 65536, 81920),
)
LATE = (8192, 16384, 32768, 49152)
COARSE = (4096, 8192, 12288, 16384, 32768, 49152)
SAVE_EVERY = 2048  # environment steps between two checkpoints, or an update if that has more

MATCH = ("match_seed", "player", "starting_factories", "episode_length")
TEAM = (
    *("ice_transferred", "factories_alive", "episodic_return"),
    *("ice_per_factory", "factories_alive_share"),
    *("water", "ore", "metal", "lichen", "lights_built", "heavies_built", "robots_lost"),
    *("own_collisions", "right_of_way", "blocked_builds"),
)
METRIC = {"starting_factories": "factories_placed", "episodic_return": "r"}  # the wrapper's names
COLUMNS = ("arm", "seed", "global_step", "train_seconds", "policy", *MATCH, *TEAM)
LOSSES = ("clipfrac", "approx_kl", "explained_variance")
MEASURED = ("steps", "train_seconds", "parameters", *LOSSES, "commit")
RUN_COLUMNS = ("arm", "seed", *MEASURED, "maps", "patches", "command")


class Failed(Exception):
    """A training or an evaluation ended with an error."""


def queue(arms, seeds=None):
    """All (arm, seed): the main arms first, seed by seed, then the others, seed by seed."""

    def seeds_of(arm):
        return seeds or range(FIRST_SEED, FIRST_SEED + SEEDS.get(arm, 3))

    jobs, order = [(arm, seed) for arm in arms for seed in seeds_of(arm)], [*ARMS, *arms]
    return sorted(jobs, key=lambda job: (job[0] not in MAIN, job[1], order.index(job[0])))


def schedule_of(arm):
    """Environment steps after which an arm is evaluated, but for the last."""
    if arm in MAIN:
        return FINE
    return LATE if AUTHORS in ARMS.get(arm, "") else COARSE


def commands_of(arms, own):
    """Arm -> command, of arms of the study and of a person's own, each "name=command".

    Raises:
        Refused: if an arm is not known, or an own one cannot be.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise Refused(f"no arm {unknown[0]}; there are {', '.join(ARMS)}, and your own: --arm NAME=COMMAND")
    commands = {arm: ARMS[arm] for arm in arms}
    for text in own:
        name, _, command = text.partition("=")
        script = command.split(" ")[0]
        if not re.fullmatch(r"[\w.-]+", name) or not command:
            example = '--arm "no-norm=trajsep_ppo.py --no-norm-adv"'
            raise Refused(f"--arm {text}: a name and a command are needed, as in {example}")
        if name in ARMS or name in commands:
            raise Refused(f"there is an arm {name} already; give yours another name")
        if not script.endswith(".py") or not (ROOT / script).is_file():
            raise Refused(f"--arm {name}: there is no program {script} beside trajsep_ppo.py")
        commands[name] = command
    return commands


def programs(patches, folder):
    """Folder of the programs: this project's, or with patches a copy in `folder`.

    Raises:
        Failed: if a patch does not fit the programs.
    """
    if not patches:
        return ROOT
    folder.mkdir(parents=True, exist_ok=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # of any repository
    for name in patches:
        command = ["git", "apply", PATCH_FOLDER / f"{name}.patch"]
        done = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{name}.patch does not fit the programs: {done.stderr.strip()}")
    return folder


# -- Evaluation, in a process of its own ---------------------------------------------------


def evaluate(script, wanted, num_matches, first_map):
    """Evaluate checkpoints in the current folder, each `wanted` (step, policy), into a file each.

    Args:
        script: the program that made the checkpoints, without its ".py".
    """
    torch.set_num_threads(1)
    script, envs = importlib.import_module(script), None
    for step, policy in wanted:
        checkpoint = torch.load(f"checkpoint_{step}.pt", map_location="cpu", weights_only=True)
        if envs is None:
            args = script.Args(**checkpoint["args"])
            envs = script.make_envs(args, num_matches, num_workers=0, held_out=True)
            num_actions = int(envs.single_action_space.nvec.max())
            agent = script.HybridNet(envs.single_observation_space, num_actions)
        agent.load_state_dict(checkpoint["model"])
        what = {"global_step": step, "train_seconds": round(checkpoint["train_seconds"], 1)}
        what["policy"] = policy
        how = {"greedy": policy == "greedy", "first_map": first_map}
        metrics = script.evaluate(agent, envs, args.eval_steps, "cpu", **how)
        rows = []
        for match, player in itertools.product(range(num_matches), range(2)):
            row = what | {"match_seed": first_map + match, "player": player}
            row["episode_length"] = int(metrics["l"][match])
            for key in ("starting_factories", *TEAM):
                row[key] = f"{metrics[METRIC.get(key, key)][match][player]:.7g}"
            rows.append(row)
        write(evaluation(".", step, policy), json.dumps(rows))


def evaluation(folder, step, policy):
    """Path of the rows of an evaluation."""
    return Path(folder, f"evaluation_{step}_{policy}.json")


# -- Files ---------------------------------------------------------------------------------


def write_tables(out):
    """Write ablation.csv and runs.csv of all that is trained and evaluated."""
    runs, rows = tables_alone(out)
    for folder, run in finished(out):
        runs.append(run)
        for path in evaluations(folder):
            rows += [{"arm": run["arm"], "seed": run["seed"]} | row for row in json.loads(path.read_text())]
    keys = {"arm": str, "seed": int, "global_step": int, "policy": str, "match_seed": int, "player": int}
    for name, columns, table in (("runs.csv", RUN_COLUMNS, runs), ("ablation.csv", COLUMNS, rows)):
        write_csv(
            out / name, columns, sorted(table, key=lambda row: [kind(row.get(key, 0)) for key, kind in keys.items()])
        )


def tables_alone(out):
    """Rows of runs.csv and of ablation.csv whose trainings' folders are not there."""
    here = {(run["arm"], str(run["seed"])) for _, run in finished(out)}
    tables = []
    for name in ("runs.csv", "ablation.csv"):
        rows = read_csv(out / name) if (out / name).exists() else []
        tables.append([row for row in rows if (row["arm"], row["seed"]) not in here])
    return tables


# Only names that the programs write are read: a folder may hold a person's copies too.
def finished(out):
    """(folder, contents of run.json) of each training that has ended."""
    for path in sorted(out.glob("*/run.json")):
        run = json.loads(path.read_text())
        if path.parent.name == f"{run['arm']}__{run['seed']}":
            yield path.parent, run


def runs_of(folder):
    """Folders of the runs of the training in this folder, the newest last."""
    runs = [path for path in folder.glob("runs/*") if re.fullmatch(r".+__\d+__\d+", path.name)]
    return sorted(runs, key=lambda path: int(path.name.split("__")[-1]))


def evaluations(folder):
    """Paths of the rows of all evaluations of the training in this folder."""
    paths = folder.glob("evaluation_*.json")
    return [path for path in paths if re.fullmatch(r"evaluation_\d+_(sampled|greedy)", path.stem)]


def saved(folder):
    """Checkpoints kept of the training in this folder, global step -> path."""
    return {int(path.stem.split("_")[1]): path for path in checkpoints(folder)}


def keep(folder):
    """Give the checkpoints of a training a second name, as it removes all but its last two."""
    for run in runs_of(folder):
        for path in checkpoints(run):
            with contextlib.suppress(FileExistsError, FileNotFoundError):  # kept, or removed just now
                os.link(path, folder / path.name)


def logged(folder):
    """Means over all updates of LOSSES, as the training in this folder logged them."""
    *_, run_dir = runs_of(folder)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    values = {key: [x.value for x in events.Scalars(f"losses/{key}")] for key in LOSSES}
    return {key: f"{np.mean(all_updates):.4g}" for key, all_updates in values.items()}


def commit():
    """The commit that changed the programs last, marked where they were changed since."""

    def git(words):
        done = subprocess.run(["git", *words.split()], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    programs = ":(glob)*.py"  # those beside trajsep_ppo.py
    changed = git(f"status --porcelain --untracked-files=no -- {programs}")
    return (git(f"log -1 --format=%h -- {programs}") or "unknown") + ("-dirty" if changed else "")


# -- Work ----------------------------------------------------------------------------------


class Work:
    """Trains and evaluates. `stop` ends it, with the processes that it has started."""

    def __init__(self, commands, out, schedule, matches, first_map, flags):
        self.commands, self.out, self.flags, self.schedule = commands, out.resolve(), flags, schedule
        self.matches, self.first_map = matches, first_map
        self.stopped, self.started, self.children = False, False, set()
        runs, rows = tables_alone(out)
        ended = {(row["arm"], row["seed"], row["global_step"]) for row in rows if row["policy"] == "greedy"}
        self.kept = {(run["arm"], run["seed"]): run for run in runs if (run["arm"], run["seed"], run["steps"]) in ended}

    def stop(self):
        self.stopped = True
        for child in list(self.children):
            child.terminate()

    def task(self, arm, seed):
        """What a training and its evaluations are, the first columns of its row in runs.csv."""
        *_, num_steps = 32, *re.findall(r"--num-steps (\d+)", self.commands[arm])
        rollout = 16 * int(num_steps)
        saving = f"--num-workers 0 --eval-episodes 0 --save-every {max(SAVE_EVERY // rollout, 1)}"
        return {
            "arm": arm,
            "seed": seed,
            "patches": " ".join(PATCHES.get(arm, ())),
            "command": f"{self.commands[arm]} --seed {seed} {saving} {self.flags}".strip(),
            "maps": f"{self.first_map} to {self.first_map + self.matches - 1}",
        }

    def do(self, arm, seed):
        """Train and evaluate one seed of one arm, as far as that is not done yet: whether it is now."""
        folder, task = self.out / f"{arm}__{seed}", self.task(arm, seed)
        try:
            if (arm, str(seed)) in self.kept:
                same_training(self.out / "runs.csv", task, self.kept[arm, str(seed)])
                return True
            if not self.stopped and not (folder / "run.json").exists():
                self.train(task, folder)
            if not self.stopped:
                self.evaluate(task, folder)
        except Failed as failure:
            if not self.stopped:
                say(arm, seed, str(failure))
            return False
        return not self.stopped

    def run(self, command, folder, name):
        """Run a command in a folder, its output in the file `name` there."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.started = True
        with open(folder / name, "w") as log:
            child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
            self.children.add(child)
            while child.poll() is None:
                keep(folder)
                if self.stopped:
                    child.terminate()
                time.sleep(0.05)
        self.children.discard(child)
        keep(folder)
        if child.returncode:
            end = (folder / name).read_text().replace("\r", "\n").strip().splitlines()[-5:]
            raise Failed("\n  ".join([f"{name} ended with exit code {child.returncode}:", *end]))

    def train(self, task, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for place in [folder, *runs_of(folder)]:  # of a training that was cut off
            for path in [*checkpoints(place), *evaluations(place)]:
                path.unlink()
        script, *flags = shlex.split(task["command"])
        run = task | {"commit": commit()}
        say(task["arm"], task["seed"], f"training, see {folder}")
        command = [sys.executable, programs(task["patches"].split(), folder / "programs") / script]
        self.run([*command, *flags], folder, "training.log")
        paths = saved(folder)
        last = torch.load(paths[max(paths)], weights_only=True)
        every = last["args"]["save_every"] * last["args"]["num_envs"] * last["args"]["num_steps"]
        if lost := set(range(every, last["global_step"], every)) - paths.keys():
            why = "was this program suspended?"
            raise Failed(f"{len(lost)} checkpoints were removed before they were kept; {why}")
        run |= {"steps": last["global_step"], "train_seconds": round(last["train_seconds"], 1)}
        run["parameters"] = sum(x.numel() for x in last["model"].values())
        run |= logged(folder)
        write(folder / "run.json", json.dumps(run, indent=1))  # the training is finished

    def evaluate(self, task, folder):
        arm, run = task["arm"], json.loads((folder / "run.json").read_text())
        same_training(folder, task, run)
        paths = saved(folder)
        last = max(paths)
        schedule = schedule_of(arm) if self.schedule is None else self.schedule
        steps = {min(saved for saved in paths if saved >= step) for step in schedule if step < last}
        wanted = [(step, "sampled") for step in sorted(steps - {last})]
        wanted += [(last, "sampled"), (last, "greedy")]
        wanted = [key for key in wanted if not evaluation(folder, *key).exists()]
        if wanted:
            say(arm, task["seed"], f"{len(wanted)} evaluations")
            script = task["command"].split(".py")[0]
            places = [str(programs(task["patches"].split(), folder / "programs")), str(ROOT / "benchmark")]
            how = json.dumps([script, wanted, self.matches, self.first_map])
            code = f"import sys; sys.path[:0] = {places}; import ablation; ablation.evaluate(*{how})"
            self.run([sys.executable, "-c", code], folder, "evaluation.log")
        for step in paths.keys() - {last}:
            paths[step].unlink()


def same_training(place, task, run):
    """Raise Failed if a training that is there already is not this task."""
    if changed := [key for key in task if str(run.get(key)) != str(task[key])]:
        what = f"`{run.get(changed[0])}` and not `{task[changed[0]]}`"
        raise Failed(f"{place} holds a training with other {changed[0]}: {what}")


def say(arm, seed, what):
    print(f"{time.strftime('%H:%M:%S')} {arm} seed {seed}: {what}", flush=True)


def main(
    arms: tuple[str, ...] = (),
    arm: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seeds: Optional[tuple[int, ...]] = None,
    out: Path = ROOT / "runs" / "study",
    parallel: int = os.cpu_count() or 1,
    matches: int = 20,
    first_map: int = FIRST_MAP,
    schedule: Optional[tuple[int, ...]] = None,
    flags: str = "",
):
    """Work through the queue.

    Args:
        arms: which arms of the study; by default all, but none beside --arm.
        arm: an arm of your own, NAME=COMMAND in quotes; may be given more than once.
        seeds: of all these arms; by default 11 to 20 for the two main ones, 11 to 15 for those of which
            something is claimed, and 11 to 13 for the others.
        out: folder of the tables and the trainings.
        parallel: trainings or evaluations at a time, each with one thread.
        matches: held-out matches of an evaluation.
        first_map: the first of as many held-out maps.
        schedule: environment steps after which trainings are evaluated, at the next checkpoint,
            instead of the arms' own; the last checkpoint always is.
        flags: more flags for every training, in quotes.
    """
    commands = commands_of(arms or (() if arm else ARMS), arm)
    if min(parallel, matches) < 1:
        raise Refused("--parallel and --matches must be at least 1")
    for name, command in commands.items():
        if "--env-kwargs" in flags and "--env-kwargs" in command:  # the second one would replace it
            raise Refused(f"{name} has --env-kwargs of its own")
        try:
            shlex.split(f"{command} {flags}")
        except ValueError as error:
            raise Refused(f"`{command} {flags}` is no command: {error}")
    tables = [out / name for name in ("ablation.csv", "runs.csv")]
    out.mkdir(parents=True, exist_ok=True)
    work, complete = Work(commands, out, schedule, matches, first_map, flags), 0
    jobs = queue(commands, seeds)
    pool = ThreadPoolExecutor(parallel)
    try:
        for done in as_completed([pool.submit(work.do, *job) for job in jobs]):
            complete += done.result()
            write_tables(out)
            print(f"{complete} of {len(jobs)} runs are complete in {out}", flush=True)
    except KeyboardInterrupt:
        print("ablation.py: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    finally:
        work.stop()
        pool.shutdown()
        write_tables(out)
    if not work.started:
        print("all of it was there already; with another --out it is made again")
    print(f"written to {' and '.join(map(str, tables))}")
    if complete < len(jobs):
        sys.exit(f"ablation.py: error: {len(jobs) - complete} of {len(jobs)} runs failed, see above")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell starts it in the background
        signal.signal(number, signal.default_int_handler)
    start(main)
