"""The token file and its comparison."""

import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import ServeError, TokenError
from cluster.serving.auth import Key, Keyring, check_exposure, ensure_token, is_loopback, read_keys


def test_a_token_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "token"
    token = ensure_token(path)
    assert len(token) >= 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_token(path) == token
    assert list(path.parent.iterdir()) == [path]


def test_racing_callers_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ensure_token, [tmp_path / "token"] * 32))) == 1


def test_a_token_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("  my-token\n")
    path.chmod(0o400)
    assert ensure_token(path) == "my-token"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    path.write_text("secret-value")
    path.chmod(mode)
    with pytest.raises(TokenError, match=f"chmod 600 {path}") as caught:
        ensure_token(path)
    assert "secret-value" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"line\nline", "schlüssel".encode(), b"x" * 5000])
def test_what_is_no_token(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(TokenError, match="printable ASCII"):
        ensure_token(path)


def test_a_path_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenError, match=r"serve\.token_file"):
        ensure_token(tmp_path / "file" / "token")
    with pytest.raises(TokenError):
        ensure_token(tmp_path)


@pytest.mark.parametrize(
    ("header", "allowed"),
    [(b"Bearer right", True), (b"bearer right", True), (b"Bearer  right ", True), (b"Bearer wrong", False),
     (b"Bearer", False), (b"Bearer ", False), (b"Basic right", False), (b"right", False), (b"", False), (None, False),
     (b"Bearer right\xff", False), (b"Bearer right right", False)],
)  # fmt: skip
def test_authorization_headers(header: bytes | None, allowed: bool) -> None:
    keys = Keyring([Key("other", "left"), Key("token", "right")])
    found = keys.find(header)
    assert (found is not None) is allowed
    assert found is None or (found.name, found.token) == ("token", "")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_several_tokens_with_what_each_may_do(tmp_path: Path) -> None:
    text = """{"tokens": [{"name": "ops", "token": "a"}, {"name": "ci", "token": "b", "models": ["qa", "chat-*:2"],
              "requests_per_minute": 90}]}"""
    path = write(tmp_path / "tokens", text)
    ops, ci = read_keys(path)
    assert ensure_token(path) == ops.token == "a"
    assert (ops.models, ops.requests_per_minute) == (("*",), None)
    assert all(ops.may_use(model) for model in ("base", "qa", "qa:1"))
    asked = ("qa", "qa:1", "qa@x", "qa2", "chat-a:2", "chat-a", "base", "*", "QA")
    assert [model for model in asked if ci.may_use(model)] == ["qa", "qa:1", "qa@x", "chat-a:2"]
    assert "s3cret" not in repr(Key("ci", "s3cret"))


@pytest.mark.parametrize(
    "text",
    ["{", '{"tokens": []}', '{"tokens": [{"name": "a"}]}', '{"tokens": [{"name": "a", "token": ""}]}',
     '{"tokens": [{"name": "a", "token": "s3cret"}, {"name": "a", "token": "other"}]}',
     '{"tokens": [{"name": "a", "token": "s3cret"}, {"name": "b", "token": "s3cret"}]}',
     '{"tokens": [{"name": "a", "token": "s3cret", "models": "qa"}]}',
     '{"tokens": [{"name": "a", "token": "s3cret", "models": [1]}]}',
     '{"tokens": [{"name": "a", "token": "s3cret", "requests_per_minute": 0}]}',
     '{"tokens": [{"name": "a", "token": "s3cret", "requests_per_minute": "60"}]}',
     '{"tokens": [{"name": "a b", "token": "s3cret"}]}', '{"tokens": [{"name": "a", "token": "s3cret", "model": []}]}',
     '{"tokens": "s3cret"}', '{"tokens": ["s3cret"]}', '{"token": "s3cret"}', "{" * 100_000],
)  # fmt: skip
def test_a_file_of_tokens_that_is_damaged_tells_no_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(TokenError, match="starts as JSON") as caught:
        read_keys(write(tmp_path / "tokens", text))
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_rate_is_kept_to_and_comes_back() -> None:
    now = [0.0]
    key, free = Key("slow", "a", requests_per_minute=6), Key("fast", "b")
    keys = Keyring([key, free], clock=lambda: now[0])
    assert [keys.wait_s(key) for _ in range(6)] == [0.0] * 6
    assert keys.wait_s(key) == pytest.approx(10)
    assert keys.wait_s(free) == 0
    now[0] = 9.9
    assert keys.wait_s(key) == pytest.approx(0.1)
    now[0] = 10.1
    assert keys.wait_s(key) == 0
    assert keys.wait_s(key) > 9
    now[0] = 1e6
    assert [keys.wait_s(key) > 0 for _ in range(7)] == [False] * 6 + [True]


def test_hosts() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"))
    check_exposure("127.0.0.1", None)
    check_exposure("0.0.0.0", "/some/token")
    with pytest.raises(ServeError, match=r"Set serve\.token_file"):
        check_exposure("0.0.0.0", None)
