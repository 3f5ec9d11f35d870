"""The page in a process of its own, which knows nothing of the model."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Collection

from arriero.errors import ArrieroError, ConfigError

MAX_TOGETHER = 64  # answers that people in front of pages wait for at once
MAX_BODY_BYTES = 8 * 2**20  # of a request of the page, which holds a conversation, of which the API takes 2 MB


def main() -> int:
    """Serve the page until the process that started this one is gone, or until a signal comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--api", required=True)
    parser.add_argument("--api_certificate")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--allowed_hosts", nargs="*", default=[])
    parser.add_argument("--ssl_certfile")
    parser.add_argument("--ssl_keyfile")
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    if options.parent is not None:
        threading.Thread(target=_end_with, args=(options.parent,), daemon=True).start()
    try:
        serve_page(
            options.api,
            options.host,
            options.port,
            api_certificate=options.api_certificate,
            allowed_hosts=options.allowed_hosts,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
    except ArrieroError as error:
        print(f"arriero: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


def serve_page(
    api: str,
    host: str,
    port: int,
    *,
    api_certificate: str | None = None,
    allowed_hosts: Collection[str] = (),
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
) -> None:
    """Serve the page for an API, until a signal comes.

    Args:
        api: its address, without /v1.
        api_certificate: see `ApiClient`.
        allowed_hosts: names that requests may be addressed to beside this machine's, see `hosts_for`.

    Raises:
        ConfigError: the port is taken.
        MissingExtraError: Gradio is not installed.
    """
    # It must neither count its users for its makers nor ask for newer versions.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_SHARE": "False"}
    from arriero.errors import require

    gradio = require("gradio", "ui")
    from starlette.middleware import Middleware

    from arriero.serving.access import Keys, RateLimit
    from arriero.serving.doors import Doors
    from arriero.serving.host_names import hosts_for
    from arriero.serving.ui.client import ApiClient
    from arriero.serving.ui.head import Head
    from arriero.serving.ui.page import CSS, FONTS, HEAD, Page
    from arriero.serving.ui.protection import Protection

    doors = Middleware(
        Doors,
        keys=Keys({}),
        rate=RateLimit(0),
        max_body_bytes=MAX_BODY_BYTES,
        hosts=hosts_for(host, allowed_hosts, keys=False),  # a key of the API is no key of the page
    )

    page, words = Page(ApiClient(api, api_certificate)).build()
    page.queue(default_concurrency_limit=MAX_TOGETHER, max_size=4 * MAX_TOGETHER)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=False,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            strict_cors=True,
            max_file_size=1,
            i18n=words,
            theme=gradio.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),  # none from elsewhere
            css=CSS,
            app_kwargs={"middleware": [Middleware(Protection), doors, Middleware(Head, text=HEAD)]},
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
            ssl_verify=False,  # of its own question to itself, whether it runs
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ConfigError(f"cannot serve the page on {host} port {port} ({error}): choose another --ui_port") from error
    address = f"{'https' if ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"the page is served on {address}", flush=True)
    page.block_thread()


def _end_with(parent: int) -> None:
    """End when the server that started this is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
