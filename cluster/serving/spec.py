"""What an endpoint serves and where it answers; small frozen values that pickle."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.model import ModelSource


@dataclass(frozen=True)
class ServeSpec:
    """Everything a replica needs to build itself.

    Attributes:
        app_name: Name of the Serve application.
        source: Where the base model's parts lie.
        base_model_id: Model id of the base: the quantized base before training (adapter `init`) over `nf4`, the
            checkpoint itself over `dense`.
        adapters: Model id -> PEFT adapter directory, readable on every node.
        token_file: *Path* of the bearer token. The token itself never enters Serve's configuration, a pickle or a
            log: each replica reads the file when it starts, so on several nodes it lies on shared storage.
    """

    app_name: str
    source: ModelSource
    base_model_id: str
    adapters: dict[str, str] = field(default_factory=dict)
    token_file: str = ""


@dataclass(frozen=True)
class Endpoint:
    """A deployed endpoint; `url` has no trailing slash."""

    app_name: str
    route_prefix: str
    url: str
    num_replicas: int
    model_ids: tuple[str, ...]
