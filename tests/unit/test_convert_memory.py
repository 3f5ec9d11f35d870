"""What a conversion takes of the memory, which a model may exceed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arriero.formats.hf import load_model
from arriero.formats.hf_source import open_hf
from arriero.formats.parts import Placement
from arriero.formats.safetensors_header import build_header
from arriero.formats.shared_files import PartReader
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from own_memory import growth

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Converts a model twice: a tiny one, which starts torch's threads and kernels, then the one to measure.
CONVERT = """
import sys
from pathlib import Path
import torch
from arriero.formats import conversion
from arriero.formats.detection import detect
from arriero.formats.opening import Writing
tiny, model, target, to, dtype = sys.argv[1:]
conversion.SMALL = 0  # compares no logits: for them a model whose tensors are not mapped has to be in memory
how = Writing(to, None if dtype == "None" else getattr(torch, dtype))
conversion.convert_model(detect(Path(tiny)), Path(target + "-tiny"), how, verify=True)
print(open("/proc/self/status").read().split("RssAnon:")[1].split()[0], flush=True)
sys.stdin.readline()
conversion.convert_model(detect(Path(model)), Path(target), how, verify=True)
"""


def make(folder: Path, dtype: torch.dtype, **sizes: int) -> LlamaConfig:
    """A model folder of random numbers."""
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=4, head_dim=sizes["hidden_size"] // 4, **sizes)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in weight_shapes(config).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return config


@pytest.mark.parametrize(
    ("to", "dtype", "wanted"),
    [
        ("hf", torch.float32, "bfloat16"),
        ("hf", torch.bfloat16, "float32"),
        ("paddle", torch.float32, None),
    ],
)
def test_a_conversion_stays_within_two_tensors(tmp_path: Path, to: str, dtype: torch.dtype, wanted: str | None) -> None:
    """Peak of the process's own memory (RssAnon: mapped files do not count), the comparison of tensors included.

    The largest tensor is that of the wider of the two types.
    """
    make(tmp_path / "tiny", dtype, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config = make(tmp_path / "m", dtype, vocab_size=20480, hidden_size=512, intermediate_size=1536, num_hidden_layers=8)
    width = max(dtype.itemsize, getattr(torch, wanted).itemsize if wanted else 0)
    largest = config.vocab_size * config.hidden_size * width
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 9e7
    folders = [str(tmp_path / name) for name in ("tiny", "m", "new")]
    used = growth(CONVERT, *folders, to, str(wanted))
    print(f"{used / largest:.2f} of the largest tensor of {largest / 1e6:.0f} MB")
    # Below, the measurement would have missed a tensor that was made; 1 MiB is for Python's own objects.
    assert 0.2 * largest < used <= 2 * largest + 2**20


def test_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    """It is a hole but for one norm; the library and torch cannot map such a file ("unable to mmap")."""
    total = sum(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith(("MemTotal", "SwapTotal"))
    )
    sizes = {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=total // 8192, num_attention_heads=4, num_key_value_heads=4, head_dim=32, **sizes)
    plan = {name: (torch.bfloat16, shape) for name, shape in weight_shapes(config).items()}
    header, starts, size = build_header(plan)
    assert size > 1.9 * total
    norm = torch.randn(4096).bfloat16()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.seek(starts["model.norm.weight"])
        file.write(norm.view(torch.uint8).numpy().data)
        file.truncate(size)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with open_hf(tmp_path) as source:
        assert torch.equal(source.tensors["model.norm.weight"].load(), norm)  # type: ignore[union-attr]
        head = source.tensors["lm_head.weight"].load()  # type: ignore[union-attr]
        assert head.shape == (config.vocab_size, 4096)
        assert not head[-1].any()
    model = load_model(tmp_path)
    assert torch.equal(model.model.norm.weight, norm)
    assert not model.lm_head.weight[-1].any()
    box = Placement((config.vocab_size, 4096), (config.vocab_size - 2, 0), (2, 4096))
    assert PartReader(tmp_path).read_part("lm_head.weight", box).shape == (2, 4096)
