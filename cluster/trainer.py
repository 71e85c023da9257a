"""The driver's side of fine-tuning: start the workers under Ray Train, follow them, and say what came of it.

Ray Train places workers and replaces lost ones. It is given a fresh name at every launch and never asked to restore
anything: `train_loop` finds its own checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.autoscaling import present
from cluster.connection import living
from cluster.errors import (
    ClusterError,
    DamagedError,
    DataError,
    JobError,
    ModelError,
    OutOfMemoryError,
    StorageError,
    TrainError,
)
from cluster.failures import is_out_of_memory
from cluster.metrics import Follower, read_metrics, steps_redone
from cluster.noticeboard import Noticeboard
from cluster.placement import fits, refuse_unfit
from cluster.train_job import ADAPTER_UNIT, METRICS_FILE, OUTCOME_FILE, STOP_FILE, Place, TrainJob, TrainOutcome
from cluster.watch import head_answers
from cluster.zero import check_optimizer, zero_stage

__all__ = ["TrainJob", "TrainOutcome", "train"]

#: Of the thread that asks Ray Train; while it lives, Ray must not be shut down.
TRAIN_THREAD = "rankline-train"
#: How long workers that were told to stop are waited for, in seconds.
_STOP_S = 15.0
#: What the names of notes about failures begin with.
_FAILURE = "failure-"
_POLL_S = 0.5
#: Between two looks at the cluster's nodes, in seconds.
_LOOK_S = 2.0
#: How often Ray Train's controller looks at its workers.
_RAY_POLL_S = 2.0
#: Raised anew under the same name by the driver; anything else becomes a TrainError.
_KNOWN: dict[str, type[ClusterError]] = {
    kind.__name__: kind for kind in (DamagedError, DataError, ModelError, StorageError, TrainError)
}


def train(
    job: TrainJob, *, on_progress: Callable[[dict[str, Any]], None], say: Callable[[str], None] = lambda _: None
) -> TrainOutcome:
    """Fine-tune, resuming from the newest checkpoint in `job.root`; return at once where the adapter is there.

    A worker that runs out of memory is given micro-batches of half the rows, once; without dropout the losses are
    the same.

    Args:
        job: What to train; the process must have joined the Ray cluster.
        on_progress: Called in this thread for every optimizer step: step, epoch, loss, lr, grad_norm, seconds, tokens,
            tokens_per_second, and heldout_loss where it was evaluated. After a lost worker, steps come again.
        say: Told what was made smaller.

    Raises:
        TrainError: workers were lost more than `max_failures` times, the loss is no longer finite, or the saved
            adapter is not what was trained.
        ResourceError: the cluster is too small for `num_workers`.
        OutOfMemoryError: a worker ran out of memory twice, or with one row at a time.
    """
    zero_stage(job.config, job.source.base, job.use_gpu)
    check_optimizer(job.config)
    if not job.store.is_committed(ADAPTER_UNIT):
        try:
            _fit(job, on_progress)
        except OutOfMemoryError as error:
            rows = job.config.micro_batch_size
            if rows == 1:
                raise
            say(f"{error} It goes on with micro-batches of {rows // 2} rows instead of {rows}.")
            job = replace(job, config=replace(job.config, micro_batch_size=rows // 2))
            _fit(job, on_progress)
    return _outcome(job)


class _Nodes:
    """Looks now and then whether the living nodes hold the workers; Ray Train would wait for them for ever."""

    def __init__(self, job: TrainJob) -> None:
        self._job = job
        self._held = self._looked = time.monotonic()

    def look(self) -> None:
        """Raises JobError when they have not for too long."""
        now, job = time.monotonic(), self._job
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        if not head_answers():  # who watches the cluster will tell
            return
        nodes = list(living().values())
        if fits(nodes, job.wanted, job.config.num_workers, job.config.placement):
            self._held = now
        elif now - self._held > job.node_wait_s:
            raise JobError(
                f"finetune {job.name}: nodes were lost, and the {len(nodes)} left have not held "
                f"{job.config.num_workers} workers for {job.node_wait_s:g} s (cluster.node_wait_s). Add nodes or "
                "lower finetune.num_workers, then resume; the last checkpoint is kept."
            )


def _fit(job: TrainJob, on_progress: Callable[[dict[str, Any]], None]) -> None:
    if not present():
        refuse_unfit(list(living().values()), job.wanted, job.config.num_workers, job.config.placement)
    nodes = _Nodes(job)
    launch = f"{job.name}-{uuid.uuid4().hex[:8]}"
    directory = job.storage / "launches" / launch
    directory.mkdir(parents=True)
    follower = Follower.at_end(job.root, job.mirror)
    box: list[BaseException] = []
    thread = threading.Thread(target=_run_trainer, args=(job, launch, directory, box), name=TRAIN_THREAD, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_S)
            for line in follower.new_lines():
                on_progress(line)
            nodes.look()
    except BaseException as error:
        # Ctrl-C, or the caller's own error: the workers look for this file between steps.
        with contextlib.suppress(StorageError):
            Noticeboard(directory, job.mirror).post(STOP_FILE, {})
        if not isinstance(error, KeyboardInterrupt):
            thread.join(_STOP_S)
        raise
    _raise_failure(job, directory, box)


def _run_trainer(job: TrainJob, launch: str, directory: Path, box: list[BaseException]) -> None:
    try:
        _make_trainer(job, launch, directory).fit()
    except BaseException as error:
        box.append(error)


def _make_trainer(job: TrainJob, launch: str, directory: Path) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = job.config
    backend = config.backend if config.backend != "auto" else ("nccl" if job.use_gpu else "gloo")
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job, "directory": directory},
        torch_config=TorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=job.use_gpu,
            resources_per_worker=job.wanted,
            placement_strategy=config.placement.upper(),
        ),
        run_config=RunConfig(
            name=launch,
            **_storage(job),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def _storage(job: TrainJob) -> dict[str, Any]:
    """Where Ray Train keeps its own state."""
    if job.mirror is None:
        return {"storage_path": str(job.storage)}
    return {"storage_path": job.mirror.key(job.storage), "storage_filesystem": job.mirror.filesystem}


def _worker(arguments: dict[str, Any]) -> None:
    """Body of a Train worker: run, and leave behind an error that no retry can cure."""
    import ray.train

    from cluster.train_loop import run_worker, set_environment

    job, directory = arguments["job"], arguments["directory"]
    board = Noticeboard(directory, job.mirror)
    if board.notes(_FAILURE) or board.has(STOP_FILE):
        return
    set_environment(job.use_gpu)
    # Ray Train tells every report of every rank; ours are in metrics.jsonl.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    place = Place(rank, world, directory, ray.train.report, context.get_local_world_size(), 2 * _RAY_POLL_S)
    try:
        run_worker(job, place)
    except Exception as error:
        if not _may_be_cured(error):
            board.post(f"{_FAILURE}{place.rank}.json", _describe(error))
        raise


def _may_be_cured(error: Exception) -> bool:
    """Whether new workers might succeed.

    A lost peer shows up as a RuntimeError of the collective, or an OSError; a worker whose own node is cut off finds
    Ray's actors unavailable.
    """
    from ray.exceptions import RayError

    if is_out_of_memory(error):
        return False
    lost = isinstance(error, RuntimeError | OSError | RayError)
    return lost and not isinstance(error, NotImplementedError | RecursionError)


def _describe(error: Exception) -> dict[str, Any]:
    trace = "".join(traceback.format_exception(error))
    facts = {"type": type(error).__name__, "message": str(error), "traceback": trace}
    return facts | {"out_of_memory": is_out_of_memory(error)}


def _raise_failure(job: TrainJob, directory: Path, box: list[BaseException]) -> None:
    for failure in Noticeboard(directory, job.mirror).notes(_FAILURE):
        if failure["out_of_memory"]:
            raise OutOfMemoryError(_no_memory(job, failure["message"]))
        kind = _KNOWN.get(failure["type"])
        if kind is not None:
            raise kind(failure["message"])
        raise TrainError(
            f"finetune {job.name}: a worker failed with {failure['type']}: {failure['message']}. No retry can cure "
            f"this; its traceback is in {directory}."
        )
    if box and is_out_of_memory(box[0]):
        raise OutOfMemoryError(_no_memory(job, _last_line(box[0]))) from box[0]
    if box:
        raise TrainError(
            f"finetune {job.name}: its workers were lost more than finetune.max_failures = {job.config.max_failures} "
            f"times; the last error was: {_last_line(box[0])}. Look at the nodes (memory, disk), then resume; the last "
            "checkpoint is kept."
        ) from box[0]
    if not job.store.is_committed(ADAPTER_UNIT):
        raise TrainError(f"finetune {job.name}: the workers ended without an adapter. Resume; checkpoints are kept.")


def _no_memory(job: TrainJob, text: str) -> str:
    first = (text.strip().splitlines() or [""])[0].rstrip(".")[:200]
    return f"a worker ran out of memory with micro-batches of {job.config.micro_batch_size} rows ({first})."


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _outcome(job: TrainJob) -> TrainOutcome:
    facts = job.store.read(ADAPTER_UNIT).facts
    run = json.loads(job.store.obtain(OUTCOME_FILE).read_text())
    job.store.obtain(METRICS_FILE)
    lines = read_metrics(job.root)
    progress = run["progress"]
    names = ("first_loss", "last_loss", "heldout_loss", "best_loss")
    metrics = {name: float(progress[name]) for name in names if progress[name] is not None}
    metrics |= {name: float(facts[name]) for name in ("probe_loss", "reloaded_probe_loss")}
    return TrainOutcome(
        path=job.store.fetch(ADAPTER_UNIT),
        config=job.config,
        global_step=int(facts["global_step"]),
        epoch=int(facts["epoch"]),
        metrics=metrics,
        world_size=int(run["world_size"]),
        seconds=sum(float(line["seconds"]) for line in lines),
        peak_rss_bytes=int(run["peak_rss_bytes"]),
        steps_redone=steps_redone(job.root),
        zero_stage=int(run["zero_stage"]),
        dtype=str(run["dtype"]),
        tokens_per_second=statistics.median([float(line["tokens_per_second"]) for line in lines] or [0.0]),
    )
