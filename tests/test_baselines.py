"""The fast step against the plain one of baselines.py: MONAI's ViT, eager, in single precision, the formulas written
out."""

import functools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import augmentations
import main_dino
import utils
from augmentations import PAPER, MultiCropAugmentation, paper_policy
from dino3d.benchmarks import baselines
from dino3d.data.pretraining import Sample, collate
from dino3d.training import grouped
from dino3d.training.nonfinite import NonFiniteSteps
from resnet3d import BasicBlock, Bottleneck, ResNet
from vision_transformer import ARCHITECTURES, VisionTransformer

SIZE, PATCH, OUT_DIM, BATCH, LOCAL = (24, 24, 12), (12, 12, 6), 64, 4, 3
STEPS = 50


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(
        ARCHITECTURES, "vit_tiny", functools.partial(VisionTransformer, embed_dim=48, depth=3, num_heads=3)
    )
    monkeypatch.setattr(main_dino, "DINOHead", functools.partial(main_dino.DINOHead, hidden_dim=64))
    monkeypatch.setattr(baselines, "DINOHead", functools.partial(baselines.DINOHead, hidden_dim=64))


def build(arch="vit_tiny", patch_size=PATCH):
    torch.manual_seed(0)
    return main_dino.build_model(arch, SIZE, patch_size, OUT_DIM, False, None, True)


def views_of(step, device):
    """Bright and dark boxes: noise alone would teach nothing."""
    generator = torch.Generator().manual_seed(step)
    shift = torch.rand(BATCH, 1, 1, 1, 1, generator=generator)
    views = [
        0.7 * shift.repeat(count, 1, 1, 1, 1) + 0.3 * torch.rand(count * BATCH, 1, *size, generator=generator)
        for count, size in ((2, SIZE), (LOCAL, PATCH))
    ]
    return [view.to(device) for view in views]


def schedule(step):
    return {
        "lr": 0.0003 * min(1, step / 10),
        "weight_decay": 0.04 + 0.002 * step,
        "momentum_teacher": 0.98 + 0.0003 * step,
        "teacher_temp": 0.04 + 0.0002 * step,
    }


def train_state(student, teacher, device, **others):
    """What main_dino.py's steps need; others: fields of it that are not the tests' usual ones."""
    usual = {"schedules": None, "crops": None, "clip_range": None, "dtype": torch.float32}
    return main_dino.TrainState(
        network=student,
        student=student,
        teacher=teacher,
        dino_loss=main_dino.DINOLoss(OUT_DIM, 0.9).to(device),
        optimizer=utils.make_optimizer("adamw", utils.parameter_groups(student)),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        clip_grad=3.0,
        global_batch=BATCH,
        seed=0,
        processes=utils.Processes(device=device),
        nonfinite=NonFiniteSteps(20, device),
        **usual | others,
    )


def our_losses(device, dtype=torch.float32, compiled=False, checkpointing=False, micro_batches=1):
    """(STEPS,) losses, and the student."""
    device = torch.device(device)
    student, teacher = build().to(device), build().to(device).requires_grad_(False)
    student.backbone.grad_checkpointing = checkpointing
    if compiled:
        assert main_dino.compile_blocks((student, teacher), device) == []
    run = train_state(student, teacher, device, dtype=dtype, accumulate_steps=micro_batches)
    losses = []
    for step in range(STEPS):
        views = views_of(step, device)
        share = BATCH // micro_batches
        parts = [
            [view.unflatten(0, (-1, BATCH))[:, i * share :][:, :share].flatten(0, 1) for view in views]
            for i in range(micro_batches)
        ]
        finite, metrics, *_ = main_dino.train_step(run, parts, schedule(step), frozen=False)
        assert finite
        losses.append(metrics["loss"])
    return torch.stack(losses).cpu(), student


def plain_losses(device):
    model = build()
    student, teacher = (baselines.Model(model).to(device) for _ in range(2))
    optimizer, center = torch.optim.AdamW(utils.parameter_groups(student)), torch.zeros(1, OUT_DIM, device=device)
    losses = []
    for step in range(STEPS):
        loss, center = baselines.plain_step(student, teacher, optimizer, center, views_of(step, device), schedule(step))
        losses.append(loss)
    return torch.tensor(losses)


def test_a_resnet_takes_the_steps_of_monais(tiny, monkeypatch):
    """In training, with the statistics of each batch: losses, then weights and running statistics."""
    for name, block in (("resnet18", BasicBlock), ("resnet50", Bottleneck)):
        monkeypatch.setitem(ARCHITECTURES, name, functools.partial(ResNet, block, (1, 2, 1, 1), width=8))
        student, teacher = build(name, None), build(name, None).requires_grad_(False)
        theirs, their_teacher = baselines.Model(student), baselines.Model(student)
        run, center = train_state(student, teacher, torch.device("cpu")), torch.zeros(1, OUT_DIM)
        optimizer = torch.optim.AdamW(utils.parameter_groups(theirs))
        for step in range(4):
            views, values = views_of(step, "cpu"), schedule(step)
            ours = main_dino.train_step(run, [views], values, frozen=False).metrics["loss"]
            loss, center = baselines.plain_step(theirs, their_teacher, optimizer, center, views, values)
            assert float(ours) == pytest.approx(loss, rel=1e-4)
        for network, other in ((student, theirs), (teacher, their_teacher)):
            for key, tensor in other.state_dict().items():
                torch.testing.assert_close(network.state_dict()[key], tensor, rtol=1e-3, atol=1e-4)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_fifty_steps_have_the_plain_ones_losses(tiny, device):
    """From the same weights and views, with schedules that move, to 1e-4. In bf16 each loss is within 10 %, their mean
    within 2 %."""
    plain, (ours, _) = plain_losses(device), our_losses(device)
    assert plain.std() > 0.05, plain  # it is not one loss all the time
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
    low, _ = our_losses(device, torch.bfloat16)
    assert (
        (low / plain - 1).abs().max() < 0.1 and abs(low.mean() / plain.mean() - 1) < 0.02 and not torch.equal(low, ours)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "flag, tolerance",
    [({"checkpointing": True}, 0), ({"micro_batches": 2}, 1e-4)],
    ids=["grad_checkpointing", "accumulate_steps"],
)
def test_flags_leave_the_losses_as_they_are(tiny, device, flag, tolerance):
    expected, _ = our_losses(device)
    ours, _ = our_losses(device, **flag)
    torch.testing.assert_close(ours, expected, rtol=tolerance if device == "cpu" else 1e-4, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_leave_the_losses_as_they_are(tiny, device, monkeypatch):
    """Of 50 steps of global views to 1e-4; a compiler has to be there."""
    monkeypatch.setattr("test_baselines.LOCAL", 0)
    monkeypatch.setitem(
        ARCHITECTURES, "vit_tiny", functools.partial(VisionTransformer, embed_dim=48, depth=1, num_heads=3)
    )
    expected, _ = our_losses(device)
    torch.testing.assert_close(our_losses(device, compiled=True)[0], expected, rtol=1e-4, atol=0)


def test_all_blocks_share_one_compiled_code():
    """The student's for both shapes of views, with stochastic depth, and the teacher's, whatever the number of
    blocks."""
    torch._dynamo.reset()
    student, teacher = (
        VisionTransformer(SIZE, embed_dim=24, depth=12, num_heads=3, drop_path_rate=rate) for rate in (0.1, 0)
    )
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    wrapped = [torch.nn.ModuleDict({"backbone": model}) for model in (student, teacher)]
    for model in wrapped:
        model.backbone = model["backbone"]
    assert main_dino.compile_blocks(wrapped, torch.device("cpu"), backend) == []
    graphs.clear()
    for _ in range(2):
        with torch.no_grad():
            teacher(torch.rand(2, 1, *SIZE))
        student(torch.rand(2, 1, *SIZE)).sum().backward()
        student(torch.rand(8, 1, *PATCH)).sum().backward()
    assert len(graphs) == 6  # two each: all tokens, and in the last block the class token alone
    torch._dynamo.reset()


def test_without_a_compiler_it_goes_on(tiny):
    def broken(graph, inputs):
        raise RuntimeError("no compiler found\nand much more")

    model = build()
    (notice,) = main_dino.compile_blocks((model, model), torch.device("cpu"), broken)
    assert notice.startswith("--compile: ") and "continuing without" in notice and "\n" not in notice
    assert main_dino.compile_blocks and model([torch.rand(2, 1, *SIZE)]).shape == (2, OUT_DIM)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("unproven", [False, True])
def test_no_step_waits_for_the_gpu(tiny, compiled, unproven, monkeypatch):
    """From a pinned batch to the teacher's average, with what is off by default and without: torch raises where the
    host would wait for the device."""
    device = torch.device("cuda")
    monkeypatch.setattr(augmentations, "VIEWS_IN_ONE_KERNEL", unproven)
    monkeypatch.setattr(grouped, "IN_GROUPS", unproven)
    crops = MultiCropAugmentation(paper_policy(PAPER), SIZE, PATCH, LOCAL)
    samples = [Sample(np.full(crops.patch_size, i, np.int16), crops.draw(0, 0, i), []) for i in range(BATCH)]
    (batch,) = DataLoader([samples], batch_size=None, collate_fn=collate, pin_memory=True)
    student, teacher = build().to(device), build().to(device).requires_grad_(False)
    if compiled:
        assert main_dino.compile_blocks((student, teacher), device) == []
    run = train_state(
        student,
        teacher,
        device,
        crops=crops,
        clip_range=(-1000, 1000),
        dtype=torch.bfloat16,
        copy_stream=torch.cuda.Stream(),
    )
    for step in range(3):
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            utils.seed_step(0, step, 0)
            finite, *_ = main_dino.train_step(run, map(run.render, [batch]), schedule(step), frozen=step == 0)
            run.nonfinite.count(finite)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert finite.item()
