"""What a script's end and its console look like: one line for each failure, in any locale, with any console."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT

from dino3d import command_line
from dino3d.data.layouts import list_volumes, read_data_list
from dino3d.data.volume import DataError
from dino3d.training import loading
from dino3d.training.checkpoint import save_checkpoint
from dino3d.training.events import EventWriter

PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a locale and a terminal of ASCII alone


def script(code, environment=None, **how):
    """A script of ours, run with `code` as its main()."""
    text = (
        f"import os, sys, signal, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom dino3d import command_line\n"
        f"def main():\n    {code}\n    return None\nsys.exit(command_line.exit_status(main)[0])"
    )
    environment = os.environ | (environment or {})
    return subprocess.Popen([sys.executable, "-c", text], env=environment, stderr=subprocess.PIPE, **how)


@pytest.mark.parametrize("environment", [PLAIN, {"PYTHONIOENCODING": "ascii"}], ids=["locale", "terminal"])
def test_a_console_of_ascii_alone(environment):
    code = r"""print('mean \N{PLUS-MINUS SIGN} SD, 3 \N{MULTIPLICATION SIGN} 4, caf\xe9, ' + os.fsdecode(b'\xff'))
    raise command_line.UserError('b\xe4d')"""
    done = script(code, environment, stdout=subprocess.PIPE)
    out, errors = done.communicate()
    assert done.returncode == 1 and errors == b"error: b\\xe4d\n"
    assert out == b"mean +- SD, 3 x 4, caf\\xe9, \\udcff\n"


@pytest.mark.parametrize("flush", ["", "sys.stdout.flush()"])
def test_a_reader_that_goes_away_ends_nothing(flush, tmp_path):
    """As head does, and tee when Ctrl-C reaches it too."""
    code = f"""for _ in range(3):
        print('x' * 100_000)
        {flush}
    open({str(tmp_path / "done")!r}, 'w', encoding='utf-8').close()"""
    read, write = os.pipe()
    process = script(code, stdout=write)
    os.close(write)
    os.close(read)
    assert process.communicate()[1] == b"" and process.returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("closed", ["2", "12", "012"])
def test_a_closed_console_ends_nothing(closed, tmp_path):
    """Nor does a file get its number, and with it what others write there."""
    code = f"""file = open({str(tmp_path / "done")!r}, 'w', encoding='utf-8')
    print('told', file=sys.stderr)
    print('said')
    os.write(2, b'from C')
    file.write('done')
    file.close()"""
    process = script(code, preexec_fn=lambda: [os.close(int(one)) for one in closed], stdout=subprocess.PIPE)
    process.communicate()
    assert process.returncode == 0 and (tmp_path / "done").read_text(encoding="utf-8") == "done"


def test_ctrl_c_once_and_twice():
    """At once: one request, in one line. A second later: the process ends as the signal would have ended it."""
    code = """print('there', flush=True)
    try:
        time.sleep(60)
    finally:
        print('ending', flush=True)
        time.sleep({})"""
    for pause, code_of_it, says in ((0.3, 130, b"error: interrupted\n"), (60, -signal.SIGINT, b"")):
        process = script(code.format(pause), stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"there\n"
        time.sleep(0.2)  # it is on its way back from writing that
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"ending\n"
        process.send_signal(signal.SIGINT)
        if pause > 1:
            time.sleep(1.2)
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == says and process.returncode == code_of_it


def test_ctrl_c_where_a_shell_lets_it_be_ignored():
    process = script("os.kill(os.getpid(), signal.SIGINT)", preexec_fn=lambda: signal.signal(signal.SIGINT, 1))
    assert process.communicate() == (None, b"error: interrupted\n") and process.returncode == 130


# -------------------------------------------------------------------------------------------------------- open files


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "Too many open files"), RuntimeError("Too many open files. Communication with the workers")],
)
def test_too_many_open_files(capsys, error):
    def main():
        raise error

    assert command_line.exit_status(main) == (1, False)
    assert capsys.readouterr().err.startswith("error: too many open files at once (")


def test_as_many_open_files_as_the_system_allows():
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    process = script(code, stdout=subprocess.PIPE, preexec_fn=lambda: limit_files(100, 200))
    assert process.communicate()[0] == b"(200, 200)\n"


def limit_files(soft, hard):
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Unsent:
    """A sample that can't be handed over, as a tensor can't without another open file."""

    def __reduce__(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class Samples:
    def __len__(self):
        return 4

    def __getitem__(self, at):
        return Unsent()


def test_a_batch_that_cannot_be_handed_over_is_not_waited_for(capfd):
    """torch would lose it, and wait."""
    from torch.utils.data import DataLoader

    loader = DataLoader(Samples(), None, num_workers=1, worker_init_fn=loading.start_reading_process, timeout=60)
    with pytest.raises(command_line.UserError, match="a reading process .*(more files|died)"):
        loading.next_batch(iter(loader))
    assert "Traceback" not in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def full():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    return "/dev/full"


def test_a_checkpoint_on_a_full_disk(tmp_path, full):
    """torch's own words are those of its source file."""
    import torch

    (tmp_path / "checkpoint.pth.part").symlink_to(full)
    with pytest.raises(command_line.UserError, match=r"can't be written \(No space left on device\)"):
        save_checkpoint(tmp_path / "checkpoint.pth", {"weights": torch.zeros(1000, 1000)})


def test_tensorboard_ends_no_run(tmp_path, capfd, monkeypatch):
    """Told once; a thread of its own prints no traceback."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    writer = EventWriter(tmp_path / "runs", 0)
    writer.add_image("name\udcff", np.zeros((4, 4), np.uint8), 0, dataformats="HW")
    writer.flush()

    def fail(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", fail)
    for step in range(100):
        writer.add_scalar("loss", 1.0, step)
        writer.flush()
    writer.close()
    (tmp_path / "file").touch()
    EventWriter(tmp_path / "file", 0).add_scalar("loss", 1.0, 0)
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and "runs: TensorBoard's files can't be written (No space left on device)" in told[0]


# ------------------------------------------------------------------------------------------------------ lists of files


NAMES = [b"caf\xc3\xa9", b"bad\xff", b"#hash", b" space ", b"a\rb", b"next\xc2\x85line", b"semi;colon"]


@pytest.fixture
def odd(tmp_path):
    for name in NAMES:
        os.makedirs(os.path.join(os.fsencode(tmp_path), b"data", name))
        open(os.path.join(os.fsencode(tmp_path), b"data", name, b"x.nii"), "wb").close()
    return tmp_path


def test_a_list_of_files_of_any_names(odd):
    found = list_volumes(odd / "data", odd / "list.txt")[0]
    assert len(found) == len(NAMES) and all(map(os.path.exists, found))
    (odd / "data" / "later.nii").touch()
    assert sorted(map(os.path.realpath, list_volumes(odd / "data", odd / "list.txt")[0])) == sorted(found)


def test_a_list_that_was_made_in_another_locale(odd):
    list_volumes(odd / "data", odd / "list.txt")
    code = f"""from dino3d.data.layouts import list_volumes
    found = list_volumes({str(odd / "data")!r}, {str(odd / "list.txt")!r})[0]
    print(len(found), sum(map(os.path.exists, found)), sys.getfilesystemencoding())"""
    process = script(code, PLAIN, stdout=subprocess.PIPE)
    assert process.communicate() == (f"{len(NAMES)} {len(NAMES)} ascii\n".encode(), b"")


def test_a_name_of_two_lines_is_not_listed(odd):
    (odd / "data" / "two\nlines.nii").touch()
    for _ in range(2):
        assert all(map(os.path.exists, list_volumes(odd / "data", odd / "list.txt")[0]))
    assert not (odd / "list.txt").exists()


def test_lists_of_other_programs(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.nii\r\n\r\n# no\r\nb.nii")
    assert read_data_list(tmp_path / "list.txt", "/data") == ["/data/a.nii", "/data/b.nii"]
    (tmp_path / "list.txt").write_text("a.nii\n", encoding="utf-16")
    with pytest.raises(DataError, match="not in UTF-8"):
        read_data_list(tmp_path / "list.txt", "/data")
