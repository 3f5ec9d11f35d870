"""Model folders with quantized linear layers, as other tools write and read them.

Integers and 8-bit floats are stored as compressed-tensors does (https://github.com/vllm-project/compressed-tensors), nf4 as
bitsandbytes does. `quantization_config` in config.json says which scheme it is; which layers are quantized is seen from the
names of the tensors. All of it is declarative: nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arriero.errors import ArrieroError, FormatError
from arriero.formats.parts import Placement
from arriero.formats.quantization_config import BITSANDBYTES, compressed_scheme, rounds_cache, settings_of
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.shared_files import PartReader
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes
from arriero.quantization import nf4
from arriero.quantization.linear import QuantizedLinear, quantize_layers, quantize_weight
from arriero.quantization.schemes import Nf4Weights, WeightScheme

logger = logging.getLogger(__name__)
KEY = "quantization_config"
# Ends of names that only quantized layers have in a file.
MARKS = (".weight_scale", ".weight.absmax")
_STATE = "weight.quant_state.bitsandbytes__nf4"
_MAX_STATE_BYTES = 4096
_ROWS = 4096  # that are looked at together
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def is_quantized(config: LlamaConfig) -> bool:
    """Whether a folder with this configuration holds quantized layers."""
    return bool(config.extra.get(KEY))


def plain(config: LlamaConfig) -> LlamaConfig:
    """The configuration of the same model with plain weights."""
    return dataclasses.replace(config, extra={key: value for key, value in config.extra.items() if key != KEY})


def with_scheme(config: LlamaConfig, scheme: WeightScheme) -> LlamaConfig:
    """The configuration of the same model with this scheme in every linear layer but the output head."""
    return dataclasses.replace(config, extra={**config.extra, KEY: settings_of(scheme, config.dtype)})


def file_tensors(name: str, layer: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """What stands in a file for the weight of a layer.

    Args:
        name: full name of the layer.
        dtype: of the model's plain weights.
    """
    stored, shape = layer.stored(), (layer.out_features, layer.in_features)
    if isinstance(layer.scheme, Nf4Weights):
        state = {
            "quant_type": "nf4",
            "blocksize": layer.scheme.block_size,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
        }
        found = {
            "weight": stored["weight"].reshape(-1, 1),
            "weight.absmax": stored["weight_absmax"].reshape(-1),
            "weight.quant_map": torch.tensor(nf4.LEVELS),
            _STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
        }
    else:
        found = dict(stored)
        if "weight_packed" in found:
            found["weight_shape"] = torch.tensor(shape)
    return {f"{name}.{key}": tensor for key, tensor in found.items()}


def file_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a model's file, plain ones in `dtype`; see `file_tensors`."""
    state: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, layer in layers.items():
        state |= file_tensors(name, layer, dtype)
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner not in layers or leaf == "bias":
            state[name] = tensor.to(dtype)
    return state


def check_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Look at every number of a `file_state` before it is written.

    Raises:
        FormatError: naming the first tensor with one that is infinite or none.
    """
    for name, tensor in state.items():
        rows = torch.split(tensor, _ROWS) if tensor.dim() and tensor.is_floating_point() else ()
        # 8-bit floats have no test of their own
        wide = (part.float() if part.dtype.itemsize == 1 else part for part in rows)
        if not all(bool(torch.isfinite(part).all()) for part in wide):
            raise FormatError(
                f"{source}: {name} would be stored as {str(tensor.dtype).removeprefix('torch.')} with values that are infinite "
                "or no numbers: give --dtype float32, or another --quant_type or --quant_method; nothing was written"
            )


class QuantizedFolder:
    """Reads a folder with quantized layers, under the names that `QuantizedLinear` gives the tensors.

    Attributes:
        scheme: of all quantized layers.
        layers: their full names and (out, in).
        shapes: of every tensor of the model.
        model_dtype: that config.json names.

    Raises:
        FormatError: for a scheme that is not read here, or tensors that do not fit it.
    """

    def __init__(self, folder: str | Path, config: LlamaConfig) -> None:
        self.folder = Path(folder)
        self._files = PartReader(folder)
        self._plain = weight_shapes(plain(config))
        settings = config.extra[KEY]
        self.model_dtype = getattr(torch, config.dtype) if config.dtype in _DTYPES else torch.float32
        mark = MARKS[settings["quant_method"] == BITSANDBYTES]
        names = [name.removesuffix(mark) for name in self._files.shapes if name.endswith(mark)]
        for name in names:
            if len(self._plain.get(f"{name}.weight", ())) != 2:
                raise FormatError(f"{folder}: has scales for {name}, which is no linear layer of this model")
        if not names:
            raise FormatError(f"{folder}: config.json has a {KEY}, but no tensor is quantized")
        self.layers = {name: self._shape(name) for name in names}
        with _named(f"{folder}: config.json: {KEY}"):
            self.scheme = self._read_scheme(settings, names[0])
        self._parts: dict[str, tuple[str, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        with _named(str(folder)):
            self._expect()

    def _shape(self, layer: str) -> tuple[int, int]:
        rows, columns = self._plain[f"{layer}.weight"]
        return rows, columns

    def _expect(self) -> None:
        """Names and shapes of the model's tensors, compared with those of the files."""
        known: set[str] = set()
        for layer, (rows, columns) in self.layers.items():
            for part, (shape, _) in self.scheme.tensors(rows, columns).items():
                name = f"{layer}.{part}"
                self._parts[name] = (layer, part)
                self.shapes[name] = shape
            known |= self._check(layer)
        for name, found in self._files.shapes.items():
            if name not in known:
                self.shapes[name] = found

    def _check(self, layer: str) -> set[str]:
        """The tensors of a layer in the files, after a look at those that only describe the others."""
        rows, columns = self.layers[layer]
        if isinstance(self.scheme, Nf4Weights):
            self._check_state(layer)
            nested = [f"{layer}.weight.nested_{key}" for key in ("absmax", "quant_map")]
            self._need(f"{layer}.weight", (rows * columns // 2, 1), torch.uint8)
            self._check_absmax(layer, rows * columns // self.scheme.block_size)
            levels = f"{layer}.weight.quant_map"
            if levels in self._files:
                self._need(levels, (16,), torch.float32)
                if not torch.allclose(self._files.read(levels), torch.tensor(nf4.LEVELS), rtol=0, atol=1e-6):
                    raise FormatError(f"{levels} holds other levels than nf4's")
            known = {f"{layer}.{key}" for key in ("weight", "weight.absmax", "weight.quant_map", _STATE)}
            return known | {name for name in nested if name in self._files}
        for part, (shape, dtype) in self.scheme.tensors(rows, columns).items():
            self._need(f"{layer}.{part}", shape, None if part == "input_scale" else dtype)
        known = {f"{layer}.{part}" for part in self.scheme.tensor_names}
        described = f"{layer}.weight_shape"
        if described in self._files:
            if self._files.read(described).tolist() != [rows, columns]:
                raise FormatError(f"{described} is not {[rows, columns]}, as config.json has it")
            known.add(described)
        return known

    def _check_absmax(self, layer: str, blocks: int) -> None:
        """The scales of an nf4 layer, and those of the scales where they are quantized themselves."""
        name = f"{layer}.weight.absmax"
        self._need(name, (blocks,), None)
        if self._files.dtype(name) == torch.float32:
            return
        self._need(name, (blocks,), torch.uint8)
        state = self._state(layer)
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(size) is not int or size < 1 or type(offset) not in (int, float):
            raise FormatError(f"{layer}: the quantized absmax lacks its block size or offset")
        self._need(f"{layer}.weight.nested_quant_map", (256,), torch.float32)
        self._need(f"{layer}.weight.nested_absmax", (-(-blocks // size),), torch.float32)

    def _need(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        found = self._files.shapes.get(name)
        if found is None:
            raise FormatError(f"the tensor {name} is missing")
        if found != shape and not (shape == (1,) and found == ()):
            raise FormatError(f"{name} has the shape {list(found)}, this scheme asks for {list(shape)}")
        if dtype is not None and self._files.dtype(name) != dtype:
            raise FormatError(f"{name} is {self._files.dtype(name)}, this scheme asks for {dtype}")

    def _state(self, layer: str) -> dict[str, Any]:
        name = f"{layer}.{_STATE}"
        shape = self._files.shapes.get(name)
        if shape is None or len(shape) != 1 or shape[0] > _MAX_STATE_BYTES or self._files.dtype(name) != torch.uint8:
            raise FormatError(f"{name} is missing or no state of nf4 weights")
        try:
            state = json.loads(bytes(self._files.read(name).tolist()))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{name} is not valid JSON") from error
        if not isinstance(state, dict):
            raise FormatError(f"{name} is no JSON object")
        return state

    def _check_state(self, layer: str) -> None:
        assert isinstance(self.scheme, Nf4Weights)
        state, (rows, columns) = self._state(layer), self.layers[layer]
        wanted = {"quant_type": "nf4", "blocksize": self.scheme.block_size, "shape": [rows, columns]}
        for key, value in wanted.items():
            if state.get(key) != value:
                raise FormatError(f"{layer}.{_STATE}: {key} is {state.get(key)!r}, {value!r} is needed")

    def _read_scheme(self, settings: Mapping[str, Any], layer: str) -> WeightScheme:
        if settings["quant_method"] == BITSANDBYTES:
            if settings.get("bnb_4bit_quant_type") != "nf4" or not settings.get("load_in_4bit"):
                raise FormatError("of bitsandbytes, only nf4 is read")
            size = self._state(layer).get("blocksize")
            if not isinstance(size, int) or size < 2:
                raise FormatError(f"{layer}: a blocksize of {size!r}")
            return Nf4Weights(size)
        if rounds_cache(settings):
            _warn_of_cache(str(self.folder))
        scale = self._files.dtype(f"{layer}.weight_scale")
        return compressed_scheme(settings, f"{layer}.weight_packed" in self._files, scale)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor of the model."""
        if name not in self._parts:
            return self._files.dtype(name)
        layer, part = self._parts[name]
        return self.scheme.tensors(*self.layers[layer])[part][1]

    def read(self, name: str) -> Tensor:
        """A whole tensor of the model, on the CPU; a view of the mapped file where that holds it as it is."""
        if name not in self._parts:
            return self._files.read(name)
        layer, part = self._parts[name]
        if not isinstance(self.scheme, Nf4Weights):
            tensor = self._files.read(name)
            return tensor.float().reshape(1) if part == "input_scale" else tensor
        rows, columns = self.layers[layer]
        if part == "weight":
            return self._files.read(name).view(rows, columns // 2)
        return self._absmax(layer).view(rows, columns // self.scheme.block_size)

    def read_part(self, name: str, placement: Placement) -> Tensor:
        """This process's box of a tensor; see `arriero.formats.shared_files.PartReader.read_part`."""
        if name not in self._parts:
            return self._files.read_part(name, placement)
        return self.read(name)[placement.box]

    def _absmax(self, layer: str) -> Tensor:
        """(blocks,) fp32; if it is quantized itself ("double quantization", section 3 of QLoRA), read back."""
        absmax = self._files.read(f"{layer}.weight.absmax")
        if absmax.dtype == torch.float32:
            return absmax
        state = self._state(layer)
        size, offset = state["nested_blocksize"], state["nested_offset"]  # looked at by `_check_absmax`
        levels = self._files.read(f"{layer}.weight.nested_quant_map")
        scales = self._files.read(f"{layer}.weight.nested_absmax")
        spread = scales.repeat_interleave(min(int(size), absmax.numel()))[: absmax.numel()]
        return levels[absmax.int()] * spread + float(offset)

    def dequantized(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight of the plain model."""
        layer = name.removesuffix(".weight")
        if layer not in self.layers or layer == name:
            return self._files.read(name)
        stored = {part: self.read(f"{layer}.{part}") for part in self.scheme.weight_names}
        return self.scheme.dequantize(stored, dtype)

    def plain_dtype(self, name: str) -> torch.dtype | None:
        """Of a weight of the plain model; None for one that is quantized."""
        return None if name.removesuffix(".weight") in self.layers else self._files.dtype(name)

    def lazy(self) -> dict[str, Tensor | LazyTensor]:
        """Every weight of the plain model, dequantized when it is loaded."""
        found: dict[str, Tensor | LazyTensor] = {}
        for name, shape in self.plain_shapes().items():
            if self.plain_dtype(name) is not None:
                found[name] = self._files.read(name)
            else:
                found[name] = LazyTensor(shape, self.model_dtype, partial(self.dequantized, name, self.model_dtype))
        return found

    def state(self, dtype: torch.dtype | None, device: str | torch.device) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model; only plain ones are cast."""
        for name in self.shapes:
            yield name, self.read(name).to(device=device, dtype=None if name in self._parts else dtype)

    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the model with plain weights, of what the files hold."""
        found = {name: shape for name, shape in self.shapes.items() if name not in self._parts}
        return found | {f"{layer}.weight": shape for layer, shape in self.layers.items()}

    def prepare(self, model: nn.Module) -> None:
        """Put quantized layers without values in the place of linear ones, in place."""
        quantize_layers(model, lambda name, _: self.scheme if name in self.layers else None)


@functools.lru_cache(64)  # a command opens a folder several times
def _warn_of_cache(folder: str) -> None:
    logger.warning("%s: keys and values are not rounded here, as its kv_cache_scheme has it", folder)


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Names the source in the errors of a block."""
    try:
        yield
    except ArrieroError as error:
        raise error if str(error).startswith(source) else FormatError(f"{source}: {error}") from None


def quantizing(
    values: Callable[[str, Placement], Tensor], scheme: WeightScheme, layers: Mapping[str, tuple[int, int]]
) -> Callable[[str, Placement], Tensor]:
    """Values of a model with quantized layers, made of a plain model's as they are read.

    A process reads the whole rows that its box lies in, so that scales and integers are those of one process.

    Args:
        layers: full names and (out, in) of the quantized layers.
    """
    kept: tuple[Any, dict[str, Tensor]] = (None, {})

    def value(name: str, placement: Placement) -> Tensor:
        nonlocal kept
        layer, _, part = name.rpartition(".")
        if layer not in layers or part not in scheme.tensor_names:
            return values(name, placement)
        whole = layers[layer]
        key = (layer, placement.offset[0], placement.size[0])
        if kept[0] != key:  # the tensors of a layer come one after the other
            rows = Placement(whole, (placement.offset[0], 0), (placement.size[0], whole[1]))
            kept = key, quantize_weight(f"{layer}.weight", values(f"{layer}.weight", rows), scheme)
        return kept[1][part][(slice(None), *placement.box[1:])]

    return value
