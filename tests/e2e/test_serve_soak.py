"""Many clients for minutes: some leave in the middle, some are hostile, and everybody else gets the answer that the engine
gives alone. Afterwards nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from arriero.config.model import ModelOptions
from arriero.engine.engine import Engine
from arriero.engine.loading import load
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import TINY, Served

SECONDS = float(os.environ.get("ARRIERO_SOAK_SECONDS", "600"))
CLIENTS, PROMPTS, TOKENS = 64, 48, 24
HOSTILE: list[tuple[str, dict[str, str], int]] = [
    ("{", {}, 400),
    ('{"prompt": "x", "n": 1000000}', {}, 400),
    ('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", {}, 400),
    ('{"prompt": [99999999]}', {}, 400),
    ('{"prompt": "x", "max_tokens": -1}', {}, 400),
    ("x" * 3_000_000, {}, 413),
    ('{"prompt": "x"}', {"content-type": "text/plain"}, 415),
    ('{"prompt": "x"}', {"x-long": "y" * 20_000}, 431),
    ('{"prompt": "x", "model": "other"}', {}, 404),
]


def wanted_answers(prompts: list[str]) -> dict[str, str]:
    """Of the engine alone, one after the other."""
    loaded = load(ModelOptions(model_name_or_path=TINY, device="cpu"), dtype="float32")
    engine = Engine(TorchRunner(loaded.model, max_tokens=1024), loaded.tokenizer, prefix_cache=False)
    params = SamplingParams(max_new_tokens=TOKENS)
    ids = [loaded.tokenizer.encode(prompt, add_special_tokens=True) for prompt in prompts]
    return {prompt: engine.generate([one], params)[0].text for prompt, one in zip(prompts, ids, strict=True)}


class Crowd:
    """The clients, and what became of their requests."""

    def __init__(self, url: str, wanted: dict[str, str], until: float) -> None:
        self.url, self.wanted, self.until = url, wanted, until
        self.answered = self.left = self.refused = 0
        self.wrong: list[str] = []

    async def client(self, number: int) -> None:
        chance = random.Random(number)
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            while time.monotonic() < self.until:
                what = chance.random()
                prompt = chance.choice(list(self.wanted))
                body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
                if what < 0.05:
                    await self._hostile(http, *chance.choice(HOSTILE))
                elif what < 0.25:
                    await self._leave(http, body, chance)
                elif what < 0.6:
                    answer = await http.post("/v1/completions", json=body)
                    self._check(prompt, answer.status_code, answer.json()["choices"][0]["text"])
                else:
                    await self._stream(http, prompt, body)

    async def _hostile(self, http: httpx.AsyncClient, content: str, headers: dict[str, str], status: int) -> None:
        sent = {"content-type": "application/json", **headers}
        answer = await http.post("/v1/completions", content=content, headers=sent)
        if answer.status_code != status:
            self.wrong.append(f"{content[:40]}: {answer.status_code}")
        self.refused += 1

    async def _leave(self, http: httpx.AsyncClient, body: dict[str, Any], chance: random.Random) -> None:
        long = {**body, "max_tokens": 500, "ignore_eos": True, "stream": True}
        async with http.stream("POST", "/v1/completions", json=long) as answer:
            lines = answer.aiter_lines()
            for _ in range(chance.randrange(1, 8)):
                await anext(lines)
        self.left += 1

    async def _stream(self, http: httpx.AsyncClient, prompt: str, body: dict[str, Any]) -> None:
        text, last = "", ""
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                last = line or last
        self._check(prompt, answer.status_code if last == "data: [DONE]" else 0, text)

    def _check(self, prompt: str, status: int, text: str) -> None:
        self.answered += 1
        if status != 200 or text != self.wanted[prompt]:
            self.wrong.append(f"{prompt}: {status} {text}")

    async def run(self) -> None:
        await asyncio.gather(*(self.client(number) for number in range(CLIENTS)))


# Asks for the server's health ten times a second until its input ends, in a process of its own: 64 clients in one loop wait for
# each other, which is none of the server's doing.
WATCH = """
import http.client, json, select, sys, time
connection, seconds = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60), []
while not select.select([sys.stdin], [], [], 0.1)[0]:
    began = time.perf_counter()
    connection.request("GET", "/health/live")
    answer = connection.getresponse()
    assert answer.read() and answer.status == 200
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""


@contextlib.contextmanager
def watched_health(port: int) -> Iterator[list[float]]:
    """Seconds of each answer, when the block is over."""
    seconds: list[float] = []
    command = [sys.executable, "-c", WATCH, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield seconds
        seconds += json.loads(process.communicate("")[0])


@pytest.mark.peers
@pytest.mark.timeout(3600)
def test_a_crowd() -> None:
    wanted = wanted_answers([f"Number {number} of the prompts says that" for number in range(PROMPTS)])
    # few at once, so that the keys and values, whose memory is taken as it is used, are all in use after the first part
    with Served("--max_batch_size", "8", "--max_queue_size", "200") as served:
        process = psutil.Process(served.process.pid)
        asyncio.run(Crowd(served.url, wanted, time.monotonic() + SECONDS / 10).run())
        before = process.memory_info().rss
        crowd = Crowd(served.url, wanted, time.monotonic() + SECONDS)
        with watched_health(served.port) as health:
            asyncio.run(crowd.run())
        grown = process.memory_info().rss - before
        time.sleep(2)
        metrics = httpx.get(f"{served.url}/metrics").text
        p99 = sorted(health)[int(0.99 * len(health))]
        print(
            f"\n{crowd.answered} answers, {crowd.left} left, {crowd.refused} hostile; {grown / 2**20:.1f} MiB; health p99 {p99}"
        )
        assert crowd.wrong == []
        for name in ("requests_running", "requests_waiting", "kv_blocks_used"):
            assert re.search(rf"^arriero_{name} 0\.0$", metrics, re.MULTILINE), name
        assert min(crowd.answered, crowd.left, crowd.refused) > 20
        assert grown < 32 * 2**20
        assert not [line for line in served.log if line["event"] in ("failure", "engine_error")]
