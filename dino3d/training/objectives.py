"""Parts of self-supervised objectives besides DINO's own loss, which stands in main_dino.py.

Sources:
    Sablayrolles et al. 2019, Spreading Vectors for Similarity Search, https://arxiv.org/abs/1806.03198
    Caron et al. 2020, Unsupervised Learning by Contrasting Cluster Assignments (SwAV), https://arxiv.org/abs/2006.09882
    Caron et al. 2021, Emerging Properties in Self-Supervised Vision Transformers, https://arxiv.org/abs/2104.14294
    Zhou et al. 2022, iBOT: Image BERT Pre-Training with Online Tokenizer, https://arxiv.org/abs/2111.07832
    Oquab et al. 2023, DINOv2: Learning Robust Visual Features without Supervision, https://arxiv.org/abs/2304.07193
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino3d.block_masks import PatchMasks
from utils import Processes
from vision_transformer import MultiCropWrapper

TISSUE_HU = -900.0  # mean below which a patch is taken for air
SINKHORN_ITERATIONS = 3  # SwAV, section 3.1; DINOv2
# Embeddings of equal views, such as two of air, differ by rounding alone: KoLeo's gradient there, the inverse of the
# distance, would drown all others. Below this distance there is none
LEAST_DISTANCE = 1e-4


class Centering(nn.Module):
    """What keeps a teacher's outputs spread over its prototypes.

    out_dim: prototypes; momentum: of the running mean of the teacher's logits
    centering: "mean": that mean is taken off the teacher's logits (DINO, eq. 4); "sinkhorn": the batch's
        `sinkhorn_offsets` are added to them instead, and the mean is only kept up, to be shown and for a run that goes
        back to it
    """

    def __init__(self, out_dim: int, momentum: float, centering: str = "mean") -> None:
        super().__init__()
        self.center_momentum, self.centering = momentum, centering
        self.register_buffer("center", torch.zeros(1, out_dim))

    def log_teacher(self, logits: Tensor, temp: float, processes: Processes, kept: Tensor | None = None) -> Tensor:
        """(N, K) logarithms of the teacher's probabilities, the targets. kept: see `sinkhorn_offsets`"""
        if self.centering == "mean":
            return ((logits - self.center) / temp).log_softmax(-1)
        scores = logits / temp
        return (scores + sinkhorn_offsets(scores, processes, kept)).log_softmax(-1)

    @torch.no_grad()
    def update_center(self, mean: Tensor, finite: Tensor) -> None:
        """Running mean of the teacher's logits (DINO, eq. 4). mean: (1, K) over batch and ranks; finite: () bool,
        False: the step was skipped and the centre stays as it is."""
        self.center.lerp_(torch.where(finite, mean, self.center), 1 - self.center_momentum)


@torch.no_grad()
def sinkhorn_offsets(
    scores: Tensor, processes: Processes, kept: Tensor | None = None, iterations: int = SINKHORN_ITERATIONS
) -> Tensor:
    """(1, K) what to add to scores so that their softmax is Sinkhorn-Knopp's assignment (SwAV, algorithm 1; DINOv2).

    scores: (N, K) teacher's logits of this rank over their temperature; processes: whose samples make the batch
    kept: (N,) bool, the samples that count, all with None; N may differ between ranks
    An iteration gives every prototype the same share of the batch, then every sample the same weight: of exp(scores)
    first the sums over the samples are made equal, then those over the prototypes. The last of these normalisations is
    the caller's softmax. In logarithms: exp(1 / 0.01) is beyond single precision.
    """
    offsets, weights = scores.new_zeros(1, scores.shape[1]), scores.new_zeros(len(scores), 1)
    for iteration in range(iterations):
        if iteration:
            weights = (scores + offsets).logsumexp(1, keepdim=True)  # (N, 1)
        if kept is not None:
            weights = weights.masked_fill(~kept[:, None], torch.inf)
        sums = (scores - weights).logsumexp(0)  # (K,) over this rank's samples
        sums = processes.stack(sums).logsumexp(0, keepdim=True)  # (1, K) over all
        offsets = -sums.clamp_min(torch.finfo(sums.dtype).min)  # where no sample counts, they are equal, and no NaN
    return offsets


def koleo_loss(embeddings: Tensor) -> Tensor:
    """() Kozachenko-Leonenko estimator of minus the entropy (Sablayrolles 2019, eq. 2; DINOv2): - mean of ln d_i.

    embeddings: (B, D), B at least 2; d_i: the distance of the i-th, at unit length, from its nearest neighbour
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        x = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)  # (B, D)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)  # (B,); -2: below every cosine
        distances = torch.linalg.vector_norm(x - x[nearest], dim=1)
        return -distances.clamp_min(LEAST_DISTANCE).log().mean()


class MaskedMultiCrop(MultiCropWrapper):
    """A MultiCropWrapper of a VisionTransformer with a second head, for patch tokens, and a mask token (iBOT)."""

    def __init__(self, backbone: nn.Module, head: nn.Module, patch_head: nn.Module) -> None:
        super().__init__(backbone, head)
        self.patch_head = patch_head
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))

    def forward(
        self,
        views: Sequence[Tensor],
        return_embeddings: bool = False,
        tokens: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """views, return_embeddings: as of MultiCropWrapper

        tokens: (M,) indices among the B_0 (1 + N) tokens of the first of `views`; with them (logits, embeddings, patch
            logits (M, out_dim)) are returned, without them what MultiCropWrapper returns
        hidden: (B_0, N) bool, patches of the first of `views` that the mask token takes the place of
        """
        if tokens is None:
            return super().forward(views, return_embeddings)
        seen = self.backbone.forward_views(views, hidden, self.mask_token, all_tokens=True)  # [(B_i, 1 + N_i, D)]
        embeddings = torch.cat([one[:, 0] for one in seen])  # (sum of B_i, D)
        return self.head(embeddings), embeddings, self.patch_head(seen[0].flatten(0, 1).index_select(0, tokens))


class PatchLoss(Centering):
    """Cross-entropy between the teacher's and the student's outputs for the patches that the student does not see
    (iBOT, eq. 2), with a weight beside DINO's loss.

    weight: of it; patch_size: (3,) voxels, where only patches that hold tissue are hidden, else None
    clip_range: HU that are 0 and 1 in the views, by which air is told
    student_temp: temperature of the student; others: see `Centering`
    """

    def __init__(
        self,
        weight: float,
        out_dim: int,
        momentum: float,
        centering: str,
        student_temp: float,
        patch_size: Sequence[int] | None = None,
        clip_range: Sequence[float] = (-1000, 1000),
    ) -> None:
        super().__init__(out_dim, momentum, centering)
        self.air = (TISSUE_HU - clip_range[0]) / (clip_range[1] - clip_range[0])  # grey value
        self.weight, self.student_temp, self.patch_size = weight, student_temp, patch_size

    def hide(self, masks: PatchMasks, views: Tensor) -> PatchMasks:
        """What is hidden of global views, (2 B, 1, x, y, z): with `patch_size` no patch that is air on average."""
        if self.patch_size is None:
            return masks
        grey = F.avg_pool3d(views, tuple(self.patch_size)).flatten(1)  # (2 B, N)
        return masks._replace(hidden=masks.hidden & (grey >= self.air))

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        masks: PatchMasks,
        teacher_temp: float,
        processes: Processes,
    ) -> dict[str, Tensor]:
        """student_logits, teacher_logits: (M, K) of the tokens of `masks`.

        Returns {name: ()}: "ibot", the mean over a view's hidden patches, of which the mean over all 2 B views is
        taken, those with nothing hidden counting as 0; "ibot_kl", the same of the KL divergence.
        """
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        kept, weights = masks.of_tokens()
        weights = weights.to(dtype) / len(masks.hidden)  # (M,)
        log_teacher = self.log_teacher(teacher_logits.to(dtype), teacher_temp, processes, kept)  # (M, K)
        teacher = log_teacher.exp()
        losses = -(teacher * (student_logits.to(dtype) / self.student_temp).log_softmax(-1)).sum(-1)  # (M,)
        loss, entropy = (losses * weights).sum(), -((teacher * log_teacher).sum(-1) * weights).sum()
        return {"ibot": loss, "ibot_kl": loss.detach() - entropy}

    def batch_sum(self, teacher_logits: Tensor, masks: PatchMasks) -> Tensor:
        """(1, K + 1) sum of a micro-batch's teacher logits of hidden patches, and their number."""
        kept = masks.of_tokens()[0].to(self.center.dtype)
        return torch.cat([kept[None] @ teacher_logits.to(self.center.dtype), kept.sum().view(1, 1)], 1)

    @torch.no_grad()
    def update_from_sum(self, total: Tensor, finite: Tensor) -> None:
        """total: what `batch_sum` gave, summed or averaged over micro-batches and ranks; finite: see `update_center`"""
        number = total[:, -1:]
        self.update_center(total[:, :-1] / number.clamp_min(1e-9), finite & (number > 0).squeeze())
