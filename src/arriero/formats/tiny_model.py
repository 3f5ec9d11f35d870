"""`__internal_testing__/tiny-random-llama`: a complete model folder made on this machine, the same on every one.

The weights are random from the preset's seed. The tokenizer is real: a byte-level BPE of 2048 entries, trained once
with the tokenizers library on Shakespeare's plays (public domain) and shipped with this package.
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

import torch

from arriero.formats.hf import save_model
from arriero.formats.receipt import is_complete, write_receipt
from arriero.models.llama import LlamaForCausalLM
from arriero.models.presets import Preset

# Turns that are plain text, one a line; an answer ends with the end-of-sequence token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_SPECIAL = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def tiny_tokenizer_files() -> dict[str, bytes]:
    """The files of the tiny model's tokenizer, by name."""
    tokenizer = importlib.resources.files("arriero.formats").joinpath("assets/tiny_tokenizer.json").read_bytes()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
        **_SPECIAL,
    }
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "special_tokens_map.json": (json.dumps(_SPECIAL, indent=2) + "\n").encode(),
    }


def make_tiny_model(preset: Preset, folder: Path) -> None:
    """Write the tiny model, unless it is there and whole.

    Raises:
        FormatError: when the folder cannot be written.
    """
    source = f"{preset.name}, seed {preset.seed} by name, torch {torch.__version__}"
    if is_complete(folder, source):
        return
    config = preset.config
    model = LlamaForCausalLM(config)
    model.init_weights(preset.seed or 0)
    save_model(model, config, folder, extra_files=tiny_tokenizer_files())
    write_receipt(folder, source)
