"""One driver per run by a row in a database: who holds it, when it ends, by whose clock, and who must stop.

`RANKLINE_TEST_LEASE` may be the URL of a PostgreSQL or MySQL database; its table of leases is dropped.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from soak import SEED

from cluster.durable import UnitStore
from pipelines.config import parse
from pipelines.errors import ConfigError, LeaseError, exit_code
from pipelines.lease_database import LeaseDatabase, lease_url
from pipelines.records import read_record, write_record

RUN = "s3://bucket/store/one"
HOLD = """
import sys, time
from pipelines.lease_database import LeaseDatabase
with LeaseDatabase(sys.argv[1]).held(sys.argv[2]):
    print('held', flush=True)
    time.sleep(60)
"""
ROUNDS = 25


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'leases.db'}"


@pytest.fixture(params=["file", "server"])
def url(request: pytest.FixtureRequest) -> str:
    """A database without a lease: a sqlite file, or the server's that the environment names."""
    if request.param == "file":
        return str(request.getfixturevalue("file"))
    server = os.environ.get("RANKLINE_TEST_LEASE")
    if not server:
        pytest.skip("RANKLINE_TEST_LEASE names no database")
    with sa.create_engine(server).begin() as connection:
        connection.execute(sa.text("drop table if exists rankline_leases"))
    return server


def rows(url: str) -> list[Any]:
    with sa.create_engine(url).connect() as connection:
        return list(connection.execute(sa.text("select * from rankline_leases")).mappings())


def change(url: str, values: str) -> None:
    with sa.create_engine(url).begin() as connection:
        connection.execute(sa.text(f"update rankline_leases set {values}"))


def test_it_is_held_for_the_block_and_gone_after(url: str) -> None:
    database = LeaseDatabase(url)
    with database.held(RUN) as held:
        held.require()
        with held.fenced():
            pass
        with database.held("s3://bucket/store/another"):  # another run is another lease
            assert len(rows(url)) == 2
        told = r"is at it\. Wait for it.* its lease ends in \d+ s"
        with pytest.raises(LeaseError, match=told) as caught, LeaseDatabase(url).held(RUN):
            pass
        assert exit_code(caught.value) == 4
    assert rows(url) == []
    with pytest.raises(KeyError), database.held(RUN):
        raise KeyError
    assert rows(url) == []


def test_looking_makes_no_database(file: str, tmp_path: Path) -> None:
    assert LeaseDatabase(file).holder(RUN) is None
    assert not list(tmp_path.iterdir())


def test_a_live_driver_refuses_another_and_a_killed_one_does_not(url: str) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, url, RUN], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert (LeaseDatabase(url).holder(RUN) or {})["pid"] == other.pid
        with pytest.raises(LeaseError, match=f"driver {other.pid}"), LeaseDatabase(url).held(RUN):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert LeaseDatabase(url).holder(RUN) is None
    with LeaseDatabase(url).held(RUN) as held:  # it died on this host: nobody waits for its lease to end
        held.require()


def test_a_driver_of_another_host_is_taken_over_when_its_lease_has_ended(url: str) -> None:
    silent = LeaseDatabase(url, lease_s=0.8, beat_s=0)
    with silent.held(RUN) as first:
        change(url, "place = 'elsewhere', host = 'elsewhere'")
        with pytest.raises(LeaseError, match="on elsewhere is at it"), LeaseDatabase(url).held(RUN):
            pass
        time.sleep(1.0)
        first.require()  # nobody has taken it meanwhile: it goes on, for as long again
        with pytest.raises(LeaseError, match="on elsewhere is at it"), LeaseDatabase(url).held(RUN):
            pass
        time.sleep(1.0)
        with LeaseDatabase(url).held(RUN) as second:
            for refused in (first.require, first.fenced().__enter__):
                with pytest.raises(LeaseError, match=r"This driver stops; what it has committed stays"):
                    refused()
            second.require()
            first.release()  # does not give away what is another's
            second.require()


@pytest.mark.parametrize("changed", ["token", "beats"])
def test_a_row_that_changed_since_it_was_read_is_not_taken(
    url: str, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Databases that lock no row for a reader show one that another claimant has taken, or its holder kept, since."""
    look = LeaseDatabase._row

    def before(self: LeaseDatabase, connection: Any, run: str) -> dict[str, Any] | None:
        row = look(self, connection, run)
        old = {"token": "of the driver before"} if changed == "token" else {"beats": -1}
        return None if row is None else dict(row) | old | {"left_s": -1.0}

    with LeaseDatabase(url).held(RUN) as held:
        monkeypatch.setattr(LeaseDatabase, "_row", before)
        with pytest.raises(LeaseError, match="another driver took the lease just now"), LeaseDatabase(url).held(RUN):
            pass
        monkeypatch.undo()
        held.require()


def test_a_heart_beats_as_long_as_the_driver_lives(url: str) -> None:
    with LeaseDatabase(url, lease_s=0.6, beat_s=0.1).held(RUN):
        change(url, "place = 'elsewhere'")
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            with pytest.raises(LeaseError, match="is at it"), LeaseDatabase(url).held(RUN):
                pass
            time.sleep(0.1)


def test_the_clock_is_the_databases(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with LeaseDatabase(url).held(RUN):
        change(url, "place = 'elsewhere'")
        with monkeypatch.context() as hours_ahead:
            hours_ahead.setattr(time, "time", lambda: 4e9)
            with pytest.raises(LeaseError, match="is at it"), LeaseDatabase(url).held(RUN):
                pass
        (row,) = rows(url)
        assert abs(row["expires"] - 60 - time.time()) < 20
        change(url, "expires = expires - 61")
        with LeaseDatabase(url).held(RUN):
            pass


def test_a_database_that_is_silent_for_a_moment_stops_nobody(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.lease_database._LOCK_WAIT_S", 0.05)
    with LeaseDatabase(file, lease_s=2.0, beat_s=0).held(RUN) as held:
        with sa.create_engine(file).connect() as other:
            other.exec_driver_sql("BEGIN IMMEDIATE")
            held.require()
            time.sleep(1.1)
            with pytest.raises(LeaseError, match=r"keep the lease of run .*database is locked"):
                held.require()
            with pytest.raises(LeaseError, match="database is locked"), held.fenced():
                pytest.fail("nobody can tell whose the run is")
            other.exec_driver_sql("ROLLBACK")
        held.require()


def test_a_database_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 100)
    urls = (f"sqlite:///{tmp_path / 'none' / 'a.db'}", f"sqlite:///{tmp_path / 'text'}",
            "postgresql+psycopg2://me@127.0.0.1:9/x")  # fmt: skip
    for url in urls:
        with pytest.raises(LeaseError, match=r"Check store\.lease") as caught, LeaseDatabase(url).held(RUN):
            pass
        assert exit_code(caught.value) == 4
        with pytest.raises(LeaseError, match=r"Check store\.lease"):
            LeaseDatabase(url).holder(RUN)


def test_runs_whose_names_differ_in_case_are_two(url: str) -> None:
    database = LeaseDatabase(url)
    with database.held("s3://bucket/store/one"), database.held("s3://bucket/store/One"):
        assert len(rows(url)) == 2
        assert [row["run"] for row in database.holders("s3://bucket/store/O")] == ["s3://bucket/store/One"]


def test_many_drivers_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the lease as soon as it is given back, over and over; no two of them ever have it."""
    monkeypatch.setattr("pipelines.lease_database._died_here", lambda row: False)
    inside, most, failed, taken = 0, 0, list[str](), Counter[int]()
    count, until = threading.Lock(), time.monotonic() + 4

    def take(number: int) -> None:
        nonlocal inside, most
        database = LeaseDatabase(url, beat_s=0)
        while time.monotonic() < until:
            try:
                with database.held(RUN) as held:
                    with count:
                        inside += 1
                        most = max(most, inside)
                    held.require()
                    with count:
                        inside -= 1
                    taken[number] += 1
            except LeaseError as error:
                if "is at it" not in str(error) and "took the lease just now" not in str(error):
                    failed.append(str(error))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failed == []
    assert most == 1
    assert len(taken) > 1
    assert rows(url) == []


def drive(run: str, directory: Path, database: LeaseDatabase, rng: random.Random, name: str, wrong: list[str]) -> str:
    """Claim, commit, pause now and then for longer than the lease, write the record; how it ended."""
    time.sleep(rng.random() * 0.05)
    try:
        with database.held(run) as held:
            for unit in range(3):
                time.sleep(rng.choice([0, 0, 0.01, 2 * database.lease_s]))
                held.require()
                UnitStore(directory).commit(f"u{unit}", lambda out: {"size": (out / "file").write_text("value")})
            with held.fenced():
                write_record(directory, {"driver": name})
                time.sleep(rng.choice([0, 2 * database.lease_s]))  # the row is locked, however long that takes
                if read_record(directory).get("driver", name) != name:
                    wrong.append("another driver wrote while the fence was up")
        return "done"
    except LeaseError as error:
        return "told" if "is at it" in str(error) or "This driver stops" in str(error) else f"wrong: {error}"


def test_two_drivers_at_random_moments(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of one process count as drivers of two hosts, whose leases end after 50 ms."""
    monkeypatch.setattr("pipelines.lease_database._died_here", lambda row: False)
    seen, wrong = Counter[str](), list[str]()
    for seed in range(SEED, SEED + ROUNDS):
        directory, ended = tmp_path / str(seed), dict[str, str]()
        directory.mkdir()
        database = LeaseDatabase(url, lease_s=0.05, beat_s=0)

        def body(name: str, seed: int = seed, directory: Path = directory, database: LeaseDatabase = database,
                 ended: dict[str, str] = ended) -> None:  # fmt: skip
            ended[name] = drive(f"{RUN}{seed}", directory, database, random.Random(f"{seed}{name}"), name, wrong)

        threads = [threading.Thread(target=body, args=(name,)) for name in ("first", "second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        commits = Counter(line["unit"] for line in UnitStore(directory).ledger() if line["event"] == "commit")
        done = [name for name, how in ended.items() if how == "done"]
        if not done or set(commits.values()) != {1} or read_record(directory).get("driver") not in done:
            wrong.append(f"seed {seed}: {ended}, {commits}, {read_record(directory)}")
        seen[" and ".join(sorted(ended.values()))] += 1
    assert wrong == []
    assert set(seen) <= {"done and told", "done and done"}
    assert seen["done and told"] > ROUNDS / 4


def config(**sections: Any) -> Any:
    values = {"name": "a", "model": {"source": "m"}, "data": {"train": "t", "heldout": "h"}} | sections
    return parse(values | {"store": {"path": "s3://b/p"} | sections.get("store", {})})


def test_which_database_keeps_the_lease() -> None:
    tracked = {"tracking_uri": "postgresql+psycopg2://me@db/mlflow"}
    assert lease_url(config(register=tracked)) == tracked["tracking_uri"]
    own = "sqlite:////shared/leases.db"
    assert lease_url(config(register=tracked, store={"lease": own})) == own
    for register in ({}, {"tracking_uri": "http://mlflow:5000"}):
        with pytest.raises(ConfigError, match=r"register\.tracking_uri .* is none\. Allowed are .*Set store\.lease"):
            lease_url(config(register=register))
    with pytest.raises(ConfigError, match=r"store\.lease \(oracle://x/y\) is none"):
        lease_url(config(store={"lease": "oracle://x/y"}))
