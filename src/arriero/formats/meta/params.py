"""Meta's params.json <-> LlamaConfig.

The keys are the fields of `ModelArgs` in llama/model.py (https://github.com/meta-llama/llama) and models/llama3/args.py
(https://github.com/meta-llama/llama-models).
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import FormatError
from arriero.models.config import LlamaConfig

PARAMS_FILE = "params.json"
MAX_PARAMS_BYTES = 2**20
# How a program runs the model, not what the model is.
_RUN_KEYS = {"max_batch_size"}
_KEYS = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "max_seq_len",
}
# (multiple_of, ffn_dim_multiplier) of the published models.
_PUBLISHED_WIDTHS = ((256, None), (1024, 1.3), (4096, 1.3), (256, 1.5), (256, 1.0), (4096, 1.2))
_PLAIN_THETA = 10000.0


@dataclass(frozen=True)
class Params:
    """The content of a params.json.

    Attributes:
        vocab_size: None where the file says -1 (the tokenizer decides, LLaMA 1 and 2).
        intermediate_size: by `multiple_of` and `ffn_dim_multiplier`; None when the file has neither.
        max_seq_len: None in every published file.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None
    intermediate_size: int | None
    norm_eps: float
    rope_theta: float
    use_scaled_rope: bool
    max_seq_len: int | None

    @property
    def context(self) -> int:
        """Trained context in tokens. The file does not say, so it is known from what the generations differ in."""
        if self.max_seq_len is not None:
            return self.max_seq_len
        if self.use_scaled_rope:  # Llama 3.1 and later
            return 131072
        if self.rope_theta == 1e6:  # Code Llama
            return 16384
        if self.rope_theta >= 5e5:  # Llama 3
            return 8192
        return 2048 if self.norm_eps == 1e-6 else 4096  # LLaMA 1 (but for its 65B), Llama 2


def scaled_rope(tied: bool) -> dict[str, Any]:
    """What `use_scaled_rope` stands for: constants of Meta's code (`apply_scaling`), with the factor 8.

    The published LLaMA 3.2 models, the only ones whose head is the embedding, were trained with the factor 32; params.json
    does not say so, their config.json on the Hub does.
    """
    return {
        "rope_type": "llama3",
        "factor": 32.0 if tied else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def intermediate_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Width of the feed-forward network (`FeedForward.__init__` of Meta's model.py)."""
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def read_params(path: Path) -> Params:
    """Read a params.json.

    Raises:
        FormatError: no such file, not JSON, a value of a wrong kind, or a key of a model that is no plain LLaMA.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_PARAMS_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); Meta's models have one") from error
    try:
        values: Any = json.loads(text) if len(text) <= MAX_PARAMS_BYTES else None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not valid JSON; fetch it again") from error
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        values = values["model"]
    if not isinstance(values, dict):
        raise FormatError(f"{path}: must hold a JSON object of Meta's model arguments")
    foreign = [key for key, value in values.items() if key not in _KEYS | _RUN_KEYS and value not in (None, False, -1)]
    if foreign:
        raise FormatError(f"{path}: {foreign[0][:60]!r} belongs to a kind of model that is not supported")
    reader = _Reader(values, path)
    dim, heads = reader.integer("dim"), reader.integer("n_heads")
    if dim % heads:
        raise FormatError(f"{path}: dim {dim} is not a multiple of n_heads {heads}")
    width = None
    if values.get("multiple_of") is not None or values.get("ffn_dim_multiplier") is not None:
        multiplier = None if values.get("ffn_dim_multiplier") is None else reader.number("ffn_dim_multiplier")
        width = intermediate_size(dim, reader.integer("multiple_of", 256), multiplier)
    return Params(
        dim=dim,
        n_layers=reader.integer("n_layers"),
        n_heads=heads,
        n_kv_heads=reader.integer("n_kv_heads", heads),
        vocab_size=None if values.get("vocab_size", -1) == -1 else reader.integer("vocab_size"),
        intermediate_size=width,
        norm_eps=reader.number("norm_eps", 1e-5),
        rope_theta=reader.number("rope_theta", _PLAIN_THETA),
        use_scaled_rope=values.get("use_scaled_rope") is True,
        max_seq_len=reader.integer("max_seq_len") if values.get("max_seq_len") is not None else None,
    )


class _Reader:
    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise FormatError(f"{self.path}: {key} must be a whole number of at least 1, got {repr(value)[:40]}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise FormatError(f"{self.path}: {key} must be a positive number, got {repr(value)[:40]}")
        return float(value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise FormatError(f"{self.path}: has no {key}; this is not the params.json of a model")
        return default if value is None else value


def params_of(config: LlamaConfig, *, sentencepiece: bool) -> dict[str, Any]:
    """The params.json of a model.

    Args:
        sentencepiece: whether its tokenizer is LLaMA 1's and 2's, whose loader refuses keys that came later.

    Raises:
        FormatError: naming what Meta's format has no word for.
    """
    _check_expressible(config)
    multiple_of, multiplier = _width_arguments(config.hidden_size, config.intermediate_size)
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.rms_norm_eps,
    }
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.rope_theta != _PLAIN_THETA or not sentencepiece:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        params["use_scaled_rope"] = True
    return params


def _check_expressible(config: LlamaConfig) -> None:
    scaling, plain = config.rope_scaling, scaled_rope(config.tie_word_embeddings)
    obstacles = {
        "biases of the attention (attention_bias)": config.attention_bias,
        "biases of the feed-forward network (mlp_bias)": config.mlp_bias,
        "norms of queries and keys (qwen3)": config.qk_norm,
        f"a sliding window ({config.sliding_window} tokens)": config.sliding_window is not None,
        f"a head_dim of {config.head_dim} with {config.num_attention_heads} heads of a model {config.hidden_size} wide": (
            config.head_dim * config.num_attention_heads != config.hidden_size
        ),
        f"the RoPE scaling {json.dumps(scaling)}": scaling is not None and scaling != plain,
    }
    for what, there in obstacles.items():
        if there:
            raise FormatError(f"Meta's format has no word for {what}; convert this model to {_instead(config)} instead")


def _instead(config: LlamaConfig) -> str:
    """The other formats that take a model of this configuration."""
    from arriero.formats.gguf.metadata import check_expressible
    from arriero.formats.paddle.config import paddle_config

    taking = ["hf"]
    with contextlib.suppress(FormatError):
        check_expressible(config, "")
        taking.append("gguf")
    with contextlib.suppress(FormatError):
        paddle_config(config, "float32")
        taking.append("paddle")
    return " or ".join([", ".join(taking[:-1]), taking[-1]] if len(taking) > 1 else taking)


def _width_arguments(dim: int, width: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that give this width."""
    plain = int(2 * (4 * dim) / 3)
    own = (width, None) if plain <= width else (width, width / plain)
    for multiple_of, multiplier in (*_PUBLISHED_WIDTHS, own):
        if intermediate_size(dim, multiple_of, multiplier) == width:
            return multiple_of, multiplier
    multiplier = math.nextafter(width / plain, 1.0)  # the division rounded down, past the whole number
    if intermediate_size(dim, width, multiplier) == width:
        return width, multiplier
    raise FormatError(f"Meta's format has no word for an intermediate_size of {width} with a hidden_size of {dim}")
