"""What all tests share: the repository on the import path, and one thread for each process."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for this process and for the scripts that tests start
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (after the environment variables that it reads)

torch.set_num_threads(1)
