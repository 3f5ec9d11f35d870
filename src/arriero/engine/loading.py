"""From a name to a model ready to train, score or generate: base weights, adapter, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from arriero.adapters.lora import apply_lora, check_adapter, load_adapter_state, merge_lora
from arriero.adapters.peft_config import from_peft
from arriero.adapters.prefix import apply_prefix, load_prefix_state, prefix_state
from arriero.adapters.prefix_files import open_prefix, whole_state, with_prefix
from arriero.config.adapter import AdapterPathOptions
from arriero.config.adapter_base import adapter_kind, stored_base
from arriero.config.model import ModelOptions
from arriero.config.vocabulary import VocabularyOptions
from arriero.data.new_tokens import with_new_tokens
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.adapter_tokenizer import note_other_tokenizer
from arriero.engine.new_rows import NewRows, fill
from arriero.engine.qat import apply_stored_rounding
from arriero.errors import ConfigError, FormatError
from arriero.formats import hf, peft
from arriero.formats.adapter_base import base_of_adapters, rounding, tell
from arriero.formats.bundle_folder import is_bundle
from arriero.formats.download import resolve_model
from arriero.formats.parts import Placement
from arriero.formats.quantized import quantizing
from arriero.formats.tied_head import read_config
from arriero.models.llama import Attention, LlamaForCausalLM, RMSNorm
from arriero.models.vocabulary import resize_vocabulary
from arriero.parallel.materialize import Values, materialize
from arriero.parallel.parallelize import check_layout, parallelize
from arriero.parallel.processes import Processes, launched_size
from arriero.quantization.choice import scheme_for
from arriero.quantization.linear import has_quantized_layers, linear_layers, refuse_quantized
from arriero.quantization.qat import SETTINGS_FILE
from arriero.quantization.schemes import WeightScheme


@dataclass(frozen=True)
class LoadedBase:
    """A model and the folder it came from.

    Attributes:
        values: where the weights come from, if the model is still on the meta device.
        scheme: of the linear layers that were quantized while they were loaded.
    """

    model: LlamaForCausalLM
    folder: Path
    device: torch.device
    values: Values | None = None
    scheme: WeightScheme | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, and the folder they came from.

    Attributes:
        values: where the weights come from, if the model is still on the meta device: several processes are to share it out.
        scheme: of the linear layers that were quantized while they were loaded.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    folder: Path
    device: torch.device
    values: Values | None = None
    scheme: WeightScheme | None = None


def pick_device(name: str) -> torch.device:
    """The torch device of a `--device` option.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device gpu: this machine has no GPU that torch can use; leave it out or say --device cpu")
    if str(device) == "cuda" and launched_size() > 1:  # one for each process
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def model_folder(name: str, cache_dir: str | None) -> Path:
    """The local folder of a model, downloaded if need be."""
    return resolve_model(name, cache_dir=Path(cache_dir) if cache_dir else None)


def load(
    options: ModelOptions,
    dtype: str | None = None,
    processes: Processes | None = None,
    quantize_base: str | None = None,
    vocabulary: VocabularyOptions | None = None,
    adapters: Sequence[str] = (),
) -> LoadedModel:
    """The base model of the options; on the meta device where several processes are to share it out.

    Args:
        dtype: overrules `options.dtype` where that is "auto".
        quantize_base: "nf4" or "int8", to hold the linear layers in few bits; they are quantized as they are read, so that
            little more memory than theirs is taken.
        vocabulary: tokens that tokenizer and model get on top.
        adapters: folders of those that are to go on it: it is rounded as the base that they were trained on, and a warning
            tells where it is another one. Several processes share out the rounded weights, in the model's dtype.
    """
    processes = processes or Processes()
    names = options.tokenizer_name_or_path
    folder = _base_folder(options, processes)
    if names:
        processes.by_first(lambda: str(model_folder(names, options.cache_dir)))
    tokenizer = load_tokenizer(model_folder(names, options.cache_dir) if names else folder)
    base = _load_base(options, folder, dtype, processes, quantize_base, adapters)
    model, values = base.model, base.values
    if vocabulary is not None and vocabulary.changes:
        tokenizer, values = grow_vocabulary(tokenizer, model, folder, vocabulary, values)
    if not processes.alone:
        check_layout(model.config, processes.layout)
    check_vocabulary(tokenizer, model)
    choose_kernels(model, options)
    return LoadedModel(model, tokenizer, folder, base.device, values, base.scheme)


def load_base(options: ModelOptions, adapters: Sequence[str] = ()) -> tuple[LoadedBase, torch.dtype]:
    """A model whose weights are to be computed with: in one process, without a tokenizer, and nothing of it rounded.

    Returns:
        The model, in a type that holds every stored weight and every number of `options.dtype`; and that type, or the one
        that the model has otherwise.
    """
    processes = Processes()
    folder = _base_folder(options, processes)
    empty, stored = hf.empty_model(folder, None)
    own = empty.model.embed_tokens.weight.dtype
    wanted = own if options.dtype == "auto" else getattr(torch, options.dtype)
    exact = hf.dtype_name(reduce(torch.promote_types, stored, wanted))
    base = _load_base(replace(options, dtype="auto"), folder, exact, processes, None, adapters)
    choose_kernels(base.model, options)
    return base, wanted


def _base_folder(options: ModelOptions, processes: Processes) -> Path:
    """The local folder of the base model, which one process downloads if need be."""
    pick_device(options.device)  # refused before anything is downloaded
    processes.by_first(lambda: str(model_folder(options.model_name_or_path, options.cache_dir)))
    folder = model_folder(options.model_name_or_path, options.cache_dir)
    if peft.is_adapter(folder):
        name, base = adapter_kind(folder) or "lora_path", stored_base("--model_name_or_path", str(folder))
        raise ConfigError(
            f"--model_name_or_path {folder} is an adapter: give its base there{f' ({base})' if base else ''} and this folder "
            f"as --{name}"
        )
    if is_bundle(folder):
        raise ConfigError(
            f"--model_name_or_path {folder} is a bundle of arriero export, which infer and chat run: give the model it was "
            "made from"
        )
    return folder


def _load_base(
    options: ModelOptions,
    folder: Path,
    dtype: str | None,
    processes: Processes,
    quantize_base: str | None,
    adapters: Sequence[str],
) -> LoadedBase:
    device = pick_device(options.device)
    wanted = options.dtype if options.dtype != "auto" else dtype
    kind = getattr(torch, wanted) if wanted else None
    values = scheme = None
    report = tell if processes.first else lambda text: None
    trained_on = base_of_adapters(adapters, options.model_name_or_path, folder, report)
    if quantize_base is not None or trained_on is not None:
        scheme = scheme_for(quantize_base or trained_on or "", read_config(folder))
    if processes.alone:
        model = hf.load_model(folder, dtype=kind, device=device, scheme=scheme)
    elif scheme is not None and quantize_base is None:
        model, _ = hf.empty_model(folder, kind)
        values = rounding(hf.open_parts(folder, model.config).read_part, scheme, linear_layers(model.config))
        scheme = None
    else:
        model, _ = hf.empty_model(folder, kind, scheme=scheme)
        read = hf.open_parts(folder, model.config).read_part
        values = read if scheme is None else quantizing(read, scheme, linear_layers(model.config))
    return LoadedBase(model, folder, device, values, scheme)


def grow_vocabulary(
    tokenizer: Tokenizer, model: LlamaForCausalLM, folder: Path, options: VocabularyOptions, values: Values | None
) -> tuple[Tokenizer, Values | None]:
    """Add the tokens of the options to tokenizer and model, the latter in place, and say what was done.

    Args:
        folder: the model's.
        values: where the weights come from, of a model on the meta device.

    Raises:
        ConfigError: a tokenizer that takes no tokens, or quantized weights.
        FormatError: a tokenizer that has more tokens than the model, if `--resize_vocab` is not given.
    """
    refuse_quantized(model, "a larger vocabulary", "give the original model")
    if not options.resize_vocab:
        check_vocabulary(tokenizer, model)
    grown = tokenizer
    if options.add_tokens or options.add_special_tokens:
        grown = with_new_tokens(tokenizer, options.add_tokens, options.add_special_tokens)
        wanted = [*options.add_tokens, *options.add_special_tokens]
        known = [token for token in wanted if tokenizer.token_to_id(token) is not None]
        new = [f"{token} ({grown.token_to_id(token)})" for token in wanted if token not in known]
        print(f"new tokens: {', '.join(new) or 'none'}" + (f"; known already: {', '.join(known)}" if known else ""))
    held = model.config.vocab_size
    rows = NewRows(min(tokenizer.vocab_size, held), grown.vocab_size, held, options.rows(held, grown.vocab_size))
    if rows.rows == held and rows.tokens <= rows.known:
        return grown, values
    print(f"vocabulary: {held:,} rows, now {rows.rows:,}; the new ones are the mean of the first {rows.known:,}")
    if values is None:
        fill(model, rows, hf.open_parts(folder, model.config).read_part)
        return grown, None
    resize_vocabulary(model, rows.rows)
    return grown, rows.values(values)


def check_vocabulary(tokenizer: Tokenizer, model: LlamaForCausalLM) -> None:
    """Raises FormatError where the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise FormatError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {model.config.vocab_size} embeddings: "
            "they do not belong together, check --tokenizer_name_or_path (finetune: --resize_vocab gives it more)"
        )


def choose_kernels(model: LlamaForCausalLM, options: ModelOptions) -> None:
    """Let the layers use what `--use_flash_attention` and `--use_fused_rms_norm` allow."""
    for module in model.modules():
        if isinstance(module, Attention) and not options.use_flash_attention:
            module.backend = "reference"
        elif isinstance(module, RMSNorm):
            module.fused = options.use_fused_rms_norm


def load_for_inference(
    options: ModelOptions, adapter: AdapterPathOptions, processes: Processes | None = None
) -> LoadedModel:
    """A model with its adapter merged into the weights, or its prefix before its keys and values, in evaluation mode.

    The base is rounded as the adapter's was in training (a folder with `base_quantization.json`).
    What was trained with rounded weights (a folder with `qat.json`) computes with them.
    """
    adapter.check_one()
    dtype = None if pick_device(options.device).type == "cuda" else "float32"
    adapters = [path for path in (adapter.lora_path, adapter.prefix_path) if path]
    loaded = load(options, dtype=dtype, processes=processes, adapters=adapters)
    for path in adapters:
        if not options.tokenizer_name_or_path and (processes is None or processes.first):
            note_other_tokenizer(Path(path), loaded.tokenizer)
    trained = Path(adapter.lora_path) if adapter.lora_path else loaded.folder
    rounded = (trained / SETTINGS_FILE).is_file()
    if adapter.lora_path:
        config, state = peft.load_adapter(Path(adapter.lora_path))
        apply_lora(loaded.model, from_peft(config), fresh=False)
        if loaded.values is not None:
            check_adapter(loaded.model, state)
            loaded = replace(loaded, values=with_adapter(loaded.values, state))
        else:
            load_adapter_state(loaded.model, state)
            # else the weights would grow to what they were, or the sum that is to be rounded be rounded before
            if (loaded.scheme is not None or not has_quantized_layers(loaded.model)) and not rounded:
                merge_lora(loaded.model)
                loaded = replace(loaded, scheme=None)
    if rounded:
        tensor_parts = processes.layout.tp if processes is not None else 1
        values = apply_stored_rounding(loaded.model, trained, loaded.values, column_parts=tensor_parts)
        loaded = replace(loaded, values=values)
    if adapter.prefix_path:
        loaded = with_stored_prefix(loaded, adapter.prefix_path, options.model_name_or_path)
    loaded.model.requires_grad_(False)
    if processes is not None and loaded.values is not None:
        parallelize(loaded.model, processes, loaded.device)
        materialize(loaded.model, loaded.device, loaded.values)
    loaded.model.eval()
    return loaded


def with_stored_prefix(loaded: LoadedModel, prefix_path: str, base_model: str) -> LoadedModel:
    """The model with a stored prefix before its keys and values."""
    stored = open_prefix(prefix_path, loaded.model.config, base_model)
    apply_prefix(loaded.model, stored.config)
    if loaded.values is not None:
        return replace(loaded, values=with_prefix(loaded.values, stored.read))
    shapes = {name: tuple(tensor.shape) for name, tensor in prefix_state(loaded.model).items()}
    load_prefix_state(loaded.model, whole_state(stored, shapes))
    return loaded


def with_adapter(values: Values, state: Mapping[str, Tensor]) -> Values:
    """The values of a model with an adapter: the base's, and those of `state` where it has the name."""

    def value(name: str, placement: Placement) -> Tensor:
        return state[name][placement.box] if name in state else values(name, placement)

    return value
