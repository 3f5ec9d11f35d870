"""Time and memory of `arriero convert`, beside `cp` of the same bytes.

The model has the shape of LLaMA-7B with its headers and configuration, and weights that are holes of sparse files: reading
them gives zeros, writing the new ones is real. Each run is a process of its own (Linux only). Memory is what that process
itself took at its peak, mapped files left out (VmHWM counts them, so it is sampled: RssAnon + RssShmem).

    .venv/bin/python benchmarks/convert.py --folder /tmp/convert                       HF -> HF, all layers, 13.5 GB
    .venv/bin/python benchmarks/convert.py --folder /tmp/convert --layers 2 --to hf paddle meta gguf
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import subprocess
import sys
import time
from datetime import date
from math import prod
from pathlib import Path

import torch

from arriero.formats.safe_tensors import INDEX_FILE
from arriero.formats.safetensors_header import build_header
from arriero.formats.shared_files import plan_files
from arriero.models.presets import find_preset
from arriero.models.weight_shapes import weight_shapes

MODEL = "llama-7b"
SHARD = 5 * 10**9
INTERVAL = 0.02  # seconds between two looks at the memory


def make_model(folder: Path, layers: int) -> tuple[int, int]:
    """A model folder of sparse bf16 weights; returns their bytes and those of the largest tensor."""
    preset = find_preset(MODEL)
    layers = layers or preset.config.num_hidden_layers
    config = dataclasses.replace(preset.config, num_hidden_layers=layers, layer_types=())
    plan = {name: (torch.bfloat16, shape) for name, shape in weight_shapes(config).items()}
    folder.mkdir(parents=True)
    files = plan_files(plan, SHARD)
    for file, names in files.items():
        header, _, size = build_header({name: plan[name] for name in names})
        (folder / file).write_bytes(header)
        with (folder / file).open("r+b") as opened:
            opened.truncate(size)
    if len(files) > 1:
        index = {"weight_map": {name: file for file, names in files.items() for name in names}}
        (folder / INDEX_FILE).write_text(json.dumps(index))
    values = config.to_dict() | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values))
    sizes = [prod(shape) * 2 for _, shape in plan.values()]
    return sum(sizes), max(sizes)


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


def copy(source: Path, target: Path) -> float:
    """Seconds that `cp` takes for real bytes, and the disk to have them (a conversion waits for that too)."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--sparse=never", "--reflink=never", str(source), str(target)], check=True)
    for path in target.iterdir():
        subprocess.run(["sync", str(path)], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0: all 32")
    parser.add_argument(
        "--to", nargs="+", default=["hf"], choices=["hf", "paddle", "meta", "gguf", "q8_0", "q4_0", "q4_k"]
    )
    arguments = parser.parse_args()
    if arguments.folder.exists():
        raise SystemExit(f"{arguments.folder} is there already")
    arguments.folder.mkdir(parents=True)
    try:
        source = arguments.folder / "model"
        size, largest = make_model(source, arguments.layers)
        print(f"{platform.node()}, {platform.machine()}, {date.today()}: {size / 1e9:.2f} GB of bf16")
        print(f"the largest tensor has {largest / 1e6:.0f} MB")
        idle = measured([sys.executable, "-c", "import arriero.formats.conversion"])[1]
        seconds = copy(source, arguments.folder / "copy")
        shutil.rmtree(arguments.folder / "copy")
        print(f"{'cp':8} {seconds:7.1f} s  {size / seconds / 1e6:6.0f} MB/s")
        for to in arguments.to:
            gguf = to not in ("hf", "paddle", "meta")
            target = arguments.folder / ("new.gguf" if gguf else "new")
            options = ["--gguf_type", to] if gguf and to != "gguf" else ["--to", to]
            command = [sys.executable, "-m", "arriero", "convert", str(source), str(target), *options, "--verify", "no"]
            spent, peak = measured(command)
            memory = (peak - idle) / largest
            print(
                f"{to:8} {spent:7.1f} s  {size / spent / 1e6:6.0f} MB/s  {seconds / spent:5.0%} of cp, "
                f"peak {peak / 1e6:.0f} MB, {memory:.2f} largest tensors above the program's own {idle / 1e6:.0f} MB"
            )
            target.unlink() if gguf else shutil.rmtree(target)
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
