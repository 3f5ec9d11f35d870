"""`arriero finetune`: teach a model a task, by all its weights or by LoRA."""

from __future__ import annotations

import os
from pathlib import Path

from arriero.commands.hub_push import check_push, push
from arriero.commands.next_command import tell_next
from arriero.config.adapter import AdapterOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.data import DataOptions, PreviewOptions
from arriero.config.hub import HubOptions
from arriero.config.logging import LoggingOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.preference import PreferenceOptions
from arriero.config.quantization import QuantizationOptions
from arriero.config.training import FINETUNE
from arriero.config.vocabulary import VocabularyOptions

HELP = "Fine-tune a model on questions and answers, instructions or conversations: all weights, or LoRA with --lora."

OPTIONS: tuple[type, ...] = (*FINETUNE, HubOptions, PreviewOptions)


def run(
    model: ModelOptions,
    data: DataOptions,
    optimization: OptimizationOptions,
    precision: PrecisionOptions,
    adapter: AdapterOptions,
    quantization: QuantizationOptions,
    preference: PreferenceOptions,
    vocabulary: VocabularyOptions,
    parallel: ParallelOptions,
    checkpoint: CheckpointOptions,
    logging: LoggingOptions,
    hub: HubOptions,
    preview: PreviewOptions,
) -> int:
    """Fine-tune, or with --preview only show rows."""
    if preview.preview is not None:
        _show_rows(model, data, preview, vocabulary, pairs=preference.preference is not None)
        return 0
    check_push(hub, checkpoint, do_train=optimization.do_train)
    from arriero.training.finetune_options import FinetuneOptions
    from arriero.training.finetuning import finetune

    finetune(
        FinetuneOptions(
            model=model,
            data=data,
            optimization=optimization,
            precision=precision,
            adapter=adapter,
            quantization=quantization,
            preference=preference,
            vocabulary=vocabulary,
            parallel=parallel,
            checkpoint=checkpoint,
            logging=logging,
        )
    )
    if optimization.do_train:
        _tell_next(checkpoint.output_dir, adapter, data)
    push(hub, Path(checkpoint.output_dir))
    return 0


def _tell_next(folder: str, adapter: AdapterOptions, data: DataOptions) -> None:
    """How to try the result: what was trained for a task is asked as the task asks."""
    name = "lora_path" if adapter.lora else "prefix_path" if adapter.prefix_tuning else None
    if data.task_name is None:
        tell_next("chat", *(["--" + name] if name else []), folder)
        return
    rows = {"dataset_path": data.dataset_path, "data_name": data.data_name, "task_name": data.task_name}
    given = [word for option, value in rows.items() if value is not None for word in (f"--{option}", value)]
    tell_next("evaluate", f"--{name or 'model_name_or_path'}", folder, *given)


def _show_rows(
    model: ModelOptions, data: DataOptions, options: PreviewOptions, vocabulary: VocabularyOptions, *, pairs: bool
) -> None:
    """Print the first training rows; of several processes the first does that."""
    from arriero.data.new_tokens import with_new_tokens
    from arriero.data.preview import preview, preview_pairs, wants_color
    from arriero.data.sources import check_data
    from arriero.data.tokenizer import load_tokenizer
    from arriero.formats.download import resolve_model

    if os.environ.get("RANK", "0") != "0":
        return
    check_data(data.dataset_path, data.data_name, data.task_name)
    cache = Path(model.cache_dir) if model.cache_dir else None
    tokenizer = load_tokenizer(resolve_model(model.tokenizer_name_or_path or model.model_name_or_path, cache_dir=cache))
    if vocabulary.add_tokens or vocabulary.add_special_tokens:
        tokenizer = with_new_tokens(tokenizer, vocabulary.add_tokens, vocabulary.add_special_tokens)
    show = preview_pairs if pairs else preview
    print(show(data, tokenizer, options.preview or 1, color=wants_color(options.preview_color)))
