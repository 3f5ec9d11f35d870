"""How a model writes calls of tools: the two common ways, their grammar, and the prompt where a template has none."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arriero.data.assistant_turns import THOUGHT_OPENING
from arriero.engine.structure import SchemaRule, Structure, Thought, thought_rules
from arriero.serving.api_errors import ApiError
from arriero.serving.openai.fields import JsonObjectFormat, JsonSchemaFormat, TextFormat
from arriero.serving.openai.messages import Tool

MAX_PARALLEL_CALLS = 16
# Keys that say what members an object has beside its `properties`.
OTHER_MEMBERS = {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "patternProperties", "enum", "const"}


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
        ApiError: parameters that are no schema of an object. What of a strict schema cannot be held is found by who compiles.
    """
    marker = form.opening.strip()
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}"]
    schemas = [_arguments(tool, index) for index, tool in enumerate(tools)]
    for tool, arguments in zip(tools, schemas, strict=True):
        before, after = _around_arguments(form, tool.function.name, len(marker))
        rules.append(f"{arguments.name.replace('arguments', 'call')}: {before} {arguments.name} {after}")
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
        rules.insert(0, f"start: {thinks}(answer | {first}{more})")
        schemas.append(_answer(form, answer))
    elif marker:
        rules[:0] = [
            f"start: {before_text}(TEXT | lead call{more})",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){marker}(?s:.*)/{other}",
            f"lead[lazy]: /(?s:.*){marker}/{other}",
        ]
    else:
        gap = "GAP? " if before_text else ""
        rules[:0] = [f"start: {before_text}(TEXT? | {gap}call)", f"TEXT: /[^{{](?s:.*)/{other}"]
    return Structure("grammar", "\n".join(rules), schemas=tuple(schemas))


def _around_arguments(form: ToolFormat, name: str, marked: int) -> tuple[str, str]:
    """What stands before and after a call's arguments, in a grammar.

    Without an opening a call must be cut into the same pieces as JSON is: an answer in JSON begins as it does, and llguidance
    takes the longest piece that can be, without looking back. In one piece a call would leave no other answer possible.

    Args:
        marked: characters of the opening that stand before already.
    """
    if form.opening:
        return json.dumps(f"{form.before_name()[marked:]}{name}{form.before_arguments()}"), json.dumps(
            form.after_arguments()
        )
    pieces = ["{", json.dumps("name"), ": ", json.dumps(name), ", ", json.dumps(form.arguments_key), ": "]
    return " ".join(map(json.dumps, pieces)), json.dumps("}")


def _arguments(tool: Tool, index: int) -> SchemaRule:
    """What the arguments of a call must be: all that their schema says if it is strict, else what can be held of it."""
    place = f"tools[{index}].function.parameters"
    given = tool.function.parameters
    if given is None:
        given = {"type": "object", "properties": {}, "additionalProperties": False}
    kind = given.get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise ApiError(400, "the parameters of a function must be the schema of an object", param=place)
    return SchemaRule(
        f"arguments_{index}",
        json.dumps({**given, "type": "object"}),
        strict=bool(tool.function.strict),
        otherwise=json.dumps({"type": "object"}),
        title=f"the schema of {tool.function.name!r}",
        place=place,
    )


def _answer(form: ToolFormat, answer: JsonObjectFormat | JsonSchemaFormat) -> SchemaRule:
    """The same of an answer that calls nothing."""
    if isinstance(answer, JsonObjectFormat):
        return SchemaRule("answer", json.dumps(_beside_calls(form, {"type": "object"})))
    schema = answer.json_schema
    return SchemaRule(
        "answer",
        json.dumps(_beside_calls(form, schema.schema_)),
        strict=bool(schema.strict),
        otherwise=json.dumps(_beside_calls(form, {})),
        title="the schema of the answer",
        place="response_format",
    )


def _beside_calls(form: ToolFormat, schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of answers beside which calls look the same: an object whose members may have any name must not become a call
    whose arguments fit no schema."""
    properties, names = schema.get("properties", {}), schema.get("required", [])
    said = not isinstance(properties, dict) or form.arguments_key in properties or form.arguments_key in names
    if form.opening or said or OTHER_MEMBERS & schema.keys() or schema.get("additionalProperties") is False:
        return schema
    return {**schema, "properties": {**properties, form.arguments_key: False}}
