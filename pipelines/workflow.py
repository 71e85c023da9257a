"""The durable line: stages over the artifact store, each skipped when its key is finished.

The driver holds no truth. What is done stands in the store, under keys that follow from the configuration and the
hashes of the sources alone; killing the driver anywhere costs at most the units in flight. Ray's own workflow library
was removed after 2.47, so this is ours, and thin.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.durable import UnitStore, canonical, peak_rss_bytes, sha256_bytes, write_atomic, write_json
from cluster.errors import OutOfMemoryError, StorageError
from cluster.node_metrics import node_metrics
from lowrank.reading import is_number, read_json
from pipelines.artifacts import Manifest, Store, stage_key
from pipelines.config import PipelineConfig, to_dict
from pipelines.errors import GateError, Interrupted, LeaseError, PipelineError
from pipelines.estimates import memory_advice
from pipelines.lease import HeldLease, store_in_use
from pipelines.portable import portable_yaml
from pipelines.progress import ProgressBoard, StageProgress, hms
from pipelines.run_lease import run_lease
from pipelines.sources import Sources, hash_sources
from pipelines.stages import STAGES
from pipelines.stages.base import Context, Stage
from pipelines.summary import headline, shown, summarise
from pipelines.timeline import counts
from pipelines.tracking import Tracker, flatten


@dataclass(frozen=True)
class StageRecord:
    """How a stage went in this run; `seconds` and memory are those of the run that made it."""

    name: str
    key: str
    cached: bool
    seconds: float
    peak_rss_bytes: int
    units: int
    units_done: int
    facts: dict[str, Any]
    manifest_sha256: str


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    name: str
    run_key: str
    directory: Path
    stages: list[StageRecord]
    endpoint: dict[str, Any] | None
    mlflow_uri: str
    mlflow_run_id: str
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)


def stage_keys(config: PipelineConfig, sources: Sources) -> dict[str, str]:
    """The key of every stage; known before anything has run."""
    keys: dict[str, str] = {}
    for stage in STAGES:
        inputs = {name: keys[name] for name in stage.inputs}
        keys[stage.name] = stage_key(stage.name, stage.format_version, stage.settings(config, sources), inputs)
    return keys


def run_key(keys: dict[str, str]) -> str:
    """One key for the whole run."""
    return sha256_bytes(canonical(keys))[:20]


def run(config: PipelineConfig, quiet: bool = False, verify: bool = False, log_json: bool = False) -> RunResult:
    """Run a pipeline, or go on with it where it was left.

    What a stage reads is hashed again before; with `verify` everything that was made before, read or not. With
    `log_json` progress is told as lines of JSON on standard error.

    Raises:
        PipelineError, cluster.errors.ClusterError, lowrank.errors.LowRankError: see `pipelines.errors.exit_code`.
    """
    store = Store.of(config.store)
    directory = store.run_dir(config.name)
    directory.mkdir(parents=True, exist_ok=True)
    with store_in_use(store.root), run_lease(config, store) as held, ProgressBoard(quiet, log_json) as board:
        line = Line(config, store, board, held, verify)
        try:
            return line.run()
        except BaseException as error:
            line.fail(error)
            raise


class Line:
    """One pass of one driver over the stages of a pipeline."""

    def __init__(
        self, config: PipelineConfig, store: Store, board: ProgressBoard, held: HeldLease, verify: bool = False
    ) -> None:
        self.config, self.store, self.board, self.held = config, store, board, held
        self._verify, self._checked = verify, set[str]()
        self.directory = store.run_dir(config.name)
        self.sources = hash_sources(config, store.root / "_hashes.json")
        self.keys = stage_keys(config, self.sources)
        self.started = time.time()
        self.records: list[StageRecord] = []
        self.tracker: Tracker | None = None
        self.stop_requested = False

    def run(self) -> RunResult:
        """Every stage, then the endpoint, the summary and the report."""
        from pipelines.endpoint import deploy_endpoint
        from pipelines.preflight import require_ready
        from pipelines.session import on_cluster, require_room

        require_ready(self.config, self.sources, self.store)
        self._write_record("RUNNING")
        write_atomic(self.directory / "pipeline.yaml", portable_yaml(self.config))
        self.store.publish(self.directory / "pipeline.yaml")
        with self._signals(), on_cluster(self.config, self.store), contextlib.ExitStack() as while_it_runs:
            missing = [name for name, key in self.keys.items() if self.store.read_manifest(name, key) is None]
            require_room(self.config, missing)
            self.tracker = self._track()
            while_it_runs.enter_context(node_metrics(self.tracker.log_nodes, self.config.cluster.system_metrics_s))
            for stage in STAGES:
                self._check_stop(stage.name)
                self.records.append(self._stage(stage))
                self._gate(stage)
                self._write_record("RUNNING")
            endpoint = None
            if self.config.serve.enabled:
                self._check_stop("serve")
                progress = self.board.stage("serve")
                endpoint = deploy_endpoint(self.config, self.store, self.keys, self._facts("register"), self.tracker)
                note = "already up" if endpoint["cached"] else f"{hms(endpoint['seconds'])}"
                progress.finish(f"{note}  {endpoint['url']}")
        return self._finish(endpoint)

    def fail(self, error: BaseException) -> None:
        """Leave a record of how the run ended; what is committed stays."""
        interrupted = isinstance(error, KeyboardInterrupt | Interrupted)
        try:
            self._write_record("INTERRUPTED" if interrupted else "FAILED", error=f"{type(error).__name__}: {error}")
        except (LeaseError, StorageError):
            return  # the run is another driver's now, and so are its records; or nobody takes one
        if self.tracker is not None and self.tracker.parent:
            with contextlib.suppress(PipelineError):
                self.tracker.end("KILLED" if interrupted else "FAILED")

    def _track(self) -> Tracker:
        tracker = Tracker(self.store.root, self.config.register.tracking_uri, self.config.register.experiment)
        self.store.remember_registry(tracker.uri)
        previous = self.store.read_record(self.config.name)
        same = previous.get("run_key") == run_key(self.keys)
        tags = {"rankline.run_key": run_key(self.keys), "rankline.name": self.config.name}
        tracker.begin(self.config.name, to_dict(self.config), tags, previous.get("mlflow_run_id") if same else None)
        return tracker

    def _stage(self, stage: Stage) -> StageRecord:
        key = self.keys[stage.name]
        progress = self.board.stage(stage.name)
        manifest = self.store.read_manifest(stage.name, key)
        if manifest is not None:
            if self._verify:
                self._check_artifact(stage.name)
            sidecar = self._read_sidecar(manifest)
            progress.finish(f"cached  {len(manifest.files)} units, key {key[:12]}")
            return _record(stage, manifest, sidecar, cached=True, done=0)
        assert self.tracker is not None
        for name in stage.inputs:
            self._check_artifact(name)
        store = self.store.units(stage.name, key)
        before = _commits(store)
        began = time.time()
        with self.tracker.stage(stage.name, key, stage.settings(self.config, self.sources)):
            manifest = self._execute(stage, store, progress)
            self._checked.add(stage.name)  # sealed just now
            store.tell_ledger()
            done = _commits(store) - before
            sidecar = self._write_sidecar(manifest, time.time() - began)
            numbers = {"stage_seconds": sidecar["seconds"], "stage_peak_rss_bytes": float(sidecar["peak_rss_bytes"])}
            facts = {k: float(v) for k, v in flatten(manifest.facts).items() if isinstance(v, int | float)}
            self.tracker.log(numbers | facts | counts(self.store.artifact(stage.name, key)))
        progress.finish(f"{hms(time.time() - began)}  {len(manifest.files)} units, {done} made now")
        return _record(stage, manifest, sidecar, cached=False, done=done)

    def _check_artifact(self, name: str) -> None:
        if name not in self._checked:
            self.store.check(name, self.keys[name])
            self._checked.add(name)

    def _execute(self, stage: Stage, store: UnitStore, progress: StageProgress) -> Manifest:
        from pipelines.session import resources_of, unit_runner

        assert self.tracker is not None
        wanted = resources_of(self.config, stage.name)
        context = Context(
            config=self.config,
            sources=self.sources,
            key=self.keys[stage.name],
            store=store,
            inputs={name: self.store.artifact(name, self.keys[name]) for name in stage.inputs},
            input_keys={name: self.keys[name] for name in stage.inputs},
            runner=partial(unit_runner, self.config, self._stopping, self.board.say, resources=wanted),
            progress=progress,
            tracker=self.tracker,
            use_ray=True,
            stopping=self._stopping,
            say=self.board.say,
            mirror=self.store.mirror,
        )
        try:
            outcome = stage.run(context)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{stage.name}: {error} {memory_advice(self.config, self.sources, stage.name)}"
            ) from error
        self.held.require()
        return self.store.seal(
            stage.name,
            self.keys[stage.name],
            {name: self.keys[name] for name in stage.inputs},
            stage.settings(self.config, self.sources),
            outcome.units,
            outcome.facts,
            stage.format_version,
        )

    def _write_sidecar(self, manifest: Manifest, seconds: float | None = None) -> dict[str, Any]:
        """How a stage came about, beside its manifest; without `seconds` those of its units."""
        store = self.store.units(manifest.stage, manifest.key)
        sides = [store.sidecar(unit) for unit in manifest.files]
        sidecar = {
            "seconds": sum(float(side["seconds"]) for side in sides) if seconds is None else seconds,
            "peak_rss_bytes": max([peak_rss_bytes(), *(int(side["peak_rss_bytes"]) for side in sides)]),
            "finished": time.time(),
            "nodes": sorted({side["node"] for side in sides}),
        }
        path = self.store.artifact(manifest.stage, manifest.key) / "sidecar.json"
        write_json(path, sidecar)
        self.store.publish(path)
        return sidecar

    def _read_sidecar(self, manifest: Manifest) -> dict[str, Any]:
        path = self.store.artifact(manifest.stage, manifest.key) / "sidecar.json"
        try:
            sidecar = read_json(self.store.obtain(path))
        except (FileNotFoundError, ValueError):  # a driver died just after the manifest
            sidecar = None
        fits = isinstance(sidecar, dict) and all(is_number(sidecar.get(n)) for n in ("seconds", "peak_rss_bytes"))
        return sidecar if fits else self._write_sidecar(manifest)

    def _gate(self, stage: Stage) -> None:
        """Stop the line when the adapter did not improve."""
        facts = self.records[-1].facts
        if stage.name != "evaluate" or not self.config.evaluate.must_improve or facts["passed"]:
            return
        before, after = facts["nf4_init"], facts["adapter"]
        raise GateError(
            f"evaluate: the adapter does not improve {facts['metric']} "
            f"(loss {before['loss']:.4f} -> {after['loss']:.4f}). "
            "Train longer or with another finetune.learning_rate, or set evaluate.must_improve: false."
        )

    def _facts(self, stage: str) -> dict[str, Any]:
        return next(record.facts for record in self.records if record.name == stage)

    def _check_stop(self, stage: str) -> None:
        self.held.require()
        if self.stop_requested:
            raise Interrupted(f"stopped before {stage}; what is committed stays.")

    def _stopping(self) -> bool:
        """Whether the user wants no more units; asked before each."""
        self.held.require()
        return self.stop_requested

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """First Ctrl-C: finish the units in flight. Second: stop now."""

        def handle(_signal: int, _frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            self.board.say("stopping after the units in flight; press Ctrl-C again to stop now")

        try:
            previous = signal.signal(signal.SIGINT, handle)
        except ValueError:  # not the main thread: the caller owns signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _write_record(self, status: str, **extra: Any) -> None:
        before = self.store.read_record(self.config.name)
        record = {
            "name": self.config.name,
            "run_key": run_key(self.keys),
            "status": status,
            "keys": self.keys,
            "manifests": {record.name: record.manifest_sha256 for record in self.records},
            "stages": {record.name: shown(record) for record in self.records},
            "mlflow_uri": self.tracker.uri if self.tracker else before.get("mlflow_uri"),
            "mlflow_run_id": self.tracker.parent if self.tracker else before.get("mlflow_run_id"),
            "report_key": before.get("report_key"),
            "updated": time.time(),
        }
        with self.held.fenced():
            self.store.write_record(self.config.name, record | extra)

    def _finish(self, endpoint: dict[str, Any] | None) -> RunResult:
        from pipelines.report import write_report
        from pipelines.report_files import bring_for_report

        assert self.tracker is not None
        self.held.require()
        result = RunResult(
            name=self.config.name,
            run_key=run_key(self.keys),
            directory=self.directory,
            stages=self.records,
            endpoint=endpoint,
            mlflow_uri=self.tracker.uri,
            mlflow_run_id=self.tracker.parent,
            seconds=time.time() - self.started,
        )
        result.summary.update(summarise(result))
        write_json(self.directory / "summary.json", result.summary)
        report, report_key = self.directory / "report.html", self._report_key(result)
        if self.store.read_record(self.config.name).get("report_key") != report_key or not report.is_file():
            bring_for_report(self._artifacts(), self.store.mirror)
            nodes = self.tracker.node_history("cpu_utilization_percentage")
            write_report(report, self.config, result.summary, self._artifacts(), nodes)  # seconds, for its pictures
            self.store.publish(report)
            self.tracker.log_artifacts(report, run_id=self.tracker.parent)
        for file in ("summary.json", "pipeline.yaml"):
            self.store.publish(self.directory / file)
            self.tracker.log_artifacts(self.directory / file, run_id=self.tracker.parent)
        self.tracker.log(headline(result.summary))
        self._write_record("FINISHED", endpoint=endpoint, report_key=report_key)
        self.tracker.end("FINISHED")
        return result

    def _report_key(self, result: RunResult) -> str:
        """The same for two reports that differ in their times alone."""
        from cluster.node_check import versions

        endpoint = {k: v for k, v in (result.endpoint or {}).items() if k not in ("cached", "seconds")}
        stages = {record.name: (record.manifest_sha256, record.seconds) for record in result.stages}
        facts = [to_dict(self.config), stages, endpoint, result.mlflow_uri, result.mlflow_run_id, versions()]
        return sha256_bytes(canonical(facts))

    def _artifacts(self) -> dict[str, Path]:
        return {name: self.store.artifact(name, key) for name, key in self.keys.items()}


def _commits(store: UnitStore) -> int:
    return sum(line["event"] == "commit" for line in store.ledger())


def _record(stage: Stage, manifest: Manifest, sidecar: dict[str, Any], cached: bool, done: int) -> StageRecord:
    return StageRecord(
        name=stage.name,
        key=manifest.key,
        cached=cached,
        seconds=float(sidecar["seconds"]),
        peak_rss_bytes=int(sidecar["peak_rss_bytes"]),
        units=len(manifest.files),
        units_done=done,
        facts=manifest.facts,
        manifest_sha256=manifest.sha256,
    )
