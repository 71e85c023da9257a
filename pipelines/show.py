"""Tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.progress import hms

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.workflow import RunResult


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for part in parts:
        console.print(part)


def plan(result: dict[str, Any]) -> None:
    """Stages, refusals and estimates of a plan."""
    estimate = result["estimates"] or {}
    seconds, memory = estimate.get("seconds", {}), estimate.get("memory_bytes", {})
    table = _table(
        f"{result['name']}  (run key {result['run_key']})", "stage", "key", "state", "time ~", "memory ~", ""
    )
    table.columns[-1].justify = "left"
    for stage in result["stages"]:
        name = stage["name"]
        cost = "" if stage["cached"] or name not in seconds else hms(seconds[name])
        room = "" if stage["cached"] or name not in memory else size(memory[name])
        state = "[green]cached[/]" if stage["cached"] else "to do"
        table.add_row(name, stage["key"][:12], state, cost, room, stage["summary"])
    _print(table)
    if estimate:
        total = sum(seconds[s["name"]] for s in result["stages"] if not s["cached"]) + seconds["serve"]
        _print(
            f"about {hms(total)} and {size(estimate['disk_bytes'])} of disk (rough: from sizes and one matrix product)"
        )
    for refusal in result["refusals"]:
        _print(f"[red]refused[/]: {refusal}")


def result(outcome: RunResult) -> None:
    """The table at the end of a run, the endpoint, a curl to copy and MLflow's address."""
    from pipelines.endpoint import curl

    summary = outcome.summary
    stages = _table(f"{outcome.name}: {hms(outcome.seconds)}", "stage", "time", "units", "made now", "peak RSS")
    for record in outcome.stages:
        state = "cached" if record.cached else hms(record.seconds)
        stages.add_row(record.name, state, str(record.units), str(record.units_done), size(record.peak_rss_bytes))
    quality = _table("held-out rows", "model", "loss (nats/token)", "perplexity", "accuracy", "calibrated log-loss")
    for variant in ("dense", "nf4", "nf4_init", "adapter"):
        cells = (summary["losses"][variant], summary["perplexity"][variant])
        accuracy, calibrated = summary["accuracy"][variant], summary["calibrated_log_loss"][variant]
        quality.add_row(variant, *(f"{v:.4f}" for v in cells), _percent(accuracy), _number(calibrated))
    if summary["accuracy"]["majority"] is not None:
        quality.add_row("majority class", "", "", _percent(summary["accuracy"]["majority"]), "")
    _print(stages, quality, _sizes(summary))
    if summary["gains"]:
        gains = summary["gains"]
        for other in ("dense", "majority"):
            g = gains[other]
            _print(
                f"adapter over {other}: {100 * g['difference']:+.1f} points (95 % {100 * g['low']:+.1f} to {100 * g['high']:+.1f})"
            )
    registered = summary["registered"]
    _print(f"registered {registered['name']} version {registered['version']}: {registered['reason']}")
    if outcome.endpoint:
        endpoint(outcome.endpoint, registered["name"], curl(outcome.endpoint, registered["name"]))
    _print(f"report    {outcome.directory / 'report.html'}")
    _print(f"mlflow    {outcome.mlflow_uri}   (rankline ui --store {outcome.directory.parent})")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _sizes(summary: dict[str, Any]) -> str:
    facts = {name: stage["facts"] for name, stage in summary["stages"].items()}
    quantize, decompose = facts["quantize"], facts["decompose"]
    return (
        f"{quantize['num_tensors']} layers: {size(quantize['dense_bytes'])} dense -> {size(quantize['packed_bytes'])} packed "
        f"+ {size(quantize['factor_bytes'])} factors; mean rank {decompose['mean_rank']:.1f} keeps "
        f"{100 * decompose['mean_explained_energy']:.1f} % of the energy; mean error {quantize['mean_quantization_error']:.4f} "
        f"(plain NF4 {quantize['mean_plain_error']:.4f}), {quantize['num_fallback']} fallbacks"
    )


def endpoint(deployed: dict[str, Any], name: str, command: str) -> None:
    """Where an endpoint answers, and how to ask it."""
    _print(f"endpoint  {deployed['url']}  models {', '.join(deployed['model_ids'])}")
    print(f"try       {command}")


def status(found: dict[str, Any]) -> None:
    """Runs, stages, cluster and endpoint."""
    for record in found["runs"]:
        table = _table(f"{record['name']}  {record['status']}", "stage", "key", "state", "units", "time")
        for stage in record["stages"]:
            seconds = hms(stage["seconds"]) if stage["seconds"] is not None else ""
            table.add_row(stage["name"], stage["key"][:12], stage["state"], str(stage["units"]), seconds)
        _print(table)
        if record.get("error"):
            _print(f"[red]{record['error']}[/]")
    if not found["runs"]:
        _print(f"no runs in {found['store']}")
    cluster = found["cluster"]
    _print(f"cluster   {cluster['address'] + '  ' + cluster['dashboard_url'] if cluster else 'not running'}")
    for point in found["endpoints"]:
        _print(
            f"endpoint  {point['url']}  {'serving ' + ', '.join(point['models']) if point['models'] else 'not answering'}"
        )


def methods(found: dict[str, list[dict[str, str]]]) -> None:
    """What can be chosen."""
    for section, rows in found.items():
        table = _table(section, "name", "")
        table.columns[-1].justify = "left"
        for row in rows:
            table.add_row(row["name"], row["summary"])
        _print(table)


def doctor(found: list[dict[str, str]]) -> None:
    """Findings with remedies."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in found:
        _print(f"[{colours[check['state']]}]{check['state']:<5}[/] {check['name']:<16} {check['finding']}")
        if check["remedy"]:
            _print(f"      {'':<16} -> {check['remedy']}")
