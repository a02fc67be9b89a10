"""Folds that a study gives its segmentation jobs, where the script would draw a test set at random: each of few
patients is tested once, by a model that others trained."""

from collections.abc import Sequence
from pathlib import Path

from dino3d.command_line import UserError
from dino3d.data.conventions import DataError
from dino3d.data.layouts import find_task, pairs_of
from dino3d.data.lists import is_table, pairs_of_list
from dino3d.files import write_json

# What the script draws folds by
DRAWN_BY = ("--k_fold", "--num_test", "--label_fraction")


def leave_one_out(patients: Sequence[str], training: int) -> list[dict[str, list[str]]]:
    """A fold that tests each patient: the next ones by name train, as many as `training`, and the one after validates.

    So each trains as often as any other, and those of fewer are among those of more. Raises UserError for too many.
    """
    names = sorted(set(patients))
    if training > len(names) - 2:
        raise UserError(
            f"--training_cases {training}: of {len(names)} patients in --segmentation one is tested and one validates; "
            f"expected at most {len(names) - 2}"
        )
    folds = []
    for place, name in enumerate(names):
        others = [*names[place + 1 :], *names[:place]]
        folds.append({"train": sorted(others[:training]), "validation": [others[training]], "test": [name]})
    return folds


def segmentation_patients(source: str) -> tuple[list[str], str | None]:
    """(whose each case is, what changes when a table does) of the data of segmentation, as main_lts_msd.py has it.
    Raises UserError."""
    try:
        if is_table(source):
            _, patients, _, digest = pairs_of_list(source)
            return patients, digest
        pairs, _ = pairs_of(find_task(source), source)
    except DataError as error:
        raise UserError(f"--segmentation {error}") from error
    return [pair.name for pair in pairs], None


def fold_flags(training: int, source: str) -> tuple[str, ...]:
    """Flags that the script checks its splits.json against: by --label_fraction, that its folds leave patients out."""
    left = len(set(segmentation_patients(source)[0])) - 2
    return ("--k_fold", "2", "--num_test", "1", *(("--label_fraction", f"{training / left:.4f}") * (training < left)))


def place_folds(folder: Path, training: int, flags: Sequence[str], only: int | None = None) -> None:
    """Write `leave_one_out` as the splits.json from which a job of these flags begins, unless one is there. only: how
    many of the folds, None: all. Raises UserError, OSError."""
    path = folder / "splits.json"
    if path.exists():
        return
    value = dict(zip(flags, flags[1:]))
    patients, digest = segmentation_patients(value.get("--data_list") or value["--data_dir"])
    described = {
        "folds": "patients",
        "k_fold": int(value["--k_fold"]),
        "num_test": int(value["--num_test"]),
        "seed": int(value["--seed"]),
        "cases": [len(patients)],
        "patients": len(set(patients)),
        "data_list": digest,
        "label_fraction": float(value["--label_fraction"]) if "--label_fraction" in value else None,
        "spacing": None,  # these the script finds
        "classes": None,
    }
    write_json(path, {"data": described, "splits": leave_one_out(patients, training)[:only]})
