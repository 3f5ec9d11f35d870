"""An adapter, named by its folder: LoRA or a prefix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path


def adapter_options(adapter: str | PathLike[str] | Sequence[str | PathLike[str]] | None) -> dict[str, str]:
    """The option that names an adapter, by its kind.

    Args:
        adapter: a folder in PEFT's format; several of LoRA where they are to be added up; None: no adapter.

    Raises:
        FormatError: a folder that holds no adapter.
    """
    if adapter is None:
        return {}
    if not isinstance(adapter, str | PathLike):
        return {"lora_path": ",".join(os.fspath(path) for path in adapter)}
    from arriero.formats.peft import read_adapter_config

    path = os.fspath(adapter)
    if "," in path and not Path(path).is_dir():
        return {"lora_path": path}
    values, _ = read_adapter_config(Path(path), "it is the folder of an adapter in PEFT's format")
    return {"prefix_path" if values.get("peft_type") == "PREFIX_TUNING" else "lora_path": path}
