"""A checkpoint on two ranks, read by rank 0 alone: run_broadcast.py CHECKPOINT RANK PORT, for test_broadcasting.py.

Prints, on each rank, a digest of all that it got, or the error.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import utils  # noqa: E402
from dino3d.command_line import UserError  # noqa: E402
from dino3d.training import checkpoint  # noqa: E402


def described(value):
    """All of a state as text: of tensors bytes, type, shape and strides."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().view(-1).view(torch.uint8).tolist()
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.device}{data}"
    if isinstance(value, dict):
        return repr({name: described(one) for name, one in value.items()})
    if isinstance(value, (list, tuple)):
        return repr([type(value).__name__, *map(described, value)])
    return repr(value)


def main():
    path, rank, port = sys.argv[1:]
    os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes = utils.distributed_init()
    reads, load_file = [], checkpoint.load_file
    checkpoint.load_file = lambda path: reads.append(path) or load_file(path)
    for name in (path, path + ".missing", path + ".damaged"):
        try:
            state = checkpoint.load_on_all(name, processes, {"arch": "a"}, ("model",))
            print(described(state))
        except UserError as error:
            print(f"{error.args[0]} {error.everywhere}")
        print(len(reads), file=sys.stderr)


utils.run_script(main)
