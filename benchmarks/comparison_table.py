"""What `method_comparison.py` found, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any


def table(found: dict[str, Any]) -> str:
    """Markdown, best mean loss first; ± is the standard deviation over seeds."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        families.setdefault(row["family"], []).append(row)
    judged = any(row["accuracy"] is not None for row in found["rows"])
    names = ["family", "trained numbers", "learning rate", "held-out loss", *(["accuracy"] if judged else [])]
    names += ["loss at start", "error at start", "seconds per step", "peak MiB"]
    lines = [f"| {' | '.join(names)} |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for family, cells in sorted(families.items(), key=lambda item: mean(c["loss"] for c in item[1])):
        spread = stdev(c["loss"] for c in cells) if len(cells) > 1 else 0.0
        step = found["steps"].get(family)
        columns = [
            family,
            f"{cells[0]['num_parameters']:,}",
            f"{cells[0]['learning_rate']:g}",
            f"{mean(c['loss'] for c in cells):.4f} ± {spread:.4f}",
            *([f"{100 * mean(c['accuracy'] for c in cells):.1f} %"] if judged else []),
            f"{mean(c['loss_at_start'] for c in cells):.3f}",
            f"{mean(c['error_at_start'] for c in cells):.4f}",
            "" if step is None else f"{step:.2f}",
            f"{max(c['peak_rss_bytes'] for c in cells) / 2**20:.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], out: Path) -> None:
    """Held-out loss of every seed, families from the best mean down, with their trained numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    ordered = sorted(families.items(), key=lambda item: -mean(row["loss"] for row in item[1]))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.27 * len(ordered)), layout="constrained")
    for height, (_, cells) in enumerate(ordered):
        losses = [cell["loss"] for cell in cells]
        axes.plot([min(losses), max(losses)], [height, height], color="0.8", linewidth=3, zorder=1)
        axes.plot(losses, [height] * len(losses), "o", color="C0", markersize=5, zorder=2)
        axes.plot([mean(losses)], [height], "|", color="C3", markersize=13, markeredgewidth=2, zorder=3)
    names = [f"{name}  ({cells[0]['num_parameters']:,})" for name, cells in ordered]
    axes.set_yticks(range(len(ordered)), names, fontsize=9)
    axes.set_xlabel("held-out loss, nats per answer token: seeds, and their mean in red")
    axes.set_title("family (trained numbers)", loc="left", fontsize=9)
    axes.grid(axis="x", color="0.9")
    figure.savefig(out, dpi=120)
    plt.close(figure)
