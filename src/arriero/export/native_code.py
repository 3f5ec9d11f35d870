"""Native code for `native_operators` in what torch's compiler writes: functions of `native/*.h`, in front of their calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from threading import Lock
from typing import Any

import torch

from arriero.export.native_operators import CACHED_ATTENTION, INTEGER_PRODUCT
from arriero.processor_info import features

# Variants of `integer_product` by what the processor must have for them, the fastest first.
_VARIANTS = {
    "ARRIERO_VNNI": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "ARRIERO_AVX2": ("avx2", "fma", "f16c"),
}

_ONE_AT_A_TIME = Lock()  # what the compiler knows is one for all threads


def needed_features() -> Sequence[str]:
    """What the variant for this processor needs of it: nothing of the one for all."""
    return _VARIANTS.get(_variant(), ())


def _variant() -> str:
    """The macro of the variant for this processor."""
    own = features()
    return next((macro for macro, needed in _VARIANTS.items() if own.issuperset(needed)), "")


@contextmanager
def native_operators() -> Iterator[None]:
    """Inside, the compiler has native code for them."""
    from torch._inductor.lowering import lowerings

    own = {_operator(INTEGER_PRODUCT): _integer_product, _operator(CACHED_ATTENTION): _cached_attention}
    with _ONE_AT_A_TIME:
        lowerings.update(own)
        try:
            yield
        finally:
            for operator in own:
                del lowerings[operator]


def _operator(name: str) -> Any:
    space, _, own = name.partition("::")
    return getattr(getattr(torch.ops, space), own).default


@dataclass(frozen=True)
class _Call:
    """Of a function of a header.

    Attributes:
        header: in `native/`.
        names: of the inputs.
        statement: makes the call from the sizes of a kernel, its inputs and its result Y.
    """

    header: str
    names: Sequence[str]
    statement: Callable[[Any, Sequence[Any], Any], str]


def _integer_product(x: Any, levels: Any, steps: Any, factors: Any, outputs: int) -> Any:
    def statement(kernel: Any, inputs: Sequence[Any], result: Any) -> str:
        sizes = f"{kernel.size(inputs[0], 0)}, {kernel.size(inputs[0], 1)}, {kernel.size(result, 1)}"
        numbers = f"X, levels, reinterpret_cast<const uint16_t*>(steps), factors, Y, {sizes}"
        return f"arriero::integer_product<{levels.get_size()[-1] // 64}>({numbers});"

    call = _Call("integer_product.h", ("X", "levels", "steps", "factors"), statement)
    return _called(call, [x, levels, steps, factors], [x.get_size()[0], outputs])


def _cached_attention(query: Any, cache: Any, starts: Any, window: int, scale: float) -> Any:
    def statement(kernel: Any, inputs: Sequence[Any], result: Any) -> str:
        query, cache, _ = inputs
        sizes = [kernel.size(query, 0), kernel.size(query, 1), f"{kernel.size(cache, 1)} / 2"]
        sizes += [kernel.size(cache, 2), kernel.size(cache, 3)]
        return f"arriero::cached_attention(query, cache, starts, Y, {', '.join(sizes)}, {window}, {scale!r}f);"

    call = _Call("cached_attention.h", ("query", "cache", "starts"), statement)
    return _called(call, [query, cache, starts], list(query.get_size()))


def _called(call: _Call, given: Sequence[Any], size: list[Any]) -> Any:
    """The result of a call, (size) fp32."""
    from torch._inductor.codegen.cpp_template import CppTemplate
    from torch._inductor.ir import ExternKernel, FixedLayout

    class Template(CppTemplate):
        """A kernel that calls the function."""

        def render(self, **own: Any) -> str:
            kernel, buffer = own["kernel"], own.get("template_buffer_node")
            result = self.output_node if buffer is None else buffer
            # makes open sizes arguments, so it comes before what names them
            signature = kernel.def_kernel(dict(zip(call.names, self.input_nodes, strict=True)), {"Y": result})
            statement = call.statement(kernel, self.input_nodes, result)
            macro = f"#define {_variant()}\n" if _variant() else ""
            return (
                f"{self.header().getvalue()}\n{macro}{_header(call.header)}\n"
                f'extern "C" {signature}\n{{\n    {statement}\n}}\n'
            )

    inputs = [ExternKernel.require_contiguous(ExternKernel.realize_input(one)) for one in given]
    # a kernel is given the memory of the whole that an input is a part of
    inputs = [one if one.get_layout().offset == 0 else ExternKernel.copy_input(one) for one in inputs]
    layout = FixedLayout(torch.device("cpu"), torch.float32, size)
    name = call.header.removesuffix(".h")
    template: Any = Template(name, inputs, layout, torch.get_num_threads())
    return template.generate().output_node()


def _header(name: str) -> str:
    return files("arriero.export").joinpath("native", name).read_text(encoding="utf-8")
