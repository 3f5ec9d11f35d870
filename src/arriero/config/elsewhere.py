"""Names that a verb or function has no option for, and what is said to whoever gives one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from arriero.config.data import PreviewOptions
from arriero.config.hub import HubOptions
from arriero.config.model import ModelOptions
from arriero.config.option import OptionSpec, option_table
from arriero.config.training import FINETUNE, PRETRAIN
from arriero.config.values import nearest

# Names of transformers, PEFT and TRL, and of other programs, for options that have another one here: the first that there is.
_RENAMED: Mapping[str, tuple[str, ...]] = {
    "adapter": ("lora_path",),
    "adapter_path": ("lora_path",),
    "attn_implementation": ("use_flash_attention",),
    "batch_size": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "data_seed": ("seed",),
    "dataset": ("dataset_path",),
    "device_map": ("device",),
    "epochs": ("num_train_epochs",),
    "logging_dir": ("output_dir",),
    "lr": ("learning_rate",),
    "max_tokens": ("max_new_tokens",),
    "model": ("model_name_or_path",),
    "num_virtual_tokens": ("num_prefix_tokens",),
    "r": ("lora_rank",),
    "target_modules": ("lora_target_modules",),
    "torch_dtype": ("dtype",),
    "train_dataset": ("dataset_path",),
    "train_file": ("dataset_path",),
    "use_cache": (),
    "validation_file": ("dataset_path",),
}
# What there is in place of an option; docs/from-transformers.md has the same in a table.
_INSTEAD = {
    "adapter": "an adapter is joined with its model first, by merge",
    "bnb_4bit_quant_type": "qlora in finetune; quantize makes a model smaller",
    "data_collator": "rows are packed; data_format and task_name of finetune say how they are read",
    "generation_config": "its settings are keyword arguments, or those of arriero.SamplingParams",
    "length_penalty": "there is no beam search; arriero.SamplingParams(n=..., best_of=...) chooses among several answers",
    "load_in_4bit": "qlora in finetune; quantize makes a smaller model",
    "load_in_8bit": "load_in_8bit is an option of finetune; quantize makes a smaller model",
    "num_beam_groups": "there is no beam search; arriero.SamplingParams(n=..., best_of=...) chooses among several answers",
    "num_beams": "there is no beam search; arriero.SamplingParams(n=..., best_of=...) chooses among several answers",
    "num_return_sequences": "several answers to a prompt are arriero.SamplingParams(n=...)",
    "peft_config": "lora=True with lora_rank, lora_alpha, ... in its place",
    "quantization_config": "qlora in finetune; quantize makes a smaller model",
    "streamer": "model.stream(prompt, ...) gives the text piece by piece",
    "trust_remote_code": "code of a model's folder is never run; drop it",
}
# Of one verb or function.
_OF_COMMAND = {
    ("arriero quantize", "lora_path"): "join the adapter with its base first, by `arriero merge --lora_path ...`",
    ("arriero.quantize", "lora_path"): "join the adapter with its base first, by arriero.merge",
    ("arriero.load", "lora_path"): "it is called adapter here",
    ("arriero.load", "prefix_path"): "it is called adapter here",
}
_OF_RESULTS = frozenset(
    f"arriero {verb}" for verb in ("evaluate", "predict", "chat", "serve", "bench", "merge", "export")
)
_TRAINING: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("finetune", (*(group for group in FINETUNE if group is not ModelOptions), PreviewOptions, HubOptions)),
    ("pretrain", tuple(group for group in PRETRAIN if group not in FINETUNE)),
)


@cache
def _of_training() -> dict[str, tuple[str, OptionSpec]]:
    found: dict[str, tuple[str, OptionSpec]] = {}
    for verb, groups in _TRAINING:
        for name, spec in option_table(groups).items():
            found.setdefault(name, (verb, spec))
    return found


def training_option(name: str) -> OptionSpec | None:
    """The option of `finetune`, or else of `pretrain`, that a name or an alias means."""
    found = _of_training().get(name)
    return None if found is None else found[1]


def hint(name: str, known: Iterable[str], command: str, dashes: str = "") -> str | None:
    """What to say of a name that is none of the options; None where nothing is known.

    Args:
        name: with underscores.
        known: the names that there are.
        command: the verb, as `arriero predict`, or the function, as `arriero.load`.
        dashes: before the names of options, in the message.
    """
    said = _OF_COMMAND.get((command, name))
    if said is not None:
        return said
    names = list(known)
    renamed = next((other for other in _RENAMED.get(name, ()) if other in names), None)
    if renamed is not None:
        return f"it is called {dashes}{renamed} here"
    if name in _INSTEAD:
        return _INSTEAD[name]
    if name in _of_training():
        verb = _of_training()[name][0]
        if not dashes and command in _OF_RESULTS:
            return (
                f"it is an option of arriero {verb}, whose result is named by its folder: --model_name_or_path, or --lora_path "
                "or --prefix_path of an adapter"
            )
        return f"it is an option of arriero {verb} and means nothing here; leave it out"
    near = nearest(name, names)
    return f"did you mean {dashes}{near}?" if near is not None else None
