"""Damage is found before use and named; clearing up takes what nobody needs and nothing else."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from soak import record

from pipelines.artifacts import Manifest, Store, stage_key
from pipelines.cli import main
from pipelines.errors import ArtifactError, ConfigError, LeaseError, exit_code
from pipelines.lease import lease, store_in_use
from pipelines.maintenance import collect, garbage, verify
from pipelines.records import write_record
from pipelines.tracking import Tracker, default_uri

STAGES = ("shard", "quantize", "finetune")


def finish(store: Store, stage: str, salt: int, units: int = 3) -> str:
    """A finished stage with random bytes; returns its key."""
    rng, key = random.Random(f"{stage}{salt}"), stage_key(stage, 1, {"salt": salt}, {})
    made = store.units(stage, key)

    def write(directory: Path) -> dict[str, Any]:
        (directory / "weights.bin").write_bytes(rng.randbytes(300))
        (directory / "deep").mkdir()
        (directory / "deep" / "more.json").write_text(json.dumps({"numbers": [rng.random() for _ in range(5)]}))
        return {"rows": 3}

    for unit in range(units):
        made.commit(f"u{unit}", write)
    store.seal(stage, key, {}, {"salt": salt}, [f"u{unit}" for unit in range(units)], {"loss": 1.5}, 1)
    return key


def make_run(store: Store, name: str, salt: int, **more: Any) -> dict[str, str]:
    """A finished run; returns the keys of its stages."""
    keys = {stage: finish(store, stage, salt) for stage in STAGES}
    manifests = {stage: read(store, stage, key).sha256 for stage, key in keys.items()}
    store.run_dir(name).mkdir()
    write_record(store.run_dir(name), {"name": name, "status": "FINISHED", "keys": keys, "manifests": manifests,
                                       "stages": {}, "updated": time.time()} | more)  # fmt: skip
    return keys


def read(store: Store, stage: str, key: str) -> Manifest:
    manifest = store.read_manifest(stage, key)
    assert manifest is not None
    return manifest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_any_flipped_bit_is_found_and_its_file_named(store: Store) -> None:
    """1,000 of them in units' files, units' and stages' manifests and the record of the run."""
    make_run(store, "one", 0)
    assert verify(store, "one")["problems"] == []
    files = [path for path in sorted(store.root.rglob("*")) if path.is_file() and "ledger" not in path.parts
             and path.name not in ("sidecar.json",)]  # fmt: skip
    assert {path.name for path in files} == {"weights.bin", "more.json", "unit.json", "manifest.json", "run.json"}
    rng, missed = random.Random(0), []
    for _ in range(1000):
        path = rng.choice(files)
        whole = path.read_bytes()
        place = rng.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            problems = verify(store, "one")["problems"]
        except ConfigError as error:  # a record that cannot be read
            problems = [f"{path}: {error}"] if path.name == "run.json" else []
        if not any(str(path) in problem for problem in problems):
            missed.append((path, place))
        if path.name == "run.json" and not refused(store):
            missed.append((path, -1))
        path.write_bytes(whole)
    record("a bit flipped anywhere in shards, manifests, adapters, records", 1000, missed, "found, the file named")
    assert missed == []
    assert verify(store, "one")["problems"] == []


def refused(store: Store) -> bool:
    """Whether `rankline gc` takes nothing away after a record is damaged."""
    try:
        return garbage(store) == []
    except ArtifactError:
        return True


def test_gc_believes_no_doubtful_record(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(store, "one", 0)
    path = store.run_dir("one") / "run.json"
    whole = path.read_text()
    key = json.loads(whole)["keys"]["shard"]
    for text in (whole[:-40], whole.replace(key, f"0{key[1:]}" if key[0] != "0" else f"1{key[1:]}"), "{}", "[]"):
        path.write_text(text)
        assert main(["gc", "--delete", "--store", str(store.root)]) == 3, text
        assert "nobody else knows what run one needs" in capsys.readouterr().err
    path.write_text(whole)
    assert garbage(store) == []


def test_gc_leaves_links_and_files_alone_and_goes_on_after_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make_run(store, "one", 0)
    elsewhere = Store(tmp_path_factory.mktemp("elsewhere"))
    key = finish(elsewhere, "shard", 9)
    link = store.artifact("shard", key)
    link.symlink_to(elsewhere.artifact("shard", key))
    (store.root / "_artifacts" / "other").symlink_to(elsewhere.root / "_artifacts" / "shard")
    (store.root / "_artifacts" / "shard" / ".nfs001").write_text("")
    (store.root / "_artifacts" / "scores" / "of-a-base").mkdir(parents=True)  # shared by runs
    lost = [store.artifact("quantize", finish(store, "quantize", salt)) for salt in (1, 2)]
    assert {one.path for one in garbage(store)} == set(lost)
    stuck, remove = sorted(lost)[0], shutil.rmtree

    def rmtree(path: Path) -> None:
        if path == stuck:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(ArtifactError, match=r"could not remove .*busy.* The other 1 went"):
        collect(store)
    assert [path.exists() for path in sorted(lost)] == [True, False]
    assert elsewhere.read_manifest("shard", key) is not None


def test_a_registry_is_remembered_when_its_run_is_gone(store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("registry")
    kept = {stage: finish(store, stage, 0) for stage in STAGES}
    tracker = Tracker(other, None, "rankline")
    tracker.begin("line", {}, {}, None)
    (other / "README.md").write_text("card")
    tags = {f"rankline.key.{stage}": key for stage, key in kept.items()} | {"rankline.key": "register-key"}
    with tracker.stage("register", "register-key", {}):
        tracker.register("model", other / "README.md", tags, "champion", lambda holder: "")
    tracker.end("FINISHED")
    assert len(garbage(store)) == 3, "nobody has told of it"
    store.remember_registry(tracker.uri)
    assert garbage(store) == []


@pytest.mark.parametrize(
    "harm", ["truncated", "missing", "other unit", "unit missing", "other manifest", "no manifest"]
)
def test_other_harm(store: Store, harm: str) -> None:
    keys = make_run(store, "one", 0)
    unit = store.units("shard", keys["shard"]).path("u1")
    manifest = store.artifact("shard", keys["shard"]) / "manifest.json"
    if harm == "truncated":
        os.truncate(unit / "weights.bin", 299)
    elif harm == "missing":
        (unit / "weights.bin").unlink()
    elif harm == "other unit":  # whole in itself, but not the one that the stage made
        store.units("shard", keys["shard"]).discard("u1")
        store.units("shard", keys["shard"]).commit("u1", lambda directory: {"rows": 4})
    elif harm == "unit missing":
        store.units("shard", keys["shard"]).discard("u1")
    elif harm == "no manifest":
        manifest.unlink()
    else:
        changed = json.loads(manifest.read_text()) | {"facts": {"loss": 1.0}}
        changed.pop("sha256")
        store.write_manifest(Manifest(**changed))
    found = verify(store, "one")
    assert [stage["state"] for stage in found["stages"]] == ["damaged", "whole", "whole"]
    place = manifest if "manifest" in harm else unit
    assert len(found["problems"]) == 1
    assert str(place) in found["problems"][0]
    if "manifest" not in harm:
        with pytest.raises(ArtifactError, match=r"use shard: .*u1.*Delete .* and run again") as caught:
            store.check("shard", keys["shard"])
        assert exit_code(caught.value) == 3


def test_verify_as_a_command(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    keys = make_run(store, "one", 0)
    assert main(["verify", "one", "--store", str(store.root)]) == 0
    assert "whole" in capsys.readouterr().out
    path = store.units("finetune", keys["finetune"]).path("u0") / "weights.bin"
    path.write_bytes(b"x")
    assert main(["verify", "one", "--store", str(store.root), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [f"{path} is damaged: its sha256 does not match the manifest"]
    assert main(["verify", "none", "--store", str(store.root)]) == 2
    assert "Runs there: one" in capsys.readouterr().err


def test_only_what_nobody_needs_goes(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    kept = make_run(store, "one", 0)
    lost = {stage: finish(store, stage, 1) for stage in STAGES}
    half = store.artifact("shard", kept["shard"]) / "tmp" / "u9.123.abc"
    half.mkdir(parents=True)
    (half / "part").write_bytes(b"12345")
    paths = {store.artifact(stage, key) for stage, key in lost.items()}
    assert {one.path for one in garbage(store)} == paths
    assert {one.path for one in garbage(store, time.time() + 7200)} == {*paths, half}
    assert main(["gc", "--store", str(store.root)]) == 0
    assert "rankline gc --delete" in capsys.readouterr().out
    assert all(path.is_dir() for path in paths), "without --delete nothing goes"
    assert main(["gc", "--delete", "--json", "--store", str(store.root)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {Path(one["path"]) for one in found["garbage"]} == paths
    assert found["bytes"] > 3 * 300 * 3
    assert not any(path.exists() for path in paths)
    assert half.is_dir(), "its worker may be alive"
    assert verify(store, "one")["problems"] == []
    assert garbage(store) == []


def test_what_a_registered_version_was_made_of_stays(store: Store) -> None:
    """Even when the directory of its run is gone."""
    kept, lost = ({stage: finish(store, stage, salt) for stage in STAGES} for salt in (0, 1))
    tracker = Tracker(store.root, None, "rankline")
    tracker.begin("line", {}, {}, None)
    bundle = store.root / "bundle"
    bundle.mkdir()
    (bundle / "README.md").write_text("card")
    tags = {f"rankline.key.{stage}": key for stage, key in kept.items()} | {"rankline.key": "register-key"}
    with tracker.stage("register", "register-key", {}):
        tracker.register("model", bundle, tags, "champion", lambda holder: "")
    tracker.end("FINISHED")
    assert {one.path for one in garbage(store)} == {store.artifact(s, key) for s, key in lost.items()}


def test_a_registry_that_cannot_be_read_keeps_everything(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(store, "one", 0, mlflow_uri=default_uri(store.root))
    finish(store, "shard", 1)
    database = Path(default_uri(store.root).removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    database.write_bytes(b"no database" * 100)
    assert main(["gc", "--delete", "--store", str(store.root)]) == 4
    assert "what its versions need" in capsys.readouterr().err
    assert len(list(store.root.glob("_artifacts/*/*"))) == 4


def test_not_while_somebody_is_at_it(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(store, "one", 0)
    with lease(store.run_dir("two") / "lease.json"), pytest.raises(LeaseError, match="is at run two"):
        garbage(store)  # it has not written its record yet
    with lease(store.run_dir("one") / "lease.json"), pytest.raises(LeaseError, match="is at run one"):
        garbage(store)
    with store_in_use(store.root), store_in_use(store.root), pytest.raises(LeaseError, match="a driver is at a run"):
        collect(store)
    assert main(["gc", "--store", str(store.root / "elsewhere")]) == 2
    assert "Give its directory with --store" in capsys.readouterr().err
