"""`arriero serve`: a resident model behind an HTTP API."""

from __future__ import annotations

from arriero.config.adapter import AdapterPathOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.kv_cache import KVCacheOptions
from arriero.config.model import ModelOptions
from arriero.config.option import specs_of
from arriero.config.serving import ServeOptions
from arriero.config.speculation import SpeculationOptions
from arriero.errors import ConfigError, require

HELP = "Answer requests over HTTP (OpenAI's API, and PaddleNLP's /api/chat) with a checkpoint or a bundle that stays in memory."

OPTIONS: tuple[type, ...] = (
    ModelOptions,
    AdapterPathOptions,
    ServeOptions,
    KVCacheOptions,
    CompilationOptions,
    SpeculationOptions,
)


def run(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    serve: ServeOptions,
    cache: KVCacheOptions,
    compilation: CompilationOptions,
    guesses: SpeculationOptions,
) -> int:
    """Serve until SIGTERM or Ctrl-C; running requests are finished first."""
    default = next(spec.default for spec in specs_of(ModelOptions) if spec.name == "model_name_or_path")
    if serve.model is not None:
        if model.model_name_or_path not in (default, serve.model):
            raise ConfigError(
                f"two models are given, {serve.model} and --model_name_or_path {model.model_name_or_path}: give one"
            )
        model.model_name_or_path = serve.model
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    if serve.ui_port is not None:
        require("gradio_client", "ui")  # a small part of gradio, which itself takes seconds to import
    if serve.api_url is not None and serve.ui_port is not None:
        from arriero.serving.ui.process import serve_page

        tls = {"ssl_certfile": serve.ssl_certfile, "ssl_keyfile": serve.ssl_keyfile}
        api = serve.api_url.removesuffix("/").removesuffix("/v1")
        serve_page(api, serve.host, serve.ui_port, allowed_hosts=serve.allowed_hosts, **tls)
        return 0
    from arriero.serving.hosting import host

    host(model, adapter, cache, compilation, serve, guesses)
    return 0
