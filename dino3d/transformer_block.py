"""The transformer's block, for views of one size or for several sizes packed into one sequence of tokens.

Sources:
    Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929
    Dehghani et al. 2023, Patch n' Pack: NaViT, https://arxiv.org/abs/2307.06304
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from dino3d.mixed_precision import ProductAttention, attends_by_products

Shapes = Sequence[tuple[int, int]]  # (views, tokens of each) of every size of view in a packed sequence


def pack(parts: Sequence[Tensor]) -> Tensor:
    """[(B_i, T_i, D)] of views of several sizes -> (S, D), all their tokens in one sequence."""
    flat = [part.flatten(0, 1) for part in parts]
    return torch.cat(flat) if len(flat) > 1 else flat[0]


def unpack(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """(S, D) -> [(B_i, T_i, D)]"""
    parts = x.split([views * tokens for views, tokens in shapes]) if len(shapes) > 1 else [x]
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes)]


def linear(layer: nn.Linear, x: Tensor, cast: Sequence[Tensor] | None) -> Tensor:
    """layer(x). cast: its weight and bias in the precision of the product, None: as the layer has them"""
    return layer(x) if cast is None else F.linear(x, *cast)


class Attention(nn.Module):
    """Multi-head self-attention (Dosovitskiy 2021, appendix A)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, head_dim)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, heads, T, head_dim)

    def _split(self, qkv: Tensor) -> list[Tensor]:
        """(B, T, 3 D) -> 3 x (B, heads, T, head_dim)"""
        # Cut in three and not transposed whole: the gradients of the three are laid out so, and are copied once less
        return [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2)]

    def backend(self, tokens: int, dtype: torch.dtype) -> str:
        """What computes attention in training for samples of so many tokens: "flash", "cudnn", "efficient" or "math",
        as scaled_dot_product_attention chooses on this device, or "products" (`ProductAttention`)."""
        weight = self.qkv.weight
        qkv = torch.empty(2, tokens, len(weight), dtype=dtype, device=weight.device, requires_grad=True)
        if attends_by_products(qkv):
            return "products"
        return SDPBackend(torch._fused_sdp_choice(*self._split(qkv))).name.removesuffix("_ATTENTION").lower()

    def _attend(self, qkv: Tensor, queries: int | None) -> Tensor:
        """(B, T, 3 D) -> (B, queries, D)"""
        if attends_by_products(qkv):
            return ProductAttention.apply(qkv.unflatten(2, (3, self.num_heads, -1)), queries or qkv.shape[1])
        q, k, v = self._split(qkv)
        x = F.scaled_dot_product_attention(q[:, :, :queries], k, v)  # (B, heads, queries, head_dim)
        return x.transpose(1, 2).flatten(2)

    def forward(
        self, x: Tensor, queries: int | None = None, shapes: Shapes | None = None, cast: Sequence[Tensor] | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, queries, D): every token is attended to, only the first `queries` ask.

        shapes, cast: see `Block.forward`
        """
        qkv = linear(self.qkv, x, cast and cast[:2])  # (B, T, 3 D), packed (S, 3 D)
        if shapes is None:
            x = self._attend(qkv, queries)  # (B, queries, D)
        else:  # views of one size attend together
            x = pack([self._attend(part, queries) for part in unpack(qkv, shapes)])  # (S or sum of B_i queries, D)
        return linear(self.proj, x, cast and cast[2:])

    def weights(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Attention after the softmax, (B, heads, T or queries, T): rows are all or the first queries, and sum to 1."""
        q, k, _ = self._queries_keys_values(x)
        return (q[:, :, :queries] * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1)


class Mlp(nn.Module):
    """Two linear layers with a GELU between, on each token by itself."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, cast: Sequence[Tensor] | None = None) -> Tensor:
        """cast: see `Block.forward`"""
        return linear(self.fc2, F.gelu(linear(self.fc1, x, cast and cast[:2])), cast and cast[2:])


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy 2021, equations 2 and 3)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def linear_weights(self) -> list[Tensor]:
        """Weight and bias of its linear layers, in their order."""
        layers = self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]

    def forward(
        self,
        x: Tensor,
        queries: int | None = None,
        scales: Sequence[Tensor] | None = None,
        shapes: Shapes | None = None,
        cast: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, queries, D) where only the first `queries` tokens are needed further on.

        scales: what each sample's two residual branches are multiplied by, each broadcasts to them; None: 1
        shapes: ((B_i, T_i), ...) where views of several sizes are packed into one sequence, then (S, D) -> (S, D) or
            (sum of B_i queries, D)
        cast: `linear_weights` in the precision of their products, where they have been cast; None: left to autocast
        """
        branch = self.attn(self.norm1(x), queries, shapes, cast and cast[:4])
        if queries is not None:
            x = x[:, :queries] if shapes is None else pack([part[:, :queries] for part in unpack(x, shapes)])
        x = x + (branch if scales is None else branch * scales[0])
        branch = self.mlp(self.norm2(x), cast and cast[4:])
        return x + (branch if scales is None else branch * scales[1])
