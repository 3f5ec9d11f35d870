"""The files under deploy/: what they call exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from arriero.commands.serve import OPTIONS
from arriero.config.parser import parse
from arriero.serving.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"


def options_of(arguments: list[str]) -> Any:
    """The server's options, by the real parser."""
    return parse(OPTIONS, arguments, "arriero serve")[2]


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def test_the_dashboard_asks_for_numbers_that_there_are() -> None:
    counters = SimpleNamespace(asked=1, found=1, evicted=0)
    blocks = SimpleNamespace(used=0, num_blocks=1, counters=counters)
    scheduler = SimpleNamespace(running=[], waiting=[], preemptions=0)
    speculation = SimpleNamespace(counters=SimpleNamespace(proposed=0, accepted=0))
    engine: Any = SimpleNamespace(scheduler=scheduler, blocks=blocks, speculation=speculation)
    metrics = Metrics(engine)
    there = set(re.findall(r"^# TYPE (\S+)", metrics.text().decode(), re.MULTILINE))
    panels = json.loads(text("grafana/arriero.json"))["panels"]
    asked = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"arriero_\w+", target["expr"])
    }
    assert len(asked) > 10
    assert {re.sub(r"_bucket$", "", name) for name in asked} <= there
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_their_options_parse_and_stop_times_are_long_enough() -> None:
    services = yaml.safe_load(text("compose.yaml"))["services"]
    command = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in services["arriero"]["command"]]
    compose = options_of(command)
    assert services["arriero"]["stop_grace_period"] == "100s"

    deployment, service, _ = yaml.safe_load_all(text("kubernetes.yaml"))
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    kubernetes = options_of(container["args"])
    probed = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probed == {"/health/ready", "/health/live"}
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]

    unit = text("arriero.service")
    [line] = re.findall(r"^ExecStart=\S+/arriero serve (.*)$", unit, re.MULTILINE)
    systemd = options_of(shlex.split(line))
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)

    [default] = re.findall(r"^CMD (\[.*\])$", text("Dockerfile"), re.MULTILINE)
    image = options_of(json.loads(default))
    for options in (compose, kubernetes, systemd, image):
        assert options.flask_port == 8011
        assert options.drain_timeout < min(100, pod["terminationGracePeriodSeconds"], int(seconds))
    assert all(options.api_key_file for options in (compose, kubernetes, systemd))
    scraped = yaml.safe_load(text("prometheus.yml"))["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["arriero:8011"]
