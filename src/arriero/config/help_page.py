"""The `--help` page of a verb: its options, grouped by concern, each with its type and default."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero.config.option import OptionSpec, specs_of, title

_INDENT = 26
_METAVARS: dict[type, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
_COMMON = (
    ("  --config PATH", "a YAML or JSON file that sets any of these; flags win over it"),
    ("  --debug", "show the traceback of an error"),
    ("  -h, --help", "this page"),
)


def default_text(value: Any) -> str:
    """A default as the user would type it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value)


def metavar(spec: OptionSpec) -> str:
    """What stands after the flag: the choices, or the kind of value."""
    if spec.kind is bool:
        return ""
    if spec.choices is not None and len(spec.choices) <= 8:
        word = "{" + ",".join(spec.choices) + "}"
    else:
        word = _METAVARS[spec.kind]
    return f"{word} ..." if spec.is_list else word


def usage(prog: str, specs: Sequence[OptionSpec]) -> str:
    """The line that says what a command takes."""
    parts = [f"usage: {prog}"]
    if not any(spec.positional for spec in specs):
        alone = next((spec for spec in specs if spec.alone), None)
        if alone is not None:
            word = "MODEL" if alone.name == "model_name_or_path" else alone.name.upper()
            parts.append(word if alone.required else f"[{word}]")
        parts += ["[RUN.yaml]"]
    parts.append("[options]")
    for spec in specs:
        if spec.positional:
            word = spec.name.upper() + (" ..." if spec.is_list else "")
            parts.append(word if spec.required else f"[{word}]")
        elif spec.required and not spec.alone:
            parts.append(f"--{spec.name} {metavar(spec)}")
    return " ".join(part for part in parts if part)


def _entry(spec: OptionSpec, width: int) -> list[str]:
    left = f"  --{spec.name} {metavar(spec)}".rstrip()
    if spec.positional:
        left = f"  {spec.name.upper()}" + (" ..." if spec.is_list else "")
    text = spec.help
    if spec.aliases:
        text += f" [also --{', --'.join(spec.aliases)}]"
    if spec.required:
        text += " (required)"
    elif spec.default is not None and spec.default != "" and spec.default != []:
        text += f" (default: {default_text(spec.default)})"
    return _columns(left, text, width)


def _columns(left: str, text: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, max(width - _INDENT, 30), break_on_hyphens=False)
    if len(left) > _INDENT - 2:
        return [left, *(" " * _INDENT + line for line in wrapped)]
    return [left.ljust(_INDENT) + wrapped[0], *(" " * _INDENT + line for line in wrapped[1:])]


def format_help(prog: str, description: str, groups: Sequence[type]) -> str:
    """The whole page, as wide as the terminal (at most 120 columns)."""
    width = min(shutil.get_terminal_size().columns, 120)
    specs = [spec for group in groups for spec in specs_of(group)]
    lines = textwrap.wrap(usage(prog, specs), width, subsequent_indent="       ", break_on_hyphens=False)
    if description:
        lines += ["", *textwrap.wrap(description, width)]
    for group in groups:
        if specs_of(group):
            lines += ["", f"{title(group)}:"]
            for spec in specs_of(group):
                lines += _entry(spec, width)
    lines += ["", "Every command:"]
    for left, text in _COMMON:
        lines += _columns(left, text, width)
    return "\n".join(lines) + "\n"
