"""Training state without a world size: whole adapter tensors and moments, gathered from and put back into ZeRO.

A checkpoint written by four ranks under ZeRO-3 resumes on one rank under ZeRO-0. DeepSpeed 0.19.8 creates the moments
at the first step only, so that `restore` makes them itself before it fills them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.durable import reading
from cluster.errors import DamagedError, TrainError
from cluster.train_job import checkpoint_unit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cluster.durable import UnitRecord, UnitStore
    from cluster.model import ModelSource
    from lowrank.adapters.base import Adapter

#: What every plain optimizer keeps of a parameter. Moments of pairs are whole on every rank, outside of ZeRO.
MOMENTS: dict[str, tuple[str, ...]] = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ()}
STATE_FILE = "state.safetensors"
#: What the name of a parameter starts with that belongs to a module of `modules_to_save`.
_SAVED = "saved."
#: Older checkpoints kept beside the best one; the last may turn out damaged.
_KEEP = 2


@dataclass
class Progress:
    """Where training stands; the sampler's position follows from `step` alone, and every dropout seed too."""

    step: int = 0
    epoch: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    heldout_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    probe_loss: float | None = None

    def evaluated(self, loss: float) -> bool:
        """Take in a held-out loss; whether it is the best so far."""
        self.heldout_loss = loss
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.bad_evals = loss, self.step, 0
            return True
        self.bad_evals += 1
        return False


def active_adapters(model: nn.Module) -> dict[str, Any]:
    """The adapter that every adapted layer applies, by module."""
    from lowrank.inject import adapted_layers

    return {m: layer.adapters[layer.active] for m, layer in adapted_layers(model) if isinstance(layer.active, str)}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, as `module:name` (`lora_a`); what layers share once, under its first module.

    Those of modules that are trained whole are `module:saved.name`.
    """
    from lowrank.inject import saved_modules

    found = trained_tensors(active_adapters(model))
    for module, whole in saved_modules(model):
        own = whole.active_copy
        for name, parameter in () if own is None else own.named_parameters():
            found[f"{module}:{_SAVED}{name}"] = parameter
    return found


def saved_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The modules that are trained whole, out of a checkpoint's tensors: module -> name -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, name = key.partition(":")
        if name.startswith(_SAVED) and ":" not in name:
            found.setdefault(module, {})[name.removeprefix(_SAVED)] = tensor
    return found


def trained_tensors(adapters: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """The trained parameters of adapters by `module:name`, each once."""
    found: dict[str, nn.Parameter] = {}
    known: set[int] = set()
    for module, adapter in adapters.items():
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                known.add(id(parameter))
                found[f"{module}:{name}"] = parameter
    return found


def adapters_of(tensors: Mapping[str, Tensor], source: ModelSource) -> dict[str, Adapter]:
    """The adapter of every module, from a checkpoint's tensors: the initial ones with their trained values."""
    import torch

    from cluster.model import initial_adapters

    adapters = initial_adapters(source)
    with torch.no_grad():
        for name, parameter in trained_tensors(adapters).items():
            parameter.copy_(tensors[name])
    return adapters


def gather(engine: Any, parameters: Mapping[str, nn.Parameter], moments: tuple[str, ...]) -> dict[str, Tensor]:
    """Whole fp32 parameters and `moments`, on every rank. All ranks must call it, after at least one step."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if moments:
        _link_moments(engine)
    tensors = {}
    for name, parameter in parameters.items():
        whole = safe_get_full_fp32_param(parameter)
        # ZeRO-0 in fp32 has no copy: the parameter itself is whole.
        tensors[name] = host(parameter if whole is None else whole)
        for key in moments:
            moment = safe_get_full_optimizer_state(parameter, key)
            tensors[f"{name}:{key}"] = host(engine.optimizer.state[parameter][key] if moment is None else moment)
    return tensors


def host(tensor: Tensor) -> Tensor:
    """A copy in fp32 on the CPU."""
    return tensor.detach().float().cpu().clone()


def restore(
    engine: Any,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    step: int,
    moments: tuple[str, ...],
) -> None:
    """Put parameters and `moments` back under any ZeRO stage and world size."""
    if moments:
        _make_moments(engine, step, moments)
    for name, parameter in parameters.items():
        _put(engine, parameter, tensors[name], None)
        for key in moments:
            _put(engine, parameter, tensors[f"{name}:{key}"], key)


def _make_moments(engine: Any, step: int, moments: tuple[str, ...]) -> None:
    """Zeros that `_put` can fill, as the optimizer itself would make them at its first step."""
    import torch

    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for flat in _optimizer_tensors(engine):
        zeros = {key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in moments}
        inner.state[flat] = {"step": torch.tensor(float(step)), **zeros}
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Let ZeRO-1 and 2 find every parameter's moments.

    DeepSpeed links them once, after the first step of the first group, when those of further groups do not exist yet.
    """
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def _optimizer_tensors(engine: Any) -> Iterator[Tensor]:
    """What the inner optimizer steps: parameters (ZeRO-0), or this rank's flat partitions."""
    # ZeRO-3 empties the parameter groups between steps.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if flat is not None:
        yield from flat
        return
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group in inner.param_groups:
        yield from group["params"]


def _put(engine: Any, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    from deepspeed import utils

    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        # The "full" setter of ZeRO-3 fails on sizes that the ranks do not divide: cut and pad the share here.
        local = share(engine, parameter, value)
        if key is None:
            utils.safe_set_local_fp32_param(parameter, local)
        else:
            utils.safe_set_local_optimizer_state(parameter, local, key)
    elif hasattr(parameter, "_hp_mapping"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
    elif key is not None:
        engine.optimizer.state[parameter][key].copy_(value)


def share(engine: Any, parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor as ZeRO-3 cuts it: flat, fp32, padded with zeros to equal sizes."""
    import torch

    size = parameter.ds_tensor.numel()
    whole = torch.zeros(size * engine.world_size, dtype=torch.float32, device=value.device)
    whole[: value.numel()] = value.flatten()
    return whole.narrow(0, size * engine.global_rank, size)


def save_checkpoint(store: UnitStore, tensors: Mapping[str, Tensor], progress: Progress) -> UnitRecord:
    """Commit a checkpoint and forget those that nobody needs any more."""
    from safetensors.torch import save_file

    def write(directory: Path) -> dict[str, Any]:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / STATE_FILE)
        return asdict(progress)

    record = store.commit(checkpoint_unit(progress.step), write)
    keep = set(checkpoints(store)[-_KEEP:])
    if progress.best_step is not None:
        keep.add(progress.best_step)
    for step in checkpoints(store):
        if step not in keep:
            store.discard(checkpoint_unit(step))
    return record


def checkpoints(store: UnitStore) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    steps = (unit.removeprefix("step-") for unit in store.all_committed() if unit.startswith("step-"))
    return sorted(int(step) for step in steps if step.isdecimal())


def newest_checkpoint(store: UnitStore) -> Progress | None:
    """The newest whole checkpoint, None before the first; damaged ones on the way are discarded. For one process.

    Raises:
        TrainError: there were checkpoints, and none of them is there and whole: training would silently begin anew.
    """
    damaged: dict[int, str] = {}
    for step in reversed(checkpoints(store)):
        try:
            store.fetch(checkpoint_unit(step))
            found = Progress(**store.read(checkpoint_unit(step), verify=True).facts)
            if found.step != step:
                raise ValueError(f"{store.path(checkpoint_unit(step))} holds step {found.step}")
            break
        except (ValueError, FileNotFoundError, TypeError, DamagedError) as error:
            damaged[step] = str(error)
    else:
        _refuse_to_begin_anew(store, damaged)
        return None
    for step, problem in damaged.items():
        store.log("damaged", checkpoint_unit(step), problem=problem)
        store.discard(checkpoint_unit(step))
    if found.best_step is not None and not store.is_committed(checkpoint_unit(found.best_step)):
        # Evaluated, but never kept (or damaged since): it cannot be chosen any more.
        found.best_step = None
    return found


def _refuse_to_begin_anew(store: UnitStore, damaged: Mapping[int, str]) -> None:
    committed = {line["unit"] for line in store.ledger() if line["event"] == "commit"}
    steps = [unit for unit in committed if unit.startswith("step-")]
    if damaged or steps:
        problems = "; ".join(damaged.values()) or f"units/{max(steps)} and all others are missing"
        raise TrainError(
            f"resume training in {store.root}: no checkpoint is whole ({problems}). Bring them back, or delete "
            f"{store.root} to train from step 0."
        )


def load_tensors(store: UnitStore, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint.

    Raises:
        DamagedError: it is not what `save_checkpoint` writes.
    """
    from safetensors.torch import load_file

    file = store.fetch(checkpoint_unit(step)) / STATE_FILE
    with reading(file):
        tensors: dict[str, Tensor] = load_file(file)
        return tensors
