"""After the last step: the kept checkpoint becomes the adapter, and the adapter is read back before it counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.answer_loss import answer_nll
from cluster.batches import MicroBatch, collate
from cluster.durable import write_json
from cluster.errors import TrainError
from cluster.tokens import TokenTable
from cluster.train_job import ADAPTER_UNIT, OUTCOME_FILE, TrainJob, checkpoint_unit
from cluster.training_state import Progress, adapters_of, load_tensors, saved_of, trained_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank.adapters.base import Adapter

#: Relative difference of the probe's loss that saving and loading may cost.
_RELOAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def commit_adapter(job: TrainJob, outcome: dict[str, Any], probe: MicroBatch) -> None:
    """Write the kept checkpoint as the unit `adapter`, checked by loading it into a fresh model. Rank 0 only.

    Raises:
        TrainError: what was loaded is not what was trained.
    """
    from lowrank.adapters.peft_format import save_adapter

    last = Progress(**outcome["progress"])
    step = last.best_step if job.config.keep == "best" and last.best_step is not None else last.step
    kept = Progress(**job.store.read(checkpoint_unit(step), verify=True).facts)
    write_json(job.root / OUTCOME_FILE, {**outcome, "kept_step": step})
    job.store.publish(OUTCOME_FILE)

    def write(directory: Path) -> dict[str, Any]:
        tensors = load_tensors(job.store, step)
        trained, saved = adapters_of(tensors, job.source), saved_of(tensors)
        save_adapter(directory, trained, job.source.adapter, job.source.base_facts, saved)
        _check_saved(job, directory, saved)
        loss = _check(job, directory, trained, kept, outcome["dtype"], probe)
        return {
            "global_step": kept.step,
            "epoch": kept.epoch,
            "probe_loss": kept.probe_loss,
            "reloaded_probe_loss": loss,
            "num_parameters": sum(t.numel() for t in trained_tensors(trained).values())
            + sum(t.numel() for named in saved.values() for t in named.values()),
        }

    job.store.commit(ADAPTER_UNIT, write)


def _check_saved(job: TrainJob, directory: Path, saved: dict[str, dict[str, Tensor]]) -> None:
    """The modules that were trained whole, bit for bit."""
    import torch

    from lowrank.adapters.peft_format import load_saved_modules

    loaded = load_saved_modules(directory)
    for module, named in saved.items():
        for name, tensor in named.items():
            if not torch.equal(loaded[module][name], tensor):
                raise _refusal(job, f"{module}.{name} is another tensor after loading")


def _check(
    job: TrainJob, directory: Path, trained: dict[str, Adapter], kept: Progress, dtype: str, probe: MicroBatch
) -> float:
    """The tensors bit for bit, a change since the start, and the loss on the fixed batch; that loss."""
    import torch

    from cluster.model import initial_adapters
    from lowrank.adapters.peft_format import load_adapter

    loaded = load_adapter(directory)
    for module, adapter in trained.items():
        found = loaded[module].tensors() if module in loaded else {}
        for name, tensor in adapter.tensors().items():
            if name not in found or not torch.equal(found[name], tensor):
                raise _refusal(job, f"{module}.{name} is another tensor after loading")
    start = trained_tensors(initial_adapters(job.source))
    if all(torch.equal(tensor, start[name]) for name, tensor in trained_tensors(trained).items()):
        raise _refusal(job, "training changed nothing")
    loss = _probe_loss(job, directory, dtype, probe)
    before = kept.probe_loss if kept.probe_loss is not None else loss
    if not abs(loss - before) <= _RELOAD_TOLERANCE[dtype] * max(1.0, abs(before)):
        raise _refusal(job, f"its loss on {len(probe)} fixed rows is {loss:.6f}, while training it was {before:.6f}")
    return loss


def _refusal(job: TrainJob, problem: str) -> TrainError:
    return TrainError(
        f"save adapter of {job.name}: {problem}. It must load as it was trained. Run the stage again; its last "
        "checkpoint is kept."
    )


def _probe_loss(job: TrainJob, directory: Path, dtype: str, probe: MicroBatch) -> float:
    import torch

    from cluster.model import build_adapted

    device = "cuda" if job.use_gpu else "cpu"
    model = build_adapted(job.source, getattr(torch, dtype), {"adapter": directory}).to(device)
    table = TokenTable.read(job.train_tokens if job.heldout_tokens is None else job.heldout_tokens)
    with torch.no_grad():
        batch = collate(probe, table)
        return float(answer_nll(model, batch, device)) / batch.num_answer_tokens
