"""Kill a run of two processes again and again, and see that it ends with the weights of one that nobody disturbed.

    python tests/survive.py --kills 20

Each time the whole process group gets SIGKILL in the middle of training, at a random step and moment or, every other
time, while a checkpoint is being written; then the same command is started again. Student, teacher, optimizer and
centre must at last be those of an undisturbed run, bit for bit. Kills that did not hit training are not counted.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--precision",
    "fp32",
    "--arch",
    "vit_tiny",
    "--input_size",
    "24",
    "24",
    "12",
    "--local_crops_scale",
    "0.5",
    "--local_crops_number",
    "2",
    "--out_dim",
    "64",
    "--log_every",
    "2",
    "--warmup_epochs",
    "1",
    "--saveckp_freq",
    "0",
    "--batch_size_per_gpu",
    "2",
    "--drop_path_rate",
    "0.3",
    "--save_every_steps",
    "2",
    "--num_workers",
    "1",
]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(rank, processes, port):
    """What a launcher tells a process of a run on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def start(flags, progress, processes=2, script="run_survive.py"):
    """[Popen] of the ranks of a run, in one process group whose number is the first one's pid."""
    port = free_port()
    progress.unlink(missing_ok=True)
    ranks, group = [], 0
    for rank in range(processes):
        told = os.environ | environment(rank, processes, port) | {"PROGRESS": str(progress)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / script), *map(str, flags)],
                env=told,
                process_group=group,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        group = group or ranks[0].pid
    return ranks


def step_of(progress):
    """The step that a run has just finished, or 0."""
    try:
        return int(progress.read_text() or 0)
    except FileNotFoundError:
        return 0


def kill_at(ranks, progress, part, steps, aimed, rng, limit=180):
    """Kill all ranks `steps` steps or more after the first that they take, and return the step; None if they end
    before.

    aimed: wait for the file `part` of a checkpoint that is being written
    """
    first, until = 0, time.monotonic() + limit
    while time.monotonic() < until:
        if any(rank.poll() is not None for rank in ranks):
            return None
        first = first or step_of(progress)
        if first and step_of(progress) >= first + steps:
            break
        time.sleep(0.002)
    if aimed:
        while not part.exists() and all(rank.poll() is None for rank in ranks):
            pass
        time.sleep(rng.uniform(0, 0.01))
    else:
        time.sleep(rng.uniform(0, 0.3))
    alive = all(rank.poll() is None for rank in ranks)
    os.killpg(ranks[0].pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()
    return step_of(progress) if alive else None


def state_of(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def differences(one, two, name="state"):
    """Names of all in which two states differ in a bit."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [name]
    if isinstance(one, (dict, list, tuple)):
        keys = list(one) if isinstance(one, dict) else range(len(one))
        if len(one) != len(two) or (isinstance(one, dict) and one.keys() != two.keys()):
            return [name]
        return [found for key in keys for found in differences(one[key], two[key], f"{name}.{key}")]
    return [] if one == two else [name]


def survive(folder, data, kills, epochs, seed=0, say=print):
    """Kill a run `kills` times and compare it with an undisturbed one.

    Returns [{"step", "last_step", "writing", "seconds"}] of each kill that hit training, and the differences at the
    end.
    """
    rng, record = random.Random(seed), []
    progress, flags = folder / "progress", [*FLAGS, "--data_dir", data, "--epochs", epochs]
    undisturbed = start([*flags, "--output_dir", folder / "undisturbed"], progress)
    errors = [rank.communicate()[1] for rank in undisturbed]
    assert all(rank.returncode == 0 for rank in undisturbed), errors
    expected, killed = state_of(folder / "undisturbed"), folder / "killed"
    part = killed / "checkpoint.pth.part"
    pace = max(1, int(0.8 * expected["step"] / kills))  # steps between kills at most, so that the run outlives them
    while True:
        ranks, began = start([*flags, "--output_dir", killed], progress), time.monotonic()
        if len(record) == kills:
            break
        part.unlink(missing_ok=True)
        step = kill_at(ranks, progress, part, rng.randint(1, pace), len(record) % 2 == 1, rng)
        if step is None:  # it ended first
            break
        if 0 < step < expected["step"]:
            record.append(
                {
                    "step": step,
                    "last_step": expected["step"],
                    "writing": part.exists(),
                    "seconds": round(time.monotonic() - began, 1),
                }
            )
            say(
                f"kill {len(record)}: after step {step} of {expected['step']}"
                + (", a checkpoint was being written" if part.exists() else ""),
                flush=True,
            )
    errors = [rank.communicate()[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), errors
    found = state_of(killed)
    return record, [
        name
        for part in ("student", "teacher", "optimizer", "dino_loss", "step", "samples", "epoch")
        for name in differences(expected[part], found[part], part)
    ]


def make_volumes(folder, count=8):
    """Volumes of noise in the pre-training layout."""
    sys.path.insert(0, str(ROOT))
    from dino3d.data.hdf5 import write_volume

    for i in range(count):
        voxels = np.random.default_rng(i).normal(-300, 400, (60, 56, 36)).astype(np.int16)
        write_volume(folder / f"patient{i}" / "t0" / "scan.hdf5", voxels, np.eye(4))
    return folder


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=None, help="of 2 steps; default: 6 per kill")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main():
    args = get_args_parser().parse_args()
    folder = Path(tempfile.mkdtemp(prefix="survive"))
    try:
        data, epochs = make_volumes(folder / "data"), args.epochs or 6 * args.kills
        record, different = survive(folder, data, args.kills, epochs, args.seed)
    finally:
        shutil.rmtree(folder)
    writing = sum(kill["writing"] for kill in record)
    print(
        f"{len(record)} kills inside training, {writing} of them while a checkpoint was being written; "
        "different at the "
        f"end: {', '.join(different[:5]) or 'nothing'}"
    )
    sys.exit(bool(different) or len(record) < args.kills)


if __name__ == "__main__":
    main()
