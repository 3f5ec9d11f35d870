"""LoRA adapters in the files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.json_file import read_json_object
from arriero.formats.module_patterns import MAX_CHOICES, MAX_EXPRESSIONS, MAX_NAMES, are_too_many, is_pattern
from arriero.formats.parts import Part, Placement
from arriero.formats.peft_layers import LAYER_KEYS, check_layer_keys, stored_layers
from arriero.formats.safe_tensors import read_tensors
from arriero.formats.shared_files import ALONE, PartReader, Peers, agree, shared_folder, write_tensor_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Weights of the base that PEFT writes beside an adapter of the layer; they are compared with the base's, and not loaded.
BASE_COPIES = frozenset({"lm_head.weight", "model.embed_tokens.weight"})
Number = TypeVar("Number", int, float)

_PREFIX = "base_model.model."
_ADAPTER = re.compile(r"(.+)\.lora_[AB]\.weight")
_START = re.compile(r"(.+\.lora_[AB])0\.weight")  # what an update counts from; see `save_adapter`
_MAGNITUDE = ".lora_magnitude_vector"
# Keys that change nothing in how a saved adapter is applied, whatever they hold.
_HARMLESS = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "megatron_core",
        "megatron_config",
        "runtime_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "init_lora_weights",
    }
)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format, and no model beside it."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


@dataclass(frozen=True)
class PeftLoraConfig:
    """The part of PEFT's `LoraConfig` that decides what an adapter computes.

    Attributes:
        r: rank.
        lora_alpha: strength; the update is scaled by lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`).
        lora_dropout: probability of dropping an input of the adapter in training.
        target_modules: last name parts of the adapted layers, or one regular expression.
        bias: "none", "all" or "lora_only": which biases were trained too.
        use_rslora: rank-stabilised scaling.
        use_dora: every adapted layer has a vector of row lengths, `...lora_magnitude_vector`.
        rank_pattern, alpha_pattern: other values of r and lora_alpha, by regular expressions for ends of layer names.
        base_model_name_or_path: the model it was trained on.
        extra: every other key of the file, written back. `LAYER_KEYS` are among them; `load_adapter` says what they mean.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ()
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = ADAPTER_CONFIG) -> PeftLoraConfig:
        """Read the content of an adapter_config.json.

        Raises:
            FormatError: for a missing or impossible value, a method that is not LoRA, or a variant of it that is not
                supported (trained embeddings, …), naming the key.
        """
        if values.get("peft_type") != "LORA":
            hint = "; it goes with --prefix_path" if values.get("peft_type") == "PREFIX_TUNING" else ""
            raise FormatError(
                f"{source}: peft_type {str(values.get('peft_type'))[:40]!r} is not supported; 'LORA' is{hint}"
            )
        rank, alpha, dropout = values.get("r"), values.get("lora_alpha"), values.get("lora_dropout", 0.0)
        if not _is_rank(rank):
            raise FormatError(f"{source}: r must be a whole number of at least 1, got {rank!r}")
        if not _is_alpha(alpha):
            raise FormatError(f"{source}: lora_alpha must be a number above 0, got {alpha!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise FormatError(f"{source}: lora_dropout must be a number in [0, 1), got {dropout!r}")
        targets = values.get("target_modules")
        if isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets):
            targets = tuple(sorted(set(targets)))  # PEFT keeps a set: the order means nothing
        elif not isinstance(targets, str) or not targets:
            raise FormatError(f"{source}: target_modules must be a list of layer names or a pattern, got {targets!r}")
        elif not is_pattern(targets):
            raise FormatError(
                f"{source}: target_modules {targets[:60]!r} is not a regular expression, or one with more than "
                f"{MAX_CHOICES} repetitions and choices or a repeated group"
            )
        bias = values.get("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            raise FormatError(f"{source}: bias must be none, all or lora_only, got {bias!r}")
        switches = {key: values.get(key, False) for key in ("use_rslora", "use_dora")}
        for key, value in switches.items():
            if not isinstance(value, bool):
                raise FormatError(f"{source}: {key} must be true or false, got {value!r}")
        ranks = _pattern_of(values, "rank_pattern", _is_rank, source)
        alphas = _pattern_of(values, "alpha_pattern", _is_alpha, source)
        base = values.get("base_model_name_or_path")
        own = set(cls.__dataclass_fields__) - {"extra"}
        extra = {key: value for key, value in values.items() if key not in own}
        # PiSSA, OLoRA and the like change the base weights when the adapter is set up, so they are no plain LoRA.
        if extra.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
            raise FormatError(
                f"{source}: init_lora_weights {str(extra['init_lora_weights'])[:40]!r} changes the base model; "
                "convert the adapter to plain LoRA with PEFT first"
            )
        check_layer_keys(values, source)
        for key, value in extra.items():
            if key not in _HARMLESS | LAYER_KEYS and value not in (None, False, 0) and value != {} and value != []:
                raise FormatError(
                    f"{source}: {key[:60]} is {str(value)[:60]}, which is not supported; only LoRA and DoRA are"
                )
        return cls(
            rank,
            alpha,
            float(dropout),
            targets,
            bias,
            **switches,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            base_model_name_or_path=base if isinstance(base, str) else None,
            extra=extra,
        )

    def rank_of(self, layer: str) -> int:
        """The rank in the layer with this full name."""
        return of_pattern(self.rank_pattern, layer, self.r)

    def to_dict(self) -> dict[str, Any]:
        """The content of an adapter_config.json for PEFT."""
        return {
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            **self.extra,
            "peft_type": "LORA",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules
            if isinstance(self.target_modules, str)
            else sorted(self.target_modules),
            "bias": self.bias,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }


def of_pattern(patterns: Mapping[str, Number], layer: str, default: Number) -> Number:
    """The value of the first pattern that a layer's full name, or its end after a dot, matches (PEFT's rule)."""
    return next((value for key, value in patterns.items() if _compiled(key).match(layer)), default)


@functools.lru_cache(2 * MAX_NAMES)  # `re` keeps 512 only, and every layer is compared with every pattern
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _is_rank(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _pattern_of(values: Mapping[str, Any], key: str, valid: Callable[[Any], bool], source: str) -> dict[str, Any]:
    """One of the two patterns of the file."""
    found = values.get(key) or {}
    if isinstance(found, dict) and are_too_many(found):
        raise FormatError(
            f"{source}: {key} has {len(found):,} entries, which would take too long: {MAX_NAMES:,} names of layers may be "
            f"given, and {MAX_EXPRESSIONS} regular expressions of few repetitions and choices in all"
        )
    if not isinstance(found, dict) or not all(is_pattern(name) and valid(value) for name, value in found.items()):
        raise FormatError(
            f"{source}: {key} must give a number above 0 for patterns of layer names, got {str(found)[:60]}"
        )
    return dict(found)


def save_adapter(
    folder: str | Path,
    state: Mapping[str, Tensor] | Mapping[str, Part],
    config: PeftLoraConfig,
    peers: Peers = ALONE,
) -> None:
    """Write an adapter that PEFT loads, as a whole or not at all.

    Where an update counts from where it started (``B A - B0 A0``, `...lora_A0.weight` and `...lora_B0.weight` in `state`),
    it is written as an ordinary one of twice the rank, ``[A; A0]`` and ``[B, -B0]``.

    Args:
        state: the adapter's tensors under the names of the adapted model, e.g.
            `model.layers.0.self_attn.q_proj.lora_A.weight`; trained biases under their usual names.
        peers: the processes that hold them together; every one calls this with its own parts.

    Raises:
        FormatError: when there is nothing to write or it cannot be written.
        PeerError: when it went wrong in another process.
    """
    # a process that holds nothing of a small matrix must still know that its layer is adapted
    adapted = {match[1] for name in agree(state, peers) if (match := _ADAPTER.fullmatch(name))}
    if not adapted:
        raise FormatError(f"{folder}: there are no LoRA tensors to save")
    named = {_stored_name(name, adapted): value for name, value in state.items()}
    with shared_folder(folder, peers) as staging:
        write_tensor_file(named, staging / ADAPTER_WEIGHTS, peers)
        with peers.together():
            if peers.first:
                _join_starts(staging / ADAPTER_WEIGHTS)
                text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"
                (staging / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _join_starts(path: Path) -> None:
    """Put ``[A; A0]`` and ``[B, -B0]`` in the place of the four tensors of each layer that has them."""
    tensors = dict(read_tensors(path))
    if not any(_START.fullmatch(name) for name in tensors):
        return
    joined = {name: tensor.clone() for name, tensor in tensors.items() if not _START.fullmatch(name)}
    for name, start in tensors.items():
        match = _START.fullmatch(name)
        if match is not None:
            own = f"{match[1]}.weight"
            is_b = own.endswith(".lora_B.weight")
            joined[own] = torch.cat((joined[own], -start if is_b else start), dim=int(is_b))
    write_tensor_file(joined, path)


def _stored_name(name: str, adapted: Set[str]) -> str:
    """PEFT keeps an adapted layer's own bias one level deeper."""
    layer, _, leaf = name.rpartition(".")
    own = layer in adapted and not leaf.startswith("lora_")
    return _PREFIX + (f"{layer}.base_layer.{leaf}" if own else name)


def check_config(folder: str | Path, expected: PeftLoraConfig) -> None:
    """Compare an adapter's configuration with that of the adapted model which it is to go into.

    Raises:
        FormatError: naming the first value that differs.
    """
    stored = _read_config(Path(folder))
    for key in ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        found, wanted = (getattr(config, key) for config in (stored, expected))
        if isinstance(found, tuple) and isinstance(wanted, tuple):
            found, wanted = sorted(found), sorted(wanted)
        if found != wanted:
            raise FormatError(
                f"{folder}: the adapter was trained with {key} {found}, this run has {wanted}: give the same LoRA options"
            )


def load_adapter_parts(folder: str | Path, placements: Mapping[str, Placement]) -> dict[str, Tensor]:
    """This process's parts of an adapter's tensors, as views of the mapped file.

    Args:
        placements: of the wanted ones, under the names of the adapted model.

    Raises:
        FormatError: when the file is missing or broken, or lacks a tensor of the right shape.
    """
    reader = PartReader(_weights_of(Path(folder)))
    adapted = {match[1] for name in placements if (match := _ADAPTER.fullmatch(name))}
    doubled = {f"{match[1]}.weight" for name in placements if (match := _START.fullmatch(name))}
    found = {}
    for name, where in placements.items():
        match = _START.fullmatch(name)
        own = f"{match[1]}.weight" if match else name
        is_b = own.endswith(".lora_B.weight")
        if own in doubled:
            where = _half(where, int(is_b), second=match is not None)
        tensor = reader.read_part(_stored_name(own, adapted), where)
        found[name] = -tensor if match and is_b else tensor
    return found


def _half(where: Placement, dim: int, *, second: bool) -> Placement:
    """The placement in a tensor of twice the size in `dim`, one being in the first or second half of it."""
    shape, offset = list(where.shape), list(where.offset)
    offset[dim] += shape[dim] if second else 0
    shape[dim] *= 2
    return replace(where, shape=tuple(shape), offset=tuple(offset))


def load_adapter(folder: str | Path) -> tuple[PeftLoraConfig, dict[str, Tensor]]:
    """Read an adapter written by PEFT or by `save_adapter`.

    Returns:
        Its configuration, whose `target_modules` are the full names of the stored layers where more keys choose among them, and
        its tensors under the names of the adapted model (without PEFT's prefix). Copies of the base's
        weights (`BASE_COPIES`) are among them where PEFT wrote them.

    Raises:
        FormatError: when a file is missing or broken, or a tensor is none of a LoRA adapter.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = _weights_of(folder)
    state = {}
    for name, tensor in read_tensors(path):
        if not name.startswith(_PREFIX):
            raise FormatError(f"{path}: {name} is not a tensor of a PEFT adapter (it does not start with {_PREFIX})")
        plain = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        match = _ADAPTER.fullmatch(plain)
        is_copy = plain in BASE_COPIES and name.endswith(".base_layer.weight")
        if match is None and not is_copy and not plain.endswith((".bias", _MAGNITUDE)):
            raise FormatError(f"{path}: {name} is neither a LoRA matrix nor a bias; only LoRA and DoRA are supported")
        if match is not None:
            rank = config.rank_of(match[1])
            if tensor.dim() != 2 or tensor.shape[0 if ".lora_A." in plain else 1] != rank:
                shape = list(tensor.shape)
                raise FormatError(f"{path}: {name} has the shape {shape}, which does not fit the rank {rank}")
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise FormatError(f"{path}: {name} has the dtype {str(tensor.dtype).removeprefix('torch.')}")
        state[plain] = tensor.clone(memory_format=torch.contiguous_format)  # small, and the file may be replaced
    _check_complete(config, state, path)
    return _with_stored_layers(config, state, path), state


def _with_stored_layers(config: PeftLoraConfig, state: Mapping[str, Tensor], path: Path) -> PeftLoraConfig:
    """The configuration with the names of all adapted layers, where it has keys that choose among its targets."""
    if not check_layer_keys(config.extra, str(path)):
        return config
    layers = {match[1] for name in state if (match := _ADAPTER.fullmatch(name))}
    targets = stored_layers(config.extra, config.target_modules, layers, str(path))
    extra = {key: value for key, value in config.extra.items() if key not in LAYER_KEYS}
    return replace(config, target_modules=targets, extra=extra)


def _check_complete(config: PeftLoraConfig, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises FormatError where a layer lacks a tensor, or has a vector of lengths that does not fit it."""
    for layer in {match[1] for name in state if (match := _ADAPTER.fullmatch(name))}:
        for part in ("A", "B"):
            if f"{layer}.lora_{part}.weight" not in state:
                raise FormatError(f"{path}: {layer} has no lora_{part} matrix; the file is incomplete")
        lengths = state.get(layer + _MAGNITUDE)
        if (lengths is not None) != config.use_dora:
            raise FormatError(
                f"{path}: {layer} has {'no' if lengths is None else 'a'}{_MAGNITUDE.replace('.', ' ')}, and use_dora is "
                f"{str(config.use_dora).lower()} in {ADAPTER_CONFIG}"
            )
        rows = state[f"{layer}.lora_B.weight"].shape[0]
        if lengths is not None and tuple(lengths.shape) != (rows,):
            raise FormatError(f"{path}: {layer + _MAGNITUDE} has the shape {list(lengths.shape)}, {[rows]} is needed")


def _weights_of(folder: Path) -> Path:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        hint = "; the pickled adapter_model.bin is never opened" if (folder / "adapter_model.bin").exists() else ""
        raise FormatError(f"{folder}: holds no {ADAPTER_WEIGHTS}{hint}")
    return folder / ADAPTER_WEIGHTS


def _read_config(folder: Path) -> PeftLoraConfig:
    values, source = read_adapter_config(folder, "an adapter folder needs it")
    return PeftLoraConfig.from_dict(values, source)


def read_adapter_config(folder: Path, missing: str) -> tuple[dict[str, Any], str]:
    """The JSON object of a folder's adapter_config.json, of whatever kind of adapter, and the file's name for messages.

    Args:
        missing: what a message says where there is none.

    Raises:
        FormatError: when the file is missing, too large or no JSON object, or the adapter is in another format.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        from arriero.formats.adapter_base import refuse_other_kind  # which knows this module

        refuse_other_kind(folder)
    return read_json_object(path, missing), str(path)
