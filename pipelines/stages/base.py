"""What a stage is: a name, the settings that enter its key, and a function that makes its units.

A stage reads its own settings and the artifacts of the stages it names as inputs, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cluster.durable import UnitStore, units_at
from cluster.model import ModelSource
from cluster.objects import Mirror
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig
from pipelines.model_source import model_source
from pipelines.sources import Sources
from pipelines.tracking import Tracker


class Progress(Protocol):
    """Where a stage says how far it is."""

    def total(self, units: int, done: int = 0) -> None:
        """Announce the number of units, and how many were there already."""
        ...

    def advance(self, units: int = 1, note: str = "", unit: str = "", facts: Callable[[], Any] = dict) -> None:
        """One or more units are committed; `note` is shown beside the bar, `unit` and `facts` are for a log."""
        ...


class UnitRunner(Protocol):
    """Runs unit functions somewhere; see `cluster.units.run_units`."""

    def __call__(
        self,
        fn: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        num_cpus: float,
        on_done: Callable[[Any, Any], None],
        near: Callable[[Any], str] | None = None,
    ) -> None: ...


@dataclass(frozen=True)
class Context:
    """All that a running stage may touch."""

    config: PipelineConfig
    sources: Sources
    key: str
    store: UnitStore
    inputs: dict[str, Path]
    input_keys: dict[str, str]
    runner: UnitRunner
    progress: Progress
    tracker: Tracker
    use_ray: bool
    stopping: Callable[[], bool] = lambda: False
    """Whether the user has asked to stop after the units in flight."""
    say: Callable[[str], None] = lambda _: None
    """Tells the user something beside the progress."""
    mirror: Mirror | None = None
    """Of an object store: what `store` and `inputs` are mirrored from; goes with every job to its worker."""

    def input(self, name: str) -> UnitStore:
        """The units of an earlier stage."""
        return units_at(self.inputs[name], self.mirror)

    def run_units(
        self,
        fn: Callable[[Any], Any],
        jobs: dict[str, Any],
        num_cpus: float = 1.0,
        extra: int = 0,
        near: Callable[[Any], str] | None = None,
    ) -> None:
        """Run `fn(job)` for every unit that is not committed yet; `extra` units follow that the driver makes itself.

        `near(job)` is the node that a unit's input lies on, where there are several.
        """
        there = self.store.committed(jobs)
        missing = {unit: job for unit, job in jobs.items() if unit not in there}
        self.progress.total(len(jobs) + extra, len(jobs) - len(missing))
        names = {id(job): unit for unit, job in missing.items()}

        def done(job: Any, _result: Any) -> None:
            unit = names[id(job)]
            self.progress.advance(unit=unit, facts=partial(self.store.sidecar, unit))

        if missing:
            self.runner(fn, list(missing.values()), num_cpus=num_cpus, on_done=done, near=near)
        self.store.bring(jobs)

    def model_source(self, adapter_dir: Path | None = None) -> ModelSource:
        """Where the parts of this run's model lie; for stages after `quantize`."""
        store = Store.of(self.config.store)
        return model_source(self.config, store, self.input_keys, adapter_dir)

    def commit(self, unit: str, write: Callable[[Path], dict[str, Any] | None], counted: bool = True) -> None:
        """Make one small unit in the driver, unless it is there; `counted` says whether progress counts units."""
        if not self.store.is_committed(unit):
            self.store.commit(unit, write)
        if counted:
            self.progress.advance(unit=unit, facts=partial(self.store.sidecar, unit))


@dataclass(frozen=True)
class Outcome:
    """What a stage leaves for its manifest: the units that make it up, and facts for reports (no times)."""

    units: list[str]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One arrow of the line."""

    name: str
    format_version: int
    inputs: tuple[str, ...]
    settings: Callable[[PipelineConfig, Sources], dict[str, Any]]
    run: Callable[[Context], Outcome]
    summary: str
