"""What every test shares: the tolerance table on the path, one thread, no network, and the one Ray of a run."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# before torch, ray and mlflow are imported; the head hands these down to its workers
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# for the S3 of tests, which takes any; yours stay out of it, and nobody asks the network for others
os.environ["AWS_ACCESS_KEY_ID"] = "key-id-of-the-tests"
os.environ["AWS_SECRET_ACCESS_KEY"] = "secret-of-the-tests"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ.pop("AWS_PROFILE", None)
os.environ.pop("AWS_SESSION_TOKEN", None)

import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start the one embedded head of a test run, connect to it, and end it afterwards."""
    from cluster import session

    store = tmp_path_factory.mktemp("ray_store")
    head = session.start_or_adopt(store, num_cpus=6)
    try:
        session.connect(head)
        yield head
    finally:
        session.disconnect()
        session.stop(store)


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """An S3 server on loopback (moto's), which counts what it is asked for."""
    from object_stores import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def gcs() -> Iterator[Any]:
    """A GCS server on loopback, in a process of its own."""
    from object_stores import GcsServer

    with GcsServer() as server:
        yield server
