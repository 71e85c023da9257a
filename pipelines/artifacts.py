"""The artifact store: one content-addressed directory per stage and key, one directory per run.

    STORE/_artifacts/<stage>/<key>/{units/, ledger/, manifest.json, sidecar.json}
    STORE/_mlflow/, STORE/_cluster.json, STORE/_hashes.json, STORE/_registries.json
    STORE/<run name>/{run.json, pipeline.yaml, summary.json, report.html}

Run names never begin with an underscore, so they cannot collide with the store's own files. A stage is finished when
its manifest is there; the manifest holds the hash of every unit, the unit's own manifest the hash of every file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.durable import UnitStore, canonical, sha256_bytes, write_json
from lowrank.reading import is_texts, read_json, shown
from pipelines.errors import ArtifactError


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
    """The store under one directory."""

    root: Path

    def artifact(self, stage: str, key: str) -> Path:
        """Directory of a stage's output."""
        return self.root / "_artifacts" / stage / key

    def units(self, stage: str, key: str) -> UnitStore:
        """The units of a stage."""
        return UnitStore(self.artifact(stage, key))

    def run_dir(self, name: str) -> Path:
        """Directory of a run."""
        return self.root / name

    def registries(self) -> list[str]:
        """The tracking URI of every registry that a run of this store has used.

        Raises:
            ArtifactError: the list is damaged.
        """
        path = self.root / "_registries.json"
        try:
            found = read_json(path)
            if not isinstance(found, list) or not all(isinstance(uri, str) for uri in found):
                raise ValueError(f"got {shown(found)}")
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise ArtifactError(f"read {path}: damaged ({error}). Write it anew: a list of tracking URIs.") from error
        return found

    def remember_registry(self, uri: str) -> None:
        """Put a registry on that list, even if its run goes."""
        known = self.registries()
        if uri not in known:
            write_json(self.root / "_registries.json", [*known, uri], mode=0o600)

    def read_manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a finished stage, or None.

        Raises:
            ArtifactError: it is there but damaged.
        """
        path = self.artifact(stage, key) / "manifest.json"
        try:
            data = read_json(path)
            digest = data.pop("sha256")
            manifest = Manifest(**data)
            _require_types(manifest)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"read {path}: damaged ({error}). Delete {path.parent} and run again.") from error
        if manifest.sha256 != digest:
            raise ArtifactError(f"read {path}: its own hash does not match. Delete {path.parent} and run again.")
        return manifest

    def write_manifest(self, manifest: Manifest) -> None:
        """Finish a stage, atomically."""
        path = self.artifact(manifest.stage, manifest.key) / "manifest.json"
        write_json(path, asdict(manifest) | {"sha256": manifest.sha256})

    def check(self, stage: str, key: str) -> None:
        """Hash a finished stage again, before it is used.

        Raises:
            ArtifactError: it is not there, or damaged; the message names the file.
        """
        manifest = self.read_manifest(stage, key)
        if manifest is None:
            raise ArtifactError(f"use {stage}: {self.artifact(stage, key)} is not finished. Run again.")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = [problem for problem in pool.map(partial(damage, self, manifest), manifest.files) if problem]
        if found:
            raise ArtifactError(
                f"use {stage}: {'; '.join(found)}. Delete {self.artifact(stage, key)} and run again: it is made anew."
            )

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
        store = self.units(stage, key)
        try:
            files = {unit: store.read(unit, verify=True).sha256 for unit in sorted(units)}
        except (ValueError, OSError) as error:
            raise ArtifactError(f"finish {stage}: {error}. Delete that unit and run again.") from error
        manifest = Manifest(stage, key, dict(inputs), dict(config), files, dict(facts), format_version)
        self.write_manifest(manifest)
        return manifest


def damage(store: Store, manifest: Manifest, unit: str) -> str:
    """What is wrong with a unit of a finished stage, with the file's name; empty if nothing is."""
    units = store.units(manifest.stage, manifest.key)
    try:
        digest = units.read(unit, verify=True).sha256
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (ValueError, OSError) as error:
        return str(error)
    return "" if digest == manifest.files[unit] else f"{units.path(unit)} is another one than its manifest names"
