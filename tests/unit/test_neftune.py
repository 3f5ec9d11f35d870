"""NEFTune: the paper's distribution, and the same noise for a row wherever it stands."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from arriero.cli import main as arriero
from arriero.data.batch import Batch, pack, pad, to_common_shape
from arriero.data.sft import Example
from arriero.models.embedding_noise import EmbeddingNoise, scramble
from arriero.training.callbacks.neftune import Neftune
from arriero.training.row_noise import RowNoise

sys.path.insert(0, str(Path(__file__).parent))
from test_run_endings import make_trainer

ALPHA, WIDTH = 5.0, 64


def rows(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]
    return [Example(row, [*row[1:], -100]) for row in drawn]


def noise_of(batch: Batch, step: int = 3, seed: int = 7) -> torch.Tensor:
    keys, lengths = RowNoise(ALPHA, seed, step).keys_and_lengths(batch)
    return EmbeddingNoise(keys, lengths, ALPHA).added_to(torch.zeros(*batch.input_ids.shape, WIDTH))


def test_scramble_is_splitmix64() -> None:
    """The first outputs of SplitMix64 with seed 1234567, as published with its reference implementation."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + golden * number) % 2**64 for number in (1, 2, 3)]
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(value) % 2**64 for value in scramble(signed)] == published


def test_each_row_has_uniform_noise_of_the_size_of_its_own_length() -> None:
    lengths = (3000, 700, 40)
    drawn = noise_of(pack(rows(*lengths)))[0]
    for length, noise in zip(lengths, torch.split(drawn, lengths), strict=True):
        bound = ALPHA / math.sqrt(length * WIDTH)
        numbers = (noise.flatten().double() / bound).sort().values
        assert -1 <= numbers[0] < numbers[-1] <= 1
        # Kolmogorov-Smirnov: of uniform numbers one sample in 10,000 is further off
        uniform = torch.linspace(-1, 1, len(numbers), dtype=torch.float64)
        assert float((numbers - uniform).abs().max()) / 2 < 2.23 / math.sqrt(len(numbers))
        neighbours = torch.corrcoef(torch.stack([noise[1:].flatten(), noise[:-1].flatten()]))[0, 1]
        channels = torch.corrcoef(torch.stack([noise[:, 1:].flatten(), noise[:, :-1].flatten()]))[0, 1]
        assert max(abs(neighbours), abs(channels)) < 4 / math.sqrt(noise.numel())


def test_a_row_has_the_same_noise_packed_padded_and_elsewhere() -> None:
    a, b, c = rows(9, 5, 7)
    packed = noise_of(pack([a, b, c]))[0]
    assert torch.equal(noise_of(pack([c, a]))[0], torch.cat([packed[14:], packed[:9]]))
    padded = noise_of(pad([a, b, c]))
    for number, (start, length) in enumerate([(0, 9), (9, 5), (14, 7)]):
        assert torch.equal(padded[number, :length], packed[start : start + length])
        assert not padded[number, length:].any()
    fitted = noise_of(to_common_shape([pack([a, b, c])], 8)[0])[0]
    assert torch.equal(fitted[:21], packed)


def test_steps_seeds_and_rows_differ() -> None:
    batch = pack(rows(9, 5))
    drawn = [noise_of(batch), noise_of(batch, step=4), noise_of(batch, seed=8), noise_of(pack(rows(9, 5)[::-1]))]
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            assert not (one == other).any()


def test_a_step_is_noisy_and_reproducible(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain")
    losses = []
    for sitting in range(2):
        trainer = make_trainer(tmp_path / str(sitting), Neftune(ALPHA, 0))
        trainer.callbacks[0].on_train_begin(trainer)
        losses.append(trainer.step().loss)
    assert losses[0] == losses[1] != plain.step().loss


def test_shared_beginnings_are_refused() -> None:
    ids = rows(90)[0].input_ids
    asked = [Example(row, [-100] * 80 + row[81:] + [-100]) for row in (ids, [*ids[:85], 1, 2])]
    batch = pack(asked, share_prefixes=True)
    assert max(map(len, batch.parts)) > 1
    with pytest.raises(ValueError, match="share their beginning"):
        RowNoise(ALPHA, 0).keys_and_lengths(batch)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--neftune_noise_alpha", "-1"], "neftune_noise_alpha"),
        (["--neftune_noise_alpha", "5", "--preference", "dpo"], "--preference dpo do not go together"),
    ],
)
def test_refused(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["finetune", "--model_name_or_path", "m", "--dataset_path", "d", "--output_dir", "x"]
    assert arriero([*run, *flags]) == 2
    assert told in capsys.readouterr().err
