"""Adapter files that do not belong to a base, or are no good, are refused by name; those of other tools load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import randomize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, Layer
from lowrank.adapters.peft_format import CONFIG, WEIGHTS, load_adapter, save_adapter
from lowrank.adapters.registry import initial_adapters
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.inject import inject

BASE = {"name": "one", "base_sha256": "a" * 64, "split_key": "b" * 20, "base": "nf4"}
MODULE = "layers.0.q_proj"


def saved(directory: Path, base: Mapping[str, Any] = BASE, **config: Any) -> dict[str, Adapter]:
    settings = AdapterConfig(**({"r": 2, "lora_alpha": 4.0, "init": "kaiming"} | config))
    made = initial_adapters([Layer(MODULE, (12, 18), 0, lambda: torch.ones(12, 18))], settings)
    for adapter in made.values():
        randomize(adapter, 0.5)
    save_adapter(directory, made, settings, base)
    return made


def change(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **fields}))


def test_an_adapter_loads_onto_its_own_base_only(tmp_path: Path) -> None:
    saved(tmp_path)
    assert set(load_adapter(tmp_path, BASE)) == set(load_adapter(tmp_path)) == {MODULE}
    for key, other in (("base_sha256", "c" * 64), ("split_key", "d" * 20), ("base", "dense")):
        with pytest.raises(AdapterError, match="Load it onto the base that it was trained over") as caught:
            load_adapter(tmp_path, BASE | {"name": "two", key: other})
        for part in (str(BASE[key]), other, "'one'", "'two'", "rankline export"):
            assert part in str(caught.value)


def test_over_a_dense_base_the_split_does_not_matter(tmp_path: Path) -> None:
    saved(tmp_path, BASE | {"base": "dense"})
    load_adapter(tmp_path, BASE | {"base": "dense", "split_key": "d" * 20})
    with pytest.raises(AdapterError, match="weights of sha256"):
        load_adapter(tmp_path, BASE | {"base": "dense", "base_sha256": "c" * 64})


def test_files_that_tell_no_base_load_and_their_shapes_are_checked(tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, rankline=None)
    adapters = load_adapter(tmp_path, BASE)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(12, 12)})])})
    with pytest.raises(AdapterError, match=r"a 12x18 layer, layers\.0\.q_proj is 12x12. Load it onto the model"):
        inject(model, {MODULE: {"a": adapters[MODULE]}}, "a")
    with pytest.raises(AdapterError, match="Check target_modules"):
        inject(model, {"layers.1.q_proj": {"a": adapters[MODULE]}}, "a")


def spoil(directory: Path, name: str, value: Tensor | None) -> None:
    """Replace one tensor of the file, or take it out."""
    tensors = load_file(directory / WEIGHTS)
    tensors.pop(name)
    save_file(tensors if value is None else tensors | {name: value}, directory / WEIGHTS)


def test_a_spoilt_file_is_refused_by_the_name_of_its_module(tmp_path: Path) -> None:
    name = f"base_model.model.{MODULE}.lora_B.weight"
    saved(tmp_path)
    spoil(tmp_path, name, torch.full((12, 2), torch.nan))
    with pytest.raises(AdapterError, match=rf"{MODULE}\.lora_B\.weight holds NaN or infinity"):
        load_adapter(tmp_path)
    spoil(tmp_path, name, torch.ones(12, 3))
    with pytest.raises(AdapterError, match=rf"{MODULE}: .*A is \(2, 18\), B is \(12, 3\).*Save it again"):
        load_adapter(tmp_path)
    spoil(tmp_path, name, None)
    with pytest.raises(AdapterError, match=rf"{MODULE}: no LORA adapter.*lora_B.weight.*lora_A.weight.*Save it again"):
        load_adapter(tmp_path)


def test_unknown_families_and_no_files_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, peft_type="OFT", rankline=None)
    with pytest.raises(AdapterError, match=r"peft_type 'OFT'; allowed are .*LOHA"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LO')
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing or damaged"):
        load_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing or damaged"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "lora", "r": 13}, r"q_proj \(12x18\): rank 13 > 12. Set finetune.adapter.r <= 12"),
        ({"method": "loha", "r": 13}, r"q_proj \(12x18\): rank 13 > 12"),
        ({"method": "lokh", "r": None, "options": {"form": "chain", "shape": (4, 4)}}, r"q_proj \(12x18\).*4.*18"),
        ({"method": "krona", "r": 1}, r"q_proj \(12x18\): krona has no inner rank"),
        ({"target_modules": ["k_proj"]}, "target_modules: 'k_proj' matches no layer. The targets are q_proj"),
    ],
)
def test_a_configuration_that_the_layer_cannot_take_is_refused(config: dict[str, Any], message: str) -> None:
    settings = AdapterConfig(**({"r": 2, "init": "kaiming"} | config))
    with pytest.raises(AdapterError, match=message):
        initial_adapters([Layer(MODULE, (12, 18), 0, lambda: torch.ones(12, 18))], settings)
