"""Running a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.generation import GenerationOptions, PromptOptions
from arriero.config.model import device_name
from arriero.config.option import REQUIRED, option
from arriero.config.threads import check_threads
from arriero.errors import ConfigError


@dataclass(kw_only=True)
class InferOptions(PromptOptions):
    """Inference."""

    model_dir: str = option(REQUIRED, "folder of the bundle, or the one that it is in", alone=True)
    model_prefix: str | None = option(
        None,
        "the bundle's name in that folder; no matter where that is the bundle itself (default: llama, or the only one there)",
    )
    device: str = option("auto", "auto, cpu, gpu or cuda:N; it must be what the bundle is made for")
    num_threads: int | None = option(None, "of a computation on a CPU (default: all cores of this process)", minimum=1)
    src_length: int = option(
        1024,
        "longest prompt in tokens; a longer one is cut, counted and reported, as is what the context has no room for",
        minimum=1,
    )
    predict_file: str | None = option(
        None, "also write the answers there, one JSON line each", aliases=("output_file",)
    )
    stream: bool = option(False, "print answers as they come, one after the other")
    benchmark: bool = option(
        False, "measure instead: --batch_size prompts at once, each answered with --max_new_tokens tokens"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.device = device_name(self.device)
        check_threads("--num_threads", self.num_threads)
        for name, given in (("--predict_file", self.predict_file), ("--stream", self.stream)):
            if self.benchmark and given:
                raise ConfigError(f"{name} and --benchmark: a measurement keeps no answers; leave one of them out")


@dataclass(kw_only=True)
class BundleGenerationOptions(GenerationOptions):
    """Generation."""

    max_new_tokens: int = option(
        0,
        "longest answer in tokens; 0: what the bundle says, where its context has that room",
        aliases=("tgt_length", "max_length"),
        minimum=0,
    )

    def _check_lengths(self) -> None:
        if self.max_new_tokens:
            super()._check_lengths()
