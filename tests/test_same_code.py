"""results/same_code.py: records of an older version of the code count where the new one gave the same scores."""

import json
import shutil

import pytest
from test_records import halves, made, stubs, study_flags  # noqa: F401

import study
from dino3d.command_line import UserError
from dino3d.files import read_table
from dino3d.study.same_code import SAME_CODE, codes_like
from results import same_code


@pytest.fixture
def changed(stubs, made, halves, tmp_path):  # noqa: F811
    """The kept records, and those of seed 0 and half 0 that a changed code has made; the code stays changed."""
    (stubs / "utils.py").write_text("changed = True\n")
    flags = study_flags(made, tmp_path / "s", tmp_path / "again", "half0", 0)
    flags[flags.index("--seeds") + 1 : flags.index("--seeds") + 3] = ["0"]
    study.main(flags)
    yield halves, tmp_path / "again"
    (stubs / "utils.py").unlink()


def compare(kept, again, *others):
    same_code.main(["--kept", str(kept), *map(str, others), "--repeated", str(again)])


def change(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_what_is_the_same_is_not_run_again(changed, made, tmp_path, capsys):  # noqa: F811
    kept, again = changed
    plan = [*study_flags(made, tmp_path / "t", kept, "half0", 0), "--plan"]
    study.main(plan)
    assert "are in the records" not in capsys.readouterr().out
    compare(kept, again)
    said = capsys.readouterr().out
    assert "classification none seed 0 half0: the same scores" in said and "5 runs, written to" in said
    (row,) = read_table(kept / SAME_CODE)
    assert (row["records"], row["tasks"]) == ("5", "classification probe")
    study.main(plan)  # seed 1 too
    assert "6 of 6 units are in the records" in capsys.readouterr().out
    capsys.readouterr()
    compare(kept, again)  # a table that came later could be added; what is written stays
    assert "written to" not in capsys.readouterr().out and len(read_table(kept / SAME_CODE)) == 1
    with pytest.raises(UserError, match="has no run of another version"):
        compare(again, again)
    # a table of both says nothing of two versions, and does where they were not compared
    for path in again.glob("*-seed0-half0.json"):
        shutil.copy(path, kept)
    for lines in ([], ["classification: its runs were made by 2 versions of the code"]):
        study.main(["--from_records", str(kept), "--output_dir", str(tmp_path / "out"), "--draws", "400"])
        said = capsys.readouterr().out
        assert ("versions of the code" in said) == bool(lines) and all(line in said for line in lines)
        (kept / SAME_CODE).unlink(missing_ok=True)


def test_what_is_not_the_same_is_refused(changed, tmp_path):
    kept, again = changed
    spoilt = shutil.copytree(again, tmp_path / "spoilt")
    path = spoilt / "probe-none-seed0-half0.json"
    values = json.loads(path.read_text())["repeats"]
    values[1]["values"][3][0] += 2e-7  # more than the last digit may fall
    change(path, repeats=values)
    with pytest.raises(UserError, match="probe none seed 0 half0: its scores differ by 2e-07 .* is not the same"):
        compare(kept, spoilt)
    shutil.copy(again / path.name, path)
    change(path, recipe="0123456789abcdef")
    with pytest.raises(UserError, match="was made anew with other flags or data"):
        compare(kept, spoilt)
    for path in spoilt.glob("probe-*"):
        path.unlink()
    with pytest.raises(UserError, match="has made probe, of which nothing was made anew"):
        compare(kept, spoilt)
    for path in spoilt.glob("*"):
        path.unlink()
    for task in ("classification", "probe"):
        shutil.copy(again / f"{task}-random-seed0-half0.json", spoilt)
    with pytest.raises(
        UserError, match="has made pretrain, of which nothing was made anew"
    ):  # encoders before training alone
        compare(kept, spoilt)
    change(spoilt / "probe-random-seed0-half0.json", code="other")
    with pytest.raises(UserError, match="was made by 2 versions of the code"):
        compare(kept, spoilt)
    assert not (kept / SAME_CODE).exists()


def test_a_stage_counts_for_every_table(changed, tmp_path, capsys):
    """Of a table of its own, whose runs none were made anew; but not for a stage that was not."""
    kept, again = changed
    other = shutil.copytree(kept, tmp_path / "other")
    for path in other.glob("*.json"):
        change(path, recipe="of other flags")
    compare(kept, again, other)
    assert f"5 runs, written to {other}" in capsys.readouterr().out
    assert (other / SAME_CODE).read_text() == (kept / SAME_CODE).read_text()
    (kept / SAME_CODE).unlink()
    dense = shutil.copytree(kept, tmp_path / "dense")
    for path in dense.glob("probe*.json"):
        path.unlink()
    for path in dense.glob("classification*.json"):
        labels = json.loads(path.read_text())["labels"]
        repeats = [{"folds": [0] * len(labels), "values": [0.5] * len(labels)}]
        change(path, task="segmentation", labels=None, repeats=repeats)
    with pytest.raises(UserError, match="dense: version .* has made segmentation, of which nothing was made anew"):
        compare(kept, again, dense)
    assert (kept / SAME_CODE).exists() and not (dense / SAME_CODE).exists()


def test_what_several_versions_have_made_certifies_nothing(changed, tmp_path):
    """Neither as what is kept nor as what was made anew."""
    kept, again = changed
    of_two, new_of_two = (shutil.copytree(one, tmp_path / f"two_{i}") for i, one in enumerate((kept, again)))
    for path in [*of_two.glob("*.json"), *new_of_two.glob("*.json")]:
        code = json.loads(path.read_text())["code"]
        change(path, code=f"older+{code}")
    for one, other, *beside in ((of_two, again), (kept, new_of_two), (kept, again, of_two)):
        assert not (kept / SAME_CODE).exists()
        with pytest.raises(UserError, match=r"records of older\+.* were made by several versions of the code"):
            compare(one, other, *beside)
    assert (kept / SAME_CODE).exists() and not (of_two / SAME_CODE).exists() and not (new_of_two / SAME_CODE).exists()


def test_sameness_goes_through_others(halves, tmp_path):  # noqa: F811
    (tmp_path / SAME_CODE).write_text("code,same_as\nd,c\nb,a\nc,b\nx,y\n")
    assert codes_like(tmp_path, "a") == codes_like(tmp_path, "d") == {"a", "b", "c", "d"}
    assert codes_like(tmp_path, "z") == {"z"} and codes_like(tmp_path / "none", "z") == {"z"}
    for text in ("code,other\n1,2\n", "code,same_as\na,\n"):
        (tmp_path / SAME_CODE).write_text(text)
        with pytest.raises(UserError, match="same_code.csv: can't be read .*expected the columns code and same_as"):
            codes_like(tmp_path, "a")
    with pytest.raises(UserError, match="--repeated .*none: can't be read"):
        compare(halves, tmp_path / "none")
