"""The readers of files that may hold anything, each with valid files to begin from and the errors that it may raise.

`tests/test_fuzz_readers.py` and `tests/fuzz_readers.py` give them damaged ones.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from cluster.durable import MANIFEST as UNIT
from cluster.durable import SIDECAR, UnitStore, canonical, sha256_bytes
from cluster.errors import DamagedError, ModelError, TokenError
from cluster.head import RECORD_NAME
from cluster.head import read_record as read_head
from cluster.known_models import check_config
from cluster.metrics import METRICS_FILE, read_metrics, steps_redone
from cluster.serving.auth import Keyring, read_keys
from cluster.tokens import _META, TOKENS_FILE, TokenTable, tokens_schema
from lowrank.adapters.base import Layer
from lowrank.adapters.peft_format import CONFIG, WEIGHTS, load_adapter, load_saved_modules, save_adapter
from lowrank.adapters.registry import FAMILIES, initial_adapters
from lowrank.checkpoint import SafetensorsCheckpoint
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError, CheckpointError
from lowrank.gguf import GGUFCheckpoint
from lowrank.headers import gguf_headers
from pipelines.artifacts import Store
from pipelines.config import parse, read_yaml
from pipelines.errors import ArtifactError, ConfigError, LeaseError
from pipelines.inspect_store import _run
from pipelines.lease import Lease, holder
from pipelines.maintenance import known_run, verify
from pipelines.records import read_record
from pipelines.sources import SourceHashes

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
#: m and n of both.
SHAPE = (12, 18)


@dataclass(frozen=True)
class Target:
    """A reader: `read(data, directory)` puts the bytes where they belong and reads them."""

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], Any]
    allowed: tuple[type[Exception], ...]


# ---- a pipeline's YAML -----------------------------------------------------------------------------------------------

PIPELINES = sorted((Path(__file__).parent.parent / "pipelines" / "configs").glob("*.yaml"))


def _pipelines() -> list[bytes]:
    return [path.read_bytes() for path in PIPELINES]


def _read_pipeline(data: bytes, directory: Path) -> Any:
    path = directory / "pipeline.yaml"
    path.write_bytes(data)
    return parse(read_yaml(path))


# ---- the JSON files of a store ---------------------------------------------------------------------------------------

_FILE = {"weights.bin": sha256_bytes(b"abc")}
STORE_FILES: dict[str, Any] = {
    "manifest": {"stage": "shard", "key": "k", "inputs": {}, "config": {"rank": 2}, "files": {"u": "0" * 64},
                 "facts": {"loss": 1.5}, "format_version": 1, "sha256": ""},
    "unit": {"name": "u", "files": _FILE, "facts": {"rows": 3}, "sha256": ""},
    "sidecar": {"host": "h", "node": "n", "pid": 1, "started": 1.0, "seconds": 2.0, "peak_rss_bytes": 3},
    "ledger": {"event": "commit", "unit": "u", "time": 1.0, "node": "n", "pid": 1, "sha256": "0" * 64},
    "run": {"name": "one", "run_key": "k", "status": "RUNNING", "keys": {"shard": "k"},
            "manifests": {"shard": "0" * 64}, "stages": {"shard": {"cached": True, "seconds": 1.0}}, "updated": 1.0,
            "mlflow_uri": None, "endpoint": {"url": "http://127.0.0.1:8000", "token_file": "token"}, "sha256": ""},
    "lease": {"pid": 1, "host": "h", "started": 1.0, "token": "t"},
    "hashes": {"rows.jsonl": {"stamp": [1, 2, 3], "sha256": "0" * 64}},
    "registries": ["sqlite:///mlflow.db"],
    "head": {"address": "127.0.0.1:6379", "dashboard_url": "http://127.0.0.1:8265", "token_file": "t", "temp_dir": "d",
             "marker": "m", "host": "h", "num_cpus": 2, "started_at": 1.0, "ports": {"gcs": 6379},
             "pids": {"raylet": [1, 2.0]}, "sids": [1], "state": "running"},
    "metrics": {"event": "step", "step": 1, "attempt": 0, "loss": 1.0, "seconds": 1.0},
    "model": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": None},
}  # fmt: skip


def _store_files() -> list[bytes]:
    return [f"{kind}\n".encode() + json.dumps(value).encode() for kind, value in STORE_FILES.items()]


def resealed(data: bytes) -> bytes:
    """A JSON object with its own hash put right, so that what it holds is looked at; other data as it is."""
    try:
        value = json.loads(data)
        if isinstance(value, dict) and "sha256" in value:
            rest = {name: item for name, item in value.items() if name != "sha256"}
            return json.dumps(value | {"sha256": sha256_bytes(canonical(rest))}).encode()
    except (ValueError, RecursionError):
        pass
    return data


def _read_store_file(data: bytes, directory: Path) -> Any:
    """The first line says which file it is."""
    kind, _, text = data.partition(b"\n")
    for variant in dict.fromkeys((text, resealed(text))):
        read_as(kind.decode("ascii", "replace"), variant, directory)


def read_as(kind: str, data: bytes, root: Path) -> Any:
    """Put a store's file in its place and read it as every command does."""
    store, units = Store(root), UnitStore(root / "_artifacts" / "shard" / "k")
    place = {
        "manifest": units.root / "manifest.json", "unit": units.path("u") / UNIT, "sidecar": units.path("u") / SIDECAR,
        "ledger": units.root / "ledger" / "h-1.jsonl", "run": root / "one" / "run.json",
        "lease": root / "one" / "lease.json", "hashes": root / "_hashes.json", "registries": root / "_registries.json",
        "head": root / RECORD_NAME, "metrics": root / METRICS_FILE, "model": root / "config.json",
    }.get(kind)  # fmt: skip
    if place is None:
        return None
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    try:
        return _READ[kind](root, store, units)
    finally:
        place.unlink()


def _read_unit(_root: Path, _store: Store, units: UnitStore) -> Any:
    (units.path("u") / "weights.bin").write_bytes(b"abc")
    try:
        return units.read("u", verify=True)
    except ValueError as error:
        if type(error) is not ValueError:  # documented, and no other that happens to be one
            raise AssertionError("no plain ValueError") from error
        return None


def _read_run(root: Path, store: Store, _units: UnitStore) -> Any:
    read_record(root / "one")
    _run(store, "one")
    verify(store, "one")
    return known_run(store, "one", "verify")


def _read_lease(root: Path, _store: Store, _units: UnitStore) -> Any:
    driver = holder(root / "one" / "lease.json")
    if driver is not None:
        str((driver["pid"], driver["host"], driver.get("token")))
    Lease(root / "one" / "lease.json", "t").require()


def _read_hashes(root: Path, _store: Store, _units: UnitStore) -> Any:
    (root / "rows.jsonl").write_text("{}\n")
    hashes = SourceHashes(root / "_hashes.json")
    assert hashes.of([root / "rows.jsonl"])
    return hashes.stamps([root / "rows.jsonl"])


def _read_ledger(_root: Path, _store: Store, units: UnitStore) -> Any:
    return [(line["event"], line["unit"]) for line in units.ledger()]


_READ: dict[str, Callable[[Path, Store, UnitStore], Any]] = {
    "manifest": lambda _root, store, _units: store.read_manifest("shard", "k") and store.check("shard", "k"),
    "unit": _read_unit,
    "sidecar": lambda _root, _store, units: float(units.sidecar("u")["seconds"]),
    "ledger": _read_ledger,
    "run": _read_run,
    "lease": _read_lease,
    "hashes": _read_hashes,
    "registries": lambda _root, store, _units: sorted(store.registries()),
    "head": lambda root, _store, _units: read_head(root),
    "metrics": lambda root, _store, _units: (read_metrics(root), steps_redone(root)),
    "model": lambda root, _store, _units: check_config(root),
}


# ---- weights ---------------------------------------------------------------------------------------------------------


def as_safetensors(header: Any, payload: bytes) -> bytes:
    """A file of this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def _weights() -> list[bytes]:
    whole = {"w": torch.ones(3, 4), "b": torch.ones(3, dtype=torch.bfloat16), "i": torch.ones(2, dtype=torch.int64)}
    index = json.dumps({"weight_map": {"w": "model.safetensors"}}).encode()
    return [save(whole), save({"scalar": torch.tensor(1.0), "empty": torch.ones(0, 3)}), save({}), index]


def _read_weights(data: bytes, directory: Path) -> Any:
    """A file of weights, or what begins as JSON as the index of a directory that has one."""
    index, file = directory / "model.safetensors.index.json", directory / "model.safetensors"
    index.unlink(missing_ok=True)
    file.write_bytes(_weights()[0] if data.startswith(b'{"') else data)
    if data.startswith(b'{"'):
        index.write_bytes(data)
    checkpoint = SafetensorsCheckpoint(directory)
    return [checkpoint.read_rows(spec.name, 0, 2) for spec in checkpoint.specs()]


@cache
def _ggufs() -> list[bytes]:
    import tempfile

    import gguf

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "m.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_context_length(16)
        writer.add_embedding_length(8)
        writer.add_block_count(1)
        writer.add_feed_forward_length(8)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_token_list(["a", "b"])
        writer.add_array("numbers", [1, 2, 3])
        writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float16))
        writer.add_tensor("blk.0.attn_k.weight", np.ones((4, 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [path.read_bytes()]


def _read_gguf(data: bytes, directory: Path) -> Any:
    path = directory / "m.gguf"
    path.write_bytes(data)
    headers = gguf_headers(path)
    checkpoint = GGUFCheckpoint(path)
    config = checkpoint.config
    return headers, config, [checkpoint.read_rows(spec.name, 0, 2) for spec in checkpoint.specs()]


# ---- adapters --------------------------------------------------------------------------------------------------------


@cache
def adapter_files(method: str) -> tuple[dict[str, Any], bytes]:
    """`adapter_config.json` and the weights of a small adapter of a family."""
    import tempfile

    layers = [Layer(name, SHAPE, index, lambda: torch.ones(SHAPE)) for index, name in enumerate(MODULES)]
    rank = {} if method in ("full", "krona", "kradapter") else {"r": 2}
    config = AdapterConfig(method=method, init="kaiming", lora_alpha=4.0, **rank)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        save_adapter(Path(scratch), initial_adapters(layers, config), config, {"name": "tiny", "base": "dense"})
        text, weights = (Path(scratch) / CONFIG).read_text(), (Path(scratch) / WEIGHTS).read_bytes()
    return json.loads(text), weights


def _adapter_configs() -> list[bytes]:
    made = [json.dumps(adapter_files(method)[0]).encode() for method in FAMILIES]
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.[01]\..*": 3.0}, "modules_to_save": ["norm"]}
    return [*made, json.dumps(adapter_files("lora")[0] | patterns).encode()]


def _read_adapter_config(data: bytes, directory: Path) -> Any:
    """With the weights of the family that it names, if it names one."""
    try:
        method = json.loads(data)["rankline"]["method"]
        weights = adapter_files(method if method in FAMILIES else "lora")[1]
    except Exception:
        weights = adapter_files("lora")[1]
    (directory / CONFIG).write_bytes(data)
    (directory / WEIGHTS).write_bytes(weights)
    return _read_adapter(directory)


def _adapter_weights() -> list[bytes]:
    return [f"{method}\n".encode() + adapter_files(method)[1] for method in FAMILIES]


def _read_adapter_weights(data: bytes, directory: Path) -> Any:
    """The first line names the family."""
    method, _, weights = data.partition(b"\n")
    name = method.decode("ascii", "replace")
    (directory / CONFIG).write_text(json.dumps(adapter_files(name if name in FAMILIES else "lora")[0]))
    (directory / WEIGHTS).write_bytes(weights)
    return _read_adapter(directory)


@torch.inference_mode()
def _read_adapter(directory: Path) -> Any:
    """What loads also answers, where its shapes are those of the layer."""
    adapters = load_adapter(directory, {"name": "tiny", "base": "dense"})
    base, x = torch.nn.Linear(SHAPE[1], SHAPE[0]), torch.ones(1, SHAPE[1])
    for adapter in adapters.values():
        if adapter.shape == SHAPE:
            assert adapter.frozen()(x, base(x), base).shape == (1, SHAPE[0])
    return adapters, load_saved_modules(directory)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def token_table(**changed: Any) -> bytes:
    """A token table of two rows, with columns changed, or left out by None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"row": [0, 1], "input_ids": [[1, 2], [3]], "labels": [[-100, 2], [3]], "num_answer_tokens": [1, 1],
               "prompt": ["a", "b"], "prompt_ids": [[1], []], "answer": ["c", "d"]}  # fmt: skip
    fields = {field.name: field for field in tokens_schema()}
    facts = changed.pop("facts", b'{"format": "text"}')
    columns |= changed
    arrays = {
        name: values if isinstance(values, pa.Array) else pa.array(values, fields[name].type)
        for name, values in columns.items()
        if values is not None
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays).replace_schema_metadata({_META: facts}), sink)
    return sink.getvalue()


def _read_tokens(data: bytes, directory: Path) -> Any:
    (directory / TOKENS_FILE).write_bytes(data)
    table = TokenTable.read(directory)
    for row in range(min(len(table), 3)):
        assert len(table.input_ids(row)) == len(table.labels(row))
    return table.facts, table.lengths, table.num_answer_tokens, table.pairs(), table.head(1)


def _token_files() -> list[bytes]:
    keys = [{"name": "a", "token": "b", "models": ["x*"], "requests_per_minute": 5}, {"name": "c", "token": "d"}]
    return [b"secret\n", json.dumps({"tokens": keys}).encode()]


def _read_token_file(data: bytes, directory: Path) -> Any:
    path = directory / "token"
    path.write_bytes(data)
    path.chmod(0o600)
    keys = read_keys(path)
    ring = Keyring(keys)
    for key in keys:
        found = ring.find(f"Bearer {key.token}".encode())
        assert found is not None
        ring.wait_s(found)
        found.may_use("model@3")
    return keys


TARGETS: dict[str, Target] = {
    "config": Target(_pipelines, _read_pipeline, (ConfigError,)),
    "store": Target(_store_files, _read_store_file, (ArtifactError, ConfigError, LeaseError, ModelError)),
    "safetensors": Target(_weights, _read_weights, (CheckpointError,)),
    "gguf": Target(_ggufs, _read_gguf, (CheckpointError,)),
    "adapter_config": Target(_adapter_configs, _read_adapter_config, (AdapterError,)),
    "adapter_weights": Target(_adapter_weights, _read_adapter_weights, (AdapterError,)),
    "tokens": Target(lambda: [token_table()], _read_tokens, (DamagedError,)),
    "token_file": Target(_token_files, _read_token_file, (TokenError,)),
}


def try_reader(name: str, data: bytes, directory: Path) -> str:
    """Read: `read`, or the name of the typed error; any other error goes on to the caller."""
    target = TARGETS[name]
    try:
        target.read(data, directory)
    except target.allowed as error:
        if len(str(error)) > MOST_MESSAGE:
            raise AssertionError(f"a message of {len(str(error))} characters") from None
        return type(error).__name__
    return "read"


#: Characters of a message that somebody still reads.
MOST_MESSAGE = 20_000
