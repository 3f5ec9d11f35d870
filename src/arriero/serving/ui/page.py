"""The web page: a conversation with a model behind the API, by Gradio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from arriero.serving.ui.client import AnswerError, ApiClient, Progress
from arriero.serving.ui.words import CHINESE, ENGLISH, THOUGHT, status

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
  #buttons button { padding: 0.4rem 0 !important; font-size: 0.8rem !important; }
}
"""
# Nothing is loaded from elsewhere: a picture in an answer would tell its server what was said. Gradio's scripts are inline.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; connect-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; font-src 'self' data:; frame-src 'none'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)
# Gradio keeps its `css` to what is inside the page's frame, of which this is the edge.
EDGE = """.gradio-container, .gradio-container main { padding: 0.5rem !important; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { padding: 0 !important; }
  .gradio-container > .main { padding: 0.5rem !important; }
}"""
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{EDGE}</style>'

FOLD = "() => { document.querySelector('#folded').classList.toggle('open'); }"

Turns = list[dict[str, Any]]


def text_of(content: Any) -> str:
    """A turn's text; Gradio gives it as a text or as parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def said(history: Turns | None, text: str) -> Turns:
    """The conversation with the person's next turn."""
    return [*(history or []), {"role": "user", "content": text}]


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

    Nothing of a conversation is kept on the server: it lives in the browser's page.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    async def models(self, key: str, chosen: str | None) -> tuple[Any, str]:
        """The list of models and a line if there is none."""
        try:
            names = await self._client.models(key)
        except AnswerError as error:
            return gr.update(), status(error.word, error.detail)
        return gr.update(choices=names, value=chosen if chosen in names else names[0]), ""

    async def model_list(self, key: str, chosen: str | None) -> Any:
        """The list of models, or the one that was there."""
        return (await self.models(key, chosen))[0]

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
    ) -> AsyncIterator[tuple[Turns, str]]:
        """The conversation as the answer to its last turn grows, and the line under it."""
        turns = without_answer(history)
        if not turns:
            yield turns, status("empty")
            return
        messages = [
            {"role": str(turn["role"]), "content": text_of(turn["content"])} for turn in turns if not is_thought(turn)
        ]
        if system.strip():
            messages.insert(0, {"role": "system", "content": system})
        settings: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": int(top_k),
            "repetition_penalty": repetition_penalty,
            "max_tokens": int(max_tokens),
        }
        if model:
            settings["model"] = model
        answered: Turns = [*turns, {"role": "assistant", "content": ""}]
        try:
            async for progress in self._client.chat(key, messages, settings):
                answered = [*turns, *answer_of(progress)]
                yield answered, f"{progress.tokens} tokens, {progress.tokens_per_second:.1f} tokens/s"
        except AnswerError as error:
            yield answered if answered[-1]["content"] else turns, status(error.word, error.detail)

    def build(self) -> tuple[gr.Blocks, gr.I18n]:
        """The page itself, and the words that the browser chooses from."""
        words = gr.I18n(en=ENGLISH, zh=CHINESE, **{"zh-CN": CHINESE, "zh-TW": CHINESE})
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
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
                show_label=False,
                placeholder=words("placeholder"),
                lines=2,
                max_lines=8,
                max_length=MAX_MESSAGE,
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
                fold.click(None, None, None, js=FOLD, **quiet)
            with gr.Column(elem_id="folded"):
                with gr.Row():
                    model = gr.Dropdown([], label=words("model"), elem_id="model", interactive=True)
                    reload = gr.Button(words("reload"), elem_id="reload", min_width=130, scale=0, size="md")
                key = gr.Textbox("", label=words("key"), info=words("key_info"), type="password", elem_id="key")
                system = gr.Textbox("", label=words("system"), lines=2, max_length=MAX_MESSAGE, elem_id="system")
                sampling = [
                    gr.Slider(0.0, 1.5, 0.95, step=0.05, label=words("temperature"), elem_id="temperature"),
                    gr.Slider(0.05, 1.0, 0.7, step=0.05, label=words("top_p"), elem_id="top_p"),
                    gr.Slider(0, 100, 0, step=1, label=words("top_k"), elem_id="top_k"),
                    gr.Slider(
                        1.0, 2.0, 1.2, step=0.05, label=words("repetition_penalty"), elem_id="repetition_penalty"
                    ),
                    gr.Slider(1, 2048, 256, step=1, label=words("max_tokens"), elem_id="max_tokens"),
                ]
            inputs = [conversation, key, model, system, *sampling]
            answering = {"fn": self.answer, "inputs": inputs, "outputs": [conversation, line], **quiet}

            def take(history: Turns | None, text: str) -> tuple[Turns, str]:
                return (said(history, text), "") if text.strip() else (list(history or []), text)

            def back(history: Turns | None) -> tuple[Turns, str]:
                turns = without_answer(history)
                return (turns[:-1], text_of(turns[-1]["content"])) if turns else ([], "")

            sent = [
                trigger(take, [conversation, message], [conversation, message], queue=False, **quiet).then(**answering)
                for trigger in (send.click, message.submit)
            ]
            again = regenerate.click(**answering)
            running = [*sent, again]
            stop.click(None, None, None, cancels=running, **quiet)
            for button, change, changed in (
                (roll_back, back, [conversation, message]),
                (clear, lambda history: ([], ""), [conversation, line]),
            ):  # first the end of an answer under way, or its next piece would bring everything back
                ended = button.click(None, None, None, cancels=running, **quiet)
                ended.then(change, [conversation], changed, queue=False, **quiet)
            # The line under the conversation, which may by then tell of an answer, is left alone: only the button writes it.
            listing = {"fn": self.models, "inputs": [key, model], **quiet}
            page.load(**{**listing, "fn": self.model_list}, outputs=model)
            key.change(**{**listing, "fn": self.model_list}, outputs=model)
            reload.click(**listing, outputs=[model, line])
        return page, words
