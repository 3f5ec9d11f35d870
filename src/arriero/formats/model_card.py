"""The README.md of a repository on the Hub: its head is YAML that the Hub reads (docs/hub/model-cards)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError
from arriero.formats.hub_files import HUB_ID
from arriero.formats.json_file import MAX_CONFIG_BYTES
from arriero.formats.peft import ADAPTER_CONFIG

CARD = "README.md"
_LICENCE_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# Words of a licence's first lines -> the Hub's name of it (huggingface.co/docs/hub/repositories-licenses).
_LICENCES = (
    (r"apache license\s+version 2\.0", "apache-2.0"),
    (r"mit license", "mit"),
    (r"llama 3\.3 community license", "llama3.3"),
    (r"llama 3\.2 community license", "llama3.2"),
    (r"llama 3\.1 community license", "llama3.1"),
    (r"llama 3 community license", "llama3"),
    (r"llama 2 community license", "llama2"),
)


def model_card(hub_id: str, kind: str, files: Mapping[str, Path], license: str | None = None) -> str:
    """A minimal card: licence, base model and tags for the Hub, and how to use what is there.

    Args:
        hub_id: the repository `owner/name`.
        kind: model, adapter or gguf.
        files: name in the repository -> file here; the licence and the base model are read from them.
        license: the Hub's name of the licence; None: told from the licence file, and left out when that is not known.

    Raises:
        ConfigError: `license` cannot be such a name.
    """
    if license is not None and not _LICENCE_NAME.fullmatch(license):
        raise ConfigError(f"--license {license!r}: is no name of a licence as the Hub writes them, such as apache-2.0")
    licence = license or _licence(files)
    base = base_model(files)
    head = [f"license: {licence}"] if licence else []
    head += [f"base_model: {base}"] if base else []
    head += {"model": ["library_name: transformers"], "adapter": ["library_name: peft"], "gguf": []}[kind]
    head += ["pipeline_tag: text-generation", "tags:", "- llama", "- arriero", *(["- gguf"] if kind == "gguf" else [])]
    name = hub_id.partition("/")[2]
    what = {
        "model": "A language model of the LLaMA family.",
        "adapter": f"An adapter for {f'[{base}](https://huggingface.co/{base})' if base else 'a LLaMA-family model'}.",
        "gguf": "A language model of the LLaMA family, as GGUF.",
    }[kind]
    use = f"arriero download {hub_id}"
    if kind == "gguf":
        use += f" --file {next(file for file in files if file.lower().endswith('.gguf'))}"
    elif kind == "model":
        use = f"arriero chat {hub_id}"
    lines = ["---", *head, "---", "", f"# {name}", "", what, "", "```", use, "```", ""]
    return "\n".join(lines)


def base_model(files: Mapping[str, Path]) -> str | None:
    """The Hub id of an adapter's base; None: no adapter, or its base has no such id (a folder of someone's machine)."""
    if ADAPTER_CONFIG not in files:
        return None
    path = files[ADAPTER_CONFIG]
    if path.stat().st_size > MAX_CONFIG_BYTES:
        return None
    try:
        values: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    return base if isinstance(base, str) and HUB_ID.fullmatch(base) and not Path(base).exists() else None


def _licence(files: Mapping[str, Path]) -> str | None:
    for name, path in files.items():
        if name.upper().startswith(("LICENSE", "LICENCE")):
            with path.open("rb") as file:
                text = " ".join(file.read(4000).decode("utf-8", "replace").lower().split())
            return next((known for pattern, known in _LICENCES if re.search(pattern, text)), None)
    return None
