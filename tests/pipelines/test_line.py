"""The whole line on real Ray, DeepSpeed and MLflow: what it leaves, what it redoes, and who is champion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from lines import chat_rows, is_finished, ledger_lines, stage_units, store_of, with_changes
from tiny import write_jsonl

from cluster.durable import UnitStore
from cluster.model import ModelSource, build_adapted, build_variant, initial_adapters
from lowrank.adapters.peft_format import load_adapter
from pipelines import maintenance, run
from pipelines.errors import ArtifactError, GateError, exit_code
from pipelines.preflight import plan
from pipelines.sources import hash_sources
from pipelines.stages import evaluate
from pipelines.tracking import RegistryReader
from pipelines.workflow import stage_keys

STAGES = ["shard", "decompose", "quantize", "finetune", "evaluate", "register"]
VARIANTS = {"dense", "nf4", "nf4_init", "adapter"}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


def test_the_summary_holds_what_tools_read(whole_line: Any) -> None:
    result = whole_line.result
    summary = json.loads((result.directory / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert set(summary["losses"]) == VARIANTS
    assert set(summary["accuracy"]) == VARIANTS | {"majority"}
    assert summary["losses"]["adapter"] < summary["losses"]["nf4_init"]
    assert set(summary["stages"]) == set(STAGES)
    for stage in summary["stages"].values():
        assert stage["seconds"] > 0
        assert stage["peak_rss_bytes"] > 1e7
        assert 0 < stage["units"] <= stage["units_done"]
    assert summary["registered"]["name"] == "tiny"
    assert summary["registered"]["version"] == "1"
    assert summary["registered"]["alias"] == "champion"
    assert summary["endpoint"] is None
    for file in ("report.html", "pipeline.yaml", "run.json"):
        assert (result.directory / file).stat().st_size > 0
    assert json.loads((result.directory / "run.json").read_text())["status"] == "FINISHED"


def test_mlflow_holds_a_run_per_stage_below_one_parent(whole_line: Any) -> None:
    from mlflow import MlflowClient

    result = whole_line.result
    client = MlflowClient(tracking_uri=result.mlflow_uri, registry_uri=result.mlflow_uri)
    experiment = client.get_experiment_by_name("rankline").experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{result.mlflow_run_id}'")
    assert {child.info.run_name for child in children} >= set(STAGES)
    assert client.get_run(result.mlflow_run_id).info.status == "FINISHED"
    losses = next(child for child in children if child.info.run_name == "finetune").info.run_id
    assert [metric.step for metric in client.get_metric_history(losses, "loss")] == list(range(1, 9))
    version = client.get_model_version("tiny", "1")
    facts = result.stages[-1].facts
    assert {f"rankline.key.{stage}" for stage in STAGES[1:5]} <= set(version.tags)
    assert version.run_id == facts["run_id"]


def test_the_clusters_token_stands_nowhere(whole_line: Any, ray_head: Any) -> None:
    """Not in manifests, records, ledgers, reports, Ray Train's directory, MLflow's database or its artifacts."""
    token, root = Path(ray_head.token_file).read_text().strip(), Path(whole_line.config.store.path)
    assert len(token) > 20
    files = [path for path in root.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    assert [path for path in files if token.encode() in path.read_bytes()] == []


def test_a_second_run_finds_everything_done(whole_line: Any) -> None:
    before = ledger_lines(whole_line.config)
    again = run(whole_line.config, quiet=True)
    assert [(stage.name, stage.cached, stage.units_done) for stage in again.stages] == [(n, True, 0) for n in STAGES]
    assert ledger_lines(whole_line.config) == before
    assert again.summary["losses"] == whole_line.result.summary["losses"]
    assert again.mlflow_run_id == whole_line.result.mlflow_run_id


def test_a_report_is_drawn_again_when_it_would_say_something_else(whole_line: Any) -> None:
    config = whole_line.config
    page = store_of(config).run_dir(config.name) / "report.html"
    run(config, quiet=True)
    drawn = page.stat().st_mtime_ns
    run(config, quiet=True)
    assert page.stat().st_mtime_ns == drawn
    page.unlink()
    run(config, quiet=True)
    assert page.stat().st_mtime_ns > drawn
    drawn = page.stat().st_mtime_ns
    run(with_changes(config, cluster={"max_in_flight": 3}), quiet=True)  # the page shows the configuration
    assert page.stat().st_mtime_ns > drawn


def test_a_driver_that_died_between_a_manifest_and_its_sidecar_is_followed(whole_line: Any) -> None:
    sidecar = stage_units(whole_line.config, "decompose").root / "sidecar.json"
    before = json.loads(sidecar.read_text())
    sidecar.unlink()
    stages = {stage.name: stage for stage in run(whole_line.config, quiet=True).stages}
    after = json.loads(sidecar.read_text())
    assert after["nodes"] == before["nodes"]
    assert stages["decompose"].cached
    assert stages["decompose"].seconds == after["seconds"] > 0


def test_damage_is_found_before_it_is_used(whole_line: Any, tmp_path: Path) -> None:
    config, keys = whole_line.config, {stage.name: stage.key for stage in whole_line.result.stages}
    units = store_of(config).units("finetune", keys["finetune"])
    path = units.path("adapter") / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        for change, verify in (({"name": "damaged", "register": {"alias": "best", "name": "tiny"}}, False), ({}, True)):
            with pytest.raises(ArtifactError, match=r"use finetune: .*adapter_model\.safetensors is damaged") as caught:
                run(with_changes(config, **change), quiet=True, verify=verify)
            assert exit_code(caught.value) == 3
        found = maintenance.verify(store_of(config), "tiny")
        assert [stage["stage"] for stage in found["stages"] if stage["state"] == "damaged"] == ["finetune"]
    finally:
        path.write_bytes(whole)
    run(config, quiet=True, verify=True)
    assert maintenance.verify(store_of(config), "tiny")["problems"] == []


def cached(config: Any) -> list[str]:
    return [stage["name"] for stage in plan(config)["stages"] if stage["cached"]]


def test_a_changed_result_redoes_its_stage_and_later_ones_only(whole_line: Any, tmp_path: Path) -> None:
    config = whole_line.config
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"shard": {"shard_bytes": 4096}}, []),
        ({"decompose": {"rank": 1}}, STAGES[:1]),
        ({"quantize": {"double_quant": False}}, STAGES[:2]),
        ({"finetune": {"seed": 5}}, STAGES[:3]),
        ({"evaluate": {"max_rows": 4}}, STAGES[:4]),
        ({"register": {"alias": "best"}}, STAGES[:5]),
    ]
    for change, kept in cases:
        assert cached(with_changes(config, **change)) == kept, change


def test_a_changed_execution_redoes_nothing(whole_line: Any, tmp_path: Path) -> None:
    """Nor do files of the same content in another place."""
    data = whole_line.config.data
    moved = tmp_path / "train.jsonl"
    moved.write_bytes(Path(data.train).read_bytes())
    (tmp_path / "m").symlink_to(whole_line.config.model.source)
    changed = with_changes(
        whole_line.config,
        name="other",
        model={"source": str(tmp_path / "m")},
        data={"train": str(moved)},
        cluster={"address": None, "max_in_flight": 7, "task_cpus": 0.5, "num_cpus": 9},
        finetune={"num_workers": 2, "micro_batch_size": 1, "checkpoint_every": 3, "max_failures": 0},
        evaluate={"rows_per_unit": 3, "batch_size": 2},
        serve={"enabled": False, "port": 4321},
        register={"name": "tiny"},
    )
    assert cached(changed) == STAGES


def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.arange(8, 72).reshape(4, 16)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


def test_the_registered_version_loads_in_stock_peft(whole_line: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, result = whole_line.config, whole_line.result
    registered = result.summary["registered"]
    reader = RegistryReader(result.mlflow_uri)
    [listed] = [one for one in reader.versions(registered["name"]) if one.version == registered["version"]]
    version = Path(urlsplit(listed.source).path)
    assert (version / "README.md").is_file()
    assert json.loads((version / "lineage.json").read_text())["rankline.key.finetune"] == result.stages[3].key
    keys = {stage.name: stage.key for stage in result.stages}
    store = store_of(config)
    source = ModelSource(
        shards=store.artifact("shard", keys["shard"]),
        splits=store.artifact("quantize", keys["quantize"]),
        adapter=config.finetune.adapter,
        adapter_dir=version / "adapter",
    )
    original = AutoModelForCausalLM.from_pretrained(config.model.source, dtype=torch.float32)
    by_peft = logits_of(PeftModel.from_pretrained(original, version / "plain_lora").eval())
    ours = build_variant(source, "dense", torch.float32)
    plain = logits_of(ours)
    trained, initial = load_adapter(version / "adapter"), initial_adapters(source)
    for module, adapter in trained.items():
        with torch.no_grad():
            ours.get_submodule(module).weight += adapter.delta_weight() - initial[module].delta_weight()
    torch.testing.assert_close(logits_of(ours), by_peft, atol=1e-4, rtol=0)
    assert (by_peft - plain).abs().max() > 0.05
    assert logits_of(build_adapted(source, torch.float32, {"a": version / "adapter"})).isfinite().all()


def base_scores(config: Any) -> list[dict[str, Any]]:
    return [
        event
        for directory in sorted((store_of(config).root / "_artifacts" / "scores").iterdir())
        for event in UnitStore(directory).ledger()
        if event["event"] == "commit"
    ]


def test_base_scores_are_kept_by_what_decides_them(whole_line: Any, tmp_path: Path) -> None:
    """Not by what training changes, but by weights, rows and limits."""

    def where(variant: Any, **changes: Any) -> Path:
        config = with_changes(whole_line.config, **changes)
        sources = hash_sources(config, store_of(config).root / "_hashes.json")
        keys = stage_keys(config, sources)
        inputs = {"quantize": store_of(config).artifact("quantize", stage_keys(whole_line.config, sources)["quantize"])}
        context: Any = SimpleNamespace(
            config=config,
            sources=sources,
            store=stage_units(config, "evaluate"),
            inputs=inputs,
            input_keys=keys,
            mirror=None,
        )
        return evaluate._shared(context, variant)

    other = {"heldout": str(write_jsonl(tmp_path / "other.jsonl", chat_rows(8, offset=700)))}
    assert where("dense") != where("nf4")
    for variant in ("dense", "nf4"):
        known = where(variant)
        assert where(variant, finetune={"learning_rate": 0.5}, evaluate={"metric": "accuracy", "max_rows": 4}) == known
        for change in (
            {"data": {"max_length": 50}},
            {"data": other},
            {"evaluate": {"max_new_tokens": 3}},
            {"shard": {"shard_bytes": 4096}},
        ):
            assert where(variant, **change) != known, change


@pytest.mark.slow
def test_a_worse_version_is_registered_but_the_champion_stays(whole_line: Any) -> None:
    config = with_changes(whole_line.config, decompose={"rank": 1}, finetune={"max_steps": 1, "learning_rate": 1e-3})
    result = run(config, quiet=True)
    assert [stage.cached for stage in result.stages] == [True, *[False] * 5]
    assert result.summary["losses"]["adapter"] > whole_line.result.summary["losses"]["adapter"]
    registered = result.summary["registered"]
    assert registered["version"] == "2"
    assert registered["alias"] is None
    assert re.fullmatch(
        r"'champion' stays at version 1: its loss \d+\.\d+ is better than \d+\.\d+", registered["reason"]
    )


def test_the_gate_stops_the_line(whole_line: Any) -> None:
    # by accuracy the tiny model learns nothing
    config = with_changes(whole_line.config, name="gated", evaluate={"metric": "accuracy"})
    scored = base_scores(config)
    assert {event["unit"] for event in scored} >= {"rows-000000-000004", "samples-000000-000003"}
    with pytest.raises(GateError, match=r"^evaluate: the adapter does not improve accuracy .*: false\.$") as e:
        run(config, quiet=True)
    assert exit_code(e.value) == 5
    record = json.loads((store_of(config).run_dir("gated") / "run.json").read_text())
    assert record["status"] == "FAILED"
    assert record["error"].startswith("GateError: evaluate: ")
    assert set(record["stages"]) == set(STAGES[:5])
    assert is_finished(config, "evaluate")
    assert base_scores(config) == scored  # what no training changes was not scored again
