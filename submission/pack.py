"""Pack a trained run into an archive for Kaggle, and prove by a match that it plays.

    python submission/pack.py runs/<run>
    python submission/pack.py runs/<run> --out bot.tar.gz    # replaces one of this name

The archive holds main.py, hybrid_model.py, lux_wrapper.py and model.pt, the run's weights and arguments. It is unpacked
into an empty folder, and plays there against itself on the official engine.
"""

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "submission")]

import match  # noqa: E402
import torch  # noqa: E402
from main import load_model  # noqa: E402

from trajsep_ppo import Refused, checkpoints  # noqa: E402

FILES = ("submission/main.py", "hybrid_model.py", "lux_wrapper.py")
LARGEST = 2**20  # bytes of the archive
KAGGLE = 3, 60  # seconds for a turn, and for all that is longer together


def write_model(run, path):
    """Write the weights and arguments of a run's newest checkpoint to `path`.

    Raises:
        Refused: if there is none, or if it holds no network of this game.
    """
    if not Path(run).exists():
        raise Refused(f"there is no {run}")
    *_, checkpoint = checkpoints(run) or [Path(run)]
    if checkpoint.is_dir():
        raise Refused(f"there is no checkpoint in {run}")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        torch.save({key: content[key] for key in ("args", "model")}, path)
        load_model(path)
    except Exception as error:  # a damaged file can raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise Refused(f"{checkpoint} holds no network for this game ({why})")


def write_bot(run, folder):
    """Write the files of a run's bot into a folder; the path of its main file.

    Raises:
        Refused: as `write_model` does.
    """
    write_model(run, Path(folder, "model.pt"))
    for file in FILES:
        shutil.copy(ROOT / file, folder)
    return str(Path(folder, "main.py"))


def pack(run, folder):
    """Make the archive of a run in an empty folder; its path.

    Raises:
        Refused: as `write_model` does, or if the archive is too large.
    """
    contents = Path(folder, "contents")
    contents.mkdir()
    write_bot(run, contents)
    archive = Path(shutil.make_archive(Path(folder, "archive"), "gztar", contents))
    if (size := archive.stat().st_size) > LARGEST:
        raise Refused(f"the archive has {size:,} bytes, more than {LARGEST:,}")
    return archive


def prove(archive, steps=1000):
    """Unpack the archive and let it play against itself; the rows of `match.play`.

    Raises:
        Refused: if it fails or complains.
    """
    with TemporaryDirectory() as folder:
        shutil.unpack_archive(archive, folder, "gztar")
        bot = match.main_file(folder)
        rows = match.play((bot, bot), seed=0, steps=steps, limits=KAGGLE)
    for row in rows:
        if failure := row["error"] or row["stderr"]:
            raise Refused(f"the packed bot does not play as {row['player']}: {failure}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a run, or a checkpoint")
    parser.add_argument("--out", help="the archive, instead of submission.tar.gz")
    parser.add_argument("--steps", type=int, default=1000, help="length of the match that proves it")
    args = parser.parse_args()
    out = Path(args.out or "submission.tar.gz")
    try:
        if args.steps < 1:
            raise Refused("--steps must be at least 1")
        if args.out is None and out.exists():
            raise Refused(f"{out} is there already; `--out {out}` replaces it")
        match.check_writable(out)
        with TemporaryDirectory() as folder:
            archive = pack(args.run, folder)
            print("packed; the archive plays a match against itself first", flush=True)
            rows = prove(archive, args.steps)
            shutil.copy(archive, out)
    except (Refused, OSError) as error:
        print(f"pack.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"written to {out}: {out.stat().st_size:,} bytes; a match against itself:")
    for row in rows:
        print(match.line(row))


if __name__ == "__main__":
    main()
