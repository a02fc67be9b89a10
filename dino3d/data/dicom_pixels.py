"""The voxels of DICOM slices: what their files store, what of it is image, and Hounsfield units.

Stored pixels are read here where they are plain, and by pydicom's decoders (GDCM) where they are compressed. What is
for display, such as MONOCHROME1, does not touch Hounsfield units.
"""

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dino3d.data.conventions import AIR, DataError, one_line, to_int16
from dino3d.data.dicom import Pixels, Slice, read_header, rescale_values
from dino3d.data.itk import quietly
from dino3d.data.parallel import is_expendable

NATIVE = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # transfer syntaxes of plain pixels
HARMLESS = (*NATIVE, "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5")  # deflated, RLE: decoded in Python alone
REFUSED = "refused: "  # what a reason begins with on the way from one process to another
TISSUE = (-900, 3000)  # HU, in which padding hides


def read_voxels(slices: Sequence[Slice]) -> np.ndarray:
    """(slices, rows, columns) int16 HU of sorted Slices of one size, padding as air. Raises DataError."""
    if all(one.pixels.syntax in HARMLESS for one in slices):
        return _voxels_of(slices)
    if is_expendable():
        return quietly(lambda: _voxels_of(slices), slices[0].path)  # what decoders print
    return _read_apart(slices)


def _voxels_of(slices: Sequence[Slice]) -> np.ndarray:
    columns, rows = slices[0].size
    voxels = np.empty((len(slices), rows, columns), np.int16)
    for one, out in zip(slices, voxels):
        _to_hu(one, _plain(one) if one.pixels.syntax in NATIVE else _decoded(one), out)
    return voxels


def _read_apart(slices: Sequence[Slice]) -> np.ndarray:
    """What `_voxels_of` gives, from a process of its own: some damaged pixels end the process that decodes them."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import decode_for_parent; decode_for_parent()"],
        input=b"\0".join(os.fsencode(os.path.abspath(one.path)) for one in slices),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.fspath(Path(__file__).parents[2])},
    )
    if done.returncode == 0:
        return np.lib.format.read_array(io.BytesIO(done.stdout), allow_pickle=False)
    told = os.fsdecode(done.stderr)
    if REFUSED in told:
        raise DataError(slices[0].path, told.partition(REFUSED)[2].strip())
    ended = f"the process that decoded it ended with {done.returncode}"
    raise DataError(slices[0].path, f"can't be read: {ended}, its compressed pixels are damaged or memory ran out")


def decode_for_parent() -> None:
    """The process that `_read_apart` starts: paths on standard input, an array in NumPy's format on standard output."""
    slices = [read_header(os.fsdecode(path)) for path in sys.stdin.buffer.read().split(b"\0")]
    try:
        voxels = quietly(lambda: _voxels_of(slices), slices[0].path)  # what decoders print
    except DataError as error:
        sys.stderr.buffer.write(os.fsencode(f"{REFUSED}{error.reason}"))
        sys.exit(1)
    np.lib.format.write_array(sys.stdout.buffer, voxels, allow_pickle=False)


def padding_note(one: Slice) -> str | None:
    """What to tell of a slice whose padding has the value of tissue; None for others. Raises DataError."""
    if not one.pixels.padding:
        return None
    slope, intercept = rescale_values(one)
    low, high = _padding(one.pixels)
    hu = sorted((low * slope + intercept, high * slope + intercept))
    if hu[1] <= TISSUE[0] or hu[0] >= TISSUE[1]:
        return None
    told = f"{low}" if low == high else f"{low} to {high}"
    return f"its PixelPaddingValue {told} stands for {hu[0]:g} HU: voxels of that value became air"


def _refused(one: Slice, reason: str) -> DataError:
    return DataError(one.path, f"can't be read: {os.path.basename(one.path)} {reason}")


def _bits(one: Slice) -> tuple[int, int, int, bool]:
    """(allocated, stored, highest bit, signed) of a slice's pixels. Raises DataError."""
    allocated, stored, high, signed = one.pixels[4:8]
    stored = allocated if stored is None else stored
    high = stored - 1 if high is None and stored else high
    if allocated not in (8, 16, 32) or signed not in (0, 1) or not 0 < stored <= high + 1 <= allocated:
        raise _refused(
            one,
            f"has BitsAllocated {allocated}, BitsStored {stored}, HighBit {high} and PixelRepresentation {signed}, "
            "which is no way to store a CT",
        )
    return allocated, stored, high, bool(signed)


def _plain(one: Slice) -> np.ndarray:
    """(rows, columns) unsigned words of a slice whose pixels aren't compressed. Raises DataError."""
    allocated = _bits(one)[0]
    words = np.empty(one.size[::-1], f"{'<' if one.pixels.little_endian else '>'}u{allocated // 8}")
    try:
        with open(one.path, "rb", buffering=0) as file:
            file.seek(one.pixels.offset)
            head = file.read(12)
            order = "little" if one.pixels.little_endian else "big"
            tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)
            if tag != 0x7FE00010:
                raise _refused(one, "has no pixel data, or its header is cut off")
            if one.pixels.explicit and head[4:6] in (b"OW", b"OB", b"UN"):
                length = int.from_bytes(head[8:12], order)
            elif one.pixels.explicit:
                raise _refused(one, f"has pixel data of type {head[4:6]!r}, expected OW or OB")
            else:
                length = int.from_bytes(head[4:8], order)
                file.seek(one.pixels.offset + 8)
            if length == 0xFFFFFFFF:
                raise _refused(one, "has compressed pixels, which its transfer syntax does not say")
            if length < words.nbytes:
                raise _refused(one, f"has pixel data of {length} bytes, expected {words.nbytes}")
            if length >= 2 * words.nbytes:
                raise _refused(one, f"has pixel data of {length} bytes, more than one image of {words.nbytes}")
            got = file.readinto(memoryview(words).cast("B"))
    except OSError as error:
        raise _refused(one, f"({one_line(error, one.path)})") from error
    if got < words.nbytes:
        raise _refused(one, f"is cut off: its pixels end after {got} of {words.nbytes} bytes")
    return words if one.pixels.little_endian else words.astype(words.dtype.newbyteorder("="))


def _decoded(one: Slice) -> np.ndarray:
    """(rows, columns) unsigned words of a slice whose pixels are compressed. Raises DataError."""
    import pydicom

    allocated = _bits(one)[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(one.path, force=True)
            if one.pixels.syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
                size = one.size[0] * one.size[1] * allocated // 8
                if not size <= len(header.PixelData) < 2 * size:
                    raise _refused(one, f"has pixel data of {len(header.PixelData)} bytes, expected {size}")
                return np.frombuffer(header.PixelData[:size], f"<u{allocated // 8}").reshape(one.size[::-1])
            try:
                decoder = pydicom.pixels.get_decoder(one.pixels.syntax)
            except NotImplementedError:
                decoder = None
            if decoder is None or not decoder.is_available:
                name = pydicom.uid.UID(one.pixels.syntax).name
                raise _refused(one, f"is compressed as {name:.60}, which is not read here: decompress it first")
            words = decoder.as_array(header, raw=True, index=0)[0]
    except DataError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds
        raise _refused(one, f"({one_line(error, one.path)})") from error
    if words.shape != one.size[::-1]:
        raise _refused(one, f"has pixels of shape {words.shape}, expected {one.size[::-1]}")
    return np.ascontiguousarray(words).astype(f"i{allocated // 8}").view(f"u{allocated // 8}")


def _to_hu(one: Slice, words: np.ndarray, out: np.ndarray) -> None:
    """Write the (rows, columns) int16 HU of a slice's words into `out`. Raises DataError."""
    slope, intercept = rescale_values(one)
    padded = _padded(one, words) if one.pixels.padding else None
    stored = _image_bits(one, words if padded is None else np.where(padded, words.dtype.type(0), words))
    if slope == 1 and intercept.is_integer() and abs(intercept) < 32768:
        low, high = int(stored.min()) + intercept, int(stored.max()) + intercept
        if -32768 <= low and high <= 32767:  # modulo 65536 the sum is then the true one
            narrow = stored.view(np.int16) if stored.dtype.itemsize == 2 else stored.astype(np.int16)
            np.add(narrow, np.int16(intercept), out=out)
            slope = None
    if slope is not None:
        out[...] = to_int16(stored * float(slope) + intercept, one.path)
    if padded is not None:
        out[padded] = AIR


def _signedness(words: np.ndarray, signed: bool) -> str:
    return words.dtype.str.replace("u", "i") if signed else words.dtype.str


def _image_bits(one: Slice, words: np.ndarray) -> np.ndarray:
    """What those bits of the words stand for that are image, signed or not. Raises DataError.

    Others may hold an overlay, or repeat the sign; what can't be told is refused.
    """
    allocated, stored, high, signed = _bits(one)
    above, below = allocated - 1 - high, high + 1 - stored
    whole = words.view(_signedness(words, signed))
    least, most = (-(1 << (stored - 1)), 1 << (stored - 1)) if signed else (0, 1 << stored)
    if not below and (not above or (whole.min() >= least and whole.max() < most)):
        return whole
    values = (words << above).view(whole.dtype) >> (above + below)
    for bit in one.pixels.overlays:
        if bit < allocated and not below <= bit <= high:
            words = words & ~words.dtype.type(1 << bit)
    top = words >> (high + 1) if above else np.zeros_like(words)
    extended = (top == (1 << above) - 1) & (values < 0) if signed else False
    if (words & words.dtype.type((1 << below) - 1)).any() or not ((top == 0) | extended).all():
        raise _refused(one, f"has values in other bits than its header says (BitsStored {stored}, HighBit {high})")
    return values


def _padding(pixels: Pixels) -> tuple[int, int]:
    """(lowest, highest) stored value that is padding, in the pixels' own signedness."""
    allocated = pixels.allocated or 16
    values = [value % (1 << allocated) for value in pixels.padding]
    if pixels.signed:
        values = [value - (1 << allocated) if value >> (allocated - 1) else value for value in values]
    return min(values), max(values)


def _padded(one: Slice, words: np.ndarray) -> np.ndarray:
    """(rows, columns) bool: whether a word is padding, whole or in the bits of the image alone."""
    allocated, stored, high, signed = _bits(one)
    low, up = _padding(one.pixels)
    whole = words.view(_signedness(words, signed))
    found = whole == low if low == up else (whole >= low) & (whole <= up)
    if stored < allocated:
        values = (words << (allocated - 1 - high)).view(whole.dtype) >> (allocated - stored)
        found |= (values >= low) & (values <= up)
    return found
