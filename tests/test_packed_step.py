"""Views packed into one sequence, weights cast together, attention by products, and operations on groups of tensors:
each against the plain way."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from conftest import ROOT  # noqa: F401  the repository's modules
from test_baselines import BATCH, LOCAL, OUT_DIM, PATCH, SIZE, schedule, tiny, train_state, views_of  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import main_dino
from dino3d import mixed_precision
from dino3d.block_masks import BlockMasks, collate_masks
from dino3d.training.grouped import lerp_all, lerp_in_groups, scale_each, scale_in_groups
from dino3d.training.objectives import MaskedMultiCrop
from dino3d.transformer_block import Attention
from resnet3d import ResNet
from vision_transformer import MultiCropWrapper, VisionTransformer

SMALL = {"img_size": (16, 12, 6), "patch_size": (4, 3, 2), "embed_dim": 48, "depth": 3, "num_heads": 4}


def normal(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_vit(**changes):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **changes})


def gradients(model, output):
    weights = normal(*output.shape, seed=5, dtype=output.dtype)
    return torch.autograd.grad((output * weights).sum(), model.parameters())


CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)
DEVICES = ["cpu", CUDA]


# ------------------------------------------------------------------------------------------------------------ attention


class Names(TorchDispatchMode):
    """Names of the operators that run inside it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.name().split(".")[0].removeprefix("aten::"))
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("asked", [None, SDPBackend.MATH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [9, 65])
@pytest.mark.parametrize("device", DEVICES)
def test_the_attention_that_is_named_is_what_runs(device, tokens, dtype, asked):
    """By the operators that torch calls; at these sizes bf16 and single precision differ on a GPU."""
    layer = Attention(128, 2).to(device)
    choices = sdpa_kernel(asked) if asked else contextlib.nullcontext()
    with choices, torch.autocast(device, dtype, enabled=dtype != torch.float32), Names() as ran:
        named = layer.backend(tokens, dtype)
        layer(torch.rand(4, tokens, 128, device=device, requires_grad=True))
    fused = {name for name in ran.names if name.startswith("_scaled_dot_product") and "math" not in name}
    if named in ("math", "products"):
        assert not fused and ran.names & {"softmax", "_softmax", "_safe_softmax"}
    else:
        assert len(fused) == 1 and f"dot_product_{named}_attention" in fused.pop()
    assert asked is None or named in ("math", "products")


# --------------------------------------------------------------------------------------------------------- packed views


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sizes", [[(16, 12, 6)], [(16, 12, 6), (4, 6, 2), (12, 12, 8)]], ids=["one size", "three"])
def test_packed_views_are_what_each_size_is_by_itself(sizes, checkpointing):
    """In float64, with stochastic depth: the same draws, the same embeddings and gradients."""
    model = small_vit(drop_path_rate=0.5, grad_checkpointing=checkpointing).double()
    views = [normal(4 + i, 1, *size, dtype=torch.float64) for i, size in enumerate(sizes)]
    found = []
    for packed in (False, True):
        torch.manual_seed(3)
        output = model.forward_views(views) if packed else torch.cat([model(view) for view in views])
        found.append((output, *gradients(model, output), torch.rand(2)))  # the generator is where it was
    assert len({tuple(row.tolist()) for row in found[0][0]}) == len(found[0][0])
    for plain, packed in zip(*found):
        torch.testing.assert_close(packed, plain, rtol=1e-9, atol=1e-9)


def test_one_size_gives_the_same_bits():
    """The teacher's passes, of global views alone, with autocast and without."""
    model, views = small_vit(), normal(4, 1, 16, 12, 6)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert torch.equal(model.forward_views([views]), model(views))
            (tokens,) = model.forward_views([views], all_tokens=True)
            assert torch.equal(tokens, model.forward_tokens(views))


def test_packed_views_with_hidden_patches():
    model, views = small_vit(drop_path_rate=0.3).double(), [normal(4, 1, 16, 12, 6), normal(6, 1, 4, 6, 2)]
    views, hidden = [view.double() for view in views], normal(4, 48) > 0.5
    mask_token = normal(48, dtype=torch.float64)
    torch.manual_seed(3)
    plain = [model.forward_tokens(views[0], hidden, mask_token), model.forward_tokens(views[1])]
    torch.manual_seed(3)
    packed = model.forward_views(views, hidden, mask_token, all_tokens=True)
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def apart(self, views, return_embeddings=False, tokens=None, hidden=None):
    """The wrappers' `forward` as it was, one pass for each size of view."""
    if tokens is None:
        embeddings = torch.cat([self.backbone(view) for view in views])
        return (self.head(embeddings), embeddings) if return_embeddings else self.head(embeddings)
    seen = self.backbone.forward_tokens(views[0], hidden, self.mask_token)
    embeddings = torch.cat([seen[:, 0], *(self.backbone(view) for view in views[1:])])
    return self.head(embeddings), embeddings, self.patch_head(seen.flatten(0, 1).index_select(0, tokens))


def losses_of(steps, ibot, dtype=torch.float32):
    torch.manual_seed(0)
    student, teacher = (
        main_dino.build_model("vit_tiny", SIZE, PATCH, OUT_DIM, False, rate, True, ibot=ibot) for rate in (0.3, None)
    )
    teacher.load_state_dict(student.state_dict())
    targets = (OUT_DIM, 0.9, "mean")
    others = {"ibot": main_dino.PatchLoss(1.0, *targets, main_dino.STUDENT_TEMP)} if ibot else {}
    run, losses = train_state(student, teacher.requires_grad_(False), torch.device("cpu"), dtype=dtype, **others), []
    draw = BlockMasks(tuple(n // p for n, p in zip(SIZE, PATCH)), probability=1.0).draw
    for step in range(steps):
        torch.manual_seed(step)
        masks = [collate_masks([draw(0, step, i) for i in range(BATCH)]) if ibot else None]
        finite, metrics, *_ = main_dino.train_step(run, [views_of(step, "cpu")], schedule(step), False, masks)
        assert finite
        losses.append(metrics["loss"])
    return torch.stack(losses)


@pytest.mark.parametrize("ibot", [False, True])
def test_fifty_steps_have_the_losses_of_sizes_apart(tiny, monkeypatch, ibot):  # noqa: F811
    """With stochastic depth, to 1e-4."""
    packed = losses_of(50, ibot)
    for kind in (MultiCropWrapper, MaskedMultiCrop):
        monkeypatch.setattr(kind, "forward", apart)
    plain = losses_of(50, ibot)
    assert plain.std() > 0.05
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=0)


def test_a_resnet_has_each_size_by_itself():
    calls = []
    backbone = torch.nn.Module()
    backbone.forward = lambda view: calls.append(view.shape) or view.mean((2, 3, 4))
    views = [normal(2, 3, 8, 8, 8), normal(4, 3, 4, 4, 4)]
    assert MultiCropWrapper(backbone, torch.nn.Identity())(views).shape == (6, 3)
    assert calls == [view.shape for view in views] and not hasattr(ResNet, "forward_views")


# ----------------------------------------------------------------------------------------------------- mixed precision


def test_weights_cast_together_are_what_autocast_makes_of_them():
    """To the last bit: values, and gradients in the precision of each; a weight that is not used has none."""
    weights = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate([(4, 3), (4,), (5, 4)])]
    x = normal(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.nn.functional.linear(x, weights[0], weights[1])
        a, b, unused = mixed_precision.cast_together(weights, "cpu")
        ours = torch.nn.functional.linear(x, a, b)
    assert a.dtype == b.dtype == unused.dtype == torch.bfloat16 and torch.equal(plain, ours)
    found = [torch.autograd.grad(y.square().sum(), weights, allow_unused=True) for y in (plain, ours)]
    for one, other in zip(found[0][:2], found[1][:2]):
        assert other.dtype == torch.float32 and torch.equal(one, other)
    assert found[1][2] is None


@pytest.mark.parametrize("dtype, enabled", [(torch.float32, False), (torch.float64, True)])
def test_weights_that_autocast_leaves_alone_stay_themselves(dtype, enabled):
    weights = [normal(3, 2, dtype=dtype)]
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert mixed_precision.cast_together(weights, "cpu") is weights


@pytest.mark.parametrize("queries", [1, 3, 7])
@pytest.mark.parametrize("scores", [1, 2 * 7 * 7 * 3, 10**6], ids=["each sample", "three", "all"])
def test_attention_by_products(monkeypatch, queries, scores):
    """Against the formula in float64, with its gradients, in groups of any number of samples."""
    monkeypatch.setattr(mixed_precision, "SCORES", scores)
    qkv = normal(5, 7, 3, 2, 6, dtype=torch.float64).requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    expected = ((q[:, :, :queries] @ k.mT / math.sqrt(6)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    ours = mixed_precision.ProductAttention.apply(qkv, queries)
    torch.testing.assert_close(ours, expected)
    weights = normal(*expected.shape, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), qkv)[0] for y in (ours, expected)))


def test_attention_by_products_in_bf16_is_as_close_as_the_fused_one():
    """To attention in float64, within twice its error: scores and their gradients are rounded once more."""
    qkv, weights = normal(2, 65, 3, 4, 32).bfloat16(), normal(2, 65, 128)
    results = []
    for dtype, by_products in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        x = qkv.to(dtype).requires_grad_()
        if by_products:
            y = mixed_precision.ProductAttention.apply(x, 65)
        else:
            q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        results.append([one.double() for one in (y, *torch.autograd.grad((y * weights.to(dtype)).sum(), x))])
    for exact, fused, ours in zip(*results):
        assert 0 < (ours - exact).norm() < 2.5 * (fused - exact).norm() < 0.03 * exact.norm()


def test_where_attention_goes_by_products():
    qkv = normal(1, 4, 3, 1, 8)
    with mock.patch.object(mixed_precision, "multiplies_bf16_by_row", lambda: True):
        assert mixed_precision.attends_by_products(qkv.bfloat16()) and not mixed_precision.attends_by_products(qkv)
        assert not mixed_precision.attends_by_products(qkv.bfloat16().to("meta"))
    with mock.patch.object(mixed_precision, "multiplies_bf16_by_row", lambda: False):
        assert not mixed_precision.attends_by_products(qkv.bfloat16())


# ------------------------------------------------------------------------------------------------- groups of tensors


@pytest.mark.parametrize("device", DEVICES)
def test_averages_and_factors_in_groups(device):
    """What runs on a GPU, and what runs on the device at hand, against each tensor by itself."""
    shapes = [(3, 4), (5,), (1,), (2, 1, 3)]
    tensors, others = ([normal(*shape, seed=s + i).to(device) for i, shape in enumerate(shapes)] for s in (0, 10))
    factors = torch.tensor([0.5, 1.0, 0.25, 3.0], device=device)
    for lerp, scale in ((lerp_in_groups, scale_in_groups), (lerp_all, scale_each)):
        scaled, averages = ([one.clone() for one in tensors] for _ in range(2))
        scale(scaled, factors)
        for one, tensor, factor in zip(scaled, tensors, factors):
            assert torch.equal(one, tensor * factor)
        for weight in (0.0, 0.004):
            lerp(averages, others, torch.tensor(weight, device=device))
            for one, tensor, other in zip(averages, tensors, others):
                torch.testing.assert_close(one, tensor + weight * (other - tensor), rtol=1e-6, atol=1e-7)
            assert weight or all(map(torch.equal, averages, tensors))


@pytest.mark.parametrize("together", [1, 40, 2**24])
def test_the_loss_takes_any_number_of_views_at_once(monkeypatch, together):
    monkeypatch.setitem(main_dino.LOGITS_TOGETHER, "cpu", together)
    first, second = (3 * normal(2, 4, 16, dtype=torch.float64)).softmax(-1)
    student = normal(2 + LOCAL + 2, 4, 16, dtype=torch.float64).requires_grad_()
    ours, plain = (
        loss(student, first, second) for loss in (main_dino.CrossEntropy.apply, main_dino.reference_cross_entropy)
    )
    torch.testing.assert_close(ours, plain)
    weights = torch.rand(4, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((weights * loss).sum(), student)[0] for loss in (ours, plain)))
