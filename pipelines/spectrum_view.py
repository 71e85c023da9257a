"""Tables and the picture of `rankline spectrum`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import plots, show
from pipelines.errors import ConfigError
from pipelines.spectrum import RANKS, SHARES, Weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pipelines.plots import Layer

_COLUMNS, _PANEL = 4, (4.0, 2.7)
#: One colour per type in the energy panel; they repeat after that, with another dash.
_COLOURS = ("#1f5fae", "#e0a030", "#2a9d8f", "#b8485a", "#7a5ba8", "#6b8e23", "#97999e")
_DASHES = ("-", "--", ":")


def tables(report: Mapping[str, Any], top: int) -> None:
    """Types, the `top` weights of the smallest stable rank (0: all), and the allocation where there is one."""
    million = report["num_parameters"] / 1e6
    title = f"{report['model']}: {report['num_weights']} linear weights, {million:.1f} M numbers"
    ranks = show.new_table(
        f"{title}\nrank that explains", "type", "weights", "shape", *(f"{share:.0%}" for share in SHARES)
    )
    columns = ("stable rank", "from", "to", *map(str, RANKS))
    energy = show.new_table("stable rank, and energy in % that these ranks explain", "type", *columns)
    for kind, row in report["types"].items():
        shape = _times(row["shapes"][0]) if len(row["shapes"]) == 1 else "several"
        ranks.add_row(kind, str(row["count"]), shape, *(f"{value:.0f}" for value in row["rank_for"].values()))
        stable = row["stable_rank"]
        energy.add_row(kind, *(f"{stable[part]:.1f}" for part in ("mean", "min", "max")), *_percents(row["energy"]))
    rows = sorted(report["weights"], key=lambda row: row["stable_rank"])[: top or None]
    head = "all weights" if len(rows) == report["num_weights"] else f"the {len(rows)} weights of smallest stable rank"
    one = show.new_table(f"{head}, and their energy in %", "weight", "stable", *map(str, RANKS))
    for row in rows:
        one.add_row(row["name"], f"{row['stable_rank']:.1f}", *_percents(row["energy"]))
    show.print_all(ranks, energy, "Means over the weights of a type; stable rank is ‖W‖²_F / ‖W‖²₂.", one)
    if report["allocation"]:
        _allocation(report)


def _allocation(report: Mapping[str, Any]) -> None:
    found, uniform = report["allocation"], report["allocation"]["uniform"]
    title = f"ranks for {100 * found['budget']:g} % of the numbers ({found['num_parameters'] / 1e6:.2f} M)"
    table = show.new_table(title, "type", "mean rank", "from", "to", "error of W")
    for kind in report["types"]:
        names = [row["name"] for row in report["weights"] if row["type"] == kind]
        ranks = [found["ranks"][name] for name in names]
        error = sum(found["errors"][name] for name in names) / len(names)
        table.add_row(kind, f"{sum(ranks) / len(ranks):.1f}", str(min(ranks)), str(max(ranks)), f"{error:.4f}")
    show.print_all(
        table,
        f"predicted relative error over all weights {found['relative_error']:.4f}; rank {uniform['rank']} everywhere "
        f"({uniform['num_parameters'] / 1e6:.2f} M numbers) gives {uniform['relative_error']:.4f}",
    )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _percents(energies: Mapping[str, float]) -> list[str]:
    return [f"{100 * value:.1f}" for value in energies.values()]


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is computed.

    Raises:
        ConfigError: not a .png, or its directory is a file.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"spectrum: --out {path} is not a .png file. Give a path that ends in .png.")
    parent = next((above for above in path.parents if above.exists()), Path())
    if path.is_dir() or not parent.is_dir():
        raise ConfigError(
            f"spectrum: --out {path}: {parent if not path.is_dir() else path} is in the way. Give a file."
        )


def picture(weights: Sequence[Weight], path: Path) -> None:
    """Write spectra by type, energy curves and a map of stable ranks as PNG; equal weights give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = [plots.Layer(w.name, w.kind, w.layer, w.shape, None, None, _sigmas(w), None, None) for w in weights]
    groups = list(plots.by_kind(layers).items())[: plots.MAX_PANELS]
    rows = -(-len(groups) // _COLUMNS)
    size = (_PANEL[0] * _COLUMNS, _PANEL[1] * rows + 1.5 * _PANEL[1])
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows + 1, _COLUMNS, height_ratios=[1.0] * rows + [1.5])
    for index, (kind, group) in enumerate(groups):
        ax = figure.add_subplot(grid[index // _COLUMNS, index % _COLUMNS])
        plots.draw_spectra(ax, group, layers)
        plots.finish(ax, kind)
        if index == 0:
            _depth_key(ax, layers)
    for columns, title, draw in (
        (slice(0, 2), "energy that rank r explains, mean of the layers", draw_energy_curves),
        (slice(2, 4), "stable rank", draw_stable_ranks),
    ):
        ax = figure.add_subplot(grid[rows, columns])
        draw(ax, weights)
        plots.finish(ax, title)
        ax.grid(draw is draw_energy_curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _sigmas(weight: Weight) -> tuple[float, ...]:
    """Without the few last ones, which would stretch the scale of all panels."""
    floor = float(weight.sigma[0]) / 500
    return tuple(value for value in weight.sigma.tolist() if value >= floor)


def _depth_key(ax: Axes, layers: Sequence[Layer]) -> None:
    """What the colours of the spectra mean."""
    depths = sorted({layer.depth for layer in layers})
    marks = [depths[0], depths[len(depths) // 2], depths[-1]]
    for depth in dict.fromkeys(marks):
        layer = next(layer for layer in layers if layer.depth == depth)
        ax.plot([], [], color=plots.depth_colour(layer, layers), linewidth=2, label=f"layer {depth}")
    ax.legend(frameon=False, loc="lower left", fontsize=9.5, labelcolor=plots.INK, handlelength=1.2)


def draw_energy_curves(ax: Axes, weights: Sequence[Weight]) -> None:
    """Share of energy over rank, a line per type; the line ends at the type's full rank."""
    import torch

    from lowrank.spectra import energy_curve

    for index, (kind, group) in enumerate(_grouped(weights).items()):
        length = min(len(weight.sigma) for weight in group)
        mean = torch.stack([energy_curve(weight.sigma)[: length + 1] for weight in group]).mean(0)
        colour, dash = _COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)]
        ax.plot(range(length + 1), (100 * mean).tolist(), color=colour, linestyle=dash, linewidth=1.5, label=kind)
    ax.set_xlim(0, max(len(weight.sigma) for weight in weights))
    ax.set_ylim(0, 101)
    ax.set_xlabel("rank")
    ax.set_ylabel("energy, %")
    ax.legend(frameon=False, fontsize=9.5, labelcolor=plots.INK, loc="lower right", ncols=2)


def draw_stable_ranks(ax: Axes, weights: Sequence[Weight]) -> None:
    """Stable rank, a row per type and a column per layer; empty where a layer has no such weight."""
    import numpy as np

    from lowrank.spectra import stable_rank

    groups = _grouped(weights)
    depths = sorted({weight.layer for weight in weights})
    values = np.full((len(groups), len(depths)), np.nan)
    for row, group in enumerate(groups.values()):
        for weight in group:
            values[row, depths.index(weight.layer)] = stable_rank(weight.sigma)
    image = ax.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    step = max(1, len(depths) // 10)
    ax.set_xticks(range(0, len(depths), step), [str(depth) for depth in depths[::step]])
    ax.set_yticks(range(len(groups)), list(groups), parse_math=False)
    ax.set_xlabel("layer")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=plots.MUTED, labelsize=9.5, length=0)


def _grouped(weights: Sequence[Weight]) -> dict[str, list[Weight]]:
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(weight.kind, []).append(weight)
    return groups
