"""`arriero preprocess`: raw text into a token corpus."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.commands.unavailable import not_available
from arriero.config.option import REQUIRED, OptionGroup, option
from arriero.errors import ConfigError

HELP = "Turn raw text (txt, jsonl, parquet; files or folders) into a token corpus for pre-training."


@dataclass(kw_only=True)
class PreprocessOptions(OptionGroup):
    """Corpus building."""

    model_name_or_path: str = option(
        REQUIRED, "the tokenizer's folder or name", aliases=("tokenizer_name_or_path", "model_name", "tokenizer_name")
    )
    input_path: str = option(REQUIRED, "a file or folder: .txt, .jsonl, .jsonl.gz, .zst, .parquet")
    output_prefix: str = option(REQUIRED, "path and first part of the name of the files written")
    data_format: str = option("JSON", "what a line of a .jsonl file is", ("JSON",))
    data_impl: str = option(
        "npy", "PREFIX_ids.npy + PREFIX_idx.npz, or Megatron's PREFIX.bin + PREFIX.idx", ("npy", "mmap")
    )
    json_key: str = option("text", "the field that holds the text")
    append_eos: bool = option(False, "put the end-of-text token after each document")
    split_sentences: bool = option(False, "count sentences, not documents, as the smallest unit")
    max_doc_num: int | None = option(None, "stop after this many documents", minimum=1)
    min_doc_length: int = option(0, "leave out documents with fewer characters", minimum=0)
    max_repeated_len: int = option(100, "a longer run of one character is cut to this length; 0: keep it", minimum=0)
    deduplicate: bool = option(False, "leave out documents that were seen before")
    workers: int = option(1, "processes that tokenize", minimum=1)
    log_interval: int = option(100, "documents between progress lines", minimum=1)
    num_shards: int = option(1, "cut the work into this many jobs (an array job of a cluster)", minimum=1)
    shard_id: int = option(0, "which of them this is, from 0", minimum=0)
    executor: str = option("local", "who runs the workers", ("local", "ray"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_id >= self.num_shards:
            raise ConfigError(
                f"--shard_id {self.shard_id} is not below --num_shards {self.num_shards}: shards are counted from 0"
            )


OPTIONS: tuple[type, ...] = (PreprocessOptions,)


def run(preprocess: PreprocessOptions) -> int:
    """Answer that this comes in a later version."""
    raise not_available("preprocess", "arriero finetune reads its rows as they are, without this step")
