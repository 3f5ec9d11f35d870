"""The model that growth and limits are measured with: the shape of `configs/models/llama-15m`, random weights, fp32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import convert
import torch
from gpu_generate import random_model

from arriero.formats import hf
from arriero.models.config import LlamaConfig

SHAPE = Path(__file__).parents[1] / "configs/models/llama-15m"
CONTEXT = 8192  # tokens; the shape's own 256 leave nothing to measure
TOKENIZER = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}


def small_config(layers: int | None = None) -> LlamaConfig:
    """Its configuration, with other layers if they are told."""
    config = LlamaConfig.from_file(SHAPE)
    return dataclasses.replace(
        config,
        num_hidden_layers=layers or config.num_hidden_layers,
        layer_types=(),
        max_position_embeddings=CONTEXT,
    )


def save_small(folder: Path, layers: int | None = None) -> Path:
    """Write its folder, with a tokenizer that makes text of any of its tokens; gives the folder."""
    config = small_config(layers)
    model = random_model(config, torch.float32, torch.device("cpu"))
    files = {"tokenizer.json": convert.tokenizer(config.vocab_size), "tokenizer_config.json": TOKENIZER}
    hf.save_model(model, config, folder, extra_files={name: json.dumps(file).encode() for name, file in files.items()})
    return folder
