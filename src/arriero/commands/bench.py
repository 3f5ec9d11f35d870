"""`arriero bench`: the speed of a model on this machine, or of a server under load."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import TYPE_CHECKING

from arriero.commands.bench_files import check_files, write_files
from arriero.config.adapter import AdapterPathOptions
from arriero.config.bench import BenchOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.kv_cache import KVCacheOptions
from arriero.config.load import LoadOptions
from arriero.config.model import ModelOptions
from arriero.errors import ConfigError, require

if TYPE_CHECKING:
    import torch

    from arriero.engine.benchmark.record import Peak
    from arriero.engine.benchmark.report import Setting
    from arriero.engine.loading import LoadedModel
    from arriero.engine.runner import TorchRunner

HELP = (
    "Measure the speed of a model on this machine: rates, latencies, shares of what the machine can reach; with --against "
    "beside other programs. Prompts are random tokens, and answers are as long as asked for. `bench serve` loads no model: it "
    "asks a server with an OpenAI API, at several rates, with real prompts."
)

OPTIONS: tuple[type, ...] = (
    ModelOptions,
    AdapterPathOptions,
    BenchOptions,
    KVCacheOptions,
    CompilationOptions,
    LoadOptions,
)


def run(
    model: ModelOptions,
    adapter: AdapterPathOptions,
    bench: BenchOptions,
    cache: KVCacheOptions,
    compilation: CompilationOptions,
    load: LoadOptions,
) -> int:
    """Print a table, a line as soon as it is measured; write --output_file and --plot at the end."""
    check_files(bench)
    if "serve" in bench.workloads:
        require("h11", "serve")
        from arriero.commands.bench_serve import run as run_load

        return run_load(bench, load)
    import torch

    from arriero.engine.benchmark import report
    from arriero.engine.benchmark.peer import peer
    from arriero.engine.benchmark.rounds import measure
    from arriero.engine.benchmark.work_cost import WorkCost
    from arriero.engine.benchmark.workloads import Prompts, cuts, make_jobs
    from arriero.engine.loading import load_for_inference
    from arriero.engine.runner import TorchRunner, cache_block_size

    _check(adapter, bench)
    if bench.threads is not None:
        torch.set_num_threads(bench.threads)
    loaded = load_for_inference(model, adapter)
    cost = WorkCost.of(loaded.model, cache.kv_cache_dtype)
    prompts = Prompts.of(loaded.tokenizer, loaded.model.config.vocab_size, loaded.model.context, bench.seed)
    jobs = make_jobs(bench, prompts)
    if cut := cuts(bench, prompts.context):
        print(
            f"arriero: warning: the model's context of {prompts.context} cuts {', '.join(cut)}",
            file=sys.stderr,
            flush=True,
        )
    peak = _peak(loaded)
    block_size = cache_block_size(loaded.model)
    useful = max(job.running_tokens(loaded.model.model.prefix_length, block_size) for job in jobs)
    runner = TorchRunner(
        loaded.model, useful_tokens=useful, kv_cache_dtype=cache.kv_cache_dtype, compile=compilation.torch_compile
    )
    setting = _setting(model.model_name_or_path, loaded, runner, peak)
    records = []
    with contextlib.ExitStack() as stack:
        peers = [
            stack.enter_context(peer(name, loaded.folder, _dtype(loaded), loaded.device, torch.get_num_threads()))
            for name in bench.against
        ]
        setting.peers.update({other.name: other.version for other in peers})
        print(f"{setting.text()}\n\n{report.heading()}", flush=True)
        for job in jobs:
            record = measure(
                runner,
                loaded.tokenizer,
                job,
                cost,
                peak,
                repeats=bench.repeats,
                max_step_tokens=bench.max_step_tokens,
                peers=peers,
            )
            print(report.lines(record), flush=True)
            records.append(record)
    print(f"\n{report.EXPLANATION}")
    write_files(bench, report.as_dictionary(setting, records), partial(report.draw, setting=setting, records=records))
    return 0


def _check(adapter: AdapterPathOptions, bench: BenchOptions) -> None:
    from arriero.engine.benchmark.peer import check_installed

    for name in bench.against:
        check_installed(name)
        if adapter.lora_path or adapter.prefix_path:
            raise ConfigError(f"--against {name} measures the model without an adapter: leave one of them out")


def _dtype(loaded: LoadedModel) -> torch.dtype:
    return loaded.model.model.embed_tokens.weight.dtype


def _peak(loaded: LoadedModel) -> Peak:
    """Measured; before there is a runner, which goes on moving weights for a second."""
    from arriero.engine.benchmark.record import Peak
    from arriero.engine.machine_peak import matrix_product_flops, read_bandwidth

    return Peak(matrix_product_flops(loaded.device, _dtype(loaded)), read_bandwidth(loaded.device))


def _setting(name: str, loaded: LoadedModel, runner: TorchRunner, peak: Peak) -> Setting:
    import torch

    from arriero.engine.benchmark.report import Setting
    from arriero.engine.machine_peak import machine_name

    device = loaded.device
    return Setting(
        model=name,
        parameters=loaded.model.config.num_parameters(),
        dtype=str(_dtype(loaded)).removeprefix("torch."),
        device=str(device),
        machine=machine_name(device),
        threads=torch.get_num_threads(),
        peak=peak,
        kv_memory=runner.kv_memory,
        context=runner.context,
    )
