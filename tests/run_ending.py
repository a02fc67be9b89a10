"""A run of several processes that ends in the way it is told: run_ending.py HOW.

Many collectives are under way when it ends, of tensors that nothing else refers to, and the model is part of a cycle. A
rank that gets so far writes "threads" and the names of the threads that it has left to standard error.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: E402
from dino3d import command_line  # noqa: E402

how = sys.argv[1]


def main():
    processes = utils.distributed_init()
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    network.itself = [network]
    network(torch.ones(2, 8)).sum().backward()
    for _ in range(200):
        dist.all_reduce(torch.ones(8), async_op=True)
    if how == "preempted":
        raise command_line.Preempted("ended by a test", 75)
    if how == "together":
        raise command_line.UserError("the same on all ranks", everywhere=True)
    if how in ("alone", "bug", "interrupted") and not processes.is_main:
        error = {
            "alone": command_line.UserError("of one rank"),
            "bug": ZeroDivisionError(),
            "interrupted": KeyboardInterrupt(),
        }
        raise error[how]
    if how in ("alone", "bug", "interrupted"):
        processes.all_gather(0)  # where the others aren't


try:
    utils.run_script(main)
finally:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print("threads", *sorted(names), file=sys.stderr, flush=True)
    rubbish = [[] for _ in range(500_000)]  # so that the interpreter takes a while to end
