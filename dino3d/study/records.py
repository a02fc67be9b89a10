"""Small records of a study's finished jobs, one file each with the score of every case, and their scores as one task.

Records hold no paths and no voxels, so that they can be kept with the code and put together over days and machines. A
study of parts, such as the two halves of the patients that are each tested by encoders which never saw them, is one
study for each part; their records meet here.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError, truncate_list
from dino3d.evaluation.feature_tables import expand_patterns, read_features, table_names
from dino3d.files import TEXT, atomic_write, read_json
from dino3d.study.arms import ARM_NAME, checksum
from dino3d.study.definition import PRETRAIN, TASKS, Study
from dino3d.study.ensembles import add_ensembles
from dino3d.study.jobs import StudyJob, code_digest, settings
from dino3d.study.outcome import Told, writing_to
from dino3d.study.pool import seconds_of
from dino3d.study.same_code import codes_in, codes_like, join_codes
from dino3d.study.scores import (
    FEW_LABELS,
    FIGURES,
    LABEL_SHARES,
    MASK_COLUMNS,
    METRIC,
    CaseScores,
    TaskScores,
    has_surface,
    probe_tables,
    read_cases,
    score_cases,
    score_of_all,
)

RECORD_FORMAT = 1
DIGITS = 7  # of a probability or its distance from 1, of Dice behind the point
MADE_WITH = ("git_revision", "versions", "device")
OF_ARMS = ("--seed", "--freeze_encoder", "--layer_decay")  # of fine-tuning, which a study gives its arms each


class RecordFolder(NamedTuple):
    """Where records are written, and what they say of this study. part: of several studies that belong together, or "";
    patients: whose cases count, None: all; note: what a reader must know; features: tables of features that are judged
    beside the arms by the probe; few_labels: figures of the probe with few labels that are recorded too"""

    folder: Path
    part: str = ""
    patients: frozenset[str] | None = None
    note: str = ""
    features: tuple[str, ...] = ()
    few_labels: tuple[str, ...] = ()

    def figures_of(self, stage: str) -> list[str]:
        """What is recorded of a stage's job, surface Dice where it has any."""
        return [name for name in FIGURES[stage] if name in self.few_labels or name not in FEW_LABELS]

    def path_of(self, task: str, arm: str, seed: int | None) -> Path:
        parts = [task, arm, *([] if seed is None else [f"seed{seed}"]), *([self.part] if self.part else [])]
        return self.folder / ("-".join(parts) + ".json")

    def holds(self, unit: Sequence[StudyJob]) -> bool:
        """Whether each task of a unit is recorded, with the flags and the code that it has now."""
        tasks = [job for job in unit if job.stage != PRETRAIN]
        return all(self._is_valid(job, unit) for job in tasks)

    def _is_valid(self, job: StudyJob, unit: Sequence[StudyJob]) -> bool:
        paths = [self.path_of(name, job.arm, job.seed) for name in self.figures_of(job.stage) if name != "surface"]
        return all(path.exists() and self._is_of(path, job, unit) for path in paths)

    def _is_of(self, path: Path, job: StudyJob, unit: Sequence[StudyJob]) -> bool:
        """Whether a record is of a job as it would be made now."""
        found = read_record(path)
        self._require_own_patients(path, found)
        same = (found["recipe"], found["note"]) == (recipe_of(job, unit), self.note)
        same = same and found["code"] in codes_like(self.folder, code_digest())
        return same and self._is_of_those_asked(found)

    def _is_of_those_asked(self, found: dict[str, Any]) -> bool:
        """Whether a record holds all of the tested patients that --patients names, and no others."""
        had = set(found["patients"])
        if "left_out" in found:
            return had == (self.patients or {*had, *found["left_out"]}) & {*had, *found["left_out"]}
        return self.patients in (None, had)  # older records do not say whom they lack

    def told_of_patients(self, units: Sequence[Sequence[StudyJob]]) -> list[str]:
        """Lines on names of --patients without a case in what is recorded, and on records that may lack patients."""
        jobs = [job for unit in units for job in unit if job.stage != PRETRAIN]
        paths = [self.path_of(name, job.arm, job.seed) for job in jobs for name in self.figures_of(job.stage)]
        found = [read_record(path) for path in paths if path.exists()]
        if self.patients is None:
            older = sum("left_out" not in one for one in found)
            return [f"{older} older records do not say if --patients left some out: taken for all patients"] * (
                older > 0
            )
        unknown = self.patients.difference(*(one["patients"] + one.get("left_out", []) for one in found))
        return [
            f"--patients: {len(unknown)} of its {len(self.patients)} names have no case, such as "
            f"{truncate_list(sorted(unknown))}: correct them, and start again"
        ] * bool(found and unknown)

    def _require_own_patients(self, path: Path, found: dict[str, Any]) -> None:
        """Raise UserError where a record would be replaced by one of other patients, as without --part."""
        if self.patients is not None and not self.patients & set(found["patients"]):
            raise UserError(
                f"{path}: holds none of the patients that --patients names; give the --part that these are, or another "
                "--records"
            )

    def write(self, study: Study, job: StudyJob, unit: Sequence[StudyJob]) -> None:
        """The record of a job that is done. Raises UserError, OSError."""
        marker, stages = read_json(job.marker), stages_behind(job, unit)
        made = {
            "flags": {one.stage: shlex.join(settings(one.flags)) for one in stages},
            "recipe": recipe_of(job, unit),
            "code": join_codes(read_json(one.marker).get("code", "") if one.marker.exists() else "" for one in stages),
            "seconds": {one.stage: seconds_of(one) for one in stages},
        } | {name: marker.get(name, "") for name in MADE_WITH}
        for figure in self.figures_of(job.stage):
            if figure != "surface" or has_surface(job.folder):
                cases = read_cases(study, figure, [job], [])[job.arm, job.seed]
                self._save(figure, job.arm, job.seed, cases, made)

    def write_features(self, study: Study) -> list[str]:
        """Records of the tables of features; their names. Raises UserError, OSError."""
        if not self.features:
            return []
        if "probe" not in study.data:
            raise UserError("--features: are judged by the probe: give --probe, the labelled cases")
        try:
            paths = expand_patterns(self.features, "--features")
        except UserError:
            # Those of a run that was recorded elsewhere, beside which others were run here
            kept = [path for path in self.folder.glob("probe*.json") if "-seed" not in path.name]
            of_part = [one for one in map(read_record, kept) if one["seed"] is None and one["part"] == self.part]
            figures = {one["task"] for one in of_part}
            if figures >= {*self.figures_of("probe")} and all(map(self._is_of_those_asked, of_part)):
                return []
            raise
        names = [name.rpartition(".")[2] for name in table_names(paths)]  # ENCODER.trivial-radial: trivial-radial
        taken = [arm.name for arm in study.arms]
        if odd := [n for i, n in enumerate(names) if not ARM_NAME.fullmatch(n) or n in taken + names[:i]]:
            raise UserError(
                f"--features {odd[0]}: is no name of its own, of letters, digits and _ . + -: rename the file"
            )
        for name, path in zip(names, paths):
            recipe = digest({"features": "table"})
            made = {"flags": {}, "recipe": recipe, "code": code_digest(), "seconds": {}}
            for figure in self.figures_of("probe"):
                cases = probe_tables(study.data["probe"], [read_features(path, name)], [], LABEL_SHARES[figure])[0]
                self._save(figure, name, None, cases, made | dict.fromkeys(MADE_WITH, ""))
        return names

    def _save(self, task: str, arm: str, seed: int | None, cases: Sequence[CaseScores], made: dict[str, Any]) -> None:
        kept = np.array([self.patients is None or patient in self.patients for patient in cases[0].patients])
        if not kept.any():
            raise UserError(
                f"--patients: names none of the {len(set(cases[0].patients))} patients of {task}, such as "
                f"{truncate_list(sorted(set(cases[0].patients)))}"
            )
        path, labels = self.path_of(task, arm, seed), cases[0].labels
        if path.exists():
            other = read_record(path)
            if (other["task"], other["arm"], other["seed"], other["part"]) != (task, arm, seed, self.part):
                raise UserError(f"{path}: is the record of another run, whose names make the same file: rename the arm")
            self._require_own_patients(path, other)
        content = {
            "format": RECORD_FORMAT,
            "task": task,
            "arm": arm,
            "seed": seed,
            "part": self.part,
            "note": self.note,
            **made,
            "patients": [patient for patient, keep in zip(cases[0].patients, kept) if keep],
            "left_out": sorted({patient for patient, keep in zip(cases[0].patients, kept) if not keep}),
            "labels": None if labels is None else labels[kept].tolist(),
            "repeats": [
                {"folds": one.folds[kept].tolist(), "values": rounded_scores(one.values[kept])} for one in cases
            ],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items()]
        with writing_to("--records", self.folder), atomic_write(path) as part:
            part.write_text("{\n" + ",\n".join(lines) + "\n}\n", **TEXT)


def rounded_scores(values: np.ndarray) -> list:
    """Scores for JSON, None where undefined. A sure model's differ near 0 and 1 alone, where more places are kept: AUC
    goes by their order."""
    values = values.astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = -np.floor(np.log10(np.minimum(values, 1 - values))) - 1  # behind the point, of the nearer end
    places = DIGITS + np.where(np.isfinite(zeros), zeros.clip(0), 0).astype(int)
    found = np.vectorize(round, otypes=[object])(values, places)
    found[np.isnan(values)] = None
    return found.tolist()


def stages_behind(job: StudyJob, unit: Sequence[StudyJob]) -> list[StudyJob]:
    """A job, and before it the one that it stands on."""
    return [*(one for one in unit if one.stage == job.needs), job]


def recipe_of(job: StudyJob, unit: Sequence[StudyJob]) -> str:
    """Hash of the flags that a job's result comes from, wherever its files lie, and of weights that none of its own
    stages has trained, or that they begin from."""
    first, *_ = stages = stages_behind(job, unit)
    of_stages = {one.stage: settings(one.flags) for one in stages}
    given = first.start if job.needs else checksum(weights_of_job(job))
    weights = {"weights": given} if given else {}
    return digest(of_stages | weights | ({"training_cases": job.training_cases} if job.training_cases else {}))


def weights_of_job(job: StudyJob) -> str:
    return next(word for flag, word in zip(job.flags, job.flags[1:]) if flag in ("--pretrained_weights", "--weights"))


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def tested_patients(path: str) -> frozenset[str]:
    """The patients that a text file names, one in each line. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--patients {path}: can't be read ({getattr(error, 'strerror', None) or error})") from error
    found = frozenset(line.strip() for line in lines if line.strip())
    if not found:
        raise UserError(f"--patients {path}: names no patient, expected one in each line")
    return found


# ------------------------------------------------------------------------------------------------------------- together


def read_record(path: Path) -> dict[str, Any]:
    """One record. Raises UserError."""
    try:
        found = read_json(path)
        if found["format"] != RECORD_FORMAT:
            raise ValueError(f"its format is {found['format']}, expected {RECORD_FORMAT}")
        if found["task"] not in METRIC or not ARM_NAME.fullmatch(found["arm"]):
            raise ValueError(f"it is of task {found['task']!r} and arm {found['arm']!r}")
        missing = {"seed", "part", "note", "flags", "recipe", "code", "seconds", *MADE_WITH} - set(found)
        if missing or not found["repeats"] or (found["labels"] is None) != (found["task"] in MASK_COLUMNS):
            raise ValueError(f"it lacks {truncate_list(sorted(missing)) or 'scores'}")
        require_plain(found)
        require_scores(found)
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no record of a study ({error}); remove it") from error


def require_plain(record: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or AttributeError for what a record says of its run, where it is of another kind."""
    seed = record["seed"]
    if seed is not None and (type(seed) is not int or seed < 0):
        raise ValueError(f"its seed is {seed!r}")
    if record["part"] != "" and not ARM_NAME.fullmatch(record["part"]):
        raise ValueError(f"its part is {record['part']!r}")
    texts = [record[name] for name in ("note", "recipe", "code", "git_revision", "device")]
    if not all(
        isinstance(text, str)
        for text in (*texts, *record["patients"], *record.get("left_out", ()), *record["flags"].values())
    ):
        raise ValueError("its patients, left_out, flags, note, recipe, code, git_revision or device are no text")
    if not all(isinstance(value, int | float | None) for value in record["seconds"].values()):
        raise ValueError("its seconds are no numbers")


def require_scores(record: dict[str, Any]) -> None:
    """Raise ValueError or TypeError where the scores of a record are not as `RecordFolder` writes them."""
    labels, cases = record["labels"], len(record["patients"])
    if labels is not None and len(labels) != cases:
        raise ValueError("its labels are not one for each case")
    if labels is not None and not are_counts(labels):
        raise ValueError("its labels are not whole numbers")
    classes = set()
    for one in record["repeats"]:
        if len(one["values"]) != cases or len(one["folds"]) != cases or not cases:
            raise ValueError("its scores are not one for each case")
        if not are_counts(one["folds"]):
            raise ValueError("its folds are not whole numbers")
        scores = [one["values"]] if labels is None else one["values"]
        classes |= set() if labels is None else set(map(len, scores))
        undefined = (type(None),) if labels is None else ()  # Dice where neither mask has the class
        if not all(
            type(value) in undefined or (type(value) in (int, float) and 0 <= value <= 1)
            for of_case in scores
            for value in of_case
        ):
            raise ValueError("its scores are not from 0 to 1")
    if labels is not None and (len(classes) != 1 or max(labels) >= min(classes)):
        raise ValueError("its probabilities are not one for each class")


def are_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def read_records(folder: Path, flag: str = "--from_records") -> list[dict[str, Any]]:
    """The records of a folder, each with `like`, the versions of the code that count as its own, and `made_by`, these
    for each version of it. flag: that the folder is of. Raises UserError."""
    try:
        paths = sorted(folder / name for name in os.listdir(folder) if name.endswith(".json"))
    except OSError as error:  # which glob would pass over
        raise UserError(f"{flag} {folder}: can't be read ({error.strerror})") from error
    if not paths:
        raise UserError(f"{flag} {folder}: holds no records, expected TASK-ARM-seedK.json of --records")
    found, known = [], {}
    for path in paths:
        one = read_record(path)
        other = known.setdefault((one["task"], one["arm"], one["seed"], one["part"]), path)
        if other != path:
            raise UserError(f"{path}: is of the same run as {other}: remove one")
        made_by = {frozenset(codes_like(folder, code)) for code in codes_in(one["code"])}
        found.append(one | {"like": frozenset(codes_like(folder, one["code"])), "made_by": made_by})
    return found


def cases_of(record: dict[str, Any]) -> list[CaseScores]:
    """A CaseScores for each repeat."""
    labels = None if record["labels"] is None else np.array(record["labels"], int)
    return [
        CaseScores(
            [str(patient) for patient in record["patients"]],
            labels,
            np.array([np.nan if v is None else v for v in one["values"]], float)
            if labels is None
            else np.array(one["values"], float),
            np.array(one["folds"], int),
        )
        for one in record["repeats"]
    ]


def join_parts(parts: Sequence[list[CaseScores]]) -> list[CaseScores]:
    """The cases of several parts as one, in which those of different parts were judged by different models."""
    joined = []
    for repeat in zip(*parts, strict=True):
        first = np.cumsum([0, *(one.folds.max() + 1 for one in repeat)])
        joined.append(
            CaseScores(
                [patient for one in repeat for patient in one.patients],
                None if repeat[0].labels is None else np.concatenate([one.labels for one in repeat]),
                np.concatenate([one.values for one in repeat]),
                np.concatenate([one.folds + start for one, start in zip(repeat, first)]),
            )
        )
    return joined


def score_records(
    records: Sequence[dict[str, Any]], task: str, draws: int, ensembles: Sequence[str] = ()
) -> TaskScores | None:
    """TaskScores of a task's records, all parts of a run together; None where there are none. ensembles: arms whose
    seeds are judged together too. Raises UserError."""
    mine = [one for one in records if one["task"] == task]
    if not mine:
        return None
    forms = {(len(one["repeats"]), one["labels"] and len(one["repeats"][0]["values"][0])) for one in mine}
    if len(forms) > 1:
        repeats, classes = (" and ".join(str(n or 0) for n in sorted(set(of_all))) for of_all in zip(*forms))
        raise UserError(
            f"{task}: its records are of {repeats} repeats and of {classes} classes, which can't be compared: remove "
            "the older ones"
        )
    parts = sorted({one["part"] for one in mine})
    notices, whole = unlike_flags(mine, task), {}
    for arm, seed in sorted({(one["arm"], one["seed"]) for one in mine}, key=lambda key: (key[0], key[1] or 0)):
        found = {one["part"]: one for one in mine if (one["arm"], one["seed"]) == (arm, seed)}
        missing = [part for part in parts if part not in found]
        if missing:
            run = arm if seed is None else f"{arm} seed {seed}"
            notices.append(f"{task}: {run} is left out, as its part {truncate_list(missing)} was not run")
            continue
        people = [set(found[part]["patients"]) for part in parts]
        if len(set().union(*people)) != sum(map(len, people)):
            raise UserError(f"{task}, {arm}: a patient stands in two parts; --patients of each names its own alone")
        whole[arm, seed] = join_parts([cases_of(found[part]) for part in parts])
    known = {one["arm"] for one in mine}
    named = [] if task in MASK_COLUMNS else [arm for arm in ensembles if arm in known]
    without = add_ensembles(whole, named, task, notices)
    return score_cases(task, whole, draws, notices, without) if whole else None


def unlike_flags(records: Sequence[dict[str, Any]], task: str) -> list[str]:
    """Lines on runs of a task that were not made alike: one figure, or a difference, would be of several things."""
    made = [one for one in records if one["seed"] is not None]
    notices = []
    stages = {one["arm"]: set() for one in made}
    for one in made:
        stages[one["arm"]].add(without(one["flags"].get(PRETRAIN, ""), ("--seed",)))
    for arm in [arm for arm, flags in stages.items() if len(flags) > 1]:
        notices.append(
            f"{task}: {arm} was pre-trained with {len(stages[arm])} sets of flags, runs.csv tells the recipes"
        )
    of_task = {
        without(text, OF_ARMS) for one in made for stage, text in one["flags"].items() if task in FIGURES.get(stage, ())
    }
    if len(of_task) > 1:
        notices.append(
            f"{task}: its runs were made with {len(of_task)} sets of flags, so that not only arms differ: "
            + truncate_list(sorted(unlike_words(of_task)), 4)
        )
    if (codes := len(set().union(*(one["made_by"] for one in made)))) > 1:
        notices.append(f"{task}: its runs were made by {codes} versions of the code")
    return notices


def unlike_shares(records: Sequence[dict[str, Any]]) -> list[str]:
    """Lines on probes whose figures by share of labels are not of the same features."""
    made: dict[tuple, set] = {}
    for one in records:
        if one["task"] in LABEL_SHARES and one["seed"] is not None:
            made.setdefault((one["arm"], one["seed"], one["part"]), set()).add((one["recipe"], one["like"]))
    arms = sorted({arm for (arm, *_), kinds in made.items() if len(kinds) > 1})
    return [
        f"probe: what {truncate_list(arms)} has with few labels and with all is of other flags or code: run study.py "
        "--few_labels again"
    ] * bool(arms)


def without(flags: str, left_out: Sequence[str]) -> tuple[str, ...]:
    """Words of flags, but some flags and their value."""
    words = shlex.split(flags)
    return tuple(
        word
        for before, word in zip(("", *words), words)
        if word.partition("=")[0] not in left_out and before not in left_out
    )


def unlike_words(sets: set[tuple[str, ...]]) -> set[str]:
    """Flags with their values that not all have."""
    pairs = [{f"{flag} {value}" for flag, value in zip(words, words[1:]) if flag.startswith("--")} for words in sets]
    return set.union(*pairs) - set.intersection(*pairs)


def told_of_records(
    records: Sequence[dict[str, Any]], arms: Sequence[str], folder: Path, notices: Sequence[str], against: Sequence[str]
) -> Told:
    """What tables from records say of how they were made. arms: that are told, some maybe not run"""
    flags = {arm: [one["flags"].get(PRETRAIN, "") for one in records if one["arm"] == arm] for arm in arms}
    stages = {task: [one["flags"].get(task, "") for one in records if one["task"] in FIGURES[task]] for task in TASKS}
    made = [{name: one[name] for name in MADE_WITH} for one in records if one["seed"] is not None]
    notes = {task: [describe_part(one) for one in records if one["task"] in FIGURES[task]] for task in TASKS}
    stage_of = {figure: task for task, figures in FIGURES.items() for figure in figures}
    rows = [
        [
            *(one["task"], one["arm"], "" if one["seed"] is None else one["seed"], one["part"]),
            *(
                len(set(one["patients"])),
                score_of(one),
                one["seconds"].get(PRETRAIN, ""),
                one["seconds"].get(stage_of[one["task"]], ""),
            ),
            *(one["device"], one["git_revision"][:12], one["code"], one["recipe"], one["note"]),
        ]
        for one in records
    ]
    header = ["task", "arm", "seed", "part", "patients", "value", "seconds_pretrain", "seconds_task", "device"]
    return Told(
        folder,
        {arm: "; ".join(dict.fromkeys(filter(None, of_arm))) for arm, of_arm in flags.items()},
        sorted({one["seed"] for one in records if one["seed"] is not None}),
        {task: "; ".join(dict.fromkeys(of_task)) for task, of_task in notes.items() if of_task},
        {task: "; ".join(dict.fromkeys(filter(None, of_task))) for task, of_task in stages.items() if any(of_task)},
        [one for place, one in enumerate(made) if one not in made[:place]],
        list(notices),
        against,
        ([*header, "revision", "code", "recipe", "note"], rows),
        frozenset(one["arm"] for one in records if one["seed"] is None),
    )


def describe_part(record: dict[str, Any]) -> str:
    return ": ".join(filter(None, (record["part"], record["note"]))) or "all patients"


def score_of(record: dict[str, Any]) -> float:
    """A record's own figure, of its cases alone."""
    return score_of_all(cases_of(record))
