"""SmolLM2-135M and rows of GSM8K as the stages of the line leave them on disk, made without Ray, once per process."""

from __future__ import annotations

import json
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.model import ModelSource
    from cluster.train_job import TrainJob

ROOT = Path(__file__).parent.parent
#: Rows that are trained on, and held-out ones that the loss is taken over.
TRAIN_ROWS, HELDOUT_ROWS = 90, 60
#: As `pipelines/configs/gsm8k.yaml` has it.
MAX_LENGTH = 448
_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


@cache
def scratch() -> Path:
    """A directory that lives as long as this process."""
    _SCRATCH.append(tempfile.TemporaryDirectory())
    return Path(_SCRATCH[-1].name)


@cache
def shards() -> Path:
    """The shard set of the whole model in fp32."""
    from line import shard_set

    return shard_set(scratch() / "shards")[1]


@cache
def splits(method: str = "nf4", rank: int = 0, n_iter: int | None = None) -> Path:
    """Every linear weight as `decompose` (its default SVD, of `rank`) and `quantize` by `method` leave it."""
    from cluster.architecture import select_targets
    from cluster.artifacts import ShardSet
    from cluster.durable import UnitStore
    from lowrank.config import DecomposeConfig, QuantizeConfig
    from pipelines.stages import decompose, quantize

    modules = [spec.name for spec in select_targets(ShardSet(shards()).architecture, "all-linear")]
    factors, store = UnitStore(scratch() / f"factors-{rank}"), UnitStore(scratch() / f"{method}-{rank}-{n_iter}")
    options = {} if n_iter is None else {"n_iter": n_iter}
    svd, packed = DecomposeConfig(rank=rank or None), QuantizeConfig(method=method, options=options)  # type: ignore[arg-type]
    for module in modules:
        if rank:
            decompose.decompose_unit(
                decompose.DecomposeJob(factors.root, shards(), module, (module,), svd, use_ray=False, task_cpus=1.0)
            )
        unit = quantize.QuantizeJob(store.root, shards(), factors.root / "units", module, method, packed)
        quantize.quantize_unit(unit)
    store.commit("index", partial(quantize._write_index, store, modules))
    return store.root


@cache
def tokens(part: str, rows: int, *, text: bool = False) -> Path:
    """`tokens.parquet` of the first rows of data/gsm8k; `text` scores all of a row, not its answer alone."""
    from cluster.config import DataConfig
    from cluster.data import prepare_tokens

    source = ROOT / "data" / "gsm8k" / f"{part}.jsonl"
    if not source.is_file():
        raise SystemExit(
            f"read {source}: there is no such file. Make it with python examples/make_gsm8k.py data/gsm8k."
        )
    lines = source.read_text().splitlines()[:rows]
    if text:
        parsed = [json.loads(line) for line in lines]
        lines = [json.dumps({"text": row["prompt"] + row["completion"]}) for row in parsed]
    out = scratch() / f"{part}-{rows}{'-text' if text else ''}"
    out.mkdir()
    (out / "rows.jsonl").write_text("\n".join(lines) + "\n")
    config = DataConfig(train=str(source), heldout=str(source), max_length=2 * MAX_LENGTH if text else MAX_LENGTH)
    prepare_tokens(str(out / "rows.jsonl"), shards() / "units" / "meta", config, out, use_ray=False)
    return out / "tokens.parquet"


def source(base: str) -> ModelSource:
    """LoRA, r = 8, on every linear layer over the `dense` or the `nf4` base."""
    from cluster.model import ModelSource
    from lowrank.config import AdapterConfig

    adapter = AdapterConfig(method="lora", r=8, lora_alpha=16.0, init="kaiming")
    return ModelSource(shards=shards(), splits=splits(), adapter=adapter, base=base)  # type: ignore[arg-type]


def training_job(name: str, base: str = "dense", **changes: Any) -> TrainJob:
    """A fine-tuning of the model on `TRAIN_ROWS` rows, as the stage would have it; `changes` are fields of finetune."""
    from cluster.config import FinetuneConfig
    from cluster.train_job import TrainJob

    start = source(base)
    fields: dict[str, Any] = {
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "eval_rows": HELDOUT_ROWS,
        "compute_dtype": "float32",
        "threads_per_worker": 2,
        "zero_stage": 2,
    }
    return TrainJob(
        source=start,
        config=FinetuneConfig(adapter=start.adapter, base=start.base, **(fields | changes)),
        train_tokens=tokens("train", TRAIN_ROWS),
        heldout_tokens=tokens("heldout", HELDOUT_ROWS),
        root=scratch() / "jobs" / name,
        storage=scratch() / "ray",
        name=name,
    )
