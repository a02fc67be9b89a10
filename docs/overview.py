"""Draw overview.png and augmentations.png from the demo's lung CT. From the repository's root:

    python prepare_data.py demo --output demo/data
    export OMP_NUM_THREADS=1; RUN="torchrun --standalone --nproc_per_node=1"; OUT=demo/overview
    for i in label0 label1; do
        mkdir -p $OUT/crops/subset0/$i; cp -r demo/data/luna16/*/$i/{lung,phantom}[12] $OUT/crops/subset0/$i; done
    $RUN main_dino.py --arch vit_tiny --data_dir demo/data/pretrain --output_dir $OUT/pretrain --patch_size 8 8 4 \
        --input_size 48 48 24 --spacing 2 2 4 --local_crops_scale 0.5 --local_crops_number 4 --out_dim 1024 \
        --use_elastic --use_gaussian --use_histogram --batch_size_per_gpu 8 --patches_per_volume 32 --epochs 8 \
        --warmup_epochs 2 --lr 0.012 --drop_path_rate 0 --teacher_temp 0.06 --warmup_teacher_temp_epochs 4
    FLAGS="--pretrained_weights $OUT/pretrain/checkpoint.pth --k_fold 2 --warmup_epochs 1 --shift_range 0 0 0 \
        --use_rotation false --use_scale false --use_flip false"
    $RUN main_lnc_luna16.py $FLAGS --data_dir $OUT/crops --output_dir $OUT/lnc --num_test 8 --epochs 30 --val_freq 30 \
        --negatives 8 --batch_size_per_gpu 8 --lr 0.01 --protocol linear --weight_decay 0
    python main_lnc_luna16.py --predict $OUT/crops/subset0 --weights $OUT/lnc/0 --output_dir $OUT/scores
    PYTHONPATH=. python docs/overview.py --data_dir demo/data --runs_dir $OUT --output_dir docs

In fold 0, the only one that is needed, lung2 is a training case: its scores are learnt by heart. With --masks, a folder
of main_lts_msd.py --predict, its mask is drawn over the reference label; without it the label stands alone.
"""

import argparse
import csv
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.patheffects import withStroke

from augmentations import PAPER, MultiCropAugmentation, Policy, collate_views, sampling_grid, scale_intensity
from dino3d.data.images import read_image, voxels_of
from dino3d.data.resampling import resample
from dino3d.data.volume import Volume
from dino3d.features.encoder import PretrainedEncoder, load_encoder
from dino3d.finetune.mask_pictures import largest_plane
from dino3d.training.pictures import example_views, radiological

BLUE, ORANGE, INK, RED, GREEN = "#1769c2", "#d95f02", "#222222", "#ff2a2a", "#2ee62e"
EDGE = [withStroke(linewidth=3, foreground="#00000090")]
WINDOW = (-1000, 400)  # HU that are black and white
PLACE, SEED = (56, 66, 32), 19  # middle of the base patch in voxels of 2 x 2 x 4 mm, and a draw that has contrast
OTHERS = ((1, 2), (0, 2), (0, 1))  # the axes of a plane across each axis


def views_of(hu: np.ndarray, encoder: PretrainedEncoder) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(views (N, x, y, z), where their voxels lie in the scan (N, x, y, z, 3))], global and local."""
    local = [n // 2 for n in encoder.input_size]
    crops = MultiCropAugmentation(Policy(**PAPER), encoder.input_size, local, 4, encoder.spacing)
    start = np.array(PLACE) - np.array(crops.patch_size) // 2
    patch = part_of(hu, start, crops.patch_size)
    groups = collate_views([crops.draw(SEED, 0, 0, patch.shape, encoder.spacing)])
    return [
        (views[:, 0].numpy(), sampling_grid(group[0].control, lattice).numpy() + start)
        for views, group, lattice in zip(crops.render(patch[None], groups, WINDOW), groups, crops.lattices)
    ]


def part_of(volume: np.ndarray, start: Iterable[int], size: Iterable[int]) -> torch.Tensor:
    return torch.from_numpy(volume[tuple(slice(a, a + n) for a, n in zip(start, size))].copy())


@torch.no_grad()
def features_of(encoder: PretrainedEncoder, hu: np.ndarray, axis: int, index: int) -> np.ndarray:
    """(a, b, D) patch features of a plane: the mean at each voxel over overlapping windows of the input size."""
    model, size, patch = encoder.build().eval(), np.array(encoder.input_size), np.array(encoder.patch_size)
    last, (a, b) = np.array(hu.shape) - size, OTHERS[axis]
    starts = [sorted({*range(0, n, p * 5 // 4), n}) for n, p in zip(last.tolist(), patch.tolist())]
    starts[axis] = [int(np.clip(index - size[axis] // 2, 0, last[axis]))]
    total, count = (np.zeros((hu.shape[a], hu.shape[b], n), np.float32) for n in (model.embed_dim, 1))
    for start in itertools.product(*starts):
        window = scale_intensity(part_of(hu, start, size), *encoder.clip_range)[None, None]
        tokens = model.get_intermediate_layers(window)[0][0].numpy()  # (D, x, y, z)
        plane = tokens.take((index - start[axis]) // patch[axis], axis + 1).transpose(1, 2, 0)  # (a, b, D)
        at = slice(start[a], start[a] + size[a]), slice(start[b], start[b] + size[b])
        total[at] += plane.repeat(patch[a], 0).repeat(patch[b], 1)
        count[at] += 1
    return total / count


def principal_colours(planes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[(a, b, 3)] the first three principal components of the planes' features as red, green and blue."""
    features = np.concatenate([plane.reshape(-1, plane.shape[-1]) for plane in planes])
    mean = features.mean(0)
    vectors = np.linalg.eigh(np.cov((features - mean).T))[1][:, :-4:-1]  # (D, 3)
    vectors = vectors * np.sign(vectors.sum(0))  # eigenvectors have no sign of their own
    low, high = np.percentile((features - mean) @ vectors, (2, 98), axis=0)
    return [np.clip(((plane - mean) @ vectors - low) / (high - low), 0, 1) for plane in planes]


class Canvas:
    """A figure in pixels from its upper left corner."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
        self.sheet = self.figure.add_axes([0, 0, 1, 1], xlim=(0, width), ylim=(height, 0))
        self.sheet.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 15.5, **style: Any) -> None:
        self.sheet.text(x, y, words, fontsize=size, linespacing=1.35, **{"color": INK, "va": "center_baseline"} | style)

    def tile(
        self,
        volume: np.ndarray,
        spacing: Sequence[float] | np.ndarray,
        axis: int,
        index: int | None,
        left: float,
        top: float,
        width: float,
        frame: str | None = None,
        window: Sequence[float] = WINDOW,
        square: bool = False,
    ) -> Axes:
        """Axes in mm with a plane of a volume (X, Y, Z) across an axis; a plane (a, b, 3) of colours has no index."""
        plane, mm = volume if index is None else volume.take(index, axis), np.array(spacing)[list(OTHERS[axis])]
        picture = np.dstack([radiological(channel) for channel in np.atleast_3d(plane).transpose(2, 0, 1)])
        w, h = np.array(plane.shape[:2]) * mm
        height = width if square else round(width * h / w)
        axes = self.figure.add_axes(
            [left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height],
            xticks=[],
            yticks=[],
        )
        axes.imshow(picture, "gray", interpolation="bilinear", vmin=window[0], vmax=window[1], extent=[0, w, 0, h])
        for side in axes.spines.values():
            side.set(visible=frame is not None, color=frame, linewidth=3)
        return axes

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
        self.sheet.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=22, lw=2.5, color=colour))

    def box(self, left: float, top: float, width: float, height: float, words: str, colour: str) -> None:
        self.sheet.add_patch(
            FancyBboxPatch(
                (left, top),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=12",
                facecolor="#f3f6fa",
                edgecolor=colour,
                linewidth=2.5,
            )
        )
        self.text(left + width / 2, top + height / 2, words, ha="center")


def label_tile(axes: Axes, mm: int = 0, name: str = "", sides: bool = False) -> None:
    for x, y, words, ha in (
        (0.03, 0.5, "R" if sides else "", "left"),
        (0.97, 0.5, "L" if sides else "", "right"),
        (0.97, 0.04, name, "right"),
        (0.03, 0.075, f"{mm} mm" if mm else "", "left"),
    ):
        axes.text(x, y, words, transform=axes.transAxes, color="white", fontsize=14, ha=ha, path_effects=EDGE)
    limits = axes.get_xlim(), axes.get_ylim()
    low = 0.03 * limits[0][1]
    axes.plot([low, low + mm], [low, low], color="white", linewidth=4, solid_capstyle="butt", path_effects=EDGE)
    axes.set(xlim=limits[0], ylim=limits[1])


def overview(
    hu: np.ndarray,
    encoder: PretrainedEncoder,
    scan: Volume,
    label: np.ndarray,
    predicted: np.ndarray | None,
    scored: Sequence[tuple[Volume, bool, float]],
) -> Canvas:
    """The Canvas of overview.png.

    scan: Volume; label, predicted (or None): (X, Y, Z) bool; scored: [(crop Volume, truth, score)]
    """
    canvas, spacing, own, whole = Canvas(1600, 905), np.array(encoder.spacing), np.array(scan.spacing), scan.read()
    shown = {2: largest_plane(label, 2), 1: int((PLACE[1] + 0.5) * spacing[1] / own[1])}  # tumour; middle of the patch
    views = list(zip(views_of(hu, encoder), (BLUE, ORANGE)))
    for x, words in ((20, "1  a thorax CT"), (440, "2  augmented views"), (865, "3  DINO"), (1150, "4  the outputs")):
        canvas.text(x, 26, words, 18, weight="bold")
    for axis, top, name in ((2, 52, "axial"), (1, 462, "coronal")):
        axes = canvas.tile(whole, own, axis, shown[axis], 20, top, 385)
        limits = axes.get_xlim(), axes.get_ylim()
        for (_, positions), colour in views:
            for view in positions:  # (x, y, z, 3): the border of its middle plane
                p = ((view.take(view.shape[axis] // 2, axis) + 0.5) * spacing)[..., OTHERS[axis]]  # (a, b, 2) mm
                border = np.concatenate([p[:, 0], p[-1], p[::-1, -1], p[0, ::-1]])
                axes.plot(limits[0][1] - border[:, 0], border[:, 1], color=colour, linewidth=2.2)
        axes.set(xlim=limits[0], ylim=limits[1])
        label_tile(axes, 100, name, True)
    for ((images, _), colour), top, side, gap in zip(views, (92, 520), (175, 82), (10, 11)):
        for i, image in enumerate(images):
            for row, axis in enumerate((2, 1)):
                axes = canvas.tile(
                    image,
                    spacing,
                    axis,
                    image.shape[axis] // 2,
                    440 + i * (side + gap),
                    top + row * (side + gap),
                    side,
                    colour,
                    (0, 1),
                )
                if i == row == 0 and colour == BLUE:
                    label_tile(axes, 20)
    canvas.text(440, 72, "2 global: axial, coronal", color=BLUE, weight="bold")
    canvas.text(440, 500, "4 local: axial, coronal", color=ORANGE, weight="bold")
    canvas.text(440, 770, "rotation, scale, flip, elastic,\nGaussian smoothing, histogram\nshift, each at random")
    canvas.box(865, 130, 240, 100, "teacher\n3D ViT + head", BLUE)
    canvas.box(865, 520, 240, 100, "student\n3D ViT + head", INK)
    for start, end, colour in (
        ((808, 180), (865, 180), BLUE),
        ((808, 400), (865, 535), BLUE),
        ((808, 605), (865, 590), ORANGE),
        ((895, 520), (895, 230), INK),
        ((1075, 230), (1075, 520), BLUE),
        ((1105, 180), (1142, 180), BLUE),
    ):
        canvas.arrow(start, end, colour)
    canvas.text(905, 375, "EMA of\nweights", 14)
    canvas.text(1065, 375, "targets", 14, color=BLUE, ha="right")
    canvas.text(865, 685, "loss: cross-entropy of\nstudent and teacher, each\nseeing another view", 14)
    canvas.text(1150, 72, "patch features (PCA as colour)", weight="bold")
    planes = [
        features_of(encoder, hu, axis, int((index + 0.5) * own[axis] / spacing[axis])) for axis, index in shown.items()
    ]
    for colours, left, axis in zip(principal_colours(planes), (1150, 1370), shown):
        canvas.tile(colours, spacing, axis, None, left, 92, 210)
    canvas.text(1150, 334, "nodule score (reference)", weight="bold")
    for i, (crop, truth, score) in enumerate(scored):
        canvas.tile(crop.read(), crop.spacing, 2, crop.shape[2] // 2, 1150 + i * 110, 356, 100)
        canvas.text(1200 + i * 110, 473, f"{score:.2f} ({'yes' if truth else 'no'})", 14, ha="center")
    lines = [(label, GREEN)] if predicted is None else [(label, GREEN), (predicted, RED)]
    canvas.text(1150, 528, "tumour mask to learn (reference)" if predicted is None else "tumour mask", weight="bold")
    for left, axis in ((1150, 2), (1370, 1)):
        at, (a, b) = largest_plane(label, axis), OTHERS[axis]
        axes = canvas.tile(whole, own, axis, at, left, 550, 210, square=True)
        middle = np.argwhere(label.take(at, axis)).mean(0)
        width, x, y = whole.shape[a] * own[a], *((np.arange(whole.shape[i]) + 0.5) * own[i] for i in (a, b))
        for mask, colour in lines:
            axes.contour(width - x, y, mask.take(at, axis).T, [0.5], colors=colour, linewidths=2.2)
        axes.set(xlim=width - middle[0] * own[a] + np.array((-48, 48)), ylim=middle[1] * own[b] + np.array((-48, 48)))
    if predicted is not None:
        dice = 2 * (predicted & label).sum() / (predicted.sum() + label.sum())
        canvas.text(1150, 784, f"prediction, Dice {dice:.2f}", color="#d40000", weight="bold")
        canvas.text(1440, 784, "reference", color="#128a12", weight="bold")
    canvas.text(
        20,
        858,
        "A public CT and a small model after minutes on a CPU: what the code computes, not how good a "
        "trained model is.\nThe features are still close to an untrained encoder's; the scores are of "
        "training cases.",
        13,
        va="center",
    )
    return canvas


def augmentations(hu: np.ndarray, spacing: Sequence[float], size: tuple[int, int, int] = (96, 96, 48)) -> Canvas:
    """The Canvas of augmentations.png: a patch, and each augmentation alone, the strongest of eight draws."""
    crops = MultiCropAugmentation(Policy(**PAPER), size, size, 0)
    room = np.minimum(crops.patch_size, hu.shape)
    examples = example_views(part_of(hu, (np.array(hu.shape) - room) // 2, room), crops, WINDOW, draws=8)
    canvas, names = Canvas(1600, 496), {"plain": "the patch", "gaussian": "Gaussian", "histogram": "histogram shift"}
    for column, (name, views) in enumerate(examples.items()):
        strongest = (views - examples["plain"]).abs().flatten(1).mean(1).argmax()
        left = 18 + column * 224
        canvas.text(left + 110, 22, names.get(name, name), 16, ha="center", weight="bold")
        for axis, top, plane in ((2, 44, "axial"), (1, 270, "coronal")):
            view = views[strongest, 0].numpy()
            axes = canvas.tile(view, spacing, axis, size[axis] // 2, left, top, 220, window=(0, 1))
            if not column:
                label_tile(axes, 50, plane)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw overview.png and augmentations.png from the demo's lung CT. The "
        "commands that make what is drawn stand at the top of this file."
    )
    parser.add_argument(
        "--data_dir", default="demo/data", metavar="DIR", help="--output of prepare_data.py demo (default: demo/data)"
    )
    parser.add_argument(
        "--runs_dir",
        default="demo/overview",
        metavar="DIR",
        help="holds pretrain/checkpoint.pth, crops/ and scores/ (default: demo/overview)",
    )
    parser.add_argument("--masks", metavar="DIR", help="masks of main_lts_msd.py --predict, to be drawn too")
    parser.add_argument("--output_dir", default="docs", metavar="DIR", help="where the pictures go (default: docs)")
    args = parser.parse_args()
    data, runs, out = Path(args.data_dir), Path(args.runs_dir), Path(args.output_dir)
    encoder, scan = load_encoder(str(runs / "pretrain" / "checkpoint.pth")), data / "msd" / "images" / "lung2.nii.gz"
    image = resample(read_image(str(scan)), encoder.spacing)  # keeps alive what voxels_of looks at
    hu = voxels_of(image)  # (X, Y, Z)
    masks = [
        Volume(str(folder / scan.name)).read_labels() > 0 if folder else None
        for folder in (data / "msd" / "labels", args.masks and Path(args.masks))
    ]
    with open(runs / "scores" / "predictions.csv", newline="") as file:
        rows = {row["case"]: float(row["probability"]) for row in csv.DictReader(file) if "lung2" in row["case"]}
    names = sorted(rows, key=lambda name: (not name.startswith("label1"), name))[:4]  # the nodule, three others
    scored = [
        (Volume(str(runs / "crops" / "subset0" / f"{name}.nii.gz")), name.startswith("label1"), rows[name])
        for name in names
    ]
    for name, canvas in (
        ("overview", overview(hu, encoder, Volume(str(scan)), *masks, scored)),
        ("augmentations", augmentations(hu, encoder.spacing)),
    ):
        canvas.figure.savefig(out / f"{name}.png", dpi=100)


if __name__ == "__main__":
    main()
