"""Regular expressions for names of layers that a stranger's file holds: which may be matched without taking for ever."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

MAX_PATTERN = 2000  # characters of an expression
# Of one expression. Python's `re` may try every combination: a repetition multiplies the ways to match a name by the name's
# length, an optional part and two alternatives that can begin alike by two.
MAX_CHOICES = 5
# Of all entries of a table of expressions. Each is matched with every layer, which a choice makes ten times as long.
MAX_NAMES = 10_000
MAX_EXPRESSIONS = 500  # those that are no plain names
_MAX_WORK: int = 10**MAX_CHOICES

_NAME = re.compile(r"\^?(?:\w|\\?\.)+\$?", re.ASCII)

_TOKEN = re.compile(
    r"(?P<open>\((?!\?)|\(\?(?:[:=!>]|<[=!]|P<\w+>|i:))"  # no flags but i: others change what the rest means
    r"|(?P<other_group>\(\?)"
    r"|(?P<repeated_group>\)(?=[*+{]))"
    r"|(?P<close>\))"
    r"|(?P<quantifier>(?:[*+?]|\{[0-9]*,?[0-9]*\})[?+]?)"  # with the sign of a lazy or possessive one
    r"|(?P<bar>\|)"
    r"|(?P<any>\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dDsSwW]|\.)"
    r"|\\(?P<escaped>[^a-zA-Z0-9])"
    r"|(?P<unknown>\\.|[\^$])"  # also what matches no character
    r"|(?P<plain>.)",
    re.DOTALL,
)


class _Branch:
    """One alternative.

    Attributes:
        head: the characters that it certainly begins with; "" is one that may be any.
        choices: its cost.
    """

    def __init__(self) -> None:
        self.head: list[str] = []
        self.choices = 0
        self._open = True

    def add(self, character: str) -> None:
        if self._open:
            # Any alphabet but ASCII has letters that are one to `(?i:...)`.
            self.head.append(character.lower() if character.isascii() else "")

    def end_head(self) -> None:
        self._open = False

    def repeat_last(self) -> None:
        if self._open and self.head:  # it may be left out
            self.head.pop()
        self.end_head()
        self.choices += 1


def is_pattern(text: str) -> bool:
    """Whether an expression of a stranger's file may be matched with names of layers: short, valid where it is put, with few
    repetitions and choices and no repetition of a group, which could take for ever."""
    if len(text) > MAX_PATTERN:
        return False
    try:
        re.compile(rf"(.*\.)?({text})$")
    except (re.error, RecursionError, OverflowError):
        return False
    choices = _choices(text)
    return choices is not None and choices <= MAX_CHOICES


def are_too_many(texts: Collection[str]) -> bool:
    """Whether matching all of a table's expressions would take too long; those that are none of `is_pattern` count little."""
    if len(texts) > MAX_NAMES:
        return True
    expressions = [text for text in texts if not _NAME.fullmatch(text)]
    if len(expressions) > MAX_EXPRESSIONS:
        return True
    short = (text for text in expressions if len(text) <= MAX_PATTERN)
    return sum(int(10 ** min(_choices(text) or 0, MAX_CHOICES)) for text in short) > _MAX_WORK


def _choices(text: str) -> int | None:
    """The choices of a valid expression; None if it repeats a group, has one of an unknown kind, or closes one too many."""
    groups = [[_Branch()]]
    for match in _TOKEN.finditer(text):
        branch, kind = groups[-1][-1], match.lastgroup
        if kind in ("repeated_group", "other_group") or (kind == "close" and len(groups) == 1):
            return None
        if kind == "open":
            branch.end_head()
            groups.append([_Branch()])
        elif kind == "close":
            branches = groups.pop()
            groups[-1][-1].choices += _choices_of(branches) + _overlaps(branches)
        elif kind == "bar":
            groups[-1].append(_Branch())
        elif kind == "quantifier":
            branch.repeat_last()
        elif kind == "unknown":
            branch.end_head()
        else:
            branch.add("" if kind == "any" else match[kind or 0])
    # Alternatives that nothing else multiplies add their ways up.
    return _choices_of(groups[0])


def _choices_of(branches: Sequence[_Branch]) -> int:
    return sum(branch.choices for branch in branches)


def _overlaps(branches: Sequence[_Branch]) -> int:
    """How many more than one of a group's alternatives may match at one place, at most.

    Those with choices of their own count once: the product of their ways is at least the sum.
    """
    apart: list[list[list[str]]] = []  # sets of alternatives of which one alone can match
    for head in (branch.head for branch in branches if not branch.choices):
        home = next((heads for heads in apart if all(_differ(head, other) for other in heads)), None)
        if home is None:
            apart.append([head])
            if len(apart) > MAX_CHOICES + 1:
                break  # too many already
        else:
            home.append(head)
    return len(apart) + any(branch.choices for branch in branches) - 1


def _differ(one: Sequence[str], other: Sequence[str]) -> bool:
    return any(a and b and a != b for a, b in zip(one, other, strict=False))
