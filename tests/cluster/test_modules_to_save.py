"""Modules trained whole beside the adapter: under every ZeRO stage, and in every form that leaves the house."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ranks import run_processes
from tiny import make_tiny, tiny_model
from torch import Tensor
from training import TOLERANCE, losses_of, make_job, make_token_tables, reference

from cluster.export import export_lora, export_merged
from cluster.model import ModelSource, build_adapted
from cluster.train_job import ADAPTER_UNIT, TrainJob
from lowrank.adapters.peft_format import load_saved_modules
from lowrank.config import AdapterConfig

STEPS = 4
MODULES = ["lm_head", "norm", "embed_tokens"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """Tiny models with a tied head over NF4 and dense weights; tokens of unequal lengths beside them."""
    root = tmp_path_factory.mktemp("saved")
    adapter = AdapterConfig(r=2, lora_alpha=4.0, init="kaiming", modules_to_save=MODULES)
    made = {base: make_tiny(root / base, "qwen2", base=base, adapter=adapter) for base in ("nf4", "dense")}
    make_token_tables(root, made["nf4"])
    return made


def job_of(source: ModelSource, root: Path, stage: int) -> TrainJob:
    settings = {"max_steps": STEPS, "checkpoint_every": 2, "allow_zero3_quantized": True}
    return make_job(source, root, zero_stage=stage, **settings)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(8, 72).reshape(4, 16), use_cache=False).logits
    return found


def assert_trained(job: TrainJob, losses: list[float]) -> None:
    assert losses_of(job) == pytest.approx(losses, abs=TOLERANCE)
    assert len(losses) == STEPS
    saved = load_saved_modules(job.store.path(ADAPTER_UNIT))
    before = dict(tiny_model("qwen2").named_parameters(remove_duplicate=False))
    assert set(saved) == {"lm_head", "model.norm", "model.embed_tokens"}
    for module, named in saved.items():
        assert (named["weight"] - before[f"{module}.weight"]).abs().max() > 1e-4
    assert not torch.equal(saved["lm_head"]["weight"], saved["model.embed_tokens"]["weight"])
    num_adapter = sum(2 * sum(record["shape"]) for record in _records(job.source))
    assert job.store.read(ADAPTER_UNIT).facts["num_parameters"] == num_adapter + 2 * 104 * 16 + 16


def _records(source: ModelSource) -> list[dict[str, Any]]:
    from cluster.artifacts import SplitSet

    return SplitSet(source.splits).records


def test_they_train_resume_and_leave_in_every_form(
    bases: dict[str, ModelSource], tmp_path: Path, alone: Callable[..., None]
) -> None:
    from ranks import Interrupted
    from transformers import AutoModelForCausalLM

    job = job_of(bases["dense"], tmp_path / "run", 2)
    with pytest.raises(Interrupted):
        alone(job, stop_after=2)
    alone(job)
    assert_trained(job, reference(job)[0])
    adapter = job.store.path(ADAPTER_UNIT)
    trained = logits_of(build_adapted(job.source, torch.float32, {"a": adapter}))
    export_lora(job.source, adapter, tmp_path / "lora", None, {"name": "tiny"})
    by_peft = peft.PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path / "lora")
    torch.testing.assert_close(logits_of(by_peft), trained, rtol=1e-4, atol=1e-4)
    export_merged(job.source, adapter, tmp_path / "merged", "trained")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-4, atol=1e-4)
    assert (trained - logits_of(tiny_model("qwen2"))).abs().max() > 0.01


@pytest.mark.slow
def test_two_ranks_equal_one_plain_process_under_every_stage(bases: dict[str, ModelSource], tmp_path: Path) -> None:
    jobs = {
        (base, stage): job_of(source, tmp_path / f"{base}{stage}", stage)
        for base, source in bases.items()
        for stage in range(4)
    }
    run_processes(2, tmp_path / "two", [(job, None) for job in jobs.values()])
    expected = {base: reference(job_of(source, tmp_path / base, 0))[0] for base, source in bases.items()}
    for (base, _), job in jobs.items():
        assert_trained(job, expected[base])
