"""Whether a written graph computes what the eager model computes, with the stored numbers and with the original ones.

The eager model computes in fp64: in fp32 its own rounding would be most of the difference.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.export.block_weights import BlockFormat, BlockWeight
from arriero.export.data_file import DataFile
from arriero.export.onnx_graph import WeightForm
from arriero.export.onnx_session import OnnxSession
from arriero.export.slot_runner import SlotRunner
from arriero.export.weight_names import EMBEDDING
from arriero.export.weight_source import WeightSource
from arriero.formats.verification import relative_difference
from arriero.models.attention import AttentionInfo
from arriero.models.config import LlamaConfig
from arriero.models.llama import DecoderLayer, LayerInputs, RMSNorm, run_layers
from arriero.models.rope import RotaryEmbedding
from arriero.models.weight_shapes import HEAD

NEW_TOKENS = 32
PROMPTS = (5, 17, 40)  # tokens of each
# Of the largest difference of a logit, where products are computed in fp32: some 26 times the distance of neighbouring
# fp32 numbers of the size of _LOGIT; logits that are larger may differ by as much more.
EXACT, _LOGIT = 1e-4, 32.0
# Of the root mean square of the differences, as a share of that of the logits, where inputs are rounded to 8 bits.
ROUNDED = 0.1
# The same beside the original weights, by what they were rounded to. A weight that is wrong is far beyond.
ORIGINAL = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1, "int8": 0.2, "int4": 0.7}


@dataclass(frozen=True)
class Step:
    """One sequence's part of a step; see `arriero.engine.work.Work`."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    logits: int
    salt: bytes = b""


@dataclass(frozen=True)
class Check:
    """What the comparison found, over all prompts and NEW_TOKENS greedy tokens of each.

    Attributes:
        largest_difference: of a logit.
        relative_difference: root mean square of all differences, divided by that of the logits.
        largest_logit: of the eager model.
        greedy_agreement: the share of tokens that are the eager model's, too, each after the same tokens.
        original_difference, original_agreement: `relative_difference` and `greedy_agreement` beside the original weights.
        repeats: whether a second run in the same slots gave the same logits to the last bit.
        tokens: that were compared.
    """

    largest_difference: float
    relative_difference: float
    largest_logit: float
    greedy_agreement: float
    original_difference: float
    original_agreement: float
    repeats: bool
    tokens: int


class EagerModel(ABC):
    """A model in fp64 whose layers are read one at a time."""

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config

    @abstractmethod
    def _layer(self, prefix: str, layer: DecoderLayer) -> dict[str, Tensor]:
        """The weights of a layer, fp64."""

    @abstractmethod
    def _table(self, name: str) -> Tensor:
        """The embedding or the output head, (vocab_size, hidden) fp64."""

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """Another weight, fp64."""

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]], last: int) -> Tensor:
        """Those of the last tokens of each sequence, (sequences, last, vocab_size) fp64."""
        config = self._config
        lengths = [len(ids) for ids in sequences]
        attention = AttentionInfo.documents(lengths)
        table = self._table(EMBEDDING)
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.load_state_dict({"weight": self._read("model.norm.weight")}, assign=True)
        ids = torch.tensor([[token for sequence in sequences for token in sequence]])
        inputs = LayerInputs(attention.positions(ids.shape[1], ids.device), attention, None)
        embedding = torch.nn.Embedding(table.shape[0], table.shape[1], _weight=table)
        hidden = run_layers(embedding, self._layers(), norm, RotaryEmbedding(config), ids, inputs)[0]
        wanted = torch.stack([part[-last:] for part in torch.split(hidden, lengths)])
        return wanted @ (table if config.tie_word_embeddings else self._table(HEAD)).T

    def _layers(self) -> Iterator[DecoderLayer]:
        for number in range(self._config.num_hidden_layers):
            with torch.device("meta"):
                layer = DecoderLayer(self._config, number)
            layer.load_state_dict(self._layer(f"model.layers.{number}.", layer), assign=True)
            yield layer


class SourceModel(EagerModel):
    """The model that is exported."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source.config)
        self._source = source

    def _layer(self, prefix: str, layer: DecoderLayer) -> dict[str, Tensor]:
        return {name: self._read(prefix + name) for name in layer.state_dict()}

    def _table(self, name: str) -> Tensor:
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        return self._source.load(name).double()


class StoredModel(EagerModel):
    """The model of what a data file holds."""

    def __init__(self, data: DataFile, config: LlamaConfig, form: WeightForm) -> None:
        super().__init__(config)
        self._data, self._form = data, form

    def _layer(self, prefix: str, layer: DecoderLayer) -> dict[str, Tensor]:
        """Those that lie in one matrix apart again."""
        state: dict[str, Tensor] = {}
        shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
        packed = {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            "self_attn.o_proj": ("self_attn.o_proj",),
            "mlp.down_proj": ("mlp.down_proj",),
        }
        for label, names in packed.items():
            for part in ("weight", "bias"):
                if f"{names[0]}.{part}" in shapes:
                    whole = self._matrix(prefix + label) if part == "weight" else self._read(f"{prefix}{label}.bias")
                    rows = torch.split(whole, [shapes[f"{name}.{part}"][0] for name in names])
                    state |= {f"{name}.{part}": value for name, value in zip(names, rows, strict=True)}
        return state | {name: self._read(prefix + name) for name in shapes if name not in state}

    def _matrix(self, label: str) -> Tensor:
        """(out, in), as the graph multiplies with it."""
        if self._form.layers is not None:
            return self._blocks(label, self._form.layers, self._inputs(label))
        return self._plain(f"{label}.weight").T

    def _table(self, name: str) -> Tensor:
        form = self._form.head
        return self._plain(name) if form is None else self._blocks(name, form, self._config.hidden_size)

    def _inputs(self, label: str) -> int:
        """Of a linear layer."""
        config = self._config
        if label.endswith("o_proj"):
            return config.num_attention_heads * config.head_dim
        return config.intermediate_size if label.endswith("down_proj") else config.hidden_size

    def _plain(self, name: str) -> Tensor:
        return self._read(f"{name}.fp16" if self._form.half else name)

    def _blocks(self, label: str, form: BlockFormat, in_features: int) -> Tensor:
        parts = [self._array(f"{label}.{part}") for part in ("packed", "scales")]
        form = form if parts[0].shape[2] * 8 == form.bits * form.block_size else form.wide
        zeros = None if form.symmetric else self._array(f"{label}.zero_points")
        down = self._array(f"{label}.down") if f"{label}.down" in self._data.names else None
        rank = 0 if down is None else down.any(0).sum().item()  # what fills it up is zero
        weight = BlockWeight(form, in_features, parts[0], parts[1], zeros, rank)
        whole = torch.from_numpy(weight.dequantize()).double()
        if down is None:
            return whole
        factors = (np.asarray(part, np.float64) for part in (weight.up(), down[:, -rank:].T))
        return whole + torch.from_numpy(np.matmul(*factors))

    def _array(self, name: str) -> npt.NDArray[Any]:
        return self._data.read(name)

    def _read(self, name: str) -> Tensor:
        return torch.from_numpy(self._data.read(name).astype(np.float64))


def check_graph(graph: Path, source: WeightSource, data: DataFile, form: WeightForm, context: int) -> Check:
    """Generate greedily with the graph, twice in the same slots, and compare every logit with those of the eager model with the
    stored weights, and with the original ones.

    Raises:
        FormatError: if they differ by more than the kind's bound, or a second run differs from the first.
    """
    config = source.config
    new_tokens = min(NEW_TOKENS, max(1, context // 2))
    sizes = [min(size, context - new_tokens) for size in PROMPTS]
    prompts = [[(7919 * (row + at + 1)) % config.vocab_size for at in range(size)] for row, size in enumerate(sizes)]
    runner = SlotRunner(OnnxSession(graph, len(prompts)))
    tokens, logits = generate(runner, prompts, new_tokens)
    again, repeated = generate(runner, prompts, new_tokens)
    sequences = [[*ids, *new[:-1]] for ids, new in zip(prompts, tokens, strict=True)]
    given = torch.from_numpy(np.stack(logits)).double()
    expected = StoredModel(data, config, form).logits(sequences, new_tokens)
    original = SourceModel(source).logits(sequences, new_tokens)
    apart = given - expected
    found = Check(
        largest_difference=float(apart.abs().max()),
        relative_difference=relative_difference(expected, given),
        largest_logit=float(expected.abs().max()),
        greedy_agreement=float((expected.argmax(-1) == torch.tensor(tokens)).double().mean()),
        original_difference=relative_difference(original, given),
        original_agreement=float((original.argmax(-1) == torch.tensor(tokens)).double().mean()),
        repeats=again == tokens and all(np.array_equal(a, b) for a, b in zip(logits, repeated, strict=True)),
        tokens=expected[..., 0].numel(),
    )
    _judge(found, form, graph)
    return found


def generate(
    runner: SlotRunner, prompts: list[list[int]], count: int
) -> tuple[list[list[int]], list[npt.NDArray[np.float32]]]:
    """The greedy tokens of each prompt, in the slot of its number, and the logits (count, vocab_size) they are of."""
    slots, salt = range(len(prompts)), secrets.token_bytes(8)  # nothing of an earlier run
    logits = _host(runner.run([Step(prompts[slot], 0, [slot], 1, salt) for slot in slots]))
    tokens: list[list[int]] = [[] for _ in slots]
    kept = []
    for _ in range(count):
        kept.append(logits)
        for slot in slots:
            tokens[slot].append(int(logits[slot].argmax()))
        if len(kept) < count:
            ends = [len(prompts[slot]) + len(tokens[slot]) for slot in slots]
            logits = _host(runner.run([Step(tokens[slot][-1:], ends[slot] - 1, [slot], 1, salt) for slot in slots]))
    return tokens, [np.stack([step[slot] for step in kept]) for slot in slots]


def _host(logits: Tensor | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return logits.cpu().numpy() if isinstance(logits, Tensor) else logits


def _judge(found: Check, form: WeightForm, graph: Path) -> None:
    rounds = form.accuracy_level == 4 and (form.layers is not None or form.head is not None)
    exact = EXACT * max(1.0, found.largest_logit / _LOGIT)
    value, bound = (found.relative_difference, ROUNDED) if rounds else (found.largest_difference, exact)
    what = "relatively" if rounds else "by"
    if not value <= bound:
        raise FormatError(
            f"{graph.name}: its logits differ from the model's {what} {value:.1e}, and {bound:g} is allowed"
        )
    kind = ("fp16" if form.half else "fp32") if form.layers is None else f"int{form.layers.bits}"
    if not found.original_difference <= ORIGINAL[kind]:
        raise FormatError(
            f"{graph.name}: its logits differ from those of the original weights relatively {found.original_difference:.1e}, "
            f"and {ORIGINAL[kind]:g} is allowed for {kind}"
        )
    if not found.repeats:
        raise FormatError(f"{graph.name}: a second run in the same slots gave other logits")
