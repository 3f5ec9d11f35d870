"""Writes the tables of names in docs/formats.md from the code that converts: `make docs`.

Each table stands between two marks, `<!-- NAME: made by docs/make_formats.py -->` and `<!-- NAME: end -->`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from arriero.formats.gguf.names import name_table
from arriero.formats.gguf.tensor_types import KINDS
from arriero.formats.meta.names import ROWS as META_ROWS
from arriero.formats.paddle.names import FUSED_ROWS, TENSOR_ROWS, TensorRow
from arriero.models.config import LlamaConfig
from arriero.models.tensor_split import cut_of
from arriero.models.weight_shapes import weight_shapes

PAGE = Path(__file__).parent / "formats.md"
# Has every kind of tensor there is: biases of Qwen2, norms of queries and keys of Qwen3.
_SHAPE = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
}


def _plain(name: str) -> str:
    """A pattern of names with N for the layer, whichever way its module writes it."""
    return re.sub(r"\{(i|layer)\}", "N", name)


def _code(names: str | None) -> str:
    return f"`{names}`" if names else "–"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)])


def _cuts() -> dict[str, str]:
    """The dimension that tensor parallelism shares out in shards of an HF folder, by pattern."""
    found = {}
    for model_type in ("llama", "qwen2", "qwen3"):
        config = LlamaConfig(model_type=model_type, attention_bias=model_type == "qwen2", **_SHAPE)  # type: ignore[arg-type]
        for name, shape in weight_shapes(config).items():
            dim = cut_of(name, shape, config, 2, 0).dim
            found[name.replace("layers.0.", "layers.N.")] = "–" if dim is None else str(dim)
    return found


def names() -> str:
    """Every tensor in all formats."""
    paddle: dict[str, TensorRow] = {_plain(row.hf[0]): row for row in TENSOR_ROWS}
    meta = {row.hf: row for row in META_ROWS}
    gguf = {_plain(row.hf): row for row in name_table()}
    rows = []
    for name, cut in _cuts().items():
        weight = re.sub(r"bias$", "weight", name)  # GGUF calls a bias as it calls the weight
        in_paddle, in_meta, in_gguf = paddle.get(name), meta.get(name), gguf[weight]
        gguf_name = _plain(in_gguf.gguf) if weight == name else re.sub(r"weight$", "bias", _plain(in_gguf.gguf))
        axis = "–" if in_paddle is None or in_paddle.tp_axis is None else str(in_paddle.tp_axis)
        rows.append(
            [
                _code(name),
                _code(_plain(in_paddle.paddle).replace("{base}", "llama") if in_paddle else None),
                "yes" if in_paddle and in_paddle.transposed else "–",
                axis,
                _code(in_meta.meta if in_meta else None),
                str(in_meta.cut) if in_meta and in_meta.cut is not None else "–",
                _code(gguf_name),
                "yes" if in_gguf.permuted else "–",
                cut,
            ]
        )
    head = ["HF", "Paddle", "transposed", "Paddle cuts", "Meta", "Meta cuts", "GGUF", "reordered", "HF shards cut"]
    return _table(head, rows)


def fused() -> str:
    """Tensors of Paddle that hold several."""
    rows = [
        [
            _code(_plain(row.paddle).replace("{base}", "llama")),
            ", ".join(_code(_plain(name)) for name in row.hf),
            row.note,
            "–" if row.tp_axis is None else str(row.tp_axis),
        ]
        for row in FUSED_ROWS
    ]
    return _table(["Paddle", "holds", "in this order, along the last axis", "cut"], rows)


def notes() -> str:
    """What the columns of the first table do not say."""
    lines = [
        f"- Paddle, {_code(_plain(row.paddle).replace('{base}', 'llama'))}: {row.note}."
        for row in TENSOR_ROWS
        if row.note
    ]
    return "\n".join([*lines, *(f"- Meta, {_code(row.meta)}: {row.note}." for row in META_ROWS if row.note)])


def gguf_types() -> str:
    """The words of `--gguf_type`."""
    return ", ".join(f"`{kind}`" for kind in KINDS)


SECTIONS = {"names": names, "fused": fused, "notes": notes, "gguf-types": gguf_types}


def fill(page: str) -> str:
    """A page with its tables as the code has them."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}: made by docs/make_formats.py -->", f"<!-- {name}: end -->"
        before, middle, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not middle or not found:
            raise SystemExit(f"{PAGE}: has no place for {name}")
        page = f"{before}{begin}\n{make()}\n{end}{after}"
    return page


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
