"""`arriero predict`: answer a file of prompts, or the two built-in ones."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from arriero.config.adapter import AdapterPathOptions
from arriero.config.generation import GenerationOptions, PredictOptions
from arriero.config.model import ModelOptions
from arriero.errors import ConfigError, DataError

HELP = (
    "Answer every row of a jsonl file (src, instruction, context or messages) with a model, or a model and its adapter."
)

OPTIONS: tuple[type, ...] = (ModelOptions, AdapterPathOptions, PredictOptions, GenerationOptions)

_CONTEXT = (
    "The Broncos took an early lead in Super Bowl 50 and never trailed. Newton was limited by Denver's defense, which sacked "
    "him seven times and forced him into three turnovers, including a fumble which they recovered for a touchdown. Denver "
    "linebacker Von Miller was named Super Bowl MVP, recording five solo tackles, 2½ sacks, and two forced fumbles."
)
BUILT_IN = ("linebacker", "five")  # the answers whose questions PaddleNLP's example asks for


def run(
    model: ModelOptions, adapter: AdapterPathOptions, predict: PredictOptions, generation: GenerationOptions
) -> int:
    """Print every prompt with its answer and write them to --predict_file."""
    from tqdm import tqdm

    from arriero.data.samples import Sample, read_jsonl, sample_from_row
    from arriero.data.sft import fit_prompt
    from arriero.engine.generation import Generation, Generator
    from arriero.engine.loading import load_for_inference
    from arriero.engine.sampling import params_from_options

    if predict.merge_tensor_parallel_path:
        raise ConfigError(
            "--merge_tensor_parallel_path: this version reads unsharded models only; arriero merge joins an adapter"
        )
    if predict.data_file:
        samples = [
            sample_from_row(row, where, needs_target=False) for where, row in read_jsonl(Path(predict.data_file))
        ]
    else:
        samples = [Sample(f"answer: {answer} context: ", _CONTEXT, "", None, ends_prompt=True) for answer in BUILT_IN]
    if not samples:
        raise DataError(f"{predict.data_file}: holds no row")
    loaded = load_for_inference(model, adapter)
    prompts, cut = [], 0
    for sample in samples:
        ids, shortened = fit_prompt(sample, loaded.tokenizer, predict.src_length)
        prompts.append(ids)
        cut += shortened
    if cut:
        print(f"{cut} of {len(samples)} prompts were cut to --src_length {predict.src_length}")
    params = params_from_options(generation)
    rows = [
        params if generation.seed is None else replace(params, seed=generation.seed + i) for i in range(len(prompts))
    ]
    target = Path(predict.predict_file)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with tqdm(total=len(prompts), unit="row", leave=False, disable=len(prompts) < 3) as bar:

        def done(_: int, __: Generation) -> None:
            bar.update(1)

        generator = Generator(loaded.model, loaded.tokenizer, max_batch_size=generation.batch_size)
        answers = generator.generate(prompts, rows, on_done=done)
    with partial.open("w", encoding="utf-8") as file:
        for sample, answer in zip(samples, answers, strict=True):
            text = answer.text.strip()
            file.write(json.dumps({"src": sample.prompt, "output": text}, ensure_ascii=False) + "\n")
            print(f"{sample.prompt}\n{text}\n" + "-" * 20)
    os.replace(partial, target)
    print(f"{len(answers)} answers: {target}")
    return 0
