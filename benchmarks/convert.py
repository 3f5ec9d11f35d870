"""Time and memory of `arriero convert`, beside `cp` of the same bytes, and `cmp` of them where it verifies.

The model has the shape of LLaMA-7B with random weights that are really on the disk: of the holes of a sparse file `cp` knows
that they are zeros and reads nothing. Before each run the model's files are dropped from the page cache; after it everything
written must have reached the disk. Each run is a process of its own (Linux only). The sides take turns in each of `--runs`
rounds, since a virtual disk is now faster and now slower; the medians of the seconds and of the ratios of a round are shown,
and the ratio of every round. Memory is what that process itself took at its peak, mapped files left out (VmHWM
counts them, so it is sampled: RssAnon + RssShmem). A row "start" is the conversion of a model of a few kilobytes: what Python
and torch take before the first byte.

    .venv/bin/python benchmarks/convert.py --folder /tmp/convert                       HF -> HF, all layers, 13.5 GB
    .venv/bin/python benchmarks/convert.py --folder /tmp/convert --layers 2 --verify --to hf paddle meta gguf
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import records
import torch
from records import Record

from arriero.formats.safe_tensors import INDEX_FILE
from arriero.formats.safetensors_header import build_header
from arriero.formats.shared_files import plan_files
from arriero.models.config import LlamaConfig
from arriero.models.presets import find_preset
from arriero.models.weight_shapes import weight_shapes

MODEL = "llama-7b"
SHARD = 5 * 10**9
INTERVAL = 0.02  # seconds between two looks at the memory
# Seconds before each run: a virtual machine gives freed memory back to its host, and using it anew then costs three times as
# much. Without a pause, what runs first after a large file is gone has it cheaper.
PAUSE = 6.0
BLOCK = 2**25  # random numbers, which are then repeated


def make_model(folder: Path, config: LlamaConfig) -> tuple[int, int]:
    """A model folder of random bf16 weights with a tokenizer; returns the weights' bytes and those of the largest tensor."""
    plan = {name: (torch.bfloat16, shape) for name, shape in weight_shapes(config).items()}
    folder.mkdir(parents=True)
    files = plan_files(plan, SHARD)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint8).numpy().data
    for file, names in files.items():
        header, _, size = build_header({name: plan[name] for name in names})
        with (folder / file).open("wb") as opened:
            left = size - opened.write(header)
            while left:
                left -= opened.write(block[:left])
            os.fsync(opened.fileno())
    if len(files) > 1:
        index = {"weight_map": {name: file for file, names in files.items() for name in names}}
        (folder / INDEX_FILE).write_text(json.dumps(index))
    values = config.to_dict() | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(config.vocab_size)))
    sizes = [prod(shape) * 2 for _, shape in plan.values()]
    return sum(sizes), max(sizes)


def tokenizer(size: int) -> dict[str, object]:
    """A tokenizer.json of the kind of LLaMA's (bytes, then merges), which a GGUF file has to hold."""
    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>"])}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    vocab |= {f"t{number}": number for number in range(len(vocab), size)}
    added = [
        {"id": vocab[token], "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token in ("<unk>", "<s>", "</s>")
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }


def anonymous(process: int) -> int:
    """Bytes of memory of a process that are no mapped file."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak memory of a command."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {process.stderr.read() if process.stderr else ''}")
    return time.perf_counter() - start, peak


def copied(source: Path, target: Path, *, compared: bool) -> tuple[float, int]:
    """Seconds that `cp` takes, the disk to have the bytes (a conversion waits for that too), and `cmp` if asked for."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--sparse=never", "--reflink=never", str(source), str(target)], check=True)
    for path in target.iterdir():
        subprocess.run(["sync", str(path)], check=True)
    if compared:
        for path in target.iterdir():
            subprocess.run(["cmp", str(source / path.name), str(path)], check=True)
    return time.perf_counter() - start, 0


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, and have disk and memory at rest."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    time.sleep(PAUSE)


def once(source: Path, target: Path, run: Callable[[], tuple[float, int]]) -> tuple[float, int]:
    """Seconds and memory of one run; what it writes is deleted."""
    forget(source)
    found = run()
    target.unlink() if target.is_file() else shutil.rmtree(target)
    return found


def command(source: Path, target: Path, to: str, *, verify: bool) -> list[str]:
    gguf = to not in ("hf", "paddle", "meta")
    options = ["--gguf_type", to] if gguf and to != "gguf" else ["--to", to]
    line = [sys.executable, "-m", "arriero", "convert", str(source), str(target), *options]
    return [*line, "--verify", "yes" if verify else "no"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0: all 32")
    parser.add_argument("--runs", type=int, default=1, help="rounds, in which the sides take turns")
    parser.add_argument("--verify", action="store_true", help="measure with --verify yes too, beside cp and cmp")
    parser.add_argument(
        "--to", nargs="+", default=["hf"], choices=["hf", "paddle", "meta", "gguf", "q8_0", "q4_0", "q4_k"]
    )
    records.add_json(parser)
    arguments = parser.parse_args()
    if arguments.folder.exists():
        raise SystemExit(f"{arguments.folder} is there already")
    arguments.folder.mkdir(parents=True)
    try:
        measure(arguments)
    finally:
        shutil.rmtree(arguments.folder)


def measure(arguments: argparse.Namespace) -> None:
    source, tiny = arguments.folder / "model", arguments.folder / "tiny"
    config = find_preset(MODEL).config
    layers = arguments.layers or config.num_hidden_layers
    size, largest = make_model(source, dataclasses.replace(config, num_hidden_layers=layers, layer_types=()))
    few = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    few |= {"head_dim": 16, "num_hidden_layers": 1, "vocab_size": 300}
    make_model(tiny, dataclasses.replace(config, **few, layer_types=()))
    print(f"{platform.node()}, {platform.machine()}, {os.cpu_count()} processors, {date.today()}")
    print(f"{size / 1e9:.2f} GB of bf16, the largest tensor {largest / 1e6:.0f} MB; {arguments.runs} rounds")
    places = {to: arguments.folder / ("new" if to in ("hf", "paddle", "meta") else "new.gguf") for to in arguments.to}
    copy = arguments.folder / "copy"
    for verify in [False, True] if arguments.verify else [False]:
        name = "cp + cmp" if verify else "cp"
        plain: list[float] = []
        runs: dict[str, list[tuple[float, int]]] = {to: [] for to in places}
        start: dict[str, list[tuple[float, int]]] = {to: [] for to in places}
        for _ in range(arguments.runs):
            plain.append(once(source, copy, partial(copied, source, copy, compared=verify))[0])
            for to, place in places.items():
                line = command(tiny, place, to, verify=False)
                start[to].append(once(tiny, place, partial(measured, line)))
                line = command(source, place, to, verify=verify)
                runs[to].append(once(source, place, partial(measured, line)))
        print(f"{name:15} {median(plain):7.1f} s  {size / median(plain) / 1e6:6.0f} MB/s")
        told = []
        for to in places:
            spent, begin = [seconds for seconds, _ in runs[to]], median(seconds for seconds, _ in start[to])
            peak, idle = max(memory for _, memory in runs[to]), max(memory for _, memory in start[to])
            ratios = [other / own for other, own in zip(plain, spent, strict=True)]
            print(
                f"{to + ' verified' * verify:15} {median(spent):7.1f} s  {size / median(spent) / 1e6:6.0f} MB/s  "
                f"{median(ratios):5.0%} of {name} ({', '.join(f'{ratio:.0%}' for ratio in ratios)}); "
                f"start {begin:.1f} s; peak {peak / 1e6:.0f} MB, "
                f"{(peak - idle) / largest:.2f} largest tensors above {idle / 1e6:.0f} MB at the start",
                flush=True,
            )
            what = f"convert to {to}{' verified' * verify}, {size / 1e9:.1f} GB"
            told.append(Record.of_costs("convert", what, "s", spent, plain, peer_name=name, dtype="bf16"))
        records.write(arguments.json, told)


if __name__ == "__main__":
    main()
