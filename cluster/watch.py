"""Notice that a cluster is gone while this process can still say so.

Ray's core ends a driver whose head does not answer for a minute: from C++, with its own log lines and exit code 1.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from cluster.connection import split_address

#: Below RAY_gcs_rpc_server_reconnect_timeout_s (60): a head on Kubernetes may be started anew in between.
PATIENCE_S = 45.0
#: An embedded head is a process of this machine: where nobody listens any more, it has died.
EMBEDDED_PATIENCE_S = 3.0
_PERIOD_S = 1.0


@contextlib.contextmanager
def watched(address: str, patience_s: float, lost: Callable[[], None]) -> Iterator[None]:
    """Call `lost` once, in another thread, when nobody has answered at `host:port` for so long, asked every second."""
    ended = threading.Event()

    def look() -> None:
        failed = 0  # probes in a row: a process that stood still has not been refused meanwhile
        while not ended.wait(_PERIOD_S):
            failed = 0 if answers(address) else failed + 1
            if failed * _PERIOD_S > patience_s:
                lost()
                return

    threading.Thread(target=look, name="rankline-watch", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def head_answers() -> bool:
    """Whether the head of the connected cluster does: of one that does not, Ray asks for a minute, deaf to signals."""
    import ray

    return answers(ray.get_runtime_context().gcs_address)


def answers(address: str) -> bool:
    """Whether somebody listens at `host:port`."""
    with contextlib.suppress(OSError), socket.create_connection(split_address(address), timeout=_PERIOD_S):
        return True
    return False
