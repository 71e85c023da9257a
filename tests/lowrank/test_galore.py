"""GaLore: the formula written out, what it leaves to AdamW, what it keeps, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank.errors import AdapterError
from lowrank.optimizers.galore import GaLore, GaLoreRule
from lowrank.optimizers.registry import make_optimizer, rule_of

BETAS = (0.8, 0.95)


def gradients_of(shape: tuple[int, int], steps: int, rank: int, tail: float = 0.1) -> list[Tensor]:
    """Random matrices in fp64, of which `rank` singular values stand clear of the others."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
        found.append((u * torch.where(torch.arange(len(s)) < rank, s + 10.0, tail * s)) @ vh)
    return found


def galore(**options: Any) -> GaLore:
    made = make_optimizer("galore", options, BETAS)
    assert isinstance(made, GaLore)
    return made


def formula(gradients: list[Tensor], rank: int, gap: int, scale: float, left: bool) -> list[Tensor]:
    """α·P·Adam(PᵀG), or α·Adam(GP)·Pᵀ, by an SVD of LAPACK's and torch's own Adam over the projected space."""
    weight = torch.zeros(rank, gradients[0].shape[1]) if left else torch.zeros(gradients[0].shape[0], rank)
    weight = torch.nn.Parameter(weight.double())
    adam = torch.optim.Adam([weight], lr=1.0, betas=BETAS)
    found = []
    for step, gradient in enumerate(gradients):
        if step % gap == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            # Our convention: moments outlive P, so that signs are part of the result.
            signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
            p = (u * signs)[:, :rank] if left else (vh.T * signs)[:, :rank]
        before = weight.detach().clone()
        weight.grad = p.T @ gradient if left else gradient @ p
        adam.step()
        moved = before - weight.detach()
        found.append(scale * (p @ moved if left else moved @ p.T))
    return found


@pytest.mark.parametrize(
    ("shape", "proj_type", "left"),
    [
        ((12, 20), "std", True),
        ((20, 12), "std", False),
        ((12, 12), "std", False),
        ((12, 20), "right", False),
        ((20, 12), "left", True),
        # Large enough for a randomized SVD.
        ((60, 80), "std", True),
    ],
)
def test_it_is_the_formula(shape: tuple[int, int], proj_type: str, left: bool) -> None:
    """Over eight steps and three projections, whose moments go on."""
    gradients = gradients_of(shape, 8, rank=4, tail=1e-3)
    expected = formula(gradients, 4, 3, 0.25, left)
    optimizer = galore(rank=4, update_proj_gap=3, scale=0.25, proj_type=proj_type, n_iter=4)
    state: dict[str, Tensor] = {}
    for step, gradient in enumerate(gradients):
        torch.testing.assert_close(optimizer.direction(gradient, state, step), expected[step], rtol=0, atol=1e-6)
    assert state["moment"].shape == ((4, shape[1]) if left else (shape[0], 4))


def test_the_projection_stays_for_a_gap_and_then_follows_the_gradient() -> None:
    gradients = gradients_of((12, 20), 4, rank=4)
    optimizer, state, held = galore(rank=4, update_proj_gap=2), {}, []  # type: ignore[var-annotated]
    for step, gradient in enumerate(gradients):
        optimizer.direction(gradient, state, step)
        held.append(state["projector"])
    assert torch.equal(held[0], held[1])
    assert torch.equal(held[2], held[3])
    for step in (0, 2):
        u = torch.linalg.svd(gradients[step])[0][:, :4]
        torch.testing.assert_close(held[step] @ held[step].T, u @ u.T, rtol=0, atol=1e-7)


def test_what_has_a_side_of_the_rank_or_is_no_matrix_is_stepped_by_adamw() -> None:
    shapes: dict[str, tuple[int, ...]] = {"x:a": (4, 20), "x:b": (12, 4), "x:scale": (7,), "x:cube": (5, 6, 7)}
    generator = torch.Generator().manual_seed(1)
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    whole = torch.zeros(9, 9)
    rule = GaLoreRule(galore(rank=4), parameters | {"x:full": whole})
    theirs = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=0.1, betas=BETAS, weight_decay=0.3)
    sgd = torch.optim.SGD(parameters.values(), lr=0.1, weight_decay=0.3)
    for step in range(4):
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        found = rule.directions({}, gradients | {"x:full": torch.randn(9, 9, generator=generator)}, step, 0.1)
        for name in shapes:
            parameters[name].grad, theirs[name].grad = found[name], gradients[name]
        adamw.step()
        sgd.step()
    for name in shapes:
        torch.testing.assert_close(parameters[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_a_gradient_of_zero_has_no_subspace_and_rounding_is_none() -> None:
    """As of A at the start of LoRA. Then a gradient of rank 2, with what fp32 rounds off: a step of rank 2."""
    optimizer, state = galore(rank=4, scale=1.0), {}  # type: ignore[var-annotated]
    assert not optimizer.direction(torch.zeros(12, 20), state, 0).any()
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(12, 2, generator=generator) @ torch.randn(2, 20, generator=generator)
    step = optimizer.direction(gradient, state, 1)
    sigma = torch.linalg.svdvals(step)
    assert float(sigma[1]) > 0.1
    assert float(sigma[2]) < 1e-5
    assert int(state["projector"].any(0).sum()) == 2


NAMES = {"x.q:full_delta": (12, 20), "x.v:full_delta": (20, 12)}


def test_it_keeps_less_than_adamw_and_comes_back_from_a_checkpoint_bit_for_bit() -> None:
    def gradients(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}

    parameters = {name: torch.zeros(shape) for name, shape in NAMES.items()}
    options = {"rank": 3, "update_proj_gap": 2}
    rule, again, fresh = (rule_of(make_optimizer("galore", options), parameters) for _ in range(3))
    assert isinstance(rule, GaLoreRule)
    assert isinstance(again, GaLoreRule)
    assert isinstance(fresh, GaLoreRule)
    for step in range(3):
        rule.directions(parameters, gradients(step), step, 0.1)
    # P (12, 3) and two moments (3, 20) for each.
    assert sum(tensor.nbytes for tensor in rule.tensors().values()) == 2 * 4 * (12 * 3 + 2 * 3 * 20)
    again.load(parameters | rule.tensors())
    one, other, new = (r.directions(parameters, gradients(3), 3, 0.1) for r in (rule, again, fresh))
    for name in NAMES:
        assert torch.equal(one[name], other[name])
        assert not torch.equal(one[name], new[name])


def test_what_it_refuses() -> None:
    with pytest.raises(AdapterError, match=r"at most 3, so that rank 8 projects none. .*'full'"):
        GaLoreRule(galore(rank=8), {"x:a": torch.zeros(3, 9), "x:scale": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"rank = 0 < 1"):
        galore(rank=0)
    with pytest.raises(ValueError, match=r"scale = 0.0. Set scale > 0"):
        galore(scale=0.0)
