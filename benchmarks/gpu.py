"""Everything that is measured on one GPU, in one command of about 10 minutes on an H100; a table each.

    make bench-gpu
    make bench-gpu ARGS="--only pretrain"                  a part
    make bench-gpu ARGS="--device cpu --tiny"              the same code on a laptop, for a check

pretrain: a 1.3B model, rows of 2,048, in bf16, compiled and not, and with fp8 products, compiled. lora: an 8B model, random
weights, rows of 4,096. generate: an 8B model, one stream, 128 x (32 in, 2,048 out), 256 uneven requests. bundles: exported, of
the shape of SmolLM2. Figures are added to
runs/gpu_*.jsonl; what was measured is in docs/gpu.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LARGE = str(HERE.parent / "configs/models/llama-3-8b")
PARTS = {
    "pretrain": ("gpu_pretrain.py", "--cases", "O2+compile", "O2+fp8+compile", "O1+compile", "O2", "--steps", "12"),
    "lora": (
        "gpu_pretrain.py", "--cases", "O2+lora+recompute", "O2+lora+recompute+compile", "--model", LARGE,
        "--sequence", "4096", "--batch", "1", "--steps", "6", "--warmup", "3", "--output", "runs/gpu_lora.jsonl",
    ),
    "generate": ("gpu_generate.py",),
    "bundles": ("gpu_bundles.py", "--models", str(HERE.parent / "configs/models/llama-135m")),
}  # fmt: skip
TINY = {"lora": ("--sequence", "64")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small models, few tokens")
    given = parser.parse_args()
    failed = []
    for name in given.only:
        program, *options = PARTS[name]
        more = ["--tiny", *TINY.get(name, ())] if given.tiny else []
        if given.tiny and program == "gpu_pretrain.py":
            more += ["--backend", "aot_eager"]  # needs no compiler
        command = [sys.executable, str(HERE / program), *options, "--device", given.device, *more]
        print(f"## {name}\n", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
