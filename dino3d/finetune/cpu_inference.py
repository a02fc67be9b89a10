"""A segmenter's convolutions as CPUs are quickest at them, for inference: the same weights, the same logits but for
rounding.

Maps lie in memory position by position, all channels of one together ("channels last"), as a ViT's tokens do: oneDNN
then convolves without reordering maps before and after, a convolution of 1x1x1 is one matrix product, and so is a
transposed one. Nothing here is for training, whose gradients are another matter, nor for export.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino3d.finetune.heads import Segmenter

CHANNELS_LAST = torch.channels_last_3d


def rows(x: Tensor) -> Tensor:
    """(B x y z, C) of a map (B, C, x, y, z), a view of one in channels last."""
    return x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1])


def positions(rows: Tensor, batch: int, sides: Sequence[int]) -> Tensor:
    """(B, C, x, y, z) in channels last of (B x y z, C)."""
    return rows.view(batch, *sides, -1).permute(0, 4, 1, 2, 3)


class LastConvolution(nn.Conv3d):
    """nn.Conv3d with a stride of one, of a map (B, C, x, y, z) in channels last; so is what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1, 1):
            return positions(F.linear(rows(x), self.weight.flatten(1), self.bias), len(x), x.shape[2:])
        if self.in_channels == 1:  # of which oneDNN makes no use: what lies beside along z become channels
            beside, reach = self.kernel_size[2], self.padding[2]
            x = F.pad(x[:, 0], (reach, reach)).unfold(3, beside, 1)  # (B, X, Y, Z, beside)
            x, weight = x.permute(0, 4, 1, 2, 3), self.weight.permute(0, 4, 2, 3, 1)
            x, weight = (one.contiguous(memory_format=CHANNELS_LAST) for one in (x, weight))
            padding = *self.padding[:2], 0
        else:
            weight, padding = self.weight.contiguous(memory_format=CHANNELS_LAST), self.padding
        return F.conv3d(x, weight, self.bias, padding=padding).contiguous(
            memory_format=CHANNELS_LAST
        )  # small ones are not


class LastTransposedConvolution(nn.ConvTranspose3d):
    """nn.ConvTranspose3d whose stride is its kernel, of and to maps in channels last: one matrix product, since every
    position becomes a box of its own."""

    def forward(self, x: Tensor) -> Tensor:
        (kx, ky, kz), sides = self.kernel_size, x.shape[2:]
        boxes = rows(x) @ self.weight.permute(0, 2, 3, 4, 1).flatten(1)  # (B x y z, kx ky kz C)
        boxes = boxes.view(len(x), *sides, kx, ky, kz, self.out_channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
        y = boxes.reshape(len(x), sides[0] * kx, sides[1] * ky, sides[2] * kz, self.out_channels)
        return y.permute(0, 4, 1, 2, 3)  # (B, C, kx x, ky y, kz z)


class LastInstanceNorm(nn.InstanceNorm3d):
    """nn.InstanceNorm3d of a map in channels last, which torch would copy into another layout and back.

    Of a single volume its statistics are those of a batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 1 or x.dtype == torch.float64:
            return super().forward(x).contiguous(memory_format=CHANNELS_LAST)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, momentum=0.0, eps=self.eps)


def faster(network: Segmenter) -> Callable[[Tensor], Tensor]:
    """What gives the network's logits (B, classes, X, Y, Z) of (B, 1, X, Y, Z), without gradients: itself on a GPU."""
    if not isinstance(network, Segmenter):
        return network
    tensors = [*network.decoder.parameters(), *network.decoder.buffers()]
    if any(one.device.type != "cpu" for one in tensors):
        return network
    decoder = copy.deepcopy(network.decoder, {id(one): one for one in tensors})  # modules alone: weights are shared
    for module in decoder.modules():
        if isinstance(module, nn.Conv3d) and set(module.stride) == set(module.dilation) == {module.groups} == {1}:
            module.__class__ = LastConvolution
        elif isinstance(module, nn.ConvTranspose3d) and module.kernel_size == module.stride and module.bias is None:
            module.__class__ = LastTransposedConvolution
        elif type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.__class__ = LastInstanceNorm

    @torch.no_grad()
    def logits_of(volumes: Tensor) -> Tensor:
        maps = [one.contiguous(memory_format=CHANNELS_LAST) for one in network.features(volumes)]
        return decoder(volumes, maps)  # (B, classes, X, Y, Z)

    return logits_of
