"""What every bundle has of its model beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arriero.formats.json_file import parse_json_object
from arriero.formats.source import ModelSource

_GENERATION = "generation_config.json"


def write_model_files(folder: Path, source: ModelSource) -> dict[str, Any]:
    """Write config.json, tokenizer, chat template, generation defaults and licence; returns the configuration.

    Raises:
        OSError: when one cannot be written.
    """
    for name, content in source.files.items():
        (folder / name).write_bytes(content)
    config: dict[str, Any] = source.config.to_dict()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def generation_defaults(source: ModelSource) -> dict[str, Any]:
    """Those of the model.

    Raises:
        FormatError: when its generation_config.json is no JSON object.
    """
    return parse_json_object(source.files.get(_GENERATION, b"{}"), f"{source.path}: {_GENERATION}")
