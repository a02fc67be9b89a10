"""Converting many inputs in parallel: one worker per volume, a manifest, and resuming after any interruption.

Outputs are written under a temporary name in `<output>/.prepare` and moved to their place when they are whole; so is a
journal of what is done, from which a rerun resumes. Both are gone when a run ends, and `manifest.csv` stands instead.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino3d.command_line import UserError
from dino3d.data.conventions import DataError, LeftOut, format_size
from dino3d.data.parallel import in_processes, progress
from dino3d.data.sidecar import index_path
from dino3d.files import TEXT, atomic_write, file_state, read_json, read_rows, table_bytes
from dino3d.run_lock import own_folder

WORK = ".prepare"  # folder in the output: journal, unfinished files
JOURNAL = "journal.jsonl"
MANIFEST = "manifest.csv"
RECIPE = "prepare.json"  # what the output was made with
WRITTEN, LEFT_OUT, FAILED = "written", "left out", "failed"
NOTE = "note: "  # before the reason of a file that was written all the same
# How the reasons begin for which a series that was whole is left out when slices of it are deleted
FEWER_SLICES = ("missing slices", "too few slices", "uneven spacing")
STAYS = "; its file of an earlier run stays until you remove it"  # how they end where there is one
OUTPUT_FORMAT = 2  # raise it when the same input and options give another output


class Job(NamedTuple):
    """One input, or several that are decided on together.

    sources: what the manifest calls them; stamp: changes when they do
    task: what the converting function takes, whatever it is
    before: whether there is a file of an earlier run that may be better than what would be written now
    """

    sources: tuple[str, ...]
    stamp: str
    task: Any
    before: bool = False


class Output(NamedTuple):
    """What a converting function yields for each file: a row of the manifest, and the function that writes the file.

    row: dict with source and output (relative to the output folder), and what else the manifest's columns name
    write: function of a path with the output's suffix; None for an input that leads to no file
    finish: called with the path of the file in its place, and a folder for unfinished files; raises OSError
    """

    row: dict[str, Any]
    write: Callable[[Path], None] | None
    finish: Callable[[Path, Path], Any] = lambda path, folder: None


def fingerprint(*parts: Any) -> str:
    """16 hex digits that stand for the parts: anything that has a repr."""
    return hashlib.sha256(repr((OUTPUT_FORMAT, parts)).encode()).hexdigest()[:16]


def require_as_many(shape: Sequence[int], before: str, source: str) -> None:
    """Raise LeftOut for a series of fewer voxels than an earlier run's: slices are gone, at one end or all over.

    before: shape then, "" without one
    """
    if before and math.prod(shape) < voxels_in(before):
        raise LeftOut(source, f"missing slices: {format_size(shape)} voxels, where an earlier run had {before}")


def voxels_in(shape: str) -> int:
    """How many voxels a shape of the manifest has."""
    return math.prod(map(int, shape.split(" x ")))


def with_file(reason: str, before: str) -> str:
    """A reason for which an input is left out, and that its file of an earlier run stays, where it does."""
    return reason + STAYS if before and reason.startswith(FEWER_SLICES) else reason


# --------------------------------------------------------------------------------------------------- the output folder


@contextlib.contextmanager
def open_output(output: Path, recipe: dict[str, Any]) -> Iterator["Records"]:
    """The output folder, made and locked, for a run with these options; a Records of what stands in it.

    recipe: dict of everything that the outputs depend on besides the inputs. Raises UserError where the folder was made
    with another, is in use or can't be written to.
    """
    work = output / WORK
    try:
        with own_folder(output, "--output", remove=(RECIPE,)):
            work.mkdir(exist_ok=True)
            for left in work.glob(".part.*"):  # of a run that was killed
                left.unlink()
            _same_recipe(output / RECIPE, json.loads(json.dumps(recipe)))
            yield Records(output)
            shutil.rmtree(work)
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}") from error


def _same_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Write down what the folder is made with; where files stand in it, that must be what they were made with."""
    work, text = path.parent / WORK, json.dumps(recipe, indent=1, sort_keys=True) + "\n"
    stands = sorted(name for name in os.listdir(path.parent) if not name.startswith(".") and name != RECIPE)
    if stands and not path.exists():
        raise UserError(f"{path.parent}: holds {stands[0]}, which no earlier run made; give a new or empty --output")
    if not stands and not (path.exists() and path.read_bytes() == text.encode()):
        (work / JOURNAL).unlink(missing_ok=True)  # of a run that left everything out for other options
        with atomic_write(path, folder=work) as part:
            part.write_bytes(text.encode())
    try:
        found = read_json(path)
        different = [name for name in sorted({*found, *recipe}) if found.get(name) != recipe.get(name)]
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: can't be read ({error}); remove it if you know what made the files beside it"
        ) from error
    if different:
        name = different[0]
        raise UserError(
            f"{path}: the folder was made with {name} {found.get(name)}, this run has {recipe.get(name)}; "
            "give another --output"
        )


def is_complete(output: Path) -> bool:
    """Whether a finished run's manifest and all files in it stand in the output folder."""
    if not (output / MANIFEST).is_file() or (output / WORK).exists():
        return False
    records = Records(output)
    return all(map(records.stands, itertools.chain.from_iterable(records.earlier.values())))


class Records:
    """Rows of the manifest, by the stamp of their job: those of earlier runs, and those that a run adds."""

    def __init__(self, output: Path) -> None:
        self.output, self.journal = output, output / WORK / JOURNAL
        self.earlier = collections.defaultdict(list)  # stamp -> rows
        if (output / MANIFEST).exists():
            with contextlib.suppress(UserError):  # no table any more
                for _, row in read_rows(output / MANIFEST):  # those before a damage count
                    if _is_whole(row):
                        self.earlier[row["stamp"]].append(row)
        if self.journal.exists():
            with open(self.journal, **TEXT) as file:
                for line in file:
                    with contextlib.suppress(ValueError):  # the last line of a run that was killed may be half
                        rows = json.loads(line)
                        if isinstance(rows, list) and rows and all(map(_is_whole, rows)):
                            self.earlier[rows[0]["stamp"]] = rows

    def finished(self, job: Job) -> list[dict[str, str]] | None:
        """The rows of a job that an earlier run has done and whose files are still there; None if it has to be done."""
        rows = self.earlier.get(job.stamp, [])
        if not job.before and any(row.get("reason", "").endswith(STAYS) for row in rows):
            return None  # that file has been removed
        return rows if len(rows) >= len(job.sources) and all(map(self.stands, rows)) else None

    @functools.cached_property
    def standing(self) -> dict[str, dict[str, str]]:
        """{source, and output too: row} of the files of earlier runs that are there."""
        rows = [row for row in itertools.chain.from_iterable(self.earlier.values()) if row["status"] == WRITTEN]
        there = [row for row in rows if self.stands(row)]
        return {row[name]: row for name in ("source", "output") for row in there}

    def shape_of(self, *names: str, column: str = "shape") -> str:
        """A column with a shape of the first of these sources or outputs that has a file of an earlier run, else ""."""
        row = next((self.standing[name] for name in names if name in self.standing), {})
        shape = row.get(column) or ""
        return shape if re.fullmatch(r"\d+( x \d+)*", shape) else ""

    def stands(self, row: dict[str, str]) -> bool:
        """Whether what a row says still holds: its file is there and as large, or its input was left out."""
        if row["status"] == WRITTEN:
            return str(file_state(self.output / row["output"])[0]) == row.get("bytes")
        return row["status"] == LEFT_OUT

    def add(self, rows: list[dict[str, str]]) -> None:
        """Write the rows of a job that is done to the journal."""
        with open(self.journal, "a", **TEXT) as file:
            file.write(json.dumps(rows) + "\n")

    def finish(
        self, rows: list[dict[str, str]], columns: Sequence[str], gone: Callable[[dict[str, str]], str]
    ) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
        """Write the manifest; returns the rows that earlier runs left in it; those of files that were removed as their
        input is left out now, with the reason; and those of files that were made anew of a changed input.

        A file of an earlier run is removed if its input now leads elsewhere, or `gone` says why. Else one whose input
        is gone, has lost slices or can't be read any more stays, and so does its row.
        """
        sources, outputs = {row["source"] for row in rows}, {row["output"]: row for row in rows}
        replaced = {
            row["source"]: row
            for row in rows
            if row["status"] != FAILED and not (row["status"] == LEFT_OUT and row["reason"].startswith(FEWER_SLICES))
        }
        kept, removed, anew = [], [], []
        for row in itertools.chain.from_iterable(self.earlier.values()):
            path = self.output / row["output"]
            if row["output"] in outputs:
                if row["output"] and row["stamp"] != outputs[row["output"]]["stamp"]:
                    anew.append(row)
                continue
            if not path.is_file():
                continue
            now = replaced.get(row["source"])
            if row["source"] not in sources:
                reason = gone(row)
            else:
                reason = now["reason"] if now and now["status"] == LEFT_OUT else ""
            if not (now or reason):
                kept.append(row)
                continue
            index_path(path).unlink(missing_ok=True)  # first: killed here, it goes on
            path.unlink()
            if reason:
                removed.append({**row, "reason": reason})
        rows = sorted(rows + kept, key=lambda row: (row["source"], row["output"]))
        manifest = self.output / MANIFEST
        table = table_bytes(columns, [[row.get(name, "") for name in columns] for row in rows])
        if not manifest.exists() or manifest.read_bytes() != table:
            with atomic_write(manifest, folder=self.output / WORK, sync=True) as part:
                part.write_bytes(table)
        return kept, removed, anew


def _is_whole(row: Any) -> bool:
    """Whether a row of a manifest or journal is one as `_finish` makes them, whatever was done to the file since."""
    needed = ("source", "output", "status", "stamp")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in needed):
        return False
    return ".." not in Path(row["output"]).parts and not os.path.isabs(row["output"])


def note_of(lines: Iterable[str]) -> str:
    """What stands in the reason's place for a file that was written; "" without lines."""
    text = "; ".join(lines)
    return NOTE + text if text else ""


# -------------------------------------------------------------------------------------------------------------- running


def convert_all(
    convert: Callable[[Any], Iterator[Output]],
    jobs: Iterable[Job],
    records: Records,
    columns: Sequence[str],
    workers: int,
    unit: str,
    gone: Callable[[dict[str, str]], str] = lambda row: "",
) -> "Outcome":
    """Do the jobs that are not done yet, then write the manifest; returns an Outcome for `report_outcome`.

    convert: a module's function from a job's task to an iterator of Outputs; it runs in a worker and may raise
        DataError
    columns: of the manifest; unit: what the progress bar counts; gone: see `Records.finish`
    Raises UserError where the output can't be written; what is done stays done.
    """
    rows, before, todo = [], 0, []
    for job in jobs:
        found = records.finished(job)
        if found is None:
            todo.append(job)
        else:
            rows += found
            before += sum(row["status"] == WRITTEN for row in found)
    items = ((convert, job, str(records.output)) for job in todo)
    with progress(len(todo), unit) as bar:
        for (_, job, _), result in in_processes(_do, items, workers):
            if result is None:
                result = _finish(
                    [
                        {
                            "source": source,
                            "status": FAILED,
                            "reason": "the process that read it died: it may "
                            "need more memory than there is, or break a library",
                        }
                        for source in job.sources
                    ],
                    job,
                )
            if isinstance(result, str):
                raise UserError(result)
            records.add(result)
            rows += result
            bar.update()
    return Outcome(rows, before, *records.finish(rows, columns, gone), records.output / MANIFEST)


class Outcome(NamedTuple):
    """rows: of the manifest; before: files that were there; kept, removed, anew: see `Records.finish`; manifest: its
    path."""

    rows: list[dict[str, str]]
    before: int
    kept: list[dict[str, str]]
    removed: list[dict[str, str]]
    anew: list[dict[str, str]]
    manifest: Path


def _do(item: tuple[Callable[[Any], Iterator[Output]], Job, str]) -> list[dict[str, str]] | str:
    """In a worker: the rows of a job; a message where the output can't be written, which ends the run."""
    convert, job, output = item
    rows = []
    try:
        for row, write, finish in convert(job.task):
            size = {"bytes": _commit(write, finish, Path(output), row["output"])} if write else {}
            rows.append({"status": WRITTEN if write else LEFT_OUT, "output": "", **row, **size})
    except _CantWrite as error:
        return str(error)
    except Exception as error:  # one input, whatever is wrong with it, must not stop the others
        status = LEFT_OUT if isinstance(error, LeftOut) else FAILED
        reason = error.reason if isinstance(error, DataError) else f"unexpected: {type(error).__name__}: {error}"
        told = {row["source"] for row in rows}
        rows += [
            {"source": source, "output": "", "status": status, "reason": reason}
            for source in job.sources
            if source not in told
        ]
    return _finish(rows, job)


class _CantWrite(Exception):
    pass


def _finish(rows: list[dict[str, Any]], job: Job) -> list[dict[str, str]]:
    """Rows as they go into the journal and manifest: all text in one line, so that both give the same back."""

    def text(value: Any) -> str:  # names of files may be any bytes
        return str(value).replace("\r", " ").replace("\n", " ").encode(errors="backslashreplace").decode()

    rows = [{"output": "", "reason": "", **row, "stamp": job.stamp} for row in rows]
    return [{name: text(value) for name, value in row.items()} for row in rows]


def _commit(write: Callable[[Path], None], finish: Callable[[Path, Path], Any], output: Path, name: str) -> int:
    """Write a file under a temporary name and move it to its place; returns its size in bytes."""
    part = None
    try:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output / name, folder=output / WORK, sync=True) as part:
            write(part)
        finish(output / name, output / WORK)
        return os.stat(output / name).st_size
    except OSError as error:
        raise _CantWrite(f"{output / name}: {error.strerror or error}") from error
    except ValueError as error:  # such as axes that the format can't hold
        raise DataError(name, f"can't be written: {str(error).replace(f'{part}: ', '')}") from error


def report_outcome(outcome: Outcome) -> None:
    """Print what became of the inputs. Raises UserError if some failed, and if nothing was written."""
    rows = outcome.rows
    count = collections.Counter(row["status"] for row in rows)
    size = sum(int(row["bytes"]) for row in rows if row["status"] == WRITTEN)
    print(
        f"{count[WRITTEN]} files of {size / 1e9:.3g} GB, {outcome.before} of them from before; "
        f"{count[LEFT_OUT]} inputs left "
        f"out, {count[FAILED]} failed"
    )
    for status in (LEFT_OUT, FAILED):
        for reason, sources in by_reason(rows, status):
            print(f"  {status} {len(sources):6}  {reason}, such as {min(sources)}")
    noted = sorted((row["source"], row["reason"]) for row in rows if row["reason"].startswith(NOTE))
    if noted:
        source, reason = noted[0]
        print(f"{len(noted)} files have a note in the manifest, such as {source}: {reason.removeprefix(NOTE)}")
    if outcome.anew:
        print(
            f"note: {len(outcome.anew)} files of earlier runs were made anew, as their inputs or tables have changed, "
            f"such as {outcome.anew[0]['output']}"
        )
    if outcome.kept:
        print(
            f"note: {len(outcome.kept)} files from earlier runs stay, of inputs or tables that are not given now, have "
            f"lost slices or can't be read any more, such as {outcome.kept[0]['output']}"
        )
    if outcome.removed:
        first = outcome.removed[0]
        print(
            f"note: {len(outcome.removed)} files of earlier runs removed, such as {first['output']}: left out now "
            f"({first['reason']})"
        )
    print(f"manifest: {outcome.manifest}", flush=True)
    if count[FAILED]:
        first = min((row for row in rows if row["status"] == FAILED), key=lambda row: row["source"])
        raise UserError(
            f"{count[FAILED]} inputs failed, such as {first['source']}: {first['reason']}; the others are in "
            f"{outcome.manifest}"
        )
    if not count[WRITTEN]:
        told = "no input was found"
        if rows:
            reason, sources = by_reason(rows, LEFT_OUT)[0]
            first = next(row for row in rows if row["source"] == min(sources) and row["status"] == LEFT_OUT)
            told = f"{len(sources)} of {len(rows)} inputs for one reason, such as {first['source']}: {first['reason']}"
        raise UserError(f"nothing was written: {told}; see {outcome.manifest}")


def by_reason(rows: Sequence[dict[str, str]], status: str) -> list[tuple[str, list[str]]]:
    """[(reason, sources)] of the rows with a status, the most frequent first."""
    examples = collections.defaultdict(list)
    for row in rows:
        if row["status"] == status:
            examples[row["reason"].split(":")[0]].append(row["source"])
    return sorted(examples.items(), key=lambda pair: (-len(pair[1]), pair[0]))
