"""Models that were trained with rounded weights, from the folders of their runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.adapters.lora import apply_lora, load_adapter_state
from arriero.adapters.peft_config import from_peft
from arriero.adapters.qat import apply_qat, rounding_layers, to_quantized
from arriero.data.tokenizer_files import SIDE_FILES
from arriero.errors import ConfigError, FormatError
from arriero.formats import hf, peft
from arriero.formats.adapter_base import warn_of_other_base
from arriero.formats.conversion import SMALL
from arriero.formats.download import resolve_model
from arriero.formats.parts import Placement
from arriero.formats.quantized import check_finite, file_state, with_scheme
from arriero.formats.shared_files import PartReader
from arriero.formats.verification import PROMPT_TOKENS, same_numbers
from arriero.models.config import told_already
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.materialize import Values
from arriero.quantization.qat import RANGE, RANGES_FILE, QatSettings, is_range, read_settings

# Of the largest logit: what another order of additions may come to.
_NEAR = 1e-5


def apply_stored_rounding(
    model: LlamaForCausalLM, folder: Path, values: Values | None, *, column_parts: int = 1
) -> Values | None:
    """Let a model of exact weights, with its adapter beside them, round as the run in `folder` did; in place.

    With values, the layers become the integers that `arriero convert --to quantized` writes. On the meta device they round
    what each process will hold of them.

    Args:
        folder: with the `qat.json` of a run.
        values: where the weights come from if the model is on the meta device.
        column_parts: tensor-parallel processes.

    Returns:
        Where weights and ranges come from; None as `values` is.

    Raises:
        FormatError: if the ranges are missing or of another model.
    """
    settings = read_settings(folder)
    assert settings is not None
    print(f"weights rounded as in training: {settings}", file=sys.stderr)
    apply_qat(model, settings, column_parts=column_parts)
    reader = PartReader(folder / RANGES_FILE) if settings.rounds_inputs else None
    if values is None:
        _set_ranges(model, reader)
        to_quantized(model)
        return None

    def value(name: str, placement: Placement) -> Tensor:
        if reader is not None and is_range(name):
            return reader.read_part(name, placement)
        return values(name, placement)

    return value


@torch.no_grad()
def _set_ranges(model: LlamaForCausalLM, reader: PartReader | None) -> None:
    for name, layer in rounding_layers(model):
        if reader is not None and layer.input_range is not None:
            layer.input_range.copy_(reader.read_part(f"{name}.{RANGE}", Placement.whole((1,))))


def convert_trained(
    folder: Path,
    output: Path,
    *,
    cache_dir: Path | None,
    max_shard_size: int,
    dtype: str | None,
    base_model: str | None = None,
    verify: bool | None = False,
) -> tuple[QatSettings, str | None]:
    """Write the integers that a run with `--qat` trained for, as a quantized model folder.

    Args:
        folder: of the run, or one of its checkpoints.
        dtype: of what stays exact; None leaves it as it is.
        base_model: of an adapter: the model that it is for; None: the one that its configuration names.
        verify: read the folder back, and compare every tensor with what was packed, and the logits of a prompt with those of
            the model as it was trained; None: if the model has less than `SMALL` parameters.

    Returns:
        What was rounded, and what the comparison found, None without one.

    Raises:
        ConfigError: if the folder is of no such run.
        FormatError: if something in it is missing or broken, or what was written is not what was trained.
    """
    settings = read_settings(folder)
    if settings is None:
        raise ConfigError(
            f"--to quantized: {folder} holds no run of finetune --qat; `arriero quantize` rounds any other model"
        )
    source = folder
    if (folder / "config.json").is_file():
        model = hf.load_model(folder)
    else:
        stored, state = peft.load_adapter(folder)
        named = base_model or stored.base_model_name_or_path
        if named is None:
            raise FormatError(f"{folder}: {peft.ADAPTER_CONFIG} names no base model; add --base_model")
        source = resolve_model(named, cache_dir=cache_dir)
        if base_model is not None:
            warn_of_other_base(folder, base_model, source)
        model = hf.load_model(source)
        apply_lora(model, from_peft(stored), fresh=False)
        load_adapter_state(model, state)
    apply_qat(model, settings)
    _set_ranges(model, PartReader(folder / RANGES_FILE) if settings.rounds_inputs else None)
    if verify is None:
        verify = model.config.num_parameters() < SMALL
    trained = _prompt_logits(model) if verify else None
    to_quantized(model)
    if dtype is not None:
        model.to(getattr(torch, dtype))
    kind = model.model.embed_tokens.weight.dtype
    config = with_scheme(replace(model.config, dtype=hf.dtype_name(kind)), settings.stored)
    # an adapter may have been trained with another tokenizer, which is beside it then
    own = [folder / name for name in SIDE_FILES if name != "generation_config.json" and (folder / name).is_file()]
    files = {path.name: path.read_bytes() for path in own}
    state = file_state(model, kind)
    check_finite(state, folder)
    hf.save_model(
        state,
        config,
        output,
        max_shard_size=max_shard_size,
        extra_files_from=source,
        extra_files=files,
    )
    if trained is None:
        return settings, None
    exact = dtype is None and not settings.rounds_inputs  # else an input between two integers may go either way
    return settings, _compare(model, trained, output, exact=exact)


@torch.inference_mode()
def _prompt_logits(model: LlamaForCausalLM) -> Tensor:
    """(S, vocab_size) fp32, of a fixed prompt."""
    ids = torch.arange(PROMPT_TOKENS) * 7919 % model.config.vocab_size
    logits: Tensor = model.eval()(ids[None])[0]
    return logits.float()


def _compare(model: LlamaForCausalLM, trained: Tensor, output: Path, *, exact: bool) -> str:
    """Read a folder back.

    Args:
        model: what was written.
        trained: `_prompt_logits` of the model as it was trained.
        exact: whether those of the folder are to be equal, up to the order of additions.

    Raises:
        FormatError: it is another model.
    """
    with told_already():
        written = hf.load_model(output)
    packed = model.state_dict()
    for name, tensor in written.state_dict().items():
        if not same_numbers(packed[name], tensor):
            raise FormatError(f"{output}: {name} differs from what was packed: nothing was kept")
    difference, size = float((_prompt_logits(written) - trained).abs().max()), float(trained.abs().max())
    if exact and not difference <= _NEAR * max(1.0, size):
        raise FormatError(f"{output}: logits differ by {difference:.1e} from the trained model's: nothing was kept")
    return (
        f"all {len(packed)} tensors equal; logits of a prompt differ from the trained model's by at most {difference:.1e}, "
        f"largest logit {size:.1f}"
    )
