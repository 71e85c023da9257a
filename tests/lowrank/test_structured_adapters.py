"""What LoHA, ABBA, LoKr, KronA, LoKH and KRAdapter promise beyond the laws of all families."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import layer_of, randomize, weight_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.adapter_options import ADAPTER_OPTIONS
from lowrank.adapters import lokh
from lowrank.adapters.base import Adapter
from lowrank.adapters.loha import LoHA
from lowrank.adapters.lokh import LoKH
from lowrank.adapters.lokr import LoKr, factorization
from lowrank.adapters.peft_format import load_adapter, save_adapter
from lowrank.adapters.registry import FAMILIES
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError

MODULE = "model.layers.0.self_attn.q_proj"
CHAIN = {"form": "chain"}


def initial(method: str, shape: tuple[int, int], **fields: Any) -> Any:
    config = AdapterConfig(method=method, **({"init": "kaiming"} | fields))  # type: ignore[arg-type]
    return FAMILIES[method].initial(layer_of(shape), config)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation gives, and of any that an SVD takes."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.decomposed = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, Tensor):
                self.made = max(self.made, one.numel())
        if "svd" in str(func):
            self.decomposed = max(self.decomposed, args[0].numel())
        return found


@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("loha", {"r": 3}),
        ("loha", {"r": 12}),
        ("abba", {"r": 2, "options": {"r1": 3}}),
        ("lokr", {"r": 3}),
        ("lokr", {"r": 3, "options": {"factor": 4}}),
        ("krona", {}),
        ("lokh", {"r": 3}),
        ("lokh", {"options": CHAIN}),
        ("lokh", {"options": CHAIN | {"num_factors": 3}}),
        ("kradapter", {}),
    ],
)
def test_no_pass_makes_a_matrix_of_the_size_of_the_weight(
    method: str, fields: dict[str, Any], shape: tuple[int, int]
) -> None:
    adapter: Adapter = randomize(initial(method, shape, **fields), 0.5)
    x = torch.randn(3, shape[1], requires_grad=True)
    with Largest() as watched:
        y = adapter.delta(x)
        y.backward(torch.ones_like(y))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    assert watched.made < 96 * 128 // 2
    with Largest() as watched:
        adapter.delta_weight()
    assert watched.made >= 96 * 128


@pytest.mark.parametrize(("method", "fields"), [("krona", {}), ("lokr", {"r": 8}), ("lokr", {"r": 12})])
def test_cutting_a_kronecker_product_decomposes_its_factors_only(method: str, fields: dict[str, Any]) -> None:
    adapter = randomize(initial(method, (96, 96), **fields).double(), 0.5)
    assert adapter.export == "truncated"
    with Largest() as watched:
        cut = adapter.to_lora(max_rank=5)
    assert 0 < watched.decomposed <= 12 * 12
    u, s, vh = torch.linalg.svd(adapter.delta_weight().detach())
    torch.testing.assert_close(cut.b @ cut.a, u[:, :5] @ torch.diag(s[:5]) @ vh[:5])
    assert cut.retained_energy == pytest.approx(float(s[:5].square().sum() / s.square().sum()))


# ---- starts ---------------------------------------------------------------------------------------------------------


def test_loha_starts_as_lycoris_does() -> None:
    adapter: LoHA = initial("loha", (200, 300), r=8, options={"init": "lycoris"})
    assert not adapter.w2_a.any()
    for factor, spread in ((adapter.w1_a, 0.1), (adapter.w1_b, 1.0), (adapter.w2_b, 1.0)):
        assert float(factor.detach().std()) == pytest.approx(spread, rel=0.1)


def test_abba_starts_from_the_best_approximation_of_the_weight_and_trains_it() -> None:
    adapter = initial("abba", (24, 36), r=2, lora_alpha=9.0, options={"r1": 5, "alpha1": 4.0})
    u, s, vh = torch.linalg.svd(weight_of((24, 36), torch.float32))
    best = (u[:, :5] * s[:5]) @ vh[:5]
    torch.testing.assert_close((adapter.w1_a @ adapter.w1_b).detach(), best, rtol=1e-4, atol=1e-4)
    assert not adapter.w2_a.any()
    assert adapter.scaling == 6.0
    assert initial("abba", (24, 36), r=2, lora_alpha=9.0).scaling == 9.0
    assert all(parameter.requires_grad for parameter in adapter.parameters())


@pytest.mark.parametrize("shape", [(4, 9, 20), (9, 80), (3, 4, 5, 12)])
def test_a_chain_starts_with_columns_of_norm_one_beside_the_zero_factor(shape: tuple[int, ...]) -> None:
    adapter: LoKH = initial("lokh", (720, 600), options=CHAIN | {"shape": shape})
    *first, last = adapter.parameters()
    assert [len(factor) for factor in (*first, last)] == list(shape)
    assert not last.any()
    squares = torch.stack([factor.square().sum(0) for factor in first]).prod(0)
    assert float(squares.detach().mean()) == pytest.approx(1.0, rel=0.15)


def test_a_low_rank_lokh_starts_with_columns_of_norm_one() -> None:
    adapter: LoKH = initial("lokh", (720, 600), r=12)
    first = adapter.get_parameter("lokh_b1") @ adapter.get_parameter("lokh_a1")
    assert float(first.detach().square().sum(0).mean()) == pytest.approx(1.0, rel=0.3)
    assert float(adapter.get_parameter("lokh_a2").detach().square().sum(0).mean()) == pytest.approx(1.0, rel=0.15)
    assert not adapter.get_parameter("lokh_b2").any()


def test_kradapter_starts_as_its_authors_do() -> None:
    adapter = initial("kradapter", (720, 600), options={"scale": 2.0})
    u, v = adapter.parameters()
    assert (u.shape, v.shape) == ((26, 600), (28, 600))
    assert not v.any()
    assert float(u.detach().abs().max()) == pytest.approx(1 / math.sqrt(26), rel=0.01)
    assert adapter.scaling == 2.0


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 5, 8, 12, 17, 100, 5000])
def test_kronecker_shapes_are_those_of_peft(factor: int) -> None:
    from peft.tuners.lokr.layer import factorization as by_peft

    sizes = [*range(1, 130), 576, 1536, 2048, 4096, 4099, 49152]
    assert [factorization(size, factor) for size in sizes] == [by_peft(size, factor) for size in sizes]


@pytest.mark.parametrize(("r", "scale"), [(2, 4.0 / 2), (6, 1.0)])
def test_a_lycoris_file_keeps_its_own_scale(r: int, scale: float, tmp_path: Path) -> None:
    """LyCORIS: α/r, but 1 where both factors are full; PEFT's s = α/r comes from the configuration."""
    config = AdapterConfig(method="lokr", r=r, lora_alpha=10.0, options={"factor": 3})
    adapter: LoKr = FAMILIES["lokr"].initial(layer_of((24, 36)), config)  # type: ignore[assignment]
    randomize(adapter, 0.5)
    save_adapter(tmp_path, {MODULE: adapter}, config, {"name": "tiny"})
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{MODULE}.alpha": torch.tensor(4.0)}, file)
    loaded = load_adapter(tmp_path)[MODULE]
    expected = scale * torch.kron(adapter.w1(), adapter.w2())
    torch.testing.assert_close(loaded.delta_weight(), expected)
    assert (adapter.delta_weight() - expected).norm() > 0.1 * expected.norm()
    save_adapter(tmp_path, {MODULE: loaded}, config, {"name": "tiny"})
    torch.testing.assert_close(load_adapter(tmp_path)[MODULE].delta_weight(), expected)


def test_a_lycoris_loha_has_its_alpha_over_r(tmp_path: Path) -> None:
    config = AdapterConfig(method="loha", r=2, lora_alpha=10.0)
    adapter = randomize(initial("loha", (24, 36), r=2, lora_alpha=10.0), 0.5)
    save_adapter(tmp_path, {MODULE: adapter}, config, {"name": "tiny"})
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{MODULE}.alpha": torch.tensor(3.0)}, file)
    loaded = load_adapter(tmp_path)[MODULE]
    expected = adapter.delta_weight() * (3.0 / 2) / (10.0 / 2)
    torch.testing.assert_close(loaded.delta_weight(), expected)
    save_adapter(tmp_path, {MODULE: loaded}, config, {"name": "tiny"})
    torch.testing.assert_close(load_adapter(tmp_path)[MODULE].delta_weight(), expected)


@pytest.mark.parametrize(("method", "tensor"), [("lokr", "lokr_w1"), ("loha", "hada_w1_a")])
def test_a_file_with_names_of_lycoris_is_refused(method: str, tensor: str, tmp_path: Path) -> None:
    config = AdapterConfig(method=method, r=2)  # type: ignore[arg-type]
    save_adapter(tmp_path, {MODULE: initial(method, (24, 36), r=2)}, config, {"name": "tiny"})
    save_file({f"lycoris_layers_0_q_proj.{tensor}": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="Rename the tensors of a LyCORIS file"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("method", "fields", "name", "shape"),
    [
        ("loha", {"r": 2}, "hada_w1_b", (2, 35)),
        ("abba", {"r": 2}, "abba_b2", (24, 3)),
        ("lokr", {"r": 2}, "lokr_w2_a", (6, 3)),
        ("lokh", {"r": 2}, "lokh_a2", (2, 23)),
        ("lokh", {"options": CHAIN}, "lokh_f2", (5, 24)),
        ("loha", {"r": 2}, "hada_t1", (2, 2, 1, 1)),
        ("lokr", {"r": 2}, "lokr_t2", (2, 2, 1, 1)),
    ],
)
def test_a_file_whose_factors_do_not_fit_is_refused(
    method: str, fields: dict[str, Any], name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    adapter = initial(method, (24, 36), **fields)
    config = AdapterConfig(method=method, **fields)  # type: ignore[arg-type]
    save_adapter(tmp_path, {MODULE: adapter}, config, {"name": "tiny"})
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{MODULE}.{name}": torch.ones(shape)}, file)
    with pytest.raises(AdapterError, match=r"fit|linear layers only"):
        load_adapter(tmp_path)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "shape", "fields", "message"),
    [
        ("loha", (24, 36), {"r": 25}, "rank 25 > 24"),
        ("loha", (24, 36), {"use_rslora": True}, "loha has no use_rslora"),
        ("abba", (24, 36), {"r": 2, "options": {"r1": 30}}, "r1 = 30 > 24"),
        ("lokr", (24, 36), {"use_rslora": True}, "lokr has no use_rslora"),
        ("krona", (24, 36), {"r": 2}, "r = 2 < 3 would be one"),
        ("lokh", (24, 36), {"r": 7}, "rank 7 > 6"),
        ("lokh", (24, 36), {"r": 2, "options": {"shape": (5, 8)}}, "the product 40; allowed are .* = 36"),
        (
            "lokh",
            (24, 36),
            {"r": 2, "options": {"shape": (5, 7), "trim": True}},
            "product 35; allowed are .* >= 36",
        ),
        ("lokh", (24, 37), {"r": 2}, r"factors of \(1, 37\) rows"),
        ("lokh", (24, 36), {"r": 2, "options": CHAIN}, "a chain has no rank"),
        ("lokh", (24, 36), {"use_rslora": True, "options": CHAIN}, "lokh has no use_rslora"),
        ("kradapter", (24, 36), {"r": 2}, "a chain has no rank"),
    ],
)
def test_what_a_family_cannot_take_is_refused_by_the_name_of_the_layer(
    method: str, shape: tuple[int, int], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        initial(method, shape, **fields)
    assert MODULE in str(caught.value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("abba", {"r1": 0}, "r1 = 0 < 1"),
        ("abba", {"alpha1": 0.0}, "alpha1 = 0.0. Set alpha1 > 0"),
        ("lokr", {"factor": 1}, "factor = 1 < 2"),
        ("krona", {"factor": 0}, "factor = 0 < 2"),
        ("lokh", {"num_factors": 3}, "3 factors of the form 'low-rank'"),
        ("lokh", CHAIN | {"shape": (2, 2, 2, 2, 2)}, "5 factors of the form 'chain'"),
        ("lokh", {"shape": (1, 36)}, "shape = 1 < 2"),
        ("kradapter", {"scale": -1.0}, "scale = -1.0. Set scale > 0"),
    ],
)
def test_options_out_of_range_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADAPTER_OPTIONS[method](**options)


# ---- slices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 36), (36, 24)])
def test_a_chain_over_slices_of_the_tokens_is_the_chain(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = randomize(initial("lokh", shape, options=CHAIN).double(), 0.5)
    x = torch.randn(7, shape[1], dtype=torch.float64, requires_grad=True)
    probe = torch.randn(7, shape[0], dtype=torch.float64)

    def passes() -> list[Tensor]:
        y = adapter.delta(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *adapter.parameters()], probe)]

    whole = passes()
    monkeypatch.setattr(lokh, "_SLICE_ENTRIES", 2 * 6 * 24)
    for got, expected in zip(passes(), whole, strict=True):
        torch.testing.assert_close(got, expected)
