"""What stands on the encoder for a task with labels: one module = encoder + head, one forward, so that DDP sees it all.

Volumes are (B, 1, X, Y, Z) in RAS with grey values in [0, 1]; features are the encoder's class embedding (B, D).
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.07  # of the neighbours' votes (Caron et al. 2021, section 4)


class Classifier(nn.Module):
    """Encoder and classification head: (B, 1, X, Y, Z) -> logits (B, classes).

    encoder: gives (B, D) of a volume, as `VisionTransformer` does; head: gives logits (B, classes) of (B, D)
    freeze_encoder: the encoder stays as it is, to the last bit, and always in evaluation mode
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, freeze_encoder: bool = False):
        super().__init__()
        self.encoder, self.head, self.freeze_encoder = encoder, head, freeze_encoder
        if freeze_encoder:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()  # no stochastic depth in features that nothing is trained on
        return self

    def features(self, volumes: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> (B, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            return self.encoder(volumes)

    def forward(self, volumes: Tensor) -> Tensor:
        features = self.features(volumes)  # (B, D)
        with torch.autocast(volumes.device.type, enabled=False):  # in bf16's three digits many cases would be ties
            return self.head(features.to(torch.promote_types(features.dtype, torch.float32)))  # (B, classes)


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
        shares = votes.new_zeros(len(features), self.num_classes).scatter_add(1, self.labels[index], votes)
        return shares.log()  # (B, classes)
