"""`arriero preprocess`: from input files to a corpus."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from arriero.config.preprocessing import PreprocessOptions
from arriero.data.corpus.admission import Admission, CorpusTotals
from arriero.data.corpus.documents import Refusal
from arriero.data.corpus.encoding import EncodedUnit, Encoder, EncodingRules, token_dtype
from arriero.data.corpus.fingerprint import describe, fingerprint
from arriero.data.corpus.parts import PartsReader, PartsWriter, is_finished, read_header
from arriero.data.corpus.progress import Progress
from arriero.data.corpus.publishing import Publisher
from arriero.data.corpus.shards import Shards, shard_folder, shard_header
from arriero.data.corpus.sources import Source, find_sources
from arriero.data.corpus.units import Key, Share, Unit, done_bytes, line_at, read_units
from arriero.data.corpus.workers import EncodingJob, encode_units
from arriero.data.corpus.writers import reserved_bytes
from arriero.data.tokenizer import load_tokenizer
from arriero.errors import ArrieroError, DataError

Report = Callable[[str], None]
# key, bytes of the input files that it stands for, ids
Incoming = Generator[tuple[Key, int, EncodedUnit]]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class CorpusBuilder:
    """One run of `arriero preprocess`.

    Args:
        report: told what is skipped, left over or done already, a line each.

    Raises:
        ArrieroError: inputs, tokenizer or options that cannot be used.
    """

    def __init__(self, options: PreprocessOptions, report: Report = _to_stderr) -> None:
        self._options = options
        self._report = report
        self._sources, others = find_sources(options.input_path, options.json_key)
        if others:
            shown = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
            report(f"skipped {len(others)} of other kinds: {shown}")
        self._prefix = Path(os.path.expanduser(options.output_prefix)).absolute()
        folder = _tokenizer_folder(_tokenizer_name(options, report), options.cache_dir)
        tokenizer = load_tokenizer(folder)
        self._job = EncodingJob(str(folder), _rules(options))
        Encoder(tokenizer, self._job.rules)  # refuses now what the workers could not do
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._description = describe(options, tokenizer, self._sources)

    def build(self) -> CorpusTotals:
        """Make the corpus, this run's shard of it, or join the shards.

        Returns:
            Its totals.

        Raises:
            ArrieroError: with what is finished by then kept for the next run.
        """
        if self._options.num_shards > 1 and not self._options.merge_shards:
            return self._build_shard()
        return self._build_whole()

    def _build_shard(self) -> CorpusTotals:
        shard_id, num_shards = self._options.shard_id, self._options.num_shards
        folder = shard_folder(self._prefix, shard_id, num_shards)
        header = shard_header(self._description, shard_id, num_shards)
        admission = self._admission()
        if is_finished(folder) and read_header(folder) == header:
            for _, unit in PartsReader(folder, self._dtype, reserved=0).units():
                admission.replay(unit)
            self._report(f"{folder}: is complete already")
            return admission.totals
        with contextlib.closing(PartsWriter(folder)) as writer:
            writer.open(header, self._dtype, 0, self._report, admission.replay)
            self._tell_resumed(admission.totals)
            self._fill(writer, admission, self._encoded(Share(num_shards, shard_id, writer.last_key)))
            writer.finish()
        self._report(f"{folder}: shard {shard_id} of {num_shards} is complete; --merge_shards joins them when all are")
        return admission.totals

    def _build_whole(self) -> CorpusTotals:
        options = self._options
        parts = self._prefix.with_name(f".{self._prefix.name}.partial")
        publisher = Publisher(self._prefix, parts, options.data_impl)
        shards = Shards(self._prefix, options.num_shards) if options.merge_shards else None
        mark = fingerprint(self._description)
        is_ready = publisher.is_ready() and read_header(parts) == self._description
        meta = publisher.finished()
        if meta is not None and meta.get("fingerprint") == mark and not options.overwrite:
            self._report(f"{self._prefix}: is complete already; --overwrite makes it again")
            _clean_up(parts, shards)
            return CorpusTotals(**meta["totals"])
        if not options.overwrite and not is_ready:
            publisher.refuse_existing()
        if shards is not None and not is_ready:
            shards.check(self._description)
        with contextlib.closing(PartsWriter(parts)) as writer:
            if not is_ready:
                totals = self._make_ready(writer, publisher, shards, mark)
                if not totals.documents:
                    writer.discard()
                    raise DataError(
                        f"{options.input_path}: no document is left of {totals.read:,} read; no corpus was written"
                    )
            publisher.publish()
        if shards is not None:
            shards.remove()
        finished = publisher.finished()
        assert finished is not None
        return CorpusTotals(**finished["totals"])

    def _make_ready(self, writer: PartsWriter, publisher: Publisher, shards: Shards | None, mark: str) -> CorpusTotals:
        admission = self._admission()
        publisher.recover()
        reserved = reserved_bytes(self._options.data_impl)
        writer.open(self._description, self._dtype, reserved, self._report, admission.replay)
        self._tell_resumed(admission.totals)
        if shards is None:
            incoming = self._encoded(Share(done=writer.last_key))
        else:
            incoming = ((key, unit.text_bytes, unit) for key, unit in shards.units(self._dtype, writer.last_key))
        self._fill(writer, admission, incoming)
        totals = admission.totals
        if totals.documents:
            writer.finish()
            publisher.prepare(self._dtype, totals.tokens, self._meta(admission, mark))
        return totals

    def _admission(self) -> Admission:
        return Admission(self._options.max_doc_num, self._options.deduplicate)

    def _tell_resumed(self, totals: CorpusTotals) -> None:
        if totals.read:
            self._report(f"going on after {totals.read:,} documents ({totals.tokens:,} tokens) of an earlier run")

    def _encoded(self, share: Share) -> Incoming:
        options = self._options
        units = read_units(self._sources, share, options.json_key, options.text_documents)
        with contextlib.closing(encode_units(units, self._job, options.workers, options.executor)) as results:
            for unit, result in results:
                if isinstance(result, Refusal):
                    raise _refused(self._sources[unit.key[0]], unit, result)
                yield unit.key, unit.consumed, result

    def _fill(self, writer: PartsWriter, admission: Admission, incoming: Incoming) -> None:
        shards = 1 if self._options.merge_shards else self._options.num_shards
        total = sum(source.size for source in self._sources)
        done = done_bytes(self._sources, writer.last_key)
        progress = Progress(total // shards, done // shards, self._options.log_interval, admission.totals)
        try:
            with contextlib.closing(incoming):
                while not admission.is_full and (item := next(incoming, None)) is not None:
                    key, consumed, unit = item
                    writer.append(key, admission.admit(unit))
                    progress.update(consumed, admission.totals)
        except ArrieroError:
            if writer.last_key is None:  # nothing that the next run could go on from
                writer.discard()
            raise
        finally:
            progress.close()

    def _meta(self, admission: Admission, mark: str) -> dict[str, Any]:
        described = self._description
        name = self._options.tokenizer_name_or_path or self._options.model_name_or_path
        return described | {
            "fingerprint": mark,
            "dtype": np.dtype(self._dtype).name,
            "tokenizer": {"name": name} | described["tokenizer"],
            "totals": asdict(admission.totals),
            "tokens_sha256": admission.tokens_sha256,
        }


def _clean_up(parts: Path, shards: Shards | None) -> None:
    """Delete what a run left that was stopped after its last file was in place."""
    if parts.is_dir():
        PartsWriter(parts).remove()
    if shards is not None:
        shards.remove()


def _rules(options: PreprocessOptions) -> EncodingRules:
    return EncodingRules(
        json_key=options.json_key,
        replace_errors=options.errors == "replace",
        append_eos=options.append_eos,
        split_sentences=options.split_sentences,
        min_doc_length=options.min_doc_length,
        max_doc_length=options.max_doc_length,
        max_repeated_len=options.max_repeated_len,
        deduplicate=options.deduplicate,
    )


def _tokenizer_name(options: PreprocessOptions, report: Report) -> str:
    name = options.tokenizer_name_or_path
    if name is None:
        return options.model_name_or_path
    if re.fullmatch(r"\w*Tokenizer(Fast)?", name) and not Path(name).exists():
        # PaddleNLP's create_pretraining_data.py must be told the class; here the files say what they are.
        report(f"--tokenizer_name {name}: the tokenizer's files in {options.model_name_or_path} decide")
        return options.model_name_or_path
    return name


def _tokenizer_folder(name: str, cache_dir: str | None) -> Path:
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    # Only a name needs this, and it brings torch along, which takes seconds and memory.
    from arriero.formats.download import resolve_tokenizer

    return resolve_tokenizer(name, cache_dir=Path(cache_dir).expanduser() if cache_dir else None)


def _refused(source: Source, unit: Unit, refusal: Refusal) -> DataError:
    line = line_at(source.path, source.packing, unit.offset) + refusal.line
    return DataError(f"{source.path}: line {line} {refusal.reason}")
