"""The HTTP server: where it listens, who may ask, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError

DEFAULT_PORT, DEFAULT_UI_PORT = 8011, 8010


@dataclass(kw_only=True)
class ServeOptions(OptionGroup):
    """Server."""

    model: str | None = option(None, "the same as --model_name_or_path", positional=True)
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: every one of this machine")
    flask_port: int | None = option(
        None,
        f"port of the HTTP API (default: {DEFAULT_PORT}); 0: a free one, which is printed",
        aliases=("api_port",),
        minimum=0,
        maximum=65535,
    )
    port: int | None = option(
        None,
        "port of the HTTP API; beside --flask_port, --ui or --api_url that of the web page, as PaddleNLP has it",
        minimum=1,
        maximum=65535,
    )
    ui_port: int | None = option(
        None, f"serve the web page too, on this port (--ui alone: {DEFAULT_UI_PORT})", minimum=1, maximum=65535
    )
    ui: bool = option(False, "serve the web page too (extra: ui)")
    api_url: str | None = option(
        None, "serve the page alone, for the API at this address (https://host:8011); no model is loaded"
    )
    served_model_name: str | None = option(
        None, "what clients call the model (default: the name it was loaded by, of a folder its last part)"
    )
    adapters: list[str] = option(
        [], "adapters that clients can name as a model of their own, NAME=FOLDER each", split=False
    )
    adapter_folder: str | None = option(
        None, "folder from which clients may load adapters while the server runs (POST /v1/load_lora_adapter)"
    )
    max_loaded_adapters: int = option(
        16,
        "adapters in memory at once, and so different ones in a step",
        minimum=1,
        only_with=("adapters", "adapter_folder"),
    )
    src_length: int | None = option(
        None, "longest prompt in tokens a request may have (default: what the model's context allows)", minimum=1
    )
    max_new_tokens: int | None = option(
        None,
        "longest answer in tokens a request may ask for (default: what the model's context allows)",
        aliases=("tgt_length",),
        minimum=1,
    )
    max_batch_size: int = option(32, "answers computed together at most", minimum=1, maximum=4096)
    max_step_tokens: int = option(2048, "tokens of one forward pass at most", minimum=1)
    kv_cache_memory_share: float | None = option(
        None,
        "of the memory that is free when the model is loaded, what keys and values may take (default: 0.4; on a GPU 0.9 less "
        "1 GiB)",
        minimum=0.001,
        maximum=1.0,
    )
    reasoning_format: str = option(
        "auto",
        "auto: what a model whose template knows </think> thinks before its answer is told apart, as reasoning_content; none: "
        "it stays in the answer",
        ("auto", "none"),
    )
    max_queue_size: int = option(
        128, "answers that may wait for a place; who comes then hears 429 and when to try again", minimum=0
    )
    request_timeout: float = option(
        600.0, "seconds after which a request is given up (504)", minimum=1.0, maximum=86400.0
    )
    drain_timeout: float = option(
        90.0, "seconds that running requests have to finish after SIGTERM", minimum=0.0, maximum=86400.0
    )
    api_key_file: str | None = option(
        None,
        "file of keys, one a line (NAME KEY, or the key alone), of which every request must send one; $ARRIERO_API_KEY can "
        "hold one too",
    )
    requests_per_minute: int = option(
        0, "requests a minute that one key (or one address, without keys) may make; 0: any number", minimum=0
    )
    max_body_bytes: int = option(2_000_000, "largest body of a request", minimum=1024, maximum=2**30)
    max_connections: int = option(1024, "connections at once; further ones hear 503, probes are answered", minimum=1)
    cors_origins: list[str] = option(
        [], "web pages (https://host:port) whose scripts may use this server; default: none but its own"
    )
    allowed_hosts: list[str] = option(
        [], "host names that requests may be addressed to without keys, besides this machine's own (a proxy's name)"
    )
    ssl_certfile: str | None = option(None, "certificate chain (PEM): serve https")
    ssl_keyfile: str | None = option(None, "its private key (PEM)", only_with="ssl_certfile")
    metrics: bool = option(True, "serve /metrics for Prometheus")
    otlp_traces_endpoint: str | None = option(
        None,
        "send a span of each request, without its texts, to this OpenTelemetry collector, http://HOST:4318 (extra: otel); "
        "OTEL_EXPORTER_OTLP_ENDPOINT and OTEL's other variables count too",
    )
    log_prompts: bool = option(False, "write prompts and answers into the log too")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle_ports()
        if self.api_url is not None and not self.api_url.startswith(("http://", "https://")):
            raise ConfigError(f"--api_url {self.api_url[:100]!r}: write http://HOST:PORT or https://HOST:PORT")
        if "*" in self.cors_origins:
            raise ConfigError("--cors_origins '*' would let every web page use this server: name the pages")
        if self.max_step_tokens < self.max_batch_size:
            raise ConfigError(
                f"--max_step_tokens {self.max_step_tokens} is less than --max_batch_size {self.max_batch_size}: each answer "
                "needs a token of a step, raise the first"
            )
        self.adapter_folders()
        if self.adapter_folder is not None and not Path(self.adapter_folder).is_dir():
            raise ConfigError(f"--adapter_folder {self.adapter_folder}: there is no such folder")

    def _settle_ports(self) -> None:
        """`api_port` and `ui_port` from what was given."""
        page = self.flask_port is not None or self.ui or self.api_url is not None
        name = "ui_port"
        if self.port is not None and page and self.ui_port is None:
            self.ui_port, name = self.port, "port"
        elif self.port is not None:
            if self.flask_port is not None:
                raise ConfigError(
                    f"--port {self.port}, --flask_port {self.flask_port} and --ui_port {self.ui_port} are three ports for "
                    "two things: --flask_port is the API's, --ui_port the page's"
                )
            self.flask_port = self.port
        if self.ui_port is None and (self.ui or self.api_url is not None):
            self.ui_port = DEFAULT_UI_PORT
        self.ui = self.ui_port is not None
        if self.ui and self.ui_port == self.api_port:
            raise ConfigError(
                f"--{name} and --flask_port are both {self.ui_port}: give the page and the API different ports"
            )

    @property
    def api_port(self) -> int:
        """Of the HTTP API; 0: a free one."""
        return DEFAULT_PORT if self.flask_port is None else self.flask_port

    @property
    def takes_adapters(self) -> str:
        """The option by which requests can name adapters; "" without one."""
        return "--adapters" if self.adapters else "--adapter_folder" if self.adapter_folder is not None else ""

    def adapter_folders(self) -> dict[str, str]:
        """Name -> folder.

        Raises:
            ConfigError: an item of another form, or a name that comes twice.
        """
        folders: dict[str, str] = {}
        for item in self.adapters:
            name, sign, folder = item.partition("=")
            if not (sign and name.strip() and folder.strip()):
                raise ConfigError(f"--adapters {item[:100]!r}: write NAME=FOLDER")
            if name in folders:
                raise ConfigError(f"--adapters names {name!r} twice: give each adapter a name of its own")
            folders[name] = folder
        return folders
