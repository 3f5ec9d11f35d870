"""The option groups of the two verbs that train, without what only a command line has."""

from __future__ import annotations

from arriero.config.adapter import AdapterOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.data import DataOptions
from arriero.config.logging import LoggingOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.preference import PreferenceOptions
from arriero.config.pretraining import CorpusOptions, PretrainModelOptions, PretrainOptimizationOptions
from arriero.config.quantization import QuantizationOptions
from arriero.config.vocabulary import VocabularyOptions

FINETUNE: tuple[type, ...] = (
    ModelOptions,
    DataOptions,
    OptimizationOptions,
    PrecisionOptions,
    AdapterOptions,
    QuantizationOptions,
    PreferenceOptions,
    VocabularyOptions,
    ParallelOptions,
    CheckpointOptions,
    LoggingOptions,
)
PRETRAIN: tuple[type, ...] = (
    PretrainModelOptions,
    CorpusOptions,
    PretrainOptimizationOptions,
    PrecisionOptions,
    ParallelOptions,
    CheckpointOptions,
    LoggingOptions,
)
