"""`rankline doctor`: what this machine and this store are, and what to do about what is wrong."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.objects import Mirror
    from pipelines.artifacts import Store

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "bitsandbytes", "mlflow", "pyarrow", "safetensors")
Check = dict[str, str]


def _check(name: str, state: str, finding: str, remedy: str = "") -> Check:
    return {"name": name, "state": state, "finding": finding, "remedy": remedy}


def examine(store: Store, address: str | None = None) -> list[Check]:
    """Run every check; one that fails in an unforeseen way becomes a finding of its own.

    Args:
        store: the store.
        address: `host:port` of a cluster of the user's own, whose nodes are asked too.
    """
    checks: list[Callable[[Path], Iterator[Check]]] = [
        _packages, _device, _processor, _memory, _disk, _cluster, _ports, _tokens, _tracking,
    ]  # fmt: skip
    if store.mirror is not None:
        checks.append(partial(_object_store, store.mirror))
    if address is not None:
        checks.append(partial(_nodes, address, store.mirror))
    found: list[Check] = []
    for check in checks:
        try:
            found += check(store.root)
        except Exception as error:  # a broken installation must not hide the other findings
            found.append(
                _check(
                    getattr(check, "__name__", "nodes").strip("_"),
                    "fail",
                    f"{type(error).__name__}: {error}",
                    "See --debug.",
                )
            )
    return found


def _packages(_store: Path) -> Iterator[Check]:
    python = sys.version.split()[0]
    good = sys.version_info[:2] == (3, 11)
    yield _check("python", "ok" if good else "fail", python, "" if good else "Use Python 3.11.")
    for package in PACKAGES:
        try:
            yield _check(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            yield _check(package, "fail", "not installed", "Run: make setup")


def _device(_store: Path) -> Iterator[Check]:
    cuda = _torch_cuda()
    if cuda is None:  # no GPU can be used, so torch itself (seconds to import) is not asked
        yield _check("torch build", "ok", "CPU build")
        yield _check("gpu", "ok", f"none; compute in float32 on {os.cpu_count()} cores")
        return
    import torch

    from cluster.model import compute_dtype

    yield _check("torch build", "ok", f"GPU build ({cuda})")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        yield _check("gpu", "ok", f"{torch.cuda.device_count()} x {name}; compute in {compute_dtype('auto', 'cuda')}")
    else:
        remedy = "Check the driver with nvidia-smi, or install the CPU build (README, Install)."
        yield _check("gpu", "warn", "GPU build of torch, but no GPU is visible", remedy)


def _torch_cuda() -> str | None:
    """The CUDA (or ROCm) version that torch was built for, from its one generated file; None is a CPU build."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torch is not installed")
    names = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return names.get("cuda") or names.get("hip")


def _processor(_store: Path) -> Iterator[Check]:
    """What decides the speed on a CPU: vector instructions, and a compiler for our own kernels."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.is_file() else set()
    vectors = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), None)
    slow = "" if vectors else "Products are slow here; use a machine with AVX2 or a GPU."
    yield _check(
        "cpu", "ok" if vectors else "warn", f"{os.cpu_count()} cores, {vectors or 'no vector instructions'}", slow
    )
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    remedy = "" if compiler else "Install gcc: NF4, ratings and mixed adapters run on slower torch code without."
    yield _check("compiler", "ok" if compiler else "warn", compiler or "none for the compiled kernels", remedy)


def _ports(store: Path) -> Iterator[Check]:
    """The ports that `run` and `ui` take unless told otherwise."""
    from cluster import session
    from cluster.errors import PortError
    from cluster.processes import require_free

    endpoint = store.is_dir() and session.status(store) is not None
    for port, setting, user in ((8000, "serve.port", "the endpoint"), (5000, "rankline ui --port", "MLflow's page")):
        try:
            require_free(port, setting)
            yield _check("port", "ok", f"127.0.0.1:{port} is free for {user}")
        except PortError:
            if endpoint and setting == "serve.port":
                yield _check("port", "ok", f"127.0.0.1:{port} is in use, and this store's cluster is up")
                continue
            remedy = f"Set {setting}, or end the program that has it."
            yield _check("port", "warn", f"127.0.0.1:{port} is in use; {user} would take it", remedy)


def _memory(_store: Path) -> Iterator[Check]:
    import psutil

    free = psutil.virtual_memory().available
    enough = free > 4 * 2**30
    remedy = "" if enough else "Close programs; the demo needs about 4 GiB."
    yield _check("memory", "ok" if enough else "warn", f"{free / 2**30:.1f} GiB available", remedy)


def _disk(store: Path) -> Iterator[Check]:
    existing = store
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    enough = free > 2 * 2**30
    remedy = "" if enough else "Free some, or use another --store."
    yield _check("disk", "ok" if enough else "warn", f"{free / 2**30:.1f} GiB free at {existing}", remedy)
    probe = existing / f".rankline-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
        yield _check("store", "ok", f"{store} can be written")
    except OSError as error:
        yield _check("store", "fail", f"{store}: {error.strerror}", "Give a directory you may write to with --store.")


def _cluster(store: Path) -> Iterator[Check]:
    from cluster import session

    head = session.status(store) if store.is_dir() else None
    if head is None:
        yield _check("cluster", "ok", "no embedded cluster is running; `run` starts one")
    else:
        yield _check("cluster", "ok", f"{head.address}, {head.num_cpus} logical CPUs, dashboard {head.dashboard_url}")


def _object_store(mirror: Mirror, store: Path) -> Iterator[Check]:
    """Whether the object store takes, lists and gives a marker from here."""
    from cluster.errors import StorageError

    try:
        mirror.probe()
        yield _check("object store", "ok", f"{mirror.url(mirror.root)} can be written and read; mirrored in {store}")
    except StorageError as error:
        yield _check("object store", "fail", str(error), "See the message; `rankline run` refuses this store.")


def _nodes(address: str, mirror: Mirror | None, store: Path) -> Iterator[Check]:
    """Whether each node of a cluster has our versions and shares the store."""
    from cluster.connection import connect, disconnect
    from cluster.errors import ClusterError
    from cluster.node_check import check_nodes

    try:
        connect(address)
        for node in check_nodes(store.resolve(), mirror):
            yield _check("node", "ok", f"{node.address} of {address}: our versions, and shares {store}")
    except ClusterError as error:
        for line in str(error).splitlines():
            yield _check("cluster", "fail", line, "See the message; `rankline run` refuses this cluster.")
    finally:
        disconnect()


def _tokens(store: Path) -> Iterator[Check]:
    files = [store / "_ray_token", store / "_serve_token", Path("~/.ray/auth_token").expanduser()]
    for path in files:
        if path.is_file():
            mode = stat.S_IMODE(path.stat().st_mode)
            closed = mode & 0o077 == 0
            remedy = "" if closed else f"Run: chmod 600 {path}"
            yield _check("token file", "ok" if closed else "warn", f"{path} has mode {mode:04o}", remedy)


def _tracking(store: Path) -> Iterator[Check]:
    from pipelines.tracking import default_uri

    path = store / "_mlflow" / "mlflow.db"
    if not path.is_file():
        yield _check("mlflow", "ok", "no tracking database yet; `run` makes one")
        return
    import sqlite3

    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2.0) as database:
            (runs,) = database.execute("select count(*) from runs").fetchone()
            (schema,) = database.execute("select version_num from alembic_version").fetchone()
        if schema != _mlflow_schema():
            remedy = f"Back it up and run: mlflow db upgrade {default_uri(store)}"
            yield _check("mlflow", "fail", f"{path} is of another version of MLflow (schema {schema})", remedy)
            return
        yield _check("mlflow", "ok", f"{default_uri(store)} with {runs} runs")
    except sqlite3.Error as error:
        yield _check("mlflow", "fail", f"{path}: {error}", "End the program that holds it, or restore the file.")


def _mlflow_schema() -> str:
    """The schema that the installed MLflow works with: the one revision that no other builds upon."""
    spec = find_spec("mlflow")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    texts = [path.read_text() for root in roots for path in Path(root, "store/db_migrations/versions").glob("*.py")]
    of = {name: re.compile(rf"""^{name} = ["'](\w+)["']""", re.MULTILINE) for name in ("revision", "down_revision")}
    built_upon = {found[1] for text in texts if (found := of["down_revision"].search(text))}
    return next(found[1] for text in texts if (found := of["revision"].search(text)) and found[1] not in built_upon)
