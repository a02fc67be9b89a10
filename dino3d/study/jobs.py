"""The jobs of a study: which script with which flags, what it needs, and whether it is done."""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dino3d.command_line import UserError
from dino3d.files import read_json
from dino3d.study.arms import RANDOM, SCRATCH, Arm
from dino3d.study.definition import PRETRAIN, Study, start_of
from dino3d.study.folds import fold_flags

ROOT = Path(__file__).resolve().parents[2]
STAGE_SCRIPTS = {
    PRETRAIN: "main_dino.py",
    "classification": "main_lnc_luna16.py",
    "segmentation": "main_lts_msd.py",
    "probe": "extract_features.py",
}
RESULTS = {  # the file that a script writes last, below the job's folder
    PRETRAIN: "checkpoint.pth",
    "classification": "metrics.json",
    "segmentation": "metrics.json",
    "probe": "features.csv",
}
# A step that changes nothing: what is saved is the encoder before training, with its geometry, as pre-training of the
# same seed begins with it, also where --pretrain_flags begin from other weights
UNTRAINED = ("--pretrained_weights=", "--max_steps", "1", "--lr", "0", "--min_lr", "0")


# Code that no job runs
NOT_OF_JOBS = (
    *("benchmark.py", "study.py", "prepare_data.py", "evaluate_features.py", "export.py", "hubconf.py"),
    *("describe.py", "dino3d/study/", "dino3d/prepare/", "dino3d/benchmarks/"),
)
# Where things lie: what they are is held in other ways
PLACES = (
    *("--data_dir", "--data_list", "--output_dir", "--pretrained_weights", "--cache_dir"),
    *("--weights", "--input", "--output"),
)


class StudyJob(NamedTuple):
    """A run of a script. flags: of the script; unit: folder of the arm and seed; needs: the stage before it, if any;
    training_cases: of the folds that it is given, 0: it draws its own; folds: how many of them, None: all; start:
    CRC-32 of the weights that pre-training begins from, "": none"""

    arm: str
    seed: int
    stage: str
    flags: tuple[str, ...]
    unit: Path
    needs: str | None
    training_cases: int = 0
    folds: int | None = None
    start: str = ""

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed} {self.stage}"

    @property
    def folder(self) -> Path:
        return self.unit / self.stage

    @property
    def log(self) -> Path:
        """What the script says on its console."""
        return self.unit / f"{self.stage}.log"

    @property
    def marker(self) -> Path:
        """Written when the script has ended well."""
        return self.unit / f"{self.stage}.done.json"

    @property
    def begun(self) -> Path:
        """Written when the script begins: the code that works at a job which is not done."""
        return self.unit / f"{self.stage}.begun.json"

    def is_done(self) -> bool:
        return self.marker.is_file() and (self.folder / RESULTS[self.stage]).is_file()


def settings(flags: Sequence[str]) -> list[str]:
    """Flags without those that say where things lie."""
    begins = "--pretrained_weights="  # with nothing behind it says that there are none
    return [
        word
        for before, word in zip(("", *flags), flags)
        if not {before, word} & {*PLACES} and (word == begins or not word.startswith(begins))
    ]


def code_digest() -> str:
    """Hash of the code that a job's result may depend on."""
    total = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "dino3d").rglob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(NOT_OF_JOBS):
            total.update(name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def require_same_flags(jobs: Sequence[StudyJob]) -> None:
    """Raise UserError for a job that was done with other flags than it has now, as after study.json was edited."""

    for job in jobs:
        if not job.is_done():
            continue
        try:
            had, has = settings(read_json(job.marker)["flags"]), settings(job.flags)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{job.marker}: can't be read ({error!r}); remove it, and start again") from error
        if had != has:
            only = [
                " ".join(word for word in one if word not in other) or "less" for one, other in ((had, has), (has, had))
            ]
            raise UserError(
                f"{job.name}: was done with other flags than study.json gives it now ({only[0]}, now {only[1]}); bring "
                f"study.json back, or remove {job.unit} to run it again"
            )


def unit_folder(study: Study, arm: str, seed: int) -> Path:
    return study.folder / "arms" / arm / f"seed{seed}"


def all_units(study: Study) -> list[list[StudyJob]]:
    """The jobs of each arm and seed, in their order; all arms of a seed stand before the next seed, so that what is
    done first can be compared. No unit needs another one."""
    return [jobs for seed in study.seeds for arm in study.arms if (jobs := jobs_of(study, arm, seed))]


def jobs_of(study: Study, arm: Arm, seed: int) -> list[StudyJob]:
    """The jobs of an arm and seed. From scratch has no probe: the encoder before training is that of RANDOM."""
    unit = unit_folder(study, arm.name, seed)
    tasks = [task for task in study.tasks if not (arm.kind == SCRATCH and task == "probe")]
    if not tasks:
        return []
    jobs, needs, weights = [], None, arm.weights_of(seed)
    if not weights:
        flags = (*study.flags.get(PRETRAIN, ()), *arm.flags, *pretraining_paths(study, unit / PRETRAIN, seed))
        if arm.kind in (SCRATCH, RANDOM):
            flags += UNTRAINED
        start = start_of(study, arm)
        jobs.append(StudyJob(arm.name, seed, PRETRAIN, flags, unit, None, start=start and study.files[start]))
        weights, needs = str(unit / PRETRAIN / RESULTS[PRETRAIN]), PRETRAIN
    for task in tasks:
        flags = task_flags(study, task, arm.kind, weights, unit / task, seed)
        training_cases = study.training_cases if task == "segmentation" else 0
        jobs.append(StudyJob(arm.name, seed, task, flags, unit, needs, training_cases))
    return jobs


def pretraining_paths(study: Study, folder: Path, seed: int) -> tuple[str, ...]:
    data = ("--data_dir", study.data[PRETRAIN]) if PRETRAIN in study.data else ()
    return (*data, "--output_dir", str(folder), "--seed", str(seed))


def task_flags(study: Study, task: str, kind: str, weights: str, folder: Path, seed: int) -> tuple[str, ...]:
    """The flags of a task's script. kind: of the arm"""
    given, data = study.flags.get(task, ()), study.data[task]
    if task == "probe":
        return (*given, "--weights", weights, "--input", data, "--output", str(folder / RESULTS[task]))
    source = "--data_list" if os.path.isfile(data) else "--data_dir"
    flags = (*given, source, data, "--pretrained_weights", weights, "--output_dir", str(folder), "--seed", str(seed))
    if kind == RANDOM:
        flags += ("--freeze_encoder", "true")
    if kind == SCRATCH and not has_flag(given, "--layer_decay"):  # lower rates below are for layers that know something
        flags += ("--layer_decay", "1")
    if task == "segmentation" and study.training_cases:
        flags += fold_flags(study.training_cases, data)
    if task == "segmentation" and not has_flag(given, "--cache_dir"):
        flags += ("--cache_dir", str(study.folder / "cache"))
    return flags


def has_flag(words: Sequence[str], flag: str) -> bool:
    return any(word.partition("=")[0] == flag for word in words)


def script_of(stage: str) -> Path:
    return ROOT / STAGE_SCRIPTS[stage]


def command_of(job: StudyJob, processes: int, workers: int) -> list[str]:
    """The command line of a job. processes: more than one are started by torchrun; workers: of each, to load data"""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    loading = [] if has_flag(job.flags, "--num_workers") else ["--num_workers", str(workers)]
    return [*launcher, str(script_of(job.stage)), *job.flags, *loading]
