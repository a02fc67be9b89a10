"""3D vision transformer, the table of architectures, and the DINO head.

Volumes follow one axis convention everywhere: tensors are (B, C, X, Y, Z) in RAS, and whatever is given
per axis (sizes, patches, grids) is in that order, in voxels. Tokens run over the patch grid with x slowest
and z fastest, the class token first.

Sources:
    Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929
    Caron et al. 2021, Emerging Properties in Self-Supervised Vision Transformers, https://arxiv.org/abs/2104.14294
    Huang et al. 2016, Deep Networks with Stochastic Depth, https://arxiv.org/abs/1603.09382
    Salimans and Kingma 2016, Weight Normalization, https://arxiv.org/abs/1602.07868
    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from dino3d.mixed_precision import cast_together
from dino3d.transformer_block import Attention, Block, Mlp, Shapes, pack, unpack  # noqa: F401  users import from here
from resnet3d import RESNETS, Stage

# Mean grey value of thorax CT scaled from [-1000, 1000] HU to [0, 1], between air (0), lung (0.1) and tissue (0.5)
MEAN_GREY = 0.3


def init_weights(module: nn.Module) -> None:
    """Initialise one linear or normalisation layer as in DINO; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def resize_pos_embed(pos_embed: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Interpolate a position embedding (1, 1 + N, D) from one patch grid (x, y, z) to another; the class token's stays.

    Trilinear, in single precision or better: DINO's bicubic interpolation of two axes has no counterpart of three in
    PyTorch, and a learned embedding varies slowly from patch to patch.
    """
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    patches = pos_embed[:, 1:].to(dtype).transpose(1, 2).unflatten(2, tuple(old))  # (1, D, x, y, z)
    patches = F.interpolate(patches, size=tuple(new), mode="trilinear", align_corners=False)
    patches = patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, N, D)
    return torch.cat((pos_embed[:, :1], patches), dim=1)  # (1, 1 + N, D)


class PatchEmbed(nn.Module):
    """Cut a volume into patches and project each linearly: (B, C, X, Y, Z) -> (B, N, D)."""

    def __init__(self, patch_size: tuple[int, int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        # PyTorch's default weights: their spread falls with the number of voxels in a patch, so that tokens start
        # on the same scale whatever the patch size (std 0.0196 for 12x12x6)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        # Grey values lie in [0, 1]. A bias that takes their mean off lets dark and bright patches start in opposite
        # directions; without it all tokens point much the same way, and DINO's teacher is soon close to uniform
        with torch.no_grad():
            self.proj.bias.copy_(-MEAN_GREY * self.proj.weight.sum((1, 2, 3, 4)))

    def forward(self, x: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is one matrix product. Written as such it gives (B, N, D) at
        # once, and is spared cuDNN's 3D convolutions, slow in bf16 in some releases (pytorch issue 174051).
        x = x.unflatten(4, (-1, self.proj.kernel_size[2]))
        x = x.unflatten(3, (-1, self.proj.kernel_size[1]))
        x = x.unflatten(2, (-1, self.proj.kernel_size[0]))  # (B, C, x, px, y, py, z, pz)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # (B, N, C * px * py * pz)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class Encoder(Protocol):
    """What the scripts and their heads need of a backbone, whatever its architecture; `VisionTransformer` is one.

    embed_dim: width D of the embedding and of the last feature map
    img_size, patch_size: (3,) voxels that it is trained on, and of one position of its last feature map
    blocks: its repeated parts in order, which are compiled one by one
    stages: where its maps change their size and channels, for a decoder; () where all are like the last
    first_position: (3,) voxel, maybe between two, that the middle of each map's first position lies at
    has_class_token: whether the embedding is a token of its own; otherwise it is the mean of the last map
    """

    embed_dim: int
    img_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    blocks: nn.ModuleList
    stages: tuple[Stage, ...]
    first_position: tuple[float, ...]
    has_class_token: bool

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> embedding (B, D)."""

    def get_intermediate_layers(self, x: Tensor, n: int | Sequence[int], norm: bool | str) -> list[Tensor]:
        """(B, C, X, Y, Z) -> feature maps of some blocks, shallowest first, each (B, D, x, y, z); where there are
        stages, with their channels for D."""

    def embeddings_and_maps(self, x: Tensor, n: int | Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """(B, C, X, Y, Z) -> (embedding (B, D), feature map (B, D, x, y, z)) of some blocks in one pass, likewise."""

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: 0 for what comes before the first block, i + 1 for block i, len(blocks) + 1 after
        the last. Layer-wise learning rates need it."""


class VisionTransformer(nn.Module):
    """3D vision transformer with a class token and a learned position embedding (Dosovitskiy 2021, Caron 2021).

    Volumes are (B, in_chans, X, Y, Z); X, Y, Z may differ from `img_size` as long as each is a multiple of the
    patch: the position embedding is then interpolated to the grid at hand.

    Args:
        img_size: training size (X, Y, Z) in voxels, a multiple of `patch_size` on each axis.
        patch_size: patch (x, y, z) in voxels; need not be cubic.
        in_chans: channels of the input.
        embed_dim: width D, a multiple of `num_heads`.
        depth: number of blocks, at least 1.
        num_heads: attention heads per block.
        mlp_ratio: width of the MLP over `embed_dim`.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it grows linearly from 0 in the first.
        grad_checkpointing: keep each block's input alone for the backward pass and compute the block once more there
            (Chen 2016): the same gradients for a fraction of the memory, at a third more time. An attribute too.

    Raises:
        ValueError: a size is not a multiple of the patch, `embed_dim` not one of `num_heads`, or the rate is
            outside [0, 1); from every method that takes a volume, if its rank, channels or size don't fit.
    """

    stages, has_class_token = (), True

    def __init__(
        self,
        img_size: Sequence[int] = (96, 96, 48),
        patch_size: Sequence[int] = (12, 12, 6),
        in_chans: int = 1,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate}; it must be at least 0 and below 1")
        self.img_size, self.patch_size = tuple(img_size), tuple(patch_size)
        self.in_chans, self.embed_dim, self.num_heads = in_chans, embed_dim, num_heads
        self.drop_path_rate, self.grad_checkpointing = drop_path_rate, grad_checkpointing
        self.grid_size = self._grid(self.img_size)
        num_patches = self.grid_size[0] * self.grid_size[1] * self.grid_size[2]

        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, embed_dim))  # the class token's comes first
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.first_position = tuple((n - 1) / 2 for n in self.patch_size)

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def _grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Patches per axis of a volume of `size` voxels; ValueError if it isn't a positive multiple of the patch."""
        if not len(size) == len(self.patch_size) == 3:
            raise ValueError(f"size {tuple(size)} and patch_size {self.patch_size} must have three axes (X, Y, Z)")
        if any(s < p or s % p for s, p in zip(size, self.patch_size)):
            raise ValueError(f"size {tuple(size)} is not a multiple of patch_size {self.patch_size} on each axis")
        return tuple(s // p for s, p in zip(size, self.patch_size))

    def interpolate_pos_embed(self, grid: tuple[int, ...]) -> Tensor:
        """Position embedding (1, 1 + N, D) for a patch grid (x, y, z): the parameter itself at the training grid.

        Grids are compared, not their numbers of tokens: (4, 2, 1) holds as many as (2, 4, 1).
        """
        if grid == self.grid_size:
            return self.pos_embed
        return resize_pos_embed(self.pos_embed, self.grid_size, grid)

    def _embed(
        self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens that enter the first block, (B, 1 + N, D), and their patch grid (x, y, z). hidden: (B, N) bool, the
        patches in whose place `mask_token` (D,) stands, before their positions are added (Zhou 2022)."""
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected a volume of shape (B, {self.in_chans}, X, Y, Z), found {tuple(x.shape)}")
        grid = self._grid(x.shape[2:])
        x = self.patch_embed(x)  # (B, N, D)
        if hidden is not None:
            x = torch.where(hidden[:, :, None], mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, 1 + N, D)
        return x + self.interpolate_pos_embed(grid), grid

    def stochastic_depth(self, batch: int, device: torch.device) -> Sequence[Tensor | None]:
        """What each block's residual branches are multiplied by, (depth, 2, B, 1, 1) (Huang 2016); in evaluation
        nothing.

        A branch is dropped for whole samples, at a rate that grows from 0 in the first block to `drop_path_rate` in the
        last; where it is kept it is scaled by 1 / (1 - rate), which keeps the expected value. Drawn at once and in
        single precision: bf16 would not hold the scale, and a block that has no rate of its own compiles once for all.
        """
        depth = len(self.blocks)
        if not self.training or self.drop_path_rate == 0:
            return [None] * depth
        keep = torch.linspace(1, 1 - self.drop_path_rate, depth, device=device).view(depth, 1, 1, 1, 1)
        return (torch.rand(depth, 2, batch, 1, 1, device=device) < keep) / keep

    def _run(self, block: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
        """What a block makes of x. others: see `Block.forward`"""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *others, use_reentrant=False, preserve_rng_state=False)
        return block(x, *others)

    def _run_packed(self, x: Tensor, block: Block, *others: Any) -> Tensor:
        """The same with its weights cast first: with checkpointing they are cast again, and not kept."""
        return block(x, *others, cast_together(block.linear_weights(), x.device.type))

    def forward(self, x: Tensor) -> Tensor:
        """Class embedding after the final norm: (B, C, X, Y, Z) -> (B, D).

        Equals `forward_tokens(x)[:, 0]`, but spares the last block the patch tokens that nothing would read.
        """
        x, _ = self._embed(x)
        last = len(self.blocks) - 1
        for i, (block, scales) in enumerate(zip(self.blocks, self.stochastic_depth(x.shape[0], x.device))):
            x = self._run(block, x, 1 if i == last else None, scales)  # (B, 1 + N, D), in the end (B, 1, D)
        return self.norm(x[:, 0])

    def forward_views(
        self,
        views: Sequence[Tensor],
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        all_tokens: bool = False,
    ) -> Tensor | list[Tensor]:
        """Class embeddings of views of several sizes, [(B_i, C, X_i, Y_i, Z_i)] -> (sum of B_i, D), as `forward` gives
        them one size after the other, in half the operators: their tokens are packed into one sequence, in which only
        attention tells one view from another.

        hidden, mask_token: of the first of `views`, see `forward_tokens`
        all_tokens: return all tokens instead, [(B_i, 1 + N_i, D)]
        """
        masks = [(hidden, mask_token), *[()] * (len(views) - 1)]
        parts = [self._embed(view, *mask)[0] for view, mask in zip(views, masks)]  # (B_i, T_i, D)
        shapes = tuple((part.shape[0], part.shape[1]) for part in parts)
        queries = [None] * (len(self.blocks) - 1) + [None if all_tokens else 1]
        x = pack(parts)  # (S, D)
        for block, asked, scales in zip(self.blocks, queries, self._packed_depth(shapes, queries, x.device)):
            x = self._run(self._run_packed, x, block, asked, scales, shapes)  # (S, D), in the end (sum of B_i, D)
        x = self.norm(x)
        return unpack(x, shapes) if all_tokens else x

    def _packed_depth(
        self, shapes: Shapes, queries: Sequence[int | None], device: torch.device
    ) -> list[tuple[Tensor, Tensor] | None]:
        """`stochastic_depth` of each size of view, drawn in their order, for packed sequences: each block's two
        (S, 1)."""
        draws = [self.stochastic_depth(views, device) for views, _ in shapes]  # (depth, 2, B_i, 1, 1)
        if draws[0][0] is None:
            return [None] * len(queries)
        scales = torch.cat(
            [one.expand(-1, -1, -1, tokens, 1).flatten(2, 3) for one, (_, tokens) in zip(draws, shapes)], 2
        )
        each = list(scales.unbind(0))  # (2, S, 1)
        if queries[-1] == 1:
            each[-1] = torch.cat([one[-1, :, :, 0] for one in draws], 1)  # (2, sum of B_i, 1)
        return [tuple(one.unbind(0)) for one in each]

    def forward_tokens(self, x: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """All tokens after the final norm, the class token first: (B, C, X, Y, Z) -> (B, 1 + N, D).

        hidden: (B, N) bool, patches that the model does not see; mask_token: (D,), what it sees instead
        """
        x, _ = self._embed(x, hidden, mask_token)
        for block, scales in zip(self.blocks, self.stochastic_depth(x.shape[0], x.device)):
            x = self._run(block, x, None, scales)  # (B, 1 + N, D)
        return self.norm(x)

    def get_intermediate_layers(self, x: Tensor, n: int | Sequence[int] = 1, norm: bool | str = True) -> list[Tensor]:
        """Feature maps of some blocks, shallowest first, each (B, D, x, y, z).

        Entry [..., i, j, k] is the patch that starts at voxel (i, j, k) * patch_size.

        Args:
            x: volumes (B, C, X, Y, Z).
            n: how many of the last blocks, or which blocks: ascending indices, 0 the first block's.
            norm: apply the final norm to every map; "last": to that of the last block alone; False leaves each as its
                block put it out.

        Raises:
            ValueError: `n` names no block, or not blocks of this model in ascending order.
        """
        grid = self._grid(x.shape[2:]) if x.ndim == 5 else ()
        return [tokens[:, 1:].transpose(1, 2).unflatten(2, grid) for tokens in self._tokens_of(x, n, norm)]

    def embeddings_and_maps(self, x: Tensor, n: int | Sequence[int] = 1) -> list[tuple[Tensor, Tensor]]:
        """(class token (B, D), feature map (B, D, x, y, z)) of some blocks after the final norm, shallowest first.

        x, n, errors: as of `get_intermediate_layers`.
        """
        grid = self._grid(x.shape[2:]) if x.ndim == 5 else ()
        return [(one[:, 0], one[:, 1:].transpose(1, 2).unflatten(2, grid)) for one in self._tokens_of(x, n, True)]

    def intermediate_tokens(self, x: Tensor, n: int | Sequence[int] = 1, norm: bool | str = True) -> list[Tensor]:
        """All tokens after some blocks, shallowest first, each (B, 1 + N, D), the class token first.

        x, n, norm, errors: as of `get_intermediate_layers`.
        """
        return list(self._tokens_of(x, n, norm))

    def _tokens_of(self, x: Tensor, n: int | Sequence[int], norm: bool | str) -> Iterator[Tensor]:
        """Gives the tokens of each block that is asked for, before the next one runs: gradients of what is made of them
        are then summed in that order, and the same seed gives the same weights to the last bit."""
        depth = len(self.blocks)
        indices = n if isinstance(n, Sequence) else range(depth - n, depth)
        ascending = all(a < b for a, b in pairwise(indices))
        if not (indices and ascending and 0 <= indices[0] and indices[-1] < depth):
            raise ValueError(
                f"n is {n}; the model has {depth} blocks to take feature maps from: give a number of last "
                f"blocks from 1 to {depth}, or indices from 0 to {depth - 1} in ascending order"
            )
        x, _ = self._embed(x)
        draws = self.stochastic_depth(x.shape[0], x.device)
        for i, (block, scales) in enumerate(zip(self.blocks[: indices[-1] + 1], draws)):
            x = self._run(block, x, None, scales)
            if i in indices:
                yield self.norm(x) if norm is True or norm == "last" and i == depth - 1 else x  # (B, 1 + N, D)

    def layer_of(self, name: str) -> int:
        """0 for what embeds patches and positions, i + 1 for block i, depth + 1 for the final norm."""
        part, _, rest = name.partition(".")
        if part == "blocks":
            return int(rest.split(".")[0]) + 1
        return len(self.blocks) + 1 if part == "norm" else 0

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention weights of the last block: (B, C, X, Y, Z) -> (B, heads, 1 + N, 1 + N), rows summing to 1."""
        x, _ = self._embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.weights(self.blocks[-1].norm1(x))

    def features_and_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each patch its features and the class token's attention to it, in one pass and without the attention
        between patches, which grows with the square of their number.

        (B, C, X, Y, Z) -> (B, D, x, y, z) as `get_intermediate_layers(x)[0]`, and (B, heads, x, y, z), on the patch
        grid, as `get_last_selfattention(x)[:, :, 0, 1:]`
        """
        x, grid = self._embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        attention = last.attn.weights(last.norm1(x), 1)[:, :, 0, 1:]  # (B, heads, N)
        tokens = self.norm(last(x))[:, 1:]  # (B, N, D)
        return tokens.transpose(1, 2).unflatten(2, grid), attention.unflatten(2, grid)


# Each is called as vit_small(img_size=(96, 96, 48), patch_size=(12, 12, 6), in_chans=1, drop_path_rate=0.).
vit_micro = partial(VisionTransformer, embed_dim=128, depth=4, num_heads=4)
vit_tiny = partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3)
vit_small = partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6)
vit_base = partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12)
vit_large = partial(VisionTransformer, embed_dim=1024, depth=24, num_heads=16)
vit_huge = partial(VisionTransformer, embed_dim=1280, depth=32, num_heads=16)

ARCHITECTURES = {
    "vit_micro": vit_micro,
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
    "vit_huge": vit_huge,
    **RESNETS,
}


def has_setting(arch: str, name: str) -> bool:
    """Whether an architecture has a setting such as patch_size or drop_path_rate, which its constructor then takes."""
    return name in inspect.signature(ARCHITECTURES[arch]).parameters


def build_encoder(
    arch: str,
    img_size: Sequence[int],
    patch_size: Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    grad_checkpointing: bool = False,
) -> Encoder:
    """A new encoder by its name. patch_size, drop_path_rate: None: as the architecture has it, or has none."""
    settings = {"patch_size": patch_size, "drop_path_rate": drop_path_rate}
    settings = {name: value for name, value in settings.items() if value is not None}
    return ARCHITECTURES[arch](img_size=img_size, grad_checkpointing=grad_checkpointing, **settings)


class DINOHead(nn.Module):
    """Projection head of DINO (Caron 2021, section 3.1 and appendix C): (B, in_dim) -> logits (B, out_dim).

    An MLP down to a bottleneck, L2 normalisation, and one weight-normalised linear layer without bias
    (Salimans 2016), whose rows are the prototypes. With their gains at 1 a logit is a cosine, in [-1, 1].

    Args:
        in_dim: width of the backbone's embedding.
        out_dim: number of prototypes.
        use_bn: batch normalisation after each hidden layer of the MLP.
        norm_last_layer: keep the prototypes' gains frozen at 1: steadier in training, a little below in accuracy
            where training is stable anyway.
        num_layers: linear layers in the MLP, at least 1 (ValueError otherwise).
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width after the MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        num_layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; the head needs at least 1")
        layers, width = [], in_dim
        for _ in range(num_layers - 1):
            layers.append(nn.Linear(width, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            width = hidden_dim
        self.mlp = nn.Sequential(*layers, nn.Linear(width, bottleneck_dim))
        self.apply(init_weights)
        # After apply: the prototypes have no bias and keep the default spread, of which only the direction counts.
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        gain = self.last_layer.parametrizations.weight.original0  # (out_dim, 1); original1 holds the directions
        nn.init.ones_(gain)
        gain.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        linears = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        weights = [tensor for layer in linears for tensor in (layer.weight, layer.bias)]
        cast = iter(cast_together(weights, x.device.type))
        for layer in self.mlp:
            x = F.linear(x, next(cast), next(cast)) if isinstance(layer, nn.Linear) else layer(x)
        # (B, bottleneck_dim)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)  # 1e-12 is 0 in fp16
        return self.last_layer(x)  # (B, out_dim)


class MultiCropWrapper(nn.Module):
    """Backbone and head over views of several sizes, all in one `forward` so that DDP sees every gradient."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: Sequence[Tensor], return_embeddings: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of all views, in their order; with `return_embeddings` the backbone's embeddings too.

        Args:
            views: tensors (B_i, C, X_i, Y_i, Z_i), each one pass of the backbone: put views of equal size together.
            return_embeddings: return (logits, embeddings) instead of the logits.

        Returns:
            logits (sum of B_i, out_dim); embeddings (sum of B_i, D).
        """
        if isinstance(self.backbone, VisionTransformer):
            embeddings = self.backbone.forward_views(views)  # (sum of B_i, D)
        else:
            embeddings = torch.cat([self.backbone(view) for view in views])
        logits = self.head(embeddings)  # (sum of B_i, out_dim)
        return (logits, embeddings) if return_embeddings else logits
