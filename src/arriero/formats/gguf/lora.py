"""LoRA adapters as GGUF files: what llama.cpp's `--lora` takes, and back.

Names and layout are those of llama.cpp's convert_lora_to_gguf.py. llama.cpp scales an update by ``adapter.lora.alpha``
divided by the rank of each pair (src/llama-adapter.h), so what PEFT can say beyond that (rsLoRA, an alpha a layer) is
multiplied into B.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.gguf.container import TensorToWrite, Value, write_container
from arriero.formats.gguf.file import GGUFFile
from arriero.formats.gguf.metadata import QUANTIZATION_VERSION
from arriero.formats.gguf.names import ARCHITECTURES, architecture_of, gguf_name, heads_of, hf_name, permuted_heads
from arriero.formats.gguf.tensor_types import F32
from arriero.formats.peft import PeftLoraConfig, of_pattern
from arriero.formats.peft_layers import targets_of
from arriero.formats.rope_layout import halves_to_pairs, pairs_to_halves
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import HEAD, weight_shapes

_STATE_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
_FILE_NAME = re.compile(r"(.+\.weight)\.lora_([ab])")


def write_gguf_lora(
    target: Path, config: PeftLoraConfig, state: Mapping[str, Tensor], base_config: LlamaConfig
) -> None:
    """Write an adapter as a GGUF file in fp32, whole or not at all.

    Args:
        state: the adapter's tensors under the names of the adapted model, as `arriero.formats.peft.load_adapter` gives them.
        base_config: of the model that it adapts.

    Raises:
        FormatError: for DoRA, trained biases or other tensors that llama.cpp's adapters cannot hold, or tensors that do not
            fit the base model.
    """
    pairs = _pairs_of(state, config, target)
    shapes = weight_shapes(base_config)
    alpha = float(config.lora_alpha)
    tensors = []
    for layer, (a, b) in pairs.items():
        name = gguf_name(f"{layer}.weight", str(target))
        shape, rank = shapes.get(f"{layer}.weight"), a.shape[0]
        if f"{layer}.weight" == HEAD and base_config.tie_word_embeddings:
            raise FormatError(
                f"{target}: the adapter changes {layer}, which is the embedding in its base model; llama.cpp would change "
                "both: merge the adapter into the model and convert that"
            )
        if shape is None or (b.shape[0], a.shape[1]) != shape or b.shape[1] != rank:
            raise FormatError(
                f"{target}: {layer} has A {list(a.shape)} and B {list(b.shape)}, the base model's weight has the shape "
                f"{list(shape or ())}; this adapter belongs to another model"
            )
        wanted = of_pattern(config.alpha_pattern, layer, config.lora_alpha)
        scale = wanted / (math.sqrt(rank) if config.use_rslora else rank)
        change = scale / (alpha / rank)
        update = b.float() if math.isclose(change, 1.0, rel_tol=1e-12) else b.float() * change
        heads = heads_of(name, base_config)
        tensors.append(_to_write(f"{name}.lora_a", a.float()))
        tensors.append(_to_write(f"{name}.lora_b", update if heads is None else halves_to_pairs(update, heads)))
    architecture = architecture_of(base_config)
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": config.base_model_name_or_path or target.stem,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        # Not needed by llama.cpp, but the rows of B can be put back in order only with them.
        f"{architecture}.attention.head_count": base_config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": base_config.num_key_value_heads,
        f"{architecture}.block_count": base_config.num_hidden_layers,  # for `target_modules`
        "general.file_type": 0,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    write_container(target, metadata, tensors)


def read_gguf_lora(
    path: str | Path, base_config: LlamaConfig | None = None
) -> tuple[PeftLoraConfig, dict[str, Tensor]]:
    """Read an adapter that `write_gguf_lora` or llama.cpp's converter wrote.

    Args:
        base_config: of the model that it adapts; only needed for a file of the architecture "llama" that changes queries or
            keys and does not say how many heads there are.

    Returns:
        Its configuration, and its tensors in fp32 under the names of the adapted model.

    Raises:
        FormatError: when the file is broken, no LoRA adapter, or one of another kind of model.
    """
    with GGUFFile(path) as file:
        architecture = file.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise FormatError(f"{path}: general.architecture {str(architecture)[:40]!r} is not supported")
        if file.metadata.get("general.type") != "adapter" or file.metadata.get("adapter.type") != "lora":
            raise FormatError(f"{path}: is not a LoRA adapter; `arriero convert` reads whole models")
        alpha = file.metadata.get("adapter.lora.alpha")
        if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha < 0:
            raise FormatError(
                f"{path}: adapter.lora.alpha must be a number that is not negative, got {str(alpha)[:40]}"
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for name in file.tensors:
            match = _FILE_NAME.fullmatch(name)
            if match is None or len(file.tensors[name].shape) != 2 or match[1] == "token_embd.weight":
                raise FormatError(f"{path}: tensor {name!r} is no LoRA matrix of a linear layer")
            layer = hf_name(match[1], str(path)).removesuffix(".weight")
            tensor = torch.from_numpy(file.dequantize(name))
            if match[2] == "b":
                tensor = _ordered(match[1], tensor, file, architecture, base_config)
            parts.setdefault(layer, {})[match[2].upper()] = tensor
        depth = (
            file.metadata.get(f"{architecture}.block_count") if base_config is None else base_config.num_hidden_layers
        )
    return _adapter(parts, alpha, str(path), depth if isinstance(depth, int) else None)


def _adapter(
    parts: Mapping[str, Mapping[str, Tensor]], alpha: float, source: str, depth: int | None
) -> tuple[PeftLoraConfig, dict[str, Tensor]]:
    if not parts:
        raise FormatError(f"{source}: has no tensors; the file is incomplete")
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, pair in parts.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise FormatError(f"{source}: {layer} has no pair of LoRA matrices that fit each other")
        ranks[layer] = pair["A"].shape[0]
        state |= {f"{layer}.lora_{part}.weight": pair[part] for part in ("A", "B")}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(layer): own for layer, own in ranks.items() if own != rank}
    config = PeftLoraConfig(
        r=rank,
        lora_alpha=alpha or rank,  # llama.cpp takes 0 for "as it is", a scale of 1
        target_modules=targets_of(parts.keys(), depth),
        rank_pattern=others,
        alpha_pattern={} if alpha else {name: float(own) for name, own in others.items()},
    )
    return config, state


def _ordered(name: str, tensor: Tensor, file: GGUFFile, architecture: str, base_config: LlamaConfig | None) -> Tensor:
    """B with its rows in HF's order."""
    if base_config is not None:
        if architecture_of(base_config) != architecture:
            raise FormatError(
                f"{file.path}: is an adapter of a model of architecture {architecture!r}, the base model's is "
                f"{architecture_of(base_config)!r}"
            )
        query, key = base_config.num_attention_heads, base_config.num_key_value_heads
    else:
        found = [file.metadata.get(f"{architecture}.attention.head_count{end}") for end in ("", "_kv")]
        query, key = (value if isinstance(value, int) and value >= 1 else 0 for value in found)
    heads = permuted_heads(name, architecture, query, key)
    if heads is None:
        return tensor
    if not heads or tensor.shape[0] % (2 * heads):
        raise FormatError(
            f"{file.path}: does not say into how many heads the {tensor.shape[0]} rows of {name} are cut; give the base model"
        )
    return pairs_to_halves(tensor, heads)


def _pairs_of(state: Mapping[str, Tensor], config: PeftLoraConfig, target: Path) -> dict[str, tuple[Tensor, Tensor]]:
    if config.use_dora:
        raise FormatError(
            f"{target}: GGUF adapters are plain LoRA, this one is DoRA; merge it into the model and convert that"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _STATE_NAME.fullmatch(name)
        if match is None:
            raise FormatError(
                f"{target}: GGUF adapters have no place for {name}; merge the adapter into the model and convert that"
            )
        found.setdefault(match[1], {})[match[2]] = tensor.detach().cpu()
    incomplete = next((layer for layer, pair in found.items() if len(pair) != 2), None)
    if not found or incomplete is not None:
        raise FormatError(
            f"{target}: the adapter has no pair of LoRA matrices{f' of {incomplete}' if incomplete else ''}"
        )
    return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}


def _to_write(name: str, tensor: Tensor) -> TensorToWrite:
    return TensorToWrite(name, tuple(tensor.shape), F32, tensor)
