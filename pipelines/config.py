"""The pipeline's one configuration: every room's dataclass composed in one strict dataclass that pydantic validates.

`PipelineConfig.from_yaml` reads a YAML file, applies `--set` overrides and reports all problems at once, each by its
dotted path. `result_fields` is what enters a stage's key: everything but the fields marked `EXECUTION` by their owners.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from cluster.config import (
    ClusterConfig,
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    ServeConfig,
    resource_problems,
)
from lowrank.adapter_options import ADAPTER_OPTIONS, TAKES_SPLIT, full_problem
from lowrank.config import EXECUTION, STRICT, DecomposeConfig, QuantizeConfig
from lowrank.optimizer_options import OPTIMIZER_OPTIONS, optimizer_problem
from lowrank.options import BUDGETED, METHOD_OPTIONS, RULES
from lowrank.quantize_options import QUANTIZE_OPTIONS
from lowrank.reading import shown
from pipelines.errors import ConfigError
from pipelines.split_checks import split_problems
from pipelines.store_checks import store_problems
from pipelines.yaml_text import MOST_BYTES, parse_yaml, plain

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    source: Annotated[str, EXECUTION]
    """Hugging Face directory, `.gguf` file, `package:NAME` (a GGUF inside an installed package) or `hub:OWNER/NAME`."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    tokenizer: Annotated[str | None, EXECUTION] = None
    """Directory of another tokenizer; null takes the model's own."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How the checkpoint is cut into row-block files."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    shard_bytes: Annotated[int, Ge(1024)] = 128 * 1024 * 1024
    """Largest shard file in bytes; rows are spread over the files evenly by bytes."""


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """The MLflow registry."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str | None = None
    """Registered model; null is the pipeline's name."""
    alias: str = "champion"
    """Alias that moves to this version when the gate passed and it is no worse than the present holder."""
    tracking_uri: Annotated[str | None, EXECUTION] = None
    """MLflow tracking URI, without a password; null is a sqlite database in the store."""
    experiment: Annotated[str, EXECUTION] = "rankline"
    """MLflow experiment."""


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Where artifacts and run records lie."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    path: Annotated[str, EXECUTION] = "runs"
    """Directory (on several nodes a shared one), or URI of an object store (`s3://BUCKET/PREFIX`, `gs://`, `file:///`),
    without credentials."""
    cache: Annotated[str | None, EXECUTION] = None
    """Of an object store: local directory where each node keeps what it has read; null is below ~/.cache/rankline."""
    lease: Annotated[str | None, EXECUTION] = None
    """Of an object store: SQLAlchemy URL, without a password, of the database that keeps a run to one driver; null is
    the tracking database."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """One pipeline: a model, its data and how every stage treats them."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT | {"title": "rankline pipeline"}

    name: Annotated[str, EXECUTION]
    """Name of the run and of its directory in the store: letters, digits, `.`, `_`, `-`."""
    model: ModelConfig
    """The pretrained model."""
    data: DataConfig
    """Training and held-out rows."""
    shard: ShardConfig = field(default_factory=ShardConfig)
    """Checkpoint -> row-block shards."""
    decompose: DecomposeConfig = field(default_factory=lambda: DecomposeConfig(rank=16))
    """Shards -> low-rank factors."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """Shards and factors -> packed 4-bit weights."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Packed weights and rows -> trained adapter."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Adapter against dense, nf4 and nf4_init."""
    register: RegisterConfig = field(default_factory=RegisterConfig)
    """Adapter -> MLflow model version."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """Model version -> endpoint."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where it runs."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Where everything is kept."""

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
        """Read a YAML file; `overrides` are `dotted.path=value` with YAML values.

        Raises:
            ConfigError: with every problem found, by path.
        """
        return parse(read_yaml(Path(path)), overrides)


def refuse_store(store: StoreConfig) -> None:
    """Refuse a store that cannot be one, or holds what must not be written down.

    Raises:
        ConfigError: with every problem.
    """
    if problems := list(store_problems(store.path, store.lease)):
        raise ConfigError(problems)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, read safely.

    Raises:
        ConfigError: missing, not YAML, too large, or not a mapping.
    """
    try:
        with path.open("rb") as handle:
            data = handle.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"read pipeline {path}: {error.strerror}. Give the path of a pipeline YAML.") from error
    return yaml_mapping(data, str(path))


def yaml_mapping(text: bytes, name: str) -> dict[str, Any]:
    """The mapping that a YAML file of that name holds.

    Raises:
        ConfigError: not YAML, too large, or not a mapping.
    """
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(
            f"read pipeline {name}: not valid YAML: {error}. Allowed are sections of plain values, each key once."
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"read pipeline {name}: got {type(data).__name__}, allowed is a mapping of sections.")
    return data


@cache
def _adapter() -> TypeAdapter[PipelineConfig]:
    return TypeAdapter(PipelineConfig)


def parse(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> PipelineConfig:
    """Validate a mapping with overrides applied.

    Raises:
        ConfigError: with every problem found, by path.
    """
    merged: dict[str, Any] = plain(data)
    for override in overrides:
        _apply(merged, override)
    try:
        config = _adapter().validate_python(merged)
    except ValidationError as error:
        raise ConfigError([_problem(item) for item in error.errors(include_url=False)]) from error
    problems = list(_contradictions(config))
    if problems:
        raise ConfigError(problems)
    return config


def _apply(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: allowed is dotted.path=value, for example decompose.rank=16.")
    *parents, leaf = path.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: {parent!r} is not a section.")
    try:
        data[leaf] = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {override}: the value is not YAML ({error}).") from error


def _problem(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"] if not (isinstance(part, str) and "[" in part))
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{path}: unknown setting. Check the spelling; `rankline plan --schema` lists all settings."
    got = (
        ""
        if item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument")
        else f"; got {shown(item['input'])}"
    )
    what = "required, but missing" if not got else item["msg"][0].lower() + item["msg"][1:]
    return f"{path}: {what}{got}."


def _contradictions(config: PipelineConfig) -> Iterator[str]:
    """Settings that are fine alone but not together."""
    if not _NAME.fullmatch(config.name):
        yield f"name: got {config.name!r}; allowed are 1 to 64 letters, digits, '.', '_', '-', not first a sign."
    yield from _decompose_problems(config.decompose)
    yield from _option_problems(
        QUANTIZE_OPTIONS[config.quantize.method], config.quantize.options, "quantize", "options"
    )
    yield from _adapter_problems(config)
    yield from _optimizer_problems(config.finetune)
    tune = config.finetune
    if tune.keep == "best" and tune.eval_every is None:
        yield "finetune.keep: 'best' needs finetune.eval_every."
    if tune.patience is not None and tune.eval_every is None:
        yield "finetune.patience: needs finetune.eval_every."
    r, rank = tune.adapter.r, config.decompose.rank
    if config.quantize.method != "nf4" and tune.base == "nf4" and r and rank and r < rank:
        yield (
            f"finetune.adapter.r: {r} is smaller than decompose.rank = {rank}, which the residual is quantized "
            f"against. Set finetune.adapter.r >= {rank} or null, or decompose.rank <= {r}."
        )
    if config.decompose.mode == "replace" and tune.adapter.init != "split":
        yield "finetune.adapter.init: decompose.mode 'replace' trains the factors. Set it to 'split'."
    if tune.zero_stage == 3 and tune.base == "nf4" and not tune.allow_zero3_quantized:
        yield "finetune.zero_stage: 3 over an NF4 base needs finetune.allow_zero3_quantized: true; 2 is the default."
    if config.serve.host not in ("127.0.0.1", "localhost", "::1") and not config.serve.token_file:
        yield f"serve.host: {config.serve.host!r} is not loopback and needs serve.token_file, a token of your own."
    yield from store_problems(config.store.path, config.store.lease)
    yield from resource_problems(config.cluster.stage_resources)
    if re.search(r"://[^/@]*:[^/@]*@", config.register.tracking_uri or ""):
        yield (
            "register.tracking_uri: holds a password, which would stand in records and in MLflow. Leave it out: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or for a database PGPASSWORD or ~/.pgpass."
        )


def _decompose_problems(config: DecomposeConfig) -> Iterator[str]:
    """Options that the method does not know, and a rank rule that it cannot follow."""
    given = [key for key in ("rank", "energy", "error", "budget") if getattr(config, key) is not None]
    plain = config.method in BUDGETED and config.stack is None
    rules = RULES[config.method] | ({"budget"} if plain else set())
    if not rules and given:
        yield f"decompose.{given[0]}: {config.method} has no rank. Leave it out, or set it to null."
    elif rules and len(given) != 1:
        yield f"decompose: set exactly one of {', '.join(sorted(rules))}; got {given or 'none'}."
    elif given and given[0] not in rules:
        yield f"decompose.{given[0]}: {config.method} cannot follow it. Set decompose.rank instead."
    options: Any = METHOD_OPTIONS[config.method]
    stacks = any(item.name == "depth" for item in dataclasses.fields(options))
    if stacks != (config.stack is not None):
        yield f"decompose.stack: got {config.stack!r}; cp and tucker need 'layers' or 'projections', the others null."
    if "depth" in config.options:
        yield "decompose.options.depth: follows from decompose.stack. Leave it out."
    yield from _option_problems(options, config.options, "decompose", "options")


def _adapter_problems(config: PipelineConfig) -> Iterator[str]:
    """Options that the family does not know, patterns that are no regular expression, starts that the base has not."""
    adapter = config.finetune.adapter
    yield from _option_problems(ADAPTER_OPTIONS[adapter.method], adapter.options, "finetune", "adapter", "options")
    if adapter.method == "full" and (problem := full_problem(adapter)) is not None:
        yield f"finetune.adapter.{problem}"
    for field_name in ("target_modules", "rank_pattern", "alpha_pattern", "modules_to_save"):
        for pattern in getattr(adapter, field_name) or ():
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"finetune.adapter.{field_name}: {pattern!r} is no regular expression ({error})."
    if config.decompose.mode == "replace" and config.finetune.base == "dense":
        yield "finetune.base: decompose.mode 'replace' leaves no dense weights. Set it to 'nf4'."
    yield from split_problems(config.decompose, config.quantize, config.finetune)
    split_off = config.finetune.base == "nf4" and config.quantize.method != "nf4"
    if split_off and adapter.method in TAKES_SPLIT and adapter.init != "split":
        yield (
            f"finetune.adapter.init: {adapter.init!r} would lose the part that quantize.method "
            f"{config.quantize.method!r} takes out of W. Set it to 'split', or quantize.method to 'nf4'."
        )
    if split_off and adapter.target_modules is not None:
        yield (
            "finetune.adapter.target_modules: layers without an adapter would lose the part that quantize.method "
            f"{config.quantize.method!r} takes out of W. Leave it out, or set quantize.method to 'nf4'."
        )
    if adapter.init in ("pissa", "milora", "olora") and adapter.method not in ("lora", "lora_fa", "dylora"):
        yield f"finetune.adapter.init: {adapter.init!r} is for lora, lora_fa and dylora. Set it to 'kaiming'."
    if adapter.init in ("pissa", "milora", "olora") and config.finetune.base != "dense":
        yield (
            f"finetune.adapter.init: {adapter.init!r} takes its pair out of a dense base. Over NF4 set decompose.rank, "
            "quantize.method 'qpissa' and init 'split'."
        )


def _optimizer_problems(config: FinetuneConfig) -> Iterator[str]:
    """Options that the optimizer does not know, and adapters that it cannot step."""
    options = OPTIMIZER_OPTIONS[config.optimizer]
    yield from _option_problems(options, config.optimizer_options, "finetune", "optimizer_options")
    problem = optimizer_problem(config.optimizer, config.optimizer_options, config.adapter)
    if problem is not None:
        yield f"finetune.optimizer: {problem}"


def _option_problems(options: Any, given: dict[str, Any], *path: str) -> Iterator[str]:
    try:
        TypeAdapter(options).validate_python(given)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            yield _problem(item | {"loc": (*path, *item["loc"])})


def result_fields(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass that decide a result (all but those marked `EXECUTION`)."""
    hints = get_type_hints(type(config), include_extras=True)
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        if EXECUTION in getattr(hints[item.name], "__metadata__", ()) or _optional_execution(hints[item.name]):
            continue
        value = getattr(config, item.name)
        found[item.name] = result_fields(value) if dataclasses.is_dataclass(value) else value
    return found


def _optional_execution(hint: Any) -> bool:
    """Whether a union such as `Annotated[int, EXECUTION] | None` carries the mark."""
    return any(EXECUTION in getattr(part, "__metadata__", ()) for part in getattr(hint, "__args__", ()))


def to_dict(config: PipelineConfig) -> dict[str, Any]:
    """The whole configuration as plain values, defaults included."""
    value: dict[str, Any] = _adapter().dump_python(config, mode="json")
    return value


def json_schema() -> dict[str, Any]:
    """JSON schema of a pipeline YAML, for editors."""
    return _adapter().json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
