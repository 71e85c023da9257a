"""What every training worker runs: the loop over optimizer steps, and the durable checkpoints between them.

Ray Train only starts and replaces workers. Where to go on is read from the stage's own UnitStore by every new group of
workers, so that a group of another size, or one of another launch, resumes just the same.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.answer_loss import answer_nll
from cluster.batches import MicroBatch, Plan, collate, derived_seed, learning_rate, micro_batches
from cluster.errors import TrainError
from cluster.metrics import MetricLog
from cluster.noticeboard import Noticeboard
from cluster.tokens import TokenTable
from cluster.train_engine import Ranks, build_engine, set_training
from cluster.train_job import ADAPTER_UNIT, STOP_FILE, Place, TrainJob, checkpoint_unit
from cluster.training_state import Progress, load_tensors, newest_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

#: Rows of the fixed batch whose loss must survive saving and loading the adapter.
PROBE_ROWS = 4
#: How often an object store is asked whether training shall stop, in seconds.
_LOOK_S = 5.0


def run_worker(job: TrainJob, place: Place) -> None:
    """Train, or go on training, until the adapter is committed. Every rank runs this.

    Raises:
        TrainError: the loss is no longer finite, or the saved adapter is not what was trained.
    """
    if job.store.is_committed(ADAPTER_UNIT):
        return
    from cluster.train_finish import commit_adapter

    trainer = _Trainer(job, place)
    trainer.run()
    outcome = trainer.outcome()
    probe = trainer.probe_sequences
    trainer.close()
    if place.rank == 0:
        commit_adapter(job, outcome, probe)


class _Trainer:
    """One rank's engine, data and progress."""

    def __init__(self, job: TrainJob, place: Place) -> None:
        self.job, self.place, self.config = job, place, job.config
        job.bring()
        self.tokens = TokenTable.read(job.train_tokens)
        self.heldout = None if job.heldout_tokens is None else TokenTable.read(job.heldout_tokens)
        if self.heldout is not None:
            self.heldout = self.heldout.head(self.config.eval_rows)
        max_length = int(self.tokens.facts.get("max_length", max(self.tokens.lengths)))
        self.plan = Plan(self.tokens.lengths, self.config, max_length)
        self.ranks = Ranks(place.rank, place.world)
        self.reported_at = -math.inf
        self.log = MetricLog(job.root, job.store if job.mirror else None) if place.rank == 0 else None
        self._looked = time.monotonic()
        self.progress = self._newest()
        state = load_tensors(job.store, self.progress.step) if self.progress.step else None
        self.built = build_engine(job, place, self.plan.total_steps, state, self.progress.step)

    def _newest(self) -> Progress:
        """Where to go on, as rank 0 found it: it alone may discard a damaged checkpoint."""
        found = newest_checkpoint(self.job.store) if self.place.rank == 0 else None
        facts = self.ranks.broadcast(None if found is None else asdict(found))
        if self.log is not None:
            self.log.resume(found.step if found else 0)
        return Progress(**(facts or {}))

    def run(self) -> None:
        """All remaining steps."""
        self._log_interval()
        batches: tuple[int, list[list[int]]] = (-1, [])
        while self.progress.step < self.plan.total_steps and not self._out_of_patience():
            epoch = self.plan.epoch_of(self.progress.step)
            if batches[0] != epoch:
                batches = (epoch, self.plan.batches(epoch))
            self._one_step(batches[1][self.progress.step % self.plan.steps_per_epoch], epoch)

    def _one_step(self, batch: list[int], epoch: int) -> None:
        started = time.perf_counter()
        step = self.progress.step
        rate = learning_rate(step, self.plan.total_steps, self.config)
        loss = self._forward_backward(batch, step)
        if not math.isfinite(loss):
            raise TrainError(
                f"finetune {self.job.name}: the loss of step {step + 1} is {loss}; it must be finite. Lower "
                f"finetune.learning_rate (now {self.config.learning_rate}) or set finetune.max_grad_norm, and look for "
                "rows of nonsense; the last checkpoint is kept."
            )
        facts = self.built.step(step, rate)
        self._advance(loss, epoch)
        seconds = time.perf_counter() - started
        tokens = sum(self.tokens.lengths[row] for row in batch)
        line = {"step": self.progress.step, "epoch": epoch, "loss": loss, "lr": rate, **facts}
        line |= {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
        self._after_step(line)

    def _advance(self, loss: float, epoch: int) -> None:
        self.progress.step += 1
        self.progress.epoch = epoch + 1
        self.progress.last_loss = loss
        if self.progress.first_loss is None:
            self.progress.first_loss = loss

    def _after_step(self, line: dict[str, Any]) -> None:
        step, every = self.progress.step, self.config.eval_every
        last = step == self.plan.total_steps
        improved = False
        if self.heldout is not None and (last or (every is not None and step % every == 0)):
            improved = self.progress.evaluated(self.mean_loss(self._eval_sequences(self.heldout), self.heldout))
            line["heldout_loss"] = self.progress.heldout_loss
        if self.log is not None:
            self.log.write(line)
        stops = last or self._out_of_patience()
        if stops or step % self.config.checkpoint_every == 0 or (improved and self.config.keep == "best"):
            self._checkpoint(line)
            if not stops:
                self._log_interval()

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.progress.bad_evals >= self.config.patience

    def _forward_backward(self, batch: list[int], step: int) -> float:
        """Accumulate the gradient of the global batch; its loss.

        DeepSpeed averages over ranks, so that every share is scaled by ranks over answer tokens of the whole batch:
        the result is the mean over all answer tokens, however they fell to ranks and micro-batches. A penalty of the
        adapter's is added once per batch; the loss that is told leaves it out.
        """
        import torch

        shares = micro_batches(
            self.plan.sequences(batch), self.place.rank, self.place.world, self.config.micro_batch_size
        )
        total = sum(self.tokens.num_answer_tokens[row] for row in batch)
        nll: Tensor | float = 0.0
        set_training(self.built.model, True)
        for index, share in enumerate(shares):
            # Dropout follows the rows, so that it is the same for every number of workers that cuts them alike.
            torch.manual_seed(derived_seed("dropout", self.config.seed, step, share))
            part = answer_nll(self.built.engine, collate(share, self.tokens), self.built.device)
            last = index == len(shares) - 1
            loss = part * (self.place.world / total)
            penalty = self.built.penalty() if last else None
            self.built.backward(loss if penalty is None else loss + penalty, last=last)
            nll = nll + part.detach()
        total_nll, wishes = self.ranks.sum(float(nll), float(self._told_to_stop()))
        if wishes:
            raise TrainError(f"finetune {self.job.name}: stopped by its driver at step {step}. Resume to go on.")
        return total_nll / total

    def _told_to_stop(self) -> bool:
        """Whether the driver wants an end; the object store is asked by rank 0, and not at every step."""
        if (self.place.launch / STOP_FILE).exists():
            return True
        if self.job.mirror is None or self.place.rank or time.monotonic() - self._looked < _LOOK_S:
            return False
        self._looked = time.monotonic()
        return Noticeboard(self.place.launch, self.job.mirror).has(STOP_FILE)

    def _eval_sequences(self, table: TokenTable) -> MicroBatch:
        return [[row] for row in sorted(range(len(table)), key=lambda row: (table.lengths[row], row))]

    def mean_loss(self, sequences: MicroBatch, table: TokenTable) -> float:
        """Mean NLL of the answer tokens of `sequences`, over all ranks."""
        import torch

        set_training(self.built.model, False)
        nll = 0.0
        with torch.no_grad():
            for share in micro_batches(sequences, self.place.rank, self.place.world, self.config.micro_batch_size):
                nll += float(answer_nll(self.built.engine, collate(share, table), self.built.device))
        total = sum(table.num_answer_tokens[row] for rows in sequences for row in rows)
        return self.ranks.sum(nll)[0] / total

    @property
    def probe_sequences(self) -> MicroBatch:
        """The fixed batch of the round trip through the adapter's files."""
        table = self.heldout or self.tokens
        return [[row] for row in range(min(PROBE_ROWS, len(table)))]

    def _checkpoint(self, line: dict[str, Any]) -> None:
        self.progress.probe_loss = self.mean_loss(self.probe_sequences, self.heldout or self.tokens)
        tensors = self.built.state()
        if self.log is not None:
            self.log.publish()
        if self.place.rank == 0:
            save_checkpoint(self.job.store, tensors, self.progress)
        # Rank 0's clock decides for all (this also is the barrier): a report that one rank misses hangs the others.
        late = time.monotonic() - self.reported_at >= self.place.report_every_s
        if self.ranks.max(float(late and self.place.rank == 0)):
            self.reported_at = time.monotonic()
            self.place.report({name: value for name, value in line.items() if value is not None})

    def _log_interval(self) -> None:
        """Every rank notes that it works on the interval up to the next checkpoint."""
        every = self.config.checkpoint_every
        end = min((self.progress.step // every + 1) * every, self.plan.total_steps)
        place = {"rank": self.place.rank, "world": self.place.world}
        self.job.store.log("rank", checkpoint_unit(end), **place, cpu_seconds=time.process_time())

    def outcome(self) -> dict[str, Any]:
        """What the driver is told beside the adapter's own facts."""
        from cluster.durable import peak_rss_bytes

        return {
            "world_size": self.place.world,
            "peak_rss_bytes": int(self.ranks.max(float(peak_rss_bytes()))),
            "zero_stage": self.built.stage,
            "dtype": self.built.dtype,
            "progress": asdict(self.progress),
        }

    def close(self) -> None:
        """Drop the engine, so that the check of the saved adapter does not need room for two bases."""
        import gc

        self.ranks.barrier()
        with contextlib.suppress(Exception):
            self.built.engine.destroy()
        del self.built
        gc.collect()


def set_environment(use_gpu: bool) -> None:
    """What torch and DeepSpeed read while they are imported; before either is."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed")
