"""Batches: nothing about workers in their composition, every row once, and packed loss equal to unpacked loss."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer, make_tokens, tiny_model
from tolerance import tol

from cluster.answer_loss import answer_nll
from cluster.batches import Plan, collate, global_batches, learning_rate, micro_batches, num_micro_batches, pack
from cluster.config import FinetuneConfig
from cluster.tokens import TokenTable


def lengths_of(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(2, 64) for _ in range(count)]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(count=st.integers(1, 200), size=st.integers(1, 33), epoch=st.integers(0, 2), seed=st.integers(0, 3))
def test_every_row_once_and_only_the_last_batch_is_smaller(count: int, size: int, epoch: int, seed: int) -> None:
    config = FinetuneConfig(global_batch_size=size, seed=seed)
    batches = global_batches(lengths_of(count), config, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert len(batches) == Plan(lengths_of(count), config, 64).steps_per_epoch


def test_the_order_depends_on_seed_and_epoch_and_not_on_workers() -> None:
    lengths = lengths_of(100)
    config = FinetuneConfig(num_workers=1, micro_batch_size=1)
    other = FinetuneConfig(num_workers=4, micro_batch_size=8)
    assert global_batches(lengths, config) == global_batches(lengths, other)
    assert global_batches(lengths, config, 1) != global_batches(lengths, config)
    assert global_batches(lengths, FinetuneConfig(seed=1)) != global_batches(lengths, config)
    # A frozen value: a change here silently changes every training.
    assert global_batches([3, 1, 2, 5, 4], FinetuneConfig(global_batch_size=2)) == [[4, 3], [2, 0], [1]]


def test_rows_of_a_batch_are_of_similar_length() -> None:
    lengths = lengths_of(512)
    config = FinetuneConfig(global_batch_size=8)
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in global_batches(lengths, config))
    assert sum(lengths) / padded > 0.85


@settings(derandomize=True, deadline=None, max_examples=60)
@given(count=st.integers(1, 40), world=st.integers(1, 5), size=st.integers(1, 9))
def test_ranks_share_a_batch_in_equally_many_micro_batches(count: int, world: int, size: int) -> None:
    sequences = [[row] for row in range(count)]
    shares = [micro_batches(sequences, rank, world, size) for rank in range(world)]
    assert {len(share) for share in shares} == {num_micro_batches(count, world, size)}
    assert max(len(micro) for share in shares for micro in share) <= size
    rows = sorted(row for share in shares for micro in share for sequence in micro for row in sequence)
    assert rows == list(range(count))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(count=st.integers(1, 60), seed=st.integers(0, 5))
def test_packing_fills_without_overflow(count: int, seed: int) -> None:
    lengths = lengths_of(count, seed)
    packed = pack(range(count), lengths, 64)
    used = [sum(lengths[row] for row in rows) for rows in packed]
    assert max(used) <= 64
    assert sorted(row for rows in packed for row in rows) == list(range(count))
    assert sum(length <= 32 for length in used) <= 1


def test_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    config = FinetuneConfig(learning_rate=1.0, warmup_ratio=0.1, min_lr_ratio=0.2)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0.2 <= rates[-1] < 0.21
    assert learning_rate(0, 1, FinetuneConfig(learning_rate=1.0, warmup_ratio=0.0)) == 1.0


def test_a_plan_stops_at_max_steps() -> None:
    plan = Plan([5] * 10, FinetuneConfig(global_batch_size=4, epochs=3, max_steps=7), 64)
    assert (plan.steps_per_epoch, plan.total_steps, plan.epoch_of(6)) == (3, 7, 2)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    root = tmp_path_factory.mktemp("tokens")
    return TokenTable.read(make_tokens(root / "tok", make_tokenizer(root / "tokenizer"), 8))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gpt2"])
def test_packed_padded_and_single_losses_are_equal(arch: str, tokens: TokenTable) -> None:
    model = tiny_model(arch)
    with torch.no_grad():
        single = [float(answer_nll(model, collate([[row]], tokens))) for row in range(8)]
        padded = float(answer_nll(model, collate([[row] for row in range(8)], tokens)))
        packed = float(answer_nll(model, collate([[0, 1, 2], [3, 4, 5, 6], [7]], tokens)))
        full = model(input_ids=collate([[3]], tokens).input_ids).logits[0, :-1]
    labels = torch.tensor(tokens.labels(3)[1:]).long()
    assert single[3] == pytest.approx(float(torch.nn.functional.cross_entropy(full, labels, reduction="sum")), rel=1e-5)
    assert padded == pytest.approx(sum(single), rel=tol(torch.float32))
    assert packed == pytest.approx(sum(single), rel=tol(torch.float32))


def test_an_empty_micro_batch_has_no_loss_and_a_zero_gradient(tokens: TokenTable) -> None:
    model = tiny_model("llama")
    batch = collate([], tokens)
    assert (batch.num_answer_tokens, batch.num_tokens) == (0, 0)
    loss = answer_nll(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0
    assert all(
        float(parameter.grad.abs().max()) == 0.0 for parameter in model.parameters() if parameter.grad is not None
    )
