"""Callbacks that watch a run: gradient-norm spikes, profiles, text samples; and their options."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.config.checkpoint import CheckpointOptions
from arriero.config.data import DataOptions
from arriero.config.logging import LoggingOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.parser import parse
from arriero.data.order import StepOrder
from arriero.data.sft import IGNORE, Example
from arriero.data.steps import FinetuningSteps
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.errors import ConfigError, TrainingError
from arriero.formats.download import resolve_model
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training.callbacks.anomalies import Anomalies
from arriero.training.callbacks.checkpointing import Checkpointing
from arriero.training.callbacks.evaluation import Evaluation
from arriero.training.callbacks.profiling import Profiling
from arriero.training.callbacks.records import drop_later, read_log
from arriero.training.callbacks.text_samples import TextSamples, read_prompts
from arriero.training.callbacks.trackers import Tracking
from arriero.training.checkpoint import list_checkpoints, random_state
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, StepRecord, Trainer
from arriero.training.weights import FullWeights

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model("__internal_testing__/tiny-random-llama"))


def make_trainer(folder: Path, tokenizer: Tokenizer, *callbacks: Callback, steps: int = 6) -> Trainer:
    """A model of the tokenizer's vocabulary with dropout-free layers, and a run of `steps`."""
    shape = {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig.from_dict(shape))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(8)
    rows = []
    for i in range(11):
        ids = torch.randint(3, 200, (5 + i % 7,), generator=generator).tolist()
        rows.append(Example(ids, [IGNORE, *ids[2:], IGNORE]))
    return Trainer(
        model=model,
        data=FinetuningSteps(rows, StepOrder(len(rows), 2, 1, 1)),
        optimizer=Optimizer(model),
        schedule=Schedule("constant", 5e-3, 0.0, 0, steps),
        precision=Precision(torch.float32, "O1", CPU),
        weights=FullWeights(model, folder),
        total_steps=steps,
        run_folder=folder,
        device=CPU,
        callbacks=list(callbacks),
    )


def samples(trainer: Trainer, tokenizer: Tokenizer, prompts: list[str], **options: Any) -> TextSamples:
    options = {"max_new_tokens": 12, **options}
    return TextSamples(trainer.model, tokenizer, prompts, "steps", 2, **options)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


class RandomNumbers(Callback):
    """Draws from every generator after each step, as a dropout or an augmentation would."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, float, float]] = []

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        assert trainer.model.training
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_samples_change_nothing_in_the_run(temperature: float, tmp_path: Path, tokenizer: Tokenizer) -> None:
    runs: list[tuple[dict[str, Tensor], Any]] = []
    for folder in (tmp_path / "with", tmp_path / "without"):
        folder.mkdir()
        trainer = make_trainer(folder, tokenizer)
        numbers = RandomNumbers()
        if folder.name == "with":
            trainer.callbacks.append(samples(trainer, tokenizer, ["Hello", "One two"], temperature=temperature))
        trainer.callbacks.append(numbers)
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        trainer.train()
        state = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        moments = {name: part.tensor for name, part in trainer.optimizer.parts().items()}
        runs.append(({**state, **moments, **random_state()}, numbers.drawn))
    (one, drawn), (other, drawn_without) = runs
    assert drawn == drawn_without
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    rows = rows_of(tmp_path / "with")
    assert [(row["step"], row["prompt"]) for row in rows] == [(s, p) for s in (2, 4, 6) for p in ("Hello", "One two")]


def test_samples_are_greedy_continuations(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a loop over the whole sequence, without cache."""
    trainer = make_trainer(tmp_path, tokenizer, steps=2)
    trainer.callbacks.append(samples(trainer, tokenizer, ["The sun"], max_new_tokens=7))
    trainer.train()
    (row,) = rows_of(tmp_path)
    ids = tokenizer.encode("The sun", add_special_tokens=True)
    expected: list[int] = []
    trainer.model.eval()
    with torch.no_grad():
        for _ in range(7):
            expected.append(int(trainer.model(torch.tensor([ids + expected]))[0, -1].argmax()))
            if expected[-1] in tokenizer.stop_token_ids:
                break
    stopped = expected[-1] in tokenizer.stop_token_ids
    assert row["text"] == tokenizer.decode(expected[:-1] if stopped else expected)
    assert (row["tokens"], row["finish_reason"]) == (len(expected), "stop" if stopped else "length")
    assert "sample at step 2 | The sun ▸ " in capsys.readouterr().out


def test_a_resumed_run_has_no_sample_twice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = make_trainer(tmp_path, tokenizer, Checkpointing("steps", 3))
    first.callbacks.append(samples(first, tokenizer, ["Hello"]))
    first.train()
    straight = rows_of(tmp_path)
    second = make_trainer(tmp_path, tokenizer)
    second.callbacks.append(samples(second, tokenizer, ["Hello"]))
    second.resume(tmp_path / "checkpoint-3")
    second.train()
    assert rows_of(tmp_path) == straight
    assert [row["step"] for row in straight] == [2, 4, 6]


def test_records_with_any_text_survive_a_resume(tmp_path: Path) -> None:
    """Unicode has line ends that JSON does not escape, and a kill may cut the last line."""
    path = tmp_path / "samples.jsonl"
    records = [{"step": step, "text": f"a\u2028b\u0085c\x1dd\r\n{step}"} for step in range(1, 5)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes("\n".join([*lines, '{"step": 5, "te']).encode())
    assert read_log(path) == records
    drop_later(path, 2)
    assert read_log(path) == records[:2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize("last", [b'{"step": 5, "text": "\xc3', b'{"text": ' + b"[" * 200_000], ids=["cut", "deep"])
def test_a_last_line_that_cannot_be_read_is_left_out(last: bytes, tmp_path: Path) -> None:
    """A kill cuts inside a character too; and no depth of nesting ends a run."""
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"step": 1, "text": "\u00df"}\n'.encode() + last)
    assert read_log(path) == [{"step": 1, "text": "\u00df"}]
    drop_later(path, 1)
    assert path.read_bytes() == '{"step": 1, "text": "\u00df"}\n'.encode()


def test_prompts_from_texts_and_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffOnce upon a time\n\n  Wer reitet so spät \n".encode())
    found = read_prompts(["To be, or not to be", str(file)])
    assert found == ["To be, or not to be", "Once upon a time", "  Wer reitet so spät "]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "many.txt").write_text("a\n" * 65)
    (tmp_path / "large.txt").write_text("a" * 1_000_001)
    for name, message in (
        ("missing.txt", "cannot be read"),
        ("latin.txt", "UTF-8"),
        ("blank.txt", "no prompt"),
        ("many.txt", "65 prompts"),
        ("large.txt", "larger than"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            read_prompts([str(tmp_path / name)])
        assert "\n" not in str(error.value)


def test_a_prompt_without_room_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    trainer = make_trainer(tmp_path, tokenizer)
    for prompt, tokens in (("word " * 60, 10), ("Hello", 64)):
        with pytest.raises(ConfigError, match="--sample_tokens"):
            samples(trainer, tokenizer, [prompt], max_new_tokens=tokens)


def record(step: int, norm: float, **changes: Any) -> StepRecord:
    fields = {
        "loss": 2.0,
        "learning_rate": 1e-3,
        "tokens": 9,
        "label_tokens": 8,
        "rows": 1,
        "flops": 1.0,
        "seconds": 0.1,
    }
    return StepRecord(step=step, grad_norm=norm, **{**fields, **changes})


# What `Anomalies` uses of a trainer after the beginning.
TOLD: Any = SimpleNamespace(data=SimpleNamespace(describe=lambda step: f"rows of step {step}"))


def spikes(watch: Anomalies, norms: list[float], capsys: pytest.CaptureFixture[str]) -> list[str]:
    for step, norm in enumerate(norms, 1):
        watch.on_step_end(TOLD, record(step, norm))
    return capsys.readouterr().out.splitlines()


def test_a_spike_is_told_with_step_and_factor(capsys: pytest.CaptureFixture[str]) -> None:
    usual = [1.0, 2.0, 3.0] * 10
    (line,) = spikes(Anomalies(10.0), [*usual, 25.0, *usual], capsys)
    assert line.startswith("warning: step 31: gradient norm 25 is 12.5 times the median of the last 30 (2)")
    assert line.endswith("loss 2.0000; rows of step 30")
    assert spikes(Anomalies(10.0), [*usual, 19.9], capsys) == []
    assert spikes(Anomalies(0.0), [*usual, 1e9], capsys) == []


def test_spikes_do_not_hide_each_other_and_the_beginning_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(spikes(Anomalies(5.0), [1.0] * 20 + [100.0] * 5, capsys)) == 5
    assert spikes(Anomalies(5.0), [100.0, 50.0, *[1.0] * 17, 90.0], capsys) == []
    # the norms settle ten times higher: warned of until half of the last hundred are of the new level
    assert len(spikes(Anomalies(5.0), [1.0] * 100 + [10.0] * 100, capsys)) == 50


def test_an_overflow_or_an_empty_step_is_no_spike() -> None:
    watch = Anomalies(5.0, stop=True)
    for step in range(1, 31):
        watch.on_step_end(TOLD, record(step, 1.0))
    watch.on_step_end(TOLD, record(31, float("inf"), skipped=True))
    watch.on_step_end(TOLD, record(32, 0.0, label_tokens=0))
    assert list(watch.norms) == [1.0] * 30


def test_stop_on_spike_ends_the_run_before_the_checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "train_log.jsonl").write_text("".join(f'{{"step": 0, "grad_norm": {1e-6 * i}}}\n' for i in range(30)))
    trainer = make_trainer(tmp_path, tokenizer, Anomalies(10.0, stop=True), Checkpointing("steps", 1))
    with pytest.raises(TrainingError, match=r"step 1: gradient norm .* times the median.*--stop_on_spike") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(("first", "last", "done"), [(1, 1, 6), (2, 3, 6), (5, 9, 6), (4, 6, 5)])
def test_a_profile_holds_just_these_steps(
    first: int, last: int, done: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    class Stop(Callback):
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            trainer.should_stop = record.step == done

    make_trainer(tmp_path, tokenizer, Profiling(first, last, memory=True), Stop()).train()
    end = min(last, done)
    trace = json.loads((tmp_path / "profile" / f"trace-steps-{first}-{end}.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    # one fused AdamW call for the matrices and one for the norms in each step
    assert sum(name == "aten::_fused_adamw_" for name in names) == 2 * (end - first + 1)
    assert "aten::mm" in names
    table = (tmp_path / "profile" / f"operators-steps-{first}-{end}.txt").read_text()
    assert "Self CPU" in table
    assert "CPU Mem" in table
    assert "aten::_fused_adamw_" in table


def test_a_profile_that_cannot_be_made_is_a_warning(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, tokenizer, Profiling(7, 8))
    trainer.train()
    assert (
        "nothing is profiled: --profile_steps begins at step 7, this run does steps 1 to 6" in capsys.readouterr().out
    )
    (tmp_path / "profile").write_text("a file stands in the way")
    trainer = make_trainer(tmp_path, tokenizer, Profiling(2, 2))
    assert trainer.train().step == 6
    assert "warning" in capsys.readouterr().out


def test_a_failing_tracker_does_not_end_a_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Broken:
        name = "Broken"

        def start(self, step: int) -> None:
            raise OSError("no network")

        def log(self, metrics: dict[str, float], step: int) -> None:
            raise AssertionError("must not be called any more")

        def finish(self) -> None:
            raise AssertionError("must not be called any more")

    evaluation = Evaluation(lambda: {"loss": 1.0}, "steps", 2)
    assert make_trainer(tmp_path, tokenizer, Tracking(Broken()), evaluation).train().step == 6


def test_profile_range() -> None:
    assert LoggingOptions().profile_range() is None
    assert LoggingOptions(profile_steps="5-8").profile_range() == (5, 8)
    assert LoggingOptions(profile_steps=" 7 ").profile_range() == (7, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile_steps": "8-5"}, "--profile_steps is '8-5'"),
        ({"profile_steps": "0"}, "--profile_steps is '0'"),
        ({"profile_steps": "a-b"}, "--profile_steps is 'a-b'"),
        ({"profile_steps": "1-1000"}, "at most 100"),
        ({"grad_norm_spike": 0.5}, "--grad_norm_spike is 0.5"),
        ({"grad_norm_spike": -1.0}, "--grad_norm_spike is -1"),
        ({"sample_tokens": 0}, "--sample_tokens is 0"),
        ({"sample_temperature": -0.1}, "--sample_temperature"),
        ({"sample_prompts": ["a", " "]}, "--sample_prompts holds an empty text"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LoggingOptions(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["--sample_tokens", "5"], "--sample_tokens has no effect without --sample_prompts"),
        (["--sample_temperature", "0.5"], "--sample_temperature has no effect without --sample_prompts"),
        (["--sample_prompts", "Hello, you"], "--sample_prompts has no effect with --evaluation_strategy no"),
        (["--do_eval", "--sample_prompts", "Hello, you"], None),
        (["--profile_memory"], "--profile_memory has no effect without --profile_steps"),
        (["--stop_on_spike", "--grad_norm_spike", "0"], "--stop_on_spike has no effect without --grad_norm_spike"),
        (["--project", "mules"], "--project has no effect with --report_to auto"),
        (["--project", "mules", "--report_to", "wandb"], None),
        (["--optim", "adamw_8bit", "--muon_momentum", "0.9"], "--muon_momentum has no effect with --optim adamw_8bit"),
        (["--wsd_decay_ratio", "0.3"], "--wsd_decay_ratio has no effect with --lr_scheduler_type linear"),
        (["--lr_scheduler_type", "wsd", "--lr_power", "2"], "--lr_power has no effect with --lr_scheduler_type wsd"),
        (
            ["--lr_scheduler_type", "inverse_sqrt", "--decay_steps", "9"],
            "--decay_steps has no effect with --lr_scheduler_type inverse_sqrt",
        ),
        (["--lr_scheduler_type", "wsd", "--wsd_decay_ratio", "0.3", "--decay_steps", "9"], None),
    ],
)
def test_an_option_without_effect_is_told(
    words: list[str], warning: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = (DataOptions, OptimizationOptions, CheckpointOptions, LoggingOptions)
    parsed = parse(groups, ["--output_dir", "run", *words], "arriero test")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (warning is not None)
    if warning is not None:
        assert warning in lines[0]
    if "--sample_prompts" in words:
        (logging,) = (group for group in parsed if isinstance(group, LoggingOptions))
        assert logging.sample_prompts == ["Hello, you"], "a comma is part of the text"
