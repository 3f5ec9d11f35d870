"""Text from a model in memory: what a checkpoint and an exported bundle have in common. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast, overload

from arriero.api.groups import build
from arriero.errors import ConfigError, DataError

if TYPE_CHECKING:
    from typing import Unpack

    from arriero.api.keywords import GenerateKeywords
    from arriero.data.tokenizer import Tokenizer
    from arriero.engine.answer import Generation
    from arriero.engine.engine import Engine
    from arriero.engine.sampling_params import SamplingParams

Message: TypeAlias = Mapping[str, Any]
# A text as it is, a conversation for the model's chat template, or token ids.
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]


class TextModel:
    """A model that answers prompts, one at a time or many together.

    A prompt is a text, a conversation (`[{"role": "user", "content": "..."}]`) or a list of token ids. How it is answered is
    said by the options of `arriero predict` as keyword arguments (`max_new_tokens`, `temperature`, `stop`, `seed` and so on;
    greedy unless one of them asks for random draws) or by a `SamplingParams`, which can do more: log-probabilities, several
    answers, JSON schemas.

    Use it from one thread at a time. What prompts begin with alike is computed once, also from one call to the next.

    Attributes:
        tokenizer: `encode`, `decode`, `chat`.
        context: longest prompt with its answer, in tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokenizer: Tokenizer = engine.tokenizer
        self.context: int = engine.runner.context

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, as the model reads it.

        Raises:
            TemplateError: a conversation, and the model has no chat template, or one that fails on it.
            DataError: something else than a prompt.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.chat(cast("Sequence[Message]", prompt))
        if isinstance(prompt, bytes | bytearray | memoryview):
            raise DataError(
                f"a prompt is a text, a conversation or a list of token ids, not {type(prompt).__name__}; "
                ".decode() makes it a text"
            )
        if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
            raise DataError(
                f"a prompt is a text, a conversation or a list of token ids, not {type(prompt).__name__}; of a tensor or an "
                "array give .tolist()"
            )
        return list(cast("Sequence[int]", prompt))

    def encode_one(self, prompt: Prompt) -> list[int]:
        """`encode`, where several prompts cannot be taken.

        Raises:
            DataError: several are given, or what `encode` refuses.
        """
        if isinstance(prompt, list | tuple) and prompt and not is_one(prompt):
            raise DataError("one prompt is taken here, not several: ask for one after the other, or call generate")
        return self.encode(prompt)

    @overload  # a str is a sequence of str too: here it is one prompt
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        params: SamplingParams | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, **options: Unpack[GenerateKeywords]
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Generation | list[Generation]:
        """The answer to a prompt, or the answers to several, in their order.

        Of several prompts, as many run together as the model was loaded for (`batch_size`). With a seed, that with index i is
        drawn with seed + i, as `arriero predict` does.

        Raises:
            GenerationError: a prompt that is empty or too long, naming it.
            ConfigError: an option that is unknown or out of range.
        """
        own = self._params(params, options)
        if is_one(prompt):
            return self._engine.generate([self.encode(cast("Prompt", prompt))], own)[0]
        ids = [self.encode(one) for one in cast("Sequence[Prompt]", prompt)]
        seed = own.seed
        each = [own if seed is None else replace(own, seed=(seed + i) % 2**64) for i in range(len(ids))]
        return self._engine.generate(ids, each)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[GenerateKeywords]
    ) -> Iterator[str]:
        """The answer's text, piece by piece; leave the iterator to stop generating.

        Raises:
            GenerationError, ConfigError: as `generate`, at once.
        """
        return self._engine.stream(self.encode_one(prompt), self._params(params, options))

    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> str:
        """The assistant's next turn, as text.

        Args:
            messages: the conversation so far; a text is one turn of the user.

        Raises:
            TemplateError: the model has no chat template (use `generate`), or one that fails on these messages.
            GenerationError, ConfigError: as `generate`.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
            what = "an empty one" if isinstance(turns, list | tuple) and not turns else type(messages).__name__
            raise DataError(
                f"chat takes a text or a conversation ([{{'role': 'user', 'content': '...'}}, ...]), not {what}; generate "
                "takes lists of prompts and token ids"
            )
        return self._engine.generate([self.tokenizer.chat(turns)], self._params(params, options))[0].text

    def _params(self, params: SamplingParams | None, options: GenerateKeywords) -> SamplingParams:
        from arriero.engine.sampling_params import params_from_options

        if params is None:
            (generation,) = build("generate", options)
            return params_from_options(generation)
        if options:
            raise ConfigError(f"params and {min(options)} are given: say it in SamplingParams({min(options)}=...)")
        return params


def is_one(prompt: Prompt | Sequence[Prompt]) -> bool:
    return not isinstance(prompt, list | tuple) or (len(prompt) > 0 and isinstance(prompt[0], int | Mapping))


def load_bundle(
    folder: str | PathLike[str], *, batch_size: int = 8, num_threads: int | None = None, device: str = "auto"
) -> TextModel:
    """A bundle that `export_model` (or `arriero export`) wrote, ready to answer; a kind that needs no torch imports none.

    Args:
        batch_size: prompts that are answered together at most.
        num_threads: of a computation on a CPU; None: all cores of this process.
        device: cuda:N, of a bundle for GPUs where there are several.

    Raises:
        ConfigError: a device that the bundle is not made for.
        FormatError: no bundle, one that was changed, or one for another machine.
        MissingExtraError: its runtime is not installed.
    """
    from arriero.bundles.running import bundle_engine, check_device
    from arriero.config.model import device_name
    from arriero.export.bundle import open_bundle

    bundle = open_bundle(Path(folder).expanduser())
    check_device(bundle, device_name(device))
    return TextModel(bundle_engine(bundle, batch_size, num_threads, device=device_name(device)))
