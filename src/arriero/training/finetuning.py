"""A fine-tuning run from its options: data, model, trainer, final model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from arriero.adapters.lora import apply_lora, load_adapter_state, merge_lora
from arriero.adapters.peft_config import from_peft
from arriero.data.batch import packed_batches
from arriero.data.order import StepOrder, prefix_clusters
from arriero.data.samples import Sample
from arriero.data.sft import Example, encode_all
from arriero.data.sources import check_data, load_samples
from arriero.data.steps import DataShare, FinetuningSteps
from arriero.engine.loading import LoadedModel, load
from arriero.errors import ConfigError
from arriero.formats import hf, peft
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.training.callbacks.stop_signals import StopSignals
from arriero.training.checkpoint import WeightStore, load_checkpoint
from arriero.training.evaluation import evaluate_loss
from arriero.training.execution import build_execution
from arriero.training.finetune_options import FinetuneOptions
from arriero.training.generation_metrics import evaluate_generation
from arriero.training.methods.build import build_weights
from arriero.training.run import (
    Evaluate,
    build_callbacks,
    build_precision,
    build_trainer,
    check_run,
    check_same_data,
    final_metrics,
    joined,
    save_weights,
    set_seed,
    share_out,
    train,
    write_results,
)
from arriero.training.run_folder import MERGED, RunFolder
from arriero.training.weights import AdapterWeights


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
    check_data(options.data.dataset_path, options.data.data_name, options.data.task_name)


def may_share_prefixes(loaded: LoadedModel, processes: Processes) -> bool:
    """Whether rows that begin alike can hold their beginning once: not where RoPE depends on a row's length, which gives its
    beginning other angles than a longer row's; nor where several processes cut each sequence."""
    return not loaded.model.model.rotary.is_dynamic and processes.layout.cp == 1


def build_steps(
    train: Sequence[Example], options: FinetuneOptions, loaded: LoadedModel, processes: Processes
) -> FinetuningSteps:
    """The rows of every step."""
    optim = options.optimization
    share = options.data.share_prefixes and may_share_prefixes(loaded, processes)
    if options.data.share_prefixes and processes.layout.cp > 1:
        print("--share_prefixes is off: it does not go with --context_parallel_degree, which cuts the rows")
    micro_batch = optim.per_device_train_batch_size
    clusters = prefix_clusters(train, micro_batch) if share else None
    own = DataShare(processes.data_rank, processes.layout.data)
    order = StepOrder(
        len(train),
        micro_batch,
        optim.gradient_accumulation_steps,
        optim.seed,
        clusters=clusters,
        processes=own.size,
    )
    return FinetuningSteps(train, order, share_prefixes=share, share=own)


def build_evaluation(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    examples: Sequence[Example],
    options: FinetuneOptions,
    processes: Processes,
) -> Evaluate:
    """What `--do_eval` computes."""
    size = options.optimization.per_device_eval_batch_size
    if options.data.eval_with_do_generation:
        return partial(evaluate_generation, loaded, samples, options.data, size)
    execution = build_execution(loaded.model, build_precision(options.precision, loaded.device), loaded.device)
    share = may_share_prefixes(loaded, processes)
    return lambda: evaluate_loss(execution, packed_batches(examples, size, share_prefixes=share))


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Train, evaluate and write the final model into the run folder.

    Returns:
        What is written to `all_results.json`.

    Raises:
        RunStopped: if a signal ended the training early.
    """
    check_supported(options)
    with joined(options) as processes, RunFolder(options.checkpoint, processes) as folder, StopSignals() as signals:
        folder.check_inputs(options.model.model_name_or_path, options.adapter.lora_path)
        return _finetune(options, folder, signals, processes)


def _finetune(
    options: FinetuneOptions, folder: RunFolder, signals: StopSignals, processes: Processes
) -> dict[str, Any]:
    optim, data = options.optimization, options.data
    wanted = [split for split, do in (("train", optim.do_train), ("dev", optim.do_eval)) if do]
    with processes.together():
        samples = load_samples(data.dataset_path, data.data_name, data.task_name, wanted)
        limits = {"train": data.max_train_samples, "dev": data.max_eval_samples}
        samples = {split: rows[: limits[split]] for split, rows in samples.items()}
        loaded = load(options.model, dtype=options.precision.weight_dtype, processes=processes)
        set_seed(optim.seed)
        examples = {}
        src_length = data.sequence_length - data.tgt_length
        for split, rows in samples.items():
            limit = min(data.src_length, src_length)
            examples[split], report = encode_all(rows, loaded.tokenizer, limit, data.tgt_length)
            print(f"{split}: {report}")
        weights, values = build_weights(loaded, options)
    if not processes.alone:
        check_same_data(processes, {split: _known_by(rows) for split, rows in examples.items()})
    share_out(loaded, options, processes, values, data.sequence_length)
    evaluate = None
    if "dev" in examples:
        evaluate = build_evaluation(loaded, samples["dev"], examples["dev"], options, processes)
    results: dict[str, Any] = {}
    trainer = None
    if optim.do_train:
        trainer = build_trainer(
            options,
            loaded.model,
            build_steps(examples["train"], options, loaded, processes),
            weights,
            folder.path,
            loaded.device,
            build_callbacks(options, folder.path, evaluate, loaded.model, loaded.tokenizer, signals, processes),
            processes,
        )
        results |= train(trainer, options, folder, signals)
    elif folder.resume:
        load_checkpoint(folder.resume, weights, processes=processes)
    if not processes.any(signals.received is not None):  # it may have reached some of them only
        results |= final_metrics(trainer, options, evaluate)
    if optim.do_train:
        save_final(loaded, weights, options, folder.path, processes)
    write_results(folder.path, results, processes, trained=optim.do_train)
    print(f"{'adapter' if options.adapter.lora else 'model'} and log: {folder.path}")
    return results


def _known_by(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example.length, *example.input_ids, *example.labels], dtype=np.int64).tobytes())
    return f"{len(examples)} rows, SHA-256 {digest.hexdigest()[:12]}"


def save_final(
    loaded: LoadedModel, weights: WeightStore, options: FinetuneOptions, folder: Path, processes: Processes
) -> None:
    """The final weights, and with --merge_weights the merged model in `merged/`."""
    save_weights(weights, folder, processes, sharded=options.checkpoint.save_sharded_model)
    if not isinstance(weights, AdapterWeights):
        return
    with processes.together():
        if processes.first:
            loaded.tokenizer.save(folder)
            if options.adapter.merge_weights:
                model = loaded.model if processes.alone else _whole_model(loaded, folder)
                merge_lora(model)
                hf.save_model(model, model.config, folder / MERGED, extra_files_from=loaded.folder)
                print(f"merged model: {folder / MERGED}")


def _whole_model(loaded: LoadedModel, adapter: Path) -> LlamaForCausalLM:
    """The base and the adapter just written, in one process."""
    model = hf.load_model(loaded.folder)
    config, state = peft.load_adapter(adapter)
    apply_lora(model, from_peft(config))
    load_adapter_state(model, state)
    return model
