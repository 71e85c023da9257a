"""serve: the registered version becomes an endpoint, and a smoke request proves it.

An endpoint is a state of the world: it is asked for its models first, and deployed again only when it does not serve
this base. A new version over the same base needs no deployment: replicas follow the registry.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.serving.auth import ensure_token
from cluster.serving.spec import ServeSpec, base_identity
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig
from pipelines.model_source import model_source
from pipelines.registry import Canary, RegistrySource
from pipelines.tracking import Tracker

BASE_ID = "base"
REGISTRY_WAIT_S = 15.0
SMOKE_PROMPT = "What is the capital of France?"


def token_file(config: PipelineConfig, store: Path) -> Path:
    """File of the endpoint's bearer token."""
    return Path(config.serve.token_file).expanduser().resolve() if config.serve.token_file else store / "_serve_token"


def registry_source(config: PipelineConfig, store: Store, base_facts: Mapping[str, Any], uri: str) -> RegistrySource:
    """The adapters of the registry that belong to the served base."""
    serve = config.serve
    canary = Canary(serve.canary_alias, serve.canary_share) if serve.canary_alias else None
    return RegistrySource(
        uri,
        store.root / "_served",
        base_facts,
        config.register.alias,
        canary,
        reserved=BASE_ID,
        most_bytes=int(serve.adapter_mib * 2**20),
    )


def serve_spec(
    config: PipelineConfig, store: Store, keys: Mapping[str, str], registered: Mapping[str, Any], uri: str
) -> ServeSpec:
    """What to serve: the base, and every adapter of the registry that belongs to it, this run's without fail."""
    source = model_source(config, store, keys)
    return ServeSpec(
        app_name=f"rankline-{config.name}",
        source=source,
        base_model_id=BASE_ID,
        adapters=registry_source(config, store, source.base_facts, uri),
        required=(version_id(registered),),
        token_file=str(token_file(config, store.root)),
        scratch_dir=str(store.root / "_served"),
    )


def version_id(registered: Mapping[str, Any]) -> str:
    """The model id of one version."""
    return f"{registered['name']}:{registered['version']}"


def check_served(store: Store, keys: Mapping[str, str]) -> None:
    """Hash again what replicas read.

    Raises:
        ArtifactError: it is damaged.
    """
    for stage in ("shard", "quantize"):
        store.check(stage, keys[stage])


def deploy_endpoint(
    config: PipelineConfig, store: Store, keys: dict[str, str], registered: dict[str, Any], tracker: Tracker
) -> dict[str, Any]:
    """Deploy (or find deployed) and smoke-test; returns what the summary and the table show."""
    from cluster.serving.deploy import Endpoint, deploy, smoke

    began = time.time()
    spec = serve_spec(config, store, keys, registered, tracker.uri)
    token = ensure_token(spec.token_file)
    url = f"http://{config.serve.host}:{config.serve.port}"
    cached = _serves(url, token, spec)
    if cached:
        ids = (spec.base_model_id, *spec.adapters.model_ids())
        endpoint = Endpoint(spec.app_name, "/", url, config.serve.num_replicas, ids)
    else:
        check_served(store, keys)
        endpoint = deploy(spec, config.serve)
    answer = smoke(endpoint, token, SMOKE_PROMPT, version_id(registered))
    return {
        "app_name": endpoint.app_name,
        "url": endpoint.url,
        "route_prefix": endpoint.route_prefix,
        "num_replicas": endpoint.num_replicas,
        "model_ids": [spec.base_model_id, registered["name"], version_id(registered)],
        "token_file": spec.token_file,
        "smoke": answer,
        "cached": cached,
        "seconds": time.time() - began,
    }


def _serves(url: str, token: str, spec: ServeSpec) -> bool:
    """Whether an endpoint of this base answers with the required adapters; a new version shows within seconds."""
    deadline = time.monotonic() + REGISTRY_WAIT_S
    while True:
        served = _models(url, token)
        base = next((model for model in served if model.get("id") == spec.base_model_id), {})
        if base.get("base") != base_identity(spec.source.base_facts):
            return False
        if set(spec.required) <= {model["id"] for model in served}:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def served_models(url: str, token: str) -> set[str]:
    """Model ids that an endpoint says it serves; empty when it does not answer us."""
    return {model["id"] for model in _models(url, token)}


def _models(url: str, token: str) -> list[dict[str, Any]]:
    import httpx

    try:
        reply = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {token}"}, timeout=3.0)
        found = reply.raise_for_status().json()["data"]
        return [model for model in found if isinstance(model["id"], str)]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return []


def curl(endpoint: dict[str, Any], model: str) -> str:
    """A request to copy."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{SMOKE_PROMPT}"}}], "max_tokens": 32}}'
    return (
        f"curl {endpoint['url']}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-H \"Authorization: Bearer $(cat {endpoint['token_file']})\" -d '{body}'"
    )
