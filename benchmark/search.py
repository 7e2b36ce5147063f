"""Search flags for both scripts alike: the same settings, trainings and maps for the method and for the baseline.

    python benchmark/search.py

Each of SETTINGS trains a third of the default steps with one seed, and is evaluated on maps that flags
may be chosen on. The BEST of each script then train in full with seeds and on maps of their own. The
first setting is the default. Stopped and started again, it continues.

    written to --out
    search/    ablation.csv and runs.csv of the search; an arm is <script>-<number of the setting>
    winners/   the same of the best
    search.md  what the settings reach, and the best of each script in full
"""

import os
from pathlib import Path

import ablation
import numpy as np
import plot
from plot import ROOT, Refused
from study import runs_by_arm

CHOICES = {
    "--learning-rate": (3e-4, 5e-4, 1e-3, 2e-3),
    "--clip-coef": (0.1, 0.2, 0.3, 0.5),
    "--ent-coef": (0.001, 0.003, 0.01),
    "--vf-coef": (0.01, 0.03, 0.1, 0.3),
    "--num-steps": (16, 32, 64),
}
DEFAULT = (1e-3, 0.2, 0.003, 0.1, 32)
SETTINGS = 24
BEST = 3
SCRIPTS = {"method": "trajsep_ppo.py", "baseline": "global_ppo.py"}
STEPS = 32768
TUNING_SEED, TUNING_MAP = 1, 0


def settings(number=SETTINGS):
    """So many different settings, the default first: strings of flags; minibatches have 64 steps in all."""
    rng = np.random.default_rng(0)
    drawn = {DEFAULT: None}
    while len(drawn) < number:
        drawn[tuple(values[rng.integers(len(values))] for values in CHOICES.values())] = None
    flags = [" ".join(f"{flag} {value}" for flag, value in zip(CHOICES, values)) for values in drawn]
    return [f"{words} --num-minibatches {values[-1] // 4}" for words, values in zip(flags, drawn)]


def final_ice(folder):
    """Arm -> its final ice per team [seeds, maps], with sampled actions."""
    data, last = plot.load(folder / "ablation.csv")
    return {arm: plot.values_of(runs, "ice_transferred", [last])[0] for arm, runs in runs_by_arm(data).items()}


def found(folder, script):
    """Arms of a script by their mean final ice in a folder, the best first: name -> ice."""
    ice = {name: values.mean() for name, values in final_ice(folder).items() if name.startswith(f"{script}-")}
    return dict(sorted(ice.items(), key=lambda item: -item[1]))


def all_commands(number=SETTINGS):
    """Name of an arm -> its command: each setting with both scripts."""
    commands = {}
    for script, program in SCRIPTS.items():
        for index, words in enumerate(settings(number)):
            commands[f"{script}-{index}"] = f"{program} {words}"
    return commands


def report(folder, commands):
    """In Markdown: what the search found, and what the best settings of each script reach in full.

    Args:
        folder: that of the results.
        commands: those that were tried.
    """
    tried, winners, in_full = [], [], final_ice(folder / "winners")
    for script, program in SCRIPTS.items():
        ice = found(folder / "search", script)
        place = [*ice].index(f"{script}-0") + 1
        values = [*ice.values()]
        cells = (f"{x:,.0f}" for x in (max(values), np.median(values), min(values)))
        tried.append([f"`{program}`", *cells, f"{ice[f'{script}-0']:,.0f} (place {place} of {len(ice)})"])
        for name in [*ice][:BEST]:
            mean, low, high = plot.estimate(in_full[name])
            winners.append([f"`{commands[name]}`", f"{ice[name]:,.0f}", f"{mean:,.0f} ({low:,.0f} to {high:,.0f})"])
    head = ["ice per team in the search", "best setting", "median", "worst", "the default"]
    of_best = plot.table(["the best settings", "ice per team in the search", "in full"], winners)
    return f"{plot.table(head, tried)}\n\n{of_best}\n"


def main(
    out: Path = ROOT / "runs" / "search",
    number: int = SETTINGS,
    seeds: tuple[int, ...] = (11, 12, 13),
    parallel: int = os.cpu_count() or 1,
    steps: int = STEPS,
    flags: str = "",
):
    """Search, and train the best in full.

    Args:
        out: folder of the results.
        number: settings that are tried, of each script.
        seeds: of the best.
        parallel: trainings or evaluations at a time, each with one thread.
        steps: environment steps of a training of the search, a multiple of 1,024.
        flags: more flags for every training in full, in quotes.
    """
    if number < 1 or steps < 1024 or steps % 1024:
        raise Refused("--number must be at least 1, and --steps a multiple of 1024")
    commands = all_commands(number)
    options = {"parallel": parallel, "schedule": ()}
    arms = tuple(f"{name}={command}" for name, command in commands.items())
    tuning = {"seeds": (TUNING_SEED,), "first_map": TUNING_MAP, "flags": f"--total-timesteps {steps}"}
    ablation.main(arm=arms, out=out / "search", **options, **tuning)
    best = [name for script in SCRIPTS for name in [*found(out / "search", script)][:BEST]]
    arms = tuple(f"{name}={commands[name]}" for name in best)
    ablation.main(arm=arms, out=out / "winners", seeds=seeds, flags=flags, **options)
    plot.write(out / "search.md", report(out, commands))
    print(f"written to {out / 'search.md'}")


if __name__ == "__main__":
    plot.start(main)
