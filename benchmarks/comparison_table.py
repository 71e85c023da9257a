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
    lines = [
        "| family | trained numbers | learning rate | held-out loss | accuracy | loss at start | error at start "
        "| seconds per step | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for family, cells in sorted(families.items(), key=lambda item: mean(c["loss"] for c in item[1])):
        judged = [c["accuracy"] for c in cells if c["accuracy"] is not None]
        spread = stdev(c["loss"] for c in cells) if len(cells) > 1 else 0.0
        step = found["steps"].get(family)
        lines.append(
            f"| {family} | {cells[0]['num_parameters']:,} | {cells[0]['learning_rate']:g} "
            f"| {mean(c['loss'] for c in cells):.4f} ± {spread:.4f} "
            f"| {f'{100 * mean(judged):.1f} %' if judged else '–'} | {mean(c['loss_at_start'] for c in cells):.3f} "
            f"| {mean(c['error_at_start'] for c in cells):.4f} | {'' if step is None else f'{step:.3f}'} "
            f"| {max(c['peak_rss_bytes'] for c in cells) / 2**20:.0f} |"
        )
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], out: Path) -> None:
    """Held-out loss against trained numbers, one point per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
        cells = [row for row in rows if row["family"] == family]
        style = {"marker": "os^Dv"[index % 5], "linestyle": "none", "color": f"C{index % 10}", "label": family}
        axes.plot([c["num_parameters"] for c in cells], [c["loss"] for c in cells], **style)
    axes.set(xscale="log", yscale="log", xlabel="trained numbers", ylabel="held-out loss, nats per answer token")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)
