"""3D residual networks (resnet18, 34, 50, 101), an encoder as `vision_transformer.Encoder` has it.

Volumes are (B, C, X, Y, Z) in RAS, as everywhere. The first convolution halves x and y and leaves z, as Hara et al.
leave time: CT has fewer and thicker slices than rows, and a view of 96x96x48 voxels is a cube of 24 positions after the
first convolution and pooling. Names of parameters are those of torchvision, MONAI and MedicalNet.

Sources:
    He et al. 2016, Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385
    Hara et al. 2018, Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and ImageNet?,
        https://arxiv.org/abs/1711.09577
    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STEM_STRIDE = (2, 2, 1)  # of the first convolution (Hara 2018, table 1, with z in the place of time)


class Stage(NamedTuple):
    """Feature maps of one size. block: the last one that gives it; channels: its width; stride: (3,) voxels between two
    of its positions"""

    block: int
    channels: int
    stride: tuple[int, ...]


class Convolution(nn.Conv3d):
    """nn.Conv3d whose gradients hold in bf16 on CPUs too.

    There oneDNN 3.12 (torch 2.13, AVX-512 with bf16) takes what lies in memory for part of the weights' gradient, where
    the kernel is longer than the map along its first axis, as with 3x3x3 on a map of 2x2x3: such a map is small, and
    is convolved in single precision instead.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and 1 < x.shape[2] < self.kernel_size[0]:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


def right_in_bf16(model: nn.Module) -> nn.Module:
    """Make a model's 3D convolutions, such as another library's, those above, in place."""
    for module in model.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = Convolution  # its parameters and settings are the same ones
    return model


def convolution(in_chans: int, channels: int, kernel: int, stride: int | tuple[int, ...] = 1) -> Convolution:
    """Without a bias, which the batch normalisation after it would take off again."""
    return Convolution(in_chans, channels, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions and a shortcut (He 2016, figure 5, left).

    (B, in_chans, x, y, z) -> (B, width, x', y', z'); a stride of 2 gives ceil(x / 2) positions. The shortcut is then,
    as with other channels, a 1x1x1 convolution (He's option B).
    """

    expansion = 1

    def __init__(self, in_chans: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = convolution(in_chans, width, 3, stride)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = convolution(width, width, 3)
        self.bn2 = nn.BatchNorm3d(width)
        self.downsample = shortcut(in_chans, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu_(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu_(residual + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1x1, 3x3x3 and 1x1x1 convolutions and a shortcut (He 2016, figure 5, right): four times `width` channels.

    The 3x3x3 convolution has the stride, as in torchvision and MONAI, and not the first.
    """

    expansion = 4

    def __init__(self, in_chans: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = convolution(in_chans, width, 1)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = convolution(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm3d(4 * width)
        self.downsample = shortcut(in_chans, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu_(self.bn1(self.conv1(x)))
        residual = F.relu_(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu_(residual + self.downsample(x))


def shortcut(in_chans: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_chans == channels:
        return nn.Identity()
    return nn.Sequential(convolution(in_chans, channels, 1, stride), nn.BatchNorm3d(channels))


class ResNet(nn.Module):
    """Residual network (He 2016, table 1) in 3D (Hara 2018), without a classifier: volumes of any size.

    Feature maps have ceil(size / stride) positions on each axis, of which the last stage's is (32, 32, 16) voxels: also
    a small view gives at least one. Training normalises over the batch: a single sample of one last position is torch's
    ValueError then.

    Args:
        block: BasicBlock or Bottleneck.
        depths: residual blocks of each of the four stages.
        img_size: training size (X, Y, Z) in voxels; nothing of the network depends on it.
        in_chans: channels of the input.
        grad_checkpointing: keep each block's input alone for the backward pass and compute the block once more there
            (Chen 2016): the same gradients for a fraction of the memory, at a third more time. An attribute too.
        width: channels of the first convolution and of the first stage, which double with each stage.

    Raises:
        ValueError: img_size has not three axes; from every method that takes a volume, if its rank or channels don't
            fit.
    """

    first_position, has_class_token = (0.0, 0.0, 0.0), False

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        img_size: Sequence[int] = (96, 96, 48),
        in_chans: int = 1,
        grad_checkpointing: bool = False,
        width: int = 64,
    ) -> None:
        super().__init__()
        if len(img_size) != 3 or min(img_size) < 1:
            raise ValueError(f"img_size {tuple(img_size)} must be three positive numbers of voxels (X, Y, Z)")
        self.img_size, self.in_chans, self.grad_checkpointing = tuple(img_size), in_chans, grad_checkpointing
        self.shortcut_adds_channels = block is BasicBlock  # which then can be without weights
        self.conv1 = convolution(in_chans, width, 7, STEM_STRIDE)
        self.bn1 = nn.BatchNorm3d(width)
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        channels, stride, last, stages = width, [2 * n for n in STEM_STRIDE], -1, []
        for i, depth in enumerate(depths):
            step = 1 if i == 0 else 2
            first = block(channels, width * 2**i, step)
            channels, stride, last = width * 2**i * block.expansion, [n * step for n in stride], last + depth
            others = (block(channels, width * 2**i) for _ in range(1, depth))
            setattr(self, f"layer{i + 1}", nn.Sequential(first, *others))
            stages.append(Stage(last, channels, tuple(stride)))
        self.stages, self.embed_dim, self.patch_size = tuple(stages), channels, stages[-1].stride
        for module in self.modules():
            if isinstance(module, nn.Conv3d):  # He et al. 2015, arXiv 1502.01852, as torchvision and MONAI
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def blocks(self) -> nn.ModuleList:
        """The residual blocks of all stages, in order."""
        return nn.ModuleList(self._blocks())

    def _blocks(self) -> list[nn.Module]:
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def forward(self, x: Tensor) -> Tensor:
        """Mean of the last feature map: (B, C, X, Y, Z) -> (B, D)."""
        (x,) = self._maps(x, (self.stages[-1].block,))  # (B, D, x, y, z)
        return x.mean((2, 3, 4))

    def get_intermediate_layers(self, x: Tensor, n: int | Sequence[int] = 1, norm: bool | str = True) -> list[Tensor]:
        """Feature maps of some residual blocks, shallowest first, each (B, channels, x, y, z), see `stages`.

        Entry [..., i, j, k] is the surrounding of voxel (i, j, k) * stride.

        Args:
            x: volumes (B, C, X, Y, Z).
            n: how many of the last blocks, or which blocks: ascending indices, 0 the first block's.
            norm: there is no final norm: the maps are the same whatever it says.

        Raises:
            ValueError: `n` names no block, or not blocks of this model in ascending order.
        """
        depth = self.stages[-1].block + 1
        indices = n if isinstance(n, Sequence) else range(depth - n, depth)
        ascending = all(a < b for a, b in pairwise(indices))
        if not (indices and ascending and 0 <= indices[0] and indices[-1] < depth):
            raise ValueError(
                f"n is {n}; the model has {depth} blocks to take feature maps from: give a number of last "
                f"blocks from 1 to {depth}, or indices from 0 to {depth - 1} in ascending order"
            )
        return list(self._maps(x, indices))

    def embeddings_and_maps(self, x: Tensor, n: int | Sequence[int] = 1) -> list[tuple[Tensor, Tensor]]:
        """(mean (B, channels) of it, feature map (B, channels, x, y, z)) of some residual blocks, shallowest first.

        x, n, errors: as of `get_intermediate_layers`.
        """
        return [(one.mean((2, 3, 4)), one) for one in self.get_intermediate_layers(x, n)]

    def _maps(self, x: Tensor, indices: Sequence[int]) -> Iterator[Tensor]:
        if x.ndim != 5 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected a volume of shape (B, {self.in_chans}, X, Y, Z), found {tuple(x.shape)}")
        x = self.maxpool(F.relu_(self.bn1(self.conv1(x))))  # (B, width, X / 4, Y / 4, Z / 2)
        for i, block in enumerate(self._blocks()[: indices[-1] + 1]):
            x = self._run(block, x)
            if i in indices:
                yield x

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        """What a block makes of x."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            contexts = partial(_contexts, block)
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return block(x)

    def layer_of(self, name: str) -> int:
        """0 for the first convolution and its norm, i + 1 for residual block i."""
        part, _, rest = name.partition(".")
        if not part.startswith("layer"):
            return 0
        stage = int(part.removeprefix("layer")) - 1
        return (self.stages[stage - 1].block + 1 if stage else 0) + int(rest.split(".")[0]) + 1

    def adapt_weights(self, found: dict[str, Tensor], prefix: str = "") -> list[str]:
        """Bring weights of another ResNet of the same blocks, {name: tensor}, to this one's form, in place; returns
        notices.

        Its first convolution may have other channels, its shortcuts a bias (MONAI's default), which goes into the
        running mean after them, or no weights at all (He's option A: MedicalNet's resnet18 and resnet34).
        prefix: of this network's names
        """
        notices, first = [], found.get(prefix + "conv1.weight")
        if first is not None and first.ndim == 5 and self.in_chans == 1 < first.shape[1]:
            found[prefix + "conv1.weight"] = first.sum(1, keepdim=True)
            notices.append(f"the first convolution's {first.shape[1]} channels are summed, as of equal inputs")
        weightless = not any(name.startswith(prefix) and ".downsample." in name for name in found)
        for name, wanted in self.state_dict().items():
            stem, _, kind = (prefix + name).rpartition(".")
            if kind == "num_batches_tracked":  # files of before torch 0.4.1 have none
                found.setdefault(prefix + name, wanted)
            if not name.endswith(".downsample.0.weight"):
                continue
            norm = stem.removesuffix("0") + "1."
            bias = found.pop(stem + ".bias", None)
            if bias is not None and norm + "running_mean" in found:
                found[norm + "running_mean"] = found[norm + "running_mean"] - bias
            if weightless and self.shortcut_adds_channels:
                found[prefix + name] = torch.eye(*wanted.shape[:2])[:, :, None, None, None]
                ones, eps = torch.ones(len(wanted)), nn.BatchNorm3d(1).eps
                found |= {norm + "weight": ones, norm + "bias": 0 * ones, norm + "running_mean": 0 * ones}
                found[norm + "running_var"] = ones - eps
        if weightless and self.shortcut_adds_channels:
            notices.append(
                "its shortcuts have no weights (option A): they become equal convolutions, whose batch norm is the "
                "identity in evaluation and normalises them once they are trained"
            )
        return notices


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), _statistics_kept(block)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """A block that is computed once more must not let its running means and variances follow the same batch twice."""
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in before:
                buffer.copy_(old)


def blocks_of(names: Iterable[str]) -> tuple[type, tuple[int, ...]]:
    """(kind of block, (4,) blocks in each stage) of a ResNet by the names of its parameters, whatever their prefix; 0
    blocks where they are no ResNet's."""
    depths, bottleneck = [0] * 4, False
    for name in names:
        if match := re.search(r"(?:^|\.)layer([1-4])\.(\d+)\.conv([1-3])\.weight$", name):
            stage, block, number = map(int, match.groups())
            depths[stage - 1], bottleneck = max(depths[stage - 1], block + 1), bottleneck or number == 3
    return Bottleneck if bottleneck else BasicBlock, tuple(depths)


def architecture_of(names: Iterable[str]) -> str | None:
    """Which of the ResNets below has these names of parameters, another one in words, or None where none has."""
    found = blocks_of(names)
    known = next((name for name, build in RESNETS.items() if build.args == found), None)
    return known or (f"a ResNet of {' + '.join(map(str, found[1]))} blocks" if all(found[1]) else None)


# Each is called as resnet50(img_size=(96, 96, 48), in_chans=1).
resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(ResNet, Bottleneck, (3, 4, 23, 3))

RESNETS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50, "resnet101": resnet101}
