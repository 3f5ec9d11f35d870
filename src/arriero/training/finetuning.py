"""A fine-tuning run from its options: data, model, trainer, final model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arriero.adapters.lora import LoRAConfig, apply_lora, load_adapter_state, merge_lora
from arriero.adapters.peft_config import from_peft
from arriero.config.adapter import AdapterOptions
from arriero.config.data import DataOptions
from arriero.config.quantization import QuantizationOptions
from arriero.data.batch import packed_batches
from arriero.data.order import StepOrder, prefix_clusters
from arriero.data.samples import Sample
from arriero.data.sft import Example, encode_all
from arriero.data.sources import load_samples
from arriero.data.steps import FinetuningSteps
from arriero.engine.loading import LoadedModel, load
from arriero.errors import ConfigError
from arriero.formats import hf, peft
from arriero.training.callbacks.stop_signals import StopSignals
from arriero.training.checkpoint import WeightStore, load_checkpoint
from arriero.training.evaluation import evaluate_loss
from arriero.training.generation_metrics import evaluate_generation
from arriero.training.run import (
    Evaluate,
    RunOptions,
    build_callbacks,
    build_precision,
    build_trainer,
    check_run,
    final_metrics,
    save_weights,
    set_seed,
    train,
    write_results,
)
from arriero.training.run_folder import RunFolder
from arriero.training.weights import AdapterWeights, FullWeights


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """The option groups of a fine-tuning run."""

    data: DataOptions
    adapter: AdapterOptions
    quantization: QuantizationOptions


def check_supported(options: FinetuneOptions) -> None:
    """Refuse what this version cannot do, before anything is loaded.

    Raises:
        ConfigError: one line, naming the option and the way out.
    """
    generated = ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu4")
    check_run("finetune", options, generated if options.data.eval_with_do_generation else ("loss", "ppl", "accuracy"))
    if options.adapter.prefix_tuning:
        raise ConfigError("--prefix_tuning is not in this version yet: --lora trains a small adapter too")
    if options.quantization.qat:
        raise ConfigError("--qat is not in this version yet: fine-tune without it")
    if not (options.data.dataset_path or options.data.data_name):
        task = options.data.task_name or "squad"
        raise ConfigError(
            f"no data: give --dataset_path (a folder with train.json and dev.json), e.g. SQuAD v1.1 with --task_name {task}"
        )


def build_weights(loaded: LoadedModel, options: FinetuneOptions) -> WeightStore:
    """Make the model trainable as asked, and say how its trained weights are stored."""
    adapter = options.adapter
    if not adapter.lora:
        return FullWeights(loaded.model, loaded.folder, loaded.tokenizer.folder, options.checkpoint.max_shard_size)
    state = None
    if adapter.lora_path:
        stored, state = peft.load_adapter(Path(adapter.lora_path))
        config = from_peft(stored)
    else:
        config = LoRAConfig(
            rank=adapter.lora_rank,
            alpha=adapter.lora_alpha or 2.0 * adapter.lora_rank,
            dropout=adapter.lora_dropout,
            target_modules=tuple(adapter.lora_target_modules),
            bias=adapter.lora_bias,  # type: ignore[arg-type]
        )
    names = apply_lora(loaded.model, config)
    if state is not None:
        load_adapter_state(loaded.model, state)
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    total = loaded.model.config.num_parameters()
    print(
        f"LoRA: rank {config.rank} on {len(names)} layers, {trained:,} trained parameters ({trained / total:.2%} of {total:,})"
    )
    return AdapterWeights(loaded.model, config, options.model.model_name_or_path)


def build_steps(train: Sequence[Example], options: FinetuneOptions, loaded: LoadedModel) -> FinetuningSteps:
    """The rows of every step."""
    optim = options.optimization
    # RoPE that depends on a row's length gives its beginning other angles than a longer row's
    share = options.data.share_prefixes and not loaded.model.model.rotary.is_dynamic
    micro_batch = optim.per_device_train_batch_size
    clusters = prefix_clusters(train, micro_batch) if share else None
    order = StepOrder(len(train), micro_batch, optim.gradient_accumulation_steps, optim.seed, clusters=clusters)
    return FinetuningSteps(train, order, share_prefixes=share)


def build_evaluation(
    loaded: LoadedModel, samples: Sequence[Sample], examples: Sequence[Example], options: FinetuneOptions
) -> Evaluate:
    """What `--do_eval` computes."""
    size = options.optimization.per_device_eval_batch_size
    if options.data.eval_with_do_generation:
        return partial(evaluate_generation, loaded, samples, options.data, size)
    precision = build_precision(options.precision, loaded.device)
    share = not loaded.model.model.rotary.is_dynamic
    return lambda: evaluate_loss(loaded.model, packed_batches(examples, size, share_prefixes=share), precision)


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Train, evaluate and write the final model into the run folder.

    Returns:
        What is written to `all_results.json`.

    Raises:
        RunStopped: if a signal ended the training early.
    """
    check_supported(options)
    with RunFolder(options.checkpoint) as folder, StopSignals() as signals:
        folder.check_inputs(options.model.model_name_or_path, options.adapter.lora_path)
        return _finetune(options, folder, signals)


def _finetune(options: FinetuneOptions, folder: RunFolder, signals: StopSignals) -> dict[str, Any]:
    optim, data = options.optimization, options.data
    wanted = [split for split, do in (("train", optim.do_train), ("dev", optim.do_eval)) if do]
    samples = load_samples(data.dataset_path, data.data_name, data.task_name, wanted)
    limits = {"train": data.max_train_samples, "dev": data.max_eval_samples}
    samples = {split: rows[: limits[split]] for split, rows in samples.items()}
    loaded = load(options.model, dtype=options.precision.weight_dtype)
    set_seed(optim.seed)
    examples = {}
    src_length = data.sequence_length - data.tgt_length
    for split, rows in samples.items():
        examples[split], report = encode_all(rows, loaded.tokenizer, min(data.src_length, src_length), data.tgt_length)
        print(f"{split}: {report}")
    weights = build_weights(loaded, options)
    evaluate = build_evaluation(loaded, samples["dev"], examples["dev"], options) if "dev" in examples else None
    results: dict[str, Any] = {}
    trainer = None
    if optim.do_train:
        trainer = build_trainer(
            options,
            loaded.model,
            build_steps(examples["train"], options, loaded),
            weights,
            folder.path,
            loaded.device,
            build_callbacks(options, folder.path, evaluate, loaded.model, loaded.tokenizer, signals),
        )
        results |= train(trainer, options, folder, signals)
    elif folder.resume:
        load_checkpoint(folder.resume, weights)
    if not signals.received:
        results |= final_metrics(trainer, options, evaluate)
    if optim.do_train:
        save_final(loaded, weights, options, folder.path)
    write_results(folder.path, results, trained=optim.do_train)
    print(f"{'adapter' if options.adapter.lora else 'model'} and log: {folder.path}")
    return results


def save_final(loaded: LoadedModel, weights: WeightStore, options: FinetuneOptions, folder: Path) -> None:
    """The final weights, and with --merge_weights the merged model in `merged/`."""
    save_weights(weights, folder)
    if isinstance(weights, AdapterWeights):
        loaded.tokenizer.save(folder)
    if options.adapter.lora and options.adapter.merge_weights:
        merge_lora(loaded.model)
        hf.save_model(loaded.model, loaded.model.config, folder / "merged", extra_files_from=loaded.folder)
        print(f"merged model: {folder / 'merged'}")
