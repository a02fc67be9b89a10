"""Checkpoints that are damaged, disks that are full, signals that end a run: nothing that was saved is lost."""

import contextlib
import dataclasses
import errno
import functools
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT
from survive import FLAGS, differences, make_volumes, start, state_of, step_of
from test_main_dino import TORCHRUN
from test_main_dino import run_main as run_dino
from test_main_lnc_luna16 import TINY as TINY_FOLDS
from test_main_lnc_luna16 import run_main as run_folds
from test_main_lnc_luna16 import write_cases

import utils
from dino3d.command_line import Preempted, UserError
from dino3d.data.pretraining import BatchStream, epoch_order
from dino3d.evaluation import statistics
from dino3d.files import ChecksumReader, read_log
from dino3d.finetune import fold_loop, mask_inference
from dino3d.training import checkpoint
from dino3d.training.checkpoint import (
    Checkpoints,
    Saving,
    StopSignal,
    load_checkpoint,
    load_newest,
    load_parts,
    load_progress,
    require_parts,
    save_checkpoint,
)
from vision_transformer import ARCHITECTURES, VisionTransformer

as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs to be root: mounts a small disk, becomes another user")


def state(step):
    """A state of which `step` is all that differs."""
    torch.manual_seed(0)
    return {"config": {"arch": "a"}, "step": step, "model": {"weight": torch.randn(50, 40) + step}}


def save_all(folder, *steps, keep_last=2):
    for step in steps:
        save_checkpoint(folder / "checkpoint.pth", state(step), keep_last)
    return folder / "checkpoint.pth"


def steps_kept(folder):
    """{name: step} of all files."""
    return {path.name: load_checkpoint(path)["step"] for path in sorted(folder.iterdir())}


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.unlink()  # an earlier one may be the same file
    path.write_bytes(content)


# --------------------------------------------------------------------------------------------------------- integrity


def test_a_checkpoint_is_a_zip_that_plain_torch_opens(tmp_path):
    path = save_all(tmp_path, 1)
    assert differences(torch.load(path, weights_only=True), state(1)) == []
    assert differences(torch.load(path, weights_only=True, mmap=True), state(1)) == []
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None and file.comment.startswith(b"crc32 ")


def test_every_flipped_byte_is_noticed(tmp_path):
    """At 20 random positions and at each of the last 40, where the checksum itself lies."""
    path = save_all(tmp_path, 1)
    whole, rng = path.read_bytes(), random.Random(0)
    for position in [rng.randrange(len(whole)) for _ in range(20)] + list(range(len(whole) - 40, len(whole))):
        flip(path, position, rng.randrange(8))
        with pytest.raises(UserError, match="checkpoint.pth: can't be read as a checkpoint.*; put back a whole one$"):
            load_checkpoint(path)
        path.write_bytes(whole)
    assert load_checkpoint(path)["step"] == 1


def test_the_checksum_does_not_depend_on_the_order_of_reading(tmp_path):
    """Whatever is read, before the checksum is asked for, and however often: it is of each byte once, in order."""
    rng = random.Random(0)
    for size in (0, 5, 14, 100, 300_000):
        content, path = rng.randbytes(size), tmp_path / "content"
        path.write_bytes(content)
        for _ in range(20):
            with ChecksumReader(path) as file:
                assert file.end == max(0, size - 14)  # without our comment
                for _ in range(rng.randrange(8)):
                    start, buffer = rng.randint(0, size), bytearray(rng.randint(1, size + 10))
                    file.seek(start)
                    count = file.readinto(buffer)
                    assert buffer[:count] == content[start : start + len(buffer)] and file.tell() == start + count
                assert file.crc32(file.end) == zlib.crc32(content[: file.end])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux tells how many bytes were read")
def test_a_checkpoint_is_read_once(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"config": {}, "model": {str(i): torch.randn(250_000) for i in range(20)}})

    def bytes_read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    load_checkpoint(path)  # what is imported at the first time is read too
    before = bytes_read()
    load_checkpoint(path)
    assert bytes_read() - before < 1.1 * path.stat().st_size


def test_files_without_a_checksum_load(tmp_path):
    torch.save(state(3), tmp_path / "checkpoint.pth")
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == load_newest(tmp_path / "checkpoint.pth")["step"] == 3


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 1])
def test_the_one_before_a_truncated_one_is_used(tmp_path, capsys, share):
    path = save_all(tmp_path, 1, 2, 3)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: round(share * len(whole)) or 0] if share < 1 else whole[:-1])
    assert load_newest(path)["step"] == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: {path}: can't be read") and "checkpoint.1.pth" in lines[0]
    assert load_checkpoint(path)["step"] == 2 and (tmp_path / "checkpoint.damaged.pth").exists()
    assert load_newest(path)["step"] == 2 and not capsys.readouterr().err
    save_all(tmp_path, 4)  # the whole one is kept, not the damaged one
    (tmp_path / "checkpoint.damaged.pth").unlink()
    assert steps_kept(tmp_path) == {"checkpoint.pth": 4, "checkpoint.1.pth": 2}


@pytest.mark.parametrize("share", [0.02, 0.3, 0.98])
def test_a_file_that_is_cut_off_is_said_to_be(tmp_path, share):
    path = save_all(tmp_path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: round(share * len(whole))])
    with pytest.raises(UserError, match="checkpoint.pth: can't be read as a checkpoint .cut off: its end is missing"):
        load_checkpoint(path)


def test_all_damaged_is_one_error(tmp_path, capsys):
    path = save_all(tmp_path, 1, 2, 3, keep_last=3)
    for damaged in tmp_path.iterdir():
        flip(damaged, 2000)
    with pytest.raises(
        UserError, match=r"checkpoint.pth: .*; so is every earlier one \(2\); move it and checkpoint.1.pth, .* away"
    ):
        load_newest(path)
    assert not capsys.readouterr().err and len(list(tmp_path.iterdir())) == 3


def test_another_runs_checkpoint_is_no_damaged_one(tmp_path):
    path = save_all(tmp_path, 1, 2)
    with pytest.raises(UserError, match="--arch a, not b"):
        load_newest(path, {"arch": "b"})
    torch.save({"teacher": {}}, path)
    with pytest.raises(UserError, match="no checkpoint of this script: it has no 'config'"):
        load_newest(path)
    path.unlink()
    with pytest.raises(UserError, match="checkpoint.pth: is missing, beside checkpoint.1.pth: rename one"):
        load_newest(path)
    (tmp_path / "checkpoint.1.pth").rename(tmp_path / "checkpoint0020.pth")
    with pytest.raises(UserError, match="checkpoint.pth: is missing, beside checkpoint0020.pth: rename one"):
        load_newest(path)
    (tmp_path / "checkpoint0020.pth").unlink()
    assert load_newest(path) is load_newest(tmp_path / "none" / path.name) is None  # moved away to start anew


def test_a_fine_tunings_checkpoint_is_told_from_pre_trainings(volumes, tmp_path, capsys, monkeypatch):
    """Its checkpoint.pth and best.pth, in the output folder of main_dino.py; what the error says to do does work."""
    small = functools.partial(VisionTransformer, embed_dim=48, depth=2, num_heads=3)
    monkeypatch.setitem(ARCHITECTURES, "vit_tiny", small)
    monkeypatch.setattr(statistics, "BOOTSTRAP_ROUNDS", 50)
    folds, out = tmp_path / "folds", tmp_path / "out"
    cases = ["--data_dir", write_cases(tmp_path / "cases")]
    code, _, errors = run_folds(capsys, *cases, "--output_dir", folds, "--epochs", 1)
    assert code == 0, errors
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 8, "--max_steps", 1, "--output_dir", out]
    out.mkdir()
    for name, missing in (
        ("checkpoint.pth", "'student', 'teacher', 'dino_loss', 'samples'; "),
        ("best.pth", "'student', 'teacher', 'optimizer', 'scaler' and 5 more; "),
    ):
        shutil.copy(folds / "0" / name, out / "checkpoint.pth")
        code, _, errors = run_dino(capsys, *flags)
        assert code == 1 and errors == [
            f"error: {out / 'checkpoint.pth'}: is a checkpoint of fine-tuning (main_lnc_luna16.py): it has no {missing}"
            "choose another --output_dir, or give it as --pretrained_weights with --checkpoint_key model"
        ]
    shutil.move(out / "checkpoint.pth", tmp_path / "weights.pth")
    weights = ["--pretrained_weights", tmp_path / "weights.pth", "--checkpoint_key", "model"]
    code, said, errors = run_dino(capsys, *flags, *weights)
    assert code == 0 and "starting from the backbone of" in said, errors


@pytest.mark.parametrize(
    "state, says",
    [
        ({"student": {}, "teacher": {}, "args": None}, "a checkpoint of DINO pre-training"),
        ({"student": {}, "teacher": {}, "config": {}}, "a checkpoint of DINO pre-training"),
        ({"student": {}, "teacher": {}, "config": {"arch": "a"}}, "a checkpoint of DINO pre-training (main_dino.py)"),
        ({"model": {}, "best": {}, "config": {"decoder": "a"}}, "a checkpoint of fine-tuning (main_lts_msd.py)"),
        ({"model": {}, "best": {}, "config": {"protocol": "a"}}, "a checkpoint of fine-tuning (main_lnc_luna16.py)"),
        ({"model": {}, "best": {}, "config": 3}, "a checkpoint of fine-tuning"),
        (None, "no checkpoint of this script"),
        ({"model": {}, "config": {}}, "no checkpoint of this script"),
        (torch.ones(2), "no checkpoint of this script"),
    ],
)
def test_what_wrote_a_checkpoint(state, says):
    with pytest.raises(UserError) as error:
        require_parts(state, ("wanted", "other"), "here.pth")
    assert str(error.value).startswith(f"here.pth: is {says}: it has no 'wanted', 'other'; choose another")


def test_parts_that_fit_are_loaded_and_others_named():
    """Modules, optimizers and gradient scalers; a scaler that was off leaves nothing to one that is on."""

    def parts(size=3, kind="adamw", scaling=True):
        model = torch.nn.Linear(size, 2)
        optimizer = utils.make_optimizer(kind, model.parameters())
        model(torch.ones(1, size)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu", 4.0, enabled=scaling)}

    def states(parts):
        return {name: part.state_dict() for name, part in parts.items()}

    saved, new = states(parts()), parts()
    new["scaler"] = torch.amp.GradScaler("cpu")
    load_parts(new, saved, "here.pth")
    assert differences(states(new), saved) == []
    for scaling in (True, False):
        load_parts(new, saved | {"scaler": states(parts(scaling=not scaling))["scaler"]}, "here.pth")
        assert new["scaler"].get_scale() == 4
        new["scaler"] = torch.amp.GradScaler("cpu", 4.0)
    for name, others, says in (
        ("model", parts(4), r"with weight \(2, 4\) instead of \(2, 3\);"),
        ("optimizer", parts(4), r"with exp_avg \(2, 4\) of parameter 0 instead of \(2, 3\), exp_avg_sq"),
        ("optimizer", parts(kind="sgd"), "without betas: of another --optimizer;"),
        ("scaler", {"scaler": torch.nn.Linear(2, 2)}, "without a number for scale, growth_factor, backoff_factor"),
    ):
        with pytest.raises(UserError, match=f"here.pth: its '{name}' does not fit this run: {says}") as error:
            load_parts(new, saved | {name: others[name].state_dict()}, "here.pth")
        assert error.value.everywhere
    with pytest.raises(UserError, match="it has no 'more'"):
        load_parts(new | {"more": new["model"]}, saved, "here.pth")


def test_how_far_a_run_is_has_its_types():
    done = fold_loop.FoldProgress(epoch=1, position=2, step=3, cases=4, trained={"loss": 0.5})
    assert load_progress(fold_loop.FoldProgress, dataclasses.asdict(done) | {"more": 1}, "here.pth") == done
    assert load_progress(fold_loop.FoldProgress, {"step": 3}, "here.pth") == fold_loop.FoldProgress(
        step=3
    )  # of an older version
    for wrong, says in (
        ({"epoch": 1.5}, "its 'epoch' is a float, expected int"),
        ({"trained": [1]}, r"its 'trained' is a list, expected dict \| None"),
    ):
        with pytest.raises(UserError, match=f"here.pth: {says}; resume with"):
            load_progress(fold_loop.FoldProgress, wrong, "here.pth")


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_file_is_not_executed(tmp_path):
    path = tmp_path / "checkpoint.pth"
    bad = {"config": {}, "step": Malicious(f"touch {tmp_path / 'executed'}")}
    for write in (torch.save, lambda content, where: where.write_bytes(pickle.dumps(content))):
        write(bad, path)
        with pytest.raises(UserError, match="can't be read as a checkpoint"):
            load_newest(path)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------------ the last few


def test_the_last_are_kept(tmp_path):
    for keep_last, expected in (
        (1, {"checkpoint.pth": 4}),
        (2, {"checkpoint.pth": 4, "checkpoint.1.pth": 3}),
        (3, {"checkpoint.pth": 4, "checkpoint.1.pth": 3, "checkpoint.2.pth": 2}),
    ):
        folder = tmp_path / str(keep_last)
        folder.mkdir()
        (folder / "checkpoint0020.pth").write_bytes(save_all(tmp_path, 9).read_bytes())  # a numbered copy stays
        save_all(folder, 1, 2, 3, 4, keep_last=keep_last)
        assert steps_kept(folder) == expected | {"checkpoint0020.pth": 9}
    save_all(tmp_path / "3", 5, keep_last=2)  # fewer than before
    assert steps_kept(tmp_path / "3") == {"checkpoint.pth": 5, "checkpoint.1.pth": 4, "checkpoint0020.pth": 9}


@pytest.mark.parametrize("links", [True, False])
def test_there_is_a_whole_one_at_every_moment(tmp_path, monkeypatch, links):
    """Cut off before each change of a name: the newest is whole, and a run that continues keeps two different ones."""
    if not links:

        def no_link(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(checkpoint.os, "link", no_link)
    replace, cut_off_at = os.replace, 0

    def cut_off(*names):
        nonlocal count
        assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 2  # whole, whatever is being done
        count += 1
        if count == cut_off_at:
            raise KeyboardInterrupt
        replace(*names)

    for cut_off_at in range(1, 6):
        for path in tmp_path.iterdir():
            path.unlink()
        save_all(tmp_path, 1, 2, keep_last=3)
        count = 0
        monkeypatch.setattr(checkpoint.os, "replace", cut_off)
        if cut_off_at < 4:  # the earlier one's name, the newest's second name, the new one's
            with pytest.raises(KeyboardInterrupt):
                save_all(tmp_path, 3, keep_last=3)
        else:
            save_all(tmp_path, 3, keep_last=3)
        monkeypatch.setattr(checkpoint.os, "replace", replace)
        assert load_newest(tmp_path / "checkpoint.pth")["step"] == (2 if cut_off_at < 4 else 3)
        save_all(tmp_path, 4, keep_last=3)
        kept = steps_kept(tmp_path)
        assert kept["checkpoint.pth"] == 4 and kept["checkpoint.1.pth"] == (2 if cut_off_at < 4 else 3)
        if links or cut_off_at != 3:  # a copy is not known to be one
            assert kept["checkpoint.2.pth"] == (1 if cut_off_at < 4 else 2)


# -------------------------------------------------------------------------------------------------- in the background


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    checkpoints, now = Checkpoints(tmp_path / "checkpoint.pth", Saving()), state(1)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(300, 300))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(300, 300)
    optimizer.step()
    now["optimizer"] = optimizer.state_dict()
    checkpoints.save(now, copy=tmp_path / "kept.pth")
    now["model"]["weight"].zero_()
    optimizer.step()
    now["config"]["arch"] = "b"
    checkpoints.wait()
    for name in ("checkpoint.pth", "kept.pth"):
        found = load_checkpoint(tmp_path / name)
        assert torch.equal(found["model"]["weight"], state(1)["model"]["weight"]) and found["config"]["arch"] == "a"
        assert found["optimizer"]["state"][0]["step"] == 1 and (found["optimizer"]["state"][0]["exp_avg"] < 0.11).all()


def test_saving_does_not_wait_for_the_disk_but_for_the_one_before(tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(checkpoint.os, "fsync", lambda file: (time.sleep(0.5), fsync(file)))
    checkpoints, began = Checkpoints(tmp_path / "checkpoint.pth", Saving()), time.monotonic()
    checkpoints.save(state(1))
    assert time.monotonic() - began < 0.4
    checkpoints.save(state(2))
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 1
    checkpoints.wait()
    assert time.monotonic() - began >= 1 and steps_kept(tmp_path) == {"checkpoint.pth": 2, "checkpoint.1.pth": 1}


@pytest.mark.parametrize("then", ["save", "wait"])
def test_an_error_in_the_background_comes_with_the_next_save_or_the_end(tmp_path, monkeypatch, then):
    checkpoints = Checkpoints(tmp_path / "checkpoint.pth", Saving())
    checkpoints.save(state(1))
    checkpoints.wait()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    checkpoints.save(state(2))
    with pytest.raises(UserError, match="can't be written .*No space left.*what was saved before is unharmed"):
        checkpoints.save(state(3)) if then == "save" else checkpoints.wait()
    assert steps_kept(tmp_path) == {"checkpoint.pth": 1}


def test_when_it_is_time(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    off, steps, minutes = (
        Checkpoints(tmp_path / "checkpoint.pth", saving) for saving in (Saving(0, 0), Saving(3, 0), Saving(0, 2))
    )
    assert [step for step in range(1, 8) if steps.due(step)] == [3, 6] and not minutes.due(1)
    now += 119
    assert not minutes.due(3)
    now += 1
    assert minutes.due(4) and not off.due(3)
    minutes.save(state(4))
    assert not minutes.due(5) and not minutes.due(5, epoch_ends=True)
    assert off.due(3, epoch_ends=True) and steps.due(4, epoch_ends=True)  # no minutes: every epoch
    now += 11.9
    assert not minutes.due(6, epoch_ends=True)
    now += 0.2  # a tenth of two minutes
    assert minutes.due(6, epoch_ends=True) and not minutes.due(6)
    minutes.wait()


# ------------------------------------------------------------------------------------------------ disks and folders


@as_root
def test_a_full_disk_destroys_nothing(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("can't mount a small disk here")
    try:
        path = save_all(tmp_path, 1, 2)
        with contextlib.suppress(OSError):
            (tmp_path / "fills the disk").write_bytes(bytes(100 * 1024))
        with pytest.raises(UserError, match="checkpoint.pth: the checkpoint can't be written"):
            save_all(tmp_path, 3)
        (tmp_path / "fills the disk").unlink()
        assert steps_kept(tmp_path) == {"checkpoint.pth": 2, "checkpoint.1.pth": 1}
        assert save_all(tmp_path, 4) == path and load_checkpoint(path)["step"] == 4
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@as_root
def test_a_folder_that_can_no_longer_be_written(tmp_path):
    """As another user, whom permissions do stop."""
    save_all(tmp_path, 1, 2)
    code = f"""
import os, sys, tempfile
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_checkpoint
from dino3d.training import checkpoint
from pathlib import Path
folder = Path({str(tmp_path)!r})
for parent in [folder, *folder.parents]:
    if parent != Path(tempfile.gettempdir()) and parent.is_relative_to(tempfile.gettempdir()):
        parent.chmod(0o755)
os.setuid(65534)
try:
    checkpoint.save_checkpoint(folder / "checkpoint.pth", {{"config": {{}}}}, 2)
except checkpoint.UserError as error:
    print(error)
print(checkpoint.load_checkpoint(folder / "checkpoint.pth")["step"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert "can't be written" in lines[0] and "Permission denied" in lines[0] and lines[1] == "2"


# ------------------------------------------------------------------------------------------- another number of ranks


def test_what_an_epoch_has_not_seen_is_seen_by_any_number_of_processes():
    """From two processes with batches of 2, after three steps, to three with batches of 3: nothing twice, nothing
    left."""

    def keys(ranks, batch_size, position, steps):
        streams = [iter(BatchStream(10, 3, batch_size, rank, ranks, 0, 4, position, 5)) for rank in range(ranks)]
        return [key for _ in range(steps) for stream in streams for key in next(stream)]

    seen = keys(2, 2, 0, 3) + keys(3, 3, 12, 2)
    assert [sample for _, sample in seen] == epoch_order(10, 3, 0, 4).tolist() and {epoch for epoch, _ in seen} == {4}


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return make_volumes(tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def undisturbed(noise, tmp_path_factory):
    """{processes: final state, (processes, "log"): records} of runs with a global batch of 4 that nobody disturbed."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        ranks = start(flags_of(noise, folder, processes), folder / "progress", processes)
        errors = [rank.communicate()[1] for rank in ranks]
        assert not any(rank.returncode for rank in ranks), errors
        found[processes] = state_of(folder)
        found[processes, "log"] = read_log(folder / "log.txt")
    return found


def flags_of(data, folder, processes):
    return [
        *FLAGS,
        "--data_dir",
        str(data),
        "--output_dir",
        str(folder),
        "--epochs",
        "12",
        "--save_every_steps",
        "0",
        "--batch_size_per_gpu",
        str(4 // processes),
        "--num_workers",
        "2",
    ]


def started(command, folder, **environment):
    """A process in a group and session of its own; its family is known by the folder in their environment."""
    return subprocess.Popen(
        list(map(str, command)),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "FAMILY": str(folder), "PROGRESS": str(folder / "progress")}
        | environment,
    )


def family(folder, also=b""):
    """Process ids of all that belong to a run, orphans included. also: text that their environment must have"""
    token, found = f"FAMILY={folder}".encode() + b"\0", []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
            if token in environment and b"\0" + also in b"\0" + environment:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for_step(process, folder, step, limit=120):
    until = time.monotonic() + limit
    while step_of(folder / "progress") < step:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)


def seconds_until_all_gone(folder, limit=30):
    began = time.monotonic()
    while family(folder):
        assert time.monotonic() - began < limit, family(folder)
        time.sleep(0.02)
    return time.monotonic() - began


def differing(folder, expected):
    found = state_of(folder)
    return [
        name
        for part in ("student", "teacher", "optimizer", "dino_loss", "step", "samples", "epoch")
        for name in differences(expected[part], found[part], part)
    ]


SURVIVE = ROOT / "tests" / "run_survive.py"


@pytest.mark.parametrize(
    "number, whole_group",
    [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGUSR1, True)],
    ids=["SIGTERM", "Ctrl-C to all", "SIGUSR1 to all"],
)
def test_a_signal_saves_and_ends(noise, undisturbed, tmp_path, number, whole_group):
    """Exit code 75 or 130, a checkpoint of that step and the marker; nobody is left; the same command ends as without
    it."""
    code, name = (130, "Ctrl-C") if number == signal.SIGINT else (75, number.name)
    command = [sys.executable, SURVIVE, *flags_of(noise, tmp_path, 1)]
    process = started(command, tmp_path)
    wait_for_step(process, tmp_path, 5)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    seconds = seconds_until_all_gone_after(process, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == code and seconds < 10, (process.returncode, seconds, errors)
    last = [line for line in errors.replace("\r", "\n").splitlines() if "step/s" not in line and "s/step" not in line][
        -1
    ]
    assert last == f"ended by {name}; everything is saved, the same command resumes"
    assert "Traceback" not in errors and "error:" not in errors
    assert 5 <= state_of(tmp_path)["step"] < 24
    marker = (tmp_path / "preempted").read_text()
    assert name in marker and "run_survive.py" in marker and f"--output_dir {tmp_path}" in marker
    again = started(command, tmp_path)
    out, errors = again.communicate(timeout=180)
    assert again.returncode == 0 and "resuming after step" in out, errors
    assert not (tmp_path / "preempted").exists() and differing(tmp_path, undisturbed[1]) == []


def seconds_until_all_gone_after(process, folder):
    began = time.monotonic()
    process.wait(60)
    seconds_until_all_gone(folder)
    return time.monotonic() - began


def test_epochs_beyond_the_checkpoint_are_logged_once(noise, undisturbed, tmp_path):
    """SIGKILL some epochs after the last checkpoint: log.txt is the undisturbed run's, none lost and none twice."""
    command = [sys.executable, SURVIVE, *flags_of(noise, tmp_path, 1), "--save_every_steps", 4]
    process = started(command, tmp_path)
    wait_for_step(process, tmp_path, 7)  # two steps make an epoch
    process.kill()
    process.communicate()
    for pid in family(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    saved, logged = state_of(tmp_path)["step"], read_log(tmp_path / "log.txt")[-1]["step"]
    assert saved % 4 == 0 and saved < logged
    out, errors = started(command, tmp_path).communicate(timeout=180)
    assert f"resuming after step {saved}," in out and differing(tmp_path, undisturbed[1]) == [], errors
    measured = ("seconds", "volumes_per_second", "waiting_for_data", "peak_memory_gib")
    records = [read_log(tmp_path / "log.txt"), undisturbed[1, "log"]]
    ours, expected = ([{k: v for k, v in one.items() if k not in measured} for one in log] for log in records)
    assert ours == expected and [record["step"] for record in ours] == list(range(2, 26, 2))


@pytest.mark.parametrize(
    "number, handled",
    [(signal.SIGTERM, []), (signal.SIGINT, []), (signal.SIGUSR1, ["--signals-to-handle=SIGTERM,SIGUSR1"])],
    ids=["SIGTERM", "SIGINT", "SIGUSR1"],
)
def test_a_signal_to_torchrun(noise, undisturbed, tmp_path, number, handled):
    command = [*TORCHRUN, *handled, "--nproc_per_node=2", SURVIVE, *flags_of(noise, tmp_path, 2)]
    process = started(command, tmp_path)
    wait_for_step(process, tmp_path, 5)
    os.kill(process.pid, number)
    seconds = seconds_until_all_gone_after(process, tmp_path)
    _, errors = process.communicate()
    print(f"{number.name} to torchrun: all gone after {seconds:.1f} s, exit code {process.returncode}")
    assert seconds < 10 and process.returncode != 0, errors
    assert sum("everything is saved" in line for line in errors.splitlines()) == 1, errors
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert 5 <= state_of(tmp_path)["step"] < 24 and name in (tmp_path / "preempted").read_text()
    again = started(command, tmp_path)
    out, errors = again.communicate(timeout=180)
    assert again.returncode == 0 and "resuming after step" in out, errors
    assert not (tmp_path / "preempted").exists() and differing(tmp_path, undisturbed[2]) == []


def test_torchrun_starts_a_killed_rank_again(noise, undisturbed, tmp_path):
    """--max-restarts: both ranks begin anew, from the last checkpoint.

    Without that variable torchrun keeps the store in which ranks find each other, and a rank that is quick finds where
    the others were before.
    """
    process = started(
        [
            *TORCHRUN,
            "--max-restarts=1",
            "--nproc_per_node=2",
            SURVIVE,
            *flags_of(noise, tmp_path, 2),
            "--save_every_steps",
            "1",
        ],
        tmp_path,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    wait_for_step(process, tmp_path, 6)
    for pid in family(tmp_path, b"RANK=1\0"):
        os.kill(pid, signal.SIGKILL)
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0 and "resuming after step" in out, errors
    assert differing(tmp_path, undisturbed[2]) == [] and not (tmp_path / "preempted").exists() and not family(tmp_path)


def test_one_rank_that_is_asked_asks_the_others(noise, tmp_path):
    """SIGUSR1 to the second of two processes alone: both end after the same step with 75."""
    ranks = start(flags_of(noise, tmp_path, 2), tmp_path / "progress")
    wait_for_step(ranks[0], tmp_path, 4)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], errors
    assert "a signal to another process" in (tmp_path / "preempted").read_text() and state_of(tmp_path)["step"] >= 4


def test_a_second_signal_ends_at_once(noise, tmp_path):
    """While the disk hangs; a second one at the same moment, from a launcher that passes it on, is no second one."""
    process = started([sys.executable, SURVIVE, *flags_of(noise, tmp_path, 1)], tmp_path, SLOW_DISK="60")
    wait_for_step(process, tmp_path, 1)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None  # still saving
    os.kill(process.pid, signal.SIGTERM)
    assert seconds_until_all_gone_after(process, tmp_path) < 3
    assert process.returncode == -signal.SIGTERM and not (tmp_path / "preempted").exists()
    process.communicate()


def test_handlers_are_put_back(tmp_path):
    """But where a signal ends the run: what comes right after it, from a launcher that passes it on, is nothing new."""
    before = [signal.getsignal(number) for number in checkpoint.STOP_SIGNALS]
    with StopSignal(marker=tmp_path / "preempted"):
        pass
    assert [signal.getsignal(number) for number in checkpoint.STOP_SIGNALS] == before
    with pytest.raises(Preempted), StopSignal(marker=tmp_path / "preempted") as stop_signal:
        assert not stop_signal.should_stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop_signal.should_stop() and stop_signal.received == "SIGUSR1"
        stop_signal.end()
    for number in checkpoint.STOP_SIGNALS:
        os.kill(os.getpid(), number)
    assert (tmp_path / "preempted").exists()
    with StopSignal(marker=tmp_path / "preempted"):
        assert not (tmp_path / "preempted").exists()


@pytest.mark.parametrize(
    "numbers, code", [(("SIGINT",), 130), (("SIGTERM",), 75), (("SIGUSR1",), 75), (("SIGINT", "SIGTERM"), 130)]
)
def test_the_exit_code_tells_the_signal(tmp_path, numbers, code):
    with pytest.raises(Preempted) as ending, StopSignal(marker=tmp_path / "preempted") as stop_signal:
        for number in numbers:
            os.kill(os.getpid(), signal.Signals[number])
        with pytest.raises(checkpoint.StopRequested):
            stop_signal.check()
        stop_signal.end()
    assert ending.value.code == code and "everything is saved" in str(ending.value)


# -------------------------------------------------------------------------------------------------- signals and folds


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("crops"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_a_fold_is_trained(crops, tmp_path, processes):
    """To all processes of the group; the same command ends with the same probabilities as without."""
    flags = [
        *TINY_FOLDS,
        "--data_dir",
        crops,
        "--epochs",
        "8",
        "--batch_size_per_gpu",
        4 // processes,
        "--num_workers",
        1,
    ]
    launch = [*TORCHRUN, "--nproc_per_node=2"] if processes > 1 else [sys.executable]
    command = [*launch, ROOT / "tests" / "run_lnc.py", *flags, "--output_dir"]
    straight = started([*command, tmp_path / "straight"], tmp_path)
    process = started([*command, tmp_path / "killed"], tmp_path / "killed")
    log, until = tmp_path / "killed" / "0" / "log.txt", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    seconds = seconds_until_all_gone_after(process, tmp_path / "killed")
    _, errors = process.communicate()
    assert seconds < 10 and (process.returncode == 75 or processes > 1), errors
    assert "SIGTERM" in (tmp_path / "killed" / "preempted").read_text()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert straight.communicate(timeout=180) and straight.returncode == 0
    again = started([*command, tmp_path / "killed"], tmp_path / "killed")
    out, errors = again.communicate(timeout=180)
    assert again.returncode == 0 and "resuming after step" in out, errors
    for name in ("predictions.csv", "metrics.json"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert not (tmp_path / "killed" / "preempted").exists()


def test_a_signal_while_masks_are_evaluated(tmp_path, capsys, monkeypatch):
    """Segmentation ends after the windows at hand, in validation and in the test; masks and figures are as without."""
    import main_lts_msd

    monkeypatch.setattr(statistics, "BOOTSTRAP_ROUNDS", 50)
    monkeypatch.setitem(
        ARCHITECTURES, "vit_tiny", functools.partial(VisionTransformer, embed_dim=48, depth=4, num_heads=3)
    )
    for case in range(7):
        label = np.zeros((30, 28, 16), np.uint8)
        label[8 + case : 14 + case, 9:17, 4:10] = 1
        hu = np.random.default_rng(case).normal(-800, 60, label.shape) + 850.0 * label
        for kind, voxels in (("images", hu.astype(np.int16)), ("labels", label)):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "data" / kind / f"case{case}.nii.gz")
    flags = [
        "--arch",
        "vit_tiny",
        "--input_size",
        "24",
        "24",
        "12",
        "--num_workers",
        "0",
        "--k_fold",
        "2",
        "--num_test",
        "3",
        "--epochs",
        "2",
        "--patches_per_case",
        "2",
        "--batch_size_per_gpu",
        "4",
        "--data_dir",
        str(tmp_path / "data"),
    ]

    def run(folder):
        with pytest.raises(SystemExit) as stop:
            utils.run_script(lambda: sys.exit(main_lts_msd.main([*flags, "--output_dir", str(tmp_path / folder)]) or 0))
        return stop.value.code

    segment, calls, signals = main_lts_msd.predict_log_probabilities, [], ()

    def signalled(*args, **named):
        calls.append(1)
        if len(calls) in signals:
            os.kill(os.getpid(), signal.SIGTERM)
        return segment(*args, **named)

    for module in (main_lts_msd, mask_inference):
        monkeypatch.setattr(module, "predict_log_probabilities", signalled)
    assert run("straight") == 0
    total, signals = len(calls), (1, len(calls) - 1)  # of the first validation, and of the last test
    codes = []
    calls.clear()
    while not codes or codes[-1] == 75:
        codes.append(run("broken"))
    assert codes == [75, 75, 0] and len(calls) > total
    for name in ("metrics.json", "cases.csv"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert not (tmp_path / "broken" / "preempted").exists()


# ---------------------------------------------------------------------------------------------------------- two nodes


def test_two_nodes_on_loopback(noise, undisturbed, tmp_path):
    """Two torchrun agents with a process each, as on two machines; interrupted, and then gone on with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for attempt in range(2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc_per_node=1",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{port}",
            f"--rdzv_id={attempt}",
            SURVIVE,
            *flags_of(noise, tmp_path, 2),
        ]
        nodes = [started(command, tmp_path) for _ in range(2)]
        if attempt == 0:
            wait_for_step(nodes[0], tmp_path, 4)
            for node in nodes:
                os.kill(node.pid, signal.SIGTERM)
            assert max(seconds_until_all_gone_after(node, tmp_path) for node in nodes) < 10
            assert (tmp_path / "preempted").exists() and 4 <= state_of(tmp_path)["step"] < 24
        outputs = [node.communicate(timeout=180) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert differing(tmp_path, undisturbed[2]) == []


def test_values_that_differ_late_are_different(tmp_path):
    """Of paths with one long beginning, too; a tuple is the list that it becomes in a checkpoint."""
    long = "/".join(["folder"] * 30)
    state = {"config": {"weights": f"{long}/one.pth", "size": [1, 2, 3]}}
    assert checkpoint.check_state(state, tmp_path, {"weights": f"{long}/one.pth", "size": (1, 2, 3)}) is state
    with pytest.raises(UserError, match="--weights"):
        checkpoint.check_state(state, tmp_path, {"weights": f"{long}/two.pth"})
