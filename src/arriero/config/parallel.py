"""How a run is laid out over processes."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.layout import CONTEXT_METHODS, SCHEDULES, Layout
from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError

_STAGES = ("stage1", "stage2", "stage3")
DEGREES = (
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
    "sharding_parallel_degree",
    "data_parallel_degree",
)
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
    virtual_pp_degree: int = option(1, "runs of layers in each process of the pipeline", minimum=1)
    pipeline_schedule: str | None = option(
        None,
        "order of the pipeline's work (default: 1f1b, with --virtual_pp_degree above 1 interleaved; zbv has 2 runs each)",
        SCHEDULES,
    )
    pipeline_parallel_config: list[str] = option(
        [], "switches of the pipeline, as PaddleNLP names them", PIPELINE_WORDS
    )
    sharding: list[str] = option(
        [],
        "what data-parallel processes share out: stage1 optimizer, stage2 + gradients, stage3 + weights; and offload",
        (*_STAGES, "offload"),
    )
    sharding_parallel_degree: int = option(
        -1, "processes that share it out; -1: all that are left", minimum=-1, only_with="sharding"
    )
    data_parallel_degree: int = option(-1, "copies of the model; -1: all that are left", minimum=-1)
    sequence_parallel: bool = option(
        True, "with --tensor_parallel_degree: share out the tokens between the matrices too (saves memory)"
    )
    context_parallel_degree: int = option(1, "processes that share each sequence", minimum=-1)
    context_parallel_method: str = option(
        "auto",
        "how they attend to each other's keys: all gathered, or in a ring that holds few; auto: ring on CUDA, else gather",
        CONTEXT_METHODS,
    )
    gradient_reduce_dtype: str = option(
        "float32", "number format in which data-parallel processes add up gradients", ("float32", "bfloat16")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # -1 is Paddle's word for "not used" here.
        self.tensor_parallel_degree = 1 if self.tensor_parallel_degree == -1 else self.tensor_parallel_degree
        self.pipeline_parallel_degree = 1 if self.pipeline_parallel_degree == -1 else self.pipeline_parallel_degree
        self.context_parallel_degree = 1 if self.context_parallel_degree == -1 else self.context_parallel_degree
        for name in DEGREES:
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
        if self.pipeline_schedule == "zbv":
            if self.virtual_pp_degree not in (1, 2):
                raise ConfigError(
                    f"--pipeline_schedule zbv has 2 runs of layers in each process and --virtual_pp_degree is "
                    f"{self.virtual_pp_degree}: drop the second"
                )
            self.virtual_pp_degree = 2 if self.pipeline_parallel_degree > 1 else 1
        if self.pipeline_schedule == "1f1b" and self.virtual_pp_degree > 1:
            raise ConfigError(
                f"--pipeline_schedule 1f1b has one run of layers in each process and --virtual_pp_degree is "
                f"{self.virtual_pp_degree}: choose interleaved, or drop the second"
            )

    @property
    def sharding_stage(self) -> int:
        """0 (none), 1, 2 or 3."""
        return next((int(word[-1]) for word in self.sharding if word in _STAGES), 0)

    def layout(self, world_size: int) -> Layout:
        """The layout of a run of so many processes; what is not given follows from what is.

        Without a stage of sharding, data-parallel processes hold copies; with one, they share, unless
        `--data_parallel_degree` asks for copies of what is shared.

        Raises:
            ConfigError: the degrees do not fit the number of processes; the nearest choice is named.
        """
        model = self.tensor_parallel_degree * self.pipeline_parallel_degree * self.context_parallel_degree
        shard, replicas = self.sharding_parallel_degree, self.data_parallel_degree
        if shard > 1 and not self.sharding_stage:
            raise ConfigError(
                f"--sharding_parallel_degree {shard} needs --sharding, which names what is shared out: add --sharding stage2, "
                "or drop the first"
            )
        fixed = model * max(shard, 1) * max(replicas, 1)
        left, rest = divmod(world_size, fixed)
        if rest or not left:
            raise ConfigError(self._misfit(world_size, fixed))
        if not self.sharding_stage:
            shard, replicas = 1, (replicas if replicas > 0 else left)
        elif shard > 0:
            replicas = replicas if replicas > 0 else left
        else:
            shard, replicas = left, max(replicas, 1)
        if model * shard * replicas != world_size:
            raise ConfigError(self._misfit(world_size, model * shard * replicas))
        schedule = self.pipeline_schedule or ("interleaved" if self.virtual_pp_degree > 1 else "1f1b")
        return Layout(
            pp=self.pipeline_parallel_degree,
            dp_replicate=replicas,
            dp_shard=shard,
            cp=self.context_parallel_degree,
            tp=self.tensor_parallel_degree,
            stage=self.sharding_stage if shard * self.context_parallel_degree > 1 else 0,
            offload="offload" in self.sharding,
            virtual=self.virtual_pp_degree,
            schedule=schedule,
            sequence_parallel=self.sequence_parallel,
            context_method=self.context_parallel_method,
        )

    def _misfit(self, world_size: int, needed: int) -> str:
        given = {name: getattr(self, name) for name in DEGREES}
        named = " x ".join(f"--{name} {degree}" for name, degree in given.items() if degree > 1)
        nearest = max(round(world_size / needed), 1) * needed
        return (
            f"{named or 'this layout'} needs {'exactly ' if -1 not in given.values() else 'a multiple of '}{needed} "
            f"processes and this run has {world_size}: start {nearest} (arriero launch --nproc_per_node {nearest}), "
            "or change a degree"
        )
