"""trajsep_ppo.py with patches of the study, as a module of its own."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

from ablation import programs  # noqa: E402  (after the path to it)


def patched(patches, folder):
    """The script with patches from benchmark/arms/, applied in this order to a copy in `folder`."""
    path = programs(patches, folder) / "trajsep_ppo.py"
    spec = importlib.util.spec_from_file_location("trajsep_ppo", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script
