"""A pre-training run from its options: corpus, fresh or loaded model, trainer, final model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.config.pretraining import CorpusOptions, PretrainModelOptions, PretrainOptimizationOptions
from arriero.data.batch import Batch, LazyBatches
from arriero.data.corpus.dataset import CorpusDataset, Epochs, build_datasets, has_documents
from arriero.data.corpus.fingerprint import check_tokenizer
from arriero.data.corpus.found import find_corpora
from arriero.data.sft import IGNORE
from arriero.data.steps import DataShare, PretrainingSteps, corpus_batch
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.loading import LoadedModel, check_vocabulary, choose_kernels, load, pick_device
from arriero.errors import ConfigError
from arriero.formats.download import model_config, resolve_tokenizer
from arriero.formats.parts import Placement
from arriero.models.config import LlamaConfig
from arriero.models.initialization import initial_values
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.parallelize import check_layout
from arriero.parallel.processes import Processes
from arriero.quantization.linear import refuse_quantized
from arriero.training.agreement import check_same_data
from arriero.training.callbacks.stop_signals import StopSignals
from arriero.training.checkpoint import load_checkpoint
from arriero.training.evaluation import EvaluationStopped, evaluate_loss
from arriero.training.execution import Execution, build_execution
from arriero.training.freezing import freeze
from arriero.training.run import (
    RunOptions,
    build_callbacks,
    build_precision,
    build_trainer,
    check_run,
    joined,
    same_weights,
    set_seed,
    share_out,
    train,
)
from arriero.training.run_folder import RunFolder
from arriero.training.run_results import final_metrics, save_weights, write_results
from arriero.training.weights import FullWeights

VOCABULARY_MULTIPLE = 128  # a fresh model's embedding is as large as suits matrix units


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """The option groups of a pre-training run."""

    model: PretrainModelOptions
    corpus: CorpusOptions
    optimization: PretrainOptimizationOptions


@dataclass(frozen=True)
class CorpusEvaluation:
    """Scores the first `batches` batches of a data set (0: all of it), the same ones every time."""

    execution: Execution
    dataset: CorpusDataset
    tokenizer: Tokenizer
    batch_size: int
    batches: int
    reset_attention_mask: bool

    def __call__(self) -> dict[str, float]:
        """`loss` (nats a token), `ppl`, `accuracy`, and `bits_per_byte` of the text (no special tokens among its bytes)."""
        rows = self._rows()
        count = math.ceil(len(rows) / self.batch_size)
        metrics = evaluate_loss(self.execution, LazyBatches(count, self._batch))
        tokens, size = self._size
        return {**metrics, "bits_per_byte": metrics["loss"] / math.log(2) * tokens / max(1, size)}

    def _rows(self) -> range:
        wanted = self.batches * self.batch_size or len(self.dataset)
        return range(min(wanted, len(self.dataset)))

    def _batch(self, number: int) -> Batch:
        rows = self._rows()[number * self.batch_size : (number + 1) * self.batch_size]
        return corpus_batch([self.dataset[i] for i in rows], self.reset_attention_mask)

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Labelled tokens, and the bytes of text they stand for."""
        lengths = np.array(self.tokenizer.byte_lengths(), dtype=np.int64)
        tokens = size = 0
        for row in self._rows():
            labels = self.dataset[row].labels
            labels = labels[labels != IGNORE]
            tokens, size = tokens + len(labels), size + int(lengths[labels].sum())
        return tokens, size


def fresh_config(config: LlamaConfig, sequence_length: int, tokenizer: Tokenizer) -> LlamaConfig:
    """The configuration of a model from scratch: room for the vocabulary (padded) and a sample, the tokenizer's own ends."""
    padded = math.ceil(max(config.vocab_size, tokenizer.vocab_size) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return dataclasses.replace(
        config,
        vocab_size=padded,
        max_position_embeddings=max(config.max_position_embeddings, sequence_length),
        bos_token_id=config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_token_id=config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
    )


def fresh_model(config: LlamaConfig, seed: int, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A model with random weights: those of a seed are the same on every device and in every precision."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.init_weights(seed)
    return model.to(device=device, dtype=dtype)


def find_tokenizer(options: PretrainModelOptions) -> Tokenizer:
    """The tokenizer of the run; nothing else is downloaded for it."""
    name = options.tokenizer_name_or_path or options.model_name_or_path
    return load_tokenizer(resolve_tokenizer(name, Path(options.cache_dir) if options.cache_dir else None))


def load_or_make(options: PretrainOptions, tokenizer: Tokenizer, processes: Processes) -> LoadedModel:
    """The model to train; `folder` is where the final model's side files come from.

    With several processes it is on the meta device, and `values` tells its weights.

    Raises:
        ConfigError: if a sample is longer than a given model's context.
        FormatError: if the tokenizer does not fit the model.
    """
    given, length = options.model, options.corpus.max_seq_length
    if given.continue_training:
        loaded = load(given, dtype=options.precision.weight_dtype, processes=processes)
        refuse_quantized(loaded.model, "--continue_training", "give the original model")
        context = loaded.model.config.max_position_embeddings
        if length > context:
            raise ConfigError(
                f"--max_seq_length {length} is above the model's context of {context} (max_position_embeddings): "
                "lower it, or stretch the model's RoPE in its config.json first"
            )
        return loaded
    cache = Path(given.cache_dir) if given.cache_dir else None
    config = fresh_config(model_config(given.config_name or given.model_name_or_path, cache), length, tokenizer)
    dtype = getattr(torch, given.dtype if given.dtype != "auto" else options.precision.weight_dtype)
    device = pick_device(given.device)
    seed, values = options.optimization.seed, None
    if processes.alone:
        model = fresh_model(config, seed, dtype, device)
    else:
        check_layout(config, processes.layout)
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(dtype)

        def values(name: str, placement: Placement) -> Tensor:
            return initial_values(name, placement.box, placement.shape, config, seed)

    choose_kernels(model, given)
    check_vocabulary(tokenizer, model)
    return LoadedModel(model, tokenizer, tokenizer.folder, device, values)


def load_data(options: PretrainOptions, tokenizer: Tokenizer, copies: int) -> dict[str, CorpusDataset]:
    """The parts of the corpus that the run needs: "train", "valid", "test".

    Args:
        copies: processes, or groups of them, that each see other rows.
    """
    optim, corpus = options.optimization, options.corpus
    for _, prefix in find_corpora(corpus.input_dir):
        check_tokenizer(prefix.with_name(f"{prefix.name}_meta.json"), tokenizer)
    per_step = optim.per_device_train_batch_size * optim.gradient_accumulation_steps * copies
    training: int | Epochs = optim.max_steps * per_step if optim.max_steps > 0 else Epochs(optim.num_train_epochs)
    test = corpus.do_predict
    if test is None:
        test = optim.do_eval and has_documents(corpus, "test")
    wanted = (
        training if optim.do_train else None,
        Epochs(1) if optim.do_eval else None,
        Epochs(1) if test else None,
    )
    return build_datasets(
        corpus, samples=wanted, seed=optim.seed, vocab_size=tokenizer.vocab_size, document_order=corpus.document_order
    )


def _known_by(dataset: CorpusDataset) -> str:
    digest = hashlib.sha256(json.dumps(dataset.fingerprint(), sort_keys=True).encode()).hexdigest()
    return f"{len(dataset)} samples, SHA-256 of their order {digest[:12]}"


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Train, evaluate, and write the final model into the run folder.

    Returns:
        What is written to `all_results.json`.

    Raises:
        RunStopped: if a signal ended the training early.
    """
    given, checkpoint = options.model, options.checkpoint
    check_run(options, ("loss", "ppl", "accuracy", "bits_per_byte"))
    if not (options.optimization.do_train or given.continue_training or checkpoint.resume_from_checkpoint):
        raise ConfigError(
            "--do_train no would score random weights: add --continue_training or --resume_from_checkpoint"
        )
    find_corpora(options.corpus.input_dir)
    with joined(options) as processes, RunFolder(checkpoint, processes) as folder, StopSignals() as signals:
        folder.check_inputs(given.model_name_or_path, given.tokenizer_name_or_path, given.config_name)
        return _pretrain(options, folder, signals, processes)


def _pretrain(
    options: PretrainOptions, folder: RunFolder, signals: StopSignals, processes: Processes
) -> dict[str, Any]:
    optim, corpus = options.optimization, options.corpus
    with processes.together():
        tokenizer = find_tokenizer(options.model)
        datasets = load_data(options, tokenizer, processes.layout.data)
        loaded = load_or_make(options, tokenizer, processes)
        if not options.model.continue_training:
            config, kind = loaded.model.config, "model" if folder.resume else "new model"
            print(f"a {kind} of {config.num_parameters():,} parameters, vocabulary {config.vocab_size:,}")
        if optim.freeze:
            print(f"frozen by --freeze: {freeze(loaded.model, optim.freeze):,} parameters")
    if not processes.alone:
        check_same_data(processes, {part: _known_by(dataset) for part, dataset in datasets.items()})
    same_weights(loaded, options, processes)
    share_out(loaded, options, processes, loaded.values, corpus.max_seq_length)
    set_seed(optim.seed)
    precision = build_precision(options.precision, loaded.device)
    size = optim.per_device_eval_batch_size

    def evaluation(part: str, batches: int) -> CorpusEvaluation | None:
        if part not in datasets:
            return None
        return CorpusEvaluation(
            build_execution(loaded.model, precision, loaded.device),
            datasets[part],
            tokenizer,
            size,
            batches,
            corpus.reset_attention_mask,
        )

    validate, test = evaluation("valid", corpus.eval_iters), evaluation("test", corpus.test_iters)
    weights = FullWeights(loaded.model, loaded.folder, tokenizer, options.checkpoint.max_shard_size)
    results: dict[str, Any] = {}
    trainer = None
    if optim.do_train:
        steps = PretrainingSteps(
            datasets["train"],
            optim.per_device_train_batch_size,
            optim.gradient_accumulation_steps,
            corpus.reset_attention_mask,
            DataShare(processes.data_rank, processes.layout.data),
        )
        trainer = build_trainer(
            options,
            loaded.model,
            steps,
            weights,
            folder.path,
            loaded.device,
            build_callbacks(options, folder.path, validate, loaded.model, tokenizer, signals, processes),
            processes,
            skip_steps=corpus.skipped_steps(),
        )
        results |= train(trainer, options, folder, signals)
    elif folder.resume:
        load_checkpoint(folder.resume, weights, processes=processes)
    if not processes.any(signals.received is not None):  # it may have reached some of them only
        results |= final_metrics(trainer, options, validate, loaded.model, folder.resume or loaded.folder, processes)
        if test is not None:
            with contextlib.suppress(EvaluationStopped):
                scores = {f"test_{key}": value for key, value in test().items()}
                print("test | " + " | ".join(f"{key} {value:.4f}" for key, value in scores.items()))
                results |= scores
    if optim.do_train:
        save_weights(weights, folder.path, processes, sharded=options.checkpoint.save_sharded_model)
    write_results(folder.path, results, processes, trained=optim.do_train)
    print(f"model and log: {folder.path}")
    return results
