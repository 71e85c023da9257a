"""Laws that every registered adapter family keeps, over dense and NF4 bases."""

import dataclasses
from pathlib import Path

import pytest
import torch
from adapter_samples import CASES, SAMPLES, Sample, config_of, layer_of, made, randomize, weight_of
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapter_options import ADAPTER_OPTIONS, TAKES_SPLIT
from lowrank.adapters.base import Adapter
from lowrank.adapters.peft_format import load_adapter, save_adapter
from lowrank.adapters.registry import FAMILIES, initial_adapters
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.inject import AdaptedLinear
from lowrank.linear import NF4Linear
from lowrank.quantization.nf4 import quantize_nf4

MODULE = "model.layers.0.self_attn.q_proj"
every_case = pytest.mark.parametrize(
    ("method", "sample", "shape"), CASES, ids=[f"{m}-{SAMPLES[m].index(s)}-{a}x{b}" for m, s, (a, b) in CASES]
)


def input_of(shape: tuple[int, int]) -> Tensor:
    return torch.randn(5, 3, shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def dense_base(shape: tuple[int, int]) -> nn.Linear:
    base = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    base.weight = nn.Parameter(weight_of(shape), requires_grad=False)
    base.bias.requires_grad_(False)
    return base


def trained(method: str, sample: Sample, shape: tuple[int, int]) -> Adapter:
    return randomize(made(method, sample, shape), sample.scale)


def obeys_the_dense_form(adapter: Adapter, base: nn.Linear, delta: Tensor) -> bool:
    """Whether the adapted layer is linear(x, W + delta)."""
    x = input_of(adapter.shape)
    got = AdaptedLinear(base, {"a": adapter}, "a")(x)
    return torch.allclose(got, F.linear(x, base.weight + delta, base.bias), rtol=1e-9, atol=1e-9)


def test_every_family_has_samples_and_options() -> None:
    assert set(SAMPLES) == set(FAMILIES) == set(ADAPTER_OPTIONS)
    assert {name: family.takes_split for name, family in FAMILIES.items() if family.takes_split} == TAKES_SPLIT


def test_patterns_choose_layers_ranks_and_alphas() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    layers = [layer_of((24, 36), name, index) for index, name in enumerate(names)]
    config = AdapterConfig(
        r=4,
        lora_alpha=8.0,
        init="kaiming",
        target_modules=["q_proj"],
        rank_pattern={"1.self_attn.q_proj": 2},
        alpha_pattern={r"layers\.0\..*q_proj": 12.0},
    )
    made = initial_adapters(layers, config)
    assert {name: (adapter.r, adapter.scaling) for name, adapter in made.items()} == {
        names[0]: (4, 3.0),
        names[2]: (2, 4.0),
    }
    for wrong in ({"target_modules": ["k_proj"]}, {"rank_pattern": {"k_proj": 2}}, {"alpha_pattern": {"q": 2.0}}):
        with pytest.raises(AdapterError, match=r"matches no layer. The targets are q_proj, up_proj"):
            initial_adapters(layers, dataclasses.replace(config, **wrong))
    with pytest.raises(AdapterError, match=r"q_proj \(24x36\): rank 25 > 24. Set finetune.adapter.r <= 24"):
        initial_adapters(layers, dataclasses.replace(config, r=25))


@every_case
def test_it_starts_at_no_change(method: str, sample: Sample, shape: tuple[int, int]) -> None:
    delta = made(method, sample, shape).delta_weight(weight_of(shape))
    if sample.starts_at == 0:
        assert not delta.any()
    assert delta.norm() <= sample.starts_at * weight_of(shape).norm()


@every_case
def test_its_layer_is_the_dense_one(method: str, sample: Sample, shape: tuple[int, int]) -> None:
    adapter, base = trained(method, sample, shape), dense_base(shape)
    delta = adapter.delta_weight(base.weight).detach()
    assert delta.shape == shape
    assert delta.norm() >= 0.1 * base.weight.norm()
    assert obeys_the_dense_form(adapter, base, delta)
    assert not obeys_the_dense_form(adapter, base, 2 * delta)
    # Mutations that the law must notice: another scaling, and a transposed (or reversed) factor.
    adapter.scaling *= 2
    assert not obeys_the_dense_form(adapter, base, delta)
    adapter.scaling /= 2
    for parameter in adapter.parameters():
        if parameter.requires_grad and parameter.numel() > 1:
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.copy_(kept.T.reshape(kept.shape) if kept.ndim == 2 and min(kept.shape) > 1 else kept.flip(0))
            assert not obeys_the_dense_form(adapter, base, delta)
            with torch.no_grad():
                parameter.copy_(kept)
    assert obeys_the_dense_form(adapter, base, delta)


@every_case
def test_its_gradients_are_those_of_the_dense_form(method: str, sample: Sample, shape: tuple[int, int]) -> None:
    adapter, base = trained(method, sample, shape), dense_base(shape)
    x = input_of(shape).requires_grad_()
    probe = torch.randn(5, 3, shape[0], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    layer = AdaptedLinear(base, {"a": adapter}, "a")
    ours = torch.autograd.grad((layer(x) * probe).sum(), [x, *parameters])
    dense = F.linear(x, base.weight + adapter.delta_weight(base.weight), base.bias)
    theirs = torch.autograd.grad((dense * probe).sum(), [x, *parameters])
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@every_case
def test_its_gradients_are_finite_differences(method: str, sample: Sample, shape: tuple[int, int]) -> None:
    adapter, base = trained(method, sample, shape), dense_base(shape)
    layer, x = AdaptedLinear(base, {"a": adapter}, "a"), input_of(shape)
    probe = torch.randn(5, 3, shape[0], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    grads = torch.autograd.grad((layer(x) * probe).sum(), parameters)
    if sample.hold is not None:
        sample.hold(adapter, base)
    step = 1e-5
    for parameter, grad in zip(parameters, grads, strict=True):
        along = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(along, alpha=sign * step)
                values.append(float((layer(x) * probe).sum()))
                parameter.sub_(along, alpha=sign * step)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((grad * along).sum()), rel=1e-5, abs=1e-5)


@every_case
def test_merging_is_the_same_layer_and_unmerging_restores_it(
    method: str, sample: Sample, shape: tuple[int, int]
) -> None:
    adapter, base = trained(method, sample, shape).float(), dense_base(shape).float()
    before, x = base.weight.clone(), input_of(shape).float()
    layer = AdaptedLinear(base, {"a": adapter}, "a")
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(base.weight, before)
    with pytest.raises(AdapterError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(base.weight, before)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@every_case
def test_over_nf4_it_is_the_layer_of_the_dequantized_weight(
    method: str, sample: Sample, shape: tuple[int, int]
) -> None:
    adapter = trained(method, sample, shape).float()
    base = NF4Linear(quantize_nf4(weight_of(shape).float()))
    layer, x = AdaptedLinear(base, {"a": adapter}, "a"), input_of(shape).float()
    weight = base.dense_weight()
    torch.testing.assert_close(layer(x), F.linear(x, weight + adapter.delta_weight(weight)), rtol=1e-4, atol=1e-4)
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters() if p.requires_grad)
    with pytest.raises(AdapterError, match="NF4Linear"):
        layer.merge()


@every_case
def test_only_its_own_parameters_train_and_they_are_as_many_as_the_formula_says(
    method: str, sample: Sample, shape: tuple[int, int]
) -> None:
    adapter = trained(method, sample, shape)
    layer = AdaptedLinear(dense_base(shape), {"a": adapter}, "a")
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert all(name.startswith("adapters.a.") for name in names)
    assert adapter.num_parameters == sample.count(*shape)


@every_case
def test_it_loads_as_it_was_saved(method: str, sample: Sample, shape: tuple[int, int], tmp_path: Path) -> None:
    config = config_of(method, sample)
    layers = [layer_of(shape), layer_of(shape, "model.layers.1.mlp.up_proj", 1)]
    adapters = FAMILIES[method].initial_all(layers, config)
    for index, adapter in enumerate(adapters.values()):
        randomize(adapter, sample.scale, index)
    save_adapter(tmp_path, adapters, config, {"name": "tiny"})
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    loaded = load_adapter(tmp_path)
    assert set(loaded) == set(adapters)
    x, weight = input_of(shape).float(), weight_of(shape).float()
    for module, adapter in adapters.items():
        assert loaded[module].scaling == adapter.scaling
        assert {k: v.tolist() for k, v in loaded[module].tensors().items()} == {
            k: v.tolist() for k, v in adapter.tensors().items()
        }
        assert torch.equal(loaded[module].delta_weight(weight), adapter.delta_weight(weight))
        base = nn.Linear(shape[1], shape[0])
        loaded[module].eval(), adapter.eval()
        assert torch.equal(loaded[module](x, base(x), base), adapter(x, base(x), base))
    save_adapter(tmp_path, loaded, config, {"name": "tiny"})
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights


@every_case
def test_its_lora_is_exact_cut_or_refused(method: str, sample: Sample, shape: tuple[int, int]) -> None:
    adapter = trained(method, sample, shape)
    delta = adapter.delta_weight(weight_of(shape)).detach()
    if adapter.export == "merge-only":
        with pytest.raises(AdapterError, match="Merge it into the base"):
            adapter.to_lora(max_rank=4)
        return
    if adapter.export == "exact":
        lora = adapter.to_lora()
        assert lora.exact
        assert lora.retained_energy == 1
        torch.testing.assert_close(lora.b @ lora.a, delta, rtol=1e-6, atol=1e-6)
    else:
        with pytest.raises(AdapterError, match="Give max_rank"):
            adapter.to_lora()
    u, s, vh = torch.linalg.svd(delta)
    cut = adapter.to_lora(max_rank=2)
    assert cut.a.shape == (2, shape[1])
    best = u[:, :2] @ torch.diag(s[:2]) @ vh[:2]
    torch.testing.assert_close((cut.b @ cut.a).double(), best, rtol=1e-4, atol=1e-4)
    assert cut.retained_energy == pytest.approx(float(s[:2].square().sum() / s.square().sum()), rel=1e-5)


@every_case
def test_it_refuses_what_it_cannot_take(method: str, sample: Sample, shape: tuple[int, int], tmp_path: Path) -> None:
    config = config_of(method, sample)
    adapters = FAMILIES[method].initial_all([layer_of(shape)], config)
    with torch.no_grad():
        next(p for p in adapters[MODULE].parameters() if p.requires_grad).flatten()[0] = torch.nan
    with pytest.raises(AdapterError, match="NaN"):
        save_adapter(tmp_path, adapters, config, {"name": "tiny"})
    save_adapter(tmp_path, FAMILIES[method].initial_all([layer_of(shape)], config), config, {"name": "tiny"})
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="missing or damaged"):
        load_adapter(tmp_path)
