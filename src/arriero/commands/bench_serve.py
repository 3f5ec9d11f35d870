"""`arriero bench serve`: a server under load. Needs h11 (extra: serve), and no torch."""

from __future__ import annotations

import asyncio
import os
import sys
from functools import partial

from arriero.commands.bench_files import write_files
from arriero.config.bench import BenchOptions
from arriero.config.load import LoadOptions
from arriero.errors import ConfigError
from arriero.serving.load import report
from arriero.serving.load.asking import Question, first_model
from arriero.serving.load.exchange import Endpoint
from arriero.serving.load.prompts import arrivals, read_conversations, shuffled
from arriero.serving.load.record import RateRecord
from arriero.serving.load.run import run_rate, warm_up

KEY_VARIABLES = ("ARRIERO_API_KEY", "OPENAI_API_KEY")


def run(bench: BenchOptions, load: LoadOptions) -> int:
    """Print a line as soon as a rate is measured; write --output_file and --plot at the end.

    Raises:
        LoadError: no server, or one that does not answer a first request.
        ConfigError: a key that no request can carry.
        DataError: prompts that cannot be read.

    Returns:
        1 if no request at all was answered.
    """
    setting, records = asyncio.run(_measure(bench, load))
    print(f"\n{report.EXPLANATION}")
    write_files(bench, report.as_dictionary(setting, records), partial(report.draw, setting=setting, records=records))
    if any(record.completed for record in records):
        return 0
    sent = sum(record.failed for record in records)
    print(
        f"arriero: none of {sent} requests was answered by {load.base_url}: see above why", file=sys.stderr, flush=True
    )
    return 1


def _key(load: LoadOptions) -> str | None:
    """The key, without what a shell or a file left around it.

    Raises:
        ConfigError: it cannot stand in a header of HTTP.
    """
    named = {"--api_key": load.api_key} | {f"${name}": os.environ.get(name) for name in KEY_VARIABLES}
    for place, key in named.items():
        if key is None or not key.strip():
            continue
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{place}: a key is printable ASCII in one line, and this one is not")
        return key
    return None


async def _measure(bench: BenchOptions, load: LoadOptions) -> tuple[report.Setting, list[RateRecord]]:
    conversations = read_conversations(load.data_file)
    endpoint = Endpoint(load.base_url, _key(load))
    model = load.model or await first_model(endpoint)
    question = Question(load.api, model, bench.max_new_tokens, load.temperature, load.ignore_eos, load.request_timeout)
    setting = report.Setting(
        base_url=load.base_url,
        model=model,
        api=load.api,
        prompts=load.data_file or "passages and questions of arriero's own",
        different_prompts=len(conversations),
        num_requests=bench.num_requests,
        max_tokens=bench.max_new_tokens,
        temperature=load.temperature,
        ignore_eos=load.ignore_eos,
        seed=bench.seed,
    )
    # one more, for the request before all others; each rate has prompts of its own as long as there are any
    asked = shuffled(conversations, bench.num_requests * len(load.rates) + 1, bench.seed)
    await warm_up(endpoint, question, asked.pop())
    print(f"{setting.text()}\n\n{report.heading()}", flush=True)
    records = []
    for number, rate in enumerate(load.rates):
        own = asked[number * bench.num_requests : (number + 1) * bench.num_requests]
        times = arrivals(bench.num_requests, rate, bench.seed)
        record = await run_rate(endpoint, question, own, times, rate, load.objectives())
        print(report.lines(record), flush=True)
        records.append(record)
    return setting, records
