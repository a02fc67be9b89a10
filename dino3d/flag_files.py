"""Files of flags: `@FILE` on a command line stands for the flags in it, such as a recipe's. Imports no torch."""

import re
import shlex
from argparse import Action, ArgumentError, ArgumentParser, _AppendAction
from collections.abc import Collection, Mapping, Sequence

LARGEST_FILE = 1 << 20  # what is larger is no file of flags
# A line up to its comment: as in a shell # begins one only where a word could begin, and not inside of quotes
UNCOMMENTED = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.\#*|(?<=\S)\#|[^\\'"#])*""")


class FileWord(str):
    """A word of a file of flags, which knows where it stands. place: "FILE, line N" """

    place: str

    def __new__(cls, text: str, place: str) -> "FileWord":
        word = super().__new__(cls, text)
        word.place = place
        return word


def is_file(word: str) -> bool:
    return word.startswith("@") and not isinstance(word, FileWord)


def expand(words: Sequence[str], actions: Mapping[str, Action]) -> list[str]:
    """The words of a command line with each @FILE replaced by the words in that file. actions: {flag: its action}

    Raises ValueError for a file that can't be read or is no file of flags
    """
    several = {flag for flag, action in actions.items() if isinstance(action, _AppendAction)}
    return [word for given in words for word in (read_flags(given[1:], several) if is_file(given) else [given])]


def read_flags(path: str, several: Collection[str] = ()) -> list[FileWord]:
    """The words of a file of flags: split and quoted as in a shell, without its variables and patterns.

    several: flags that may stand there more than once
    Raises ValueError: what is wrong with it, and in which line
    """
    words, lines_of = [], {}
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        place = f"{path}, line {number}"
        line = line.rstrip()
        if re.search(r"(?<!\\)(\\\\)*\\$", line):  # as in a command over several lines
            line = line[:-1]
        end = UNCOMMENTED.match(line).end()
        try:
            new = shlex.split(line[:end] if line[end:].startswith("#") else line)
        except ValueError as error:
            raise ValueError(f"{place}: {str(error).lower()}: close the quotes") from error
        for word in new:
            flag = word.partition("=")[0]
            if word.startswith("@"):
                raise ValueError(
                    f"{place}: {word}: a file of flags takes no other one; name both on the command line (a value that "
                    f"begins with @ is given as --data_dir={word})"
                )
            if not words and not word.startswith("-"):
                raise ValueError(f"{place}: expected a flag first, such as --arch vit_small, found {word}")
            if re.match(r"--\w", word) and flag not in several and lines_of.setdefault(flag, number) != number:
                raise ValueError(f"{place}: {flag} stands in line {lines_of[flag]} already: keep one of them")
            words.append(FileWord(word, place))
    if not words:
        raise ValueError(f"{path}: holds no flags")
    return words


def _read_text(path: str) -> str:
    if not path:
        raise ValueError("@: expected the name of a file of flags after it, such as @recipes/paper.txt")
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"@{path}: can't be read ({reason}): expected a file of flags; a value that begins with @ is given as "
            "--data_dir=@NAME"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or len(data) > LARGEST_FILE:
        raise ValueError(f"{path}: is no file of flags: expected text (UTF-8) of at most 1 MiB")
    return text


def place_of(word: str) -> str:
    """ " (FILE, line N)" of a word of a file, "" of others."""
    return f" ({word.place})" if isinstance(word, FileWord) else ""


def place_of_error(words: Sequence[str], actions: Mapping[str, Action]) -> str:
    """`place_of` of the first flag among the words that does not take what follows it. actions: {flag: its action}"""
    starts = [i for i, word in enumerate(words) if word.partition("=")[0] in actions]
    for start, end in zip(starts, [*starts[1:], len(words)]):
        trial = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        action = actions[words[start].partition("=")[0]]
        if action.nargs == 0:
            continue
        trial._add_action(action)
        try:
            trial.parse_known_args(words[start:end])
        except ArgumentError:
            return place_of(words[start])
    return ""
