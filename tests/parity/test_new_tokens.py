"""New tokens against transformers: the same ids from `add_tokens`, the rows of `resize_token_embeddings`, and folders that it
loads with equal logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arriero.cli import main
from arriero.config.model import ModelOptions
from arriero.config.vocabulary import VocabularyOptions
from arriero.data.new_tokens import with_new_tokens
from arriero.data.tokenizer import load_tokenizer
from arriero.engine.loading import load
from arriero.errors import ConfigError
from arriero.formats.hf import load_model, save_model
from arriero.formats.tiny_model import tiny_tokenizer_files
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from test_tokenizer_parity import BUILDERS, CHATML, CORPUS, TEXTS

transformers = pytest.importorskip("transformers")

PLAIN, SPECIAL = ["<tool>", "Übermut!"], ["<|user|>", "<|call|>"]
MARKED = [
    "<tool>",
    "a<tool>b <tool> c",
    "<|user|>hi <|call|>\n<tool>\n<|user|> x",
    " Übermut! undÜbermut!",
    *CORPUS[-1:],
]


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if not kind.startswith("sentencepiece")])
def test_ids_are_those_of_add_tokens(kind: str, tmp_path: Path) -> None:
    folder, saved = BUILDERS[kind](tmp_path / "base"), tmp_path / "saved"
    ours = with_new_tokens(load_tokenizer(folder), PLAIN, SPECIAL)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    before = len(theirs)
    for tokens, special in ((PLAIN, False), (SPECIAL, True)):
        made = [transformers.AddedToken(token, special=special, normalized=False) for token in tokens]
        theirs.add_tokens(made, special_tokens=special)
    ours.save(saved)
    written = transformers.AutoTokenizer.from_pretrained(saved)
    again = load_tokenizer(saved)
    assert ours.vocab_size == again.vocab_size == len(written) == len(theirs) == before + 4
    for tokenizer in (ours, again):
        assert [tokenizer.token_to_id(token) for token in PLAIN + SPECIAL] == list(range(before, before + 4))
        assert set(tokenizer.special_tokens) >= set(SPECIAL)
        assert not set(tokenizer.special_tokens) & set(PLAIN)
    for text in MARKED + TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert written.encode(text, add_special_tokens=False) == expected, repr(text)
        assert ours.encode(text, allow_special=True) == again.encode(text, allow_special=True) == expected, repr(text)
        for skip in (False, True):
            said = theirs.decode(expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert again.decode(expected, skip_special_tokens=skip) == said
            assert written.decode(expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False) == said
    # the name of a control token in a row's text stays text, that of an ordinary one does not
    ids = ours.encode("<|call|> <tool>")
    assert before not in ours.encode("<|call|>")
    assert ours.token_to_id("<|call|>") not in ids
    assert before in ids


@pytest.mark.parametrize("kind", ["smollm", "llama2-class"])
def test_known_tokens_add_nothing(kind: str, tmp_path: Path) -> None:
    base = load_tokenizer(BUILDERS[kind](tmp_path / "base"))
    known, special = str(base.id_to_token(400)), next(iter(base.special_tokens))
    assert with_new_tokens(base, [known, special], [special]) is base
    marked = with_new_tokens(base, [], [known])  # a word of the vocabulary becomes a control token, with its id
    marked.save(tmp_path / "saved")
    assert marked.vocab_size == base.vocab_size
    assert marked.special_tokens[known] == base.token_to_id(known)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").convert_tokens_to_ids(
        known
    ) == marked.token_to_id(known)


def test_a_template_may_write_new_control_tokens(tmp_path: Path) -> None:
    folder = BUILDERS["llama3"](tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = with_new_tokens(load_tokenizer(folder), [], ["<|im_start|>", "<|im_end|>"])
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
    assert ours.chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.token_to_id("<|im_end|>") in ours.stop_token_ids


def test_sentencepiece_is_refused_with_a_way_out(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BUILDERS["sentencepiece"](tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"let transformers write a tokenizer\.json"):
        with_new_tokens(tokenizer, ["<tool>"])


def model_folder(folder: Path, *, tied: bool, rows: int = 2048, dtype: torch.dtype = torch.float32) -> LlamaConfig:
    config = LlamaConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": rows,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "tie_word_embeddings": tied,
            "initializer_range": 0.1,
        }
    )
    model = LlamaForCausalLM(config)
    model.init_weights(3)
    save_model(model.to(dtype), config, folder, extra_files=tiny_tokenizer_files())
    return config


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_those_of_transformers(tied: bool, tmp_path: Path) -> None:
    """Its new rows scatter about the mean, with the covariance of the old ones times 1e-9."""
    model_folder(tmp_path / "base", tied=tied)
    vocabulary = VocabularyOptions(add_tokens=["<tool>", "<call>"], pad_vocab_to_multiple_of=64)
    ours = load(ModelOptions(model_name_or_path=str(tmp_path / "base"), device="cpu"), vocabulary=vocabulary).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(2050, pad_to_multiple_of=64, mean_resizing=True)
    assert ours.config.vocab_size == theirs.config.vocab_size == 2112
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor[:2048], expected[name][:2048])
        if tensor.shape[0] == 2112:
            scatter = float(tensor[:2048].std()) * 1e-9**0.5
            assert float((tensor[2048:] - expected[name][2048:]).abs().max()) < 6 * scatter
            assert torch.allclose(tensor[2048], tensor[:2048].double().mean(0).float(), rtol=1e-6, atol=1e-9)
            assert torch.equal(tensor[2048:], tensor[2048].expand(64, -1))


def train(base: Path, output: Path, *flags: str) -> int:
    data = output.parent / "rows.jsonl"
    rows = [{"src": f"what <tool> follows {i} ?", "tgt": f"{i + 1} <tool>"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return main(
        [
            *("finetune", "--model_name_or_path", str(base), "--dataset_path", str(data), "--output_dir", str(output)),
            *(
                "--save_strategy",
                "steps",
                "--save_steps",
                "2",
                "--per_device_train_batch_size",
                "2",
                "--max_steps",
                "4",
            ),
            *(
                "--learning_rate",
                "1e-2",
                "--disable_tqdm",
                "--report_to",
                "none",
                "--device",
                "cpu",
                "--src_length",
                "32",
            ),
            *("--tgt_length", "16", *flags),
        ]
    )


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_run_writes_loads_in_transformers(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = tmp_path / "base", tmp_path / "run"
    model_folder(base, tied=tied, rows=2051)
    tokens = ("--add_tokens", "<tool>,the", "--add_special_tokens", "<|user|>", "--pad_vocab_to_multiple_of", "8")
    assert train(base, output, *tokens) == 0
    said = capsys.readouterr().out
    assert "new tokens: <tool> (2048), <|user|> (2049); known already: the" in said
    assert "vocabulary: 2,051 rows, now 2,056; the new ones are the mean of the first 2,048" in said
    ids = torch.arange(2030, 2056)[None]
    for folder in (output, output / "checkpoint-2"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.config.vocab_size == 2056
        assert tokenizer.encode("<tool>", add_special_tokens=False) == [2048]
        assert 2049 in {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        with torch.no_grad():
            difference = load_model(folder)(ids) - theirs(ids).logits
        assert float(difference.abs().max()) < 1e-5
    before, after = (
        load_file(path / "model.safetensors")["model.embed_tokens.weight"] for path in (output / "checkpoint-2", output)
    )
    assert not torch.equal(before[2048], after[2048])  # the token is in the rows: it is learned
    again = tmp_path / "again"
    assert train(base, again, *tokens, "--resume_from_checkpoint", str(output / "checkpoint-2")) == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (output, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert train(base, again, "--resume_from_checkpoint", str(output / "checkpoint-2")) == 2
    assert "its vocabulary has 2056 rows, that of this run 2051: give the same tokens" in capsys.readouterr().err
    # from the result, the same options add nothing
    capsys.readouterr()
    assert train(output, tmp_path / "more", *tokens) == 0
    said = capsys.readouterr().out
    assert "new tokens: none; known already: <tool>, the, <|user|>" in said
    assert "vocabulary:" not in said


def test_a_larger_tokenizer_needs_resize_vocab(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, larger = tmp_path / "base", tmp_path / "tokenizer"
    model_folder(base, tied=False)
    with_new_tokens(load_tokenizer(base), ["<tool>"]).save(larger)
    assert train(base, tmp_path / "refused", "--tokenizer_name_or_path", str(larger)) == 2
    assert "--resize_vocab" in capsys.readouterr().err
    assert train(base, tmp_path / "run", "--tokenizer_name_or_path", str(larger), "--resize_vocab") == 0
    config: dict[str, Any] = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["vocab_size"] == 2049
    assert load_tokenizer(tmp_path / "run").token_to_id("<tool>") == 2048
