"""What the HTTP server costs over its engine: the same prompts through `arriero serve` and through the engine alone.

N clients each ask the next prompt as soon as they have an answer (streams, greedy, the same length for all). The engine alone
gets all prompts at once with as many running. Both sides are processes of their own that take turns. The machines are shared,
so processor seconds are told beside those of the clock: they do not depend on what else runs.

    make bench BENCH=serve
    make bench BENCH=serve ARGS="--clients 16 --requests 64 --rounds 3 --threads 1"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from sides import run_side

DATA = Path(__file__).parents[2] / "shared" / "data" / "instruct" / "seed_tasks.jsonl"


def questions(arguments: argparse.Namespace) -> list[str]:
    """Real instructions, short enough for the context."""
    rows = [json.loads(line) for line in Path(arguments.dataset_path).read_text(encoding="utf-8").splitlines()]
    texts = [f"{row.get('instruction', '')}\n{row.get('input', '')}".strip()[:600] for row in rows]
    return [text for text in texts if text][: arguments.requests]


def engine_alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine with all prompts at once."""
    from arriero.config.adapter import AdapterPathOptions
    from arriero.config.model import ModelOptions
    from arriero.engine.loading import load_for_inference
    from arriero.engine.sampling_params import SamplingParams
    from arriero.engine.shared_generation import engine_of

    loaded = load_for_inference(ModelOptions(model_name_or_path=arguments.model, device="cpu"), AdapterPathOptions())
    prompts = [loaded.tokenizer.chat([{"role": "user", "content": text}]) for text in questions(arguments)]
    params = SamplingParams(max_new_tokens=arguments.tokens, ignore_eos=True)
    with engine_of(loaded.model, loaded.tokenizer, max_running=arguments.clients) as engine:
        engine.generate(prompts[:2], SamplingParams(max_new_tokens=4))
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        answers = engine.generate(prompts, params, on_text=lambda index, text: None)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    texts = [answer.text for answer in answers]
    return {"tokens": len(prompts) * arguments.tokens, "seconds": seconds, "processor": processor, "texts": texts}


async def ask(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """N clients until all questions are answered."""
    import httpx

    texts = questions(arguments)
    answers, first, between = [""] * len(texts), [], []
    waiting = iter(range(len(texts)))

    async def client(http: httpx.AsyncClient) -> None:
        for index in waiting:
            body = {
                "messages": [{"role": "user", "content": texts[index]}],
                "max_tokens": arguments.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            last = began = time.perf_counter()
            async with http.stream("POST", f"{url}/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    if "content" in delta and "role" not in delta:
                        now = time.perf_counter()
                        (between if answers[index] else first).append(now - last)
                        last = now
                        answers[index] += delta["content"]
            assert last > began

    limits = httpx.Limits(max_connections=arguments.clients)
    began = time.perf_counter()
    async with httpx.AsyncClient(limits=limits, timeout=600) as http:
        await asyncio.gather(*(client(http) for _ in range(arguments.clients)))
    return {"seconds": time.perf_counter() - began, "texts": answers, "first": first, "between": between}


def through_the_server(arguments: argparse.Namespace) -> dict[str, Any]:
    """The server in a process of its own, whose processor time is read."""
    command = [sys.executable, "-m", "arriero", "serve", arguments.model, "--device", "cpu", "--flask_port", "0"]
    command += ["--max_batch_size", str(arguments.clients)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        url = next(word for word in server.stdout.readline().split() if word.startswith("http"))
        process = psutil.Process(server.pid)
        small = argparse.Namespace(**{**vars(arguments), "requests": 2, "tokens": 4})
        asyncio.run(ask(url, small))
        before = process.cpu_times()
        found = asyncio.run(ask(url, arguments))
        after = process.cpu_times()
    finally:
        server.terminate()
        server.wait(120)
    found["tokens"] = len(found["texts"]) * arguments.tokens
    found["processor"] = after.user + after.system - before.user - before.system
    return found


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(found: dict[str, Any]) -> str:
    """One side in a line."""
    rate, cost = found["tokens"] / found["seconds"], 1000 * found["processor"] / found["tokens"]
    text = f"{rate:7.1f} tok/s  {cost:6.2f} ms of processor a token"
    for name, words in (("first", "first token"), ("between", "between")):
        if name in found:
            p50, p99 = (1000 * percentile(found[name], share) for share in (0.5, 0.99))
            text += f"  {words} p50 {p50:.0f} p99 {p99:.0f} ms"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dataset_path", default=str(DATA))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=("engine", "server"))
    parser.add_argument("--data")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(engine_alone(arguments) if arguments.side == "engine" else through_the_server(arguments)))
        return
    own = sys.argv[1:]
    ratios = []
    for number in range(arguments.rounds):
        sides = {}
        for side in ("engine", "server"):
            sides[side] = run_side(__file__, own, side, Path(os.devnull), OMP_NUM_THREADS=str(arguments.threads))
            found = sides[side]
            print(f"round {number + 1}  {side:<7} {summary(found)}", flush=True)
        engine, server = sides["engine"], sides["server"]
        same = sum(a == b for a, b in zip(engine["texts"], server["texts"], strict=True))
        ratios.append(server["processor"] / engine["processor"])
        more = 100 * (ratios[-1] - 1)
        print(f"         the server takes {more:+.1f} % processor; {same} of {len(engine['texts'])} answers the same")
    print(f"processor time, server over engine: median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
