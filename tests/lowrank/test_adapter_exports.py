"""Adapters as LoRA over the original model, and several merged into one."""

import pytest
import torch
from adapter_samples import SAMPLES, layer_of, randomize, weight_of
from torch import Tensor

from lowrank.adapters.arithmetic import combine
from lowrank.adapters.base import Adapter
from lowrank.adapters.export import VLLM_RANKS, as_lora
from lowrank.adapters.lora import LoRA
from lowrank.adapters.registry import initial_adapters
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError

SHAPE = (24, 36)


def loras(seed: int, r: int = 3, names: tuple[str, ...] = ("a", "b")) -> dict[str, Adapter]:
    layers = [layer_of(SHAPE, name, index) for index, name in enumerate(names)]
    made = initial_adapters(layers, AdapterConfig(r=r, lora_alpha=5.0, init="kaiming"))
    for index, adapter in enumerate(made.values()):
        randomize(adapter, 0.5, 100 * seed + index)
    return made


def delta(adapters: dict[str, Adapter] | dict[str, LoRA], name: str = "a") -> Tensor:
    return adapters[name].delta_weight().detach()


def test_an_export_is_the_change_since_the_start_padded_to_a_rank_of_vllm() -> None:
    trained, initial = loras(1), loras(2)
    made = as_lora(trained, initial)
    assert made.rank == 8
    assert made.rank in VLLM_RANKS
    for name, layer in made.layers.items():
        assert layer.r == 8
        assert layer.scaling == 1
        expected = delta(trained, name) - delta(initial, name)
        torch.testing.assert_close(layer.delta_weight().detach(), expected, rtol=1e-5, atol=1e-5)
    cut = as_lora(trained, initial, max_rank=2)
    assert all(0 < energy < 1 for energy in cut.retained_energy.values())
    u, s, vh = torch.linalg.svd(delta(trained) - delta(initial))
    torch.testing.assert_close(delta(cut.layers), u[:, :2] * s[:2] @ vh[:2], rtol=1e-4, atol=1e-4)


def test_pissa_exports_as_twice_its_rank_over_the_untouched_weight() -> None:
    config = AdapterConfig(r=4, lora_alpha=8.0, init="pissa")
    initial = initial_adapters([layer_of(SHAPE, "a")], config)
    trained = initial_adapters([layer_of(SHAPE, "a")], config)
    randomize(trained["a"], 0.3)
    weight = weight_of(SHAPE, torch.float32)
    kept = weight - delta(initial)
    made = as_lora(trained, initial)
    assert made.rank == 8
    torch.testing.assert_close(weight + delta(made.layers), kept + delta(trained), rtol=1e-4, atol=1e-4)


def test_linear_and_svd_are_the_weighted_sum() -> None:
    first, second = loras(1), loras(2)
    expected = 0.7 * delta(first) - 0.2 * delta(second)
    merged = combine([first, second], [0.7, -0.2])
    assert merged["a"].r == 6
    torch.testing.assert_close(delta(merged), expected, rtol=1e-5, atol=1e-5)
    u, s, vh = torch.linalg.svd(expected)
    svd = combine([first, second], [0.7, -0.2], "svd", rank=2)
    torch.testing.assert_close(delta(svd), u[:, :2] * s[:2] @ vh[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(delta(combine([first, {"b": second["b"]}], [1, 1])), delta(first))


def test_ties_follows_the_elected_sign_and_dare_keeps_the_mean() -> None:
    first, second = loras(1), loras(2)
    whole = combine([first, second], [1.0, 1.0], "ties", rank=24, density=1.0)
    a, b = delta(first), delta(second)
    sign = (a + b).sign()
    kept = [torch.where(x.sign() == sign, x, 0.0) for x in (a, b)]
    expected = (kept[0] + kept[1]) / sum((x != 0).float() for x in kept).clamp(min=1)  # type: ignore[union-attr]
    torch.testing.assert_close(delta(whole), expected, rtol=1e-4, atol=1e-4)
    trimmed = delta(combine([first, second], [1.0, 1.0], "ties", rank=24, density=0.1))
    assert (trimmed.abs() > 1e-4).float().mean() <= 0.2 + 1e-6
    draws = [delta(combine([first], [1.0], "dare", rank=24, density=0.5, seed=seed)) for seed in range(200)]
    mean = torch.stack(draws).mean(0)
    assert (mean - a).norm() <= 3 * a.norm() / 200**0.5
    assert (draws[0] - a).norm() > 0.5 * a.norm()


def test_bad_requests_are_refused() -> None:
    first = loras(1)
    with pytest.raises(AdapterError, match="one weight per adapter"):
        combine([first], [])
    with pytest.raises(AdapterError, match="Set rank >= 1"):
        combine([first], [1], "ties")
    with pytest.raises(AdapterError, match="density = 0"):
        combine([first], [1], "dare", rank=2, density=0)
    other = initial_adapters([layer_of((8, 8), "a")], AdapterConfig(r=2, init="kaiming"))
    with pytest.raises(AdapterError, match="a is 24x36, 8x8"):
        combine([first, other], [1, 1])
    assert "lora" in SAMPLES
