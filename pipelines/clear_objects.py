"""`rankline gc` on an object store: the same choice of what nobody needs, and a row in place of a lock.

Whoever clears up holds a row of its own in every database that keeps a lease of the store's runs, and then looks for
drivers; a driver holds its row first, and then looks for who clears up. So one of the two sees the other at least, and
gives way.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from pipelines.artifacts import Store
from pipelines.config import parse, read_yaml
from pipelines.errors import ArtifactError, ConfigError, LeaseError
from pipelines.lease_database import LeaseDatabase, lease_url
from pipelines.maintenance import Garbage, record_of, registered_keys
from pipelines.run_lease import CLEARING, run_id
from pipelines.stages import STAGES


def garbage(store: Store) -> list[Garbage]:
    """Stages' artifacts that no run's record names and no registered version was made of.

    Raises:
        LeaseError: a driver is at a run of this store.
        ArtifactError, TrackingError, ConfigError, StorageError: see `pipelines.maintenance.garbage`.
    """
    for database in _databases(store):
        _refuse_drivers(store, database)
    return _found(store)


def collect(store: Store) -> list[Garbage]:
    """Remove it, and return what it was. No run can begin meanwhile.

    Raises:
        LeaseError, ArtifactError, TrackingError, ConfigError, StorageError: as `garbage`.
    """
    assert store.mirror is not None
    with _to_oneself(store):
        found = _found(store)
        for one in found:
            # A manifest goes first: what is left, if this process dies, is no finished stage.
            store.mirror.delete(one.path / "manifest.json")
            store.mirror.delete_tree(one.path)
            shutil.rmtree(one.path, ignore_errors=True)
    return found


def _found(store: Store) -> list[Garbage]:
    assert store.mirror is not None
    records = [record_of(store, name) for name in store.run_names()]
    needed = {key for record in records for key in record["keys"].values()} | registered_keys(store, records)
    found = []
    for stage in sorted(stage.name for stage in STAGES):  # not the scores that runs over the same base share
        for key in sorted(store.mirror.names(store.root / "_artifacts" / stage, directories=True)):
            path = store.artifact(stage, key)
            if key not in needed and (size := store.mirror.total(path)):
                found.append(Garbage(path, "no run and no registered version needs it", size))
    return found


def _databases(store: Store) -> list[LeaseDatabase]:
    """Where the leases of the store's runs are."""
    urls = set()
    for name in store.run_names():
        path = store.run_dir(name) / "pipeline.yaml"
        try:
            urls.add(lease_url(parse(read_yaml(store.obtain(path)))))
        except ConfigError as error:
            raise ArtifactError(
                f"gc {store.name}: {store.where(path)} tells not which database keeps the lease of run {name}: {error}"
            ) from error
    if not urls:
        raise ConfigError(f"gc {store.name}: there is no run, and so nobody knows which database keeps its leases.")
    return [LeaseDatabase(url) for url in sorted(urls)]


def _refuse_drivers(store: Store, database: LeaseDatabase) -> None:
    for row in database.holders(run_id(store, "")):
        if row["run"] != run_id(store, CLEARING):
            name = str(row["run"]).rpartition("/")[2]
            at = f"driver {row['pid']} on {row['host']} is at run {name}"
            raise LeaseError(
                f"gc {store.name}: {at}. Wait for it; if it is gone, its lease ends in {row['left_s']:.0f} s."
            )


@contextlib.contextmanager
def _to_oneself(store: Store) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for database in _databases(store):
            stack.enter_context(database.held(run_id(store, CLEARING)))
            _refuse_drivers(store, database)
        yield
