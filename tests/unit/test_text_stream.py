"""Stop strings by the text as a whole: what ends where, whatever the tokens, and which matches count."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.engine import Engine
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.text_stream import TextStream
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from tiny_llama import tiny_config

MARK = "<|mark|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, some pairs of letters, and a special token."""
    folder = tmp_path_factory.mktemp("pairs")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("a", "a"), ("a", "b"), ("b", "a")]
    tokens = {text: i for i, text in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    backend = tokenizers.Tokenizer(models.BPE(tokens, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([MARK, "<|end|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return load_tokenizer(folder)


def by_the_whole_text(pieces: list[str], stops: list[str], least: int) -> tuple[str, bool, int]:
    """The text, whether a stop string ended it, and after how many pieces: the first from `least` on that completes one."""
    for count in range(max(1, least), len(pieces) + 1):
        text, before = "".join(pieces[:count]), len("".join(pieces[: count - 1]))
        starts = [
            at for stop in stops for at in range(len(text)) if text.startswith(stop, at) and at + len(stop) > before
        ]
        if starts:
            return text[: min(starts)], True, count
    return "".join(pieces), False, len(pieces)


def streamed(tokenizer: Tokenizer, ids: list[int], stops: list[str], least: int) -> tuple[str, bool, int]:
    stream = TextStream(tokenizer.stream_decoder(), stops)
    given = ""
    for count, token in enumerate(ids, 1):
        given += stream.push(token, may_stop=count >= least)
        if stream.stopped:
            assert given == stream.text
            return given, True, count
    given += stream.finish(may_stop=len(ids) >= least)
    assert given == stream.text
    return given, stream.stopped, len(ids)


def test_a_stop_string_that_came_too_early_is_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(text) for text in ("a", "a", "c", "a", "a")]
    assert streamed(tokenizer, ids, ["aa", "aab"], 3) == ("aac", True, 5)  # type: ignore[arg-type]


def test_what_stops_is_what_the_whole_text_says(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    words = [tokenizer.token_to_id(text) for text in ("a", "b", "aa", "ab", "ba", "c")]
    text_of = {token: tokenizer.id_to_token(token) for token in words}
    ends = []
    for _ in range(3000):
        ids = draw.choices(words, k=draw.randint(1, 9))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        least = draw.randint(0, 6)
        pieces = [text_of[token] for token in ids]
        wanted = by_the_whole_text(pieces, stops, least)  # type: ignore[arg-type]
        assert streamed(tokenizer, ids, stops, least) == wanted, (pieces, stops, least)  # type: ignore[arg-type]
        ends.append(wanted[1])
    assert 500 < sum(ends) < 2900


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_name_of_a_special_token_stops_where_it_comes(tokenizer: Tokenizer, ignore_eos: bool) -> None:
    """Its text is in no answer, and so could not be found."""
    model = LlamaForCausalLM(tiny_config(vocab_size=tokenizer.vocab_size)).eval()
    model.init_weights(0)
    engine = Engine(TorchRunner(model, max_tokens=256), tokenizer)
    mark, letter = tokenizer.special_tokens[MARK], tokenizer.token_to_id("b")
    assert letter is not None

    def answer(stops: tuple[str, ...], *, least: int = 0, likely: int = mark) -> tuple[list[int], str, str]:
        bias = {letter: 80.0, likely: 100.0}
        params = SamplingParams(
            max_new_tokens=4, min_new_tokens=least, logit_bias=bias, stop_strings=stops, ignore_eos=ignore_eos
        )
        [found] = engine.generate([[1, 2, 3]], params)
        return found.token_ids, found.text, found.finish_reason

    assert answer(()) == ([mark] * 4, "", "length")
    assert answer(("zz", MARK)) == ([mark], "", "stop_string")
    assert answer(("zz", MARK), least=3) == ([letter] * 3 + [mark], "bbb", "stop_string"), "as a stop token"
    assert answer(("bz", MARK), least=2) == ([letter, letter, mark], "bb", "stop_string"), (
        "what was held back is given out"
    )
    assert answer((MARK,), likely=tokenizer.token_to_id("ab") or 0)[1:] == ("abababab", "length")
    spelled = tokenizer.encode(MARK)  # letters, which none of its tokens is
    assert mark not in spelled
    assert streamed(tokenizer, [letter, *spelled, letter], [MARK], 0) == ("b", True, len(spelled) + 1)
