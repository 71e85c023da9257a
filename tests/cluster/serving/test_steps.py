"""Requests of one batch against each alone: mixed families, pasts of their own, models of several kinds."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from adapter_samples import RANKLESS, randomize

from cluster.serving.fused import FusedSteps
from cluster.serving.steps import BatchedSteps, Chunk, SingleSteps, Steps
from cluster.serving.trial import steps_for
from lowrank import mixing
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
    """Logits of every request after its prompt and after each of `rounds` greedy tokens.

    Prompts are read in two parts; those of the odd requests while the even ones write.
    """
    found: list[list[torch.Tensor]] = [[] for _ in requests]
    taken = [0] * len(requests)

    def next_chunk(number: int, at: int) -> Chunk | None:
        adapter, prompt = requests[number]
        half, own = len(prompt) // 2, at - 2 * (number % 2)
        if not 0 <= own < rounds + 2:
            return None
        parts = {0: tuple(prompt[:half]), 1: tuple(prompt[half:])}
        tokens = parts.get(own) or (int(found[number][-1].argmax()),)
        return Chunk(number, adapter, tokens, taken[number])

    with torch.inference_mode():
        for at in range(rounds + 4):
            chunks = [chunk for number in range(len(requests)) if (chunk := next_chunk(number, at)) is not None]
            for group in [chunks] if together else [[chunk] for chunk in chunks]:
                for chunk, new in zip(group, steps.step(group), strict=True):
                    taken[chunk.request] += len(chunk.tokens)
                    found[chunk.request].append(new)
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


@pytest.mark.parametrize(("base", "run"), [("dense", 64), ("dense", 3), ("nf4", 3)])
def test_all_families_in_one_batch_answer_as_each_alone(base: str, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run`: tokens side by side that an adapter takes by itself."""
    monkeypatch.setattr(mixing, "_RUN", run)
    methods = sorted(FAMILIES)
    model = with_adapters(tiny("llama", num_key_value_heads=2), methods, base)
    requests: list[Request] = [(None, PROMPT), *((method, PROMPT) for method in methods)]
    requests += [("lora", PROMPT[2:]), (None, PROMPT[:3]), ("dora", PROMPT + PROMPT), ("loha", PROMPT[1:])]
    assert_alike(model, requests)


@pytest.mark.parametrize("run", [3, 64])
def test_a_bias_is_not_scaled_by_magnitudes(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "_RUN", run)
    model = with_adapters(tiny("qwen2", num_key_value_heads=2), ["dora", "lora", "hira"])
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    requests: list[Request] = [("dora", PROMPT), ("lora", PROMPT), (None, PROMPT), ("hira", PROMPT)]
    assert_alike(model, [*requests, ("dora", PROMPT * 3), ("dora", PROMPT[1:])])


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


@pytest.mark.parametrize("kind", [FusedSteps, BatchedSteps])
def test_requests_come_and_go_and_their_rows_move(kind: Any) -> None:
    model = with_adapters(tiny("llama", num_key_value_heads=2), ["lora", "loha", "hira"])
    steps, alone = kind(model, 3), SingleSteps(model)
    live: dict[int, tuple[str | None, int, int]] = {}
    generator = torch.Generator().manual_seed(0)

    def compare(chunks: list[Chunk]) -> None:
        for chunk, one, other in zip(chunks, steps.step(chunks), alone.step(chunks), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
            live[chunk.request] = chunk.adapter, int(other.argmax()), chunk.start + len(chunk.tokens)

    with torch.inference_mode():
        for number in range(40):
            if len(live) == 3:
                gone = sorted(live)[int(torch.randint(3, (1,), generator=generator))]
                steps.release(gone)
                alone.release(gone)
                del live[gone]
            adapter = [None, "lora", "loha", "hira"][number % 4]
            length = 60 if number in (7, 22) else 1 + number % 9
            new = Chunk(number, adapter, tuple(torch.randint(300, (length,), generator=generator).tolist()), 0)
            some = [n for n in live if n % 3 or len(live) < 3]
            for again in range(30 if number == 20 else 3):  # beyond the first columns of the cache
                chunks = [Chunk(n, live[n][0], (live[n][1],), live[n][2]) for n in some]
                if chunks or again == 0:
                    compare([*chunks, new] if again == 0 else chunks)


def test_long_and_short_chunks_share_a_pass() -> None:
    model = with_adapters(tiny("mistral", num_key_value_heads=2, sliding_window=40), ["lora", "lokr"])
    generator = torch.Generator().manual_seed(1)

    def words(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(300, (length,), generator=generator).tolist())

    passes = [
        [Chunk(0, "lora", words(70), 0), Chunk(1, "lokr", words(3), 0)],
        [Chunk(1, "lokr", words(1), 3), Chunk(0, "lora", words(50), 70), Chunk(2, None, words(50), 0)],
        [Chunk(2, None, words(20), 50), Chunk(0, "lora", words(1), 120), Chunk(3, "lora", words(49), 0)],
    ]
    fused, alone = FusedSteps(model, 4), SingleSteps(model)
    with torch.inference_mode():
        for chunks in passes:
            for one, other in zip(fused.step(chunks), alone.step(chunks), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("kind", [FusedSteps, BatchedSteps])
def test_a_first_chunk_of_one_token_comes_beside_a_prompt(kind: Any) -> None:
    model = tiny("llama")
    steps, alone = kind(model, 2), SingleSteps(model)
    passes = [
        [Chunk(0, None, tuple(PROMPT), 0), Chunk(1, None, (5,), 0)],
        [Chunk(1, None, (6,), 1), Chunk(0, None, (7,), len(PROMPT))],
    ]
    with torch.inference_mode():
        for chunks in passes:
            for one, other in zip(steps.step(chunks), alone.step(chunks), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_row_is_clean_for_its_next_request() -> None:
    model = tiny("llama")
    steps = BatchedSteps(model, 2)
    with torch.inference_mode():
        steps.step([Chunk(0, None, tuple(PROMPT), 0), Chunk(1, None, tuple(PROMPT * 3), 0)])
        for layer in steps._cache._layers.values():
            for held in layer:
                held[0] = torch.nan
        steps.release(0)
        steps.step([Chunk(2, None, (1,), 0)])
        found = steps.step([Chunk(2, None, (3,), 1), Chunk(1, None, (4,), len(PROMPT * 3))])
        assert torch.isfinite(torch.stack(found)).all()
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
    assert isinstance(steps_for(tiny("llama").to(torch.bfloat16), 2), BatchedSteps)
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
