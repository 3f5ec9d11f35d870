"""The verbs: name -> (module that holds HELP, OPTIONS and run, one line for `arriero --help`).

`ONE_PROCESS` are those that run in a single process.
A verb's module is imported only when the verb is called, and torch only inside its `run`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arriero.errors import ConfigError

VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("arriero.commands.quickstart", "fine-tune a real model on this machine and see it get better"),
    "download": ("arriero.commands.download", "bring a named or Hub model into a local folder"),
    "upload": ("arriero.commands.upload", "publish a model, an adapter or a GGUF file on the Hub"),
    "convert": ("arriero.commands.convert", "turn a model or adapter into another format or type"),
    "inspect": ("arriero.commands.inspect", "tell what a model, adapter, corpus or file of tensors is"),
    "preprocess": ("arriero.commands.preprocess", "turn raw text into a token corpus"),
    "plan": ("arriero.commands.plan", "tell the memory and time of a run before it"),
    "pretrain": ("arriero.commands.pretrain", "train from scratch, or go on with --continue_training"),
    "finetune": ("arriero.commands.finetune", "fine-tune a model: all weights, LoRA, a prefix, QAT; preferences"),
    "evaluate": ("arriero.commands.evaluate", "score a checkpoint: loss, perplexity, task metrics"),
    "predict": ("arriero.commands.predict", "answer a file of prompts"),
    "merge": ("arriero.commands.merge", "join an adapter and its base into one model"),
    "quantize": ("arriero.commands.quantize", "make the weights of a model smaller"),
    "export": ("arriero.commands.export", "write a bundle that runs without the model's Python code"),
    "infer": ("arriero.commands.infer", "run an exported bundle"),
    "chat": ("arriero.commands.chat", "talk to a model in the terminal"),
    "serve": ("arriero.commands.serve", "answer requests over HTTP"),
    "bench": ("arriero.commands.bench", "measure the speed of a model on this machine"),
    "launch": ("arriero.commands.launch", "start a verb on several processes"),
    "completion": ("arriero.commands.completion", "print a completion script for bash, zsh or fish"),
}
ONE_PROCESS = frozenset(
    {
        "quickstart",
        "quantize",
        "export",
        "infer",
        "download",
        "upload",
        "convert",
        "inspect",
        "preprocess",
        "plan",
        "chat",
        "bench",
        "completion",
    }
)
# Names of other programs for what is done by a verb, or by one of several.
_CALLED = {
    "dpo": "`arriero finetune --preference dpo`",
    "eval": "`arriero evaluate`",
    "generate": "`arriero predict` for a file of prompts, `arriero chat` for one",
    "sft": "`arriero finetune`",
    "train": "`arriero finetune` for a model that is there, `arriero pretrain` from scratch",
}


@dataclass(frozen=True)
class Verb:
    """A verb that has been imported."""

    name: str
    help: str
    options: tuple[type, ...]
    run: Callable[..., int]

    @property
    def prog(self) -> str:
        return f"arriero {self.name}"


def load_verb(name: str) -> Verb:
    """Import a verb's module.

    Raises:
        ConfigError: there is no such verb; the nearest one, or what it is called here, is named.
    """
    if name not in VERBS:
        from arriero.config.values import nearest

        suggestion = nearest(name, list(VERBS))
        hint = f"did you mean {suggestion}?" if suggestion else "arriero --help lists them"
        if name in _CALLED:
            hint = f"it is {_CALLED[name]}"
        raise ConfigError(f"unknown command {name[:60]!r}: {hint}")
    module: Any = importlib.import_module(VERBS[name][0])
    return Verb(name=name, help=module.HELP, options=tuple(module.OPTIONS), run=module.run)
