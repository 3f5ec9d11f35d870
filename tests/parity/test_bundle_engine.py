"""The engine over ONNX bundles: what it answers is what it answers over torch, and what transformers and PEFT answer."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from arriero.bundles.running import bundle_engine
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.data.tokenizer import load_tokenizer
from arriero.engine.drafts import PromptLookup, Speculation
from arriero.engine.engine import Engine
from arriero.engine.export_source import export_source, prefix_array, stored_bits
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.structure import Structure
from arriero.engine.ticket import RefusedError
from arriero.engine.work import Work
from arriero.errors import ConfigError, FormatError, GenerationError
from arriero.export.block_weights import BlockFormat, quantize
from arriero.export.bundle import Bundle
from arriero.export.kinds import open_runner
from arriero.export.onnx_export import OnnxOptions, export_onnx
from arriero.export.onnx_session import OnnxSession
from arriero.export.prefix_file import PREFIX, read_prefix
from arriero.formats.hf import load_model
from arriero.quantization.qat import QatSettings
from arriero.serving.api_errors import api_error

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_models import VOCABULARY, likeliest, save_byte_model

NEW = 40
LENGTH = 6  # of the prefix


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return save_byte_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def bundle(model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_onnx(model[0], tmp_path_factory.mktemp("onnx") / "bundle")


def torch_engine(folder: Path, **options: Any) -> Engine:
    runner = TorchRunner(load_model(folder, torch.float32), max_tokens=8192)
    return Engine(runner, load_tokenizer(folder), **options)


def prompts(count: int, longest: int = 100) -> list[list[int]]:
    drawn = random.Random(1)
    return [drawn.choices(range(VOCABULARY), k=drawn.randint(1, longest)) for _ in range(count)]


GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_greedy_answers_are_those_of_transformers(model: tuple[Path, Any], bundle: Bundle, slots: int) -> None:
    given = prompts(50)
    engine = bundle_engine(bundle, slots, threads=1)
    answers = engine.generate(given, GREEDY)
    wanted = torch_engine(model[0]).generate(given, GREEDY)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in wanted]
    for prompt, answer in list(zip(given, answers, strict=True))[::10]:
        assert answer.token_ids == likeliest(model[1], prompt, NEW)
    assert not engine.unfinished


def test_prompts_in_pieces_and_in_company(bundle: Bundle) -> None:
    """A step of few tokens cuts prompts into pieces, beside answers that go on."""
    given = prompts(12)
    wanted = bundle_engine(bundle, 1, threads=1).generate(given, GREEDY)
    runner = open_runner(bundle, slots=5, threads=1)
    engine = Engine(runner, load_tokenizer(bundle.folder), max_running=5, max_step_tokens=9)
    assert [a.token_ids for a in engine.generate(given, GREEDY)] == [a.token_ids for a in wanted]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.3},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"min_p": 0.05, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"logit_bias": {65: 4.0}, "min_new_tokens": 10},
    ],
    ids=str,
)
def test_a_seed_draws_the_same_over_every_kind(
    model: tuple[Path, Any], bundle: Bundle, settings: dict[str, Any]
) -> None:
    params = [SamplingParams(max_new_tokens=20, do_sample=True, seed=seed, **settings) for seed in range(12)]
    given = prompts(12, longest=30)
    drawn = bundle_engine(bundle, 4, threads=1).generate(given, params)
    wanted = torch_engine(model[0]).generate(given, params)
    assert [answer.token_ids for answer in drawn] == [answer.token_ids for answer in wanted]
    assert len({tuple(answer.token_ids) for answer in drawn}) == 12


def test_likelihoods_of_prompts_and_answers(model: tuple[Path, Any], bundle: Bundle) -> None:
    params = SamplingParams(max_new_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    given = prompts(4, longest=60)
    for prompt, answer in zip(given, bundle_engine(bundle, 2, threads=1).generate(given, params), strict=True):
        whole = [*prompt, *answer.token_ids]
        with torch.no_grad():
            wanted = model[1](torch.tensor([whole])).logits[0].log_softmax(-1)
        found = [*answer.prompt_logprobs[1:], *answer.logprobs]
        for at, one in enumerate(found):
            assert one is not None
            assert one.logprob == pytest.approx(float(wanted[at, whole[at + 1]]), abs=1e-4)
            assert [value for _, value in one.top] == pytest.approx(
                wanted[at].sort(descending=True).values[: len(one.top)].tolist(), abs=1e-4
            )


def test_structures_several_answers_and_guesses(model: tuple[Path, Any], bundle: Bundle) -> None:
    structured = SamplingParams(max_new_tokens=30, structure=Structure("regex", "(ab|ba){3}[0-9]{2,4}"))
    several = SamplingParams(max_new_tokens=8, do_sample=True, seed=3, n=3, best_of=5)
    engine, other = bundle_engine(bundle, 4, threads=1), torch_engine(model[0])
    for params in (structured, several):
        found, wanted = (one.generate(prompts(3), params) for one in (engine, other))
        assert [(a.text, [b.text for b in a.alternatives]) for a in found] == [
            (a.text, [b.text for b in a.alternatives]) for a in wanted
        ]
    guessing = Engine(
        open_runner(bundle, slots=2, threads=1),
        load_tokenizer(bundle.folder),
        speculation=Speculation(PromptLookup(longest=1, shortest=1), tokens=3, window=10**9),
    )
    given = [prompt * 3 for prompt in prompts(6, longest=20)]
    plain, guessed = engine.generate(given, GREEDY), guessing.generate(given, GREEDY)
    assert [a.token_ids for a in guessed] == [a.token_ids for a in plain]
    assert guessing.speculation is not None
    assert guessing.speculation.counters.accepted > 0


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each computation, all its rows together."""
    found: list[int] = []
    original = OnnxSession.run

    def watched(self: OnnxSession, first: int, ids: Any, starts: Any, counts: Any, logits_at: Any) -> Any:
        found.append(int(counts.sum()))
        return original(self, first, ids, starts, counts, logits_at)

    monkeypatch.setattr(OnnxSession, "run", watched)
    return found


@pytest.mark.parametrize("slots", [1, 4])
def test_what_was_computed_is_not_computed_again(
    model: tuple[Path, Any], bundle: Bundle, computed: list[int], slots: int
) -> None:
    engine, shared = bundle_engine(bundle, slots, threads=1), prompts(1)[0] + [7] * 40
    params = replace(GREEDY, max_new_tokens=4)
    [first] = engine.generate([shared], params)
    assert sum(computed) == len(shared) + 3
    assert first.cached_tokens == 0
    computed.clear()
    second = [*shared, *first.token_ids, *range(20)]  # a conversation goes on
    [answer] = engine.generate([second], params)
    assert sum(computed) == 1 + 20 + 3  # the answer's last token was never computed
    assert answer.cached_tokens == len(second) - 1 - 20
    assert answer.token_ids == likeliest(model[1], second, 4)
    computed.clear()
    others = [[*shared, *range(at, at + 20)] for at in range(100, 106)]
    answers = engine.generate(others, params)
    assert [a.token_ids for a in answers] == [likeliest(model[1], ids, 4) for ids in others]
    assert [a.cached_tokens for a in answers] == [len(shared)] * 6
    assert sum(computed) == 6 * (20 + 3)
    computed.clear()
    several = SamplingParams(max_new_tokens=3, do_sample=True, seed=1, n=5, ignore_eos=True)
    engine.generate([[*shared[::-1]]], several)
    assert sum(computed) <= len(shared) + 4 + 5 * 2


def test_nothing_is_taken_from_those_with_another_salt(bundle: Bundle, computed: list[int]) -> None:
    engine, params = bundle_engine(bundle, 3, threads=1), replace(GREEDY, max_new_tokens=1)
    prompt = prompts(1)[0] + [3] * 20
    for salt, wanted in ((b"a", len(prompt)), (b"b", len(prompt)), (b"a", 1), (b"", len(prompt)), (b"b", 1)):
        computed.clear()
        engine.submit(prompt, params, salt=salt)
        while engine.unfinished:
            engine.step()
        assert sum(computed) == wanted, salt


def test_a_step_that_failed_leaves_nothing(
    bundle: Bundle, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, params = bundle_engine(bundle, 2, threads=1), replace(GREEDY, max_new_tokens=1)
    prompt = prompts(1)[0] + [3] * 20
    [wanted] = engine.generate([prompt], params)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxSession, "run", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate([[9] * 12], params)
    computed.clear()
    assert engine.generate([prompt], params)[0].token_ids == wanted.token_ids
    assert sum(computed) == len(prompt)


def broken(*_: Any) -> Any:
    raise RuntimeError("out of memory")


def test_slots_that_memory_has_no_room_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = 2 * 2 * 2 * 16 * 160 * 4  # layers, keys and values, heads, their size, the context, bytes of a number
    monkeypatch.setattr("arriero.engine.machine_memory.free_memory", lambda: 2 * (3 * one + 5))
    engine = bundle_engine(bundle, 8, threads=1)
    assert engine.runner.num_blocks == 3
    assert "3 prompts are answered at once and not 8" in capsys.readouterr().err
    answers = engine.generate(prompts(8), GREEDY)
    assert [a.token_ids for a in answers] == [
        a.token_ids for a in bundle_engine(bundle, 1).generate(prompts(8), GREEDY)
    ]
    monkeypatch.setattr("arriero.engine.machine_memory.free_memory", lambda: 1)
    assert bundle_engine(bundle, 8, threads=1).runner.num_blocks == 1


def test_what_does_not_fit_is_refused(bundle: Bundle) -> None:
    engine = bundle_engine(bundle, 1, threads=1)
    with pytest.raises(GenerationError, match="together more than the bundle's context, 160;") as told:
        engine.submit([1] * 150, replace(GREEDY, max_new_tokens=11))
    assert api_error(RefusedError(str(told.value))).code == "context_length_exceeded"
    with pytest.raises(GenerationError, match="there is no adapter 'mine': this engine has none at all"):
        engine.submit([1], GREEDY, adapter="mine")
    assert not engine.unfinished


def of(folder: Path, **adapter: Any) -> tuple[ModelOptions, AdapterPathOptions]:
    return ModelOptions(model_name_or_path=str(folder), device="cpu"), AdapterPathOptions(**adapter)


def randomise(model: Any, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def test_a_lora_adapter_is_merged(tmp_path: Path) -> None:
    folder, theirs = save_byte_model(tmp_path / "hf", tie_word_embeddings=True, attention_bias=True)
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    )
    randomise(adapted, 0.1)
    adapted.save_pretrained(tmp_path / "lora")
    with export_source(*of(folder, lora_path=str(tmp_path / "lora"))) as source:
        bundle = export_onnx(source, tmp_path / "onnx")
    answers = bundle_engine(bundle, 3, threads=1).generate(prompts(6), GREEDY)
    wanted = [likeliest(adapted.eval(), prompt, NEW) for prompt in prompts(6)]
    assert [answer.token_ids for answer in answers] == wanted
    assert wanted[0] != likeliest(transformers.AutoModelForCausalLM.from_pretrained(folder), prompts(6)[0], NEW)


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 9}], ids=["llama", "window"])
def test_a_prefix_comes_before_every_sequence(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder, theirs = save_byte_model(tmp_path / "hf", **changes)
    prefixed = peft.get_peft_model(theirs, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    randomise(prefixed, 0.7)
    prefixed.save_pretrained(tmp_path / "prefix")
    prefix = prefix_array(str(tmp_path / "prefix"), folder, "base")
    bundle = export_onnx(folder, tmp_path / "onnx", prefix=prefix)
    assert bundle.manifest.prefix_length == LENGTH
    engine = bundle_engine(bundle, 3, threads=1)
    assert engine.runner.context == 160 - LENGTH
    given = prompts(9, longest=6 if changes else 100)  # a window slides past the prefix
    answers = engine.generate(given, GREEDY)
    prefixed.eval()
    for prompt, answer in zip(given, answers, strict=True):
        whole = torch.tensor([[*prompt, *answer.token_ids]])
        with torch.no_grad():
            logits = prefixed(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, len(prompt) - 1 : -1]
        assert answer.token_ids == logits.argmax(-1).tolist()
    plain = bundle_engine(export_onnx(folder, tmp_path / "plain"), 3, threads=1).generate(given, GREEDY)
    assert [answer.token_ids for answer in plain] != [answer.token_ids for answer in answers]
    with pytest.raises(GenerationError, match="less a prefix of 6"):
        engine.submit([1] * 150, replace(GREEDY, max_new_tokens=5))


@pytest.mark.parametrize("kind", ["W4", "A8W8"])
def test_what_was_trained_with_rounding_keeps_its_integers(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = save_byte_model(tmp_path / "hf")
    settings = QatSettings(kind, 16 if kind == "W4" else -1)
    (folder / "qat.json").write_text(settings.to_json())
    if settings.rounds_inputs:
        layers = [name for name, _ in load_model(folder).named_modules() if name.endswith("_proj")]
        save_file({f"{name}.input_range": torch.tensor([8.0]) for name in layers}, folder / "qat.safetensors")
    bits = settings.weights.bits
    with export_source(*of(folder)) as source:
        assert stored_bits(source) == bits
        options = OnnxOptions(weights=f"int{bits}", block_size=16, accuracy_level=0)
        bundle = export_onnx(source, tmp_path / "onnx", options)
    assert ("inputs of layers are not rounded" in capsys.readouterr().err) == settings.rounds_inputs
    reference = load_model(folder, torch.float32)  # without the rounding of inputs
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(torch.from_numpy(quantize(parameter, BlockFormat(8, 16)).dequantize()))
            elif name.endswith("_proj.weight"):
                groups = parameter.view(len(parameter), -1, 16 if bits == 4 else parameter.shape[1])
                scales = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
                parameter.copy_(((groups / scales).round() * scales).view_as(parameter))
    ids = prompts(1)[0]
    found = bundle_engine(bundle, 1, threads=1).runner.run([Work(ids, 0, [0], len(ids))])
    torch.testing.assert_close(torch.as_tensor(found), reference(torch.tensor([ids]))[0], rtol=0, atol=2e-4)


def test_an_adapter_trained_with_rounding_keeps_its_base(tmp_path: Path) -> None:
    folder, theirs = save_byte_model(tmp_path / "hf")
    other, _ = save_byte_model(tmp_path / "other")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    randomise(adapted, 0.1)
    adapted.save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)}))
    (tmp_path / "lora" / "qat.json").write_text(QatSettings("W4", 16).to_json())
    with export_source(*of(folder, lora_path=str(tmp_path / "lora"))) as source:
        assert stored_bits(source) == 4
        stored = load_model(source, torch.float32)
    merged = adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight.detach()
    groups = merged.view(len(merged), -1, 16)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    found = stored.model.layers[0].self_attn.q_proj.dequantized()
    torch.testing.assert_close(found, ((groups / scales).round() * scales).view_as(merged), rtol=0, atol=1e-5)
    with (
        pytest.raises(ConfigError, match=r"was trained with rounding on .*hf: give that as --model_path"),
        export_source(*of(other, lora_path=str(tmp_path / "lora"))),
    ):
        pass


def test_a_prefix_that_fills_the_context_is_refused(tmp_path: Path, model: tuple[Path, Any]) -> None:
    prefix = np.zeros((2, 2, 2, 20, 16), np.float32)
    with pytest.raises(ConfigError, match="a prefix of 20 fills a context of 20"):
        export_onnx(model[0], tmp_path / "onnx", OnnxOptions(context=20), prefix=prefix)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00garbage", None])
def test_a_broken_prefix_file(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        np.save(tmp_path / PREFIX, np.zeros((1, 2, 2, 6, 16), np.float32))
    else:
        (tmp_path / PREFIX).write_bytes(content)
    with pytest.raises(FormatError, match=r"prefix\.npy: .*export the model again"):
        read_prefix(tmp_path, (2, 2, 2, 6, 16))


def test_a_pickle_in_the_place_of_a_prefix_is_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / PREFIX, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match="cannot be read as an array"):
        read_prefix(tmp_path, (1,))
