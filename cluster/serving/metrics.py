"""What `/metrics` tells, of one replica: requests and tokens by version, times, and what the engine and the store hold.

Behind several replicas each request for the page is answered by one of them: scrape replicas, or read Ray's own metrics
for what the cluster does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Metric

    from cluster.serving.service import Service

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counts requests as the access log sees them."""

    def __init__(self, service: Service) -> None:
        """Args: service: whose engine and store are told."""
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()
        self._requests = Counter(
            "rankline_requests", "Answered requests.", ["path", "version", "status"], registry=self._registry
        )
        self._tokens = Counter("rankline_tokens", "Tokens.", ["version", "kind"], registry=self._registry)
        self._seconds = Histogram(
            "rankline_request_seconds",
            "From request to last byte.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "rankline_time_to_first_token_seconds", "From request to first token.", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Gauges(service))

    def observe(self, path: str, status: int, seconds: float, facts: Mapping[str, Any]) -> None:
        """One request; `path` is a known one, and `version` stands in `facts` only where there is such a version."""
        version = facts.get("version", "")
        self._requests.labels(path, version, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
        if "prompt_tokens" in facts:
            self._tokens.labels(version, "prompt").inc(facts["prompt_tokens"])
            self._tokens.labels(version, "completion").inc(facts.get("completion_tokens", 0))
        if "first_ms" in facts:
            self._first.observe(facts["first_ms"] / 1000)

    def page(self) -> tuple[bytes, str]:
        """The page and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Gauges:
    """What is there now, asked when the page is."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        running, waiting = self._service.live
        counts = self._service.store.counts()
        gauges: dict[str, tuple[str, float]] = {
            "rankline_requests_running": ("Requests that have a slot.", running),
            "rankline_requests_waiting": ("Requests that wait for a slot.", waiting),
            "rankline_adapters_resident": ("Adapters in memory.", counts.resident),
            "rankline_adapter_bytes": ("Memory of adapters.", counts.resident_bytes),
            "rankline_adapter_limit_bytes": ("Allowed memory of adapters.", counts.limit_bytes),
        }
        counters: dict[str, tuple[str, float]] = {
            "rankline_adapter_hits": ("Requests that found their adapter in memory.", counts.hits),
            "rankline_adapter_misses": ("Requests that had to wait for their adapter.", counts.misses),
            "rankline_adapter_evictions": ("Adapters that made room.", counts.evictions),
            "rankline_adapter_load_seconds": ("Time spent on loading adapters.", counts.load_seconds),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value)
