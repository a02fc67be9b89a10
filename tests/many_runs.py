"""Run a script many times with two processes for six steps on a busy machine, and count how the processes ended.

    python tests/many_runs.py --script main_dino --runs 100
    python tests/many_runs.py --script main_lnc_luna16 --runs 50
    python tests/many_runs.py --script main_lts_msd --runs 50

Everything is imported once, and each process is a fork of that state: of a run, only the imports are spared.
"""

import argparse
import collections
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch; no thread may run when a process forks

import survive  # noqa: E402
from survive import ROOT  # noqa: E402

DATA = ["--num_workers", "0", "--warmup_epochs", "0", "--drop_path_rate", "0"]
SMALL = [
    "--precision",
    "fp32",
    "--arch",
    "vit_tiny",
    "--input_size",
    "24",
    "24",
    "12",
    "--k_fold",
    "2",
    "--num_test",
    "2",
    "--epochs",
    "3",
    "--max_steps",
    "6",
    *DATA,
]
SCRIPTS = {  # the script that makes the model small, and flags for at least six steps
    "main_dino": ("run_small.py", [*survive.FLAGS, "--epochs", "3", *DATA]),
    "main_lnc_luna16": ("run_lnc.py", [*SMALL, "--batch_size_per_gpu", "1"]),
    "main_lts_msd": (
        "run_lts.py",
        [*SMALL, "--batch_size_per_gpu", "2", "--patches_per_case", "6", "--overlap", "0.1"],
    ),
}


def make_data(script, folder):
    """Small generated data of a script's own kind."""
    if script == "main_dino":
        return survive.make_volumes(folder)
    if script == "main_lnc_luna16":
        from test_main_lnc_luna16 import write_cases

        return write_cases(folder)
    from test_main_lts_msd import phantom, write_case

    for i in range(7):
        write_case(folder, f"lung_{i:03}", *phantom(i, (40, 36, 28)))
    return folder


def fork(script, flags, environment, log):
    """pid of a new process that runs a script, and ends as any Python does; its output goes to the file `log`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.argv = [str(script), *map(str, flags)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def run(script, flags, folder):
    """[exit codes of two ranks], negative for a signal, and what they said; -9 for those that are killed after 10
    minutes."""
    port = survive.free_port()
    logs = [folder / f"rank{rank}.txt" for rank in range(2)]
    ranks = [fork(ROOT / "tests" / script, flags, survive.environment(rank, 2, port), logs[rank]) for rank in range(2)]
    codes, until = {}, time.monotonic() + 600
    while len(codes) < 2:
        for rank in set(ranks) - codes.keys():
            if time.monotonic() > until:
                os.kill(rank, 9)
            ended, status = os.waitpid(rank, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[rank] for rank in ranks], [log.read_text(errors="replace") for log in logs]


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=SCRIPTS, default="main_dino")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--busy", type=int, default=4, help="other busy processes")
    return parser


def main():
    args, parent = get_args_parser().parse_args(), os.getpid()
    sys.path.insert(0, str(ROOT))
    folder, counts, began = Path(tempfile.mkdtemp(prefix="many_runs")), collections.Counter(), time.monotonic()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        data = make_data(args.script, folder / "data")
        from torch.utils import tensorboard  # noqa: F401

        __import__(args.script)
        script, flags = SCRIPTS[args.script]
        for number in range(args.runs):
            out = folder / "run"
            codes, said = run(script, [*flags, "--data_dir", data, "--output_dir", out], folder)
            counts[tuple(codes)] += 1
            if codes != [0, 0] or not (out / "config.json").is_file():
                print(f"run {number + 1}: exit codes {codes}", *said, sep="\n", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    finally:
        if os.getpid() == parent:  # and not a fork that ends
            for process in busy:
                process.kill()
            shutil.rmtree(folder)
    print(
        f"{args.script}: {sum(counts.values())} runs with {args.busy} busy processes beside them, "
        f"{time.monotonic() - began:.0f} s; exit codes of the two ranks: "
        + ", ".join(f"{list(codes)} {count} times" for codes, count in counts.items())
    )
    sys.exit(counts.keys() != {(0, 0)})


if __name__ == "__main__":
    main()
