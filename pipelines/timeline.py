"""Who worked on what, and when: read from the ledgers that every process of a run keeps, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.durable import UnitStore
from pipelines.plots import DEPTH_RAMP, INK, LINE, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: An idle time longer than this, in seconds, is drawn as this long.
GAP_S = 20.0
#: Workers that are drawn; the busiest.
MAX_WORKERS = 40
_COLOURS = {"shard": "#8a6fb0", "decompose": DEPTH_RAMP[0], "quantize": DEPTH_RAMP[1], "finetune": DEPTH_RAMP[2],
            "evaluate": "#c0563b", "register": "#62656a"}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """One try of one process at one unit, in seconds since the epoch; or a training worker from first to last word.

    `outcome`: `committed`; `surplus` (another process was first); `lost` (it never ended).
    """

    stage: str
    unit: str
    worker: str
    start: float
    end: float
    outcome: str


def spans(stage: str, artifact: Path) -> list[Span]:
    """Every try at a unit of a stage, by start; a lost one ends with the last word of its process.

    Args:
        stage: its name.
        artifact: directory of its output.
    """
    lines = list(UnitStore(artifact).ledger())
    last: dict[str, float] = {}
    ranks: dict[str, list[float]] = {}
    for line in lines:
        last[_worker(line)] = float(line["time"])
        if line["event"] == "rank":
            ranks.setdefault(_worker(line), []).append(float(line["time"]))
    found, begun = [], dict[tuple[str, str], float]()
    for line in lines:
        worker, unit, now = _worker(line), str(line["unit"]), float(line["time"])
        if line["event"] == "start":
            begun[worker, unit] = now
        elif line["event"] in ("commit", "surplus") and (worker, unit) in begun:
            outcome = "committed" if line["event"] == "commit" else "surplus"
            found.append(Span(stage, unit, worker, begun.pop((worker, unit)), now, outcome))
    found += [Span(stage, unit, worker, start, last[worker], "lost") for (worker, unit), start in begun.items()]
    found += [Span(stage, "training", worker, min(own), last[worker], "committed") for worker, own in ranks.items()]
    return sorted(found, key=lambda span: span.start)


def counts(artifact: Path) -> dict[str, float]:
    """What a stage's units cost, for MLflow: how many are done, how many tries were for nothing, and CPU seconds."""
    store = UnitStore(artifact)
    tries = [span for span in spans("", artifact) if span.unit != "training"]
    cpu: dict[str, float] = {}
    for line in store.ledger():
        if "cpu_seconds" in line:
            # A training worker tells what it has used so far, the others what a unit took.
            before = 0.0 if line["event"] == "rank" else cpu.get(_worker(line), 0.0)
            cpu[_worker(line)] = before + float(line["cpu_seconds"])
    return {
        "stage_units_done": float(sum(span.outcome == "committed" for span in tries)),
        "stage_units_redone": float(sum(span.outcome != "committed" for span in tries)),
        "stage_cpu_seconds": sum(cpu.values()),
    }


def of_run(artifacts: Mapping[str, Path]) -> list[Span]:
    """Of all stages, by start."""
    return sorted((span for name, path in artifacts.items() for span in spans(name, path)), key=lambda one: one.start)


def draw_timeline(ax: Axes, tries: Sequence[Span]) -> None:
    """A row per process and a bar per unit, in the colour of its stage; lost tries are hollow, idle times are cut."""
    busy: dict[str, float] = {}
    for span in tries:
        busy[span.worker] = busy.get(span.worker, 0.0) + span.end - span.start
    chosen = sorted(busy, key=lambda worker: -busy[worker])[:MAX_WORKERS]
    rows = {worker: row for row, worker in enumerate(w for w in dict.fromkeys(s.worker for s in tries) if w in chosen)}
    place, cuts = _without_gaps(tries)
    for span in tries:
        if span.worker in rows:
            width = max(place(span.end) - place(span.start), 1e-3)
            hollow = span.outcome != "committed"
            colour = _COLOURS.get(span.stage, MUTED)
            ax.barh(rows[span.worker], width, left=place(span.start), height=0.7, linewidth=0.8 if hollow else 0,
                    color="none" if hollow else colour, edgecolor=colour)  # fmt: skip
    for cut in cuts:
        ax.axvline(cut, color=LINE, linewidth=1.2, linestyle=(0, (2, 2)))
    ax.set_yticks(list(rows.values()), list(rows))
    ax.invert_yaxis()
    ax.set_xlabel("seconds" + (", idle times cut at the dashed lines" if cuts else ""))
    for stage in dict.fromkeys(span.stage for span in tries):
        ax.barh([0], [0], color=_COLOURS.get(stage, MUTED), label=stage)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18 if len(rows) > 6 else -0.35), ncols=6, frameon=False,
              labelcolor=INK, fontsize=9)  # fmt: skip


def draw_nodes(ax: Axes, nodes: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """CPU use of each node over the run; a run that was left and gone on with has a gap."""
    begun = min(at for points in nodes.values() for at, _ in points)
    colours = [INK, *_COLOURS.values()]
    for index, (name, points) in enumerate(list(nodes.items())[:MAX_WORKERS]):
        times, shares = zip(*sorted(points), strict=True)
        minutes = [(at - begun) / 60 for at in times]
        marker = "o" if len(minutes) < 3 else None
        colour = colours[index % len(colours)]
        ax.plot(minutes, shares, color=colour, linewidth=1.0, label=name, marker=marker, markersize=3)
    ax.set_ylim(0, 100)
    ax.set_xlabel("minutes")
    ax.set_ylabel("CPU, %")
    if len(nodes) <= 8:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2, frameon=False, labelcolor=INK, fontsize=9)


def _without_gaps(tries: Sequence[Span]) -> tuple[Any, list[float]]:
    """A function from times to places on the axis, on which no idle time is longer than `GAP_S`, and the cuts."""
    import numpy as np

    knots, cuts, until = [(tries[0].start, 0.0)], list[float](), tries[0].start

    def reach(time: float, shown: float) -> None:
        knots.append((time, knots[-1][1] + shown))

    for span in tries:
        if span.start - until > GAP_S:
            reach(until, until - knots[-1][0])
            reach(span.start, GAP_S)
            cuts.append(knots[-1][1] - GAP_S / 2)
        until = max(until, span.end)
    reach(until, until - knots[-1][0])
    times, places = zip(*knots, strict=True)
    return lambda at: float(np.interp(at, times, places)), cuts


def _worker(line: Mapping[str, Any]) -> str:
    return f"{str(line.get('node'))[:8]}:{line.get('pid')}"
