"""Command line + configuration file + defaults -> option groups.

    parse((ModelOptions, DataOptions), ["--dtype", "bfloat16", "run.yaml"], "arriero evaluate")

Flags win over the file, the file wins over defaults. `--flag value`, `--flag=value`, `--some-flag` for `--some_flag`; a
bool is `--flag`, `--flag 1`, `--flag False`; a list is `--x a b` or `--x a,b`. Names are never abbreviated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from arriero.config import compatibility
from arriero.config.option import OptionSpec, check_values, specs_of
from arriero.config.values import FALSE_WORDS, KIND_NAMES, TRUE_WORDS, convert, nearest, show
from arriero.errors import ConfigError

_BOOL_WORDS = TRUE_WORDS | FALSE_WORDS
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


class HelpRequested(Exception):
    """The user asked for the help page of a verb."""


@dataclass
class _Scan:
    """What stands on a command line, not typed yet."""

    flags: dict[str, Any] = field(default_factory=dict)  # option name -> str, list[str] or True
    config_files: list[str] = field(default_factory=list)
    positionals: list[str] = field(default_factory=list)


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


def _is_flag(token: str) -> bool:
    return token.startswith("--") and len(token) > 2


def _unknown(name: str, shown: str, table: dict[str, OptionSpec], help_hint: str) -> ConfigError:
    suggestion = nearest(name, [*table, "config", "help", "debug"])
    hint = f"did you mean {'--' if shown.startswith('--') else ''}{suggestion}?" if suggestion else help_hint
    return ConfigError(f"unknown option {shown}: {hint}")


def _scan(argv: Sequence[str], table: dict[str, OptionSpec], prog: str) -> _Scan:
    scan = _Scan()
    takes_positionals = any(spec.positional for spec in table.values())
    remainder = any(spec.remainder for spec in table.values())
    tokens = list(argv)
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token in ("-h", "--help"):
            raise HelpRequested
        if token == "--":
            scan.positionals += tokens[position:]
            break
        if not _is_flag(token):
            if not takes_positionals and token.lower().endswith(_CONFIG_SUFFIXES):
                scan.config_files.append(token)
                continue
            if not takes_positionals:
                kind = "unknown option" if token.startswith("-") and len(token) > 1 else "unexpected argument"
                raise ConfigError(f"{kind} {show(token)}: options are given as --name value; see {prog} --help")
            scan.positionals.append(token)
            if remainder:
                scan.positionals += tokens[position:]
                break
            continue

        written, equals, attached = token[2:].partition("=")
        name = written.replace("-", "_")
        if name == "config":
            if not equals:
                attached = tokens[position] if position < len(tokens) else ""
                position += 1
            if not attached or _is_flag(attached):
                raise ConfigError("--config needs the path of a YAML or JSON file")
            scan.config_files.append(attached)
            continue
        spec = table.get(name)
        if spec is None:
            raise _unknown(name, f"--{written}", table, f"see {prog} --help")
        if equals:
            scan.flags[spec.name] = attached
        elif spec.kind is bool and not spec.is_list:
            following = tokens[position] if position < len(tokens) else None
            if following is not None and following.strip().lower() in _BOOL_WORDS:
                scan.flags[spec.name] = following
                position += 1
            else:
                is_value = following is not None and not (
                    _is_flag(following)
                    or following in ("-h", "--")
                    or takes_positionals
                    or following.lower().endswith(_CONFIG_SUFFIXES)
                )
                scan.flags[spec.name] = following if is_value else True
        elif spec.is_list:
            values = []
            while position < len(tokens) and not _is_flag(tokens[position]) and tokens[position] != "--":
                values.append(tokens[position])
                position += 1
            scan.flags[spec.name] = values
            if not values:
                raise ConfigError(f"--{written} needs a value: one or more of {KIND_NAMES[spec.kind]}")
        else:
            if position >= len(tokens) or _is_flag(tokens[position]) or tokens[position] == "--":
                raise ConfigError(f"--{written} needs a value ({KIND_NAMES[spec.kind]}): --{written} VALUE")
            scan.flags[spec.name] = tokens[position]
            position += 1
    return scan


def _place_positionals(scan: _Scan, table: dict[str, OptionSpec], prog: str) -> None:
    """Give the arguments without a name to the positional options that have no value yet, in order."""
    waiting = list(scan.positionals)
    for name, spec in table.items():
        if name != spec.name or not spec.positional or not waiting or name in scan.flags:
            continue
        if spec.is_list:
            scan.flags[spec.name], waiting = waiting, []
        else:
            scan.flags[spec.name] = waiting.pop(0)
    if waiting:
        raise ConfigError(f"unexpected argument {show(waiting[0])}: see {prog} --help")


def _from_file(path: str, table: dict[str, OptionSpec]) -> dict[str, Any]:
    from arriero.config.files import read_config  # PyYAML is imported only when a file is given

    values: dict[str, Any] = {}
    for key, value in read_config(path).items():
        name = key.replace("-", "_")
        spec = table.get(name)
        if spec is None:
            suggestion = nearest(name, list(table))
            hint = f"did you mean {suggestion}?" if suggestion else "no option of this command has that name"
            raise ConfigError(f"{path}: unknown key {show(key)}: {hint}")
        if spec.name in values:
            raise ConfigError(f"{path}: {key} and {spec.name} are the same option: give one")
        values[spec.name] = convert(spec, value, f"{path}: {key}")
    return values


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
    scan = _scan(argv, table, prog)
    _place_positionals(scan, table, prog)
    values: dict[str, Any] = {}
    for path in scan.config_files:
        values.update(_from_file(path, table))
    for name, raw in scan.flags.items():
        spec = table[name]
        where = name.upper() if spec.positional else f"--{name}"
        values[name] = raw if spec.remainder else convert(spec, raw, where)
    specs = [spec for group in groups for spec in specs_of(group)]
    missing = [spec for spec in specs if spec.required and spec.name not in values]
    if missing:
        names = ", ".join(spec.name.upper() if spec.positional else f"--{spec.name}" for spec in missing)
        raise ConfigError(f"{names} must be given: see {prog} --help")
    instances = []
    for group in groups:
        instance = group(**{spec.name: values[spec.name] for spec in specs_of(group) if spec.name in values})
        check_values(instance)
        instances.append(instance)
    for warning in compatibility.check(instances, given=frozenset(values)):
        if warn:
            print(f"arriero: warning: {warning}", file=sys.stderr)
    return tuple(instances)
