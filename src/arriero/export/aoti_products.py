"""oneDNN's matrix products in compiled programs, where torch's compiler would call the BLAS that torch was built with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch


@contextmanager
def calls_of_onednn(module: torch.fx.GraphModule) -> Iterator[None]:
    """Let oneDNN compute a program's matrix products; inside, the compiler knows how to write that.

    Its own way is for weights that are part of the program, and here they are inputs.
    """
    from torch._inductor.lowering import lowerings

    import_module("torch._inductor.mkldnn_lowerings")  # which would replace ours if it came later
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        x, weight, bias = (*node.args, None)[:3]
        node.target, node.args = torch.ops.mkldnn._linear_pointwise.default, (x, weight, bias, "none", [], "")
    module.recompile()
    own: dict[Callable[..., Any] | str, Callable[..., Any]] = {
        torch.ops.mkldnn._linear_pointwise.default: _product,
        torch.ops.mkldnn._linear_pointwise.binary: _product_and_other,
    }
    known = {operator: lowerings[operator] for operator in own}
    lowerings.update(own)
    try:
        yield
    finally:
        lowerings.update(known)


def _product(x: Any, weight: Any, bias: Any, attr: str, scalars: Any, algorithm: str) -> Any:
    from torch._inductor.ir import TensorBox
    from torch._inductor.mkldnn_ir import LinearUnary

    return TensorBox.create(LinearUnary.create(x, weight, bias, attr, scalars, algorithm))  # type: ignore[no-untyped-call]


def _product_and_other(x: Any, other: Any, weight: Any, bias: Any, attr: str) -> Any:
    """What the compiler makes of a product and a sum that follows."""
    from torch._inductor.ir import TensorBox
    from torch._inductor.mkldnn_ir import LinearBinary

    return TensorBox.create(LinearBinary.create(x, other, weight, bias, attr))  # type: ignore[no-untyped-call]
