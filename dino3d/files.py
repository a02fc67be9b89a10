"""Files that runs and conversions write: whole or not at all; JSON, tables, logs, checksums, what a result depends
on."""

import contextlib
import csv
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dino3d import __version__, openmp
from dino3d.command_line import UserError, git_revision, truncate_list

# Of every text file, whatever the locale: names of files may be any bytes
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}


@contextlib.contextmanager
def atomic_write(path: str | Path, folder: Path | None = None, sync: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write to, which takes the place of `path` when the block has ended without an error.

    So there is a whole file of this name at every moment, the old one or the new. Raises what the block and the disk
    raise.

    folder: where the temporary file lies, on the same disk; default: beside `path`, hidden
    sync: wait until it is safely on disk
    """
    path = Path(path)
    part = (folder or path.parent) / f".part.{os.getpid()}.{path.name}"  # the suffix says how to write it
    try:
        yield part
        if sync:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing is there to remove
            part.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, whole or not at all; NaN is refused."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", **TEXT)


def read_json(path: str | Path) -> Any:
    """What stands in a JSON file. Raises OSError, ValueError, RecursionError."""
    return json.loads(Path(path).read_text(**TEXT))


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a CSV, whole or not at all; floats keep all digits."""
    with atomic_write(path) as part:
        part.write_bytes(table_bytes(header, rows))


def table_bytes(header: Sequence[str], rows: Iterable[Sequence]) -> bytes:
    """A CSV as it stands on the disk."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode(**TEXT)


def read_table(path: str | Path) -> list[dict[str, str]]:
    """[{column: text}] of a CSV. Raises UserError."""
    return [row for _, row in read_rows(path)]


def read_rows(
    path: str | Path, columns: Sequence[str] = (), optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: text}) of a CSV separated by commas, semicolons or tabs, whichever its header has.

    columns: that it must have, in letters of any case, of which alone the text is given, stripped
    optional: columns that are given too where it has them
    Raises UserError, also for a line with more cells than the header, as decimal commas make between commas.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="strict" if columns else TEXT["errors"]) as file:
            header = file.readline()
            file.seek(0)
            table = csv.DictReader(file, delimiter=delimiter_of(header, columns))
            if not columns:
                yield from ((table.line_num, row) for row in table)
                return
            names = {}
            for wanted in (*columns, *optional):
                alike = [name for name in table.fieldnames or [] if name.strip().lower() == wanted.lower()]
                exact = [name for name in alike if name == wanted] or alike
                if len(exact) > 1:
                    raise UserError(f"{path}: has {len(exact)} columns {wanted}, expected one")
                if not exact and wanted in columns:
                    found = " ".join(truncate_list(table.fieldnames or ["nothing"], 8).split())[:200]
                    raise UserError(f"{path}: has no column {wanted}, only {found}")
                if exact:
                    names[wanted] = exact[0]
            for row in table:
                if not any(row.values()):  # nothing but separators, as spreadsheets leave below a table
                    continue
                if any(row.get(None) or ()):
                    raise UserError(
                        f"{path}: line {table.line_num} has more cells than the header ({len(table.fieldnames)}): are "
                        f"its numbers written with the '{table.reader.dialect.delimiter}' that separates the cells?"
                    )
                yield table.line_num, {wanted: (row[name] or "").strip() for wanted, name in names.items()}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as a table ({error})") from error


def delimiter_of(header: str, columns: Sequence[str]) -> str:
    """What separates the cells of a header: the one with which most of the columns are found, or most cells."""

    def found(delimiter: str) -> tuple[int, int]:
        cells = [cell.strip().lower() for cell in next(csv.reader([header], delimiter=delimiter), [])]
        return sum(name.lower() in cells for name in columns), len(cells)

    return max(",;\t", key=found)


def append_json(path: str | Path, record: Any) -> None:
    """One more line of JSON at the end of a file."""
    with open(path, "a", **TEXT) as file:
        file.write(json.dumps(record) + "\n")


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, as far as they are whole; none where there is no file. Raises OSError."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path, **TEXT) as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):  # one that a kill cut off
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.txt, oldest first, as far as they are whole; none where there is no file."""
    return [record for record in read_json_lines(path) if isinstance(record.get("step"), int)]


def truncate_log(path: str | Path, step: int) -> None:
    """Drop the records of a log.txt beyond a step: epochs that ended after the checkpoint that a run resumes from."""
    records = read_log(path)
    kept = [record for record in records if record["step"] <= step]
    if len(kept) < len(records):
        with atomic_write(path) as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in kept), **TEXT)


# -------------------------------------------------------------------------------------------- checksums of checkpoints


ZIP_START, ZIP_END = b"PK\3\4", b"PK\5\6"  # what a zip file's first and last record begin with
CHECKSUM = b"crc32 "  # our comment behind it
ZIP_END_BYTES, CHECKSUM_BYTES = 22, len(CHECKSUM) + 8
SMALL_GAP = 1 << 16  # bytes; torch.load passes over headers and padding between tensors


def add_checksum(file: BinaryIO) -> None:
    """Write the CRC-32 of all that torch.save wrote to a file, open for reading too, into the zip's comment at its end.

    There torch.load and unzip pass over it, and the file needs no companion that could be left behind.
    """
    file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far, is the zip's last field
    file.write(CHECKSUM_BYTES.to_bytes(2, "little"))
    length = file.tell()
    file.write(CHECKSUM + b"%08x" % crc32_of(file, length))


class ChecksumReader(io.BufferedReader):
    """A file that computes its CRC-32 while torch.load reads it, nearly in order, so that no byte need be read twice.

    end: where our comment begins, if it has one
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(io.FileIO(path))
        self.end = max(0, self.seek(0, os.SEEK_END) - CHECKSUM_BYTES)
        self._crc, self._done = 0, 0  # CRC-32 of the first _done bytes
        self.seek(0)

    def readinto(self, buffer: Any) -> int:
        start = self.tell()
        if self._done < start <= min(self._done + SMALL_GAP, self.end):
            self.crc32(start)
        count = super().readinto(buffer)
        if start <= self._done < start + count:
            end = max(self._done, min(start + count, self.end))
            self._crc = zlib.crc32(memoryview(buffer)[self._done - start : end - start], self._crc)
            self._done = end
        return count

    def crc32(self, end: int) -> int:
        """CRC-32 of the bytes up to `end`, not before what is done; reads what was not read in order."""
        self._crc, self._done = crc32_of(self, end, self._done, self._crc), end
        return self._crc


@contextlib.contextmanager
def open_verified(path: str | Path) -> Iterator[ChecksumReader]:
    """Open a file for torch.load, to be read in the block; what was read holds when the block has ended.

    Raises ValueError where the file is cut off or not as it was written, whatever the block raises; a whole one
    without a checksum, older or not ours, passes.
    """
    with ChecksumReader(path) as file:
        starts_zip = file.read(len(ZIP_START)) == ZIP_START
        file.seek(max(0, file.end - ZIP_END_BYTES))
        tail = file.read()
        file.seek(0)
        older = tail[-ZIP_END_BYTES:].startswith(ZIP_END) and tail.endswith(b"\0\0")  # a zip without a comment
        ours = ZIP_END in tail or CHECKSUM in tail  # one of the two may be what is damaged
        if starts_zip and not ours:
            raise ValueError("cut off: its end is missing")
        try:
            yield file
        finally:
            if ours and not older and tail[-CHECKSUM_BYTES:] != CHECKSUM + b"%08x" % file.crc32(file.end):
                raise ValueError("damaged: it does not match its checksum")


def crc32_of(file: BinaryIO, end: int, start: int = 0, value: int = 0) -> int:
    """CRC-32 of a file's bytes up to `end`, where `value` is that of the first `start`; leaves it behind them."""
    file.seek(start)
    while start < end and (block := file.read(min(end - start, 1 << 22))):
        value, start = zlib.crc32(block, value), start + len(block)
    return value


# -------------------------------------------------------------------------------------------- what a result depends on


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"dino3d": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "numpy", "h5py", "hdf5plugin", "nibabel", "monai", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_config(path: Path, arguments: dict[str, Any], processes: Any, device: str, **more: Any) -> None:
    """What a result depends on, for the reader of the folder, as JSON."""
    write_json(
        path,
        {
            "arguments": arguments,
            "world_size": processes.world_size,
            "device": device,
            "openmp": openmp.openmp_settings(),
            **more,
            "git_revision": git_revision(),
            "versions": versions(),
        },
    )


def walk_files(folder: Path | str, fail: Callable[[OSError], None]) -> Iterator[tuple[str, list[str]]]:
    """(subfolder, names of its files) below a folder, sorted; hidden files and folders are left out.

    Links to folders are followed, each real folder once. fail: called with the OSError of a folder that can't be
    listed.
    """
    seen = set()
    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield here, sorted(name for name in files if not name.startswith("."))


def file_state(path: Path | str) -> tuple[int, int]:
    """(size, time of change) of a file: what tells that it is another one now. (-1, 0) for a missing one."""
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return -1, 0
