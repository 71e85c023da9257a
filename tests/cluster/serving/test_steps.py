"""Requests of one batch against each alone: mixed families, pasts of their own, models of several kinds."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from adapter_samples import RANKLESS, randomize

from cluster.serving.fused import FusedSteps
from cluster.serving.steps import BatchedSteps, SingleSteps, Steps, steps_for
from lowrank.adapters.base import Adapter, Layer
from lowrank.adapters.registry import FAMILIES, initial_adapters
from lowrank.config import AdapterConfig
from lowrank.inject import inject, set_active
from lowrank.quantization import quantize_nf4

Request = tuple[str | None, list[int]]


def tiny(kind: str, **more: Any) -> Any:
    """A random model of transformers with 300 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=300, initializer_range=0.3, **sizes, **more)
    return AutoModelForCausalLM.from_config(config).eval()


def with_adapters(model: Any, methods: Sequence[str], base: str = "dense") -> Any:
    """Every family on every linear layer under its own name, with random factors."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    layers = [
        Layer(name, tuple(module.weight.shape), index, lambda module=module: module.weight.detach())
        for index, (name, module) in enumerate(linears.items())
    ]
    named: dict[str, dict[str, Adapter]] = {name: {} for name in linears}
    for seed, method in enumerate(methods):
        ranks = {} if method in RANKLESS else {"r": 4}
        made = initial_adapters(layers, AdapterConfig(method=method, init="kaiming", **ranks))  # type: ignore[arg-type]
        for name, adapter in made.items():
            randomize(adapter, 0.2, seed)
            named[name][method] = adapter.eval()
    if base == "nf4":
        from lowrank.inject import replace_module
        from lowrank.linear import NF4Linear

        for name, module in linears.items():
            replace_module(model, name, NF4Linear(quantize_nf4(module.weight.detach())))
    inject(model, named, None)
    return model.eval()


def logits(steps: Steps, requests: Sequence[Request], rounds: int = 6, together: bool = True) -> list[torch.Tensor]:
    """Logits of every request after its prompt and after each of `rounds` greedy tokens."""
    found: list[list[torch.Tensor]] = []
    with torch.inference_mode():
        for number, (adapter, prompt) in enumerate(requests):
            half = len(prompt) // 2
            steps.prefill(number, adapter, prompt[:half], 0)
            found.append([steps.prefill(number, adapter, prompt[half:], half)])
        for _ in range(rounds):
            tokens = [int(own[-1].argmax()) for own in found]
            groups = [range(len(requests))] if together else [[n] for n in range(len(requests))]
            for group in groups:
                names = [requests[n][0] for n in group]
                for n, new in zip(group, steps.decode(list(group), names, [tokens[n] for n in group]), strict=True):
                    found[n].append(new)
    return [torch.stack(own) for own in found]


def assert_alike(model: Any, requests: Sequence[Request], min_spread: float = 0.05) -> None:
    alone = logits(SingleSteps(model), requests, together=False)
    kinds = [BatchedSteps, FusedSteps] if type(steps_for(model, 2)) is FusedSteps else [BatchedSteps]
    for kind in kinds:
        for one, other in zip(logits(kind(model, len(requests)), requests), alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    by_name = {name: own[0] for (name, prompt), own in zip(requests, alone, strict=True) if prompt == requests[0][1]}
    names = list(by_name)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert float((by_name[name] - by_name[other]).abs().max()) > min_spread, (name, other)


PROMPT = [5, 17, 200, 31, 8, 99, 12]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_all_families_in_one_batch_answer_as_each_alone(base: str) -> None:
    methods = sorted(FAMILIES)
    model = with_adapters(tiny("llama", num_key_value_heads=2), methods, base)
    requests: list[Request] = [(None, PROMPT), *((method, PROMPT) for method in methods)]
    requests += [("lora", PROMPT[2:]), (None, PROMPT[:3]), ("dora", PROMPT + PROMPT), ("loha", PROMPT[1:])]
    assert_alike(model, requests)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gpt2", {}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("gpt_neox", {}),
    ],
    ids=["gpt2", "qwen2", "qwen2, two windows", "mistral", "gemma2", "opt", "gpt_neox"],
)
def test_models_of_other_kinds(kind: str, more: dict[str, Any]) -> None:
    model = tiny(kind, **more)
    requests: list[Request] = [(None, PROMPT), (None, PROMPT[2:]), (None, PROMPT + PROMPT), (None, PROMPT[:2])]
    fused = kind in ("qwen2", "mistral") and "max_window_layers" not in more
    assert type(steps_for(model, 4)) is (FusedSteps if fused else BatchedSteps)
    assert_alike(model, requests)


def test_a_model_that_takes_no_batch_is_asked_in_turn(engine_log: pytest.LogCaptureFixture) -> None:
    model = tiny("gpt_neox")
    whole = model.forward
    model.forward = lambda **given: whole(**given | {"position_ids": None})  # reads the cache's length for all rows
    assert isinstance(steps_for(model, 4), SingleSteps)
    assert "BatchedSteps does not fit GPTNeoXForCausalLM" in engine_log.text


def test_requests_come_and_go_and_their_rows_move() -> None:
    model = with_adapters(tiny("llama", num_key_value_heads=2), ["lora", "loha", "hira"])
    steps, alone = steps_for(model, 3), SingleSteps(model)
    assert isinstance(steps, FusedSteps)
    live: dict[int, list[Any]] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for number in range(40):
            if len(live) == 3:
                gone = sorted(live)[int(torch.randint(3, (1,), generator=generator))]
                steps.release(gone)
                alone.release(gone)
                del live[gone]
            adapter = [None, "lora", "loha", "hira"][number % 4]
            prompt = torch.randint(300, (1 + number % 9,), generator=generator).tolist()
            first = steps.prefill(number, adapter, prompt, 0)
            torch.testing.assert_close(first, alone.prefill(number, adapter, prompt, 0), rtol=1e-4, atol=1e-4)
            live[number] = [adapter, int(first.argmax())]
            some = [n for n in live if n % 3 or len(live) < 3]
            for _ in range(30 if number == 20 else 3):  # beyond the first columns of the cache
                names, tokens = [live[n][0] for n in some], [live[n][1] for n in some]
                ours = steps.decode(some, names, tokens)
                for n, one, other in zip(some, ours, alone.decode(some, names, tokens), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
                    live[n][1] = int(other.argmax())


def test_a_row_is_clean_for_its_next_request() -> None:
    model = tiny("llama")
    steps = BatchedSteps(model, 2)
    with torch.inference_mode():
        steps.prefill(0, None, PROMPT, 0)
        steps.prefill(1, None, PROMPT * 3, 0)
        for layer in steps._cache._layers.values():
            for held in layer:
                held[0] = torch.nan
        steps.release(0)
        steps.prefill(2, None, [1], 0)
        assert torch.isfinite(torch.stack(steps.decode([2, 1], [None, None], [3, 4]))).all()
        steps.release(1)
        steps.release(2)
    assert steps._cache._layers == {}  # nothing is held for nobody


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, "masked in ways"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "longest request"),
    ],
)
def test_what_depends_on_neighbours_goes_in_turn(kind: str, more: Any, reason: str) -> None:
    model = tiny(kind, **more)
    with pytest.raises(ValueError, match=reason):
        BatchedSteps(model, 2)
    assert isinstance(steps_for(model, 2), SingleSteps)


def test_bfloat16_is_batched() -> None:
    assert isinstance(steps_for(tiny("llama").to(torch.bfloat16), 2), FusedSteps)
    assert isinstance(steps_for(tiny("gpt_neox").to(torch.bfloat16), 2), BatchedSteps)


def test_saved_modules_answer_row_by_row() -> None:
    from lowrank.inject import adapted_layers
    from lowrank.saved_modules import add_saved, find_modules

    model = with_adapters(tiny("llama"), ["lora", "loha"])
    for name in ("lora", "loha"):
        copies = {"lm_head": None, "model.norm": None, "model.embed_tokens": None}
        add_saved(model, name, dict.fromkeys(find_modules(model, list(copies))), None)
        torch.manual_seed(len(name))
        with torch.no_grad():
            for module in find_modules(model, list(copies)):
                model.get_submodule(module).copies[name].weight.mul_(1 + 0.3 * torch.rand(1))
    assert len(list(adapted_layers(model))) == 14
    assert_alike(model, [(None, PROMPT), ("lora", PROMPT), ("loha", PROMPT), ("lora", PROMPT[3:])])
    set_active(model, None)
