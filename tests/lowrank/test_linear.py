"""Linear layers of one input as one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank.linear import DenseLinear, NF4Linear, ZeroLinear, joined
from lowrank.quantization import quantize_nf4

SIZES = (128, 64, 192)


def layers(kind: str, biases: str, block_size: int = 64) -> list[nn.Module]:
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for size, has_bias in zip(SIZES, biases, strict=True):
        dense = nn.Linear(64, size, bias=has_bias == "b").requires_grad_(False)
        if kind == "nf4":
            bias = None if has_bias == "-" else dense.bias.detach()
            made.append(NF4Linear(quantize_nf4(dense.weight.detach(), block_size), bias))
        else:
            made.append(DenseLinear.of(dense) if kind == "few" else dense)
    return made


def storages(module: nn.Module) -> set[int]:
    names = ("weight", "packed", "absmax")
    return {getattr(module, name).untyped_storage().data_ptr() for name in names if hasattr(module, name)}


@pytest.mark.parametrize("kind", ["dense", "few", "nf4"])
@pytest.mark.parametrize("biases", ["---", "bbb", "-b-"])
@pytest.mark.parametrize("tokens", [1, 5, 16, 40])
def test_the_outputs_lie_one_after_another(kind: str, biases: str, tokens: int) -> None:
    parts, x = layers(kind, biases), torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = torch.cat([part(x) for part in parts], dim=-1)
        whole = joined(parts)
        assert whole is not None
        torch.testing.assert_close(whole(x), before, rtol=0, atol=2e-6)
        assert torch.equal(torch.cat([part(x) for part in parts], dim=-1), before)
    assert not any(parameter.requires_grad for parameter in whole.parameters())


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_nothing_is_held_twice(kind: str) -> None:
    parts = layers(kind, "---")
    whole, again = joined(parts), joined(parts)
    assert whole is not None
    assert again is not None
    assert storages(whole) == storages(again)
    assert all(storages(part) == storages(whole) for part in parts)


def test_layers_of_several_kinds_stay_apart() -> None:
    dense, packed = layers("dense", "---"), layers("nf4", "---")
    assert joined([dense[0], packed[1]]) is None
    assert joined([packed[0], layers("nf4", "---", 128)[1]]) is None
    assert joined([packed[0], ZeroLinear((8, 64))]) is None
    half = NF4Linear(quantize_nf4(torch.ones(1, 32), 64))  # half a block: the next weight would begin inside of it
    assert joined([half, half]) is None
