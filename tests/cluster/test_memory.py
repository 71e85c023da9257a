"""A worker that runs out of memory: once more with less, then an error that says so."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lines import tiny_pipeline
from tiny import make_tiny
from training import assert_same_training, make_job, make_token_tables, reference

import cluster.train_loop
import cluster.trainer
from cluster.durable import write_json
from cluster.errors import OutOfMemoryError
from cluster.failures import is_out_of_memory
from cluster.train_job import TrainJob
from pipelines.errors import exit_code
from pipelines.estimates import memory_advice
from pipelines.session import unit_runner
from pipelines.sources import hash_sources


def hungry_unit(directory: Path, never: bool) -> Callable[[int], None]:
    """A unit that fits alone, but not beside another one; or never. Pickled by value: workers know no tests."""

    def unit(_: int) -> None:
        before = resource.getrlimit(resource.RLIMIT_AS)
        mine = directory / f"{os.getpid()}-{time.time_ns()}"
        mine.touch()
        try:
            time.sleep(0.5)
            if never or len(list(directory.iterdir())) > 1:
                resource.setrlimit(resource.RLIMIT_AS, (2**36, before[1]))
                bytearray(2**40)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            mine.unlink()

    return unit


def run_units_of(tmp_path: Path, head: Any, unit: Callable[[int], None], in_flight: int) -> tuple[list[int], list[str]]:
    config = tiny_pipeline(tmp_path, head, cluster={"max_in_flight": in_flight})
    done, said = list[int](), list[str]()
    unit_runner(
        config, lambda: False, said.append, unit, [0, 1, 2], num_cpus=0.5, on_done=lambda item, _: done.append(item)
    )
    return sorted(done), said


@pytest.mark.filterwarnings("ignore")
def test_units_that_do_not_fit_together_run_one_at_a_time(ray_head: Any, tmp_path: Path) -> None:
    busy = tmp_path / "busy"
    busy.mkdir()
    done, said = run_units_of(tmp_path, ray_head, hungry_unit(busy, False), 3)
    assert done == [0, 1, 2]
    assert len(said) == 1
    assert re.match(r"out of memory with 3 units in flight; the other \d go one at a time", said[0])
    for in_flight in (2, 1):
        with pytest.raises(OutOfMemoryError, match="a unit ran out of memory alone") as caught:
            run_units_of(tmp_path, ray_head, hungry_unit(busy, True), in_flight)
        assert exit_code(caught.value) == 2


def test_what_counts_as_too_little_memory() -> None:
    texts = [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate",
        "Task was killed due to the node running low on memory.",
        "[Errno 12] Cannot allocate memory",
    ]
    assert all(is_out_of_memory(RuntimeError(text)) for text in texts)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


def test_the_advice_names_what_to_change(tmp_path: Path) -> None:
    config = tiny_pipeline(tmp_path, None)
    sources = hash_sources(config, tmp_path / "hashes.json")
    text = memory_advice(config, sources, "finetune")
    assert "estimated at 1." in text
    assert "finetune.micro_batch_size" in text
    assert "use nodes with more memory" in memory_advice(config, sources, "quantize")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fitting", [1, 0])
def test_training_goes_on_with_smaller_micro_batches(
    tmp_path: Path, alone: Callable[..., None], monkeypatch: pytest.MonkeyPatch, fitting: int
) -> None:
    source = make_tiny(tmp_path / "base" / "model")
    make_token_tables(source.shards.parents[1], source)
    job = make_job(source, tmp_path, micro_batch_size=2, num_workers=1, zero_stage=0)
    plain, steps, said, curable = cluster.train_loop.answer_nll, [0], list[str](), list[bool]()

    def hungry(engine: Any, batch: Any, device: Any) -> Any:
        steps[0] += 1
        if steps[0] > 20 and len(batch.input_ids) > fitting:
            torch.empty(2**60)
        return plain(engine, batch, device)

    monkeypatch.setattr(cluster.train_loop, "answer_nll", hungry)
    monkeypatch.setattr(cluster.trainer, "present", lambda: False)
    monkeypatch.setattr(cluster.trainer, "living", lambda: {"here": {"CPU": 8.0}})

    def make_trainer(job: TrainJob, launch: str, directory: Path) -> Any:
        """The worker in this process, where its allocation can be made to fail; so Ray is not asked for its CPUs."""

        def fit() -> None:
            try:
                alone(job, launch=directory)
            except RuntimeError as error:
                curable.append(cluster.trainer._may_be_cured(error))
                write_json(directory / "failure-0.json", cluster.trainer._describe(error))

        return SimpleNamespace(fit=fit)

    monkeypatch.setattr(cluster.trainer, "_make_trainer", make_trainer)
    if fitting:
        cluster.trainer.train(job, on_progress=lambda _: None, say=said.append)
        assert_same_training(job, *reference(job))
    else:
        with pytest.raises(OutOfMemoryError, match=r"micro-batches of 1 rows \(.*can't allocate memory"):
            cluster.trainer.train(job, on_progress=lambda _: None, say=said.append)
    assert not any(curable)
    assert len(curable) == 2 - fitting
    assert len(said) == 1
    assert "It goes on with micro-batches of 1 rows instead of 2" in said[0]
