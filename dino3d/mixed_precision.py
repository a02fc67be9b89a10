"""Mixed precision besides autocast: weights cast together, which CPUs multiply in bf16, attention in bf16 on a CPU."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES = 2**21  # of a group of samples that attend at once: in bf16 4 MB, which a core's caches hold


def cast_together(tensors: Sequence[Tensor], device_type: str) -> Sequence[Tensor]:
    """What autocast would make of each where it is used, in one operator; without autocast the tensors themselves."""
    has_autocast = torch.amp.is_autocast_available(device_type)  # the meta device has none
    if not has_autocast or not torch.is_autocast_enabled(device_type):
        return tensors
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return tensors
    return Cast.apply(torch.get_autocast_dtype(device_type), *tensors)


class Cast(torch.autograd.Function):
    """Tensors in another precision, and back their gradients in that of each, by one foreach copy each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(copies, tensors)
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = [
            (None if gradient is None else torch.empty_like(gradient, dtype=dtype), gradient)
            for gradient, dtype in zip(gradients, ctx.dtypes)
        ]
        present = [pair for pair in pairs if pair[1] is not None]
        if present:
            torch._foreach_copy_(*map(list, zip(*present)))
        return None, *(copy for copy, _ in pairs)


# ------------------------------------------------------------------------------------------------------- bf16 on a CPU


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of this machine's processor, as /proc/cpuinfo names them."""
    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system than Linux
        lines = []
    return frozenset(flag for line in lines if line.startswith("flags") for flag in line.split())


def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16 (AVX512-BF16 or AMX), and torch uses them: without them
    bf16 is slower than single precision."""
    # Whoever limits torch to older instructions (ATEN_CPU_CAPABILITY) has no use for newer ones
    limited = not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return not limited and torch.backends.mkldnn.is_available() and bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


@functools.cache
def multiplies_bf16_by_row() -> bool:
    """Whether the CPU has products of bf16 (AVX512-BF16) but not of whole tiles (AMX), for which PyTorch's own
    attention is written."""
    return multiplies_bf16() and "amx_tile" not in cpu_flags()


def attends_by_products(qkv: Tensor) -> bool:
    """Whether `ProductAttention` takes the place of PyTorch's fused attention: in bf16 on a CPU where that takes longer
    than in single precision (torch 2.13)."""
    return (
        qkv.device.type == "cpu"
        and qkv.dtype == torch.bfloat16
        and multiplies_bf16_by_row()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


class ProductAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v as three plain operators, few samples at a time, and once more in the backward pass:
    nothing that grows with the square of the tokens is kept.

    qkv: (B, T, 3, heads, d), queries: how many tokens ask, the first of each sample -> (B, queries, heads * d)
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, queries: int) -> Tensor:
        batch, _, _, heads, width = qkv.shape
        ctx.save_for_backward(qkv)
        ctx.queries = queries
        out = qkv.new_empty(batch, queries, heads, width)
        for start, part in ProductAttention.groups(qkv):
            q, k, v = ProductAttention.split(part)  # (b * heads, T, d)
            weights = ProductAttention.weights(q[:, :queries], k)  # (b * heads, queries, T)
            some = out[start : start + len(part)].transpose(1, 2)
            some.copy_(torch.bmm(weights, v).view(some.shape))
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        scale, queries = qkv.shape[-1] ** -0.5, ctx.queries
        out = torch.empty_like(qkv) if queries == qkv.shape[1] else torch.zeros_like(qkv)
        gradient = gradient.unflatten(2, qkv.shape[3:]).transpose(1, 2)  # (B, heads, queries, d)
        for start, part in ProductAttention.groups(qkv):
            q, k, v = ProductAttention.split(part)
            q = q[:, :queries]
            weights = ProductAttention.weights(q, k)
            asked = gradient[start : start + len(part)].flatten(0, 1)  # (b * heads, queries, d)
            towards = torch._softmax_backward_data(torch.bmm(asked, v.mT), weights, -1, weights.dtype)
            unused = q.new_empty(1)
            found = (
                torch.baddbmm(unused, towards, k, beta=0, alpha=scale),
                torch.baddbmm(unused, towards.mT, q, beta=0, alpha=scale),
                torch.bmm(weights.mT, asked),
            )
            for i, one in enumerate(found):  # (b * heads, queries or T, d)
                some = out[start : start + len(part), : one.shape[1], i].transpose(1, 2)
                some.copy_(one.view(some.shape))
        return out, None

    @staticmethod
    def groups(qkv: Tensor) -> list[tuple[int, Tensor]]:
        """(first sample, the group's (b, T, 3, heads, d))"""
        batch, tokens, _, heads, _ = qkv.shape
        size = max(1, SCORES // (heads * tokens**2))
        return [(start, qkv[start : start + size]) for start in range(0, batch, size)]

    @staticmethod
    def split(qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)  # 3 x (b * heads, T, d)

    @staticmethod
    def weights(q: Tensor, k: Tensor) -> Tensor:
        return torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5).softmax(-1)
