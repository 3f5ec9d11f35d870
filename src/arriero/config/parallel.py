"""How a run is laid out over processes."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError

_STAGES = ("stage1", "stage2", "stage3")
PIPELINE_WORDS = (
    "disable_p2p_cache_shape",
    "disable_partial_send_recv",
    "enable_delay_scale_loss",
    "enable_sharding_comm_overlap",
    "enable_timer",
)


@dataclass(kw_only=True)
class ParallelOptions(OptionGroup):
    """Parallel layout."""

    tensor_parallel_degree: int = option(1, "processes that share each weight matrix", minimum=-1)
    pipeline_parallel_degree: int = option(1, "stages the layers are cut into", minimum=-1)
    virtual_pp_degree: int = option(1, "chunks of layers on each pipeline stage (interleaved schedule)", minimum=1)
    pipeline_parallel_config: list[str] = option([], "switches of the pipeline, as the seed names them", PIPELINE_WORDS)
    sharding: list[str] = option(
        [],
        "what data-parallel processes share out: stage1 optimizer, stage2 + gradients, stage3 + weights; and offload",
        (*_STAGES, "offload"),
    )
    sharding_parallel_degree: int = option(
        -1, "processes that share it out; -1: all that are left", minimum=-1, only_with="sharding"
    )
    data_parallel_degree: int = option(-1, "copies of the model; -1: all that are left", minimum=-1)

    def __post_init__(self) -> None:
        super().__post_init__()
        # -1 is Paddle's word for "not used" here.
        self.tensor_parallel_degree = 1 if self.tensor_parallel_degree == -1 else self.tensor_parallel_degree
        self.pipeline_parallel_degree = 1 if self.pipeline_parallel_degree == -1 else self.pipeline_parallel_degree
        for name in (
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
            "sharding_parallel_degree",
            "data_parallel_degree",
        ):
            if getattr(self, name) == 0:
                raise ConfigError(f"--{name} is 0: give 1 or more")
        stages = [word for word in self.sharding if word in _STAGES]
        if len(stages) > 1:
            raise ConfigError(f"--sharding names {' and '.join(stages)}: keep one stage (each holds the ones before)")
        if "offload" in self.sharding and not stages:
            raise ConfigError("--sharding offload needs a stage: e.g. --sharding 'stage2 offload'")
        if self.virtual_pp_degree > 1 and self.pipeline_parallel_degree == 1:
            raise ConfigError(
                f"--virtual_pp_degree {self.virtual_pp_degree} needs --pipeline_parallel_degree above 1: "
                "raise the second or drop the first"
            )

    @property
    def sharding_stage(self) -> int:
        """0 (none), 1, 2 or 3."""
        return next((int(word[-1]) for word in self.sharding if word in _STAGES), 0)

    def check_world_size(self, world_size: int) -> None:
        """Raises ConfigError where the degrees do not fit the number of processes."""
        shard = max(self.sharding_parallel_degree, 1)
        replicas = max(self.data_parallel_degree, 1)
        needed = self.tensor_parallel_degree * self.pipeline_parallel_degree * shard * replicas
        if world_size % needed:
            parts = {
                "tensor_parallel_degree": self.tensor_parallel_degree,
                "pipeline_parallel_degree": self.pipeline_parallel_degree,
                "sharding_parallel_degree": shard,
                "data_parallel_degree": replicas,
            }
            named = " x ".join(f"--{name} {degree}" for name, degree in parts.items() if degree > 1)
            raise ConfigError(
                f"{named} needs a multiple of {needed} processes and this run has {world_size}: lower a degree, "
                f'or start more with arriero launch --gpus "0,1,..."'
            )
