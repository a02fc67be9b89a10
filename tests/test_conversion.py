"""conversion.py: killed anywhere and resumed, the same for any number of workers, dying workers, full disks."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import ROOT
from raw_inputs import (  # noqa: F401
    call,
    contents,
    manifest,
    outcomes,
    run,
    scan,
    times,
    without_processes,
    write_decathlon,
    write_image,
    write_luna16,
    write_nifti,
    write_series,
    write_table,
    written,
)

from dino3d import run_lock
from dino3d.command_line import UserError
from dino3d.data import parallel
from dino3d.data.conventions import DataError, LeftOut
from dino3d.data.parallel import in_processes
from dino3d.data.volume import Volume
from dino3d.files import read_table
from dino3d.prepare import conversion
from dino3d.prepare.conversion import Job, Output, convert_all, open_output

WAIT = 120  # seconds until a process that hangs fails its test


def start(folder, *flags):
    """prepare_data.py as users start it, in a session of its own; what it prints goes to files in the folder."""
    with open(folder / "out.txt", "w") as out, open(folder / "err.txt", "w") as err:
        return subprocess.Popen(
            [sys.executable, ROOT / "prepare_data.py", *map(str, flags)],
            stdout=out,
            stderr=err,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def errors(folder):
    """Lines of standard error of what `start` started, but for what Python's own helper says of a killed process."""
    lines = (folder / "err.txt").read_text().splitlines()
    return [line for line in lines if "resource_tracker" not in line and "warnings.warn(" not in line]


def of_session(session):
    """Ids of the processes of a session that live."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, _, its_session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(entry))
    return found


def until(what, *arguments):
    """Wait for what(*arguments) to be true; the seconds that this took."""
    began = time.monotonic()
    while not what(*arguments):
        assert time.monotonic() < began + WAIT, f"waited for {what} in vain"
        time.sleep(0.003)
    return time.monotonic() - began


# -------------------------------------------------------------------------------------------- killed at random moments


class Case(NamedTuple):
    """A conversion and what an undisturbed run makes of it; folder: for what the runs print."""

    flags: list
    folder: Path
    reference: dict

    def start(self, output, workers):
        return start(self.folder, *self.flags, "--output", output, "--workers", workers)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{command: Case} of 12 conversions each, most of volumes of 100 x 100 x 100 voxels."""
    folder, size = tmp_path_factory.mktemp("cases"), {"seeds": 1, "shape": (100, 100, 100), "spacing": (3.0, 3.0, 3.0)}
    inputs = {name: folder / name / "input" for name in ("nlst", "luna16", "msd")}
    for i in range(10):
        write_image(inputs["nlst"] / f"p{i}" / "t1" / "scan.mha", scan(0, size["shape"], size["spacing"]))
    for series in ("1.2.3.1", "1.2.3.2"):  # two in one folder
        write_series(inputs["nlst"] / "dicom", series=series, prefix=series)
    write_luna16(inputs["luna16"], {f"1.2.{i}": f"subset{i % 4}" for i in range(12)}, **size)
    write_decathlon(inputs["msd"], [f"case{i}" for i in range(12)], **size)
    more = {"nlst": [], "luna16": ["--size", 64, 64, 48, "--spacing", 2, 2, 3], "msd": ["--spacing", 2.5, 2.5, 2.5]}

    cases = {name: Case([name, "--input", inputs[name], *more[name]], folder / name, {}) for name in inputs}
    with pytest.MonkeyPatch.context() as patch:
        without_processes(patch)
        for name, case in cases.items():
            assert call(None, *case.flags, "--output", case.folder / "undisturbed").code == 0
    return {name: case._replace(reference=contents(case.folder / "undisturbed")) for name, case in cases.items()}


def files_in(output):
    """Number of files that stand under their final names."""
    hidden = (conversion.WORK, run_lock.NAME)
    return sum(
        name not in hidden for here, _, names in os.walk(output) if conversion.WORK not in here for name in names
    )


def assert_whole(output, reference):
    """Each file that stands under a final name is byte by byte that of an undisturbed run."""
    found = contents(output)
    assert not found.keys() - reference.keys()
    assert [name for name in found if found[name] != reference[name]] == []


def test_killed_at_ten_random_moments_and_started_again(cases, tmp_path):
    """SIGKILL of the main process alone, or with its workers: nothing half is left, and in the end nothing differs."""
    record = []

    def chain(name, seed, kills):
        case, output, draw = cases[name], tmp_path / name, random.Random(seed)
        total = len(case.reference)
        # The first falls before the first file: anywhere while processes start. The others, at so many files or more
        for i, least in enumerate([1, *sorted(draw.sample(range(2, total * 3 // 4), kills - 1))]):
            whole, pause = bool((i + seed) % 2), draw.uniform(0, 0.5 if i == 0 else 0.1)
            began = time.monotonic()
            process = case.start(output, workers=draw.choice([1, 2]))
            until(
                lambda: process.poll() is not None or (output / conversion.WORK).exists() and files_in(output) >= least
            )
            time.sleep(pause)
            running, unfinished = process.poll() is None, (output / conversion.WORK).is_dir()
            (os.killpg if whole else os.kill)(process.pid, signal.SIGKILL)
            moment = time.monotonic() - began
            killed = process.wait(WAIT) == -signal.SIGKILL
            outlived = until(lambda: not of_session(process.pid))
            unfinished &= (output / conversion.WORK).is_dir()  # the last that goes, at the end of a run
            record.append(
                (
                    name,
                    f"{moment:.2f} s",
                    f"{files_in(output)} of {total} files",
                    "all" if whole else "main alone",
                    f"workers gone after {outlived:.2f} s",
                )
            )
            assert running and unfinished and killed, f"not inside the run: {record[-1]}"
            assert outlived < 10, record[-1]  # a second, where the machine has one to spare
            assert_whole(output, case.reference)
        assert case.start(output, workers=2).wait(WAIT) == 0
        assert errors(case.folder) == []
        assert contents(output) == case.reference
        assert not (output / conversion.WORK).exists()

    with ThreadPoolExecutor() as threads:
        ends = [threads.submit(chain, *what) for what in (("nlst", 0, 3), ("luna16", 1, 4), ("msd", 2, 3))]
        for end in ends:
            end.result()
    print(*record, sep="\n")
    assert len(record) == 10


def test_interrupted_and_terminated_in_one_line(cases, tmp_path, run):
    """Ctrl-C reaches all processes of a terminal, a batch system's SIGTERM the first; while workers start, or work."""
    case = cases["msd"]

    def end(number, all_of_them, least):
        folder = tmp_path / f"{number}{least}"
        folder.mkdir()
        process = start(folder, *case.flags, "--output", folder / "output", "--workers", 1)
        until(lambda: (folder / "output" / conversion.WORK).exists() and files_in(folder / "output") >= least)
        time.sleep(0.5)
        assert process.poll() is None
        (os.killpg if all_of_them else os.kill)(process.pid, number)
        code = process.wait(WAIT)
        until(lambda: not of_session(process.pid))
        assert_whole(folder / "output", case.reference)
        return code, errors(folder)

    with ThreadPoolExecutor() as threads:
        at_start = threads.submit(end, signal.SIGINT, True, 1)
        at_work = threads.submit(end, signal.SIGINT, True, 3)
        terminated = threads.submit(end, signal.SIGTERM, False, 4)
        assert at_start.result() == (130, ["error: interrupted"])
        assert at_work.result() == (130, ["error: interrupted"])
        assert terminated.result() == (-signal.SIGTERM, [])
    output = tmp_path / f"{signal.SIGTERM}4" / "output"
    before = times(output)
    assert run(*case.flags, "--output", output).code == 0
    assert contents(output) == case.reference
    after = times(output)
    again = [name for name, time in before.items() if not name.startswith(conversion.WORK) and after[name] != time]
    assert len(again) <= 2 < len(before), again  # image and label of a case that was finished and not yet noted, if any


# ------------------------------------------------------------------------------ killed at every step on the file system


STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def in_fork(function, *arguments):
    """Call a function in a copy of this process; its exit status as os.waitpid tells it, and 1 if it raised."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        code = function(*arguments) or 0
    finally:
        os._exit(code)


def killed_at(step, folder, function):
    """Whether a function, called in a copy of this process, was killed at its n-th step on files below a folder.

    Writing a file takes two: one before it is opened, one with half of something in it.
    """

    def child():
        left = step

        def watch(event, arguments):
            nonlocal left
            if event not in STEPS or not isinstance(arguments[0], (str, os.PathLike)):
                return
            path = os.fspath(arguments[0])
            if not path.startswith(str(folder)) and os.path.isabs(path):  # shutil.rmtree goes by relative ones
                return
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if 0 <= left <= bool(writes):
                if left:
                    left = -1
                    os.write(os.open(path, arguments[2], 0o666), b'[{"half')
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1 + bool(writes)

        sys.addaudithook(watch)
        function()

    status = in_fork(child)
    assert status in (0, signal.SIGKILL)
    return status != 0


def small_inputs(folder):
    """{command: flags} of small inputs: two volumes, a series, two scans with points, two cases."""
    for i in range(2):
        write_image(folder / "nlst" / f"p{i}" / "scan.nii.gz", scan(i))
    write_series(folder / "nlst" / "dicom", n=16)
    write_luna16(folder / "luna16", {"1.2.1": "subset0", "1.2.2": "subset1"}, positives=1, negatives=1)
    write_decathlon(folder / "msd", ["a", "b"])
    flags = {"luna16": ["--size", 16, 16, 8, "--spacing", 8, 8, 14]}
    return {name: [name, "--input", folder / name, *flags.get(name, [])] for name in ("nlst", "luna16", "msd")}


def change(folder, command):
    """Replace an input, remove one and break one: what a rerun has to take in."""
    if command == "nlst":
        write_image(folder / "nlst" / "p0" / "scan.nii.gz", scan(2))
        shutil.rmtree(folder / "nlst" / "p1")
        (folder / "nlst" / "dicom" / "07.dcm").unlink()
    elif command == "msd":
        shutil.copy(folder / "msd" / "imagesTr" / "b.nii.gz", folder / "msd" / "imagesTr" / "a.nii.gz")
        (folder / "msd" / "labelsTr" / "b.nii.gz").unlink()
    else:
        lines = (folder / "luna16" / "candidates_V2.csv").read_text().splitlines()
        (folder / "luna16" / "candidates_V2.csv").write_text("\n".join([lines[0], *lines[2:]]) + "\n")
        (folder / "luna16" / "subset1" / "1.2.2.raw").write_bytes(b"")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("command", ["nlst", "luna16", "msd"])
def test_killed_at_any_step_and_started_again(command, tmp_path, run):
    """Every step of a first run, and of one that takes in changed inputs: each kill leaves whole files only, of the
    first run or the second, and the next run ends as if there had been none."""
    flags = small_inputs(tmp_path)[command]
    first, second, output = tmp_path / "first", tmp_path / "second", tmp_path / "output"

    def convert_to(folder):
        return lambda: run(*flags, "--output", folder).code

    def sweep(earlier, reference, code, least):
        for step in range(1000):
            if earlier:
                shutil.copytree(earlier, output)
            killed = killed_at(step, output, convert_to(output))
            for name, content in contents(output).items() if output.exists() else ():
                assert content in (reference.get(name), (before or {}).get(name)), (step, name)
            assert run(*flags, "--output", output).code == code
            assert contents(output) == reference, step
            assert not (output / conversion.WORK).exists()
            shutil.rmtree(output)
            if not killed:
                break
        assert step > least

    before = None
    assert run(*flags, "--output", first).code == 0
    before = contents(first)
    sweep(None, before, 0, least=15)
    shutil.copytree(first, second)
    change(tmp_path, command)
    code = run(*flags, "--output", second).code
    assert contents(second) != before
    sweep(first, contents(second), code, least=10)


# ------------------------------------------------------------------------------------------------- workers, and reruns


@pytest.fixture
def forked(monkeypatch):
    """Worker processes as copies of this one, which start in no time; that they may be new ones is tested above."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs os.fork")
    monkeypatch.setattr(parallel, "get_context", lambda _: multiprocessing.get_context("fork"))


@pytest.mark.parametrize("command", ["nlst", "luna16", "msd"])
def test_the_result_does_not_depend_on_the_number_of_workers(command, cases, tmp_path, forked, capsys):
    """Small inputs with bad ones among them, by 1, 2, 3 and 7 workers; large ones by none and by one."""
    flags = small_inputs(tmp_path)[command]
    change(tmp_path, command)
    found = []
    for workers in (1, 2, 3, 7):
        result = call(capsys, *flags, "--output", tmp_path / str(workers), "--workers", workers)
        found.append((contents(tmp_path / str(workers)), result.code))
    assert found[0][0] and found == found[:1] * 4
    assert call(capsys, *cases[command].flags, "--output", tmp_path / "large", "--workers", 1).code == 0
    assert contents(tmp_path / "large") == cases[command].reference


@pytest.mark.parametrize("command", ["nlst", "luna16", "msd"])
def test_a_rerun_writes_nothing(command, tmp_path, run):
    flags = small_inputs(tmp_path)[command]
    inputs = times(tmp_path / command)
    first = run(*flags, "--output", tmp_path / "output")
    assert (first.code, first.errors) == (0, [])
    before = times(tmp_path / "output")
    again = run(*flags, "--output", tmp_path / "output")
    assert (again.code, again.errors) == (0, [])
    assert times(tmp_path / "output") == before
    number = len(written(tmp_path / "output"))
    assert f"{number} files of" in first.out and ", 0 of them from before; 0 inputs left out, 0 failed" in first.out
    assert f"{number} files of" in again.out and f", {number} of them from before" in again.out
    assert times(tmp_path / command) == inputs


def rewritten(output, before):
    """Names of files that are new or were written again, but for the manifest and the indexes beside them."""
    changed = {name for name, time in times(output).items() if before.get(name) != time} - {conversion.MANIFEST}
    return {name for name in changed if not Path(name).name.startswith(".")}


def test_only_what_changed_is_done_again(tmp_path, run):
    flags = [*small_inputs(tmp_path)["nlst"], "--output", tmp_path / "output"]
    source, output = tmp_path / "nlst", tmp_path / "output"
    scans = {"p0": "p0/t0/scan.hdf5", "p1": "p1/t0/scan.hdf5", "dicom": "P1/t0/1.2.3.1.hdf5"}
    run(*flags)
    assert written(output) == sorted(scans.values())

    def redone(code=0):
        before = times(output)
        assert run(*flags).code == code
        return rewritten(output, before)

    os.utime(source / "p0" / "scan.nii.gz")
    assert redone() == {scans["p0"]}
    write_image(source / "p1" / "scan.nii.gz", scan(5))
    assert redone() == {scans["p1"]}
    (source / "dicom" / "03.dcm").touch()
    assert redone() == {scans["dicom"]}
    (output / scans["p1"]).unlink()
    assert redone() == {scans["p1"]}
    (output / scans["p0"]).write_bytes((output / scans["p0"]).read_bytes()[:-1])
    assert redone() == {scans["p0"]}
    (source / "dicom" / "notes.txt").write_text("no DICOM file")
    assert redone() == set()
    write_image(source / "p2" / "scan.nii.gz", scan(6))
    assert redone() == {"p2/t0/scan.hdf5"}
    write_series(source / "later", series="1.2.3.9", study="1.2.4", date="19991231")  # comes before what was t0
    assert redone() == {"P1/t0/1.2.3.9.hdf5", "P1/t1/1.2.3.1.hdf5"}
    assert sorted(set(contents(output)) & {"P1/t0/1.2.3.1.hdf5", "P1/t1/1.2.3.1.hdf5"}) == ["P1/t1/1.2.3.1.hdf5"]
    assert redone() == set()


def test_files_of_inputs_that_are_gone_or_broken_stay_with_a_note(tmp_path, run):
    flags = [*small_inputs(tmp_path)["nlst"], "--output", tmp_path / "output"]
    source, output = tmp_path / "nlst", tmp_path / "output"
    run(*flags)
    before, row = times(output), manifest(output)["p1/scan.nii.gz"]
    shutil.rmtree(source / "p1")
    result = run(*flags)
    assert result.code == 0 and "note: 1 files from earlier runs stay" in result.out
    assert "such as p1/t0/scan.hdf5" in result.out
    assert rewritten(output, before) == set() and manifest(output)["p1/scan.nii.gz"] == row
    again = run(*flags)
    assert again.out == result.out and manifest(output)["p1/scan.nii.gz"] == row

    (source / "p0" / "scan.nii.gz").write_bytes(b"")
    result = run(*flags)
    assert result.code == 1 and "note: 2 files from earlier runs stay" in result.out
    assert rewritten(output, before) == set() and "p0/t0/scan.hdf5" in contents(output)
    write_image(source / "p0" / "scan.nii.gz", scan(0))
    assert run(*flags).code == 0
    assert rewritten(output, before) == {"p0/t0/scan.hdf5"}
    assert outcomes(output)["p0/scan.nii.gz"] == ("written", "")


def test_a_file_whose_input_is_left_out_now_is_removed(tmp_path, run):
    """And counted, with the reason."""
    flags = [*small_inputs(tmp_path)["nlst"], "--output", tmp_path / "output"]
    run(*flags)
    write_image(tmp_path / "nlst" / "p1" / "scan.nii.gz", sitk.Cast(scan(1) > 0, sitk.sitkInt16))
    result = run(*flags)
    assert result.code == 0
    assert [name for name in written(tmp_path / "output") if name.startswith("p")] == ["p0/t0/scan.hdf5"]
    status, reason = outcomes(tmp_path / "output")["p1/scan.nii.gz"]
    assert status == "left out"
    assert f"note: 1 files of earlier runs removed, such as p1/t0/scan.hdf5: left out now ({reason})\n" in result.out
    assert "removed" not in run(*flags).out


@pytest.mark.parametrize(
    "lost, reason",
    [
        ([7], "missing slices"),
        (range(1, 14), "too few slices"),
        (range(17, 20), "missing slices"),  # at one end: what is left is an even stack
        (range(3), "missing slices"),
        ([0, 19], "missing slices"),
    ],
)
def test_a_file_whose_series_has_lost_slices_stays(tmp_path, run, lost, reason):
    """As that of a series that is gone; with the slices back it is as if nothing had been."""
    flags = [*small_inputs(tmp_path)["nlst"], "--output", tmp_path / "output"]
    write_series(tmp_path / "nlst" / "dicom", n=20)
    run(*flags)
    before, stood = contents(tmp_path / "output"), times(tmp_path / "output")
    for number in lost:
        (tmp_path / "nlst" / "dicom" / f"{number:02}.dcm").rename(tmp_path / f"{number:02}")
    for _ in range(2):
        result = run(*flags)
        assert result.code == 0 and f"left out      1  {reason}, such as dicom" in result.out
        assert "note: 1 files from earlier runs stay, of inputs or tables that are not given now" in result.out
        assert "have lost slices" in result.out and "removed" not in result.out
        now = contents(tmp_path / "output")
        assert now.pop(conversion.MANIFEST) != before[conversion.MANIFEST]
        assert now == {name: before[name] for name in now} and len(now) == len(before) - 1
    for number in lost:
        (tmp_path / f"{number:02}").rename(tmp_path / "nlst" / "dicom" / f"{number:02}.dcm")
    assert run(*flags).code == 0 and contents(tmp_path / "output") == before
    after = times(tmp_path / "output")
    assert all(after[name] == stood[name] for name in after if name != conversion.MANIFEST)


@pytest.mark.parametrize("lost", [[10], range(19, 24)])
def test_a_study_keeps_its_file_where_the_series_loses_slices(lost, tmp_path, run):
    """Though another series has more of them now, and would be taken instead of a broken one."""
    source, output = tmp_path / "input", tmp_path / "output"
    write_series(source / "best", series="1.2.3.1", n=24)
    write_series(source / "other", series="1.2.3.2", n=22)
    flags = ["nlst", "--input", source, "--output", output, "--one_per_study"]
    run(*flags)
    before = contents(output)
    for number in lost:
        (source / "best" / f"{number}.dcm").unlink()
    for _ in range(2):
        result = run(*flags)
        assert "1 files from earlier runs stay" in result.out and "removed" not in result.out
        now = contents(output)
        assert now.pop(conversion.MANIFEST) != before[conversion.MANIFEST]
        assert now == {name: content for name, content in before.items() if name != conversion.MANIFEST}
    shutil.rmtree(output / "P1")
    assert run(*flags).code == 0 and written(output) == ["P1/t0/1.2.3.2.hdf5"]


@pytest.mark.parametrize("more", [[], ["--crop_to_body", 4], ["--one_per_study"]])
def test_a_shorter_series_is_taken_once_its_file_is_removed(more, tmp_path, run):
    """Of a study as well, of which no other series takes its place meanwhile."""
    source, output = tmp_path / "input", tmp_path / "output"
    write_series(source / "best", series="1.2.3.1", n=24, thickness=1.0)
    write_series(source / "other", series="1.2.3.2", n=24)
    flags = ["nlst", "--input", source, "--output", output, *more]
    run(*flags)
    first, stood = contents(output), written(output)
    del first[conversion.MANIFEST]
    assert stood == ["P1/t0/1.2.3.1.hdf5", *["P1/t0/1.2.3.2.hdf5"] * ("--one_per_study" not in more)]
    for number in range(18, 24):
        (source / "best" / f"{number}.dcm").unlink()
    assert "left out      1  missing slices, such as best#1.2.3.1" in run(*flags).out
    (reason,) = (row["reason"] for row in read_table(output / conversion.MANIFEST) if "missing" in row["reason"])
    assert reason.endswith("; its file of an earlier run stays until you remove it")
    assert {name: content for name, content in contents(output).items() if name != conversion.MANIFEST} == first
    (output / stood[0]).unlink()
    result = run(*flags)
    assert result.code == 0 and written(output) == stood and "stay" not in result.out
    with Volume(output / stood[0]) as volume:
        assert volume.shape[2] == 18
    after = times(output)
    run(*flags)
    assert times(output) == after


def test_crops_of_a_series_that_has_lost_its_end_stay(tmp_path, run):
    """They would have air where its slices were."""
    source, output = tmp_path / "input", tmp_path / "output"
    write_series(source, n=24)
    header = ["seriesuid", "coordX", "coordY", "coordZ", "class"]
    table = write_table(tmp_path / "t.csv", header, [("1.2.3.1", 0, 0, 40, 1), ("1.2.3.1", 0, 0, 20, 0)])
    flags = ["luna16", "--input", source, "--output", output, "--table", table, "--size", 8, 8, 8]
    run(*flags)
    first, stood = contents(output), written(output)
    del first[conversion.MANIFEST]
    for number in range(21, 24):
        (source / f"{number}.dcm").unlink()
    for _ in range(2):
        result = run(*flags)
        assert "left out      2  missing slices" in result.out and "2 files from earlier runs stay" in result.out
        assert {name: content for name, content in contents(output).items() if name != conversion.MANIFEST} == first
    for name in stood:
        (output / name).unlink()
    assert run(*flags).code == 0 and written(output) == stood
    near, far = (nibabel.load(output / f"subset0/label{label}/P1/t_00000{3 - label}.nii.gz") for label in (0, 1))
    assert (np.asarray(far.dataobj)[..., -1] == -1024).all() and (np.asarray(near.dataobj) > -1024).all()


def test_points_that_a_table_has_no_more_lose_their_crops(tmp_path, run):
    """Rows behind a deleted one move up a line: the last crop of before would stand there twice."""
    source, output = write_luna16(tmp_path / "input", {"1.2.1": "subset0", "1.2.2": "subset0"}), tmp_path / "output"
    header = ["seriesuid", "coordX", "coordY", "coordZ", "class"]
    rows = [(series, 0, 0, z, z % 2) for series in ("1.2.1", "1.2.2") for z in range(4)]
    table, other = write_table(tmp_path / "t.csv", header, rows), write_table(tmp_path / "u.csv", header, rows[:1])
    flags = ["luna16", "--input", source, "--output", output, "--size", 8, 8, 8, "--table"]
    run(*flags, other)
    run(*flags, table)

    def places():
        found = [row for row in manifest(output).values() if "#t:" in row["source"]]
        return sorted((row["source"].split("#")[0], float(row["z"]), int(row["label"])) for row in found)

    def expected():
        return sorted((f"subset0/{row[0]}.mhd", float(row[3]), int(row[4])) for row in rows)

    assert places() == expected() and len(written(output)) == 9
    del rows[2]
    rows[-1] = (*rows[-1][:-1], 0)  # and its label is corrected
    write_table(table, header, rows)
    result = run(*flags, table)
    assert result.code == 0 and places() == expected() and len(written(output)) == 8  # one of them of u.csv
    assert (
        "note: 2 files of earlier runs removed, such as subset0/label1/1.2.1/t_000005.nii.gz: left out now"
        in result.out
    )
    assert "files of earlier runs were made anew, as their inputs or tables have changed, such as subset0" in result.out
    del rows[:3]  # the whole of a scan
    write_table(table, header, rows)
    result = run(*flags, table)
    assert result.code == 0 and places() == expected()
    (source / "subset0" / "1.2.2.mhd").rename(tmp_path / "gone.mhd")
    result = run(*flags, other)
    assert result.code == 0 and len(written(output)) == 5 and "removed" not in result.out


def test_crops_of_luna16s_first_table_give_way_to_the_second(tmp_path, run):
    source, output = write_luna16(tmp_path / "input", {"1.2.1": "subset0"}, negatives=30), tmp_path / "output"
    (source / "candidates_V2.csv").rename(source / "candidates.csv")
    flags = ["luna16", "--input", source, "--output", output, "--size", 8, 8, 8, "--negatives_per_scan", 5]
    run(*flags)
    number = len(written(output))
    (source / "candidates.csv").rename(source / "candidates_V2.csv")
    result = run(*flags)
    assert result.code == 0 and len(written(output)) == number and "stay" not in result.out
    assert f"note: {number} files of earlier runs removed, such as subset0/label" in result.out
    assert all("/candidates_V2_" in name for name in written(output))


def test_files_of_changed_inputs_are_counted(tmp_path, run):
    for command, flags in small_inputs(tmp_path).items():
        output = tmp_path / f"output_{command}"
        assert "made anew" not in run(*flags, "--output", output).out
        assert "made anew" not in run(*flags, "--output", output).out
        changed = sorted((tmp_path / command).rglob("*.nii.gz" if command != "luna16" else "*.mhd"))[0]
        os.utime(changed)
        result = run(*flags, "--output", output)
        assert "files of earlier runs were made anew, as their inputs or tables have changed, such as " in result.out
        assert "made anew" not in run(*flags, "--output", output).out


@pytest.mark.parametrize(
    "command, option",
    [
        ("nlst", ["--min_slices", 17]),
        ("nlst", ["--one_per_study"]),
        ("nlst", ["--crop_to_body", 5]),
        ("nlst", ["--compression", "gzip"]),
        ("luna16", ["--size", 8, 8, 8]),
        ("luna16", ["--seed", 1]),
        ("luna16", ["--negatives_per_scan", 1]),
        ("msd", ["--crop", "label"]),
        ("msd", ["--margin", 3]),
        ("msd", ["--spacing", 5, 5, 5]),
    ],
)
def test_another_option_on_the_same_output_is_refused(command, option, tmp_path, run):
    flags = [*small_inputs(tmp_path)[command], "--output", tmp_path / "output"]
    run(*flags)
    before = times(tmp_path / "output")
    result = run(*flags, *option)
    assert result.code == 1 and len(result.errors) == 1
    assert option[0].strip("-") in result.errors[0] and "give another --output" in result.errors[0]
    after = times(tmp_path / "output")
    assert {name: time for name, time in after.items() if not name.startswith(conversion.WORK)} == before
    assert run(*flags).code == 0
    assert times(tmp_path / "output") == before


def test_another_command_on_the_same_output_is_refused(tmp_path, run):
    flags = small_inputs(tmp_path)
    run(*flags["msd"], "--output", tmp_path / "output")
    result = run(*flags["nlst"], "--output", tmp_path / "output")
    assert result.code == 1 and "command msd, this run has nlst" in result.errors[0]


def test_an_option_may_be_corrected_while_nothing_is_written(tmp_path, run):
    """An attempt that failed, or left everything out before it was killed, does not tie the folder to its options."""
    flags = [*small_inputs(tmp_path)["luna16"], "--output", tmp_path / "output"]
    header = ["seriesuid", "coordX", "coordY", "coordZ", "malignancy"]
    table = write_table(tmp_path / "own.csv", header, [("1.2.1", 0, 0, 0, 3)])
    result = run(*flags, "--table", table, "--label_column", "grade")
    assert result.code == 1 and "has no column grade" in result.errors[0]
    assert run(*flags, "--table", table, "--label_column", "malignancy").code == 0
    assert written(tmp_path / "output") == ["subset0/label3/1.2.1/own_000002.nii.gz"]

    flags = small_inputs(tmp_path)["nlst"]
    assert run(*flags, "--output", tmp_path / "other").code == 0
    with pytest.raises(UserError, match="stopped"):
        with open_output(tmp_path / "output2", {"command": "nlst", "min_slices": 99}) as records:
            for row in manifest(tmp_path / "other").values():
                records.add([{**row, "output": "", "status": "left out", "reason": "too few"}])
            raise UserError("stopped")
    assert run(*flags, "--output", tmp_path / "output2").code == 0
    assert contents(tmp_path / "output2") == contents(tmp_path / "other")


def test_files_of_another_origin_are_not_overwritten(tmp_path, run):
    """A folder that holds files, but not those of an earlier run, is refused."""
    flags = [*small_inputs(tmp_path)["nlst"], "--output", tmp_path / "output"]
    (tmp_path / "output" / "p0" / "t0").mkdir(parents=True)
    (tmp_path / "output" / "p0" / "t0" / "scan.hdf5").write_text("ten years of work")
    result = run(*flags)
    assert result.code == 1 and len(result.errors) == 1
    assert str(tmp_path / "output") in result.errors[0] and "p0" in result.errors[0]
    assert contents(tmp_path / "output") == {"p0/t0/scan.hdf5": b"ten years of work"}
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".DS_Store").touch()
    assert run(*flags[:-1], tmp_path / "hidden").code == 0


@pytest.mark.parametrize("command", ["nlst", "luna16", "msd"])
def test_input_and_output_in_one_another(command, tmp_path, run, monkeypatch):
    flags = small_inputs(tmp_path)[command]
    before = times(tmp_path)
    monkeypatch.chdir(tmp_path)
    os.symlink(tmp_path / command, tmp_path / "link")
    for same in (tmp_path / command, Path(command), tmp_path / "link", tmp_path / "." / "msd" / ".." / command):
        result = run(*flags, "--output", same)
        assert result.code == 2 and len(result.errors) == 1 and "--output" in result.errors[0]
    result = run(*flags, "--output", tmp_path)
    assert result.code == 2 and len(result.errors) == 1 and "--output" in result.errors[0]
    assert {name: time for name, time in times(tmp_path).items() if not name.startswith("link")} == before

    inside = tmp_path / command / "converted"
    assert run(*flags, "--output", inside).code == 0
    found = contents(inside)
    assert run(*flags, "--output", inside).code == 0  # and its own files are no inputs
    assert contents(inside) == found
    assert run(*flags, "--output", tmp_path / "outside").code == 0


def test_a_second_run_at_the_same_time_is_refused(tmp_path, run):
    flags = [*small_inputs(tmp_path)["msd"], "--output", tmp_path / "output"]
    with open_output(tmp_path / "output", {"command": "msd", "spacing": None, "crop": "none", "margin": 20}):
        (tmp_path / "output" / conversion.WORK / ".part.1.nii.gz").write_text("of the first one")
        before = contents(tmp_path / "output")
        result = run(*flags)
        assert result.code == 1 and len(result.errors) == 1
        assert f"--output {tmp_path / 'output'}: another run writes to it" in result.errors[0]
        assert contents(tmp_path / "output") == before
        assert (tmp_path / "output" / conversion.WORK / ".part.1.nii.gz").read_text() == "of the first one"
    assert run(*flags).code == 0


def test_what_a_killed_run_left_unfinished_takes_no_space_of_the_next(tmp_path):
    (tmp_path / conversion.WORK).mkdir()
    (tmp_path / conversion.WORK / ".part.17.hdf5").write_text("half")
    with open_output(tmp_path, {}):
        assert os.listdir(tmp_path / conversion.WORK) == []


# ------------------------------------------------------------------------------------------- workers that die, odd jobs


def die_of(bad, item):
    """A job that kills its process for some items and doubles the others."""
    if item in bad:
        os.kill(os.getpid(), bad[item]) if bad[item] else os._exit(0)
        time.sleep(WAIT)
    time.sleep(0.01 * (item % 3))
    return 2 * item


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(
    "bad",
    [
        {},
        {0: signal.SIGKILL},
        {19: 0},
        {3: signal.SIGKILL, 4: 0, 17: signal.SIGKILL},
        {i: signal.SIGKILL for i in range(6)},
    ],
    ids=len,
)
def test_a_worker_that_dies_takes_only_its_item_with_it(workers, bad, forked):
    found = list(in_processes(functools.partial(die_of, bad), range(20), workers))
    assert len(found) == 20
    assert dict(found) == {item: None if item in bad else 2 * item for item in range(20)}


def test_no_items_start_no_processes(monkeypatch):
    monkeypatch.setattr(parallel, "_pool", None)
    assert list(in_processes(abs, [], 3)) == []


def test_items_are_taken_as_they_are_needed(forked):
    """Of a million jobs, two per worker are held, and those that are done are forgotten."""
    taken = []
    for done, (_, result) in enumerate(in_processes(abs, (taken.append(-i) or -i for i in range(300)), 2), 1):
        assert len(taken) <= done + 4
    assert len(taken) == done == 300


def test_an_exception_in_a_worker_is_not_taken_for_its_death(forked):
    with pytest.raises(ZeroDivisionError):
        list(in_processes(functools.partial(divmod, 1), [1, 0, 2], 2))


def convert_odd(task):
    """What a converting function may do: yield files, leave out, fail, break in any way or kill its process."""
    name, how = task
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "left out":
        raise LeftOut(name, "not wanted: too small")
    if how == "failed":
        raise DataError(name, "can't be read: really")
    if how == "breaks":
        raise MemoryError("two\nlines")
    yield Output({"source": f"{name}.1", "output": f"{name}/1.bin"}, lambda path: Path(path).write_text(name))
    if how == "fails halfway":
        raise DataError(name, "lost: the rest of it")
    if how == "can't be written":
        yield Output({"source": f"{name}.2", "output": f"{name}/2.bin"}, no_such_format)
    yield Output({"source": f"{name}.2", "output": f"{name}/2.bin"}, lambda path: Path(path).write_text(name * 2))


def no_such_format(path):
    Path(path).write_text("half")
    raise ValueError(f"{path}: can't hold this")


HOWS = ["fine", "killed", "left out", "failed", "breaks", "fails halfway", "can't be written", "fine too"]
COLUMNS = ["source", "output", "bytes", "status", "reason", "stamp"]


def odd_jobs(hows=HOWS):
    return [Job((f"{how}.1", f"{how}.2"), conversion.fingerprint(how), (how, how)) for how in hows]


def convert_odd_ones(output, workers=2, hows=HOWS):
    with open_output(output, {}) as records:
        return convert_all(convert_odd, odd_jobs(hows), records, COLUMNS, workers, "job")


def test_whatever_a_job_does_the_others_are_done(tmp_path, forked, capsys):
    outcome = convert_odd_ones(tmp_path / "output")
    found = outcomes(tmp_path / "output")
    fine = ("written", "")
    assert {source: found[source] for source in found if source.startswith("fine")} == {
        "fine.1": fine,
        "fine.2": fine,
        "fine too.1": fine,
        "fine too.2": fine,
    }
    died = ("failed", "the process that read it died: it may need more memory than there is, or break a library")
    assert found["killed.1"] == found["killed.2"] == died
    assert found["left out.1"] == found["left out.2"] == ("left out", "not wanted: too small")
    assert found["failed.1"] == found["failed.2"] == ("failed", "can't be read: really")
    assert found["breaks.1"] == found["breaks.2"] == ("failed", "unexpected: MemoryError: two lines")
    assert (found["fails halfway.1"], found["fails halfway.2"]) == (fine, ("failed", "lost: the rest of it"))
    assert found["can't be written.1"] == fine
    status, reason = found["can't be written.2"]
    assert status == "failed" and reason.endswith("can't hold this") and "part." not in reason
    assert len(written(tmp_path / "output")) == 6
    with pytest.raises(UserError, match="^8 inputs failed, such as breaks.1: unexpected: MemoryError"):
        conversion.report_outcome(outcome)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("6 files of ") and out[0].endswith("2 inputs left out, 8 failed")
    assert any(line.split() == "left out 2 not wanted, such as left out.1".split() for line in out)
    assert any(line.split() == "failed 2 the process that read it died, such as killed.1".split() for line in out)

    before = times(tmp_path / "output")
    convert_odd_ones(tmp_path / "output", workers=1)
    assert outcomes(tmp_path / "output") == found
    assert rewritten(tmp_path / "output", before) <= {"fails halfway/1.bin", "can't be written/1.bin"}


def test_a_new_process_that_dies_takes_only_its_own_job_with_it(tmp_path):
    """As it is for users: new processes, which import the job's module."""
    convert_odd_ones(tmp_path / "output", workers=1, hows=["fine", "killed"])
    assert {source: status for source, (status, _) in outcomes(tmp_path / "output").items()} == {
        "fine.1": "written",
        "fine.2": "written",
        "killed.1": "failed",
        "killed.2": "failed",
    }


# ------------------------------------------------------------------------------------------------ disks and permissions


def assert_goes_on(flags, output, reference, run, less):
    """A run that ended for lack of space kept what it had done; one with space does the rest."""
    result = run(*flags, "--output", output)
    assert result.code == 1 and len(result.errors) == 1, result
    assert str(output) in result.errors[0]
    done = {name: time for name, time in times(output).items() if not name.startswith(conversion.WORK)}
    assert 0 < len(done) < len(reference)
    assert_whole(output, reference)
    less()
    assert run(*flags, "--output", output).code == 0
    assert contents(output) == reference
    assert {name: time for name, time in times(output).items() if name in done} == done


def graded_scans(folder):
    """Volumes whose files grow with their names; returns the flags to convert them."""
    for i in range(5):
        noise = np.random.default_rng(i).integers(-1000, 500, (10 + 10 * i, 20, 20)).astype(np.int16)
        write_nifti(folder / "input" / f"{i}.nii.gz", noise, np.eye(4))
    return ["nlst", "--input", folder / "input"]


def test_a_file_that_the_system_refuses(tmp_path, run):
    """No file may grow beyond 25 kB: as when a quota is used up, in the middle of a file."""
    resource = pytest.importorskip("resource")
    flags = graded_scans(tmp_path)
    assert run(*flags, "--output", tmp_path / "reference").code == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, limits[1]))
    try:
        assert_goes_on(
            flags,
            tmp_path / "output",
            contents(tmp_path / "reference"),
            run,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(tmp_path, run):
    """A file system of 200 kB, on which in the end neither a volume nor a line of the journal fits."""
    flags, disk = graded_scans(tmp_path), tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk], capture_output=True).returncode
    ):
        pytest.skip("can't mount a small file system here")
    try:
        assert run(*flags, "--output", tmp_path / "reference").code == 0
        assert_goes_on(
            flags,
            disk / "output",
            contents(tmp_path / "reference"),
            run,
            lambda: subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True),
        )
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_that_is_a_file(below, tmp_path, run):
    (tmp_path / "taken").write_text("kept")
    result = run(*small_inputs(tmp_path)["msd"], "--output", tmp_path / "taken" / below)
    assert result.code == 1 and len(result.errors) == 1 and str(tmp_path / "taken") in result.errors[0]
    assert (tmp_path / "taken").read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("what", ["output", "parent", "file", "input"])
def test_missing_permissions(what, run):
    """As another user than the superuser, who may write anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        folder.chmod(0o755)
        flags = small_inputs(folder)["nlst"]
        parent = folder / "parent"
        parent.mkdir(mode=0o755)
        output = parent / "output"
        if what != "parent":
            output.mkdir()
            os.chown(output, 65534, 65534)
        if what == "output":
            output.chmod(0o500)
        if what == "file":  # of which a part can't be replaced
            assert run(*flags, "--output", output).code == 0
            for path in [output, *output.rglob("*")]:
                os.chown(path, 65534, 65534)
            (output / "p0" / "t0" / "scan.hdf5").write_bytes(b"cut")
            (output / "p0" / "t0").chmod(0o500)
        if what == "input":
            (folder / "nlst" / "p0" / "scan.nii.gz").chmod(0o000)
            (folder / "nlst" / "dicom").chmod(0o000)

        def as_other_user():
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            result = run(*flags, "--output", output)
            log.write_text(json.dumps([result.code, result.errors]))

        log = folder / "log"
        log.touch()
        log.chmod(0o666)
        assert in_fork(as_other_user) == 0
        code, lines = json.loads(log.read_text())
        assert code == 1 and len(lines) == 1, lines
        if what == "input":
            found = outcomes(output)
            assert found["p1/scan.nii.gz"] == ("written", "")
            assert found["dicom"] == ("failed", "can't be listed: Permission denied")
            assert found["p0/scan.nii.gz"][0] == "failed" and "can't be read" in found["p0/scan.nii.gz"][1]
        else:
            assert "Permission denied" in lines[0] and str(output) in lines[0]
        if what == "file":
            assert (output / "p0" / "t0" / "scan.hdf5").read_bytes() == b"cut"


# ------------------------------------------------------------------------------------------- records that are not whole


def test_a_journal_that_is_cut_anywhere(tmp_path, run):
    """A kill, a crash of the machine or a full disk in the middle of a line."""
    flags = [*small_inputs(tmp_path)["luna16"], "--output"]
    assert run(*flags, tmp_path / "reference").code == 0
    reference, output = contents(tmp_path / "reference"), tmp_path / "output"
    journal = b""

    def interrupt(records, *_):
        nonlocal journal
        journal = records.journal.read_bytes()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion.Records, "finish", interrupt)
        assert run(*flags, output).code == 130
    assert journal.count(b"\n") == 2
    for cut in [0, 1, 2, *range(5, len(journal), len(journal) // 12), len(journal) - 1]:
        for more in (b"", b"\0\0\0", b"[]\n", b"{}\n7\n"):
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            shutil.copytree(output, tmp_path / "cut")
            (tmp_path / "cut" / conversion.WORK / "journal.jsonl").write_bytes(journal[:cut] + more)
            assert run(*flags, tmp_path / "cut").code == 0
            assert contents(tmp_path / "cut") == reference


def excel(text):
    return "\ufeff" + text.replace(",", ";")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "\n",
        lambda text: text[: len(text) // 2],
        lambda text: text[: -len(text) // 5],
        excel,
        lambda text: text.replace("written", ""),
        lambda text: text.splitlines()[0],
        lambda text: "\0" * 50,
        lambda text: text.replace(",written", ",,,,,,written"),
        lambda text: "\n".join(line[:40] for line in text.splitlines()),
        lambda text: text.replace("written", "1E+05"),
    ],
)
def test_a_manifest_that_was_damaged(damage, tmp_path, run):
    flags = [*small_inputs(tmp_path)["msd"], "--output", tmp_path / "output"]
    run(*flags)
    before = contents(tmp_path / "output")
    path = tmp_path / "output" / conversion.MANIFEST
    path.write_text(damage(path.read_text()))
    result = run(*flags)
    assert (result.code, result.errors) == (0, [])
    assert contents(tmp_path / "output") == before


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "\ufffe\0"])
def test_a_recipe_that_was_damaged_is_named(content, tmp_path, run):
    flags = [*small_inputs(tmp_path)["msd"], "--output", tmp_path / "output"]
    run(*flags)
    (tmp_path / "output" / conversion.RECIPE).write_text(content)
    before = contents(tmp_path / "output")
    result = run(*flags)
    assert result.code == 1 and len(result.errors) == 1 and conversion.RECIPE in result.errors[0]
    assert contents(tmp_path / "output") == before


def test_a_manifest_from_elsewhere_removes_nothing_outside(tmp_path, run):
    """Whoever sends a prepared folder must not choose which files of ours are removed."""
    flags = [*small_inputs(tmp_path)["msd"], "--output", tmp_path / "output"]
    run(*flags)
    (tmp_path / "precious").write_text("kept")
    path = tmp_path / "output" / conversion.MANIFEST
    header, *rows = path.read_text().splitlines()
    first = rows[0].split(",")
    first[1], first[-1] = "../precious", "0" * 16
    path.write_text("\n".join([header, ",".join(first), *rows[1:]]) + "\n")
    run(*flags)
    assert (tmp_path / "precious").read_text() == "kept"
