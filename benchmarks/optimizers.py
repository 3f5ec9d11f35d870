"""Time and memory of an optimizer step: `--optim` by name against torch's fused AdamW on the same tensors.

    python benchmarks/optimizers.py --preset smollm2-135m-instruct --rounds 5

Weights and gradients are random; what is timed is clipping, the step and dropping the gradients, without forward and
backward. The ways take turns, A B C D A B C D, and each one's best round counts. Prints a row for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from arriero.config.optimization import OPTIMIZERS
from arriero.models.llama import LlamaForCausalLM
from arriero.models.presets import find_preset
from arriero.training.optimizer import Optimizer


def fill_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-3, generator=generator)


def torch_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(optimizer: Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.prepare_gradients()
        optimizer.clip(1.0, optimizer.squared_norm() ** 0.5)
        optimizer.step(1e-5)
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = LlamaForCausalLM(find_preset(arguments.preset).config)
    model.init_weights(0)
    parameters = list(model.parameters())
    peer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    ours = {name: Optimizer(model, name=name) for name in OPTIMIZERS}
    ways = {"torch fused AdamW": torch_step(model, peer)} | {name: our_step(o) for name, o in ours.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(arguments.rounds + 1):
        for name, step in ways.items():
            fill_gradients(model, round_number)
            start = time.perf_counter()
            step()
            if round_number:  # the first makes the state
                times[name].append(time.perf_counter() - start)
    count = sum(parameter.numel() for parameter in parameters)
    print(f"{count:,} fp32 parameters, {arguments.threads} threads, torch {torch.__version__}")
    for name in ways:
        tensors = ours[name].state().values() if name in ours else (t for e in peer.state.values() for t in e.values())
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        print(f"| {name} | {min(times[name]) * 1e3:.0f} ms | {held / count:.2f} bytes a parameter |")


if __name__ == "__main__":
    main()
