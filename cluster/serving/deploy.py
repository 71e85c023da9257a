"""Put an endpoint on the connected cluster, and take it away.

Serve and its HTTP proxy are detached: they outlive the driver that deploys. How the token reaches the replicas: as a
*path* in `ServeSpec`. Neither the token nor a prompt is in Serve's configuration (which the dashboard shows), in an
environment variable, in a pickle or in a log. What the proxy itself answers without a token is `/-/healthz` and
`/-/routes` (the application's name): Serve offers no way to close them.

The proxy runs on the head node only, and all of Serve has one port: it cannot change while Serve runs.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

from cluster.config import ServeConfig
from cluster.errors import PortError, ResourceError, ServeError
from cluster.serving.auth import check_exposure, ensure_token
from cluster.serving.client import smoke, wait_ready
from cluster.serving.spec import Endpoint, ServeSpec

__all__ = ["Endpoint", "ServeSpec", "deploy", "smoke", "undeploy", "wait_ready"]

ROUTE_PREFIX = "/"
#: `cluster.serving.router.AdapterRouter`, which only Ray imports.
ROUTER = "cluster.serving.router.AdapterRouter"
DEPLOY_TIMEOUT_S = 600.0
_SPARE_REQUESTS = 64  # health checks and refusals must come through while every slot is taken
_MAX_QUEUED = 256


def deploy(spec: ServeSpec, config: ServeConfig, timeout_s: float = DEPLOY_TIMEOUT_S) -> Endpoint:
    """Deploy `spec`, or replace what runs under its name, and wait until it answers.

    Args:
        spec: What to serve; `spec.token_file` is made when it is missing.
        config: Address, replicas and limits.
        timeout_s: Longest wait for the replicas, in seconds.

    Raises:
        PortError: the port belongs to somebody else, or Serve already runs on another one.
        TokenError: the token file cannot be used.
        ResourceError: the cluster is too small.
        ServeError: Ray is not connected, an exposed address has no token of its own, or the replicas do not start.
    """
    import ray

    if not ray.is_initialized():
        raise ServeError(f"deploy {spec.app_name}: this process is connected to no Ray cluster. Connect first.")
    check_exposure(config.host, config.token_file)
    ensure_token(spec.token_file)
    _check_resources(spec, config, ray.cluster_resources().get("CPU", 0.0))
    _start_serve(config)
    _run(spec, config, timeout_s)
    url = endpoint_url(config)
    wait_ready(url)
    return Endpoint(
        spec.app_name, ROUTE_PREFIX, url, config.num_replicas, (spec.base_model_id, *spec.adapters.model_ids())
    )


def undeploy(app_name: str) -> bool:
    """Remove an application and return whether it was there; the last one takes Serve and its port with it."""
    from ray import serve

    client = _client()
    if client is None:
        return False
    there = app_name in serve.status().applications
    if there:
        serve.delete(app_name)
    if not serve.status().applications:
        host, port = client.http_config.host, client.http_config.port
        serve.shutdown()
        _wait_free(host, port)
    return there


def endpoint_url(config: ServeConfig) -> str:
    """Where the endpoint is reached from the head node."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def _check_resources(spec: ServeSpec, config: ServeConfig, cpus: float) -> None:
    needed = config.num_replicas * config.num_cpus
    if needed > cpus:
        raise ResourceError(
            f"deploy {spec.app_name}: {config.num_replicas} replicas of {config.num_cpus:g} CPUs need {needed:g}, the "
            f"cluster has {cpus:g}. Lower serve.num_replicas or serve.num_cpus."
        )


def _client() -> Any:
    """The client of the Serve that runs on this cluster, or None."""
    # Private, but the only way to learn the running port without the dashboard; the tests watch it.
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _start_serve(config: ServeConfig) -> None:
    """Start Serve's proxy, or make sure that the running one is where it was asked for."""
    from ray import serve
    from ray.serve.config import ProxyLocation

    # Importing it sets its logger up; it announces what it does, and a failure raises.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    client = _client()
    if client is None:
        _require_free(config.host, config.port)
        options = {"host": config.host, "port": config.port}
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options)
        return
    running = (client.http_config.host, client.http_config.port)
    if running != (config.host, config.port):
        raise PortError(
            f"serve on {config.host}:{config.port}: Serve already runs on this cluster at {running[0]}:{running[1]}, "
            f"and all of Serve has one address. Set serve.host and serve.port to that one, or undeploy what runs there."
        )


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # Without SO_REUSEPORT, which Serve's own proxy sets: two Serves would quietly share the port's requests.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _require_free(host: str, port: int) -> None:
    if _is_head_node() and not _is_free(host, port):
        raise PortError(
            f"serve on {host}:{port}: the port is in use by another program, or the address is not one of this "
            "machine. Set serve.port to a free port."
        )


def _is_head_node() -> bool:
    """Whether this driver runs where the proxy will."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    heads = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    return here in heads


def _wait_free(host: str, port: int, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while _is_head_node() and not _is_free(host, port) and time.monotonic() < deadline:
        time.sleep(0.1)


def _run(spec: ServeSpec, config: ServeConfig, timeout_s: float) -> None:
    """Hand the application to Serve and follow it until it runs."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    app = application(spec, config)
    target = serve.RunTarget(target=app, name=spec.app_name, route_prefix=ROUTE_PREFIX)
    try:
        serve.run_many([target], wait_for_applications_running=False)
    except (RayServeException, RuntimeError, ValueError) as error:
        raise ServeError(f"deploy {spec.app_name}: Serve refuses it ({error}).") from error
    deadline = time.monotonic() + timeout_s
    while True:
        overview = serve.status().applications.get(spec.app_name)
        state = "unknown" if overview is None else overview.status.value
        if state == "RUNNING":
            return
        if state in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > deadline:
            raise ServeError(
                f"deploy {spec.app_name}: the replicas do not run (Serve says {state}). {_reason(overview)}\n"
                "More is in the replica's log in Ray's session directory, logs/serve."
            )
        time.sleep(0.1)


def _reason(overview: Any) -> str:
    """The end of Serve's messages, where the replica's own error stands."""
    if overview is None:
        return "Its record is gone: somebody removed it."
    messages = [overview.message, *(deployment.message for deployment in overview.deployments.values())]
    longest: str = max((message.strip() for message in messages), key=len)
    return longest[-2000:]


def deployment_options(config: ServeConfig) -> dict[str, Any]:
    """What Serve is told of the replicas, as `serve.deployment` and a `serve.yaml` take it."""
    import ray

    gpus = config.num_gpus
    if gpus is None and ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1:
        gpus = 1.0
    if config.max_replicas is None:
        scaling: dict[str, Any] = {"num_replicas": config.num_replicas}
    else:
        limits = {"min_replicas": config.num_replicas, "max_replicas": config.max_replicas}
        scaling = {"autoscaling_config": limits | {"target_ongoing_requests": config.max_concurrent}}
    if max(config.num_replicas, config.max_replicas or 0) > 1:
        scaling["request_router_config"] = {"request_router_class": ROUTER}
    return scaling | {
        "name": "rankline",
        "max_ongoing_requests": config.max_concurrent + config.max_waiting + _SPARE_REQUESTS,
        "max_queued_requests": _MAX_QUEUED,
        "ray_actor_options": {"num_cpus": config.num_cpus} | ({} if gpus is None else {"num_gpus": gpus}),
        "logging_config": {"enable_access_log": False},
    }


def application(spec: ServeSpec, config: ServeConfig) -> Any:
    """The Serve application; made here so that importing this module needs no Ray."""
    from ray import serve

    @serve.deployment(**deployment_options(config))
    @serve.ingress()
    class Replica:
        """One engine with its routes; the app is built after the model, so a replica is ready when it is there."""

        def __init__(self, spec: ServeSpec, config: ServeConfig) -> None:
            import torch

            from cluster.serving.auth import Keyring, read_keys
            from cluster.serving.service import Service

            torch.set_num_threads(max(1, int(config.num_cpus)))
            self.keys = Keyring(read_keys(spec.token_file))
            self.service = Service.load(spec, config)

        def __serve_build_asgi_app__(self) -> Any:
            from cluster.serving.app import create_app
            from cluster.serving.store import freeze_collector

            app = create_app(self.service, self.keys)
            freeze_collector()
            return app

        async def check_health(self) -> None:
            """Serve replaces a replica whose engine has died."""
            if not self.service.healthy:
                raise RuntimeError("the engine's worker thread has ended")

    deployment: Any = Replica
    return deployment.bind(spec, config)
