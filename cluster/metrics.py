"""`metrics.jsonl`: one line per optimizer step, appended by rank 0, followed by the driver."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.train_job import METRICS_FILE
from lowrank.reading import parse_json


@dataclass
class MetricLog:
    """The writer; `attempt` numbers the worker groups, whose later lines supersede earlier ones."""

    root: Path
    attempt: int = field(init=False)

    def __post_init__(self) -> None:
        """Open a new attempt after those that the file already holds."""
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

    @classmethod
    def at_end(cls, root: Path) -> Follower:
        """A follower of what is still to come."""
        path = root / METRICS_FILE
        return cls(root, path.stat().st_size if path.is_file() else 0)

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Whole new lines of steps; a half-written one waits for the next look."""
        path = self.root / METRICS_FILE
        if not path.is_file():
            return
        with path.open("rb") as handle:
            handle.seek(self.offset)
            data = handle.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        for text in whole.decode(errors="replace").splitlines():
            line = parse_line(text)
            if line is not None and line["event"] == "step":
                yield line
