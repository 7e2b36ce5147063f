"""Every flag does what it says: the scripts are started with it and without it, on a toy game or on the real one.

The arithmetic behind the flags of the algorithm is tested elsewhere; here it is enough that another number trains other
parameters. The second half is about what is played: training maps, held-out maps, and the evaluation.
"""

import dataclasses
import functools
import json
import random
import runpy
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import luxai_s2
import numpy as np
import pytest
import torch
from PIL import Image
from test_learning import HardToy
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import global_ppo
import hybrid_model
import lux_wrapper as lux
import trajsep_ppo

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (trajsep_ppo, global_ppo)
# What the scripts are started with: 3 updates of 2 epochs of 2 minibatches
BASE = (
    "--no-cuda --num-workers 0 --env-kwargs map_size 24 min_factories 1 max_factories 2 max_robots 2 "
    "--eval-episodes 1 "
    "--total-timesteps 48 --num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 2 --learning-rate 0.01 "
    "--max-grad-norm 1000 --gamma 0.9 --gae-lambda 0.8 --clip-coef 0.2 --ent-coef 0.01 --vf-coef 0.1 "
    "--positive-reward-weight 1.1 "
)


class Toy(HardToy):
    """The toy game with the wrapper's arguments; counts what is asked of it."""

    def __init__(self, num_envs, group_by="entity", **_):
        super().__init__(num_envs, slots=6, clusters=3 if group_by == "cluster" else None, penalty=0.5)
        self.seeds, self.steps = [], 0

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return super().reset(seed=seed)

    def step(self, actions):
        self.steps += 1
        return super().step(actions)

    def render(self):
        return [np.full((8, 8, 3), self.steps, np.uint8)] * self.num_envs


SHORT = functools.partial(lux.LuxVecEnv, engine_options={"max_episode_length": 4})  # the real game, for four steps


@dataclasses.dataclass
class Run:
    """What a script did: its folder, its environments, and what went through its network and its optimizer."""

    folder: Path = None
    envs: list = dataclasses.field(default_factory=list)  # with `options`, and `maps`, the seeds given to the engine
    at_first: dict = None  # parameters when the network was first used
    minibatches: list = dataclasses.field(default_factory=list)  # teams in each forward that is learned from
    rates: list = dataclasses.field(default_factory=list)  # learning rate of each step of the optimizer
    norms: list = dataclasses.field(default_factory=list)  # norm of the gradient that it was given

    def played(self, held_out):
        """The environment of the training, or that of the evaluation."""
        return next(x for x in self.envs if bool(x.options.get("held_out")) == held_out)

    @property
    def checkpoints(self):
        return {int(path.stem.split("_")[1]): path for path in self.folder.glob("checkpoint_*.pt")}

    @property
    def model(self):
        return torch.load(self.checkpoints[max(self.checkpoints)], weights_only=True)["model"]

    @property
    def matches(self):
        """What the evaluation wrote: name of a metric -> a number for each match."""
        return json.loads((self.folder / "evaluation.json").read_text())["matches"]


def no_log(folder, **_):
    """A writer that only makes the run's folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return MagicMock()


def start(script, cwd, flags="", game=Toy):
    """Start a script in a folder as a user does, but in this process and on another game."""
    run, engine_reset = Run(), luxai_s2.LuxAI_S2.reset

    def make(num_envs, **options):
        env = game(num_envs, **options)
        env.options, env.maps = options, []
        run.envs.append(env)
        return env

    def before_reset(engine, seed=None, **options):
        run.envs[-1].maps.append(seed)
        return engine_reset(engine, seed=seed, **options)

    def before_forward(module, inputs):
        if isinstance(module, hybrid_model.HybridNet):
            run.at_first = run.at_first or {name: x.clone() for name, x in module.state_dict().items()}
            if torch.is_grad_enabled():
                run.minibatches.append(len(inputs[0]["kind"]))

    def before_step(optimizer, *_):
        (group,) = optimizer.param_groups
        run.rates.append(group["lr"])
        run.norms.append(torch.cat([x.grad.flatten() for x in group["params"] if x.grad is not None]).norm().item())

    cwd.mkdir(exist_ok=True)
    hooks = register_module_forward_pre_hook(before_forward), register_optimizer_step_pre_hook(before_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
        patch.setattr(lux, "LuxVecEnv", make)
        patch.setattr(luxai_s2.LuxAI_S2, "reset", before_reset)
        patch.setattr(torch.utils.tensorboard, "SummaryWriter", no_log)
        try:
            runpy.run_path(str(ROOT / f"{script.__name__}.py"), run_name="__main__")
        finally:
            for hook in hooks:
                hook.remove()
    run.folder = max((cwd / "runs").iterdir())  # the latest one
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Function script -> the run of the base flags."""
    return functools.cache(lambda script: start(script, tmp_path_factory.mktemp(script.__name__), BASE))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------------
# The table of flags
# ------------------------------------------------------------------------------------------------------


def given(name):
    """What both the training's and the evaluation's environment were made with."""
    return lambda run: [run.played(held_out).options[name] for held_out in (False, True)]


def sizes(run):
    """Matches and steps played in training, minibatches learned from, teams in each."""
    env, (teams,) = run.played(held_out=False), {*run.minibatches}
    assert len(run.rates) == len(run.minibatches)
    return env.num_envs, env.steps, len(run.minibatches), teams


# Flag -> how it is given, what shows its effect, what that is without it, and with it
SHOWN = {
    "exp_name": ("--exp-name mine", lambda run: run.folder.name.startswith("mine__1__"), False, True),
    "eval_episodes": ("--eval-episodes 3", lambda run: [*map(len, run.matches.values())], [1, 1], [3, 3]),
    "save_every": ("--save-every 2", lambda run: sorted(run.checkpoints), [48], [32, 48]),
    "num_workers": ("--num-workers 3", given("num_workers"), [0, 0], [3, 3]),
    "env_kwargs": ("--env-kwargs max_robots 4", given("max_robots"), [2, 2], [4, 4]),
    "group_by": ("--group-by cluster", given("group_by"), ["entity"] * 2, ["cluster"] * 2),
    "total_timesteps": ("--total-timesteps 47", sizes, (2, 24, 12, 16), (2, 16, 8, 16)),
    "num_envs": ("--num-envs 4", sizes, (2, 24, 12, 16), (4, 8, 4, 32)),
    "num_steps": ("--num-steps 4", sizes, (2, 24, 12, 16), (2, 24, 24, 8)),
    "num_minibatches": ("--num-minibatches 4", sizes, (2, 24, 12, 16), (2, 24, 24, 8)),
    "update_epochs": ("--update-epochs 3", sizes, (2, 24, 12, 16), (2, 24, 18, 16)),
    # At the end of the first epoch the policy has moved: no update has a second one.
    "target_kl": ("--target-kl 1e-9", sizes, (2, 24, 12, 16), (2, 24, 6, 16)),
    "learning_rate": ("--learning-rate 0.02", lambda run: run.rates[0], 0.01, 0.02),
    "anneal_lr": ("--no-anneal-lr", lambda run: [round(300 * x, 6) for x in run.rates[::4]], [3, 2, 1], [3, 3, 3]),
    "max_grad_norm": ("--max-grad-norm 0.001", lambda run: {round(x, 6) for x in run.norms} == {0.001}, False, True),
}
# Flag -> how it is given; what shows its effect is that other parameters are trained
LEARNING = {
    "gamma": "--gamma 0.5",
    "gae_lambda": "--gae-lambda 0.5",
    "norm_adv": "--no-norm-adv",
    "clip_coef": "--clip-coef 0.001",
    "ent_coef": "--ent-coef 0.1",
    "anneal_ent": "--no-anneal-ent",
    "vf_coef": "--vf-coef 1",
    "positive_reward_weight": "--positive-reward-weight 2",
    "agent_reward_weight": "--agent-reward-weight 0.5",
    "group_by": "--group-by cluster",
}


def of_each_script(table):
    """(script, flag) for the flags in a table that a script has."""
    return [(script, flag) for script in SCRIPTS for flag in table if hasattr(script.Args, flag)]


@pytest.mark.parametrize("script, flag", of_each_script(SHOWN))
def test_effect(script, flag, base, tmp_path):
    argument, effect, without, with_it = SHOWN[flag]
    assert effect(base(script)) == without
    assert effect(start(script, tmp_path, BASE + argument)) == with_it


@pytest.mark.parametrize("script, flag", of_each_script(LEARNING))
def test_effect_on_what_is_learned(script, flag, base, tmp_path):
    """The network is the same at the start, and another one at the end."""
    run = start(script, tmp_path, BASE + LEARNING[flag])
    assert same(run.at_first, base(script).at_first) and not same(run.model, base(script).model)


@pytest.mark.parametrize("script", SCRIPTS)
def test_seed(script, base, tmp_path):
    """It sets the maps, and the parameters at the start and at the end; the evaluation has the same maps always."""
    runs = [base(script), *(start(script, tmp_path / str(seed), f"{BASE} --seed {seed}") for seed in (1, 2))]
    training, evaluation = ([run.played(held_out) for run in runs] for held_out in (False, True))
    assert [env.seeds for env in training] == [[1], [1], [2]]
    assert same(runs[0].model, runs[1].model)
    assert not any(torch.equal(x, runs[2].at_first[name]) for name, x in runs[0].at_first.items() if x.dim() > 1)
    assert evaluation[0].seeds == evaluation[2].seeds


@pytest.mark.parametrize("script", SCRIPTS)
def test_global_generators_are_left_alone(script, monkeypatch, tmp_path):
    """Nothing draws from `random` and `numpy.random`, so a checkpoint need not hold their states."""
    monkeypatch.setattr(lux, "LuxVecEnv", SHORT)
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 48, "eval_episodes": 1}
    args, before = script.Args(**sizes, num_workers=0), (random.getstate(), np.random.get_state())
    script.evaluate(script.train(args, str(tmp_path), torch.device("cpu")), args, torch.device("cpu"))
    after = random.getstate(), np.random.get_state()
    assert before[0] == after[0] and all(np.array_equal(x, y) for x, y in zip(before[1], after[1]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_target_that_is_not_reached(script, base, tmp_path):
    assert same(start(script, tmp_path, f"{BASE} --target-kl 1e9").model, base(script).model)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_evaluation(script, tmp_path):
    """With --eval-episodes 0 a run ends with its training."""
    run = start(script, tmp_path, f"{BASE} --eval-episodes 0")
    assert run.checkpoints and not (run.folder / "evaluation.json").exists()
    assert not any(env.options.get("held_out") for env in run.envs)


class Reached(BaseException):
    """The network is sent to a device."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda(script, monkeypatch, tmp_path):
    """The network goes to the GPU where there is one, unless --no-cuda is given."""

    def to(net, device):
        raise Reached(torch.device(device).type)

    def device_of(flags):
        with pytest.raises(Reached) as reached:
            start(script, tmp_path / str(len(list(tmp_path.iterdir()))), flags)
        return str(reached.value)

    monkeypatch.setattr(hybrid_model.HybridNet, "to", to)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    default = BASE.replace("--no-cuda", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of(flags) for flags in (BASE, default, f"{default} --cuda")] == ["cpu", "cuda", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(default) == "cpu"


@pytest.mark.parametrize("script", SCRIPTS)
def test_track(script, monkeypatch, tmp_path):
    """Weights and Biases gets the run's name and flags, and follows TensorBoard; only with the flag."""
    wandb = types.ModuleType("wandb")
    wandb.init = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    start(script, tmp_path / "without", BASE)
    wandb.init.assert_not_called()
    run = start(script, tmp_path / "with", f"{BASE} --track")
    ((_, options),) = wandb.init.call_args_list
    assert options["name"] == options["id"] == run.folder.name and options["sync_tensorboard"] is True
    assert options["config"]["gamma"] == 0.9 and options["config"]["env_kwargs"]["map_size"] == 24


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluate(script, base, tmp_path):
    """Nothing is trained: the evaluation of a run is made again, with its flags, in its folder."""
    trained = start(script, tmp_path, BASE)
    expected, files = trained.matches, {path: path.read_bytes() for path in trained.checkpoints.values()}
    (trained.folder / "evaluation.json").unlink()
    run = start(script, tmp_path, f"--evaluate {trained.folder}")
    assert run.folder == trained.folder and run.matches == expected and not run.minibatches
    assert same(run.at_first, trained.model)
    assert {path: path.read_bytes() for path in run.checkpoints.values()} == files
    assert run.played(held_out=True).options == trained.played(held_out=True).options
    assert not any(env.seeds for env in run.envs if env is not run.played(held_out=True))
    (path,) = files
    assert len(start(script, tmp_path, f"--evaluate {path} --eval-episodes 2").matches["l"]) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_capture_video(script, base, tmp_path):
    """A match on the first held-out map is drawn in this process; the evaluation itself stays as it is."""
    run = start(script, tmp_path, f"{BASE} --capture-video")
    assert run.matches == base(script).matches
    *others, drawn = run.envs
    assert drawn.options | {"render_mode": None} == others[-1].options | {"render_mode": None}
    assert drawn.options["render_mode"] == "rgb_array" and drawn.num_envs == 1 and drawn.seeds == [0]
    assert not any("render_mode" in env.options for env in others)
    with Image.open(run.folder / "video.gif") as video:
        assert video.n_frames == -(-drawn.steps // 4) > 1
    assert not (base(script).folder / "video.gif").exists()


CONSTANT = f"{BASE} --no-anneal-lr --no-anneal-ent --positive-reward-weight 1"


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume(script, tmp_path):
    """A run continues in its folder, with its flags, as one that never stopped (on real maps)."""
    whole = start(script, tmp_path / "whole", CONSTANT, SHORT)
    first = start(script, tmp_path / "parts", f"{CONSTANT} --total-timesteps 32", SHORT)
    saved = first.model
    run = start(script, tmp_path / "parts", f"--resume {first.folder} --total-timesteps 48", SHORT)
    assert run.folder == first.folder and sorted(run.checkpoints) == [32, 48]
    assert same(run.at_first, saved) and len(run.minibatches) == 4
    assert same(run.model, whole.model) and not same(run.model, saved)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_override_those_of_the_run(script, tmp_path):
    """The learning rate too, which the optimizer's state has as well; of the options only the ones given."""
    first = start(script, tmp_path, f"{CONSTANT} --total-timesteps 32")
    flags = f"--resume {first.folder} --total-timesteps 48 --learning-rate 0.5 --env-kwargs map_size 32 reward lichen"
    run = start(script, tmp_path, flags)
    assert {*first.rates} == {0.01} and {*run.rates} == {0.5} and run.folder == first.folder
    options = {"map_size": 32, "min_factories": 1, "max_factories": 2, "max_robots": 2, "reward": "lichen"}
    for held_out in (False, True):
        assert options.items() <= run.played(held_out).options.items()
    args = torch.load(run.checkpoints[48], weights_only=True)["args"]
    assert args["env_kwargs"] == options and args["learning_rate"] == 0.5 and args["gamma"] == 0.9
    assert args["resume"] is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_from_an_older_checkpoint(script, tmp_path):
    """A new run begins, with the same matches and numbers; the later checkpoints stay as they are."""
    first = start(script, tmp_path / "first", f"{BASE} --save-every 1", SHORT)
    files = {path: path.read_bytes() for path in first.folder.iterdir()}
    assert sorted(first.checkpoints) == [32, 48]
    second = start(script, tmp_path / "second", f"--resume {first.checkpoints[32]}", SHORT)
    assert {path: path.read_bytes() for path in first.folder.iterdir()} == files
    assert sorted(second.checkpoints) == [48] and same(second.model, first.model)


@pytest.mark.parametrize("script", SCRIPTS)
def test_env_id(script, tmp_path, monkeypatch):
    """The class is looked for in the current folder first."""
    (tmp_path / "mine.py").write_text("from test_flags import Toy\n\n\nclass Mine(Toy):\n    made = []\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    run = start(script, tmp_path, f"{BASE} --env-id mine:Mine")
    monkeypatch.delitem(sys.modules, "mine")
    assert run.checkpoints and run.matches and not run.envs, "another game was played"


def test_every_flag_has_its_test():
    own = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    fields = {field.name for script in SCRIPTS for field in dataclasses.fields(script.Args)}
    assert fields - {*SHOWN, *LEARNING, *own} == set()
    assert {*SHOWN, *LEARNING} <= fields
    for flag, argument in [(flag, row[0]) for flag, row in SHOWN.items()] + [*LEARNING.items()]:
        assert argument.split()[0].removeprefix("--").removeprefix("no-") == flag.replace("_", "-")


# ------------------------------------------------------------------------------------------------------
# Maps and evaluation
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_and_evaluation_share_no_map(script, monkeypatch, tmp_path):
    """With half of all seeds held out and matches of four steps: 2 x 7 others in training, then the first three."""
    monkeypatch.setattr(lux, "HELD_OUT_SEEDS", 2**30)
    run = start(script, tmp_path, f"{BASE} --eval-episodes 3", SHORT)
    maps = run.played(held_out=False).maps
    assert len(maps) == len({*maps}) == 14 and min(maps) >= 2**30
    assert run.played(held_out=True).maps[:3] == [0, 1, 2] and max(run.played(held_out=True).maps) < 2**30
    assert run.matches["l"] == [4, 4, 4]


class Matches:
    """Match n (from 0) in place i takes i + 1 steps and says that its length is 100 n + i, its returns -n and 2 i."""

    def __init__(self, num_envs):
        self.num_envs, self.actions = num_envs, []
        self.obs = {"kind": np.ones((num_envs, 2, 3), np.int64)}

    def reset(self, seed=None):
        self.played, self.time = np.zeros(self.num_envs, int), np.zeros(self.num_envs, int)
        return self.obs, {}

    def step(self, actions):
        self.actions.append(actions.copy())
        self.time += 1
        place = np.arange(self.num_envs)
        ended = self.time == place + 1
        infos = {}
        if ended.any():
            returns = np.stack([-self.played, 2 * place], -1).astype(float)
            infos = {"_episode": ended, "episode": {"l": 100 * self.played + place, "r": returns}}
        self.played, self.time = self.played + ended, np.where(ended, 0, self.time)
        return self.obs, np.zeros(actions.shape), ended, np.zeros_like(ended), infos

    def close(self):
        pass


PROBS = torch.tensor([0.6, 0.3, 0.1, 0.0])


class Fixed(torch.nn.Module):
    """Always the same policy."""

    def forward(self, obs):
        shape = obs["kind"].shape
        return PROBS.log().expand(*shape, 4), torch.zeros(shape), torch.zeros(shape[0])


@pytest.fixture(params=SCRIPTS)
def evaluated(request, monkeypatch):
    """Function number of matches -> (metrics, options of the environment, all actions taken)."""
    script = request.param

    def evaluate(episodes):
        envs = []

        def make(args, num_envs, **options):
            envs.append((Matches(num_envs), options))
            return envs[-1][0]

        monkeypatch.setattr(script, "make_envs", make)
        metrics = script.evaluate(Fixed(), script.Args(eval_episodes=episodes), torch.device("cpu"))
        ((env, options),) = envs
        return metrics, options, np.stack(env.actions)

    return evaluate


def test_each_match_counts_once(evaluated):
    """Short matches are over many times before the longest one is: the first of each place counts, for both teams."""
    metrics, options, actions = evaluated(5)
    assert metrics == {"l": [0, 1, 2, 3, 4], "r": [0, 1, 2, 3, 4]} and options["held_out"] is True
    assert actions.shape == (5, 5, 2, 3)  # and nothing is played after it


def test_actions_are_sampled(evaluated):
    """By their probabilities: neither the likeliest ones nor uniform ones, and each entity's on its own."""
    _, _, actions = evaluated(60)
    share = np.bincount(actions.ravel(), minlength=4) / actions.size
    assert share == pytest.approx(PROBS.numpy(), abs=0.02) and share[3] == 0
    assert (actions[:, :, 0, 0] == actions[:, :, 1, 2]).mean() == pytest.approx(0.46, abs=0.05)


def test_own_random_numbers(evaluated):
    """Whatever was drawn before, the evaluation is the same, and leaves no trace in what is drawn after it."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    actions = evaluated(20)[2]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert np.array_equal(evaluated(20)[2], actions)
