"""The model that an adapter was trained on, as its folder names it."""

from __future__ import annotations

from pathlib import Path

from arriero.config.files import read_config
from arriero.errors import ConfigError

FILE = "adapter_config.json"  # of PEFT


def stored_base(flag: str, adapter: str) -> str | None:
    """The base model that the `adapter_config.json` of an adapter names, or that all of several (`a,b`) name; None where one
    names none.

    Args:
        flag: the option, for messages.

    Raises:
        ConfigError: several adapters name different ones.
    """
    paths = [adapter] if Path(adapter).expanduser().exists() else [path.strip() for path in adapter.split(",")]
    bases = [_named(Path(path).expanduser() / FILE) for path in paths if path]
    found = sorted({base for base in bases if base is not None})
    if len(found) > 1:
        raise ConfigError(f"{flag} {adapter}: trained on {' and '.join(found)}: give one by --model_name_or_path")
    return found[0] if found and None not in bases else None


def adapter_kind(folder: Path) -> str | None:
    """The option that names the adapter of a folder: lora_path or prefix_path; None where it holds none, or a model."""
    if not (folder / FILE).is_file() or (folder / "config.json").is_file():
        return None
    return "prefix_path" if read_config(folder / FILE).get("peft_type") == "PREFIX_TUNING" else "lora_path"


def _named(path: Path) -> str | None:
    base = read_config(path).get("base_model_name_or_path") if path.is_file() else None
    return base if isinstance(base, str) and base.strip() else None
