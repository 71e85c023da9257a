"""The configuration: every problem at once and by path, overrides, what enters a key, and the schema for editors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import PipelineConfig, json_schema, parse, read_yaml, result_fields, to_dict
from pipelines.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"
SECTIONS = ("shard", "decompose", "quantize", "finetune", "evaluate", "register", "serve", "cluster", "store")

#: Fields that may change how a result is made, never what it is; all others enter a key.
EXECUTION = {
    "model": {"source", "tokenizer"},
    "data": {"train", "heldout"},
    "shard": set(),
    "decompose": set(),
    "quantize": set(),
    "finetune": {
        "num_workers",
        "cpus_per_worker",
        "threads_per_worker",
        "placement",
        "backend",
        "micro_batch_size",
        "gradient_checkpointing",
        "checkpoint_every",
        "max_failures",
    },
    "evaluate": {"rows_per_unit", "batch_size"},
    "register": {"tracking_uri", "experiment"},
    "serve": {
        "enabled",
        "engine",
        "vllm_options",
        "host",
        "port",
        "num_replicas",
        "max_replicas",
        "num_cpus",
        "num_gpus",
        "token_file",
        "max_new_tokens",
        "max_concurrent",
        "max_waiting",
        "adapter_mib",
        "host_adapter_mib",
        "canary_alias",
        "canary_share",
        "request_timeout_s",
    },
    "cluster": {
        "address",
        "num_cpus",
        "max_in_flight",
        "task_cpus",
        "stage_resources",
        "node_wait_s",
        "system_metrics_s",
        "token_file",
    },
    "store": {"path", "cache", "lease"},
}


def minimal(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "model": {"source": "m"}, "data": {"train": "t", "heldout": "h"}} | changes


def problems_of(data: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(data, overrides)
    return caught.value.problems


def test_all_problems_are_told_at_once_by_path() -> None:
    data = minimal(
        decompose={"rank": 0, "methd": "exact_svd"},
        finetune={"adapter": {"r": "many"}, "epochs": -1},
        serve={"port": 99999},
        colour="blue",
    )
    del data["data"]["heldout"]
    problems = problems_of(data)
    paths = {problem.partition(":")[0] for problem in problems}
    assert paths == {
        "decompose.rank",
        "decompose.methd",
        "finetune.adapter.r",
        "finetune.epochs",
        "serve.port",
        "colour",
        "data.heldout",
    }
    text = "\n".join(problems)
    assert "got 0" in text
    assert "unknown setting" in text
    assert "required, but missing" in text


def test_overrides_reach_nested_sections_and_keep_the_rest() -> None:
    data = minimal(finetune={"adapter": {"lora_alpha": 8.0}, "epochs": 2})
    config = parse(
        data, ["finetune.adapter.r=16", "decompose.rank=16", "data.labels=[yes_, no_]", "serve.enabled=false"]
    )
    assert (config.finetune.adapter.r, config.finetune.adapter.lora_alpha, config.finetune.epochs) == (16, 8.0, 2)
    assert config.data.labels == ["yes_", "no_"]
    assert config.serve.enabled is False
    assert "r" not in data["finetune"]["adapter"], "the caller's mapping is left alone"


@pytest.mark.parametrize("override", ["finetune.adapter.r", "=3", "name.x=1", "decompose.rank=[", "decompose.rank=0"])
def test_a_bad_override_is_a_config_error(override: str) -> None:
    assert problems_of(minimal(), override)


def test_an_unknown_adapter_is_told_which_there_are() -> None:
    (problem,) = problems_of(minimal(), "finetune.adapter.method=lorra")
    assert problem.startswith("finetune.adapter.method: ")
    assert "'lora'" in problem
    assert "lorra" in problem


def test_all_linear_is_what_null_is() -> None:
    named, null = (parse(minimal(), [f"finetune.adapter.target_modules={value}"]) for value in ("all-linear", "null"))
    assert named == null
    assert problems_of(minimal(), "finetune.adapter.target_modules=all")


def test_an_unknown_override_is_named() -> None:
    assert problems_of(minimal(), "finetune.adaptor.r=3")[0].startswith("finetune.adaptor: unknown setting")


def test_keys_that_are_no_text() -> None:
    """YAML reads `7:` as a number and `on:` as true."""
    found = problems_of({7: 2, True: 3, **minimal()})  # type: ignore[dict-item]
    assert [problem.partition(":")[0] for problem in found] == ["7", "True"]
    assert all("unknown setting" in problem for problem in found)


CONTRADICTIONS = {
    "decompose: set exactly one": ["decompose.energy=0.9", "decompose.rank=4"],
    "finetune.keep": ["finetune.keep=best"],
    "finetune.patience": ["finetune.patience=2"],
    "finetune.adapter.r": ["finetune.adapter.r=4"],
    "finetune.adapter.init: 'kaiming' would lose": ["finetune.adapter.init=kaiming"],
    "finetune.adapter.init: 'pissa' takes its pair": ["finetune.adapter.init=pissa", "quantize.method=nf4"],
    "finetune.adapter.init: 'pissa' is for": [
        "finetune.adapter.init=pissa",
        "finetune.adapter.method=hira",
        "finetune.base=dense",
    ],
    "finetune.adapter.target_modules: layers": ["finetune.adapter.target_modules=[q_proj]"],
    "finetune.adapter.rank_pattern": ["finetune.adapter.rank_pattern={'(': 4}"],
    "finetune.adapter.options.factor": ["finetune.adapter.options.factor=4"],
    "finetune.adapter.r: 4 with method 'full'": ["finetune.adapter={method: full, r: 4}"],
    "finetune.adapter.alpha_pattern": ["finetune.adapter={method: full, alpha_pattern: {q_proj: 4}}"],
    "finetune.base": ["finetune.base=dense", "decompose.mode=replace"],
    "finetune.zero_stage": ["finetune.zero_stage=3"],
    "finetune.optimizer_options.lr_ratio": ["finetune.optimizer=lora_plus", "finetune.optimizer_options={lr_ratio: x}"],
    "finetune.optimizer_options.ratio: unknown": [
        "finetune.optimizer=lora_plus",
        "finetune.optimizer_options={ratio: 4}",
    ],
    "finetune.optimizer: 'galore' projects matrices": [
        "finetune.optimizer=galore",
        "finetune.adapter={method: vera, init: kaiming}",
        "quantize.method=nf4",
    ],
    "finetune.optimizer: 'galore' of rank 16 projects nothing of 'lora'": [
        "finetune.optimizer=galore",
        "finetune.optimizer_options={rank: 16}",
        "finetune.adapter={r: 4, rank_pattern: {q_proj: 16}}",
    ],
    "finetune.optimizer_options.proj_type": ["finetune.optimizer=galore", "finetune.optimizer_options={proj_type: up}"],
    "serve.host": ["serve.host=0.0.0.0"],
    "name": ["name=../evil"],
}


@pytest.mark.parametrize("path", CONTRADICTIONS)
def test_contradictions(path: str) -> None:
    assert any(problem.startswith(path) for problem in problems_of(minimal(), *CONTRADICTIONS[path]))


def test_contradictions_are_told_together() -> None:
    together = [override for path in ("name", "serve.host", "finetune.keep") for override in CONTRADICTIONS[path]]
    assert len(problems_of(minimal(), *together)) == 3


def test_the_defaults_contradict_nothing_and_survive_a_round_trip() -> None:
    config = parse(minimal())
    assert parse(to_dict(config)) == config
    assert parse(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


@pytest.mark.parametrize("section", EXECUTION)
def test_only_execution_fields_stay_out_of_the_key(section: str) -> None:
    config = getattr(parse(minimal()), section)
    every = {field.name for field in dataclasses.fields(config)}
    assert every - set(result_fields(config)) == EXECUTION[section]


def test_nested_sections_keep_their_own_marks() -> None:
    assert "adapter" in result_fields(parse(minimal()).finetune)
    assert result_fields(parse(minimal(), ["finetune.adapter.r=32"]).finetune)["adapter"]["r"] == 32


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=80, deadline=None, database=None)
@given(st.dictionaries(st.sampled_from(["name", "model", "data", *SECTIONS]) | st.text(max_size=6), GARBAGE))
def test_garbage_is_a_config_error_and_nothing_else(garbage: dict[str, Any]) -> None:
    for data in (garbage, minimal(**garbage)):
        with contextlib.suppress(ConfigError):
            parse(data)


@settings(derandomize=True, max_examples=80, deadline=None, database=None)
@given(st.text(max_size=30))
def test_garbage_overrides_are_config_errors_and_nothing_else(override: str) -> None:
    for text in (override, f"decompose.{override}", f"decompose.rank={override}"):
        with contextlib.suppress(ConfigError):
            parse(minimal(), [text])


@pytest.mark.parametrize(
    ("text", "word"), [("- a\n- b", "list"), ("a: [", "YAML"), ("", "NoneType"), ("a: 2020-01-01", "name")]
)
def test_files_that_are_no_pipeline(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        PipelineConfig.from_yaml(path)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "b.yaml"):
        with pytest.raises(ConfigError, match="read pipeline"):
            read_yaml(path)


def described(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for owner in (schema, *schema["$defs"].values()):
        for name, field in owner.get("properties", {}).items():
            # pydantic leaves out a text that only repeats that of the section itself
            section = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
            yield f"{owner['title']}.{name}", section | field


def test_every_setting_is_described() -> None:
    bare = [name for name, field in described(json_schema()) if not field.get("description")]
    assert not bare


def test_the_stored_schema_is_current() -> None:
    """`rankline plan --schema > pipelines/configs/schema.json` writes it."""
    assert json.loads((CONFIGS / "schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: str(path.name))
def test_every_ready_pipeline_is_valid(path: Path) -> None:
    PipelineConfig.from_yaml(path)
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema(), cls=jsonschema.Draft202012Validator)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(minimal(colour="blue"), json_schema(), cls=jsonschema.Draft202012Validator)
