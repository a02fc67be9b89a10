"""Saving and restoring a run: the one home of everything about surviving."""
import os
import shutil
from pathlib import Path

import torch

from utils import UserError, load_file


def save_checkpoint(path, state):
    """Write `state` (tensors, numbers, strings, lists and dicts of them) so that `path` is always a whole file.

    The file grows under another name and replaces the old one when it is safely on disk. Raises UserError where it
    can't be written, and then the old file stands as it was.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer answers a full disk with RuntimeError
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: the checkpoint can't be written ({str(error).splitlines()[0]}); "
                        "what was saved before is unharmed") from error


def keep_copy(path, copy):
    """Keep the checkpoint `path` under a second name as well, without writing it again where links are possible."""
    copy.unlink(missing_ok=True)
    try:
        os.link(path, copy)  # a later checkpoint replaces the name `path`, not the file behind it
    except OSError:
        shutil.copyfile(path, copy)


def load_checkpoint(path, must_match=None):
    """The state that `save_checkpoint` wrote, or None where there is no file.

    must_match: {name: value} that the state's config must agree with, where it has the name. Raises UserError.
    """
    if not os.path.exists(path):
        return None
    try:
        state = load_file(path)
        config = state["config"]
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{error}; move it away to start anew or put back a whole one") from error
    except (KeyError, TypeError):
        raise UserError(f"{path}: is no checkpoint of this script (no 'config'); choose another --output_dir, "
                        "or give it as --pretrained_weights") from None
    for name, value in (must_match or {}).items():
        if name in config and config[name] != value:
            raise UserError(f"{path}: is of a run with --{name} {_plain(config[name])}, not {_plain(value)}; "
                            "go on with the same or choose another --output_dir")
    return state


def _plain(value):
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
