"""The `arriero` command: finds the verb, parses its options, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done; 1 a defect of arriero; 2 something the user can mend; 130 interrupted; 141 the reader of
the output left.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from arriero import __version__
from arriero.commands.table import LATER, VERBS, load_verb
from arriero.errors import ArrieroError

__all__ = ["VERBS", "main"]

_EXIT_DEFECT = 1
_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141


def overview() -> str:
    """The page of `arriero --help`."""
    lines = [
        "usage: arriero [--debug] COMMAND [options]",
        "",
        "One tool for the whole life of a LLaMA-family model.",
        "",
        "Commands:",
    ]
    lines += [f"  {name:<12} {help_line}" for name, (_, help_line) in VERBS.items() if name not in LATER]
    lines += ["", f"Not in this version ({__version__}) yet; their options parse already:"]
    lines += [f"  {name:<12} {help_line}" for name, (_, help_line) in VERBS.items() if name in LATER]
    lines += [
        "",
        "`arriero COMMAND --help` lists the options of a command.",
        "`arriero --version` prints the version; --debug shows the traceback of an error.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(arguments)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (`head`, `less`) left. Python flushes stdout once more at exit: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _complain("interrupted")
        return _EXIT_INTERRUPTED
    except ArrieroError as error:
        if debug:
            traceback.print_exc()
        _complain(" ".join(str(error).split()))
        return error.exit_code
    except Exception as error:  # a defect: still one line, and how to see more
        if debug:
            traceback.print_exc()
        detail = " ".join(str(error).split())[:500]
        hint = "" if debug else " (run it again with --debug for the traceback)"
        _complain(f"internal error: {type(error).__name__}: {detail}{hint}")
        return _EXIT_DEFECT


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
    return verb.run(*groups)
