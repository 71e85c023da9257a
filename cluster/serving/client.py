"""The endpoint seen from outside: wait until it answers, and one measured request."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

from cluster.errors import ServeError
from cluster.serving.spec import Endpoint


def to_replica_of(model_id: str) -> dict[str, str]:
    """The header by which several replicas share adapters out; see `cluster.serving.router`."""
    return {"serve-multiplexed-model-id": quote(model_id, safe="")}


def wait_ready(url: str, timeout_s: float = 60.0) -> None:
    """Wait until `url`/readyz answers 200.

    Raises:
        ServeError: it does not within `timeout_s`.
    """
    import httpx

    deadline = time.monotonic() + timeout_s
    seen = "no answer"
    # Proxies from the environment must not stand between us and a loopback address.
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                response = client.get(f"{url}/readyz")
                if response.status_code == 200:
                    return
                seen = f"HTTP {response.status_code}"
            except httpx.HTTPError as error:
                seen = type(error).__name__
            time.sleep(0.1)
    raise ServeError(
        f"reach the endpoint at {url}: not ready after {timeout_s:g} s ({seen}). "
        "Look at the replica's log in Ray's session directory, logs/serve."
    )


def smoke(
    endpoint: Endpoint, token: str, prompt: str, model_id: str, *, max_tokens: int = 16, timeout_s: float = 300.0
) -> dict[str, Any]:
    """One greedy request through the chat route (completions, where the model has no chat template), measured.

    Returns:
        `route, model, text, finish_reason, ms, prompt_tokens, completion_tokens, tokens_per_s`.

    Raises:
        ServeError: the endpoint does not answer, or answers anything but 200.
    """
    route, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]}
    status, answer, ms = _post(endpoint, token, route, body, model_id, max_tokens, timeout_s)
    if status == 400 and answer.get("error", {}).get("code") == "no_chat_template":
        route = "/v1/completions"
        status, answer, ms = _post(endpoint, token, route, {"prompt": prompt}, model_id, max_tokens, timeout_s)
    if status != 200:
        reason = answer.get("error", {}).get("message", "no reason given")
        raise ServeError(f"ask {model_id!r} at {endpoint.url}{route}: HTTP {status}: {reason}")
    choice, counted = answer["choices"][0], answer["usage"]
    return {
        "route": route,
        "model": answer["model"],
        "text": choice["message"]["content"] if "message" in choice else choice["text"],
        "finish_reason": choice["finish_reason"],
        "ms": ms,
        "prompt_tokens": counted["prompt_tokens"],
        "completion_tokens": counted["completion_tokens"],
        "tokens_per_s": counted["completion_tokens"] / (ms / 1000),
    }


def _post(
    endpoint: Endpoint, token: str, route: str, body: dict[str, Any], model_id: str, max_tokens: int, timeout_s: float
) -> tuple[int, dict[str, Any], float]:
    import httpx

    body = body | {"model": model_id, "max_tokens": max_tokens, "temperature": 0}
    started = time.perf_counter()
    try:
        with httpx.Client(timeout=timeout_s, trust_env=False) as client:
            headers = {"Authorization": f"Bearer {token}"} | to_replica_of(model_id)
            response = client.post(endpoint.url + route, json=body, headers=headers)
    except httpx.HTTPError as error:
        raise ServeError(f"ask {model_id!r} at {endpoint.url}{route}: no answer ({type(error).__name__}).") from error
    ms = (time.perf_counter() - started) * 1000
    try:
        answer = response.json()
    except ValueError:
        answer = {}
    return response.status_code, answer if isinstance(answer, dict) else {}, ms
