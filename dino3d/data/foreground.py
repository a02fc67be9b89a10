"""Where body and lung lie in a CT, in blocks of about 8 mm: found by simple rules, stored with the file, drawn from.

The rules know no anatomy. They look at means over cells of about 4 mm, and are made for a chest; of a crop inside a
lung, a patient who is cut by the image's border, a table and a head without lungs they make something sensible too.

What was found stands in the hidden file beside a volume's (dino3d/data/sidecar.py): an HDF5 file can't be added to
without the danger of losing it when the process is killed. A conversion stores it in the HDF5 file itself too.
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino3d.data.conventions import HDF5_SUFFIXES, DataError, is_kind
from dino3d.data.hdf5 import read_group
from dino3d.data.read_watchdog import reading
from dino3d.data.requirements import LOOKED_INTO
from dino3d.data.sidecar import DAMAGED, identity_of, index_path, read_arrays
from dino3d.data.volume import Volume
from dino3d.data.volume_cache import SMALL

FOREGROUNDS = ("body", "lung")
FOREGROUND_SHARE = 0.75
RULES = 1  # of `find_foreground`; to be counted up when they change: what others have stored is found anew
BLOCK_MM, CELL_MM = 8.0, 4.0  # mm, about
OUTSIDE_HU, AIRY_HU = -920, -400  # below: air around the body; air or lung
GAS_HU = -950  # median below which a part is gas in a bowel or an airway, not lung
LEAST_LUNG = 100.0  # ml of a part that may be lung, or LEAST_SHARE of a small volume
LEAST_SHARE = 0.05
OUTSIDE_ML = 20.0  # of a part of the air around the body: emphysema at a crop's border is smaller
GROUP = "Occupancy"  # in an HDF5 file


class Occupancy(NamedTuple):
    """block: (3,) voxels of a block; shape: (3,) blocks; bits: {kind: np.packbits of which (X, Y, Z) blocks are}"""

    block: tuple[int, ...]
    shape: tuple[int, ...]
    bits: dict[str, np.ndarray]

    def mask(self, kind: str) -> np.ndarray:
        """(X, Y, Z) bool."""
        return np.unpackbits(self.bits[kind], count=int(np.prod(self.shape))).reshape(self.shape).astype(bool)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored of it, by name."""
        return {"rules": np.array(RULES), "block": np.array(self.block), "shape": np.array(self.shape), **self.bits}


# ------------------------------------------------------------------------------------------------------------ the rules


def find_foreground(voxels: np.ndarray, spacing: Sequence[float]) -> Occupancy:
    """The Occupancy of a CT. voxels: (X, Y, Z) int16 HU; spacing: (3,) mm"""
    cell = np.maximum(1, np.rint(CELL_MM / np.array(spacing))).astype(int)  # (3,) voxels
    cells = np.maximum(1, np.rint(BLOCK_MM / (cell * spacing))).astype(int)  # (3,) of a block
    means = box_means(voxels, cell)
    masks = body_and_lung(means, float(np.prod(cell * spacing)) / 1000)
    blocks = {kind: box_means(mask, cells) >= 0.5 for kind, mask in masks.items()}
    shape, block = blocks["body"].shape, (cell * cells).tolist()
    return Occupancy(tuple(block), shape, {kind: np.packbits(mask) for kind, mask in blocks.items()})


def body_and_lung(hu: np.ndarray, ml: float) -> dict[str, np.ndarray]:
    """{kind: (X, Y, Z) bool} of cells of `ml` millilitres with these mean HU."""
    from scipy import ndimage

    ball = ndimage.iterate_structure(ndimage.generate_binary_structure(3, 1), 2)  # radius of 2 cells
    airy = hu < AIRY_HU
    # Air around the body: what is as dark as air and joined to the sides of the image. Not to its ends, where lungs are
    # cut; and lung is not as dark. Its rim, of skin and air in one cell, belongs to it
    labels, _ = ndimage.label(hu < OUTSIDE_HU)
    sizes = np.bincount(labels.ravel()) * ml
    sides = np.unique(np.concatenate([labels[[0, -1]].ravel(), labels[:, [0, -1]].ravel()]))
    outside = np.isin(labels, sides[(sides > 0) & (sizes[sides] >= OUTSIDE_ML)])
    outside = ndimage.binary_dilation(outside, np.ones((3, 3, 3)), mask=airy)

    # Tissue: the largest parts that are left when what is thinner than 5 cells is gone, such as a table
    core = ndimage.binary_dilation(ndimage.binary_erosion(~airy, ball, border_value=1), ball)
    tissue = ndimage.binary_dilation(_largest(core, 0.1), ball, mask=~airy) if core.any() else ~airy

    # Lung: large airy parts that are not only gas and, where air is around the body, not beside it as a table's foam is
    box = np.zeros(hu.shape, bool)
    box[ndimage.find_objects(tissue.astype(np.int8))[0] if outside.any() and tissue.any() else ...] = True
    labels, count = ndimage.label(airy & ~outside)
    lung = np.zeros(hu.shape, bool)
    if count:
        which = np.arange(1, count + 1)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:] * ml
        likely = (sizes >= min(LEAST_LUNG, LEAST_SHARE * hu.size * ml)) & (ndimage.mean(box, labels, which) >= 0.5)
        likely[likely] = [np.median(hu[labels == one]) > GAS_HU for one in which[likely]]
        likely &= sizes >= 0.1 * sizes[likely].max(initial=0)
        lung = np.isin(labels, which[likely])
        wide = np.pad(lung, 2)  # vessels and nodules belong to it
        lung = ndimage.binary_closing(wide, ball)[2:-2, 2:-2, 2:-2] & ~outside
    return {"body": tissue | lung, "lung": lung}


def _largest(mask: np.ndarray, share: float) -> np.ndarray:
    """The largest connected part of a mask, and those that have this share of its size."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= share * sizes.max())[labels] & mask


def box_means(values: np.ndarray, box: Sequence[int] | np.ndarray) -> np.ndarray:
    """(x, y, z) float32 means over boxes of `box` voxels; those at the far ends may be smaller."""
    means = values
    for axis in (2, 1, 0):  # what a file has in a row comes last, when little is left
        n, means = int(box[axis]), np.moveaxis(means, axis, 0)
        whole = len(means) // n * n
        sums = sum((means[k:whole:n].astype(np.float32) for k in range(1, n)), means[:whole:n].astype(np.float32))
        rest = [means[whole:].mean(0, keepdims=True, dtype=np.float32)] if whole < len(means) else []
        means = np.moveaxis(np.concatenate([sums / n, *rest]), 0, axis)
    return means


# ------------------------------------------------------------------------------------------------------ stored with it


def read_occupancy(volume: Volume) -> Occupancy | None:
    """The Occupancy that is stored with a volume; None where there is none, a damaged one, or that of another file."""
    for read in (_from_beside, _from_file):
        try:
            with reading(volume.path):
                stored = read(volume.path)
            if found := _sound(stored, volume.shape):
                return found
        except DAMAGED:
            pass
    return None


def _from_file(path: Path | str) -> dict[str, np.ndarray]:
    return read_group(path, GROUP) if is_kind(path, HDF5_SUFFIXES) else {}


def _from_beside(path: Path | str) -> dict[str, np.ndarray]:
    if not os.path.exists(index_path(path)):
        return {}
    with open(path, "rb") as file:
        return read_arrays(path, identity_of(file))


def _sound(stored: Mapping[str, np.ndarray], volume_shape: Sequence[int]) -> Occupancy | None:
    """The Occupancy in stored arrays, where it is one of a volume of this shape by today's rules. Raises DAMAGED."""
    block, shape = ([int(n) for n in np.ravel(stored[name])] for name in ("block", "shape"))
    bits = {kind: np.asarray(stored[kind]) for kind in FOREGROUNDS}
    fits = (
        int(stored["rules"]) == RULES
        and len(block) == 3
        and min(block) > 0
        and shape == [-(-n // side) for n, side in zip(volume_shape, block)]
        and all(one.dtype == np.uint8 and one.shape == (-(-np.prod(shape) // 8),) for one in bits.values())
    )
    return Occupancy(tuple(block), tuple(shape), bits) if fits else None


def occupancy_of(volume: Volume) -> Occupancy:
    """The Occupancy that is stored with a volume, or found now, for which it is read whole. Raises DataError."""
    return read_occupancy(volume) or find_foreground(volume.read(), volume.spacing)


# ---------------------------------------------------------------------------------------------------------- drawn from


class ForegroundDraws:
    """Voxels of a volume's body or lung, drawn at random. What was found is kept, about a kilobyte for each volume.

    kind: of FOREGROUNDS; share: of the draws, default FOREGROUND_SHARE; the others are None, which stands for anywhere
    """

    def __init__(self, kind: str, share: float | None = None) -> None:
        self.share = FOREGROUND_SHARE if share is None else share
        self.wanted = ("lung", "body") if kind == "lung" else (kind,)  # the second where there is none of the first
        self._kept = {}  # path -> (block, shape, kind or None, compressed bits)

    def draw(self, volume: Volume, rng: np.random.RandomState) -> np.ndarray | None:
        """(3,) voxel in a block of the kind, or None. Raises DataError."""
        if rng.random_sample() >= self.share:
            return None
        block, shape, kind, bits = self._of(volume)
        if kind is None:
            return None
        mask = np.unpackbits(np.frombuffer(zlib.decompress(bits), np.uint8), count=int(np.prod(shape)))
        places = np.flatnonzero(mask)
        place = np.array(np.unravel_index(places[rng.randint(len(places))], shape))
        return np.minimum(place * block + rng.randint(block), np.array(volume.shape) - 1)

    def missing(self, volume: Volume) -> str:
        """What a volume that was drawn from has not, and what is taken instead, in words; "" where it has it."""
        kind = self._kept[volume.path][2] if volume.path in self._kept else self.wanted[0]
        if kind == self.wanted[0]:
            return ""
        return f"no {self.wanted[0]} was found in it: patches are drawn " + (f"in the {kind}" if kind else "anywhere")

    def _of(self, volume: Volume) -> tuple[tuple[int, ...], tuple[int, ...], str | None, bytes]:
        if volume.path not in self._kept:
            found = occupancy_of(volume)
            kind = next((kind for kind in self.wanted if found.bits[kind].any()), None)
            bits = zlib.compress(found.bits[kind].tobytes()) if kind else b""
            self._kept[volume.path] = found.block, found.shape, kind, bits
        return self._kept[volume.path]


def unindexed_lines(paths: Sequence[str], foreground: str) -> list[str]:
    """Lines on volumes without stored Occupancy, if it is needed, and on large ones that are read through the HDF5
    library for want of an index, of a part of a large data set. foreground: what --foreground is"""
    step = max(1, len(paths) // LOOKED_INTO)
    looked, without, slow = paths[::step], [], []
    for path in looked:
        if foreground not in FOREGROUNDS and not is_kind(path, HDF5_SUFFIXES):
            continue  # nothing to be told
        try:
            with Volume(path) as volume:
                if foreground in FOREGROUNDS and read_occupancy(volume) is None:
                    without.append(path)
                if volume.slow and 2 * np.prod(volume.shape) > SMALL:
                    slow.append(f"{path} ({volume.slow})")
        except DataError:  # told when it is drawn from
            pass
    lines = []
    if without:
        lines.append(
            f"{len(without)} of {len(looked)} volumes have no stored occupancy, such as {without[0]}: each loader "
            "worker finds it, for which it reads the file whole once; prepare_data.py index DIR stores it (see "
            "docs/data.md)"
        )
    if slow:
        lines.append(
            f"{len(slow)} of {len(looked)} volumes are read through the HDF5 library, which is slower, such as "
            f"{slow[0]}: prepare_data.py index DIR stores where their chunks are (see docs/data.md)"
        )
    return lines
