"""Adapters straight from MLflow's registry: ids, aliases that move, versions of other bases, canaries."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ServeError
from cluster.serving.sources import ForeignAdapterError, UnknownAdapterError, Version
from pipelines.errors import ArtifactError, TrackingError
from pipelines.registry import Canary, RegistrySource
from pipelines.tracking import RegistryReader, Tracker

FACTS = {"base": "nf4", "base_sha256": "b", "split_key": "s"}


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    made = Tracker(tmp_path / "store", None, "rankline")
    made.begin("line", {}, {}, None)
    yield made
    made.end("FINISHED")


def register(tracker: Tracker, tmp_path: Path, name: str, text: str, **tags: str) -> str:
    bundle = tmp_path / "bundle" / text
    (bundle / "adapter").mkdir(parents=True)
    (bundle / "adapter" / "adapter_config.json").write_text(text)
    (bundle / "adapter" / "adapter_model.safetensors").write_text(text)
    (bundle / "plots.png").write_text("large")
    known = {"rankline.key": text, "rankline.base_sha256": "b", "rankline.key.quantize": "s"}
    with tracker.stage("register", text, {}):
        return tracker.register(name, bundle, known | tags, "champion", lambda _: "not by itself").version


def resolved(source: RegistrySource, model_id: str) -> str:
    return source.resolve(model_id).id


def source_of(tracker: Tracker, tmp_path: Path, **more: Any) -> RegistrySource:
    return RegistrySource(tracker.uri, tmp_path / "served", FACTS, "champion", refresh_s=0.05, **more)


def test_ids_of_this_base_are_known_and_others_are_refused(tracker: Tracker, tmp_path: Path) -> None:
    register(tracker, tmp_path, "qa", "one")
    register(tracker, tmp_path, "qa", "two")
    register(tracker, tmp_path, "qa", "three", **{"rankline.key.quantize": "another"})
    register(tracker, tmp_path, "other", "four", **{"rankline.base_sha256": "another"})
    tracker._client.set_registered_model_alias("qa", "champion", "1")
    tracker._client.set_registered_model_alias("qa", "next", "3")
    source = pickle.loads(pickle.dumps(source_of(tracker, tmp_path)))
    assert source.model_ids() == ("qa", "qa:1", "qa:2", "qa@champion")
    assert source.resolve("qa") == source.resolve("qa@champion") == source.resolve("qa:1")
    assert resolved(source, "qa") == "qa:1"
    for model_id in ("qa:3", "other:1", "other"):
        with pytest.raises(ForeignAdapterError, match="over another base"):
            source.resolve(model_id)
    for model_id in ("qa:9", "qa@nobody", "../qa", "qa:1/..", ""):
        with pytest.raises(UnknownAdapterError):
            source.resolve(model_id)


def test_only_the_two_files_of_a_version_are_copied_and_never_replaced(tracker: Tracker, tmp_path: Path) -> None:
    register(tracker, tmp_path, "q'a ..", "one")
    source = source_of(tracker, tmp_path)
    copy = source.fetch(source.resolve("q'a ..:1"))
    assert copy.parent == tmp_path / "served"
    assert sorted(path.name for path in copy.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    (copy / "adapter_config.json").write_text("in use")
    again = source_of(tracker, tmp_path)
    assert again.fetch(again.resolve("q'a ..:1")) == copy
    assert (copy / "adapter_config.json").read_text() == "in use"
    assert [path.name for path in (tmp_path / "served").iterdir()] == [copy.name]
    with pytest.raises(ServeError, match="has it no more"):
        source.fetch(Version("q'a ..:2"))


def test_files_that_are_gone_are_told(tracker: Tracker, tmp_path: Path) -> None:
    register(tracker, tmp_path, "qa", "one")
    for path in (tmp_path / "store" / "_mlflow" / "artifacts").rglob("adapter_model.safetensors"):
        path.unlink()
    source = source_of(tracker, tmp_path)
    with pytest.raises(ServeError, match="fetch qa:1"):
        source.fetch(source.resolve("qa"))
    assert list((tmp_path / "served").iterdir()) == []


def test_a_moved_alias_is_followed_and_told(tracker: Tracker, tmp_path: Path) -> None:
    for text in ("one", "two"):
        register(tracker, tmp_path, "qa", text)
    tracker._client.set_registered_model_alias("qa", "champion", "1")
    source, moved = source_of(tracker, tmp_path), []
    assert resolved(source, "qa") == "qa:1"

    def follow(before: Version, now: Version) -> None:
        moved.append((before.id, now.id))
        raise ServeError("whatever goes wrong there, aliases are followed on")

    source.watch(follow)
    try:
        tracker._client.set_registered_model_alias("qa", "champion", "2")
        until(lambda: resolved(source, "qa") == "qa:2")
        until(lambda: moved == [("qa:1", "qa:2")])
        tracker._client.set_registered_model_alias("qa", "champion", "1")
        until(lambda: resolved(source, "qa@champion") == "qa:1")
        register(tracker, tmp_path, "qa", "three")
        until(lambda: "qa:3" in source.model_ids())
        tracker._client.delete_model_version("qa", "3")
        until(lambda: "qa:3" not in source.model_ids())
    finally:
        source.close()


def test_aliases_read_later_than_their_model_are_followed(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tracker, tmp_path, "qa", "one")
    source = source_of(tracker, tmp_path)
    assert resolved(source, "qa") == "qa:1"
    real, old = RegistryReader.models, RegistryReader(tracker.uri).models()[0].updated_ms
    register(tracker, tmp_path, "qa", "two")
    tracker._client.set_registered_model_alias("qa", "champion", "2")
    monkeypatch.setattr(RegistryReader, "models", lambda self: [replace(m, updated_ms=old) for m in real(self)])
    source.refresh()
    assert resolved(source, "qa") == "qa:2"


def test_a_version_deleted_during_the_look_stands_for_nothing(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("one", "two"):
        register(tracker, tmp_path, "qa", text)
    tracker._client.set_registered_model_alias("qa", "champion", "2")
    real = RegistryReader.versions

    def late(self: RegistryReader, name: str) -> Any:
        if str(tracker._client.get_registered_model("qa").aliases["champion"]) == "2":
            tracker._client.set_registered_model_alias("qa", "champion", "1")
            tracker._client.delete_model_version("qa", "2")
        return real(self, name)

    monkeypatch.setattr(RegistryReader, "versions", late)
    source = source_of(tracker, tmp_path)
    assert resolved(source, "qa") == "qa:1"
    assert "qa:2" not in source.model_ids()


def test_a_registry_that_fails_leaves_what_was_known(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register(tracker, tmp_path, "qa", "one")
    source = source_of(tracker, tmp_path)
    assert resolved(source, "qa") == "qa:1"

    def fail(_: Any) -> Any:
        raise TrackingError("the server is down")

    monkeypatch.setattr(RegistryReader, "models", fail)
    caplog.set_level("WARNING", logger="ray.serve.rankline")
    source.watch(lambda *_: None)
    until(lambda: "what was known is served on" in caplog.text)
    source.close()
    assert resolved(source, "qa") == "qa:1"
    with pytest.raises(ServeError, match="the server is down"):
        source_of(tracker, tmp_path).model_ids()


@pytest.mark.parametrize("error", [TrackingError("gone"), ArtifactError("MLflow: download: the disk refused")])
def test_a_version_that_cannot_be_copied_is_a_serving_error(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    register(tracker, tmp_path, "qa", "one")
    source = source_of(tracker, tmp_path)
    version = source.resolve("qa")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(RegistryReader, "download", fail)
    with pytest.raises(ServeError, match=f"fetch qa:1: {error}"):
        source.fetch(version)
    monkeypatch.setattr(RegistryReader, "models", fail)
    with pytest.raises(ServeError, match="read the model registry"):
        source_of(tracker, tmp_path).model_ids()


def test_a_canary_gets_its_share_of_the_bare_name_alone(tracker: Tracker, tmp_path: Path) -> None:
    for text in ("one", "two"):
        register(tracker, tmp_path, "qa", text)
    tracker._client.set_registered_model_alias("qa", "champion", "1")
    source = source_of(tracker, tmp_path, canary=Canary("challenger", 0.3))
    assert {source.resolve("qa").id for _ in range(50)} == {"qa:1"}, "nobody holds the alias yet"
    tracker._client.set_registered_model_alias("qa", "challenger", "2")
    source.refresh()
    counted = Counter(source.resolve("qa").id for _ in range(2000))
    assert 480 < counted["qa:2"] < 720  # six standard deviations
    assert {source.resolve("qa@champion").id for _ in range(200)} == {"qa:1"}


def test_a_name_whose_alias_is_for_another_base_stands_for_nothing_here(tracker: Tracker, tmp_path: Path) -> None:
    register(tracker, tmp_path, "qa", "one")
    register(tracker, tmp_path, "qa", "two", **{"rankline.key.quantize": "another"})
    tracker._client.set_registered_model_alias("qa", "champion", "2")
    source = source_of(tracker, tmp_path)
    with pytest.raises(ForeignAdapterError, match="it stands for qa:2: it was trained over another base"):
        source.resolve("qa")
    assert source.model_ids() == ("qa:1",)


def test_names_that_would_stand_for_something_else_are_left_out(tracker: Tracker, tmp_path: Path) -> None:
    for index, name in enumerate(("qa@champion", "base", "qa")):
        register(tracker, tmp_path, name, f"text{index}")
    assert source_of(tracker, tmp_path, reserved="base").model_ids() == ("qa", "qa:1")


def test_a_version_that_was_deleted_and_made_again_is_another_one(tracker: Tracker, tmp_path: Path) -> None:
    register(tracker, tmp_path, "qa", "one")
    source = source_of(tracker, tmp_path)
    first = source.resolve("qa:1")
    old = source.fetch(first)
    tracker._client.delete_registered_model("qa")
    register(tracker, tmp_path, "qa", "two")
    source.refresh()
    second = source.resolve("qa:1")
    assert second.id == first.id
    assert second != first
    assert (source.fetch(second) / "adapter_config.json").read_text() == "two"
    assert (old / "adapter_config.json").read_text() == "one"
    with pytest.raises(ServeError, match="has it no more"):
        source.fetch(first)


@pytest.mark.parametrize("elsewhere", ["http://127.0.0.1:9/model", "file:///etc", "{root}/../../.."])
def test_files_come_from_the_artifacts_of_the_versions_own_run(
    tracker: Tracker, tmp_path: Path, elsewhere: str
) -> None:
    register(tracker, tmp_path, "qa", "one")
    listed = RegistryReader(tracker.uri).versions("qa")[0]
    root = tracker._client.get_run(listed.run_id).info.artifact_uri
    tags = {"rankline.base_sha256": "b", "rankline.key.quantize": "s"}
    tracker._client.create_model_version("qa", elsewhere.format(root=root), listed.run_id, tags=tags)
    source = source_of(tracker, tmp_path)
    with pytest.raises(ServeError, match="not among the artifacts of its run"):
        source.fetch(source.resolve("qa:2"))


def test_a_file_that_is_too_large_is_not_copied(tracker: Tracker, tmp_path: Path) -> None:
    register(tracker, tmp_path, "qa", "a text of some length")
    source = source_of(tracker, tmp_path, most_bytes=5)
    with pytest.raises(ServeError, match="allowed are at most 5"):
        source.fetch(source.resolve("qa"))
    assert list((tmp_path / "served").iterdir()) == []


def test_a_discarded_copy_is_made_again(tracker: Tracker, tmp_path: Path) -> None:
    register(tracker, tmp_path, "qa", "one")
    source = source_of(tracker, tmp_path)
    version = source.resolve("qa")
    (source.fetch(version) / "adapter_config.json").write_text("damaged")
    source.discard(version)
    assert (source.fetch(version) / "adapter_config.json").read_text() == "one"
