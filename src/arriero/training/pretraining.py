"""A pre-training run from its options: corpus, fresh or loaded model, trainer, final model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arriero.config.files import write_config
from arriero.config.pretraining import CorpusOptions, PretrainModelOptions, PretrainOptimizationOptions
from arriero.data.batch import Batch
from arriero.data.corpus.dataset import CorpusDataset, Epochs, build_datasets, has_documents
from arriero.data.corpus.fingerprint import check_tokenizer
from arriero.data.corpus.found import find_corpora
from arriero.data.sft import IGNORE
from arriero.data.steps import PretrainingSteps, corpus_batch
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.loading import LoadedModel, check_vocabulary, choose_kernels, load, pick_device
from arriero.errors import ConfigError
from arriero.formats.download import model_config, resolve_tokenizer
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training.evaluation import evaluate_loss
from arriero.training.precision import Precision
from arriero.training.run import (
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

    model: LlamaForCausalLM
    dataset: CorpusDataset
    tokenizer: Tokenizer
    precision: Precision
    batch_size: int
    batches: int
    reset_attention_mask: bool

    def __call__(self) -> dict[str, float]:
        """`loss` (nats a token), `ppl`, `accuracy`, and `bits_per_byte` of the text (no special tokens among its bytes)."""
        metrics = evaluate_loss(self.model, self._batches(), self.precision)
        tokens, size = self._size()
        return {**metrics, "bits_per_byte": metrics["loss"] / math.log(2) * tokens / max(1, size)}

    def _rows(self) -> range:
        wanted = self.batches * self.batch_size or len(self.dataset)
        return range(min(wanted, len(self.dataset)))

    def _batches(self) -> Iterator[Batch]:
        rows = self._rows()
        for at in range(0, len(rows), self.batch_size):
            samples = [self.dataset[i] for i in rows[at : at + self.batch_size]]
            yield corpus_batch(samples, self.reset_attention_mask)

    def _size(self) -> tuple[int, int]:
        """Labelled tokens, and the bytes of text they stand for."""
        lengths = np.array(self.tokenizer.byte_lengths(), dtype=np.int64)
        tokens = size = 0
        for row in self._rows():
            labels = self.dataset[row].labels
            labels = labels[labels != IGNORE]
            tokens, size = tokens + len(labels), size + int(lengths[labels].sum())
        return tokens, size


def fresh_config(config: LlamaConfig, sequence_length: int, vocab_size: int) -> LlamaConfig:
    """The configuration of a model from scratch: room for the vocabulary (padded) and for a sample."""
    padded = math.ceil(max(config.vocab_size, vocab_size) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return dataclasses.replace(
        config,
        vocab_size=padded,
        max_position_embeddings=max(config.max_position_embeddings, sequence_length),
    )


def fresh_model(config: LlamaConfig, seed: int, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A model with random weights: those of a seed are the same on every device and in every precision."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(device=device, dtype=dtype)


def load_or_make(options: PretrainOptions) -> LoadedModel:
    """The model to train with its tokenizer; `folder` is where the final model's side files come from.

    Raises:
        ConfigError: if a sample is longer than a given model's context, or the tokenizer does not fit it.
    """
    given, length = options.model, options.corpus.max_seq_length
    if given.continue_training:
        loaded = load(given, dtype=options.precision.weight_dtype)
        context = loaded.model.config.max_position_embeddings
        if length > context:
            raise ConfigError(
                f"--max_seq_length {length} is above the model's context of {context} (max_position_embeddings): "
                "lower it, or stretch the model's RoPE in its config.json first"
            )
        return loaded
    cache = Path(given.cache_dir) if given.cache_dir else None
    folder = resolve_tokenizer(given.tokenizer_name_or_path or given.model_name_or_path, cache)
    tokenizer = load_tokenizer(folder)
    config = model_config(given.config_name or given.model_name_or_path, cache)
    config = fresh_config(config, length, tokenizer.vocab_size)
    dtype = getattr(torch, given.dtype if given.dtype != "auto" else options.precision.weight_dtype)
    device = pick_device(given.device)
    model = fresh_model(config, options.optimization.seed, dtype, device)
    choose_kernels(model, given)
    check_vocabulary(tokenizer, model)
    print(f"a new model of {config.num_parameters():,} parameters, vocabulary {config.vocab_size:,}")
    return LoadedModel(model, tokenizer, folder, device)


def load_data(options: PretrainOptions, tokenizer: Tokenizer) -> dict[str, CorpusDataset]:
    """The parts of the corpus that the run needs: "train", "valid", "test"."""
    optim, corpus = options.optimization, options.corpus
    for _, prefix in find_corpora(corpus.input_dir):
        check_tokenizer(prefix.with_name(f"{prefix.name}_meta.json"), tokenizer)
    per_step = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
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


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Train, evaluate, and write the final model into the run folder.

    Returns:
        What is written to `all_results.json`; nothing if a signal ended the training early.
    """
    check_run("pretrain", options)
    with RunFolder(options.checkpoint) as folder:
        return _pretrain(options, folder.path, folder.resume)


def _pretrain(options: PretrainOptions, folder: Path, resume: Path | None) -> dict[str, Any]:
    optim, corpus = options.optimization, options.corpus
    loaded = load_or_make(options)
    set_seed(optim.seed)
    datasets = load_data(options, loaded.tokenizer)
    precision = build_precision(options.precision, loaded.device)
    size = optim.per_device_eval_batch_size

    def evaluation(part: str, batches: int) -> CorpusEvaluation | None:
        if part not in datasets:
            return None
        return CorpusEvaluation(
            loaded.model, datasets[part], loaded.tokenizer, precision, size, batches, corpus.reset_attention_mask
        )

    validate, test = evaluation("valid", corpus.eval_iters), evaluation("test", corpus.test_iters)
    weights = FullWeights(loaded.model, loaded.folder, options.checkpoint.max_shard_size)
    write_config(folder / "config.yaml", options.groups)
    results: dict[str, Any] = {}
    trainer = None
    if optim.do_train:
        steps = PretrainingSteps(
            datasets["train"],
            optim.per_device_train_batch_size,
            optim.gradient_accumulation_steps,
            corpus.reset_attention_mask,
        )
        trainer = build_trainer(
            options,
            loaded.model,
            steps,
            weights,
            folder,
            loaded.device,
            build_callbacks(options, folder, validate, loaded.model, loaded.tokenizer),
            skip_steps=corpus.skipped_steps(),
        )
        trained = train(trainer, options, resume)
        if trained is None:
            return {}
        results |= trained
    results |= final_metrics(trainer, options, validate)
    if test is not None:
        scores = {f"test_{key}": value for key, value in test().items()}
        print("test | " + " | ".join(f"{key} {value:.4f}" for key, value in scores.items()))
        results |= scores
    if optim.do_train:
        save_weights(weights, folder)
    write_results(folder, results)
    print(f"model and log: {folder}")
    return results
