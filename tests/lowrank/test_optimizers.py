"""Optimisers of pairs: which of them do not mind how ΔW is split into B and A, and what each formula must give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank.adapters.registry import FAMILIES
from lowrank.errors import AdapterError
from lowrank.optimizer_options import OPTIMIZER_OPTIONS, PAIR_FAMILIES, pair_problem
from lowrank.optimizers.base import Optimizer, Pair, State
from lowrank.optimizers.pairs import PairRule
from lowrank.optimizers.preconditioned import balancing
from lowrank.optimizers.registry import OPTIMIZERS, make_optimizer

S = 0.5
RATE = 0.05
UNDAMPED: dict[str, dict[str, Any]] = {
    "riemannian": {"damping": 0.0, "floor": 0.0},
    "reflora": {"damping": 0.0, "floor": 0.0},
    "altlora": {"damping": 0.0, "floor": 0.0},
    "lora_rite": {"epsilon": 1e-12},
}
Problem = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]


def problem(seed: int, m: int = 12, n: int = 9, r: int = 3) -> Problem:
    """A (r, n), B (m, r) and the gradient G(ΔW) of a quadratic loss with curvature of its own per entry, in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    target, curvature = draw(m, n), draw(m, n).square() + 0.1
    return draw(r, n), draw(m, r), lambda delta: curvature * (delta - target)


def gauge(seed: int, r: int, condition: float) -> Tensor:
    """S (r, r) with κ(S) = `condition`."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))
    return (u * torch.logspace(0, -1, r, base=condition, dtype=torch.float64)) @ v * 2.0


def descend(name: str, problem: Problem, steps: int, plain: str = "SGD", **options: Any) -> list[Tensor]:
    """BA after every step of optimiser `name` over a plain torch optimiser."""
    optimizer = make_optimizer(name, options)
    a, b = (factor.clone().requires_grad_() for factor in problem[:2])
    groups = [{"params": [a]}, {"params": [b], "lr": RATE * optimizer.lr_ratio_b}]
    inner = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0) if plain == "AdamW" else torch.optim.SGD(groups, RATE)
    state: State = {}
    products = []
    for step in range(steps):
        full = problem[2](S * (b @ a).detach())
        pair = Pair(a.detach(), b.detach(), S * b.detach().T @ full, S * full @ a.detach().T)
        a.grad, b.grad = optimizer.directions(pair, state, step, RATE)
        inner.step()
        products.append((b @ a).detach())
    return products


def moved_by_gauge(name: str, seed: int, condition: float, steps: int = 1, **settings: Any) -> float:
    """Largest relative difference of BA, over all steps, between (B, A) and (BS, S⁻¹A)."""
    a, b, gradient = problem(seed)
    matrix = gauge(seed + 1, len(a), condition)
    there = (torch.linalg.solve(matrix, a), b @ matrix, gradient)
    pairs = zip(
        descend(name, (a, b, gradient), steps, **settings), descend(name, there, steps, **settings), strict=True
    )
    return max(float((one - other).norm() / one.norm()) for one, other in pairs)


gauges = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@gauges
@given(seed=st.integers(0, 10_000), condition=st.floats(1.0, 10.0))
@pytest.mark.parametrize("name", sorted(UNDAMPED))
def test_the_first_step_does_not_depend_on_the_split(name: str, seed: int, condition: float) -> None:
    assert moved_by_gauge(name, seed, condition, **UNDAMPED[name]) < 1e-8


@gauges
@given(seed=st.integers(0, 10_000), condition=st.floats(1.0, 10.0))
@pytest.mark.parametrize("name", ["lora_rite", "altlora"])
def test_moments_do_not_depend_on_the_split_either(name: str, seed: int, condition: float) -> None:
    assert moved_by_gauge(name, seed, condition, steps=6, **UNDAMPED[name]) < 1e-8


@pytest.mark.parametrize("name", ["adamw", "lora_plus"])
@pytest.mark.parametrize("plain", ["SGD", "AdamW"])
def test_steps_of_the_entries_do_depend_on_the_split(name: str, plain: str) -> None:
    assert min(moved_by_gauge(name, seed, 10.0, plain=plain) for seed in range(5)) > 1e-2


def test_damping_relative_to_the_gram_keeps_a_rescaling_harmless() -> None:
    a, b, gradient = problem(3)
    options = {"damping": 1e-2, "floor": 0.0}
    for name in ("riemannian", "reflora", "altlora"):
        one = descend(name, (a, b, gradient), 3, **options)[-1]
        other = descend(name, (a / 7.0, b * 7.0, gradient), 3, **options)[-1]
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def first_directions(name: str, problem: Problem, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The directions of A and B at the first step, and G."""
    a, b, gradient = problem
    full = gradient(S * b @ a)
    pair = Pair(a, b, S * b.T @ full, S * full @ a.T)
    return *make_optimizer(name, options).directions(pair, {}, 0, RATE), full


def projector(columns: Tensor) -> Tensor:
    basis, _ = torch.linalg.qr(columns)
    return basis @ basis.T


def test_riemannian_directions_project_the_full_gradient() -> None:
    a, b, _ = data = problem(0)
    to_a, to_b, full = first_directions("riemannian", data, damping=0.0, floor=0.0)
    torch.testing.assert_close(b @ to_a, S * projector(b) @ full)
    torch.testing.assert_close(to_b @ a, S * full @ projector(a.T))


def test_riemannian_equals_peft() -> None:
    from peft.optimizers.riemannian import _RiemannianPreconditioner

    a, b, gradient = problem(1)
    reg = 0.03
    to_a, to_b, full = first_directions("riemannian", (a, b, gradient), damping=0.0, floor=reg)
    parameters = [torch.nn.Parameter(a), torch.nn.Parameter(b)]
    parameters[0].grad, parameters[1].grad = S * b.T @ full, S * full @ a.T
    _RiemannianPreconditioner([(parameters[0], parameters[1])], reg).step()
    torch.testing.assert_close(to_a, parameters[0].grad)
    torch.testing.assert_close(to_b, parameters[1].grad)


def test_reflora_is_gradient_descent_of_the_balanced_pair() -> None:
    a, b, gradient = data = problem(2)
    metric = balancing(a, b, 0.0, 0.0)
    torch.testing.assert_close(metric @ a @ a.T @ metric, b.T @ b)
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.sqrt()) @ vectors.T
    balanced_a, balanced_b = root @ a, torch.linalg.solve(root, b, left=False)
    torch.testing.assert_close(balanced_a @ balanced_a.T, balanced_b.T @ balanced_b)
    full = gradient(S * b @ a)
    stepped = (balanced_b - RATE * S * full @ balanced_a.T) @ (balanced_a - RATE * S * balanced_b.T @ full)
    torch.testing.assert_close(descend("reflora", data, 1, **UNDAMPED["reflora"])[0], stepped)


def test_reflora_waits_for_its_warm_up() -> None:
    a, b, _ = data = problem(2)
    to_a, to_b, full = first_directions("reflora", data, warmup_steps=1)
    torch.testing.assert_close(to_a, S * b.T @ full)
    torch.testing.assert_close(to_b, S * full @ a.T)


def test_altlora_without_momentum_projects_alternately() -> None:
    a, b, gradient = problem(4)
    full = gradient(S * b @ a)
    optimizer = make_optimizer("altlora", UNDAMPED["altlora"], betas=(0.0, 0.0))
    to_a, to_b = optimizer.directions(Pair(a, b, S * b.T @ full, S * full @ a.T), {}, 0, RATE)
    torch.testing.assert_close(b @ to_a, S * projector(b) @ full)
    new_a = a - RATE * to_a
    torch.testing.assert_close(to_b, S * full @ a.T @ torch.linalg.inv(new_a @ new_a.T))


def test_altlora_carries_its_momentum_into_the_new_column_space() -> None:
    """With no further gradient, B M_A becomes β·P_B (B_old M_A), and likewise for B: transport, no more."""
    a, b, gradient = problem(5)
    full = gradient(S * b @ a)
    optimizer = make_optimizer("altlora", UNDAMPED["altlora"], betas=(0.9, 0.0))
    state: State = {}
    optimizer.directions(Pair(a, b, S * b.T @ full, S * full @ a.T), state, 0, RATE)
    before = dict(state)
    new_b = b + 0.1 * torch.randn(b.shape, generator=torch.Generator().manual_seed(0), dtype=b.dtype)
    optimizer.directions(Pair(a, new_b, torch.zeros_like(a), torch.zeros_like(b)), state, 1, 0.0)
    torch.testing.assert_close(new_b @ state["moment_a"], 0.9 * projector(new_b) @ b @ before["moment_a"])
    torch.testing.assert_close(state["moment_b"], 0.9 * before["moment_b"])


def test_lora_rite_first_step_is_the_polar_factor_of_the_gradient_in_the_basis() -> None:
    """V = ḡᵀḡ/m makes ḡ V^-½ = √m times the polar factor of G·U, whatever the length of G."""
    a, b, _ = data = problem(6)
    _, to_b, full = first_directions("lora_rite", data, epsilon=0.0)
    basis, upper = torch.linalg.qr(a.T)
    u, _, vh = torch.linalg.svd(full @ basis, full_matrices=False)
    torch.testing.assert_close(to_b @ upper.T, len(b) ** 0.5 * u @ vh)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_goes_downhill_from_b_zero(name: str) -> None:
    """LoRA's own start, with the defaults: finite at every step, and downhill."""
    a, b, gradient = problem(7)
    plain = make_optimizer(name, {}).plain
    products = descend(name, (a, torch.zeros_like(b), gradient), 60, plain=plain)
    assert all(bool(torch.isfinite(product).all()) for product in products)
    # G is linear in ΔW with a positive diagonal: the loss is half the sum of G times the distance to the target.
    target = gradient(torch.zeros_like(products[0]))
    slope = gradient(torch.ones_like(target)) - target

    def loss(product: Tensor) -> float:
        return float((gradient(S * product).square() / slope).sum())

    assert loss(products[-1]) < 0.8 * loss(torch.zeros_like(products[0]))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_single_precision_follows_double(name: str) -> None:
    a, b, gradient = problem(8)
    full = gradient(S * b @ a)
    pair = Pair(a, b, S * b.T @ full, S * full @ a.T)
    single = Pair(*(getattr(pair, field.name).float() for field in dataclasses.fields(pair)))
    optimizer = make_optimizer(name, {})
    for one, other in zip(
        optimizer.directions(single, {}, 0, RATE), optimizer.directions(pair, {}, 0, RATE), strict=True
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


NAMES = ["x.q:lora_a", "x.q:lora_b", "x.v:lora_a", "x.v:lora_b"]


def tensors_of(names: list[str], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_a": (3, 9), "lora_b": (12, 3), "magnitude": (12,)}
    return {name: torch.randn(shapes[name.partition(":")[2]], generator=generator) for name in names}


@pytest.mark.parametrize("name", ["altlora", "lora_rite"])
def test_moments_come_back_from_a_checkpoint_bit_for_bit(name: str) -> None:
    rule, again = (PairRule(make_optimizer(name, {}), NAMES) for _ in range(2))
    for step in range(3):
        rule.directions(tensors_of(NAMES, step), tensors_of(NAMES, 100 + step), step, RATE)
    again.load(tensors_of(NAMES, 0) | rule.tensors())
    assert set(again.tensors()) == set(rule.tensors())
    last = tensors_of(NAMES, 4), tensors_of(NAMES, 104)
    one, other = rule.directions(*last, 3, RATE), again.directions(*last, 3, RATE)
    assert all(torch.equal(one[key], other[key]) for key in NAMES)
    fresh = PairRule(make_optimizer(name, {}), NAMES).directions(*last, 3, RATE)
    assert not any(torch.equal(one[key], fresh[key]) for key in NAMES)


def test_what_is_no_pair_keeps_its_gradient_under_adamw_and_is_refused_under_sgd() -> None:
    names = [*NAMES, "x.q:magnitude"]
    gradients = tensors_of(names, 1)
    found = PairRule(make_optimizer("riemannian", {}), names).directions(tensors_of(names, 0), gradients, 0, RATE)
    assert torch.equal(found["x.q:magnitude"], gradients["x.q:magnitude"])
    assert not torch.equal(found["x.q:lora_a"], gradients["x.q:lora_a"])
    with pytest.raises(AdapterError, match=r"train with AltLoRA: 2 pairs A, B and 1 other parameters \(x.q:magnitude"):
        PairRule(make_optimizer("altlora", {}), names)
    with pytest.raises(AdapterError, match=r"train with Riemannian: 0 pairs"):
        PairRule(make_optimizer("riemannian", {}), ["x.q:lora_b"])


def test_registries_agree_and_options_are_checked() -> None:
    assert set(OPTIMIZERS) == set(OPTIMIZER_OPTIONS)
    assert set(FAMILIES) >= PAIR_FAMILIES
    assert isinstance(make_optimizer("adamw", {}), Optimizer)
    assert make_optimizer("lora_plus", {"lr_ratio": 4.0}).lr_ratio_b == 4.0
    with pytest.raises(ValueError, match=r"lr_ratio = 0.5 < 1"):
        make_optimizer("lora_plus", {"lr_ratio": 0.5})
    with pytest.raises(TypeError, match="momentum"):
        make_optimizer("riemannian", {"momentum": 0.5})
    assert pair_problem("adamw", "anything") is None
    assert "'reflora' steps pairs A, B with ΔW = s·B·A, which 'loha'" in str(pair_problem("reflora", "loha"))
