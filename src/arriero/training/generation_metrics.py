"""Scores of generated answers: exact match and F1 for question answering, ROUGE and BLEU for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from arriero.config.data import DataOptions
from arriero.data.samples import Sample
from arriero.data.sft import fit_prompt
from arriero.data.squad import exact_match, f1_score
from arriero.engine.generation import Generation, Generator
from arriero.engine.loading import LoadedModel
from arriero.engine.sampling import SamplingParams
from arriero.errors import DataError, require
from arriero.parallel.generation import for_generation


@dataclass(frozen=True)
class Answer:
    """A generated answer beside what was asked."""

    sample: Sample
    text: str


def generate_answers(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    *,
    src_length: int,
    params: SamplingParams,
    batch_size: int = 32,
    on_done: Callable[[int], object] | None = None,
) -> list[Answer]:
    """One answer for each sample, in order; `on_done` is called with 1 as each is finished."""
    prompts = [fit_prompt(sample, loaded.tokenizer, src_length)[0] for sample in samples]
    generator = Generator(for_generation(loaded.model), loaded.tokenizer, max_batch_size=batch_size)

    def done(_: int, __: Generation) -> None:
        if on_done:
            on_done(1)

    return [
        Answer(sample, clean(generation.text))
        for sample, generation in zip(samples, generator.generate(prompts, params, on_done=done), strict=True)
    ]


def clean(text: str) -> str:
    """The answer alone: no outer blanks, no leading "question:" (as a prefix, never as a set of letters)."""
    return text.strip().removeprefix("question:").strip()


def score(answers: Sequence[Answer]) -> dict[str, float]:
    """Metrics in percent.

    Extractive answers (several references or a question-answering prompt): `exact_match` and `f1` by SQuAD's definition.
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
        return {
            "exact_match": 100.0 * sum(exact_match(text, refs) for text, refs in scored) / len(scored),
            "f1": 100.0 * sum(f1_score(text, refs) for text, refs in scored) / len(scored),
        }
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


def references_of(sample: Sample) -> tuple[str, ...]:
    """The answers that count as right."""
    return sample.references or ((clean(sample.target),) if sample.target else ())


def evaluate_generation(
    loaded: LoadedModel, samples: Sequence[Sample], data: DataOptions, batch_size: int
) -> dict[str, float]:
    """Generate greedily and score: the evaluation of `--eval_with_do_generation`."""
    params = SamplingParams(max_new_tokens=data.tgt_length)
    was_training = loaded.model.training
    loaded.model.eval()
    answers = generate_answers(loaded, samples, src_length=data.src_length, params=params, batch_size=batch_size)
    loaded.model.train(was_training)
    return score(answers)
