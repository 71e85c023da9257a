"""A slot engine: one model, several requests, continuously batched by one worker thread.

Requests join and leave between rounds. In every round all requests that are writing get one token, and some tokens of
prompts are read, in one pass, each with its own adapter: a long prompt holds nobody up for longer than a chunk takes. A
request's logits are those that it would have alone, to rounding.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from cluster.serving.decoding import Detokenizer, Sampler, Sampling, StopFilter, TokenLogprob, token_logprob
from cluster.serving.steps import Chunk

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A child of Serve's logger, so that inside a replica its lines reach the replica's log file.
logger = logging.getLogger("ray.serve.rankline")

Finish = Literal["stop", "length", "error", "cancelled"]
#: Tokens of prompts that are read in a round.
_CHUNK = 256


class BusyError(Exception):
    """Every slot and every waiting place is taken."""


@dataclass(frozen=True)
class Job:
    """One generation: `adapter` is the name that the model's layers know (None: the bare base).

    With `top_logprobs` (>= 0) every token comes with its log-probability and that many of the likeliest.
    """

    adapter: str | None
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """New text of a job with the tokens that it came from; the last piece says why it ended."""

    text: str
    completion_tokens: int
    finish: Finish | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    def followed_by(self, later: Piece) -> Piece:
        """Both as one."""
        return replace(later, text=self.text + later.text, logprobs=self.logprobs + later.logprobs)


class Slot:
    """One live job: how far it is, its sampler and its text. Only the worker thread touches it, but for `cancel`."""

    def __init__(
        self, job: Job, emit: Callable[[Piece], None], tokenizer: PreTrainedTokenizerBase, number: int
    ) -> None:
        self.job = job
        self.emit = emit
        self.number = number
        self.taken = 0
        self.token = job.prompt[-1]
        self.produced = 0
        self.cancelled = False
        self.sample = Sampler(job.sampling)
        self._tokenizer = tokenizer
        self._noted: list[TokenLogprob] = []
        self._note_offset = self._sent = 0
        self._text = Detokenizer(tokenizer, job.prompt)
        self._filter = StopFilter(job.stops)

    @property
    def is_writing(self) -> bool:
        """Whether its prompt is read."""
        return self.taken >= len(self.job.prompt)

    def chunk(self, most: int) -> Chunk:
        """What the model takes next: up to `most` tokens of the prompt, or the last token that was produced."""
        tokens = (self.token,) if self.is_writing else self.job.prompt[self.taken : self.taken + most]
        return Chunk(self.number, self.job.adapter, tokens, self.taken)

    def cancel(self) -> None:
        """Give the slot up before its next step; harmless when it has ended."""
        self.cancelled = True

    def accept(self, token: int, logits: Tensor, eos: Collection[int]) -> Piece:
        """Take the next token, chosen from `logits`, and say what there is to send."""
        self.produced += 1
        before, self.token = self.token, token
        ended = token in eos
        if not ended:
            self._note(token, before, logits)
        text = "" if ended else self._filter.push(self._text.push(token))
        finish: Finish | None = "stop" if self._filter.stopped else None
        if finish is None and (ended or self.produced >= self.job.max_tokens):
            text += self._filter.push(self._text.finish())
            text += self._filter.finish()
            finish = "stop" if ended or self._filter.stopped else "length"
        self._sent += len(text)
        return Piece(text, self.produced, finish, self._noted_so_far() if text or finish else ())

    def _note(self, token: int, before: int, logits: Tensor) -> None:
        """Keep a token's log-probability, if it was asked for."""
        if self.job.top_logprobs is None:
            return
        found = token_logprob(logits, token, before, self.job.top_logprobs, self._tokenizer)
        self._noted.append(replace(found, offset=self._note_offset))
        self._note_offset += len(found.token)

    def _noted_so_far(self) -> tuple[TokenLogprob, ...]:
        """What was kept since the last time, without the tokens of a stop string."""
        noted, self._noted = self._noted, []
        return tuple(one for one in noted if not self._filter.stopped or one.offset < self._sent)


class Engine:
    """Owns the model and the worker thread. `submit` may be called from any thread."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos: Collection[int],
        max_concurrent: int,
        max_waiting: int = 0,
    ) -> None:
        """Start the worker.

        Args:
            model: In evaluation mode, with its adapters injected; nobody else may use it from now on.
            tokenizer: For decoding; nobody else may use this object (tokenizers are not safe across threads).
            eos: Token ids that end an answer.
            max_concurrent: Slots.
            max_waiting: Requests that wait for a slot; one beyond them is refused.
        """
        from cluster.serving.trial import steps_for

        self._steps = steps_for(model, max_concurrent)
        self._tokenizer, self._eos = tokenizer, frozenset(eos)
        self._max_concurrent, self._max_waiting = max_concurrent, max_waiting
        self._numbers = itertools.count()
        self._slots: list[Slot] = []
        self._waiting: list[Slot] = []
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
        """Requests that have a slot or wait for one."""
        return sum(self.live)

    @property
    def live(self) -> tuple[int, int]:
        """Requests that have a slot, and those that wait for one."""
        return len(self._slots), len(self._waiting)

    @property
    def capacity(self) -> int:
        """Most requests that can be there."""
        return self._max_concurrent + self._max_waiting

    @property
    def most_of_one(self) -> int:
        """Most requests of one adapter that can be there."""
        return self._max_concurrent + (self._max_waiting + 1) // 2

    def submit(self, job: Job, emit: Callable[[Piece], None]) -> Slot:
        """`submit_all` of one."""
        return self.submit_all([job], [emit])[0]

    def submit_all(self, jobs: Sequence[Job], emits: Sequence[Callable[[Piece], None]]) -> list[Slot]:
        """Take in jobs, all or none. An `emit` is called on the worker thread and must not block; when it raises, its
        job ends.

        Raises:
            BusyError: every slot and every place in the line is taken, or half of the line by the same adapter, or
                the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise BusyError("the engine is closed")
            self._refuse_too_many(jobs)
            made = [
                Slot(job, emit, self._tokenizer, next(self._numbers)) for job, emit in zip(jobs, emits, strict=True)
            ]
            self._waiting += made
            self._changed.notify()
        return made

    def _refuse_too_many(self, jobs: Sequence[Job]) -> None:
        allowed = f"{self._max_concurrent} at a time and {self._max_waiting} more that wait are allowed"
        if self.num_live + len(jobs) > self.capacity:
            raise BusyError(f"{self.num_live} requests are there; {allowed}")
        own = sum(slot.job.adapter == jobs[0].adapter for slot in [*self._slots, *self._waiting])
        if own + len(jobs) > self.most_of_one:
            raise BusyError(f"{own} requests of this model are there; {allowed}, half of them for one model")

    def close(self) -> None:
        """End the worker; live jobs end with `cancelled`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        import torch

        try:
            with torch.inference_mode():
                while not self._closed:
                    self._round()
        except BaseException:
            logger.exception("the engine ends")
            raise
        finally:
            with self._changed:
                self._closed = True
            for slot in [*self._slots, *self._waiting]:
                self._emit(slot, Piece("", slot.produced, "cancelled"))

    def _round(self) -> None:
        """One pass over what is next of everybody who has a slot."""
        with self._changed:
            self._changed.wait_for(lambda: self._slots or self._waiting or self._closed)
            gone = [slot for slot in [*self._slots, *self._waiting] if slot.cancelled]
        for slot in gone:
            self._end(slot, Piece("", slot.produced, "cancelled"))
        with self._changed:
            self._admit()
            slots = list(self._slots)
        chunks = self._next_chunks(slots)
        for together in [chunks] if self._steps.together else [[chunk] for chunk in chunks]:
            if together:
                self._attempt(together)

    def _next_chunks(self, slots: list[Slot]) -> list[tuple[Slot, Chunk]]:
        """One token of everybody who writes, and `_CHUNK` of the prompts.

        The prompt that got least of its own read comes first: a short one waits for one chunk of a long one, not for
        all of it.
        """
        chunks = [(slot, slot.chunk(1)) for slot in slots if slot.is_writing]
        left = _CHUNK
        for slot in sorted((slot for slot in slots if not slot.is_writing), key=lambda slot: slot.taken):
            if left > 0:
                chunks.append((slot, slot.chunk(left)))
                left -= len(chunks[-1][1].tokens)
        return chunks

    def _admit(self) -> None:
        """Free slots go to those who wait: first to the adapter that has the fewest, then to the oldest."""
        while self._waiting and len(self._slots) < self._max_concurrent:
            taken = Counter(slot.job.adapter for slot in self._slots)
            slot = min(self._waiting, key=lambda slot: taken[slot.job.adapter])
            self._waiting.remove(slot)
            self._slots.append(slot)

    def _attempt(self, chunks: list[tuple[Slot, Chunk]]) -> None:
        """Run a pass; where it fails, each of its jobs has one alone, and the one that fails again ends."""
        try:
            found = self._steps.step([chunk for _, chunk in chunks])
        except Exception:
            if len(chunks) > 1:
                logger.warning("a pass of %d requests failed; each has one alone", len(chunks), exc_info=True)
                for one in chunks:
                    self._attempt([one])
                return
            self._fail(chunks[0][0])
            return
        for (slot, chunk), logits in zip(chunks, found, strict=True):
            slot.taken += len(chunk.tokens)
            if slot.is_writing:
                try:
                    self._take(slot, logits)
                except Exception:
                    self._fail(slot)

    def _fail(self, slot: Slot) -> None:
        logger.exception("a generation step failed; the request is answered with an error")
        self._end(slot, Piece("", slot.produced, "error"))

    def _take(self, slot: Slot, logits: Tensor) -> None:
        """Choose the next token, and send what it says."""
        piece = slot.accept(slot.sample(logits), logits, self._eos)
        if piece.finish is not None:
            self._end(slot, piece)
        elif piece.text:
            self._emit(slot, piece)

    def _end(self, slot: Slot, piece: Piece) -> None:
        # The slot is free before the client hears of the end, so that its next request is not refused.
        with self._changed:
            held = next((held for held in (self._slots, self._waiting) if slot in held), None)
            if held is None:
                return
            held.remove(slot)
        self._steps.release(slot.number)
        self._emit(slot, piece)

    @staticmethod
    def _emit(slot: Slot, piece: Piece) -> None:
        try:
            slot.emit(piece)
        except Exception:  # the listener's event loop is gone; so is the client
            slot.cancel()
