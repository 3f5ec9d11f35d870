"""An adapter and its base, several adapters, or the shards of a model, joined; and the proof that it computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from arriero.adapters.lora import LoRAConfig, apply_lora, load_adapter_state, merge_lora
from arriero.adapters.lora_mix import check_mix, mix_adapters
from arriero.adapters.peft_config import from_peft, to_peft
from arriero.config.adapter import AdapterPathOptions
from arriero.config.merging import MergeOptions
from arriero.config.model import ModelOptions
from arriero.engine.loading import load, model_folder
from arriero.errors import ConfigError, FormatError
from arriero.formats import hf, peft
from arriero.formats.download import published_name
from arriero.formats.quantized import plain
from arriero.formats.shard_merging import merge_shards
from arriero.formats.staging import check_target
from arriero.formats.tensor_shards import is_sharded
from arriero.models.llama import LlamaForCausalLM
from arriero.quantization.linear import dequantize_layers
from arriero.quantization.qat import SETTINGS_FILE
from arriero.training.qat_weights import copy_rounding


def merge_model(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    merge: MergeOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Merge the adapter where one is named, else the shards of the model.

    Args:
        progress: told how many tensors of how many are joined; of shards only.

    Returns:
        What was done and what the comparison gave, a line each.

    Raises:
        ConfigError: options that contradict each other, a target that holds something, or nothing to merge.
        FormatError: parts that do not belong together, or a merged model whose logits differ from theirs.
    """
    if adapter.prefix_path:
        raise ConfigError("--prefix_path: a prefix is no change of weights and cannot be merged; give --lora_path")
    check_target(merge.output_path, "--output_path")
    if adapter.lora_path:
        return _merge_adapter(model, adapter.lora_path, merge)
    folder = model_folder(model.model_name_or_path, model.cache_dir)
    if not is_sharded(folder):
        raise ConfigError(
            f"{folder} is one model already: merge needs --lora_path, the folder of an adapter that is to be joined with "
            "it, or a folder of shards (model-tp00-of-04.safetensors and so on)"
        )
    comparison = merge_shards(
        folder,
        merge.output_path,
        max_shard_size=merge.max_shard_size,
        dtype=None if model.dtype == "auto" else model.dtype,
        verify=merge.verify,
        progress=progress,
    )
    return [f"merged model: {merge.output_path} ({comparison if comparison is not None else 'not compared'})"]


def _merge_adapter(model: ModelOptions, lora_path: str, merge: MergeOptions) -> list[str]:
    """Merge, write, read back and compare logits with those of base + adapter."""
    target = Path(merge.output_path)
    config, state, notes = _adapter_of(lora_path, merge)
    if merge.output_kind == "adapter":
        peft.save_adapter(target, state, to_peft(config, published_name(model.model_name_or_path)))
        return [*notes, f"adapter of rank {config.rank}: {target}", *_keep_rounding(lora_path, target)]
    loaded = load(model)
    notes += _dequantize(loaded.model)
    apply_lora(loaded.model, config, fresh=False)
    load_adapter_state(loaded.model, state)
    loaded.model.eval()
    probe = torch.randint(loaded.model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0)).to(
        loaded.device
    )
    before = torch.zeros(())
    if merge.verify:
        with torch.inference_mode():
            before = loaded.model(probe).float()
    merge_lora(loaded.model)
    hf.save_model(
        loaded.model, loaded.model.config, target, max_shard_size=merge.max_shard_size, extra_files_from=loaded.folder
    )
    notes += _keep_rounding(lora_path, target)
    if not merge.verify:
        return [*notes, f"merged model: {target} (not compared)"]
    with torch.inference_mode():
        after = hf.load_model(target, device=loaded.device)(probe).float()
    difference = float((before - after).abs().max())
    size = float(before.abs().max())
    # fp32 differs by the order of additions; a half-precision weight is rounded once more by the merge
    tolerance = 1e-5 if next(loaded.model.parameters()).dtype == torch.float32 else 2e-2
    if not difference <= tolerance * max(1.0, size):
        raise FormatError(
            f"{target}: the merged model's logits differ by {difference:.2e} from base + adapter: do not use it"
        )
    compared = f"logits differ from base + adapter by at most {difference:.1e}, largest logit {size:.1f}"
    return [*notes, f"merged model: {target} ({compared})"]


def _paths(lora_path: str) -> list[str]:
    """The folders that --lora_path names."""
    return [lora_path] if Path(lora_path).is_dir() else [path.strip() for path in lora_path.split(",")]


def _keep_rounding(lora_path: str, target: Path) -> list[str]:
    """What was trained with rounded weights computes with them after the merge too."""
    rounded = [path for path in map(Path, _paths(lora_path)) if (path / SETTINGS_FILE).is_file()]
    if len(_paths(lora_path)) == 1:
        for path in rounded:
            copy_rounding(path, target)
    elif rounded:
        return [f"the rounding of {rounded[0]} ({SETTINGS_FILE}) is left out: no sum of adapters was trained with it"]
    return []


def _adapter_of(lora_path: str, merge: MergeOptions) -> tuple[LoRAConfig, Mapping[str, Tensor], list[str]]:
    """The adapter of one folder as it is, or the weighted sum of those of several, and what was added."""
    paths = _paths(lora_path)
    adapters = []
    for path in paths:
        stored, state = peft.load_adapter(Path(path))
        adapters.append((from_peft(stored), state))
    if len(adapters) == 1 and not merge.adapter_weights:
        if merge.output_kind == "adapter":
            raise ConfigError("--output_kind adapter joins several adapters: give --lora_path a,b or --adapter_weights")
        return *adapters[0], []
    weights = merge.adapter_weights or [1.0] * len(adapters)
    mixed = mix_adapters(adapters, weights)
    if merge.verify:
        check_mix(mixed, adapters, weights)
    return *mixed, [f"{weight:g} x {path}" for path, weight in zip(paths, weights, strict=True)]


def _dequantize(model: LlamaForCausalLM) -> list[str]:
    """Give a quantized model plain weights, and say so."""
    names = dequantize_layers(model)
    if not names:
        return []
    model.config = plain(model.config)
    return [
        f"warning: the base is quantized: {len(names)} layers are dequantized for the merge, and the merged model is a "
        "plain one (arriero quantize makes it small again)"
    ]
