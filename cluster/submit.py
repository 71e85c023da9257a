"""Run a pipeline on a cluster of the user's own through Ray Jobs, once, however often it is submitted.

Ray uses a submission id once: even after its job ended the id stays taken, and Ray never runs a job again by itself.
A run key therefore maps to numbered attempts, `<run_key>-1`, `<run_key>-2` ...: a live attempt is followed instead
of submitted twice, and after an ended one comes the next. The store makes the next attempt resume, not repeat.
"""

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cluster.connection import load_token
from cluster.errors import ConnectError, JobError, TokenError

LIVE = frozenset({"PENDING", "RUNNING"})
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One submission of a run: its id, its number from 1 on, and Ray's status of it."""

    submission_id: str
    number: int
    status: str
    message: str

    @property
    def live(self) -> bool:
        """Whether the job waits or runs."""
        return self.status in LIVE


def open_client(address: str, *, token: str | None = None, timeout_s: float = 15.0) -> Any:
    """Return a `JobSubmissionClient` for the dashboard at `address`, such as http://127.0.0.1:8265.

    Raises:
        ConnectError: when the address is malformed or nobody answers there.
        TokenError: when the token is missing or refused.
    """
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConnectError(
            f"open the Jobs API at {address!r}: need the dashboard's http(s)://host:port, such as http://127.0.0.1:8265."
        )
    token = token or load_token()
    try:  # the client itself has no timeout
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname, port), timeout=timeout_s).close()
    except OSError as error:
        raise ConnectError(
            f"open the Jobs API at {address}: nobody answers ({error}). Check the address and that the cluster runs; "
            "from outside a cluster forward its port first (kubectl port-forward, ssh -L)."
        ) from error
    from ray.job_submission import JobSubmissionClient

    with _mapped(f"open the Jobs API at {address}"):
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})


def submit(
    address: str,
    entrypoint: str,
    run_key: str,
    *,
    runtime_env: dict[str, Any] | None = None,
    token: str | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Submit `entrypoint` as the next attempt of `run_key`, or join its live attempt; return the submission id.

    Args:
        address: the dashboard, http://host:port.
        entrypoint: shell command to run on the cluster.
        run_key: names the run; letters, digits, `.`, `_` and `-`.
        runtime_env: Ray runtime environment of the job.
        token: the cluster's token; None looks where `load_token` does.
        on_line: when given, called with every line that the job prints, until it ends.

    Raises:
        ConnectError: when the cluster does not answer.
        TokenError: when it refuses the token.
        JobError: when the job cannot be submitted, or a followed one does not succeed.
    """
    client = open_client(address, token=token)
    submission_id = _ensure_live(client, entrypoint, run_key, runtime_env)
    if on_line is not None:
        status = follow(client, submission_id, on_line)
        if status != "SUCCEEDED":
            message = client.get_job_info(submission_id).message or "no message"
            raise JobError(
                f"run {submission_id} on {address}: the job ended as {status}: {message} "
                "Correct the cause and submit again: finished work is kept."
            )
    return submission_id


def list_attempts(client: Any, run_key: str) -> list[Attempt]:
    """Return the attempts of `run_key` that the cluster knows, oldest first."""
    pattern = re.compile(rf"{re.escape(_checked(run_key))}-([1-9]\d*)")
    attempts = []
    with _mapped(f"list the attempts of {run_key}"):
        for job in client.list_jobs():
            if job.submission_id and (match := pattern.fullmatch(job.submission_id)):
                attempts.append(
                    Attempt(
                        submission_id=job.submission_id,
                        number=int(match[1]),
                        status=str(getattr(job.status, "value", job.status)),
                        message=job.message or "",
                    )
                )
    return sorted(attempts, key=lambda attempt: attempt.number)


def logs(client: Any, submission_id: str) -> str:
    """What the job has printed so far.

    Raises:
        JobError: when the cluster does not know the job.
    """
    with _mapped(f"read the log of {submission_id}"):
        return str(client.get_job_logs(submission_id))


def cancel(client: Any, submission_id: str, timeout_s: float = 60.0) -> str:
    """Ask the job to stop (SIGTERM, then SIGKILL by Ray), wait until it has, and return its final status.

    Raises:
        JobError: when the cluster does not know the job, or it still runs after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    with _mapped(f"cancel {submission_id}"):
        client.stop_job(submission_id)
        while (status := str(client.get_job_status(submission_id).value)) in LIVE:
            if time.monotonic() > deadline:
                raise JobError(f"cancel {submission_id}: it still runs after {timeout_s:.0f} s. Look at its log.")
            time.sleep(_POLL_S)
    return status


def follow(client: Any, submission_id: str, on_line: Callable[[str], None]) -> str:
    """Call `on_line` with every line of a job's log until it ends, and return its final status.

    A broken connection is opened again where it left off. Ctrl-C ends the following, not the job.

    Raises:
        JobError: when the cluster does not know the job.
        ConnectError: when the cluster is gone.
    """
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # else it reports each closed socket
    lines = _Lines(on_line)
    while True:
        try:
            asyncio.run(_tail(client, submission_id, lines))
        except (RuntimeError, OSError):
            time.sleep(_POLL_S)  # the status below tells a broken connection from a cluster that is gone
        with _mapped(f"follow the job {submission_id}"):
            status = str(client.get_job_status(submission_id).value)
        if status not in LIVE:
            _finish(client, submission_id, lines)
            return status
        time.sleep(_POLL_S)


def _ensure_live(client: Any, entrypoint: str, run_key: str, runtime_env: dict[str, Any] | None) -> str:
    for _ in range(5):
        attempts = list_attempts(client, run_key)
        if attempts and attempts[-1].live:
            return attempts[-1].submission_id
        submission_id = f"{run_key}-{attempts[-1].number + 1 if attempts else 1}"
        try:
            with _mapped(f"submit {submission_id}"):
                client.submit_job(entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env)
            return submission_id
        except JobError as error:
            if "different submission_id" not in str(error):  # else another submitter was faster: look again
                raise
    raise JobError(f"submit {run_key}: other submitters took five numbers in a row. Use a run key of your own.")


class _Lines:
    """Cuts chunks into lines, and skips what an earlier connection already delivered."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._delivered = 0
        self._position = 0
        self._rest = ""

    def restart(self) -> None:
        """Announce that the next chunk is the first of the log again."""
        self._position = 0

    def feed(self, chunk: str) -> None:
        """Take the next chunk and deliver the lines that it completes."""
        new = chunk[max(0, self._delivered - self._position) :]
        self._position += len(chunk)
        self._delivered = max(self._delivered, self._position)
        *whole, self._rest = (self._rest + new).split("\n")
        for line in whole:
            self._on_line(line)

    def close(self) -> None:
        """Deliver a last line without an end."""
        if self._rest:
            self._on_line(self._rest)
            self._rest = ""


async def _tail(client: Any, submission_id: str, lines: _Lines) -> None:
    import aiohttp

    lines.restart()
    try:
        async for chunk in client.tail_job_logs(submission_id):
            lines.feed(chunk)
    except aiohttp.ClientError as error:
        raise OSError(str(error)) from error


def _finish(client: Any, submission_id: str, lines: _Lines) -> None:
    """Deliver what was printed after the connection had closed."""
    log = logs(client, submission_id)
    lines.restart()
    lines.feed(log)
    lines.close()


def _checked(run_key: str) -> str:
    if not _KEY.fullmatch(run_key):
        raise JobError(
            f"submit a run: got the run key {run_key!r}; allowed are up to 120 letters, digits, '.', '_' and '-', "
            "a letter or digit first."
        )
    return run_key


@contextmanager
def _mapped(doing: str) -> Iterator[None]:
    """Turn what the client raises into errors of this package."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise TokenError(
            f"{doing}: the cluster refuses the token ({error.message.splitlines()[0]}). Set RAY_AUTH_TOKEN_PATH to the "
            "token file of this cluster."
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ConnectError(f"{doing}: the cluster does not answer ({error}). Check that it runs.") from error
    except RuntimeError as error:
        raise JobError(f"{doing}: {error}") from error
