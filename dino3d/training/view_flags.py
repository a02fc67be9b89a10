"""The flags of pre-training's views: crops and augmentations, and what they must be to make sense."""

import argparse
import math
from typing import Any

from augmentations import AUGMENTATION_FLAGS, AUGMENTATIONS, MultiCropAugmentation, Policy, add_augmentation_flags
from dino3d.command_line import XYZ, format_values, number

PROBABILITY = Policy().prob
LOCAL_SCALE = 0.25
LARGEST_GLOBAL = 2  # the base patch grows with its cube
ZOOMS = (0.1, 10)  # voxels of an unresized view per voxel of a resized one: beyond, it shows next to nothing


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """Crops and augmentations."""
    group = parser.add_argument_group("crops and augmentations (each drawn for each view on its own)")
    group.add_argument(
        "--input_size",
        default=[96, 96, 48],
        nargs=3,
        type=number(int, 1),
        metavar=XYZ,
        help="voxels of a global view, a multiple of --patch_size (ResNets: any); smaller for CPUs",
    )
    group.add_argument(
        "--local_crops_number", default=8, type=number(int, 0), help="local views per sample; fewer are faster"
    )
    add_resized_crop_flags(group)
    group.add_argument(
        "--spacing",
        default=None,
        nargs=3,
        type=number(float, above=0),
        metavar=XYZ,
        help="mm per voxel that views are resampled to, for data of mixed spacings; angles and scales "
        "then act in mm; default: the volumes' own voxels, as in the paper",
    )
    group.add_argument(
        "--clip_range",
        default=[-1000.0, 1000.0],
        nargs=2,
        type=number(float),
        metavar=("LOW", "HIGH"),
        help="window: Hounsfield units that become 0 and 1",
    )
    add_augmentation_flags(group)
    add_strength_flags(group)


def add_strength_flags(group: Any) -> None:
    """--augment_prob, and the flag of each row of AUGMENTATIONS whose strength can be set."""
    group.add_argument(
        "--augment_prob",
        default=PROBABILITY,
        type=number(float, above=0, high=1),
        metavar="P",
        help="probability of each augmentation that is on, for each view on its own",
    )
    for name, row in AUGMENTATIONS.items():
        if row.strength_flag:
            flag, text, factor = row.strength_flag
            low, high = (limit * factor for limit in row.limits)
            group.add_argument(
                f"--{flag}",
                default=row.strength * factor,
                type=number(type(row.strength), low or -math.inf, high, above=None if low else 0),
                help=f"--use_{name}: {text}",
            )


def policy_of(args: argparse.Namespace) -> Policy:
    """The augmentations that the flags switch on, as strong as they say."""
    strengths = {}
    for flag, name in AUGMENTATION_FLAGS.items():
        row = AUGMENTATIONS[name]
        if getattr(args, flag):
            typed = getattr(args, row.strength_flag.name) if row.strength_flag else None
            strengths[name] = row.strength if typed is None else typed / row.strength_flag.factor
            strengths[name] = type(row.strength)(strengths[name])
    return Policy(**strengths, prob=args.augment_prob)


def idle_strengths(args: argparse.Namespace) -> list[str]:
    """Notices of strengths other than the defaults whose augmentation is off."""
    notices = []
    for flag, name in AUGMENTATION_FLAGS.items():
        row = AUGMENTATIONS[name]
        if row.strength_flag and not getattr(args, flag):
            value = getattr(args, row.strength_flag.name)
            if value != row.strength * row.strength_flag.factor:
                text = f"--{row.strength_flag.name} {format_values(value)}"
                notices.append(f"{text} has no effect: {name} is off, --{flag} switches it on")
    if args.augment_prob != PROBABILITY and not any(getattr(args, flag) for flag in AUGMENTATION_FLAGS):
        notices.append(f"--augment_prob {args.augment_prob:g} has no effect: no augmentation is on")
    return notices


def add_resized_crop_flags(group: Any) -> None:
    """--global_crops_scale, --local_crops_scale and --local_crops_size, to an argparse group."""
    group.add_argument(
        "--global_crops_scale",
        default=None,
        nargs=2,
        type=number(float, ZOOMS[0], LARGEST_GLOBAL),
        metavar=("LOW", "HIGH"),
        help="resized crops: side of what a global view shows, relative to --input_size voxels, drawn uniformly from "
        "LOW to HIGH for each view and brought to --input_size in the view's one interpolation; default: none, a "
        "global view shows --input_size voxels as they are",
    )
    group.add_argument(
        "--local_crops_scale",
        default=LOCAL_SCALE,
        nargs="+",
        type=number(float, above=0, high=1),
        metavar=("SCALE", "HIGH"),
        help="one number: side of a local view relative to a global one, at the same magnification; its voxels must be "
        "a multiple of --patch_size (ResNets: any). With --local_crops_size two, LOW HIGH, of resized crops: side of "
        "what a local view shows, relative to --input_size voxels, drawn uniformly from LOW to HIGH for each view",
    )
    group.add_argument(
        "--local_crops_size",
        default=None,
        nargs=3,
        type=number(int, 1),
        metavar=XYZ,
        help="voxels of a local view that is a resized crop, a multiple of --patch_size (ResNets: any): three patches "
        "along each axis are 27 tokens; needs --local_crops_scale LOW HIGH. Default: --local_crops_scale decides",
    )


def check_view_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is wrong by itself, and add args.local_size, (3,) voxels of a local view."""
    if args.clip_range[0] >= args.clip_range[1]:
        parser.error(f"--clip_range {format_values(args.clip_range)}: the first value must be below the second")
    check_resized_crops(parser, args)


def check_resized_crops(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is wrong by itself, and add args.local_size."""
    scale = args.local_crops_scale if isinstance(args.local_crops_scale, list) else [args.local_crops_scale]
    found, local, largest = f"--local_crops_scale {format_values(scale)}", args.local_crops_size, 1.0
    if local is None and len(scale) > 1:
        parser.error(
            f"{found}: a range of sides needs --local_crops_size X Y Z, the voxels of a local view; without it, one "
            "number is expected"
        )
    if local is not None and len(scale) != 2:
        parser.error(
            f"--local_crops_size {format_values(local)} needs --local_crops_scale LOW HIGH, two numbers: the range of "
            f"the side that a local view shows, relative to --input_size; found {format_values(scale)}"
        )
    if local is not None and not args.local_crops_number:
        parser.error(f"--local_crops_size {format_values(local)}: --local_crops_number 0 makes no local views")
    for flag, pair in (("--global_crops_scale", args.global_crops_scale), ("--local_crops_scale", scale)):
        if pair and pair[0] > pair[-1]:
            parser.error(f"{flag} {format_values(pair)}: the first value must not be above the second")
    if args.global_crops_scale:
        largest = args.global_crops_scale[1]
    if args.local_crops_number and scale[-1] > largest:
        parser.error(
            f"{found}: local views must not show more than the largest global ones, {largest:g} of --input_size by "
            "--global_crops_scale"
        )
    if local is None:
        args.local_crops_scale = scale[0]
        args.local_size = [max(1, round(n * scale[0])) for n in args.input_size]
        return
    args.local_size = local
    zooms = [side * n / m for side in scale for n, m in zip(args.input_size, local)]
    if not ZOOMS[0] <= min(zooms) <= max(zooms) <= ZOOMS[1]:
        parser.error(
            f"{found} with --local_crops_size {format_values(local)}: a voxel of a local view would be "
            f"{min(zooms):.3g} to {max(zooms):.3g} voxels of an unresized one, expected {ZOOMS[0]:g} to {ZOOMS[1]:g}"
        )


def multi_crop(args: argparse.Namespace) -> MultiCropAugmentation:
    """The views that the flags ask for."""
    return MultiCropAugmentation(
        policy_of(args),
        args.input_size,
        args.local_size,
        args.local_crops_number,
        args.spacing,
        global_scale=args.global_crops_scale and tuple(args.global_crops_scale),
        local_scale=args.local_crops_size and tuple(args.local_crops_scale),
    )


def describe_views(crops: MultiCropAugmentation) -> str:
    """Sizes of base patch and views, and the augmentations, for a run's summary."""

    def resized(scale: tuple[float, float] | None) -> str:
        if scale is None:
            return ""
        sides = f"{scale[0]:g} to {scale[1]:g}" if scale[0] < scale[1] else f"{scale[0]:g}"
        return f" (resized from {sides} of {format_values(crops.global_size)})"

    text = (
        f"base patch {format_values(crops.patch_size)}, 2 global views {format_values(crops.global_size)}"
        f"{resized(crops.global_scale)}, {crops.local_number} local views {format_values(crops.local_size)}"
        f"{resized(crops.local_scale)}"
    )
    stretch = crops.local_stretch
    if max(stretch) > 1.01 * min(stretch):
        text += f"; local views' voxels are {format_values(stretch)} times as long as if all axes were resized alike"
    return f"{text}; {describe_policy(crops.policy)}"


def describe_policy(policy: Policy) -> str:
    """Names of the augmentations that are on, with their strengths and probability where these are not the paper's."""
    parts = []
    for name in policy.on:
        row, strength = AUGMENTATIONS[name], getattr(policy, name)
        flag = row.strength_flag
        other = flag and strength != row.strength
        parts.append(f"{name} ({flag.name} {format_values(strength * flag.factor)})" if other else name)
    probability = "" if policy.prob == PROBABILITY or not parts else f", each with probability {policy.prob:g}"
    return ", ".join(parts) + f" on{probability}"
