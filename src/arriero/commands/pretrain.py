"""`arriero pretrain`: from scratch, or on with `--continue_training`."""

from __future__ import annotations

from pathlib import Path

from arriero.commands.hub_push import check_push, push
from arriero.commands.next_command import tell_next
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.hub import HubOptions
from arriero.config.logging import LoggingOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.pretraining import CorpusOptions, PretrainModelOptions, PretrainOptimizationOptions
from arriero.config.training import PRETRAIN

HELP = "Train a model on a token corpus, from random weights or from those of a model."

OPTIONS: tuple[type, ...] = (*PRETRAIN, HubOptions)


def run(
    model: PretrainModelOptions,
    corpus: CorpusOptions,
    optimization: PretrainOptimizationOptions,
    precision: PrecisionOptions,
    parallel: ParallelOptions,
    checkpoint: CheckpointOptions,
    logging: LoggingOptions,
    hub: HubOptions,
) -> int:
    """Pre-train."""
    check_push(hub, checkpoint, do_train=optimization.do_train)
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
    if optimization.do_train:
        tell_next("chat", checkpoint.output_dir)
    push(hub, Path(checkpoint.output_dir))
    return 0
