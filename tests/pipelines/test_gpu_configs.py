"""The ready pipelines for GPUs: each can be planned, and gives the DeepSpeed JSON that it promises, key by key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.zero import deepspeed_config, zero_stage
from pipelines.cli import main
from pipelines.config import PipelineConfig

FOLDER = Path(__file__).parents[2] / "pipelines" / "configs"
NAMES = ("gpu-zero2-nf4", "gpu-zero3-bf16", "cpu-offload")
#: As published: Llama-3.1-8B.
MODEL = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
MODEL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16"}

PARTITIONED = {
    "contiguous_gradients": True,
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
}
ZERO3 = PARTITIONED | {"stage": 3, "stage3_param_persistence_threshold": 10_000}
#: What the YAML adds to or changes of the generated block, and the rest of the block.
ZERO: dict[str, dict[str, Any]] = {
    "gpu-zero2-nf4": PARTITIONED | {"stage": 2, "overlap_comm": True},
    "gpu-zero3-bf16": ZERO3
    | {
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": 100_000_000,
        "stage3_max_live_parameters": 500_000_000,
    },
    "cpu-offload": ZERO3
    | {
        "overlap_comm": False,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
    },
}
RATE = {"gpu-zero2-nf4": 1e-4, "gpu-zero3-bf16": 1e-4, "cpu-offload": 1e-5}
WORLD = {"gpu-zero2-nf4": 64, "gpu-zero3-bf16": 8, "cpu-offload": 4}


def load(name: str) -> PipelineConfig:
    return PipelineConfig.from_yaml(FOLDER / f"{name}.yaml")


def made(name: str, has_gpu: bool, dtype: str) -> dict[str, Any]:
    tune = load(name).finetune
    stage = zero_stage(tune, tune.base, has_gpu)
    return deepspeed_config(tune, stage=stage, world=tune.num_workers, dtype=dtype)


@pytest.mark.parametrize(("has_gpu", "dtype"), [(True, "bfloat16"), (False, "float32")])
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_json(name: str, has_gpu: bool, dtype: str) -> None:
    assert made(name, has_gpu, dtype) == {
        "train_batch_size": WORLD[name],
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": RATE[name],
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": 0.0,
                "torch_adam": True,
                "adam_w_mode": True,
            },
        },
        "zero_allow_untested_optimizer": False,
        "zero_optimization": ZERO[name],
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_itself_reads_it(name: str) -> None:
    """DeepSpeed's own parser, which refuses unknown keys and batches that do not agree; in a process of its own."""
    code = (
        "import json, os, sys; os.environ['DS_ACCELERATOR'] = 'cpu'; import deepspeed; "
        "given = json.loads(sys.argv[1]); world = given['train_batch_size']; "
        "deepspeed.comm.get_rank, deepspeed.comm.get_world_size = (lambda: 0), (lambda: world); "
        "read = deepspeed.DeepSpeedConfig(given); zero = read.zero_config; "
        "print(json.dumps([zero.stage, zero.overlap_comm, zero.max_live_parameters, zero.prefetch_bucket_size, "
        "zero.offload_param and zero.offload_param.device, zero.offload_optimizer and zero.offload_optimizer.device, "
        "read.bfloat16_config.enabled]))"
    )
    given = json.dumps(made(name, True, "bfloat16"))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    block = ZERO[name]
    live, ahead = block.get("stage3_max_live_parameters", 10**9), block.get("stage3_prefetch_bucket_size", 50_000_000)
    devices = [block[key]["device"] if key in block else None for key in ("offload_param", "offload_optimizer")]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [block["stage"], block["overlap_comm"], live, ahead, *devices, True]


@pytest.mark.parametrize("name", NAMES)
def test_each_can_be_planned_without_weights(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODEL))
    config = load(name)
    nodes, gpus = max(1, config.finetune.num_workers // 8), min(8, config.finetune.num_workers)
    arguments = ["plan", str(FOLDER / f"{name}.yaml"), "--model-config", str(path), "--nodes", str(nodes)]
    assert main([*arguments, "--gpus-per-node", str(gpus), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == config.finetune.num_workers, "the comment's cluster is that of num_workers"
    assert found["memory"]["fits"] is True
    assert (found["dtype"], found["zero_stage"]) == ("bfloat16", ZERO[name]["stage"])
    assert not any(note.startswith("finetune.global_batch_size") for note in found["advice"]), "no GPU idles"
    block, ours = dict(found["deepspeed"]["zero_optimization"]), dict(ZERO[name])
    assert 0 < block.pop("reduce_bucket_size") <= ours.pop("reduce_bucket_size"), "the adapter's own, at most"
    assert block == ours
    assert bool(found["memory"]["host"]) == (name == "cpu-offload")


@pytest.mark.parametrize("name", NAMES)
def test_without_its_model_and_data_each_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The placeholders are no crash: `plan` says which of them to replace."""
    code = main(["plan", str(FOLDER / f"{name}.yaml"), "--json", "--set", "model.source=/nowhere/model"])
    found = json.loads(capsys.readouterr().out)
    assert code in (2, 3)
    assert any("/nowhere/model" in refusal for refusal in found["refusals"])
    assert any("data/train.jsonl" in refusal for refusal in found["refusals"])


def test_extra_keys_go_through_block_by_block_and_never_over_a_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODEL | {"num_hidden_layers": 1, "vocab_size": 64}))
    arguments = ["plan", str(FOLDER / "gpu-zero3-bf16.yaml"), "--model-config", str(path), "--json"]
    before = json.loads(_out(capsys, arguments, 0))["deepspeed"]
    extra = "finetune.deepspeed={zero_optimization: {allgather_bucket_size: 7, sub_group_size: 5}, comms_logger: {}}"
    after = json.loads(_out(capsys, [*arguments, "--set", extra], 0))["deepspeed"]
    block = before["zero_optimization"]
    # Keys of the YAML's own extra block give way to the generated ones; the new ones are added or override.
    generated = block | {"overlap_comm": False, "stage3_prefetch_bucket_size": 50_000_000}
    generated |= {"stage3_max_live_parameters": 1_000_000_000, "allgather_bucket_size": 7, "sub_group_size": 5}
    assert after == before | {"zero_optimization": generated, "comms_logger": {}}
    owned = "finetune.deepspeed={gradient_clipping: 2.0}"
    assert "finetune.max_grad_norm" in _out(capsys, [*arguments, "--set", owned], 5)


def _out(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    assert main(arguments) == code
    return capsys.readouterr().out
