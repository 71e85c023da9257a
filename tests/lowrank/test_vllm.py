"""vLLM's own reader takes our exports: same tensors, same scale. Skipped where vLLM is not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import randomize
from tiny import tiny_model
from torch import nn

from lowrank.adapters.base import Layer
from lowrank.adapters.export import as_lora
from lowrank.adapters.lora import LoRA
from lowrank.adapters.peft_format import save_adapter
from lowrank.adapters.registry import initial_adapters
from lowrank.config import AdapterConfig


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("method", ["lora", "loha", "abba", "lokh", "polar", "vera"])
def test_vllm_reads_the_change_of_an_export(method: str, rslora: bool, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    linears = {n: m for n, m in tiny_model().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    layers = [
        Layer(name, tuple(module.weight.shape), index, lambda module=module: module.weight.detach())
        for index, (name, module) in enumerate(linears.items())
    ]
    made = initial_adapters(layers, AdapterConfig(method=method, r=2, init="kaiming"))  # type: ignore[arg-type]
    for seed, adapter in enumerate(made.values()):
        randomize(adapter, 0.5, seed)
    exported = as_lora(made)
    alpha = 3.0 * exported.rank
    config = AdapterConfig(r=exported.rank, lora_alpha=alpha, use_rslora=rslora, init="kaiming")
    scaling = 3.0 * exported.rank**0.5 if rslora else 3.0
    pairs = {
        name: LoRA(pair.lora_a.detach(), pair.lora_b.detach() / scaling, scaling)
        for name, pair in exported.layers.items()
    }
    save_adapter(tmp_path, pairs, config, {"name": "tiny"})

    helper = PEFTHelper.from_local_dir(str(tmp_path), None)
    helper.validate_legal(LoRAConfig(max_lora_rank=exported.rank))
    kinds = {name.rsplit(".", 1)[-1] for name in linears}
    read: Any = LoRAModel.from_local_checkpoint(str(tmp_path), kinds, helper, lora_model_id=1, device="cpu")
    assert set(read.loras) == set(linears)
    for name, theirs in read.loras.items():
        change = made[name].delta_weight().detach()
        found = theirs.lora_b.float() @ theirs.lora_a.float() * theirs.scaling
        torch.testing.assert_close(found, change, rtol=0, atol=0.02 * float(change.abs().max()))  # it holds 16 bits
