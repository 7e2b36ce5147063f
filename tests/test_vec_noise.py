"""The stand-in for vec-noise computes the same float32 values, so the same maps, as the C package.

The golden numbers were compared bit by bit with the original C code's.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import vec_noise
from luxai_s2 import LuxAI_S2
from vec_noise import snoise2

ROOT = Path(__file__).resolve().parent.parent


def sha256(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def grid(low, step):
    """Coordinates x [200, 1] and y [1, 200] from `low` on in float32."""
    line = (low + step * np.arange(200)).astype(np.float32)
    return line[:, None], line[None]


def test_installed_package_is_this_repositorys():
    """An old cached wheel can make an install look good."""
    ours = ROOT / "compat" / "vec_noise" / "vec_noise" / "__init__.py"
    assert Path(vec_noise.__file__).read_bytes() == ours.read_bytes()


@pytest.mark.parametrize(
    "low, step, octaves, golden",
    [
        (-3, 0.013, 1, "88beb2a12c55ac7bd933839847c35a1ed7fa3dcb69f58115dea39a7fe4427871"),
        (-3, 0.013, 6, "a4c1fbcdca9dac98bdc2f78060004da24073116addb710c99170d95221a1ab55"),
        (1000, 0.25, 6, "d0b44a3b46fbb3a9a0af92bc75971482c047b950cbbacad667c9ed8333b689f2"),
        (-70000, 123.456, 3, "c201f1b7291ac538a7c0b5b2931bd8e5ed1af9c7811a1103687d3e54fd7e7a14"),
    ],
)
def test_golden_arrays(low, step, octaves, golden):
    """40,000 values near the origin, in the middle and far out."""
    noise = snoise2(*grid(low, step), octaves=octaves)
    assert noise.dtype == np.float32 and noise.shape == (200, 200)
    assert sha256(noise.astype("<f4")) == golden


@pytest.mark.parametrize(
    "x, y, octaves, golden",
    [
        (0.1, 0.2, 1, "-0x1.2d2a8c0000000p-2"),
        (0, 0, 1, "0x0.0p+0"),
        (-0.75, 3.5, 4, "0x1.c1b71e0000000p-4"),
        (300.3, 1e4, 2, "-0x1.53d9220000000p-1"),
    ],
)
def test_golden_scalars(x, y, octaves, golden):
    """For numbers it returns a Python float, with all its bits."""
    noise = snoise2(x, y, octaves=octaves)
    assert type(noise) is float and noise.hex() == golden


@pytest.mark.parametrize(
    "size, factories, seed, golden",
    [
        (48, (2, 5), 0, "e9ef3d877e5948a4f62722c9f899b47c2bf05c9635911e2909b4b17d2bfcba73"),
        (48, (2, 5), 1, "0f22923a8e0466d8ded08e89a0ad9301ee48ae10e3202dcf4db693665090a085"),
        (48, (2, 5), 42, "2dd90586463dcac21d97829e3c4864f898ca92c647f1814ff086bd4a3cbcbe9c"),
        (48, (2, 5), 987654, "0bda17c72818b7b9d18074c2bd2c2fd5a87ef9375e619f4b27befcdeeadc16ec"),
        (64, (4, 10), 0, "c70b1a05285adfd637e3173c6551e34f519ab6a24fe0d22d0dd28fdb777de33b"),
        (64, (4, 10), 42, "40b795b3bf4fff199110ecb31cc3a679e885961f071e2440cffb8359ca991204"),
    ],
)
def test_golden_maps(size, factories, seed, golden):
    """Rubble, ice and ore of whole maps are what the engine generates with the C code."""
    engine = LuxAI_S2(map_size=size, MIN_FACTORIES=factories[0], MAX_FACTORIES=factories[1])
    board = engine.reset(seed=seed)[0]["player_0"]["board"]
    assert sha256(*(board[name].astype("<i8") for name in ("rubble", "ice", "ore"))) == golden


def test_refuses_octaves_below_one():
    for octaves in (0, -1):
        with pytest.raises(ValueError, match="octaves"):
            snoise2(np.ones(3), np.ones(3), octaves=octaves)


def test_broadcasting():
    """x and y broadcast against each other, whatever their type, and the result is float32."""
    x, y = grid(-3, 0.013)
    whole = snoise2(x, y, octaves=2)
    full_x, full_y = np.broadcast_arrays(x, y)
    assert (whole == snoise2(full_x.copy(), full_y.copy(), octaves=2)).all()
    row = snoise2(float(x[7, 0]), y[0].astype(np.float64), octaves=2)
    assert row.dtype == np.float32 and (row == whole[7]).all()
    assert np.float32(snoise2(x[7, 0], y[0, 9], octaves=2)) == whole[7, 9]
