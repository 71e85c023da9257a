"""What the report and the plots of a run read of its stages; brought here first from an object store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.objects import Mirror

#: What the page and the plots read of each stage's units.
_READ = {
    "decompose": ("index",),
    "quantize": ("index",),
    "finetune": ("adapter", "plain-lora"),
    "evaluate": ("summary",),
}


def bring_for_report(artifacts: Mapping[str, Path], mirror: Mirror | None) -> None:
    """Have on this machine what the page and the plots read, of a run in an object store; of others it is here."""
    from cluster.durable import units_at
    from cluster.train_job import METRICS_FILE

    for stage, path in artifacts.items() if mirror is not None else ():
        units = units_at(path, mirror)
        for unit in units.committed(_READ.get(stage, ())):
            units.fetch(unit)
        for name in ("manifest.json", "sidecar.json", *([METRICS_FILE] if stage == "finetune" else [])):
            units.obtain(name)
        units.ledger()
