"""An encoder's maps of a scan in files: NIfTI on the scan's own voxels, and pictures beside the CT.

One folder per scan holds
    pca.nii.gz                      the first three principal components of the patches' features as RGB24; air is black
    attention.nii.gz                the class token's attention in the last block, mean of the heads
    attention_head<k>.nii.gz        that of each head
    similarity<k>.nii.gz            cosine similarity of each patch to that at the k-th point
    maps.png, heads.png, similarity<k>.png    axial, coronal and sagittal planes of these beside the CT
    maps.json                       what they were made with, written last
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino3d.command_line import UserError, format_values
from dino3d.data import images
from dino3d.data.conventions import DataError
from dino3d.data.nifti import RGB
from dino3d.data.volume import Volume
from dino3d.features.maps import (
    AIR_BELOW,
    ScanMaps,
    component_maps,
    patch_at,
    principal_components,
    similarity,
    voxel_at,
)
from dino3d.features.sliding_window import Grid, grid_of, interpolate
from dino3d.files import read_json, write_json
from dino3d.training.pictures import compose_page, radiological, save_picture

if TYPE_CHECKING:
    import PIL.Image
    import SimpleITK as sitk

MAP_TILE = 300  # pixels: the volume's longest side in all planes
STEP = 0.01  # to which attention and similarity are stored: finer digits would only fill the disk
CROSS = (255, 0, 0)
BRIGHTEST = 99.5  # percentile of the attention to tissue that is white
DARKEST = 50  # percentile of the similarity of tissue that is black: what is least like the point is of no interest
PLANES = ((2, "axial", "patient's right"), (1, "coronal", "patient's right"), (0, "sagittal", "anterior"))
SUMMARY = "maps.json"

Tiles = list["PIL.Image.Image"]  # axial, coronal, sagittal


def are_done(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether a folder holds all files of a scan, made with this recipe.

    recipe: its "settings" must be those of what is there: UserError otherwise; with other values of the rest, such as
    the state of the scan's file, they are made anew
    """
    found = _summary(folder)
    if found and found.get("recipe", {}).get("settings") != recipe["settings"]:
        raise UserError(
            f"{folder}: holds maps of other weights or settings, see its {SUMMARY}; choose another folder, or remove it"
        )
    files = found.get("files", [])
    return bool(files) and found["recipe"] == recipe and all((folder / name).is_file() for name in files)


def is_map(path: Path | str) -> bool:
    """Whether a file is one of `save_maps`, and no scan."""
    return Path(path).name in _summary(Path(path).parent).get("files", [])


def _summary(folder: Path) -> dict[str, Any]:
    """What maps.json in a folder says; {} where there is none or it can't be read."""
    try:
        found = read_json(folder / SUMMARY)
    except (OSError, ValueError, RecursionError):
        return {}
    sound = isinstance(found, dict) and isinstance(found.get("recipe"), dict) and isinstance(found.get("files"), list)
    return found if sound and all(isinstance(name, str) for name in found["files"]) else {}


def save_maps(
    folder: Path,
    path: Path | str,
    image: "sitk.Image",
    maps: ScanMaps,
    points: Sequence[Sequence[float]],
    clip_range: Sequence[float],
    title: str,
    recipe: dict[str, Any],
) -> list[str]:
    """Write all files of a scan; returns a line on what lies at each of the points.

    path: of the scan; image: what `images.read_image` gives for it; maps: its ScanMaps; points: each (3,) LPS mm
    clip_range: HU that are black and white; title: what to write above pictures; recipe: see `are_done`
    Raises DataError for a point outside the scan or in air, and for a scan that holds nothing but air, before anything
    is written; UserError where it can't be written.
    """
    voxels = [voxel_at(image, point, f"point {number}") for number, point in enumerate(points, 1)]
    if maps.tissue.sum() < 2:
        raise DataError(path, f"holds nothing but air: no two patches have a mean of {AIR_BELOW:g} HU or more")
    if not np.isfinite(maps.features).all():
        raise DataError(path, "its features are not finite (NaN): see --precision")
    for number, point in enumerate(points, 1):
        if not maps.tissue[patch_at(maps, point)]:
            raise DataError(
                f"point {number}",
                f"lies in air: the patch around {format_values(point)} mm (LPS) has a mean below {AIR_BELOW:g} HU, and "
                "there is nothing to compare with; choose another",
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in [*_summary(folder).get("files", []), SUMMARY]:  # some may not be made again
            (folder / Path(name).name).unlink(missing_ok=True)
        with Volume(path) as volume:
            files, told = _write(folder, volume, image, maps, points, voxels, clip_range, title)
        write_json(folder / SUMMARY, {"recipe": recipe, "files": files, **told})
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror or error})") from error
    return [
        f"point {number}: {format_values(one['lps_mm'])} mm (LPS) is voxel {format_values(one['voxel'])} of the file, "
        f"{one['hu']} HU"
        for number, one in enumerate(told["points"], 1)
    ]


def _write(
    folder: Path,
    volume: Volume,
    image: "sitk.Image",
    maps: ScanMaps,
    points: Sequence[Sequence[float]],
    voxels: Sequence[tuple[int, ...]],
    clip_range: Sequence[float],
    title: str,
) -> tuple[list[str], dict[str, Any]]:
    """(names of the files, what maps.json tells of them). One volume is in memory at a time."""
    grid, files = grid_of(image), []
    hu, middle = images.voxels_of(image), tuple(n // 2 for n in image.GetSize())
    weight = interpolate(maps.tissue.astype(np.float32), maps.grid, grid)
    air = weight < 0.5
    np.maximum(weight, 0.5, out=weight)

    def on_voxels(values: np.ndarray) -> np.ndarray:
        found = interpolate(values * maps.tissue, maps.grid, grid)
        found /= weight  # air does not fade the tissue beside it
        found[air] = 0
        return found

    def save(name: str, values: np.ndarray, slope: float = 1.0) -> None:
        volume.save_map(folder / name, values, slope)
        files.append(name)

    def scalar(name: str, values: np.ndarray, low: float, high: float, at: tuple[int, ...]) -> Tiles:
        found = on_voxels(values)
        slope = max(STEP, float(np.abs(found).max()) / 32767)
        save(name, np.rint(found / slope).astype(np.int16), slope)
        np.copyto(found, low, where=air)  # black
        return _tiles(found, at, grid, lambda plane: _heat((plane - low) / max(high - low, 1e-12)))

    def page(name: str, columns: Sequence[tuple[str, Tiles]], at: tuple[int, ...], legend: list) -> None:
        save_picture(folder / name, _page(columns, at, title, legend))
        files.append(name)

    def ct(at: tuple[int, ...]) -> tuple[str, Tiles]:
        low, high = clip_range
        return "CT", _tiles(hu, at, grid, lambda plane: _grey((plane.astype(np.float32) - low) / (high - low)))

    components = principal_components(maps.features[:, maps.tissue].T)
    colours, shares = np.zeros((*grid.size, 3), np.uint8), components.share
    for channel, values in enumerate(component_maps(maps.features, components)):
        colours[..., channel] = np.clip(on_voxels(values), 0, 1) * 255
    save("pca.nii.gz", colours.view(RGB)[..., 0])
    columns = [ct(middle), ("PCA", _tiles(colours, middle, grid))]
    del colours
    told: dict[str, Any] = {"explained_variance": [round(float(one), 4) for one in shares]}
    legend = [("PCA: red, green, blue explain " + ", ".join(f"{one:.0%}" for one in shares), (230, 230, 230))]
    if maps.attention is not None:
        mean = maps.attention.mean(0)
        white = np.percentile(mean[maps.tissue], BRIGHTEST)
        columns.append((f"attention, 0 to {white:.2g}", scalar("attention.nii.gz", mean, 0, white, middle)))
        legend.append(("attention: 1 is an even share of the window", (230, 230, 230)))
        heads = [ct(middle)]
        for number, one in enumerate(maps.attention, 1):
            white = np.percentile(one[maps.tissue], BRIGHTEST)
            name = f"attention_head{number}.nii.gz"
            heads.append((f"head {number}, 0 to {white:.2g}", scalar(name, one, 0, white, middle)))
        page("heads.png", heads, middle, legend[1:])
    page("maps.png", columns, middle, legend)
    told["points"] = []
    for number, (point, voxel) in enumerate(zip(points, voxels), 1):
        values = similarity(maps, point)
        black = np.percentile(values[maps.tissue], DARKEST)
        tiles = scalar(f"similarity{number}.nii.gz", values, black, 1, voxel)
        name, planes = ct(voxel)
        columns = [(name, _crossed(planes, voxel, grid)), (f"similarity, {black:.2f} to 1", tiles)]
        where = f"the cross: {format_values(np.round(point, 1).tolist())} mm (LPS), {hu[voxel]} HU"
        page(f"similarity{number}.png", columns, voxel, [(where, CROSS)])
        own = np.linalg.solve(volume.file_affine, np.diag([-1.0, -1, 1, 1]) @ [*point, 1])[:3]
        told["points"].append(
            {"lps_mm": [float(p) for p in point], "voxel": np.rint(own).astype(int).tolist(), "hu": int(hu[voxel])}
        )
    return files, told


# ------------------------------------------------------------------------------------------------------------ pictures


def _grey(values: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) grey values of what is black at 0 and white at 1."""
    return np.repeat(np.uint8(np.clip(values, 0, 1) * 255)[..., None], 3, -1)


def _heat(values: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) colours from black at 0 over red and yellow to white at 1."""
    return np.uint8(np.clip(np.clip(values, 0, 1)[..., None] * 3 - np.arange(3), 0, 1) * 255)


def _scale(grid: Grid) -> float:
    """Pixels per mm."""
    return MAP_TILE / max(n * s for n, s in zip(grid.size, grid.spacing))


def _tiles(volume: np.ndarray, at: tuple[int, ...], grid: Grid, colour: Any = lambda plane: plane) -> Tiles:
    """The planes of a volume (X, Y, Z) or (X, Y, Z, 3) through a voxel, in millimetres.

    colour: gives uint8 (a, b, 3) of a plane (a, b)
    """
    from PIL import Image

    tiles = []
    for axis, _, _ in PLANES:
        rows_columns = np.delete(np.multiply(grid.size, grid.spacing), axis)[::-1] * _scale(grid)
        height, width = np.maximum(np.rint(rows_columns), 1).astype(int).tolist()
        picture = np.ascontiguousarray(radiological(colour(volume.take(at[axis], axis))))
        tiles.append(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    return tiles


def _crossed(tiles: Tiles, at: tuple[int, ...], grid: Grid) -> Tiles:
    """Tiles with a cross, open in the middle, at a voxel."""
    from PIL import ImageDraw

    for (axis, _, _), tile in zip(PLANES, tiles):
        # The axes run to the left and up
        left, top = np.delete((np.array(grid.size) - at - 0.5) * grid.spacing, axis) * _scale(grid)
        draw = ImageDraw.Draw(tile)
        for near, far in ((-9, -3), (3, 9)):
            draw.line([left + near, top, left + far, top], CROSS)
            draw.line([left, top + near, left, top + far], CROSS)
    return tiles


def _page(
    columns: Sequence[tuple[str, Tiles]], at: tuple[int, ...], title: str, legend: list[tuple[str, tuple[int, ...]]]
) -> np.ndarray:
    """uint8 (height, width, 3) picture of columns of planes under their names."""
    rows = []
    for row, (_, name, left) in enumerate(PLANES):
        captions = [name for name, _ in columns]
        captions[0] = f"{captions[0]}, {name}, {left} on the left"
        rows.append([(caption, tiles[row]) for caption, (_, tiles) in zip(captions, columns)])
    return compose_page(rows, title, legend)
