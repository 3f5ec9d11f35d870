"""Two processes that train in 8-bit floats, layout by layout: python fp8_layouts.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from layout_runs import Run, append, join, make_trainer

from arriero.models.fp8_linear import Fp8Linear
from arriero.parallel.eight_bits import is_fp8
from arriero.parallel.processes import stop

# Attention and feed-forward parts of two processes are multiples of 16, like the whole.
MODEL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.05}
MODEL |= {"attention_bias": True, "mlp_bias": True}
O2 = {"bf16": True, "fp16_opt_level": "O2", "fp8": True}
RUN = Run(model=MODEL, precision=O2, steps=3, accumulation=2)
# Two processes add gradients up in another order. From AdamW's second step on a weight may round to bf16 the other way for
# that, and if it is a matrix's greatest one, all of the matrix has another scale in 8 bits: what is the same ends before.
WHOLE = Run(**{**vars(RUN), "steps": 2})
RUNS: dict[str, tuple[str, Run]] = {
    "stage3": ("stage3", WHOLE),
    "stage3, O1, recomputed": ("stage3", Run(**{**vars(WHOLE), "precision": {"bf16": True, "fp8": True, "recompute": True}})),
    "tp2": ("tp2", RUN),
    "tp2, LoRA": ("tp2", Run(**{**vars(RUN), "lora": True})),
    "pp2 1f1b": ("pp2 1f1b", RUN),
    "pp2 zero-bubble": ("pp2 zero-bubble", RUN),
    "cp2": ("cp2", RUN),
}  # fmt: skip


def of(name: str) -> tuple[str, Run]:
    """The layout and the run of a name; with as many copies of the model as the layout has."""
    layout, run = RUNS[name]
    return layout, Run(**{**vars(run), "copies": 2 if layout == "stage3" else 1})


def main(folder: Path) -> None:
    for name in RUNS:
        layout, run = of(name)
        ((_, processes),) = join([layout])
        trainer, recorder = make_trainer(run, layout, processes, folder)
        trainer.train()
        layers = [layer for layer in trainer.model.modules() if is_fp8(layer)]
        if processes.first:
            found = {"losses": [record.loss for record in recorder.records]}
            found["norms"] = [record.grad_norm for record in recorder.records]
            append(folder / "found.jsonl", {"name": name, "layers": len(layers), **found})
        assert run.lora or all(isinstance(layer, Fp8Linear) for layer in layers)
    stop(processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
