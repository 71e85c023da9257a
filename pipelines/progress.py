"""Progress of long stages: a live bar in a terminal, plain lines elsewhere (at most one every few seconds)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

#: Seconds between two plain lines.
INTERVAL_S = 5.0


def hms(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 1h02m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class StageProgress:
    """Counts the units of one stage and shows them."""

    def __init__(self, name: str, bar: RichProgress | None, quiet: bool) -> None:
        self._name, self._bar, self._quiet = name, bar, quiet
        self._total = self._done = self._found = 0
        self._start = self._printed = time.monotonic()
        self._note = ""
        self._task: Any = bar.add_task(name, total=None, note="") if bar else None

    def total(self, units: int, done: int = 0) -> None:
        """Announce the number of units, and how many were there already."""
        self._total = units
        if not self._done:
            self._found = done
        self._done = max(self._done, done)
        self._show()

    def advance(self, units: int = 1, note: str = "", unit: str = "", facts: Callable[[], Any] = dict) -> None:
        """One or more units are done; `unit` and `facts` (who made it, at what cost) are for a log."""
        del unit, facts
        self._done += units
        self._note = note or self._note
        self._show()

    def finish(self, note: str) -> None:
        """Say how the stage ended."""
        if self._bar is not None:
            self._bar.update(self._task, total=1, completed=1, note=note)
            self._bar.stop_task(self._task)
        elif not self._quiet:
            print(f"{self._name:<10} {note}", file=sys.stderr, flush=True)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, total=self._total or None, completed=self._done, note=self._text())
        elif not self._quiet and time.monotonic() - self._printed >= INTERVAL_S:
            self._printed = time.monotonic()
            print(f"{self._name:<10} {self._done}/{self._total}  {self._text()}", file=sys.stderr, flush=True)

    def _text(self) -> str:
        elapsed, fresh = time.monotonic() - self._start, self._done - self._found
        if fresh <= 0 or self._total <= self._done:
            return self._note
        rate = fresh / elapsed
        eta = hms((self._total - self._done) / rate)
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f}s each"
        return f"{speed}  eta {eta}  {self._note}".rstrip()


class JsonProgress(StageProgress):
    """Says the same as lines of JSON, one per unit."""

    def __init__(self, name: str, write: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(name, None, quiet=True)
        self._write = write

    def total(self, units: int, done: int = 0) -> None:
        """See `StageProgress`; announced once."""
        first = self._total == 0
        super().total(units, done)
        if first:
            self._write({"event": "stage", "stage": self._name, "units": units, "found": done})

    def advance(self, units: int = 1, note: str = "", unit: str = "", facts: Callable[[], Any] = dict) -> None:
        """See `StageProgress`."""
        super().advance(units, note)
        line = {"event": "unit" if units else "step", "stage": self._name, "done": self._done, "units": self._total}
        self._write(line | ({"unit": unit} if unit else {}) | ({"note": note} if note else {}) | facts())

    def finish(self, note: str) -> None:
        """See `StageProgress`."""
        self._write({"event": "stage end", "stage": self._name, "note": note})


class ProgressBoard:
    """Makes one `StageProgress` per stage; use as a context manager."""

    def __init__(self, quiet: bool = False, log_json: bool = False) -> None:
        """Args: log_json: lines of JSON on standard error in place of bars; with `quiet` too."""
        self._quiet, self._log_json = quiet, log_json
        self._bar: RichProgress | None = None

    def __enter__(self) -> ProgressBoard:
        if sys.stderr.isatty() and not self._quiet and not self._log_json:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("[bold]{task.description:<10}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str) -> StageProgress:
        """Progress of one more stage."""
        if self._log_json:
            return JsonProgress(name, _write_json)
        return StageProgress(name, self._bar, self._quiet)

    def say(self, text: str) -> None:
        """One line of text, above the bars."""
        if self._log_json:
            _write_json({"event": "message", "text": text})
        elif self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)


def _write_json(line: Mapping[str, Any]) -> None:
    stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"time": stamp, **line}, default=str), file=sys.stderr, flush=True)
