"""Decoding many adapters at once on SmolLM2-135M against PEFT and transformers: 16 requests, greedy, prompts of 32."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from functools import cache
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


def engine_tokens(model: Any, names: Sequence[str | None], new: int = NEW) -> list[list[int]]:
    """What the engine answers to all prompts at once."""
    from cluster.serving.decoding import Sampling
    from cluster.serving.engine import Engine, Job

    engine = Engine(model, Ids(), [], max_concurrent=REQUESTS)
    try:
        return run(engine, [Job(n, tuple(p), new, Sampling(temperature=0)) for n, p in zip(names, prompts())])
    finally:
        engine.close()


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
            "ours": lambda names=names: engine_tokens(ours(), names),
            "mixed": lambda names=names: peft_generate(names, slice(None), True),
        }
        seconds, found = paired(calls, repeats=3)
        rows.append(_row(f"{REQUESTS} requests, {distinct} adapters", "PEFT, adapter_names", target, seconds, found))
    names = [f"a{index}" for index in range(REQUESTS)]
    calls = {"ours": lambda: engine_tokens(ours(), names), "mixed": lambda: set_adapter_per_request(names)}
    seconds, found = paired(calls, repeats=1)
    rows.append(_row(f"{REQUESTS} requests, 16 adapters", "PEFT, set_adapter per request", 12.0, seconds, found))
    return rows


def _row(job: str, peer: str, target: float, seconds: dict[str, float], found: dict[str, Any]) -> Row:
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

    calls = {"ours": lambda: engine_tokens(ours(), [None] * REQUESTS), "mixed": peer}
    for call in calls.values():
        call()
    seconds, found = paired(calls, repeats=2)
    return [_row(f"{REQUESTS} requests, no adapter", "transformers, generate_batch", 2.5, seconds, found)]


def step_seconds(model: Any, names: Sequence[str | None], steps: int = 12) -> float:
    """The least time of a decode step over 16 requests that have read their prompts."""
    from cluster.serving.steps import Chunk
    from cluster.serving.trial import steps_for

    with torch.inference_mode():
        made, times = steps_for(model, REQUESTS), []
        own = list(enumerate(names))
        made.step([Chunk(index, name, tuple(prompts()[index]), 0) for index, name in own])
        for taken in range(PROMPT, PROMPT + steps):
            chunks = [Chunk(index, name, (5,), taken) for index, name in own]
            began = time.perf_counter()
            made.step(chunks)
            times.append(time.perf_counter() - began)
    return min(times)


def added_time() -> list[Row]:
    """What 16 adapters add to a step of the base, against reading their bytes once."""
    model, names = ours(), [f"a{index}" for index in range(REQUESTS)]
    times = {"base": float("inf"), "mixed": float("inf")}
    for _ in range(3):
        times["base"] = min(times["base"], step_seconds(model, [None] * REQUESTS))
        times["mixed"] = min(times["mixed"], step_seconds(model, names))
    touched = sum(p.nbytes for name, p in model.named_parameters() if "adapters." in name)
    buffer = torch.ones(2**27)
    read, _ = paired({"read": buffer.sum}, repeats=5)
    least = touched / (buffer.nbytes / read["read"])
    added = times["mixed"] - times["base"]
    note = f"base {times['base'] * 1e3:.1f} ms, {added * 1e3:.1f} ms added, {touched / 2**20:.0f} MiB of adapters"
    return [
        row(f"{ADAPTERS} adapters in a step: time added", "reading their bytes", added / least, 2.0, "<=", note=note)
    ]


JOBS: dict[str, Callable[[], list[Row]]] = {
    "serving_decode": decode,
    "serving_generate_batch": generate_batch,
    "serving_added_time": added_time,
}
