"""The bearer token of an endpoint. Serve has no authentication of its own, and Ray's token does not guard its HTTP."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import stat
from pathlib import Path

from cluster.errors import ServeError, TokenError


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


def read_token(path: str | Path) -> str:
    """The token in an existing file.

    Raises:
        TokenError: the file is missing, empty, not printable ASCII, unreadable, or readable by others.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            data = handle.read(4097)
    except OSError as error:
        raise TokenError(
            f"read token file {path}: {error.strerror}. Set serve.token_file to a readable file."
        ) from error
    if mode & 0o077:
        raise TokenError(f"read token file {path}: others can read it (mode {mode:04o}). Run: chmod 600 {path}")
    token = data.decode("ascii", errors="replace").strip()
    if not token or len(data) > 4096 or not all("!" <= character <= "~" for character in token):
        raise TokenError(
            f"read token file {path}: empty, longer than 4096 bytes, or not one line of printable ASCII. "
            "Remove it and a new one is made, or write a token of your own."
        )
    return token


class TokenCheck:
    """Compares bearer tokens in constant time and keeps only a digest."""

    def __init__(self, token: str) -> None:
        self._digest = _digest(token.encode())

    def allows(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header carries the token."""
        scheme, _, credentials = (authorization or b"").partition(b" ")
        same = hmac.compare_digest(_digest(credentials.strip()), self._digest)
        return same and scheme.lower() == b"bearer"


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
