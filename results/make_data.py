"""The data of the README's evidence: labelled pairs, an unlabelled pool, and the two halves of the patients.

    python results/make_data.py --data ../shared/data --output evidence/data
    python results/make_data.py --data LUNA16 --output evidence/data

pairs/ holds a nodule and a hard negative, a vessel or wall of the same density, of each patient: crops of 24 mm in the
classification layout. cubes/ and crops/ are the pool: 51 mm around nodules, 60 mm in and around the lungs. half0.txt
and half1.txt name the patients of the pairs, and pool_without_half0.csv, pool_without_half1.csv and pool_all.csv are
lists for main_dino.py --data_list: a model that is tested on a half has seen nothing of its patients. DATA.json says
what it was made from. A run that was stopped resumes with the same command, and ends with the same files.
"""

import collections
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags  # noqa: E402
from dino3d.data import images, resampling  # noqa: E402
from dino3d.data.conventions import LPS, DataError  # noqa: E402
from dino3d.data.foreground import CELL_MM, body_and_lung, box_means  # noqa: E402
from dino3d.data.nifti import save_nifti  # noqa: E402
from dino3d.data.points import Point, crop_around, open_ct, scans_of_series, why_no_scan  # noqa: E402
from dino3d.files import TEXT, atomic_write, write_json, write_table  # noqa: E402
from dino3d.prepare.conversion import WORK, open_output  # noqa: E402
from dino3d.prepare.inputs import files_of, safe_name  # noqa: E402
from dino3d.prepare.luna16 import find_table, read_nodules, read_patients  # noqa: E402

if TYPE_CHECKING:
    import SimpleITK as sitk

DATA_RULES = 1  # to be counted up when another version would write other voxels
MM = (1.0, 1.0, 1.0)  # spacing of all that is written
CUBE_SIDE, CROP_SIDE, PAIR_SIDE = 51, 60, 24  # voxels of a side
PAIR_SUBSETS = 5
CUBE_WEIGHT = 7  # of a cube in the pool's lists, where a crop has 1: about half of the samples are nodules
CUBES_ALONE = 11  # lines of a cube in the list that has no crops: about as many lines as the others have
# What a crop of the pool lies around, and which share of the crops does
CROP_PLACES = {"vessel": 0.55, "parenchyma": 0.2, "border": 0.25}
VESSEL_HU, PARENCHYMA_HU = -400, -700  # in the lung: above, below
CLIP = (-1000, 400)  # HU, of what a nodule and its hard negative are compared by
OFF_MM = 5.0  # least distance of a hard negative's centre from a nodule
NEGATIVE_HU = -700  # a hard negative is denser
CUBES_FILE = "nodules/nodules_51mm.npz"  # what tells the collection

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001."
LIDC = "LIDC-IDRI (TCIA, doi 10.7937/k9/tcia.2015.lo9ql9sx), CC BY 3.0"
LUNG_DX = "Lung-PET-CT-Dx (TCIA), CC BY 4.0"
LUNA16_TABLES = "tables of LUNA16, CC BY 4.0"
LUNA16_CROPS = 10  # of each scan
# The collection's CTs: file, patient, crops, fewer of thick slices, and licence. LIDC-IDRI-0001 and -0003 stand once
# more in msd/ (lung_003, lung_004), from where they are not taken; none of the nodules is theirs
COLLECTION = (
    ("ct/cptac_c3n_00247.nii.gz", "C3N-00247", 50, "CPTAC-LSCC (TCIA, doi 10.7937/k9/tcia.2018.6emub5l2), CC BY 4.0"),
    ("ct/lungdx_a0001.nii.gz", "A0001", 50, LUNG_DX),
    ("ct/totalsegmentator_example.nii.gz", "totalsegmentator", 120, "example of totalsegmentator 2.18.0, Apache-2.0"),
    ("dicom/lungdx_a0002/t0", "A0002", 50, LUNG_DX),
    (f"luna16/subset0/{UID}179049373636438705059720603192.mhd", "LIDC-IDRI-0001", 120, LIDC),
    (f"luna16/subset1/{UID}170706757615202213033480003264.mhd", "LIDC-IDRI-0003", 120, LIDC),
    ("msd/Task06_Lung/imagesTr/lung_001.nii.gz", "4D-Lung-113", 120, "4D-Lung (TCIA), CC BY 3.0"),
    ("msd/Task06_Lung/imagesTr/lung_002.nii.gz", "pyradiomics", 120, "sample of pyradiomics 3.0.1, BSD-3-Clause"),
)


class PoolScan(NamedTuple):
    """A CT: what its files are called, where it lies, whose it is, how many crops to take, its nodules, its licence."""

    name: str
    path: str
    patient: str
    crops: int
    licence: str
    nodules: Sequence[Point] = ()


class SourceData(NamedTuple):
    """What a --data folder holds. cubes: a file of nodules that are cut out already; lost: nodules without a scan"""

    kind: str
    scans: list[PoolScan]
    cubes: Path | None = None
    lost: int = 0


class Cube(NamedTuple):
    """A nodule in the middle of (X, Y, Z) HU at 1 mm; affine: (4, 4) to RAS mm

    nodule, nodules: (X, Y, Z) bool, its own voxels and those of all that are known
    """

    patient: str
    hu: np.ndarray
    affine: np.ndarray
    nodule: np.ndarray
    nodules: np.ndarray


class PoolFile(NamedTuple):
    """A file of the pool, relative to the output, and whose it is."""

    path: str
    patient: str
    weight: int


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="make_data.py",
        usage="make_data.py --data DIR --output DIR [flags]",
        description="The data of the README's evidence: pairs, pool, halves. Start the same command again to resume.",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="LUNA16 as it is downloaded (subset*/*.mhd and annotations.csv; hours), or a folder with "
        f"{CUBES_FILE} and the CTs that stand in docs/evidence.md (minutes); nothing in it is changed",
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    group.add_argument(
        "--patients",
        type=Path,
        default=None,
        metavar="CSV",
        help="table with the columns seriesuid and patient, as LUNA16's files name no patients; default: each scan is "
        "of another patient",
    )
    help_flags(group)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    source, output = args.data.resolve(), args.output.resolve()
    if not source.is_dir():
        raise UserError(f"--data {args.data}: " + ("is no folder" if source.exists() else "no such folder"))
    if output in (source, *source.parents):
        raise UserError(f"--output {args.output}: holds the --data {args.data}; give another folder")
    began = time.perf_counter()
    try:
        data = find_source(args.data, args.output, args.patients)
        inputs = [(scan._replace(path=""), [file.size for file in files_of("", scan.path)]) for scan in data.scans]
        inputs.append(data.cubes and data.cubes.stat().st_size)
        recipe = {"command": "make_data", "rules": DATA_RULES, "data": data.kind}
        recipe["crc32_of_inputs"] = crc32(repr(inputs))
        with open_output(args.output, recipe):
            pool = [*write_cubes(data, args.output), *write_scans(data, args.output)]
            pairs = write_pairs(cubes_of(data, args.output), args.output)
            for line in write_lists(data, pairs, pool, args.output):
                print(line)
    except DataError as error:
        raise UserError(str(error)) from error
    print(f"{args.output} is complete, {time.perf_counter() - began:.0f} s")


# ---------------------------------------------------------------------------------------------------- what there is


def find_source(folder: Path, output: Path, patients: Path | None) -> SourceData:
    """What a folder holds, told by its files. Raises UserError."""
    if (folder / CUBES_FILE).is_file():
        if patients:
            raise UserError(f"--patients is for LUNA16; --data {folder} is the collection, whose patients are known")
        return find_collection(folder)
    annotations = find_table(folder, "annotations.csv")
    if annotations and any(folder.glob("subset*/*.mhd")):
        return find_luna16(folder, output, annotations, patients)
    raise UserError(
        f"--data {folder}: holds neither {CUBES_FILE} nor LUNA16, of which subset*/*.mhd and annotations.csv are "
        "looked for"
    )


def find_collection(folder: Path) -> SourceData:
    """Nodules of 102 patients that are cut out already, and CTs of eight others. Raises UserError for a missing one."""
    scans = [PoolScan(patient, str(folder / path), patient, *rest) for path, patient, *rest in COLLECTION]
    for scan in scans:
        if not Path(scan.path).exists():
            raise UserError(f"{scan.path}: is missing, which belongs to {folder / CUBES_FILE}")
    return SourceData("collection", scans, folder / CUBES_FILE)


def find_luna16(folder: Path, output: Path, annotations: Path, patients: Path | None) -> SourceData:
    """The scans of as many of LUNA16's subsets as there are. Raises UserError for one that can't be told."""
    nodules = read_nodules(annotations)
    found, refused = scans_of_series(folder, [output], set(nodules), workers=0)
    patient_of, scans = read_patients(patients) if patients else {}, []
    for series in sorted(found):
        if problem := why_no_scan(found[series], refused.get(series, ""), folder):
            raise UserError(f"--data {folder}: {problem}")
        if patients and series not in patient_of:
            raise UserError(f"--patients {patients}: does not name series {series}")
        path, patient = folder / found[series][0].name, safe_name(patient_of.get(series, series), "unknown")
        name = safe_name(series, "scan")
        scans.append(PoolScan(name, str(path), patient, LUNA16_CROPS, LIDC, tuple(nodules.get(series, ()))))
    lost = sum(len(points) for series, points in nodules.items() if series not in found)
    if lost:
        print(f"note: {lost} nodules of {annotations} lie in scans that are not there: they are left out")
    return SourceData("LUNA16", scans, lost=lost)


# --------------------------------------------------------------------------------------------------------- the pool


def write_cubes(data: SourceData, output: Path) -> list[PoolFile]:
    """The nodules that a collection has cut out. Raises UserError where its file can't be read."""
    volumes = []
    for cube in read_collection(data.cubes) if data.cubes else ():
        volumes.append(PoolFile(f"cubes/{cube.patient}.nii", cube.patient, CUBE_WEIGHT))
        save_once(output, volumes[-1].path, cube.hu, cube.affine)
    if volumes:
        print(f"{data.cubes.name}: {len(volumes)} cubes", flush=True)
    return volumes


def write_scans(data: SourceData, output: Path) -> list[PoolFile]:
    """Cubes around the scans' nodules and crops in their lungs, a line for each scan. Raises DataError."""
    volumes = []
    for number, scan in enumerate(data.scans, 1):
        began = time.perf_counter()
        cubes = [PoolFile(cube_file(scan, nodule), scan.patient, CUBE_WEIGHT) for nodule in scan.nodules]
        crops = [PoolFile(f"crops/{scan.name}_{i:03}.nii", scan.patient, 1) for i in range(scan.crops)]
        told = "done before"
        if not all((output / volume.path).exists() for volume in (*cubes, *crops)):
            image, _ = open_ct(scan.path)
            for nodule, volume in zip(scan.nodules, cubes):
                source = f"{scan.path}, line {nodule.line} of annotations.csv"
                save_crop(output, volume.path, crop_around(image, nodule, (CUBE_SIDE,) * 3, MM, source))
            lung = Lung(image)
            if not lung.places:
                crops = []
            for volume in crops:
                centre = lung.draw(np.random.default_rng(crc32(volume.path)))
                save_crop(output, volume.path, crop_inside(image, centre, volume.path))
            told = f"{time.perf_counter() - began:.0f} s"
        found = f"{len(cubes)} cubes, {len(crops)} crops" + " (no lung was found in it)" * (not crops)
        print(f"{number} of {len(data.scans)}, {scan.name}: {found}, {told}", flush=True)
        volumes += [*cubes, *crops]
    return volumes


def cube_file(scan: PoolScan, nodule: Point) -> str:
    return f"cubes/{scan.name}_{nodule.line:05}.nii"


class Lung:
    """Where crops are taken in a CT. places: {kind of CROP_PLACES: (n,) flat indices of voxels in `box`}"""

    def __init__(self, image: "sitk.Image") -> None:
        from scipy import ndimage

        voxels, spacing = images.voxels_of(image), np.array(image.GetSpacing())  # (X, Y, Z)
        cell = np.maximum(1, np.rint(CELL_MM / spacing)).astype(int)  # (3,) voxels
        lung = body_and_lung(box_means(voxels, cell), float(np.prod(cell * spacing)) / 1000)["lung"]
        self.places = {}
        if not lung.any():
            return
        border = ndimage.binary_dilation(lung) & ~ndimage.binary_erosion(lung)  # 4 mm to both sides
        cells = ndimage.find_objects(border.astype(np.int8))[0]
        self.start = np.array([part.start for part in cells]) * cell
        box = voxels[tuple(slice(a, (part.stop) * n) for a, part, n in zip(self.start, cells, cell))]
        inside, border = (
            np.repeat(np.repeat(np.repeat(mask[cells], cell[0], 0), cell[1], 1), cell[2], 2)[
                tuple(slice(n) for n in box.shape)
            ]
            for mask in (lung, border)
        )
        smooth = ndimage.gaussian_filter(box.astype(np.float32), 1 / spacing)  # 1 mm
        masks = (inside & (smooth > VESSEL_HU), inside & (smooth < PARENCHYMA_HU), border)
        found = {kind: np.flatnonzero(mask) for kind, mask in zip(CROP_PLACES, masks)}
        self.places = {kind: voxels for kind, voxels in found.items() if len(voxels)}
        self.shape = box.shape

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """(3,) voxel index of a random place, of a kind as often as CROP_PLACES says."""
        shares = np.array([CROP_PLACES[kind] for kind in self.places])
        kind = list(self.places)[rng.choice(len(shares), p=shares / shares.sum())]
        place = self.places[kind][rng.integers(len(self.places[kind]))]
        return self.start + np.unravel_index(place, self.shape)


def crop_inside(image: "sitk.Image", centre: np.ndarray, source: str) -> "sitk.Image":
    """The crop around a voxel, moved as far into the image as it would reach beyond: no voxel of it is made up."""
    size = np.array(image.GetSize())
    half = CROP_SIDE / 2 / np.array(image.GetSpacing())  # voxels
    low, high = half - 0.5, size - 0.5 - half
    centre = np.where(low <= high, np.clip(centre, low, high), (size - 1) / 2)
    point = image.TransformContinuousIndexToPhysicalPoint(centre.tolist())
    return resampling.crop_at(image, point, (CROP_SIDE,) * 3, MM, source)


# -------------------------------------------------------------------------------------------------------- the pairs


def cubes_of(data: SourceData, output: Path) -> Iterator[Cube]:
    """One Cube for each patient, around the largest nodule. Raises DataError."""
    if data.cubes:
        yield from read_collection(data.cubes)
        return
    of_patient = collections.defaultdict(list)
    for scan in data.scans:
        of_patient[scan.patient] += [(scan, nodule) for nodule in scan.nodules]
    for patient, nodules in sorted(of_patient.items()):
        if not nodules:
            continue
        scan, largest = max(nodules, key=lambda pair: (float(pair[1].diameter), -pair[1].line))
        image = images.read_image(output / cube_file(scan, largest))
        spheres = {nodule.line: sphere(image, nodule) for nodule in scan.nodules}
        hu = images.voxels_of(image)
        yield Cube(patient, hu, images.affine_of(image), spheres[largest.line], np.any(list(spheres.values()), axis=0))


def read_collection(path: Path) -> Iterator[Cube]:
    """The Cubes of a file of hu, mask (N, z, y, x) and name. Raises UserError."""
    try:
        with np.load(path) as file:
            names, voxels, masks = (file[name] for name in ("name", "hu", "mask"))
    except Exception as error:  # numpy and zip raise many kinds
        raise UserError(f"{path}: can't be read ({error})") from error
    for name, hu, mask in zip(names, voxels, masks):
        nodule = mask.T > 0
        yield Cube(str(name), hu.T, LPS, nodule, nodule)


def sphere(image: "sitk.Image", nodule: Point) -> np.ndarray:
    """(X, Y, Z) bool: the voxels of an image of 1 mm in the sphere of a nodule's diameter, its centre at least."""
    centre = np.array(image.TransformPhysicalPointToContinuousIndex(nodule.position))
    away = np.indices(image.GetSize()) - centre[:, None, None, None]  # (3, X, Y, Z)
    return (away**2).sum(0) <= max(float(nodule.diameter) / 2, 1) ** 2


def write_pairs(cubes: Iterator[Cube], output: Path) -> list[tuple[str, int]]:
    """Write the pairs of those cubes that hold one; returns [(patient, subset)]."""
    pairs, count = [], 0
    for cube in cubes:
        count += 1
        centres = find_pair(cube)
        if centres is None:
            continue
        subset = len(pairs) % PAIR_SUBSETS
        pairs.append((cube.patient, subset))
        for label, centre in enumerate(reversed(centres)):
            start = np.array(centre) - PAIR_SIDE // 2
            box = tuple(slice(a, a + PAIR_SIDE) for a in start)
            moved = cube.affine.copy()
            moved[:3, 3] = (cube.affine @ [*start, 1])[:3]
            name = f"pairs/subset{subset}/label{label}/{cube.patient}/{cube.patient}_{label}.nii.gz"
            save_once(output, name, cube.hu[box], moved)
    print(f"{len(pairs)} pairs; {count - len(pairs)} patients have no hard negative near their nodule", flush=True)
    return pairs


def find_pair(cube: Cube) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(x, y, z) of a nodule's and of a hard negative's centre, None where the cube holds none such.

    Both are maxima of the smoothed density: the nodule's is nearest to the middle of its mask, the other lies off any
    nodule, and its surroundings of 7 mm are as dense as the nodule's, as nearly as can be: density does not tell them.
    """
    from scipy import ndimage

    if not cube.nodule.any():
        return None
    nodule, nodules = cube.nodule.T, cube.nodules.T  # (Z, Y, X): the filters' rounding depends on the order
    hu = np.clip(cube.hu.T, *CLIP).astype(np.float32)
    density, smooth = ndimage.uniform_filter(hu, 7), ndimage.gaussian_filter(hu, 1.5)
    fits = np.zeros(hu.shape, bool)  # a crop around it
    fits[tuple(slice(PAIR_SIDE // 2, n - PAIR_SIDE // 2 + 1) for n in hu.shape)] = True
    peaks = fits & (smooth == ndimage.maximum_filter(smooth, 5))

    away = np.linalg.norm(np.stack(np.indices(hu.shape), -1) - np.array(ndimage.center_of_mass(nodule)), axis=-1)
    diameter = (6 * nodule.sum() / np.pi) ** (1 / 3)  # of a sphere of its volume
    core = fits & (away <= max(3, diameter / 4))
    if not core.any():
        return None
    centre = least_distant(peaks & core, away) if (peaks & core).any() else least_distant(core, -smooth)
    others = peaks & (ndimage.distance_transform_edt(~nodules) >= OFF_MM) & (smooth > NEGATIVE_HU)
    if not others.any():
        return None
    return centre[::-1], least_distant(others, np.abs(density - density[centre]))[::-1]


def least_distant(mask: np.ndarray, distance: np.ndarray) -> tuple[int, ...]:
    """Index of the voxel of a mask that has the least distance, the first of several."""
    places = np.flatnonzero(mask)
    return tuple(int(n) for n in np.unravel_index(places[distance.ravel()[places].argmin()], mask.shape))


# --------------------------------------------------------------------------------------------- what names the files


def write_lists(
    data: SourceData, pairs: Sequence[tuple[str, int]], pool: Sequence[PoolFile], output: Path
) -> list[str]:
    """Write the halves, the pool's lists and DATA.json; returns lines on them."""
    halves, lines = halves_of(pairs), []
    without = {"all": set()} | {f"without_half{number}": set(half) for number, half in enumerate(halves)}
    lists = {}
    for name, left_out in without.items():
        kept = [volume for volume in pool if volume.patient not in left_out]
        rows = [[volume.path, volume.patient] for volume in kept for _ in range(volume.weight)]
        write_table(output / f"pool_{name}.csv", ["path", "patient"], rows)
        cubes = sum(volume.weight > 1 for volume in kept)
        lists[name] = {"cubes": cubes, "crops": len(kept) - cubes, "lines": len(rows)}
        lines.append(f"pool_{name}.csv: {cubes} cubes {CUBE_WEIGHT} times each, {len(kept) - cubes} crops")
    cubes = [[volume.path, volume.patient] for volume in pool if volume.weight > 1]
    write_table(output / "pool_cubes.csv", ["path", "patient"], [row for row in cubes for _ in range(CUBES_ALONE)])
    lines.append(f"pool_cubes.csv: {len(cubes)} cubes {CUBES_ALONE} times each, no crops")
    for number, half in enumerate(halves):
        with atomic_write(output / f"half{number}.txt") as part:
            part.write_text("".join(f"{patient}\n" for patient in half), **TEXT)
        lines.append(f"half{number}.txt: {len(half)} patients")
    crops = collections.Counter(volume.path[len("crops/") : -len("_000.nii")] for volume in pool if volume.weight == 1)
    write_json(
        output / "DATA.json",
        {
            "data": data.kind,
            "rules": DATA_RULES,
            "pairs": len(pairs),
            "pairs_of_subsets": [sum(other == subset for _, other in pairs) for subset in range(PAIR_SUBSETS)],
            "halves": [len(half) for half in halves],
            "pool": lists,
            "nodules_without_scan": data.lost,
            "licences": sorted({scan.licence for scan in data.scans} | {LIDC, LUNA16_TABLES}),
            "scans": [
                {"name": scan.name, "patient": scan.patient, "nodules": len(scan.nodules), "crops": crops[scan.name]}
                | {"licence": scan.licence}
                for scan in data.scans
            ],
        },
    )
    return lines


def halves_of(pairs: Sequence[tuple[str, int]]) -> tuple[list[str], list[str]]:
    """Sorted patients of both halves: every subset is shared out evenly, by chance that hangs on names alone."""
    halves, turn = ([], []), 0
    for subset in range(PAIR_SUBSETS):
        for patient in sorted((name for name, other in pairs if other == subset), key=lambda name: (crc32(name), name)):
            halves[turn % 2].append(patient)
            turn += 1
    return tuple(map(sorted, halves))


def crc32(text: str) -> int:
    return zlib.crc32(text.encode(**TEXT))


def save_crop(output: Path, name: str, image: "sitk.Image") -> None:
    save_once(output, name, images.voxels_of(image), images.affine_of(image))


def save_once(output: Path, name: str, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Write an (X, Y, Z) array, whole or not at all, unless it stands there."""
    path = output / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, folder=output / WORK) as part:
            save_nifti(part, voxels, affine)


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
