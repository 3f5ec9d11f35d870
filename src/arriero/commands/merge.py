"""`arriero merge`: join an adapter and its base, or the shards of a model, and prove that the result computes the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.config.adapter import AdapterPathOptions
from arriero.config.merging import MergeOptions
from arriero.config.model import ModelOptions
from arriero.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from arriero.adapters.lora import LoRAConfig
    from arriero.models.llama import LlamaForCausalLM

HELP = (
    "Join LoRA adapters and their base, or a model's tensor-parallel shards, into one model folder; the result is checked "
    "numerically."
)

OPTIONS: tuple[type, ...] = (ModelOptions, AdapterPathOptions, MergeOptions)


def run(model: ModelOptions, adapter: AdapterPathOptions, merge: MergeOptions) -> int:
    """Merge an adapter where one is named, else shards; of several processes the first does it."""
    from arriero.parallel.processes import launched_size

    if adapter.prefix_path:
        raise ConfigError("--prefix_path: a prefix is no change of weights and cannot be merged; give --lora_path")
    if launched_size() > 1 and int(os.environ["RANK"]) > 0:
        return 0
    check_target(merge.output_path, "--output_path")
    if adapter.lora_path:
        return _merge_adapter(model, adapter.lora_path, merge)
    from arriero.engine.loading import model_folder
    from arriero.formats.tensor_shards import is_sharded

    folder = model_folder(model.model_name_or_path, model.cache_dir)
    if not is_sharded(folder):
        raise ConfigError(
            f"{folder} is one model already: merge needs --lora_path, the folder of an adapter that is to be joined with "
            "it, or a folder of shards (model-tp00-of-04.safetensors and so on)"
        )
    merge_with_progress(folder, merge.output_path, merge.max_shard_size, model.dtype, verify=merge.verify)
    return 0


def check_target(path: str, option: str) -> None:
    """Raises ConfigError for a folder that holds something."""
    if Path(path).is_dir() and any(Path(path).iterdir()):
        raise ConfigError(f"{option} {path} is not empty: name a new folder")


def merge_with_progress(
    folder: Path, target: str, max_shard_size: str = "5GB", dtype: str = "auto", *, verify: bool = True
) -> None:
    """Join a folder of shards, with a progress bar, and say what the comparison gave."""
    from tqdm import tqdm

    from arriero.formats.shard_merging import merge_shards

    with tqdm(unit="tensor", desc="merge", leave=False, delay=1.0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        comparison = merge_shards(
            folder,
            target,
            max_shard_size=max_shard_size,
            dtype=None if dtype == "auto" else dtype,
            verify=verify,
            progress=progress,
        )
    print(f"merged model: {target}" + (f" ({comparison})" if comparison is not None else " (not compared)"))


def _merge_adapter(model: ModelOptions, lora_path: str, merge: MergeOptions) -> int:
    """Merge, write, read back and compare logits with those of base + adapter."""
    import torch

    from arriero.adapters.lora import apply_lora, load_adapter_state, merge_lora
    from arriero.engine.loading import load
    from arriero.formats import hf

    target = Path(merge.output_path)
    config, state = _adapter_of(lora_path, merge)
    if merge.output_kind == "adapter":
        code = _write_adapter(config, state, model.model_name_or_path, target)
        _keep_rounding(lora_path, target)
        return code
    loaded = load(model)
    _dequantize(loaded.model)
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
    _keep_rounding(lora_path, target)
    if not merge.verify:
        print(f"merged model: {target} (not compared)")
        return 0
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
    print(
        f"merged model: {target} (logits differ from base + adapter by at most {difference:.1e}, largest logit {size:.1f})"
    )
    return 0


def _paths(lora_path: str) -> list[str]:
    """The folders that --lora_path names."""
    return [lora_path] if Path(lora_path).is_dir() else [path.strip() for path in lora_path.split(",")]


def _keep_rounding(lora_path: str, target: Path) -> None:
    """What was trained with rounded weights computes with them after the merge too."""
    from arriero.quantization.qat import SETTINGS_FILE
    from arriero.training.qat_weights import copy_rounding

    rounded = [path for path in map(Path, _paths(lora_path)) if (path / SETTINGS_FILE).is_file()]
    if len(_paths(lora_path)) == 1:
        for path in rounded:
            copy_rounding(path, target)
    elif rounded:
        print(f"the rounding of {rounded[0]} ({SETTINGS_FILE}) is left out: no sum of adapters was trained with it")


def _adapter_of(lora_path: str, merge: MergeOptions) -> tuple[LoRAConfig, Mapping[str, Tensor]]:
    """The adapter of one folder as it is, or the weighted sum of those of several."""
    from arriero.adapters.lora_mix import check_mix, mix_adapters
    from arriero.adapters.peft_config import from_peft
    from arriero.formats import peft

    paths = _paths(lora_path)
    adapters = []
    for path in paths:
        stored, state = peft.load_adapter(Path(path))
        adapters.append((from_peft(stored), state))
    if len(adapters) == 1 and not merge.adapter_weights:
        if merge.output_kind == "adapter":
            raise ConfigError("--output_kind adapter joins several adapters: give --lora_path a,b or --adapter_weights")
        return adapters[0]
    weights = merge.adapter_weights or [1.0] * len(adapters)
    mixed = mix_adapters(adapters, weights)
    if merge.verify:
        check_mix(mixed, adapters, weights)
    for path, weight in zip(paths, weights, strict=True):
        print(f"{weight:g} x {path}")
    return mixed


def _write_adapter(config: LoRAConfig, state: Mapping[str, Tensor], base_model: str, target: Path) -> int:
    from arriero.adapters.peft_config import to_peft
    from arriero.formats import peft

    peft.save_adapter(target, state, to_peft(config, base_model))
    print(f"adapter of rank {config.rank}: {target}")
    return 0


def _dequantize(model: LlamaForCausalLM) -> None:
    """Give a quantized model plain weights, and say so."""
    from arriero.formats.quantized import plain
    from arriero.quantization.linear import dequantize_layers

    names = dequantize_layers(model)
    if names:
        model.config = plain(model.config)
        print(
            f"warning: the base is quantized: {len(names)} layers are dequantized for the merge, and the merged model is a "
            "plain one (arriero quantize makes it small again)"
        )
