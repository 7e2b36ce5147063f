"""The example on MAgent2's battle: the contract, and what soldiers see, do and earn."""

import csv
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("magent2", reason="needs magent2: pip install -r examples/battle/requirements.txt")

import armies  # noqa: E402
from battle_env import FEATURES, HITS, MOVES, BattleVecEnv  # noqa: E402
from check_env import check_env  # noqa: E402
from compare import fight, random_policy  # noqa: E402

from hybrid_model import HybridNet  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
COLUMN = {name: column for column, name in enumerate(FEATURES)}
HIT = len(MOVES)  # the first action that hits


def warlike(obs, rng):
    """A hit wherever one is allowed, or a move that brings the nearest enemy nearer, about."""
    enemy = obs["features"][..., COLUMN["enemy_dx"] : COLUMN["enemy_dy"] + 1]
    preference = rng.random(obs["action_mask"].shape)
    preference[..., :HIT] += enemy @ np.array(MOVES).T
    preference[..., HIT:] += 10
    return np.where(obs["action_mask"], preference, -1).argmax(-1)


def battle(num_envs, steps, blue_stays=False, **options):
    """Yields (environment, observation before, actions, result of the step) of a warlike battle."""
    env, rng = BattleVecEnv(num_envs, **options), np.random.default_rng(0)
    obs, _ = env.reset(seed=1)
    for _ in range(steps):
        before = {key: x.copy() for key, x in obs.items()}
        actions = warlike(before, rng)
        if blue_stays:
            actions[:, 1] = MOVES.index((0, 0))
        result = env.step(actions)
        yield env, before, actions, result
        obs = result[0]


def soldiers(obs):
    """(match, team, slot), position and features by name of each living soldier."""
    for where in map(tuple, np.argwhere(obs["kind"] > 0)):
        yield where, obs["position"][where], dict(zip(FEATURES, obs["features"][where].tolist()))


def first_allowed(obs):
    return obs["action_mask"].argmax(-1)


@pytest.mark.parametrize("options", [{}, {"safe_masks": False}, {"group_by": "cluster"}, {"opponent": first_allowed}])
def test_keeps_the_contract(options):
    """All clauses, with deaths and ends by time."""

    def make_env(num_envs, **given):
        return BattleVecEnv(num_envs, map_size=16, max_steps=40, **given | options)

    assert check_env(make_env, steps=100) == []


def test_other_groups_are_refused():
    with pytest.raises(ValueError, match="group_by must be entity or cluster, got squad"):
        BattleVecEnv(1, group_by="squad")


def test_sees_the_board_from_its_own_side():
    """Own channels show a soldier's health at its position; the other army sees it as an enemy's."""
    lengths = np.zeros(2)
    for env, obs, _, (_, _, terminated, *_) in battle(2, 60, map_size=20):
        alive = (obs["kind"] > 0).sum(-1) / env.size
        for (match, team, _), (x, y), row in soldiers(obs):
            cell = obs["board"][match, team, x, y]
            assert (cell == [0, 100, round(100 * row["health"]), 0, 0]).all()
            said = [row[key] for key in ("is_red", "own_army", "enemy_army")]
            assert said == pytest.approx([1 - team, alive[match, team], alive[match, 1 - team]])
            assert row["time"] * env.max_steps == pytest.approx(lengths[match], abs=1e-3)
        swapped = obs["board"][:, 1][..., [0, 3, 4, 1, 2]]
        assert (obs["board"][:, 0] == swapped).all()
        assert (obs["board"][..., 1].sum((2, 3)) == 100 * (obs["kind"] > 0).sum(-1)).all()
        lengths = np.where(terminated, 0, lengths + 1)
    health = obs["board"][..., 2]
    assert health.max() <= 100 and len(np.unique(health)) > 3, "nobody was hurt"


def test_nearest_enemy():
    """dx, dy lead to an enemy, and none is nearer."""
    near = 0
    for _, obs, *_ in battle(1, 30, map_size=20):
        for (_, team, _), here, row in soldiers(obs):
            enemies = obs["position"][0, 1 - team][obs["kind"][0, 1 - team] > 0]
            distances = np.abs(enemies - here).sum(1)
            nearest = distances.min()
            assert 8 * row["enemy_distance"] == min(nearest, 8)
            if nearest < 8:
                goal = here + np.round([8 * row["enemy_dx"], 8 * row["enemy_dy"]])
                assert (enemies[distances == nearest] == goal).all(1).any()
                near += 1
    assert near > 100


def test_moves_and_masks():
    """Soldiers go where MOVES says or are in each other's way; walls and idle hits are masked."""
    moved = 0
    for _, obs, actions, (after, _, terminated, *_) in battle(2, 60, map_size=20):
        for where, here, _ in soldiers(obs):
            board = obs["board"][where[:2]]
            mask = obs["action_mask"][where]
            for allowed, (x, y) in zip(mask[:HIT], here + MOVES):
                inside = 0 <= x < 20 and 0 <= y < 20
                assert allowed == (inside and board[x, y, 0] == 0)
            for allowed, (x, y) in zip(mask[HIT:], here + HITS):
                assert allowed == (board[x, y, 3] > 0)
            if after["kind"][where] > 0 and not terminated[where[0]]:
                action = actions[where]
                went = after["position"][where] - here
                wanted = MOVES[action] if action < HIT else (0, 0)
                assert (went == wanted).all() or (went == 0).all()
                moved += (went != 0).any()
    assert moved > 200


def test_hits_hurt_whom_they_are_aimed_at():
    """Red hits, blue stays: a victim loses 2 of 10 points for each hit, and 0.1 heal."""
    hurt = 0
    for _, before, actions, result in battle(1, 80, blue_stays=True, map_size=20):
        obs, rewards, terminated, *_ = result
        if terminated[0]:
            break
        target = {}
        hits = np.flatnonzero((before["kind"][0, 0] > 0) & (actions[0, 0] >= HIT))
        for slot in hits:
            place = before["position"][0, 0, slot] + HITS[actions[0, 0, slot] - HIT]
            target.setdefault(tuple(place), []).append(slot)
        for slot in np.flatnonzero(before["kind"][0, 1]):
            hitters = target.get(tuple(before["position"][0, 1, slot]), [])
            health, now = (10 * x["features"][0, 1, slot, COLUMN["health"]] for x in (before, obs))
            health -= 2 * len(hitters)
            paid = rewards[0, 0, hitters]
            if health > 0.01:
                assert now == pytest.approx(min(health + 0.1, 10), abs=1e-3)
                assert paid == pytest.approx(np.full(len(hitters), (1 - 0.1 - 0.005) / 5))
            else:
                assert obs["kind"][0, 1, slot] == 0
                assert paid.max() == pytest.approx((5 - 0.1 - 0.005) / 5)
            hurt += len(hitters)
    assert hurt > 25


def test_ends_and_metrics():
    """Kills are the enemy's losses, returns sums of rewards, and the larger army has won."""
    finished, returns = [], np.zeros((3, 2))
    for env, obs, _, (after, rewards, terminated, truncated, infos) in battle(3, 200, map_size=16, max_steps=16):
        returns += rewards.sum(-1)
        for match in np.flatnonzero(terminated | truncated):
            episode = {key: x[match] for key, x in infos["episode"].items()}
            left = episode["survivors"]
            assert (episode["kills"] == env.size - left[::-1]).all()
            assert terminated[match] == (left.min() == 0) and truncated[match] == (left.min() > 0)
            assert episode["l"] == 16 or terminated[match]
            assert (episode["won"] == (1 + np.sign(left - left[::-1])) / 2).all()
            np.testing.assert_allclose(episode["r"], returns[match], atol=1e-3)
            assert (after["kind"][match] == 1).all(), "the next battle has begun"
            if truncated[match]:  # whoever was left is seen a last time
                last = infos["final_obs"]["features"][match, ..., COLUMN["time"]] * infos["final_obs"]["kind"][match]
                assert (last.sum(-1) == left).all() and infos["_final_obs"][match]
            returns[match] = 0
            finished.append(left.min())
    assert min(finished) == 0 < max(finished), "some battles end with an army, some by time"


def test_opponent_plays_the_other_army():
    """Against an opponent there is one player, red in the even matches and blue in the odd ones."""
    seen = []

    def stay(obs):
        seen.append(obs)
        return np.full(obs["kind"].shape, 6)

    env = BattleVecEnv(4, map_size=16, opponent=stay)
    obs, _ = env.reset(seed=0)
    assert obs["kind"].shape == (4, 1, env.size) and env.single_action_space.shape == (1, env.size)
    start = obs["position"].copy()
    for _ in range(2):
        obs, rewards, *_ = env.step(np.full(obs["kind"].shape, MOVES.index((1, 0))))
        assert rewards.shape == (4, 1, env.size)
    assert (obs["features"][:, 0, 0, COLUMN["is_red"]] == [1, 0, 1, 0]).all()
    assert (seen[0]["features"][:, 0, COLUMN["is_red"]] == [0, 1, 0, 1]).all()
    assert (obs["position"] - start == (2, 0)).all(-1).mean() > 0.7, "the caller's army moves to the right"
    assert (seen[0]["position"] == seen[-1]["position"]).all(), "the opponent's stays"


def test_random_policy_takes_what_is_allowed():
    policy, rng = random_policy(), np.random.default_rng(0)
    mask = rng.random((50, 4, 21)) < 0.3
    mask[..., 6] = True
    actions = np.array([policy({"action_mask": mask}) for _ in range(200)])
    assert np.take_along_axis(np.broadcast_to(mask, (200, *mask.shape)), actions[..., None], -1).all()
    counts = np.bincount(actions[:, 0, 0], minlength=21)[mask[0, 0]]
    assert counts.min() > 0.5 * counts.mean()


def test_equals_are_equal():
    """Two armies that fight alike win about as often, and every battle counts once."""
    rng = np.random.default_rng(0)

    def network(obs):
        """Certain of a warlike action."""
        actions = warlike({key: x.numpy() for key, x in obs.items()}, rng)
        return torch.eye(obs["action_mask"].shape[-1])[actions].log(), None, None

    results = fight(network, lambda obs: warlike(obs, rng), 20, 16)
    assert 0.2 < results["won"].mean() < 0.8
    assert results["l"].min() > 5 and len(np.unique(results["l"])) > 2, "they do not end together"
    assert (np.maximum(results["kills"], 6 - results["survivors"]) == 6).all()


def test_seeds():
    """Matches differ by seed, by their number, and when held out."""

    def course(seed, num_envs=1, **options):
        """What the last match of an environment shows in 10 steps of a warlike battle."""
        env, rng = BattleVecEnv(num_envs, map_size=20, **options), np.random.default_rng(0)
        obs, _ = env.reset(seed=seed)
        boards = []
        for _ in range(10):
            last = warlike({key: x[-1:] for key, x in obs.items()}, rng)
            obs, *_ = env.step(np.repeat(last, num_envs, 0))
            boards.append(obs["board"][-1].copy())
        return np.array(boards)

    first = course(5)
    assert (course(5) == first).all()
    assert (course(5, num_envs=2) == course(5, first_match=1)).all()
    for other in (course(6), course(5, first_match=1), course(5, held_out=True)):
        assert (other != first).any()


def test_without_safe_masks():
    """All that the game allows is allowed: anything."""
    (_, obs, *_), *_ = battle(1, 1, map_size=16, safe_masks=False)
    assert obs["action_mask"][obs["kind"] > 0].all()


def test_render():
    """A picture of each battle, in which something happens."""
    pictures = [env.render() for env, *_ in battle(2, 8, map_size=16, render_mode="rgb_array")]
    assert len(pictures[0]) == 2 and pictures[0][0].dtype == np.uint8
    assert (pictures[0][0] != pictures[-1][0]).any(-1).mean() > 0.002


def test_small_boards_are_refused():
    with pytest.raises(ValueError, match="12 x 12"):
        BattleVecEnv(1, map_size=11)


def test_comparison_continues_and_draws(tmp_path):
    """compare.py trains, fights with every checkpoint, draws, and does nothing twice."""
    script = str(ROOT / "examples" / "battle" / "compare.py")
    flags = "--arms mappo global --seeds 1 --jobs 2 --steps 2048 --frozen-steps 1024 --battles 2 --map-size 24"
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    command = [sys.executable, script, *flags.split(), *folders]
    table = tmp_path / "out" / "battle.csv"
    written = []
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "match/s" not in result.stderr, "bars of several processes mix"
        rows = list(csv.DictReader(table.open()))
        written.append(table.stat().st_mtime_ns)
        fought = sorted({(x["arm"], x["seed"], x["global_step"], x["opponent"]) for x in rows})
        assert len(rows) == 16 and len(fought) == 8
        assert {x["global_step"] for x in rows} == {"1024", "2048"}
        assert all(float(x["kills"]) <= 16 and float(x["won"]) in (0, 0.5, 1) for x in rows)
    assert written[0] == written[1]
    for change, sentence in (
        (["--seeds", "2", "--work", str(tmp_path / "other")], "has battles against an army that is not in"),
        (["--out", str(tmp_path / "other"), "--work", str(tmp_path / "third"), "--map-size", "3"], "--map-size 3: "),
        (["--jobs", "0"], "--seeds and --jobs must be at least 1"),
    ):
        result = subprocess.run([*command, *change], capture_output=True, text=True)
        assert result.returncode == 2 and sentence in result.stderr and result.stderr.count("\n") == 1
    assert table.stat().st_mtime_ns == written[0] and not (tmp_path / "other").exists()
    assert (tmp_path / "out" / "battle.png").stat().st_size > 10_000
    won = [float(x["won"]) for x in rows if (x["arm"], x["global_step"], x["opponent"]) == ("mappo", "2048", "frozen")]
    last = (tmp_path / "out" / "battle.md").read_text().splitlines()[-1]
    assert last.split(" | ")[:2] == ["| 2,048", f"{sum(won) / 2:.0%} ({sum(won) / 2:.0%} to {sum(won) / 2:.0%})"]


def test_armies(tmp_path):
    """Every battle counts for both; the factor is of the steps until half of the frozen army are killed."""
    env = BattleVecEnv(1, map_size=16)
    for arm, seed in itertools.product(("separate", "global"), (1, 2, 1000)):
        folder = tmp_path / f"{arm}_{seed}"
        folder.mkdir()
        (folder / "done").touch()
        torch.manual_seed(seed)
        agent = HybridNet(env.single_observation_space, int(env.single_action_space.nvec.max()))
        agent.actor.bias.data[:HIT] += 3 if arm == "separate" else -3  # rather walks, or rather hits
        torch.save({"args": {"env_kwargs": {"map_size": 16}}, "model": agent.state_dict()}, folder / "checkpoint_64.pt")
    (tmp_path / "separate_3").mkdir()  # a training that has not ended
    kills = {("separate", 1): (0, 6, 6), ("separate", 2): (0, 6, 6), ("global", 1): (0, 0, 6), ("global", 2): (0, 0, 0)}
    lines = ["arm,seed,global_step,opponent,won,kills"]
    for (arm, seed), values in kills.items():
        lines += [f"{arm},{seed},{1024 * (index + 1)},frozen,{x / 6},{x}" for index, x in enumerate(values)]
        lines += [f"{arm},{seed},1024,random,1,6"]
    (tmp_path / "battle.csv").write_text("\n".join(lines))
    armies.main(armies.Args(works=(tmp_path,), out=tmp_path / "out", battles=2, jobs=1))
    rows = list(csv.DictReader((tmp_path / "out" / "armies.csv").open()))
    assert len(rows) == 8 and {x["soldiers"] for x in rows} == {"6"} and {x["seed"] for x in rows} == {"1", "2"}
    for one, other in zip(rows[::2], rows[1::2]):
        assert (one["arm"], one["opponent"]) == (other["opponent"], other["arm"]) and one["arm"] != other["arm"]
        assert float(one["won"]) + float(other["won"]) == 1
        assert float(one["kills"]) + float(other["survivors"]) == 6 == float(other["kills"]) + float(one["survivors"])
    soldiers, shares, factors = armies.against_frozen(tmp_path)
    assert soldiers == 6 and shares["separate"].tolist() == [1, 1] and shares["global"].tolist() == [1, 0]
    assert factors["separate"].tolist() == [1, 1]
    assert factors["global"].tolist() == [(2048 + 512) / (1024 + 512), np.inf]
    won = [float(x["won"]) for x in rows if x["arm"] == "separate"]
    assert f"|  | {np.mean(won):.0%} of 4 |" in (tmp_path / "out" / "armies.md").read_text()
    assert (tmp_path / "out" / "armies.png").stat().st_size > 5_000
    with pytest.raises(armies.Refused, match="has no armies"):
        armies.main(armies.Args(works=(tmp_path / "out",), out=tmp_path / "other"))
