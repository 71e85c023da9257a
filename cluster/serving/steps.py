"""One forward pass over several requests, each with its own past, position and adapter.

The keys and values of all requests lie in one tensor per layer, a row each. A decode step takes the rows at the front,
so that nothing is gathered: requests change rows only when others come or go.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lowrank.inject import Mix, replace_module, saved_modules, speakers
from lowrank.linear import DenseLinear

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# A child of Serve's logger, so that inside a replica its lines reach the replica's log file.
logger = logging.getLogger("ray.serve.rankline")

#: Columns that a cache has at first; it doubles as requests grow.
_FIRST_COLUMNS = 64
#: Kinds of layers whose masks are known.
_KNOWN_LAYERS = ("full_attention", "sliding_attention")
#: Rotary embeddings whose frequencies depend on the longest request of a batch.
_BATCH_ROPES = ("dynamic", "longrope")


class Steps(Protocol):
    """What the engine asks of the model; requests are known by the numbers that it gives them."""

    together: bool
    """Whether several requests of a `decode` share a pass, which leaves none of them changed where it fails."""

    def prefill(self, request: int, adapter: str | None, tokens: Sequence[int], start: int) -> Tensor:
        """Take the next tokens of a prompt, of which `start` were taken before; logits (vocabulary,) after the last."""
        ...

    def decode(self, requests: Sequence[int], adapters: Sequence[str | None], tokens: Sequence[int]) -> list[Tensor]:
        """Take one token of each request; logits (vocabulary,) of each."""
        ...

    def release(self, request: int) -> None:
        """Forget a request."""
        ...


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
        rows, columns = _doubled(self._rows, last), _doubled(self._columns, self._end)
        # Layer by layer, so that no two sizes of the whole are there at once; done again from anywhere after a failure.
        for index, layer in self._layers.items():
            if layer[0].shape[0] < rows or layer[0].shape[2] < columns:
                keys, values = (_grown(held, rows, columns) for held in layer)
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


def _doubled(size: int, least: int) -> int:
    while size < least:
        size *= 2
    return size


def _grown(held: Tensor, rows: int, columns: int) -> Tensor:
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
        _refuse_unknown(model)
        self._cache = SlotCache()
        self._held: list[int | None] = [None] * rows
        self._lengths: dict[int, int] = {}
        self._mix: Mix | None = None
        self._windows = _windows(model.config.get_text_config(decoder=True))
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def prefill(self, request: int, adapter: str | None, tokens: Sequence[int], start: int) -> Tensor:
        """See `Steps`."""
        if start == 0:
            row = self._held.index(None)
            self._cache.clear(row)
            self._held[row] = request
        self._speak(adapter)
        self._lengths[request] = start + len(tokens)
        return self._forward(*self._place(self._held.index(request), [list(tokens)], [start]))[0]

    def decode(self, requests: Sequence[int], adapters: Sequence[str | None], tokens: Sequence[int]) -> list[Tensor]:
        """See `Steps`."""
        self._bring_to_front(requests)
        order = [requests.index(held) for held in self._held[: len(requests)] if held is not None]
        names = tuple(adapters[at] for at in order)
        if self._mix is None or self._mix.names != names:
            self._mix = Mix(names)
        mix = self._mix if self._mix.rows else None
        self._speak(mix if len(set(names)) > 1 else names[0])
        starts = [self._lengths[requests[at]] for at in order]
        logits = self._step(*self._place(0, [[tokens[at]] for at in order], starts), mix)
        for request in requests:
            self._lengths[request] += 1
        found: list[Tensor] = [logits[0]] * len(order)
        for row, at in enumerate(order):
            found[at] = logits[row]
        return found

    def release(self, request: int) -> None:
        """See `Steps`."""
        if request in self._lengths:
            self._held[self._held.index(request)] = None
            del self._lengths[request]
        if not self._lengths:
            self._cache = SlotCache()

    def _speak(self, who: str | Mix | None) -> None:
        for speaker in self._speakers:
            speaker.active = who

    def _bring_to_front(self, requests: Sequence[int]) -> None:
        wanted = set(requests)
        behind = [row for row in range(len(requests), len(self._held)) if self._held[row] in wanted]
        for row in range(len(requests)):
            if self._held[row] not in wanted:
                other = behind.pop()
                self._cache.swap(row, other)
                self._held[row], self._held[other] = self._held[other], self._held[row]

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

    def _step(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor], mix: Mix | None) -> Tensor:
        """`_forward` for one token of every row; `mix` is what speaks."""
        del mix
        return self._forward(ids, positions, masks)

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

    def prefill(self, request: int, adapter: str | None, tokens: Sequence[int], start: int) -> Tensor:
        """See `Steps`."""
        from transformers import DynamicCache

        if start == 0:
            self._caches[request] = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return self._pass(request, adapter, tokens)

    def decode(self, requests: Sequence[int], adapters: Sequence[str | None], tokens: Sequence[int]) -> list[Tensor]:
        """See `Steps`."""
        return [self._pass(r, name, [token]) for r, name, token in zip(requests, adapters, tokens, strict=True)]

    def release(self, request: int) -> None:
        """See `Steps`."""
        self._caches.pop(request, None)

    def _pass(self, request: int, adapter: str | None, tokens: Sequence[int]) -> Tensor:
        import torch

        for speaker in self._speakers:
            speaker.active = adapter
        ids = torch.tensor([list(tokens)], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=self._caches[request], use_cache=True, **self._extra)
        logits: Tensor = output.logits[0, -1]
        return logits


def steps_for(model: PreTrainedModel, rows: int) -> Steps:
    """The fastest steps that give the logits of `SingleSteps` in a short trial.

    The model's dense layers become `DenseLinear`.
    """
    from cluster.serving.fused import FusedSteps, is_llama_like

    quicken(model)
    kinds: list[type[BatchedSteps]] = [FusedSteps, BatchedSteps] if is_llama_like(model) else [BatchedSteps]
    for kind in kinds:
        if _fits(kind, model):
            return kind(model, rows)
        logger.warning("%s does not fit %s: its requests take a slower way", kind.__name__, type(model).__name__)
    return SingleSteps(model)


def quicken(model: nn.Module) -> None:
    """Let every dense layer take few tokens by the compiled product."""
    from torch import nn

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            replace_module(model, name, DenseLinear.of(module))


def _fits(kind: type[BatchedSteps], model: PreTrainedModel) -> bool:
    import torch

    try:
        with torch.inference_mode():
            return _same_logits(kind(model, 2), SingleSteps(model), model.dtype)
    except Exception:
        logger.warning("%s fails in %s", kind.__name__, type(model).__name__, exc_info=True)
        return False


def _same_logits(batched: Steps, single: Steps, dtype: torch.dtype) -> bool:
    """Whether two requests of different lengths get the same logits together as each alone."""
    import torch

    found = []
    for steps in (batched, single):
        first = steps.prefill(0, None, [1, 2, 3, 4, 5], 0)
        part = steps.prefill(1, None, [6, 7], 0)
        both = steps.decode([1, 0], [None, None], [3, 2])
        found.append(torch.stack([first, part, *both, *steps.decode([0, 1], [None, None], [5, 4])]).float())
    difference = (found[0] - found[1]).abs().max()
    return bool(difference <= max(1e-3, 8 * torch.finfo(dtype).eps) * found[1].abs().max())


def _refuse_unknown(model: PreTrainedModel) -> None:
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


def _windows(config: Any) -> dict[str, int | None]:
    """How far back each kind of layer sees, by the names that transformers gives the kinds; null is all."""
    window = getattr(config, "sliding_window", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
