"""Layer-wise learning rates: the lower a layer of the encoder, the less it is changed."""

import torch
from torch import nn

import utils
from vision_transformer import Encoder


def layer_groups(
    model: nn.Module, prefix: str, encoder: Encoder, layer_decay: float, weight_decay: float, patch_embed: float = 1.0
) -> list[dict]:
    """Optimizer groups with layer-wise learning rates (Clark et al. 2020, Bao et al. 2022): `scale` is that of --lr.

    prefix: of the encoder's names in the model. Its `layer_of` tells the layer of each parameter; the head stands with
    the encoder's last norm at the top, with scale 1. Frozen parameters are left out. patch_embed: one more factor for
    what embeds the patches (Oquab et al. 2023).
    """
    groups, top = {}, len(encoder.blocks) + 1
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = encoder.layer_of(name[len(prefix) :]) if name.startswith(prefix) else top
        factor = patch_embed if name.startswith(f"{prefix}patch_embed.") else 1
        decays = utils.decays(name, parameter)
        group = groups.setdefault(
            (layer, factor, decays),
            {
                "params": [],
                "scale": factor * layer_decay ** (top - layer),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """rate: of the head; the layers below have `scale` of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
