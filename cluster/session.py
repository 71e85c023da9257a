"""The embedded cluster of a store: start one detached Ray head, find it again, end it.

Without a cluster of the user's own, the pipeline starts a head on loopback that outlives its driver: an endpoint
stays up after the command that deployed it, and a killed driver finds its cluster again. Ctrl-C does not reach it.

    start_or_adopt(store) ─→ Head ─connect→ tasks, Train, Serve ... ─disconnect→ ...   stop(store)

Everything is guarded by a token of the store's own (`<store>/_ray_token`, 0600): the Jobs API without one is remote
code execution by design. Further machines join a cluster of the user's own (`ray start`, RAY_AUTH_MODE=token); an
embedded one takes more nodes on this machine only (`add_node`), which is what fault tests need.
"""

import json
import os
import secrets
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cluster import processes
from cluster.connection import connect, disconnect, load_token, nodes, probe
from cluster.durable import write_atomic
from cluster.errors import ClusterError, ConnectError
from cluster.head import RECORD_NAME, TOKEN_NAME, Head, read_record, store_lock, write_record

__all__ = ["Head", "add_node", "connect", "default_num_cpus", "disconnect", "nodes", "start_or_adopt", "status", "stop"]

START_TIMEOUT_S = 120.0
_PORTS = ("gcs", "dashboard", "client", "agent", "agent_grpc", "runtime_env_agent")
_FLAGS = {
    "dashboard": "--dashboard-port",
    "client": "--ray-client-server-port",
    "agent": "--dashboard-agent-listen-port",
    "agent_grpc": "--dashboard-agent-grpc-port",
    "runtime_env_agent": "--runtime-env-agent-port",
}


def default_num_cpus() -> int:
    """Return the logical CPUs that an embedded head declares: twice the cores, at least four.

    Two Train workers on a two-CPU cluster starve Ray Data for ever, and Serve needs room beside both.
    """
    return max(4, 2 * (os.cpu_count() or 1))


def start_or_adopt(
    store_dir: Path,
    *,
    num_cpus: int | None = None,
    port: int | None = None,
    dashboard_port: int | None = None,
    client_port: int | None = None,
    token_path: Path | None = None,
) -> Head:
    """Return the running head of `store_dir`, starting one where there is none.

    Safe under concurrent callers: one starts, the others adopt. A dead head is cleared away first.

    Args:
        store_dir: the store; created when missing. Holds the record, the token and the lock.
        num_cpus: logical CPUs to declare; None takes `default_num_cpus()`. A running head keeps its own.
        port: GCS port on loopback; None takes a free one, as for the next two.
        dashboard_port: port of the dashboard and the Jobs API.
        client_port: port of Ray Client, which we do not use but cannot turn off.
        token_path: token file to use; None keeps one in the store. Created with mode 0600 when missing.

    Raises:
        PortError: when a port that was asked for is in use.
        TokenError: when the token file is empty or readable by others.
        ConnectError: when the head does not come up; the message ends with Ray's own log.
    """
    store_dir = store_dir.resolve()
    with store_lock(store_dir):
        recorded = read_record(store_dir)
        if recorded is not None and recorded.host != socket.gethostname():
            recorded = None  # most often a container that is gone; its record says nothing about this machine
        if recorded is not None and _is_live(recorded):
            return recorded
        _clear(store_dir, recorded)
        asked = {"gcs": port, "dashboard": dashboard_port, "client": client_port}
        fixed = {name: number for name, number in asked.items() if number is not None}
        for name, number in fixed.items():
            processes.require_free(number, f"{name} port")
        token_file = _ensure_token((token_path or store_dir / TOKEN_NAME).resolve())
        cpus = num_cpus or default_num_cpus()
        try:
            return _start(store_dir, cpus, fixed, token_file)
        except ConnectError:  # another program may have taken a free port in between: once more, with others
            return _start(store_dir, cpus, fixed, token_file)


def status(store_dir: Path) -> Head | None:
    """Return the head of `store_dir` if it runs and answers, else None; changes nothing.

    Raises:
        ConnectError: when the head was started on another machine.
    """
    head = read_record(store_dir.resolve())
    return head if head is not None and _is_live(head) else None


def stop(store_dir: Path) -> bool:
    """End the head of `store_dir` with all its workers, jobs and endpoints; return whether there was one.

    Raises:
        ConnectError: when the head runs on another machine, or processes survive SIGKILL.
    """
    store_dir = store_dir.resolve()
    with store_lock(store_dir):
        head = read_record(store_dir)
        _clear(store_dir, head)
        return head is not None


def add_node(store_dir: Path, *, num_cpus: int, resources: Mapping[str, float] | None = None) -> int:
    """Start one more node of the store's cluster on this machine, and return the session id of its processes.

    `resources` are those of Ray's that it has beside CPUs.

    Raises:
        ConnectError: when no head runs, or the node does not come up.
    """
    store_dir = store_dir.resolve()
    with store_lock(store_dir):
        head = status(store_dir)
        if head is None:
            raise ConnectError(f"add a node to the cluster of {store_dir}: no head runs. Start one first.")
        ports = processes.free_ports(("agent", "agent_grpc", "runtime_env_agent"))
        arguments = ["--address", head.address, "--num-cpus", str(num_cpus), "--temp-dir", head.temp_dir + "/node"]
        arguments += ["--resources", json.dumps(dict(resources or {}))]
        sid, log = _launch(head, [*arguments, *_port_flags(ports)])
        write_record(store_dir, replace(head, sids=(*head.sids, sid)))
        if log:
            raise ConnectError(f"add a node to the cluster at {head.address}: ray start failed:\n{log}")
        return sid


def _start(store_dir: Path, num_cpus: int, fixed: dict[str, int], token_file: Path) -> Head:
    """Start a head; on failure leave nothing of it behind."""
    ports = processes.free_ports(_PORTS) | fixed
    head = Head(
        address=f"{processes.LOOPBACK}:{ports['gcs']}",
        dashboard_url=f"http://{processes.LOOPBACK}:{ports['dashboard']}",
        token_file=str(token_file),
        temp_dir=tempfile.mkdtemp(prefix="rk-", dir=_short_temp_root()),
        marker=uuid.uuid4().hex,
        host=socket.gethostname(),
        num_cpus=num_cpus,
        started_at=time.time(),
        ports=ports,
        pids={},
        state="starting",
    )
    write_record(store_dir, head)
    try:
        head = _launch_head(head)
        write_record(store_dir, head)
    except BaseException:
        _clear(store_dir, head)
        raise
    return head


def _launch_head(head: Head) -> Head:
    arguments = [
        "--head", "--no-monitor", "--port", str(head.ports["gcs"]), "--dashboard-host", processes.LOOPBACK,
        "--num-cpus", str(head.num_cpus), "--temp-dir", head.temp_dir + "/ray",
    ]  # fmt: skip
    sid, log = _launch(head, [*arguments, *_port_flags(head.ports)])
    found = processes.identify(processes.belonging(head.marker, [sid]), ("gcs_server", "raylet"))
    if log or len(found) < 2:
        raise ConnectError(
            f"start a Ray head at {head.address} with {head.num_cpus} CPUs: it did not come up within "
            f"{START_TIMEOUT_S:.0f} s. Free memory or disk in {head.temp_dir}, then run again. Ray said:\n{log}"
        )
    probe(head.address, load_token(Path(head.token_file)))
    return replace(head, pids=found, sids=(sid,), state="running")


def _launch(head: Head, arguments: list[str]) -> tuple[int, str]:
    return processes.ray_start(
        ["--node-ip-address", processes.LOOPBACK, *arguments],
        environment=processes.head_environment(head.marker, Path(head.token_file), Path(head.temp_dir)),
        cwd=Path(head.temp_dir),
        timeout_s=START_TIMEOUT_S,
    )


def _port_flags(ports: dict[str, int]) -> list[str]:
    return [part for name, flag in _FLAGS.items() if name in ports for part in (flag, str(ports[name]))]


def _short_temp_root() -> str:
    """Return a directory short enough for the 107 bytes of a Unix socket's path below Ray's session directory."""
    root = tempfile.gettempdir()
    return root if len(root) <= 20 else "/tmp"


def _ensure_token(path: Path) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, secrets.token_hex(32).encode(), mode=0o600)
    load_token(path)
    return path


def _is_live(head: Head) -> bool:
    """Tell whether the head's processes are the recorded ones, and its GCS accepts our token."""
    _require_here(head)
    if head.state != "running" or not all(processes.is_alive(pid, born) for pid, born in head.pids.values()):
        return False
    try:
        return bool(probe(head.address, load_token(Path(head.token_file)), timeout_s=5.0))
    except ClusterError:
        return False


def _clear(store_dir: Path, head: Head | None) -> None:
    """End what is left of `head`, then remove its temporary directory and its record."""
    if head is not None:
        _require_here(head)
        if not processes.end(head.marker, head.sids):
            raise ConnectError(
                f"stop the cluster at {head.address}: processes survive SIGKILL. See `ps -s {head.sids}`, end them "
                "as their owner, and run again."
            )
        shutil.rmtree(head.temp_dir, ignore_errors=True)
    (store_dir / RECORD_NAME).unlink(missing_ok=True)


def _require_here(head: Head) -> None:
    """Refuse to touch a head whose process ids mean nothing here."""
    if head.host != socket.gethostname():
        raise ConnectError(
            f"use the cluster at {head.address}: it was started on the machine {head.host!r}, and this is "
            f"{socket.gethostname()!r}. Run there, or remove {RECORD_NAME} from the store if that machine is gone."
        )
