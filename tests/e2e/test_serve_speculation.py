"""A server that guesses ahead gives the answers of an engine that does not."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from arriero.config.model import ModelOptions
from arriero.engine.engine import Engine
from arriero.engine.loading import load
from arriero.engine.runner import TorchRunner
from arriero.engine.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import TINY, Served

ASKED: list[dict[str, Any]] = [
    {"prompt": f"Load {number} goes over the hill and", "max_tokens": 24, **settings}
    for number in range(4)
    for settings in ({"temperature": 0}, {"temperature": 1.2, "seed": number, "top_p": 0.9})
]


def alone() -> list[str]:
    """The texts of an engine without guesses, one request after the other."""
    loaded = load(ModelOptions(model_name_or_path=TINY, device="cpu"), dtype="float32")
    engine = Engine(TorchRunner(loaded.model, max_tokens=1024), loaded.tokenizer, prefix_cache=False)
    texts = []
    for asked in ASKED:
        drawn = {name: asked[name] for name in ("temperature", "seed", "top_p") if asked["temperature"]}
        params = SamplingParams(max_new_tokens=24, do_sample=bool(drawn), **drawn)
        texts.append(
            engine.generate([loaded.tokenizer.encode(asked["prompt"], add_special_tokens=True)], [params])[0].text
        )
    return texts


async def all_at_once(url: str) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        answers = await asyncio.gather(*(http.post("/completions", json=asked) for asked in ASKED))
    return [answer.json()["choices"][0]["text"] for answer in answers]


@pytest.mark.slow
def test_guesses_change_no_answer() -> None:
    with Served("--num_speculative_tokens", "3", "--draft_model", TINY) as served:
        assert asyncio.run(all_at_once(served.api)) == alone()
        metrics = httpx.get(f"{served.url}/metrics").text
    proposed, accepted = (
        float(re.search(rf"^arriero_{name}_total ([0-9.]+)$", metrics, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("draft_tokens", "accepted_draft_tokens")
    )
    assert 0 < accepted <= proposed  # the draft model is the model itself


def test_a_bundle_takes_no_guesses(
    in_process: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from arriero.serving import hosting

    monkeypatch.setattr(hosting, "bundle_folder", lambda _: tmp_path)
    found = in_process("serve", str(tmp_path), "--num_speculative_tokens", "2")
    assert (found.returncode, len(found.stderr.splitlines())) == (2, 1)
    assert "is a bundle, which checks no guesses" in found.stderr
