"""Requests on their way through an engine, and the line in which they wait for it; the same for every engine."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from cluster.serving.decoding import Detokenizer, Sampling, StopFilter, TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Name in an engine of the adapter that makes the base what it was before training.
INITIAL = "init"
Finish = Literal["stop", "length", "error", "cancelled"]


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
    """One live job: what it has produced, and its text. Only its engine's thread touches it, but for `cancel`."""

    def __init__(
        self, job: Job, emit: Callable[[Piece], None], tokenizer: PreTrainedTokenizerBase, number: int
    ) -> None:
        self.job = job
        self.emit = emit
        self.number = number
        self.token = job.prompt[-1]
        self.produced = 0
        self.cancelled = False
        self._noted: list[TokenLogprob] = []
        self._note_offset = self._sent = 0
        self._text = Detokenizer(tokenizer, job.prompt)
        self._filter = StopFilter(job.stops)

    def cancel(self) -> None:
        """Give the slot up before its next step; harmless when it has ended."""
        self.cancelled = True

    def accept(self, token: int, eos: Collection[int], noted: TokenLogprob | None) -> Piece:
        """Take the next token, with its log-probability where one was asked for, and say what there is to send."""
        self.produced += 1
        self.token = token
        ended = token in eos
        if noted is not None and not ended:
            self._noted.append(replace(noted, offset=self._note_offset))
            self._note_offset += len(noted.token)
        text = "" if ended else self._filter.push(self._text.push(token))
        finish: Finish | None = "stop" if self._filter.stopped else None
        if finish is None and (ended or self.produced >= self.job.max_tokens):
            text += self._filter.push(self._text.finish())
            text += self._filter.finish()
            finish = "stop" if ended or self._filter.stopped else "length"
        self._sent += len(text)
        return Piece(text, self.produced, finish, self._noted_so_far() if text or finish else ())

    def send(self, piece: Piece) -> None:
        """Hand a piece to whoever listens; where that fails, the job is given up."""
        try:
            self.emit(piece)
        except Exception:  # the listener's event loop is gone; so is the client
            self.cancel()

    def _noted_so_far(self) -> tuple[TokenLogprob, ...]:
        """What was kept since the last time, without the tokens of a stop string."""
        noted, self._noted = self._noted, []
        return tuple(one for one in noted if not self._filter.stopped or one.offset < self._sent)


S = TypeVar("S", bound=Slot)


class Line(Generic[S]):
    """Who has a slot, and who waits for one. Every method may be called from any thread."""

    def __init__(self, max_concurrent: int, max_waiting: int) -> None:
        """Args:
        max_concurrent: slots.
        max_waiting: requests that wait for a slot; one beyond them is refused.
        """
        self._max_concurrent, self._max_waiting = max_concurrent, max_waiting
        self._slots: list[S] = []
        self._waiting: list[S] = []
        self.changed = threading.Condition()

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

    @property
    def everybody(self) -> list[S]:
        """With a slot or without."""
        with self.changed:
            return [*self._slots, *self._waiting]

    def join(self, slots: Sequence[S]) -> None:
        """Take in the jobs of one request, all or none.

        Raises:
            BusyError: every slot and every place in the line is taken, or half of the line by the same adapter.
        """
        with self.changed:
            there = self.everybody
            own = sum(slot.job.adapter == slots[0].job.adapter for slot in there)
            allowed = f"{self._max_concurrent} at a time and {self._max_waiting} more that wait are allowed"
            if len(there) + len(slots) > self.capacity:
                raise BusyError(f"{len(there)} requests are there; {allowed}")
            if own + len(slots) > self.most_of_one:
                raise BusyError(f"{own} requests of this model are there; {allowed}, half of them for one model")
            self._waiting += slots
            self.changed.notify()

    def admit(self) -> list[S]:
        """Give free slots away, first to the adapter that has the fewest, then to the oldest; all that have one."""
        with self.changed:
            while self._waiting and len(self._slots) < self._max_concurrent:
                taken = Counter(slot.job.adapter for slot in self._slots)
                slot = min(self._waiting, key=lambda slot: taken[slot.job.adapter])
                self._waiting.remove(slot)
                self._slots.append(slot)
            return list(self._slots)

    def leave(self, slot: S) -> bool:
        """Free a slot or a place; whether it was still there."""
        with self.changed:
            held = next((held for held in (self._slots, self._waiting) if slot in held), None)
            if held is not None:
                held.remove(slot)
            return held is not None


class AnyEngine(Protocol):
    """Answers jobs, one answer's tokens independent of who else is there."""

    line: Line[Any]
    vocab_size: int
    """Token ids are below it."""
    context: int
    """Most tokens of a prompt and its answer together."""

    @property
    def healthy(self) -> bool:
        """Whether requests can be served."""
        ...

    def submit_all(self, jobs: Sequence[Job], emits: Sequence[Callable[[Piece], None]]) -> Sequence[Slot]:
        """Take in the jobs of one request, all or none. An `emit` is called on a thread of the engine and must not
        block; when it raises, its job ends.

        Raises:
            BusyError: as `Line.join`, or the engine is closed.
        """
        ...

    def close(self) -> None:
        """End; live jobs end with `cancelled`."""
        ...
