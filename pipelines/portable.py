"""A configuration that means the same from any directory, as runs keep it and jobs take it along."""

from __future__ import annotations

from pathlib import Path

from pipelines.config import PipelineConfig, to_dict
from pipelines.store_checks import is_uri


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
