"""study.py: planned, run, resumed and added to with small scripts in place of those that train; arms, flags, failures,
Slurm's shares; and once with the real scripts."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import study
from dino3d.command_line import UserError
from dino3d.study import definition, devices, estimate, jobs, pool
from dino3d.study.arms import BUILT_IN, PAPERS_SIX, choose_arms, read_arms

RESULTS = ("results.csv", "seeds.csv", "differences.csv", "claims.csv", "results.json", "study.png", "report.html")


@pytest.fixture
def data(tmp_path):
    """A folder, and a table of labels for the probe."""
    (tmp_path / "data").mkdir()
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        rows = [(f"c{i}", f"{i}.nii.gz", i % 2, f"p{i // 2}") for i in range(40)]
        csv.writer(file).writerows([("name", "path", "label", "patient"), *rows])
    return tmp_path / "data"


def flags_of(folder, data, *more, tasks=("classification",), arms=("none", "paper", "scratch", "random"), seeds=(0, 1)):
    given = ["--output_dir", folder, "--data_dir", data, "--draws", "400", "--parallel", "2"]
    for task in tasks:
        given += [f"--{task}", data.parent / "labels.csv" if task == "probe" else data]
    given += ["--arms", *arms] if arms else []
    given += ["--seeds", *seeds] if seeds else []
    return [str(word) for word in (*given, *more)]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def outputs(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


# ---------------------------------------------------------------------------------------------------------------- arms


def test_arms_are_the_papers_augmentations():
    """As augmentations.py has them, which the study does not load; none and all set each."""
    import augmentations

    assert list(augmentations.AUGMENTATIONS)[: len(PAPERS_SIX)] == list(PAPERS_SIX)
    on = {
        name: [PAPERS_SIX[i // 2] for i in range(1, 12, 2) if arm.flags[i] == "true"]
        for name, arm in BUILT_IN.items()
        if arm.flags
    }
    assert on["none"] == [] and on["all"] == list(PAPERS_SIX) and all(on[name] == [name] for name in PAPERS_SIX)
    defaults = [name for name, row in augmentations.AUGMENTATIONS.items() if row.on]
    assert on["paper"] == defaults


def test_arms_of_a_file(tmp_path):
    (tmp_path / "recipe.txt").write_text("--lr 1 # higher\n--epochs 2\n")
    path = tmp_path / "arms.txt"
    path.write_text(
        f"# ours\n\nfast: --epochs 1 --name 'a b'\nrecipe: @{tmp_path}/recipe.txt --lr 2\nweights: w{{seed}}.pth\n"
    )
    arms = read_arms(str(path))
    assert arms["fast"].flags == ("--epochs", "1", "--name", "a b")
    assert arms["recipe"].flags == ("--lr", "1", "--epochs", "2", "--lr", "2")
    assert arms["weights"].weights_of(3) == str(tmp_path / "w3.pth") and not arms["weights"].flags
    assert [arm.name for arm in choose_arms(None, arms)] == ["none", "scratch", "random", "fast", "recipe", "weights"]
    assert [arm.name for arm in choose_arms(["fast", "none", "fast"], arms)] == ["fast", "none"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("fast --epochs 1\n", "line 1 is 'fast --epochs 1', expected `name: flags"),
        ("../x: --epochs 1\n", "line 1 is '../x: --epochs 1'"),
        ("none: --epochs 1\n", "none is built in"),
        ("a: --lr 1\na: --lr 2\n", "line 2: a is there twice"),
        ("a: --lr 'x\n", "can't be split into flags"),
        ("a: b c\n", "a begins with b"),
        ("a: @missing.txt\n", "missing.txt: can't be read"),
        ("# nothing\n", "names no arm"),
        ("a: --seed 3\n", "arm a: --seed is given by the study itself"),
        ("a: --output_dir=x\n", "arm a: --output_dir is given by the study itself"),
        ("a: missing.pth\n", "missing.pth: can't be read (No such file"),
        ("a: .\n", "holds no checkpoint; expected checkpoint.pth"),
        ("a: --pretrained_weights .\n", "holds no checkpoint; expected checkpoint.pth"),
        ("a: --lr 1\nA: --lr 2\n", "arms a and A"),
    ],
)
def test_a_file_of_arms_that_is_wrong(tmp_path, data, text, said):
    (tmp_path / "arms.txt").write_text(text)
    with pytest.raises(UserError) as error:
        study.main(flags_of(tmp_path / "s", data, "--arms_file", tmp_path / "arms.txt", arms=None))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "s").exists()


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--arms", "nono"], "--arms nono: no such arm"),
        (["--classification_flags=--pretrained_weights x"], "--classification_flags: --pretrained_weights is given"),
        (["--classification_flags=--max_steps=3"], "--max_steps is given by the study itself"),
        (["--pretrain_flags=--lr 'x"], "--pretrain_flags '--lr 'x': can't be split"),
        (["--pretrain_flags=@missing.txt"], "missing.txt: can't be read"),
        (["--segmentation_flags=--epochs 1"], "--segmentation_flags: is for --segmentation DIR, which is missing"),
        (["--probe", "missing"], "--probe missing: no such file"),
    ],
)
def test_flags_that_are_wrong(tmp_path, data, flags, said):
    with pytest.raises(UserError) as error:
        study.main([*flags_of(tmp_path / "s", data), *flags])
    assert said in str(error.value) and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--pretrain_flags=--epochz 3"],
            "none seed 0 pretrain: main_dino.py refuses its flags: unrecognized arguments",
        ),
        (["--classification_flags=--epochs x"], "main_lnc_luna16.py refuses its flags: argument --epochs"),
        (["--job", "8"], "--job 8: the study has units 0 to 7"),
        (["--job", "1", "--list"], "--list and --job exclude each other"),
        (["--draws", "3"], "3 is out of range"),
        (["--seeds", "-1"], "-1 is out of range"),
    ],
)
def test_flags_that_are_wrong_by_themselves(tmp_path, data, stubs, flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main([*flags_of(tmp_path / "s", data), *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_no_task(tmp_path, data):
    with pytest.raises(UserError, match="holds no study yet, and no task is given"):
        study.main(["--output_dir", str(tmp_path / "s"), "--data_dir", str(data)])


def test_started_several_times_by_a_launcher(tmp_path, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="study.py starts the processes of its jobs itself"):
        study.main(flags_of(tmp_path / "s", data))


# ----------------------------------------------------------------------------------------------------------- a study


def test_a_study_resumed_added_to_and_refused(tmp_path, data, stubs, capsys):
    folder, every = tmp_path / "s", ("classification", "segmentation", "probe")
    study.main(flags_of(folder, data, tasks=every))
    said = capsys.readouterr().out
    assert "measuring 5 steps" in said and "30 of 30 jobs are left" in said and "(30 of 30)" in said
    rows = {(row["task"], row["arm"]): row for row in table(folder / "results.csv")}
    assert set(rows) == {(task, arm) for task in every for arm in ("none", "paper", "scratch", "random")} - {
        ("probe", "scratch")
    }
    assert rows["classification", "none"]["low"] and not rows["segmentation", "none"]["low"]  # 4 cases
    assert float(rows["classification", "paper"]["value"]) > float(rows["classification", "none"]["value"])
    pairs = table(folder / "differences.csv")
    assert len(pairs) == 6 + 6 + 3
    assert {row["verdict"] for row in pairs if row["task"] == "segmentation"} == {"not shown"}
    claims = {row["claim"].split()[0]: row for row in table(folder / "claims.csv")}
    assert claims["scaling"]["why"].startswith("not run: it takes classification of arms rotation, scale")
    first = outputs(folder)

    study.main(["--output_dir", str(folder), "--draws", "400"])  # all is done: the same to the last bit
    assert "all 30 jobs are done" in capsys.readouterr().out and outputs(folder) == first

    study.main(["--output_dir", str(folder), "--arms", "scale", "--seeds", "2", "--draws", "400", "--parallel", "2"])
    said = capsys.readouterr().out
    assert "added to the study" in said and "arms scale" in said and "seeds 2" in said and "measuring" not in said
    later = {(row["task"], row["arm"], row["seed"]): row["value"] for row in table(folder / "seeds.csv")}
    assert len(later) == 3 * (4 + 5 + 5)
    before = [line.split(",") for line in first["seeds.csv"].decode().splitlines()[1:]]
    assert all(later[task, arm, seed] == value for task, arm, seed, _, value in before)

    for flags, text in (
        (["--pretrain_flags=--strength 2"], "is a study with --pretrain_flags not given, now it is --strength 2"),
        (["--data_dir", str(tmp_path)], "is a study with --data_dir"),
        (["--classification", str(tmp_path)], "is a study with --classification"),
        (["--threads", "2"], "is a study with --threads 1, now it is 2"),
        (["--processes_per_job", "2"], "is a study with --processes_per_job 1"),
    ):
        with pytest.raises(UserError) as error:
            study.main(["--output_dir", str(folder), *flags])
        assert text in str(error.value)


def test_same_whatever_the_order_and_the_number_of_slots(tmp_path, data, stubs):
    study.main(flags_of(tmp_path / "a", data, "--parallel", "3"))
    study.main(flags_of(tmp_path / "b", data, "--parallel", "1", arms=("none",), seeds=(0,)))
    study.main(flags_of(tmp_path / "b", data, arms=("none", "paper", "scratch", "random"), seeds=(1, 0)))
    for name in ("results.csv", "seeds.csv", "differences.csv", "claims.csv", "study.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_job_that_fails_is_told_and_retried(tmp_path, data, stubs, capsys):
    (tmp_path / "arms.txt").write_text("bad: --fail 1\ngood: --strength 2\nsilent: --silent 1\n")
    flags = flags_of(tmp_path / "s", data, "--arms_file", tmp_path / "arms.txt", arms=("good", "bad", "none", "silent"))
    with pytest.raises(UserError) as error:
        study.main(flags)
    said = capsys.readouterr().out
    assert "bad seed 1 pretrain: failed: this one fails (all it said: " in said
    assert "ended without an error and without a result" in said
    assert str(error.value).startswith("6 of 16 jobs failed, such as ") and "start again to retry" in str(error.value)
    log = (tmp_path / "s/arms/bad/seed1/pretrain.log").read_text()
    assert "--fail 1" in log and "something else" in log and log.count("error:") == 1
    rows = table(tmp_path / "s/seeds.csv")
    assert {(row["arm"], row["seed"]) for row in rows} == {
        ("good", "0"),
        ("good", "1"),
        ("bad", "0"),
        ("none", "0"),
        ("none", "1"),
    }
    pair = next(row for row in table(tmp_path / "s/differences.csv") if row["minus"] == "none" and row["arm"] == "bad")
    assert pair["seeds"] == "1"
    with pytest.raises(UserError, match="6 of 16 jobs failed"):
        study.main(["--output_dir", str(tmp_path / "s"), "--draws", "400"])
    assert (tmp_path / "s/arms/bad/seed1/pretrain.log").read_text().count("error:") == 2
    assert "10 jobs" not in capsys.readouterr().out


def test_flags_that_fail_when_run_end_the_study_at_once(tmp_path, data, stubs):
    with pytest.raises(UserError, match="the study would fail: classification: this one fails"):
        study.main(flags_of(tmp_path / "s", data, "--classification_flags=--fail -1"))
    assert not (tmp_path / "s" / "arms").exists()


def test_one_unit_of_a_slurm_array(tmp_path, data, stubs, capsys):
    folder = tmp_path / "s"
    flags = flags_of(folder, data, seeds=(0,))
    study.main([*flags, "--list"])
    said = capsys.readouterr().out
    assert "   0  none, seed 0: pretrain, classification (0 of 2 done)" in said and "--array=0-3" in said
    for unit in (2, 0, 3):
        study.main([*flags, "--job", str(unit)])
        assert "others are not" in capsys.readouterr().out and not (folder / "results.csv").exists()
    assert not (folder / "arms/paper").exists()
    study.main([*flags, "--table"])
    assert "2 of 8 jobs are not done" in capsys.readouterr().out and len(table(folder / "seeds.csv")) == 3
    study.main(["--output_dir", str(folder), "--draws", "400", "--job", "1"])  # the last one writes the tables
    assert len(table(folder / "seeds.csv")) == 4


def test_weights_of_others(tmp_path, data, stubs, monkeypatch):
    for seed in (0, 1):
        (tmp_path / f"w{seed}.pth").write_text(json.dumps({"level": 2.0, "seed": seed}))
    (tmp_path / "arms.txt").write_text("theirs: w{seed}.pth\n")
    flags = ["--arms_file", tmp_path / "arms.txt"]
    study.main(flags_of(tmp_path / "s", data, *flags, arms=("theirs", "none")))
    assert not (tmp_path / "s/arms/theirs/seed0/pretrain").exists()
    assert len(table(tmp_path / "s/seeds.csv")) == 4
    (tmp_path / "w1.pth").write_text(json.dumps({"level": 3.0, "seed": 1}))
    with pytest.raises(UserError, match="w1.pth: has changed since the study"):
        study.main(["--output_dir", str(tmp_path / "s")])


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2}', '{"format": 1, "arms": 3}', "\0", "[" * 5000])
def test_a_study_json_that_is_none(tmp_path, data, content):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.json").write_text(content)
    with pytest.raises(UserError, match="study.json: can't be read"):
        study.main(flags_of(tmp_path / "s", data))


def test_results_that_do_not_belong_together(tmp_path, data, stubs):
    folder = tmp_path / "s"
    study.main(flags_of(folder, data, seeds=(0,)))
    path = folder / "arms/paper/seed0/classification/predictions.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(UserError, match="arms none .40 cases. and paper .38 cases. were tested on different cases"):
        study.main(["--output_dir", str(folder), "--draws", "400", "--table"])


def test_resumed_from_another_folder(tmp_path, data, stubs, monkeypatch):
    """Jobs run where the study began, so a relative --output_dir must not be theirs."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    study.main(flags_of("s", data, arms=("paper",), seeds=(0,)))
    monkeypatch.chdir(tmp_path / "elsewhere")
    study.main(["--output_dir", "../s", "--seeds", "1", "--draws", "400"])
    assert [row["seed"] for row in table(tmp_path / "s/seeds.csv")] == ["0", "1"]
    assert not list(tmp_path.parent.glob("s/arms")) and not list((tmp_path / "elsewhere").iterdir())


def test_what_is_done_and_what_study_json_says_belong_together(tmp_path, data, stubs, capsys):
    folder = tmp_path / "s"
    study.main(flags_of(folder, data, "--pretrain_flags=--strength 2", arms=("paper",), seeds=(0,)))
    resumed = ["--output_dir", str(folder), "--draws", "400"]
    before, saved = table(folder / "seeds.csv"), (folder / "study.json").read_text()
    assert "--strength 2" in saved
    (folder / "study.json").write_text(saved.replace("--strength 2", "--strength 5"))
    for more in ([], ["--table"]):
        with pytest.raises(UserError, match=r"other flags than study.json gives it now \(2, now 5\)"):
            study.main([*resumed, *more])
    (folder / "study.json").write_text(saved)
    moved = folder.rename(tmp_path / "moved")  # is the same study
    resumed[1] = str(moved)
    study.main(resumed)
    marker = moved / "arms/paper/seed0/classification.done.json"
    marker.write_text("")
    with pytest.raises(UserError, match="classification.done.json: can't be read"):
        study.main(resumed)
    marker.unlink()
    study.main(resumed)
    (moved / "arms/paper/seed0/pretrain/checkpoint.pth").unlink()
    capsys.readouterr()
    study.main(resumed)
    assert "classification: begins" in capsys.readouterr().out  # it stands on what is run again
    assert table(moved / "seeds.csv") == before


def test_a_case_without_the_class_stays_a_case_of_all_arms(tmp_path, data, stubs):
    """One arm finds nothing in it, so that its Dice is undefined, another a voxel, which makes 0."""
    folder = tmp_path / "s"
    study.main(flags_of(folder, data, tasks=("segmentation",), arms=("none", "paper"), seeds=(0,)))
    for arm, dice in (("none", ""), ("paper", "0.0")):
        rows = [f"c{i},0,1,{0.5 + 0.1 * i}" for i in range(3)] + [f"c3,0,1,{dice}"]
        (folder / f"arms/{arm}/seed0/segmentation/cases.csv").write_text("\n".join(["case,fold,class,dice", *rows]))
    study.main(["--output_dir", str(folder), "--draws", "400", "--table"])
    values = {row["arm"]: float(row["value"]) for row in table(folder / "seeds.csv")}
    assert values == pytest.approx({"none": 0.6, "paper": 0.45})


# --------------------------------------------------------------------------------------------------------------- kills


def start(stubs, folder, data, *more):
    command = [sys.executable, ROOT / "tests" / "run_study.py", stubs, *flags_of(folder, data, *more)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )


def wait_for(path, process):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until and process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def children_of(process):
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid, parent in zip(listed[::2], listed[1::2]) if int(parent) == process.pid]


def test_killed_twice_the_same_to_the_last_bit(tmp_path, data, stubs):
    """The whole tree by SIGKILL, then by SIGTERM, then to the end: as if it had never been stopped."""
    slow = ("--pretrain_flags=--pause 0.1", "--classification_flags=--pause 0.2")
    study.main(flags_of(tmp_path / "whole", data, *slow))
    folder = tmp_path / "killed"
    one = start(stubs, folder, data, *slow)
    wait_for(folder / "arms/paper/seed0/pretrain/state.json", one)
    jobs_of_it = children_of(one)
    os.kill(one.pid, signal.SIGKILL)
    for pid in jobs_of_it:
        os.kill(pid, signal.SIGKILL)
    one.communicate()
    assert jobs_of_it and not (folder / "results.csv").exists()

    one = start(stubs, folder, data, *slow)
    wait_for(folder / "arms/none/seed1/pretrain/state.json", one)
    os.kill(one.pid, signal.SIGTERM)
    said = one.communicate(timeout=60)[0]
    assert one.returncode == 75 and "the jobs have saved: start again to resume" in said

    one = start(stubs, folder, data, *slow)
    said = one.communicate(timeout=120)[0]
    assert one.returncode == 0 and "measuring" not in said, said
    whole, killed = outputs(tmp_path / "whole"), outputs(folder)
    for name in ("results.csv", "seeds.csv", "differences.csv", "claims.csv", "study.png", "report.html"):
        assert whole[name] == killed[name], name
    assert len(table(folder / "times.csv")) > len(table(tmp_path / "whole" / "times.csv"))


def test_jobs_end_with_a_study_that_is_killed(tmp_path, data, stubs):
    one = start(stubs, tmp_path / "s", data, "--pretrain_flags=--pause 5", "--job", "0")
    wait_for(tmp_path / "s/arms/none/seed0/pretrain.log", one)
    while not children_of(one):
        time.sleep(0.02)
    (child,) = children_of(one)
    os.kill(one.pid, signal.SIGKILL)
    one.communicate()
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_interrupted(tmp_path, data, stubs):
    one = start(stubs, tmp_path / "s", data, "--pretrain_flags=--pause 5", "--job", "0")
    wait_for(tmp_path / "s/arms/none/seed0/pretrain.log", one)
    os.kill(one.pid, signal.SIGINT)
    said = one.communicate(timeout=60)[0]
    assert one.returncode == 130 and "ending 1 jobs" in said


def test_a_job_waits_for_what_outlived_an_earlier_call(tmp_path):
    import fcntl
    import threading

    path, told = tmp_path / ".lock", []
    path.write_text("")
    file = open(path)
    fcntl.flock(file, fcntl.LOCK_EX)
    threading.Timer(0.4, file.close).start()
    began = time.monotonic()
    pool.wait_for_lock(tmp_path, told.append)
    assert time.monotonic() - began > 0.3 and len(told) == 1 and "waiting for a process" in told[0]


# ------------------------------------------------------------------------------------------------------------- devices


def test_slots_of_gpus_and_cores():
    make = devices.make_slots
    assert [slot.gpus for slot in make(["0", "1", "2", "3"], 32, 1, 1, None)] == [("0",), ("1",), ("2",), ("3",)]
    assert make(["0", "1", "2", "3"], 32, 1, 1, None)[0].workers == 8
    assert [slot.gpus for slot in make(["0", "1", "2"], 32, 2, 1, None)] == [("0", "1")]
    assert [slot.gpus for slot in make(["3", "5"], 32, 1, 1, 4)] == [("3",), ("5",), ("3",), ("5",)]
    assert len(make([], 16, 1, 2, None)) == 8 and len(make([], 16, 2, 2, None)) == 4
    assert len(make([], 16, 1, 1, None, memory=3)) == 3 and len(make([], 16, 1, 1, 5, memory=3)) == 5
    assert make([], 2, 1, 1, None)[0] == devices.Slot((), 1, 0)
    assert len(make([], 1, 4, 4, None)) == 1
    with pytest.raises(UserError, match="needs as many GPUs, and this machine has 1"):
        make(["0"], 8, 2, 1, None)


def test_environment_of_a_job():
    given = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "0,1"}
    found = devices.Slot(("1",), 3, 0).environment(given)
    assert found == {"HOME": "/h", "OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "1"}
    assert devices.Slot((), 3, 0).environment(given)["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert devices.visible_gpus(given) == ["0", "1"] and devices.visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_several_processes_are_started_by_torchrun(tmp_path):
    job = jobs.StudyJob("a", 0, "pretrain", ("--lr", "1"), tmp_path, None)
    assert jobs.command_of(job, 1, 3) == [sys.executable, str(ROOT / "main_dino.py"), "--lr", "1", "--num_workers", "3"]
    assert jobs.command_of(job, 4, 3)[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    with_workers = job._replace(flags=("--num_workers=2",))
    assert jobs.command_of(with_workers, 1, 3)[-1] == "--num_workers=2"


# ------------------------------------------------------------------------------------------------------------ planning


def test_time_until_all_is_done(tmp_path):
    """Two slots: units of 10 + 4 and 10 + 4 end at 14, a third begins then: 28; with what is done before, less."""
    unit = [tmp_path / str(i) for i in range(3)]
    all_jobs = [
        job
        for one in unit
        for job in (
            jobs.StudyJob("a", 0, "pretrain", (), one, None),
            jobs.StudyJob("a", 0, "classification", (), one, "pretrain"),
        )
    ]
    costs = {"pretrain": estimate.Cost(10, 1), "classification": estimate.Cost(4, 1)}
    assert estimate.makespan(all_jobs, costs, 1) == 42
    assert estimate.makespan(all_jobs, costs, 2) == 28
    assert estimate.makespan(all_jobs, costs, 3) == 14
    assert estimate.makespan(all_jobs[1:], costs, 1) == 32
    assert estimate.makespan([], costs, 2) == 0


def test_cost_of_a_whole_run_from_a_few_steps(tmp_path, data, stubs):
    """The stub says 20 steps of an epoch and 0.5 s for each of them: 5 epochs, two of which are kept besides."""
    folder = tmp_path / "m"
    job = jobs.StudyJob("a", 0, "pretrain", (), folder, None)
    job.folder.mkdir(parents=True)
    (job.folder / "checkpoint.pth").write_bytes(b"x" * 1000)
    (job.folder / "log.txt").write_text('{"epoch": 0, "step": 5, "seconds": 2.5}\n')
    job.log.write_text("8 volumes, 20 steps of 4 samples per epoch\n")
    found = estimate.pretraining_costs(job, 7.5, {"epochs": 5, "keep_last": 2, "saveckp_freq": 2, "max_steps": None})
    assert found["pretrain"] == (7.5 + 0.5 * 95, 4000) and found["untrained"] == (7.5 - 0.5 * 4, 1000)
    stopped = estimate.pretraining_costs(job, 7.5, {"epochs": 5, "max_steps": 25})
    assert stopped["pretrain"].seconds == 7.5 + 0.5 * 20


def test_plan_runs_nothing(tmp_path, data, stubs, capsys):
    study.main(flags_of(tmp_path / "s", data, "--plan"))
    said = capsys.readouterr().out
    assert "they will take about" in said and "of disk" in said and not (tmp_path / "s/arms").exists()
    study.main(flags_of(tmp_path / "s", data, "--plan"))
    assert "measuring" not in capsys.readouterr().out


def test_plan_of_arms_that_are_not_trained(tmp_path, data, stubs, capsys):
    study.main(flags_of(tmp_path / "s", data, "--plan", arms=("scratch", "random")))
    said = capsys.readouterr().out
    assert "4 x untrained of" in said and "x pretrain" not in said


def test_last_words(tmp_path):
    path = tmp_path / "log"
    path.write_text("$ first\nerror: old\n$ second\nhello\nTraceback\nValueError: bad\n")
    assert pool.last_words(path) == "ValueError: bad"
    path.write_text("$ one\nerror: first of all\nsomething later\n")
    assert pool.last_words(path) == "first of all"
    path.write_text("$ one\n")
    assert pool.last_words(path) == "it said nothing"


def test_scratch_and_random_begin_with_the_weights_of_the_seed():
    flags = {"pretrain": ("--arch", "vit_micro"), "classification": ()}
    one = definition.Study(
        Path("/s"),
        {"pretrain": "/p", "classification": "/c", "probe": "/c"},
        flags,
        [BUILT_IN["scratch"], BUILT_IN["random"]],
        [3],
        1,
        1,
        "/",
        {},
    )
    (scratch, random) = jobs.all_units(one)
    assert [job.stage for job in scratch] == ["pretrain", "classification"]
    assert [job.stage for job in random] == ["pretrain", "classification", "probe"]
    assert scratch[0].flags[-7:] == jobs.UNTRAINED and ("--seed", "3") == scratch[0].flags[-9:-7]
    assert scratch[1].flags[-2:] == ("--layer_decay", "1") and random[1].flags[-2:] == ("--freeze_encoder", "true")
    own = one._replace(flags=flags | {"classification": ("--layer_decay=0.5",)})
    assert "--layer_decay" not in jobs.all_units(own)[0][1].flags


def test_a_second_study_in_one_folder_is_refused(tmp_path, data, stubs):
    from dino3d.run_lock import own_folder

    with own_folder(tmp_path / "s"), pytest.raises(UserError, match="another run writes to it"):
        study.main(flags_of(tmp_path / "s", data))


# --------------------------------------------------------------------------------------------- the scripts themselves

REAL = "--arch vit_micro --patch_size 12 12 6 --input_size 12 12 12 --local_crops_scale 1 --local_crops_number 1"
REAL += " --out_dim 32 --head_hidden_dim 32 --head_bottleneck_dim 16 --batch_size_per_gpu 2 --epochs 3 --saveckp_freq 0"


def test_the_encoder_before_training(tmp_path, volumes, capsys):
    """What scratch and random begin with is what pre-training of their seed begins with; and what main_dino.py says of
    its steps is understood."""
    import torch

    import main_dino
    from vision_transformer import ARCHITECTURES

    flags = [*shlex.split(REAL), "--data_dir", str(volumes), "--num_workers", "0", "--seed", "5"]
    main_dino.main([*flags, "--output_dir", str(tmp_path / "one"), *jobs.UNTRAINED])
    assert estimate.PER_EPOCH.findall(capsys.readouterr().out) == ["4"]
    saved = torch.load(tmp_path / "one" / "checkpoint.pth", weights_only=True)
    torch.manual_seed(5)
    fresh = ARCHITECTURES["vit_micro"]((12, 12, 12), (12, 12, 6)).state_dict()
    for network in ("student", "teacher"):
        found = {name.removeprefix("backbone."): value for name, value in saved[network].items() if "backbone" in name}
        assert found.keys() == fresh.keys() and all((found[name] == fresh[name]).all() for name in fresh)


def test_figures_are_those_of_the_scripts(tmp_path, volumes):
    """The jobs of a unit by the real scripts, called in this process: AUC and Dice are those that they give
    themselves."""
    import importlib

    from test_main_lnc_luna16 import write_cases
    from test_main_lts_msd import phantom, write_case

    crops = write_cases(tmp_path / "crops")
    for i in range(5):
        write_case(tmp_path / "masks", f"case{i}", *phantom(i, shape=(20, 18, 14)))
    folder, short = tmp_path / "s", "--epochs 1 --k_fold 2 --warmup_epochs 0"
    given = ["--output_dir", folder, "--data_dir", volumes, "--classification", crops, "--probe", crops]
    given += ["--segmentation", tmp_path / "masks", "--arms", "random", "--seeds", "3", "--draws", "200"]
    given += [f"--pretrain_flags={REAL}", f"--classification_flags={short} --num_test 8"]
    given += [f"--segmentation_flags={short} --num_test 2 --batch_size_per_gpu 4 --patches_per_case 1 --decoder linear"]
    given = [str(word) for word in given]
    args = study.get_args_parser().parse_args(given)
    one, _ = definition.define(folder, study.given_by(args), [])
    (unit,) = jobs.all_units(one)
    for job in unit:
        job.folder.mkdir(parents=True)
        importlib.import_module(jobs.script_of(job.stage).stem).main([*job.flags, "--num_workers", "0"])
        job.marker.write_text(json.dumps({"flags": job.flags}))
    study.main([*given, "--table"])
    found = {row["task"]: float(row["value"]) for row in table(folder / "results.csv")}
    of_task = {
        task: json.loads((unit[0].unit / task / "metrics.json").read_text())
        for task in ("classification", "segmentation")
    }
    assert found["classification"] == pytest.approx(of_task["classification"]["all_folds"]["auc"])
    assert found["segmentation"] == pytest.approx(of_task["segmentation"]["all_folds"]["dice"])
    assert found["surface"] == pytest.approx(of_task["segmentation"]["all_folds"]["surface_dice"])
    assert of_task["classification"]["protocol"] == "linear" and 0 <= found["probe"] <= 1
    config = json.loads((unit[0].unit / "segmentation" / "config.json").read_text())["arguments"]
    assert config["freeze_encoder"] and config["arch"] == "vit_micro" and config["input_size"] == [12, 12, 12]
