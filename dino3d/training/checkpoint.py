"""Saving, restoring and being interrupted: the one home of everything about surviving.

A checkpoint is one file that torch.load opens. It grows beside the old one and replaces it when it is safely on disk,
so that there is a whole one at every moment; the last few are kept; a checksum tells a damaged one.
"""

import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch

from dino3d.command_line import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    ONE_REQUEST,
    Preempted,
    UserError,
    end_at_once,
    format_values,
    number,
    truncate_list,
)
from dino3d.files import TEXT, add_checksum
from dino3d.training.broadcasting import broadcast_state
from dino3d.weights import load_file, tensor_misfit
from utils import Processes, is_worker_death

# Batch systems announce the end of a job with the first two; Ctrl-C is the third
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# What to do where the checkpoint in the output folder can't be resumed from
INSTEAD = "choose another --output_dir, or give it as --pretrained_weights"
RESUME = "resume with the flags that it was made with (its config.json has them), or choose another --output_dir"
BEFORE_THE_FLAG = {"pool": "cls"}  # what runs of older versions did, whose config does not say
ALONE = Processes()
EPOCH_SHARE = 0.1  # of the minutes between checkpoints: nearer to the last one, an epoch's end is no reason to save


class Saving(NamedTuple):
    """When checkpoints are written, and how many are kept. every_steps, every_minutes: 0: never for that reason"""

    every_steps: int = 0
    every_minutes: float = 10.0
    keep_last: int = 2


def add_saving_flags(group: Any, besides: str, by_minutes: str = "") -> None:
    """The flags that a Saving is made of. besides: when the script saves anyway; by_minutes: what else the minutes
    do in it, as the end of their help text"""
    default = Saving()
    group.add_argument(
        "--save_every_steps",
        default=default.every_steps,
        type=number(int, 0),
        metavar="N",
        help=f"steps between checkpoints, besides {besides}; 0: not by steps",
    )
    group.add_argument(
        "--save_every_minutes",
        default=default.every_minutes,
        type=number(float, 0),
        metavar="MINUTES",
        help="minutes between checkpoints, which a run loses at most that is killed without a warning; 0: not by time"
        + by_minutes,
    )
    group.add_argument(
        "--keep_last",
        default=default.keep_last,
        type=number(int, 1),
        metavar="N",
        help="how many checkpoints to keep: the newest (checkpoint.pth) and those before it (checkpoint.1.pth, "
        "...), from which a run is resumed where the newest is damaged; 1 for small disks: while one is "
        "written there is one more",
    )


# ------------------------------------------------------------------------------------------------------------ saving


class Checkpoints:
    """A run's checkpoint, written in the background, and those before it. path: of the newest; saving: Saving"""

    def __init__(self, path: Path | str, saving: Saving) -> None:
        self.path, self.saving = Path(path), saving
        self._thread, self._writing, self._saved = ThreadPoolExecutor(1), None, time.monotonic()

    def due(self, step: int, epoch_ends: bool = False) -> bool:
        """Whether to save after this step. epoch_ends: a reason by itself, unless the last checkpoint is so new that
        writing another would take longer than repeating what came since, as where an epoch lasts seconds."""
        steps, minutes, _ = self.saving
        passed = (time.monotonic() - self._saved) / 60
        by_time = minutes and passed >= minutes or epoch_ends and passed >= EPOCH_SHARE * minutes
        return bool(steps and step % steps == 0 or by_time)

    def save(self, state: dict[str, Any], copy: Path | None = None) -> None:
        """Save `state` as it is now; returns when it is copied to CPU memory. copy: a second name for this one, to
        stay.

        Raises UserError where the one before could not be written.
        """
        self.wait()
        state, self._saved = to_cpu(state), time.monotonic()
        self._writing = self._thread.submit(self._write, state, copy)

    def _write(self, state: dict[str, Any], copy: Path | None) -> None:
        save_checkpoint(self.path, state, self.saving.keep_last)
        if copy:
            keep_copy(self.path, copy)

    def wait(self) -> None:
        """Until what was saved is on disk. Raises UserError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """End the writing thread, when what was saved is on disk or can't be written."""
        self._thread.shutdown()


def to_cpu(state: Any) -> Any:
    """A copy of a state in CPU memory: training goes on changing its tensors in place."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: to_cpu(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [to_cpu(value) for value in state]
    return state


def save_checkpoint(path: Path | str, state: dict[str, Any], keep_last: int = 1) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) so that `path` is always a whole file.

    keep_last: how many to keep, this one included. Raises UserError where it can't be written, and then what was
    saved before stands as it was.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w+b") as file:
            save_to(file, state)
            add_checksum(file)
            file.flush()
            os.fsync(file.fileno())
        rotate(path, keep_last)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer answers a full disk with RuntimeError
        remove(part)
        if is_worker_death(error):  # raised wherever the main thread happens to be
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"{path}: the checkpoint can't be written ({reason}); what was saved before is unharmed"
        ) from error


def save_to(file: BinaryIO, state: Any) -> None:
    """torch.save; where the disk says why it fails, OSError, for which torch has a RuntimeError without that reason."""
    reasons = []

    class Noting:
        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                reasons.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(state, Noting())
    except RuntimeError as error:
        raise (reasons or [error])[0] from None


def remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # where nothing can be written, nothing is there to remove
        pass


def rotate(path: Path, keep_last: int) -> None:
    """Give the newest checkpoint the name of the first earlier one as well, and each earlier one the next name."""
    earlier = list_backups(path)
    for old in earlier[max(keep_last - 1, 0) :]:
        old.unlink()
    earlier = earlier[: max(keep_last - 1, 0)]
    # a run that was killed between the two names' changes has both of one file
    if keep_last == 1 or not path.exists() or (earlier and os.path.samefile(path, earlier[0])):
        return
    names = [path.with_name(f"{path.stem}.{k}{path.suffix}") for k in range(1, keep_last)]
    for old, name in reversed(list(zip(earlier, names[1:]))):
        os.replace(old, name)
    keep_copy(path, names[0])


def names_beside(path: Path) -> list[str]:
    """Names of the earlier checkpoints beside `path`, and of the copies that stay, as checkpoint0020.pth."""
    return [other.name for other in list_backups(path) + list_backups(path, r"(\d{4,})")]


def list_backups(path: Path, number: str = r"\.(\d+)") -> list[Path]:
    """Paths of the earlier checkpoints that are kept beside `path`, the latest first. number: in their names"""
    pattern = re.compile(re.escape(path.stem) + number + re.escape(path.suffix))
    found = {int(match[1]): other for other in path.parent.glob("*") if (match := pattern.fullmatch(other.name))}
    return [found[k] for k in sorted(found)]


def keep_copy(path: Path, copy: Path) -> None:
    """Keep the checkpoint `path` under a second name as well, without writing it again where links are possible."""
    part = copy.with_name(copy.name + ".part")
    remove(part)
    try:
        os.link(path, part)  # a later checkpoint replaces the name `path`, not the file behind it
    except OSError:
        shutil.copyfile(path, part)
    os.replace(part, copy)
    remove(part)  # replacing a name of a file by another name of it does nothing


# ---------------------------------------------------------------------------------------------------------- resuming


def load_checkpoint(path: Path | str, must_match: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote, or None where there is no file.

    must_match: {name: value} that the state's config must agree with, where it has the name. Raises UserError.
    """
    if not os.path.exists(path):
        return None
    try:
        return check_state(load_file(path), path, must_match)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{error}; put back a whole one") from error


def load_newest(
    path: Path | str, must_match: Mapping[str, Any] | None = None, parts: Collection[str] = ()
) -> dict[str, Any] | None:
    """As `load_checkpoint`; where the file is damaged, the last whole one before it takes its place, with a warning.

    parts: names that a state must have, as `check` has them
    For the main process alone: the damaged file is moved out of the way. Raises UserError as `refuse_missing` does.
    """
    path, problems = Path(path), []
    refuse_missing(path)
    if not path.exists():
        return None
    for candidate in (path, *list_backups(path)):
        try:
            state = check_state(load_file(candidate), candidate, must_match, parts)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        if problems:
            damaged = path.with_name(f"{path.stem}.damaged{path.suffix}")
            keep_copy(path, damaged)
            keep_copy(candidate, path)
            done = f"resuming from the one before, {candidate.name}, and keeping the damaged one as {damaged.name}"
            print(f"warning: {problems[0]}; {done}", file=sys.stderr, flush=True)
        return state
    others = f"; so is every earlier one ({len(problems) - 1})" if len(problems) > 1 else ""
    away = " and ".join(filter(None, ["it", truncate_list(names_beside(path))]))
    raise UserError(f"{problems[0]}{others}; move {away} away to start anew or put back a whole one")


def refuse_missing(path: Path) -> None:
    """UserError where other checkpoints of a run stand and its newest does not: a new run would replace them."""
    if not path.exists() and (found := names_beside(path)):
        raise UserError(
            f"{path}: is missing, beside {truncate_list(found)}: rename one to {path.name} to resume from it, or "
            "choose another --output_dir to start anew"
        )


def load_on_all(
    path: Path | str, processes: Processes, must_match: Mapping[str, Any] | None = None, parts: Collection[str] = ()
) -> dict[str, Any] | None:
    """The state of `load_newest` on every rank, or None; rank 0 alone reads it. Raises UserError, on all ranks."""
    return broadcast_state(lambda: load_newest(path, must_match, parts), processes)


def check_state(
    state: Any, path: Path | str, must_match: Mapping[str, Any] | None = None, parts: Collection[str] = ()
) -> dict[str, Any]:
    """`state`, if it is a checkpoint of the same run: has `parts`, and a config that agrees with `must_match`.

    Raises UserError.
    """
    require_parts(state, ("config", *parts), path)
    config = state["config"]
    if not isinstance(config, dict):
        raise UserError(f"{path}: its 'config' is a {type(config).__name__}, expected a dict; {INSTEAD}")
    for name, value in (must_match or {}).items():
        ran = config.get(name, BEFORE_THE_FLAG.get(name, value))
        if _as_list(ran) != _as_list(value):
            raise UserError(
                f"{path}: is of a run with --{name} {_shown(ran)}, not {_shown(value)}; "
                "resume with the same or choose another --output_dir"
            )
    return state


def require_parts(state: Any, names: Iterable[str], path: Path | str, everywhere: bool = False) -> None:
    """UserError where a checkpoint does not have what this script restores, as another script's has not."""
    missing = [repr(name) for name in names if not isinstance(state, dict) or name not in state]
    if missing:
        key = " with --checkpoint_key model" if isinstance(state, dict) and "model" in state else ""
        raise UserError(f"{path}: is {kind_of(state)}: it has no {truncate_list(missing)}; {INSTEAD}{key}", everywhere)


def kind_of(state: Any) -> str:
    """In words, what wrote a checkpoint, as far as its parts tell."""
    parts = state.keys() if isinstance(state, dict) else set()
    config = state["config"] if "config" in parts and isinstance(state["config"], dict) else {}
    if {"student", "teacher"} <= parts:
        return "a checkpoint of DINO pre-training" + " (main_dino.py)" * bool(config)
    if {"model", "best"} <= parts:
        script = {"protocol": " (main_lnc_luna16.py)", "decoder": " (main_lts_msd.py)"}
        return "a checkpoint of fine-tuning" + next((script[name] for name in script if name in config), "")
    return "no checkpoint of this script"


def load_parts(parts: Mapping[str, Any], state: Any, path: Path | str) -> None:
    """Load each of `parts`, {name: module, optimizer or gradient scaler}, from what the checkpoint has under its name.

    Raises UserError where one is missing or does not fit, on all ranks alike: they have the same file.
    """
    require_parts(state, parts, path, everywhere=True)
    for name, part in parts.items():
        try:
            problem = misfit(part, state[name])
            if not problem:  # a scaler that was off left nothing: one that is on now begins as it is
                part.load_state_dict(state[name] or part.state_dict())
        except Exception as error:  # torch raises many kinds for what is no state of the part
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if problem:
            raise UserError(f"{path}: its '{name}' does not fit this run: {problem}; {RESUME}", everywhere=True)


def misfit(part: Any, state: Any) -> str:
    """Why `state` can't be loaded into the part, in a few words, or "": torch's own fill a page, or come too late."""
    if not isinstance(state, dict):
        return f"it is a {type(state).__name__}, expected a dict"
    if isinstance(part, torch.nn.Module):
        return tensor_misfit(part.state_dict(), state, others=True)
    if isinstance(part, torch.optim.Optimizer):
        return optimizer_misfit(part, state)
    bad = [name for name in part.state_dict() if state and not isinstance(state.get(name), (int, float))]  # a scaler's
    return f"without a number for {truncate_list(bad)}" if bad else ""


def optimizer_misfit(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> str:
    missing = [name for name in ("param_groups", "state") if name not in state]
    if missing:
        return f"without {truncate_list(missing)}"
    groups, own = state["param_groups"], optimizer.param_groups
    sizes, wanted = ([str(len(group["params"])) for group in some] for some in (groups, own))
    if sizes != wanted:
        return (
            f"{len(groups)} groups of {truncate_list(sizes)} parameters instead of {len(own)} of "
            f"{truncate_list(wanted)}"
        )
    # PyTorch adds settings that groups of its older versions do not have, but not these, which tell optimizers apart
    settings = [name for name in ("betas", "momentum") if name in own[0] and name not in groups[0]]
    if settings:
        return f"without {truncate_list(settings)}: of another --optimizer"
    parameters, indices = ([one for group in some for one in group["params"]] for some in (own, groups))
    shapes = [
        f"{name} {tuple(value.shape)} of parameter {index} instead of {tuple(parameter.shape)}"
        for parameter, index in zip(parameters, indices)
        for name, value in state["state"].get(index, {}).items()
        if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape
    ]
    return f"with {truncate_list(shapes)}" if shapes else ""


def load_progress(kind: type, state: Mapping[str, Any], path: Path | str) -> Any:
    """A `kind`, a dataclass that tells how far a run is, from what a checkpoint has of its fields. Raises UserError."""
    values = {field.name: state[field.name] for field in fields(kind) if field.name in state}
    for field in fields(kind):
        if field.name in values and not isinstance(values[field.name], field.type):
            raise UserError(
                f"{path}: its '{field.name}' is a {type(values[field.name]).__name__}, expected "
                f"{getattr(field.type, '__name__', field.type)}; {RESUME}",
                everywhere=True,
            )
    return kind(**values)


def _as_list(value: Any) -> Any:
    """A tuple as a list, which it is in a checkpoint."""
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    """A value of a config in a message, in one line and not too long."""
    return " ".join(format_values(value).split())[:100]


# -------------------------------------------------------------------------------------------------- being interrupted


class StopSignal:
    """SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask a run to save and end; its processes agree after which step.

    They are heeded inside `with stop_signal:`. A second one, a second later or more, ends this process at once.
    received: name of the signal that came, or ""
    marker: file that says in words that the run was ended so; removed when it is resumed
    """

    def __init__(self, processes: Processes = ALONE, marker: Path | None = None) -> None:
        self.processes, self.marker, self.received = processes, marker, ""
        self._at, self._before, self._answer = 0.0, {}, None

    def __enter__(self) -> "StopSignal":
        if self.processes.is_main:
            self.marker.unlink(missing_ok=True)
        self._before = {number: signal.signal(number, self._heed) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._answer:
            self._answer()  # the question after the last step: nothing is left under way
        if kind is Preempted:  # this process will end: what comes now is the same request, or a second one
            if self.processes.is_main:
                self.marker.write_text(self._told(error), **TEXT)
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._at = signal.Signals(number).name, now
        elif now - self._at > ONE_REQUEST:
            end_at_once(number)

    def should_stop(self) -> bool:
        """Whether the run is to end here, the same on all ranks: all call this after every step.

        What the others say is looked at after the next step, so that no GPU waits for it.
        """
        if self.processes.world_size == 1:
            return bool(self.received)
        if self._answer and self._answer():
            return True
        self._answer = self.processes.any_rank_async(bool(self.received))
        return False

    def end(self, saved: Callable[[], None] = lambda: None) -> NoReturn:
        """End the run on all ranks. saved: called on the main process first, returns when everything is on disk"""
        self.processes.run_on_main(saved)  # nobody leaves before: a launcher ends the others when one is gone
        by_hand = {name for name in self.processes.all_gather(self.received) if name} == {"SIGINT"}
        name = {"": "a signal to another process", "SIGINT": "Ctrl-C"}.get(self.received, self.received)
        raise Preempted(
            f"ended by {name}; everything is saved, the same command resumes",
            EXIT_INTERRUPTED if by_hand else EXIT_PREEMPTED,
        )

    def check(self) -> None:
        """Raise StopRequested where a signal has come: for a long piece of work of this process, which is given up."""
        if self.received:
            raise StopRequested

    def _told(self, error: BaseException | None) -> str:
        count = self.processes.world_size
        launched = f"with {count} processes, by torchrun or srun as before" if count > 1 else f"with {sys.executable}"
        return (
            f"This run was {error}. It is not finished. To resume, start the same command again ({launched}):\n\n"
            f"    {shlex.join(sys.argv)}\n\nThis file is removed then.\n"
        )


class StopRequested(BaseException):
    """What this process was at is given up, since a signal has come. The others don't know: whoever shares out the work
    catches it, and ends the run together with them."""


def ignore_signals() -> None:
    """In a reading process: a signal to all processes of a run is for the main ones to heed."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
