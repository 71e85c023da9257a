"""A tiny Llama with two LoRA adapters, in memory and as the pipeline leaves it on disk."""

import logging
from pathlib import Path
from typing import Any

import pytest
from serving_samples import TEMPLATE, make_adapter, make_model, make_tokenizer

from cluster.artifacts import SplitSet
from cluster.model import ModelSource
from lowrank.adapters.peft_format import save_adapter
from lowrank.config import AdapterConfig
from lowrank.inject import inject

BASE, ONE, TWO = "tiny", "tiny-one.v1", "tiny-two"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def adapted() -> Any:
    """The model with `one` and `two` on every target; None is the bare base."""
    model = make_model()
    targets = ("q_proj", "v_proj", "down_proj")
    shapes = {name: module.weight.shape for name, module in model.named_modules() if name.endswith(targets)}
    one, two = make_adapter(shapes, 1), make_adapter(shapes, 2)
    inject(model, {name: {"one": one[name], "two": two[name]} for name in one}, None)
    return model.eval()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, dict[str, str]]:
    """An NF4 model as `quantize` leaves it, and two adapter directories in PEFT's format."""
    from tiny import make_tiny, make_tokenizer

    root: Path = tmp_path_factory.mktemp("served")
    source = make_tiny(root / "base", base="nf4", seed=3)
    make_tokenizer(source.shards / "units" / "meta", TEMPLATE)
    # an id that is never produced: the tiny model must not end its answers by chance
    (source.shards / "units" / "meta" / "generation_config.json").write_text('{"eos_token_id": 3}')
    config = AdapterConfig(r=4, lora_alpha=4.0)
    adapters = {}
    for seed, model_id in enumerate((ONE, TWO), start=1):
        shapes = {module: split.residual.shape for module, split in SplitSet(source.splits).items()}
        save_adapter(root / model_id, make_adapter(shapes, seed), config, {})
        adapters[model_id] = str(root / model_id)
    return source, adapters


@pytest.fixture
def engine_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the engine logs, also after a test that deployed has turned Serve's loggers down in this process."""
    caplog.set_level(logging.WARNING, logger="ray.serve.rankline")
    return caplog
