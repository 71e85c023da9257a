"""The rank allocator against brute force, dynamic programming and linear programming."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lowrank.allocate import (
    Allocation,
    RankBounds,
    Roofline,
    Spectrum,
    allocate_bytes,
    allocate_latency,
    allocate_parameters,
)
from lowrank.errors import RankError

MACHINE = Roofline(flops=1e11, bandwidth=2e10, batch=16)
examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def spectra_of(shapes: Sequence[tuple[int, int]], seed: int = 0) -> list[Spectrum]:
    """Random falling spectra of different scale and decay."""
    random = np.random.default_rng(seed)
    made = []
    for index, shape in enumerate(shapes):
        sigma = np.sort(random.exponential(1 + index, min(shape)) ** random.uniform(0.5, 2))[::-1].copy()
        made.append(Spectrum(f"t{index}", shape, torch.from_numpy(sigma), importance=float(random.uniform(0.5, 2))))
    return made


def tail(spectrum: Spectrum, rank: int) -> float:
    return spectrum.importance * float(spectrum.sigma[rank:].square().sum())


def objective(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    """√(Σ w ‖W − W_r‖² / Σ w ‖W‖²)."""
    lost = sum(tail(spectrum, rank) for spectrum, rank in zip(spectra, ranks))
    return math.sqrt(lost / sum(tail(spectrum, 0) for spectrum in spectra))


def brute_force(
    spectra: Sequence[Spectrum],
    budget: float,
    cost: Callable[[tuple[int, int], int], float],
    bounds: RankBounds | None = None,
) -> float:
    """The least objective of all admissible ranks."""
    levels = [(bounds or RankBounds()).levels(spectrum) for spectrum in spectra]
    return min(
        objective(spectra, ranks)
        for ranks in itertools.product(*levels)
        if sum(cost(s.shape, r) for s, r in zip(spectra, ranks)) <= budget * (1 + 1e-12)
    )


def count(shape: tuple[int, int], rank: int) -> float:
    return rank * sum(shape)


def assert_consistent(found: Allocation, spectra: Sequence[Spectrum]) -> None:
    ranks = [found.ranks[spectrum.name] for spectrum in spectra]
    assert found.relative_error == pytest.approx(objective(spectra, ranks), abs=1e-9)
    assert found.spent <= found.budget * (1 + 1e-12)
    for spectrum, rank in zip(spectra, ranks):
        expected = math.sqrt(tail(spectrum, rank) / tail(spectrum, 0))
        assert found.errors[spectrum.name] == pytest.approx(expected, abs=1e-7)


class TestParameters:
    @examples
    @given(
        shape=st.tuples(st.integers(2, 9), st.integers(2, 9)),
        seed=st.integers(0, 99),
        share=st.floats(0.2, 1.5),
        multiple=st.integers(1, 2),
    )
    def test_equal_shapes_are_solved_exactly(
        self, shape: tuple[int, int], seed: int, share: float, multiple: int
    ) -> None:
        spectra, bounds = spectra_of([shape] * 3, seed), RankBounds(min_rank=0, multiple=multiple)
        budget = share * 3 * shape[0] * shape[1]
        found = allocate_parameters(spectra, budget, bounds)
        assert_consistent(found, spectra)
        assert found.relative_error == pytest.approx(brute_force(spectra, budget, count, bounds), abs=1e-9)

    @examples
    @given(
        shapes=st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=3),
        seed=st.integers(0, 99),
        share=st.floats(0.3, 1.2),
    )
    def test_other_shapes_are_solved_to_the_last_step(
        self, shapes: list[tuple[int, int]], seed: int, share: float
    ) -> None:
        spectra = spectra_of(shapes, seed)
        budget = max(share * sum(m * n for m, n in shapes), sum(m + n for m, n in shapes))
        found = allocate_parameters(spectra, budget)
        best = brute_force(spectra, budget, count)
        assert_consistent(found, spectra)
        assert found.best_error <= best + 1e-9
        assert best <= found.relative_error + 1e-9
        total, largest = sum(tail(s, 0) for s in spectra), max(s.importance * float(s.sigma[0]) ** 2 for s in spectra)
        assert found.relative_error**2 - found.best_error**2 <= largest / total + 1e-9
        again = brute_force(spectra, found.spent, count)
        if found.relative_error == pytest.approx(found.best_error, abs=1e-12):
            assert again == pytest.approx(found.relative_error, abs=1e-9)

    def test_a_larger_model_against_dynamic_programming(self) -> None:
        shapes = [(12, 12), (12, 4), (20, 12), (12, 20), (12, 12), (8, 8)] * 2
        spectra, unit = spectra_of(shapes, seed=5), 8
        levels = [RankBounds().levels(spectrum) for spectrum in spectra]
        budget = 600 // unit
        least = np.full(budget + 1, 0.0)
        for spectrum, allowed in zip(spectra, levels):
            cost = sum(spectrum.shape) // unit
            least = np.array(
                [
                    min((least[b - r * cost] + tail(spectrum, r) for r in allowed if r * cost <= b), default=math.inf)
                    for b in range(budget + 1)
                ]
            )
        optimum = math.sqrt(least[budget] / sum(tail(s, 0) for s in spectra))
        found = allocate_parameters(spectra, budget * unit)
        assert_consistent(found, spectra)
        assert found.best_error <= optimum <= found.relative_error
        assert found.relative_error == pytest.approx(optimum, rel=0.01)

    def test_the_bound_is_the_linear_program(self) -> None:
        spectra = spectra_of([(9, 7), (5, 11), (8, 8)], seed=3)
        found = allocate_parameters(spectra, 150, RankBounds(min_rank=0))
        steps = [(s, i) for s in spectra for i in range(s.shape[0] * s.shape[1] // sum(s.shape))]
        gains = [-s.importance * float(s.sigma[i]) ** 2 for s, i in steps]
        solved = linprog(gains, A_ub=[[sum(s.shape) for s, _ in steps]], b_ub=[150], bounds=(0, 1))
        total = sum(tail(s, 0) for s in spectra)
        assert found.best_error == pytest.approx(math.sqrt((total + solved.fun) / total), rel=1e-9)

    def test_energy_goes_where_it_is_cheap(self) -> None:
        """Equal spectra: the smaller matrix gets the larger rank; a weight of 100 turns that round."""
        sigma = torch.arange(1, 11, dtype=torch.float64) ** -1.0
        small, large = Spectrum("small", (10, 10), sigma), Spectrum("large", (40, 40), sigma)
        ranks = allocate_parameters([small, large], 300).ranks
        assert ranks["small"] > ranks["large"]
        favoured = Spectrum("large", (40, 40), sigma, importance=100.0)
        assert allocate_parameters([small, favoured], 300).ranks["large"] > ranks["large"]

    def test_bounds_by_name_and_multiples(self) -> None:
        spectra = spectra_of([(32, 32)] * 3)
        bounds = RankBounds(min_rank={"t0": 5}, max_rank={"t2": 9}, multiple=4)
        found = allocate_parameters(spectra, 64 * 30, bounds)
        assert found.ranks["t0"] >= 8
        assert found.ranks["t2"] <= 8
        assert all(rank % 4 == 0 and rank <= 16 for rank in found.ranks.values())
        assert list(bounds.levels(spectra[1])) == [4, 8, 12, 16]

    def test_a_rich_budget_takes_all_that_helps_and_no_more(self) -> None:
        spectra = spectra_of([(10, 10), (6, 30)])
        found = allocate_parameters(spectra, 1e9)
        assert found.ranks == {"t0": 5, "t1": 5}
        assert found.relative_error == found.best_error

    def test_leading_values_and_a_zero_matrix(self) -> None:
        leading = Spectrum("a", (10, 10), torch.tensor([3.0, 2.0]), energy=20.0)
        zero = Spectrum("b", (10, 10), torch.zeros(10))
        found = allocate_parameters([leading, zero], 60)
        assert found.ranks == {"a": 2, "b": 1}
        assert found.errors == {"a": pytest.approx(math.sqrt(7 / 20)), "b": 0.0}

    def test_bytes_are_parameters_times_their_size(self) -> None:
        spectra = spectra_of([(9, 7), (5, 11), (8, 8)])
        assert allocate_bytes(spectra, 300, bytes_per_number=2).ranks == allocate_parameters(spectra, 150).ranks
        assert allocate_bytes(spectra, 300, bytes_per_number=2).spent <= 300


class TestLatency:
    @examples
    @given(seed=st.integers(0, 99), share=st.floats(0.3, 1.0), batch=st.sampled_from([1, 8, 512]))
    def test_against_brute_force(self, seed: int, share: float, batch: int) -> None:
        spectra = spectra_of([(9, 7), (5, 11), (8, 8)], seed)
        machine = Roofline(flops=1e11, bandwidth=2e10, batch=batch)
        least = sum(machine.factored(s.shape, 1) for s in spectra)
        budget = max(least, share * sum(machine.factored(s.shape, 4) for s in spectra))
        found = allocate_latency(spectra, budget, machine)
        assert_consistent(found, spectra)
        assert found.best_error <= brute_force(spectra, budget, machine.factored) + 1e-9
        assert found.relative_error >= brute_force(spectra, budget, machine.factored) - 1e-9

    def test_a_layer_may_be_dropped(self) -> None:
        """At rank 0 a product costs nothing, at rank 1 at least its activations: the cost is not convex there."""
        spectra = [
            Spectrum(f"t{i}", (8, 8), scale * torch.tensor([1.0, 0.9, 0.8, 0.7], dtype=torch.float64))
            for i, scale in enumerate((3.0, 1.0))
        ]
        bounds = RankBounds(min_rank=0)
        machine = Roofline(flops=1e11, bandwidth=2e10, batch=1)
        for share in (0.0, 0.3, 1.0, 1.5, 2.0):
            budget = share * machine.factored((8, 8), 4)
            found = allocate_latency(spectra, budget, machine, bounds)
            best = brute_force(spectra, budget, machine.factored, bounds)
            assert found.best_error**2 - 1e-12 <= best**2 <= found.relative_error**2 + 1e-12
            if share in (0.0, 1.0, 2.0):
                assert found.relative_error**2 == pytest.approx(best**2, abs=1e-12)
        assert found.ranks == {"t0": 4, "t1": 4}

    def test_a_flat_spectrum_is_taken_step_by_step(self) -> None:
        flat = [Spectrum(f"t{i}", (60, 60), torch.full((60,), 0.1)) for i in range(3)]
        found = allocate_parameters(flat, 120 * 40)
        assert sum(found.ranks.values()) == 40
        assert found.spent == found.budget

    def test_the_roofline_and_its_two_regimes(self) -> None:
        one, many = Roofline(1e11, 2e10, batch=1), Roofline(1e11, 2e10, batch=4096)
        assert one.dense((1000, 2000)) == pytest.approx((2e6 + 3000) * 4 / 2e10)
        assert many.dense((1000, 2000)) == pytest.approx(2 * 2e6 * 4096 / 1e11)
        assert one.factored((1000, 2000), 10) == pytest.approx((10 * 3000 + 3000 + 20) * 4 / 2e10)
        assert one.factored((1000, 2000), 0) == 0.0

    def test_time_is_convex_in_the_rank(self) -> None:
        times = [MACHINE.factored((300, 200), rank) for rank in range(1, 121)]
        assert (np.diff(times, 2) >= -1e-18).all()

    def test_half_the_time_of_the_dense_layers(self) -> None:
        spectra = spectra_of([(64, 64), (64, 128), (128, 64)])
        dense = sum(MACHINE.dense(spectrum.shape) for spectrum in spectra)
        found = allocate_latency(spectra, dense / 2, MACHINE)
        spent = sum(MACHINE.factored(s.shape, found.ranks[s.name]) for s in spectra)
        assert spent == pytest.approx(found.spent)
        assert 0.9 * dense / 2 < spent <= dense / 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("spectrum", "message"),
        [
            (Spectrum("q", (3, 3), torch.tensor([1.0, 2.0])), r"rank to q \(3x3\): .* non-increasing"),
            (Spectrum("q", (3, 3), torch.tensor([1.0, -2.0])), "finite, >= 0"),
            (Spectrum("q", (3, 3), torch.tensor([float("nan")])), "finite, >= 0"),
            (Spectrum("q", (3, 3), torch.ones(4)), r"got \[4\] singular values. Give 1 to 3"),
            (Spectrum("q", (3, 3), torch.ones(0)), r"got \[0\] singular values"),
            (Spectrum("q", (3, 3), torch.ones(3), importance=0.0), "importance = 0.0"),
        ],
    )
    def test_spectra(self, spectrum: Spectrum, message: str) -> None:
        with pytest.raises(RankError, match=message):
            allocate_parameters([spectrum], 100)

    def test_budgets_and_bounds(self) -> None:
        spectra = spectra_of([(8, 8)] * 2)
        with pytest.raises(
            RankError, match=r"the least ranks take 32 numbers, the budget is 31. Raise the budget to at"
        ):
            allocate_parameters(spectra, 31)
        with pytest.raises(RankError, match="the budget is nan"):
            allocate_parameters(spectra, math.nan)
        with pytest.raises(RankError, match=r"t0 \(8x8\): no multiple of 3 lies in \[4, 5\]"):
            allocate_parameters(spectra, 100, RankBounds(min_rank=4, max_rank=5, multiple=3))
        with pytest.raises(RankError, match="multiple = 0"):
            allocate_parameters(spectra, 100, RankBounds(multiple=0))
        with pytest.raises(RankError, match="got no spectra"):
            allocate_parameters([], 100)
        with pytest.raises(RankError, match="names repeat, such as t0"):
            allocate_parameters([*spectra, spectra[0]], 100)
