"""Raw text into a token corpus."""

from __future__ import annotations

import os
from dataclasses import dataclass

from arriero.config.option import REQUIRED, OptionGroup, option
from arriero.errors import ConfigError

_MAX_PREFIX_BYTES = 200  # of a file system's 255: names of files begin with it and say more


@dataclass(kw_only=True)
class PreprocessOptions(OptionGroup):
    """Corpus building."""

    model_name_or_path: str = option(
        REQUIRED, "the tokenizer's folder or name; weights are not downloaded", aliases=("model_name", "model")
    )
    tokenizer_name_or_path: str | None = option(
        None,
        "the tokenizer's folder or name, if not the model's own; the name of a class is passed over: the files tell it",
        aliases=("tokenizer_name",),
    )
    cache_dir: str | None = option(None, "where downloaded files are kept (default: $ARRIERO_HOME or ~/.cache/arriero)")
    input_path: str = option(
        REQUIRED, "a file or folder: .txt, .jsonl (or .json), either also as .gz or .zst, and .parquet"
    )
    output_prefix: str = option(REQUIRED, "path and first part of the name of the files written")
    overwrite: bool = option(False, "replace a corpus that has this output_prefix already")
    data_format: str = option("JSON", "what a line of a .jsonl file is", ("JSON",))
    data_impl: str = option(
        "npy", "PREFIX_ids.npy + PREFIX_idx.npz, or Megatron's PREFIX.bin + PREFIX.idx", ("npy", "mmap")
    )
    json_key: str = option("text", "the field (of parquet: the column) that holds the text")
    text_documents: str = option(
        "blank_line",
        "what a document of a .txt file is: what stands between blank lines, or the file",
        ("blank_line", "file"),
    )
    errors: str = option(
        "strict", "bytes that are no UTF-8: stop and name them, or put U+FFFD there and count", ("strict", "replace")
    )
    append_eos: bool = option(False, "put the end-of-text token after each document")
    split_sentences: bool = option(False, "count sentences, not documents, as the smallest unit")
    max_doc_num: int | None = option(None, "stop after this many documents were read", minimum=1)
    min_doc_length: int = option(0, "leave out documents with fewer characters", minimum=0)
    max_doc_length: int | None = option(None, "leave out documents with more characters", minimum=1)
    max_repeated_len: int = option(100, "a longer run of one character is cut to this length; 0: keep it", minimum=0)
    deduplicate: bool = option(False, "leave out documents that were seen before")
    workers: int = option(1, "processes that tokenize", minimum=1)
    log_interval: int = option(
        100, "documents between progress lines where there is no terminal; at most a line a second", minimum=1
    )
    num_shards: int = option(1, "cut the work into this many jobs (an array job of a cluster)", minimum=1)
    shard_id: int = option(0, "which of them this is, from 0", minimum=0)
    merge_shards: bool = option(False, "join the finished shards into the corpus")
    executor: str = option("local", "who runs the workers", ("local", "ray"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_id >= self.num_shards:
            raise ConfigError(
                f"--shard_id {self.shard_id} is not below --num_shards {self.num_shards}: shards are counted from 0"
            )
        if self.merge_shards and self.num_shards == 1:
            raise ConfigError("--merge_shards joins what --num_shards N jobs made: give the same --num_shards")
        if self.max_doc_length is not None and self.max_doc_length < self.min_doc_length:
            raise ConfigError(
                f"--max_doc_length {self.max_doc_length} is below --min_doc_length {self.min_doc_length}: "
                "no document could stay"
            )
        for name in ("model_name_or_path", "input_path", "output_prefix", "json_key"):
            if not str(getattr(self, name)).strip():
                raise ConfigError(f"--{name} is empty")
        size = len(os.fsencode(os.path.basename(self.output_prefix)))
        if size > _MAX_PREFIX_BYTES:
            raise ConfigError(
                f"--output_prefix: the files' names would be too long: its last part has {size} bytes, and may have "
                f"{_MAX_PREFIX_BYTES}"
            )
        if self.output_prefix.endswith("/"):
            raise ConfigError(
                f"--output_prefix {self.output_prefix} is a folder: it also needs the first part of the files' names"
            )
