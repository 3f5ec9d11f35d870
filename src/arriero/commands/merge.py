"""`arriero merge`: join an adapter and its base into one model, and prove that it computes the same."""

from __future__ import annotations

from pathlib import Path

from arriero.config.adapter import AdapterPathOptions
from arriero.config.merging import MergeOptions
from arriero.config.model import ModelOptions
from arriero.errors import ConfigError, FormatError

HELP = "Join a LoRA adapter and its base into one model folder; the result is checked numerically."

OPTIONS: tuple[type, ...] = (ModelOptions, AdapterPathOptions, MergeOptions)


def run(model: ModelOptions, adapter: AdapterPathOptions, merge: MergeOptions) -> int:
    """Merge, write, read back and compare logits with those of base + adapter."""
    import torch

    from arriero.adapters.lora import apply_lora, load_adapter_state, merge_lora
    from arriero.adapters.peft_config import from_peft
    from arriero.engine.loading import load
    from arriero.formats import hf, peft

    if not adapter.lora_path:
        raise ConfigError("merge needs --lora_path, the folder of the adapter that is to be joined with its base")
    target = Path(merge.output_path)
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"--output_path {target} is not empty: name a new folder")
    config, state = peft.load_adapter(Path(adapter.lora_path))
    loaded = load(model)
    apply_lora(loaded.model, from_peft(config))
    load_adapter_state(loaded.model, state)
    loaded.model.eval()
    probe = torch.randint(loaded.model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0)).to(
        loaded.device
    )
    with torch.inference_mode():
        before = loaded.model(probe).float()
    merge_lora(loaded.model)
    hf.save_model(
        loaded.model, loaded.model.config, target, max_shard_size=merge.max_shard_size, extra_files_from=loaded.folder
    )
    with torch.inference_mode():
        after = hf.load_model(target, device=loaded.device)(probe).float()
    difference = float((before - after).abs().max())
    size = float(before.abs().max())
    # fp32 differs by the order of additions; a half-precision weight is rounded once more by the merge
    tolerance = 1e-5 if next(loaded.model.parameters()).dtype == torch.float32 else 2e-2
    if not difference <= tolerance * max(1.0, size):
        raise FormatError(
            f"{target}: the merged model's logits differ by {difference:.2e} from base + adapter: do not use it"
        )
    print(
        f"merged model: {target} (logits differ from base + adapter by at most {difference:.1e}, largest logit {size:.1f})"
    )
    return 0
