"""Which port is the API's and which the page's: --port is the API's, and PaddleNLP's where its other words are given."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.config.serving import ServeOptions


@pytest.mark.parametrize(
    ("given", "api", "page"),
    [
        ({}, 8011, None),
        ({"port": 9000}, 9000, None),  # as in vLLM and llama.cpp
        ({"flask_port": 9000}, 9000, None),
        ({"flask_port": 0}, 0, None),
        ({"port": 8010, "flask_port": 8011}, 8011, 8010),  # PaddleNLP's
        ({"port": 8010, "flask_port": 0}, 0, 8010),
        ({"ui": True}, 8011, 8010),
        ({"ui": True, "port": 9000}, 8011, 9000),
        ({"ui_port": 9001}, 8011, 9001),
        ({"ui_port": 9001, "port": 9000}, 9000, 9001),
        ({"ui_port": 9001, "flask_port": 9000}, 9000, 9001),
        ({"api_url": "http://other:8011"}, 8011, 8010),
        ({"api_url": "http://other:8011", "port": 9001}, 8011, 9001),
    ],
)
def test_ports(given: dict[str, Any], api: int, page: int | None) -> None:
    options = ServeOptions(**given)
    assert (options.api_port, options.ui_port, options.ui) == (api, page, page is not None)
