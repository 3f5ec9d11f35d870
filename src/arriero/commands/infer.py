"""`arriero infer`: run an exported bundle. Of a kind that needs no torch, nothing here imports it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.commands.terminal import without_controls
from arriero.config.infer import BundleGenerationOptions, InferOptions
from arriero.errors import ConfigError

if TYPE_CHECKING:
    from arriero.data.samples import Sample
    from arriero.engine.answer import Generation
    from arriero.engine.engine import Engine
    from arriero.engine.sampling_params import SamplingParams

HELP = "Answer prompts with a bundle made by arriero export, or measure its speed."

USUAL_PREFIX = "llama"  # PaddleNLP's
MOST_NAMED = 10

OPTIONS: tuple[type, ...] = (InferOptions, BundleGenerationOptions)


def run(infer: InferOptions, generation: BundleGenerationOptions) -> int:
    """Print every prompt with its answer."""
    from arriero.bundles.prompts import AnswerLength, fit_prompts, reports
    from arriero.bundles.running import bundle_engine, check_device, default_length
    from arriero.commands.prompt_rows import check_predict_file, read_prompts
    from arriero.engine.sampling_params import params_from_options
    from arriero.export.bundle import open_bundle

    samples = read_prompts(infer.data_file, infer.task_name, infer.data_format)
    if infer.predict_file:
        check_predict_file(infer.predict_file, infer.data_file)
    start = time.perf_counter()
    bundle = open_bundle(_chosen(infer))
    check_device(bundle, infer.device)
    usual = max(default_length(bundle), generation.min_new_tokens)
    length = AnswerLength(generation.max_new_tokens or None, usual, max(1, generation.min_new_tokens))
    params = params_from_options(replace(generation, max_new_tokens=length.told or usual))
    engine = bundle_engine(bundle, generation.batch_size, infer.num_threads, device=infer.device)
    seconds = time.perf_counter() - start
    context = engine.runner.context
    fitted = fit_prompts(samples, engine.tokenizer, context, infer.src_length, length)
    for report in reports(fitted, context, infer.src_length, length.told or usual):
        print(report)
    prompts = [prompt.ids for prompt in fitted]
    if infer.benchmark:
        shortest = min(prompt.answer for prompt in fitted)
        _measure(engine, prompts, replace(params, max_new_tokens=shortest), generation.batch_size, seconds)
        return 0
    each = [
        replace(
            params, max_new_tokens=prompt.answer, seed=None if generation.seed is None else generation.seed + number
        )
        for number, prompt in enumerate(fitted)
    ]
    _answer(engine, samples, prompts, each, infer)
    return 0


def _chosen(infer: InferOptions) -> Path:
    """The folder of the bundle: the one that is named, or else the only one that --model_dir holds.

    Raises:
        ConfigError: it holds several and none is named, or not the one that is.
        FormatError: it holds none.
    """
    from arriero.bundles.running import bundle_folder
    from arriero.formats.bundle_folder import is_bundle

    folder, prefix = Path(infer.model_dir).expanduser(), infer.model_prefix or USUAL_PREFIX
    held = []
    if folder.is_dir() and not (folder / prefix).is_dir() and not is_bundle(folder):
        held = sorted(path.name for path in folder.iterdir() if is_bundle(path))
    if not held:
        return bundle_folder(infer.model_dir, prefix)
    if infer.model_prefix is None and len(held) == 1:
        return folder / held[0]
    named = ", ".join(held[:MOST_NAMED]) + (f" and {len(held) - MOST_NAMED} more" if len(held) > MOST_NAMED else "")
    asked = f"no bundle {prefix}, but" if infer.model_prefix or len(held) == 1 else "several bundles,"
    raise ConfigError(f"--model_dir {folder} holds {asked} {named}: `arriero infer {folder / held[0]}` runs the first")


def _answer(
    engine: Engine,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    infer: InferOptions,
) -> None:
    """Print the answers and write them; of a run that breaks off, those that are finished."""
    from arriero.commands.prompt_rows import print_answer, write_answers
    from arriero.data.sample_text import told_answer

    answers: dict[int, str] = {}

    def keep(number: int, answer: Generation) -> None:
        answers[number] = told_answer(samples[number], answer.text)

    try:
        if infer.stream:
            _stream(engine, samples, prompts, params, answers)
        else:
            engine.generate(prompts, params, on_done=keep)
    finally:
        done = sorted(answers)
        rows = [samples[number] for number in done]
        if len(done) < len(samples):
            print(f"arriero: warning: {len(done)} of {len(samples)} prompts were answered", file=sys.stderr)
        try:
            for number in [] if infer.stream else done:
                print_answer(samples[number], answers[number])
        finally:
            if infer.predict_file and done:
                write_answers(rows, [answers[number] for number in done], Path(infer.predict_file))


def _stream(
    engine: Engine,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    answers: dict[int, str],
) -> None:
    """Print answers as they come, and put each that is whole into `answers`."""
    from arriero.data.sample_text import told_answer

    for number, (sample, prompt, own) in enumerate(zip(samples, prompts, params, strict=True)):
        print(without_controls(sample.prompt))
        pieces = []
        for piece in engine.stream(prompt, own):
            print(without_controls(piece), end="", flush=True)
            pieces.append(piece)
        print("\n" + "-" * 20)
        answers[number] = told_answer(sample, "".join(pieces))


def _measure(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, batch: int, load_seconds: float
) -> None:
    from arriero.engine.benchmark.rates import ROUNDS, measure

    found = measure(engine, [prompts[i % len(prompts)] for i in range(batch)], params)
    print(f"open and load: {load_seconds:.2f} s")
    print(f"{batch} prompts at once, of {found.prompt_tokens} tokens in all; answers of {params.max_new_tokens} tokens")
    print(f"medians of {ROUNDS}: prompts {found.prompt_rate:.1f} tokens/s, answers {found.answer_rate:.1f} tokens/s")
