"""A GCS server for tests, in a process of its own: pyarrow's client keeps the GIL while it waits for some answers.

`gcp-storage-emulator` holds the objects. Where it is milder than GCS, or slower than tests can wait, this is added:

- a request for a generation that is not the object's newest is answered by 404, as in a bucket without versions;
- errors say what GCS says, and a bucket called `refused` is one that nobody may use;
- objects lie in memory alone: the emulator would write its whole list to disk with each of them;
- a thread per connection, one request at a time, each printed as a line of JSON.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus, server
from typing import Any

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

REFUSED = "refused"
_lock = threading.Lock()


class _Memory(Storage):
    def __init__(self) -> None:
        super().__init__(use_memory_fs=True)

    def _write_config_to_file(self) -> None:
        pass


def _refuse(response: Any, status: HTTPStatus, message: str) -> None:
    response.status = status
    response.json({"error": {"code": status.value, "message": message}})


def _as_gcs(handler: Callable[..., Any]) -> Callable[..., Any]:
    def handle(request: Any, response: Any, storage: Any) -> None:
        bucket, name = request.params.get("bucket_name"), request.params.get("object_id")
        _ = request.data  # read, whatever the answer: a connection that is closed on unread bytes is reset
        if bucket == REFUSED:
            what = "tests@example.org does not have storage.objects.list access to the Google Cloud Storage bucket."
            _refuse(response, HTTPStatus.FORBIDDEN, what)
            return
        if bucket and storage.get_bucket(bucket) is None:
            _refuse(response, HTTPStatus.NOT_FOUND, "The specified bucket does not exist.")
            return
        wanted = request.query.get("generation")
        with _lock:
            if wanted and name and wanted != [_generation(storage, bucket, name)]:
                _refuse(response, HTTPStatus.NOT_FOUND, f"No such object: {bucket}/{name}")
                return
            handler(request, response, storage)

    return handle


def _generation(storage: Any, bucket: str, name: str) -> str | None:
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return None


class _Handler(emulator.RequestHandler):
    def log_message(self, *_: object) -> None:
        line = {"method": self.command, "path": self.path, "range": self.headers.get("Range", "")}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


class _Server(server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass  # a client that hangs up


def main(port: int, bucket: str) -> None:
    """Serve one empty bucket on a port of loopback (0: any), which is printed first, until killed."""
    logging.disable(logging.CRITICAL)
    emulator.HANDLERS = tuple(
        (path, {method: _as_gcs(handler) for method, handler in methods.items()}) for path, methods in emulator.HANDLERS
    )
    storage = _Memory()
    buckets.create_bucket(bucket, storage)
    with _Server(("127.0.0.1", port), functools.partial(_Handler, storage)) as served:
        print(served.server_port, flush=True)
        served.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
