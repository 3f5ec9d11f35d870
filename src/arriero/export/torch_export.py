"""From a model to a bundle that torch runs: one exported program, and the weights beside it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from arriero.errors import ConfigError
from arriero.export.bundle import ANY, Bundle, Manifest, new_bundle, open_bundle, write_manifest
from arriero.export.integer_tiles import BLOCK
from arriero.export.model_files import generation_defaults, write_model_files
from arriero.export.prefix_file import PrefixArray, write_prefix
from arriero.export.self_check import PROMPTS
from arriero.export.slot_runner import SlotRunner
from arriero.export.torch_check import check_runner
from arriero.export.torch_runner import open_runner
from arriero.export.torch_session import WEIGHTS
from arriero.export.torch_target import Target, gpus
from arriero.export.torch_trace import trace_step
from arriero.export.torch_weights import MatrixForm, program_weights
from arriero.export.weight_source import WeightSource, adapter_words, integer_source
from arriero.formats.hf_source import open_hf
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.shared_files import write_tensor_file
from arriero.formats.source import ModelSource
from arriero.models.config import LlamaConfig

GRAPH = "model.pt2"
FORMS = {
    "fp32": MatrixForm(),
    "fp16": MatrixForm(torch.float16),
    "bf16": MatrixForm(torch.bfloat16),
    "int8": MatrixForm(bits=8),
    "int4": MatrixForm(bits=4),
}


@dataclass(frozen=True)
class TorchOptions:
    """How a model is exported.

    Attributes:
        weights: fp32; fp16 or bf16, in which matrices are stored. A CPU computes with them in fp32, a GPU in their own type.
            Of native code for CPUs also int8 and int4, which are multiplied as they are.
        head_bits: 8 or 4, of the output head and the embedding (int8, int4); None: 8.
        context: tokens of a sequence; None: all that the model has.
        device: that it is made for: cpu, cuda or cuda:N.

    Raises:
        ConfigError: for values that are not these, or a GPU where there is none.
    """

    weights: str = "fp32"
    context: int | None = None
    device: str = "cpu"
    head_bits: int | None = None

    def __post_init__(self) -> None:
        if self.device != "cpu" and not gpus():
            raise ConfigError(
                f"--device {self.device}: there is no GPU here, and a bundle is checked where it is to run"
            )
        if self.weights not in FORMS:
            raise ConfigError(f"weights of the kind {self.weights!r} are none of {', '.join(FORMS)}")
        if self.form.bits is not None and self.device != "cpu":
            raise ConfigError(f"--weights {self.weights} is for CPUs: a bundle for a GPU has fp32, fp16 or bf16")
        if self.head_bits not in (None, 4, 8):
            raise ConfigError(f"--head_bits {self.head_bits}: 8 or 4")

    @property
    def form(self) -> MatrixForm:
        """Of matrices."""
        form = FORMS[self.weights]
        return form if self.head_bits is None else replace(form, head_bits=self.head_bits)

    @property
    def target(self) -> Target:
        """What programs are made for."""
        return Target.of(self.device, self.form.dtype)

    @property
    def words(self) -> str:
        """How the weights are stored, for a manifest."""
        if self.form.bits is not None:
            layers = f"int{self.form.bits}, blocks of {BLOCK} with steps and lows"
            return f"{layers}; head and embedding int{self.form.head_bits}; inputs of products rounded to 8 bits"
        return self.weights if self.form.dtype == self.target.dtype else f"{self.weights}, computed with in fp32"

    def context_of(self, config: LlamaConfig) -> int:
        """Tokens of a sequence of this model.

        Raises:
            ConfigError: when it has not as many.
        """
        context = config.max_position_embeddings if self.context is None else self.context
        if not 2 <= context <= config.max_position_embeddings:
            raise ConfigError(
                f"a context of {context} cannot be exported: from 2 to the model's {config.max_position_embeddings} can"
            )
        return context


PLAIN = TorchOptions()


class RunnerOpener(Protocol):
    """See `kinds.open_runner`."""

    def __call__(self, bundle: Bundle, slots: int, *, device: str | None = None) -> SlotRunner: ...


@dataclass(frozen=True)
class ProgramKind:
    """A kind of bundle that is made of exported programs.

    Attributes:
        name: of the kind.
        write: writes GRAPH: its path, the model's configuration, the context, the weights and the target.
        open_runner: see `kinds.open_runner`.
        isa: what the processor must have.
    """

    name: str
    write: Callable[[Path, LlamaConfig, int, Mapping[str, LazyTensor], Target], None]
    open_runner: RunnerOpener
    isa: str = ANY


def export_torch(
    model: str | Path | ModelSource,
    target: str | Path,
    options: TorchOptions = PLAIN,
    *,
    prefix: PrefixArray | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write the bundle of a model; a weight at a time is in memory.

    Args:
        model: an HF folder, of which quantized weights are dequantized; or a model of any other origin.
        prefix: keys and values that every sequence begins with.
        defaults: of answers, besides those of the model.

    Raises:
        ConfigError: what the programs cannot compute.
        FormatError: a broken folder, a target in use, or a program that does not compute what the model computes.
    """
    if options.form.bits is not None:
        raise ConfigError(f"--format torch has no weights of the kind {options.weights}: --format onnx and aoti have")
    kind = ProgramKind("torch", _write_program, open_runner)
    return export_programs(kind, model, target, options, prefix, defaults or {})


def _write_program(
    path: Path, config: LlamaConfig, context: int, weights: Mapping[str, LazyTensor], target: Target
) -> None:
    program = trace_step(
        config, context, weights, replace(target, device=torch.device("cpu"))
    )  # it runs where it is put
    program.example_inputs = None  # which would be pickled
    torch.export.save(program, path)


def export_programs(
    kind: ProgramKind,
    model: str | Path | ModelSource,
    target: str | Path,
    options: TorchOptions,
    prefix: PrefixArray | None,
    defaults: Mapping[str, Any],
) -> Bundle:
    """See `export_torch`; for any such kind."""
    with nullcontext(model) if isinstance(model, ModelSource) else open_hf(model) as opened:
        config, form, made = opened.config, options.form, options.target
        source = WeightSource(opened) if form.bits is None else integer_source(opened, model)
        context, length = options.context_of(config), 0 if prefix is None else prefix.shape[3]
        _check_config(config, kind.name)
        if length >= context:
            raise ConfigError(f"a prefix of {length} fills a context of {context}: make that larger")
        with new_bundle(target) as staging:
            weights = program_weights(source, form)
            write_tensor_file(weights, staging / WEIGHTS)
            kind.write(staging / GRAPH, config, context, weights, made)
            manifest = Manifest(
                kind=kind.name,
                graph=GRAPH,
                weights=options.words + (adapter_words(source) if form.bits == 4 else ""),
                context=context,
                config=write_model_files(staging, opened),
                generation=generation_defaults(opened) | dict(defaults),
                check={},
                versions={"torch": importlib.metadata.version("torch")},
                device=options.device.partition(":")[0],
                isa=kind.isa,
                files={WEIGHTS: {}},
            )
            runner = kind.open_runner(Bundle(staging, manifest), len(PROMPTS), device=options.device)
            found = check_runner(runner, source, form, f"{kind.name} bundle", computed=made.dtype)
            if prefix is not None:
                write_prefix(staging, prefix)
            write_manifest(staging, replace(manifest, check=asdict(found), prefix_length=length))
    return open_bundle(target)


def _check_config(config: LlamaConfig, kind: str) -> None:
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "dynamic":
        raise ConfigError(
            f"rope type 'dynamic' cannot be exported to {kind}: its angles change with the length of the sequence, and keys "
            "are stored rotated; export gguf, or set another rope_scaling"
        )
