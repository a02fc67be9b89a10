"""prepare_data.py index: what training looks up of files that are there already, stored beside them."""

import contextlib
import glob
import os
from pathlib import Path
from typing import NamedTuple

from dino3d.command_line import UserError, truncate_list
from dino3d.data.chunks import open_indexed
from dino3d.data.conventions import DataError, Stored
from dino3d.data.foreground import FOREGROUNDS, Occupancy, find_foreground, read_occupancy
from dino3d.data.hdf5 import index_chunks
from dino3d.data.layouts import find_unlabelled, none_found
from dino3d.data.parallel import in_processes, progress
from dino3d.data.sidecar import identity_of, index_path, write_sidecar
from dino3d.data.volume import Volume
from dino3d.run_lock import own_folder


class Indexed(NamedTuple):
    """What became of a volume: stored now, or before, without these FOREGROUNDS in it; or the reason why not.

    chunks: whether the index of an HDF5 file's chunks is stored too
    """

    path: str
    before: bool = False
    chunks: bool = False
    without: tuple[str, ...] = ()
    problem: str = ""


def index(folder: Path, workers: int) -> None:
    """Store the occupancy of all volumes below a folder for which there is none, and where the chunks of our HDF5 files
    are; no volume's file is changed.

    Every file beside a volume is whole or not there: a run that was killed is resumed by the same command.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: " + ("is no folder" if folder.exists() else "no such folder"))
    with own_folder(folder, "folder"):
        names, passed_over = find_unlabelled(folder)
        files = [os.path.join(folder, name) for name in names if os.path.isfile(os.path.join(folder, name))]
        if not files:
            series = f"{len(names)} DICOM series alone, beside which nothing is stored: convert them" * bool(names)
            raise UserError(f"{folder}: {series or none_found(passed_over)}")
        seen = []
        with progress(len(files), "file") as bar:
            for path, result in in_processes(index_file, files, workers):
                seen.append(result or Indexed(path, problem="the process that read it died"))
                bar.update()
    report_indexed(folder, seen, len(names) - len(files))


def index_file(path: str) -> Indexed:
    """`store_index`, of which nothing is raised."""
    try:
        found, before = store_index(path)
    except DataError as error:
        return Indexed(path, problem=error.reason)
    except OSError as error:
        return Indexed(path, problem=f"its index can't be written ({error.strerror or error})")
    without = tuple(kind for kind in FOREGROUNDS if not found.bits[kind].any())
    return Indexed(path, before, _is_indexed(path), without)


def store_index(path: Path | str, folder: Path | None = None) -> tuple[Occupancy, bool]:
    """Store the Occupancy of a file and the index of its chunks, unless they are there; (the Occupancy, whether they
    were). folder: for unfinished files, default: that of the file. Raises DataError, OSError."""
    for left in Path(path).parent.glob(f".part.*.{glob.escape(index_path(path).name)}"):
        left.unlink()  # of a run that was killed
    with Volume(path, indexed=False) as volume, open(path, "rb") as file:
        identity, found = identity_of(file), read_occupancy(volume)
        if found and (_is_indexed(path) or not volume.converted):
            return found, True
        chunks = index_chunks(path) if volume.converted else None
        if found and not chunks:  # chunks of another kind, which are left to HDF5
            return found, True
        found = found or find_foreground(volume.read(), volume.spacing)
        if identity_of(file) != identity:
            raise DataError(path, "was changed while it was read: see that nothing writes to it, and repeat")
        write_sidecar(path, identity, found.arrays(), chunks.members() if chunks else {}, folder)
    return found, False


def _is_indexed(path: str) -> bool:
    """Whether the index of a file's chunks is stored and sound."""
    with contextlib.ExitStack() as closing:
        try:
            return isinstance(open_indexed(path, closing), Stored)
        except DataError:
            return False


def report_indexed(folder: Path, seen: list[Indexed], series: int) -> None:
    """Print what became of the files. Raises UserError if some failed."""
    good = sorted(one for one in seen if not one.problem)
    bad = sorted((one.path, one.problem) for one in seen if one.problem)
    print(f"occupancy of {len(good)} volumes in {folder}, {sum(one.before for one in good)} of them from before")
    print(f"chunks of {sum(one.chunks for one in good)} of them, which are then read without the HDF5 library")
    for kind in FOREGROUNDS:
        without = [one.path for one in good if kind in one.without]
        if without:
            print(f"no {kind} was found in {len(without)} of them: {truncate_list(without)}")
    if series:
        print(f"passed over: {series} DICOM series, beside which nothing is stored")
    if bad:
        path, problem = bad[0]
        raise UserError(f"{folder}: {len(bad)} of {len(seen)} volumes have none, such as {path}: {problem}")
