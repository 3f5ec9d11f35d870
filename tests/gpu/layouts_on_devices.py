"""What each of several processes does, one device each: every layout given, beside a lone process on the same device.

    python layouts_on_devices.py cuda FOLDER "tp2" "stage3"     in each process, with the variables of a launcher

In a launch of one process the layout is "one": FSDP and its process group, of one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import layout_runs
from layout_runs import LAYOUTS, Run, append, make_trainer

from arriero.config.layout import AXES, Layout
from arriero.config.parallel import ParallelOptions
from arriero.parallel.placement import local_tensors, placements
from arriero.parallel.processes import Processes, backend_of, start, stop

LAYOUTS["one"] = (1, {})
RUNS = {
    "full": Run(steps=3),
    "LoRA": Run(steps=3, lora=True),
    "accumulation, rows of one length": Run(steps=3, accumulation=3, packed=False),
    "bf16 O1": Run(steps=3, precision={"bf16": True}),
}


def joined(names: list[str], device: torch.device) -> Iterator[tuple[str, Processes]]:
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        for name in names:
            yield name, start(ParallelOptions(**LAYOUTS[name][1]).layout(world), device)
        return
    dist.init_process_group(backend_of(device))  # a product's lone process has none
    layout = Layout()
    yield "one", Processes(layout, 0, init_device_mesh(device.type, layout.degrees, mesh_dim_names=AXES))


def main(kind: str, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    layout_runs.CPU = device
    if kind == "cuda":
        torch.cuda.set_device(device)
    for name, processes in joined(names, device):
        for what, run in RUNS.items():
            run = replace(run, copies=processes.layout.data)
            alone, expected = make_trainer(run, None, Processes(), folder)
            alone.train()
            trainer, found = make_trainer(run, name, processes, folder)
            trainer.train()
            pairs = [
                (getattr(one, value), getattr(other, value))
                for one, other in zip(found.records, expected.records, strict=True)
                for value in ("loss", "grad_norm")
            ]
            whole, where, worst = dict(alone.model.named_parameters()), placements(trainer.model), 0.0
            for key, tensor in local_tensors(trainer.model).items():
                other = whole[where[key].stored_as or key].detach()[where[key].box].to(tensor.device)
                if tensor.numel():
                    worst = max(worst, float((tensor.detach() - other).norm() / other.norm().clamp_min(1e-6)))
            found_line = {
                "layout": name,
                "what": what,
                "steps": max(abs(a - b) / abs(b) for a, b in pairs),
                "weights": processes.max([worst])[0],
                "device": str(next(iter(local_tensors(trainer.model).values())).device),
                "backend": dist.get_backend(processes.group("dp_shard")),
            }
            if processes.first:
                append(folder / "found.jsonl", found_line)
    stop(processes)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
