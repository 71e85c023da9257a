"""Every decomposition that a pipeline can name gives a model: beside a quantized rest, or in the weights' place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lines import make_data, run_serially, stage_units, tiny_pipeline
from safetensors.torch import load_file

from cluster.artifacts import ShardSet, SplitSet
from cluster.model import ModelSource, build_adapted
from lowrank.decompositions import METHODS
from lowrank.errors import QuantizationError
from lowrank.factors import load_factors
from pipelines.config import PipelineConfig, parse, to_dict
from pipelines.errors import ConfigError

#: What a method needs beside the tiny line's own settings.
SETTINGS: dict[str, dict[str, Any]] = {
    "exact_svd": {},
    "randomized_svd": {"options": {"oversampling": 2}},
    "block_krylov": {"options": {"n_iter": 1, "block_size": 2}},
    "one_pass": {},
    "als": {"options": {"n_iter": 5}},
    "hadamard": {"rank": 1, "options": {"n_iter": 5}},
    "kronecker": {"rank": 1, "options": {"shape": None, "inner_rank": 1}},
    "khatri_rao": {"rank": None},
    "khatri_rao_low_rank": {"rank": 1},
    "cp": {"stack": "layers"},
    "tucker": {"stack": "projections"},
}


def line(tmp_path: Path, method: str, **sections: Any) -> PipelineConfig:
    """The tiny line with another decomposition."""
    base = to_dict(tiny_pipeline(tmp_path, None, data=make_data(tmp_path)))
    base["decompose"] |= {"method": method, "options": {}} | SETTINGS[method]
    for name, values in sections.items():
        base[name] |= values
    return parse(base)


def test_every_method_is_tried() -> None:
    assert set(SETTINGS) == set(METHODS)


@pytest.mark.parametrize("mode", ["split", "replace"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_its_factors_become_the_initial_model(tmp_path: Path, method: str, mode: str) -> None:
    config = line(tmp_path, method, decompose={"mode": mode}, quantize={"max_rank": 4})
    paths = run_serially(config, "shard", "decompose", "quantize")
    shards, splits = ShardSet(paths["shard"]), SplitSet(paths["quantize"])
    source = ModelSource(paths["shard"], paths["quantize"], config.finetune.adapter)
    built = build_adapted(source, torch.float32, {"init": None})
    for record in splits.records:
        module = record["module"]
        weight, split = shards.load(f"{module}.weight"), splits.load(module)
        factors = load_factors(paths["decompose"] / "units" / module / "factors.safetensors")
        facts = stage_units(config, "decompose").read(module).facts
        truth = float((weight.double() - factors.reconstruct(torch.float64)).norm() / weight.double().norm())
        assert facts["relative_error"] == pytest.approx(truth, rel=1e-3)
        whole = split.reconstruct(torch.float32)
        layer: Any = built.get_submodule(module)
        made = layer.base.dense_weight() + layer.adapters["init"].delta_weight()
        torch.testing.assert_close(made, whole, atol=1e-5, rtol=1e-5)
        if mode == "replace":
            assert split.residual is None
            assert record["packed_bytes"] == 0
            lora = factors.to_lora(max_rank=4)
            torch.testing.assert_close(whole, lora.b @ lora.a, atol=1e-5, rtol=1e-5)
            assert record["factor_bytes"] == 4 * (lora.a.numel() + lora.b.numel())
        else:
            assert record["quantization_error"] <= record["plain_error"]


def test_stacks_of_layers_and_of_projections(tmp_path: Path) -> None:
    units = {}
    for method, stack in (("cp", "layers"), ("tucker", "projections")):
        config = line(tmp_path, method)
        paths = run_serially(config, "shard", "decompose")
        units[stack] = sorted(path.name for path in (paths["decompose"] / "units").glob("stack.*"))
        modules = [path.name for path in (paths["decompose"] / "units").glob("model.*")]
        assert len(modules) == 6
        assert load_file(paths["decompose"] / "units" / modules[0] / "factors.safetensors").keys() == {"left", "right"}
    assert units["layers"] == [f"stack.model.layers.all.mlp.{name}" for name in
                               ("down_proj.16x24", "gate_proj.24x16", "up_proj.24x16")]  # fmt: skip
    assert units["projections"] == [f"stack.model.layers.{k}.{s}" for k in (0, 1) for s in ("16x24", "24x16")]


def test_a_form_without_a_low_rank_one_is_refused_with_a_remedy(tmp_path: Path) -> None:
    config = line(tmp_path, "khatri_rao")
    with pytest.raises(QuantizationError, match=r"takes at least as many numbers .* Set quantize\.max_rank, or"):
        run_serially(config, "shard", "decompose", "quantize")


@pytest.mark.parametrize(
    ("decompose", "message"),
    [
        ({"method": "khatri_rao"}, r"decompose\.rank: khatri_rao has no rank"),
        ({"method": "hadamard", "rank": None, "energy": 0.5}, r"decompose\.energy: hadamard cannot follow it"),
        ({"method": "cp"}, r"decompose\.stack: got None; cp and tucker need 'layers' or 'projections'"),
        ({"budget": 0.5}, r"decompose: set exactly one of budget, energy, error, rank; got"),
        ({"method": "hadamard", "rank": None, "budget": 0.5}, r"decompose\.budget: hadamard cannot follow it"),
        ({"stack": "layers"}, r"decompose\.stack: got 'layers'; cp and tucker need"),
        ({"method": "cp", "stack": "layers", "options": {"depth": 3}}, r"decompose\.options\.depth: follows from"),
        ({"options": {"colour": 1}}, r"decompose\.options\.colour: unknown setting"),
        ({"options": {"n_iter": "many"}}, r"decompose\.options\.n_iter: input should be a valid integer"),
        ({"options": {"n_iter": -1}}, r"decompose\.options.*n_iter = -1 < 0"),
    ],
)
def test_settings_that_do_not_fit_the_method_are_refused(
    tmp_path: Path, decompose: dict[str, Any], message: str
) -> None:
    base = to_dict(tiny_pipeline(tmp_path, None, data=make_data(tmp_path)))
    base["decompose"] |= {"options": {}} | decompose
    with pytest.raises(ConfigError, match=message):
        parse(base)


def test_replace_trains_the_factors(tmp_path: Path) -> None:
    base = to_dict(tiny_pipeline(tmp_path, None, data=make_data(tmp_path)))
    base["decompose"]["mode"] = "replace"
    base["finetune"]["adapter"]["init"] = "kaiming"
    with pytest.raises(ConfigError, match=r"finetune\.adapter\.init: decompose\.mode 'replace' trains the factors"):
        parse(base)


def test_a_budget_over_the_whole_model_chooses_the_ranks(tmp_path: Path) -> None:
    decompose = {"rank": None, "budget": 0.5, "max_rank": 6}
    config = line(tmp_path, "exact_svd", decompose=decompose)
    run_serially(config, "shard", "decompose")
    store = stage_units(config, "decompose")
    chosen = store.read("ranks").facts
    assert chosen["spent"] <= chosen["budget"] == 0.5 * 6 * 16 * 24
    assert chosen["spent"] > chosen["budget"] - (16 + 24), "one more rank would not fit"
    reports = [store.read(module).facts for module in chosen["ranks"]]
    assert [report["rank"] for report in reports] == list(chosen["ranks"].values())
    assert all(1 <= report["rank"] <= 6 for report in reports)
    error = (sum(report["relative_error"] ** 2 for report in reports) / len(reports)) ** 0.5
    assert error == pytest.approx(chosen["relative_error"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_replaced_layers_are_healed(ray_head: Any, tmp_path: Path) -> None:
    """From W to its factors alone, trained, evaluated and registered; the healed loss beats the one before."""
    from pipelines import run

    config = tiny_pipeline(tmp_path, ray_head, decompose={"mode": "replace"}, finetune={"epochs": 4})
    result = run(config, quiet=True)
    losses = result.summary["losses"]
    assert losses["adapter"] < losses["nf4_init"]
    facts = stage_units(config, "quantize").root
    assert facts.is_dir()
    assert not (stage_units(config, "finetune").root / "units" / "plain-lora").exists()
    card = (stage_units(config, "register").root / "units" / "bundle" / "README.md").read_text()
    assert "healed by training" in card
    assert "plain_lora" not in card
