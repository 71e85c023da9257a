"""Requests for an adapter meet on one replica, also over HTTP on real replicas."""

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_samples import free_port, write_served_adapter

from cluster.config import ServeConfig
from cluster.model import ModelSource
from cluster.serving.auth import read_token
from cluster.serving.client import to_replica_of
from cluster.serving.deploy import deploy, undeploy
from cluster.serving.router import preferred
from cluster.serving.sources import FixedSource
from cluster.serving.spec import ServeSpec

MODELS = [f"m{number}" for number in range(400)]


def test_each_adapter_has_its_replica_and_keeps_it_when_others_come_or_go() -> None:
    four = dict.fromkeys("abcd", 0)
    first = {model: preferred(model, four)[0] for model in MODELS}
    shares = Counter(first.values())
    assert set(shares) == set("abcd")
    assert min(shares.values()) > 60, "shared out evenly"
    assert {model: preferred(f"{model}@champion", four)[0] for model in MODELS} == first
    assert {model: preferred(f"{model}%3A3", four)[0] for model in MODELS} == first
    three = dict.fromkeys("abc", 0)
    for model in MODELS:
        if first[model] != "d":
            assert preferred(model, three)[0] == first[model]
        else:
            assert preferred(model, three)[0] == preferred(model, four)[1]


def test_an_overloaded_replica_comes_last() -> None:
    model = next(model for model in MODELS if preferred(model, dict.fromkeys("abc", 0))[0] == "b")
    assert preferred(model, {"a": 4, "b": 4, "c": 4})[0] == "b"
    order = preferred(model, {"a": 3, "b": 9, "c": 3})
    assert order[-1] == "b"
    assert sorted(order) == ["a", "b", "c"]


@pytest.mark.timeout(300)
def test_each_adapter_is_loaded_once_over_all_replicas(
    ray_head: Any, served: tuple[ModelSource, dict[str, str]], tmp_path: Path
) -> None:
    source, _ = served
    # An odd number: two replicas never count alike.
    adapters = {f"m{k}": str(write_served_adapter(source, tmp_path / f"m{k}", k)) for k in range(7)}
    spec = ServeSpec("routed", source, "base", FixedSource(adapters), (), str(tmp_path / "token"))
    config = ServeConfig(port=free_port(), num_cpus=0.5, num_replicas=2)
    endpoint = deploy(spec, config)
    try:
        bearer = {"Authorization": f"Bearer {read_token(spec.token_file)}"}
        with httpx.Client(base_url=endpoint.url, headers=bearer, trust_env=False, timeout=60) as client:
            for _ in range(4):
                for model in adapters:
                    body = {"model": model, "prompt": "a", "max_tokens": 1}
                    client.post("/v1/completions", json=body, headers=to_replica_of(model)).raise_for_status()
            counts = {_adapter_counts(client) for _ in range(24)}
    finally:
        undeploy("routed")
    assert len(counts) == 2, "two replicas, each with its own counts"
    assert sum(misses for misses, _ in counts) == len(adapters)
    assert sum(hits for _, hits in counts) == 3 * len(adapters)


def _adapter_counts(client: httpx.Client) -> tuple[float, float]:
    """Misses and hits of the replica that answers."""
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").raise_for_status().text.splitlines()]
    found = {line[0]: line[1] for line in lines}
    return float(found["rankline_adapter_misses_total"]), float(found["rankline_adapter_hits_total"])
