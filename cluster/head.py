"""The record of an embedded head: what is on disk about it, and the lock that guards it.

`<store>/_cluster.json` (mode 0600) is the only truth about the head of a store. It is written before the head is
started (`state = "starting"`) and again once it runs, so that a driver killed in between leaves enough behind to
find and end the half-started processes.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.durable import write_json
from cluster.errors import ConnectError
from lowrank.reading import is_number, read_json

RECORD_NAME = "_cluster.json"
TOKEN_NAME = "_ray_token"
LOCK_NAME = "_cluster.lock"


@dataclass(frozen=True, kw_only=True)
class Head:
    """One embedded Ray head, as recorded in its store.

    `sids` are the POSIX sessions that this head and its extra nodes were started in; together with `marker`, an
    environment variable that every descendant inherits, they tell its processes from those of any other cluster.
    """

    address: str
    dashboard_url: str
    token_file: str
    temp_dir: str
    marker: str
    host: str
    num_cpus: int
    started_at: float
    ports: dict[str, int]
    pids: dict[str, tuple[int, float]]
    sids: tuple[int, ...] = ()
    state: str = "running"


def read_record(store_dir: Path) -> Head | None:
    """Return the recorded head of `store_dir`, or None when there is no readable record."""
    try:
        raw = read_json(store_dir / RECORD_NAME)
        raw["pids"] = {name: (int(pid), float(born)) for name, (pid, born) in raw["pids"].items()}
        raw["sids"] = tuple(int(sid) for sid in raw["sids"])
        head = Head(**raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    texts = (head.address, head.dashboard_url, head.token_file, head.temp_dir, head.marker, head.host, head.state)
    fits = all(isinstance(text, str) for text in texts) and isinstance(head.ports, dict)
    return head if fits and is_number(head.num_cpus) and is_number(head.started_at) else None


def write_record(store_dir: Path, head: Head) -> None:
    """Write the record of `head` atomically, readable by its owner only."""
    write_json(store_dir / RECORD_NAME, asdict(head), mode=0o600)


@contextmanager
def store_lock(store_dir: Path, timeout_s: float = 180.0) -> Iterator[None]:
    """Hold the lock of a store's head; the kernel frees it when the holder dies.

    Raises:
        ConnectError: when another process holds it for longer than `timeout_s`.
    """
    store_dir.mkdir(parents=True, exist_ok=True)
    path = store_dir / LOCK_NAME
    with open(path, "w") as file:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConnectError(
                        f"start the cluster of {store_dir}: another process has held {path} for {timeout_s:.0f} s. "
                        "Wait for it, or end it, and try again."
                    ) from None
                time.sleep(0.1)
        yield  # closing the file frees the lock
