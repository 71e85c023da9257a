"""What stands between the routes and the engine: model ids, chat templates, limits, and threads to coroutines."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ServeConfig
from cluster.errors import ServeError
from cluster.model import generation_defaults, load_tokenizer, starts_from_part
from cluster.serving.decoding import Sampling
from cluster.serving.holder import Holder, ModelHolder
from cluster.serving.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest
from cluster.serving.slots import INITIAL, AnyEngine, BusyError, Job, Piece, Slot
from cluster.serving.sources import AdapterSource, ForeignAdapterError, UnknownAdapterError, Version
from cluster.serving.spec import ServeSpec, base_identity
from cluster.serving.store import AdapterStore, FullError, Lease, RefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A child of Serve's logger, so that inside a replica its lines reach the replica's log file.
logger = logging.getLogger("ray.serve.rankline")

_COMPLETION_DEFAULT_TOKENS = 16  # OpenAI's default of /v1/completions
_RETRY_AFTER_S = 1
#: How long a request waits for others to give an adapter's room up, and how often it looks.
_ROOM_WAIT_S, _ROOM_POLL_S = 10.0, 0.02


class Generation:
    """The running jobs of a request, one per choice, as an asynchronous sequence of pieces."""

    def __init__(self, prompt_tokens: int, version: str, lease: Lease, timeout_s: float) -> None:
        """Args:
        prompt_tokens: of the request.
        version: what answers.
        lease: of its adapter; given back when the last job has ended.
        timeout_s: after which the jobs end, and `expired` is true.
        """
        self.prompt_tokens, self.version, self.expired = prompt_tokens, version, False
        self._lease, self._timeout_s = lease, timeout_s
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._slots: Sequence[Slot] = ()
        self._running = 0

    def start(self, engine: AnyEngine, jobs: Sequence[Job]) -> None:
        """Hand the jobs in, all or none; raises BusyError."""
        self._running = len(jobs)
        try:
            self._slots = engine.submit_all(jobs, [partial(self._emit, choice) for choice in range(len(jobs))])
        except BaseException:
            self._lease.release()
            raise
        self._timer = self._loop.call_later(self._timeout_s, self._expire)

    def _expire(self) -> None:
        self.expired = True
        self.cancel()

    def _emit(self, choice: int, piece: Piece) -> None:
        """On the engine's thread."""
        if piece.finish is not None:
            self._running -= 1
            if self._running == 0:
                self._lease.release()
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (choice, piece))

    def cancel(self) -> None:
        """The client has left, or the answer is complete."""
        self._timer.cancel()
        for slot in self._slots:
            slot.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Every piece with the number of its choice; the last of a choice has `finish` set."""
        async for found in self.gathered(0):
            yield found

    async def gathered(self, interval_s: float) -> AsyncIterator[tuple[int, Piece]]:
        """The same, what comes within `interval_s` seconds of what was yielded before as one piece per choice."""
        left, last, begun = len(self._slots), -math.inf, set[int]()
        while left:
            arrived: list[tuple[int, Piece]] = []
            due = last + interval_s
            # The first piece of a choice, and the last one of all, wait for nothing.
            while not arrived or (left and arrived[-1][0] in begun and self._loop.time() < due):
                wait = due - self._loop.time() if arrived else None
                try:
                    arrived.append(await asyncio.wait_for(self._queue.get(), wait))
                except TimeoutError:
                    break
                left -= arrived[-1][1].finish is not None
            last = self._loop.time()
            begun |= {choice for choice, _ in arrived}
            together: dict[int, Piece] = {}
            for choice, piece in arrived:
                before = together.pop(choice, None)
                if before is not None and piece.finish in ("error", "cancelled"):
                    yield choice, before  # what was said until then
                    before = None
                together[choice] = piece if before is None else before.followed_by(piece)
            for choice, piece in together.items():
                yield choice, piece


class Service:
    """One replica's model: the base, and the adapters of a source."""

    def __init__(
        self,
        engine: AnyEngine,
        holder: Holder[Any],
        tokenizer: PreTrainedTokenizerBase,
        base: tuple[str, str | None],
        source: AdapterSource,
        config: ServeConfig,
        base_facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Args:
        engine: of the base; closed with the service.
        holder: of the engine's adapters.
        tokenizer: of the model.
        base: the base's model id, and the adapter's name in the engine that it stands for, or None.
        source: of adapters.
        config: limits.
        base_facts: what the base of an adapter must be.
        """
        self.base_id, self._base = base
        self.base = base_identity(base_facts or {})
        self._source, self._config = source, config
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._engine = engine
        limits = int(config.adapter_mib * 2**20), int(config.host_adapter_mib * 2**20)
        self.store = AdapterStore(holder, source, base_facts or {}, *limits)
        self.created = int(time.time())
        self._loading = 0
        source.watch(self.store.follow)

    @classmethod
    def load(cls, spec: ServeSpec, config: ServeConfig) -> Service:
        """Build the engine of `spec`, and load the adapters that it requires.

        Raises:
            ServeError: a required adapter is not there or is refused, or has the base's id; the engine cannot be had.
        """
        source = spec.adapters
        if spec.base_model_id in source.model_ids():
            raise ServeError(f"serve {spec.app_name}: the base and an adapter are both called {spec.base_model_id!r}.")
        required = list(dict.fromkeys(source.resolve(model_id) for model_id in spec.required))
        tokenizer = load_tokenizer(spec.source.shard_set)
        engine, holder = _engine(spec, config, copy.deepcopy(tokenizer), required)
        base = spec.base_model_id, INITIAL if starts_from_part(spec.source) else None
        service = cls(engine, holder, tokenizer, base, source, config, spec.source.base_facts)
        try:
            for version in required:
                service.store.lease(version).release()
        except ServeError:
            service.close()
            raise
        return service

    @property
    def model_ids(self) -> tuple[str, ...]:
        """The base, then the adapters."""
        return (self.base_id, *self._source.model_ids())

    @property
    def healthy(self) -> bool:
        """Whether requests can be served."""
        return self._engine.healthy

    @property
    def live(self) -> tuple[int, int]:
        """Requests that have a slot, and those that wait for one."""
        return self._engine.line.live

    def close(self) -> None:
        """End the engine."""
        self._source.close()
        self.store.close()
        self._engine.close()

    def require(self, model_id: str) -> Version | None:
        """What a model id stands for now (None: the base); raises 404 if nothing. Ids are only ever looked up."""
        if model_id == self.base_id:
            return None
        try:
            return self._source.resolve(model_id)
        except UnknownAdapterError as error:
            raise ApiError(
                404, f"The model {model_id!r} does not exist. See /v1/models.", param="model", code="model_not_found"
            ) from error
        except ForeignAdapterError as error:
            raise _refused(error) from error

    async def _lease(self, version: Version | None) -> Lease:
        """Use a version; waits while it is loaded, which holds nobody else up."""
        if version is None:
            return Lease(self._base)
        if self._loading >= self._engine.line.capacity:
            raise _busy(f"{self._loading} requests wait for their adapters")
        self._loading += 1
        try:
            return await asyncio.wait_for(self._when_there(version), self._config.request_timeout_s)
        except RefusedError as error:
            raise _refused(error) from error
        except FullError as error:
            raise _busy("all adapters that there is room for are in use") from error
        except (ServeError, TimeoutError) as error:
            logger.warning("load %s: %s", version.id, error or "it took too long")
            message, wait = (
                "The model cannot be loaded now; see the replica's log.",
                {"Retry-After": str(_RETRY_AFTER_S)},
            )
            raise ApiError(503, message, type="server_error", code="adapter_unavailable", headers=wait) from error
        finally:
            self._loading -= 1

    async def _when_there(self, version: Version) -> Lease:
        """A lease, once the version is loaded and has room."""
        give_up, again = time.monotonic() + _ROOM_WAIT_S, False
        while True:
            try:
                found = self.store.ask(version, again)
                if isinstance(found, Lease):
                    return found
                # Shielded: one client that leaves must not end the load for the others.
                await asyncio.shield(asyncio.wrap_future(found))
            except FullError:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(_ROOM_POLL_S)
            again = True

    async def chat(self, request: ChatRequest) -> Generation:
        """Start a chat completion."""
        version = self.require(request.model)
        prompt = await asyncio.to_thread(self._chat_ids, [message.for_template() for message in request.messages])
        return await self._start(request, version, prompt, None, "messages")

    async def complete(self, request: CompletionRequest) -> Generation:
        """Start a text completion."""
        version = self.require(request.model)
        prompt = await asyncio.to_thread(self._prompt_ids, request.prompt)
        return await self._start(request, version, prompt, _COMPLETION_DEFAULT_TOKENS, "prompt")

    def _chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            raise ApiError(400, "This model has no chat template; use /v1/completions.", code="no_chat_template")
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                return list(self._tokenizer(text, add_special_tokens=False).input_ids)
        except TemplateError as error:
            raise ApiError(400, f"The chat template refuses these messages: {error}", param="messages") from error

    def _prompt_ids(self, prompt: str | list[str] | list[int]) -> list[int]:
        given = prompt[0] if isinstance(prompt, list) and isinstance(prompt[0], str) else prompt
        if isinstance(given, str):
            return self._text_ids(given)
        return [int(token) for token in given]

    def _text_ids(self, text: str) -> list[int]:
        with self._lock:
            ids: list[int] = list(self._tokenizer(text).input_ids)
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == end:  # some tokenizers close every text; training rows drop it too
            ids.pop()
        return ids or [end if start is None else start]

    async def _start(
        self, request: GenerationRequest, version: Version | None, prompt: list[int], default: int | None, param: str
    ) -> Generation:
        max_tokens = self._limit(request, len(prompt), default, param)
        if max(prompt) >= self._engine.vocab_size:
            raise ApiError(
                400, f"A token id is not below {self._engine.vocab_size}.", param=param, code="invalid_value"
            )
        most = self._engine.line.most_of_one
        if (request.n or 1) > most:
            raise ApiError(400, f"n is {request.n}; this endpoint allows {most}.", param="n", code="invalid_value")
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
        )
        # Choices differ by their seeds; the first one's is the seed that was given.
        seeds = [None if request.seed is None else _seed(request.seed + choice) for choice in range(request.n or 1)]
        samplings = [replace(sampling, seed=seed) for seed in seeds]
        lease = await self._lease(version)
        generation = Generation(
            len(prompt), self.base_id if version is None else version.id, lease, self._config.request_timeout_s
        )
        stops, top = request.stops, request.wanted_logprobs
        try:
            generation.start(
                self._engine, [Job(lease.name, tuple(prompt), max_tokens, own, stops, top) for own in samplings]
            )
        except BusyError as error:
            raise _busy(str(error)) from error
        return generation

    def _limit(self, request: GenerationRequest, prompt_tokens: int, default: int | None, param: str) -> int:
        """How many tokens this request may produce."""
        wanted = request.wanted_tokens
        if wanted is not None and wanted > self._config.max_new_tokens:
            raise ApiError(
                400,
                f"max_tokens is {wanted}; this endpoint allows at most {self._config.max_new_tokens}.",
                param="max_tokens",
                code="invalid_value",
            )
        room = self._engine.context - prompt_tokens
        if room < (wanted or 1):
            raise ApiError(
                400,
                f"This model's context is {self._engine.context} tokens; the prompt has {prompt_tokens} and max_tokens "
                f"is {wanted or 1}. Shorten the prompt or ask for fewer tokens.",
                param=param,
                code="context_length_exceeded",
            )
        return wanted or min(room, self._config.max_new_tokens, default or self._config.max_new_tokens)


def _seed(wanted: int) -> int:
    """Back into 64 bits with a sign."""
    return (wanted + 2**63) % 2**64 - 2**63


def _busy(reason: str) -> ApiError:
    return ApiError(
        429,
        f"The endpoint is busy ({reason}); try again.",
        type="rate_limit_error",
        code="engine_busy",
        headers={"Retry-After": str(_RETRY_AFTER_S)},
    )


def _refused(error: ServeError) -> ApiError:
    return ApiError(422, f"This endpoint does not take that model: {error}", param="model", code="adapter_refused")


def _saved_names(directory: Path) -> set[str]:
    """Modules that an adapter was trained whole beside."""
    from lowrank.adapters.peft_format import load_saved_modules, read_config
    from lowrank.errors import AdapterError

    try:
        return set(load_saved_modules(directory) if read_config(directory).get("modules_to_save") else ())
    except AdapterError as error:
        raise ServeError(str(error)) from error


def _engine(
    spec: ServeSpec, config: ServeConfig, tokenizer: PreTrainedTokenizerBase, required: Sequence[Version]
) -> tuple[AnyEngine, Holder[Any]]:
    """The configured engine over the base of `spec`, able to take adapters."""
    if config.engine == "vllm":
        from cluster.serving.vllm_engine import start

        return start(spec, config, tokenizer)
    from cluster.serving.engine import Engine
    from lowrank.resident import make_adaptable

    model = _build(spec)
    linears = [linear.name for linear in spec.source.shard_set.architecture.linears]
    make_adaptable(model, linears, {name for one in required for name in _saved_names(spec.adapters.fetch(one))})
    eos = generation_defaults(model)["eos"] or [tokenizer.eos_token_id]
    return Engine(model, tokenizer, eos, config.max_concurrent, config.max_waiting), ModelHolder(model)


def _build(spec: ServeSpec) -> PreTrainedModel:
    import torch

    from cluster.model import build_adapted, build_variant, compute_dtype
    from cluster.unpack import unpack_if_room

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype("auto", device)
    if starts_from_part(spec.source):
        model = build_adapted(spec.source, dtype, {INITIAL: None})
    else:
        model = build_variant(spec.source, "dense", dtype)
    if device == "cpu":
        unpack_if_room(model, dtype)
    return model.to(torch.device(device))
