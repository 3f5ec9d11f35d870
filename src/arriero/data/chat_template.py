"""Chat templates: somebody else's code, run in a box.

A template comes with the model and is never trusted. It is rendered in Jinja's immutable sandbox, in a thread whose every
line of Python is counted against a deadline, with caps on the source, on ranges and on the output.
"""

from __future__ import annotations

import datetime
import json
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from arriero.errors import TemplateError

Message = Mapping[str, Any]

MAX_SOURCE = 256 * 1024
MAX_OUTPUT = 16 << 20
MAX_SECONDS = 2.0
MAX_RANGE = 100_000
MAX_REPEAT = 1 << 20


class _TooLong(BaseException):
    """Raised inside a template that outlived its deadline; no `except Exception` of a filter can hold it back."""


def _concat(pieces: Iterable[Any]) -> str:
    """`"".join` that refuses to build what would not fit the cap."""
    texts = [str(piece) for piece in pieces]
    if sum(map(len, texts)) > MAX_OUTPUT:
        raise SecurityError(f"a string of more than {MAX_OUTPUT} characters")
    return "".join(texts)


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    texts: list[str] = []
    for item in value:
        if attribute is not None:
            item = item[attribute] if isinstance(item, Mapping | list) else ""
        texts += [d, str(item)] if texts else [str(item)]
    return _concat(texts)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    found = text.count(old) if count is None else min(count, text.count(old))
    if len(text) + found * len(new) > MAX_OUTPUT:
        raise SecurityError(f"a string of more than {MAX_OUTPUT} characters")
    return text.replace(old, new) if count is None else text.replace(old, new, count)


class _ConcatToFilter(NodeTransformer):
    """`a ~ b` becomes `[a, b] | concat`, so that it passes the size check."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, "concat", [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with everything guarded that can make much out of little."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})
    concat = staticmethod(_concat)  # type: ignore[assignment]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _ConcatToFilter().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed in a template")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("string formatting by % is not allowed in a template")
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(count, int) and len(sequence) * count > MAX_REPEAT:
                    raise SecurityError(f"a repetition of more than {MAX_REPEAT} items")
            if isinstance(left, int) and isinstance(right, int) and max(abs(left), abs(right)) > 1 << 64:
                raise SecurityError("a product of huge numbers")
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            limit = MAX_OUTPUT if isinstance(left, str) else MAX_REPEAT
            if len(left) + len(right) > limit:
                raise SecurityError(f"a sequence of more than {limit} items")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, callee: Any, *arguments: Any, **keywords: Any) -> Any:
        """Calls of a string's own `replace` and `join` go through the guarded ones."""
        owner, name = getattr(callee, "__self__", None), getattr(callee, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *arguments, **keywords)
        if isinstance(owner, str) and name == "join":
            return _join(arguments[0], owner)
        return super().call(context, callee, *arguments, **keywords)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` to `is_safe_attribute`, which refuses it (Jinja would run it with its fields guarded)."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # padding methods and str.format build strings of any width from a small number
        if isinstance(obj, str) and attr in {"format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs", "translate"}:
            return False
        return super().is_safe_attribute(obj, attr, value)


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > MAX_RANGE:
        raise SecurityError(f"a range of more than {MAX_RANGE} items")
    return made


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    if indent is not None and not 0 <= int(indent) <= 16:
        raise SecurityError("an indent of more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=bool(options.get("sort_keys", False)))


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern[:100])


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    # filters that pad, repeat or sum without a bound
    for name in ("batch", "center", "format", "indent", "pprint", "slice", "sum", "wordwrap", "xmlattr"):
        environment.filters.pop(name, None)
    environment.filters.update(tojson=_to_json, concat=_concat, join=_join, replace=_replace)
    environment.globals.update(range=_range, raise_exception=_raise_exception, strftime_now=_now)
    environment.globals.pop("lipsum", None)
    return environment


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja source.
        special: values a template may use by name, such as `bos_token` and `eos_token`.

    Raises:
        TemplateError: if the source is too long or malformed.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"chat template of {len(source)} characters: at most {MAX_SOURCE} are accepted")
        self.source, self.special = source, dict(special or {})
        try:
            self._template = _guarded(lambda: _environment().from_string(source))
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from error
        except (RecursionError, MemoryError, ValueError, OverflowError, SyntaxError, TypeError, jinja2.TemplateError) as error:
            raise TemplateError(f"chat template cannot be compiled: {_one_line(error)}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as text.

        Raises:
            TemplateError: if the template refuses the conversation, does something unsafe or outgrows a limit.
        """

        def run() -> str:
            pieces, size = [], 0
            for piece in self._template.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self.special,
                **variables,
            ):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise SecurityError(f"an output of more than {MAX_OUTPUT} characters")
                pieces.append(piece)
            return "".join(pieces)

        try:
            return str(_guarded(run))
        except TemplateError:
            raise
        except SecurityError as error:
            raise TemplateError(f"chat template does something unsafe: {_one_line(error)}") from error
        except jinja2.TemplateError as error:
            raise TemplateError(f"chat template: {_one_line(error)}") from error
        except Exception as error:  # whatever a foreign template provokes is the template's error
            raise TemplateError(f"chat template failed: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _guarded(work: Any) -> Any:
    """Run `work` in a thread of its own that is ended at the deadline by a trace function.

    A thread, so that the caller's own tracer (a debugger, a coverage tool) is left alone and it works in any thread.

    Raises:
        TemplateError: at the deadline.
    """
    result: list[Any] = []
    failure: list[BaseException] = []
    deadline = time.monotonic() + MAX_SECONDS

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise _TooLong
        return trace

    def target() -> None:
        sys.settrace(trace)
        try:
            result.append(work())
        except BaseException as error:  # handed to the caller below
            failure.append(error)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=target, name="chat-template", daemon=True)
    thread.start()
    thread.join(MAX_SECONDS + 1.0)
    if thread.is_alive() or failure and isinstance(failure[0], _TooLong):
        raise TemplateError(f"chat template ran for more than {MAX_SECONDS:g} seconds")
    if failure:
        raise failure[0]
    return result[0]
