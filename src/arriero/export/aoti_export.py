"""From a model to a bundle of native code: programs that AOTInductor compiled, and the weights beside them."""

from __future__ import annotations

import platform
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.nn.attention import sdpa_kernel

from arriero.errors import ConfigError, FormatError
from arriero.export.aoti_products import calls_of_onednn
from arriero.export.aoti_runner import ROWS, STEP, decode_name, open_runner, program_notes
from arriero.export.bundle import Bundle
from arriero.export.native_code import native_operators, needed_features
from arriero.export.prefix_file import PrefixArray
from arriero.export.processor import needed_isa
from arriero.export.torch_export import PLAIN, ProgramKind, TorchOptions, export_programs
from arriero.export.torch_target import Target, capability
from arriero.export.torch_trace import trace_decode, trace_rows, trace_step
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.source import ModelSource
from arriero.models.compiler import check_compiler, check_own_library, vector_isa
from arriero.models.config import LlamaConfig
from arriero.onednn import onednn_is_faster
from arriero.processor_info import features

# Sequences of the programs of one token each: a step of several takes the smallest that holds them.
DECODE_ROWS = (1, 4, 8)
# In a process of its own: loads a program of a package.
_LOAD = """
import sys, torch
torch.zeros(1, device=sys.argv[3])
number = torch.device(sys.argv[3]).index
torch._C._aoti.AOTIModelPackageLoader(sys.argv[1], sys.argv[2], True, 1, -1 if number is None else number)
"""
# Loops are cut for so many threads; how many run is decided when the code runs.
_THREADS = 8


def export_aoti(
    model: str | Path | ModelSource,
    target: str | Path,
    options: TorchOptions = PLAIN,
    *,
    prefix: PrefixArray | None = None,
    defaults: Mapping[str, Any] | None = None,
    decode_rows: tuple[int, ...] = DECODE_ROWS,
) -> Bundle:
    """Write the bundle of a model, for processors like this one; a weight at a time is in memory.

    Args:
        decode_rows: sequences of the programs that continue them by a token; each is compiled for itself. Of int8 and int4
            one program does that for any number.

    Other arguments and errors are those of `export_torch`.

    Raises:
        ConfigError: also, without a C++ compiler.
    """
    isa = _isa(options)

    def write(path: Path, config: LlamaConfig, context: int, weights: Mapping[str, LazyTensor], made: Target) -> None:
        programs = {STEP: trace_step(config, context, weights, made)}
        native = options.form.bits is not None
        if native:
            programs[ROWS] = trace_rows(config, context, weights)
        elif made.device.type == "cpu":  # on a GPU one token of each is best computed as any number of them
            programs |= {decode_name(rows): trace_decode(config, context, weights, rows) for rows in decode_rows}
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        notes = program_notes(shape, config.vocab_size, context, weights, made)
        with sdpa_kernel(made.kernels):
            by_onednn = made.device.type == "cpu" and onednn_is_faster()
            with native_operators() if native else nullcontext():
                _compile(programs, path, notes, by_onednn=by_onednn)
        if made.device.type == "cuda":
            check_loads(path, made.device)

    kind = ProgramKind("aoti", write, open_runner, isa)
    return export_programs(kind, model, target, options, prefix, defaults or {})


def _isa(options: TorchOptions) -> str:
    """What the compiled code will need.

    Raises:
        ConfigError: without a compiler, or where torch cannot be told what to compile for.
    """
    from torch._inductor import config

    target = options.target
    if not hasattr(config.cpp, "march") and target.device.type == "cpu":
        raise ConfigError(
            f"--format aoti needs torch 2.13 or newer, and this is {torch.__version__}: use --format torch"
        )
    check_compiler("--format aoti", "use --format torch")
    check_own_library("--format aoti", "use --format torch")
    if not hasattr(config.cpp, "march"):  # what runs on the host uses whatever this processor has
        isa = " ".join((platform.machine(), *sorted(features())))
    else:
        isa = needed_isa(vector_isa().build_arch_flags(), needed_features() if options.form.bits is not None else ())
    return isa if target.device.type == "cpu" else f"{isa} {capability(str(target.device))}"


def check_loads(package: Path, device: torch.device) -> None:
    """
    Raises:
        FormatError: torch cannot load the package, tried in a process of its own, since it may die of it.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", _LOAD, str(package), STEP, str(device)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [""])[-1][:200]
        reason = f"signal {-done.returncode}" if done.returncode < 0 else told
        raise FormatError(
            f"{package.name}: torch {torch.__version__} cannot load what it compiled for this GPU ({reason}): use --format "
            "torch"
        )


def _compile(
    programs: Mapping[str, ExportedProgram], path: Path, notes: Mapping[str, str], *, by_onednn: bool = False
) -> None:
    """Compile programs, and put the libraries into one package.

    Args:
        notes: what each says of itself.
        by_onednn: matrix products are oneDNN's, in place of the BLAS that torch was built with.

    Raises:
        FormatError: when the compiler fails.
    """
    from torch._inductor import aot_compile, config
    from torch._inductor.package.package import package_aoti
    from torch._inductor.utils import fresh_cache

    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.enable_line_tables": False,  # nor names of files of this machine
        "cpp.march": "x86-64-v3" if needed_isa("").startswith("x86_64") else None,
        "cpp.dynamic_threads": True,
        "cpp.threads": _THREADS,
        "compile_threads": 1,
        "epilogue_fusion": False,  # into the calls of `native_code`
    }
    known = config.get_config_copy()  # torch 2.11, for a GPU, has not all of them
    options = {name: value for name, value in options.items() if name in known}
    files: dict[str, list[Any]] = {}
    failed: tuple[str, RuntimeError] | None = None  # raised outside, since the cache of a block that fails is kept
    with TemporaryDirectory(prefix="arriero-aoti-") as scratch, fresh_cache(dir=scratch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, program in programs.items():
            assert program.example_inputs is not None
            arguments, named = program.example_inputs
            try:
                own = options | {"aot_inductor.metadata": dict(notes)}  # torch adds to it
                module = program.module(check_guards=False)
                with calls_of_onednn(module) if by_onednn else nullcontext():
                    written = aot_compile(module, arguments, named, options=own)
            except RuntimeError as error:
                failed = name, error
                break
            assert isinstance(written, list)
            # not the sources, but that torch 2.11 finds others by the name of one
            unneeded = (".cpp",) if "cpp.march" in known else ()
            files[name] = [file for file in written if isinstance(file, str) and not file.endswith(unneeded)]
        else:
            package_aoti(str(path), files)
    if failed is not None:
        reason = " ".join(str(failed[1]).split())[:300]
        raise FormatError(f"{path.name}: the program {failed[0]} cannot be compiled ({reason})") from failed[1]
