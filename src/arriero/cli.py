"""The `arriero` command: finds the verb, parses its options, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done; 1 a defect of arriero, or a server that answered nothing (`bench serve`); 2 something the user can mend;
130 interrupted; 141 the reader of the output left; 143 asked to end (SIGTERM).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

from arriero import __version__
from arriero.commands.table import VERBS, load_verb
from arriero.commands.terminal import printable
from arriero.errors import ArrieroError

__all__ = ["VERBS", "main"]

_EXIT_DEFECT = 1
_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141
_EXIT_TERMINATED = 143
# Verbs that write beside their output's place first, or have processes of their own: at SIGTERM they remove the one and end the
# other. Runs have an answer of their own.
_TIDY = ("convert", "merge", "quantize", "export", "download", "preprocess")
_RUNS = ("pretrain", "finetune")


class _Terminated(BaseException):
    """SIGTERM arrived."""


def overview() -> str:
    """The page of `arriero --help`."""
    lines = [
        "usage: arriero [--debug] COMMAND [options]",
        "",
        "One tool for the whole life of a LLaMA-family model.",
        "",
        "Commands:",
    ]
    lines += [f"  {name:<12} {help_line}" for name, (_, help_line) in VERBS.items()]
    lines += [
        "",
        "`arriero COMMAND --help` lists the options of a command.",
        "`arriero --version` prints the version; --debug shows the traceback of an error.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: None for that of this process, which ends then.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(arguments)
    if debug and arguments[:1] == ["launch"]:
        os.environ["ARRIERO_DEBUG"] = "1"  # for what it starts
    error_file = None
    if "ARRIERO_ERROR_FILE" in os.environ:  # of the launcher
        from arriero.parallel.launching.report import take_error_file

        error_file = take_error_file()
    try:
        with _tidy_end(arguments, last=argv is None), _early_end(arguments, last=argv is None):
            code = _run(arguments)
            sys.stdout.flush()
        return code
    except _Terminated as error:
        return _end(error, "asked to end (SIGTERM)", _EXIT_TERMINATED, error_file, debug)
    except BrokenPipeError as error:
        # The reader (`head`, `less`) left. Python flushes stdout once more at exit: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _end(error, "", _EXIT_BROKEN_PIPE, error_file, debug=False)
    except KeyboardInterrupt as error:
        return _end(error, "interrupted", _EXIT_INTERRUPTED, error_file, debug)
    except ArrieroError as error:
        return _end(error, " ".join(str(error).split()), error.exit_code, error_file, debug)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("arriero"):
            return _defect(error, error_file, debug)
        message = (
            f"{error.name.partition('.')[0]} is needed for this and is not installed here: pip install . in arriero's "
            "repository (one that only runs bundles is without it, see docs/export.md)"
        )
        return _end(error, message, ArrieroError.exit_code, error_file, debug)
    except Exception as error:
        return _defect(error, error_file, debug)


def _defect(error: Exception, error_file: Path | None, debug: bool) -> int:
    """Still one line, and how to see more."""
    detail = " ".join(str(error).split())[:500]
    hint = "" if debug else " (run it again with --debug for the traceback)"
    message = f"internal error: {type(error).__name__}: {detail}{hint}"
    return _end(error, message, _EXIT_DEFECT, error_file, debug)


@contextlib.contextmanager
def _tidy_end(arguments: Sequence[str], *, last: bool) -> Iterator[None]:
    """Within it, SIGTERM unwinds the stack; a second one ends the process at once.

    Args:
        last: nothing comes after it in this process. Python takes a while to end where torch is loaded; a signal that comes
            then would kill it although all is written, and is ignored instead.
    """
    single = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    if not arguments or arguments[0] not in _TIDY or not single:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    done = False
    try:
        yield
        done = last
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if done else before)
        if done:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _early_end(arguments: Sequence[str], *, last: bool) -> AbstractContextManager[object]:
    """Within it, a signal to a run that has not made a step yet, and may still be importing, ends it in one line."""
    if not arguments or arguments[0] not in _RUNS:
        return contextlib.nullcontext()
    from arriero.early_signals import EarlySignals

    return EarlySignals(last=last)


def _end(error: BaseException, message: str, exit_code: int, error_file: Path | None, debug: bool) -> int:
    """Say what went wrong, to the launcher if there is one, else to the user."""
    trace = "".join(traceback.format_exception(error)) if debug else ""
    message = printable(message)  # it may quote a file
    if error_file is not None:
        from arriero.parallel.launching.report import leave, report_of

        report = report_of(error, message, exit_code, trace)
        report.write(error_file)
        return leave(report)
    sys.stderr.write(trace)
    if message:
        _complain(message)
    return exit_code


def _take_debug(arguments: list[str]) -> bool:
    """Remove `--debug` from before the verb, or from anywhere but the part that `launch` passes on."""
    verb = next((index for index, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    end = verb if arguments[verb : verb + 1] == ["launch"] else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    found = len(kept) < end
    arguments[:end] = kept
    return found or os.environ.get("ARRIERO_DEBUG", "") not in ("", "0")


def _complain(message: str) -> None:
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    prefix = "arriero: " if rank is None else f"arriero [rank {rank}]: "
    print(f"{prefix}{message}", file=sys.stderr, flush=True)


def _run(arguments: list[str]) -> int:
    if not arguments:
        sys.stderr.write(overview())
        return ArrieroError.exit_code
    first = arguments[0]
    if first in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0
    if first in ("-V", "--version"):
        print(f"arriero {__version__}")
        return 0
    verb = load_verb(first)
    from arriero.config.parser import HelpRequested, parse

    try:
        groups = parse(verb.options, arguments[1:], verb.prog)
    except HelpRequested:
        from arriero.config.help_page import format_help

        sys.stdout.write(format_help(verb.prog, verb.help, verb.options))
        return 0
    if "ARRIERO_RESTART" in os.environ:  # of the launcher
        from arriero.config.checkpoint import CheckpointOptions
        from arriero.parallel.launching.resuming import resume_if_restarted

        for group in groups:
            if isinstance(group, CheckpointOptions):
                resume_if_restarted(group)
    return verb.run(*groups)
