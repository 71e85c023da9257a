"""Damaged and forged files, by property: every reader returns a value or raises its own typed error, in bounded time.

`tests/fuzz_readers.py` searches by coverage; what either has found stands in `tests/test_damaged_readers.py`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzz_targets import (
    MODULES,
    STORE_FILES,
    TARGETS,
    adapter_files,
    as_safetensors,
    token_table,
    try_reader,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from soak import amount, record

from cluster.durable import peak_rss_bytes
from lowrank.adapters.registry import FAMILIES

FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=amount(100, 1000),
    suppress_health_check=list(HealthCheck),
)
#: A reader's time for one file of a few kB, and what all of them together may add to this process.
MOST_S, MOST_BYTES = 10.0, 2**29
TEXTS = (
    "",
    "q_proj",
    "model.norm",
    "../../etc/passwd",
    "\0",
    "\ud800",
    "(a+)+x",
    "(",
    "é" * 300,
    "F32",
    "LORA",
    "1e9",
    ".",
)
NUMBERS = (0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 10**400, 1e308, float("inf"), float("nan"), 1e-320)

texts = st.sampled_from(TEXTS) | st.text(max_size=9)
numbers = st.sampled_from(NUMBERS) | st.integers() | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=9,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a document."""
    yield path
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from places(document[key], (*path, key))


@st.composite
def changed(draw: Any, documents: tuple[Any, ...]) -> Any:
    """One of the documents with one to three values replaced, left out, or put under another name."""
    document = json.loads(json.dumps(draw(st.sampled_from(documents))))
    for _ in range(draw(st.integers(1, 3))):
        *outer, last = ["", *draw(st.sampled_from(list(places(document))))]
        if not outer:
            return draw(values)
        parent = document
        for key in outer[1:]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if how == "replace":
            parent[last] = draw(values)
        elif isinstance(parent, dict):
            value = parent.pop(last)
            if how == "rename":
                parent[draw(st.sampled_from(TEXTS))] = value
        else:
            del parent[last]
    return document


@st.composite
def damaged(draw: Any, seeds: list[bytes]) -> bytes:
    """Bytes of a valid file flipped, cut, doubled, put in, or an integer of the file replaced by an extreme one."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "integer", "double"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=8) | st.sampled_from([b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe"]))
        elif how == "integer":
            size = draw(st.sampled_from([4, 8]))
            number = draw(st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
            data[at : at + size] = (number % 256**size).to_bytes(size, "little")
        else:
            data[at:at] = data[at : at + 32]
    return bytes(data)


def fuzz(name: str, place: Path, files: st.SearchStrategy[bytes], what: str) -> None:
    """Every file of a strategy to a reader."""
    seen: Counter[str] = Counter()
    slowest, before = 0.0, peak_rss_bytes()

    @FUZZ
    @given(files)
    def once(data: bytes) -> None:
        nonlocal slowest
        began = time.monotonic()
        seen[try_reader(name, data, place)] += 1
        slowest = max(slowest, time.monotonic() - began)

    once()
    assert slowest < MOST_S
    assert peak_rss_bytes() - before < MOST_BYTES
    assert not [path for path in place.rglob("*") if path.name.endswith((".tmp", ".lock"))]
    record(f"{what} given to the reader: {name}", seen.total(), [], "a value or a typed error", seen=dict(seen),
           slowest_s=round(slowest, 3))  # fmt: skip


def dumped(document: Any) -> bytes:
    return json.dumps(document).encode()


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_bytes(name: str, tmp_path: Path) -> None:
    seeds = TARGETS[name].seeds()
    fuzz(name, tmp_path, damaged(seeds) | st.binary(max_size=300), "damaged bytes")


@pytest.mark.parametrize("kind", STORE_FILES)
def test_a_store_s_files_of_any_values(kind: str, tmp_path: Path) -> None:
    files = changed((STORE_FILES[kind],)).map(lambda document: f"{kind}\n".encode() + dumped(document))
    fuzz("store", tmp_path, files, f"{kind} of any values")


def test_pipelines_of_any_values(tmp_path: Path) -> None:
    documents = tuple(yaml.safe_load(data) for data in TARGETS["config"].seeds())

    def text(document: Any) -> bytes:
        return bytes(yaml.dump(document, allow_unicode=True, Dumper=yaml.SafeDumper), "utf-8", "surrogatepass")

    fuzz("config", tmp_path, changed(documents).map(text), "settings of any values")


def test_adapter_configurations_of_any_values(tmp_path: Path) -> None:
    documents = tuple(json.loads(data) for data in TARGETS["adapter_config"].seeds())
    fuzz("adapter_config", tmp_path, changed(documents).map(dumped), "fields of any values")


@st.composite
def tensors(draw: Any) -> bytes:
    """A family's tensors with some of another shape, dtype or name, not finite, or left out."""
    method = draw(st.sampled_from(sorted(FAMILIES)))
    made = load(adapter_files(method)[1])
    for name in draw(st.lists(st.sampled_from(sorted(made)), min_size=1, max_size=4, unique=True)):
        tensor = made.pop(name)
        how = draw(st.sampled_from(["shape", "value", "dtype", "name", "remove"]))
        if how == "shape":
            made[name] = torch.ones(draw(st.lists(st.sampled_from([0, 1, 2, 3, 12, 18, 19]), max_size=3)))
        elif how == "value":
            made[name] = torch.full(tensor.shape, draw(st.sampled_from([float("nan"), float("inf"), 0.0, 3e38, -1.0])))
        elif how == "dtype":
            kinds = [torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]
            made[name] = tensor.to(draw(st.sampled_from([*kinds, torch.float8_e4m3fn])))
        elif how == "name":
            texts = ("", "é" * 300, "base_model.model.norm.weight", f"base_model.model.{MODULES[0]}.alpha")
            made[draw(st.sampled_from(texts)) + draw(st.sampled_from(["", name]))] = tensor
    return f"{method}\n".encode() + save(made)


def test_adapter_tensors_of_any_kind(tmp_path: Path) -> None:
    fuzz("adapter_weights", tmp_path, tensors(), "tensors of any kind")


def test_headers_of_any_values(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = {"__metadata__": {"format": "pt"}, "a": entry, "b": entry | {"data_offsets": [24, 48]}}
    files = changed((header,)).map(lambda made: as_safetensors(made, bytes(48)))
    fuzz("safetensors", tmp_path, files | changed(({"weight_map": {"a": "b"}},)).map(dumped), "headers of any values")


def test_token_files_of_any_values(tmp_path: Path) -> None:
    documents = (json.loads(TARGETS["token_file"].seeds()[1]),)
    fuzz("token_file", tmp_path, changed(documents).map(dumped), "entries of any values")


def test_token_tables_of_any_columns(tmp_path: Path) -> None:
    import pyarrow as pa

    columns: list[Callable[[], Any]] = [
        lambda: None,
        lambda: pa.array(["a", None]),
        lambda: pa.array([None, None], pa.list_(pa.int32())),
        lambda: pa.array([[1], [1, 2, 3]], pa.list_(pa.int32())),
        lambda: pa.array([[1, None], [3]], pa.list_(pa.int32())),
        lambda: pa.array([2**40, -1]),
        lambda: pa.array([{"a": 1}, None]),
        lambda: pa.array([1.5, float("nan")]),
    ]
    names = st.sampled_from(["row", "input_ids", "labels", "num_answer_tokens", "prompt", "prompt_ids", "answer"])
    facts = st.sampled_from([b"", b"[]", b"{", b"3", b"\xff", b"null", b"[" * 2000])
    tables = st.builds(
        lambda chosen, facts: token_table(**{name: make() for name, make in chosen.items()}, facts=facts),
        st.dictionaries(names, st.sampled_from(columns), max_size=2), facts,
    )  # fmt: skip
    fuzz("tokens", tmp_path, tables, "columns of any type")
