"""Two drivers on one run, interleaved at every step that they take on the lease, on units and on the record.

One thread runs at a time; before every file system call that matters a seeded coin says who goes on. In some a third
one, the user, deletes the lease under its holder.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from soak import SEED, record

import pipelines.lease
from cluster.durable import UnitStore
from pipelines.errors import LeaseError
from pipelines.lease import holder, lease
from pipelines.records import read_record, write_record

INTERLEAVINGS, UNITS, ATTEMPTS, DELETIONS = 200, 3, 4, 8
#: How likely another one goes on: several steps in a row let a whole claim fall between two steps of the other.
SWITCH = 0.15
DRIVERS, USER = ("first", "second"), "user"
MESSAGES = r"is at it\. Wait|took the lease just now|This driver stops"


class Turns:
    """Hands the turn to and fro between threads."""

    def __init__(self, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
        self._rng, self._condition = rng, threading.Condition()
        self._running: list[str] = []
        self._turn = ""
        for owner, name in ((os, "link"), (os, "rename"), (os, "replace"), (os, "unlink"), (Path, "unlink"),
                            (Path, "read_text"), (Path, "write_text"), (Path, "is_file")):  # fmt: skip
            monkeypatch.setattr(owner, name, self._stepping(getattr(owner, name)))
        flock = pipelines.lease.fcntl.flock

        def polling(handle: Any, kind: int) -> None:
            while True:
                self.step()
                try:
                    return flock(handle, kind | pipelines.lease.fcntl.LOCK_NB)
                except BlockingIOError:  # the other one holds it: let it go on
                    if kind & pipelines.lease.fcntl.LOCK_NB:
                        raise

        monkeypatch.setattr(pipelines.lease.fcntl, "flock", polling)

    def _stepping(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step_and_call(*arguments: Any, **options: Any) -> Any:
            self.step()
            return call(*arguments, **options)

        return step_and_call

    def step(self) -> None:
        """Let the coin say who goes on; wait for the turn."""
        me = threading.current_thread().name
        with self._condition:
            if me not in self._running:
                return
            self._pass()
            self._condition.wait_for(lambda: self._turn == me)

    def idle(self, steps: int) -> None:
        """Up to so many steps without doing anything."""
        for _ in range(self._rng.randrange(steps)):
            self.step()

    def _pass(self) -> None:
        if self._turn not in self._running or self._rng.random() < SWITCH:
            self._turn = self._rng.choice(self._running) if self._running else ""
        self._condition.notify_all()

    def run(self, bodies: dict[str, Callable[[str, Turns], None]]) -> None:
        """All of them to their ends."""

        def body() -> None:
            me = threading.current_thread().name
            with self._condition:
                self._condition.wait_for(lambda: self._turn == me)
            try:
                bodies[me](me, self)
            finally:
                with self._condition:
                    self._running.remove(me)
                    self._pass()

        threads = [threading.Thread(target=body, name=name) for name in bodies]
        self._running = list(bodies)
        for thread in threads:
            thread.start()
        with self._condition:
            self._pass()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "the drivers wait for each other"


class Interleaving:
    """Two drivers, by one seed."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng, self.seed = random.Random(seed), seed
        self.run, self.store = directory / "run", UnitStore(directory / "artifact")
        self.lease = self.run / "lease.json"
        self.run.mkdir(parents=True)
        self.before = self.rng.choice(["no lease", "a dead driver's lease", "a torn lease"])
        if self.before != "no lease":
            dead = json.dumps({"pid": 2**22 - 1, "host": os.uname().nodename, "started": 1.0, "token": "dead"})
            self.lease.write_text(dead if self.before == "a dead driver's lease" else "{")
        self.taken_away = self.rng.random() < 0.5
        self.inside: set[str] = set()
        self.ended: dict[str, str] = {}
        self.wrong: list[str] = []

    def play(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """All of it; how many committed."""
        with monkeypatch.context() as patched:
            turns = Turns(self.rng, patched)
            bodies = dict.fromkeys(DRIVERS, self._drive) | ({USER: self._take_away} if self.taken_away else {})
            turns.run(bodies)
        self._judge()
        return f"{sum(text == 'done' for text in self.ended.values())} of 2 committed"

    def _drive(self, name: str, turns: Turns) -> None:
        for _ in range(self.rng.randint(1, ATTEMPTS)):
            turns.idle(30)
            try:
                self._once(name)
                self.ended[name] = "done"
                return
            except LeaseError as error:
                self.ended[name] = str(error)
                if re.search(MESSAGES, str(error)) is None:
                    self.wrong.append(str(error))
            except BaseException as error:
                self.ended[name] = repr(error)
                self.wrong.append(repr(error))
            finally:
                self.inside.discard(name)

    def _once(self, name: str) -> None:
        with lease(self.lease) as held:
            self.inside.add(name)
            if len(self.inside) > 1 and not self.taken_away:
                self.wrong.append("both hold the lease")
            for unit in range(UNITS):
                held.require()
                self.store.commit(f"u{unit}", lambda out: {"size": (out / "file").write_text("value")})
            with held.fenced():
                write_record(self.run, {"driver": name})
                if (holder(self.lease) or {"token": held.token})["token"] != held.token:
                    self.wrong.append("another driver took over while the record was written")

    def _take_away(self, _: str, turns: Turns) -> None:
        for _ in range(DELETIONS):
            turns.idle(25)
            self.lease.unlink(missing_ok=True)  # what the message advises for a host that is gone

    def _judge(self) -> None:
        done = [name for name in DRIVERS if self.ended[name] == "done"]
        commits = Counter(line["unit"] for line in self.store.ledger() if line["event"] == "commit")
        if set(commits.values()) - {1}:
            self.wrong.append(f"committed more than once: {commits}")
        if done and (len(commits) != UNITS or read_record(self.run).get("driver") not in done):
            self.wrong.append(f"{done} ended well, but {commits} and {read_record(self.run)} are there")
        if not done and not self.taken_away:
            self.wrong.append(f"nobody committed: {self.ended}")
        left = {path.name for path in self.run.iterdir()} - {"run.json", ".lease.json.lock", "lease.json"}
        if left:
            self.wrong.append(f"left behind: {left}")


def test_two_drivers_never_commit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[str] = []
    outcomes: Counter[str] = Counter()
    for seed in range(SEED, SEED + INTERLEAVINGS):
        one = Interleaving(tmp_path / str(seed), seed)
        outcomes[one.play(monkeypatch)] += 1
        wrong += [f"seed {seed}, {one.before}: {text}" for text in one.wrong]
    record("two drivers on one run, interleaved", INTERLEAVINGS, wrong, "one commits, the other is told", seen=outcomes)
    assert wrong == []
    assert outcomes["1 of 2 committed"] > INTERLEAVINGS / 4
