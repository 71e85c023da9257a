"""Fine-tuning a LoRA of rank 8 on SmolLM2-135M and rows of GSM8K: against PEFT and transformers' `Trainer`, over NF4,
under every ZeRO stage, on two workers; and what a split gives back of the perplexity that NF4 costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import THREADS, Row, row

#: Steps of a turn: both sides see the machine's drift.
TURN = 2


def trainer() -> list[Row]:
    """One epoch of the same rows from the same adapter in batches of 8 rows: ours of similar lengths, cut into
    micro-batches of 4; the peer's as `Trainer` takes them, drawn at random and padded to the longest."""
    from training_base import TRAIN_ROWS, scratch, training_job
    from training_ranks import Ranks, serve_ours, serve_peer

    from cluster.batches import Plan
    from cluster.model import initial_adapters
    from cluster.tokens import TokenTable
    from lowrank.adapters.peft_format import save_adapter

    job = training_job("lora", max_steps=None)
    start = scratch() / "start"
    save_adapter(start, initial_adapters(job.source), job.config.adapter, {})
    table = TokenTable.read(job.train_tokens)
    seconds = {"ours": 0.0, "peer": 0.0}
    rates = [gemm_rate()]
    with Ranks(serve_ours, 1, {"lora": job}) as ours, Ranks(serve_peer, 1, job, start) as peer:
        sides = {"ours": ours, "peer": peer}
        for _ in range(-(-Plan(table.lengths, job.config, 0).total_steps // TURN)):
            for name, side in sides.items():
                seconds[name] += side.ask("advance", "lora", TURN)[0]
            rates.append(gemm_rate())
        loss = {name: side.ask("heldout", "lora")[0] for name, side in sides.items()}
    rate = sum(table.lengths) / seconds["ours"]
    note = (
        f"{rate:.0f} against {sum(table.lengths) / seconds['peer']:.0f} real tokens/s over {TRAIN_ROWS} rows, "
        f"{seconds['ours']:.0f} and {seconds['peer']:.0f} s; errors are held-out losses"
    )
    throughput = row(
        "LoRA r = 8, all linears of SmolLM2, GSM8K, tokens/s",
        "PEFT and transformers.Trainer",
        seconds["peer"] / seconds["ours"],
        1.6,
        valid=abs(loss["ours"] - loss["peer"]) <= 0.01 * loss["peer"],
        error_ours=loss["ours"],
        error_peer=loss["peer"],
        note=note,
    )
    return [throughput, *ceilings(job, table, rate, statistics.median(rates))]


def ceilings(job: Any, table: Any, tokens_per_second: float, flops: float) -> list[Row]:
    """Our share of the rate at which a machine that only multiplied would train: forward 2 and backward 2 operations
    per frozen number and token. Numbers of the output head count where logits are computed (answer tokens), and once
    more in the plain row, at every token."""
    from cluster.artifacts import ShardSet

    shards = ShardSet(job.source.shards)
    linears = sum(math.prod(shards.tensors[f"{spec.name}.weight"].shape) for spec in shards.architecture.linears)
    head = math.prod(shards.tensors["model.embed_tokens.weight"].shape)
    answers = sum(table.num_answer_tokens) / sum(table.lengths)
    found = []
    for label, numbers, target in (
        ("the head at answers only", linears + head * answers, 0.60),
        ("the head at every token", linears + head, 0.0),
    ):
        note = f"N = {numbers / 1e6:.1f} M, {flops / 1e9:.0f} GFLOP/s: {flops / (4 * numbers):.0f} tokens/s at most"
        job_name = f"share of the 4N ceiling, {label}"
        found.append(row(job_name, "fp32 products alone", tokens_per_second * 4 * numbers / flops, target, note=note))
    return found


def gemm_rate(size: int = 2048, repeats: int = 5) -> float:
    """The best of a few fp32 products, in operations per second."""
    torch.set_num_threads(THREADS)
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


#: Largest share of plain data parallel's gradient and optimizer bytes, by stage.
HELD = {1: 0.70, 2: 0.55, 3: 0.55}


def zero() -> list[Row]:
    """Two workers of one thread under every stage: the same batches in turn, losses, step times and bytes per rank."""
    from training_base import training_job
    from training_ranks import Ranks, serve_ours

    rounds = 4
    jobs = {
        f"zero-{stage}": training_job(
            f"zero-{stage}", zero_stage=stage, threads_per_worker=1, global_batch_size=4, micro_batch_size=2
        )
        for stage in range(4)
    }
    with Ranks(serve_ours, 2, jobs) as ranks:
        for _ in range(rounds):
            for name in jobs:
                ranks.ask("advance", name, 1)
        lines = {name: ranks.ask("lines", name)[0] for name in jobs}
        held = {name: ranks.ask("held", name)[0] for name in jobs}
    found = []
    for stage, target in HELD.items():
        name = f"zero-{stage}"
        apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(lines[name], lines["zero-0"], strict=True))
        ratio = statistics.median(  # of the same batches; the first step makes what later ones use
            a["seconds"] / b["seconds"] for a, b in zip(lines[name][1:], lines["zero-0"][1:], strict=True)
        )
        total = {key: held[key]["gradients"] + held[key]["optimizer"] for key in (name, "zero-0")}
        pieces = ", ".join(f"{what} {size / 2**20:.1f}" for what, size in held[name].items())
        bytes_note = f"MiB on rank 0: {pieces}; plain {total['zero-0'] / 2**20:.1f}"
        found += [
            row(
                f"ZeRO-{stage}, 2 workers: difference of losses",
                "plain data parallel",
                apart,
                1e-5,
                "<=",
                note=f"the largest of {rounds} steps: {apart:.1e}",
            ),
            row(
                f"ZeRO-{stage}, 2 workers: gradients and moments",
                "plain data parallel",
                total[name] / total["zero-0"],
                target,
                "<=",
                note=bytes_note,
            ),
            row(
                f"ZeRO-{stage}, 2 workers: step time",
                "plain data parallel",
                ratio,
                *((1.15, "<=") if stage == 2 else (0.0, ">=")),
                note=f"ours over the peer, median of {rounds - 1} batches",
            ),
        ]
    return found


def nf4_base() -> list[Row]:
    """The same batches in turn over the NF4 and over the fp32 base, whole model, one worker."""
    from training_base import training_job
    from training_ranks import Ranks, serve_ours

    rounds = 4
    jobs = {base: training_job(f"base-{base}", base) for base in ("dense", "nf4")}
    with Ranks(serve_ours, 1, jobs) as ranks:
        for _ in range(rounds):
            for name in jobs:
                ranks.ask("advance", name, 1)
        lines = {name: ranks.ask("lines", name)[0] for name in jobs}
        held = {name: ranks.ask("base", name)[0] for name in jobs}
    ratio = statistics.median(
        a["seconds"] / b["seconds"] for a, b in zip(lines["nf4"][1:], lines["dense"][1:], strict=True)
    )
    rate = {name: statistics.median(line["tokens_per_second"] for line in found[1:]) for name, found in lines.items()}
    note = f"{rate['nf4']:.0f} against {rate['dense']:.0f} tokens/s, median of {rounds - 1} batches"
    whole = sum(held["nf4"].values()) / sum(held["dense"].values())
    linears = held["nf4"]["linears"] / held["dense"]["linears"]
    size = f"{held['nf4']['linears'] / 2**20:.0f} of {held['dense']['linears'] / 2**20:.0f} MiB"
    return [
        row("training step of SmolLM2 over NF4, LoRA r = 8", "the same over fp32", ratio, 1.15, "<=", note=note),
        row("frozen bytes of the linear layers, NF4", "fp32", linears, 0.35, "<=", note=size),
        row("frozen bytes of the whole model, NF4 linears", "fp32", whole, 0.35, "<=", note="embeddings stay fp32"),
    ]


def workers() -> list[Row]:
    """Two workers under ZeRO-2 against one, one thread each, the same global batches in turn."""
    from training_base import training_job
    from training_ranks import Ranks, serve_ours

    rounds = 3
    shape = {"threads_per_worker": 1, "global_batch_size": 8, "micro_batch_size": 4}
    jobs = {world: {"lora": training_job(f"workers-{world}", **shape)} for world in (1, 2)}
    with Ranks(serve_ours, 1, jobs[1]) as one, Ranks(serve_ours, 2, jobs[2]) as two:
        for _ in range(rounds):
            one.ask("advance", "lora", 1)
            two.ask("advance", "lora", 1)
        lines = [side.ask("lines", "lora")[0][1:] for side in (one, two)]
    efficiency = statistics.median(a["seconds"] / b["seconds"] / 2 for a, b in zip(*lines, strict=True))
    rate = [statistics.median(line["tokens_per_second"] for line in found) for found in lines]
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(*lines, strict=True))
    note = f"{rate[1]:.0f} against {rate[0]:.0f} tokens/s, median of {rounds - 1} batches; losses within {apart:.0e}"
    return [row("2 workers, ZeRO-2, 1 thread each: efficiency", "1 worker, 1 thread", efficiency, 0.75, note=note)]


#: Method, rank, rounds and target of the perplexity rows.
STARTS: dict[str, tuple[str, int, int | None, float]] = {
    "QPiSSA r = 16, 5 rounds": ("qpissa", 16, 5, 0.0),
    "QPiSSA r = 32, 5 rounds": ("qpissa", 32, 5, 0.0),
    "QPiSSA r = 64, 5 rounds": ("qpissa", 64, 5, 0.55),
    "QPiSSA r = 64, 1 round": ("qpissa", 64, 1, 0.0),
    "alternation (LQ-LoRA) r = 32": ("lq_lora", 32, None, 0.0),
}


def perplexity() -> list[Row]:
    """Perplexity before training on held-out text: what splits give back of what plain NF4 lost, and what PEFT's LoftQ
    rule does at α = 2r."""
    from training_base import HELDOUT_ROWS, source, splits, tokens

    text = tokens("heldout", HELDOUT_ROWS, text=True)
    dense = _perplexity(source("dense"), "dense", text)
    plain = _perplexity(source("nf4"), "nf4", text)
    found = {"PEFT's LoftQ rule, r = 32, α = 2r": (_peft_perplexity(text), 0.0)}
    for label, (method, rank, rounds, target) in STARTS.items():
        start = source("nf4")
        adapter = replace(start.adapter, r=None, init="split")
        start = replace(start, adapter=adapter, splits=splits(method, rank, rounds))
        found[label] = (_perplexity(start, "nf4_init", text), target)
    return [
        row(
            f"perplexity of SmolLM2 given back: {label}",
            "plain NF4",
            (plain - ours) / (plain - dense),
            target,
            error_ours=ours,
            error_peer=plain,
            note=f"errors are perplexities; fp32 {dense:.3f}",
        )
        for label, (ours, target) in found.items()
    ]


def _peft_perplexity(text: Path) -> float:
    """Of the model as PEFT's rule starts it."""
    from jobs_nf4 import peft_start
    from training_base import source
    from training_ranks import mean_loss

    from cluster.artifacts import SplitSet
    from cluster.model import build_variant
    from cluster.tokens import TokenTable

    start = source("dense")
    model = build_variant(start, "dense", torch.float32)
    with torch.no_grad():
        for module, _ in SplitSet(start.splits).items():
            weight = model.get_submodule(module).weight
            weight.copy_(peft_start(weight.detach().clone()))
    return math.exp(mean_loss(model, TokenTable.read(text)))


def _perplexity(start: Any, variant: Any, text: Path) -> float:
    from training_ranks import mean_loss

    from cluster.model import build_variant
    from cluster.tokens import TokenTable

    return math.exp(mean_loss(build_variant(start, variant, torch.float32), TokenTable.read(text)))


JOBS: dict[str, Callable[[], list[Row]]] = {
    "training_trainer": trainer,
    "training_zero": zero,
    "training_nf4_base": nf4_base,
    "training_workers": workers,
    "split_perplexity": perplexity,
}
