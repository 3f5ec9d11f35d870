"""The first run."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option


@dataclass(kw_only=True)
class QuickstartOptions(OptionGroup):
    """Quickstart."""

    output_dir: str = option("runs/quickstart", "folder of the run; what is done there already is not done again")
    model_name_or_path: str = option("smollm2-135m-instruct", "the model that is fine-tuned", aliases=("model",))
    dataset_path: str | None = option(
        None, "your own questions: a folder with train.json and dev.json in SQuAD format (default: the shipped ones)"
    )
    max_steps: int = option(-1, "training steps of 8 questions each; -1: once through all questions", minimum=-1)
    max_train_samples: int | None = option(None, "use only the first N training questions", minimum=1)
    max_eval_samples: int | None = option(None, "score only the first N held-out questions", minimum=1)
    disable_tqdm: bool = option(False, "no progress bars")
    cache_dir: str | None = option(
        None, "where downloaded models are kept (default: $ARRIERO_HOME or ~/.cache/arriero)"
    )
