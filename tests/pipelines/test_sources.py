"""A model or rows that change while a run reads them, or that are there by half: refused, and nothing of them stays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lines import (
    chat_rows,
    make_data,
    make_model_dir,
    run_serially,
    stage_units,
    tiny_pipeline,
    unit_hashes,
    with_changes,
)
from tiny import write_jsonl

import cluster.data
import pipelines.stages.shard
from cluster.errors import DataError, ModelError
from lowrank.errors import CheckpointError
from pipelines.errors import exit_code
from pipelines.sources import hash_sources, require_stamps


def overwrite(path: Path, keep_time: bool) -> None:
    """One byte of the last tensor changes, in place."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as handle:
        handle.write(data)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def before_call(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, count: int, act: Callable[[], None]) -> None:
    """Act once, before the `count`-th call of a function."""
    real, calls = getattr(module, name), [0]

    def called(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            act()
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, called)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("keep_time", [False, True])
def test_a_model_that_changes_while_it_is_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, keep_time: bool
) -> None:
    config = tiny_pipeline(tmp_path, None)
    expected = run_serially(config, "shard")["shard"]
    hashes = unit_hashes(config, "shard")
    again = with_changes(config, store={"path": str(tmp_path / "again")})
    path = Path(config.model.source) / file
    whole = path.read_bytes()
    key = stage_units(again, "shard").root
    before_call(monkeypatch, pipelines.stages.shard, "read_rows", 3, lambda: overwrite(path, keep_time))
    with pytest.raises(ModelError, match=r"changed while .* Nothing of it is kept; run again") as caught:
        run_serially(again, "shard")
    assert exit_code(caught.value) == 2
    assert list((key / "units").glob("*")) == []
    assert not (key / "manifest.json").exists()
    path.write_bytes(whole)
    assert run_serially(again, "shard")["shard"].name == expected.name
    assert unit_hashes(again, "shard") == hashes, "nothing of the other model was kept"


def test_rows_that_change_while_they_are_read(tmp_path: Path) -> None:
    config = tiny_pipeline(tmp_path, None)
    sources = hash_sources(config, tmp_path / "hashes.json")
    sources.require_data("train")
    sources.require_data("heldout")
    sources.require_model()
    write_jsonl(Path(config.data.heldout), [{"messages": []}])
    with pytest.raises(DataError, match=r"data\.heldout: .*heldout\.jsonl changed while the run read it"):
        sources.require_data("heldout")
    sources.require_data("train")


def test_a_file_more_or_less_is_a_change(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    (rows / "deeper").mkdir(parents=True)
    write_jsonl(rows / "a.jsonl", chat_rows(4))
    nested = write_jsonl(rows / "deeper" / "b.jsonl", chat_rows(4, offset=50))
    config = tiny_pipeline(tmp_path, None)
    config = with_changes(config, data={"train": str(rows)})
    sources = hash_sources(config, tmp_path / "hashes.json")
    assert nested in sources.data["train"][1], "what is read is what is hashed"
    sources.require_data("train")
    more = write_jsonl(rows / "c.jsonl", chat_rows(4, offset=90))
    with pytest.raises(DataError, match="changed while the run read it"):
        sources.require_data("train")
    more.unlink()
    sources.require_data("train")
    nested.unlink()
    with pytest.raises(DataError, match="changed while the run read it"):
        sources.require_data("train")


def test_another_nodes_copy_of_the_same_bytes_is_no_change(tmp_path: Path) -> None:
    config = tiny_pipeline(tmp_path, None)
    stamps = hash_sources(config, tmp_path / "hashes.json").model_stamps
    for file, *_ in stamps:
        os.utime(file, ns=(1, 1))
    require_stamps(stamps)
    overwrite(stamps[0][0], keep_time=False)
    with pytest.raises(ModelError, match="it changed while the model was read"):
        require_stamps(stamps)
    stamps[0][0].unlink()
    with pytest.raises(ModelError, match="it is there no more"):
        require_stamps(stamps)


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_training_refuses_rows_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    config = tiny_pipeline(tmp_path, None)
    run_serially(config, "shard", "decompose", "quantize")
    root = stage_units(config, "finetune").root
    rows = chat_rows(4, offset=900)

    def change() -> None:
        write_jsonl(Path(getattr(config.data, part)), rows)

    before_call(monkeypatch, cluster.data, "prepare_tokens", 1, change)
    with pytest.raises(DataError, match=rf"data\.{part}: .*{part}\.jsonl changed while the run read it"):
        run_serially(config, "finetune")
    assert not (root / "units" / f"{part}-tokens").exists()
    assert not (root / "units" / "adapter").exists()


@pytest.mark.parametrize("harm", ["missing", "truncated", "emptied", "no config"])
def test_a_model_directory_half_copied(tmp_path: Path, harm: str) -> None:
    source = make_model_dir(tmp_path, max_shard_size="9KB")
    files = sorted(source.glob("model-*.safetensors"))
    assert len(files) > 2
    half = tmp_path / "half"
    shutil.copytree(source, half)
    victim = half / files[1].name
    if harm == "missing":
        victim.unlink()
    elif harm == "no config":
        (half / "config.json").unlink()
    else:
        os.truncate(victim, 0 if harm == "emptied" else victim.stat().st_size - 100)
    config = tiny_pipeline(tmp_path, None, model={"source": str(half)}, data=make_data(tmp_path))
    named = r"config\.json" if harm == "no config" else victim.name.replace(".", r"\.")
    with pytest.raises((ModelError, CheckpointError), match=named) as caught:
        run_serially(config, "shard")
    assert exit_code(caught.value) in (2, 3)
    assert not list((tmp_path / "store").rglob("manifest.json"))
