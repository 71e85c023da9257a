"""`metrics.jsonl`: one line per optimizer step, appended by rank 0, followed by the driver."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.durable import UnitStore
from cluster.objects import Mirror
from cluster.train_job import METRICS_FILE
from lowrank.reading import parse_json

#: A log in an object store is written over no more often than this, in seconds, and per MiB that it has.
PUBLISH_S = 2.0


@dataclass
class MetricLog:
    """The writer; `attempt` numbers the worker groups, whose later lines supersede earlier ones."""

    root: Path
    units: UnitStore | None = None
    """Whose file this is, where other nodes see it only when it is published."""
    attempt: int = field(init=False)
    _published: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        """Open a new attempt after those that the file already holds."""
        if self.units is not None:
            self.units.obtain(METRICS_FILE)
        self.attempt = 1 + max((int(line["attempt"]) for line in all_lines(self.root)), default=0)
        path = self.root / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        # A worker killed while it wrote leaves half a line; end it, so that ours stands on its own.
        with path.open("ab+") as handle:
            if handle.tell():
                handle.seek(-1, 2)
                if handle.read(1) != b"\n":
                    handle.write(b"\n")

    def resume(self, step: int) -> None:
        """Note that lines past `step` are superseded from here on."""
        self._append({"event": "resume", "step": step})

    def write(self, line: dict[str, Any]) -> None:
        """Append one step."""
        self._append({"event": "step", "time": time.time(), **line})
        size = (self.root / METRICS_FILE).stat().st_size if self.units is not None else 0
        if time.monotonic() - self._published > PUBLISH_S * max(1.0, size / 2**20):
            self.publish()

    def publish(self) -> None:
        """Let other nodes see what was written."""
        if self.units is not None:
            self.units.publish(METRICS_FILE)
            self._published = time.monotonic()

    def _append(self, line: dict[str, Any]) -> None:
        with (self.root / METRICS_FILE).open("a") as handle:
            handle.write(json.dumps({**line, "attempt": self.attempt}) + "\n")


def parse_line(text: str) -> dict[str, Any] | None:
    """One line, or None where it is torn."""
    with contextlib.suppress(ValueError):
        line = parse_json(text)
        if isinstance(line, dict) and "event" in line and all(type(line.get(n)) is int for n in ("step", "attempt")):
            return line
    return None


def all_lines(root: Path) -> list[dict[str, Any]]:
    """Every whole line, superseded ones included."""
    path = root / METRICS_FILE
    texts = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [line for line in map(parse_line, texts) if line is not None]


def read_metrics(root: Path) -> list[dict[str, Any]]:
    """One line per optimizer step, in order; a step that was run again counts as it ran last."""
    steps = {line["step"]: line for line in all_lines(root) if line["event"] == "step"}
    return [steps[step] for step in sorted(steps)]


def steps_redone(root: Path) -> int:
    """Steps that ran more than once."""
    steps = [line["step"] for line in all_lines(root) if line["event"] == "step"]
    return len(steps) - len(set(steps))


@dataclass
class Follower:
    """Reads the lines that were appended since it looked last."""

    root: Path
    offset: int = 0
    mirror: Mirror | None = None
    _looked: float = field(init=False, default=0.0)

    @classmethod
    def at_end(cls, root: Path, mirror: Mirror | None = None) -> Follower:
        """A follower of what is still to come."""
        path = root / METRICS_FILE
        if mirror is not None:
            return cls(root, mirror.size(path) or 0, mirror)
        return cls(root, path.stat().st_size if path.is_file() else 0)

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Whole new lines of steps; a half-written one waits for the next look."""
        data = self._new_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        for text in whole.decode(errors="replace").splitlines():
            line = parse_line(text)
            if line is not None and line["event"] == "step":
                yield line

    def _new_bytes(self) -> bytes:
        path = self.root / METRICS_FILE
        if self.mirror is not None:
            if time.monotonic() - self._looked < PUBLISH_S:
                return b""
            self._looked = time.monotonic()
            size = self.mirror.size(path) or 0
            return self.mirror.get_range(path, self.offset, size - self.offset) if size > self.offset else b""
        if not path.is_file():
            return b""
        with path.open("rb") as handle:
            handle.seek(self.offset)
            return handle.read()
