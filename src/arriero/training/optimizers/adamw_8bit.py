"""AdamW whose two moments take one byte a parameter each instead of four."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.training.optimizers.block_quantization import BLOCK, blocks, dequantize, quantize
from arriero.training.optimizers.update_rule import saved_tensor

# Numbers that are unpacked at a time. On a CPU so many stay in its cache; a GPU wants few and large kernels.
CPU_CHUNK, DEVICE_CHUNK = 2**18, 2**25
assert CPU_CHUNK % BLOCK == DEVICE_CHUNK % BLOCK == 0


@dataclass
class _Moments:
    """The state of one parameter: codes of its shape, and a scale for each block of its flat form."""

    exp_avg: Tensor
    exp_avg_scale: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_scale: Tensor
    step: int = 0


class AdamW8bit:
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861), computed in fp32 a chunk at a time.

    Args:
        tensors: what is stepped, fp32, by parameter name.
        weight_decay: decoupled, on matrices only.
    """

    def __init__(
        self, tensors: dict[str, Tensor], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.tensors, self.betas, self.eps, self.weight_decay = tensors, betas, eps, weight_decay
        self.moments: dict[str, _Moments] = {}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for name, tensor in self.tensors.items():
            if tensor.grad is None:
                continue
            if name not in self.moments:
                scales = [torch.zeros(blocks(tensor.numel()), device=tensor.device) for _ in range(2)]
                codes = [torch.zeros_like(tensor, dtype=torch.uint8) for _ in range(2)]
                self.moments[name] = _Moments(codes[0], scales[0], codes[1], scales[1])
            moments = self.moments[name]
            moments.step += 1
            chunk = CPU_CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK
            decay = self.weight_decay if tensor.ndim >= 2 else 0.0
            for start in range(0, tensor.numel(), chunk):
                self._step_chunk(tensor, tensor.grad, moments, slice(start, start + chunk), learning_rate, decay)

    def _step_chunk(
        self, tensor: Tensor, grad: Tensor, moments: _Moments, part: slice, rate: float, decay: float
    ) -> None:
        beta1, beta2 = self.betas
        g = grad.reshape(-1)[part]
        rows = slice(part.start // BLOCK, part.stop // BLOCK)
        m_codes, v_codes = moments.exp_avg.view(-1)[part], moments.exp_avg_sq.view(-1)[part]
        m_scales, v_scales = moments.exp_avg_scale[rows], moments.exp_avg_sq_scale[rows]
        m = dequantize(m_codes, m_scales, signed=True).lerp_(g, 1 - beta1)
        v = dequantize(v_codes, v_scales, signed=False).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        for codes, scales, values, signed in ((m_codes, m_scales, m, True), (v_codes, v_scales, v, False)):
            new_codes, new_scales = quantize(values, signed)
            codes.copy_(new_codes)
            scales.copy_(new_scales)
        # the step itself uses the moments before they were rounded
        correction1, correction2 = 1 - beta1**moments.step, 1 - beta2**moments.step
        denominator = v.sqrt_().div_(math.sqrt(correction2)).add_(self.eps)
        weights = tensor.view(-1)[part]
        weights.mul_(1 - rate * decay).addcdiv_(m, denominator, value=-rate / correction1)

    def state(self) -> dict[str, Tensor]:
        tensors = {}
        for name, moments in self.moments.items():
            for kind, value in vars(moments).items():
                tensors[f"{name}.{kind}"] = torch.tensor(float(value)) if kind == "step" else value
        return tensors

    def load(self, saved: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            scales = (blocks(tensor.numel()),)
            kinds = {
                "exp_avg": (tensor.shape, torch.uint8),
                "exp_avg_scale": (scales, torch.float32),
                "exp_avg_sq": (tensor.shape, torch.uint8),
                "exp_avg_sq_scale": (scales, torch.float32),
            }
            loaded = {
                kind: saved_tensor(saved, f"{name}.{kind}", shape, dtype, tensor.device)
                for kind, (shape, dtype) in kinds.items()
            }
            step = saved_tensor(saved, f"{name}.step", (), torch.float32, torch.device("cpu"))
            self.moments[name] = _Moments(**loaded, step=int(step))
