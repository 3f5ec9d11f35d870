"""The keyword arguments of the Python functions: the commands' options. Made by docs/make_keywords.py.

`arriero VERB --help` and docs/verbs say what each does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import torch

    from arriero.api.rows import Rows

Path = str | PathLike[str]


class ModelGroup(TypedDict, total=False):
    """Model."""

    tokenizer_name_or_path: Path | None
    dtype: Literal["auto", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"] | torch.dtype
    device: str | torch.device
    use_flash_attention: bool
    use_fused_rms_norm: bool
    cache_dir: Path | None


class KVCacheGroup(TypedDict, total=False):
    """Key-value cache."""

    kv_cache_dtype: Literal["auto", "float16", "bfloat16", "fp8_e4m3", "int8"]


class CompilationGroup(TypedDict, total=False):
    """Compilation."""

    torch_compile: bool


class GenerationGroup(TypedDict, total=False):
    """Generation."""

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool | None
    temperature: float | None
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: list[str]
    seed: int | None


class PreprocessGroup(TypedDict, total=False):
    """Corpus building."""

    model_name_or_path: Path
    tokenizer_name_or_path: Path | None
    cache_dir: Path | None
    input_path: Path
    output_prefix: str
    overwrite: bool
    data_format: Literal["JSON"]
    data_impl: Literal["npy", "mmap"]
    json_key: str
    text_documents: Literal["blank_line", "file"]
    errors: Literal["strict", "replace"]
    append_eos: bool
    split_sentences: bool
    max_doc_num: int | None
    min_doc_length: int
    max_doc_length: int | None
    max_repeated_len: int
    deduplicate: bool
    workers: int
    log_interval: int
    num_shards: int
    shard_id: int
    merge_shards: bool
    executor: Literal["local", "ray"]


class PretrainModelGroup(TypedDict, total=False):
    """Model."""

    tokenizer_name_or_path: Path | None
    dtype: Literal["auto", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"] | torch.dtype
    device: str | torch.device
    use_flash_attention: bool
    use_fused_rms_norm: bool
    cache_dir: Path | None
    model_type: Literal["llama"]
    config_name: Path | None
    continue_training: bool


class CorpusGroup(TypedDict, total=False):
    """Corpus."""

    input_dir: list[Path] | Path
    split: str
    max_seq_length: int
    data_impl: Literal["auto", "npy", "mmap"]
    data_cache: str | None
    share_folder: bool
    reset_attention_mask: bool
    best_fit_packing: bool
    dataloader_num_workers: int
    document_order: Literal["file", "shuffled"]
    eval_iters: int
    do_predict: bool | None
    test_iters: int
    skip_data_intervals: list[str]


class PretrainOptimizationGroup(TypedDict, total=False):
    """Optimization."""

    do_train: bool
    do_eval: bool
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    min_learning_rate: float
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "polynomial",
        "inverse_sqrt",
        "wsd",
        "warmup_stable_decay",
    ]
    warmup_steps: int
    warmup_ratio: float
    decay_steps: int | None
    wsd_decay_ratio: float
    wsd_decay_shape: Literal["1-sqrt", "linear", "cosine"]
    lr_power: float
    num_train_epochs: float
    max_steps: int
    optim: str
    muon_momentum: float
    lion_beta1: float
    lion_beta2: float
    sgd_momentum: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    label_smoothing: float
    freeze: list[str]
    neftune_noise_alpha: float
    seed: int


class PrecisionGroup(TypedDict, total=False):
    """Precision and memory."""

    fp16: bool
    bf16: bool
    fp16_opt_level: Literal["O1", "O2"]
    fp8: bool
    scale_loss: float
    recompute: bool
    recompute_granularity: Literal["full", "core_attn"]
    torch_compile: bool


class ParallelGroup(TypedDict, total=False):
    """Parallel layout."""

    tensor_parallel_degree: int
    pipeline_parallel_degree: int
    virtual_pp_degree: int
    pipeline_schedule: Literal["1f1b", "interleaved", "zero_bubble", "zbv"] | None
    pipeline_parallel_config: list[
        Literal[
            "disable_p2p_cache_shape",
            "disable_partial_send_recv",
            "enable_delay_scale_loss",
            "enable_sharding_comm_overlap",
            "enable_timer",
        ]
    ]
    sharding: list[Literal["stage1", "stage2", "stage3", "offload"]]
    sharding_parallel_degree: int
    data_parallel_degree: int
    sequence_parallel: bool
    context_parallel_degree: int
    context_parallel_method: Literal["auto", "gather", "ring"]
    gradient_reduce_dtype: Literal["float32", "bfloat16"]


class CheckpointGroup(TypedDict, total=False):
    """Checkpoints and evaluation."""

    output_dir: Path
    overwrite_output_dir: bool
    resume_from_checkpoint: Path | None
    save_strategy: Literal["no", "steps", "epoch"]
    save_steps: int
    save_total_limit: int | None
    async_save: bool
    evaluation_strategy: Literal["no", "steps", "epoch"] | None
    eval_steps: int | None
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    greater_is_better: bool | None
    early_stopping_patience: int | None
    early_stopping_threshold: float
    max_shard_size: str
    save_sharded_model: bool


class LoggingGroup(TypedDict, total=False):
    """Logging."""

    logging_steps: int
    logging_dir: Path | None
    report_to: list[Literal["auto", "tensorboard", "visualdl", "wandb", "trackio", "none"]]
    project: str
    run_name: str | None
    disable_tqdm: bool
    sample_prompts: list[str]
    sample_tokens: int
    sample_temperature: float
    grad_norm_spike: float
    stop_on_spike: bool
    profile_steps: str | None
    profile_memory: bool


class DataGroup(TypedDict, total=False):
    """Data."""

    task_name: str | None
    data_name: str | None
    dataset_path: Path | Rows | None
    data_format: Literal["auto", "messages", "sharegpt", "context", "instruction", "alpaca", "src", "prompt", "text"]
    train_on: Literal["all_assistant", "last"]
    src_length: int | None
    tgt_length: int | None
    eval_with_do_generation: bool
    max_eval_samples: int | None
    dataset_weights: list[float] | None
    max_seq_length: int | None
    share_prefixes: bool
    packing: bool
    group_by_length: bool
    max_tokens_per_batch: int | None
    val_size: float | None
    max_train_samples: int | None
    dataloader_num_workers: int


class OptimizationGroup(TypedDict, total=False):
    """Optimization."""

    do_train: bool
    do_eval: bool
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    min_learning_rate: float
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "polynomial",
        "inverse_sqrt",
        "wsd",
        "warmup_stable_decay",
    ]
    warmup_steps: int
    warmup_ratio: float
    decay_steps: int | None
    wsd_decay_ratio: float
    wsd_decay_shape: Literal["1-sqrt", "linear", "cosine"]
    lr_power: float
    num_train_epochs: float
    max_steps: int
    optim: str
    muon_momentum: float
    lion_beta1: float
    lion_beta2: float
    sgd_momentum: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    label_smoothing: float
    freeze: list[str]
    neftune_noise_alpha: float
    seed: int


class AdapterGroup(TypedDict, total=False):
    """Adapter training."""

    lora_path: Path | None
    prefix_path: Path | None
    lora: bool
    lora_rank: int
    lora_alpha: float | None
    lora_dropout: float
    lora_target_modules: list[str]
    lora_bias: Literal["none", "all", "lora_only"]
    lora_rslora: bool
    lora_dora: bool
    lora_plus_scale: float
    lora_init: Literal["default", "pissa"]
    pissa: bool
    merge_weights: bool
    prefix_tuning: bool
    num_prefix_tokens: int
    prefix_projection: bool
    prefix_projection_hidden_size: int | None
    prefix_dropout: float


class QuantizationGroup(TypedDict, total=False):
    """Quantization in training."""

    quantize_base: Literal["nf4", "int8"] | None
    qlora: bool
    load_in_8bit: bool
    qat: bool
    qat_type: Literal["A8W8", "W4", "A8W4"]
    qat_group_size: int | None
    qat_activation: Literal["learned", "moving_average"]


class PreferenceGroup(TypedDict, total=False):
    """Preference."""

    preference: Literal["dpo", "ipo", "orpo", "simpo", "sigmoid"] | None
    dpo_beta: float | None
    dpo_label_smoothing: float
    simpo_gamma: float
    orpo_lambda: float


class VocabularyGroup(TypedDict, total=False):
    """New tokens."""

    add_tokens: list[str]
    add_special_tokens: list[str]
    resize_vocab: bool
    pad_vocab_to_multiple_of: int | None


class EvaluateGroup(TypedDict, total=False):
    """Evaluation."""

    per_device_eval_batch_size: int
    max_new_tokens: int | None
    output_dir: Path | None


class MergeGroup(TypedDict, total=False):
    """Merging."""

    adapter_weights: list[float]
    output_kind: Literal["model", "adapter"]
    max_shard_size: str
    verify: bool


class QuantizeGroup(TypedDict, total=False):
    """Quantization after training."""

    quant_type: Literal["weight_only_int8", "weight_only_int4", "int8", "int4", "nf4", "fp8", "a8w8"]
    quant_method: Literal["rtn", "gptq", "awq"]
    group_size: int | None
    activation_scale: Literal["dynamic", "static"]
    data_file: Path | None
    calibration_samples: int
    calibration_length: int | None


class ConvertGroup(TypedDict, total=False):
    """Conversion."""

    to: Literal["auto", "hf", "gguf", "paddle", "meta", "quantized", "model", "peft"]
    dtype: Literal["auto", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"] | torch.dtype
    gguf_type: Literal[
        "auto",
        "f32",
        "f16",
        "bf16",
        "q8_0",
        "q6_k",
        "q5_k_m",
        "q5_k_s",
        "q5_1",
        "q5_0",
        "q4_k_m",
        "q4_k_s",
        "q4_1",
        "q4_0",
        "q5_k",
        "q4_k",
    ]
    max_shard_size: str
    tensor_parallel_degree: int
    pipeline_parallel_degree: int
    base_model: Path | None
    verify: bool | None
    overwrite_output_dir: bool
    cache_dir: Path | None


class ExportGroup(TypedDict, total=False):
    """Export."""

    format: Literal["onnx", "torch", "aoti", "gguf"]
    weights: Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
    dtype: Literal["auto", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"] | torch.dtype
    block_size: int | None
    symmetric: bool | None
    accuracy_level: int
    head_bits: int | None
    context: int | None
    device: str | torch.device
    max_new_tokens: int
    merge_weights: bool
    cache_dir: Path | None


class LoadKeywords(ModelGroup, KVCacheGroup, CompilationGroup, total=False):
    """Of `arriero.load`."""


class GenerateKeywords(GenerationGroup, total=False):
    """Of `arriero.generate`."""


class PreprocessKeywords(PreprocessGroup, total=False):
    """Of `arriero.preprocess`."""


class PretrainKeywords(
    PretrainModelGroup,
    CorpusGroup,
    PretrainOptimizationGroup,
    PrecisionGroup,
    ParallelGroup,
    CheckpointGroup,
    LoggingGroup,
    total=False,
):
    """Of `arriero.pretrain`."""


class FinetuneKeywords(
    ModelGroup,
    DataGroup,
    OptimizationGroup,
    PrecisionGroup,
    AdapterGroup,
    QuantizationGroup,
    PreferenceGroup,
    VocabularyGroup,
    ParallelGroup,
    CheckpointGroup,
    LoggingGroup,
    total=False,
):
    """Of `arriero.finetune`."""


class EvaluateKeywords(ModelGroup, DataGroup, EvaluateGroup, ParallelGroup, CompilationGroup, total=False):
    """Of `arriero.evaluate`."""


class MergeKeywords(ModelGroup, MergeGroup, total=False):
    """Of `arriero.merge`."""


class QuantizeKeywords(ModelGroup, QuantizeGroup, total=False):
    """Of `arriero.quantize`."""


class ConvertKeywords(ConvertGroup, total=False):
    """Of `arriero.convert`."""


class ExportModelKeywords(ExportGroup, total=False):
    """Of `arriero.export_model`."""


class AnswerKeywords(GenerateKeywords, total=False):
    """Of `generate`, `stream` and `chat`."""

    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None
