"""The scores of a checkpoint on labelled rows: the objective's, and those of generated answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from arriero.config.adapter import AdapterPathOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.data import DataOptions
from arriero.config.evaluation import EvaluateOptions
from arriero.config.model import ModelOptions
from arriero.config.parallel import ParallelOptions
from arriero.data.batch import packed_batches
from arriero.data.run_task import warn_of_other_task
from arriero.data.samples import Sample
from arriero.data.sources import check_data, name_of_rows, samples_for
from arriero.engine.loading import LoadedModel, load_for_inference, pick_device
from arriero.engine.sampling_params import SamplingParams
from arriero.output_file import check_folder, json_text, write_file
from arriero.parallel.processes import Processes, launched_size, start, stop
from arriero.training.evaluation import check_finite, evaluate_loss
from arriero.training.execution import build_execution
from arriero.training.finetuning import check_context, encode_rows, may_share_prefixes
from arriero.training.generation_metrics import Answer, generate_answers, references_of, score
from arriero.training.precision import Precision
from arriero.training.run import heard_once

SQUAD_ANSWER_TOKENS = 32  # an extracted span is short


def evaluate(
    model: ModelOptions | LoadedModel,
    adapter: AdapterPathOptions,
    data: DataOptions,
    evaluation: EvaluateOptions,
    parallel: ParallelOptions,
    compilation: CompilationOptions,
) -> dict[str, float]:
    """The scores of a model, by all processes of this run; `output_dir` gets them with the answers.

    Args:
        model: its options, or one that is loaded already, whole, with its adapter.

    Returns:
        Loss, perplexity and token accuracy; of generated answers exact match and F1, or ROUGE and BLEU.

    Raises:
        ArrieroError: rows that cannot be read or used, a model that cannot be loaded, or one whose loss is no number.
    """
    check_data(data.dataset_path, data.data_name, data.task_name)
    if evaluation.output_dir:
        check_folder(Path(evaluation.output_dir), "--output_dir")
    if isinstance(model, LoadedModel):
        processes = Processes()
    else:
        processes = start(parallel.layout(launched_size()), pick_device(model.device))
    with heard_once(processes):
        metrics, answers = score_model(model, adapter, data, evaluation, processes, compile=compilation.torch_compile)
        if evaluation.output_dir:
            folder = Path(evaluation.output_dir)
            processes.by_first(lambda: _write(folder, metrics, answers))
    stop(processes)
    return metrics


def rows_to_score(data: DataOptions) -> list[Sample]:
    """
    Raises:
        DataError: rows that are not there, or that cannot be used.
    """
    return samples_for(data, ["dev"])["dev"]


def score_model(
    model: ModelOptions | LoadedModel,
    adapter: AdapterPathOptions,
    data: DataOptions,
    evaluation: EvaluateOptions,
    processes: Processes,
    *,
    compile: bool = False,
) -> tuple[dict[str, float], list[Answer]]:
    """The same in every process; the answers are none where none are asked for.

    Args:
        compile: see `TorchRunner`.
    """
    with processes.together():
        samples = rows_to_score(data)
    if processes.first and not isinstance(model, LoadedModel):
        warn_of_other_task(model.model_name_or_path, adapter, data.task_name, samples)
    loaded = model if isinstance(model, LoadedModel) else load_for_inference(model, adapter, processes)
    metrics = _loss(loaded, samples, data, evaluation, processes)
    if not (data.eval_with_do_generation or data.task_name == "squad_qa"):
        return metrics, []
    length = evaluation.max_new_tokens or (SQUAD_ANSWER_TOKENS if data.task_name == "squad_qa" else None)
    quiet = None if processes.first else True  # None: where there is no terminal
    with tqdm(total=len(samples), unit="row", desc="answers", leave=False, disable=quiet) as bar:
        answers = generate_answers(
            loaded,
            samples,
            lengths=data.lengths,
            params=None if length is None else SamplingParams(max_new_tokens=length),
            compile=compile,
            on_done=bar.update,
        )
    return metrics | score(answers), answers


def _loss(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    data: DataOptions,
    evaluation: EvaluateOptions,
    processes: Processes,
) -> dict[str, float]:
    name = name_of_rows(data.dataset_path, data.data_name, "dev", data.val_size)
    examples = encode_rows(samples, loaded, data, name)
    check_context(loaded.model, examples, name)
    precision = Precision(next(loaded.model.parameters()).dtype, "O2", loaded.device)
    rows = math.ceil(len(samples) / processes.layout.data)
    quiet = None if processes.first else True
    with tqdm(total=rows, unit="row", desc="loss", leave=False, disable=quiet) as bar:
        share = may_share_prefixes(loaded, processes)
        batches = packed_batches(examples, evaluation.per_device_eval_batch_size, share_prefixes=share)
        metrics = evaluate_loss(build_execution(loaded.model, precision, loaded.device), batches, bar.update)
    check_finite(loaded.model, loaded.folder, metrics["loss"], processes)
    return metrics


def _write(folder: Path, metrics: dict[str, float], answers: Sequence[Answer]) -> None:
    """The scores, and the answers if there are any: those that an earlier scoring left stay where this one generated none."""
    check_folder(folder, "--output_dir")
    write_file(folder / "eval_results.json", json_text(metrics), "--output_dir")
    if not answers:
        return
    rows = [
        {
            "id": answer.sample.id,
            "prompt": answer.sample.prompt,
            "output": answer.text,
            "references": references_of(answer.sample),
        }
        for answer in answers
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_file(folder / "predictions.jsonl", lines, "--output_dir")
