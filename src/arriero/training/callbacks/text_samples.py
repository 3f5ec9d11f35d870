"""Texts that the model writes while it learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from arriero.data.tokenizer import Tokenizer
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.shared_generation import generate_shared
from arriero.errors import ConfigError
from arriero.models.llama import LlamaForCausalLM
from arriero.training.callbacks.evaluation import is_due
from arriero.training.callbacks.records import drop_later, writing
from arriero.training.callbacks.stop_signals import asked_to_stop
from arriero.training.checkpoint import random_state, restore_random_state
from arriero.training.trainer import Callback, StepRecord, Trainer

SAMPLES = "samples.jsonl"
MAX_PROMPTS, MAX_FILE_BYTES = 64, 1_000_000


def read_prompts(sources: Sequence[str]) -> list[str]:
    """The prompts of `--sample_prompts`: each a text, or a text file with a prompt in each line that is not blank.

    Raises:
        ConfigError: a file that is missing, too large or not UTF-8, or more than `MAX_PROMPTS` prompts.
    """
    prompts: list[str] = []
    for source in sources:
        path = Path(source)
        looks_like_file = "\n" not in source and path.suffix == ".txt" and len(source.split()) == 1
        if not looks_like_file and not (len(source) < 256 and path.is_file()):
            prompts.append(source)
            continue
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
            lines = raw.decode("utf-8-sig").splitlines()
        except OSError as error:
            raise ConfigError(f"--sample_prompts {source}: the file cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--sample_prompts {source}: not a UTF-8 text file") from error
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"--sample_prompts {source}: larger than {MAX_FILE_BYTES:,} bytes; give a prompt a line")
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--sample_prompts {' '.join(sources)}: holds no prompt")
    if len(prompts) > MAX_PROMPTS:
        raise ConfigError(f"--sample_prompts gives {len(prompts)} prompts: at most {MAX_PROMPTS} are continued")
    return prompts


class TextSamples(Callback):
    """Continues some prompts at every evaluation; prints the texts and adds them to `samples.jsonl` with the step.

    The run is not changed by it: the model is put back into training mode, and the random generators to where they were. With
    a temperature, a prompt is continued with the same random numbers at every step, so that the texts can be compared.

    Args:
        prompts: texts; they begin as the model's tokenizer begins a text, with bos for instance.
        max_new_tokens: longest continuation in tokens.
        temperature: 0 takes the likeliest token always.
        strategy, every: as those of `Evaluation`.

    Raises:
        ConfigError: a prompt that leaves no room for `max_new_tokens`, or has no tokens.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        strategy: str,
        every: int,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, list(prompts)
        self.strategy, self.every = strategy, every
        ids = tokenizer.encode_batch(self.prompts, add_special_tokens=True)
        # an eos that the tokenizer sets behind every text would end it
        suffix = tokenizer.eos_token_id
        self.ids = [row[:-1] if len(row) > 1 and row[-1] == suffix else row for row in ids]
        room = model.context - max_new_tokens
        for prompt, row in zip(self.prompts, self.ids, strict=True):
            if not 0 < len(row) <= room:
                raise ConfigError(
                    f"--sample_prompts: {prompt[:40]!r} has {len(row)} tokens and the model {max(0, room)} positions beside "
                    f"--sample_tokens {max_new_tokens}: shorten one of them"
                )
        self.params = [
            SamplingParams(
                max_new_tokens=max_new_tokens,
                temperature=temperature or 1.0,
                do_sample=temperature > 0,
                seed=seed + index,
            )
            for index in range(len(self.ids))
        ]

    def on_train_begin(self, trainer: Trainer) -> None:
        self.path = trainer.run_folder / SAMPLES
        if trainer.processes.first:
            drop_later(self.path, trainer.state.step)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if not is_due(trainer, self.strategy, self.every) or asked_to_stop(trainer.processes):
            return
        before = random_state()
        try:
            texts = generate_shared(self.model, self.tokenizer, self.ids, self.params)
        finally:
            restore_random_state(before)
        if not trainer.processes.first:  # it has the same texts
            return
        step = trainer.state.step
        rows = zip(self.prompts, texts, strict=True)
        self._write(
            [
                {
                    "step": step,
                    "prompt": p,
                    "text": t.text,
                    "tokens": len(t.token_ids),
                    "finish_reason": t.finish_reason,
                }
                for p, t in rows
            ]
        )
        for prompt, text in zip(self.prompts, texts, strict=True):
            # tqdm's print, which leaves a progress bar whole
            tqdm.write(f"sample at step {step} | {_one_line(prompt)} ▸ {_one_line(text.text)}")

    def _write(self, records: Sequence[dict[str, object]]) -> None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)


def _one_line(text: str) -> str:
    """A text for the terminal: line ends shown, control characters (a model may write any) left out."""
    return "".join(c for c in text.replace("\n", "⏎") if c.isprintable())
