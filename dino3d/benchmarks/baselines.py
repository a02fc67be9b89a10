"""The plain way to do what this repository does, for benchmark.py and the tests to compare with.

ITK files read slice by slice, MONAI's transforms one after the other on every sample, MONAI's ViT, and DINO's step
written out (Caron et al. 2021, algorithm 1) in eager PyTorch. Nothing here is used in training.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dino3d.data.conventions import LPS
from resnet3d import STEM_STRIDE, Bottleneck, ResNet
from vision_transformer import DINOHead, Encoder, MultiCropWrapper, VisionTransformer

PATCH = (121, 121, 61)  # voxels that earlier implementations read, and augmented ten times


# ------------------------------------------------------------------------------------------------------------- files


def read_itk(path: Path | str, start: Iterable[int], size: Iterable[int]) -> np.ndarray:
    with h5py.File(path, "r") as file:
        x, y, z = (slice(int(a), int(a + n)) for a, n in zip(start, size))
        return file["ITKImage/0/VoxelData"][z, y, x].T


def write_itk(path: Path | str, volume: np.ndarray, affine: np.ndarray) -> None:
    import SimpleITK

    affine = LPS @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(volume.T)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    SimpleITK.WriteImage(image, path, useCompression=True)


def convert_itk(folder: Path | str, path: Path | str) -> None:
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(reader.Execute(), "RAS"), path, useCompression=True)


class Patches(Dataset):
    """Random patches of ITK HDF5 files, with ten views each, by MONAI's transforms in a loader's worker.

    paths: of the samples; global_size, local_size: (3,) voxels of a view
    """

    def __init__(self, paths: Sequence[Path | str], global_size: Sequence[int], local_size: Sequence[int]) -> None:
        self.paths, self.sizes, self.transforms = paths, (global_size, local_size), None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        """[two global (1, x, y, z), eight local (1, x, y, z)] views."""
        if self.transforms is None:  # in each worker for itself: MONAI's transforms keep their random state
            self.transforms, self.rng = monai_transforms(*self.sizes, seed=index), np.random.RandomState(index)
        with h5py.File(self.paths[index], "r") as file:
            shape = file["ITKImage/0/VoxelData"].shape[::-1]
        start = self.rng.randint(0, np.array(shape) - PATCH + 1)
        return monai_views(read_itk(self.paths[index], start, PATCH), *self.transforms)


# ------------------------------------------------------------------------------------------------------------- views


def monai_transforms(
    global_size: Sequence[int], local_size: Sequence[int], seed: int
) -> tuple[Callable[[Tensor], Tensor], ...]:
    """[scaling, what a global view goes through, what a local view goes through]."""
    from math import radians

    from monai import transforms as monai

    def chain(size: Sequence[int], seed: int) -> Any:
        return monai.Compose(
            [
                monai.RandRotate(range_x=radians(30), range_y=radians(30), range_z=radians(30), prob=0.5),
                monai.RandAffine(scale_range=(0.25, 0.25, 0.25), prob=0.5),
                monai.RandAxisFlip(prob=0.5),
                monai.Rand3DElastic(sigma_range=(0, 7), magnitude_range=(0, 150), prob=0.5),
                monai.RandGaussianSmooth(sigma_x=(0.01, 2), sigma_y=(0.01, 2), sigma_z=(0.01, 2), prob=0.5),
                monai.RandHistogramShift(num_control_points=10, prob=0.5),
                monai.RandSpatialCrop(size, random_size=False),
            ]
        ).set_random_state(seed)

    scaling = monai.ScaleIntensityRange(a_min=-1000, a_max=1000, b_min=0, b_max=1, clip=True)
    return scaling, chain(global_size, seed), chain(local_size, seed + 1)


def monai_views(
    patch: np.ndarray,
    scaling: Callable[[Tensor], Tensor],
    global_view: Callable[[Tensor], Tensor],
    local_view: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Ten views of an (X, Y, Z) int16 patch, each augmented whole and then cropped."""
    scaled = scaling(torch.from_numpy(patch)[None])  # (1, X, Y, Z)
    return [global_view(scaled) for _ in range(2)] + [local_view(scaled) for _ in range(8)]


# ------------------------------------------------------------------------------------------------- model and step


class ViT(nn.Module):
    """MONAI's ViT with a class token; its position embedding is interpolated for views of another size.

    encoder: the VisionTransformer whose sizes and weights it has
    """

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        from monai.networks.nets import ViT as MonaiViT

        self.vit = MonaiViT(
            encoder.in_chans,
            encoder.img_size,
            encoder.patch_size,
            hidden_size=encoder.embed_dim,
            mlp_dim=encoder.blocks[0].mlp.fc1.out_features,
            num_layers=len(encoder.blocks),
            num_heads=encoder.num_heads,
            proj_type="conv",
            classification=True,
            qkv_bias=True,
            post_activation=None,
        )
        self.grid, self.vit.classification_head = encoder.grid_size, nn.Identity()
        load_into_monai(self.vit, encoder)
        # The class token's position is one of its own, as the ViT has it
        self.vit.cls_token = nn.Parameter(encoder.cls_token.detach().clone())
        self.pos_embed = nn.Parameter(encoder.pos_embed.detach().clone())  # (1, 1 + N, D)
        del self.vit.patch_embedding.position_embeddings

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens that enter the first block, the class token first: (B, 1, X, Y, Z) -> (B, 1 + N, D)."""
        x = self.vit.patch_embedding.patch_embeddings(x)  # (B, D, x, y, z)
        positions = self.pos_embed
        if x.shape[2:] != self.grid:
            patches = positions[:, 1:].transpose(1, 2).unflatten(2, self.grid)
            patches = F.interpolate(patches, size=x.shape[2:], mode="trilinear").flatten(2).transpose(1, 2)
            positions = torch.cat([positions[:, :1], patches], 1)
        x = torch.cat([self.vit.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return x + positions

    def get_intermediate_layers(self, x: Tensor, layers: Sequence[int], norm: bool | str) -> list[Tensor]:
        """As VisionTransformer's, for a decoder, which asks for norm="last"."""
        grid = [n // p for n, p in zip(x.shape[2:], self.vit.patch_embedding.patch_embeddings.kernel_size)]
        x, maps = self.tokens(x), []
        for i, block in enumerate(self.vit.blocks[: layers[-1] + 1]):
            x = block(x)
            if i in layers:
                tokens = self.vit.norm(x) if norm == "last" and i == len(self.vit.blocks) - 1 else x
                maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid))  # (B, D, x, y, z)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> class embedding (B, D)."""
        x = self.tokens(x)
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.norm(x)[:, 0]


def load_into_monai(theirs: nn.Module, ours: VisionTransformer) -> None:
    """Give MONAI's ViT, made with a class token and qkv_bias, the weights of a VisionTransformer."""
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # MONAI leaves PyTorch's 1e-5, the ViT's own is 1e-6

    renamed = {
        "patch_embed.proj": "patch_embedding.patch_embeddings",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.linear1",
        "mlp.fc2": "mlp.linear2",
    }
    weights = {}
    for name, value in ours.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        weights[name] = value  # qkv as it is: MONAI's "(qkv l d)" is the (3, heads, head_dim) order of ours
    # MONAI adds the class token after the position embedding, so there it has no position: fold ours in.
    pos_embed = weights.pop("pos_embed")
    weights["patch_embedding.position_embeddings"] = pos_embed[:, 1:]
    weights["cls_token"] = weights["cls_token"] + pos_embed[:, :1]
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("norm_cross_attn" in name for name in missing)  # unused without cross-attention


def monai_encoder(encoder: Encoder) -> nn.Module:
    """MONAI's network with the weights of an encoder."""
    if not isinstance(encoder, ResNet):
        return ViT(encoder)
    from monai.networks.nets import resnet

    theirs = resnet.ResNet(
        resnet.ResNetBottleneck if isinstance(encoder.blocks[0], Bottleneck) else resnet.ResNetBlock,
        [len(getattr(encoder, f"layer{i}")) for i in (1, 2, 3, 4)],
        [encoder.conv1.out_channels * 2**i for i in range(4)],
        n_input_channels=encoder.in_chans,
        conv1_t_stride=STEM_STRIDE,
        feed_forward=False,
        bias_downsample=False,
    )
    theirs.load_state_dict(encoder.state_dict())
    return theirs


class Model(nn.Module):
    """MONAI's ViT or ResNet and a DINO head with the weights of a MultiCropWrapper."""

    def __init__(self, ours: MultiCropWrapper) -> None:
        super().__init__()
        self.backbone = monai_encoder(ours.backbone)
        last = ours.head.last_layer.parametrizations.weight.original1  # (out_dim, bottleneck_dim)
        self.head = DINOHead(ours.backbone.embed_dim, len(last), norm_last_layer=True)
        self.head.load_state_dict(ours.head.state_dict())

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        return self.head(torch.cat([self.backbone(view) for view in views]))


def plain_step(
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    center: Tensor,
    views: Sequence[Tensor],
    values: Mapping[str, float],
    center_momentum: float = 0.9,
    clip: float = 3.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, Tensor]:
    """One step of DINO, plainly; returns the loss and the new centre.

    views: [global (2 B, 1, x, y, z), local (L B, 1, x, y, z)]; center: (1, K); values: what main_dino.Schedules.at
    gives
    """
    batch = len(views[0]) // 2
    for group in optimizer.param_groups:
        group["lr"] = values["lr"]
    optimizer.param_groups[0]["weight_decay"] = values["weight_decay"]
    with torch.autocast(views[0].device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            teacher_logits = teacher(views[:1])  # (2 B, K)
        student_logits = student(views)  # (V B, K)
    q = ((teacher_logits.float() - center) / values["teacher_temp"]).softmax(-1).split(batch)
    log_p = (student_logits.float() / 0.1).log_softmax(-1).split(batch)
    pairs = [(q[t] * log_p[s]).sum(-1).mean() for t in range(2) for s in range(len(log_p)) if s != t]
    loss = -sum(pairs) / len(pairs)
    optimizer.zero_grad()
    loss.backward()
    for parameter in student.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm(2)
            if norm > clip:
                parameter.grad.mul_(clip / (norm + 1e-6))
    optimizer.step()
    momentum = values["momentum_teacher"]
    with torch.no_grad():
        for theirs, ours in zip(teacher.parameters(), student.parameters()):
            theirs.mul_(momentum).add_((1 - momentum) * ours)
        center = center * center_momentum + teacher_logits.float().mean(0, keepdim=True) * (1 - center_momentum)
    return loss.item(), center
