"""Malformed requests, from our own OpenAPI document and as raw bytes: never a 5xx, and others are answered meanwhile.

RANKLINE_SOAK above 1 makes them 10,000 (`make soak`).
"""

import contextlib
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_http import BASE, BEARER, COMPLETION, ONE, OWN, listening
from soak import SOAK, amount, record

from cluster.config import ServeConfig
from cluster.model import ModelSource
from cluster.serving.app import create_app
from cluster.serving.auth import Keyring
from cluster.serving.service import Service
from cluster.serving.sources import FixedSource
from cluster.serving.spec import ServeSpec

FUZZ = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def service(served: tuple[ModelSource, dict[str, str]]) -> Iterator[Service]:
    source, adapters = served
    spec = ServeSpec("test", source, BASE, FixedSource(adapters), tuple(adapters))
    service = Service.load(spec, ServeConfig(max_new_tokens=8, max_concurrent=8))
    yield service
    service.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(create_app(service, Keyring(OWN))) as url:
        yield url


def times_of(url: str, seconds: float) -> list[float]:
    """How long good requests take, one after the other, for some seconds; at least one."""
    found: list[float] = []
    with httpx.Client(base_url=url, headers=BEARER, trust_env=False) as client:
        ends = time.monotonic() + seconds
        while not found or time.monotonic() < ends:
            began = time.monotonic()
            answer = client.post("/v1/completions", json=COMPLETION | {"max_tokens": 8})
            found.append(time.monotonic() - began)
            assert answer.status_code == 200
    return found


@contextlib.contextmanager
def good_traffic(url: str) -> Iterator[list[float]]:
    """Good requests beside what the block does; their times, once it has ended."""
    found: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            found.extend(times_of(url, 0.2))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


#: Sends requests again and again from a process of its own, so that making them takes no time of the server's.
REPLAY = """
import http.client, json, sys
from pathlib import Path
from urllib.parse import urlsplit
place = urlsplit(sys.argv[1])
cases = [json.loads(line) for line in Path(sys.argv[2]).read_text().splitlines()]
print("begins", flush=True)
while True:
    for path, headers, body in cases:
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
        connection.request("POST", path, bytes.fromhex(body), headers)
        connection.getresponse().read()
        connection.close()
"""


@contextlib.contextmanager
def replayed(url: str, sent: Sequence[Any], file: Path) -> Iterator[None]:
    """The requests, one after the other, beside what the block does."""
    bodies = [body.encode() if isinstance(body, str) else body or b"" for _, _, body in sent]
    lines = [json.dumps([path, headers, body.hex()]) for (path, headers, _), body in zip(sent, bodies, strict=True)]
    file.write_text("\n".join(lines))
    with subprocess.Popen([sys.executable, "-c", REPLAY, url, str(file)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
            assert process.poll() is None, "it ended by itself"
        finally:
            process.kill()


def late(times: list[float]) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[98]


def assert_answered(response: Any, seen: Counter[int]) -> None:
    seen[response.status_code] += 1
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()) == {"error"}
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_requests_made_from_the_schema_never_fail_the_server(url: str, service: Service, tmp_path: Path) -> None:
    import schemathesis
    from schemathesis import GenerationMode

    document = httpx.get(f"{url}/openapi.json", headers=BEARER, trust_env=False).json()
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/chat/completions", "/v1/completions", "/v1/models"}
    seen, malformed = Counter[int](), list[Any]()

    def fuzz(operation: Any, mode: GenerationMode, examples: int) -> None:
        @settings(FUZZ, max_examples=examples)
        @given(operation.as_strategy(generation_mode=mode))
        def once(case: Any) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body["model"] = ONE
            response = case.call(base_url=url, headers=BEARER, timeout=60)
            assert_answered(response, seen)
            if response.status_code == 400:
                malformed.append((response.request.path_url, dict(response.request.headers), response.request.body))

        once()

    with good_traffic(url) as beside:
        for operation in operations:
            if operation.method == "post":
                fuzz(operation, GenerationMode.NEGATIVE, amount(120, 2400))
                fuzz(operation, GenerationMode.POSITIVE, amount(30, 600))
    assert seen[400] > 0.5 * sum(seen.values())
    assert seen[200] > 0
    assert service.healthy
    assert service.live == (0, 0)
    assert len(beside) > 0
    record(
        "malformed and odd requests made from the OpenAPI document", seen.total(), [], "never a 5xx",
        seen=seen,
    )  # fmt: skip
    quiet = times_of(url, amount(0.5, 10.0))
    with replayed(url, malformed[:500], tmp_path / "malformed.jsonl"):
        busy = times_of(url, amount(0.5, 10.0))
    figures = [round(late(times) * 1e3, 1) for times in (quiet, busy)]
    slow = [] if SOAK == 1 or late(busy) <= 3 * late(quiet) else [f"p99 {figures} ms"]
    target = "p99 of good requests within 3 times that of a quiet server"
    record("good requests beside malformed ones", len(busy), slow, target, good_p99_ms=figures)
    assert slow == []


def test_raw_bytes_never_fail_the_server(url: str, service: Service) -> None:
    place = urlsplit(url)
    fields = ("Host: x", "Authorization: {}", "Content-Type: application/json", "Content-Length: {}")
    head = "\r\n".join(["POST {} HTTP/1.1", *fields, "", ""])
    statuses: Counter[str] = Counter()

    def send(data: bytes) -> bytes:
        with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    answer += part
        return answer

    def check(answer: bytes) -> None:
        status = answer[9:12].decode() if answer.startswith(b"HTTP/1.") else "closed"
        statuses[status] += 1
        assert not status.startswith("5"), answer

    token = BEARER["Authorization"]
    body = st.one_of(
        st.binary(max_size=300),
        st.text(max_size=200).map(str.encode),
        st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=9), lambda inner: st.lists(inner) | st.
                     dictionaries(st.sampled_from(["model", "prompt", "messages", "n", "stop", "stream"]), inner),
                     max_leaves=9).map(lambda value: str(value).encode()),
    )  # fmt: skip

    @settings(FUZZ, max_examples=amount(150, 2400))
    @given(st.sampled_from(["/v1/completions", "/v1/chat/completions"]), body, st.integers(-3, 3))
    def with_a_head(path: str, content: bytes, wrong: int) -> None:
        check(send(head.format(path, token, max(0, len(content) + wrong)).encode() + content))

    @settings(FUZZ, max_examples=amount(100, 1600))
    @given(st.binary(max_size=400))
    def with_none(content: bytes) -> None:
        check(send(content))

    with_a_head()
    with_none()
    for nested in (b"[" * 200_000, b'{"model":' * 50_000, b'{"model": "' + b"\xff" * 100_000, b'{"n": 1e999999999}'):
        check(send(head.format("/v1/completions", token, len(nested)).encode() + nested))
    assert statuses["400"] > 0
    times_of(url, 0.1)
    assert service.healthy
    record("raw bytes sent to the endpoint", statuses.total(), [], "never a 5xx", seen=statuses)
