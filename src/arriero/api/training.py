"""Corpora, training runs and scores."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.api.adapters import adapter_options
from arriero.api.groups import build
from arriero.config.model import ModelOptions
from arriero.config.option import specs_of
from arriero.config.parallel import ParallelOptions
from arriero.errors import ConfigError

if TYPE_CHECKING:
    from typing import Unpack

    from arriero.api.keywords import EvaluateKeywords, FinetuneKeywords, PreprocessKeywords, PretrainKeywords
    from arriero.api.model import Model
    from arriero.data.corpus.admission import CorpusTotals


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        folder: the run folder: the final model or adapter, checkpoints, log, plot, configuration.
        results: what is in its `all_results.json`: steps, seconds, speed, final losses and scores.
    """

    folder: Path
    results: dict[str, Any]


def preprocess(**options: Unpack[PreprocessKeywords]) -> CorpusTotals:
    """Turn raw text into a token corpus for `pretrain`: the verb `preprocess`.

    Args:
        options: `input_path`, `output_prefix` and `model_name_or_path` (for the tokenizer) must be given.

    Raises:
        ArrieroError: text that cannot be read, or a corpus that cannot be written.
    """
    from arriero.data.corpus.build import CorpusBuilder

    (preprocessing,) = build("preprocess", options)
    return CorpusBuilder(preprocessing).build()


def pretrain(model: str | PathLike[str], **options: Unpack[PretrainKeywords]) -> Run:
    """Train on a token corpus: the verb `pretrain`.

    Args:
        model: whose shape and tokenizer are taken, and with `continue_training=True` its weights.
        options: `input_dir` (the corpus) and `output_dir` must be given.

    Raises:
        ArrieroError: options that cannot go together, a broken corpus, a run that cannot go on.
        RunStopped: a signal ended it; everything is saved.
    """
    from arriero.training.pretraining import PretrainOptions
    from arriero.training.pretraining import pretrain as train

    run = PretrainOptions.of(build("pretrain", options, model_name_or_path=model))
    results = train(run)
    return Run(Path(run.checkpoint.output_dir), results)


def finetune(model: str | PathLike[str], **options: Unpack[FinetuneKeywords]) -> Run:
    """Fine-tune a model, by all its weights or by an adapter (`lora=True`, `prefix_tuning=True`): the verb `finetune`.

    Args:
        model: a folder, a named model or a Hub id.
        options: `dataset_path` (or `data_name`) and `output_dir` must be given.

    Raises:
        ArrieroError: options that cannot go together, rows that cannot be used, a run that cannot go on.
        RunStopped: a signal ended it; everything is saved.
    """
    from arriero.training.finetune_options import FinetuneOptions
    from arriero.training.finetuning import finetune as train

    run = FinetuneOptions.of(build("finetune", options, model_name_or_path=model))
    results = train(run)
    return Run(Path(run.checkpoint.output_dir), results)


def evaluate(
    model: str | PathLike[str] | Model,
    *,
    adapter: str | PathLike[str] | None = None,
    **options: Unpack[EvaluateKeywords],
) -> dict[str, float]:
    """Score a model on labelled rows: the verb `evaluate`, but for lm-eval's tasks.

    Args:
        model: a folder, a named model, a Hub id, or one that is loaded already.
        adapter: the folder of a LoRA adapter or of a prefix; a loaded model has its own.
        options: `dataset_path` (or `data_name`) must be given.

    Returns:
        `loss`, `ppl` and `accuracy` of the answers' tokens; with `task_name="squad_qa"` also `exact_match` and `f1` in percent,
        with `eval_with_do_generation=True` ROUGE and BLEU.

    Raises:
        ArrieroError: rows that cannot be used, or a model that cannot be loaded.
    """
    from arriero.api.model import Model
    from arriero.training.scoring import evaluate as score

    if not isinstance(model, Model):
        return score(*build("evaluate", options, model_name_or_path=model, **adapter_options(adapter)))
    ways = {spec.name for group in (ModelOptions, ParallelOptions) for spec in specs_of(group)} & options.keys()
    if adapter is not None or ways:
        raise ConfigError(f"{min(ways, default='adapter')}: the model is loaded already; give it to arriero.load")
    _, *groups = build("evaluate", options, model_name_or_path=model.folder)
    return score(model.loaded, *groups)
