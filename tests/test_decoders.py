"""Classifiers against formulas and scikit-learn."""
import numpy as np
import pytest
import torch

from decoders import Classifier, LinearHead, NearestNeighbours, Standardise
from vision_transformer import VisionTransformer


def small_encoder(drop_path_rate=0.0):
    return VisionTransformer((24, 24, 12), (12, 12, 6), embed_dim=24, depth=3, num_heads=3,
                             drop_path_rate=drop_path_rate)


def test_logits_are_the_heads_of_the_features():
    torch.manual_seed(0)
    model = Classifier(small_encoder(), LinearHead(24, 3)).double().eval()
    volumes = torch.rand(5, 1, 24, 24, 12, dtype=torch.float64)
    features = model.encoder(volumes)
    model.head.standardise.fit(features.detach())
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    expected = standard @ model.head.linear.weight.T + model.head.linear.bias
    torch.testing.assert_close(model(volumes), expected)
    assert torch.equal(model.features(volumes), features)


def test_every_parameter_gets_a_gradient():
    model = Classifier(small_encoder(), LinearHead(24, 2))
    torch.nn.functional.cross_entropy(model(torch.rand(2, 1, 24, 24, 12)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_frozen_encoder_stays_as_it_is():
    torch.manual_seed(0)
    model = Classifier(small_encoder(0.5), LinearHead(24, 2), freeze_encoder=True).train()
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    volumes = torch.rand(8, 1, 24, 24, 12)
    assert torch.equal(model(volumes), model(volumes))  # no stochastic depth
    assert model.head.training and not model.encoder.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(volumes), torch.arange(8) % 2).backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    assert all(p.grad is None for p in model.encoder.parameters()) and model.head.linear.weight.grad.any()


def test_standardise_is_numpys():
    rng = np.random.default_rng(0)
    known, new = rng.normal(3, 5, (40, 6)), rng.normal(3, 5, (4, 6))
    known[:, 2] = 7.0  # a feature that never varies
    layer = Standardise(6).double()
    torch.testing.assert_close(layer(torch.from_numpy(new)), torch.from_numpy(new))  # nothing known yet
    layer.fit(torch.from_numpy(known))
    expected = (new - known.mean(0)) / np.maximum(known.std(0), 1e-6)
    torch.testing.assert_close(layer(torch.from_numpy(new)), torch.from_numpy(expected))


@pytest.mark.parametrize("k, classes", [(1, 2), (7, 2), (20, 3), (500, 3)])
def test_nearest_neighbours_are_scikit_learns(k, classes):
    from sklearn.neighbors import KNeighborsClassifier
    rng = np.random.default_rng(0)
    known, labels, new = rng.normal(size=(50, 8)), np.arange(50) % classes, rng.normal(size=(9, 8))
    head = NearestNeighbours(8, classes, 50, k).double()
    head.fit(torch.from_numpy(known), torch.from_numpy(labels))
    theirs = KNeighborsClassifier(min(k, 50), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    mean, deviation = known.mean(0), known.std(0)
    theirs.fit((known - mean) / deviation, labels)
    ours = head(torch.from_numpy(new)).exp()
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba((new - mean) / deviation), atol=1e-9)
    torch.testing.assert_close(head(torch.from_numpy(new)).softmax(-1), ours)  # log probabilities are logits


def test_mixed_precision_makes_no_ties():
    torch.manual_seed(0)
    model = Classifier(small_encoder(), LinearHead(24, 2)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(64, 1, 24, 24, 12))
    assert logits.dtype == torch.float32 and len(logits[:, 0].unique()) == 64
