"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.progress import hms

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipelines.maintenance import Garbage
    from pipelines.workflow import RunResult


#: Columns from which a table has room for sentences.
WIDE = 100


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def new_table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        # A stage's name, a key or a time is never broken; only sentences may be.
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _add_sentences(table: Table) -> None:
    table.add_column("", justify="left", overflow="fold")


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def print_all(*parts: Any) -> None:
    """Tables, and sentences wrapped at words; text is never read as markup (messages hold brackets)."""
    console = _console()
    for part in parts:
        console.print(part)


def _copyable(text: str) -> None:
    """A line with a path, an address or a command: never broken, however narrow the terminal."""
    print(text, flush=True)


def _marked(style: str, word: str, rest: str) -> Text:
    from rich.text import Text

    return Text.assemble((word, style), rest)


def plan(result: dict[str, Any]) -> None:
    """Stages, refusals and estimates of a plan."""
    from rich.text import Text

    estimate = result["estimates"] or {}
    seconds, memory = estimate.get("seconds", {}), estimate.get("memory_bytes", {})
    key = f"  (run key {result['run_key']})" if result["run_key"] else ""
    table = new_table(f"{result['name']}{key}", "stage", "key", "state", "time ~", "memory ~")
    wide = _console().width >= WIDE
    if wide:
        _add_sentences(table)
    for stage in result["stages"]:
        name = stage["name"]
        cost = "" if stage["cached"] or name not in seconds else hms(seconds[name])
        room = "" if stage["cached"] or name not in memory else size(memory[name])
        state = Text("cached", "green") if stage["cached"] else Text("to do" if stage["key"] else "?")
        cells = [name, (stage["key"] or "")[:12], state, cost, room]
        table.add_row(*cells, *([Text(stage["summary"])] if wide else []))
    if result["run_key"]:
        print_all(table)
    if estimate:
        todo = sum(seconds[s["name"]] for s in result["stages"] if not s["cached"]) + seconds["serve"]
        print_all(
            f"about {hms(todo)} and {size(estimate['disk_bytes'])} of disk; rough: {_assumptions(estimate['assumed'])}"
        )
    for refusal in result["refusals"]:
        print_all(_marked("red", "refused: ", refusal))


def _assumptions(assumed: dict[str, Any]) -> str:
    return (
        f"{assumed['num_parameters'] / 1e6:.0f} M parameters, {assumed['training_rows']} training rows of "
        f"{assumed['tokens_per_training_row']} tokens and {assumed['heldout_rows']} held-out rows of "
        f"{assumed['tokens_per_heldout_row']} (bytes / 4), {assumed['gflops_per_second']} GFLOP/s on "
        f"{assumed['cores']} cores, nothing else running"
    )


def result(outcome: RunResult) -> None:
    """The table at the end of a run, the endpoint, a curl to copy and MLflow's address."""
    from pipelines.endpoint import curl

    summary = outcome.summary
    stages = new_table(f"{outcome.name}: {hms(outcome.seconds)}", "stage", "time", "units", "made now", "peak RSS")
    for record in outcome.stages:
        state = "cached" if record.cached else hms(record.seconds)
        stages.add_row(record.name, state, str(record.units), str(record.units_done), size(record.peak_rss_bytes))
    quality = new_table("held-out rows", "model", "nats/token", "perplexity", "accuracy", "calibrated log-loss")
    for variant in ("dense", "nf4", "nf4_init", "adapter"):
        cells = (summary["losses"][variant], summary["perplexity"][variant])
        accuracy, calibrated = summary["accuracy"][variant], summary["calibrated_log_loss"][variant]
        quality.add_row(variant, *(f"{v:.4f}" for v in cells), _percent(accuracy), _number(calibrated))
    if summary["accuracy"]["majority"] is not None:
        quality.add_row("majority class", "", "", _percent(summary["accuracy"]["majority"]), "")
    print_all(stages, quality, _sizes(summary))
    for other in ("dense", "majority") if summary["gains"] else ():
        gain = summary["gains"][other]
        difference, low, high = (100 * gain[name] for name in ("difference", "low", "high"))
        print_all(
            f"adapter over {other}: {difference:+.1f} points of accuracy (95 % interval {low:+.1f} to {high:+.1f})"
        )
    registered = summary["registered"]
    print_all(f"registered {registered['name']} version {registered['version']}: {registered['reason']}")
    if outcome.endpoint:
        endpoint(outcome.endpoint, registered["name"], curl(outcome.endpoint, registered["name"]))
    _copyable(f"report    {outcome.directory / 'report.html'}")
    embedded = (outcome.directory.parent / "_mlflow").is_dir()
    page = f"   (rankline ui --store {outcome.directory.parent})" if embedded else ""
    _copyable(f"mlflow    {outcome.mlflow_uri}{page}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _sizes(summary: dict[str, Any]) -> str:
    facts = {name: stage["facts"] for name, stage in summary["stages"].items()}
    quantize, decompose = facts["quantize"], facts["decompose"]
    dense, packed, factors = (size(quantize[f"{name}_bytes"]) for name in ("dense", "packed", "factor"))
    return (
        f"{quantize['num_tensors']} layers: {dense} dense -> {packed} packed + {factors} factors; "
        f"mean rank {decompose['mean_rank']:.1f} keeps {100 * decompose['mean_explained_energy']:.1f} % of the energy; "
        f"mean error {quantize['mean_quantization_error']:.4f} (plain NF4 {quantize['mean_plain_error']:.4f}), "
        f"{quantize['num_fallback']} fallbacks"
    )


def endpoint(deployed: dict[str, Any], name: str, command: str) -> None:
    """Where an endpoint answers, and how to ask it."""
    _copyable(f"endpoint  {deployed['url']}  models {', '.join(deployed['model_ids'])}")
    _copyable(f"try       {command}")


def status(found: dict[str, Any]) -> None:
    """Runs, stages, cluster and endpoint."""
    for record in found["runs"]:
        driver = f" (driver {record['driver']})" if record["driver"] else ""
        table = new_table(f"{record['name']}  {record['status']}{driver}", "stage", "key", "state", "units", "time")
        for stage in record["stages"]:
            seconds = hms(stage["seconds"]) if stage["seconds"] is not None else ""
            table.add_row(stage["name"], stage["key"][:12], stage["state"], str(stage["units"]), seconds)
        print_all(table)
        if record.get("error"):
            print_all(_marked("red", "error: ", record["error"]))
    if not found["runs"]:
        print_all(f"no runs in {found['store']}")
    cluster = found["cluster"]
    _copyable(f"cluster   {cluster['address'] + '  ' + cluster['dashboard_url'] if cluster else 'not running'}")
    for point in found["endpoints"]:
        answer = f"serving {', '.join(point['models'])}" if point["models"] else "not answering"
        _copyable(f"endpoint  {point['url']}  {answer}")


def methods(found: dict[str, list[dict[str, str]]]) -> None:
    """What can be chosen."""
    for section, rows in found.items():
        table = new_table(section, "name")
        _add_sentences(table)
        for row in rows:
            facts = [f"{key} {row[key]}" for key in ("rules", "weights", "low-rank form") if key in row]
            table.add_row(row["name"], "; ".join([row["summary"], *facts]))
        print_all(table)


def doctor(found: list[dict[str, str]]) -> None:
    """Findings with remedies."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    console = _console()
    for check in found:
        line = _marked(colours[check["state"]], f"{check['state']:<5}", f" {check['name']:<14} {check['finding']}")
        console.print(line, soft_wrap=True)
        if check["remedy"]:
            console.print(f"{'':<20} -> {check['remedy']}", soft_wrap=True)


def exported(facts: dict[str, Any]) -> None:
    """What `rankline export` wrote."""
    print(f"{facts['format']} of {facts['run']}: {facts['num_layers']} layers in {facts['out']}")
    if facts["format"] == "lora":
        kept = f"{100 * facts['retained_energy_mean']:.2f} % (least {100 * facts['retained_energy_min']:.2f} %)"
        print(f"rank {facts['rank']}, kept of the change's energy: {kept}")
    else:
        print(
            f"relative change of a weight {facts['change']:.4f}; quantizing the result to NF4 again would cost "
            f"{facts['requantization_error']:.4f}"
        )
    if "loss_trained" in facts:
        before, after = facts["loss_trained"], facts["loss_exported"]
        print(
            f"held-out loss over the original weights {after:.4f}, of the model as it was trained {before:.4f} "
            f"({after - before:+.4f}; {facts['loss_rows']} rows)"
        )


def verified(found: dict[str, Any]) -> None:
    """What `rankline verify` found."""
    from rich.text import Text

    colours = {"whole": "green", "damaged": "red"}
    title = f"{found['run']}: {size(found['bytes'])} in {hms(found['seconds'])}"
    table = new_table(title, "stage", "key", "state", "units", "files", "size")
    for stage in found["stages"]:
        state = Text(stage["state"], colours.get(stage["state"], ""))
        figures = str(stage["units"]), str(stage["files"]), size(stage["num_bytes"])
        table.add_row(stage["stage"], stage["key"][:12], state, *figures)
    print_all(table)
    for problem in found["problems"]:
        print_all(_marked("red", "damaged: ", problem))
    if any(stage["state"] == "damaged" for stage in found["stages"]):
        print_all("Delete the directory of a damaged stage and run again: it is made anew.")


def garbage(found: Sequence[Garbage], deleted: bool) -> None:
    """What `rankline gc` found, or removed."""
    if not found:
        print_all("nothing to remove: every artifact belongs to a run or a registered version")
        return
    title = f"{'removed' if deleted else 'not needed'}: {size(sum(one.num_bytes for one in found))}"
    table = new_table(title, "size", "path")
    for one in found:
        inner = one.path.parts[one.path.parts.index("_artifacts") + 1 :]
        table.add_row(size(one.num_bytes), "/".join(inner))
    print_all(table)
    if not deleted:
        print_all("`rankline gc --delete` removes it.")
