"""Input files cut into units: what one worker takes at a time, and what a resumed run need not do again.

Where a unit begins depends on the file alone, never on the number of workers or shards. A plain file is cut at fixed
distances, moved on to the next document's beginning (as Hadoop's input splits are), so that a unit is found without
reading what stands before it. A packed file or a parquet file is read from its beginning.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from arriero.data.corpus.packed import open_packed, unpacking_errors
from arriero.data.corpus.sources import Source
from arriero.errors import DataError, require

UNIT_BYTES = 2**20
PARQUET_ROWS = 512
DOCUMENT_LIMIT = 2**25  # bytes; a tokenizer takes some hundred bytes of memory for each of them (docs/corpus.md)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Key = tuple[int, int]


@dataclass(frozen=True)
class Unit:
    """A stretch of documents.

    Attributes:
        key: (number of the source, number of the unit in it); units come in this order.
        kind: "jsonl" (JSON lines), "text" (between blank lines), "file" (one document) or "rows" (texts).
        payload: the bytes as read, or the texts.
        offset: where it begins in the source: byte of the unpacked content, or row.
        consumed: how many bytes of the file it stands for, for the progress bar.
    """

    key: Key
    kind: str
    payload: bytes | list[str]
    offset: int
    consumed: int

    @property
    def text_bytes(self) -> int:
        """The size of its text."""
        if isinstance(self.payload, bytes):
            return len(self.payload)
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in self.payload)


@dataclass(frozen=True)
class Share:
    """Which units a job reads: those of shard `shard_id` of `num_shards` that come after `done`.

    Plain files are dealt out by unit, the others whole, as nobody could read a part of them without the rest.
    """

    num_shards: int = 1
    shard_id: int = 0
    done: Key | None = None

    def wants_file(self, number: int, source: Source) -> bool:
        """Whether any unit of a source is wanted."""
        if self.done is not None and number < self.done[0]:
            return False
        return source.is_plain or number % self.num_shards == self.shard_id

    def wants(self, key: Key, source: Source) -> bool:
        """Whether a unit is wanted."""
        if self.done is not None and key <= self.done:
            return False
        return not source.is_plain or (key[0] + key[1]) % self.num_shards == self.shard_id


def read_units(sources: list[Source], share: Share, json_key: str, text_documents: str) -> Iterator[Unit]:
    """The wanted units of all sources in order; at most one is in memory.

    Raises:
        DataError: a file that cannot be read or unpacked, or a document larger than `DOCUMENT_LIMIT`.
    """
    for number, source in enumerate(sources):
        if not share.wants_file(number, source):
            continue
        try:
            with unpacking_errors(source.path):
                yield from _units_of(number, source, share, json_key, text_documents)
        except OSError as error:
            raise DataError(f"{source.path}: cannot be read ({error.strerror or error})") from error


def _units_of(number: int, source: Source, share: Share, json_key: str, text_documents: str) -> Iterator[Unit]:
    kind = "file" if source.kind == "text" and text_documents == "file" else source.kind
    if source.kind == "parquet":
        yield from _parquet_units(number, source, share, json_key)
    elif source.is_plain:
        yield from _plain_units(number, source, share, kind)
    else:
        yield from _packed_units(number, source, share, kind)


def _plain_units(number: int, source: Source, share: Share, kind: str) -> Iterator[Unit]:
    with source.path.open("rb") as file:
        count = 1 if kind == "file" else -(-source.size // UNIT_BYTES)
        cuts = _Cuts(file, source, kind)
        for index in range(count):
            if not share.wants((number, index), source):
                continue
            start = cuts.place(index)
            end = source.size if index + 1 == count else cuts.place(index + 1)
            _check_size(source, end - start)
            file.seek(start)
            payload = file.read(end - start)
            if len(payload) < end - start:
                raise DataError(f"{source.path}: became shorter while it was read; run the command again")
            consumed = source.size if count == 1 else min(UNIT_BYTES, source.size - index * UNIT_BYTES)
            yield Unit((number, index), kind, _without_mark(payload, start), start, consumed)


class _Cuts:
    """The cuts of a plain file, asked for in ascending order. A document is read once, however many cuts it spans."""

    def __init__(self, file: BinaryIO, source: Source, kind: str) -> None:
        self._file, self._source, self._kind = file, source, kind
        self._last = 0  # the cut found last
        self._holds_to = 0  # sought from up to here, the next cut is the same

    def place(self, index: int) -> int:
        """The first beginning of a document at or after `index * UNIT_BYTES`, or the end of the file."""
        position = index * UNIT_BYTES
        if position <= 0 or position >= self._source.size:
            return max(0, min(position, self._source.size))
        if position > self._holds_to:
            self._file.seek(position - 1)
            _skip_line(self._file)
            blank = _read_to_blank_line(self._file, None, self._source) if self._kind == "text" else 0
            self._last = self._file.tell()
            # Sought from within that blank line, or its end, it would be the one after the next blank line.
            self._holds_to = self._last - blank
        return self._last


def _skip_line(file: BinaryIO) -> None:
    while piece := file.readline(UNIT_BYTES):
        if piece.endswith(b"\n"):
            return


def _read_to_blank_line(file: BinaryIO, into: bytearray | None, source: Source) -> int:
    """Go on to the end of the next blank line, or of the file; what is passed goes into `into`.

    Returns:
        The length of the blank line, 0 at the end of the file.
    """
    passed = begun = 0
    blank = True
    while piece := file.readline(UNIT_BYTES):
        passed += len(piece)
        _check_size(source, passed)
        if into is not None:
            into += piece
        blank = blank and not piece.strip()
        if piece.endswith(b"\n"):
            if blank:
                return passed - begun
            blank, begun = True, passed
    return 0


def _check_size(source: Source, size: int) -> None:
    if size > DOCUMENT_LIMIT + UNIT_BYTES:
        raise DataError(
            f"{source.path}: a document of more than {DOCUMENT_LIMIT // 2**20} MiB; is this text? Cut it into several (in "
            "a .txt file documents stand between blank lines, in a .jsonl file one a line)"
        )


def _without_mark(payload: bytes, start: int) -> bytes:
    return payload.removeprefix(BYTE_ORDER_MARK) if start == 0 else payload


def _packed_units(number: int, source: Source, share: Share, kind: str) -> Iterator[Unit]:
    with source.path.open("rb") as raw, io.BufferedReader(open_packed(raw, source.packing), UNIT_BYTES) as unpacked:
        file = cast(BinaryIO, unpacked)
        index = offset = reached = 0
        while payload := _next_stretch(file, source, kind):
            key = (number, index)
            if share.wants(key, source):
                place = raw.tell()
                yield Unit(key, kind, _without_mark(payload, offset), offset, place - reached)
                reached = place
            index += 1
            offset += len(payload)


def _next_stretch(file: BinaryIO, source: Source, kind: str) -> bytes:
    if kind == "file":
        payload = file.read(DOCUMENT_LIMIT + UNIT_BYTES + 1)
        _check_size(source, len(payload))
        return payload
    stretch = bytearray(file.read(UNIT_BYTES))
    if len(stretch) == UNIT_BYTES:
        while not stretch.endswith(b"\n") and (piece := file.readline(UNIT_BYTES)):
            stretch += piece
            _check_size(source, len(stretch))
        if kind == "text":
            _read_to_blank_line(file, stretch, source)
    return bytes(stretch)


def _parquet_units(number: int, source: Source, share: Share, column: str) -> Iterator[Unit]:
    parquet = require("pyarrow.parquet", "data")
    arrow = require("pyarrow", "data")
    try:
        with parquet.ParquetFile(source.path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise DataError(
                    f"{source.path}: has no column {column!r}, only {', '.join(schema.names)[:300]}; name it by --json_key"
                )
            kind = schema.field(column).type
            kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if not (
                arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)
            ):
                raise DataError(f"{source.path}: column {column!r} holds {kind}, not text; name another by --json_key")
            rows = max(1, file.metadata.num_rows)
            row = 0
            for index, batch in enumerate(file.iter_batches(batch_size=PARQUET_ROWS, columns=[column])):
                key = (number, index)
                if share.wants(key, source):
                    texts: list[str] = batch.column(0).to_pylist()
                    if batch.column(0).null_count:
                        empty = row + next(place for place, text in enumerate(texts) if text is None)
                        raise DataError(f"{source.path}: row {empty}: column {column!r} is empty (null)")
                    _check_size(source, max(map(len, texts), default=0))
                    yield Unit(key, "rows", texts, row, source.size * len(texts) // rows)
                row += len(batch)
    except UnicodeDecodeError as error:
        raise DataError(f"{source.path}: column {column!r} holds bytes that are no UTF-8 ({error.reason})") from error
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source.path}: not a readable parquet file ({reason}); fetch or write it again") from error


def done_bytes(sources: list[Source], last_key: Key | None) -> int:
    """Bytes of the files as they lie on the disk, up to the last unit done; within a packed file that is not known."""
    if last_key is None:
        return 0
    number, index = last_key
    size = sum(source.size for source in sources[:number])
    if number < len(sources) and sources[number].is_plain:
        size += min(sources[number].size, (index + 1) * UNIT_BYTES)
    return size


def line_at(path: Path, packing: str, offset: int) -> int:
    """The number, from 1, of the line that begins at a byte of the (unpacked) content; for messages."""
    line, left = 1, offset
    with path.open("rb") as raw:
        file: io.RawIOBase | BinaryIO = open_packed(raw, packing) if packing else raw
        while left > 0 and (piece := file.read(min(left, UNIT_BYTES))):
            line += piece.count(b"\n")
            left -= len(piece)
    return line
