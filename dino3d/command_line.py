"""The command line: flags, and errors that end a process in one line. Imports no torch."""

import argparse
import codecs
import difflib
import io
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dino3d import __version__, flag_files


class UserError(Exception):
    """An expected failure, told in one line: which file or flag, what was found, what to do.

    everywhere: all ranks raise it alike, so that one of them may tell it for all.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class Preempted(Exception):
    """A signal asked the run to end, everything is saved, and all ranks know. code: to exit with"""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
XYZ = ("X", "Y", "Z")  # metavar of what is given per axis
CHECKPOINT_KEY = "teacher"  # of a pre-training run's two networks the better one
ENOUGH_FILES = 1 << 16
EXIT_INTERRUPTED = 130  # as shells tell that Ctrl-C ended a program
# Seconds in which a second signal is no second request: a launcher passes on what all have got already
ONE_REQUEST = 1.0


def process_rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def print_error(message: str, everywhere: bool = False) -> None:
    rank = process_rank()
    short = everywhere and rank > 0
    print(f"error: rank {rank} stops as rank 0 does" if short else f"error: {message}", file=sys.stderr, flush=True)


def exit_status(
    main: Callable[[], None], explain: Callable[[Exception], str | None] = lambda error: None
) -> tuple[int, bool]:
    """Call main() and tell why it ended early; returns the exit code, and whether all ranks end in the same way.

    explain: gives one line for an exception besides those of this module and of the disk, None for a bug, which is
    raised
    """
    set_up_console()
    limit = allow_open_files()
    interruption, hook = Interruption(), sys.unraisablehook
    try:
        try:
            main()
        finally:
            sys.unraisablehook = lambda what: None  # of what is given up half made, such as a loader
            end_workers()
        return 0, True
    except Preempted as ending:
        if not process_rank():
            print(ending, file=sys.stderr, flush=True)
        return ending.code, True
    except UserError as error:
        print_error(str(error), error.everywhere)
        return 1, error.everywhere  # otherwise the others wait for this rank in a collective, and would be waited for
    except KeyboardInterrupt:
        print_error("interrupted", everywhere=True)
        return EXIT_INTERRUPTED, False
    except Exception as error:
        message = explain(error)
        if "Too many open files" in str(error):
            message = (
                f"too many open files at once ({limit} are allowed): allow more (ulimit -n 4096), or lower the number "
                "of reading processes (--num_workers, --workers)"
            )
        elif message is None and isinstance(error, OSError):
            message = str(error)  # a full disk, a folder that vanished: it says what and where
        if message is None:
            raise
        print_error(message)
        return 1, False
    finally:
        interruption.ignore_repeated()
        sys.unraisablehook = hook


class Interruption:
    """Ctrl-C raises KeyboardInterrupt once; a second one, a second later or more, ends this process at once.

    Also where a shell that started this process in the background lets it ignore Ctrl-C, and `kill -INT` with it. The
    process is taken for ended when main() has: the handler stays.
    """

    def __init__(self) -> None:
        self._process, self._at = os.getpid(), None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._heed)

    def ignore_repeated(self) -> None:
        """Raise nothing any more: what is left to do is to end."""
        self._at = self._at or -ONE_REQUEST

    def _heed(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked one: the main process ends it
            return
        if self._at is None:
            self._at = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._at > ONE_REQUEST:
            end_at_once(number)


def end_at_once(number: int) -> None:
    """End this process as the signal would have without us, and the reading processes with it."""
    end_workers()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_workers() -> None:
    """Kill the loaders' reading processes that are left: they don't heed the signal with which Python would end
    them."""
    if threading.current_thread() is not threading.main_thread():
        return
    heeded = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for an error
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join(1)  # one that the system holds in a read stays until that ends
    signal.signal(signal.SIGCHLD, heeded)


def end_process(message: str) -> NoReturn:
    """Tell why and end this process at once, from any thread, waiting for nothing: its workers may be held in a
    read."""
    os.write(2, f"error: {message}\n".encode(errors="surrogateescape"))  # no lock, which the main thread may hold
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)


# ------------------------------------------------------------------------------------------------------------- console


ASCII = {"\N{PLUS-MINUS SIGN}": "+-", "\N{MULTIPLICATION SIGN}": "x"}  # on a terminal that has only that


def _replace_for_console(error: UnicodeError) -> tuple[str, int]:
    """Error handler of the console: what it can't show, names of any bytes among it, as plain ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(one) or one.encode("ascii", "backslashreplace").decode() for one in text), error.end


codecs.register_error("console", _replace_for_console)


class LastingFile(io.FileIO):
    """A console that may go away: `... | head`, a closed terminal, a full disk below a log end no run."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def set_up_console() -> None:
    """Let standard output and error take any text, be no reason for a run to end, and show each line at once, also
    where a file or a pipe takes them.

    Where one was closed (`2>&-`), the next file that is opened would take its number, and what C libraries and dying
    processes write there would go into it.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)  # open() takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if descriptor == 0 else "w", encoding="utf-8"))
    for name, original in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        stream = getattr(sys, name)
        if stream is original and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            binary = io.BufferedWriter(LastingFile(stream.fileno(), "wb", closefd=False))
            stream = io.TextIOWrapper(binary, stream.encoding, "console", line_buffering=True)
            setattr(sys, name, stream)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="console", line_buffering=True)


def allow_open_files() -> int:
    """Allow this process as many open files as it may have, which is often more than it begins with; returns that."""
    try:
        import resource
    except ImportError:  # another system, which sets no such limit
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (OSError, ValueError):
            pass
    return soft


def available_cores() -> int:
    """CPU cores that this machine grants."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_revision() -> str:
    """The commit of this code, with + where files differ from it; "unknown" outside a checkout."""
    try:
        here = Path(__file__).resolve().parent
        described = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        return described.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


# --------------------------------------------------------------------------------------------------------------- flags


class HelpFormatter(argparse.HelpFormatter):
    """Defaults as they are typed, and short placeholders: N for a whole number, F for any other."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", [], argparse.SUPPRESS) or action.const is True and action.nargs == 0:
            return action.help
        return f"{action.help} (default: {format_values(action.default)})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "metavar", "NAME")

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if action.option_strings and action.metavar is None:  # otherwise {a,b,c} of choices, which the help text lists
            return lambda size: (default_metavar,) * size
        return super()._metavar_formatter(action, default_metavar)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors in one line that name what was probably meant, and where it stands in a file of flags
    (`@FILE`). -h and --version: see `help_flags`."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("epilog", "@FILE among the flags stands for those in a file, see docs/recipes.md")
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, add_help=False, **kwargs)
        self.words = []  # of the command line, with those of files in their place

    def is_given(self, args: argparse.Namespace, name: str) -> bool:
        """Whether a flag was given, also with its default's value. For numbers with a point and lists, which are new
        objects where they are parsed; small whole numbers are not."""
        return getattr(args, name) is not self.get_default(name)

    def error(self, message: str) -> NoReturn:
        message, *suggestion = message.partition(": did you mean")
        message += flag_files.place_of_error(self.words, self._option_string_actions)
        print_error(message + ("".join(suggestion) or " (see --help)"), True)
        sys.exit(2)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        try:
            args = flag_files.expand(sys.argv[1:] if args is None else args, self._option_string_actions)
        except ValueError as error:
            self.error(str(error))
        for word in args:
            flag = word.partition("=")[0]
            if not word.startswith("-") and self._subparsers:  # what follows a sub-command is for its own parser
                break
            if flag.startswith("--") and flag != "--" and " " not in flag and flag not in self._option_string_actions:
                unknown = f"unrecognized argument {flag}" + flag_files.place_of(word)
                self.error(unknown + did_you_mean(flag, self._option_string_actions))
        self.words = args
        namespace, extras = super().parse_known_args(args, namespace)
        for word in extras:
            if isinstance(word, flag_files.FileWord):
                self.error(f"{word}: no flag takes it{flag_files.place_of(word)}")
        return namespace, extras

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.nargs == argparse.PARSER:  # words for a sub-command, whose parser is to know their places
            return arg_string
        return super()._get_value(action, str(arg_string))  # a plain one: it goes into config.json and checkpoints

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(name) for name in action.choices]
            raise argparse.ArgumentError(
                action, f"{value}: choose one of {', '.join(names)}" + did_you_mean(str(value), names)
            )


class PrintVersion(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        print(f"dino3d {__version__} ({git_revision()})")
        parser.exit()


def help_flags(group: Any) -> None:
    """-h and --version, in the place of a script's help where they belong."""
    group.add_argument("-h", "--help", action="help", help="show this text and exit")
    group.add_argument(
        "--version",
        action=PrintVersion,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show the version and the git revision of this code and exit",
    )


def did_you_mean(word: str, names: Collection[str]) -> str:
    """ ": did you mean NAME?" for the nearest of the names, those first that begin with the word; "" where none is
    near."""
    longer = [name for name in names if name.startswith(word)]
    near = difflib.get_close_matches(word, longer or names, 1, 0 if longer else 0.6)
    return f": did you mean {near[0]}?" if near else ""


def format_values(value: Any) -> str:
    """A flag's value, or several numbers, as one types them after the flag."""
    if isinstance(value, bool):
        return str(value).lower()
    parts = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return " ".join(
        str(part) if isinstance(part, Integral) or not isinstance(part, Real) else f"{part:g}" for part in parts
    )


def boolean(text: str) -> bool:
    """argparse type: true/false, 1/0, on/off, yes/no."""
    values = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return values[text.lower()]


def number(
    kind: type[int] | type[float],
    low: float = -math.inf,
    high: float = math.inf,
    above: float | None = None,
    below: float | None = None,
) -> Callable[[str], float]:
    """argparse type: an int or float with low <= value <= high, above < value < below where those are given."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {'an integer' if kind is int else 'a number'}") from None
        fits = (
            low <= value <= high
            and (above is None or value > above)
            and (below is None or value < below)
            and math.isfinite(value)
        )
        if not fits:
            bounds = [f"at least {low}"] * (low > -math.inf) + [f"at most {high}"] * (high < math.inf)
            bounds += [f"above {above}"] * (above is not None) + [f"below {below}"] * (below is not None)
            expected = " and ".join(bounds) or "a finite number"
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {expected}")
        return value

    parse.metavar = "N" if kind is int else "F"
    return parse


def boolean_flag(group: Any, name: str, default: bool | None, text: str) -> None:
    """A flag that takes true or false, or stands alone for true."""
    group.add_argument(name, default=default, nargs="?", const=True, type=boolean, metavar="BOOL", help=text)


def checkpoint_key_flag(group: Any) -> None:
    """--checkpoint_key."""
    group.add_argument(
        "--checkpoint_key",
        default=CHECKPOINT_KEY,
        metavar="NAME",
        help="which network of the weights to load, where the file holds several: teacher (momentum and ema "
        "mean the same), student, or as the file names it, such as teacher_backbone or state_dict.model",
    )


def precision_flag(group: Any) -> None:
    """--precision."""
    group.add_argument(
        "--precision",
        default=None,
        choices=("bf16", "fp16", "fp32"),
        help="mixed precision of the matrix products: bf16, fp16 or fp32 (off); default: bf16 on GPUs and CPUs "
        "that multiply in it (CPUs: AVX512-BF16 or AMX), else fp16 on GPUs and fp32 on CPUs; a resumed run keeps "
        "its own",
    )


def max_skipped_steps_flag(group: Any) -> None:
    """--max_skipped_steps."""
    group.add_argument(
        "--max_skipped_steps",
        default=20,
        type=number(int, 1),
        help="how many steps in a row may have a non-finite (NaN) loss or gradient, and are skipped, "
        "before the run ends",
    )


def num_workers_flag(group: Any) -> None:
    """--num_workers."""
    group.add_argument(
        "--num_workers",
        default=None,
        type=number(int, 0),
        help="data loading workers per process; default: the cores that each process can have, at most 16",
    )


def older_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of older scripts, which are accepted."""
    group = parser.add_argument_group("older flags, accepted")
    group.add_argument(
        "--use_fp16", default=None, nargs="?", const=True, type=boolean, metavar="BOOL", help="replaced by --precision"
    )
    group.add_argument("--dist_url", default=None, metavar="URL", help="ignored: the launcher (torchrun, srun) sets it")
    group.add_argument(
        "--local_rank", "--local-rank", default=None, metavar="N", help="ignored: the launcher (torchrun, srun) sets it"
    )


def read_timeout_flag(group: Any) -> None:
    """--read_timeout."""
    group.add_argument(
        "--read_timeout",
        default=600.0,
        type=number(float, 0),
        metavar="SECONDS",
        help="longest that the reading of one file may take; then the run ends and names the file, "
        "where a network drive that hangs would stop it without a word. Raise it for tapes; 0: no "
        "limit. Not noticed with --num_workers 0",
    )


def architecture(known: Collection[str]) -> Callable[[str], str]:
    """argparse type: one of the names in `known`."""

    def parse(name: str) -> str:
        if name in known:
            return name
        raise argparse.ArgumentTypeError(
            f"{name}: unknown architecture, choose one of {', '.join(known)}" + did_you_mean(name, known)
        )

    return parse


def truncate_list(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def ignored_flags(**flags: Any) -> list[str]:
    """Notices about flags of older scripts that are given but no longer needed."""
    return [f"--{name} is no longer needed and ignored" for name, value in flags.items() if value is not None]
