"""What a user may tell a chat template: the rules, and their check for an option."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from arriero.errors import ConfigError

MAX_VARIABLES = 16
MAX_VARIABLE_TEXT = 1024
MAX_VARIABLE_INTEGER = 2**53
VARIABLE_NAME = r"^[A-Za-z][A-Za-z0-9_]{0,63}$"
# What templates are given otherwise, what Jinja itself has, and what `apply_chat_template` of transformers is told.
RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "raise_exception",
        "strftime_now",
    }
    | {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "loop", "self", "caller", "varargs", "kwargs"}
    | {
        "conversation",
        "chat_template",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
    }
    | {"return_assistant_tokens_mask", "tokenizer_kwargs"}
)


def is_reserved(name: str) -> bool:
    """Whether a variable is not for users to set: the template is given it otherwise."""
    return name in RESERVED or name.endswith(("_token", "_tokens"))


def parse_variables(text: str, option: str) -> dict[str, Any]:
    """The variables of a JSON object of scalars, such as `{"enable_thinking": false}`.

    Raises:
        ConfigError: it is none, or one of them is not to be set; the line names the option.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{option} takes a JSON object, such as '{{\"enable_thinking\": false}}', not {text[:80]!r}")
    if len(values) > MAX_VARIABLES:
        raise ConfigError(f"{option} has {len(values)} variables: a template is told {MAX_VARIABLES} at most")
    for name, value in values.items():
        if not re.fullmatch(VARIABLE_NAME, name):
            raise ConfigError(f"{option}: {name[:80]!r} is no name of a variable: letters, digits and _ make one")
        if is_reserved(name):
            raise ConfigError(f"{option}: {name!r} is what the template is told otherwise; leave it out")
        if not _is_scalar(value):
            raise ConfigError(
                f"{option}: {name!r} must be true, false, null, a number, or a text of up to {MAX_VARIABLE_TEXT} characters"
            )
    return values


def _is_scalar(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_VARIABLE_TEXT
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) <= MAX_VARIABLE_INTEGER)
