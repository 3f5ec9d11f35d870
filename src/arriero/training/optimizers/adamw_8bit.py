"""AdamW whose two moments take one byte a parameter each instead of four."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.training.optimizers.block_quantization import BLOCK, blocks, dequantize, dequantize_exactly, quantize
from arriero.training.optimizers.update_rule import saved_tensor

# Numbers that are unpacked at a time. On a CPU so many stay in its cache; a GPU wants few and large kernels.
CPU_CHUNK, DEVICE_CHUNK = 2**18, 2**25
SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the moments, and whether they can be negative
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
                self.moments[name] = _empty_moments(tensor)
            moments = self.moments[name]
            moments.step += 1
            decay = self.weight_decay if tensor.ndim >= 2 else 0.0
            for part, rows in _chunks(tensor):
                self._step_chunk(tensor, tensor.grad, moments, part, rows, learning_rate, decay)

    def _step_chunk(
        self, tensor: Tensor, grad: Tensor, moments: _Moments, part: slice, rows: slice, rate: float, decay: float
    ) -> None:
        beta1, beta2 = self.betas
        g = grad.reshape(-1)[part]
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

    def held(self) -> list[Tensor]:
        return [
            value for moments in self.moments.values() for value in vars(moments).values() if isinstance(value, Tensor)
        ]

    def state(self) -> dict[str, Tensor]:
        """As AdamW's: blocks depend on what part of a tensor is here, numbers do not. In host memory, a chunk at a time."""
        tensors = {}
        for name, moments in self.moments.items():
            tensors[f"{name}.step"] = torch.tensor(float(moments.step))
            for kind, signed in SIGNED.items():
                tensors[f"{name}.{kind}"] = self._unpacked(
                    getattr(moments, kind), getattr(moments, f"{kind}_scale"), signed
                )
        return tensors

    def _unpacked(self, codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
        values = torch.empty(codes.shape, dtype=torch.float32)
        for part, rows in _chunks(codes):
            values.view(-1)[part] = dequantize_exactly(codes.view(-1)[part], scales[rows], signed).cpu()
        return values

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over a state of this rule or of AdamW. It is the same to the bit if the parts of the tensors are."""
        exact = True
        for name, tensor in self.tensors.items():
            step = saved_tensor(saved, f"{name}.step", (), torch.float32, torch.device("cpu"))
            moments = self.moments[name] = _empty_moments(tensor)
            moments.step = int(step)
            for kind, signed in SIGNED.items():
                values = saved_tensor(saved, f"{name}.{kind}", tensor.shape, torch.float32, torch.device("cpu")).view(
                    -1
                )
                codes, scales = getattr(moments, kind), getattr(moments, f"{kind}_scale")
                for part, rows in _chunks(codes):
                    given = values[part].to(tensor.device)
                    new_codes, new_scales = quantize(given, signed)
                    codes.view(-1)[part], scales[rows] = new_codes, new_scales
                    exact = exact and torch.equal(dequantize_exactly(new_codes, new_scales, signed), given)
        if not exact:
            print(
                "8-bit AdamW: the moments of this checkpoint were rounded to 8 bits anew, since it was made on another layout "
                "or by another optimizer; the run goes on within that rounding"
            )


def _empty_moments(tensor: Tensor) -> _Moments:
    scales = [torch.zeros(blocks(tensor.numel()), device=tensor.device) for _ in SIGNED]
    codes = [torch.zeros_like(tensor, dtype=torch.uint8) for _ in SIGNED]
    return _Moments(codes[0], scales[0], codes[1], scales[1])


def _chunks(tensor: Tensor) -> Iterator[tuple[slice, slice]]:
    """Runs of a flat tensor, and their blocks."""
    size = CPU_CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK
    for start in range(0, tensor.numel(), size):
        yield slice(start, start + size), slice(start // BLOCK, (start + size) // BLOCK)
