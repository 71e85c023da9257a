"""Start, find and end the operating-system processes of an embedded Ray head.

Ray's own `ray stop` ends every Ray on the machine, so we keep our own books. Three facts decide how [ran, 2.60]:
- every process stays in the POSIX session of its `ray start`, but job drivers open sessions of their own;
- an environment marker reaches all of them, but is wiped from /proc where Ray rewrites the process title;
- `gcs_server` does not end on SIGTERM.
A process therefore belongs to a head when it carries the marker, sits in a recorded session that still has a marked
member, or descends from one of these.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import PortError

if TYPE_CHECKING:
    import psutil

MARKER_ENV_VAR = "RANKLINE_HEAD"
LOOPBACK_ENV_VAR = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
LOOPBACK = "127.0.0.1"

# Given 127.0.0.1, Ray looks up the machine's public address and listens on all interfaces; the variable above, meant
# for the firewalls of other systems, makes it keep to loopback, but also refuses a second node. This accepts one.
_RAY_CLI = (
    "from ray._private import ray_constants, services\n"
    "services.get_node_ip_address = lambda address=None: '127.0.0.1'\n"
    "ray_constants.ENABLE_RAY_CLUSTER = True\n"
    "from ray.scripts.scripts import main\n"
    "main()\n"
)


def head_environment(marker: str, token_file: Path, temp_dir: Path) -> dict[str, str]:
    """Return the environment that a head hands down to all of its workers."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR")}
    binaries = str(Path(sys.executable).parent)
    return environment | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        LOOPBACK_ENV_VAR: "0",
        MARKER_ENV_VAR: marker,
        "TMPDIR": str(temp_dir),  # what workers leave there goes with the head
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TOKENIZERS_PARALLELISM": "false",
        # a job's entrypoint, such as `rankline run`, must find the same installation
        "PATH": os.pathsep.join([binaries, environment.get("PATH", os.defpath)]),
    }


def ray_start(arguments: Sequence[str], *, environment: dict[str, str], cwd: Path, timeout_s: float) -> tuple[int, str]:
    """Run `ray start ...` in a new session and return the session's id and, if it failed, the end of its log.

    The new session keeps a Ctrl-C in the driver's terminal away from the cluster.
    """
    log = cwd / "start.log"
    command = [sys.executable, "-c", _RAY_CLI, "start", "--disable-usage-stats", *arguments]
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        failed = process.wait(timeout=timeout_s) != 0
    except subprocess.TimeoutExpired:
        failed = True
    return process.pid, log.read_text(errors="replace")[-2000:] or "no output" if failed else ""


def belonging(marker: str, sids: Iterable[int]) -> list["psutil.Process"]:
    """Return the live processes of the head with this marker, never the caller itself."""
    import psutil

    table: list[tuple[psutil.Process, int, bool]] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                sid = os.getsid(process.pid)
                table.append((process, sid, process.environ().get(MARKER_ENV_VAR) == marker))
        except (psutil.Error, OSError):
            continue
    # a session number can be used again after a reboot: trust it only while a marked process is in it
    trusted = {sid for _, sid, marked in table if marked} & set(sids)
    found = {p.pid: p for p, sid, marked in table if marked or sid in trusted}
    for process in list(found.values()):
        try:
            found |= {child.pid: child for child in process.children(recursive=True)}
        except psutil.Error:
            continue
    found.pop(os.getpid(), None)
    return list(found.values())


def end(marker: str, sids: Iterable[int], grace_s: float = 5.0) -> bool:
    """End every process of a head: SIGTERM, `grace_s` to comply, then SIGKILL; return True when all are gone."""
    sids = list(sids)
    polite = [p for p in belonging(marker, sids) if _name(p) != "gcs_server"]
    _signal(polite, signal.SIGTERM)
    wait_gone(polite, grace_s)
    for _ in range(5):
        rest = belonging(marker, sids) + [p for p in polite if _alive(p)]
        if not rest:
            return True
        _signal(rest, signal.SIGKILL)
        wait_gone(rest, 2.0)
    return not belonging(marker, sids)


def wait_gone(processes: Sequence["psutil.Process"], timeout_s: float) -> None:
    """Wait until all `processes` have ended; a zombie counts as ended."""
    deadline = time.monotonic() + timeout_s
    while any(_alive(p) for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def is_alive(pid: int, born: float) -> bool:
    """Tell whether `pid` is still the process that was created at `born` seconds since the epoch."""
    import psutil

    try:
        process = psutil.Process(pid)
        # derived from the clock at boot, the time shifts a little when the clock is set
        return abs(process.create_time() - born) < 2.0 and _alive(process)
    except psutil.Error:
        return False


def identify(processes: Sequence["psutil.Process"], names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Return `{name: (pid, creation time)}` for the first process of each name."""
    return {_name(p): (p.pid, p.create_time()) for p in reversed(processes) if _name(p) in names}


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """Return a port on loopback for each name, all different and free a moment ago."""
    sockets = [socket.socket() for _ in names]
    try:
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets)}
    finally:
        for each in sockets:
            each.close()


def require_free(port: int, setting: str) -> None:
    """Raise PortError when `port` on loopback is out of range or in use."""
    if not 1 <= port <= 65535:
        raise PortError(f"start the cluster: {setting}={port}, allowed are 1 to 65535. Leave it out to get a free one.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise PortError(
                f"start the cluster: {setting}={port} is in use on {LOOPBACK} ({error.strerror}). "
                "Choose another port, or leave it out to get a free one."
            ) from error


def _alive(process: "psutil.Process") -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _name(process: "psutil.Process") -> str:
    import psutil

    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _signal(processes: Sequence["psutil.Process"], number: int) -> None:
    import psutil

    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue
