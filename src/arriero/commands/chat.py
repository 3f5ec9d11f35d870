"""`arriero chat`: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.commands.chat_terminal import Stopped, Turns, show_answer, talk, unread_input_dropped
from arriero.config.adapter import AdapterPathOptions
from arriero.config.chat import USUAL_LENGTH, ChatGenerationOptions, ChatOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.kv_cache import KVCacheOptions
from arriero.config.model import ModelOptions
from arriero.errors import ConfigError, GenerationError

if TYPE_CHECKING:
    from arriero.engine.engine import Engine
    from arriero.engine.sampling_params import SamplingParams

HELP = "Talk to a model, with or without an adapter, or to a bundle. /exit or Ctrl-D ends, /clear starts afresh."

OPTIONS: tuple[type, ...] = (
    ModelOptions,
    AdapterPathOptions,
    ChatGenerationOptions,
    KVCacheOptions,
    CompilationOptions,
    ChatOptions,
)


def run(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    generation: ChatGenerationOptions,
    cache: KVCacheOptions,
    compilation: CompilationOptions,
    chat: ChatOptions,
) -> int:
    """Read, answer as the tokens come, repeat: one engine throughout, so that a turn computes only what is new.

    Returns:
        2 where a message of a pipe could not be answered.
    """
    from arriero.engine.sampling_params import params_from_options

    told = generation.max_new_tokens
    usual = max(USUAL_LENGTH, generation.min_new_tokens)
    params = params_from_options(replace(generation, max_new_tokens=told or usual))
    start: Turns = [{"role": "system", "content": chat.system}] if chat.system else []
    with (
        unread_input_dropped() if chat.prompt is None else contextlib.nullcontext(),
        _opened(model, adapter, cache, compilation) as (engine, what),
    ):
        if chat.template_variables and not engine.tokenizer.has_chat_template():
            raise ConfigError(f"--chat_template_kwargs: {what} has no chat template that would read them")

        def answer(turns: Turns, stopped: Stopped) -> Iterator[str]:
            prompt = _prompt(engine.tokenizer, turns, chat.template_variables)
            own = params if told else params.within(engine.runner.context - len(prompt))
            return _pieces(engine, prompt, own, stopped)

        if chat.prompt is not None:
            show_answer(answer([*start, {"role": "user", "content": chat.prompt}], lambda: False))
            return 0
        return 0 if talk(start, answer, what) else GenerationError.exit_code


def _pieces(engine: Engine, prompt: list[int], params: SamplingParams, stopped: Stopped) -> Iterator[str]:
    """The answer to a prompt as it comes. Whether it is to stop is asked between the engine's steps.

    Raises:
        GenerationError: as `Engine.submit`, or something went wrong with the answer.
    """
    answer = engine.submit(prompt, params, streaming=True)
    try:
        while answer.finish_reason is None and not stopped():
            if answer in engine.step():
                yield answer.new_text
        if answer.finish_reason == "error":
            raise GenerationError(answer.error)
    finally:
        engine.cancel(answer)


@contextmanager
def _opened(
    model: ModelOptions, adapter: AdapterPathOptions, cache: KVCacheOptions, compilation: CompilationOptions
) -> Iterator[tuple[Engine, str]]:
    """An engine for one sequence over a checkpoint or a bundle, and what it is; of a bundle without importing torch."""
    from arriero.formats.bundle_folder import is_bundle

    if is_bundle(Path(model.model_name_or_path).expanduser()):
        yield _opened_bundle(model, adapter, cache, compilation)
        return
    from arriero.engine.loading import load_for_inference
    from arriero.engine.shared_generation import engine_of

    loaded = load_for_inference(model, adapter)
    context = loaded.model.config.max_position_embeddings
    with engine_of(
        loaded.model,
        loaded.tokenizer,
        max_running=1,
        useful_tokens=context,
        kv_cache_dtype=cache.kv_cache_dtype,
        compile=compilation.torch_compile,
    ) as engine:
        yield engine, f"{loaded.folder} on {loaded.device}"


def _opened_bundle(
    model: ModelOptions, adapter: AdapterPathOptions, cache: KVCacheOptions, compilation: CompilationOptions
) -> tuple[Engine, str]:
    from arriero.bundles.running import bundle_engine, open_as_model

    bundle = open_as_model(model, adapter, cache, compilation)
    return bundle_engine(bundle, max_running=1, device=model.device), f"{bundle.folder} ({bundle.manifest.kind})"


def _prompt(tokenizer: Any, turns: Turns, variables: dict[str, Any]) -> list[int]:
    """The conversation by the model's template; a base model without one continues the plain text."""
    if tokenizer.has_chat_template():
        ids: list[int] = tokenizer.chat(turns, add_generation_prompt=True, variables=variables)
        return ids
    return list(tokenizer.encode("\n".join(turn["content"] for turn in turns), add_special_tokens=True))
