"""From logits to tokens and from tokens to text, for one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 5
#: Below it all but the largest logits have no probability left, and fp32 soon no number for 1 / temperature.
_LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else from the top-p nucleus of softmax(logits/T)."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


class Sampler:
    """Draws tokens with a generator of its own, so that no other request can disturb a seeded one."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator: torch.Generator | None = None

    def __call__(self, logits: Tensor) -> int:
        """The next token id from logits (vocabulary,)."""
        import torch

        if self._sampling.temperature == 0:
            return int(logits.argmax())
        scores = logits.float().cpu()
        # Shifted first: a tiny temperature would make infinities, and inf − inf inside the softmax.
        scores = (scores - scores.max()) / max(self._sampling.temperature, _LEAST_TEMPERATURE)
        probabilities = torch.softmax(scores, dim=-1)
        if self._sampling.top_p < 1:
            probabilities = _nucleus(probabilities, self._sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._rng()))

    def _rng(self) -> torch.Generator:
        if self._generator is None:
            import torch

            self._generator = torch.Generator()
            if self._sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._sampling.seed)
        return self._generator


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of tokens whose probability reaches `top_p`; the first always stays.

    Source: Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    ordered, index = probabilities.sort(descending=True, stable=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    outside[0] = False
    return probabilities.index_fill(0, index[outside], 0.0)


#: In place of a log-probability below what fp32 holds, as JSON knows no infinity.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token as text, log p of it, and the likeliest tokens with theirs; p is the model's, untempered.

    `offset` is where its text begins in the answer. A token that ends inside a character has U+FFFD for text.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    offset: int = 0


def token_logprob(
    logits: Tensor, token: int, before: int, top: int, tokenizer: PreTrainedTokenizerBase
) -> TokenLogprob:
    """What the model gave `token` in logits (vocabulary,) after the token `before`, beside its `top` likeliest.

    Raises:
        FloatingPointError: the logits are not numbers.
    """
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    if bool(torch.isnan(logprobs).any()):
        raise FloatingPointError("the model's logits are not numbers")
    values, ids = logprobs.topk(top)
    likeliest = list(zip(ids.tolist(), values.tolist(), strict=True))
    return with_texts(token, before, float(logprobs[token]), likeliest, tokenizer)


def with_texts(
    token: int,
    before: int,
    logprob: float,
    likeliest: Sequence[tuple[int, float]],
    tokenizer: PreTrainedTokenizerBase,
) -> TokenLogprob:
    """The log-probabilities of `token` and the likeliest ones, with their texts after the token `before`."""
    texts = [_text_after(before, own, tokenizer) for own in (token, *(own for own, _ in likeliest))]
    values = [max(value, _LEAST_LOGPROB) for value in (logprob, *(value for _, value in likeliest))]
    return TokenLogprob(texts[0], values[0], tuple(zip(texts[1:], values[1:], strict=True)))


def _text_after(before: int, token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a token in its place: SentencePiece drops the space of a first one."""

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    start, whole = decode([before]), decode([before, token])
    return whole[len(start) :] if whole.startswith(start) and not start.endswith(_REPLACEMENT) else decode([token])


class Detokenizer:
    """Text of a growing list of tokens, piece by piece, never half a character.

    A byte-level token may end inside a UTF-8 character, and SentencePiece drops the space of a first token; so a piece
    is the difference of two decodings of a short window that starts in tokens already written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._start = 0
        self._written = len(self._ids)

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain, possibly none."""
        self._ids.append(token)
        before, after = self._window()
        if after.endswith(_REPLACEMENT) or len(after) <= len(before):
            return ""
        self._start, self._written = self._written, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """What was held back, for good or ill."""
        before, after = self._window()
        self._written = self._start = len(self._ids)
        return after[len(before) :]

    def _window(self) -> tuple[str, str]:
        return self._decode(self._ids[self._start : self._written]), self._decode(self._ids[self._start :])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopFilter:
    """Lets text through up to the first stop string, holding back what might be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to send now; sets `stopped` when a stop string is complete."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """What was held back when no stop string came after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)
