"""What the tensors of Meta's checkpoints are called, and how its model-parallel files cut them.

Names: the modules of llama/model.py in https://github.com/meta-llama/llama and models/llama3/model.py in
https://github.com/meta-llama/llama-models. Cuts: their fairscale layers; ColumnParallelLinear cuts dimension 0,
RowParallelLinear dimension 1, norms are whole in every file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from arriero.errors import FormatError


@dataclass(frozen=True)
class NameRow:
    """One kind of tensor; N stands for the layer.

    Attributes:
        hf: its name in an HF folder.
        meta: its name in a `consolidated.NN.pth`.
        permuted: whether its rows are ordered for RoPE on neighbouring pairs (see `arriero.formats.rope_layout`).
        cut: the dimension that the files of model parallelism share; None: each file has all of it.
        note: what else there is to say.
    """

    hf: str
    meta: str
    permuted: bool = False
    cut: int | None = None
    note: str = ""


EMBEDDING = NameRow(
    "model.embed_tokens.weight",
    "tok_embeddings.weight",
    cut=0,
    note="LLaMA 1 and 2 cut dimension 1 (ParallelEmbedding), Llama 3 dimension 0 (VocabParallelEmbedding)",
)
HEAD = NameRow("lm_head.weight", "output.weight", cut=0, note="stored even if it is the embedding")
ROWS = (
    EMBEDDING,
    NameRow("model.layers.N.input_layernorm.weight", "layers.N.attention_norm.weight"),
    NameRow("model.layers.N.self_attn.q_proj.weight", "layers.N.attention.wq.weight", permuted=True, cut=0),
    NameRow("model.layers.N.self_attn.k_proj.weight", "layers.N.attention.wk.weight", permuted=True, cut=0),
    NameRow("model.layers.N.self_attn.v_proj.weight", "layers.N.attention.wv.weight", cut=0),
    NameRow("model.layers.N.self_attn.o_proj.weight", "layers.N.attention.wo.weight", cut=1),
    NameRow("model.layers.N.post_attention_layernorm.weight", "layers.N.ffn_norm.weight"),
    NameRow("model.layers.N.mlp.gate_proj.weight", "layers.N.feed_forward.w1.weight", cut=0),
    NameRow("model.layers.N.mlp.up_proj.weight", "layers.N.feed_forward.w3.weight", cut=0),
    NameRow("model.layers.N.mlp.down_proj.weight", "layers.N.feed_forward.w2.weight", cut=1),
    NameRow("model.norm.weight", "norm.weight"),
    HEAD,
)
# RoPE frequencies, which follow from the configuration: one buffer, or one a layer in LLaMA 1.
_FREQUENCIES = re.compile(r"(layers\.\d{1,5}\.attention\.inner_attention\.)?rope\.freqs")
_LAYER = re.compile(r"layers\.(\d{1,5})\.")
_BY_META = {row.meta: row for row in ROWS}
_BY_HF = {row.hf: row for row in ROWS}


def is_frequencies(name: str) -> bool:
    """Whether a tensor of a `.pth` file carries RoPE frequencies, which are not weights."""
    return _FREQUENCIES.fullmatch(name) is not None


def from_meta(name: str, source: str) -> tuple[str, NameRow]:
    """The HF name of a tensor, and its kind.

    Raises:
        FormatError: for a tensor that no LLaMA has (an adapter's, an expert's, a vision tower's).
    """
    row, layer = _find(name, _BY_META, source)
    return row.hf.replace("N", layer), row


def to_meta(name: str, source: str) -> tuple[str, NameRow]:
    """Meta's name of a tensor, and its kind.

    Raises:
        FormatError: for a tensor that Meta's models do not have (a bias, a norm of queries).
    """
    row, layer = _find(name, _BY_HF, source)
    return row.meta.replace("N", layer), row


def _find(name: str, rows: Mapping[str, NameRow], source: str) -> tuple[NameRow, str]:
    layer = _LAYER.search(name)
    row = rows.get(_LAYER.sub("layers.N.", name, count=1))
    if row is None or (layer is not None and str(int(layer[1])) != layer[1]):
        raise FormatError(f"{source}: {name[:80]!r} is a tensor that no model in Meta's format has")
    return row, layer[1] if layer is not None else ""
