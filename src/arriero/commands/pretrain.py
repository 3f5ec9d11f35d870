"""`arriero pretrain`: from scratch, or on with `--continue_training`."""

from __future__ import annotations

from arriero.config.checkpoint import CheckpointOptions
from arriero.config.logging import LoggingOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.pretraining import CorpusOptions, PretrainModelOptions, PretrainOptimizationOptions

HELP = "Train a model on a token corpus, from random weights or from those of a model."

OPTIONS: tuple[type, ...] = (
    PretrainModelOptions,
    CorpusOptions,
    PretrainOptimizationOptions,
    PrecisionOptions,
    ParallelOptions,
    CheckpointOptions,
    LoggingOptions,
)


def run(
    model: PretrainModelOptions,
    corpus: CorpusOptions,
    optimization: PretrainOptimizationOptions,
    precision: PrecisionOptions,
    parallel: ParallelOptions,
    checkpoint: CheckpointOptions,
    logging: LoggingOptions,
) -> int:
    """Pre-train."""
    from arriero.training.pretraining import PretrainOptions, pretrain

    pretrain(
        PretrainOptions(
            model=model,
            corpus=corpus,
            optimization=optimization,
            precision=precision,
            parallel=parallel,
            checkpoint=checkpoint,
            logging=logging,
        )
    )
    return 0
