"""Two replicas behind nginx with the configuration of deploy/: one ends, and no request fails."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import Served

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CONFIGURATION = Path(__file__).parents[2] / "deploy/nginx.conf"


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx-light)")
def test_a_replica_may_end(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Served() as first, Served() as second:
        text = CONFIGURATION.read_text(encoding="utf-8")
        for old, new in (("8011", first.port), ("8012", second.port), ("8080", port)):
            text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
        (tmp_path / "nginx.conf").write_text(text, encoding="utf-8")
        settings = f"pid {tmp_path}/pid; daemon off;"
        nginx = subprocess.Popen([str(NGINX), "-e", tmp_path / "log", "-c", tmp_path / "nginx.conf", "-g", settings])
        try:
            deadline = time.monotonic() + 10
            while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                assert http.get("/metrics").status_code == 404
                statuses = []
                for number in range(40):
                    if number == 15:
                        first.process.send_signal(signal.SIGTERM)
                    headers = {"authorization": f"Bearer client-{number}"}
                    body = {"prompt": "x", "max_tokens": 4, "stream": bool(number % 2)}
                    statuses.append(http.post("/v1/completions", json=body, headers=headers).status_code)
            assert statuses == [200] * 40
            assert first.process.wait(20) == 0
            answered = [sum(line["event"] == "request" for line in server.log) for server in (first, second)]
            assert min(answered) > 0
        finally:
            nginx.terminate()
            nginx.wait(10)
