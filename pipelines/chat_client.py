"""The endpoint as `rankline chat` sees it: where it is, its models, and one answer as it comes."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cluster.errors import ClusterError, ServeError, TokenError
from cluster.serving.auth import read_token
from cluster.serving.client import to_replica_of
from pipelines.artifacts import Store
from pipelines.errors import ConfigError
from pipelines.plain_text import PlainText, plain

if TYPE_CHECKING:
    import httpx

#: Seconds to connect, for what is looked up, and of silence within an answer.
CONNECT_S, LOOK_S, SILENCE_S = 5.0, 10.0, 600.0
_USAGE = {"include_usage": True, "continuous_usage_stats": True}
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class _NoTemplateError(ConfigError):
    """The model has no chat template."""


@dataclass
class Answer:
    """What has come of an answer; `text` is free of control characters."""

    model: str
    version: str = ""
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    """As the endpoint counts them with every piece, or at the end; the pieces that have come where it does not."""
    first_s: float = 0.0
    """From the request to the first text."""
    seconds: float = 0.0
    """From the request to the last text."""

    def add(self, text: str, seconds: float) -> None:
        """One more piece has come."""
        self.text += text
        self.tokens += 1
        self.first_s, self.seconds = self.first_s or seconds, seconds

    @property
    def tokens_per_s(self) -> float:
        """Of those after the first text; 0 where there is only one."""
        return (self.tokens - 1) / (self.seconds - self.first_s) if self.seconds > self.first_s else 0.0


class ChatClient:
    """One endpoint and its token, which is in no message and no representation."""

    def __init__(self, url: str, token_file: str | Path, remedy: str = "rankline serve RUN") -> None:
        """Args:
        url: of the endpoint, without `/v1`.
        token_file: with its token.
        remedy: the command that deploys it.

        Raises:
            TokenError: the file cannot be used.
            ConfigError: the URL is none.
        """
        import httpx

        self.url, self.chats = url, True
        self._token_file, self._remedy = Path(token_file).expanduser(), remedy
        headers = {"Authorization": f"Bearer {read_token(self._token_file)}"}
        # A connection that was left open could be closed by the server just when the next question is sent.
        limits = httpx.Limits(max_keepalive_connections=0)
        try:
            self._http = httpx.Client(base_url=url, headers=headers, limits=limits, trust_env=False)
        except httpx.InvalidURL as error:
            raise ConfigError(f"chat --url {url!r}: {error}. Give http://HOST:PORT.") from error

    def models(self) -> list[dict[str, Any]]:
        """What the endpoint lists for this token.

        Raises:
            ConfigError, TokenError, ServeError: it does not answer, or refuses.
        """
        with self._send("GET", "/v1/models") as response:
            body = _json(response)
        found = body.get("data") if isinstance(body, dict) else None
        if not isinstance(found, list) or not all(isinstance(entry, dict) and "id" in entry for entry in found):
            raise ServeError(
                f"chat with {self.url}: it is no OpenAI-compatible endpoint (GET /v1/models). Check --url."
            )
        return [entry | {"id": plain(str(entry["id"]))} for entry in found]

    def choose(self, model: str | None) -> str:
        """The model if the endpoint knows it; for None the first adapter, or the base where there is none."""
        if model is not None:
            with self._send("GET", f"/v1/models/{quote(model, safe='')}"):
                return model
        found = self.models()
        if not found:
            raise ConfigError(f"chat with {self.url}: this token may use none of its models. Use another --token-file.")
        return str(next((entry["id"] for entry in found if entry.get("parent")), found[0]["id"]))

    def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        options: Mapping[str, Any],
        answer: Answer,
        show: Callable[[str], None],
    ) -> None:
        """Fill `answer`, and call `show` with each new piece of its text.

        A model without a chat template completes the last message; `chats` is false from then on.

        Raises:
            ConfigError, TokenError, ServeError: no answer, a refusal, or an answer that broke off.
        """
        body = {"model": answer.model, "stream": True, "stream_options": _USAGE, **options}
        if self.chats:
            try:
                self._stream(_CHAT, body | {"messages": messages}, answer, show)
                return
            except _NoTemplateError:
                self.chats = False
        self._stream(_COMPLETIONS, body | {"prompt": messages[-1]["content"]}, answer, show)

    def _stream(self, route: str, body: dict[str, Any], answer: Answer, show: Callable[[str], None]) -> None:
        visible, began = PlainText(), time.perf_counter()
        with self._send("POST", route, body) as response:
            for event in _events(response):
                if "error" in event:
                    raise ServeError(f"the answer of {answer.model!r} broke off: {_reason(event)}")
                answer.version = plain(str(event.get("system_fingerprint") or answer.version))
                for choice in event.get("choices") or []:
                    piece = choice["delta"].get("content") if "delta" in choice else choice.get("text")
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    if piece:
                        new = visible.feed(piece)
                        answer.add(new, time.perf_counter() - began)
                        show(new)
                answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)

    @contextmanager
    def _send(self, method: str, path: str, body: Any = None) -> Iterator[httpx.Response]:
        """A response with status 200 whose body is not read yet."""
        import httpx

        timeout = httpx.Timeout(LOOK_S if body is None else SILENCE_S, connect=CONNECT_S)
        content = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"} | to_replica_of(str(body["model"]))
        try:
            with self._http.stream(method, path, content=content, headers=headers, timeout=timeout) as response:
                if response.status_code != 200:
                    response.read()
                    raise self._refusal(response)
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            reason = re.sub(r"^\[Errno -?\d+\] ", "", plain(str(error)))
            raise ServeError(
                f"chat with {self.url}: {reason}. Deploy the endpoint with `{self._remedy}`; `rankline status` lists "
                "runs and endpoints."
            ) from error
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}{': ' if str(error) else ''}{plain(str(error))}"
            raise ServeError(
                f"chat with {self.url}{path}: the connection failed ({reason}). `rankline status` shows what is up."
            ) from error

    def _refusal(self, response: httpx.Response) -> Exception:
        """The error that says in words what the endpoint answered."""
        status, body = response.status_code, _json(response)
        text = f"{self.url} answered {status}: {_reason(body)}"
        if status == 401:
            return TokenError(
                f"{text} The one in {self._token_file} is not this endpoint's. Give the file of its token with "
                "--token-file; unless the pipeline names another, it is _serve_token in the store of the run."
            )
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            if body["error"].get("code") == "no_chat_template":
                return _NoTemplateError(text)
            if body["error"].get("code") == "model_not_found":
                return ConfigError(f"{text} It lists: {', '.join(entry['id'] for entry in self.models()) or 'none'}.")
        wait = plain(response.headers.get("Retry-After", ""))
        if wait:
            text += f" Try again in {wait} s." if wait.isdigit() else f" Try again after {wait}."
        return ConfigError(text) if 400 <= status < 500 and status != 429 else ServeError(text)


def find(store: Store, url: str | None, token_file: str | None) -> ChatClient:
    """The endpoint at a URL, or of the newest run in the store whose endpoint answers.

    A recorded token is only ever sent to the URL that it is recorded with.

    Raises:
        ConfigError, TokenError, ServeError: there is none, it does not answer, or its token cannot be used.
    """
    recorded = _recorded(store)
    if url is not None:
        url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"chat --url {url!r}: this is no URL. Give http://HOST:PORT.")
        token_file = token_file or next((point["token_file"] for _, point in recorded if point["url"] == url), None)
        if token_file is None:
            raise ConfigError(
                f"chat --url {url}: no run in {store.name} has an endpoint there. Give the token with "
                "--token-file FILE."
            )
        return ChatClient(url, token_file)
    refused: list[ConfigError | ClusterError] = []
    for run, point in recorded:
        try:
            remedy = shlex.join(["rankline", "serve", run, "--store", store.name])
            client = ChatClient(point["url"], token_file or point["token_file"], remedy)
            client.models()
            return client
        except (ConfigError, ClusterError) as error:
            refused.append(error)
    if refused:
        raise refused[0]
    raise ServeError(
        f"chat: no run in {store.name} has an endpoint. Deploy one with `rankline serve RUN` (`rankline status` lists "
        "the runs), name another store with --store, or give --url and --token-file."
    )


def _recorded(store: Store) -> list[tuple[str, dict[str, Any]]]:
    """Runs of a store with the endpoints they have deployed, newest first."""
    records = [(name, store.read_record(name)) for name in store.run_names()]
    records.sort(key=lambda item: item[1].get("updated", 0.0), reverse=True)
    return [(name, record["endpoint"]) for name, record in records if record.get("endpoint")]


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events.

    Raises:
        ServeError: it ends early, or is none.
    """
    # Split at newlines only: httpx's own lines also end at U+2028 and its like, which may stand in a text.
    rest = b""
    for block in response.iter_bytes():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                try:
                    event = json.loads(data)
                except ValueError:
                    event = None
                if not isinstance(event, dict):
                    raise ServeError(f"{response.url} sent what is no answer. Is this an OpenAI-compatible endpoint?")
                yield event
    raise ServeError(f"the answer of {response.url} broke off before its end. Ask again.")


def _json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.read())
    except ValueError:
        return None


def _reason(body: Any) -> str:
    """What an error body says."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return plain(str(message or "it gave no reason. Is this an OpenAI-compatible endpoint?"))
