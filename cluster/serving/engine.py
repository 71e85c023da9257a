"""A slot engine: one model, several requests, interleaved token by token by one worker thread.

Every request has a key-value cache of its own. The worker goes round the live requests; each gets one step (its whole
prompt first, then one token at a time) with its own adapter active. A request therefore computes exactly what it would
compute alone, whatever its neighbours are. Steps over several requests at once are a later refinement: it replaces
`_advance` and leaves everything around it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cluster.serving.decoding import Detokenizer, Sampler, Sampling, StopFilter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A child of Serve's logger, so that inside a replica its lines reach the replica's log file.
logger = logging.getLogger("ray.serve.rankline")

Finish = Literal["stop", "length", "error", "cancelled"]


class BusyError(Exception):
    """Every slot is taken."""


@dataclass(frozen=True)
class Job:
    """One generation: `adapter` is the name that the model's layers know (None: the bare base)."""

    adapter: str | None
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """New text of a job; the last piece says why it ended."""

    text: str
    completion_tokens: int
    finish: Finish | None = None


class Slot:
    """One live job: its cache, its sampler and its text. Only the worker thread touches it, but for `cancel`."""

    def __init__(self, job: Job, emit: Callable[[Piece], None], tokenizer: PreTrainedTokenizerBase, cache: Any) -> None:
        self.job = job
        self.emit = emit
        self.cache = cache
        self.pending = job.prompt
        self.produced = 0
        self.cancelled = False
        self.sample = Sampler(job.sampling)
        self._text = Detokenizer(tokenizer, job.prompt)
        self._filter = StopFilter(job.stops)

    def cancel(self) -> None:
        """Give the slot up before its next step; harmless when it has ended."""
        self.cancelled = True

    def accept(self, token: int, eos: Collection[int]) -> Piece:
        """Take the next token and say what there is to send."""
        self.produced += 1
        self.pending = (token,)
        ended = token in eos
        text = "" if ended else self._filter.push(self._text.push(token))
        if not self._filter.stopped and (ended or self.produced >= self.job.max_tokens):
            text += self._filter.push(self._text.finish())
            text += self._filter.finish()
            return Piece(text, self.produced, "stop" if ended or self._filter.stopped else "length")
        return Piece(text, self.produced, "stop" if self._filter.stopped else None)


class Engine:
    """Owns the model and the worker thread. `submit` may be called from any thread."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: Collection[int], max_concurrent: int
    ) -> None:
        """Start the worker.

        Args:
            model: In evaluation mode, with its adapters injected; nobody else may use it from now on.
            tokenizer: For decoding; nobody else may use this object (tokenizers are not safe across threads).
            eos: Token ids that end an answer.
            max_concurrent: Slots; a request beyond them is refused.
        """
        import inspect

        from lowrank.inject import speakers

        # Found once: `set_active` walks the whole model, 13 ms a step on SmolLM2-135M.
        self._layers = speakers(model)
        self._model, self._tokenizer, self._eos = model, tokenizer, frozenset(eos)
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._max_concurrent = max_concurrent
        self._slots: list[Slot] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="rankline-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the worker lives."""
        return self._thread.is_alive() and not self._closed

    @property
    def num_live(self) -> int:
        """Slots taken."""
        return len(self._slots)

    def submit(self, job: Job, emit: Callable[[Piece], None]) -> Slot:
        """Admit a job. `emit` is called on the worker thread and must not block; when it raises, the job ends.

        Raises:
            BusyError: every slot is taken, or the engine is closed.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        with self._changed:
            if self._closed or len(self._slots) >= self._max_concurrent:
                raise BusyError(f"{len(self._slots)} of {self._max_concurrent} slots are taken")
            slot = Slot(job, emit, self._tokenizer, cache)
            self._slots.append(slot)
            self._changed.notify()
        return slot

    def close(self) -> None:
        """End the worker; live jobs end with `cancelled`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        import torch

        with torch.inference_mode():
            while not self._closed:
                for slot in self._round():
                    self._turn(slot)
        for slot in list(self._slots):
            self._end(slot, Piece("", slot.produced, "cancelled"))

    def _round(self) -> list[Slot]:
        with self._changed:
            self._changed.wait_for(lambda: self._slots or self._closed)
            return list(self._slots)

    def _turn(self, slot: Slot) -> None:
        """One step of one job; whatever goes wrong in it ends this job alone."""
        if slot.cancelled:
            self._end(slot, Piece("", slot.produced, "cancelled"))
            return
        try:
            piece = self._advance(slot)
        except Exception:
            logger.exception("a generation step failed; the request is answered with an error")
            piece = Piece("", slot.produced, "error")
        if piece.finish is not None:
            self._end(slot, piece)
        elif piece.text:
            self._emit(slot, piece)

    def _advance(self, slot: Slot) -> Piece:
        import torch

        for layer in self._layers:
            layer.active = slot.job.adapter
        ids = torch.tensor([slot.pending], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=slot.cache, use_cache=True, **self._extra)
        return slot.accept(slot.sample(output.logits[0, -1]), self._eos)

    def _end(self, slot: Slot, piece: Piece) -> None:
        # The slot is free before the client hears of the end, so that its next request is not refused.
        with self._changed:
            self._slots.remove(slot)
        self._emit(slot, piece)

    @staticmethod
    def _emit(slot: Slot, piece: Piece) -> None:
        try:
            slot.emit(piece)
        except Exception:  # the listener's event loop is gone; so is the client
            slot.cancel()
