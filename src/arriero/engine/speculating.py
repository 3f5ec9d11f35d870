"""From options to what guesses tokens ahead."""

from __future__ import annotations

from dataclasses import replace

from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.config.speculation import SpeculationOptions
from arriero.engine.draft_model import DraftModel
from arriero.engine.drafts import PromptLookup, Speculation
from arriero.engine.loading import LoadedModel, load_for_inference
from arriero.engine.runner import TorchRunner


def speculation_over(
    options: SpeculationOptions, model: ModelOptions, loaded: LoadedModel, running: int
) -> Speculation | None:
    """What guesses for so many requests at once; None where nothing is to be guessed.

    Make it before the model's own runner, which takes what memory there is for keys and values. Of several processes the first
    alone needs it.

    Args:
        model: how the draft model is loaded too.

    Raises:
        ArrieroError: the draft model cannot be had, or has another vocabulary.
    """
    if not options.num_speculative_tokens:
        return None
    if options.draft_model is None:
        return Speculation(PromptLookup(), options.num_speculative_tokens)
    draft = load_for_inference(
        replace(model, model_name_or_path=options.draft_model, tokenizer_name_or_path=None), AdapterPathOptions()
    ).model
    runner = TorchRunner(draft, useful_tokens=running * draft.context)
    return Speculation(DraftModel(runner, loaded.model.config.vocab_size), options.num_speculative_tokens)
