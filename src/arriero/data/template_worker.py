"""Renders chat templates in a process of its own: a program that `template_process.TemplateWorker` runs.

A template is code that came with a model. Jinja's sandbox keeps it from Python's internals, but not from taking all the
time or memory there is, and most of what takes them (`'a' * 10**9`, `10**10**10`) runs inside C, where no thread of the
same process could stop it. So the renderer is apart, with limits set by the operating system.

Protocol: one JSON object a line on stdin, one a line on stdout. Imports nothing of this package.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT = 512 * 2**20
# Macros that call themselves end here; each level takes several Python frames.
RECURSION_LIMIT = 2000


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}` holds what the assistant says; it renders as its content.

    Where the request gives two marks, they are written around it.
    """

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it without ClassVar
    marks = ("", "")

    def parse(self, parser: Parser) -> nodes.Node:
        """A call of `_marked` with the block's content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body, lineno=line)

    def _marked(self, caller: Callable[[], str]) -> str:
        opening, closing = self.marks
        return opening + caller() + closing


def raise_exception(message: object) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(str(message))


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The `tojson` of transformers: unlike Jinja's it escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(layout: str) -> str:
    """The current date, as some templates put it in the system message."""
    return datetime.now().strftime(layout)


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for, as in transformers."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationBlock]
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """A template, compiled once."""
    return environment().from_string(source)


def render(request: dict[str, Any]) -> dict[str, str]:
    """{"text": ...}, or {"error": ...} with the reason in one line."""
    limit: int = request["output_limit"]
    parts: list[str] = []
    size = 0
    blocks = environment().extensions[GenerationBlock.identifier]
    assert isinstance(blocks, GenerationBlock)
    blocks.marks = tuple(request.get("generation_marks") or ("", ""))
    try:
        for part in compiled(request["source"]).generate(request["variables"]):
            size += len(part)
            if size > limit:
                return {"error": f"it writes more than {limit:,} characters"}
            parts.append(part)
        return {"text": "".join(parts)}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"syntax error in line {error.lineno}: {error.message}"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": f"it does what a template may not do: {error}"}
    except jinja2.TemplateError as error:
        return {"error": str(error.message or error)}
    except Exception as error:  # a template can raise anything that Python can
        return {"error": f"{type(error).__name__}: {error}"}


def set_limits() -> Callable[[float], None]:
    """Limit memory and forbid writing files.

    Returns:
        What arms (seconds) or disarms (0) the timer that ends this process.
    """
    try:
        import resource
    except ImportError:  # Windows: the parent's own timer remains
        return lambda seconds: None
    for kind, value in ((resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # macOS refuses some of them; time and output stay limited
            continue

    def arm(seconds: float) -> None:
        # CPU time and not the clock's: a busy machine must not fail an honest template. The signal's default action
        # ends the process also while it is inside C code.
        signal.setitimer(signal.ITIMER_PROF, seconds)

    return arm


def main() -> None:
    """Answer requests until stdin ends."""
    environment()
    arm = set_limits()
    sys.setrecursionlimit(RECURSION_LIMIT)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    for line in source:
        request = json.loads(line)
        arm(request["seconds"])
        answer = render(request)
        arm(0)
        sink.write(json.dumps(answer).encode("ascii") + b"\n")
        sink.flush()


if __name__ == "__main__":
    main()
