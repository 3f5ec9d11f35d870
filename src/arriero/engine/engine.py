"""Many requests, one model: each step schedules, runs, samples and hands out what came of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from arriero.data.tokenizer import Tokenizer
from arriero.engine.answer import Answer, Generation
from arriero.engine.answer_group import AnswerGroup
from arriero.engine.block_manager import BlockManager
from arriero.engine.drafts import Speculation
from arriero.engine.grammar import GrammarCompiler
from arriero.engine.prompt_logprobs import max_step_scores, score_prompts, wanted_rows
from arriero.engine.request import Request, check_ids
from arriero.engine.sampling import BROKEN, sampler_of
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.scheduler import Scheduler, Share
from arriero.engine.streams import Streams
from arriero.engine.text_stream import TextStream
from arriero.engine.work import NO_ADAPTER, Runner, Work
from arriero.errors import GenerationError

if TYPE_CHECKING:
    from arriero.engine.request_adapters import RequestAdapter
    from arriero.engine.work import Logits

BROKEN_LOGITS = "the model gives logits that are no finite numbers: its weights are broken or overflow"


class Engine:
    """Generates for any number of requests, which come and go between steps.

    Nothing here depends on what else runs: in fp32 an answer is the same alone and in company, up to the rounding of sums whose
    order a batch's shape decides.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        max_running: int = 32,
        max_step_tokens: int = 2048,
        prefix_cache: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        """
        Args:
            max_running: requests that run at once.
            max_step_tokens: tokens of one forward pass, which bounds its memory and how long it holds others up.
            prefix_cache: let requests that begin alike share what is computed of it.
            speculation: guesses several tokens a step, which changes no answer.

        Raises:
            GenerationError: a limit below 1.
        """
        self.runner, self.tokenizer = runner, tokenizer
        # a block that is as long as a sequence has no neighbours, and another sequence finds in it what the runner knows of
        slots = runner.block_size >= runner.context + runner.prefix_length
        self.blocks = BlockManager(
            runner.num_blocks, runner.block_size, prefix_cache=prefix_cache and runner.reuses, take_turns=slots
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_running=max_running,
            max_step_tokens=max(max_step_tokens, max_running),
            max_context=runner.context + runner.prefix_length,
            max_adapters=runner.adapters.max_loaded if runner.adapters is not None else 1,
            reserve=not slots,
            max_step_scores=max_step_scores(runner.vocab_size),
        )
        self.speculation = speculation
        self.grammars = GrammarCompiler(tokenizer, runner.vocab_size)
        self._sampler = sampler_of(runner.library, runner.device)
        self._answers: dict[Request, Answer] = {}
        self._streams = Streams()

    @property
    def unfinished(self) -> int:
        """Requests that run or wait."""
        return self.scheduler.unfinished

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        streaming: bool = False,
        priority: int = 0,
        salt: bytes = b"",
        adapter: str | None = None,
    ) -> Answer:
        """Add a request for one answer.

        Args:
            prompt: token ids.
            streaming: whether each step's text is wanted (`Answer.new_text`).
            priority: lower goes first.
            salt: requests with different ones share nothing of the cache.
            adapter: the name of one of the runner's `adapters`.

        Raises:
            GenerationError: a prompt that is empty, too long, or holds ids that the model does not have; a structure that
                cannot be used (compiled here, unless `grammars` has it already); a name that no adapter has; several answers
                (see `submit_group`), or more log-probabilities than are given.
        """
        if params.candidates > 1:
            raise GenerationError(f"{params.candidates} answers are asked for where only one can be given: set n to 1")
        for name, value, kind in (("priority", priority, int), ("salt", salt, bytes), ("adapter", adapter, str | None)):
            if not isinstance(value, kind):
                raise GenerationError(f"{name} is {str(value)[:40]!r}: it must be of the type {kind}")
        runner = self.runner
        own = self._adapter(adapter)
        check_ids(prompt, runner.vocab_size)
        prefix = own.prefix_length if own is not None and own.prefix_length else runner.prefix_length
        context = runner.context + runner.prefix_length
        if len(prompt) + params.max_new_tokens > context - prefix:
            less = f" less a prefix of {prefix}" if prefix else ""
            limit = getattr(
                runner, "context_name", "max_position_embeddings"
            )  # a bundle's may be less than its model's
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens and max_new_tokens is {params.max_new_tokens}: together more than "
                f"{limit}, {context}{less}; shorten one of them"
            )
        params.check_prompt(len(prompt))
        grammar = self.grammars.compile(params.structure).start() if params.structure is not None else None
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(self.tokenizer.stop_token_ids)
        # a special token has no text in which its own could be found
        special = self.tokenizer.special_tokens
        stop_tokens = frozenset(special[text] for text in params.stop_strings if text in special)
        # what a prefix holds is no token; it takes the first places of a sequence under ids that no token has
        tokens = [*range(-prefix, 0), *prompt]
        request = Request(
            tokens, len(tokens), params.max_new_tokens, priority=priority, salt=salt, prefix_length=prefix
        )
        if own is not None:
            request.adapter, request.salt = own.number, own.salt(salt)
        if params.prompt_logprobs is not None and len(prompt) > 1:
            request.scored = prefix
        answer = Answer(
            request,
            params,
            len(prompt),
            self._sampler.start(params, prompt, stop_ids | stop_tokens, runner.vocab_size, grammar),
            stop_ids,
            TextStream(self.tokenizer.stream_decoder(), params.stop_strings, stop_tokens)
            if streaming or params.stop_strings
            else None,
            prompt_logprobs=[None] if params.prompt_logprobs is not None else [],
        )
        self.scheduler.add(request)
        if runner.adapters is not None and own is not None:
            runner.adapters.begin_use(own.number)
        self._answers[request] = answer
        return answer

    def submit_group(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> AnswerGroup:
        """Add a request for all the answers that the parameters ask for (`n`, `best_of`).

        Args:
            options: of `submit`.

        Raises:
            GenerationError: as `submit`; then nothing is added.
        """
        params.check_prompt(len(prompt))
        answers: list[Answer] = []
        try:
            for index in range(params.candidates):
                answers.append(self.submit(prompt, params.of_candidate(index), **options))
        except GenerationError:
            for answer in answers:
                self.cancel(answer)
            raise
        return AnswerGroup(params, answers)

    def cancel(self, answer: Answer | AnswerGroup) -> None:
        """End a request now; a finished one stays as it is."""
        for one in answer.answers if isinstance(answer, AnswerGroup) else [answer]:
            if one.finish_reason is None:
                one.finish_reason, one.new_text = "cancelled", ""
                self._remove(one)

    def fail_running(self, error: str) -> None:
        """End what runs now: its keys and values cannot be relied on. Cached beginnings are forgotten too.

        Where nothing runs, what waits ends: no error may come again in every step.
        """
        for request in list(self.scheduler.running or self.scheduler.waiting):
            answer = self._answers[request]
            answer.fail(error)
            answer.new_text = ""
            self._remove(answer)
        self.blocks.drop_cache()

    def step(self) -> list[Answer]:
        """Compute a step; returns the answers that got tokens, with their `new_text` and perhaps a `finish_reason`."""
        began = time.perf_counter()
        shares, failed = self._with_adapters(self._schedule())
        work = [(share.request, item) for share in shares if (item := self._work(share)) is not None]
        logits = self.runner.run([item for _, item in work]) if work else None
        if work and not self.runner.reuses:
            for (request, _), recalled in zip(work, self.runner.recalled, strict=False):
                if request.preemptions == 0:
                    request.cached += recalled
        for share in shares:
            self.scheduler.advance(share)
        if logits is None:
            return failed
        logits = score_prompts(logits, shares, self._answers, self._sampler)
        sampled = [share for share in shares if share.samples]
        given = self._sample(logits, sampled)
        answers = [self._answers[share.request] for share in sampled]
        for answer in answers:
            if answer.finish_reason is not None:
                self._remove(answer)
        if self.speculation is not None:
            self.speculation.measure(given, time.perf_counter() - began)
            self.speculation.propose([answer.request for answer in answers if answer.finish_reason is None])
        return failed + answers

    def _adapter(self, name: str | None) -> RequestAdapter | None:
        """The adapter that a request asks for."""
        if name is None:
            return None
        pool = self.runner.adapters
        if pool is None:
            raise GenerationError(f"there is no adapter {name[:100]!r}: this engine has none at all")
        return pool.find(name)

    def _schedule(self) -> list[Share]:
        """The next step; those that it has taken the blocks of hold no more than others that wait."""
        before = self.scheduler.preemptions
        shares = self.scheduler.schedule()
        if self.scheduler.preemptions > before:
            for request in self.scheduler.waiting:
                if request.preemptions:
                    self._answers[request].sampling.release()
        return shares

    def _with_adapters(self, shares: list[Share]) -> tuple[list[Share], list[Answer]]:
        """The shares whose adapters are in memory, and the answers that end because theirs cannot be read any more."""
        used = {share.request.adapter for share in shares} - {NO_ADAPTER}
        errors = self.runner.adapters.prepare(used) if used and self.runner.adapters is not None else {}
        failed = [self._answers[share.request] for share in shares if share.request.adapter in errors]
        for answer in failed:
            answer.fail(errors[answer.request.adapter])
            answer.new_text = ""
            self._remove(answer)
        return [share for share in shares if share.request.adapter not in errors], failed

    def _sample(self, logits: Logits, shares: Sequence[Share]) -> int:
        """Give each request its next token, and those after it for as long as they were guessed; returns how many in all."""
        counts = [1 + share.start + share.count - len(share.request.tokens) for share in shares]
        first = [0, *itertools.accumulate(counts)]  # row of each share
        going = list(range(len(shares)))
        drafts = [share.request.drafts[: count - 1] for share, count in zip(shares, counts, strict=True)]
        given = accepted = 0
        for share in shares:
            share.request.drafts = []
            self._answers[share.request].new_text = ""
        place = 0
        while going:
            answers = [self._answers[shares[i].request] for i in going]
            now = logits[[first[i] + place for i in going]] if place or len(logits) > len(going) else logits
            tokens = self._sampler(now, [answer.sampling for answer in answers])
            self._note_logprobs(now, answers, tokens)
            kept = []
            for i, answer, token in zip(going, answers, tokens, strict=True):
                if token == BROKEN:
                    answer.fail(answer.sampling.dead_end or BROKEN_LOGITS)
                    continue
                answer.take(token)
                answer.request.tokens.append(token)
                given += 1
                if place < len(drafts[i]) and drafts[i][place] == token:
                    accepted += 1
                    if answer.finish_reason is not None:
                        continue
                    answer.request.computed += 1  # its keys and values are those of the guess
                    kept.append(i)
            going, place = kept, place + 1
        if self.speculation is not None:
            self.speculation.count(sum(map(len, drafts)), accepted)
        return given

    def _note_logprobs(self, logits: Logits, answers: Sequence[Answer], tokens: Sequence[int]) -> None:
        wanted = [i for i, a in enumerate(answers) if a.params.logprobs is not None and tokens[i] != BROKEN]
        if wanted:
            counts = [answers[i].params.logprobs or 0 for i in wanted]
            found = self._sampler.logprobs(logits[wanted], [tokens[i] for i in wanted], counts)
            for i, logprobs in zip(wanted, found, strict=True):
                answers[i].logprobs.append(logprobs)

    def _work(self, share: Share) -> Work | None:
        """What the runner computes of a share; a prefix's places are only filled."""
        request, start, end = share.request, share.start, share.start + share.count
        prefix = request.prefix_length
        if start < prefix:
            self.runner.begin(request.blocks, start, min(end, prefix), request.adapter)
            start = min(end, prefix)
        if start == end:
            return None
        tokens = (request.tokens + request.drafts)[start:end] if request.drafts else request.tokens[start:end]
        return Work(tokens, start, request.blocks, wanted_rows(share), request.adapter, request.salt)

    def _remove(self, answer: Answer) -> None:
        self.scheduler.remove(answer.request)
        answer.sampling.release()  # whoever asked may keep the answer
        del self._answers[answer.request]
        if answer.request.adapter and self.runner.adapters is not None:
            self.runner.adapters.end_use(answer.request.adapter)
        if self.speculation is not None:
            self.speculation.forget(answer.request)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_text: Callable[[int, str], None] | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
        adapters: str | Sequence[str | None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Answers in the order of the prompts.

        Args:
            prompts: token ids each.
            params: for all, or one for each.
            on_text: called with (index of the prompt, new text) as text comes; not for several answers to a prompt.
            on_done: called with (index of the prompt, answer) as soon as an answer is complete.
            adapters: the name of one for all prompts, or one (or None) for each.
            numbers: what errors call the prompts; default: their places.

        Raises:
            GenerationError: as `submit`, naming the prompt; nothing is generated then. Or something went wrong with an answer.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise GenerationError(
                f"{len(prompts)} prompts and {len(each)} sampling parameters: give one for each, or one"
            )
        named = [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else list(adapters)
        if len(named) != len(prompts):
            raise GenerationError(f"{len(prompts)} prompts and {len(named)} adapters: give one for each, or one")
        names = range(len(prompts)) if numbers is None else numbers
        groups: list[AnswerGroup] = []
        index: dict[Answer, int] = {}
        try:
            for number, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                try:
                    if on_text is not None and own.candidates > 1:
                        raise GenerationError("text can come piece by piece of one answer only: set n to 1")
                    options = {"streaming": on_text is not None, "adapter": named[number]}
                    groups.append(self.submit_group(prompt, own, **options))
                    index |= dict.fromkeys(groups[-1].answers, number)
                except GenerationError as error:
                    raise GenerationError(f"prompt {names[number]}: {error}") from error
            done: dict[int, Generation] = {}
            while len(done) < len(prompts):
                for answer in self._streams.step(self):
                    if answer not in index:  # a stream's
                        continue
                    number = index[answer]
                    if answer.new_text and on_text is not None:
                        on_text(number, answer.new_text)
                    if answer.finish_reason is not None and groups[number].over and number not in done:
                        done[number] = self._result(groups[number], names[number])
                        if on_done is not None:
                            on_done(number, done[number])
        finally:
            for group in groups:
                self.cancel(group)
        return [done[number] for number in range(len(prompts))]

    def _result(self, group: AnswerGroup, number: int) -> Generation:
        try:
            return group.result(self.tokenizer)
        except GenerationError as error:
            raise GenerationError(f"prompt {number}: {error}") from error

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[str]:
        """One answer's text, piece by piece; leave the iterator to stop generating.

        Streams, and `generate` between their pieces, may take turns.

        Raises:
            GenerationError: as `submit`, at once.
        """
        return self._streams.open(self, self.submit(prompt, params, streaming=True))
