"""Files of rows: JSON lines, a JSON array, tables (CSV, TSV, parquet). Each row comes with its place, for messages."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from arriero.data.surrogates import all_without_surrogates
from arriero.errors import DataError, require

MAX_ROW_BYTES = 16 << 20
MAX_ARRAY_BYTES = 512 << 20  # of a JSON array, which is in memory as a whole
PARQUET_ROWS = 512
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".json", ".jsonl", *DELIMITERS, ".parquet")
# Columns of a table that hold lists: in CSV they are JSON text
LIST_COLUMNS = ("messages", "conversations", "instances", "tools", "answers", "history")
_BLANKS = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_NO_UTF8 = "of it is no UTF-8 text; save the file as UTF-8"


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file as ("path:line", value), by its suffix; JSON if it is not that of a table.

    Raises:
        DataError: naming the row that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        return read_csv(path, DELIMITERS[suffix])
    return read_parquet(path) if suffix == ".parquet" else read_json(path)


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file of JSON lines as ("path:line", value), or of one JSON array as ("path[N]", value), N from 0.

    Blank lines are skipped. What begins with `[` is an array, over as many lines as it likes: a line of JSON lines is an
    object.

    Raises:
        DataError: naming the line or the element that is not JSON, or the byte that is no UTF-8.
    """
    try:
        with path.open("rb") as file:  # opened once, for it may be a pipe
            number, begun = 0, False
            while line := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                if not begun and is_array(line):
                    yield from _elements(_array(file, b"\n" * (number - 1) + line, path), path)
                    return
                where = f"{path}:{number}"
                if len(line) > MAX_ROW_BYTES:
                    raise DataError(f"{where}: a row of more than {MAX_ROW_BYTES} bytes, the most that are read")
                if line.strip():
                    text = utf8_text(line, path, number)
                    try:
                        yield where, _value(text, line)
                    except (ValueError, RecursionError) as error:
                        hint = "" if begun else "; rows are JSON objects, one a line, or one JSON array of objects"
                        raise DataError(f"{where}: not JSON ({error}){hint}") from error
                    begun = True
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def is_array(start: bytes) -> bool:
    """Whether what begins so is a JSON array."""
    return start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _array(file: BinaryIO, start: bytes, path: Path) -> str:
    """The text of a file of which the start is read."""
    content = start + file.read(max(0, MAX_ARRAY_BYTES + 1 - len(start)))
    if len(content) > MAX_ARRAY_BYTES:
        raise DataError(
            f"{path}: a JSON array of more than {MAX_ARRAY_BYTES} bytes, the most that are read; write an object a line "
            "(JSON lines), which has no such limit"
        )
    return utf8_text(content, path)


def utf8_text(content: bytes, path: Path, line: int = 1) -> str:
    """The text of UTF-8, without a byte order mark; half a pair of surrogates passes: it is mended in the row.

    Args:
        line: the number of the first one, for messages.

    Raises:
        DataError: naming the line and the byte that is none.
    """
    unmarked = content.removeprefix(codecs.BOM_UTF8)
    try:
        return unmarked.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        wrong = error.start + len(content) - len(unmarked)
        line += content.count(b"\n", 0, wrong)
        byte = wrong - content.rfind(b"\n", 0, wrong)
        raise DataError(f"{path}: line {line} byte {byte} {_NO_UTF8}") from error


def _elements(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON array, one after the other."""
    decoder, number = json.JSONDecoder(), 0
    at = _after_blanks(text, text.index("[") + 1)
    ended = text[at : at + 1] == "]"
    while not ended:
        where = f"{path}[{number}]"
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if end - at > MAX_ROW_BYTES:
            raise DataError(f"{where}: a row of more than {MAX_ROW_BYTES} characters, the most that are read")
        yield where, all_without_surrogates(value) if _may_have_surrogates(text, at, end) else value
        number += 1
        at = _after_blanks(text, end)
        if text[at : at + 1] not in (",", "]"):
            raise DataError(f"{where}: not followed by , or ] ({_place(text, at)}): the array is cut off or broken")
        ended = text[at] == "]"
        at = _after_blanks(text, at + 1) if not ended else at
    rest = _after_blanks(text, at + 1)
    if rest < len(text):
        raise DataError(f"{path}: more follows the array's end ({_place(text, rest)}); a file has one array")


def _after_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found is not None else at


def _may_have_surrogates(text: str, start: int, end: int) -> bool:
    """A look at what can stand for half a pair; one that is none costs a look at each text."""
    return text.find("\\u", start, end) >= 0 or _SURROGATE.search(text, start, end) is not None


def _place(text: str, at: int) -> str:
    return f"line {text.count(chr(10), 0, at) + 1} column {at - text.rfind(chr(10), 0, at)}"


def _value(text: str, line: bytes) -> Any:
    value = json.loads(text)
    if b"\\u" in line or b"\xed" in line:  # how half a pair is written; one that is none costs a look at each text
        return all_without_surrogates(value)
    return value


def read_csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table in text (RFC 4180, UTF-8), keyed by the names in its first line; blank lines are skipped, and so is
    a first column without a name: pandas writes its index there.

    Raises:
        DataError: naming the line: not UTF-8, no header, more or fewer fields than names, or a field that is too long.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which must not become part of the first name
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(_bounded_lines(file, path), delimiter=delimiter, strict=True)
            names: list[str] = []
            try:
                for fields in reader:
                    where = f"{path}:{reader.line_num}"
                    if not fields:
                        continue
                    if not names:
                        names = _header(fields, where)
                    elif len(fields) != len(names):
                        raise DataError(f"{where}: {len(fields)} fields, the header names {len(names)}")
                    else:
                        named = zip(names, fields, strict=True)
                        yield where, {name: _field(name, text) for name, text in named if name}
            except csv.Error as error:
                raise DataError(f"{path}:{reader.line_num}: not readable as a table ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _bounded_lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file, none of them longer than a row may be, all of them UTF-8: other bytes came in as surrogates."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(f"{path}:{number}: a line of more than {MAX_ROW_BYTES} characters")
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = len(line[: error.start].encode()) + 1
            raise DataError(f"{path}: line {number} byte {byte} {_NO_UTF8}") from error
        yield line


def _header(fields: list[str], where: str) -> list[str]:
    names = [field.strip() for field in fields]
    if len(set(names)) < len(names) or "" in names[1:] or names == [""]:
        raise DataError(f"{where}: the first line must name every column, each once")
    return names


def _field(name: str, text: str) -> Any:
    if name in LIST_COLUMNS and text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text  # the row's reader says what it expects there
    return text


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a parquet file, keyed by column, as ("path row N", row), N from 0; it needs the extra `data`.

    Raises:
        DataError: the file cannot be read.
    """
    parquet, arrow = require("pyarrow.parquet", "data"), require("pyarrow", "data")
    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except (OSError, ValueError, arrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable parquet file ({reason}); fetch or write it again") from error
