"""Where jobs can run: the GPUs and CPU cores of this machine, in slots of one job each. Imports no torch."""

import glob
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dino3d.command_line import UserError
from dino3d.files import TEXT

MOST_WORKERS = 16  # of a process, to load data
# What a launcher sets, which a job would take for its own
LAUNCHERS_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


class Slot(NamedTuple):
    """Where one job runs at a time. gpus: as CUDA_VISIBLE_DEVICES names them, none on CPUs; threads: of each process;
    workers: of each process, to load data"""

    gpus: tuple[str, ...]
    threads: int
    workers: int

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """The environment of a job in this slot."""
        kept = {
            name: value
            for name, value in env.items()
            if name not in LAUNCHERS_VARIABLES and not name.startswith("TORCHELASTIC_")
        }
        here = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return kept | {"OMP_NUM_THREADS": str(self.threads)} | here


def require_one_process(env: Mapping[str, str]) -> None:
    """Raise UserError where a launcher has started several of this process."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if env.get(name, "1") not in ("", "1"):
            raise UserError(
                f"{name} is {env[name]}: study.py starts the processes of its jobs itself; start it once (python "
                "study.py), with --processes_per_job for several of a job, or --job for each task of a Slurm array",
                everywhere=True,
            )


def visible_gpus(env: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, by their numbers or names."""
    if "CUDA_VISIBLE_DEVICES" in env:
        named = [name.strip() for name in env["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in named if name and name != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
        count = sum(line.startswith("GPU ") for line in listed.splitlines())
    except (OSError, subprocess.TimeoutExpired):  # containers may have the driver alone
        count = len(glob.glob("/dev/nvidia[0-9]*"))
    return [str(i) for i in range(count)]


def cpu_name() -> str:
    """What this machine's processor is called."""
    try:
        lines = Path("/proc/cpuinfo").read_text(**TEXT).splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system than Linux, or a processor that gives no name
        return platform.processor() or platform.machine()


def device_of_slots(slots: Sequence[Slot]) -> str:
    """What the jobs of some slots run on."""
    if not slots or not slots[0].gpus:
        return cpu_name()
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", slots[0].gpus[0]]
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip() or "GPU"
    except (OSError, subprocess.TimeoutExpired):  # containers may have the driver alone
        return "GPU"


def make_slots(
    gpus: list[str], cores: int, processes: int, threads: int, parallel: int | None, memory: int | None = None
) -> list[Slot]:
    """The slots of this machine. processes: of a job; threads: of a process on CPUs; parallel: jobs at once, None: as
    many as there are GPUs or cores for; memory: as many as fit there, None: unknown. Raises UserError."""
    if gpus:
        groups = [tuple(gpus[i : i + processes]) for i in range(0, len(gpus) - processes + 1, processes)]
        if not groups:
            raise UserError(f"--processes_per_job {processes}: needs as many GPUs, and this machine has {len(gpus)}")
        count = parallel or len(groups)
        share = max(1, cores // (count * processes))
        return [Slot(groups[i % len(groups)], share, min(MOST_WORKERS, share)) for i in range(count)]
    count = parallel or max(1, min(cores // (processes * threads), memory or cores))
    return [Slot((), threads, max(0, min(MOST_WORKERS, cores // (count * processes) - threads)))] * count


def memory_for(peak: int) -> int | None:
    """How many processes of a peak memory, in bytes, fit into what is free, at least 1; None where that is unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None
    return max(1, int(0.9 * free // peak)) if peak else None
