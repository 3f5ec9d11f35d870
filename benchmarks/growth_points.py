"""One point of a curve of `growth.py`, in the process that it is called as: prints seconds and bytes as a line of JSON.

Bytes are what the process took beyond its imports, or beyond the model at rest; while they are counted glibc gives freed
memory back at once (MALLOC_MMAP_THRESHOLD_ in the environment), while time is measured it does as it does for users.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import Any

from growth_cases import ASKED_EACH, ASKED_NEW, ASKED_PROMPT, DECODED_NEW, DECODED_PROMPT, training_setup


class Taken:
    """How far this process's own memory rises within a block, looked at by a thread; a context manager.

    Pages of files do not count: the kernel takes them back when it likes, also those of libraries.

    Attributes:
        bytes: afterwards.
    """

    INTERVAL = 0.002

    def __enter__(self) -> Taken:
        self.bytes, self._ended = 0, threading.Event()
        self._before = self._peak = self._anonymous()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes = self._peak - self._before

    def _watch(self) -> None:
        while not self._ended.wait(self.INTERVAL):
            self._peak = max(self._peak, self._anonymous())

    @staticmethod
    def _anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024


def train(curve: str, x: int, steps: int) -> dict[str, Any]:
    """Steps of the product's trainer, in this process or as one rank of those of a launch."""
    import gpu_pretrain
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401  (so that they are no part of what is counted)
    from small_model import small_config

    from arriero.training.memory import freed_memory_kept

    layers, setup = training_setup(curve, x)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(small_config(layers).to_dict()))
        given = ["--device", "cpu", "--model", str(folder), "--sequence", str(setup.sequence), "--warmup", "1"]
        given += ["--batch", str(setup.batch), *(["--sharding", "stage3"] if setup.layout.size > 1 else [])]
        several = setup.layout.size > 1  # then one group of processes for both
        with Taken() as taken:
            found = gpu_pretrain.measure("fp32", gpu_pretrain.parse([*given, "--steps", str(steps if several else 1)]))
        if several:
            return {"bytes": taken.bytes, "seconds": found["step_seconds"]}
        with freed_memory_kept():  # as every training run on a CPU does
            found = gpu_pretrain.measure("fp32", gpu_pretrain.parse([*given, "--steps", str(steps)]))
    return {"bytes": taken.bytes, "seconds": found["step_seconds"]}


def ranks(x: int, steps: int) -> dict[str, Any]:
    """The same in x processes of one thread each: the first one's seconds, and the bytes of the largest."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(x)}
    common |= {"OMP_NUM_THREADS": "1", "ARRIERO_TIMEOUT": "120"}
    command = [sys.executable, __file__, "rank", str(x), "--steps", str(steps)]
    running = []
    for rank in range(x):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own))
    try:
        told = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    found = [json.loads(text.splitlines()[-1]) for text in told]
    return {"seconds": found[0]["seconds"], "bytes": max(one["bytes"] for one in found)}


def answer(curve: str, x: int, rounds: int) -> dict[str, Any]:
    """The first token of a prompt of x tokens, or steps of x running requests."""
    import numpy as np
    import torch
    from gpu_generate import random_model
    from small_model import small_config

    from arriero.data.tokenizer import load_tokenizer
    from arriero.engine.benchmark.measured import Job, run_job
    from arriero.engine.benchmark.rounds import warm_up
    from arriero.engine.benchmark.workloads import Prompts
    from arriero.engine.runner import TorchRunner
    from arriero.formats.download import resolve_model
    from arriero.models.presets import TINY_RANDOM_LLAMA
    from arriero.training.memory import freed_memory_kept

    config = small_config()
    model = random_model(config, torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))  # the engine asks for one; these answers are no text
    prompts = Prompts(range(config.vocab_size), config.max_position_embeddings, np.random.default_rng(0))
    if curve == "prefill":
        job = Job(curve, f"{x} in", [prompts.draw(x)], [1], 1)
    else:
        job = Job(curve, f"{x} running", [prompts.draw(DECODED_PROMPT) for _ in range(x)], [DECODED_NEW] * x, x)
    runner = TorchRunner(model, useful_tokens=job.running_tokens())
    run_job(runner, tokenizer, warm_up(job))
    runner = TorchRunner(model, useful_tokens=job.running_tokens())  # with a cache that nothing has touched
    with Taken() as taken:
        run_job(runner, tokenizer, job)
    with freed_memory_kept():
        pass  # afterwards glibc keeps what it usually does
    seconds = []
    for _ in range(rounds):
        run = run_job(runner, tokenizer, job)
        seconds.append(run.seconds if curve == "prefill" else median(s.seconds for s in run.steps if not s.prompts))
    return {"bytes": taken.bytes, "seconds": min(seconds)}


def corpus(x: int) -> dict[str, Any]:
    """A corpus of x MB."""
    import preprocess

    from arriero.formats.download import resolve_model

    folder = resolve_model("smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "documents.jsonl"
        preprocess.write_documents(preprocess.TEXT, path, 0.05)
        preprocess.measure("arriero", path, folder)  # imports, and what is allocated once
        preprocess.write_documents(preprocess.TEXT, path, x)
        with Taken() as taken:
            _, seconds = preprocess.measure("arriero", path, folder)
    return {"bytes": taken.bytes, "seconds": seconds}


def clients(x: int) -> dict[str, Any]:
    """A server and x clients; its bytes are what it took beyond its first answers."""
    import serve
    from small_model import save_small

    from arriero.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = save_small(Path(scratch) / "model")
        rows = Path(scratch) / "questions.jsonl"
        texts = [f"{number:04d} {'what is it ' * 20}"[:ASKED_PROMPT] for number in range(ASKED_EACH * x)]
        rows.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in texts))
        prompt = load_tokenizer(folder).chat([{"role": "user", "content": texts[0].strip()}])
        found = serve.through_the_server(
            argparse.Namespace(
                model=str(folder),
                dataset_path=str(rows),
                clients=x,
                requests=len(texts),
                tokens=ASKED_NEW,
                peer=False,
            )
        )
    return {"bytes": found["memory"], "seconds": found["seconds"], "prompt_tokens": len(prompt)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("curve")
    parser.add_argument("x", type=int)
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    given = parser.parse_args()
    curve, x, steps = given.curve, given.x, given.steps
    if curve in ("rank", "train-sequence", "train-batch", "train-layers"):
        found = train("ranks" if curve == "rank" else curve, x, steps)
    elif curve == "ranks":
        found = ranks(x, steps)
    elif curve == "corpus":
        found = corpus(x)
    elif curve == "clients":
        found = clients(x)
    else:
        found = answer(curve, x, steps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
