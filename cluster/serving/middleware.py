"""What every request passes before a route sees it: one access-log line, the token, limits of rate and size.

Plain ASGI.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from cluster.serving.auth import Keyring
from cluster.serving.protocol import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FACTS, KEY, BEGAN = "rankline.facts", "rankline.key", "rankline.began"
HEALTH_PATHS = frozenset({"/healthz", "/readyz"})
#: What needs no token: health, and the page with its files, which asks for one itself.
OPEN_PATHS = HEALTH_PATHS | {"/", "/app.js", "/style.css", "/icon.svg"}
logger = logging.getLogger("ray.serve.rankline")


async def send_error(send: Send, error: ApiError) -> None:
    """Answer with an error in OpenAI's shape."""
    body = error.json()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key.lower() == name), None)


class AccessLog:
    """One line per request: route, status, milliseconds and what the route noted in `scope[FACTS]`.

    Neither bodies, headers nor query strings are ever written, and of paths only the known ones.
    """

    def __init__(
        self, app: App, paths: Collection[str], observe: Callable[[str, int, float, dict[str, Any]], None]
    ) -> None:
        """Args: paths: known ones. observe: called with path, status, seconds and facts of every request."""
        self._app, self._paths, self._observe = app, frozenset(paths), observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, then log."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts: dict[str, Any] = {}
        status, started = 499, time.perf_counter()  # nginx's number for a client that left before an answer
        scope[FACTS], scope[BEGAN] = facts, started

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            if scope["path"] not in HEALTH_PATHS:
                path = scope["path"] if scope["path"] in self._paths else "(unknown)"
                seconds = time.perf_counter() - started
                self._observe(path, status, seconds, facts)
                facts["ms"] = round(seconds * 1000)
                noted = " ".join(f"{name}={value}" for name, value in facts.items())
                logger.info("%s %s %d %s", scope["method"], path, status, noted)


class Guard:
    """Lets nothing but the open paths through without a token, no token beyond its rate, no body beyond the limit."""

    def __init__(self, app: App, keys: Keyring, max_body_bytes: int) -> None:
        self._app, self._keys, self._max_body_bytes = app, keys, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or pass on. Anything that is not HTTP (or the server's own lifespan) is refused."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] in OPEN_PATHS:
            await self._limited(scope, receive, send)
        elif (key := self._keys.find(_header(scope, b"authorization"))) is None:
            await send_error(send, _unauthorized())
        else:
            scope[KEY], scope[FACTS]["key"] = key, key.name
            wait_s = self._keys.wait_s(key) if scope["method"] == "POST" else 0.0
            if wait_s > 0:
                await send_error(send, _too_many(wait_s))
                return
            await self._limited(scope, receive, send)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = _header(scope, b"content-length") or b""
        body = None if length.isdigit() and int(length) > self._max_body_bytes else await self._read(receive)
        if body is None:
            message = f"The body is larger than {self._max_body_bytes} bytes."
            await send_error(send, ApiError(413, message, code="request_too_large"))
            return
        replay: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return replay.pop() if replay else await receive()

        await self._app(scope, replayed, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None when it is too large or the client left."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                return None
        return bytes(body)


def _too_many(wait_s: float) -> ApiError:
    return ApiError(
        429,
        "This token has sent as many requests as it may; try again later.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(math.ceil(wait_s))},
    )


def _unauthorized() -> ApiError:
    return ApiError(
        401,
        "A valid token is needed: send `Authorization: Bearer <token>`.",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
