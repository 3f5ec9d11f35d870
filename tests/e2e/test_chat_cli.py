"""`arriero chat` and the options of `predict` that the engine brings, on the tiny model."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import re
import select
import shutil
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.data.tokenizer import load_tokenizer
from arriero.engine.engine import Engine
from arriero.engine.runner import BLOCK_SIZE, TorchRunner, Work
from arriero.formats.download import resolve_model
from arriero.formats.hf import load_model

SOURCE = Path(__file__).parents[2] / "src"
TINY = "__internal_testing__/tiny-random-llama"
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each sequence in each forward pass."""
    found: list[list[int]] = []
    original = TorchRunner.run

    def watched(self: TorchRunner, work: Sequence[Work]) -> torch.Tensor:
        found.extend(list(item.tokens) for item in work)
        return original(self, work)

    monkeypatch.setattr(TorchRunner, "run", watched)
    return found


def continued(prompt: list[int], count: int, **model: Any) -> list[int]:
    """The likeliest tokens, by whole forward passes without a cache."""
    folder = resolve_model(TINY)
    network, stops = load_model(folder, dtype=torch.float32), load_tokenizer(folder).stop_token_ids
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + count and tokens[-1] not in stops:
            tokens.append(int(network(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_second_turn_computes_only_what_is_new(
    in_process: Call, computed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["Tell me of the mule that carried nine loads over the hills", "And then?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    result = in_process("chat", "--model_name_or_path", TINY, "--max_new_tokens", "20", "--device", "cpu")
    tokenizer = load_tokenizer(resolve_model(TINY))
    turns: list[dict[str, str]] = []
    prompts, answers = [], []
    for line in lines:
        turns.append({"role": "user", "content": line})
        if tokenizer.has_chat_template():
            prompts.append(tokenizer.chat(turns, add_generation_prompt=True))
        else:
            prompts.append(tokenizer.encode("\n".join(turn["content"] for turn in turns), add_special_tokens=True))
        answers.append(continued(prompts[-1], 20))
        ended = answers[-1][-1] in tokenizer.stop_token_ids
        turns.append({"role": "assistant", "content": tokenizer.decode(answers[-1][:-1] if ended else answers[-1])})
    assert result.stdout == "".join(f"{turn['content']}\n" for turn in turns[1::2])
    second = next(tokens for tokens in computed[1:] if len(tokens) > 1)
    held = [*prompts[0], *answers[0]][:-1]  # the last token was not computed
    same = next((i for i, (a, b) in enumerate(zip(held, prompts[1], strict=False)) if a != b), len(held))
    assert same > BLOCK_SIZE
    assert second == prompts[1][same // BLOCK_SIZE * BLOCK_SIZE :]


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    rows = [f"one two three one two three one two {word}" for word in ("one", "three", "mule")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"src": row}) + "\n" for row in rows))
    return rows


def outputs(path: Path) -> list[str]:
    return [json.loads(line)["output"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_guesses_change_no_answer(in_process: Call, asked: list[str], tmp_path: Path) -> None:
    predict = ("predict", "--model_name_or_path", TINY, "--data_file", "asked.jsonl", "--max_new_tokens", "24")
    predict += ("--device", "cpu", "--predict_file")
    assert in_process(*predict, "plain.json").returncode == 0
    plain = outputs(tmp_path / "plain.json")
    assert any(plain)
    for more in ((), ("--draft_model", TINY)):  # the model itself: its guesses are always right
        result = in_process(*predict, "guessed.json", "--num_speculative_tokens", "3", *more)
        assert outputs(tmp_path / "guessed.json") == plain
        line = result.stdout.splitlines()[-1]
        assert line.startswith("guessed ")
        share = int(line.split(" of which ")[1].split(" %")[0])
        assert not more or share > 80  # not all: an answer may end within them


def test_answers_fit_a_schema(in_process: Call, asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"enum": [1, 22]}, "minItems": 2, "maxItems": 2}')
    arguments = ("predict", "--model_name_or_path", TINY, "--data_file", "asked.jsonl", "--device", "cpu")
    result = in_process(
        *arguments, "--json_schema", "schema.json", "--predict_file", "p.json", "--max_new_tokens", "200"
    )
    assert result.returncode == 0, result.stderr
    for answer in outputs(tmp_path / "p.json"):
        made = json.loads(answer)
        assert len(made) == 2
        assert set(made) <= {1, 22}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read (No such file or directory)"), (b"\xff", "not a UTF-8"), (b"[", "is not JSON")],
)
def test_a_bad_schema_is_one_line(
    content: bytes | None, message: str, in_process: Call, asked: list[str], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "schema.json").write_bytes(content)
    result = in_process(
        *("predict", "--model_name_or_path", TINY, "--data_file", "asked.jsonl", "--device", "cpu"),
        *("--json_schema", "schema.json"),
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1  # a progress bar leaves nothing
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "prediction.json").exists()


def test_places_that_answers_cannot_have_are_refused_before_the_work(
    in_process: Call, asked: list[str], tmp_path: Path, computed: list[list[int]]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "same.jsonl").symlink_to("asked.jsonl")
    before = (tmp_path / "asked.jsonl").read_bytes()
    arguments = ("predict", "--model_name_or_path", TINY, "--data_file", "asked.jsonl", "--device", "cpu")
    for place, reason in {
        "folder": "is a folder",
        "asked.jsonl/x.json": "cannot be written (File exists)",
        "same.jsonl": "this run reads that file",
        "/proc/nothing": "cannot be written",
    }.items():
        result = in_process(*arguments, "--predict_file", place)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert f"--predict_file {place}: {reason}" in result.stderr
    (tmp_path / "dev.json").write_text('{"src": "a b", "tgt": "c"}\n')
    arguments = ("evaluate", "--model_name_or_path", TINY, "--dataset_path", ".", "--device", "cpu")
    for place, reason in {"dev.json": " is a file: name a folder", "/proc/nothing": ": cannot be written"}.items():
        result = in_process(*arguments, "--output_dir", place)
        assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, ""), result.stderr
        assert f"--output_dir {place}{reason}" in result.stderr
    assert not computed
    assert (tmp_path / "asked.jsonl").read_bytes() == before


def test_answers_go_through_links_and_into_pipes(in_process: Call, asked: list[str], tmp_path: Path) -> None:
    arguments = ("predict", "--model_name_or_path", TINY, "--data_file", "asked.jsonl", "--device", "cpu")
    arguments += ("--max_new_tokens", "4", "--predict_file")
    (tmp_path / "link.json").symlink_to("made/target.json")
    (tmp_path / "made").mkdir()
    assert in_process(*arguments, "link.json").returncode == 0
    assert (tmp_path / "link.json").is_symlink()
    found = outputs(tmp_path / "made/target.json")
    assert len(found) == 3
    assert os.listdir(tmp_path / "made") == ["target.json"]
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        try:
            assert in_process(*arguments, "pipe").returncode == 0
            text, _ = reader.communicate(timeout=60)
        finally:
            reader.kill()
    assert [json.loads(line)["output"] for line in text.splitlines()] == found
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_text_that_no_encoding_has(in_process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a surrogate pair, as JSON may have it and as a terminal's broken UTF-8 arrives."""
    (tmp_path / "asked.jsonl").write_text('{"src": "a\\ud800 \\ud83d\\ude42"}\n')
    arguments = ("--model_name_or_path", TINY, "--device", "cpu", "--max_new_tokens", "4")
    result = in_process("predict", *arguments, "--data_file", "asked.jsonl", "--predict_file", "p.json")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))["src"] == "a\ufffd \U0001f642"
    monkeypatch.setattr("sys.stdin", io.StringIO("x\udcff\n"))
    assert in_process("chat", *arguments).returncode == 0


@pytest.mark.parametrize("verb", ["chat", "predict"])
def test_keys_and_values_in_fewer_bits(
    verb: str, in_process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = TorchRunner.run

    def watched(self: TorchRunner, work: Sequence[Work]) -> torch.Tensor:
        seen.append(self.kv_memory.format)
        return original(self, work)

    monkeypatch.setattr(TorchRunner, "run", watched)
    own = {"chat": ("--prompt", "Where does the mule sleep?"), "predict": ("--predict_file", str(tmp_path / "answers"))}
    common = (verb, "--model_name_or_path", TINY, "--max_new_tokens", "3", "--device", "cpu", *own[verb])
    for name, held in (("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"), ("bfloat16", "bfloat16"), ("auto", "float32")):
        result = in_process(*common, "--kv_cache_dtype", name)
        assert result.returncode == 0, result.stderr
        assert set(seen) == {held}
        seen.clear()
    result = in_process(*common, "--kv_cache_dtype", "int4")
    assert (result.returncode, len(result.stderr.splitlines()), seen) == (2, 1, [])
    assert "--kv_cache_dtype takes one of auto, float16, bfloat16, fp8_e4m3, int8, not 'int4'" in result.stderr


# At a terminal

# A terminal of its own, as a shell gives it.
BEGIN = "import fcntl, os, sys, termios, time\nos.setsid()\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
# Every message is answered with itself as Python writes it, and how many turns there are.
ECHO = """
from arriero.commands.chat_terminal import talk, unread_input_dropped

def answer(turns, stopped):
    message = turns[-1]["content"]
    yield f"{len(turns)}:{message!r}" if len(message) < 500 else f"{len(turns)}:{len(message)}"
    if message == "escape":
        yield "\\x1b]0;title\\x07 \\x9b31m \\x7f\\r\\tend"
    while message.startswith("wait") and not stopped():
        time.sleep(0.01)
    yield "."

with unread_input_dropped():
    talk([], answer, "model")
"""


class Terminal:
    """A Python program at a terminal."""

    def __init__(self, program: str) -> None:
        self.master, self.slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TERM": "xterm", "INPUTRC": "/dev/null"}
        handles = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = subprocess.Popen([sys.executable, "-c", BEGIN + program], env=environment, **handles)
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def type(self, text: str, until: str | None = None, seconds: float = 60) -> str:
        """Type a text, and wait until something is shown; returns what was shown since."""
        left, before = text.encode(), len(self.shown)
        ends = time.monotonic() + seconds
        while left or (until is not None and until not in self.shown[before:]):
            assert time.monotonic() < ends, self.shown[before:]
            readable, writable, _ = select.select([self.master], [self.master] if left else [], [], 0.1)
            if readable:
                self.shown += self._decoder.decode(os.read(self.master, 65536))
            if writable:
                left = left[os.write(self.master, left[:512]) :]
        return self.shown[before:]

    def end(self) -> int:
        """The exit code."""
        ends = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < ends, self.shown
            if select.select([self.master], [], [], 0.05)[0]:
                self.shown += self._decoder.decode(os.read(self.master, 65536))
        return self.process.returncode

    def left_for_the_shell(self) -> bytes:
        """What was typed and not read."""
        state = termios.tcgetattr(self.slave)
        state[3] &= ~termios.ICANON
        state[6][termios.VMIN] = state[6][termios.VTIME] = 0
        termios.tcsetattr(self.slave, termios.TCSANOW, state)
        return os.read(self.slave, 4096)


def test_a_paste_is_one_message_and_none_of_it_is_for_the_shell() -> None:
    with Terminal(ECHO) as terminal:
        assert "/exit" in terminal.type("", "> ")
        terminal.type("\x1b[200~one\n\n/exit\n\x04rm -rf x\n\x1b[201~\r", r"1:'one\n\n/exit\n\x04rm -rf x'.")
        terminal.type("\r  \r\rhow are /you\r", "3:'how are /you'.")  # empty lines are nothing
        terminal.type("/usr\r", "5:'/usr'.")
        terminal.type("\x1b[A\r", "7:'/usr'.")  # the line before
        terminal.type("/clear\r", "> ")
        terminal.type("é" * 6000 + "\r", "1:6000.")
        assert "/clear" in terminal.type("/help\r", "stops an answer")
        # a terminal that does not bracket what is pasted
        terminal.type("\n\na\n/exit\ntouch evil\n")
        assert terminal.end() == 0
        assert "touch evil" not in terminal.shown.split("3:'a'.")[1]
        assert terminal.left_for_the_shell() == b""


def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends() -> None:
    with Terminal(
        f"from arriero.cli import main\nfrom arriero.commands import chat\n"
        f"chat.run = lambda *_: exec({ECHO!r}, globals()) or 0\n"
        f"sys.exit(main(['chat', 'm']))"
    ) as terminal:
        terminal.type("", "> ")
        terminal.type("wait\r", "1:'wait'")
        assert "^C.\r\n" in terminal.type("\x03", "\x1b[?2004h> ")
        assert "3:'go on'." in terminal.type("go on\r", "\n\x1b[?2004h> ")  # with the answer as far as it came
        time.sleep(0.5)  # a signal just before CPython waits for a key is seen at the next one
        terminal.type("\x03")
        assert terminal.end() == 130
        assert termios.tcgetattr(terminal.slave)[3] & termios.ICANON
    with Terminal(ECHO) as terminal:
        terminal.type("", "> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_a_real_answer_is_stopped_between_steps() -> None:
    command = ["chat", "--model_name_or_path", TINY, "--device", "cpu", "--max_new_tokens", "1900"]
    slow = (
        "from arriero.engine.runner import TorchRunner\nrun = TorchRunner.run\n"
        "TorchRunner.run = lambda *given: time.sleep(0.02) or run(*given)\n"
    )
    program = f"{slow}from arriero.cli import main\nsys.exit(main({[*command, '--min_new_tokens', '1900']!r}))"
    with Terminal(program) as terminal:
        terminal.type("", "> ", 120)
        for _ in range(2):
            terminal.type("hello there\r", "\x1b[?2004l")
            time.sleep(0.3)
            assert "\x1b[?2004h> " not in terminal.type("", seconds=1)
            terminal.type("\x03", "\x1b[?2004h> ", 10)  # all of it takes 38 s
            terminal.type("/clear\r", "\x1b[?2004h> ")
        terminal.type("/quit\r")
        assert terminal.end() == 0


def test_what_a_model_says_does_not_steer_the_terminal(
    in_process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Terminal(ECHO) as terminal:
        terminal.type("", "> ")
        shown = terminal.type("escape\r", "end.")
    assert "\ufffd]0;title\ufffd \ufffd31m \ufffd\ufffd" in shown
    assert re.search("\x1b\\]|\x07|\x9b|\x7f", shown) is None
    # in a pipe and in a file it is as it was
    row = "one \x1b[31m two \x07\n\tthree"
    (tmp_path / "asked.jsonl").write_text(json.dumps({"src": row}) + "\n")
    predict = ("predict", "--model_name_or_path", TINY, "--data_file", "asked.jsonl", "--max_new_tokens", "2")
    result = in_process(*predict, "--device", "cpu", "--predict_file", "p.json")
    assert result.stdout.startswith(row)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    result = in_process(*predict, "--device", "cpu", "--predict_file", "p.json")
    assert result.stdout.startswith("one \ufffd[31m two \ufffd\n\tthree"), result.stdout
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))["src"] == row


def test_an_empty_line_of_a_pipe_is_nothing(in_process: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\nhello\n\n \nagain\n/exit\nnever\n"))
    asked: list[Any] = []
    monkeypatch.setattr(
        "arriero.commands.chat._prompt", lambda _, turns, variables: asked.append(list(turns)) or [1, 2, 3]
    )
    assert in_process("chat", "--model_name_or_path", TINY, "--device", "cpu", "--max_new_tokens", "2").returncode == 0
    assert [turns[-1]["content"] for turns in asked] == ["hello", "again"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("enable_thinking", "takes a JSON object, such as"),
        ("[1]", "takes a JSON object, such as"),
        ('{"a b": 1}', "'a b' is no name of a variable"),
        ('{"messages": "x"}', "'messages' is what the template is told otherwise"),
        ('{"bos_token": "x"}', "'bos_token' is what the template is told otherwise"),
        ('{"a": [1]}', "'a' must be true, false, null, a number, or a text"),
        ('{"a": NaN}', "'a' must be true, false, null, a number, or a text"),
        ('{"a": "' + "x" * 1025 + '"}', "a text of up to 1024 characters"),
        (json.dumps({f"a{i}": 1 for i in range(17)}), "17 variables"),
    ],
)
def test_variables_that_are_not_to_be_set(given: str, message: str, in_process: Call) -> None:
    result = in_process("chat", "--model_name_or_path", TINY, "--prompt", "x", "--chat_template_kwargs", given)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--chat_template_kwargs" in result.stderr
    assert message in result.stderr


def test_the_template_is_told_variables(in_process: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{ enable_thinking }}{{ level }}{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = tmp_path / "model"
    shutil.copytree(resolve_model(TINY), folder)
    (folder / "chat_template.jinja").write_text(source)
    prompts: list[list[int]] = []
    original = Engine.submit

    def watched(self: Engine, prompt: list[int], *given: Any, **more: Any) -> Any:
        prompts.append(list(prompt))
        return original(self, prompt, *given, **more)

    monkeypatch.setattr(Engine, "submit", watched)
    command = (
        "chat",
        "--model_name_or_path",
        str(folder),
        "--device",
        "cpu",
        "--max_new_tokens",
        "1",
        "--prompt",
        "hi",
    )
    told = '{"enable_thinking": false, "level": "low </s>"}'
    assert in_process(*command, "--chat_template_kwargs", told).returncode == 0
    assert prompts == [load_tokenizer(folder).encode("Falselow </s>hi")]  # the name of a token in it stays text
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink()
    result = in_process(*command, "--chat_template_kwargs", told)
    assert (result.returncode, "has no chat template" in result.stderr) == (2, True)
