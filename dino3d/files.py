"""Files that runs and conversions write: whole or not at all; JSON, tables, logs, and what a result depends on."""
import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dino3d import __version__
from dino3d.command_line import UserError, git_revision

TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of files may be any bytes


@contextlib.contextmanager
def atomic_write(path: str | Path, folder: Path | None = None, sync: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write to, which takes the place of `path` when the block has ended without an error.

    So there is a whole file of this name at every moment, the old one or the new. Raises what the block and the disk raise.

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
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path):
    return json.loads(Path(path).read_text())


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


def read_rows(path: str | Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: text}) of a CSV separated by commas or semicolons.

    columns: that it must have, of which alone the text is given, stripped. Raises UserError.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="strict" if columns else TEXT["errors"]) as file:
            header = file.readline()
            file.seek(0)
            table = csv.DictReader(file, delimiter=";" if ";" in header and "," not in header else ",")
            missing = [name for name in columns if name not in (table.fieldnames or [])]
            if missing:
                found = " ".join(", ".join(table.fieldnames or ["nothing"]).split())[:200]
                raise UserError(f"{path}: has no column {missing[0]}, only {found}")
            for row in table:
                yield table.line_num, {name: (row[name] or "").strip() for name in columns} if columns else row
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as a table ({error})") from error


def append_json(path, record):
    """One more line of JSON at the end of a file."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path):
    """The records of a log.txt, oldest first; none where there is no file."""
    records = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).is_file() else ():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):  # a line that a crash cut off: its epoch was not saved either
            continue
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]


def truncate_log(path, step):
    """Drop the records of a log.txt beyond a step: epochs that ended after the checkpoint that a run resumes from."""
    records = read_log(path)
    kept = [record for record in records if record["step"] <= step]
    if len(kept) < len(records):
        Path(path).write_text("".join(json.dumps(record) + "\n" for record in kept))


# -------------------------------------------------------------------------------------------- what a result depends on


def versions():
    """Versions of what a result depends on."""
    from importlib.metadata import PackageNotFoundError, version
    found = {"dino3d": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "numpy", "h5py", "hdf5plugin", "nibabel", "monai", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_config(path, arguments, processes, device, **more):
    """What a result depends on, for the reader of the folder, as JSON."""
    path.write_text(json.dumps({
        "arguments": arguments, "world_size": processes.world_size, "device": device,
        **more, "git_revision": git_revision(), "versions": versions(),
    }, indent=2) + "\n")
