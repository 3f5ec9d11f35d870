"""How a model writes calls of tools: the two common ways, their grammar, and the prompt where a template has none."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arriero.data.assistant_turns import THOUGHT_OPENING
from arriero.engine.structure import Structure, Thought, best_form, json_form, schema_problem, thought_rules
from arriero.serving.api_errors import ApiError
from arriero.serving.openai.fields import JsonObjectFormat, JsonSchemaFormat, TextFormat
from arriero.serving.openai.messages import Tool

MAX_PARALLEL_CALLS = 16
MAX_REASON = 300  # characters of an error
MAX_CHECKED = 64 * 1024  # characters of schemas; more is more than a grammar may have, and refused as that


@dataclass(frozen=True)
class ToolFormat:
    """One way to write a call.

    Attributes:
        opening, closing: around it. Without an opening the call is the whole answer.
        arguments_key: what the arguments are called.
        native: whether the model's template describes the tools itself.
    """

    opening: str
    closing: str
    arguments_key: str
    native: bool

    def before_name(self) -> str:
        """From the opening to the function's name."""
        return f'{self.opening}{{"name": "'

    def before_arguments(self) -> str:
        """From the name to the arguments."""
        return f'", "{self.arguments_key}": '

    def after_arguments(self) -> str:
        """From the arguments to the end."""
        return "}" + self.closing

    def call(self, name: str, arguments: Any) -> str:
        """A call as the model writes it."""
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return f"{self.before_name()}{name}{self.before_arguments()}{text}{self.after_arguments()}"


CHATML = ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments", native=True)
LLAMA3 = ToolFormat("", "", "parameters", native=True)
# For templates that know nothing of tools: the words that the ChatML models were trained with.
TAUGHT = ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments", native=False)


def format_of(template: str | None) -> ToolFormat:
    """How a model with this template writes calls."""
    template = template or ""
    if re.search(r"\btools\b", template) is None:
        return TAUGHT
    if "<tool_call>" in template:
        return CHATML
    return LLAMA3 if "parameters" in template or "ipython" in template else TAUGHT


def specification(tool: Tool) -> dict[str, Any]:
    """A tool as templates expect it."""
    function: dict[str, Any] = {"name": tool.function.name, "description": tool.function.description or ""}
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def taught(
    messages: Sequence[dict[str, Any]], tools: Sequence[Tool], *, in_system: bool = True
) -> list[dict[str, Any]]:
    """A conversation for a template without tools: they are described in the system message, and what they answered is said
    by the user, in one turn with what follows of it.

    Args:
        in_system: false for a template that refuses a system message: the user's first turn describes them.
    """
    lines = "\n".join(json.dumps(specification(tool), ensure_ascii=False) for tool in tools)
    described = (
        "You may call one or more functions to assist with the user query. Their signatures are within <tools></tools>:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "For each call give a JSON object with the function's name and arguments within <tool_call></tool_call>:\n"
        '<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>'
    )
    told: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        plain: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if "reasoning_content" in message:
            plain["reasoning_content"] = message["reasoning_content"]
        calls = message.get("tool_calls") or ()
        if calls:
            written = [TAUGHT.call(one["function"]["name"], one["function"]["arguments"]) for one in calls]
            plain["content"] = "\n".join([part for part in (plain["content"], *written) if part])
        if message["role"] == "tool":
            plain = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        if after_result and plain["role"] == "user":  # some templates want the roles in turns
            told[-1]["content"] += f"\n{plain['content']}"
        else:
            told.append(plain)
        after_result = message["role"] == "tool"
    if not tools:
        return told
    if not in_system:
        first = next((turn for turn in told if turn["role"] == "user"), None)
        if first is None:
            return [{"role": "user", "content": described}, *told]
        first["content"] = f"{described}\n\n{first['content']}"
        return told
    if told and told[0]["role"] == "system":
        told[0]["content"] = f"{told[0]['content']}\n\n{described}"
        return told
    return [{"role": "system", "content": described}, *told]


def structure_with_tools(
    form: ToolFormat,
    tools: Sequence[Tool],
    *,
    required: bool,
    parallel: bool,
    answer: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None,
    thought: Thought = "none",
) -> Structure:
    """The grammar of an answer that may call tools: text, or calls whose arguments fit their schemas.

    Args:
        required: there is a call.
        parallel: there may be several.
        answer: the form of one that calls none.
        thought: where it thinks first.

    Raises:
        ApiError: parameters that are no schema of an object, or a strict schema that no grammar can hold an answer to.
    """
    schemas = [tool.function.parameters or {} for tool in tools]
    if isinstance(answer, JsonSchemaFormat):
        schemas.append(answer.json_schema.schema_)
    checked = sum(len(json.dumps(schema)) for schema in schemas) <= MAX_CHECKED
    marker = form.opening.strip()
    rest = form.before_name()[len(marker) :]
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        begin = json.dumps(f"{rest}{tool.function.name}{form.before_arguments()}")
        rules.append(f"call_{index}: {begin} arguments_{index} {json.dumps(form.after_arguments())}")
        rules.append(f"arguments_{index}: %json {json.dumps(_parameters(tool, index, checked=checked))}")
    first = f"{json.dumps(marker)} call" if marker else "call"
    thinks, more_rules = thought_rules(thought)
    before_text, _ = thought_rules(thought, gap=False)  # a text has blanks of its own
    rules += more_rules
    # else a text would take the thought's beginning for its own
    other = f" & ~/(?s:[ \\n]*){THOUGHT_OPENING}(?s:.*)/" if thought == "may" else ""
    more = f" ({json.dumps(chr(10) + marker)} call){{0,{MAX_PARALLEL_CALLS - 1}}}" if parallel and marker else ""
    if required:
        rules.insert(0, f"start: {thinks}{first}{more}")
    elif isinstance(answer, JsonObjectFormat | JsonSchemaFormat):
        rules[:0] = [
            f"start: {thinks}(answer | {first}{more})",
            f"answer: %json {json.dumps(_answer(answer, checked=checked))}",
        ]
    elif marker:
        rules[:0] = [
            f"start: {before_text}(TEXT | lead call{more})",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){marker}(?s:.*)/{other}",
            f"lead[lazy]: /(?s:.*){marker}/{other}",
        ]
    else:
        gap = "GAP? " if before_text else ""
        rules[:0] = [f"start: {before_text}(TEXT? | {gap}call)", f"TEXT: /[^{{](?s:.*)/{other}"]
    return Structure("grammar", "\n".join(rules))


def _parameters(tool: Tool, index: int, *, checked: bool) -> dict[str, Any]:
    """What the arguments of a call must be: all that their schema says if it is strict, else what can be held of it.

    Args:
        checked: whether to look for a schema that no grammar can have.
    """
    param = f"tools[{index}].function.parameters"
    given = tool.function.parameters
    if given is None:
        given = {"type": "object", "properties": {}, "additionalProperties": False}
    kind = given.get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise ApiError(400, "the parameters of a function must be the schema of an object", param=param)
    schema = {**given, "type": "object"}
    if not tool.function.strict:
        return best_form(schema, {"type": "object"}) if checked else json_form(schema, lenient=True)
    problem = schema_problem(json_form(schema)) if checked else ""
    if problem:
        raise ApiError(
            400,
            f"the schema of {tool.function.name!r} cannot be kept strictly: {problem[:MAX_REASON]}: change it, or leave "
            "strict out",
            param=param,
        )
    return json_form(schema)


def _answer(answer: JsonObjectFormat | JsonSchemaFormat, *, checked: bool) -> dict[str, Any]:
    """The same of an answer that calls nothing; a strict schema that cannot be is found by who compiles it."""
    if isinstance(answer, JsonObjectFormat):
        return json_form({"type": "object"})
    schema, strict = answer.json_schema.schema_, answer.json_schema.strict
    return best_form(schema, {}) if checked and not strict else json_form(schema, lenient=not strict)
