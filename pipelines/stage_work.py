"""What every stage reads, moves and computes, counted from shapes, and the seconds of that by the roofline.

What shares a resource adds up (the products, the passes over memory and the commits of one core); the slowest of
processors, disk and network decides; what no size changes (processes, imports) comes on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.data import WORTH_RAY_BYTES
from pipelines.config import PipelineConfig
from pipelines.devices import Rates
from pipelines.estimates import NUM_SAMPLES, NUM_VARIANTS
from pipelines.model_shape import ModelShape
from pipelines.training_memory import TrainingPlan, base_bytes

#: Rows that a plan without data assumes.
TRAIN_ROWS, HELDOUT_ROWS = 10_000, 1_000
#: Held-out rows that `register` scores an export on, twice.
EXPORT_ROWS = 64
#: Operators of a decoder layer and of one adapted linear layer, forward; backward takes twice as many.
LAYER_OPS, ADAPTER_OPS = 35, 6
#: Numbers per token that a layer's operators but its products read and write, forward: times the hidden width (norms,
#: rotations, residuals), and times the inputs and outputs of its linear layers (activation, adapter's sums).
HIDDEN_PASSES, FEATURE_PASSES = 25, 3
#: Passes over W in fp32 per round of a split beside products: two differences, two norms in fp64, W − Q.
ROUND_PASSES = 10
#: Tokens of a sample answer where there is no label set.
LONGEST_SAMPLE = 48
#: Columns and steps of `lowrank.decompositions.spectral_error`.
ERROR_WIDTH, ERROR_STEPS = 4, 3


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The data, as far as time knows it; tokens are per row, `answer_share` the part of them that is scored."""

    train: int = TRAIN_ROWS
    heldout: int = HELDOUT_ROWS
    tokens: float = 512.0
    answer_share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`nodes` machines of `gpus_per_node` GPUs each (0: training on their cores), and their figures."""

    nodes: int
    gpus_per_node: int
    rates: Rates

    @property
    def cores(self) -> int:
        """Of all nodes."""
        return self.nodes * self.rates.cores


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one stage does: counts over the whole cluster, seconds by what they are spent on.

    Attributes:
        name: of the stage.
        units: durable units it commits.
        read_bytes, written_bytes: of files.
        network_bytes: that leave a node, files on shared storage and collectives.
        flops: of products.
        compute_s: of cores or ranks, all lanes working at once.
        fixed_s: that no size changes.
        io_s, network_s: of the disks and of the network alone.
    """

    name: str
    units: int
    read_bytes: float
    written_bytes: float
    network_bytes: float
    flops: float
    compute_s: float
    fixed_s: float
    io_s: float
    network_s: float

    @property
    def seconds(self) -> float:
        """The roofline, and what comes on top."""
        return self.fixed_s + max(self.compute_s, self.io_s, self.network_s)

    @property
    def bound(self) -> str:
        """What the time is spent on."""
        spent = {"fixed": self.fixed_s, "compute": self.compute_s, "disk": self.io_s, "network": self.network_s}
        return max(spent, key=spent.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Given:
    """All that a stage's work follows from."""

    config: PipelineConfig
    shape: ModelShape
    rows: Rows
    cluster: Cluster
    training: TrainingPlan

    @property
    def rank(self) -> int:
        """Of the split; 64 where a rule or a budget chooses it."""
        return self.config.decompose.rank or 64

    def fixed(self, *names: str) -> float:
        """Seconds of things that happen once."""
        return sum(self.cluster.rates.fixed_s[name] for name in names)

    def work(
        self,
        name: str,
        *,
        units: int,
        read: float = 0.0,
        written: float = 0.0,
        moved: float = 0.0,
        flops: float = 0.0,
        compute_s: float = 0.0,
        fixed_s: float = 0.0,
    ) -> Work:
        """The work with the seconds of disks and network; on several nodes every file lies on shared storage."""
        found, nodes = self.cluster.rates, self.cluster.nodes
        shared = read + written if nodes > 1 else 0.0
        return Work(
            name=name,
            units=units,
            read_bytes=read,
            written_bytes=written,
            network_bytes=shared + moved,
            flops=flops,
            compute_s=compute_s,
            fixed_s=fixed_s,
            io_s=(read / found.disk_read_bytes_per_s + written / found.disk_write_bytes_per_s) / nodes,
            network_s=(shared + moved) / (found.network_bytes_per_s * nodes),
        )

    def on_cores(self, unit_seconds: list[float]) -> float:
        """Seconds until units of these lengths are done, the longest no less than alone."""
        lanes = min(self.cluster.cores, self.config.cluster.max_in_flight or self.cluster.cores)
        return max(sum(unit_seconds) / lanes, max(unit_seconds, default=0.0))


def shard(given: Given) -> Work:
    """Every byte is read, written and hashed twice (by piece, by file), after the driver has hashed the source."""
    size, found = float(given.shape.dense_bytes), given.cluster.rates
    shards = max(1, math.ceil(size / given.config.shard.shard_bytes))
    one = size / shards
    unit = one * (2 / found.core_hash_bytes_per_s + 2 / found.core_bytes_per_s) + given.fixed("unit")
    return given.work(
        "shard",
        units=shards + 2,
        read=2 * size,
        written=size,
        compute_s=size / found.core_hash_bytes_per_s + given.on_cores([unit] * shards),
        fixed_s=given.fixed("shard"),
    )


def decompose(given: Given) -> Work:
    """2q + 2 products with W per tensor, and the estimate of the error's largest singular value."""
    shape, found, options = given.shape, given.cluster.rates, given.config.decompose.options
    rank = given.rank
    columns, passes = rank + options.get("oversampling", 8), 2 * (options.get("n_iter", 2) + 1)
    seconds, flops, written = [], 0.0, 0.0
    for spec in shape.targets:
        m, n = spec.shape
        thin = 2 * passes * (m + n) * columns**2  # orthonormal bases between the products
        error = ERROR_STEPS * (2 * m * n * rank + 4 * m * n * ERROR_WIDTH)
        count = 2.0 * m * n * columns * passes + thin + error
        moved = 4.0 * m * n * (passes + 3 * ERROR_STEPS)
        seconds.append(
            max(count / found.core_flops, moved / found.core_bytes_per_s)
            + m * n * shape.itemsize / found.core_bytes_per_s
            + given.fixed("unit", "tensor")
        )
        flops += count
        written += 4.0 * rank * (m + n + 1)
    return given.work(
        "decompose",
        units=len(shape.targets) + 1,
        read=float(shape.num_targets * shape.itemsize),
        written=written,
        flops=flops,
        compute_s=given.on_cores(seconds),
        fixed_s=given.fixed("decompose"),
    )


def _rounds(given: Given) -> int:
    """Times that a split method quantizes W − S."""
    method, options = given.config.quantize.method, given.config.quantize.options
    return 0 if method == "nf4" else int(options.get("n_iter") or {"lq_lora": 20}.get(method, 5))


def quantize(given: Given) -> Work:
    """NF4(W), then per round four thin products, S built twice, W − S quantized and dequantized twice."""
    shape, found, rank, rounds = given.shape, given.cluster.rates, given.rank, _rounds(given)
    seconds, flops = [], 0.0
    for spec in shape.targets:
        m, n = spec.shape
        thin = 8.0 * (m + n) * rank**2
        count = rounds * (2.0 * m * n * rank * 6 + thin)
        passes = 4.0 * m * n * (ROUND_PASSES * rounds + 4)
        seconds.append(
            count / found.core_flops
            + passes / found.core_bytes_per_s
            + m * n * (rounds + 1) / found.core_quantize_per_s
            + given.fixed("unit", "tensor")
        )
        flops += count
    factors = 4.0 * rank * sum(sum(spec.shape) for spec in shape.targets) if rounds else 0.0
    return given.work(
        "quantize",
        units=len(shape.targets) + 1,
        read=shape.num_targets * shape.itemsize + factors,
        written=0.53 * shape.num_targets + factors,
        flops=flops,
        compute_s=given.on_cores(seconds),
        fixed_s=given.fixed("quantize"),
    )


def _pass_seconds(given: Given, tokens: float, passes: int, *, packed: bool, adapted: bool) -> float:
    """One rank's seconds for layers over some tokens: `passes` is 1 forward, 3 with backward, 4 recomputed."""
    shape, found = given.shape, given.cluster.rates
    width = 2 if given.training.dtype == "bfloat16" else 4
    products = 2.0 * shape.num_linear * tokens * (passes if passes == 1 else passes - 1)  # no gradient of frozen W
    attention = 4.0 * shape.attention_size * given.rows.tokens * tokens * shape.num_layers * passes
    adapter = 2.0 * shape.adapter_parameters * tokens * passes if adapted else 0.0
    numbers = HIDDEN_PASSES * shape.hidden_size * shape.num_layers + FEATURE_PASSES * shape.num_features
    operators = (LAYER_OPS * shape.num_layers + (ADAPTER_OPS * len(shape.targets) if adapted else 0)) * passes
    dequantized = shape.num_targets * (passes if passes == 1 else passes - 1) if packed else 0
    weights = width * shape.num_linear * passes
    return (
        max((products + attention + adapter) / found.rank_flops, weights / found.rank_bytes_per_s)
        + passes * numbers * tokens * width / found.rank_bytes_per_s
        + dequantized / found.rank_dequantize_per_s
        + operators * found.rank_op_s
    )


def _head_seconds(given: Given, tokens: float, passes: int) -> float:
    """The output layer, where answers are: its products, and the softmax in fp32."""
    shape, found = given.shape, given.cluster.rates
    scored = given.rows.answer_share * tokens * shape.vocab_size
    products = 2.0 * scored * shape.hidden_size * min(passes, 2)
    return products / found.rank_flops + 4 * 5 * scored * min(passes, 2) / found.rank_bytes_per_s


def _tokenising(given: Given, rows: float) -> list[str]:
    """What starts to tokenise so many rows, of four bytes a token."""
    return ["ray_data"] if 4 * rows * given.rows.tokens >= WORTH_RAY_BYTES else []


def steps_of(config: PipelineConfig, rows: Rows) -> int:
    """Optimizer steps of the whole training."""
    tune = config.finetune
    steps = -(-rows.train // tune.global_batch_size) * tune.epochs
    return min(steps, tune.max_steps or steps)


def finetune(given: Given) -> Work:
    """Every rank's share of the global batch, micro-batch by micro-batch, then the reduced gradient and the step."""
    tune, shape, plan, found = given.config.finetune, given.shape, given.training, given.cluster.rates
    steps, world = steps_of(given.config, given.rows), plan.world
    width = 2 if plan.dtype == "bfloat16" else 4
    share = -(-tune.global_batch_size // world)  # rows of the rank that has most
    micro = -(-share // tune.micro_batch_size)
    tokens, passes = share / micro * given.rows.tokens, 4 if tune.gradient_checkpointing else 3
    packed = tune.base == "nf4"
    gathered = plan.memory.weights * world if plan.stage == 3 else 0  # the partitioned parameters, per micro-batch
    step_bytes = 2.0 * width * shape.adapter_parameters  # reduced, and gathered again or reduced once more
    per_rank = (step_bytes + micro * passes * gathered) * (world - 1) / world
    layers = micro * _pass_seconds(given, tokens, passes, packed=packed, adapted=True)
    head = micro * _head_seconds(given, tokens, passes)
    update = 4.0 * 12 * shape.adapter_parameters / (world if plan.stage else 1) / found.rank_bytes_per_s
    per_step = max(layers + head, per_rank / found.link_bytes_per_s) + update
    across = world * per_rank / max(given.cluster.gpus_per_node, 1) if given.cluster.nodes > 1 else 0.0
    saved = -(-steps // tune.checkpoint_every)
    state = 12.0 * shape.adapter_parameters
    fixed = ["finetune", *_tokenising(given, given.rows.train), *["checkpoint"] * saved]
    total_tokens = tune.global_batch_size * given.rows.tokens * steps
    flops = 2.0 * (shape.num_linear * (passes - 1) + shape.adapter_parameters * passes) * total_tokens
    read = given.cluster.nodes * base_bytes(given.config, shape, width)[0]
    return given.work(
        "finetune",
        units=saved + 3,
        read=float(read),
        written=saved * state + 8.0 * shape.adapter_parameters,
        moved=steps * across,
        flops=flops,
        compute_s=steps * per_step,
        fixed_s=given.fixed(*fixed),
    )


def evaluate(given: Given) -> Work:
    """Four variants over the held-out rows, each unit on the first GPU of its node, or on one core."""
    config, shape, found, cluster = given.config.evaluate, given.shape, given.cluster.rates, given.cluster
    rows = min(given.rows.heldout, config.max_rows or given.rows.heldout)
    chunks = -(-rows // config.rows_per_unit)
    batches = -(-min(rows, config.rows_per_unit) // config.batch_size)
    lanes = cluster.nodes if cluster.gpus_per_node else min(cluster.cores, NUM_VARIANTS)
    width = 2 if given.training.dtype == "bfloat16" else 4
    tokens = config.batch_size * given.rows.tokens
    slower = 1.0 if cluster.gpus_per_node else _rank_cores(given)
    batch = _pass_seconds(given, tokens, 1, packed=False, adapted=False) + _head_seconds(given, tokens, 1)
    scored = NUM_VARIANTS * chunks * batches * batch * slower
    decoded = NUM_VARIANTS * NUM_SAMPLES * min(config.max_new_tokens, LONGEST_SAMPLE)
    if config.exact_match:
        decoded += NUM_VARIANTS * rows * config.max_new_tokens
    token = _pass_seconds(given, 1.0, 1, packed=False, adapted=False) + width * shape.vocab_size * (
        shape.hidden_size / found.rank_bytes_per_s
    )
    loads = NUM_VARIANTS * min(lanes, chunks + 1)
    load = 2 * shape.dense_bytes / found.core_bytes_per_s + shape.num_targets / found.rank_dequantize_per_s * slower
    load += shape.num_targets / found.core_quantize_per_s / NUM_VARIANTS  # `nf4` is quantized on the spot
    flops = 2.0 * shape.num_linear * NUM_VARIANTS * rows * given.rows.tokens
    return given.work(
        "evaluate",
        units=NUM_VARIANTS * (chunks + 1) + 2,
        read=float(loads * shape.dense_bytes),
        flops=flops,
        compute_s=(scored + decoded * token * slower + loads * load) / lanes,
        fixed_s=given.fixed("evaluate", *_tokenising(given, rows)),
    )


def _rank_cores(given: Given) -> float:
    """Cores of a training rank on a node without GPUs; a unit of evaluate has one."""
    threads = given.config.finetune.threads_per_worker
    return float(threads or max(1, given.cluster.cores // given.training.world))


def register(given: Given) -> Work:
    """Plots, card and registry; where the adapter is a LoRA, two models over the first held-out rows in the driver."""
    shape, found, tune = given.shape, given.cluster.rates, given.config.finetune
    seconds = 0.0
    if tune.base == "nf4" and tune.adapter.method in ("lora", "lora_fa", "dylora"):
        tokens = min(EXPORT_ROWS, given.rows.heldout) * given.rows.tokens
        seconds = 2 * 2.0 * shape.num_linear * tokens / (found.core_flops * found.cores)
    return given.work(
        "register",
        units=2,
        read=float(2 * shape.dense_bytes if seconds else 0),
        written=20.0 * shape.adapter_parameters,
        compute_s=seconds,
        fixed_s=given.fixed("register"),
    )
