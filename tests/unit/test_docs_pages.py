"""Pages that are made from the code are not behind it, and what they say in numbers is so."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from doc_commands import PAGES, ROOT, blocks

import arriero
from arriero.commands.table import VERBS, load_verb
from arriero.config.option import specs_of


def program(name: str) -> ModuleType:
    """A program of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_of_verbs_are_those_of_the_options() -> None:
    made = program("make_verbs").pages()
    behind = [str(path.name) for path, text in made.items() if not path.is_file() or path.read_text() != text]
    assert not behind, "docs/verbs is behind the options: run `make docs`"
    assert {path.name for path in (ROOT / "docs/verbs").iterdir()} == {path.name for path in made}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_with_its_output(verb: str) -> None:
    module = program("make_verbs")
    page = (ROOT / f"docs/verbs/{verb}.md").read_text(encoding="utf-8")
    command = module.EXAMPLES.get(verb) or module.WITHOUT[verb][0]
    assert f"```shell\n{command}\n```" in page, "run `make docs ARGS=--record`"
    if verb in module.EXAMPLES:
        output = blocks(module.recorded(page), ("text",))
        assert output[0].strip()
        assert "internal error" not in output[0]
    for spec in (spec for group in load_verb(verb).options for spec in specs_of(group)):
        assert f"`{spec.name.upper()}`" in page or f"`--{spec.name}`" in page


def test_every_page_is_in_the_menu() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    menu = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = {place for place in program("make_site").sources().values() if place.endswith(".md")}
    assert sorted(menu) == sorted(set(menu))
    assert set(menu) == there


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_extras_are_those_of_the_package(readme: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = re.search(r"^\| (?:Extra|附加项) .*\n\|.*\n((?:\|.*\n)+)", (ROOT / readme).read_text("utf-8"), re.MULTILINE)
    assert table is not None
    assert set(re.findall(r"^\| `(\w+)`", table[1], re.MULTILINE)) == set(extras)


def test_the_site_builds_with_every_link(tmp_path: Path) -> None:
    zensical = Path(sys.executable).with_name("zensical")
    site = program("make_site")
    site.TARGET = tmp_path / "build/docs"
    site.lay_out()
    (tmp_path / "mkdocs.yml").write_bytes((ROOT / "mkdocs.yml").read_bytes())
    result = subprocess.run(
        [zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    home = (tmp_path / "build/site/index.html").read_text(encoding="utf-8")
    assert 'href="tutorial/"' in home
    assert (tmp_path / "build/site/verbs/finetune/index.html").is_file()


def test_links_of_pages_are_moved_with_them() -> None:
    site = program("make_site")
    page = ROOT / "docs/a.md"
    places = {page: "a.md", ROOT / "README.md": "index.md", ROOT / "docs/verbs/merge.md": "verbs/merge.md"}
    places[ROOT / "configs/README.md"] = "configs.md"
    for text, moved in (
        ("[x](../README.md#measured)", "[x](index.md#measured)"),
        ("[x](verbs/merge.md)", "[x](verbs/merge.md)"),
        ("[x](../configs)", "[x](configs.md)"),
        ("[x](../LICENSE)", "x"),
        ("[x](https://a.b/c) [y](#z)", "[x](https://a.b/c) [y](#z)"),
        ("```\n[x](../LICENSE)\n```", "```\n[x](../LICENSE)\n```"),
    ):
        assert site.rewritten(text, page, places) == moved
    with pytest.raises(SystemExit, match=r"links to gone\.md"):
        site.rewritten("[x](gone.md)", page, places)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_use_names_there_are(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8"), ("python",)):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "arriero":
                assert node.attr in arriero.__all__
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("arriero"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_limits_that_security_names_are_those_of_the_code() -> None:
    from arriero.config.serving import ServeOptions
    from arriero.data import chat_template, row_files, template_process, template_worker, tokenizer_files
    from arriero.formats import json_file, module_patterns, pickle_machine, safe_tensors, torch_pickle
    from arriero.formats.gguf import file as gguf
    from arriero.serving import doors, server, strict_json

    serve = {spec.name: spec.default for spec in specs_of(ServeOptions)}
    limits = {
        "other small JSON": [json_file.MAX_CONFIG_BYTES],
        "an index of weight files": [safe_tensors.MAX_INDEX_BYTES],
        "vocabulary file": [tokenizer_files.VOCABULARY_FILE_LIMIT],
        "GGUF": [gguf.MAX_METADATA_ENTRIES, gguf.MAX_TENSORS, gguf.MAX_STRING_BYTES],
        "a pickle": [
            *(torch_pickle.MAX_PICKLE_BYTES, pickle_machine.MAX_OPCODES),
            *(pickle_machine.MAX_CONTAINERS, pickle_machine.MAX_DEPTH),
        ],
        "a chat template": [
            *(chat_template.SOURCE_LIMIT, template_process.OUTPUT_LIMIT),
            *(template_process.CPU_SECONDS, template_worker.MEMORY_LIMIT),
        ],
        "a row": [row_files.MAX_ROW_BYTES],
        "a regular expression": [module_patterns.MAX_PATTERN, module_patterns.MAX_CHOICES],
        "a table of ranks": [module_patterns.MAX_NAMES, module_patterns.MAX_EXPRESSIONS],
        "a request's body": [serve["max_body_bytes"], doors.BODY_SECONDS, strict_json.MAX_DEPTH],
        "thrown away": [doors.DISCARD_BYTES, doors.DISCARD_SECONDS],
        "connections": [serve["max_connections"], server.SPARE_CONNECTIONS],
        "answers that wait": [serve["max_queue_size"], serve["request_timeout"]],
    }
    units = {"KiB": 2**10, "MiB": 2**20}
    table = (ROOT / "docs/security.md").read_text(encoding="utf-8").partition("## Limits")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(limits)
    for (what, told), (name, values) in zip(rows, limits.items(), strict=True):
        assert name in what
        numbers = [
            float(number.replace(",", "")) * units.get(unit, 1) for number, unit in re.findall(r"([\d,]+) ?(\w*)", told)
        ]
        assert numbers == values


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    plain = [
        [re.sub(r"\s+#.*", "", line).strip() for block in blocks(page) for line in block.splitlines()]
        for page in (english, chinese)
    ]
    assert plain[0] == plain[1]  # but for their comments
    for pattern in (r"\n## ", r"\n### ", r"\n\| `\w+` \|", r"\n```"):
        assert len(re.findall(pattern, english)) == len(re.findall(pattern, chinese)), pattern
    links = [sorted(re.findall(r"\]\(([^)]+\.md)[^)]*\)", page)) for page in (english, chinese)]
    assert set(links[0]) - {"README.zh.md"} == set(links[1]) - {"README.md"}
