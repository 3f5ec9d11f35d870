"""The option groups of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass, field

from arriero.config.adapter import AdapterOptions
from arriero.config.data import DataOptions
from arriero.config.preference import PreferenceOptions
from arriero.config.quantization import QuantizationOptions
from arriero.config.vocabulary import VocabularyOptions
from arriero.training.run import RunOptions


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """The option groups of a fine-tuning run."""

    data: DataOptions
    adapter: AdapterOptions
    quantization: QuantizationOptions
    preference: PreferenceOptions = field(default_factory=PreferenceOptions)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
