"""Matches between two bots of Lux AI Season 2, by the official engine and the official runner's own pieces.

    python benchmark/match.py --a submission --b idle --games 20
    python benchmark/match.py --a runs/<run> --b submission
    python benchmark/match.py --a submission --b <folder> --games 20 --out games.csv --replays replays

A bot is a folder with a main file, such a file (main.py, main.js, Main.java, or a program called
main.out or main.exe), a run or one of its checkpoints, an archive of submission/pack.py, or `idle`,
which places its factories and then does nothing. Each game is on a map of its own, and the sides
alternate. The engine validates all orders. Bots are asked one after the other, and have the time that
the official runner gives.

The command line `luxai-s2` does the same for one match; it starts on Python 3.10 only.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image
from plot import ROOT, check_writable, write_csv
from tqdm import tqdm

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # luxai_s2 imports pygame, which prints a banner
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draws in memory, needs no screen
warnings.filterwarnings("ignore", "The system font")  # pygame falls back to another
sys.path.insert(0, str(ROOT / "submission"))

import luxai_s2.env  # noqa: E402
from luxai_runner.bot import Bot  # noqa: E402
from luxai_runner.ext_to_command import ext_to_command  # noqa: E402
from luxai_runner.process import BotProcess  # noqa: E402
from luxai_runner.utils import to_json  # noqa: E402
from page import board_of, snapshot, write_page  # noqa: E402

from lux_wrapper import PLAYERS, captioned, early_phase_action  # noqa: E402
from trajsep_ppo import Refused, checkpoints  # noqa: E402

STDERR_LINES, STDERR_BYTES = 5, 4000  # of a bot that fails, the last ones are shown
LONGEST = 2**26  # bytes of an answer


def main_file(bot, folder=None):
    """Path of a bot's main file, or "idle".

    Args:
        bot: as on the command line.
        folder: an empty one, where a run or an archive is laid out.

    Raises:
        Refused: if there is none.
    """
    path = Path(bot).absolute()
    # main.py first: in the official kits for other languages it starts the rest
    names = ["main.py", *(f"main{ending}" for ending in ext_to_command if ending != ".py")]
    if bot == "idle":
        return bot
    if not path.exists():
        raise Refused(f"there is no bot at {bot}")
    if path.suffix == ".pt" or (path.is_dir() and checkpoints(path)):
        from pack import write_bot  # which plays matches itself

        return write_bot(path, folder)
    if path.name.endswith(".tar.gz"):
        try:
            shutil.unpack_archive(path, folder, "gztar")
        except Exception:  # a damaged file can raise anything
            raise Refused(f"{bot} is no archive")
        path = Path(folder)
    if path.is_file():
        if path.suffix not in ext_to_command:
            endings = ", ".join(ext_to_command)
            raise Refused(f"{bot} is no program that the official runner starts ({endings})")
        return str(path)
    files = {file.name.lower(): str(file) for file in path.iterdir()}
    for name in names:
        if name in files:
            return files[name]
    raise Refused(f"there is neither a main file in {bot} ({', '.join(names)}) nor a checkpoint")


class Process(BotProcess):
    """The runner's process of a bot, for lines of any length."""

    answer, too_long = None, False  # what it wrote last; None while it has not
    stderr_end = b""

    async def start(self):
        folder, name = os.path.split(self.file_path)
        command = [f"./{name}"] if self.is_binary else [self.command, name.removesuffix(".java")]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
        start = asyncio.create_subprocess_exec(*command, cwd=folder, limit=LONGEST, **pipes)
        self._agent_process = await start
        self.reader = asyncio.create_task(self._read_stderr())

    async def _read_stderr(self):
        while some := await self._agent_process.stderr.read(2**16):
            self.stderr_end = (self.stderr_end + some)[-STDERR_BYTES:]

    async def write(self, message):
        self.answer = None
        self._agent_process.stdin.write(message.encode())
        try:
            answer = await self._agent_process.stdout.readline()
        except ValueError:
            self.too_long, answer = True, b""
        self.answer = answer.decode(errors="replace")
        return self.answer, ""

    def last_lines(self):
        """The end of what it wrote on stderr."""
        return "\n".join(self.stderr_end.decode(errors="replace").splitlines()[-STDERR_LINES:])


class Engine(luxai_s2.env.LuxAI_S2):
    """The official engine; `complaints` are the reasons why a player's orders were not accepted at all."""

    def __init__(self, **options):
        super().__init__(collect_stats=True, verbose=1, validate_action_space=True, **options)
        self.complaints = []

    def log_error(self, *message):
        self.complaints.append(" ".join(message))


class Seat:
    """A player of a match: its bot's process, and what is measured of it.

    Args:
        file: of the bot, or "idle".
        player: "player_0" or "player_1".
        turn_seconds, overage: time for each turn, and for all turns that take longer together.
    """

    def __init__(self, file, player, turn_seconds, overage):
        self.file, self.player, self.bot = file, player, None
        self.seconds, self.refused, self.error = [], 0, ""
        if file != "idle":
            self.bot = Bot(file, player, PLAYERS.index(player), verbose=0)
            self.bot.time_per_step, self.bot.remainingOverageTime = turn_seconds, overage
            # "python" may be another one, or none
            self.bot.proc = Process(sys.executable if self.bot.is_python else self.bot.command, file, verbose=0)

    async def act(self, engine, obs, reward, info):
        """Orders as the engine takes them, or None with the reason in `error`."""
        if self.bot is None:
            state = engine.state
            placing = state.real_env_steps < 0
            return early_phase_action(state.get_obs(), self.player) if placing else {}
        start = time.perf_counter()
        orders = await self.bot.step(obs, engine.env_steps, reward, info)
        self.seconds.append(time.perf_counter() - start)
        if orders is None:
            self.error = f"turn {engine.env_steps}: {await self._failure()}"
            return None
        try:
            queues = {name: np.array(order) for name, order in orders.items() if isinstance(order, list)}
        except ValueError:  # lists of lists of different lengths
            self.error = f"turn {engine.env_steps}: these are no orders: {str(orders)[:200]}"
            return None
        return orders | queues

    async def _failure(self):
        """Why the bot gave no orders."""
        process = self.bot.proc._agent_process
        if process.stdout.at_eof():  # it has crashed
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(process.wait(), self.bot.proc.reader), 60)
        if process.returncode is not None:
            return f"ended with exit code {process.returncode}"
        if process.stdout.at_eof():
            return "closed its output"
        if self.bot.proc.answer is None or self.bot.remainingOverageTime <= 0:
            return f"was late: {self.seconds[-1]:.1f} s"
        if self.bot.proc.too_long:
            return f"its answer has more than {LONGEST:,} bytes"
        return f"its answer is no JSON object: {self.bot.proc.answer.strip()[:200]}"


@contextlib.contextmanager
def counted(seats):
    """Count the orders that the engine throws away as impossible, for each player."""
    validate = luxai_s2.env.validate_actions

    def validate_and_count(config, state, orders, verbose=1):
        accepted = validate(config, state, orders, verbose=0)
        for sign, by_type in ((1, orders), (-1, accepted)):
            for entity, _ in (order for kind in by_type.values() for order in kind):
                seats[entity.team_id].refused += sign
        return accepted

    luxai_s2.env.validate_actions = validate_and_count
    try:
        yield
    finally:
        luxai_s2.env.validate_actions = validate


def play(
    files,
    seed,
    map_size=48,
    min_factories=2,
    max_factories=5,
    steps=1000,
    limits=(9, 600),
    replay=None,
    names=None,
):
    """Play a match.

    Args:
        files: main files of player_0 and player_1.
        seed: of the map.
        steps: when it ends at the latest, placement not counted.
        limits: seconds for a turn, and for all longer turns together; the official runner's.
        replay: path without suffix, for a .html page, a .json of the official viewer and a .gif.
        names: what the bots are called, if not by their files.

    Returns:
        A dict for each player: player, bot, seed, result, lichen, length, ice, factories, robots,
        refused, error, stderr, and turn_mean, turn_p99 and turn_max in seconds.
    """
    factories = {"MIN_FACTORIES": min_factories, "MAX_FACTORIES": max_factories}
    engine = Engine(map_size=map_size, max_episode_length=steps, **factories)
    seats = [Seat(file, player, *limits) for file, player in zip(files, PLAYERS)]
    names = dict(zip(PLAYERS, names or files))
    with counted(seats):
        rewards = asyncio.run(_play(engine, seats, seed, replay, names))
    return [_row(engine, seat, seed, rewards, names) for seat in seats]


def picture(engine):
    """What the engine draws, with step, score and a key below it."""
    state = engine.state
    ice = [state.stats[player]["transfer"]["ice"] for player in PLAYERS]
    return captioned(engine.render(), state, ice)


async def _play(engine, seats, seed, replay, bot_names):
    """Play it; the rewards at the end: lichen, or -1000 for a bot that failed or lost all factories."""
    bots = [seat.bot for seat in seats if seat.bot]
    try:
        for bot in bots:
            await bot.proc.start()
        engine.reset(seed=seed)
        seen = engine.state.get_compressed_obs()
        rewards, done = dict.fromkeys(PLAYERS, 0), False
        infos = dict.fromkeys(PLAYERS, {"env_cfg": dataclasses.asdict(engine.env_cfg)})
        obs = to_json(seen)
        record, frames, snapshots = {"observations": [obs], "actions": []}, [], []
        while not done:
            orders = {}
            for seat in seats:
                told = rewards[seat.player], infos[seat.player]
                orders[seat.player] = await seat.act(engine, obs, *told)
            placing = engine.state.real_env_steps < 0
            with contextlib.redirect_stdout(io.StringIO()) as printed:  # tracebacks of wrong orders
                step_obs, rewards, terminations, _, infos = engine.step(orders)
            for number, seat in enumerate(seats):
                names = seat.player, f"Player {number}"
                reasons = [text for text in engine.complaints if any(name in text for name in names)]
                reasons += [printed.getvalue()] if printed.getvalue() else []
                # Otherwise it has lost its factories; it has none yet while they are placed.
                if rewards[seat.player] == -1000 and not seat.error and (reasons or placing):
                    why = " ".join([*reasons, str(orders[seat.player])][0].split())[-200:]
                    what = f"turn {engine.env_steps - 1}: the engine did not take its orders"
                    seat.error = f"{what}: {why}"
                if placing and engine.state.real_env_steps == 0 and not engine.state.factories[seat.player]:
                    seat.error = seat.error or f"turn {engine.env_steps - 1}: it has placed no factory"
            obs = to_json(engine.state.get_change_obs(seen))
            seen, done = step_obs["player_0"], any(terminations.values())
            if replay:
                record["observations"].append(obs)
                record["actions"].append(to_json(orders))
                if done or engine.state.real_env_steps >= 0:
                    snapshots.append(snapshot(engine.state))
                if done or engine.state.real_env_steps % 4 == 0:
                    frames.append(Image.fromarray(picture(engine)).quantize())
    finally:
        for bot in bots:
            await bot.proc.cleanup()
    if replay:
        record["metadata"] = {"seed": seed, "players": bot_names}
        Path(f"{replay}.json").write_text(json.dumps(record))
        ended = len(snapshots) - 1  # an error ends the match
        notes = [(ended, team, seat.error) for team, seat in enumerate(seats) if seat.error]
        names = [bot_names[player] for player in PLAYERS]
        board = board_of(snapshots, engine.state.board, names, seed, notes)
        write_page(f"{replay}.html", [{"title": " against ".join(names), "board": board}])
        film = {"save_all": True, "append_images": frames[1:], "duration": 50, "loop": 0}
        frames[0].save(f"{replay}.gif", **film)
    return rewards


def _row(engine, seat, seed, rewards, names):
    state, player = engine.state, seat.player
    other = PLAYERS[1 - PLAYERS.index(player)]
    mined = state.stats[player]["generation"]["ice"]
    strains = state.teams[player].factory_strains if player in state.teams else []
    seconds = seat.seconds or [0]
    return {
        "player": player,
        "bot": names[player],
        "seed": seed,
        "result": ("draw", "win", "loss")[int(np.sign(rewards[player] - rewards[other]))],
        "lichen": int(state.board.lichen[np.isin(state.board.lichen_strains, strains)].sum()),
        "length": max(state.real_env_steps, 0),
        "ice": sum(mined.values()),
        "factories": len(state.factories[player]),
        "robots": len(state.units[player]),
        "refused": seat.refused,
        "error": seat.error,
        "stderr": seat.bot.proc.last_lines() if seat.bot else "",
        "turn_mean": round(float(np.mean(seconds)), 4),
        "turn_p99": round(float(np.percentile(seconds, 99)), 4),
        "turn_max": round(float(np.max(seconds)), 4),
    }


def line(row):
    """A row in words."""
    return (
        f"{row['player']}: {row['result']}, {row['lichen']} lichen, {row['length']} steps, "
        f"{row['ice']} ice, {row['factories']} factories, {row['robots']} robots, "
        f"{row['refused']} orders refused, {row['turn_mean']:.3f} s a turn "
        f"(99%: {row['turn_p99']:.3f}, most: {row['turn_max']:.3f})"
    )


def wilson(share, games, z=1.96):
    """The 95% interval of a share of games, (low, high)."""
    centre = share + z**2 / (2 * games)
    half = z * np.sqrt(share * (1 - share) / games + z**2 / (4 * games**2))
    bounds = np.array([centre - half, centre + half]) / (1 + z**2 / games)
    return tuple(np.clip(bounds, 0, 1).tolist())


def summary(rows, name):
    """Lines on all games of a bot."""
    keys = ("lichen", "length", "ice", "robots", "turn_mean")
    mean = {key: np.mean([row[key] for row in rows]) for key in keys}
    count = Counter(row["result"] for row in rows)
    share = (count["win"] + count["draw"] / 2) / len(rows)
    low, high = wilson(share, len(rows))
    score = f"{count['win']} wins, {count['draw']} draws, {count['loss']} losses"
    yield f"{name}: {score}; {share:.0%} ({low:.0%} to {high:.0%}), draws as halves"
    yield (
        f"   means: {mean['lichen']:.0f} lichen, {mean['length']:.0f} steps, {mean['ice']:.0f} ice, "
        f"{mean['robots']:.1f} robots; {sum(row['refused'] for row in rows)} orders refused"
    )
    slowest, longest = (max(row[key] for row in rows) for key in ("turn_p99", "turn_max"))
    yield (
        f"   a turn: {mean['turn_mean']:.3f} s on average, 99th percentile of the slowest game "
        f"{slowest:.3f} s, longest {longest:.3f} s"
    )
    for row in rows:
        if row["error"]:
            yield f"   failed in the game on map {row['seed']} as {row['player']}, {row['error']}"
            yield from (f"      {text}" for text in row["stderr"].splitlines())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = "a bot: a folder, a file, a run, a checkpoint, an archive of pack.py, or idle"
    parser.add_argument("--a", required=True, help=what)
    parser.add_argument("--b", required=True, help="its opponent")
    parser.add_argument("--games", type=int, default=20)
    parser.add_argument("--map-size", type=int, default=48)
    parser.add_argument("--min-factories", type=int, default=2)
    parser.add_argument("--max-factories", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="length of a match")
    parser.add_argument("--seed", type=int, default=0, help="of the first map; the others count on")
    parser.add_argument("--parallel", type=int, default=1, help="games at a time")
    parser.add_argument("--turn-seconds", type=float, default=9, help="per turn (on Kaggle 3)")
    overage = "for all longer turns together (on Kaggle 60)"
    parser.add_argument("--overage", type=float, default=600, help=overage)
    parser.add_argument("--out", type=Path, help="a CSV file: a row for each game and player")
    parser.add_argument("--replays", help="a folder for replays: a page, a GIF, and JSON for the official viewer")
    args = parser.parse_args()
    names = args.a, args.b
    try:
        if min(args.games, args.parallel, args.steps) < 1:
            raise Refused("--games, --parallel and --steps must be at least 1")
        if not 0 <= args.seed <= 2**32 - 1 - args.games:
            raise Refused(f"--seed must be between 0 and {2**32 - 1 - args.games}, got {args.seed}")
        if not 1 <= args.min_factories <= args.max_factories:
            raise Refused("--min-factories must be at least 1, and at most --max-factories")
        if not min(args.turn_seconds, args.overage) >= 0:
            raise Refused("--turn-seconds and --overage must be at least 0")
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            bots = [main_file(*bot) for bot in zip(names, (one, other))]
            if args.out:
                check_writable(args.out)
            if args.replays:
                Path(args.replays).mkdir(parents=True, exist_ok=True)
            games = run(bots, names, args)
        if args.out:
            table = [{"game": game} | row for game, rows in enumerate(games) for row in rows]
            write_csv(args.out, [*table[0]], table)
    except (Refused, OSError) as error:
        print(f"match.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nmatch.py: interrupted; no results are written", file=sys.stderr)
        sys.exit(130)
    for index, name in enumerate(names):
        own = [rows[(game + index) % 2] for game, rows in enumerate(games)]
        print("\n".join(summary(own, name)))
    if args.out:
        print(f"written to {args.out}")
    if args.replays:
        print(f"replays written to {args.replays}: of each game .html, .gif, and .json for the official viewer")


def run(bots, names, args):
    """The rows of `play` for each game, each on the next map. In every second one the second bot is player_0."""
    options = {key: getattr(args, key) for key in ("map_size", "min_factories", "max_factories", "steps")}
    one = functools.partial(play, **options, limits=(args.turn_seconds, args.overage))
    with ProcessPoolExecutor(args.parallel) as pool:
        games = {}
        for game in range(args.games):
            replay = args.replays and str(Path(args.replays, str(game)))
            order = -1 if game % 2 else 1
            sides = {"files": bots[::order], "names": names[::order], "seed": args.seed + game}
            games[pool.submit(one, **sides, replay=replay)] = game
        finished = {}
        try:
            for future in tqdm(as_completed(games), total=args.games, unit="game"):
                finished[games[future]] = future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error no other one begins
    return [finished[game] for game in range(args.games)]


if __name__ == "__main__":
    main()
