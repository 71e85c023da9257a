"""The routes of the endpoint: OpenAI's models, chat completions and completions, and two open health routes.

Annotations are evaluated here (no `from __future__ import annotations`): FastAPI reads them, and the web framework is
imported inside `create_app` so that importing this module stays instant.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.serving.auth import Key, Keyring
from cluster.serving.decoding import TokenLogprob
from cluster.serving.metrics import Metrics
from cluster.serving.middleware import BEGAN, FACTS, KEY, AccessLog, App, Guard
from cluster.serving.protocol import (
    MAX_BODY_BYTES,
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    usage,
    validation_error,
)
from cluster.serving.service import Generation, Service
from cluster.serving.slots import Piece

#: The page and its files: path -> file and media type.
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
#: Least seconds between events of a stream: each costs every hop on its way, and nobody reads faster.
_EVENT_INTERVAL_S = 0.04
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Answer:
    """OpenAI's objects for one answer of either route."""

    def __init__(self, request: GenerationRequest, version: str) -> None:
        """Args: version: what answers, which `system_fingerprint` says."""
        self._version = version
        self._chat = isinstance(request, ChatRequest)
        self._logprobs = request.wanted_logprobs is not None
        self._model = request.model
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, choices: Sequence[Sequence[Piece]], prompt_tokens: int) -> dict[str, Any]:
        """The object of an answer that is not streamed, from all pieces of its choices."""
        made = []
        for index, pieces in enumerate(choices):
            text = "".join(piece.text for piece in pieces)
            content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            noted = tuple(token for piece in pieces for token in piece.logprobs)
            made.append(content | self._choice(index, replace(pieces[-1], logprobs=noted)))
        body = self._object("chat.completion", made)
        return body | {"usage": usage(prompt_tokens, sum(pieces[-1].completion_tokens for pieces in choices))}

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chat stream first says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, Piece("", 0)) if self._chat else None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """One piece of a stream."""
        return self._chunk(index, {"content": piece.text} if piece.text else {}, piece)

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The last chunk of a stream that asked for usage."""
        return self._object("chat.completion.chunk", []) | {"usage": usage(prompt_tokens, completion_tokens)}

    def _chunk(self, index: int, delta: dict[str, str], piece: Piece) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._chat else {"text": piece.text}
        return self._object("chat.completion.chunk", [content | self._choice(index, piece)])

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return {"index": index, "logprobs": self._noted(piece), "finish_reason": piece.finish}

    def _noted(self, piece: Piece) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self._chat:
            return {"content": [_entry(t.token, t.logprob) | {"top_logprobs": [_entry(*e) for e in t.top]}
                                for t in piece.logprobs]}  # fmt: skip
        return {
            "tokens": [token.token for token in piece.logprobs],
            "token_logprobs": [token.logprob for token in piece.logprobs],
            "top_logprobs": [_by_text(token) for token in piece.logprobs],
            "text_offset": [token.offset for token in piece.logprobs],
        }

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = kind if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model,
                "system_fingerprint": self._version, "choices": choices}  # fmt: skip


def _entry(token: str, logprob: float) -> dict[str, Any]:
    """`bytes` is null for a token that is part of a character, whose text does not tell it."""
    return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode())}


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the chosen one; of several with one text the likeliest counts."""
    found: dict[str, float] = {}
    for text, value in (*token.top, (token.token, token.logprob)):
        found.setdefault(text, value)
    return found


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _failed(generation: Generation | None = None) -> ApiError:
    if generation is not None and generation.expired:
        return ApiError(504, "The answer took too long.", type="server_error", code="deadline_exceeded")
    return ApiError(500, "The generation failed; see the replica's log.", type="server_error", code="internal_error")


class _Progress:
    """What the access log is told of a running answer."""

    def __init__(self, scope: Any) -> None:
        self._facts, self._began = scope[FACTS], scope[BEGAN]
        self._tokens: dict[int, int] = {}

    def note(self, choice: int, piece: Piece) -> None:
        """Count a piece in."""
        if not self._tokens:
            self._facts["first_ms"] = round((time.perf_counter() - self._began) * 1000)
        self._tokens[choice] = piece.completion_tokens
        self._facts["completion_tokens"], self._facts["finish"] = self.tokens, piece.finish or "client_left"

    @property
    def tokens(self) -> int:
        """Produced by all choices."""
        return sum(self._tokens.values())


async def _events(request: GenerationRequest, generation: Generation, scope: Any) -> AsyncIterator[bytes]:
    """Server-sent events of one answer, ending with `[DONE]`."""
    answer, progress = Answer(request, generation.version), _Progress(scope)
    extra: dict[str, Any] = {"usage": None} if request.include_usage else {}
    for choice in range(request.n or 1):
        opening = answer.opening(choice)
        if opening is not None:
            yield _event(opening | extra)
    async for choice, piece in generation.gathered(_EVENT_INTERVAL_S):
        progress.note(choice, piece)
        if piece.finish in ("error", "cancelled"):
            yield _event(_failed(generation).body())
            return
        if request.counts_as_it_goes:
            extra = {"usage": usage(generation.prompt_tokens, progress.tokens)}
        if piece.text or piece.logprobs:
            yield _event(answer.chunk(choice, replace(piece, finish=None)) | extra)
        if piece.finish is not None:
            yield _event(answer.chunk(choice, Piece("", piece.completion_tokens, piece.finish)) | extra)
    if request.include_usage:
        yield _event(answer.usage_chunk(generation.prompt_tokens, progress.tokens))
    yield b"data: [DONE]\n\n"


async def _collect(request: GenerationRequest, generation: Generation, scope: Any) -> dict[str, Any]:
    choices: list[list[Piece]] = [[] for _ in range(request.n or 1)]
    progress = _Progress(scope)
    async for choice, piece in generation.pieces():
        choices[choice].append(piece)
        progress.note(choice, piece)
        if piece.finish in ("error", "cancelled"):
            raise _failed(generation)
    return Answer(request, generation.version).whole(choices, generation.prompt_tokens)


def _note_start(facts: dict[str, Any], request: GenerationRequest, generation: Generation) -> None:
    # The model id is a known one by now, so that nobody writes lines of their own into the log.
    facts |= {
        "model": request.model,
        "version": generation.version,
        "stream": bool(request.stream),
        "prompt_tokens": generation.prompt_tokens,
    }


def create_app(service: Service, keys: Keyring) -> App:
    """The whole ASGI application over one service."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    class EventStream(StreamingResponse):
        """Frees the slot however the response ends, even if its first byte was never sent."""

        def __init__(self, request: GenerationRequest, generation: Generation, scope: Any) -> None:
            super().__init__(_events(request, generation, scope), media_type="text/event-stream")
            self.headers["Cache-Control"] = "no-cache"
            self._generation = generation

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                self._generation.cancel()

    app = FastAPI(title="rankline", redoc_url=None)
    _add_error_handlers(app)

    async def answer(request: GenerationRequest, generation: Generation, http: Request) -> Response:
        _note_start(http.scope[FACTS], request, generation)
        if request.stream:
            return EventStream(request, generation, http.scope)
        try:
            whole = await _unless_gone(http, _collect(request, generation, http.scope))
        finally:
            generation.cancel()
        return JSONResponse(whole)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        _check_permission(http.scope[KEY], body.model)
        return await answer(body, await service.chat(body), http)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        _check_permission(http.scope[KEY], body.model)
        return await answer(body, await service.complete(body), http)

    @app.get("/v1/models")
    async def models(http: Request) -> dict[str, Any]:
        return {"object": "list", "data": list(_models(service, http.scope[KEY]))}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str, http: Request) -> dict[str, Any]:
        _check_permission(http.scope[KEY], model_id)
        return _model(service, model_id)

    metrics = Metrics(service)
    _add_pages(app, service, metrics)
    known = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/docs", "/openapi.json", "/metrics", *PAGE_FILES)
    return AccessLog(Guard(app, keys, MAX_BODY_BYTES), known, metrics.observe)


def _add_pages(app: Any, service: Service, metrics: Metrics) -> None:
    """Metrics, health, and the page with its files."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    async def metrics_page(http: Request) -> Response:
        if "*" not in http.scope[KEY].models:
            raise ApiError(403, "This token may not see the metrics of all models.", type="permission_error")
        page, kind = metrics.page()
        return Response(page, media_type=kind)

    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    async def readyz() -> Response:
        ready = service.healthy
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    app.add_api_route("/metrics", metrics_page, include_in_schema=False)
    app.add_api_route("/healthz", healthz)
    app.add_api_route("/readyz", readyz)
    for path, (name, kind) in PAGE_FILES.items():
        app.add_api_route(path, partial(_page_file, name, kind), include_in_schema=False)


def _model(service: Service, model_id: str) -> dict[str, Any]:
    version = service.require(model_id)
    own: dict[str, Any] = {"base": service.base} if version is None else {"parent": service.base_id, "root": version.id}
    return {"id": model_id, "object": "model", "created": service.created, "owned_by": "rankline"} | own


def _check_permission(key: Key, model_id: str) -> None:
    """Before anything is looked up: a token learns nothing of models that are not its own."""
    if not key.may_use(model_id):
        message = "This token may not use that model. See /v1/models for those that it may."
        raise ApiError(403, message, type="permission_error", param="model", code="model_not_allowed")


def _models(service: Service, key: Key) -> Iterator[dict[str, Any]]:
    for model_id in filter(key.may_use, service.model_ids):
        with contextlib.suppress(ApiError):  # the registry has changed since it was asked for its ids
            yield _model(service, model_id)


async def _page_file(name: str, kind: str) -> Any:
    from fastapi.responses import FileResponse

    return FileResponse(Path(__file__).parent / "page" / name, media_type=kind, headers=_PAGE_HEADERS)


async def _unless_gone(http: Any, work: Any) -> Any:
    """Await `work`, but give up when the client closes the connection."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(499, "The client closed the connection.", code="client_closed_request")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _add_error_handlers(app: Any) -> None:
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def respond(http: Request, error: ApiError) -> JSONResponse:
        if error.code is not None:
            http.scope[FACTS]["code"] = error.code
        return JSONResponse(error.body(), error.status, headers=error.headers)

    async def api(request: Request, error: ApiError) -> JSONResponse:
        return respond(request, error)

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(request, validation_error(list(error.errors())))

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return respond(request, ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return respond(request, _failed())

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)
