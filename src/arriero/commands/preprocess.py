"""`arriero preprocess`: raw text into a token corpus."""

from __future__ import annotations

from pathlib import Path

from arriero.commands.next_command import tell_next
from arriero.config.preprocessing import PreprocessOptions

HELP = "Turn raw text (txt, jsonl, parquet; files or folders) into a token corpus for pre-training."
OPTIONS: tuple[type, ...] = (PreprocessOptions,)


def run(preprocess: PreprocessOptions) -> int:
    """Build the corpus and print its totals."""
    from arriero.data.corpus.build import CorpusBuilder
    from arriero.data.corpus.progress import format_totals

    for line in format_totals(CorpusBuilder(preprocess).build()):
        print(line)
    if preprocess.num_shards == 1 or preprocess.merge_shards:
        _tell_next(preprocess)
    return 0


def _tell_next(preprocess: PreprocessOptions) -> None:
    tokenizer = preprocess.tokenizer_name_or_path  # the name of a class, which says nothing, or a place
    other = ["--tokenizer_name_or_path", tokenizer] if tokenizer and Path(tokenizer).expanduser().exists() else []
    shape = ["--model_name_or_path", preprocess.model_name_or_path, *other]
    tell_next("pretrain", *shape, "--input_dir", preprocess.output_prefix, "--output_dir", "runs/scratch")
