"""docs/formats.md says what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from arriero.formats.detection import ADAPTERS, MODELS
from arriero.formats.gguf.names import name_table
from arriero.formats.meta.names import ROWS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "formats.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("make_formats", DOCS / "make_formats.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fill(PAGE) == PAGE, "docs/formats.md is behind the code: run `make docs`"


def test_every_tensor_has_its_line() -> None:
    table = PAGE[PAGE.index("<!-- names: made") : PAGE.index("<!-- names: end")]
    rows = {
        cells[0]: cells for line in table.splitlines()[3:] if (cells := [c.strip() for c in line.strip("|").split("|")])
    }
    # from the papers and programs of each side, not from our tables
    q = rows["`model.layers.N.self_attn.q_proj.weight`"]
    assert q[1:] == [
        *("`llama.layers.N.self_attn.q_proj.weight`", "yes", "1", "`layers.N.attention.wq.weight`", "0"),
        *("`blk.N.attn_q.weight`", "yes", "0"),
    ]
    down = rows["`model.layers.N.mlp.down_proj.weight`"]
    assert down[1:] == [
        *("`llama.layers.N.mlp.down_proj.weight`", "yes", "0", "`layers.N.feed_forward.w2.weight`", "1"),
        *("`blk.N.ffn_down.weight`", "–", "1"),
    ]
    norm = rows["`model.layers.N.self_attn.q_norm.weight`"]
    assert norm[1:] == ["–", "–", "–", "–", "–", "`blk.N.attn_q_norm.weight`", "–", "–"]
    assert len(rows) == 17


def test_meta_and_llama_cpp_reorder_the_same_rows() -> None:
    in_gguf = {row.hf.replace("{layer}", "N"): row.permuted for row in name_table()}
    assert {row.hf: row.permuted for row in ROWS} == {row.hf: in_gguf[row.hf] for row in ROWS}


def test_every_kind_is_mentioned() -> None:
    table = PAGE[PAGE.index("## Which way in") : PAGE.index("Tokenizer, chat template")]
    assert (
        len(re.findall(r"^\| (?!Format|---)", table, re.MULTILINE)) == len(MODELS) + len(ADAPTERS) - 1
    )  # one line of PEFT
