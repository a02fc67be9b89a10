"""A fold's folder: its checkpoints, its best epoch, its results."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dino3d.command_line import UserError, format_values
from dino3d.evaluation.statistics import mean_and_deviation
from dino3d.features.encoder import BEST, CHECKPOINT, ENCODER, FOLD_METRICS, SPLITS, PretrainedEncoder, trained_folds
from dino3d.files import read_json, read_table, write_config, write_table
from dino3d.finetune.splits import Split, save_splits
from dino3d.training.checkpoint import load_checkpoint, load_newest, load_on_all
from utils import Processes, device_name

SCRIPTS = {"protocol": "main_lnc_luna16.py", "decoder": "main_lts_msd.py", "out_dim": "main_dino.py"}  # by their flags
# Of a config: in what folds must agree for the mean of them to mean something
SHARED = (*ENCODER, "classes", "label_names", "crop_size", "crop_spacing", "overlap", "largest_component", "min_volume")
PARTS = ("model", "optimizer", "scaler", "best", "epoch", "position", "step", "cases")  # of a fold's checkpoint.pth


def load_best(folder: Path, model: nn.Module, processes: Processes) -> dict:
    """Give the model its best epoch's weights; returns what is known of that epoch. Raises UserError."""
    path = folder / "best.pth"
    state = load_on_all(path, processes, parts=("model", "best"))
    if state is None:
        raise UserError(f"{path}: is missing; remove its folder to train this fold again", everywhere=True)
    model.load_state_dict(state["model"])
    return state["best"]


def refuse_pretraining_run(output_dir: Path) -> None:
    """UserError where a run's folder is one of main_dino.py."""
    if (output_dir / "checkpoint.pth").exists():
        raise UserError(f"--output_dir {output_dir}: holds a pre-training run; choose another folder")


def fold_checkpoints(output_dir: Path) -> Iterator[Path]:
    """The checkpoint.pth of each fold of a run that has one, in order."""
    found = (path for path in output_dir.glob(f"*/{CHECKPOINT}") if path.parent.name.isdecimal())
    yield from sorted(found, key=lambda path: int(path.parent.name))


def start_run(
    output_dir: Path,
    config: dict,
    fixed: Sequence[str],
    splits: list[Split],
    data: dict,
    processes: Processes,
    cases: int,
) -> None:
    """Write config.json and splits.json of a run. Raises UserError, on all ranks, where a fold's checkpoint is of a run
    in which one of the `fixed` names of the config had another value, or the encoder's file other weights, or is of
    more epochs."""

    def check() -> None:
        weights, trained = config["weights_crc32"], {}
        for path in fold_checkpoints(output_dir):
            state = load_newest(path, {name: config[name] for name in fixed}, PARTS)
            if state["config"].get("weights_crc32", weights) != weights:  # older runs have none
                raise UserError(
                    f"--pretrained_weights {config['pretrained_weights']}: holds other weights than when {path} was "
                    "made: put those back, or choose another --output_dir"
                )
            trained[path] = state["epoch"] + (state["position"] > 0)
        longest = max(trained, key=trained.get, default=None)
        if longest and trained[longest] > config["epochs"]:
            raise UserError(
                f"--epochs {config['epochs']}: {longest} has come to epoch {trained[longest]}, and all folds are to "
                f"have as many: give --epochs {trained[longest]} or more, or choose another --output_dir"
            )

    processes.run_on_main(check)
    if processes.is_main:
        write_config(output_dir / "config.json", config, processes, device_name(processes.device), cases=cases)
        save_splits(output_dir / SPLITS, splits, data)


def fold_files(path: Path | str) -> list[Path]:
    """The best.pth files that --weights names: one, a fold's, or those of a run's finished folds in order; prints which
    folds are left out. Raises UserError."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            f"--weights {path}: no such folder; expected the --output_dir of a trained run, a fold in it, or its {BEST}"
        )
    if (path / BEST).is_file():
        return [path / BEST]
    found, left_out = trained_folds(path, "--weights")
    if left_out:
        print(f"note: left out of {path}: {left_out}", flush=True)
    if not found:
        raise UserError(f"--weights {path}: holds no trained fold (looked for {BEST} there and in 0, 1, ...)")
    return found


def load_fold(
    path: Path, build: Callable[[PretrainedEncoder, dict, dict], nn.Module], known_by: str
) -> tuple[nn.Module, dict, dict]:
    """(model, its config, what was known of its best epoch) of a fold's best.pth. Raises UserError.

    build: gives the model of (PretrainedEncoder, config, state dict); known_by: key of SCRIPTS, whose run it must be of
    """
    state = load_checkpoint(path)
    config = state.get("config")
    if not isinstance(config, dict) or known_by not in config or "model" not in state:
        made_by = [other for name, other in SCRIPTS.items() if isinstance(config, dict) and name in config]
        found = f" but of {made_by[0]}" if made_by else ""
        raise UserError(
            f"--weights {path}: is no checkpoint of {SCRIPTS[known_by]}{found}; expected the --output_dir of its run, "
            "a fold in it, or a fold's best.pth",
            everywhere=True,
        )
    model = build(PretrainedEncoder(**{name: config[name] for name in ENCODER}), config, state["model"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"--weights {path}: does not fit {config['arch']} ({reason})", everywhere=True) from error
    return model, config, state["best"]


def load_folds(
    files: Sequence[Path], build: Callable[[PretrainedEncoder, dict, dict], nn.Module], known_by: str
) -> tuple[list[nn.Module], dict, list[dict]]:
    """(models, config of their run, what was known of the best epoch of each) of folds' best.pth files, to take the
    mean of. build, known_by: see `load_fold`. Raises UserError, also where the folds are not of one run."""
    models, configs, best = [], [], []
    for file in files:
        try:
            model, config, known = load_fold(file, build, known_by)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(
                f"--weights {file}: is no whole checkpoint of {SCRIPTS[known_by]} ({reason})", everywhere=True
            ) from error
        for name in (one for one in SHARED if configs and one in config):
            first, value = (format_values(one.get(name, config[name])) for one in (configs[0], config))
            if first != value:
                raise UserError(
                    f"--weights {files[0].parent.parent}: its folds differ in {name}, so they are not of one run "
                    f"({first} in {files[0].parent.name}, {value} in {file.parent.name}); give one of them, such as "
                    f"{files[0].parent}",
                    everywhere=True,
                )
        models.append(model)
        configs.append(config)
        best.append(known)
    return models, configs[-1], best


def start_folder(folder: Path) -> None:
    """Make a fold's folder; its results will be new."""
    folder.mkdir(exist_ok=True)
    (folder / FOLD_METRICS).unlink(missing_ok=True)


def file_name(case: str) -> str:
    """A case's name as that of its files in a fold's folder: no folders."""
    return case.replace("/", "_")


def collect_folds(
    output_dir: Path,
    folds: int,
    table: str,
    header: Sequence[str],
    names: Sequence[str],
    complete: Callable[[dict[str, Any], list[dict[str, str]]], dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[list[dict[str, str]]], dict[str, float | None], dict[str, float | None]]:
    """Write the folds' tables as one; returns (metrics.json of each fold, its table's rows, {name: mean}, {name:
    standard deviation}).

    names: of the metrics to average
    complete: adds to a fold's metrics what they lack where an older version tested it; the table's columns are then
        empty
    """
    tables = [read_table(output_dir / str(fold) / table) for fold in range(folds)]
    records = [
        complete(read_json(output_dir / str(fold) / FOLD_METRICS), rows) for fold, rows in zip(range(folds), tables)
    ]
    write_table(output_dir / table, header, [[row.get(name, "") for name in header] for rows in tables for row in rows])
    return records, tables, *mean_and_deviation(records, names)
