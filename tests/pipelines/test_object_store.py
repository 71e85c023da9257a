"""Units in an object store: payload first, commit last, whole or not there, and read by whoever has nothing of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lines import EXACT, run_serially, stage_units, store_of, tiny_pipeline, unit_hashes, with_changes

from cluster.artifacts import ShardSet
from cluster.durable import UnitStore, units_at
from cluster.errors import DamagedError, StorageError
from cluster.mirrored import MirroredUnits
from cluster.objects import Mirror
from pipelines.errors import exit_code


def write_text(text: str) -> Any:
    def write(directory: Path) -> dict[str, Any]:
        (directory / "deep").mkdir()
        (directory / "deep" / "a.txt").write_text(text)
        (directory / "b.txt").write_text("b")
        return {"length": len(text)}

    return write


@pytest.fixture(params=["s3", "gcs", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of its own: on S3, on GCS, or a directory that is used as an object store."""
    if request.param == "file":
        return (tmp_path / "objects").as_uri()
    server: Any = request.getfixturevalue(request.param)
    return str(server.uri())


def units(uri: str, cache: Path) -> MirroredUnits:
    """The units of one stage, as a machine with that cache has them."""
    found = units_at(cache / "_artifacts" / "shard" / "k", Mirror(uri, cache))
    assert isinstance(found, MirroredUnits)
    return found


def test_another_machine_reads_what_one_has_committed(uri: str, tmp_path: Path) -> None:
    ours, theirs = units(uri, tmp_path / "ours"), units(uri, tmp_path / "theirs")
    assert not ours.is_committed("u")
    record = ours.commit("u", write_text("abc"))
    assert (ours.path("u") / "deep" / "a.txt").read_text() == "abc"
    assert ours.read("u", verify=True) == record
    assert theirs.is_committed("u")
    assert theirs.committed(["u", "v"]) == {"u"}
    assert theirs.read("u") == record
    assert theirs.sidecar("u")["node"] == ours.sidecar("u")["node"] != "unknown"
    assert not theirs.path("u").exists(), "a record needs no payload"
    assert theirs.file("u", "deep/a.txt").read_text() == "abc"
    assert not theirs.path("u").exists(), "one file is brought alone"
    assert (theirs.fetch("u") / "deep" / "a.txt").read_text() == "abc"
    assert theirs.local.read("u", verify=True) == record
    assert theirs.commit("u", write_text("another")) == record, "it is there already"
    local = UnitStore(tmp_path / "local")
    assert local.commit("u", write_text("abc")) == record, "equal to a local store's"


def test_a_payload_without_its_commit_is_no_unit(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, put = units(uri, tmp_path / "ours"), Mirror.put

    def die_before_the_commit(mirror: Mirror, path: Path, source: Path | bytes) -> None:
        if path.parent.name == "commits":
            raise KeyboardInterrupt
        put(mirror, path, source)

    with monkeypatch.context() as dying:
        dying.setattr(Mirror, "put", die_before_the_commit)
        with pytest.raises(KeyboardInterrupt):
            ours.commit("u", write_text("abc"))
    assert len(ours.mirror.names(ours.root / "payload" / "u")) == 2
    for machine in (ours, units(uri, tmp_path / "theirs")):
        assert not machine.is_committed("u")
        assert not machine.path("u").exists()
        with pytest.raises(FileNotFoundError):
            machine.read("u")
        with pytest.raises(DamagedError, match=r"commits/u\.json: it is not there"):
            machine.fetch("u")
    again = units(uri, tmp_path / "theirs").commit("u", write_text("abc"))
    assert ours.read("u") == again


def test_two_machines_that_make_a_unit_at_once_never_mix(uri: str, tmp_path: Path) -> None:
    """Their results differ here, which equal ones would hide: one of them counts, and all of its files are its own."""
    barrier = threading.Barrier(2)

    def make(name: str) -> None:
        def write(directory: Path) -> None:
            for file in ("a", "b", "c"):
                (directory / file).write_text(name)
            barrier.wait(20)

        units(uri, tmp_path / name).commit("u", write)

    threads = [threading.Thread(target=make, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    seen = set()
    for cache in ("one", "two", "third"):
        directory = units(uri, tmp_path / cache).fetch("u")
        seen.add(tuple((directory / file).read_text() for file in ("a", "b", "c")))
    assert len(seen) == 1
    assert seen <= {("one",) * 3, ("two",) * 3}


def test_a_stale_copy_is_fetched_anew(uri: str, tmp_path: Path) -> None:
    ours, theirs = units(uri, tmp_path / "ours"), units(uri, tmp_path / "theirs")
    ours.commit("u", write_text("first"))
    theirs.fetch("u")
    ours.discard("u")
    assert not theirs.is_committed("u")
    assert not ours.mirror.names(ours.root / "payload" / "u"), "nothing is left of it"
    second = ours.commit("u", write_text("second"))
    assert (theirs.fetch("u") / "deep" / "a.txt").read_text() == "second"
    assert theirs.read("u", verify=True) == second


def test_a_damaged_copy_is_no_harm(uri: str, tmp_path: Path) -> None:
    """Hashing again drops it: what counts is the object store."""
    writer = serial(tmp_path, "writer", uri)
    run_serially(writer, "shard")
    units, store = stage_units(writer, "shard"), store_of(writer)
    for path in (units.path("index") / "index.parquet", units.path("meta") / "unit.json"):
        path.write_bytes(b"x")
    store.check("shard", units.root.name)
    assert not (units.path("index")).exists()
    assert ShardSet(units.root, store.mirror).tensors
    units.fetch("meta")
    units.read("meta", verify=True)
    store.check("shard", units.root.name)


def test_a_corrupted_object_is_named(s3: Any, tmp_path: Path) -> None:
    uri = s3.uri()
    ours, theirs = units(uri, tmp_path / "ours"), units(uri, tmp_path / "theirs")
    ours.commit("u", write_text("abcdefgh"))
    digest = ours.read("u").files["deep/a.txt"]
    url = s3.change(uri, f"_artifacts/shard/k/payload/u/{digest}")
    for reading in (lambda: theirs.fetch("u"), lambda: theirs.file("u", "deep/a.txt")):
        with pytest.raises(DamagedError, match=f"^{url} is damaged: its sha256 does not match") as caught:
            reading()
        assert exit_code(caught.value) == 3
    assert not theirs.path("u").exists()
    with pytest.raises(ValueError, match=f"^{url} is damaged"):
        theirs.hash_again("u")
    s3.change(uri, "_artifacts/shard/k/commits/u.json")
    with pytest.raises(DamagedError, match=r"s3://.*/commits/u\.json.*damaged"):
        units(uri, tmp_path / "third").fetch("u")


@pytest.mark.parametrize("name", ["../../../../escaped", "/tmp/escaped", "a/../../escaped"])
def test_a_forged_commit_writes_nothing_elsewhere(uri: str, tmp_path: Path, name: str) -> None:
    ours = units(uri, tmp_path / "ours")
    ours.commit("u", write_text("abc"))
    forged = json.loads(ours.mirror.get(ours.commit_path("u")))
    forged["unit"]["files"] = {name: ours.read("u").files["b.txt"]}
    from cluster.durable import _digest

    forged["unit"]["sha256"] = _digest("u", forged["unit"]["files"], forged["unit"]["facts"])
    ours.mirror.put(ours.commit_path("u"), json.dumps(forged).encode())
    with pytest.raises(DamagedError, match="it names the file"):
        units(uri, tmp_path / "theirs").fetch("u")
    assert not list(tmp_path.rglob("*escaped*"))


def test_the_ledger_is_whole_on_every_machine_and_flat(uri: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("cluster.mirrored._BATCH_BYTES", 2000)
    ours = units(uri, tmp_path / "ours")
    for index in range(20):
        ours.commit(f"u{index}", lambda directory: {"index": 0})
    with pytest.raises(RuntimeError):
        ours.commit("lost", lambda directory: (_ for _ in ()).throw(RuntimeError))
    told = Counter(line["event"] for line in units(uri, tmp_path / "theirs").ledger())
    assert told == {"start": 20, "commit": 20}, "a try that began is told with the next that ends"
    ours.tell_ledger()
    lines = list(units(uri, tmp_path / "third").ledger())
    assert Counter(line["event"] for line in lines) == {"start": 21, "commit": 20}
    batches = ours.mirror.names(ours.root / "ledger")
    assert 3 <= len(batches) <= 8
    assert max(batches.values()) < 2500
    assert list(ours.ledger()) == lines


def test_ctrl_c_leaves_no_half_object(uri: str, tmp_path: Path) -> None:
    """A process that interrupts itself all the time, while it writes over one object with longer and longer text."""
    code = """
import random, signal, sys, time
from pathlib import Path
from cluster.objects import Mirror
mirror = Mirror(sys.argv[1], Path(sys.argv[2]))
mirror.put(mirror.root / "object", b"<>")
rng, until, interrupted = random.Random(0), time.monotonic() + 4, 0
while time.monotonic() < until:
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0001, 0.01))
        mirror.put(mirror.root / "object", b"<" + b"x" * rng.randrange(1000) + b">")
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
    data = mirror.get(mirror.root / "object")
    assert data.startswith(b"<") and data.endswith(b">"), data
assert interrupted > 10, interrupted
"""
    head = "import signal\ndef interrupt(*_): raise KeyboardInterrupt\nsignal.signal(signal.SIGALRM, interrupt)\n"
    command = [sys.executable, "-c", head + code, uri, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]


def test_what_is_read_while_it_is_written_over_is_whole(uri: str, tmp_path: Path) -> None:
    writer, reader = Mirror(uri, tmp_path / "a"), Mirror(uri, tmp_path / "b")
    done, failed = threading.Event(), list[BaseException]()

    def text(turn: int) -> bytes:
        return bytes([turn % 256]) * (50_000 + 100 * turn)

    def write() -> None:
        turn = 0
        try:
            while not done.is_set():
                turn += 1
                writer.put(writer.root / "object", text(turn))
                time.sleep(0.01)
        except BaseException as error:
            failed.append(error)

    writer.put(writer.root / "object", text(0))
    thread = threading.Thread(target=write)
    thread.start()
    seen, until = set[int](), time.monotonic() + 20
    try:
        while len(seen) < 20:
            assert time.monotonic() < until, "it is not written over"
            data = reader.get(reader.root / "object")
            assert data == text((len(data) - 50_000) // 100)
            part = reader.get_range(reader.root / "object", 1000, 40_000)
            assert len(set(part)) == 1
            seen |= {data[0], part[0]}
    finally:
        done.set()
        thread.join(60)
    assert failed == []


def test_names_are_those_directly_below(uri: str, tmp_path: Path) -> None:
    mirror, root = Mirror(uri, tmp_path), tmp_path
    for name in ("run/run.json", "run/deep/deeper/a", "other/b", "run-2/c", "top"):
        mirror.put(root / name, b"abc")
    assert set(mirror.names(root, directories=True)) == {"run", "other", "run-2"}
    assert mirror.names(root) == {"top": 3}
    assert set(mirror.names(root / "run", directories=True)) == {"deep"}
    assert mirror.names(root / "none") == mirror.names(root / "none", directories=True) == {}
    assert mirror.total(root / "run") == 6
    for _ in range(2):  # what is not there is removed, too
        mirror.delete_tree(root / "run")
        mirror.delete(root / "top")
    assert set(mirror.names(root, directories=True)) == {"other", "run-2"}
    assert mirror.names(root) == {}
    assert mirror.size(root / "run" / "run.json") is None


def test_a_unit_costs_as_many_requests_as_any_other(s3: Any, tmp_path: Path) -> None:
    ours = units(s3.uri(), tmp_path / "ours")
    costs = []
    for index in range(40):
        before = len(s3.requests)
        ours.commit(f"u{index}", write_text("abc"))
        costs.append(Counter(request.method for request in s3.requests[before:]))
    assert costs[1:] == [costs[1]] * 39
    assert costs[1] == {"HEAD": 2, "GET": 2, "PUT": 4}, "two looks, two files, the commit, the ledger"


def test_what_a_store_refuses_is_told(s3: Any, tmp_path: Path) -> None:
    nowhere = s3.uri().replace("s3://rankline/", "s3://nowhere/")
    with pytest.raises(StorageError, match=r"write s3://nowhere/.*: there is no such bucket\. Make it") as caught:
        Mirror(nowhere, tmp_path).probe()
    assert exit_code(caught.value) == 3
    deaf = Mirror(s3.uri().replace(f":{s3.port}", ":1403"), tmp_path / "deaf")  # a port is no status
    with pytest.raises(StorageError, match=r"look for s3://rankline/.*: it does not answer\. Check the network"):
        deaf.size(tmp_path / "deaf/a")
    with pytest.raises(StorageError, match=r"open the store s3://rankline/x: .*Check store\.path"):
        Mirror("s3://rankline/x?what=1", tmp_path).probe()
    Mirror(s3.uri(), tmp_path).probe()


def test_what_gcs_refuses_is_told(gcs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere, refused = Mirror(gcs.uri(bucket="nowhere"), tmp_path), Mirror(gcs.uri(bucket="refused"), tmp_path)
    for what in (lambda: nowhere.probe(), lambda: nowhere.get(tmp_path / "a")):
        with pytest.raises(StorageError, match=r"gs://anonymous@nowhere/.*: there is no such bucket\.") as caught:
            what()
        assert exit_code(caught.value) == 3
    for what in (refused.probe, lambda: refused.size(tmp_path / "a"), lambda: refused.names(tmp_path)):
        with pytest.raises(StorageError, match=r"gs://anonymous@refused/.*: access is refused\. Set credentials"):
            what()
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(StorageError, match=r"write gs://bucket/.*: no token is to be had\. .*none\.json"):
        Mirror("gs://bucket/prefix", tmp_path / "without").probe()
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"write gs://anonymous@rankline/.*: it does not answer\. Check the network"):
        Mirror(gcs.uri().replace(f":{gcs.port}", ":1403"), tmp_path / "deaf").probe()
    assert time.monotonic() - began < 40
    Mirror(gcs.uri(), tmp_path).probe()


def serial(tmp_path: Path, name: str, uri: str, **more: Any) -> Any:
    return tiny_pipeline(tmp_path, None, store={"path": uri, "cache": str(tmp_path / name)}, **more)


def test_exact_stages_are_equal_to_a_local_stores(uri: str, tmp_path: Path) -> None:
    here = tiny_pipeline(tmp_path, None)
    remote = with_changes(here, store={"path": uri, "cache": str(tmp_path / "cache")})
    for config in (here, remote):
        run_serially(config, *EXACT)
    for stage in EXACT:
        assert unit_hashes(remote, stage) == unit_hashes(here, stage), stage
    shutil.rmtree(tmp_path / "cache")
    again = with_changes(here, store={"path": uri, "cache": str(tmp_path / "another")})
    run_serially(again, *EXACT)
    for stage in EXACT:
        started = Counter(line["unit"] for line in stage_units(again, stage).ledger() if line["event"] == "start")
        assert set(started.values()) == {1}, f"{stage}: made again"
        for unit in unit_hashes(again, stage):
            ours, theirs = stage_units(again, stage).fetch(unit), stage_units(here, stage).path(unit)
            for file in stage_units(here, stage).read(unit).files:
                assert (ours / file).read_bytes() == (theirs / file).read_bytes(), f"{stage} {unit} {file}"


def test_rows_are_read_by_their_bytes_alone(s3: Any, tmp_path: Path) -> None:
    """Counted by the server: the header once, then no byte that is not of these rows; once per machine."""
    uri = s3.uri()
    writer = serial(tmp_path, "writer", uri, shard={"shard_bytes": 1 << 20})
    run_serially(writer, "shard")
    reader = with_changes(writer, store={"path": uri, "cache": str(tmp_path / "reader")})
    store = store_of(reader)
    path = stage_units(reader, "shard").root
    shards = ShardSet(path, store.mirror)
    name = next(name for name in shards.tensors if name.endswith("mlp.up_proj.weight"))
    whole = ShardSet(stage_units(writer, "shard").root).load(name)
    row_bytes = whole[0].numel() * whole.element_size()
    (piece,) = shards.slices(name, 3, 8)
    before = len(s3.requests)
    assert torch.equal(piece.read(), whole[3:8])
    asked = list(s3.got(before))
    assert all(request.range for request in asked), "nothing is read whole"
    length = int.from_bytes(store.mirror.get_range(piece.file, 0, 8), "little")
    assert sum(request.num_bytes for request in asked) == 8 + length + 5 * row_bytes
    size = store.mirror.size(piece.file)
    assert size is not None
    assert size > 4 * (8 + length + 5 * row_bytes), "reading the file would show"
    before = len(s3.requests)
    assert torch.equal(piece.read(), whole[3:8])
    assert len(s3.requests) == before, "it was kept"
    assert torch.equal(shards.slices(name, 10, 12)[0].read(), whole[10:12])
    assert sum(request.num_bytes for request in s3.got(before)) == 2 * row_bytes, "the header is known"
    assert torch.equal(shards.load(name), whole)
    assert not (path / "units" / "shard-00000").exists()


def test_a_tensor_that_is_read_whole_is_checked(s3: Any, tmp_path: Path) -> None:
    uri = s3.uri()
    writer = serial(tmp_path, "writer", uri)
    run_serially(writer, "shard")
    reader = with_changes(writer, store={"path": uri, "cache": str(tmp_path / "reader")})
    units = stage_units(reader, "shard")
    shards = ShardSet(units.root, store_of(reader).mirror)
    piece = max((piece for tensor in shards.tensors.values() for piece in tensor.pieces), key=lambda one: one.row_stop)
    name = next(name for name, tensor in shards.tensors.items() if piece in tensor.pieces)
    unit = piece.file.split("/")[1]
    digest = units.read(unit).files["shard.safetensors"]
    url = s3.change(uri, f"_artifacts/shard/{units.root.name}/payload/{unit}/{digest}")
    with pytest.raises(DamagedError, match=f"^{url} is damaged: the bytes of {piece.key} are not those") as caught:
        shards.load(name)
    assert exit_code(caught.value) == 3
