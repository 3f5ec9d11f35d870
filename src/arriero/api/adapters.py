"""An adapter, named by its folder: LoRA or a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from arriero.api.arguments import path_of


def adapter_options(adapter: str | PathLike[str] | Sequence[str | PathLike[str]] | None) -> dict[str, str]:
    """The option that names an adapter, by its kind.

    Args:
        adapter: a folder in PEFT's format; several of LoRA where they are to be added up; None: no adapter.

    Raises:
        ConfigError: no path.
        FormatError: a folder that holds no adapter.
    """
    if adapter is None:
        return {}
    what = "the folder of an adapter in PEFT's format"
    if isinstance(adapter, list | tuple):
        return {"lora_path": ",".join(str(path_of("adapter", path, what)) for path in adapter)}
    from arriero.formats.peft import read_adapter_config

    path = str(path_of("adapter", adapter, what))
    if "," in path and not Path(path).is_dir():
        return {"lora_path": path}
    values, _ = read_adapter_config(Path(path), f"it is {what}")
    return {"prefix_path" if values.get("peft_type") == "PREFIX_TUNING" else "lora_path": path}
