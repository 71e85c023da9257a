"""Scoring: losses as transformers computes them, labels of one token and of many, calibration, intervals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_tiny, make_tokens

from cluster import evaluate
from cluster.evaluate import ScoreJob, calibrated_log_loss, majority, paired_interval, read_rows, score, summarise
from cluster.model import build_variant, load_tokenizer


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ScoreJob:
    root = tmp_path_factory.mktemp("tiny")
    source = make_tiny(root)
    tokens = make_tokens(root / "tokens", source.shards / "units" / "meta", 12)
    return ScoreJob(source, "dense", tokens, 0, 12, 5, (), "float32", 8, False)


def test_nll_is_that_of_transformers(job: ScoreJob) -> None:
    model = build_variant(job.source, "dense", torch.float32)
    records = score(job)
    rows = read_rows(job.tokens, 0, None)
    assert [record["row"] for record in records] == [row.row for row in rows]
    for row, record in zip(rows, records, strict=True):
        labels = torch.tensor([row.labels])
        with torch.inference_mode():
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        assert record["num_tokens"] == count
        assert record["nll"] == pytest.approx(float(loss) * count, rel=1e-5)
    assert summarise(records, [])["loss"] == pytest.approx(
        sum(r["nll"] for r in records) / sum(r["num_tokens"] for r in records)
    )


@pytest.mark.parametrize("variant", ["dense", "nf4", "nf4_init"])
def test_batches_and_chunks_do_not_change_a_record(job: ScoreJob, variant: str) -> None:
    whole = score(replace(job, variant=variant, labels=("1", "3")))  # type: ignore[arg-type]
    alone = score(replace(job, variant=variant, labels=("1", "3"), batch_size=1, start=4, stop=7))  # type: ignore[arg-type]
    assert [record["row"] for record in alone] == [4, 5, 6]
    for one, other in zip(whole[4:7], alone, strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-5)
        assert one["label_logprobs"] == pytest.approx(other["label_logprobs"], rel=1e-4)
        assert one["predicted"] == other["predicted"]


def reference(job: ScoreJob, row: evaluate.Row, label: str) -> float:
    """log p(label | prompt), a token at a time."""
    model, tokenizer = build_variant(job.source, "dense", torch.float32), load_tokenizer(job.source.shards)
    ids, total = list(row.input_ids[: row.answer_start]), 0.0
    for token in tokenizer(label, add_special_tokens=False)["input_ids"]:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, dim=-1)[token])
        ids.append(int(token))
    return total


def test_the_fast_path_of_one_token_equals_the_general_one(job: ScoreJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label of two tokens beside them sends all through the general path."""
    fast = score(replace(job, labels=("1", "7")))
    general = score(replace(job, labels=("1", "7", "12")))
    rows = read_rows(job.tokens, 0, None)
    for row, one, other in zip(rows, fast, general, strict=True):
        assert one["label_logprobs"] == pytest.approx(other["label_logprobs"][:2], abs=1e-4)
        assert one["label_logprobs"][0] == pytest.approx(reference(job, row, "1"), abs=1e-4)


def test_labels_of_many_tokens_are_summed_and_the_best_wins(job: ScoreJob) -> None:
    labels = ("1", "13", "357")
    for row, record in zip(read_rows(job.tokens, 0, 3), score(replace(job, labels=labels, stop=3)), strict=True):
        expected = [reference(job, row, label) for label in labels]
        assert record["label_logprobs"] == pytest.approx(expected, abs=1e-4)
        assert record["predicted"] == labels[int(np.argmax(expected))]
        assert record["correct"] == (record["predicted"] == row.answer)


def test_exact_match_generates(job: ScoreJob) -> None:
    records = score(replace(job, stop=2, exact_match=True))
    assert all(isinstance(record["predicted"], str) and record["correct"] is False for record in records)
    assert summarise(records, [])["accuracy"] == 0.0


def test_summarise_normalises_over_the_labels() -> None:
    record = {"nll": 2.0, "num_tokens": 4, "correct": True, "answer": " yes"}
    result = summarise([record | {"label_logprobs": [math.log(0.1), math.log(0.3)]}], ["no", "yes"])
    assert result["loss"] == 0.5
    assert result["perplexity"] == pytest.approx(math.exp(0.5))
    assert result["label_log_loss"] == pytest.approx(-math.log(0.75))
    assert result["calibrated_log_loss"] is None, "too few rows to fit on"


def test_calibration_undoes_scale_and_bias() -> None:
    """Scores that are a distorted truth: calibrated, their log-loss is that of the truth; noise costs ln 2."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=2000) * 2
    truth = (generator.random(2000) < 1 / (1 + np.exp(-logits))).astype(int)
    best = float(np.mean(np.log1p(np.exp(-np.where(truth == 1, logits, -logits)))))
    distorted = np.stack([np.zeros(2000), 0.4 * logits + 3.0], axis=1) - 50.0
    found = calibrated_log_loss(distorted.tolist(), truth.tolist())
    assert found == pytest.approx(best, abs=0.01)
    noise = calibrated_log_loss(generator.normal(size=(2000, 2)).tolist(), generator.integers(0, 2, 2000).tolist())
    assert noise == pytest.approx(math.log(2), abs=0.01)


def test_majority() -> None:
    assert majority(["yes", " yes", "no"]) == ("yes", pytest.approx(2 / 3))


def test_paired_interval() -> None:
    assert paired_interval([True] * 5, [True] * 5) == {"difference": 0.0, "low": 0.0, "high": 0.0, "num_rows": 5.0}
    found = paired_interval([True] * 30 + [False] * 70, [False] * 20 + [True] * 5 + [False] * 75)
    spread = 1.96 * math.sqrt((25 * 0.75**2 + 0 * 1.25**2 + 75 * 0.25**2) / 99 / 100)
    assert found["difference"] == pytest.approx(0.25)
    assert found["high"] - found["difference"] == pytest.approx(spread)
    with pytest.raises(ValueError, match="argument 2"):
        paired_interval([True], [])
