"""One run per output folder: on this machine by flock, on others by signs of life; and nothing outlives a holder."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from dino3d import run_lock
from dino3d.command_line import UserError
from dino3d.run_lock import RunLock, own_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("BEAT", 0.1), ("SILENCE", 1.5), ("NOTICE", 0.5), ("SETTLING", 0.2)):
        monkeypatch.setattr(run_lock, name, seconds)


HOLD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dino3d import run_lock
run_lock.BEAT = float(sys.argv[3])
with run_lock.own_folder(Path(sys.argv[2])):
    if sys.argv[4] == "fork":
        if not os.fork():
            time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder, beat=0.1, fork=""):
    """Another process that holds a folder; ended at last with all that it forked."""
    words = [sys.executable, "-c", HOLD, str(ROOT), str(folder), str(beat), fork]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def record(**changed):
    """What the holder on another machine writes."""
    return json.dumps({"host": "far", "process": 7, "started": "then", "boot": "b", "id": "x"} | changed)


def content(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")] if path.name != run_lock.NAME}


def without_flock(monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)


def test_a_second_run_is_refused_in_one_line_and_changes_nothing(tmp_path):
    with holder(tmp_path) as process:
        (tmp_path / "checkpoint.pth").touch()
        before = content(tmp_path)
        with pytest.raises(UserError, match="^[^\n]*$") as error:
            with own_folder(tmp_path):
                pass
        assert f"process {process.pid} on " in str(error.value) and str(tmp_path) in str(error.value)
        assert content(tmp_path) == before and process.poll() is None
        assert json.loads((tmp_path / ".lock").read_text())["process"] == process.pid


@pytest.mark.parametrize("flock", [True, False])
def test_a_killed_holder_is_replaced_at_once(tmp_path, monkeypatch, flock):
    """Though what it forked lives on; on this machine also where there is no flock."""
    if not flock:
        without_flock(monkeypatch)
    with holder(tmp_path, fork="fork") as process:
        process.kill()
        process.wait()
        monkeypatch.setattr(run_lock, "SILENCE", 1000)
        with own_folder(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_what_is_forked_does_not_keep_the_lock(tmp_path):
    """As loaders' reading processes are; and the holder keeps it when they are gone."""
    ready = multiprocessing.get_context("fork").Event()
    with own_folder(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=ready.wait, daemon=True)
        child.start()
        with pytest.raises(UserError, match="another run"):
            RunLock(tmp_path, "--output_dir")
    RunLock(tmp_path, "--output_dir").release()
    assert child.is_alive()
    ready.set()
    child.join()


@pytest.mark.parametrize("flock", [True, False])
def test_a_holder_on_another_machine_gives_signs_of_life(tmp_path, monkeypatch, flock):
    """Where flock is not seen by other machines, or not there at all."""
    if not flock:
        without_flock(monkeypatch)
    (tmp_path / ".lock").write_text(record())
    stop = threading.Event()

    def live():
        for beat in range(100):
            if stop.wait(0.1):
                return
            (tmp_path / ".lock").write_text(record(sign_of_life=beat))

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(UserError, match="process 7 on far, since then"):
        RunLock(tmp_path, "--output_dir")
    stop.set()
    thread.join()


@pytest.mark.parametrize("flock", [True, False])
def test_a_silent_holder_on_another_machine_is_waited_for_and_then_replaced(tmp_path, capfd, monkeypatch, flock):
    if not flock:
        without_flock(monkeypatch)
    (tmp_path / ".lock").write_text(record())
    began = time.monotonic()
    with own_folder(tmp_path):
        assert time.monotonic() - began > run_lock.SILENCE
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and str(tmp_path) in told[0] and "no sign of life" in told[0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", '{"host": "fa', "[1]", "\0" * 400])
def test_what_a_crash_left_of_a_lock_holds_nobody_up(tmp_path, monkeypatch, text):
    monkeypatch.setattr(run_lock, "SILENCE", 1000)
    (tmp_path / ".lock").write_text(text)
    with own_folder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_a_silent_holder_whose_process_is_there_is_waited_for_and_then_refused(tmp_path, capfd):
    """Stopped, or busy in a library that lets no thread run."""
    with holder(tmp_path, beat=100) as process:
        with pytest.raises(UserError, match=rf"no sign of life for 2 s; end it .* remove {tmp_path}/.lock"):
            RunLock(tmp_path, "--output_dir")
        assert "waiting up to" in capfd.readouterr().err
        assert process.poll() is None


def test_a_holder_that_ends_meanwhile_is_waited_for(tmp_path):
    with holder(tmp_path, beat=100) as process:
        threading.Timer(0.5, process.kill).start()
        with own_folder(tmp_path):
            assert process.wait() == -signal.SIGKILL


def test_a_holder_that_lost_its_lock_ends(tmp_path, monkeypatch):
    told, heard = [], threading.Event()
    monkeypatch.setattr(run_lock, "end_process", lambda message: told.append(message) or heard.set())
    lock = RunLock(tmp_path, "--output_dir")
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text(record())
    assert heard.wait(10) and "process 7 on far" in told[0]
    lock.release()
    assert (tmp_path / ".lock").read_text() == record()  # which is not its own


@pytest.mark.parametrize("flock", [True, False])
def test_of_many_that_start_at_once_one_runs(tmp_path, monkeypatch, flock):
    monkeypatch.setattr(run_lock, "end_process", lambda message: pytest.fail(message))
    monkeypatch.setattr(run_lock, "SETTLING", 1.0)
    if not flock:
        without_flock(monkeypatch)
    locks, refused = [], []

    def begin():
        try:
            locks.append(RunLock(tmp_path, "--output_dir"))
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(locks), len(refused)) == (1, 7)
    locks[0].release()


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_start_leaves_no_folder_that_it_made(tmp_path, there):
    folder = tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), own_folder(folder, remove=("list.txt", "events.*")):
        (folder / "cache" / "1x1x1").mkdir(parents=True)
        (folder / "tensorboard" / "0").mkdir(parents=True)
        (folder / "tensorboard" / "0" / "events.123").touch()
        (folder / "list.txt").touch()
        raise KeyboardInterrupt
    assert folder.exists() == there and not (folder / ".lock").exists()
    assert there or os.listdir(tmp_path) == []


def test_a_failure_leaves_what_was_made(tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(KeyboardInterrupt), own_folder(folder, remove=("list.txt",)):
        (folder / "list.txt").touch()
        (folder / "copy.hdf5").touch()
        raise KeyboardInterrupt
    assert sorted(os.listdir(folder)) == ["copy.hdf5", "list.txt"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"--output_dir {path}: can't be written to"):
            with own_folder(path):
                pass


def test_a_full_disk_that_names_no_file_is_told_with_the_folder(tmp_path):
    with pytest.raises(
        UserError, match=f"^--output_dir {tmp_path}: can't be written to .No space left on device.; make"
    ):
        with own_folder(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="other"), own_folder(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "other")
    assert os.listdir(tmp_path) == []
