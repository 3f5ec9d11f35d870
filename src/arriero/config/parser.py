"""Command line + configuration file + defaults -> option groups.

    parse((ModelOptions, DataOptions), ["--dtype", "bfloat16", "run.yaml"], "arriero evaluate")

Flags win over the file, the file wins over defaults. `--flag value`, `--flag=value`, `--some-flag` for `--some_flag`; a
bool is `--flag`, `--flag 1`, `--flag False`; a list is `--x a b` or `--x a,b`. Names are never abbreviated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arriero.config import compatibility
from arriero.config.elsewhere import hint as hint_elsewhere
from arriero.config.elsewhere import training_option
from arriero.config.implied import refuse_adapter_as_model, take_base_of_adapter, take_learning_rate
from arriero.config.option import OptionSpec, check_values, option_table, specs_of
from arriero.config.values import FALSE_WORDS, KIND_NAMES, TRUE_WORDS, convert, show
from arriero.errors import ConfigError

_BOOL_WORDS = TRUE_WORDS | FALSE_WORDS
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_NAMES_SHOWN = 6


class HelpRequested(Exception):
    """The user asked for the help page of a verb."""


def _is_flag(token: str) -> bool:
    return token.startswith("--") and len(token) > 2


class _Scanner:
    """Reads a command line into names and untyped values.

    Attributes:
        flags: option name -> a string, a list of strings, or True (a bool without a value).
        config_files: the files named by `--config` or standing alone.
        positionals: the arguments without a name.
        idle: options of training that are taken, of which this command has none.
    """

    def __init__(
        self, argv: Sequence[str], table: dict[str, OptionSpec], prog: str, *, of_training: bool = False
    ) -> None:
        """
        Args:
            of_training: it may be the command line of a run: what only training needs has no effect.
        """
        self.tokens = list(argv)
        self.table = table
        self.prog = prog
        self.of_training = of_training
        self.takes_positionals = any(spec.positional for spec in table.values())
        self.takes_remainder = any(spec.remainder for spec in table.values())
        alone = next((spec for spec in table.values() if spec.alone), None)
        self.alone = None if self.takes_positionals else alone
        self.flags: dict[str, Any] = {}
        self.written: dict[str, str] = {}  # option name -> how the flag was written
        self.config_files: list[str] = []
        self.positionals: list[str] = []
        self.idle: list[str] = []

    def scan(self) -> None:
        while self.tokens:
            token = self.tokens.pop(0)
            if token in ("-h", "--help"):
                raise HelpRequested
            if token == "--":
                self.positionals += self.tokens
                self.tokens = []
            elif _is_flag(token):
                self._flag(token)
            else:
                self._argument(token)
        self._place_positionals()

    def _next_value(self) -> str | None:
        """The next token if it can be a value, taken; else None."""
        if not self.tokens or _is_flag(self.tokens[0]) or self.tokens[0] == "--":
            return None
        return self.tokens.pop(0)

    def _argument(self, token: str) -> None:
        if self.takes_positionals:
            self.positionals.append(token)
            if self.takes_remainder:
                self.positionals += self.tokens
                self.tokens = []
        elif token.lower().endswith(_CONFIG_SUFFIXES):
            self.config_files.append(token)
        elif self.alone is not None and not self.positionals and not token.startswith("-"):
            self.positionals.append(token)
        else:
            kind = "unknown option" if token.startswith("-") and len(token) > 1 else "unexpected argument"
            raise ConfigError(f"{kind} {show(token)}: options are given as --name value; see {self.prog} --help")

    def _flag(self, token: str) -> None:
        written, equals, attached = token[2:].partition("=")
        name = written.replace("-", "_")
        if name == "config":
            path = attached if equals else self._next_value()
            if not path:
                raise ConfigError("--config needs the path of a YAML or JSON file")
            self.config_files.append(path)
            return
        spec = self.table.get(name) or (training_option(name) if self.of_training else None)
        if spec is None:
            hint = hint_elsewhere(name, [*self.table, "config", "help", "debug"], self.prog, "--")
            raise ConfigError(f"unknown option --{written[:80]}: {hint or f'see {self.prog} --help'}")
        value: Any = attached
        if not equals and spec.is_list:
            value = list(iter(self._next_value, None))
        elif not equals and spec.kind is bool:
            value = self._bool_value()
        elif not equals:
            value = self._next_value()
        if value is None or value == []:
            several = "one or more of " if spec.is_list else ""
            raise ConfigError(f"--{written} needs a value ({several}{KIND_NAMES[spec.kind]}): --{written} VALUE")
        if name not in self.table:
            convert(spec, value, f"--{written}")
            self.idle.append(written)
            return
        earlier = self.written.get(spec.name, written)
        if earlier.replace("-", "_") != name and self.flags[spec.name] != value:
            raise ConfigError(f"--{earlier} and --{written} are the same option and differ: give one")
        self.flags[spec.name], self.written[spec.name] = value, written

    def _bool_value(self) -> str | bool:
        """A bool takes the next token only if it is yes or no, or if that token could be nothing else."""
        following = self.tokens[0] if self.tokens else "--"
        if following.strip().lower() in _BOOL_WORDS:
            return self.tokens.pop(0)
        stands_alone = self.takes_positionals or following.lower().endswith(_CONFIG_SUFFIXES)
        if _is_flag(following) or following in ("--", "-h") or stands_alone:
            return True
        return self.tokens.pop(0)

    def _place_positionals(self) -> None:
        """Give the arguments without a name to the positional options that have no value yet, in order."""
        waiting = self.positionals
        twice = ""
        for name, spec in self.table.items():
            if name != spec.name or not (spec.positional or spec is self.alone) or not waiting:
                continue
            if name in self.flags:
                twice = f"--{name} {show(self.flags[name])} is given too, and stands for the same; give one"
                continue
            if spec.is_list:
                self.flags[name], waiting = waiting, []
            else:
                self.flags[name], waiting = waiting[0], waiting[1:]
        if waiting:
            raise ConfigError(f"unexpected argument {show(waiting[0])}: {twice or f'see {self.prog} --help'}")


def _from_file(
    path: str, table: dict[str, OptionSpec], prog: str, warnings: list[str], *, of_training: bool
) -> dict[str, Any]:
    """The values of a file.

    Args:
        warnings: get a line about what is ignored.
        of_training: it may be a file of a run: what only training needs is ignored.
    """
    from arriero.config.files import read_config  # PyYAML is imported only when a file is given

    given = read_config(path)
    if of_training:
        named = {key: key.replace("-", "_") for key in given}
        ignored = [key for key, name in named.items() if name not in table and training_option(name) is not None]
        if ignored:
            more = f" and {len(ignored) - _NAMES_SHOWN} more" if len(ignored) > _NAMES_SHOWN else ""
            warnings.append(f"{path}: ignored, being of training alone: {', '.join(ignored[:_NAMES_SHOWN])}{more}")
        given = {key: value for key, value in given.items() if key not in ignored and not _unset(named[key], value)}
    return _named(given, table, path, prog, show_key=lambda key: f"{path}: {key}")


def _unset(name: str, value: Any) -> bool:
    """Whether a file of a run has no value for an option of training that needs none."""
    spec = training_option(name)
    return value is None and spec is not None and spec.optional


def _named(
    given: Mapping[str, Any], table: dict[str, OptionSpec], source: str, command: str, show_key: Callable[[str], str]
) -> dict[str, Any]:
    """The typed values of options that a file or a call names.

    Args:
        source: the file or function, for messages; `show_key` names a key in it.
        command: the verb or function.
    """
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        spec = table.get(name)
        if spec is None:
            hint = hint_elsewhere(name, table, command) or "no option of this command has that name"
            raise ConfigError(f"{source}: unknown key {show(key)}: {hint}")
        if spec.name in values:
            raise ConfigError(f"{source}: {key} and {written[spec.name]} are the same option: give one")
        written[spec.name] = key
        values[spec.name] = _converted(spec, value, show_key(key), table)
    return values


def _converted(spec: OptionSpec, value: Any, where: str, table: Mapping[str, OptionSpec]) -> Any:
    """`convert`; a word that is a choice of one other option alone is told to be that."""
    try:
        return convert(spec, value, where)
    except ConfigError as error:
        word = value.lower() if isinstance(value, str) else None  # a list of YAML's aliases as text could be endless
        others = {one.name for one in table.values() if word in (one.choices or ())} - {spec.name}
        if not spec.choices or len(others) != 1:
            raise
        raise ConfigError(f"{error} (which --{others.pop()} takes)") from None


def parse(groups: Sequence[type], argv: Sequence[str], prog: str, *, warn: bool = True) -> tuple[Any, ...]:
    """Build one instance of each group from a command line.

    Warnings about options that have no effect go to standard error.

    Args:
        groups: the dataclasses a verb takes.
        argv: the arguments after the verb.
        prog: e.g. `arriero finetune`, for messages.
        warn: whether warnings are printed.

    Raises:
        ConfigError: an unknown option, a value of the wrong kind, a missing value or an impossible combination.
        HelpRequested: `--help` or `-h` was given.
    """
    table = option_table(groups)
    of_training = any(getattr(group, "TAKES_FILES_OF_TRAINING", False) for group in groups)
    scanner = _Scanner(argv, table, prog, of_training=of_training)
    scanner.scan()
    values: dict[str, Any] = {}
    warnings = [f"--{name} has no effect on a plan" for name in scanner.idle]
    for path in scanner.config_files:
        values.update(_from_file(path, table, prog, warnings, of_training=of_training))
    for name, raw in scanner.flags.items():
        spec = table[name]
        where = name.upper() if spec.positional else f"--{name}"
        try:
            values[name] = raw if spec.remainder else _converted(spec, raw, where, table)
        except ConfigError as error:
            if not (spec.positional and spec.choices and "model_name_or_path" in table):
                raise
            raise ConfigError(f"{error}; a model is named by --model_name_or_path") from None
    refuse_adapter_as_model(groups, values, prog)
    return _build(groups, values, frozenset(scanner.flags), f"see {prog} --help", warnings, warn=warn)


def from_keywords(groups: Sequence[type], keywords: Mapping[str, Any], function: str) -> tuple[Any, ...]:
    """Build one instance of each group from the keyword arguments of a Python function: `parse` for callers in Python.

    Values are checked as those of a configuration file are; a path may also be an `os.PathLike`.

    Args:
        function: its name, for messages.

    Raises:
        ConfigError: as `parse`.
    """
    table = option_table(groups)
    plain = {name: _without_paths(value) for name, value in keywords.items()}
    values = _named(plain, table, function, function, show_key=lambda key: f"{function}({key}=...)")
    return _build(groups, values, frozenset(values), f"see help({function})", [], warn=True)


def _without_paths(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _build(
    groups: Sequence[type], values: dict[str, Any], typed: frozenset[str], hint: str, warnings: list[str], *, warn: bool
) -> tuple[Any, ...]:
    """The instances of groups with values that have their options' types.

    Args:
        typed: see `compatibility.check`.
        warnings: are printed with those of `compatibility.check`.
    """
    specs = [spec for group in groups for spec in specs_of(group)]
    take_base_of_adapter(groups, values, warnings)
    take_learning_rate(groups, values)
    for spec in specs:
        if spec.required and spec.unless and values.get(spec.unless) is not None:
            values.setdefault(spec.name, ".")
    missing = [spec for spec in specs if spec.required and spec.name not in values]
    if missing:
        names = ", ".join(spec.name.upper() if spec.positional else f"--{spec.name}" for spec in missing)
        raise ConfigError(f"{names} must be given: {hint}")
    for spec in specs:
        value = values.get(spec.name)
        if spec.required and isinstance(value, str | Path) and not str(value).strip():
            name = spec.name.upper() if spec.positional else f"--{spec.name}"
            raise ConfigError(f"{name} is empty: give a name or a path")
    instances = []
    for group in groups:
        instance = group(**{spec.name: values[spec.name] for spec in specs_of(group) if spec.name in values})
        check_values(instance)
        instances.append(instance)
    warnings = [*warnings, *compatibility.check(instances, given=frozenset(values), typed=typed)]
    for warning in warnings if warn else ():
        print(f"arriero: warning: {warning}", file=sys.stderr)
    return tuple(instances)
