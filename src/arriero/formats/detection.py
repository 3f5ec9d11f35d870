"""What a file or folder is, told from names and first bytes; nothing in it is interpreted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arriero.errors import FormatError
from arriero.formats.bin_folder import BIN_FILE, BIN_INDEX_FILE
from arriero.formats.meta.params import PARAMS_FILE
from arriero.formats.paddle.lora import LORA_CONFIG, LORA_STEM, is_paddle_lora
from arriero.formats.paddle.prefix import CACHES, PREFIX_CONFIG, PREFIX_STEM, is_paddle_prefix
from arriero.formats.paddle.reader import is_paddle_folder
from arriero.formats.peft import ADAPTER_CONFIG, is_adapter, read_adapter_config
from arriero.formats.safe_tensors import INDEX_FILE, SINGLE_FILE
from arriero.formats.tensor_shards import is_sharded

Kind = Literal[
    "hf",
    "hf-shards",
    "hf-bin",
    "gguf",
    "paddle",
    "meta",
    "peft-lora",
    "peft-prefix",
    "gguf-lora",
    "paddle-lora",
    "paddle-prefix",
    "tokenizer",
    "corpus",
]
MODELS: dict[Kind, str] = {
    "hf": "HF model folder",
    "hf-shards": "HF model folder with one weight file a process",
    "hf-bin": "HF model folder with weights of torch.save",
    "gguf": "GGUF model",
    "paddle": "PaddleNLP model folder",
    "meta": "model folder of Meta's",
}
ADAPTERS: dict[Kind, str] = {
    "peft-lora": "PEFT LoRA adapter",
    "peft-prefix": "PEFT prefix",
    "gguf-lora": "GGUF LoRA adapter",
    "paddle-lora": "PaddleNLP LoRA adapter",
    "paddle-prefix": "PaddleNLP prefix",
}
OTHERS: dict[Kind, str] = {"tokenizer": "tokenizer without a model", "corpus": "token corpus"}
NAMES: dict[Kind, str] = {**MODELS, **ADAPTERS, **OTHERS}
FORMAT_OF: dict[Kind, str] = {
    "hf-shards": "hf",
    "hf-bin": "hf",
    "peft-lora": "hf",
    "peft-prefix": "hf",
    "gguf-lora": "gguf",
    "paddle-lora": "paddle",
    "paddle-prefix": "paddle",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model")
CORPUS_FILES = ("*_ids.npy", "*_ids.npz", "*.idx")
_ROWS = (".jsonl", ".csv", ".tsv", ".parquet")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Found:
    """What was found at a path.

    Attributes:
        path: the file or folder.
        kind: what it is; `NAMES` has the words for it.
        part_of: of training that left it there: a "run" folder or a "checkpoint"; None for any other.
    """

    path: Path
    kind: Kind
    part_of: Literal["run", "checkpoint"] | None = None

    @property
    def name(self) -> str:
        """In words."""
        training = {"run": " of a finished run", "checkpoint": " of a checkpoint", None: ""}[self.part_of]
        return NAMES[self.kind] + training

    @property
    def format(self) -> str:
        """hf, gguf, paddle or meta: whose files they are."""
        return FORMAT_OF.get(self.kind, self.kind)


def detect(path: str | Path) -> Found:
    """What a file or folder is.

    Raises:
        FormatError: there is nothing, or nothing that is known; the message says what it looks like and what to do.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _detect_folder(path)
        if path.is_file():
            return _detect_file(path)
    except OSError as error:
        raise FormatError(f"{error.filename or path}: cannot be read ({error.strerror})") from error
    raise FormatError(f"{path}: no such file or folder")


def _detect_folder(folder: Path) -> Found:
    part_of: Literal["run", "checkpoint"] | None = None
    if (folder / "trainer_state.json").is_file() and (folder / "manifest.json").is_file():
        part_of = "checkpoint"
    elif (folder / "train_log.jsonl").is_file() or any(folder.glob("checkpoint-*/manifest.json")):
        part_of = "run"
    for kind, is_it in _FOLDERS:
        if is_it(folder):
            return Found(folder, kind, part_of)
    if (folder / ADAPTER_CONFIG).is_file():  # of a kind that is not read
        values, source = read_adapter_config(folder, "an adapter folder needs it")
        raise FormatError(
            f"{source}: peft_type {str(values.get('peft_type'))[:40]!r} is not read; LORA and PREFIX_TUNING are"
        )
    raise FormatError(f"{folder}: {_guess(folder)}")


def _peft_kind(wanted: str) -> Callable[[Path], bool]:
    def is_it(folder: Path) -> bool:
        return is_adapter(folder) and read_adapter_config(folder, "")[0].get("peft_type") == wanted

    return is_it


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _is_meta(folder: Path) -> bool:
    return (folder / PARAMS_FILE).is_file() and _has("consolidated.*.pth")(folder)


# In this order: a folder of Meta's may hold a config.json, a model folder a tokenizer, a run folder an adapter's leftovers.
_FOLDERS: tuple[tuple[Kind, Callable[[Path], bool]], ...] = (
    ("meta", _is_meta),
    ("peft-lora", _peft_kind("LORA")),
    ("peft-prefix", _peft_kind("PREFIX_TUNING")),
    ("paddle-lora", is_paddle_lora),
    ("paddle-prefix", is_paddle_prefix),
    ("paddle", is_paddle_folder),
    ("hf", _has(SINGLE_FILE, INDEX_FILE)),
    ("hf-shards", is_sharded),
    ("hf-bin", _has(BIN_FILE, BIN_INDEX_FILE)),
    ("corpus", _has(*CORPUS_FILES)),
    ("tokenizer", _has(*TOKENIZER_FILES)),
)


def _guess(folder: Path) -> str:
    """What a folder that is nothing known looks like, and what to do."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    checkpoints = sorted((int(match[1]), name) for name in names if (match := _CHECKPOINT.fullmatch(name)))
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if checkpoints:
        return f"is a run folder without final weights; name a checkpoint: {folder / checkpoints[-1][1]}"
    if ggufs:
        more = f" ({len(ggufs)} files)" if len(ggufs) > 1 else ""
        return f"holds GGUF files{more}; name one: {folder / ggufs[0]}"
    if "model_index.json" in names:
        return "is a diffusion pipeline (model_index.json), and only language models of the LLaMA family are read"
    if any(name.startswith("consolidated.") for name in names):
        return f"has weights of Meta's but no {PARAMS_FILE}; fetch that too"
    for config, stem in ((LORA_CONFIG, LORA_STEM), (PREFIX_CONFIG, PREFIX_STEM)):
        weights = any(name.startswith(f"{stem}.") for name in names) or (stem == PREFIX_STEM and CACHES in names)
        if (config in names) != weights:
            missing = config if weights else f"{stem}.pdparams"
            return f"is a part of an adapter of PaddleNLP: {missing} is missing; fetch that too"
    if any(name.endswith((".h5", ".msgpack", ".ot", ".onnx")) for name in names):
        return "has weights of TensorFlow, Flax, Rust or ONNX only; get them as safetensors"
    if any(name.endswith(".distcp") or name.startswith("global_step") for name in names):
        return "is a checkpoint of distributed training (DCP or DeepSpeed); join it into safetensors with its own tool first"
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if safetensors:
        return f"has {safetensors[0]}, but no {SINGLE_FILE} or {INDEX_FILE} that says which files make up the model"
    if "config.json" in names:
        return "has a config.json but no weights; fetch the model again"
    if not names:
        return "is empty"
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"is no model, adapter, tokenizer or corpus that is known (it holds {shown})"


def _detect_file(path: Path) -> Found:
    with path.open("rb") as file:
        start = file.read(16)
    if start[:4] == b"GGUF":
        from arriero.formats.gguf.file import GGUFFile

        with GGUFFile(path) as opened:
            adapter = opened.metadata.get("general.type") == "adapter" or "adapter.type" in opened.metadata
        return Found(path, "gguf-lora" if adapter else "gguf")
    looks, advice = file_type(path, start)
    raise FormatError(f"{path}: {looks}; {advice}")


def file_type(path: Path, start: bytes) -> tuple[str, str]:
    """What a file that is no model by itself is, and what to do with it.

    Args:
        start: its first 16 bytes.
    """
    name, folder = path.name, path.parent
    one_of_many = f"name its folder, which has what else belongs to the model: {folder}"
    if not start:
        return "is empty", "fetch it again"
    if start == b"version https://":
        return "is a pointer of Git LFS, not the file itself", "fetch it with git lfs pull, or with arriero download"
    if start[:6] == b"\x93NUMPY":
        if name == CACHES:
            return "is a prefix of PaddleNLP", f"name its folder: {folder}"
        return "is a NumPy array", "a corpus is named by its prefix, without _ids.npy"
    if start.startswith((b"MMIDIDX", b"TNTIDX")):
        return "is the index of a corpus", "name the corpus by its prefix, without .idx"
    if start[:4] == b"PK\x03\x04":
        if name.endswith((".bin", ".pt", ".pth")):
            return "holds weights of torch.save", one_of_many
        return "is a zip archive", "unpack it and name what is in it"
    if start[:2] == b"\x1f\x8b" or start[:6] == b"\xfd7zXZ\x00" or start[:4] == b"\x28\xb5\x2f\xfd":
        return "is compressed", "unpack it and name what is in it"
    if name.endswith(".pdparams"):
        return "holds weights of Paddle", one_of_many
    if name.endswith(".pdopt"):
        return "holds the state of a Paddle optimizer", "it is never opened; name the folder of the weights"
    if start[:1] == b"\x80":
        return "is a pickle", "it is never opened; name the folder of a model"
    if len(start) >= 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "holds tensors (safetensors)", one_of_many
    if start[:4] == b"PAR1" or name.endswith(_ROWS) or start.lstrip()[:1] == b"[":
        return "is a file of rows, not of a model", "arriero finetune and evaluate read it as --dataset_path"
    if name.endswith(".json") or start.lstrip()[:1] == b"{":
        return "is JSON", f"name its folder: {folder}"
    if name.endswith((".yaml", ".yml")):
        return "is a file of options for --config", f"to look at a run name its folder: {folder}"
    return (
        "is no model, adapter or corpus that is known",
        "read are folders of Hugging Face, PaddleNLP and Meta, GGUF files, adapters, tokenizers, corpora and files of tensors",
    )
