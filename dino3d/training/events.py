"""TensorBoard's event files, which a run can do without: what can't be written is told once, and ends nothing."""

import sys
import threading
from pathlib import Path
from typing import Any

from utils import is_worker_death


class EventWriter:
    """TensorBoard's SummaryWriter, until something goes wrong: a warning then, and nothing is written any more.

    folder: of its files; step: those of an earlier run beyond it are hidden
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self._writer = folder, None
        try:
            from torch.utils.tensorboard import SummaryWriter

            silence_writing_threads()
            self._writer = SummaryWriter(folder, purge_step=step + 1)
        except Exception as error:
            self._give_up(error)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._call("add_scalar", name, value, step)

    def add_image(self, name: str, image: Any, step: int, dataformats: str) -> None:
        """name: of any bytes, as names of files are; TensorBoard takes UTF-8 alone"""
        self._call("add_image", name.encode(errors="replace").decode(), image, step, dataformats=dataformats)

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *values: Any, **named: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*values, **named)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if is_worker_death(error):  # raised wherever the main thread happens to be
            raise error
        self._writer = None
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        print(
            f"warning: {self.folder}: TensorBoard's files can't be written ({reason}); the run goes on without them",
            file=sys.stderr,
            flush=True,
        )


def silence_writing_threads() -> None:
    """TensorBoard writes in a thread that would print a traceback besides; the next call of its writer raises the
    same."""
    before = threading.excepthook
    if getattr(before, "silent", False):
        return

    def hook(what: Any) -> None:
        if not type(what.thread).__module__.startswith("tensorboard."):
            before(what)

    hook.silent = True
    threading.excepthook = hook
