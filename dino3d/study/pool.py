"""Jobs through slots: several processes at once, each in a session of its own, ended with this one."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dino3d.command_line import EXIT_PREEMPTED, ONE_REQUEST, Preempted, git_revision
from dino3d.files import TEXT, append_json, read_json, read_json_lines, versions, write_json
from dino3d.study.devices import Slot, device_of_slots
from dino3d.study.folds import place_folds
from dino3d.study.jobs import StudyJob, code_digest, command_of
from dino3d.study.same_code import UNKNOWN, codes_in, join_codes

try:
    import fcntl
except ImportError:  # another system: jobs outlive a study that is killed
    fcntl = None

TIMES = "times.txt"  # of a unit, apart from results: a JSON object per attempt at a job
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POOL_POLL = 0.1  # seconds
WAITING = 120.0  # seconds for a job that outlived an earlier call to save and end
PR_SET_PDEATHSIG = 1  # of Linux' prctl


class FailedJob(NamedTuple):
    """A job that failed, or needs one that did."""

    job: StudyJob
    reason: str

    @property
    def told(self) -> str:
        return f"failed: {self.reason} (all it said: {self.job.log})"


class Running(NamedTuple):
    """A job that runs. began: seconds of time.monotonic; git_revision: when it began; code: and what has worked at it
    before"""

    job: StudyJob
    slot: int
    process: subprocess.Popen
    began: float
    git_revision: str
    code: str

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class Pool:
    """Runs jobs in slots. processes: of a job; work_dir: where they run; say: takes each line on what happens

    SIGTERM and SIGUSR1 end the jobs, which save, and raise Preempted; Ctrl-C does so too and stays KeyboardInterrupt.
    """

    def __init__(self, slots: Sequence[Slot], processes: int, work_dir: str, say: Callable[[str], None]) -> None:
        self.slots, self.processes, self.work_dir, self.say = slots, processes, work_dir, say
        self._signal = 0
        self._made_with = {"versions": versions(), "device": device_of_slots(slots)}
        self._before_start = end_with_parent()

    def run(
        self, jobs: Sequence[StudyJob], total: int, on_done: Callable[[StudyJob], None] | None = None
    ) -> list[FailedJob]:
        """Run all jobs that are not done, each when what it needs is; those that fail, and those that need them.

        total: jobs of the study, for the lines on progress; on_done: is called with each job that has ended well
        """
        again = {(job.unit, job.stage) for job in jobs if not job.is_done()}
        for job in jobs:  # what stands on a stage that is run again is asked again too
            if {(job.unit, job.needs), (job.unit, job.stage)} & again and job.marker.exists():
                job.marker.replace(job.begun)
        waiting = [job for job in jobs if not job.is_done()]
        failures, running, done = [], [], total - len(waiting)
        with self._heeding_signals():
            try:
                while waiting or running:
                    for one in [one for one in running if one.process.poll() is not None]:
                        running.remove(one)
                        failure = self._finish(one)
                        failures += [failure] if failure else []
                        done += not failure
                        told = failure.told if failure else f"done in {format_seconds(one.seconds)} ({done} of {total})"
                        self.say(f"{one.job.name}: {told}")
                        if on_done and not failure:
                            on_done(one.job)
                    failed = {(failure.job.unit, failure.job.stage) for failure in failures}
                    for job in [job for job in waiting if (job.unit, job.needs) in failed]:
                        waiting.remove(job)
                        failures.append(FailedJob(job, f"not run: its {job.needs} failed"))
                    for slot in sorted(set(range(len(self.slots))) - {one.slot for one in running}):
                        if job := next_ready(waiting, [one.job for one in running]):
                            waiting.remove(job)
                            self.say(f"{job.name}: begins")
                            running.append(self._start(job, slot))
                    self._raise_signal()
                    time.sleep(POOL_POLL)
            except BaseException:
                self._end(running)
                raise
        return failures

    def _raise_signal(self) -> None:
        """Raise what a signal asks for, if one came."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal:
            raise Preempted("ended by a signal; the jobs have saved: start again to resume", EXIT_PREEMPTED)

    def _start(self, job: StudyJob, slot: int) -> Running:
        job.folder.mkdir(parents=True, exist_ok=True)
        wait_for_lock(job.folder, self.say)
        if job.training_cases:
            place_folds(job.folder, job.training_cases, job.flags, job.folds)
        revision, code = git_revision(), join_codes([*code_before(job), code_digest()])
        write_json(job.begun, {"code": code})
        command = command_of(job, self.processes, self.slots[slot].workers)
        with open(job.log, "a", **TEXT) as log:
            log.write(f"$ {' '.join(command[1:])}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.work_dir,
                env=self.slots[slot].environment(os.environ),
                start_new_session=True,
                preexec_fn=self._before_start,
            )
        return Running(job, slot, process, time.monotonic(), revision, code)

    def _finish(self, one: Running) -> FailedJob | None:
        """Note that a job has ended; its FailedJob, if it is one."""
        job, code = one.job, one.process.returncode
        note_time(one)
        if code:
            by = f"ended by signal {-code}; " if code < 0 else ""
            return FailedJob(job, by + last_words(job.log))
        made_by = join_codes([one.code, code_digest()])  # which may have changed since it began
        made_with = {"git_revision": one.git_revision, "code": made_by}
        write_json(job.marker, {"flags": job.flags} | made_with | self._made_with)
        if job.is_done():
            job.begun.unlink(missing_ok=True)
            if len(codes_in(made_by)) > 1:
                self.say(
                    f"{job.name}: the code changed since it began, so that its record counts for no version; remove "
                    f"{job.unit} to run it again"
                )
            return None
        job.marker.unlink()
        return FailedJob(job, "ended without an error and without a result")

    def _end(self, running: Sequence[Running]) -> None:
        """Let all jobs save and end; a second signal ends them at once."""
        if not running:
            return
        self.say(f"ending {len(running)} jobs, which save first; once more ends them at once")
        for one in running:
            signal_group(one.process, signal.SIGTERM)
        began = time.monotonic()
        self._signal = 0
        while any(one.process.poll() is None for one in running):
            if self._signal and time.monotonic() - began > ONE_REQUEST:
                break
            time.sleep(POOL_POLL)
        for one in running:
            if one.process.poll() is None:
                signal_group(one.process, signal.SIGKILL)
                one.process.wait()
            note_time(one)

    @contextlib.contextmanager
    def _heeding_signals(self) -> Any:
        """Signals are noted while the block runs: an exception amid the start of a process would lose it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def heed(number: int, frame: Any) -> None:
            self._signal = number

        before = {number: signal.signal(number, heed) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def code_before(job: StudyJob) -> list[str]:
    """The code that has worked at a job before, whose work it may go on with."""
    try:
        return [str(read_json(job.begun).get("code", ""))]
    except FileNotFoundError:
        return []
    except (ValueError, AttributeError, RecursionError):
        return [UNKNOWN]


def note_time(one: Running) -> None:
    """One more line of the unit's times.txt; what a kill cut off has none."""
    append_json(
        one.job.unit / TIMES,
        {
            "stage": one.job.stage,
            "seconds": round(one.seconds, 2),
            "exit_code": one.process.returncode,
            "ended": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
    )


def seconds_of(job: StudyJob) -> float | None:
    """Of all attempts at a job; None where they are not known."""
    found = [one["seconds"] for one in read_json_lines(job.unit / TIMES) if one.get("stage") == job.stage]
    return round(sum(found), 1) if found else None


def next_ready(waiting: Sequence[StudyJob], running: Sequence[StudyJob]) -> StudyJob | None:
    """The first job whose needs are done."""
    for job in waiting:
        if job.needs is None or not any(
            other.unit == job.unit and other.stage == job.needs for other in (*waiting, *running)
        ):
            return job
    return None


def signal_group(process: subprocess.Popen, number: int) -> None:
    """To a job and its own processes, where SIGTERM is for the job alone: it tells them."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)


def end_with_parent() -> Callable[[], None] | None:
    """What a child calls before it begins, so that it gets SIGTERM, and saves, when this process is killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded here: a forked child had better not

    def before_start() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return before_start


def wait_for_lock(folder: Path, say: Callable[[str], None]) -> None:
    """Wait for what outlived an earlier call to save and give up its output folder."""
    if fcntl is None:
        return
    began, told = time.monotonic(), False
    while time.monotonic() - began < WAITING:
        with contextlib.suppress(FileNotFoundError), open(folder / ".lock", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    told = True
                    say(f"{folder}: waiting for a process of an earlier call to save and end")
                time.sleep(POOL_POLL)
                continue
            except OSError:  # a drive without flock
                return
        return


def last_words(log: Path, most: int = 300) -> str:
    """Why a script ended, by what it said: its error, or else its last line."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
        lines = file.read().decode(**TEXT).replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    lines = lines[max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=-1) + 1 :]  # this attempt's
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = (errors or lines or ["it said nothing"])[-1]
    return said if len(said) <= most else said[:most] + "..."


def format_seconds(seconds: float) -> str:
    """A duration as one says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
