"""The other side of a comparison: the transformers Trainer on padded rows, in the rows' own order, every step timed."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from sides import Clock
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

PAD_ID = 2
Row = dict[str, list[int]]


class StepClock(Clock, TrainerCallback):
    """For transformers' Trainer."""


def collate(batch: list[Row]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest of them; their labels are `hf_labels`, which transformers shifts itself."""
    longest = max(len(row["input_ids"]) for row in batch)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in batch])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in batch])
    return {"input_ids": pad("input_ids", PAD_ID), "labels": pad("hf_labels", -100), "attention_mask": mask}


def with_lora(network: Any, rank: int = 8, alpha: int = 16) -> Any:
    """The model with PEFT's adapter on all matrices of its layers."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(network, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"))


def train(
    network: Any,
    rows: list[Row],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    accumulation: int = 1,
    recompute: bool = False,
    compile_model: bool = False,
) -> StepClock:
    """So many steps of a model, in fp32 on the CPU, at a constant learning rate."""

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(rows)

    clock = StepClock()
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=batch, max_steps=steps, use_cpu=True,
            gradient_accumulation_steps=accumulation, learning_rate=learning_rate, lr_scheduler_type="constant",
            logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, optim="adamw_torch_fused",
            gradient_checkpointing=recompute, torch_compile=compile_model,
        )  # fmt: skip
        InOrder(model=network, args=settings, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()
    return clock
