"""A configuration that means the same from any directory, as runs keep it and jobs take it along.

A job of a pipeline whose store is an object store is told the URI of its YAML there, and needs nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.config import PipelineConfig, read_yaml, to_dict, yaml_mapping
from pipelines.errors import ConfigError
from pipelines.store_checks import is_uri, store_problems


def portable_yaml(config: PipelineConfig) -> bytes:
    """The whole configuration as YAML with absolute paths, so that it means the same from any directory."""
    import yaml

    values = to_dict(config)
    for section, name in (("model", "source"), ("model", "tokenizer"), ("data", "train"), ("data", "heldout")):
        values[section][name] = _absolute(values[section][name])
    if not is_uri(config.store.path):
        values["store"]["path"] = str(Path(config.store.path).resolve())
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text.encode()


def _absolute(source: str | None) -> str | None:
    """A local path made absolute; `package:`, `hub:` and URIs as they are."""
    if source is None or ":" in source:
        return source
    return str(Path(source).expanduser().absolute())


def read_pipeline(where: str) -> dict[str, Any]:
    """The mapping in a pipeline YAML: a file, or an object such as `s3://BUCKET/PREFIX/p.yaml?region=us-east-1`.

    Raises:
        ConfigError: as `read_yaml`, or the URI holds credentials. cluster.errors.StorageError: it cannot be read.
    """
    from cluster.objects import Mirror, plain

    if not is_uri(where):
        return read_yaml(Path(where))
    whole, mark, options = where.partition("?")
    parent, _, name = whole.rpartition("/")
    if problems := [problem.replace("store.path:", "read pipeline:") for problem in store_problems(where, None)]:
        raise ConfigError(problems)
    try:
        data = Mirror(f"{parent}{mark}{options}", Path("/")).get(Path("/") / name)
    except FileNotFoundError as error:
        raise ConfigError(f"read pipeline {plain(where)}: there is no such object. Give a pipeline YAML.") from error
    return yaml_mapping(data, plain(where))
