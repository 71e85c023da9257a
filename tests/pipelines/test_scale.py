"""Plans on paper: parameter counts, memory of a rank, sums over stages, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.config import PipelineConfig, parse
from pipelines.devices import GIB, PRESETS, Rates, rates
from pipelines.model_shape import ModelShape, read_shape
from pipelines.scale import plan_scale
from pipelines.stage_work import Cluster, Rows, Work
from pipelines.training_memory import base_bytes, training_plan

LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
SEVEN = LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SEVENTY = LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
SEVENTY |= {"num_key_value_heads": 8, "vocab_size": 32000}
SMALL = LLAMA | {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 1000, "tie_word_embeddings": True}
STAGES = ["shard", "decompose", "quantize", "finetune", "evaluate", "register"]


def pipeline(**sections: Any) -> PipelineConfig:
    values = {"name": "scale", "model": {"source": "-"}, "data": {"train": "-", "heldout": "-", "max_length": 128}}
    return parse(values | sections)


def write(directory: Path, values: Any) -> Path:
    path = directory / "config-of-any-name.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.fixture
def small(tmp_path: Path) -> ModelShape:
    return read_shape(write(tmp_path, SMALL), pipeline())


def plan(shape: ModelShape, config: PipelineConfig | None = None, **cluster: Any) -> dict[str, Any]:
    values = {"nodes": 2, "gpus_per_node": 4, "rates": rates("h100", 4)} | cluster
    return plan_scale(config or pipeline(), shape, Cluster(**values), Rows(train=100, heldout=20, tokens=100.0))


@pytest.mark.parametrize(
    ("values", "parameters", "adapter"),
    [
        (SEVEN | {"vocab_size": 32000}, 6_738_415_616, 32 * 16 * (8 * 4096 + 3 * (4096 + 11008))),
        (SEVENTY, 68_976_648_192, 80 * 16 * (2 * 16384 + 2 * 9216 + 3 * 36864)),
        (SEVENTY | {"vocab_size": 128256}, 70_553_706_496, 80 * 16 * (2 * 16384 + 2 * 9216 + 3 * 36864)),
    ],
    ids=["Llama-2-7B", "Llama-2-70B", "Llama-3-70B"],
)
def test_parameters_are_the_published_ones(tmp_path: Path, values: Any, parameters: int, adapter: int) -> None:
    shape = read_shape(write(tmp_path, values), pipeline())
    assert shape.num_parameters == parameters
    assert shape.dense_bytes == 2 * parameters
    assert shape.adapter_parameters == adapter


@pytest.mark.parametrize("method", ["lora", "dora", "lora_fa", "lora_xs", "vera", "loha", "krona", "kradapter", "full"])
def test_adapters_have_the_size_that_they_are_made_with(method: str) -> None:
    """On the meta device as for real; 64x48 layers stand for all shapes."""
    import torch

    from cluster.architecture import LinearSpec
    from lowrank.adapters.base import Layer
    from lowrank.adapters.registry import initial_adapters
    from pipelines.model_shape import _adapter_sizes

    init, ranked = "kaiming", method not in ("krona", "kradapter", "full")
    config = pipeline(
        quantize={"method": "nf4"},
        finetune={"adapter": {"method": method, "init": init} | ({"r": 4} if ranked else {})},
    )
    specs = tuple(LinearSpec(f"layers.{index}.q_proj", (64, 48), False, False) for index in range(2))
    layers = [Layer(s.name, s.shape, i, lambda: torch.randn(64, 48), None) for i, s in enumerate(specs)]
    made = initial_adapters(layers, config.finetune.adapter)
    real = {id(p): p.numel() for one in made.values() for p in one.parameters() if p.requires_grad}
    assert sum(_adapter_sizes(specs, config)) == sum(real.values()) > 0


@pytest.mark.parametrize(
    ("stage", "gradients", "optimizer", "adapter"),
    [  # P = 1000 trained numbers in fp32 on 4 ranks: Adam has 8 bytes each, ZeRO 1 to 3 another fp32 copy
        (0, 4000, 8000, 4000),
        (1, 4000, 3000, 4000),
        (2, 1000, 3000, 4000),
        (3, 1000, 3000, 1000),
    ],
)
def test_zero_stages_partition_what_they_should(
    small: ModelShape, stage: int, gradients: int, optimizer: int, adapter: int
) -> None:
    base = "dense" if stage == 3 else "nf4"
    tune = {"zero_stage": stage, "base": base, "compute_dtype": "float32", "adapter": {"init": "kaiming", "r": 4}}
    config = pipeline(finetune=tune, quantize={"method": "nf4"})
    shape = dataclasses.replace(small, adapter_sizes=(600, 400))
    memory = training_plan(config, shape, rates("h100", 4), 4, True).memory
    assert (memory.gradients, memory.optimizer, memory.adapter) == (gradients, optimizer, adapter)
    whole = base_bytes(config, shape, 4)[0]
    assert memory.weights == (whole // 4 if stage == 3 else whole)
    assert memory.load >= whole, "every rank loads the whole base, whatever the stage"


def test_bfloat16_keeps_fp32_parameters_beside_the_moments(small: ModelShape) -> None:
    shape = dataclasses.replace(small, adapter_sizes=(1000,))
    memory = training_plan(pipeline(finetune={"zero_stage": 2}), shape, rates("h100", 4), 4, True).memory
    assert (memory.adapter, memory.gradients, memory.optimizer) == (2000, 500, 3000)


def test_the_packed_base_by_hand(small: ModelShape) -> None:
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 160)
    others = 1000 * 64 + 5 * 64  # the tied embedding and the norms
    assert small.num_parameters == layers + others
    assert base_bytes(pipeline(), small, 2) == (layers // 2 + layers // 16 + 2 * others, 2 * others)
    dense = pipeline(finetune={"base": "dense", "adapter": {"init": "kaiming"}}, quantize={"method": "nf4"})
    assert base_bytes(dense, small, 2) == (2 * (layers + others),) * 2


def test_offloading_moves_bytes_to_the_host(small: ModelShape) -> None:
    tune = {"base": "dense", "zero_stage": 3, "adapter": {"init": "kaiming"}}
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
    kept = training_plan(pipeline(finetune=tune), small, rates("h100", 4), 4, True).memory
    moved = training_plan(pipeline(finetune=tune | {"deepspeed": offload}), small, rates("h100", 4), 4, True).memory
    assert (kept.host, moved.optimizer) == (0, 0)
    assert moved.host == kept.optimizer + 2 * small.num_parameters // 4
    assert moved.training == kept.training - moved.host


def test_shards_are_as_many_as_the_stage_cuts(small: ModelShape) -> None:
    from pipelines.stages.shard import Rows as Piece
    from pipelines.stages.shard import plan_shards

    config = pipeline(shard={"shard_bytes": 20_000})
    pieces = [
        Piece(name, name, shape, "BF16", 2, False, 0, shape[0]) for name, shape in small.architecture.parameters.items()
    ]
    cut = plan_shards(pieces, 20_000)
    made = {stage["name"]: stage for stage in plan(small, config)["stages"]}
    assert abs(made["shard"]["units"] - 2 - len(cut)) <= 1
    assert made["shard"]["written_bytes"] == 2 * small.num_parameters
    assert made["decompose"]["units"] == made["quantize"]["units"] == 14 + 1


def test_times_are_the_slowest_resource_and_the_start(small: ModelShape) -> None:
    found = plan(small)
    assert [stage["name"] for stage in found["stages"]] == STAGES
    for stage in found["stages"]:
        roof = max(stage["compute_s"], stage["io_s"], stage["network_s"])
        assert stage["seconds"] == stage["fixed_s"] + roof > 0
    start = found["assumed"]["device"]["fixed_s"]["start"]
    assert found["seconds"] == pytest.approx(start + sum(stage["seconds"] for stage in found["stages"]))
    work = Work(name="x", units=1, read_bytes=0, written_bytes=0, network_bytes=0, flops=0,
                compute_s=1, fixed_s=0.5, io_s=3, network_s=2)  # fmt: skip
    assert (work.seconds, work.bound) == (3.5, "disk")


def test_more_machines_take_less_time_and_slower_ones_more(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, SEVEN | {"vocab_size": 32000}), pipeline())
    config = pipeline(finetune={"global_batch_size": 64, "micro_batch_size": 1})

    def seconds(device: str, nodes: int) -> float:
        found = plan(shape, config, nodes=nodes, gpus_per_node=8, rates=rates(device, 8))
        return float(found["stages"][3]["compute_s"])

    assert seconds("h100", 4) < seconds("h100", 1) < seconds("a100", 1)
    alone = plan(shape, config, nodes=1, gpus_per_node=8, rates=rates("h100", 8))
    assert all(stage["network_bytes"] == 0 for stage in alone["stages"])
    assert all(stage["network_bytes"] > 0 for stage in plan(shape, config)["stages"])


def test_seventy_billion_fit_in_nf4_and_not_dense(tmp_path: Path) -> None:
    path = write(tmp_path, SEVENTY)
    folder = Path(__file__).parents[2] / "pipelines" / "configs"
    found = {}
    for name in ("gpu-zero2-nf4", "gpu-zero3-bf16"):
        config = PipelineConfig.from_yaml(folder / f"{name}.yaml")
        found[name] = plan(read_shape(path, config), config, nodes=8, gpus_per_node=8)["memory"]
    assert found["gpu-zero2-nf4"]["fits"] is True
    assert found["gpu-zero2-nf4"]["remedies"] == []
    dense = found["gpu-zero3-bf16"]
    assert dense["weights"] < 3 * GIB < 128 * GIB < dense["load"]
    assert dense["fits"] is False
    assert "finetune.base: nf4" in dense["remedies"][0]


def test_the_command_prints_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, SMALL))
    arguments = ["plan", "--model-config", path, "--nodes", "2", "--gpus-per-node", "4"]
    assert main([*arguments, "--gpu-memory", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == 8
    assert found["memory"]["room"] == 16 * GIB
    assert found["memory"]["fits"] is True
    assert found["memory"]["peak"] == max(found["memory"]["load"], found["memory"]["training"])
    assert found["assumed"]["tokens_per_row"] == 512
    assert any("data sheet" in note for note in found["assumed"]["notes"])
    assert main([*arguments, "--gpu-memory", "1", "--tokens-per-row", "100"]) == 0
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "assumed: " in text
    assert max(map(len, text.splitlines())) <= 80
    assert all(sum(line.strip().startswith(stage + " ") for line in text.splitlines()) == 1 for stage in STAGES)


@pytest.mark.parametrize(
    ("values", "arguments", "says"),
    [
        (SMALL | {"model_type": "no_such"}, [], ["model_type is 'no_such'", "Give the config.json"]),
        (SMALL | {"model_type": "vit"}, [], ["model_type is 'vit'", "Give"]),
        ([1], [], ["model_type is None"]),
        ("{", [], ["not JSON", "Give the config.json"]),
        (None, [], ["No such file", "Give the config.json"]),
        (SMALL | {"quantization_config": {"quant_method": "gptq"}}, [], ["already quantized", "Give the original"]),
        (SMALL | {"hidden_size": 0}, [], ["cannot build", "Give the config.json"]),
        (SMALL, ["--nodes", "-1"], ["--nodes: got -1; allowed is 1 or more"]),
        (SMALL, ["--nodes", "0"], ["--nodes: got 0"]),
        (SMALL, ["--gpus-per-node", "-8"], ["--gpus-per-node: got -8; allowed is 0 or more"]),
        (SMALL, ["--gpu-memory", "0"], ["--gpu-memory: got 0; allowed is more than 0"]),
        (SMALL, ["--gpu-memory", "nan"], ["--gpu-memory: got nan"]),
        (SMALL, ["--device", "abacus"], ["'abacus'", ", ".join(PRESETS)]),
        (SMALL, ["--device", "cpu", "--gpus-per-node", "2"], ["has no GPU", "Set --gpus-per-node 0"]),
        (SMALL, ["--train-rows", "0"], ["--train-rows: got 0"]),
        (SMALL, ["--tokens-per-row", "-2"], ["--tokens-per-row: got -2"]),
    ],
)
def test_what_cannot_be_planned(
    tmp_path: Path, values: Any, arguments: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "absent.json" if values is None else write(tmp_path, values)
    assert main(["plan", "--model-config", str(path), *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in says), message


def test_figures_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = dataclasses.replace(rates("a100", 1), device="mine", memory_bytes=7 * GIB)
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(dataclasses.asdict(mine)))
    assert rates(str(file), 1) == dataclasses.replace(mine, notes=list(mine.notes))
    assert {item.name for item in dataclasses.fields(Rates)} == set(json.loads(file.read_text()))
    file.write_text('{"cores": 1}')
    assert main(["plan", "--model-config", str(write(tmp_path, SMALL)), "--device", str(file)]) == 2
    assert "benchmarks/scale.py --rates FILE" in capsys.readouterr().err
