"""The endpoint over HTTP against the engine alone and against static batching: SmolLM2-135M, 16 adapters, one replica.

The endpoint is deployed on an embedded Ray cluster of this machine, with the system's own allocator. Clients,
proxy and replica share the cores; the endpoint is idle in the peer's turn.
"""

from __future__ import annotations

import json
import os
import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import ALLOCATOR, THREADS, Row, row
from jobs_serving import ADAPTERS, RANK, REQUESTS, prompts, random_pairs

CLIENTS, EACH = 32, 3
#: New tokens of a request.
FEWEST, MOST = 32, 64
ARRIVALS = 60
PORT = 8123


@dataclass(frozen=True)
class Ask:
    """One request."""

    adapter: str
    prompt: tuple[int, ...]
    new: int


def asks(count: int, seed: int) -> list[Ask]:
    """Of random adapters and lengths."""
    rng = random.Random(seed)
    known = prompts()
    return [
        Ask(f"a{rng.randrange(ADAPTERS)}", tuple(known[index % len(known)]), rng.randint(FEWEST, MOST))
        for index in range(count)
    ]


@dataclass
class Answered:
    """Seconds from the asking until the first and the last token, and how many there were."""

    first: float
    whole: float
    tokens: int


#: Answers a request, timed from now or from a moment before.
Asks = Callable[..., Answered]


# ---- the endpoint ---------------------------------------------------------------------------------------------------


@contextmanager
def endpoint() -> Iterator[tuple[str, str]]:
    """URL and token of a deployed endpoint, with all adapters loaded."""
    from training_base import source

    from cluster import session
    from cluster.config import ServeConfig
    from cluster.serving.deploy import deploy, undeploy
    from cluster.serving.sources import FixedSource
    from cluster.serving.spec import ServeSpec

    with TemporaryDirectory() as root:
        table = write_adapters(Path(root) / "adapters")
        spec = ServeSpec("bench", source("dense"), "base", FixedSource(table), tuple(table), str(Path(root) / "token"))
        for name in ALLOCATOR:  # a hundred processes would hold so much each
            os.environ.pop(name, None)
        started = session.start_or_adopt(Path(root) / "store", num_cpus=8)
        session.connect(started)
        try:
            made = deploy(spec, ServeConfig(port=PORT, num_cpus=THREADS, max_concurrent=REQUESTS, max_waiting=64))
            yield made.url, Path(spec.token_file).read_text().strip()
            undeploy("bench")
        finally:
            session.disconnect()
            session.stop(Path(root) / "store")


def write_adapters(root: Path) -> dict[str, str]:
    """The adapters of `jobs_serving` as files, by model id."""
    from jobs_serving import dense_model

    from lowrank.adapters.lora import LoRA
    from lowrank.adapters.peft_format import save_adapter
    from lowrank.config import AdapterConfig

    model = dense_model()
    for index in range(ADAPTERS):
        made = {name: LoRA(a, b, 1.0) for name, (a, b) in random_pairs(model, index).items()}
        save_adapter(root / f"a{index}", made, AdapterConfig(r=RANK, lora_alpha=float(RANK)), {})
    return {f"a{index}": str(root / f"a{index}") for index in range(ADAPTERS)}


def over_http(url: str, token: str, stream: bool) -> Asks:
    """Asks the endpoint, over connections that stay open."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=120, limits=limits)

    def ask(one: Ask, began: float | None = None) -> Answered:
        began = time.perf_counter() if began is None else began
        body = {"model": one.adapter, "prompt": list(one.prompt), "max_tokens": one.new, "temperature": 0}
        if not stream:
            answer = client.post("/v1/completions", json=body).raise_for_status().json()
            whole = time.perf_counter() - began
            return Answered(whole, whole, answer["usage"]["completion_tokens"])
        first, tokens = 0.0, 0
        more = {"stream": True, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/completions", json=body | more) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(str(event["error"]))
                    first = first or time.perf_counter() - began
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        return Answered(first, time.perf_counter() - began, tokens)

    return ask


# ---- the engine alone, and static batching --------------------------------------------------------------------------


def in_process(one: Ask, began: float | None = None) -> Answered:
    """Asks the engine of this process."""
    done: queue.Queue[Answered] = queue.Queue()
    submit(one, time.perf_counter() if began is None else began, done)
    return done.get()


def submit(one: Ask, began: float, done: queue.Queue[Answered]) -> None:
    """Hand a request to the engine of this process."""
    from cluster.serving.decoding import Sampling
    from cluster.serving.slots import Job

    first: list[float] = []

    def listen(piece: Any) -> None:
        if piece.completion_tokens and not first:
            first.append(time.perf_counter() - began)
        if piece.finish is not None:
            done.put(Answered(first[0], time.perf_counter() - began, piece.completion_tokens))

    wide_engine().submit(Job(one.adapter, one.prompt, one.new, Sampling(temperature=0)), listen)


@cache
def wide_engine() -> Any:
    """An engine that ends answers where the endpoint's does, with as many waiting places."""
    from jobs_serving import Ids, ours

    from cluster.model import generation_defaults
    from cluster.serving.engine import Engine

    return Engine(ours(), Ids(), generation_defaults(ours())["eos"], max_concurrent=REQUESTS, max_waiting=64)


def static_batches(waiting: queue.Queue[tuple[Ask, float]], total: int) -> list[Answered]:
    """Whoever waits, up to 16, is answered together, and the next ones when the last of them is done."""
    found: list[Answered] = []
    while len(found) < total:
        batch = [waiting.get()]
        while len(batch) < REQUESTS:
            try:
                batch.append(waiting.get_nowait())
            except queue.Empty:
                break
        done: queue.Queue[Answered] = queue.Queue()
        for one, began in batch:
            submit(one, began, done)
        found += [done.get() for _ in batch]
    return found


# ---- jobs -----------------------------------------------------------------------------------------------------------


def closed_loop(ask: Asks, wanted: Sequence[Ask]) -> tuple[float, float]:
    """Tokens a second, and requests a second, of clients that ask again as soon as they are answered."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        tokens = sum(answer.tokens for answer in pool.map(ask, wanted))
    seconds = time.perf_counter() - began
    return tokens / seconds, len(wanted) / seconds


def open_loop(
    ask: Callable[[Ask, float | None], Answered], wanted: Sequence[Ask], times: Sequence[float]
) -> list[Answered]:
    """Every request at its time, however many are under way."""
    began = time.perf_counter()

    def at(one: tuple[Ask, float]) -> Answered:
        time.sleep(max(0.0, began + one[1] - time.perf_counter()))
        return ask(one[0], began + one[1])

    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(at, zip(wanted, times, strict=True)))


def static_loop(wanted: Sequence[Ask], times: Sequence[float]) -> list[Answered]:
    """The same to static batches of the engine in this process."""
    waiting: queue.Queue[tuple[Ask, float]] = queue.Queue()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(static_batches, waiting, len(wanted))
        began = time.perf_counter()
        for one, own in zip(wanted, times, strict=True):
            time.sleep(max(0.0, began + own - time.perf_counter()))
            waiting.put((one, began + own))
        return found.result()


def http() -> list[Row]:
    """Throughput of whole and of streamed answers, and the time to the first token."""
    wanted = asks(CLIENTS * EACH, 0)
    wide_engine()  # before threads ask for it
    with endpoint() as (url, token):
        sides = {
            "engine": in_process,
            "whole": over_http(url, token, False),
            "streamed": over_http(url, token, True),
        }
        for ask in sides.values():
            closed_loop(ask, wanted[:CLIENTS])
        best = dict.fromkeys(sides, (0.0, 0.0))
        for _ in range(2):
            for name, ask in sides.items():
                best[name] = max(best[name], closed_loop(ask, wanted))
        rows = [
            row(
                f"over HTTP, {CLIENTS} clients, {name} answers", "the engine without HTTP",
                best[name][0] / best["engine"][0], target,
                note=f"{best[name][0]:.0f} against {best['engine'][0]:.0f} tokens/s",
            )
            for name, target in (("whole", 0.9), ("streamed", 0.75))
        ]  # fmt: skip
        return [*rows, _first_token(sides["streamed"], best["streamed"][1] / 2)]


def _first_token(ask: Asks, rate: float) -> Row:
    rng, now, times = random.Random(2), 0.0, []
    for _ in range(ARRIVALS):
        now += rng.expovariate(rate)
        times.append(now)
    wanted = asks(ARRIVALS, 1)
    late: dict[str, float] = {}
    for name, found in (
        ("ours", open_loop(ask, wanted, times)),
        ("static", static_loop(wanted, times)),
    ):
        late[name] = sorted(answer.first for answer in found)[int(0.95 * ARRIVALS)]
    return row(
        f"over HTTP, first token, p95, {rate:.1f} requests/s", "static batching, in process",
        late["ours"] / late["static"], 0.4, "<=",
        note=f"{late['ours'] * 1e3:.0f} against {late['static'] * 1e3:.0f} ms",
    )  # fmt: skip


JOBS: dict[str, Callable[[], list[Row]]] = {"serving_http": http}
