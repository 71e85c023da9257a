"""DoRA, VeRA, HiRA and AdaLoRA answer as PEFT's do: our directory in PEFT, and PEFT's directory here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import randomize
from peft import AdaLoraConfig, HiraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from tiny import tiny_model
from torch import Tensor, nn

from lowrank.adapter_options import AdaLoRAOptions
from lowrank.adapters.base import Adapter, Layer
from lowrank.adapters.peft_format import load_adapter, save_adapter
from lowrank.adapters.rank_budget import RankBudget
from lowrank.adapters.registry import FAMILIES, initial_adapters
from lowrank.config import AdapterConfig
from lowrank.inject import inject
from lowrank.linear import dense_weight

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
OURS: dict[str, list[dict[str, Any]]] = {
    "dora": [{"lora_alpha": 8.0}, {"lora_alpha": 3.0, "use_rslora": True, "rank_pattern": {"up_proj": 5}}],
    "vera": [{"lora_alpha": 8.0}, {"options": {"projection_prng_key": 7, "d_initial": 0.5}}],
    "hira": [{"lora_alpha": 8.0}, {"r": 5, "init": "gaussian"}],
    "adalora": [{"lora_alpha": 8.0}, {"r": 6, "lora_alpha": 20.0, "options": {"target_r": 2, "initial_steps": 9}}],
}
THEIRS: dict[str, Any] = {
    "dora": LoraConfig(r=3, lora_alpha=8, use_dora=True, target_modules=TARGETS),
    "vera": VeraConfig(r=3, target_modules=TARGETS),
    "hira": HiraConfig(r=3, target_modules=TARGETS),
    "adalora": AdaLoraConfig(
        init_r=4, target_r=3, lora_alpha=7, total_step=14, tinit=2, tfinal=3, deltaT=2, target_modules=TARGETS
    ),
}
#: PEFT's names of the tensors that it trains.
TRAINED = ("lora_", "vera_lambda_", "hira_")


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(8, 72).reshape(4, 16), use_cache=False).logits


def ours_of(adapters: dict[str, Adapter]) -> Any:
    model = tiny_model()
    inject(model, {module: {"a": adapter} for module, adapter in adapters.items()}, "a")
    return model


def layers() -> list[Layer]:
    found = []
    for name, module in tiny_model().named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            shape, weight = (module.out_features, module.in_features), dense_weight(module)
            found.append(Layer(name, shape, len(found), lambda weight=weight: weight))
    return found


@pytest.mark.parametrize(("method", "index"), [(method, index) for method in OURS for index in (0, 1)])
def test_peft_loads_ours(method: str, index: int, tmp_path: Path) -> None:
    config = AdapterConfig(method=method, **{"r": 3, "init": "kaiming", **OURS[method][index]})  # type: ignore[arg-type]
    adapters = initial_adapters(layers(), config)
    for seed, adapter in enumerate(adapters.values()):
        randomize(adapter, 0.5, seed)
    save_adapter(tmp_path, adapters, config, {"name": "tiny"})
    ours, plain = logits_of(ours_of(adapters)), logits_of(tiny_model())
    theirs = logits_of(PeftModel.from_pretrained(tiny_model(), tmp_path))
    assert (ours - plain).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", THEIRS)
def test_ours_loads_pefts(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), THEIRS[method])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in TRAINED) and parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained(tmp_path)
    adapters = load_adapter(tmp_path)
    assert {type(adapter) for adapter in adapters.values()} == {FAMILIES[method]}
    assert set(adapters) == {layer.name for layer in layers()}
    theirs = logits_of(model)
    assert (theirs - logits_of(tiny_model())).abs().max() > 0.1
    torch.testing.assert_close(logits_of(ours_of(adapters)), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_it_starts_as_pefts_does(method: str, tmp_path: Path) -> None:
    """Tensors that no layer draws for itself: DoRA's magnitudes and VeRA's projections."""
    get_peft_model(tiny_model(), THEIRS[method]).save_pretrained(tmp_path)
    config = AdapterConfig(method=method, r=3, init="kaiming")  # type: ignore[arg-type]
    adapters, theirs = initial_adapters(layers(), config), load_adapter(tmp_path)
    if method == "vera":
        shared = FAMILIES[method].shared_tensors
        for name, tensor in shared(theirs).items():
            assert torch.equal(shared(adapters)[name], tensor)
    for module, adapter in adapters.items():
        for name, tensor in theirs[module].tensors().items():
            if name != "lora_A.weight":
                torch.testing.assert_close(adapter.tensors()[name], tensor, rtol=1e-6, atol=1e-6)


def test_dropout_falls_on_all_that_dora_scales(tmp_path: Path) -> None:
    """As in PEFT: with the dropout's mask the same, so is the training output."""
    config = AdapterConfig(method="dora", r=3, init="kaiming", lora_dropout=0.5)
    adapters = initial_adapters(layers()[:1], config)
    for adapter in adapters.values():
        randomize(adapter, 0.5)
    save_adapter(tmp_path, adapters, config, {"name": "tiny"})
    ours, theirs = ours_of(adapters), PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    (name,) = adapters
    x, outputs = torch.randn(2, 5, 16), []
    for layer in (ours.get_submodule(name), theirs.get_submodule(f"base_model.model.{name}")):
        torch.manual_seed(3)
        outputs.append(layer.train()(x))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def _allocate(model: Any, step: int, gradients: dict[str, Tensor]) -> None:
    """One step of PEFT's allocator under the given gradients."""
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)
    model.base_model.update_and_allocate(step)


def test_its_budget_takes_what_pefts_takes(tmp_path: Path) -> None:
    """The same gradients step by step: the same e are 0, to the end, and so is the pruned file that PEFT saves."""
    torch.manual_seed(0)
    config, options = THEIRS["adalora"], AdaLoRAOptions(target_r=3, initial_steps=2, final_steps=3, interval=2)
    model, budget = get_peft_model(tiny_model(), config), RankBudget(4, options, total_steps=14)
    theirs = {name: p for name, p in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for parameter in theirs.values():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    names = {name: name.removesuffix(".default").lower().replace(".lora_", ":lora_") for name in theirs}
    ours = {names[name]: p.detach().clone() for name, p in theirs.items()}
    for step in range(1, 15):
        gradients = {name: torch.randn_like(p) for name, p in theirs.items()}
        _allocate(model, step, gradients)
        changed = budget.observe(step, ours, {names[name]: g for name, g in gradients.items()})
        assert all(tensor is ours[name] for name, tensor in changed.items())
        for name, parameter in theirs.items():
            assert torch.equal(ours[names[name]], parameter), (step, name)
    kept = [tensor for name, tensor in budget.state().items() if name.startswith("kept/")]
    assert sum(int(tensor.sum()) for tensor in kept) == 3 * len(layers())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(ours_of(load_adapter(tmp_path))), logits_of(model), rtol=1e-5, atol=1e-5)
