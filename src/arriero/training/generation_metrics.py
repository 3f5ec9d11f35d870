"""Scores of generated answers: exact match and F1 for question answering, ROUGE and BLEU for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from arriero.config.data import DataOptions
from arriero.config.row_lengths import RowLengths
from arriero.data.samples import Sample
from arriero.data.sft import prompt_of_row
from arriero.data.squad import exact_match, f1_score, is_unanswerable
from arriero.engine.loading import LoadedModel
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.shared_generation import generate_shared
from arriero.errors import DataError, require


@dataclass(frozen=True)
class Answer:
    """A generated answer beside what was asked."""

    sample: Sample
    text: str


def generate_answers(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    *,
    lengths: RowLengths,
    params: SamplingParams | None = None,
    batch_size: int = 32,
    compile: bool = False,
    on_done: Callable[[int], object] | None = None,
) -> list[Answer]:
    """One answer for each sample, in order; `on_done` is called with a number of them as they are finished.

    Args:
        lengths: of rows, whose prompts are asked.
        params: default: greedy, an answer as long as its row has room for.
        compile: see `TorchRunner`.
    """
    prompts = [prompt_of_row(sample, loaded.tokenizer, lengths) for sample in samples]
    rooms = [max(1, min(lengths.longest_answer, lengths.row - len(prompt))) for prompt in prompts]
    made = generate_shared(
        loaded.model,
        loaded.tokenizer,
        prompts,
        [params or SamplingParams(max_new_tokens=room) for room in rooms],
        max_running=batch_size,
        compile=compile,
        on_done=on_done,
    )
    return [Answer(sample, clean(answer.text)) for sample, answer in zip(samples, made, strict=True)]


def clean(text: str) -> str:
    """The answer alone: no outer blanks, no leading "question:" (as a prefix, never as a set of letters)."""
    return text.strip().removeprefix("question:").strip()


def score(answers: Sequence[Answer]) -> dict[str, float]:
    """Metrics in percent.

    Where every row has a prompt of question answering and references: `exact_match` and `f1` by SQuAD's definition;
    where some questions have no answer (SQuAD v2) also those of each kind, named as by the official script: `HasAns_exact`,
    `HasAns_f1`, `HasAns_total` (their number), `NoAns_exact` and so on.
    Others: `rouge1`, `rouge2`, `rougeL` (F1) and `bleu4`, which need the extra `eval`: the numbers of rouge-score (no stemmer;
    words of a-z and 0-9, so that other scripts score 0) and of sacrebleu (corpus BLEU, its tokenizer 13a). Of several
    references, ROUGE counts the best and BLEU all.

    Raises:
        DataError: if no row has a reference.
    """
    scored = [(answer.text, references_of(answer.sample)) for answer in answers]
    scored = [(text, references) for text, references in scored if references]
    if not scored:
        raise DataError("no row has an answer to compare with: scores need rows with answers")
    if all(answer.sample.chat and answer.sample.references for answer in answers):
        return _extractive(scored)
    rouge_scorer, sacrebleu = require("rouge_score.rouge_scorer", "eval"), require("sacrebleu", "eval")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    totals = dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)
    for text, references in scored:
        for name, value in scorer.score_multi(references, text).items():
            totals[name] += value.fmeasure
    metrics = {name: 100.0 * total / len(scored) for name, total in totals.items()}
    streams = zip_longest(*(references for _, references in scored))
    bleu = sacrebleu.corpus_bleu([text for text, _ in scored], [list(stream) for stream in streams])
    return {**metrics, "bleu4": float(bleu.score)}


def _extractive(scored: Sequence[tuple[str, tuple[str, ...]]]) -> dict[str, float]:
    exact = [exact_match(text, references) for text, references in scored]
    f1 = [f1_score(text, references) for text, references in scored]
    metrics = {"exact_match": 100.0 * sum(exact) / len(scored), "f1": 100.0 * sum(f1) / len(scored)}
    nothing = [is_unanswerable(references) for _, references in scored]
    if not any(nothing):
        return metrics
    for kind, wanted in (("HasAns", False), ("NoAns", True)):
        rows = [row for row in range(len(scored)) if nothing[row] == wanted]
        if rows:
            for name, values in (("exact", exact), ("f1", f1)):
                metrics[f"{kind}_{name}"] = 100.0 * sum(values[row] for row in rows) / len(rows)
            metrics[f"{kind}_total"] = len(rows)
    return metrics


def references_of(sample: Sample) -> tuple[str, ...]:
    """The answers that count as right."""
    return sample.references or ((clean(sample.target),) if sample.target else ())


def evaluate_generation(
    loaded: LoadedModel, samples: Sequence[Sample], data: DataOptions, batch_size: int
) -> dict[str, float]:
    """Generate greedily and score: the evaluation of `--eval_with_do_generation`."""
    return score(generate_answers(loaded, samples, lengths=data.lengths, batch_size=batch_size))
