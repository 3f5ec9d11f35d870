"""What the figures of the programs must reach, and whether they do."""

from __future__ import annotations

from dataclasses import dataclass

from records import Record

MEMORY = "peak memory"


@dataclass(frozen=True)
class Goal:
    """Of all records of a program whose `what` begins and ends so.

    Attributes:
        ratio: at least this, ours beside the peer's.
        at_most: ours, in its unit; for figures without a peer.
    """

    program: str
    begins: str = ""
    ratio: float | None = None
    at_most: float | None = None
    ends: str = ""

    def fits(self, record: Record) -> bool:
        memory = record.what.endswith(MEMORY) and not self.ends
        right = self.program in ("", record.program) and not memory
        return right and record.what.startswith(self.begins) and record.what.endswith(self.ends)

    def met(self, record: Record) -> bool | None:
        """None where nothing was measured."""
        if self.at_most is not None:
            return None if record.ours is None else record.ours <= self.at_most
        assert self.ratio is not None
        return None if record.ratio is None else record.ratio >= self.ratio

    def text(self, record: Record) -> str:
        return f"<= {self.at_most:g} {record.unit}" if self.at_most is not None else f">= {self.ratio:g}"


# The first that fits a record holds for it.
GOALS = (
    Goal("", ends=MEMORY, ratio=1.0),
    Goal("train", "full fine-tune of 135M", 1.3),
    Goal("train", "full training step of 135M", 1.3, ends="full rows of 128"),
    Goal("packing", "LoRA on uneven rows", 2.5),
    Goal("litgpt_side", "LoRA", 1.1),
    Goal("preprocess", "preprocess", 1.0),
    Goal("generate", "batch_1", 1.8),
    Goal("generate", "batch_8", 2.0),
    Goal("generate", "uneven", 4.0),
    Goal("export", "int4 bundle, decode 1, beside llama.cpp", 1.4),
    Goal("export", "int4 bundle, prefill, beside llama.cpp", 1.5),
    Goal("export", "int4 bundle, decode", 1.0, ends="onnxruntime-genai int4"),
    Goal("export", "int4, symmetric bundle, decode", 1.0, ends="onnxruntime-genai int4"),
    Goal("export", "int4, symmetric, head int4 bundle, decode", 1.0, ends="onnxruntime-genai int4"),
    Goal("export", "aoti int4 bundle, decode 1, beside llama.cpp", 1.4),
    Goal("export", "aoti int4 bundle, prefill, beside llama.cpp", 1.5),
    Goal("export", "aoti int4 bundle, decode", 1.0, ends="onnxruntime-genai int4"),
    Goal("export", "aoti fp32 bundle, decode 1", 1.2, ends="eager fp32"),
    Goal("serve", "the server's processor time", 1 / 1.1),
    Goal("serve", "served, 16 clients, int4: all tokens", 2.0),
    Goal("serve", "served, 16 clients, int4: first token", 1.0),
    Goal("convert", "convert to", 0.8),
    Goal("roofline", "pre-training step, 135M", 0.8),
    Goal("roofline", "prompt of 2,048", 0.85),
    Goal("growth", "", 0.85),  # 1 less what its exponent has above the law's
    Goal("startup", "arriero --help", at_most=0.3),
    Goal("startup", "import arriero", at_most=0.1),
    Goal("startup", "packages", at_most=25),
    Goal("startup", "wheel", at_most=1.0),
)


def goal_of(record: Record) -> Goal | None:
    """The goal of a record, if it has one."""
    return next((goal for goal in GOALS if goal.fits(record)), None)


def row(record: Record, place: str = "") -> str:
    """Of the table: goal beside the measured.

    Args:
        place: where it was measured.
    """
    goal = goal_of(record)
    met = goal.met(record) if goal is not None else None
    each = ", ".join(f"{ratio:.2f}" for ratio in record.ratios)
    ratio = "" if record.ratio is None else f"{record.ratio:.2f}" + (f" ({each})" if len(record.ratios) > 1 else "")
    ours = "" if record.ours is None else f"{record.ours:,.4g} {record.unit}"
    peer = record.peer_name + ("" if record.peer is None else f": {record.peer:,.4g} {record.unit}")
    word = "" if goal is None else {True: "yes", False: "**no**", None: "not measured"}[met]
    note = record.note if record.ours is None else ""
    cells = (record.what, record.dtype, str(record.threads), ours, peer, ratio)
    return f"| {' | '.join(cells)} | {goal.text(record) if goal is not None else ''} | {word or note} | {place} |"


HEADING = """| What | type | threads | arriero | beside | ratio (each round) | goal | met | on |
| --- | --- | ---: | --- | --- | --- | --- | --- | --- |"""
