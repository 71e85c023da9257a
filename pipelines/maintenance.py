"""Look after a store: `rankline verify` hashes again what runs are made of, `rankline gc` removes what none needs.

The chain of hashes: a run's record holds its own and that of every stage's manifest, a manifest holds its own and that
of every unit, a unit's manifest its own and that of every file.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.artifacts import Manifest, Store, damage
from pipelines.errors import ArtifactError, ConfigError, LeaseError, TrackingError
from pipelines.lease import holder, store_to_oneself
from pipelines.records import record_hash
from pipelines.stages import STAGES

#: Seconds for which a unit that is half written is left alone: workers outlive a driver that was killed.
FRESH_S = 3600.0


@dataclass(frozen=True)
class StageCheck:
    """What `verify` found of one stage; `problems` name the files."""

    stage: str
    key: str
    state: str
    units: int
    files: int
    num_bytes: int
    problems: tuple[str, ...]


def verify(store: Store, run: str, done: Callable[[StageCheck], None] = lambda check: None) -> dict[str, Any]:
    """Hash everything again that a run's stages have left, in the store itself; `done` is called after each.

    Raises:
        ConfigError: there is no such run. StorageError: the object store refuses.
    """
    record = known_run(store, run, "verify")
    began, checks = time.time(), []
    problems = []
    if record.get("sha256") != record_hash(record):
        problems.append(
            f"{store.where(store.run_dir(run) / 'run.json')} is damaged, or was written by an earlier version: "
            f"its own hash does not match. `rankline resume {run}` writes it anew."
        )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for stage in STAGES:
            if stage.name in record["keys"]:
                checks.append(_check(store, stage.name, record, pool))
                done(checks[-1])
    problems += [problem for check in checks for problem in check.problems]
    return {
        "run": run,
        "stages": [asdict(check) for check in checks],
        "problems": problems,
        "bytes": sum(check.num_bytes for check in checks),
        "seconds": time.time() - began,
    }


def known_run(store: Store, run: str, command: str) -> dict[str, Any]:
    """The record of a run.

    Raises:
        ConfigError: there is none of that name.
    """
    names = store.run_names()
    if run in names and "keys" in (record := store.read_record(run)):
        return record
    raise ConfigError(f"{command} {run!r}: no such run in {store.name}. Runs there: {', '.join(names) or 'none'}.")


def _check(store: Store, stage: str, record: dict[str, Any], pool: ThreadPoolExecutor) -> StageCheck:
    key, recorded = record["keys"][stage], record.get("manifests", {}).get(stage)
    try:
        manifest = store.read_manifest(stage, key)
    except ArtifactError as error:
        return StageCheck(stage, key, "damaged", 0, 0, 0, (str(error),))
    where = store.where(store.artifact(stage, key) / "manifest.json")
    if manifest is None:
        missing = (f"{where} is not there, though the run has finished {stage}",) if recorded else ()
        return StageCheck(stage, key, "damaged" if missing else "not finished", 0, 0, 0, missing)
    sizes, found = [], []
    for problem, own in pool.map(partial(_hash, store, manifest), manifest.files):
        found += [problem] if problem else []
        sizes += own
    if recorded and recorded != manifest.sha256:
        found.append(f"{where} is another one than the run has recorded")
    return StageCheck(
        stage, key, "damaged" if found else "whole", len(manifest.files), len(sizes), sum(sizes), tuple(found)
    )


def _hash(store: Store, manifest: Manifest, unit: str) -> tuple[str, list[int]]:
    """What is wrong with a unit, or the sizes of its files."""
    units = store.units(manifest.stage, manifest.key)
    problem = damage(store, manifest, unit)
    if problem:
        return problem, []
    try:
        return "", units.hash_again(unit)
    except ValueError as error:
        return str(error), []


@dataclass(frozen=True)
class Garbage:
    """Something in a store that nobody needs."""

    path: Path
    what: str
    num_bytes: int


def garbage(store: Store, now: float | None = None) -> list[Garbage]:
    """Stages' artifacts that no run's record names and no registered version was made of, and what died half written.

    Raises:
        LeaseError: a driver is at a run of this store.
        ArtifactError: a run's record cannot be read.
        TrackingError: a registry that a run uses cannot be read, so that nobody knows what its versions need.
        ConfigError: there is no store.
        StorageError: the object store refuses.
    """
    root = store.root
    if store.mirror is not None:
        from pipelines import clear_objects

        return clear_objects.garbage(store)
    if not (root / "_artifacts").is_dir():
        raise ConfigError(f"gc {root}: there is no store. Give its directory with --store.")
    _refuse_drivers(root)
    records = [record_of(store, name) for name in store.run_names()]
    needed = {key for record in records for key in record["keys"].values()} | registered_keys(store, records)
    old = (time.time() if now is None else now) - FRESH_S
    found = []
    for path in sorted(root.glob("_artifacts/*/*")):
        if path.is_symlink() or path.parent.is_symlink() or not path.is_dir():
            continue  # not ours: the store makes directories alone
        if path.parent.name not in {stage.name for stage in STAGES}:
            continue  # scores that runs over the same base share
        if path.name not in needed:
            found.append(Garbage(path, "no run and no registered version needs it", size_of(path)))
            continue
        for left in sorted((path / "tmp").glob("*")):
            if _changed(left) < old:
                found.append(Garbage(left, "a unit that was never finished", size_of(left)))
    return found


def collect(store: Store) -> list[Garbage]:
    """Remove all garbage, and return what it was. No run can begin meanwhile.

    Raises:
        LeaseError, TrackingError, ConfigError: as `garbage`.
        ArtifactError: as `garbage`; or something cannot be removed, and the rest is.
    """
    root = store.root
    if store.mirror is not None:
        from pipelines import clear_objects

        return clear_objects.collect(store)
    if not (root / "_artifacts").is_dir():
        return garbage(store)  # which refuses
    with store_to_oneself(root):
        found, stayed = garbage(store), []
        for one in found:
            _refuse_drivers(root)  # on hosts that share no locks with this one
            try:
                # A manifest goes first: what is left, if this process dies, is no finished stage.
                (one.path / "manifest.json").unlink(missing_ok=True)
                shutil.rmtree(one.path)
            except OSError as error:
                stayed.append(f"{one.path}: {error.strerror}")
    if stayed:
        raise ArtifactError(
            f"gc {root}: could not remove {'; '.join(stayed)}. The other {len(found) - len(stayed)} went."
        )
    return found


def _refuse_drivers(root: Path) -> None:
    for path in sorted(root.glob("[!_]*/lease.json")):
        if (driver := holder(path)) is not None:
            at = f"driver {driver['pid']} on {driver['host']} is at run {path.parent.name}"
            raise LeaseError(f"gc {root}: {at}. Wait for it; if that host is gone, delete {path}.")


def record_of(store: Store, name: str) -> dict[str, Any]:
    """The record of a run, which must be beyond doubt: what it does not name is removed."""
    record, place = store.read_record(name), store.where(store.run_dir(name))
    if "keys" not in record or record.get("sha256", record_hash(record)) != record_hash(record):
        raise ArtifactError(
            f"gc {store.name}: {place}/run.json cannot be read or is damaged, and nobody else knows what run {name} "
            f"needs. `rankline resume {name}` or `rankline run` writes it anew; delete {place} if the run may go."
        )
    return record


def registered_keys(store: Store, records: list[dict[str, Any]]) -> set[str]:
    """Keys of stages that registered versions were made of, in every registry that a run of this store ever used."""
    from pipelines.tracking import RegistryReader, default_uri

    uris = {default_uri(store.root)} if (store.root / "_mlflow").is_dir() else set()
    uris |= {uri for record in records if (uri := record.get("mlflow_uri"))}
    keys: set[str] = set()
    for uri in sorted({*uris, *store.registries()}):
        try:
            reader = RegistryReader(uri)
            listed = [version for model in reader.models() for version in reader.versions(model.name)]
        except (TrackingError, ArtifactError) as error:
            raise TrackingError(f"gc: {uri} tells nothing of what its versions need: {error}") from error
        tags = (item for version in listed for item in version.tags.items())
        keys |= {value for name, value in tags if name == "rankline.key" or name.startswith("rankline.key.")}
    return keys


def _changed(path: Path) -> float:
    """When something in a directory was last written."""
    return max((item.lstat().st_mtime for item in (path, *path.rglob("*"))), default=0.0)


def size_of(path: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
