"""Objectives besides DINO's own: each against its formula in float64, on one rank and on two, and what a run saves."""

import contextlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_main_dino import checkpoint, command, run_main, same, smaller_model  # noqa: F401
from test_steps import VALUES, flat, make_run, state_of

import main_dino
import utils
from dino3d.block_masks import BlockMasks, collate_masks
from dino3d.files import read_log
from dino3d.training.objectives import koleo_loss, sinkhorn_offsets

SMALL = ROOT / "tests" / "run_small.py"


def written_out_sinkhorn(logits, temp, iterations=3):
    """Assignment (B, K) of logits (B, K), step by step as DINOv2 has it, on a matrix of prototypes by samples."""
    q = (logits.double() / temp).exp().T
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= samples
    return (q * samples).T


# ---------------------------------------------------------------------------------------------------- Sinkhorn-Knopp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temp", [0.02, 0.07])
def test_sinkhorn_is_the_papers_formula(temp, dtype):
    torch.manual_seed(0)
    batch, views, out_dim = 6, 4, 16
    teacher = torch.nn.functional.normalize(torch.randn(2 * batch, out_dim)).to(dtype)  # cosines
    student = torch.randn(views * batch, out_dim).to(dtype)
    loss = main_dino.DINOLoss(out_dim, 0.9, "sinkhorn")
    loss.center.normal_()  # not looked at
    losses, probabilities = loss(student, teacher, temp)
    q = written_out_sinkhorn(teacher, temp).view(2, batch, out_dim)
    p = (student.double() / 0.1).softmax(-1).view(views, batch, out_dim)
    terms = [-(q[t] * p[v].log()).sum(-1).mean() for t in range(2) for v in range(views) if v != t]
    entropy = -(q * q.log()).sum(-1).mean()
    expected = {"loss": sum(terms) / len(terms), "kl": sum(terms) / len(terms) - entropy, "teacher_entropy": entropy}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=2e-5, atol=2e-5)
    winners = probabilities.argmax(-1)
    assert (winners == q.reshape(-1, out_dim).argmax(-1)).all()
    assert len(winners.unique()) > 1


def test_sinkhorn_where_exponents_leave_single_precision():
    """A prototype that no sample is near, and a temperature at which DINOv2's own form gives 0 / 0 in float32."""
    torch.manual_seed(0)
    logits = torch.nn.functional.normalize(torch.randn(8, 12))
    logits[:, 3] = -1
    exponents = (logits / 0.008).exp()
    assert exponents.isinf().any() and not exponents[:, 3].any()
    scores = logits / 0.008
    ours = (scores + sinkhorn_offsets(scores, utils.Processes())).softmax(-1)
    torch.testing.assert_close(ours.double(), written_out_sinkhorn(logits, 0.008), rtol=1e-4, atol=1e-6)


def test_sinkhorn_shares_the_batch_out():
    """Outputs that all prefer one prototype: with many iterations each prototype gets its share."""
    torch.manual_seed(0)
    logits = 0.1 * torch.randn(64, 8, dtype=torch.float64)
    logits[:, 2] += 1
    plain = (logits / 0.04).softmax(-1)
    scores = logits / 0.04
    shares = (scores + sinkhorn_offsets(scores, utils.Processes(), iterations=500)).softmax(-1).mean(0)
    assert plain.mean(0)[2] > 0.99
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 8), rtol=1e-6, atol=0)


def test_a_sample_is_diagnosed_by_itself(monkeypatch):
    """What is told of one sample of a batch does not hang on the others, nor on another rank's."""
    run = make_run()
    run.dino_loss = main_dino.DINOLoss(16, 0.9, "sinkhorn")
    run.processes = utils.Processes(rank=0, world_size=2)  # a collective would fail: there is no group
    views = [torch.rand(8, 1, 24, 24, 12)]
    views[0][1, 0, 2, 2, 2] = torch.nan
    monkeypatch.setattr(run, "render", lambda _: views, raising=False)
    batch = main_dino.Batch(torch.zeros(4, 30, 30, 15), [], [], "", tuple("abcd"))
    told = main_dino.diagnose_batch(run, [batch], 0.04)
    assert [sample["loss"] is None for sample in told] == [False, True, False, False]


@pytest.fixture
def processes_of(monkeypatch):
    """A function: utils.Processes of so many ranks, threads of this process, that stack tensors as gloo does."""

    class Together(utils.Processes):
        def stack(self, tensor):
            slots, barrier = self.meeting
            slots[self.rank] = tensor
            barrier.wait(30)
            stacked = torch.stack(list(slots))
            barrier.wait(30)
            return stacked

    def make(ranks):
        meeting = [None] * ranks, threading.Barrier(ranks)
        everyone = [Together(rank=rank, world_size=ranks) for rank in range(ranks)]
        for one in everyone:
            object.__setattr__(one, "meeting", meeting)
        return everyone

    return make


@pytest.mark.parametrize("counts", [(4, 4), (7, 1), (8, 0)])
def test_ranks_of_unequal_samples_are_one_batch(processes_of, counts):
    """As of masked patches, whose number is left to chance; rows that don't count change nothing."""
    torch.manual_seed(0)
    scores = torch.nn.functional.normalize(torch.randn(10, 6, dtype=torch.float64)) / 0.05
    kept = torch.tensor([True] * 3 + [False] + [True] * 5 + [False])
    parts, marks = [], kept.split([len(scores) - counts[1], counts[1]])
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(sinkhorn_offsets, scores.split([10 - counts[1], counts[1]]), processes_of(2), marks))
    whole = (scores[kept] + parts[0]).softmax(-1)
    torch.testing.assert_close(whole, written_out_sinkhorn(scores[kept], 1))
    torch.testing.assert_close(parts[0], parts[1], rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------------- KoLeo


def written_out_koleo(embeddings, eps=1e-8):
    """As DINOv2 has it, pair by pair, for one view of a batch."""
    x = embeddings.double()
    x = x / x.norm(dim=1, keepdim=True)
    nearest = [min(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i) for i in range(len(x))]
    return -sum(math.log(distance + eps) for distance in nearest) / len(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_koleo_is_the_papers_formula(dtype):
    torch.manual_seed(0)
    for size in (2, 7):
        embeddings = (3 * torch.randn(size, 12)).to(dtype)
        assert koleo_loss(embeddings).item() == pytest.approx(written_out_koleo(embeddings), rel=1e-5)
    opposite = torch.tensor([[1.0, 0], [-1, 0]])  # the least cosine there is, and still the neighbour
    assert koleo_loss(opposite).item() == pytest.approx(-math.log(2))


def test_koleo_pushes_neighbours_apart_but_not_what_is_equal():
    """Gradients against finite differences in float64; views of air, whose embeddings are equal, drown nothing."""
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(koleo_loss, (x,))
    equal = torch.randn(4, 6)
    equal[1], equal[3] = equal[0], equal[2] * (1 + 1e-7)
    for dtype in (torch.float32, torch.bfloat16):
        y = equal.to(dtype, copy=True).requires_grad_()
        koleo_loss(y).backward()
        assert not y.grad.any()
    y = torch.cat([equal, equal[:1] + 0.5]).requires_grad_()
    koleo_loss(y).backward()
    assert y.grad.isfinite().all() and 0 < y.grad[4].norm() < 10


# --------------------------------------------------------------------------------------------------------------- iBOT


def test_masks_are_blocks_of_the_share_that_was_drawn():
    """Half of the views, 10 to 50 % of their patches to the patch, in blocks; whatever the grid's sides."""
    for grid in ((8, 8, 8), (4, 4, 4), (16, 4, 2), (3, 1, 1), (2, 2, 1)):
        views = np.concatenate([BlockMasks(grid).draw(3, 1, i) for i in range(200)])
        counts, patches = views.sum(1), math.prod(grid)
        assert views.shape == (400, patches) and 0.4 < (counts > 0).mean() < 0.6
        assert counts.max() < patches and (counts[counts > 0] >= max(1, math.floor(0.1 * patches))).all()
        assert counts.max() <= max(1, math.ceil(0.5 * patches))
    views = np.concatenate([BlockMasks((8, 8, 8)).draw(3, 1, i) for i in range(200)])
    shares = views[views.any(1)].mean(1)
    assert 0.099 < shares.min() < 0.12 and 0.48 < shares.max() <= 0.5 and 0.27 < shares.mean() < 0.33
    assert (views.mean(0) > 0).all()  # no corner of the grid is left out, though blocks seldom lie there
    blocks = views.reshape(-1, 8, 8, 8)
    touching = (blocks[:, 1:] & blocks[:, :-1]).sum() / blocks[:, 1:].sum()
    assert touching > 0.6  # at random it would be the share of hidden patches, 0.3


def test_masks_are_keyed():
    draw = BlockMasks((4, 4, 4), probability=1).draw
    first = draw(0, 0, 0)
    assert (draw(0, 0, 0) == first).all() and not (first[0] == first[1]).all()
    assert not any((draw(*key) == first).all() for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


def test_hidden_patches_do_not_reach_the_student():
    """The mask token stands in their place, with their positions: grey values there change nothing, elsewhere they do;
    and nothing hidden is the plain forward pass."""
    torch.manual_seed(0)
    model = main_dino.build_model("vit_tiny", (24, 24, 12), (12, 12, 6), 16, False, 0.0, True, ibot=True)
    torch.nn.init.normal_(model.mask_token)
    views, hidden = torch.rand(2, 1, 24, 24, 12), torch.zeros(2, 8, dtype=torch.bool)
    hidden[0, 3] = hidden[1, 0] = True  # patch (0, 1, 1) and patch (0, 0, 0)
    masks = collate_masks([np.stack([hidden[0], hidden[1]])])
    assert masks.tokens.tolist() == [4, 10] and (masks.hidden == hidden).all()
    changed = views.clone()
    changed[0, 0, :12, 12:, 6:] = 0
    changed[1, 0, :12, :12, :6] = 1
    with torch.no_grad():
        one, two, seen = (
            model([v], True, masks.tokens, h) for v, h in ((views, hidden), (changed, hidden), (views, None))
        )
        assert all(torch.equal(a, b) for a, b in zip(one, two))
        assert [tuple(part.shape) for part in one] == [(2, 16), (2, 48), (2, 16)]
        torch.testing.assert_close(seen[0], model([views]))
        for a, b in zip(one, seen):
            assert not torch.allclose(a, b, atol=1e-4)
        tokens = model.backbone.forward_tokens(views)
        torch.testing.assert_close(seen[2], model.patch_head(torch.stack([tokens[0, 4], tokens[1, 1]])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_ibot_is_the_papers_formula(centering, dtype):
    """View by view in float64, and the centre after it; views with nothing hidden count as 0."""
    torch.manual_seed(0)
    hidden = torch.rand(6, 9) < 0.5
    hidden[2] = False
    masks = collate_masks(list(hidden.view(2, 3, 9).transpose(0, 1).numpy()))
    out_dim, temp, number = 7, 0.05, int(hidden.sum())
    teacher, student = (torch.nn.functional.normalize(torch.randn(number, out_dim)).to(dtype) for _ in range(2))
    loss = main_dino.PatchLoss(1.0, out_dim, 0.9, centering, 0.1)
    loss.center.normal_(std=0.1)
    center = loss.center.double().clone()
    losses = loss(student, teacher, masks, temp, utils.Processes())
    q = ((teacher.double() - center) / temp).softmax(-1)
    q = q if centering == "mean" else written_out_sinkhorn(teacher, temp)
    log_p, at, expected, entropy = (student.double() / 0.1).log_softmax(-1), 0, 0.0, 0.0
    for view in hidden:
        tokens = slice(at, at + int(view.sum()))
        at = tokens.stop
        if view.any():
            expected += -(q[tokens] * log_p[tokens]).sum(-1).mean().item() / 6
            entropy += -(q[tokens] * q[tokens].log()).sum(-1).mean().item() / 6
    assert losses["ibot"].item() == pytest.approx(expected, rel=2e-5)
    assert losses["ibot_kl"].item() == pytest.approx(expected - entropy, rel=2e-4)
    loss.update_from_sum(loss.batch_sum(teacher, masks), torch.tensor(True))
    torch.testing.assert_close(loss.center.double(), 0.9 * center + 0.1 * teacher.double().mean(0), rtol=0, atol=1e-6)


def test_only_tissue_is_hidden_where_told():
    """Patches of air stay in view and count nowhere: as if they had not been drawn."""
    torch.manual_seed(0)
    views = torch.zeros(2, 1, 24, 24, 12)
    views[:, :, 12:] = 0.4  # the far half along x is tissue
    views[0, 0, 0, 0, 0] = 1  # one bright voxel makes no tissue
    masks = collate_masks([np.ones((2, 8), bool)])
    loss = main_dino.PatchLoss(1.0, 5, 0.9, "sinkhorn", 0.1, (12, 12, 6))
    told = loss.hide(masks, views)
    assert told.hidden.tolist() == [[False] * 4 + [True] * 4] * 2 and torch.equal(told.tokens, masks.tokens)
    assert main_dino.PatchLoss(1.0, 5, 0.9, "sinkhorn", 0.1).hide(masks, views) is masks
    for clip_range in ((-1350, 150), (-1000, 400), (-1000, 1000)):  # the limit is one in HU, whatever is shown
        told_hu = main_dino.PatchLoss(1.0, 5, 0.9, "sinkhorn", 0.1, (12, 12, 6), clip_range)
        for hu, is_tissue in ((-1000, False), (-905, False), (-895, True)):
            grey = torch.full_like(views, (hu - clip_range[0]) / (clip_range[1] - clip_range[0])).clamp(0, 1)
            assert (told_hu.hide(masks, grey).hidden == is_tissue).all(), (clip_range, hu)
    teacher, student = torch.randn(16, 5), torch.randn(16, 5)
    kept = told.hidden.flatten()
    drawn = collate_masks([told.hidden.numpy()])
    whole, part = (
        loss(student[rows], teacher[rows], some, 0.05, utils.Processes())
        for rows, some in ((slice(None), told), (kept, drawn))
    )
    for name in ("ibot", "ibot_kl"):
        torch.testing.assert_close(whole[name], part[name])
    torch.testing.assert_close(loss.batch_sum(teacher, told), loss.batch_sum(teacher[kept], drawn))


def nothing_hidden(batch=4):
    return [collate_masks([np.zeros((2, 8), bool)] * batch)]


def masks_of(batch=4, **settings):
    return [collate_masks([BlockMasks((2, 2, 2), **settings).draw(0, 0, i) for i in range(batch)])]


def run_with_all(centering="sinkhorn", tissue=None):
    """A TrainState with every objective on."""
    run = make_run()
    torch.manual_seed(0)
    run.student, run.teacher = (
        main_dino.build_model("vit_tiny", (24, 24, 12), (12, 12, 6), 16, False, 0.0, True, ibot=True) for _ in range(2)
    )
    run.network = run.student
    run.teacher.load_state_dict(run.student.state_dict())
    run.teacher.requires_grad_(False)
    run.optimizer = utils.make_optimizer("adamw", utils.parameter_groups(run.student))
    run.dino_loss = main_dino.DINOLoss(16, 0.9, centering)
    run.koleo, run.ibot = 0.1, main_dino.PatchLoss(0.5, 16, 0.9, centering, 0.1, tissue)
    return run


def ibot_state(run):
    return state_of(run) | {"center": run.ibot.center.clone()}


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_all_objectives(centering, dtype):
    """The loss is the weighted sum; every weight learns; a step that is not finite changes nothing, centres included; a
    batch with nothing hidden leaves the patches' centre and head alone, and so does one of air, told to spare it."""
    run, views, masks = run_with_all(centering), [torch.rand(8, 1, 24, 24, 12), torch.rand(8, 1, 12, 12, 6)], masks_of()
    run.dtype = dtype
    before = ibot_state(run)
    step = main_dino.train_step(run, [views], VALUES, False, masks)
    metrics = step.metrics
    assert step.finite and {"koleo", "ibot", "ibot_kl"} <= metrics.keys()
    total = metrics["kl"] + metrics["teacher_entropy"] + 0.1 * metrics["koleo"] + 0.5 * metrics["ibot"]
    torch.testing.assert_close(metrics["loss"], total)
    assert all(
        p.grad.isfinite().all() and p.grad.any() for name, p in run.student.named_parameters() if p.requires_grad
    )
    after = ibot_state(run)
    for name in before:
        fixed = "original0" in name or name == "/teacher/mask_token"  # the prototypes' gains; the token's average is 0
        assert fixed or not torch.equal(before[name], after[name]), name
    broken = [view.clone() for view in views]
    broken[0][3, 0, 1, 1, 1] = torch.nan
    assert not main_dino.train_step(run, [broken], VALUES, False, masks).finite
    assert same(after, ibot_state(run))[0]
    run.ibot.patch_size = (12, 12, 6)
    dark = [torch.zeros_like(views[0]), views[1]]
    for nothing in ((views, nothing_hidden()), (dark, masks)):
        step = main_dino.train_step(run, [nothing[0]], VALUES, False, nothing[1])
        assert step.finite and step.metrics["ibot"] == 0 and torch.equal(run.ibot.center, after["center"])
        assert not run.student.mask_token.grad.any() and not run.student.patch_head.mlp[0].weight.grad.any()
        assert all(p.grad.isfinite().all() for p in run.student.parameters() if p.grad is not None)


def test_the_host_waits_for_no_objective():
    """As in test_steps.py of the plain step: on a GPU to fetch a value would hold the host up."""
    run, views, masks = run_with_all(tissue=(12, 12, 6)), [torch.rand(8, 1, 24, 24, 12)], masks_of(probability=1)
    main_dino.train_step(run, [views], VALUES, False, masks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        main_dino.train_step(run, [views], VALUES, False, masks)
    seen = {event.key for event in profile.events() if getattr(event.cpu_parent, "key", "") != "aten::_fused_adamw_"}
    assert {"aten::argmax", "aten::index_select", "aten::logsumexp"} <= seen  # KoLeo, iBOT, Sinkhorn-Knopp
    assert not seen & {"aten::item", "aten::nonzero", "aten::is_nonzero"}


def test_the_prototypes_of_both_heads_are_frozen_at_first():
    run, views = run_with_all(), [torch.rand(8, 1, 24, 24, 12)]
    heads = (run.student.head.last_layer, run.student.patch_head.last_layer)
    before = [head.weight.detach().clone() for head in heads]
    main_dino.train_step(run, [views], VALUES, True, masks_of(probability=1))
    assert all(torch.equal(head.weight, old) for head, old in zip(heads, before))
    main_dino.train_step(run, [views], VALUES, False, masks_of(probability=1))
    assert not any(torch.equal(head.weight, old) for head, old in zip(heads, before))


# ----------------------------------------------------------------------------------------------------- rates by layer


def test_rates_by_layer():
    """Each layer has layer_decay of the one above, the patch embedding a factor on top, weight decay where it was."""
    model = main_dino.build_model("vit_tiny", (24, 24, 12), (12, 12, 6), 16, False, 0.0, True)
    top = len(model.backbone.blocks) + 1
    groups = main_dino.optimizer_groups(model, 0.5, 0.2)
    found = {id(p): group for group in groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(named) == sum(len(group["params"]) for group in groups)
    for name, p in named.items():
        layer = 0 if "embed" in name or "cls" in name else int(name.split(".")[2]) + 1 if "blocks" in name else top
        scale = 0.5 ** (top - layer) * (0.2 if "patch_embed" in name else 1)
        assert found[id(p)]["scale"] == pytest.approx(scale) and found[id(p)]["decays"] == utils.decays(name, p), name
    assert main_dino.optimizer_groups(model, 1.0, 1.0)[0].keys() == {"params"}
    run = make_run()
    run.optimizer = utils.make_optimizer("adamw", main_dino.optimizer_groups(run.student, 0.5, 0.0))
    before = run.student.backbone.patch_embed.proj.weight.detach().clone()
    main_dino.train_step(run, [[torch.rand(8, 1, 24, 24, 12)]], VALUES, False)
    for group in run.optimizer.param_groups:
        assert group["lr"] == VALUES["lr"] * group["scale"]
        assert group["weight_decay"] == (VALUES["weight_decay"] if group["decays"] else 0)
    assert torch.equal(run.student.backbone.patch_embed.proj.weight, before)
    assert run.student.backbone.pos_embed.grad.any()


# --------------------------------------------------------------------------------------------------------- whole runs

ALL = ["--centering", "sinkhorn", "--koleo", 0.1, "--ibot", 0.7, "--layer_decay", 0.8, "--patch_embed_lr", 0.2]


@pytest.fixture(scope="module")
def flags(volumes):
    return [
        *("--data_dir", volumes, "--epochs", 3, "--lr", 0.05, "--log_every", 1),
        *("--warmup_teacher_temp", 0.02, "--teacher_temp", 0.03, "--warmup_teacher_temp_epochs", 2),
    ]


@contextlib.contextmanager
def double_precision():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


PARTS = ("student", "teacher", "dino_loss", "ibot")


def test_two_ranks_are_one_batch(flags, tmp_path, capsys):
    """Weights to 1e-9 in float64, the same figures in log.txt: two gloo ranks with b and one process with 2 b; KoLeo,
    whose batch is a rank's, as of one process with two times b, where Sinkhorn's would be the small one."""
    runs = {
        "two": (2, 2, 1, ["--centering", "sinkhorn", "--ibot", 0.7, "--ibot_tissue"]),
        "one": (0, 4, 1, ["--centering", "sinkhorn", "--ibot", 0.7, "--ibot_tissue"]),
        "koleo two": (2, 2, 1, ["--koleo", 0.3, "--ibot", 0.7]),
        "koleo one": (0, 2, 2, ["--koleo", 0.3, "--ibot", 0.7]),
    }
    for name, (processes, batch, accumulate, more) in runs.items():
        sizes = ["--batch_size_per_gpu", batch, "--accumulate_steps", accumulate, "--drop_path_rate", 0]
        run = [*flags, *more, *sizes, "--output_dir", tmp_path / name]
        if processes:
            done = command(*run, processes=processes, script=SMALL, environment={"FLOAT64": "1"})
            assert done.returncode == 0, done.stderr
        else:
            with double_precision():
                assert run_main(capsys, *run)[0] == 0
    for pair in (("one", "two"), ("koleo one", "koleo two")):
        one, two = (checkpoint(tmp_path / name) for name in pair)
        for part in PARTS:
            close, worst = same(one[part], two[part], 1e-9)
            assert close, f"{pair}, {part}: {worst}"
        assert not same(one["student"], one["teacher"], 1e-4)[0] and one["ibot"]["center"].any()
        assert one["student"]["mask_token"].any()
        for mine, theirs in zip(*(read_log(tmp_path / name / "log.txt") for name in pair)):
            for metric in ("loss", "kl", "teacher_entropy", "mutual_information", "ibot", "ibot_kl"):
                assert mine[metric] == pytest.approx(theirs[metric], abs=1e-9)
            assert mine["winning_prototypes"] == theirs["winning_prototypes"] and ("koleo" in mine) == (
                "koleo" in pair[0]
            )


def test_a_run_with_all_objectives_resumes(flags, tmp_path, capsys):
    """In the middle of an epoch, to the last bit, with other workers; without what it was begun with, it says so."""
    more = [*flags, *ALL, "--batch_size_per_gpu", 2, "--accumulate_steps", 2, "--drop_path_rate", 0.3]
    assert run_main(capsys, *more, "--output_dir", tmp_path / "straight", "--num_workers", 1)[0] == 0
    for stop in (["--max_steps", 3], []):
        assert run_main(capsys, *more, *stop, "--output_dir", tmp_path / "broken")[0] == 0
    one, two = (checkpoint(tmp_path / name) for name in ("straight", "broken"))
    for part in PARTS:
        assert same(one[part], two[part])[0]
    assert same(flat(one["optimizer"]), flat(two["optimizer"]))[0]
    (record, *_) = read_log(tmp_path / "straight" / "log.txt")
    assert {"koleo", "ibot", "ibot_kl"} <= record.keys() and 0 < record["ibot"]
    for name, value, words in (
        ("--ibot", 0, "is of a run with --ibot"),
        ("--layer_decay", 1.0, "--layer_decay 0.8, not 1"),
        ("--patch_embed_lr", 1.0, "--patch_embed_lr 0.2, not 1"),
    ):
        code, _, errors = run_main(capsys, *more, name, value, "--epochs", 4, "--output_dir", tmp_path / "broken")
        assert code == 1 and len(errors) == 1 and words in errors[0], errors
    code, _, errors = run_main(
        capsys, *more, "--koleo", 0, "--ibot", 1, "--epochs", 4, "--output_dir", tmp_path / "broken"
    )
    assert code == 0 and not errors and checkpoint(tmp_path / "broken")["step"] == 8


def test_older_runs_resume(flags, tmp_path, capsys):
    """Begun with the centre, it takes to Sinkhorn-Knopp and KoLeo and goes back; a patch head can't come later, which
    is told, but a new run starts from it, whose head and encoder are the old ones."""
    more, old = [*flags, "--batch_size_per_gpu", 4], ["--output_dir", tmp_path / "old"]
    for stop, change in ((1, []), (3, ["--centering", "sinkhorn", "--koleo", 0.1]), (4, [])):
        code, _, errors = run_main(capsys, *more, *change, "--max_steps", stop, *old)
        assert code == 0 and not errors and checkpoint(tmp_path / "old")["step"] == stop
    state = checkpoint(tmp_path / "old")
    assert not {"ibot"} & state.keys() and not any("patch_head" in name for name in state["student"])
    code, _, errors = run_main(capsys, *more, "--ibot", 1, *old)
    assert code == 1 and len(errors) == 1 and "has no 'ibot'" in errors[0] and "--pretrained_weights" in errors[0]
    code, _, errors = run_main(capsys, *more, "--layer_decay", 0.9, *old)
    assert code == 1 and len(errors) == 1
    start = ["--ibot", 1, "--lr", 0, "--max_steps", 1, "--weight_decay", 0, "--pretrained_weights"]
    token = tmp_path / "token.pth"
    for new, source, told in (("new", tmp_path / "old" / "checkpoint.pth", True), ("newer", token, False)):
        code, out, errors = run_main(capsys, *more, *start, source, "--output_dir", tmp_path / new)
        assert code == 0 and not errors and "the head is new" not in out
        assert [f"the {part} is new" in out for part in ("patch head", "mask token")] == [told, told]
        if told:
            first = checkpoint(tmp_path / new)
            first["teacher"]["mask_token"].fill_(0.5)
            torch.save({"state.of.teacher": first["teacher"], "config": first["config"]}, token)
    second = checkpoint(tmp_path / "newer")["student"]
    assert same(first["teacher"], second)[0] and second["mask_token"].eq(0.5).all()
    assert same(state["teacher"], {name: second[name] for name in state["teacher"]})[0]


def test_terms_that_are_off_are_not_told(flags, tmp_path, capsys):
    assert run_main(capsys, *flags, "--batch_size_per_gpu", 4, "--max_steps", 1, "--output_dir", tmp_path)[0] == 0
    (record,) = read_log(tmp_path / "log.txt")
    assert not {"koleo", "ibot", "ibot_kl"} & record.keys()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--koleo", 0.1, "--batch_size_per_gpu", 1], "--koleo needs a --batch_size_per_gpu of at least 2"),
        (["--ibot_tissue"], "--ibot_tissue needs --ibot"),
        (["--ibot", 1, "--ibot_tissue", "--use_window"], "--ibot_tissue with --use_window"),
        (["--ibot", 1, "--ibot_tissue", "--clip_range", -160, 240], "air, below -900 HU, can't"),
        (["--ibot", 1, "--input_size", 12, 12, 6, "--local_crops_number", 0], "a view of one patch"),
        (["--ibot", 1, "--arch", "resnet18"], "resnet18 has no patches"),
        (["--patch_embed_lr", 0.2, "--arch", "resnet18"], "resnet18 has no patches"),
        (["--layer_decay", 0], "--layer_decay"),
        (["--layer_decay", 1.1], "--layer_decay"),
        (["--ibot", -1], "--ibot"),
        (["--koleo", "nan"], "--koleo"),
        (["--centering", "median"], "--centering"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_are_refused(tmp_path, capsys, wrong, words):
    code, _, errors = run_main(capsys, "--data_dir", tmp_path, "--output_dir", tmp_path / "out", *wrong)
    assert code == 2 and len(errors) == 1 and words in errors[0] and not (tmp_path / "out").exists(), errors


def test_a_centre_that_is_not_used_is_told(flags, tmp_path, capsys):
    for momentum, told in ((0.99, True), (0.9, False)):
        more = ["--center_momentum", momentum, "--max_steps", 1, "--batch_size_per_gpu", 4]
        more += ["--centering", "sinkhorn"]
        code, out, _ = run_main(capsys, *flags, *more, "--output_dir", tmp_path / str(momentum))
        assert code == 0 and ("--center_momentum has no effect" in out) == told
