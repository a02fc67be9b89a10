"""Tables of points, the scans that they name, and the crops around them: as conversion, features and prediction use
them."""

import numpy as np
import pytest
import SimpleITK as sitk
from raw_inputs import edited, scan, write_image, write_luna16, write_series, write_table

from dino3d.command_line import UserError
from dino3d.data.conventions import DataError
from dino3d.data.images import read_image
from dino3d.data.points import crop_around, open_ct, read_points, scans_of_series, why_no_scan

HEADER = ["seriesuid", "coordX", "coordY", "coordZ"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_points_are_read_without_labels(separator, tmp_path, capsys):
    rows = [("a", 1.5, -2.25, 3, 1), ("b", 0, 0, 0, "x"), ("a", "", "left", 2, 0)]
    table = write_table(tmp_path / "points.csv", [*HEADER, "class"], rows, separator)
    points = read_points(table)
    assert list(points) == ["a", "b"] and [point.line for point in points["a"]] == [2, 4]
    assert points["a"][0].position == (1.5, -2.25, 3) and {p.label for those in points.values() for p in those} == {
        None
    }
    assert [point.problem for point in points["b"]] == [""]
    assert points["a"][1].problem == "not a point: , left, 2" and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("header", "rows", "said"),
    [(HEADER, [], "holds no points"), (HEADER[:3], [("a", 1, 2)], "has no column coordZ"), ([], [], "has no column")],
)
def test_a_table_that_holds_no_points_is_refused(header, rows, said, tmp_path):
    with pytest.raises(UserError, match=said):
        read_points(write_table(tmp_path / "points.csv", header, rows))


def test_scans_are_found_by_the_series_that_a_table_names(tmp_path):
    """By the file's name, or by the header of DICOM; masks, two of a name, and what is no CT are told."""
    for place in ("1.2.1.mhd", "more/1.2.2.nii.gz", "1.2.5.nrrd", "more/1.2.5.mha", "masks/1.2.1.mhd"):
        write_image(tmp_path / place, scan())
    write_series(tmp_path / "dicom", series="1.2.3")
    write_series(tmp_path / "scout", series="1.2.4", edit=edited(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    found, refused = scans_of_series(tmp_path, [], {"1.2.1"}, workers=0)
    assert [scan.name for scan in found["1.2.1"]] == ["1.2.1.mhd"] and [s.name for s in found["1.2.3"]] == [
        "dicom#1.2.3"
    ]
    assert "1.2.4" not in found and why_no_scan([], refused["1.2.4"], tmp_path).startswith("its scan can't be taken: ")
    assert why_no_scan(found["1.2.5"], "", tmp_path) == "two scans of one series: 1.2.5.nrrd and more/1.2.5.mha"
    assert why_no_scan(found.get("9", []), "", "DIR") == "no scan of this series below DIR"
    assert why_no_scan(found["1.2.2"], "", tmp_path) == ""


def test_where_there_are_subset_folders_only_their_scans_count(tmp_path):
    write_luna16(tmp_path, {"1.2.1": "subset0"})
    write_image(tmp_path / "1.2.1.mhd", scan())
    found, _ = scans_of_series(tmp_path, [], {"1.2.1"}, workers=0)
    assert [scan.name for scan in found["1.2.1"]] == ["subset0/1.2.1.mhd"]
    assert scans_of_series(tmp_path, [tmp_path / "subset0"], {"1.2.1"}, workers=0)[0]["1.2.1"][0].name == "1.2.1.mhd"


def test_a_folder_that_is_none_is_refused(tmp_path):
    for path, said in ((tmp_path / "none", "no such folder"), (write_image(tmp_path / "a.nrrd", scan()), "is a file")):
        with pytest.raises(UserError, match=said):
            scans_of_series(path, [], {"1"}, workers=0)


def test_a_crop_is_what_itk_resamples_around_the_point(tmp_path):
    path = write_image(tmp_path / "a.nrrd", scan())
    table = write_table(tmp_path / "points.csv", HEADER, [("a", 10.5, -20, 3), ("a", 1e4, 0, 0), ("a", 0, "", 0)])
    points = read_points(table)["a"]
    image, notes = open_ct(path)
    assert not notes
    crop = crop_around(image, points[0], (7, 5, 3), (8, 8, 14), "a")
    index = sitk.Image([7, 5, 3], sitk.sitkInt16)
    index.SetSpacing((8, 8, 14))
    index.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    index.SetOrigin((10.5 + 3 * 8, -20 + 2 * 8, 3 - 14))  # the middle voxel lies on the point
    expected = sitk.Resample(sitk.Cast(read_image(path), sitk.sitkFloat64), index, sitk.Transform(), sitk.sitkLinear)
    voxels = [sitk.GetArrayFromImage(one) for one in (crop, expected)]
    assert np.abs(voxels[0] - voxels[1]).max() <= 0.501
    for point, said in ((points[1], "outside the scan"), (points[2], "not a point")):
        with pytest.raises(DataError, match=said):
            crop_around(image, point, (7, 5, 3), None, "a")


def test_what_is_no_ct_is_not_opened(tmp_path):
    with pytest.raises(DataError, match="constant"):
        open_ct(write_image(tmp_path / "a.nrrd", sitk.Image([9, 9, 9], sitk.sitkInt16)))
