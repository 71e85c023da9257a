"""The compiled walk gives the products that torch gives, and says nothing where there is no compiler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.kernels import attend, both_products, build, dense, grouped, kronecker, products
from lowrank.kernels.products import _by_panels

needs_compiler = pytest.mark.skipif(build.kernel() is None, reason="no C compiler")


@needs_compiler
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 90), st.sampled_from([8, 16, 24]), st.integers(1, 5))
def test_both_products_are_those_of_torch(rows: int, n: int, width: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + n)
    w, x = torch.randn(rows, n, generator=generator), torch.randn(n, width, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, z = both_products(w, x)
        again = both_products(w, x)
    finally:
        torch.set_num_threads(before)
    exact_y = w.double() @ x.double()
    exact_z = w.double().T @ exact_y
    torch.testing.assert_close(y.double(), exact_y, rtol=0, atol=1e-5 * float(exact_y.abs().max()))
    torch.testing.assert_close(z.double(), exact_z, rtol=0, atol=1e-5 * float(exact_z.abs().max()))
    assert torch.equal(y, again[0])
    assert torch.equal(z, again[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 24, 40])
def test_without_a_kernel_torch_multiplies(monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(products, "kernel", lambda: None)
    w, x = torch.randn(600, 50, dtype=dtype), torch.randn(50, width, dtype=dtype)
    for got, expected in zip(both_products(w, x), (w @ x, w.T @ (w @ x))):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert _by_panels(w, x)[1].is_contiguous()


def pair(a: torch.Tensor, bt: torch.Tensor, scaling: float) -> grouped.Pair:
    return grouped.readable(grouped.Pair(a, bt, scaling))


def change(one: grouped.Pair, x: torch.Tensor) -> torch.Tensor:
    """s B A x in fp64."""
    return one.scaling * (one.a.double() @ x.double()) @ one.bt.double()


@pytest.mark.parametrize("rank", [8, 64])
def test_a_pair_is_read_where_it_lies(rank: int) -> None:
    a, b = torch.randn(rank, 40), torch.randn(30, rank)
    read = grouped.readable(grouped.Pair(a, b.T))
    assert (read.a.data_ptr(), read.bt.data_ptr()) == (a.data_ptr(), b.data_ptr())


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 600),
    st.integers(1, 70),
    st.lists(st.one_of(st.integers(1, 150), st.sampled_from([8, 16, 64, 72])), min_size=1, max_size=12),
    st.integers(1, 20),
)
def test_every_token_gets_the_pair_of_its_own(compiled: bool, m: int, n: int, ranks: list[int], tokens: int) -> None:
    generator = torch.Generator().manual_seed(m * 1000 + n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # B as it lies, and turned.
    pairs = [pair(normal(r, n), normal(m, r).T if at % 2 else normal(r, m), 0.5 + at) for at, r in enumerate(ranks)]
    owner = torch.randint(-1, len(pairs), (tokens,), generator=generator).tolist()
    x, y = normal(tokens, n), normal(tokens, m)
    expected = y.double()
    for token, number in enumerate(owner):
        if number >= 0:
            expected[token] += change(pairs[number], x[token])
    speaking = sorted({number for number in owner if number >= 0})
    if not speaking:
        return
    own = [[t for t in range(tokens) if owner[t] == number] for number in speaking]
    # The first pair's tokens as runs of one, which libraries multiply.
    parts = [([slice(t, t + 1) for t in ts], []) if at == 0 and tokens % 2 else ([], ts) for at, ts in enumerate(own)]
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(grouped, "kernel", lambda: None)
        owners = [grouped.PairSet([pairs[number]], [0]) for number in speaking]
        grouped.GroupedPairs(owners, 1, grouped.Layout(parts)).add_to(y, x)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_pairs_of_several_layers_with_one_input(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(grouped, "kernel", lambda: None)
    monkeypatch.setattr(grouped, "_BYTES_PER_THREAD", 64)
    widths, firsts, n, tokens = [40, 7, 600], [0, 40, 47], 33, 30
    normal = torch.randn
    pairs = [[pair(normal(r, n), normal(m, r).T, 1.5) if r else None for r, m in zip(ranks, widths, strict=True)]
             for ranks in ((3, 72, 8), (0, 16, 2), (0, 0, 0))]  # fmt: skip
    parts: list[tuple[list[slice], list[int]]] = [([], [0, 5, 7, 9, 12]), ([slice(13, 29)], [2]), ([], [1])]
    x, y = normal(tokens, n), normal(tokens, sum(widths) + 5)
    expected = y.double()
    for own, (runs, alone) in zip(pairs, parts, strict=True):
        for token in [*alone, *(t for run in runs for t in range(run.start, run.stop))]:
            for one, first in zip(own, firsts, strict=True):
                if one is not None:
                    expected[token, first : first + one.bt.shape[1]] += change(one, x[token])
    owners = [*(grouped.PairSet(own, firsts) for own in pairs[:2]), None]
    grouped.GroupedPairs(owners, 3, grouped.Layout(parts)).add_to(y[:, : sum(widths)], x)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_pairs_of_another_dtype_are_not_read_as_fp32() -> None:
    kinds = (torch.float32, torch.float64)
    pairs = [pair(torch.randn(3, 5, dtype=dtype), torch.randn(3, 4, dtype=dtype), 0.5) for dtype in kinds]
    x, y = torch.randn(2, 5), torch.zeros(2, 4)
    expected = torch.stack([change(one, x[i]) for i, one in enumerate(pairs)])
    owners = [grouped.PairSet([one], [0]) for one in pairs]
    grouped.GroupedPairs(owners, 1, grouped.Layout([([], [0]), ([], [1])])).add_to(y, x)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)


@needs_compiler
@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(1, 200), st.integers(1, 4))
def test_few_tokens_times_a_weight(tokens: int, m: int, n: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(tokens * 1000 + n)
    x, w = torch.randn(tokens, n, generator=generator), torch.randn(m, n, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, wide = dense.product(x, w), dense.product(x[:, :1].expand(tokens, n), w)
    finally:
        torch.set_num_threads(before)
    if tokens > dense.MOST_TOKENS:
        assert y is None
        return
    assert y is not None
    assert wide is not None
    exact = x.double() @ w.double().T
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    torch.testing.assert_close(wide, x[:, :1] * w.sum(1), rtol=1e-3, atol=1e-3)


@needs_compiler
def test_large_weights_on_two_threads_and_what_does_not_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1003, 517, generator=generator)
    for tokens in (1, 4, 5, 16, 17, 33):
        x = torch.randn(tokens, 517, generator=generator)
        y = dense.product(x, w)
        torch.testing.assert_close(y, x @ w.T, rtol=1e-4, atol=1e-3)
    assert dense.product(x.double(), w.double()) is None
    assert dense.product(x, w.T.contiguous().T) is None
    assert dense.product(x[:0], w) is None


@needs_compiler
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([(4, 4, 8), (6, 2, 64), (9, 3, 80), (8, 1, 16), (5, 1, 128)]),
    st.lists(st.integers(0, 150), min_size=1, max_size=20),
    st.sampled_from([None, 1, 40]),
)
def test_attention_over_each_past_is_that_of_torch(
    sizes: tuple[int, int, int], columns: list[int], window: int | None
) -> None:
    heads = attend.Heads(*sizes, scale=sizes[2] ** -0.5, window=window)
    generator = torch.Generator().manual_seed(sum(columns))
    tokens, wide = len(columns), heads.heads * heads.size
    keys = torch.randn(tokens, heads.kv_heads, heads.size, 160, generator=generator)
    values = torch.randn(tokens, heads.kv_heads, 160, heads.size, generator=generator)
    rows = torch.randperm(tokens, generator=generator)
    qkv = 3 * torch.randn(tokens, wide + 2 * heads.kv_heads * heads.size, generator=generator)
    query, key, value = (part.clone() for part in qkv.split([wide, *[heads.kv_heads * heads.size] * 2], dim=1))
    angles = torch.randn(tokens, heads.size // 2, generator=generator).repeat(1, 2)
    turns = angles.cos(), angles.sin()
    at = attend.Tokens(rows, torch.tensor(columns), max(columns) + 1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        x = x.view(tokens, -1, heads.size)
        first, second = x.chunk(2, dim=-1)
        return x * turns[0][:, None] + torch.cat((-second, first), dim=-1) * turns[1][:, None]

    attend.keep(heads, qkv, turns, (keys, values), at)
    said = attend.attend(heads, qkv, (keys, values), at).view(tokens, heads.heads, heads.size)
    for token, (row, column) in enumerate(zip(rows.tolist(), columns, strict=True)):
        torch.testing.assert_close(keys[row, :, :, column], turned(key)[token])
        assert torch.equal(values[row, :, column], value.view(tokens, -1, heads.size)[token])
        first = max(0, column + 1 - (window or column + 1))
        seen = keys[row, :, :, first : column + 1].mT.double(), values[row, :, first : column + 1].double()
        grouped = turned(query)[token].view(heads.kv_heads, -1, heads.size).double()
        expected = torch.nn.functional.scaled_dot_product_attention(grouped, *seen, scale=heads.scale)
        torch.testing.assert_close(said[token].double(), expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_rms_norm_is_that_of_torch() -> None:
    x, weight = torch.randn(7, 90), torch.randn(90)
    torch.testing.assert_close(attend.rms_norm(x, weight, 1e-3), torch.nn.functional.rms_norm(x, (90,), weight, 1e-3))


@needs_compiler
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([(2, 6), (3, 4), (12, 1), (1, 12)]), min_size=1, max_size=5),
    st.lists(st.sampled_from([(5, 4), (1, 20), (20, 1), (2, 10)]), min_size=5, max_size=5),
    st.lists(st.sampled_from([0, 1, 3]), min_size=5, max_size=5),
    st.integers(1, 9),
)
def test_every_token_gets_the_kronecker_product_of_its_own(
    rows: list[tuple[int, int]], columns: list[tuple[int, int]], ranks: list[int], tokens: int
) -> None:
    generator = torch.Generator().manual_seed(len(rows) * 10 + tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    factors = []
    for (up, vp), (uq, vq), r in zip(rows, columns, ranks):
        factors.append((normal(up, uq), *((normal(vp, r), normal(r, vq)) if r else (normal(vp, vq),))))
    owner = torch.randint(-1, len(factors), (tokens,), generator=generator).tolist()
    x, y = normal(tokens, 20), normal(tokens, 17)
    part, expected = y[:, 3:15], y.double()
    for token, own in enumerate(owner):
        if own >= 0:
            w1, *second = (factor.double() for factor in factors[own])
            weight = torch.kron(w1, torch.linalg.multi_dot(second) if len(second) > 1 else second[0])
            expected[token, 3:15] += weight @ x[token].double()
    own_tokens = [[token for token in range(tokens) if owner[token] == at] for at in range(len(factors))]
    ready = [kronecker.GroupedKroneckers.prepared(own) for own in factors]
    kronecker.GroupedKroneckers(ready, own_tokens).add_to(part, x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
