"""Whether a torch or an aoti bundle computes what the model computes; see `self_check`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.export.self_check import EXACT, NEW_TOKENS, PROMPTS, Check, SourceModel, generate
from arriero.export.slot_runner import SlotRunner
from arriero.export.weight_source import WeightSource
from arriero.formats.verification import relative_difference

# Of the root mean square of the differences beside the original weights, as a share of that of the logits.
ORIGINAL = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
# The same beside the stored weights, where products are computed in half precision.
COMPUTED = {torch.float16: 0.01, torch.bfloat16: 0.05}
# A logit of this size may differ by EXACT, a larger one by as much more.
_LOGIT = 32.0


class RoundedModel(SourceModel):
    """The model that is exported, its matrices rounded as a bundle stores them."""

    def __init__(self, source: WeightSource, dtype: torch.dtype) -> None:
        super().__init__(source)
        self._dtype = dtype

    def _read(self, name: str) -> Tensor:
        value = super()._read(name)
        return value.to(self._dtype).double() if value.dim() == 2 else value


def check_runner(
    runner: SlotRunner, source: WeightSource, dtype: torch.dtype, name: str, computed: torch.dtype = torch.float32
) -> Check:
    """Generate greedily, twice in the same slots, and compare every logit with those of the eager model in fp64, with the
    stored weights and with the original ones.

    Args:
        runner: with a slot for each of `PROMPTS`, without a prefix.
        dtype: that matrices are stored in.
        name: of the bundle, for messages.
        computed: the dtype of products.

    Raises:
        FormatError: if they differ by more than is allowed, or a second run differs from the first.
    """
    vocab_size, context = source.config.vocab_size, runner.block_size
    new_tokens = min(NEW_TOKENS, max(1, context // 2))
    sizes = [min(size, context - new_tokens) for size in PROMPTS]
    prompts = [[(7919 * (row + at + 1)) % vocab_size for at in range(size)] for row, size in enumerate(sizes)]
    tokens, logits = generate(runner, prompts, new_tokens)
    again, repeated = generate(runner, prompts, new_tokens)
    sequences = [[*ids, *new[:-1]] for ids, new in zip(prompts, tokens, strict=True)]
    given, greedy = torch.from_numpy(np.stack(logits)).double(), torch.tensor(tokens)
    original = SourceModel(source).logits(sequences, new_tokens)
    stored = original if dtype == torch.float32 else RoundedModel(source, dtype).logits(sequences, new_tokens)
    found = Check(
        largest_difference=float((given - stored).abs().max()),
        relative_difference=relative_difference(stored, given),
        largest_logit=float(stored.abs().max()),
        greedy_agreement=_share(stored, greedy),
        original_difference=relative_difference(original, given),
        original_agreement=_share(original, greedy),
        repeats=again == tokens and all(np.array_equal(a, b) for a, b in zip(logits, repeated, strict=True)),
        tokens=greedy.numel(),
    )
    if computed == torch.float32:
        how, value, bound = "by", found.largest_difference, EXACT * max(1.0, found.largest_logit / _LOGIT)
    else:
        how, value, bound = "relatively by", found.relative_difference, COMPUTED[computed]
    if not value <= bound:
        raise FormatError(f"{name}: its logits differ from the model's {how} {value:.1e}, and {bound:g} is allowed")
    if not found.original_difference <= ORIGINAL[dtype]:
        raise FormatError(
            f"{name}: its logits differ from those of the original weights relatively by {found.original_difference:.1e}, and "
            f"{ORIGINAL[dtype]:g} is allowed for {str(dtype).removeprefix('torch.')}"
        )
    if not found.repeats:
        raise FormatError(f"{name}: a second run in the same slots gave other logits")
    return found


def _share(logits: Tensor, tokens: Tensor) -> float:
    """Of tokens that are the likeliest."""
    return float((logits.argmax(-1) == tokens).double().mean())
