"""Fixtures of several files; a file's own of the same name come first."""

from __future__ import annotations

import pytest

from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.engine.grammar import GrammarCompiler
from arriero.formats.download import resolve_model
from arriero.models.presets import TINY_RANDOM_LLAMA


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Of the tiny model."""
    return load_tokenizer(resolve_model(TINY_RANDOM_LLAMA))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    """Of structures for it."""
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)
