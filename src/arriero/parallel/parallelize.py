"""From a model on the meta device to this process's share of it: the one place where the order is visible."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from arriero.config.layout import Coordinates, Layout
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.models.tensor_split import EVERYWHERE
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.parallel.compilation import apply_compile
from arriero.parallel.eight_bits import apply_fp8
from arriero.parallel.pipeline import Stage, keep_stages, split_layers
from arriero.parallel.processes import Processes, mesh_of, set_timeout
from arriero.parallel.sharding import apply_sharding
from arriero.parallel.tensor import TensorParallel, apply_tensor_parallel, check_heads

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Parallel:
    """How a model was shared out.

    Attributes:
        stages: those of this process.
        tensor: None where no matrices are shared out.
        shapes: of every parameter of the whole model.
        trained: names of the parameters that are trained, of the whole model.
        everywhere: names of the parameters that every process holds whole, each with a part of the gradient.
        tied: of the embedding and of its copy at the other end of the pipeline, the name that is stored.
        ends: the two processes that hold them, None where they are one process or none.
    """

    processes: Processes
    device: torch.device
    stages: list[Stage]
    tensor: TensorParallel | None
    shapes: dict[str, tuple[int, ...]]
    trained: frozenset[str]
    everywhere: frozenset[str] = frozenset()
    tied: dict[str, str] = field(default_factory=dict)
    ends: dist.ProcessGroup | None = None

    @torch.no_grad()
    def finish_gradients(self, gradients: dict[str, Tensor]) -> None:
        """After the last backward pass of a step: add up what several processes hold parts of, in place.

        Args:
            gradients: local ones, by parameter name.
        """
        if self.tensor is not None:
            self.tensor.add_up_partial(gradients)
        parts = [gradients[name] for name in sorted(self.everywhere & gradients.keys())]
        if parts:
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(flat)
            for part, total in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
                part.copy_(total.view_as(part))
        held = [gradients[name] for name in self.tied if name in gradients]
        if len(held) == 2:  # both ends of the pipeline are here
            held[0] += held[1]
            held[1].copy_(held[0])
        elif held and self.ends is not None:
            dist.all_reduce(held[0], group=self.ends)


def check_layout(config: LlamaConfig, layout: Layout) -> None:
    """Refuse a layout that does not suit a model, before anything is loaded.

    Raises:
        ConfigError: naming the nearest that does.
    """
    check_heads(config, layout.tp)
    split_layers(config, layout.stages)


def parallelize(
    model: LlamaForCausalLM,
    processes: Processes,
    device: torch.device,
    *,
    tokens: int = 2048,
    fp8: bool = False,
    recompute: str | None = None,
    compile_layers: bool = False,
    reduce_dtype: torch.dtype = torch.float32,
) -> Parallel | None:
    """Keep this process's share of a model, in place, and leave what was done in `model.parallel`.

    Args:
        model: on the meta device; in a lone process it may hold its weights already, and stays whole.
        tokens: of a row; decides how much an attention layer weighs beside the head.
        fp8: whether the matrices of the layers are trained in 8-bit floats.
        recompute: "full" or "core_attn", or None.
        reduce_dtype: in which data-parallel processes add up gradients.
    """
    layout = processes.layout
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if processes.alone:
        if fp8:
            apply_fp8(model)
        _per_layer(model, recompute, compile_layers)
        return None
    tied = model.config.tie_word_embeddings and layout.pp > 1
    if tied:
        shapes[HEAD] = shapes[EMBEDDING]
    stages = keep_stages(model, layout, processes.at.pp, tokens)
    tensor = None
    if layout.tp > 1:
        at, group = processes.at, processes.group("tp")
        tensor = TensorParallel(group, at.tp, layout.tp, layout.sequence_parallel)
        apply_tensor_parallel(model, tensor)
    if fp8:
        apply_fp8(model)
    _per_layer(model, recompute, compile_layers, whole=layout.tp == 1)
    mesh = _sharding_mesh(processes, device)
    for stage in stages:
        apply_sharding(stage, mesh, layout, reduce_dtype, device.type == "cuda")
    everywhere = frozenset(name for name in shapes if name.startswith(EVERYWHERE + "."))
    parallel = Parallel(processes, device, stages, tensor, shapes, trained, everywhere)
    if tied:
        held = [name for name in (EMBEDDING, HEAD) if name in dict(model.named_parameters())]
        parallel.tied = dict.fromkeys(held, EMBEDDING)
        parallel.ends = processes.kept("ends", lambda: _ends(processes))
    model.parallel = parallel  # type: ignore[assignment]  # no module: a note for whoever asks where a tensor lies
    return parallel


def _per_layer(model: LlamaForCausalLM, recompute: str | None, compile_layers: bool, *, whole: bool = True) -> None:
    layers = list(model.model.layers.children())
    if recompute is not None:
        apply_activation_checkpointing(layers, recompute)
    if compile_layers:
        apply_compile(layers, whole=whole)


def _sharding_mesh(processes: Processes, device: torch.device) -> DeviceMesh:
    """Of the processes that hold the same stage and the same part of each matrix: they share or copy it.

    Those that share out sequences hold the same model too, so that they can share it as well.
    """
    layout = processes.layout
    names = ("pp", "dp_replicate", "shard", "tp")
    degrees = (layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp)
    mesh = processes.kept("sharding", lambda: mesh_of(device, degrees, names))
    return mesh["dp_replicate", "shard"] if layout.dp_replicate > 1 else mesh["shard"]


def _ends(processes: Processes) -> dist.ProcessGroup | None:
    """The group of this pipeline's first and last stage; every process makes every group, as torch wants it."""
    layout = processes.layout
    first, last = layout.process_of(0), layout.process_of(layout.stages - 1)
    if first == last:
        return None
    found = None
    columns = {
        tuple(getattr(at, axis) for axis in ("dp_replicate", "dp_shard", "cp", "tp"))
        for at in map(layout.coordinates, range(layout.size))
    }
    for column in sorted(columns):
        ranks = [layout.rank(Coordinates(pp, *column)) for pp in (first, last)]
        group = dist.new_group(ranks)
        if processes.rank in ranks:
            set_timeout(group)
        if processes.rank in ranks:
            found = group
    return found
