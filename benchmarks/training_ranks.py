"""Training workers that a benchmark starts without Ray and asks for a few steps at a time, ours or the peer's.

Both sides run in processes of their own, so that neither leaves threads or memory behind in the other, and the
benchmark can let them take turns: the machine's drift then meets both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cluster.durable import peak_rss_bytes
from cluster.tokens import TokenTable
from cluster.train_job import Place, TrainJob
from cluster.train_loop import _Trainer, set_environment

_REST_S = 0.2


class Ranks:
    """The processes of one gloo group; `ask` sends all of them a command and returns their answers by rank."""

    def __init__(self, serve: Callable[..., None], world: int, *args: Any) -> None:
        """Args: serve: what a rank runs, given its connection, rank, world, the group's directory and `args`."""
        context = get_context("spawn")
        self._directory = TemporaryDirectory()
        self._connections, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, world, Path(self._directory.name), *args))
            process.start()
            theirs.close()  # so that the death of a rank ends our wait for its answer
            self._connections.append(ours)
            self._processes.append(process)
        self.ask("ready")

    def ask(self, *command: Any) -> list[Any]:
        """The answers to a command, by rank; after a pause, in which idle threads of the other side stop to spin."""
        time.sleep(_REST_S)
        for connection in self._connections:
            connection.send(command)
        return [connection.recv() for connection in self._connections]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(10)
            process.kill()
        self._directory.cleanup()


def _join(rank: int, world: int, directory: Path) -> None:
    set_environment(use_gpu=False)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=world)


class _Steps(_Trainer):
    """The training loop a few steps at a time, without its checkpoints: the peer writes none either."""

    def __init__(self, job: TrainJob, place: Place) -> None:
        super().__init__(job, place)
        self.lines: list[dict[str, Any]] = []
        self.held: dict[str, int] = {}

    def _forward_backward(self, batch: list[int], step: int) -> float:
        loss = super()._forward_backward(batch, step)
        if step:  # the moments are made at the first step
            self.held = held_bytes(self.built)
        return loss

    def _after_step(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def advance(self, count: int) -> float:
        """Seconds of the next `count` steps (fewer at the end)."""
        began = time.perf_counter()
        for _ in range(min(count, self.plan.total_steps - self.progress.step)):
            step = self.progress.step
            epoch = self.plan.epoch_of(step)
            self._one_step(self.plan.batches(epoch)[step % self.plan.steps_per_epoch], epoch)
        return time.perf_counter() - began

    def scores(self, tokens: Path, labels: tuple[str, ...]) -> dict[str, Any]:
        """Loss and accuracy over all rows of a token table, as `evaluate` takes them."""
        from cluster.evaluate import ScoreJob, score_with, summarise
        from cluster.train_engine import set_training

        set_training(self.built.model, False)
        rows = len(TokenTable.read(tokens))
        facts: dict[str, Any] = {"batch_size": 8, "labels": labels, "dtype": "float32", "exact_match": False}
        facts |= {"max_new_tokens": 0, "source": self.job.source, "variant": "adapter", "tokens": tokens}
        with torch.no_grad():
            return summarise(score_with(self.built.model, ScoreJob(start=0, stop=rows, **facts)), labels)

    def heldout_loss(self) -> float:
        """Mean NLL of the held-out answer tokens."""
        assert self.heldout is not None
        return self.mean_loss(self._eval_sequences(self.heldout), self.heldout)


def serve_ours(connection: Connection, rank: int, world: int, directory: Path, jobs: Mapping[str, TrainJob]) -> None:
    """One rank with an engine per job.

    Commands: advance NAME COUNT, lines NAME, heldout NAME, scores NAME TOKENS LABELS, held NAME, base NAME,
    parameters NAME, peak.
    """
    _join(rank, world, directory)
    place = Place(rank, world, directory, lambda line: None)
    trainers = {name: _Steps(job, place) for name, job in jobs.items()}
    answers: dict[str, Callable[..., Any]] = {
        "ready": lambda: True,
        "advance": lambda name, count: trainers[name].advance(count),
        "lines": lambda name: trainers[name].lines,
        "heldout": lambda name: trainers[name].heldout_loss(),
        "scores": lambda name, tokens, labels: trainers[name].scores(tokens, labels),
        "parameters": lambda name: sum(p.numel() for p in trainers[name].built.parameters.values()),
        "peak": peak_rss_bytes,
        "held": lambda name: trainers[name].held,
        "base": lambda name: base_bytes(trainers[name].built.model),
    }
    _answer(connection, answers)


def _answer(connection: Connection, answers: Mapping[str, Callable[..., Any]]) -> None:
    """Until the other end closes."""
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        connection.send(answers[name](*arguments))


def serve_peer(connection: Connection, rank: int, world: int, directory: Path, job: TrainJob, start: Path) -> None:
    """PEFT and transformers' `Trainer` on a job's rows, from the adapter in `start`, by the job's schedule.

    Commands: advance NAME COUNT, then heldout NAME; the names are for ours.
    """
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from cluster.batches import Plan, learning_rate
    from cluster.model import load_tokenizer

    del rank, world
    config, table = job.config, TokenTable.read(job.train_tokens)
    torch.set_num_threads(config.threads_per_worker)
    model = peer_model(job, start)
    steps = Plan(table.lengths, config, 0).total_steps

    class Turns(TrainerCallback):  # type: ignore[misc]
        """Trains only while it was asked to."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.left -= 1
            if not self.left or state.global_step == steps:
                connection.send(time.perf_counter() - self.began)
                if state.global_step < steps:
                    self.wait()

        def wait(self) -> None:
            _, _, self.left = connection.recv()
            self.began = time.perf_counter()

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1.0, betas=config.betas, weight_decay=0.0, fused=True
    )
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=config.global_batch_size,
        num_train_epochs=config.epochs,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[_example(table, row) for row in range(len(table))],
        data_collator=DataCollatorForSeq2Seq(load_tokenizer(job.source.shards), label_pad_token_id=-100),
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: learning_rate(min(step, steps - 1), steps, config))),
        callbacks=[Turns()],
    )
    assert connection.recv() == ("ready",)
    connection.send(True)
    trainer.train()
    _answer(connection, {"heldout": lambda name: _peer_heldout(model, job)})


def peer_model(job: TrainJob, start: Path) -> Any:
    """The same base under PEFT, with the adapter of `start`."""
    import peft

    from cluster.model import build_variant

    return peft.PeftModel.from_pretrained(build_variant(job.source, "dense", torch.float32), start, is_trainable=True)


def _example(table: Any, row: int) -> dict[str, Any]:
    ids = table.input_ids(row).tolist()
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": table.labels(row).tolist()}


def _peer_heldout(model: Any, job: TrainJob) -> float:
    assert job.heldout_tokens is not None
    model.eval()
    return mean_loss(model.get_base_model(), TokenTable.read(job.heldout_tokens).head(job.config.eval_rows))


def mean_loss(model: Any, table: Any, batch: int = 8) -> float:
    """Mean NLL of the scored tokens of a table, rows of similar length together."""
    from cluster.answer_loss import answer_nll
    from cluster.batches import collate

    rows = sorted(range(len(table)), key=table.lengths.__getitem__)
    with torch.no_grad():
        parts = [collate([[row] for row in rows[at : at + batch]], table) for at in range(0, len(rows), batch)]
        return sum(float(answer_nll(model, part)) for part in parts) / sum(table.num_answer_tokens)


def held_bytes(built: Any) -> dict[str, int]:
    """Bytes of the tensors that a rank holds for the trained parameters between backward and step, by what they are.

    `gradients`: of the parameters, ZeRO's partitions and its buckets. `optimizer`: its moments. `copies`: the flat fp32
    partition that ZeRO steps in place of the parameters.
    """
    zero = built.engine.optimizer
    inner = getattr(zero, "optimizer", zero)
    copies = [*getattr(zero, "single_partition_of_fp32_groups", []), *getattr(zero, "fp32_partitioned_groups_flat", [])]
    gradients = [parameter.grad for parameter in built.parameters.values()]
    gradients += [copy.grad for copy in copies]
    gradients += _tensors(getattr(zero, "averaged_gradients", {}))
    gradients += [getattr(zero, "grad_partitions_flat_buffer", None)]
    gradients += _tensors([bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()])
    moments = _tensors([dict(state) for state in inner.state.values()])
    return {"gradients": _bytes(gradients), "optimizer": _bytes(moments), "copies": _bytes(copies)}


def _tensors(found: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(found, Tensor):
        return [found]
    parts = list(found.values()) if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else []
    return [tensor for part in parts for tensor in _tensors(part)]


def _bytes(tensors: list[Tensor | None]) -> int:
    """Storage shared by several tensors counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def base_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the frozen tensors: of the adapted `linears`, and of the `rest` (embeddings, norms)."""
    from lowrank.inject import adapted_layers

    linears: list[Tensor | None] = []
    for _, layer in adapted_layers(model):
        linears += [*layer.base.parameters(), *layer.base.buffers()]
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return {"linears": _bytes(linears), "rest": _bytes([*frozen]) - _bytes(linears)}
