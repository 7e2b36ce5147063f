"""Plant bugs of one line in the programs, one at a time, and see which test catches each.

    python benchmark/mutants.py
    python benchmark/mutants.py --files hybrid_model.py lux_wrapper.py --parallel 4

The bugs are in mutant_list.py. For each of them the programs and the tests are copied to a temporary folder, the text
is replaced there, and the tests of that file run until the first one fails. Before that they must pass without a bug.
A test that takes more than --limit seconds hangs, as it takes only a few without the bug: that counts as caught.

    written to --out, a row for every bug
    file, what      where it is planted, and what it is
    caught          yes, no or hangs
    test            the test that failed or hung
    seconds         of all tests up to then
    code            hash of the programs with the bug, and of the tests

The table is complete at any time. Started again it goes on: a row is kept as long as its hash is that of today's code.
"""

import contextlib
import csv
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

from mutant_list import MUTANTS  # noqa: E402

COPIED = ("*.py", "tests/*.py", "examples/*.py", "examples/*/*.py", "pyproject.toml")
SCRIPT_TESTS = ("test_ppo_math.py", "test_learner.py", "test_learning.py", "test_flags.py")
TESTS = {  # file -> its tests, the fastest first
    "hybrid_model.py": ("test_model.py",),
    "trajsep_ppo.py": SCRIPT_TESTS,
    "global_ppo.py": SCRIPT_TESTS,
    "lux_wrapper.py": ("test_lichen.py", "test_groups.py", "test_encoder.py", "test_changes.py", "test_wrapper.py"),
}
COLUMNS = ("file", "what", "caught", "test", "seconds", "code")


def read_tree():
    """All that a test run needs, path in the repository -> content."""
    return {path.relative_to(ROOT): path.read_bytes() for pattern in COPIED for path in sorted(ROOT.glob(pattern))}


def planted(tree, file, old, new):
    """The tree with a bug in it."""
    text = tree[Path(file)].decode()
    if text.count(old) != 1:
        sys.exit(f"mutants.py: error: {text.count(old)} times in {file}, but must be there once: {old!r}")
    return tree | {Path(file): text.replace(old, new).encode()}


def hash_of(tree):
    digest = hashlib.sha256()
    for path, content in tree.items():
        digest.update(f"{path} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


class Runs:
    """Runs of tests, each in a process group of its own; `stop` ends them all."""

    def __init__(self, limit):
        self.limit, self.stopped, self.processes, self.lock = limit, False, set(), threading.Lock()

    def stop(self):
        with self.lock:
            self.stopped = True
            for process in self.processes:
                kill(process)

    def run(self, tree, tests):
        """Whether the tests fail: "caught" (yes, no or hangs), "test" and "seconds" of a row; None if stopped."""
        with tempfile.TemporaryDirectory() as folder:
            for path, content in tree.items():
                Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, path).write_bytes(content)
            # The name of every test is written before it runs, so that one that hangs is known.
            command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider"]
            command += [f"tests/{name}" for name in tests]
            log, start = Path(folder, "log"), time.time()
            with open(log, "w") as file, self.lock:
                if self.stopped:
                    return None
                options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "start_new_session": True}
                process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, **options)
                self.processes.add(process)
            code = self._wait(process, log)
            text = log.read_text(errors="replace")
        if self.stopped:
            return None
        result = {"caught": "yes" if code else "no", "test": "", "seconds": round(time.time() - start, 1)}
        if code is None:
            running = re.findall(r"^tests/\S+::.*?(?= *$| PASSED| FAILED)", text, re.MULTILINE)
            result |= {"caught": "hangs", "test": running[-1] if running else "import"}
        elif code:
            failed = re.findall(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", text, re.MULTILINE)
            result["test"] = failed[0] if failed else f"exit code {code}"
        return result

    def _wait(self, process, log):
        """The exit code of the tests, None if one of them took too long."""
        size, since = 0, time.time()
        while (code := process.poll()) is None:
            if (now := log.stat().st_size) != size:
                size, since = now, time.time()
            if time.time() - since > self.limit:
                break
            time.sleep(0.1)
        with self.lock:
            self.processes.discard(process)
            kill(process)
            process.wait()
        return code


def kill(process):
    """End a process and all that it has left in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_table(path):
    """The rows by (file, what)."""
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else ()
    return {(row["file"], row["what"]): row for row in rows}


def write_table(path, rows):
    """All rows of bugs on the list, in its order."""
    keys = [(file, what) for file, _, _, what in MUTANTS]
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in keys if key in rows)
    os.replace(temporary, path)


def say(what):
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def work(pool, runs, rows, out, files):
    """Run what is not in the table yet."""
    tree, todo = read_tree(), []
    for file, old, new, what in MUTANTS:
        bug = planted(tree, file, old, new)
        code = hash_of(bug)
        if file in files and rows.get((file, what), {}).get("code") != code:
            todo.append((file, what, bug, code))

    tests = {TESTS[file]: file for file, *_ in todo}
    if tests:
        say(f"{len(todo)} bugs to plant; first the tests without one")
    for file, result in zip(tests.values(), pool.map(lambda names: runs.run(tree, names), tests)):
        if result["caught"] != "no":
            how = "hangs" if result["caught"] == "hangs" else "fails"
            sys.exit(f"mutants.py: error: without a bug, a test of {file} {how}: {result['test']}")

    jobs = {pool.submit(runs.run, bug, TESTS[file]): (file, what, code) for file, what, bug, code in todo}
    for number, job in enumerate(as_completed(jobs), 1):
        file, what, code = jobs[job]
        row = rows[file, what] = {"file": file, "what": what, "code": code, **job.result()}
        write_table(out, rows)
        how = {"yes": "caught by", "no": "NOT CAUGHT", "hangs": "hangs in"}[row["caught"]]
        say(f"{number} of {len(todo)} {file}: {what}: {how} {row['test']} ({row['seconds']:.0f} s)")


def main(
    files: tuple[str, ...] = tuple(TESTS),
    out: Path = ROOT / "benchmark" / "mutants.csv",
    parallel: int = os.cpu_count() or 1,
    limit: float = 60,
):
    """Plant the bugs of the list.

    Args:
        files: in which files.
        out: the table.
        parallel: how many at a time, each with one thread.
        limit: seconds that one test may take.
    """
    unknown = [file for file in files if file not in TESTS]
    if unknown:
        sys.exit(f"mutants.py: error: no bugs for {unknown[0]}; there are for {', '.join(TESTS)}")
    if parallel < 1 or limit <= 0:
        sys.exit("mutants.py: error: --parallel must be at least 1, --limit above 0")
    missing = [name for file in files for name in TESTS[file] if not (ROOT / "tests" / name).exists()]
    if missing:
        sys.exit(f"mutants.py: error: there is no tests/{missing[0]}")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows, runs, pool = read_table(out), Runs(limit), ThreadPoolExecutor(parallel)
    try:
        work(pool, runs, rows, out, files)
    except BaseException as reason:
        runs.stop()
        pool.shutdown(cancel_futures=True)
        if isinstance(reason, KeyboardInterrupt):
            print("mutants.py: interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(130)
        raise

    missed, total = 0, 0
    for file in files:
        mine = [rows[name, what] for name, _, _, what in MUTANTS if name == file]
        not_caught = [row["what"] for row in mine if row["caught"] == "no"]
        hang = sum(row["caught"] == "hangs" for row in mine)
        missed, total = missed + len(not_caught), total + len(mine)
        print(f"{file}: {len(mine) - len(not_caught)} of {len(mine)} caught, {hang} of them because a test hangs")
        for what in not_caught:
            print(f"    not caught: {what}")
    if missed:
        sys.exit(f"mutants.py: error: {missed} of {total} bugs not caught")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell starts it in the background
        signal.signal(number, signal.default_int_handler)
    tyro.cli(main)
