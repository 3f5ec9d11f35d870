"""Writes docs/verbs/VERB.md, a page for each verb, from its options: `make docs`.

What an example printed stands between two marks and is kept; `--record` runs all examples again, on the tiny model.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from arriero.commands.table import ONE_PROCESS, VERBS, load_verb
from arriero.config.help_page import default_text, metavar, usage
from arriero.config.option import OptionSpec, specs_of, title

FOLDER = Path(__file__).parent / "verbs"
BEGIN, END = "<!-- example: recorded by docs/make_verbs.py --record -->", "<!-- example: end -->"
TINY = "tiny-random-llama"
# In the order in which they are recorded: each finds what those before it left. They run in a folder with `SETUP`.
EXAMPLES: dict[str, str] = {
    "download": f"arriero download {TINY} --output_dir models/tiny",
    "inspect": "arriero inspect models/tiny",
    "convert": "arriero convert models/tiny models/tiny-bf16 --dtype bfloat16",
    "preprocess": "arriero preprocess --model_name_or_path models/tiny --input_path text.txt --output_prefix data/text "
    "--append_eos",
    "plan": "arriero plan --model_name_or_path llama-3-8b --gpu H100 --num_devices 8 --sharding stage3 --bf16",
    "pretrain": "arriero pretrain --model_name_or_path models/tiny --input_dir data --output_dir runs/scratch "
    "--max_seq_length 64 --max_steps 3 --device cpu",
    "finetune": "arriero finetune --model_name_or_path models/tiny --dataset_path my_data --output_dir runs/mine --lora "
    "--learning_rate 1e-2 --max_steps 3 --do_eval --device cpu",
    "evaluate": "arriero evaluate --model_name_or_path models/tiny --lora_path runs/mine --dataset_path my_data --device cpu",
    "predict": "arriero predict --model_name_or_path models/tiny --lora_path runs/mine --data_file my_data/dev.jsonl "
    "--predict_file answers.jsonl --max_new_tokens 8 --device cpu",
    "merge": "arriero merge --model_name_or_path models/tiny --lora_path runs/mine --output_path models/mine --device cpu",
    "quantize": "arriero quantize --model_name_or_path models/tiny --output_path models/int8 --quant_type int8 --device cpu",
    "export": "arriero export --model_path models/mine --output_path inference/llama --weights int8",
    "infer": "arriero infer --model_dir inference --model_prefix llama --data_file my_data/dev.jsonl --max_new_tokens 8",
    "chat": 'arriero chat --model_name_or_path smollm2-135m-instruct --prompt "What is the capital of Peru?" --device cpu',
    "launch": "arriero launch --nproc_per_node 2 evaluate --model_name_or_path models/tiny --dataset_path my_data --device cpu",
    "completion": "arriero completion bash | head -n 3",
}
WITHOUT: dict[str, tuple[str, str]] = {
    "quickstart": ("arriero quickstart", "What it prints is explained in the [tutorial](../tutorial.md)."),
    "upload": ("arriero upload runs/mine owner/name --private", "It needs a token of the Hub: `hf auth login`."),
    "serve": ("arriero serve models/mine", "It runs until Ctrl-C. Requests and answers: [serving](../serving.md)."),
    "bench": (
        "arriero bench --model_name_or_path smollm2-135m-instruct --threads 2",
        "Figures: [generation](../generation.md).",
    ),
}
MORE = {
    "quickstart": ("tutorial",),
    "convert": ("formats",),
    "inspect": ("formats",),
    "preprocess": ("corpus",),
    "plan": ("plan",),
    "pretrain": ("pretraining", "parallelism"),
    "finetune": ("finetuning", "methods", "parallelism"),
    "evaluate": ("finetuning",),
    "predict": ("generation",),
    "merge": ("merging",),
    "quantize": ("quantization",),
    "export": ("export",),
    "infer": ("export",),
    "chat": ("generation",),
    "serve": ("serving", "security"),
    "bench": ("generation",),
    "launch": ("distributed", "parallelism"),
}
SETUP = {
    "text.txt": "\n\n".join(f"The mule carried load {i} over the hill." for i in range(200)) + "\n",
    "my_data/train.jsonl": "".join(f'{{"src": "Load {i} is for", "tgt": "house {i % 7}"}}\n' for i in range(24)),
    "my_data/dev.jsonl": "".join(f'{{"src": "Load {i} is for", "tgt": "house {i % 7}"}}\n' for i in range(24, 27)),
}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _row(spec: OptionSpec) -> str:
    name = f"`{spec.name.upper()}`" if spec.positional else f"`--{spec.name}`"
    kind = "yes or no" if spec.kind is bool else metavar(spec)
    if spec.choices is not None:
        kind = ", ".join(f"`{choice}`" for choice in spec.choices) + (" ..." if spec.is_list else "")
    default = ""
    if spec.required:
        default = "must be given"
    elif spec.default is not None and spec.default != "" and spec.default != []:
        default = f"`{default_text(spec.default)}`"
    also = f" Also `--{'`, `--'.join(spec.aliases)}`." if spec.aliases else ""
    return f"| {name} | {_cell(kind)} | {_cell(default)} | {_cell(spec.help)}{'.' if also else ''}{also} |"


def page(name: str, example: str) -> str:
    """The page of a verb.

    Args:
        example: what stands between its marks.
    """
    verb = load_verb(name)
    specs = [spec for group in verb.options for spec in specs_of(group)]
    lines = [
        f"# arriero {name}",
        "",
        verb.help,
        "",
        "```text",
        usage(verb.prog, specs),
        "```",
        "",
        BEGIN,
        example,
        END,
        "",
    ]
    if MORE.get(name):
        lines += ["More: " + ", ".join(f"[{page}](../{page}.md)" for page in MORE[name]) + ".", ""]
    if name not in ONE_PROCESS and name not in ("launch", "serve"):
        lines += [f"On several processes: `arriero launch --nproc_per_node N {name} ...`, see [launch](launch.md).", ""]
    lines += ["## Options", "", "Any of them can stand in a YAML or JSON file: `--config run.yaml`; flags win.", ""]
    for group in verb.options:
        if specs_of(group):
            lines += [f"### {title(group)}", "", "| Option | Value | Default | Meaning |", "| --- | --- | --- | --- |"]
            lines += [*(_row(spec) for spec in specs_of(group)), ""]
    return "\n".join(lines).rstrip() + "\n"


def recorded(text: str) -> str:
    """What stands between the marks of a page."""
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def without_output(name: str) -> str:
    command, why = WITHOUT[name]
    return f"```shell\n{command}\n```\n\n{why}"


def record() -> dict[str, str]:
    """Run the examples, one after the other."""
    found = {}
    environment = {
        **os.environ,
        "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory() as name:
        for path, text in SETUP.items():
            (Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(name) / path).write_text(text, encoding="utf-8")
        for verb, command in EXAMPLES.items():
            done = subprocess.run(
                ["bash", "-c", command], cwd=name, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            output = re.sub(r"[^\n]*\r", "", done.stdout.decode())  # a progress bar writes over itself
            if done.returncode:
                raise SystemExit(f"{command}\n{output}")
            output = "\n".join(line.rstrip() for line in output.replace(name, "~").strip().splitlines())
            found[verb] = f"```shell\n{command}\n```\n\n```text\n{output}\n```"
            print(found[verb])
    return found


def pages(examples: dict[str, str] | None = None) -> dict[Path, str]:
    """Every page by its place; examples that are not given stay as they are."""
    made = {}
    for name in VERBS:
        path = FOLDER / f"{name}.md"
        if name in WITHOUT:
            example = without_output(name)
        elif examples is not None:
            example = examples[name]
        else:
            example = recorded(path.read_text(encoding="utf-8")) if path.is_file() else ""
        made[path] = page(name, example)
    rows = [f"| [{name}]({name}.md) | {_cell(about)} |" for name, (_, about) in VERBS.items()]
    made[FOLDER / "index.md"] = "\n".join(["# Verbs", "", "| Verb | Does |", "| --- | --- |", *rows, ""])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="run the examples again (minutes)")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages(record() if arguments.record else None).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
