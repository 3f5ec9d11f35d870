"""EleutherAI's evaluation harness (https://github.com/EleutherAI/lm-evaluation-harness) on this package's models.

Import it only to use it: the harness needs the extra `eval` and takes seconds to import. Every process of several hears all
requests, answers its share of them and hears the others' answers. So the harness itself need not know of them, and scores
are those of one process; it would send pickles.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from torch import Tensor
from tqdm import tqdm

from arriero.config.evaluation import EvaluateOptions
from arriero.data.batch import group_by_prefix, pack_groups
from arriero.data.sft import IGNORE, Example
from arriero.engine.loading import LoadedModel
from arriero.engine.sampling_params import SamplingParams
from arriero.engine.shared_generation import generate_shared
from arriero.errors import ArrieroError, ConfigError, DataError, GenerationError, TemplateError
from arriero.models.products import fast_products
from arriero.parallel.generation import for_generation
from arriero.parallel.parallelize import Parallel
from arriero.parallel.processes import Processes

MAX_GENERATED_TOKENS = 256  # where a task says nothing: as the harness's own model classes
OPEN_END = "<the message goes on here> "  # marks the place, to be cut off
LOGITS_AT_ONCE = 1 << 25  # elements of fp32, 128 MiB

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of every default it takes


@dataclass(frozen=True)
class _Row:
    """A context and its continuation, cut to what the model can take.

    Attributes:
        index: of the request.
        tokens: without the last, which is only predicted.
        targets: tokens of the continuation.
    """

    index: int
    tokens: list[int]
    targets: list[int]

    def example(self) -> Example:
        return Example(self.tokens, [IGNORE] * (len(self.tokens) - len(self.targets)) + self.targets)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A loaded model as the harness asks it: how likely is a continuation, what comes next.

    Rows are packed without padding, and contexts in common (the choices of a question, few-shot examples) are computed once
    a batch. Texts are the tasks' own: names of special tokens in them become those tokens, as in the harness's `hf` class.
    """

    def __init__(
        self, loaded: LoadedModel, batch_size: int = 8, *, share_prefixes: bool = True, compile: bool = False
    ) -> None:
        """
        Args:
            batch_size: rows scored, or answers generated, together.
            share_prefixes: not where RoPE depends on a row's length, see `may_share_prefixes`.
            compile: of answers, see `TorchRunner`.
        """
        super().__init__()
        self.loaded, self.batch_size, self._share = loaded, batch_size, share_prefixes
        self._compile = compile
        self._text, self._model = loaded.tokenizer, for_generation(loaded.model)
        parallel: Parallel | None = getattr(loaded.model, "parallel", None)
        self._processes = parallel.processes if parallel is not None else Processes()
        own = next((i for i in (self._text.eos_token_id, *self._text.stop_token_ids) if i is not None), None)
        if own is None:
            raise ConfigError(f"{loaded.folder}: the tokenizer has no end-of-text token, which --tasks needs")
        self._end: int = own

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return self._end if self._text.bos_token_id is None else self._text.bos_token_id

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self.loaded.model.context

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.folder)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt its last message stays open, as in transformers."""
        if add_generation_prompt:
            return self._text.render_chat(chat_history)
        *before, last = chat_history
        marked = [*before, {**last, "content": last["content"] + OPEN_END}]
        text, found, rest = self._text.render_chat(marked, add_generation_prompt=False).rpartition(OPEN_END.rstrip())
        if not found:
            raise TemplateError(f"{self.loaded.folder}: the chat template leaves out a message of the {last['role']}")
        # a template that trims the message trims what is to be gone on with
        return text if rest.startswith(" ") else text.rstrip()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with what the tokenizer puts before a text, unless the text begins with it."""
        if add_special_tokens is None:
            beginning = self._text.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not has_bos_prefix(string, beginning)
        return self._text.encode(string, add_special_tokens=add_special_tokens, allow_special=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): log-probability of the continuation, and whether it is the greedy one."""
        rows: list[_Row] = []
        results: dict[int, tuple[float, bool]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not continuation:  # its letters are part of the context's last token
                results[index] = (0.0, True)
                continue
            tokens = (context + continuation)[-(self.max_length + 1) :]
            rows.append(_Row(index, tokens[:-1], continuation[-len(tokens[:-1]) :]))
        rows.sort(key=lambda row: row.tokens)  # common beginnings meet in a batch
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        for index, logp, greedy in self._score_all(batches, disable_tqdm):
            results[index] = (logp, greedy)
            texts = requests[index][0]
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[index])
        return [results[index] for index in range(len(requests))]

    def _score_all(self, batches: Sequence[Sequence[_Row]], quiet: bool) -> list[tuple[int, float, bool]]:
        """Index, log-probability and whether it is the greedy one, of every row.

        Each data-parallel process takes every n-th batch. Processes that share out weights compute together: where one has no
        batch left, it runs another's.
        """
        processes, copies = self._processes, self._processes.layout.data
        own: list[tuple[int, float, bool]] = []
        muted = True if quiet or not processes.first else None  # None: where there is no terminal
        with (
            processes.together(),
            fast_products(),
            tqdm(total=sum(map(len, batches)), unit="row", desc="loglikelihood", leave=False, disable=muted) as bar,
        ):
            for first in range(0, len(batches), copies):
                turn = batches[first : first + copies]
                batch = turn[processes.data_rank % len(turn)]
                scored = self._score(batch)
                if processes.data_rank < len(turn):
                    own += [(row.index, *result) for row, result in scored]
                bar.update(sum(map(len, turn)))
        # of the processes that ran the same batches, one tells
        speaks = processes.rank == min(
            rank for rank in range(processes.size) if processes.layout.data_rank(rank) == processes.data_rank
        )
        told = processes.exchange(own if speaks else [])
        return [(index, logp, greedy) for part in told for index, logp, greedy in part]

    @torch.no_grad()
    def _score(self, rows: Sequence[_Row]) -> list[tuple[_Row, tuple[float, bool]]]:
        examples = [row.example() for row in rows]
        origin = {id(example): row for example, row in zip(examples, rows, strict=True)}
        groups = group_by_prefix(examples) if self._share else [(0, [example]) for example in examples]
        order = [origin[id(member)] for _, members in groups for member in members]
        batch = pack_groups(groups).to(self.loaded.device)
        attention = batch.attention()
        positions = attention.positions(batch.input_ids.shape[1], batch.input_ids.device)
        hidden = self._model.hidden_states(batch.input_ids, positions, attention)
        labelled = batch.labels[0] != IGNORE
        logps, greedy = self._likelihoods(hidden[0, labelled], batch.labels[0, labelled])
        sizes = [len(row.targets) for row in order]
        return [
            (row, (float(own.double().sum()), bool(hits.all())))
            for row, own, hits in zip(
                order, torch.split(logps.cpu(), sizes), torch.split(greedy.cpu(), sizes), strict=True
            )
        ]

    def _likelihoods(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each position (N, hidden): log-probability of its target (N,), and whether that is the likeliest token."""
        chunk = max(1, LOGITS_AT_ONCE // self.loaded.model.config.vocab_size)
        logps, greedy = [], []
        for part, target in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            logits = self._model.lm_head(part).float()
            logps.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == target)
        return torch.cat(logps), torch.cat(greedy)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of `max_length` that do not overlap."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            own = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            new = [(None, *make_disjoint_window(window)) for window in own]
            windows += new
            counts.append(len(new))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first of its stop texts or the end of the text."""
        end = self._text.decode([self._end], skip_special_tokens=False)
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        stops: list[list[str]] = []
        for request in requests:
            context, settings = request.args
            kwargs = dict(normalize_gen_kwargs(settings, MAX_GENERATED_TOKENS))
            stop = [text for text in handle_stop_sequences(kwargs.pop("until", None), eos=end) if text]
            room = self.max_length - int(kwargs["max_gen_toks"])
            if room < 1:
                raise GenerationError(
                    f"a task asks for answers of {kwargs['max_gen_toks']} tokens and the model takes {self.max_length} with "
                    "the prompt: lower max_gen_toks in its generation_kwargs"
                )
            prompts.append(self.tok_encode(context)[-room:] or [self.prefix_token_id])
            params.append(_sampling(kwargs, stop, seed=len(params)))
            stops.append(stop)
        quiet = True if disable_tqdm or not self._processes.first else None
        with tqdm(total=len(requests), unit="row", desc="answers", leave=False, disable=quiet) as bar:
            answers = generate_shared(
                self.loaded.model,
                self._text,
                prompts,
                params,
                max_running=self.batch_size,
                compile=self._compile,
                on_done=bar.update,
            )
        texts = [
            postprocess_generated_text(answer.text, stop, None) for answer, stop in zip(answers, stops, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def _sampling(kwargs: dict[str, Any], stop: list[str], seed: int) -> SamplingParams:
    """The harness's generation settings as ours; those of other engines are left out."""
    known = ("top_k", "top_p", "min_p", "repetition_penalty")
    return SamplingParams(
        max_new_tokens=int(kwargs["max_gen_toks"]),
        do_sample=bool(kwargs.get("do_sample", False)),
        temperature=float(kwargs.get("temperature", 1.0)),
        stop_strings=tuple(stop),
        seed=seed,
        **{name: kwargs[name] for name in known if kwargs.get(name) is not None},
    )


def find_tasks(names: Sequence[str], include_path: str | None) -> tuple[TaskManager, list[str]]:
    """The tasks of those names (or patterns), of the folder's own first; no data is read.

    Raises:
        ConfigError: naming what there is no task for.
    """
    manager = None
    if include_path is not None:
        if not any(Path(include_path).rglob("*.yaml")):
            raise ConfigError(f"--include_path {include_path}: there is no task file (*.yaml) there")
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or any(not manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include_path)  # reads the thousands of files that come with the harness
    missing = [name for name in names if not manager.match_tasks([name])]
    if missing:
        where = f"in {include_path} or " if include_path else ""
        way_out = "check the spelling" if include_path else "check the spelling, or give their folder as --include_path"
        raise ConfigError(f"--tasks {', '.join(missing)}: there is no such task {where}in lm-eval; {way_out}")
    return manager, manager.match_tasks(list(names))


def run_tasks(
    model: HarnessModel, manager: TaskManager, tasks: list[str], options: EvaluateOptions
) -> dict[str, Any] | None:
    """What the harness finds; None in processes other than a machine's first.

    Raises:
        DataError: a task whose data or definition cannot be used.
    """
    if options.apply_chat_template and not model.loaded.tokenizer.has_chat_template():
        raise ConfigError(f"--apply_chat_template: {model.loaded.folder} has no chat template; drop the option")
    try:
        results: dict[str, Any] | None = simple_evaluate(
            model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            batch_size=options.per_device_eval_batch_size,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            bootstrap_iters=1000,
        )
    except ArrieroError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:  # data that is not there, a broken definition
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"--tasks {','.join(tasks)}: the harness stopped with {reason}") from error
    return results


def table_of(results: dict[str, Any]) -> str:
    """The scores as the harness's own table, groups below."""
    tables = [make_table(results), *([make_table(results, "groups")] if results.get("groups") else [])]
    return "\n".join(tables)
