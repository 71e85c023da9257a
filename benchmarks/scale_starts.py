"""Fixed costs for `benchmarks/scale_micro.py`: starts, imports and first calls, each timed on its own on toy inputs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError


def measure(root: Path) -> dict[str, float]:
    """Seconds by what starts, `process_bytes` of a training worker, and the seconds of one checkpoint."""
    from tiny import make_tiny, make_tokens

    clock = _Clock()
    from cluster.session import connect, disconnect, start_or_adopt, stop
    from cluster.units import run_units
    from pipelines import preflight, workflow  # noqa: F401  what the driver imports
    from pipelines.tracking import Tracker

    try:
        connect(start_or_adopt(root))
        tracker = Tracker(root, None, "scale")
        tracker.begin("scale", {"a": 1}, {"b": "c"}, None)
        found = {"start": clock.lap()}
        source = make_tiny(root / "toy")
        clock.lap()
        for name, first in (("shard", _first_meta), ("decompose", _first_fit), ("quantize", _first_split)):
            with tracker.stage(name, "0" * 20, {}):
                items = [source.shards / "units" / "meta"] * 2
                if name == "shard":  # `meta` is one task, and the shards wait for it
                    run_units(first, items[:1], on_done=_nothing)
                run_units(first, items, on_done=_nothing)
            found[name] = clock.lap()
        with tracker.stage("finetune", "0" * 20, {}):
            _tokenise(root, source.shards / "units" / "meta")
            found |= _train(root)
        found["finetune"] = clock.lap()
        _tokenise(root / "many", source.shards / "units" / "meta", by_ray=True)
        found["ray_data"] = clock.lap()
        tokens = make_tokens(root / "rows", source.shards / "units" / "meta", 4)
        clock.lap()
        with tracker.stage("evaluate", "0" * 20, {}):
            _tokenise(root / "heldout", source.shards / "units" / "meta")
            run_units(_first_score, [(source, tokens)] * 2, on_done=_nothing)
        found["evaluate"] = clock.lap()
        with tracker.stage("register", "0" * 20, {}):
            _register(root, tracker)
        found["register"] = clock.lap()
        return found
    finally:
        disconnect()
        stop(root)


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def _nothing(_item: Any, _result: Any) -> None: ...


def _first_meta(directory: Path) -> int:
    """The first call of shard's tasks: transformers, and a toy model on the meta device."""
    from cluster.architecture import describe, load_config

    return len(describe(load_config(directory)).parameters)


def _first_fit(_directory: Path) -> float:
    """The first call of decompose's tasks."""
    import torch

    from lowrank.blocks import BlockMatrix
    from lowrank.decompositions import decompose
    from lowrank.executor import SerialExecutor
    from lowrank.rank import RankRule

    matrix = BlockMatrix.from_tensor("small", torch.randn(96, 64))
    return decompose(matrix, rule=RankRule(rank=4), executor=SerialExecutor()).report.relative_error


def _first_split(_directory: Path) -> float:
    """The first call of quantize's tasks."""
    import torch

    from lowrank.quantization.residual import split_weight

    return split_weight("small", torch.randn(96, 64), None, "nf4").plain_error


def _first_score(job: Any) -> int:
    """The first call of evaluate's tasks: a toy model of two layers, one row scored and one token decoded."""
    from cluster.evaluate import ScoreJob, sample_answers

    source, tokens = job
    toy = ScoreJob(source, "nf4", tokens, 0, 1, 1, (), "float32", 1, False)
    return len(sample_answers(toy))


def _tokenise(root: Path, tokenizer: Path, by_ray: bool = False) -> None:
    """Four rows, in this process or as if they were many."""
    from tiny import arithmetic_rows, write_jsonl

    from cluster import data
    from cluster.config import DataConfig

    out = root / "four"
    out.mkdir(parents=True)
    file = str(write_jsonl(root / "four.jsonl", arithmetic_rows(4)))
    before, data.WORTH_RAY_BYTES = data.WORTH_RAY_BYTES, 0 if by_ray else data.WORTH_RAY_BYTES
    data.prepare_tokens(file, tokenizer, DataConfig(train=file, heldout=file), out, use_ray=True)
    data.WORTH_RAY_BYTES = before


def _train(root: Path) -> dict[str, float]:
    """Ray Train with two workers, each with DeepSpeed around one layer: memory of a worker, seconds of a checkpoint."""
    import json

    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        _train_toy,
        train_loop_config={"root": str(root)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="toy", storage_path=str(root / "train")),
    ).fit()
    found = json.loads((root / "toy.json").read_text())
    return {"process_bytes": found["bytes"], "checkpoint": found["checkpoint"]}


def _train_toy(arguments: dict[str, Any]) -> None:
    """What a worker does before its first step, around a layer of eight numbers."""
    import json

    import ray.train
    import torch
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from cluster.config import FinetuneConfig
    from cluster.durable import UnitStore, peak_rss_bytes
    from cluster.train_engine import _initialize
    from cluster.train_loop import set_environment
    from cluster.zero import deepspeed_config

    set_environment(False)
    layer = torch.nn.Linear(8, 8)
    world = ray.train.get_context().get_world_size()
    settings = deepspeed_config(FinetuneConfig(), stage=2, world=world, dtype="float32", bucket=2**18)
    engine = _initialize(layer, [{"params": list(layer.parameters())}], settings, False)
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
    if ray.train.get_context().get_world_rank():
        return
    root = Path(arguments["root"])
    began = time.perf_counter()

    def write(out: Path) -> dict[str, Any]:
        torch.save(layer.state_dict(), out / "state.pt")
        return {}

    UnitStore(root).commit("toy-checkpoint", write)
    facts = {"bytes": peak_rss_bytes(), "checkpoint": time.perf_counter() - began}
    (root / "toy.json").write_text(json.dumps(facts))


def _register(root: Path, tracker: Any) -> None:
    """The figures that `register` draws, empty but for one line each, and a version of a directory of one file."""
    from pipelines.plots import finish, svg

    def draw(ax: Any) -> None:
        ax.plot([1, 2, 3], [1, 4, 9])
        finish(ax, "toy")

    for index in range(8):
        svg(draw, f"toy-{index}", "toy")
    bundle = root / "bundle"
    bundle.mkdir()
    (bundle / "README.md").write_text("toy")
    try:
        tracker.register("toy", bundle, {"rankline.key": "0" * 20}, "champion", lambda _holder: "")
    except ClusterError as error:
        raise RuntimeError("the toy version was refused") from error
