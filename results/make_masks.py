"""The lung masks of the README's evidence: a slab of each CT, labelled by a threshold and a closing.

    python results/make_masks.py --data ../shared/data --pool evidence/data/pool_cubes.csv --output evidence/lungs

images/ and labels/ hold a case for each patient, in the layout of main_lts_msd.py: SLAB_MM of his CT around the slice
with most lung, at 1 mm. The label is a rule's, no reader's: a first dense task. No patient of the --pool, which
encoders are pre-trained on, may be among them. A run that was stopped resumes with the same command, and ends with the
same files.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags  # noqa: E402
from dino3d.data import images, resampling  # noqa: E402
from dino3d.data.conventions import DataError  # noqa: E402
from dino3d.data.points import open_ct  # noqa: E402
from dino3d.files import read_table  # noqa: E402
from dino3d.prepare.conversion import open_output  # noqa: E402
from results.make_data import CUBES_FILE, MM, crc32, find_collection, save_once  # noqa: E402

if TYPE_CHECKING:
    import SimpleITK as sitk

MASK_RULES = 1  # to be counted up when another version would write other voxels
SLAB_MM = 48  # height of a case
LUNG_BELOW = -400  # below: air or lung
CLOSING_MM = 5  # radius: thinner vessels in the lung belong to it, as do airways that are joined to it
MARGIN_MM = 12  # around the lungs
LUNG_SHARE = 0.1  # of the largest airy part: smaller ones are no lung


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="make_masks.py",
        usage="make_masks.py --data DIR --pool CSV --output DIR",
        description="Lung masks by a rule, a case for each patient. Start the same command again to resume.",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"folder with {CUBES_FILE} and the CTs that stand in docs/evidence.md; nothing in it is changed",
    )
    group.add_argument(
        "--pool",
        type=Path,
        required=True,
        metavar="CSV",
        help="list that encoders are pre-trained on, with the column patient: one who is tested too is refused",
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    help_flags(group)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    if not args.data.is_dir():
        raise UserError(f"--data {args.data}: " + ("is no folder" if args.data.exists() else "no such folder"))
    if not (args.data / CUBES_FILE).is_file():
        raise UserError(
            f"--data {args.data}: holds no {CUBES_FILE}. LUNA16 alone won't do: its CTs are those that encoders are "
            "pre-trained on"
        )
    scans = find_collection(args.data).scans
    require_unseen(args.pool, [scan.patient for scan in scans])
    began = time.perf_counter()
    try:
        inputs = [(scan.patient, Path(scan.path).name) for scan in scans]
        recipe = {"command": "make_masks", "rules": MASK_RULES, "crc32_of_inputs": crc32(repr(inputs))}
        with open_output(args.output, recipe):
            for scan in scans:
                names = [f"{side}/{scan.patient}.nii.gz" for side in ("images", "labels")]
                if not all((args.output / name).exists() for name in names):
                    hu, lung, affine = slab_of(open_ct(scan.path)[0])
                    save_once(args.output, names[0], hu, affine)
                    save_once(args.output, names[1], lung.astype(np.uint8), affine)
                print(f"{scan.patient}: done", flush=True)
    except DataError as error:
        raise UserError(str(error)) from error
    print(f"{args.output} is complete, {time.perf_counter() - began:.0f} s")


def require_unseen(pool: Path, tested: Sequence[str]) -> None:
    """Raise UserError where a list has a patient who is tested, or names none."""
    try:
        patients = {row["patient"] for row in read_table(pool)}
    except (OSError, ValueError, KeyError) as error:
        why = getattr(error, "strerror", None) or repr(error)
        raise UserError(f"--pool {pool}: can't be read as a table with the column patient ({why})") from error
    if not patients:
        raise UserError(f"--pool {pool}: has no rows; make it by results/make_data.py")
    if None in patients or not all(map(str.strip, patients)):
        raise UserError(f"--pool {pool}: has rows without a patient, so that nobody can tell whether one is tested")
    if seen := sorted(patients & set(tested)):
        raise UserError(f"--pool {pool}: has scans of {seen[0]}, who is tested: take pool_cubes.csv")


def slab_of(image: "sitk.Image") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((X, Y, Z) HU at 1 mm, (X, Y, Z) bool lung, (4, 4) affine to RAS mm) of the slab of a CT with most lung, as wide
    and deep as the lungs with MARGIN_MM around them. Raises DataError where there is no lung."""
    image = resampling.resample(image, MM, upright=True)
    hu = images.voxels_of(image)
    lung = airy_parts(hu)
    if not lung.any():
        raise DataError("no lung was found in a CT of the collection")
    height = min(SLAB_MM, hu.shape[2])
    first = int(np.convolve(lung.sum((0, 1)), np.ones(height), "valid").argmax())
    spare = slice(max(0, first - CLOSING_MM), first + height + CLOSING_MM)  # so that its ends are closed as its middle
    closed = close_by_ball(lung[:, :, spare], CLOSING_MM)[:, :, first - spare.start :][:, :, :height]
    box = [slice(max(0, where.min() - MARGIN_MM), where.max() + 1 + MARGIN_MM) for where in np.nonzero(closed)[:2]]
    box.append(slice(first, first + height))
    affine = images.affine_of(image)
    affine[:3, 3] = (affine @ [*(part.start for part in box), 1])[:3]
    return hu[tuple(box)], closed[tuple(box[:2])], affine


def airy_parts(hu: np.ndarray) -> np.ndarray:
    """(X, Y, Z) bool: large parts below LUNG_BELOW, but what reaches the image's sides, as air around a body does."""
    from scipy import ndimage

    labels, _ = ndimage.label(hu < LUNG_BELOW)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    sizes[np.unique(np.concatenate([labels[[0, -1]].ravel(), labels[:, [0, -1]].ravel()]))] = 0
    return (sizes >= max(1, LUNG_SHARE * sizes.max()))[labels]


def close_by_ball(mask: np.ndarray, radius: int) -> np.ndarray:
    """Morphological closing of an (X, Y, Z) mask by a ball of this radius in voxels."""
    from scipy import ndimage

    wide = np.pad(mask, radius + 1)
    grown = ndimage.distance_transform_edt(~wide) <= radius
    inner = (slice(radius + 1, -radius - 1),) * 3
    return (ndimage.distance_transform_edt(grown) > radius)[inner]


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
