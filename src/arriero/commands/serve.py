"""`arriero serve`: a resident model, HTTP API and web page."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.commands.unavailable import not_available
from arriero.config.adapter import AdapterPathOptions
from arriero.config.model import ModelOptions
from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError

HELP = "Answer requests over HTTP with a model that stays in memory."


@dataclass(kw_only=True)
class ServeOptions(OptionGroup):
    """Server."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: every one of this machine")
    port: int = option(8010, "port of the web page", minimum=1, maximum=65535)
    flask_port: int = option(8011, "port of the HTTP API", aliases=("api_port",), minimum=1, maximum=65535)
    src_length: int = option(1024, "longest prompt in tokens", minimum=1)
    max_new_tokens: int = option(
        1024, "longest answer in tokens a request may ask for", aliases=("tgt_length",), minimum=1
    )
    max_batch_size: int = option(32, "requests computed together at most", minimum=1)
    api_key: str | None = option(None, "clients must send this key")
    ui: bool = option(True, "serve the web page too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ui and self.port == self.flask_port:
            raise ConfigError(
                f"--port and --flask_port are both {self.port}: give the page and the API different ports"
            )


OPTIONS: tuple[type, ...] = (
    ModelOptions,
    AdapterPathOptions,
    ServeOptions,
)


def run(model: ModelOptions, adapter: AdapterPathOptions, serve: ServeOptions) -> int:
    """Answer that this comes in a later version."""
    raise not_available("serve", "arriero chat talks to the same model in the terminal")
