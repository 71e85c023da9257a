"""What stands between the routes and the engine: model ids, chat templates, limits, and threads to coroutines."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ServeConfig
from cluster.errors import ServeError
from cluster.serving.decoding import Sampling
from cluster.serving.engine import BusyError, Engine, Job, Piece, Slot
from cluster.serving.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest
from cluster.serving.sources import AdapterSource, FixedSource
from cluster.serving.spec import ServeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPLETION_DEFAULT_TOKENS = 16  # OpenAI's default of /v1/completions
_RETRY_AFTER_S = 1


class Generation:
    """The running jobs of a request, one per choice, as an asynchronous sequence of pieces."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._slots: list[Slot] = []

    def start(self, engine: Engine, jobs: Sequence[Job]) -> None:
        """Hand the jobs in, all or none; raises BusyError."""
        self._slots = engine.submit_all(jobs, [partial(self._emit, choice) for choice in range(len(jobs))])

    def _emit(self, choice: int, piece: Piece) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (choice, piece))

    def cancel(self) -> None:
        """The client has left, or the answer is complete."""
        for slot in self._slots:
            slot.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Every piece with the number of its choice; the last of a choice has `finish` set."""
        left = len(self._slots)
        while left:
            choice, piece = await self._queue.get()
            left -= piece.finish is not None
            yield choice, piece


class Service:
    """One replica's model under its ids."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        models: Mapping[str, str | None],
        config: ServeConfig,
    ) -> None:
        """Args: model: adapters injected. models: model id -> the adapter's name in the model's layers, or None."""
        from cluster.model import generation_defaults
        from lowrank.inject import set_active

        for adapter in models.values():
            set_active(model, adapter)  # an adapter that lacks a layer is refused now, not at its first request
        self._models = dict(models)
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._max_new_tokens = config.max_new_tokens
        text_config = model.config.get_text_config(decoder=True)
        self._vocab_size = int(text_config.vocab_size)
        self._context = int(getattr(text_config, "max_position_embeddings", None) or 2**31)
        eos = generation_defaults(model)["eos"] or [tokenizer.eos_token_id]
        self._engine = Engine(model, copy.deepcopy(tokenizer), eos, config.max_concurrent, config.max_waiting)
        self.created = int(time.time())

    @classmethod
    def load(cls, spec: ServeSpec, config: ServeConfig, source: AdapterSource | None = None) -> Service:
        """Build the model of `spec` with every adapter of `source` (null: the directories that `spec` names)."""
        from cluster.model import load_tokenizer

        source = source or FixedSource(spec.adapters)
        ids = source.model_ids()
        if spec.base_model_id in ids:
            raise ServeError(f"serve {spec.app_name}: the base and an adapter are both called {spec.base_model_id!r}.")
        # Layers know adapters by plain names: a model id may hold a dot, which torch's ModuleDict refuses.
        slots: dict[str, str | None] = {spec.base_model_id: "init" if spec.source.base == "nf4" else None}
        paths: dict[str, Path | None] = {"init": None} if spec.source.base == "nf4" else {}
        names: dict[Path, str] = {}  # an adapter under several ids (a name and a name with its version) is loaded once
        for model_id in ids:
            path = source.resolve(model_id)
            slots[model_id] = names.setdefault(path, f"adapter{len(names)}")
            paths[names[path]] = path
        return cls(_build(spec, paths), load_tokenizer(spec.source.shards), slots, config)

    @property
    def model_ids(self) -> tuple[str, ...]:
        """The base, then the adapters."""
        return tuple(self._models)

    @property
    def healthy(self) -> bool:
        """Whether requests can be served."""
        return self._engine.healthy

    @property
    def num_live(self) -> int:
        """Requests in flight."""
        return self._engine.num_live

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def require(self, model_id: str) -> None:
        """Raise 404 unless `model_id` is served; ids are case-exact and only ever looked up."""
        if model_id not in self._models:
            raise ApiError(
                404, f"The model {model_id!r} does not exist. See /v1/models.", param="model", code="model_not_found"
            )

    async def chat(self, request: ChatRequest) -> Generation:
        """Start a chat completion."""
        self.require(request.model)
        prompt = await asyncio.to_thread(self._chat_ids, [message.for_template() for message in request.messages])
        return self._start(request, prompt, None, "messages")

    async def complete(self, request: CompletionRequest) -> Generation:
        """Start a text completion."""
        self.require(request.model)
        prompt = await asyncio.to_thread(self._prompt_ids, request.prompt)
        return self._start(request, prompt, _COMPLETION_DEFAULT_TOKENS, "prompt")

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
        tokens = [int(token) for token in given]
        if max(tokens) >= self._vocab_size:
            raise ApiError(400, f"A token id is not below {self._vocab_size}.", param="prompt", code="invalid_value")
        return tokens

    def _text_ids(self, text: str) -> list[int]:
        with self._lock:
            ids: list[int] = list(self._tokenizer(text).input_ids)
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == end:  # some tokenizers close every text; training rows drop it too
            ids.pop()
        return ids or [end if start is None else start]

    def _start(self, request: GenerationRequest, prompt: list[int], default: int | None, param: str) -> Generation:
        max_tokens = self._limit(request, len(prompt), default, param)
        if (request.n or 1) > self._engine.capacity:
            most = self._engine.capacity
            raise ApiError(400, f"n is {request.n}; this endpoint allows {most}.", param="n", code="invalid_value")
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
        )
        generation = Generation(len(prompt))
        # Choices differ by their seeds; the first one's is the seed that was given.
        seeds = [None if request.seed is None else _seed(request.seed + choice) for choice in range(request.n or 1)]
        samplings = [replace(sampling, seed=seed) for seed in seeds]
        adapter, stops, top = self._models[request.model], request.stops, request.wanted_logprobs
        try:
            generation.start(
                self._engine, [Job(adapter, tuple(prompt), max_tokens, own, stops, top) for own in samplings]
            )
        except BusyError as error:
            raise ApiError(
                429,
                f"The endpoint is busy ({error}); try again.",
                type="rate_limit_error",
                code="engine_busy",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            ) from error
        return generation

    def _limit(self, request: GenerationRequest, prompt_tokens: int, default: int | None, param: str) -> int:
        """How many tokens this request may produce."""
        wanted = request.wanted_tokens
        if wanted is not None and wanted > self._max_new_tokens:
            raise ApiError(
                400,
                f"max_tokens is {wanted}; this endpoint allows at most {self._max_new_tokens}.",
                param="max_tokens",
                code="invalid_value",
            )
        room = self._context - prompt_tokens
        if room < (wanted or 1):
            raise ApiError(
                400,
                f"This model's context is {self._context} tokens; the prompt has {prompt_tokens} and max_tokens is "
                f"{wanted or 1}. Shorten the prompt or ask for fewer tokens.",
                param=param,
                code="context_length_exceeded",
            )
        return wanted or min(room, self._max_new_tokens, default or self._max_new_tokens)


def _seed(wanted: int) -> int:
    """Back into 64 bits with a sign."""
    return (wanted + 2**63) % 2**64 - 2**63


def _build(spec: ServeSpec, paths: Mapping[str, Any]) -> PreTrainedModel:
    import torch

    from cluster.model import build_adapted, build_variant, compute_dtype
    from cluster.unpack import unpack_if_room

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype("auto", device)
    model = build_adapted(spec.source, dtype, paths) if paths else build_variant(spec.source, "dense", dtype)
    if device == "cpu":
        unpack_if_room(model, dtype)
    return model.to(torch.device(device))
