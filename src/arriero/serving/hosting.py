"""From options to a server: address, keys, certificate, engine, limits."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.config.adapter import AdapterPathOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.kv_cache import KVCacheOptions
from arriero.config.model import ModelOptions
from arriero.config.serving import ServeOptions
from arriero.config.speculation import SpeculationOptions
from arriero.engine.background import BackgroundEngine
from arriero.engine.engine import Engine
from arriero.errors import ConfigError
from arriero.serving.access import KEY_VARIABLE, Keys, read_keys
from arriero.serving.admission import Admission
from arriero.serving.app import make_app
from arriero.serving.engines import (
    adapters_of,
    bundle_engine,
    bundle_folder,
    checkpoint_engine,
    model_name,
    runner_over,
)
from arriero.serving.host_names import hosts_for, is_loopback
from arriero.serving.page_process import PageProcess
from arriero.serving.request_log import JsonLog
from arriero.serving.server import bind, serve, tls_files
from arriero.serving.service import Limits, ServedModel, Service
from arriero.serving.tracing import Tracing, tracing_of


@dataclass(frozen=True)
class Entrance:
    """Where requests come in, found before a model is loaded.

    Attributes:
        tls: uvicorn's settings for https.
        warnings: for the log.
    """

    keys: Keys
    tls: dict[str, Any]
    tracing: Tracing
    listener: socket.socket
    warnings: list[str]

    @classmethod
    def of(cls, options: ServeOptions) -> Entrance:
        """
        Raises:
            ConfigError: keys, certificate or address that cannot be used.
        """
        keys, warning = read_keys(options.api_key_file)
        tls = tls_files(options.ssl_certfile, options.ssl_keyfile)
        tracing = tracing_of(options.otlp_traces_endpoint)
        warnings = [] if warning is None else [warning]
        if not is_loopback(options.host):
            if not keys:
                how = f"set --api_key_file or ${KEY_VARIABLE}"
                warnings.append(f"every machine that reaches {options.host} can use this server: {how}")
            if not tls:
                warnings.append(
                    "keys and texts travel unencrypted: set --ssl_certfile, or put a proxy before the server"
                )
        listener = bind(options.host, options.api_port)
        if options.ui_port is not None:
            bind(options.host, options.ui_port, "--ui_port").close()  # the page's process takes it later
        return cls(keys, tls, tracing, listener, warnings)

    @property
    def url(self) -> str:
        """The server's address."""
        address, port = self.listener.getsockname()[:2]
        return f"{'https' if self.tls else 'http'}://{f'[{address}]' if ':' in address else address}:{port}"


@contextlib.contextmanager
def _entrance(options: ServeOptions) -> Iterator[Entrance]:
    entrance = Entrance.of(options)
    with contextlib.closing(entrance.listener):
        yield entrance


def host(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    cache: KVCacheOptions,
    compilation: CompilationOptions,
    options: ServeOptions,
    guesses: SpeculationOptions,
) -> None:
    """Load a model and answer requests until a signal comes. Of several processes the first has the server.

    Raises:
        ArrieroError: something cannot be had; before the model is loaded, where that can be known.
    """
    # When the process ends the interpreter would look through all that torch has made for what is in nobody's use: a second
    # of a processor, several on a busy machine, after the server has stopped.
    atexit.register(gc.freeze)
    folder = bundle_folder(model)
    if folder is None:
        _host_checkpoint(model, adapter, cache, compilation, options, guesses)
        return
    if guesses.num_speculative_tokens:
        raise ConfigError(
            f"--num_speculative_tokens {guesses.num_speculative_tokens}: {folder} is a bundle, which checks no guesses; serve "
            "the checkpoint it was made from"
        )
    with _entrance(options) as entrance:
        engine = bundle_engine(folder, model, adapter, cache, compilation, options)
        _run(engine, [ServedModel(model_name(model, options))], entrance, options)


def _host_checkpoint(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    cache: KVCacheOptions,
    compilation: CompilationOptions,
    options: ServeOptions,
    guesses: SpeculationOptions,
) -> None:
    from arriero.config.layout import Layout
    from arriero.engine.loading import load_for_inference, pick_device
    from arriero.engine.ranks import follow
    from arriero.engine.speculating import speculation_over
    from arriero.parallel.processes import launched_size, start, stop

    processes = start(Layout(tp=launched_size()), pick_device(model.device))
    with contextlib.ExitStack() as stack:
        with processes.together():
            if options.takes_adapters and not processes.alone:
                raise ConfigError(
                    f"{options.takes_adapters} needs one process: give one adapter for all requests, by --lora_path"
                )
            entrance = stack.enter_context(_entrance(options)) if processes.first else None
            loaded = load_for_inference(model, adapter, processes)
            running = options.max_batch_size
            speculation = speculation_over(guesses, model, loaded, running) if processes.first else None
        pool, models = adapters_of(loaded, model_name(model, options), options)
        runner = runner_over(loaded, pool, cache, compilation, options)
        if entrance is None:
            # the first process finishes what runs, for which it needs this one, and then lets it go
            with _signals_ignored():
                follow(runner, processes)
        else:
            with checkpoint_engine(runner, loaded, options, processes, speculation) as engine:
                _run(engine, models, entrance, options)
    stop(processes)


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Within it the end is another process's to say: the launcher and the terminal signal to all alike."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _run(engine: Engine, models: list[ServedModel], entrance: Entrance, options: ServeOptions) -> None:
    """Put the engine on its thread and serve."""
    background = BackgroundEngine(engine)
    try:
        asyncio.run(_answer(background, models, entrance, options))
    finally:
        background.close()


async def _answer(
    background: BackgroundEngine, models: list[ServedModel], entrance: Entrance, options: ServeOptions
) -> None:
    runner = background.engine.runner
    context = min(runner.context, runner.num_blocks * runner.block_size - runner.prefix_length)
    limits = Limits(
        context,
        min(options.src_length or context, context),
        min(options.max_new_tokens or context, context),
        options.request_timeout,
    )
    admission, log = Admission(options.max_batch_size, options.max_queue_size), JsonLog()
    service = Service(
        background,
        models,
        limits,
        admission,
        log=log,
        log_prompts=options.log_prompts,
        reasoning=options.reasoning_format != "none",
        adapter_folder=Path(options.adapter_folder).resolve() if options.adapter_folder is not None else None,
    )
    app = make_app(
        service,
        keys=entrance.keys,
        requests_per_minute=options.requests_per_minute,
        max_body_bytes=options.max_body_bytes,
        hosts=hosts_for(options.host, options.allowed_hosts, keys=bool(entrance.keys)),
        cors_origins=options.cors_origins,
        max_connections=options.max_connections,
        with_metrics=options.metrics,
        tracing=entrance.tracing,
    )
    for warning in entrance.warnings:
        log("warning", level="warning", message=warning)

    def listening() -> None:
        print(f"{service.base.name} is served on {entrance.url}/v1 (Ctrl-C ends it)", flush=True)
        log("ready", url=entrance.url, models=list(service.models), context=context, keys=bool(entrance.keys))

    page = PageProcess(entrance.url, options, log) if options.ui_port is not None else None
    try:
        if page is not None:
            await page.start()
        await serve(
            app,
            service,
            entrance.listener,
            drain_seconds=options.drain_timeout,
            max_connections=options.max_connections,
            tls=entrance.tls,
            listening=listening,
        )
    finally:
        if page is not None:
            await page.close()
        service.close()
        entrance.tracing.close()
    log("stopped")
