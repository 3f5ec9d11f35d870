"""The items of an answer of /v1/responses, and the events that tell of them."""

from __future__ import annotations

import uuid
from typing import Any

from arriero.serving.openai.call_reader import Part
from arriero.serving.openai.token_text import MessageLogprobs

Event = dict[str, Any]


class Items:
    """The items of an answer while they grow: a thought, messages, and calls of functions."""

    def __init__(self, logprobs: MessageLogprobs | None = None) -> None:
        """
        Args:
            logprobs: which tokens' log-probabilities go with a message's text; None: they are not wanted.
        """
        self.output: list[dict[str, Any]] = []
        self._open, self._logprobs = False, logprobs

    def take(self, part: Part) -> list[Event]:
        """The events of a part."""
        events: list[Event] = []
        if part.thought:
            if not self._open:
                events += self._begin_thought()
            item = self.output[-1]
            item["content"][0]["text"] += part.text
            return [*events, self._event("response.reasoning_text.delta", item, content_index=0, delta=part.text)]
        if part.call is None:
            if not self._open or self.output[-1]["type"] != "message":
                events += self.close()
                events += self._begin_message()
            item = self.output[-1]
            logprobs = self._logprobs.take(part.text, part.passed) if self._logprobs is not None else []
            item["content"][0]["text"] += part.text
            item["content"][0]["logprobs"] += logprobs
            return [
                *events,
                self._event("response.output_text.delta", item, content_index=0, delta=part.text, logprobs=logprobs),
            ]
        if part.name is not None:
            events += self.close()
            call = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": part.id, "name": part.name}
            self.output.append({**call, "arguments": "", "status": "in_progress"})
            self._open = True
            return [*events, self._item("response.output_item.added")]
        item = self.output[-1]
        item["arguments"] += part.text
        return [self._event("response.function_call_arguments.delta", item, delta=part.text)]

    def close(self, status: str = "completed") -> list[Event]:
        """The events of the last item's end."""
        if not self._open:
            return []
        self._open = False
        item = self.output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = self._event(
                "response.function_call_arguments.done", item, arguments=item["arguments"], name=item["name"]
            )
            return [done, self._item("response.output_item.done")]
        content = item["content"][0]
        said = item["type"] == "message"
        text = _told(content, "text", "logprobs") if said else _told(content, "text")
        return [
            self._event(f"response.{'output' if said else 'reasoning'}_text.done", item, content_index=0, **text),
            self._event("response.content_part.done", item, content_index=0, part=_told(content, *content)),
            self._item("response.output_item.done"),
        ]

    def end(self, status: str, *, nothing: bool = False) -> list[Event]:
        """The events of the end.

        Args:
            nothing: an answer without any item stays so; else it is an empty message.
        """
        thought = len(self.output) == 1 and self.output[0]["type"] == "reasoning"
        events = self.take(Part("")) if not nothing and (not self.output or thought) else []
        return events + self.close(status)

    def _begin_message(self) -> list[Event]:
        item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", "role": "assistant"}
        return self._begin(item, {"type": "output_text", "text": "", "annotations": [], "logprobs": []})

    def _begin_thought(self) -> list[Event]:
        item = {"type": "reasoning", "id": f"rs_{uuid.uuid4().hex}", "status": "in_progress", "summary": []}
        return self._begin(item, {"type": "reasoning_text", "text": ""})

    def _begin(self, item: dict[str, Any], part: dict[str, Any]) -> list[Event]:
        self.output.append({**item, "content": []})
        self._open = True
        added = self._item("response.output_item.added")
        self.output[-1]["content"].append(part)
        return [
            added,
            self._event("response.content_part.added", self.output[-1], content_index=0, part=_told(part, *part)),
        ]

    def _event(self, kind: str, item: dict[str, Any], **fields: Any) -> Event:
        return {"type": kind, "item_id": item["id"], "output_index": len(self.output) - 1, **fields}

    def _item(self, kind: str) -> Event:
        item = dict(self.output[-1])
        if "content" in item:
            item["content"] = [_told(part, *part) for part in item["content"]]
        return {"type": kind, "output_index": len(self.output) - 1, "item": item}


def _told(content: dict[str, Any], *names: str) -> dict[str, Any]:
    """Fields of a part as they are now; it goes on to grow."""
    return {name: list(content[name]) if isinstance(content[name], list) else content[name] for name in names}
