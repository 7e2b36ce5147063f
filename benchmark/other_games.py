"""Train four arms on other games, five seeds of each: the table and the picture of examples/README.md.

    pip install -r requirements.txt -r examples/pettingzoo/requirements.txt -r examples/gymnasium/requirements.txt
    python benchmark/other_games.py
    python benchmark/other_games.py --games kaz --seeds 11 12

Flags are the scripts' defaults, for every game and arm, except that rewards are those of the game. Trainings run
side by side, each with one thread, seed by seed. Started again, it continues; a training that was cut off begins again.

    written to --out
    games.csv    a row for every training: mean team return of held-out matches, with sampled and with the likeliest
                 actions; and for random play
    curves.csv   team returns of the training matches, means of PARTS equal parts of every training
    games.md     the table
    games.png    the curves: means of the seeds, and the bands that they span
    <game>__<arm>__<seed>/  a training's log and run
"""

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from ablation import commit, programs, runs_of, say
from plot import ARMS as STUDY
from plot import ROOT, Refused, plt, start, table, write, write_csv
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trajsep_ppo import checkpoints

# game -> (its name in the table, folder of examples/, module:class, environment steps)
GAMES = {
    "rware": ("RWARE tiny-4ag-easy", "gymnasium", "tuple_games:RwareVecEnv", 204800),
    "lbf": ("Foraging 8x8-3p-3f", "gymnasium", "tuple_games:LbfVecEnv", 204800),
    "kaz": ("Knights Archers Zombies", "pettingzoo", "games:KazVecEnv", 65536),
    "toy": ("toy, 16 slots", "toy", "toy_env:ToyVecEnv", 102400),
}
# arm -> (its name, command, patches of benchmark/arms, colour, line style); the colours are those of the study
ARMS = {
    "separate": ("separate (default)", "trajsep_ppo.py", (), STUDY["default"][1], "-"),
    "ippo": (
        "team's reward (as in IPPO)",
        "trajsep_ppo.py --agent-reward-weight 0",
        (),
        STUDY["global-reward"][1],
        ":",
    ),
    "mappo": (
        "team's reward and value (as in MAPPO)",
        "trajsep_ppo.py --agent-reward-weight 0",
        ("global-critic",),
        STUDY["global-critic-reward"][1],
        "-.",
    ),
    "global": ("one trajectory (baseline)", "global_ppo.py", (), STUDY["global"][1], "--"),
}
FLAGS = "--positive-reward-weight 1"  # rewards as the game pays them
COLUMNS = ("game", "arm", "seed", "steps", "train_seconds", "sampled", "greedy", "commit", "command")
PARTS = 32
RANDOM_MATCHES = 100


def is_done(folder, command):
    """Whether this training has been run in this folder.

    Raises:
        Refused: if one with other flags has been run there.
    """
    done = (folder / "result.json").exists()
    if done and json.loads((folder / "result.json").read_text())[0]["command"] != command:
        raise Refused(f"{folder} holds a training with other flags; name another --out")
    return done


def command_of(game, arm, seed, steps):
    _, _, env_id, _ = GAMES[game]
    _, command, *_ = ARMS[arm]
    return f"{command} --env-id {env_id} --total-timesteps {steps} {FLAGS} --seed {seed}"


def train(folder, game, arm, seed, steps):
    """Train and evaluate one seed; returns its row of games.csv and its curve."""
    _, place, _, _ = GAMES[game]
    _, _, patches, *_ = ARMS[arm]
    command, result = command_of(game, arm, seed, steps), folder / "result.json"
    if not is_done(folder, command):
        say(f"{game} {arm}", seed, f"training, see {folder / 'log'}")
        folder.mkdir(parents=True, exist_ok=True)
        script, *flags = command.split()
        script = programs(patches, folder / "programs") / script
        path = os.pathsep.join([str(ROOT / "examples" / place), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with open(folder / "log", "w") as log:
            words = [sys.executable, str(script), *flags]
            done = subprocess.run(words, cwd=folder, env=environment, stdout=log, stderr=log)
        if done.returncode:
            raise ChildProcessError(f"{command} ended with {done.returncode}, see {folder / 'log'}")
        *_, run = runs_of(folder)
        *_, last = checkpoints(run)
        row = {"game": game, "arm": arm, "seed": seed, "steps": steps, "commit": commit(), "command": command}
        row["train_seconds"] = round(torch.load(last, weights_only=True)["train_seconds"], 1)
        for how, evaluation in json.loads((run / "evaluation.json").read_text()).items():
            row[how] = f"{evaluation['summary']['r']['mean']:.5g}"
        write(result, json.dumps([row, curve(run, steps)], indent=1))
    return json.loads(result.read_text())


def curve(run, steps):
    """(step, mean return of the training matches up to there) for each part of a run in which one ended."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    key, parts = "charts/episodic_return", {}
    for event in events.Scalars(key) if key in events.Tags()["scalars"] else ():
        parts.setdefault(-(-event.step * PARTS // steps), []).append(event.value)
    return [(part * steps // PARTS, f"{np.mean(values):.5g}") for part, values in sorted(parts.items())]


def random_return(game):
    """Mean team return of held-out matches, with random actions that are not masked."""
    _, place, env_id, _ = GAMES[game]
    sys.path.append(str(ROOT / "examples" / place))
    module, _, name = env_id.partition(":")
    try:
        envs = getattr(importlib.import_module(module), name)(RANDOM_MATCHES, held_out=True)
    except (ImportError, ValueError) as error:
        raise Refused(f"{game} needs pip install -r examples/{place}/requirements.txt ({error})")
    rng = np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    returns = {}
    while len(returns) < RANDOM_MATCHES:
        allowed = obs["action_mask"]
        obs, _, _, _, infos = envs.step(np.where(allowed, rng.random(allowed.shape), -1).argmax(-1))
        for match in np.flatnonzero(infos.get("_episode", ())):
            returns.setdefault(match, np.mean(infos["episode"]["r"][match]))
    return np.mean([*returns.values()])


def mean_and_interval(values):
    """Mean and half the width of its 95% interval by Student's t, as text."""
    if len(values) < 2:
        return f"{np.mean(values):.3g}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.3g} ± {half:.2g}"


def mean_returns(rows):
    """In Markdown: team returns of every game and arm, with sampled actions, and minutes of a training."""
    lines = []
    for game, (name, *_) in GAMES.items():
        returns = {arm: [] for arm in ("random", *ARMS)}
        for row in rows:
            if row["game"] == game:
                returns[row["arm"]].append(float(row["sampled"]))
        trainings = [row for row in rows if row["game"] == game and row["arm"] != "random"]
        if trainings:
            seconds = [float(row["train_seconds"]) for row in trainings]
            cells = [mean_and_interval(values) if values else "" for values in returns.values()]
            lines.append([name, f"{int(trainings[0]['steps']):,}", *cells, f"{np.mean(seconds) / 60:.1f}"])
    names = [name for name, *_ in ARMS.values()]
    return table(["game", "steps", "random play", *names, "minutes"], lines) + "\n"


def draw(rows, curves, path):
    """A panel for each game: of each arm the mean of its seeds and the band that they span, and random play."""
    floor = {row["game"]: float(row["sampled"]) for row in rows if row["arm"] == "random"}
    games = [game for game in GAMES if game in floor]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    lines = -(-len(games) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(7, 0.5 + 2.5 * lines), layout="constrained", squeeze=False)
    for axis, game in zip(axes.flat, games):
        for arm, (name, _, _, colour, style) in ARMS.items():
            returns = {}  # step -> of each seed
            for row in curves:
                if (row["game"], row["arm"]) == (game, arm):
                    returns.setdefault(int(row["step"]), []).append(float(row["return"]))
            steps = sorted(returns)
            low, mean, high = ([of_seeds(returns[step]) for step in steps] for of_seeds in (min, np.mean, max))
            axis.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
            above = 3 if style == ":" else 2  # dots hide least
            axis.plot(steps, mean, color=colour, linestyle=style, linewidth=2, zorder=above, label=name)
        axis.axhline(floor[game], color="grey", linestyle=":", linewidth=1, label="random play")
        axis.set_title(GAMES[game][0], fontsize=10)
        axis.set(xlabel="environment steps", ylabel="return")
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:.0f}K")
    for axis in axes.flat[len(games) :]:
        axis.set_axis_off()
    handles, _ = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_results(results, floor, out):
    """Write the tables and the picture of these trainings, each a row and a curve, and of random play."""
    rows = [{"game": game, "arm": "random", "sampled": f"{value:.5g}"} for game, value in floor.items()]
    rows += [row for row, _ in results]
    curves = []
    for row, points in results:
        training = {key: row[key] for key in ("game", "arm", "seed")}
        curves += [training | {"step": step, "return": value} for step, value in points]
    write_csv(out / "games.csv", COLUMNS, rows)
    write_csv(out / "curves.csv", ("game", "arm", "seed", "step", "return"), curves)
    write(out / "games.md", mean_returns(rows))
    draw(rows, curves, out / "games.png")


def main(
    games: tuple[str, ...] = tuple(GAMES),
    arms: tuple[str, ...] = tuple(ARMS),
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15),
    out: Path = ROOT / "runs" / "games",
    steps: Optional[int] = None,
    parallel: int = os.cpu_count() or 1,
):
    """Work through all trainings.

    Args:
        games: which games.
        arms: which arms.
        seeds: a training for each.
        steps: environment steps of a training, instead of each game's own.
        out: folder of the tables and the trainings.
        parallel: trainings at a time, each with one thread.
    """
    if parallel < 1:
        raise Refused("--parallel must be at least 1")
    for given, known in ((games, GAMES), (arms, ARMS)):
        if unknown := [name for name in given if name not in known]:
            raise Refused(f"there is no {unknown[0]}; there are {', '.join(known)}")
    out = out.resolve()
    jobs = [(game, arm, seed, steps or GAMES[game][-1]) for seed in seeds for game in games for arm in arms]
    folders = [out / f"{game}__{arm}__{seed}" for game, arm, seed, _ in jobs]
    for folder, job in zip(folders, jobs):
        is_done(folder, command_of(*job))  # before anything is written
    out.mkdir(parents=True, exist_ok=True)
    floor = {}
    for game in games:
        print(f"{game}: random play, {RANDOM_MATCHES} matches", flush=True)
        floor[game] = random_return(game)
    with ThreadPoolExecutor(parallel) as pool:
        results = []
        for number, result in enumerate(pool.map(train, folders, *zip(*jobs)), start=1):
            results.append(result)
            write_results(results, floor, out)
            print(f"{number} of {len(jobs)} trainings are complete in {out}", flush=True)
    print(f"written to {out / 'games.md'}, games.csv, curves.csv and games.png")


if __name__ == "__main__":
    start(main)
