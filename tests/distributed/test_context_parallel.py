"""Context parallelism, by gathering and in a ring, against every document alone in one process: loss and gradients, on 2
and 4 processes.

Run as a program, this file is one of the processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import warnings
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import run_processes

from arriero.data.batch import Batch
from arriero.data.sft import IGNORE
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM, run_layers
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.parallel.context import ContextShard
from arriero.parallel.launching.report import says_peer
from arriero.parallel.ring import RingAttention
from arriero.training.loss import linear_cross_entropy

VOCABULARY = 64
DYNAMIC = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
WINDOW = {"model_type": "mistral", "sliding_window": 7}
# name: lengths of the documents (or the shape of a matrix), changes to the model, what the chunks are a multiple of
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], int]] = {
    "one document": ((48,), {}, 1),
    "one document, padded": ((45,), {}, 1),
    "across chunks": ((13, 30, 9, 20), {}, 1),
    "shorter than a chunk": ((3, 1, 5, 2, 2, 7, 1, 4, 6, 1, 8, 3), {}, 1),
    "fewer tokens than chunks": ((2, 1), {}, 1),
    "window": ((13, 30, 9, 20), WINDOW, 1),
    "window, one document": ((61,), WINDOW, 1),
    "dynamic rope": ((13, 30, 9, 20), DYNAMIC, 1),
    "dynamic rope, one document": ((45,), DYNAMIC, 1),
    "as many heads as keys": ((13, 30, 9), {"num_key_value_heads": 4}, 1),
    "multiples of 3": ((13, 30, 9, 21), {}, 3),
    "matrix": ((18, 18, 18), {}, 1),
}

# by what the activations are: how processes attend to each other's keys; "written out" is the kernel where none is fused
METHODS = {
    "kept": ("gather", "ring, written out"),
    "recomputed": ("gather", "ring"),
    "single precision": ("gather", "ring"),
}


def make_model(changes: dict[str, Any]) -> LlamaForCausalLM:
    config = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    } | changes
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.init_weights(0)
    with torch.no_grad():  # scores far from even, so that a key too many or too few shows
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return model


def make_batch(lengths: tuple[int, ...], matrix: bool) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=generator)
    labels = torch.randint(0, VOCABULARY, ids.shape, generator=generator)
    labels[torch.rand(ids.shape, generator=generator) < 0.3] = IGNORE
    shape = (len(lengths), lengths[0]) if matrix else (1, -1)
    parts = tuple((length,) for length in lengths)
    rows, tokens = len(lengths), sum(lengths)
    return Batch(ids.view(shape), labels.view(shape), parts, rows, tokens, int((labels != IGNORE).sum()))


def alone(model: LlamaForCausalLM, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Every document by itself: causal attention and torch's own cross-entropy."""
    model = model.to(dtype)
    model.zero_grad()
    total = torch.zeros((), dtype=dtype)
    lengths = [length for (length,) in batch.parts]
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        ids, labels = (tensor.flatten()[end - length : end] for tensor in (batch.input_ids, batch.labels))
        total = total + F.cross_entropy(model(ids[None])[0], labels, ignore_index=IGNORE, reduction="sum")
    total.backward()
    return total.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def together(
    model: LlamaForCausalLM, batch: Batch, dtype: torch.dtype, multiple: int, method: str
) -> tuple[Tensor, list[Tensor], ContextShard]:
    """The batch shared out: loss and gradients added up over the processes."""
    model = model.to(dtype)
    model.zero_grad()
    assert dist.group.WORLD is not None
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    shard = ContextShard.of(batch, group, rank, size, multiple=multiple, ring=method != "gather")
    if method == "ring, written out":
        assert shard.ring is not None
        shard = dataclasses.replace(shard, ring=dataclasses.replace(shard.ring, kernel="written out"))
    body = model.model
    layers = body.layers.children()
    hidden = run_layers(body.embed_tokens, layers, body.norm, body.rotary, shard.input_ids, shard.inputs)
    if dtype == torch.float32:
        loss = linear_cross_entropy(hidden, model.lm_head.weight, shard.labels).loss
    else:
        logits = model.lm_head(hidden)[0]
        loss = F.cross_entropy(logits, shard.labels[0], ignore_index=IGNORE, reduction="sum")
    loss.backward()
    total = loss.detach().clone()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([total.flatten(), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    total, *sums = flat.split([1, *(gradient.numel() for gradient in gradients)])
    return total[0], [whole.view_as(own) for whole, own in zip(sums, gradients, strict=True)], shard


def difference(ours: list[Tensor], theirs: list[Tensor]) -> tuple[float, float]:
    """The difference of two gradients relative to the norm: the greatest of a parameter, and that of all together."""
    each = [(float((a - b).norm()), float(b.norm())) for a, b in zip(ours, theirs, strict=True)]
    whole = torch.tensor(each).norm(dim=0)
    return max(distance / norm for distance, norm in each), float(whole[0] / whole[1])


def process(path: Path) -> None:
    """Every case, in one of the processes; the first writes what was found."""
    found: dict[str, Any] = {}
    first = dist.get_rank() == 0
    for name, (lengths, changes, multiple) in CASES.items():
        batch = make_batch(lengths, name == "matrix")
        truths = {t: alone(make_model(changes), batch, t) for t in (torch.float32, torch.float64) if first}
        for memory, methods in METHODS.items():
            dtype = torch.float32 if memory == "single precision" else torch.float64
            for method in methods:
                model = make_model(changes)
                if memory == "recomputed":
                    apply_activation_checkpointing(model.model.layers)
                loss, gradients, shard = together(model, batch, dtype, multiple, method)
                if first:
                    expected, expected_gradients = truths[dtype]
                    error = float((loss - expected).abs() / expected.abs())
                    found[f"{name}, {memory}, {method}"] = [error, *difference(gradients, expected_gradients)]
        lengths_and_keys = zip(shard.attention.lengths, shard.attention.kv_lengths, strict=True)
        pairs = sum(q * (q + 1) / 2 + q * (k - q) for q, k in lengths_and_keys)
        of_all = torch.zeros(2, dist.get_world_size())
        of_all[:, dist.get_rank()] = torch.tensor([pairs, shard.input_ids.shape[1]])
        dist.all_reduce(of_all)
        found[name] = {"pairs": of_all[0].tolist(), "tokens": of_all[1].tolist(), "labels": shard.label_tokens}
    if dist.get_world_size() == 2:
        found |= faults()
    if first:
        path.write_text(json.dumps(found))


def faults() -> dict[str, Any]:
    """The second process says nothing for a while and then dies; what the first makes of either."""
    silent = dist.new_group(timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        time.sleep(2.5)
        os._exit(0)
    found = {}
    for name, group in (("silent", silent), ("dead", dist.group.WORLD)):
        assert group is not None
        ring, began = RingAttention(group, 0, 2, (8,), 2), time.monotonic()
        try:
            ring.attend(torch.ones(1, 4, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), scale=1.0)
        except RuntimeError as error:
            found[name] = [says_peer(error), time.monotonic() - began, str(error)]
    return found


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What so many processes found."""
    path = tmp_path_factory.mktemp("found") / "found.json"
    ended = run_processes(request.param, Path(__file__), str(path), timeout=150)
    assert [code for code, _ in ended] == [0] * request.param, "\n".join(told for _, told in ended)
    return {"size": request.param, **json.loads(path.read_text())}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_documents_alone(found: dict[str, Any], name: str) -> None:
    for memory in ("kept", "recomputed"):
        for method in METHODS[memory]:
            assert max(found[f"{name}, {memory}, {method}"]) < 1e-12, method
    for method in METHODS["single precision"]:
        loss, _, gradient = found[f"{name}, single precision, {method}"]
        assert loss < 1e-6, method
        assert gradient < 1e-6, method


def test_every_process_has_as_many_tokens_and_a_long_document_is_equal_work(found: dict[str, Any]) -> None:
    for name, (_, _, multiple) in CASES.items():
        tokens = found[name]["tokens"]
        assert len(set(tokens)) == 1
        assert tokens[0] % (2 * multiple) == 0
        assert found[name]["labels"] == make_batch(CASES[name][0], False).label_tokens
    assert found["one document"]["tokens"] == [48 / found["size"]] * found["size"]
    pairs = found["one document"]["pairs"]
    assert len(set(pairs)) == 1
    assert sum(pairs) == 48 * 49 / 2


def test_a_peer_that_is_silent_or_dies_ends_the_ring(found: dict[str, Any]) -> None:
    if found["size"] == 2:
        for name in ("silent", "dead"):
            of_peer, seconds, said = found[name]
            assert of_peer, said
            assert seconds < 20, said  # the silent one's timeout is 1 s, that of the other 30 s


def test_shared_beginnings_are_refused() -> None:
    ids = torch.zeros(1, 12, dtype=torch.int64)
    batch = Batch(ids, ids, ((4, 3, 5),), 2, 16, 12)
    with pytest.raises(ValueError, match="shared beginnings"):
        ContextShard.of(batch, None, 0, 2)  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    try:
        process(Path(sys.argv[1]))
    finally:
        dist.destroy_process_group()
