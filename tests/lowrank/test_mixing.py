"""Adapters of a batch together: what layers keep of them between passes."""

import torch

from lowrank.adapter_options import DyLoRAOptions
from lowrank.adapters.dylora import DyLoRA
from lowrank.adapters.lora import LoRA
from lowrank.inject import AdaptedLinear
from lowrank.mixing import Mix, MixedLayers, Ready, bytes_of


def test_layers_know_of_adapters_that_come_after_a_pass_and_forget_those_that_go() -> None:
    layers = [AdaptedLinear(torch.nn.Linear(8, 8, bias=False), {}, None) for _ in range(2)]
    mixed, x = MixedLayers(layers, [8, 8]), torch.randn(1, 8)
    bare = torch.cat([layer.base(x) for layer in layers], 1)

    def change(mix: Mix) -> list[bool]:
        y = bare.clone()
        mixed.change(y, x, mix)
        return [not torch.equal(one, other) for one, other in zip(y.split(8, 1), bare.split(8, 1), strict=True)]

    mix, ready = Mix(("x",)), Ready.of(LoRA(torch.ones(2, 8), torch.ones(8, 2), 1.0), layers[0].base)
    assert change(mix) == [False, False]
    layers[0].add("x", ready)
    assert change(mix) == [True, False]
    layers[0].remove("x")
    assert change(mix) == [False, False]
    layers[1].add("x", ready)
    assert change(mix) == [False, True]
    layers[1].remove("x")
    for number in range(50):
        layers[0].add(f"y{number}", ready)
        assert change(Mix((f"y{number}",))) == [True, False]
        layers[0].remove(f"y{number}")
    assert not mixed._known


def test_bytes_are_those_that_are_held() -> None:
    base = torch.nn.Linear(64, 32, bias=False)
    a, b = torch.randn(16, 64), torch.randn(32, 16)
    whole = a.nbytes + b.nbytes
    assert bytes_of([Ready.of(LoRA(a, b, 1.0), base)]) == whole
    # Four of its ranks are rows of A, and a copy of columns of B.
    part = DyLoRA(a, b, 1.0, False, DyLoRAOptions(eval_rank=4)).eval()
    assert bytes_of([Ready.of(part, base)]) == whole + 4 * 32 * 4
