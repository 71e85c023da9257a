"""One driver per run: who holds the lease, who may take it over, and who is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.errors import LeaseError, exit_code
from pipelines.lease import holder, lease


def visible(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if not path.name.endswith(".lock")]


HOLD = "import sys,time; from pathlib import Path; from pipelines.lease import lease\n"
HOLD += "with lease(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"


def test_it_is_held_for_the_block_and_gone_after(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lease.json"
    with lease(path) as held:
        present = holder(path)
        assert present is not None
        assert (present["pid"], present["token"]) == (os.getpid(), held.token)
        held.require()
    assert holder(path) is None
    assert not visible(path.parent)


def test_it_is_given_back_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lease(tmp_path / "lease.json"):
        raise KeyError
    assert not visible(tmp_path)


def test_a_live_driver_refuses_another_and_a_killed_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LeaseError, match=f"driver {other.pid}") as caught, lease(path):
            pass
        assert exit_code(caught.value) == 4
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert path.is_file()
    assert holder(path) is None
    with lease(path):
        pass
    assert not visible(tmp_path)


def test_a_reused_process_id_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with lease(path):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"started": record["started"] - 100}))
        assert holder(path) is None


def test_another_host_is_never_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 0.0, "token": "t"}))
    with pytest.raises(LeaseError, match="elsewhere"), lease(path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_torn_lease_counts_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lease.json"
    path.write_text(text)
    assert holder(path) is None
    with lease(path):
        pass


def test_who_lost_the_lease_does_not_remove_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with lease(path) as held:
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"token": "another"}))
        with pytest.raises(LeaseError, match=rf"driver {os.getpid()} on .* is at .* This driver stops"):
            held.require()
    assert path.is_file()
    for text in ("", "[]", "null", "{}"):
        path.write_text(text)
        with pytest.raises(LeaseError, match="somebody was at"):
            held.require()


def test_of_many_claimants_of_a_stale_lease_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    for _ in range(20):
        path.write_text("torn")
        won: list[str] = []
        start = threading.Barrier(4)

        def claim(won: list[str] = won, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                with lease(path) as held:
                    won.append(held.token)
                    time.sleep(0.02)
                    present = holder(path)
                    assert present is not None
                    assert present["token"] == held.token, "another claimant moved a live lease aside"
            except LeaseError:
                pass

        threads = [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won
        path.unlink(missing_ok=True)


def test_nobody_takes_over_inside_the_fence(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    order: list[str] = []

    def claim() -> None:
        with lease(path):
            order.append("claimed")

    with lease(path) as held:
        with held.fenced():
            path.unlink()
            other = threading.Thread(target=claim)
            other.start()
            time.sleep(0.3)
            order.append("written")
        other.join()
        with pytest.raises(LeaseError, match="This driver stops"), held.fenced():
            order.append("written without the lease")
    assert order == ["written", "claimed"]
