"""Every quantization that a pipeline can name gives the initial model it reports, and takes its own options only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from lines import make_data, run_serially, tiny_pipeline

from cluster.artifacts import ShardSet, SplitSet
from cluster.model import ModelSource, build_adapted
from lowrank.config import QuantizeConfig
from lowrank.quantization import METHODS
from lowrank.quantize_options import QUANTIZE_OPTIONS
from pipelines.config import PipelineConfig, parse, to_dict
from pipelines.errors import ConfigError


def line(tmp_path: Path, method: str, **options: Any) -> PipelineConfig:
    """The tiny line with another quantization, α = 3r."""
    base = to_dict(tiny_pipeline(tmp_path, None, data=make_data(tmp_path)))
    base["quantize"] |= {"method": method, "options": options}
    base["decompose"] |= {"rank": 4}
    base["finetune"]["adapter"] |= {"r": 4, "lora_alpha": 12.0}
    return parse(base)


def test_every_method_can_be_named() -> None:
    named = set(get_args(get_type_hints(QuantizeConfig)["method"]))
    assert named == set(METHODS) == set(QUANTIZE_OPTIONS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_initial_model_is_what_the_split_reports(tmp_path: Path, method: str) -> None:
    config = line(tmp_path, method, **({} if method == "nf4" else {"n_iter": 2}))
    paths = run_serially(config, "shard", "decompose", "quantize")
    shards, splits = ShardSet(paths["shard"]), SplitSet(paths["quantize"])
    source = ModelSource(paths["shard"], paths["quantize"], config.finetune.adapter)
    built = build_adapted(source, torch.float32, {"init": None})
    for record in splits.records:
        weight = shards.load(f"{record['module']}.weight").float()
        layer: Any = built.get_submodule(record["module"])
        made = layer.base.dense_weight() + layer.adapters["init"].delta_weight().detach()
        error = float((weight.double() - made.double()).norm() / weight.double().norm())
        assert error == pytest.approx(record["quantization_error"], rel=1e-4)
        assert record["quantization_error"] <= record["plain_error"]
        stored = splits.load(record["module"])
        assert record["factor_bytes"] == stored.factor_bytes
        assert (stored.packed_factors is not None) == (method == "lplr" and not stored.fallback)


def test_options_reach_the_method(tmp_path: Path) -> None:
    errors = []
    for n_iter in (1, 6):
        config = dataclasses.replace(line(tmp_path, "lq_lora", n_iter=n_iter), name=f"rounds-{n_iter}")
        records = SplitSet(run_serially(config, "shard", "decompose", "quantize")["quantize"]).records
        errors.append(sum(record["quantization_error"] for record in records))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("nf4", {"n_iter": 2}, "quantize.options.n_iter: unknown setting"),
        ("loftq", {"n_iter": 0}, "quantize.options: .*n_iter = 0 < 1"),
        ("lq_lora", {"tol": 1.0}, "quantize.options.tol: unknown setting"),
    ],
)
def test_options_of_another_method_are_config_errors(
    tmp_path: Path, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        line(tmp_path, method, **options)


def test_an_adapter_smaller_than_the_split_is_a_config_error_for_every_split(tmp_path: Path) -> None:
    base = to_dict(line(tmp_path, "loftq"))
    base["finetune"]["adapter"]["r"] = 2
    with pytest.raises(ConfigError, match=r"finetune\.adapter\.r: 2 is smaller than decompose\.rank = 4"):
        parse(base)
