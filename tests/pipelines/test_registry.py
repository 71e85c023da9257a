"""Adapters straight from MLflow's registry: ids, aliases that move, versions of other bases, canaries."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ServeError
from cluster.serving.sources import ForeignAdapterError, UnknownAdapterError, Version
from pipelines.errors import TrackingError
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
    assert source.resolve("qa") == source.resolve("qa@champion") == source.resolve("qa:1") == Version("qa:1")
    for model_id in ("qa:3", "other:1", "other"):
        with pytest.raises(ForeignAdapterError, match=r"other base|another base"):
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
    assert source_of(tracker, tmp_path).fetch(Version("q'a ..:1")) == copy
    assert (copy / "adapter_config.json").read_text() == "in use"
    assert [path.name for path in (tmp_path / "served").iterdir()] == [copy.name]
    with pytest.raises(ServeError, match="has it no more"):
        source.fetch(Version("q'a ..:2"))


def test_files_that_are_gone_are_told(tracker: Tracker, tmp_path: Path) -> None:
    register(tracker, tmp_path, "qa", "one")
    for path in (tmp_path / "store" / "_mlflow" / "artifacts").rglob("adapter_model.safetensors"):
        path.unlink()
    with pytest.raises(ServeError, match="fetch qa:1"):
        source_of(tracker, tmp_path).fetch(Version("qa:1"))
    assert list((tmp_path / "served").iterdir()) == []


def test_a_moved_alias_is_followed_and_told(tracker: Tracker, tmp_path: Path) -> None:
    for text in ("one", "two"):
        register(tracker, tmp_path, "qa", text)
    tracker._client.set_registered_model_alias("qa", "champion", "1")
    source, moved = source_of(tracker, tmp_path), []
    assert source.resolve("qa") == Version("qa:1")
    source.watch(moved.append)
    try:
        tracker._client.set_registered_model_alias("qa", "champion", "2")
        until(lambda: source.resolve("qa") == Version("qa:2"))
        until(lambda: moved == [Version("qa:2")] * 2)  # the bare name and the alias
        tracker._client.set_registered_model_alias("qa", "champion", "1")
        until(lambda: source.resolve("qa@champion") == Version("qa:1"))
        register(tracker, tmp_path, "qa", "three")
        until(lambda: "qa:3" in source.model_ids())
        tracker._client.delete_model_version("qa", "3")
        until(lambda: "qa:3" not in source.model_ids())
    finally:
        source.close()


def test_a_registry_that_fails_leaves_what_was_known(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register(tracker, tmp_path, "qa", "one")
    source = source_of(tracker, tmp_path)
    assert source.resolve("qa") == Version("qa:1")

    def fail(_: Any) -> Any:
        raise TrackingError("the server is down")

    monkeypatch.setattr(RegistryReader, "models", fail)
    caplog.set_level("WARNING", logger="ray.serve.rankline")
    source.watch(lambda _: None)
    until(lambda: "what was known is served on" in caplog.text)
    source.close()
    assert source.resolve("qa") == Version("qa:1")
    with pytest.raises(ServeError, match="the server is down"):
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
