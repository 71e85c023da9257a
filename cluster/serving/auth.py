"""The bearer tokens of an endpoint. Serve has no authentication of its own, and Ray's token does not guard its HTTP."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cluster.errors import ServeError, TokenError
from lowrank.reading import is_number, parse_json

_MOST_BYTES = 2**20
_MOST_PER_MINUTE = 10**9


def ensure_token(path: str | Path) -> str:
    """The token in `path`; a missing file is made with mode 0600 and a new random token.

    Raises:
        TokenError: the file is empty, not text, unreadable, or readable by others.
    """
    path = Path(path)
    try:
        _create(path)
    except FileExistsError:
        pass
    except OSError as error:
        raise TokenError(
            f"create token file {path}: {error.strerror}. Set serve.token_file to another path."
        ) from error
    return read_token(path)


def _create(path: Path) -> None:
    """Make the file whole or not at all: of two processes that come at once, the later reads what the first wrote."""
    if path.exists():
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as handle:
            handle.write(secrets.token_urlsafe(32) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.link(temporary, path)
    finally:
        temporary.unlink()


@dataclass(frozen=True)
class Key:
    """What a token may do.

    Attributes:
        name: for the access log.
        token: the secret.
        models: model ids, or their names before `:` and `@`, that it may use; `*` and `?` match as in file names.
        requests_per_minute: of each replica; null is as many as there is room for.
    """

    name: str
    token: str = field(repr=False)
    models: tuple[str, ...] = ("*",)
    requests_per_minute: float | None = None

    def may_use(self, model_id: str) -> bool:
        """Whether this token is good for a model."""
        name = re.split("[:@]", model_id, maxsplit=1)[0]
        return any(fnmatchcase(model_id, pattern) or fnmatchcase(name, pattern) for pattern in self.models)


def read_token(path: str | Path) -> str:
    """The first token of an existing file.

    Raises:
        TokenError: as `read_keys`.
    """
    return read_keys(path)[0].token


def read_keys(path: str | Path) -> list[Key]:
    """The tokens of an existing file: one line with a token, or JSON:

    {"tokens": [{"name": "ci", "token": "...", "models": ["demo", "qa@*"], "requests_per_minute": 60}]}

    Raises:
        TokenError: the file is missing, empty, unreadable, readable by others, or holds anything else.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            data = handle.read(_MOST_BYTES + 1)
    except OSError as error:
        raise TokenError(
            f"read token file {path}: {error.strerror}. Set serve.token_file to a readable file."
        ) from error
    if mode & 0o077:
        raise TokenError(f"read token file {path}: others can read it (mode {mode:04o}). Run: chmod 600 {path}")
    text = data.decode("ascii", errors="replace").strip()
    if text.startswith("{") and len(data) <= _MOST_BYTES:
        return _parse_keys(path, text)
    if len(data) > 4096 or not _is_token(text):
        raise TokenError(
            f"read token file {path}: empty, longer than 4096 bytes, or not one line of printable ASCII. "
            "Remove it and a new one is made, or write a token of your own."
        )
    return [Key("token", text)]


def _is_token(text: Any) -> bool:
    return isinstance(text, str) and bool(text) and all("!" <= character <= "~" for character in text)


def _parse_keys(path: Path, text: str) -> list[Key]:
    """Keys of a JSON file. Its text, which holds secrets, is in no error."""
    try:
        entries = parse_json(text)["tokens"]
        keys = [
            Key(entry["name"], entry["token"], tuple(entry.get("models", ["*"])), entry.get("requests_per_minute"))
            for entry in entries
            if entry.keys() <= {"name", "token", "models", "requests_per_minute"}
        ]
        rates = [key.requests_per_minute for key in keys if key.requests_per_minute is not None]
        fine = (
            len(entries) == len(keys) == len({key.name for key in keys}) == len({key.token for key in keys}) > 0
            and all(_is_token(key.token) and _is_token(key.name) for key in keys)
            and all(isinstance(pattern, str) for key in keys for pattern in key.models)
            and all(is_number(rate) and 0 < rate <= _MOST_PER_MINUTE for rate in rates)
            and all(not isinstance(entry.get("models", []), str) for entry in entries)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        raise TokenError(
            f"read token file {path}: it starts as JSON, and is not "
            '{"tokens": [{"name": ..., "token": ..., "models": ["*"], "requests_per_minute": 60}, ...]} with names and '
            "tokens of printable ASCII, each once; models and requests_per_minute may be left out."
        )
    return keys


class Keyring:
    """Finds the key of a bearer token in constant time; keeps digests only, and counts requests by key."""

    def __init__(self, keys: Sequence[Key], clock: Callable[[], float] = time.monotonic) -> None:
        """Args: keys: at least one. clock: seconds."""
        self._digests = [(_digest(key.token.encode()), replace(key, token="")) for key in keys]
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def find(self, authorization: bytes | None) -> Key | None:
        """The key that an Authorization header carries, without its token."""
        scheme, _, credentials = (authorization or b"").partition(b" ")
        given, found = _digest(credentials.strip()), None
        for digest, key in self._digests:  # all of them: neither which nor whether can be timed
            if hmac.compare_digest(given, digest):
                found = key
        return found if scheme.lower() == b"bearer" else None

    def wait_s(self, key: Key) -> float:
        """Take one of the key's requests, of a minute's worth at most: 0, or the seconds until there is one again."""
        if key.requests_per_minute is None:
            return 0.0
        now, rate = self._clock(), key.requests_per_minute / 60
        most = max(key.requests_per_minute, 1.0)
        left, since = self._left.get(key.name, (most, now))
        left = min(most, left + (now - since) * rate)
        self._left[key.name] = (left - 1, now) if left >= 1 else (left, now)
        return 0.0 if left >= 1 else (1 - left) / rate


def _digest(value: bytes) -> bytes:
    # Equal lengths, so that not even the token's length can be timed.
    return hashlib.sha256(value).digest()


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, token_file: str | None) -> None:
    """Refuse to listen beyond loopback unless the user gave a token file.

    Raises:
        ServeError: another host without a token file.
    """
    if not is_loopback(host) and token_file is None:
        raise ServeError(
            f"serve on {host}: an address beyond loopback needs a token file of your own. "
            "Set serve.token_file (mode 0600), or serve.host to 127.0.0.1. Traffic is plain HTTP: put TLS in front."
        )
