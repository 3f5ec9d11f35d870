"""The zip archive in which torch.save (from torch 1.6 on) puts a pickle and the raw bytes of every storage.

Only the directory is read here. Nothing is ever unpacked: storages are stored uncompressed, so a record is a range of the
file. An archive in which one byte could be read twice (overlapping records, compression) is refused, so no zip bomb is one
here. Layout: APPNOTE.TXT 6.3.10 of PKWARE, section 4.3.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from arriero.errors import FormatError

MAX_RECORDS = 65_535
MAX_DIRECTORY_BYTES = 16 * 2**20

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 1
_FULL32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """A stored file: the bytes from `offset` on, `size` of them, with their CRC-32."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class _Entry:
    name: bytes
    header: int  # where its local header begins
    size: int
    crc: int


def read_records(path: Path) -> dict[str, Record]:
    """Every record of an archive by its name below the archive's one top folder ("data.pkl", "data/0", "version").

    Raises:
        FormatError: not a zip archive of torch.save, cut short, or with anything in it that torch.save never writes.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            if file.read(4) != b"PK\x03\x04":
                raise FormatError(
                    f"{path}: is not a zip archive of torch.save; if it is a pickle of torch before 1.6 that you trust, "
                    "load it with torch.load(..., weights_only=True) and torch.save it again"
                )
            directory, start = _read_directory(file, length, path)
            return _locate(file, _entries(directory, path), start, path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: its zip directory is corrupt; fetch it again") from error


def _read_directory(file: BinaryIO, length: int, path: Path) -> tuple[bytes, int]:
    """The central directory and where it begins. torch.save writes no comment, so the end record is the last 22 bytes."""
    end_at = length - _END.size
    signature, disk, first, here, count, size, start, comment = _END.unpack(_read(file, end_at, _END.size))
    if signature != b"PK\x05\x06" or comment:
        raise FormatError(f"{path}: its zip directory is not at its end; the file is cut short, fetch it again")
    limit = end_at
    locator_at = end_at - _END64_LOCATOR.size
    if locator_at > 0 and (where := _read(file, locator_at, _END64_LOCATOR.size)).startswith(b"PK\x06\x07"):
        limit = _END64_LOCATOR.unpack(where)[2]
        fields = _END64.unpack(_read(file, limit, _END64.size))
        if fields[0] != b"PK\x06\x06":
            raise FormatError(f"{path}: its zip directory is corrupt; fetch it again")
        disk, first, here, count, size, start = fields[4:]
    if disk or first or here != count or start + size != limit:
        raise FormatError(f"{path}: its zip directory is corrupt; fetch it again")
    if count > MAX_RECORDS or size > MAX_DIRECTORY_BYTES:
        raise FormatError(f"{path}: has {count} records in a directory of {size} bytes; no model has so many")
    return _read(file, start, size), start


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    if not 0 <= at < 2**62:
        raise struct.error("outside of any file")
    file.seek(at)
    return file.read(size)


def _entries(directory: bytes, path: Path) -> list[_Entry]:
    entries, at = [], 0
    while at < len(directory):
        fields = _ENTRY.unpack_from(directory, at)
        signature, flags, method, crc, packed, size = fields[0], fields[3], fields[4], *fields[7:10]
        name_length, extra_length, comment_length = fields[10:13]
        header = fields[16]
        begin = at + _ENTRY.size
        name = directory[begin : begin + name_length]
        extra = directory[begin + name_length : begin + name_length + extra_length]
        at = begin + name_length + extra_length + comment_length
        if signature != b"PK\x01\x02" or at > len(directory):
            raise FormatError(f"{path}: its zip directory is corrupt; fetch it again")
        if flags & _ENCRYPTED or method != 0:
            raise FormatError(
                f"{path}: the record {_shown(name)} is compressed or encrypted; torch.save never does that"
            )
        size, packed, header = _widen([size, packed, header], extra)
        if size != packed:
            raise FormatError(f"{path}: the record {_shown(name)} has two sizes; the file is corrupt, fetch it again")
        entries.append(_Entry(name, header, size, crc))
    return entries


def _widen(values: list[int], extra: bytes) -> list[int]:
    """Replace each number that does not fit 32 bits by the one in the zip64 field (id 1), which has only those, in order."""
    if _FULL32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{values.count(_FULL32)}Q", extra, at + 4))
            return [next(wide) if value == _FULL32 else value for value in values]
        at += 4 + length
    raise struct.error("a zip64 field is missing")


def _locate(file: BinaryIO, entries: list[_Entry], limit: int, path: Path) -> dict[str, Record]:
    """Where the bytes of each entry are; every entry must lie after the one before it, and before the directory."""
    records: dict[str, Record] = {}
    folder, taken = None, 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        fields = _LOCAL.unpack(_read(file, entry.header, _LOCAL.size))
        begin = entry.header + _LOCAL.size + fields[9] + fields[10]
        local_name = _read(file, entry.header + _LOCAL.size, fields[9])
        if fields[0] != b"PK\x03\x04" or fields[3] != 0 or local_name != entry.name:
            raise FormatError(f"{path}: the record {_shown(entry.name)} has two headers that differ; fetch it again")
        if entry.header < taken or begin + entry.size > limit:
            raise FormatError(
                f"{path}: the record {_shown(entry.name)} overlaps another or the file's end; fetch it again"
            )
        taken = begin + entry.size
        name = entry.name.decode("utf-8")
        top, _, below = name.partition("/")
        if not top or not below or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise FormatError(f"{path}: the record name {_shown(entry.name)} is none that torch.save writes")
        if folder is not None and top != folder:
            raise FormatError(f"{path}: has records of two archives, {folder[:40]!r} and {top[:40]!r}")
        if below in records:
            raise FormatError(f"{path}: has the record {_shown(entry.name)} twice")
        folder = top
        records[below] = Record(begin, entry.size, entry.crc)
    return records


def _shown(name: bytes) -> str:
    return repr(name[:60].decode("utf-8", "replace"))
