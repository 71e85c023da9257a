"""Decoding many LoRA adapters at once on SmolLM2-135M against vLLM's CPU backend and PolyLoRA."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Pipe, Row, paired, peers_python, row
from jobs_serving import ADAPTERS, NEW, RANK, REQUESTS, decode_row, engine_tokens, prompts, random_pairs

SCRIPT = Path(__file__).parent / "peer_serving.py"


def written(directory: Path) -> dict[str, Any]:
    """The base and the adapters of the other jobs as directories that every tool reads."""
    from training_base import source

    from cluster.export import export_base
    from cluster.model import build_variant
    from lowrank.adapters.lora import LoRA
    from lowrank.adapters.peft_format import save_adapter
    from lowrank.config import AdapterConfig

    dense = source("dense")
    export_base(dense, directory / "base", torch.float32)
    model = build_variant(dense, "dense", torch.float32)
    config = AdapterConfig(method="lora", r=RANK, lora_alpha=float(RANK), init="kaiming")
    adapters = {f"a{index}": str(directory / f"a{index}") for index in range(ADAPTERS)}
    for index, path in enumerate(adapters.values()):
        layers = {module: LoRA(a, b, 1.0) for module, (a, b) in random_pairs(model, index).items()}
        save_adapter(Path(path), layers, config, {})
    return {"model": str(directory / "base"), "adapters": adapters, "rank": RANK}


def against(library: str, called: str, distinct: int, target: float = 1.0) -> Row:
    """16 requests of 32 new tokens on `distinct` adapters (0: the bare base), prompts and all."""
    job = f"{REQUESTS} requests, {distinct or 'no'} adapter{'s' if distinct > 1 else ''}"
    python = peers_python("serving")
    if python is None:
        return row(job, called, 0.0, target, valid=False, note="not run: `make bench-serving` installs it")
    names = [f"a{index % distinct}" if distinct else None for index in range(REQUESTS)]
    with tempfile.TemporaryDirectory() as scratch:
        facts = written(Path(scratch)) | {"library": library}
        if not distinct:
            facts["adapters"] = {}  # vLLM's steps are slower with LoRA enabled, used or not
        peer = Pipe(python, SCRIPT)
        try:
            called = f"{called} {peer.ask(facts)['version']}"
            asked = {"prompts": prompts(), "names": names, "new": NEW}
            calls: dict[str, Callable[[], Any]] = {
                "ours": lambda: engine_tokens(names),
                "mixed": lambda: peer.ask(asked)["tokens"],
            }
            for call in calls.values():
                call()
            seconds, found = paired(calls, repeats=3)
        finally:
            peer.close()
    return decode_row(job, called, target, seconds, found)


def vllm() -> list[Row]:
    """Mixed adapters, and the bare base."""
    return [against("vllm", "vLLM, CPU build", distinct) for distinct in (16, 1, 0)]


def polylora() -> list[Row]:
    """Mixed adapters."""
    return [against("polylora", "PolyLoRA", 16)]


JOBS: dict[str, Callable[[], list[Row]]] = {"serving_vllm": vllm, "serving_polylora": polylora}
