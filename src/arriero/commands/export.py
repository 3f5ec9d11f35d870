"""`arriero export`: a bundle that runs without the model's Python code."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.commands.unavailable import not_available
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import DTYPES, device_name
from arriero.config.option import OptionGroup, option

HELP = "Write a model as a bundle that runs without the model's Python code."


@dataclass(kw_only=True)
class ExportOptions(OptionGroup):
    """Export."""

    model_name_or_path: str = option("checkpoints/", "the model's folder or name", aliases=("model_path",))
    output_path: str = option("inference/llama", "folder and name of the bundle")
    kind: str = option("torch", "what the bundle runs in", ("torch", "aoti", "onnx", "gguf"))
    dtype: str = option("auto", "type of the weights in the bundle", tuple(DTYPES))
    device: str = option("auto", "the device it is made for: auto, cpu, gpu")
    max_new_tokens: int = option(100, "default length of an answer", aliases=("tgt_length", "max_length"), minimum=1)
    merge_weights: bool = option(True, "merge the adapter into the weights of the bundle", only_with="lora_path")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dtype = DTYPES[self.dtype]
        self.device = device_name(self.device)


OPTIONS: tuple[type, ...] = (
    ExportOptions,
    AdapterPathOptions,
)


def run(export: ExportOptions, adapter: AdapterPathOptions) -> int:
    """Answer that this comes in a later version."""
    raise not_available("export", "arriero merge writes a folder that other runtimes load")
