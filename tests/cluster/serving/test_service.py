"""What tokens may do, what is measured, deadlines and refused adapters: over a real engine on the tiny model."""

import asyncio
import time
from pathlib import Path

import httpx
from serving_http import BASE, BEARER, COMPLETION, ONE, OWN, TOKEN, TWO, assert_error, call, post

from cluster.config import ServeConfig
from cluster.model import ModelSource
from cluster.serving.app import create_app
from cluster.serving.auth import Key, Keyring
from cluster.serving.service import Service
from cluster.serving.sources import FixedSource
from cluster.serving.spec import ServeSpec


def test_a_token_uses_its_own_models_at_its_own_rate(service: Service) -> None:
    keys = (Key("all", TOKEN), Key("one", "other", (ONE,), 60))
    headers = {"Authorization": "Bearer other"}
    listed = call(service, "GET", "/v1/models", headers, keys).json()["data"]
    assert [(model["id"], model["parent"], model["root"]) for model in listed] == [(ONE, BASE, ONE)]
    for model in (TWO, BASE, "none"):
        response = call(service, "POST", "/v1/completions", headers, keys, json=COMPLETION | {"model": model})
        assert_error(response, 403, "model_not_allowed")
        assert_error(call(service, "GET", f"/v1/models/{model}", headers, keys), 403, "model_not_allowed")
    assert call(service, "POST", "/v1/completions", headers, keys, json=COMPLETION).status_code == 200

    async def many() -> list[httpx.Response]:
        app = create_app(service, Keyring([Key("one", "other", (ONE,), 3)]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.post("/v1/completions", json=COMPLETION, headers=headers) for _ in range(4)]

    responses = asyncio.run(many())
    assert [response.status_code for response in responses] == [200, 200, 200, 429]
    assert_error(responses[-1], 429, "rate_limit_exceeded")
    assert 1 <= int(responses[-1].headers["retry-after"]) <= 20


def test_metrics_tell_what_happened(service: Service) -> None:
    async def page() -> str:
        app = create_app(service, Keyring(OWN))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers=BEARER
        ) as client:
            for stream in (False, True):
                await client.post("/v1/completions", json=COMPLETION | {"stream": stream})
            await client.post("/v1/completions", json=COMPLETION | {"model": "secret-id"})
            return (await client.get("/metrics")).text

    text = asyncio.run(page())
    from prometheus_client.parser import text_string_to_metric_families

    found = {
        (sample.name, *(sample.labels.get(label, "") for label in ("version", "status", "kind"))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["rankline_requests_total", ONE, "200", ""] == 2
    assert found["rankline_requests_total", "", "404", ""] == 1
    assert found["rankline_tokens_total", ONE, "", "completion"] == 24
    assert found["rankline_time_to_first_token_seconds_count", "", "", ""] == 2
    assert found["rankline_adapters_resident", "", "", ""] == 2
    assert found["rankline_requests_running", "", "", ""] == 0
    assert "secret-id" not in text


def test_an_answer_that_takes_too_long_ends(served: tuple[ModelSource, dict[str, str]]) -> None:
    source, adapters = served
    spec = ServeSpec("test", source, BASE, FixedSource(adapters), (ONE,))
    service = Service.load(spec, ServeConfig(max_new_tokens=200, request_timeout_s=0.05))
    try:
        assert_error(post(service, "/v1/completions", max_tokens=200), 504, "deadline_exceeded")
        streamed = post(service, "/v1/completions", max_tokens=200, stream=True).text
        assert "deadline_exceeded" in streamed
        assert "[DONE]" not in streamed
        until_idle(service)
    finally:
        service.close()


def until_idle(service: Service) -> None:
    deadline = time.monotonic() + 10
    while sum(service.live) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(service.live) == 0


def test_an_adapter_that_is_refused_is_told_and_leaves_the_others(
    served: tuple[ModelSource, dict[str, str]], tmp_path: Path
) -> None:
    source, adapters = served
    (tmp_path / "adapter_config.json").write_text("{}")
    spec = ServeSpec("test", source, BASE, FixedSource(adapters | {"bad": str(tmp_path)}), (ONE,))
    service = Service.load(spec, ServeConfig(max_new_tokens=200))
    try:
        for _ in range(2):
            error = assert_error(post(service, "/v1/completions", model="bad"), 422, "adapter_refused")
            assert "adapter_model.safetensors" in error["message"]
        assert post(service, "/v1/completions", model=TWO).json()["system_fingerprint"] == TWO
        assert service.store.counts().resident == 2
    finally:
        service.close()
