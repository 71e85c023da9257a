"""DoRA, HiRA, LoRA-XS and VeRA: what depends on the frozen weight, and what all layers share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_samples import layer_of, randomize, weight_of
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, Layer
from lowrank.adapters.dora import DoRA
from lowrank.adapters.frozen import frozen_weight
from lowrank.adapters.hira import HiRA
from lowrank.adapters.lora_xs import LoRAXS
from lowrank.adapters.registry import initial_adapters
from lowrank.adapters.vera import VeRA
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.factors import LowRankFactors
from lowrank.inject import AdaptedLinear
from lowrank.linear import NF4Linear, ZeroLinear
from lowrank.quantization.nf4 import quantize_nf4

SHAPE = (24, 36)


def one(method: str, layer: Layer | None = None, **settings: Any) -> Adapter:
    """The adapter of one layer before training."""
    config = AdapterConfig(method=method, **({"r": 4, "lora_alpha": 8.0, "init": "kaiming"} | settings))  # type: ignore[arg-type]
    return next(iter(initial_adapters([layer or layer_of(SHAPE)], config).values()))


def linear(weight: Tensor, bias: bool = True) -> nn.Linear:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    base.weight = nn.Parameter(weight, requires_grad=False)
    return base


def held_numbers(call: Callable[[], Tensor]) -> int:
    """How many numbers autograd keeps for the backward pass of a call."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        call()
    return sum(kept)


# ---- DoRA ------------------------------------------------------------------------------------------------------------


def test_doras_row_norms_are_those_of_the_changed_weight_of_whatever_base_it_is_on() -> None:
    adapter = randomize(one("dora"), 0.5)
    assert isinstance(adapter, DoRA)
    quantized = NF4Linear(quantize_nf4(weight_of(SHAPE).float()))
    first, second = linear(weight_of(SHAPE).float()), linear(3 * weight_of(SHAPE).float())
    for base in (first, second, quantized, first):
        weight = frozen_weight(base, SHAPE, "DoRA")
        expected = (weight + adapter.scaling * adapter.lora_b @ adapter.lora_a).norm(dim=1)
        torch.testing.assert_close(adapter.row_norms(base), expected, rtol=1e-5, atol=1e-5)


def test_dora_keeps_no_dense_matrix_for_the_backward_pass() -> None:
    shape = (240, 360)
    adapter, base = one("dora", layer_of(shape)), linear(weight_of(shape).float())
    x = torch.randn(2, shape[1])
    y = base(x)
    assert held_numbers(lambda: adapter(x, y, base)) < 240 * 360 / 2


def test_dora_leaves_rows_of_zeros_alone() -> None:
    weight = weight_of(SHAPE).float()
    weight[3] = 0
    adapter = one("dora", Layer("m", SHAPE, 0, lambda: weight))
    x, base = torch.randn(5, SHAPE[1]), linear(weight)
    y = AdaptedLinear(base, {"a": adapter}, "a")(x)
    torch.testing.assert_close(y, base(x))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


def test_dora_starts_from_a_split_with_nothing_else_changed() -> None:
    left, right = torch.randn(24, 2), torch.randn(2, 36)
    residual = weight_of(SHAPE).float() - left @ right
    adapter = one("dora", Layer("m", SHAPE, 0, lambda: residual, LowRankFactors(left, right)), init="split")
    torch.testing.assert_close(adapter.delta_weight(residual), left @ right, rtol=1e-4, atol=1e-4)


def test_what_dora_and_hira_refuse() -> None:
    with pytest.raises(AdapterError, match=r"DoRA does not start from init = 'pissa'.*Set finetune\.adapter\.init"):
        one("dora", init="pissa")
    partitioned = linear(weight_of(SHAPE).float())
    partitioned.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    for method in ("dora", "hira"):
        adapter = one(method)
        with pytest.raises(AdapterError, match=r"needs all of W.*zero_stage <= 2"):
            adapter(torch.randn(2, 36), torch.randn(2, 24), partitioned)
        for call in (adapter.delta_weight, lambda adapter=adapter: adapter.delta(torch.randn(2, 36))):
            with pytest.raises(AdapterError, match="depends on the frozen weight"):
                call()


# ---- HiRA ------------------------------------------------------------------------------------------------------------


def test_hira_is_of_high_rank_and_nothing_over_zeros() -> None:
    adapter = randomize(one("hira", r=2), 0.5)
    assert torch.linalg.matrix_rank(adapter.delta_weight(weight_of(SHAPE).float())) == 24
    y = torch.randn(3, 24)
    assert torch.equal(adapter(torch.randn(3, 36), y, ZeroLinear(SHAPE)), y)


def test_hira_keeps_no_dense_matrix_for_the_backward_pass() -> None:
    adapter, base = randomize(one("hira"), 0.5), linear(weight_of(SHAPE).float())
    assert isinstance(adapter, HiRA)
    x = torch.randn(2, 36, requires_grad=True)
    y = base(x.detach())
    assert held_numbers(lambda: adapter(x, y, base)) < 24 * 36
    assert held_numbers(lambda: nn.functional.linear(x, adapter.delta_weight(base.weight))) > 24 * 36


# ---- LoRA-XS ---------------------------------------------------------------------------------------------------------


def test_lora_xs_moves_within_the_leading_singular_vectors_of_w() -> None:
    spectrum = torch.tensor([9.0, 7.0, 5.0, 4.0, *[0.5] * 20])
    u, v = (torch.linalg.qr(torch.randn(k, 24, generator=torch.Generator().manual_seed(k)))[0] for k in SHAPE)
    weight = (u * spectrum) @ v.T
    adapter = one("lora_xs", Layer("m", SHAPE, 0, lambda: weight))
    assert isinstance(adapter, LoRAXS)
    assert adapter.scaling == 2
    with torch.no_grad():
        adapter.lora_xs_r.copy_(torch.eye(4))
    best = (u[:, :4] * spectrum[:4]) @ v[:, :4].T
    torch.testing.assert_close(adapter.delta_weight(), 2 * best, rtol=1e-3, atol=1e-3)
    assert [name for name, _ in adapter.named_parameters()] == ["lora_xs_r"]


# ---- VeRA ------------------------------------------------------------------------------------------------------------


def test_veras_layers_share_one_storage_of_the_largest_size_wherever_they_move() -> None:
    layers = [layer_of((24, 36), "a", 0), layer_of((40, 16), "b", 1), layer_of((8, 8), "c", 2)]
    adapters = initial_adapters(layers, AdapterConfig(method="vera", r=5, init="kaiming"))
    model = nn.ModuleDict(adapters)
    for moved in (model, model.double(), model.to("meta")):
        shared = {id(adapter.projections) for adapter in moved.values()}  # type: ignore[union-attr]
        assert len(shared) == 1
        assert len({id(tensor) for tensor in moved.buffers()}) == 2
    a = initial_adapters(layers, AdapterConfig(method="vera", r=5, init="kaiming"))["a"]
    assert isinstance(a, VeRA)
    assert (a.projections.a.shape, a.projections.b.shape) == ((5, 36), (40, 5))


def test_vera_says_what_it_lacks() -> None:
    with pytest.raises(AdapterError, match=r"share one rank.*Set finetune\.adapter\.r"):
        one("vera", rank_pattern={"q_proj": 2})
    vectors = {"m": {"vera_lambda_b": torch.ones(24), "vera_lambda_d": torch.ones(3)}}
    with pytest.raises(AdapterError, match="save_projection: true"):
        VeRA.load_all(vectors, {}, {})
    shared = {"vera_A": torch.randn(3, 40), "vera_B": torch.randn(30, 3)}
    foreign = VeRA.load_all(vectors, shared, {})["m"]
    with pytest.raises(AdapterError, match="does not tell in_features"):
        foreign.to_lora()
    foreign(torch.randn(2, 36), torch.zeros(2, 24), nn.Identity())
    lora = foreign.to_lora()
    torch.testing.assert_close(lora.b @ lora.a, shared["vera_B"][:24] @ shared["vera_A"][:, :36])
    with pytest.raises(AdapterError, match="do not fit a 24x36 layer of rank 3"):
        VeRA.load_all(vectors, shared | {"vera_B": torch.randn(20, 3)}, {"rankline": {"shapes": {"m": [24, 36]}}})
