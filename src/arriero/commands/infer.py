"""`arriero infer`: run an exported bundle. Of a kind that needs no torch, nothing here imports it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.commands.terminal import without_controls
from arriero.config.infer import BundleGenerationOptions, InferOptions

if TYPE_CHECKING:
    from arriero.data.samples import Sample
    from arriero.engine.engine import Engine
    from arriero.engine.sampling_params import SamplingParams

HELP = "Answer prompts with a bundle made by arriero export, or measure its speed."

OPTIONS: tuple[type, ...] = (InferOptions, BundleGenerationOptions)


def run(infer: InferOptions, generation: BundleGenerationOptions) -> int:
    """Print every prompt with its answer."""
    from arriero.bundles.running import bundle_engine, bundle_folder, check_device, default_length
    from arriero.commands.prompt_rows import check_predict_file, print_answer, read_prompts, write_answers
    from arriero.data.prompt_tokens import fit_prompt
    from arriero.data.sample_text import told_answer
    from arriero.engine.sampling_params import params_from_options
    from arriero.export.bundle import open_bundle

    samples = read_prompts(infer.data_file, infer.task_name, infer.data_format)
    if infer.predict_file:
        check_predict_file(infer.predict_file, infer.data_file)
    start = time.perf_counter()
    bundle = open_bundle(bundle_folder(infer.model_dir, infer.model_prefix))
    check_device(bundle, infer.device)
    if not generation.max_new_tokens:
        generation = replace(generation, max_new_tokens=default_length(bundle))
    params = params_from_options(generation)
    engine = bundle_engine(bundle, generation.batch_size, infer.num_threads, device=infer.device)
    seconds = time.perf_counter() - start
    prompts, cut = [], 0
    for sample in samples:
        ids, shortened = fit_prompt(sample, engine.tokenizer, infer.src_length)
        prompts.append(ids)
        cut += shortened
    if cut:
        print(f"{cut} of {len(samples)} prompts were cut to --src_length {infer.src_length}")
    if infer.benchmark:
        _measure(engine, prompts, params, generation.batch_size, seconds)
        return 0
    each = [
        params if generation.seed is None else replace(params, seed=generation.seed + i) for i in range(len(prompts))
    ]
    if infer.stream:
        answers = _stream(engine, samples, prompts, each)
    else:
        found = engine.generate(prompts, each)
        answers = [told_answer(sample, answer.text) for sample, answer in zip(samples, found, strict=True)]
        for sample, answer in zip(samples, answers, strict=True):
            print_answer(sample, answer)
    if infer.predict_file:
        write_answers(samples, answers, Path(infer.predict_file))
    return 0


def _stream(
    engine: Engine, samples: Sequence[Sample], prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[str]:
    """Print answers as they come."""
    from arriero.data.sample_text import told_answer

    answers = []
    for sample, prompt, own in zip(samples, prompts, params, strict=True):
        print(without_controls(sample.prompt))
        pieces = []
        for piece in engine.stream(prompt, own):
            print(without_controls(piece), end="", flush=True)
            pieces.append(piece)
        print("\n" + "-" * 20)
        answers.append(told_answer(sample, "".join(pieces)))
    return answers


def _measure(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, batch: int, load_seconds: float
) -> None:
    from arriero.engine.benchmark.rates import ROUNDS, measure

    found = measure(engine, [prompts[i % len(prompts)] for i in range(batch)], params)
    print(f"open and load: {load_seconds:.2f} s")
    print(f"{batch} prompts at once, of {found.prompt_tokens} tokens in all; answers of {params.max_new_tokens} tokens")
    print(f"medians of {ROUNDS}: prompts {found.prompt_rate:.1f} tokens/s, answers {found.answer_rate:.1f} tokens/s")
