"""serve: the registered version becomes an endpoint, and a smoke request proves it.

An endpoint is a state of the world: it is asked for its models first, and deployed again only when it does not serve
exactly this version.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cluster.serving.auth import ensure_token
from cluster.serving.spec import ServeSpec
from pipelines.artifacts import Store
from pipelines.config import PipelineConfig
from pipelines.model_source import model_source
from pipelines.tracking import Tracker

BASE_ID = "base"
SMOKE_PROMPT = "What is the capital of France?"


def token_file(config: PipelineConfig, store: Path) -> Path:
    """File of the endpoint's bearer token."""
    return Path(config.serve.token_file).expanduser().resolve() if config.serve.token_file else store / "_serve_token"


def serve_spec(
    config: PipelineConfig, store: Store, keys: dict[str, str], registered: dict[str, Any], tracker: Tracker
) -> ServeSpec:
    """What to serve: the base, and the registered version under its name and under `name:version`."""
    version = tracker.fetch(registered["name"], registered["version"])
    adapter = str(version / "adapter")
    return ServeSpec(
        app_name=f"rankline-{config.name}",
        source=model_source(config, store, keys),
        base_model_id=BASE_ID,
        adapters={registered["name"]: adapter, f"{registered['name']}:{registered['version']}": adapter},
        token_file=str(token_file(config, store.root)),
    )


def deploy_endpoint(
    config: PipelineConfig, store: Store, keys: dict[str, str], registered: dict[str, Any], tracker: Tracker
) -> dict[str, Any]:
    """Deploy (or find deployed) and smoke-test; returns what the summary and the table show."""
    from cluster.serving.deploy import Endpoint, deploy, smoke

    began = time.time()
    spec = serve_spec(config, store, keys, registered, tracker)
    token = ensure_token(spec.token_file)
    url = f"http://{config.serve.host}:{config.serve.port}"
    wanted = (spec.base_model_id, *spec.adapters)
    cached = served_models(url, token) == set(wanted)
    if cached:
        endpoint = Endpoint(spec.app_name, "/", url, config.serve.num_replicas, wanted)
    else:
        endpoint = deploy(spec, config.serve)
    answer = smoke(endpoint, token, SMOKE_PROMPT, registered["name"])
    return {
        "app_name": endpoint.app_name,
        "url": endpoint.url,
        "route_prefix": endpoint.route_prefix,
        "num_replicas": endpoint.num_replicas,
        "model_ids": list(endpoint.model_ids),
        "token_file": spec.token_file,
        "smoke": answer,
        "cached": cached,
        "seconds": time.time() - began,
    }


def served_models(url: str, token: str) -> set[str]:
    """Model ids that an endpoint says it serves; empty when it does not answer us."""
    import httpx

    try:
        reply = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {token}"}, timeout=3.0)
        return {model["id"] for model in reply.raise_for_status().json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return set()


def curl(endpoint: dict[str, Any], model: str) -> str:
    """A request to copy."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{SMOKE_PROMPT}"}}], "max_tokens": 32}}'
    return (
        f"curl {endpoint['url']}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-H \"Authorization: Bearer $(cat {endpoint['token_file']})\" -d '{body}'"
    )
