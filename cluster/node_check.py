"""Every node of a cluster runs this code and shares this store: found out in seconds, not in the middle of a stage."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.connection import nodes
from cluster.errors import ConnectError, StorageError
from cluster.objects import Mirror

#: What must be of one version everywhere; CPU and GPU builds of it may differ.
PACKAGES = ("torch", "transformers", "deepspeed", "bitsandbytes", "safetensors")
_OURS = ("lowrank", "cluster", "pipelines")
_DIRECTORY = "_nodes"
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class NodeFacts:
    """What a node said: versions by package, ours as a hash of its code, and why the store is not its own, or ''."""

    address: str
    versions: dict[str, str]
    store_problem: str


@cache
def versions() -> dict[str, str]:
    """Of the packages here, without their builds' names; `rankline` is the start of a hash of its code."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[package] = "none"
    digest = hashlib.sha256()
    for package in _OURS:
        spec = find_spec(package)
        for root in map(Path, spec.submodule_search_locations or () if spec else ()):
            for path in sorted(root.rglob("*.py")):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found | {"rankline": digest.hexdigest()[:12]}


def check_nodes(store: Path, mirror: Mirror | None = None) -> list[NodeFacts]:
    """Ask every node of the connected cluster, at the same time; returns what they said.

    A file that the driver writes into the store must be read on every node, and what each node writes on the driver;
    of an object store (`store` then is the directory that mirrors it) an object, and the mirror must take a file.

    Raises:
        ConnectError: a node runs other versions, does not share the store, or does not answer; names each and says why.
    """
    notes = Notes(store / _DIRECTORY / secrets.token_hex(8), mirror)
    secret = secrets.token_hex(16)
    try:
        notes.write("driver", secret)
        answers = _answers(notes, secret)
        alive = {node["node_id"] for node in nodes() if node["alive"]}  # one that died meanwhile is nobody's problem
        found = [_facts(node, said, notes, secret) for node, said in answers if node["node_id"] in alive]
    finally:
        notes.remove()
    problems = [problem for facts in found for problem in _problems(facts, store, mirror)]
    if problems:
        raise ConnectError("the cluster's nodes are not alike:\n" + "\n".join(problems))
    return found


@dataclass(frozen=True)
class Notes:
    """Texts that nodes leave each other in the store."""

    directory: Path
    mirror: Mirror | None

    def write(self, name: str, text: str) -> None:
        """Leave a text; of an object store also the mirror must take it, which makes the directory on this node."""
        if self.mirror is None and name != "driver":
            (self.directory / name).write_text(text)  # a directory made here would hide that it is not the store
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / name).write_text(text)
        if self.mirror is not None:
            self.mirror.put(self.directory / name, self.directory / name)
            (self.directory / name).unlink()
            with contextlib.suppress(OSError):  # another node of this machine is at it
                self.directory.rmdir()

    def read(self, name: str) -> str:
        """The text of that name."""
        if self.mirror is not None:
            return self.mirror.get(self.directory / name).decode()
        return (self.directory / name).read_text()

    def remove(self) -> None:
        """All of them, as far as this machine can."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.mirror is not None:
            with contextlib.suppress(StorageError):
                self.mirror.delete_tree(self.directory)


def _answers(notes: Notes, secret: str) -> list[tuple[dict[str, Any], Any]]:
    """Every living node with what it said, or the error in its place."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=1)(_look)
    asked = []
    for node in nodes():
        if node["alive"]:
            here = NodeAffinitySchedulingStrategy(node["node_id"], soft=False)
            asked.append((node, remote.options(scheduling_strategy=here).remote(notes, node["node_id"], secret)))
    ray.wait([ref for _, ref in asked], num_returns=len(asked), timeout=_TIMEOUT_S)
    answers: list[tuple[dict[str, Any], Any]] = []
    for node, ref in asked:
        try:
            answers.append((node, ray.get(ref, timeout=0.1)))
        except Exception as error:  # a worker without our code cannot even say so
            answers.append((node, error))
    return answers


def _look(notes: Notes, name: str, secret: str) -> tuple[dict[str, str], str]:
    """On a node: its versions, and what is wrong with the store there."""
    try:
        if notes.read("driver") != secret:
            return versions(), "another file lies there"
        notes.write(name, secret)
    except OSError as error:
        return versions(), error.strerror or str(error)
    except StorageError as error:
        return versions(), str(error)
    return versions(), ""


def _facts(node: dict[str, Any], answer: Any, notes: Notes, secret: str) -> NodeFacts:
    from cluster.failures import translate

    if isinstance(answer, Exception):
        reason = str(translate(answer, "ask the node")).strip().splitlines()
        return NodeFacts(node["address"], {}, reason[-1] if reason else type(answer).__name__)
    said, problem = answer
    back = ""
    with contextlib.suppress(OSError, StorageError):
        back = notes.read(node["node_id"])
    if not problem and back != secret:
        problem = "what it writes is not seen here"
    return NodeFacts(node["address"], said, problem)


def _problems(facts: NodeFacts, store: Path, mirror: Mirror | None) -> list[str]:
    if not facts.versions:
        return [f"{facts.address}: it cannot run our code ({facts.store_problem}). Install the driver's version there."]
    ours = versions()
    other = [f"{name} {facts.versions.get(name, 'none')} (here {own})" for name, own in ours.items()
             if facts.versions.get(name) != own]  # fmt: skip
    problems = []
    if other:
        problems.append(f"{facts.address}: it has {', '.join(other)}. Install the same versions on every node.")
    if facts.store_problem and mirror is not None:
        problems.append(
            f"{facts.address}: it cannot use the store {mirror.url(mirror.root)} ({facts.store_problem}). Set its "
            f"credentials in that node's environment, and store.cache (now {store}) to a directory it may write to."
        )
    elif facts.store_problem:
        problems.append(
            f"{facts.address}: it does not share the store {store} ({facts.store_problem}). Set store.path to a "
            "directory that every node mounts under the same path, and may write to."
        )
    return problems
