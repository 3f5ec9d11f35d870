"""The web page: a conversation with a model behind the API, by Gradio."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from arriero.serving.ui.answers import Answers
from arriero.serving.ui.client import AnswerError, ApiClient, Progress
from arriero.serving.ui.script import SCRIPT, plain, show
from arriero.serving.ui.words import CHINESE, ENGLISH, THOUGHT, status

TELL_SECONDS = 0.05  # a browser that draws each token of a fast model hears no click for seconds
MAX_MESSAGE = 100_000  # characters
FONTS = ["system-ui", "Segoe UI", "Roboto", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
CSS = """
.gradio-container { width: 100% !important; max-width: 56rem !important; margin: 0 auto !important; }
.gradio-container main { width: 100% !important; max-width: none !important; }
footer { display: none !important; }
#status { min-height: 1.5rem; opacity: 0.8; font-size: 0.9rem; }
#conversation { height: 58vh !important; }
#buttons { gap: 0.5rem !important; }
#buttons button { white-space: nowrap; min-width: 0 !important; }
#folded { display: none; }
#folded.open { display: flex; }
@media (max-width: 640px) {
  #conversation { height: 58vh !important; }
  #conversation .message-wrap { padding: 0.25rem !important; }
  #conversation .message-wrap .message-row { margin: 0.25rem !important; max-width: none !important; }
  #buttons { gap: 0.25rem !important; }
  #buttons button { padding: 0.4rem 0 !important; font-size: 0.66rem !important; font-weight: 500 !important; }
}
"""
# Gradio keeps its `css` to what is inside the page's frame, of which this is the edge.
EDGE = """.gradio-container, .gradio-container main { padding: 0.5rem !important; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { padding: 0 !important; }
  .gradio-container > .main { padding: 0.5rem !important; }
}"""
HEAD = f"<style>{EDGE}</style>{SCRIPT}"

Turns = list[dict[str, Any]]


def text_of(content: Any) -> str:
    """The text of a turn of the conversation that the page shows; Gradio gives it as a text or as parts."""
    parts = content if isinstance(content, list) else [content]
    return plain("".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts))


def shown(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn as the page shows it. Of a part Gradio leaves the blanks as they are, of a text alone it does not."""
    return {**turn, "content": [{"type": "text", "text": show(turn["content"])}]}


def messages_of(turns: Turns, system: str) -> list[dict[str, str]]:
    """The conversation for the API: roles take turns, as many chat templates demand."""
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for turn in turns:
        if is_thought(turn):
            continue
        role, text = str(turn["role"]), text_of(turn["content"])
        if messages and messages[-1]["role"] == role:
            text = f"{messages.pop()['content']}\n\n{text}"
        messages.append({"role": role, "content": text})
    return messages


def without_answer(history: Turns | None) -> Turns:
    """The conversation up to the person's last turn."""
    turns = list(history or [])
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return turns


def is_thought(turn: dict[str, Any]) -> bool:
    """Whether a turn is what the model thought before its answer, which is not said to it again."""
    return bool((turn.get("metadata") or {}).get("title"))


def answer_of(progress: Progress) -> Turns:
    """The turns of an answer: its thought, folded by Gradio, and what is said."""
    thought = {"role": "assistant", "content": progress.thought, "metadata": {"title": THOUGHT}}
    said = {"role": "assistant", "content": progress.text}
    return [*([thought] if progress.thought else []), *([said] if progress.text or not progress.thought else [])]


class Page:
    """The page's behaviour, apart from what it looks like.

    Nothing of a conversation is kept on the server: it lives in the browser's page, and in its storage.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client, self._answers = client, Answers()

    async def models(self, key: str, chosen: str | None) -> tuple[Any, str]:
        """The list of models and a line if there is none."""
        try:
            names = await self._client.models(key)
        except AnswerError as error:
            return gr.update(), show(status(error.word, error.detail))
        return gr.update(choices=names, value=chosen if chosen in names else next(iter(names), None)), ""

    async def model_list(self, key: str, chosen: str | None) -> Any:
        """The list of models, or the one that was there."""
        return (await self.models(key, chosen))[0]

    async def end(self, request: gr.Request) -> None:
        """End the answer under way."""
        self._answers.end(str(request.session_hash))

    async def answer(
        self,
        history: Turns | None,
        key: str,
        model: str | None,
        system: str,
        temperature: float,
        top_p: float,
        top_k: float,
        repetition_penalty: float,
        max_tokens: float,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, Any]]:
        """The conversation as the answer to its last turn grows, and the line under it.

        Args:
            history: None: nothing was asked.
        """
        turns = without_answer(history)
        if not turns:
            yield gr.skip(), gr.skip()
            return
        if max(len(text_of(turns[-1]["content"])), len(system)) > MAX_MESSAGE:
            yield history, status("too_long")
            return
        settings: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": int(top_k),
            "repetition_penalty": repetition_penalty,
        }
        if max_tokens:
            settings["max_tokens"] = int(max_tokens)
        if model:
            settings["model"] = model
        answered = history  # an answer that was there stays if no other comes
        yield history, ""  # of an event that gives nothing at all Gradio makes an empty conversation
        pieces = self._client.chat(key, messages_of(turns, system), settings)
        line, told = "", 0.0
        try:
            async for progress in self._answers.until_ended(str(request.session_hash), pieces):
                if progress.text or progress.thought:
                    answered = [*turns, *map(shown, answer_of(progress))]
                line = f"{progress.tokens} tokens, {progress.tokens_per_second:.1f} tokens/s"
                if time.monotonic() - told >= TELL_SECONDS:
                    told = time.monotonic()
                    yield answered, line
            if line:
                yield answered, line
        except AnswerError as error:
            yield answered, show(status(error.word, error.detail))

    def build(self) -> tuple[gr.Blocks, gr.I18n]:
        """The page itself, and the words that the browser chooses from."""
        words = gr.I18n(en=ENGLISH, zh=CHINESE, **{"zh-CN": CHINESE, "zh-TW": CHINESE})
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "multiple"}
        with gr.Blocks(title="arriero", analytics_enabled=False, fill_width=True) as page:
            conversation = gr.Chatbot(
                show_label=False,
                elem_id="conversation",
                sanitize_html=True,
                allow_tags=False,
                render_markdown=True,
                line_breaks=True,
                buttons=["copy", "copy_all"],
                feedback_options=None,
                allow_file_downloads=False,
            )
            line = gr.Markdown("", elem_id="status", sanitize_html=True)
            message = gr.Textbox(
                label=words("message"),  # for those who hear the page
                show_label=False,
                placeholder=words("placeholder"),
                lines=2,
                max_lines=8,
                elem_id="message",
                autofocus=True,
            )
            with gr.Row(elem_id="buttons"):
                send = gr.Button(words("send"), variant="primary", elem_id="send", min_width=60, size="md")
                stop = gr.Button(words("stop"), elem_id="stop", min_width=60, size="md")
                regenerate = gr.Button(words("regenerate"), elem_id="regenerate", min_width=60, size="md")
                roll_back = gr.Button(words("roll_back"), elem_id="roll_back", min_width=60, size="md")
                clear = gr.Button(words("clear"), elem_id="clear", min_width=60, size="md")
            with gr.Column(elem_id="settings"):
                # Not an accordion: what is in a closed one is only made when it opens, and an event's result that comes while
                # it is made empties what was just typed there.
                fold = gr.Button(words("settings"), size="sm")
                fold.click(None, None, None, js="() => arriero.fold()", **quiet)
            with gr.Column(elem_id="folded"):
                with gr.Row():
                    # Custom: Gradio refuses a value of which it has not just sent the list, as the one kept in the browser.
                    model = gr.Dropdown(
                        [], label=words("model"), elem_id="model", interactive=True, allow_custom_value=True
                    )
                    reload = gr.Button(words("reload"), elem_id="reload", min_width=130, scale=0, size="md")
                key = gr.Textbox("", label=words("key"), info=words("key_info"), type="password", elem_id="key")
                system = gr.Textbox("", label=words("system"), lines=2, elem_id="system")
                sampling = [
                    gr.Slider(0.0, 1.5, 0.95, step=0.05, label=words("temperature"), elem_id="temperature"),
                    gr.Slider(0.05, 1.0, 0.7, step=0.05, label=words("top_p"), elem_id="top_p"),
                    gr.Slider(0, 100, 0, step=1, label=words("top_k"), elem_id="top_k"),
                    gr.Slider(
                        1.0, 2.0, 1.2, step=0.05, label=words("repetition_penalty"), elem_id="repetition_penalty"
                    ),
                    gr.Slider(0, 2048, 0, step=1, label=words("max_tokens"), elem_id="max_tokens"),
                ]
            both = [conversation, message]

            def acting(triggers: list[Any], inputs: list[Any], change: str, asks: bool) -> None:
                """An action on the conversation, see `SCRIPT`: a change in the browser, and then perhaps an answer."""
                begun = gr.on(triggers, self.end, None, None, js="() => arriero.begin()", queue=False, **quiet)
                begun.failure(None, None, None, js="() => arriero.leave()", **quiet)
                last = begun.then(None, None, None, js="() => arriero.hold()", **quiet)
                last = last.then(None, inputs, inputs, js=change, **quiet)
                if asks:
                    asked = [conversation, key, model, system, *sampling]
                    ask = "(...values) => arriero.ask(...values)"
                    last = last.then(self.answer, asked, [conversation, line], js=ask, **quiet)
                    last.failure(None, None, None, js="() => arriero.letGo()", **quiet)
                    last = last.then(None, both, both, js="(...values) => arriero.giveBack(...values)", **quiet)
                last.then(None, None, None, js="() => arriero.letGo()", **quiet)

            acting([send.click, message.submit], both, "(...values) => arriero.take(...values)", True)
            acting([regenerate.click], [], "() => arriero.takeAgain()", True)
            acting([roll_back.click], both, "(...values) => arriero.back(...values)", False)
            acting([clear.click, conversation.clear], [conversation, line], "() => [[], '']", False)
            stop.click(self.end, None, None, queue=False, **quiet)

            values: list[Any] = [conversation, system, *sampling]
            load = f"() => arriero.load({len(values)})"
            page.load(None, None, values, js=load, **quiet)
            keep = "(...values) => { arriero.keep(...values); return []; }"
            gr.on([part.change for part in (model, *values)], None, [model, *values], None, js=keep, **quiet)
            # The line under the conversation, which may by then tell of an answer, is left alone: only the button writes it.
            listing = {"inputs": [key, model], **quiet}
            page.load(self.model_list, outputs=model, js="(...values) => arriero.model(...values)", **listing)
            gr.on([key.blur, key.submit], self.model_list, outputs=model, **listing)
            reload.click(self.models, outputs=[model, line], **listing)
        return page, words
