"""Run a script in double precision: `python in_double.py trajsep_ppo.py --seed 1`, or with torchrun.

Rounding depends on the processor's kernels, on threads and on the number of processes, and training
amplifies it. In double precision it stays negligible: two runs that compute the same thing end
alike, and any other two do not.

With LAST_PLACE=<seed> each parameter starts about one unit in the last place away, as on another
processor. Processes after the first start anywhere, as their parameters must not count.
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

as_tensor = torch.as_tensor
initialize = HybridNet.__init__


def as_double_tensor(*args, **options):
    """torch.as_tensor for the float32 features and rewards of an environment."""
    x = as_tensor(*args, **options)
    return x.double() if x.dtype == torch.float32 else x


def exponential_(x):
    """torch.Tensor.exponential_ without MKL, which draws other numbers."""
    return x.copy_(-torch.rand_like(x).log())


@contextlib.contextmanager
def double_precision():
    """New tensors, and what the programs convert to float32, have double precision."""
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch.Tensor, "exponential_", exponential_),
        mock.patch.object(torch, "as_tensor", as_double_tensor),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def initialize_elsewhere(net, *args, **options):
    """HybridNet.__init__ of another processor: each parameter is rounded up, down or not at all."""
    initialize(net, *args, **options)
    generator = torch.Generator().manual_seed(int(os.environ["LAST_PLACE"]))
    first_process = os.environ.get("RANK", "0") == "0"
    size = torch.finfo(torch.float64).eps if first_process else 1
    for parameter in net.parameters():
        parameter.data *= 1 + size * torch.randint(-1, 2, parameter.shape, generator=generator)


if __name__ == "__main__":
    if "LAST_PLACE" in os.environ:
        HybridNet.__init__ = initialize_elsewhere
    del sys.argv[0]
    with double_precision():
        runpy.run_path(sys.argv[0], run_name="__main__")
