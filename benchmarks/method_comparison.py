"""Every adapter family on one task by one recipe: benchmarks/method_comparison.py [FAMILY ...] [--full] [--table]

Over plain NF4, about as many trained numbers as a LoRA of rank 8 where the family allows it, three seeds. The line
makes base and tokens, its training loop under DeepSpeed trains every cell in a process of its own, without Ray and
checkpoints, and its evaluation scores it. Two cells run at a time, one thread each; what has a row is passed over.

- The first four layers of SmolLM2-135M and short worked answers to GSM8K questions, one epoch (20 steps of 8 rows), 48
  held-out rows.
  Four layers alone predict nothing (15.5 nats a token): how far a family brings them in few steps is what is compared.
  On the demo's reviews they tell nothing apart: sixteen families after 30 steps, a LoRA and all weights after 100, were
  at the frequency of the labels (0.32 to 0.40 nats, 64 %).
- `--full`: the whole model and the demo's reviews, one epoch (70 steps), 300 held-out rows.

Families want different learning rates. Each gets the one with the least loss on training rows that are kept back from a
short training with AdamW on the others (seed 17, no family's own schedule), of the rates of `Part` and fourfold larger
or smaller ones for as long as the largest or smallest is the best: held-out rows choose nothing. Steps are timed alone,
all families in turn on the same rows in one process of two threads (`--steps`).

`--table` prints what is there. Writes comparison-four (or -whole) .json, .md and .png to benchmarks/results; the table
grows by cells.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from comparison_recipe import (
    BATCH,
    CELLS,
    PARTS,
    RATE_SEED,
    ROOT,
    SEEDS,
    STORE,
    WHOLE,
    Part,
    Prepared,
    cell_source,
    first_layers,
    is_split,
    part_of,
    prepare,
    settings,
)
from comparison_table import picture, table
from harness import keep_memory, machine, versions

if TYPE_CHECKING:
    from cluster.config import FinetuneConfig

RESULTS = ROOT / "benchmarks" / "results"
TIMED_STEPS = 8


def plain_steps(source: Any, tokens: Any, rows: int, rate: float, steps: int) -> Iterator[Any]:
    """Plain AdamW steps on the first `rows` rows; yields the model after each."""
    import torch

    from cluster.answer_loss import answer_nll
    from cluster.batches import Plan, collate, learning_rate
    from cluster.config import FinetuneConfig
    from cluster.model import build_adapted
    from cluster.train_engine import set_training
    from cluster.training_state import trained_parameters

    config = FinetuneConfig(learning_rate=rate, global_batch_size=BATCH, micro_batch_size=4, seed=RATE_SEED)
    table = tokens.head(rows)
    plan = Plan(table.lengths, config, 128)
    model = build_adapted(source, torch.float32, {"adapter": None})
    set_training(model, True)
    parameters = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=config.betas, weight_decay=0.0)
    batches = [batch for epoch in range(1 + steps * BATCH // rows) for batch in plan.batches(epoch)][:steps]
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        answers = sum(table.num_answer_tokens[row] for row in batch)
        for part in (batch[:4], batch[4:]):
            (answer_nll(model, collate([[row] for row in part], table)) / answers).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield model


def rate_losses(label: str, source: str, prepared: dict[bool, Prepared], known: dict[str, float]) -> dict[str, float]:
    """Loss on the kept-back training rows after a short training, by learning rate; `known` ones are taken over."""
    import torch

    torch.set_num_threads(1)
    where, tokens = cell_source(label, source, prepared)
    found, part = dict(known), PARTS[part_of(source)]
    while (rate := next_rate(found, part)) is not None:
        found[str(rate)] = rate_loss(where, tokens, rate, part)
    return found


def next_rate(found: dict[str, float], part: Part) -> float | None:
    """A rate that is still to be tried: one of the part's, or one beyond the best where that is at an edge."""
    missing = [rate for rate in part.rates if str(rate) not in found]
    if missing:
        return missing[0]
    best, tried = best_rate(found), [float(rate) for rate in found]
    return 4 * best if best == max(tried) else best / 4 if best == min(tried) else None


def rate_loss(where: Any, tokens: Any, rate: float, part: Part) -> float:
    """Loss on the kept-back training rows after a short training on the others; infinite where it diverged."""
    import torch

    from cluster.answer_loss import answer_nll
    from cluster.batches import collate

    rows = len(tokens) - part.rate_rows
    kept = range(rows, len(tokens))
    torch.manual_seed(RATE_SEED)
    *_, model = plain_steps(where, tokens, rows, rate, part.rate_steps)
    model.eval()
    with torch.no_grad():
        batches = [kept[start : start + BATCH] for start in range(0, len(kept), BATCH)]
        parts = [answer_nll(model, collate([[row] for row in batch], tokens)) for batch in batches]
    loss = float(torch.stack(parts).sum()) / sum(tokens.num_answer_tokens[row] for row in kept)
    return loss if math.isfinite(loss) else math.inf


def best_rate(losses: dict[str, float]) -> float:
    """The rate of the least loss."""
    return float(min(losses, key=losses.__getitem__))


def time_steps(labels: list[str], source: str) -> dict[str, float]:
    """Median seconds of a step of every family on the same rows, the families in turn."""
    import torch

    torch.set_num_threads(2)
    prepared, running = prepare(source), {}
    for label in labels:
        where, tokens = cell_source(label, source, prepared)
        running[label] = plain_steps(where, tokens, len(tokens), 1e-4, TIMED_STEPS + 1)
        next(running[label])
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    for _ in range(TIMED_STEPS):
        for label in labels:
            began = time.perf_counter()
            next(running[label])
            seconds[label].append(time.perf_counter() - began)
    return {label: median(found) for label, found in seconds.items()}


def measure(label: str, source: str, config: FinetuneConfig, made: Prepared) -> dict[str, Any]:
    """Train one cell in a process of its own with the pipeline's engine and loop, and score it before and after."""
    from training_ranks import Ranks, serve_ours

    from cluster.train_job import TrainJob

    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        where = replace(made.base, adapter=config.adapter)
        job = TrainJob(
            source=where, config=config, train_tokens=made.tokens, heldout_tokens=None,
            root=root / "units", storage=root / "ray", name=label,
        )  # fmt: skip
        with Ranks(serve_ours, 1, {label: job}) as cell:
            [before] = cell.ask("scores", label, made.heldout, made.labels)
            [seconds] = cell.ask("advance", label, 2**31)
            [after] = cell.ask("scores", label, made.heldout, made.labels)
            [trained], [peak] = cell.ask("parameters", label), cell.ask("peak")
    return {
        "family": label,
        "seed": config.seed,
        "model": part_of(source),
        "learning_rate": config.learning_rate,
        "num_parameters": trained,
        "loss": after["loss"],
        "loss_at_start": before["loss"],
        "error_at_start": made.error,
        "accuracy": after["accuracy"],
        "train_s": seconds,
        "peak_rss_bytes": peak,
    }


def write(found: dict[str, Any], part: str) -> None:
    """The results so far, whole or not at all."""
    facts = {"machine": machine(), "versions": versions(["torch", "transformers", "deepspeed", "peft"])}
    path = RESULTS / f"comparison-{part}.json"
    path.with_suffix(".tmp").write_text(json.dumps(facts | found, indent=1) + "\n")
    path.with_suffix(".tmp").replace(path)
    if found["rows"]:
        (RESULTS / f"comparison-{part}.md").write_text(table(found) + "\n")
        picture(found["rows"], RESULTS / f"comparison-{part}.png")


def compute(found: dict[str, Any], labels: list[str], source: str, seeds: list[int]) -> None:
    """Everything that is missing, two jobs at a time: the rates of the families first, then the cells by seed."""
    part = part_of(source)
    done = {(row["family"], row["seed"]) for row in found["rows"]}
    prepared = prepare(source)
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=sys.path.insert, initargs=(0, str(ROOT))) as pool:
        known = {k: found["rates"].get(k, {}) for k in labels}
        wanted = [k for k in labels if next_rate(known[k], PARTS[part]) is not None]
        scans = {pool.submit(rate_losses, k, source, prepared, known[k]): k for k in wanted}
        for scan in as_completed(scans):
            found["rates"][scans[scan]] = scan.result()
            print(f"{scans[scan]}: loss by learning rate {scan.result()}", flush=True)
            write(found, part)
    wanted_cells = [(label, seed) for seed in seeds for label in labels if (label, seed) not in done]
    # Settings are read here, not on the threads: Python 3.11 cannot parse source on two at a time.
    configs = [
        settings("cell", source, CELLS[k], seed, best_rate(found["rates"][k])).finetune for k, seed in wanted_cells
    ]
    with ThreadPoolExecutor(2) as pool:
        cells = {
            pool.submit(measure, label, source, config, prepared[is_split(label)]): (label, seed)
            for (label, seed), config in zip(wanted_cells, configs, strict=True)
        }
        for cell in as_completed(cells):
            if (error := cell.exception()) is not None:
                print(f"{cells[cell]}: {error!r}", flush=True)
                continue
            found["rows"].append(cell.result())
            print(f"{cells[cell]}: loss {cell.result()['loss']:.4f}", flush=True)
            write(found, part)
    failed = [cells[cell] for cell in cells if cell.exception() is not None]
    if failed:
        sys.exit(f"failed: {failed}; the others are kept")


def main() -> None:
    """Run what is asked for and missing, and write table and picture after every cell."""
    parser = argparse.ArgumentParser(description="Compare the adapter families on one task by one recipe.")
    parser.add_argument("only", nargs="*", help=f"families (all): {', '.join(CELLS)}")
    parser.add_argument("--full", action="store_true", help="the whole model instead of its first four layers")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds")
    parser.add_argument("--steps", action="store_true", help="time the steps, alone")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    chosen = parser.parse_args()
    keep_memory()
    unknown = [name for name in chosen.only if name not in CELLS]
    if unknown:
        parser.error(f"unknown families {unknown}; allowed are {list(CELLS)}")
    part, labels = "whole" if chosen.full else "four", chosen.only or list(CELLS)
    path = RESULTS / f"comparison-{part}.json"
    found: dict[str, Any] = {"rates": {}, "steps": {}, "rows": []}
    if path.is_file():
        found |= {key: value for key, value in json.loads(path.read_text()).items() if key in found}
    if not chosen.table:
        source = WHOLE if chosen.full else str(first_layers(STORE / "_four-layers"))
        if not chosen.steps:
            compute(found, labels, source, list(SEEDS[: chosen.seeds]))
        if chosen.steps or not all(label in found["steps"] for label in labels):
            found["steps"] |= time_steps(labels, source)
        write(found, part)
    if found["rows"]:
        print(table(found))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
