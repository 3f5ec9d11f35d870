"""`arriero preprocess`: raw text into a token corpus."""

from __future__ import annotations

from arriero.config.preprocessing import PreprocessOptions

HELP = "Turn raw text (txt, jsonl, parquet; files or folders) into a token corpus for pre-training."
OPTIONS: tuple[type, ...] = (PreprocessOptions,)


def run(preprocess: PreprocessOptions) -> int:
    """Build the corpus and print its totals."""
    from arriero.data.corpus.build import CorpusBuilder
    from arriero.data.corpus.progress import format_totals

    for line in format_totals(CorpusBuilder(preprocess).build()):
        print(line)
    return 0
