"""Cases on the working grid of a segmentation run, kept on disk in chunks: a patch is read in milliseconds, not in the
seconds that unpacking and resampling a whole CT take, and memory holds no more than patches.

A copy is two HDF5 files as dino3d/data/volume.py writes them (the CT; its mask, whose classes stand in for HU), places
of labelled voxels (foreground.npy) and, written last, what it was made of (json).
"""

import contextlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from augmentations import PATCH_VIEW, ViewParameters, keyed_rng
from dino3d.command_line import UserError
from dino3d.data import images
from dino3d.data.conventions import DataError
from dino3d.data.hdf5 import write_volume
from dino3d.data.layouts import Pair
from dino3d.data.parallel import in_processes, progress
from dino3d.data.requirements import Header, voxel_problems
from dino3d.data.volume import Volume, padded
from dino3d.features import sliding_window
from dino3d.files import atomic_write, file_state, read_json, write_json
from dino3d.finetune.crops import WindowAugmentation
from utils import Processes

if TYPE_CHECKING:
    import SimpleITK as sitk

CACHE_FORMAT = 2  # raise it when the same case gives another copy
BYTES_PER_VOXEL = 1.3  # on disk, per voxel
FOREGROUND = 5000  # places of labelled voxels of each class that are kept


class CaseInfo(NamedTuple):
    """What a case is.

    classes: of its label, sorted; shape: (3,) voxels on the working grid; stored: in the cache; hu: see `hu_problem`
    """

    classes: list[int]
    shape: list[int]
    stored: bool
    hu: str = ""


class CacheEntry(NamedTuple):
    """A copy to make, for a worker: of what, the files' path without suffix, and whether to write them."""

    pair: Pair
    spacing: tuple[float, ...]
    path: Path
    stamp: tuple[int | str, ...]
    stored: bool


class ResampledCache:
    """Copies of cases at a spacing, in a folder that several runs may share.

    folder: Path; pairs: layouts.Pair of each case; heads: crops.Header of each; spacing: (3,) mm
    most_bytes: that the copies may take; cases beyond are read and resampled whenever they are asked for
    """

    def __init__(
        self, folder: Path, pairs: Sequence[Pair], heads: Sequence[Header], spacing: Sequence[float], most_bytes: float
    ):
        self.folder = folder / "x".join(f"{s:g}" for s in spacing)
        self.pairs, self.spacing = pairs, tuple(spacing)
        voxels = [np.prod(np.array(head.shape) * head.spacing) / np.prod(spacing) for head in heads]
        self.stored = (np.cumsum(voxels) * BYTES_PER_VOXEL <= most_bytes).tolist()

    def make(self, processes: Processes, workers: int) -> list[CaseInfo]:
        """[CaseInfo] of every case, after making the copies that are not there yet; ranks share the work.

        workers: reading processes of this rank. Raises UserError, on all ranks, for a case that can't be used.
        """
        processes.run_on_main(self._make_folder)
        mine = range(processes.rank, len(self.pairs), processes.world_size)
        found = {i: self._found(i) for i in mine}
        todo = {self._copy(i): i for i in mine if found[i] is None}
        with progress(len(todo), "case") as bar:
            made = (
                in_processes(make_entry, todo, workers)
                if workers > 1 and len(todo) > 1
                else ((copy, make_entry(copy)) for copy in todo)
            )
            for copy, result in made:
                found[todo[copy]] = (
                    result or f"{copy.pair.image}: the process that read it died: it may need more memory"
                )
                bar.update()
        found = {i: one for part in processes.all_gather(found) for i, one in part.items()}
        for i in range(len(self.pairs)):
            if isinstance(found[i], str):
                raise UserError(found[i], everywhere=True)
        return [found[i] for i in range(len(self.pairs))]

    def read(self, case: int) -> "tuple[sitk.Image, np.ndarray]":
        """(SimpleITK.Image int16 HU, (X, Y, Z) uint8 classes) of a whole case. Raises DataError."""
        if not self.stored[case]:
            image, label = resample_pair(self.pairs[case], self.spacing)
            return image, images.voxels_of(label).copy()
        with open_entry(*self._files(case)) as (image, label):
            return images.make_image(image.read(), image.affine), label.read().astype(np.uint8)

    def read_window(self, case: int, size: Sequence[int]) -> "tuple[sitk.Image, np.ndarray]":
        """(SimpleITK.Image, (x, y, z) uint8 classes) of a window of `size` voxels around the middle of what is
        labelled, or of the case. Raises DataError."""
        reader = self.reader(case)
        centre = np.median(reader.foreground[:, :3], axis=0) if len(reader.foreground) else np.array(reader.shape) / 2
        crop, mask = reader.read(np.rint(centre - np.array(size) / 2).astype(int), size)
        return images.make_image(crop, np.diag([*self.spacing, 1.0])), mask

    def reader(self, case: int) -> "StoredReader | MemoryReader":
        """A StoredReader or MemoryReader of patches of a case. Raises DataError."""
        if self.stored[case]:
            return StoredReader(*self._files(case), self._base(case))
        return MemoryReader(*resample_pair(self.pairs[case], self.spacing))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: can't be made ({error.strerror}); choose another --cache_dir") from error

    def _base(self, case: int) -> Path:
        pair = self.pairs[case]
        paths = b"\0".join(os.fsencode(os.path.abspath(path)) for path in (pair.image, pair.label))
        return self.folder / f"{pair.name.replace('/', '_')}-{zlib.crc32(paths):08x}"

    def _files(self, case: int) -> tuple[str, str]:
        base = self._base(case)
        return f"{base}.image.hdf5", f"{base}.label.hdf5"

    def _copy(self, case: int) -> CacheEntry:
        return CacheEntry(self.pairs[case], self.spacing, self._base(case), self._stamp(case), self.stored[case])

    def _stamp(self, case: int) -> tuple[int | str, ...]:
        pair = self.pairs[case]
        return (
            CACHE_FORMAT,
            os.path.abspath(pair.image),
            *file_state(pair.image),
            os.path.abspath(pair.label),
            *file_state(pair.label),
        )

    def _found(self, case: int) -> CaseInfo | None:
        """CaseInfo of a copy that an earlier run has made of the same files; None without one."""
        try:
            kept = read_json(f"{self._base(case)}.json")
            whole = kept["stamp"] == list(self._stamp(case)) and all(map(os.path.exists, self._files(case)))
            return CaseInfo(kept["classes"], kept["shape"], True, kept["hu"]) if whole and self.stored[case] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


@contextlib.contextmanager
def open_entry(*paths: str) -> Iterator[list[Volume]]:
    """The Volumes of copies, while they are read. Raises DataError."""
    try:
        with contextlib.ExitStack() as closing:
            yield [closing.enter_context(Volume(path)) for path in paths]
    except DataError as error:
        raise DataError(error.path, f"{error.reason}; remove it to have it made again") from error


def resample_pair(pair: Pair, spacing: Sequence[float]) -> "tuple[sitk.Image, sitk.Image]":
    """(image, label), SimpleITK.Images on the working grid. Raises DataError."""
    image, label = sliding_window.read_case(pair)
    return sliding_window.to_network_grid(image, spacing), sliding_window.to_network_grid(label, spacing, is_label=True)


def make_entry(copy: CacheEntry) -> CaseInfo | str:
    """The CaseInfo of a case, whose copy is then written; the text of what is wrong with it."""
    try:
        image, label = sliding_window.read_case(copy.pair)
        fault, hu = voxel_problems(images.voxels_of(image))
        if fault:
            raise DataError(copy.pair.image, fault)
        classes = sorted({0, *np.unique(images.voxels_of(label)).tolist()})
        image = sliding_window.to_network_grid(image, copy.spacing)
        if copy.stored:
            label = sliding_window.to_network_grid(label, copy.spacing, is_label=True)
            mask = images.voxels_of(label)
            write_volume(f"{copy.path}.image.hdf5", images.voxels_of(image), images.affine_of(image))
            write_volume(f"{copy.path}.label.hdf5", mask.astype(np.int16), images.affine_of(image))
            with atomic_write(f"{copy.path}.foreground.npy") as part:
                np.save(part, sample_foreground(mask))
            kept = {"stamp": copy.stamp, "classes": classes, "shape": image.GetSize(), "hu": hu}
            write_json(f"{copy.path}.json", kept)
        return CaseInfo(classes, list(image.GetSize()), copy.stored, hu)
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{copy.path}: can't be written ({error.strerror or error}); make room or choose another --cache_dir"


def sample_foreground(mask: np.ndarray) -> np.ndarray:
    """(n, 4) int16 index and class of labelled voxels, at most FOREGROUND of each class, always the same ones."""
    places = []
    for k in np.unique(mask):
        if k:
            index = np.argwhere(mask == k)
            drawn = np.random.default_rng(0).permutation(len(index))[:FOREGROUND]
            places.append(np.column_stack([index[np.sort(drawn)], np.full(len(drawn), k)]))
    return np.concatenate(places).astype(np.int16) if places else np.zeros((0, 4), np.int16)


class StoredReader:
    """Patches of a copy on disk. shape: (3,) voxels; foreground: see `sample_foreground`"""

    def __init__(self, image_path: str, label_path: str, base: Path):
        self.image_path, self.label_path = image_path, label_path
        try:
            self.foreground = np.load(f"{base}.foreground.npy")
        except (OSError, EOFError, ValueError) as error:
            raise DataError(
                f"{base}.foreground.npy", f"can't be read ({error}); remove it to have it made again"
            ) from error
        with open_entry(image_path) as (image,):
            self.shape = image.shape

    def read(
        self, start: Sequence[int] | np.ndarray, size: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """((x, y, z) int16 HU, (x, y, z) uint8 classes) from voxel `start` on; air and background outside."""
        with open_entry(self.image_path, self.label_path) as (image, label):
            return image.read(start, size), np.maximum(label.read(start, size), 0).astype(np.uint8)


class MemoryReader:
    """What StoredReader is, of a case in memory."""

    def __init__(self, image: "sitk.Image", label: "sitk.Image"):
        self.voxels = [images.voxels_of(one).astype(np.int16) for one in (image, label)]
        self.shape, self.foreground = self.voxels[0].shape, sample_foreground(self.voxels[1])

    def read(
        self, start: Sequence[int] | np.ndarray, size: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        crop, mask = (
            padded(lambda low, high, voxels=voxels: voxels[tuple(map(slice, low, high))], self.shape, start, size)
            for voxels in self.voxels
        )
        return crop, np.maximum(mask, 0).astype(np.uint8)


class CachedPatches(Dataset):
    """Patches of cases with their masks and how to augment them, for keys (epoch, patch, counted).

    per_case: patch // per_case is the case; foreground_share: of patches whose middle half holds a labelled voxel
    augmentation: crops.WindowAugmentation; size: (3,) voxels that are read: its window, and what a turned one reaches
    """

    def __init__(
        self,
        cache: ResampledCache,
        per_case: int,
        foreground_share: float,
        augmentation: WindowAugmentation,
        size: Sequence[int],
        seed: int,
    ):
        self.cache, self.per_case, self.foreground_share = cache, per_case, foreground_share
        self.augmentation, self.size, self.seed = augmentation, np.array(size), seed
        self._readers = {}  # of this worker: those of stored copies are small, of the others there is one

    def path_of(self, patch: int) -> str:
        return self.cache.pairs[patch // self.per_case].image

    def __getitem__(
        self, key: tuple[int, int, bool]
    ) -> tuple[np.ndarray, int, bool, list[ViewParameters], np.ndarray] | str:
        epoch, patch, counted = key
        try:
            reader = self._reader(patch // self.per_case)
            rng = keyed_rng(self.seed, epoch, patch, PATCH_VIEW)
            start = np.rint(self._centre(rng, reader) - self.size / 2).astype(int)
            crop, mask = reader.read(start, self.size)
        except DataError as error:  # an exception would reach the main process as a traceback's text
            return str(error)
        return crop, patch, counted, self.augmentation.draw(self.seed, epoch, patch, crop.shape), mask

    def _reader(self, case: int) -> StoredReader | MemoryReader:
        if case not in self._readers:
            if not self.cache.stored[case]:
                self._readers = {i: reader for i, reader in self._readers.items() if self.cache.stored[i]}
            self._readers[case] = self.cache.reader(case)
        return self._readers[case]

    def _centre(self, rng: np.random.RandomState, reader: StoredReader | MemoryReader) -> np.ndarray:
        """(3,) voxels: of a window anywhere in the case or, so often, with a labelled voxel in its middle half."""
        window, shape = self.augmentation.size, np.array(reader.shape)
        anywhere = shape / 2 + rng.uniform(-0.5, 0.5, 3) * np.maximum(shape - window, 0)
        wanted, which, where = rng.uniform(size=3)
        offset = rng.uniform(-0.25, 0.25, 3) * window
        if wanted >= self.foreground_share or not len(reader.foreground):
            return anywhere
        classes = np.unique(reader.foreground[:, 3])
        places = reader.foreground[reader.foreground[:, 3] == classes[int(which * len(classes))], :3]
        return places[int(where * len(places))] + 0.5 + offset
