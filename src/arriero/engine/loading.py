"""From a name to a model ready to train, score or generate: base weights, adapter, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from arriero.adapters.lora import apply_lora, load_adapter_state, merge_lora
from arriero.adapters.peft_config import from_peft
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.errors import ConfigError, FormatError
from arriero.formats import hf, peft
from arriero.formats.download import resolve_model
from arriero.models.llama import Attention, LlamaForCausalLM, RMSNorm


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, and the folder they came from."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    folder: Path
    device: torch.device


def pick_device(name: str) -> torch.device:
    """The torch device of a `--device` option.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device gpu: this machine has no GPU that torch can use; leave it out or say --device cpu")
    return device


def model_folder(name: str, cache_dir: str | None) -> Path:
    """The local folder of a model, downloaded if need be."""
    return resolve_model(name, cache_dir=Path(cache_dir) if cache_dir else None)


def load(options: ModelOptions, dtype: str | None = None) -> LoadedModel:
    """The base model of the options.

    Args:
        dtype: overrules `options.dtype` where that is "auto".
    """
    device = pick_device(options.device)
    folder = model_folder(options.model_name_or_path, options.cache_dir)
    if (folder / peft.ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model_name_or_path {folder} is an adapter: give its base there and this folder as --lora_path"
        )
    wanted = options.dtype if options.dtype != "auto" else dtype
    model = hf.load_model(folder, dtype=getattr(torch, wanted) if wanted else None, device=device)
    names = options.tokenizer_name_or_path
    tokenizer = load_tokenizer(model_folder(names, options.cache_dir) if names else folder)
    check_vocabulary(tokenizer, model)
    choose_kernels(model, options)
    return LoadedModel(model, tokenizer, folder, device)


def check_vocabulary(tokenizer: Tokenizer, model: LlamaForCausalLM) -> None:
    """Raises FormatError where the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise FormatError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {model.config.vocab_size} embeddings: "
            "they do not belong together, check --tokenizer_name_or_path"
        )


def choose_kernels(model: LlamaForCausalLM, options: ModelOptions) -> None:
    """Let the layers use what `--use_flash_attention` and `--use_fused_rms_norm` allow."""
    for module in model.modules():
        if isinstance(module, Attention) and not options.use_flash_attention:
            module.backend = "reference"
        elif isinstance(module, RMSNorm):
            module.fused = options.use_fused_rms_norm


def load_for_inference(options: ModelOptions, adapter: AdapterPathOptions) -> LoadedModel:
    """A model with its adapter merged into the weights, in evaluation mode."""
    if adapter.prefix_path:
        raise ConfigError("--prefix_path: prefix tuning is not in this version yet; --lora_path takes a LoRA adapter")
    loaded = load(options, dtype=None if pick_device(options.device).type == "cuda" else "float32")
    if adapter.lora_path:
        config, state = peft.load_adapter(Path(adapter.lora_path))
        apply_lora(loaded.model, from_peft(config))
        load_adapter_state(loaded.model, state)
        merge_lora(loaded.model)
    loaded.model.requires_grad_(False)
    loaded.model.eval()
    return loaded
