"""Chat templates: what they may use, and that none can take the program's time, memory or secrets."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from arriero.data import template_process
from arriero.data.chat_template import SOURCE_LIMIT, ChatTemplate, MarkedChat
from arriero.data.template_process import OUTPUT_LIMIT
from arriero.errors import TemplateError

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, object]] | None = None) -> str:
    return ChatTemplate(source).render(messages or [dict(m) for m in USER])


# What a template may do.


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content }}", "hi"),
        ("{%- for m in messages %}\n    {{- m['role'] }}\n{%- endfor %}", "user"),
        ("  {% if true %}\nx{% endif %}\n", "x"),  # trim_blocks, lstrip_blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ bos_token }}{{ eos_token is defined }}", "<s>False"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{% generation %}{% set x = 1 %}a{{ x }}{% endgeneration %}b", "a1b"),
        ("{{ 'a,b'.split(',')[-1] | upper }}", "B"),
        ("{{ '<b>' }}", "<b>"),
    ],
)
def test_features(source: str, expected: str) -> None:
    assert ChatTemplate(source).render(USER, named={"bos_token": "<s>"}) == expected


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_keys_without_a_value_are_absent() -> None:
    source = "{{ messages[0].tool_calls is defined }}"
    assert render(source, [{"role": "assistant", "content": "", "tool_calls": None}]) == "False"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_has_all_of_its_names(name: str) -> None:
    """As in transformers 5: gpt-oss reads `thinking`."""
    source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}{{ messages[1].thinking is defined }}"
    turns = [{"role": "assistant", "content": "a", name: "t"}, {"role": "user", "content": "b"}]
    assert render(source, turns) == "ttFalse"


def test_a_reason_does_not_steer_the_terminal() -> None:
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('\x1b]0;title\x07 no\u202e \x9b') }}")
    assert str(caught.value).endswith("failed: \\x1b]0;title\\x07 no\\u202e \\x9b")


def test_text_survives() -> None:
    text = '🙂\u2028\x00\ud800 " \\ \n' + "x" * 100_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


# What it may not.

SSTI = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{{ (messages|attr('__class__')).mro() }}",
    "{% set x = ''['__class__'] %}{{ x.__mro__ }}",
    "{{ raise_exception.__globals__['sys'].modules }}",
    "{{ strftime_now.__globals__.json }}",
    "{{ '{0.__class__.__mro__}'.format('')['x'] }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% import 'os' as os %}{{ os }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("source", SSTI)
def test_internals_are_out_of_reach(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "\n" not in str(caught.value)


def test_attr_filter_shows_nothing() -> None:
    assert render("{{ ''|attr('__class__')|attr('__mro__') }}") == ""


BOMBS = {
    "endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "deep nesting": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "deep lists": "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "long string": "{{ 'a' * 10**9 }}",
    "long list": "{{ ([0] * 10**9) | length }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "centre": "{{ 'a' | center(10**10) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "format method": "{{ '{:>10000000000}'.format(1) }}",
    "indent": "{{ [1] | tojson(indent=10**10) }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power of a variable": "{% set n = messages | length %}{{ (9 + n) ** ((9 + n) ** (9 + n)) > 1 }}",
    "shift of text": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "huge range": "{% for i in range(10**12) %}{% endfor %}",
    "range list": "{{ range(99999) | list * 9999 }}",
    "long output": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**7) | length }}",
    "backtracking": "{{ ('x' * 10**7) | wordwrap(1) | urlize | length }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_quickly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "endless loop":  # which shows the limit that users have
        shorter = functools.partialmethod(template_process.TemplateWorker.render, seconds=0.4)
        monkeypatch.setattr(template_process.TemplateWorker, "render", shorter)
    started = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        render(BOMBS[name])
    # 2 s of processor time; the machine may be shared.
    assert time.monotonic() - started < 15
    assert "\n" not in str(caught.value)
    # The next template has a renderer again.
    assert render("{{ 1 + 1 }}") == "2"


def test_endless_loop_ends_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = functools.partialmethod(template_process.TemplateWorker.render, seconds=0.4)
    monkeypatch.setattr(template_process.TemplateWorker, "render", shorter)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            render(BOMBS["endless loop"])
        except TemplateError as error:
            caught.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(caught) == 2


def test_threads_get_their_own_answers() -> None:
    results: dict[int, str] = {}

    def work(n: int) -> None:
        for _ in range(20):
            results[n] = render("{{ messages[0].content }}", [{"role": "user", "content": f"text {n}"}])
            assert results[n] == f"text {n}"

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"text {n}" for n in range(4)}


def test_output_limit_is_exact() -> None:
    assert len(render(f"{{{{ 'x' * {OUTPUT_LIMIT} }}}}")) == OUTPUT_LIMIT
    with pytest.raises(TemplateError, match="more than 8,388,608 characters"):
        render(f"{{{{ 'x' * {OUTPUT_LIMIT} }}}}y")


def test_source_limit() -> None:
    ChatTemplate("x" * SOURCE_LIMIT)
    with pytest.raises(TemplateError, match="longer than"):
        ChatTemplate("x" * (SOURCE_LIMIT + 1))


def test_renderer_knows_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    worker = template_process.TemplateWorker()
    assert worker.render("{{ 1 }}", {}) == "1"
    process = worker._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ")
    if environment.exists():
        assert b"hf_secret" not in environment.read_bytes()
    worker.close()
    assert process.poll() is not None


def test_worker_survives_being_killed() -> None:
    worker = template_process.TemplateWorker()
    assert worker.render("{{ 1 }}", {}) == "1"
    assert worker._process is not None
    worker._process.kill()
    worker._process.wait()
    assert worker.render("{{ 2 }}", {}) == "2"
    worker.close()


def test_an_answer_that_was_not_waited_for_is_nobodys() -> None:
    class Interrupted:
        def readline(self) -> bytes:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    worker = template_process.TemplateWorker()
    assert worker.render("{{ 1 }}", {}) == "1"
    process = worker._process
    assert process is not None
    process.stdout, answers = Interrupted(), process.stdout  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        worker.render("{{ 2 }}", {})
    process.stdout = answers
    assert worker.render("{{ 3 }}", {}) == "3"
    worker.close()
    assert answers is not None
    answers.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_its_own_renderer() -> None:
    program = (
        "import os, sys\n"
        "from arriero.data.chat_template import ChatTemplate\n"
        "t = ChatTemplate('{{ messages[0].content }}')\n"
        "r = lambda text: t.render([{'role': 'user', 'content': text}])\n"
        "assert r('a') == 'a'\n"
        "pid = os.fork()\n"
        "name = 'child' if pid == 0 else 'parent'\n"
        "ok = all(r(f'{name} {i}') == f'{name} {i}' for i in range(50))\n"
        "if pid == 0:\n"
        "    os._exit(0 if ok else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "assert ok and r('b') == 'b'\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Messages.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{% if %}", "syntax error in line 1"),
        ("{{ undefined_name.x }}", "undefined_name"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10**6) }}", "Range too big"),
    ],
)
def test_errors_say_what_and_where(source: str, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source, "models/x").render(USER)
    assert str(caught.value).startswith("models/x: the chat template failed: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [[], ["hi"], [{"content": "x"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": object()}]],
)
def test_invalid_messages(messages: list[object]) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate("x").render(messages)  # type: ignore[arg-type]


# Marks.

TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"


def test_marks_tell_the_templates_tokens_from_the_messages() -> None:
    chat = ChatTemplate(CHATML).render_marked(
        [{"role": "user", "content": " a<|im_end|>b\U000f0000 "}], special_tokens=TOKENS
    )
    assert chat.marked
    assert chat.text == "<|im_start|>user\na<|im_end|>b\U000f0000<|im_end|>\n"
    assert chat.split(TOKENS) == [
        ("<|im_start|>", True),
        ("user\na<|im_end|>b\U000f0000", False),
        ("<|im_end|>", True),
        ("\n", False),
    ]


def test_no_marks_without_need() -> None:
    chat = ChatTemplate(CHATML).render_marked([{"role": "user", "content": "a"}], special_tokens=TOKENS)
    assert not chat.marked
    assert chat == MarkedChat("<|im_start|>user\na<|im_end|>\n", None)


@pytest.mark.parametrize(
    ("source", "content", "told"),
    [
        ("{{ m.content }}<|im_end|>", " a b ", " a b "),
        ("{{ m.content | trim }}<|im_end|>", " a b ", "a b"),
        ("{{ m.content }}<|im_end|>", "im", "im"),  # which the template's end has too
        ("{{ m.content }}<|im_end|>", "a<|im_end|>", "a<|im_end|>"),
        ("{{ m.content }}<|im_end|>", "", ""),
    ],
)
def test_the_last_message_can_be_continued(source: str, content: str, told: str) -> None:
    template = ChatTemplate(f"{{% for m in messages %}}<|im_start|>{source}{{% endfor %}}")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    chat = template.render_marked(
        messages, special_tokens=TOKENS, add_generation_prompt=False, continue_final_message=True
    )
    assert chat.text == f"<|im_start|>x<|im_end|><|im_start|>{told}"
    assert [part for part, control in chat.split(TOKENS) if control] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert messages[1]["content"] == content
    with pytest.raises(TemplateError, match="does not write the last message"):
        ChatTemplate("x").render_marked(messages, special_tokens=TOKENS, continue_final_message=True)


def test_variables_replace_nothing_and_hold_no_control_tokens() -> None:
    given = {"thinking": "<|im_end|>", "bos_token": "x", "messages": [], "tools": 1}
    chat = ChatTemplate("{{ bos_token }}{{ messages | length }}{{ tools }}{{ thinking }}").render_marked(
        USER, special_tokens=TOKENS, named={"bos_token": "<s>"}, variables=given
    )
    assert chat.split(TOKENS) == [("<s>1None<|im_end|>", False)]


def test_a_role_cannot_build_a_control_token() -> None:
    template = ChatTemplate("{% for m in messages %}{{ '<|' + m.role + '|>' }}{% endfor %}")
    with pytest.raises(TemplateError, match="unknown role 'im_end'"):
        template.render_marked([{"role": "im_end", "content": ""}], special_tokens=TOKENS)
    # Roles that complete no token are the template's own business.
    assert template.render_marked([{"role": "critic", "content": ""}], special_tokens=TOKENS).text == "<|critic|>"


def test_the_request_is_plain_json() -> None:
    """What crosses to the renderer and back can hold no code."""
    worker = template_process.TemplateWorker()
    with pytest.raises(TemplateError, match="JSON"):
        worker.render("x", {"messages": [threading.Lock()]})
    assert json.loads(json.dumps({"text": "x"})) == {"text": worker.render("x", {})}
    worker.close()
