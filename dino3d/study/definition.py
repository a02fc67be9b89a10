"""What a study is: arms x seeds x tasks, kept in study.json, which later calls add to and must not contradict."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino3d.command_line import UserError, truncate_list
from dino3d.files import read_json, write_json
from dino3d.study.arms import ARM_NAME, PRETRAINED, RANDOM, SCRATCH, Arm, checksum, expand_flags
from dino3d.study.folds import DRAWN_BY, leave_one_out, segmentation_patients

FORMAT = 1
PRETRAIN = "pretrain"
TASKS = ("classification", "segmentation", "probe")
STAGES = (PRETRAIN, *TASKS)
# Flags that a study gives its jobs itself
OWN_FLAGS = {
    PRETRAIN: ("--data_dir", "--data_path", "--output_dir", "--seed"),
    **dict.fromkeys(
        ("classification", "segmentation"),
        (
            *("--data_dir", "--data_path", "--data_list", "--output_dir", "--pretrained_weights", "--seed"),
            *("--max_steps", "--predict", "--weights", "--points"),
        ),
    ),
    "probe": ("--weights", "--input", "--scans", "--output"),
}


class Study(NamedTuple):
    """A study. data: {stage: folder or table}; flags: {stage: flags that all arms share}; processes: of a job; threads:
    of each process on CPUs; work_dir: that relative paths in flags belong to; files: {path: CRC-32} of the weights that
    arms are, or begin from; training_cases: see `folds.leave_one_out`, 0: as the script draws folds"""

    folder: Path
    data: dict[str, str]
    flags: dict[str, tuple[str, ...]]
    arms: list[Arm]
    seeds: list[int]
    processes: int
    threads: int
    work_dir: str
    files: dict[str, str]
    training_cases: int = 0

    @property
    def tasks(self) -> list[str]:
        return [task for task in TASKS if task in self.data]


class Given(NamedTuple):
    """What a command line says of a study; None: nothing."""

    data: dict[str, str]
    flags: dict[str, str]
    arms: list[Arm] | None
    seeds: Sequence[int] | None
    processes: int | None
    threads: int | None
    training_cases: int | None = None


def split_flags(stage: str, text: str) -> tuple[str, ...]:
    """The flags of a stage. Raises UserError for one that the study gives its jobs itself."""
    try:
        words = expand_flags(shlex.split(text), f"--{stage}_flags")
    except ValueError as error:
        raise UserError(f"--{stage}_flags '{text}': can't be split into flags ({error})") from error
    refuse_own_flags(stage, words, f"--{stage}_flags")
    return words


def refuse_own_flags(stage: str, words: Sequence[str], where: str) -> None:
    """Raise UserError for flags that the study gives its jobs itself."""
    for word in words:
        flag = word.partition("=")[0]
        if flag in OWN_FLAGS[stage]:
            raise UserError(f"{where}: {flag} is given by the study itself; leave it out")


def load_study(folder: Path) -> Study | None:
    """The study of a folder, None where there is none yet. Raises UserError."""
    path = folder / "study.json"
    if not path.exists():
        return None
    try:
        saved = read_json(path)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']}, expected {FORMAT}")
        arms = [
            Arm(name, one["kind"], tuple(shlex.split(one["flags"])), one["weights"])
            for name, one in saved["arms"].items()
        ]
        study = Study(
            folder,
            {str(stage): str(path) for stage, path in saved["data"].items()},
            {stage: tuple(shlex.split(text)) for stage, text in saved["flags"].items()},
            arms,
            [int(seed) for seed in saved["seeds"]],
            int(saved["processes"]),
            int(saved["threads"]),
            str(saved["work_dir"]),
            dict(saved["files"]),
            int(saved.get("training_cases", 0)),
        )
        odd = [
            arm.name
            for arm in arms
            if not ARM_NAME.fullmatch(arm.name) or arm.kind not in (PRETRAINED, SCRATCH, RANDOM)
        ]
        if odd or set(study.data) - set(STAGES) or set(study.flags) - set(STAGES):
            raise ValueError(f"it has {truncate_list(odd or [*study.data, *study.flags])}")
        return study
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: can't be read ({error!r}); move it away to begin a study anew") from error


def save_study(study: Study) -> None:
    """Write study.json, where it says something else. Raises OSError."""
    content = {
        "format": FORMAT,
        "data": study.data,
        "flags": {stage: shlex.join(words) for stage, words in study.flags.items()},
        "arms": {
            arm.name: {"kind": arm.kind, "flags": shlex.join(arm.flags), "weights": arm.weights} for arm in study.arms
        },
        "seeds": study.seeds,
        "processes": study.processes,
        "threads": study.threads,
        "work_dir": study.work_dir,
        "files": study.files,
    } | ({"training_cases": study.training_cases} if study.training_cases else {})
    path = study.folder / "study.json"
    if not path.exists() or read_json(path) != content:
        write_json(path, content)


def define(folder: Path, given: Given, default_arms: Sequence[Arm]) -> tuple[Study, list[str]]:
    """(the study that a folder holds with what is given added, lines on what is new). Raises UserError where they
    contradict each other, or something is missing."""
    old = load_study(folder)
    data = {stage: os.path.abspath(path) for stage, path in given.data.items()}
    flags = {stage: split_flags(stage, text) for stage, text in given.flags.items()}
    for arm in given.arms or ():
        refuse_own_flags(PRETRAIN, arm.flags, f"arm {arm.name}")
    if old is None:
        if set(data) <= {PRETRAIN}:
            raise UserError(
                f"--output_dir {folder}: holds no study yet, and no task is given for a new one: give --classification "
                "DIR, --segmentation DIR or --probe DIR, or several of them"
            )
        arms, seeds = list(given.arms or default_arms), sorted(set(given.seeds or (0, 1, 2)))
        study = Study(folder, data, flags, arms, seeds, given.processes or 1, given.threads or 1, os.getcwd(), {})
        study = study._replace(training_cases=given.training_cases or 0)
        lines = []
    else:
        study, lines = added_to(old, given, data, flags)
    for stage in study.flags:
        if stage != PRETRAIN and stage not in study.data:
            raise UserError(f"--{stage}_flags: is for --{stage} DIR, which is missing")
    check_arms(study)
    if study.training_cases:
        check_training_cases(study)
    return study._replace(files=checked_files(study)), lines


def added_to(
    old: Study, given: Given, data: dict[str, str], flags: dict[str, tuple[str, ...]]
) -> tuple[Study, list[str]]:
    """(a study with more arms, seeds or tasks, lines that say which). Raises UserError where it would be another
    study."""

    def refuse(what: str, had: object, has: object) -> None:
        raise UserError(
            f"--output_dir {old.folder}: is a study with {what} {had or 'not given'}, now it is {has or 'not given'}; "
            "give the same or leave it out, or choose another folder"
        )

    for stage, path in data.items():
        if path != old.data.get(stage, path if stage != PRETRAIN else None):
            refuse("--data_dir" if stage == PRETRAIN else f"--{stage}", old.data.get(stage), path)
    for stage, words in flags.items():
        if (stage in old.data or stage == PRETRAIN) and words != old.flags.get(stage, ()):
            refuse(f"--{stage}_flags", shlex.join(old.flags.get(stage, ())), shlex.join(words))
    for name, had, has in (
        ("--processes_per_job", old.processes, given.processes),
        ("--threads", old.threads, given.threads),
    ):
        if has not in (None, had):
            refuse(name, had, has)
    if given.training_cases not in (None, old.training_cases) and "segmentation" in old.data:
        refuse("--training_cases", old.training_cases, given.training_cases)
    by_name, lines = {arm.name: arm for arm in old.arms}, []
    for arm in given.arms or ():
        if (had := by_name.setdefault(arm.name, arm)) != arm:
            refuse(f"arm {arm.name} as", shlex.join(had.flags) or had.weights, shlex.join(arm.flags) or arm.weights)
    study = old._replace(
        data=old.data | data,
        flags=old.flags | flags,
        training_cases=given.training_cases or old.training_cases,
        arms=list(by_name.values()),
        seeds=sorted({*old.seeds, *(given.seeds or ())}),
    )
    for what, had, has in (
        ("arms", [arm.name for arm in old.arms], [arm.name for arm in study.arms]),
        ("seeds", old.seeds, study.seeds),
        ("tasks", old.tasks, study.tasks),
    ):
        if new := [str(one) for one in has if one not in had]:
            lines.append(f"added to the study in {old.folder}: {what} {', '.join(new)}")
    return study, lines


def check_arms(study: Study) -> None:
    """Raise UserError where an arm can't be run."""
    folders = {}
    for arm in study.arms:  # some disks take names in letters of either case for the same
        if (other := folders.setdefault(arm.name.lower(), arm.name)) != arm.name:
            raise UserError(f"arms {other} and {arm.name}: their folders would be one on some disks; rename one")
    if all(arm.kind == SCRATCH for arm in study.arms) and study.tasks == ["probe"]:
        raise UserError("--arms scratch: trains nothing for --probe; the frozen encoder before training is arm random")


def check_training_cases(study: Study) -> None:
    """Raise UserError where folds can't be made so."""
    if "segmentation" not in study.data:
        raise UserError("--training_cases: is for --segmentation DIR, which is missing")
    for word in study.flags.get("segmentation", ()):
        if (flag := word.partition("=")[0]) in DRAWN_BY:
            raise UserError(f"--segmentation_flags: {flag} and --training_cases exclude each other: leave one out")
    leave_one_out(segmentation_patients(study.data["segmentation"])[0], study.training_cases)


def start_of(study: Study, arm: Arm) -> str:
    """The weights that an arm's pre-training begins from, "" where it has none of them."""
    if arm.weights or arm.kind != PRETRAINED:  # the encoder before training begins from none: see `jobs.UNTRAINED`
        return ""
    flag, path = "--pretrained_weights", ""
    words = (*study.flags.get(PRETRAIN, ()), *arm.flags)
    for before, word in zip(("", *words), words):  # the last one counts
        path = word if before == flag else word.removeprefix(f"{flag}=") if word.startswith(f"{flag}=") else path
    return path and os.path.join(study.work_dir, path)


def checked_files(study: Study) -> dict[str, str]:
    """{path: CRC-32} of the weights that arms are, or begin from. Raises UserError where some have changed."""
    paths = [arm.weights_of(seed) for arm in study.arms if arm.weights for seed in study.seeds]
    paths += [path for arm in study.arms if (path := start_of(study, arm))]
    found = {path: checksum(path) for path in dict.fromkeys(paths)}
    for path, crc32 in found.items():
        if study.files.get(path, crc32) != crc32:
            raise UserError(
                f"{path}: has changed since the study in {study.folder} began; bring it back, or choose another "
                "--output_dir"
            )
    return found


def study_in_words(study: Study) -> dict[str, Any]:
    """What the study is, in words, for its report."""
    return {
        "arms": {arm.name: arm.weights or shlex.join(arm.flags) or arm.kind for arm in study.arms},
        "seeds": study.seeds,
        "data": study.data,
        "flags": {stage: shlex.join(words) for stage, words in study.flags.items()},
    }
