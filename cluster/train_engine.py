"""The DeepSpeed engine of one rank, and the few collectives that the loop needs beside it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.family_hooks import hooks_of
from cluster.training_state import MOMENTS, active_adapters, gather, host, restore, trained_parameters
from cluster.whole_gradients import GradientRule, WholeGradients
from cluster.zero import PERSISTENT, deepspeed_config, effective_stage, zero_stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cluster.config import FinetuneConfig
    from cluster.train_job import TrainJob
    from lowrank.optimizers.base import Optimizer


#: Key of a parameter group: its learning rate over that of the schedule.
_RATIO = "lr_ratio"


@dataclass(frozen=True)
class Ranks:
    """Sums, maxima and messages over all ranks, on the host."""

    rank: int
    world: int

    def sum(self, *values: float) -> list[float]:
        """The sums of some numbers per rank, in float64."""
        return self._reduce(values, "SUM")

    def max(self, value: float) -> float:
        """The largest of one number per rank."""
        return self._reduce((value,), "MAX")[0]

    def _reduce(self, values: Sequence[float], kind: str) -> list[float]:
        import torch
        import torch.distributed as dist

        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, kind))
        return [float(value) for value in tensor]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=_collective_device())
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(0.0)


def _collective_device() -> Any:
    import torch
    import torch.distributed as dist

    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@dataclass
class Built:
    """An engine and what it trains."""

    engine: Any
    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    stage: int
    dtype: str
    device: str
    optimizer: Optimizer
    whole: WholeGradients | None
    """What changes gradients between backward and step, if anything does; it then clips them too."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient; `last` closes the global batch."""
        # Set by hand: the number of micro-batches differs between full, last and packed batches.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, step: int, rate: float) -> dict[str, float | None]:
        """The optimizer step after `step` others at this learning rate; facts for the step's line of metrics.

        `grad_norm` is the gradient's norm before clipping.
        """
        facts: dict[str, float | None] = {"grad_norm": None if self.stage else self._norm()}
        if self.whole is not None:
            facts |= self.whole.redirect(self.engine, step, rate)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group[_RATIO]
        self.engine.step()
        if self.whole is not None:
            self.whole.stepped(self.engine, step)
        if facts["grad_norm"] is None:
            norm = self.engine.get_global_grad_norm()
            facts["grad_norm"] = None if norm is None else float(norm)
        return facts

    def penalty(self) -> Tensor | None:
        """The sum of the active adapters' penalties, or None where no family has one."""
        found = [adapter.penalty() for adapter in active_adapters(self.model).values()]
        terms = [term for term in found if term is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: whole parameters and moments, on the host. All ranks must call it."""
        tensors = gather(self.engine, self.parameters, MOMENTS[self.optimizer.plain])
        if self.whole is not None:
            tensors |= {name: host(tensor) for name, tensor in self.whole.state().items()}
        return tensors

    def _norm(self) -> float | None:
        """ZeRO-0 leaves whole, already averaged gradients in the parameters, and does not tell their norm."""
        import torch

        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else None


def build_engine(
    job: TrainJob, world: int, total_steps: int, state: Mapping[str, Tensor] | None = None, step: int = 0
) -> Built:
    """Load the base and the adapter and hand them to DeepSpeed.

    Args:
        job: Base, adapter, configuration.
        world: Ranks.
        total_steps: Optimizer steps of the whole training.
        state: Tensors of the checkpoint to go on from; None starts anew.
        step: Optimizer steps behind that checkpoint.
    """
    import torch

    from cluster.model import build_adapted, compute_dtype
    from lowrank.optimizers.registry import make_optimizer

    config = job.config
    device = "cuda" if job.use_gpu else "cpu"
    if not job.use_gpu:
        torch.set_num_threads(config.threads_per_worker)
    dtype = compute_dtype(config.compute_dtype, device)
    model = build_adapted(job.source, dtype, {"adapter": None})
    parameters = trained_parameters(model)
    for parameter in parameters.values():
        # DeepSpeed sends parameters as bytes, which transposed ones (PiSSA's) cannot be read as.
        parameter.data = parameter.data.contiguous()
    if state is not None:
        # Before DeepSpeed copies them into its partitions; setting these afterwards would leave the parameters behind.
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])
    name = str(dtype).removeprefix("torch.")
    stage = effective_stage(zero_stage(config, job.source.base, job.use_gpu), name)
    _checkpoint_activations(model, config.gradient_checkpointing)
    optimizer = make_optimizer(config.optimizer, config.optimizer_options, config.betas)
    whole = _whole_gradients(config, optimizer, parameters, total_steps)
    settings = deepspeed_config(
        config,
        stage=stage,
        world=world,
        dtype=name,
        plain=optimizer.plain,
        clips=whole is None,
        persistent=_persistent(model, parameters),
    )
    engine = _initialize(model, _groups(parameters, optimizer), settings, job.use_gpu)
    if state is not None:
        restore(engine, parameters, state, step, MOMENTS[optimizer.plain])
        if whole is not None:
            whole.load({name: tensor.to(engine.device) for name, tensor in state.items()})
    return Built(engine, model, parameters, stage, name, device, optimizer, whole)


def _whole_gradients(
    config: FinetuneConfig, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], total_steps: int
) -> WholeGradients | None:
    """What the optimizer and the family want of whole gradients; None where nobody wants any."""
    from lowrank.optimizers.registry import rule_of

    hooks = hooks_of(config.adapter, total_steps)
    rules: list[GradientRule] = [] if hooks.rule is None else [hooks.rule]
    if (rule := rule_of(optimizer, parameters)) is not None:
        rules.append(rule)
    if not rules and hooks.observer is None:
        return None
    return WholeGradients(parameters, rules, hooks.observer, config.max_grad_norm)


def _groups(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameters by their share of the learning rate, which `Built.step` reads from the group."""
    from lowrank.optimizers.pairs import is_b

    if optimizer.lr_ratio_b == 1.0:
        return [{"params": list(parameters.values()), _RATIO: 1.0}]
    rest = [parameter for name, parameter in parameters.items() if not is_b(name)]
    of_b = [parameter for name, parameter in parameters.items() if is_b(name)]
    return [{"params": rest, _RATIO: 1.0}, {"params": of_b, _RATIO: optimizer.lr_ratio_b}]


def _persistent(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> int:
    """A penalty reads parameters outside of the forward pass, where ZeRO-3 keeps only persistent ones whole."""
    if all(adapter.penalty() is None for adapter in active_adapters(model).values()):
        return PERSISTENT
    return max(PERSISTENT, *(parameter.numel() for parameter in parameters.values()))


def _initialize(model: nn.Module, groups: list[dict[str, Any]], settings: dict[str, Any], use_gpu: bool) -> Any:
    with _without_mlflow():
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not use_gpu:
        # The shared-memory all-reduce is compiled with g++ on first use, and only serves inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings)
    return engine


@contextlib.contextmanager
def _without_mlflow() -> Iterator[None]:
    """Hide mlflow from DeepSpeed's autotuner, which imports it (2 s per worker) only because it is installed."""
    if "mlflow" in sys.modules or "deepspeed" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def _checkpoint_activations(model: Any, enabled: bool) -> None:
    if enabled:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def set_training(model: nn.Module, training: bool) -> None:
    """Adapter dropout on or off; the frozen base stays in evaluation mode, its own dropout off.

    Layers that recompute their activations must think that they train, or they would not.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    from lowrank.adapters.base import Adapter

    model.eval()
    for module in model.modules():
        if isinstance(module, Adapter | GradientCheckpointingLayer):
            module.training = training
