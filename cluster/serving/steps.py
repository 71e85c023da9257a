"""Passes over several requests, each with its own past, position and adapter.

The keys and values of all requests lie in one tensor per layer, a row each. A decode step takes the rows at the front,
so that nothing is gathered: requests change rows only when others come or go.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lowrank.inject import saved_modules, speakers
from lowrank.mixing import Mix

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# A child of Serve's logger, so that inside a replica its lines reach the replica's log file.
logger = logging.getLogger("ray.serve.rankline")

#: Columns that a cache has at first; it doubles as requests grow.
_FIRST_COLUMNS = 64
#: Kinds of layers whose masks are known.
_KNOWN_LAYERS = ("full_attention", "sliding_attention")
#: Rotary embeddings whose frequencies depend on the longest request of a batch.
_BATCH_ROPES = ("dynamic", "longrope")


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a request, which has taken `start` before; `adapter` is None for the bare base."""

    request: int
    adapter: str | None
    tokens: tuple[int, ...]
    start: int


class Steps(Protocol):
    """What the engine asks of the model; requests are known by the numbers that it gives them."""

    together: bool
    """Whether several chunks share a pass, which may be asked for again where it fails."""

    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Take a chunk of each of some requests; logits (vocabulary,) after the last token of each chunk."""
        ...

    def release(self, request: int) -> None:
        """Forget a request."""
        ...


class Rows:
    """Which row of a cache belongs to which request."""

    def __init__(self, count: int) -> None:
        self.held: list[int | None] = [None] * count

    def of(self, request: int) -> int:
        """The row of a request."""
        return self.held.index(request)

    def open(self, request: int) -> bool:
        """Give a request a row; whether it had none."""
        if request in self.held:
            return False
        self.held[self.held.index(None)] = request
        return True

    def release(self, request: int) -> bool:
        """Take a request's row back; whether all are free now."""
        if request in self.held:
            self.held[self.of(request)] = None
        return not any(held is not None for held in self.held)


class SlotCache:
    """Keys and values of several requests, a row each; what transformers' models take for `past_key_values`.

    Rows and columns double as they are needed, and all goes when nothing is held.
    """

    def __init__(self) -> None:
        import torch

        self._rows, self._columns = 1, _FIRST_COLUMNS
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._at: tuple[int, int, Tensor, Tensor] = (0, 0, torch.empty(0), torch.empty(0))
        self._start = 0
        self._end = 0

    def begin(self, first: int, starts: Tensor, length: int) -> int:
        """Say where the next pass writes: rows first.., `length` tokens each, from columns `starts`; columns in sight.

        More than one token at a time is for one row alone.
        """
        import torch

        last = first + len(starts)
        self._at = (first, last, torch.arange(first, last, device=starts.device), starts)
        self._start = int(starts[0])
        self._end = int(starts.max()) + length
        rows, columns = doubled(self._rows, last), doubled(self._columns, self._end)
        # Layer by layer, so that no two sizes of the whole are there at once; done again from anywhere after a failure.
        for index, layer in self._layers.items():
            if layer[0].shape[0] < rows or layer[0].shape[2] < columns:
                keys, values = (grown(held, rows, columns) for held in layer)
                self._layers[index] = keys, values
        self._rows, self._columns = rows, columns
        return self._end

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values (rows, heads, length, size), and give all that these rows may see."""
        if layer_idx not in self._layers:
            made = (new.new_zeros(self._rows, new.shape[1], self._columns, new.shape[3]) for new in (keys, values))
            self._layers[layer_idx] = next(made), next(made)
        first, last, rows, starts = self._at
        seen = []
        for held, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            if new.shape[2] == 1:
                held[rows, :, starts] = new[:, :, 0]
            else:
                held[first:last, :, self._start : self._end] = new
            seen.append(held[first:last, :, : self._end])
        return seen[0], seen[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of this pass; only asked where no positions were given."""
        del layer_idx
        return self._start

    def clear(self, row: int) -> None:
        """Wipe a row: what is masked counts nothing only while it is finite."""
        for layer in self._layers.values():
            for held in layer:
                held[row : row + 1].zero_()

    def swap(self, row: int, other: int) -> None:
        """Exchange two rows; all layers or none."""
        done: list[Tensor] = []
        try:
            for layer in self._layers.values():
                for held in layer:
                    _exchange(held, row, other)
                    done.append(held)
        except Exception:
            for held in done:
                _exchange(held, row, other)
            raise


def doubled(size: int, least: int) -> int:
    """The first of size, 2 size, 4 size ... that is not below `least`."""
    while size < least:
        size *= 2
    return size


def grown(held: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, heads, columns, size) with `held` at the front and zeros behind."""
    wide = held.new_zeros(rows, held.shape[1], columns, held.shape[3])
    wide[: held.shape[0], :, : held.shape[2]] = held
    return wide


def _exchange(held: Tensor, row: int, other: int) -> None:
    kept = held[row].clone()
    held[row] = held[other]
    held[other] = kept


class BatchedSteps:
    """All decoding requests in one pass."""

    together = True

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        """Args: model: in evaluation mode, with its adapters injected. rows: most requests at a time.

        Raises:
            ValueError: what a request would get depends on its neighbours, or on masks that are not known.
        """
        self._model = model
        self._speakers = speakers(model)
        refuse_unknown(model)
        self._cache = SlotCache()
        self._rows = Rows(rows)
        self._mix: Mix | None = None
        self._windows = windows_of(model.config.get_text_config(decoder=True))
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """See `Steps`: single tokens after the first share a pass, each of the other chunks has its own."""
        for chunk in chunks:
            if self._rows.open(chunk.request):
                self._cache.clear(self._rows.of(chunk.request))
        # A request's first chunk makes its row of the cache, however short it is.
        single = [chunk for chunk in chunks if len(chunk.tokens) == 1 and chunk.start > 0]
        found = {chunk.request: self._read(chunk) for chunk in chunks if chunk not in single}
        if single:
            found |= self._decode(single)
        return [found[chunk.request] for chunk in chunks]

    def _read(self, chunk: Chunk) -> Tensor:
        self._speak(chunk.adapter)
        return self._forward(*self._place(self._rows.of(chunk.request), [list(chunk.tokens)], [chunk.start]))[0]

    def _decode(self, chunks: Sequence[Chunk]) -> dict[int, Tensor]:
        by_request = {chunk.request: chunk for chunk in chunks}
        self._bring_to_front(list(by_request))
        order = [by_request[held] for held in self._rows.held[: len(chunks)] if held is not None]
        self._mix = mix_of([chunk.adapter for chunk in order], self._mix)
        self._speak(self._mix if len(set(self._mix.names)) > 1 else self._mix.names[0])
        logits = self._forward(*self._place(0, [list(c.tokens) for c in order], [c.start for c in order]))
        return {chunk.request: own for chunk, own in zip(order, logits, strict=True)}

    def release(self, request: int) -> None:
        """See `Steps`."""
        if self._rows.release(request):
            self._cache = SlotCache()

    def _speak(self, who: str | Mix | None) -> None:
        for speaker in self._speakers:
            speaker.active = who

    def _bring_to_front(self, requests: Sequence[int]) -> None:
        wanted, held = set(requests), self._rows.held
        behind = [row for row in range(len(requests), len(held)) if held[row] in wanted]
        for row in range(len(requests)):
            if held[row] not in wanted:
                other = behind.pop()
                self._cache.swap(row, other)
                held[row], held[other] = held[other], held[row]

    def _place(
        self, first: int, tokens: list[list[int]], starts: list[int]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Tokens and positions (rows, length) and the masks of a pass over rows first.., for which the cache is set."""
        import torch

        device = self._model.device
        begins = torch.tensor(starts, device=device)
        length = len(tokens[0])
        columns = self._cache.begin(first, begins, length)
        positions = begins[:, None] + torch.arange(length, device=device)
        return torch.tensor(tokens, device=device), positions, self._masks(positions, columns)

    def _masks(self, positions: Tensor, columns: int) -> dict[str, Tensor]:
        """What is added to the scores (rows, 1, length, columns) in each kind of layer."""
        import torch

        ages = positions[:, None, :, None] - torch.arange(columns, device=positions.device)
        dtype = self._model.dtype
        # Additive: not every attention understands a mask of truths.
        hidden, shown = torch.finfo(dtype).min, torch.zeros((), dtype=dtype, device=positions.device)
        return {
            kind: torch.where((ages >= 0) & (ages < (window or columns)), shown, hidden)
            for kind, window in self._windows.items()
        }

    def _forward(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor]) -> Tensor:
        """Logits (rows, vocabulary) after the last token of every row."""
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=next(iter(masks.values())) if len(masks) == 1 else masks,
            past_key_values=self._cache,
            use_cache=True,
            **self._extra,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class SingleSteps:
    """Each request by itself, for models that cannot be asked for several with their own pasts at once."""

    together = False

    def __init__(self, model: PreTrainedModel) -> None:
        """Args: model: in evaluation mode, with its adapters injected."""
        self._model = model
        self._speakers = speakers(model)
        self._caches: dict[int, Any] = {}
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """See `Steps`."""
        return [self._pass(chunk) for chunk in chunks]

    def release(self, request: int) -> None:
        """See `Steps`."""
        self._caches.pop(request, None)

    def _pass(self, chunk: Chunk) -> Tensor:
        import torch
        from transformers import DynamicCache

        if chunk.start == 0:
            config = self._model.config.get_text_config(decoder=True)
            self._caches[chunk.request] = DynamicCache(config=config)
        for speaker in self._speakers:
            speaker.active = chunk.adapter
        ids = torch.tensor([list(chunk.tokens)], device=self._model.device)
        cache = self._caches[chunk.request]
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **self._extra)
        logits: Tensor = output.logits[0, -1]
        return logits


def mix_of(names: Sequence[str | None], before: Mix | None) -> Mix:
    """The mix of these rows; the one before where it is the same, because layers prepare themselves for each."""
    return before if before is not None and before.names == tuple(names) else Mix(tuple(names))


def refuse_unknown(model: PreTrainedModel) -> None:
    """What a short trial would not show."""
    config = model.config.get_text_config(decoder=True)
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes.get("rope_type"), *(own.get("rope_type") for own in ropes.values() if isinstance(own, dict))]
    if any(kind in _BATCH_ROPES for kind in kinds):
        raise ValueError(f"rotary embeddings {kinds} depend on the longest request of a batch")
    unknown = set(getattr(config, "layer_types", None) or ()) - set(_KNOWN_LAYERS)
    if unknown or hasattr(config, "attention_types"):
        raise ValueError(f"layers {sorted(unknown)} are masked in ways of their own")
    for name, module in saved_modules(model):
        if any(True for _ in module.base.children()):
            raise ValueError(f"{name}, which adapters replace, is no single layer")


def windows_of(config: Any) -> dict[str, int | None]:
    """How far back each kind of layer sees, by the names that transformers gives the kinds; null is all."""
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
