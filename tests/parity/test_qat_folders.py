"""A converted run of quantization-aware training in transformers, layer by layer against the layers that were trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.adapters.qat import apply_qat, rounding_layers
from arriero.engine.qat import convert_trained
from arriero.formats import hf
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.quantization.qat import QatSettings
from arriero.training.methods.qat import exact
from arriero.training.qat_weights import QatWeights
from arriero.training.weights import AdapterWeights, FullWeights

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

CONFIG = LlamaConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,
    }
)


@pytest.mark.parametrize(
    ("settings", "lora"),
    [
        (QatSettings("A8W8"), False),
        (QatSettings("A8W4", 32), True),
        (QatSettings("W4", 32), False),
        (QatSettings("W4", -1), True),
    ],
    ids=str,
)
def test_transformers_computes_what_was_trained(tmp_path: Path, settings: QatSettings, lora: bool) -> None:
    model = LlamaForCausalLM(CONFIG)
    model.init_weights(0)
    hf.save_model(model, CONFIG, tmp_path / "base")
    store = FullWeights(model, tmp_path / "base")
    if lora:
        adapter = LoRAConfig(rank=3)
        apply_lora(model, adapter)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        store = AdapterWeights(model, adapter, str(tmp_path / "base"))  # type: ignore[assignment]
    apply_qat(model, settings)
    for number, (_, layer) in enumerate(rounding_layers(model)):
        if layer.input_range is not None:
            layer.input_range.data.fill_(1.5 + number / 7)  # some inputs are clipped
    weights = QatWeights(model, exact(store), settings)
    weights.write(tmp_path / "run", weights.parts(), Processes())
    convert_trained(tmp_path / "run", tmp_path / "packed", cache_dir=None, max_shard_size=10**9, dtype=None)

    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    with torch.no_grad():
        other(torch.arange(8)[None])  # the weights are unpacked at the first pass
        for name, layer in rounding_layers(model):
            x = torch.randn(1, 9, layer.in_features, generator=torch.Generator().manual_seed(2))
            torch.testing.assert_close(layer(x), other.get_submodule(name)(x), rtol=1e-5, atol=1e-6, msg=name)
