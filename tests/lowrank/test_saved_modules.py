"""`modules_to_save`: modules trained whole beside an adapter mean the same here and in PEFT, tied heads included."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_samples import randomize
from tiny import tiny_model
from torch import Tensor, nn

from lowrank.adapters.base import Layer
from lowrank.adapters.peft_format import load_adapter, load_saved_modules, save_adapter
from lowrank.adapters.registry import initial_adapters
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.inject import inject, set_active
from lowrank.saved_modules import add_saved, find_modules

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["lm_head", "model.norm", "embed_tokens"]
#: qwen2's head is tied to its embedding.
every_arch = pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(8, 72).reshape(4, 16), use_cache=False).logits
    return found


def patterns_of(arch: str) -> list[str]:
    return ["lm_head", "ln_f", "wte"] if arch == "gpt2" else NAMES


def targets_of(arch: str) -> list[str]:
    return ["c_attn", "c_fc"] if arch == "gpt2" else ["q_proj", "up_proj"]


def layers(arch: str) -> list[Layer]:
    found = [
        (name, module) for name, module in tiny_model(arch).named_modules() if name.split(".")[-1] in targets_of(arch)
    ]
    weights = [(name, module.weight.T if arch == "gpt2" else module.weight) for name, module in found]
    return [Layer(name, (len(w), len(w.T)), index) for index, (name, w) in enumerate(weights)]


def loaded(arch: str, directory: Path) -> Any:
    model = tiny_model(arch)
    inject(model, {module: {"a": adapter} for module, adapter in load_adapter(directory).items()}, "a")
    add_saved(model, "a", load_saved_modules(directory), "a")
    return model


def trained(arch: str, directory: Path) -> Any:
    """A model with random factors and random whole modules, and its files."""
    config = AdapterConfig(r=2, lora_alpha=4.0, init="kaiming", modules_to_save=patterns_of(arch))
    adapters = initial_adapters(layers(arch), config)
    for seed, adapter in enumerate(adapters.values()):
        randomize(adapter, 0.2, seed)
    model = tiny_model(arch)
    inject(model, {module: {"a": adapter} for module, adapter in adapters.items()}, "a")
    add_saved(model, "a", dict.fromkeys(find_modules(model, patterns_of(arch))), "a")
    saved: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".copies.a." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
                module, _, leaf = name.partition(".copies.a.")
                saved.setdefault(module, {})[leaf] = parameter.detach()
    assert len(saved) == 3
    flipped = {"fan_in_fan_out": arch == "gpt2"}
    save_adapter(directory, adapters, config, {"name": "tiny", **flipped}, saved)
    return model


@every_arch
def test_peft_loads_ours_and_so_do_we(arch: str, tmp_path: Path) -> None:
    model = trained(arch, tmp_path)
    ours, plain = logits_of(model), logits_of(tiny_model(arch))
    assert (ours - plain).abs().max() > 0.05
    theirs = peft.PeftModel.from_pretrained(tiny_model(arch), tmp_path)
    torch.testing.assert_close(logits_of(theirs), ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(loaded(arch, tmp_path)), ours, rtol=0, atol=0)
    set_active(model, None)
    assert torch.equal(logits_of(model), plain)


def test_the_factors_do_not_hold_the_file(tmp_path: Path) -> None:
    trained("llama", tmp_path)
    for adapter in load_adapter(tmp_path).values():
        for tensor in adapter.numbers():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@every_arch
def test_we_load_pefts(arch: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=targets_of(arch), modules_to_save=patterns_of(arch), task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(arch), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    assert len(load_saved_modules(tmp_path)) == 3
    theirs = logits_of(model)
    assert (theirs - logits_of(tiny_model(arch))).abs().max() > 0.05
    torch.testing.assert_close(logits_of(loaded(arch, tmp_path)), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("lm_heads", "'lm_heads' matches no module.*lm_head"),
        (r"layers\.0\.self_attn\.q_proj", "q_proj holds AdaptedLinear.*take it out of modules_to_save"),
        (r"layers\.0\.mlp", "mlp holds AdaptedLinear"),
        ("layers", "model.layers holds ModuleList"),
        ("act_fn", "act_fn has no parameters"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(pattern: str, message: str) -> None:
    model = tiny_model()
    config = AdapterConfig(r=2, init="kaiming")
    inject(model, {name: {"a": made} for name, made in initial_adapters(layers("llama"), config).items()}, "a")
    with pytest.raises(AdapterError, match=message):
        find_modules(model, [pattern])


def test_files_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    trained("llama", tmp_path)
    saved = load_saved_modules(tmp_path)
    other = tiny_model()
    other.lm_head = nn.Linear(16, 50, bias=False)
    with pytest.raises(
        AdapterError, match=r"saved module lm_head: its tensors are .*104, 16.*the model's are .*50, 16"
    ):
        add_saved(other, "a", saved, "a")
    with pytest.raises(AdapterError, match="holds the whole module 'head', which the model has not"):
        add_saved(other, "a", {"head": saved["lm_head"]}, "a")
