"""MLflow, in one file: runs, metrics, artifacts and the model registry. The driver is its only writer."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pipelines.errors import ArtifactError, TrackingError, is_disk_error
from pipelines.tracking_probe import probe

P = ParamSpec("P")
R = TypeVar("R")


#: What MLflow's page shows as the source of a run.
_SOURCE = {"mlflow.source.name": "rankline run", "mlflow.source.type": "LOCAL"}


def default_uri(store: Path) -> str:
    """The embedded sqlite database of a store."""
    return f"sqlite:///{(store / '_mlflow' / 'mlflow.db').resolve()}"


def _mapped(method: Callable[P, R]) -> Callable[P, R]:
    """Turn what MLflow and its database raise into `TrackingError`, or `ArtifactError` where the disk refused."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return method(*args, **kwargs)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            text = re.sub(r"^\(raised as a result of [^)]*\) | \[SQL: .*", "", " ".join(str(error).split()))[:300]
            doing = f"MLflow: {method.__name__.strip('_')}"
            if is_disk_error(error) or "database or disk is full" in text:
                raise ArtifactError(
                    f"{doing}: the disk of its database or artifacts refused: {text}. See to that disk (room, "
                    "permissions); what is committed stays."
                ) from error
            raise TrackingError(
                f"{doing}: {text}. Check register.tracking_uri, that no other program "
                "holds the database locked, and the disk; then run again."
            ) from error

    return call


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry; `reason` says why the alias moved or stayed."""

    name: str
    version: str
    run_id: str
    source: str
    aliases: list[str]
    tags: dict[str, str]
    reason: str


class Tracker:
    """One pipeline's MLflow runs: a parent, and a child per stage."""

    def __init__(self, store: Path, tracking_uri: str | None, experiment: str) -> None:
        """Raises: TrackingError: the store cannot be reached or created."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self.uri = tracking_uri or default_uri(store)
        self._store = store.resolve()
        if tracking_uri is None:
            (self._store / "_mlflow").mkdir(parents=True, exist_ok=True)
        probe(self.uri, embedded=tracking_uri is None)
        self._open(tracking_uri is None, experiment)
        self.parent: str = ""
        self._current: str = ""

    @_mapped
    def _open(self, embedded: bool, experiment: str) -> None:
        import logging

        from mlflow import MlflowClient

        # Some fifty migrations of a new database; and tracebacks of what is raised as an error of ours.
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

        self._client: Any = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        found = self._client.get_experiment_by_name(experiment)
        location = (self._store / "_mlflow" / "artifacts").as_uri() if embedded else None
        # Without the tag MLflow's page takes the experiment for one of prompts and traces.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        self._experiment = found.experiment_id if found else self._client.create_experiment(experiment, location, kind)

    @_mapped
    def begin(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], run_id: str | None) -> str:
        """Start the parent run, or go on with `run_id` where it still exists."""
        if run_id and self._exists(run_id):
            self._client.update_run(run_id, status="RUNNING")
            self.parent = run_id
        else:
            run = self._client.create_run(self._experiment, run_name=name, tags={**_SOURCE, **tags})
            self.parent = run.info.run_id
            self._log_params(self.parent, params)
        self._current = self.parent
        return self.parent

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        return False

    @contextlib.contextmanager
    def stage(self, name: str, key: str, params: Mapping[str, Any]) -> Iterator[str]:
        """A child run of the parent for one stage; failed when the block raises."""
        run_id = self._begin_stage(name, key, params)
        self._current = run_id
        try:
            yield run_id
        except BaseException as error:
            self._end(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        else:
            self._end(run_id, "FINISHED")
        finally:
            self._current = self.parent

    @_mapped
    def _begin_stage(self, name: str, key: str, params: Mapping[str, Any]) -> str:
        tags = _SOURCE | {"mlflow.parentRunId": self.parent, "rankline.stage": name, "rankline.key": key}
        found = self._client.search_runs(
            [self._experiment],
            f"tags.`rankline.key` = '{key}' and tags.`mlflow.parentRunId` = '{self.parent}'",
            max_results=1,
        )
        if found:
            run_id = str(found[0].info.run_id)
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        run_id = str(self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id)
        self._log_params(run_id, params)
        return run_id

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:500]) for key, value in flatten(params).items() if value not in (None, {}, [])]
        for start in range(0, len(flat), 100):
            self._client.log_batch(run_id, params=flat[start : start + 100])

    @_mapped
    def _end(self, run_id: str, status: str) -> None:
        self._client.set_terminated(run_id, status)

    def end(self, status: str) -> None:
        """End the parent run: FINISHED, FAILED or KILLED."""
        self._end(self.parent, status)

    @_mapped
    def log(self, values: dict[str, float], step: int = 0) -> None:
        """Metric values of the stage that is running (of the parent between stages)."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._current, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    @_mapped
    def log_nodes(self, samples: list[tuple[str, float, dict[str, float]]]) -> None:
        """Samples of nodes, as MLflow's system metrics of the parent run; the step is the second of the run."""
        from mlflow.entities import Metric

        begun = self._client.get_run(self.parent).info.start_time / 1000
        found = [
            Metric(f"system/{node}/{name}", value, int(at * 1000), max(0, int(at - begun)))
            for node, at, values in samples
            for name, value in values.items()
        ]
        for start in range(0, len(found), 1000):
            self._client.log_batch(self.parent, metrics=found[start : start + 1000])

    @_mapped
    def node_history(self, name: str) -> dict[str, list[tuple[float, float]]]:
        """(seconds since the epoch, value) of one system metric, by node."""
        found = {}
        for key in sorted(self._client.get_run(self.parent).data.metrics):
            if re.fullmatch(rf"system/[^/]+/{name}", key):
                history = self._client.get_metric_history(self.parent, key)
                found[key.split("/")[1]] = [(metric.timestamp / 1000, metric.value) for metric in history]
        return found

    @_mapped
    def log_artifacts(self, path: Path, artifact_path: str | None = None, run_id: str | None = None) -> None:
        """A file or a directory, into the given run (default: the one that is running)."""
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(run_id or self._current, str(path), artifact_path)

    @_mapped
    def register(
        self,
        name: str,
        directory: Path,
        tags: Mapping[str, str],
        alias: str,
        better: Callable[[Mapping[str, str]], str],
    ) -> RegisteredVersion:
        """Log a directory as artifacts of the running stage and register it as a model version.

        Args:
            name: Registered model.
            directory: What the version carries.
            tags: Lineage; `rankline.key` makes the call idempotent.
            alias: Alias to move when `better` allows it.
            better: Given the tags of the present holder (empty when there is none), an empty string to move the
                alias, else the reason why it stays.
        """
        version = self._version_of(name, tags["rankline.key"])
        if version is None:
            self._client.log_artifacts(self._current, str(directory), "model")
            uri = f"{self._client.get_run(self._current).info.artifact_uri}/model"
            version = self._client.create_model_version(
                name, uri, self._current, tags=dict(tags), description=_description(directory / "README.md")
            )
        reason = self._move(name, str(version.version), alias, better)
        fresh = self._client.get_model_version(name, version.version)
        return RegisteredVersion(
            name, str(version.version), version.run_id, version.source, list(fresh.aliases), dict(version.tags), reason
        )

    def _version_of(self, name: str, key: str) -> Any:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):
            self._client.create_registered_model(name)
        found = [v for v in self._client.search_model_versions(_named(name)) if v.tags.get("rankline.key") == key]
        return found[0] if found else None

    def _move(self, name: str, version: str, alias: str, better: Callable[[Mapping[str, str]], str]) -> str:
        present = self._holder(name, alias)
        if present is not None and str(present.version) == version:
            return f"version {version} holds {alias!r} already"
        refusal = better(present.tags if present is not None else {})
        if refusal:
            return f"{alias!r} stays at {'version ' + str(present.version) if present else 'nothing'}: {refusal}"
        self._client.set_registered_model_alias(name, alias, version)
        return (
            f"{alias!r} moved from {'version ' + str(present.version) if present else 'nothing'} to version {version}"
        )

    def _holder(self, name: str, alias: str) -> Any:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):
            return self._client.get_model_version_by_alias(name, alias)
        return None


@dataclass(frozen=True)
class ListedModel:
    """A registered model; `aliases` are alias -> version."""

    name: str
    updated_ms: int
    aliases: dict[str, str]


@dataclass(frozen=True)
class ListedVersion:
    """A version of a registered model; `source` is the URI of its files, which `run_id` has logged."""

    version: str
    source: str
    run_id: str
    status: str
    tags: dict[str, str]


class RegistryReader:
    """The model registry, read only."""

    @_mapped
    def __init__(self, uri: str) -> None:
        """Args: uri: tracking URI."""
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._uri = uri
        self._client: Any = MlflowClient(tracking_uri=uri, registry_uri=uri)

    @_mapped
    def models(self) -> list[ListedModel]:
        """Every registered model."""
        return [
            ListedModel(model.name, int(model.last_updated_timestamp), {a: str(v) for a, v in model.aliases.items()})
            for model in _pages(self._client.search_registered_models, max_results=1000)
        ]

    @_mapped
    def versions(self, name: str) -> list[ListedVersion]:
        """Every version of a model; none where MLflow's filter cannot name it."""
        if "'" in name and '"' in name:
            return []
        found = _pages(self._client.search_model_versions, filter_string=_named(name), max_results=1000)
        return [ListedVersion(str(v.version), v.source, v.run_id or "", str(v.status), dict(v.tags)) for v in found]

    @_mapped
    def download(self, listed: ListedVersion, path: str, directory: Path, most_bytes: int) -> None:
        """Copy one file below a version's source into a directory.

        Raises:
            TrackingError: the source is not among the artifacts of the version's run, whatever it says; there is no
                such file, or it is larger than `most_bytes`.
        """
        from mlflow.artifacts import download_artifacts

        root = str(self._client.get_run(listed.run_id).info.artifact_uri).rstrip("/") if listed.run_id else ""
        inner = listed.source.removeprefix(root).strip("/")
        if not root or not listed.source.startswith(f"{root}/") or ".." in inner.split("/"):
            raise TrackingError(f"version {listed.version}: its source is not among the artifacts of its run.")
        whole = f"{inner}/{path}"
        sizes = {
            file.path: file.file_size
            for file in self._client.list_artifacts(listed.run_id, whole.rpartition("/")[0])
            if not file.is_dir
        }
        if sizes.get(whole) is None or sizes[whole] > most_bytes:
            raise TrackingError(
                f"version {listed.version}: {path} has {sizes.get(whole)} bytes; allowed are at most {most_bytes}."
            )
        download_artifacts(artifact_uri=f"{root}/{whole}", dst_path=str(directory), tracking_uri=self._uri)


def _named(name: str) -> str:
    """MLflow's filter for a model; its language cannot say a name that has both kinds of quotes."""
    return f'name = "{name}"' if "'" in name else f"name = '{name}'"


def _pages(search: Callable[..., Any], **options: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


def _description(card: Path) -> str | None:
    """The text of a model card without its YAML head, for the version's page."""
    if not card.is_file():
        return None
    text = card.read_text()
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2] or text
    return text.strip()[:5000]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
