"""Decoding many adapters at once on SmolLM2-135M against PEFT and transformers: 16 requests, greedy, prompts of 32.

Adapters are LoRA of rank 8 on all linear layers unless a job says otherwise.
"""

from __future__ import annotations

import gc
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from harness import Row, paired, row
from torch import Tensor

ADAPTERS, REQUESTS, PROMPT, NEW = 16, 16, 32, 32
RANK = 8


@cache
def prompts() -> list[list[int]]:
    """Token ids; held-out questions of GSM8K, cut to one length, so that no side pads."""
    from training_base import tokens

    from cluster.tokens import TokenTable

    table = TokenTable.read(tokens("heldout", 60))
    rows = [table.input_ids(index)[:PROMPT].tolist() for index in range(len(table))]
    return [row for row in rows if len(row) == PROMPT][:REQUESTS]


def random_pairs(model: Any, seed: int, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, n) and B (m, r) for every linear layer, large enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            m, n = module.weight.shape
            a = torch.randn(rank, n, generator=generator) / n**0.5
            found[name] = a, torch.randn(m, rank, generator=generator) * (0.1 / rank**0.5)
    return found


def dense_model() -> Any:
    """The base in fp32."""
    from training_base import source

    from cluster.model import build_variant

    return build_variant(source("dense"), "dense", torch.float32)


@cache
def ours() -> Any:
    """The engine's model with 16 adapters on all linear layers."""
    from lowrank.adapters.lora import LoRA
    from lowrank.inject import inject

    model = dense_model()
    named: dict[str, dict[str, Any]] = {}
    for index in range(ADAPTERS):
        for module, (a, b) in random_pairs(model, index).items():
            named.setdefault(module, {})[f"a{index}"] = LoRA(a, b, 1.0)
    inject(model, named, None)
    return model.eval()


@cache
def theirs() -> Any:
    """The same in PEFT."""
    from peft import LoraConfig, get_peft_model

    model = dense_model()
    pairs = [random_pairs(model, index) for index in range(ADAPTERS)]
    names = sorted({name.rsplit(".", 1)[-1] for name in pairs[0]})
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, inference_mode=True)
    peft = get_peft_model(model, config, adapter_name="a0")
    for index in range(1, ADAPTERS):
        peft.add_adapter(f"a{index}", config)
    with torch.no_grad():
        for index, own in enumerate(pairs):
            for module, (a, b) in own.items():
                layer = peft.base_model.model.get_submodule(module)
                layer.lora_A[f"a{index}"].weight.copy_(a)
                layer.lora_B[f"a{index}"].weight.copy_(b)
    return peft.eval()


@cache
def our_engine() -> Any:
    """An engine over `ours`, which lives as long as this process, as one does in a replica."""
    from cluster.serving.engine import Engine

    return Engine(ours(), Ids(), [], max_concurrent=REQUESTS)


def engine_tokens(names: Sequence[str | None], new: int = NEW) -> list[list[int]]:
    """What the engine answers to all prompts at once."""
    from cluster.serving.decoding import Sampling
    from cluster.serving.slots import Job

    greedy = Sampling(temperature=0)
    return run(our_engine(), [Job(n, tuple(p), new, greedy) for n, p in zip(names, prompts())])


def run(engine: Any, jobs: Sequence[Any]) -> list[list[int]]:
    """Token ids of every job."""
    done: queue.Queue[int] = queue.Queue()
    texts: list[str] = [""] * len(jobs)

    def listen(index: int, piece: Any) -> None:
        texts[index] += piece.text
        if piece.finish is not None:
            done.put(index)

    for index, job in enumerate(jobs):
        engine.submit(job, lambda piece, index=index: listen(index, piece))
    for _ in jobs:
        done.get()
    return [[int(word) for word in text.split()] for text in texts]


class Ids:
    """A tokenizer that writes token ids, so that answers compare exactly and neither side pays for text."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """Ids in decimal."""
        return "".join(f"{token} " for token in ids)


def peft_generate(adapters: Sequence[str], rows: slice, mixed: bool) -> list[list[int]]:
    """`generate` on some prompts, by one adapter or by one for every row."""
    model = theirs()
    ids = torch.tensor(prompts()[rows])
    more = {"adapter_names": list(adapters)} if mixed else {}
    if not mixed:
        model.set_adapter(adapters[0])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
            do_sample=False, pad_token_id=0, eos_token_id=None, **more,
        )  # fmt: skip
    return [list(map(int, own[PROMPT:])) for own in out]


def set_adapter_per_request(names: Sequence[str]) -> list[list[int]]:
    """One request after the other."""
    return [peft_generate([name], slice(i, i + 1), False)[0] for i, name in enumerate(names)]


def decode() -> list[Row]:
    """16 requests of 32 new tokens, prompts and all, against PEFT's two ways."""
    rows = []
    for distinct, target in ((16, 4.0), (4, 2.7), (1, 2.0)):
        names = [f"a{index % distinct}" for index in range(REQUESTS)]
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda names=names: engine_tokens(names),
            "mixed": lambda names=names: peft_generate(names, slice(None), True),
        }
        seconds, found = paired(calls, repeats=2)
        rows.append(
            decode_row(f"{REQUESTS} requests, {distinct} adapters", "PEFT, adapter_names", target, seconds, found)
        )
    names = [f"a{index}" for index in range(REQUESTS)]
    calls = {"ours": lambda: engine_tokens(names), "mixed": lambda: set_adapter_per_request(names)}
    seconds, found = paired(calls, repeats=1)
    rows.append(decode_row(f"{REQUESTS} requests, 16 adapters", "PEFT, set_adapter per request", 12.0, seconds, found))
    return rows


def decode_row(job: str, peer: str, target: float, seconds: dict[str, float], found: dict[str, Any]) -> Row:
    """Tokens per second of `ours` over those of the peer, `mixed`; valid where their tokens are the same."""
    same = sum(a == b for a, b in zip(found["ours"], found["mixed"], strict=True))
    rate = {name: REQUESTS * NEW / time for name, time in seconds.items()}
    note = f"{rate['ours']:.0f} against {rate['mixed']:.0f} tokens/s; {same} of {REQUESTS} answers the same"
    return row(job, peer, seconds["mixed"] / seconds["ours"], target, valid=same >= REQUESTS - 1, note=note)


def generate_batch() -> list[Row]:
    """The bare base against transformers' own continuous batching, warm."""
    from transformers import GenerationConfig

    model = dense_model()
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def peer() -> list[list[int]]:
        found = model.generate_batch(inputs=prompts(), generation_config=config, warmup=False)
        by_prompt = {tuple(out.prompt_ids): list(out.generated_tokens) for out in found.values()}
        return [by_prompt[tuple(prompt)] for prompt in prompts()]

    calls = {"ours": lambda: engine_tokens([None] * REQUESTS), "mixed": peer}
    for call in calls.values():
        call()
    seconds, found = paired(calls, repeats=2)
    return [decode_row(f"{REQUESTS} requests, no adapter", "transformers, generate_batch", 2.5, seconds, found)]


def step_seconds(model: Any, names: Sequence[str | None], steps: int = 12) -> float:
    """The least time of a decode step over requests that have read their prompts."""
    from cluster.serving.steps import Chunk
    from cluster.serving.trial import steps_for

    with torch.inference_mode():
        made, times = steps_for(model, len(names)), []
        own = list(enumerate(names))
        made.step([Chunk(index, name, tuple(prompts()[index]), 0) for index, name in own])
        for taken in range(PROMPT, PROMPT + steps):
            chunks = [Chunk(index, name, (5,), taken) for index, name in own]
            began = time.perf_counter()
            made.step(chunks)
            times.append(time.perf_counter() - began)
    return min(times)


def alternating(sides: dict[str, tuple[Any, Sequence[str | None]]], rounds: int = 3) -> dict[str, float]:
    """The least time of a step of each side, the sides in turn."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, (model, names) in sides.items():
            best[name] = min(best[name], step_seconds(model, names))
    return best


def added_time() -> list[Row]:
    """What 16 adapters add to a step of the base, against reading their bytes once."""
    model, names = ours(), [f"a{index}" for index in range(REQUESTS)]
    times = alternating({"base": (model, [None] * REQUESTS), "mixed": (model, names)})
    touched = sum(p.nbytes for name, p in model.named_parameters() if "adapters." in name)
    buffer = torch.ones(2**27)
    read, _ = paired({"read": buffer.sum}, repeats=5)
    least = touched / (buffer.nbytes / read["read"])
    added = times["mixed"] - times["base"]
    note = f"base {times['base'] * 1e3:.1f} ms, {added * 1e3:.1f} ms added, {touched / 2**20:.0f} MiB of adapters"
    return [
        row(f"{ADAPTERS} adapters in a step: time added", "reading their bytes", added / least, 2.0, "<=", note=note)
    ]


def of_family(method: str, rank: int, options: dict[str, Any] | None = None) -> tuple[Any, list[str], int]:
    """A model with 16 random adapters of a family, their names, and the bytes of one."""
    from lowrank.adapters.base import Layer
    from lowrank.adapters.registry import initial_adapters
    from lowrank.config import AdapterConfig
    from lowrank.inject import inject

    model = dense_model()
    linears = {name: m for name, m in model.named_modules() if name.endswith("_proj")}
    layers = [
        Layer(name, tuple(module.weight.shape), index, lambda module=module: module.weight.detach())
        for index, (name, module) in enumerate(linears.items())
    ]
    config = AdapterConfig(method=method, init="kaiming", r=rank, options=options or {})
    named: dict[str, dict[str, Any]] = {name: {} for name in linears}
    for index in range(ADAPTERS):
        torch.manual_seed(index)
        for name, adapter in initial_adapters(layers, config).items():
            for parameter in adapter.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.02)
            named[name][f"a{index}"] = adapter.eval()
    inject(model, named, None)
    one = sum(p.nbytes for own in named.values() for p in own["a0"].parameters())
    return model.eval(), [f"a{index}" for index in range(ADAPTERS)], one


def families() -> list[Row]:
    """A decode step with 16 LoHA or LoKr adapters against 16 LoRA of about as many bytes."""
    rows = []
    for method, rank, options in (("loha", 4, {}), ("lokr", 16, {})):
        model, names, own = of_family(method, rank, options)
        # A LoRA's bytes are linear in its rank.
        lora_rank = max(1, round(own / (of_family("lora", 1)[2])))
        lora, lora_names, lora_bytes = of_family("lora", lora_rank)
        best = alternating({"ours": (model, names), "lora": (lora, lora_names)})
        note = f"{best['ours'] * 1e3:.0f} against {best['lora'] * 1e3:.0f} ms; {own / 2**20:.1f} MiB against " \
               f"{lora_bytes / 2**20:.1f} MiB of LoRA of rank {lora_rank}"  # fmt: skip
        rows.append(row(f"16 {method} adapters, r={rank}", "LoRA", best["lora"] / best["ours"], 0.8, note=note))
    return rows


def nf4() -> list[Row]:
    """A decode step over NF4 against fp32, 1 and 16 requests of the bare base."""
    from training_base import source

    from cluster.model import build_variant

    dense, packed = dense_model(), build_variant(source("nf4"), "nf4", torch.float32)
    sizes = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (packed, dense)]
    rows, share = [], sizes[0] / sizes[1]
    for count, target in ((1, 1.5), (16, 0.8)):
        best = alternating({"ours": (packed, [None] * count), "fp32": (dense, [None] * count)})
        note = f"{best['ours'] * 1e3:.0f} against {best['fp32'] * 1e3:.0f} ms; {share:.2f} of the memory, embedding too"
        job = f"NF4 base, {count} request{'s' if count > 1 else ''}"
        rows.append(row(job, "fp32 base", best["fp32"] / best["ours"], target, valid=share <= 0.35, note=note))
    return rows


REGISTERED, CONTENTS, RESIDENT, ASKED = 1000, 64, 16, 128


def thousand() -> list[Row]:
    """1,000 registered adapters asked for by Zipf's law, 16 resident, against 16 alone."""
    import random
    from tempfile import TemporaryDirectory

    from lowrank.adapters.lora import LoRA
    from lowrank.adapters.peft_format import save_adapter
    from lowrank.config import AdapterConfig
    from lowrank.resident import make_adaptable

    model = dense_model()
    rng, weights = random.Random(1), [1 / (rank + 1) ** 1.2 for rank in range(REGISTERED)]
    asked = [f"a{index}" for index in rng.choices(range(REGISTERED), weights, k=ASKED)]
    few = [f"a{rng.randrange(RESIDENT)}" for _ in range(ASKED)]
    with TemporaryDirectory() as root:
        table = {}
        for index in range(REGISTERED):
            directory = Path(root) / f"a{index}"
            if index < CONTENTS:
                pairs = random_pairs(model, index)
                made = {name: LoRA(a, b, 1.0) for name, (a, b) in pairs.items()}
                save_adapter(directory, made, AdapterConfig(r=RANK, lora_alpha=float(RANK)), {})
            else:  # other names of the same bytes: 1,000 files of 9 MiB would not fit a small disk
                directory.mkdir()
                for file in (Path(root) / f"a{index % CONTENTS}").iterdir():
                    os.link(file, directory / file.name)
            table[f"a{index}"] = str(directory)
        make_adaptable(model, list(pairs))
        times = {name: seconds_with_store(model, table, ids) for name, ids in (("few", few), ("many", asked))}
    (few_s, _, _), (many_s, misses, peak) = times["few"], times["many"]
    late = sorted(misses)[int(0.95 * len(misses))] * 1e3
    rates = [ASKED * NEW / seconds for seconds in (many_s, few_s)]
    note = f"{rates[0]:.0f} against {rates[1]:.0f} tokens/s; {len(misses)} of {ASKED} requests missed, p95 of a miss " \
           f"{late:.0f} ms; {peak / 2**20:.0f} MiB grown beyond the first 16"  # fmt: skip
    return [row("1,000 adapters, 16 resident", "16 adapters", few_s / many_s, 0.9, valid=late <= 300, note=note)]


def seconds_with_store(model: Any, table: dict[str, str], asked: Sequence[str]) -> tuple[float, list[float], int]:
    """Seconds of all requests with 16 at a time, the seconds that each miss waited, and the memory that grew."""
    import psutil

    from cluster.serving.decoding import Sampling
    from cluster.serving.engine import Engine
    from cluster.serving.holder import ModelHolder
    from cluster.serving.slots import Job
    from cluster.serving.sources import FixedSource, Version
    from cluster.serving.store import AdapterStore, FullError, Lease, freeze_collector

    one = Path(table["a0"], "adapter_model.safetensors").stat().st_size
    store = AdapterStore(ModelHolder(model), FixedSource(table), {}, RESIDENT * one)
    engine = Engine(model, Ids(), [], max_concurrent=REQUESTS)
    misses: list[float] = []

    def ask(name: str, prompt: Sequence[int]) -> None:
        began, missed = time.perf_counter(), False
        while True:
            try:
                found = store.ask(Version(name), missed)
                if isinstance(found, Lease):
                    break
                missed = True
                found.result()
            except FullError:
                time.sleep(0.01)
        if missed:
            misses.append(time.perf_counter() - began)
        try:
            run(engine, [Job(found.name, tuple(prompt), NEW, Sampling(temperature=0))])
        finally:
            found.release()

    try:
        for name in dict.fromkeys(asked[:RESIDENT]):
            store.lease(Version(name)).release()
        freeze_collector()
        memory = psutil.Process().memory_info().rss
        began = time.perf_counter()
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(ask, asked, cycle(prompts())))
        return time.perf_counter() - began, misses, psutil.Process().memory_info().rss - memory
    finally:
        engine.close()
        store.close()
        gc.unfreeze()


JOBS: dict[str, Callable[[], list[Row]]] = {
    "serving_decode": decode,
    "serving_generate_batch": generate_batch,
    "serving_added_time": added_time,
    "serving_families": families,
    "serving_nf4": nf4,
    "serving_thousand": thousand,
}
