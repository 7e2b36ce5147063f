"""Two-dimensional simplex noise in NumPy: an install stand-in for the package vec-noise.

luxai-s2 needs vec-noise 1.1.4, a C extension that no current pip or uv can build. It calls one
function of it, `snoise2`, to generate maps. This module computes the same function bit for bit:
every operation is float32 and in the order of the C code, so the maps of all seeds are the same.
"""

import numpy as np

__all__ = ["snoise2"]

# Ken Perlin's permutation of 0..255, twice, so that PERM[i + PERM[j]] needs no wrap-around.
PERM = np.array(
    2
    * [
        151, 160, 137, 91, 90, 15, 131, 13, 201, 95, 96, 53, 194, 233, 7, 225,
        140, 36, 103, 30, 69, 142, 8, 99, 37, 240, 21, 10, 23, 190, 6, 148,
        247, 120, 234, 75, 0, 26, 197, 62, 94, 252, 219, 203, 117, 35, 11, 32,
        57, 177, 33, 88, 237, 149, 56, 87, 174, 20, 125, 136, 171, 168, 68, 175,
        74, 165, 71, 134, 139, 48, 27, 166, 77, 146, 158, 231, 83, 111, 229, 122,
        60, 211, 133, 230, 220, 105, 92, 41, 55, 46, 245, 40, 244, 102, 143, 54,
        65, 25, 63, 161, 1, 216, 80, 73, 209, 76, 132, 187, 208, 89, 18, 169,
        200, 196, 135, 130, 116, 188, 159, 86, 164, 100, 109, 198, 173, 186, 3, 64,
        52, 217, 226, 250, 124, 123, 5, 202, 38, 147, 118, 126, 255, 82, 85, 212,
        207, 206, 59, 227, 47, 16, 58, 17, 182, 189, 28, 42, 223, 183, 170, 213,
        119, 248, 152, 2, 44, 154, 163, 70, 221, 153, 101, 155, 167, 43, 172, 9,
        129, 22, 39, 253, 19, 98, 108, 110, 79, 113, 224, 232, 178, 185, 112, 104,
        218, 246, 97, 228, 251, 34, 242, 193, 238, 210, 144, 12, 191, 179, 162, 241,
        81, 51, 145, 235, 249, 14, 239, 107, 49, 192, 214, 31, 181, 199, 106, 157,
        184, 84, 204, 176, 115, 121, 50, 45, 127, 4, 150, 254, 138, 236, 205, 93,
        222, 114, 67, 29, 24, 72, 243, 141, 128, 195, 78, 66, 215, 61, 156, 180,
    ]
)  # fmt: skip

# The x and y parts of the 12 gradients towards the edges of a cube.
GRADIENT_X = np.array([1, -1, 1, -1, 1, -1, 1, -1, 0, 0, 0, 0], np.float32)
GRADIENT_Y = np.array([1, 1, -1, -1, 0, 0, 0, 0, 1, -1, 1, -1], np.float32)

SKEW = np.float32(0.3660254037844386)  # (sqrt(3) - 1) / 2; the digits matter: 0.36602540 rounds elsewhere
UNSKEW = np.float32(0.21132486540518713)  # (3 - sqrt(3)) / 6
ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)


def _corner(dx, dy, hashed):
    """What one corner of the triangle adds at distance (dx, dy) from it, in float32."""
    falloff = HALF - dx * dx - dy * dy
    gradient = hashed % 12
    value = falloff * falloff * falloff * falloff * (GRADIENT_X[gradient] * dx + GRADIENT_Y[gradient] * dy)
    return np.where(falloff > 0, value, np.float32(0))


def _noise2(x, y):
    """One octave of simplex noise at float32 arrays x, y, in [-1, 1]."""
    skew = (x + y) * SKEW
    column, row = np.floor(x + skew), np.floor(y + skew)
    unskew = (column + row) * UNSKEW
    x0, y0 = x - (column - unskew), y - (row - unskew)
    right = x0 > y0  # which of the cell's two triangles
    x1, y1 = x0 - right.astype(np.float32) + UNSKEW, y0 - (~right).astype(np.float32) + UNSKEW
    x2, y2 = x0 + UNSKEW * TWO - ONE, y0 + UNSKEW * TWO - ONE
    i, j = column.astype(np.int64) & 255, row.astype(np.int64) & 255
    corner0 = _corner(x0, y0, PERM[i + PERM[j]])
    corner1 = _corner(x1, y1, PERM[i + right + PERM[j + ~right]])
    corner2 = _corner(x2, y2, PERM[i + 1 + PERM[j + 1]])
    return (corner0 + corner1 + corner2) * np.float32(70)


def snoise2(x, y, octaves=1, persistence=0.5, lacunarity=2.0):
    """Fractal simplex noise, the float32 mean of `octaves` layers of it weighted by amplitude.

    Args:
        x, y: coordinates, numbers or arrays that broadcast against each other.
        octaves: how many layers are added, at least 1.
        persistence: the amplitude of a layer relative to the one before.
        lacunarity: the frequency of a layer relative to the one before.

    Returns:
        float32 array of the broadcast shape in [-1, 1]; a Python float where x and y are numbers.

    Raises:
        ValueError: if octaves is below 1.
    """
    if octaves <= 0:
        raise ValueError("Expected octaves value > 0")
    scalar = np.ndim(x) == 0 and np.ndim(y) == 0
    x, y = np.broadcast_arrays(np.asarray(x, np.float32), np.asarray(y, np.float32))
    persistence, lacunarity = np.float32(persistence), np.float32(lacunarity)
    frequency = amplitude = amplitudes = ONE
    total = _noise2(x, y)
    for _ in range(1, octaves):
        frequency *= lacunarity
        amplitude *= persistence
        amplitudes += amplitude
        total = total + _noise2(x * frequency, y * frequency) * amplitude
    total = total / amplitudes
    return float(total) if scalar else total
