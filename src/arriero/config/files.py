"""Configuration files: YAML or JSON mappings of option names to values, read with limits and written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from arriero.config.option import specs_of, title
from arriero.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 1_000_000


class _UniqueKeyLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses a key given twice instead of silently keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key} is given twice")
        result[key] = value
    return result


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ConfigError: the file is missing, too large, malformed, or not a mapping of names to values.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: a configuration file ends in {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes, which no configuration is")
    try:
        text = raw.decode("utf-8-sig")
        if path.suffix.lower() == ".json":
            loaded = json.loads(text, object_pairs_hook=_unique_pairs)
        else:
            loaded = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()}: {reason[:300]}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{path}: it must be a mapping of option names to values, e.g. `learning_rate: 3e-4`")
    return loaded


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def effective(groups: Sequence[Any]) -> dict[str, Any]:
    """Every option of some groups (instances) and its value, as plain data."""
    return {spec.name: _plain(getattr(group, spec.name)) for group in groups for spec in specs_of(type(group))}


# What belongs to one sitting and not to the run: a configuration that is fed back must not start afresh by itself.
_OF_ONE_SITTING = ("overwrite_output_dir", "resume_from_checkpoint")


def write_config(path: str | Path, groups: Sequence[Any], header: str = "") -> None:
    """Write the effective options as YAML that `--config` reads back to the same values.

    Left out is what belongs to one sitting: `overwrite_output_dir` and `resume_from_checkpoint`.
    The file appears whole or not at all.
    """
    lines = [f"# {line}" for line in header.splitlines()]
    for group in groups:
        lines.append(f"\n# {title(type(group))}")
        values = {name: value for name, value in effective([group]).items() if name not in _OF_ONE_SITTING}
        if values:
            lines.append(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120).rstrip("\n"))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write("\n".join(lines).lstrip("\n") + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{path}: the configuration cannot be written ({error.strerror})") from error
