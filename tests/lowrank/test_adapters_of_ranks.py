"""LoRA-FA, DyLoRA, AdaLoRA and its budget, PoLAR and its landing, LoTR and LoRTA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import layer_of, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.training_state import trained_tensors
from lowrank.adapter_options import AdaLoRAOptions
from lowrank.adapters.adalora import AdaLoRA
from lowrank.adapters.base import Adapter
from lowrank.adapters.dylora import DyLoRA
from lowrank.adapters.lora import LoRA
from lowrank.adapters.lora_fa import LoRAFA
from lowrank.adapters.peft_format import load_adapter, save_adapter
from lowrank.adapters.polar import PoLAR, landing
from lowrank.adapters.rank_budget import RankBudget
from lowrank.adapters.registry import family_of, initial_adapters
from lowrank.adapters.tensor_layers import place_of
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError

SHAPE = (24, 36)
TEXT = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"]


def config_of(method: str, **settings: Any) -> AdapterConfig:
    return AdapterConfig(method=method, **({"r": 4, "lora_alpha": 8.0, "init": "kaiming"} | settings))  # type: ignore[arg-type]


def one(method: str, **settings: Any) -> Adapter:
    """The adapter of one layer before training."""
    return next(iter(initial_adapters([layer_of(SHAPE)], config_of(method, **settings)).values()))


def output(adapter: Adapter, x: Tensor) -> Tensor:
    result: Tensor = adapter(x, torch.zeros(*x.shape[:-1], adapter.shape[0]), nn.Identity())
    return result


# ---- LoRA and its kin on disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"peft_type": "LORA"}, "LoRA"),
        ({"peft_type": "LORA", "use_dora": True}, "DoRA"),
        ({"peft_type": "LORA", "use_dora": False, "rankline": {"method": "lora_fa"}}, "LoRAFA"),
        ({"peft_type": "LORA", "rankline": {"method": "dylora"}}, "DyLoRA"),
        # A method that is of another type, or that is not here: the type decides.
        ({"peft_type": "LORA", "rankline": {"method": "vera"}}, "LoRA"),
        ({"peft_type": "VERA", "rankline": {"method": "unheard of"}}, "VeRA"),
        ({"peft_type": "UNHEARD_OF", "rankline": {"method": "lora"}}, None),
        ({}, None),
    ],
)
def test_the_whole_configuration_says_whose_file_it_is(config: dict[str, Any], name: str | None) -> None:
    family = family_of(config)
    assert (family and family.__name__) == name


def test_lora_fa_trains_b_alone_and_others_read_it_as_a_lora(tmp_path: Path) -> None:
    adapter = randomize(one("lora_fa"), 0.5)
    assert isinstance(adapter, LoRAFA)
    output(adapter, torch.randn(5, 36)).sum().backward()
    assert adapter.lora_a.grad is None
    assert adapter.lora_b.grad is not None
    save_adapter(tmp_path, {"m": adapter}, config_of("lora_fa"), {"name": "tiny"})
    text = (tmp_path / "adapter_config.json").read_text()
    assert type(load_adapter(tmp_path)["m"]) is LoRAFA
    (tmp_path / "adapter_config.json").write_text(text.replace('"lora_fa"', '"lora"'))
    assert type(load_adapter(tmp_path)["m"]) is LoRA


# ---- DyLoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("train", ["nested", "frozen"])
def test_dylora_trains_at_every_rank_it_may_draw(train: str, use_rslora: bool) -> None:
    adapter = randomize(one("dylora", use_rslora=use_rslora, options={"r_min": 2, "train": train}), 0.5)
    assert isinstance(adapter, DyLoRA)
    x, seen = torch.randn(5, 36, generator=torch.Generator().manual_seed(1)), set()
    outputs = {b: output(adapter.truncate(b), x).detach() for b in range(1, 5)}
    torch.manual_seed(0)
    for _ in range(40):
        adapter.zero_grad()
        y = output(adapter.train(), x)
        (b,) = [b for b, expected in outputs.items() if torch.allclose(y, expected, atol=1e-5)]
        y.sum().backward()
        rows = adapter.lora_a.grad.any(1).tolist()  # type: ignore[union-attr]
        columns = adapter.lora_b.grad.any(0).tolist()  # type: ignore[union-attr]
        first = b if train == "frozen" else 1
        assert rows == columns == [first <= k <= b for k in range(1, 5)]
        seen.add(b)
    assert seen == {2, 3, 4}
    torch.testing.assert_close(output(adapter.eval(), x), outputs[4])


def test_one_dylora_artifact_serves_every_rank(tmp_path: Path) -> None:
    config = config_of("dylora", options={"eval_rank": 3})
    adapters = initial_adapters([layer_of(SHAPE, "m")], config)
    randomize(adapters["m"], 0.5)
    save_adapter(tmp_path, adapters, config, {"name": "tiny"})
    loaded = load_adapter(tmp_path)["m"]
    assert isinstance(loaded, DyLoRA)
    assert loaded.options.eval_rank == 3
    for rank in range(1, 5):
        lora = loaded.truncate(rank)
        assert (lora.r, lora.scaling) == (rank, pytest.approx(8.0 / rank))
    torch.testing.assert_close(loaded.delta_weight(), loaded.truncate(3).delta_weight())
    assert loaded.to_lora().a.shape == (3, 36)
    for rank in (0, 5):
        with pytest.raises(AdapterError, match="Set 1 <= rank <= 4"):
            loaded.truncate(rank)
    with pytest.raises(AdapterError, match=r"rank 4 at 5\. Set 1 <= r_min and eval_rank <= 4"):
        one("dylora", options={"r_min": 5})


def test_dylora_puts_the_most_into_the_first_component() -> None:
    """Trained on a matrix of rank 4, its cut at rank 1 is almost the best there is; that of a plain LoRA is not."""
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(k, 4, generator=generator))[0] for k in SHAPE)
    target = (u * torch.tensor([8.0, 4.0, 2.0, 1.0])) @ v.T
    best = (4.0**2 + 2.0**2 + 1.0**2) ** 0.5

    def error_at_rank_1(adapter: Any) -> float:
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(adapter.parameters(), 0.02)
        for _ in range(600):
            optimizer.zero_grad()
            (output(adapter, torch.eye(36)).T - target).square().sum().backward()
            optimizer.step()
        scaling = adapter.scaling_at(1) if isinstance(adapter, DyLoRA) else adapter.scaling
        return float((scaling * adapter.lora_b[:, :1] @ adapter.lora_a[:1] - target).detach().norm())

    assert error_at_rank_1(one("dylora", lora_alpha=4.0)) < 1.05 * best
    assert error_at_rank_1(one("lora", lora_alpha=4.0)) > 1.2 * best


# ---- AdaLoRA ---------------------------------------------------------------------------------------------------------


def test_adaloras_penalty_is_the_mean_distance_from_orthonormality() -> None:
    layers = [layer_of(SHAPE, name, index) for index, name in enumerate(TEXT)]
    adapters = initial_adapters(layers, config_of("adalora", options={"orthogonal_weight": 0.3}))
    total, terms = torch.zeros(()), []
    for adapter in adapters.values():
        assert isinstance(adapter, AdaLoRA)
        randomize(adapter, 0.5)
        total = total + adapter.penalty()  # type: ignore[operator]
        for gram in (adapter.lora_a @ adapter.lora_a.T, adapter.lora_b.T @ adapter.lora_b):
            terms.append((gram - torch.eye(4)).norm() ** 2)
    torch.testing.assert_close(total, 0.3 * torch.stack(terms).mean())
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_a.copy_(torch.eye(4, 36))  # type: ignore[operator, union-attr]
            adapter.lora_b.copy_(torch.eye(24, 4))  # type: ignore[operator, union-attr]
    assert next(iter(adapters.values())).penalty() == 0
    assert one("adalora", options={"orthogonal_weight": 0.0}).penalty() is None


def _toy(steps: int, resume_at: int | None = None) -> dict[str, int]:
    """Train two layers on targets of rank 3 and 1 from r = 4 to a mean of 2; the ranks that stay."""
    generator = torch.Generator().manual_seed(4)
    ranks = {"a": 3, "b": 1}
    targets = {
        name: torch.randn(24, r, generator=generator) @ torch.randn(r, 36, generator=generator) / r**0.5
        for name, r in ranks.items()
    }
    options = {"target_r": 2, "initial_steps": 50, "final_steps": 100}
    config = config_of("adalora", options=options | {"orthogonal_weight": 0.1})
    adapters = initial_adapters([layer_of(SHAPE, name, index) for index, name in enumerate(targets)], config)
    parameters = trained_tensors(adapters)
    optimizer = torch.optim.Adam(parameters.values(), 0.02)
    budget = RankBudget(4, AdaLoRAOptions(**options), steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(
            (output(adapter, torch.eye(36)).T - targets[name]).square().mean() + adapter.penalty()
            for name, adapter in adapters.items()
        )
        loss.backward()
        optimizer.step()
        if step == resume_at:
            state, budget = budget.state(), RankBudget(4, AdaLoRAOptions(**options), steps)
            budget.load_state(state)
        budget.observe(step, parameters, {name: p.grad for name, p in parameters.items()})
    return {name: int(adapter.lora_e.count_nonzero()) for name, adapter in adapters.items()}


def test_the_budget_takes_the_ranks_that_no_layer_needs() -> None:
    assert _toy(400) == {"a": 3, "b": 1}


def test_the_budget_goes_on_from_its_state() -> None:
    assert _toy(400, resume_at=200) == _toy(400, resume_at=350) == {"a": 3, "b": 1}


def test_the_budget_holds_still_first_falls_with_the_cube_and_rests() -> None:
    budget = RankBudget(8, AdaLoRAOptions(target_r=4, initial_steps=10, final_steps=10), total_steps=40)
    assert [budget.share(step) for step in (0, 10, 20, 30, 39)] == [1.0, 1.0, 0.125, 0.0, 0.0]
    tensors = {"m:lora_a": torch.ones(8, 5), "m:lora_b": torch.ones(6, 8), "m:lora_e": torch.ones(8, 1)}
    gradients = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    gradients["m:lora_e"] = torch.arange(1.0, 9.0)[:, None]
    alive = []
    for step in range(40):
        changed = budget.observe(step, tensors, gradients)
        assert bool(changed) == (step > 10)
        e = tensors["m:lora_e"]
        e.masked_fill_(e == 0, 0.01)  # the optimizer revives what was taken away
        alive.append(budget.state().get("kept/m:lora_e", torch.ones(8)).int().flatten().tolist())
    assert alive[10] == [1] * 8
    assert alive[29] == alive[39] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [sum(a) for a in alive] == sorted((sum(a) for a in alive), reverse=True)


def test_what_adalora_refuses() -> None:
    with pytest.raises(AdapterError, match=r"leave none of 10 steps\. Set their sum < 10"):
        RankBudget(4, AdaLoRAOptions(initial_steps=5, final_steps=5), total_steps=10)
    with pytest.raises(AdapterError, match="target_r = 5 > r = 4"):
        one("adalora", options={"target_r": 5})
    with pytest.raises(AdapterError, match=r"share one alpha"):
        one("adalora", alpha_pattern={"q_proj": 2.0})
    with pytest.raises(AdapterError, match=r"24x36.*rank 25 > 24"):
        one("adalora", r=25)
    with pytest.raises(ValueError, match="beta1 = 1"):
        AdaLoRAOptions(beta1=1.0)


# ---- PoLAR -----------------------------------------------------------------------------------------------------------


def test_landing_is_the_dense_formula() -> None:
    x, gradient = (torch.randn(9, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (1, 2))
    outer = gradient @ x.T
    dense = 0.5 * (outer - outer.T) @ x + 0.7 * x @ (x.T @ x - torch.eye(3))
    torch.testing.assert_close(landing(x, gradient, 0.7), dense)
    q = torch.linalg.qr(x)[0]
    on = landing(q, gradient, 0.7)
    torch.testing.assert_close(q.T @ on + on.T @ q, torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("lands", [True, False])
def test_polar_learns_along_the_landing_direction_and_comes_to_rest_on_orthonormal_columns(lands: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    target = torch.randn(24, 2, generator=generator) @ torch.randn(2, 36, generator=generator) / 30
    adapter = one("polar", lora_alpha=4.0)
    assert isinstance(adapter, PoLAR)
    assert adapter.orthonormal == ("polar_x", "polar_y")
    optimizer, losses, distances = torch.optim.SGD(adapter.parameters(), 0.1), [], []
    for _ in range(500):
        optimizer.zero_grad()
        loss = 0.5 * (output(adapter, torch.eye(36)).T - target).square().sum()
        loss.backward()
        for name in adapter.orthonormal if lands else ():
            parameter = adapter.get_parameter(name)
            assert parameter.grad is not None
            parameter.grad = landing(parameter, parameter.grad)
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            distances.append(float((adapter.polar_x.T @ adapter.polar_x - torch.eye(4)).norm()))
    assert losses[-1] < 1e-3 * losses[0]
    # Within 1/2 of orthonormality the landing's pull is safe (Ablin and Peyré, section 3); the gradient alone drifts.
    assert max(distances) < 0.5 or not lands
    assert (distances[-1] < 1e-3) == lands


# ---- LoTR and LoRTA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lotr", "lorta"])
def test_layers_of_one_shape_train_and_store_one_tensor(method: str, tmp_path: Path) -> None:
    layers = [layer_of(SHAPE, name, index) for index, name in enumerate(TEXT)]
    layers += [layer_of((36, 24), f"model.layers.{index}.mlp.down_proj", 3 + index) for index in range(2)]
    config = config_of(method)
    adapters = initial_adapters(layers, config)
    for seed, adapter in enumerate(adapters.values()):
        randomize(adapter, 0.5, seed)
    save_adapter(tmp_path, adapters, config, {"name": "tiny"})
    loaded = load_adapter(tmp_path)
    counts = []
    for found in (adapters, loaded):
        parameters = trained_tensors(found)
        counts.append(sum(p.numel() for p in parameters.values()))
        shared = [{id(p) for p in found[name].parameters()} for name in TEXT]
        own = {"lotr": 2, "lorta": 5}[method]
        assert len(shared[0] & shared[1] & shared[2]) == own
        assert not shared[0] & {id(p) for p in found["model.layers.0.mlp.down_proj"].parameters()}
        sum(output(found[name], torch.ones(2, 36)).sum() for name in TEXT).backward()
    groups = {"lotr": 2 * 4 * (24 + 36) + 5 * 16, "lorta": 4 * (36 + 6 + 4 + 2 + 2) + 4 * (24 + 6 + 6 + 2 + 1)}
    assert counts == [groups[method]] * 2
    changes = [adapters[name].delta_weight() for name in TEXT]
    assert all(not torch.allclose(a, b) for a, b in ((changes[0], changes[1]), (changes[0], changes[2])))
    for name, adapter in adapters.items():
        assert torch.equal(loaded[name].delta_weight(), adapter.delta_weight())
        for parameter, again in zip(adapter.parameters(), loaded[name].parameters()):
            assert name not in TEXT or torch.equal(parameter.grad, again.grad)


@pytest.mark.parametrize("method", ["vera", "lotr", "lorta"])
def test_nonsense_in_what_layers_share_is_refused(method: str, tmp_path: Path) -> None:
    config = config_of(method)
    adapters = initial_adapters([layer_of(SHAPE, "m")], config)
    shared = type(adapters["m"]).shared_tensors(adapters)
    save_adapter(tmp_path, adapters, config, {"name": "tiny"})
    for name, tensor in shared.items():
        kept = tensor.clone()
        with torch.no_grad():
            tensor.flatten()[0] = torch.inf
        with pytest.raises(AdapterError, match=rf"{name} holds NaN or infinity"):
            save_adapter(tmp_path / name, adapters, config, {"name": "tiny"})
        stored = {key: value.clone() for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
        save_file(stored | {f"base_model.{name}": tensor.contiguous()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=rf"{name} holds NaN or infinity"):
            load_adapter(tmp_path)
        save_file(stored, tmp_path / "adapter_model.safetensors")
        tensor.copy_(kept)


def test_lorta_is_the_cp_tensor_over_layers_projections_and_heads() -> None:
    layers = [layer_of(SHAPE, name, index) for index, name in enumerate(TEXT)]
    adapters = initial_adapters(layers, config_of("lorta", options={"num_heads": 3}))
    for seed, adapter in enumerate(adapters.values()):
        randomize(adapter, 0.7, seed)
    f = dict(adapters[TEXT[0]].named_parameters())
    tensor = torch.einsum("kl,kp,hk,ik,jk->lphij", f["c_layer"], f["c_projection"], f["c_heads"], f["b"], f["a"])
    tensor = 2.0 * tensor.reshape(2, 2, 24, 36)
    for name, place in zip(TEXT, [(0, 0), (0, 1), (1, 0)]):
        torch.testing.assert_close(adapters[name].delta_weight(), tensor[place])


def test_names_and_what_the_tensor_families_refuse() -> None:
    assert place_of("h.11.attn.c_attn") == ("11", "h.attn.c_attn")
    assert place_of("layers.3.experts.5.up") == ("3", "layers.experts.5.up")
    assert place_of("lm_head") == ("", "lm_head")
    with pytest.raises(AdapterError, match=r"24x36.*num_heads = 5 does not divide 24"):
        one("lorta", options={"num_heads": 5})
    with pytest.raises(AdapterError, match="share one rank"):
        one("lotr", rank_pattern={"q_proj": 2})
