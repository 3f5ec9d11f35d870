"""Many requests, one model: each step schedules, runs, samples and hands out what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from arriero.data.tokenizer import Tokenizer
from arriero.engine.answer import Answer, Generation
from arriero.engine.block_manager import BlockManager
from arriero.engine.drafts import Speculation
from arriero.engine.grammar import GrammarCompiler
from arriero.engine.request import Request
from arriero.engine.runner import Runner, Work
from arriero.engine.sampling import BROKEN, Sampler, SamplingParams, SamplingRow, token_logprobs
from arriero.engine.scheduler import Scheduler, Share
from arriero.engine.text_stream import TextStream
from arriero.errors import GenerationError


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
        self.blocks = BlockManager(runner.num_blocks, runner.block_size, prefix_cache=prefix_cache and runner.reuses)
        self.scheduler = Scheduler(
            self.blocks,
            max_running=max_running,
            max_step_tokens=max(max_step_tokens, max_running),
            max_context=runner.context + runner.prefix_length,
        )
        self.speculation = speculation
        self.grammars = GrammarCompiler(tokenizer, runner.vocab_size)
        self._sampler = Sampler()
        self._answers: dict[Request, Answer] = {}

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
    ) -> Answer:
        """Add a request.

        Args:
            prompt: token ids.
            streaming: whether each step's text is wanted (`Answer.new_text`).
            priority: lower goes first.
            salt: requests with different ones share nothing of the cache.

        Raises:
            GenerationError: a prompt that is empty, too long, or holds ids that the model does not have; a structure that
                cannot be used (compiled here, unless `grammars` has it already).
        """
        runner = self.runner
        if not prompt:
            raise GenerationError("the prompt is empty: give at least one token, such as bos")
        strange = next((i for i in (min(prompt), max(prompt)) if not 0 <= i < runner.vocab_size), None)
        if strange is not None:
            raise GenerationError(
                f"the prompt holds token id {strange} and the model has ids 0 to {runner.vocab_size - 1}: "
                "the tokenizer is not this model's"
            )
        if len(prompt) + params.max_new_tokens > runner.context:
            less = f" less a prefix of {runner.prefix_length}" if runner.prefix_length else ""
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens and max_new_tokens is {params.max_new_tokens}: together more than "
                f"max_position_embeddings, {runner.context + runner.prefix_length}{less}; shorten one of them"
            )
        grammar = self.grammars.compile(params.structure).start() if params.structure is not None else None
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(self.tokenizer.stop_token_ids)
        # what a prefix holds is no token; it takes the first places of a sequence under ids that no token has
        tokens = [*range(-runner.prefix_length, 0), *prompt]
        request = Request(tokens, len(tokens), params.max_new_tokens, priority=priority, salt=salt)
        answer = Answer(
            request,
            params,
            len(prompt),
            SamplingRow.start(params, prompt, stop_ids, runner.vocab_size, runner.device, grammar),
            stop_ids,
            TextStream(self.tokenizer.stream_decoder(), params.stop_strings)
            if streaming or params.stop_strings
            else None,
        )
        self.scheduler.add(request)
        self._answers[request] = answer
        return answer

    def cancel(self, answer: Answer) -> None:
        """End a request now; a finished one stays as it is."""
        if answer.finish_reason is None:
            answer.finish_reason, answer.new_text = "cancelled", ""
            self._remove(answer)

    def fail_running(self, error: str) -> None:
        """End what runs now: its keys and values cannot be relied on. Cached beginnings are forgotten too."""
        for request in list(self.scheduler.running):
            answer = self._answers[request]
            answer.fail(error)
            answer.new_text = ""
            self._remove(answer)
        self.blocks.drop_cache()

    def step(self) -> list[Answer]:
        """Compute a step; returns the answers that got tokens, with their `new_text` and perhaps a `finish_reason`."""
        shares = self.scheduler.schedule()
        work = [item for share in shares if (item := self._work(share)) is not None]
        logits = self.runner.run(work) if work else None
        for share in shares:
            self.scheduler.advance(share)
        if logits is None:
            return []
        sampled = [share for share in shares if share.samples]
        given = self._sample(logits, sampled)
        answers = [self._answers[share.request] for share in sampled]
        for answer in answers:
            if answer.finish_reason is not None:
                self._remove(answer)
        if self.speculation is not None:
            self.speculation.measure(given)
            self.speculation.propose([answer.request for answer in answers if answer.finish_reason is None])
        return answers

    def _sample(self, logits: Tensor, shares: Sequence[Share]) -> int:
        """Give each request its next token, and those after it for as long as they were guessed; returns how many in all."""
        counts = [1 + share.start + share.count - len(share.request.tokens) for share in shares]
        rows = list(torch.split(logits, counts))
        going = list(range(len(shares)))
        drafts = [share.request.drafts[: count - 1] for share, count in zip(shares, counts, strict=True)]
        given = accepted = 0
        for share in shares:
            share.request.drafts = []
            self._answers[share.request].new_text = ""
        place = 0
        while going:
            answers = [self._answers[shares[i].request] for i in going]
            now = torch.stack([rows[i][place] for i in going]) if place or len(logits) > len(going) else logits
            tokens = self.runner.agree(self._sampler(now, [answer.sampling for answer in answers]).tolist())
            self._note_logprobs(now, answers, tokens)
            kept = []
            for i, answer, token in zip(going, answers, tokens, strict=True):
                if token == BROKEN:
                    answer.fail("the model gives logits that are no finite numbers: its weights are broken or overflow")
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

    @staticmethod
    def _note_logprobs(logits: Tensor, answers: Sequence[Answer], tokens: Sequence[int]) -> None:
        wanted = [i for i, a in enumerate(answers) if a.params.logprobs is not None and tokens[i] != BROKEN]
        if wanted:
            counts = [answers[i].params.logprobs or 0 for i in wanted]
            found = token_logprobs(logits[wanted], [tokens[i] for i in wanted], counts)
            for i, logprobs in zip(wanted, found, strict=True):
                answers[i].logprobs.append(logprobs)

    def _work(self, share: Share) -> Work | None:
        """What the runner computes of a share; a prefix's places are only filled."""
        request, start, end = share.request, share.start, share.start + share.count
        prefix = self.runner.prefix_length
        if start < prefix:
            self.runner.begin(request.blocks, start, min(end, prefix))
            start = min(end, prefix)
        if start == end:
            return None
        tokens = (request.tokens + request.drafts)[start:end] if request.drafts else request.tokens[start:end]
        return Work(tokens, start, request.blocks, end - len(request.tokens) + 1 if share.samples else 0)

    def _remove(self, answer: Answer) -> None:
        self.scheduler.remove(answer.request)
        del self._answers[answer.request]
        if self.speculation is not None:
            self.speculation.forget(answer.request)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_text: Callable[[int, str], None] | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """Answers in the order of the prompts.

        Args:
            prompts: token ids each.
            params: for all, or one for each.
            on_text: called with (index of the prompt, new text) as text comes.
            on_done: called with (index of the prompt, answer) as soon as an answer is complete.

        Raises:
            GenerationError: as `submit`, naming the prompt; nothing is generated then.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise GenerationError(
                f"{len(prompts)} prompts and {len(each)} sampling parameters: give one for each, or one"
            )
        index: dict[Answer, int] = {}
        try:
            for number, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                try:
                    index[self.submit(prompt, own, streaming=on_text is not None)] = number
                except GenerationError as error:
                    raise GenerationError(f"prompt {number}: {error}") from error
            done: dict[int, Generation] = {}
            while len(done) < len(prompts):
                for answer in self.step():
                    number = index[answer]
                    if answer.new_text and on_text is not None:
                        on_text(number, answer.new_text)
                    if answer.finish_reason is not None:
                        done[number] = answer.result(self.tokenizer)
                        if on_done is not None:
                            on_done(number, done[number])
        finally:
            for answer in index:
                self.cancel(answer)
        return [done[number] for number in range(len(prompts))]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[str]:
        """One answer's text, piece by piece; leave the iterator to stop generating.

        Raises:
            GenerationError: as `submit`, at once.
        """
        return self._pieces(self.submit(prompt, params, streaming=True))

    def _pieces(self, answer: Answer) -> Iterator[str]:
        try:
            while answer.finish_reason is None:
                if answer in self.step() and answer.new_text:
                    yield answer.new_text
            if answer.finish_reason == "error":
                raise GenerationError(answer.error)
        finally:
            self.cancel(answer)
