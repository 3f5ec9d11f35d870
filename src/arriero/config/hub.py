"""Publishing the result of a run."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError


@dataclass(kw_only=True)
class HubOptions(OptionGroup):
    """Hugging Face Hub."""

    push_to_hub: bool = option(
        False, "upload the final model or adapter to the Hub (token: HF_TOKEN or `hf auth login`)"
    )
    hub_model_id: str | None = option(None, "its repository: owner/name", only_with="push_to_hub")
    hub_private_repo: bool = option(False, "make the new repository private", only_with="push_to_hub")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub and self.hub_model_id is None:
            raise ConfigError("--push_to_hub needs the repository: --hub_model_id owner/name")
