"""What `bench` measures."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.config.threads import check_threads
from arriero.errors import ConfigError

ENGINE_WORKLOADS = ("decode", "prefill", "mixed", "shared_prefix", "long_context")
WORKLOADS = (*ENGINE_WORKLOADS, "serve")


@dataclass(kw_only=True)
class BenchOptions(OptionGroup):
    """Benchmark."""

    workloads: list[str] = option(
        list(ENGINE_WORKLOADS),
        "what is measured: answers of a batch; long prompts; uneven requests; one beginning for many; a long context; serve, "
        "alone: a server under load",
        WORKLOADS,
        positional=True,
    )
    batch_sizes: list[int] = option(
        [1, 8], "decode: requests at a time", aliases=("batch_size",), minimum=1, maximum=4096
    )
    src_length: int = option(128, "decode: tokens of a prompt; mixed: of the longest", minimum=1)
    max_new_tokens: int = option(
        64,
        "tokens of an answer (mixed: of the longest; shared_prefix: at most 8; serve: at most)",
        aliases=("tgt_length",),
        minimum=1,
    )
    prompt_lengths: list[int] = option([512, 2048], "prefill: tokens of a prompt", minimum=1)
    num_requests: int = option(32, "mixed and shared_prefix: requests; serve: at each rate", minimum=1, maximum=100_000)
    max_running: int = option(16, "mixed and shared_prefix: requests that run at once", minimum=1, maximum=4096)
    shared_length: int = option(512, "shared_prefix: tokens that all prompts begin with", minimum=1)
    context_length: int = option(4096, "long_context: tokens of prompt and answer", minimum=2)
    max_step_tokens: int = option(2048, "tokens of one forward pass at most", minimum=1)
    repeats: int = option(3, "runs of each; rates are medians", minimum=1, maximum=1000)
    threads: int | None = option(None, "threads to compute with (default: torch's choice)", minimum=1)
    seed: int = option(0, "seed of the random prompts; serve: of their order and of the arrivals", minimum=0)
    against: list[str] = option(
        [], "installed programs that take turns with arriero on the same work", ("transformers",), aliases=("peers",)
    )
    output_file: str | None = option(None, "JSON file for the numbers")
    plot: str | None = option(None, "PNG file for a picture of them (needs the extra plot)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threads("--threads", self.threads)
        for name in ("workloads", "batch_sizes", "prompt_lengths"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty: give at least one")
        for name in ("workloads", "batch_sizes", "prompt_lengths", "against"):
            setattr(self, name, list(dict.fromkeys(getattr(self, name))))
        for name in ("output_file", "plot"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ConfigError(f"--{name} is empty: name a file")
