"""Synthetic chest phantoms."""

from collections.abc import Sequence

import numpy as np

HU_MIN, HU_MAX = -1024, 3071  # what 12-bit scanners store


def chest_phantom(
    seed: int, shape: Sequence[int] = (320, 256, 96), spacing: Sequence[float] = (1.0, 1.0, 3.0)
) -> tuple[np.ndarray, np.ndarray]:
    """The volume and affine of `labelled_phantom`, without its nodules."""
    return labelled_phantom(seed, shape, spacing)[:2]


def labelled_phantom(
    seed: int, shape: Sequence[int] = (320, 256, 96), spacing: Sequence[float] = (1.0, 1.0, 3.0)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A synthetic chest CT: body, lungs with vessels, heart, spine, ribs, table, nodules, noise.

    The anatomy fills the field of view whatever its size. It is not symmetric: the heart and the
    smaller lung lie on the patient's left (low x), the spine and the table behind (low y), the
    domes of the diaphragm below (low z).

    Args:
        seed: integer; the same seed gives the same volume.
        shape: voxels (X, Y, Z).
        spacing: millimetres per voxel (x, y, z).
    Returns the volume, int16 (X, Y, Z) in RAS order, in HU; its affine, float64 (4, 4); and its nodules, uint8
    (X, Y, Z), numbered from 1, and 0 elsewhere.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    shape, spacing = tuple(int(n) for n in shape), np.array(spacing, dtype=np.float64)
    extent = np.array(shape) * spacing  # mm
    scale = (extent / (320, 256, 288)).min()  # of everything given in mm below
    # x from left to right, y from back to front, z from feet to head, each from -1 to 1
    x, y, z = np.meshgrid(
        *((2 * np.arange(n, dtype=np.float32) + 1) / n - 1 for n in shape), indexing="ij", sparse=True
    )
    hu = np.full(shape, -1000, dtype=np.float32)

    def paint(mask: np.ndarray, value: float) -> None:
        hu[np.broadcast_to(mask, shape)] = value

    def ellipse(centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        """Squared distance from the centre in the axial plane, 1 on the outline: (X, Y, 1)."""
        return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2

    # Trunk: fat, muscle; the table below it is a shallow trough
    size = rng.uniform(0.93, 1.0)
    trunk = ellipse((0, 0.1), (0.9 * size, 0.72 * size))
    table = -0.70 + 0.06 * x**2
    paint((y < table) & (y > table - 0.07) & (abs(x) < 0.8), -150)
    paint(trunk < 1, -100)
    paint(trunk < 0.9, 40)

    # Lungs: between the diaphragm, which stands higher on the right, the mediastinum and the ribs
    heart_radius = rng.uniform(0.9, 1.1)
    heart = ellipse((-0.15, 0.2), (0.33 * heart_radius, 0.33)) + ((z + 0.3) / (0.38 * heart_radius)) ** 2
    aorta = ellipse((-0.18, -0.28), (0.07, 0.085))
    lungs = np.zeros(shape, dtype=bool)
    for side, dome in ((-1, rng.uniform(-0.75, -0.65)), (1, rng.uniform(-0.6, -0.5))):
        lung = ellipse((side * 0.41, 0.06), (0.33, 0.54))
        lungs |= (lung < 1 - np.clip((z + 0.1) / 1.02, 0, 1) ** 2.5) & (z > dome - 0.35 * lung)
    lungs &= (abs(x) > 0.09) & (trunk < 0.68) & (heart > 1) & (aorta > 1)
    paint(lungs, rng.uniform(-870, -830))

    # Vessels: random trees from each hilum, thinner at every fork
    vessels = np.zeros(shape, dtype=bool)
    for side in (-1, 1):
        hilum = 0.5 * (np.array([side * 0.13, 0.0, 0.0]) + 1) * extent
        for _ in range(12):
            heading = rng.normal(0, 1, 3) * (0.4, 1, 1) + (side * 0.9, 0, 0)
            _grow(vessels, spacing, rng, hilum, heading / np.linalg.norm(heading), 4.5 * scale, 42 * scale, forks=3)
    paint(vessels & lungs, 40)

    # Nodules: solid, the last one of ground glass
    places = np.argwhere(lungs)
    radii = rng.uniform(3, 10, size=rng.integers(3, 6)) * scale  # mm
    nodules = np.zeros(shape, dtype=np.uint8)
    for k, radius in enumerate(radii if len(places) else ()):
        nodule = np.zeros(shape, dtype=bool)
        _stamp(nodule, spacing, (places[rng.integers(len(places))] + 0.5) * spacing, radius)
        paint(nodule & lungs, -600 if k == len(radii) - 1 else 30)
        nodules[nodule & lungs] = k + 1

    # Mediastinum, airway and bones
    paint(heart < 1, 45)
    paint((aorta < 1) & (z < 0.4), 45)
    paint((ellipse((0, 0.0), (0.055, 0.07)) < 1) & (z > 0.1), -980)
    paint((trunk > 0.72) & (trunk < 0.82) & ((z + 0.35 * y) % 0.2 < 0.08), 400)
    paint((abs(x) < 0.09) & (trunk > 0.7) & (trunk < 0.82) & (y > 0) & (z > -0.4), 350)
    vertebrae = ellipse((0, -0.36), (0.11, 0.13)) < 1
    paint(vertebrae, 380)
    paint(vertebrae & (z % 0.22 > 0.17), 90)  # discs
    paint((abs(x) < 0.035) & (y > -0.58) & (y < -0.45), 400)
    paint(ellipse((0, -0.5), (0.05, 0.05)) < 1, 20)

    hu = gaussian_filter(hu, (0.6, 0.6, 0.3))  # partial volume, in voxels
    hu += 18 * rng.standard_normal(shape, dtype=np.float32)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -0.5 * (np.array(shape) - 1) * spacing  # the origin is the centre
    return np.clip(np.rint(hu), HU_MIN, HU_MAX).astype(np.int16), affine, nodules


def _stamp(mask: np.ndarray, spacing: np.ndarray, position: np.ndarray, radius: float) -> None:
    """Set an ellipsoid in the mask: position and radius in mm, at least one voxel thick."""
    radii = np.maximum(radius, 0.5 * spacing)
    first = np.maximum(np.floor((position - radii) / spacing), 0).astype(int)
    last = np.minimum(np.ceil((position + radii) / spacing), mask.shape).astype(int)
    if (first >= last).any():
        return
    a, b, c = (((np.arange(first[k], last[k]) + 0.5) * spacing[k] - position[k]) / radii[k] for k in range(3))
    inside = (a**2)[:, None, None] + (b**2)[:, None] + c**2 <= 1
    mask[first[0] : last[0], first[1] : last[1], first[2] : last[2]] |= inside


def _grow(
    vessels: np.ndarray,
    spacing: np.ndarray,
    rng: np.random.Generator,
    position: np.ndarray,
    heading: np.ndarray,
    radius: float,
    length: float,
    forks: int,
) -> None:
    """Grow a branch that wanders and tapers, then the branches it forks into. radius, length: mm"""
    scale = (np.array(vessels.shape) * spacing / (320, 256, 288)).min()
    step = max(0.8 * radius, 0.8 * scale)
    steps = max(int(length / step), 1)
    for k in range(steps):
        heading = heading + rng.normal(0, 0.12, 3)
        heading /= np.linalg.norm(heading)
        position = position + step * heading
        _stamp(vessels, spacing, position, radius * (1 - 0.35 * k / steps))
    for _ in range(2 if forks else 0):
        heading_of_branch = heading + rng.normal(0, 0.5, 3)
        _grow(vessels, spacing, rng, position, heading_of_branch, 0.65 * radius, 0.75 * length, forks - 1)
