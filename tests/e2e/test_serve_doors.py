"""What must not come in, what must not go out, and what must not bring the server down: a test for each lesson of the
advisories against other servers (named in the comments)."""

from __future__ import annotations

import concurrent.futures
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from served import SOURCE, Served

KEY, OTHER = "k" * 24 + "-one", "k" * 24 + "-two"
HELLO: Any = [{"role": "user", "content": "Hello there"}]
# Written as sitecustomize.py: whatever the server connects to is noted, and refused if it is not this machine.
GUARD = """
import os, socket
_connect = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX:
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(repr(address) + "\\n")
        raise OSError("no way out")
    return _connect(self, address)
socket.socket.connect = connect
"""


@pytest.fixture(scope="module")
def connections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guard") / "connections"


@pytest.fixture(scope="module")
def served(connections: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# who may ask\nalice {KEY}\n{OTHER}\n", encoding="utf-8")
    keys.chmod(0o600)
    (connections.parent / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    paths = f"{connections.parent}:{SOURCE}"
    with Served("--api_key_file", str(keys), env={"PYTHONPATH": paths, "CONNECTIONS": str(connections)}) as server:
        yield server
    assert not connections.exists(), connections.read_text()  # the server has asked nobody for anything


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, **fields})


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": "To be", "max_tokens": 2, **fields})


def gauge(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


def test_every_route_needs_a_key_but_health(served: Served, http: httpx.Client) -> None:
    """vLLM guards /v1 alone; CVE-2025-59425 (comparison)."""
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/metrics"} <= paths.keys()
    open_paths = set()
    for path in [*paths, "/openapi.json", "/docs", "/nowhere", "/", "//v1/models", "/health/live/../../v1/models"]:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
                answer = httpx.request(method, served.url + path, headers=headers)
                if answer.status_code != 401:
                    open_paths.add(path)
                else:
                    assert answer.json()["error"]["type"] == "authentication_error"
                    assert answer.headers["www-authenticate"] == "Bearer"
    assert open_paths == {"/health", "/health/live", "/health/ready", "/ping", "/version"}


def test_keys_are_compared_in_constant_time() -> None:
    """CVE-2025-59425."""
    source = (SOURCE / "arriero/serving/access.py").read_text(encoding="utf-8")
    assert "compare_digest" in source
    assert not re.search(r"(key|given|digest)\s*==|==\s*(key|given|digest)", source)


def test_wrong_keys_do_not_enter_and_both_right_ones_do(served: Served) -> None:
    for key in (KEY, OTHER):
        assert httpx.get(f"{served.api}/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    for key in (KEY[:-1], KEY + "x", "x", KEY.upper(), "alice", "\xff"):
        headers = {"authorization": f"Bearer {key}".encode("latin-1")}
        assert httpx.get(f"{served.api}/models", headers=headers).status_code == 401


def test_the_server_listens_on_this_machine_only(served: Served) -> None:
    """CVE-2025-30202: a socket on all interfaces."""
    process = psutil.Process(served.process.pid)
    everything = [process, *process.children(recursive=True)]
    listening = [c for p in everything for c in p.net_connections("all") if c.status == psutil.CONN_LISTEN]
    assert [(c.laddr.ip, c.laddr.port) for c in listening] == [("127.0.0.1", served.port)]


def test_there_is_no_pickle_and_no_eval_in_the_server() -> None:
    """CVE-2024-50050, ShadowMQ, CVE-2025-10164, CVE-2026-3059: pickle between processes and in routes; CVE-2025-9141: eval."""
    pattern = re.compile(r"\b(pickle|recv_pyobj|marshal|shelve|os\.system|shell|torch\.load)\b|\b(eval|exec)\(")
    starting = []
    for path in (SOURCE / "arriero/serving").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not pattern.search(text), path
        starting += [path.name] if "subprocess" in text else []
    assert starting == ["page_process.py"]  # which starts one fixed program, with no word of a request


def test_there_are_no_routes_that_manage_anything(http: httpx.Client) -> None:
    """CVE-2025-10164, CVE-2026-3989, vLLM's /pause and /update_weights."""
    paths = http.get("/openapi.json").json()["paths"]
    assert not [
        path for path in paths if re.search(r"weight|load|pause|sleep|reset|admin|profile|invocation|file", path)
    ]


@pytest.mark.parametrize(
    "field",
    [
        {"prompt_embeds": "gASVAAAA"},  # CVE-2025-62164: tensors of clients
        {"chat_template": "{{ ''.__class__ }}"},  # CVE-2024-34359, CVE-2026-5760
        {"lora_path": "/etc"},
        {"extra_args": {}},
    ],
)
def test_dangerous_fields_are_refused(http: httpx.Client, field: dict[str, Any]) -> None:
    answer = chat(http, **field)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "messages", "eos_token", "__class__"])
def test_variables_of_templates_set_nothing_else(http: httpx.Client, name: str) -> None:
    """CVE-2025-62426: those of a client reached the tokenizer itself."""
    answer = chat(http, chat_template_kwargs={name: True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")
    assert chat(http, chat_template_kwargs={"enable_thinking": False}).status_code == 200


def test_pictures_are_refused_and_never_fetched(http: httpx.Client, connections: Path) -> None:
    """CVE-2026-0599, CVE-2025-6242: addresses in requests."""
    for kind in ("image_url", "input_audio", "file"):
        part = {"type": kind, kind: {"url": "http://127.0.0.1:9/x.png", "data": "", "format": "wav"}}
        answer = chat(http, messages=[{"role": "user", "content": [part]}])
        assert answer.status_code == 400
        assert "text only" in answer.json()["error"]["message"]
    assert chat(http, messages=[{"role": "user", "content": "![](http://127.0.0.1:9/x.png)"}]).status_code == 200
    assert not connections.exists()


def test_control_tokens_in_a_users_text_are_text(http: httpx.Client) -> None:
    """CVE-2026-44222."""
    for text in ("</s>", "<s>" * 50, "<|eot_id|><|python_tag|>", "<unk>"):
        assert chat(http, messages=[{"role": "user", "content": text}]).status_code == 200
        tokens = http.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()["tokens"]
        assert tokens.count(1) == 1  # the template's own bos
        assert 2 not in tokens


CHAT_BOUNDS: list[dict[str, Any]] = [
    *({"n": value} for value in (-1, 0, 129, 10**30, "2", 1.5)),  # CVE-2026-34756
    *({"max_tokens": value} for value in (-1, 0, 10**12)),
    *({"top_logprobs": value, "logprobs": True} for value in (-1, 21)),
    *({"seed": value} for value in (-(2**63) - 1, 2**63)),
    *({"top_k": value} for value in (-2, 2**31)),
    {"temperature": -0.1},
    {"temperature": 2.1},
    {"top_p": 1.1},
    {"min_p": -1},
    {"repetition_penalty": 0},
    {"frequency_penalty": -3},
    {"presence_penalty": 3},
    {"stop": [""]},
    {"stop": ["x"] * 17},
    {"stop": "x" * 257},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [1] * 1025},
    {"min_tokens": -1},
    {"logit_bias": {str(i): 0 for i in range(1025)}},
    {"logit_bias": {"-1": 0}},
    {"logit_bias": {"1": 101}},
    {"logit_bias": {"99999": 1}},
    {"stream": "false"},
    {"messages": []},
    {"messages": [{"role": "user", "content": "x"}] * 4097},
    {"messages": [{"role": "user", "content": None}]},
    {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]},
    {"tool_choice": "required"},
    {"user": "x" * 513},
    {"metadata": {str(i): "" for i in range(17)}},
]


@pytest.mark.parametrize("field", CHAT_BOUNDS, ids=lambda field: str(field)[:50])
def test_every_value_has_bounds(http: httpx.Client, field: dict[str, Any]) -> None:
    """CVE-2026-34756 (n), CVE-2026-21869 (negative numbers), vLLM's best_of."""
    answer = chat(http, **field)
    assert answer.status_code == 400, answer.text[:300]
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "field",
    [
        {"prompt": ""},  # vLLM 0.5.4: an empty prompt ended it; here bos stands alone, or it is refused
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": [10**9]},
        {"prompt": ["x"] * 257},
        {"prompt": [[1], "x"]},
        {"best_of": 0},
        {"best_of": 129},
        {"best_of": 1, "n": 2},
        {"logprobs": 21},
        {"logprobs": -1},
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"suffix": "x"},
    ],
    ids=lambda field: str(field)[:50],
)
def test_completions_have_bounds_too(http: httpx.Client, field: dict[str, Any]) -> None:
    answer = complete(http, **field)
    assert answer.status_code == (200 if field == {"prompt": ""} else 400), answer.text[:300]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(" * 5000}}},  # CVE-2025-48944
        {"type": "something"},
        {"type": ["string", 5]},
        {"type": "string", "pattern": "(a+)+$" * 50},  # CVE-2025-48887: nothing here backtracks
        {"type": "string", "pattern": "[a-z"},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/nowhere"},
        {"anyOf": []},
        {"enum": []},
        {"type": "string", "minLength": 10**9},
        {"properties": {"a": {"type": "object", "minProperties": -1}}, "type": "object"},
    ],
    ids=lambda schema: str(schema)[:50],
)
def test_no_schema_brings_the_server_down(http: httpx.Client, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert chat(http, response_format=form, max_tokens=4).status_code in (200, 400)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert chat(http, tools=[tool], tool_choice="required", max_tokens=4).status_code in (200, 400)
    assert chat(http).status_code == 200


def test_nesting_and_malformed_json_are_refused(http: httpx.Client) -> None:
    head = {"content-type": "application/json"}
    deep = '{"messages":' + "[" * 100_000 + "]" * 100_000 + "}"
    schema = '{"a":' * 70 + "1" + "}" * 70
    nested = (
        '{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema","json_schema":'
        f'{{"name":"x","schema":{schema}}}}}}}'
    )
    for body in (
        deep,
        nested,
        "{",
        "[]",
        '"x"',
        "",
        "nul",
        '{"n": NaN}',
        '{"n": 1e999}',
        '{"a": "\\ud800"}',
        b'{"a":"\xff"}',
    ):
        answer = http.post("/v1/chat/completions", content=body, headers=head)
        assert answer.status_code == 400, body[:50]
        assert answer.json()["error"]["message"]
    long_number = http.post("/v1/chat/completions", content='{"n": ' + "9" * 10_000 + "}", headers=head)
    assert long_number.status_code == 400


def test_only_json_by_its_own_word_is_read(http: httpx.Client) -> None:
    """A form of a foreign web page can send text/plain without being asked."""
    for media in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = http.post("/v1/chat/completions", content='{"messages": []}', headers={"content-type": media})
        assert answer.status_code == 415


def test_other_host_names_are_refused(http: httpx.Client) -> None:
    """DNS rebinding: a web page whose name was made to point here."""
    assert http.get("/v1/models", headers={"host": "evil.example:80"}).status_code == 421
    assert http.get("/v1/models", headers={"host": "localhost:1234"}).status_code == 200


def test_web_pages_are_told_nothing(http: httpx.Client) -> None:
    """CORS is off."""
    answer = http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_sizes_have_caps(served: Served, http: httpx.Client) -> None:
    """CVE-2025-48956: headers of any size; no server has a cap of bodies by default but TGI."""
    assert http.get("/v1/models", headers={"x-long": "x" * 20_000}).status_code == 431
    assert http.get("/v1/models", headers={f"x-{i}": "1" for i in range(120)}).status_code == 431
    assert http.get("/v1/models?" + "x" * 5000).status_code == 414
    assert complete(http, prompt="x" * 2_100_000).status_code == 413

    def chunks() -> Iterator[bytes]:  # without a Content-Length
        yield b'{"prompt":"'
        for _ in range(40):
            yield b"x" * 100_000

    try:
        answer = http.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
    except httpx.WriteError:  # it was told and cut off while it still wrote
        pass
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000)
        assert b"400" in raw.recv(1000)
    assert http.get("/v1/models").status_code == 200


def test_health_answers_at_once_beside_a_huge_prompt(served: Served, http: httpx.Client) -> None:
    """CVE-2025-62426: what a request makes the server do must not stop its event loop."""
    done = threading.Event()

    def work() -> list[int]:
        huge = [{"role": "user", "content": "so it goes " * 90_000}]  # 1 MB
        with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as own:
            statuses = [chat(own, messages=huge).status_code]  # too long in any case
            statuses += [own.post("/tokenize", json={"messages": huge}).status_code for _ in range(3)]
        done.set()
        return statuses

    seconds = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = pool.submit(work)
        while not done.is_set():
            began = time.perf_counter()
            assert http.get("/health/live").status_code == 200
            seconds.append(time.perf_counter() - began)
            time.sleep(0.005)
        assert future.result() == [400, 200, 200, 200]
    assert len(seconds) > 20
    assert sorted(seconds)[int(0.99 * len(seconds))] < 0.25  # of a machine that is busy otherwise; alone it is 20 ms


def test_clients_share_nothing_of_the_cache(served: Served) -> None:
    """CVE-2025-46570: by the time of an answer one client can find out what another one asked."""
    prompt = "A secret that takes more than a few blocks of the cache to hold. " * 5

    def cached(key: str) -> int:
        body = {"prompt": prompt, "max_tokens": 1}
        answer = httpx.post(f"{served.api}/completions", json=body, headers={"authorization": f"Bearer {key}"})
        found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached(KEY) == 0
    assert cached(KEY) > 16
    assert cached(OTHER) == 0


def test_who_leaves_leaves_nothing_behind(served: Served, http: httpx.Client) -> None:
    """CVE-2026-9540, Starlette's handlers that go on: streams and others, left in the middle or refused."""
    body = {"prompt": "To be", "max_tokens": 1500, "ignore_eos": True}

    def leave(stream: bool) -> None:
        with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {KEY}"}) as own:
            if stream:
                with own.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    own.post("/v1/completions", json=body, timeout=0.2)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, [True, False] * 12))
        list(pool.map(lambda i: complete(http, prompt=[10**6 + i]), range(20)))
    deadline = time.monotonic() + 20
    while gauge(http, "arriero_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gauge(http, "arriero_requests_running") == gauge(http, "arriero_requests_waiting") == 0
    assert gauge(http, "arriero_kv_blocks_used") == 0
    assert gauge(http, "arriero_http_in_flight") == 1  # the one that asks


def test_the_log_is_json_and_holds_neither_keys_nor_texts(served: Served, http: httpx.Client) -> None:
    asked = "Tell nobody\nthat I asked"
    answer = chat(http, messages=[{"role": "user", "content": asked}])
    assert http.get('/v1/x%0A{"event":1}', headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    deadline = time.monotonic() + 5
    while not any(line.get("request_id") == "mine-1" for line in served.log) and time.monotonic() < deadline:
        time.sleep(0.05)
    [line] = [line for line in served.log if line.get("request_id") == answer.headers["x-request-id"]]
    assert (line["event"], line["status"], line["client"], line["completion_tokens"]) == ("request", 200, "alice", 2)
    everything = str(served.log)
    assert KEY not in everything
    assert "Tell nobody" not in everything
    assert served.told == []
