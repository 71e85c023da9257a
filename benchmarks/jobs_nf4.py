"""NF4 against bitsandbytes, products straight from its codes against fp32, and split errors against PEFT's LoftQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Row, paired, row
from torch import Tensor
from torch.nn import functional as F

#: Side of the square weight.
SIZE = 4096
#: Calls per timing where one takes about a millisecond.
CALLS = 20
#: Rank and α of the split errors: s = 2, which most LoRA recipes use.
RANK, SCALING = 32, 2.0


def weight(m: int = SIZE, n: int = SIZE) -> Tensor:
    """Gaussian fp32 (m, n)."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0)) / n**0.5


def times(calls: int, action: Callable[[], Any]) -> Callable[[], Any]:
    """`action` so many times; its last result."""

    def repeated() -> Any:
        for _ in range(calls - 1):
            action()
        return action()

    return repeated


def quantize() -> list[Row]:
    """4096² fp32 to codes and fp32 maxima."""
    from bitsandbytes.functional import quantize_4bit

    from lowrank.quantization import quantize_nf4

    w = weight()
    best, found = paired(
        {
            "peer": lambda: quantize_4bit(w, blocksize=64, quant_type="nf4"),
            "ours": lambda: quantize_nf4(w, double_quant=False),
        }
    )
    packed, state = found["peer"]
    same = torch.equal(found["ours"].packed, packed) and torch.equal(found["ours"].absmax, state.absmax)
    note = f"{best['ours'] * 1e3:.1f} ms against {best['peer'] * 1e3:.1f} ms, the same bits: {same}"
    return [row("NF4 quantize, 4096² fp32", "bitsandbytes", best["peer"] / best["ours"], 12, valid=same, note=note)]


def dequantize() -> list[Row]:
    """Codes to fp32 in a buffer that is used again; bitsandbytes' output comes from kept pages. 4096² is bound by the
    memory on both sides; an MLP weight of SmolLM2 stays in the cache."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from lowrank.kernels import nf4

    rows = []
    for m, n, target, calls in ((SIZE, SIZE, 1.5, 5), (1536, 576, 0.0, 50)):
        w = weight(m, n)
        packed, state = quantize_4bit(w, blocksize=64, quant_type="nf4")
        out = torch.empty_like(w)
        actions = {
            "peer": lambda packed=packed, state=state: dequantize_4bit(packed, state),
            "ours": lambda packed=packed, state=state, out=out: nf4.dequantize(packed, state.absmax, 64, out),
        }
        best, found = paired({name: times(calls, action) for name, action in actions.items()}, repeats=6)
        same = torch.equal(found["ours"], found["peer"])
        seconds = {name: f"{time / calls * 1e3:.2f} ms" for name, time in best.items()}
        note = f"{seconds['ours']} against {seconds['peer']}, the same bits: {same}"
        ratio = best["peer"] / best["ours"]
        rows.append(row(f"NF4 dequantize, {m}x{n} fp32", "bitsandbytes", ratio, target, valid=same, note=note))
    return rows


#: Targets of `linear` by number of tokens: against fp32 Linear4bit, and against F.linear.
LINEAR_TARGETS = {1: (5.0, 1.5), 16: (3.0, 0.7)}


def linear() -> list[Row]:
    """y = x Wᵀ for few tokens. Linear4bit computes in fp32 until it is put in eval mode on a processor with bf16
    products; from then on it rounds x and W to bf16. The second is another computation, and shown without a target."""
    import bitsandbytes

    from lowrank.linear import NF4Linear
    from lowrank.quantization import quantize_nf4

    w = weight()
    layer = NF4Linear(quantize_nf4(w, double_quant=False))
    exact = layer.dense_weight().double()

    def theirs(training: bool) -> Any:
        found = bitsandbytes.nn.Linear4bit(SIZE, SIZE, bias=False, quant_type="nf4", compress_statistics=False)
        found.weight = bitsandbytes.nn.Params4bit(
            w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        return found.to("cpu").train(training)

    fp32, bf16 = theirs(True), theirs(False)
    rows = []
    for tokens, targets in LINEAR_TARGETS.items():
        x = torch.randn(tokens, SIZE, generator=torch.Generator().manual_seed(1))
        calls = {
            "ours": lambda x=x: layer(x),
            "Linear4bit, fp32": lambda x=x: fp32(x),
            "Linear4bit, eval": lambda x=x: bf16(x),
            "F.linear of the fp32 weight": lambda x=x: F.linear(x, w),
        }
        with torch.inference_mode():
            best, found = paired({name: times(CALLS, call) for name, call in calls.items()}, repeats=4)
        product = x.double() @ exact.T
        error = {name: float((y.double() - product).norm() / product.norm()) for name, y in found.items()}
        for name, target in zip(list(calls)[1:], (targets[0], 0.0, targets[1])):
            note = f"{best['ours'] / CALLS * 1e3:.2f} ms against {best[name] / CALLS * 1e3:.2f} ms"
            if name.startswith("F."):
                note += "; the peer's error is that of NF4"
            facts = {"error_ours": error["ours"], "error_peer": error[name], "note": note}
            ratio = best[name] / best["ours"]
            rows.append(
                row(f"NF4 linear 4096², tokens: {tokens}", name, ratio, target, valid=error["ours"] < 1e-5, **facts)
            )
    return rows


def training() -> list[Row]:
    """Forward and backward of 1024 tokens through an MLP weight of SmolLM2 and through 4096², over NF4 and fp32."""
    from lowrank.linear import NF4Linear
    from lowrank.quantization import quantize_nf4

    rows = []
    for m, n in ((1536, 576), (SIZE, SIZE)):
        w = weight(m, n)
        layer = NF4Linear(quantize_nf4(w))
        dense = torch.nn.Linear(n, m, bias=False)
        dense.weight = torch.nn.Parameter(layer.dense_weight(), requires_grad=False)
        x = torch.randn(1024, n, generator=torch.Generator().manual_seed(1)).requires_grad_()
        grad = torch.randn(1024, m, generator=torch.Generator().manual_seed(2))

        def step(base: torch.nn.Module, x: Tensor = x, grad: Tensor = grad) -> Tensor:
            (found,) = torch.autograd.grad(base(x), x, grad)
            return found

        calls = 10 if m * n < 2**20 else 2
        best, found = paired(
            {
                "fp32": times(calls, lambda dense=dense: step(dense)),
                "nf4": times(calls, lambda layer=layer: step(layer)),
            },
            repeats=6,
        )
        error = float((found["nf4"] - found["fp32"]).norm() / found["fp32"].norm())
        note = f"{best['nf4'] / calls * 1e3:.1f} ms against {best['fp32'] / calls * 1e3:.1f} ms, ours over the peer"
        ratio = best["nf4"] / best["fp32"]
        job = f"training step over NF4, {m}x{n}, 1024 tokens"
        rows.append(row(job, "the same over fp32", ratio, 1.15, "<=", valid=error < 1e-5, error_ours=error, note=note))
    return rows


#: Method, options and target of the split rows, as shares of the peer's error.
SPLITS: dict[str, tuple[str, dict[str, Any], float]] = {
    "QPiSSA, 1 round": ("qpissa", {"n_iter": 1}, 0.85),
    "QPiSSA, 5 rounds": ("qpissa", {"n_iter": 5}, 0.85),
    "LoftQ, 5 rounds": ("loftq", {}, 0.0),
    "alternation (LQ-LoRA), at most 20 rounds": ("lq_lora", {}, 0.70),
    "LPLR, L and R in NF4": ("lplr", {}, 0.0),
}


def split_errors() -> list[Row]:
    """‖W − Q − s·B·A‖ / ‖W‖ of every linear weight of SmolLM2 at s = 2, mean, as each starts its adapter."""
    from jobs_svd import ours, smollm_weights

    from lowrank.quantization import split_weight

    errors: dict[str, list[float]] = {name: [] for name in ("PEFT", *SPLITS)}
    for name, w in smollm_weights().items():
        norm = float(w.double().norm())
        errors["PEFT"].append(float((w.double() - peft_start(w).double()).norm()) / norm)
        factors = ours(w, rank=RANK)()
        for label, (method, options, _) in SPLITS.items():
            split = split_weight(name, w, factors, method, double_quant=False, **options)
            errors[label].append(_error(w, split) / norm)
    mean = {label: sum(found) / len(found) for label, found in errors.items()}
    return [
        row(
            f"split of SmolLM2, r = {RANK}, α = 2r: {label}",
            "PEFT's LoftQ rule, 1 round",
            mean[label] / mean["PEFT"],
            target or 1.0,
            "<=",
            error_ours=mean[label],
            error_peer=mean["PEFT"],
            note=f"{len(errors[label])} weights, worst ratio {_worst(errors[label], errors['PEFT']):.3f}",
        )
        for label, (_, _, target) in SPLITS.items()
    ]


#: One square, one flat and both MLP shapes, early and late.
STRUCTURED_WEIGHTS = [
    f"model.layers.{layer}.{name}"
    for layer in (3, 26)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
]
#: Decomposition, rank (None has none) and options of the parts.
STRUCTURED_PARTS: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "Hadamard, r = 8, 20 sweeps": ("hadamard", 8, {"n_iter": 20}),
    "Kronecker, W1 of 4x4": ("kronecker", 1, {"shape": (4, 4)}),
    "low-rank Khatri-Rao, r = 12": ("khatri_rao_low_rank", 12, {}),
    "Khatri-Rao, two free factors": ("khatri_rao", None, {}),
}


def structured_split_errors() -> list[Row]:
    """‖W − Q − S‖ / ‖W‖ of eight weights of SmolLM2, one round, against L R of no more numbers in the place of S."""
    from jobs_svd import ours, smollm_weights

    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.quantization import split_weight
    from lowrank.rank import RankRule

    weights = {name: w for name, w in smollm_weights().items() if name in STRUCTURED_WEIGHTS}
    rows = []
    for label, (method, rank, options) in STRUCTURED_PARTS.items():
        mine, pairs, plain, kept = [], [], [], 0
        for name, w in weights.items():
            rule = RankRule(rank=rank) if rank else None
            block = BlockMatrix.from_tensor(name, w)
            factors = decompose(block, method=method, rule=rule, executor=SerialExecutor(), **options).factors
            split = split_weight(name, w, factors, structured=True, n_iter=1)
            equal = max(1, factors.num_parameters // sum(w.shape))
            pairs.append(split_weight(name, w, ours(w, rank=equal)(), n_iter=1).quantization_error)
            mine.append(split.quantization_error)
            plain.append(split.plain_error)
            kept += split.part is not None
        mean, peer, alone = (sum(found) / len(found) for found in (mine, pairs, plain))
        note = f"NF4 alone {alone:.5f}; kept in {kept} of {len(weights)} weights"
        facts = {"error_ours": mean, "error_peer": peer, "note": note}
        rows.append(row(f"structured split: {label}", "L R of as many numbers", mean / peer, 0.0, **facts))
    return rows


def _error(w: Tensor, split: Any) -> float:
    """With the pair that fine-tuning starts from."""
    from lowrank.adapters.base import Layer
    from lowrank.adapters.pairs import initial_pair
    from lowrank.config import AdapterConfig

    start = split.residual.dequantize(torch.float32)
    if split.part is not None:
        config = AdapterConfig(r=RANK, lora_alpha=SCALING * RANK, init="split")
        a, b, s = initial_pair(Layer(split.name, split.shape, split=split.part), config)
        start = torch.addmm(start, b, a, alpha=s)
    return float((w.double() - start.double()).norm())


def peft_start(w: Tensor) -> Tensor:
    """The weight that `peft.utils.loftq_utils.loftq_init` starts from, in steps because it needs a GPU: B = L, A = R,
    and the layer adds s·B·A."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from peft.utils.loftq_utils import _low_rank_decomposition

    quantized = dequantize_4bit(*quantize_4bit(w, blocksize=64, quant_type="nf4"))
    found = _low_rank_decomposition(w - quantized, reduced_rank=RANK)
    return torch.addmm(quantized, found["L"], found["R"], alpha=SCALING)


def _worst(ours: list[float], peers: list[float]) -> float:
    return max(mine / theirs for mine, theirs in zip(ours, peers))


JOBS: dict[str, Callable[[], list[Row]]] = {
    "nf4_quantize": quantize,
    "nf4_dequantize": dequantize,
    "nf4_linear": linear,
    "nf4_training": training,
    "nf4_split_errors": split_errors,
    "structured_split_errors": structured_split_errors,
}
