"""The engine against transformers' own `generate`, and against itself with neighbours."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cluster.serving.decoding import Detokenizer, Sampler, Sampling, StopFilter
from cluster.serving.engine import Engine
from cluster.serving.slots import BusyError, Job, Line, Piece, Slot
from cluster.serving.steps import SingleSteps
from lowrank.inject import set_active

EOS = 256
ADAPTERS = [None, "one", "two"]
PROMPT = tuple(b"The quick brown fox")
GREEDY = Sampling(temperature=0)


class Listener:
    """Collects the pieces of one job."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[Piece] = queue.Queue()

    def wait(self) -> tuple[str, Piece]:
        text = ""
        while True:
            piece = self.pieces.get(timeout=30)
            text += piece.text
            if piece.finish is not None:
                return text, piece


@pytest.fixture
def engine(adapted: Any, tokenizer: Any) -> Iterator[Engine]:
    engine = Engine(adapted, tokenizer, [EOS], max_concurrent=4)
    yield engine
    engine.close()


def run(engine: Engine, *jobs: Job) -> list[tuple[str, Piece]]:
    listeners = [Listener() for _ in jobs]
    for job, listener in zip(jobs, listeners, strict=True):
        engine.submit(job, listener.pieces.put)
    return [listener.wait() for listener in listeners]


def reference(model: Any, tokenizer: Any, adapter: str | None, prompt: tuple[int, ...], max_tokens: int) -> Any:
    set_active(model, adapter)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens,
                         pad_token_id=EOS)  # fmt: skip
    new = out[0, len(prompt) :]
    finish = "stop" if int(new[-1]) == EOS else "length"
    return tokenizer.decode(new, skip_special_tokens=True), len(new), finish


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_greedy_equals_generate(engine: Engine, adapted: Any, tokenizer: Any, adapter: str | None) -> None:
    for max_tokens in (5, 60):
        [(text, last)] = run(engine, Job(adapter, PROMPT, max_tokens, GREEDY))
        assert (text, last.completion_tokens, last.finish) == reference(adapted, tokenizer, adapter, PROMPT, max_tokens)


def test_adapters_answer_differently(engine: Engine) -> None:
    texts = {run(engine, Job(adapter, PROMPT, 20, GREEDY))[0][0] for adapter in ADAPTERS}
    assert len(texts) == 3


def test_interleaved_equals_alone(engine: Engine) -> None:
    sampled = Sampling(temperature=0.9, top_p=0.95, seed=7)
    jobs = [Job(None, PROMPT, 40, GREEDY), Job("one", PROMPT, 50, sampled), Job("two", PROMPT[3:], 45, GREEDY),
            Job("one", PROMPT[5:], 30, GREEDY)]  # fmt: skip
    alone = [run(engine, job)[0] for job in jobs]
    assert run(engine, *jobs) == alone


def test_eos_ends_and_stays_out_of_the_text(adapted: Any, tokenizer: Any) -> None:
    engine = Engine(adapted, tokenizer, range(257), max_concurrent=1)
    [(text, last)] = run(engine, Job("one", PROMPT, 10, GREEDY))
    engine.close()
    assert (text, last.finish, last.completion_tokens) == ("", "stop", 1)


def test_stop_string_across_tokens(engine: Engine, adapted: Any, tokenizer: Any) -> None:
    whole, _, _ = reference(adapted, tokenizer, "two", PROMPT, 60)
    stop = whole[10:13]
    [(text, last)] = run(engine, Job("two", PROMPT, 60, GREEDY, (stop, "never there")))
    assert text == whole[: whole.index(stop)]
    assert last.finish == "stop"


def test_seed_repeats_and_matters(engine: Engine) -> None:
    def text(seed: int | None) -> str:
        return run(engine, Job("one", PROMPT, 40, Sampling(temperature=1.5, seed=seed)))[0][0]

    assert text(3) == text(3)
    assert text(3) != text(4)
    assert text(None) != text(None)


def test_busy_and_free_again(engine: Engine) -> None:
    release = threading.Event()
    slots = [engine.submit(Job(None, PROMPT, 200, GREEDY), lambda _: release.wait(10)) for _ in range(4)]
    with pytest.raises(BusyError, match="4 requests are there"):
        engine.submit(Job(None, PROMPT, 1), lambda _: None)
    for slot in slots:
        slot.cancel()
    release.set()
    deadline = time.monotonic() + 10
    while any(engine.line.live) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run(engine, Job(None, PROMPT, 3, GREEDY))[0][1].finish == "length"


def test_free_slots_go_to_the_adapter_that_has_the_fewest(adapted: Any, tokenizer: Any) -> None:
    engine = Engine(adapted, tokenizer, [EOS], max_concurrent=2, max_waiting=4)
    answered: list[str] = []
    held, release = threading.Event(), threading.Event()

    def hold(piece: Piece) -> None:
        held.set()
        release.wait(10)

    engine.submit(Job("one", PROMPT, 100, GREEDY), hold)
    assert held.wait(10)
    for adapter, name in [("one", "a"), ("one", "b"), ("one", "c"), ("two", "d"), (None, "e")]:
        engine.submit(Job(adapter, PROMPT, 3, GREEDY), lambda piece, name=name: piece.finish and answered.append(name))
    with pytest.raises(BusyError, match="6 requests are there; 2 at a time and 4 more"):
        engine.submit(Job(None, PROMPT, 1), lambda _: None)
    release.set()
    deadline = time.monotonic() + 20
    while any(engine.line.live) and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.close()
    assert answered == ["d", "e", "a", "b", "c"]


def test_one_model_takes_at_most_half_of_the_line(tokenizer: Any) -> None:
    line: Line[Slot] = Line(max_concurrent=2, max_waiting=4)

    def asked(adapter: str | None, many: int = 1) -> list[Slot]:
        return [Slot(Job(adapter, PROMPT, 1), lambda _: None, tokenizer, number) for number in range(many)]

    line.join(asked("one", 3))
    with pytest.raises(BusyError, match="3 requests of this model are there"):
        line.join(asked("one", 2))
    line.join(asked("one"))
    with pytest.raises(BusyError, match="half of them for one model"):
        line.join(asked("one"))
    line.join(asked("two", 2))
    assert line.live == (0, 6), "what was refused is not there"
    assert [slot.job.adapter for slot in line.admit()] == ["one", "two"]


def test_cancel_ends_early(engine: Engine) -> None:
    listener = Listener()
    slot = engine.submit(Job(None, PROMPT, 100_000, GREEDY), listener.pieces.put)
    slot.cancel()
    assert listener.wait()[1].finish == "cancelled"


@pytest.mark.parametrize("together", [True, False])
def test_a_step_that_fails_once_leaves_the_others_as_they_were(
    adapted: Any, tokenizer: Any, together: bool, engine_log: pytest.LogCaptureFixture
) -> None:
    engine = Engine(adapted, tokenizer, [EOS], max_concurrent=4)
    jobs = [Job("one", PROMPT, 30, GREEDY), Job("two", PROMPT[3:], 30, GREEDY), Job(None, PROMPT[5:], 30, GREEDY)]
    alone = [run(engine, job)[0] for job in jobs]
    if not together:
        engine._steps = SingleSteps(adapted)
    calls = []

    def fail(module: Any, given: Any) -> None:
        calls.append(len(given[0]))
        # After the layers have written their keys: the 20th pass alone, or the fifth of all three.
        if len(calls) == 20 if not together else calls.count(3) == 5 and calls[-1] == 3:
            calls.append(0)
            raise RuntimeError("no memory")

    hook = adapted.lm_head.register_forward_pre_hook(fail)
    try:
        found = run(engine, *jobs)
    finally:
        hook.remove()
        engine.close()
    ended = [last.finish for _, last in found]
    assert sorted(ended) == (["length"] * 3 if together else ["error", "length", "length"])
    assert all(one == other for one, other in zip(found, alone, strict=True) if one[1].finish == "length")
    assert "no memory" in engine_log.text


def test_a_failing_step_ends_its_own_job_only(engine: Engine) -> None:
    (_, broken), (_, fine) = run(engine, Job("one", (10**6,), 5), Job("one", PROMPT, 5, GREEDY))
    assert (broken.finish, fine.finish) == ("error", "length")
    assert engine.healthy


def test_a_listener_that_is_gone_frees_its_slot(engine: Engine) -> None:
    def gone(_: Piece) -> None:
        raise RuntimeError("event loop is closed")

    engine.submit(Job(None, PROMPT, 100_000, GREEDY), gone)
    deadline = time.monotonic() + 10
    while any(engine.line.live) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(engine.line.live)


def test_close_cancels_what_runs(adapted: Any, tokenizer: Any) -> None:
    engine, listener = Engine(adapted, tokenizer, [], 2), Listener()
    engine.submit(Job(None, PROMPT, 100_000, GREEDY), listener.pieces.put)
    engine.close()
    assert listener.wait()[1].finish == "cancelled"
    assert not engine.healthy
    with pytest.raises(BusyError):
        engine.submit(Job(None, PROMPT, 1), listener.pieces.put)


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語のテキスト", "🙂 and 👩‍👩‍👧 done", " a\n\nb  "])
def test_detokenizer_is_exact_and_never_half_a_character(tokenizer: Any, text: str) -> None:
    detokenizer = Detokenizer(tokenizer, tokenizer("prompt é").input_ids)
    pieces = [detokenizer.push(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert detokenizer.finish() == ""


def test_detokenizer_gives_up_half_a_character_at_the_end(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    tokens = tokenizer("ok🙂").input_ids[:-1]
    assert "".join(detokenizer.push(token) for token in tokens) == "ok"
    assert detokenizer.finish() == "\ufffd"


def test_detokenizer_equals_decode_on_garbage(tokenizer: Any) -> None:
    tokens = torch.randint(0, 257, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    detokenizer = Detokenizer(tokenizer, [])
    text = "".join(detokenizer.push(token) for token in tokens) + detokenizer.finish()
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("pieces", "stops", "sent", "stopped"),
    [
        (["ab", "cd"], [], "abcd", False),
        (["ab", "cd", "ef"], ["bc"], "a", True),
        (["ab", "ab", "ac"], ["abac"], "ab", True),
        (["xEN", "D"], ["END"], "x", True),
        (["xEN", "d"], ["END"], "xENd", False),
        (["xEN"], ["END"], "xEN", False),
        (["one two three"], ["three", "two"], "one ", True),
    ],
)
def test_stop_filter(pieces: list[str], stops: list[str], sent: str, stopped: bool) -> None:
    stop_filter = StopFilter(stops)
    text = "".join(stop_filter.push(piece) for piece in pieces)
    assert (text + stop_filter.finish(), stop_filter.stopped) == (sent, stopped)


def test_sampler_follows_the_distribution_and_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampler = Sampler(Sampling(seed=0))
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    nucleus = Sampler(Sampling(top_p=0.6, seed=0))
    assert {nucleus(logits) for _ in range(200)} == {0, 1}
    assert {Sampler(Sampling(top_p=0.0))(logits) for _ in range(20)} == {0}
    for temperature in (1e-6, 1e-38, 1e-45, 5e-324):
        assert {Sampler(Sampling(temperature=temperature))(logits) for _ in range(20)} == {0}
