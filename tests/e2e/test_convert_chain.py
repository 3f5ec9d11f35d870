"""Through every format and back: HF -> Paddle -> Meta -> GGUF -> HF gives the model that went in."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main
from arriero.data.tokenizer import load_tokenizer
from arriero.formats.download import resolve_model

Convert = Callable[..., str]

CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Which  planet is\tred?\n"},
    {"role": "assistant", "content": "Mars"},
    {"role": "user", "content": "And <|im_end|> blue?"},
]
# Where the texts lie that are shared with this project; see the README there.
TEXTS = Path(os.environ.get("ARRIERO_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")) / "text"


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Convert:
    """Runs the verb; returns what it said on stderr."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        code = main(["convert", *map(str, arguments)])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.err

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny-random-llama", tmp_path_factory.mktemp("home"))


def through_all(start: Path, folder: Path, convert: Convert) -> Path:
    """The last folder of the chain; each step must have compared every tensor, and the logits, as equal."""
    steps = [start, folder / "paddle", folder / "meta", folder / "model.gguf", folder / "hf"]
    for (source, target), to in zip(itertools.pairwise(steps), ("paddle", "meta", "gguf", "hf"), strict=True):
        said = convert(source, target, "--to", to)
        assert "compared: all " in said
        assert "tensors equal; logits of a prompt differ by at most 0.0e+00" in said
    return steps[-1]


def check_same(start: Path, end: Path, lines: list[str]) -> None:
    before, after = load_file(start / "model.safetensors"), load_file(end / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    ours, theirs = load_tokenizer(start), load_tokenizer(end)
    assert [ours.encode(line) for line in lines] == [theirs.encode(line) for line in lines]
    for prompt in (True, False):
        assert ours.render_chat(CHAT, add_generation_prompt=prompt) == theirs.render_chat(
            CHAT, add_generation_prompt=prompt
        )
    assert ours.chat(CHAT) == theirs.chat(CHAT)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (start, end))
    for key in (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
    ):
        assert old.get(key) == new.get(key), key


def test_a_tiny_model(tiny: Path, tmp_path: Path, convert: Convert) -> None:
    lines = ["To be, or not to be", "  two  blanks ", "naïve 日本語 \U0001f600", "<s>[INST] 12345</s>", ""]
    check_same(tiny, through_all(tiny, tmp_path, convert), lines)


def test_shards_of_every_kind_on_the_way(tiny: Path, tmp_path: Path, convert: Convert) -> None:
    convert(tiny, tmp_path / "a", "--to", "paddle", "--tensor_parallel_degree", 2, "--pipeline_parallel_degree", 2)
    convert(tmp_path / "a", tmp_path / "b", "--tensor_parallel_degree", 4)
    convert(tmp_path / "b", tmp_path / "c", "--to", "meta", "--tensor_parallel_degree", 2)
    convert(tmp_path / "c", tmp_path / "d", "--to", "paddle", "--max_shard_size", "200KB")
    assert len(list((tmp_path / "d").glob("model_state-*.pdparams"))) > 2
    convert(tmp_path / "d", tmp_path / "e", "--max_shard_size", "200KB")
    assert len(list((tmp_path / "e").glob("model-*.safetensors"))) > 2
    convert(tmp_path / "e", tmp_path / "f.gguf")
    convert(tmp_path / "f.gguf", tmp_path / "g", "--tensor_parallel_degree", 2)
    convert(tmp_path / "g", tmp_path / "h")
    check_same(tiny, tmp_path / "h", ["Whither wilt thou lead me?"])


@pytest.mark.peers
@pytest.mark.timeout(1800)
def test_smollm2(smollm2: Path, tmp_path: Path, convert: Convert) -> None:
    texts = sorted(TEXTS.glob("*.txt"))
    assert texts, f"{TEXTS} holds no texts; set ARRIERO_SHARED_DATA to the folder that has text/"
    found = (line for path in texts for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    lines = list(itertools.islice(found, 10_000))
    assert len(lines) == 10_000
    check_same(smollm2, through_all(smollm2, tmp_path, convert), lines)
