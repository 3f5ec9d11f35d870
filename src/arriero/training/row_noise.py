"""What the noise of NEFTune is drawn from (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.data.batch import Batch
from arriero.models.embedding_noise import GOLDEN, scramble


@dataclass
class RowNoise:
    """The noise of a step's rows.

    A token's noise is a function of the seed, the step, its row's tokens and its position: whichever process and micro-batch
    the row is in, packed or padded, it is the same. (Two equal rows of one step get equal noise.)
    """

    alpha: float
    seed: int
    step: int = 0

    def keys_and_lengths(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, S) int64 each; see `EmbeddingNoise`.

        Raises:
            ValueError: rows that share their beginning, which is of several lengths.
        """
        if any(len(document) > 1 for document in batch.parts):
            raise ValueError("rows that share their beginning cannot have noise of their own: pack them apart")
        ids = batch.input_ids.flatten()
        sizes = torch.tensor([size for (size,) in batch.parts], device=ids.device)
        row = torch.arange(len(sizes), device=ids.device).repeat_interleave(sizes, output_size=len(ids))
        position = torch.arange(len(ids), device=ids.device) - (sizes.cumsum(0) - sizes)[row]
        marked = batch.real()
        real = torch.ones_like(ids) if marked is None else marked.to(ids.device).flatten().long()
        nothing = torch.zeros_like(sizes)
        lengths = nothing.index_add(0, row, real)
        digest = nothing.index_add(0, row, real * scramble(scramble(ids) + position * GOLDEN))  # sums wrap around
        begin = int(scramble(torch.tensor(self.seed) * GOLDEN + self.step))
        keys = scramble(scramble(digest + begin)[row] + position * GOLDEN)
        shape = batch.input_ids.shape
        return keys.view(shape), (lengths[row] * real).view(shape)
