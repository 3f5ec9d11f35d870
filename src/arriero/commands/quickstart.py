"""`arriero quickstart`: the main job on a real model, end to end, on this machine.

Every step leaves its result in the run folder and is skipped when that is there: the run can be stopped and started again
at any point.
"""

from __future__ import annotations

import json
import os
import shutil
import textwrap
import time
from importlib import resources
from pathlib import Path
from typing import Any

from arriero.commands.next_command import program
from arriero.config.quickstart import QuickstartOptions
from arriero.errors import ConfigError
from arriero.output_file import check_folder

HELP = "Fine-tune a real model on this machine, see its score rise on questions it has not seen, and talk to it."

OPTIONS: tuple[type, ...] = (QuickstartOptions,)

SRC_LENGTH, ANSWER_TOKENS = 512, 24
BEFORE = "before"  # the result that is written first
EXAMPLES = 3


def run(options: QuickstartOptions) -> int:
    """Score, fine-tune, score again, merge."""
    started = time.monotonic()
    data = Path(options.dataset_path or str(resources.files("arriero") / "assets/quickstart"))
    if not data.exists():
        raise ConfigError(f"--dataset_path {data}: no such file or folder")
    folder = Path(options.output_dir)
    check_folder(folder, "--output_dir")
    _check_own(folder)

    _headline(1, "the model")
    from arriero.formats.download import resolve_model

    model = resolve_model(options.model_name_or_path, cache_dir=Path(options.cache_dir) if options.cache_dir else None)
    print(f"{options.model_name_or_path}: {model}")

    _headline(2, "its score on questions it has not seen, before")
    before = _score(options, model, None, data, folder / f"{BEFORE}.json")

    _headline(3, "LoRA fine-tuning")
    adapter = folder / "adapter"
    if (adapter / "all_results.json").is_file():
        print(f"done already: {adapter}")
    else:
        _finetune(options, model, data, adapter)

    _headline(4, "its score on the same questions, after")
    after = _score(options, model, adapter, data, folder / "after.json")
    _table(before, after)

    _headline(5, "one model of base and adapter")
    merged = folder / "model"
    if (merged / "config.json").is_file():
        print(f"done already: {merged}")
    else:
        _merge(model, adapter, merged)
    _hints(model, adapter, merged, data)
    print(f"\ndone in {_minutes(time.monotonic() - started)}; everything is in {folder}")
    return 0


def _check_own(folder: Path) -> None:
    """Refuse a folder of the user's: what this verb writes there it also deletes, as a merge that was interrupted.

    Raises:
        ConfigError: it holds files, and an earlier quickstart's first result is not among them.
    """
    found = sorted(path.name for path in folder.iterdir() if path.name != f"{BEFORE}.partial")
    if found and not (folder / f"{BEFORE}.json").is_file():
        raise ConfigError(
            f"--output_dir {folder} holds other files ({found[0]}): name a new or empty folder, or that of an earlier "
            "quickstart"
        )


def _headline(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _score(options: QuickstartOptions, model: Path, adapter: Path | None, data: Path, target: Path) -> dict[str, Any]:
    """Exact match, F1 and the answers on the held-out questions; kept in `target`."""
    if target.is_file():
        result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        print(f"done already: exact match {result['exact_match']:.1f}, F1 {result['f1']:.1f}")
        return result
    from tqdm import tqdm

    from arriero.config.adapter import AdapterPathOptions
    from arriero.config.model import ModelOptions
    from arriero.config.row_lengths import RowLengths
    from arriero.data.sources import load_samples
    from arriero.engine.loading import load_for_inference
    from arriero.engine.sampling_params import SamplingParams
    from arriero.training.generation_metrics import generate_answers, references_of, score

    samples = load_samples(str(data), None, "squad_qa", ["dev"])["dev"][: options.max_eval_samples]
    loaded = load_for_inference(
        ModelOptions(model_name_or_path=str(model)), AdapterPathOptions(lora_path=str(adapter) if adapter else None)
    )
    start = time.monotonic()
    with tqdm(total=len(samples), unit="question", leave=False, disable=options.disable_tqdm or None) as bar:
        answers = generate_answers(
            loaded,
            samples,
            lengths=RowLengths(SRC_LENGTH, ANSWER_TOKENS),
            params=SamplingParams(max_new_tokens=ANSWER_TOKENS),
            on_done=bar.update,
        )
    result = {
        **score(answers),
        "questions": len(samples),
        "answers": [
            {
                "question": answer.sample.after.strip().removeprefix("Question: ").removesuffix("\nAnswer:"),
                "reference": references_of(answer.sample)[0],
                "output": answer.text,
            }
            for answer in answers
        ],
    }
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, target)
    print(
        f"{len(samples)} questions in {time.monotonic() - start:.0f} s: "
        f"exact match {result['exact_match']:.1f}, F1 {result['f1']:.1f}"
    )
    return result


def _finetune(options: QuickstartOptions, model: Path, data: Path, adapter: Path) -> None:
    from arriero.config import compatibility
    from arriero.config.adapter import AdapterOptions
    from arriero.config.checkpoint import CheckpointOptions
    from arriero.config.data import DataOptions
    from arriero.config.logging import LoggingOptions
    from arriero.config.model import ModelOptions
    from arriero.config.optimization import OptimizationOptions
    from arriero.config.parallel import ParallelOptions
    from arriero.config.precision import PrecisionOptions
    from arriero.config.quantization import QuantizationOptions
    from arriero.training.finetune_options import FinetuneOptions
    from arriero.training.finetuning import finetune

    finetuning = FinetuneOptions(
        model=ModelOptions(model_name_or_path=str(model)),
        data=DataOptions(
            task_name="squad_qa",
            dataset_path=str(data),
            src_length=SRC_LENGTH,
            tgt_length=ANSWER_TOKENS,
            max_train_samples=options.max_train_samples,
        ),
        optimization=OptimizationOptions(
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            num_train_epochs=1,
            max_steps=options.max_steps,
            warmup_ratio=0.05,
        ),
        precision=PrecisionOptions(),
        adapter=AdapterOptions(lora=True, lora_rank=8),
        quantization=QuantizationOptions(),
        parallel=ParallelOptions(),
        checkpoint=CheckpointOptions(
            output_dir=str(adapter),
            resume_from_checkpoint="auto" if adapter.exists() else None,
            save_steps=20,
            save_total_limit=1,
        ),
        logging=LoggingOptions(logging_steps=5, report_to=["none"], disable_tqdm=options.disable_tqdm),
    )
    compatibility.check(finetuning.groups)
    finetune(finetuning)


def _merge(model: Path, adapter: Path, target: Path) -> None:
    from arriero.commands import merge
    from arriero.config.adapter import AdapterPathOptions
    from arriero.config.merging import MergeOptions
    from arriero.config.model import ModelOptions

    shutil.rmtree(target, ignore_errors=True)  # what an interrupted merge left
    merge.merge_and_say(
        ModelOptions(model_name_or_path=str(model)),
        AdapterPathOptions(lora_path=str(adapter)),
        MergeOptions(output_path=str(target)),
    )


def _table(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Scores and a few answers, before and after, side by side."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    column = (width - 4) // 2
    print(f"\n{'':16}{'before':>10}{'after':>10}")
    for key, name in (("exact_match", "exact match"), ("f1", "F1")):
        print(f"{name:16}{before[key]:10.1f}{after[key]:10.1f}")
    pairs = list(zip(before["answers"], after["answers"], strict=True))
    learned = [pair for pair in pairs if pair[0]["output"] != pair[1]["output"]] or pairs
    step = max(1, len(learned) // EXAMPLES)
    for old, new in learned[::step][:EXAMPLES]:
        print(f"\n{textwrap.shorten(new['question'], width)}  (expected: {new['reference']})")
        left = textwrap.wrap("before: " + " ".join(old["output"].split()), column) or [""]
        right = textwrap.wrap("after: " + " ".join(new["output"].split()), column) or [""]
        for i in range(max(len(left), len(right))):
            print(f"  {left[i] if i < len(left) else '':{column}}  {right[i] if i < len(right) else ''}")


def _hints(model: Path, adapter: Path, merged: Path, data: Path) -> None:
    name = program()
    print(
        f"""
What to try next:
  talk to it       {name} chat --model_name_or_path {merged}
  score it         {name} evaluate --model_name_or_path {merged} --task_name squad_qa --dataset_path {data}
  your own data    {name} finetune --model_name_or_path {model} --dataset_path YOUR_FOLDER --output_dir runs/mine \\
                       --lora --learning_rate 3e-4
  all weights      {name} finetune --config {adapter / "config.yaml"} --lora no --learning_rate 5e-5 --output_dir runs/full
  the curve        {adapter / "loss.png"}
  every option     {name} finetune --help"""
    )
