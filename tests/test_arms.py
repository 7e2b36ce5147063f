"""The patches in benchmark/arms/: each fits the programs and trains; the groups that they make, by hand."""

import importlib.util
import shlex
import sys
from dataclasses import replace

import ablation
import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from helpers import masked_random
from in_double import double_precision
from test_encoder import SIZE, heavy, official, robot
from toy_env import ToyVecEnv

import global_ppo
import lux_wrapper as lux
import trajsep_ppo

MOVING = ("quadrants", "nearest-factory", "nearest-heavy")
GROUPS = ("robots", "factories", "kinds", "mod-2", "mod-4", *MOVING)
SHARED = ("global-critic", "shared-ratio", "shared-entropy", "shared-dones")
FACTORIES, ROBOTS = 3, 9
STAGE = {"map_size": 24, "min_factories": FACTORIES, "max_factories": FACTORIES}


class Workers(ToyVecEnv):
    """The toy game with robots, who stay if `all_live`; rewards are multiplied by `scale`."""

    def __init__(self, num_envs, all_live=False, scale=1.0, **options):
        super().__init__(num_envs, slots=6, **options)
        self.all_live, self.scale = all_live, scale
        shape = self.single_observation_space["kind"].shape
        self.single_observation_space["kind"] = gym.spaces.Box(0, 2, shape, np.int64)

    def _observe(self):
        self.live |= self.all_live
        obs = super()._observe()
        return obs | {"kind": obs["kind"] * 2}

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, rewards * np.float64(self.scale), *rest


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """Function (module, patches): the module of a copy of the programs with these patches."""

    def load(name, patches):
        folder = ablation.programs(patches, tmp_path / "programs")
        if name == "trajsep_ppo":  # it imports the network of its folder
            monkeypatch.delitem(sys.modules, "hybrid_model")
            monkeypatch.syspath_prepend(folder)
        spec = importlib.util.spec_from_file_location(f"patched_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def trained(script, folder, command="", **options):
    """The parameters after three updates."""
    args = tyro.cli(script.Args, args=shlex.split(command)[1:])
    tiny = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 48}
    tiny |= {"num_workers": 0, "env_id": "test_arms:Workers"} | options
    if not command and "agent_reward_weight" in vars(args):
        tiny = {"agent_reward_weight": 1.0} | tiny
    agent = script.train(replace(args, **tiny), folder, torch.device("cpu"))
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])


def expected(rule, kind, heavy, position, side):
    """The group of each live slot of a team under a rule, {slot: group}, by hand."""
    live = np.flatnonzero(kind).tolist()
    group = {slot: slot for slot in live}
    factories = [slot for slot in live if kind[slot] == lux.FACTORY]
    heavies = [slot for slot in live if heavy[slot]]

    def nearest(slot, others):
        return min(others, key=lambda other: abs(position[slot] - position[other]).sum())

    for slot in live:
        if slot in factories:
            group[slot] = 0 if rule in ("factories", "kinds") else slot
        elif rule in ("robots", "kinds"):
            group[slot] = FACTORIES
        elif rule.startswith("mod"):
            group[slot] = FACTORIES + (slot - FACTORIES) % int(rule[-1])
        elif rule == "quadrants":
            x, y = position[slot] > side // 2 - 1
            group[slot] = FACTORIES + (3 if x and y else 2 if x else 1 if y else 0)
        elif rule == "nearest-factory":
            group[slot] = FACTORIES + nearest(slot, factories)
        elif rule == "nearest-heavy" and heavies:
            group[slot] = nearest(slot, heavies)
    return group


@pytest.mark.parametrize("rule", GROUPS)
def test_groups(rule, patched):
    """Robots walk about: at every step each entity is in the group that the rule says."""
    wrapper = patched("lux_wrapper", [rule])
    options = STAGE | {"max_robots": ROBOTS, "safe_masks": False}
    env = wrapper.LuxVecEnv(2, num_workers=0, **options)
    obs, _ = env.reset(seed=5)
    teams = env.matches[0].engine.state.factories
    for factory in teams["player_1"].values():
        factory.cargo.metal = 30  # for light robots only
    rng, changes, groups, before = np.random.default_rng(5), 0, set(), {}
    for step in range(40):
        if step == 20:
            next(iter(teams["player_0"].values())).cargo.water = 0  # it is lost
        for team in np.ndindex(2, 2):
            seen = {key: obs[key][team].copy() for key in ("kind", "position", "group")}
            heavy = obs["features"][team][:, lux.COLUMN["is_heavy"]] > 0
            wanted = expected(rule, seen["kind"], heavy, seen["position"], 24)
            assert {slot: seen["group"][slot] for slot in wanted} == wanted
            assert ((0 <= seen["group"]) & (seen["group"] < FACTORIES + ROBOTS)).all()
            old = before.get(team, {})
            changes += sum(old.get(slot, group) != group for slot, group in wanted.items())
            groups |= {wanted[slot] for slot in wanted if seen["kind"][slot] > lux.FACTORY}
            before[team] = wanted
        obs, *_ = env.step(masked_random(rng, obs["action_mask"]))
    assert (changes > 0) == (rule in MOVING), "robots change their group where the rule goes by place"
    least = {"robots": 1, "kinds": 1, "mod-2": 2, "nearest-factory": 2}
    assert len(groups) >= least.get(rule, 3)


@pytest.mark.parametrize("arm", ablation.PATCHES)
def test_every_arm_trains(arm, patched, tmp_path):
    """Each trains with its flags, and not as the program without its patches does."""
    if arm in (*GROUPS, "random-placement", "may-wait", "global-may-wait"):
        patched("lux_wrapper", ablation.PATCHES[arm])
        options = {"env_id": "patched_lux_wrapper:LuxVecEnv", "env_kwargs": STAGE}
        mine = trained(trajsep_ppo, tmp_path, ablation.ARMS[arm], **options)
    else:
        script = {"trajsep_ppo": trajsep_ppo, "global_ppo": global_ppo}[ablation.ARMS[arm].split(".")[0]]
        options = {"env_kwargs": {}}
        if arm.endswith("-cut"):
            options = {"env_id": "lux_wrapper:LuxVecEnv", "env_kwargs": STAGE}
        changed = patched(script.__name__, ablation.PATCHES[arm])
        mine = trained(changed, tmp_path / "mine", ablation.ARMS[arm], **options)
        assert arm.endswith("-cut") or not torch.equal(mine, trained(script, tmp_path / "other"))
    assert mine.isfinite().all()


@pytest.mark.parametrize("name", ["trajsep_ppo", "global_ppo"])
def test_cut(name, patched, tmp_path, monkeypatch):
    """Training matches are asked to end after 256 steps."""
    script = patched(name, ["authors-cut"])
    asked = {}
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs, **options: asked.update(options))
    with pytest.raises(AttributeError):
        script.train(script.Args(), tmp_path, torch.device("cpu"))
    assert asked["engine_options"] == {"max_episode_length": 256}


def test_top_samples_of_one_kind(patched, tmp_path):
    """There is nothing to choose, and it says so."""
    script = patched("trajsep_ppo", ["top-1"])
    with pytest.raises(script.Refused, match="^--top-samples chooses among entities of kind 2 and above"):
        trained(script, tmp_path, env_id="toy_env:ToyVecEnv")


def test_random_placement(patched):
    """Factories stand elsewhere, and for the same map in the same cells."""
    other = patched("lux_wrapper", ["random-placement"])
    envs = [module.LuxVecEnv(2, num_workers=0) for module in (lux, other, other)]
    usual, obs, again = (env.reset(seed=1)[0] for env in envs)
    assert (usual["kind"] == obs["kind"]).all() and (again["position"] == obs["position"]).all()
    moved = (usual["position"] != obs["position"]).any(-1)
    assert moved[obs["kind"] == lux.FACTORY].mean() > 0.8


def test_may_wait(patched):
    """Factories may do nothing in the first step; without the patch none may."""
    for module, may in ((lux, False), (patched("lux_wrapper", ["may-wait"]), True)):
        obs, _ = module.LuxVecEnv(2, num_workers=0).reset(seed=1)
        assert (obs["action_mask"][obs["kind"] == lux.FACTORY][:, lux.NOTHING] == may).all()


def test_rules_of_growth(patched, monkeypatch):
    """The kept rules of the games fit the wrapper: only heavy robots dig ice, and only light ones ore."""
    monkeypatch.setattr(ablation, "PATCH_FOLDER", ablation.ROOT / "benchmark" / "matches")
    for module in (lux, patched("lux_wrapper", ["ore_patch"])):
        options = module.LuxOptions(map_size=SIZE, max_factories=FACTORIES, max_robots=ROBOTS, reward="lichen")
        encoder = module.LuxEncoder(options)
        obs = official([robot(3, 5), heavy(5, 5), robot(7, 5), heavy(3, 9)], ice=[(3, 5), (5, 5)], ore=[(7, 5), (3, 9)])
        encoder.reset(obs)
        arrays, _ = encoder.encode([lux.read_observation(obs)])
        digs = arrays["action_mask"][0, 0, FACTORIES : FACTORIES + 4, lux.DIG]
        assert digs.tolist() == ([True] * 4 if module is lux else [False, True, True, False])


def test_everything_shared_is_the_baseline(patched, tmp_path):
    """With four patches and the team's mean reward, the method trains as global_ppo.py does.

    Its reward is the mean over a team's groups, not the sum, so here it is multiplied by their
    number. Its losses are means over cells, so all teams must have as many groups.
    """
    script = patched("trajsep_ppo", SHARED)
    options = {"all_live": True, "scale": 6.0}
    with double_precision():
        folder = tmp_path / "separate"
        separate = trained(script, folder, agent_reward_weight=0.0, env_kwargs=options)
        team = trained(global_ppo, tmp_path / "team", env_kwargs={"all_live": True})
    torch.testing.assert_close(separate, team, rtol=1e-9, atol=1e-9)


def test_a_patch_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "PATCH_FOLDER", tmp_path)
    hunk = "--- a/global_ppo.py\n+++ b/global_ppo.py\n@@ -1 +1 @@\n-gone\n+new\n"
    (tmp_path / "old.patch").write_text(hunk)
    with pytest.raises(ablation.Failed, match="old.patch does not fit the programs: error: "):
        ablation.programs(["old"], tmp_path / "programs")


def test_arms():
    """Every patch is in an arm, every arm has flags that its program knows, and no two are the same."""
    used = {name for patches in ablation.PATCHES.values() for name in patches}
    assert used == {path.stem for path in ablation.PATCH_FOLDER.glob("*.patch")}
    assert set(ablation.PATCHES) < set(ablation.ARMS)
    runs = [(command, ablation.PATCHES.get(arm)) for arm, command in ablation.ARMS.items()]
    assert len(set(runs)) == len(runs)
    for arm, command in ablation.ARMS.items():
        if arm not in ablation.PATCHES:
            script, *flags = shlex.split(command)
            program = {"trajsep_ppo.py": trajsep_ppo, "global_ppo.py": global_ppo}[script]
            tyro.cli(program.Args, args=flags)
