"""Training workers without Ray: processes of one gloo group, in a module that a spawned process can import."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.train_job import Place, TrainJob


class Interrupted(Exception):
    """Raised by a test at a checkpoint, on every rank."""


def run_rank(rank: int, world: int, directory: str, jobs: list[tuple[TrainJob, int | None]]) -> None:
    from cluster.train_loop import run_worker, set_environment

    set_environment(use_gpu=False)
    torch.set_num_threads(1)
    join_group(rank, world, Path(directory))
    for job, stop_after in jobs:
        place = Place(rank, world, Path(directory), interrupter(stop_after), local_world=world)
        try:
            run_worker(job, place)
        except Interrupted:
            assert stop_after is not None


def join_group(rank: int, world: int, directory: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=world)


def interrupter(stop_after: int | None) -> Callable[[dict[str, Any]], None]:
    def report(metrics: dict[str, Any]) -> None:
        if stop_after is not None and metrics["step"] >= stop_after:
            raise Interrupted

    return report


def run_processes(world: int, directory: Path, jobs: list[tuple[TrainJob, int | None]]) -> None:
    """Run jobs one after another in `world` processes; (job, step) stops at the checkpoint of that step."""
    import torch.multiprocessing as mp

    directory.mkdir(parents=True)
    mp.spawn(run_rank, args=(world, str(directory), jobs), nprocs=world)
