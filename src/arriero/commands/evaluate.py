"""`arriero evaluate`: score a checkpoint on labelled rows."""

from __future__ import annotations

import json
from pathlib import Path

from arriero.config.adapter import AdapterPathOptions
from arriero.config.data import DataOptions
from arriero.config.evaluation import EvaluateOptions
from arriero.config.model import ModelOptions
from arriero.errors import ConfigError

HELP = (
    "Score a model, or a model with its adapter: loss, perplexity and token accuracy; exact match and F1 for squad_qa."
)

SQUAD_ANSWER_TOKENS = 32  # an extracted span is short

OPTIONS: tuple[type, ...] = (ModelOptions, AdapterPathOptions, DataOptions, EvaluateOptions)


def run(model: ModelOptions, adapter: AdapterPathOptions, data: DataOptions, evaluation: EvaluateOptions) -> int:
    """Print the scores, and write them with the answers where --output_dir says."""
    from tqdm import tqdm

    from arriero.data.batch import packed_batches
    from arriero.data.sft import encode_all
    from arriero.data.sources import load_samples
    from arriero.engine.loading import load_for_inference
    from arriero.engine.sampling import SamplingParams
    from arriero.training.evaluation import evaluate_loss
    from arriero.training.execution import build_execution
    from arriero.training.generation_metrics import generate_answers, references_of, score
    from arriero.training.precision import Precision

    if not (data.dataset_path or data.data_name):
        raise ConfigError("no data: give --dataset_path (a file, or a folder with dev.json)")
    samples = load_samples(data.dataset_path, data.data_name, data.task_name, ["dev"])["dev"][: data.max_eval_samples]
    loaded = load_for_inference(model, adapter)
    precision = Precision(next(loaded.model.parameters()).dtype, "O2", loaded.device)
    examples, report = encode_all(samples, loaded.tokenizer, data.src_length, data.tgt_length)
    print(f"dev: {report}")
    with tqdm(total=len(samples), unit="row", desc="loss", leave=False) as bar:
        share = not loaded.model.model.rotary.is_dynamic
        batches = packed_batches(examples, evaluation.per_device_eval_batch_size, share_prefixes=share)
        metrics = evaluate_loss(build_execution(loaded.model, precision, loaded.device), batches, bar.update)
    answers = []
    default_length = SQUAD_ANSWER_TOKENS if data.task_name == "squad_qa" else data.tgt_length
    if data.eval_with_do_generation or data.task_name == "squad_qa":
        with tqdm(total=len(samples), unit="row", desc="answers", leave=False) as bar:
            answers = generate_answers(
                loaded,
                samples,
                src_length=data.src_length,
                params=SamplingParams(max_new_tokens=evaluation.max_new_tokens or default_length),
                on_done=bar.update,
            )
        metrics |= score(answers)
    for name, value in metrics.items():
        print(f"{name:12} {value:.4f}")
    if evaluation.output_dir:
        folder = Path(evaluation.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval_results.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for answer in answers:
                row = {"id": answer.sample.id, "prompt": answer.sample.prompt, "output": answer.text}
                file.write(json.dumps({**row, "references": references_of(answer.sample)}, ensure_ascii=False) + "\n")
    return 0
