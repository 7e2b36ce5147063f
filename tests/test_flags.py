"""Every flag does what it says: the scripts are started with it and without it, on a toy game.

test_learner.py tests the flags of the algorithm.
"""

import dataclasses
import functools
import json
import random
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import test_learner
import torch
from PIL import Image
from test_learning import HardToy

import global_ppo
import hybrid_model
import lux_wrapper as lux
import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (trajsep_ppo, global_ppo)
both = pytest.mark.parametrize("script", SCRIPTS)
GAME = {"map_size": 24, "min_factories": 1, "max_factories": 2, "max_robots": 2}
# What the scripts are started with: 3 updates of 2 epochs of 2 minibatches
BASE = (
    "--no-cuda --num-workers 0 --total-timesteps 48 --num-envs 2 --num-steps 8 --num-minibatches 2 "
    "--learning-rate 0.01 --gamma 0.9 --eval-episodes 1 "
    "--env-kwargs map_size 24 min_factories 1 max_factories 2 max_robots 2 "
)


class Toy(HardToy):
    """The toy game with the wrapper's arguments; notes the seeds it is given."""

    metadata = HardToy.metadata | {"render_modes": ["rgb_array"]}

    def __init__(self, num_envs, group_by="entity", **_):
        super().__init__(num_envs, slots=6, clusters=3 if group_by == "cluster" else None)
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return super().reset(seed=seed)

    def render(self):
        return [np.full((8, 8, 3), time, np.uint8) for time in self.time]


# The real game, for four steps
SHORT = functools.partial(lux.LuxVecEnv, engine_options={"max_episode_length": 4})


@dataclasses.dataclass
class Run:
    """What a script did: its folder, and its environments with the `options` they were given."""

    folder: Path
    envs: list

    def played(self, held_out):
        """The environment of the training, or of the evaluation."""
        return next(x for x in self.envs if bool(x.options.get("held_out")) == held_out)

    @property
    def checkpoints(self):
        return {int(path.stem[11:]): path for path in self.folder.glob("checkpoint_*.pt")}

    @property
    def last(self):
        """Content of the last checkpoint."""
        return torch.load(self.checkpoints[max(self.checkpoints)], weights_only=True)

    @property
    def matches(self):
        """The evaluation with sampled actions: name of a metric -> a number for each match."""
        return json.loads((self.folder / "evaluation.json").read_text())["sampled"]["matches"]


def no_log(folder, **_):
    """A writer that only makes the run's folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return MagicMock()


def start(script, cwd, flags="", game=Toy):
    """Start a script in a folder as a user does, but in this process and on another game."""
    envs = []

    def make(num_envs, **options):
        envs.append(game(num_envs, **options))
        envs[-1].options = options
        return envs[-1]

    cwd.mkdir(exist_ok=True)
    path = f"{ROOT / script.__name__}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [path, *flags.split()])
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(lux, "LuxVecEnv", make)
        patch.setattr(torch.utils.tensorboard, "SummaryWriter", no_log)
        runpy.run_path(path, run_name="__main__")
    latest = max((cwd / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return Run(latest, envs)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Function script -> the run of the base flags."""
    new_folder = tmp_path_factory.mktemp
    return functools.cache(lambda script: start(script, new_folder(script.__name__), BASE))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


# -- Flags ---------------------------------------------------------------------------------


def given(name):
    """What both the training's and the evaluation's environment were made with."""
    return lambda run: [run.played(held_out).options[name] for held_out in (False, True)]


# Flag -> how it is given, what shows its effect, what that is without it, and with it
EFFECTS = {
    "exp_name": ("mine", lambda run: run.folder.name.startswith("mine__1__"), False, True),
    "eval_episodes": ("3", lambda run: [len(x) for x in run.matches.values()], [1, 1], [3, 3]),
    "eval_steps": ("3", lambda run: len(run.matches), 2, 0),
    "save_every": ("2", lambda run: sorted(run.checkpoints), [48], [32, 48]),
    "num_workers": ("3", given("num_workers"), [0, 0], [3, 3]),
    "env_kwargs": ("max_robots 4", given("max_robots"), [2, 2], [4, 4]),
    "group_by": ("cluster", given("group_by"), ["entity"] * 2, ["cluster"] * 2),
}


@both
@pytest.mark.parametrize("flag", EFFECTS)
def test_effect(script, flag, base, tmp_path):
    value, effect, without, with_it = EFFECTS[flag]
    if hasattr(script.Args, flag):
        assert effect(base(script)) == without
        argument = f"--{flag.replace('_', '-')} {value}"
        assert effect(start(script, tmp_path, BASE + argument)) == with_it


@both
def test_seed(script, tmp_path):
    """It sets the maps and the parameters at the start; the evaluation always has the same maps."""
    flags = f"{BASE} --learning-rate 1e-9 --seed"
    seeds = (1, 1, 2)
    runs = [start(script, tmp_path / str(i), f"{flags} {x}") for i, x in enumerate(seeds)]
    assert [run.played(held_out=False).seeds for run in runs] == [[1], [1], [2]]
    assert [run.played(held_out=True).seeds for run in runs] == [[7000], [7000], [7000]]
    first, again, other = (run.last["model"] for run in runs)
    assert same(first, again)
    weights = [name for name, x in first.items() if x.dim() > 1]
    assert not any(torch.allclose(first[name], other[name]) for name in weights)


@both
def test_global_generators_are_left_alone(script, monkeypatch, tmp_path):
    """Nothing draws from `random` and `numpy.random`: a checkpoint need not hold their states."""
    monkeypatch.setattr(lux, "LuxVecEnv", SHORT)
    sizes = {"num_envs": 2, "num_steps": 8, "total_timesteps": 48, "eval_episodes": 1}
    args = script.Args(**sizes, num_workers=0)
    before = random.getstate(), str(np.random.get_state())
    agent = script.train(args, str(tmp_path), torch.device("cpu"))
    script.evaluate(agent, SHORT(1, num_workers=0, held_out=True), 4, "cpu")
    assert (random.getstate(), str(np.random.get_state())) == before


@both
@pytest.mark.parametrize(
    "gpus, processes, flag, expected",
    [(1, 1, "", "cuda"), (1, 1, "--cuda", "cuda"), (1, 1, "--no-cuda", "cpu"), (0, 1, "", "cpu")]
    + [(1, 2, "", "cpu"), (2, 2, "", "cuda")],
)
def test_cuda(script, gpus, processes, flag, expected, monkeypatch, tmp_path):
    """The network goes to the GPU where each process of a machine has one, unless --no-cuda is given."""
    to = MagicMock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(hybrid_model.HybridNet, "to", to)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit):
        start(script, tmp_path, BASE.replace("--no-cuda", flag))
    (device,) = to.call_args.args
    assert device.type == expected


@both
def test_track(script, monkeypatch, tmp_path):
    """Weights & Biases gets the run's name and flags, and follows TensorBoard; only if asked."""
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    start(script, tmp_path / "without", BASE)
    wandb.init.assert_not_called()
    run = start(script, tmp_path / "with", f"{BASE} --track")
    ((_, options),) = wandb.init.call_args_list
    assert options["name"] == options["id"] == run.folder.name
    assert options["sync_tensorboard"] is True
    assert options["config"]["gamma"] == 0.9 and options["config"]["env_kwargs"] == GAME


@both
def test_evaluate(script, tmp_path):
    """Nothing is trained or overwritten: a run is evaluated again, with its flags, in a new folder."""
    trained = start(script, tmp_path, f"{BASE} --eval-episodes 10")
    before = contents(trained.folder)
    run = start(script, tmp_path, f"--evaluate {trained.folder}")
    assert contents(trained.folder) == before and run.matches == trained.matches
    assert re.fullmatch(rf"evaluate__{script.__name__}__1__\d+", run.folder.name)
    assert [path.name for path in run.folder.iterdir()] == ["evaluation.json"]
    played = [env for env in run.envs if env.seeds]
    assert [env.options for env in played] == [trained.played(held_out=True).options] * 2

    trained = start(script, tmp_path, f"{BASE} --exp-name other --seed 5")
    run = start(script, tmp_path, f"--evaluate {trained.folder}")
    assert re.fullmatch(r"evaluate__other__5__\d+", run.folder.name)

    (tmp_path / "elsewhere").mkdir()
    path = trained.checkpoints[48].rename(tmp_path / "elsewhere" / "model.pt")
    run = start(script, tmp_path, f"--evaluate {path} --eval-episodes 2")
    assert len(run.matches["l"]) == 2 and [*path.parent.iterdir()] == [path]


@both
def test_capture_video(script, tmp_path):
    """A match on the first held-out map is drawn in this process; the evaluation stays as it is."""
    flags = f"{BASE} --eval-episodes 2 --num-workers 1"
    without = start(script, tmp_path / "without", flags)
    assert not (without.folder / "video.gif").exists()
    run = start(script, tmp_path / "with", f"{flags} --capture-video")
    assert run.matches == without.matches
    *others, drawn = run.envs
    assert not any("render_mode" in env.options for env in others)
    different = {"render_mode": "rgb_array", "num_workers": 0}
    assert drawn.options == others[-1].options | different
    assert drawn.num_envs == 1 and drawn.seeds == [7000]
    with Image.open(run.folder / "video.gif") as video:
        assert video.n_frames == 3  # of steps 0, 4 and 8
    run = start(script, tmp_path, f"--evaluate {run.folder} --eval-episodes 0 --capture-video")
    assert [path.name for path in run.folder.iterdir()] == ["video.gif"]


@both
def test_flags_override_those_of_the_run(script, tmp_path):
    """The learning rate too, which the optimizer's state has as well; of the options some.

    Before that the run has ended without an evaluation, as it was given --eval-episodes 0.
    """
    flags = "--no-anneal-lr --total-timesteps 32 --eval-episodes 0"
    first = start(script, tmp_path, BASE + flags)
    assert not any(env.options.get("held_out") for env in first.envs)
    assert not (first.folder / "evaluation.json").exists()
    flags = "--total-timesteps 48 --learning-rate 0.5 --env-kwargs map_size 32 reward lichen"
    run = start(script, tmp_path, f"--resume {first.folder} {flags} --eval-episodes 1")
    assert run.folder == first.folder
    options = GAME | {"map_size": 32, "reward": "lichen"}
    for held_out in (False, True):
        assert options.items() <= run.played(held_out).options.items()
    args = run.last["args"]
    assert args["env_kwargs"] == options and args["resume"] is None
    assert args["learning_rate"] == 0.5 and args["gamma"] == 0.9
    assert run.last["optimizer"]["param_groups"][0]["lr"] == 0.5


@both
def test_resume(script, tmp_path):
    """From an older checkpoint a new run begins, with the same matches and numbers.

    The later checkpoints stay as they are.
    """
    first = start(script, tmp_path / "first", f"{BASE} --save-every 1", SHORT)
    before = contents(first.folder)
    assert sorted(first.checkpoints) == [32, 48]
    flags = f"--resume {first.checkpoints[32]}"
    second = start(script, tmp_path / "second", flags, SHORT)
    assert contents(first.folder) == before
    assert [*second.checkpoints] == [48] and same(second.last["model"], first.last["model"])
    assert second.folder.name.startswith(f"{script.__name__}__1__")


@both
def test_resume_with_longer_rollouts(script, tmp_path):
    """No more than --total-timesteps is played, and every update of the schedule at most once."""
    first = start(script, tmp_path, f"{BASE} --total-timesteps 16 --exp-name short")
    run = start(script, tmp_path, f"--resume {first.folder} --num-steps 16 --total-timesteps 64")
    assert max(run.checkpoints) == 48  # the second update of two, whose rollouts have 32 steps
    assert run.last["optimizer"]["state"][0]["step"] == 4 + 4


@both
def test_other_names_in_a_run(script, tmp_path):
    """Files that the script did not write are neither read nor deleted, when a run is continued."""
    first = start(script, tmp_path, f"{BASE} --total-timesteps 32 --save-every 1")
    assert sorted(first.checkpoints) == [16, 32]
    mine = ["checkpoint_64 copy.pt", "checkpoint_16 (1).pt", "checkpoint_16_best.pt", "checkpoint_.pt"]
    for name in mine:
        (first.folder / name).write_bytes(b"mine")
    start(script, tmp_path, f"--resume {first.folder} --total-timesteps 64")
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted([*mine, "checkpoint_48.pt", "checkpoint_64.pt", "evaluation.json"])


@both
def test_nothing_left_to_train(script, tmp_path, capsys):
    """A finished run that is continued is evaluated, and says that nothing is trained."""
    flags = f"{BASE} --total-timesteps 40 --eval-episodes"
    first = start(script, tmp_path, f"{flags} 0")
    checkpoint = contents(first.folder)
    assert "nothing is trained" not in capsys.readouterr().out
    run = start(script, tmp_path, f"--resume {first.folder} --eval-episodes 1")
    assert run.matches and checkpoint.items() <= contents(run.folder).items()
    assert "--total-timesteps leaves no whole rollout to play: nothing is trained" in capsys.readouterr().out


@both
def test_arrays_in_any_order(script, base, tmp_path):
    """An environment may give views, such as boards with other axes in memory: the same is learned."""

    def views(obs):
        return {key: np.flip(np.flip(x, -1).copy(order="F"), -1) for key, x in obs.items()}

    class Views(Toy):
        def reset(self, **options):
            return views(super().reset(**options)[0]), {}

        def step(self, actions):
            obs, *others = super().step(actions)
            return views(obs), *others

    run = start(script, tmp_path, BASE, Views)
    assert same(run.last["model"], base(script).last["model"]) and run.matches == base(script).matches


@both
def test_env_id(script, tmp_path, monkeypatch):
    """The class is looked for in the current folder first."""
    (tmp_path / "mine.py").write_text("from test_flags import Toy as Mine\n")
    run = start(script, tmp_path, f"{BASE} --env-id mine:Mine")
    monkeypatch.delitem(sys.modules, "mine")
    assert run.checkpoints and run.matches and not run.envs, "another game was played"


def test_every_flag_has_its_test():
    own = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    commands = [test_learner.BASE, *test_learner.CASES.values()]
    learned = re.findall(r"--(?:no-)?([\w-]+)", " ".join(commands))
    tested = {*EFFECTS, *own, *(flag.replace("-", "_") for flag in learned)}
    for script in SCRIPTS:
        fields = {field.name for field in dataclasses.fields(script.Args)}
        assert fields <= tested


# -- Evaluation ----------------------------------------------------------------------------


class Matches:
    """Match n (from 0) in place i takes i + 1 steps; its length reads 100 n + i, its returns -n, 2 i."""

    def __init__(self, num_envs):
        self.place = np.arange(num_envs)
        self.obs = {"kind": np.ones((num_envs, 2, 3), np.int64)}
        self.actions = []

    def reset(self, seed=None):
        return self.obs, {}

    def step(self, actions):
        self.actions.append(actions.copy())
        ended = len(self.actions) % (self.place + 1) == 0
        number = len(self.actions) // (self.place + 1) - 1
        returns = np.stack([-number, 2 * self.place], -1)
        episode = {"l": 100 * number + self.place, "r": returns}
        return self.obs, None, ended, ~ended, {"_episode": ended, "episode": episode}

    def close(self):
        pass


PROBS = torch.tensor([0.6, 0.3, 0.1, 0.0])


def policy(obs):
    """In place of a network: always the same policy, and no values."""
    return PROBS.log().expand(*obs["kind"].shape, 4), None, None


def evaluate(script, episodes, **how):
    """Metrics, and all actions taken [steps, N, P, E]."""
    env = Matches(episodes)
    return script.evaluate(policy, env, 100, "cpu", **how), np.stack(env.actions)


@both
def test_each_match_counts_once(script):
    """Short matches are over many times before the longest: the first of each place counts."""
    metrics, actions = evaluate(script, 5)
    assert metrics["l"] == [0, 1, 2, 3, 4]
    assert np.array_equal(metrics["r"], [[0, 0], [0, 2], [0, 4], [0, 6], [0, 8]])
    assert actions.shape == (5, 5, 2, 3), "something is played after the longest match"


@both
def test_actions_are_sampled(script):
    """By their probabilities, each entity's independently; with random numbers of its own."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _, actions = evaluate(script, 60)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert np.array_equal(evaluate(script, 60)[1], actions)
    share = np.bincount(actions.ravel(), minlength=4) / actions.size
    assert share == pytest.approx(PROBS.numpy(), abs=0.02) and share[3] == 0
    alike = (actions[:, :, 0, 0] == actions[:, :, 1, 2]).mean()
    assert alike == pytest.approx(0.46, abs=0.05)
    assert (evaluate(script, 5, greedy=True)[1] == 0).all()
