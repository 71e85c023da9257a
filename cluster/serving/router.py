"""Which replica a request goes to: the one that others for its adapter go to. Ray Serve's proxy imports this by name.

The proxy does not see a request's body, so the adapter is what the header `serve-multiplexed-model-id` says, which
OpenAI's clients send as `extra_headers`; it decides nothing but the replica. Without it any replica may answer.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

#: How many times its equal share of the requests a replica may have before others take what is its own.
_SHARE = 1.25


def preferred(model: str, loads: Mapping[str, int]) -> list[str]:
    """Replicas in the order in which a request for `model` asks them.

    By rendezvous hashing each adapter has an order of its own, which a replica that comes or goes leaves in place for
    the others; replicas with more than their share of requests come last, the least loaded first.

    Args:
        model: id of an adapter, percent-encoded or not; its aliases and versions go with it.
        loads: replica -> requests there.

    Source: Thaler and Ravishankar 1998 (rendezvous hashing); Mirrokni et al., arXiv 1608.01350 (bounded loads).
    """
    name = re.split("[:@]", unquote(model), maxsplit=1)[0]
    most = math.ceil(_SHARE * (sum(loads.values()) + 1) / len(loads))

    def place(replica: str) -> tuple[int, bytes]:
        over = loads[replica] if loads[replica] >= most else 0
        return over, hashlib.sha256(f"{name}\0{replica}".encode()).digest()

    return sorted(loads, key=place)


class AdapterRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Requests for one adapter go to one replica while that is not overloaded; others to the less busy of two."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> Sequence[list[RunningReplica]]:
        """Groups of replicas to ask, one group after the other; Serve takes the least busy of a group."""
        model = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        if not model or not candidate_replicas:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        cache = self.replica_queue_len_cache
        loads = {name: cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        return [[replicas[name]] for name in preferred(model, loads)]
