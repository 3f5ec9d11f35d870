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
from arriero.engine.adapter_tokenizer import with_adapters_tokenizer
from arriero.engine.loading import load_base, model_folder
from arriero.errors import ConfigError, FormatError
from arriero.formats import hf, peft
from arriero.formats.adapter_base import BASE_QUANTIZATION, base_quantization_text, read_base_quantization
from arriero.formats.conversion import staged_output
from arriero.formats.download import published_name
from arriero.formats.shard_merging import merge_shards
from arriero.formats.side_files import read_side_files
from arriero.formats.staging import check_target
from arriero.formats.tensor_shards import is_sharded
from arriero.models.config import told_already
from arriero.models.llama import LlamaForCausalLM
from arriero.quantization.linear import INPUTS_NOT_ROUNDED, QuantizedLinear, rounds_inputs
from arriero.quantization.qat import SETTINGS_FILE
from arriero.training.merge_check import check_weights, expected_weights, rounding_noise
from arriero.training.qat_weights import copy_rounding

# Of the largest logit: no difference of the merged model that is worth a look.
_NEAR = 1e-5
# Roundings of all weights that another order of additions may come to; of 30 small merges it was 0.5 to 3.6.
_ROUNDINGS = 16


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
    """Merge, write, read back and compare with base + adapter; what does not agree is not left behind."""
    target, paths = Path(merge.output_path), _paths(lora_path)
    config, state, notes = _adapter_of(lora_path, merge)
    if merge.output_kind == "adapter":
        with staged_output(target, is_file=False) as place:
            peft.save_adapter(place, state, to_peft(config, published_name(model.model_name_or_path)))
            notes += [
                *_keep_base(paths, place),
                f"adapter of rank {config.rank}: {target}",
                *_keep_rounding(paths, place, torch.float32),
            ]
        return notes
    loaded, dtype = load_base(model, adapters=paths)
    inputs_too = rounds_inputs(loaded.model)
    if loaded.scheme is None:
        layers = sum(isinstance(module, QuantizedLinear) for module in loaded.model.modules())
        notes += _quantized(layers, inputs_too)
    apply_lora(loaded.model, config, fresh=False)
    load_adapter_state(loaded.model, state)
    loaded.model.eval()
    probe = torch.randint(loaded.model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0)).to(
        loaded.device
    )
    before, expected = torch.zeros(()), {}
    if merge.verify:
        expected = expected_weights(loaded.model, dtype)
        with torch.inference_mode():
            before = loaded.model(probe).float()
    merge_lora(loaded.model, dtype)
    beside = read_side_files(loaded.folder)
    files = beside
    if len(paths) == 1:  # several may each have one of their own
        files = with_adapters_tokenizer(beside, Path(paths[0]), loaded.model.config.vocab_size)
    with staged_output(target, is_file=False) as place:
        hf.save_model(
            loaded.model,
            loaded.model.config,
            place,
            max_shard_size=merge.max_shard_size,
            extra_files_from=loaded.folder if files == beside else None,
            extra_files=None if files == beside else files,
        )
        notes += _keep_rounding(paths, place, dtype)
        compared = "not compared"
        if merge.verify:
            with told_already():
                written = hf.load_model(place, device=loaded.device)
            check_weights(expected, written, place)
            with torch.inference_mode():
                compared = _compare(before, written, probe, place, judge=not inputs_too)
    return [*notes, f"merged model: {target} ({compared})"]


def _compare(before: Tensor, written: LlamaForCausalLM, probe: Tensor, place: Path, *, judge: bool = True) -> str:
    """How far the logits of a merged model are from those of base + adapter: in half precision its weights are rounded.

    Args:
        judge: whether they are to agree: not where only the base rounds the inputs of its layers.

    Raises:
        FormatError: in fp32 or fp64 further than another order of additions makes them: `_ROUNDINGS` times what one rounding
            of the weights does to these logits, where the difference is worth computing that.
    """
    after, dtype = written(probe).float(), written.model.embed_tokens.weight.dtype
    difference, size = float((before - after).abs().max()), float(before.abs().max())
    text = f"logits differ from base + adapter by at most {difference:.1e}, largest logit {size:.1f}"
    if dtype.itemsize >= 4:
        near = difference <= _NEAR * max(1.0, size)
        if judge and not near and not difference <= _ROUNDINGS * rounding_noise(written, probe):
            raise FormatError(
                f"{place}: the merged model's logits differ by {difference:.2e} from base + adapter: nothing was written"
            )
        return text
    kind = hf.dtype_name(dtype)
    return f"every weight is their sum rounded to {kind}, checked bit by bit; with it {text}: --dtype float32 rounds nothing"


def _paths(lora_path: str) -> list[str]:
    """The folders that --lora_path names.

    Raises:
        ConfigError: nothing stands before, between or behind its commas.
    """
    paths = [lora_path] if Path(lora_path).is_dir() else [path.strip() for path in lora_path.split(",")]
    if not all(paths):
        raise ConfigError(f"--lora_path {lora_path}: a folder is missing beside a comma; give them as a,b")
    return paths


def _keep_base(paths: list[str], target: Path) -> list[str]:
    """A sum of adapters is for the base that all of them were trained on, rounded as it was."""
    kinds = {read_base_quantization(Path(path)) for path in paths}
    if len(kinds) > 1:
        return [f"warning: the adapters were trained on a base in different forms: {BASE_QUANTIZATION} is left out"]
    for kind in kinds - {None}:
        (target / BASE_QUANTIZATION).write_text(base_quantization_text(str(kind)), encoding="utf-8")
    return []


def _keep_rounding(paths: list[str], target: Path, dtype: torch.dtype) -> list[str]:
    """What was trained with rounded weights computes with them after the merge too.

    Args:
        dtype: of the weights that are to be rounded as in the training.
    """
    rounded = [path for path in map(Path, paths) if (path / SETTINGS_FILE).is_file()]
    if len(paths) == 1:
        for path in rounded:
            return copy_rounding(path, target, dtype)
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


def _quantized(layers: int, inputs_too: bool) -> list[str]:
    """What the merge of a quantized base changes.

    Args:
        layers: of the base that are quantized.
        inputs_too: whether they round what they multiply too.
    """
    if not layers:
        return []
    told = (
        f"warning: the base is quantized: {layers} layers are dequantized for the merge, and the merged model is a plain one "
        "(arriero quantize makes it small again)"
    )
    if not inputs_too:
        return [told]
    return [
        told,
        INPUTS_NOT_ROUNDED,
    ]
