"""`arriero bench` on the tiny model, beside transformers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")

TINY = "__internal_testing__/tiny-random-llama"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_workloads_beside_transformers(
    arriero: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = arriero(
        "bench", "--model_name_or_path", TINY, "--device", "cpu", "--threads", "1", "--repeats", "2",
        "--batch_sizes", "1,3", "--src_length", "12", "--max_new_tokens", "5", "--prompt_lengths", "40", "--num_requests", "6",
        "--max_running", "4", "--shared_length", "64", "--context_length", "80", "--max_step_tokens", "48",
        "--against", "transformers", "--output_file", "found.json", "--plot", "found.png",
        timeout=580,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["threads"], found["dtype"], found["device"], found["model"]) == (1, "float32", "cpu", TINY)
    assert set(found["peers"]) == {"transformers"}
    assert min(found["peak"].values()) > 1e8
    assert found["kv_memory"]["format"] == "float32"
    assert f"keys and values: {found['kv_memory']['token_bytes']:,} bytes a token (float32); " in result.stdout
    cases = [
        ("decode", 1, 12, 5),
        ("decode", 3, 36, 15),
        ("prefill", 1, 40, 1),
        ("mixed", 6, None, None),
        ("shared_prefix", 6, 6 * 80, 6 * 5),
        ("long_context", 1, 75, 5),
    ]
    for record, (workload, requests, prompt, output) in zip(found["workloads"], cases, strict=True):
        assert (record["workload"], record["requests"]) == (workload, requests)
        assert f"{workload}: {record['case']}\n" in result.stdout
        if prompt is not None:
            assert (record["prompt_tokens"], record["output_tokens"]) == (prompt, output)
        total = record["prompt_tokens"] + record["output_tokens"]
        assert record["output_tokens_per_second"] == pytest.approx(record["output_tokens"] / record["seconds"])
        assert record["total_tokens_per_second"] == pytest.approx(total / record["seconds"])
        assert 0 < record["first_token"]["p50"] <= record["first_token"]["p99"] <= 2e3 * record["seconds"] + 1e3
        assert 0 < record["scheduler_share"] < 1
        assert (record["next_token"] is None) == (workload == "prefill")
        other = record["against"]["transformers"]
        assert other["equal_answers"] == 1.0  # fp32, greedy: their answers are ours
        assert len(other["ratios"]) == 2
        assert f"{other['ratio']:.2f} times as fast as transformers" in result.stdout
    shared = found["workloads"][4]["shared"]
    assert (shared["computed_without"], shared["computed_with"]) == (6 * 80, 64 + 6 * 16)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.png"]
