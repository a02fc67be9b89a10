"""Which patches of the global views the student does not see, for iBOT: blocks, drawn with a sample's views.

Sources:
    Bao et al. 2022, BEiT: BERT Pre-Training of Image Transformers, https://arxiv.org/abs/2106.08254, algorithm 1
    Zhou et al. 2022, iBOT: Image BERT Pre-Training with Online Tokenizer, https://arxiv.org/abs/2111.07832
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from augmentations import keyed_rng

GLOBAL_VIEWS = 2
MASK_VIEWS = 1 << 20  # added to a view's number in its masks' key, beyond all views: their draws stay as they are
SMALLEST_BLOCK = 4  # patches; BEiT has 16 of 196, DINOv2 4
LONGEST_SIDE = 1 / 0.3  # ratio of a block's sides at most, as in BEiT
ATTEMPTS = 10  # to place one block


@dataclass(frozen=True)
class BlockMasks:
    """Draws masks. grid: (3,) patches of a global view along x, y and z, at least two in all

    probability: that a view has any patch hidden; share: (least, most) of its patches, uniform in between. Both as in
        iBOT and DINOv2
    """

    grid: tuple[int, int, int]
    probability: float = 0.5
    share: tuple[float, float] = (0.1, 0.5)

    def draw(self, seed: int, epoch: int, sample: int) -> np.ndarray:
        """(2, N) bool, patches of a sample's global views that are hidden, keyed as the views themselves are."""
        return np.stack(
            [self.draw_view(keyed_rng(seed, epoch, sample, MASK_VIEWS + view)) for view in range(GLOBAL_VIEWS)]
        )

    def draw_view(self, rng: np.random.RandomState) -> np.ndarray:
        """(N,) bool: blocks of patches (BEiT, algorithm 1, with three sides), filled up patch by patch to an exact
        number where no other block fits in."""
        mask, patches = np.zeros(self.grid, bool), math.prod(self.grid)
        if rng.rand() >= self.probability:
            return mask.ravel()
        wanted = min(max(1, round(rng.uniform(*self.share) * patches)), patches - 1)
        while (left := wanted - int(mask.sum())) and any(self.add_block(mask, left, rng) for _ in range(ATTEMPTS)):
            pass
        free = np.flatnonzero(~mask.ravel())
        mask.ravel()[rng.permutation(free)[:left]] = True
        return mask.ravel()

    def add_block(self, mask: np.ndarray, most: int, rng: np.random.RandomState) -> bool:
        """Hide one more block, of at most `most` patches that are not hidden yet; whether one fitted."""
        volume = rng.uniform(min(SMALLEST_BLOCK, most), most)
        ratios = np.exp(rng.uniform(-math.log(LONGEST_SIDE), math.log(LONGEST_SIDE), 2))  # of x and y to z
        sides = np.rint(np.array([*ratios, 1]) * (volume / ratios.prod()) ** (1 / 3)).astype(int).clip(1)
        if (sides > self.grid).any():
            return False
        start = rng.randint(0, np.array(self.grid) - sides + 1)
        block = mask[tuple(slice(first, first + side) for first, side in zip(start, sides))]
        if not 0 < block.size - block.sum() <= most:
            return False
        block[:] = True
        return True


class PatchMasks(NamedTuple):
    """The masks of a batch's 2 B global views of N patches, the first view of all samples first.

    hidden: (2 B, N) bool; tokens: (M,) where the hidden patches are among the 2 B (1 + N) tokens. They are found on the
    CPU, so that the host needn't wait for a GPU to count them.
    """

    hidden: Tensor
    tokens: Tensor

    def to(self, device: torch.device | str) -> "PatchMasks":
        return PatchMasks(*(tensor.to(device, non_blocking=True) for tensor in self))

    def of_tokens(self) -> tuple[Tensor, Tensor]:
        """((M,) bool, whether each of `tokens` is still hidden; (M,) weights, 1 / the hidden patches of its view)."""
        tokens_per_view = self.hidden.shape[1] + 1
        view, patch = self.tokens // tokens_per_view, self.tokens % tokens_per_view - 1
        counts, kept = self.hidden.sum(1).clamp_min(1), self.hidden[view, patch]
        return kept, kept / counts[view]


def collate_masks(masks: Sequence[np.ndarray]) -> PatchMasks:
    """The PatchMasks of what `BlockMasks.draw` gave for each sample."""
    hidden = torch.from_numpy(np.concatenate(np.stack(masks, 1)))  # (2 B, N)
    view, patch = hidden.nonzero(as_tuple=True)
    return PatchMasks(hidden, view * (hidden.shape[1] + 1) + 1 + patch)
