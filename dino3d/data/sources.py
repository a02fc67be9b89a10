"""The volumes that pre-training draws from: several folders with a weight each, or a list."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino3d.command_line import UserError, format_values
from dino3d.data.conventions import DataError
from dino3d.data.dicom_series import folder_and_uid
from dino3d.data.layouts import list_volumes, none_found, read_data_list


class WeightedVolumes(NamedTuple):
    """paths: of all volumes; weights: how many times --patches_per_volume each of them gives samples in an epoch."""

    paths: list[str]
    weights: list[int]


def source_fault(folders: Sequence[str], weights: Sequence[int] | None, data_list: str | None) -> str:
    """Why --data_dir, --data_weights and --data_list do not go together, whatever lies on disk; "" where they do."""
    if not folders and data_list is None:
        return "--data_dir is missing: the folder with the volumes, or give a --data_list"
    if data_list is not None and len(folders) > 1:
        return f"--data_list takes one --data_dir, to which its relative paths belong, and there are {len(folders)}"
    if weights is None:
        return ""
    if data_list is not None:
        return "--data_weights are for the folders of --data_dir: a --data_list weights a volume by naming it again"
    if len(weights) != len(folders):
        return (
            f"--data_weights {format_values(weights)}: expected one for each folder of --data_dir, of which there are "
            f"{len(folders)}"
        )
    return ""


def find_data(
    folders: str | Sequence[str] | None, weights: Sequence[int] | None, data_list: str | None, index: Path | str
) -> WeightedVolumes:
    """The WeightedVolumes of a list, or of all that lies below the folders, in their order; UserError where there is
    nothing. Prints what is odd.

    index: file in which the volumes of the first folder are kept, see `list_volumes`; those of the second are in the
    file that is called so with .2 before its suffix, and so on
    """
    folders = [folders] if isinstance(folders, str) else folders or []
    if data_list is not None:
        return _of_list(data_list, *folders)
    _require_apart(folders)
    index, found = Path(index), []
    for number, folder in enumerate(folders, 1):
        own = index if number == 1 else index.with_name(f"{index.stem}.{number}{index.suffix}")
        try:
            paths, passed_over = list_volumes(folder, own)
        except DataError as error:
            raise UserError(f"--data_dir {error}") from error
        if not paths:
            raise UserError(f"--data_dir {folder}: {none_found(passed_over)}")
        if passed_over:
            print(f"passed over below {folder}: {passed_over}", flush=True)
        found.append(paths)
    weights = weights or [1] * len(folders)
    if len(folders) > 1:
        print(*_shares(folders, found, weights), *_found_twice(found), sep="\n", flush=True)
    repeats = [weight for weight, paths in zip(weights, found) for _ in paths]
    return WeightedVolumes(list(itertools.chain(*found)), repeats)


def _of_list(data_list: str, folder: str | None = None) -> WeightedVolumes:
    try:
        paths = read_data_list(data_list, folder)
    except DataError as error:
        raise UserError(f"--data_list {error}") from error
    if not paths:
        raise UserError(f"--data_list {data_list}: names no file")
    return WeightedVolumes(paths, [1] * len(paths))


def _require_apart(folders: Sequence[str]) -> None:
    """UserError where a folder is given twice or lies in another, whose volumes would then count twice."""
    for one, other in itertools.permutations(enumerate(folders), 2):
        inner, outer = (os.path.realpath(folder) for _, folder in (one, other))
        if os.path.commonpath([inner, outer]) == outer and (inner != outer or one[0] > other[0]):
            what = "is also given as" if inner == outer else "lies inside"
            raise UserError(
                f"--data_dir {one[1]} {what} {other[1]}: its volumes would count twice; give folders that lie apart"
            )


def _shares(folders: Sequence[str], found: Sequence[Sequence[str]], weights: Sequence[int]) -> list[str]:
    """A line for each folder: how many volumes, and their share of an epoch's samples."""
    total = sum(weight * len(paths) for weight, paths in zip(weights, found))
    return [
        f"{folder}: {len(paths)} volumes with weight {weight}, {weight * len(paths) / total:.0%} of the samples"
        for folder, paths, weight in zip(folders, found, weights)
    ]


def _found_twice(found: Sequence[Sequence[str]]) -> list[str]:
    """A warning where links lead from one folder to volumes of another."""
    seen, twice = {}, []
    for number, paths in enumerate(found):
        for path in paths:
            folder, uid = folder_and_uid(path) if "#" in os.path.basename(path) else (path, None)
            first = seen.setdefault((os.path.realpath(folder), uid), (number, path))
            if first[0] != number:
                twice.append((first[1], path))
    if not twice:
        return []
    one, other = twice[0]
    return [
        f"warning: {len(twice)} volumes are found below several folders of --data_dir, such as {one} and {other}, and "
        "count for each of them"
    ]


def data_changes(saved: Mapping[str, Any], config: Mapping[str, Any], position: int) -> list[str]:
    """Lines on what a resumed run draws from otherwise than its checkpoint did. saved, config: arguments of both;
    position: samples of the epoch that are done"""
    changes = changed_flags(("data_dir", "data_weights", "data_list", "patches_per_volume"), saved, config)
    drawn = changed_flags(("foreground", "foreground_share"), saved, config)
    lines = [f"resuming with patches drawn elsewhere: {', '.join(drawn)}"] if drawn else []
    size = "samples_per_epoch"  # which older checkpoints lack
    if not changes and saved.get(size, config[size]) != config[size]:
        changes = [f"{config[size]} samples per epoch instead of {saved[size]}: volumes were added or removed"]
    rest = "; of the rest of this epoch some samples come again and others not at all" if position else ""
    if changes:
        lines.append(f"resuming with other data: {', '.join(changes)}{rest}")
    elif rest and size not in saved and config["patches_per_volume"] > 1:
        lines.append(f"resuming a run of an older version, which mixed the patches of an epoch less{rest}")
    return lines


OF_OLDER = {"patches_per_volume": 1, "foreground": "none"}  # what runs had that do not name it


def changed_flags(names: Sequence[str], saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The flags that differ, with both values. Flags that `config` does not name are passed over."""
    return [
        f"--{name} {_typed(config[name])} instead of {_typed(saved.get(name, OF_OLDER.get(name)))}"
        for name in names
        if name in config and saved.get(name, OF_OLDER.get(name)) != config[name]
    ]


def _typed(value: Any) -> str:
    return "(not given)" if value is None else format_values(value)
