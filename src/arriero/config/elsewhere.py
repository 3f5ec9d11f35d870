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
    "adapter_name_or_path": ("lora_path", "adapter"),
    "adapter_path": ("lora_path", "adapter"),
    "base_model": ("model_name_or_path",),
    "batch_size": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "cutoff_len": ("max_seq_length",),
    "data_file": ("dataset_path", "input_dir"),
    "data_seed": ("seed",),
    "dataset": ("dataset_path", "data_file", "input_dir"),
    "dataset_path": ("data_file", "input_dir"),
    "device_map": ("device",),
    "epochs": ("num_train_epochs",),
    "logging_dir": ("output_dir",),
    "lora_target": ("lora_target_modules",),
    "lr": ("learning_rate",),
    "max_tokens": ("max_new_tokens",),
    "micro_batch_size": ("per_device_train_batch_size",),
    "model": ("model_name_or_path", "model_dir"),
    "model_name_or_path": ("model_dir",),
    "model_path": ("model_name_or_path", "model_dir"),
    "num_virtual_tokens": ("num_prefix_tokens",),
    "optimizer": ("optim",),
    "outtype": ("gguf_type",),
    "pref_beta": ("dpo_beta",),
    "pref_loss": ("preference",),
    "r": ("lora_rank",),
    "sample_packing": ("packing",),
    "sequence_len": ("max_seq_length",),
    "target_modules": ("lora_target_modules",),
    "torch_dtype": ("dtype",),
    "train_dataset": ("dataset_path",),
    "train_file": ("dataset_path",),
    "use_cache": (),
    "use_lora": ("lora",),
    "validation_file": ("dataset_path",),
}
_SPLIT = "@split 949,50,1 parts training, validation and test documents"
_PROMPTS = "prompts are rows of a file, @data_file; `arriero chat MODEL --prompt TEXT` answers one"
_SHARDED = "@sharding stage1, stage2 or stage3 shares out the state, under `arriero launch`"
# The same where another option with its value is meant: the option that has to be there, and what is said; @ is for dashes.
_OTHERWISE: Mapping[str, tuple[tuple[str, str], ...]] = {
    "adapter": (("lora", "@lora trains a new adapter, @lora_path goes on with a stored one"),),
    "assistant_only_loss": (
        ("train_on", "answers alone are learned; @train_on says whether of every turn (all_assistant) or the last"),
    ),
    "attn_implementation": (
        (
            "use_flash_attention",
            "the fastest kernel of the machine is taken (sdpa, flash attention); @use_flash_attention no writes attention out",
        ),
    ),
    "bf16": (("dtype", "@dtype bfloat16 is the type of the weights here"),),
    "bits": (("quant_type", "@quant_type int4 or int8"),),
    "deepspeed": (("sharding", _SHARDED),),
    "finetuning_type": (("lora", "@lora or @prefix_tuning; without them all weights are trained"),),
    "fp16": (("dtype", "@dtype float16 is the type of the weights here"),),
    "fsdp": (("sharding", _SHARDED),),
    "modules_to_save": (
        (
            "lora",
            "beside the additions only biases can be trained (@lora_bias); without @lora all weights are, but for @freeze",
        ),
    ),
    "prompt": (("predict_file", _PROMPTS),),
    "prompts": (("predict_file", _PROMPTS),),
    "quantization_bit": (
        ("quantize_base", "@quantize_base nf4 (4 bits, as @qlora) or int8"),
        ("quant_type", "@quant_type int4 or int8"),
    ),
    "val_set_size": (("split", _SPLIT),),
    "val_size": (("split", _SPLIT),),
}
# What there is in place of an option; docs/from-transformers.md has the same in a table.
_INSTEAD = {
    "adapter": "an adapter is joined with its model first, by merge",
    "attn_implementation": "the fastest attention kernel of the machine is taken; drop it",
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
    "template": "the chat template is that of the model's folder; drop it",
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
    otherwise = next((text for option, text in _OTHERWISE.get(name, ()) if option in names), None)
    if otherwise is not None:
        return otherwise.replace("@", dashes)
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
