"""The command lines of all scripts: what --help opens with, --version, and what a mistyped name is answered."""

import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from dino3d import __version__
from dino3d.command_line import ArgumentParser, did_you_mean, format_values, number

TRAINING = ("main_dino", "main_lnc_luna16", "main_lts_msd")
SCRIPTS = (*TRAINING, "prepare_data", "benchmark", "export", "describe", "evaluate_features", "study")


def parser_of(script):
    return importlib.import_module(script).get_args_parser()


def help_of(script, *command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        parser_of(script).parse_args([*command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", TRAINING)
def test_help_opens_with_data_and_output_and_ends_with_older_flags(script, monkeypatch, capsys):
    text = help_of(script, monkeypatch=monkeypatch, capsys=capsys)
    assert text.startswith(f"usage: {script}.py --data_dir DIR --output_dir DIR")
    assert len(text.split("\n\n")[0].splitlines()) <= 2
    flags = re.findall(r"^  (--\w+|-h)", text, re.M)
    assert flags[:3] == ["--data_dir", "--output_dir", "--pretrained_weights"]
    assert flags[-3:] == ["--use_fp16", "--dist_url", "--local_rank"] and flags[-5:-3] == ["-h", "--version"]
    groups = re.findall(r"^(\w.*):$", text, re.M)
    assert groups[0].startswith("data") and groups[-2:] == ["run", "older flags, accepted"]


@pytest.mark.parametrize(
    "script, command",
    [
        *((script, ()) for script in SCRIPTS),
        *(("prepare_data", (name,)) for name in ("nlst", "luna16", "msd", "check", "demo", "phantoms")),
        *(
            ("benchmark", (name,))
            for name in ("augment", "read", "convert", "data", "step", "train", "infer", "growth")
        ),
    ],
)
def test_help_has_short_placeholders_and_defaults_as_typed(script, command, monkeypatch, capsys):
    text = help_of(script, *command, monkeypatch=monkeypatch, capsys=capsys)
    assert "{" not in text and "default: [" not in text and "default: (" not in text and "default: )" not in text
    assert not re.search(r"default: (True|False|None)", text)
    for line in re.findall(r"^  (?:--?\w.*?)(?:  |$)", text, re.M):
        assert len(line) <= 70, line


def test_every_flag_has_a_help_text_that_stands_alone():
    """A text that begins with "of" or "that" reads as if the flag's name were its first word."""
    for script in SCRIPTS:
        parsers = [parser_of(script)]
        for action in parsers[0]._actions:
            if isinstance(action.choices, dict) and action.dest in ("command", "what"):
                parsers += action.choices.values()
        for action in (action for parser in parsers for action in parser._actions if action.option_strings):
            assert action.help and not re.match(r"(of|that|the same) ", action.help), (script, action.option_strings)


def test_sub_commands_open_with_what_is_required(monkeypatch, capsys):
    text = help_of("prepare_data", "msd", monkeypatch=monkeypatch, capsys=capsys)
    assert text.startswith("usage: prepare_data.py msd --input DIR --output DIR [flags]\n")
    assert re.findall(r"^  (--\w+)", text, re.M)[:2] == ["--input", "--output"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_version_and_revision(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of(script).parse_args(["--version"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.fullmatch(rf"dino3d {re.escape(__version__)} \(([0-9a-f]{{40}}\+?|unknown)\)\n", out)


def test_the_command_line_loads_neither_torch_nor_utils():
    code = (
        "import sys, dino3d.command_line; print([name for name in ('torch', 'utils', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "script, arguments, typed, meant",
    [
        ("main_dino", ["--batch_size", "8"], "--batch_size", "--batch_size_per_gpu"),
        ("main_dino", ["--data-dir", "x"], "--data-dir", "--data_dir"),
        ("main_dino", ["--data_dir", "x", "--epoch=3"], "--epoch", "--epochs"),
        ("main_dino", ["--arch", "vit-small"], "vit-small", "vit_small"),
        ("main_lnc_luna16", ["--protocol", "finetun"], "finetun", "finetune"),
        ("main_lts_msd", ["--decoder", "unter"], "unter", "unetr"),
        ("prepare_data", ["nlts"], "nlts", "nlst"),
        ("prepare_data", ["nlst", "--inptu", "x"], "--inptu", "--input"),
        ("prepare_data", ["msd", "--crop", "lable"], "lable", "label"),
        ("benchmark", ["stp"], "stp", "step"),
        ("benchmark", ["step", "--repeat", "1"], "--repeat", "--repeats"),
    ],
)
def test_a_near_miss_is_named(script, arguments, typed, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of(script).parse_args(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and typed in err and err.endswith(f": did you mean {meant}?\n")


@pytest.mark.parametrize(
    "script, arguments", [("main_dino", ["--xyzzy"]), ("prepare_data", ["xyzzy"]), ("main_dino", ["stray"])]
)
def test_what_resembles_nothing_gets_no_suggestion(script, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of(script).parse_args(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and arguments[0] in err and "did you mean" not in err and err.count("\n") == 1


def test_values_that_begin_with_a_dash_are_no_flags():
    parser = ArgumentParser(prog="x")
    parser.add_argument("--clip", nargs=2, type=number(float))
    assert parser.parse_args(["--clip", "-1000", "1000"]).clip == [-1000, 1000]


def test_did_you_mean_takes_names_that_begin_so_first():
    assert did_you_mean("--batch", ["--patch", "--batch_size_per_gpu"]) == ": did you mean --batch_size_per_gpu?"
    assert did_you_mean("--pacth", ["--patch", "--batch_size_per_gpu"]) == ": did you mean --patch?"


@pytest.mark.parametrize(
    "value, text",
    [
        ([96, 96, 48], "96 96 48"),
        (True, "true"),
        (1e-6, "1e-06"),
        (0.0005, "0.0005"),
        (65536, "65536"),
        ([-1000.0, 1000.0], "-1000 1000"),
        ("output", "output"),
    ],
)
def test_defaults_as_typed(value, text):
    assert format_values(value) == text
