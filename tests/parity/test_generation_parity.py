"""Greedy generation against transformers' generate, on random small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.generation import Generator
from arriero.engine.sampling import SamplingParams
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

transformers = pytest.importorskip("transformers")

VOCABULARY = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def pair(**changes: Any) -> tuple[LlamaForCausalLM, Any]:
    """The same random weights in ours and in transformers' model."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,  # large: distinct logits, and answers that do not repeat one token
        "tie_word_embeddings": False,
        "model_type": "llama",
    } | changes
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings), attn_implementation="eager"
    ).eval()
    ours = LlamaForCausalLM(LlamaConfig.from_dict(theirs.config.to_dict()))
    ours.init_weights(0)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


PROMPTS = [[1, 2, 3], [7], list(range(20, 90)), [5, 5, 5, 9, 200], list(range(20, 80)) + [3]]


def expected(theirs: Any, prompt: list[int], **settings: Any) -> list[int]:
    output = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, pad_token_id=0, **settings
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 500.0, "tie_word_embeddings": True},
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "qwen2"},
    ],
    ids=["llama", "tied", "mistral-window", "qwen2"],
)
def test_greedy(changes: dict[str, Any], tokenizer: Tokenizer) -> None:
    ours, theirs = pair(**changes)
    answers = Generator(ours, tokenizer, max_batch_size=3).generate(PROMPTS, SamplingParams(max_new_tokens=24))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.token_ids == expected(theirs, prompt, max_new_tokens=24)
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens == len(prompt)
        assert answer.text == tokenizer.decode(answer.token_ids)


def test_end_of_text_penalty_and_least_length(tokenizer: Tokenizer) -> None:
    ours, theirs = pair()
    free = [expected(theirs, prompt, max_new_tokens=30) for prompt in PROMPTS]
    # Tokens that do come early in these answers.
    eos = [free[0][4], free[1][3], free[2][6]]
    generator = Generator(ours, tokenizer, max_batch_size=2)
    seen = set()
    for penalty in (1.0, 1.3):
        for least in (0, 9):
            params = SamplingParams(
                max_new_tokens=30, min_new_tokens=least, repetition_penalty=penalty, stop_token_ids=tuple(eos)
            )
            answers = generator.generate(PROMPTS, params)
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                wanted = expected(
                    theirs,
                    prompt,
                    max_new_tokens=30,
                    min_new_tokens=least or None,
                    repetition_penalty=penalty,
                    eos_token_id=eos,
                )
                assert answer.token_ids == wanted
                assert answer.finish_reason == ("stop" if wanted[-1] in eos else "length")
                assert len(answer.token_ids) > least
                ended = answer.finish_reason == "stop"
                assert answer.text == tokenizer.decode(wanted[:-1] if ended else wanted)
                seen.add((answer.finish_reason, least))
    assert ("stop", 0) in seen


def test_smollm2(smollm2: Path) -> None:
    """The real model."""
    folder = smollm2
    from arriero.formats.hf import load_model

    tokenizer = load_tokenizer(folder)
    ours = load_model(folder, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["What is the capital of France?", "Write one sentence about 🐎 in Spanish."]
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    for prompt, answer in zip(
        prompts, Generator(ours, tokenizer).generate(prompts, SamplingParams(max_new_tokens=12)), strict=True
    ):
        assert answer.token_ids == expected(theirs, prompt, max_new_tokens=12)


@pytest.mark.peers
@pytest.mark.timeout(900)
def test_batched_is_alone_on_the_real_model(smollm2: Path) -> None:
    """fp32, token for token, prompts of very different lengths, eight of them running at a time."""
    from arriero.formats.hf import load_model

    tokenizer = load_tokenizer(smollm2)
    model = load_model(smollm2, dtype=torch.float32)
    texts = Path(__file__).read_text(encoding="utf-8").split("\n\n")
    prompts = [tokenizer.chat([{"role": "user", "content": f"Explain:\n{text[:700]}"}]) for text in texts]
    assert len(prompts) >= 16
    params = SamplingParams(max_new_tokens=24)
    together = Generator(model, tokenizer, max_batch_size=8).generate(prompts, params)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = Generator(model, tokenizer, max_batch_size=1).generate([prompt], params)
        assert answer.token_ids == alone.token_ids
