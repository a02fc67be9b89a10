"""A training step on ready views: its time and memory beside the plain one, its operators, its FLOP."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import main_dino
import utils
from dino3d import transformer_block
from dino3d.benchmarks import baselines
from dino3d.benchmarks.scans import GLOBAL, LOCAL_NUMBER, VIEWS
from dino3d.benchmarks.turns import comparison, ratio_within_turns, seconds_until_done, sources, take_turns, until_done
from dino3d.block_masks import BlockMasks, collate_masks
from dino3d.command_line import UserError
from dino3d.malloc import keep_freed_memory
from dino3d.training.monitor import peak_memory
from dino3d.training.nonfinite import NonFiniteSteps
from dino3d.training.operators import count_operators
from utils import PRECISIONS
from vision_transformer import MultiCropWrapper, has_setting

PATCH_SIZE = (12, 12, 6)
VALUES = {
    "lr": 0.0005,
    "weight_decay": 0.04,
    "momentum_teacher": 0.996,
    "teacher_temp": 0.04,
}  # of every step's schedules
CLOSE = {"fp32": 1e-4, "bf16": 0.05}  # relative difference that two ways to take a step may have in their first loss
# Whose cost a step's benchmark tells, with the weights that DINOv2 gives them
OBJECTIVES = {
    "--centering sinkhorn": {"centering": "sinkhorn"},
    "--koleo 0.1": {"koleo": 0.1},
    "--ibot 1": {"ibot": 1.0},
}


def step(
    device: str, repeats: int, arch: str, out_dim: int, batch_size: int, precision: str, compile: bool
) -> dict[str, Any]:
    """A whole training step on ready views: teacher, student, loss, backward pass, clipping, AdamW, teacher's
    average; and what each further objective adds to it."""
    settings = {"arch": arch, "out_dim": out_dim, "batch_size": batch_size, "device": device, "precision": precision}
    sides = {"baseline": baseline_step(**settings), "ours": our_step(**settings, compiled=compile)}
    first, ours = (float(take()) for take in sides.values())
    if not abs(ours - first) <= CLOSE[precision] * abs(first):
        raise UserError(f"the first losses differ: {first} of the baseline, {ours} of ours")
    for flags, objective in OBJECTIVES.items():
        possible = {"koleo": batch_size > 1, "ibot": has_setting(arch, "patch_size"), "centering": True}
        if all(possible[name] for name in objective):
            sides[flags] = our_step(**settings, compiled=compile, objective=objective)
    times = take_turns({name: (until_done(take, device), batch_size) for name, take in sides.items()}, repeats)
    del sides
    memory = {
        "baseline": step_memory("baseline", settings),
        "ours": step_memory("ours", settings | {"compiled": compile}),
    }
    flops = flops_per_sample(arch, out_dim)
    result = comparison(
        1,
        "seconds per sample",
        times,
        {
            "baseline": f"{memory['baseline']:5.2f} GiB: MONAI's network, eager, the step written out; {precision}",
            "ours": f"{memory['ours']:5.2f} GiB: main_dino.train_step" + ", compiled" * compile + f"; {precision}",
        },
        sources(baselines.plain_step, baselines.Model, baselines.monai_encoder, baselines.ViT),
        {
            "data": "random views",
            "views": VIEWS,
            "repeats": repeats,
            **settings,
            "peak_memory_gib": memory,
            "gflop_per_sample": flops / 1e9,
        },
    )
    result["teraflops"] = flops / result["ours"] / 1e12
    result["operators"] = step_operators(arch, out_dim, precision)
    result["objectives"] = {}
    for flags in filter(times.get, OBJECTIVES):
        ratio, *spread = ratio_within_turns(times[flags], times["ours"])
        result["objectives"][flags] = {"ratio": ratio, "spread": spread}
    return result


def random_views(
    batch_size: int,
    device: str | torch.device,
    size: Sequence[int] = GLOBAL,
    local_number: int = LOCAL_NUMBER,
    local: Sequence[int] | None = None,
) -> list[Tensor]:
    """[global (2 B, 1, x, y, z), local (L B, 1, x, y, z)] of grey values in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    local = local or [n // 4 for n in size]
    shapes = [(2 * batch_size, 1, *size), (local_number * batch_size, 1, *local)][: 1 + bool(local_number)]
    return [torch.rand(shape, generator=generator).to(device) for shape in shapes]


def new_model(
    arch: str,
    out_dim: int,
    size: Sequence[int] = GLOBAL,
    patch_size: Sequence[int] = PATCH_SIZE,
    ibot: bool = False,
    drop_path_rate: float | None = None,
) -> MultiCropWrapper:
    """A student or teacher as main_dino.py makes it, where the architecture has patches with those of `patch_size`."""
    patch_size = patch_size if has_setting(arch, "patch_size") else None
    return main_dino.build_model(arch, size, patch_size, out_dim, False, drop_path_rate, True, ibot=ibot)


def our_state(
    arch: str,
    out_dim: int,
    batch_size: int,
    device: str,
    precision: str,
    compiled: bool = False,
    size: Sequence[int] = GLOBAL,
    objective: Mapping[str, Any] = MappingProxyType({}),
    patch_size: Sequence[int] = PATCH_SIZE,
    drop_path_rate: float | None = None,
) -> main_dino.TrainState:
    """What main_dino.py's steps need, as its defaults have it but for stochastic depth. objective: of OBJECTIVES"""
    torch.manual_seed(0)
    weight, targets = objective.get("ibot", 0.0), (out_dim, 0.9, objective.get("centering", "mean"))
    student = new_model(arch, out_dim, size, patch_size, weight > 0, drop_path_rate)
    teacher = new_model(arch, out_dim, size, patch_size, weight > 0)
    teacher.load_state_dict(student.state_dict())
    device = torch.device(device)
    student, teacher = student.to(device), teacher.to(device).requires_grad_(False)
    for notice in main_dino.compile_blocks((student, teacher), device) if compiled else ():
        raise UserError(notice)
    return main_dino.TrainState(
        network=student,
        student=student,
        teacher=teacher,
        dino_loss=main_dino.DINOLoss(*targets).to(device),
        koleo=objective.get("koleo", 0.0),
        ibot=main_dino.PatchLoss(weight, *targets, main_dino.STUDENT_TEMP).to(device) if weight else None,
        optimizer=utils.make_optimizer("adamw", utils.parameter_groups(student)),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        schedules=None,
        crops=None,
        clip_range=None,
        dtype=PRECISIONS[precision],
        clip_grad=3.0,
        global_batch=batch_size,
        seed=0,
        processes=utils.Processes(device=device),
        nonfinite=NonFiniteSteps(20, device),
    )


def our_step(
    arch: str,
    out_dim: int,
    batch_size: int,
    device: str,
    precision: str,
    compiled: bool = False,
    size: Sequence[int] = GLOBAL,
    local_number: int = LOCAL_NUMBER,
    objective: Mapping[str, Any] = MappingProxyType({}),
    patch_size: Sequence[int] = PATCH_SIZE,
    local: Sequence[int] | None = None,
) -> Callable[[], Tensor]:
    """A function that takes a step of main_dino.py on random views and returns its loss, on the device.

    objective: of OBJECTIVES
    """
    run = our_state(arch, out_dim, batch_size, device, precision, compiled, size, objective, patch_size)
    views = random_views(batch_size, device, size, local_number, local)
    draw = BlockMasks(tuple(n // p for n, p in zip(size, patch_size))).draw
    masks = [collate_masks([draw(0, 0, i) for i in range(batch_size)]).to(device) if run.ibot else None]
    return lambda: main_dino.train_step(run, [views], VALUES, frozen=False, masks=masks).metrics["loss"]


def step_operators(arch: str, out_dim: int, precision: str) -> dict[str, dict[str, int]]:
    """What `count_operators` finds in a step with main_dino.py's defaults, stochastic depth among them, on one sample.

    Counted on the CPU, with attention as the one operator that it is on a GPU.
    """
    rate = 0.1 if has_setting(arch, "drop_path_rate") else None
    run, views = our_state(arch, out_dim, 1, "cpu", precision, drop_path_rate=rate), random_views(1, "cpu")
    parts = {
        run.teacher: "teacher forward",
        run.student: "student forward",
        run.dino_loss: "loss",
        "backward": "backward",
        "clip_gradients": "clipping",
        "step_if_finite": "optimizer",
        "update_teacher": "teacher's average",
    }
    with mock.patch.object(transformer_block, "attends_by_products", lambda qkv: False):
        return count_operators(
            lambda: main_dino.train_step(run, [views], VALUES, frozen=False), main_dino.train_step.__name__, parts
        )


def baseline_step(arch: str, out_dim: int, batch_size: int, device: str, precision: str) -> Callable[[], float]:
    """The same of baselines.plain_step, from the same weights."""
    take, views = plain_trainer(arch, out_dim, device, precision), random_views(batch_size, device)
    return lambda: take(views)


def plain_trainer(arch: str, out_dim: int, device: str, precision: str) -> Callable[[list[Tensor]], float]:
    """A function that takes a plain step on views and returns its loss."""
    torch.manual_seed(0)
    ours = new_model(arch, out_dim)
    student, teacher = (baselines.Model(ours).to(device) for _ in range(2))
    optimizer, center = torch.optim.AdamW(utils.parameter_groups(student)), torch.zeros(1, out_dim, device=device)

    def take(views: list[Tensor]) -> float:
        nonlocal center
        loss, center = baselines.plain_step(
            student, teacher, optimizer, center, views, VALUES, dtype=PRECISIONS[precision]
        )
        return loss

    return take


def step_memory(side: str, settings: dict[str, Any]) -> float:
    """GiB that two steps need at most, models and views included: of the GPU, or of a process of its own."""
    if settings["device"] == "cuda":
        torch.cuda.empty_cache()
        return measured_memory(side, settings)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured_memory, (side, settings, torch.get_num_threads()))


def measured_memory(side: str, settings: dict[str, Any], threads: int | None = None) -> float:
    if threads:
        torch.set_num_threads(threads)
        import monai.networks.nets  # noqa: F401  what is imported is not what is measured
    if side == "ours":
        keep_freed_memory()  # as in a script
    device = torch.device(settings["device"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_memory(device)
    take = {"baseline": baseline_step, "ours": our_step}[side](**settings)
    take(), take()
    return (peak_memory(device) - before) / 2**30


def flops_per_sample(arch: str, out_dim: int, size: Sequence[int] = GLOBAL, local_number: int = LOCAL_NUMBER) -> int:
    """Floating point operations of a step's matrix products per sample, counted by torch without computing anything."""
    with torch.device("meta"):
        student, teacher = (new_model(arch, out_dim, size) for _ in range(2))
        loss = main_dino.DINOLoss(out_dim, 0.9)
    views = random_views(1, "meta", size, local_number)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher_logits = teacher(views[:1])
        losses, _ = loss(student(views), teacher_logits, 0.04)
        losses["loss"].backward()
    return counter.get_total_flops()


def matrix_rate(device: str, precision: str) -> float:
    """Floating point operations per second of a large square matrix product: the best of ten."""
    n, dtype = {"cpu": 2048, "cuda": 8192}[device], PRECISIONS[precision]
    a, b = (torch.rand(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds_until_done(lambda: a @ b, 10, device))
