"""One option of a command: a dataclass field that also carries its help line, its bounds and its other names.

A *group* is a dataclass that inherits `OptionGroup` and whose fields are made by `option`. A verb lists the groups it
takes. Nothing here imports torch: `arriero VERB --help` must answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError

_METADATA_KEY = "arriero"


class _Required:
    """The default of an option that must be given."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()


@dataclass(frozen=True)
class _Metadata:
    help: str
    choices: tuple[str, ...] | None
    aliases: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    above: float | None
    below: float | None
    positional: bool
    alone: bool
    remainder: bool
    split: bool
    only_with: tuple[str, ...]
    unless: str


def option(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    positional: bool = False,
    alone: bool = False,
    remainder: bool = False,
    split: bool = True,
    only_with: str | Sequence[str] = (),
    unless: str = "",
) -> Any:
    """A dataclass field that is an option of the command line and a key of a configuration file.

    Args:
        default: its default; a list is copied for each instance; `REQUIRED` if it must be given.
        help: one line, shown by `--help`.
        choices: the words allowed (also for every item of a list); matched without regard to case.
        aliases: other names that mean the same.
        minimum, maximum: inclusive bounds of a number; `above`, `below`: exclusive ones.
        positional: given by its place on the command line (as well as by `--name`).
        alone: may stand without its name too, in a verb that has no positional options.
        remainder: a positional list that takes everything that follows, options included.
        split: whether an item of a list option is split at commas and blanks (`--x a,b` = `--x a b`).
        only_with: names of options of which one must be on for this one to have any effect; else a warning is printed.
        unless: name of an option that, when given, makes this required folder unnecessary.
    """
    metadata = _Metadata(
        help=help,
        choices=None if choices is None else tuple(choices),
        aliases=tuple(aliases),
        minimum=minimum,
        maximum=maximum,
        above=above,
        below=below,
        positional=positional,
        alone=alone,
        remainder=remainder,
        split=split,
        only_with=(only_with,) if isinstance(only_with, str) else tuple(only_with),
        unless=unless,
    )
    stored = {_METADATA_KEY: metadata}
    if default is REQUIRED:
        return dataclasses.field(metadata=stored)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=stored)
    return dataclasses.field(default=default, metadata=stored)


@dataclass(frozen=True)
class OptionSpec:
    """What the parser and the help page know about one option.

    `kind` is bool, int, float, str or Path: the type of the value, or of each item if `is_list`.
    """

    name: str
    kind: type
    is_list: bool
    optional: bool
    default: Any
    group: type
    help: str
    choices: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    positional: bool = False
    alone: bool = False
    remainder: bool = False
    split: bool = True
    only_with: tuple[str, ...] = ()
    unless: str = ""

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def bounds_problem(self, value: float) -> str | None:
        """What is wrong with a number, or None. NaN and infinities are always refused."""
        if not math.isfinite(value):
            return "it must be a finite number"
        if self.minimum is not None and value < self.minimum:
            return f"it must be at least {self.minimum:g}"
        if self.maximum is not None and value > self.maximum:
            return f"it must be at most {self.maximum:g}"
        if self.above is not None and value <= self.above:
            return f"it must be more than {self.above:g}"
        if self.below is not None and value >= self.below:
            return f"it must be less than {self.below:g}"
        return None


def _resolve_type(hint: Any, where: str) -> tuple[type, bool, bool]:
    """(kind, is_list, optional) of a type hint."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        if len(members) != 1:
            raise TypeError(f"{where}: a union of several types cannot be an option")
        hint = members[0]
    is_list = typing.get_origin(hint) in (list, tuple)
    if is_list:
        hint = typing.get_args(hint)[0]
    if hint not in (bool, int, float, str, Path):
        raise TypeError(f"{where}: {hint} cannot be an option")
    return hint, is_list, optional


_SPECS: dict[type, tuple[OptionSpec, ...]] = {}


def specs_of(group: type) -> tuple[OptionSpec, ...]:
    """The options of a group, in the order of its fields (fields not made by `option` are not options)."""
    if group not in _SPECS:
        _SPECS[group] = _read_specs(group)
    return _SPECS[group]


def _read_specs(group: type) -> tuple[OptionSpec, ...]:
    hints = typing.get_type_hints(group)
    specs = []
    for field in dataclasses.fields(group):
        metadata = field.metadata.get(_METADATA_KEY)
        if metadata is None:
            continue
        kind, is_list, optional = _resolve_type(hints[field.name], f"{group.__name__}.{field.name}")
        default: Any = REQUIRED
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        specs.append(
            OptionSpec(
                name=field.name,
                kind=kind,
                is_list=is_list,
                optional=optional,
                default=default,
                group=group,
                **dataclasses.asdict(metadata),
            )
        )
    return tuple(specs)


def option_table(groups: Sequence[type]) -> dict[str, OptionSpec]:
    """Every name an option of these groups may be called by.

    Where an alias of one option is the name of another, the name wins.
    """
    table: dict[str, OptionSpec] = {}
    for group in groups:
        for spec in specs_of(group):
            if spec.name in table:
                raise ValueError(f"{spec.name} is an option of {table[spec.name].group.__name__} and {group.__name__}")
            table[spec.name] = spec
    for spec in list(table.values()):
        for alias in spec.aliases:
            table.setdefault(alias, spec)
    return table


def title(group: type) -> str:
    """The heading of a group: the first line of its docstring without the full stop."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


@dataclass(kw_only=True)
class OptionGroup:
    """Base of every option group: checks bounds and choices, be it built from flags, a file or Python."""

    def __post_init__(self) -> None:
        check_values(self)


def check_values(group: Any) -> None:
    """Raises ConfigError for a number outside its bounds or a word outside its choices."""
    for spec in specs_of(type(group)):
        value = getattr(group, spec.name)
        if value is None:
            continue
        for item in value if spec.is_list else [value]:
            if spec.kind in (int, float) and isinstance(item, int | float):
                problem = spec.bounds_problem(item)
                if problem:
                    raise ConfigError(f"--{spec.name} is {item}: {problem}")
            elif spec.choices is not None and str(item) not in spec.choices:
                raise ConfigError(f"--{spec.name} is {str(item)!r}: choose one of {', '.join(spec.choices)}")
