"""Cosines and sines of positions as tables, for attention operators that rotate by themselves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig
from arriero.models.rope import rope_frequencies

Table = npt.NDArray[np.float32]


def rope_tables(config: LlamaConfig, context: int) -> tuple[Table, Table]:
    """cos and sin, (context, head_dim / 2) each, with the factor of yarn on both.

    Raises:
        ConfigError: for dynamic RoPE, whose angles depend on the length of the whole sequence.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "dynamic":
        raise ConfigError(
            "rope type 'dynamic' cannot be exported to onnx: its angles change with the length of the sequence, so there is "
            "no table of them; export gguf, or set another rope_scaling"
        )
    frequencies, factor = rope_frequencies(config)
    angles = torch.arange(context)[:, None].float() * frequencies
    return (angles.cos() * factor).numpy(), (angles.sin() * factor).numpy()
