"""The routes over a real engine on the tiny model, without Ray: tokens, error shapes, streams, limits."""

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving_http import BASE, BEARER, CHAT, COMPLETION, ONE, OWN, ROUTES, TOKEN, TWO, assert_error, call, events, post

from cluster.model import ModelSource, build_adapted
from cluster.serving.app import create_app
from cluster.serving.auth import Keyring
from cluster.serving.decoding import Sampling
from cluster.serving.protocol import MAX_BODY_BYTES
from cluster.serving.service import Service
from cluster.serving.slots import Job
from cluster.unpack import unpack_if_room


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("GET", f"/v1/models/{ONE}"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
     ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/metrics"), ("GET", "/page/app.js"), ("GET", "/nowhere"),
     ("GET", "/healthz/"),
     ("GET", "http://test//healthz"), ("OPTIONS", "/v1/models")],
)  # fmt: skip
def test_everything_needs_the_token(service: Service, method: str, path: str, headers: dict[str, str]) -> None:
    response = call(service, method, path, headers)
    assert_error(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_health_is_open_and_docs_open_with_the_token(service: Service) -> None:
    assert call(service, "GET", "/healthz", {}).status_code == 200
    assert call(service, "GET", "/readyz", {}).json() == {"status": "ready"}
    assert call(service, "GET", "/docs").status_code == 200
    assert "/v1/chat/completions" in call(service, "GET", "/openapi.json").json()["paths"]


def test_models(service: Service) -> None:
    listed = call(service, "GET", "/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == [BASE, ONE, TWO]
    assert call(service, "GET", f"/v1/models/{ONE}").json()["object"] == "model"
    assert_error(call(service, "GET", "/v1/models/none"), 404, "model_not_found")


@pytest.mark.parametrize("path", ROUTES)
def test_each_model_answers_its_own_way_and_streams_the_same(service: Service, path: str) -> None:
    texts = set()
    for model in (BASE, ONE, TWO):
        whole = post(service, path, model=model).json()
        chunks = events(post(service, path, model=model, stream=True, stream_options={"include_usage": True}))
        choice = whole["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        assert "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices) == text
        assert [c["finish_reason"] for c in choices[-2:]] == [None, "length"]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        assert whole["usage"]["completion_tokens"] == 12
        assert {chunk["model"] for chunk in chunks} == {whole["model"]} == {model}
        assert len({chunk["id"] for chunk in chunks}) == 1
        texts.add(text)
    assert len(texts) == 3


def choices_of(response: httpx.Response) -> list[str]:
    found = response.json()["choices"]
    assert [choice["index"] for choice in found] == list(range(len(found)))
    return [c["message"]["content"] if "message" in c else c["text"] for c in found]


@pytest.mark.parametrize("path", ROUTES)
def test_several_choices_differ_by_their_seeds(service: Service, path: str) -> None:
    warm = {"temperature": 1.5, "seed": 5}
    three = post(service, path, n=3, **warm)
    texts = choices_of(three)
    assert len(set(texts)) == 3
    assert texts == [choices_of(post(service, path, temperature=1.5, seed=5 + i))[0] for i in range(3)]
    assert three.json()["usage"]["completion_tokens"] == 36
    streamed = ["", "", ""]
    chunks = events(post(service, path, n=3, stream=True, stream_options={"include_usage": True}, **warm))
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    assert streamed == texts
    assert chunks[-1]["usage"] == three.json()["usage"]
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in chunks[:-1]) == 3
    assert choices_of(post(service, path, n=2, temperature=1.5, seed=2**63 - 1))
    assert assert_error(post(service, path, n=5), 400, "invalid_value")["param"] == "n"  # four slots, nobody waits
    assert choices_of(post(service, path, n=4))


@pytest.mark.parametrize("path", ROUTES)
def test_logprobs_are_those_of_the_model(
    service: Service, served: tuple[ModelSource, dict[str, str]], path: str
) -> None:
    source, adapters = served
    chat = "chat" in path
    wanted = {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
    choice = post(service, path, max_tokens=5, **wanted).json()["choices"][0]
    noted = choice["logprobs"]
    if chat:
        tokens = [entry["token"] for entry in noted["content"]]
        values = [entry["logprob"] for entry in noted["content"]]
        tops = [{e["token"]: e["logprob"] for e in entry["top_logprobs"]} for entry in noted["content"]]
        text = choice["message"]["content"]
    else:
        tokens, values, tops, text = noted["tokens"], noted["token_logprobs"], noted["top_logprobs"], choice["text"]
        assert noted["text_offset"] == [0, 1, 2, 3, 4]
    assert len(tokens) == 5
    assert all(max(top.values()) == pytest.approx(value) for top, value in zip(tops, values, strict=True))  # greedy
    assert [len(top) for top in tops] == [3] * 5
    model = build_adapted(source, torch.float32, {"a": Path(adapters[ONE])})
    prompt = list(b"<|user|>hello\n<|assistant|>" if chat else b"hello")
    ids = [service._tokenizer.convert_tokens_to_ids(t) for t in service._tokenizer.tokenize("".join(map(chr, prompt)))]
    answer = service._tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    expected = torch.log_softmax(logits, -1)[range(len(answer)), answer]
    assert values[: len(answer)] == pytest.approx(expected.tolist(), abs=1e-3)
    streamed = events(post(service, path, max_tokens=5, stream=True, **wanted))
    parts = [c["choices"][0]["logprobs"] for c in streamed if c["choices"][0]["logprobs"]]
    stopped = post(service, path, max_tokens=5, stop=text[2:4], **wanted).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert len(stopped["logprobs"]["content" if chat else "tokens"]) == text.index(text[2:4])
    again = [e for part in parts for e in (part["content"] if chat else part["token_logprobs"])]
    assert [e["logprob"] if chat else e for e in again] == pytest.approx(values)
    assert post(service, path, max_tokens=2).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("interval", [0.0, 0.3])
def test_fast_tokens_share_an_event(service: Service, interval: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.serving.app._EVENT_INTERVAL_S", interval)
    asked = {"max_tokens": 60, "logprobs": 1, "n": 2}
    [one, two] = post(service, "/v1/completions", **asked).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in events(post(service, "/v1/completions", stream=True, **asked))]
    for index, whole in enumerate((one, two)):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in own) == whole["text"]
        noted = [value for chunk in own if chunk["logprobs"] for value in chunk["logprobs"]["token_logprobs"]]
        assert noted == pytest.approx(whole["logprobs"]["token_logprobs"], abs=1e-4)
        assert [chunk["finish_reason"] for chunk in own if chunk["finish_reason"]] == ["length"]
        # 60 tokens of the tiny model take less than a second
        assert (len(own) < 15) == (interval > 0)


def test_a_chat_stream_opens_with_the_role(service: Service) -> None:
    first = events(post(service, "/v1/chat/completions", stream=True))[0]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "usage" not in first


def test_completions_default_to_sixteen_tokens(service: Service) -> None:
    body = {"model": BASE, "prompt": "x", "temperature": 0}
    answer = call(service, "POST", "/v1/completions", json=body).json()
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 16, "total_tokens": 17}


@pytest.mark.parametrize("model", ["TINY", "tiny ", "../../etc/passwd", "tiny-one", "init", "adapter0"])
@pytest.mark.parametrize("path", ROUTES)
def test_unknown_models(service: Service, path: str, model: str) -> None:
    assert assert_error(post(service, path, model=model), 404, "model_not_found")["param"] == "model"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"model": "tiny"}', b'{"max_tokens": ' + b"9" * 5000,
     b'{"model": "tiny", "prompt": "a", "messages": "b", "temperature": NaN}'],
)  # fmt: skip
def test_bodies_that_are_no_request(service: Service, path: str, content: bytes) -> None:
    headers = BEARER | {"Content-Type": "application/json"}
    assert_error(call(service, "POST", path, headers, content=content), 400)


def test_a_body_without_its_content_type_is_explained(service: Service) -> None:
    error = assert_error(call(service, "POST", "/v1/completions", content=json.dumps(COMPLETION).encode()), 400)
    assert "Content-Type" in error["message"]


def test_unsupported_and_out_of_range(service: Service) -> None:
    path = "/v1/chat/completions"
    assert assert_error(post(service, path, n=9), 400, "invalid_value")["param"] == "n"
    assert assert_error(post(service, path, temperature=3), 400)["param"] == "temperature"
    assert "at most 200" in assert_error(post(service, path, max_tokens=201), 400)["message"]
    long = [{"role": "user", "content": "x" * 230}]
    assert_error(post(service, path, messages=long, max_tokens=20), 400, "context_length_exceeded")
    assert_error(post(service, path, messages=[{"role": "user", "content": "x" * 300}], max_tokens=None), 400)
    assert post(service, path, messages=long, max_tokens=None).json()["usage"]["total_tokens"] == 256
    late = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    assert "system comes first" in assert_error(post(service, path, messages=late), 400)["message"]
    assert_error(post(service, "/v1/completions", prompt=[257]), 400, "invalid_value")
    assert post(service, "/v1/completions", prompt="").json()["usage"]["prompt_tokens"] == 1


def test_other_routes_and_methods(service: Service) -> None:
    assert_error(call(service, "GET", "/nowhere"), 404)
    assert_error(call(service, "GET", "/v1/completions"), 405)


def test_a_body_too_large(service: Service) -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 65536

    assert_error(call(service, "POST", "/v1/completions", content=b" " * (MAX_BODY_BYTES + 1)), 413)
    assert_error(call(service, "POST", "/v1/completions", content=endless()), 413)


def test_busy_is_429_with_retry_after(service: Service) -> None:
    endless = Job(None, (1, 2), 10**6, Sampling(temperature=0))
    slots = [service._engine.submit(endless, lambda _: None) for _ in range(4)]
    try:
        for path in ROUTES:
            response = post(service, path)
            assert_error(response, 429, "engine_busy")
            assert response.headers["retry-after"] == "1"
        assert call(service, "GET", "/readyz", {}).status_code == 200
    finally:
        for slot in slots:
            slot.cancel()
        drained(service)


def drained(service: Service) -> None:
    deadline = time.monotonic() + 10
    while sum(service.live) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(service.live) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(service: Service, stream: bool) -> None:
    body = json.dumps(CHAT | {"max_tokens": 200, "stream": stream}).encode()
    headers = [(b"authorization", b"Bearer the-token"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b"",
             "http_version": "1.1", "scheme": "http", "root_path": "", "asgi": {"version": "3.0"}}  # fmt: skip
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop() if incoming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(create_app(service, Keyring(OWN))(scope, receive, send))
    drained(service)
    assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_generation(service: Service, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(service._engine._steps, "step", fail)
    response = post(service, "/v1/completions", stream=stream)
    if stream:
        assert json.loads(response.text.strip().removeprefix("data: "))["error"]["code"] == "internal_error"
    else:
        assert_error(response, 500, "internal_error")


def test_the_access_log_is_useful_and_tells_no_secrets(service: Service) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ray.serve.rankline")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        post(service, "/v1/completions", prompt="my private prompt", stream=True)
        call(service, "GET", f"/v1/models?key={TOKEN}", {"Authorization": "Bearer my-wrong-token"})
        call(service, "GET", "/my-private-path")
        call(service, "GET", "/healthz")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len(lines) == 3
    assert lines[0].startswith(
        "POST /v1/completions 200 key=own model=tiny-one.v1 version=tiny-one.v1 stream=True prompt_tokens=17 "
    )
    assert "completion_tokens=12 finish=length ms=" in lines[0]
    assert lines[1].startswith("GET /v1/models 401 ms=")
    assert not any(secret in line for line in lines for secret in (TOKEN, "private", "wrong"))


def test_unpacking_changes_no_answer(served: tuple[ModelSource, dict[str, str]]) -> None:
    source, adapters = served
    model = build_adapted(source, torch.float32, {"init": None, "one": Path(adapters[ONE])})
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        assert not unpack_if_room(model, torch.float32, available_bytes=1000)
        assert unpack_if_room(model, torch.float32)
        assert not unpack_if_room(model, torch.float32)
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=0, rtol=0)
