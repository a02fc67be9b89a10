"""Files that vanish or break, storage that hangs and workers that die while main_dino.py trains."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_main_dino import TINY, command, run_main, smaller_model, traceback_through_our_code  # noqa: F401
from torch.utils.data import DataLoader

import main_dino
import main_lnc_luna16
import main_lts_msd
from dino3d import command_line
from dino3d.command_line import UserError
from dino3d.data.pretraining import Batch, BatchStream
from dino3d.data.read_watchdog import in_time
from dino3d.files import read_log
from dino3d.finetune.crops import EvaluationCrops, collate_crops
from dino3d.finetune.runtime import Runtime
from dino3d.training.monitor import BadFiles
from utils import Processes


@pytest.fixture
def copies(volumes, tmp_path):
    """Paths of eight volumes that a test may break."""
    shutil.copytree(volumes, tmp_path / "data")
    return sorted((tmp_path / "data").rglob("*.hdf5"))


def flags_of(copies, out, *more):
    return ["--data_dir", copies[0].parents[2], "--output_dir", out, "--batch_size_per_gpu", 2, *more]


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def without_progress(text):
    lines = re.split(r"[\r\n]", text)
    return [
        line[line.find("error: ") :] if "error: " in line else line
        for line in lines
        if line.strip() and ("error: " in line or "step/s" not in line and "s/step" not in line)
    ]


def living(marker):
    """Processes whose command line has this in it."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if os.fsencode(marker) in file.read():
                    found.append(int(pid))
        except OSError:
            continue
    return found


def all_gone(marker, seconds):
    end = time.monotonic() + seconds
    while living(marker) and time.monotonic() < end:
        time.sleep(0.1)
    return not living(marker)


# -------------------------------------------------------------------------------------------------- unreadable files


def test_bad_files_are_listed_by_epoch_and_tried_again(copies, tmp_path, capsys, monkeypatch):
    """One file is broken in epoch 1 and whole from then on, another vanishes between epochs 1 and 2."""
    broken, vanishing = copies[3], copies[5]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:3000])
    tell = BadFiles.report

    def tell_and_change(bad_files, say):
        tell(bad_files, say)
        if bad_files.epoch == 1:
            broken.write_bytes(whole)
            vanishing.unlink()

    monkeypatch.setattr(BadFiles, "report", tell_and_change)
    monkeypatch.setattr(main_dino, "cache_bytes", lambda *_: 0)  # one that stays in memory does not vanish
    out = tmp_path / "out"
    code, _, errors = run_main(capsys, *flags_of(copies, out, "--epochs", 2))
    assert code == 0 and len(errors) == 2, errors
    for number, (error, path) in enumerate(zip(errors, (broken, vanishing)), 1):
        assert error.startswith(f"epoch {number}: 1 unreadable files") and f"such as {path}: can't be read" in error
        assert str(out / "bad_files.csv") in error
    header, *rows = read_rows(out / "bad_files.csv")
    assert header == ["path", "reason", "first_epoch"]
    assert [(row[0], row[2]) for row in rows] == [(str(broken), "1"), (str(vanishing), "2")]
    assert "truncated" in rows[0][1] and "no such file" in rows[1][1]
    assert [record["bad_files"] for record in read_log(out / "log.txt")] == [1, 1]
    assert not list(out.glob("*.part"))
    vanishing.write_bytes(whole)  # a file that is bad again keeps its row
    broken.unlink()
    assert run_main(capsys, *flags_of(copies, out, "--epochs", 3))[0] == 0
    assert read_log(out / "log.txt")[-1]["bad_files"] == 1 and read_rows(out / "bad_files.csv") == [header, *rows]


@pytest.mark.parametrize(
    "share, says",
    [
        ("0.1", "2 of 8 volumes (25%) are unreadable in epoch 1, --max_bad_files allows 1"),
        ("0", "1 of 8 volumes (12%) are unreadable in epoch 1, --max_bad_files allows 0"),
        ("0.25", None),
    ],
)
def test_too_many_bad_files_stop_the_run(share, says, copies, tmp_path, capsys):
    for path in copies[2], copies[6]:
        path.write_bytes(b"")
    code, _, errors = run_main(capsys, *flags_of(copies, tmp_path / "out", "--epochs", 1, "--max_bad_files", share))
    if says is None:
        assert code == 0 and errors[0].startswith("epoch 1: 2 unreadable files")
        return
    assert code == 1 and len(errors) == 1, errors
    assert errors[0].startswith("error: " + says) and "scan.hdf5: can't be read" in errors[0]
    assert str(tmp_path / "out" / "bad_files.csv") in errors[0] and "raise --max_bad_files" in errors[0]
    assert len(read_rows(tmp_path / "out" / "bad_files.csv")) == 1 + int(says[0])
    assert not (tmp_path / "out" / "log.txt").exists()


class ThreeRanks(Processes):
    """This rank among three; the others' answers are given."""

    def sum(self, tensor):
        return tensor + 1

    def all_gather(self, value):
        return [value, {"b": "NaN", "c": "empty"}, {"b": "NaN"}]


def test_ranks_count_each_bad_file_once(tmp_path):
    def batch(fatal, *bad):
        return Batch(torch.empty(0), [], [(file, "cut off") for file in bad], fatal)

    def bad_files(most, processes):
        one = BadFiles(tmp_path / "bad.csv", processes, 30, most)
        one.start_epoch(4)
        return one

    bad = bad_files(3, ThreeRanks(world_size=3))
    bad.record(batch("", "a", "b"))
    bad.gather()
    assert bad.reasons == {"a": "cut off", "b": "NaN", "c": "empty"} and not bad.path.exists()
    bad.record(batch("", "d"))
    says = r"^4 of 30 volumes \(13%\).* in epoch 4, --max_bad_files allows 3, such as a: cut off"
    with pytest.raises(UserError, match=says) as error:
        bad.gather()
    assert error.value.everywhere and [row[0] for row in read_rows(bad.path)] == ["path", "a", "b", "c", "d"]
    bad.start_epoch(5)
    assert bad.reasons == {}
    alone = bad_files(1, Processes())
    alone.record(batch("", "e", "f"))  # told where all ranks meet
    with pytest.raises(UserError, match="^3 of 30 volumes") as error:
        alone.record(batch("why", "g"))
    assert not error.value.everywhere and [row[0] for row in read_rows(bad.path)][1:] == list("abcdefg")


def test_all_ranks_stop_for_what_they_met_together(copies, tmp_path):
    """Each of two ranks meets one bad file: one too many, which neither knows by itself."""
    streams = [
        [sample for step in BatchStream(8, 1, 2, rank, 2, 0, 0, 0, 1) for _, sample in step] for rank in range(2)
    ]
    first, second = next((a, b) for a in streams[0] for b in streams[1] if abs(a - b) not in (1, 7))
    for number in first, second:
        copies[number].write_bytes(b"")
    result = command(*flags_of(copies, tmp_path / "out", "--epochs", 1), processes=2)
    assert result.returncode == 1 and not traceback_through_our_code(result.stderr)
    errors = [line for line in without_progress(result.stderr) if line.startswith("error: ")]
    assert sum("2 of 8 volumes (25%) are unreadable in epoch 1" in error for error in errors) == 1, errors
    assert sum("rank 1 stops as rank 0 does" in error for error in errors) == 1, errors
    assert {row[0] for row in read_rows(tmp_path / "out" / "bad_files.csv")[1:]} == {
        str(copies[first]),
        str(copies[second]),
    }


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b'path,reason\n"', b"x" * 200_000])
def test_a_damaged_list_of_bad_files_is_written_anew(damage, tmp_path):
    (tmp_path / "bad.csv").write_bytes(damage)
    bad = BadFiles(tmp_path / "bad.csv", Processes(), 9, 9)
    bad.start_epoch(1)
    bad.reasons["a\udcff"] = "cut off"  # a name that is no UTF-8
    bad.report(lambda line: None)
    assert b"a\xff,cut off,1\n" in (tmp_path / "bad.csv").read_bytes()


# ----------------------------------------------------------------------------------------------- hangs, dead workers


def start(copies, out, *more):
    words = [sys.executable, ROOT / "main_dino.py", *TINY, *flags_of(copies, out, *more)]
    return subprocess.Popen(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_run_whose_storage_hangs_ends_and_names_the_file(copies, tmp_path):
    os.unlink(copies[4])
    os.mkfifo(copies[4])  # opened without end, as nobody writes to it
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in copies))  # a search passes pipes over
    flags = ["--epochs", 50, "--num_workers", 2, "--read_timeout", 3, "--data_list", tmp_path / "list.txt"]
    process = start(copies, tmp_path / "out", *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = [line for line in without_progress(errors) if line.startswith("error: ")]
    assert re.match(rf"error: {re.escape(str(copies[4]))}: loader worker [01] has been reading it for 3 s: ", line), (
        errors
    )
    assert "Traceback" not in errors and all_gone(str(tmp_path / "out"), 10)


@pytest.mark.parametrize("foreground", ["none", "lung"])
def test_a_look_at_storage_that_hangs_is_given_up(foreground, copies, tmp_path):
    """Before training, in whatever process: where HDF5 waits, no thread of it runs."""
    pipe = tmp_path / "pipe.hdf5"
    os.mkfifo(pipe)
    began = time.monotonic()
    (line,) = main_dino.look_at_data([str(copies[0]), str(pipe)], foreground, 0.5)
    assert line.startswith("note: a look at some of the volumes was given up after 0.5 s")
    assert time.monotonic() - began < 30  # and not without end
    os.unlink(pipe)
    found = main_dino.look_at_data([str(copies[0])], foreground, 60)
    assert any("no stored occupancy" in line for line in found) == (foreground == "lung")


def test_a_look_that_fails_gives_nothing():
    assert in_time(lambda: 1 / 0, 30) is None
    assert in_time(lambda: ["\udce9 and more"] * 30000, 30) == ["\udce9 and more"] * 30000


def test_downstream_loaders_are_watched(tmp_path, monkeypatch):
    pipe, messages = tmp_path / "crop.hdf5", []
    os.mkfifo(pipe)

    def end(message):
        messages.append(message)
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # lets the reader go on

    monkeypatch.setattr(command_line, "end_process", end)
    runtime = Runtime(Processes(), torch.float32, 1, 1, read_timeout=1.0)
    dataset = EvaluationCrops([str(pipe)], (4, 4, 4))
    (batch,) = runtime.batches_of(DataLoader(dataset, 1, sampler=[0], collate_fn=collate_crops, num_workers=1))
    assert messages[0].startswith(f"{pipe}: loader worker 0 has been reading it for 1 s") and str(pipe) in batch.fatal
    assert main_lnc_luna16.get_args_parser().parse_args([]).read_timeout == 600
    assert main_lts_msd.get_args_parser().parse_args([]).read_timeout == 600


def test_a_killed_worker_ends_the_run(copies, tmp_path):
    process = start(copies, tmp_path / "out", "--epochs", 5000, "--num_workers", 2)
    while not (tmp_path / "out" / "log.txt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        workers = [int(pid) for pid in file.read().split()]
    workers = [pid for pid in workers if pid in living(str(tmp_path / "out"))]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - killed < 30 and process.returncode == 1
    lines = [line for line in without_progress(errors) if line.startswith("error: ")]
    assert len(lines) == 1 and "a reading process died" in lines[0] and str(workers[1]) in lines[0], errors
    assert "Traceback" not in errors and all_gone(str(tmp_path / "out"), 10)
