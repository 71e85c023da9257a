"""Units are absent or whole, damage is found and named, and keys follow from results alone."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster.durable import UnitStore, write_atomic
from pipelines.artifacts import Manifest, Store, stage_key
from pipelines.config import parse, result_fields
from pipelines.errors import ArtifactError, exit_code


def write_text(text: str) -> Any:
    def write(directory: Path) -> dict[str, Any]:
        (directory / "sub").mkdir()
        (directory / "sub" / "a.txt").write_text(text)
        return {"length": len(text)}

    return write


def test_a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    store = UnitStore(tmp_path)

    def write(directory: Path) -> None:
        (directory / "half.txt").write_text("half")
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        store.commit("u", write)
    assert not store.is_committed("u")
    assert not store.path("u").exists()
    assert not list((tmp_path / "tmp").iterdir())
    assert [line["event"] for line in store.ledger()] == ["start"]
    assert store.commit("u", write_text("whole")).facts == {"length": 5}


def test_a_unit_is_invisible_until_it_is_whole(tmp_path: Path) -> None:
    store = UnitStore(tmp_path)

    def write(directory: Path) -> None:
        (directory / "a").write_text("x")
        assert not store.path("u").exists()

    store.commit("u", write)
    assert store.read("u", verify=True).files.keys() == {"a"}


def race(root: str, barrier: Any) -> None:
    def write(directory: Path) -> None:
        (directory / "a").write_text("equal")
        barrier.wait(20)

    UnitStore(Path(root)).commit("u", write)


def test_two_writers_of_one_unit_leave_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=race, args=(str(tmp_path), barrier)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert [writer.exitcode for writer in writers] == [0, 0]
    store = UnitStore(tmp_path)
    assert store.read("u", verify=True).files.keys() == {"a"}
    events = Counter(line["event"] for line in store.ledger())
    assert events["commit"] == 1
    assert events["surplus"] == events["start"] - 1
    assert not list((tmp_path / "tmp").iterdir())


def test_what_is_left_of_a_discarded_unit_is_in_nobodys_way(tmp_path: Path) -> None:
    store = UnitStore(tmp_path)
    store.commit("u", write_text("abc"))
    (store.path("u") / "unit.json").unlink()  # a removal that was killed half way
    assert not store.is_committed("u")
    store.commit("u", write_text("abd"))
    assert (store.read("u", verify=True), (store.path("u") / "sub" / "a.txt").read_text()) == (store.read("u"), "abd")
    store.discard("u")
    store.discard("u")
    assert not list((tmp_path / "tmp").iterdir())
    assert not store.path("u").exists()


@pytest.mark.parametrize("change", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_named(tmp_path: Path, change: str) -> None:
    store = UnitStore(tmp_path)
    store.commit("u", write_text("abc"))
    file = store.path("u") / "sub" / "a.txt"
    if change == "delete":
        file.unlink()
    else:
        file.write_text("abX" if change == "flip" else "ab")
    with pytest.raises(ValueError, match=r"sub/a\.txt is damaged"):
        store.read("u", verify=True)
    store.discard("u")
    assert not store.is_committed("u")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "u"}', "null"])
def test_a_damaged_unit_manifest_is_named(tmp_path: Path, text: str) -> None:
    store = UnitStore(tmp_path)
    store.commit("u", write_text("abc"))
    (store.path("u") / "unit.json").write_text(text)
    with pytest.raises(ValueError, match=r"unit\.json is damaged"):
        store.read("u")


def test_facts_cannot_be_changed_unseen(tmp_path: Path) -> None:
    store = UnitStore(tmp_path)
    store.commit("u", write_text("abc"))
    manifest = store.path("u") / "unit.json"
    data = json.loads(manifest.read_text())
    data["facts"]["length"] = 4
    manifest.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="own hash"):
        store.read("u")


def test_the_hash_follows_from_the_content_alone(tmp_path: Path) -> None:
    records = [UnitStore(tmp_path / name).commit("u", write_text("abc")) for name in ("one", "two")]
    assert records[0] == records[1]
    assert UnitStore(tmp_path / "three").commit("u", write_text("abd")).sha256 != records[0].sha256


def test_the_ledger_passes_over_torn_lines(tmp_path: Path) -> None:
    store = UnitStore(tmp_path)
    store.commit("u", write_text("abc"))
    (file,) = (tmp_path / "ledger").iterdir()
    file.write_bytes(file.read_bytes() + b'{"event": "commit", "un')
    (tmp_path / "ledger" / "other-1.jsonl").write_bytes(b'\xff\xfe\x00\n{"event": "start"}\n7\n')
    assert [line["event"] for line in store.ledger()] == ["start", "commit"]


def test_write_atomic_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"one")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"two")
    assert path.read_bytes() == b"one"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def sealed(root: Path) -> tuple[Store, Manifest]:
    store = Store(root)
    for unit in ("a", "b"):
        store.units("shard", "k").commit(unit, write_text(unit))
    return store, store.seal("shard", "k", {"x": "y"}, {"rows": 1}, ["b", "a"], {"n": 2}, 1)


def test_seal_and_read_a_stage(tmp_path: Path) -> None:
    store, manifest = sealed(tmp_path)
    assert store.read_manifest("shard", "k") == manifest
    assert list(manifest.files) == ["a", "b"]
    assert store.read_manifest("shard", "other") is None


def test_seal_names_a_missing_and_a_damaged_unit(tmp_path: Path) -> None:
    store, _ = sealed(tmp_path)
    (store.units("shard", "k").path("a") / "sub" / "a.txt").write_text("?")
    for units, word in ((["a"], r"a\.txt"), (["c"], "/c/")):
        with pytest.raises(ArtifactError, match=word) as caught:
            store.seal("shard", "k", {}, {}, units, {}, 1)
        assert exit_code(caught.value) == 3


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"sha256": "0"}'])
def test_a_damaged_stage_manifest_is_an_artifact_error(tmp_path: Path, text: str) -> None:
    store, _ = sealed(tmp_path)
    path = store.artifact("shard", "k") / "manifest.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        store.read_manifest("shard", "k")


def test_a_changed_stage_manifest_is_seen(tmp_path: Path) -> None:
    store, _ = sealed(tmp_path)
    path = store.artifact("shard", "k") / "manifest.json"
    path.write_text(path.read_text().replace('"n": 2', '"n": 3'))
    with pytest.raises(ArtifactError, match="own hash"):
        store.read_manifest("shard", "k")


def key_of(*overrides: str) -> str:
    base = {"name": "a", "model": {"source": "m"}, "data": {"train": "t", "heldout": "h"}}
    return stage_key("finetune", 1, result_fields(parse(base, overrides).finetune), {"shard": "s"})


def test_keys_follow_result_fields_only() -> None:
    same = key_of("finetune.num_workers=7", "finetune.micro_batch_size=1", "finetune.checkpoint_every=3", "name=b")
    assert same == key_of()
    for override in ("finetune.learning_rate=1", "finetune.adapter.r=99", "finetune.global_batch_size=1"):
        assert key_of(override) != key_of()


def test_keys_follow_stage_format_and_inputs() -> None:
    keys = {
        stage_key("s", 1, {"a": 1}, {"i": "k"}),
        stage_key("t", 1, {"a": 1}, {"i": "k"}),
        stage_key("s", 2, {"a": 1}, {"i": "k"}),
        stage_key("s", 1, {"a": 2}, {"i": "k"}),
        stage_key("s", 1, {"a": 1}, {"i": "l"}),
    }
    assert len(keys) == 5
    assert stage_key("s", 1, {"a": 1, "b": 2}, {}) == stage_key("s", 1, {"b": 2, "a": 1}, {})
