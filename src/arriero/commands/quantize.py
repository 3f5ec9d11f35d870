"""`arriero quantize`: post-training weight quantization, and what it costs in quality."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.commands.next_command import tell_next
from arriero.config.adapter import AdapterPathOptions
from arriero.config.data import DataOptions, RowOptions
from arriero.config.evaluation import EvaluateOptions, RowScoreOptions
from arriero.config.model import ModelOptions
from arriero.config.quantization import QuantizeOptions

if TYPE_CHECKING:
    from torch import Tensor

HELP = (
    "Make the linear layers of a trained model smaller, embedding and output head left as they are; with --data_file the "
    "perplexity before and after is printed, with --dataset_path the task's scores too. transformers and vLLM read the result."
)

OPTIONS: tuple[type, ...] = (ModelOptions, QuantizeOptions, RowOptions, RowScoreOptions)


def run(model: ModelOptions, quantize: QuantizeOptions, data: RowOptions, evaluation: RowScoreOptions) -> int:
    """Quantize, write, read back and print what changed."""
    from arriero.engine.loading import model_folder
    from arriero.training.quantize_inputs import check_inputs, check_rows
    from arriero.training.quantizing import quantize_folder, weight_bytes

    output = Path(quantize.output_path).expanduser()
    quantize = dataclasses.replace(quantize, output_path=str(output))
    check_inputs(quantize, model)
    has_task = bool(data.dataset_path or data.data_name or data.task_name)
    rows_of_task = DataOptions(**dataclasses.asdict(data)) if has_task else None
    if rows_of_task is not None:
        check_rows(rows_of_task, model)
    blocks = quantize_folder(quantize, model)
    source = model_folder(model.model_name_or_path, model.cache_dir)
    rows = {"weights (MB)": [weight_bytes(folder) / 1e6 for folder in (source, output)]}
    held = blocks.held if blocks is not None else []
    for folder in (source, output) if held or has_task else ():
        scored = dataclasses.replace(model, model_name_or_path=str(folder))
        for name, value in _scores(scored, held, rows_of_task, evaluation).items():
            rows.setdefault(name, []).append(value)
    print(f"{'':14} {'before':>12} {'after':>12}")
    for name, (before, after) in rows.items():
        print(f"{name:14} {before:12.4f} {after:12.4f}")
    print(f"quantized model: {output}")
    tell_next("chat", quantize.output_path)
    return 0


def _scores(
    model: ModelOptions, held: list[Tensor], data: DataOptions | None, evaluation: RowScoreOptions
) -> dict[str, float]:
    """Perplexity on the held text, and the task's metrics."""
    from arriero.engine.loading import load_for_inference
    from arriero.parallel.processes import Processes
    from arriero.training.quantizing import perplexity
    from arriero.training.scoring import score_model

    scores = {}
    if held:
        scores["perplexity"] = perplexity(load_for_inference(model, AdapterPathOptions()).model, held)
    if data is not None:
        how = EvaluateOptions(**dataclasses.asdict(evaluation))
        metrics, _ = score_model(model, AdapterPathOptions(), data, how, Processes())
        scores |= {f"task {name}": value for name, value in metrics.items()}
    return scores
