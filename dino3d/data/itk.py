"""MetaImage and NRRD files, read by ITK, after a look at what their headers say that it does not heed."""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.data.conventions import LPS, DataError, Stored, format_size, is_kind, one_line
from dino3d.data.geometry import length_notes
from dino3d.data.nifti import inflated

HEADER_BYTES = 1 << 16  # bytes at the start of a file in which its header ends
UNITS = {
    **dict.fromkeys(("um", "µm", "micron", "microns", "micrometer", "micrometre"), 1e-3),
    **dict.fromkeys(("", "?", "mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
}
SPACES = ("right-anterior-superior", "left-anterior-superior", "left-posterior-superior")  # of NRRD, that ITK knows
_STDERR = threading.Lock()  # of the process, which `quietly` turns away for a while


SPACING_FIELDS = ("elementspacing", "elementsize", "spacings", "spacedirections")


class ItkHeader(NamedTuple):
    """What the header of a MetaImage or NRRD file says. fields: {name in lower case: value}, the last of each

    end: where the voxels begin, if they follow; apart: path of the file with the voxels, "" for the same one
    compressed: whether they are zlib's or gzip's; detached: whether they come from several files
    """

    fields: dict[str, str]
    end: int
    apart: str
    compressed: bool
    detached: bool


def open_itk(path: Path | str) -> Stored:
    """The Stored of a MetaImage or NRRD file, in millimetres and HU as its header says. Raises DataError."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise DataError(path, "can't be read: its name is not in UTF-8, rename it") from None
    header = read_itk_header(path)
    mm, slope, offset = units_of(header, path), *rescale_of(header, path)
    import SimpleITK as sitk  # here: training on converted files does without it

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters of it is told as a reason
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    quietly(reader.ReadImageInformation, path)
    if not header.fields.keys() & {*SPACING_FIELDS}:  # ITK takes 1 mm
        name = "ElementSpacing" if "ndims" in header.fields else "spacings or space directions"
        raise DataError(
            path, f"has no {name} in its header: the size of its voxels is not known; write it again with its spacing"
        )
    size, n = reader.GetSize(), reader.GetDimension()
    if n < 3 or any(one != 1 for one in size[3:]):
        raise DataError(path, f"is a {n}D image of {format_size(size)} voxels, expected a 3D volume")
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() > 1 or "complex" in kind or "vector" in kind:
        raise DataError(path, f"has voxels of type {kind}, expected one number per voxel")
    affine = np.eye(4)
    directions = np.reshape(reader.GetDirection(), (n, n))[:3, :3]
    affine[:3, :3] = directions * (np.array(reader.GetSpacing()[:3]) * mm)
    affine[:3, 3] = np.array(reader.GetOrigin()[:3]) * mm
    read = []

    def take(slices: tuple[slice, ...]) -> np.ndarray:
        if not read:
            image = quietly(reader.Execute, path)
            voxels = sitk.GetArrayFromImage(image).reshape(size[2::-1]).T  # (X, Y, Z)
            quietly(lambda: require_whole(path, header, voxels.nbytes), path)
            read.append(voxels if (slope, offset) == (1, 0) else voxels * slope + offset)
            read[0].flags.writeable = False  # what is taken are views of it
        return read[0][slices]

    return Stored(size[:3], LPS @ affine, take, (*orientation_notes(header), *length_notes(directions)))


def quietly(read: Callable[[], Any], path: Path | str) -> Any:
    """What `read` returns, without what C libraries print of a broken file besides raising. Raises DataError."""
    with _STDERR:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            return read()
        except DataError:
            raise
        except Exception as error:  # ITK raises many kinds
            raise DataError(path, f"can't be read: {one_line(error, path)}") from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


# ------------------------------------------------------------------------------------------------------------ headers


def read_itk_header(path: Path | str) -> ItkHeader:
    """The ItkHeader of a MetaImage or NRRD file. Raises DataError for one that ITK is not to be asked about.

    ITK reads some of those and refuses most, but by some it ends the process.
    """
    if not os.path.isfile(path):
        raise DataError(path, "can't be read: no such file")
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    if not start:
        raise DataError(path, "can't be read: the file is empty")
    header = _read_metaimage(start, path) if is_kind(path, (".mha", ".mhd")) else _read_nrrd(start, path)
    if header.apart and not header.detached and not os.path.isfile(header.apart):
        name = header.fields.get("elementdatafile") or header.fields.get("datafile")
        raise DataError(
            path, f"can't be read: its header has the voxels in {name}, which is not there; correct it or move the file"
        )
    return header


def voxel_files(path: Path | str) -> list[str]:
    """Paths of the files that hold the voxels of a MetaImage or NRRD header, [] where they follow it.

    All others in its folder where it names several. Raises DataError.
    """
    header, folder = read_itk_header(path), os.path.dirname(path) or "."
    if not header.detached:
        return [header.apart] if header.apart else []
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if entry.is_file() and entry.name != os.path.basename(path))


def _read_metaimage(start: bytes, path: Path | str) -> ItkHeader:
    # Up to the end of a line with ElementDataFile, behind which voxels may follow
    head = re.match(rb".*?(?:^[ \t]*ElementDataFile.*?(?:\n|\Z)|\Z)", start, re.S | re.M)[0]

    def values(name: str) -> list[bytes]:
        return re.findall(rb"^[ \t]*%b[ \t]*[=:]?[ \t]*(.*?)[ \t\r]*$" % name.encode(), head, re.M)

    for name, sound in (("NDims", rb"[1-9]"), ("ElementDataFile", rb"[^%\0]+")):
        found = values(name)
        wrong = [value for value in found if not re.fullmatch(sound, value)]
        if wrong or not found:
            value = repr(wrong[0].decode(errors="replace"))[:60] if wrong else "missing"
            raise DataError(path, f"can't be read: {name} in its header is {value}")
    fields = {
        name.decode(errors="replace").lower(): value.decode(errors="replace")
        for name, value in re.findall(rb"^[ \t]*(\w+)[ \t]*[=:][ \t]*(.*?)[ \t\r]*$", head, re.M)
    }
    if not values("ElementSpacing") and not values("ElementSize"):  # their case counts, to ITK too
        fields = {name: value for name, value in fields.items() if name not in SPACING_FIELDS}
    data = values("ElementDataFile")[-1]
    local, several = data.upper().startswith(b"LOCAL"), data.upper().startswith(b"LIST")
    compressed = re.match(r"[Tt1]", fields.get("compresseddata", "")) is not None
    if local and compressed and not re.match(r"[1-9]", fields.get("compresseddatasize", "")):
        # ITK then says nothing and gives voxels that are not the file's
        raise DataError(
            path,
            "can't be read: its voxels are compressed and CompressedDataSize in its header is missing; "
            "write it again with the program that made it, or without compression",
        )
    apart = "" if local else os.path.join(os.path.dirname(path), os.fsdecode(data))
    return ItkHeader(fields, len(head), apart, compressed, several)


def _read_nrrd(start: bytes, path: Path | str) -> ItkHeader:
    head = re.match(rb".*?(\n\r?\n|\Z)", start, re.S)[0]
    fields = {  # "field: value"; "key:=value" is whatever its writer liked
        name.decode(errors="replace").lower().replace(" ", ""): value.decode(errors="replace")
        for name, value in re.findall(rb"^([^#:\n]+?)[ \t]*:(?!=)[ \t]*(.*?)[ \t\r]*$", head, re.M)
    }
    data = re.search(rb"^data ?file:(?!=)[ \t]*(\S.*?)[ \t\r]*$", head, re.M | re.I)
    several = bool(data and re.match(rb"LIST|.*%", data[1]))
    return ItkHeader(
        fields,
        len(head),
        os.path.join(os.path.dirname(path), os.fsdecode(data[1])) if data else "",
        fields.get("encoding", "").lower() in ("gz", "gzip"),
        several,
    )


def units_of(header: ItkHeader, path: Path | str) -> float:
    """Millimetres per unit of a header's lengths. Raises DataError for a unit that is none of length."""
    named = header.fields.get("distanceunits") or header.fields.get("spaceunits") or header.fields.get("units") or ""
    units = re.findall(r'"([^"]*)"', named) or [named.strip()]
    known = {UNITS.get(unit.strip().lower()) for unit in units}
    if len(known) > 1 or None in known:
        raise DataError(path, f"has lengths in {named}, expected mm, um, cm or m, the same for all axes")
    return known.pop()


def orientation_notes(header: ItkHeader) -> tuple[str, ...]:
    """() or (a line that the header does not say which way the axes go,), which ITK then takes to be LPS."""
    fields, taken = header.fields, "were taken to go to the patient's left, posterior and superior side"
    if "ndims" in fields:  # MetaImage
        known = {"transformmatrix", "rotation", "orientation"} & fields.keys()
        return () if known else (f"its header declares no orientation (no TransformMatrix): its axes {taken}",)
    space = fields.get("space", "").lower()
    if space.removesuffix("-time") in SPACES or space[:3] in ("ras", "las", "lps") and space[3:] in ("", "t"):
        return ()
    told = f"space {space}" if space else "no space"
    return (f"its header names no sides of the patient ({told}): the axes of its coordinates {taken}",)


def rescale_of(header: ItkHeader, path: Path | str) -> tuple[float, float]:
    """(slope, offset) from a MetaImage's voxels to what they stand for, which ITK does not apply. Raises DataError."""
    numbers = []
    for name, default in (("Slope", 1.0), ("Offset", 0.0)):
        text = header.fields.get(f"elementtointensityfunction{name.lower()}")
        try:
            numbers.append(default if text is None else float(text))
            if not np.isfinite(numbers[-1]) or name == "Slope" and numbers[-1] == 0:
                raise ValueError
        except ValueError:
            raise DataError(
                path, f"can't be read: ElementToIntensityFunction{name} in its header is {text!r:.40}"
            ) from None
    return tuple(numbers)


def require_whole(path: Path | str, header: ItkHeader, size: int) -> None:
    """Raise an error where the compressed voxels of a file are damaged or fewer than `size` bytes.

    ITK passes over both, and what is missing is what its memory held before, such as another patient's voxels.
    """
    if not header.compressed or header.detached:
        return
    found = sum(len(part) for part in inflated(header.apart or path, 0 if header.apart else header.end))
    if found < size:
        raise EOFError(f"its voxels end after {found} of {size} bytes")
