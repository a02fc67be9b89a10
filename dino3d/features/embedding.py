"""One vector for each volume: what the encoder's last blocks make of it."""

import torch
from torch import Tensor

from vision_transformer import Encoder

POOLS = ("cls", "mean", "cls+mean")


def embed(encoder: Encoder, volumes: Tensor, pool: str = "cls", layers: int = 1) -> Tensor:
    """(B, F) embeddings of volumes (B, 1, X, Y, Z) with values in [0, 1], each block's tokens after the final norm.

    pool: cls: the class tokens of the last `layers` blocks, F = layers * D; mean: the means of their patch tokens,
        F = layers * D; cls+mean: those class tokens and the mean of the last block's patch tokens, F = (layers + 1) * D
        (Caron 2021, linear evaluation)
    Blocks come shallowest first. Raises ValueError for another pool, and for more layers than the encoder has blocks.
    """
    if pool not in POOLS:
        raise ValueError(f"pool is {pool}; expected one of {', '.join(POOLS)}")
    if pool == "cls" and layers == 1:
        return encoder(volumes)  # (B, D); spares the last block what nothing would read
    if pool == "mean":
        return torch.cat([one.flatten(2).mean(2) for one in encoder.get_intermediate_layers(volumes, layers, True)], 1)
    tokens = encoder.intermediate_tokens(volumes, layers)  # of each block (B, 1 + N, D)
    parts = [one[:, 0] for one in tokens] + ([tokens[-1][:, 1:].mean(1)] if pool == "cls+mean" else [])
    return torch.cat(parts, 1)


def embedding_width(encoder: Encoder, pool: str, layers: int) -> int:
    """F of `embed`."""
    return encoder.embed_dim * (layers + (pool == "cls+mean"))
