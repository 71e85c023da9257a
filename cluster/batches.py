"""Which rows make which optimizer step, micro-batch and sequence: pure functions of the seed and the lengths.

A global batch never depends on the number of workers. Rows of similar length go together, because on CPUs padding
costs as much as real tokens; with packing, several rows share one sequence instead.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.rows import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.config import FinetuneConfig
    from cluster.tokens import TokenTable

#: Global batches whose rows are sorted by length together; more sort better and shuffle less.
WINDOW = 8

MicroBatch = list[list[int]]
"""Sequences of one forward pass; each is a list of rows (one row, or several when packed). Empty: a dummy."""


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any values, the same in every process and version."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def global_batches(lengths: Sequence[int], config: FinetuneConfig, epoch: int = 0) -> list[list[int]]:
    """The rows of every optimizer step of one epoch; each row stands in exactly one batch.

    Rows are shuffled, sorted by length within windows of `WINDOW` batches, cut, and the batches of a window shuffled.

    Args:
        lengths: Tokens per row.
        config: `seed`, `global_batch_size`. Nothing about workers enters.
        epoch: Another epoch, another order.

    Returns:
        Row numbers by step; the smaller last batch is kept, and stands last.
    """
    size = config.global_batch_size
    shuffle = random.Random(derived_seed("order", config.seed, epoch))
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), WINDOW * size):
        window = sorted(order[start : start + WINDOW * size], key=lambda row: (lengths[row], row))
        batches += _cut(window, size, shuffle)
    return batches


def _cut(window: list[int], size: int, shuffle: random.Random) -> list[list[int]]:
    rest = len(window) % size
    # The smaller batch is drawn from all lengths: were it the longest rows, they would always share a step.
    small = sorted(shuffle.sample(range(len(window)), rest))
    last = [window[index] for index in small]
    chosen = set(small)
    full = [row for index, row in enumerate(window) if index not in chosen]
    batches = [full[start : start + size] for start in range(0, len(full), size)]
    shuffle.shuffle(batches)
    return [*batches, last] if last else batches


def pack(rows: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put rows into as few sequences of `max_length` tokens as first-fit decreasing finds."""
    bins: list[tuple[int, list[int]]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        for index, (used, members) in enumerate(bins):
            if used + lengths[row] <= max_length:
                members.append(row)
                bins[index] = (used + lengths[row], members)
                break
        else:
            bins.append((lengths[row], [row]))
    return [members for _, members in bins]


def micro_batches(sequences: MicroBatch, rank: int, world: int, micro_batch_size: int) -> list[MicroBatch]:
    """The share of one rank of a global batch; every rank gets the same number of micro-batches.

    Neighbours in `sequences` (of similar length) run at the same time on different ranks, so that no rank waits long
    for another. A rank that runs out of rows gets empty micro-batches: DeepSpeed needs equal backward counts.

    Args:
        sequences: The global batch, sorted by length.
        rank: This worker.
        world: Workers.
        micro_batch_size: Sequences per forward pass.
    """
    count = num_micro_batches(len(sequences), world, micro_batch_size)
    return [chunk[rank::world] for chunk in _chunks(sequences, count)]


def num_micro_batches(sequences: int, world: int, micro_batch_size: int) -> int:
    """Forward passes of each rank for a global batch of so many sequences."""
    return max(1, -(-sequences // (world * micro_batch_size)))


def _chunks(sequences: MicroBatch, count: int) -> list[MicroBatch]:
    """`count` contiguous chunks whose sizes differ by at most one."""
    small, extra = divmod(len(sequences), count)
    bounds = [index * small + min(index, extra) for index in range(count + 1)]
    return [sequences[low:high] for low, high in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Plan:
    """The steps of a whole training: which rows at which step, and how they are cut for one rank."""

    lengths: Sequence[int]
    config: FinetuneConfig
    max_length: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return -(-len(self.lengths) // self.config.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the training."""
        steps = self.steps_per_epoch * self.config.epochs
        return min(steps, self.config.max_steps or steps)

    def epoch_of(self, step: int) -> int:
        """Epoch (from 0) that holds step `step` (from 0)."""
        return step // self.steps_per_epoch

    def batches(self, epoch: int) -> list[list[int]]:
        """The global batches of an epoch."""
        return global_batches(self.lengths, self.config, epoch)

    def sequences(self, batch: Sequence[int]) -> MicroBatch:
        """The sequences of a global batch, longest last."""
        if self.config.packing:
            packed = pack(batch, self.lengths, self.max_length)
            return sorted(packed, key=lambda rows: (sum(self.lengths[row] for row in rows), rows))
        return [[row] for row in sorted(batch, key=lambda row: (self.lengths[row], row))]


def learning_rate(step: int, total_steps: int, config: FinetuneConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up, then half a cosine down to `min_lr_ratio`.

    Example:
        >>> from cluster.config import FinetuneConfig
        >>> config = FinetuneConfig(learning_rate=1.0, warmup_ratio=0.5)
        >>> [round(learning_rate(step, 4, config), 3) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    import math

    warmup = math.ceil(config.warmup_ratio * total_steps) if config.warmup_ratio else 0
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    low = config.min_lr_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass; `position_ids` only where rows are packed."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    num_answer_tokens: int
    num_tokens: int


def collate(sequences: MicroBatch, tokens: TokenTable) -> Batch:
    """Right-pad sequences to the longest; an empty micro-batch becomes one token without loss.

    No attention mask is needed: attention is causal and the padding stands last, without loss.

    Args:
        sequences: Rows per sequence.
        tokens: Where the rows are.
    """
    import torch

    if not sequences:
        sequences_ids, sequences_labels, positions = [[0]], [[IGNORE]], [[0]]
    else:
        sequences_ids = [[int(t) for row in rows for t in tokens.input_ids(row)] for rows in sequences]
        sequences_labels = [_labels(rows, tokens) for rows in sequences]
        positions = [[at for row in rows for at in range(tokens.lengths[row])] for rows in sequences]
    width = max(map(len, sequences_ids))
    packed = any(len(rows) > 1 for rows in sequences)
    return Batch(
        input_ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences_ids]),
        labels=torch.tensor([row + [IGNORE] * (width - len(row)) for row in sequences_labels]),
        # Padding starts a document of its own, so that it cannot be taken for the last row's continuation.
        position_ids=torch.tensor([at + list(range(width - len(at))) for at in positions]) if packed else None,
        num_answer_tokens=sum(tokens.num_answer_tokens[row] for rows in sequences for row in rows),
        num_tokens=sum(tokens.lengths[row] for rows in sequences for row in rows),
    )


def _labels(rows: Sequence[int], tokens: TokenTable) -> list[int]:
    return [IGNORE if at == 0 else int(label) for row in rows for at, label in enumerate(tokens.labels(row))]
