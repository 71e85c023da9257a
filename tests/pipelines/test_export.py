"""`rankline export`: directories that stock PEFT and transformers load, with the logits of the trained model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lines import store_of

from cluster.model import ModelSource, build_adapted
from pipelines.cli import main

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.arange(8, 72).reshape(4, 16)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits.float()
    return logits


def original(line: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(line.config.model.source, dtype=torch.float32)


def trained(line: Any) -> Any:
    keys = {stage.name: stage.key for stage in line.result.stages}
    store = store_of(line.config)
    source = ModelSource(
        shards=store.artifact("shard", keys["shard"]),
        splits=store.artifact("quantize", keys["quantize"]),
        adapter=line.config.finetune.adapter,
    )
    adapter = store.units("finetune", keys["finetune"]).path("adapter")
    return build_adapted(source, torch.float32, {"a": adapter})


def export(line: Any, out: Path, *words: str, capsys: Any) -> dict[str, Any]:
    root = str(store_of(line.config).root)
    code = main(["export", line.config.name, "--store", root, "--out", str(out), "--json", *words])
    printed = capsys.readouterr().out
    assert code == 0, printed
    facts: dict[str, Any] = json.loads(printed)
    return facts


def test_a_merged_model_loads_in_transformers_with_the_served_logits(
    whole_line: Any, tmp_path: Path, capsys: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = export(whole_line, tmp_path / "m", "--format", "merged", capsys=capsys)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), logits_of(trained(whole_line)), atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("1 + 1")["input_ids"]
    assert 0 < facts["change"] < 1
    assert 0 < facts["requantization_error"] < 0.2


def test_a_lora_loads_in_peft_and_equals_the_merge_into_the_original(
    whole_line: Any, tmp_path: Path, capsys: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    facts = export(whole_line, tmp_path / "l", capsys=capsys)
    assert facts["rank"] in (1, 8, 16, 32, 64)
    assert facts["retained_energy_min"] == 1
    keys = {stage.name: stage.key for stage in whole_line.result.stages}
    summary = store_of(whole_line.config).units("evaluate", keys["evaluate"]).read("summary").facts
    assert facts["loss_rows"] == summary["adapter"]["num_rows"]
    assert facts["loss_trained"] == pytest.approx(summary["adapter"]["loss"], abs=1e-4)
    assert facts["loss_exported"] != facts["loss_trained"]
    onto = export(whole_line, tmp_path / "m", "--format", "merged", "--onto", "original", capsys=capsys)
    assert onto["loss_exported"] == pytest.approx(facts["loss_exported"], abs=1e-5)
    by_peft = logits_of(PeftModel.from_pretrained(original(whole_line), tmp_path / "l"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32))
    torch.testing.assert_close(by_peft, merged, atol=1e-4, rtol=0)
    assert (by_peft - logits_of(original(whole_line))).abs().max() > 0.05
    cut = export(whole_line, tmp_path / "cut", "--max-rank", "1", capsys=capsys)
    assert cut["rank"] == 1
    assert 0 < cut["retained_energy_min"] < 1
    PeftModel.from_pretrained(original(whole_line), tmp_path / "cut")


def test_it_refuses_what_it_cannot_do_and_leaves_nothing(whole_line: Any, tmp_path: Path, capsys: Any) -> None:
    root = str(store_of(whole_line.config).root)
    there = tmp_path / "there"
    there.mkdir()
    for words, code, message in [
        (["nobody", "--out", str(tmp_path / "a")], 2, "no such run"),
        ([whole_line.config.name, "--out", str(there)], 2, "exists. Give --out a new directory"),
        ([whole_line.config.name, "--out", str(tmp_path / "b"), "--max-rank", "0"], 2, "Set --max-rank >= 1"),
    ]:
        assert main(["export", *words, "--store", root]) == code
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
