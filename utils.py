"""What the scripts share: errors in one line, processes, seeds, schedules, parameter groups, logs."""

import contextlib
import dataclasses
import gc
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  DDP imports it, and its functions keep the process group that they find then
from torch import Tensor, nn

from dino3d.command_line import UserError, exit_status
from dino3d.launch import meet, read_environment
from dino3d.malloc import keep_freed_memory
from dino3d.mixed_precision import multiplies_bf16
from dino3d.run_lock import own_folder
from dino3d.weights import load_config, load_file, load_pretrained_weights  # noqa: F401  users import them from here

EXIT_FILES = 124  # of a loader's reading process that may open no more files
# What a run writes before its first step: where nothing else is there, a start has failed
BEFORE_TRAINING = ("data_list.txt", "config.json", "splits.json", "probe.json", "events.out.tfevents.*")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ------------------------------------------------------------------------------------------------- errors and flags


def run_script(main: Callable[[], None]) -> None:
    """Call main() and end in order: on an expected failure with one line and exit code 1, on a signal with 75.

    A thread of the process group that frees the last reference to a tensor needs the interpreter, and aborts the
    process if it finds it ending: so whatever refers to the group goes first, then the group with its threads.
    """

    keep_freed_memory()

    def main_together() -> None:
        main()
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still needs it

    try:
        # When it returns, an exception is gone, and with it the frames that refer to the group
        code, together = exit_status(main_together, explain)
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        code, together = 1, False
    if together:
        leave_group()
    elif dist.is_initialized():  # to join its threads would be to wait for the others, which may never answer them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def explain(error: Exception) -> str | None:
    """One line for what torch raises without a bug of ours; None for anything else."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory, lower --batch_size_per_gpu ({str(error).splitlines()[0]})"
    if isinstance(error, RuntimeError) and is_worker_death(error):
        return worker_death(error)
    if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error):
        return "another process of this run has ended, its own message says why"
    return None


def leave_group() -> None:
    """Destroy the process group, which joins its threads unless anything still refers to it."""
    if dist.is_initialized():
        gc.collect()  # of what main() made, DDP refers to it, and may be part of a cycle
        dist.destroy_process_group()


def choose_precision(
    precision: str | None, use_fp16: bool | None, processes: "Processes", resumed: Path | None = None
) -> tuple[str, list[str]]:
    """The precision to use, the same on all ranks, and notices.

    precision, use_fp16: the flags, None where they are not given
    resumed: checkpoint of a run that is resumed where the file is there, and keeps its precision
    """
    notices, on_cpu = [], processes.device.type == "cpu"
    if use_fp16 is not None:
        precision = precision or (None if use_fp16 else "fp32")
        notices.append(
            "--use_fp16 is now --precision: "
            + ("mixed precision is the default where the device has it" if use_fp16 else "false stands for fp32")
        )
    if precision == "fp16" and on_cpu:
        raise UserError("--precision fp16 needs a GPU; on a CPU take fp32 or bf16", everywhere=True)
    default, why = precision or "", ""
    if on_cpu and not precision:
        able = processes.all_gather(multiplies_bf16())
        default = "bf16" if all(able) else "fp32"
        some = "" if not any(able) or all(able) else f" of {able.count(False)} of {len(able)} processes"
        why = f"the CPUs{some} {'multiply in' if all(able) else 'have no instructions for'} bf16"
    elif not precision:
        default = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        why = f"the default of a GPU {'with' if default == 'bf16' else 'without'} bf16"
    before = processes.run_on_main(lambda: precision_of_run(resumed, on_cpu)) if resumed else None
    if before == "fp16" and on_cpu:
        why += ", and fp16, in which the run was trained before, needs a GPU"
    elif before:
        default, why = before, "in which the run was trained before"
    if precision is None:
        notices.append(f"--precision {default}: {why}")
    elif before and precision != before:
        notices.append(f"--precision {precision}: the run was trained in {before} before")
    return precision or default, notices


def precision_of_run(path: Path, on_cpu: bool) -> str | None:
    """That of the run whose checkpoint is at `path`, or an earlier one beside it; None where there is none.

    Older versions, which did not note it, trained in single precision on CPUs.
    """
    for one in (path, *sorted(path.parent.glob(f"{path.stem}.[0-9]*{path.suffix}"))):
        config = load_config(one) if one.is_file() else None
        if config:
            found = config.get("precision") or ("fp32" if on_cpu else None)
            return found if found in PRECISIONS else None
    return None


# --------------------------------------------------------------------------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class Processes:
    """Who we are among the processes of a run: one per GPU, or any number on CPUs. A lone process is a world of one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, line: str) -> None:
        """Print a line, on the main process alone."""
        if self.is_main:
            print(line, flush=True)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over all ranks, in place."""
        return self.sum(tensor).div_(self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_async(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to average over all ranks, in place; returns a function that gives the mean, without a GPU's host
        waiting."""
        if self.world_size == 1:
            return lambda: tensor
        work = dist.all_reduce(tensor, async_op=True)
        return lambda: work.wait() and tensor.div_(self.world_size)

    def any_rank_async(self, flag: bool) -> Callable[[], bool]:
        """Start to ask whether `flag` is true on any rank; returns a function that waits for the answer.

        Until then neither a GPU nor its host waits: the answer may be fetched a step later.
        """
        if self.world_size == 1:
            return lambda: flag
        count = torch.full((1,), float(flag), device=self.device)
        work = dist.all_reduce(count, async_op=True)
        if self.device.type == "cpu":
            return lambda: work.wait() and count.item() > 0
        work.wait()  # on a GPU the stream waits, not the host
        count, there = count.to("cpu", non_blocking=True), torch.cuda.Event()
        there.record()
        return lambda: there.synchronize() or count.item() > 0

    def stack(self, tensor: Tensor) -> Tensor:
        """(world_size, ...) the tensors of all ranks, of one shape, without gradients."""
        if self.world_size == 1:
            return tensor[None]
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(tensors, tensor)
        return torch.stack(tensors)

    def all_gather(self, value: Any) -> list[Any]:
        """[value of rank 0, of rank 1, ...] on every rank; any value that pickle can store, of any size."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, bit for bit, in CPU memory. tensor: elsewhere of its shape and type, maybe on meta."""
        if self.world_size == 1 or not tensor.numel():
            return tensor if self.is_main else torch.empty_like(tensor, device="cpu")
        if self.is_main:
            dist.broadcast(tensor.detach().contiguous().view(-1).view(torch.uint8).to(self.device), src=0)
            return tensor
        # as bytes: backends differ in the types that they know
        received = torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8, device=self.device)
        dist.broadcast(received, src=0)
        found = received.cpu().view(tensor.dtype).view(tensor.shape)
        return found if tensor.is_contiguous() else torch.empty_like(tensor, device="cpu").copy_(found)

    def run_on_main(self, make: Callable[[], Any]) -> Any:
        """make() as rank 0 finds it, on every rank; what goes wrong there is a UserError on all of them."""
        result = [None, None]
        if self.is_main:
            try:
                result[0] = make()
            except (UserError, OSError) as error:
                result[1] = str(error)
        if self.world_size > 1:
            dist.broadcast_object_list(result, device=self.device)
        if result[1] is not None:
            raise UserError(result[1], everywhere=True)
        return result[0]


def distributed_init() -> Processes:
    """Join the run that torchrun or srun started (NCCL on GPUs, gloo on CPUs), or be a single process."""
    launch, added = read_environment(os.environ)
    os.environ.update(added)
    if launch.notice:
        print(f"note: {launch.notice}", file=sys.stderr, flush=True)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        index = choose_gpu(launch.local_rank, launch.local_world_size, count, launch.by_srun)
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if launch.world_size > 1:
        rank, size, store = launch.rank, launch.world_size, None
        if not launch.by_torchrun:
            store = meet(rank, size, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank if store else -1,
            world_size=size if store else -1,
            device_id=device if device.type == "cuda" else None,
        )
    return Processes(launch.rank, launch.world_size, launch.local_rank, launch.local_world_size, device)


@contextlib.contextmanager
def own_output_dir(path: Path, processes: Processes, flag: str = "--output_dir") -> Iterator[None]:
    """Make a run's --output_dir and keep other runs out of it while the block runs. Raises UserError, on all ranks.

    A block that fails before it has written anything of use leaves no folder that was not there.
    """
    with contextlib.ExitStack() as stack:
        processes.run_on_main(lambda: stack.enter_context(own_folder(path, flag, BEFORE_TRAINING)))
        yield


def choose_gpu(local_rank: int, local_world_size: int, visible: int, by_srun: bool) -> int:
    """Index of the GPU of a process among those it sees; UserError where there is none for it."""
    if by_srun and visible == 1:  # srun --gpus-per-task=1 shows each process its own alone
        return 0
    if local_rank >= visible:
        raise UserError(
            f"process {local_rank} of this machine finds no GPU of its own: {visible} GPU(s) for "
            f"{local_world_size} processes; start as many processes as there are GPUs"
        )
    return local_rank


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def is_worker_death(error: Exception) -> bool:
    """Whether a RuntimeError is how torch tells that a loader's reading process is gone: in next() or, from its
    handler of signals, anywhere in the main thread."""
    return "DataLoader worker" in str(error)


def worker_death(error: Exception) -> str:
    if f"exit code {EXIT_FILES}" in str(error):
        return "a reading process may open no more files: allow more (ulimit -n 4096), or lower --num_workers"
    return (
        f"a reading process died ({str(error).splitlines()[0]}): if memory or /dev/shm ran out, lower --num_workers or "
        "--batch_size_per_gpu"
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for what a model draws in one step (stochastic depth): a run that is resumed draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


# ------------------------------------------------------------------------------------------------------ optimisation


def cosine_schedule(
    at: float, start: float, end: float, total: float, warmup: float = 0.0, warmup_start: float = 0.0
) -> float:
    """Linear from warmup_start to `start` while at < warmup, then half a cosine to `end` at `total`.

    at, total and warmup are in samples. Defined for every at >= 0 and any warmup, one longer than `total` included.
    """
    if at < warmup:
        return warmup_start + (start - warmup_start) * at / warmup
    progress = min(1.0, (at - warmup) / max(total - warmup, 1))
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear_schedule(at: float, start: float, end: float, length: float) -> float:
    """Linear from start to `end` over `length` samples, then constant."""
    return end if at >= length else start + (end - start) * at / length


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two optimizer groups: with weight decay, and without it for biases, norms, pos_embed and cls_token."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if decays(name, p)]},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for this parameter: not for biases, norms, pos_embed and cls_token."""
    return parameter.ndim > 1 and not name.endswith((".bias", "pos_embed", "cls_token"))


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum or LARS; learning rates are set at every step."""
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if name == "sgd":
        return LARS(groups, trust=None)
    return LARS(groups)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled layer by layer to the weights' norm (You et al. 2017, eq. 6).

    Biases and norms (one-dimensional parameters) take the plain step. Weight decay is added to the gradient.
    trust: the layer's step relative to its weights; None: plain SGD with momentum
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float | None = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        skipped = getattr(self, "found_inf", None)  # see nonfinite.step_if_finite

        def unless_skipped(new: Tensor, old: Tensor) -> Tensor:
            return new if skipped is None else torch.where(skipped > 0, old, new)

        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                step = p.grad
                if p.ndim > 1:
                    step = step.add(p, alpha=group["weight_decay"])
                if p.ndim > 1 and group.get("trust"):
                    weight, gradient = torch.linalg.vector_norm(p), torch.linalg.vector_norm(step)
                    scaled = group["trust"] * weight / gradient
                    step = step * torch.where((weight > 0) & (gradient > 0), scaled, torch.ones_like(scaled))
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.copy_(unless_skipped(momentum * group["momentum"] + step, momentum))
                p.copy_(unless_skipped(p.sub(momentum, alpha=group["lr"]), p))
        return loss


# -------------------------------------------------------------------------------------------------------------- logs


class Silent:
    """Takes any call and does nothing: the logger and the progress bar of the ranks that don't speak."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
