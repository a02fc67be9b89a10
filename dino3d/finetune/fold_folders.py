"""A fold's folder: its checkpoints, its best epoch, and whether it is finished."""
from pathlib import Path

from dino3d.command_line import UserError
from dino3d.finetune.encoder import ENCODER, Encoder
from dino3d.training.checkpoint import load_checkpoint, load_newest


def load_best(fold):
    """Give the model its best epoch's weights; returns what `keep_best` knew of it. Raises UserError."""
    def there():  # rank 0 may just have written it
        if not (fold.folder / "best.pth").is_file():
            raise UserError(f"{fold.folder / 'best.pth'}: is missing; remove its folder to train this fold again")
    fold.device.processes.from_main(there)
    state = load_checkpoint(fold.folder / "best.pth")
    fold.model.load_state_dict(state["model"])
    return state["best"]


def check_same_run(output_dir, config, fixed):
    """UserError where the first fold's checkpoint is of a run in which one of the `fixed` names had another value.

    For the main process alone.
    """
    load_newest(output_dir / "0" / "checkpoint.pth", {name: config[name] for name in fixed})


def fold_folders(path, name):
    """Folders with a fold's file `name`: `path` itself, or its sub-folders 0, 1, ... in order. Raises UserError."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"--weights {path}: no such folder; expected the --output_dir of a trained run or a fold in it")
    if (path / name).is_file():
        return [path]
    found = sorted((folder for folder in path.iterdir() if folder.name.isdigit() and (folder / name).is_file()),
                   key=lambda folder: int(folder.name))
    if not found:
        raise UserError(f"--weights {path}: holds no trained fold (looked for {name} there and in 0, 1, ...)")
    return found


def load_fold(path, build, script, known_by):
    """(model, its config, what was known of its best epoch) of a fold's best.pth. Raises UserError.

    build: gives the model of (Encoder, config, state dict); known_by: name in the config of `script`'s runs alone
    """
    state = load_checkpoint(path)
    config = state["config"]
    if known_by not in config:
        raise UserError(f"--weights {path}: is no checkpoint of {script}", everywhere=True)
    model = build(Encoder(**{name: config[name] for name in ENCODER}), config, state["model"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"--weights {path}: does not fit {config['arch']} ({reason})", everywhere=True) from error
    return model, config, state["best"]


def start_folder(folder):
    """Make a fold's folder; its results will be new."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)


def is_finished(folder):
    """Whether a fold is trained and tested: its metrics are the last thing that is written."""
    return (folder / "metrics.json").is_file()
