"""How the processes of a run find each other: what torchrun, srun or a hand sets in the environment, and a meeting."""

import itertools
import re
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from dino3d.command_line import UserError

TOLD_AFTER = 10.0  # seconds of waiting for others before a line says so
LIMIT = 300.0  # seconds until the run ends where some don't come
POLL = 0.3  # seconds
GIVING_UP = 2.0  # seconds in which the others learn that the run ends
SPECIAL_STEPS = 0xFFFFFFF0  # from here on Slurm numbers its own: the batch script, an interactive shell, ...
HOW = "start all of them (torchrun, srun), or unset RANK and WORLD_SIZE for one process"


class Launch(NamedTuple):
    """Who a process is. by_torchrun: whether torchrun has made the meeting point; by_srun; notice: "" or a line"""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    by_torchrun: bool = False
    by_srun: bool = False
    notice: str = ""


def read_environment(env: Mapping[str, str]) -> tuple[Launch, dict[str, str]]:
    """(Launch, what to add to the environment for it) of what a launcher has set. Raises UserError."""
    if "RANK" in env or "WORLD_SIZE" in env:
        rank, world_size = whole_number(env, "RANK"), whole_number(env, "WORLD_SIZE")
        local = whole_number(env, "LOCAL_RANK", 0), whole_number(env, "LOCAL_WORLD_SIZE", 1)
        check_rank("RANK", rank, "WORLD_SIZE", world_size)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if world_size > 1 and not env.get(name):
                raise UserError(f"RANK and WORLD_SIZE are set, {name} is not: set it to where rank 0 is; or {HOW}")
        return Launch(rank, world_size, *local, by_torchrun="TORCHELASTIC_RUN_ID" in env), {}
    # sbatch --nodes=2 --ntasks-per-node=4 sets no SLURM_NTASKS
    by_node = whole_number(env, "SLURM_NTASKS_PER_NODE", 1) * whole_number(env, "SLURM_JOB_NUM_NODES", 1)
    tasks = whole_number(env, "SLURM_STEP_NUM_TASKS", whole_number(env, "SLURM_NTASKS", by_node))
    if tasks < 2 or "SLURM_PROCID" not in env:
        return Launch(), {}
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    if not step.isdecimal() or int(step) >= SPECIAL_STEPS:  # nobody starts the other tasks
        return Launch(
            notice=f"one process, though this Slurm job has {tasks} tasks: srun did not start it (for all of them: "
            "srun python ...)"
        ), {}
    node = whole_number(env, "SLURM_NODEID", 0)
    here = tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    launch = Launch(
        whole_number(env, "SLURM_PROCID"),
        tasks,
        whole_number(env, "SLURM_LOCALID", 0),
        here[node] if node < len(here) else whole_number(env, "SLURM_NTASKS_PER_NODE", 1),
        by_srun=True,
    )
    check_rank("SLURM_PROCID", launch.rank, "SLURM_STEP_NUM_TASKS", tasks)
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    port = 20000 + (37 * whole_number(env, "SLURM_JOB_ID", 0) + int(step)) % 12000  # below those that systems give away
    address = env.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        raise UserError("SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the first host of this srun")
    return launch, {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
    }


def check_rank(name: str, rank: int, size: str, world_size: int) -> None:
    """UserError for a rank that a run of this size has not, as a job of several components may give."""
    if not 0 <= rank < world_size:
        raise UserError(f"{name} is {rank} and {size} is {world_size}: expected a rank below the size; {HOW}")


def whole_number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A whole number of the environment. Raises UserError."""
    text = env.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        found = f"is '{text}'" if name in env else "is not set"
        raise UserError(f"{name} {found}: expected a whole number from the launcher; {HOW}") from None


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it, such as gpu[003-005,7],login1: gpu003; "" of an empty one."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())[0]  # commas inside brackets belong to the host
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first).strip()


def tasks_of_nodes(text: str) -> list[int]:
    """Tasks of each node, of a list as Slurm writes it: 2(x3),1 is [2, 2, 2, 1]; empty where it is something else."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()) for part in text.split(",")]
    if not all(parts):
        return []
    return list(itertools.chain.from_iterable([int(part[1])] * int(part[2] or 1) for part in parts))


def meet(rank: int, world_size: int, address: str, port: str) -> dist.Store:
    """The store of a run whose processes have all come to its meeting point, where rank 0 is.

    Says after ten seconds that it waits. Raises UserError where not all come within minutes.
    """
    where, began, told = f"{address}:{port}", time.monotonic(), False

    def waited(missing: str, tell: bool = True) -> bool:
        """A pause, and a line when it has become long; whether it is enough."""
        nonlocal told
        seconds = time.monotonic() - began
        if tell and seconds > TOLD_AFTER and not told:
            told = True
            print(f"waiting at {where} for {missing} to join", file=sys.stderr, flush=True)
        time.sleep(POLL)
        return seconds > LIMIT

    try:
        socket.getaddrinfo(address, int(port))
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{where} (MASTER_ADDR and MASTER_PORT), where rank 0 is: can't be found ({error})") from error
    while rank and not answers(address, int(port)):
        if waited("rank 0"):
            raise UserError(f"rank 0 has not come to {where} in {LIMIT:.0f} s: {HOW}")
    try:
        limit = timedelta(seconds=LIMIT)
        store = dist.TCPStore(address, int(port), world_size, not rank, limit, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if rank:
            raise
        reason = str(error).rpartition("message: ")[2].splitlines()[0]
        raise UserError(f"rank 0 can't listen at {where} ({reason}): set MASTER_PORT to a free one") from error
    joined = store.add("joined", 1)
    while joined < world_size:
        missing = f"{world_size - joined} of {world_size} processes"
        enough = waited(missing, tell=not rank)
        if enough and not rank:
            store.add("given up", 1)
            time.sleep(GIVING_UP)  # meanwhile the others see that
        if enough and not rank or store.add("given up", 0):
            raise UserError(f"{missing} have not come to {where} in {LIMIT:.0f} s: {HOW}", everywhere=True)
        joined = store.add("joined", 0)
    return store


def answers(address: str, port: int) -> bool:
    """Whether somebody listens there. torch's own client would fill the console until it is so."""
    try:
        with socket.create_connection((address, port), timeout=5):
            return True
    except OSError:
        return False
