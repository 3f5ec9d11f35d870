"""Training rows as the model sees them, for a look before anything is trained: what is learned, marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator

from arriero.config.data import DataOptions
from arriero.data.pairs import encode_pairs, load_pairs
from arriero.data.rows.report import EncodingReport
from arriero.data.samples import Sample
from arriero.data.sft import IGNORE, Example, count_format, encode_sample
from arriero.data.sources import samples_for
from arriero.data.template_rows import check_generation_prompt
from arriero.data.tokenizer import Tokenizer

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def learned_tokens(example: Example) -> list[bool]:
    """Of each token, whether it is learned; labels stand one place earlier, where they are predicted."""
    return [False, *(label != IGNORE for label in example.labels[:-1])]


def render(example: Example, tokenizer: Tokenizer, *, color: bool) -> str:
    """The text of a row, special tokens included: what is learned green and the rest dim, or what is learned in [[ ]].

    What could steer a terminal is shown as an escape: rows come from anywhere.
    """
    opening, closing = (GREEN, RESET) if color else ("[[", "]]")
    text = ""
    for piece, learned in _runs(example, tokenizer):
        shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in piece)
        if learned:
            text += opening + shown + closing
        else:
            text += DIM + shown + RESET if color else shown
    return text


def _runs(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Stretches of text that are learned or are not; a character that a run's last token leaves open goes to the next."""
    decoder = tokenizer.stream_decoder(skip_special_tokens=False)
    piece, current = "", False
    for token_id, learned in zip(example.input_ids, learned_tokens(example), strict=True):
        if learned != current:
            if piece:
                yield piece, current
            piece, current = "", learned
        piece += decoder.push(token_id)
    piece += decoder.flush()
    if piece:
        yield piece, current


def describe(sample: Sample, example: Example, context_cut: bool, target_cut: bool) -> str:
    """A row's place, its tokens and what was cut."""
    parts = [sample.where or sample.id or "row", f"{example.length:,} tokens", f"{example.label_count:,} learned"]
    parts += ["context cut to fit src_length"] if context_cut else []
    parts += ["answer cut to fit tgt_length"] if target_cut else []
    return f"--- {', '.join(parts)} ---"


def wants_color(choice: str) -> bool:
    """Whether to colour: `always`, `never`, or `auto`: on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return choice == "always"


def preview(data: DataOptions, tokenizer: Tokenizer, count: int, *, color: bool) -> str:
    """The first `count` training rows, rendered, with a line above each.

    Raises:
        ConfigError, DataError, TemplateError: what would stop the training too.
    """
    samples = samples_for(data, ["train"])["train"]
    blocks = []
    for number, sample in enumerate(samples[:count]):
        if number == 0 and sample.chat and tokenizer.has_chat_template():
            check_generation_prompt(tokenizer)
        example, *cut = encode_sample(sample, tokenizer, data.lengths, train_on=data.train_on)
        blocks.append(f"{describe(sample, example, *cut)}\n{render(example, tokenizer, color=color)}\n")
    shown = f"{min(count, len(samples)):,} of {len(samples):,} training rows; nothing was trained"
    return "\n".join([*blocks, *_notes(samples, tokenizer), shown])


def _notes(samples: Iterable[Sample], tokenizer: Tokenizer) -> list[str]:
    """What a run would say of the formats of all its rows."""
    report = EncodingReport()
    for sample in samples:
        count_format(report, sample)
    notes = [report.mixed] if report.mixed else []
    return [*notes, report.hint] if report.bare and tokenizer.has_chat_template() else notes


def preview_pairs(data: DataOptions, tokenizer: Tokenizer, count: int, *, color: bool) -> str:
    """`preview` of preference data: each pair's better and worse answer."""
    assert data.dataset_path is not None
    limits = {"train": data.max_train_samples}
    samples = load_pairs(data.dataset_path, ["train"], limits, data.val_size)["train"]
    pairs, report = encode_pairs(samples[:count], tokenizer, data.lengths)
    blocks = [
        f"--- pair {number}, {name}, {example.length:,} tokens, {example.label_count:,} learned ---\n"
        f"{render(example, tokenizer, color=color)}\n"
        for number, pair in enumerate(pairs, start=1)
        for name, example in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    return "\n".join([*blocks, str(report), f"{len(pairs):,} of {len(samples):,} training pairs; nothing was trained"])
