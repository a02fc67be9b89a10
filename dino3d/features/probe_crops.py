"""The labelled crops of a probe: found, looked at, and read in batches of windows that the ranks share."""

import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dino3d.command_line import UserError, format_values
from dino3d.data.conventions import DataError
from dino3d.data.layouts import Crop, find_crops
from dino3d.data.requirements import (
    Header,
    crop_faults,
    hu_warnings,
    most_common,
    note_lines,
    spacing_warnings,
    voxel_problems,
)
from dino3d.evaluation.protocols import count_by_patient
from dino3d.evaluation.statistics import FEWEST_PATIENTS
from dino3d.features.trivial import trivial_figures
from dino3d.features.windows import SAME, centre_region, read_ct
from dino3d.training.loading import cores_per_process
from utils import Processes

# Crops that are embedded together, on any number of processes: each one's features are then the same
PROBE_BATCH = 16
KEPT_BYTES = 1 << 31  # of all crops' windows, up to which they stay in memory; beyond, each probe reads them again


class ReadCrop(NamedTuple):
    """A crop as it was read. problems: `voxel_problems` of the whole crop; window: (x, y, z) int16 HU around its
    middle, spacing: (3,) mm of that; crc32: of the window; trivial: {name: (F,)}"""

    header: Header
    problems: tuple[str, str]
    window: np.ndarray | None
    spacing: tuple[float, ...]
    crc32: int
    trivial: dict[str, np.ndarray] = {}


def read_window(path: str, size: Sequence[int], spacing: Sequence[float] | None) -> ReadCrop:
    """A crop and its window, the one that extract_features.py takes too. size: (3,) voxels; spacing: (3,) mm, or None

    Raises DataError, also for a mask.
    """
    scan = read_ct(path)
    region = centre_region(scan, size, spacing)
    (window,) = region.windows()
    header = Header(scan.hu.shape, tuple(scan.spacing.tolist()), scan.notes)
    return ReadCrop(header, voxel_problems(scan.hu), window, region.spacing, zlib.crc32(window.tobytes()))


class ProbeCrops:
    """Labelled crops in batches of PROBE_BATCH windows around their middles, of which each rank reads its share.

    folder: in the layout of `find_crops`; size: (3,) voxels of a window; spacing: (3,) mm, None: the crops' own voxels
    After `read`: labels (N,), patients, identity: {name: value} that tells these crops from others.
    """

    def __init__(self, folder: str, size: Sequence[int], spacing: Sequence[float] | None, processes: Processes) -> None:
        self.folder, self.size, self.spacing, self.processes = folder, tuple(size), spacing, processes
        self._kept: dict[int, np.ndarray] = {}

    def read(self, trivial: bool) -> tuple[list[str], dict[str, np.ndarray]]:
        """(lines on what is odd, {name: (N, F) trivial figures of all crops, if asked for}), the same on every rank.

        Raises UserError, on all ranks, for what can't be used.
        """
        crops = self.processes.run_on_main(self._find)
        self.paths, self.patients = [crop.path for crop in crops], [crop.patient for crop in crops]
        self.labels = np.array([crop.label for crop in crops])
        keep = len(crops) * 2 * math.prod(self.size) <= KEPT_BYTES
        mine = {}  # {number of a crop: ReadCrop, or why it can't be read}
        for batch in self.mine():
            of_batch = self._read(batch)
            if keep and not any(isinstance(one, DataError) for one in of_batch):
                self._kept[batch] = self._stacked([one.window for one in of_batch])
            for i, one in zip(self._numbers(batch), of_batch):
                if isinstance(one, ReadCrop):
                    figures = trivial_figures(one.window, one.spacing) if trivial else {}
                    one = one._replace(window=None, trivial=figures)
                mine[i] = one
        found = {}
        for part in self.processes.all_gather(mine):
            found |= part
        found = [found[i] for i in range(len(crops))]
        for one in found:
            if isinstance(one, DataError):
                raise UserError(f"--probe_dir {one}", everywhere=True)
        headers, seen = [one.header for one in found], {path: one.problems for path, one in zip(self.paths, found)}
        faults, _ = crop_faults(self.paths, headers, seen)
        if faults:
            raise UserError(f"--probe_dir {faults[0]}", everywhere=True)
        self.identity = {
            "crops": len(crops),
            "patients": len(set(self.patients)),
            "crc32": f"{zlib.crc32(repr([(one[1:3], two.crc32) for one, two in zip(crops, found)]).encode()):08x}",
        }
        curves = {name: np.stack([one.trivial[name] for one in found]) for name in found[0].trivial}
        return self._odd(headers, seen), curves

    def mine(self) -> range:
        """Numbers of the batches that are this rank's."""
        return range(self.processes.rank, math.ceil(len(self.paths) / PROBE_BATCH), self.processes.world_size)

    def windows(self, batch: int) -> np.ndarray:
        """(PROBE_BATCH, x, y, z) int16 HU; what the last batch lacks is 0. Raises DataError for what can't be read."""
        if batch in self._kept:
            return self._kept[batch]
        found = self._read(batch)
        for one in found:
            if isinstance(one, DataError):
                raise one
        return self._stacked([one.window for one in found])

    def _numbers(self, batch: int) -> range:
        return range(batch * PROBE_BATCH, min((batch + 1) * PROBE_BATCH, len(self.paths)))

    def _stacked(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        stacked = np.zeros((PROBE_BATCH, *self.size), np.int16)
        stacked[: len(windows)] = windows
        return stacked

    def _read(self, batch: int) -> list[ReadCrop | DataError]:
        """Each crop of a batch, or why it can't be read."""

        def attempt(path: str) -> ReadCrop | DataError:
            try:
                return read_window(path, self.size, self.spacing)
            except DataError as error:
                return error

        with ThreadPoolExecutor(cores_per_process(self.processes)) as pool:
            return list(pool.map(attempt, [self.paths[i] for i in self._numbers(batch)]))

    def _find(self) -> list[Crop]:
        """The crops below the folder. Raises UserError for what keeps them from being judged in folds."""
        try:
            crops, problems = find_crops(self.folder)
        except DataError as error:
            raise UserError(f"--probe_dir {error}") from error
        if problems:
            raise UserError(f"--probe_dir {problems[0]}")
        names, counts = count_by_patient([crop.patient for crop in crops], [crop.label for crop in crops])
        with_label = (counts > 0).sum(0)
        if len(names) < FEWEST_PATIENTS or with_label.min() < 2:
            raise UserError(
                f"--probe_dir {self.folder}: has crops of {len(names)} patients, of label{with_label.argmin()} of "
                f"{with_label.min()}: expected at least {FEWEST_PATIENTS}, and 2 with each label, for folds by patient"
            )
        return crops

    def _odd(self, headers: Sequence[Header], seen: Mapping[str, tuple[str, str]]) -> list[str]:
        """Lines on what is odd about the crops."""
        lines = hu_warnings(list(seen), [problem for _, problem in seen.values()], share=0.5)
        if self.spacing is None:
            most = most_common([header.spacing for header in headers])
            lines += spacing_warnings(self.paths, [header.spacing for header in headers], most, "most")
        else:
            other = [header for header in headers if not np.allclose(header.spacing, self.spacing, rtol=SAME, atol=0)]
            if other:
                lines.append(
                    f"note: {len(other)} of the {len(headers)} crops of --probe_dir are resampled from "
                    f"{format_values(np.round(other[0].spacing, 4))} mm and the like to --spacing "
                    f"{format_values(self.spacing)} mm"
                )
        extent = np.multiply(headers[0].shape, headers[0].spacing)
        window = np.multiply(self.size, headers[0].spacing if self.spacing is None else self.spacing)
        if (extent < 0.99 * window).any():
            lines.append(
                f"note: the crops of --probe_dir are {format_values(np.round(extent, 1))} mm, smaller than the window "
                f"of {format_values(np.round(window, 1))} mm that the encoder sees: around them is air"
            )
        return [line.replace("files", "crops of --probe_dir", 1) for line in lines] + note_lines(
            self.paths, [header.notes for header in headers]
        )
