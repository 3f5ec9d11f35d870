"""The planned memory of a rank against the peak of real steps in two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from arriero.config.layout import Layout
from arriero.models.config import LlamaConfig
from arriero.training.planning.memory import HOST_IMPORTS, share_memory
from arriero.training.planning.pipeline import shares
from arriero.training.planning.setup import TrainingSetup, model_facts

ROOT = Path(__file__).parents[2]
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
# Real steps of one rank; prints how far its resident memory rose above what imports and joining the others took.
STEPS = """
import json, sys
import torch
from arriero.config.layout import Layout
from arriero.data.batch import Batch
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.materialize import materialize
from arriero.parallel.parallelize import parallelize
from arriero.parallel.processes import start
from arriero.training import pipeline_execution
from arriero.training.execution import build_execution
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

torch.set_num_threads(1)
shape, layout, rows, sequence, count = json.loads(sys.argv[1])
device = torch.device("cpu")
processes = start(Layout(**layout), device)
before = status("VmRSS")
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(**shape))
parallelize(model, processes, device, tokens=sequence)
materialize(model, device, lambda name, placement: torch.randn(placement.size) * 0.02)
precision = Precision(torch.float32, "O1", device)
optimizer = Optimizer(model)
execution = build_execution(model, precision, device)
for _ in range(2):
    batches = []
    for _ in range(count):
        ids = torch.randint(0, shape["vocab_size"], (rows, sequence))
        batches.append(Batch(ids, ids, ((sequence,),) * rows, rows=rows, row_tokens=ids.numel(), label_tokens=ids.numel()))
    execution.train(batches, count * rows * sequence, optimizer)
    precision.unscale(optimizer)
    optimizer.clip(1.0, 1.0)
    optimizer.step(1e-4)
    precision.update()
    optimizer.zero_grad()
peak = status("VmHWM") - before
processes.barrier()
print(peak)
torch.distributed.destroy_process_group()
"""
RUNS: dict[str, tuple[Layout, int, int, int]] = {  # rows, tokens of a row, micro-batches
    "stage1": (Layout(dp_shard=2, stage=1), 1, 256, 2),
    "stage3": (Layout(dp_shard=2, stage=3), 1, 256, 1),
    "tp": (Layout(tp=2), 2, 512, 1),
    "tp, whole sequences": (Layout(tp=2, sequence_parallel=False), 2, 256, 2),
    "cp": (Layout(cp=2), 1, 1024, 1),
    "1f1b": (Layout(pp=2), 1, 512, 4),
    "interleaved": (Layout(pp=2, virtual=2, schedule="interleaved"), 1, 512, 4),
    "zero_bubble": (Layout(pp=2, schedule="zero_bubble"), 1, 512, 8),
}


def measured(layout: Layout, rows: int, sequence: int, count: int) -> list[int]:
    """Of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # every larger block on its own shows what is really held
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ARRIERO_TIMEOUT": "60"}
    command = [sys.executable, "-c", STEPS, json.dumps([SHAPE, asdict(layout), rows, sequence, count])]
    ranks = [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ended = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], ended
    return [int(said) for said, _ in ended]


@pytest.mark.peers
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", RUNS)
def test_peak_of_real_steps_in_two_processes(name: str) -> None:
    layout, rows, sequence, count = RUNS[name]
    facts = model_facts(LlamaConfig(**SHAPE))
    setup = TrainingSetup(batch=rows, sequence=sequence, accumulation=count, layout=layout)
    places = shares(facts, setup)
    for rank, peak in enumerate(measured(layout, rows, sequence, count)):
        planned = share_memory(facts, setup, places[layout.coordinates(rank).pp]).peak - HOST_IMPORTS
        print(
            f"{layout}, rank {rank}: planned {planned >> 20} MiB, measured {peak >> 20} MiB, {planned / peak - 1:+.1%}"
        )
        assert planned == pytest.approx(peak, rel=0.1)
