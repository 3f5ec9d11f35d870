"""Who may use the server: keys, and how often each."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import ConfigError

KEY_VARIABLE = "ARRIERO_API_KEY"
MIN_KEY_LENGTH, MAX_KEY_LENGTH = 16, 512
MAX_KEYS = 10_000
MAX_KNOWN_CLIENTS = 10_000  # whose rates are remembered


@dataclass(frozen=True)
class Client:
    """Who sends a request.

    Attributes:
        name: for logs; never the key.
        salt: clients with different ones share nothing of the prefix cache, so that none can find out by the time of an
            answer what another one asks.
    """

    name: str
    salt: bytes = b""


class Keys:
    """The keys that open the server. Only their digests are kept."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """
        Args:
            keys: name -> key.

        Raises:
            ConfigError: a key that is too short or has blanks or other characters that no header can carry.
        """
        self._clients: list[tuple[bytes, Client]] = []
        for name, key in keys.items():
            if (
                not MIN_KEY_LENGTH <= len(key) <= MAX_KEY_LENGTH
                or not key.isascii()
                or not key.isprintable()
                or " " in key
            ):
                raise ConfigError(
                    f"the API key {name!r} is not usable: {MIN_KEY_LENGTH} to {MAX_KEY_LENGTH} letters, digits and signs "
                    "without blanks are needed, such as: openssl rand -hex 24"
                )
            digest = hashlib.sha256(key.encode()).digest()
            salt = hashlib.blake2b(digest, digest_size=16, person=b"cache").digest()
            self._clients.append((digest, Client(name, salt)))

    def __bool__(self) -> bool:
        """Whether keys are asked for at all."""
        return bool(self._clients)

    def find(self, key: str) -> Client | None:
        """Whose key this is. Takes the same time for every key: all are compared, and each in constant time."""
        given = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for digest, client in self._clients:
            if hmac.compare_digest(digest, given):
                found = client
        return found


def read_keys(file: str | None) -> tuple[Keys, str | None]:
    """The keys of a file and of the environment, and a warning if everyone can read the file.

    Raises:
        ConfigError: a file that cannot be read, a line of another form, or an unusable key.
    """
    keys: dict[str, str] = {}
    warning = None
    if file is not None:
        path = Path(file)
        try:
            text = path.read_text(encoding="utf-8")
            mode = path.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a UTF-8 text file"
            raise ConfigError(f"--api_key_file {file}: cannot be read: {reason}") from error
        if mode & stat.S_IROTH:
            warning = f"{file} can be read by every user of this machine: chmod 600 {file}"
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2 or len(keys) >= MAX_KEYS:
                raise ConfigError(
                    f"{file} line {number}: write NAME KEY, or the key alone, and at most {MAX_KEYS} of them"
                )
            name = words[0] if len(words) == 2 else f"key-{number}"
            if name in keys:
                raise ConfigError(f"{file} line {number}: the name {name[:60]!r} comes twice")
            keys[name] = words[-1]
        if not keys:
            raise ConfigError(f"--api_key_file {file}: holds no key; write one a line")
    own = os.environ.get(KEY_VARIABLE, "").strip()
    if own:
        keys["environment"] = own
    return Keys(keys), warning


class RateLimit:
    """So many requests a minute for each client: a bucket that fills evenly and holds a minute's worth."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            per_minute: 0: any number.
        """
        self.per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (tokens, when)

    def take(self, client: str) -> tuple[int, float]:
        """Count a request.

        Returns:
            How many the client may still make at once, and in how many seconds the next one is free: 0 if this one was.
        """
        now = self._clock()
        tokens, then = self._buckets.pop(client, (float(self.per_minute), now))
        tokens = min(float(self.per_minute), tokens + (now - then) * self.per_minute / 60)
        wait = 0.0 if tokens >= 1 else (1 - tokens) * 60 / self.per_minute
        if wait == 0:
            tokens -= 1
        self._buckets[client] = tokens, now
        while len(self._buckets) > MAX_KNOWN_CLIENTS:
            self._buckets.popitem(last=False)
        return int(tokens), wait
