"""The option groups: defaults, impossible combinations, options without effect."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from arriero.commands.table import VERBS, load_verb
from arriero.config import elsewhere
from arriero.config.adapter import AdapterOptions, AdapterPathOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.compatibility import check
from arriero.config.converting import ConvertOptions
from arriero.config.data import DataOptions
from arriero.config.evaluation import EvaluateOptions
from arriero.config.export import ExportOptions
from arriero.config.files import effective, write_config
from arriero.config.generation import GenerationOptions, PredictOptions
from arriero.config.logging import LoggingOptions
from arriero.config.merging import MergeOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.option import option_table, specs_of
from arriero.config.parallel import ParallelOptions
from arriero.config.parser import parse
from arriero.config.planning import PlanOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.preference import PreferenceOptions
from arriero.config.pretraining import CorpusOptions, PretrainOptimizationOptions
from arriero.config.quantization import QuantizationOptions
from arriero.config.rules.groups import find
from arriero.config.serving import ServeOptions
from arriero.errors import ConfigError

TRAINING = (
    ModelOptions,
    DataOptions,
    OptimizationOptions,
    PrecisionOptions,
    AdapterOptions,
    QuantizationOptions,
    ParallelOptions,
    CheckpointOptions,
    LoggingOptions,
)


def settle(argv: str, groups: tuple[type, ...] = TRAINING) -> dict[str, Any]:
    words = argv.split()
    if CheckpointOptions in groups:
        words += ["--output_dir", "run"]
    if ModelOptions in groups and "--model_name_or_path" not in words:
        words += ["--model_name_or_path", "m"]
    return effective(parse(groups, words, "arriero test"))


# Each: the command line, and what its one line must name (both options, or the option and its value).
IMPOSSIBLE = [
    ("--fp16 --bf16", ("--fp16", "--bf16")),
    ("--dtype bfloat16 --fp16", ("--dtype", "--fp16")),
    ("--learning_rate nan", ("--learning_rate", "finite")),
    ("--learning_rate -1", ("--learning_rate", "at least 0")),
    ("--adam_beta1 1", ("--adam_beta1", "less than 1")),
    ("--adam_beta2 -0.1", ("--adam_beta2", "at least 0")),
    ("--adam_epsilon 0", ("--adam_epsilon", "more than 0")),
    ("--max_steps 0", ("--max_steps", "--num_train_epochs")),
    ("--num_train_epochs 0", ("--num_train_epochs",)),
    ("--warmup_ratio 1.5", ("--warmup_ratio", "at most 1")),
    ("--warmup_steps 20 --max_steps 10", ("--warmup_steps", "--max_steps")),
    ("--warmup_steps 20 --decay_steps 10", ("--warmup_steps", "--decay_steps")),
    ("--learning_rate 1e-5 --min_learning_rate 1e-4", ("--min_learning_rate", "--learning_rate")),
    ("--label_smoothing 1", ("--label_smoothing",)),
    ("--per_device_train_batch_size 0", ("--per_device_train_batch_size",)),
    ("--do_train no", ("--do_train", "--do_eval")),
    ("--data_name squad", ("--data_name", "--task_name")),
    ("--data_name a --task_name squad --dataset_path b", ("--data_name", "--dataset_path")),
    ("--max_seq_length 100 --tgt_length 200", ("--max_seq_length", "--tgt_length")),
    ("--lora --prefix_tuning", ("--lora", "--prefix_tuning")),
    ("--lora_path a --prefix_path b", ("--lora_path", "--prefix_path")),
    ("--lora_path l1,l3", ("--lora_path l1,l3: one adapter here; `arriero merge --lora_path l1,l3 ...` joins them",)),
    ("--prefix_tuning --lora_path a", ("--prefix_tuning", "--lora_path")),
    ("--lora --lora_rank 0", ("--lora_rank",)),
    ("--lora_rank 4", ("--lora_rank is for --lora: add it, or leave --lora_rank out",)),
    ("--lora_rank 8", ("--lora_rank is for --lora",)),
    ("--merge_weights", ("--merge_weights is for --lora",)),
    ("--num_prefix_tokens 5", ("--num_prefix_tokens is for --prefix_tuning: add it",)),
    ("--lora --lora_dropout 1", ("--lora_dropout",)),
    ("--lora --lora_target_modules=", ("--lora_target_modules",)),
    ("--qat --prefix_tuning", ("--qat", "--prefix_tuning")),
    ("--qat --lora --lora_dropout 0.1", ("--qat", "--lora_dropout")),
    ("--qat --bf16 --fp8", ("--qat", "--fp8")),
    ("--lora --quantize_base nf4 --bf16 --fp8", ("--quantize_base", "--fp8")),
    ("--load_best_model_at_end --evaluation_strategy epoch", ("--load_best_model_at_end", "--save_strategy")),
    ("--load_best_model_at_end --save_strategy no", ("--load_best_model_at_end", "--save_strategy")),
    ("--load_best_model_at_end --eval_steps 3 --save_steps 10", ("--save_steps", "--eval_steps")),
    ("--resume_from_checkpoint auto --overwrite_output_dir", ("--resume_from_checkpoint", "--overwrite_output_dir")),
    ("--sharding offload", ("--sharding", "stage")),
    ("--sharding stage1,stage2", ("stage1", "stage2")),
    ("--virtual_pp_degree 2", ("--virtual_pp_degree", "--pipeline_parallel_degree")),
    ("--tensor_parallel_degree 0", ("--tensor_parallel_degree",)),
    ("--pipeline_parallel_config enable_magic", ("--pipeline_parallel_config",)),
    ("--report_to none,tensorboard", ("--report_to", "none", "tensorboard")),
    ("--device tpu", ("--device", "tpu")),
]


@pytest.mark.parametrize(("argv", "named"), IMPOSSIBLE, ids=[argv for argv, _ in IMPOSSIBLE])
def test_an_impossible_combination_is_one_line_that_names_it(argv: str, named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        settle(argv)
    message = str(error.value)
    assert "\n" not in message
    for name in named:
        assert name in message


IDLE = [
    ("--lora no --lora_rank 4", "--lora_rank has no effect without --lora"),
    ("--fp16_opt_level O2", "--fp16_opt_level has no effect without --fp16 or --bf16"),
    ("--fp8", "--fp8 has no effect without --bf16"),
    ("--fp16 --fp8", "--fp8 has no effect without --bf16"),
    ("--bf16 --scale_loss 8", "--scale_loss has no effect without --fp16"),
    ("--recompute_granularity core_attn", "--recompute_granularity has no effect without --recompute"),
    ("--qat_type W4", "--qat_type has no effect without --qat"),
    ("--prefix_tuning no --num_prefix_tokens 5", "--num_prefix_tokens has no effect without --prefix_tuning"),
    ("--max_steps 5 --num_train_epochs 2", "--num_train_epochs has no effect with --max_steps 5"),
    ("--warmup_steps 5 --warmup_ratio 0.1", "--warmup_ratio has no effect with --warmup_steps 5"),
    ("--lr_scheduler_type constant --warmup_steps 5", "--warmup_steps has no effect with --lr_scheduler_type constant"),
    ("--save_strategy epoch --save_steps 7", "--save_steps has no effect with --save_strategy epoch"),
    ("--eval_steps 7", "--eval_steps has no effect with --evaluation_strategy no"),
    ("--metric_for_best_model accuracy", "--metric_for_best_model has no effect without --load_best_model_at_end"),
    ("--sharding_parallel_degree 2", "--sharding_parallel_degree has no effect without --sharding"),
    ("--save_strategy no --save_total_limit 2", "--save_total_limit has no effect with --save_strategy no"),
    ("--save_strategy no --async_save", "--async_save has no effect with --save_strategy no"),
    ("--eval_with_do_generation", "--eval_with_do_generation has no effect without --do_eval"),
    ("--max_eval_samples 3", "--max_eval_samples has no effect without --do_eval"),
    ("--per_device_eval_batch_size 2", "--per_device_eval_batch_size has no effect without --do_eval"),
    ("--report_to none --logging_dir logs", "--logging_dir has no effect with --report_to none"),
    ("--report_to wandb --logging_dir logs", "--logging_dir has no effect with --report_to wandb"),
    ("--report_to none --run_name first", "--run_name has no effect with --report_to none"),
]


@pytest.mark.parametrize(("argv", "warning"), IDLE, ids=[argv for argv, _ in IDLE])
def test_an_option_without_effect_is_told(argv: str, warning: str, capsys: pytest.CaptureFixture[str]) -> None:
    settle(argv)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert warning in lines[0]


def test_a_plain_command_warns_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settle("--lora --lora_rank 4 --bf16 --fp16_opt_level O2 --do_eval --eval_steps 5 --max_steps 10 --warmup_steps 2")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "more"),
    [
        ("--do_eval --max_eval_samples 3 --eval_with_do_generation --per_device_eval_batch_size 2", ()),
        ("--load_best_model_at_end --max_eval_samples 3", ()),  # which evaluates
        ("--evaluation_strategy epoch --max_eval_samples 3", ()),
        ("--save_total_limit 2 --async_save", ()),
        ("--logging_dir logs --run_name first", ()),
        ("--report_to trackio --run_name first", ()),
        ("--preference dpo --dataset_path d --per_device_eval_batch_size 2", (PreferenceOptions,)),  # of the reference
    ],
)
def test_an_option_with_an_effect_is_not_told(
    argv: str, more: tuple[type, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    settle(argv, (*TRAINING, *more))
    assert capsys.readouterr().err == ""


def test_a_test_part_is_scored_in_evaluation_batches() -> None:
    given = frozenset({"per_device_eval_batch_size"})
    optimization = OptimizationOptions(per_device_eval_batch_size=2)

    def told(corpus: CorpusOptions) -> list[str]:
        return check([corpus, optimization, CheckpointOptions(output_dir="run")], given)

    assert told(CorpusOptions(input_dir=["c"], do_predict=True)) == []
    assert told(CorpusOptions(input_dir=["c"])) == ["--per_device_eval_batch_size has no effect without --do_eval"]


@pytest.mark.parametrize(
    ("argv", "strategy", "steps", "do_eval"),
    [
        ("", "no", None, False),
        ("--do_eval", "steps", 500, True),
        ("--do_eval --eval_steps 7", "steps", 7, True),
        ("--do_eval --save_strategy epoch", "epoch", None, True),
        ("--do_eval --save_strategy no", "epoch", None, True),
        ("--do_eval --evaluation_strategy no", "no", None, True),
        ("--evaluation_strategy epoch", "epoch", None, True),
        ("--eval_strategy steps --save_steps 9", "steps", 9, True),
        ("--load_best_model_at_end --save_strategy epoch", "epoch", None, True),
        ("--load_best_model_at_end --eval_steps 5 --save_steps 10", "steps", 5, True),
    ],
)
def test_when_to_evaluate(argv: str, strategy: str, steps: int | None, do_eval: bool) -> None:
    options = settle(argv)
    assert (options["evaluation_strategy"], options["eval_steps"], options["do_eval"]) == (strategy, steps, do_eval)


@pytest.mark.parametrize(
    ("argv", "metric", "greater"),
    [
        ("--load_best_model_at_end", "loss", False),
        ("--load_best_model_at_end --metric_for_best_model accuracy", "accuracy", True),
        ("--load_best_model_at_end --metric_for_best_model eval_loss", "loss", False),
        ("--load_best_model_at_end --metric_for_best_model x --greater_is_better no", "x", False),
    ],
)
def test_what_is_best(argv: str, metric: str, greater: bool) -> None:
    options = settle(argv)
    assert (options["metric_for_best_model"], options["greater_is_better"]) == (metric, greater)


def test_effective_training_options_read_back_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = "--lora --lora_rank 4 --bf16 --do_eval --save_strategy epoch --max_steps 7 --report_to visualdl --dtype fp32"
    for line in (argv, "--do_eval --load_best_model_at_end --evaluation_strategy epoch --save_strategy epoch", ""):
        groups = parse(TRAINING, [*line.split(), "--output_dir", "run", "--model_name_or_path", "m"], "arriero test")
        write_config(tmp_path / "config.yaml", groups)
        assert parse(TRAINING, ["--config", str(tmp_path / "config.yaml")], "arriero test") == groups
    assert capsys.readouterr().err == ""


def test_a_method_that_is_switched_off_takes_its_options_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = parse(TRAINING, ["m", "--lora", "--lora_rank", "4", "--output_dir", "run"], "arriero test")
    write_config(tmp_path / "config.yaml", groups)
    again = ["--config", str(tmp_path / "config.yaml")]
    parse(TRAINING, [*again, "--lora", "no"], "arriero test")
    assert capsys.readouterr().err == ""
    (tmp_path / "idle.yaml").write_text("output_dir: run\nlora_rank: 4\n", encoding="utf-8")
    parse(TRAINING, ["m", "--config", str(tmp_path / "idle.yaml")], "arriero test")
    assert "--lora_rank has no effect without --lora" in capsys.readouterr().err
    parse(TRAINING, ["m", "--merge_weights", "no", "--output_dir", "run"], "arriero test")


def test_an_adapter_brings_its_base_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, base in (("one", "base/model"), ("other", "base/model"), ("third", "another"), ("none", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    one, other, third, none = (str(tmp_path / name) for name in ("one", "other", "third", "none"))
    for groups in ((ModelOptions, AdapterPathOptions), (ExportOptions, AdapterPathOptions)):
        for flag in ("--lora_path", "--prefix_path"):
            model, _ = parse(groups, [flag, one], "arriero test")
            assert model.model_name_or_path == "base/model"
            assert capsys.readouterr().err == (
                f"arriero: warning: no model is given: base/model is taken, which {one} names as its base\n"
            )
    model, _ = parse(
        (ModelOptions, AdapterPathOptions), ["--lora_path", one, "--model_name_or_path", "m"], "arriero test"
    )
    assert model.model_name_or_path == "m"
    model, _, _ = parse(
        (ModelOptions, AdapterPathOptions, MergeOptions),
        ["--lora_path", f"{one},{other}", "--output_path", "x"],
        "arriero merge",
    )
    assert model.model_name_or_path == "base/model"
    with pytest.raises(ConfigError, match="trained on another and base/model: give one by --model_name_or_path"):
        parse((ModelOptions, AdapterPathOptions), ["--lora_path", f"{one},{third}"], "arriero test")
    for path in (none, str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match=r"no adapter_config\.json there names one: add --model_name_or_path"):
            parse((ModelOptions, AdapterPathOptions), ["--lora_path", path], "arriero test")


@pytest.mark.parametrize("verb", ["chat", "predict", "serve", "bench", "quantize --output_path x"])
def test_a_model_has_to_be_named(verb: str) -> None:
    name, *options = verb.split()
    with pytest.raises(
        ConfigError, match=r"no model is given: add --model_name_or_path .*; smollm2-135m-instruct is a small"
    ):
        parse(load_verb(name).options, options, f"arriero {name}")


def test_a_default_model_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of PaddleNLP's scripts, for their own command lines."""
    for verb, options in (
        ("finetune", "--task_name squad --lora True --output_dir x"),
        ("finetune", "--pipeline_parallel_config enable_timer --pipeline_parallel_degree 2 --output_dir x"),
        ("predict", "--merge_tensor_parallel_path whole"),
    ):
        assert (
            parse(load_verb(verb).options, options.split(), f"arriero {verb}")[0].model_name_or_path
            == "facebook/llama-7b"
        )
        assert "no model is given: facebook/llama-7b is taken" in capsys.readouterr().err
    parse(load_verb("pretrain").options, ["--input_dir", "x", "--output_dir", "y"], "arriero pretrain")
    assert "no model is given: __internal_testing__/tiny-random-llama is taken" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no model is given, and checkpoints/, .* name one by --model_path"):
        parse((ExportOptions, AdapterPathOptions), [], "arriero export")
    (tmp_path / "checkpoints").mkdir()
    assert parse((ExportOptions, AdapterPathOptions), [], "arriero export")[0].model_name_or_path == "checkpoints/"


def test_a_model_may_stand_alone() -> None:
    for argv in (["mine"], ["--device", "cpu", "mine"], ["mine", "--device", "cpu"]):
        assert parse((ModelOptions,), argv, "arriero test")[0].model_name_or_path == "mine"
    with pytest.raises(ConfigError, match="unexpected argument 'b': options are given as"):
        parse((ModelOptions,), ["a", "b"], "arriero test")
    with pytest.raises(ConfigError, match="unexpected argument 'a': --model_name_or_path 'b' is given too"):
        parse((ModelOptions,), ["a", "--model_name_or_path", "b"], "arriero test")
    with pytest.raises(ConfigError, match="unexpected argument 'a': --model 'b' is given too"):
        parse((ServeOptions,), ["a", "--model", "b"], "arriero serve")
    with pytest.raises(ConfigError, match="not 'a'; a model is named by --model_name_or_path"):
        parse(load_verb("bench").options, ["a"], "arriero bench")


@pytest.mark.parametrize(
    ("verb", "flag", "said"),
    [
        ("predict", "torch_dtype", "it is called --dtype here"),
        ("chat", "device_map", "it is called --device here"),
        ("predict", "num_beams", "there is no beam search"),
        ("predict", "num_return_sequences", "SamplingParams(n=...)"),
        ("finetune", "data_seed", "it is called --seed here"),
        ("predict", "do_train", "it is an option of arriero finetune and means nothing here"),
        ("predict", "batch_sise", "did you mean --batch_size?"),
        ("finetune", "xyzzy", "see arriero finetune --help"),
        ("predict", "dataset_path", "it is called --data_file here"),
        ("predict", "prompt", "`arriero chat MODEL --prompt TEXT` answers one"),
        ("predict", "attn_implementation", "--use_flash_attention no writes attention out"),
        ("export", "attn_implementation", "the fastest attention kernel of the machine is taken; drop it"),
        ("finetune", "sequence_len", "it is called --max_seq_length here"),
        ("finetune", "cutoff_len", "it is called --max_seq_length here"),
        ("finetune", "use_lora", "it is called --lora here"),
        ("finetune", "lora_target", "it is called --lora_target_modules here"),
        ("finetune", "adapter", "--lora trains a new adapter, --lora_path goes on with a stored one"),
        ("merge", "adapter_name_or_path", "it is called --lora_path here"),
        ("evaluate", "bf16", "--dtype bfloat16"),
        ("finetune", "finetuning_type", "--lora or --prefix_tuning"),
        ("finetune", "quantization_bit", "--quantize_base nf4"),
        ("quantize", "bits", "--quant_type int4 or int8"),
        ("pretrain", "val_set_size", "--split 949,50,1"),
        ("finetune", "pref_loss", "it is called --preference here"),
        ("finetune", "pref_beta", "it is called --dpo_beta here"),
        ("finetune", "template", "the chat template is that of the model's folder"),
        ("finetune", "base_model", "it is called --model_name_or_path here"),
        ("finetune", "micro_batch_size", "it is called --per_device_train_batch_size here"),
        ("finetune", "optimizer", "it is called --optim here"),
        ("finetune", "sample_packing", "it is called --packing here"),
        ("finetune", "deepspeed", "--sharding stage1, stage2 or stage3"),
        ("finetune", "modules_to_save", "--lora_bias"),
        ("finetune", "assistant_only_loss", "--train_on"),
        ("convert", "outtype", "it is called --gguf_type here"),
    ],
)
def test_what_an_unknown_option_is_here(verb: str, flag: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(load_verb(verb).options, [f"--{flag}", "1"], f"arriero {verb}")
    assert str(error.value).startswith(f"unknown option --{flag}: ")
    assert said in str(error.value)


def test_what_is_said_of_a_name_names_options_that_there_are() -> None:
    """In every verb: each name that a hint writes as an option is one of the verb, or stands in a command of another."""
    for verb in VERBS:
        names = set(option_table(load_verb(verb).options))
        for name in {*elsewhere._RENAMED, *elsewhere._OTHERWISE} - names:
            said = elsewhere.hint(name, names, f"arriero {verb}", "--") or ""
            own = re.sub("`[^`]*`", "", said)
            if not said.startswith("it is an option of"):
                assert set(re.findall(r"--(\w+)", own)) <= names, (verb, name, said)
    assert "--" not in (elsewhere.hint("adapter", ["lora"], "arriero.finetune") or "--")


def test_a_file_of_a_run_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it was written by the run, and as it was written by hand."""
    groups = parse(
        load_verb("finetune").options, ["m", "--src_length", "100", "--output_dir", "run"], "arriero finetune"
    )
    write_config(tmp_path / "run.yaml", groups)
    (tmp_path / "own.yaml").write_text("model_name_or_path: m\ntask_name: squad_qa\nsrc_length: 100\ndata_seed: 3\n")
    plan = load_verb("plan").options
    planned = effective(parse(plan, [str(tmp_path / "run.yaml")], "arriero plan"))
    assert (planned["max_seq_length"], planned["per_device_train_batch_size"]) == (356, 8)
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.yaml: ignored, being of training alone: task_name, data_name, " in line
    assert line.endswith(" more")
    with pytest.raises(ConfigError, match="unknown key 'data_seed': it is called seed here"):
        parse(plan, [str(tmp_path / "own.yaml")], "arriero plan")
    with pytest.raises(ConfigError, match="an option of arriero finetune, whose result is named by its folder"):
        parse(load_verb("evaluate").options, [str(tmp_path / "run.yaml")], "arriero evaluate")
    assert effective(parse(plan, ["m"], "arriero plan"))["max_seq_length"] == 2048


def test_a_type_has_the_same_names_everywhere() -> None:
    for word, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("auto", "auto")):
        assert ConvertOptions(model_name_or_path="a", output_dir="b", dtype=word).dtype == name


def test_adapter_defaults() -> None:
    assert settle("--lora --lora_rank 4")["lora_alpha"] == 8.0
    assert settle("")["lora_alpha"] is None
    going_on = settle("--lora_path adapter")
    assert (going_on["lora"], going_on["lora_alpha"]) == (True, None)
    assert settle("--lora --lora_target_modules q_proj v_proj")["lora_target_modules"] == ["q_proj", "v_proj"]
    assert settle("--val_size 0")["val_size"] is settle("--do_train True")["val_size"] is None
    assert len(settle("--lora --lora_target_modules all-linear")["lora_target_modules"]) == 7
    assert settle("--lora --lora_target_modules all-linear v_porj")["lora_target_modules"][7:] == ["v_porj"]


def test_precision_names_the_types() -> None:
    def types(**values: Any) -> tuple[str, str]:
        precision = PrecisionOptions(**values)
        return precision.compute_dtype, precision.weight_dtype

    assert types() == ("float32", "float32")
    assert types(fp16=True) == ("float16", "float32")
    assert types(fp16=True, fp16_opt_level="O2") == ("float16", "float16")
    assert types(bf16=True) == ("bfloat16", "float32")
    assert types(bf16=True, fp16_opt_level="O2") == ("bfloat16", "bfloat16")


def test_options_of_data_loading_are_taken_and_told() -> None:
    both = CorpusOptions(input_dir=["corpus"], share_folder=True, dataloader_num_workers=2)
    given = frozenset({"share_folder", "dataloader_num_workers"})
    optimization = OptimizationOptions(do_train=True)
    assert check([both, optimization], given) == [
        "--dataloader_num_workers has no effect: batches are made in the main process",
        "--share_folder has no effect: a lock in the cache serves shared and separate file systems",
    ]
    assert check([CorpusOptions(input_dir=["corpus"]), optimization], given) == []
    assert check([PlanOptions(), both, optimization], given) == [], "a plan takes the command line that it plans"
    scored = check([DataOptions(dataset_path="rows", dataloader_num_workers=2), EvaluateOptions()], given)
    assert scored == ["--dataloader_num_workers has no effect: batches are made in the main process"]


@pytest.mark.parametrize(
    ("argv", "warning"),
    [
        ("m --sharding stage3", "--sharding has no effect on one device: --num_devices says how many share"),
        ("m --sharding stage3 --num_devices 2", ""),
        ("m --num_tokens 1e9 --max_steps 10", "--max_steps 10 has no effect with --num_tokens"),
        ("m --max_steps 10", ""),
    ],
)
def test_what_a_plan_does_not_count_is_told(argv: str, warning: str, capsys: pytest.CaptureFixture[str]) -> None:
    parse(load_verb("plan").options, argv.split(), "arriero plan")
    told = capsys.readouterr().err
    assert warning in told
    assert bool(warning) == bool(told)


def test_a_plan_tells_that_it_does_not_count_fp8() -> None:
    assert check([PlanOptions(), PrecisionOptions(bf16=True, fp8=True)]) == [
        "--fp8 has no effect on a plan, which counts memory and time of bf16"
    ]
    assert check([PlanOptions(), PrecisionOptions(bf16=True)]) == []
    assert [PrecisionOptions(fp8=True, **half).fp8_products for half in ({}, {"fp16": True}, {"bf16": True})] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ({}, 768),
        ({"src_length": 10, "tgt_length": 5}, 15),
        ({"src_length": 10, "tgt_length": 5, "max_seq_length": 12}, 12),
        ({"src_length": 10, "tgt_length": 5, "max_seq_length": 100}, 15),
    ],
)
def test_sequence_length(values: dict[str, int], length: int) -> None:
    assert DataOptions(**values).sequence_length == length


@pytest.mark.parametrize(
    ("line", "lengths"),
    [
        ("--max_seq_length 2048", (1366, 682, 2048)),
        ("--max_seq_length 768", (512, 256, 768)),
        ("--max_seq_length 600", (400, 200, 600)),
        ("--max_seq_length 200", (134, 66, 200)),
        ("--max_seq_length 600 --tgt_length 256", (344, 256, 600)),
        ("--max_seq_length 600 --src_length 512 --tgt_length 256", (344, 256, 600)),
        ("--max_seq_length 2048 --tgt_length 1500", (548, 1500, 2048)),
        ("--max_seq_length 2048 --src_length 300", (300, 1748, 2048)),
        ("--max_seq_length 2048 --src_length 300 --tgt_length 200", (300, 200, 500)),
    ],
)
def test_the_room_of_a_row(
    line: str, lengths: tuple[int, int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("finetune", "evaluate"):
        arguments = ["--model_name_or_path", "m", *line.split(), "--output_dir", "run"]
        groups = parse(load_verb(verb).options, arguments, f"arriero {verb}")
        data = next(group for group in groups if isinstance(group, DataOptions))
        assert (data.lengths.prompt, data.lengths.answer, data.sequence_length) == lengths
        told = capsys.readouterr().err
        assert ("--max_seq_length 2048 has no effect above --src_length 300 + --tgt_length 200" in told) is (
            lengths[2] == 500
        )
        write_config(tmp_path / "run.yaml", groups)
        again = parse(load_verb(verb).options, ["--config", str(tmp_path / "run.yaml")], f"arriero {verb}")
        assert effective(again) == effective(groups)
        capsys.readouterr()
    if "_length 300" in line or "1500" in line:
        planned = parse(load_verb("plan").options, ["m", *line.split()], "arriero plan")
        assert effective(planned)["max_seq_length"] == lengths[2]
        capsys.readouterr()


@pytest.mark.parametrize(
    ("word", "name"),
    [("auto", "auto"), ("cpu", "cpu"), ("gpu", "cuda"), ("CUDA", "cuda"), ("cuda:1", "cuda:1"), ("gpu:0", "cuda:0")],
)
def test_device_names(word: str, name: str) -> None:
    assert ModelOptions(device=word).device == name


@pytest.mark.parametrize("word", ["", "cpu:0", "cuda:", "cuda:x", "tpu", "auto:1"])
def test_device_names_that_are_none(word: str) -> None:
    with pytest.raises(ConfigError, match="--device"):
        ModelOptions(device=word)


@pytest.mark.parametrize(
    ("argv", "sample"),
    [
        ("", False),
        ("--temperature 0.7", True),
        ("--temperature 1", True),
        ("--temperature 0", False),
        ("--temperature 0 --top_p 0.9", False),
        ("--seed 3", False),
        ("--top_k 1", False),
        ("--top_k 5", True),
        ("--top_p 0.9", True),
        ("--min_p 0.1", True),
        ("--do_sample", True),
        ("--do_sample no", False),
    ],
)
def test_sampling_follows_from_its_options(argv: str, sample: bool) -> None:
    assert settle(argv, (GenerationOptions,))["do_sample"] is sample


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--do_sample --temperature 0", ("--do_sample", "--temperature")),
        ("--min_new_tokens 9 --max_new_tokens 5", ("--min_new_tokens", "--max_new_tokens")),
        ("--top_p 0", ("--top_p",)),
        ("--top_p 1.1", ("--top_p",)),
        ("--temperature -1", ("--temperature",)),
        ("--repetition_penalty 0", ("--repetition_penalty",)),
        ("--batch_size 0", ("--batch_size",)),
        ("--stop=", ("--stop",)),
    ],
)
def test_impossible_generation_options(argv: str, named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        settle(argv, (GenerationOptions,))
    for name in named:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--do_sample no --temperature 0.5", "--temperature has no effect with --do_sample no"),
        ("--temperature 0 --top_p 0.9", "--top_p has no effect with --temperature 0"),
        ("--temperature 0 --seed 3", "--seed has no effect with --temperature 0"),
        ("--do_sample no --seed 3", "--seed has no effect with --do_sample no"),
        ("--seed 3", "--seed has no effect where nothing is drawn: add --do_sample, --temperature, "),
        ("--temperature 1 --seed 3", ""),
        ("--temperature 0", ""),
        ("--top_k 1", ""),
    ],
)
def test_sampling_options_without_sampling_are_told(argv: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    settle(argv, (GenerationOptions,))
    told = capsys.readouterr().err
    assert told.startswith(f"arriero: warning: {said}") if said else told == ""
    assert told.count("\n") == bool(said)


def test_prediction_takes_the_names_of_the_seed_and_of_later_versions() -> None:
    groups = (PredictOptions, GenerationOptions)
    assert settle("--tgt_length 7", groups)["max_new_tokens"] == 7
    assert settle("--max_length 7 --output_file x", groups)["predict_file"] == "x"
    # Beside DataOptions, --tgt_length is that group's own option.
    both = settle("--tgt_length 7", (DataOptions, GenerationOptions))
    assert (both["tgt_length"], both["max_new_tokens"]) == (7, 256)


def test_sharding_words() -> None:
    for words in (
        ["--sharding", "stage2 offload"],
        ["--sharding", "stage2", "offload"],
        ["--sharding", "stage2,offload"],
    ):
        (parallel,) = parse((ParallelOptions,), words, "arriero test")
        assert (parallel.sharding, parallel.sharding_stage) == (["stage2", "offload"], 2)
    assert ParallelOptions().sharding_stage == 0
    assert ParallelOptions(tensor_parallel_degree=-1).tensor_parallel_degree == 1


def test_degrees_must_fit_the_processes() -> None:
    parallel = ParallelOptions(tensor_parallel_degree=2, pipeline_parallel_degree=2)
    assert (parallel.layout(4).data, parallel.layout(8).data) == (1, 2)
    with pytest.raises(ConfigError) as error:
        parallel.layout(6)
    assert "--tensor_parallel_degree 2 x --pipeline_parallel_degree 2 needs a multiple of 4 processes" in str(
        error.value
    )
    with pytest.raises(ConfigError, match="this run has 1"):
        ParallelOptions(tensor_parallel_degree=4).layout(1)
    with pytest.raises(ConfigError, match="--sharding_parallel_degree 4 needs --sharding, which"):
        ParallelOptions(sharding_parallel_degree=4).layout(4)


def test_the_word_of_a_resumed_run() -> None:
    def resume(word: str) -> str | None:
        return CheckpointOptions(output_dir="run", resume_from_checkpoint=word).resume_from_checkpoint

    assert [resume(word) for word in ("auto", "True", "false", "none", "run/checkpoint-5")] == [
        "auto",
        "auto",
        None,
        None,
        "run/checkpoint-5",
    ]


def test_corpus_split() -> None:
    def parts(split: str) -> tuple[float, float, float]:
        return CorpusOptions(input_dir=["data"], split=split).split_parts()

    assert parts("949,50,1") == (949, 50, 1)
    assert parts("98/2") == (98, 2, 0)
    for split in ("", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan,1", "inf"):
        with pytest.raises(ConfigError, match="--split"):
            parts(split)


def test_subclassed_groups_keep_the_place_of_an_option() -> None:
    names = [spec.name for spec in specs_of(PretrainOptimizationOptions)]
    assert names == [spec.name for spec in specs_of(OptimizationOptions)]
    assert isinstance(find([PretrainOptimizationOptions()], OptimizationOptions), PretrainOptimizationOptions)


def test_optimizer_names_mean_one() -> None:
    assert {OptimizationOptions(optim=name).optim for name in ("adamw", "adamw_torch", "adamw_torch_fused")} == {
        "adamw"
    }
    assert PretrainOptimizationOptions(optim="muon").optim == "muon"
