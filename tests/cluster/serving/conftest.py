"""A tiny Llama with two LoRA adapters, in memory and as the pipeline leaves it on disk."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_samples import make_adapter, make_model, make_served, make_tokenizer, write_served_adapter

from cluster.config import ServeConfig
from cluster.model import ModelSource
from cluster.serving.service import Service
from cluster.serving.sources import FixedSource
from cluster.serving.spec import ServeSpec
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
    root: Path = tmp_path_factory.mktemp("served")
    source = make_served(root / "base")
    ids = enumerate((ONE, TWO), start=1)
    return source, {model_id: str(write_served_adapter(source, root / model_id, seed)) for seed, model_id in ids}


@pytest.fixture(scope="module")
def service(served: tuple[ModelSource, dict[str, str]]) -> Iterator[Service]:
    """Base and adapters, four requests at a time and none that waits."""
    source, adapters = served
    spec = ServeSpec(
        app_name="test", source=source, base_model_id=BASE, adapters=FixedSource(adapters), required=tuple(adapters)
    )
    service = Service.load(spec, ServeConfig(max_new_tokens=200, max_concurrent=4, max_waiting=0))
    yield service
    service.close()


@pytest.fixture
def engine_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the engine logs, also after a test that deployed has turned Serve's loggers down in this process."""
    caplog.set_level(logging.WARNING, logger="ray.serve.rankline")
    return caplog
