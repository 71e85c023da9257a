"""Score held-out rows: loss in nats per answer token, and accuracy over a closed label set or by greedy exact match.

Every variant sees the same token ids. A row's label is the one with the largest summed log-probability after the
prompt, the end-of-turn token not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.durable import reading
from cluster.model import ModelSource, Variant, build_variant, compute_dtype, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

IGNORE = -100


@dataclass(frozen=True)
class ScoreJob:
    """Rows [start, stop) of a token table, scored by one variant."""

    source: ModelSource
    variant: Variant
    tokens: Path
    start: int
    stop: int
    batch_size: int
    labels: tuple[str, ...]
    dtype: str
    max_new_tokens: int
    exact_match: bool
    threads: int = 1


@dataclass(frozen=True)
class Row:
    """One tokenised row; `answer_start` is where the last answer begins."""

    row: int
    input_ids: list[int]
    labels: list[int]
    answer: str

    @property
    def answer_start(self) -> int:
        """First position of the last labelled span."""
        last = max(i for i, label in enumerate(self.labels) if label != IGNORE)
        start = last
        while start > 0 and self.labels[start - 1] != IGNORE:
            start -= 1
        return max(start, 1)


def read_rows(tokens: Path, start: int, stop: int | None) -> list[Row]:
    """Rows [start, stop) of a token table.

    Raises:
        DamagedError: it is no table of tokens.
    """
    import pyarrow.parquet as pq

    columns = ["row", "input_ids", "labels", "answer"]
    with reading(tokens):
        table = pq.read_table(tokens, columns=columns).slice(start, None if stop is None else stop - start)
        return [Row(r["row"], r["input_ids"], r["labels"], r["answer"]) for r in table.to_pylist()]


@lru_cache(maxsize=1)
def _model(source: ModelSource, variant: Variant, dtype: str, device: str) -> PreTrainedModel:
    """The model of a variant, kept by the worker for its next unit of the same variant."""
    from cluster.unpack import unpack_if_room

    computed = compute_dtype(dtype, device)
    model = build_variant(source, variant, computed).to(device)
    if device == "cpu":
        unpack_if_room(model, computed)
    return model


def score(job: ScoreJob) -> list[dict[str, Any]]:
    """One record per row: nll (nats), num_tokens, label_logprobs, predicted, correct (null without labels)."""
    import torch

    torch.set_num_threads(job.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return score_with(_model(job.source, job.variant, job.dtype, device), job)


def score_with(model: PreTrainedModel, job: ScoreJob) -> list[dict[str, Any]]:
    """`score` of a model that is there already, in place of the job's variant."""
    import torch

    tokenizer = load_tokenizer(job.source.shard_set)
    label_ids = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in job.labels]
    rows = sorted(read_rows(job.tokens, job.start, job.stop), key=lambda row: (len(row.input_ids), row.row))
    records = []
    with torch.inference_mode():
        for i in range(0, len(rows), job.batch_size):
            records += _score_batch(model, rows[i : i + job.batch_size], job, label_ids)
        if job.exact_match and not job.labels:
            by_row = {row.row: row for row in rows}
            for record in records:
                record["predicted"] = greedy(model, tokenizer, by_row[record["row"]], job.max_new_tokens)
                record["correct"] = record["predicted"].strip() == record["answer"].strip()
    return sorted(records, key=lambda record: int(record["row"]))


def _score_batch(
    model: PreTrainedModel, rows: Sequence[Row], job: ScoreJob, label_ids: list[list[int]]
) -> list[dict[str, Any]]:
    fast = bool(label_ids) and all(len(ids) == 1 for ids in label_ids)
    nll, first = _answer_nll(model, rows)
    if fast:
        choices = first[:, [ids[0] for ids in label_ids]].tolist()
    else:
        per_label = [_continuation_logprob(model, rows, ids) for ids in label_ids]
        choices = [list(values) for values in zip(*per_label)] if per_label else [[] for _ in rows]
    return [
        _record(row, job, float(value), logprobs)
        for row, value, logprobs in zip(rows, nll.tolist(), choices, strict=True)
    ]


def _record(row: Row, job: ScoreJob, nll: float, logprobs: list[float]) -> dict[str, Any]:
    predicted = job.labels[max(range(len(logprobs)), key=logprobs.__getitem__)] if logprobs else None
    return {
        "row": row.row,
        "variant": job.variant,
        "nll": nll,
        "num_tokens": sum(label != IGNORE for label in row.labels),
        "answer": row.answer,
        "label_logprobs": logprobs,
        "predicted": predicted,
        "correct": None if predicted is None else predicted.strip() == row.answer.strip(),
    }


def _pad(sequences: Sequence[Sequence[int]], value: int, device: Any) -> Tensor:
    """Right-padded (batch, longest); a causal model never looks to the right, so no mask is needed."""
    import torch

    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *([value] * (width - len(sequence)))] for sequence in sequences], device=device)


def _logprobs(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """log p(next token) at the given positions of every row: (batch, positions, vocabulary), fp32."""
    import torch

    output = model(input_ids=ids, use_cache=False, logits_to_keep=positions)
    return torch.log_softmax(output.logits.float(), dim=-1)


def _answer_nll(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Summed answer NLL per row, and log-probabilities at the last position before each row's last answer."""
    import torch

    device = next(model.parameters()).device
    ids = _pad([row.input_ids for row in rows], 0, device)
    targets = _pad([row.labels for row in rows], IGNORE, device)[:, 1:]
    wanted = (targets != IGNORE).any(dim=0)
    starts = torch.tensor([row.answer_start - 1 for row in rows], device=device)
    wanted[starts] = True
    positions = wanted.nonzero().flatten()
    logprobs = _logprobs(model, ids, positions)
    kept = targets[:, positions]
    mask = kept != IGNORE
    gathered = logprobs.gather(-1, kept.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nll = -(gathered * mask).double().sum(dim=1)
    where = torch.searchsorted(positions, starts)
    return nll, logprobs[torch.arange(len(rows), device=device), where]


def _continuation_logprob(model: PreTrainedModel, rows: Sequence[Row], label: list[int]) -> list[float]:
    """log p(label | prompt) per row, summed over the label's tokens."""
    import torch

    device = next(model.parameters()).device
    starts = [row.answer_start for row in rows]
    ids = _pad([[*row.input_ids[:start], *label] for row, start in zip(rows, starts)], 0, device)
    positions = torch.tensor(sorted({start - 1 + k for start in starts for k in range(len(label))}), device=device)
    logprobs = _logprobs(model, ids, positions)
    lookup = {int(position): i for i, position in enumerate(positions.tolist())}
    return [
        sum(float(logprobs[i, lookup[start - 1 + k], token]) for k, token in enumerate(label))
        for i, start in enumerate(starts)
    ]


def greedy(model: PreTrainedModel, tokenizer: Any, row: Row, max_new_tokens: int) -> str:
    """The greedy answer to a row's prompt."""
    import torch

    device = next(model.parameters()).device
    prompt = torch.tensor([row.input_ids[: row.answer_start]], device=device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    text: str = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    return text


def sample_answers(job: ScoreJob) -> list[dict[str, Any]]:
    """Greedy answers of one variant to the first rows, for the report."""
    import torch

    torch.set_num_threads(job.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = _model(job.source, job.variant, job.dtype, device), load_tokenizer(job.source.shard_set)
    answers = []
    with torch.inference_mode():
        for row in read_rows(job.tokens, job.start, job.stop):
            prompt = tokenizer.decode(row.input_ids[: row.answer_start])
            text = greedy(model, tokenizer, row, job.max_new_tokens)
            answers.append(
                {"row": row.row, "variant": job.variant, "prompt": prompt, "expected": row.answer, "got": text}
            )
    return answers


def summarise(records: Sequence[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Loss, perplexity, accuracy and label log-losses of one variant over all its rows."""
    tokens = sum(record["num_tokens"] for record in records)
    loss = math.fsum(record["nll"] for record in records) / tokens
    judged = [bool(record["correct"]) for record in records if record["correct"] is not None]
    result: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sum(judged) / len(judged) if judged else None,
        "num_tokens": tokens,
        "num_rows": len(records),
    }
    if labels:
        truth = [_index(labels, record["answer"]) for record in records]
        scores = [record["label_logprobs"] for record in records]
        result["label_log_loss"] = _log_loss(scores, truth)
        result["calibrated_log_loss"] = calibrated_log_loss(scores, truth)
    return result


def _index(labels: Sequence[str], answer: str) -> int:
    return [label.strip() for label in labels].index(answer.strip())


def _log_loss(scores: Sequence[Sequence[float]], truth: Sequence[int]) -> float:
    """−log p(true label), with the probabilities normalised over the label set; mean in nats."""
    import numpy as np
    from scipy.special import log_softmax

    normalised = log_softmax(np.asarray(scores, dtype=np.float64), axis=1)
    return float(-normalised[np.arange(len(truth)), truth].mean())


def calibrated_log_loss(scores: Sequence[Sequence[float]], truth: Sequence[int]) -> float | None:
    """Log-loss after temperature and label biases are fitted, each half of the rows on the other half.

    Source: Guo et al., arXiv 1706.04599 (vector scaling); two-fold, so that no row is scored by its own fit.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    if len(labels) < 20:
        return None
    values = values - values.mean(axis=1, keepdims=True)
    folds = [np.arange(len(labels)) % 2 == k for k in (0, 1)]

    def loss(theta: Any, rows: Any) -> float:
        logits = log_softmax(theta[0] * values[rows] + theta[1:], axis=1)
        nll = -logits[np.arange(int(rows.sum())), labels[rows]].sum()
        return float(nll + 0.5 * ((theta - start) ** 2).sum())

    start = np.array([1.0] + [0.0] * values.shape[1])
    total = 0.0
    for fit, held in (folds, folds[::-1]):
        theta = minimize(loss, start, args=(fit,), method="L-BFGS-B").x
        total += loss(theta, held) - 0.5 * float(((theta - start) ** 2).sum())
    return total / len(labels)


def majority(answers: Iterable[str]) -> tuple[str, float]:
    """The most frequent answer and its share."""
    from collections import Counter

    counted = Counter(answer.strip() for answer in answers)
    label, count = counted.most_common(1)[0]
    return label, count / counted.total()


def paired_interval(ours: Sequence[bool], theirs: Sequence[bool]) -> dict[str, float]:
    """Mean difference of accuracy over the same rows with its 95 % interval (normal approximation of paired rows)."""
    differences = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(n - 1, 1) / n)
    return {"difference": mean, "low": mean - 1.96 * spread, "high": mean + 1.96 * spread, "num_rows": float(n)}
