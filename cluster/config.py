"""Configuration of data, fine-tuning, evaluation, serving and the cluster, importable without Ray or torch.

Fields are part of the *result* (they enter a stage's key) unless annotated with `EXECUTION`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from lowrank.config import EXECUTION, STRICT, AdapterConfig

__all__ = [
    "EXECUTION",
    "ClusterConfig",
    "DataConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "ServeConfig",
]

StageOnRay = Literal["shard", "decompose", "quantize", "finetune", "evaluate"]
#: Resources that have settings of their own.
_OWN_SETTINGS = ("CPU", "memory", "object_store_memory")


def resource_problems(wanted: Mapping[StageOnRay, Mapping[str, float]]) -> Iterator[str]:
    """What Ray would refuse of `cluster.stage_resources`."""
    for stage, resources in wanted.items():
        for name, amount in resources.items():
            where = f"cluster.stage_resources.{stage}.{name}"
            if name in _OWN_SETTINGS or (name == "GPU" and stage == "finetune"):
                yield f"{where}: has a setting of its own (cluster.task_cpus, finetune.cpus_per_worker)."
            elif not name or (amount > 1 and amount != int(amount)) or amount < 1e-4:
                yield f"{where}: got {amount:g}; allowed are 0.0001 to 1, and whole numbers, under a name."


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and held-out rows: JSONL or Parquet; a file, a directory or a glob."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    train: Annotated[str, EXECUTION]
    """Training rows. The content is hashed into the key, the path is not."""
    heldout: Annotated[str, EXECUTION]
    """Held-out rows; a row that also stands in `train` is refused."""
    format: Literal["auto", "chat", "completion", "text"] = "auto"
    """`chat` (`messages`), `completion` (`prompt`, `completion`), `text`, or `auto` by the first row's fields."""
    max_length: Annotated[int, Ge(2)] = 512
    """Longest row in tokens. A longer prompt loses its beginning, never its answer; an answer too long is refused."""
    labels: list[str] | None = None
    """Closed set of answers for accuracy. Null takes the distinct answers when they are at most `max_labels`."""
    max_labels: Annotated[int, Ge(2)] = 32
    """More distinct answers than this are free text: accuracy is then greedy exact match."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """LoRA-family fine-tuning with DeepSpeed ZeRO under Ray Train."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The adapter."""
    num_workers: Annotated[int, Ge(1), EXECUTION] = 2
    """Data-parallel workers."""
    cpus_per_worker: Annotated[float, Gt(0), EXECUTION] = 1.0
    """Logical CPUs a worker reserves."""
    threads_per_worker: Annotated[int, Ge(1), EXECUTION] | None = None
    """Torch threads of a worker; null shares the cores of a node among the workers on it."""
    placement: Annotated[Literal["spread", "pack", "strict_spread", "strict_pack"], EXECUTION] = "spread"
    """Workers over the nodes of a cluster, or on as few as hold them; the strict ones refuse one node for two workers,
    or a second node."""
    base: Literal["nf4", "dense"] = "nf4"
    """Frozen weights under the adapter: the packed ones of quantize, or the original dense ones."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage; null takes 3 over a dense base on GPUs, else 2. In bfloat16, 0 runs as 1 (same numbers)."""
    allow_zero3_quantized: bool = False
    """ZeRO-3 over an NF4 base only with this flag; `zero.Init` is never used there."""
    backend: Annotated[Literal["auto", "gloo", "nccl"], EXECUTION] = "auto"
    """Collective backend; `auto` is nccl with GPUs, else gloo."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on GPUs that have it, else float32 (half precision is a trap on most CPUs)."""
    epochs: Annotated[int, Ge(1)] = 1
    """Passes over the training rows."""
    max_steps: Annotated[int, Ge(1)] | None = None
    """Stop after this many optimizer steps; null disables it."""
    global_batch_size: Annotated[int, Ge(1)] = 16
    """Rows per optimizer step over all workers and micro-batches; it does not depend on the number of workers."""
    micro_batch_size: Annotated[int, Ge(1), EXECUTION] = 8
    """Rows per forward pass of one worker."""
    optimizer: Literal["adamw", "lora_plus", "riemannian", "reflora", "altlora", "lora_rite", "galore"] = "adamw"
    """What steps the adapter. `galore` keeps AdamW's moments of projected gradient matrices, those of `full` above all.
    The others but `adamw` step pairs A, B by what that does to ΔW, and need a family of such pairs; `altlora` and
    `lora_rite` keep moments of their own, the others AdamW's."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """The optimizer's own options, for example `lr_ratio` of `lora_plus`."""
    learning_rate: Annotated[float, Gt(0)] = 2e-4
    """Peak learning rate; that of A where the optimizer gives B another."""
    min_lr_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Final over peak learning rate of the cosine."""
    warmup_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.05
    """Share of the steps with linear warm-up."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the first and second moment."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Clipping of the gradient's norm over all parameters, before any optimizer changes it; 0 disables it."""
    gradient_checkpointing: Annotated[bool, EXECUTION] = False
    """Recompute activations in the backward pass to save memory."""
    packing: bool = False
    """Pack several rows into one of `data.max_length` tokens (GPUs); off, rows are batched by length (CPUs)."""
    eval_every: Annotated[int, Ge(1)] | None = None
    """Optimizer steps between evaluations on held-out rows; null evaluates at the end only."""
    eval_rows: Annotated[int, Ge(1)] = 64
    """Held-out rows (the first ones) of these evaluations."""
    patience: Annotated[int, Ge(1)] | None = None
    """Evaluations without improvement before training stops; null disables early stopping."""
    keep: Literal["best", "last"] = "last"
    """Which checkpoint becomes the adapter; `best` needs `eval_every`."""
    checkpoint_every: Annotated[int, Ge(1), EXECUTION] = 10
    """Optimizer steps between durable checkpoints."""
    max_failures: Annotated[int, Ge(0), EXECUTION] = 3
    """Times a lost worker is replaced before the stage fails."""
    seed: int = 0
    """Seed of the row order and of dropout."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Extra DeepSpeed JSON keys, merged over the generated ones."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out evaluation of dense, nf4, nf4_init and adapter on the same tokens, and the gate."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    metric: Literal["loss", "accuracy"] = "loss"
    """What the gate and the champion are judged by."""
    must_improve: bool = True
    """Stop the line (exit code 5) unless the adapter beats nf4_init on `metric`."""
    max_rows: Annotated[int, Ge(1)] | None = None
    """Held-out rows used (the first ones); null uses all."""
    max_new_tokens: Annotated[int, Ge(1)] = 64
    """Longest greedy answer when accuracy is exact match."""
    exact_match: bool = False
    """Without a closed label set: generate greedily and count exact answers (slow); off, accuracy is null."""
    rows_per_unit: Annotated[int, Ge(1), EXECUTION] = 100
    """Rows per durable unit."""
    batch_size: Annotated[int, Ge(1), EXECUTION] = 10
    """Rows per forward pass."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The OpenAI-compatible endpoint on Ray Serve."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    enabled: Annotated[bool, EXECUTION] = True
    """Deploy after register."""
    engine: Annotated[Literal["rankline", "vllm"], EXECUTION] = "rankline"
    """`rankline` serves every family in one batch; `vllm` (installed beside) those that are plain LoRA exactly."""
    vllm_options: Annotated[dict[str, Any], EXECUTION] = field(default_factory=dict)
    """Further arguments of vLLM's engine (`max_lora_rank`, `gpu_memory_utilization`, `max_model_len` ...)."""
    host: Annotated[str, EXECUTION] = "127.0.0.1"
    """Address to bind; anything but loopback needs a token file of your own."""
    port: Annotated[int, Interval(ge=1, le=65535), EXECUTION] = 8000
    """HTTP port."""
    num_replicas: Annotated[int, Ge(1), EXECUTION] = 1
    """Replicas of the engine; the fewest of them where `max_replicas` is set."""
    max_replicas: Annotated[int, Ge(1), EXECUTION] | None = None
    """Serve starts replicas, up to so many, while each has more than `max_concurrent` requests; null starts none."""
    num_cpus: Annotated[float, Gt(0), EXECUTION] = 1.0
    """Logical CPUs of a replica."""
    num_gpus: Annotated[float, Ge(0), EXECUTION] | None = None
    """GPUs that Ray keeps for a replica; null takes one where the cluster has any."""
    token_file: Annotated[str | None, EXECUTION] = None
    """File with the bearer token (mode 0600); null makes one in the store."""
    max_new_tokens: Annotated[int, Ge(1), EXECUTION] = 512
    """Largest `max_tokens` of a request."""
    max_concurrent: Annotated[int, Ge(1), EXECUTION] = 16
    """Requests that are answered at a time, per replica."""
    max_waiting: Annotated[int, Ge(0), EXECUTION] = 48
    """Requests that wait for their turn, per replica; the adapter with the fewest in flight is next. More are answered
    429."""
    adapter_mib: Annotated[float, Gt(0), EXECUTION] = 1024
    """Memory of the adapters that a replica holds, in MiB; the one that was used least recently makes room."""
    host_adapter_mib: Annotated[float, Ge(0), EXECUTION] = 4096
    """On a GPU: memory of the host for adapters that had to make room there, in MiB."""
    canary_alias: Annotated[str | None, EXECUTION] = None
    """A share of the requests for a bare name goes to the version that holds this alias; null sends none."""
    canary_share: Annotated[float, Interval(ge=0, le=1), EXECUTION] = 0.1
    """That share."""
    request_timeout_s: Annotated[float, Gt(0), EXECUTION] = 600.0
    """Seconds after which a request that is not answered ends with an error."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where it runs."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    address: Annotated[str | None, EXECUTION] = None
    """Address of a running Ray cluster (`HOST:PORT`); null starts or adopts an embedded one."""
    num_cpus: Annotated[int, Ge(1), EXECUTION] | None = None
    """Logical CPUs of the embedded cluster; null is max(4, 2 × cores), room for training, data and serving."""
    max_in_flight: Annotated[int, Ge(1), EXECUTION] | None = None
    """Units in flight at once; null is as many as fit the cluster, at most the physical cores when embedded."""
    task_cpus: Annotated[float, Gt(0), EXECUTION] = 1.0
    """Logical CPUs of one unit task."""
    stage_resources: Annotated[dict[StageOnRay, dict[str, Annotated[float, Gt(0)]]], EXECUTION] = field(
        default_factory=dict
    )
    """Ray resources beside CPUs that each unit task (each worker of finetune) of a stage takes, for example
    `{decompose: {cpu_node: 0.01}}`: it runs on the nodes that were started with them (`ray start --resources`)."""
    node_wait_s: Annotated[float, Ge(0), EXECUTION] = 120.0
    """Seconds that work waits for another node once every node that fitted is lost; then the run ends (exit 4)."""
    system_metrics_s: Annotated[float, Gt(0), EXECUTION] | None = 10.0
    """Seconds between samples of every node's CPU, memory, disk, network and GPUs for MLflow; null takes none."""
    token_file: Annotated[str | None, EXECUTION] = None
    """Ray's authentication token; null takes RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
