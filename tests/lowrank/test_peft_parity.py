"""Adapters in PEFT's format mean in PEFT what they mean here: its layers are the oracle, in both directions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import randomize
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, Layer
from lowrank.adapters.peft_format import load_adapter, save_adapter
from lowrank.adapters.registry import initial_adapters
from lowrank.config import AdapterConfig
from lowrank.inject import inject

# PEFT names the keys of a configuration that it leaves alone: `rankline`, and our dropout where it has none.
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")

PATTERNS: dict[str, Any] = {
    "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 5},
    "alpha_pattern": {"q_proj": 2.0, "layers.0.mlp.down_proj": 9.0},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

#: Our configuration -> PEFT's class and its own fields; rank, alpha and the patterns are common.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "lora": ({"method": "lora"}, "LoraConfig", {}),
    "rslora": ({"method": "lora", "use_rslora": True}, "LoraConfig", {"use_rslora": True}),
    "loha": ({"method": "loha"}, "LoHaConfig", {}),
    "lokr": ({"method": "lokr"}, "LoKrConfig", {}),
    "lokr-lycoris": (
        {"method": "lokr", "options": {"init": "lycoris", "factor": 4}},
        "LoKrConfig",
        {"init_weights": "lycoris", "decompose_factor": 4},
    ),
    "lokr-both": (
        {"method": "lokr", "options": {"decompose_both": True, "factor": 8}},
        "LoKrConfig",
        {"decompose_both": True, "decompose_factor": 8},
    ),
}
every_case = pytest.mark.parametrize("case", list(CASES))


def config_of(case: str, **changes: Any) -> AdapterConfig:
    common = {"r": 3, "lora_alpha": 5.0, "init": "kaiming"} | PATTERNS
    return AdapterConfig(**(common | CASES[case][0] | changes))  # type: ignore[arg-type]


def by_peft(case: str) -> Any:
    """A tiny model with PEFT's own adapter of the same configuration."""
    import peft

    _, name, own = CASES[case]
    alpha = {"lora_alpha" if name == "LoraConfig" else "alpha": 5.0}
    config = getattr(peft, name)(
        r=3, target_modules=TARGETS, task_type="CAUSAL_LM", inference_mode=False, **alpha, **PATTERNS, **own
    )
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model(), config)


def layers() -> list[Layer]:
    linears = [(name, module) for name, module in tiny_model().named_modules() if isinstance(module, nn.Linear)]
    return [
        Layer(name, (module.out_features, module.in_features), index, lambda module=module: module.weight.detach())
        for index, (name, module) in enumerate(linears)
        if name.rpartition(".")[2] in TARGETS
    ]


def logits_of(model: Any) -> Tensor:
    tokens = torch.arange(8, 72).reshape(4, 16)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return found


def adapted(adapters: dict[str, Adapter]) -> Any:
    model = tiny_model()
    inject(model, {module: {"a": adapter} for module, adapter in adapters.items()}, "a")
    return model


def loaded_by_peft(directory: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(tiny_model(), directory)


def agree(ours: Tensor, theirs: Tensor) -> None:
    """Equal to rounding, and far from the model without an adapter."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - logits_of(tiny_model())).abs().max() > 0.05


@every_case
def test_what_we_save_peft_loads(case: str, tmp_path: Path) -> None:
    adapters = initial_adapters(layers(), config_of(case))
    for index, adapter in enumerate(adapters.values()):
        randomize(adapter, 0.2, index)
    save_adapter(tmp_path, adapters, config_of(case), {"name": "tiny"})
    agree(logits_of(adapted(adapters)), logits_of(loaded_by_peft(tmp_path)))


@every_case
def test_what_peft_saves_we_load(case: str, tmp_path: Path) -> None:
    model = by_peft(case)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(tmp_path)
    adapters = load_adapter(tmp_path)
    assert len(adapters) == 2 * len(TARGETS)
    agree(logits_of(adapted(adapters)), logits_of(model))


@every_case
def test_it_starts_with_the_factors_that_peft_starts_with(case: str, tmp_path: Path) -> None:
    """Same names, shapes and zeros, and entries of the same size."""
    by_peft(case).save_pretrained(tmp_path / "theirs")
    save_adapter(tmp_path / "ours", initial_adapters(layers(), config_of(case)), config_of(case), {"name": "tiny"})
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert {name: tuple(t.shape) for name, t in ours.items()} == {name: tuple(t.shape) for name, t in theirs.items()}
    assert {name for name, t in ours.items() if not t.any()} == {name for name, t in theirs.items() if not t.any()}
    for name, tensor in theirs.items():
        if tensor.numel() >= 48:
            # Of uniform numbers in ±c, 48 and more: the standard deviation is off by a quarter once in many thousands.
            assert float(ours[name].std()) == pytest.approx(float(tensor.std()), rel=0.4)


def test_krona_is_a_lokr_that_peft_loads(tmp_path: Path) -> None:
    config = AdapterConfig(method="krona", lora_alpha=3.0, options={"factor": 4})
    adapters = initial_adapters(layers(), config)
    assert len({adapter.r for adapter in adapters.values()}) > 1
    for index, adapter in enumerate(adapters.values()):
        assert not adapter.delta_weight().any()
        assert set(adapter.tensors()) == {"lokr_w1", "lokr_w2"}
        randomize(adapter, 0.3, index)
    save_adapter(tmp_path, adapters, config, {"name": "tiny"})
    agree(logits_of(adapted(load_adapter(tmp_path))), logits_of(loaded_by_peft(tmp_path)))


def test_another_scaling_would_be_noticed(tmp_path: Path) -> None:
    """Mutation: the same file under α/√r."""
    adapters = initial_adapters(layers(), config_of("loha"))
    for index, adapter in enumerate(adapters.values()):
        randomize(adapter, 0.2, index)
    save_adapter(tmp_path, adapters, config_of("loha"), {"name": "tiny"})
    for adapter in adapters.values():
        adapter.scaling *= adapter.r**0.5
    with pytest.raises(AssertionError):
        agree(logits_of(adapted(adapters)), logits_of(loaded_by_peft(tmp_path)))
