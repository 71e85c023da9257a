"""Charts of a run: each is drawn once on an axes, and shown as inline SVG in the report or as PNG beside the model.

The SVG names its colours by CSS variables and keeps text as text, so that one copy of a chart follows light, dark and
print; the PNG carries no date and no version, so that equal inputs give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VARIANTS = ("dense", "nf4", "nf4_init", "adapter")

#: Colours of light mode; in SVG each becomes the CSS variable of its name.
INK, MUTED, LINE, ACCENT, PLAIN = "#1c1d1f", "#62656a", "#dcdde0", "#1f5fae", "#97999e"
_CSS = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", PLAIN: "--plain"}
#: From the first layer to the last; readable on white and on black.
DEPTH_RAMP = ("#4f6db8", "#2a9d8f", "#e0a030")
#: More types of layers than this are told by the tables only.
MAX_PANELS = 12
_PANEL, _FONT = (4.0, 2.6), 10.0


@dataclass(frozen=True)
class Layer:
    """One target tensor: where it stands, its fit and its errors; what no stage has left is None or empty."""

    module: str
    kind: str
    depth: int
    shape: tuple[int, ...]
    rank: int | None
    energy: float | None
    sigmas: tuple[float, ...]
    plain_error: float | None
    split_error: float | None


def read_layers(artifacts: Mapping[str, Path]) -> list[Layer]:
    """Every target tensor in the model's order, from the tables of decompose and quantize."""
    fits = _table(artifacts, "decompose", "index")
    errors = {row["module"]: row for row in _table(artifacts, "quantize", "index")}
    sigmas: dict[str, list[tuple[int, float]]] = {}
    for row in _table(artifacts, "decompose", "spectra"):
        sigmas.setdefault(row["module"], []).append((row["index"], row["sigma"]))
    rows = {row["module"]: row for row in fits} or errors
    kinds = layer_kinds(list(rows))
    return [
        Layer(
            module=module,
            kind=kinds[module][0],
            depth=kinds[module][1],
            shape=tuple(row["shape"]),
            rank=row.get("rank", row.get("split_rank")),
            energy=row.get("explained_energy"),
            sigmas=tuple(sigma for _, sigma in sorted(sigmas.get(module, []))),
            plain_error=errors.get(module, {}).get("plain_error"),
            split_error=errors.get(module, {}).get("quantization_error"),
        )
        for module, row in rows.items()
    ]


def _table(artifacts: Mapping[str, Path], stage: str, name: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    path = artifacts[stage] / "units" / "index" / f"{name}.parquet" if stage in artifacts else None
    if path is None or not path.is_file():
        return []
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def layer_kinds(modules: Sequence[str]) -> dict[str, tuple[str, int]]:
    """(type, depth) of every module: depth is the first number in its path, the type what follows it.

    The type is cut to its last part where that tells it apart: `q_proj`, but `attn.c_proj` and `mlp.c_proj`.
    """
    found: dict[str, tuple[str, int]] = {}
    for module in modules:
        parts = module.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        rest = parts if first is None else parts[first + 1 :] or parts
        kind = ".".join("*" if part.isdigit() else part for part in rest)
        found[module] = (kind, 0 if first is None else int(parts[first]))
    owners: dict[str, set[str]] = {}
    for kind, _ in found.values():
        owners.setdefault(kind.rpartition(".")[2], set()).add(kind)
    short = {kind: last for last, kinds in owners.items() if len(kinds) == 1 for kind in kinds}
    return {module: (short.get(kind, kind), depth) for module, (kind, depth) in found.items()}


def by_kind(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers grouped by type, each group ordered by depth."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    return {kind: sorted(group, key=lambda layer: layer.depth) for kind, group in groups.items()}


def read_training(artifacts: Mapping[str, Path]) -> list[dict[str, Any]]:
    """One line per optimizer step, superseded lines left out; empty without a log."""
    from cluster.metrics import read_metrics

    return read_metrics(artifacts["finetune"]) if "finetune" in artifacts else []


def draw_spectra(ax: Axes, group: Sequence[Layer], layers: Sequence[Layer]) -> None:
    """Singular values of one type, a line per layer; the scale is that of all layers."""
    values = [sigma for layer in layers for sigma in layer.sigmas if sigma > 0]
    for layer in group:
        points = [(i + 1, sigma) for i, sigma in enumerate(layer.sigmas) if sigma > 0]
        if points:
            marker = "o" if len(points) == 1 else None
            ax.plot(*zip(*points), color=depth_colour(layer, layers), linewidth=0.9, marker=marker, markersize=3)
    ranks = {layer.rank for layer in group}
    longest = max(len(layer.sigmas) for layer in layers)
    rank = ranks.pop() if len(ranks) == 1 else None
    if rank is not None and rank < longest:
        ax.axvline(rank + 0.5, color=MUTED, linewidth=0.8, dashes=(3, 3))
    ax.set_xlim(0.5, longest + 0.5)
    _integers(ax)
    if values:
        _log_scale(ax, min(values), max(values))
    ax.set_xlabel("index", parse_math=False)
    ax.set_ylabel("singular value")


def draw_energy(ax: Axes, layers: Sequence[Layer]) -> None:
    """Explained energy at the chosen rank: a row of points per type, coloured by depth."""
    groups = by_kind([layer for layer in layers if layer.energy is not None])
    for row, group in enumerate(groups.values()):
        colours = [depth_colour(layer, layers) for layer in group]
        ax.scatter([100 * (layer.energy or 0) for layer in group], [row] * len(group), c=colours, s=16, linewidths=0)
    ax.set_yticks(range(len(groups)), list(groups), parse_math=False)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set_xlim(0, 104)
    ax.set_xlabel("explained energy, %")


def draw_errors(ax: Axes, group: Sequence[Layer], layers: Sequence[Layer]) -> None:
    """Quantization error over depth: plain NF4 and the split; the scale is that of all layers."""
    both = [error for layer in layers for error in (layer.plain_error, layer.split_error) if error is not None]
    marker = "o" if len(group) < 20 else None
    for name, colour in (("plain_error", PLAIN), ("split_error", ACCENT)):
        points = [(layer.depth, getattr(layer, name)) for layer in group if getattr(layer, name) is not None]
        if points:
            label = name.replace("_error", "")
            ax.plot(*zip(*points), color=colour, label=label, linewidth=1.3, marker=marker, markersize=3)
    depths = [layer.depth for layer in layers]
    ax.set_xlim(min(depths) - 0.5, max(depths) + 0.5)
    ax.set_ylim(0, 1.08 * max(both, default=1.0) or 1.0)
    _integers(ax)
    ax.set_xlabel("layer")
    ax.set_ylabel("relative error")


def draw_loss(ax: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Training loss per step, its running mean, and the held-out loss where it was taken."""
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    window = max(1, len(losses) // 20)
    smooth = window > 1
    marker = "o" if len(steps) < 3 else None
    ax.plot(
        steps, losses, color=PLAIN if smooth else INK, linewidth=0.9 if smooth else 1.4, label="step", marker=marker
    )
    if smooth:
        means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
        ax.plot(steps, means, color=INK, linewidth=1.4, label=f"mean of {window}")
    held = [(line["step"], line["heldout_loss"]) for line in lines if line.get("heldout_loss") is not None]
    if held:
        ax.plot(*zip(*held), color=ACCENT, linewidth=1.4, marker="o", markersize=4, label="held-out")
    _step_axis(ax, "loss, nats per token")
    if len(ax.lines) > 1:
        ax.legend(frameon=False, fontsize=_FONT - 0.5, labelcolor=INK, handlelength=1.4, loc="upper right")


def draw_series(ax: Axes, lines: Sequence[Mapping[str, Any]], field: str, label: str, scale: float = 1.0) -> None:
    """One figure per step."""
    points = [(line["step"], scale * line[field]) for line in lines if line.get(field) is not None]
    if points:
        ax.plot(*zip(*points), color=ACCENT, linewidth=1.2, marker="o" if len(points) < 3 else None)
    _step_axis(ax, label)


def draw_accuracy(ax: Axes, evaluation: Mapping[str, Any]) -> None:
    """A bar per variant, and the majority class as a line."""
    found = [(name, evaluation[name]["accuracy"]) for name in VARIANTS if _accuracy(evaluation, name) is not None]
    for row, (name, value) in enumerate(found):
        ax.barh(row, 100 * value, height=0.6, color=ACCENT if name == "adapter" else PLAIN, linewidth=0)
    majority = (evaluation.get("majority") or {}).get("accuracy")
    if majority is not None:
        ax.axvline(100 * majority, color=INK, linewidth=0.9, dashes=(3, 3))
        side = "right" if majority > 0.5 else "left"
        text = f" majority class {100 * majority:.1f} % "
        ax.text(100 * majority, -0.7, text, ha=side, va="center", color=MUTED, fontsize=_FONT - 0.5)
    ax.set_yticks(range(len(found)), [f"{name}  {100 * value:.1f} %" for name, value in found])
    ax.set_ylim(len(found) - 0.5, -1.0)
    ax.set_xlim(0, 100)
    ax.set_xlabel("accuracy, %")


def _accuracy(evaluation: Mapping[str, Any], variant: str) -> Any:
    return (evaluation.get(variant) or {}).get("accuracy")


def _step_axis(ax: Axes, label: str) -> None:
    low, high = ax.get_ylim()
    if low > 0:
        ax.set_ylim(0, high)
    _integers(ax)
    ax.set_xlabel("step")
    ax.set_ylabel(label)


def _integers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def _log_scale(ax: Axes, low: float, high: float) -> None:
    """Log axis whose ticks are plain numbers, at least two of them whatever the range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ratio = high / low
    ax.set_yscale("log")
    ax.set_ylim(low / 1.15, high * 1.15)
    parts = tuple(range(1, 10)) if ratio < 6 else (1, 2, 5) if ratio < 200 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=parts))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def depth_colour(layer: Layer, layers: Sequence[Layer]) -> str:
    """The colour of a layer's depth, on the ramp from the first depth to the last."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    depths = [item.depth for item in layers]
    share = (layer.depth - min(depths)) / max(max(depths) - min(depths), 1)
    return str(to_hex(LinearSegmentedColormap.from_list("depth", list(DEPTH_RAMP))(share)))


def finish(ax: Axes, title: str = "") -> None:
    """The look that all charts share."""
    ax.set_facecolor("none")
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    ax.grid(True, color=LINE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(colors=MUTED, labelsize=_FONT - 0.5, length=0, pad=4)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set(color=MUTED, fontsize=_FONT)
    if title:
        ax.set_title(title, loc="left", color=INK, fontsize=_FONT + 1, parse_math=False)


def svg(draw: Callable[[Axes], None], name: str, label: str, size: tuple[float, float] = _PANEL) -> str:
    """One chart as an `<svg>` element to stand in an HTML page; `name` keeps its ids apart from those of others."""
    from html import escape

    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    draw(ax)
    finish(ax)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rankline"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _CSS.items():
        text = text.replace(colour, f"var({variable})")
    head = f'<svg role="img" aria-label="{escape(label, quote=True)}" '
    return head + re.sub(r'^<svg |(?<=\s)(?:width|height)="[\d.]+pt"', "", text, count=3)


def write_plots(artifacts: Mapping[str, Path], directory: Path) -> None:
    """Write spectra.png, quantization_error.png, loss.png and accuracy.png, each where its stage left the figures.

    Args:
        artifacts: Directory of each stage's output, by name; decompose, quantize, finetune and evaluate are read.
        directory: Made where it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    layers, lines, evaluation = read_layers(artifacts), read_training(artifacts), read_evaluation(artifacts)
    groups = list(by_kind(layers).items())[:MAX_PANELS]
    if any(layer.sigmas for layer in layers):
        _png(directory / "spectra.png", [(k, lambda ax, g=g: draw_spectra(ax, g, layers)) for k, g in groups])
    if any(layer.plain_error is not None for layer in layers):
        panels = [(k, lambda ax, g=g: draw_errors(ax, g, layers)) for k, g in groups]
        _png(directory / "quantization_error.png", panels, legend=True)
    if lines:
        _png(directory / "loss.png", [("training loss", lambda ax: draw_loss(ax, lines))])
    if any(_accuracy(evaluation, variant) is not None for variant in VARIANTS):
        _png(directory / "accuracy.png", [("held-out accuracy", lambda ax: draw_accuracy(ax, evaluation))])


def read_evaluation(artifacts: Mapping[str, Path]) -> dict[str, Any]:
    """What evaluate found, or an empty mapping."""
    import json

    path = artifacts["evaluate"] / "units" / "summary" / "evaluation.json" if "evaluate" in artifacts else None
    found: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    return found


def _png(path: Path, panels: Sequence[tuple[str, Callable[..., None]]], legend: bool = False) -> None:
    """Panels on a grid of at most four columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure: Figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for index, (title, draw) in enumerate(panels):
        ax = figure.add_subplot(rows, columns, index + 1)
        draw(ax)
        finish(ax, title)
        if legend and index == 0:
            ax.legend(frameon=False, fontsize=_FONT - 0.5, labelcolor=INK)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
