"""Files that a run writes beside its checkpoints: JSON, tables, logs, and what a result depends on."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from dino3d import __version__


def write_json(path, content):
    """Write JSON under a temporary name until it is whole; NaN is refused."""
    part = Path(path).with_name(Path(path).name + ".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(part, path)


def read_json(path):
    return json.loads(Path(path).read_text())


def write_table(path, header, rows):
    """Write a CSV under a temporary name until it is whole; floats keep all digits."""
    part = Path(path).with_name(Path(path).name + ".part")
    with open(part, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(part, path)


def read_table(path):
    """[{column: text}] of a CSV."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


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


def git_revision():
    """The commit of this code, with + where files differ from it; "unknown" outside a checkout."""
    try:
        here = Path(__file__).resolve().parent
        described = subprocess.run(["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
                                   capture_output=True, text=True, timeout=10)
        return described.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


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
