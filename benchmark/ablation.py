"""Train every arm of the ablation on several seeds and evaluate the checkpoints of every training.

    python benchmark/ablation.py
    python benchmark/ablation.py --minutes 120 --arms default global --seeds 1 2
    python benchmark/plot.py

The queue starts with the two main arms, `default` and `global`, seed by seed, and goes on with the other arms, seed
by seed, so that what is there when it is stopped is a result already. Started again, it goes on: a finished training
is not run again, nor is a finished evaluation. A training that was cut off begins anew.

Trainings run side by side, each with one thread, and are evaluated after they have ended, so that no evaluation is in
their wall time; what runs beside them still slows them. Every evaluation plays the same held-out maps, --matches of
them from --first-map on, once each, with actions sampled from the policy, and of the two main arms at the end of the
training with the likeliest actions too.

    written to --out
    ablation.csv    a row for every player of every evaluated match; lengths are in steps, the rest as in the README
    runs.csv        a row for every training: its command, commit, seconds, steps and parameters, and of two metrics
                    that it logged the mean over all updates: share of clipped ratios, explained variance of the values

Checkpoints and logs lie in --work; of an evaluated training only the last checkpoint is kept there.
"""

import contextlib
import csv
import fcntl
import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import trajsep_ppo  # noqa: E402
from lux_wrapper import TEAM_METRICS  # noqa: E402

# Arms of the authors have all of their own reward (weight 1) and differ in one thing from `separate`; the others differ
# in one thing from `default` or, to see whether the default flags are unfair to it, from `global`. The order is that of
# the work: what says most comes first.
SEPARATE = "trajsep_ppo.py --agent-reward-weight 1"
ARMS = {
    "default": "trajsep_ppo.py --agent-reward-weight 0.8",
    "global": "global_ppo.py",
    # Components
    "separate": SEPARATE,
    "global-reward": "trajsep_ppo.py --agent-reward-weight 0",
    "global-critic": f"{SEPARATE} --shared critic",
    "global-critic-reward": "trajsep_ppo.py --agent-reward-weight 0 --shared critic",  # their "global advantage"
    "shared-ratio": f"{SEPARATE} --shared ratio",
    "shared-entropy": f"{SEPARATE} --shared entropy",
    "shared-dones": f"{SEPARATE} --shared dones",
    # Trajectories
    "robots": f"{SEPARATE} --group-by robots",
    "factories": f"{SEPARATE} --group-by factories",
    "kinds": f"{SEPARATE} --group-by kinds",
    "cluster": "trajsep_ppo.py --group-by cluster",
    # Clipping, and other flags of the baseline's own
    "clip-50": "trajsep_ppo.py --clip-coef 0.5",
    "clip-100": "trajsep_ppo.py --clip-coef 1",
    "global-clip-50": "global_ppo.py --clip-coef 0.5",
    "global-clip-100": "global_ppo.py --clip-coef 1",
    "global-small-value-loss": "global_ppo.py --vf-coef 0.01",
    "global-long-rollouts": "global_ppo.py --num-steps 64 --num-minibatches 16",
    # The own share of the reward
    "share-75": "trajsep_ppo.py --agent-reward-weight 0.75",
    "share-50": "trajsep_ppo.py --agent-reward-weight 0.5",
    # Groups of robots, by number and by rule
    "mod-2": f"{SEPARATE} --group-by mod-2",
    "mod-4": f"{SEPARATE} --group-by mod-4",
    "quadrants": f"{SEPARATE} --group-by quadrants",
    "nearest-factory": f"{SEPARATE} --group-by nearest-factory",
    "nearest-heavy": f"{SEPARATE} --group-by nearest-heavy",
    # Fewer samples of robots
    "top-1": f"{SEPARATE} --top-samples 1",
    "top-2": f"{SEPARATE} --top-samples 2",
    "top-4": f"{SEPARATE} --top-samples 4",
    "top-1-abs": f"{SEPARATE} --top-samples 1 --top-by abs-advantage",
    "top-1-return": f"{SEPARATE} --top-samples 1 --top-by return",
    "random-1": f"{SEPARATE} --top-samples 1 --top-by random",
    "random-2": f"{SEPARATE} --top-samples 2 --top-by random",
    "random-4": f"{SEPARATE} --top-samples 4 --top-by random",
    # The rest
    "lichen": "trajsep_ppo.py --reward lichen",
    "no-safe-masks": "trajsep_ppo.py --no-safe-masks",
    "no-positive-weight": "trajsep_ppo.py --positive-reward-weight 1",
    "random-placement": "trajsep_ppo.py",
    "large-heads": "trajsep_ppo.py",
}
# Arms for which there is no flag: (file, text, what stands there instead) of a copy of the programs.
EDITS = {
    "random-placement": (
        "lux_wrapper.py",
        "    score = placement_score(obs, grow_lichen)\n",
        '    score = np.random.default_rng(int(obs["board"]["rubble"].sum())).random(obs["board"]["ice"].shape)\n'
        '    score[~obs["board"]["valid_spawns_mask"]] = -np.inf\n',
    ),
    "large-heads": ("hybrid_model.py", "std=0.01", "std=1"),
}
MAIN = ("default", "global")
# Flags were chosen with seeds 1 to 10 on the maps 0 to 19, so the study has others. (1000 to 1019: `confirmation/`.)
FIRST_SEED, FIRST_MAP = 11, 2000
SEEDS = {arm: 5 if arm in MAIN else 3 for arm in ARMS}
# Environment steps after which a training is evaluated, in the main arms and in the others; and always the last, where
# the main arms play with the likeliest actions too.
FINE = (*range(2048, 24577, 2048), *range(28672, 49153, 4096), *range(57344, 102400, 8192))
COARSE = (4096, 8192, 16384, 24576, 49152)
SAVE_EVERY = 4  # updates between two checkpoints of a training

EVALUATION = ("arm", "seed", "global_step", "train_seconds", "policy")  # what one evaluation is
ICE, ALIVE, PLACED = "ice_transferred", "factories_alive", "factories_placed"
OTHERS = [key for key in TEAM_METRICS if key not in ("r", ICE, ALIVE, PLACED)]
MATCH = ("match_seed", "player", "starting_factories", "episode_length", ICE, ALIVE)
COLUMNS = (*EVALUATION, *MATCH, "episodic_return", *OTHERS)
LOSSES = ("clipfrac", "explained_variance")
RUN_COLUMNS = ("arm", "seed", "steps", "train_seconds", "parameters", *LOSSES, "commit", "command")


class Failed(Exception):
    """A training or an evaluation ended with an error; the message says which and shows the end of its log."""


def queue(arms, seeds=None):
    """All (arm, seed) in the order of work: the main arms first, seed by seed, then the others, seed by seed."""
    jobs = {(arm, seed) for arm in arms for seed in (seeds or range(FIRST_SEED, FIRST_SEED + SEEDS[arm]))}
    return sorted(jobs, key=lambda job: (job[0] not in MAIN, job[1], list(ARMS).index(job[0])))


# ------------------------------------------------------------------------------------------------------
# Evaluation, in a process of its own
# ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def play(agent, envs, greedy, first_map=0):
    """Play every match once, on as many held-out maps from `first_map` on.

    Returns:
        the map seeds [N] and for each match its metrics, "l" and the TEAM_METRICS arrays [P].
    """
    generator = torch.Generator().manual_seed(0)
    matches, metrics = envs.matches.matches, [None] * envs.num_envs
    for match in matches:
        vars(match).pop("step", None)
    obs, _ = envs.reset(seed=first_map)
    map_seeds = envs.arrays["map_seed"].tolist()
    actions = torch.zeros(obs["kind"].shape, dtype=torch.long).flatten(0, 1)
    while None in metrics:
        teams = torch.tensor([metric is None for metric in metrics]).repeat_interleave(2).nonzero().squeeze(1)
        logits, _, _ = agent({key: x.index_select(0, teams) for key, x in trajsep_ppo.to_tensors(obs, "cpu").items()})
        if not greedy:  # as torch.multinomial does; noise for all matches, so that none depends on another's end
            noise = torch.empty((*actions.shape, logits.shape[-1])).exponential_(generator=generator)
            logits = logits.softmax(-1) / noise[teams]
        actions[:] = 0  # of matches that stand still too
        actions[teams] = logits.argmax(-1)
        obs, _, _, _, infos = envs.step(actions.view(obs["kind"].shape).numpy())
        for index in np.flatnonzero(infos.get("_episode", ())):
            metrics[index] = {key: x[index] for key, x in infos["episode"].items()}
            matches[index].step = lambda orders, rewards: None  # it counts once: from here on it stands still
    return map_seeds, metrics


def programs(arm, folder):
    """Folder of the programs that an arm runs: this project's, or in `folder` a copy of them with the arm's edit."""
    if arm not in EDITS:
        return ROOT
    name, old, new = EDITS[arm]
    folder.mkdir(parents=True, exist_ok=True)
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        if path.name == name:
            assert old in text, f"{name} has no longer what the arm {arm} replaces"
            text = text.replace(old, new)
        (folder / path.name).write_text(text)
    return folder


def evaluate(folder, paths, wanted, num_matches, first_map, pipe):
    """Evaluate checkpoints of one training, each `wanted` (global step, policy), and send the rows of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    torch.set_num_threads(1)
    for name in ("trajsep_ppo", "global_ppo", "hybrid_model", "lux_wrapper"):  # those of the folder take their places
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    envs, scripts = None, {name: importlib.import_module(name) for name in ("trajsep_ppo", "global_ppo")}
    for step, policy in wanted:
        checkpoint = torch.load(paths[step], map_location="cpu", weights_only=True)
        if envs is None:
            script = scripts["trajsep_ppo" if "group_by" in checkpoint["args"] else "global_ppo"]
            envs = script.make_envs(script.Args(**checkpoint["args"]), num_matches, num_workers=0, held_out=True)
            agent = script.HybridNet(envs.single_observation_space, int(envs.single_action_space.nvec.max()))
        agent.load_state_dict(checkpoint["model"])
        rows = []
        for map_seed, metrics in zip(*play(agent, envs, policy == "greedy", first_map)):
            for player in range(2):
                team = {key: f"{metrics[key][player]:.7g}" for key in TEAM_METRICS}
                row = {"match_seed": map_seed, "player": player, "episode_length": metrics["l"]}
                row |= {"starting_factories": team[PLACED], "episodic_return": team["r"]}
                rows.append(row | {key: team[key] for key in (ICE, ALIVE, *OTHERS)})
        pipe.send((step, round(checkpoint["train_seconds"], 1), policy, rows))
    if envs is not None:
        envs.close()


# ------------------------------------------------------------------------------------------------------
# The two tables
# ------------------------------------------------------------------------------------------------------


class Results:
    """The tables in `out`, read at the start and written anew at every change: complete and sorted at any time."""

    def __init__(self, out):
        self.out, self.lock = out, threading.Lock()
        self.runs = {(row["arm"], int(row["seed"])): row for row in self._read("runs.csv")}
        self.evaluations = {}  # (arm, seed, global step, policy) -> rows
        for row in self._read("ablation.csv"):
            key = row["arm"], int(row["seed"]), int(row["global_step"]), row["policy"]
            self.evaluations.setdefault(key, []).append(row)

    def _read(self, name):
        path = self.out / name
        return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

    def _write(self, name, columns, rows):
        temporary = self.out / f"{name}.tmp"
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.out / name)

    def add_run(self, run):
        """A training has ended: its row, and away with evaluations of an earlier training of this arm and seed."""
        with self.lock:
            self.runs[run["arm"], run["seed"]] = run
            mine = [key for key in self.evaluations if key[:2] == (run["arm"], run["seed"])]
            for key in mine:
                del self.evaluations[key]
            self._write("runs.csv", RUN_COLUMNS, [self.runs[key] for key in sorted(self.runs)])
            if mine:
                self._write_evaluations()

    def add_evaluation(self, arm, seed, step, seconds, policy, rows):
        start = dict(zip(EVALUATION, (arm, seed, step, seconds, policy)))
        with self.lock:
            self.evaluations[arm, seed, step, policy] = [start | row for row in rows]
            self._write_evaluations()

    def _write_evaluations(self):
        self._write("ablation.csv", COLUMNS, [row for key in sorted(self.evaluations) for row in self.evaluations[key]])

    def complete(self, arm, seed):
        """Whether nothing is left to do: the last evaluation of the last checkpoint is made."""
        run = self.runs.get((arm, seed))
        return run is not None and (arm, seed, int(run["steps"]), in_the_end(arm)[-1]) in self.evaluations


# ------------------------------------------------------------------------------------------------------
# Work
# ------------------------------------------------------------------------------------------------------


def commit():
    """The commit that is checked out, marked where its programs were changed since."""
    commands = ("git rev-parse --short HEAD", "git status --porcelain --untracked-files=no -- *.py")
    said = [subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True).stdout for command in commands]
    return (said[0].strip() or "unknown") + ("-dirty" if said[1] else "")


def in_the_end(arm):
    """The policies with which the last checkpoint of an arm is evaluated, in this order."""
    return ("sampled", "greedy") if arm in MAIN else ("sampled",)


def saved(folder):
    """Checkpoints kept of the training in this folder, global step -> path."""
    return {int(path.stem.split("_")[1]): path for path in folder.glob("checkpoint_*.pt")}


def keep(folder):
    """Give the checkpoints that the training in this folder has a second name, as it removes all but its last two."""
    for path in folder.glob("runs/*/checkpoint_*.pt"):
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # kept already, or removed at this moment
            os.link(path, folder / path.name)


def logged(folder):
    """Mean over all updates of some metrics that the training in this folder logged."""
    events = EventAccumulator(str(next(folder.glob("runs/*"))), size_guidance={"scalars": 0}).Reload()
    return {key: f"{np.mean([x.value for x in events.Scalars(f'losses/{key}')]):.4g}" for key in LOSSES}


class Work:
    """Trains and evaluates; `stop` ends it, and the processes that it has started with it."""

    def __init__(self, results, work, schedule, matches, first_map, flags, deadline):
        self.results, self.work, self.deadline = results, work.resolve(), deadline
        self.schedule, self.matches, self.first_map, self.flags = schedule, matches, first_map, flags
        self.stopped, self.children, self.failed = False, set(), []

    def over(self):
        return self.stopped or time.time() > self.deadline

    def stop(self):
        self.stopped = True
        for child in list(self.children):
            child.terminate()

    def command(self, arm, seed):
        speed = f"--num-workers 0 --eval-episodes 0 --save-every {SAVE_EVERY}"
        return f"{ARMS[arm]} --seed {seed} {speed} {self.flags}".strip()

    def do(self, job):
        """Train and evaluate one seed of one arm, as far as that is not done yet."""
        if self.over() or self.results.complete(*job):
            return
        try:
            folder = self.work / "{}__{}".format(*job)
            if not (folder / "run.json").exists():
                self.train(*job, folder)
            self.evaluate(*job, folder)
        except Failed as failure:
            if not self.stopped:
                self.failed.append(job)
                say(*job, str(failure))

    def train(self, arm, seed, folder):
        shutil.rmtree(folder, ignore_errors=True)  # what was cut off; a script that can resume would go on with it
        folder.mkdir(parents=True)
        say(arm, seed, f"training, see {folder / 'log'}")
        run = {"arm": arm, "seed": seed, "commit": commit(), "command": self.command(arm, seed)}
        script, *flags = shlex.split(run["command"])
        command = [sys.executable, str(programs(arm, folder / "programs") / script), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(folder / "log", "w") as log:
            child = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
            with self.running(child):
                while (code := child.poll()) is None:
                    keep(folder)
                    time.sleep(0.05)
        keep(folder)
        if code:
            end = (folder / "log").read_text().replace("\r", "\n").strip().splitlines()[-5:]
            raise Failed(f"the training failed with exit code {code}:\n  " + "\n  ".join(end))
        paths = saved(folder)
        last = torch.load(paths[max(paths)], weights_only=True)
        every = SAVE_EVERY * last["args"]["num_envs"] * last["args"]["num_steps"]
        if lost := set(range(every, last["global_step"], every)) - paths.keys():
            raise Failed(f"{len(lost)} checkpoints were removed before they were kept; was this program suspended?")
        run |= {"steps": last["global_step"], "train_seconds": round(last["train_seconds"], 1)}
        run |= {"parameters": sum(x.numel() for x in last["model"].values())} | logged(folder)
        self.results.add_run(run)
        (folder / "run.json").write_text(json.dumps(run, indent=1))  # marks the training as finished
        say(arm, seed, f"trained {run['steps']:,} steps in {run['train_seconds']:.0f} s")

    def evaluate(self, arm, seed, folder):
        run = json.loads((folder / "run.json").read_text())
        if run["command"] != self.command(arm, seed):
            raise Failed(f"{folder} holds a training by another command, `{run['command']}`")
        if (arm, seed) not in self.results.runs:  # trained for another folder of results
            self.results.add_run(run)
        paths = saved(folder)
        last, schedule = max(paths), self.schedule or (FINE if arm in MAIN else COARSE)
        steps = {min(step for step in paths if step >= wanted) for wanted in schedule if wanted <= last} | {last}
        wanted = [(step, "sampled") for step in sorted(steps - {last})] + [(last, policy) for policy in in_the_end(arm)]
        wanted = [key for key in wanted if (arm, seed, *key) not in self.results.evaluations]
        if self.over():
            return
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe(duplex=False)
        how = (programs(arm, folder / "programs"), paths, wanted, self.matches, self.first_map, there)
        child = spawn.Process(target=evaluate, args=how, daemon=True)
        child.start()
        there.close()
        with self.running(child):
            for done in range(1, len(wanted) + 1):
                try:
                    step, seconds, policy, rows = here.recv()
                except EOFError:
                    child.join()
                    raise Failed(f"the evaluation died with exit code {child.exitcode}") from None
                self.results.add_evaluation(arm, seed, step, seconds, policy, rows)
                length, ice = (np.mean([float(row[key]) for row in rows]) for key in ("episode_length", ICE))
                progress = f"{done} of {len(wanted)} evaluations"
                say(arm, seed, f"{policy} at {step:,} steps: length {length:,.0f}, ice {ice:,.0f} ({progress})")
                if self.over() and done < len(wanted):
                    return child.terminate()
            child.join()
        (folder / "run.json").unlink()  # without its checkpoints this training cannot be evaluated once more
        for step in paths.keys() - {last}:
            paths[step].unlink()

    @contextlib.contextmanager
    def running(self, child):
        """Inside, `stop` ends this process too."""
        self.children.add(child)
        if self.stopped:
            child.terminate()
        try:
            yield
        finally:
            self.children.discard(child)


def say(arm, seed, what):
    print(f"{time.strftime('%H:%M:%S')} {arm} seed {seed}: {what}", flush=True)


def main(
    arms: tuple[str, ...] = tuple(ARMS),
    seeds: Optional[tuple[int, ...]] = None,
    out: Path = ROOT / "benchmark" / "study",
    work: Path = ROOT / "runs" / "ablation",
    parallel: int = os.cpu_count() or 1,
    minutes: float = float("inf"),
    matches: int = 20,
    first_map: int = FIRST_MAP,
    schedule: Optional[tuple[int, ...]] = None,
    flags: str = "",
):
    """Work through the queue.

    Args:
        arms: which of the arms.
        seeds: seeds of all these arms; by default 11 to 15 for the main arms and 11 to 13 for the others.
        out: folder of the two tables.
        work: folder of checkpoints and logs.
        parallel: trainings or evaluations at a time, each with one thread.
        minutes: after this time nothing new is started, and a training under way is finished.
        matches: held-out matches of an evaluation.
        first_map: the first of as many held-out maps.
        schedule: environment steps after which trainings are evaluated (at the next checkpoint), instead of the
            arms' own; the last checkpoint always is.
        flags: more flags for every training, in quotes.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        sys.exit(f"ablation.py: error: no arm {unknown[0]}; there are {', '.join(ARMS)}")
    if min(parallel, matches) < 1:
        sys.exit("ablation.py: error: --parallel and --matches must be at least 1")
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f"ablation.py: error: another one is writing to {out}")
    try:
        results = Results(out)
        for rows in results.evaluations.values():
            if (held := (len(rows) // 2, int(rows[0]["match_seed"]))) != (matches, first_map):
                sys.exit("ablation.py: error: {} holds evaluations on {} maps from map {} on".format(out, *held))
        jobs = Work(results, work, schedule, matches, first_map, flags, time.time() + 60 * minutes)
        todo = queue(arms, seeds)
        for job in todo:
            was = results.runs[job]["command"] if job in results.runs else jobs.command(*job)
            if was != jobs.command(*job):
                sys.exit(f"ablation.py: error: {out} holds {job[0]} seed {job[1]} by another command, `{was}`")
        pool = ThreadPoolExecutor(parallel)
        try:
            for done in [pool.submit(jobs.do, job) for job in todo]:
                done.result()
        except BaseException as reason:
            jobs.stop()
            pool.shutdown()
            if isinstance(reason, KeyboardInterrupt):
                print("ablation.py: interrupted; the same command goes on from here", file=sys.stderr)
                sys.exit(130)
            raise
    finally:
        os.close(folder)
    print(f"{sum(results.complete(*job) for job in todo)} of {len(todo)} runs are complete in {out}")
    if jobs.failed:
        sys.exit(f"ablation.py: error: {len(jobs.failed)} of {len(todo)} runs failed, see above")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell starts it in the background
        signal.signal(number, signal.default_int_handler)
    tyro.cli(main)
