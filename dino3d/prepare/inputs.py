"""What the sub-commands of prepare_data.py share: input files, safe names, tables, and what the manifest says of an
image."""

import collections
import contextlib
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino3d.command_line import UserError
from dino3d.data import images
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, format_size, is_kind
from dino3d.data.dicom_series import folder_and_uid
from dino3d.data.itk import voxel_files
from dino3d.data.scans import File, Scan
from dino3d.files import file_state, read_rows, walk_files
from dino3d.prepare.conversion import MANIFEST, RECIPE

if TYPE_CHECKING:
    import SimpleITK as sitk

QUANTILES = {"hu_p1": 1, "hu_p50": 50, "hu_p99": 99}
IMAGE_COLUMNS = ["shape", "spacing", "hu_min", *QUANTILES, "hu_max", "bytes", "status", "reason", "stamp"]


def file_at(root: Path | str, name: str) -> File:
    """The File of this name below the input folder."""
    return File(name, *file_state(os.path.join(root, name)))


def companions(root: Path | str, name: str) -> list[File]:
    """The Files with the voxels of a MetaImage or NRRD header that says where they are."""
    if not is_kind(name, (".mhd", ".nhdr")):
        return []
    try:
        return [file_at(root, os.path.relpath(path, root)) for path in voxel_files(os.path.join(root, name))]
    except DataError:  # it is refused when its turn comes
        return []


def files_of(root: Path | str, name: str) -> list[File]:
    """The Files that a volume is read from: its own, those that its header names, those in a DICOM series' folder."""
    if is_kind(name, VOLUME_SUFFIXES):
        return [file_at(root, name), *companions(root, name)]
    folder, _ = folder_and_uid(os.path.join(root, name))
    if not os.path.isdir(folder):
        return [file_at(root, name)]
    paths = [os.path.join(here, one) for here, names in walk_files(folder, lambda error: None) for one in names]
    return [file_at(root, os.path.relpath(path, root)) for path in paths]


def cut_short(folder: Path, scans: Iterable[Scan]) -> dict[str, str]:
    """{SeriesInstanceUID: what to note of it} of DICOM series with fewer files than the metadata.csv says that TCIA's
    downloader leaves in or right below a folder. Prints how many they are."""
    told = {}
    for path in sorted([*folder.glob("metadata.csv"), *folder.glob("*/metadata.csv")]):
        with contextlib.suppress(UserError, OSError):  # of another kind
            for _, row in read_rows(path, ["Series UID", "Number of Images"]):
                if row["Number of Images"].isdecimal():
                    told[row["Series UID"]] = int(row["Number of Images"])
    files, first = collections.Counter(), {}
    for scan in scans:
        if scan.header and scan.header.series in told:
            files[scan.header.series] += len(scan.files)
            first.setdefault(scan.header.series, scan.name)
    notes = {
        series: f"metadata.csv has {told[series]} images of this series, of which {count} are here"
        for series, count in files.items()
        if count < told[series]
    }
    if notes:
        series = min(notes, key=first.get)
        print(
            f"warning: {len(notes)} series are incomplete, such as {first[series]}: {notes[series]}; where slices of "
            "an end are missing, nothing else shows it: fetch them again",
            flush=True,
        )
    return notes


def safe_name(text: str, otherwise: str) -> str:
    """A name from a table or header made fit for one file or folder: no separators, not hidden, not long, none of ours.

    Where something has to be changed, a hash keeps different names different. Empty ones become `otherwise`.
    """
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        return otherwise
    name = re.sub(r"[^\w.+=-]", "_", text).lstrip(".")
    name = name.encode()[:100].decode(errors="ignore")  # file systems count bytes, 255 at most
    if name == text and name.lower() not in (MANIFEST, RECIPE):
        return name
    return f"{name or otherwise}-{zlib.crc32(text.encode(errors='surrogatepass')):08x}"


def image_statistics(image: "sitk.Image") -> dict[str, Any]:
    """What the manifest says of an image: shape, spacing in mm, quantiles of HU (of every fourth voxel)."""
    voxels = images.voxels_of(image)
    sample = np.percentile(voxels[::2, ::2], list(QUANTILES.values()))
    return {
        "shape": format_size(image.GetSize()),
        "spacing": format_size(np.round(image.GetSpacing(), 4)),
        "hu_min": voxels.min(),
        **{name: f"{value:g}" for name, value in zip(QUANTILES, sample)},
        "hu_max": voxels.max(),
    }
