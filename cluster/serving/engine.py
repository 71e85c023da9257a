"""A slot engine: one model, several requests, continuously batched by one worker thread.

Requests join and leave between rounds. In every round all requests that are writing get one token, and some tokens of
prompts are read, in one pass, each with its own adapter: a long prompt holds nobody up for longer than a chunk takes. A
request's logits are those that it would have alone, to rounding.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from cluster.serving.decoding import Sampler, token_logprob
from cluster.serving.slots import BusyError, Job, Line, Piece, Slot
from cluster.serving.steps import Chunk

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A child of Serve's logger, so that inside a replica its lines reach the replica's log file.
logger = logging.getLogger("ray.serve.rankline")

#: Tokens of prompts that are read in a round.
_CHUNK = 256


class ReadingSlot(Slot):
    """A job with its sampler, and how far its prompt is read."""

    def __init__(
        self, job: Job, emit: Callable[[Piece], None], tokenizer: PreTrainedTokenizerBase, number: int
    ) -> None:
        super().__init__(job, emit, tokenizer, number)
        self.taken = 0
        self.sample = Sampler(job.sampling)

    @property
    def is_writing(self) -> bool:
        """Whether its prompt is read."""
        return self.taken >= len(self.job.prompt)

    def chunk(self, most: int) -> Chunk:
        """What the model takes next: up to `most` tokens of the prompt, or the last token that was produced."""
        tokens = (self.token,) if self.is_writing else self.job.prompt[self.taken : self.taken + most]
        return Chunk(self.number, self.job.adapter, tokens, self.taken)


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

        text_config = model.config.get_text_config(decoder=True)
        self.vocab_size = int(text_config.vocab_size)
        self.context = int(getattr(text_config, "max_position_embeddings", None) or 2**31)
        self._steps = steps_for(model, max_concurrent)
        self._tokenizer, self._eos = tokenizer, frozenset(eos)
        self._numbers = itertools.count()
        self.line: Line[ReadingSlot] = Line(max_concurrent, max_waiting)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="rankline-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the worker lives."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job, emit: Callable[[Piece], None]) -> Slot:
        """`submit_all` of one."""
        return self.submit_all([job], [emit])[0]

    def submit_all(self, jobs: Sequence[Job], emits: Sequence[Callable[[Piece], None]]) -> list[Slot]:
        """Take in jobs, all or none. An `emit` is called on the worker thread and must not block; when it raises, its
        job ends.

        Raises:
            BusyError: as `Line.join`, or the engine is closed.
        """
        made = [
            ReadingSlot(job, emit, self._tokenizer, next(self._numbers)) for job, emit in zip(jobs, emits, strict=True)
        ]
        with self.line.changed:
            if self._closed:
                raise BusyError("the engine is closed")
            self.line.join(made)
        return list(made)

    def close(self) -> None:
        """End the worker; live jobs end with `cancelled`."""
        with self.line.changed:
            self._closed = True
            self.line.changed.notify()
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
            with self.line.changed:
                self._closed = True
            for slot in self.line.everybody:
                slot.send(Piece("", slot.produced, "cancelled"))

    def _round(self) -> None:
        """One pass over what is next of everybody who has a slot."""
        with self.line.changed:
            self.line.changed.wait_for(lambda: any(self.line.live) or self._closed)
        for slot in self.line.everybody:
            if slot.cancelled:
                self._end(slot, Piece("", slot.produced, "cancelled"))
        chunks = self._next_chunks(self.line.admit())
        for together in [chunks] if self._steps.together else [[chunk] for chunk in chunks]:
            if together:
                self._attempt(together)

    def _next_chunks(self, slots: list[ReadingSlot]) -> list[tuple[ReadingSlot, Chunk]]:
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

    def _attempt(self, chunks: list[tuple[ReadingSlot, Chunk]]) -> None:
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

    def _fail(self, slot: ReadingSlot) -> None:
        logger.exception("a generation step failed; the request is answered with an error")
        self._end(slot, Piece("", slot.produced, "error"))

    def _take(self, slot: ReadingSlot, logits: Tensor) -> None:
        """Choose the next token, and send what it says."""
        token, noted = slot.sample(logits), None
        if slot.job.top_logprobs is not None and token not in self._eos:
            noted = token_logprob(logits, token, slot.token, slot.job.top_logprobs, self._tokenizer)
        piece = slot.accept(token, self._eos, noted)
        if piece.finish is not None:
            self._end(slot, piece)
        elif piece.text:
            slot.send(piece)

    def _end(self, slot: ReadingSlot, piece: Piece) -> None:
        # The slot is free before the client hears of the end, so that its next request is not refused.
        if self.line.leave(slot):
            self._steps.release(slot.number)
            slot.send(piece)
