"""Run a script in double precision: `python in_double.py trajsep_ppo.py --seed 1`, alone or by torchrun.

Rounding depends on the processor's kernels, the threads and the number of processes, and training multiplies it. In
double precision it stays so small that two runs which compute the same thing end alike, and other ones do not. With
LAST_PLACE=<seed> every parameter starts about one unit in the last place away, as on another processor.
"""

import contextlib
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hybrid_model import HybridNet  # noqa: E402  (after the path to it)


@contextlib.contextmanager
def double_precision():
    """New tensors, and what the programs convert to float32, have double precision."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


as_tensor, initialize = torch.as_tensor, HybridNet.__init__


def as_double_tensor(*args, **options):
    """The environment's rewards and features are float32, which double precision represents exactly."""
    x = as_tensor(*args, **options)
    return x.double() if x.dtype == torch.float32 else x


def initialize_elsewhere(net, *args, **options):
    """Parameters as another processor would draw them: each is rounded up, down or not at all."""
    initialize(net, *args, **options)
    generator = torch.Generator().manual_seed(int(os.environ["LAST_PLACE"]))
    epsilon = torch.finfo(torch.float64).eps if os.environ.get("RANK", "0") == "0" else 1
    for parameter in net.parameters():
        parameter.data *= 1 + epsilon * torch.randint(-1, 2, parameter.shape, generator=generator)


if __name__ == "__main__":
    torch.as_tensor = as_double_tensor
    if "LAST_PLACE" in os.environ:
        HybridNet.__init__ = initialize_elsewhere
    del sys.argv[0]
    with double_precision():
        runpy.run_path(sys.argv[0], run_name="__main__")
