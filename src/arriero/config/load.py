"""The load that `bench serve` puts on a server."""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from arriero.config.option import OptionGroup, option
from arriero.errors import ConfigError

APIS = ("chat", "completions")
OBJECTIVES = ("ttft", "tpot", "e2el")


def _is_base(text: str) -> bool:
    """Whether a text is the address of an API, which HTTP can be asked with as it is."""
    try:
        address = urlsplit(text)
        usable = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        str(address.hostname).encode("idna")
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return usable and plain and not (address.query or address.fragment or address.username)


@dataclass(kw_only=True)
class LoadOptions(OptionGroup):
    """Load (bench serve)."""

    base_url: str = option(
        "http://127.0.0.1:8011/v1", "serve: address of an OpenAI API, arriero's or another's, with its /v1"
    )
    model: str | None = option(
        None,
        "serve: what the server calls the model (default: the first of its /models); else the same as --model_name_or_path",
    )
    api_key: str | None = option(
        None,
        "serve: the key; better in $ARRIERO_API_KEY or $OPENAI_API_KEY, since other users see command lines",
    )
    api: str = option("chat", "serve: which API answers, /chat/completions or /completions", APIS)
    rates: list[float] = option(
        [1.0, 2.0, 4.0],
        "serve: requests a second, one run each; they arrive as a Poisson process, whatever has been answered; 0: all at once",
        aliases=("request_rate",),
        minimum=0.0,
        maximum=100_000.0,
    )
    data_file: str | None = option(
        None,
        "serve: rows with the prompts (messages, instruction, src, context, prompt or text), cut to no length; without it, "
        "passages and questions that come with arriero",
    )
    temperature: float = option(0.0, "serve: 0: the likeliest tokens", minimum=0.0, maximum=2.0)
    ignore_eos: bool = option(
        False, "serve: every answer has --max_new_tokens tokens (arriero, vLLM and SGLang know this; OpenAI does not)"
    )
    goodput: list[str] = option(
        [],
        "serve: what a good request keeps to, in milliseconds: ttft:500 (first token), tpot:50 (mean time of a further token), "
        "e2el:5000 (the whole answer)",
    )
    request_timeout: float = option(
        600.0, "serve: seconds after which a request is given up", minimum=0.1, maximum=86400.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rates:
            raise ConfigError("--rates is empty: give at least one")
        self.rates = list(dict.fromkeys(self.rates))
        self.base_url = self.base_url.strip()
        if not _is_base(self.base_url):
            raise ConfigError(f"--base_url {self.base_url[:100]!r}: write http://HOST:PORT/v1 or https://HOST/v1")
        self.base_url = self.base_url.rstrip("/")
        self.objectives()

    def objectives(self) -> dict[str, float]:
        """Of `goodput`: name -> milliseconds.

        Raises:
            ConfigError: an item of another form.
        """
        found = {}
        for item in self.goodput:
            name, _, limit = item.partition(":")
            try:
                found[name] = float(limit)
            except ValueError:
                found[name] = math.nan
            if name not in OBJECTIVES or not 0 < found[name] < math.inf:
                raise ConfigError(f"--goodput {item[:60]!r}: write {':MS, '.join(OBJECTIVES)}:MS, such as ttft:500")
        return found
