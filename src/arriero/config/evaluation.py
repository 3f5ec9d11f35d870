"""Scoring a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option


@dataclass(kw_only=True)
class RowScoreOptions(OptionGroup):
    """Evaluation."""

    per_device_eval_batch_size: int = option(8, "rows scored together", aliases=("batch_size",), minimum=1)
    max_new_tokens: int | None = option(
        None, "longest generated answer in tokens (default: 32 for squad_qa, else --tgt_length)", minimum=1
    )


@dataclass(kw_only=True)
class EvaluateOptions(RowScoreOptions):
    """Evaluation."""

    tasks: list[str] | None = option(
        None,
        "tasks of EleutherAI's lm-eval, by name or pattern, instead of rows of --dataset_path; needs the extra eval",
    )
    include_path: str | None = option(
        None,
        "a folder with task files (.yaml) of your own; they may name Python code, which then runs: only one you trust",
        only_with="tasks",
    )
    num_fewshot: int | None = option(
        None, "solved examples before each question (default: as the task says)", only_with="tasks", minimum=0
    )
    limit: int | None = option(None, "only the first N rows of each task", only_with="tasks", minimum=1)
    apply_chat_template: bool = option(
        False, "put each question as a turn of a chat, by the model's template", only_with="tasks"
    )
    output_dir: str | None = option(
        None, "folder for the scores (eval_results.json) and, where answers are generated, those (predictions.jsonl)"
    )
