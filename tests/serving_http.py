"""Requests to the app over a service, without Ray: in process, or over HTTP."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

from cluster.serving.app import create_app
from cluster.serving.auth import Key, Keyring
from cluster.serving.service import Service

BASE, ONE, TWO = "tiny", "tiny-one.v1", "tiny-two"
TOKEN = "the-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
OWN = (Key("own", TOKEN),)
CHAT = {"model": ONE, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12}
COMPLETION = {"model": ONE, "prompt": "hello", "temperature": 0, "max_tokens": 12}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}


def call(
    service: Service, method: str, path: str, headers: Any = BEARER, keys: Any = OWN, **options: Any
) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service, Keyring(keys)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(once())


def post(service: Service, path: str, **changes: Any) -> httpx.Response:
    return call(service, "POST", path, json=ROUTES[path] | changes)


def assert_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    return error


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """The URL of an app on a free port of loopback."""
    import uvicorn

    config = uvicorn.Config(app, port=0, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
