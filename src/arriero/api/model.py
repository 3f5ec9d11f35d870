"""A checkpoint in memory."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.api.adapters import adapter_options
from arriero.api.arguments import model_name, path_of, plain, whole_number
from arriero.api.groups import build
from arriero.api.text import Message, Prompt, TextModel
from arriero.api.words import in_python
from arriero.errors import ConfigError, DataError, GenerationError
from arriero.process_threads import release_workers

if TYPE_CHECKING:
    from typing import Unpack

    import torch
    from torch import Tensor

    from arriero.api.keywords import LoadKeywords
    from arriero.engine.loading import LoadedModel
    from arriero.models.config import LlamaConfig
    from arriero.models.llama import LlamaForCausalLM


class Model(TextModel):
    """A model with its tokenizer, and with its adapter if it has one. Made by `load`.

    Attributes:
        module: the `torch.nn.Module`, frozen and in evaluation mode. Parameters are named as in the HF folder. Its weights must
            not change while the model is used: copies of them are kept.
        config: its shape.
        folder: that it was read from.
        device: of the weights.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int, kv_cache_dtype: str, compile: bool) -> None:
        from arriero.engine.shared_generation import engine_of

        self.loaded = loaded
        self.module: LlamaForCausalLM = loaded.model
        self.config: LlamaConfig = loaded.model.config
        self.folder: Path = loaded.folder
        self.device: torch.device = loaded.device
        opened = contextlib.ExitStack()
        weakref.finalize(self, opened.close)  # also at the end of Python, while torch still works
        context = self.config.max_position_embeddings
        super().__init__(
            opened.enter_context(
                engine_of(
                    loaded.model,
                    loaded.tokenizer,
                    max_running=batch_size,
                    useful_tokens=batch_size * context,
                    kv_cache_dtype=kv_cache_dtype,
                    compile=compile,
                )
            )
        )
        release_workers()  # this thread need not be the one that asks

    def __repr__(self) -> str:
        first = next(self.module.parameters())
        about = f"{self.config.num_parameters():,} parameters, {str(first.dtype).removeprefix('torch.')}, {self.device}"
        return f"<arriero.{type(self).__name__} {str(self.folder)!r}: {about}>"

    def logits(self, prompt: Prompt) -> Tensor:
        """What the model says of each next token: (T, vocab_size) float32, row i after the first i + 1 tokens of the prompt.

        Args:
            prompt: as `generate` takes it; `encode` shows its T tokens.

        Raises:
            DataError: it is empty.
            GenerationError: it is longer than `context`, or holds ids that the model does not have.
        """
        import torch

        from arriero.engine.request import check_ids

        ids = self.encode_one(prompt)
        if not ids:
            raise DataError("the prompt has no token: give at least one, such as bos")
        check_ids(ids, self.config.vocab_size)
        if len(ids) > self.context:
            raise GenerationError(f"the prompt has {len(ids)} tokens: {self._too_long}; shorten it")
        with self.turns, torch.inference_mode():
            logits: Tensor = self.module(torch.tensor([ids], device=self.device))[0].float()
        return logits

    def perplexity(self, text: str | Sequence[Message] | Sequence[int], *, window: int | None = None) -> float:
        """The exponential of the mean negative log-likelihood of each token after the first.

        Args:
            text: as a prompt.
            window: a longer text is cut into windows of so many tokens, and each is scored by itself, but for its first token;
                None: as many as the model has positions.

        Raises:
            DataError: less than two tokens.
            ConfigError: a window below 2, or longer than `context`.
            GenerationError: ids that the model does not have.
        """
        import torch

        from arriero.engine.request import check_ids
        from arriero.training.quantizing import perplexity

        window = self.context if window is None else whole_number("window", window, 0)
        if window < 2:
            raise ConfigError(f"window is {window}: it must be at least 2, a token and the one after it")
        if window > self.context:
            raise ConfigError(f"window is {window}: {self._too_long}; give a smaller one")
        ids = self.encode_one(text)
        if len(ids) < 2:
            raise DataError(f"the text has {len(ids)} tokens: perplexity needs at least 2")
        check_ids(ids, self.config.vocab_size)
        blocks = torch.split(torch.tensor(ids), window)
        with self.turns:
            return perplexity(self.module, [block[None] for block in blocks if len(block) > 1])

    @property
    def _too_long(self) -> str:
        """Than what a sequence is too long."""
        positions = self.config.max_position_embeddings
        less = f" less a prefix of {positions - self.context}" if positions > self.context else ""
        return f"more than max_position_embeddings, {positions}{less}"

    @in_python("load")
    def save(
        self, folder: str | PathLike[str], *, dtype: str | torch.dtype | None = None, max_shard_size: str = "5GB"
    ) -> Path:
        """Write it as an HF folder that transformers, vLLM and arriero read; a LoRA adapter is in the weights then.

        Args:
            dtype: of the weights: "float32", "float16", "bfloat16" (or "fp32", "fp16", "bf16") or a torch.dtype; None or
                "auto": as they are in memory.

        Raises:
            ConfigError: a folder that holds something, a prefix, or quantized weights.
            FormatError: it cannot be written.
        """
        from arriero.config.model import DTYPES
        from arriero.formats.hf import save_model
        from arriero.formats.staging import check_target
        from arriero.quantization.linear import has_quantized_layers

        if self.module.model.prefix_length:
            raise ConfigError(f"{self.folder}: a prefix is no weight and cannot be saved with it; copy both folders")
        if has_quantized_layers(self.module):
            raise ConfigError(
                f"{self.folder}: its layers are quantized; copy the folder, or use arriero.convert or arriero.merge"
            )
        name = "auto" if dtype is None else plain(dtype)
        if name not in DTYPES:
            raise ConfigError(f"dtype is {name!r}: it takes one of {', '.join(DTYPES)}")
        kind = DTYPES[name] if DTYPES[name] != "auto" else None
        path = path_of("folder", folder)
        check_target(path, "folder")
        with self.turns:
            save_model(
                self.module, self.config, path, max_shard_size=max_shard_size, dtype=kind, extra_files_from=self.folder
            )
        return path


@in_python("load")
def load(
    model: str | PathLike[str],
    *,
    adapter: str | PathLike[str] | None = None,
    batch_size: int = 8,
    **options: Unpack[LoadKeywords],
) -> Model:
    """A model ready to generate and score.

    Args:
        model: a folder with config.json and safetensors weights, a named model such as "smollm2-135m-instruct", or a Hub id.
        adapter: the folder of a LoRA adapter or of a prefix, in PEFT's format.
        batch_size: prompts that are answered together at most.
        options: `device` ("auto", "cpu", "cuda", "cuda:1" or a torch.device), `dtype` ("auto": float32 on a CPU, as stored on a
            GPU; "float32", "float16", "bfloat16", or short "fp32", "fp16", "bf16", or a torch.dtype),
            `kv_cache_dtype`, `torch_compile`, `tokenizer_name_or_path`, `cache_dir`, ...: as in `arriero predict`.

    Raises:
        FormatError: files that are missing, broken or of an unsupported kind.
        ConfigError: a name that is not known, or options that cannot be.
    """
    from arriero.config.adapter import AdapterPathOptions
    from arriero.engine.loading import load_for_inference
    from arriero.export.bundle import is_bundle

    whole_number("batch_size", batch_size)
    name = model_name(model)
    if is_bundle(Path(os.path.expanduser(name))):
        raise ConfigError(f"{name}: is an exported bundle; use arriero.load_bundle")
    model_options, cache, compilation = build("load", options, model_name_or_path=name)
    loaded = load_for_inference(model_options, AdapterPathOptions(**adapter_options(adapter)))
    return Model(loaded, batch_size, cache.kv_cache_dtype, compilation.torch_compile)
