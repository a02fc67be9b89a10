"""The arms of a study: sets of flags of main_dino.py, or weights that others have trained."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dino3d.command_line import UserError, did_you_mean
from dino3d.files import crc32_of
from dino3d.flag_files import read_flags

PAPERS_SIX = ("rotation", "scale", "flip", "elastic", "gaussian", "histogram")  # its augmentations
PAPERS_THREE = ("rotation", "scale", "flip")  # that are on by default
PRETRAINED, SCRATCH, RANDOM = "trained", "scratch", "random"  # kinds of arms
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")  # names folders too


class Arm(NamedTuple):
    """An arm. kind: PRETRAINED, SCRATCH or RANDOM; flags: of main_dino.py, after those that all arms share; weights: a
    checkpoint instead of pre-training, in which {seed} stands for the seed"""

    name: str
    kind: str = PRETRAINED
    flags: tuple[str, ...] = ()
    weights: str = ""

    def weights_of(self, seed: int) -> str:
        return self.weights.replace("{seed}", str(seed))


def with_augmentations(name: str, chosen: Sequence[str]) -> Arm:
    """The arm of some of the paper's augmentations."""
    return Arm(name, flags=tuple(word for one in PAPERS_SIX for word in (f"--use_{one}", str(one in chosen).lower())))


BUILT_IN = {
    arm.name: arm
    for arm in (
        with_augmentations("none", ()),
        *(with_augmentations(one, [one]) for one in PAPERS_SIX),
        with_augmentations("paper", PAPERS_THREE),
        with_augmentations("all", PAPERS_SIX),
        Arm("scratch", SCRATCH),
        Arm("random", RANDOM),
    )
}
COMPARED_WITH = ("none", "scratch", "random")  # that a file's arms are beside, where --arms names none


def read_arms(path: str) -> dict[str, Arm]:
    """{name: Arm} of a text file with `name: flags of main_dino.py` or `name: checkpoint` in each line. Raises
    UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--arms_file {path}: can't be read ({getattr(error, 'strerror', None) or error})") from error
    arms = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where, (name, colon, value) = f"--arms_file {path}: line {number}", map(str.strip, line.partition(":"))
        if not colon or not ARM_NAME.fullmatch(name):
            raise UserError(
                f"{where} is '{line.strip()[:60]}', expected `name: flags of main_dino.py` or `name: checkpoint`, the "
                "name of letters, digits and _ . + -"
            )
        if name in BUILT_IN or name in arms:
            raise UserError(f"{where}: {name} is {'built in' if name in BUILT_IN else 'there twice'}: rename it")
        try:
            words = shlex.split(value, comments=True)
        except ValueError as error:
            raise UserError(f"{where}: {name} can't be split into flags ({error})") from error
        if len(words) == 1 and not words[0].startswith(("-", "@")):
            arms[name] = Arm(name, weights=os.path.abspath(Path(path).parent / words[0]))
        elif words and not words[0].startswith(("-", "@")):
            raise UserError(f"{where}: {name} begins with {words[0]}, expected a flag, or one checkpoint alone")
        else:
            arms[name] = Arm(name, flags=expand_flags(words, where))
    if not arms:
        raise UserError(f"--arms_file {path}: names no arm, expected lines as `name: flags of main_dino.py`")
    return arms


def choose_arms(names: Sequence[str] | None, of_file: dict[str, Arm]) -> list[Arm]:
    """The arms of these names, built in or of a file; None: all of the file beside what they are compared with, or all
    that are built in. Raises UserError."""
    known = BUILT_IN | of_file
    if names is None:
        names = [*COMPARED_WITH, *of_file] if of_file else list(BUILT_IN)
    for name in names:
        if name not in known:
            raise UserError(
                f"--arms {name}: no such arm, expected some of {', '.join(known)}" + did_you_mean(name, known)
            )
    return [known[name] for name in dict.fromkeys(names)]


def expand_flags(words: Iterable[str], where: str) -> tuple[str, ...]:
    """Flags with each @FILE replaced by those in it, so that a study holds what was run. where: they stand. Raises
    UserError."""
    try:
        return tuple(str(word) for one in words for word in (read_flags(one[1:]) if one.startswith("@") else [one]))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def checksum(path: str) -> str:
    """CRC-32 of weights; of a run's folder, of those that the scripts take. Raises UserError."""
    if os.path.isdir(path):
        from dino3d.features.encoder import find_weights  # loads torch, which a study does without else

        path, _ = find_weights(path, "weights")
    try:
        with open(path, "rb") as file:
            return f"{crc32_of(file, os.stat(path).st_size):08x}"
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
