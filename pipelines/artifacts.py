"""The artifact store: one content-addressed directory per stage and key, one directory per run.

    STORE/_artifacts/<stage>/<key>/{units/, ledger/, manifest.json, sidecar.json}
    STORE/_mlflow/, STORE/_cluster.json, STORE/_hashes.json, STORE/_registries.json
    STORE/<run name>/{run.json, pipeline.yaml, summary.json, report.html}

Run names never begin with an underscore, so they cannot collide with the store's own files. A stage is finished when
its manifest is there; the manifest holds the hash of every unit, the unit's own manifest the hash of every file.

A store may be an object store: `root` then is the directory that mirrors it on each node, with the same layout, and
what is finished is asked of the object store alone. What belongs to one machine (cluster, tokens, hashes) stays in
`root`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.durable import UnitStore, canonical, sha256_bytes, units_at, write_atomic, write_json
from cluster.objects import Mirror
from lowrank.reading import is_texts, read_json, shown
from pipelines.errors import ArtifactError
from pipelines.records import read_record, write_record
from pipelines.store_checks import is_uri

if TYPE_CHECKING:
    from pipelines.config import StoreConfig


@dataclass(frozen=True)
class Manifest:
    """What a finished stage left: its key, what went in, and a hash per unit. No times, no ids, no metrics."""

    stage: str
    key: str
    inputs: dict[str, str]
    config: dict[str, Any]
    files: dict[str, str]
    facts: dict[str, Any]
    format_version: int

    @property
    def sha256(self) -> str:
        """Hash of the whole manifest, for the run record."""
        return sha256_bytes(canonical(asdict(self)))


def _require_types(manifest: Manifest) -> None:
    fits = is_texts(manifest.inputs) and is_texts(manifest.files)
    if not fits or not isinstance(manifest.config, dict) or not isinstance(manifest.facts, dict):
        raise ValueError("inputs, config, files and facts must be mappings")


def stage_key(stage: str, format_version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The content address of a stage: 20 hex digits over its name, format, result config and inputs' keys."""
    return sha256_bytes(canonical({"stage": stage, "format": format_version, "config": config, "inputs": inputs}))[:20]


@dataclass(frozen=True)
class Store:
    """The store under one directory, or the object store that it mirrors."""

    root: Path
    mirror: Mirror | None = None

    @classmethod
    def open(cls, path: str, cache: str | None = None) -> Store:
        """The store at a path or URI; an object store is mirrored in `cache`, or below ~/.cache/rankline."""
        if not is_uri(path):
            return cls(Path(path).resolve())
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankline"
        root = Path(cache).expanduser() if cache else home / sha256_bytes(path.encode())[:16]
        return cls(root.resolve(), Mirror(path, root.resolve()))

    @classmethod
    def of(cls, config: StoreConfig) -> Store:
        """The store of a pipeline."""
        return cls.open(config.path, config.cache)

    @property
    def name(self) -> str:
        """What messages and commands call it."""
        return str(self.root) if self.mirror is None else self.mirror.uri

    def where(self, path: Path) -> str:
        """What messages call something in it."""
        return str(path) if self.mirror is None else self.mirror.url(path)

    def publish(self, path: Path) -> None:
        """A file below `root` was written: it goes to the object store, if there is one.

        Raises:
            StorageError: the object store refuses.
        """
        if self.mirror is not None:
            self.mirror.put(path, path)

    def obtain(self, path: Path) -> Path:
        """A file below `root` as the object store has it; it may not be there.

        Raises:
            StorageError: the object store refuses.
        """
        if self.mirror is not None:
            try:
                write_atomic(path, self.mirror.get(path))
            except FileNotFoundError:
                path.unlink(missing_ok=True)
        return path

    def run_names(self) -> list[str]:
        """Names of its runs."""
        if self.mirror is None:
            return [path.parent.name for path in sorted(self.root.glob("[!_]*/run.json"))]
        names = (name for name in self.mirror.names(self.root, directories=True) if not name.startswith("_"))
        return sorted(name for name in names if self.mirror.size(self.run_dir(name) / "run.json") is not None)

    def read_record(self, name: str) -> dict[str, Any]:
        """The record of a run; an empty mapping where there is none, or where it is damaged."""
        self.obtain(self.run_dir(name) / "run.json")
        return read_record(self.run_dir(name))

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Replace the record of a run."""
        write_record(self.run_dir(name), record)
        self.publish(self.run_dir(name) / "run.json")

    def artifact(self, stage: str, key: str) -> Path:
        """Directory of a stage's output."""
        return self.root / "_artifacts" / stage / key

    def units(self, stage: str, key: str) -> UnitStore:
        """The units of a stage."""
        return units_at(self.artifact(stage, key), self.mirror)

    def run_dir(self, name: str) -> Path:
        """Directory of a run."""
        return self.root / name

    def registries(self) -> list[str]:
        """The tracking URI of every registry that a run of this store has used.

        Raises:
            ArtifactError: the list is damaged.
        """
        path = self.obtain(self.root / "_registries.json")
        try:
            found = read_json(path)
            if not isinstance(found, list) or not all(isinstance(uri, str) for uri in found):
                raise ValueError(f"got {shown(found)}")
        except FileNotFoundError:
            return []
        except ValueError as error:
            what = f"read {self.where(path)}: damaged ({error}). Write it anew: a list of tracking URIs."
            raise ArtifactError(what) from error
        return found

    def remember_registry(self, uri: str) -> None:
        """Put a registry on that list, even if its run goes."""
        known = self.registries()
        if uri not in known:
            write_json(self.root / "_registries.json", [*known, uri], mode=0o600)
            self.publish(self.root / "_registries.json")

    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a finished stage, or None.

        Raises:
            ArtifactError: it is there but damaged.
        """
        path, place = self.artifact(stage, key) / "manifest.json", self.where(self.artifact(stage, key))
        try:
            data = read_json(self.obtain(path))
            digest = data.pop("sha256")
            manifest = Manifest(**data)
            _require_types(manifest)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"read {place}/{path.name}: damaged ({error}). Delete {place} and run again."
            ) from error
        if manifest.sha256 != digest:
            raise ArtifactError(f"read {place}/{path.name}: its own hash does not match. Delete {place} and run again.")
        return manifest

    def write_manifest(self, manifest: Manifest) -> None:
        """Finish a stage, atomically."""
        path = self.artifact(manifest.stage, manifest.key) / "manifest.json"
        write_json(path, asdict(manifest) | {"sha256": manifest.sha256})
        self.publish(path)

    def check(self, stage: str, key: str) -> None:
        """Hash a finished stage again, before it is used.

        Raises:
            ArtifactError: it is not there, or damaged; the message names the file.
        """
        manifest = self.read_manifest(stage, key)
        if manifest is None:
            raise ArtifactError(f"use {stage}: {self.where(self.artifact(stage, key))} is not finished. Run again.")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = [problem for problem in pool.map(partial(damage, self, manifest), manifest.files) if problem]
        if found:
            place = self.where(self.artifact(stage, key))
            raise ArtifactError(f"use {stage}: {'; '.join(found)}. Delete {place} and run again: it is made anew.")

    def seal(
        self,
        stage: str,
        key: str,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
        units: Iterable[str],
        facts: Mapping[str, Any],
        format_version: int,
    ) -> Manifest:
        """Verify every unit of a stage and write its manifest.

        Raises:
            ArtifactError: a unit is missing or damaged; the message names the file.
        """
        store, units = self.units(stage, key), sorted(units)
        try:
            store.bring(units)
            files = {unit: store.read(unit, verify=True).sha256 for unit in units}
        except (ValueError, OSError) as error:
            raise ArtifactError(f"finish {stage}: {error}. Delete that unit and run again.") from error
        manifest = Manifest(stage, key, dict(inputs), dict(config), files, dict(facts), format_version)
        self.write_manifest(manifest)
        return manifest


def damage(store: Store, manifest: Manifest, unit: str) -> str:
    """What is wrong with a unit of a finished stage, with the file's name; empty if nothing is.

    Of an object store what this machine has of the unit is hashed; `damaged_object` hashes what lies there.
    """
    units = store.units(manifest.stage, manifest.key)
    problem = _problem(units, manifest, unit)
    # A copy in a mirror may be damaged or out of date, which is no harm: it is dropped.
    return _problem(units, manifest, unit) if problem and units.forget(unit) else problem


def _problem(units: UnitStore, manifest: Manifest, unit: str) -> str:
    try:
        digest = units.read(unit, verify=True).sha256
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (ValueError, OSError) as error:
        return str(error)
    return "" if digest == manifest.files[unit] else f"{units.where(unit)} is another one than its manifest names"
