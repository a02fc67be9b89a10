"""Steps that are skipped, steps of several micro-batches, and activation checkpointing."""

import json
import time

import pytest
import torch
from conftest import ROOT
from test_main_dino import checkpoint, command, run_main, same, smaller_model, traceback_through_our_code  # noqa: F401

import main_dino
import utils
from dino3d.data.pretraining import BatchStream
from dino3d.files import read_log
from dino3d.finetune.fold_loop import weighted_step
from dino3d.training.monitor import Monitor
from dino3d.training.nonfinite import NonFiniteSteps, step_if_finite, tensor_statistics
from vision_transformer import VisionTransformer

SMALL = ROOT / "tests" / "run_small.py"


def flat(state, path=""):
    """{path: float64 tensor} of nested dicts and lists."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {name: leaf for key, value in items for name, leaf in flat(value, f"{path}/{key}").items()}
    return {path: torch.as_tensor(state).double()} if isinstance(state, (torch.Tensor, int, float)) else {}


def parts(state, *names):
    return flat({name: state[name] for name in names})


# ------------------------------------------------------------------------------------------------------ skipped steps


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_an_optimizer_skips_a_step(name):
    """As if the bad gradients had never been: weights and state, also where the very first step is skipped."""
    results = []
    for bad in ((), (0, 3)):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = utils.make_optimizer(name, utils.parameter_groups(model))
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.1, 0.1
        gradients = [[torch.randn_like(p) for p in model.parameters()] for _ in range(4)]
        good = iter(gradients)
        for step in range(4 + len(bad)):
            skip = step in bad
            for p, gradient in zip(model.parameters(), [None] * 2 if skip else next(good)):
                p.grad = torch.full_like(p, torch.nan) if skip else gradient.clone()
            step_if_finite(optimizer, torch.tensor(not skip))
        results.append(flat({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    assert same(*results)[0] and all(value.isfinite().all() for value in results[1].values())


def make_run(scaler=None, use_bn_in_head=False):
    torch.manual_seed(0)
    student, teacher = (
        main_dino.build_model("vit_tiny", (24, 24, 12), (12, 12, 6), 16, use_bn_in_head, 0.0, True) for _ in range(2)
    )
    teacher.requires_grad_(False)
    loss = main_dino.DINOLoss(16, 0.9)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    optimizer = utils.make_optimizer("adamw", utils.parameter_groups(student))
    return main_dino.TrainState(
        network=student,
        student=student,
        teacher=teacher,
        dino_loss=loss,
        optimizer=optimizer,
        scaler=scaler,
        schedules=None,
        crops=None,
        clip_range=None,
        dtype=torch.float32,
        clip_grad=3.0,
        global_batch=4,
        seed=0,
        processes=utils.Processes(),
        nonfinite=NonFiniteSteps(20, torch.device("cpu")),
    )


def test_a_part_that_is_off_is_neither_saved_nor_asked_for():
    run = make_run()
    assert list(run.parts()) == ["student", "teacher", "optimizer", "scaler", "dino_loss"]
    run.scaler = None
    assert "scaler" not in run.parts()


def state_of(run):
    """All but the schedules' values in the optimizer's groups."""
    state = flat({name: getattr(run, name).state_dict() for name in ("student", "teacher", "dino_loss", "optimizer")})
    return {name: tensor.clone() for name, tensor in state.items() if "param_groups" not in name}


VALUES = {"lr": 0.01, "weight_decay": 0.04, "momentum_teacher": 0.5, "teacher_temp": 0.04}


@pytest.mark.parametrize("use_bn_in_head", [False, True])
def test_a_step_of_nan_changes_nothing(use_bn_in_head):
    """Student, teacher, optimizer, centre and the batch norms' statistics, in the middle of a run; then it goes on."""
    run, views = make_run(use_bn_in_head=use_bn_in_head), [torch.rand(8, 1, 24, 24, 12)]
    assert main_dino.train_step(run, [views], VALUES, False).finite
    before = state_of(run)
    broken = [views[0].clone()]
    broken[0][3, 0, 1, 1, 1] = torch.nan
    finite, *_ = main_dino.train_step(run, [broken], VALUES, False)
    assert not finite and same(before, state_of(run))[0]
    finite, metrics, *_ = main_dino.train_step(run, [views], VALUES, False)
    assert finite and all(metric.isfinite() for metric in metrics.values())
    after = state_of(run)
    for part in ("student", "teacher", "dino_loss", "optimizer"):
        names = [name for name in after if name.startswith(f"/{part}/")]
        assert any(not torch.equal(before[name], after[name]) for name in names), part


def unchanged(run, before):
    """Whether what `before` holds is still so: an optimizer makes its state in its first step, be it skipped or not."""
    state = state_of(run)
    return same(before, {name: state[name] for name in before})[0]


def test_an_infinite_gradient_with_a_finite_loss_is_skipped():
    run, views = make_run(), [torch.rand(8, 1, 24, 24, 12)]
    before = state_of(run)
    run.student.backbone.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    finite, metrics, *_ = main_dino.train_step(run, [views], VALUES, False)
    assert not finite and metrics["loss"].isfinite()
    assert unchanged(run, before)


def test_an_overflow_in_fp16_is_the_same_thing():
    """The loss's scale falls until a step is taken; those before change nothing."""
    run = make_run(torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1))
    views, before, scale = [torch.rand(8, 1, 24, 24, 12)], state_of(run), 1e38
    for skipped in range(100):
        finite, *_ = main_dino.train_step(run, [views], VALUES, False)
        if finite:
            break
        assert run.scaler.get_scale() == pytest.approx(scale / 2)
        assert unchanged(run, before)
        scale = run.scaler.get_scale()
    assert skipped > 0 and run.scaler.get_scale() == pytest.approx(2 * scale)
    assert not unchanged(run, before) and run.dino_loss.center.any()


def test_a_nan_batch_on_one_rank_is_skipped_by_both(volumes, tmp_path):
    """Step 3 of six, NaN on rank 1 alone: all that is saved equals a run whose third step did nothing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--data_dir", volumes, "--epochs", 3, "--batch_size_per_gpu", 2, "--drop_path_rate", 0.2, "--lr", 0.05]
    for name, plant in (("nan", "nan 1 3 3"), ("nothing", "nothing 3 3")):
        done = command(*flags, "--output_dir", tmp_path / name, processes=2, script=SMALL, environment={"PLANT": plant})
        assert done.returncode == 0, done.stderr
        if name == "nan":
            assert sum("were skipped and changed nothing" in line for line in done.stderr.splitlines()) == 1, (
                done.stderr
            )
            assert "1 steps were skipped" in done.stdout
    one, two = (
        parts(checkpoint(tmp_path / name), "student", "teacher", "dino_loss", "optimizer")
        for name in ("nan", "nothing")
    )
    assert same(one, two)[0] and all(value.isfinite().all() for value in one.values())
    assert any("exp_avg" in name for name in one) and one["/dino_loss/center"].any()
    records = read_log(tmp_path / "nan" / "log.txt")
    assert [record["skipped_steps"] for record in records] == [0, 1, 0]
    others = read_log(
        tmp_path / "nothing" / "log.txt"
    )  # one step was taken in each second epoch: means are of that one
    for mine, theirs in zip(records, others):
        for metric in ("loss", "kl", "grad_norm"):
            assert mine[metric] == pytest.approx(theirs[metric], abs=1e-6)
    events = EventAccumulator(str(tmp_path / "nan" / "tensorboard")).Reload()
    assert sum(event.value for event in events.Scalars("dino/skipped_steps")) == 1


def test_nan_for_good_ends_both_ranks_and_names_the_file(volumes, tmp_path):
    began = time.monotonic()
    done = command(
        "--data_dir",
        volumes,
        "--output_dir",
        tmp_path,
        "--epochs",
        500,
        "--batch_size_per_gpu",
        2,
        "--log_every",
        1000,
        "--max_skipped_steps",
        12,
        "--save_every_minutes",
        0,
        processes=2,
        script=SMALL,
        environment={"PLANT": "nan 1 3 100000"},
    )
    assert done.returncode == 1 and time.monotonic() - began < 60
    dumps = [json.loads((tmp_path / f"skipped_batch_rank{rank}.json").read_text()) for rank in range(2)]
    assert dumps[0]["step"] == dumps[1]["step"] == 20  # the first look, each ten steps, that finds twelve
    assert all(sample["loss"] is not None and sample["views"]["not_finite"] == 0 for sample in dumps[0]["samples"])
    bad, good = dumps[1]["samples"]
    assert bad["loss"] is None and 0 < bad["views"]["not_finite"] < 1e-3 and 0 <= bad["views"]["mean"] <= 1
    assert good["loss"] > 0 and good["views"]["not_finite"] == 0 and good["patch"]["min"] < good["patch"]["max"]
    errors = done.stderr.split("error: ")[1:]  # either may follow the progress bar in its line
    assert len([line for line in errors if line.startswith("rank 1 stops as rank 0 does")]) == 1, done.stderr
    (told,) = [line.splitlines()[0] for line in errors if line.startswith("at least 12 steps in a row")]
    assert bad["file"] in told and good["file"] not in told and not any(s["file"] in told for s in dumps[0]["samples"])
    assert (tmp_path / "checkpoint.pth").is_file() and not traceback_through_our_code(done.stderr)
    assert all(
        value.isfinite().all() for value in parts(checkpoint(tmp_path), "student", "teacher", "dino_loss").values()
    )


def test_a_whole_epoch_of_skipped_steps_is_told(volumes, tmp_path):
    done = command(
        "--data_dir",
        volumes,
        "--output_dir",
        tmp_path,
        "--epochs",
        2,
        "--batch_size_per_gpu",
        4,
        script=SMALL,
        environment={"PLANT": "nan 0 3 4"},
    )
    assert done.returncode == 0 and "2 steps were skipped" in done.stdout, done.stderr
    first, last = read_log(tmp_path / "log.txt")
    assert first["skipped_steps"] == 0 and last["skipped_steps"] == 2 and last["loss"] is None and first["loss"] > 0


def test_steps_in_a_row_are_counted():
    skipped = NonFiniteSteps(3, torch.device("cpu"))
    seen = []
    for step, finite in enumerate([0, 0, 1, 0, 1, 0, 0, 0, 0], 1):
        skipped.count(torch.tensor(bool(finite)))
        seen.append(skipped.too_many(step))
    assert seen == [False] * 8 + [True]  # looked at in steps 3, 6 and 9


def test_statistics_leave_out_what_is_not_finite():
    values = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    assert tensor_statistics(values) == {"min": 1, "max": 3, "mean": 2, "not_finite": 0.5}
    assert tensor_statistics(values[1:2]) == {"min": None, "max": None, "mean": None, "not_finite": 1}
    assert tensor_statistics(torch.tensor([-5, 5], dtype=torch.int16)) == {
        "min": -5,
        "max": 5,
        "mean": 0,
        "not_finite": 0,
    }


def test_fine_tuning_skips_a_step_too():
    torch.manual_seed(0)
    model, volumes, weights = torch.nn.Linear(4, 1), torch.randn(3, 4), torch.ones(3)
    optimizer, scaler = utils.make_optimizer("adamw", model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    weighted_step(model, optimizer, scaler, model(volumes).square().flatten(), weights, utils.Processes())
    before = {name: value.clone() for name, value in flat([model.state_dict(), optimizer.state_dict()]).items()}
    volumes[1] = torch.nan
    finite, sums = weighted_step(
        model, optimizer, scaler, model(volumes).square().flatten(), weights, utils.Processes()
    )
    assert not finite and sums.tolist() == [0, 0, 1]
    assert same(before, flat([model.state_dict(), optimizer.state_dict()]))[0]


@pytest.mark.parametrize("enabled", [False, True])
def test_the_host_waits_for_no_tensor_in_a_step(tmp_path, enabled):
    """No tensor's value is fetched, which on a GPU would hold the host up until all work is done: not by fp16's scaler,
    nor by the monitor that takes note of the step."""
    run = make_run(torch.amp.GradScaler("cpu", enabled=enabled), use_bn_in_head=True)
    model, views = torch.nn.Linear(4, 1), [torch.rand(8, 1, 24, 24, 12)]
    optimizer = utils.make_optimizer("adamw", model.parameters())
    monitor = Monitor(
        tmp_path, utils.Processes(), 16, log_every=9, total_steps=9, done_steps=0, global_batch=4, volumes=1, max_bad=0
    )
    main_dino.train_step(run, [views], VALUES, False)
    losses, weights = model(torch.rand(3, 4)).square().flatten(), torch.ones(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step = main_dino.train_step(run, [views], VALUES, True)
        run.nonfinite.count(step.finite)
        for _ in range(2):
            monitor.step(step.finite, step.metrics, step.teacher, waited=0.0)
        weighted_step(model, optimizer, run.scaler, losses, weights, utils.Processes())
    monitor.close()
    # The CPU's fused kernel looks at its own step counter, where CUDA's hands the pointer on
    seen = {event.key for event in profile.events() if getattr(event.cpu_parent, "key", "") != "aten::_fused_adamw_"}
    assert "aten::_fused_adamw_" in seen and "aten::lerp_" in seen
    assert not seen & {"aten::item", "aten::nonzero", "aten::is_nonzero"}


# -------------------------------------------------------------------------------------------------- micro-batches


def test_micro_batches_hold_the_samples_of_the_whole_batch():
    whole = list(BatchStream(13, 5, 12, 0, 1, 7, 0, 12, 3))
    for batch, ranks, accumulate in ((3, 1, 4), (3, 2, 2), (1, 3, 4)):
        streams = [list(BatchStream(13, 5, batch, rank, ranks, 7, 0, 12, 3, accumulate)) for rank in range(ranks)]
        assert all(len(part) == batch for stream in streams for part in stream)
        for i, samples in enumerate(whole):
            mine = [key for stream in streams for part in stream[i * accumulate : (i + 1) * accumulate] for key in part]
            assert mine == samples
        assert all(len(stream) == len(whole) * accumulate for stream in streams)


def test_accumulating_equals_one_large_batch(volumes, tmp_path, capsys):
    """Losses to 1e-5 in fp32; weights, teacher and centre to 1e-9 in float64, on one rank and on two."""
    flags = [
        "--data_dir",
        volumes,
        "--epochs",
        4,
        "--drop_path_rate",
        0,
        "--lr",
        0.032,
        "--log_every",
        1,
        "--clip_grad",
        0.3,
    ]
    layouts = {"whole": (0, 8, 1), "four": (0, 2, 4), "ranks": (2, 2, 2)}  # processes, batch, accumulated
    for name, (processes, batch, accumulate) in layouts.items():
        flags_of = [*flags, "--batch_size_per_gpu", batch, "--accumulate_steps", accumulate]
        done = command(
            *flags_of, "--output_dir", tmp_path / name, processes=processes, script=SMALL, environment={"FLOAT64": "1"}
        )
        assert done.returncode == 0, done.stderr
        if not processes:
            assert run_main(capsys, *flags_of, "--output_dir", tmp_path / f"{name}32")[0] == 0
    whole = checkpoint(tmp_path / "whole")
    assert whole["step"] == 4 and whole["samples"] == 32 and not same(whole["student"], whole["teacher"], 1e-4)[0]
    for name in ("four", "ranks"):
        other = checkpoint(tmp_path / name)
        assert [other[key] for key in ("epoch", "position", "step", "samples")] == [4, 0, 4, 32]
        for part in ("student", "teacher", "dino_loss"):
            close, worst = same(whole[part], other[part], 1e-9)
            assert close, f"{name} {part}: {worst}"
    for name, other in (("whole", "four"), ("whole", "ranks"), ("whole32", "four32")):
        for one, two in zip(*(read_log(tmp_path / n / "log.txt") for n in (name, other))):
            for metric in ("loss", "kl", "teacher_entropy", "mutual_information", "air_views"):
                assert one[metric] == pytest.approx(two[metric], abs=1e-5), (other, metric)
            assert one["lr"] == two["lr"] and one["momentum_teacher"] == two["momentum_teacher"]
            assert one["winning_prototypes"] == two["winning_prototypes"]


def test_a_run_goes_on_between_accumulated_steps(volumes, tmp_path, capsys):
    flags = [
        "--data_dir",
        volumes,
        "--batch_size_per_gpu",
        2,
        "--accumulate_steps",
        2,
        "--epochs",
        3,
        "--drop_path_rate",
        0.3,
    ]
    assert run_main(capsys, *flags, "--output_dir", tmp_path / "straight")[0] == 0
    for stop in (["--max_steps", 3], []):
        assert run_main(capsys, *flags, "--output_dir", tmp_path / "broken", *stop)[0] == 0
    one, two = (
        parts(checkpoint(tmp_path / name), "student", "teacher", "dino_loss", "optimizer", "samples")
        for name in ("straight", "broken")
    )
    assert same(one, two)[0]


def test_too_large_an_accumulated_batch(volumes, tmp_path, capsys):
    code, _, errors = run_main(
        capsys, "--data_dir", volumes, "--output_dir", tmp_path, "--batch_size_per_gpu", 3, "--accumulate_steps", 3
    )
    assert code == 1 and len(errors) == 1 and "--accumulate_steps" in errors[0] and "one batch of 9" in errors[0]


# ----------------------------------------------------------------------------------------- activation checkpointing


def test_checkpointing_changes_no_bit():
    """Output and gradients with stochastic depth on, for each way through the model; each block runs twice."""
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        model = VisionTransformer(
            (24, 24, 12), embed_dim=48, depth=3, num_heads=3, drop_path_rate=0.6, grad_checkpointing=on
        )
        calls = []
        model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
        volumes, outputs = torch.rand(6, 1, 24, 24, 12), []
        torch.manual_seed(1)
        for output in (model(volumes), model.forward_tokens(volumes), *model.get_intermediate_layers(volumes, 2)):
            outputs.append(output.detach())
            output.square().sum().backward(retain_graph=True)
        assert len(calls) == (7 if on else 3)  # both maps of the last way ask for it again
        outputs.append(torch.rand(3))  # the generator is where it was
        results.append({**dict(enumerate(outputs)), **{name: p.grad for name, p in model.named_parameters()}})
        names = list(model.state_dict())
        with torch.no_grad():
            model(volumes)
    assert same(*results)[0] and all(value.any() for value in results[0].values())
    assert names == list(VisionTransformer((24, 24, 12), embed_dim=48, depth=3, num_heads=3).state_dict())


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_with_checkpointing_is_the_same_run(volumes, tmp_path, capsys, processes):
    states = []
    for on in ("false", "true"):
        flags = [
            "--data_dir",
            volumes,
            "--output_dir",
            tmp_path / on,
            "--batch_size_per_gpu",
            2,
            "--accumulate_steps",
            2,
            "--epochs",
            2,
            "--drop_path_rate",
            0.5,
            "--lr",
            0.05,
            "--grad_checkpointing",
            on,
        ]
        if processes:
            done = command(*flags, processes=processes, script=SMALL)
            assert done.returncode == 0, done.stderr
        else:
            assert run_main(capsys, *flags)[0] == 0
        states.append(parts(checkpoint(tmp_path / on), "student", "teacher", "dino_loss", "optimizer"))
    assert same(*states)[0]


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags",
    [
        ["--accumulate_steps", "0"],
        ["--accumulate_steps", "1.5"],
        ["--max_skipped_steps", "0"],
        ["--max_skipped_steps", "-1"],
        ["--grad_checkpointing", "perhaps"],
    ],
    ids=" ".join,
)
def test_flags_wrong_by_themselves(tmp_path, capsys, flags):
    code, _, errors = run_main(capsys, "--data_dir", tmp_path, "--output_dir", tmp_path / "out", *flags)
    assert code == 2 and len(errors) == 1 and flags[0] in errors[0] and not (tmp_path / "out").exists()
