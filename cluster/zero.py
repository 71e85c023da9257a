"""Decide how DeepSpeed is to train: the ZeRO stage, its JSON, and what a rank will hold. Pure; no cluster needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import TrainError
from lowrank.optimizer_options import optimizer_problem

if TYPE_CHECKING:
    from cluster.config import FinetuneConfig

Base = Literal["nf4", "dense"]
Plain = Literal["AdamW", "SGD"]

#: Numbers of an adapter tensor up to which ZeRO-3 keeps it whole on every rank.
PERSISTENT = 10_000

#: fp32 numbers per trained one that every rank holds whole at a step: gradient, direction, value, own moments (those of
#: GaLore at a rank of a quarter of the smaller side: 2/4, and its projectors 1/4).
_WHOLE = {"adamw": 0, "lora_plus": 0, "riemannian": 3, "reflora": 3, "altlora": 5, "lora_rite": 5, "galore": 4}
#: Optimizers whose moments are among them, and not AdamW's.
_OWN_MOMENTS = ("altlora", "lora_rite", "galore")

#: Keys that the training loop owns: another value would break the loss, the resume or the batches.
_OWNED = {
    "train_batch_size": "finetune.global_batch_size",
    "train_micro_batch_size_per_gpu": "finetune.micro_batch_size",
    "gradient_accumulation_steps": "finetune.global_batch_size and finetune.micro_batch_size",
    "gradient_clipping": "finetune.max_grad_norm",
    "optimizer": "finetune.optimizer, finetune.learning_rate, finetune.betas and finetune.weight_decay",
    "zero_allow_untested_optimizer": "finetune.optimizer",
    "scheduler": "finetune.warmup_ratio and finetune.min_lr_ratio",
    "bf16": "finetune.compute_dtype",
    "fp16": "finetune.compute_dtype",
}


def zero_stage(config: FinetuneConfig, base: Base, has_gpu: bool) -> int:
    """The ZeRO stage to run.

    ZeRO-3 is the default where it saves what is large (a dense base on GPUs). Over NF4 the base is already a quarter
    of its size and lies in buffers, which ZeRO-3 does not partition: it would gain nothing and cost 2-4 times the time.

    Raises:
        TrainError: stage 3 over an NF4 base without `allow_zero3_quantized`.
    """
    stage = config.zero_stage
    if stage is None:
        return 3 if base == "dense" and has_gpu else 2
    if stage == 3 and base == "nf4" and not config.allow_zero3_quantized:
        raise TrainError(
            "plan finetune: zero_stage is 3 over an NF4 base, but ZeRO-3 cannot partition quantized weights "
            "(bitsandbytes#1249). Set finetune.zero_stage to 0, 1 or 2 (or null), or, to run it all the same with the "
            "base whole on every rank, finetune.allow_zero3_quantized = true."
        )
    return stage


def check_optimizer(config: FinetuneConfig) -> None:
    """Refuse an optimizer of pairs A, B for an adapter that is none, and GaLore where it has nothing to project.

    Raises:
        TrainError: naming both, and what is allowed.
    """
    problem = optimizer_problem(config.optimizer, config.optimizer_options, config.adapter)
    if problem is not None:
        raise TrainError(f"plan finetune: finetune.optimizer {problem}")


def effective_stage(stage: int, dtype: str) -> int:
    """The stage that runs for the planned one: 1 in place of 0 in bfloat16.

    Without ZeRO, DeepSpeed 0.19 keeps bfloat16 training's fp32 weights and moments where nobody can gather them, so
    that no checkpoint could go on with another number of workers. ZeRO-1 computes the same and holds less.
    """
    return 1 if stage == 0 and dtype == "bfloat16" else stage


def deepspeed_config(
    config: FinetuneConfig,
    *,
    stage: int,
    world: int,
    dtype: str,
    accumulation: int = 1,
    plain: Plain = "AdamW",
    clips: bool = True,
    persistent: int = PERSISTENT,
) -> dict[str, Any]:
    """The DeepSpeed JSON.

    Args:
        config: Optimizer, clipping, and `deepspeed`, whose keys are merged over the generated ones.
        stage: From `zero_stage`.
        world: Ranks.
        dtype: `float32` or `bfloat16`.
        accumulation: Micro-batches per optimizer step.
        plain: What steps the partitions; `lowrank.optimizers.base.Optimizer.plain`.
        clips: Whether DeepSpeed clips the gradient; off where the loop clips it before it redirects it.
        persistent: ZeRO-3 keeps tensors of up to this many numbers whole on every rank.

    Raises:
        TrainError: `finetune.deepspeed` sets a key that a field of `finetune` sets.
    """
    _check_extra(config.deepspeed, stage)
    generated = {
        # The sizes only have to agree with one another: the loop cuts its own batches and sets the boundaries.
        "train_batch_size": world * accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.max_grad_norm if clips else 0.0,
        "optimizer": _optimizer(config, plain),
        # DeepSpeed knows Adam's kin only; plain SGD has no state that a partition could break.
        "zero_allow_untested_optimizer": plain == "SGD",
        "zero_optimization": _zero_block(stage, persistent),
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    return merge(generated, config.deepspeed)


def _optimizer(config: FinetuneConfig, plain: Plain) -> dict[str, Any]:
    if plain == "SGD":
        return {"type": plain, "params": {"lr": config.learning_rate, "weight_decay": config.weight_decay}}
    params = {
        "lr": config.learning_rate,
        "betas": list(config.betas),
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
        # torch's own AdamW; the default would compile a C++ extension on first use.
        "torch_adam": True,
        "adam_w_mode": True,
    }
    return {"type": plain, "params": params}


def _zero_block(stage: int, persistent: int) -> dict[str, Any]:
    if stage == 0:
        return {"stage": 0}
    block: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if stage == 3:
        block |= {
            # Small tensors (norms, LoRA factors of narrow layers) stay whole: gathering them costs more than they do.
            "stage3_param_persistence_threshold": persistent,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
        }
    return block


def _check_extra(extra: Mapping[str, Any], stage: int) -> None:
    for key in extra:
        if key in _OWNED:
            raise TrainError(
                f"plan finetune: finetune.deepspeed sets {key!r}, which belongs to {_OWNED[key]}. "
                "Remove it there and set the field."
            )
    block = extra.get("zero_optimization")
    if isinstance(block, Mapping) and block.get("stage", stage) != stage:
        raise TrainError(
            f"plan finetune: finetune.deepspeed.zero_optimization.stage is {block['stage']}, the plan says {stage}. "
            "Remove it there and set finetune.zero_stage."
        )


def merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` over `base`, block by block.

    Example:
        >>> merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4})
        {'a': {'b': 1, 'c': 3}, 'd': 4}
    """
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank holds at its peak, by what holds them."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations


def estimate_memory(
    config: FinetuneConfig,
    *,
    stage: int,
    world: int,
    dtype: str,
    base_bytes: int,
    partitionable_bytes: int,
    adapter_parameters: int,
    hidden_size: int,
    num_layers: int,
    vocabulary: int,
    max_length: int,
) -> MemoryEstimate:
    """What one rank will hold, to within a factor of about two (activations are rough).

    Args:
        config: Micro-batch, optimizer and gradient checkpointing.
        stage: ZeRO stage; 1 partitions the optimizer, 2 the gradients too, 3 the parameters too.
        world: Ranks.
        dtype: `float32` or `bfloat16`; in bfloat16 the optimizer also keeps fp32 parameters.
        base_bytes: Bytes of the frozen base as it lies in memory.
        partitionable_bytes: Those of them in parameters, not in NF4 buffers.
        adapter_parameters: Trained numbers.
        hidden_size: Width of the model.
        num_layers: Its depth.
        vocabulary: Its tokens.
        max_length: Longest row in tokens.
    """
    width = 4 if dtype == "float32" else 2
    parameters, optimizer_share = (world if stage == 3 else 1), (world if stage >= 1 else 1)
    adapter = adapter_parameters * width // parameters
    gradients = adapter_parameters * width // (world if stage >= 2 else 1)
    # AdamW's two moments, in bfloat16 fp32 parameters too.
    numbers = (0 if config.optimizer in _OWN_MOMENTS else 2) + (0 if width == 4 else 1)
    moments = 4 * adapter_parameters * numbers // optimizer_share + 4 * adapter_parameters * _WHOLE[config.optimizer]
    # ZeRO 1 to 3 step a flat fp32 copy of their partition, in fp32 too.
    moments += adapter_parameters * 4 // optimizer_share if stage and width == 4 else 0
    base = base_bytes - partitionable_bytes + partitionable_bytes // parameters
    tokens = config.micro_batch_size * max_length
    # About 34 numbers of the hidden width per token and layer, or 1 when only layer inputs are kept.
    per_token = hidden_size * (num_layers + 34 if config.gradient_checkpointing else 34 * num_layers)
    activations = tokens * (per_token * width + 2 * 4 * vocabulary)
    return MemoryEstimate(base, adapter, gradients, moments, activations)
