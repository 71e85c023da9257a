"""Small problems per registered adapter family, for the laws that all of them keep."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, Layer
from lowrank.adapters.dora import DoRA
from lowrank.adapters.registry import FAMILIES
from lowrank.config import AdapterConfig

SHAPES = [(24, 36), (36, 24), (24, 24)]
#: The divisors nearest the root.
ROOT, ROUND = {24: 4, 36: 6}, {24: 6, 36: 6}


@dataclass(frozen=True)
class Sample:
    """One configuration of a family.

    Attributes:
        config: fields of `AdapterConfig` beside `method`.
        count: trained numbers of one layer of shape (m, n).
        starts_at: largest ‖ΔW‖/‖W‖ before training.
        scale: size of the random parameters that make ΔW noticeable.
        hold: keeps constant from now on what the family's gradient takes as constant by definition.
    """

    config: dict[str, Any]
    count: Callable[[int, int], int]
    starts_at: float = 0.0
    scale: float = 0.5
    hold: Callable[[Adapter, nn.Module], None] | None = None
    shapes: list[tuple[int, int]] = field(default_factory=lambda: list(SHAPES))


def hold_row_norms(adapter: Adapter, base: nn.Module) -> None:
    """DoRA's backward pass holds ‖W + s·B·A‖_row constant (arXiv 2402.09353, eq. 11)."""
    assert isinstance(adapter, DoRA)
    norms = adapter.row_norms(base)
    adapter.row_norms = lambda base: norms  # type: ignore[method-assign]


SAMPLES: dict[str, list[Sample]] = {
    "lora": [
        Sample({"r": 4, "lora_alpha": 8.0}, lambda m, n: 4 * (m + n)),
        Sample({"r": 4, "lora_alpha": 3.0, "use_rslora": True, "init": "gaussian"}, lambda m, n: 4 * (m + n)),
    ],
    "dora": [
        # At the start ΔW is what fp32 rounds off between μ and the row norms.
        Sample({"r": 4, "lora_alpha": 8.0}, lambda m, n: 4 * (m + n) + m, 1e-6, hold=hold_row_norms),
        Sample(
            {"r": 2, "lora_alpha": 3.0, "use_rslora": True, "init": "gaussian"},
            lambda m, n: 2 * (m + n) + m,
            1e-6,
            hold=hold_row_norms,
        ),
    ],
    "vera": [
        Sample({"r": 5, "lora_alpha": 8.0}, lambda m, n: m + 5, scale=1.0),
        Sample(
            {"r": 40, "lora_alpha": 8.0, "options": {"d_initial": 0.02, "projection_prng_key": 3}},
            lambda m, n: m + 40,
            scale=1.0,
        ),
    ],
    "lora_fa": [
        Sample({"r": 4, "lora_alpha": 8.0}, lambda m, n: 4 * m),
        Sample({"r": 3, "lora_alpha": 2.0, "use_rslora": True, "init": "gaussian"}, lambda m, n: 3 * m, scale=2.0),
    ],
    "lora_xs": [
        Sample({"r": 4, "lora_alpha": 8.0}, lambda m, n: 16, starts_at=1e-4),
        Sample({"r": 6, "lora_alpha": 5.0, "options": {"init_std": 0.0}}, lambda m, n: 36),
    ],
    "hira": [
        Sample({"r": 4, "lora_alpha": 8.0}, lambda m, n: 4 * (m + n)),
        Sample({"r": 3, "lora_alpha": 8.0, "init": "gaussian"}, lambda m, n: 3 * (m + n)),
    ],
    "dylora": [
        Sample({"r": 4, "lora_alpha": 8.0, "options": {"r_min": 2}}, lambda m, n: 4 * (m + n)),
        Sample(
            {"r": 6, "lora_alpha": 5.0, "use_rslora": True, "options": {"train": "frozen", "eval_rank": 4}},
            lambda m, n: 6 * (m + n),
        ),
    ],
    "lotr": [
        Sample({"r": 4, "lora_alpha": 8.0}, lambda m, n: 4 * (m + n) + 16),
        Sample({"r": 5, "lora_alpha": 3.0, "use_rslora": True}, lambda m, n: 5 * (m + n) + 25),
    ],
    "lorta": [
        # One layer and one projection here: C_layer and C_projection hold r numbers each.
        Sample(
            {"r": 4, "lora_alpha": 8.0, "options": {"num_heads": 2}},
            lambda m, n: 4 * (n + m // 2 + 2 + 2),
            scale=1.0,
        ),
        Sample(
            {"r": 6, "lora_alpha": 20.0},
            lambda m, n: 6 * (n + {24: 6 + 4, 36: 6 + 6}[m] + 2),
            scale=1.0,
        ),
    ],
    "adalora": [
        Sample({"r": 4, "lora_alpha": 8.0}, lambda m, n: 4 * (m + n + 1)),
        Sample({"r": 6, "lora_alpha": 15.0, "options": {"target_r": 2}}, lambda m, n: 6 * (m + n + 1)),
    ],
    "polar": [
        Sample({"r": 4, "lora_alpha": 8.0}, lambda m, n: 4 * (m + n) + 16),
        Sample({"r": 3, "lora_alpha": 5.0, "use_rslora": True}, lambda m, n: 3 * (m + n) + 9),
    ],
    "loha": [
        Sample({"r": 3, "lora_alpha": 7.0}, lambda m, n: 6 * (m + n)),
        Sample({"r": 3, "lora_alpha": 2.0, "options": {"init": "lycoris"}}, lambda m, n: 6 * (m + n)),
        # r² > min(m, n), and so large that ΔW is applied by rows: only a cut of it is a LoRA.
        Sample({"r": 6, "lora_alpha": 3.0}, lambda m, n: 12 * (m + n)),
    ],
    "lokr": [
        # 24 = 4·6 and 36 = 6·6: W1 (4 or 6, 6 or 4), W2a W2b of rank 2.
        Sample({"r": 2, "lora_alpha": 3.0}, lambda m, n: ROOT[m] * ROOT[n] + 2 * (6 + 6)),
        Sample(
            {"r": 2, "lora_alpha": 3.0, "options": {"decompose_both": True, "init": "lycoris"}},
            lambda m, n: 2 * (ROOT[m] + ROOT[n] + ROUND[m] + ROUND[n]),
            shapes=[(24, 36), (36, 24)],
        ),
        # 3·8 and 3·12; then W2 full, as r >= 12/2, whose ΔW has no smaller LoRA.
        Sample({"r": 3, "lora_alpha": 2.0, "options": {"factor": 3}}, lambda m, n: 9 + 3 * (m + n) // 3),
        Sample({"r": 6, "lora_alpha": 5.0, "options": {"factor": 3, "init": "lycoris"}}, lambda m, n: 9 + m * n // 9),
    ],
    "krona": [
        Sample({"lora_alpha": 2.0}, lambda m, n: ROOT[m] * ROOT[n] + 36),
        Sample({"r": 7, "lora_alpha": 9.0, "options": {"factor": 2}}, lambda m, n: 4 + m * n // 4, shapes=[(24, 28)]),
    ],
    "lokh": [
        Sample({"r": 3, "lora_alpha": 4.0}, lambda m, n: 3 * (ROOT[max(m, n)] + 6 + 2 * min(m, n))),
        # 5·8 rows trimmed to 36 or 24, and r² >= min(m, n): only a cut of it is a LoRA.
        Sample(
            {"r": 5, "lora_alpha": 4.0, "use_rslora": True, "options": {"shape": (5, 8), "trim": True}},
            lambda m, n: 5 * (5 + 8 + 2 * min(m, n)),
        ),
        Sample({"lora_alpha": 3.0, "options": {"form": "chain"}}, lambda m, n: (ROOT[max(m, n)] + 6) * min(m, n)),
        Sample(
            {"lora_alpha": 2.0, "options": {"form": "chain", "shape": (2, 3, 6)}},
            lambda m, n: 11 * 24,
            shapes=[(24, 36), (36, 24)],
        ),
        Sample(
            {"lora_alpha": 2.0, "options": {"form": "chain", "num_factors": 4, "trim": True}},
            lambda m, n: (2 + 2 + 3 + 3) * min(m, n),
            scale=1.0,
            shapes=[(24, 36), (36, 24)],
        ),
    ],
    "kradapter": [
        Sample({}, lambda m, n: (ROOT[max(m, n)] + 6) * min(m, n)),
        Sample({"options": {"scale": 0.5}}, lambda m, n: (5 + 6) * 20, scale=1.0, shapes=[(20, 27), (27, 20)]),
    ],
    "full": [Sample({}, lambda m, n: m * n), Sample({"lora_dropout": 0.25}, lambda m, n: m * n, scale=2.0)],
    "abba": [
        Sample({"r": 3, "lora_alpha": 2.0}, lambda m, n: 6 * (m + n)),
        Sample({"r": 2, "lora_alpha": 3.0, "options": {"r1": 4, "alpha1": 0.5}}, lambda m, n: 6 * (m + n)),
    ],
}

CASES = [
    (method, sample, shape)
    for method in sorted(FAMILIES)
    for sample in SAMPLES.get(method, [])
    for shape in sample.shapes
]


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """A frozen weight W (m, n), the same but for rounding in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def layer_of(shape: tuple[int, int], name: str = "model.layers.0.self_attn.q_proj", index: int = 0) -> Layer:
    """A layer that holds `weight_of(shape)`."""
    return Layer(name, shape, index, lambda: weight_of(shape, torch.float32))


def config_of(method: str, sample: Sample) -> AdapterConfig:
    return AdapterConfig(method=method, **({"init": "kaiming"} | sample.config))  # type: ignore[arg-type]


def made(method: str, sample: Sample, shape: tuple[int, int]) -> Adapter:
    """The adapter of one layer before training, in fp64, as it answers once trained (dropout and its like off)."""
    config = config_of(method, sample)
    adapters = FAMILIES[method].initial_all([layer_of(shape)], config)
    return adapters["model.layers.0.self_attn.q_proj"].double().eval()


def randomize(adapter: Adapter, scale: float, seed: int = 0) -> Adapter:
    """Every trained parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return adapter
