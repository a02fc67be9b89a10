"""Operations on many tensors whose factor lies on the device, without one kernel for each tensor.

On a GPU, foreach operators work on many tensors in one kernel, but not with a tensor of their own for each factor: they
fall back to a kernel per tensor. On a CPU that costs nothing, and is spared what a GPU needs in memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IN_GROUPS = False  # on a GPU: no GPU has seen it so far


@torch.no_grad()
def lerp_all(averages: Sequence[Tensor], values: Sequence[Tensor], weight: Tensor) -> None:
    """average += weight * (value - average) of each pair, in place. weight: () on their device, 0 changes nothing."""
    if not IN_GROUPS or averages[0].device.type == "cpu":
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
    else:
        lerp_in_groups(averages, values, weight)


def lerp_in_groups(averages: Sequence[Tensor], values: Sequence[Tensor], weight: Tensor) -> None:
    differences = torch._foreach_sub(values, averages)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(averages, differences)


@torch.no_grad()
def scale_each(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its own of `factors` (number of tensors,), in place."""
    if not IN_GROUPS or factors.device.type == "cpu":
        torch._foreach_mul_(tensors, list(factors))
    else:
        scale_in_groups(tensors, factors)


def scale_in_groups(tensors: Sequence[Tensor], factors: Tensor) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    spread = torch.cat([factor.expand(size) for factor, size in zip(factors, sizes)])  # as long as all tensors
    # Of their shapes and strides: otherwise foreach falls back again
    torch._foreach_mul_(tensors, [one.view_as(tensor) for one, tensor in zip(spread.split(sizes), tensors)])
