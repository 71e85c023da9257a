"""Which lease a run has: a file in a store that is a directory, a row in a database where it is an object store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from cluster.objects import plain
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig, parse, read_yaml
from pipelines.errors import LeaseError
from pipelines.lease import HeldLease, holder, lease
from pipelines.lease_database import LeaseDatabase, lease_url

#: In place of a run's name, which it cannot be: who clears the store up.
CLEARING = "_gc"


def run_lease(config: PipelineConfig, store: Store) -> AbstractContextManager[HeldLease]:
    """Hold the lease of a run while the block runs.

    Raises:
        LeaseError: a live driver holds it. ConfigError: nothing can keep it.
    """
    if store.mirror is None:
        return lease(store.run_dir(config.name) / "lease.json")
    return _in_database(config, store)


@contextmanager
def _in_database(config: PipelineConfig, store: Store) -> Iterator[HeldLease]:
    database = LeaseDatabase(lease_url(config))
    with database.held(run_id(store, config.name)) as held:
        if database.holder(run_id(store, CLEARING)) is not None:  # who clears up looks for us after it holds its own
            raise LeaseError(f"use {store.name}: `rankline gc` is at this store. Wait for it.")
        yield held


def run_id(store: Store, name: str) -> str:
    """What a run in an object store is called in a database; options of the URI do not make it another one."""
    scheme, _, rest = plain(store.name).partition("://")
    path = re.sub("/+", "/", f"{rest}/{name}")
    return f"{'gs' if scheme == 'gcs' else scheme}://{path}"


def driver_of(store: Store, name: str) -> dict[str, Any] | None:
    """Who is at a run: `pid` and `host`; None where nobody is.

    Raises:
        LeaseError, ConfigError: nobody can tell.
    """
    if store.mirror is None:
        return holder(store.run_dir(name) / "lease.json")
    config = parse(read_yaml(store.obtain(store.run_dir(name) / "pipeline.yaml")))
    return LeaseDatabase(lease_url(config)).holder(run_id(store, name))
