"""Whether a torch or an aoti bundle computes what the model computes; see `self_check`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.export.integer_tiles import levels_of
from arriero.export.self_check import EXACT, NEW_TOKENS, ORIGINAL, PROMPTS, ROUNDED, Check, SourceModel, generate
from arriero.export.slot_runner import SlotRunner
from arriero.export.torch_weights import MatrixForm, weight_parts
from arriero.export.weight_names import EMBEDDING
from arriero.export.weight_source import WeightSource
from arriero.formats.verification import relative_difference
from arriero.models.weight_shapes import HEAD

# Of the root mean square of the differences beside the stored weights, as a share of that of the logits, where products are
# computed in half precision.
COMPUTED = {torch.float16: 0.01, torch.bfloat16: 0.05}
# A logit of this size may differ by EXACT, a larger one by as much more.
_LOGIT = 32.0


class RoundedModel(SourceModel):
    """The model that is exported, its matrices rounded as a bundle stores them."""

    def __init__(self, source: WeightSource, form: MatrixForm) -> None:
        super().__init__(source)
        self._form = form
        # of each weight those that are one matrix with it
        self._beside = {name: parts for parts in weight_parts(source.config).values() for name in parts}

    def _read(self, name: str) -> Tensor:
        value = super()._read(name)
        if value.dim() != 2:
            return value
        bits = self._form.bits_of(name)
        if bits is None:
            return value.to(self._form.dtype).double()
        tied = name == HEAD and self._config.tie_word_embeddings
        name = EMBEDDING if tied else name
        bits = 8 if self._source.wider(self._beside[name]) else bits
        found = levels_of(self._source, [name], bits).dequantized(value.shape[1])
        update = self._source.update([name]) if bits == 4 else None
        return found if update is None else found + update.up.double() @ update.down.double()


def check_runner(
    runner: SlotRunner, source: WeightSource, form: MatrixForm, name: str, computed: torch.dtype = torch.float32
) -> Check:
    """Generate greedily, twice in the same slots, and compare every logit with those of the eager model in fp64, with the
    stored weights and with the original ones.

    Args:
        runner: with a slot for each of `PROMPTS`, without a prefix.
        form: that matrices are stored in.
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
    stored = original if form == MatrixForm() else RoundedModel(source, form).logits(sequences, new_tokens)
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
    if form.bits is not None:
        how, value, bound = "relatively by", found.relative_difference, ROUNDED
    elif computed == torch.float32:
        how, value, bound = "by", found.largest_difference, EXACT * max(1.0, found.largest_logit / _LOGIT)
    else:
        how, value, bound = "relatively by", found.relative_difference, COMPUTED[computed]
    if not value <= bound:
        raise FormatError(f"{name}: its logits differ from the model's {how} {value:.1e}, and {bound:g} is allowed")
    if not found.original_difference <= ORIGINAL[form.name]:
        raise FormatError(
            f"{name}: its logits differ from those of the original weights relatively by {found.original_difference:.1e}, and "
            f"{ORIGINAL[form.name]:g} is allowed for {form.name}"
        )
    if not found.repeats:
        raise FormatError(f"{name}: a second run in the same slots gave other logits")
    return found


def _share(logits: Tensor, tokens: Tensor) -> float:
    """Of tokens that are the likeliest."""
    return float((logits.argmax(-1) == tokens).double().mean())
