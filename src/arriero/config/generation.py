"""How text is generated, and batch prediction."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.data import DATA_FORMATS, FORMAT_HELP, TASK_HELP, check_row_kind, task_of
from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError


def asks_for_draws(temperature: float | None, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether tokens are to be drawn at random where nothing says so outright. A temperature that is given asks for it, be it
    1; the others do where they leave a choice and leave something out."""
    if temperature == 0.0:
        return False
    return temperature is not None or top_k > 1 or top_p < 1.0 or min_p > 0.0


@dataclass(kw_only=True)
class GenerationOptions(OptionGroup):
    """Generation."""

    max_new_tokens: int = option(256, "longest answer in tokens", aliases=("tgt_length", "max_length"), minimum=1)
    min_new_tokens: int = option(0, "no end of text before this many tokens", aliases=("min_length",), minimum=0)
    do_sample: bool | None = option(
        None,
        "draw tokens at random; no: always the likeliest (default: yes if temperature, top_k, top_p or min_p is set)",
    )
    temperature: float | None = option(
        None,
        "below 1: more sure of itself; 0: the likeliest token (default: 1 where tokens are drawn)",
        minimum=0.0,
        maximum=100.0,
    )
    top_k: int = option(0, "draw from the k likeliest tokens only; 0: all", minimum=0)
    top_p: float = option(
        1.0, "draw from the likeliest tokens that together have this probability", above=0.0, maximum=1.0
    )
    min_p: float = option(
        0.0, "drop tokens below this share of the likeliest one's probability", minimum=0.0, maximum=1.0
    )
    repetition_penalty: float = option(1.0, "above 1: tokens already seen are made less likely", above=0.0)
    stop: list[str] = option([], "stop before any of these strings", aliases=("stop_strings",), split=False)
    batch_size: int = option(8, "prompts generated together at most", minimum=1)
    seed: int | None = option(None, "seed of the random draws; the same seed gives the same text", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == 0.0 and self.do_sample:
            raise ConfigError(
                "--do_sample and --temperature 0 contradict each other: raise the second or drop the first"
            )
        if self.do_sample is None:
            self.do_sample = asks_for_draws(self.temperature, self.top_k, self.top_p, self.min_p)
        self._check_lengths()
        if "" in self.stop:
            raise ConfigError("--stop holds an empty string, which would stop every answer at once: leave it out")

    def _check_lengths(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"--min_new_tokens {self.min_new_tokens} is above --max_new_tokens {self.max_new_tokens}: "
                "lower the first"
            )


@dataclass(kw_only=True)
class PromptOptions(OptionGroup):
    """Prompts."""

    data_file: str | None = option(
        None,
        "rows to answer, as finetune and evaluate read them (jsonl with src, instruction, context or messages, SQuAD, ...): a "
        "file, or a folder with dev.json or so; without it, the two built-in prompts",
    )
    task_name: str | None = option(None, TASK_HELP, only_with="data_file")
    data_format: str = option("auto", FORMAT_HELP, DATA_FORMATS, only_with="data_file")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.task_name = task_of(self.task_name)
        check_row_kind(self.task_name, self.data_format)


@dataclass(kw_only=True)
class PredictOptions(PromptOptions):
    """Prediction."""

    predict_file: str = option("prediction.json", "where the answers go, one JSON line each", aliases=("output_file",))
    src_length: int = option(1024, "longest prompt in tokens; a longer one is cut, counted and reported", minimum=1)
    json_schema: str | None = option(None, "a file with a JSON schema that every answer has to fit (extra: serve)")
    pipeline_parallel_degree: int = option(
        1, "of several processes: stages the layers are cut into; the others share each weight matrix", minimum=1
    )
    merge_tensor_parallel_path: str | None = option(
        None, "also write the model there, as one folder: its shards joined, or a copy of one that has none"
    )
