"""The configuration of a decoder, read from and written to an HF `config.json`.

LLaMA 1-3.3, Mistral, Qwen2, Qwen3, SmolLM and TinyLlama are configurations of one model. A key that is not known here
is kept in `extra` and written back untouched; nothing in a file is ever executed, `auto_map` included.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.errors import FormatError
from arriero.json_text import check_text
from arriero.models.config_reader import ConfigReader
from arriero.models.family import FAMILIES, FULL, SLIDING, Family
from arriero.models.rope_scaling import normalise_rope_scaling, read_rope

logger = logging.getLogger(__name__)

_told: ContextVar[bool] = ContextVar("told", default=False)

MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_LAYERS = 10_000
# Whose quantized weights can be read; see `arriero.formats.quantized`.
QUANTIZATION_METHODS = ("compressed-tensors", "bitsandbytes")
MAX_DIMENSION = 2**31 - 1
MAX_ELEMENTS = 1 << 48  # of one matrix


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A decoder's shape and constants. Immutable: use `dataclasses.replace` for a variant, which is checked again.

    Raises:
        FormatError: at construction, for a value or combination that no model can have; it names the key.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    # None for plain RoPE, else {"rope_type": ..., parameters}; see rope_scaling.py.
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # The window, in tokens with the query's own, of the layers that `layer_types` calls sliding; None: no such layer.
    sliding_window: int | None = None
    # "full_attention" or "sliding_attention" for each layer; empty stands for all full (or all sliding, Mistral).
    layer_types: tuple[str, ...] = ()
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"
    # The name of the weights' dtype as config.json has it ("bfloat16"), or None.
    dtype: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise FormatError(
                f"model_type {self.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
            )
        self._check_numbers()
        family = FAMILIES[self.model_type]
        if self.num_attention_heads % self.num_key_value_heads:
            raise FormatError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise FormatError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs, so it must be even")
        if self.hidden_act not in ("silu", "swish"):
            raise FormatError(f"hidden_act {self.hidden_act!r} is not supported; only 'silu' is")
        if family.qkv_bias != "read" and self.attention_bias != family.qkv_bias:
            raise FormatError(f"attention_bias must be {family.qkv_bias} for model_type {self.model_type!r}")
        if self.mlp_bias and not family.mlp_bias:
            raise FormatError(f"mlp_bias must be False for model_type {self.model_type!r}")
        self._check_layer_types(family)
        scaling = normalise_rope_scaling(
            self.rope_scaling, max_position_embeddings=self.max_position_embeddings, source="rope_scaling"
        )
        if scaling is not None and scaling["rope_type"] == "dynamic" and self.head_dim <= 2:
            raise FormatError("rope type 'dynamic' needs a head_dim greater than 2")
        object.__setattr__(self, "rope_scaling", scaling)

    def _check_numbers(self) -> None:
        for key in _DIMENSIONS:
            value = getattr(self, key)
            limit = MAX_LAYERS if key == "num_hidden_layers" else MAX_DIMENSION
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise FormatError(f"{key} must be a whole number from 1 to {limit}, got {value!r}")
        widest = max(self.vocab_size, self.intermediate_size, self.num_attention_heads * self.head_dim)
        if self.hidden_size * widest > MAX_ELEMENTS:  # torch cannot even name the size of such a tensor
            raise FormatError(
                f"a matrix of {self.hidden_size} x {widest} numbers is larger than any machine can address"
            )
        for key in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise FormatError(f"{key} must be a number that is not negative, got {value!r}")
        if self.rope_theta <= 1:
            raise FormatError(f"rope_theta must be greater than 1, got {self.rope_theta!r}")

    def _check_layer_types(self, family: Family) -> None:
        window = self.sliding_window
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise FormatError(f"sliding_window must be a whole number of at least 1 or null, got {window!r}")
        if window is not None and family.sliding == "none":
            raise FormatError(f"sliding_window must be null for model_type {self.model_type!r}")
        kinds = (
            self.layer_types
            or (SLIDING if window is not None and family.sliding == "all" else FULL,) * self.num_hidden_layers
        )
        if len(kinds) != self.num_hidden_layers or not all(kind in (FULL, SLIDING) for kind in kinds):
            raise FormatError(
                f"layer_types must name {FULL!r} or {SLIDING!r} for each of the {self.num_hidden_layers} layers, "
                f"got {list(kinds)!r}"
            )
        if SLIDING in kinds and window is None:
            raise FormatError(f"layer_types has {SLIDING!r} but sliding_window is null")
        if family.sliding == "all" and FULL in kinds and window is not None:
            raise FormatError(f"layer_types must all be {SLIDING!r} for model_type {self.model_type!r} with a window")
        object.__setattr__(self, "layer_types", tuple(kinds))

    @property
    def attention_output_bias(self) -> bool:
        """Whether o_proj has a bias (LLaMA and Qwen3: whenever q, k and v have; Mistral and Qwen2: never)."""
        return self.attention_bias and FAMILIES[self.model_type].output_bias

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are RMS-normalised a head before RoPE (Qwen3)."""
        return FAMILIES[self.model_type].qk_norm

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence; empty when the file names none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def layer_sliding_window(self, layer: int) -> int | None:
        """The attention window of one layer in tokens, the query's own included; None for full attention."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def num_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """Count the parameters; a tied output head is counted once.

        Args:
            exclude_embeddings: leave out the token embedding and the output head.
        """
        hidden, query = self.hidden_size, self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        attention = hidden * (query + 2 * key_value) + query * hidden
        if self.attention_bias:
            attention += query + 2 * key_value
        if self.attention_output_bias:
            attention += hidden
        if self.qk_norm:
            attention += 2 * self.head_dim
        mlp = 3 * hidden * self.intermediate_size
        if self.mlp_bias:
            mlp += 2 * self.intermediate_size + hidden
        total = self.num_hidden_layers * (attention + mlp + 2 * hidden) + hidden
        if not exclude_embeddings:
            total += self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return total

    @classmethod
    def from_file(cls, path: str | Path) -> LlamaConfig:
        """Read a `config.json`, or that of a folder.

        Raises:
            FormatError: no such file, more than 4 MiB, not JSON, or what `from_dict` refuses.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            with path.open("rb") as file:
                text = file.read(MAX_CONFIG_BYTES + 1)
        except OSError as error:
            raise FormatError(
                f"{path}: cannot be read ({error.strerror}); a model folder needs a config.json"
            ) from error
        if len(text) > MAX_CONFIG_BYTES:
            raise FormatError(f"{path}: is larger than {MAX_CONFIG_BYTES} bytes; this is not a model configuration")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: is not valid JSON ({error})") from error
        check_text(values, str(path))
        return cls.from_dict(values, source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config.json") -> LlamaConfig:
        """Build from the content of a config.json of transformers 4 or 5.

        A key that transformers defaults is defaulted alike, a model type at a time.

        Args:
            source: what messages call the file.

        Raises:
            FormatError: naming the key that is missing, of a wrong type, or unsupported, and its value.
        """
        if not isinstance(values, Mapping):
            raise FormatError(f"{source}: must hold a JSON object, got {type(values).__name__}")
        model_type = _read_model_type(values, source)
        family = FAMILIES[model_type]
        quantization = values.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            if method not in QUANTIZATION_METHODS:
                raise FormatError(
                    f"{source}: quantization_config: quantised weights of the method {method!r} cannot be read (those of "
                    f"{' and '.join(QUANTIZATION_METHODS)} can); use the original ones"
                )
        reader = ConfigReader(values, source)
        hidden_size, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
        layers = reader.integer("num_hidden_layers")
        max_positions = reader.integer("max_position_embeddings", family.max_position_embeddings)
        if "num_key_value_heads" in values or family.num_key_value_heads is None:
            key_value_heads = reader.integer("num_key_value_heads", heads)
        else:
            key_value_heads = family.num_key_value_heads
        theta, scaling = read_rope(values, max_position_embeddings=max_positions, default_theta=10000.0, source=source)
        window, layer_types = _read_sliding(reader, family, layers)
        if values.get("attention_dropout"):
            _warn_of_dropout(source, repr(values["attention_dropout"])[:40])
        try:
            return cls(
                vocab_size=reader.integer("vocab_size"),
                hidden_size=hidden_size,
                intermediate_size=reader.integer("intermediate_size"),
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=key_value_heads,
                head_dim=reader.integer("head_dim", family.head_dim or hidden_size // max(heads, 1)),
                max_position_embeddings=max_positions,
                rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
                rope_theta=theta,
                rope_scaling=scaling,
                tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
                attention_bias=(
                    reader.boolean("attention_bias", False) if family.qkv_bias == "read" else family.qkv_bias
                ),
                mlp_bias=reader.boolean("mlp_bias", False) if family.mlp_bias else False,
                sliding_window=window,
                layer_types=layer_types,
                hidden_act=reader.string("hidden_act", "silu"),
                initializer_range=reader.number("initializer_range", 0.02),
                bos_token_id=reader.token_id("bos_token_id", family.bos_token_id),
                eos_token_id=reader.token_ids("eos_token_id", family.eos_token_id),
                pad_token_id=reader.token_id("pad_token_id", None),
                model_type=model_type,
                dtype=_read_dtype(values, source),
                extra=_read_extra(values, family),
            )
        except FormatError as error:
            raise error if str(error).startswith(source) else FormatError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers 4.4x (old RoPE keys) and 5 (`rope_parameters`) read alike."""
        family = FAMILIES[self.model_type]
        values: dict[str, Any] = {"architectures": [family.architecture], "model_type": self.model_type}
        values |= {key: getattr(self, key) for key in _DIMENSIONS}
        values |= {key: getattr(self, key) for key in _PLAIN_KEYS}
        values["eos_token_id"] = list(self.eos_token_id) if isinstance(self.eos_token_id, list) else self.eos_token_id
        values["torch_dtype"] = self.dtype
        values["rope_scaling"] = dict(self.rope_scaling) if self.rope_scaling else None
        values["rope_parameters"] = {"rope_theta": self.rope_theta, **(self.rope_scaling or {"rope_type": "default"})}
        if family.qkv_bias == "read":
            values["attention_bias"] = self.attention_bias
        if family.mlp_bias:
            values["mlp_bias"] = self.mlp_bias
        if family.sliding != "none":
            values["sliding_window"] = self.sliding_window
        if family.sliding == "chosen":
            values["use_sliding_window"] = SLIDING in self.layer_types
            values["layer_types"] = list(self.layer_types)
            # Transformers before 4.53 knows no layer_types: the window starts at this layer.
            full = self.layer_types.index(SLIDING) if SLIDING in self.layer_types else self.num_hidden_layers
            values["max_window_layers"] = full
        return values | self.extra


@contextmanager
def told_already() -> Iterator[None]:
    """A block that reads configurations of which a user was warned: copies of one that was read before."""
    token = _told.set(True)
    try:
        yield
    finally:
        _told.reset(token)


def _warn_of_dropout(source: str, value: str) -> None:
    if not _told.get():
        _warn_once(source, value)


@functools.lru_cache(64)  # a command reads a file several times
def _warn_once(source: str, value: str) -> None:
    logger.warning("%s: attention_dropout %s has no effect here", source, value)


_DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_PLAIN_KEYS = (
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "hidden_act",
    "initializer_range",
    "bos_token_id",
    "pad_token_id",
)


def _written_keys(family: Family) -> frozenset[str]:
    """The keys that this configuration owns for a family; every other one of a file goes into `extra`."""
    keys = {*_DIMENSIONS, *_PLAIN_KEYS, "model_type", "eos_token_id", "dtype", "torch_dtype", "rope_scaling"}
    keys |= {"rope_parameters"}
    if family.qkv_bias == "read":
        keys.add("attention_bias")
    if family.mlp_bias:
        keys.add("mlp_bias")
    if family.sliding != "none":
        keys.add("sliding_window")
    if family.sliding == "chosen":
        keys |= {"use_sliding_window", "max_window_layers", "layer_types"}
    return frozenset(keys)


def _read_model_type(values: Mapping[str, Any], source: str) -> str:
    model_type = values.get("model_type")
    if model_type is None:
        architectures = values.get("architectures")
        names = architectures if isinstance(architectures, list) else []
        for name, family in FAMILIES.items():
            if family.architecture in names:
                return name
        raise FormatError(f"{source}: model_type is missing; supported are {', '.join(sorted(FAMILIES))}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise FormatError(
            f"{source}: model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return model_type


def _read_extra(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    owned = _written_keys(family)
    extra = {key: value for key, value in values.items() if key not in owned}
    # Null for a model that transformers never saved; the family's own name is written anyway.
    if extra.get("architectures") in (None, [], [family.architecture]):
        extra.pop("architectures", None)
    return extra


def _read_dtype(values: Mapping[str, Any], source: str) -> str | None:
    key = "dtype" if values.get("dtype") is not None else "torch_dtype"
    dtype = values.get(key)
    if dtype is None:
        return None
    if not isinstance(dtype, str):
        raise FormatError(f"{source}: {key} must be a name such as 'bfloat16', got {dtype!r}")
    return dtype.removeprefix("torch.")


def _read_sliding(reader: ConfigReader, family: Family, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """The window and each layer's kind as the family's modelling file in transformers uses them."""
    if family.sliding == "none":
        return None, ()
    window = reader.values.get("sliding_window", 4096)
    if family.sliding == "all":
        return window, ()
    if not reader.boolean("use_sliding_window", False):
        window = None
    kinds = reader.values.get("layer_types")
    if kinds is None:
        start = reader.integer("max_window_layers", 28)
        # The bound keeps a hostile layer count from building a long tuple before it is refused.
        count = min(max(layers, 0), MAX_LAYERS)
        kinds = [SLIDING if window is not None and layer >= start else FULL for layer in range(count)]
    elif not isinstance(kinds, list):
        raise FormatError(f"{reader.source}: layer_types must be a list, got {kinds!r}")
    if window is None and SLIDING in kinds:
        raise FormatError(
            f"{reader.source}: layer_types has {SLIDING!r} but use_sliding_window is false or sliding_window is null"
        )
    return (window if SLIDING in kinds else None), tuple(kinds)
