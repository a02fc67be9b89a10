"""Files of flags: `@FILE` on every script's command line, and the recipes that are such files."""

import argparse
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_command_line import SCRIPTS, parser_of

from dino3d.command_line import ArgumentParser, number
from dino3d.flag_files import FileWord, read_flags
from dino3d.pretraining_flags import check_pretraining_flags

RECIPES = sorted(ROOT.glob("recipes/*.txt"))
PAPER = (  # flags of the paper's scripts that make up a recipe
    "arch patch_size out_dim norm_last_layer momentum_teacher use_bn_in_head warmup_teacher_temp teacher_temp "
    "warmup_teacher_temp_epochs weight_decay weight_decay_end clip_grad batch_size_per_gpu epochs freeze_last_layer lr "
    "warmup_epochs min_lr optimizer drop_path_rate input_size local_crops_number local_crops_scale clip_range "
    "use_rotation use_scale use_flip use_elastic use_gaussian use_histogram"
).split()


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def to_file(text, name="flags.txt"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return "@" + name

    return to_file


def refused(parser, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    return err


# --------------------------------------------------------------------------------------------------------------- files


LINES = [
    "--a 1 --b 'x y'  # the rest",
    '--a "say \\"#1\\"" # "not closed',
    "/data/run#3 a\\ #b c#",
    "'#' \"#\" \\# #gone",
    "  # only a comment, with an apostrophe: don't",
    "--name caf\u00e9 \u2028 x",
]


@pytest.mark.parametrize("line", LINES)
def test_words_are_those_of_a_shell(line, tmp_path):
    """Against bash itself, but for the comment's line, which a file of flags must not consist of alone."""
    (tmp_path / "flags.txt").write_text(f"--first\n{line}\n")
    (tmp_path / "words.sh").write_text(f"printf '%s\\0' --first {line}\n")
    shell = subprocess.run(["bash", tmp_path / "words.sh"], capture_output=True, check=True).stdout
    assert read_flags(str(tmp_path / "flags.txt")) == shell.decode().split("\0")[:-1]


def test_files_stand_where_they_are_named_and_later_flags_win(write):
    parser = parser_of("main_dino")
    recipe = write(
        "\ufeff# why\r\n--epochs 7 --lr=0.25\r\n--input_size 24 \\\r\n 24 12 --use_flip\r\n--clip_range\n-5 9\n"
    )
    args = parser.parse_args([recipe])
    assert (args.epochs, args.lr, args.input_size, args.use_flip, args.clip_range) == (
        7,
        0.25,
        [24, 24, 12],
        True,
        [-5, 9],
    )
    assert parser.parse_args([recipe, "--epochs", "9"]).epochs == 9
    assert parser.parse_args(["--epochs", "9", recipe]).epochs == 7
    assert parser.parse_args([recipe, write("--epochs 8", "later.txt")]).epochs == 8
    assert parser.words == [*read_flags(recipe[1:]), *read_flags("later.txt")]
    assert parser.parse_args(["--output_dir=@x"]).output_dir == "@x"
    expected = vars(
        parser.parse_args(shlex.split("--epochs 7 --lr=0.25 --input_size 24 24 12 --use_flip --clip_range -5 9"))
    )
    assert vars(args) == expected and json.dumps(vars(args)) == json.dumps(expected)


def test_values_are_plain_and_a_safe_load_takes_them(write, tmp_path):
    """Whatever type or choices a flag has: they go into config.json and into checkpoints."""
    args = vars(
        parser_of("main_dino").parse_args([write("--arch vit_tiny --data_dir x --precision fp32 --optimizer sgd")])
    )
    assert not any(isinstance(value, FileWord) for value in args.values())
    torch.save(args, tmp_path / "config.pth")
    assert torch.load(tmp_path / "config.pth", weights_only=True)["arch"] == "vit_tiny"


@pytest.mark.parametrize("script", (*SCRIPTS, "extract_features"))
def test_every_script_takes_them(script, write, capsys):
    parser = parser_of(script)
    assert "@FILE" in parser.format_help() and "docs/recipes.md" in parser.format_help()
    subs = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    command = list(subs[0])[:1] if subs else []
    assert "(flags.txt, line 3)" in refused(parser, [*command, write("\n\n--xyzzy 1\n")], capsys)


def test_sub_commands_take_them(write, capsys):
    args = parser_of("prepare_data").parse_args(["msd", write("--input a --output 'b c'"), "--workers", "2"])
    assert (args.command, args.input, args.output, args.workers) == ("msd", Path("a"), Path("b c"), 2)
    err = refused(parser_of("prepare_data"), ["msd", write("--input a\n--crop lable"), "--output", "b"], capsys)
    assert err.endswith(" (flags.txt, line 2): did you mean label?\n")


def test_what_may_be_given_twice_may_be_so_in_a_file(write):
    parser = ArgumentParser(prog="x")
    parser.add_argument("--input", action="append")
    assert parser.parse_args([write("--input a\n--input b")]).input == ["a", "b"]


@pytest.mark.parametrize(
    "text, place, what",
    [
        ("--epochs 3\n\n--epohcs 4", 3, "unrecognized argument --epohcs (flags.txt, line 3): did you mean --epochs?"),
        ("--lr 1\n--epochs x", 2, "argument --epochs: 'x' is not an integer"),
        ("--lr 1\n--epochs=0\n", 2, "argument --epochs: 0 is out of range"),
        ("--arch vit-small", 1, "vit-small: unknown architecture"),
        ("--lr 1\n\n--optimizer adam", 3, "adam: choose one of"),
        ("--input_size 1 2\n--lr 1", 1, "argument --input_size: expected 3 arguments"),
        ("--lr 1\n--epochs", 2, "argument --epochs: expected one argument"),
        ("# x\nepochs 3", 2, "expected a flag first, such as --arch vit_small, found epochs"),
        ("--lr 1\nepochs 3", 2, "epochs: no flag takes it"),
        ("--lr 1\n--epochs 3 # 4\n--epochs 4", 3, "--epochs stands in line 2 already"),
        ("--lr 1\n@other.txt", 2, "@other.txt: a file of flags takes no other one"),
        ("--lr 1\n--data_dir 'x", 2, "no closing quotation"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(text, place, what, write, capsys):
    err = refused(parser_of("main_dino"), ["--data_dir", "x", "--epochs", "2", write(text), "--epochs", "1"], capsys)
    assert f"flags.txt, line {place}" in err and what in err


def test_what_is_wrong_on_the_command_line_is_not_laid_on_the_file(write, capsys):
    parser, good = parser_of("main_dino"), write("--epochs 3")
    assert "flags.txt" not in refused(parser, [good, "--epochs", "x"], capsys)
    assert "flags.txt" not in refused(parser, [good, "--lr", "x"], capsys)
    required = ArgumentParser(prog="x")
    required.add_argument("--epochs", type=number(int))
    required.add_argument("--input", required=True)
    assert "flags.txt" not in refused(required, [good], capsys)


@pytest.mark.parametrize(
    "content", [b"", b"\n# nothing\n", b"\xff\xfe-\x00", b"--lr \0", b"--lr 1\n" * (1 << 18), None]
)
def test_no_file_of_flags(content, write, tmp_path, capsys):
    name = write(content, "bad.txt") if content is not None else "@bad.txt"
    err = refused(parser_of("main_dino"), ["--data_dir", "x", name], capsys)
    assert "bad.txt: " in err and len(err) < 300


@pytest.mark.parametrize("name", ["@", "@.", "@a\0b"])
def test_no_file_at_all(name, write, capsys):
    assert "@" in refused(parser_of("main_dino"), [name], capsys)


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_understood_and_says_why(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comments = [line for line in path.read_text().splitlines()[:3] if line.startswith("# ")]
    assert [line.split(":")[0].split(" (")[0] for line in comments] == ["# Why", "# For", "# Measured"]
    parser = parser_of("main_dino")
    check_pretraining_flags(parser, parser.parse_args([f"@{path.relative_to(ROOT)}", "--data_dir", "x"]))
    page = (ROOT / "docs/recipes.md").read_text()
    assert f"recipes/{path.name}" in page


def test_the_papers_recipe_is_the_defaults():
    parser = parser_of("main_dino")
    words = [f"@{ROOT / 'recipes/paper.txt'}"]
    recipe, defaults = (parser.parse_args([*given, "--data_dir", "x"]) for given in (words, []))
    for args in (recipe, defaults):
        check_pretraining_flags(parser, args)
    assert vars(recipe) == vars(defaults)
    given = {word.removeprefix("--") for word in read_flags(words[0][1:]) if word.startswith("--")}
    assert given >= set(PAPER)
    assert given >= {"center_momentum"}  # DINO's, which the paper doesn't name
