"""`arriero predict`: answer a file of prompts, or the two built-in ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.config.adapter import AdapterPathOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.generation import GenerationOptions, PredictOptions
from arriero.config.kv_cache import KVCacheOptions
from arriero.config.model import ModelOptions
from arriero.config.speculation import SpeculationOptions
from arriero.errors import ConfigError

if TYPE_CHECKING:
    from arriero.data.samples import Sample
    from arriero.engine.structure import Structure

HELP = "Answer every row of a file (src, instruction, context or messages, SQuAD) with a model, or a model and its adapter."

OPTIONS: tuple[type, ...] = (
    ModelOptions,
    AdapterPathOptions,
    PredictOptions,
    SpeculationOptions,
    GenerationOptions,
    KVCacheOptions,
    CompilationOptions,
)

MAX_SCHEMA_BYTES = 1_000_000


def run(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    predict: PredictOptions,
    guesses: SpeculationOptions,
    generation: GenerationOptions,
    cache: KVCacheOptions,
    compilation: CompilationOptions,
) -> int:
    """Print every prompt with its answer and write them to --predict_file; of several processes the first does that."""
    from tqdm import tqdm

    from arriero.commands.prompt_rows import check_predict_file, read_prompts
    from arriero.config.layout import Layout
    from arriero.data.prompt_tokens import fit_prompt
    from arriero.data.run_task import warn_of_other_task
    from arriero.data.sample_text import told_answer
    from arriero.engine.loading import load_for_inference, pick_device
    from arriero.engine.sampling_params import params_from_options
    from arriero.engine.shared_generation import generate_shared
    from arriero.engine.speculating import speculation_over
    from arriero.formats.staging import check_target
    from arriero.parallel.processes import launched_size, start, stop

    if predict.merge_tensor_parallel_path:
        if adapter.lora_path:
            raise ConfigError(
                "--merge_tensor_parallel_path joins shards and --lora_path names an adapter: run arriero merge with the "
                "second instead"
            )
        check_target(predict.merge_tensor_parallel_path, "--merge_tensor_parallel_path")
    size, stages = launched_size(), predict.pipeline_parallel_degree
    if size % stages:
        needed = -(-size // stages) * stages
        raise ConfigError(
            f"--pipeline_parallel_degree {stages} needs a multiple of {stages} processes and this run has {size}: "
            f"start {needed} (arriero launch --nproc_per_node {needed}), or change it"
        )
    structure = _structure(predict.json_schema)
    samples = read_prompts(predict.data_file, predict.task_name, predict.data_format)
    check_predict_file(predict.predict_file, predict.data_file)
    processes = start(Layout(pp=stages, tp=size // stages), pick_device(model.device))
    if processes.first:
        add = "--task_name" if predict.data_file else "--data_file FILE --task_name"
        warn_of_other_task(model.model_name_or_path, adapter, predict.task_name, samples, add=add)
    loaded = load_for_inference(model, adapter, processes)
    prompts, cut = [], 0
    for sample in samples:
        ids, shortened = fit_prompt(sample, loaded.tokenizer, predict.src_length)
        prompts.append(ids)
        cut += shortened
    if cut and processes.first:
        print(f"{cut} of {len(samples)} prompts were cut to --src_length {predict.src_length}")
    params = replace(params_from_options(generation), structure=structure)
    rows = [
        params if generation.seed is None else replace(params, seed=generation.seed + i) for i in range(len(prompts))
    ]
    with processes.together():  # only rank 0 guesses
        speculation = speculation_over(guesses, model, loaded, generation.batch_size) if processes.first else None
    quiet = True if len(prompts) < 3 or not processes.first else None  # None: where there is no terminal
    with tqdm(total=len(prompts), unit="row", leave=False, disable=quiet) as bar:
        answers = generate_shared(
            loaded.model,
            loaded.tokenizer,
            prompts,
            rows,
            max_running=generation.batch_size,
            speculation=speculation,
            kv_cache_dtype=cache.kv_cache_dtype,
            compile=compilation.torch_compile,
            on_done=bar.update,
        )

    def publish() -> None:
        _publish(
            samples,
            [told_answer(sample, answer.text) for sample, answer in zip(samples, answers, strict=True)],
            Path(predict.predict_file),
        )
        if predict.merge_tensor_parallel_path:
            _write_model(loaded.folder, predict.merge_tensor_parallel_path)
        if speculation is not None:
            counters = speculation.counters
            print(f"guessed {counters.proposed} tokens, of which {100 * counters.acceptance:.0f} % were right")

    processes.by_first(publish)
    stop(processes)
    return 0


def _structure(schema_file: str | None) -> Structure | None:
    """The form that a file's JSON schema gives the answers."""
    if schema_file is None:
        return None
    from arriero.engine.structure import Structure

    try:
        with open(schema_file, "rb") as file:
            raw = file.read(MAX_SCHEMA_BYTES + 1)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise ConfigError(f"--json_schema {schema_file}: the file cannot be read ({reason})") from error
    if len(raw) > MAX_SCHEMA_BYTES:
        raise ConfigError(f"--json_schema {schema_file}: larger than {MAX_SCHEMA_BYTES:,} bytes; use a smaller schema")
    return Structure("json_schema", text)


def _publish(samples: Sequence[Sample], answers: Sequence[str], target: Path) -> None:
    """Print the answers and write them as JSON lines."""
    from arriero.commands.prompt_rows import print_answer, write_answers

    for sample, answer in zip(samples, answers, strict=True):
        print_answer(sample, answer)
    write_answers(samples, answers, target)


def _write_model(folder: Path, target: str) -> None:
    """A model as one folder: its shards joined and compared, or a copy of one that has none."""
    from arriero.commands.merge import merge_with_progress
    from arriero.formats import hf
    from arriero.formats.tensor_shards import is_sharded
    from arriero.formats.tied_head import read_config

    if is_sharded(folder):
        merge_with_progress(folder, target)
        return
    config = read_config(folder)
    hf.save_model(hf.open_state(folder, config), config, target, extra_files_from=folder)
    print(f"model: {target} (it was whole already)")
