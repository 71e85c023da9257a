"""Products that quantize keeps in their own form, through the line: what fits together, starts and is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lines import make_data, run_serially, tiny_pipeline

from cluster.artifacts import ShardSet, SplitSet
from cluster.model import ModelSource, build_variant
from pipelines import run
from pipelines.config import PipelineConfig, parse, to_dict
from pipelines.errors import ConfigError

#: Settings of decompose and of the adapter, by name.
LINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lokr": ({"method": "kronecker", "rank": 1, "options": {"shape": [4, 4]}}, {"options": {"factor": 4}}),
    "krona": ({"method": "kronecker", "rank": 1}, {}),
    "loha": ({"method": "hadamard", "rank": 1, "options": {"n_iter": 5}}, {"r": 2}),
    "abba": ({"method": "hadamard", "rank": 1, "options": {"n_iter": 5}}, {}),
    "lokh": ({"method": "khatri_rao_low_rank", "rank": 1}, {}),
    "kradapter": ({"method": "khatri_rao", "rank": None}, {"options": {"scale": 2.0}}),
}


def sections(family: str) -> dict[str, Any]:
    """decompose, quantize and adapter of a line that keeps the family's product."""
    decompose, adapter = LINES[family]
    return {
        "decompose": {"options": {}} | decompose,
        "quantize": {"part": "structured"},
        "finetune": {"adapter": {"method": family, "init": "split", "lora_alpha": 6.0} | adapter},
    }


def line(tmp_path: Path, family: str, head: Any = None, **changes: dict[str, Any]) -> PipelineConfig:
    """The tiny line with the family's product; `changes` are merged over it, field by field."""
    base = to_dict(tiny_pipeline(tmp_path, head, data=make_data(tmp_path)))
    for given in (sections(family), changes):
        for name, values in given.items():
            adapter = values.get("adapter")
            base[name] |= {key: value for key, value in values.items() if key != "adapter"}
            if adapter:
                base[name]["adapter"] |= adapter
    return parse(base)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in ("krona", "abba") else ()) for name in LINES]
)
def test_the_initial_model_is_q_and_the_product(tmp_path: Path, family: str) -> None:
    config = line(tmp_path, family)
    paths = run_serially(config, "shard", "decompose", "quantize")
    shards, splits = ShardSet(paths["shard"]), SplitSet(paths["quantize"])
    source = ModelSource(paths["shard"], paths["quantize"], config.finetune.adapter)
    built = build_variant(source, "nf4_init", torch.float32)
    for record in splits.records:
        module, split = record["module"], splits.load(record["module"])
        weight = shards.load(f"{module}.weight").double()
        layer: Any = built.get_submodule(module)
        made = layer.base.dense_weight() + layer.adapters["init"].delta_weight().detach()
        assert float((weight - made.double()).norm() / weight.norm()) == pytest.approx(
            record["quantization_error"], rel=1e-4
        )
        assert record["quantization_error"] <= record["plain_error"]
        assert record["factor_bytes"] == split.factor_bytes
        assert record["fallback"] == (record["part"] is None)
        assert record["part"] in (None, config.decompose.method)
    assert any(record["part"] for record in splits.records)


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a family without the form": (
        "lokr",
        {"finetune": {"adapter": {"method": "loha", "options": {}}}},
        "finetune.adapter.method: 'loha' cannot start from the kronecker product .* one of krona, lokr, or "
        "decompose.method to 'hadamard'",
    ),
    "lora": (
        "loha",
        {"finetune": {"adapter": {"method": "lora"}}},
        "finetune.adapter.method: 'lora' cannot start from the hadamard product .* one of abba, loha",
    ),
    "a pair for a product": (
        "loha",
        {"quantize": {"part": "low_rank"}},
        "'loha' cannot hold the L and R .* 'nf4', or decompose.method to 'hadamard' and quantize.part to 'structured'",
    ),
    "no product": (
        "loha",
        {"decompose": {"method": "exact_svd", "rank": 2, "options": {}}},
        "quantize.part: 'structured' keeps the product of hadamard, .*'exact_svd' gives none",
    ),
    "no part at all": (
        "loha",
        {"quantize": {"method": "nf4"}},
        "quantize.part: 'structured' is for the methods qpissa",
    ),
    "factors in four bits": ("loha", {"quantize": {"method": "lplr"}}, "quantize.part: .*; got 'lplr'"),
    "replace": ("loha", {"decompose": {"mode": "replace"}}, "quantize.part: decompose.mode 'replace' trains a pair"),
    "cut": ("loha", {"quantize": {"max_rank": 2}}, "quantize.max_rank: a structured part is never cut"),
    "another start": ("loha", {"finetune": {"adapter": {"init": "kaiming"}}}, "'kaiming' would lose the part"),
    "some layers": ("loha", {"finetune": {"adapter": {"target_modules": ["up_proj"]}}}, "would lose the part"),
    "two products": ("lokr", {"decompose": {"rank": 2}}, "decompose.rank: lokr holds one Kronecker product"),
    "padding": (
        "krona",
        {"decompose": {"options": {"padding": "zero"}}},
        "decompose.options.padding: krona has no rows to trim",
    ),
    "both factors cut": (
        "lokr",
        {"finetune": {"adapter": {"options": {"decompose_both": True}}}},
        "adapter.options.decompose_both: it would cut",
    ),
    "a small rank": (
        "lokr",
        {"decompose": {"options": {"inner_rank": 3}}, "finetune": {"adapter": {"r": 2}}},
        "finetune.adapter.r: 2 is smaller than decompose.options.inner_rank = 3",
    ),
    "a smaller pair": ("loha", {"decompose": {"rank": 3}}, "finetune.adapter.r: 2 is smaller than decompose.rank = 3"),
    "the other form": (
        "lokh",
        {"finetune": {"adapter": {"options": {"form": "chain"}}}},
        "adapter.options.form: decompose.method 'khatri_rao_low_rank' gives the form 'low-rank'",
    ),
    "a chain for two": (
        "kradapter",
        {"decompose": {"options": {"shape": [2, 2, 4]}}},
        "decompose.options.shape: kradapter takes two factors here, got 3",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_parts_that_nothing_can_take_are_config_errors(tmp_path: Path, name: str) -> None:
    family, changes, message = REFUSALS[name]
    with pytest.raises(ConfigError, match=message):
        line(tmp_path, family, **changes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("family", LINES)
def test_it_runs_end_to_end(ray_head: Any, tmp_path: Path, family: str) -> None:
    tune = {"zero_stage": 2, "max_steps": 3}
    config = line(tmp_path, family, ray_head, finetune=tune, evaluate={"must_improve": False, "max_rows": 4})
    result = run(config, quiet=True)
    losses = result.summary["losses"]
    assert abs(losses["nf4_init"] - losses["nf4"]) > 1e-5
    assert abs(losses["adapter"] - losses["nf4_init"]) > 1e-5
    written = json.loads((result.directory / "run.json").read_text())
    assert written["status"] == "FINISHED"
