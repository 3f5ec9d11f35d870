"""The training loop and its checkpoints: accumulation, exact resume, broken numbers, broken disks."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.data.batch import pack, packed_batches
from arriero.data.order import StepOrder
from arriero.data.sft import IGNORE, Example
from arriero.data.steps import FinetuningSteps
from arriero.errors import ArrieroError, FormatError, TrainingError
from arriero.formats import safe_tensors
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.training import checkpoint as checkpoint_module
from arriero.training.callbacks.checkpointing import Checkpointing
from arriero.training.callbacks.evaluation import Evaluation
from arriero.training.callbacks.records import JsonLines, read_log
from arriero.training.checkpoint import TrainState, list_checkpoints, take_snapshot, verify, write_checkpoint
from arriero.training.evaluation import evaluate_loss
from arriero.training.execution import DirectExecution, Layers, build_execution
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.run_folder import newest_checkpoint
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, StepRecord, Trainer
from arriero.training.weights import AdapterWeights, FullWeights

CPU = torch.device("cpu")
VOCAB = 53


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    shape = {
        "model_type": "llama",
        "vocab_size": VOCAB,
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
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig.from_dict(shape))
    model.init_weights(seed)
    return model.to(dtype)


def make_rows(count: int = 11, seed: int = 8) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (5 + i % 7,), generator=generator).tolist()
        rows.append(Example(ids, [IGNORE, *ids[2:], IGNORE]))
    return rows


class Records(Callback):
    """Keeps the records, and stops the run after `stop` steps."""

    def __init__(self, stop: int | None = None) -> None:
        self.records: list[StepRecord] = []
        self.stop = stop

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.records.append(record)
        if record.step == self.stop:
            trainer.should_stop = True


def make_trainer(
    folder: Path,
    *callbacks: Callback,
    rows: list[Example] | None = None,
    micro: int = 2,
    accumulation: int = 2,
    steps: int = 10,
    lora: LoRAConfig | None = None,
    dtype: torch.dtype = torch.float32,
    level: str = "O1",
    rate: float = 5e-3,
    loss_scale: float = 2.0**15,
    seed: int = 1,
    model: LlamaForCausalLM | None = None,
    share: bool = False,
) -> Trainer:
    precision = Precision(dtype, level, CPU, loss_scale)
    model = model or make_model(dtype=precision.parameter_dtype)
    torch.manual_seed(seed)
    weights: FullWeights | AdapterWeights = FullWeights(model, folder)
    if lora is not None:
        apply_lora(model, lora)
        weights = AdapterWeights(model, lora, "base")
    examples = rows or make_rows()
    return Trainer(
        model=model,
        data=FinetuningSteps(examples, StepOrder(len(examples), micro, accumulation, seed), share_prefixes=share),
        optimizer=Optimizer(model, weight_decay=0.01),
        schedule=Schedule("cosine", rate, 0.0, 2, steps),
        precision=precision,
        weights=weights,
        total_steps=steps,
        run_folder=folder,
        device=CPU,
        callbacks=list(callbacks),
    )


def optimizer_state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: part.tensor for name, part in trainer.optimizer.parts().items()}


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    named = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return named | {f"optimizer {name}": t.clone() for name, t in optimizer_state(trainer).items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def test_four_by_one_equals_one_by_four(tmp_path: Path) -> None:
    runs = []
    for micro, accumulation in ((1, 4), (4, 1), (2, 2)):
        records = Records()
        trainer = make_trainer(tmp_path, records, micro=micro, accumulation=accumulation, steps=6)
        trainer.train()
        runs.append((records.records, dict(trainer.model.named_parameters())))
    (first, weights), *others = runs
    for records, parameters in others:
        for one, other in zip(first, records, strict=True):
            assert one.loss == pytest.approx(other.loss, abs=1e-6)
            assert (one.tokens, one.label_tokens, one.rows) == (other.tokens, other.label_tokens, other.rows)
        for name, parameter in parameters.items():
            assert float((parameter - weights[name]).detach().abs().max()) <= 1e-6, name


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_shared_beginnings_change_nothing_but_rounding(lora: LoRAConfig | None, tmp_path: Path) -> None:
    """Questions on the same passages: their beginning is computed once, losses and weights are those of separate rows."""
    generator = torch.Generator().manual_seed(2)
    passages = [torch.randint(3, VOCAB, (20 + 3 * i,), generator=generator).tolist() for i in range(2)]
    rows = []
    for i in range(9):
        own = torch.randint(3, VOCAB, (4 + i % 3,), generator=generator).tolist()
        ids = [*passages[i % 2], *own]
        asked = len(passages[i % 2]) + 2
        rows.append(Example(ids, [IGNORE] * (asked - 1) + ids[asked:] + [IGNORE]))
    runs = []
    for share in (False, True):
        records = Records()
        trainer = make_trainer(tmp_path, records, rows=rows, micro=4, steps=6, share=share, lora=lora)
        trainer.train()
        runs.append((records.records, trainer))
    assert [r.loss for r in runs[0][0]] == pytest.approx([r.loss for r in runs[1][0]], abs=1e-5)
    assert [r.label_tokens for r in runs[0][0]] == [r.label_tokens for r in runs[1][0]]
    other = dict(runs[1][1].model.named_parameters())
    for name, parameter in runs[0][1].model.named_parameters():
        assert float((parameter - other[name]).detach().abs().max()) <= 2e-5, name


def test_loss_is_the_mean_over_the_labels_of_the_whole_step(tmp_path: Path) -> None:
    """Micro-batches with very different numbers of labels: a mean of means would be wrong."""
    rows = [Example([5, 6, 7], [IGNORE, 7, IGNORE]), Example(list(range(3, 30)), [*range(4, 30), IGNORE])]
    trainer = make_trainer(tmp_path, rows=rows, micro=1, accumulation=2, steps=1)
    with torch.no_grad():
        total = 0.0
        for row in rows:
            log_p = trainer.model(torch.tensor([row.input_ids])).log_softmax(-1)[0]
            total -= sum(float(log_p[i, label]) for i, label in enumerate(row.labels) if label != IGNORE)
    assert trainer.step().loss == pytest.approx(total / 27, abs=1e-5)


RESUMED: dict[str, dict[str, Any]] = {
    "full, accumulation, mid-epoch": {},
    "one micro-batch": {"micro": 3, "accumulation": 1},
    "LoRA with dropout": {"lora": LoRAConfig(rank=2, alpha=4.0, dropout=0.3)},
    "bf16 O2": {"dtype": torch.bfloat16, "level": "O2"},
    "bf16 O1": {"dtype": torch.bfloat16, "level": "O1"},
    "fp16 O2": {"dtype": torch.float16, "level": "O2", "loss_scale": 1024.0},
    "shared beginnings": {"share": True, "lora": LoRAConfig(rank=2, dropout=0.2)},
    "LoRA on bf16": {"dtype": torch.bfloat16, "level": "O2", "lora": LoRAConfig(rank=2, dropout=0.1)},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_ten_steps_are_five_and_five_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    straight_records, second_records = Records(), Records()
    straight = make_trainer(tmp_path / "a", straight_records, **options)
    straight.train()
    # 11 rows in steps of 4 (or 3): step 5 is inside an epoch
    assert 5 % straight.data.steps_per_epoch != 0
    first = make_trainer(tmp_path / "b", Records(stop=5), Checkpointing("steps", 5), **options)
    first.train()
    assert first.state.step == 5
    torch.manual_seed(999)  # another process would start anywhere
    second = make_trainer(tmp_path / "b", second_records, **{**options, "seed": 1})
    torch.manual_seed(999)
    second.resume(tmp_path / "b" / "checkpoint-5")
    state = second.train()
    assert_same_bits(tensors_of(straight), tensors_of(second))
    assert [r.loss for r in straight_records.records[5:]] == [r.loss for r in second_records.records]
    assert (state.step, state.tokens, state.label_tokens) == (10, straight.state.tokens, straight.state.label_tokens)


def test_resume_before_the_first_real_step(tmp_path: Path) -> None:
    """Every step so far overflowed in fp16, so that the optimizer has no state yet."""
    options: dict[str, Any] = {"dtype": torch.float16, "level": "O2", "loss_scale": 2.0**40}
    first = make_trainer(tmp_path, Records(stop=1), Checkpointing("steps", 1), **options)
    first.train()
    second = make_trainer(tmp_path, **options)
    second.resume(tmp_path / "checkpoint-1")
    assert second.precision.scaler.get_scale() == 2.0**39
    assert second.state.step == 1


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    make_trainer(tmp_path, Records(stop=1), Checkpointing("steps", 1)).train()
    for changes in ({"rows": make_rows(9)}, {"micro": 1}, {"seed": 2}):
        with pytest.raises(TrainingError, match=r"same data, batch.*, seed"):
            make_trainer(tmp_path, **changes).resume(tmp_path / "checkpoint-1")
    with pytest.raises(FormatError, match="master is missing"):
        make_trainer(tmp_path, dtype=torch.bfloat16, level="O2").resume(tmp_path / "checkpoint-1")


def test_the_log_of_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    class Log(Callback):
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            trainer.log({"step": record.step, "loss": record.loss})

    make_trainer(tmp_path, Log(), JsonLines(), Checkpointing("steps", 2), Records(stop=5)).train()
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process was killed while it wrote
    second = make_trainer(tmp_path, Log(), JsonLines())
    second.resume(tmp_path / "checkpoint-4")
    second.train()
    assert [record["step"] for record in read_log(tmp_path / "train_log.jsonl")] == list(range(1, 11))


BROKEN = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_parameter_is_named(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.get_parameter(name).view(-1)[::3] = float("nan")
    with pytest.raises(TrainingError, match=f"step 1: loss nan.*parameter {name.replace('.', '[.]')}") as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_a_broken_gradient_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    name = "model.layers.1.self_attn.v_proj.weight"
    trainer.model.get_parameter(name).register_hook(lambda grad: grad * float("nan"))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(TrainingError, match=f"the gradient of {name.replace('.', '[.]')}"):
        trainer.train()
    for n, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[n]), "a bad step changes nothing"


def test_exploding_rate_is_an_error_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lower --learning_rate"):
        make_trainer(tmp_path, rate=1e30).train()


def test_a_step_without_labels_changes_nothing(tmp_path: Path) -> None:
    rows = [Example([5, 6, 7], [IGNORE] * 3)] * 4
    trainer = make_trainer(tmp_path, rows=rows, steps=1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    record = trainer.step()
    assert (record.loss, record.label_tokens, record.tokens) == (0.0, 0, 12)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_fp16_overflow_is_skipped_and_the_scale_halves(tmp_path: Path) -> None:
    records = Records()
    trainer = make_trainer(tmp_path, records, dtype=torch.float16, level="O2", loss_scale=2.0**34, steps=40)
    trainer.train()
    skipped = [record.skipped for record in records.records]
    assert skipped[0]
    assert not any(skipped[20:]), "the scale comes down and then stays"
    assert trainer.precision.scaler.get_scale() == 2.0 ** (34 - sum(skipped))
    assert all(step == 40 - sum(skipped) for step in _adamw_steps(trainer))
    assert records.records[-1].loss < records.records[0].loss


def _adamw_steps(trainer: Trainer) -> list[float]:
    return [float(value) for name, value in optimizer_state(trainer).items() if name.endswith(".step")]


def test_half_precision_masters_keep_small_updates(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dtype=torch.bfloat16, level="O2", rate=1e-5, steps=4)
    trainer.train()
    changed = 0
    for name, parameter in trainer.model.named_parameters():
        master = trainer.optimizer.masters[name]
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, master.bfloat16()), name
        changed += int((master != parameter.float()).any())
    assert changed, "some updates must be below the rounding of bf16, and kept"


@pytest.mark.parametrize("granularity", ["full", "core_attn"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, dropout=0.2)])
def test_recompute_gives_the_same_gradients(granularity: str, lora: LoRAConfig | None) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = make_model()
        if lora:
            apply_lora(model, lora)
        names = list(model.state_dict())
        if recompute:
            apply_activation_checkpointing(model.model.layers, granularity)
        assert list(model.state_dict()) == names
        model.train()
        torch.manual_seed(7)
        DirectExecution(Layers(model, Precision(torch.float32, "O1", CPU), CPU)).batch_loss(
            pack(make_rows(4))
        ).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=0, atol=1e-6)


def scripted(values: list[float], name: str = "loss") -> Callable[[], dict[str, float]]:
    left = iter(values)
    return lambda: {name: next(left)}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1, [2, 5]), (2, [2, 4, 5]), (3, [2, 3, 4, 5]), (4, [2, 3, 4, 5]), (None, [1, 2, 3, 4, 5])],
)
def test_best_and_newest_checkpoints_stay_and_the_best_is_restored(
    keep: int | None, kept: list[int], tmp_path: Path
) -> None:
    after: dict[int, Tensor] = {}

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
            after[record.step] = trainer.model.lm_head.weight.detach().clone()

    trainer = make_trainer(
        tmp_path,
        Watch(),
        Evaluation(scripted([3.0, 1.0, 2.0, 1.5, 1.2]), "steps", 1),
        Checkpointing("steps", 1, keep=keep, metric="loss", load_best=True),
        steps=5,
    )
    trainer.train()
    assert [checkpoint_module.checkpoint_step(p) for p in list_checkpoints(tmp_path)] == kept
    assert trainer.state.best_checkpoint == "checkpoint-2"
    assert torch.equal(trainer.model.lm_head.weight, after[2])
    assert not torch.equal(after[2], after[5])


def test_the_best_among_the_newest_takes_no_extra_place(tmp_path: Path) -> None:
    make_trainer(
        tmp_path,
        Evaluation(scripted([0.1, 0.2, 0.9, 0.5], "accuracy"), "steps", 1),
        Checkpointing("steps", 1, keep=2, metric="accuracy", greater_is_better=True, load_best=True),
        steps=4,
    ).train()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, Evaluation(scripted([1.0]), "steps", 1), Checkpointing("steps", 1, metric="rouge7"), steps=1
    )
    with pytest.raises(TrainingError, match=r"'rouge7' is not computed here: one of loss"):
        trainer.train()


def fail_on_tensors(monkeypatch: pytest.MonkeyPatch, error: Exception, where: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    if where == "optimizer":
        monkeypatch.setattr(checkpoint_module, "save_file", full)
    elif where == "weights":
        monkeypatch.setattr("os.pwrite", full)
    else:
        monkeypatch.setattr("os.fsync", full)


@pytest.mark.parametrize("where", ["optimizer", "weights", "sync"])
def test_a_full_disk_leaves_the_earlier_checkpoints(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, Checkpointing("steps", 1, keep=1), Records(stop=2))
    trainer.train()
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoint-2").rglob("*") if p.is_file()}
    trainer.should_stop = False
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        fail_on_tensors(patch, full, where)
        with pytest.raises(TrainingError, match="checkpoint-3: the checkpoint could not be written") as error:
            trainer.train()
    message = str(error.value)
    assert "\n" not in message
    assert "No space left" in message or "disk is full" in message
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"], "nothing half-written stays, hidden or not"
    assert {p: p.read_bytes() for p in before} == before
    verify(tmp_path / "checkpoint-2")
    second = make_trainer(tmp_path)
    second.resume(tmp_path / "checkpoint-2")
    assert second.state.step == 2


def test_a_partial_folder_of_a_killed_process_is_no_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Checkpointing("steps", 1), Records(stop=1))
    trainer.train()
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-2.partial")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    trainer.state.step = 2
    write_checkpoint(tmp_path, take_snapshot(trainer.weights, trainer.optimizer.parts(), trainer.state, copy=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_any_changed_file_of_a_checkpoint_is_named(lora: LoRAConfig | None, tmp_path: Path) -> None:
    make_trainer(tmp_path, Checkpointing("steps", 1), Records(stop=2), lora=lora).train()
    newest = tmp_path / "checkpoint-2"
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert len(files) >= 6
    for path in files:
        original = path.read_bytes()
        flipped = bytearray(original)
        flipped[len(flipped) // 2] ^= 1
        for content in (bytes(flipped), original[:-7], b""):
            path.write_bytes(content)
            trainer = make_trainer(tmp_path, lora=lora)
            with pytest.raises(FormatError) as error:
                trainer.resume(newest)
            if path.name != "manifest.json":
                assert str(path) in str(error.value)
            assert trainer.state.step == 0
        path.unlink()
        with pytest.raises(FormatError, match=path.name.replace(".", "[.]")):
            verify(newest)
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
        path.write_bytes(original)
    assert newest_checkpoint(tmp_path) == newest
    with pytest.raises(ArrieroError):
        make_trainer(tmp_path, lora=LoRAConfig(rank=3) if lora else None, model=make_model(num_hidden_layers=1)).resume(
            newest
        )


def test_a_checkpoint_holds_data_only(tmp_path: Path) -> None:
    make_trainer(tmp_path, Checkpointing("steps", 1), Records(stop=1)).train()
    suffixes = {p.suffix for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors"}
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert TrainState(**state).step == 1
    held = dict(safe_tensors.read_tensors(tmp_path / "checkpoint-1" / "model.safetensors"))
    assert set(held) == {name for name, _ in make_model().named_parameters()}


def test_evaluation_equals_a_loop_over_single_rows() -> None:
    model, rows = make_model(), make_rows(7)
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            log_p = model(torch.tensor([row.input_ids])).log_softmax(-1)[0]
            for i, label in enumerate(row.labels):
                if label != IGNORE:
                    total -= float(log_p[i, label])
                    right += int(log_p[i].argmax()) == label
                    count += 1
    model.train()
    for size in (1, 3, 100):
        execution = build_execution(model, Precision(torch.float32, "O1", CPU), CPU)
        metrics = evaluate_loss(execution, packed_batches(rows, size, share_prefixes=True))
        assert metrics["loss"] == pytest.approx(total / count, abs=1e-5)
        assert metrics["ppl"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(right / count)
        assert model.training
