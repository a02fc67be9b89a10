"""Strengths of the augmentations as flags, and HU windows drawn per view: against MONAI, SciPy, the paper's."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from monai.transforms import ScaleIntensityRange
from test_augmentations import PAPER, close, few_views, noise  # noqa: F401
from test_main_dino import TINY, checkpoint, run_main, same, smaller_model  # noqa: F401

from augmentations import AUGMENTATIONS, MultiCropAugmentation, Policy, collate_views, paper_policy, sampling_grid
from dino3d import monai_transforms
from dino3d.finetune.crops import WindowAugmentation
from dino3d.intensity import WINDOWS
from dino3d.pretraining_flags import check_pretraining_flags
from dino3d.training.view_flags import describe_policy, idle_strengths, policy_of
from main_dino import get_args_parser

# -------------------------------------------------------------------------------------------------------- strengths


def parsed(*flags):
    parser = get_args_parser()
    args = parser.parse_args(["--data_dir", "x", *flags])
    check_pretraining_flags(parser, args)
    return args


def test_defaults_are_the_papers():
    args = parsed("--use_elastic", "--use_gaussian", "--use_histogram")
    assert policy_of(args) == PAPER and not idle_strengths(args)
    assert policy_of(parsed()) == paper_policy(["rotation", "scale", "flip"])
    assert describe_policy(PAPER) == "rotation, scale, flip, elastic, gaussian, histogram on"


def test_each_flag_sets_its_strength():
    given = "--rotation_degrees 10 --scale_percent 12.5 --elastic_amount 0.1 --gaussian_sigma 0.7 --histogram_points 4"
    args = parsed("--use_elastic", "--use_gaussian", "--use_histogram", "--augment_prob", "0.3", *given.split())
    policy = policy_of(args)
    assert policy == Policy(10.0, 0.125, 1, 0.1, 0.7, 4, prob=0.3) and isinstance(policy.histogram, int)
    assert describe_policy(policy) == (
        "rotation (rotation_degrees 10), scale (scale_percent 12.5), flip, elastic (elastic_amount 0.1), "
        "gaussian (gaussian_sigma 0.7), histogram (histogram_points 4) on, each with probability 0.3"
    )
    assert len([row for row in AUGMENTATIONS.values() if row.strength_flag]) == len(given.split()) / 2


def test_a_strength_without_its_augmentation_is_told():
    args = parsed("--gaussian_sigma", "1", "--rotation_degrees", "5", "--use_rotation", "false")
    assert idle_strengths(args) == [
        "--rotation_degrees 5 has no effect: rotation is off, --use_rotation switches it on",
        "--gaussian_sigma 1 has no effect: gaussian is off, --use_gaussian switches it on",
    ]
    off = [f"--use_{name}=false" for name in AUGMENTATIONS]
    assert idle_strengths(parsed("--augment_prob", "0.9", *off)) == [
        "--augment_prob 0.9 has no effect: no augmentation is on"
    ]


@pytest.mark.parametrize(
    "flag, values",
    {
        "--augment_prob": ["0", "1.1", "-0.5", "nan"],
        "--rotation_degrees": ["0", "181", "-5", "inf"],
        "--scale_percent": ["0", "100", "-1"],
        "--elastic_amount": ["0", "0.41"],
        "--gaussian_sigma": ["0", "-1", "inf"],
        "--histogram_points": ["2", "1001", "4.5"],
    }.items(),
)
def test_strengths_out_of_range_are_refused(flag, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as ended:
            parsed(f"{flag}={value}")
        error = capsys.readouterr().err.strip()
        assert ended.value.code == 2 and flag in error and len(error.splitlines()) == 1, error


# ---------------------------------------------------------------------------------------------------------- windows


def test_windows_leave_the_other_draws(few_views):
    """And the base patch: runs with and without differ in nothing else."""
    without, with_them = (MultiCropAugmentation(policy, (10, 8, 6), (6, 5, 3), 3) for policy in (PAPER, WINDOWED))
    assert with_them.patch_size == without.patch_size
    counts = dict.fromkeys(WINDOWS.values(), 0)
    for sample in range(200):
        for ours, theirs in zip(with_them.draw(4, 1, sample), without.draw(4, 1, sample)):
            assert np.array_equal(ours.control, theirs.control)
            for one, other in zip(ours.intensity, theirs.intensity):
                window = one.pop("window", None)
                if window is not None:
                    counts[tuple(window)] += 1
                assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert 440 < sum(counts.values()) < 560 and min(counts.values()) > 120  # of 1000 views, in thirds


WINDOWED = replace(PAPER, window=1)


@pytest.mark.parametrize("clip_range", [(-1000, 1000), (-200, 300)])
@pytest.mark.parametrize("scale", [None, (1.2, 2.0)], ids=["as they are", "resized"])
def test_a_view_is_windowed_from_hu(clip_range, scale, few_views):
    """Also a window that reaches beyond the clip range: from values that are clipped it could not be made."""
    policy = Policy(rotation=30, window=1, prob=0.6)
    crops = MultiCropAugmentation(policy, (10, 9, 8), (6, 5, 4), 3, global_scale=scale)
    patches = (noise(3, *crops.patch_size) * 3000 - 1500).to(torch.int16)
    drawn = [crops.draw(3, 0, i) for i in range(3)]
    groups, seen, blurred = collate_views(drawn), set(), 0
    for number, (views, group, lattice) in enumerate(
        zip(crops.render(patches, groups, clip_range), groups, crops.lattices)
    ):
        at = sampling_grid(group.control.double(), lattice).numpy()
        for i, view in enumerate(views[:, 0]):
            part = drawn[i % 3][number]
            low, high = part.intensity[i // 3].get("window", clip_range)
            seen.add((low, high))
            if max(part.blocks[i // 3]) > 1:  # tests/test_resized_crops.py has the averages
                blurred += 1
                continue
            hounsfield = scipy.ndimage.map_coordinates(
                patches[i % 3].numpy().astype(float), np.moveaxis(at[i], -1, 0), order=1, mode="nearest"
            )
            close(view, torch.from_numpy(((hounsfield - low) / (high - low)).clip(0, 1)), 1e-2)
            assert np.abs(view.numpy() - ((hounsfield - low) / (high - low)).clip(0, 1)).mean() < 1e-4
    assert seen >= set(WINDOWS.values()) and (blurred > 0) == (scale is not None)


def test_fine_tunings_windows_are_the_same():
    augmentation = WindowAugmentation(Policy(window=1, prob=1.0), (6, 5, 4), (0, 0, 0))
    crop = (noise(1, 8, 7, 6) * 3000 - 1500).to(torch.int16)
    for case in range(6):
        (drawn,) = augmentation.draw(0, 0, case, crop.shape[1:])
        (group,) = collate_views([[drawn]])
        low, high = drawn.intensity[0]["window"]
        inner = crop[:, 1:7, 1:6, 1:5].double()
        close(augmentation.render(crop, group, (-1000, 400))[0], ((inner - low) / (high - low)).clip(0, 1), 1e-2)


def test_the_transform_is_monais():
    volume, seen = noise(1, 9, 8, 7) * 3000 - 1500, set()
    augmentation = monai_transforms.RandWindow(prob=1.0).set_random_state(seed=0)
    pair = monai_transforms.RandWindowd(["image", "other"], prob=1.0).set_random_state(seed=0)
    for _ in range(12):
        ours, both = augmentation(volume), pair({"image": volume, "other": volume + 1})
        low, high = augmentation.drawn["window"]
        seen.add((low, high))
        close(ours, ScaleIntensityRange(low, high, 0, 1, clip=True)(volume), 1e-6)
        close(both["image"], ours, 0)
        close(both["other"], ScaleIntensityRange(low, high, 0, 1, clip=True)(volume + 1), 1e-6)
    assert seen == set(WINDOWS.values())
    never = monai_transforms.RandWindow((-1000, 400), prob=0.0)
    close(never(volume), ScaleIntensityRange(-1000, 400, 0, 1, clip=True)(volume), 1e-6)


# ----------------------------------------------------------------------------------------------------- the whole run


def test_a_run_with_all_of_it_resumes_and_does_not_depend_on_the_workers(volumes, tmp_path, capsys):
    """Resized crops, windows and other strengths: stopped in mid-epoch, and by other workers, the same weights."""
    given = (
        "--batch_size_per_gpu 2 --epochs 1 --use_window --use_gaussian --gaussian_sigma 0.8 --rotation_degrees 90 "
        "--augment_prob 0.8 --global_crops_scale 0.6 1.8 --local_crops_size 12 12 6 --local_crops_scale 0.25 1"
    )
    flags = [*TINY, "--data_dir", volumes, *given.split()]
    whole = tmp_path / "whole"
    code, output, errors = run_main(capsys, *flags, "--output_dir", whole)
    assert code == 0, errors
    assert "(resized from 0.6 to 1.8 of 24 24 12), 2 local views 12 12 6 (resized from 0.25 to 1 of 24 24 12)" in output
    assert "gaussian (gaussian_sigma 0.8), window on, each with probability 0.8" in output
    for steps in (["--max_steps", 1], []):
        code, _, errors = run_main(capsys, *flags, "--output_dir", tmp_path / "parts", *steps, "--num_workers", 1)
        assert code == 0, errors
    states = [checkpoint(tmp_path / name) for name in ("whole", "parts")]
    for part in ("student", "teacher"):
        assert same(states[0][part], states[1][part])[0]


# --------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_renders_what_the_cpu_renders(few_views):
    """Resized and windowed, and the host waits for nothing."""
    scales = {"global_scale": (0.5, 2.0), "local_scale": (0.2, 1.0)}
    crops = MultiCropAugmentation(replace(WINDOWED, prob=0.8), (24, 20, 12), (8, 7, 5), 3, **scales)
    smooth = scipy.ndimage.gaussian_filter(np.random.RandomState(0).randn(4, *crops.patch_size), (0, 1, 1, 1))
    patches = torch.from_numpy((smooth * 3000).astype(np.int16))
    groups = collate_views([crops.draw(0, 0, i) for i in range(4)])
    crops.render(patches.cuda(), [group.to("cuda") for group in groups], (-1000, 1000))  # the lattices' weights
    on_gpu = patches.cuda(), [group.to("cuda") for group in groups]
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = crops.render(*on_gpu, (-1000, 1000))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(seen, crops.render(patches, groups, (-1000, 1000))):
        close(ours.cpu(), theirs, 1e-2)
