"""What the weights of a model look like before anyone chooses a rank: `rankline spectrum`.

Every linear weight is read once, on its own, and its exact singular values are kept; everything that is shown follows
from them. With a budget, the allocator says which ranks it would choose.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import ModelConfig
from pipelines.errors import ConfigError
from pipelines.plots import layer_kinds
from pipelines.progress import ProgressBoard
from pipelines.sources import ModelFiles, resolve_model

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.architecture import Architecture

#: Ranks at which energy is shown, and shares of energy for which ranks are.
RANKS = (8, 16, 32, 64, 128)
SHARES = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Weight:
    """One linear weight: its place in the model, and its singular values (min(m, n),) in fp64."""

    name: str
    kind: str
    layer: int
    shape: tuple[int, int]
    sigma: Tensor

    @property
    def num_parameters(self) -> int:
        """m · n."""
        return self.shape[0] * self.shape[1]


def measure(source: str, targets: str | Sequence[str] = "all-linear", quiet: bool = False) -> list[Weight]:
    """Singular values of the linear weights of a model, in the model's order.

    Args:
        source: what `model.source` of a pipeline takes.
        targets: `all-linear`, or names and regular expressions of modules.
        quiet: no progress.

    Raises:
        ModelError: no such model, or a target that names nothing.
        CheckpointError: the weights cannot be read.
        NumericsError: a weight holds NaN or infinity.
    """
    from cluster.architecture import select_targets
    from lowrank.spectra import singular_values
    from pipelines.stages import shard

    model = resolve_model(ModelConfig(source=source))
    architecture = _architecture(model)
    chosen = [spec.name for spec in select_targets(architecture, targets)]
    checkpoint = model.checkpoint()
    stored = {rows.tensor: rows for rows in shard.resolve_rows(checkpoint, architecture)}
    kinds = layer_kinds(chosen)
    found = []
    with ProgressBoard(quiet) as board:
        stage = board.stage("spectrum")
        stage.total(len(chosen))
        for name in chosen:
            rows = stored[f"{name}.weight"]
            matrix = shard.read_rows(checkpoint, rows, 0, rows.stop)
            sigma = singular_values(f"{name}.weight", matrix)
            found.append(Weight(name, *kinds[name], (matrix.shape[0], matrix.shape[1]), sigma))
            stage.advance(note=name)
    return found


def _architecture(model: ModelFiles) -> Architecture:
    from cluster.architecture import describe, load_config

    if model.kind == "safetensors":
        return describe(load_config(model.path))
    from lowrank.gguf import GGUFCheckpoint

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(GGUFCheckpoint(model.path).config))
        return describe(load_config(Path(directory)))


def figures(weight: Weight) -> dict[str, Any]:
    """What is shown of one weight; energies are shares of ‖W‖²_F."""
    from lowrank.spectra import energy_curve, ranks_for, stable_rank

    curve = energy_curve(weight.sigma)
    return {
        "name": weight.name,
        "type": weight.kind,
        "layer": weight.layer,
        "shape": list(weight.shape),
        "frobenius_norm": float(weight.sigma.norm()),
        "spectral_norm": float(weight.sigma[0]),
        "stable_rank": stable_rank(weight.sigma),
        "energy": {str(rank): float(curve[min(rank, len(curve) - 1)]) for rank in RANKS},
        "rank_for": {f"{share:g}": rank for share, rank in zip(SHARES, ranks_for(weight.sigma, SHARES))},
    }


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over weights, and the range of their stable ranks."""
    count, ranks = len(rows), [row["stable_rank"] for row in rows]

    def means(field: str) -> dict[str, float]:
        return {key: sum(row[field][key] for row in rows) / count for key in rows[0][field]}

    return {
        "count": count,
        "shapes": sorted({tuple(row["shape"]) for row in rows}),
        "stable_rank": {"mean": sum(ranks) / count, "min": min(ranks), "max": max(ranks)},
        "energy": means("energy"),
        "rank_for": means("rank_for"),
    }


def report(source: str, weights: Sequence[Weight], budget: float | None = None) -> dict[str, Any]:
    """Everything that `rankline spectrum` shows, as one JSON document.

    Args:
        source: of the model.
        weights: what `measure` found, at least one.
        budget: share of the parameters of these weights that factors may hold, in (0, 1); None allocates nothing.

    Raises:
        ConfigError: the budget is out of range, or smaller than rank 1 everywhere.
    """
    rows = [figures(weight) for weight in weights]
    kinds = list(dict.fromkeys(weight.kind for weight in weights))
    return {
        "model": source,
        "num_weights": len(weights),
        "num_parameters": sum(weight.num_parameters for weight in weights),
        "types": {kind: summarize([row for row in rows if row["type"] == kind]) for kind in kinds},
        "weights": rows,
        "allocation": None if budget is None else allocation(weights, budget),
    }


def check_options(budget: float | None, top: int = 0) -> None:
    """Refuse a share outside (0, 1) and a negative number of rows.

    Raises:
        ConfigError: out of range.
    """
    if top < 0:
        raise ConfigError(f"spectrum: --top {top}. Give a number of weights, or 0 for all.")
    if budget is not None and not 0 < budget < 1:
        raise ConfigError(
            f"spectrum: --budget {budget:g}. Give a share of the parameters between 0 and 1, such as 0.25."
        )


def allocation(weights: Sequence[Weight], budget: float) -> dict[str, Any]:
    """The ranks that the allocator chooses for a share of the parameters, and one rank for all beside them."""
    from lowrank.allocate import Allocation, RankBounds, Spectrum, allocate_parameters
    from lowrank.errors import RankError

    check_options(budget)
    spectra = [Spectrum(weight.name, weight.shape, weight.sigma) for weight in weights]
    allowed = budget * sum(weight.num_parameters for weight in weights)
    try:
        found = allocate_parameters(spectra, allowed)
    except RankError as error:
        raise ConfigError(f"spectrum: --budget {budget:g} is too small: {error}") from error
    per_rank = sum(sum(weight.shape) for weight in weights)
    rank = max(1, int(allowed // per_rank))
    ranks = {weight.name: min(rank, len(weight.sigma)) for weight in weights}
    bounds = RankBounds(min_rank=ranks, max_rank=ranks)
    uniform: Allocation = allocate_parameters(spectra, float("inf"), bounds)
    return {
        "budget": budget,
        "num_parameters": int(found.spent),
        "relative_error": found.relative_error,
        "best_error": found.best_error,
        "uniform": {"rank": rank, "relative_error": uniform.relative_error, "num_parameters": int(uniform.spent)},
        "ranks": found.ranks,
        "errors": found.errors,
    }
