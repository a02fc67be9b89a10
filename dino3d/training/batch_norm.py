"""Batch normalisation over all processes of a run, so that several of them equal one with the whole batch."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from augmentations import MultiCropAugmentation
from dino3d.command_line import UserError, format_values
from vision_transformer import MultiCropWrapper

MOMENTUM = 0.1  # torch's default
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


def check_batch(
    model: MultiCropWrapper, crops: MultiCropAugmentation, global_batch: int, accumulate_steps: int
) -> list[str]:
    """Notices on what a model's batch norms will see in training, in steps of global_batch samples.

    Raises UserError where local views would give a single value of a channel, which can't be normalised.
    """
    views, size = crops.local_number * global_batch // accumulate_steps, crops.local_size
    positions = math.prod(-(-n // step) for n, step in zip(size, model.backbone.patch_size))
    if views * positions == 1 and has_batch_norm(model.backbone):
        raise UserError(
            f"--batch_size_per_gpu 1 with --local_crops_number 1: of a local view of {format_values(size)} voxels the "
            "last map is one position, and batch normalisation needs several: raise either, or take no local views",
            everywhere=True,
        )
    if accumulate_steps == 1 or not has_batch_norm(model):
        return []
    return [
        f"--accumulate_steps {accumulate_steps} does not widen what batch normalisation sees: the batches of a step "
        "are normalised one by one"
    ]


def sync_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Let a model's batch norms see the batches of all processes, in place: by torch.nn.SyncBatchNorm on GPUs, by
    `CPUSyncBatchNorm` elsewhere. Parameters, buffers and their names stay as they are."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.__class__ = CPUSyncBatchNorm  # its parameters, buffers and settings are the same ones
    return model


def warm_up(model: nn.Module, step: int) -> None:
    """Let the running statistics of a model that began with random weights be the mean of its first batches, and only
    then follow at torch's rate.

    They begin at mean 0 and variance 1, of which 0.9^28 = 5 % are left after 28 steps: much, where the true variance
    is 0.003 as after the first convolution of grey values. step: that is to come
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.momentum = max(MOMENTUM, 1 / (step + 1))


class CPUSyncBatchNorm(nn.BatchNorm3d):
    """What nn.SyncBatchNorm does, which is for GPUs alone, by collectives that gloo has: (B, C, ...) -> (B, C, ...).

    Also for batches of different sizes. In evaluation, and without a process group, it is plain batch normalisation.
    """

    @torch.compiler.disable  # collectives are not compiled: torch.compile goes around it
    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        y, mean, variance, count = Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        return y


class Normalise(torch.autograd.Function):
    """Batch normalisation (Ioffe and Szegedy 2015, algorithm 1 and section 3) by the moments of all processes.

    Moments of each process are joined as Chan et al. 1979 do, which loses nothing where the mean is large.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: (B, C, ...) of this process; weight, bias: (C,). Returns (normalised x, mean (C,), biased variance (C,),
        values of each channel ()), the last three of all processes. ValueError where a channel has a single value."""
        axes, dtype = [0, *range(2, x.ndim)], torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(x.to(dtype), axes, correction=0)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        parts = [torch.empty_like(torch.cat((mean, variance, count))) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, torch.cat((mean, variance, count)))
        moments = torch.stack(parts)  # (ranks, 2 C + 1)
        means, variances, counts = moments.split((len(mean), len(mean), 1), dim=1)
        total = counts.sum()
        if total <= 1:
            raise ValueError(f"batch normalisation needs several values of each channel, found {tuple(x.shape)}")
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.mark_non_differentiable(mean, variance, total)
        y = (x.to(dtype) - of_channels(mean, x)) * of_channels(scale * weight, x) + of_channels(bias, x)
        return y.to(x.dtype), mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The mean and variance depend on every process's x: their part is summed over all. The gradients of weight and
        bias are of this process, as DDP expects them."""
        x, weight, mean, scale, total = ctx.saved_tensors
        axes = [0, *range(2, x.ndim)]
        normal = (x.to(mean.dtype) - of_channels(mean, x)) * of_channels(scale, x)
        gradient = gradient.to(mean.dtype)
        sums = torch.stack((gradient.sum(axes), (gradient * normal).sum(axes)))  # (2, C)
        for_bias, for_weight = sums.clone()
        dist.all_reduce(sums)
        means = [of_channels(one, x) for one in sums / total]
        for_x = (gradient - means[0] - normal * means[1]) * of_channels(scale * weight, x)
        return for_x.to(x.dtype), for_weight.to(weight.dtype), for_bias.to(weight.dtype), None


def of_channels(values: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...), to go with x (B, C, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
