"""Does the teacher still tell views apart? What is measured of its outputs, and when to warn that it has collapsed."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils import Processes

# Measured on small CPU runs on real CT, see docs/LOG.md. A teacher that was neither uniform nor constant kept the
# entropy between 0.6 and 0.95 of ln(out_dim) with 5 to 20 prototypes winning (width 192, out_dim 1024; vit_tiny on two
# CTs). Without a centre, or with one of momentum 0.999, it fell below 0.1 by step 40 with 2 winning; at teacher
# temperature 0.1 it stood above 0.97 with a KL divergence below 0.05. One that went uniform passed 0.98 and 0.03 by
# step 20 with 9 to 35 winning: their number alone does not tell a uniform teacher.
UNIFORM_ENTROPY, UNIFORM_KL = 0.97, 0.05
CONSTANT_ENTROPY, CONSTANT_WINNERS = 0.1, 2
# vit_micro, centre of momentum 0.9: the effective rank fell below half of the start's by step 70, to a quarter by 120,
# with 2 to 7 prototypes winning for the next 200 steps and the entropy at 0.6 to 0.9. With Sinkhorn-Knopp it stayed
# above 0.55 of the start's for 700 steps; at ten times the rate it fell below half by step 50, with 92 to 180 winning.
# The demo's fell to 0.45 too, with the centre and 17 to 20 winning. The mutual information tells a fall into few
# dimensions from neither: 0.6 nats, as before training.
FALLEN_RANK, FEW_WINNERS = 0.5, 8
FLAT_ENTROPY = 0.95  # with it, a teacher temperature of 0.1 was the cause; else the entropy stayed below 0.9
PATIENCE = 3  # log entries in a row before a warning: a single one may be chance
ENOUGH_VIEWS = 32  # teacher outputs that an entry must rest on to count prototypes
RANK_VIEWS = 256  # the last so many embeddings of an entry give its effective rank


class TeacherOutputs(NamedTuple):
    """What a step tells of its teacher, on the device.

    winners: (2 B per micro-batch,) largest prototype of each output
    mean_probability: (K,) mean of all outputs of this rank
    features: (2 B, D) embeddings of the last micro-batch
    """

    winners: Tensor
    mean_probability: Tensor
    features: Tensor


@dataclass
class TeacherFigures:
    """Of a log entry, over its steps and all ranks.

    wins: (K,) how often each prototype was the largest; views: outputs; marginal_entropy: of their mean, in nats
    effective_rank: of so many embeddings as rank_views; NaN on all ranks but the first
    """

    wins: Tensor
    views: int
    marginal_entropy: float
    effective_rank: float
    rank_views: int


class TeacherStatistics:
    """Sums of `TeacherOutputs` over the steps of a log entry, on the device, whose host does not wait."""

    def __init__(self, out_dim: int, processes: Processes) -> None:
        self.out_dim, self.processes = out_dim, processes
        self.reset()

    def reset(self) -> None:
        self._sums = torch.zeros(2, self.out_dim, dtype=torch.float64, device=self.processes.device)
        self._features = deque()

    def add(self, outputs: TeacherOutputs, finite: Tensor) -> None:
        """finite: () bool, False for a step that was skipped and does not count."""
        one = finite.to(self._sums.dtype)
        self._sums[0].index_add_(0, outputs.winners, one.expand(len(outputs.winners)))
        self._sums[1] += torch.where(finite, outputs.mean_probability, 0)
        self._features.append(torch.where(finite, outputs.features, torch.nan))
        while sum(map(len, self._features)) - len(self._features[0]) >= self._rows:
            self._features.popleft()

    @property
    def _rows(self) -> int:
        """Embeddings that each rank gives."""
        return math.ceil(RANK_VIEWS / self.processes.world_size)

    def gather(self) -> TeacherFigures:
        """Bring together what the ranks have summed, on all of them."""
        wins, probability = self.processes.sum(self._sums.clone())
        features = self.processes.stack(torch.cat(list(self._features))[-self._rows :]).flatten(0, 1)
        features = features[features.isfinite().all(1)]  # but those of skipped steps
        rank = effective_rank(features).item() if self.processes.is_main and len(features) > 1 else math.nan
        marginal = torch.special.entr(probability / probability.sum().clamp_min(1e-300)).sum()
        return TeacherFigures(wins, round(wins.sum().item()), marginal.item(), rank, len(features))


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007). features: (B, D); 1 to min(B, D).

    From the eigenvalues of the smaller Gram matrix, which is far less work than singular values of many features; in
    double precision, since these are their squares.
    """
    features = features.double()
    features = features - features.mean(0)
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    shares = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = shares / shares.sum().clamp_min(1e-12)
    return torch.special.entr(shares).sum().exp()


def collapse_warning(
    entropy: float,
    kl: float,
    winners: int,
    out_dim: int,
    views: int,
    rank: float = math.nan,
    first_rank: float = math.nan,
    sinkhorn: bool = False,
) -> str | None:
    """What to tell the user about a teacher that tells little of views apart, or None.

    entropy: mean entropy of the teacher's outputs in nats; kl: divergence of the student from it
    winners: prototypes that are the largest output of any of `views` teacher outputs
    rank: effective rank of its embeddings; first_rank: what it was at first
    sinkhorn: instead of a centre, so that many prototypes win whatever the embeddings are
    """
    share = entropy / math.log(out_dim)
    if share > UNIFORM_ENTROPY and kl < UNIFORM_KL:
        return (
            f"the teacher is nearly uniform (entropy {share:.2f} of ln(out_dim), KL {kl:.3f}): nothing is learnt. "
            "Lower --teacher_temp, and --warmup_teacher_temp where there is a warm-up (0.04), or --lr where it is high"
        )
    if share > FLAT_ENTROPY:
        advice = "Lower --teacher_temp"
    elif sinkhorn:
        advice = "Lower --lr"
    else:
        advice = "--centering sinkhorn with --teacher_temp 0.02, a lower --lr and a higher --momentum_teacher keep more"
    few = (winners <= FEW_WINNERS or sinkhorn) and views >= ENOUGH_VIEWS
    if share >= CONSTANT_ENTROPY and few and rank < FALLEN_RANK * first_rank:
        return (
            f"the teacher's features have fallen into few dimensions (effective rank {rank:.1f}, {first_rank:.1f} at "
            f"first, {winners} prototypes winning): it sorts views into few kinds, and recovers slowly. {advice}; what "
            "the features are worth, only --probe_dir tells"
        )
    if share < CONSTANT_ENTROPY or (winners <= CONSTANT_WINNERS and views >= ENOUGH_VIEWS):
        return (
            f"the teacher answers nearly the same to every view (entropy {share:.2f} of ln(out_dim), {winners} "
            "prototypes winning): it has collapsed. Use a --center_momentum of 0.9 or --centering sinkhorn, lower "
            "--lr, keep --norm_last_layer true, raise --teacher_temp, or lower --out_dim for small data"
        )
    return None


class CollapseWatch:
    """Warns once of each kind of collapse, when it has lasted for some log entries.

    records: of the log.txt so far, whose effective rank a resumed run is compared with
    """

    def __init__(self, out_dim: int, records: Sequence[Mapping[str, Any]] = (), sinkhorn: bool = False) -> None:
        self.out_dim, self.sinkhorn = out_dim, sinkhorn
        self._streak, self._told, self._most_views = 0, set(), 0
        ranks = [record.get(name) for record in records for name in ("effective_rank_first_steps", "effective_rank")]
        self._first_rank = max((rank for rank in ranks if isinstance(rank, float)), default=0.0)

    def look(self, values: Mapping[str, float], winners: int, teacher: TeacherFigures) -> str | None:
        """The warning that a log entry gives rise to. values: its means, "teacher_entropy" and "kl" among them"""
        self._most_views = max(self._most_views, teacher.rank_views)
        if 2 * teacher.rank_views < self._most_views:
            return None  # an epoch's last few steps: the rank of fewer views is lower
        self._first_rank = max(self._first_rank, teacher.effective_rank)
        warning = collapse_warning(
            values["teacher_entropy"],
            values["kl"],
            winners,
            self.out_dim,
            teacher.views,
            teacher.effective_rank,
            self._first_rank,
            self.sinkhorn,
        )
        self._streak = self._streak + 1 if warning else 0
        kind = warning and warning.split("(")[0]
        if self._streak < PATIENCE or kind in self._told:
            return None
        self._told.add(kind)
        return warning
