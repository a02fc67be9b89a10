"""What stands on the encoder for a task with labels: one module = encoder + head, one forward, so that DDP sees it all.

Volumes are (B, 1, X, Y, Z) in RAS with grey values in [0, 1]. A classifier reads one vector (B, F) of the
encoder's tokens; a segmenter feature maps (B, D, x, y, z).
"""

import math
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino3d.command_line import UserError
from dino3d.features.encoder import PretrainedEncoder
from dino3d.features.pooling import embed, embedding_width, pool_of
from resnet3d import right_in_bf16
from vision_transformer import Encoder

TEMPERATURE = 0.07  # of the neighbours' votes (Caron et al. 2021, section 4)


def full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) in float32 at least: rounded to bf16's three digits, many logits would be ties."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(torch.promote_types(x.dtype, torch.float32)))


class OnEncoder(nn.Module):
    """An encoder with room for what stands on it, trained along or frozen."""

    def __init__(self, encoder: nn.Module, freeze_encoder: bool):
        super().__init__()
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        if freeze_encoder:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "OnEncoder":
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()  # no stochastic depth, no batch's own statistics in features that nothing is trained on
        return self

    def encoding(self) -> torch.set_grad_enabled:
        """Context to run the encoder in: a frozen one keeps no activations for a backward pass."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder)


class Classifier(OnEncoder):
    """Encoder and classification head: (B, 1, X, Y, Z) -> logits (B, classes).

    encoder: a `vision_transformer.Encoder`; head: gives logits (B, classes) of (B, F)
    freeze_encoder: the encoder stays as it is, to the last bit, and always in evaluation mode
    pool: which tokens the head reads, see `pooling.embed`
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, freeze_encoder: bool = False, pool: str = "cls"):
        super().__init__(encoder, freeze_encoder)
        self.head, self.pool = head, pool

    def features(self, volumes: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> (B, F)."""
        with self.encoding():
            return embed(self.encoder, volumes, self.pool)

    def forward(self, volumes: Tensor) -> Tensor:
        return full_precision(self.head, self.features(volumes))  # (B, classes)


class Standardise(nn.Module):
    """Features brought to mean 0 and standard deviation 1 over the cases given to `fit`; unchanged before that."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def fit(self, features: Tensor) -> None:
        """features: (N, D), N >= 1."""
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp_min(1e-6))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


class LinearHead(nn.Module):
    """Standardised features times a matrix: (B, D) -> logits (B, classes)."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.standardise = Standardise(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)  # all classes start about equally probable
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.standardise(features))


class NearestNeighbours(nn.Module):
    """Vote of the k most similar known cases, weighted by similarity: (B, D) -> log probabilities (B, classes).

    DINO's k-NN evaluation (Wu et al. 2018, arXiv 1805.01978; Caron et al. 2021) on standardised features: similarity is
    the cosine, weights are exp(similarity / 0.07). Nothing is trained; `fit` stores the known cases.

    size: how many known cases there will be; k: of them vote, at most `size`
    """

    def __init__(self, dim: int, num_classes: int, size: int, k: int):
        super().__init__()
        self.num_classes, self.k = num_classes, min(k, size)
        self.standardise = Standardise(dim)
        self.register_buffer("known", torch.zeros(size, dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.long))

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """features: (size, D); labels: (size,) classes."""
        self.standardise.fit(features)
        self.known.copy_(F.normalize(self.standardise(features), dim=-1))
        self.labels.copy_(labels)

    def forward(self, features: Tensor) -> Tensor:
        similarity = F.normalize(self.standardise(features), dim=-1) @ self.known.T  # (B, size)
        nearest, index = similarity.topk(self.k)  # (B, k)
        votes = (nearest / TEMPERATURE).softmax(-1)
        shares = votes.new_zeros(features.shape[0], self.num_classes).scatter_add(1, self.labels[index], votes)
        return shares.log()  # (B, classes)


def build_classifier(
    protocol: str,
    encoder: PretrainedEncoder,
    pool: str,
    drop_path_rate: float | None,
    classes: int,
    known: int,
    knn_k: int | None,
) -> Classifier:
    """The Classifier of a protocol. pool: see `pooling.embed`; known: training cases that a k-NN head remembers."""
    model = encoder.build(drop_path_rate if protocol == "finetune" else 0.0)
    width = embedding_width(model, pool)
    if protocol == "knn":
        k = knn_k or min(20, max(1, round(math.sqrt(known))))
        return Classifier(model, NearestNeighbours(width, classes, known, k), True, pool)
    return Classifier(model, LinearHead(width, classes), protocol == "linear", pool)


def classifier_of(encoder: PretrainedEncoder, config: dict[str, Any], state: dict[str, Tensor]) -> Classifier:
    """The Classifier that a fold's state dict belongs to."""
    known, pool = len(state.get("head.known", ())), pool_of(config)
    return build_classifier(config["protocol"], encoder, pool, 0.0, config["classes"], known, config["knn_k"])


# -------------------------------------------------------------------------------------------------------- segmentation


class Segmenter(OnEncoder):
    """Encoder and decoder: (B, 1, X, Y, Z) -> logits (B, classes, X, Y, Z), in float32 at least.

    encoder: a `vision_transformer.Encoder`; volumes are of any size that it takes, of a ViT a multiple of its patch
    decoder: one of `DECODERS`. Its `layers` are the indices of the blocks it reads, ascending, the encoder's last at
        the end; called with the volumes and those blocks' maps, it gives the logits
    freeze_encoder: the encoder stays as it is, to the last bit, and always in evaluation mode
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, freeze_encoder: bool = False):
        super().__init__(encoder, freeze_encoder)
        self.decoder = right_in_bf16(decoder)

    def features(self, volumes: Tensor) -> list[Tensor]:
        """(B, 1, X, Y, Z) -> one map (B, D, x, y, z) per block in `decoder.layers`, the last after a final norm."""
        with self.encoding():
            return self.encoder.get_intermediate_layers(volumes, self.decoder.layers, norm="last")

    def forward(self, volumes: Tensor) -> Tensor:
        return self.decoder(volumes, self.features(volumes))  # (B, classes, X, Y, Z)


def prime_factors(number: int) -> list[int]:
    """Largest first; none of 1."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors[::-1]


def upsampling_factors(patch_size: Sequence[int]) -> list[tuple[int, int, int]]:
    """Steps (x, y, z) that lead from patches back to voxels, coarsest first: their product is the patch.

    As many as the axis with most prime factors has, at least one. Large factors come first, and axes with fewer are not
    enlarged in the last steps: (12, 12, 6) -> (3, 3, 3), (2, 2, 2), (2, 2, 1).
    """
    return list(zip_longest(*map(prime_factors, patch_size), fillvalue=1)) or [(1, 1, 1)]


class UnetrDecoder(nn.Module):
    """UNETR's decoder for a patch of any size (Hatamizadeh et al. 2022, arXiv 2103.10504, figure 2).

    One stage per step of `upsampling_factors`: upsample, join a skip of the same size, two convolutions with a
    residual. Skips come from blocks at even distances, brought to their stage's size by steps of their own, and at full
    resolution from the volume. For a patch of 16^3 and 12 blocks it is MONAI's UNETR, but for the blocks that skips
    come from: 3, 6 and 9 as in the paper, where MONAI takes 4, 7 and 10.

    encoder: whose maps are all of one size, with a block for every stage at least (ValueError otherwise)
    feature_size: channels at full resolution; they double with every stage below
    """

    def __init__(self, encoder: Encoder, classes: int, feature_size: int = 16):
        super().__init__()
        # Imported here: it takes seconds, of which only segmentation has any use
        from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

        def convolutions(in_channels: int, channels: int) -> nn.Module:
            return UnetrBasicBlock(3, in_channels, channels, 3, 1, "instance", res_block=True)

        # Without a layer after the first it is a transposed convolution
        def upsampling(in_channels: int, channels: int, factor: Sequence[int]) -> nn.Module:
            return UnetrPrUpBlock(3, in_channels, channels, 0, 3, 1, factor, "instance")

        if encoder.stages:
            raise ValueError("it reads feature maps of one size, and this encoder's become smaller; take unet")
        width, patch_size, depth = encoder.embed_dim, encoder.patch_size, len(encoder.blocks)
        factors = upsampling_factors(patch_size)
        stages = len(factors)
        if depth < stages:
            raise ValueError(
                f"depth is {depth}; a patch of {tuple(patch_size)} voxels makes {stages} stages, each of "
                "which needs a block of the encoder"
            )
        self.layers = tuple(depth * (stage + 1) // stages - 1 for stage in range(stages))
        channels = [feature_size * 2**stage for stage in reversed(range(stages))]  # that each stage puts out

        self.skips = nn.ModuleList()
        for stage in range(stages - 1):
            steps = [upsampling(width, channels[stage], factors[0])]
            for factor in factors[1 : stage + 1]:
                steps.append(upsampling(channels[stage], channels[stage], factor))
                steps.append(convolutions(channels[stage], channels[stage]))
            self.skips.append(nn.Sequential(*steps))
        self.skips.append(convolutions(1, feature_size))
        self.stages = nn.ModuleList(
            UnetrUpBlock(3, *widths, 3, factor, "instance", res_block=True)
            for widths, factor in zip(pairwise([width, *channels]), factors)
        )
        self.head = UnetOutBlock(3, feature_size, classes)

    def forward(self, volumes: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """volumes (B, 1, X, Y, Z), maps of the blocks `layers` (B, D, x, y, z) -> logits (B, classes, X, Y, Z)."""
        x, *sources = *reversed(maps), volumes  # deepest first
        for stage, skip, source in zip(self.stages, self.skips, sources):
            x = stage(x, skip(source))  # (B, channels, x, y, z), a step larger and at the end (B, F, X, Y, Z)
        return full_precision(self.head, x)


class UpStage(nn.Module):
    """A step of `UnetDecoder`: (B, in_channels, x, y, z) -> (B, channels, X, Y, Z), enlarged by `factor`, joined with a
    skip of `skip_channels` (0: none) of that size, two convolutions with a residual."""

    def __init__(self, in_channels: int, skip_channels: int, channels: int, factor: Sequence[int]):
        super().__init__()
        from monai.networks.blocks import UnetResBlock  # see UnetrDecoder

        self.skip_channels = skip_channels
        self.upsample = nn.ConvTranspose3d(in_channels, channels, factor, factor, bias=False)
        self.convolutions = UnetResBlock(3, channels + skip_channels, channels, 3, 1, "instance")

    def forward(self, x: Tensor, skips: list[Tensor], size: Sequence[int]) -> Tensor:
        """skips: deepest first, of which the first is taken where there is to be one; size: (3,) X, Y, Z."""
        x = self.upsample(x)
        # A map whose size was rounded up becomes too large. Position i of it lies at voxel i * stride, so that what is
        # beyond is at the end
        x = x[:, :, : size[0], : size[1], : size[2]]
        return self.convolutions(torch.cat((x, skips.pop(0)), 1) if self.skip_channels else x)


class UnetDecoder(nn.Module):
    """A U-Net's decoder for maps that become smaller from stage to stage (Ronneberger et al. 2015, arXiv 1505.04597).

    From the smallest map up: enlarge by a transposed convolution, join the map of that size, two convolutions with a
    residual; at full resolution the volume itself is joined. Steps in which an axis is enlarged by more than a prime
    factor are taken one after the other. Volumes may have any size.

    encoder: with maps of several sizes; the stride of each is a multiple of the one before, and its img_size leaves the
        first stage more than one position, to be normalised over (ValueError otherwise)
    feature_size: channels at full resolution; they double with every stage below
    """

    def __init__(self, encoder: Encoder, classes: int, feature_size: int = 16):
        super().__init__()
        from monai.networks.blocks import UnetOutBlock  # see UnetrDecoder

        if not encoder.stages:
            raise ValueError("it reads feature maps of several sizes, and this encoder's are all of one; take unetr")
        self.layers = tuple(stage.block for stage in encoder.stages)
        steps, channels, stride = [], 1, (1, 1, 1)  # (channels of the skip, factor, stride after it), finest first
        for stage in encoder.stages:
            if any(c % f for c, f in zip(stage.stride, stride)):
                raise ValueError(f"a map with a stride of {stage.stride} voxels does not fit the one of {stride}")
            for factor in reversed(upsampling_factors([c // f for c, f in zip(stage.stride, stride)])):
                steps.append((channels, factor, stride))
                stride, channels = tuple(s * f for s, f in zip(stride, factor)), 0
            channels = stage.channels
        channels = [feature_size * 2**i for i in range(len(steps))]
        self.strides = [stride for _, _, stride in reversed(steps)]
        if math.prod(self.sizes(encoder.img_size)[0]) == 1:
            raise ValueError(
                f"an input of {encoder.img_size} voxels is too small to train it on: more than {self.strides[0]} are "
                "needed along an axis"
            )
        self.stages = nn.ModuleList(
            UpStage(below, skip, own, factor)
            for below, own, (skip, factor, _) in reversed([*zip([*channels[1:], encoder.embed_dim], channels, steps)])
        )
        self.head = UnetOutBlock(3, feature_size, classes)

    def sizes(self, size: Sequence[int]) -> list[tuple[int, ...]]:
        """(3,) positions that each stage puts out for a volume of `size` (3,) voxels."""
        return [tuple(-(-n // s) for n, s in zip(size, stride)) for stride in self.strides]

    def forward(self, volumes: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """volumes (B, 1, X, Y, Z), maps of the blocks `layers` (B, D_i, x_i, y_i, z_i) -> logits (B, classes, X, Y,
        Z)."""
        x, *skips = *reversed(maps), volumes  # deepest first
        for stage, size in zip(self.stages, self.sizes(volumes.shape[2:])):
            x = stage(x, skips, size)  # (B, channels, x, y, z), a step larger and at the end (B, F, X, Y, Z)
        return full_precision(self.head, x)


class LinearDecoder(nn.Module):
    """A linear layer on each position of the last block's map, then trilinear upsampling: shows what frozen features
    hold."""

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.layers = (len(encoder.blocks) - 1,)
        in_patches = encoder.first_position == tuple((n - 1) / 2 for n in encoder.patch_size)
        self.stride = None if in_patches else encoder.patch_size  # position i is a patch's middle, or voxel i * stride
        self.head = nn.Conv3d(encoder.embed_dim, classes, 1)

    def forward(self, volumes: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """volumes (B, 1, X, Y, Z), the last block's map [(B, D, x, y, z)] -> logits (B, classes, X, Y, Z)."""
        logits = full_precision(self.head, maps[-1])  # (B, classes, x, y, z)
        if self.stride is None:
            return F.interpolate(logits, size=volumes.shape[2:], mode="trilinear", align_corners=False)
        reach = [(n - 1) * s + 1 for n, s in zip(logits.shape[2:], self.stride)]  # from the first to the last of them
        logits = F.interpolate(logits, size=reach, mode="trilinear", align_corners=True)
        beyond = [n - r for n, r in zip(volumes.shape[2:], reach)]
        return F.pad(logits, (0, beyond[2], 0, beyond[1], 0, beyond[0]), mode="replicate")


# Each is called as UnetrDecoder(encoder, classes).
DECODERS = {"unetr": UnetrDecoder, "unet": UnetDecoder, "linear": LinearDecoder}


def choose_decoder(encoder: PretrainedEncoder) -> str:
    """Name of the decoder that suits an encoder's maps: all of one size, or smaller from stage to stage."""
    return "unet" if encoder.outline().stages else "unetr"


def build_segmenter(
    encoder: PretrainedEncoder, drop_path_rate: float | None, decoder: str, classes: int, freeze_encoder: bool
) -> Segmenter:
    """The Segmenter. encoder: PretrainedEncoder; decoder: its name. Raises UserError where the two don't fit."""
    model = encoder.build(0.0 if freeze_encoder else drop_path_rate)
    try:
        head = DECODERS[decoder](model, classes)
    except ValueError as error:
        raise UserError(f"--decoder {decoder} with --arch {encoder.arch}: {error}", everywhere=True) from error
    return Segmenter(model, head, freeze_encoder)


def segmenter_of(encoder: PretrainedEncoder, config: dict[str, Any], _: dict[str, Tensor]) -> Segmenter:
    """The Segmenter of a run's config."""
    return build_segmenter(encoder, 0.0, config["decoder"], config["classes"], config["freeze_encoder"])
