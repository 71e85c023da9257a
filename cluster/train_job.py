"""What one fine-tuning is given and what it gives back; picklable, importable without torch or Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.durable import UnitStore, units_at

if TYPE_CHECKING:
    from cluster.config import FinetuneConfig
    from cluster.model import ModelSource
    from cluster.objects import Mirror

ADAPTER_UNIT = "adapter"
METRICS_FILE, OUTCOME_FILE, STOP_FILE = "metrics.jsonl", "outcome.json", "stop"


@dataclass(frozen=True)
class TrainJob:
    """One fine-tuning; the same on every node, so every path must be on storage that all of them share."""

    source: ModelSource
    """The base and the adapter's start."""
    config: FinetuneConfig
    """How to train."""
    train_tokens: Path
    """`tokens.parquet` of the training rows."""
    heldout_tokens: Path | None
    """`tokens.parquet` of the held-out rows; None trains without evaluation."""
    root: Path
    """UnitStore of the stage: checkpoints and the adapter."""
    storage: Path
    """Ray Train's own directory; nothing in it is ever read again."""
    name: str
    """Name of the run, for messages and for Ray Train's directory."""
    use_gpu: bool = False
    """One GPU per worker."""
    mirror: Mirror | None = None
    """Of an object store: what the paths above are mirrored from."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Further resources of Ray's that each worker takes."""
    node_wait_s: float = 120.0
    """Seconds to wait for a node once those left do not hold the workers."""

    @property
    def wanted(self) -> dict[str, float]:
        """What one worker takes of a node."""
        return {"CPU": self.config.cpus_per_worker, **({"GPU": 1.0} if self.use_gpu else {}), **self.resources}

    @property
    def store(self) -> UnitStore:
        """Units and ledger of the stage."""
        return units_at(self.root, self.mirror)

    def bring(self) -> None:
        """Have the token tables on this node."""
        for tokens in (self.train_tokens, self.heldout_tokens):
            if tokens is not None and self.mirror is not None:
                self.store.fetch(tokens.parent.name)


@dataclass(frozen=True)
class TrainOutcome:
    """A trained adapter and how it came about."""

    path: Path
    """PEFT directory of the adapter."""
    config: FinetuneConfig
    """What it was trained with."""
    global_step: int
    """Optimizer steps behind the kept adapter."""
    epoch: int
    """Passes over the rows that were begun."""
    metrics: dict[str, float]
    """first_loss, last_loss, heldout_loss, best_loss, reload_error and the like."""
    world_size: int
    """Workers of the last attempt."""
    seconds: float
    """Seconds of all steps, each counted once."""
    peak_rss_bytes: int
    """Largest resident set of a worker."""
    steps_redone: int
    """Steps run again after a loss of workers."""
    zero_stage: int
    """ZeRO stage that ran."""
    dtype: str
    """What was computed in."""
    tokens_per_second: float
    """Real (unpadded) tokens per second, over the median step."""


@dataclass(frozen=True)
class Place:
    """Where a worker stands among the others."""

    rank: int
    """This worker, from 0."""
    world: int
    """Workers."""
    launch: Path
    """Directory of this launch on shared storage: errors that no retry can cure, and the driver's wish to stop."""
    report: Callable[[dict[str, Any]], None]
    """Called by every rank at checkpoints."""
    local_world: int = 1
    """Workers on this node."""
    report_every_s: float = 0.0
    """A checkpoint that follows the last report sooner is not reported: Ray Train takes in one report every 2 s, and
    `report` blocks until the one before was taken."""


def checkpoint_unit(step: int) -> str:
    """Unit of the checkpoint after `step` optimizer steps, and of the interval that ends there."""
    return f"step-{step:06d}"
