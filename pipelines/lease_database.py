"""One driver per run on any number of hosts: a row in a database, changed by compare-and-swap.

An object store has no lock and no exclusive creation that every service keeps, a database has both. The row of a run
holds its driver's token and the time until which that driver holds it, by the clock of the database alone: clocks of
hosts differ. A thread puts that time off while the driver lives; `LEASE_S` after a driver was last heard of (at once
where it died on this host) another one may take the run over, and the first, should it come back, finds another token.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import ConfigError, LeaseError
from pipelines.lease import start_time

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

    from pipelines.config import PipelineConfig

#: How long a driver holds a run that was last heard of, and how often it is heard of, in seconds.
LEASE_S, BEAT_S = 60.0, 15.0
#: How long another writer of a sqlite file is waited for, in seconds.
_LOCK_WAIT_S = 20.0
#: Seconds since 1970 by the clock of the database.
_NOW = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "EXTRACT(EPOCH FROM clock_timestamp())::double precision",
    "mysql": "UNIX_TIMESTAMP(SYSDATE(6))",
    "mariadb": "UNIX_TIMESTAMP(SYSDATE(6))",
}
_MYSQL = ("mysql", "mariadb")


def lease_url(config: PipelineConfig) -> str:
    """The database of a run's lease: `store.lease`, or the tracking database.

    Raises:
        ConfigError: neither is a database that can keep a lease.
    """
    url = config.store.lease or config.register.tracking_uri or ""
    scheme = re.split(r"[+:]", url, maxsplit=1)[0]
    if scheme in _NOW:
        return url
    what = "store.lease" if config.store.lease else "register.tracking_uri"
    raise ConfigError(
        f"store.lease: a run in an object store is kept to one driver by a row in a database, and {what} "
        f"({url or 'null'}) is none. Allowed are {', '.join(sorted(_NOW))}. Set store.lease to a SQLAlchemy URL "
        "without a password, such as postgresql+psycopg2://USER@HOST/NAME (the password comes from PGPASSWORD or "
        "~/.pgpass)."
    )


@cache
def _place() -> str:
    """This boot of this machine, and this process's table of processes: where a process id means something."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)[:255]


@dataclass(frozen=True)
class LeaseDatabase:
    """The leases of runs in one database.

    Attributes:
        url: SQLAlchemy URL, without a password.
        lease_s: how long a driver holds a run that was last heard of.
        beat_s: how often a driver is heard of; 0 is never.
    """

    url: str
    lease_s: float = LEASE_S
    beat_s: float = BEAT_S

    @cached_property
    def engine(self) -> Engine:
        """Connections to the database."""
        import sqlalchemy as sa

        with self.telling("open the database of leases"):
            if self.url.startswith("sqlite"):
                return sa.create_engine(self.url, connect_args={"timeout": _LOCK_WAIT_S}, pool_pre_ping=True)
            engine = sa.create_engine(self.url, pool_pre_ping=True)
            if engine.dialect.name in _MYSQL:  # or its clock goes back by an hour once a year
                sa.event.listen(engine, "connect", _set_utc)
            return engine

    def make_table(self) -> None:
        """Make the table, unless it is there."""
        import sqlalchemy as sa

        try:
            self.table.metadata.create_all(self.engine)
        except sa.exc.DatabaseError:  # another driver made it just now
            self.table.metadata.create_all(self.engine)

    @cached_property
    def table(self) -> Table:
        """One row per run that has a driver."""
        import sqlalchemy as sa
        from sqlalchemy.dialects import mysql

        exact = mysql.VARCHAR(512, charset="utf8mb4", collation="utf8mb4_bin")  # else "a" equals "A" there
        return sa.Table(
            "rankline_leases",
            sa.MetaData(),
            sa.Column("run", sa.String(512).with_variant(exact, *_MYSQL), primary_key=True),
            sa.Column("token", sa.String(32), nullable=False),
            sa.Column("pid", sa.Integer, nullable=False),
            sa.Column("host", sa.String(255), nullable=False),
            sa.Column("place", sa.String(255), nullable=False),
            sa.Column("started", sa.Double, nullable=False),
            sa.Column("expires", sa.Double, nullable=False),
            sa.Column("beats", sa.BigInteger, nullable=False),
        )

    @property
    def now(self) -> Any:
        """The time as the database tells it."""
        import sqlalchemy as sa

        return sa.literal_column(_NOW[self.engine.dialect.name], sa.Double)

    @contextlib.contextmanager
    def telling(self, doing: str) -> Iterator[None]:
        """Turn what the database raises into a `LeaseError`."""
        import sqlalchemy as sa

        try:
            yield
        except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
            text = re.sub(r"\s*(\[SQL:|\(Background on).*", "", " ".join(str(error).split()))[:300]
            raise LeaseError(
                f"{doing} ({self.url}): {text}. Check store.lease (or register.tracking_uri), that the database "
                "answers and that its driver is installed; a password comes from the environment."
            ) from error

    def holder(self, run: str) -> dict[str, Any] | None:
        """Who holds a run: `pid`, `host`, and `left_s` until that ends; None where nobody does. Writes nothing.

        Raises:
            LeaseError: the database does not answer.
        """
        import sqlalchemy as sa

        with self.telling(f"look who is at run {run}"):
            file = sa.make_url(self.url).database if self.url.startswith("sqlite") else None
            if file and Path(file).parent.is_dir() and not Path(file).exists():
                return None  # asking would make it
            with self.engine.connect() as connection:
                known = sa.inspect(connection).has_table(self.table.name)
                row = self._row(connection, run) if known else None
        return None if row is None or row["left_s"] <= 0 or _died_here(row) else row

    def holders(self, start: str) -> list[dict[str, Any]]:
        """Who holds runs whose names begin so; as `holder`, with `run`.

        Raises:
            LeaseError: the database does not answer.
        """
        import sqlalchemy as sa

        table = self.table
        with self.telling(f"look who is at runs of {start}"), self.engine.connect() as connection:
            if not sa.inspect(connection).has_table(table.name):
                return []
            chosen = sa.select(table, (table.c.expires - self.now).label("left_s"))
            found = connection.execute(chosen.where(table.c.run.startswith(start, autoescape=True))).mappings().all()
        named = (dict(row) for row in found if row["run"].startswith(start))  # sqlite's LIKE ignores case
        return [row for row in named if row["left_s"] > 0 and not _died_here(row)]

    def _row(self, connection: Connection, run: str) -> dict[str, Any] | None:
        import sqlalchemy as sa

        table = self.table
        chosen = sa.select(table, (table.c.expires - self.now).label("left_s")).where(table.c.run == run)
        found = connection.execute(chosen).mappings().first()
        return None if found is None else dict(found)

    @contextlib.contextmanager
    def held(self, run: str) -> Iterator[DatabaseLease]:
        """Hold the lease of a run while the block runs.

        Raises:
            LeaseError: a live driver holds it, or the database does not answer.
        """
        lease = DatabaseLease(self, run)
        with self.telling(f"take the lease of run {run}"):
            self.make_table()
            lease.claim()
        stop = threading.Event()
        beat = threading.Thread(target=lease.beat, args=(stop,), name="rankline-lease", daemon=True)
        if self.beat_s:
            beat.start()
        try:
            yield lease
        finally:
            stop.set()
            if self.beat_s:
                beat.join(self.beat_s)
            with contextlib.suppress(LeaseError):  # then it ends by itself
                lease.release()


@dataclass
class DatabaseLease:
    """The lease of one run, and the token that tells it from every other one."""

    database: LeaseDatabase
    run: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    #: By this process's own clock, before the database was last asked: nobody else holds the run for `lease_s` after.
    _heard: float = 0.0

    def require(self) -> None:
        """Go on only while the lease is still this one; to be called before anything is committed.

        A database that does not answer for a moment is no reason to stop, while nobody else can have the lease yet.

        Raises:
            LeaseError: another driver has taken the run over, or nobody can tell.
        """
        asked = time.monotonic()
        try:
            with self.database.telling(f"keep the lease of run {self.run}"), self.database.engine.begin() as connection:
                self._renew(connection)
            self._heard = asked
        except _LostError:
            raise
        except LeaseError:
            if time.monotonic() - self._heard > self.database.lease_s / 2:
                raise

    @contextlib.contextmanager
    def fenced(self) -> Iterator[None]:
        """Keep out all other drivers while the block writes what only the holder may: the row stays locked.

        Raises:
            LeaseError: see `require`.
        """
        with contextlib.ExitStack() as stack:
            with self.database.telling(f"keep the lease of run {self.run}"):
                connection = stack.enter_context(self.database.engine.begin())
                self._renew(connection)
            yield
            with self.database.telling(f"keep the lease of run {self.run}"):
                stack.close()

    def claim(self) -> None:
        """Take the lease.

        Raises:
            LeaseError: a live driver holds it.
        """
        import sqlalchemy as sa

        database, table = self.database, self.database.table
        asked = time.monotonic()
        for _ in range(5):  # the row may come and go between two looks
            try:
                with database.engine.begin() as connection:
                    connection.execute(table.insert().values(run=self.run, beats=0, **self._values()))
                break
            except sa.exc.IntegrityError:
                pass
            except sa.exc.OperationalError as error:
                if not _is_deadlock(error):
                    raise
                continue
            with database.engine.begin() as connection:
                row = database._row(connection, self.run)
                if row is None:
                    continue
                if row["left_s"] > 0 and not _died_here(row):
                    raise LeaseError(
                        f"run {self.run}: driver {row['pid']} on {row['host']} is at it. Wait for it, or stop that "
                        f"process; if it is gone, its lease ends in {row['left_s']:.0f} s."
                    )
                seen = (table.c.run == self.run) & (table.c.token == row["token"]) & (table.c.beats == row["beats"])
                taken = table.update().where(seen).values(beats=table.c.beats + 1, **self._values())
                if connection.execute(taken).rowcount == 1:
                    break
        else:
            raise LeaseError(f"run {self.run}: another driver took the lease just now. Run again later.")
        self._heard = asked

    def _values(self) -> dict[str, Any]:
        started = start_time(os.getpid()) or 0.0
        own = {"token": self.token, "pid": os.getpid(), "host": socket.gethostname(), "place": _place()}
        return own | {"started": started, "expires": self.database.now + self.database.lease_s}

    def _renew(self, connection: Connection) -> None:
        table = self.database.table
        mine = (table.c.run == self.run) & (table.c.token == self.token)
        until = self.database.now + self.database.lease_s
        later = table.update().where(mine).values(beats=table.c.beats + 1, expires=until)
        if connection.execute(later).rowcount != 1:
            row = self.database._row(connection, self.run)
            other = f"driver {row['pid']} on {row['host']} is" if row else "somebody was"
            raise _LostError(
                f"run {self.run}: {other} at its lease in {self.database.url} while this driver held it. This driver "
                "stops; what it has committed stays."
            )

    def beat(self, stop: threading.Event) -> None:
        """Put the end of the lease off until told to stop, or until it is another driver's."""
        while not stop.wait(self.database.beat_s):
            try:
                self.require()
            except _LostError:
                return  # the driver finds out by itself
            except LeaseError:
                continue  # the database may answer again

    def release(self) -> None:
        """Give it back.

        Raises:
            LeaseError: the database does not answer.
        """
        table = self.database.table
        mine = (table.c.run == self.run) & (table.c.token == self.token)
        with self.database.telling(f"give back run {self.run}"), self.database.engine.begin() as connection:
            connection.execute(table.delete().where(mine))
        self.database.engine.dispose()


def _set_utc(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("SET time_zone = '+00:00'")
    cursor.close()


def _is_deadlock(error: Exception) -> bool:
    """Whether MySQL has undone one of several drivers that inserted the row as another one deleted it."""
    return getattr(getattr(error, "orig", None), "args", ())[:1] == (1213,)


class _LostError(LeaseError):
    """The lease is another driver's."""


def _died_here(row: dict[str, Any]) -> bool:
    """Whether the driver was a process of this very machine, and is no more."""
    return bool(row["place"] == _place() and start_time(row["pid"]) != row["started"])
