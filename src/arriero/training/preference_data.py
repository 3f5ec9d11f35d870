"""The data of a preference run: its pairs, and how probable their answers are to the model as it is before the first step.

The reference model of DPO and IPO is that model: the start weights, or with LoRA the model with its fresh (or loaded)
adapter. A fresh prefix is left out: unlike a fresh adapter it changes what the model says. The reference is never held beside
the trained model: its log-probabilities are computed once and kept in the run folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arriero.adapters.prefix import without_prefix
from arriero.config.preference import PreferenceOptions
from arriero.data.batch import LazyBatches
from arriero.data.order import StepOrder
from arriero.data.pairs import Pair, PreferenceSteps, encode_pairs, fingerprint, load_pairs, pair_batches
from arriero.data.rows.preferences import PairSample
from arriero.data.sft import Example
from arriero.data.steps import DataShare, share_out
from arriero.data.tokenizer import Tokenizer
from arriero.engine.loading import LoadedModel
from arriero.errors import FormatError, TrainingError
from arriero.formats.peft import ADAPTER_CONFIG
from arriero.formats.safe_tensors import weight_files
from arriero.parallel.processes import Processes
from arriero.parallel.sharding import sharded_modules
from arriero.training.evaluation import evaluate_loss
from arriero.training.execution import Execution, MicroBatch, build_execution
from arriero.training.finetune_options import FinetuneOptions
from arriero.training.objectives.preference import NEEDS_REFERENCE, Preference, pair_log_probabilities
from arriero.training.run import build_precision
from arriero.training.trainer import Callback, Trainer

REFERENCE_FILE = "reference_logps.safetensors"
SAMPLE_BYTES = 1 << 20  # of each end of a weight file, to know it again by


def objective_of(options: PreferenceOptions) -> Preference:
    assert options.preference is not None
    return Preference(
        options.preference, options.beta, options.dpo_label_smoothing, options.simpo_gamma, options.orpo_lambda
    )


@dataclass
class PreferenceData:
    """The pairs of every split, and the reference's log-probabilities of their answers.

    Attributes:
        samples: by split, "train" or "dev".
        pairs: the same encoded.
        reference: by split, (pairs, 2) fp32; empty where the objective needs none.
        known_by: the model's and each split's fingerprint.
    """

    options: FinetuneOptions
    samples: dict[str, list[PairSample]]
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    reference: dict[str, Tensor] = field(default_factory=dict)
    known_by: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, options: FinetuneOptions, splits: Sequence[str]) -> PreferenceData:
        """The rows of the files, checked.

        Raises:
            DataError: naming file and line of a row that cannot be used.
        """
        data = options.data
        assert data.dataset_path is not None
        limits = {"train": data.max_train_samples, "dev": data.max_eval_samples}
        return cls(options, load_pairs(data.dataset_path, splits, limits, data.val_size))

    @property
    def objective(self) -> Preference:
        return objective_of(self.options.preference)

    def encode(self, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        """Make token ids of the rows, and tell what was cut, of each split under its name."""
        data = self.options.data
        for split, samples in self.samples.items():
            self.pairs[split], report = encode_pairs(samples, tokenizer, data.lengths)
            print(f"{names[split]}: {report}")

    def rows(self) -> dict[str, list[Example]]:
        """The answers of each split after their prompts."""
        return {split: [row for pair in pairs for row in pair.rows] for split, pairs in self.pairs.items()}

    def fingerprints(self) -> dict[str, str]:
        """What each split is known by."""
        return {split: f"{len(pairs)} pairs, SHA-256 {fingerprint(pairs)[:16]}" for split, pairs in self.pairs.items()}

    def score_reference(self, loaded: LoadedModel, processes: Processes, resume: Path | None) -> None:
        """Find the reference's log-probabilities, if the objective needs them: before the first step, or a resume.

        Args:
            resume: the checkpoint that the run goes on from; what its run kept is taken where it is of the same pairs.

        Raises:
            TrainingError: if that run began with another model.
        """
        if self.objective.kind not in NEEDS_REFERENCE:
            return
        adapter = self.options.adapter.lora_path or self.options.adapter.prefix_path
        model = processes.by_first(lambda: model_fingerprint(loaded.folder, adapter))
        self.known_by = {"model": model, **self.fingerprints()}
        if resume is not None:
            self.reference = stored_reference(resume.parent / REFERENCE_FILE, self.known_by, self._sizes(), processes)
        execution = build_execution(loaded.model, build_precision(self.options.precision, loaded.device), loaded.device)
        size = self.options.optimization.per_device_eval_batch_size
        for split, pairs in self.pairs.items():
            if split in self.reference:
                continue
            began = time.monotonic()
            batches = pair_batches(pairs, size, share_prefixes=self._shares(loaded))
            fresh = self.options.adapter.prefix_tuning and not self.options.adapter.prefix_path
            with without_prefix(execution.layers.stages) if fresh else contextlib.nullcontext():
                self.reference[split] = reference_log_probabilities(execution, batches, len(pairs), size)
            print(f"{split}: {len(pairs):,} pairs scored by the reference in {time.monotonic() - began:.1f} s")

    def _sizes(self) -> dict[str, int]:
        return {split: len(pairs) for split, pairs in self.pairs.items()}

    def _shares(self, loaded: LoadedModel) -> bool:
        return self.options.data.share_prefixes and not loaded.model.model.rotary.is_dynamic

    def steps(self, loaded: LoadedModel, processes: Processes) -> PreferenceSteps:
        """The pairs of every step."""
        optim, share = self.options.optimization, DataShare(processes.data_rank, processes.layout.data)
        order = StepOrder(
            len(self.pairs["train"]),
            optim.per_device_train_batch_size,
            optim.gradient_accumulation_steps,
            optim.seed,
            processes=share.size,
        )
        return PreferenceSteps(
            self.pairs["train"], order, self.reference.get("train"), share_prefixes=self._shares(loaded), share=share
        )

    def evaluation(self, loaded: LoadedModel) -> Callable[[], dict[str, float]]:
        """What `--do_eval` computes."""
        precision = build_precision(self.options.precision, loaded.device)
        execution = build_execution(loaded.model, precision, loaded.device, self.objective)
        size = self.options.optimization.per_device_eval_batch_size
        batches = pair_batches(self.pairs["dev"], size, self.reference.get("dev"), share_prefixes=self._shares(loaded))
        return partial(evaluate_loss, execution, batches)

    def callbacks(self) -> list[Callback]:
        """What keeps the reference in the run folder."""
        return [KeptReference(self.reference, self.known_by)] if self.reference else []


def reference_log_probabilities(execution: Execution, batches: LazyBatches, pairs: int, size: int) -> Tensor:
    """(pairs, 2) fp32 in every process: log-probabilities of the chosen and the rejected answer of each pair.

    Args:
        batches: of `size` pairs in order, the same in every process, which takes its share of them.
        pairs: of all batches.
    """
    layers = execution.layers
    processes = layers.parallel.processes if layers.parallel is not None else Processes()
    share = DataShare(processes.data_rank, processes.layout.data)

    def compute(hidden: Tensor, micro: MicroBatch) -> list[float]:
        hidden, weight, part = layers.at_head(hidden)
        if micro.pairs is None:  # of padding: only the messages between processes are needed
            return []
        found: list[float] = pair_log_probabilities(hidden, weight, micro.labels, micro.pairs, part).flatten().tolist()
        return found

    was_training = layers.model.training
    layers.model.eval()
    own: list[list[float]] = []
    given = share_out(batches, share)
    while group := list(islice(given, execution.batches_at_once)):
        own += execution.each(group, compute)
    layers.model.train(was_training)
    for stage in layers.stages:  # what is left whole after a forward pass would be taken for the parameters to train
        for module in sharded_modules(stage):
            module.reshard()
    values = [0.0] * (2 * pairs)
    if layers.counts:
        for number, found in zip(share.of(len(batches)), own, strict=False):
            start = 2 * number * size
            values[start : start + len(found)] = found
    return torch.tensor(processes.sum(values), dtype=torch.float32).view(-1, 2)


@dataclass
class KeptReference(Callback):
    """Writes the reference's log-probabilities into the run folder when the run begins."""

    reference: dict[str, Tensor]
    known_by: dict[str, str]

    def on_train_begin(self, trainer: Trainer) -> None:
        path = trainer.run_folder / REFERENCE_FILE
        with trainer.processes.together():
            if trainer.processes.first:
                try:
                    save_file(self.reference, path, metadata=self.known_by)
                except (OSError, SafetensorError) as error:
                    raise TrainingError(f"{path}: cannot be written ({' '.join(str(error).split())[:200]})") from error


def stored_reference(
    path: Path, known_by: dict[str, str], sizes: dict[str, int], processes: Processes
) -> dict[str, Tensor]:
    """What a run kept, of the splits whose pairs are the same; empty where it kept nothing.

    Args:
        known_by: fingerprints of the model and of each split.
        sizes: pairs of each split.

    Raises:
        TrainingError: if it is of another model.
        FormatError: if the file is damaged.
    """
    found: dict[str, Tensor] = {}

    def read() -> list[str]:
        if not path.is_file():
            return []
        try:
            with safe_open(path, "pt") as file:
                kept = file.metadata() or {}
                if kept.get("model") != known_by["model"]:
                    raise TrainingError(
                        f"{path} is of another model than --model_name_or_path (or --lora_path) names: a preference run goes "
                        "on with the reference it began with, so give that model"
                    )
                for split, size in sizes.items():
                    if kept.get(split) == known_by[split]:
                        tensor = file.get_tensor(split)
                        if tensor.shape != (size, 2) or tensor.dtype != torch.float32:
                            raise FormatError(f"{path}: {split} is not (pairs, 2) in float32: delete the file")
                        found[split] = tensor
        except (OSError, SafetensorError) as error:
            raise FormatError(
                f"{path}: cannot be read ({' '.join(str(error).split())[:200]}): delete the file"
            ) from error
        return list(found)

    for split in processes.by_first(read):
        values = found[split].flatten().tolist() if processes.first else [0.0] * (2 * sizes[split])
        found[split] = torch.tensor(processes.sum(values), dtype=torch.float32).view(-1, 2)
    return found


def model_fingerprint(folder: Path, adapter: str | None) -> str:
    """SHA-256 of the sizes, beginnings and ends of a model's weight files, and of an adapter's."""
    digest = hashlib.sha256()
    files = [*sorted(weight_files(folder)), folder / "config.json"]
    if adapter is not None:
        files += [Path(adapter) / ADAPTER_CONFIG, *sorted(Path(adapter).glob("*.safetensors"))]
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{size}\n".encode())
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
