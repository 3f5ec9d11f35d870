"""Requests that schemathesis (https://schemathesis.io) makes of the server's own OpenAPI description: no answer is a failure
of the server, and each has the form that the description gives it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import Served

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = (
        "--max_new_tokens",
        "8",
        "--src_length",
        "256",
        "--adapter_folder",
        str(tmp_path_factory.mktemp("adapters")),
    )
    with Served("--served_model_name", "tiny", *limits) as server:
        yield server


def fuzz(served: Served, requests: int) -> int:
    """Let every route have its share of so many requests; returns how many there were."""
    schema: Any = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    asked = 0
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for operation in operations:
            posts = operation.method.upper() == "POST"
            share = max(4, requests // sum(o.method.upper() == "POST" for o in operations)) if posts else 4

            @given(case=operation.as_strategy())
            @settings(
                max_examples=share,
                database=None,
                derandomize=True,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def run(case: Any) -> None:
                nonlocal asked
                asked += 1
                response = case.call(base_url=served.url, timeout=120)
                case.validate_response(response, checks=CHECKS)

            run()
        assert client.get("/health/ready").status_code == 200
    assert not [line for line in served.log if line["event"] == "failure"]
    return asked


def test_requests_of_all_kinds(served: Served) -> None:
    assert fuzz(served, 120) >= 120


@pytest.mark.peers
@pytest.mark.timeout(9000)
def test_ten_thousand_requests(served: Served) -> None:
    assert fuzz(served, 10_000) >= 10_000
