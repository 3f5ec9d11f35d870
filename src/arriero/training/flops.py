"""How much arithmetic a training step needs, and how much the machine could do: the two halves of MFU.

Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B) counts what the model needs, never what
is recomputed. Counted here, for one token: 2 FLOPs a weight forward, 2 for the gradient of the input, 2 for the gradient
of the weight where it is trained; so 6N for full training and about 4N for LoRA. The output head counts only for labelled
positions, since only those are projected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from arriero.engine.machine_peak import matrix_product_flops
from arriero.models.llama import LlamaForCausalLM
from arriero.quantization.linear import linear_layers

# Dense peaks in TFLOP/s from the vendors' data sheets, by words of the device name: (fp32, bf16 / fp16 on tensor cores).
# fp32 is true fp32: torch does not use TF32 unless it is told to.
DEVICE_PEAKS = {
    "H200": (67.0, 989.0),
    "H100 PCIe": (51.0, 756.0),
    "H100": (67.0, 989.0),
    "A100": (19.5, 312.0),
    "L40S": (91.6, 362.0),
    "RTX 4090": (82.6, 165.2),
    "A10": (31.2, 125.0),
    "V100": (15.7, 125.0),
    "T4": (8.1, 65.0),
}
# What a device's name may say besides without being another device: "Laptop", "NVL" or "MIG 1g.10gb" make it one.
_PLAIN_WORDS = re.compile(r"nvidia|tesla|geforce|gpu|(pcie|sxm\d?|hbm\d?e?)")
_SIZE = re.compile(r"\b([1-9]\d{0,3})\s*gi?b\b")


def known_device(name: str) -> tuple[str, int | None] | None:
    """The name in `DEVICE_PEAKS` that a device's name, or a user's word for it, stands for; None for any other device.

    Args:
        name: such as "NVIDIA A100-SXM4-40GB", "h100" or "rtx4090".

    Returns:
        That name, and the GB of memory where `name` says them.
    """
    text = re.sub(r"[-_\s]+", " ", name.lower())
    size = _SIZE.search(text)
    words = set(_SIZE.sub("", text).split())
    for known in sorted(DEVICE_PEAKS, key=len, reverse=True):
        parts = known.lower().split()
        for wanted in (set(parts), {"".join(parts)}):
            if wanted <= words and all(_PLAIN_WORDS.fullmatch(word) for word in words - wanted):
                return known, int(size[1]) if size else None
    return None


@dataclass(frozen=True)
class StepCost:
    """Coefficients of a model's training cost.

    Attributes:
        per_token: FLOPs of every linear layer but the head, for a token, forward and backward.
        per_label: FLOPs of the head, for a labelled token.
        per_pair: FLOPs of attention, for a query-key pair under the causal mask.
    """

    per_token: float
    per_label: float
    per_pair: float

    def __call__(self, parts: Sequence[Sequence[int]], label_tokens: int) -> float:
        """FLOPs of one batch of documents, given as `AttentionInfo.branching` takes them."""
        pairs = 0.0
        for first, *rest in parts:
            pairs += first * (first + 1) / 2 + sum(length * (length + 1) / 2 + length * first for length in rest)
        return self.per_token * sum(map(sum, parts)) + self.per_label * label_tokens + self.per_pair * pairs


def step_cost(model: LlamaForCausalLM) -> StepCost:
    """The training cost of a model as it stands (adapters and frozen weights included), of all processes together."""
    config = model.config
    parallel = getattr(model, "parallel", None)
    if parallel is not None:
        sizes = {
            name: (math.prod(shape), len(shape), name in parallel.trained) for name, shape in parallel.shapes.items()
        }
    else:
        sizes = {name: (p.numel(), p.ndim, p.requires_grad) for name, p in model.named_parameters()}
    body = 0.0
    for layer, (rows, columns) in linear_layers(config).items():  # also where they are held in few bits
        body += rows * columns * (6.0 if layer + ".weight" in sizes and sizes[layer + ".weight"][2] else 4.0)
    for name, (numel, ndim, trained) in sizes.items():
        if ndim == 2 and ".lora_" in name:
            body += numel * (6.0 if trained else 4.0)
    numel, _, trained = sizes["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    head_cost = numel * (6.0 if trained else 4.0)
    # QK^T and PV, 2 FLOPs a multiply-add each, once forward and twice backward
    pair_cost = 3 * 2 * 2.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    body += (
        model.model.prefix_length * pair_cost
    )  # every query sees all of a prefix; its network is not run for each token
    return StepCost(body, head_cost, pair_cost)


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s the device can reach, and where the figure comes from.

    A known GPU has its data sheet's figure; any other device is measured by a matrix product.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = known_device(name)
        if found is not None:
            return DEVICE_PEAKS[found[0]][half] * 1e12, f"{name} data sheet"
    return matrix_product_flops(device, dtype), "measured matrix product"
