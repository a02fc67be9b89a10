"""What a folder holds: volume files and DICOM series at any depth, and what in it is neither."""

import collections
import contextlib
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dino3d.data.conventions import NIFTI_SUFFIXES, VOLUME_SUFFIXES, DataError, LeftOut, is_kind
from dino3d.data.dicom import ARCHIVE_SUFFIXES, Slice, is_dicom, read_header, why_no_ct
from dino3d.data.dicom_series import folder_and_uid, lost_names, numbered, parts_of, series_key
from dino3d.data.itk import voxel_files
from dino3d.data.parallel import in_processes, progress
from dino3d.data.sidecar import identity_of
from dino3d.files import crc32_of, file_state, walk_files

FILES_PER_TASK = 500  # that a worker looks into at a time, if no folder has more
LARGEST_FOLDER = 5000  # files, up to which a folder is looked into as a whole
OURS = ("manifest.csv", "prepare.json")  # what a conversion leaves beside what it writes
VOXEL_SUFFIXES = (".raw", ".zraw", ".raw.gz")  # of files that belong to a header beside them


class File(NamedTuple):
    """A file of the input: path relative to it, and what changes when the file does."""

    path: str
    size: int
    time: int


class Scan(NamedTuple):
    """A volume file or a DICOM series.

    name: relative to the folder: of the file, or <folder>#<SeriesInstanceUID>, which `Volume` opens too
    header: of a series' first slice; problem: why it is not to be taken
    """

    name: str
    files: Sequence[File]
    header: Slice | None = None
    problem: DataError | None = None


class Found(NamedTuple):
    """scans: Scans sorted by name; problems: those not to be taken, each with its reason; others: files by kind."""

    scans: list[Scan]
    problems: list[Scan]
    others: collections.Counter[str]

    def passed_over(self) -> str:
        """What was not taken, by kind, in one line; "" where all was."""
        counts = [f"{n} {kind}" for kind, n in sorted(self.others.items(), key=lambda pair: (-pair[1], pair[0]))]
        reasons = collections.Counter(
            ("DICOM series" if "#" in scan.name else "files") + f" ({scan.problem.reason.split(';')[0]:.80})"
            for scan in self.problems
        )
        return ", ".join([*counts, *(f"{n} {reason}" for reason, n in sorted(reasons.items()))])


class SeriesFiles(NamedTuple):
    """What is found of a series: folder, uid and first as a `Part` has them, its files, the header of the first."""

    folder: str
    uid: str
    first: str
    files: list[File]
    header: Slice
    problem: str | None


class Looked(NamedTuple):
    """What a worker finds: {series_key: SeriesFiles}, volume files, unreadable ones, others by kind."""

    series: dict[tuple[str, ...], list[SeriesFiles]]
    volumes: list[File]
    problems: list[Scan]
    others: collections.Counter[str]


def find_scans(folder: Path | str, skip: Sequence[Path | str] = (), workers: int = 0) -> Found:
    """The volume files and DICOM series below a folder.

    skip: folders that are not looked into; workers: processes that read headers, 0: this one
    Raises DataError where a process dies of a file.
    """
    problems, here_are = [], []
    skipped = {os.path.realpath(one) for one in skip}

    def fail(error: OSError) -> None:
        where = os.path.relpath(error.filename, folder)
        problems.append(Scan(where, [], problem=DataError(error.filename, f"can't be listed: {error.strerror}")))

    for here, names in walk_files(folder, fail):
        parents = os.path.realpath(here).split(os.sep)
        if not skipped or not any(os.sep.join(parents[:k]) in skipped for k in range(2, len(parents) + 1)):
            where = os.path.relpath(here, folder)
            here_are.append([os.path.normpath(os.path.join(where, name)) for name in names])
    series, volumes, others = {}, [], collections.Counter()
    split = collections.defaultdict(list)  # series of which several workers found a part: {key: paths}
    for looked in _look(str(folder), list(_tasks(here_are)), workers):
        for key, parts in looked.series.items():
            if key in series:
                split[key] += [file.path for part in parts for file in part.files]
            series.setdefault(key, parts)
        volumes, problems, others = volumes + looked.volumes, problems + looked.problems, others + looked.others
    for key in split:
        split[key] += [file.path for part in series.pop(key) for file in part.files]
    for looked in _look(str(folder), list(split.values()), workers):
        series |= looked.series
    for key, reason in lost_names(list(series)).items():
        series[key] = [part._replace(problem=part.problem or reason) for part in series[key]]
    scans = []
    for name, part in numbered((part for parts in series.values() for part in parts), folder).items():
        problem = LeftOut(os.path.join(folder, name), part.problem) if part.problem else None
        scans.append(Scan(name, part.files, part.header, problem))
    uncorrected = _uncorrected({file.path for file in volumes})
    for file in volumes:
        twin = uncorrected.get(file.path)
        reason = f"uncorrected: dcm2niix made {os.path.basename(twin)} of it, whose slices are even" if twin else ""
        scans.append(
            Scan(file.path, [file], problem=LeftOut(os.path.join(folder, file.path), reason) if twin else None)
        )
    scans.sort(key=lambda scan: scan.name)
    problems += [scan for scan in scans if scan.problem]
    problems.sort(key=lambda scan: scan.name)
    return Found([scan for scan in scans if not scan.problem], problems, others)


def state_of(path: Path | str) -> str:
    """16 hex digits that change when a file does from which `Volume` reads what the path stands for."""
    files = _files_behind(os.fspath(path))
    return hashlib.sha256(repr([(one, file_state(one)) for one in files]).encode()).hexdigest()[:16]


def content_of(path: Path | str, whole: bool = False) -> str:
    """Size and CRC-32 of the files from which `Volume` reads what the path stands for, as text: what a copy has too,
    wherever it lies; "" where one can't be read.

    whole: the checksum of all bytes, not of some as `sidecar.identity_of` takes them
    """
    found = []
    try:
        for file in _files_behind(os.fspath(path)):
            with open(file, "rb") as stream:
                size, code, _ = identity_of(stream)
                found.append((size, crc32_of(stream, size) if whole else code))
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return ""
    return f"{sum(size for size, _ in found)} bytes, {zlib.crc32(repr(found).encode()):08x}"


def _files_behind(path: str) -> list[str]:
    """The files from which `Volume` reads what a path stands for."""
    files = [path]
    if is_kind(path, (".mhd", ".nhdr")):
        with contextlib.suppress(DataError):  # it is refused when its turn comes
            files += voxel_files(path)
    elif not is_kind(path, VOLUME_SUFFIXES):
        folder = folder_and_uid(path)[0]
        files = sorted(os.path.join(here, name) for here, names in walk_files(folder, lambda _: None) for name in names)
    return files


def _tasks(folders: Sequence[list[str]]) -> Iterator[list[str]]:
    """Paths in tasks for workers; a folder stays together, so that a series mostly does."""
    task = []
    for names in folders:
        if len(names) > LARGEST_FOLDER:
            yield from (names[at : at + FILES_PER_TASK] for at in range(0, len(names), FILES_PER_TASK))
            continue
        task = task + names
        if len(task) >= FILES_PER_TASK:
            yield task
            task = []
    if task:
        yield task


def _look(root: str, tasks: Sequence[list[str]], workers: int) -> Iterator[Looked]:
    items = [(root, names) for names in tasks]
    with progress(sum(map(len, tasks)), "header") as bar:
        for (_, names), looked in (
            in_processes(look_into, items, workers)
            if workers and len(items) > 1
            else ((i, look_into(i)) for i in items)
        ):
            if looked is None:
                raise DataError(root, f"a process died while it read the headers of {names[0]} to {names[-1]}")
            bar.update(len(names))
            yield looked


def look_into(task: tuple[str, list[str]]) -> Looked:
    """What the files (relative paths) below a folder are."""
    root, names = task
    headers, files = collections.defaultdict(list), {}
    volumes, problems, others, beside = [], [], collections.Counter(), set(names)
    for name in names:
        path = os.path.join(root, name)
        try:
            status = os.stat(path)
            file = File(name, status.st_size, status.st_mtime_ns)
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
                others["pipes and devices"] += 1
            elif is_kind(name, VOLUME_SUFFIXES):
                volumes.append(file)
            elif is_dicom(path) and (header := read_header(path)):
                headers[series_key(header)].append(header)
                files[path] = file
            elif os.path.basename(name) not in OURS and not _belongs_to_a_header(name, beside):
                others[_kind(name)] += 1
        except (OSError, DataError) as error:
            reason = f"can't be read: {error.strerror}" if isinstance(error, OSError) else error.reason
            problems.append(Scan(name, [File(name, -1, 0)], problem=DataError(path, reason)))
    series = {}
    for key, slices in headers.items():
        series[key] = []
        for part in parts_of(slices):
            kinds = [why_no_ct(one) for one in part.slices]
            problem = collections.Counter(kinds).most_common(1)[0][0] if all(kinds) else None
            of_part = sorted(files[one.path] for one in part.slices)
            header = part.slices[0]._replace(path=of_part[0].path)
            series[key].append(SeriesFiles(part.folder, part.uid, part.first, of_part, header, problem))
    return Looked(series, volumes, problems, others)


def _belongs_to_a_header(name: str, names: set[str]) -> bool:
    stem = next((name[: -len(suffix)] for suffix in VOXEL_SUFFIXES if is_kind(name, (suffix,))), None)
    return stem is not None and bool({stem + ".mhd", stem + ".nhdr"} & names)


def _kind(name: str) -> str:
    """What to call files of a kind that is not read."""
    if os.path.basename(name).upper() == "DICOMDIR":
        return "DICOMDIR files"
    if is_kind(name, ARCHIVE_SUFFIXES):
        return "packed archives (unpack them)"
    suffix = os.path.splitext(name)[1].lower()
    return f"{suffix} files" if re.fullmatch(r"\.[a-z][a-z0-9]{0,7}", suffix) else "other files"


def _uncorrected(paths: set[str]) -> dict[str, str]:
    """{volume that dcm2niix wrote with uneven or tilted slices: the one beside it that it made even}."""
    stems = {}
    for path in sorted(paths):
        suffix = next((one for one in sorted(NIFTI_SUFFIXES, key=len)[::-1] if is_kind(path, (one,))), None)
        if suffix:
            stems[path[: -len(suffix)]] = path
    found = {}
    for stem, path in stems.items():
        for match in re.finditer(r"_(?=(Tilt|Eq)(_\d+)?(_(Tilt|Eq)(_\d+)?)*$)", stem):
            if stem[: match.start()] in stems:
                found[stems[stem[: match.start()]]] = path
    return found
