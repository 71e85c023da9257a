"""LoHA and LoKr layers, r = 8, against PEFT's, which build ΔW in every pass: training at 512 tokens, and inference.

Both sides hold the same tensors over the same frozen linear layer. The adapter's own share is the time of the layer
minus that of the frozen layer alone, forward and backward, gradients of the input included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Row, paired, row
from torch import Tensor, nn

RANK, ALPHA, TOKENS = 8, 12.0, 512
#: Side of the square layer -> least ratio of the own shares.
SHARES = {2048: 8.0, 4096: 20.0}
#: Tokens -> least ratio of whole layers forward, and calls that are timed as one.
FORWARDS = {1: (5.0, 20), 256: (2.2, 1)}
METHODS = {"loha": "LoHaConfig", "lokr": "LoKrConfig"}
#: Largest relative difference of outputs and gradients that rounding explains.
ROUNDING = 1e-4


def layers(method: str, base: nn.Linear) -> dict[str, nn.Module]:
    """Our layer and PEFT's with the same random factors over one frozen base."""
    import peft

    from lowrank.adapters.registry import FAMILIES
    from lowrank.inject import AdaptedLinear

    config = getattr(peft, METHODS[method])(r=RANK, alpha=ALPHA, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    named = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0.0, 0.1)
            named[name.removesuffix(".default")] = parameter.detach().clone()
    ours = FAMILIES[method].from_tensors("0", named, {"r": RANK, "alpha": ALPHA})
    return {"ours": AdaptedLinear(base, {"a": ours}, "a"), "peft": theirs}


def training_pass(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], list[Tensor]]:
    """Forward and backward: the output, and the gradients of x and of every trained factor by name."""
    trained = sorted((name.removesuffix(".default"), p) for name, p in layer.named_parameters() if p.requires_grad)
    inputs = [x, *(parameter for _, parameter in trained)]

    def run() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    return run


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest relative difference; factors are matched by shape and order."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def frozen(size: int) -> nn.Linear:
    """A frozen square layer."""
    torch.manual_seed(size)
    return nn.Linear(size, size).requires_grad_(False)


def shares(repeats: int = 12) -> list[Row]:
    """The adapter's own share of forward and backward at 512 tokens."""
    rows = []
    for size, target in SHARES.items():
        base = frozen(size)
        x, grad = torch.randn(TOKENS, size, requires_grad=True), torch.randn(TOKENS, size)
        for method in METHODS:
            calls = {name: training_pass(layer, x, grad) for name, layer in layers(method, base).items()}
            seconds, found = paired(calls | {"base": training_pass(base, x, grad)}, repeats)
            own = {name: max(seconds[name] - seconds["base"], 1e-6) for name in calls}
            difference = largest_difference(found["ours"], found["peft"])
            rows.append(
                row(
                    f"{method} r={RANK}, {size}², {TOKENS} tokens, own share",
                    "PEFT layer, forward and backward",
                    own["peft"] / own["ours"],
                    target,
                    valid=difference <= ROUNDING,
                    note=f"{own['ours'] * 1e3:.1f} ms against {own['peft'] * 1e3:.1f}, "
                    f"the frozen layer {seconds['base'] * 1e3:.1f}; difference {difference:.1e}",
                )
            )
    return rows


def forwards(repeats: int = 12, size: int = 2048) -> list[Row]:
    """Whole layers, forward only."""
    rows = []
    base = frozen(size)
    for method in METHODS:
        pair = layers(method, base)
        for tokens, (target, calls) in FORWARDS.items():
            x = torch.randn(tokens, size)

            def run(layer: nn.Module, x: Tensor = x, calls: int = calls) -> Tensor:
                with torch.no_grad():
                    for _ in range(calls):
                        y: Tensor = layer(x)
                return y

            timed = {name: lambda layer=layer, run=run: run(layer) for name, layer in (pair | {"base": base}).items()}
            seconds, found = paired(timed, repeats)
            difference = largest_difference([found["ours"]], [found["peft"]])
            ours, theirs, alone = (seconds[name] / calls * 1e3 for name in ("ours", "peft", "base"))
            rows.append(
                row(
                    f"{method} r={RANK}, {size}², {tokens} tokens, whole layer",
                    "PEFT layer, forward",
                    theirs / ours,
                    target,
                    valid=difference <= ROUNDING,
                    note=f"{ours:.2f} ms against {theirs:.2f}; over the frozen layer {ours / alone:.2f} "
                    f"against {theirs / alone:.2f}; difference {difference:.1e}",
                )
            )
    return rows


def default_allocator() -> list[Row]:
    """The same rows under the C library's own settings, where the peer pays for fresh pages: for information."""
    plain: dict[str, Any] = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    plain["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), plain.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True, env=plain)
    found = json.loads(done.stdout.splitlines()[-1])
    return [row(f"{job}, default allocator", peer, ratio, 0.0, note=note) for job, peer, ratio, note in found]


JOBS: dict[str, Callable[[], list[Row]]] = {
    "layer_shares": shares,
    "layer_forwards": forwards,
    "layer_default_allocator": default_allocator,
}

if __name__ == "__main__":
    measured = [*shares(5), *forwards(5)]
    print(json.dumps([(one.job, one.peer, one.ratio, one.note) for one in measured]))
