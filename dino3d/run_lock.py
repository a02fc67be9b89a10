"""One run per output folder: a lock file that tells a second run, on this machine or another, that the first lives.

The lock is the file `.lock` in the folder. Its holder has it locked (flock), which the kernel gives up however the
process ends, and writes into it who it is and, every few seconds, a sign of life: some network drives have no flock, or
one that other machines do not see. Whoever finds a lock looks on:

    locked or not, and a sign of life comes        somebody writes here: refused
    locked, and none comes for 90 s                refused, since the process is there, though it may be stopped
    not locked, of this machine (since it booted)  its process is gone, whatever ended it: taken over
    not locked, of another machine or without flock, and no sign of life for 90 s: taken over

A holder that finds another's name in its file ends itself. Processes that the holder forks don't inherit the lock.
"""

import contextlib
import errno
import fnmatch
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dino3d.command_line import UserError, end_process

try:
    import fcntl
except ImportError:  # another system: signs of life alone
    fcntl = None

NAME = ".lock"
BEAT = 3.0  # seconds between signs of life
SILENCE = 90.0  # seconds without one until a holder counts as dead; NFS forgets a dead machine's locks as late as that
NOTICE = 10.0  # seconds of waiting before a line says so
SETTLING = 1.0  # seconds in which two that begin at once without flock come to see each other's names
_inherited = set()  # open lock files, which a forked process closes: else it would keep them locked for its parent


def _close_inherited() -> None:
    for descriptor in _inherited:
        os.close(descriptor)
    _inherited.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextlib.contextmanager
def own_folder(folder: Path, flag: str = "--output_dir", remove: tuple[str, ...] = ()) -> Iterator[None]:
    """Make a folder, and keep other runs out of it while the block runs. Raises UserError.

    A block that fails leaves no folder that was made here, unless there is more in it than empty folders and files
    whose names match one in `remove`, as fnmatch has them.
    """
    made = []
    try:
        try:
            made += [one for one in (folder, *folder.parents) if not one.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock(folder, flag)
        except OSError as error:
            raise UserError(
                f"{flag} {folder}: can't be written to ({error.strerror or error}); choose another folder"
            ) from error
        try:
            yield
        except OSError as error:  # a full disk names no file
            if error.filename or error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
                raise
            raise UserError(f"{flag} {folder}: can't be written to ({error.strerror}); make room for it") from error
        finally:
            lock.release()
    except BaseException:
        if folder in made:
            _remove_empty(folder, remove)
        with contextlib.suppress(OSError):  # the first that holds something ends it
            for one in made:
                one.rmdir()
        raise


def _remove_empty(folder: Path, remove: tuple[str, ...]) -> None:
    """Remove the files in a folder at any depth if all match a name in `remove`, and the folders then empty."""
    with contextlib.suppress(OSError):
        files = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
        if all(any(fnmatch.fnmatch(os.path.basename(file), name) for name in remove) for file in files):
            for file in files:
                os.unlink(file)
        for root, folders, _ in os.walk(folder, topdown=False):
            for name in folders:
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.join(root, name))


class RunLock:
    """The lock of a folder, held until it is released. Raises UserError where another run holds it, OSError."""

    def __init__(self, folder: Path, flag: str) -> None:
        self.folder, self.flag, self.path = folder, flag, folder / NAME
        self._process, self._beats, self._released = os.getpid(), 0, threading.Event()
        self._me = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "boot": _this_boot(),
            "processes": _this_view(),
            "id": os.urandom(8).hex(),
        }
        self._file = self._acquire()
        _inherited.add(self._file)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _acquire(self) -> int:
        """Descriptor of the lock file, which is now ours."""
        began, first, told = time.monotonic(), None, False
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                locked = _flock(file)  # None: there is no flock here
                if not self._is_there(file):  # removed meanwhile by a run that has just ended
                    os.close(file)
                    continue
                found = self._read()
                first, silent = found if first is None else first, time.monotonic() - began
                lives = found not in (b"", first)
                if locked is not False and not lives and self._is_free(found, locked, silent):
                    try:
                        self._write(file)
                    except OSError:
                        self.path.unlink()
                        raise
                    if not locked:
                        time.sleep(SETTLING)
                    if locked or self._is_mine(self._read()):
                        return file
                    lives = True
                if lives or locked is False and silent > SILENCE:
                    raise UserError(self._refusal(found, lives))
                if silent > NOTICE and not told:
                    told = True
                    print(
                        f"{self.folder}: held by {_name(found)}, which gives no sign of life; waiting up to "
                        f"{SILENCE:.0f} s for one, or for its end",
                        file=sys.stderr,
                        flush=True,
                    )
            except BaseException:
                self._unlink()
                os.close(file)
                raise
            os.close(file)
            time.sleep(BEAT / 10)

    def _is_free(self, found: bytes, locked: bool | None, silent: float) -> bool:
        """Whether a lock that nobody has locked, as far as can be told, may be taken. found: what stands in it"""
        holder = _parsed(found)
        if not found or silent > SILENCE or locked and not holder:  # not even a name: a write that was cut off
            return True
        here, seen = (holder.get(name) == self._me[name] != "" for name in ("boot", "processes"))
        return here and (bool(locked) or seen and _is_gone(holder.get("process")))

    def _refusal(self, found: bytes, lives: bool) -> str:
        text = f"{self.flag} {self.folder}: another run writes to it ({_name(found)})"
        if lives:
            return f"{text}; wait for its end, end it, or choose another folder"
        return (
            f"{text}, and has given no sign of life for {SILENCE:.0f} s; end it or choose another folder. If its "
            f"machine is gone for good, remove {self.path}"
        )

    def _is_there(self, file: int) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        return False

    def _is_mine(self, found: bytes) -> bool:
        return _parsed(found).get("id") == self._me["id"]

    def _read(self) -> bytes:
        """What stands in the file; opened anew, so that a network drive asks its server."""
        with contextlib.suppress(FileNotFoundError):
            return self.path.read_bytes()
        return b""

    def _write(self, file: int) -> None:
        self._beats += 1
        text = json.dumps(self._me | {"sign_of_life": self._beats}).ljust(400) + "\n"
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, text.encode())
        os.ftruncate(file, len(text))
        os.fsync(file)

    def _beat(self) -> None:
        """In a thread: signs of life."""
        while not self._released.wait(BEAT):
            try:
                found = self._read()
                if found and not self._is_mine(found):
                    end_process(
                        f"{self.flag} {self.folder}: another run took it over ({_name(found)}), as this one had been "
                        "silent for too long or its lock was removed; what was saved before is unharmed"
                    )
                self._write(self._file)
            except OSError:  # a full disk, a drive that is away: perhaps it works the next time
                continue

    def release(self) -> None:
        """Give the folder free; nothing of the lock is left."""
        if self._process != os.getpid():  # a copy of the holder
            return
        self._released.set()
        self._thread.join()
        self._unlink()
        _inherited.discard(self._file)
        os.close(self._file)

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            if self._is_mine(self._read()):
                self.path.unlink()


def _flock(file: int) -> bool | None:
    """Whether we have locked the file; None where that is not possible."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES) else None


def _this_boot() -> str:
    """Names this machine since it was booted; "" where that is unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _this_view() -> str:
    """Names the view that we have of its processes, which containers have each of their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_gone(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
        return False
    except ProcessLookupError:
        return True
    except (OSError, TypeError, ValueError, OverflowError):
        return False


def _parsed(found: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        holder = json.loads(found)
        if isinstance(holder, dict):
            return holder
    return {}


def _name(found: bytes) -> str:
    """In words, who wrote a lock file; one line, whatever stands in it."""
    holder = _parsed(found)
    if not holder:
        return "a process that has not said who it is"
    told = {name: " ".join(str(holder.get(name, "?")).split())[:80] for name in ("host", "process", "started")}
    return f"process {told['process']} on {told['host']}, since {told['started']}"
