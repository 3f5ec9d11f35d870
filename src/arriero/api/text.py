"""Text from a model in memory: what a checkpoint and an exported bundle have in common. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, cast, overload

from arriero.api.arguments import path_of, plain, whole_number
from arriero.api.groups import build
from arriero.api.turns import Stream, Turns
from arriero.api.words import in_python
from arriero.errors import ConfigError, DataError

if TYPE_CHECKING:
    from typing import Unpack

    import torch

    from arriero.api.keywords import AnswerKeywords
    from arriero.data.tokenizer import Tokenizer
    from arriero.engine.answer import Generation
    from arriero.engine.engine import Engine
    from arriero.engine.sampling_params import SamplingParams
    from arriero.engine.structure import Structure, StructureKind

Message: TypeAlias = Mapping[str, Any]
# A text as it is, a conversation for the model's chat template, or token ids.
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
# Keywords for the form of an answer, and the kind of `Structure` that each makes.
STRUCTURES: dict[str, StructureKind] = {
    "json_schema": "json_schema",
    "regex": "regex",
    "choices": "choice",
    "grammar": "grammar",
}
_LENGTH = {"max_new_tokens", "tgt_length"}  # one option


class TextModel:
    """A model that answers prompts, one at a time or many together.

    A prompt is a text, a conversation (`[{"role": "user", "content": "..."}]`) or a list of token ids. How it is answered is
    said by the options of `arriero predict` as keyword arguments (`max_new_tokens`, `temperature`, `stop`, `seed` and so on;
    greedy unless one of them asks for random draws) or by a `SamplingParams`, which can do more: log-probabilities, several
    answers, penalties. `json_schema` (a dict or its text), `regex`, `choices` (texts) or `grammar` (Lark's syntax) says which
    form the answer must have (extra `serve`).

    Threads may share it: a call waits until those of others are done, and streams take turns piece by piece. What prompts
    begin with alike is computed once, also from one call to the next.

    Attributes:
        tokenizer: `encode`, `decode`, `chat`.
        context: longest prompt with its answer, in tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.turns = Turns()
        self.tokenizer: Tokenizer = engine.tokenizer
        self.context: int = engine.runner.context

    def __repr__(self) -> str:
        return f"<arriero.{type(self).__name__}: context {self.context:,}>"

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
        if not isinstance(prompt, Sequence) or not all(_is_id(token) for token in prompt):
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
        **options: Unpack[AnswerKeywords],
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, **options: Unpack[AnswerKeywords]
    ) -> list[Generation]: ...
    @in_python("generate")
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Unpack[AnswerKeywords],
    ) -> Generation | list[Generation]:
        """The answer to a prompt, or the answers to several, in their order.

        Of several prompts, as many run together as the model was loaded for (`batch_size`). With a seed, that with index i is
        drawn with seed + i, as `arriero predict` does.

        Raises:
            GenerationError: a prompt of no tokens or too long, naming it; a form that there cannot be.
            ConfigError: an option that is unknown or out of range.
        """
        own, told = self._params(params, options)
        if is_one(prompt):
            return self._answers([self.encode(cast("Prompt", prompt))], [own], told)[0]
        ids = [self.encode(one) for one in cast("Sequence[Prompt]", prompt)]
        seed = own.seed
        each = [own if seed is None else replace(own, seed=(seed + i) % 2**64) for i in range(len(ids))]
        return self._answers(ids, each, told)

    @in_python("generate")
    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[AnswerKeywords]) -> Stream:
        """The answer's text, piece by piece; leave the iterator, or `close` it, to stop generating.

        Raises:
            GenerationError, ConfigError: as `generate`, at once.
        """
        ids, (own, told) = self.encode_one(prompt), self._params(params, options)
        [own] = self._fitted([ids], [own], told)
        with self.turns:
            return Stream(self.turns, cast("Generator[str]", self._engine.stream(ids, own)))

    @in_python("generate")
    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        **options: Unpack[AnswerKeywords],
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
        own, told = self._params(params, options)
        return self._answers([self.tokenizer.chat(turns)], [own], told)[0].text

    def _answers(self, ids: Sequence[Sequence[int]], params: Sequence[SamplingParams], told: bool) -> list[Generation]:
        with self.turns:
            return self._engine.generate(ids, self._fitted(ids, params, told))

    def _fitted(
        self, ids: Sequence[Sequence[int]], params: Sequence[SamplingParams], told: bool
    ) -> Sequence[SamplingParams]:
        """Of each prompt; answers whose length was not told give way to the context."""
        if told:
            return params
        return [own.within(self.context - len(prompt)) for own, prompt in zip(params, ids, strict=True)]

    def _params(self, params: SamplingParams | None, options: AnswerKeywords) -> tuple[SamplingParams, bool]:
        """How to answer, and whether the caller has said how long answers may be."""
        from arriero.engine.sampling_params import SamplingParams, params_from_options

        if params is None:
            given: dict[str, Any] = dict(options)
            structure = structure_of({name: given.pop(name) for name in STRUCTURES if name in given})
            (generation,) = build("generate", given)
            return replace(params_from_options(generation), structure=structure), bool(_LENGTH & given.keys())
        if not isinstance(params, SamplingParams):
            raise ConfigError(
                f"params is of type {type(params).__name__}: it takes an arriero.SamplingParams; options go by their names"
            )
        if options:
            name = min(options)
            kind = STRUCTURES.get(name)
            say = f"{name}=..." if kind is None else f"structure=arriero.Structure({kind!r}, ...)"
            raise ConfigError(f"params and {name} are given: say it in SamplingParams({say})")
        return params, True


def structure_of(given: Mapping[str, Any]) -> Structure | None:
    """The form of an answer that one of the keywords of `STRUCTURES` says; None without.

    Raises:
        ConfigError: several, or choices that are no texts.
        GenerationError: as `Structure`.
    """
    from arriero.engine.structure import Structure

    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} both say what form the answer has: give one of them")
    for name, value in named.items():
        if name == "choices" and not (isinstance(value, list | tuple) and all(isinstance(t, str) for t in value)):
            raise ConfigError("choices takes a list of texts")
        return Structure(STRUCTURES[name], value)
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_one(prompt: Prompt | Sequence[Prompt]) -> bool:
    return not isinstance(prompt, list | tuple) or (len(prompt) > 0 and isinstance(prompt[0], int | Mapping))


@in_python("load")
def load_bundle(
    folder: str | PathLike[str],
    *,
    batch_size: int = 8,
    num_threads: int | None = None,
    device: str | torch.device = "auto",
) -> TextModel:
    """A bundle that `export_model` (or `arriero export`) wrote, ready to answer; a kind that needs no torch imports none.

    Args:
        batch_size: prompts that are answered together at most.
        num_threads: of a computation on a CPU; None: all cores of this process.
        device: cuda:N, of a bundle for GPUs where there are several.

    Raises:
        ConfigError: a device that the bundle is not made for, or more threads than four for each core.
        FormatError: no bundle, one that was changed, or one for another machine.
        MissingExtraError: its runtime is not installed.
    """
    from arriero.bundles.running import bundle_engine, check_device
    from arriero.config.model import device_name
    from arriero.config.threads import check_threads
    from arriero.export.bundle import open_bundle

    bundle = open_bundle(path_of("folder", folder, "the folder of a bundle"))
    name = device_name(str(plain(device)))
    check_device(bundle, name)
    threads = None if num_threads is None else whole_number("num_threads", num_threads)
    check_threads("num_threads", threads)
    return TextModel(bundle_engine(bundle, whole_number("batch_size", batch_size), threads, device=name))
