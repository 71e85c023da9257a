"""Small fine-tunings for tests: jobs, what one plain PyTorch process makes of them, and a process group of one."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import interrupter, join_group
from tiny import make_tokens

from cluster.batches import Plan, collate, learning_rate
from cluster.config import FinetuneConfig
from cluster.metrics import read_metrics
from cluster.model import ModelSource, build_adapted
from cluster.tokens import TokenTable
from cluster.train_job import ADAPTER_UNIT, Place, TrainJob
from cluster.training_state import active_adapters, trained_parameters
from lowrank.adapters.peft_format import load_adapter
from lowrank.inject import adapted_layers
from lowrank.linear import dense_weight
from lowrank.optimizers.pairs import is_b
from lowrank.optimizers.registry import make_optimizer, rule_of

#: Losses and s·B·A may differ by this between layouts: the order of a few sums.
TOLERANCE = 1e-4


def make_token_tables(root: Path, source: ModelSource) -> None:
    """Training and held-out tokens of unequal lengths beside the model's directories, where `make_job` expects them."""
    tokenizer = source.shards / "units" / "meta"
    make_tokens(root / "train", tokenizer, 32)
    make_tokens(root / "heldout", tokenizer, 4, offset=50)


def make_job(source: ModelSource, root: Path, **changes: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "global_batch_size": 6,
        "micro_batch_size": 2,
        "epochs": 2,
        "checkpoint_every": 4,
        "learning_rate": 5e-3,
        "max_grad_norm": 0.5,
        "warmup_ratio": 0.2,
        "weight_decay": 0.01,
    }
    tokens = source.shards.parents[1]
    return TrainJob(
        source=source,
        config=FinetuneConfig(adapter=source.adapter, **(fields | changes)),
        train_tokens=tokens / "train" / "tokens.parquet",
        heldout_tokens=tokens / "heldout" / "tokens.parquet",
        root=root / "stage",
        storage=root / "ray",
        name="tiny",
    )


def reference(
    job: TrainJob, stepped: Callable[[int, dict[str, torch.nn.Parameter]], None] | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training by one plain PyTorch process: losses, and ΔW by module; `stepped` is called after each step."""
    config = job.config
    model = build_adapted(job.source, torch.float32, {"adapter": None})
    tokens = TokenTable.read(job.train_tokens)
    plan = Plan(tokens.lengths, config, 64)
    step_once = _plain_step(config, model, stepped)
    losses = []
    for step in range(plan.total_steps):
        batch = plan.batches(plan.epoch_of(step))[step % plan.steps_per_epoch]
        made = collate([[row] for row in batch], tokens)
        logits = model(input_ids=made.input_ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), made.labels[:, 1:].flatten())
        terms = [term for adapter in active_adapters(model).values() if (term := adapter.penalty()) is not None]
        (loss + sum(terms)).backward()
        step_once(step, learning_rate(step, plan.total_steps, config))
        losses.append(float(loss))
    return losses, deltas_of(model)


def _plain_step(
    config: FinetuneConfig, model: Any, stepped: Callable[[int, dict[str, torch.nn.Parameter]], None] | None
) -> Callable[[int, float], None]:
    """Clip, redirect, and step torch's own optimizer over whole parameters."""
    parameters = trained_parameters(model)
    rule = make_optimizer(config.optimizer, config.optimizer_options, config.betas)
    redirection = rule_of(rule, parameters)
    groups = [
        {"params": [parameter], "ratio": rule.lr_ratio_b if is_b(name) else 1.0}
        for name, parameter in parameters.items()
    ]
    plain: torch.optim.Optimizer
    if rule.plain == "AdamW":
        plain = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
    else:
        plain = torch.optim.SGD(groups, weight_decay=config.weight_decay)

    def step_once(step: int, rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        if redirection is not None:
            values = {name: parameter.detach() for name, parameter in parameters.items()}
            gradients = {name: parameter.grad for name, parameter in parameters.items()}
            for name, direction in redirection.directions(values, gradients, step, rate).items():  # type: ignore[arg-type]
                parameters[name].grad = direction
        for group in plain.param_groups:
            group["lr"] = rate * group["ratio"]
        plain.step()
        if stepped is not None:
            stepped(step, parameters)
        plain.zero_grad()

    return step_once


def deltas_of(model: Any) -> dict[str, torch.Tensor]:
    weights = {name: dense_weight(layer.base) for name, layer in adapted_layers(model)}
    return {name: adapter.delta_weight(weights[name]).detach() for name, adapter in active_adapters(model).items()}


def losses_of(job: TrainJob) -> list[float]:
    return [line["loss"] for line in read_metrics(job.root)]


def assert_same_training(job: TrainJob, losses: list[float], deltas: dict[str, torch.Tensor] | None = None) -> None:
    assert losses_of(job) == pytest.approx(losses, abs=TOLERANCE)
    if deltas is not None:
        adapters = load_adapter(job.store.path(ADAPTER_UNIT))
        assert set(adapters) == set(deltas)
        for module, adapter in adapters.items():
            torch.testing.assert_close(adapter.delta_weight(), deltas[module], atol=TOLERANCE, rtol=0)


@contextlib.contextmanager
def only_rank(directory: Path) -> Iterator[Callable[..., None]]:
    """What runs a job in this process, as the only rank; `stop_after` interrupts it at that step's checkpoint."""
    from cluster.train_loop import run_worker, set_environment

    set_environment(use_gpu=False)
    import deepspeed.comm
    from deepspeed.utils import groups

    # DeepSpeed remembers groups, which the next process group of this process does not know.
    remembered = {name: copy.copy(value) for name, value in vars(groups).items() if _is_state(name, value)}
    join_group(0, 1, directory)

    def run(job: TrainJob, stop_after: int | None = None, launch: Path = directory) -> None:
        run_worker(job, Place(0, 1, launch, interrupter(stop_after)))

    try:
        yield run
    finally:
        torch.distributed.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        vars(groups).update(remembered)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)


def _is_state(name: str, value: Any) -> bool:
    return not name.startswith("__") and (value is None or isinstance(value, dict | list))
