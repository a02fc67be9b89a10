"""What is found below a folder: labels and masks by their paths, and cases for segmentation in all forms."""

import json
import os

import pytest
from test_images import touch

from dino3d.data.conventions import DataError
from dino3d.data.layouts import Pair, find_pairs, find_task, find_unlabelled, is_label_path

LABELS = [
    "labelsTr/lung_001.nii.gz",  # the Decathlon and nnU-Net
    "Task06_Lung/labelsTr/lung_001.nii.gz",
    "labelsTs/lung_001.nii.gz",
    "labels/a.nii.gz",
    "s0001/segmentations/heart.nii.gz",  # TotalSegmentator
    "seg-lungs-LUNA16/1.3.6.1.mhd",  # LUNA16
    "Case1/Segmentation-label.nrrd",  # Slicer
    "Case1/CT-label.nrrd",
    "Case1/Segmentation.seg.nrrd",
    "Training Batch 1/segmentation-0.nii",  # LiTS
    "case_00000/segmentation.nii.gz",  # KiTS
    "BraTS/x_seg.nii.gz",
    "a/ct_mask.nii.gz",
    "a/mask.mha",
    "p1/masks/lung.nii.gz",
    "Lung_Mask/coronacases_001.nii.gz",
    "p1/CT_segmentation.nii.gz",
]
IMAGES = [
    "imagesTr/lung_001_0000.nii.gz",
    "s0001/ct.nii.gz",
    "subset0/1.3.6.1.mhd",
    "subset0/label1/p1/a.nii.gz",  # crops of a class
    "subset0/0/p1/a.nii.gz",
    "mask1/t0/a.hdf5",  # a patient
    "GT/t0/a.hdf5",
    "Mask Marion/t0/a.hdf5",
    "p1/t0/segment.hdf5",
    "p1/t0/unmasked.nii.gz",
    "Training Batch 1/volume-0.nii",
    "case_00000/imaging.nii.gz",
    "p1/dicom#1.2.3",
    "labelled/a.nii.gz",
]


@pytest.mark.parametrize("path", LABELS)
def test_a_label_is_known_by_its_path(path):
    assert is_label_path(path) and is_label_path(path.replace("segmentation", "Segmentation"))


@pytest.mark.parametrize("path", IMAGES)
def test_a_scan_is_no_label(path):
    assert not is_label_path(path)


NAMES = {0: "background", 1: "cancer"}
V1 = {"labels": {str(k): name for k, name in NAMES.items()}}
V2 = {"channel_names": {"0": "CT"}, "labels": {name: k for k, name in NAMES.items()}, "numTraining": 2}
LIST = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in "ab"]


def write_task(folder, suffix="_0000", index=None, ending=".nii.gz", kinds=("imagesTr", "labelsTr")):
    touch(folder, *(f"{kinds[0]}/{case}{suffix}{ending}" for case in "ab"))
    touch(folder, *(f"{kinds[1]}/{case}{ending}" for case in "ab"), "imagesTs/c_0000.nii.gz", "imagesTs/c_0001.nii.gz")
    if index is not None:
        (folder / "dataset.json").write_text(json.dumps(index))


TASKS = {
    "the Decathlon's": ({"suffix": "", "index": V1 | {"training": LIST}}, (0, 1)),
    "nnU-Net 1": ({"index": V1 | {"training": LIST, "modality": {"0": "CT"}}}, (0, 1)),
    "nnU-Net 2": ({"index": V2 | {"file_ending": ".nii.gz"}}, (0, 1)),
    "nnU-Net 2, NRRD": ({"index": V2 | {"file_ending": ".nrrd"}, "ending": ".nrrd"}, (0, 1)),
    "nnU-Net 2 with a list": (
        {
            "index": V2
            | {
                "dataset": {
                    case: {"images": [f"imagesTr/{case}_0000.nii.gz"], "label": f"./labelsTr/{case}.nii.gz"}
                    for case in "ab"
                }
            }
        },
        (0, 1),
    ),
    "no index": ({}, None),
    "no index, no channel": ({"suffix": "", "ending": ".mha"}, None),
    "the layout of training": ({"suffix": "", "kinds": ("images", "labels")}, None),
    "the layout of training, with channels": ({"kinds": ("images", "labels")}, None),
}


@pytest.mark.parametrize("flags, classes", TASKS.values(), ids=TASKS)
def test_cases_are_found_in_every_form(flags, classes, tmp_path):
    write_task(tmp_path, **flags)
    pairs, problems = find_pairs(tmp_path)
    kinds, ending = flags.get("kinds", ("imagesTr", "labelsTr")), flags.get("ending", ".nii.gz")
    image, label = ([str(tmp_path / kind / case) for case in "ab"] for kind in kinds)
    suffix = flags.get("suffix", "_0000") + ending
    assert problems == []
    assert pairs == [Pair(case, one + suffix, other + ending, classes) for case, one, other in zip("ab", image, label)]


def test_a_case_that_is_listed_twice_is_one(tmp_path):
    case = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    write_task(tmp_path, suffix="", index=V1 | {"training": [case, case]})
    assert [pair.name for pair in find_pairs(tmp_path)[0]] == ["a", "b"]


def test_a_case_whose_own_name_ends_like_a_channel(tmp_path):
    touch(tmp_path, *(f"{kind}/lung_000{i}.nii.gz" for kind in ("imagesTr", "labelsTr") for i in range(3)))
    pairs, problems = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["lung_0000", "lung_0001", "lung_0002"] and not problems


def test_dicom_series_are_images_by_the_name_of_their_folder(tmp_path):
    from raw_inputs import write_series

    write_series(tmp_path / "images" / "a")
    touch(tmp_path, "labels/a.nii.gz")
    assert find_pairs(tmp_path) == ([Pair("a", f"{tmp_path}/images/a#1.2.3.1", f"{tmp_path}/labels/a.nii.gz")], [])


REFUSED = {
    "regions": (V2 | {"labels": {"background": 0, "whole": [1, 2], "core": [2]}}, "has regions", "such as whole"),
    "a label to ignore": (V2 | {"labels": V2["labels"] | {"ignore": 2}}, "has a label to ignore", ""),
    "two channels": (V2 | {"channel_names": {"0": "CT", "1": "PET"}}, "has 2 channels (CT, PET)", ""),
    "two modalities": (V1 | {"modality": {"0": "T1", "1": "T2"}}, "has 2 channels (T1, T2)", ""),
    "cases of two channels": (
        V2 | {"dataset": {"a": {"images": ["a_0000.nii.gz", "a_0001.nii.gz"], "label": "a.nii.gz"}}},
        "has cases of 2 channels",
        "",
    ),
    "labels of each other": (
        V1
        | {"training": [{"image": f"imagesTr/{a}.nii.gz", "label": f"labelsTr/{b}.nii.gz"} for a, b in ("ab", "ba")]},
        "lists labelsTr/b.nii.gz as the label of imagesTr/a.nii.gz, while imagesTr/b.nii.gz has its name",
        "",
    ),
    "two labels of an image": (
        V1 | {"training": [{"image": "imagesTr/a.nii.gz", "label": f"labelsTr/{b}.nii.gz"} for b in "ab"]},
        "lists labelsTr/a.nii.gz as the label of imagesTr/a.nii.gz, in another pair too",
        "",
    ),
    "pictures": (V2 | {"file_ending": ".png"}, "has images of kind .png", ""),
    "names of names": ({"labels": {"zero": "a"}}, "can't be read as a Decathlon's dataset.json or nnU-Net's", ""),
}


@pytest.mark.parametrize("index, reason, more", REFUSED.values(), ids=REFUSED)
def test_tasks_that_are_not_trained_here_are_refused_by_name(index, reason, more, tmp_path):
    write_task(tmp_path, index=index)
    with pytest.raises(DataError) as error:
        find_task(tmp_path)
    assert error.value.path == str(tmp_path / "dataset.json")
    assert error.value.reason.startswith(reason) and more in error.value.reason


def test_further_channels_are_refused_by_name(tmp_path):
    write_task(tmp_path)
    touch(tmp_path, "imagesTr/a_0001.nii.gz", "imagesTr/b_0001.nii.gz")
    with pytest.raises(DataError, match="further channel of its case, as 2 files are") as error:
        find_pairs(tmp_path)
    assert os.path.basename(error.value.path) == "a_0001.nii.gz"


def test_what_a_conversion_leaves_is_not_passed_over(tmp_path):
    touch(tmp_path, "p/t0/a.hdf5", "manifest.csv", "prepare.json", "other.csv")
    assert find_unlabelled(tmp_path) == (["p/t0/a.hdf5"], "1 .csv files")
