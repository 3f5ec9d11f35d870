"""What all sittings of a run have in common besides their data and their trained weights: checkpoints keep it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from arriero.errors import FormatError, TrainingError
from arriero.formats.fingerprint import weights_fingerprint
from arriero.formats.peft import is_adapter, read_adapter_config

BASE = "base"
# PEFT's word for a kind of adapter, and the option that trains one.
_KINDS = {"PREFIX_TUNING": "--prefix_tuning", "LORA": "--lora"}


def facts_of(optim: str, base: Path | None = None, quantize_base: str | None = None) -> dict[str, str]:
    """
    Args:
        base: the folder of a model that stays as it is.
        quantize_base: in few bits of this kind.
    """
    # 8-bit AdamW keeps its moments in checkpoints as AdamW does
    facts = {"optim": "adamw" if optim == "adamw_8bit" else optim}
    if base is not None:
        facts |= {BASE: weights_fingerprint(base), "quantize_base": quantize_base or "none"}
    return facts


def check_facts(checkpoint: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """
    Raises:
        TrainingError: one that both runs know is another.
    """
    for name in then.keys() & now.keys():
        if then[name] == now[name]:
            continue
        if name == BASE:
            raise TrainingError(
                f"{checkpoint} was trained on another base model: give that one as --model_name_or_path, or start from this "
                "adapter with --lora_path or --prefix_path in place of resuming"
            )
        raise TrainingError(
            f"{checkpoint} was trained with --{name} {then[name]} and this run has {now[name]}: give the same, or start anew "
            "in another --output_dir"
        )


def check_kind(checkpoint: Path, option: str | None) -> None:
    """
    Args:
        option: the one that makes this run's weights an adapter; None if it trains all weights.

    Raises:
        FormatError: the checkpoint holds weights of another kind.
    """
    found = None
    if is_adapter(checkpoint):
        found = _KINDS.get(str(read_adapter_config(checkpoint, "")[0].get("peft_type")))
    if found != option:
        was = "all weights" if found is None else f"an adapter ({found})"
        way = f"add {found}" if option is None else f"leave out {option}" + (f", and add {found}" if found else "")
        raise FormatError(f"{checkpoint} is of a run that trained {was}: {way}")
