"""Files that once led to anything else than a typed error, or to no end: the smallest that show it."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_targets import MODULES, STORE_FILES, TARGETS, adapter_files, as_safetensors, token_table, try_reader
from safetensors.torch import load, save

from lowrank.adapters.peft_format import CONFIG, WEIGHTS, load_adapter
from lowrank.errors import AdapterError, CheckpointError
from lowrank.gguf import GGUFCheckpoint
from pipelines.cli import main
from pipelines.config import read_yaml
from pipelines.errors import ConfigError
from pipelines.records import write_record

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10))
BIG = "0x" + "f" * 5000
YAMLS = {
    "aliases that multiply": (LAUGHS, "stands for more than 100000 values"),
    "merges that multiply": (MERGES, "more than 10000 keys"),
    "many aliases": ("a: &a x\nb: [" + "*a, " * 101 + "]", "more than 100 aliases"),
    "a value that holds itself": ("a: &a [*a]", "holds itself"),
    "nested": ("[" * 5000, "nested deeper than 64"),
    "nested less": ("a: " + "[" * 80 + "]" * 80, "nested deeper than 64"),
    "an empty integer": ('name: !!int ""', "does not fit its tag"),
    "a word for true": ("name: !!bool x", "does not fit its tag"),
    "no time": ("name: !!timestamp x", "does not fit its tag"),
    "an integer of many digits": (f"name: {BIG}", "name: "),
    "a key of many digits": (f"{BIG}: 1", "not valid YAML"),
    "a key twice": ("name: a\nshard: {shard_bytes: 2048}\nname: b", "line 3: the key 'name' stands twice"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "other encodings": (b"name: \xff\xfe\xe9", "not valid YAML"),
    "too long": ("a: " + "x" * 2**20, "longer than 1048576 bytes"),
    "endless lists": (f"decompose: {list(range(9000))}", "decompose: "),
}


@pytest.mark.parametrize("what", YAMLS)
def test_yaml(what: str, tmp_path: Path) -> None:
    text, message = YAMLS[what]
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        TARGETS["config"].read(text if isinstance(text, bytes) else text.encode(), tmp_path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert time.monotonic() - began < 10


def test_merges_and_aliases_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("base: &base {rank: 2, method: svd}\nx: {<<: *base, rank: 4}\ny: {<<: *base, rank: 8}\n7: on\n")
    found = read_yaml(path)
    assert (found["x"], found["y"]["rank"], found["7"]) == ({"rank": 4, "method": "svd"}, 8, True)


def of(kind: str, **changes: Any) -> str:
    return f"{kind}\n{json.dumps(STORE_FILES[kind] | changes)}"


DEEP = '{"a":' * 700 + "1" + "}" * 700
READ, DAMAGED = "read", "ArtifactError"
STORE = {
    "a manifest that is null": ("manifest\nnull", DAMAGED),
    "a manifest of text": ('manifest\n"a"', DAMAGED),
    "a manifest of lists": (of("manifest", files=["a"]), DAMAGED),
    "a manifest nested deeply": (f'manifest\n{{"config": {DEEP}, "sha256": ""}}', DAMAGED),
    "a manifest with a key twice": ('manifest\n{"stage": "a", "stage": "b"}', DAMAGED),
    "a unit whose files are a list": (of("unit", files=["a"]), READ),
    "a unit with a long name": (of("unit", files={"x" * 300: "0" * 64}), READ),
    "a unit with no name": (of("unit", files={"\0": "0" * 64}), READ),
    "a unit nested deeply": (f"unit\n{DEEP}", READ),
    "a sidecar without seconds": ("sidecar\n{}", READ),
    "a sidecar cut off": ('sidecar\n{"no', READ),
    "a ledger without events": ('ledger\n{"time": 1.0}', READ),
    "a ledger with words for times": (of("ledger", time="now"), READ),
    "a ledger with an infinite integer": (of("ledger", time=10**400), READ),
    "an empty record": ("run\n{}", "ConfigError"),
    "a record whose keys are a number": (of("run", keys=3), "ConfigError"),
    "a record with a long key": (of("run", keys={"shard": "x" * 300}), "ConfigError"),
    "a record whose stages are texts": (of("run", stages={"shard": "done"}), "ConfigError"),
    "a record that was updated at a word": (of("run", updated="now"), "ConfigError"),
    "a record with an endpoint of nothing": (of("run", endpoint={"url": 3}), "ConfigError"),
    "a lease of an infinite process": ('lease\n{"host": "h", "started": 1, "pid": 1e999}', "LeaseError"),
    "a lease nested deeply": (f"lease\n{'[' * 100_000}", "LeaseError"),
    "hashes in a list": ("hashes\n[]", READ),
    "hashes that are numbers": ('hashes\n{"rows.jsonl": 3}', READ),
    "registries that are a number": ("registries\n3", DAMAGED),
    "registries nested deeply": (f"registries\n{'[' * 100_000}", DAMAGED),
    "a head with an infinite process": (of("head", pids={"raylet": [float("inf"), 1.0]}), READ),
    "a head whose sessions are words": (of("head", sids=["a"]), READ),
    "metrics that are no text": (b'metrics\n{"event": "\xe0"}', READ),
    "metrics of steps of several types": ("metrics\n" + "\n".join(
        json.dumps(STORE_FILES["metrics"] | {"step": step}) for step in (1, "a", None)), READ),
    "a model of a list": (of("model", model_type=[]), "ModelError"),
    "a model nested deeply": (f"model\n{'[' * 100_000}", "ModelError"),
}  # fmt: skip


@pytest.mark.parametrize("what", STORE)
def test_files_of_a_store(what: str, tmp_path: Path) -> None:
    text, outcome = STORE[what]
    assert try_reader("store", text if isinstance(text, bytes) else text.encode(), tmp_path) == outcome


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


HEADERS = {
    "a negative size": ({"a": entry(shape=[-2])}, 8),
    "sizes that are texts": ({"a": entry(shape="ab")}, 8),
    "true for a size": ({"a": entry(shape=[2, True])}, 8),
    "an overlap": ({"a": entry(), "b": entry(data_offsets=[4, 12])}, 12),
    "a hole": ({"a": entry(), "b": entry(data_offsets=[12, 20])}, 20),
    "offsets backwards": ({"a": entry(data_offsets=[8, 0])}, 8),
    "bytes that do not fit the shape": ({"a": entry(shape=[3])}, 8),
    "an infinite offset": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e999]}}', 8),
    "a size beyond 64 bits": ({"a": entry(shape=[2**70, 0], data_offsets=[0, 0])}, 0),
    "many dimensions": ({"a": entry(shape=[1] * 100_000 + [2])}, 8),
    "nested": (b"[" * 100_000, 0),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, 8),
    "a key twice": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
                    b'"a": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}', 8),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_headers_of_safetensors(what: str, tmp_path: Path) -> None:
    header, size = HEADERS[what]
    with pytest.raises(CheckpointError, match="Copy the file again"):
        TARGETS["safetensors"].read(as_safetensors(header, bytes(size)), tmp_path)


@pytest.mark.parametrize(
    "weight_map", ['{"a": 3}', '{"a": ["b"]}', "[]", "3", '{"a": ""}', f'{{"a": "{"x" * 300}"}}', "[" * 100_000]
)
def test_indexes_of_safetensors(weight_map: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        TARGETS["safetensors"].read(f'{{"weight_map": {weight_map}}}'.encode(), tmp_path)


def gguf(fields: list[bytes], tensors: bytes = b"", num_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, len(fields)) + b"".join(fields) + tensors + bytes(64)


def text_of(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


LLAMA = text_of("general.architecture") + struct.pack("<I", 8) + text_of("llama")
HEADS = text_of("llama.attention.head_count")
GGUFS = {
    "a tensor of 2**32 - 1 dimensions": gguf([LLAMA], text_of("w") + struct.pack("<I", 2**32 - 1), 1),
    "a tensor of no dimensions": gguf([LLAMA], text_of("w") + struct.pack("<IIQ", 0, 0, 0), 1),
    "an array of 2**63 numbers": gguf([LLAMA, text_of("a") + struct.pack("<IIQ", 9, 10, 2**63)]),
    "an array of arrays": gguf([LLAMA, text_of("a") + struct.pack("<IIQ", 9, 9, 2**60)]),
    "a text of 2**60 bytes": gguf([LLAMA, struct.pack("<Q", 2**60)]),
    "fields of the wrong types": gguf([LLAMA, HEADS + struct.pack("<I", 8) + text_of("two")]),
    "no heads": gguf([LLAMA, HEADS + struct.pack("<II", 4, 0),
                      text_of("llama.embedding_length") + struct.pack("<II", 4, 8)]),
    "another version": gguf([LLAMA], version=1),
}  # fmt: skip


@pytest.mark.parametrize("what", GGUFS)
def test_gguf(what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUFS[what])
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="read GGUF"):
        _ = GGUFCheckpoint(path).config
    assert time.monotonic() - began < 5


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapter(directory: Path, method: str = "lora", tensors: dict[str, Any] | None = None, **fields: Any) -> Path:
    config, weights = adapter_files(method)
    (directory / CONFIG).write_text(json.dumps(config | fields))
    (directory / WEIGHTS).write_bytes(weights if tensors is None else save({**load(weights), **tensors}))
    return directory


BOMB = "(a+)+x"
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "rankline is a text": ({"rankline": "x"}, "rankline is 'x'; allowed is a mapping"),
    "a method that is a list": ({"rankline": {"method": []}}, r"rankline.method is \[\]"),
    "options that are a list": ({"rankline": {"options": [1]}}, "rankline.options"),
    "shapes of one size": ({"rankline": {"shapes": {"a": [1]}}}, "rankline.shapes"),
    "peft_type is a mapping": ({"peft_type": {}}, "peft_type is {}"),
    "alpha is not a number": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "alpha is infinite": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "alpha is too long": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "alpha is missing": ({"lora_alpha": None}, "Save it again"),
    "dropout is 2": ({"lora_dropout": 2}, "lora_dropout is 2"),
    "ranks of no rank": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    "alphas of texts": ({"alpha_pattern": {"q_proj": "a"}}, "alpha_pattern"),
    "alphas in a list": ({"alpha_pattern": ["a"]}, "alpha_pattern"),
    "no regular expression": ({"alpha_pattern": {"(": 1.0}}, "no regular expression of RE2"),
    "a look-ahead": ({"alpha_pattern": {"(?!v_proj).*": 1.0}}, "no look-around"),
    "half a character": ({"alpha_pattern": {"\ud800+": 1.0}}, "no regular expression of RE2"),
    "many expressions": ({"alpha_pattern": {f"a{n}+": 1.0 for n in range(65)}}, "got 65 regular expressions"),
    "saved modules in a text": ({"modules_to_save": "norm"}, "modules_to_save"),
    "many saved modules": ({"modules_to_save": ["a"] * 2000}, "modules_to_save"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_fields_of_an_adapter(what: str, tmp_path: Path) -> None:
    fields, message = FIELDS[what]
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(adapter(tmp_path, **fields))
    assert len(str(caught.value)) < 2000


def test_a_regular_expression_cannot_take_the_endpoint_s_time(tmp_path: Path) -> None:
    """Python's own engine would take 2**60 steps on this one, and hold every other thread up meanwhile."""
    name = f"base_model.model.{'a' * 60}."
    pair = {f"{name}lora_A.weight": torch.ones(2, 18), f"{name}lora_B.weight": torch.ones(12, 2)}
    began = time.monotonic()
    found = load_adapter(adapter(tmp_path, tensors=pair, alpha_pattern={BOMB: 9.0, "(a|a)*": 6.0, "q_proj": 3.0}))
    assert time.monotonic() - began < 5
    assert (found["a" * 60].scaling, found[MODULES[0]].scaling) == (3.0, 1.5)


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    patterns = {r"layers\.1\..*": 8.0, "q_proj": 6.0, MODULES[1]: 2.0, "proj": 1.0}
    found = load_adapter(adapter(tmp_path, alpha_pattern=patterns))
    assert [found[module].scaling for module in MODULES] == [3.0, 4.0]


def tensor_of(name: str, module: str = MODULES[0]) -> str:
    return f"base_model.model.{module}.{name}"


A, B = tensor_of("lora_A.weight"), tensor_of("lora_B.weight")
LONG = tensor_of("lora_A.weight", "a" * 600)
TENSORS: dict[str, tuple[str, dict[str, torch.Tensor], dict[str, Any], str]] = {
    "rank 0": ("lora", {A: torch.ones(0, 18), B: torch.ones(12, 0)}, {}, "ZeroDivisionError"),
    "numbers that fp32 does not hold": ("lora", {A: torch.full((2, 18), 1e300, dtype=torch.float64)}, {}, "infinity"),
    "complex numbers": ("lora", {A: torch.ones(2, 18, dtype=torch.complex64)}, {}, "holds C64; allowed"),
    "a name of 600 characters": ("lora", {LONG: torch.ones(2, 18)}, {}, "at most 512 characters"),
    "magnitudes of another layer": ("dora", {tensor_of("lora_magnitude_vector"): torch.ones(3)}, {}, "DoRA factors"),
    "a triple that does not fit": ("polar", {tensor_of("polar_theta"): torch.ones(3, 3)}, {}, "PoLAR factors"),
    "a core that does not fit": ("lora_xs", {tensor_of("lora_xs_R"): torch.ones(2, 3)}, {}, "LoRA-XS factors"),
    "pairs that do not fit": ("hira", {tensor_of("hira_A"): torch.ones(3, 18)}, {}, "HiRA factors"),
    "a place that there is not": ("lorta", {tensor_of("lorta_place"): torch.tensor([9, 0])}, {}, "no layer and proj"),
    "components that do not fit": ("adalora", {tensor_of("lora_E"): torch.ones(3, 1)}, {}, "AdaLoRA factors"),
    "a vector that is a matrix": ("vera", {tensor_of("vera_lambda_b"): torch.ones(12, 2)}, {}, "VeRA factors"),
    "a full change that is a vector": ("full", {tensor_of("full_delta"): torch.ones(12)}, {}, "full factors"),
    "an infinite alpha of LyCORIS": ("loha", {tensor_of("alpha"): torch.tensor(1e38)}, {"alpha": 1e-9}, "infinity"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_of_an_adapter(what: str, tmp_path: Path) -> None:
    method, tensors, fields, message = TENSORS[what]
    with pytest.raises(AdapterError, match=message):
        load_adapter(adapter(tmp_path, method, tensors, **fields))


def test_a_file_of_a_few_bytes_cannot_ask_for_all_memory(tmp_path: Path) -> None:
    """AdaLoRA's `init_r` once was how many rows were made, and what holds no numbers may name any size."""
    big = 2**40
    tensors = {tensor_of("lora_A"): torch.ones(0, big), tensor_of("lora_B"): torch.ones(big, 0)}
    found = load_adapter(adapter(tmp_path, "adalora", tensors | {tensor_of("lora_E"): torch.ones(0, 1)}, init_r=2**16))
    assert found[MODULES[0]].shape == (big, big)
    assert found[MODULES[1]].r == 2


# ---- tokens, and the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": None},
        {"labels": [[1], None]},
        {"labels": [[1], [3]]},
        {"labels": [[1, None], [3]]},
        {"facts": b"{"},
        {"facts": b"3"},
    ],
    ids=["a column missing", "no labels", "fewer labels", "a label missing", "facts cut off", "facts of a number"],
)
def test_token_tables(changes: dict[str, Any], tmp_path: Path) -> None:
    assert try_reader("tokens", token_table(**changes), tmp_path) == "DamagedError"


@pytest.mark.parametrize("rate", ["1" + "0" * 400, "true", "1e999", "[" * 5000])
def test_token_files(rate: str, tmp_path: Path) -> None:
    text = f'{{"tokens": [{{"name": "a", "token": "b", "requests_per_minute": {rate}}}]}}'
    assert try_reader("token_file", text.encode(), tmp_path) == "TokenError"


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


WORST = ["aliases that multiply", "merges that multiply", "a value that holds itself", "an integer of many digits"]


@pytest.mark.parametrize("what", [*WORST, "an empty integer", "a key twice"])
def test_the_command_line_refuses_a_bad_pipeline(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(str(YAMLS[what][0]))
    before = tree(tmp_path)
    assert main(["plan", str(path), "--store", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert YAMLS[what][1] in told
    assert "Traceback" not in told
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("text", "code"), [("{}", 2), ('{"keys": 3}', 2), ("[" * 100_000, 2), ("\0", 2)])
def test_the_command_line_refuses_a_damaged_record(
    text: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text(text)
    before = tree(tmp_path)
    for command in (["verify", "one"], ["resume", "one"], ["export", "one", "--out", str(tmp_path / "out")]):
        assert main([*command, "--store", str(tmp_path)]) == code
        assert "no such run" in capsys.readouterr().err
    assert main(["status", "--store", str(tmp_path)]) == 0
    assert "DAMAGED" in capsys.readouterr().out
    assert tree(tmp_path) == before


def test_the_command_line_names_a_damaged_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()
    write_record(tmp_path / "one", {"name": "one", "status": "FINISHED", "keys": {"shard": "k"}, "stages": {}})
    manifest = tmp_path / "_artifacts" / "shard" / "k" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("null")
    before = tree(tmp_path)
    assert main(["verify", "one", "--store", str(tmp_path)]) == 3
    told = capsys.readouterr()
    assert "manifest.json" in told.out + told.err
    assert main(["status", "one", "--store", str(tmp_path)]) == 3
    assert "Delete" in capsys.readouterr().err
    assert tree(tmp_path) == before
