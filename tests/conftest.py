"""What all tests share: the repository and its examples on the import path, and one thread for each process."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for this process and for the scripts that tests start
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "benchmark", "examples", "examples/toy", "examples/battle")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import torch  # noqa: E402  (after the environment variables that it reads)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Processes started in the background ignore Ctrl-C, and what they start does too
signal.signal(signal.SIGINT, signal.default_int_handler)
