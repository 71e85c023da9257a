"""An S3 and a GCS server for tests, and the parts of a pipeline that a run in an object store needs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "rankline"


@dataclass(frozen=True)
class Request:
    """One request as the server saw it, and the bytes of its answer's body."""

    method: str
    path: str
    range: str
    num_bytes: int


class S3Server:
    """moto's S3 on a port of loopback, in threads of this process; it can go away and come back with what it holds."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.port = 0

    def __enter__(self) -> S3Server:
        import boto3

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.start()
        endpoint = f"http://127.0.0.1:{self.port}"
        self.client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Answer, on the port of before."""
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        app = self._counting(DomainDispatcherApplication(create_backend_app))
        self._server = make_server("127.0.0.1", self.port, app, threaded=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _counting(self, app: Any) -> Any:
        def counted(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            body = b"".join(app(environ, start_response))
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            self.requests.append(Request(method, path, environ.get("HTTP_RANGE", ""), len(body)))
            return [body]

        return counted

    def uri(self, prefix: str | None = None) -> str:
        """A store of its own in the bucket."""
        prefix = prefix or f"stores/{uuid.uuid4().hex[:12]}"
        return f"s3://{BUCKET}/{prefix}?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{self.port}"

    def keys(self, uri: str, under: str = "") -> list[str]:
        """Names of a store's objects, below its prefix."""
        prefix = uri.partition("?")[0].removeprefix(f"s3://{BUCKET}/") + "/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix + under)
        found = (item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", []))
        return [name for name in found if name and not name.endswith("/")]

    def change(self, uri: str, name: str) -> str:
        """Flip a bit in the middle of an object; its whole URL."""
        key = uri.partition("?")[0].removeprefix(f"s3://{BUCKET}/") + "/" + name
        data = bytearray(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        data[len(data) // 2] ^= 1
        self.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
        return f"s3://{BUCKET}/{key}"

    def got(self, since: int) -> Iterator[Request]:
        """What was read since so many requests."""
        return (request for request in self.requests[since:] if request.method == "GET")


class GcsServer:
    """The server of `gcs_server.py`, in a process of its own; what it holds goes with it."""

    def __init__(self) -> None:
        self.requests: list[dict[str, str]] = []
        self.port = 0

    def __enter__(self) -> GcsServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Answer, on the port of before, with an empty bucket."""
        command = [sys.executable, str(Path(__file__).with_name("gcs_server.py")), str(self.port), BUCKET]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._process.kill()
        self._process.wait()
        self._thread.join()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        self.requests.extend(json.loads(line) for line in self._process.stdout)

    def uri(self, prefix: str | None = None, bucket: str = BUCKET) -> str:
        """A store of its own in the bucket."""
        prefix = prefix or f"stores/{uuid.uuid4().hex[:12]}"
        return f"gs://anonymous@{bucket}/{prefix}?scheme=http&endpoint_override=127.0.0.1:{self.port}"


def settings(uri: str, root: Path) -> dict[str, dict[str, Any]]:
    """Sections of a pipeline whose store is an object store; MLflow's database and files lie below `root`."""
    from mlflow import MlflowClient

    root.mkdir(parents=True, exist_ok=True)
    tracking = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=tracking, registry_uri=tracking)
    if client.get_experiment_by_name("rankline") is None:
        client.create_experiment("rankline", (root / "mlflow-artifacts").as_uri())
    return {"store": {"path": uri, "cache": str(root / "cache")}, "register": {"tracking_uri": tracking}}
