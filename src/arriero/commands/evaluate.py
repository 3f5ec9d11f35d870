"""`arriero evaluate`: score a checkpoint on labelled rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from arriero.api.groups import EVALUATE
from arriero.config.adapter import AdapterPathOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.data import DataOptions
from arriero.config.evaluation import EvaluateOptions
from arriero.config.model import ModelOptions
from arriero.config.parallel import ParallelOptions
from arriero.output_file import check_folder, json_text, write_file

HELP = (
    "Score a model, or a model with its adapter: loss, perplexity and token accuracy; exact match and F1 for squad_qa; "
    "tasks of lm-eval."
)

OPTIONS: tuple[type, ...] = EVALUATE


def run(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    data: DataOptions,
    evaluation: EvaluateOptions,
    parallel: ParallelOptions,
    compilation: CompilationOptions,
) -> int:
    """Print the scores, and write them with the answers where --output_dir says; of several processes the first does that."""
    if evaluation.tasks:
        return _run_tasks(model, adapter, evaluation, parallel, compilation)
    from arriero.training.scoring import evaluate

    metrics = evaluate(model, adapter, data, evaluation, parallel, compilation)
    if os.environ.get("RANK", "0") == "0":
        for name, value in metrics.items():
            print(f"{name:12} {value:.4f}")
    return 0


def _run_tasks(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    evaluation: EvaluateOptions,
    parallel: ParallelOptions,
    compilation: CompilationOptions,
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
    if evaluation.output_dir:
        check_folder(Path(evaluation.output_dir), "--output_dir")
    manager, tasks = find_tasks(evaluation.tasks, evaluation.include_path)
    processes = start(parallel.layout(launched_size()), pick_device(model.device))
    with heard_once(processes):
        loaded = load_for_inference(model, adapter, processes)
        shares = may_share_prefixes(loaded, processes)
        harness = HarnessModel(
            loaded,
            evaluation.per_device_eval_batch_size,
            share_prefixes=shares,
            compile=compilation.torch_compile,
        )
        with processes.together():
            results = run_tasks(harness, manager, tasks, evaluation)
        if processes.first and results is not None:
            print(table_of(results))
            if evaluation.output_dir:
                _write_tasks(Path(evaluation.output_dir), results)
    stop(processes)
    return 0


def _write_tasks(folder: Path, results: dict[str, Any]) -> None:
    check_folder(folder, "--output_dir")
    samples = results.pop("samples", {})
    write_file(folder / "eval_results.json", json_text(results), "--output_dir")
    for task, rows in samples.items():
        lines = "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)
        write_file(folder / f"samples_{task}.jsonl", lines, "--output_dir")
