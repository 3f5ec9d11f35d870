"""What every training run leaves: the scores of its final weights, the weights, and the results in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arriero.errors import ConfigError, TrainingError
from arriero.formats.shard_writer import write_own_shard
from arriero.models.llama import LlamaForCausalLM
from arriero.output_file import json_text, write_file
from arriero.parallel.processes import Processes
from arriero.training.callbacks.progress import format_scores
from arriero.training.checkpoint import WeightStore
from arriero.training.evaluation import EvaluationStopped, check_finite
from arriero.training.run import Evaluate, RunOptions
from arriero.training.run_folder import SHARDED
from arriero.training.trainer import Trainer
from arriero.training.weights import FullWeights


def final_metrics(
    trainer: Trainer | None,
    options: RunOptions,
    evaluate: Evaluate | None,
    model: LlamaForCausalLM,
    source: Path,
    processes: Processes,
) -> dict[str, float]:
    """The scores of the final weights; those of the last evaluation if they are of the same weights, else made and printed.

    None where a signal came meanwhile: the weights are to be saved.

    Args:
        source: where the weights are from, if this run has not trained them.

    Raises:
        TrainingError: stored weights have a loss that is no number.
    """
    if evaluate is None:
        return {}
    if (
        trainer is not None
        and trainer.metrics_step == trainer.state.step
        and not options.checkpoint.load_best_model_at_end
    ):
        return trainer.metrics
    try:
        metrics = evaluate()
    except EvaluationStopped:
        return {}
    if trainer is None and "loss" in metrics:
        check_finite(model, source, metrics["loss"], processes)
    scores = {f"eval_{key}": value for key, value in metrics.items()}
    print(f"final weights | {format_scores(scores)}", flush=True)
    return scores


def save_weights(weights: WeightStore, folder: Path, processes: Processes, *, sharded: bool = False) -> None:
    """The final weights into the run folder, and if wanted once more in `sharded/`, each process's own in a file.

    Raises:
        TrainingError: if they cannot be written.
    """
    try:
        weights.write(folder, weights.parts(), processes)
        layout, at = processes.layout, processes.at
        if sharded and isinstance(weights, FullWeights) and layout.tp * layout.pp > 1:
            # Cut from the folder just written, so that every layout has one way: FSDP shares out the local tensors too.
            names, degrees = weights.parts().keys(), (layout.tp, layout.pp)
            first = at.dp_replicate == at.dp_shard == at.cp == 0
            write_own_shard(folder, folder / SHARDED, names, degrees, (at.tp, at.pp), processes, writes=first)
            print(f"shards: {folder / 'sharded'}")
    except OSError as error:
        raise TrainingError(
            f"{folder}: the final model could not be written ({error.strerror}); the checkpoints are intact"
        ) from error


def write_results(folder: Path, results: dict[str, Any], processes: Processes, *, trained: bool) -> None:
    """Into `all_results.json`, or `eval_results.json` if the run only scored.

    Raises:
        TrainingError: it cannot be written.
    """
    if not processes.first:
        return
    path = folder / f"{'all' if trained else 'eval'}_results.json"
    try:
        write_file(path, json_text(results), "--output_dir")
    except ConfigError as error:
        raise TrainingError(f"{error}; the final model is intact") from error
