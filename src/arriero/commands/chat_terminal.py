"""A conversation at a terminal, or of the lines of a pipe: what is read, what is shown, and how an answer is stopped."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from arriero.commands.terminal import without_controls
from arriero.errors import GenerationError

COMMANDS = "/clear begins a new conversation, /exit or Ctrl-D ends, /help tells this; Ctrl-C stops an answer."

Turns = list[dict[str, str]]
# Whether an answer is to stop.
Stopped = Callable[[], bool]
# The pieces of the answer to a conversation, until it is to stop.
Answer = Callable[[Turns, Stopped], Iterator[str]]


def show_answer(pieces: Iterator[str]) -> str:
    """Print an answer as it comes, and return it as it came."""
    told = []
    for piece in pieces:
        print(without_controls(piece), end="", flush=True)
        told.append(piece)
    print()
    return "".join(told)


def talk(start: Turns, answer: Answer, what: str) -> bool:
    """A message, an answer, and so on, until /exit or the end of the input.

    Args:
        start: what stands before every conversation.
        what: the model, for the first line.

    Returns:
        Whether all messages of a pipe were answered. At a terminal that is between the user and the model.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        _edit_lines()
        print(f"{what}. {COMMANDS}")
    turns, answered = list(start), True
    while True:
        try:
            message = input("> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                print()
            return answered
        if message in ("/exit", "/quit"):
            return answered
        if message == "/clear":
            turns = list(start)
        elif message == "/help":
            print(COMMANDS)
        elif message:  # a pasted text may begin with an empty line, and what comes after it is not for the shell
            turns.append({"role": "user", "content": message})
            said = _say(turns, answer, at_terminal)
            if said is None:  # templates want the roles in turns
                turns.pop()
                answered = at_terminal
            else:
                turns.append({"role": "assistant", "content": said})


def _say(turns: Turns, answer: Answer, at_terminal: bool) -> str | None:
    """The answer as far as it came; None if it was stopped before it began, or cannot be given, which is said."""
    try:
        with _first_interrupt_noted() if at_terminal else contextlib.nullcontext(lambda: False) as stopped:
            said = show_answer(answer(turns, stopped))
            return None if stopped() and not said else said
    except GenerationError as error:  # the conversation outgrew the context: say so and go on
        where = sys.stdout if at_terminal else sys.stderr
        print(f"{'' if at_terminal else 'arriero: '}{error} (/clear starts afresh)", file=where, flush=True)
        return None


@contextmanager
def _first_interrupt_noted() -> Iterator[Stopped]:
    """Within it the first Ctrl-C is only noted, since an engine may not be left in the midst of a step; the second ends."""
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def unread_input_dropped() -> Iterator[None]:
    """What is typed or pasted and not read when this ends does not reach the shell that started the command."""
    try:
        yield
    finally:
        with contextlib.suppress(ImportError, OSError, ValueError):
            import termios

            terminal = sys.stdin.fileno()
            if os.isatty(terminal) and os.tcgetpgrp(terminal) == os.getpgrp():
                with contextlib.suppress(termios.error):
                    termios.tcflush(terminal, termios.TCIFLUSH)


def _edit_lines() -> None:
    """Let `input` edit lines of any length, with a history in memory, and take a paste with its line breaks as one line."""
    if not sys.stdout.isatty():  # then `input` does not either
        return
    with contextlib.suppress(ImportError):  # Windows; its console edits lines itself
        importlib.import_module("readline").parse_and_bind("set enable-bracketed-paste on")
