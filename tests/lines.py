"""Whole tiny lines for tests: a model directory, rows, a pipeline over them, and drivers to run and to kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny import make_tokenizer, tiny_model, write_jsonl

from cluster.durable import UnitStore
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig, parse, to_dict

#: Units of these stages are equal to the byte wherever and however often they were made.
EXACT = ("shard", "decompose", "quantize")
SEED = 3
#: Few targets, because each has several blocks and each block is several Ray tasks.
MLP = ["gate_proj", "up_proj", "down_proj"]
MAX_IN_FLIGHT = 2


def make_model_dir(root: Path, arch: str = "llama", *, dtype: Any = None, max_shard_size: str = "1GB") -> Path:
    """Save a tiny random model and its tokenizer as transformers does; a small `max_shard_size` makes many files."""
    directory = root / f"model-{arch}"
    model = tiny_model(arch, SEED)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    make_tokenizer(directory)
    return directory


def chat_rows(count: int, offset: int = 0) -> list[dict[str, Any]]:
    """Yes/no questions that a tiny model can learn to answer."""
    rows = []
    for index in range(offset, offset + count):
        messages = [
            {"role": "user", "content": f"{index} odd?"},
            {"role": "assistant", "content": "yes" if index % 2 else "no"},
        ]
        rows.append({"messages": messages})
    return rows


def make_data(root: Path, train: int = 24, heldout: int = 8) -> dict[str, Any]:
    """Write chat rows; the `data` section over them."""
    return {
        "train": str(write_jsonl(root / "train.jsonl", chat_rows(train))),
        "heldout": str(write_jsonl(root / "heldout.jsonl", chat_rows(heldout, offset=500))),
        "max_length": 64,
    }


def tiny_pipeline(root: Path, head: Any, arch: str = "llama", **sections: Mapping[str, Any] | str) -> PipelineConfig:
    """A pipeline of seconds on the session's Ray; `sections` are merged over its own, field by field.

    `block_bytes` cuts every target into three blocks or more, and `shard_bytes` every model into several files.
    """
    values: dict[str, Any] = {
        "name": "tiny",
        "shard": {"shard_bytes": 8192},
        "decompose": {"rank": 2, "block_bytes": 512, "options": {"oversampling": 2}, "target_modules": MLP},
        "finetune": {
            "adapter": {"lora_alpha": 4.0},
            "num_workers": 1,
            "cpus_per_worker": 0.5,
            "global_batch_size": 6,
            "micro_batch_size": 3,
            "epochs": 2,
            "checkpoint_every": 2,
            "learning_rate": 1e-2,
            "zero_stage": 1,
        },
        "evaluate": {"rows_per_unit": 4, "max_new_tokens": 2},
        "serve": {"enabled": False},
        "cluster": {"max_in_flight": MAX_IN_FLIGHT, "task_cpus": 2.0},
        "store": {"path": str(root / "store")},
    }
    if head is not None:
        values["cluster"] |= {"address": head.address, "token_file": head.token_file}
    if "model" not in sections:
        values["model"] = {"source": str(make_model_dir(root, arch))}
    if "data" not in sections:
        values["data"] = make_data(root)
    return parse(merged(values, sections))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second over the first."""
    result = dict(values)
    for name, value in changes.items():
        below = result.get(name)
        result[name] = merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result


def with_changes(config: PipelineConfig, **sections: Any) -> PipelineConfig:
    """The same pipeline with other settings."""
    return parse(merged(to_dict(config), sections))


def store_of(config: PipelineConfig) -> Store:
    return Store.of(config.store)


def stage_units(config: PipelineConfig, stage: str) -> UnitStore:
    """The units of a stage under the key that this pipeline gives it."""
    from pipelines.sources import hash_sources
    from pipelines.workflow import stage_keys

    store = store_of(config)
    return store.units(stage, stage_keys(config, hash_sources(config, store.root / "_hashes.json"))[stage])


def events(config: PipelineConfig, stage: str, event: str) -> Counter[str]:
    """How often each unit of a stage was started, committed, ..."""
    return Counter(line["unit"] for line in stage_units(config, stage).ledger() if line["event"] == event)


def unit_hashes(config: PipelineConfig, stage: str) -> dict[str, str]:
    """The hash of every unit of a finished stage; it covers the bytes of its files and its facts."""
    manifest = store_of(config).read_manifest(stage, stage_units(config, stage).root.name)
    assert manifest is not None, f"{stage} is not finished"
    return manifest.files


def ledger_lines(config: PipelineConfig) -> int:
    """Lines in all ledgers of a store."""
    return sum(len(file.read_text().splitlines()) for file in store_of(config).root.glob("_artifacts/*/*/ledger/*"))


def assert_nothing_done_twice(config: PipelineConfig, stage: str) -> int:
    """By the ledger: no unit starts after it was committed; returns how many units were started more than once."""
    committed: set[str] = set()
    started: Counter[str] = Counter()
    for line in stage_units(config, stage).ledger():
        if line["event"] == "start":
            assert line["unit"] not in committed, f"{stage}: {line['unit']} was started again after its commit"
            started[line["unit"]] += 1
        elif line["event"] == "commit":
            committed.add(line["unit"])
    return sum(count > 1 for count in started.values())


class Driver:
    """One `rankline run` or `resume` in a process of its own; `within` stands before its command line."""

    def __init__(
        self, config: PipelineConfig, *arguments: str, within: Sequence[str] = (), resume: bool = False
    ) -> None:
        path = store_of(config).root.parent / "pipeline.json"  # JSON is YAML
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["resume", config.name, "--store", config.store.path] if resume else ["run", str(path)]
        path.write_text(json.dumps(to_dict(config)))
        self.config = config
        self.log = path.with_name(f"driver-{time.time_ns()}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*within, sys.executable, "-m", "pipelines.cli", *command, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )

    def until(self, seen: Callable[[], bool], timeout_s: float = 240.0) -> None:
        """Wait for something that the driver leaves in its store."""
        deadline = time.monotonic() + timeout_s
        while not seen():
            assert self.process.poll() is None, f"the driver ended first:\n{self.text()}"
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"not seen in {timeout_s:g} s:\n{self.text()}")
            time.sleep(0.01 if store_of(self.config).mirror is None else 0.1)

    def logged(self, stage: str, event: str, unit: str = "") -> Callable[[], bool]:
        """Whether the ledger of a stage holds such a line that it does not hold yet."""
        store = store_of(self.config)
        root = store.root / "_artifacts" / stage

        def count() -> int:
            names = [path.name for path in root.iterdir()] if root.is_dir() else []
            if store.mirror is not None:
                names = list(store.mirror.names(root, directories=True))
            stores = [store.units(stage, name) for name in names]
            lines = [line for store in stores for line in store.ledger()]
            return sum(line["event"] == event and line["unit"].startswith(unit) for line in lines)

        before = count()
        return lambda: count() > before

    def kill(self) -> None:
        """SIGKILL, the driver alone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait(self, timeout_s: float = 200.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout_s)

    def text(self) -> str:
        return self.log.read_text()


def is_finished(config: PipelineConfig, stage: str) -> bool:
    """Whether a stage has its manifest."""
    return store_of(config).read_manifest(stage, stage_units(config, stage).root.name) is not None


class _Silent:
    """Progress that nobody sees."""

    def total(self, units: int, done: int = 0) -> None: ...

    def advance(self, units: int = 1, note: str = "", unit: str = "", facts: Callable[[], Any] = dict) -> None: ...


def run_serially(config: PipelineConfig, *stages: str) -> dict[str, Path]:
    """Run stages that need neither Ray nor MLflow in this process; the directory of each."""
    from pipelines.sources import hash_sources
    from pipelines.stages import STAGES
    from pipelines.stages.base import Context
    from pipelines.workflow import stage_keys

    store = store_of(config)
    sources = hash_sources(config, store.root / "_hashes.json")
    keys = stage_keys(config, sources)

    def runner(fn: Callable[[Any], Any], items: Any, *, on_done: Callable[[Any, Any], None], **_options: Any) -> None:
        for item in items:
            on_done(item, fn(item))

    for stage in (stage for stage in STAGES if stage.name in stages):
        context = Context(
            config=config,
            sources=sources,
            key=keys[stage.name],
            store=store.units(stage.name, keys[stage.name]),
            inputs={name: store.artifact(name, keys[name]) for name in stage.inputs},
            input_keys={name: keys[name] for name in stage.inputs},
            runner=runner,
            progress=_Silent(),
            tracker=None,  # type: ignore[arg-type]
            use_ray=False,
            mirror=store.mirror,
        )
        outcome = stage.run(context)
        inputs, settings = context.input_keys, stage.settings(config, sources)
        store.seal(stage.name, context.key, inputs, settings, outcome.units, outcome.facts, stage.format_version)
    return {name: store.artifact(name, keys[name]) for name in stages}
