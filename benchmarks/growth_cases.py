"""The curves of `growth.py`: what grows, at which points, and what one point trains or answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from arriero.config.layout import Layout
from arriero.training.planning.setup import TrainingSetup

TRAINED_SEQUENCE, TRAINED_BATCH, LAYERS = 256, 2, 6
DECODED_PROMPT, DECODED_NEW = 128, 24
ASKED_PROMPT, ASKED_NEW, ASKED_EACH = 96, 32, 2  # bytes of a question, tokens of an answer, questions of a client
RANK_ROWS, RANK_SEQUENCE = 16, 128  # rows of a step of all processes together, tokens of a row


@dataclass(frozen=True)
class Curve:
    """One thing that grows.

    Attributes:
        title: of its pictures and rows.
        x: what grows, with its unit.
        points: where it is measured.
        time: what is timed.
        beyond: points that are only computed.
    """

    title: str
    x: str
    points: tuple[int, ...]
    time: str
    beyond: tuple[int, ...] = ()

    def chosen(self, *, quick: bool) -> tuple[int, ...]:
        return self.points[:2] if quick else self.points


CURVES = {
    "train-sequence": Curve("training step", "tokens of a row", (512, 1024, 2048, 4096), "a step of one row"),
    "train-batch": Curve("training step", "rows of 256 tokens", (2, 4, 8, 16), "a step"),
    "train-layers": Curve("training step", "layers", (4, 8, 16, 32), "a step of 2 x 256 tokens"),
    "prefill": Curve("prompt", "tokens of a prompt", (512, 1024, 2048, 4096, 8000), "the first token"),
    "decode": Curve("decoding", "running requests", (1, 4, 8, 16, 32, 64), "a step"),
    "corpus": Curve("preprocess, 1 worker", "MB of JSON lines", (4, 16, 64), "the corpus"),
    "clients": Curve("served", "clients", (1, 4, 8, 16, 32), "all answers, 2 for each client"),
    "ranks": Curve(
        "training on gloo, stage 3", "processes of 1 thread", (1, 2, 4), "a step of 16 x 128 tokens", (8, 16)
    ),
}


def training_setup(curve: str, x: int) -> tuple[int, TrainingSetup]:
    """Layers, and how they are trained."""
    setup = TrainingSetup(batch=TRAINED_BATCH, sequence=TRAINED_SEQUENCE)
    if curve == "train-sequence":
        return LAYERS, replace(setup, batch=1, sequence=x)
    if curve == "train-batch":
        return LAYERS, replace(setup, batch=x)
    if curve == "train-layers":
        return x, setup
    layout = Layout(dp_shard=x, stage=3) if x > 1 else Layout()
    return LAYERS, replace(setup, batch=RANK_ROWS // x, sequence=RANK_SEQUENCE, layout=layout)
