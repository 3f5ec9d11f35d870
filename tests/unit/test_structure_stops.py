"""A structure that needs a token which the request lets end its answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arriero.data.tokenizer import load_tokenizer
from arriero.engine.background import BackgroundEngine
from arriero.engine.engine import Engine
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling import BROKEN, sampler_of
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.structure import Structure
from arriero.engine.ticket import RefusedError
from arriero.errors import GenerationError
from arriero.models.llama import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_tokenizer import write_byte_tokenizer
from tiny_llama import tiny_config

pytest.importorskip("llguidance")


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """One token a byte, so that a text has one spelling."""
    model = LlamaForCausalLM(tiny_config(vocab_size=256)).eval()
    model.init_weights(0)
    return Engine(TorchRunner(model, max_tokens=512), load_tokenizer(write_byte_tokenizer(tmp_path)))


def params(engine: Engine, pattern: str, stops: str, **more: int) -> SamplingParams:
    ids = tuple(engine.tokenizer.encode(stops))
    return SamplingParams(max_new_tokens=8, stop_token_ids=ids, structure=Structure("regex", pattern), **more)


@pytest.mark.parametrize(
    ("pattern", "stops", "least"), [("b", "b", 0), ("xb", "bq", 0), ("x[ab]c", "ab", 0), ("xb?", "b", 4)]
)
def test_it_is_the_requests_own_fault(engine: Engine, pattern: str, stops: str, least: int) -> None:
    """Neither the model's nor the engine's, and of that request alone."""
    asked = params(engine, pattern, stops, min_new_tokens=least)
    with pytest.raises(GenerationError) as alone:
        engine.generate([[1, 2, 3]], asked)
    needed = sorted(set(pattern) & set(stops))
    shown = ", ".join(str(id) for id in sorted(engine.tokenizer.encode("".join(needed))))
    assert f"cannot follow its regex any further: only stop tokens can come next ({shown})" in str(alone.value)
    assert "stop_token_ids" in str(alone.value)
    background = BackgroundEngine(engine)
    try:
        other = background.submit([4, 5], SamplingParams(max_new_tokens=8))
        with pytest.raises(RefusedError, match="only stop tokens can come next"):
            background.submit([1, 2, 3], asked).result()
        assert len(other.result().token_ids) == 8
    finally:
        background.close()


def test_another_way_is_taken_where_there_is_one(engine: Engine) -> None:
    for pattern, stops, text in (("x[ab]c", "b", "xac"), ("(b|yy)", "b", "yy"), ("a{2,5}", "a", None)):
        if text is None:
            with pytest.raises(GenerationError, match="only stop tokens"):
                engine.generate([[1, 2, 3]], params(engine, pattern, stops))
            continue
        [answer] = engine.generate([[1, 2, 3]], params(engine, pattern, stops))
        assert (answer.text, answer.finish_reason) == (text, "stop")


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_broken_logits_are_the_models_fault_all_the_same(engine: Engine, library: str) -> None:
    torch = pytest.importorskip("torch")
    sampler = sampler_of(library, "cpu")  # type: ignore[arg-type]
    for stops, blame in (("q", False), ("b", True)):
        asked = params(engine, "b", stops)
        assert asked.structure is not None
        row = sampler.start(asked, [1], asked.stop_token_ids, 256, engine.grammars.compile(asked.structure).start())
        scores = torch.full((1, 256), float("nan") if not blame else 1.0)
        assert sampler(scores if library == "torch" else scores.numpy(), [row]) == [BROKEN]
        assert bool(row.dead_end) == blame
