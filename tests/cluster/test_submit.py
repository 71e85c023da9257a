import sys
import time
from types import SimpleNamespace

import pytest

from cluster import submit as module
from cluster.connection import load_token
from cluster.errors import ConnectError, JobError, TokenError
from cluster.processes import free_ports
from cluster.submit import follow, list_attempts, open_client, submit


class FakeClient:
    """Enough of a JobSubmissionClient to test the numbering without a cluster."""

    def __init__(self, **statuses: str) -> None:
        self.jobs = {name.replace("_", "-"): status for name, status in statuses.items()}
        self.rivals = 0

    def list_jobs(self):
        return [SimpleNamespace(submission_id=k, status=v, message=None) for k, v in self.jobs.items()]

    def submit_job(self, *, entrypoint, submission_id, runtime_env):
        if self.rivals:
            self.rivals -= 1
            self.jobs[submission_id] = "RUNNING"
            raise RuntimeError("Please use a different submission_id")
        self.jobs[submission_id] = "PENDING"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, "run-1"),
        ({"run_1": "FAILED"}, "run-2"),
        ({"run_1": "RUNNING"}, "run-1"),
        ({"run_9": "STOPPED", "run_10": "SUCCEEDED"}, "run-11"),
        ({"run_1": "FAILED", "run_2": "PENDING"}, "run-2"),
        ({"other_1": "RUNNING", "run_other_3": "RUNNING"}, "run-1"),
    ],
)
def test_the_next_attempt(monkeypatch, known, expected):
    client = FakeClient(**known)
    monkeypatch.setattr(module, "open_client", lambda *_, **__: client)
    assert submit("http://fake", "true", "run") == expected
    assert submit("http://fake", "true", "run") == expected  # live now


def test_a_faster_rival_is_followed(monkeypatch):
    client = FakeClient()
    client.rivals = 1
    monkeypatch.setattr(module, "open_client", lambda *_, **__: client)
    assert submit("http://fake", "true", "run") == "run-1"


@pytest.mark.parametrize("key", ["", "../x", "a/b", "-x", "x" * 121])
def test_a_run_key_that_is_no_id_is_refused(key):
    with pytest.raises(JobError, match="run key"):
        list_attempts(FakeClient(), key)


def test_lines_survive_broken_connections():
    seen: list[str] = []
    lines = module._Lines(seen.append)
    for chunks in (["ab\nc"], ["ab", "\ncd\n"], ["ab\ncd\n", "last"]):
        lines.restart()
        for chunk in chunks:
            lines.feed(chunk)
    lines.close()
    assert seen == ["ab", "cd", "last"]


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:1", "http://"])
def test_a_malformed_dashboard_is_refused(address):
    with pytest.raises(ConnectError, match=r"need the dashboard's http"):
        open_client(address, token="x")


def test_an_unreachable_dashboard_fails_fast():
    (port,) = free_ports(["p"]).values()
    start = time.monotonic()
    with pytest.raises(ConnectError, match="nobody answers"):
        open_client(f"http://127.0.0.1:{port}", token="x")
    assert time.monotonic() - start < 5


def test_a_wrong_token_is_refused(ray_head):
    with pytest.raises(TokenError, match="refuses the token"):
        open_client(ray_head.dashboard_url, token="wrong")


def test_jobs_end_to_end(ray_head, tmp_path):
    """A live attempt is joined, its lines arrive, a failed one raises, and the next gets the next number."""
    from pathlib import Path

    token = load_token(Path(ray_head.token_file))
    client = open_client(ray_head.dashboard_url, token=token)
    code = "import time; print('first', flush=True); time.sleep(2); print('last'); raise SystemExit(3)"
    script = tmp_path / "job.py"
    script.write_text(code)
    command = f"{sys.executable} {script}"
    one = submit(ray_head.dashboard_url, command, "demo.run", token=token)
    assert one == "demo.run-1"
    assert submit(ray_head.dashboard_url, "false", "demo.run", token=token) == one
    seen: list[str] = []
    assert follow(client, one, seen.append) == "FAILED"
    assert [line for line in seen if line in ("first", "last")] == ["first", "last"]
    with pytest.raises(JobError, match=r"run-2 on .* ended as FAILED"):
        submit(ray_head.dashboard_url, "exit 7", "demo.run", token=token, on_line=seen.append)
    assert [(a.number, a.status) for a in list_attempts(client, "demo.run")] == [(1, "FAILED"), (2, "FAILED")]
    with pytest.raises(JobError, match="follow the job unknown"):
        follow(client, "unknown", seen.append)
