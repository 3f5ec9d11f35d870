"""The base that an adapter was trained on: whether it is the one that is given, and how its weights were rounded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.detection import ADAPTERS, NAMES, detect
from arriero.formats.fingerprint import weights_fingerprint
from arriero.formats.json_file import read_json_object
from arriero.formats.parts import Placement
from arriero.formats.peft import ADAPTER_CONFIG, is_adapter, read_adapter_config
from arriero.formats.quantized import is_quantized
from arriero.formats.side_files import BASE_QUANTIZATION as BASE_QUANTIZATION
from arriero.models.config import LlamaConfig
from arriero.models.presets import match_preset
from arriero.quantization.linear import quantize_weight
from arriero.quantization.schemes import WeightScheme

KINDS = ("nf4", "int8")
_KEY = "quantize_base"


def base_quantization_text(kind: str) -> str:
    """The content of `base_quantization.json`."""
    return json.dumps({_KEY: kind}, indent=2) + "\n"


def read_base_quantization(adapter: Path) -> str | None:
    """How the linear layers of the base were held while an adapter was trained: "nf4", "int8", or None as they are.

    Raises:
        FormatError: the file that says so is broken.
    """
    path = adapter / BASE_QUANTIZATION
    if not path.is_file():
        return None
    kind = read_json_object(path, "").get(_KEY)
    if kind not in KINDS:
        raise FormatError(f"{path}: {_KEY} must be {' or '.join(KINDS)}, got {str(kind)[:40]!r}")
    return str(kind)


def tell(text: str) -> None:
    """A line for the user that is no result."""
    print(text, file=sys.stderr, flush=True)


def base_of_adapters(
    adapters: Sequence[str], given: str, folder: Path, report: Callable[[str], None] = tell
) -> str | None:
    """How a base is to be rounded so that it is the one that its adapters were trained on: "nf4", "int8", or None as it is.

    Args:
        given: --model_name_or_path, and the folder that it leads to. One with quantized layers stays as it is.
        report: told how it is rounded, and where an adapter names another base.

    Raises:
        FormatError: a file of an adapter is broken.
    """
    paths = [Path(adapter) for adapter in adapters]
    for path in paths:
        warn_of_other_base(path, given, folder, report)
    return _rounding_of(paths, folder, report)


def _rounding_of(adapters: Sequence[Path], folder: Path, report: Callable[[str], None]) -> str | None:
    kinds = {str(adapter): read_base_quantization(adapter) for adapter in adapters}
    found = [path for path, kind in kinds.items() if kind is not None]
    if not found or is_quantized(LlamaConfig.from_file(folder)):
        return None
    kind = kinds[found[0]]
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{path}: {held or 'as it is'}" for path, held in kinds.items())
        report(
            f"arriero: warning: the adapters were trained on a base in different forms ({told}): it is taken as it is"
        )
        return None
    report(f"base rounded to {kind}, as in the training of {', '.join(found)} ({BASE_QUANTIZATION})")
    return kind


def rounding(
    values: Callable[[str, Placement], Tensor], scheme: WeightScheme, layers: Mapping[str, tuple[int, int]]
) -> Callable[[str, Placement], Tensor]:
    """Values of a plain model whose weights are what their quantized form stands for.

    A process reads the whole rows that its box lies in.

    Args:
        layers: full names and (out, in) of the layers that are rounded.
    """

    def value(name: str, placement: Placement) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layers:
            return values(name, placement)
        columns = layers[layer][1]
        rows = Placement(layers[layer], (placement.offset[0], 0), (placement.size[0], columns))
        weight = values(name, rows)
        found = scheme.dequantize(quantize_weight(name, weight, scheme), weight.dtype)
        return found[(slice(None), *placement.box[1:])]

    return value


def warn_of_other_base(adapter: Path, given: str, folder: Path, report: Callable[[str], None] = tell) -> None:
    """Say so where the base that is given is not the one that the adapter names."""
    if not is_adapter(adapter):
        return
    named = read_adapter_config(adapter, "")[0].get("base_model_name_or_path")
    if isinstance(named, str) and named.strip() and not _is_same(named.strip(), given.strip(), folder):
        report(
            f"arriero: warning: {adapter} was trained on {named[:200]} ({ADAPTER_CONFIG}) and the base given is {given}: "
            "a copy will do, on another model its answers are worth nothing"
        )


def _is_same(named: str, given: str, folder: Path) -> bool:
    """Whether an adapter's word for its base means this one: by name, by place, or by the weights that are there."""
    preset = match_preset(named)
    names = {named.lower()} if preset is None else {preset.name.lower(), (preset.hub_id or preset.name).lower()}
    chosen = match_preset(given)
    if given.lower() in names or (preset is not None and preset is chosen):
        return True
    other = Path(os.path.expanduser(named))
    if other.is_dir():
        if other.resolve() == folder.resolve():
            return True
        try:
            return weights_fingerprint(other) == weights_fingerprint(folder)
        except FormatError:
            return False
    # a folder of a cache or a copy, also one that was moved since: known by the last part of its name
    places = {part.lower() for part in folder.resolve().parts[-3:]} | {part.lower() for part in folder.parts[-1:]}
    last = {name.rstrip("/").rpartition("/")[2] for name in names}
    hub = {f"models--{name.replace('/', '--')}" for name in names}
    return bool(last & {folder.name.lower(), folder.resolve().name.lower()}) or bool(hub & places)


def refuse_other_kind(path: Path) -> None:
    """Raises FormatError where an adapter's folder is to be and something else that is known lies."""
    if not path.exists():
        return
    try:
        found = detect(path)
    except FormatError:
        return
    if found.kind not in ADAPTERS:
        raise FormatError(f"{path}: is a {NAMES[found.kind]} and no adapter in PEFT's files ({ADAPTER_CONFIG})")
    if found.format != "hf":
        raise FormatError(
            f"{path}: is a {found.name}, and PEFT's files ({ADAPTER_CONFIG}) are read here: `arriero convert {path} FOLDER` "
            "makes them; give that folder"
        )
