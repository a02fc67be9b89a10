"""Parts of self-supervised objectives besides DINO's own loss, which stands in main_dino.py.

Sources:
    Caron et al. 2020, Unsupervised Learning by Contrasting Cluster Assignments (SwAV), https://arxiv.org/abs/2006.09882
    Oquab et al. 2023, DINOv2: Learning Robust Visual Features without Supervision, https://arxiv.org/abs/2304.07193
"""

import torch
from torch import Tensor

from utils import Processes

SINKHORN_ITERATIONS = 3  # SwAV, section 3.1; DINOv2


@torch.no_grad()
def sinkhorn_offsets(scores: Tensor, processes: Processes, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """(1, K) what to add to scores so that their softmax is Sinkhorn-Knopp's assignment (SwAV, algorithm 1; DINOv2).

    scores: (B, K) teacher's logits of this rank over their temperature; processes: whose samples make the batch.
    An iteration gives every prototype the same share of the batch, then every sample the same weight: of exp(scores)
    first the sums over the samples are made equal, then those over the prototypes. The last of these normalisations is
    the caller's softmax. In logarithms: exp(1 / 0.01) is beyond single precision.
    """
    offsets, weights = torch.zeros_like(scores[:1]), torch.zeros_like(scores[:, :1])  # (1, K), (B, 1)
    for iteration in range(iterations):
        if iteration:
            weights = (scores + offsets).logsumexp(1, keepdim=True)  # (B, 1)
        sums = (scores - weights).logsumexp(0)  # (K,) over this rank's samples
        offsets = -processes.stack(sums).logsumexp(0, keepdim=True)  # (1, K) over all
    return offsets
