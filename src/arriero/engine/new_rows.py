"""Values for the rows that a larger vocabulary adds to embedding and output head: the mean of the rows that were there.

So a new token is at first as likely as tokens are on average, and takes at most the share of one token of the
probability of the others (J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021); rows drawn
near 0 may take nearly all of it. transformers' `mean_resizing` draws from the normal distribution with the mean and the
covariance of the old rows; its draws stay close to the mean (the covariance is scaled by 1e-9). Here it is the mean itself,
so that nothing depends on a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.formats.parts import Placement
from arriero.models.llama import LlamaForCausalLM
from arriero.models.vocabulary import EMBEDDING, HEAD, resize_vocabulary
from arriero.parallel.materialize import Values

READ_NUMBERS = 2**24  # of a matrix that are in memory at a time


@dataclass(frozen=True)
class NewRows:
    """Which rows of embedding and head are new.

    Attributes:
        known: rows that had a token before: their mean is the new value.
        tokens: rows that have a token now; those from `known` on are new, also where the model had spare rows for them,
            which no training has made mean anything.
        held: rows in the file.
        rows: rows of the larger matrix.
    """

    known: int
    tokens: int
    held: int
    rows: int

    def values(self, read: Values) -> Values:
        """The values of the larger model: every process computes the same mean, to the bit, however rows are shared out."""
        means: dict[str, Tensor] = {}

        def value(name: str, placement: Placement) -> Tensor:
            if name not in (EMBEDDING, HEAD):
                return read(name, placement)
            first, count = placement.offset[0], placement.size[0]
            kept = max(0, min(self.held, first + count) - first)
            whole = (self.held, placement.shape[1])
            old = Placement(whole, placement.offset, (kept, placement.size[1]))
            new = [row for row in range(count) if self._is_new(first + row)]
            if not new:
                return read(name, old)
            box = torch.empty(placement.size)
            if kept:
                box[:kept] = read(name, old)
            if name not in means:
                means[name] = mean_row(lambda where: read(name, where), self.known, whole)
            box[new] = means[name][placement.box[1]]
            return box

        return value

    def _is_new(self, row: int) -> bool:
        return self.known <= row < self.tokens or row >= self.held


def mean_row(read: Callable[[Placement], Tensor], rows: int, shape: tuple[int, int]) -> Tensor:
    """The mean of the first rows of a matrix of this shape, in fp32.

    Sums are of halves, in fp64: the same to the bit in every process, whatever its device and its number of threads.
    """
    step = max(1, READ_NUMBERS // shape[1])
    total = torch.zeros(shape[1], dtype=torch.float64)
    for first in range(0, rows, step):
        where = Placement(shape, (first, 0), (min(step, rows - first), shape[1]))
        block = read(where).to("cpu", torch.float64)
        while len(block) > 1:
            half = len(block) // 2
            odd = block[2 * half :]
            block = torch.cat([block[:half] + block[half : 2 * half], odd])
        total += block[0]
    return (total / rows).float()


@torch.no_grad()
def fill(model: LlamaForCausalLM, new: NewRows, read: Values) -> None:
    """Make a loaded model's embedding and head larger, in place, with the old rows as they are in the file."""
    values = new.values(read)
    resize_vocabulary(model, new.rows)
    filled = {EMBEDDING: model.model.embed_tokens.weight}
    if not model.config.tie_word_embeddings:
        filled[HEAD] = model.lm_head.weight
    for name, weight in filled.items():
        weight.copy_(values(name, Placement.whole(tuple(weight.shape))))
