"""A random patch of a scan, from a file that is opened for it."""

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from augmentations import MultiCropAugmentation
from dino3d.benchmarks import baselines
from dino3d.benchmarks.scans import GLOBAL, LOCAL, LOCAL_NUMBER, POLICY, cut, scan
from dino3d.benchmarks.turns import comparison, sources, take_turns
from dino3d.command_line import UserError
from dino3d.data.conventions import format_size
from dino3d.data.hdf5 import write_volume
from dino3d.data.volume import Volume
from dino3d.prepare.index import store_index


def read(device: str, repeats: int, reads: int, size: Sequence[int]) -> dict[str, Any]:
    """A random patch of a scan from a file that is opened for it: Blosc chunks against gzip slices, warm cache."""
    import nibabel

    volume, affine, origin = scan(size)
    starts = np.random.RandomState(0).randint(0, np.array(size) - baselines.PATCH + 1, (repeats + 1, reads, 3))
    larger = MultiCropAugmentation(POLICY, GLOBAL, LOCAL, LOCAL_NUMBER).patch_size
    margin = (np.array(larger) - baselines.PATCH) // 2
    with tempfile.TemporaryDirectory() as folder:
        layouts = {
            "baseline": "itk.hdf5",
            "ours": "blosc.hdf5",
            "gzip": "gzip.hdf5",
            "none": "none.hdf5",
            "nii.gz": "scan.nii.gz",
            "nii": "scan.nii",
        }
        paths = {name: os.path.join(folder, file) for name, file in layouts.items()}
        baselines.write_itk(paths["baseline"], volume, affine)
        write_prepared(paths["ours"], volume, affine)
        for compression in ("gzip", "none"):
            write_volume(paths[compression], volume, affine, compression)
        for name in ("nii.gz", "nii"):
            nibabel.save(nibabel.Nifti1Image(volume, affine), paths[name])
        takes = {name: baselines.read_itk if name == "baseline" else read_volume for name in paths}
        for name, take in takes.items():
            for start in starts[0]:
                require_voxels(take(paths[name], start, baselines.PATCH), volume, start, baselines.PATCH, layouts[name])

        def reading(name: str) -> Callable[[int], None]:
            def run(turn: int) -> None:
                for start in starts[turn]:
                    takes[name](paths[name], start, baselines.PATCH)

            return run

        def reading_larger(turn: int) -> None:
            for start in starts[turn]:
                read_volume(paths["ours"], start - margin, larger)

        times = take_turns(
            {**{name: (reading(name), reads) for name in paths}, "larger": (reading_larger, reads)}, repeats
        )
        megabytes = {name: os.path.getsize(path) / 1e6 for name, path in paths.items()}

    notes = {
        "baseline": "ITK HDF5 written by SimpleITK, gzip, chunks of one slice; h5py opens, slices, closes",
        "ours": "ITK HDF5 of prepare_data.py, Blosc, chunks of 32 x 32 x 32, found by their index; read by Volume",
        "gzip": "the same with gzip; read by Volume",
        "none": "the same without compression; read by Volume",
        "nii.gz": "written by nibabel; read by Volume",
        "nii": "written by nibabel; read by Volume",
        "larger": f"as ours, the {format_size(larger)} voxels that all six augmentations on a view look at",
    }
    result = comparison(
        20,
        f"seconds per patch of {format_size(baselines.PATCH)} voxels",
        times,
        {name: f"{megabytes[name]:5.1f} MB: {note}" if name in paths else note for name, note in notes.items()},
        sources(baselines.write_itk, baselines.read_itk),
        {
            "data": origin,
            "patch": baselines.PATCH,
            "repeats": repeats,
            "reads_per_repeat": reads,
            "megabytes": megabytes,
        },
    )
    result["nifti_ratio"] = result["rows"]["nii.gz"]["seconds"] / result["ours"]
    return result


def read_volume(path: str, start: Sequence[int] | np.ndarray, size: Sequence[int]) -> np.ndarray:
    with Volume(path) as volume:
        return volume.read(start, size)


def write_prepared(path: str, volume: np.ndarray, affine: np.ndarray) -> None:
    """A scan as prepare_data.py nlst leaves it."""
    write_volume(path, volume, affine, "blosc")
    store_index(path)


def require_voxels(patch: np.ndarray, volume: np.ndarray, start: np.ndarray, size: Sequence[int], source: str) -> None:
    """Raise UserError unless a patch that was read has the voxels of the scan. source: named in the error"""
    if not np.array_equal(patch, cut(volume, start, size)):
        raise UserError(f"{source}: the patch at {start.tolist()} has other voxels than the scan")
