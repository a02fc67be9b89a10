"""Several folders with a weight each, and lists: what pre-training draws from."""

import json
import os
import re
import shutil

import pytest
from test_main_dino import checkpoint, run_main, same

from dino3d.command_line import UserError
from dino3d.data.sources import data_changes, find_data, source_fault


@pytest.fixture
def folders(volumes, tmp_path):
    """Two folders, a with 2 volumes of `volumes` and b with 3 others."""
    files = sorted(volumes.rglob("*.hdf5"))
    for number, file in enumerate(files[:5]):
        (tmp_path / "ab"[number > 1]).mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "ab"[number > 1] / f"{number}.hdf5")
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_volumes_of_several_folders_have_their_folders_weight(folders, tmp_path, capsys):
    a, b = folders
    index = tmp_path / "out" / "data_list.txt"
    index.parent.mkdir()
    expected = [f"{a}/0.hdf5", f"{a}/1.hdf5", f"{b}/2.hdf5", f"{b}/3.hdf5", f"{b}/4.hdf5"]
    assert find_data([a, b], [7, 1], None, index) == (expected, [7, 7, 1, 1, 1])
    told = capsys.readouterr().out
    assert f"{a}: 2 volumes with weight 7, 82% of the samples" in told and "warning" not in told
    assert sorted(os.listdir(index.parent)) == ["data_list.2.txt", "data_list.txt"]
    shutil.copy(f"{b}/2.hdf5", f"{b}/new.hdf5")
    assert find_data([a, b], None, None, index) == (expected, [1] * 5)  # from the lists, as for one folder
    assert len(find_data([b, a], None, None, index).paths) == 6  # the lists are of other folders now
    assert find_data(a, None, None, index) == find_data([a], None, None, index) == (expected[:2], [1, 1])


def test_relative_folders_and_lists(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_data(["a", "./b"], [1, 2], None, "list.txt").paths[::4] == ["a/0.hdf5", "./b/4.hdf5"]
    (tmp_path / "mine.txt").write_text("0.hdf5\n1.hdf5\n0.hdf5\n")
    expected = [f"{folders[0]}/{k}.hdf5" for k in (0, 1, 0)]
    assert find_data(folders[0], None, "mine.txt", "list.txt") == (expected, [1, 1, 1])
    with pytest.raises(UserError, match="--data_list none.txt: can't be read"):
        find_data(None, None, "none.txt", "list.txt")


def test_volumes_that_would_count_twice_are_refused_or_told(folders, tmp_path, capsys):
    a, b = folders
    shutil.copytree(b, f"{a}/inner")
    (tmp_path / "link").symlink_to(b)
    for given, says in (
        ([a, b, a], f"{a} is also given as {a}"),
        ([b, str(tmp_path / "link")], "link is also given as"),
        ([a, f"{a}/inner"], f"{a}/inner lies inside {a}"),
        ([f"{a}/inner", a], f"{a}/inner lies inside {a}"),
        ([a, b, str(tmp_path)], f"{a} lies inside {tmp_path}"),
    ):
        with pytest.raises(UserError, match=f"--data_dir .*{says}.*would count twice"):
            find_data(given, None, None, tmp_path / "list.txt")
    assert not (tmp_path / "list.txt").exists()
    os.symlink(f"{b}/2.hdf5", f"{a}/same.hdf5")
    capsys.readouterr()
    find_data([a, b], None, None, tmp_path / "list.txt")
    assert "warning: 1 volumes are found below several folders" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--data_dir .*empty: no volume found"):
        find_data([a, str(tmp_path / "empty")], None, None, tmp_path / "list.txt")


@pytest.mark.parametrize(
    "folders, weights, data_list, says",
    [
        ([], None, None, "--data_dir is missing"),
        (["a", "b"], None, "list.txt", "--data_list takes one --data_dir.* there are 2"),
        (["a"], [2], "list.txt", "--data_weights are for the folders"),
        (["a", "b"], [7], None, "--data_weights 7: expected one for each folder of --data_dir, of which there are 2"),
        (["a"], [7, 1], None, "there are 1$"),
    ],
)
def test_flags_that_do_not_go_together_end_with_2(folders, weights, data_list, says, capsys):
    flags = ["--data_dir", *folders] * bool(folders) + ["--data_weights", *(weights or [])] * bool(weights)
    code, _, errors = run_main(capsys, *flags, *(["--data_list", data_list] if data_list else []))
    assert code == 2 and len(errors) == 1
    fault = source_fault(folders, weights, data_list)
    assert re.search(says, fault) and fault in errors[0]


@pytest.mark.parametrize("value", ["0", "1.5", "-1", "x"])
def test_weights_are_whole_numbers_from_one_on(value, capsys):
    code, _, errors = run_main(capsys, "--data_dir", "a", "--data_weights", value)
    assert code == 2 and "--data_weights" in errors[0]


def test_epochs_beyond_memory_are_refused(folders, tmp_path, capsys):
    flags = ["--data_dir", *folders[:2], "--data_weights", 1, 10**30, "--output_dir", tmp_path / "out"]
    code, _, errors = run_main(capsys, *flags)
    assert code == 1 and "--patches_per_volume and --data_weights make" in errors[-1]


def test_weights_of_one_change_nothing_and_a_changed_source_is_told(folders, tmp_path, capsys):
    a, b = folders
    base = ["--batch_size_per_gpu", 2, "--epochs", 2, "--drop_path_rate", 0.2]
    both = tmp_path / "both"
    both.mkdir()
    os.symlink(a, both / "a"), os.symlink(b, both / "b")  # the same order of the same files
    assert run_main(capsys, "--data_dir", both, "--output_dir", tmp_path / "one", *base)[0] == 0
    assert run_main(capsys, "--data_dir", a, b, "--data_weights", 1, 1, "--output_dir", tmp_path / "two", *base)[0] == 0
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert same(one["student"], two["student"])[0] and one["step"] == two["step"] == 4
    assert one["config"]["data_dir"] == str(both) and two["config"]["data_dir"] == [a, b]
    flags = ["--data_dir", a, b, "--data_weights", 3, 1, "--output_dir", tmp_path / "w", *base]
    code, out, _ = run_main(capsys, *flags, "--max_steps", 2)
    assert code == 0 and "4 steps of 2 samples per epoch" in out  # 2 x 3 + 3 samples
    code, out, _ = run_main(capsys, *flags, "--max_steps", 3)
    assert code == 0 and "other data" not in out
    flags[4] = 1
    code, out, _ = run_main(capsys, *flags)
    assert code == 0 and "resuming with other data: --data_weights 1 1 instead of 3 1; of the rest of this epoch" in out
    assert json.loads((tmp_path / "w" / "config.json").read_text())["arguments"]["data_weights"] == [1, 1]


def test_what_a_resumed_run_says_of_its_data():
    config = {
        "data_dir": "a",
        "data_weights": None,
        "data_list": None,
        "patches_per_volume": 8,
        "samples_per_epoch": 80,
    }
    older = {name: config[name] for name in ("data_dir", "data_list", "patches_per_volume")}
    assert data_changes(config, config, 40) == data_changes(older, config, 0) == []
    assert "of an older version" in data_changes(older, config, 40)[0]
    assert data_changes(older | {"patches_per_volume": 1}, config | {"patches_per_volume": 1}, 40) == []
    changed = data_changes(config | {"samples_per_epoch": 72}, config, 0)
    assert changed == ["resuming with other data: 80 samples per epoch instead of 72: volumes were added or removed"]
    assert "--data_dir a b instead of a; of the rest" in data_changes(config, config | {"data_dir": ["a", "b"]}, 3)[0]
    both = "--data_dir a instead of (not given), --patches_per_volume 8 instead of 1"
    assert data_changes({}, config, 0) == [f"resuming with other data: {both}"]
    lung = {"foreground": "lung", "foreground_share": None}
    assert data_changes(config, config | {"foreground": "none", "foreground_share": None}, 40) == []
    told = data_changes(config, config | lung, 40)
    assert told == ["resuming with patches drawn elsewhere: --foreground lung instead of none"]
    assert data_changes(config | lung, config | lung, 40) == []
