"""vLLM as the engine answers as ours does, over the same base with the same adapters.

Skipped where vLLM is not installed; on a machine without a GPU it takes a build for CPUs.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_samples import randomize
from serving_http import BEARER, OWN, assert_error, call, events, listening
from tiny import make_tiny

from cluster.artifacts import SplitSet
from cluster.config import ServeConfig
from cluster.errors import ServeError
from cluster.serving.app import create_app
from cluster.serving.auth import Keyring
from cluster.serving.service import Service
from cluster.serving.sources import FixedSource
from cluster.serving.spec import ServeSpec
from lowrank.adapters.base import Layer
from lowrank.adapters.peft_format import save_adapter
from lowrank.adapters.registry import initial_adapters
from lowrank.config import AdapterConfig

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

BASE = "base"
FAMILIES = {"lora": "lora", "loha": "loha", "polar": "polar", "hira": "hira"}
PLAIN = [BASE, "lora", "loha", "polar"]
LIMITS = {"max_new_tokens": 64, "max_concurrent": 4, "max_waiting": 8}
ROOM = 0.05  # MiB, for some of the adapters


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ServeSpec:
    root = tmp_path_factory.mktemp("vllm")
    source = make_tiny(root / "base", "llama-32", base="nf4", seed=3)
    adapters = {name: str(write(root / name, source, method)) for name, method in FAMILIES.items()}
    return ServeSpec("test", source, BASE, FixedSource(adapters), ("lora",), scratch_dir=str(root / "scratch"))


def write(directory: Path, source: Any, method: str) -> Path:
    splits = SplitSet(source.splits).items()
    layers = [
        Layer(name, split.shape, index, lambda split=split: split.residual.dequantize())
        for index, (name, split) in enumerate(splits)
    ]
    config = AdapterConfig(method=method, r=2, init="kaiming")  # type: ignore[arg-type]
    made = initial_adapters(layers, config)
    for seed, adapter in enumerate(made.values()):
        randomize(adapter, 0.5, seed + len(method))
    save_adapter(directory, made, config, source.base_facts)
    return directory


@pytest.fixture(scope="module")
def ours(spec: ServeSpec) -> Iterator[Service]:
    service = Service.load(spec, ServeConfig(**LIMITS))
    yield service
    service.close()


@pytest.fixture(scope="module")
def vllm(spec: ServeSpec) -> Iterator[Service]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    service = Service.load(spec, ServeConfig(engine="vllm", vllm_options={"enforce_eager": True}, **LIMITS))
    yield service
    service.close()
    assert not service.healthy


def ask(service: Service, model: str, **changes: Any) -> httpx.Response:
    body = {"model": model, "prompt": "what is it", "temperature": 0, "max_tokens": 24} | changes
    return call(service, "POST", "/v1/completions", json=body)


def text(service: Service, model: str, **changes: Any) -> str:
    answer: str = ask(service, model, **changes).raise_for_status().json()["choices"][0]["text"]
    return answer


def test_it_is_told_where_it_is_not_installed(spec: ServeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(
        ServeError, match=r"serve\.engine is 'vllm', which cannot be imported .* serve\.engine: rankline"
    ):
        Service.load(spec, ServeConfig(engine="vllm"))


def test_the_same_answers_as_ours_from_every_model_alone_and_together(vllm: Service, ours: Service) -> None:
    expected = {model: text(ours, model) for model in PLAIN}
    assert len(set(expected.values())) == len(PLAIN), "the models say the same, which tests nothing"
    assert {model: text(vllm, model) for model in PLAIN} == expected
    with listening(create_app(vllm, Keyring(OWN))) as url, ThreadPoolExecutor(8) as pool:
        body = {"prompt": "what is it", "temperature": 0, "max_tokens": 24}
        asked = [PLAIN[k % len(PLAIN)] for k in range(8)]
        got = list(
            pool.map(
                lambda m: httpx.post(f"{url}/v1/completions", json=body | {"model": m}, headers=BEARER, timeout=60),
                asked,
            )
        )
    assert [one.json()["choices"][0]["text"] for one in got] == [expected[model] for model in asked]


def test_logprobs_stops_and_streams_are_ours(vllm: Service, ours: Service) -> None:
    left, right = (ask(s, "loha", logprobs=3).json()["choices"][0]["logprobs"] for s in (vllm, ours))
    assert left["tokens"] == right["tokens"]
    assert left["text_offset"] == right["text_offset"]
    assert left["token_logprobs"] == pytest.approx(right["token_logprobs"], abs=1e-3)
    for ours_top, vllm_top in zip(right["top_logprobs"], left["top_logprobs"], strict=True):
        assert vllm_top == pytest.approx(ours_top, abs=1e-3)
    whole = text(ours, "lora")
    stop = whole[10:13]
    for service in (vllm, ours):
        reply = ask(service, "lora", stop=[stop]).json()["choices"][0]
        assert (reply["text"], reply["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    streamed = events(ask(vllm, "lora", stream=True))
    assert "".join(event["choices"][0]["text"] for event in streamed) == whole
    assert streamed[-1]["choices"][0]["finish_reason"] == "length"


def test_seeds_and_choices(vllm: Service) -> None:
    def drawn(**changes: Any) -> list[str]:
        reply = ask(vllm, "lora", temperature=1.0, n=3, **changes).json()
        assert 0 < reply["usage"]["completion_tokens"] <= 3 * 24  # a draw may end it
        return [choice["text"] for choice in reply["choices"]]

    first = drawn(seed=5)
    assert first == drawn(seed=5)
    assert len(set(first)) == 3
    assert drawn() != drawn()


def test_what_is_no_lora_is_refused_and_room_is_kept(vllm: Service, spec: ServeSpec, ours: Service) -> None:
    error = assert_error(ask(vllm, "hira"), 422, "adapter_refused")
    assert "Merge it" in error["message"]
    small = Service(vllm._engine, vllm.store._holder, vllm._tokenizer, (BASE, "init"), spec.adapters,
                    ServeConfig(adapter_mib=ROOM, **LIMITS), spec.source.base_facts)  # fmt: skip
    expected = {model: text(ours, model) for model in PLAIN}
    for model in PLAIN * 2:
        assert text(small, model) == expected[model]
    assert small.store.counts().evictions >= 3
    small.store.close()


def test_who_leaves_frees_the_slot(vllm: Service) -> None:
    async def leave() -> None:
        generation = await vllm.complete(_request(64))
        async for _ in generation.pieces():
            break
        generation.cancel()

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while any(vllm.live) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert vllm.live == (0, 0)
    assert text(vllm, BASE)


def test_options_that_vllm_does_not_know_are_told(spec: ServeSpec, vllm: Service) -> None:
    with pytest.raises(ServeError, match=r"by vLLM: TypeError: .*no_such_option"):
        Service.load(spec, ServeConfig(engine="vllm", vllm_options={"no_such_option": 1}))


def _request(tokens: int) -> Any:
    from cluster.serving.protocol import CompletionRequest

    return CompletionRequest(model="lora", prompt="what is it", max_tokens=tokens, temperature=0)
