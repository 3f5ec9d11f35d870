"""Corpora, training runs and scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.api.adapters import adapter_options
from arriero.api.arguments import model_name
from arriero.api.groups import build
from arriero.api.rows import rows_as_files
from arriero.api.words import in_python
from arriero.config.data import DataOptions
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


@in_python("preprocess")
def preprocess(**options: Unpack[PreprocessKeywords]) -> CorpusTotals:
    """Turn raw text into a token corpus for `pretrain`: the verb `preprocess`.

    Args:
        options: `input_path`, `output_prefix` and `model_name_or_path` (for the tokenizer) must be given. All of them:
            docs/verbs/preprocess.md and `arriero preprocess --help`.

    Raises:
        ArrieroError: text that cannot be read, or a corpus that cannot be written.
    """
    from arriero.data.corpus.build import CorpusBuilder

    (preprocessing,) = build("preprocess", options)
    return CorpusBuilder(preprocessing).build()


@in_python("pretrain")
def pretrain(model: str | PathLike[str], **options: Unpack[PretrainKeywords]) -> Run:
    """Train on a token corpus: the verb `pretrain`.

    Args:
        model: whose shape and tokenizer are taken, and with `continue_training=True` its weights.
        options: `input_dir` (the corpus) and `output_dir` must be given. All of them: docs/verbs/pretrain.md and
            `arriero pretrain --help`.

    Raises:
        ArrieroError: options that cannot go together, a broken corpus, a run that cannot go on.
        RunStopped: a signal ended it; everything is saved.
    """
    from arriero.training.pretraining import PretrainOptions
    from arriero.training.pretraining import pretrain as train

    run = PretrainOptions.of(build("pretrain", options, model_name_or_path=model_name(model)))
    results = train(run)
    return Run(Path(run.checkpoint.output_dir), results)


@in_python("finetune")
def finetune(model: str | PathLike[str], **options: Unpack[FinetuneKeywords]) -> Run:
    """Fine-tune a model, by all its weights or by an adapter (`lora=True`, `prefix_tuning=True`): the verb `finetune`.

    Args:
        model: a folder, a named model or a Hub id.
        options: `dataset_path` (or `data_name`) and `output_dir` must be given. `dataset_path` may also be rows: a list of
            dicts, or `{"train": rows, "dev": rows}`; they are kept in the folder `OUTPUT_DIR.rows`, beside the run, which its
            config.yaml names. All options: docs/verbs/finetune.md and `arriero finetune --help`.

    Raises:
        ArrieroError: options that cannot go together, rows that cannot be used, a run that cannot go on.
        RunStopped: a signal ended it; everything is saved.
    """
    from arriero.training.finetune_options import FinetuneOptions
    from arriero.training.finetuning import finetune as train

    with rows_as_files(options, keep_beside=options.get("output_dir")) as given:
        run = FinetuneOptions.of(build("finetune", given, model_name_or_path=model_name(model)))
        _check_data([run.data])
        results = train(run)
    return Run(Path(run.checkpoint.output_dir), results)


@in_python("evaluate")
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
        options: `dataset_path` (or `data_name`) must be given; `dataset_path` may also be a list of dicts. All of them:
            docs/verbs/evaluate.md and `arriero evaluate --help`.

    Returns:
        `loss`, `ppl` and `accuracy` of the answers' tokens; with `task_name="squad_qa"` also `exact_match` and `f1` in percent,
        with `eval_with_do_generation=True` ROUGE and BLEU.

    Raises:
        ArrieroError: rows that cannot be used, or a model that cannot be loaded.
    """
    from arriero.api.model import Model
    from arriero.training.scoring import evaluate as score

    with rows_as_files(options) as given:
        if not isinstance(model, Model):
            own = adapter_options(adapter)
            groups = build("evaluate", given, model_name_or_path=model_name(model), **own)
            _check_data(groups)
            return score(*groups)
        ways = {spec.name for group in (ModelOptions, ParallelOptions) for spec in specs_of(group)} & options.keys()
        if adapter is not None or ways:
            raise ConfigError(f"{min(ways, default='adapter')}: the model is loaded already; give it to arriero.load")
        _, *groups_of_rows = build("evaluate", given, model_name_or_path=model.folder)
        _check_data(groups_of_rows)
        with model.turns:
            return score(model.loaded, *groups_of_rows)


def _check_data(groups: Iterable[Any]) -> None:
    """The verbs take SQuAD where no data is named, as PaddleNLP's scripts do; a function's caller is not to be surprised."""
    data = next(group for group in groups if isinstance(group, DataOptions))
    if data.dataset_path is None and data.data_name is None:
        raise ConfigError(
            "dataset_path (files, or rows as a list of dicts) or data_name (a data set of the Hub) must be given"
        )
