"""`arriero chat`: talk to a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.config.adapter import AdapterPathOptions
from arriero.config.chat import ChatOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.generation import GenerationOptions
from arriero.config.kv_cache import KVCacheOptions
from arriero.config.model import ModelOptions
from arriero.errors import GenerationError

if TYPE_CHECKING:
    from arriero.engine.engine import Engine

HELP = (
    "Talk to a model, with or without an adapter, or to a bundle. An empty line or Ctrl-D ends; /clear starts afresh."
)

OPTIONS: tuple[type, ...] = (
    ModelOptions,
    AdapterPathOptions,
    GenerationOptions,
    KVCacheOptions,
    CompilationOptions,
    ChatOptions,
)


def run(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    generation: GenerationOptions,
    cache: KVCacheOptions,
    compilation: CompilationOptions,
    chat: ChatOptions,
) -> int:
    """Read, answer as the tokens come, repeat: one engine throughout, so that a turn computes only what is new."""
    from arriero.engine.sampling_params import params_from_options

    params = params_from_options(generation)
    start: list[dict[str, str]] = [{"role": "system", "content": chat.system}] if chat.system else []
    with _opened(model, adapter, cache, compilation) as (engine, what):

        def answer(turns: list[dict[str, str]]) -> str:
            pieces = []
            for piece in engine.stream(_prompt(engine.tokenizer, turns), params):
                print(piece, end="", flush=True)
                pieces.append(piece)
            print()
            return "".join(pieces)

        if chat.prompt is not None:
            answer([*start, {"role": "user", "content": chat.prompt}])
            return 0
        if sys.stdin.isatty():
            print(f"{what}. An empty line ends, /clear starts afresh.")
        _talk(start, answer)
    return 0


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


def _talk(start: list[dict[str, str]], answer: Callable[[list[dict[str, str]]], str]) -> None:
    """A line, an answer, and so on, until there is no line."""
    turns = list(start)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        if line == "/clear":
            turns = list(start)
            continue
        turns.append({"role": "user", "content": line})
        try:
            turns.append({"role": "assistant", "content": answer(turns)})
        except GenerationError as error:  # the conversation outgrew the context: say so and go on
            turns.pop()
            print(f"{error} (/clear starts afresh)")


def _prompt(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """The conversation by the model's template; a base model without one continues the plain text."""
    if tokenizer.has_chat_template():
        ids: list[int] = tokenizer.chat(turns, add_generation_prompt=True)
        return ids
    return list(tokenizer.encode("\n".join(turn["content"] for turn in turns), add_special_tokens=True))
