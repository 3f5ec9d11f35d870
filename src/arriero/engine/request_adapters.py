"""Adapters that requests name: many on one model, in one batch, read and given up as they are wanted."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arriero.adapters.packed_deltas import JOINED_ROWS, JoinedDeltas, LayerDeltas, PackedDeltas
from arriero.adapters.prefix import PrefixKV
from arriero.engine.adapter_reader import AdapterReader, Weights
from arriero.engine.work import NO_ADAPTER as NO_ADAPTER
from arriero.errors import ArrieroError, ConfigError, GenerationError
from arriero.models.llama import LlamaForCausalLM

MAX_NAME = 128
_NAME = re.compile(r"[A-Za-z0-9][\w.:@-]*(/[A-Za-z0-9][\w.:@-]*)*", re.ASCII)
_NAMED = 20  # names in a message; the others are counted


@dataclass(eq=False)
class RequestAdapter:
    """An adapter under a name.

    Attributes:
        number: unlike that of any other, also of one that had the name before or will have it.
        kind, rank, prefix_length, digest: see `AdapterContents`.
        nbytes: what its weights take while they are in memory.
        requests: how many that have not ended use it.
        weights: None while they are not in memory.
    """

    name: str
    folder: Path
    number: int
    kind: str
    rank: int
    prefix_length: int
    nbytes: int
    digest: bytes
    weights: Weights | None
    requests: int = 0

    def salt(self, salt: bytes) -> bytes:
        """Of requests that use it: cached keys and values are shared only among those of this adapter and of one `salt`."""
        identity = f"{self.number} {self.name}".encode()
        return hashlib.blake2b(identity + b"\0" + salt, digest_size=16, person=b"adapter").digest()


class AdapterPool:
    """The adapters of one model, by name.

    All of them can be asked for at any time. The weights of at most `max_loaded` are in memory: those of running requests, and
    of the others the ones that were used last; what was given up is read again when it is wanted. Requests that use more
    different ones than that run one after the other (see `Scheduler`).

    A name that is unloaded or loaded anew is at once gone or another one for new requests; those that have begun end with what
    they began with. Weights have the model's number format. One thread at a time, but for `read`.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        base_model: str = "this model",
        *,
        max_loaded: int = 16,
        max_rank: int = 64,
    ) -> None:
        """
        Args:
            model: the base, whole, in this process.
            base_model: its name, for messages.
            max_loaded: adapters in memory, and so different ones in a batch.
            max_rank: of an adapter in any layer, and so a bound of what each takes.

        Raises:
            ConfigError: a limit below 1, or a model that several processes hold.
        """
        if min(max_loaded, max_rank) < 1:
            raise ConfigError(f"max_loaded {max_loaded} and max_rank {max_rank} of adapters: both must be at least 1")
        if not isinstance(model, LlamaForCausalLM):
            raise ConfigError(
                "adapters at request time need a model that one process holds: start one process, or give one adapter for all "
                "requests (--lora_path, --prefix_path)"
            )
        self.model, self.max_loaded = model, max_loaded
        self._reader = AdapterReader(model, base_model, max_rank)
        self._device = model.model.embed_tokens.weight.device
        self._numbers = itertools.count(NO_ADAPTER + 1)
        self._named: dict[str, RequestAdapter] = {}
        self._numbered: dict[int, RequestAdapter] = {}  # those with a name, and those that requests still use
        self._held: OrderedDict[int, None] = OrderedDict()  # whose weights are in memory; the longest unused first
        self._running: frozenset[int] = frozenset()  # of the last step
        self._last: tuple[int, ...] = ()  # those of the last step, in its order
        self._joined: JoinedDeltas | None = None  # of `_last`

    @property
    def names(self) -> tuple[str, ...]:
        """What requests can name."""
        return tuple(self._named)

    @property
    def adapters(self) -> tuple[RequestAdapter, ...]:
        """Those with a name, and those that only requests that have begun still use."""
        return tuple(self._numbered.values())

    @property
    def nbytes(self) -> int:
        """What the weights in memory take, copies included."""
        held = sum(self._numbered[number].nbytes for number in self._held)
        return held + (self._joined.nbytes if self._joined is not None else 0)

    def load(self, name: str, folder: str | Path) -> RequestAdapter:
        """Read an adapter and let requests use it under this name: `read`, then `add`.

        Raises:
            ArrieroError: as `read`.
        """
        return self.add(self.read(name, folder))

    def read(self, name: str, folder: str | Path) -> RequestAdapter:
        """Read and check an adapter, which changes nothing yet. Any thread may.

        Args:
            name: a key and no path: letters, digits and ._:@- in parts that are divided by slashes.
            folder: as PEFT or this project writes it.

        Raises:
            GenerationError: a name of another form.
            FormatError: files that are missing or broken, or of another base model.
            ConfigError: an adapter that is too large or cannot be applied at request time; it says what can be done.
        """
        if len(name) > MAX_NAME or not _NAME.fullmatch(name):
            raise GenerationError(
                f"{name[:MAX_NAME]!r} is no name for an adapter: up to {MAX_NAME} letters, digits and . _ : @ -, in parts that "
                "begin with a letter or digit and are divided by /"
            )
        folder = Path(folder).resolve()
        found = self._reader.read(folder)
        facts = (found.kind, found.rank, found.prefix_length, found.nbytes, found.digest)
        return RequestAdapter(name, folder, next(self._numbers), *facts, found.weights)

    def add(self, adapter: RequestAdapter) -> RequestAdapter:
        """Let requests use an adapter that was read. One that had its name before ends with the requests that use it.

        Where all in memory belong to running requests, its weights are given up again until it is wanted.
        """
        if adapter.name in self._named:
            self.unload(adapter.name)
        self._named[adapter.name] = self._numbered[adapter.number] = adapter
        if self._make_room():
            self._held[adapter.number] = None
        else:
            adapter.weights = None
        return adapter

    def unload(self, name: str) -> None:
        """Let no new request use it. Its weights go at once, or with the last request that uses it.

        Raises:
            GenerationError: no adapter has this name.
        """
        adapter = self.find(name)
        del self._named[name]
        if adapter.requests == 0:
            self._drop(adapter)

    def find(self, name: str) -> RequestAdapter:
        """The adapter that a new request gets under a name.

        Raises:
            GenerationError: no adapter has this name; it lists those that there are.
        """
        adapter = self._named.get(name)
        if adapter is None:
            known = ", ".join(list(self._named)[:_NAMED])
            more = f" and {len(self._named) - _NAMED} more" if len(self._named) > _NAMED else ""
            there_are = f"there are {known}{more}" if known else "none is loaded"
            raise GenerationError(f"there is no adapter {name[:MAX_NAME]!r}: {there_are}")
        return adapter

    def begin_use(self, number: int) -> None:
        """A request that uses this adapter has been taken in."""
        self._numbered[number].requests += 1

    def end_use(self, number: int) -> None:
        """One has ended."""
        adapter = self._numbered[number]
        adapter.requests -= 1
        if adapter.requests == 0 and self._named.get(adapter.name) is not adapter:
            self._drop(adapter)

    def prepare(self, numbers: Collection[int]) -> dict[int, str]:
        """Have the weights of these in memory, for a step.

        Args:
            numbers: of all running requests' adapters, at most `max_loaded`.

        Returns:
            What is wrong with those that cannot be read any more, by number.
        """
        self._running = frozenset(numbers)
        errors = {}
        for number in self._running:
            adapter = self._numbered[number]
            if adapter.weights is None:
                try:
                    weights = self._reader.read(adapter.folder, adapter.digest).weights
                except ArrieroError as error:
                    errors[number] = f"adapter '{adapter.name}' cannot be read again: {error}"
                    continue
                self._make_room()
                adapter.weights = weights
            self._held[number] = None
            self._held.move_to_end(number)
        return errors

    def deltas(self, numbers: Sequence[int], counts: Sequence[int]) -> PackedDeltas | None:
        """What the adapters of a step's packed tokens add; None where there are no low-rank ones.

        Args:
            numbers: of each sequence's adapter, or `NO_ADAPTER`.
            counts: of its tokens.
        """
        low_rank: dict[int, LayerDeltas] = {}
        for number in numbers:
            weights = self._numbered[number].weights if number != NO_ADAPTER else None
            if isinstance(weights, Mapping):
                low_rank[number] = weights
        if not low_rank:
            return None
        present = tuple(sorted(low_rank))
        joined = self._join(present, low_rank) if len(present) > 1 and sum(counts) <= JOINED_ROWS else None
        owners = [present.index(number) if number in low_rank else -1 for number in numbers]
        return PackedDeltas([low_rank[number] for number in present], owners, counts, self._device, joined)

    def prefix(self, number: int) -> PrefixKV | None:
        """An adapter's learned keys and values; None of one that has none."""
        weights = self._numbered[number].weights
        return weights if isinstance(weights, PrefixKV) else None

    def _join(self, present: tuple[int, ...], deltas: Mapping[int, LayerDeltas]) -> JoinedDeltas | None:
        """The adapters of a step side by side, once it is the second with just these: making it costs about a step."""
        if present != self._last:
            self._last, self._joined = present, None
            return None
        if self._joined is None:
            self._joined = JoinedDeltas([deltas[number] for number in present])
        return self._joined

    def _make_room(self) -> bool:
        """Give up the weights that were not used for longest, so that one more has room; False if running requests need all."""
        while len(self._held) >= self.max_loaded:
            free = [n for n in self._held if n not in self._running or self._numbered[n].requests == 0]
            if not free:
                return False
            self._give_up(min(free, key=lambda number: self._numbered[number].requests > 0))
        return True

    def _give_up(self, number: int) -> None:
        self._numbered[number].weights = None
        self._held.pop(number, None)
        if number in self._last:
            self._last, self._joined = (), None

    def _drop(self, adapter: RequestAdapter) -> None:
        self._give_up(adapter.number)
        del self._numbered[adapter.number]
