"""The Python functions do what the verbs do: the same numbers, the same files. And the model, against transformers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import arriero
from arriero.formats.download import resolve_model

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from byte_models import save_byte_model

TINY = "__internal_testing__/tiny-random-llama"
Call = Callable[..., subprocess.CompletedProcess[str]]
TEXT = "What, shall a mule be laden with the gold of nine great kings, and yet eat thistles?"


@pytest.fixture(scope="module")
def model() -> arriero.Model:
    return arriero.load(TINY, device="cpu")


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 12), ("dev", 5)):
        lines = [json.dumps({"src": f"{name} number {i} is", "tgt": f"mule {i * i}"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def files(folder: Path) -> dict[str, str]:
    """The files of a folder that hold no time and no path, by their SHA-256."""
    suffixes = (".safetensors", ".onnx", ".data", ".bin")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in suffixes
    }


@pytest.fixture(scope="module")
def tuned(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> arriero.Run:
    """A LoRA run on the tiny model."""
    return arriero.finetune(
        TINY,
        dataset_path=rows,
        output_dir=tmp_path_factory.mktemp("runs") / "lora",
        lora=True,
        learning_rate=1e-2,
        max_steps=3,
        device="cpu",
    )


def test_logits_and_perplexity_are_those_of_transformers(model: arriero.Model, reference: Any) -> None:
    ids = model.encode(TEXT)
    with torch.no_grad():
        expected = reference(torch.tensor([ids]))
        loss = float(reference(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    torch.testing.assert_close(model.logits(TEXT), expected.logits[0], rtol=1e-4, atol=1e-4)
    assert model.perplexity(TEXT) == pytest.approx(math.exp(loss), rel=1e-4)
    assert model.perplexity(ids) == model.perplexity(TEXT)
    first, second = ids[:8], ids[8:16]
    mean = (math.log(model.perplexity(first)) + math.log(model.perplexity(second))) / 2
    assert math.log(model.perplexity(ids[:16], window=8)) == pytest.approx(mean, rel=1e-6)
    with pytest.raises(arriero.DataError, match="at least 2"):
        model.perplexity([5])


def test_answers_are_those_of_predict_and_chat(model: arriero.Model, in_process: Call, tmp_path: Path) -> None:
    prompts = ["Who goes there?", "The mule", TEXT]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"src": prompt}) + "\n" for prompt in prompts))
    predict = ("predict", "--model_name_or_path", TINY, "--data_file", "asked.jsonl", "--predict_file", "out.json")
    for flags, options in (
        (("--max_new_tokens", "12"), {"max_new_tokens": 12}),
        (
            ("--max_new_tokens", "12", "--temperature", "0.8", "--seed", "3"),
            {"max_new_tokens": 12, "temperature": 0.8, "seed": 3},
        ),
    ):
        assert in_process(*predict, "--device", "cpu", *flags).returncode == 0
        told = [json.loads(line)["output"] for line in (tmp_path / "out.json").read_text().splitlines()]
        answers = model.generate(prompts, **options)  # type: ignore[call-overload]
        assert [answer.text.strip() for answer in answers] == told
        assert any(told)
        assert [model.generate(prompts[0], **options).text] == [answers[0].text]  # type: ignore[call-overload]
    chat = ("chat", "--model_name_or_path", TINY, "--device", "cpu", "--prompt", TEXT, "--max_new_tokens", "9")
    assert in_process(*chat).stdout == model.chat(TEXT, max_new_tokens=9) + "\n"
    turns = [{"role": "user", "content": TEXT}]
    assert model.generate(turns, max_new_tokens=9).text == model.chat(turns, max_new_tokens=9)
    assert "".join(model.stream(turns, max_new_tokens=9)) == model.chat(turns, max_new_tokens=9)


def test_what_asks_for_draws_is_drawn(model: arriero.Model) -> None:
    """In all the ways to ask, and of `n` answers too."""
    greedy = model.generate(TEXT, max_new_tokens=12).text
    drawn = {model.generate(TEXT, max_new_tokens=12, temperature=1.0, seed=seed).text for seed in range(4)}
    assert len(drawn - {greedy}) >= 3
    for more in ({"temperature": 0.8}, {"top_p": 0.95}, {"n": 1, "best_of": 2}):
        params = [arriero.SamplingParams(max_new_tokens=12, seed=seed, **more) for seed in (0, 4, 8)]  # type: ignore[arg-type]
        assert len({model.generate(TEXT, one).text for one in params}) > 1
    several = model.generate(TEXT, arriero.SamplingParams(max_new_tokens=12, n=3, seed=0))
    assert len({several.text, *(one.text for one in several.alternatives)}) == 3
    assert model.generate(TEXT, arriero.SamplingParams(max_new_tokens=12, seed=3)).text == greedy


def test_greedy_tokens_are_those_of_transformers(model: arriero.Model, reference: Any) -> None:
    ids = model.encode(TEXT)
    expected = reference.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    assert model.generate(TEXT, max_new_tokens=10).token_ids == expected[0, len(ids) :].tolist()
    found = model.generate(ids, arriero.SamplingParams(max_new_tokens=1, logprobs=0)).logprobs[0].logprob
    with torch.no_grad():
        likeliest = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max()
    assert found == pytest.approx(float(likeliest), abs=1e-4)


def test_wrong_prompts(model: arriero.Model) -> None:
    assert model.generate([]) == []
    for wrong in (torch.tensor([1, 2]), torch.tensor([[1, 2]]), [torch.tensor([1])], [1.5], None):
        with pytest.raises(arriero.DataError, match="a prompt is a text, a conversation or a list of token ids"):
            model.generate(wrong)  # type: ignore[call-overload]
    with pytest.raises(arriero.DataError, match="no token"):
        model.logits([])
    for wrong in (None, 3, {"role": "user"}, [], [1, 2], ["a"]):
        with pytest.raises(arriero.DataError, match="chat takes a text or a conversation"):
            model.chat(wrong)  # type: ignore[arg-type]
    for call in (model.logits, model.stream, model.perplexity):
        for several in (["The", "b"], [[1, 2], [3]]):
            with pytest.raises(arriero.DataError, match="one prompt is taken here, not several"):
                call(several)  # type: ignore[operator]
    for data in (b"mule", bytearray(b"mule"), memoryview(b"mule"), [b"mule"]):
        with pytest.raises(arriero.DataError, match=r"not (bytes|bytearray|memoryview); \.decode\(\) makes it a text"):
            model.generate(data)  # type: ignore[arg-type]
    rows, context = model.config.vocab_size, model.config.max_position_embeddings
    for strange in (-1, rows):
        for call in (model.generate, model.logits, model.perplexity):
            with pytest.raises(
                arriero.GenerationError, match=f"holds token id {strange} and the model has ids 0 to {rows - 1}"
            ):
                call([1, strange])
    assert model.logits([1] * context).shape == (context, rows)
    with pytest.raises(
        arriero.GenerationError, match=f"has {context + 1} tokens: more than max_position_embeddings, {context}"
    ):
        model.logits([1] * (context + 1))
    with pytest.raises(arriero.ConfigError, match=f"window is {context + 1}: more than max_position_embeddings"):
        model.perplexity([1] * 5, window=context + 1)
    with pytest.raises(arriero.GenerationError, match="max_new_tokens"):
        model.generate(TEXT, max_new_tokens=10**6)
    with pytest.raises(arriero.ConfigError, match="params and seed are given"):
        model.generate(TEXT, arriero.SamplingParams(), seed=1)
    with pytest.raises(arriero.ConfigError, match="takes no batch_size"):
        model.generate(TEXT, batch_size=2)  # type: ignore[call-overload]


def test_finetune_and_evaluate(tuned: arriero.Run, rows: Path, in_process: Call, tmp_path: Path) -> None:
    flags = ("--dataset_path", str(rows), "--device", "cpu")
    train = ("--lora", "--learning_rate", "1e-2", "--max_steps", "3", "--output_dir", "by_cli")
    assert in_process("finetune", "--model_name_or_path", TINY, *flags, *train).returncode == 0
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tuned.folder, tmp_path / "by_cli"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [
        [json.loads(line).get("loss") for line in (folder / "train_log.jsonl").read_text().splitlines()]
        for folder in (tuned.folder, tmp_path / "by_cli")
    ]
    assert losses[0] == losses[1] != []
    assert tuned.results == json.loads((tuned.folder / "all_results.json").read_text())

    scores = ("--lora_path", "by_cli", "--output_dir", "scores")
    assert in_process("evaluate", "--model_name_or_path", TINY, *flags, *scores).returncode == 0
    told = json.loads((tmp_path / "scores/eval_results.json").read_text())
    assert arriero.evaluate(TINY, adapter=tuned.folder, dataset_path=rows, device="cpu") == told
    loaded = arriero.load(TINY, adapter=tuned.folder, device="cpu")
    assert arriero.evaluate(loaded, dataset_path=rows) == told
    assert told["loss"] < arriero.evaluate(TINY, dataset_path=rows, device="cpu")["loss"]
    for option, value in (("adapter", tuned.folder), ("device", "cpu"), ("tensor_parallel_degree", 2)):
        with pytest.raises(arriero.ConfigError, match=f"{option}: the model is loaded already"):
            arriero.evaluate(loaded, dataset_path=rows, **{option: value})  # type: ignore[arg-type]


def test_a_model_with_broken_weights_has_no_score(rows: Path, in_process: Call, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(resolve_model(TINY), folder)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 5] = math.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    options = ("--dataset_path", str(rows), "--device", "cpu", "--output_dir", "scores")
    result = in_process("evaluate", "--model_name_or_path", str(folder), *options)
    assert result.returncode == 2
    assert f"arriero: {folder}: parameter {name} has values that are infinite or no numbers" in result.stderr
    assert list((tmp_path / "scores").iterdir()) == []
    scored = in_process(
        "finetune",
        "--model_name_or_path",
        str(folder),
        *options[:4],
        "--do_train",
        "no",
        "--do_eval",
        "--output_dir",
        "run",
    )
    assert scored.returncode == 2
    assert f"parameter {name} has values that are infinite or no numbers" in scored.stderr
    # every weight is finite, what is computed from them is not
    loaded = arriero.load(TINY, device="cpu", dtype="float32")
    with torch.no_grad():
        loaded.loaded.model.model.norm.weight.fill_(3e38)
    with pytest.raises(
        arriero.ArrieroError, match=r"the loss of these rows is (nan|inf) though every weight is finite"
    ):
        arriero.evaluate(loaded, dataset_path=rows)


def test_merged_and_saved_models_compute_the_same(tuned: arriero.Run, in_process: Call, tmp_path: Path) -> None:
    loaded = arriero.load(TINY, adapter=tuned.folder, device="cpu", dtype="float32")
    base = arriero.load(TINY, device="cpu").logits(TEXT)
    assert float((loaded.logits(TEXT) - base).abs().max()) > 1e-2
    merged = arriero.merge(TINY, tmp_path / "merged", adapter=tuned.folder, device="cpu")
    merge = ("merge", "--model_name_or_path", TINY, "--lora_path", str(tuned.folder), "--output_path", "by_cli")
    assert in_process(*merge, "--device", "cpu").returncode == 0
    assert files(merged) == files(tmp_path / "by_cli")
    saved = loaded.save(tmp_path / "saved")
    for folder in (merged, saved):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = theirs(torch.tensor([loaded.encode(TEXT)])).logits[0]
        torch.testing.assert_close(loaded.logits(TEXT), logits, rtol=1e-4, atol=1e-4)
    halves = load_file(loaded.save(tmp_path / "half", dtype="bf16") / "model.safetensors")
    assert {tensor.dtype for tensor in halves.values()} == {torch.bfloat16}
    with pytest.raises(arriero.ConfigError, match="not empty"):
        loaded.save(saved)
    with pytest.raises(arriero.FormatError, match="is a model and no bundle: make one with `arriero export"):
        arriero.load_bundle(saved)


def test_prefixes(rows: Path, tmp_path: Path) -> None:
    options: Any = {"max_steps": 2, "learning_rate": 1e-1, "device": "cpu"}
    run = arriero.finetune(TINY, dataset_path=rows, output_dir=tmp_path / "prefix", prefix_tuning=True, **options)
    loaded = arriero.load(TINY, adapter=run.folder, device="cpu")
    assert loaded.module.model.prefix_length == 10
    assert loaded.generate(TEXT, max_new_tokens=3).token_ids
    with pytest.raises(arriero.ConfigError, match="prefix"):
        loaded.save(tmp_path / "saved")
    with pytest.raises(arriero.ConfigError, match="cannot be merged"):
        arriero.merge(TINY, tmp_path / "merged", adapter=run.folder)


def test_files_are_those_of_the_verbs(in_process: Call, tmp_path: Path) -> None:
    verbs: list[tuple[Callable[..., Path], tuple[str, ...], str, dict[str, Any]]] = [
        (arriero.convert, ("convert", TINY, "by_cli/half"), "half", {"dtype": "float16"}),
        (
            arriero.quantize,
            ("quantize", "--model_name_or_path", TINY, "--output_path", "by_cli/int8", "--device", "cpu"),
            "int8",
            {"quant_type": "int8"},
        ),
    ]
    for function, command, name, options in verbs:
        made = function(TINY, tmp_path / "ours" / name, **options)
        flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        result = in_process(*command, *flags)
        assert result.returncode == 0, result.stderr
        assert files(made) == files(tmp_path / "by_cli" / name) != {}
    quantized = arriero.load(tmp_path / "ours/int8", device="cpu")
    assert quantized.generate(TEXT, max_new_tokens=2).token_ids
    with pytest.raises(arriero.ConfigError, match="quantized"):
        quantized.save(tmp_path / "again")
    assert arriero.download(TINY) == resolve_model(TINY)


def test_a_bundle_answers_as_the_model(model: arriero.Model, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder, _ = save_byte_model(tmp_path / "model")
    bundle = arriero.export_model(folder, tmp_path / "bundle", context=128)
    prompts = ["Mules carry", "salt and"]
    checkpoint = arriero.load(folder, device="cpu").generate(prompts, max_new_tokens=8)
    answers = arriero.load_bundle(bundle, batch_size=2, num_threads=1).generate(prompts, max_new_tokens=8)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in checkpoint]
    script = (
        "import sys; sys.modules['torch'] = sys.modules['arriero.models.llama'] = None\n"
        f"import arriero; bundle = arriero.load_bundle({str(bundle)!r}, num_threads=1)\n"
        f"print([answer.token_ids for answer in bundle.generate({prompts!r}, max_new_tokens=8)])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(arriero.__file__).parents[1])}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == [answer.token_ids for answer in checkpoint]
    with pytest.raises(arriero.ConfigError, match=r"use arriero\.load_bundle"):
        arriero.load(bundle)


def test_a_corpus_and_a_model_from_scratch(in_process: Call, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"{TEXT} {i}" for i in range(60)))
    totals = arriero.preprocess(
        model_name_or_path=TINY,
        input_path=tmp_path / "text.txt",
        output_prefix=str(tmp_path / "corpus"),
        append_eos=True,
    )
    assert totals.documents == 60
    common = {"input_dir": [str(tmp_path / "corpus")], "max_seq_length": 32, "max_steps": 2, "device": "cpu"}
    run = arriero.pretrain(TINY, output_dir=tmp_path / "ours", **common)  # type: ignore[arg-type]
    flags = ("--input_dir", "corpus", "--max_seq_length", "32", "--max_steps", "2", "--device", "cpu")
    assert in_process("pretrain", "--model_name_or_path", TINY, "--output_dir", "by_cli", *flags).returncode == 0
    name = "model.safetensors"
    assert files(run.folder)[name] == files(tmp_path / "by_cli")[name]


def test_a_script_ends_without_a_word(tmp_path: Path) -> None:
    """A model of the whole script is closed before Python takes torch apart."""
    script = f"import arriero\nmodel = arriero.load({TINY!r})\nprint(model.generate('Once', max_new_tokens=3).text)\n"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(arriero.__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
