"""Whether a run resumes on the data that it was begun with: what splits.json keeps of each file. Imports no torch."""

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dino3d.command_line import UserError
from dino3d.data.scans import content_of

READERS = 16  # threads: a network drive answers many questions at a time
FILES_PER_READER = 500  # that a thread looks into before it takes others


def contents_of(paths: Mapping[str, str], whole: bool = False) -> dict[str, str]:
    """{name: `content_of` its file}. paths: {name: path}; whole: every byte, as masks need, of which a correction may
    keep the size"""
    names = list(paths)
    parts = [names[at : at + FILES_PER_READER] for at in range(0, len(names), FILES_PER_READER)]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda part: [content_of(paths[name], whole) for name in part], parts)
        return dict(zip(names, itertools.chain.from_iterable(found)))


def require_same_data(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """{name: content} to keep from now on. Raises UserError where files are others than those of before.

    path: of the splits.json that keeps them; before, now: see `contents_of`. A name tells the label, patient and subset
    that a folder gives it. "" is equal to all: of a file that could not be read nothing is known.
    """
    differ = {
        "are gone": [name for name in before if name not in now],
        "are new": [name for name in now if name not in before],
        "have changed": [name for name, one in now.items() if one and before.get(name) and before[name] != one],
    }
    if told := [f"{len(names)} {what}, such as {names[0]}" for what, names in differ.items() if names]:
        raise UserError(
            f"{path}: is of a run on other data: of {len(before)} files {', '.join(told)}; put the data of before "
            "back, or choose another --output_dir"
        )
    return {name: one or before[name] for name, one in now.items()}
