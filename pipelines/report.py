"""What a person reads of a run: one HTML page that stands alone; plots and model card come from their own files.

The page asks nothing of the network and runs no script. Everything in it but our own charts goes through jinja2's
escaping, so that a prompt or a name is shown and never obeyed.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.card import (
    DASH,
    VARIANTS,
    base_model,
    count,
    judged_by,
    model_card,
    number,
    pair,
    percent,
    points,
    verdict,
)
from pipelines.config import PipelineConfig, to_dict
from pipelines.plots import (
    DEPTH_RAMP,
    MAX_PANELS,
    Layer,
    by_kind,
    draw_accuracy,
    draw_energy,
    draw_errors,
    draw_loss,
    draw_series,
    draw_spectra,
    read_layers,
    read_training,
    svg,
    write_plots,
)
from pipelines.progress import hms
from pipelines.show import size
from pipelines.timeline import MAX_WORKERS, draw_nodes, draw_timeline, of_run

if TYPE_CHECKING:
    from jinja2 import Environment


__all__ = ["model_card", "write_plots", "write_report"]

_PACKAGES = ("rankline", "torch", "transformers", "ray", "deepspeed", "bitsandbytes", "mlflow", "numpy")
_WIDE = (5.2, 2.6)
_ORDER = ("shard", "decompose", "quantize", "finetune", "evaluate", "register")
_WEIGHTS = "adapter_model.safetensors"


def write_report(
    path: Path,
    config: PipelineConfig,
    summary: Mapping[str, Any],
    artifacts: Mapping[str, Path],
    nodes: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Write the page of a finished run.

    Args:
        path: The HTML file.
        config: The pipeline.
        summary: What `pipelines.summary.summarise` returns.
        artifacts: Directory of each stage's output, by name; what is missing there is left out of the page.
        nodes: (seconds since the epoch, CPU use in percent) of each node.
    """
    page = _environment().get_template("report.html.j2").render(_view(config, summary, artifacts, nodes or {}))
    path.write_text(page, encoding="utf-8")


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"num": number, "pct": percent, "points": points, "size": _size, "hms": hms, "count": count}
    return env


def _view(
    config: PipelineConfig,
    summary: Mapping[str, Any],
    artifacts: Mapping[str, Path],
    nodes: Mapping[str, Sequence[tuple[float, float]]],
) -> dict[str, Any]:
    """All that the template shows."""
    layers, lines = read_layers(artifacts), read_training(artifacts)
    facts = {name: stage.get("facts") or {} for name, stage in summary["stages"].items()}
    evaluation = facts.get("evaluate", {})
    return {
        "summary": summary,
        "facts": facts,
        "variants": VARIANTS,
        "base": base_model(config),
        "config": config,
        "verdict": verdict(summary),
        "loss_pair": pair(summary["losses"]["nf4_init"], summary["losses"]["adapter"]),
        "metric": judged_by(evaluation),
        "evaluated": evaluation.get("adapter") or {},
        "majority_label": (evaluation.get("majority") or {}).get("label"),
        "gains": _gains(summary),
        "curl": _curl(summary),
        "machine": machine(),
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "sizes": _sizes(facts, artifacts),
        "kinds": _kind_rows(layers),
        "more_kinds": max(0, len(by_kind(layers)) - MAX_PANELS),
        "depths": (min(layer.depth for layer in layers), max(layer.depth for layer in layers)) if layers else None,
        "ramp": DEPTH_RAMP,
        "charts": _charts(layers, lines, evaluation) | {"timeline": _timeline(artifacts), "nodes": _nodes(nodes)},
        "training": _training(lines),
        "samples": _samples(evaluation.get("samples") or []),
        "stages": _stages(summary, artifacts),
        "hashes": _hashes(artifacts),
        "yaml": redact(_yaml(config)),
        "mlflow_uri": redact(str(summary["mlflow"]["uri"])),
    }


def _size(value: float | None) -> str:
    return DASH if value is None else size(value)


def _gains(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Gains in accuracy with what their interval allows to say."""
    order = [*VARIANTS, "majority"]
    found = summary.get("gains") or {}
    rows = []
    for name in sorted(found, key=lambda name: order.index(name) if name in order else len(order)):
        low, high = found[name]["low"], found[name]["high"]
        reading = "better" if low > 0 else "worse" if high < 0 else "not told apart"
        rows.append({"over": "majority class" if name == "majority" else name, "reading": reading, **found[name]})
    return rows


def _curl(summary: Mapping[str, Any]) -> str | None:
    """A request to copy; the token stays in its file."""
    if not summary.get("endpoint"):
        return None
    from pipelines.endpoint import curl

    return curl(summary["endpoint"], summary["registered"]["name"])


def machine() -> dict[str, str]:
    """The driver's machine and the versions that matter."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    found = {
        "processor": _cpu_name(),
        "cores": f"{cores} physical, {os.cpu_count()} logical",
        "memory": size(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    return found | {name: version for name in _PACKAGES if (version := _version(name)) is not None}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sizes(facts: Mapping[str, Mapping[str, Any]], artifacts: Mapping[str, Path]) -> dict[str, Any]:
    """Bytes before and after, and the parameters that were trained."""
    quantize, finetune = facts.get("quantize", {}), facts.get("finetune", {})
    dense, packed, factors = (quantize.get(f"{name}_bytes") for name in ("dense", "packed", "factor"))
    after = None if packed is None or factors is None else packed + factors
    return {
        "dense": dense,
        "packed": packed,
        "factors": factors,
        "ratio": dense / after if dense and after else None,
        "adapter": _file_bytes(artifacts, "adapter"),
        "plain": _file_bytes(artifacts, "plain-lora"),
        "trained": finetune.get("num_parameters"),
        "parameters": facts.get("shard", {}).get("num_parameters"),
        "fallbacks": quantize.get("num_fallback"),
        "layers": quantize.get("num_tensors"),
    }


def _file_bytes(artifacts: Mapping[str, Path], unit: str) -> int | None:
    path = artifacts["finetune"] / "units" / unit / _WEIGHTS if "finetune" in artifacts else None
    return path.stat().st_size if path is not None and path.is_file() else None


def _kind_rows(layers: Sequence[Layer]) -> list[dict[str, str]]:
    """One row per type of layer: shape, rank, energy and errors."""
    rows = []
    for kind, group in by_kind(layers).items():
        shapes = sorted({"×".join(map(str, layer.shape)) for layer in group})
        plain, split = (_mean([getattr(layer, f"{name}_error") for layer in group]) for name in ("plain", "split"))
        rows.append(
            {
                "kind": kind,
                "count": str(len(group)),
                "shape": shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes",
                "rank": _range([layer.rank for layer in group], "{:.0f}"),
                "energy": _range([None if layer.energy is None else 100 * layer.energy for layer in group], "{:.1f}"),
                "mean_energy": percent(_mean([layer.energy for layer in group])),
                "plain": number(plain),
                "split": number(split),
                "change": percent((split - plain) / plain).replace("-", "−") if plain and split is not None else DASH,
            }
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _range(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    low, high = form.format(min(known)), form.format(max(known))
    return low if low == high else f"{low} to {high}"


def _charts(
    layers: Sequence[Layer], lines: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]
) -> dict[str, list[tuple[str, Any]]]:
    """(title, SVG) of every chart, by section."""
    groups = list(by_kind(layers).items())[:MAX_PANELS]
    charts: dict[str, list[tuple[str, Any]]] = {
        "spectra": [],
        "energy": [],
        "errors": [],
        "training": [],
        "accuracy": [],
    }
    for kind, group in groups:
        if any(layer.sigmas for layer in group):
            draw = partial(draw_spectra, group=group, layers=layers)
            _add(charts["spectra"], kind, svg(draw, f"s{len(charts['spectra'])}", f"Singular values of {kind}"))
        if any(layer.plain_error is not None for layer in group):
            errors = partial(draw_errors, group=group, layers=layers)
            _add(charts["errors"], kind, svg(errors, f"e{len(charts['errors'])}", f"Quantization error of {kind}"))
    shown = [layer for _, group in groups for layer in group]
    if any(layer.energy is not None for layer in shown):
        tall = (_WIDE[0], 0.8 + 0.28 * len(groups))
        energy = svg(partial(draw_energy, layers=shown), "energy", "Explained energy by type of layer", tall)
        _add(charts["energy"], "Explained energy at the chosen rank", energy)
    _training_charts(charts["training"], lines)
    if any((evaluation.get(name) or {}).get("accuracy") is not None for name in VARIANTS):
        bars = svg(partial(draw_accuracy, evaluation=evaluation), "accuracy", "Held-out accuracy by model", _WIDE)
        _add(charts["accuracy"], "Held-out accuracy", bars)
    return charts


def _timeline(artifacts: Mapping[str, Path]) -> list[tuple[str, Any]]:
    tries = of_run(artifacts)
    found: list[tuple[str, Any]] = []
    if tries:
        rows = min(len({span.worker for span in tries}), MAX_WORKERS)
        size = (_WIDE[0] * 1.5, 1.2 + 0.24 * rows)
        _add(found, "Who worked when", svg(partial(draw_timeline, tries=tries), "timeline", "Units by process", size))
    return found


def _nodes(nodes: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    if nodes:
        chart = svg(partial(draw_nodes, nodes=nodes), "nodes", "CPU use by node", (_WIDE[0] * 1.5, 2.2))
        _add(found, "How busy the nodes were", chart)
    return found


def _training_charts(found: list[tuple[str, Any]], lines: Sequence[Mapping[str, Any]]) -> None:
    if not lines:
        return
    _add(found, "Loss", svg(partial(draw_loss, lines=lines), "loss", "Training loss by step", _WIDE))
    series = (
        ("Learning rate", "lr", "learning rate × 10⁻⁴", 1e4),
        ("Gradient norm", "grad_norm", "gradient norm before clipping", 1.0),
        ("Throughput", "tokens_per_second", "tokens per second", 1.0),
    )
    for title, key, label, scale in series:
        if any(line.get(key) is not None for line in lines):
            draw = partial(draw_series, lines=lines, field=key, label=label, scale=scale)
            _add(found, title, svg(draw, key.replace("_", "-"), f"{title} by step", _WIDE))


def _add(found: list[tuple[str, Any]], title: str, chart: str) -> None:
    """Our own SVG is the only markup that passes unescaped; matplotlib has escaped the text in it."""
    from markupsafe import Markup

    found.append((title, Markup(chart)))


def _training(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Totals of the training log."""
    if not lines:
        return None
    seconds = sum(line.get("seconds") or 0.0 for line in lines)
    tokens = sum(line.get("tokens") or 0 for line in lines)
    return {
        "steps": len(lines),
        "seconds": seconds,
        "tokens": tokens or None,
        "rate": tokens / seconds if tokens and seconds else None,
        "first": lines[0]["loss"],
        "last": lines[-1]["loss"],
    }


def _samples(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per prompt with what the base said before training and what the adapter says."""
    rows: dict[Any, dict[str, Any]] = {}
    for sample in found:
        start = {"prompt": sample["prompt"], "expected": sample["expected"], "answers": {}}
        rows.setdefault(sample["row"], start)["answers"][sample["variant"]] = sample["got"]
    return list(rows.values())


def _stages(summary: Mapping[str, Any], artifacts: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Stages with the nodes that made their units and the keys that went in."""
    rows = []
    for name, stage in sorted(summary["stages"].items(), key=lambda item: _ORDER.index(item[0])):
        nodes = _json(artifacts, name, "sidecar.json").get("nodes") or []
        inputs = _json(artifacts, name, "manifest.json").get("inputs") or {}
        rows.append(
            {"name": name, "nodes": [node[:8] for node in nodes], "inputs": sorted(inputs, key=_ORDER.index), **stage}
        )
    return rows


def _hashes(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """Content hashes of what came from outside, as the stages' manifests hold them."""
    wanted = {
        "model": ("shard", "model"),
        "training rows": ("finetune", "train"),
        "held-out rows": ("evaluate", "heldout"),
    }
    found = {
        label: _json(artifacts, stage, "manifest.json").get("config", {}).get(field)
        for label, (stage, field) in wanted.items()
    }
    return {label: value for label, value in found.items() if value}


def _json(artifacts: Mapping[str, Path], stage: str, name: str) -> dict[str, Any]:
    import json

    path = artifacts[stage] / name if stage in artifacts else None
    found: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    return found


def _yaml(config: PipelineConfig) -> str:
    import yaml

    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    return text


def redact(text: str) -> str:
    """User and password of every URI replaced: a report is passed around."""
    return re.sub(r"(://)[^/\s@]*@", r"\1***@", text)
