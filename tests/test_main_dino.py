"""The pre-training script: its arithmetic against formulas, and the script itself from its command line."""

import functools
import json
import math
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

import main_dino
import utils
import vision_transformer
from dino3d import pretraining_flags
from dino3d.data.hdf5 import write_volume
from dino3d.files import read_log, truncate_log
from dino3d.training.collapse import TeacherOutputs
from dino3d.training.monitor import Monitor
from resnet3d import BasicBlock, ResNet
from vision_transformer import DINOHead, VisionTransformer

TINY = [
    "--arch",
    "vit_tiny",
    "--input_size",
    "24",
    "24",
    "12",
    "--local_crops_scale",
    "0.5",
    "--local_crops_number",
    "2",
    "--out_dim",
    "64",
    "--num_workers",
    "0",
    "--log_every",
    "2",
    "--warmup_epochs",
    "1",
    "--saveckp_freq",
    "0",
    "--precision",
    "fp32",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(autouse=True)
def smaller_model(monkeypatch):
    """What is called in this process trains a model of 0.1 and not 11 million weights; `command` takes the real one."""
    small = functools.partial(VisionTransformer, embed_dim=48, depth=2, num_heads=3)
    monkeypatch.setitem(vision_transformer.ARCHITECTURES, "vit_tiny", small)
    smaller = functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), width=8)
    monkeypatch.setitem(vision_transformer.ARCHITECTURES, "resnet18", smaller)
    monkeypatch.setattr(main_dino, "DINOHead", lambda *args, **more: DINOHead(*args, **(more | {"hidden_dim": 64})))


def run_main(capsys, *flags):
    """(exit code, standard output, lines of standard error) of the script, called in this process."""
    code = 0
    try:
        utils.run_script(lambda: main_dino.main([*TINY, *map(str, flags)]))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    errors = [
        line
        for line in captured.err.replace("\r", "\n").splitlines()
        if line.strip() and "step/s" not in line and "s/step" not in line
    ]  # without the progress bar
    return code, captured.out, errors


def command(*flags, processes=0, script=ROOT / "main_dino.py", environment=None):
    """Run a script as users do, under torchrun with some processes or, with 0, by itself."""
    start = [*TORCHRUN, f"--nproc_per_node={processes}", str(script)] if processes else [sys.executable, str(script)]
    return subprocess.run(
        [*start, *TINY, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
    )


def traceback_through_our_code(text):
    """The launcher prints a traceback of its own; one of a rank's would go through one of our files."""
    return any(f'File "{path}"' in text for path in [*ROOT.glob("*.py"), *ROOT.glob("dino3d/**/*.py")])


def checkpoint(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


def same(first, second, tolerance=0.0):
    """Largest difference between two state dicts is at most `tolerance`."""
    assert first.keys() == second.keys()
    worst = max((first[name] - second[name]).abs().max().item() for name in first)
    return worst <= tolerance, worst


# -------------------------------------------------------------------------------------------------------- arithmetic


def test_loss_is_the_papers_formula():
    """Against equations 1 to 4 of Caron et al. 2021 written out in float64."""
    torch.manual_seed(0)
    batch, views, out_dim, temp = 3, 5, 16, 0.05
    student, teacher = torch.randn(views * batch, out_dim).double(), torch.randn(2 * batch, out_dim).double()
    loss = main_dino.DINOLoss(out_dim, 0.9).double()
    loss.center.normal_()
    losses, probabilities = loss(student, teacher, temp)
    q = ((teacher - loss.center) / temp).softmax(-1).view(2, batch, out_dim)
    p = (student / 0.1).softmax(-1).view(views, batch, out_dim)
    terms = [-(q[t] * p[v].log()).sum(-1).mean() for t in range(2) for v in range(views) if v != t]
    assert len(terms) == 2 * (views - 1)
    entropy = -(q * q.log()).sum(-1).mean()
    for name, expected in {
        "loss": sum(terms) / len(terms),
        "kl": sum(terms) / len(terms) - entropy,
        "teacher_entropy": entropy,
    }.items():
        torch.testing.assert_close(losses[name], expected)
    torch.testing.assert_close(probabilities, q.reshape(-1, out_dim))


def test_loss_without_local_views():
    loss = main_dino.DINOLoss(8, 0.9)
    teacher, student = torch.randn(4, 8), torch.randn(4, 8)
    losses, _ = loss(student, teacher, 0.04)
    q, log_p = (teacher / 0.04).softmax(-1), (student / 0.1).log_softmax(-1)
    expected = -((q[:2] * log_p[2:]).sum(-1).mean() + (q[2:] * log_p[:2]).sum(-1).mean()) / 2
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("views", [2, 3, 10])
def test_the_gradient_by_hand_is_the_reference_formulas(views):
    torch.manual_seed(0)
    first, second = (3 * torch.randn(2, 4, 16, dtype=torch.float64)).softmax(-1)
    student = torch.randn(views, 4, 16, dtype=torch.float64, requires_grad=True)
    ours, reference = (
        loss(student, first, second) for loss in (main_dino.CrossEntropy.apply, main_dino.reference_cross_entropy)
    )
    torch.testing.assert_close(ours, reference)
    weights = torch.rand(4, dtype=torch.float64)  # each sample's gradient by itself
    torch.testing.assert_close(*(torch.autograd.grad((weights * loss).sum(), student)[0] for loss in (ours, reference)))


def test_the_monitor_shows_whatever_it_is_given(tmp_path):
    """Means over the steps that were taken, in log.txt and TensorBoard, of a name that it has never heard of too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = Monitor(
        tmp_path, utils.Processes(), 16, log_every=2, total_steps=3, done_steps=0, global_batch=1, volumes=1, max_bad=0
    )
    monitor.start_epoch(1)
    for step, (finite, value) in enumerate([(True, 2.0), (False, torch.nan), (True, 5.0)], 1):
        metrics = {name: torch.tensor(value) for name in ("loss", "kl", "teacher_entropy", "spread")}
        metrics["grad_norm"] = torch.tensor(1.0).double()
        outputs = TeacherOutputs(torch.tensor([3, 4]), torch.ones(16) / 16, torch.rand(2, 8))
        monitor.step(torch.tensor(finite), metrics, outputs, 0.0)
        if step >= 2:
            monitor.flush(step, {}, torch.tensor(0.0))
    monitor.log_epoch(1, 3, {})
    monitor.close()
    (record,) = read_log(tmp_path / "log.txt")
    assert list(record)[:7] == ["epoch", "step", "loss", "kl", "teacher_entropy", "spread", "grad_norm"]
    assert record["spread"] == record["kl"] == 3.5 and record["kl_first_steps"] == 2 and record["skipped_steps"] == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("dino/spread")] == [2, 5]


def test_centre_is_a_running_mean():
    loss = main_dino.DINOLoss(4, 0.9)
    logits = torch.randn(6, 4)
    loss.update_center(loss.batch_center(logits), torch.tensor(True))
    torch.testing.assert_close(loss.center, 0.1 * logits.mean(0, keepdim=True))
    loss.update_center(loss.batch_center(logits), torch.tensor(True))
    torch.testing.assert_close(loss.center, 0.19 * logits.mean(0, keepdim=True))


def test_teacher_is_a_moving_average():
    student, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.9 * teacher.weight.detach() + 0.1 * student.weight.detach()
    main_dino.update_teacher(student, teacher, 0.9, torch.tensor(True))
    torch.testing.assert_close(teacher.weight.detach(), expected)


def test_gradients_are_clipped_tensor_by_tensor():
    model = torch.nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 10.0), torch.full((2,), 0.1)
    norm = main_dino.clip_gradients(model, 3.0)
    torch.testing.assert_close(norm, torch.tensor(math.sqrt(600 + 0.02)))
    torch.testing.assert_close(torch.linalg.vector_norm(model.weight.grad), torch.tensor(3.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.bias.grad, torch.full((2,), 0.1))
    main_dino.clip_gradients(model, 0)
    torch.testing.assert_close(torch.linalg.vector_norm(model.weight.grad), torch.tensor(3.0), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------- whole runs


def test_ranks_and_workers_give_the_same_run(volumes, tmp_path):
    """Two gloo ranks with b and one process with 2 b: same samples, losses to 1e-5 (fp32), weights to 1e-9
    (float64)."""
    flags = [
        "--data_dir",
        volumes,
        "--epochs",
        4,
        "--drop_path_rate",
        0,
        "--lr",
        0.064,
        "--use_elastic",
        "--use_gaussian",
        "--use_histogram",
        "--log_every",
        1,
        "--freeze_last_layer",
        1,
    ]  # 0.064 x 4 / 256 = 0.001
    for precision, script in (("fp32", ROOT / "main_dino.py"), ("float64", ROOT / "tests" / "run_float64.py")):
        for processes, batch, workers in ((2, 2, 1), (0, 4, 0)):
            done = command(
                *flags,
                "--batch_size_per_gpu",
                batch,
                "--output_dir",
                tmp_path / f"{precision}{processes}",
                "--num_workers",
                workers,
                processes=processes,
                script=script,
            )
            assert done.returncode == 0, done.stderr
        logs = [read_log(tmp_path / f"{precision}{n}" / "log.txt") for n in (0, 2)]
        assert len(logs[0]) == 4 and logs[0][-1]["step"] == 8
        for one, two in zip(*logs):
            for figure in ("loss", "mutual_information", "effective_rank"):
                assert one[figure] == pytest.approx(two[figure], abs=1e-5), figure
    one, two = (checkpoint(tmp_path / f"float64{n}") for n in (0, 2))
    assert one["student"]["backbone.cls_token"].dtype == torch.float64
    for part in ("student", "teacher", "dino_loss"):
        close, worst = same(one[part], two[part], 1e-9)
        assert close, f"{part}: {worst}"
    assert not same(one["student"], one["teacher"], 1e-4)[0]  # eight steps did move the weights


def test_loader_workers_do_not_change_the_run(volumes, tmp_path, capsys):
    states = []
    for workers in (0, 1, 2):
        out = tmp_path / str(workers)
        code, _, errors = run_main(
            capsys,
            "--data_dir",
            volumes,
            "--output_dir",
            out,
            "--epochs",
            2,
            "--batch_size_per_gpu",
            4,
            "--num_workers",
            workers,
        )
        assert code == 0 and not errors, errors
        states.append(checkpoint(out))
    for other in states[1:]:
        assert same(states[0]["student"], other["student"])[0] and same(states[0]["teacher"], other["teacher"])[0]


def test_a_run_goes_on_where_it_stopped(volumes, tmp_path, capsys):
    """Stopped inside an epoch, and after one: the weights of the undisturbed run to the last bit, stochastic depth
    on."""
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 2, "--drop_path_rate", 0.3, "--epochs", 3]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run_main(capsys, *flags, "--output_dir", straight)[0] == 0
    for stop in (3, 4, 9):
        code, out, _ = run_main(capsys, *flags, "--output_dir", broken, "--max_steps", stop)
        assert code == 0 and checkpoint(broken)["step"] == stop
    code, out, _ = run_main(capsys, *flags, "--output_dir", broken)
    assert code == 0 and "resuming after step 9, epoch 2" in out
    one, two = checkpoint(straight), checkpoint(broken)
    assert (one["epoch"], one["step"], one["samples"]) == (two["epoch"], two["step"], two["samples"]) == (3, 12, 24)
    for part in ("student", "teacher", "dino_loss"):
        assert same(one[part], two[part])[0]
    before = (broken / "checkpoint.pth").stat().st_mtime_ns
    code, out, _ = run_main(capsys, *flags, "--output_dir", broken)
    assert code == 0 and "nothing to do" in out and (broken / "checkpoint.pth").stat().st_mtime_ns == before
    code, out, _ = run_main(capsys, *flags, "--output_dir", broken, "--epochs", 4)
    assert code == 0 and checkpoint(broken)["epoch"] == 4


@pytest.mark.parametrize(
    "before, after, batch, done",
    [
        (2, ["--patches_per_volume", 1], 4, 2),  # 8 samples of an epoch that has 8 now
        (1, ["--patches_per_volume", 2], 4, 1 + 4 / 16),
        (2, ["--patches_per_volume", 2, "--batch_size_per_gpu", 6], 6, 1 + 8 / 12),  # 4 of 16 fill no batch
    ],
)
def test_schedules_go_by_the_share_of_the_run_that_is_done(volumes, tmp_path, capsys, before, after, batch, done):
    """Resumed in the second of four epochs, which are shorter or longer from then on, or of fewer steps: the formulas
    in terms of that share, up to its end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--data_dir", volumes, "--output_dir", tmp_path, "--epochs", 4, "--batch_size_per_gpu", 4]
    flags, stop = [*flags, "--warmup_epochs", 0, "--log_every", 1], 3 * before
    assert run_main(capsys, *flags, "--patches_per_volume", before, "--max_steps", stop)[0] == 0
    teacher = checkpoint(tmp_path)["teacher"]
    assert run_main(capsys, *flags, *after)[0] == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    ends = {"lr": (0.0005 * batch / 256, 1e-6), "weight_decay": (0.04, 0.4), "momentum_teacher": (0.996, 1)}
    for name, (start, end) in ends.items():
        values = {event.step: event.value for event in events.Scalars(f"schedule/{name}")}
        expected = end + (start - end) * (1 + math.cos(math.pi * done / 4)) / 2
        assert values[stop + 1] == pytest.approx(expected, rel=1e-5)
        assert end not in values.values() and read_log(tmp_path / "log.txt")[-1][name] == end
    assert not same(teacher, checkpoint(tmp_path)["teacher"])[0]


@pytest.mark.parametrize(
    "flags, steps, copies",
    [
        ([], [8], []),
        (["--saveckp_freq", 3], [6, 8], ["checkpoint0003.pth"]),
        (["--save_every_minutes", 0, "--max_steps", 3], [2, 3], []),
    ],
)
def test_epochs_of_seconds_are_not_all_saved(volumes, tmp_path, capsys, monkeypatch, flags, steps, copies):
    saved, save = [], main_dino.checkpoint.Checkpoints.save

    def note(checkpoints, state, copy):
        saved.append(state["step"])
        save(checkpoints, state, copy)

    monkeypatch.setattr(main_dino.checkpoint.Checkpoints, "save", note)
    every = ["--data_dir", volumes, "--output_dir", tmp_path, "--batch_size_per_gpu", 4, "--epochs", 4]
    code, _, errors = run_main(capsys, *every, *flags)
    assert code == 0 and saved == steps, errors
    assert [path.name for path in sorted(tmp_path.glob("checkpoint0*.pth"))] == copies


@pytest.mark.parametrize("flags", [[], ["--ibot", 1], ["--arch", "resnet18", "--use_bn_in_head"]])
def test_the_teacher_is_the_student_and_draws_nothing(flags):
    """Equal in every tensor, of the student's kinds, and the student is what it was when the teacher was drawn too."""
    parser = main_dino.get_args_parser()
    args = parser.parse_args([*TINY, "--data_dir", "x", "--output_dir", "y", *map(str, flags)])
    main_dino.check_pretraining_flags(parser, args)
    student, teacher = main_dino.build_models(args, [])
    drawn = torch.get_rng_state()
    torch.manual_seed(args.seed)
    head = {"hidden_dim": args.head_hidden_dim, "bottleneck_dim": args.head_bottleneck_dim}
    sizes = (args.arch, args.input_size, args.patch_size, args.out_dim, args.use_bn_in_head)
    plain = main_dino.build_model(*sizes, args.drop_path_rate, args.norm_last_layer, ibot=args.ibot > 0, **head)
    assert torch.equal(torch.get_rng_state(), drawn)
    expected = main_dino.build_model(*sizes, None, True, ibot=args.ibot > 0, **head)
    expected.load_state_dict(plain.state_dict())
    for found, wanted in ((student, plain), (teacher, expected)):
        for kind in ("named_parameters", "named_buffers"):
            found_tensors, tensors = dict(getattr(found, kind)()), dict(getattr(wanted, kind)())
            assert found_tensors.keys() == tensors.keys()
            for name, tensor in tensors.items():
                one = found_tensors[name]
                assert one.device.type == "cpu" and one.dtype == tensor.dtype and torch.equal(one, tensor), name
                assert one.requires_grad == tensor.requires_grad and one.stride() == tensor.stride(), name
    own = {tensor.data_ptr() for tensor in student.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in teacher.state_dict().values())
    assert all(tensor.data_ptr() for tensor in teacher.state_dict().values())


def test_a_run_draws_nothing_from_the_state_that_building_left(volumes, tmp_path, capsys, monkeypatch):
    """So it may differ between versions that build more or less, and between ranks."""
    build, logs = main_dino.build_models, []

    def and_draw(*given):
        models = build(*given)
        torch.rand(1000)
        return models

    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 4, "--epochs", 1, "--drop_path_rate", 0.3, "--ibot", 1]
    for kind in (build, and_draw):
        monkeypatch.setattr(main_dino, "build_models", kind)
        assert run_main(capsys, *flags, "--output_dir", tmp_path / kind.__name__)[0] == 0
        (record,) = read_log(tmp_path / kind.__name__ / "log.txt")
        measured = ("seconds", "volumes_per_second", "waiting_for_data", "peak_memory_gib")
        logs.append({name: value for name, value in record.items() if name not in measured})
    assert logs[0] == logs[1]


def test_what_a_run_leaves(volumes, tmp_path, capsys):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, out, _ = run_main(
        capsys,
        "--data_dir",
        volumes,
        "--output_dir",
        tmp_path,
        "--epochs",
        4,
        "--batch_size_per_gpu",
        4,
        "--saveckp_freq",
        2,
    )
    assert code == 0
    state = checkpoint(tmp_path)
    assert {"student", "teacher", "optimizer", "dino_loss", "epoch", "step", "config"} <= state.keys()
    assert (state["epoch"], state["step"]) == (4, 8) and state["config"]["arch"] == "vit_tiny"
    assert state["config"]["input_size"] == [24, 24, 12] and state["config"]["patch_size"] == [12, 12, 6]
    assert (
        {name.split(".")[0] for name in state["student"]}
        == {name.split(".")[0] for name in state["teacher"]}
        == {"backbone", "head"}
    )
    assert (tmp_path / "checkpoint0002.pth").is_file() and checkpoint(tmp_path, "checkpoint0002.pth")["epoch"] == 2
    records = read_log(tmp_path / "log.txt")
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["loss"] == pytest.approx(record["kl"] + record["teacher_entropy"], abs=1e-4)
        assert 0 < record["teacher_entropy_share"] < 1 and 1 <= record["winning_prototypes"] <= 16
        assert 1 <= record["effective_rank"] <= 8 and 0 <= record["mutual_information"] < math.log(16)
        assert record["air_views"] <= 1 and record["bad_files"] == 0 and 0 <= record["waiting_for_data"] <= 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["world_size"] == 1 and config["versions"]["torch"] and config["git_revision"]
    assert config["attention"].keys() == {"9", "2"}
    for tokens, way in config["attention"].items():
        assert f"attention of {tokens} tokens: {way}" in out.splitlines()
    for name in ("views.png", "augmentations.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 10
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {
        "dino/teacher_entropy",
        "dino/kl",
        "dino/winning_prototypes",
        "dino/effective_rank",
        "dino/mutual_information",
        "dino/center_norm",
        "dino/grad_norm",
        "dino/air_views",
        "schedule/lr",
        "speed/waiting_for_data",
    } <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"views", "augmentations"}
    rates = [event.value for event in events.Scalars("schedule/lr")]  # entries at steps 2, 4, 6, 8: values of step - 1
    peak = 0.0005 * 4 / 256
    assert rates[0] == pytest.approx(peak / 2) and rates[1] == pytest.approx(
        utils.cosine_schedule(12, peak, 1e-6, 32, 8)
    )
    for text in ("KL divergence", "prototypes win", "checkpoint.pth", "log.txt", "tensorboard --logdir"):
        assert text in out


def test_last_layer_is_frozen_for_the_first_epochs(volumes, tmp_path, capsys):
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 8, "--output_dir", tmp_path, "--freeze_last_layer", 2]
    name = "head.last_layer.parametrizations.weight.original1"
    seen = []
    for epochs in (1, 2, 3):
        assert run_main(capsys, *flags, "--epochs", epochs)[0] == 0
        seen.append(checkpoint(tmp_path)["student"][name])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_no_weight_decay_on_biases_norms_and_positions():
    model = main_dino.build_model("vit_tiny", (24, 24, 12), (12, 12, 6), 64, False, 0.0, False)
    decayed, plain = utils.parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for p in plain["params"]:
        assert p.ndim == 1 or names[id(p)].endswith(("pos_embed", "cls_token"))
    assert plain["weight_decay"] == 0.0 and all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert not {"backbone.pos_embed", "backbone.cls_token"} & {names[id(p)] for p in decayed["params"]}


@pytest.mark.parametrize("off", ["rotation", "scale", "flip"])
def test_every_flag_can_be_switched_off(volumes, tmp_path, capsys, off):
    code, out, _ = run_main(
        capsys,
        "--data_dir",
        volumes,
        "--output_dir",
        tmp_path,
        "--batch_size_per_gpu",
        8,
        "--max_steps",
        1,
        f"--use_{off}",
        "off",
    )
    assert code == 0 and off not in out.splitlines()[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_rotation", "0", "--use_scale", "false", "--use_flip", "no", "--local_crops_number", "0"],
        ["--spacing", "1.5", "1.5", "4"],
        ["--optimizer", "lars"],
        ["--optimizer", "sgd"],
        ["--precision", "bf16"],
        ["--use_bn_in_head", "true", "--norm_last_layer", "false", "--clip_grad", "0"],
        ["--patches_per_volume", "5"],
        ["--warmup_epochs", "500", "--warmup_teacher_temp_epochs", "7"],
    ],
    ids=lambda flags: flags[0],
)
def test_other_settings_run(volumes, tmp_path, capsys, flags):
    code, _, errors = run_main(
        capsys, "--data_dir", volumes, "--output_dir", tmp_path, "--batch_size_per_gpu", 4, "--max_steps", 2, *flags
    )
    assert code == 0 and not errors, errors
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint(tmp_path)["student"].values())


def test_nifti_works_with_a_word_on_its_cost(volumes, tmp_path, capsys):
    """The same volumes as .nii.gz: the same run, to the last bit, and one line about converting them."""
    import nibabel

    from dino3d.data.volume import Volume
    from dino3d.data.volume_cache import is_quick

    data = tmp_path / "nifti"
    for path in sorted(volumes.rglob("*.hdf5")):
        target = data / path.relative_to(volumes).with_suffix(".nii.gz")
        target.parent.mkdir(parents=True)
        with Volume(path) as volume:
            nibabel.save(nibabel.Nifti1Image(volume.read(), volume.affine), target)
    flags = ["--batch_size_per_gpu", 4, "--epochs", 1]
    code, out, errors = run_main(capsys, "--data_dir", data, "--output_dir", tmp_path / "a", *flags)
    assert code == 0 and not errors and out.count("8 of the volumes are not converted") == 1
    code, out, _ = run_main(capsys, "--data_dir", volumes, "--output_dir", tmp_path / "b", *flags)
    assert code == 0 and "not converted" not in out
    small = tmp_path / "small.nii"
    nibabel.save(nibabel.load(target), small)
    assert is_quick(str(small)) and not is_quick(str(target))
    table = tmp_path / "list.csv"  # a file that stands there twice is one, and a small one that is not zipped is quick
    table.write_text("path\n" + f"{target}\n{target}\n{small}\n" * 4)
    flags = ["--data_list", table, "--batch_size_per_gpu", 4, "--max_steps", 1]
    code, out, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "c")
    assert code == 0 and not errors and "\n1 of the volumes are not converted" in out
    assert same(checkpoint(tmp_path / "a")["student"], checkpoint(tmp_path / "b")["student"])[0]


def test_a_run_goes_on_with_another_batch_and_number_of_processes(volumes, tmp_path):
    """From one process inside an epoch to two with twice the batch: what is left of the epoch, then the next ones."""
    flags = ["--data_dir", volumes, "--output_dir", tmp_path, "--epochs", 2]
    assert command(*flags, "--batch_size_per_gpu", 2, "--max_steps", 1).returncode == 0
    done = command(*flags, "--batch_size_per_gpu", 2, processes=2)
    assert done.returncode == 0, done.stderr
    state = checkpoint(tmp_path)  # 2 samples, then 4 of the 6 left (2 fill no batch), then 8
    assert (state["epoch"], state["step"], state["samples"]) == (2, 4, 14)


def test_older_flags_are_accepted(volumes, tmp_path, capsys):
    code, out, _ = run_main(
        capsys,
        "--data_path",
        volumes,
        "--output_dir",
        tmp_path,
        "--batch_size_per_gpu",
        8,
        "--max_steps",
        1,
        "--use_fp16",
        "true",
        "--dist_url",
        "env://",
        "--local_rank",
        "0",
    )
    assert code == 0
    assert all(sum(flag in line for line in out.splitlines()) == 1 for flag in ("dist_url", "local_rank", "use_fp16"))


def test_one_unreadable_file_is_replaced(volumes, tmp_path, capsys):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(volumes, data)
    bad = data / "patient3" / "t0" / "scan.hdf5"
    bad.write_bytes(bad.read_bytes()[:3000])
    flags = ["--data_dir", data, "--output_dir", tmp_path / "out", "--batch_size_per_gpu", 4, "--epochs", 2]
    code, _, errors = run_main(capsys, *flags)
    assert code == 0 and [error.split(":")[0] for error in errors] == ["epoch 1", "epoch 2"]
    assert all(str(bad) in error and "whose place other samples took" in error for error in errors)
    assert read_log(tmp_path / "out" / "log.txt")[-1]["bad_files"] == 1
    code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "strict", "--strict_data")
    assert code == 1 and len(errors) == 1 and str(bad) in errors[0]


# ------------------------------------------------------------------------------------------------------- bad input


def bad_volume(folder, kind):
    """Four files of one kind of bad input."""
    import SimpleITK as sitk

    rng = np.random.default_rng(0)
    good = rng.integers(-1000, 500, (40, 40, 30)).astype(np.int16)
    for i in range(4):
        path = folder / f"patient{i}" / "t0" / "scan.hdf5"
        path.parent.mkdir(parents=True)
        if kind == "truncated":
            write_volume(path, good, np.eye(4))
            path.write_bytes(path.read_bytes()[:5000])
        elif kind == "no group":
            with h5py.File(path, "w") as file:
                file["something"] = good
        elif kind == "nan":
            volume = good.astype(np.float32)
            volume[20] = np.nan
            sitk.WriteImage(sitk.GetImageFromArray(volume), str(path))
        elif kind == "constant":
            write_volume(path, np.full_like(good, 7), np.eye(4))
        elif kind == "2D":
            sitk.WriteImage(sitk.GetImageFromArray(good[0]), str(path))
        elif kind == "4D":
            sitk.WriteImage(sitk.GetImageFromArray(np.stack([good, good], -1), isVector=True), str(path))


@pytest.mark.parametrize(
    "kind, says",
    [
        ("truncated", "can't be read"),
        ("no group", "no ITKImage/0"),
        ("nan", "NaN"),
        ("constant", "same value"),
        ("2D", "expected a 3D"),
        ("4D", "expected a 3D"),
    ],
)
def test_all_files_bad(tmp_path, capsys, kind, says):
    bad_volume(tmp_path / "data", kind)
    code, _, errors = run_main(
        capsys, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", "--batch_size_per_gpu", 2
    )
    assert code == 1 and len(errors) == 1 and says in errors[0] and "scan.hdf5" in errors[0], errors


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--input_size", "25", "24", "12"], "--input_size"),
        (["--local_crops_scale", "0.3"], "--local_crops_scale"),
        (["--clip_range", "1000", "-1000"], "--clip_range"),
        (["--batch_size_per_gpu", "0"], "--batch_size_per_gpu"),
        (["--arch", "vit_enormous"], "vit_enormous"),
        (["--arch", "resnet18", "--patch_size", "12", "12", "6"], "--patch_size 12 12 6: resnet18 has none"),
        (["--arch", "resnet18", "--drop_path_rate", "0.1"], "--drop_path_rate 0.1: resnet18 has none"),
        (["--arch", "resnet500"], "did you mean resnet50?"),
        (["--lr", "nan"], "--lr"),
        (["--epochs", "ten"], "--epochs"),
        (["--use_flip", "perhaps"], "--use_flip"),
        (["--drop_path_rate", "1"], "--drop_path_rate"),
        (["--spacing", "1", "0", "1"], "--spacing"),
        (["--no_such"], "--no_such"),
        (["--patch_size", "0", "1", "1"], "--patch_size"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_flags_wrong_by_themselves(tmp_path, capsys, flags, says):
    code, _, errors = run_main(capsys, "--data_dir", tmp_path, "--output_dir", tmp_path / "out", *flags)
    assert code == 2 and len(errors) == 1 and says in errors[0], errors
    assert not (tmp_path / "out").exists()


def test_data_dir_is_needed(capsys):
    code, _, errors = run_main(capsys)
    assert code == 2 and len(errors) == 1 and "--data_dir" in errors[0]


def test_folders_and_sizes(volumes, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    out = ["--output_dir", tmp_path / "out"]
    for flags, says in (
        (["--data_dir", tmp_path / "nowhere", *out], "nowhere: no such folder"),
        (["--data_dir", tmp_path / "empty", *out], "no volume found"),
        (["--data_dir", tmp_path / "file", *out], "is a file"),
        (["--data_dir", volumes, "--output_dir", tmp_path / "file"], "--output_dir"),
        (["--data_dir", volumes, "--output_dir", tmp_path / "file" / "below"], "--output_dir"),
        (["--data_dir", volumes, *out, "--batch_size_per_gpu", 9], "less than one batch"),
        (["--data_list", tmp_path / "no list", *out], "--data_list"),
        (
            ["--data_dir", volumes, *out, "--batch_size_per_gpu", 4, "--pretrained_weights", tmp_path / "no.pth"],
            "no.pth",
        ),
        (["--data_dir", volumes, *out, "--precision", "fp16"], "--precision fp16"),
    ):
        code, _, errors = run_main(capsys, *flags)
        assert code == 1 and len(errors) == 1 and says in errors[0], errors
    assert (tmp_path / "file").read_text() == "not a folder"


def test_checkpoints_that_do_not_fit(volumes, tmp_path, capsys):
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 8, "--max_steps", 1]
    assert run_main(capsys, *flags, "--output_dir", tmp_path / "out")[0] == 0
    path = tmp_path / "out" / "checkpoint.pth"
    whole = path.read_bytes()
    code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "out", "--arch", "vit_small")
    assert code == 1 and len(errors) == 1 and "--arch vit_tiny" in errors[0] and path.read_bytes() == whole
    code, _, errors = run_main(
        capsys, *flags, "--output_dir", tmp_path / "new", "--pretrained_weights", path, "--arch", "vit_small"
    )
    assert code == 1 and len(errors) == 1 and "cls_token (1, 1, 48) instead of (1, 1, 384)" in errors[0]
    path.write_bytes(whole[: len(whole) // 2])
    code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "out")
    assert code == 1 and len(errors) == 1 and "can't be read as a checkpoint" in errors[0]
    assert path.read_bytes() == whole[: len(whole) // 2]


def tampered(states):
    """(name of a copy of a checkpoint that does not fit, the copy, what the error says) for each kind of misfit."""
    weight, moments = "backbone.norm.weight", states["optimizer"]["state"]
    groups = states["optimizer"]["param_groups"]
    kept = {name: tensor for name, tensor in states["student"].items() if name != weight}
    says = "'student' does not fit this run: "
    for missing, told in (("dino_loss", " (main_dino.py)"), ("samples", " (main_dino.py)"), ("config", "")):
        rest = {name: states[name] for name in states if name != missing}
        yield f"no {missing}", rest, f"is a checkpoint of DINO pre-training{told}: it has no '{missing}'; "
    yield "no dict", [1, 2], "is no checkpoint of this script: it has no 'config', 'student', 'teacher', 'optimizer' "
    yield "config", states | {"config": "arch"}, "its 'config' is a str"
    yield "no tensor", states | {"student": kept}, f"{says}without {weight};"
    yield "shape", states | {"student": kept | {weight: torch.ones(3)}}, f"{says}with {weight} (3,) instead of (48,);"
    yield "value", states | {"student": kept | {weight: "ones"}}, f"{says}with {weight} str instead of (48,);"
    yield "beyond", states | {"student": states["student"] | {"x": torch.ones(3)}}, f"{says}with the unknown x;"
    yield "list", states | {"teacher": [1]}, "'teacher' does not fit this run: it is a list, expected a dict"
    yield "optimizer", states | {"optimizer": {}}, "'optimizer' does not fit this run: without param_groups, state;"
    yield "groups", states | {"optimizer": states["optimizer"] | {"param_groups": groups[:1]}}, "1 groups of "
    yield "garbage", states | {"optimizer": states["optimizer"] | {"param_groups": [3, 4]}}, "'optimizer' does not fit"
    moment = {"state": moments | {0: moments[0] | {"exp_avg": torch.ones(5)}}}
    yield "moment", states | {"optimizer": states["optimizer"] | moment}, "with exp_avg (5,) of parameter 0 instead of "
    yield "epoch", states | {"epoch": "two"}, "its 'epoch' is a str, expected int"


def test_what_a_checkpoint_lacks_or_has_wrong_is_named(volumes, tmp_path, capsys):
    """In one line, with the file and what to do; the file stays as it is."""
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 8, "--output_dir", tmp_path]
    assert run_main(capsys, *flags, "--max_steps", 1)[0] == 0
    for kind, states, says in tampered(checkpoint(tmp_path)):
        path = tmp_path / "checkpoint.pth"
        torch.save(states, path)
        before = path.read_bytes()
        code, _, errors = run_main(capsys, *flags)
        assert code == 1 and len(errors) == 1 and says in errors[0] and path.read_bytes() == before, (kind, errors)
        assert errors[0].startswith(f"error: {path}: ") and "choose another --output_dir" in errors[0]


@pytest.mark.parametrize("kind", ["no dino_loss", "moment"])
def test_all_ranks_end_where_a_checkpoint_does_not_fit(volumes, tmp_path, capsys, kind):
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 4, "--output_dir", tmp_path]
    assert run_main(capsys, *flags, "--max_steps", 1)[0] == 0
    states, says = next(rest for name, *rest in tampered(checkpoint(tmp_path)) if name == kind)
    torch.save(states, tmp_path / "checkpoint.pth")
    done = command(*flags, processes=2, script=ROOT / "tests" / "run_small.py")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and sum(says in line for line in lines) == 1 and len(lines) <= 2, done.stderr
    assert not traceback_through_our_code(done.stderr)


def test_a_further_part_of_the_state_is_saved_and_missed(volumes, tmp_path, capsys, monkeypatch):
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 4, "--output_dir", tmp_path]
    extra, parts = torch.nn.Linear(2, 2), main_dino.TrainState.parts
    assert run_main(capsys, *flags, "--max_steps", 1)[0] == 0
    monkeypatch.setattr(main_dino.TrainState, "parts", lambda run: parts(run) | {"extra": extra})
    code, _, errors = run_main(capsys, *flags)
    assert code == 1 and len(errors) == 1 and "it has no 'extra'" in errors[0]
    (tmp_path / "checkpoint.pth").unlink()
    assert run_main(capsys, *flags, "--max_steps", 1)[0] == 0
    assert same(checkpoint(tmp_path)["extra"], extra.state_dict())[0]


def test_going_on_from_existing_weights(volumes, tmp_path, capsys):
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 8, "--max_steps", 1, "--lr", 0]
    assert run_main(capsys, *flags, "--output_dir", tmp_path / "a", "--seed", 1)[0] == 0
    weights = ["--pretrained_weights", tmp_path / "a" / "checkpoint.pth"]
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "b", *weights)
    assert code == 0 and f"starting from {tmp_path}" in out and "was trained with" not in out
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "b", *weights, "--max_steps", 2)
    assert code == 0 and "starting from" not in out and "resuming after step 1" in out
    assert "--pretrained_weights has no effect: the run is resumed from its checkpoint\n" in out
    assert same(checkpoint(tmp_path / "a")["teacher"], checkpoint(tmp_path / "b")["student"])[0]
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "c", *weights, "--out_dim", 128)
    assert code == 0 and "head is new" in out


def test_prototypes_of_another_length_become_of_unit_length(volumes, tmp_path, capsys):
    """As --norm_last_layer says, by default; weights of a run without it keep theirs without it."""
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 8, "--max_steps", 1, "--freeze_last_layer", 0, "--ibot", 1]
    learnt = ["--norm_last_layer", "false", "--lr", 1, "--warmup_epochs", 0]
    assert run_main(capsys, *flags, *learnt, "--output_dir", tmp_path / "a")[0] == 0
    weights = ["--pretrained_weights", tmp_path / "a" / "checkpoint.pth", "--lr", 0, "--min_lr", 0]
    for folder, more, unit in (("b", [], True), ("c", ["--norm_last_layer", "false"], False)):
        code, out, _ = run_main(capsys, *flags, *weights, *more, "--output_dir", tmp_path / folder)
        assert code == 0 and out.count("by --norm_last_layer of 1 now") == 2 * unit  # of both heads
        before, after = checkpoint(tmp_path / "a")["teacher"], checkpoint(tmp_path / folder)["student"]
        for head in ("head", "patch_head"):
            weight = f"{head}.last_layer.parametrizations.weight.original"
            v, g = after[f"{weight}1"], after[f"{weight}0"]
            length = (v * g / v.norm(dim=1, keepdim=True)).norm(dim=1)
            assert (length - 1).abs().max() < 1e-6 if unit else (length - 1).abs().max() > 1e-5
            assert torch.equal(v, before[f"{weight}1"])


def test_weights_of_another_domain_are_told(volumes, tmp_path, capsys):
    """Another --clip_range or --spacing than theirs, with both values; a config of something else says nothing."""
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 8, "--max_steps", 1]
    assert run_main(capsys, *flags, "--output_dir", tmp_path / "a", "--clip_range", -1000, 400)[0] == 0
    path = tmp_path / "a" / "checkpoint.pth"
    weights = ["--pretrained_weights", path]
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "b", *weights, "--spacing", 2, 2, 2)
    assert code == 0 and f"{path} was trained with --clip_range -1000 400, this run has -1000 1000: " in out
    assert f"{path} was trained with --spacing none, this run has 2 2 2: " in out
    torch.save(checkpoint(tmp_path / "a") | {"config": {"clip_range": "wide"}}, path)
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "c", *weights)
    assert code == 0 and "starting from" in out and "was trained with" not in out


def test_a_warm_up_as_long_as_the_run_is_told():
    def notices(*flags):
        argv = ["--data_dir", "data", "--output_dir", "out", *map(str, flags)]
        return pretraining_flags.long_warmups(main_dino.get_args_parser().parse_args(argv))

    assert notices("--epochs", 11) == notices("--epochs", 2, "--warmup_epochs", 1.9) == []
    told = "--warmup_epochs 10 of --epochs 3: the learning rate rises to the end and reaches 30 % of its peak: lower"
    assert notices("--epochs", 3) == [f"{told} --warmup_epochs"]
    (line,) = notices("--epochs", 11, "--freeze_last_layer", 11)
    assert line.startswith("--freeze_last_layer 11 of --epochs 11: the prototypes are never trained")
    temperature = ["--epochs", 11, "--warmup_teacher_temp_epochs", 22]
    assert notices(*temperature) == []  # from 0.04 to 0.04
    (line,) = notices(*temperature, "--teacher_temp", 0.06)
    reached = utils.linear_schedule(11, 0.04, 0.06, 22)
    assert f"reaches {reached:g} of --teacher_temp 0.06" in line and "lower --warmup_teacher_temp_epochs" in line


@pytest.mark.parametrize(
    "given, told",
    [
        ([], None),
        (["--teacher_temp", 0.04, "--warmup_teacher_temp", 0.04, "--local_crops_scale", 0.25], None),
        (["--teacher_temp", 0.02], None),  # as the warning of a uniform teacher advises
        (["--teacher_temp", 0.07, "--warmup_teacher_temp_epochs", 30], None),
        (["--checkpoint_key", "student", "--pretrained_weights", "a.pth", "--local_crops_scale", 0.5], None),
        (["--warmup_teacher_temp", 0.02], "--warmup_teacher_temp 0.02"),
        (["--warmup_teacher_temp", 0.04, "--teacher_temp", 0.07], "--warmup_teacher_temp 0.04"),
        (["--warmup_teacher_temp_epochs", 30], "--warmup_teacher_temp_epochs 30"),
        (["--checkpoint_key", "student"], "--checkpoint_key student"),
        (["--local_crops_number", 0, "--local_crops_scale", 0.5], "--local_crops_scale 0.5"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_change_nothing_are_told(given, told):
    """Told of just those whose default gives the same schedule, views and weights."""
    parser = main_dino.get_args_parser()

    def parse(words):
        args = parser.parse_args(["--data_dir", "data", "--output_dir", "out", *map(str, words)])
        pretraining_flags.check_pretraining_flags(parser, args)
        return args

    notices = pretraining_flags.idle_flags(parse(given))
    assert [line.partition(" has no effect")[0] for line in notices] == [told] * bool(told)
    if told and "temp" in told:  # the schedule with the flag is that without it

        def temperatures(words):
            schedules = main_dino.Schedules.of_run(parse(words), 4, 8)
            return [schedules.at(main_dino.Progress(epoch, 8))["teacher_temp"] for epoch in range(100)]

        at = given.index(told.split()[0])
        assert temperatures(given) == temperatures(given[:at] + given[at + 2 :])


def test_idle_flags_are_told_when_a_run_starts(volumes, tmp_path, capsys):
    flags = ["--data_dir", volumes, "--output_dir", tmp_path, "--batch_size_per_gpu", 8, "--max_steps", 1]
    code, out, _ = run_main(capsys, *flags, "--warmup_teacher_temp", 0.02, "--lr", 1.6e-5)
    assert code == 0 and "--warmup_teacher_temp 0.02 has no effect with --warmup_teacher_temp_epochs 0: " in out
    assert "--lr 1.6e-05 makes a peak of 5e-07 for this global batch, below --min_lr 1e-06: " in out


def test_a_run_resumed_with_other_flags_tells_them(volumes, tmp_path, capsys):
    """Those that decide what is learnt, with both values; of the others, and of a run resumed as it was, nothing."""
    flags = ["--data_dir", volumes, "--output_dir", tmp_path, "--batch_size_per_gpu", 4, "--clip_grad", 2]
    code, out, _ = run_main(capsys, *flags, "--max_steps", 1)
    assert code == 0 and "other flags" not in out
    code, out, _ = run_main(capsys, *flags, "--max_steps", 2, "--num_workers", 1, "--keep_last", 1)
    assert code == 0 and "resuming after step 1" in out and "other flags" not in out
    other = ["--seed", 3, "--teacher_temp", 0.05, "--global_crops_scale", 0.5, 1]
    code, out, _ = run_main(capsys, *flags[:-2], *other, "--max_steps", 3)
    (line,) = [line for line in out.splitlines() if line.startswith("resuming with other flags: ")]
    told = line.partition(": ")[2].split(", ")
    assert code == 0 and sorted(one.partition(" instead")[0] for one in told) == [
        "--clip_grad 3",
        "--global_crops_scale 0.5 1",
        "--seed 3",
        "--teacher_temp 0.05",
    ]
    assert "--seed 3 instead of 0" in told and "--clip_grad 3 instead of 2" in told


def test_flags_that_change_nothing_learnt_are_flags():
    """So that none of those which are passed over has another name by now."""
    flags = {action.dest for action in main_dino.get_args_parser()._actions} | {"samples_per_epoch"}
    assert set(pretraining_flags.NOT_OF_LEARNING) < flags


def test_a_run_without_its_newest_checkpoint_is_refused(volumes, tmp_path, capsys):
    """Before anything is written; under its name an earlier one is resumed from."""
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 8, "--output_dir", tmp_path, "--save_every_minutes", 0]
    assert run_main(capsys, *flags, "--epochs", 2, "--saveckp_freq", 1)[0] == 0
    (tmp_path / "checkpoint.pth").unlink()

    def stands():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}

    before = stands()
    code, _, errors = run_main(capsys, *flags, "--epochs", 3)
    assert code == 1 and errors == [
        f"error: {tmp_path / 'checkpoint.pth'}: is missing, beside checkpoint.1.pth, checkpoint0001.pth, "
        "checkpoint0002.pth: rename one to checkpoint.pth to resume from it, or choose another --output_dir to start "
        "anew"
    ]
    assert stands() == before
    (tmp_path / "checkpoint0002.pth").rename(tmp_path / "checkpoint.pth")
    code, out, _ = run_main(capsys, *flags, "--epochs", 3)
    assert code == 0 and "resuming after step 2, epoch 2" in out


def test_nan_stops_the_run_in_one_line(volumes, tmp_path, capsys, monkeypatch):
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 4, "--output_dir", tmp_path]
    assert run_main(capsys, *flags, "--epochs", 1)[0] == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    monkeypatch.setattr(main_dino, "clip_gradients", lambda model, largest: torch.tensor(float("nan")))
    code, _, errors = run_main(capsys, *flags, "--epochs", 2, "--max_skipped_steps", 2)
    assert code == 1 and len(errors) == 2 and "2 of the 2 steps" in errors[0] and "diverged" in errors[1], errors
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_a_full_disk_leaves_the_last_checkpoint(volumes, tmp_path, capsys, monkeypatch):
    from dino3d.training import checkpoint as checkpoint_module

    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 4, "--output_dir", tmp_path]
    assert run_main(capsys, *flags, "--epochs", 1)[0] == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.os, "fsync", full)
    code, _, errors = run_main(capsys, *flags, "--epochs", 2)
    assert code == 1 and len(errors) == 1 and "No space left" in errors[0]
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_log_forgets_what_no_checkpoint_has(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"step": 8, "lo')
    assert [record["step"] for record in read_log(path)] == [2, 4, 6]
    truncate_log(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_errors_under_torchrun(volumes, tmp_path):
    """Both ranks end with exit code 1 or 2; the reason is told once, the other rank's line is short."""
    done = command("--data_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "out", processes=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and sum("no such folder" in line for line in lines) == 1 and len(lines) <= 2
    assert not traceback_through_our_code(done.stderr)


def test_one_rank_alone_that_fails_ends_the_run(volumes, tmp_path):
    """A file that only one rank meets: its line says why, the other doesn't hang, and nobody prints a traceback."""
    import shutil

    data = tmp_path / "data"
    shutil.copytree(volumes, data)
    bad = data / "patient3" / "t0" / "scan.hdf5"
    bad.write_bytes(bad.read_bytes()[:3000])
    done = command(
        "--data_dir",
        data,
        "--output_dir",
        tmp_path / "out",
        "--batch_size_per_gpu",
        1,
        "--epochs",
        3,
        "--strict_data",
        processes=2,
    )
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if "error:" in line]
    assert done.returncode == 1 and sum(str(bad) in line for line in lines) == 1, done.stderr
    assert not traceback_through_our_code(done.stderr)


def test_plain_python_and_one_line_errors(tmp_path):
    done = command("--data_dir", tmp_path, "--arch", "resnet500")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    done = command("--data_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "out")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and not done.stdout


def test_srun_environment(volumes, tmp_path):
    """Two tasks of a larger job that find each other by what srun sets, the second one after a while; srun was called
    on a machine that is none of theirs."""
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "5",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "nowhere[1-2],localhost",
        "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    tasks = [
        subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "main_dino.py"),
                *TINY,
                "--data_dir",
                str(volumes),
                "--output_dir",
                str(tmp_path),
                "--batch_size_per_gpu",
                "2",
                "--max_steps",
                "2",
            ],
            env=os.environ | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert json.loads((tmp_path / "config.json").read_text())["world_size"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_gpu_run(volumes, tmp_path, capsys, precision):
    code, out, errors = run_main(
        capsys,
        "--data_dir",
        volumes,
        "--output_dir",
        tmp_path,
        "--batch_size_per_gpu",
        4,
        "--epochs",
        3,
        "--precision",
        precision,
        "--use_elastic",
        "--use_gaussian",
        "--use_histogram",
        "--num_workers",
        2,
    )
    assert code == 0 and not errors
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint(tmp_path)["teacher"].values())


def test_a_smaller_head_and_a_rate_as_it_stands(volumes, tmp_path, capsys, monkeypatch):
    widths = []
    smaller = functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), width=8)
    monkeypatch.setitem(vision_transformer.ARCHITECTURES, "resnet18", smaller)
    monkeypatch.setattr(main_dino, "DINOHead", lambda *args, **more: widths.append(more) or DINOHead(*args, **more))
    head = ("--head_hidden_dim", 24, "--head_bottleneck_dim", 8, "--warmup_epochs", 0, "--epochs", 2)
    code, *_ = run_main(
        capsys,
        "--data_dir",
        volumes,
        "--batch_size_per_gpu",
        2,
        "--output_dir",
        tmp_path / "out",
        *head,
        "--lr",
        0.002,
        "--lr_unscaled",
        "--max_steps",
        1,
    )
    assert code == 0 and widths == [{"hidden_dim": 24, "bottleneck_dim": 8}] * 2
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert state["student"]["head.mlp.0.weight"].shape[0] == 24
    assert state["student"]["head.mlp.4.weight"].shape == (8, 24)
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.002  # of the first step, at the top of the cosine
    code, _, errors = run_main(
        capsys,
        "--data_dir",
        volumes,
        "--batch_size_per_gpu",
        2,
        "--output_dir",
        tmp_path / "out",
        *head[4:],
        "--head_hidden_dim",
        24,
    )
    assert code == 1 and "head_bottleneck_dim" in errors[-1]
