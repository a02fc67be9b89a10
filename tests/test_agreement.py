"""One voxel, one place in the world: what conversion, training, its copies, prediction and the saved mask make of every
NIfTI header that declares its geometry in two ways, against the formulas of the NIfTI standard written out."""

import functools
import itertools

import h5py
import nibabel
import numpy as np
import pytest
import torch
from raw_inputs import manifest, run  # noqa: F401
from test_main_lts_msd import Thresholding

from dino3d.data.conventions import DataError
from dino3d.data.layouts import Pair
from dino3d.data.volume import Volume
from dino3d.finetune.crops import Header
from dino3d.finetune.resampled_cache import ResampledCache
from dino3d.finetune.runtime import Runtime
from main_lts_msd import ScanOutputs, inference_settings, predict_case
from utils import Processes

SHAPE, MARKED = (14, 12, 20), (3, 8, 6)
KINDS = ("same", "flip", "shift", "pixdim", "unit", "shear", "NIfTI-2")
HEADERS = list(itertools.product(range(5), range(5), KINDS))  # qform_code, sform_code, kind
BASE = np.array([[-2.0, 0, 0, 31], [0, 1.5, 0, -47], [0, 0, 3, 812], [0, 0, 0, 1]])


def write_scan(path, qform_code, sform_code, kind, voxels):
    """A NIfTI file whose two forms differ by `kind`, whichever of them count."""
    sform, qform = BASE.copy(), BASE.copy()
    unit = {"unit": 0.001}.get(kind, 1.0)
    if kind == "flip":
        qform[0] = [2, 0, 0, -20]
    elif kind == "shift":
        qform[2, 3] += 40
    elif kind == "shear":
        sform[0, 1] = 0.4
    scale = np.diag([unit, unit, unit, 1])
    image = (nibabel.Nifti2Image if kind == "NIfTI-2" else nibabel.Nifti1Image)(voxels, None)
    image.header.set_qform(scale @ qform, qform_code)
    image.header.set_sform(scale @ sform, sform_code)
    image.header.set_xyzt_units("meter" if kind == "unit" else "mm")
    if kind == "pixdim":
        image.header["pixdim"][1:4] *= (1.25, 0.8, 1.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def standard(path):
    """(4, 4) RAS mm of a file's voxels by its header's numbers: method 3, 2 or 1 of the NIfTI standard, of which the
    last one leaves the orientation open: then as nibabel, to the left."""
    header = nibabel.load(path).header
    affine = np.eye(4)
    if header["sform_code"] > 0:
        affine[:3] = [header["srow_x"], header["srow_y"], header["srow_z"]]
    elif header["qform_code"] > 0:
        b, c, d = (float(header[f"quatern_{name}"]) for name in "bcd")
        a = np.sqrt(max(1 - b * b - c * c - d * d, 0))
        rotation = [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
        qfac = -1 if header["pixdim"][0] < 0 else 1
        affine[:3, :3] = np.array(rotation) * (header["pixdim"][1:4] * [1, 1, qfac])
        affine[:3, 3] = [header["qoffset_x"], header["qoffset_y"], header["qoffset_z"]]
    else:
        affine[:3, :3] = np.diag(header["pixdim"][1:4] * [-1, 1, 1])
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return np.diag([*[1000.0 if header["xyzt_units"] % 8 == 1 else 1.0] * 3, 1]) @ affine


def place(voxels, affine):
    """RAS mm of the one marked voxel."""
    (index,) = np.argwhere(np.asarray(voxels) > 0)
    return (affine @ [*index, 1])[:3]


def scan_voxels():
    voxels = np.full(SHAPE, -900, np.int16)
    voxels[::3] -= 50
    voxels[MARKED] = 1000
    return voxels


def of_training(path):
    with Volume(path) as volume:
        return place(volume.read(), volume.affine)


def of_copy(path, folder):
    """By the copy that a segmentation run reads its patches from; the label marks the same voxel."""
    with Volume(path) as volume:
        head, spacing = Header(volume.shape, volume.spacing), volume.spacing
    label = str(path).replace("imagesTr", "labelsTr")
    cache = ResampledCache(folder, [Pair(path.name, str(path), label)], [head], spacing, 1e9)
    cache.make(Processes(), 0)
    image, mask = cache.read(0)
    base = next(folder.glob("*/*.image.hdf5"))
    with Volume(base) as volume:
        np.testing.assert_allclose(place(mask, volume.affine), place(volume.read(), volume.affine), atol=1e-6)
        return place(volume.read(), volume.affine)


def of_prediction(path, folder):
    """By the mask that is saved, whose header is the scan's and whose marked voxel is."""
    with Volume(path) as volume:
        config = {
            "input_size": [8, 8, 8],
            "clip_range": [-1000.0, 1000.0],
            "spacing": list(volume.spacing),
            "classes": 2,
            "overlap": 0.25,
            "largest_component": False,
            "min_volume": 0.0,
            "tolerance": 1.0,
        }
    runtime = Runtime(Processes(), torch.float32, 64, 0)
    outputs = ScanOutputs(folder / "mask.nii.gz", folder / "overlay.png", [folder / "probability.nii.gz"])
    predict_case(str(path), outputs, [Thresholding()], config, inference_settings(config, 64), runtime)
    mask, scan, probability = (nibabel.load(one) for one in (outputs.mask, path, outputs.probabilities[0]))
    assert type(mask) is type(scan) is type(probability)
    np.testing.assert_array_equal(np.argwhere(probability.get_fdata() > 0.5), [MARKED])
    np.testing.assert_array_equal(probability.affine, mask.affine)
    np.testing.assert_array_equal(np.argwhere(np.asarray(mask.dataobj)), [MARKED])
    for name in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "xyzt_units"):
        np.testing.assert_array_equal(mask.header[name], scan.header[name], err_msg=name)
    return place(mask.dataobj, standard(folder / "mask.nii.gz"))


def of_hdf5(path):
    """By an ITK HDF5 file's numbers."""
    with h5py.File(path) as file:
        image = file["ITKImage/0"]
        affine = np.eye(4)
        affine[:3, :3] = image["Directions"][()].T * image["Spacing"][()]
        affine[:3, 3] = image["Origin"][()]
        return place(image["VoxelData"][()].T, np.diag([-1.0, -1, 1, 1]) @ affine)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder like a Decathlon task with all headers, labels on their images' headers."""
    folder = tmp_path_factory.mktemp("task")
    voxels = scan_voxels()
    for qform_code, sform_code, kind in HEADERS:
        name = f"q{qform_code}s{sform_code}_{kind}.nii.gz"
        write_scan(folder / "imagesTr" / name, qform_code, sform_code, kind, voxels)
        write_scan(folder / "labelsTr" / name, qform_code, sform_code, kind, (voxels > 0).astype(np.uint8))
    return folder


def refused_or(of):
    try:
        return of()
    except DataError as error:
        return error


def test_all_readers_put_a_voxel_at_one_place_or_refuse(task, tmp_path, run):  # noqa: F811
    flags = ["--input", task, "--workers", "2", "--output"]
    run("msd", *flags, tmp_path / "msd")
    run("nlst", "--input", task / "imagesTr", "--workers", "2", "--min_slices", "1", "--output", tmp_path / "nlst")
    by_msd, by_nlst = manifest(tmp_path / "msd"), manifest(tmp_path / "nlst")
    agreed = refused = noted = 0
    for qform_code, sform_code, kind in HEADERS:
        name = f"q{qform_code}s{sform_code}_{kind}.nii.gz"
        path, folder = task / "imagesTr" / name, tmp_path / "one" / name
        folder.mkdir(parents=True)
        found = {
            "training": refused_or(functools.partial(of_training, path)),
            "copy": refused_or(functools.partial(of_copy, path, folder)),
            "prediction": refused_or(functools.partial(of_prediction, path, folder)),
        }
        rows = by_nlst[name], by_msd[f"imagesTr/{name}"], by_msd[f"labelsTr/{name}"]
        if isinstance(found["training"], DataError):
            assert kind == "shear" and sform_code > 0
            assert all(isinstance(one, DataError) and one.reason == found["training"].reason for one in found.values())
            assert all(row["status"] == "failed" and row["reason"] == found["training"].reason for row in rows)
            refused += 1
            continue
        assert all(row["status"] == "written" for row in rows), rows
        converted, label = (nibabel.load(tmp_path / "msd" / row["output"]) for row in rows[1:])
        found |= {
            "nlst": of_hdf5(tmp_path / "nlst" / rows[0]["output"]),
            "msd": place(converted.dataobj, standard(converted.get_filename())),
            "label": place(label.dataobj, standard(label.get_filename())),
        }
        expected = (standard(path) @ [*MARKED, 1])[:3]
        for reader, where in found.items():
            np.testing.assert_allclose(where, expected, rtol=0, atol=1e-3, err_msg=f"{name}: {reader}")
        agreed += 1
        two_forms = kind in ("flip", "shift", "pixdim") and qform_code and sform_code
        pixdim_alone = kind == "pixdim" and sform_code and not qform_code
        told = bool(two_forms or pixdim_alone or not (qform_code or sform_code))
        assert [row["reason"].startswith("note: ") for row in rows] == [told] * 3, rows
        noted += told
    assert (agreed, refused) == (155, 20) and noted == 16 * 3 + 4 + 7
