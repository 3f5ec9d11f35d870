"""Scoring a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option


@dataclass(kw_only=True)
class EvaluateOptions(OptionGroup):
    """Evaluation."""

    per_device_eval_batch_size: int = option(8, "rows scored together", aliases=("batch_size",), minimum=1)
    max_new_tokens: int | None = option(
        None, "longest generated answer in tokens (default: 32 for squad_qa, else --tgt_length)", minimum=1
    )
    output_dir: str | None = option(
        None, "folder for the scores (eval_results.json) and the answers (predictions.jsonl)"
    )
