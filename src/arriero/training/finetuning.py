"""A fine-tuning run from its options: data, model, trainer, final model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arriero.adapters.lora import apply_lora, load_adapter_state, merge_lora
from arriero.adapters.peft_config import from_peft
from arriero.config.data import DataOptions, dataset_parts
from arriero.data.batch import packed_batches
from arriero.data.mixture import Mixture
from arriero.data.mixture import describe as describe_mixture
from arriero.data.order import StepOrder, describe_clusters, prefix_clusters
from arriero.data.pairs import PreferenceSteps
from arriero.data.samples import Sample
from arriero.data.sft import Example, encode_all
from arriero.data.sources import check_data, names_of_splits, rows_by_source, samples_for
from arriero.data.steps import DataShare, FinetuningSteps, digest_of
from arriero.engine.adapter_tokenizer import with_adapters_tokenizer
from arriero.engine.loading import LoadedModel, load
from arriero.errors import ConfigError
from arriero.formats import hf, peft
from arriero.formats.adapter_base import BASE_QUANTIZATION, read_base_quantization, warn_of_other_base
from arriero.formats.quantized import is_quantized
from arriero.formats.side_files import read_side_files
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.quantization.linear import INPUTS_NOT_ROUNDED, rounds_inputs
from arriero.training.agreement import check_same_data
from arriero.training.callbacks.activation_ranges import ActivationRanges
from arriero.training.callbacks.stop_signals import StopSignals
from arriero.training.checkpoint import WeightStore, load_checkpoint
from arriero.training.evaluation import evaluate_loss
from arriero.training.execution import build_execution
from arriero.training.finetune_options import FinetuneOptions
from arriero.training.freezing import freeze
from arriero.training.generation_metrics import evaluate_generation
from arriero.training.methods.build import build_weights
from arriero.training.objectives.cross_entropy import CrossEntropy
from arriero.training.preference_data import PreferenceData, objective_of
from arriero.training.prefix_weights import PrefixWeights
from arriero.training.qat_weights import QatWeights, copy_rounding
from arriero.training.run import (
    Evaluate,
    build_callbacks,
    build_precision,
    build_trainer,
    check_run,
    joined,
    same_weights,
    set_seed,
    share_out,
    train,
)
from arriero.training.run_folder import MERGED, RunFolder
from arriero.training.run_results import final_metrics, save_weights, write_results
from arriero.training.weights import AdapterWeights


def check_supported(options: FinetuneOptions) -> None:
    """Refuse what this version cannot do, before anything is loaded.

    Raises:
        ConfigError: one line, naming the option and the way out.
    """
    metrics: Sequence[str] = CrossEntropy().metrics
    if options.preference.preference:
        metrics = objective_of(options.preference).metrics
    elif options.data.eval_with_do_generation:
        metrics = ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu4")
    check_run(options, metrics)
    if options.quantization.qat and not (options.optimization.do_train or options.checkpoint.resume_from_checkpoint):
        raise ConfigError(
            "--qat without --do_train scores a run that was trained with it: name it with --resume_from_checkpoint, or use "
            "`arriero evaluate`"
        )
    if not options.preference.preference:
        check_data(options.data.dataset_path, options.data.data_name, options.data.task_name)


def may_share_prefixes(loaded: LoadedModel, processes: Processes) -> bool:
    """Whether rows that begin alike can hold their beginning once: not where RoPE depends on a row's length, which gives its
    beginning other angles than a longer row's; nor where several processes cut each sequence."""
    return not loaded.model.model.rotary.is_dynamic and processes.layout.cp == 1


def build_steps(
    train: Sequence[Example],
    options: FinetuneOptions,
    loaded: LoadedModel,
    processes: Processes,
    rows_of_parts: Sequence[int] = (),
    content: str = "",
) -> FinetuningSteps:
    """The rows of every step.

    Args:
        content: see `FinetuningSteps`.
        rows_of_parts: of the data sets that follow each other in `train`, where there are several.

    Raises:
        ConfigError: padded rows, where RoPE depends on a row's length.
        DataError: a row longer than a micro-batch may be, or a share of the mixture below one row.
    """
    optim, data = options.optimization, options.data
    if not data.packing and loaded.model.model.rotary.is_dynamic:
        raise ConfigError(
            "--packing no does not go with this model: its RoPE depends on the length of a row, padding too"
        )
    noisy = optim.neftune_noise_alpha > 0
    share = data.packing and data.share_prefixes and may_share_prefixes(loaded, processes) and not noisy
    if data.packing and data.share_prefixes and noisy:
        print("--share_prefixes is off: with --neftune_noise_alpha every row has noise of its own")
    elif data.packing and data.share_prefixes and processes.layout.cp > 1:
        print("--share_prefixes is off: it does not go with --context_parallel_degree, which cuts the rows")
    micro_batch = optim.per_device_train_batch_size
    mixture = build_mixture(data, rows_of_parts)
    by_length = data.group_by_length and not data.packing
    # what a mixture draws and what goes by tokens are single rows
    single = mixture is not None or by_length or data.max_tokens_per_batch is not None
    clusters = prefix_clusters(train, micro_batch) if share and not single else None
    if clusters and (told := describe_clusters(clusters)):
        print(told)
    own = DataShare(processes.data_rank, processes.layout.data)
    order = StepOrder(
        len(train),
        micro_batch,
        optim.gradient_accumulation_steps,
        optim.seed,
        clusters=clusters,
        processes=own.size,
        mixture=mixture,
        lengths=[example.length for example in train],
        group_by_length=by_length,
        max_tokens=data.max_tokens_per_batch,
    )
    return FinetuningSteps(train, order, share_prefixes=share, share=own, padded=not data.packing, content=content)


def encode_rows(
    samples: Sequence[Sample],
    loaded: LoadedModel,
    data: DataOptions,
    name: str,
    *,
    hint: bool = False,
    progress_bar: bool = False,
) -> list[Example]:
    """The rows of a run or a scoring as token ids; a line under `name` tells what was cut.

    Args:
        hint: say too where rows are bare text and the model has a chat template.
        progress_bar: show one on a terminal.

    Raises:
        DataError: one cannot be encoded.
    """
    quiet = None if progress_bar else True  # None: where there is no terminal
    with tqdm(samples, unit="row", desc="encode", leave=False, delay=1.0, disable=quiet) as rows:
        examples, report = encode_all(rows, loaded.tokenizer, data.lengths, train_on=data.train_on)
    print(f"{name}: {report}")
    cut = report.truncated_context or report.truncated_target
    lengths = data.lengths
    if cut and lengths.row < lengths.longest_prompt + lengths.longest_answer:
        print(
            f"--max_seq_length {lengths.row} holds prompt and answer together; where both are too long {lengths.prompt} tokens "
            f"are of the prompt and {lengths.answer} of the answer: --tgt_length moves the border"
        )
    if hint and report.bare and loaded.tokenizer.has_chat_template():
        print(report.hint)
    return examples


def check_context(model: LlamaForCausalLM, examples: Iterable[Example], name: str) -> None:
    """
    Args:
        model: with its prefix, if it has one.
        name: of the rows, for the message.

    Raises:
        ConfigError: a row is longer than the model's context, and RoPE does not stretch with the length.
    """
    longest = max((example.length for example in examples), default=0)
    context = model.config.max_position_embeddings - model.model.prefix_length
    if longest > context and not model.model.rotary.is_dynamic:
        raise ConfigError(
            f"{name}: the longest row has {longest:,} tokens, above the model's context of {context:,} "
            f"(max_position_embeddings): lower --src_length and --tgt_length, to {context:,} together"
        )


def check_trained_base(loaded: LoadedModel, options: FinetuneOptions, processes: Processes) -> None:
    """Warn where an adapter that is trained on names another base, and refuse it where its base was rounded otherwise.

    Raises:
        ConfigError: naming the option.
        FormatError: a file of the adapter is broken.
    """
    path = options.adapter.lora_path or options.adapter.prefix_path
    if path is None:
        return
    if processes.first:
        warn_of_other_base(Path(path), options.model.model_name_or_path, loaded.folder)
    kind = read_base_quantization(Path(path))
    if kind not in (None, options.quantization.quantize_base) and not is_quantized(loaded.model.config):
        raise ConfigError(
            f"{path} was trained on a base rounded to {kind} ({BASE_QUANTIZATION}): add --quantize_base {kind}, or delete that "
            "file to go on without"
        )


def build_mixture(data: DataOptions, rows_of_parts: Sequence[int]) -> Mixture | None:
    """What draws an epoch's rows from several data sets; None where every row is visited once."""
    parts = dataset_parts(data.dataset_path, data.dataset_weights) if data.dataset_path else []
    if len(parts) < 2:
        return None
    weights = [part.weight for part in parts if part.weight is not None]
    mixture = Mixture(tuple(rows_of_parts), tuple(weights)) if weights else None
    print(f"mixture:\n{describe_mixture([part.path for part in parts], rows_of_parts, mixture)}")
    return mixture


def build_evaluation(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    examples: Sequence[Example],
    options: FinetuneOptions,
    processes: Processes,
) -> Evaluate:
    """What `--do_eval` computes."""
    size = options.optimization.per_device_eval_batch_size
    if options.data.eval_with_do_generation:
        return partial(evaluate_generation, loaded, samples, options.data, size)
    execution = build_execution(loaded.model, build_precision(options.precision, loaded.device), loaded.device)
    share = may_share_prefixes(loaded, processes)
    return lambda: evaluate_loss(execution, packed_batches(examples, size, share_prefixes=share))


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Train, evaluate and write the final model into the run folder.

    Returns:
        What is written to `all_results.json`.

    Raises:
        RunStopped: if a signal ended the training early.
    """
    check_supported(options)
    with joined(options) as processes, RunFolder(options.checkpoint, processes) as folder, StopSignals() as signals:
        folder.check_inputs(options.model.model_name_or_path, options.adapter.lora_path, options.adapter.prefix_path)
        return _finetune(options, folder, signals, processes)


def _finetune(
    options: FinetuneOptions, folder: RunFolder, signals: StopSignals, processes: Processes
) -> dict[str, Any]:
    optim, data = options.optimization, options.data
    wanted = [split for split, do in (("train", optim.do_train), ("dev", optim.do_eval)) if do]
    preferred: PreferenceData | None = None
    samples: dict[str, list[Sample]] = {}
    with processes.together():
        names = names_of_splits(data.dataset_path, data.data_name, wanted, data.val_size)
        if options.preference.preference:
            preferred = PreferenceData.read(options, wanted)
        else:
            samples = samples_for(data, wanted)
        loaded = load(
            options.model,
            dtype=options.precision.weight_dtype,
            processes=processes,
            quantize_base=options.quantization.quantize_base,
            vocabulary=options.vocabulary,
        )
        set_seed(optim.seed)
        first = next(iter(samples), "")
        examples = {
            split: encode_rows(
                rows,
                loaded,
                data,
                names[split],
                hint=split == first,
                progress_bar=processes.first and not options.logging.disable_tqdm,
            )
            for split, rows in samples.items()
        }
        if preferred is not None:
            preferred.encode(loaded.tokenizer, names)
        check_trained_base(loaded, options, processes)
        weights, values = build_weights(loaded, options)
        for split, encoded in (examples if preferred is None else preferred.rows()).items():
            check_context(loaded.model, encoded, names[split])
        if optim.freeze:
            print(f"frozen by --freeze: {freeze(loaded.model, optim.freeze):,} parameters")
        trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    digests = {split: digest_of(rows) for split, rows in examples.items()}
    if not processes.alone:
        known_by = {split: f"{len(examples[split])} rows, SHA-256 {digest[:12]}" for split, digest in digests.items()}
        check_same_data(processes, known_by if preferred is None else preferred.fingerprints())
    same_weights(loaded, options, processes)
    share_out(loaded, options, processes, values, data.sequence_length)
    evaluate = None
    if preferred is not None:
        preferred.score_reference(loaded, processes, folder.resume)
        evaluate = preferred.evaluation(loaded) if optim.do_eval else None
    elif "dev" in examples:
        evaluate = build_evaluation(loaded, samples["dev"], examples["dev"], options, processes)
    results: dict[str, Any] = {}
    trainer = None
    if optim.do_train:
        steps: FinetuningSteps | PreferenceSteps
        if preferred is None:
            parts = rows_by_source(samples["train"])
            steps = build_steps(examples["train"], options, loaded, processes, parts, digests["train"][:16])
        else:
            steps = preferred.steps(loaded, processes)
        trainer = build_trainer(
            options,
            loaded.model,
            steps,
            weights,
            folder.path,
            loaded.device,
            [
                # first, so that evaluation and checkpoints see the ranges of their step
                *([ActivationRanges(weights.settings)] if isinstance(weights, QatWeights) else []),
                *(preferred.callbacks() if preferred is not None else []),
                *build_callbacks(options, folder.path, evaluate, loaded.model, loaded.tokenizer, signals, processes),
            ],
            processes,
            objective=preferred.objective if preferred is not None else None,
            base=loaded.folder if options.adapter.lora or options.adapter.prefix_tuning else None,
            quantize_base=options.quantization.quantize_base,
        )
        results |= train(trainer, options, folder, signals) | {"trained_parameters": trained}
    elif folder.resume:
        load_checkpoint(folder.resume, weights, processes=processes)
    if not processes.any(signals.received is not None):  # it may have reached some of them only
        results |= final_metrics(trainer, options, evaluate, loaded.model, folder.resume or loaded.folder, processes)
    if optim.do_train:
        save_final(loaded, weights, options, folder.path, processes)
    write_results(folder.path, results, processes, trained=optim.do_train)
    kind = "adapter" if options.adapter.lora else "prefix" if options.adapter.prefix_tuning else "model"
    print(f"{kind} and log: {folder.path}")
    if isinstance(weights, QatWeights) and optim.do_train:
        print(f"its weights are exact: arriero convert {folder.path} OUTPUT --to quantized rounds and packs them")
    return results


def save_final(
    loaded: LoadedModel, weights: WeightStore, options: FinetuneOptions, folder: Path, processes: Processes
) -> None:
    """The final weights, and with --merge_weights the merged model in `merged/`."""
    save_weights(weights, folder, processes, sharded=options.checkpoint.save_sharded_model)
    stored = weights.exact if isinstance(weights, QatWeights) else weights
    if not isinstance(stored, AdapterWeights | PrefixWeights):
        return
    with processes.together():
        if processes.first:
            loaded.tokenizer.save(folder)
            if options.adapter.merge_weights and isinstance(stored, AdapterWeights):
                in_place = processes.alone and stored is weights
                model = loaded.model if in_place else _whole_model(loaded, folder)
                if rounds_inputs(model):
                    print(INPUTS_NOT_ROUNDED)
                merge_lora(model)
                files = with_adapters_tokenizer(read_side_files(loaded.folder), folder, model.config.vocab_size)
                hf.save_model(model, model.config, folder / MERGED, extra_files=files)
                stored_dtype = model.model.embed_tokens.weight.dtype
                for note in copy_rounding(folder, folder / MERGED, stored_dtype):
                    print(note)
                print(f"merged model: {folder / MERGED}")


def _whole_model(loaded: LoadedModel, adapter: Path) -> LlamaForCausalLM:
    """The base and the adapter just written, in one process."""
    model = hf.load_model(loaded.folder, scheme=loaded.scheme)
    config, state = peft.load_adapter(adapter)
    apply_lora(model, from_peft(config), fresh=False)
    load_adapter_state(model, state)
    return model
