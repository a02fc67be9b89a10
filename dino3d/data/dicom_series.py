"""DICOM series: which slices form a volume, where it lies, and what is told of it.

Geometry comes from the headers of the slices alone: rows and columns from the orientation, the third axis and the
spacing along it from the positions. SpacingBetweenSlices plays no part: positions are what it should agree with.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.data.conventions import LPS, DataError, LeftOut, Stored, format_size
from dino3d.data.dicom import Slice, is_beside, is_dicom, missing_geometry, read_header, rescale_values, why_no_ct
from dino3d.data.dicom_pixels import padding_note, read_voxels
from dino3d.data.geometry import APART
from dino3d.files import walk_files

COSINES = 0.02  # by which a row or column may miss the length 1, or the right angle: more than two decimals explain
ROUNDED = 2.5  # times half a unit of the last decimal of the cosines: how far off the normal may then be
TURNED = 0.9  # cosine between two normals, below which a slice is a scout among others
TOGETHER = 3  # slices, fewer of which make no acquisition of its own
NO_UID = "no-SeriesInstanceUID"


class Part(NamedTuple):
    """Slices of one series that may form a volume.

    folder: the one that holds all of the series; uid: of the series; first: path of the first slice
    """

    folder: str
    uid: str
    first: str
    slices: list[Slice]


class Series(NamedTuple):
    """A volume of slices in order. affine: (4, 4) from (column, row, slice) to RAS mm; notes: lines on what is odd."""

    slices: list[Slice]
    affine: np.ndarray
    notes: tuple[str, ...]


# ------------------------------------------------------------------------------------------------- which slices belong


def series_key(one: Slice) -> tuple[str, ...]:
    """What the slices of a series share: whose, of which study, which series; without a UID, in which folder."""
    person = re.sub(r"[\W_]+", " ", one.person).strip().casefold()  # ROE^JANE and Roe^Jane^^ are one
    return one.patient, person, one.study, one.series, "" if one.series else os.path.dirname(one.path)


def lost_names(keys: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """{series_key: why it is left out} of the parts of one series, of which some lack whose or of which study they are.

    Apart they are volumes with every second slice; together they might be two patients in one.
    """
    lost, of_uid = {}, collections.defaultdict(list)
    for key in keys:
        of_uid[key[3]].append(key)
    for uid, several in of_uid.items():
        for pair in itertools.combinations(several, 2) if uid else ():
            values = list(zip(("PatientID", "PatientName", "StudyInstanceUID"), *pair))
            without = [name for name, one, other in values if bool(one) != bool(other)]
            if without and all(one == other or not (one and other) for _, one, other in values):
                lost |= dict.fromkeys(pair, f"mixed slices: only some have a {' and a '.join(without)}")
    return lost


def parts_of(slices: Sequence[Slice]) -> list[Part]:
    """The Parts of the slices of one series (of one `series_key`), each in the order of paths."""
    slices = sorted(slices, key=lambda one: one.path)
    groups = [slices] if all(map(why_no_ct, slices)) else _split(slices)
    folders = [_common_folder(group) for group in groups]
    apart = all(os.path.commonpath([a, b]) not in (a, b) for a, b in itertools.combinations(folders, 2))
    if not apart:
        folders = [_common_folder(slices)] * len(groups)
    uid = "".join(c if c.isalnum() or c in ".-_" else "_" for c in slices[0].series)[:64] or NO_UID
    return [Part(folder, uid, group[0].path, group) for folder, group in zip(folders, groups)]


def _common_folder(slices: Sequence[Slice]) -> str:
    return os.path.commonpath({os.path.dirname(one.path) for one in slices})


def numbered(parts: Iterable[Any], root: Path | str) -> dict[str, Any]:
    """{<folder>#<UID>: part}, followed by #2, #3, ... where a folder has several of one UID, in the order of paths.

    parts: with folder, uid and first, in any order; root: what the folders' names are relative to
    """
    homes = collections.defaultdict(list)
    for part in parts:
        homes[f"{os.path.relpath(part.folder, root)}#{part.uid}"].append(part)
    return {
        name if k == 1 else f"{name}#{k}": part
        for name, several in homes.items()
        for k, part in enumerate(sorted(several, key=lambda part: part.first), 1)
    }


def _split(slices: list[Slice]) -> list[list[Slice]]:
    """Slices of one series in groups of one acquisition each, the one with the first path first.

    Acquisitions are kept apart where they reach into each other. Those that follow each other along the body, as a
    scanner's steps do, are one volume. What has no place stays with the first group.
    """
    placed, _ = _facing(_without_copies([one for one in slices if not (why_no_ct(one) or missing_geometry(one))])[0])
    if len(placed) < 2 * TOGETHER:
        return [slices]
    heights = {one.path: float(np.dot(one.position, _normal(placed[0]))) for one in placed}
    order = sorted(placed, key=lambda one: heights[one.path])
    mixed = bool(_doubled([heights[one.path] for one in order])) or _mixed_numbers(order)
    tags: list[Callable[[Slice], str]] = [
        lambda one, k=k: one.acquisition[k] for k in range(len(placed[0].acquisition))
    ]
    if mixed:  # these differ in sound series too
        tags += [lambda one: one.image_type, lambda one: one.kernel, lambda one: one.content_time, _folder]
    for tag in tags:
        groups = collections.defaultdict(list)
        for one in placed:
            groups[tag(one)].append(heights[one.path])
        if "" in groups and not mixed:  # the tag got lost in some slices of one acquisition
            continue
        if len(groups) > 1 and min(map(len, groups.values())) >= TOGETHER and _overlap(list(groups.values())):
            first = tag(slices[0]) if tag(slices[0]) in groups else tag(placed[0])
            found = collections.defaultdict(list)
            for one in slices:
                found[tag(one) if tag(one) in groups else first].append(one)
            return [part for group in found.values() for part in _split(group)]
    return [slices]


def _folder(one: Slice) -> str:
    return os.path.dirname(one.path)


def _overlap(groups: Sequence[Sequence[float]]) -> bool:
    """Whether heights of one group lie between those of another."""
    ends = sorted((min(group), max(group), group) for group in groups)
    for (_, top, group), (low, high, other) in zip(ends, ends[1:]):
        within = sum(low <= height <= high for height in group), sum(height <= top for height in other)
        if max(within) >= TOGETHER:
            return True
    return False


def _doubled(heights: Sequence[float]) -> list[int]:
    """Where in sorted heights two slices lie in one place."""
    gaps = np.diff(heights)
    return np.flatnonzero(gaps < max(0.1 * float(np.median(gaps)), 0.01)).tolist() if len(gaps) else []


def _mixed_numbers(order: Sequence[Slice]) -> bool:
    """Whether sorted slices are of several series that were given one UID: their numbers repeat and don't follow, or
    follow with every second, third or fourth slice."""
    numbers = np.array([int(one.number) for one in order if one.number.isdecimal()])

    def following(stride: int) -> float:
        return float((np.abs(numbers[stride:] - numbers[:-stride]) == 1).mean())

    different = len(np.unique(numbers))
    if len(numbers) < max(len(order), 2 * TOGETHER) or different == 1 or following(1) >= 0.75:
        return False
    return different <= 0.75 * len(numbers) or max(map(following, (2, 3, 4))) >= 0.75


def _without_copies(slices: Sequence[Slice]) -> tuple[list[Slice], int]:
    """(slices, how many were left out because another is the same: of one SOPInstanceUID and place, or all bytes)."""
    kept = {}
    for one in sorted(slices, key=lambda one: one.path):
        kept.setdefault((one.sop or _digest(one.path), one.position, one.orientation, one.acquisition), one)
    return list(kept.values()), len(slices) - len(kept)


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # it is told when it is read
        return path


def _normal(one: Slice) -> np.ndarray:
    normal = np.cross(one.orientation[:3], one.orientation[3:])
    return normal / (np.linalg.norm(normal) or 1)


def _facing(slices: Sequence[Slice]) -> tuple[list[Slice], list[Slice]]:
    """(slices that face where most do, the others) of slices with a geometry."""
    if not slices:
        return [], []
    normals = np.array([_normal(one) for one in slices])
    turned = [int((normals @ normals[k] > TURNED).sum()) for k in range(len(normals))] if len(normals) < 50 else None
    most = normals[int(np.argmax(turned))] if turned else np.median(normals, axis=0)
    alike = normals @ most > TURNED
    return [one for one, like in zip(slices, alike) if like], [one for one, like in zip(slices, alike) if not like]


# ------------------------------------------------------------------------------------------------------------ a volume


def assemble(slices: Sequence[Slice], min_slices: int, source: str) -> Series:
    """The Series that slices form, after a look at whether they do.

    slices: of one series, in any order; source: what to call it. Scouts and captures among them are passed over.
    Raises LeftOut where no even stack of at least `min_slices` CT slices remains, DataError for broken headers.
    """
    kinds = [why_no_ct(one) for one in slices]
    images, copies = _without_copies([one for one, kind in zip(slices, kinds) if kind is None])
    if not images:
        raise LeftOut(source, collections.Counter(kinds).most_common(1)[0][0])
    placed = [one for one in images if not missing_geometry(one)]
    nowhere = [one for one in images if missing_geometry(one)]
    if not placed:
        raise LeftOut(source, f"no geometry: without {missing_geometry(nowhere[0])}")
    kept, turned = _facing(placed)
    if len(turned) > 0.2 * len(kept):
        kept, turned = placed, []  # no scouts: they are told as mixed
    notes = []
    if copies:
        notes.append(f"{copies} files are copies of other slices (the same SOPInstanceUID) and count once")
    others = [(one, kind) for one, kind in zip(slices, kinds) if kind and not is_beside(kind)]
    if others:
        notes.append(f"{_some([one for one, _ in others])} left out: {others[0][1]}")
    if nowhere:
        notes.append(f"{_some(nowhere)} left out: without {missing_geometry(nowhere[0])}")
    if turned:
        notes.append(f"{_some(turned)} left out: of another orientation, such as a scout")
    try:
        kept, affine = _stack(kept, min_slices, source)
    except LeftOut as error:
        raise LeftOut(source, "; ".join([error.reason, *notes])) from None
    require_one_rescale(kept, source)
    for one in kept:
        try:
            rescale_values(one)
        except DataError as error:
            raise DataError(source, error.reason) from None
    beside = _beside(kept, affine)
    if beside > max(np.linalg.norm(affine[:3, :3], axis=0)):
        raise LeftOut(source, f"uneven spacing: slices lie up to {beside:.3g} mm beside an even grid")
    if beside > APART * min(np.linalg.norm(affine[:3, :3], axis=0)):
        notes.append(f"its slices lie up to {beside:.2g} mm beside the even grid that was taken")
    padding = padding_note(kept[0])
    return Series(kept, LPS @ affine, (*notes, *([padding] if padding else [])))


def _some(slices: Sequence[Slice]) -> str:
    names = f"such as {os.path.basename(slices[0].path)}"
    return f"1 slice ({os.path.basename(slices[0].path)})" if len(slices) == 1 else f"{len(slices)} slices ({names})"


def require_one_rescale(slices: Sequence[Slice], source: str) -> None:
    """Raise LeftOut where some slices lack the rescale to HU that others have."""
    lacking = collections.defaultdict(list)
    for one in slices:
        lacking[tuple(bool(text) for text in one.rescale)].append(one)
    if len(lacking) > 1:
        fewest = min(lacking.values(), key=len)
        raise LeftOut(
            source,
            f"mixed rescale: RescaleSlope or RescaleIntercept stand in some slices only; {_some(fewest)} "
            "differ from the others",
        )


def _stack(kept: list[Slice], min_slices: int, source: str) -> tuple[list[Slice], np.ndarray]:
    """(slices in order along their normal, (4, 4) affine to LPS mm) of even slices. Raises LeftOut for others."""
    for what, tolerance in (("size", 0), ("spacing", 1e-4), ("orientation", 1e-3)):
        values = sorted({getattr(one, what) for one in kept})
        if (np.ptp(values, axis=0) > tolerance).any():
            raise LeftOut(
                source, f"mixed slices: {what}s such as {format_size(values[0])} and {format_size(values[-1])}"
            )
    if len(kept) < max(min_slices, 2):
        raise LeftOut(source, f"too few slices: {len(kept)}, expected at least {max(min_slices, 2)} (--min_slices)")
    axes = _axes(kept[0], source)
    positions = np.array([one.position for one in kept])  # (N, 3)
    heights = positions @ axes[:, 2]
    order = np.argsort(heights, kind="stable")
    kept, positions, heights = [kept[i] for i in order], positions[order], heights[order]
    _require_even(kept, heights, source)
    travel = positions[-1] - positions[0]
    decimals = kept[0].decimals
    rounding = ROUNDED * 0.5 * 10.0**-decimals if decimals > 1 else 0  # 1\0\0\0\1\0 is meant as it stands
    length = np.linalg.norm(travel)
    sideways = travel - axes[:, 2] * (travel @ axes[:, 2])
    if np.linalg.norm(sideways) <= rounding * length:  # the positions are more exact than the cosines
        axes = _upright(axes, travel / length)
        heights = positions @ axes[:, 2]
    shifts = positions - positions[0] - np.outer(heights - heights[0], axes[:, 2])
    shift = float(np.linalg.norm(shifts, axis=1).max())
    if shift > 0.5 * min(kept[0].spacing):
        raise LeftOut(
            source, f"tilted gantry: the slices are shifted sideways by up to {shift:.3g} mm against each other"
        )
    affine = np.eye(4)
    step = (heights[-1] - heights[0]) / (len(kept) - 1)
    affine[:3, :3] = axes * [kept[0].spacing[1], kept[0].spacing[0], step]
    affine[:3, 3] = positions[0]
    return kept, affine


def _require_even(kept: Sequence[Slice], heights: np.ndarray, source: str) -> None:
    """Raise LeftOut where sorted slices are doubled, of several series, missing or uneven."""
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    doubled = _doubled(heights)
    if doubled:
        first, second = kept[doubled[0]], kept[doubled[0] + 1]
        raise LeftOut(
            source,
            f"doubled slices: {len(doubled)}, such as {os.path.basename(first.path)} and "
            f"{os.path.basename(second.path)} at {heights[doubled[0]]:g} mm",
        )
    if _mixed_numbers(kept):
        raise LeftOut(source, "several series of one UID: slices whose InstanceNumbers don't follow lie between others")
    uneven = np.flatnonzero(np.abs(gaps - usual) > 0.05 * usual + 0.1)  # some scanners write tenths of a millimetre
    if len(uneven):
        widest = int(uneven[np.argmax(gaps[uneven])])
        what = "missing slices" if gaps[widest] > 1.5 * usual else "uneven spacing"
        raise LeftOut(
            source,
            f"{what}: {gaps[widest]:.4g} mm between {os.path.basename(kept[widest].path)} and "
            f"{os.path.basename(kept[widest + 1].path)}, {usual:.4g} mm between most",
        )


def _axes(one: Slice, source: str) -> np.ndarray:
    """(3, 3) unit vectors at right angles along a row, along a column and to the next slice. Raises LeftOut."""
    row, column = np.array(one.orientation[:3]), np.array(one.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > COSINES or abs(row @ column) > COSINES:
        raise LeftOut(
            source,
            f"orientation is none: row and column of ImageOrientationPatient {format_size(one.orientation)} should be "
            f"of length 1 and at right angles, but are {lengths[0]:.4g} and {lengths[1]:.4g} long, with a cosine of "
            f"{row @ column:.2g} between them",
        )
    return _at_right_angles(row / lengths[0], column / lengths[1])


def _at_right_angles(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(3, 3) axes of two unit vectors, turned against each other by the same angle, and of their normal."""
    middle, across = row + column, row - column
    middle, across = middle / np.linalg.norm(middle), across / np.linalg.norm(across)
    row, column = (middle + across) / np.sqrt(2), (middle - across) / np.sqrt(2)
    return np.column_stack([row, column, np.cross(row, column)])


def _upright(axes: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """(3, 3) axes turned so that the third is this unit vector, which is near it."""
    flat = axes[:, :2] - np.outer(normal, normal @ axes[:, :2])
    return _at_right_angles(*(flat / np.linalg.norm(flat, axis=0)).T)


def _beside(slices: Sequence[Slice], affine: np.ndarray) -> float:
    """mm that a slice lies beside its place in an even stack, at most."""
    positions = np.array([one.position for one in slices])
    even = affine[:3, 3] + np.arange(len(slices))[:, None] * affine[:3, 2]
    return float(np.linalg.norm(positions - even, axis=1).max())


# ------------------------------------------------------------------------------------------------------------- reading


def stored_series(series: Series, source: str) -> Stored:
    """The Stored of a Series: its voxels are read when they are first taken. source: what errors name"""
    read = []

    def take(box: tuple[slice, ...]) -> np.ndarray:
        if not read:
            try:
                voxels = read_voxels(series.slices)
            except DataError as error:
                raise DataError(source, error.reason) from None
            voxels.flags.writeable = False  # what is taken are views of it
            read.append(voxels.T)
        return read[0][box]

    columns, rows = series.slices[0].size
    return Stored((columns, rows, len(series.slices)), series.affine, take, series.notes)


def open_series(path: Path | str, closing: contextlib.ExitStack) -> Stored:
    """The Stored of a DICOM series below a folder: <folder>#<SeriesInstanceUID>, or <folder> where it holds but one.

    Raises DataError.
    """
    path = os.fspath(path)
    return stored_series(assemble(_part_at(path).slices, 2, path), path)


def patient_of_series(path: Path | str) -> str:
    """PatientID of the series that `open_series` opens, "" where it has none or where nothing can be opened."""
    if os.path.isfile(path):
        return ""
    try:
        return _part_at(os.fspath(path)).slices[0].patient  # `series_key` has it: all slices of a part share one
    except (DataError, OSError):  # it is told when it is read
        return ""


def _part_at(path: str) -> Part:
    """The Part that a path names, see `open_series`. Raises DataError."""
    folder, uid = folder_and_uid(path)
    if not os.path.isdir(folder):
        raise DataError(path, "can't be read: no such file or folder")
    state = tuple((here, os.stat(here).st_mtime_ns) for here, _ in walk_files(folder, _fail))
    parts, failed = _parts_below(folder, state)
    if uid is None:
        parts = {name: part for name, part in parts.items() if not all(map(why_no_ct, part.slices))}
        if len(parts) != 1:
            found = f"{len(parts)} DICOM series of CT" + (f", such as {folder}{min(parts)[1:]}" if parts else "")
            raise DataError(
                path, f"can't be read: a folder with {found}, expected one" + (f" ({failed})" if failed else "")
            )
        name = next(iter(parts))
    else:
        name = f".#{uid}"
        if name not in parts:
            raise DataError(path, f"can't be read: no such DICOM series in the folder {folder}")
    return parts[name]


def folder_and_uid(path: str) -> tuple[str, str | None]:
    """(folder, what stands behind its #), None where the path is the folder itself."""
    if os.path.isdir(path):
        return path, None
    at = [k for k, letter in enumerate(path) if letter == "#" and os.sep not in path[k:]]
    # The last of them: a folder's own name may hold one, and there may be a folder of what stands before it
    return next(((path[:k] or ".", path[k + 1 :]) for k in at[::-1] if os.path.isdir(path[:k] or ".")), (path, None))


def _fail(error: OSError) -> None:
    raise DataError(error.filename, f"can't be listed ({error.strerror})") from error


@functools.lru_cache(maxsize=8)  # folders; a training worker opens the same ones again for every patch
def _parts_below(folder: str, state: tuple[tuple[str, int], ...]) -> tuple[dict[str, Part], str]:
    """({name relative to the folder: Part}, the first file that can't be read) of all DICOM files below a folder."""
    series, failed = collections.defaultdict(list), ""
    for here, names in walk_files(folder, _fail):
        for path in (os.path.join(here, name) for name in names):
            try:
                one = read_header(path) if os.path.isfile(path) and is_dicom(path) else None
            except (DataError, OSError) as error:
                failed = failed or f"{path}: {getattr(error, 'reason', error)}"
                continue
            if one:
                series[series_key(one)].append(one)
    return numbered((part for slices in series.values() for part in parts_of(slices)), folder), failed
