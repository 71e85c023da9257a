"""The endpoint under churn: adapters come and go, aliases move, a replica dies; every answer is checked.

RANKLINE_SOAK above 1 makes the requests many more (`make soak`).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving_samples import free_port, make_served, write_served_adapter
from soak import SOAK, amount, record

from cluster.config import ServeConfig
from cluster.model import ModelSource, build_adapted, load_tokenizer
from cluster.serving.auth import read_token
from cluster.serving.deploy import deploy, undeploy
from cluster.serving.spec import ServeSpec
from lowrank.inject import adapted_layers, set_active
from lowrank.mixing import Ready, bytes_of
from pipelines.registry import RegistrySource
from pipelines.tracking import Tracker

NAMES, REPUBLISHED, RESIDENT, CLIENTS = 16, 8, 4, 12
PROMPTS = ("hello", "the sum of two and two", "z")
NEW = 10
#: An alias that moved may be served from its last place for so long.
STALE_S = 10.0


@dataclass
class World:
    """A registry with 16 models of two versions each, their reference answers, and what the aliases held when."""

    source: ModelSource
    tracker: Tracker
    references: dict[str, dict[str, str]]
    bundles: list[Path]
    adapter_bytes: int
    url: str = ""
    token: str = ""
    held: dict[str, list[tuple[float, str]]] = field(default_factory=dict)

    def publish(self, name: str, bundle: Path) -> str:
        """Register a bundle as the next version of a model."""
        facts = self.source.base_facts
        tags = {"rankline.base_sha256": str(facts["base_sha256"]), "rankline.key.quantize": str(facts["split_key"])}
        tags["rankline.key"] = bundle.name
        with self.tracker.stage("register", bundle.name, {}):
            made = self.tracker.register(name, bundle, tags, "champion", lambda _: "not by itself")
        self.references[f"{name}:{made.version}"] = self.references.pop(bundle.name)
        return made.version

    def move(self, name: str, version: str) -> None:
        """Give the alias to a version."""
        self.tracker._client.set_registered_model_alias(name, "champion", version)
        self.held.setdefault(name, []).append((time.monotonic(), f"{name}:{version}"))

    def allowed(self, name: str, began: float, ended: float) -> set[str]:
        """Versions that an answer for a bare name may come from."""
        history = self.held[name]
        before = [version for at, version in history if at <= began - STALE_S][-1:]
        return {*before, *(version for at, version in history if began - STALE_S < at <= ended)}


def answers(source: ModelSource, adapters: dict[str, Path]) -> tuple[dict[str, dict[str, str]], int]:
    """Greedy answers of every adapter, each alone and one token after the other; and the bytes of one."""
    model, tokenizer = build_adapted(source, torch.float32, {"init": None, **adapters}), load_tokenizer(source.shards)
    found: dict[str, dict[str, str]] = {}
    for name in adapters:
        set_active(model, name)
        found[name] = {}
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                                 pad_token_id=0)  # fmt: skip
            found[name][prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    name = next(iter(adapters))
    return found, bytes_of(Ready.of(layer.adapters[name], layer.base) for _, layer in adapted_layers(model))


@pytest.fixture(scope="module")
def world(ray_head: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("churn")
    source = make_served(root / "base")
    bundles = [root / f"bundle{index}" for index in range(2 * NAMES + REPUBLISHED)]
    for seed, bundle in enumerate(bundles, start=1):
        write_served_adapter(source, bundle / "adapter", seed)
    references, adapter_bytes = answers(source, {bundle.name: bundle / "adapter" for bundle in bundles})
    for prompt in PROMPTS:
        assert len({own[prompt] for own in references.values()}) == len(bundles), "every pair differs on every prompt"
    tracker = Tracker(root / "store", None, "rankline")
    tracker.begin("churn", {}, {}, None)
    made = World(source, tracker, references, bundles[2 * NAMES :], adapter_bytes)
    for index in range(NAMES):
        for bundle in bundles[2 * index : 2 * index + 2]:
            made.publish(f"m{index}", bundle)
        made.move(f"m{index}", "1")
    registry = RegistrySource(tracker.uri, root / "served", source.base_facts, "champion", refresh_s=0.5)
    spec = ServeSpec("churn", source, "base", registry, (), str(root / "token"))
    config = ServeConfig(
        port=free_port(), num_cpus=0.5, num_replicas=2, max_new_tokens=64,
        adapter_mib=(RESIDENT + 0.5) * adapter_bytes / 2**20,
    )  # fmt: skip
    endpoint = deploy(spec, config)
    made.url, made.token = endpoint.url, read_token(spec.token_file)
    yield made
    undeploy("churn")
    shutil.rmtree(root, ignore_errors=True)


@dataclass
class Tally:
    """What clients saw."""

    replicas_die: bool = False
    right: int = 0
    wrong: list[Any] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, str]:
    """Text and version of one answer; raises httpx.HTTPError where there is none."""
    if not body.get("stream"):
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        return answer["choices"][0]["text"], answer["system_fingerprint"]
    text, version, ended = "", "", False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            await response.aread()
        response.raise_for_status()
        async for line in response.aiter_lines():
            ended |= line == "data: [DONE]"
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                text += chunk["choices"][0]["text"]
                version = chunk["system_fingerprint"]
    if not ended:
        raise httpx.RemoteProtocolError("the stream broke off")
    return text, version


async def load(world: World, requests: int, tally: Tally, seed: int) -> None:
    """Many clients; each asks for models by Zipf's law, by name, alias or version, and tries again when refused."""
    rng, left = random.Random(seed), iter(range(requests))
    weights = [1 / (rank + 1) ** 1.2 for rank in range(NAMES)]

    async def one(client: httpx.AsyncClient) -> None:
        name = f"m{rng.choices(range(NAMES), weights)[0]}"
        model_id = rng.choice([name, name, f"{name}@champion", f"{name}:1", f"{name}:2"])
        prompt = rng.choice(PROMPTS)
        body = {"model": model_id, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": rng.random() < 0.3}
        began = time.monotonic()
        while True:
            try:
                text, version = await ask(client, body)
                break
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                tally.refused[str(status)] += 1
                # Serve's proxy answers 500, in its own words, for a replica that died; OpenAI's client retries it.
                of_proxy = status == 500 and error.response.text == "Internal Server Error"
                if status not in (429, 503) and not (of_proxy and tally.replicas_die):
                    tally.wrong.append((model_id, status, error.response.text))
                    return
            except httpx.TransportError as error:
                tally.failed[type(error).__name__] += 1
            await asyncio.sleep(0.1)
        allowed = {model_id} if ":" in model_id else world.allowed(name, began, time.monotonic())
        tally.versions[version] += 1
        if version in allowed and text == world.references[version][prompt]:
            tally.right += 1
        else:
            tally.wrong.append((model_id, prompt, version, allowed, text))

    async def work() -> None:
        headers = {"Authorization": f"Bearer {world.token}"}
        async with httpx.AsyncClient(base_url=world.url, headers=headers, timeout=120, trust_env=False) as client:
            for _ in left:
                await one(client)

    await asyncio.gather(*(work() for _ in range(CLIENTS)))


def churn(world: World, ended: threading.Event, seed: int) -> None:
    """Move aliases and republish until it has ended."""
    rng, bundles = random.Random(seed), iter(world.bundles)
    count = 0
    while not ended.wait(0.15):
        name, count = f"m{rng.randrange(NAMES)}", count + 1
        bundle = next(bundles, None) if count % 6 == 0 else None
        version = world.publish(name, bundle) if bundle is not None else rng.choice(["1", "2"])
        world.move(name, version)


def counters(world: World) -> Counter[str]:
    """The largest value of each adapter metric over some answers of the replicas."""
    headers, found = {"Authorization": f"Bearer {world.token}"}, Counter[str]()
    for _ in range(8):
        page = httpx.get(f"{world.url}/metrics", headers=headers, trust_env=False).raise_for_status().text
        for line in page.splitlines():
            if line.startswith("rankline_adapter"):
                name, value = line.rsplit(" ", 1)
                found[name] = max(found[name], int(float(value)))
    return found


def test_no_answer_is_ever_another_adapters(world: World) -> None:
    requests, tally, ended = amount(400, 5000), Tally(), threading.Event()
    mover = threading.Thread(target=churn, args=(world, ended, 1))
    mover.start()
    try:
        asyncio.run(load(world, requests, tally, seed=2))
    finally:
        ended.set()
        mover.join()
    record(
        "requests while aliases move, adapters come and go", requests, [*tally.wrong, *tally.failed],
        "the answer of the adapter asked for", refused=tally.refused,
    )  # fmt: skip
    assert tally.wrong == []
    assert tally.right == requests
    assert not tally.failed
    assert len(tally.versions) > NAMES
    found = counters(world)
    assert found["rankline_adapter_evictions_total"] > 20, "adapters made room for others"
    assert found["rankline_adapter_bytes"] <= found["rankline_adapter_limit_bytes"]
    assert found["rankline_adapters_resident"] <= RESIDENT
    print(f"\n{requests} requests, {len(tally.versions)} versions, refused {dict(tally.refused)}, {dict(found)}")


def replica_pids() -> list[int]:
    """Processes of this endpoint's replicas, by the title that Ray gives them."""
    import psutil

    found = psutil.process_iter(["cmdline"])
    return [process.pid for process in found if "ServeReplica:churn" in " ".join(process.info["cmdline"] or [])]


def test_a_replica_that_dies_under_load_is_replaced(world: World) -> None:
    before = replica_pids()
    assert len(before) == 2
    tally = Tally(replicas_die=True)

    def kill() -> None:
        time.sleep(1.0)
        os.kill(before[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    asyncio.run(load(world, 200 * SOAK, tally, seed=3))
    assert not killer.is_alive(), "it died while there was load"
    record(
        "requests while one of two replicas is killed", 200 * SOAK, tally.wrong,
        "after trying again, the answer of the adapter asked for", tried_again=tally.refused + tally.failed,
    )  # fmt: skip
    assert (tally.wrong, tally.right) == ([], 200 * SOAK)
    deadline = time.monotonic() + 90
    while len(set(replica_pids()) - {before[0]}) < 2:
        assert time.monotonic() < deadline, "no replica took the place of the one that died"
        time.sleep(0.5)
    assert before[1] in replica_pids()
    print(f"\nretried: {dict(tally.refused)}, broken connections: {dict(tally.failed)}")
