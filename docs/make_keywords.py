"""Writes src/arriero/api/keywords.py, the types of the Python functions' keyword arguments, from the options: `make docs`."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from arriero.api import groups
from arriero.config.option import OptionSpec, specs_of, title

TARGET = Path(__file__).parents[1] / "src" / "arriero" / "api" / "keywords.py"
_HEAD = '''"""The keyword arguments of the Python functions: the commands' options. Made by docs/make_keywords.py.

`arriero VERB --help` and docs/verbs say what each does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import torch

    from arriero.api.rows import Rows

Path = str | PathLike[str]
'''
# After the functions' own: what has no option on the command line.
_TAIL = '''
class AnswerKeywords(GenerateKeywords, total=False):
    """Of `generate`, `stream` and `chat`."""

    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None
'''
# What Python takes beside an option's own type.
_ALSO = {"dtype": "torch.dtype", "device": "torch.device", "dataset_path": "Rows"}
_PATH = re.compile(
    r"(^|_)(path|dir|file|checkpoint)$|^(tokenizer|model)_name_or_path$|^(draft_model|base_model|config_name)$"
)


def annotation(spec: OptionSpec) -> str:
    """The type of an option's values in Python."""
    if spec.choices is not None:
        kind = f"Literal[{', '.join(repr(choice) for choice in spec.choices)}]"
    elif spec.kind is Path or (spec.kind is str and _PATH.search(spec.name)):
        kind = "Path"
    else:
        kind = spec.kind.__name__
    if spec.is_list:
        kind = f"list[{kind}]"
        if _PATH.search(spec.name):
            kind += " | Path"
    if spec.name in _ALSO:
        kind += f" | {_ALSO[spec.name]}"
    return f"{kind} | None" if spec.optional else kind


def typed_dict(name: str, bases: Sequence[str], specs: Sequence[OptionSpec], about: str) -> str:
    lines = [f"class {name}({', '.join(bases)}, total=False):", f'    """{about}"""', ""]
    return "\n".join([*lines, *(f"    {spec.name}: {annotation(spec)}" for spec in specs)]) + "\n"


def module() -> str:
    """The text of the module: a class for each group of options, and one for each function that takes its groups' together."""
    parts: dict[str, str] = {}
    functions = []
    for function, options in groups.KEYWORDS.items():
        bases = []
        for group in options:
            specs = [spec for spec in specs_of(group) if spec.name not in groups.RESERVED[function]]
            name = group.__name__.removesuffix("Options") + "Group"
            text = typed_dict(name, ["TypedDict"], specs, title(group) + ".")
            if parts.setdefault(name, text) != text:
                raise SystemExit(f"{function}: other options of {group.__name__} are reserved than elsewhere")
            if specs:
                bases.append(name)
        name = "".join(word.capitalize() for word in function.split("_")) + "Keywords"
        functions.append(typed_dict(name, bases, (), f"Of `arriero.{function}`."))
    used = [text for name, text in parts.items() if any(re.search(rf"\b{name}\b", text) for text in functions)]
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(TARGET), "-"]
    text = "\n\n".join([_HEAD, *used, *functions, _TAIL])
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    TARGET.write_text(module(), encoding="utf-8")


if __name__ == "__main__":
    main()
