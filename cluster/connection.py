"""Join a Ray cluster: its token, a fast probe of its address, and `ray.init`.

`ray.init` retries an unreachable address for minutes and answers a wrong token with "Failed to connect" after 20 s
[ran, 2.60]. So one gRPC call to the head, with a deadline and our token, comes first: it tells the three cases apart
in milliseconds, and Ray is asked to connect only where it will succeed.
"""

import logging
import os
import stat
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster.errors import ConnectError, TokenError
from cluster.head import Head
from cluster.processes import LOOPBACK, LOOPBACK_ENV_VAR

DEFAULT_TOKEN_FILE = Path("~/.ray/auth_token")


def connect(
    target: Head | str,
    *,
    token_file: Path | None = None,
    namespace: str = "rankline",
    runtime_env: dict[str, Any] | None = None,
    timeout_s: float = 15.0,
    log_to_driver: bool = False,
) -> None:
    """Connect this process to one cluster, named by its address; never to whichever happens to run.

    Connecting again to the same cluster does nothing.

    Args:
        target: the Head that `start_or_adopt` returned, or `host:port` of a head (the GCS port, 6379 by default).
        token_file: file of the cluster's token, mode 0600. None takes the Head's, or Ray's own order:
            RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.
        namespace: namespace of named actors.
        runtime_env: Ray runtime environment of this driver's tasks; leave it None for the fastest start.
        timeout_s: longest wait for the head to answer, in seconds.
        log_to_driver: print what workers print; otherwise Ray's notices of lost workers go to the logger `cluster.ray`.

    Raises:
        ConnectError: when the address is malformed, nobody answers there, or this process is connected elsewhere.
        TokenError: when the token is missing, readable by others, or refused.
    """
    address = target.address if isinstance(target, Head) else target
    if isinstance(target, Head) and token_file is None:
        token_file = Path(target.token_file)
    split_address(address)
    token = load_token(token_file)
    node_addresses = probe(address, token, timeout_s=timeout_s)
    _use_token(token, token_file)
    _use_loopback(LOOPBACK in node_addresses)
    _init(address, namespace, runtime_env, log_to_driver)
    if not log_to_driver:
        _keep_stdout_clean()


def disconnect() -> None:
    """Leave the cluster; the cluster itself goes on."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


def nodes() -> list[dict[str, Any]]:
    """Return one dict per node of the connected cluster: id, address, alive, CPUs, GPUs, memory in bytes, resources."""
    import ray

    return [
        {
            "node_id": node["NodeID"],
            "address": node["NodeManagerAddress"],
            "alive": node["Alive"],
            "num_cpus": float(node["Resources"].get("CPU", 0.0)),
            "num_gpus": float(node["Resources"].get("GPU", 0.0)),
            "memory_bytes": int(node["Resources"].get("memory", 0)),
            "resources": {name: float(amount) for name, amount in node["Resources"].items()},
        }
        for node in ray.nodes()
    ]


def living() -> dict[str, dict[str, float]]:
    """The resources of every living node of the connected cluster, by its id."""
    return {node["node_id"]: node["resources"] for node in nodes() if node["alive"]}


def load_token(token_file: Path | None = None) -> str:
    """Return the cluster token from `token_file`, or from where Ray itself would look.

    Raises:
        TokenError: when there is none, or its file is empty or readable by others.
    """
    if token_file is None and (token := os.environ.get("RAY_AUTH_TOKEN", "").strip()):
        return token
    path = token_file or Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_TOKEN_FILE).expanduser()
    try:
        info = path.stat()
        token = path.read_text().strip()
    except OSError as error:
        raise TokenError(
            f"read the cluster token from {path}: {error.strerror}. Set RAY_AUTH_TOKEN_PATH to the token file of the "
            "cluster, or RAY_AUTH_TOKEN to the token."
        ) from error
    if not token:
        raise TokenError(
            f"read the cluster token from {path}: the file is empty. Copy the token of the cluster into it."
        )
    if info.st_uid == os.getuid() and info.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(info.st_mode)
        raise TokenError(
            f"read the cluster token from {path}: mode {mode:04o} lets others read it, and whoever has it can run code "
            f"on the cluster. Allowed is 0600: chmod 600 {path}"
        )
    return token


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port`.

    Raises:
        ConnectError: for anything else, `auto` and `ray://` addresses included.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ConnectError(
            f"connect to a Ray cluster: got the address {address!r}, need host:port of its head, such as "
            "127.0.0.1:6379. A ray:// or http:// address is for submitting: rankline submit."
        )
    return host, int(port)


def probe(address: str, token: str, *, timeout_s: float = 15.0) -> set[str]:
    """Ask the head at `address` for its nodes, and return the addresses of those alive.

    Raises:
        ConnectError: when no Ray head answers within `timeout_s`.
        TokenError: when the head refuses the token.
    """
    import grpc  # type: ignore[import-untyped]
    from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

    metadata = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            reply = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(
                gcs_service_pb2.GetAllNodeInfoRequest(), timeout=timeout_s, metadata=metadata
            )
        except grpc.RpcError as error:
            raise _explain(address, timeout_s, error) from error
    alive = gcs_pb2.GcsNodeInfo.ALIVE
    return {node.node_manager_address for node in reply.node_info_list if node.state == alive}


def _explain(address: str, timeout_s: float, error: Any) -> ConnectError | TokenError:
    if error.code().name == "UNAUTHENTICATED":
        return TokenError(
            f"connect to the Ray cluster at {address}: it refuses the token. Set RAY_AUTH_TOKEN_PATH to the token file "
            "of this cluster (an embedded one keeps it in <store>/_ray_token)."
        )
    return ConnectError(
        f"connect to the Ray cluster at {address}: no Ray head answers there within {timeout_s:g} s "
        f"({error.code().name}: {error.details()}). Check the address and that the cluster runs; without an address "
        "an embedded cluster is started."
    )


def _use_token(token: str, token_file: Path | None) -> None:
    """Put the token where this process, Ray's C++ core and child processes read it."""
    os.environ["RAY_AUTH_MODE"] = "token"
    if token_file is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the path
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    core: Any = import_module("ray._raylet")
    core.Config.initialize("")  # both are cached at import, and an earlier session may have used another token
    core.AuthenticationTokenLoader.instance().reset_cache()


def _use_loopback(loopback: bool) -> None:
    """Make Ray take 127.0.0.1 literally exactly when the head does; see `processes._RAY_CLI`."""
    from ray._private import ray_constants

    if loopback:
        os.environ[LOOPBACK_ENV_VAR] = "0"
    else:
        os.environ.pop(LOOPBACK_ENV_VAR, None)
    ray_constants.ENABLE_RAY_CLUSTER = not loopback


def _keep_stdout_clean() -> None:
    """Send the notices that Ray prints to stdout, even with log_to_driver=False, to a logger instead."""
    import ray._private.worker as worker

    def log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        for line in data.get("lines", ()):
            logging.getLogger("cluster.ray").info("%s", line)

    worker.print_to_stdstream = log


def _init(address: str, namespace: str, runtime_env: dict[str, Any] | None, log_to_driver: bool) -> None:
    import ray

    if ray.is_initialized():
        current = ray.get_runtime_context().gcs_address
        if current == address:
            return
        raise ConnectError(
            f"connect to the Ray cluster at {address}: this process is connected to {current}. Call disconnect() first."
        )
    try:
        ray.init(
            address=address,
            namespace=namespace,
            runtime_env=runtime_env,
            log_to_driver=log_to_driver,
            logging_level="ERROR",
        )
    except ray.exceptions.AuthenticationError as error:
        raise TokenError(f"connect to the Ray cluster at {address}: {error.message}.") from error
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise ConnectError(
            f"connect to the Ray cluster at {address}: its head answers, but this process cannot join "
            f"({error}). A driver must run on a node of the cluster; from elsewhere use rankline submit."
        ) from error
