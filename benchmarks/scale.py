"""Does `rankline plan --model-config` tell the truth? python benchmarks/scale.py [5M 20M 60M] [--rates FILE]

First this machine is measured by micro-benchmarks alone (`scale_micro.py`, `scale_starts.py`); then three random
Llama-like models that none of them has seen go through `rankline run`, and every stage's seconds and a training rank's
memory are compared with what was predicted. Ratios are predicted over measured; 0.7 to 1.4 is the aim. A busy machine
falsifies both sides: the load average before and after stands beside each row, and `--repeat` takes the least of runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import RESULTS, machine, versions

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PACKAGES = ["rankline", "torch", "transformers", "ray", "deepspeed", "mlflow"]
LOW, HIGH = 0.7, 1.4
#: hidden, feed-forward, layers, vocabulary, heads
SIZES = {"5M": (256, 768, 5, 2048, 4), "20M": (448, 1216, 7, 4096, 7), "60M": (640, 1728, 11, 8192, 10)}
TRAIN, HELDOUT, STEPS, BATCH, MICRO = 96, 48, 12, 8, 4
HEAVY = ("decompose", "quantize", "finetune", "evaluate")
_WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def measured_rates() -> Any:
    """This machine's `Rates`, from micro-benchmarks alone."""
    import scale_micro as micro

    from pipelines import stage_work
    from pipelines.devices import Rates

    cores = os.cpu_count() or 1
    core, disk, starts = micro.run("core", cores), micro.run("disk"), micro.run("starts")
    operators = 3 * (stage_work.LAYER_OPS + 7 * stage_work.ADAPTER_OPS)
    op_s = core["layer_small_s"] / operators
    d, f, tokens = micro.WIDTH, micro.FEED, micro.TOKENS
    weights, features = 4 * d * d + 3 * d * f, 4 * 2 * d + 3 * (d + f)
    flops = 2.0 * weights * tokens * 2 + 3 * 2.0 * micro.RANK * features * tokens
    flops += 3 * 4.0 * d * (tokens / 4) * tokens
    numbers = stage_work.HIDDEN_PASSES * d + stage_work.FEATURE_PASSES * features
    rest = core["layer_large_s"] - flops / core["rank_flops"] - operators * op_s
    passes = 3 * 4.0 * numbers * tokens
    rank_bytes = passes / rest if rest > 0 else core["core_bytes_per_s"]
    fixed = {name: starts[name] for name in ("start", "shard", "ray_data", *HEAVY, "register", "checkpoint")}
    fixed |= {"unit": core["unit_s"], "tensor": (core["tensor_decompose_s"] + core["tensor_quantize_s"]) / 2}
    same = ("rank_flops", "core_flops", "core_bytes_per_s", "core_quantize_per_s", "rank_dequantize_per_s")
    return Rates(
        device=f"{machine()['cpu']}, {cores} cores",
        rank_bytes_per_s=rank_bytes,
        rank_op_s=op_s,
        core_hash_bytes_per_s=core["core_hash_bytes_per_s"],
        link_bytes_per_s=1e9,
        network_bytes_per_s=1e9,
        cores=cores,
        process_bytes=int(starts["process_bytes"]),
        fixed_s=fixed,
        notes=("measured by benchmarks/scale_micro.py and benchmarks/scale_starts.py",),
        **{name: core[name] for name in same},
        **disk,
    )


def prepare(root: Path, size: str) -> tuple[Path, Any]:
    """A random model and synthetic rows; the pipeline's file, and the rows as the plan wants to know them."""
    import torch
    from tiny import make_tokenizer, write_jsonl
    from transformers import AutoModelForCausalLM, LlamaConfig

    from pipelines.stage_work import Rows

    hidden, feed, layers, vocabulary, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / "model")
    make_tokenizer(root / "model")
    made = {"train": _rows(TRAIN, 1), "heldout": _rows(HELDOUT, 2)}
    for name, rows in made.items():
        write_jsonl(root / f"{name}.jsonl", rows)
    answers = sum(len(row["completion"]) + 1 for row in made["train"])
    tokens = sum(len(row["prompt"]) for row in made["train"]) + answers  # one per character
    values = {
        "name": "scale",
        "model": {"source": str(root / "model")},
        "data": {name: str(root / f"{name}.jsonl") for name in made} | {"max_length": 256, "max_labels": 2},
        "decompose": {"rank": 16},
        "finetune": {
            "num_workers": 2,
            "zero_stage": 2,
            "global_batch_size": BATCH,
            "micro_batch_size": MICRO,
            "max_steps": STEPS,
        },
        "evaluate": {"must_improve": False},
        "serve": {"enabled": False},
        "store": {"path": str(root / "store")},
    }
    (root / "pipeline.yaml").write_text(json.dumps(values))
    return root / "pipeline.yaml", Rows(
        train=TRAIN, heldout=HELDOUT, tokens=tokens / TRAIN, answer_share=answers / tokens
    )


def _rows(count: int, seed: int) -> list[dict[str, str]]:
    words = random.Random(seed)
    return [
        {
            "prompt": " ".join(words.choice(_WORDS) for _ in range(20)) + f" {seed}{index} ",
            "completion": " ".join(words.choice(_WORDS) for _ in range(14)),
        }
        for index in range(count)
    ]


def go(pipeline: Path) -> dict[str, float]:
    """One cold run in a store of its own: seconds by stage and in all, and the peak memory of a training rank."""
    store = pipeline.parent / "store"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "pipelines.cli"]
    try:
        arguments = ["run", str(pipeline), "--json", "--quiet"]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the run ended with {done.returncode}:\n{done.stderr[-3000:]}")
        summary = json.loads(done.stdout[done.stdout.index("{") :])
        (outcome,) = (store / "_artifacts" / "finetune").glob("*/outcome.json")
        found = {name: float(stage["seconds"]) for name, stage in summary["stages"].items()}
        memory = float(json.loads(outcome.read_text())["peak_rss_bytes"])
        return found | {"total": float(summary["seconds"]), "memory": memory}
    finally:
        subprocess.run([*command, "stop", "--store", str(store)], env=environment, capture_output=True)


def compare(size: str, rates: Any, repeat: int) -> list[dict[str, Any]]:
    """Rows of one size: predicted, measured, ratio, and whether it is within the aim."""
    from pipelines.config import PipelineConfig
    from pipelines.model_shape import read_shape
    from pipelines.scale import plan_scale
    from pipelines.stage_work import Cluster

    before, least = os.getloadavg()[0], {}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as directory:
            pipeline, rows = prepare(Path(directory), size)
            config = PipelineConfig.from_yaml(pipeline)
            shape = read_shape(Path(directory) / "model" / "config.json", config)
            plan = plan_scale(config, shape, Cluster(nodes=1, gpus_per_node=0, rates=rates), rows)
            for name, value in go(pipeline).items():
                least[name] = min(value, least.get(name, value))
    predicted = {stage["name"]: stage["seconds"] for stage in plan["stages"]}
    predicted |= {"total": plan["seconds"], "memory": float(plan["memory"]["peak"])}
    fixed = {stage["name"]: stage["fixed_s"] for stage in plan["stages"]}
    load = [round(before, 1), round(os.getloadavg()[0], 1)]
    return [
        {
            "job": f"{size} {name}",
            "parameters": plan["num_parameters"],
            "predicted": value,
            "measured": least[name],
            "unit": "bytes" if name == "memory" else "s",
            "fixed_s": fixed.get(name),
            "ratio": value / least[name],
            "aim": name in (*HEAVY, "total", "memory"),
            "met": LOW <= value / least[name] <= HIGH,
            "load": load,
        }
        for name, value in predicted.items()
    ]


def main() -> None:
    """Measure, predict, run, compare; the file grows by one size after the other."""
    parser = argparse.ArgumentParser(description="Compare plans on paper with runs.")
    parser.add_argument("sizes", nargs="*", help=f"of {', '.join(SIZES)} (all)")
    parser.add_argument("--rates", type=Path, metavar="FILE", help="write this machine's figures, for plan --device")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each size, of which the least counts")
    chosen = parser.parse_args()
    rates = measured_rates()
    print(json.dumps(dataclasses.asdict(rates), indent=1), flush=True)
    if chosen.rates:
        chosen.rates.write_text(json.dumps(dataclasses.asdict(rates), indent=1) + "\n")
    rows: list[dict[str, Any]] = []
    for size in chosen.sizes or SIZES:
        rows += compare(size, rates, chosen.repeat)
        facts = {"machine": machine(), "versions": versions(PACKAGES), "rates": dataclasses.asdict(rates)}
        (RESULTS / "scale.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
        for row in rows[-8:]:
            mark = ("met" if row["met"] else "NOT MET") if row["aim"] else ""
            scale, unit = (2**20, "MiB") if row["unit"] == "bytes" else (1, "s")
            print(
                f"{row['job']:<14} predicted {row['predicted'] / scale:8.1f} {unit:<3} measured "
                f"{row['measured'] / scale:8.1f} {unit:<3} ratio {row['ratio']:5.2f}  {mark:<8} load {row['load']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
