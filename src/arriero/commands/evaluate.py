"""`arriero evaluate`: score a checkpoint on labelled rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.config.adapter import AdapterPathOptions
from arriero.config.data import DataOptions
from arriero.config.evaluation import EvaluateOptions
from arriero.config.model import ModelOptions
from arriero.config.parallel import ParallelOptions

if TYPE_CHECKING:
    from arriero.parallel.processes import Processes
    from arriero.training.generation_metrics import Answer

HELP = (
    "Score a model, or a model with its adapter: loss, perplexity and token accuracy; exact match and F1 for squad_qa; "
    "tasks of lm-eval."
)

SQUAD_ANSWER_TOKENS = 32  # an extracted span is short

OPTIONS: tuple[type, ...] = (ModelOptions, AdapterPathOptions, DataOptions, EvaluateOptions, ParallelOptions)


def run(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    data: DataOptions,
    evaluation: EvaluateOptions,
    parallel: ParallelOptions,
) -> int:
    """Print the scores, and write them with the answers where --output_dir says; of several processes the first does that."""
    from arriero.data.sources import check_data
    from arriero.engine.loading import pick_device
    from arriero.parallel.processes import launched_size, start, stop
    from arriero.training.run import heard_once

    if evaluation.tasks:
        return _run_tasks(model, adapter, evaluation, parallel)
    check_data(data.dataset_path, data.data_name, data.task_name)
    processes = start(parallel.layout(launched_size()), pick_device(model.device))
    with heard_once(processes):
        metrics, answers = score_model(model, adapter, data, evaluation, processes)
        for name, value in metrics.items():
            print(f"{name:12} {value:.4f}")
        if evaluation.output_dir:
            folder = Path(evaluation.output_dir)
            processes.by_first(lambda: _write(folder, metrics, answers))
    stop(processes)
    return 0


def _run_tasks(
    model: ModelOptions, adapter: AdapterPathOptions, evaluation: EvaluateOptions, parallel: ParallelOptions
) -> int:
    """Print the harness's table; `--output_dir` gets its results and the scored samples of each task."""
    from arriero.engine.loading import load_for_inference, pick_device
    from arriero.errors import require
    from arriero.parallel.processes import launched_size, start, stop
    from arriero.training.finetuning import may_share_prefixes
    from arriero.training.run import heard_once

    require("lm_eval", "eval")
    from arriero.training.harness import HarnessModel, find_tasks, run_tasks, table_of

    assert evaluation.tasks
    manager, tasks = find_tasks(evaluation.tasks, evaluation.include_path)
    processes = start(parallel.layout(launched_size()), pick_device(model.device))
    with heard_once(processes):
        loaded = load_for_inference(model, adapter, processes)
        shares = may_share_prefixes(loaded, processes)
        harness = HarnessModel(loaded, evaluation.per_device_eval_batch_size, share_prefixes=shares)
        with processes.together():
            results = run_tasks(harness, manager, tasks, evaluation)
        if processes.first and results is not None:
            print(table_of(results))
            if evaluation.output_dir:
                _write_tasks(Path(evaluation.output_dir), results)
    stop(processes)
    return 0


def _write_tasks(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    samples = results.pop("samples", {})
    text = json.dumps(results, indent=1, default=str, ensure_ascii=False)
    (folder / "eval_results.json").write_text(text + "\n", encoding="utf-8")
    for task, rows in samples.items():
        with (folder / f"samples_{task}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)


def score_model(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    data: DataOptions,
    evaluation: EvaluateOptions,
    processes: Processes,
) -> tuple[dict[str, float], list[Answer]]:
    """The same in every process; the answers are none where none are asked for."""
    from tqdm import tqdm

    from arriero.data.batch import packed_batches
    from arriero.data.sft import encode_all
    from arriero.data.sources import load_samples
    from arriero.engine.loading import load_for_inference
    from arriero.engine.sampling_params import SamplingParams
    from arriero.training.evaluation import evaluate_loss
    from arriero.training.execution import build_execution
    from arriero.training.finetuning import may_share_prefixes
    from arriero.training.generation_metrics import generate_answers, score
    from arriero.training.precision import Precision

    with processes.together():
        samples = load_samples(
            data.dataset_path,
            data.data_name,
            data.task_name,
            ["dev"],
            data_format=data.data_format,
            limits={"dev": data.max_eval_samples},
        )["dev"]
    loaded = load_for_inference(model, adapter, processes)
    examples, report = encode_all(samples, loaded.tokenizer, data.src_length, data.tgt_length, train_on=data.train_on)
    print(f"dev: {report}")
    quiet = not processes.first
    precision = Precision(next(loaded.model.parameters()).dtype, "O2", loaded.device)
    rows = math.ceil(len(samples) / processes.layout.data)
    with tqdm(total=rows, unit="row", desc="loss", leave=False, disable=quiet) as bar:
        share = may_share_prefixes(loaded, processes)
        batches = packed_batches(examples, evaluation.per_device_eval_batch_size, share_prefixes=share)
        metrics = evaluate_loss(build_execution(loaded.model, precision, loaded.device), batches, bar.update)
    if not (data.eval_with_do_generation or data.task_name == "squad_qa"):
        return metrics, []
    default_length = SQUAD_ANSWER_TOKENS if data.task_name == "squad_qa" else data.tgt_length
    with tqdm(total=len(samples), unit="row", desc="answers", leave=False, disable=quiet) as bar:
        answers = generate_answers(
            loaded,
            samples,
            src_length=data.src_length,
            params=SamplingParams(max_new_tokens=evaluation.max_new_tokens or default_length),
            on_done=bar.update,
        )
    return metrics | score(answers), answers


def _write(folder: Path, metrics: dict[str, float], answers: Sequence[Answer]) -> None:
    from arriero.training.generation_metrics import references_of

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval_results.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for answer in answers:
            row = {"id": answer.sample.id, "prompt": answer.sample.prompt, "output": answer.text}
            file.write(json.dumps({**row, "references": references_of(answer.sample)}, ensure_ascii=False) + "\n")
