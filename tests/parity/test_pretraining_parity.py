"""Pre-training against transformers: the samples from the files by the written rules, the loop and the losses."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arriero.cli import main
from arriero.commands import pretrain as verb
from arriero.config.parser import parse
from arriero.data.steps import PretrainingSteps
from arriero.engine.loading import LoadedModel
from arriero.parallel.processes import Processes
from arriero.training.pretraining import PretrainOptions, find_tokenizer, load_data, load_or_make
from arriero.training.run import build_trainer
from arriero.training.trainer import Callback, StepRecord, Trainer
from arriero.training.weights import FullWeights

transformers = pytest.importorskip("transformers")

TESTS = Path(__file__).parents[1]
SEED = 42


class Records(Callback):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.records.append(record)


def prepared(folder: Path, *arguments: str) -> tuple[LoadedModel, Trainer, list[StepRecord]]:
    """The model and the trainer that this command line makes."""
    groups = parse(verb.OPTIONS, [*arguments, "--output_dir", str(folder)], "arriero pretrain")
    names = ("model", "corpus", "optimization", "precision", "parallel", "checkpoint", "logging")
    options = PretrainOptions(**dict(zip(names, groups[: len(names)], strict=True)))  # what follows is not the run's
    loaded, optim = load_or_make(options, find_tokenizer(options.model), Processes()), options.optimization
    steps = PretrainingSteps(
        load_data(options, loaded.tokenizer, 1)["train"],
        optim.per_device_train_batch_size,
        optim.gradient_accumulation_steps,
        options.corpus.reset_attention_mask,
    )
    records = Records()
    weights = FullWeights(loaded.model, loaded.folder)
    trainer = build_trainer(options, loaded.model, steps, weights, folder, loaded.device, [records], Processes())
    return loaded, trainer, records.records


def written_samples(prefix: Path, share: float, length: int) -> list[tuple[Tensor, Tensor]]:
    """One pass over the first `share` of the documents of an npy/npz pair, as the seed's rules say.

    The documents follow one another as in the file, sample k is the tokens from k * length to (k + 1) * length, both
    included, and the samples are shuffled by `RandomState(seed)`.

    Returns:
        For each sample in its order the ids, (length + 1,), and the number of the document of each of them.
    """
    ids = np.load(f"{prefix}_ids.npy")
    lens = np.load(f"{prefix}_idx.npz")["lens"]
    lens = lens[: round(share * len(lens))]
    stream = torch.tensor(ids[: lens.sum()].astype(np.int64))
    documents = torch.tensor(np.repeat(np.arange(len(lens)), lens))
    order = np.arange((len(stream) - 1) // length, dtype=np.uint32)
    np.random.RandomState(SEED).shuffle(order)
    spans = [slice(k * length, (k + 1) * length + 1) for k in order.tolist()]
    return [(stream[span], documents[span]) for span in spans]


def test_continued_training_starts_at_the_loss_of_transformers(smollm2: Path, tmp_path: Path) -> None:
    """Real text, tokenised by our preprocess, and the real model: the first step's loss."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((TESTS / "unit").glob("test_[a-c]*.py"))]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prefix = tmp_path / "corpus" / "tests"
    made = ("preprocess", "--model_name_or_path", str(smollm2), "--input_path", str(tmp_path / "tests.jsonl"))
    assert main([*made, "--output_prefix", str(prefix), "--append_eos"]) == 0
    _, trainer, _ = prepared(
        tmp_path / "run",
        *("--model_name_or_path", str(smollm2), "--continue_training", "--input_dir", str(prefix), "--split", "1,0,0"),
        *("--max_seq_length", "96", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"),
        *("--max_steps", "3"),
    )
    record = trainer.step()
    samples = written_samples(prefix, 1.0, 96)
    ids = torch.stack([sample for sample, _ in samples[:2]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.decode(ids[0, 8:16]) in "".join(texts)
    with torch.no_grad():
        logits = theirs(ids[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())
    assert record.loss == pytest.approx(float(expected), abs=1e-5)
    assert 1.0 < record.loss < 6.0, "a trained model on English and Python"


STEPS, MICRO, ACCUMULATION, LENGTH = 20, 2, 2, 24
PEAK, FLOOR, WARMUP, DECAY_STEPS, WEIGHT_DECAY, CLIP = 2e-3, 4e-4, 4, 16, 0.1, 2.1


def write_corpus(prefix: Path, vocabulary: int) -> None:
    """PaddleNLP's pair from its written format: 120 documents of 1 to 60 tokens, each of few different ones."""
    random = np.random.default_rng(9)
    lens = random.integers(1, 60, 120).astype(np.int32)
    parts = [random.choice(random.integers(3, vocabulary, 5), size) for size in lens.tolist()]
    prefix.parent.mkdir(parents=True)
    np.save(f"{prefix}_ids.npy", np.concatenate(parts).astype(np.uint16))
    np.savez(f"{prefix}_idx.npz", lens=lens, docs=np.arange(len(lens) + 1, dtype=np.int64))


def learning_rate(step: int) -> float:
    """PaddleNLP's cosine with warm-up and floor, its formula as it stands there."""
    if step < WARMUP:
        return PEAK * step / WARMUP
    if step > DECAY_STEPS:
        return FLOOR
    ratio = (step - WARMUP) / (DECAY_STEPS - WARMUP)
    return FLOOR + 0.5 * (math.cos(math.pi * ratio) + 1.0) * (PEAK - FLOOR)


def summed_loss(model: Any, ids: Tensor, documents: Tensor, apart: bool) -> Tensor:
    """The cross-entropy of one sample, summed; documents in a forward pass of their own if `apart`."""
    cuts = [0, LENGTH]
    if apart:
        cuts = [0, *(i for i in range(1, LENGTH) if documents[i] != documents[i - 1]), LENGTH]
    total = torch.zeros(())
    for begin, end in itertools.pairwise(cuts):
        logits = model(ids[None, begin:end]).logits[0]
        total = total + F.cross_entropy(logits, ids[begin + 1 : end + 1], reduction="sum")
    return total


@pytest.mark.parametrize("apart", [False, True])
def test_the_loop_from_scratch_equals_an_independent_one(apart: bool, tmp_path: Path) -> None:
    shape = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.05}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **shape, **heads, **ids}))
    prefix = tmp_path / "corpus" / "a"
    write_corpus(prefix, 60)
    loaded, trainer, records = prepared(
        tmp_path / "run",
        *(
            "--config_name",
            str(tmp_path / "config.json"),
            "--tokenizer_name_or_path",
            "__internal_testing__/tiny-random-llama",
        ),
        *("--input_dir", str(prefix.parent), "--split", "949,50,1"),
        *("--max_seq_length", str(LENGTH), "--per_device_train_batch_size", str(MICRO)),
        *("--gradient_accumulation_steps", str(ACCUMULATION), "--max_steps", str(STEPS), "--seed", str(SEED)),
        *("--learning_rate", str(PEAK), "--min_learning_rate", str(FLOOR), "--lr_scheduler_type", "cosine"),
        *("--warmup_ratio", str(WARMUP / STEPS), "--decay_steps", str(DECAY_STEPS), "--max_grad_norm", str(CLIP)),
        *("--weight_decay", str(WEIGHT_DECAY), "--reset_attention_mask", str(apart)),
    )
    config = loaded.model.config
    assert config.vocab_size == 2048, "rounded up to a multiple of 128"
    assert config.max_position_embeddings == LENGTH, "room for a sample"
    trainer.weights.write(tmp_path / "start", trainer.weights.parts(), Processes())
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "start", attn_implementation="eager")
    theirs.train()
    trainer.train()

    samples = written_samples(prefix, 0.949, LENGTH)
    assert len(samples) >= STEPS * MICRO * ACCUMULATION, "all within one pass"
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    losses, norms, rates = [], [], []
    for step in range(STEPS):
        rates.append(learning_rate(step))
        for group in adamw.param_groups:
            group["lr"] = rates[-1]
        chosen = samples[step * MICRO * ACCUMULATION : (step + 1) * MICRO * ACCUMULATION]
        loss = torch.stack([summed_loss(theirs, *sample, apart) for sample in chosen]).sum() / (len(chosen) * LENGTH)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)))
        adamw.step()
        adamw.zero_grad()

    assert [record.learning_rate for record in records] == pytest.approx(rates, rel=1e-12)
    assert rates[-1] == FLOOR
    assert [record.loss for record in records] == pytest.approx(losses, abs=1e-5)
    assert [record.grad_norm for record in records] == pytest.approx(norms, abs=1e-5)
    assert min(norms) < CLIP < max(norms), "steps with clipping and steps without"
    assert losses[0] == pytest.approx(math.log(2048), abs=0.2)
    assert losses[-1] < losses[0] - 0.2
    other = dict(theirs.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert float((parameter - other[name]).detach().abs().max()) <= 1e-5, name


def test_keeping_documents_apart_is_another_loss(tmp_path: Path) -> None:
    """The two ways above must not agree by chance: the independent loss itself tells them apart."""
    write_corpus(tmp_path / "corpus" / "a", 60)
    shape = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, initializer_range=0.2)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    samples = written_samples(tmp_path / "corpus" / "a", 0.949, LENGTH)[:8]
    assert any(len(documents[:-1].unique()) > 2 for _, documents in samples)
    with torch.no_grad():
        for ids, documents in samples:
            several = len(documents[:-1].unique()) > 1
            difference = abs(
                float(summed_loss(model, ids, documents, True) - summed_loss(model, ids, documents, False))
            )
            assert (difference > 1e-3) == several
