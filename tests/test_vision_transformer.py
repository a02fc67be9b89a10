"""The backbone against MONAI and float64 formulas, its bookkeeping against closed forms; the head and multi-crop."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino3d.benchmarks.baselines import load_into_monai
from vision_transformer import ARCHITECTURES, DINOHead, MultiCropWrapper, VisionTransformer, vit_micro, vit_tiny

SMALL = {"img_size": (16, 12, 6), "patch_size": (4, 3, 2), "embed_dim": 48, "depth": 3, "num_heads": 4}  # grid 4 4 3


def small_vit(**changes):
    return VisionTransformer(**{**SMALL, **changes})


def randomise(model, seed=0, std=0.1):
    """Fill every parameter, those that start at 0 or 1 too, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def normal(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- backbone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, img_size, patch_size, in_chans",
    [
        (vit_tiny, (24, 12, 18), (12, 4, 6), 1),
        (small_vit, (8, 12, 20), (2, 6, 5), 2),
        (small_vit, (9, 6, 6), (3, 2, 3), 1),
    ],
)
def test_equals_monai_vit(build, img_size, patch_size, in_chans):
    pytest.importorskip("einops", reason="MONAI's ViT needs einops, which MONAI doesn't install")
    from monai.networks.nets import ViT

    ours = randomise(build(img_size=img_size, patch_size=patch_size, in_chans=in_chans), std=0.05).requires_grad_(False)
    width, depth = ours.embed_dim, len(ours.blocks)
    theirs = ViT(
        in_chans, img_size, patch_size, width, 4 * width, depth, ours.num_heads, classification=True, qkv_bias=True
    )
    del theirs.classification_head  # without it `forward` returns all tokens
    load_into_monai(theirs, ours)

    x = normal(2, in_chans, *img_size)
    with torch.no_grad():
        expected = theirs.eval()(x)[0]
    torch.testing.assert_close(ours.forward_tokens(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x), expected[:, 0], atol=1e-5, rtol=1e-5)


def test_equals_torch_transformer_encoder():
    """PyTorch's own pre-norm encoder: independent too, and there wherever the model is."""
    ours = randomise(small_vit()).double().requires_grad_(False)
    theirs = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(
            48, 4, 192, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ),
        num_layers=3,
        norm=torch.nn.LayerNorm(48, eps=1e-6),
        enable_nested_tensor=False,
    ).double()
    renamed = {
        "blocks.": "layers.",
        "attn.qkv.": "self_attn.in_proj_",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc": "linear",
    }
    weights = {}
    for name, value in ours.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        weights[name] = value
    outside = {name: weights.pop(name) for name in list(weights) if not name.startswith(("layers.", "norm."))}
    theirs.load_state_dict(weights)

    x = normal(2, 1, *ours.img_size, dtype=torch.float64)
    patches = F.conv3d(x, outside["patch_embed.proj.weight"], outside["patch_embed.proj.bias"], stride=ours.patch_size)
    tokens = torch.cat((outside["cls_token"].expand(2, -1, -1), patches.flatten(2).transpose(1, 2)), dim=1)
    torch.testing.assert_close(ours.forward_tokens(x), theirs.eval()(tokens + outside["pos_embed"]))


def test_patch_embedding_is_the_convolution():
    embed = small_vit(in_chans=2).patch_embed.double()
    x = normal(2, 2, 12, 9, 8, dtype=torch.float64)
    expected = F.conv3d(x, embed.proj.weight, embed.proj.bias, stride=embed.proj.kernel_size).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), expected)


def test_forward_is_the_class_token_with_the_same_gradients():
    model = randomise(small_vit()).double()
    x = normal(2, 1, *model.img_size, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    short, full = model(x), model.forward_tokens(x)[:, 0]
    torch.testing.assert_close(short, full)
    short_gradients = torch.autograd.grad(short.square().sum(), parameters.values())
    full_gradients = torch.autograd.grad(full.square().sum(), parameters.values())
    for name, a, b in zip(parameters, short_gradients, full_gradients):
        torch.testing.assert_close(a, b, msg=lambda text: f"{name}: {text}")
        assert a.any(), name


def test_last_selfattention_is_the_written_out_formula():
    model = randomise(small_vit(depth=1), std=0.3)
    x = normal(2, 1, *model.img_size)
    attention = model.get_last_selfattention(x)
    tokens = 1 + 4 * 4 * 3
    assert attention.shape == (2, 4, tokens, tokens)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, tokens))

    p = {name: value.detach().numpy().astype(np.float64) for name, value in model.named_parameters()}
    patches = x.numpy().astype(np.float64)[:, 0].reshape(2, 4, 4, 4, 3, 3, 2)  # (B, x, px, y, py, z, pz)
    patches = patches.transpose(0, 1, 3, 5, 2, 4, 6).reshape(2, 48, -1)  # (B, N, px * py * pz)
    embedded = patches @ p["patch_embed.proj.weight"].reshape(48, -1).T + p["patch_embed.proj.bias"]
    h = np.concatenate([np.repeat(p["cls_token"], 2, axis=0), embedded], axis=1) + p["pos_embed"]
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    h = h * p["blocks.0.norm1.weight"] + p["blocks.0.norm1.bias"]
    weight, bias = p["blocks.0.attn.qkv.weight"], p["blocks.0.attn.qkv.bias"]
    for head in range(4):
        rows = slice(12 * head, 12 * (head + 1))  # of the queries; those of the keys lie 48 further on
        q = h @ weight[:48][rows].T + bias[:48][rows]
        k = h @ weight[48:96][rows].T + bias[48:96][rows]
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(12))
        expected = scores / scores.sum(-1, keepdims=True)
        assert expected.max() > 0.1  # far from uniform, or anything would pass
        np.testing.assert_allclose(attention[:, head].detach().numpy(), expected, atol=1e-5)


def test_selfattention_belongs_to_the_last_block():
    model = randomise(small_vit(), std=0.3)
    x = normal(1, 1, *model.img_size)
    before = model.get_last_selfattention(x)
    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight.mul_(2)
    assert not torch.allclose(model.get_last_selfattention(x), before, atol=1e-3)


BLOCK_NAMES = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


@pytest.mark.parametrize(
    "name, width, depth, heads",
    [
        ("vit_tiny", 192, 12, 3),
        ("vit_small", 384, 12, 6),
        ("vit_base", 768, 12, 12),
        ("vit_large", 1024, 24, 16),
        ("vit_huge", 1280, 32, 16),
    ],
)
def test_architectures(name, width, depth, heads):
    with torch.device("meta"):
        model = ARCHITECTURES[name]()
    assert (model.embed_dim, len(model.blocks), model.num_heads) == (width, depth, heads)
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert (model.img_size, model.patch_size, model.grid_size) == ((96, 96, 48), (12, 12, 6), (8, 8, 8))

    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    names |= {f"blocks.{i}.{layer}" for i in range(depth) for layer in BLOCK_NAMES}
    assert set(model.state_dict()) == names
    assert model.pos_embed.shape == (1, 513, width) and model.cls_token.shape == (1, 1, width)
    assert model.patch_embed.proj.weight.shape == (width, 1, 12, 12, 6)
    block = 12 * width**2 + 13 * width  # qkv 3, proj 1, MLP 8 matrices; biases 3 + 1 + 4 + 1, norms 4
    others = (1 + 513 + 864 + 1 + 2) * width  # class token, positions, projection and its bias, final norm
    assert sum(p.numel() for p in model.parameters()) == depth * block + others
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_architectures_take_the_shared_arguments():
    names = ["vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    assert names == [name for name in ARCHITECTURES if name.startswith("vit_")]
    with torch.device("meta"):
        for name in names:
            model = ARCHITECTURES[name](img_size=(24, 12, 8), patch_size=[4, 3, 2], in_chans=2, drop_path_rate=0.1)
            assert model.grid_size == (6, 4, 4) and model.patch_embed.proj.in_channels == 2
            assert model.drop_path_rate == 0.1


def test_initial_weights():
    torch.manual_seed(0)
    model = vit_tiny(img_size=(48, 48, 24))
    for name, p in model.named_parameters():
        if name == "patch_embed.proj.weight":  # kaiming uniform with a = sqrt(5): bound 1 / sqrt(fan in)
            assert 0.99 < p.abs().max().item() * 864**0.5 <= 1
        elif "norm" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias") and name != "patch_embed.proj.bias":
            assert not p.any(), name
        elif name not in ("patch_embed.proj.bias", "cls_token"):
            assert abs(p.std().item() - 0.02) < 0.001 and abs(p.mean().item()) < 0.001, name
    assert 0.015 < model.cls_token.std().item() < 0.025  # 192 values only


# --- position embedding and layout ------------------------------------------------------------------------------------


def test_position_embedding_is_untouched_at_the_training_grid():
    model = small_vit()
    assert model.interpolate_pos_embed((4, 4, 3)) is model.pos_embed


def test_position_embedding_compares_grids_not_token_counts():
    model = randomise(small_vit())
    turned = model.interpolate_pos_embed((3, 4, 4))  # as many tokens as (4, 4, 3)
    assert turned.shape == model.pos_embed.shape and not torch.allclose(turned, model.pos_embed)
    assert torch.equal(turned[:, 0], model.pos_embed[:, 0])


@pytest.mark.parametrize("grid", [(2, 2, 1), (3, 4, 4), (7, 5, 3), (4, 4, 6)])
def test_position_embedding_interpolation(grid):
    """Against scipy's linear interpolation at the voxel centres of the new grid (align_corners=False)."""
    from scipy.ndimage import map_coordinates

    model = randomise(small_vit(), std=1.0)
    source = model.pos_embed[0, 1:].detach().numpy().reshape(4, 4, 3, 48)
    centres = [(np.arange(new) + 0.5) * old / new - 0.5 for old, new in zip((4, 4, 3), grid)]
    points = np.meshgrid(*centres, indexing="ij")
    expected = np.stack([map_coordinates(source[..., d], points, order=1, mode="nearest") for d in range(48)], axis=-1)
    found = model.interpolate_pos_embed(grid).detach().numpy()
    np.testing.assert_allclose(found[0, 1:], expected.reshape(-1, 48), atol=1e-5)
    np.testing.assert_array_equal(found[0, 0], model.pos_embed[0, 0].detach().numpy())


def test_position_embedding_is_rounded_once_and_keeps_its_dtype():
    model = randomise(small_vit(), std=1.0).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    found = model.interpolate_pos_embed((7, 5, 3))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.interpolate_pos_embed((7, 5, 3)).to(torch.bfloat16))
    assert model.double().interpolate_pos_embed((2, 2, 1)).dtype == torch.float64


@pytest.mark.parametrize("grid", [(4, 4, 3), (2, 3, 1), (5, 4, 6)])
def test_feature_map_layout(grid):
    """A change of one patch changes one place of the map, once the blocks pass their input through."""
    model = randomise(small_vit())
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    size = [g * p for g, p in zip(grid, model.patch_size)]
    i, j, k = grid[0] - 1, 1, grid[2] // 2
    x = normal(1, 1, *size)
    changed = x.clone()
    changed[:, :, 4 * i : 4 * i + 4, 3 * j : 3 * j + 3, 2 * k : 2 * k + 2] += 1
    before, after = (model.get_intermediate_layers(v)[0] for v in (x, changed))
    assert before.shape == (1, 48, *grid)
    places = (after != before).any(1)[0].nonzero().tolist()
    assert places == [[i, j, k]]


def test_intermediate_layers_are_those_of_shallower_models():
    model = randomise(small_vit())
    x = normal(2, 1, *model.img_size)
    maps = model.get_intermediate_layers(x, n=2)
    assert len(maps) == 2
    for depth, found in zip((2, 3), maps):  # oldest first
        shallow = small_vit(depth=depth)
        shallow.load_state_dict({k: v for k, v in model.state_dict().items() if k in shallow.state_dict()})
        expected = shallow.eval().forward_tokens(x)[:, 1:].transpose(1, 2).reshape(2, 48, 4, 4, 3)
        torch.testing.assert_close(found, expected)
    for n in (0, 4, -1, [], [3], [-1, 0], [1, 0], (1, 1)):
        with pytest.raises(ValueError, match=re.escape(f"n is {n}; the model has 3 blocks")):
            model.get_intermediate_layers(x, n=n)


@pytest.mark.parametrize("indices", [(0,), [0, 2], (1, 2), range(3)])
def test_intermediate_layers_by_index(indices):
    model = randomise(small_vit())
    x = normal(2, 1, *model.img_size)
    expected = model.get_intermediate_layers(x, n=3)
    found = model.get_intermediate_layers(x, n=indices)
    assert len(found) == len(indices) and all(torch.equal(a, expected[i]) for a, i in zip(found, indices))


def test_intermediate_layers_without_the_norm():
    model = randomise(small_vit())
    x = normal(2, 1, *model.img_size)
    kept = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    raw = model.get_intermediate_layers(x, n=(0, 2), norm=False)
    for i, found in zip((0, 2), raw):
        assert torch.equal(found, kept[i][:, 1:].transpose(1, 2).reshape(2, 48, 4, 4, 3))
    for found, normed in zip(raw, model.get_intermediate_layers(x, n=(0, 2))):
        torch.testing.assert_close(model.norm(found.movedim(1, -1)).movedim(-1, 1), normed)


def test_local_and_larger_crops_of_the_default_model():
    model = vit_tiny().eval().requires_grad_(False)
    for size, tokens in (((24, 24, 12), 8), ((120, 96, 54), 720)):
        x = normal(1, 1, *size)
        assert model(x).shape == (1, 192)
        assert model.forward_tokens(x).shape == (1, 1 + tokens, 192)


def test_bf16_autocast_stays_close():
    model = randomise(small_vit())
    x = normal(2, 1, *model.img_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    assert F.cosine_similarity(low.float(), model(x), dim=1).min() > 0.999


# --- stochastic depth ---------------------------------------------------------------------------------------------


def test_drop_path_drops_whole_samples_and_keeps_the_expected_value():
    """At rates that rise linearly from 0 in the first block."""
    torch.manual_seed(0)
    scales = small_vit(depth=4, drop_path_rate=0.3).train().stochastic_depth(20000, torch.device("cpu"))
    assert scales.shape == (4, 2, 20000, 1, 1)  # one draw per block, branch and sample
    for block, rate in zip(scales, (0, 0.1, 0.2, 0.3)):
        torch.testing.assert_close(block.unique(), torch.tensor([0.0, 1 / (1 - rate)] if rate else [1.0]))
        for branch in block:  # within five standard errors
            assert abs(branch.mean().item() - 1) <= 5 * (rate / (1 - rate) / 20000) ** 0.5
    for first, second in zip(scales[1], scales[2]):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.04  # drawn independently
    assert small_vit(depth=1, drop_path_rate=0.4).train().stochastic_depth(9, torch.device("cpu")).eq(1).all()
    assert small_vit(drop_path_rate=0.4).eval().stochastic_depth(9, torch.device("cpu"))[0] is None


def test_a_block_scales_each_samples_branches():
    block, x = small_vit().blocks[0], normal(3, 5, small_vit().embed_dim)
    scales = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 1.0]]).view(2, 3, 1, 1)
    out = block(x, scales=scales)
    torch.testing.assert_close(out[0], x[0] + block.mlp(block.norm2(x[0])))  # no attention
    torch.testing.assert_close(out[1], x[1] + 2 * block.attn(block.norm1(x[1:2]))[0])  # no MLP
    torch.testing.assert_close(out[2], block(x)[2])


def test_drop_path_removes_the_last_block_at_a_rate_near_one():
    model = randomise(small_vit(depth=2, drop_path_rate=1 - 1e-9))
    shallow = small_vit(depth=1)
    shallow.load_state_dict({k: v for k, v in model.state_dict().items() if k in shallow.state_dict()})
    x = normal(4, 1, *model.img_size)
    torch.testing.assert_close(model.train()(x), shallow(x))
    assert not torch.allclose(model.eval()(x), shallow(x), atol=1e-3)


def test_drop_path_follows_the_seed_and_is_off_in_eval():
    model = randomise(small_vit(drop_path_rate=0.5)).train()
    x = normal(8, 1, *model.img_size)

    def draw(seed):
        torch.manual_seed(seed)
        return model(x)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    plain = small_vit()
    plain.load_state_dict(model.state_dict())
    model.eval()
    assert torch.equal(draw(0), plain(x))


# --- DINO head ----------------------------------------------------------------------------------------------------


def test_head_is_the_written_out_formula():
    head = randomise(DINOHead(12, 20, num_layers=3, hidden_dim=16, bottleneck_dim=8), std=0.5).double()
    x = normal(5, 12, dtype=torch.float64)
    p = head.state_dict()
    h = x
    for i in (0, 2, 4):
        h = h @ p[f"mlp.{i}.weight"].T + p[f"mlp.{i}.bias"]
        if i < 4:
            h = h * 0.5 * (1 + torch.erf(h / 2**0.5))  # exact GELU
    h = h / h.pow(2).sum(1, keepdim=True).sqrt()
    gain, direction = (p[f"last_layer.parametrizations.weight.original{i}"] for i in (0, 1))
    expected = h @ (gain * direction / direction.pow(2).sum(1, keepdim=True).sqrt()).T
    torch.testing.assert_close(head(x), expected)


def test_head_parameter_names():
    def names(**options):
        return [name for name in DINOHead(6, 10, hidden_dim=8, bottleneck_dim=4, **options).state_dict()]

    last = ["last_layer.parametrizations.weight.original0", "last_layer.parametrizations.weight.original1"]
    linears = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert names() == linears + last
    assert names(num_layers=1) == ["mlp.0.weight", "mlp.0.bias"] + last
    with_bn = [name for name in names(use_bn=True) if name.endswith("running_mean")]
    assert with_bn == ["mlp.1.running_mean", "mlp.4.running_mean"]
    with pytest.raises(ValueError, match="num_layers is 0"):
        DINOHead(6, 10, num_layers=0)


def test_older_head_loads_into_place():
    """State dicts of torch.nn.utils.weight_norm, as DINO wrote them, have weight_g and weight_v."""
    model = MultiCropWrapper(small_vit(), DINOHead(48, 20, hidden_dim=16, bottleneck_dim=8))
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    older = dict(state)
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        older[f"head.last_layer.{old}"] = older.pop(f"head.last_layer.parametrizations.weight.{new}")
    model.load_state_dict(older)  # strict
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("frozen", [True, False])
def test_head_gain_is_frozen_only_on_request(frozen):
    head = DINOHead(12, 20, norm_last_layer=frozen, hidden_dim=16, bottleneck_dim=8)
    gain = head.last_layer.parametrizations.weight.original0
    assert gain.shape == (20, 1) and torch.equal(gain, torch.ones(20, 1))
    torch.testing.assert_close(head.last_layer.weight.norm(dim=1), torch.ones(20))
    head(normal(4, 12)).square().sum().backward()
    assert (gain.grad is None) == frozen and gain.requires_grad != frozen
    teacher = copy.deepcopy(head)  # what DINO does for the teacher; older weight_norm modules refused
    assert torch.equal(teacher(normal(4, 12)), head(normal(4, 12)))


def test_head_logits_are_cosines():
    head = DINOHead(12, 300, hidden_dim=16, bottleneck_dim=2)
    torch.nn.init.normal_(head.mlp[4].weight, std=100.0)  # however long the embedding
    logits = head(normal(100, 12))
    assert logits.abs().max() <= 1 + 1e-6
    assert logits.max() > 0.99 and logits.min() < -0.99  # in two dimensions 300 prototypes come close to any vector


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_head_survives_a_zero_embedding(dtype):
    head = DINOHead(12, 20, hidden_dim=16, bottleneck_dim=8).to(dtype)
    torch.nn.init.zeros_(head.mlp[4].weight)
    assert torch.equal(head(normal(3, 12).to(dtype)), torch.zeros(3, 20, dtype=dtype))


# --- multi-crop ---------------------------------------------------------------------------------------------------


def small_multi_crop(**changes):
    torch.manual_seed(0)
    return MultiCropWrapper(small_vit(**changes), DINOHead(48, 20, hidden_dim=16, bottleneck_dim=8))


def test_multi_crop_equals_separate_calls():
    model = small_multi_crop().eval()
    views = [normal(4, 1, 16, 12, 6), normal(6, 1, 4, 6, 2), normal(2, 1, 12, 12, 8)]
    logits, embeddings = model(views, return_embeddings=True)
    assert logits.shape == (12, 20) and embeddings.shape == (12, 48)
    singles = [model.backbone(view[i : i + 1]) for view in views for i in range(len(view))]
    torch.testing.assert_close(embeddings, torch.cat(singles), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, torch.cat([model.head(single) for single in singles]), atol=1e-5, rtol=1e-5)
    assert torch.equal(model(views), logits)


def test_multi_crop_runs_one_pass_for_all_sizes():
    model = small_multi_crop()
    calls = []
    model.backbone.blocks[1].register_forward_hook(lambda *_: calls.append("block"))
    model.head.register_forward_hook(lambda *_: calls.append("head"))
    model([normal(4, 1, 16, 12, 6), normal(6, 1, 4, 6, 2)])
    assert calls == ["block", "head"]


def test_multi_crop_gradients_reach_every_trainable_parameter():
    model = small_multi_crop()
    model([normal(4, 1, 16, 12, 6), normal(6, 1, 4, 6, 2)]).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert name == "head.last_layer.parametrizations.weight.original0"


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"img_size": (16, 12, 7)}, r"size \(16, 12, 7\) is not a multiple of patch_size \(4, 3, 2\)"),
        ({"img_size": (16, 0, 6)}, r"size \(16, 0, 6\) is not a multiple"),
        ({"img_size": (16, 12)}, r"size \(16, 12\) and patch_size \(4, 3, 2\) must have three axes"),
        ({"patch_size": (4,)}, r"patch_size \(4,\) must have three axes"),
        ({"num_heads": 5}, "embed_dim 48 is not a multiple of num_heads 5"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
    ],
)
def test_wrong_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_vit(**changes)


@pytest.mark.parametrize("method", ["forward", "forward_tokens", "get_intermediate_layers", "get_last_selfattention"])
@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 16, 12, 6), r"expected a volume of shape \(B, 1, X, Y, Z\), found \(1, 16, 12, 6\)"),
        ((2, 3, 16, 12, 6), r"expected a volume of shape \(B, 1, X, Y, Z\), found \(2, 3, 16, 12, 6\)"),
        ((2, 1, 16, 13, 6), r"size \(16, 13, 6\) is not a multiple of patch_size \(4, 3, 2\)"),
        ((2, 1, 16, 12, 0), r"size \(16, 12, 0\) is not a multiple"),
    ],
)
def test_wrong_inputs_are_refused(method, shape, message):
    with pytest.raises(ValueError, match=message) as error:
        getattr(small_vit(), method)(torch.zeros(shape))
    assert "\n" not in str(error.value)


def test_gradients_of_maps_are_summed_block_by_block():
    """To the last bit as in the loop written out: a run of a fixed seed must not change with where maps are formed."""
    torch.manual_seed(0)
    model, volumes = vit_micro(img_size=(24, 24, 24), patch_size=(6, 6, 6)), torch.rand(2, 1, 24, 24, 24)

    def gradients(maps):
        model.zero_grad()
        sum((one * torch.linspace(-1, 1, one.numel()).view(one.shape)).square().sum() for one in maps).backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    tokens, grid = model._embed(volumes)
    maps = []
    for block in model.blocks:
        tokens = block(tokens)
        maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid))
    assert torch.equal(gradients(model.get_intermediate_layers(volumes, 4, norm=False)), gradients(maps))
