"""Whoever watches a cluster is told once that it is gone, and only then."""

from __future__ import annotations

import socket
import threading
import time

from cluster.watch import watched


def listening(port: int = 0) -> socket.socket:
    made = socket.create_server(("127.0.0.1", port))
    made.listen(64)
    return made


def test_it_tells_once_and_only_when_patience_is_over() -> None:
    server, told = listening(), threading.Event()
    count: list[float] = []
    port = server.getsockname()[1]

    def lost() -> None:
        count.append(time.monotonic())
        told.set()

    with watched(f"127.0.0.1:{port}", 2.5, lost):
        assert not told.wait(2.0)
        server.close()
        assert not told.wait(1.0)
        server = listening(port)  # back in time, as a head that is started anew
        assert not told.wait(3.0)
        began = time.monotonic()
        server.close()
        assert told.wait(10)
        assert count[0] - began > 1.5
        time.sleep(1.5)
    assert len(count) == 1


def test_it_ends_with_its_block() -> None:
    told: list[int] = []
    with watched("127.0.0.1:1", 0.5, lambda: told.append(1)):
        pass
    time.sleep(2.5)
    assert told == []
