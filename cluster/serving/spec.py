"""What an endpoint serves and where it answers; small frozen values that pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.model import ModelSource
from cluster.serving.sources import AdapterSource, FixedSource


@dataclass(frozen=True)
class ServeSpec:
    """Everything a replica needs to build itself.

    Attributes:
        app_name: Name of the Serve application.
        source: Where the base model's parts lie.
        base_model_id: Model id of the base: the quantized base before training (adapter `init`) over `nf4`, the
            checkpoint itself over `dense`.
        adapters: Where adapters come from; pickled into every replica.
        required: Model ids without which a replica does not start; the others are loaded when they are asked for.
        token_file: *Path* of the bearer token. The token itself never enters Serve's configuration, a pickle or a
            log: each replica reads the file when it starts, so on several nodes it lies on shared storage.
        scratch_dir: where an engine that needs the base in another form writes it; a temporary one when empty.
    """

    app_name: str
    source: ModelSource
    base_model_id: str
    adapters: AdapterSource = field(default_factory=lambda: FixedSource({}))
    required: tuple[str, ...] = ()
    token_file: str = ""
    scratch_dir: str = ""


@dataclass(frozen=True)
class Endpoint:
    """A deployed endpoint; `url` has no trailing slash."""

    app_name: str
    route_prefix: str
    url: str
    num_replicas: int
    model_ids: tuple[str, ...]


def base_identity(base_facts: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two bases the same for adapters, as `/v1/models` tells it."""
    return {name: base_facts.get(name) for name in ("name", "base", "base_sha256", "split_key")}
