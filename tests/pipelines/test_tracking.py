"""MLflow for real, on sqlite: runs, metrics, the registry and its alias, and what a broken store looks like."""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import TrackingError, exit_code
from pipelines.tracking import RegisteredVersion, Tracker, default_uri, flatten
from pipelines.tracking_probe import probe


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def shared(store: Path) -> Tracker:
    return Tracker(store, None, "rankline")


@pytest.fixture
def tracker(shared: Tracker, store: Path) -> Iterator[Tracker]:
    """A second tracker on the same database costs nothing; each test has a parent run of its own."""
    made = Tracker(store, None, "rankline")
    made.begin("line", {"a": {"b": 1, "none": None}}, {"rankline.name": "line"}, None)
    yield made
    made.end("FINISHED")


def run_of(tracker: Tracker, run_id: str) -> Any:
    return tracker._client.get_run(run_id)


def test_a_parent_run_with_a_child_per_stage(tracker: Tracker) -> None:
    with tracker.stage("shard", "key-1", {"rows": 3, "unset": None}) as child:
        tracker.log({"loss": 2.0}, step=1)
        tracker.log({"loss": 1.0}, step=2)
    run = run_of(tracker, child)
    assert run.data.tags["mlflow.parentRunId"] == tracker.parent
    assert run.data.params == {"rows": "3"}, "settings that are not set are no news"
    assert (run.data.metrics, run.info.status, run.info.run_name) == ({"loss": 1.0}, "FINISHED", "shard")
    assert [m.value for m in tracker._client.get_metric_history(child, "loss")] == [2.0, 1.0]
    tracker.log({"seconds": 5.0})
    parent = run_of(tracker, tracker.parent)
    assert parent.data.metrics == {"seconds": 5.0}
    assert parent.data.params == {"a.b": "1"}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_stage_that_ends_badly_says_so(tracker: Tracker, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), tracker.stage("shard", f"key-{status}", {}) as child:
        raise error
    assert run_of(tracker, child).info.status == status
    with tracker.stage("shard", f"key-{status}", {}) as again:
        pass
    assert again == child, "the same key under the same parent goes on with its run"
    assert run_of(tracker, child).info.status == "FINISHED"


def test_a_run_goes_on_by_its_id_while_it_exists(tracker: Tracker, store: Path) -> None:
    other = Tracker(store, None, "rankline")
    assert other.begin("line", {"a": 2}, {}, tracker.parent) == tracker.parent
    assert run_of(other, tracker.parent).data.params == {"a.b": "1"}
    fresh = other.begin("line", {}, {}, "0" * 32)
    assert fresh not in ("0" * 32, tracker.parent)
    tracker._client.delete_run(fresh)
    assert other.begin("line", {}, {}, fresh) != fresh, "a deleted run is not written to"


def register(tracker: Tracker, directory: Path, key: str, refusal: str = "") -> RegisteredVersion:
    def better(_holder: Mapping[str, str]) -> str:
        return refusal

    with tracker.stage("register", key, {}):
        return tracker.register("adapter", directory, {"rankline.key": key, "loss": "1.0"}, "champion", better)


def test_register_is_idempotent_and_the_alias_has_reasons(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights.txt").write_text("one")
    (tmp_path / "README.md").write_text("---\nlicense: x\n---\n# Card\n")
    first = register(tracker, tmp_path, "k1")
    assert (first.version, first.aliases) == ("1", ["champion"])
    assert first.reason == "'champion' moved from nothing to version 1"
    assert tracker._client.get_model_version("adapter", "1").description == "# Card"
    again = register(tracker, tmp_path, "k1", "never asked")
    assert (again.version, again.reason) == ("1", "version 1 holds 'champion' already")
    worse = register(tracker, tmp_path, "k2", "its loss is worse")
    assert (worse.version, worse.aliases) == ("2", [])
    assert worse.reason == "'champion' stays at version 1: its loss is worse"
    better = register(tracker, tmp_path, "k2")
    assert (better.version, better.aliases) == ("2", ["champion"])
    assert better.reason == "'champion' moved from version 1 to version 2"
    assert tracker._holder("adapter", "champion").version in (2, "2")


def test_the_gate_alone_can_keep_the_first_alias_back(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with tracker.stage("register", "g", {}):
        made = tracker.register("gated", tmp_path, {"rankline.key": "g"}, "champion", lambda _: "the gate did not pass")
    assert made.reason == "'champion' stays at nothing: the gate did not pass"
    assert made.aliases == []


def test_what_is_missing_is_a_tracking_error(tracker: Tracker) -> None:
    with pytest.raises(TrackingError, match="MLflow") as caught:
        tracker._end("0" * 32, "FINISHED")
    assert exit_code(caught.value) == 4


def test_a_locked_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.tracking_probe.LOCK_WAIT_S", 0.1)
    path = tmp_path / "_mlflow" / "mlflow.db"
    path.parent.mkdir()
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("create table runs (a)")
    database.execute("begin exclusive")
    with pytest.raises(TrackingError, match="locked") as caught:
        probe(default_uri(tmp_path), embedded=True)
    assert str(path) in str(caught.value)
    assert exit_code(caught.value) == 4
    database.close()
    probe(default_uri(tmp_path), embedded=True)


def test_a_database_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "_mlflow" / "mlflow.db"
    path.parent.mkdir()
    path.write_text("this is no database, however long one looks at it" * 100)
    with pytest.raises(TrackingError, match="not a database"):
        probe(default_uri(tmp_path), embedded=True)
    with pytest.raises(TrackingError):
        Tracker(tmp_path, None, "rankline")


def test_absent_and_wrong_uris(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    for uri, word in (
        (f"sqlite:///{tmp_path}/absent/m.db", "does not exist"),
        (f"http://127.0.0.1:{port}", "no MLflow server answers"),
        (f"file://{tmp_path}", "file store is gone"),
        (str(tmp_path), "file store is gone"),
    ):
        with pytest.raises(TrackingError, match=word):
            probe(uri, embedded=False)
    with pytest.raises(TrackingError) as caught:
        Tracker(tmp_path, f"sqlite:///{tmp_path}/absent/m.db", "rankline")
    assert exit_code(caught.value) == 4
    with pytest.raises(TrackingError):
        Tracker(tmp_path, "nonsense://x", "rankline")


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1]}) == {"a.b.c": 1, "d": [1]}
